"""RL² on PointRobot: a point finds a hidden goal in its first episode and goes straight to it from then on; ragged episodes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torchrl.envs import Compose, TransformedEnv

from recipes import experiment
from recipes.experiment import REPORT_TASKS, TRAIN_TASKS, Experiment, Learning, Network, Run, stream_seed, whole_batches
from recipes.presets import PRESETS
from rl2_torchrl import (
    ActorCritic,
    AdaptationReport,
    GRUGaussianActor,
    GRUValueHead,
    PPOUpdate,
    PreviousStep,
    RL2PPOLoss,
    TaskSampler,
    Trial,
    TrialAdvantage,
    TrialCollector,
    linear_decay,
)
from rl2_torchrl.envs import PointRobot, goals_on_half_circle

PRESET = PRESETS["PointRobot"]
RUN = Run(Path("runs/point_robot"), report_tasks=2_000)
#: Steps of a batch in each row, and of a chunk that gradients go through. Trials end where they end, within batches too.
BATCH_STEPS = 50


def main(
    *,
    episodes: int = 2,
    sparse: bool = False,
    network: Network = PRESET.network,
    learning: Learning = PRESET.learning,
    run: Run = RUN,
) -> AdaptationReport:
    """Trains RL² on points whose goal lies somewhere on a half circle, and reports how soon they reach it, episode by episode.

    Args:
        episodes: episodes of a trial.
        sparse: whether rewards tell of the goal only where it is reached, so that it has to be searched for.
        network: actor and critic.
        learning: batches, and PPO on them.
        run: seeds, where the run begins, and what it leaves.
    """
    torch.manual_seed(run.seed)

    def make_env(sampler: TaskSampler, rows: int) -> TransformedEnv:
        points = PointRobot(sparse=sparse, batch_size=(rows,))
        return TransformedEnv(points, Compose(Trial(episodes=episodes), sampler, PreviousStep()))

    goals = goals_on_half_circle()
    env = make_env(TaskSampler(goals, seed=stream_seed(run.seed, TRAIN_TASKS)), learning.trials)
    actor = GRUGaussianActor.from_env(env, **network.slots, num_cells=network.num_cells)
    critic = GRUValueHead.from_env(env, **network.slots, extra_keys=network.critic_keys)
    policy = ActorCritic(actor, critic)
    horizon = {"gamma": learning.gamma, "lmbda": learning.lmbda, "value_target": "gae"}
    update = PPOUpdate(
        RL2PPOLoss(actor, critic, clip_epsilon=0.2, entropy_bonus=learning.entropy > 0, entropy_coeff=learning.entropy),
        TrialAdvantage(**horizon, critic=policy),  # batches cut trials: the critic says what the rest is worth
        bptt=BATCH_STEPS,
        lr=learning.lr,
        epochs=learning.epochs,
        minibatches=learning.minibatches,
        max_grad_norm=learning.max_grad_norm,
        lr_schedule=linear_decay,
    )
    batch = learning.trials * BATCH_STEPS
    frames = {"frames_per_batch": batch, "total_frames": whole_batches(learning.env_steps, batch)}
    collector = TrialCollector(env, policy, keep=update.in_keys, **frames)

    points = Experiment(actor, make_env, goals, run, held_out_tasks=512)
    result = points.train(collector, update)
    report = StepsReport(
        **vars(points.report(result, title="RL² on PointRobot")), steps=steps_to_goal(points, episodes)
    )
    return experiment.publish(report, run)


@dataclass
class StepsReport(AdaptationReport):
    """An `AdaptationReport` with the mean number of steps of each episode, ``[num_episodes]``, as ``steps_per_episode``."""

    steps: torch.Tensor = None

    def entries(self) -> dict[str, Any]:
        """The steps, beside the returns."""
        return {"steps_per_episode": self.steps.tolist()}

    def summary(self) -> dict[str, float | str]:
        """The steps before the returns."""
        return {"steps, first and last episode": f"{self.steps[0]:.2f}, {self.steps[-1]:.2f}", **super().summary()}


def steps_to_goal(points: Experiment, episodes: int) -> torch.Tensor:
    """Mean steps of each episode ``[episodes]`` of the agent's trials on up to 2,000 held-out goals, played side by side."""
    tasks = points.tasks(REPORT_TASKS, min(points.run.report_tasks, 2_000))
    counts = torch.zeros(len(tasks), episodes)
    first = torch.ones(len(tasks), 1, dtype=torch.bool)  # rows in their first trial

    def count(step: dict) -> None:
        counts.scatter_add_(1, step["episode_index"], first.float())
        first.logical_and_(~step["next", "done"])

    points.play(tasks, on_step=count)
    return counts.mean(0)


if __name__ == "__main__":
    experiment.command(main)
