"""Runs the suite with the lowest and with the newest releases that the package admits, each in an environment of its own.

    python tests/versions.py                                    # both, the whole suite
    python tests/versions.py --only lowest --pin torch==2.13.0 -- tests/test_update.py

Prints a table of what was installed and how the tests ended; pip's and pytest's own words go to files in ``--folder``. The bound
that the extras put on torch is left out. PyPI's builds of torch for Linux are of several gigabytes, CUDA's libraries with them:
``--index https://download.pytorch.org/whl/cpu`` has builds without.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SHOWN = ("torch", "torchrl", "tensordict", "gymnasium", "numpy", "mujoco")


def requirements(extra: str | None = "test") -> dict[str, Requirement]:
    """What the package and its ``extra`` need, by name; of several of one name the first, which is the core's."""
    listed = PROJECT["dependencies"] + (PROJECT["optional-dependencies"][extra] if extra else [])
    found: dict[str, Requirement] = {}
    for requirement in map(Requirement, listed):
        nested = requirement.extras if requirement.name == PROJECT["name"] else ()
        each = [requirements(name) for name in sorted(nested)] or [{requirement.name: requirement}]
        for more in each:
            found = {**more, **found}
    return found


def lowest(requirement: Requirement) -> str:
    """``name==version`` of the lower bound."""
    (bound,) = [each.version for each in requirement.specifier if each.operator == ">="]
    return f"{requirement.name}=={bound}"


def wanted(which: str, pins: list[str]) -> list[str]:
    """What is installed, as pip reads it."""
    chosen = {name: lowest(each) if which == "lowest" else str(each) for name, each in requirements().items()}
    chosen |= {Requirement(pin).name: pin for pin in pins}
    return list(chosen.values())


def run(which: str, folder: Path, pins: list[str], index: str | None, tests: list[str]) -> list[str]:
    """A row of the table."""
    python = folder / which / "bin" / "python"
    venv.create(folder / which, with_pip=True)
    pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    where = ["--extra-index-url", index] if index else []
    with (folder / f"{which}.txt").open("w") as log:

        def call(*command) -> int:
            return subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT).returncode

        if call(*pip, *where, *wanted(which, pins)) or call(*pip, "--no-deps", "--editable", ROOT):
            return [which, *["?"] * len(SHOWN), f"cannot be installed: see {log.name}"]
        started = time.perf_counter()
        code = call(python, "-m", "pytest", *tests)
    lines = Path(log.name).read_text().splitlines()
    # With -q pytest's configuration of this project is quiet twice, and leaves its last line out.
    *_, ended = [line for line in lines if re.search(r" in [\d.]+s", line)] or [f"pytest ended with {code}"]
    asked = f"import importlib.metadata as m; print(*[m.version(name) for name in {SHOWN}])"
    versions = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.split()
    minutes = (time.perf_counter() - started) / 60
    return [which, *versions, f"{ended.strip('= ')} ({minutes:.0f} min)"]


def main() -> None:
    """Reads the command line, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["lowest", "newest"], help="one of the two")
    parser.add_argument("--pin", nargs="+", default=[], metavar="NAME==VERSION", help="releases in place of those")
    parser.add_argument("--index", help="a further index of packages")
    parser.add_argument("--folder", type=Path, help="where environments and logs are kept; a temporary one by default")
    parser.add_argument("tests", nargs="*", help="what pytest gets; the whole suite by default")
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    rows = [["", *SHOWN, "tests"], ["---"] * (len(SHOWN) + 2)]
    for which in [given.only] if given.only else ["lowest", "newest"]:
        rows.append(run(which, folder, given.pin, given.index, given.tests))
    sys.stdout.write("".join(f"| {' | '.join(row)} |\n" for row in rows) + f"logs: {folder}\n")


if __name__ == "__main__":
    main()
