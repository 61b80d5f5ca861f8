"""`Turns`: whether somebody else has moved a collector's env between two of its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torchrl.collectors import Collector
from torchrl.envs import EnvBase

from rl2_torchrl.rollout.doors import is_tensor_env
from rl2_torchrl.trial import base_of, method_of

__all__ = ["Turns", "watch"]


class Turns:
    """The turns of a collector at its env, which stands where the last one left it unless somebody else has moved it.

    Args:
        env: the env; what moves it, through whatever transforms, are resets and steps of the env innermost.
    """

    def __init__(self, env: EnvBase):
        self._env = env = base_of(env)
        self._counted = None if is_tensor_env(env) else _Moves.of(env)
        self.leave()

    def leave(self) -> None:
        """The env stands where the next turn may begin."""
        self._left = self._moves()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One turn at the env.

        Raises:
            RuntimeError: the env has been moved since the last one.
        """
        if (others := self._moves() - self._left) != 0:
            raise RuntimeError(
                f"the collector's env has been reset or stepped since the collector last was at work, {others} times, most likely "
                "by an evaluation on the same env: its trials stand elsewhere than the collector's, and a batch would mix them. "
                "Evaluate on an env of its own, made as the collector's is; or let collector.reset() begin new trials."
            )
        try:
            yield
        finally:
            self.leave()

    def _moves(self) -> int:
        return self._env.moves if self._counted is None else self._counted.number


def watch(collector: Any) -> None:
    """Has a `Collector` of TorchRL's raise, as `TrialCollector` does, where somebody else has moved its env between two batches."""
    if not isinstance(collector, Collector) or hasattr(collector, "turns"):
        return
    collector.turns = Turns(collector.env)
    for name in ("rollout", "reset"):
        collector.__dict__[name] = partial(_in_turn, collector, name)


def _in_turn(collector: Collector, name: str, *args: Any, **kwargs: Any) -> Any:
    if name == "reset":  # which begins anew, wherever the env stands
        collector.turns.leave()
    with collector.turns.turn():
        return getattr(type(collector), name)(collector, *args, **kwargs)


class _Moves:
    """Resets and steps of an env that does not count them itself."""

    def __init__(self):
        self.number = 0

    @classmethod
    def of(cls, env: EnvBase) -> _Moves:
        """The count of ``env``, put before its ``_reset`` and ``_step`` where there is none yet."""
        made = env.__dict__.get("_step")
        if isinstance(made, partial) and made.func is _count_and_call:
            return made.args[0]
        moves = cls()
        for name in ("_reset", "_step"):
            env.__dict__[name] = partial(_count_and_call, moves, env, name, env.__dict__.get(name))
        return moves


def _count_and_call(moves: _Moves, env: EnvBase, name: str, own: Callable | None, /, *args: Any, **kwargs: Any) -> Any:
    """``own``: what stood before the class's method already, such as a compiled one."""
    moves.number += 1
    return (method_of(env, name) if own is None else own)(*args, **kwargs)
