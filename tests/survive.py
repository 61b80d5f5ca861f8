"""Training runs that are killed at random times and resumed until they end, beside the same run left alone.

    python -m tests.survive --env pendulum-vector --kills 20

Parameters must be bitwise those of the unbroken run, its CSV scalars the same, each step once, and no process of an env may be
left. SIGKILL leaves no time to save; Gymnasium's processes say at length that nobody listens any more.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import torch
import tyro
from torchrl.data import Unbounded
from torchrl.envs import Compose, DoubleToFloat, EnvBase, ParallelEnv, SerialEnv, TransformedEnv
from torchrl.record.loggers import CSVLogger

from rl2_torchrl import (
    ActorCritic,
    GRUCategoricalActor,
    GRUGaussianActor,
    GRUValueHead,
    PPOUpdate,
    PreviousStep,
    RL2PPOLoss,
    TaskSampler,
    Trial,
    TrialCollector,
    train,
)
from rl2_torchrl.envs import BernoulliBandit, GymTaskEnv, GymVectorEnv, HalfCheetahDirection, signs, uniform_means
from rl2_torchrl.storage import load_tree, save_tree

#: Envs side by side, and steps of a batch in each: trials of 14 steps end in the middle of batches.
ROWS, STEPS, EPISODE = 3, 9, 7
#: Updates of a run for each kill.
UPDATES_A_KILL = 12
Name = Literal[
    "bandit",
    "cheetah",
    "pendulum-serial",
    "pendulum-parallel",
    "pendulum-vector",
    "pendulum-async",
    "mujoco-vector",
    "point-mass",
]


def main(env: Name, *, kills: int = 20, seed: int = 0) -> Survival:
    """Kills a run ``kills`` times at random moments, and compares what it has become with the run that nobody killed.

    Args:
        env: what is trained on.
        kills: how often it is killed.
        seed: of the moments.
    """
    logging.getLogger("torchrl").setLevel(logging.ERROR)
    with TemporaryDirectory() as folder:
        survival = survive(env, kills, Path(folder), random.Random(seed))
    sys.stdout.write(f"{survival}\n")
    if not survival.is_exact:
        sys.exit(1)
    return survival


@dataclass
class Survival:
    """What a run has become that was killed.

    Args:
        env: what it trained on.
        killed_at: env steps of its newest checkpoint at each kill.
        env_steps: env steps of the whole run.
        other_parameters: names of parameters that differ from the unbroken run's, in any bit.
        other_scalars: names of CSV files whose lines differ.
        orphans: processes of its envs that outlived it.
        seconds: how long it took, kills and all.
    """

    env: str
    killed_at: list[int]
    env_steps: int
    other_parameters: list[str]
    other_scalars: list[str]
    orphans: list[int]
    seconds: float

    @property
    def is_exact(self) -> bool:
        """Whether nothing differs, and nothing is left behind."""
        return not self.other_parameters and not self.other_scalars and not self.orphans

    def __str__(self) -> str:
        outcome = "bitwise the unbroken run" if self.is_exact else "DIFFERS from the unbroken run"
        if not self.is_exact:
            outcome += f" in {self.other_parameters or 'no parameter'} and {self.other_scalars or 'no scalar'}"
            outcome += f", processes left: {self.orphans or 'none'}"
        places = len(set(self.killed_at))
        return (
            f"{self.env}: {len(self.killed_at)} kills at {places} different checkpoints {self.killed_at} of {self.env_steps} env "
            f"steps, {self.seconds:.0f} s: {outcome}"
        )


def survive(env: Name, kills: int, folder: Path, moments: random.Random) -> Survival:
    """As `main`, in ``folder``."""
    updates, start = UPDATES_A_KILL * kills, time.perf_counter()
    whole, killed = folder / "whole", folder / "killed"
    seconds, _ = _child(env, updates, whole, set())
    killed_at, sessions = [], set()
    for _ in range(kills):
        # On average the kills leave half of the run to its last process.
        if _child(env, updates, killed, sessions, kill_after=moments.uniform(0, seconds / kills))[1]:
            raise RuntimeError(f"the run on {env} had ended before {kills} kills: give it more updates.")
        killed_at.append(max((int(path.stem.split("-")[1]) for path in _checkpoints(killed)), default=0))
    _child(env, updates, killed, sessions)
    orphans = left_of(sessions)
    ours, theirs = (load_tree(path / "parameters") for path in (whole, killed))
    scalars = [_scalars(path) for path in (whole, killed)]
    return Survival(
        env,
        killed_at,
        updates * ROWS * STEPS,
        [name for name in ours if not torch.equal(ours[name], theirs[name])],
        sorted(name for name in {*scalars[0], *scalars[1]} if scalars[0].get(name) != scalars[1].get(name)),
        orphans,
        time.perf_counter() - start,
    )


def _child(
    env: Name, updates: int, folder: Path, sessions: set[int], kill_after: float | None = None
) -> tuple[float, bool]:
    """Trains in a process and session of its own; the seconds that it trained, and whether it came to its end."""
    context = multiprocessing.get_context("fork")  # a fresh one would import PyTorch for seconds, at each kill
    is_ready = context.Event()
    process = context.Process(target=_train, args=(env, updates, folder, is_ready))
    process.start()
    sessions.add(process.pid)
    while not is_ready.wait(1):
        if not process.is_alive():
            raise RuntimeError(f"the run on {env} failed before its training, with exit code {process.exitcode}.")
    start = time.perf_counter()
    process.join(kill_after)
    if process.is_alive():
        process.kill()
        process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the run on {env} failed, with exit code {process.exitcode}.")
    return time.perf_counter() - start, process.exitcode == 0


def left_of(sessions: set[int], seconds: float = 10) -> list[int]:
    """The processes of ``sessions`` that are there after so many seconds: an env's sees that its pipe is closed, and ends."""
    end = time.monotonic() + seconds
    while left := [pid for pid in _processes() if _session(pid) in sessions]:
        if time.monotonic() > end:
            break
        time.sleep(0.1)
    return left


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _session(pid: int) -> int | None:
    """Which session a process is of; None of one that has ended, be it not yet waited for."""
    try:
        state, _, _, session = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:4]
    except OSError:
        return None
    return None if state == "Z" else int(session)


def _train(env: Name, updates: int, folder: Path, is_ready) -> None:
    os.setsid()
    torch.manual_seed(0)
    collector, update = _run(env, updates)
    folder.mkdir(exist_ok=True)
    logger = CSVLogger("scalars", log_dir=str(folder))
    is_ready.set()
    places = {"checkpoints": folder / "checkpoints", "checkpoint_interval": 1, "resume": True}
    train(collector, update, evaluate=None, logger=logger, progress=False, **places)
    save_tree({name: value.detach() for name, value in update.loss.named_parameters()}, folder / "parameters")


def _checkpoints(folder: Path) -> list[Path]:
    return list((folder / "checkpoints").glob("checkpoint-*.safetensors"))


def _scalars(folder: Path) -> dict[str, str]:
    """What each CSV file holds, but for those of times."""
    paths = (path for path in folder.rglob("*.csv") if "time" not in path.relative_to(folder).parts)
    return {str(path.relative_to(folder)): path.read_text() for path in paths}


# -------------------------------------------------------------------- runs
def _run(name: Name, updates: int) -> tuple[TrialCollector, PPOUpdate]:
    base, tasks = _ENVS[name]
    base = base()
    env = TransformedEnv(base, Compose(Trial(steps=2 * EPISODE), TaskSampler(tasks, seed=1), PreviousStep()))
    actor_class = GRUCategoricalActor if name == "bandit" else GRUGaussianActor
    actor, critic = actor_class.from_env(env, hidden_size=4), GRUValueHead.from_env(env, hidden_size=4)
    update = PPOUpdate(RL2PPOLoss(actor, critic), bptt=3, epochs=2, minibatches=2, lr=1e-2)
    frames = {"frames_per_batch": ROWS * STEPS, "total_frames": ROWS * STEPS * updates}
    return TrialCollector(env, ActorCritic(actor, critic), keep=update.in_keys, **frames), update


def _pendulums(side_by_side: Callable[..., EnvBase]) -> EnvBase:
    pendulums = side_by_side(ROWS, partial(GymTaskEnv, "Pendulum-v1", max_episode_steps=EPISODE, **_GRAVITY))
    pendulums.set_seed(2)
    return pendulums


def set_gravity(pendulum, task: torch.Tensor) -> None:
    """Gravity (m/s²)."""
    pendulum.g = task.item()


def gravities(batch_size: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """From 5 to 15, ``[*batch_size, 1]``."""
    return 5 + 10 * torch.rand(*batch_size, 1, generator=generator)


def set_weight(cheetah, task: torch.Tensor) -> None:
    """As `set_gravity`, of MuJoCo's model."""
    cheetah.model.opt.gravity[2] = -task.item()


def _point_masses() -> EnvBase:
    from recipes.point_mass import HiddenTarget

    masses = SerialEnv(ROWS, lambda: TransformedEnv(HiddenTarget(EPISODE, frame_skip=1), DoubleToFloat()))
    masses.set_seed(2)
    return masses


def places(batch_size: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Of targets (m), ``[*batch_size, 2]``."""
    return 0.2 * torch.rand(*batch_size, 2, generator=generator)


def _vector(name: str, **options) -> GymVectorEnv:
    return GymVectorEnv(name, ROWS, max_episode_steps=EPISODE, seed=2, **options)


_GRAVITY = {"set_task": set_gravity, "task_spec": Unbounded(1)}
_ENVS: dict[str, tuple[Callable[[], EnvBase], Callable]] = {
    "bandit": (lambda: BernoulliBandit(3, batch_size=(ROWS,), seed=2), uniform_means(3)),
    "cheetah": (lambda: HalfCheetahDirection(batch_size=(ROWS,), horizon=EPISODE, seed=2), signs()),
    "pendulum-serial": (partial(_pendulums, SerialEnv), gravities),
    "pendulum-parallel": (partial(_pendulums, partial(ParallelEnv, mp_start_method="fork")), gravities),
    "pendulum-vector": (partial(_vector, "Pendulum-v1", **_GRAVITY), gravities),
    "pendulum-async": (partial(_vector, "Pendulum-v1", vectorization="async", **_GRAVITY), gravities),
    "mujoco-vector": (partial(_vector, "HalfCheetah-v5", set_task=set_weight, task_spec=Unbounded(1)), gravities),
    "point-mass": (_point_masses, places),  # needs dm-control
}


if __name__ == "__main__":
    tyro.cli(main)
