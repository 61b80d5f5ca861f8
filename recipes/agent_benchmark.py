"""An agent in all its forms beside the training's policy: returns of the same trials under the same noise, time of an action."""

import statistics
import tempfile
import time
from collections.abc import Callable
from copy import copy
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from torchrl.envs import DTypeCastTransform, ExplorationType, TransformedEnv, set_exploration_type

from recipes.agents import held_out, play
from recipes.cli import cli
from recipes.half_cheetah import CheetahTrials
from recipes.streams import HELD_OUT_TASKS, draw_tasks
from rl2_torchrl import AdaptiveAgent, TaskSampler, adaptation_curve


def main(
    *,
    agent: Path = Path("recipes/pretrained/bandits_10_5_rewards.safetensors"),
    env: Literal["held_out", "direction", "velocity"] = "held_out",
    trials: int = 1000,
    forms: tuple[Literal["pt2", "onnx"], ...] = ("pt2", "onnx"),
    actions: int = 2000,
    rows: int = 1,
    dtype: Literal["float32", "float64"] = "float32",
    threads: int | None = None,
) -> dict[str, dict[str, float]]:
    """Plays the same trials with the training's policy, its agent and the agent's exports, and times an action of each.

    Args:
        agent: an agent's file.
        env: held-out tasks of the env that the file is named after (`recipes.agents`), or a cheetah's.
        trials: trials.
        forms: what it is exported to; onnx is an extra of the package.
        actions: actions that are timed, the median of which is told; 0 times none.
        rows: trials side by side while actions are timed.
        dtype: in which policy and exports reckon; envs take actions in float32. A cheetah is chaotic: a difference in the last
            digit of one action leads two of them apart within a trial. From float64 all forms round to the same action.
        threads: threads that PyTorch uses; all cores by default.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    played = partial(trials_of, agent, env)
    saved = AdaptiveAgent.load(agent)
    if dtype == "float64":
        saved = AdaptiveAgent.from_policy(saved.policy.double(), played(rows))
    figures = {"training's policy": {"return": trained(saved, played(trials))}}
    for name, each in {"agent": saved, **exported(saved, forms)}.items():
        torch.manual_seed(0)
        figures[name] = {"return": play(each, played(trials)).mean().item()}
        figures[name]["difference"] = difference(copy(saved), each, played(trials))
        if actions:
            figures[name]["microseconds"] = microseconds(acting(each, played(rows)), actions)
    if actions:
        figures["training's policy"]["microseconds"] = microseconds(policy(saved, played(rows)), actions)
    timed = f"; {actions} actions of {rows} rows, {torch.get_num_threads()} threads" if actions else ""
    Console().print(table(figures, f"{agent}, {dtype}: {trials} trials{timed}"))
    return figures


def trials_of(path: Path, env: str, trials: int) -> TransformedEnv:
    """Held-out trials side by side: the same at every call."""
    if env == "held_out":
        return held_out(path.stem, trials)
    cheetahs = CheetahTrials(env, episodes=2, horizon=200, max_velocity=2.0, seed=0)
    tasks = draw_tasks(cheetahs.distribution, cheetahs.seed, HELD_OUT_TASKS, trials)
    return cheetahs.env(TaskSampler.fixed(tasks), trials)


def exported(agent: AdaptiveAgent, forms: tuple[str, ...]) -> dict[str, AdaptiveAgent]:
    """The agent of each exported file."""
    made = {}
    with tempfile.TemporaryDirectory() as folder:
        for form in forms:
            path = agent.export(Path(folder) / f"agent.{form}")
            made[f".{form}"] = AdaptiveAgent.load(path) if form == "onnx" else of_program(path, agent)
    return made


def of_program(path: Path, agent: AdaptiveAgent) -> AdaptiveAgent:
    """The agent of a `torch.export` program, which was written here."""
    return AdaptiveAgent(torch.export.load(path).module(), agent.signature)


def trained(agent: AdaptiveAgent, env: TransformedEnv) -> float:
    """The mean return of the training's policy, as evaluations play it; the env takes actions in its own dtype."""
    taken, given = agent.signature.action.dtype, agent.signature.dtype
    if taken.is_floating_point and taken != given:
        env = TransformedEnv(env, DTypeCastTransform(taken, given, in_keys=[], in_keys_inv=["action"]))
    torch.manual_seed(0)
    return adaptation_curve(env, agent.policy, env.batch_size.numel()).mean


def difference(agent: AdaptiveAgent, other: AdaptiveAgent, env: TransformedEnv) -> float:
    """The largest difference of the actions of two agents that see the same trials under the same noise.

    It is the first one that plays: where an env is chaotic, as a cheetah is, rounding alone would lead them apart.
    """
    td, largest, step, done = env.reset(), 0.0, 0, False
    for each in (agent, other):
        each.new_trial(env.batch_size.numel())
    while not done:
        actions = []
        for each in (agent, other):
            torch.manual_seed(step)
            actions.append(torch.as_tensor(each.act(*[td[key] for key in agent.signature.observations])))
        largest, step = max(largest, (actions[0] - actions[1]).abs().max().item()), step + 1
        td = env.step(td.set("action", actions[0]))["next"]
        for each in (agent, other):
            each.observe(td["reward"], td["episode_done"])
        done = td["done"].all()
    return largest


# ------------------------------------------------------------------------ time
def acting(agent: AdaptiveAgent, env: TransformedEnv) -> Callable[[], object]:
    """An action of the agent, and what it is told of it."""
    td, (rows,) = env.reset(), env.batch_size
    shown, reward = [td[key] for key in agent.signature.observations], torch.zeros(rows)
    agent.new_trial(rows)

    def act() -> None:
        agent.act(*shown)
        agent.observe(reward, False)

    return act


def policy(agent: AdaptiveAgent, env: TransformedEnv) -> Callable[[], object]:
    """An action of the policy in TorchRL's way, which needs the transition input made for it."""
    td, step = env.reset(), agent.policy
    td["is_init"] = torch.ones(*env.batch_size, 1, dtype=torch.bool)

    def act() -> None:
        with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
            step(td)

    return act


def microseconds(act: Callable[[], object], actions: int) -> float:
    """The median time of an action."""
    times = []
    for _ in range(actions + 100):
        start = time.perf_counter()
        act()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times[100:])


def table(figures: dict[str, dict[str, float]], title: str) -> Table:
    columns = ("form", "return of a trial", "largest difference of an action, shown the same", "microseconds an action")
    shown = Table(*columns, title=title)
    for name, figure in figures.items():
        time_of = f"{figure['microseconds']:.0f}" if "microseconds" in figure else "-"
        apart = f"{figure['difference']:.1e}" if "difference" in figure else "-"
        shown.add_row(name, f"{figure['return']:.6f}", apart, time_of)
    return shown


if __name__ == "__main__":
    cli(main)
