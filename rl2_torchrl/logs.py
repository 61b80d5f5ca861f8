"""`ScalarLog`: a training's scalars on their way to a TorchRL logger, each step once however often the run was resumed."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from torchrl.record.loggers import CSVLogger, TensorboardLogger
from torchrl.record.loggers.common import Logger

from rl2_torchrl.storage import write_durably

__all__ = ["ScalarLog"]

log = logging.getLogger(__name__)

_TABLES, _EARLIER = "scalars", "earlier-scalars"


class ScalarLog:
    """Writes rows to ``logger``, or nowhere if that is None."""

    def __init__(self, logger: Logger | None):
        self._logger = logger
        is_local = isinstance(logger, CSVLogger | TensorboardLogger)
        self._folder = Path(logger.experiment.log_dir) if is_local else None

    def write(self, scalars: Mapping[str, float], env_steps: float) -> None:
        """Logs all but ``"env_steps"`` at that step."""
        if self._logger is None:
            return
        for name, value in scalars.items():
            if name != "env_steps":
                self._logger.log_scalar(name, value, step=int(env_steps))
                # It would keep all of these; a user's own it counts by what it has.
                if isinstance(self._logger, CSVLogger):
                    self._logger.experiment.scalars.pop(name, None)

    # ------------------------------------------------------------- a resumed run
    def go_on_from(self, history: Sequence[Mapping[str, float]], env_steps: int) -> None:
        """Takes back what was logged after ``env_steps``, where a run is resumed, and logs the last row once more.

        A run that was killed has gone on after its last checkpoint, and may have logged a row in part. W&B and other services take
        nothing back; they keep what came first or last, by their own rules.
        """
        again = history[-1] if history and history[-1]["env_steps"] == env_steps else {}  # the history may be damaged
        self._close(purge_step=env_steps if again else env_steps + 1)
        for path in self._tables():
            name = path.relative_to(self._folder / _TABLES).with_suffix("").as_posix()
            _cut(path, env_steps if name in again else env_steps + 1)  # what a user has logged beside it stays
        self.write(again, env_steps)

    def begin_anew(self) -> None:
        """Lets what was logged of a run be forgotten that was killed before its first checkpoint."""
        self._close(purge_step=0)

    def set_aside(self) -> None:
        """Moves CSV files of an earlier run, which this logger has not opened, to a subfolder, in the place of those before it."""
        opened = set(map(Path, self._logger.experiment.files)) if isinstance(self._logger, CSVLogger) else set()
        tables = [path for path in self._tables() if path not in opened]
        if not tables:
            return
        shutil.rmtree(earlier := self._folder / _EARLIER, ignore_errors=True)
        for table in tables:
            place = earlier / table.relative_to(self._folder / _TABLES)
            place.parent.mkdir(parents=True, exist_ok=True)
            table.replace(place)
        log.warning("%s held the scalars of an earlier run: moved to %s.", self._folder, _EARLIER)

    def _tables(self) -> list[Path]:
        return [] if self._folder is None else list((self._folder / _TABLES).rglob("*.csv"))

    def _close(self, purge_step: int) -> None:
        """Lets go of open files; TensorBoard shows nothing that was logged from ``purge_step`` on before it goes on."""
        if isinstance(self._logger, CSVLogger):
            files = self._logger.experiment.files
            while files:
                files.popitem()[1].close()
        elif isinstance(self._logger, TensorboardLogger):
            self._logger.experiment.close()
            self._logger.experiment.purge_step = purge_step  # read when it opens its next file


def _cut(path: Path, first: int) -> None:
    """Leaves the lines of steps before ``first``."""
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and not _step(line) >= first]
    if len(kept) < len(lines):
        write_durably(path, "".join(kept).encode())


def _step(line: str) -> float:
    """The step of a line; NaN where a user has written something else."""
    try:
        return float(line.split(",")[0])
    except ValueError:
        return math.nan
