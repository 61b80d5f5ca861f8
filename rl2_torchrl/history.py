"""`History`: the scalars of each update, in little memory; the file of them; `TrainResult`, of which they are a part."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rl2_torchrl.storage import sync, write_durably

__all__ = ["History", "HistoryFile", "TrainResult", "readable_rows"]

Row = dict[str, float]


class History(Sequence):
    """Rows of scalars, one an update, ``"env_steps"`` among them: dictionaries, in little memory; `list` makes them plain.

    Examples:
        >>> history = History([{"env_steps": 640.0, "train/loss": 0.5}])
        >>> history.append({"env_steps": 1280.0, "train/loss": 0.25})
        >>> history.append({"env_steps": 1280.0, "eval/trial_return": 6.5})  # of the same update
        >>> len(history), history[-1]
        (2, {'env_steps': 1280.0, 'train/loss': 0.25, 'eval/trial_return': 6.5})
    """

    def __init__(self, rows: Iterable[Mapping[str, float]] = ()):
        self._names: dict[tuple[str, ...], tuple[str, ...]] = {}  # rows with the same names share them
        self._rows: list[tuple[tuple[str, ...], array]] = []
        for row in rows:
            self.append(row)

    def append(self, row: Mapping[str, float]) -> None:
        """Adds a row, or to the last one what else is known of the same ``"env_steps"``."""
        if self._rows and (last := self[-1])["env_steps"] == row["env_steps"]:
            self._rows.pop()
            row = last | row
        names = tuple(row)
        self._rows.append((self._names.setdefault(names, names), array("d", row.values())))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        names, values = self._rows[index]
        return dict(zip(names, values, strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None

    def __repr__(self) -> str:
        return f"History({list(self)})"


@dataclass
class TrainResult:
    """What a training run did, the parts before a resume included.

    Args:
        env_steps: env steps that the collector has taken.
        seconds: wall-clock seconds, evaluations included.
        interrupted: whether Ctrl-C ended it, in this process or in one that trains together with it.
        lost_trials: trials that were lost with workers that died (`TrialWorkers`).
        new_trials: where a resumed run has begun new trials, as it does where the last ones could not be saved: the env steps of
            each such resume, and why.
        history: one row of scalars for each update, ``env_steps`` among them; ``list(history)`` is what JSON takes.
            ``time/steps_per_second`` is the speed of its call of `train` up to then; evaluations are included, as they are in
            ``time/seconds``.
    """

    env_steps: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    lost_trials: int = 0
    new_trials: list[tuple[int, str]] = field(default_factory=list)
    history: Sequence[dict[str, float]] = field(default_factory=History)

    def state_dict(self) -> dict[str, Any]:
        """The result as a component of a checkpoint, but for the history, which has a file of its own."""
        return {"env_steps": self.env_steps, "seconds": self.seconds, "new_trials": self.new_trials}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.env_steps, self.seconds, self.new_trials = state["env_steps"], state["seconds"], state["new_trials"]


class HistoryFile:
    """A history as lines of JSON in ``path``. They are appended, and a mark says how many belong to a checkpoint."""

    def __init__(self, path: Path):
        self.path = path
        self._begin(b"", [])

    def _begin(self, data: bytes, rows: Sequence[Row]) -> None:
        self._size, self._digest, self._rows, self._last = len(data), hashlib.sha256(data), len(rows), rows[-1:]

    def write(self, history: History) -> dict[str, Any]:
        """Appends what is new in ``history``, durably; the mark of what the file holds then.

        Raises:
            OSError: it cannot be written.
        """
        if not self.path.exists() or self.path.stat().st_size < self._size:
            self._begin(b"", [])  # somebody has removed it
        first = self._rows
        if first and history[first - 1].keys() != self._last[0].keys():
            first -= 1  # which was added to; read again, the two lines are one row
        rows = history[first:]
        data = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
        with self.path.open("ab") as file:
            file.truncate(self._size)  # a line that was written in part
            file.write(data)
            file.flush()
            sync(file.fileno())
        self._size, self._rows, self._last = self._size + len(data), len(history), rows[-1:] or self._last
        self._digest.update(data)
        return {"size": self._size, "sha256": self._digest.hexdigest(), "rows": self._rows}

    def read(self, mark: Mapping[str, Any]) -> tuple[History, str | None]:
        """The rows up to ``mark``, and what is wrong with the file, in words: then those rows that can be read.

        The file holds no more than these rows afterwards.
        """
        data = self.path.read_bytes()[: mark["size"]] if self.path.exists() else b""
        if hashlib.sha256(data).hexdigest() == mark["sha256"]:
            os.truncate(self.path, len(data))
            history, damage = History(map(json.loads, data.splitlines())), None
        else:
            history = readable_rows(data)
            damage = f"{self.path} is damaged: {len(history)} of {mark['rows']} rows of the run's history can be read"
            data = "".join(f"{json.dumps(row)}\n" for row in history).encode()
            write_durably(self.path, data)
        self._begin(data, history)
        return history, damage


def readable_rows(data: bytes) -> History:
    """The rows that can be read in a file's ``data``: not a line that was written in part, as a running training's may be."""
    return History(filter(None, map(_row, data.splitlines())))


def _row(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
        return {str(name): float(value) for name, value in row.items()} if "env_steps" in row else None
    except (ValueError, TypeError, AttributeError):
        return None
