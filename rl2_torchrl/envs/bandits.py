"""Bandits as batched TorchRL envs: one pull is one episode, the task is the arms' means or the hidden target."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torchrl.data import Categorical, TensorSpec, Unbounded

from rl2_torchrl.arguments import whole
from rl2_torchrl.envs.tensor_env import TensorEnv
from rl2_torchrl.tasks import TaskDistribution

__all__ = ["BernoulliBandit", "QuadraticBandit", "uniform_means", "uniform_targets"]


class _Bandit(TensorEnv):
    """One-step episodes without observations. The state is the task alone."""

    time_limit_terminates = True

    def __init__(self, task_size: int, action_spec: TensorSpec, **kwargs):
        super().__init__(
            task_spec=Unbounded(task_size), action_spec=action_spec, max_episode_steps=1, fixed_length=True, **kwargs
        )

    def begin(self, task: Tensor, rows: Tensor) -> tuple[Tensor, None]:
        """There is nothing to observe."""
        return task, None


class BernoulliBandit(_Bandit):
    """Bernoulli bandit with ``num_arms`` arms, a whole batch at once (Duan et al. 2016, section 3.1).

    The task holds the arms' success probabilities, shape ``[*B, num_arms]``; the action is the index of the pulled arm,
    ``[*B]`` int64; the reward is 0 or 1, ``[*B, 1]``. There is no observation, and each pull is an episode of its own.

    Args:
        num_arms: number of arms, at least 1.
        batch_size: batch size ``B`` of the env.
        seed: seed of the env's own generator; None draws one from PyTorch's default generator.
        device: device of all tensors. Defaults to the CPU.

    Raises:
        ValueError: ``num_arms`` below 1, or an empty ``batch_size``.

    Examples:
        >>> from tensordict import TensorDict
        >>> env = BernoulliBandit(num_arms=2, batch_size=(3,), seed=0)
        >>> td = env.reset(TensorDict({"task": torch.tensor([[0.0, 1.0]]).expand(3, 2)}, [3]))
        >>> env.step(td.set("action", torch.tensor([0, 1, 1])))["next", "reward"].squeeze(-1)
        tensor([0., 1., 1.])
    """

    def __init__(
        self,
        num_arms: int,
        *,
        batch_size: Sequence[int] = (),
        seed: int | None = None,
        device: torch.device | str | None = None,
    ):
        self.num_arms = whole("num_arms", num_arms)
        super().__init__(self.num_arms, Categorical(self.num_arms), batch_size=batch_size, seed=seed, device=device)

    def advance(self, state: Tensor, action: Tensor) -> tuple[Tensor, None, Tensor, None, None]:
        """A draw of the pulled arm's reward."""
        means = state.gather(-1, action.unsqueeze(-1))
        try:
            reward = torch.bernoulli(means, generator=self.generator)
        except RuntimeError as error:
            rows = (~((means >= 0) & (means <= 1))).nonzero()[:1, :-1]
            if len(rows):
                row = rows[0].tolist()
                raise ValueError(
                    f"the task of row {row} is {state[tuple(row)].tolist()}: an arm's mean is a probability, between 0 and 1."
                ) from error
            raise
        return state, None, reward, None, None


class QuadraticBandit(_Bandit):
    """Continuous-action bandit: hit a hidden target; the reward is ``-|action - target|² + noise``.

    The task is the target, shape ``[*B, dim]``; action ``[*B, dim]``, unbounded; reward ``[*B, 1]``. With a known
    target the best mean return is 0 a pull.

    Args:
        dim: dimensions of target and action.
        noise: standard deviation of the reward's normal noise.
        batch_size: batch size ``B`` of the env.
        seed: seed of the env's own generator; None draws one from PyTorch's default generator.
        device: device of all tensors. Defaults to the CPU.

    Raises:
        ValueError: ``dim`` below 1, negative ``noise``, or an empty ``batch_size``.

    Examples:
        >>> from tensordict import TensorDict
        >>> env = QuadraticBandit(dim=2, noise=0.0)
        >>> td = env.reset(TensorDict({"task": torch.tensor([1.0, 0.0])}))
        >>> env.step(td.set("action", torch.tensor([0.0, 2.0])))["next", "reward"]
        tensor([-5.])
    """

    def __init__(
        self,
        dim: int = 1,
        *,
        noise: float = 0.1,
        batch_size: Sequence[int] = (),
        seed: int | None = None,
        device: torch.device | str | None = None,
    ):
        dim = whole("dim", dim)
        if not noise >= 0:
            raise ValueError(f"noise={noise} is a standard deviation: it must be at least 0.")
        super().__init__(dim, Unbounded(dim), batch_size=batch_size, seed=seed, device=device)
        self.noise = noise

    def advance(self, state: Tensor, action: Tensor) -> tuple[Tensor, None, Tensor, None, None]:
        """The squared distance to the target, with noise, as a cost."""
        cost = (action - state).square().sum(-1, keepdim=True)
        reward = self.noise * torch.randn(cost.shape, generator=self.generator, device=self.device) - cost
        return state, None, reward, None, None


def uniform_means(num_arms: int) -> TaskDistribution:
    """Arms' means drawn from U[0, 1], the bandits of Duan et al. 2016 (section 3.1).

    Examples:
        >>> uniform_means(5)(torch.Size([3]), torch.Generator()).shape
        torch.Size([3, 5])
    """
    return partial(_uniform, size=whole("num_arms", num_arms), low=0.0, high=1.0)


def uniform_targets(dim: int, low: float = -1.0, high: float = 1.0) -> TaskDistribution:
    """Targets drawn from U[low, high] in every dimension, for `QuadraticBandit`.

    Examples:
        >>> uniform_targets(2)(torch.Size([3]), torch.Generator()).shape
        torch.Size([3, 2])
    """
    return partial(_uniform, size=whole("dim", dim), low=low, high=high)


def _uniform(batch_size: torch.Size, generator: torch.Generator, *, size: int, low: float, high: float) -> Tensor:
    return low + (high - low) * torch.rand(*batch_size, size, generator=generator)
