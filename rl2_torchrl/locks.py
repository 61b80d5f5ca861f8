"""`locked`: one program at a time in a folder; `exploring`, `taking_turns`: one thread at a time with what is the program's."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from torchrl.envs.utils import ExplorationType, set_exploration_type

__all__ = ["exploring", "locked", "taking_turns"]


#: Held while TorchRL's exploration type is one thread's; and in each training's turn.
_exploring, _turn = threading.RLock(), threading.RLock()


@contextmanager
def exploring(kind: ExplorationType | None) -> Iterator[None]:
    """Sets TorchRL's exploration type, None keeps it, and has other threads wait that would set or read it.

    It is the program's: one thread's greedy evaluation would make another's rollout greedy.
    """
    with _exploring, nullcontext() if kind is None else set_exploration_type(kind):
        yield


@contextmanager
def taking_turns() -> Iterator[None]:
    """A rollout, an update or an evaluation of one of several threads' trainings: PyTorch's random numbers are the program's."""
    with _turn:
        yield


def _begin_anew() -> None:
    """In a forked process, in which no other thread goes on."""
    global _exploring, _turn
    _exploring, _turn = threading.RLock(), threading.RLock()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_begin_anew)

_held: set[Path] = set()  # by this process, which its own locks would not keep out


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the file ``path`` for this process; the lock ends with the process, however that ends.

    Raises:
        OSError: somebody holds it, or it cannot be made.
    """
    # POSIX locks: processes that are forked later, as envs are, do not keep them when this one is killed, as they would keep
    # flock's. Not at the top: the module is not everywhere where the rest of the package is.
    import fcntl

    path = path.resolve()
    if path in _held:
        raise BlockingIOError(f"{path} is held by another training of this process")
    with path.open("a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)
