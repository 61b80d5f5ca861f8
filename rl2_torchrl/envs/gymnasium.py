"""`GymTaskEnv`: a Gymnasium env whose task is a tensor that a function applies to it at reset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.data import Composite, TensorSpec
from torchrl.envs import GymEnv

__all__ = ["GymTaskEnv"]


class GymTaskEnv(GymEnv):
    """A Gymnasium env with a task: at each reset ``set_task(env, task)`` changes the env, as `TaskSampler` asks.

    Args:
        env_name: Gymnasium id, as for `torchrl.envs.GymEnv`.
        set_task: ``(gymnasium_env, task) -> None``, called with the *unwrapped* env and the task, a tensor without
            batch dimensions, before every reset that brings a task.
        task_spec: TorchRL spec of one task.
        **kwargs: passed on to `GymEnv`.

    Examples:
        >>> from torchrl.data import Unbounded
        >>> from torchrl.envs import Compose, TransformedEnv
        >>> from rl2_torchrl import TaskSampler, Trial
        >>> def set_gravity(env, task):
        ...     env.g = float(task)
        >>> env = TransformedEnv(
        ...     GymTaskEnv("Pendulum-v1", set_task=set_gravity, task_spec=Unbounded((1,))),
        ...     Compose(Trial(episodes=2), TaskSampler(lambda size, gen: 10 * torch.rand(*size, 1, generator=gen))),
        ... )
        >>> td = env.reset()
        >>> float(td["task"]) == env.base_env.unwrapped.g
        True
    """

    def __init__(
        self, env_name: str, *, set_task: Callable[[Any, torch.Tensor], None], task_spec: TensorSpec, **kwargs
    ):
        super().__init__(env_name, **kwargs)
        self._set_task = set_task
        self.state_spec = Composite(task=task_spec.to(self.device), shape=self.batch_size, device=self.device)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs) -> TensorDictBase:
        if tensordict is not None and "task" in tensordict.keys():
            self._set_task(self._env.unwrapped, tensordict["task"])
        return super()._reset(tensordict, **kwargs)
