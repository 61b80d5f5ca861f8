"""Reports of runs, as they stand in their folders; without PyTorch, which takes seconds to import."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["as_json", "finished_report", "other_settings", "read_report"]

log = logging.getLogger(__name__)


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


def finished_report(folder: Path, train: Callable[..., Any], settings: dict[str, Any]) -> dict[str, Any]:
    """The report of the training in ``folder``; where it is not finished, ``train(resume=...)`` begins it or goes on with it.

    Its ``settings`` are kept in the folder.

    Raises:
        ValueError: what is there was trained with other settings.
        KeyboardInterrupt: it was cut short again.
    """
    note = folder / "settings.json"
    if note.is_file() and (others := other_settings(json.loads(note.read_text()), settings)):
        raise ValueError(
            f"{folder} holds a training with other settings ({', '.join(others)}), which would be shown as one with these: move it "
            "away, or name another folder of runs."
        )
    if not _is_finished(folder):
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(as_json(settings))
        train(resume=(folder / "checkpoints").is_dir())
        if not _is_finished(folder):
            raise KeyboardInterrupt(f"the training in {folder} is not finished: the same command goes on with it.")
    if not note.is_file():
        log.warning("%s is taken for a training with these settings: it has no settings.json that says so.", folder)
    return read_report(folder)


def other_settings(were: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    """What differs between a figure's settings and these.

    Settings that came later, or are gone since, are left out: what they stand for was fixed, or had another name.
    """
    are = json.loads(as_json(settings))
    both = [name for name in are if name in were]
    return [f"{name} was {were[name]}, is {are[name]}" for name in both if were[name] != are[name]]


def as_json(values: dict[str, Any]) -> str:
    """Values as the files hold them."""
    return json.dumps(values, indent=1, default=str)


def _is_finished(folder: Path) -> bool:
    return (folder / "report.json").is_file() and not read_report(folder)["train"].get("interrupted")
