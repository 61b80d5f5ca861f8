"""`locked`: one program at a time in a folder; `MODES`: one thread at a time where TorchRL's modes are set."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["MODES", "locked"]

#: TorchRL's modes (exploration, recurrence) are the program's: one thread's greedy evaluation would make another's rollout greedy.
MODES = threading.RLock()

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
