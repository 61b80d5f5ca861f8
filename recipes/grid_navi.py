"""RL² on GridNavi (VariBAD, Zintgraf et al. 2020): a GRU learns to search a grid for a hidden goal, and to go back to it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console
from torchrl.envs import Compose, TransformedEnv
from torchrl.record.loggers import get_logger

from recipes.weights import load_actor, save_actor
from rl2_torchrl import (
    ActorCritic,
    AdaptationReport,
    GRUCategoricalActor,
    MemoryValueHead,
    PPOUpdate,
    PreviousStep,
    RL2PPOLoss,
    TaskSampler,
    TrainResult,
    Trial,
    TrialAdvantage,
    TrialCollector,
    adaptation_curve,
    linear_decay,
    orthogonal_init_,
    train,
)
from rl2_torchrl.envs import GridNavi, grid_goals
from rl2_torchrl.evaluation import AdaptationCurve, with_shuffled_rewards, with_zeroed_memory

TRAIN_TASKS, HELD_OUT_TASKS, REPORT_TASKS = range(3)  # streams of tasks that never meet
EPISODE_STEPS = 15


def main(
    *,
    episodes: int = 4,
    trials: int = 512,
    env_steps: int = 10_000_000,
    units: int = 64,
    lr: float = 2e-3,
    gamma: float = 0.99,
    lmbda: float = 0.9,
    epochs: int = 4,
    minibatches: int = 8,
    entropy: float = 0.03,
    seed: int = 0,
    report_tasks: int = 2_000,
    weights: Path | None = None,
    logger: Literal["csv", "tensorboard", "wandb"] = "csv",
    log_dir: Path = Path("runs/grid_navi"),
    resume: bool = False,
    progress: bool = True,
) -> AdaptationReport:
    """Trains RL² on a 5x5 grid with one of 21 goals, 15 steps an episode, and reports how it searches and goes back.

    Args:
        episodes: episodes of a trial.
        trials: trials in a batch, each with a goal of its own.
        env_steps: env steps to train on, rounded up to whole batches.
        units: GRU units.
        lr: learning rate, decayed to 0 over the training.
        gamma: discount per step.
        lmbda: GAE's lambda.
        epochs: passes over a batch.
        minibatches: minibatches a pass.
        entropy: weight of the entropy bonus, decayed to 0 over the training.
        seed: seed of networks and goals.
        report_tasks: trials in the final report; there are 21 goals in all, so that goals are seen in training too.
        weights: file of an actor's weights, as a run leaves it in actor.pt: to evaluate in place of training.
        logger: where scalars go; tensorboard and wandb are extras of the package.
        log_dir: folder of the run: report.json, report.png, path.png, actor.pt, scalars and checkpoints.
        resume: go on from the newest checkpoint in log_dir.
        progress: show a progress bar.
    """
    torch.manual_seed(seed)
    env = make_env(TaskSampler(grid_goals(), seed=stream(seed, TRAIN_TASKS)), episodes, trials)
    actor = orthogonal_init_(GRUCategoricalActor.from_env(env, hidden_size=units))
    critic = MemoryValueHead.from_env(env, actor, detach=True, extra_keys=["time_left"], num_cells=[units])
    policy = ActorCritic(actor, critic)
    update = PPOUpdate(
        RL2PPOLoss(actor, critic, clip_epsilon=0.2, entropy_bonus=True, entropy_coeff=entropy),
        TrialAdvantage(gamma=gamma, lmbda=lmbda, value_target="gae"),
        lr=lr,
        epochs=epochs,
        minibatches=minibatches,
        max_grad_norm=0.5,
        lr_schedule=linear_decay,
        entropy_schedule=linear_decay,
    )
    batch = trials * episodes * EPISODE_STEPS
    total = math.ceil(env_steps / batch) * batch
    collector = TrialCollector(env, policy, frames_per_batch=batch, total_frames=total, keep=update.in_keys)

    def evaluate() -> dict[str, float]:
        curve = play(tasks(seed, HELD_OUT_TASKS, 512))
        first, last = curve.per_episode[[0, -1]].tolist()
        return {"trial_return": curve.mean, "first_episode": first, "last_episode": last}

    def play(goals: torch.Tensor, **how) -> AdaptationCurve:
        rows = min(len(goals), 2048)
        return adaptation_curve(make_env(TaskSampler.fixed(goals), episodes, rows), actor, len(goals), **how)

    if weights is not None:
        load_actor(actor, weights)
        result = TrainResult()
    else:
        result = train(
            collector,
            update,
            evaluate=evaluate,
            logger=get_logger(logger, str(log_dir), "scalars"),
            checkpoints=log_dir / "checkpoints",
            resume=resume,
            progress=progress,
        )
        save_actor(actor, log_dir / "actor.pt")
    report = make_report(play, tasks(seed, REPORT_TASKS, report_tasks), actor, seed, result)
    path = report.save(log_dir)
    plot_path(play, torch.tensor([[3.0, 4.0], [4.0, 2.0]]), episodes).savefig(log_dir / "path.png", dpi=130)
    console = Console()
    console.print(report.table())
    console.print(f"{result.env_steps:,} steps in {result.seconds:.0f} s; report and plots: {path.parent}")
    return report


def make_report(
    play: Callable[..., AdaptationCurve],
    goals: torch.Tensor,
    actor: GRUCategoricalActor,
    seed: int,
    result: TrainResult,
) -> AdaptationReport:
    """The agent, and without its memory and its rewards, on ``goals`` [num_tasks, 2], beside one that knows the goal."""
    agent = play(goals)
    known = known_goal_return(goals).unsqueeze(-1).expand_as(agent.returns)
    return AdaptationReport(
        agent=agent,
        greedy=play(goals, deterministic=True),
        baselines={"goal_known": AdaptationCurve(known)},
        ablations={
            "memory_zeroed": play(goals, ablation=with_zeroed_memory(actor)),
            "rewards_shuffled": play(goals, ablation=with_shuffled_rewards()),
        },
        train=result,
        seed=seed,
        title="RL² on GridNavi",
    )


def known_goal_return(goals: torch.Tensor) -> torch.Tensor:
    """Return of an episode that goes straight to ``goals`` [num_tasks, 2] and stays: the ceiling once the goal is known."""
    distance = goals.double().sum(-1)  # the start is (0, 0)
    return EPISODE_STEPS - (distance - 1) - 0.1 * (distance - 1)


def make_env(sampler: TaskSampler, episodes: int, rows: int) -> TransformedEnv:
    """``rows`` grids side by side, each played for trials of ``episodes`` episodes."""
    grids = GridNavi(episode_steps=EPISODE_STEPS, batch_size=(rows,))
    return TransformedEnv(grids, Compose(Trial(episodes=episodes), sampler, PreviousStep()))


def plot_path(play: Callable[..., AdaptationCurve], goals: torch.Tensor, episodes: int) -> Figure:
    """The agent's path over the episodes of a trial with each of ``goals`` [n, 2]: a row a trial, a panel an episode."""
    cells: list[torch.Tensor] = []
    play(goals, on_step=lambda step: cells.append(step["observation"].clone()))
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


def tasks(seed: int, kind: int, number: int) -> torch.Tensor:
    """``number`` goals from the stream ``kind``, [number, 2]."""
    return grid_goals()(torch.Size([number]), torch.Generator().manual_seed(stream(seed, kind)))


def stream(seed: int, kind: int) -> int:
    """A seed for each purpose, so that no two draw the same numbers."""
    return 1000 * seed + kind


if __name__ == "__main__":
    tyro.cli(main)
