"""RL² on Walker2d with body, joints and ground unknown: masses, inertia, damping and friction are drawn anew for each trial."""

from functools import cache, partial
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
from rl2_torchrl.envs.physics import gymnasium_model, import_mujoco, load_model

PRESET = PRESETS["Walker2d-v5"]
RUN = Run(Path("runs/walker"), report_tasks=200)
#: Steps of a batch in each row, and of a chunk that gradients go through: episodes last up to 200.
BATCH_STEPS, CHUNK_STEPS = 100, 50
#: What a task multiplies of MuJoCo's model, and the base of the multiplier: ``base ** u`` with u drawn from U[-3, 3].
RANDOM = {"body_mass": 1.5, "body_inertia": 1.5, "dof_damping": 1.3, "geom_friction": 1.5}


def main(
    *,
    episodes: int = 2,
    horizon: int = 200,
    network: Network = PRESET.network,
    learning: Learning = PRESET.learning,
    run: Run = RUN,
) -> AdaptationReport:
    """Trains RL² to walk in bodies of unknown mass, inertia, damping and friction (rand_param_envs), and reports how it adapts.

    Args:
        episodes: episodes of a trial; one ends where the walker falls.
        horizon: most steps of an episode.
        network: actor and critic.
        learning: batches, and PPO on them.
        run: seeds, where the run begins, which processes play, and what it leaves.
    """
    torch.manual_seed(run.seed)
    torch.set_flush_denormal(True)

    def make_env(sampler: TaskSampler, rows: int) -> TransformedEnv:
        make = partial(gymnasium.make, "Walker2d-v5", max_episode_steps=horizon)
        walkers = GymVectorEnv(make, rows, set_task=set_body, task_spec=Unbounded(task_size()))
        return TransformedEnv(walkers, Compose(Trial(episodes=episodes), sampler, PreviousStep()))

    env = make_env(TaskSampler(bodies, seed=stream_seed(run.seed, TRAIN_TASKS)), learning.trials)
    actor = GRUGaussianActor.from_env(env, **network.actor)
    critic = GRUValueHead.from_env(env, **network.critic)
    policy = ActorCritic(actor, critic)
    update = PPOUpdate(
        RL2PPOLoss(actor, critic, clip_epsilon=0.2, **learning.loss),
        TrialAdvantage(**learning.advantage, critic=policy, scale_rewards=True),
        bptt=CHUNK_STEPS,
        **learning.update,
    )
    collector = run.collector(make_env, env, policy, update, **learning.frames(BATCH_STEPS))
    walkers = Experiment(actor, make_env, bodies, run, held_out_tasks=64, rows=64)
    result = walkers.train(collector, update)
    return publish(walkers.report(result, title="RL² on Walker2d, random bodies"), run)


@cache
def standard_body() -> dict[str, np.ndarray]:
    """What a task multiplies, as MuJoCo's model has it."""
    model = load_model(gymnasium_model("walker2d_v5.xml"))
    return {name: getattr(model, name).copy() for name in RANDOM}


def task_size() -> int:
    """Numbers of a task: an exponent for each that is multiplied."""
    return sum(values.size for values in standard_body().values())


def set_body(walker: gymnasium.Env, task: torch.Tensor) -> None:
    """Multiplies the standard body by the exponents ``task``, ``[task_size]``."""
    standard = standard_body()
    parts = np.split(task.double().numpy(), np.cumsum([values.size for values in standard.values()])[:-1])
    for (name, values), exponents in zip(standard.items(), parts, strict=True):
        getattr(walker.model, name)[:] = values * RANDOM[name] ** exponents.reshape(values.shape)
    # What MuJoCo derives from masses, at the model's own pose; the reset that follows sets the state.
    import_mujoco().mj_setConst(walker.model, walker.data)


def bodies(batch_size: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Exponents from -3 to 3, ``[*batch_size, task_size]``: masses from 0.3 to 3.4 times the standard's."""
    return 6 * torch.rand(*batch_size, task_size(), generator=generator) - 3


if __name__ == "__main__":
    command(main)
