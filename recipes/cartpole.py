"""RL² on CartPole without its velocities, its pole's length and gravity unknown: a Gymnasium env through `GymVectorEnv`."""

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
    GRUCategoricalActor,
    GRUValueHead,
    PPOUpdate,
    PreviousStep,
    RL2PPOLoss,
    TaskSampler,
    Trial,
    TrialAdvantage,
)
from rl2_torchrl.envs import GymVectorEnv

PRESET = PRESETS["CartPole-v1"]
RUN = Run(Path("runs/cartpole"), report_tasks=256)
#: Steps of a batch in each row, and of a chunk that gradients go through: episodes last up to 500.
BATCH_STEPS, CHUNK_STEPS = 128, 64


def main(
    *,
    episodes: int = 2,
    observation_scale: float = 1.0,
    network: Network = PRESET.network,
    learning: Learning = PRESET.learning,
    run: Run = RUN,
) -> AdaptationReport:
    """Trains RL² to balance poles of unknown length under unknown gravity, seen without velocities, and reports how long it does.

    Args:
        episodes: episodes of a trial.
        observation_scale: factor on the observations, to see what normalising them is worth.
        network: actor and critic.
        learning: batches, and PPO on them.
        run: seeds, where the run begins, which processes play, and what it leaves.
    """
    torch.manual_seed(run.seed)

    def make_env(sampler: TaskSampler, rows: int) -> TransformedEnv:
        poles = GymVectorEnv(
            partial(masked_cartpole, observation_scale), rows, set_task=set_physics, task_spec=Unbounded(2)
        )
        return TransformedEnv(poles, Compose(Trial(episodes=episodes), sampler, PreviousStep()))

    env = make_env(TaskSampler(physics, seed=stream_seed(run.seed, TRAIN_TASKS)), learning.trials)
    actor = GRUCategoricalActor.from_env(env, **network.actor)
    critic = GRUValueHead.from_env(env, **network.critic)
    policy = ActorCritic(actor, critic)
    update = PPOUpdate(
        RL2PPOLoss(actor, critic, clip_epsilon=0.2, **learning.loss),
        # Returns are up to a hundred, and the critic learns in units.
        TrialAdvantage(**learning.advantage, critic=policy, scale_rewards=True),
        bptt=CHUNK_STEPS,
        **learning.update,
    )
    collector = run.collector(make_env, env, policy, update, **learning.frames(BATCH_STEPS))
    poles = Experiment(actor, make_env, physics, run, held_out_tasks=64, rows=64)
    result = poles.train(collector, update)
    return publish(poles.report(result, title="RL² on CartPole without velocities"), run)


def masked_cartpole(scale: float = 1.0) -> gymnasium.Env:
    """CartPole that shows where cart and pole are, times ``scale``, and not how fast they move."""
    space = gymnasium.spaces.Box(-np.inf, np.inf, (2,))
    return gymnasium.wrappers.TransformObservation(
        gymnasium.make("CartPole-v1"), lambda seen: scale * seen[[0, 2]], space
    )


def set_physics(cartpole: gymnasium.Env, task: torch.Tensor) -> None:
    """Half the pole's length (m) and gravity (m/s²)."""
    cartpole.length, cartpole.gravity = task.tolist()
    cartpole.polemass_length = cartpole.masspole * cartpole.length


def physics(batch_size: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Half lengths from 0.25 to 1 m (Gymnasium's is 0.5), gravity from 5 to 15 m/s², ``[*batch_size, 2]``."""
    return torch.tensor([0.25, 5.0]) + torch.tensor([0.75, 10.0]) * torch.rand(*batch_size, 2, generator=generator)


if __name__ == "__main__":
    command(main)
