"""The package as others get it: what its wheel holds, a core install alone, and releases that it refuses."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rl2_torchrl.requirements import SUPPORTED

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
FIRST_LISTING = re.search(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy of what git holds: setuptools leaves traces in the folder that it builds from."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("rl2_torchrl", "recipes", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip("wheel", "--no-build-isolation", "--wheel-dir", folder, source)
    (path,) = folder.iterdir()
    return path


def pip(command, *arguments):
    options = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    subprocess.run([sys.executable, "-m", "pip", command, *options, *arguments], check=True)


def test_a_wheel_holds_the_package_alone_and_whole(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    about = f"rl2_torchrl-{PROJECT['version']}.dist-info"
    assert {name.partition("/")[0] for name in names} == {"rl2_torchrl", about}
    ours = [path for path in (ROOT / "rl2_torchrl").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {name for name in names if name.startswith("rl2_torchrl/")} == {str(path.relative_to(ROOT)) for path in ours}
    assert {"rl2_torchrl/py.typed", "rl2_torchrl/kernels/gru.c", "rl2_torchrl/kernels/vector.h"} <= set(names)
    assert f"{about}/licenses/LICENSE" in names


def core_install(folder, wheel):
    """A folder of the wheel and of what it needs without extras, all that those need included."""
    pip("install", "--target", folder, wheel)
    needed, known = [Requirement(text) for text in PROJECT["dependencies"]], set()
    while needed:
        requirement = needed.pop()
        if (requirement.marker and not requirement.marker.evaluate({"extra": ""})) or requirement.name in known:
            continue
        known.add(requirement.name)
        found = distribution(requirement.name)
        needed += [Requirement(text) for text in found.requires or []]
        for part in {
            file.parts[0] for file in found.files if ".." not in file.parts and file.parts[0] != "__pycache__"
        }:
            if not (folder / part).exists():
                (folder / part).symlink_to(found.locate_file(part))


def test_a_core_install_runs_the_first_listing(wheel, tmp_path):
    site, cwd = tmp_path / "site", tmp_path / "elsewhere"
    cwd.mkdir()
    core_install(site, wheel)
    program = f"import sys; sys.path.append({str(site)!r})\n{FIRST_LISTING}"
    program += "print(rl2.__file__, update.backend, [name in sys.modules for name in ('rich', 'tyro', 'recipes')])"
    # -I -S: no other packages, and nothing of this checkout. In a cache of its own, so that the kernels are compiled.
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == f"{site}/rl2_torchrl/__init__.py parts [False, False, False]"
    assert (cwd / "runs" / "by-hand").is_dir()


# ---- Releases of others.


@pytest.mark.parametrize("name", SUPPORTED)
def test_supported_releases_are_those_that_are_asked_for(name):
    (asked,) = [each for each in map(Requirement, PROJECT["dependencies"]) if each.name == name]
    bounds = {each.operator: each.version for each in asked.specifier}
    assert {operator: ".".join(bound.split(".")[:2]) for operator, bound in bounds.items()} == {
        ">=": SUPPORTED[name][0],
        "<": SUPPORTED[name][1],
    }


@pytest.mark.parametrize("name", SUPPORTED)
@pytest.mark.parametrize("release", ["0.13.3", "0.15.0", "0.15.0.dev20261101", "1.0", "0.140.2"])
def test_another_release_is_refused_in_one_line(name, release, tmp_path):
    program = f"""
        import importlib.metadata as metadata
        version = metadata.version
        metadata.version = lambda name: {release!r} if name == {name!r} else version(name)
        import rl2_torchrl
    """
    command = [sys.executable, "-c", "\n".join(line.strip() for line in program.splitlines())]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    needed = "{}>={},<{}".format(name, *SUPPORTED[name])
    *_, last = run.stderr.splitlines()
    assert last.startswith(f"ImportError: rl2_torchrl needs {needed}")
    assert f'{release} is installed: pip install "{needed}"' in last


def test_names_of_extras_are_those_that_every_pip_takes():
    """pip 23.2, which comes with Python 3.11, installs nothing for one with an underscore, and warns of it alone."""
    assert all(extra == canonicalize_name(extra) for extra in PROJECT["optional-dependencies"])


def test_extras_keep_torch_where_their_figures_were_made():
    for extra in ("recipes", "test"):
        assert "torch<2.14" in PROJECT["optional-dependencies"][extra]
    (torch,) = [Requirement(text) for text in PROJECT["dependencies"] if Requirement(text).name == "torch"]
    assert {each.operator for each in torch.specifier} == {">="}
