"""Reports of runs, as they stand in their folders; without PyTorch, which takes seconds to import."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["finished_report", "read_report"]


def read_report(folder: Path) -> dict[str, Any]:
    """The ``report.json`` of a run; one of nothing where there is none.

    Raises:
        ValueError: it is no whole report.
    """
    path = folder / "report.json"
    try:
        return json.loads(path.read_text()) if path.is_file() else {"train": {"history": []}}
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is no report, or half of one ({error}): remove it, or name another folder."
        ) from error


def finished_report(folder: Path, train: Callable[..., Any]) -> dict[str, Any]:
    """The report of the training in ``folder``; where it is not finished, ``train(resume=...)`` begins it or goes on with it.

    Raises:
        KeyboardInterrupt: it was cut short again.
    """
    if not _is_finished(folder):
        train(resume=(folder / "checkpoints").is_dir())
        if not _is_finished(folder):
            raise KeyboardInterrupt(f"the training in {folder} is not finished: the same command goes on with it.")
    return read_report(folder)


def _is_finished(folder: Path) -> bool:
    return (folder / "report.json").is_file() and not read_report(folder)["train"].get("interrupted")
