"""`TaskSetter`: a user's ``set_task``, and whether it has changed what was there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torchrl import torchrl_logger

from rl2_torchrl.arguments import require_arguments

__all__ = ["TaskSetter", "told_of_added", "warn_of_added"]


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
        require_arguments("set_task", set_task, "env", "task")
        self._set_task, self._is_first = set_task, True
        self.added: list[str] = []

    def __call__(self, env: Any, task: Any) -> None:
        known = set(dir(env)) if self._is_first else ()
        self._set_task(env, task)
        if self._is_first:
            self.added, self._is_first = sorted(set(dir(env)).difference(known)), False


def told_of_added(added: Sequence[str]) -> str:
    """That ``set_task`` has given an env the attributes ``added``, and what may have been meant."""
    return (
        f"set_task gave the env {list(added)}, which it did not have before: misspelt? Or a wrapper's? set_task is given the env "
        "below all wrappers; let a wrapper read what it needs there, self.unwrapped"
    )


def warn_of_added(added: Sequence[str]) -> None:
    """Logs that ``set_task`` has given an env the attributes ``added``, where there are any: nobody may read them."""
    if added:
        torchrl_logger.warning(
            f"{told_of_added(added)}. What nobody reads changes nothing, and all trials would be alike: "
            "rl2_torchrl.testing.check_trial_env tells whether tasks reach the env. Give the env the attribute from the start, in "
            "its __init__, and this is not said."
        )
