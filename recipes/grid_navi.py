"""RL² on GridNavi (VariBAD, Zintgraf et al. 2020): a GRU learns to search a grid for a hidden goal, and to go back to it."""

import logging
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torchrl.envs import Compose, TransformedEnv

from recipes.command import command
from recipes.experiment import Experiment, publish
from recipes.presets import PRESETS
from recipes.run import Run
from recipes.settings import FirstWeights, Learning, Network, Told, told_of
from recipes.streams import TRAIN_TASKS, stream_seed
from rl2_torchrl import (
    ActorCritic,
    AdaptationReport,
    GRUCategoricalActor,
    MemoryValueHead,
    PPOUpdate,
    PreviousStep,
    RL2PPOLoss,
    TaskSampler,
    Trial,
    TrialAdvantage,
    orthogonal_init_,
)
from rl2_torchrl.baselines import GridSearch, grid_search
from rl2_torchrl.envs import GridNavi, grid_goals
from rl2_torchrl.evaluation import AdaptationCurve

log = logging.getLogger(__name__)

EPISODE_STEPS = 15
GOALS = torch.tensor([[x, y] for y in range(5) for x in range(5) if x > 1 or y > 1]).float()
PRESET = PRESETS["GridNavi"]
#: A trial has sixty steps: the slowest units remember all of it from the start.
FIRST_WEIGHTS = FirstWeights(memory_steps=60, input_gain=2.0)
RUN = Run(Path("runs/grid_navi"), report_tasks=2_100)


def main(
    *,
    episodes: int = 4,
    network: Network = PRESET.network,
    first_weights: FirstWeights = FIRST_WEIGHTS,
    learning: Learning = PRESET.learning,
    run: Run = RUN,
) -> AdaptationReport:
    """Trains RL² on a 5x5 grid with one of 21 goals, 15 steps an episode, and reports how it searches and goes back.

    It is reported on all goals alike, so that the return of the greedy agent is exact, as the Bayes optimum beside it: report_tasks
    that are no multiple of 21 are made one, of two rounds of all goals at least.

    Args:
        episodes: episodes of a trial.
        network: actor and critic.
        first_weights: what the core's weights are at first.
        learning: batches, and PPO on them.
        run: seeds, where the run begins, which processes play, and what it leaves; there are 21 goals in all, so
            that goals are seen in training too.
    """
    torch.manual_seed(run.seed)
    alike = len(GOALS) * max(2, math.ceil(run.report_tasks / len(GOALS)))
    if run.report_tasks != alike:
        log.warning("report_tasks=%s is made %s: each goal as often, and twice at least.", run.report_tasks, alike)
        run = replace(run, report_tasks=alike)

    def make_env(sampler: TaskSampler, rows: int) -> TransformedEnv:
        grids = GridNavi(episode_steps=EPISODE_STEPS, batch_size=(rows,))
        return TransformedEnv(grids, Compose(Trial(episodes=episodes), sampler, PreviousStep()))

    env = make_env(TaskSampler(grid_goals(), seed=stream_seed(run.seed, TRAIN_TASKS)), learning.trials)
    actor = GRUCategoricalActor.from_env(env, **network.actor)
    orthogonal_init_(actor, **asdict(first_weights))
    critic = MemoryValueHead.from_env(env, actor, **network.value_head(detach=True))
    update = PPOUpdate(
        RL2PPOLoss(actor, critic, clip_epsilon=0.2, **learning.loss),
        TrialAdvantage(**learning.advantage),
        **learning.update,
    )
    collector = run.collector(
        make_env, env, ActorCritic(actor, critic), update, **learning.frames(episodes * EPISODE_STEPS)
    )

    grids = Grids(actor, make_env, goals_in_turn, run, held_out_tasks=24 * len(GOALS))
    result = grids.train(collector, update)
    known = known_goal_return(grids.reported).unsqueeze(-1).expand(-1, episodes)
    best = grid_search(GOALS, episode_steps=EPISODE_STEPS, episodes=episodes)
    report = grids.report(
        result,
        baselines={"goal_known": RoundsCurve(known)},
        optimum=best.trial_return,
        title=f"RL² on GridNavi{told_of(network, Told(), run.weights)}",
    )
    goals = torch.tensor([[3.0, 4.0], [4.0, 2.0]])
    rows = {"RL²": paths(grids, goals, episodes), "Bayes optimum": best_paths(best, goals, episodes)}
    plot_paths(rows, goals).savefig(run.log_dir / "path.png", dpi=130)
    return publish(report, run)  # last: where there is a report, nothing of the run is missing


class Grids(Experiment):
    """An `Experiment` whose tasks are all goals in turn, and no draws of them."""

    def play(self, tasks: torch.Tensor, **how: Any) -> "RoundsCurve":
        """As `Experiment.play`."""
        return RoundsCurve(**vars(super().play(tasks, **how)))


class RoundsCurve(AdaptationCurve):
    """A curve over rounds of all goals: how these differ is no chance, so that standard errors are over rounds."""

    @property
    def rounds(self) -> AdaptationCurve:
        """The mean over the goals of each round."""
        return AdaptationCurve(self.returns.unflatten(0, (-1, len(GOALS))).mean(1))

    @property
    def se(self) -> float:
        """Standard error of `mean`; 0 where all that is played is the same in each round."""
        return self.rounds.se

    @property
    def per_episode_se(self) -> torch.Tensor:
        """Standard error of `per_episode`, ``[num_episodes]``."""
        return self.rounds.per_episode_se


def goals_in_turn(batch_size: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """All goals, one after the other, as often as there is room in ``batch_size``: [*B, 2]."""
    return GOALS[torch.arange(batch_size.numel()) % len(GOALS)].view(*batch_size, 2)


def known_goal_return(goals: torch.Tensor) -> torch.Tensor:
    """Return of an episode that goes straight to ``goals`` [num_tasks, 2] and stays: the ceiling once the goal is known."""
    distance = goals.double().sum(-1)  # the start is (0, 0)
    return EPISODE_STEPS - (distance - 1) - 0.1 * (distance - 1)


def paths(grids: Experiment, goals: torch.Tensor, episodes: int) -> torch.Tensor:
    """Cells in which the agent is before each step of a trial with each of ``goals`` [n, 2]: [n, episodes, EPISODE_STEPS]."""
    cells: list[torch.Tensor] = []
    grids.play(goals, on_step=lambda step: cells.append(step["observation"].clone()), deterministic=True)
    return torch.stack(cells, -1)[:, : episodes * EPISODE_STEPS].unflatten(-1, (episodes, EPISODE_STEPS))


def best_paths(best: GridSearch, goals: torch.Tensor, episodes: int) -> torch.Tensor:
    """`paths` of the Bayes optimum: its walk until the goal is found, from then on straight there."""
    cells = torch.zeros(len(goals), episodes, EPISODE_STEPS, dtype=torch.long)
    for row, (x, y) in enumerate(goals.long().tolist()):
        straight = [min(step, x) + 5 * min(max(step - x, 0), y) for step in range(EPISODE_STEPS)]
        found = int(best.found[(goals[row] == GOALS).all(-1)])
        found = found if found > 0 else len(best.cells) + 1  # never, in too few episodes
        walk = best.cells[:found].tolist()
        for episode in range(episodes):
            begun = episode * EPISODE_STEPS
            after = walk[begun : begun + EPISODE_STEPS - 1]
            stays = [5 * y + x] * (EPISODE_STEPS - 1 - len(after))
            cells[row, episode] = torch.tensor(straight if begun >= found else [0, *after, *stays])
    return cells


def plot_paths(rows: dict[str, torch.Tensor], goals: torch.Tensor) -> Figure:
    """Paths over the episodes of a trial, by whose they are, with each of ``goals`` [n, 2]: a panel an episode."""
    episodes = next(iter(rows.values())).shape[1]
    figure = Figure(figsize=(3 * episodes, 3.1 * len(goals) * len(rows)), layout="constrained")
    grid = iter(figure.subplots(len(goals) * len(rows), episodes, squeeze=False))
    for number, goal in enumerate(goals.tolist()):
        for name, cells in rows.items():
            for episode, (axes, path) in enumerate(zip(next(grid), cells[number], strict=True)):
                plot_path(axes, goal, path)
                axes.set_title(f"{name}, episode {episode + 1}")
    figure.suptitle("Paths within a trial, dark to bright; the goal is orange and not shown to the agent")
    return figure


def plot_path(axes: Axes, goal: list[float], path: torch.Tensor) -> None:
    """The path of an episode, [EPISODE_STEPS] cells."""
    # A little aside with every step, so that a path that comes back can be followed.
    aside = torch.linspace(-0.2, 0.2, len(path))
    x, y = path % 5 + aside, path // 5 + aside
    axes.add_patch(Rectangle((goal[0] - 0.5, goal[1] - 0.5), 1, 1, color="#e69f00", alpha=0.4))
    axes.plot(x, y, color="#0072b2", lw=1.2)
    axes.scatter(x, y, c=range(len(x)), cmap="viridis", s=18, zorder=2)
    axes.set(xlim=(-0.5, 4.5), ylim=(-0.5, 4.5), aspect="equal")
    axes.set_xticks([i + 0.5 for i in range(4)], [""] * 4)
    axes.set_yticks([i + 0.5 for i in range(4)], [""] * 4)
    axes.grid(alpha=0.4)


if __name__ == "__main__":
    command(main)
