"""`Recording`: kernels' calls as they were made once, made again in one: on a CPU what a CUDA graph is on a device.

Between two kernels Python takes as long as they do: of networks of some ten thousand weights a minibatch is twenty calls of some
20 microseconds each, since what the kernels stream through the caches drives Python's own data out of them.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Calls", "Recording"]

#: Arguments of a call, as the kernels' ``call`` holds them.
_SLOTS = 19
#: Numbers that the kernels of one minibatch may leave.
_NUMBERS = 32


class Recording:
    """Notes the kernels' calls that this thread makes while it is `on`, and keeps the memory that they are made on.

    What is noted is made again on the same memory: what runs meanwhile takes all of it from `Workspace`, and does with it what
    kernels do, no more. Where it does more, it says so by `interrupt`.

    Attributes:
        calls: what makes each again, and its arguments, as `Calls` takes them.
        held: memory of `Workspace` that they are made on.
        numbers: float64, what kernels have left for Python to read.
        replaced: what Python makes anew each time, in memory of its own, and how.
        is_whole: whether kernels did all that was done since this was set to True.
    """

    _threads = threading.local()

    def __init__(self):
        self.calls: list[tuple[int, tuple]] = []
        self.held: list[Tensor] = []
        self.replaced: list[tuple[Tensor, Callable[[], Tensor]]] = []
        self.numbers, self._used = torch.zeros(_NUMBERS, dtype=torch.float64, device="cpu"), 0
        self.is_whole = True
        self.library: ctypes.CDLL | None = None
        self._noting: _Noting | None = None

    @classmethod
    def active(cls) -> Recording | None:
        """The one that is on in this thread."""
        return getattr(cls._threads, "active", None)

    @classmethod
    def interrupt(cls) -> None:
        """Says that something else than a kernel is about to work on the memory."""
        if (recording := cls.active()) is not None:
            recording.is_whole = False

    @classmethod
    def replaces(cls, made: Tensor, make: Callable[[], Tensor]) -> None:
        """Says that Python has ``made`` what kernels read now, and how to ``make`` what they read the next time."""
        if (recording := cls.active()) is not None:
            recording.replaced.append((made, make))

    @contextmanager
    def on(self) -> Iterator[None]:
        """Notes what is called within."""
        self._threads.active = self
        try:
            yield
        finally:
            self._threads.active = None

    def numbers_for(self, count: int) -> Tensor:
        """The next ``count`` of the ``numbers``."""
        self._used += count
        if self._used > _NUMBERS:
            self.is_whole = False
            return torch.empty(count, dtype=torch.float64, device="cpu")
        return self.numbers[self._used - count : self._used]

    def close(self) -> None:
        """Lets go of all memory."""
        self.calls.clear()
        self.held.clear()
        self.stop()

    def stop(self) -> None:
        """Nothing more will be noted, and the memory goes with what holds this."""
        self._noting = None

    @property
    def numbers_used(self) -> Tensor:
        """Those of the ``numbers`` that have been asked for."""
        return self.numbers[: self._used]

    def noting(self, library: ctypes.CDLL) -> _Noting:
        """``library``, whose calls are noted."""
        if self._noting is None:
            self.library, self._noting = library, _Noting(self, library)
        if self.library is not library:  # of another dtype
            self.is_whole = False
            return library
        return self._noting


class _Noting:
    """A library whose calls a recording notes."""

    def __init__(self, recording: Recording, library: ctypes.CDLL):
        self._recording, self._library = recording, library

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function, again, recording = getattr(self._library, name), _again(self._library, name), self._recording
        if again is None:
            recording.is_whole &= name.endswith("_size")
            return function

        def call(*arguments):
            result = function(*arguments)
            if Recording.active() is recording:
                recording.calls.append((again, arguments))
            return result

        setattr(self, name, call)
        return call


@cache
def _again(library: ctypes.CDLL, name: str) -> int | None:
    """Where ``library`` has what calls the kernel ``name`` again; None where it cannot be."""
    function = getattr(library, f"again_{name}", None)
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value


class Calls:
    """Calls that are made again in one.

    Args:
        library: whose kernels they are.
        noted: those of a `Recording`'s ``calls`` that are made.
    """

    def __init__(self, library: ctypes.CDLL, noted: list[tuple[int, tuple]]):
        self._library, self._noted = library, noted
        rows = [_row(*call) for call in self._noted]
        #: What they are made by, as the kernels' ``call`` has it; addresses may be put in the place of others.
        self.table = np.array(rows, dtype=np.int64).reshape(-1)
        self._address, self.count = self.table.ctypes.data, len(rows)

    def __call__(self) -> bool:
        """Makes them; False where a kernel reported something, and those after it have not been made."""
        return not self.count or self._library.make_calls(self._address, self.count) == self.count

    def places(self, tensor: Tensor) -> list[tuple[int, int]]:
        """Which of the numbers of ``table`` are addresses within ``tensor``, and how many bytes from its beginning."""
        pairs = zip(tensor.shape, tensor.stride(), strict=True)
        size = (1 + sum((entries - 1) * stride for entries, stride in pairs)) * tensor.element_size()
        offsets = ((place, number - tensor.data_ptr()) for place, number in enumerate(self.table.tolist()))
        return [(place, offset) for place, offset in offsets if 0 <= offset < size]

    def and_then(self, name: str, *arguments: float) -> Calls:
        """These, and one of the kernel ``name``."""
        return Calls(self._library, [*self._noted, (_again(self._library, name), arguments)])

    def make_passes(self, *arguments: int) -> int:
        """Makes them for each of many minibatches, as the kernels' ``make_passes`` says."""
        return self._library.make_passes(self._address, self.count, *arguments)


def _row(again: int, arguments: tuple) -> list[int]:
    slots = [_bits(argument) for argument in arguments]
    return [again, *slots, *[0] * (_SLOTS - len(slots))]


def _bits(argument: float | None) -> int:
    if isinstance(argument, float):
        return struct.unpack("q", struct.pack("d", argument))[0]
    return 0 if argument is None else int(argument)
