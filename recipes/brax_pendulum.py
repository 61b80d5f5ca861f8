"""RL² on Brax's inverted pendulum that pushes the other way in half of its tasks, through TorchRL's own `BraxWrapper`."""

from pathlib import Path

import torch
from tensordict import TensorDictBase
from torchrl.data import Unbounded
from torchrl.envs import BraxWrapper, Compose, TransformedEnv

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

PRESET = PRESETS["Brax inverted pendulum"]
RUN = Run(Path("runs/brax_pendulum"), report_tasks=128)
#: Steps of a batch in each row, and of a chunk that gradients go through.
BATCH_STEPS = 50


def main(
    *,
    falls: int = 3,
    steps: int = 100,
    network: Network = PRESET.network,
    learning: Learning = PRESET.learning,
    run: Run = RUN,
) -> AdaptationReport:
    """Trains RL² to find out which way its pushes go before the pendulum has fallen too often; a step upright pays 1.

    Args:
        falls: falls that end a trial; an episode ends at each.
        steps: steps after which it ends at the latest.
        network: actor and critic.
        learning: batches, and PPO on them.
        run: seeds, where the run begins, which processes play, and what it leaves.
    """
    torch.manual_seed(run.seed)

    def make_env(sampler: TaskSampler, rows: int) -> TransformedEnv:
        pendulums = SignedPendulum(rows)
        pendulums.set_seed(run.seed)
        transforms = Compose(Trial(episodes=falls, steps=steps), sampler, PreviousStep(["observation"]))
        return TransformedEnv(pendulums, transforms)  # the simulator's state is an entry too, with the sign in it

    env = make_env(TaskSampler(signs, seed=stream_seed(run.seed, TRAIN_TASKS)), learning.trials)
    actor = GRUGaussianActor.from_env(env, **network.actor)
    critic = GRUValueHead.from_env(env, **network.critic)
    policy = ActorCritic(actor, critic)
    update = PPOUpdate(
        RL2PPOLoss(actor, critic, clip_epsilon=0.2, **learning.loss),
        TrialAdvantage(**learning.advantage, critic=policy, scale_rewards=True),
        bptt=BATCH_STEPS,
        **learning.update,
    )
    collector = run.collector(make_env, env, policy, update, **learning.frames(BATCH_STEPS))
    rows = max(2, learning.trials)  # rewards can only be shuffled among several
    pendulums = Experiment(actor, make_env, signs, run, held_out_tasks=learning.trials, rows=rows)
    result = pendulums.train(collector, update, eval_interval=100)  # JAX compiles for each env anew
    return publish(pendulums.report(result, title="RL² on a pendulum with an unknown sign"), run)


class SignedPendulum(BraxWrapper):
    """Brax's inverted pendulums, ``rows`` side by side; pushes are multiplied by the task ``[rows, 1]``, -1 or 1."""

    def __init__(self, rows: int):
        # TorchRL empties JAX's cache every 20 steps otherwise, for gradients, and all is compiled anew.
        super().__init__(signed_pendulum(), batch_size=[rows], device="cpu", cache_clear_frequency=False)
        self.state_spec["task"] = Unbounded((rows, 1))

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs) -> TensorDictBase:
        first = super()._reset(tensordict, **kwargs)
        if tensordict is not None and "task" in tensordict.keys():
            first["state", "info", "sign"] = tensordict["task"].clone()  # Brax keeps all that it knows in the state
        return first

    # For checkpoints: all but what resets are drawn from stands in the TensorDict.
    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self._key.tolist())

    def set_extra_state(self, state: torch.Tensor) -> None:
        self._key = self.jax.numpy.array(state.tolist(), "uint32")


def signed_pendulum():
    """One inverted pendulum of Brax, of which ``state.info["sign"]`` says which way pushes go."""
    try:
        import jax
        from brax import envs
    except ImportError as error:
        raise ImportError('Brax is an extra: pip install "rl2_torchrl[brax]".') from error

    class Signed(envs.Wrapper):
        def reset(self, rng):
            state = self.env.reset(rng)
            return state.replace(info={**state.info, "sign": jax.numpy.ones(1)})

        def step(self, state, action):
            return self.env.step(state, action * state.info["sign"])

    return Signed(envs.get_environment("inverted_pendulum"))


def signs(batch_size: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """-1 or 1, ``[*batch_size, 1]``."""
    return 2.0 * torch.randint(2, (*batch_size, 1), generator=generator) - 1.0


if __name__ == "__main__":
    command(main)
