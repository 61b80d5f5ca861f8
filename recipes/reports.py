"""Reports of runs, as they stand in their folders; without PyTorch, which takes seconds to import."""

import json
from pathlib import Path
from typing import Any

__all__ = ["read_report"]


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
