"""`GymTaskEnv`: a Gymnasium env whose task is a tensor that a function applies to it at reset."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Composite, TensorSpec
from torchrl.envs import GymEnv, GymWrapper

from rl2_torchrl.arguments import noted
from rl2_torchrl.envs.layers import made_of, put_state, spaces_within, state_or_reason
from rl2_torchrl.envs.task_setter import TaskSetter, warn_of_added
from rl2_torchrl.storage import from_tensor, to_tensor

__all__ = ["GymTaskEnv"]

#: What `GymEnv` adds, or reads itself, on the way to an env.
_OF_WRAPPERS = {"disable_env_checker", "from_pixels", "pixels_only"}


class GymTaskEnv(GymEnv):
    """A Gymnasium env with a task: at each reset ``set_task(env, task)`` changes the env, as `TaskSampler` asks.

    Actions beyond a `Box`'s bounds are clipped to them on their way to the env, as by `GymVectorEnv`; log-probability and
    transition input are those of the action as drawn.

    Args:
        env: a Gymnasium id, as for `torchrl.envs.GymEnv`; an env, wrapped or not; or a function that makes one, which worker
            processes need.
        set_task: ``(gymnasium_env, task) -> None``, called with the *unwrapped* env and the task, a tensor without
            batch dimensions, before every reset that brings a task.
        task_spec: TorchRL spec of one task.
        **kwargs: passed on to `GymEnv`; those of `gymnasium.make`, such as ``max_episode_steps``, with an id alone.

    A checkpoint holds the env as it holds those of `GymVectorEnv`, alone or several in TorchRL's ``SerialEnv`` or ``ParallelEnv``:
    a resumed run goes on in the middle of an episode, unless the env holds what is no plain data, which the log names.

    Raises:
        TypeError: ``env`` is none of these, or options of `gymnasium.make` with an env that is made already.
        ValueError: it observes what TorchRL's `GymEnv` cannot show: choices that do not count from 0, or wide unsigned numbers.

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
        self,
        env: str | gymnasium.Env | Callable[[], gymnasium.Env],
        *,
        set_task: Callable[[Any, torch.Tensor], None],
        task_spec: TensorSpec,
        **kwargs,
    ):
        super().__init__(env, **kwargs)
        #: What makes the env: a run that goes on is to have the same, with the same arguments, and the same ``set_task``.
        self.make = partial(gymnasium.make, env, **kwargs) if isinstance(env, str) else env
        self.set_task, self._setter = set_task, TaskSetter(set_task)
        #: What the env is made of (`layers`), before a task changes it.
        self._made_of = made_of(self._env)
        self._task: torch.Tensor | TensorDictBase | None = None  # the last one that `set_task` was given
        self.state_spec = Composite(task=task_spec.to(self.device), shape=self.batch_size, device=self.device)

    def _build_env(self, env_name: str | gymnasium.Env | Callable[[], gymnasium.Env], **kwargs) -> gymnasium.Env:
        if isinstance(env_name, str):
            return super()._build_env(env_name, **kwargs)
        env = env_name if isinstance(env_name, gymnasium.Env) or not callable(env_name) else env_name()
        if not isinstance(env, gymnasium.Env):
            raise TypeError(f"{env} is no gymnasium.Env: give an env, a function that makes one, or a Gymnasium id.")
        options = {name: value for name, value in kwargs.items() if name not in _OF_WRAPPERS}
        if options:
            raise TypeError(
                f"{sorted(options)} are options of gymnasium.make, which is called for an id alone: make {env} with them."
            )
        pixels = {name: kwargs[name] for name in ("from_pixels", "pixels_only") if name in kwargs}
        return GymWrapper._build_env(self, env, **pixels)

    def _make_specs(self, env: gymnasium.Env, *args, **kwargs) -> None:
        for space in spaces_within(env.observation_space):
            if np.any(getattr(space, "start", 0)) or space.dtype in (np.uint16, np.uint32, np.uint64):
                raise ValueError(
                    f"the env observes {space}, and TorchRL's GymEnv counts choices from 0, and knows no unsigned numbers of more "
                    "than a byte: it would show others, or fail. GymVectorEnv(make_env, num_envs, ...) shows them as they are."
                )
        with noted(
            "What TorchRL's GymEnv cannot show, GymVectorEnv(make_env, num_envs, ...) may, such as a text's own space."
        ):
            super()._make_specs(env, *args, **kwargs)

    def read_action(self, action: torch.Tensor) -> Any:
        """What the env is given: choices counted from where its space begins, reals in the space's shape and within its bounds."""
        given, space = super().read_action(action), self._env.action_space
        if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
            return given + space.start
        if isinstance(space, spaces.Box):
            return np.reshape(given, space.shape).clip(space.low, space.high).astype(space.dtype, copy=False)
        return given

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs) -> TensorDictBase:
        if tensordict is not None and "task" in tensordict.keys():
            self._hear(tensordict["task"].clone())
        return super()._reset(tensordict, **kwargs)

    def _hear(self, task: torch.Tensor | TensorDictBase) -> None:
        is_first, self._task = self._task is None, task
        self._setter(self._env.unwrapped, task)
        if is_first:
            warn_of_added(self.attributes_added())

    def attributes_added(self) -> list[str]:
        """Attributes that the env has by its first task alone, such as a misspelt one."""
        return self._setter.added

    # ------------------------------------------------------------- checkpoints
    def why_no_state(self) -> str | None:
        """Why a resumed run begins new trials, in words; None where the env hands out its state (`layers`)."""
        state = state_or_reason(self._env)
        return state if isinstance(state, str) else None

    def get_extra_state(self) -> torch.Tensor:
        """The task, and the env itself where it hands out its state; see `why_no_state`."""
        task = self._task.to_dict() if isinstance(self._task, TensorDictBase) else self._task
        # One plain tensor, as TensorEnv's: all else TorchRL's EnvCreator would copy into every worker.
        return to_tensor({"task": task, "env": state_or_reason(self._env)})

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Restores what `get_extra_state` returned."""
        own = from_tensor(state, f"the state of {type(self).__name__}")
        task = own["task"]
        # A task may have changed what is no part of the state, such as masses in MuJoCo's model.
        if task is not None:
            self._hear(TensorDict(task, self.batch_size, self.device) if isinstance(task, dict) else task)
        if not isinstance(own["env"], str):
            put_state(self._env, own["env"])
