"""`ScalarLog`: a training's scalars on their way to a TorchRL logger, each step once however often the run was resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torchrl.record.loggers import CSVLogger, TensorboardLogger
from torchrl.record.loggers.common import Logger

from rl2_torchrl.storage import write_durably

__all__ = ["ScalarLog"]


class ScalarLog:
    """Writes rows to ``logger``, or nowhere if that is None."""

    def __init__(self, logger: Logger | None):
        self._logger = logger

    def write(self, scalars: Mapping[str, float], env_steps: float) -> None:
        """Logs all but ``"env_steps"`` at that step."""
        if self._logger is None:
            return
        for name, value in scalars.items():
            if name != "env_steps":
                self._logger.log_scalar(name, value, step=int(env_steps))
        if isinstance(self._logger, CSVLogger):
            self._logger.experiment.scalars.clear()  # it would keep all that it has written

    def go_on_from(self, history: Sequence[Mapping[str, float]], env_steps: int) -> None:
        """Takes back what was logged after ``env_steps``, where a run is resumed, and logs the last row once more.

        A run that was killed has gone on after its last checkpoint, if it had one, and may have logged a row in part. W&B and
        other services take nothing back; they keep what came first or last, by their own rules.
        """
        again = [row for row in history[-1:] if row["env_steps"] == env_steps]  # none, where the history was damaged
        first = env_steps if again else env_steps + 1
        if isinstance(self._logger, CSVLogger):
            for path in Path(self._logger.experiment.log_dir, "scalars").rglob("*.csv"):
                _cut(path, first)
        elif isinstance(self._logger, TensorboardLogger):
            writer = self._logger.experiment
            writer.close()
            writer.purge_step = first  # read when the writer opens its next file
        for row in again:
            self.write(row, env_steps)


def _cut(path: Path, first: int) -> None:
    """Leaves the lines of steps before ``first``."""
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and int(line.split(",")[0]) < first]
    if len(kept) < len(lines):
        write_durably(path, "".join(kept).encode())
