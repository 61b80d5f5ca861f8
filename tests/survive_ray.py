"""A training whose Ray workers are killed now and then: it makes all its updates, and counts the trials that were lost.

    python -m tests.survive_ray --kills 5

Needs the extra ``ray``. Signals to all processes of a program, as a terminal's Ctrl-C and a scheduler's SIGTERM are, leave a
checkpoint and no process.
"""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro

from rl2_torchrl import TrainResult, train
from tests.survive import left_of
from tests.workers import FRAMES, ROWS, Setup

#: Updates of the first training for each kill, and after which others are interrupted.
UPDATES_A_KILL, INTERRUPTED = 4, 3


def main(*, kills: int = 5, seed: int = 0, backend: str = "ray") -> None:
    """Kills workers after updates drawn by ``seed``; then sends signals to trainings.

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
        result, own = train_in(Path(folder), backend, updates, kill)
        own.collector.shutdown()
        made, lost = len(result.history), result.lost_trials
        seconds = time.perf_counter() - start
        sys.stdout.write(
            f"{backend}: {made} of {updates} updates, {kills} kills, {lost} trials lost, {seconds:.0f} s\n"
        )
        is_right = (made, lost) == (updates, kills * ROWS)
    for signum in (signal.SIGINT, signal.SIGTERM):
        is_right = signalled(signum, backend) and is_right
    if not is_right:
        sys.exit(1)


def signalled(signum: signal.Signals, backend: str) -> bool:
    """Whether a training, a program in a session of its own, has ended as it should where all of its processes get a signal."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _PROGRAM, folder, backend]
        pipes = {"stdout": subprocess.PIPE, "text": True}
        program = subprocess.Popen(command, **pipes, cwd=Path(__file__).parents[1], start_new_session=True)
        assert "now\n" in iter(program.stdout.readline, "")
        os.killpg(program.pid, signum)
        said = program.communicate()[0].strip()
        left, saved = left_of({program.pid}, seconds=1), _saved(Path(folder))
    exit_code = 0 if signum == signal.SIGINT else 128 + signum
    sys.stdout.write(
        f"{signum.name} to all: exit code {program.returncode}, {said or 'ended'}, {saved}, processes left: {left or 'none'}\n"
    )
    return program.returncode == exit_code and len(saved) == 1 and not left


_PROGRAM = """
import sys
from pathlib import Path
from tests.survive_ray import INTERRUPTED, train_in
def told(own, number):
    if number == INTERRUPTED:
        print("now", flush=True)
if __name__ == "__main__":
    result, _ = train_in(Path(sys.argv[1]), sys.argv[2], 10**7, told)
    print("interrupted", result.interrupted)
"""


def train_in(
    folder: Path, backend: str, updates: int, after: Callable[[Setup, int], object]
) -> tuple[TrainResult, Setup]:
    """Trains; ``after(setup, n)`` follows the n-th update. Nothing but the last checkpoint is written."""
    own = Setup(folder, backend=backend, total_frames=updates * FRAMES)

    def stop(row: dict[str, float]) -> bool:
        after(own, int(row["env_steps"]) // FRAMES)
        return False

    places = {"checkpoints": folder / "run", "checkpoint_interval": updates}
    result = train(own.collector, own.update, evaluate=None, progress=False, stop=stop, **places)
    return result, own


def _saved(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run").glob("checkpoint-*.safetensors"))


if __name__ == "__main__":
    tyro.cli(main)
