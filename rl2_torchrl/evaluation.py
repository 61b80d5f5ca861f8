"""Adaptation curves: the return of every episode of held-out trials, and ablations of the agent's memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.envs import EnvBase, ExplorationType, set_exploration_type

from rl2_torchrl.modules.acting import State
from rl2_torchrl.modules.actor_critic import hidden_keys
from rl2_torchrl.rollout import Rollout, trial_steps
from rl2_torchrl.trial import EPISODE_INDEX, TRIAL_STEP

__all__ = ["AdaptationCurve", "adaptation_curve", "with_shuffled_rewards", "with_zeroed_memory"]


@dataclass(frozen=True)
class AdaptationCurve:
    """Returns of whole trials, episode by episode.

    Args:
        returns: return of each episode, ``[num_trials, num_episodes]``; NaN where a trial had no such episode. A trial that
            is bounded by steps can end within an episode, which then counts with the rewards it had so far.

    Raises:
        ValueError: ``returns`` is not a floating-point table of at least one trial and one episode, or holds infinities.

    Examples:
        >>> curve = AdaptationCurve(torch.tensor([[0.0, 1.0], [1.0, 2.0]]))
        >>> curve.per_episode, curve.mean
        (tensor([0.5000, 1.5000]), 2.0)
    """

    returns: torch.Tensor

    def __post_init__(self):
        returns = self.returns
        if returns.ndim != 2 or 0 in returns.shape or not returns.is_floating_point():
            raise ValueError(
                f"returns has shape {tuple(returns.shape)} and dtype {returns.dtype}; it must be a table of floats, "
                "[num_trials, num_episodes], with at least one of each. For a single trial: returns.unsqueeze(0)."
            )
        if returns.isinf().any():
            raise ValueError(
                "returns holds infinities, whose mean says nothing: mend the env's rewards. NaN: not played."
            )

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
        count = (~self.returns.isnan()).sum(0)
        variance = (self.returns - self.per_episode).square().nansum(0) / (count - 1)
        return (variance / count).sqrt()


@torch.no_grad()
def adaptation_curve(
    env: EnvBase,
    policy: TensorDictModuleBase,
    num_trials: int,
    *,
    deterministic: bool = False,
    ablation: Callable[[State], State] | None = None,
    on_step: Callable[[State], None] | None = None,
    max_trial_steps: int = 1_000_000,
) -> AdaptationCurve:
    """Plays ``num_trials`` whole trials and returns the return of every episode separately.

    Row i of the result is the i-th trial that began: with ``TaskSampler.fixed(tasks)`` and ``num_trials=len(tasks)`` it is
    the trial on task i. Give the env held-out tasks: fixed ones, or a sampler with a seed that training does not use.

    Trials are played by the `Rollout` that training plays by: the memory begins anew with every trial.

    Args:
        env: trial env: a `TransformedEnv` with `Trial`.
        policy: recurrent policy, e.g. an actor or `ActorCritic`.
        num_trials: number of trials, hence of tasks.
        deterministic: act with the distribution's mode or mean. Default False: RL² explores by sampling.
        ablation: function applied to the named tensors ``[num_rows, ...]`` of a step before the policy reads them:
            `with_zeroed_memory(policy)` or `with_shuffled_rewards()`.
        on_step: called with the named tensors of every step, its results under ``("next", ...)``, to record what returns do not
            tell.
        max_trial_steps: raise when a trial does not end within so many steps.

    Returns:
        The adaptation curve.

    Raises:
        ValueError: ``num_trials`` below 1, or the env has no `Trial`.
        RuntimeError: a trial does not end.
        FloatingPointError: a reward is not finite.

    Examples:
        >>> from torchrl.envs import Compose, TransformedEnv
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
    if isinstance(num_trials, bool) or not isinstance(num_trials, Integral) or num_trials < 1:
        raise ValueError(f"num_trials={num_trials!r}: an evaluation over nothing would report NaN. Give at least 1.")
    if EPISODE_INDEX not in env.observation_spec.keys():
        raise ValueError("the env has no Trial, so there are no trials to evaluate: Compose(Trial(...), ...).")
    # No step is taken beyond the last trial's end.
    rollout = Rollout(env, policy, trial_steps(env) or 1, _KEPT, ablation=ablation, on_step=on_step)
    kind = ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM
    returns = _Returns(int(num_trials))
    with set_exploration_type(kind):
        while returns.open:
            batch = rollout()
            returns.add(*(batch[key].reshape(-1, batch.shape[-1]).cpu() for key in _KEPT))
            _require_end(batch["next", TRIAL_STEP][~batch["next", "done"]], max_trial_steps)
    return AdaptationCurve(returns.table())


_KEPT = (EPISODE_INDEX, "is_init", ("next", "reward"), ("next", "done"), ("next", TRIAL_STEP))


class _Returns:
    """Sums the rewards of the first ``num_trials`` trials by episode; those of further trials are left out."""

    def __init__(self, num_trials: int):
        # In float64: returns of long episodes lose digits in float32.
        self._sums = torch.zeros(num_trials, 0, dtype=torch.float64)
        self._begun = torch.zeros(num_trials, 0, dtype=torch.bool)
        self._unfinished = torch.ones(num_trials, dtype=torch.bool)
        self._number, self._trial = 0, None

    @property
    def open(self) -> bool:
        """Whether a trial has not ended yet."""
        return bool(self._unfinished.any())

    def add(self, episode, is_init, reward, done, _) -> None:
        """Adds the steps of a batch, ``[num_rows, T]`` each."""
        trial = self._trials(is_init)
        counted = trial < len(self._unfinished)
        _require_finite(torch.where(counted, reward, 0.0), trial, episode)
        missing = max(0, (int(episode[counted].max()) if counted.any() else 0) + 1 - self._sums.shape[1])
        self._sums = nn.functional.pad(self._sums, (0, missing))
        self._begun = nn.functional.pad(self._begun, (0, missing))
        index = (trial[counted], episode[counted])
        self._sums.index_put_(index, reward[counted].double(), accumulate=True)
        self._begun[index] = True
        self._unfinished[trial[counted & done]] = False

    def _trials(self, is_init: torch.Tensor) -> torch.Tensor:
        """Which trial each step ``[num_rows, T]`` is of, counted in the order in which trials begin."""
        number = self._number - 1 + is_init.t().flatten().cumsum(0).view(is_init.shape[1], -1).t()
        self._number += int(is_init.sum())
        trial = torch.where(is_init, number, -1)
        if self._trial is not None:
            trial[:, 0] = torch.where(is_init[:, 0], trial[:, 0], self._trial)
        trial = trial.cummax(1).values
        self._trial = trial[:, -1]
        return trial

    def table(self) -> torch.Tensor:
        """Returns ``[num_trials, num_episodes]``, NaN where a trial had no such episode."""
        played = self._begun.any(0)
        return torch.where(self._begun, self._sums, torch.nan)[:, played]


def _require_finite(reward: torch.Tensor, trial: torch.Tensor, episode: torch.Tensor) -> None:
    if not reward.isfinite().all():
        row, step = (~reward.isfinite()).nonzero()[0].tolist()
        raise FloatingPointError(
            f"the reward is {reward[row, step].item()} in row {row}, episode {int(episode[row, step])} of trial "
            f"{int(trial[row, step])}: its return would be NaN. Mend the env before evaluating on it."
        )


def _require_end(trial_steps: torch.Tensor, max_trial_steps: int) -> None:
    if (trial_steps >= max_trial_steps).any():
        raise RuntimeError(
            f"a trial did not end within max_trial_steps={max_trial_steps}: does an episode of this env ever end? Bound "
            "the trial, Trial(episodes=..., steps=...), or raise max_trial_steps."
        )


def with_zeroed_memory(policy: TensorDictModuleBase) -> Callable[[State], State]:
    """An ablation that zeroes the hidden state at every step: what is left is what the agent does without memory.

    All hidden states of ``policy``, ``[num_rows, num_layers, hidden_size]`` each, are zeroed before it reads them.

    Raises:
        ValueError: the policy has no memory.

    Examples:
        >>> from rl2_torchrl.modules import GRUValueHead
        >>> zero = with_zeroed_memory(GRUValueHead(5, hidden_size=8))
        >>> float(zero({"critic_hidden": torch.ones(4, 1, 8)})["critic_hidden"].sum())
        0.0
    """
    keys: list[NestedKey] = hidden_keys(policy)
    if not keys:
        raise ValueError(f"this policy hands no hidden state on, there is nothing to zero; it reads {policy.in_keys}.")

    def zero(state: State) -> State:
        return {**state, **{key: torch.zeros_like(state[key]) for key in keys}}

    return zero


def with_shuffled_rewards(
    generator: torch.Generator | None = None, *, in_key: NestedKey = "trans"
) -> Callable[[State], State]:
    """An ablation that permutes the rewards of the transition input among the rows of the batch.

    Each row then sees another task's rewards, of the same distribution: an agent that still improves does not learn from
    its rewards. The reward is the last but one entry of ``in_key`` ``[num_rows, n]``, as `PreviousStep` writes it.

    Args:
        generator: generator of the permutations. None takes PyTorch's own.
        in_key: transition input. Default ``"trans"``.

    Examples:
        >>> trans = torch.tensor([[0.0, 7.0, 1.0], [0.0, 8.0, 1.0]])  # observation, reward, done
        >>> shuffled = with_shuffled_rewards()({"trans": trans})["trans"]
        >>> sorted(shuffled[:, 1].tolist()), shuffled[:, 2].tolist()
        ([7.0, 8.0], [1.0, 1.0])
    """

    def shuffle(state: State) -> State:
        if in_key not in state:
            raise KeyError(
                f"no {in_key!r} to shuffle rewards in: name PreviousStep's out_key, with_shuffled_rewards(in_key=...)."
            )
        trans = state[in_key].clone()
        if len(trans) < 2:
            raise ValueError(
                "rewards can only be shuffled among several rows: use an env with a batch size of 2 or more."
            )
        order = torch.randperm(len(trans), generator=generator, device=generator.device if generator else None)
        trans[:, -2] = trans[order.to(trans.device), -2]
        return {**state, in_key: trans}

    return shuffle
