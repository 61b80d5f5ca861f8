"""How fast cheetahs run and learn: the env beside a bare `mujoco.rollout`, and whole trainings in both modes, phase by phase."""

import statistics
from collections.abc import Callable
from pathlib import Path

import mujoco
import mujoco.rollout
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torchrl.envs import Compose, TransformedEnv

from recipes import half_cheetah
from recipes.benchmark import in_turns, medians_of, time_phases, write_json
from recipes.cli import cli
from rl2_torchrl import PreviousStep, TaskSampler, Trial
from rl2_torchrl.envs import HalfCheetahVelocity, velocities

#: Names of what is timed; a share is that of the first's steps/s.
BARE, TRANSITION, ROLLOUT, LOOP = "mujoco.rollout", "env.play", "env.rollout", "backend mujoco"


def main(
    *,
    rows: tuple[int, ...] = (16, 64, 256),
    threads: int = 2,
    steps: int = 200,
    repeats: int = 7,
    training: bool = True,
    json: Path | None = None,
) -> dict[str, dict]:
    """Times the same cheetahs with the same actions from the same start, in turns, and whole iterations of training.

    "mujoco.rollout" is MuJoCo's thread pool alone; "env.play" the env on plain tensors, as `TrialCollector` calls it;
    "env.rollout" TorchRL's loop over the env with all transforms of a trial; "backend mujoco" one env a cheetah, in a loop.
    Shares are medians over pairs of runs that followed one another.

    Args:
        rows: cheetahs side by side.
        threads: threads of MuJoCo's pool, and of PyTorch in trainings.
        steps: env steps of a run, of 5 steps of the simulation each.
        repeats: runs of each, taken in turns.
        training: time iterations of `recipes.half_cheetah` on velocities too, in both modes.
        json: file to write all figures to.
    """
    if repeats < 1 or steps < 1:
        raise ValueError(f"repeats={repeats}, steps={steps}: at least one run of one step must be timed.")
    figures = {str(n): measure(n, threads, steps, repeats) for n in rows}
    Console().print(table(figures, f"{threads} threads, medians of {repeats}"))
    if training:
        torch.set_num_threads(threads)
        figures["training"] = {mode: measure_training(mode, min(repeats, 5)) for mode in ("original", "trial")}
        Console().print(training_table(figures["training"], f"{threads} threads"))
    write_json(json, figures)
    return figures


def measure(rows: int, threads: int, steps: int, repeats: int) -> dict:
    """Steps/s of each way, its share of the first's, all runs, and how far the env's last state is from bare MuJoCo's."""
    env = HalfCheetahVelocity(batch_size=(rows,), horizon=steps, seed=0, num_threads=threads)
    generator = torch.Generator().manual_seed(0)
    tasks = velocities()(env.batch_size, generator)
    actions = 2 * torch.rand(steps, rows, 6, generator=generator) - 1
    env.start(tasks)
    start = env.get_extra_state()
    bodies = [part.clone() for part in env.get_outside_state()]
    bare, last = bare_rollout(env.model, *bodies[:2], actions, threads)
    few = actions[: max(1, steps // 10)]  # the last way is slow
    ways = {
        BARE: (bare, steps),
        TRANSITION: (transitions(env, start, actions), steps),
        ROLLOUT: (torchrl_rollout(env, start, tasks, actions), steps),
        LOOP: (loop(*bodies[:2], tasks, few), len(few)),
    }
    runs = in_turns({name: run for name, (run, _) in ways.items()}, repeats)
    seconds = {name: [each / ways[name][1] for each in times] for name, times in runs.items()}
    ways[TRANSITION][0]()
    shares = {name: [base / own for base, own in zip(seconds[BARE], seconds[name], strict=True)] for name in ways}
    return {
        "steps_per_second": {name: rows / statistics.median(times) for name, times in seconds.items()},
        "share": {name: statistics.median(values) for name, values in shares.items()},
        "seconds_per_step": seconds,
        "difference": float(np.abs(last[:, 1 : 1 + env.model.nq] - env.physics.bodies.qpos).max()),
    }


def measure_training(mode: str, repeats: int) -> dict:
    """Steps/s of collection, advantages, update and all of it, for a mode of the recipe on velocities."""
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    settings = half_cheetah.cheetah_settings("velocity", mode)
    trials = half_cheetah.CheetahTrials("velocity", settings["episodes"], horizon=200, max_velocity=2.0, seed=0)
    collector, update = half_cheetah.compose(trials, mode, settings["network"], settings["learning"])
    runs = time_phases(iter(collector), update, collector.requested_frames_per_batch, repeats)
    collector.shutdown()
    return {**medians_of(runs), "runs": runs}


def bare_rollout(
    model: mujoco.MjModel, qpos: torch.Tensor, qvel: torch.Tensor, actions: torch.Tensor, threads: int
) -> tuple[Callable, np.ndarray]:
    """A run of MuJoCo's pool alone, and where it leaves its last states ``[rows, size]``: (time, qpos, qvel)."""
    rows, substeps = actions.shape[1], HalfCheetahVelocity.frame_skip
    begin = np.concatenate((np.zeros((rows, 1)), qpos, qvel), 1)
    states = np.zeros((rows, substeps, begin.shape[1]))
    ctrls = [np.repeat(action.double().numpy()[:, None], substeps, 1) for action in actions]
    models, data = [model] * rows, [mujoco.MjData(model) for _ in range(threads)]
    pool = mujoco.rollout.Rollout(nthread=threads if threads > 1 else 0)

    def run() -> None:
        state = begin.copy()
        for ctrl in ctrls:
            pool.rollout(models, data, state, ctrl, skip_checks=True, nstep=substeps, state=states)
            state[:] = states[:, -1]

    return run, states[:, -1]


def transitions(env: HalfCheetahVelocity, start: torch.Tensor, actions: torch.Tensor) -> Callable[[], None]:
    """A run of the env on plain tensors."""

    def run() -> None:
        env.set_extra_state(start)
        for action in actions:
            env.play(action)

    return run


def torchrl_rollout(
    env: HalfCheetahVelocity, start: torch.Tensor, tasks: torch.Tensor, actions: torch.Tensor
) -> Callable[[], None]:
    """A run of the env in TorchRL's loop, with the transforms of a trial."""
    transforms = Compose(Trial(episodes=1), TaskSampler.fixed(tasks), PreviousStep(["observation"]))
    trial = TransformedEnv(env, transforms)

    def run() -> None:
        first, remaining = trial.reset(), iter(actions)
        env.set_extra_state(start)
        trial.rollout(len(actions), lambda td: td.set("action", next(remaining)), auto_reset=False, tensordict=first)

    return run


def loop(qpos: torch.Tensor, qvel: torch.Tensor, tasks: torch.Tensor, actions: torch.Tensor) -> Callable[[], None]:
    """A run of as many envs as there are cheetahs, each MuJoCo's ``mj_step`` through TorchRL's backend."""
    envs = [HalfCheetahVelocity(backend="mujoco") for _ in range(len(tasks))]
    everyone = torch.ones(1, dtype=torch.bool)

    def run() -> None:
        for row, own in enumerate(envs):
            own.start(tasks[row])
            own.physics.reset_mask(everyone, qpos[row : row + 1], qvel[row : row + 1])
        for action in actions:
            for row, own in enumerate(envs):
                own.play(action[row])

    return run


def table(figures: dict[str, dict], title: str) -> Table:
    """One row a number of cheetahs; narrow enough for 80 columns."""
    out = Table(title=f"Thousand env steps/s and share of MuJoCo's ({title})")
    for column in ("cheetahs", BARE, TRANSITION, ROLLOUT, LOOP):
        out.add_column(column, justify="right")
    for rows, figure in figures.items():
        speeds, shares = figure["steps_per_second"], figure["share"]
        out.add_row(rows, *(f"{speeds[name] / 1e3:.1f} {shares[name]:.0%}" for name in speeds))
    return out


def training_table(figures: dict[str, dict], title: str) -> Table:
    """One row a mode: steps/s of each phase, and its share of the time."""
    out = Table(title=f"Training: thousand env steps/s and share of the time ({title})")
    for column in ("mode", "collect", "advantage", "update", "total"):
        out.add_column(column, justify="right")
    for mode, figure in figures.items():
        speeds = {phase: figure[f"{phase}_steps_per_second"] for phase in figure["runs"]}
        shares = (f"{speed / 1e3:,.1f} {speeds['total'] / speed:.0%}" for speed in speeds.values())
        out.add_row(mode, *shares)
    return out


if __name__ == "__main__":
    cli(main)
