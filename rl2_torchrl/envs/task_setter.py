"""`TaskSetter`: a user's ``set_task``, and whether it has changed what was there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from numbers import Number
from typing import Any

import numpy as np
from tensordict import TensorDictBase
from torch import Tensor
from torchrl import torchrl_logger

from rl2_torchrl.envs.simulation import model_of

__all__ = ["TaskSetter", "warn_of_added"]


class TaskSetter:
    """``set_task(env, task)`` of one env; the log tells of one that changes the env further where a task comes again.

    Args:
        set_task: a user's function.
        watched: how many tasks are looked at, at most. Default 10.

    Attributes:
        added: attributes that the env has by its first task alone, such as a misspelt one.

    Examples:
        >>> class Pendulum:
        ...     gravity = 10.0
        >>> set_task = TaskSetter(lambda env, task: setattr(env, "gravty", task))
        >>> set_task(Pendulum(), 5.0)
        >>> set_task.added
        ['gravty']
    """

    def __init__(self, set_task: Callable[[Any, Any], None], watched: int = 10):
        self._set_task, self._watched = set_task, watched
        self.added: list[str] = []
        #: The last task, what it left, and whether that was another than before; until one that changed something has come twice,
        #: as it does in the second episode of a trial.
        self._last: tuple[Any, dict[str, bytes], bool] = (None, {}, False)
        self._has_heard = False

    def __call__(self, env: Any, task: Any) -> None:
        if self._watched == 0:
            return self._set_task(env, task)
        known, before = set(dir(env)), _numbers(env)
        self._set_task(env, task)
        self._watched -= 1
        if not self._has_heard:
            self._has_heard, self.added = True, sorted(set(dir(env)).difference(known))
        (last, left, has_changed), now = self._last, _numbers(env)
        self._last = task, now, now != before
        if has_changed and _is_same(task, last):
            self._watched, self._last = 0, (None, {}, False)
            # What was another before is the env's own doing.
            _warn_of_drift(tuple(name for name in now if before.get(name) == left.get(name) != now[name]))


def _numbers(env: Any) -> dict[str, bytes]:
    """The env's numbers and arrays by name, and MuJoCo's model, of which a task may change any."""
    values = {name: value for name, value in vars(env).items() if isinstance(value, Number | np.ndarray)}
    values |= {"model": model_of(env.model)} if hasattr(env, "mujoco_renderer") else {}
    arrays = {name: np.asarray(value) for name, value in values.items()}
    return {name: array.tobytes() for name, array in arrays.items() if array.dtype.kind in "biufc"}


def _is_same(task: Any, other: Any) -> bool:
    if isinstance(task, Tensor | TensorDictBase):
        return other is not None and bool((task == other).all())
    return task is other


@cache
def _warn_of_drift(names: tuple[str, ...]) -> None:
    if names:
        torchrl_logger.warning(
            f"set_task was given one task twice, and left other numbers in the env the second time: {list(names)}. Does it reckon "
            "from what the last task left, as `*=` does? Then tasks drift from reset to reset, and no trial is on one task: reckon "
            "from a value that stays."
        )


def warn_of_added(added: Sequence[str]) -> None:
    """Logs that ``set_task`` has given an env the attributes ``added``, where there are any: nobody may read them."""
    if added:
        torchrl_logger.warning(
            f"set_task gave the env {list(added)}, which it did not have before: misspelt? Or a wrapper's? set_task is given "
            "the env below all wrappers; let a wrapper read what it needs there, self.unwrapped. What nobody reads changes "
            "nothing, and all trials would be alike: rl2_torchrl.testing.check_trial_env tells whether tasks reach the env. "
            "Give the env the attribute from the start, in its __init__, and this is not said."
        )
