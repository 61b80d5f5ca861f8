"""The README's promises: every Python example runs, and the two commands are those that CI and packaging know."""

import importlib.util
import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

import rl2_torchrl

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
INSTALL_AND_RUN = 'pip install -e ".[recipes]" && python -m recipes.bandit'
INSTALL_AND_TEST = 'pip install -e ".[test]" && python -m pytest'


def test_three_examples():
    assert len(BLOCKS) == README.count("```python") >= 3


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_example_runs(number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[number], f"README.md, example {number}", "exec"), {"__name__": "__main__"})


def test_two_commands():
    assert [command.strip() for command in COMMANDS] == [INSTALL_AND_RUN, INSTALL_AND_TEST]
    assert importlib.util.find_spec("recipes.bandit") is not None


def test_ci_runs_the_test_command_word_for_word(tmp_path):
    # The script in a folder of its own, with stand-ins that write down what they are called with.
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_text((ROOT / ".ci" / "run").read_text())
    (tmp_path / "README.md").write_text(README)
    calls, tools = tmp_path / "calls", tmp_path / "tools"
    tools.mkdir()
    for tool in ("python", "python3", "pip", "ruff"):
        (tools / tool).write_text(f'#!/bin/sh\necho "{tool} $*" >> {shlex.quote(str(calls))}\n')
        (tools / tool).chmod(0o755)
    environment = tmp_path / ".venv-ci" / "bin"
    (tools / "python3").write_text(
        f'#!/bin/sh\necho "python3 $*" >> {shlex.quote(str(calls))}\n'
        f"mkdir -p {shlex.quote(str(environment))} && touch {shlex.quote(str(environment / 'activate'))}\n"
    )
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", tmp_path / ".ci" / "run"], env={**os.environ, "PATH": path}, check=True)
    assert calls.read_text().splitlines() == [
        "python3 -m venv .venv-ci",
        "pip install -e .[test]",
        "python -m pytest",
        "ruff check .",
    ]


@pytest.mark.parametrize("extra", sorted(set(re.findall(r"\[([a-z,]+)\]\"", README))))
def test_extras_exist(extra):
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extra.split(",")) <= set(known)


def test_names_in_the_text_are_public():
    text = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    torchrl_names = {"ActionMask", "Collector", "GAE", "MaskedCategorical", "ParallelEnv", "SerialEnv"}
    names = set(re.findall(r"`([A-Z]\w+)`", text)) - torchrl_names
    homes = [vars(rl2_torchrl), vars(importlib.import_module("rl2_torchrl.envs"))]
    assert {name for name in names if not any(name in home for home in homes)} == set()
    assert "check_trial_env" in vars(importlib.import_module("rl2_torchrl.testing"))


def test_the_version_is_one():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    releases = README.partition("\n## Releases\n")[2]
    assert re.search(r"^- \*\*([\d.]+)\*\*", releases, re.MULTILINE)[1] == project["version"]
    assert re.search(r"^  version = \{([\d.]+)\}", releases, re.MULTILINE)[1] == project["version"]
