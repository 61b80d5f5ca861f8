"""Bandits as batched TorchRL envs: one pull is one episode, the task is the arms' means or the hidden target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Categorical, Composite, Unbounded

from rl2_torchrl.envs.lockstep import LockstepEnv
from rl2_torchrl.tasks import TaskDistribution

__all__ = ["BernoulliBandit", "QuadraticBandit", "uniform_means", "uniform_targets"]


class _Bandit(LockstepEnv):
    """One-step episodes without observations. The state is the task alone, and it is carried in the TensorDict."""

    batch_locked = True
    episode_steps = 1

    def __init__(
        self,
        task_size: int,
        batch_size: Sequence[int],
        seed: int | None,
        device: torch.device | str | None,
    ):
        batch_size = torch.Size(batch_size)
        if 0 in batch_size:
            raise ValueError(f"batch_size {tuple(batch_size)} holds no env: every dimension must be at least 1.")
        super().__init__(device=device or "cpu", batch_size=batch_size)
        self.generator = torch.Generator(self.device)
        self._set_seed(seed)
        self.state_spec = Composite(
            task=Unbounded((*batch_size, task_size), device=self.device), shape=batch_size, device=self.device
        )
        self.observation_spec = Composite(shape=batch_size, device=self.device)
        self.reward_spec = Unbounded((*batch_size, 1), device=self.device)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs) -> TensorDictBase:
        if tensordict is None or "task" not in tensordict.keys():
            raise KeyError(
                f"{type(self).__name__}.reset() needs a 'task': which bandit shall be played? Add a TaskSampler "
                "(TransformedEnv(env, Compose(Trial(...), TaskSampler(...)))) or pass TensorDict({'task': ...})."
            )
        return TensorDict({}, batch_size=self.batch_size, device=self.device)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        reward, _ = self.transition(tensordict["task"], None, tensordict["action"])
        done = torch.ones_like(reward, dtype=torch.bool)
        return TensorDict(
            {"reward": reward, "done": done, "terminated": done.clone()},
            batch_size=self.batch_size,
            device=self.device,
        )

    def first(self, task: torch.Tensor) -> None:
        """There is nothing to observe."""

    def _set_seed(self, seed: int | None) -> None:
        # The generator is the env's own: the draws of tasks, policy and env must not depend on one another.
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def get_extra_state(self) -> torch.Tensor:
        """State of the generator, so that a checkpoint's rewards go on as they would have."""
        return self.generator.get_state()

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Restores what `get_extra_state` returned."""
        self.generator.set_state(state)


class BernoulliBandit(_Bandit):
    """Bernoulli bandit with ``num_arms`` arms, a whole batch at once (Duan et al. 2016, section 3.1).

    The task holds the arms' success probabilities, shape ``[*B, num_arms]``; the action is the index of the pulled arm,
    ``[*B]`` int64; the reward is 0 or 1, ``[*B, 1]``. There is no observation, and each pull is an episode of its own.

    Args:
        num_arms: number of arms, at least 1.
        batch_size: batch size ``B`` of the env.
        seed: seed of the env's own generator; None takes fresh entropy.
        device: device of all tensors. Defaults to the CPU.

    Raises:
        ValueError: ``num_arms`` below 1, or an empty ``batch_size``.
        KeyError: at a reset without a task.

    Examples:
        >>> from tensordict import TensorDict
        >>> env = BernoulliBandit(num_arms=2, batch_size=(3,), seed=0)
        >>> td = env.reset(TensorDict({"task": torch.tensor([[0.0, 1.0]]).expand(3, 2)}, [3]))
        >>> td["task"] = torch.tensor([[0.0, 1.0]]).expand(3, 2)
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
        if num_arms < 1:
            raise ValueError(f"num_arms={num_arms}: a bandit has at least one arm.")
        super().__init__(num_arms, batch_size, seed, device)
        self.num_arms = num_arms
        self.action_spec = Categorical(num_arms, shape=self.batch_size, device=self.device)

    def transition(self, task: torch.Tensor, observation: None, action: torch.Tensor) -> tuple[torch.Tensor, None]:
        """A draw of the pulled arm's reward."""
        return torch.bernoulli(task.gather(-1, action.unsqueeze(-1)), generator=self.generator), None


class QuadraticBandit(_Bandit):
    """Continuous-action bandit: hit a hidden target; the reward is ``-|action - target|² + noise``.

    The task is the target, shape ``[*B, dim]``; action ``[*B, dim]``, unbounded; reward ``[*B, 1]``. With a known
    target the best mean return is 0 a pull.

    Args:
        dim: dimensions of target and action.
        noise: standard deviation of the reward's normal noise.
        batch_size: batch size ``B`` of the env.
        seed: seed of the env's own generator; None takes fresh entropy.
        device: device of all tensors. Defaults to the CPU.

    Raises:
        ValueError: ``dim`` below 1, negative ``noise``, or an empty ``batch_size``.
        KeyError: at a reset without a task.

    Examples:
        >>> from tensordict import TensorDict
        >>> env = QuadraticBandit(dim=2, noise=0.0)
        >>> td = TensorDict({"task": torch.tensor([1.0, 0.0]), "action": torch.tensor([0.0, 2.0])})
        >>> env.step(td)["next", "reward"]
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
        if dim < 1 or noise < 0:
            raise ValueError(f"QuadraticBandit(dim={dim}, noise={noise}): dim must be at least 1, noise at least 0.")
        super().__init__(dim, batch_size, seed, device)
        self.noise = noise
        self.action_spec = Unbounded((*self.batch_size, dim), device=self.device)

    def transition(self, task: torch.Tensor, observation: None, action: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The squared distance to the target, with noise, as a cost."""
        cost = (action - task).square().sum(-1, keepdim=True)
        return self.noise * torch.randn(cost.shape, generator=self.generator, device=self.device) - cost, None


def uniform_means(num_arms: int) -> TaskDistribution:
    """Arms' means drawn from U[0, 1], the bandits of Duan et al. 2016 (section 3.1).

    Examples:
        >>> uniform_means(5)(torch.Size([3]), torch.Generator()).shape
        torch.Size([3, 5])
    """
    return lambda batch_size, generator: torch.rand(*batch_size, num_arms, generator=generator)


def uniform_targets(dim: int, low: float = -1.0, high: float = 1.0) -> TaskDistribution:
    """Targets drawn from U[low, high] in every dimension, for `QuadraticBandit`.

    Examples:
        >>> uniform_targets(2)(torch.Size([3]), torch.Generator()).shape
        torch.Size([3, 2])
    """
    return lambda batch_size, generator: low + (high - low) * torch.rand(*batch_size, dim, generator=generator)
