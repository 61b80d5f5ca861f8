"""`GymRow`: one row of a `GymVectorEnv`, maybe in a process of its own: its task, its state, and what its env returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Number, Real
from typing import Any

import gymnasium
import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from rl2_torchrl.envs.layers import made_of, moving_statistics, put_state, state_or_reason
from rl2_torchrl.envs.task_setter import TaskSetter

__all__ = ["TASKS", "GymRow"]

#: Where the rows' tasks lie among the options of a reset, until each row has taken its own.
TASKS = "rl2_torchrl.tasks"


class GymRow(gymnasium.Wrapper):
    """One row, maybe in a process of its own: it takes its task out of the options of a reset, and of the env's info hands on
    what is recorded alone: to put together what N envs say beside takes a vector env longer than many an env's step.
    """

    def __init__(
        self,
        make: Callable[[], gymnasium.Env],
        row: int,
        set_task: Callable[..., None] | None,
        tasks: Sequence[Any] | None,
        task_option: str | None,
        info_keys: Sequence[str],
    ):
        super().__init__(make())
        self._row, self._tasks, self._task_option, self._info_keys = row, tasks, task_option, info_keys
        # All rows have one function: whether it drifts, a few find out.
        self._set_task = TaskSetter(set_task, watched=10 if row < 4 else 1)
        #: What the row is made of, before anything is played.
        self.made_of = made_of(self.env)
        self._task: Any = None  # the last one that `set_task` was given, as a row of arrays
        self._info: dict[str, Any] = {}  # the last that said anything

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        stepped = self.env.step(action)
        _require_parts("step()", stepped, "observation, reward, terminated, truncated, info")
        if np.ndim(stepped[1]):
            raise TypeError(
                f"step() pays {stepped[1]!r}; a reward is one number: float(...), or .item() of an array of one."
            )
        if not isinstance(stepped[4], dict):
            raise TypeError(
                f"step() says {stepped[4]!r} beside; an info is a dictionary, {{}} where there is nothing to say."
            )
        self.step = self._step  # one look is enough
        return *stepped[:4], self.recorded(stepped[4])

    def _step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, info and self.recorded(info)

    def recorded(self, info: dict[str, Any]) -> dict[str, Any]:
        """What is recorded of ``info``."""
        self._info = info
        if not self._info_keys:
            return {}
        return {key: _as_float(info[key]) for key in self._info_keys if key in info}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        options = dict(options or {})
        if TASKS in options:
            task = _row_of(options.pop(TASKS), self._row)
            if self._task_option is not None:
                options[self._task_option] = task
            else:
                self._hear(task)
        begun = self.env.reset(seed=seed, options=options or None)
        _require_parts("reset()", begun, "observation, info")
        space, shape = self.observation_space, np.shape(begun[0]) if isinstance(begun[0], np.ndarray | Number) else None
        if isinstance(space, gymnasium.spaces.Box) and shape not in (None, space.shape):
            raise ValueError(
                f"reset() observes shape {shape}, but the observation_space's is {space.shape}: mend one of them."
            )
        return begun[0], self.recorded(begun[1])

    def _hear(self, task: Any) -> None:
        self._task = task
        self._set_task(self.env.unwrapped, _as_tensors(task) if self._tasks is None else self._tasks[int(task)])

    @property
    def attributes_added(self) -> list[str]:
        """Attributes that the env has by its first task alone."""
        return self._set_task.added

    @property
    def said(self) -> list[str]:
        """What the env's last info is made of."""
        return list(self._info)

    @property
    def moving_statistics(self) -> list[str]:
        """The env's wrappers that normalize by statistics of this row, which move."""
        return moving_statistics(self.env)

    @property
    def row_state(self) -> Any:
        """The state of this row as plain data, or in words why it has none."""
        state = state_or_reason(self.env)
        return state if isinstance(state, str) else {"task": self._task, "env": state}

    @row_state.setter
    def row_state(self, state: dict[str, Any]) -> None:
        # A task may have changed what is no part of the state, such as masses in MuJoCo's model.
        if state["task"] is not None:
            self._hear(state["task"])
        put_state(self.env, state["env"])


def _as_float(value: Any) -> Any:
    """A number as a float: a vector env keeps those of all rows as what the first of them is. All else is left as it is."""
    if type(value) is float:  # what follows takes as long as a light env's step
        return value
    return float(value) if isinstance(value, Real | np.bool_) else value


def _require_parts(function: str, returned: Any, names: str) -> None:
    """Raises a TypeError that says what a Gymnasium env must return; its vector envs would fail to unpack it."""
    if not isinstance(returned, tuple) or len(returned) != names.count(",") + 1:
        given = f"{len(returned)} values" if isinstance(returned, tuple) else type(returned).__name__
        raise TypeError(f"{function} returns {given}; Gymnasium's is a tuple ({names}).")
    if returned[0] is None:
        raise TypeError(f"{function} observes None: return the observation.")


def _row_of(task: np.ndarray | dict, row: int) -> np.ndarray | dict:
    return {key: _row_of(value, row) for key, value in task.items()} if isinstance(task, dict) else np.array(task[row])


def _as_tensors(task: np.ndarray | dict) -> Tensor | TensorDictBase:
    """The task of one row, with memory of its own."""
    return TensorDict(task).clone() if isinstance(task, dict) else torch.from_numpy(np.array(task))
