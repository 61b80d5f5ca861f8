"""How long an evaluation takes: adaptation curves over held-out bandits, played side by side in few rows or in many."""

import statistics
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torchrl.envs import Compose, TransformedEnv

from recipes.benchmark import in_turns, require_repeats, write_json
from recipes.cli import cli
from rl2_torchrl import GRUCategoricalActor, PreviousStep, TaskSampler, Trial, adaptation_curve
from rl2_torchrl.envs import BernoulliBandit, uniform_means


def main(
    *,
    rows: tuple[int, ...] = (64, 512, 3334),
    tasks: int = 10_000,
    arms: int = 5,
    pulls: int = 10,
    units: int = 64,
    repeats: int = 7,
    threads: int | None = None,
    json: Path | None = None,
) -> dict[str, dict]:
    """Times `adaptation_curve` over the same bandits with the same agent, the numbers of rows in turns.

    Args:
        rows: trials that are played side by side.
        tasks: held-out bandits, a trial each.
        arms: arms of a bandit.
        pulls: pulls of a trial.
        units: GRU units of the agent, which is not trained.
        repeats: evaluations of each, after one that is not timed.
        threads: threads that PyTorch uses; all cores by default.
        json: file to write all figures to.
    """
    require_repeats(repeats)
    if not rows or min(rows) < 1:
        raise ValueError(f"rows={rows}: name numbers of trials side by side, such as --rows 64 512.")
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    held_out = uniform_means(arms)(torch.Size([tasks]), torch.Generator().manual_seed(0))
    envs = {n: bandits(held_out, n, pulls) for n in rows}
    agent = GRUCategoricalActor.from_env(next(iter(envs.values())), hidden_size=units)
    runs = {n: partial(adaptation_curve, env, agent, tasks) for n, env in envs.items()}
    figures = {str(n): figures_of(seconds, n, tasks, pulls) for n, seconds in in_turns(runs, repeats).items()}
    title = f"{tasks} bandits of {arms} arms, {pulls} pulls; medians of {repeats}, {torch.get_num_threads()} threads"
    Console().print(table(figures, title))
    write_json(json, figures)
    return figures


def bandits(tasks: torch.Tensor, rows: int, pulls: int) -> TransformedEnv:
    """Trials on ``tasks`` ``[num_tasks, arms]``, one after another in ``rows`` rows."""
    base = BernoulliBandit(tasks.shape[1], batch_size=(rows,), seed=0)
    return TransformedEnv(base, Compose(Trial(episodes=pulls), TaskSampler.fixed(tasks), PreviousStep()))


def figures_of(runs: list[float], rows: int, tasks: int, pulls: int) -> dict:
    """Median seconds of an evaluation, what that is for each step of all rows in microseconds, and all runs."""
    seconds, steps = statistics.median(runs), -(-tasks // rows) * pulls
    return {"seconds": seconds, "microseconds_per_step": 1e6 * seconds / steps, "runs": runs}


def table(figures: dict[str, dict], title: str) -> Table:
    shown = Table("rows", "milliseconds", "microseconds a step of all rows", title=title)
    for rows, figure in figures.items():
        shown.add_row(rows, f"{1e3 * figure['seconds']:.1f}", f"{figure['microseconds_per_step']:.0f}")
    return shown


if __name__ == "__main__":
    cli(main)
