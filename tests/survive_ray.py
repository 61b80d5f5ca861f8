"""A training whose Ray workers are killed now and then: it makes all its updates, and counts the trials that were lost.

    python -m tests.survive_ray --kills 5

Needs the extra ``ray``. Ctrl-C, which `main` sends itself at the end of a second training, leaves a checkpoint and no process.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro

from rl2_torchrl import train
from tests.workers import FRAMES, ROWS, Setup

#: Updates of the first training for each kill, and after which the second is interrupted.
UPDATES_A_KILL, INTERRUPTED = 4, 3


def main(*, kills: int = 5, seed: int = 0, backend: str = "ray") -> None:
    """Kills workers after updates drawn by ``seed``; then interrupts a training.

    Args:
        kills: how many die, one after an update.
        seed: of the moments, and of which worker.
        backend: what the workers are, ``"ray"`` or ``"process"``.
    """
    logging.basicConfig(format="%(message)s")
    start, chance = time.perf_counter(), random.Random(seed)
    updates = UPDATES_A_KILL * kills
    fatal = set(chance.sample(range(1, updates), kills))

    def kill(own: Setup, number: int) -> None:
        if number in fatal:
            os.kill(chance.choice(own.collector.pids), signal.SIGKILL)

    with TemporaryDirectory() as folder:
        result, _, _ = _train(Path(folder), backend, updates, kill)
        made, lost = len(result.history), result.lost_trials
        seconds = time.perf_counter() - start
        sys.stdout.write(
            f"{backend}: {made} of {updates} updates, {kills} kills, {lost} trials lost, {seconds:.0f} s\n"
        )
        is_right = (made, lost) == (updates, kills * ROWS)
    with TemporaryDirectory() as folder:
        result, pids, saved = _train(Path(folder), backend, updates, _interrupt)
        left = _alive(pids)
        sys.stdout.write(
            f"Ctrl-C at update {INTERRUPTED}: interrupted {result.interrupted}, {saved}, workers left: {left or 'none'}\n"
        )
        is_right = (
            is_right and result.interrupted and saved == [f"checkpoint-{INTERRUPTED * FRAMES}.safetensors"] and not left
        )
    if not is_right:
        sys.exit(1)


def _interrupt(own: Setup, number: int) -> None:
    if number == INTERRUPTED:
        signal.raise_signal(signal.SIGINT)


def _train(folder: Path, backend: str, updates: int, after: Callable[[Setup, int], object]):
    """The result, all workers' processes there were, and the checkpoints; ``after(setup, n)`` follows the n-th update."""
    own = Setup(folder, backend=backend, total_frames=updates * FRAMES)
    pids = set(own.collector.pids)

    def stop(row: dict[str, float]) -> bool:
        pids.update(own.collector.pids)
        after(own, int(row["env_steps"]) // FRAMES)
        return False

    result = train(own.collector, own.update, evaluate=None, progress=False, stop=stop, checkpoints=folder / "run")
    own.collector.shutdown()
    return result, pids, sorted(path.name for path in (folder / "run").glob("checkpoint-*.safetensors"))


def _alive(pids: set[int], seconds: float = 30) -> list[int]:
    """Which of ``pids`` are there after so many seconds; Ray's actors take some."""
    end = time.monotonic() + seconds
    while (left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]) and time.monotonic() < end:
        time.sleep(0.1)
    return left


if __name__ == "__main__":
    tyro.cli(main)
