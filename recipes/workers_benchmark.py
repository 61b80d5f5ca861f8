"""How fast several processes play a batch, what handing it over costs, and where the learner becomes the bottleneck."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from torchrl.envs import Compose, TransformedEnv

from recipes import gym_benchmark, half_cheetah
from recipes.benchmark import require_repeats, write_json
from recipes.cli import cli
from rl2_torchrl import (
    ActorCritic,
    MemoryValueHead,
    PPOUpdate,
    PreviousStep,
    RecurrentActor,
    RL2PPOLoss,
    TaskSampler,
    Trial,
    TrialAdvantage,
    TrialCollector,
    TrialWorkers,
)
from rl2_torchrl.envs import BernoulliBandit, uniform_means

#: Rows of a batch, and steps of a row, which is a trial.
SIZES = {"bandit": (1024, 10), "pendulum": (64, 200), "half_cheetah": (64, 400)}


def main(
    *,
    workload: Literal["all", "bandit", "pendulum", "half_cheetah"] = "all",
    workers: tuple[int, ...] = (1, 2, 4),
    many: int = 64,
    backend: Literal["process", "ray"] = "process",
    rows: int | None = None,
    repeats: int = 7,
    json: Path | None = None,
) -> dict[str, dict]:
    """Times rollouts and updates on batches of the same size for each number of workers, and prints env steps/s.

    Args:
        workload: bandits (a fast env), Gymnasium's Pendulum in `GymVectorEnv` (a slow one), or HalfCheetah at velocities.
        workers: numbers of workers; what one process alone does is always timed.
        many: for how many workers on cores of their own the rates are reckoned.
        backend: where workers are.
        rows: rows of a batch, in place of the workload's; a multiple of all of ``workers``.
        repeats: batches that are timed, after one that is not; medians are printed.
        json: file to write all figures to.
    """
    require_repeats(repeats)
    if not workers:
        raise ValueError("workers is empty: name numbers of them, such as --workers 1 2 4.")
    sizes = {name: SIZES[name][0] if rows is None else rows for name in (SIZES if workload == "all" else [workload])}
    for name, size in sizes.items():
        if uneven := [number for number in workers if number < 1 or size < 1 or size % number]:
            raise ValueError(
                f"workers={uneven} cannot share {size} rows of {name} evenly: name divisors of {size}, or pass other --rows."
            )
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    figures = {name: measure(name, workers, many, backend, size, repeats) for name, size in sizes.items()}
    for name, found in figures.items():
        Console().print(table(name, found, many))
    write_json(json, figures)
    return figures


def measure(name: str, workers: tuple[int, ...], many: int, backend: str, rows: int, repeats: int) -> dict:
    """Seconds of rollout and update for each number of workers, 0 being this process, and what follows for ``many``."""
    steps = SIZES[name][1]
    batch, seconds = rows * steps, {}
    for number in (0, *workers):
        torch.manual_seed(0)
        policy, update = learner(make_env(name, 2))
        frames = {"frames_per_batch": batch, "total_frames": -1, "keep": update.in_keys}
        if number:
            create = partial(make_env, name, rows // number)
            collector = TrialWorkers(create, policy, workers=number, backend=backend, seed=0, **frames)
        else:
            collector = TrialCollector(make_env(name, rows), policy, **frames)
        seconds[number] = timed(collector, update, repeats)
        collector.shutdown()
    alone, learning = (statistics.median(times[part] for times in seconds[0]) for part in (0, 1))
    return {
        "steps": batch,
        "seconds": seconds,
        "rollout": {number: batch / statistics.median(own[0] for own in times) for number, times in seconds.items()},
        "update": batch / learning,
        "megabytes": size(update, make_env(name, 2), policy, steps) * rows / 2**21,
        "handing_over_ms": 1e3 * (statistics.median(own[0] for own in seconds[workers[0]]) - alone / workers[0]),
        "even": alone and learning and (batch / learning) / (batch / alone),
        "many": {"rollout": many * batch / alone, "total": batch / (learning + alone / many), "learning": learning},
    }


def timed(collector: TrialCollector | TrialWorkers, update: PPOUpdate, repeats: int) -> list[tuple[float, float]]:
    """Seconds of each rollout and of the update on it."""
    times, batches = [], iter(collector)
    for _ in range(repeats + 1):
        start = time.perf_counter()
        batch = next(batches)
        played = time.perf_counter()
        update(batch)
        times.append((played - start, time.perf_counter() - played))
    return times[1:]  # the first compiles and allocates


def size(update: PPOUpdate, env: TransformedEnv, policy: ActorCritic, steps: int) -> float:
    """Bytes of two rows of a batch, as they are sent."""
    collector = TrialCollector(env, policy, keep=update.in_keys, frames_per_batch=2 * steps, total_frames=-1)
    return collector.rollout().bytes()


# ------------------------------------------------------------------ workloads
def make_env(name: str, rows: int) -> TransformedEnv:
    """Trials of a workload, ``rows`` side by side."""
    return {"bandit": bandits, "pendulum": pendulums, "half_cheetah": cheetahs}[name](rows)


def bandits(rows: int) -> TransformedEnv:
    """Five arms, ten pulls."""
    trial = Compose(Trial(episodes=10), TaskSampler(uniform_means(5)), PreviousStep())
    return TransformedEnv(BernoulliBandit(5, batch_size=(rows,)), trial)


def pendulums(rows: int) -> TransformedEnv:
    """Gymnasium's Pendulum, whose gravity is the task."""
    return gym_benchmark.trial_env("Pendulum-v1", rows, SIZES["pendulum"][1])


def cheetahs(rows: int) -> TransformedEnv:
    """HalfCheetah at a velocity, two episodes of 200 steps."""
    trials = half_cheetah.CheetahTrials("velocity", 2, 200, max_velocity=2.0, seed=0)
    return trials.env(TaskSampler(trials.distribution), rows, half_cheetah.TRAIN_STARTS)


def learner(env: TransformedEnv) -> tuple[ActorCritic, PPOUpdate]:
    """One GRU of 64 units for actor and critic; 4 passes of 8 minibatches of whole trials."""
    actor = RecurrentActor.from_env(env, hidden_size=64)
    critic = MemoryValueHead.from_env(env, actor, detach=True)
    update = PPOUpdate(RL2PPOLoss(actor, critic), TrialAdvantage(), lr=1e-4, epochs=4, minibatches=8)
    return ActorCritic(actor, critic), update


# --------------------------------------------------------------------- output
def table(name: str, found: dict, many: int) -> Table:
    """Rates of a workload in thousands of env steps/s."""
    shown = Table(title=f"{name}, {found['steps']:,} steps a batch of {found['megabytes']:.1f} MB; 1,000 env steps/s")
    for column in ("workers", "rollout", "of one process", "rollout and update"):
        shown.add_column(column, justify="right")
    rates: dict[int, float] = found["rollout"]
    total: Callable[[float], float] = lambda rate: 1 / (1 / rate + 1 / found["update"])  # noqa: E731
    for number, rate in rates.items():
        label = "none (this process)" if number == 0 else str(number)
        shown.add_row(label, f"{rate / 1e3:,.1f}", f"{rate / rates[0]:.2f}", f"{total(rate) / 1e3:,.1f}")
    rate = found["many"]["rollout"]
    shown.add_row(
        f"{many}, reckoned", f"{rate / 1e3:,.1f}", f"{rate / rates[0]:.0f}", f"{total(rate) / 1e3:,.1f}", style="dim"
    )
    shown.caption = (
        f"update alone: {found['update'] / 1e3:,.1f}; handing over: {found['handing_over_ms']:.1f} ms a batch; rollout and update "
        f"take the same time at {found['even']:.1f} workers"
    )
    return shown


if __name__ == "__main__":
    cli(main)
