"""The tutorial: it runs from top to bottom, and what is saved in it came from such a run."""

import ast
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

PATH = Path(__file__).parent.parent / "recipes" / "tutorial.ipynb"
TINY = "arms, pulls, units, trials, updates, lock_updates, test_trials = 3, 4, 8, 16, 2, 2, 64"
FIGURES = 6


def read():
    return nbformat.read(PATH, as_version=4)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs_of(notebook):
    return [output for cell in code_of(notebook) for output in cell.outputs]


def figures_in(notebook):
    return sum("image/png" in output.get("data", {}) for output in outputs_of(notebook))


def names_set_by(source):
    targets = [target for node in ast.parse(source).body for target in node.targets]
    return {node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)}


def test_runs_from_top_to_bottom(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(PATH.parent.parent))
    notebook = read()
    [sizes] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert names_set_by(sizes.source) == names_set_by(TINY)  # else the tutorial's own sizes would be run
    sizes.source = TINY
    for cell in code_of(notebook):
        cell.outputs, cell.execution_count = [], None
    # The kernel runs where Jupyter would start it, beside the notebook.
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(PATH.parent)}}).execute()
    assert figures_in(notebook) == FIGURES
    assert [output.text for output in outputs_of(notebook) if output.get("name") == "stderr"] == []


def test_saved_outputs_are_of_one_whole_run():
    notebook = read()
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code_of(notebook)] == [*range(1, len(code_of(notebook)) + 1)]
    kinds = {output.output_type for output in outputs_of(notebook)}
    assert kinds <= {"stream", "display_data"}  # no errors, no values that were left at a cell's end
    assert all(output.name == "stdout" for output in outputs_of(notebook) if output.output_type == "stream")
    assert figures_in(notebook) == FIGURES


def test_saved_file_is_small_and_knows_no_machine():
    text = PATH.read_text(encoding="utf-8")
    assert len(text) < 400_000
    words = re.sub(r'"image/png": ".*?"', "", text)
    assert not re.search(r"(?<![\w.:/)])/(home|root|tmp|usr|work|Users)/|[A-Z]:\\\\", words)


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", "".join(cell.source for cell in read().cells)))
def test_links_exist(link):
    assert (PATH.parent / link).exists()
