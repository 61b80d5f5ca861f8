"""Adaptation curves: the return of every episode of held-out trials, and ablations of the agent's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import Compose, EnvBase, ExplorationType, InitTracker, TransformedEnv, set_exploration_type
from torchrl.modules import set_recurrent_mode
from torchrl.modules.utils import get_primers_from_module

from rl2_torchrl.modules.actor_critic import hidden_keys
from rl2_torchrl.trial import EPISODE_INDEX

__all__ = ["AdaptationCurve", "adaptation_curve", "with_shuffled_rewards", "with_zeroed_memory"]

Policy = Callable[[TensorDictBase], TensorDictBase]


@dataclass(frozen=True)
class AdaptationCurve:
    """Returns of whole trials, episode by episode.

    Args:
        returns: return of each episode, ``[num_trials, num_episodes]``; NaN for episodes that a trial did not finish.
    """

    returns: torch.Tensor

    @property
    def num_tasks(self) -> int:
        """Number of trials, each on a task of its own."""
        return len(self.returns)

    @property
    def trial_returns(self) -> torch.Tensor:
        """Return of each whole trial, the sum over its episodes, ``[num_trials]``."""
        return self.returns.nansum(-1)

    @property
    def mean(self) -> float:
        """Mean return of a trial."""
        return self.trial_returns.mean().item()

    @property
    def se(self) -> float:
        """Standard error of `mean` over tasks; NaN for a single task."""
        return (self.trial_returns.std() / self.num_tasks**0.5).item()

    @property
    def per_episode(self) -> torch.Tensor:
        """Mean return of each episode, ``[num_episodes]``: the adaptation curve."""
        return self.returns.nanmean(0)

    @property
    def per_episode_se(self) -> torch.Tensor:
        """Standard error of `per_episode`, ``[num_episodes]``."""
        count = self.returns.isfinite().sum(0)
        variance = (self.returns - self.per_episode).square().nansum(0) / (count - 1)
        return (variance / count).sqrt()


@torch.no_grad()
def adaptation_curve(
    env: EnvBase,
    policy: TensorDictModuleBase,
    num_trials: int,
    *,
    deterministic: bool = False,
    ablation: Callable[[TensorDictBase], TensorDictBase] | None = None,
    max_trial_steps: int = 1_000_000,
) -> AdaptationCurve:
    """Plays ``num_trials`` whole trials and returns the return of every episode separately (SPEC 6).

    Every row of the env plays one trial a round. Give the env held-out tasks: ``TaskSampler.fixed(tasks)``, or a
    sampler with a seed that training does not use.

    Args:
        env: trial env: a `TransformedEnv` with `Trial`. ``InitTracker`` and the policy's primers are added when missing.
        policy: recurrent policy, e.g. an actor or `ActorCritic`.
        num_trials: number of trials, hence of tasks.
        deterministic: act with the distribution's mode or mean. Default False: RL² explores by sampling.
        ablation: function applied to the TensorDict before the policy sees it: `with_zeroed_memory(policy)` or
            `with_shuffled_rewards()`.
        max_trial_steps: raise when a trial does not end within so many steps.

    Returns:
        The adaptation curve.

    Raises:
        ValueError: ``num_trials`` below 1, or the env has no `Trial`.
        RuntimeError: a trial does not end.

    Examples:
        >>> from rl2_torchrl import PreviousStep, TaskSampler, Trial
        >>> from rl2_torchrl.envs import BernoulliBandit, uniform_means
        >>> from rl2_torchrl.modules import GRUCategoricalActor
        >>> env = TransformedEnv(
        ...     BernoulliBandit(3, batch_size=(50,)),
        ...     Compose(Trial(episodes=10), TaskSampler(uniform_means(3), seed=1), PreviousStep()),
        ... )
        >>> adaptation_curve(env, GRUCategoricalActor.from_env(env), num_trials=100).returns.shape
        torch.Size([100, 10])
    """
    if num_trials < 1:
        raise ValueError(f"num_trials={num_trials}: an evaluation over nothing would report NaN.")
    if EPISODE_INDEX not in env.observation_spec.keys():
        raise ValueError("the env has no Trial, so there are no trials to evaluate: Compose(Trial(...), ...).")
    env = _with_memory(env, policy)
    kind = ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM
    rounds, count = [], 0
    with set_exploration_type(kind), set_recurrent_mode(False):
        while count < num_trials:
            rounds.append(_play_round(env, policy, ablation, max_trial_steps))
            count += len(rounds[-1])
    return AdaptationCurve(_stack_padded(rounds)[:num_trials])


def _play_round(env, policy, ablation, max_trial_steps: int) -> torch.Tensor:
    """One trial in every row: the episodes' returns ``[num_rows, num_episodes]``, NaN where an episode never began."""
    tensordict = env.reset()
    playing = torch.ones(env.batch_size.numel(), dtype=torch.bool, device=env.device)
    episodes, rewards = [], []
    for _ in range(max_trial_steps):
        episode = tensordict[EPISODE_INDEX].reshape(-1)
        tensordict = policy(tensordict if ablation is None else ablation(tensordict))
        stepped, tensordict = env.step_and_maybe_reset(tensordict)
        # A row that has finished its trial goes on with another, which is not counted.
        episodes.append(torch.where(playing, episode, -1))
        rewards.append(stepped["next", "reward"].reshape(-1))
        playing = playing & ~stepped["next", "done"].reshape(-1)
        if not playing.any():
            return _sum_by_episode(torch.stack(episodes, 1), torch.stack(rewards, 1))
    raise RuntimeError(
        f"a trial did not end within max_trial_steps={max_trial_steps}: does an episode of this env ever end?"
    )


def _sum_by_episode(episodes: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """Sums ``rewards`` ``[num_rows, T]`` by episode index; index -1 is left out."""
    num_episodes = int(episodes.max()) + 1
    # Column 0 collects what is left out. Sums in float64: returns of long episodes lose digits in float32.
    sums = torch.zeros(len(rewards), num_episodes + 1, dtype=torch.float64, device=rewards.device)
    counts = torch.zeros_like(sums)
    sums.scatter_add_(1, episodes + 1, rewards.double())
    counts.scatter_add_(1, episodes + 1, torch.ones_like(rewards, dtype=torch.float64))
    return torch.where(counts > 0, sums, torch.nan)[:, 1:].cpu()


def _stack_padded(rounds: Sequence[torch.Tensor]) -> torch.Tensor:
    width = max(r.shape[1] for r in rounds)
    return torch.cat([torch.nn.functional.pad(r, (0, width - r.shape[1]), value=torch.nan) for r in rounds])


def _with_memory(env: EnvBase, policy: TensorDictModuleBase) -> EnvBase:
    """``env`` with `InitTracker` and the policy's primers, without which the memory would silently be lost."""
    missing = []
    if "is_init" not in env.observation_spec.keys():
        missing.append(InitTracker())
    absent = [key for key in hidden_keys(policy) if key not in env.full_observation_spec.keys(True, True)]
    if absent:
        missing.append(get_primers_from_module(policy, warn=False))
    return TransformedEnv(env, Compose(*missing), auto_unwrap=False) if missing else env


def with_zeroed_memory(policy: TensorDictModuleBase) -> Callable[[TensorDictBase], TensorDictBase]:
    """An ablation that zeroes the hidden state at every step: what is left is what the agent does without memory.

    Raises:
        ValueError: the policy has no memory.
    """
    keys: list[NestedKey] = hidden_keys(policy)
    if not keys:
        raise ValueError(f"this policy hands no hidden state on, there is nothing to zero; it reads {policy.in_keys}.")

    def zero(tensordict: TensorDictBase) -> TensorDictBase:
        for key in keys:
            tensordict.set(key, torch.zeros_like(tensordict.get(key)))
        return tensordict

    return zero


def with_shuffled_rewards(
    generator: torch.Generator | None = None, *, in_key: NestedKey = "trans"
) -> Callable[[TensorDictBase], TensorDictBase]:
    """An ablation that permutes the rewards of the transition input among the rows of the batch.

    Each row then sees another task's rewards, of the same distribution: an agent that still improves does not learn from
    its rewards. The reward is the last but one entry of ``in_key``, as `PreviousStep` writes it.
    """

    def shuffle(tensordict: TensorDictBase) -> TensorDictBase:
        trans = tensordict.get(in_key)
        flat = trans.reshape(-1, trans.shape[-1]).clone()
        if len(flat) < 2:
            raise ValueError("rewards can only be shuffled among several rows: use a batched env.")
        order = torch.randperm(len(flat), generator=generator, device=generator.device if generator else None)
        flat[:, -2] = flat[order.to(flat.device), -2]
        return tensordict.set(in_key, flat.reshape(trans.shape))

    return shuffle
