"""RL² on GridNavi (VariBAD, Zintgraf et al. 2020): a GRU learns to search a grid for a hidden goal, and to go back to it."""

from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torchrl.envs import Compose, TransformedEnv

from recipes import experiment
from recipes.experiment import TRAIN_TASKS, Experiment, Learning, Network, Run, stream_seed, whole_batches
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
    TrialCollector,
    linear_decay,
    orthogonal_init_,
)
from rl2_torchrl.envs import GridNavi, grid_goals
from rl2_torchrl.evaluation import AdaptationCurve

EPISODE_STEPS = 15
NETWORK = Network()
LEARNING = Learning(trials=512, lr=2e-3, max_grad_norm=0.5, entropy=0.03)
RUN = Run(Path("runs/grid_navi"), report_tasks=2_000)


def main(
    *, episodes: int = 4, network: Network = NETWORK, learning: Learning = LEARNING, run: Run = RUN
) -> AdaptationReport:
    """Trains RL² on a 5x5 grid with one of 21 goals, 15 steps an episode, and reports how it searches and goes back.

    Args:
        episodes: episodes of a trial.
        network: actor and critic.
        learning: batches, and PPO on them.
        run: seeds, where the run begins, and what it leaves; there are 21 goals in all, so that goals are seen in training too.
    """
    torch.manual_seed(run.seed)

    def make_env(sampler: TaskSampler, rows: int) -> TransformedEnv:
        grids = GridNavi(episode_steps=EPISODE_STEPS, batch_size=(rows,))
        return TransformedEnv(grids, Compose(Trial(episodes=episodes), sampler, PreviousStep()))

    env = make_env(TaskSampler(grid_goals(), seed=stream_seed(run.seed, TRAIN_TASKS)), learning.trials)
    actor = GRUCategoricalActor.from_env(env, **network.slots, num_cells=network.num_cells)
    orthogonal_init_(actor, **network.initial)
    heads = {"extra_keys": network.critic_keys, "num_cells": network.critic_cells}
    critic = MemoryValueHead.from_env(env, actor, detach=True, **heads)
    update = PPOUpdate(
        RL2PPOLoss(actor, critic, clip_epsilon=0.2, entropy_bonus=True, entropy_coeff=learning.entropy),
        TrialAdvantage(gamma=learning.gamma, lmbda=learning.lmbda, value_target="gae"),
        lr=learning.lr,
        epochs=learning.epochs,
        minibatches=learning.minibatches,
        max_grad_norm=learning.max_grad_norm,
        lr_schedule=linear_decay,
        entropy_schedule=linear_decay,
    )
    batch = learning.trials * episodes * EPISODE_STEPS
    frames = {"frames_per_batch": batch, "total_frames": whole_batches(learning.env_steps, batch)}
    collector = TrialCollector(env, ActorCritic(actor, critic), keep=update.in_keys, **frames)

    grids = Experiment(actor, make_env, grid_goals(), run, held_out_tasks=512)
    result = grids.train(collector, update)
    known = known_goal_return(grids.reported).unsqueeze(-1).expand(-1, episodes)
    report = grids.report(result, baselines={"goal_known": AdaptationCurve(known)}, title="RL² on GridNavi")
    experiment.publish(report, run)
    plot_path(grids, torch.tensor([[3.0, 4.0], [4.0, 2.0]]), episodes).savefig(run.log_dir / "path.png", dpi=130)
    return report


def known_goal_return(goals: torch.Tensor) -> torch.Tensor:
    """Return of an episode that goes straight to ``goals`` [num_tasks, 2] and stays: the ceiling once the goal is known."""
    distance = goals.double().sum(-1)  # the start is (0, 0)
    return EPISODE_STEPS - (distance - 1) - 0.1 * (distance - 1)


def plot_path(grids: Experiment, goals: torch.Tensor, episodes: int) -> Figure:
    """The agent's path over the episodes of a trial with each of ``goals`` [n, 2]: a row a trial, a panel an episode."""
    cells: list[torch.Tensor] = []
    grids.play(goals, on_step=lambda step: cells.append(step["observation"].clone()))
    paths = torch.stack(cells, -1)[:, : episodes * EPISODE_STEPS].unflatten(-1, (episodes, EPISODE_STEPS))
    figure = Figure(figsize=(3 * episodes, 3.1 * len(goals)), layout="constrained")
    grid = figure.subplots(len(goals), episodes, squeeze=False)
    for row, goal, path in zip(grid, goals.tolist(), paths, strict=True):
        for number, (axes, of_episode) in enumerate(zip(row, path, strict=True)):
            x, y = of_episode % 5, of_episode // 5
            # A little aside with every step, so that a path that comes back can be followed.
            aside = torch.linspace(-0.2, 0.2, len(x))
            axes.add_patch(Rectangle((goal[0] - 0.5, goal[1] - 0.5), 1, 1, color="#e69f00", alpha=0.4))
            axes.plot(x + aside, y + aside, color="#0072b2", lw=1.2)
            axes.scatter(x + aside, y + aside, c=range(len(x)), cmap="viridis", s=18, zorder=2)
            axes.set(xlim=(-0.5, 4.5), ylim=(-0.5, 4.5), aspect="equal", title=f"episode {number + 1}")
            axes.set_xticks([i + 0.5 for i in range(4)], [""] * 4)
            axes.set_yticks([i + 0.5 for i in range(4)], [""] * 4)
            axes.grid(alpha=0.4)
    figure.suptitle("Paths within a trial, dark to bright; the goal is orange and not shown to the agent")
    return figure


if __name__ == "__main__":
    experiment.command(main)
