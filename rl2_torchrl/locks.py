"""`locked`: one program at a time in a folder; `MODES`: threads of one exploration type at a time."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchrl.envs.utils import ExplorationType, exploration_type, set_exploration_type

__all__ = ["MODES", "locked"]


class _Modes:
    """TorchRL's exploration type, which is the program's: one thread's greedy evaluation would make another's rollout greedy.

    Threads of one type share it and others wait, all in the order in which they come, or one might wait for ever.
    """

    def __init__(self):
        self._changed, self._waiting, self._own = threading.Condition(), deque(), threading.local()
        self._kind, self._outside, self._holders = None, None, 0

    @contextmanager
    def __call__(self, kind: ExplorationType | None) -> Iterator[None]:
        """Sets the type ``kind``; None keeps the one that is set outside, and others from setting one."""
        outer = vars(self._own).copy()
        self._leave()  # what this thread holds already, until it goes on there: two may not wait for one another's
        try:
            self._enter(kind)
            yield
        finally:
            self._leave()
            if outer:
                self._enter(**outer)

    def _enter(self, kind: ExplorationType | None) -> None:
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is ticket and (not self._holders or kind == self._kind))
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
            if not self._holders:
                self._kind, self._outside = kind, exploration_type()
            self._holders += 1
            self._own.kind = kind
            if kind is not None:
                set_exploration_type(kind).__enter__()

    def _leave(self) -> None:
        with self._changed:
            if vars(self._own):
                if self._holders == 1:
                    set_exploration_type(self._outside).__enter__()
                del self._own.kind
                self._holders -= 1
                self._changed.notify_all()

    def begin_anew(self) -> None:
        """In a forked process, in which no other thread goes on."""
        is_held = bool(vars(self._own))
        if self._holders and not is_held:
            set_exploration_type(self._outside).__enter__()
        self._changed, self._waiting, self._holders = threading.Condition(), deque(), int(is_held)


MODES = _Modes()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=MODES.begin_anew)

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
