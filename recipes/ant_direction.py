"""RL² on Ant: a Gaussian GRU policy finds out, within a trial, which way it shall run."""

from pathlib import Path

import torch
from torchrl.envs import Compose, TransformedEnv

from recipes.command import command
from recipes.experiment import Experiment, publish
from recipes.presets import PRESETS
from recipes.run import Run
from recipes.settings import Learning, Network, Told, told_of
from recipes.streams import ENVS, TRAIN_TASKS, stream_seed
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
from rl2_torchrl.envs import AntDirection, directions, signs

PRESET = PRESETS["AntDirection"]
RUN = Run(Path("runs/ant_direction"), report_tasks=200)


def main(
    *,
    episodes: int = 2,
    horizon: int = 200,
    all_directions: bool = False,
    network: Network = PRESET.network,
    learning: Learning = PRESET.learning,
    run: Run = RUN,
) -> AdaptationReport:
    """Trains RL² on ants that shall run forward or backward, which only their rewards tell, and reports how they adapt.

    Args:
        episodes: episodes of a trial.
        horizon: steps of an episode.
        all_directions: whether an ant shall run in any direction, in place of forward or backward (as in VariBAD).
        network: actor and critic.
        learning: batches, and PPO on them.
        run: seeds, where the run begins, which processes play, and what it leaves.
    """
    torch.manual_seed(run.seed)
    torch.set_flush_denormal(True)

    def make_env(sampler: TaskSampler, rows: int) -> TransformedEnv:
        ants = AntDirection(batch_size=(rows,), horizon=horizon, seed=stream_seed(run.seed, ENVS))
        # Without "velocity", as the cheetah: the agent sees its speed in the observation, but not what is paid for.
        return TransformedEnv(ants, Compose(Trial(episodes=episodes), sampler, PreviousStep(["observation"])))

    tasks = directions() if all_directions else forward_or_backward
    env = make_env(TaskSampler(tasks, seed=stream_seed(run.seed, TRAIN_TASKS)), learning.trials)
    actor = GRUGaussianActor.from_env(env, **network.actor)
    critic = GRUValueHead.from_env(env, **network.critic)
    update = PPOUpdate(
        RL2PPOLoss(actor, critic, clip_epsilon=0.2, **learning.loss),
        TrialAdvantage(**learning.advantage, scale_rewards=True),
        **learning.update,
    )
    collector = run.collector(make_env, env, ActorCritic(actor, critic), update, **learning.frames(episodes * horizon))
    ants = Experiment(actor, make_env, tasks, run, held_out_tasks=64, rows=64)
    where = "all directions" if all_directions else "direction"
    title = f"RL² on Ant, {where}{told_of(network, Told(), run.weights)}"
    report = ants.report(ants.train(collector, update), title=title)
    return publish(report, run)


def forward_or_backward(batch_size: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Unit vectors along the x axis, ``[*batch_size, 2]``."""
    return torch.nn.functional.pad(signs()(batch_size, generator), (0, 1))


if __name__ == "__main__":
    command(main)
