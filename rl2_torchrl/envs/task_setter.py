"""`TaskSetter`: a user's ``set_task``, and whether it has changed what was there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["TaskSetter"]


class TaskSetter:
    """``set_task(env, task)`` of one env.

    Args:
        set_task: a user's function.

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

    def __init__(self, set_task: Callable[[Any, Any], None]):
        self._set_task, self._is_first = set_task, True
        self.added: list[str] = []

    def __call__(self, env: Any, task: Any) -> None:
        known = set(dir(env)) if self._is_first else ()
        self._set_task(env, task)
        if self._is_first:
            self.added, self._is_first = sorted(set(dir(env)).difference(known)), False
