"""RL² on POPGym (Morad et al. 2023): games in which what was seen must be remembered; an episode is a trial."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torchrl.envs import Compose, TransformedEnv

from recipes.command import command
from recipes.experiment import Experiment, publish
from recipes.presets import PRESETS
from recipes.run import Run
from recipes.settings import Learning, Network
from rl2_torchrl import (
    ActorCritic,
    AdaptationReport,
    MemoryValueHead,
    PPOUpdate,
    PreviousStep,
    RecurrentActor,
    RL2PPOLoss,
    TaskSampler,
    Trial,
    TrialAdvantage,
)
from rl2_torchrl.envs import GymVectorEnv

PRESET = PRESETS["POPGym, Easy"]
RUN = Run(Path("runs/pop_gym"), report_tasks=512)
#: Steps of a batch in each row, and of a chunk that gradients go through: an Easy game lasts up to 200.
BATCH_STEPS = 128
#: Steps of a training epoch in POPGym's own training: four workers of 16 envs, 1,024 steps each.
EPOCH_STEPS = 65_536


def main(
    *,
    env_id: str = "popgym-RepeatPreviousEasy-v0",
    network: Network = PRESET.network,
    learning: Learning = PRESET.learning,
    run: Run = RUN,
) -> AdaptationReport:
    """Trains a GRU to play a game of memory, and reports what its episodes pay, during the training and held out.

    Each episode is a game of its own, dealt anew, and a trial; it pays from -1 to 1.

    Args:
        env_id: one of POPGym's envs with one or several choices, or real actions.
        network: actor and critic, which share the core.
        learning: batches, and PPO on them.
        run: seeds, where the run begins, which processes play, and what it leaves.
    """
    torch.manual_seed(run.seed)

    def make_env(_: TaskSampler | None, rows: int) -> TransformedEnv:
        register_envs()  # here, since workers are programs of their own
        return TransformedEnv(GymVectorEnv(env_id, rows), Compose(Trial(episodes=1), PreviousStep()))

    env = make_env(None, learning.trials)
    actor = RecurrentActor.from_env(env, **network.actor)  # actions as the env's spec says
    critic = MemoryValueHead.from_env(env, actor, **network.value_head(detach=False))
    policy = ActorCritic(actor, critic)
    update = PPOUpdate(
        RL2PPOLoss(actor, critic, clip_epsilon=0.2, **learning.loss),
        TrialAdvantage(
            **learning.advantage, critic=policy
        ),  # batches cut episodes: the critic says what the rest is worth
        bptt=BATCH_STEPS,
        **learning.update,
    )
    collector = run.collector(make_env, env, policy, update, **learning.frames(BATCH_STEPS))
    games = Experiment(actor, make_env, no_tasks, run, held_out_tasks=128, rows=64)
    result = games.train(collector, update, eval_interval=100)
    report = games.report(result, title=f"RL² on {env_id}")
    return publish(EpochsReport(**vars(report), epochs=epoch_returns(result.history)), run)


@dataclass
class EpochsReport(AdaptationReport):
    """An `AdaptationReport` with the mean return of the episodes of each training epoch: POPGym reports the best one (MMER)."""

    epochs: list[float] = field(default_factory=list)

    def entries(self) -> dict[str, Any]:
        """The epochs' returns, the best of them, and their mean over the training."""
        return {"epoch_returns": self.epochs, **self._of_training("mmer", "mean_over_training")}

    def summary(self) -> dict[str, float | str]:
        """The figures of the training before those of held-out episodes."""
        of_training = self._of_training("best epoch (MMER)", "mean over training")
        return {**{name: f"{value:.3f}" for name, value in of_training.items()}, **super().summary()}

    def _of_training(self, best: str, over_all: str) -> dict[str, float]:
        """Nothing where an agent was only played, or in whose training no episode ended."""
        known = [epoch for epoch in self.epochs if not math.isnan(epoch)]
        return {best: max(known), over_all: mean(known)} if known else {}


def epoch_returns(history: list[dict[str, float]]) -> list[float]:
    """Mean episodic return of each epoch of `EPOCH_STEPS` env steps, of what batches have paid; no batch is in two epochs.

    Single batches would not do: the best of many small ones is good by luck. Nor would the part of an epoch that a training ends
    with; where there is nothing else, it is returned.
    """
    epochs: dict[int, list[float]] = {}
    for row in history:
        epochs.setdefault(int((row["env_steps"] - 1) // EPOCH_STEPS), []).append(row["train/trial_return"])
    if len(epochs) > 1 and int((history[-1]["env_steps"] + history[0]["env_steps"] - 1) // EPOCH_STEPS) in epochs:
        epochs.popitem()  # one more batch would belong to it
    return [mean(returns) for returns in epochs.values()]


def mean(values: list[float]) -> float:
    """Of all numbers; NaN, as of a batch in which no episode ended, does not count."""
    return torch.tensor(values, dtype=torch.float64).nanmean().item()


def register_envs() -> None:
    """Makes POPGym's ids known to Gymnasium."""
    try:
        import popgym  # noqa: F401
    except ImportError as error:
        raise ImportError('POPGym is an extra: pip install "rl2_torchrl[popgym]".') from error


def no_tasks(batch_size: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Stand-ins for tasks, ``[*batch_size, 1]``: every episode is a game of its own."""
    return torch.zeros(*batch_size, 1)


if __name__ == "__main__":
    command(main)
