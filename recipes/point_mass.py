"""RL² on DMControl's point mass with a hidden target, through TorchRL's own `DMControlEnv`."""

from pathlib import Path

import torch
from tensordict import TensorDictBase
from torchrl.data import Unbounded
from torchrl.envs import Compose, DMControlEnv, DoubleToFloat, SerialEnv, TransformedEnv

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
    TaskBelief,
    TaskSampler,
    Trial,
    TrialAdvantage,
)
from rl2_torchrl.envs import Resumable

PRESET = PRESETS["DMControl point mass"]
RUN = Run(Path("runs/point_mass"), report_tasks=128)
#: The target's radius (m): at DMControl's own of 1.5 cm a hidden one is hardly ever met. Up to twice as far it pays a little.
TARGET_SIZE = 0.1
#: Simulated seconds that an action lasts. The mass makes 10 cm a second at most: in DMControl's own 0.02 s an action moves it
#: by 2 mm, and what is tried at random cancels out before it has led anywhere.
CONTROL_SECONDS = 0.2
#: How far targets lie from the arena's middle (m).
RADIUS = 0.2


def main(
    *,
    episodes: int = 2,
    steps: int = 40,
    belief: float = 0.1,
    network: Network = PRESET.network,
    learning: Learning = PRESET.learning,
    run: Run = RUN,
) -> AdaptationReport:
    """Trains RL² to find a hidden target with a mass that it pushes about, and reports how much longer it stays there from then on.

    Args:
        episodes: episodes of a trial.
        steps: steps of an episode, each of which pays up to 1.
        belief: weight of a loss that the memory tells the target by (`TaskBelief`), which only training sees; 0 for none.
        network: actor and critic.
        learning: batches, and PPO on them.
        run: seeds, where the run begins, which processes play, and what it leaves.
    """
    torch.manual_seed(run.seed)

    def make_env(sampler: TaskSampler, rows: int) -> TransformedEnv:
        masses = SerialEnv(rows, lambda: HiddenTarget(steps))
        masses.set_seed(stream_seed(run.seed, ENVS))  # where episodes begin
        # DMControl counts in float64.
        trial = Compose(Trial(episodes=episodes), sampler, DoubleToFloat(), PreviousStep())
        return TransformedEnv(masses, trial)

    env = make_env(TaskSampler(targets, seed=stream_seed(run.seed, TRAIN_TASKS)), learning.trials)
    actor = GRUGaussianActor.from_env(env, **network.actor)
    critic = GRUValueHead.from_env(env, **network.critic)
    terms = [TaskBelief(network.units, 2, coefficient=belief, target=lambda place: place / RADIUS)] if belief else []
    update = PPOUpdate(
        RL2PPOLoss(actor, critic, clip_epsilon=0.2, **learning.loss, terms=terms),
        TrialAdvantage(**learning.advantage, scale_rewards=True),
        **learning.update,
    )
    collector = run.collector(make_env, env, ActorCritic(actor, critic), update, **learning.frames(episodes * steps))
    masses = Experiment(actor, make_env, targets, run, held_out_tasks=32, rows=32)
    result = masses.train(collector, update)
    title = f"RL² on a point mass with a hidden target{told_of(network, Told(belief=belief), run.weights)}"
    return publish(masses.report(result, title=title), run)


class HiddenTarget(Resumable, DMControlEnv):
    """DMControl's point mass, whose target lies where the task says (m), and not in what is observed."""

    def __init__(self, steps: int):
        seconds = CONTROL_SECONDS * (steps - 0.5)  # where it is rounded, it is not to one step more
        control = {"control_timestep": CONTROL_SECONDS}
        super().__init__("point_mass", "easy", time_limit=seconds, environment_kwargs=control)
        self.model.geom_size["target", 0] = TARGET_SIZE
        self.state_spec["task"] = Unbounded(2)

    @property
    def model(self):
        """MuJoCo's model, by names."""
        return self._env.physics.named.model

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs) -> TensorDictBase:
        if tensordict is not None and "task" in tensordict.keys():
            self.model.geom_pos["target"][:2] = tensordict["task"].numpy()
        return super()._reset(tensordict, **kwargs)


def targets(batch_size: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Places on a circle around the arena's middle (m), ``[*batch_size, 2]``."""
    angle = 2 * torch.pi * torch.rand(*batch_size, 1, generator=generator)
    return RADIUS * torch.cat([angle.cos(), angle.sin()], -1)


if __name__ == "__main__":
    command(main)
