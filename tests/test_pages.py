"""The pages where the code is: names, files and commands in them exist, and they leave nothing out."""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

import rl2_torchrl
from recipes.presets import PRESETS

ROOT = Path(__file__).parent.parent
PAGES = {folder: (ROOT / folder / "README.md").read_text(encoding="utf-8") for folder in ("rl2_torchrl", "recipes")}
COMMANDS = re.findall(r"python -m recipes\.\w+[^`\n]*", PAGES["recipes"])
ARE_RUN = [path for path in sorted((ROOT / "recipes").glob("*.py")) if '__name__ == "__main__"' in path.read_text()]


@pytest.mark.parametrize("path", ARE_RUN, ids=lambda path: path.stem)
def test_every_program_stands_on_the_page(path):
    assert any(command.split()[2] == f"recipes.{path.stem}" for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_the_options_that_they_are_given(command):
    _, _, module, *words = command.split()
    try:
        parameters = inspect.signature(importlib.import_module(module).main).parameters
    except ImportError as error:
        pytest.skip(str(error))  # an extra that is not installed
    groups = [p.default for p in parameters.values() if is_dataclass(p.default)]
    known = {*parameters, *(field.name for group in groups for field in fields(group))}
    assert {word[2:].replace("-", "_") for word in words if word.startswith("--")} <= known


@pytest.mark.parametrize("folder", PAGES)
def test_links_and_extras_of_the_pages_exist(folder):
    for link in re.findall(r"\]\(([^)#]+)\)", PAGES[folder]):
        assert (ROOT / folder / link).exists(), link
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for row in re.findall(r"^\| `python.*$", PAGES[folder], re.MULTILINE):
        extra = row.split("|")[3].strip().strip("`")
        assert not extra or extra in extras, row


def test_files_of_the_map_exist_and_none_is_left_out():
    table = PAGES["rl2_torchrl"].partition("## Which file holds what")[2].partition("\n## ")[0]
    told = set(re.findall(r"`([a-z_]+(?:\.py|/))`", table))
    here = {f"{path.name}/" if path.is_dir() else path.name for path in (ROOT / "rl2_torchrl").iterdir()}
    assert told - {"recipes/"} <= here
    assert {name for name in here if name.endswith((".py", "/"))} - told == {"__init__.py"}


def test_names_on_the_page_of_the_package_are_public():
    homes = [rl2_torchrl, *(importlib.import_module(f"rl2_torchrl.{name}") for name in ("envs", "testing"))]
    public = {name for home in homes for name in home.__all__}
    page = PAGES["rl2_torchrl"]
    names = set(re.findall(r"`([A-Z][a-z]\w+)`", page)) | set(re.findall(r"`((?:check|register)_\w+)`", page))
    assert len(names) > 10
    assert names - public == set()
    drawing = re.search(r"```\n(.*?)```", page, re.DOTALL)[1]
    for file, name in re.findall(r"^ ([a-z]+\.py) +(\w+)", drawing, re.MULTILINE):
        assert name in importlib.import_module(f"rl2_torchrl.{file[:-3]}").__all__


def test_a_figure_of_the_papers_tables_is_theirs():
    [told] = re.findall(r"BEB, a classical algorithm, (\S+) ", PAGES["recipes"])
    held = json.loads((ROOT / "recipes" / "results" / "paper_tables" / "mdps_10_beb.json").read_text())
    assert told == f"{held['mean']:.1f}"


@pytest.mark.parametrize("env", PRESETS)
def test_presets_are_their_recipes_and_reached_what_the_page_says(env):
    preset = PRESETS[env]
    rows = [row for row in PAGES["recipes"].splitlines() if row.startswith(f"| `python -m recipes.{preset.recipe}")]
    assert any(preset.reached in row.split("|")[4] for row in rows)
    main = pytest.importorskip(f"recipes.{preset.recipe}", exc_type=ImportError).main
    defaults = {name: each.default for name, each in inspect.signature(main).parameters.items()}
    if preset.recipe == "half_cheetah":  # which has two
        defaults = main.rule(task=env.removeprefix("HalfCheetah "))
    assert (defaults["network"], defaults["learning"]) == (preset.network, preset.learning)


def test_the_reference_is_built_without_a_warning(tmp_path):
    pytest.importorskip("pdoc")  # an extra
    command = re.search(r"^```bash\n(.*pdoc .*?)\n^```", PAGES["rl2_torchrl"], re.MULTILINE | re.DOTALL)[1]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    built = subprocess.run(
        ["bash", "-c", f"{command} -o {tmp_path}"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert built.returncode == 0
    assert built.stdout + built.stderr == ""
    page = (tmp_path / "rl2_torchrl.html").read_text(encoding="utf-8")
    assert all(f'id="{name}"' in page for name in rl2_torchrl.__all__)
