"""RL² on PointRobot: a point finds a hidden goal in its first episode and goes straight to it from then on; ragged episodes."""

from pathlib import Path

import torch
from torchrl.envs import Compose, TransformedEnv

from recipes.command import command
from recipes.experiment import Experiment, publish
from recipes.presets import PRESETS
from recipes.run import Run
from recipes.settings import Learning, Network
from recipes.streams import TRAIN_TASKS, stream_seed
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
        run: seeds, where the run begins, which processes play, and what it leaves.
    """
    torch.manual_seed(run.seed)

    def make_env(sampler: TaskSampler, rows: int) -> TransformedEnv:
        points = PointRobot(sparse=sparse, batch_size=(rows,))
        return TransformedEnv(points, Compose(Trial(episodes=episodes), sampler, PreviousStep()))

    goals = goals_on_half_circle()
    env = make_env(TaskSampler(goals, seed=stream_seed(run.seed, TRAIN_TASKS)), learning.trials)
    actor = GRUGaussianActor.from_env(env, **network.actor)
    critic = GRUValueHead.from_env(env, **network.critic)
    policy = ActorCritic(actor, critic)
    update = PPOUpdate(
        RL2PPOLoss(actor, critic, clip_epsilon=0.2, **learning.loss),
        TrialAdvantage(
            **learning.advantage, critic=policy
        ),  # batches cut trials: the critic says what the rest is worth
        bptt=BATCH_STEPS,
        **learning.update,
    )
    collector = run.collector(make_env, env, policy, update, **learning.frames(BATCH_STEPS))

    points = Experiment(actor, make_env, goals, run, held_out_tasks=512)
    result = points.train(collector, update)
    title = f"RL² on PointRobot, {'sparse' if sparse else 'dense'} rewards"
    return publish(points.report(result, title=title), run)


if __name__ == "__main__":
    command(main)
