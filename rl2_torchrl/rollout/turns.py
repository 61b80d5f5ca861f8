"""`Turns`: whether somebody else has moved a collector's env between two of its batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

from torchrl.collectors import Collector
from torchrl.envs import EnvBase

from rl2_torchrl.locks import exploring
from rl2_torchrl.rollout.doors import is_tensor_env
from rl2_torchrl.trial import base_of, method_of

__all__ = ["Turns", "watch"]


class Turns:
    """The turns of a collector at its env, which stands where the last one left it unless somebody else has moved it.

    Args:
        env: the env; what moves it, through whatever transforms, are resets and steps of the env innermost.
    """

    def __init__(self, env: EnvBase):
        env = base_of(env)
        #: What counts the resets and steps, as its ``moves``.
        self._counter = env if is_tensor_env(env) else _counter_of(env)
        self.leave()

    def leave(self) -> None:
        """The env stands where the next turn may begin."""
        self._left = self._counter.moves

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One turn at the env.

        Raises:
            RuntimeError: the env has been moved since the last one.
        """
        if (others := self._counter.moves - self._left) != 0:
            raise RuntimeError(
                f"the collector's env has been reset or stepped since the collector last was at work, {others} times, most likely "
                "by an evaluation on the same env: its trials stand elsewhere than the collector's, and a batch would mix them. "
                "Make a new collector, and evaluate on an env of its own, made as the collector's is; or begin new trials by "
                "collector.reset() after each evaluation."
            )
        try:
            yield
        finally:
            self.leave()


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
    with collector.turns.turn(), exploring(collector.exploration_type):
        return getattr(type(collector), name)(collector, *args, **kwargs)


def _counter_of(env: EnvBase) -> SimpleNamespace:
    """The counter of an env that does not count itself, put before its ``_reset`` and ``_step`` where there is none yet."""
    made = env.__dict__.get("_step")
    if isinstance(made, partial) and made.func is _count_and_call:
        return made.args[0]
    counter = SimpleNamespace(moves=0)
    for name in ("_reset", "_step"):
        env.__dict__[name] = partial(_count_and_call, counter, env, name, env.__dict__.get(name))
    return counter


def _count_and_call(counter: SimpleNamespace, env: EnvBase, name: str, own: Callable | None, /, *args, **kwargs) -> Any:
    """``own``: what stood before the class's method already, such as a compiled one."""
    counter.moves += 1
    return (method_of(env, name) if own is None else own)(*args, **kwargs)
