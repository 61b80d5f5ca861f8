"""RL² on Pendulum with mass, length and gravity unknown: a Gymnasium env of bounded reals as actions, through `GymVectorEnv`."""

from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import torch
from torchrl.data import Unbounded
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
from rl2_torchrl.envs import GymVectorEnv

PRESET = PRESETS["Pendulum-v1"]
RUN = Run(Path("runs/pendulum"), report_tasks=256)
#: Steps of a batch in each row, and of a chunk that gradients go through: episodes last 200.
BATCH_STEPS, CHUNK_STEPS = 100, 50


def main(
    *,
    episodes: int = 2,
    observation_scale: float = 1.0,
    velocity_scale: float = 1.0,
    network: Network = PRESET.network,
    learning: Learning = PRESET.learning,
    run: Run = RUN,
) -> AdaptationReport:
    """Trains RL² to swing up pendulums of unknown mass, length and gravity, and reports what an episode of 200 steps costs it.

    Args:
        episodes: episodes of a trial.
        observation_scale: factor on the observations, to see what normalising them is worth.
        velocity_scale: further factor on the angular velocity; 1000 shows it in mrad/s beside numbers below 1.
        network: actor and critic.
        learning: batches, and PPO on them.
        run: seeds, where the run begins, which processes play, and what it leaves.
    """
    torch.manual_seed(run.seed)

    def make_env(sampler: TaskSampler, rows: int) -> TransformedEnv:
        make = partial(scaled_pendulum, observation_scale, velocity_scale)
        pendulums = GymVectorEnv(make, rows, set_task=set_physics, task_spec=Unbounded(3))
        return TransformedEnv(pendulums, Compose(Trial(episodes=episodes), sampler, PreviousStep()))

    env = make_env(TaskSampler(physics, seed=stream_seed(run.seed, TRAIN_TASKS)), learning.trials)
    # Torques of up to 2 Nm: what is drawn beyond the env clips, and its log-probability is that of the draw.
    actor = GRUGaussianActor.from_env(env, **network.actor, init_log_std=0.0)
    critic = GRUValueHead.from_env(env, **network.critic)
    policy = ActorCritic(actor, critic)
    update = PPOUpdate(
        RL2PPOLoss(actor, critic, clip_epsilon=0.2, **learning.loss),
        # A step costs up to 16, and the critic learns in units.
        TrialAdvantage(**learning.advantage, critic=policy, scale_rewards=True),
        bptt=CHUNK_STEPS,
        **learning.update,
    )
    collector = run.collector(make_env, env, policy, update, **learning.frames(BATCH_STEPS))
    pendulums = Experiment(actor, make_env, physics, run, held_out_tasks=64, rows=64)
    result = pendulums.train(collector, update)
    return publish(pendulums.report(result, title="RL² on Pendulum"), run)


def scaled_pendulum(scale: float = 1.0, velocity_scale: float = 1.0) -> gymnasium.Env:
    """Pendulum that shows cosine and sine of its angle and its angular velocity (rad/s), times ``scale``."""
    scales = scale * np.array([1.0, 1.0, velocity_scale])
    space = gymnasium.spaces.Box(-np.inf, np.inf, (3,))
    return gymnasium.wrappers.TransformObservation(gymnasium.make("Pendulum-v1"), lambda seen: scales * seen, space)


def set_physics(pendulum: gymnasium.Env, task: torch.Tensor) -> None:
    """Mass (kg), length (m) and gravity (m/s²)."""
    pendulum.m, pendulum.l, pendulum.g = task.tolist()


def physics(batch_size: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Masses and lengths from 0.6 to 1.2 (Gymnasium's are 1), gravity from 6 to 12 (10), ``[*batch_size, 3]``."""
    least, range_ = torch.tensor([0.6, 0.6, 6.0]), torch.tensor([0.6, 0.6, 6.0])
    return least + range_ * torch.rand(*batch_size, 3, generator=generator)


if __name__ == "__main__":
    command(main)
