"""A training that goes on for long: what it takes of memory, file handles, threads and disk, minute by minute.

    python -m tests.soak --minutes 25
    python -m tests.soak --trainings 50

A small bandit with evaluations and checkpoints. Fails where memory after the first minute leaves 5 %, or file handles or threads
change. The history of scalars grows by a line an update, in a file of its own; a checkpoint does not grow.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import astuple, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
import tyro
from torchrl.record.loggers import CSVLogger

from rl2_torchrl import adaptation_curve
from rl2_torchrl.checkpoints import RunCheckpoints
from tests.runs import STEPS, Run

#: Share by which resident memory may leave that of the first mark.
BOUND = 0.05
#: Updates of each of many trainings, and trainings from mark to mark.
UPDATES, EVERY = 20, 5


@dataclass
class Usage:
    """What this process takes at one moment.

    Args:
        mark: minutes, or trainings, that have passed.
        updates: updates so far.
        memory: resident, MB.
        files: open file handles.
        threads: threads.
        seconds: of the newest checkpoint's writing.
        checkpoint: size of the newest checkpoint, kB.
        history: size of the history of scalars, kB.
    """

    mark: int
    updates: int
    memory: float
    files: int
    threads: int
    seconds: float
    checkpoint: float
    history: float


def main(*, minutes: int = 25, trainings: int = 0) -> list[Usage]:
    """Trains for ``minutes``, or ``trainings`` times, and prints what that takes.

    Args:
        minutes: length of the one training.
        trainings: short trainings in this process, one after the other, in its place.
    """
    with TemporaryDirectory() as folder:
        soak = Soak(Path(folder))
        if trainings:
            for number in range(trainings):
                soak.train(number, lambda row: False, total=UPDATES)
                if (number + 1) % EVERY == 0:
                    soak.note(number + 1)
        else:
            soak.train(0, lambda row: soak.is_over(minutes))
    wrong = verdict(soak.usages)
    first, *rest = soak.usages
    drift = max((abs(each.memory / first.memory - 1) for each in rest), default=0.0)
    sys.stdout.write(f"memory has left that of the first mark by {drift:.1%}; {'; '.join(wrong) or 'nothing grows'}\n")
    if wrong:
        sys.exit(1)
    return soak.usages


def verdict(usages: list[Usage]) -> list[str]:
    """What has grown, or changed, since the first mark."""
    first, *rest = usages
    wrong = []
    if any(abs(each.memory / first.memory - 1) > BOUND for each in rest):
        wrong.append(f"memory leaves {BOUND:.0%} of {first.memory:.0f} MB")
    for name in ("files", "threads"):
        values = {getattr(each, name) for each in usages}
        if len(values) > 1:
            wrong.append(f"{name} change: {sorted(values)}")
    if any(each.checkpoint > first.checkpoint * 1.01 for each in rest):
        wrong.append("checkpoints grow")
    return wrong


class Soak:
    """Trainings in ``folder``, and what was noted of them."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._started, self._updates, self._seconds = time.perf_counter(), 0, 0.0
        self.usages: list[Usage] = []
        columns = ("mark", "updates", "MB", "files", "threads", "s/checkpoint", "kB/checkpoint", "kB history")
        sys.stdout.write(" ".join(f"{name:>13}" for name in columns) + "\n")

    def train(self, number: int, is_over, total: int = -1) -> None:
        """One training, the ``number``-th, until ``is_over`` or ``total`` updates."""
        self._checkpoints = self._folder / f"checkpoints-{number}"
        held_out = Run(1, lean=True, task_seed=8).collector.env
        run = Run(total if total > 0 else 1, lean=True, bptt=STEPS)
        run.collector.total_frames = run.collector.total_frames if total > 0 else float("inf")
        write = RunCheckpoints._write

        def timed(*arguments, **options) -> None:
            start = time.perf_counter()
            write(*arguments, **options)
            self._seconds = time.perf_counter() - start

        def stop(row: dict[str, float]) -> bool:
            self._updates += 1
            return is_over(row)

        def evaluate() -> dict[str, float]:
            return {"trial_return": adaptation_curve(held_out, run.policy, num_trials=8).mean}

        logger = CSVLogger(f"scalars-{number}", log_dir=str(self._folder))
        with patch.object(RunCheckpoints, "_write", timed):
            run.train(evaluate=evaluate, stop=stop, logger=logger, checkpoints=self._checkpoints)
        run.collector.shutdown()

    def is_over(self, minutes: int) -> bool:
        """Notes each full minute; True after the last."""
        passed = int((time.perf_counter() - self._started) / 60)
        if passed > len(self.usages):
            self.note(passed)
        return passed >= minutes

    def note(self, mark: int) -> None:
        """Adds a row to the table."""
        newest = max(self._checkpoints.glob("checkpoint-*.safetensors"), key=os.path.getmtime)
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        usage = Usage(
            mark,
            self._updates,
            int(status["VmRSS"].split()[0]) / 1024,
            len(os.listdir("/proc/self/fd")),
            int(status["Threads"]),
            self._seconds,
            newest.stat().st_size / 1024,
            (self._checkpoints / "checkpoint-history.jsonl").stat().st_size / 1024,
        )
        self.usages.append(usage)
        cells = (f"{value:>13.3f}" if isinstance(value, float) else f"{value:>13}" for value in astuple(usage))
        sys.stdout.write(" ".join(cells) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    torch.manual_seed(0)
    tyro.cli(main)
