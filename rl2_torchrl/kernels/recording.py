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
from itertools import groupby
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

__all__ = ["Calls", "ChangedError", "Recording", "noting"]

#: Arguments of a call, as the kernels' ``call`` holds them.
_SLOTS = 19
#: Numbers that the kernels of one minibatch may leave.
_NUMBERS = 32


class ChangedError(Exception):
    """What was recorded cannot be done again as it was."""


class Recording:
    """Notes the kernels' calls that this thread makes while it is `on`, and keeps the memory that they are made on.

    What is noted is made again on the same memory: what runs meanwhile takes all of it from `Workspace`, and does with it what
    kernels do, no more. What Python does between it does by `work` or `made`, or says by `interrupt` that it cannot do it again.

    Attributes:
        calls: what makes each again, and its arguments, as `Calls` takes them; or what Python does, a function.
        held: memory of `Workspace` that they are made on.
        replaced: what Python makes anew each time, in memory of its own, and how.
    """

    _threads = threading.local()

    def __init__(self):
        self.calls: list[tuple[int, tuple] | Callable[[], object]] = []
        self.held: list[Tensor] = []
        self.replaced: list[tuple[Tensor, Callable[[], Tensor]]] = []
        self._numbers, self._used = torch.zeros(_NUMBERS, dtype=torch.float64, device="cpu"), 0
        self.library: ctypes.CDLL | None = None

    @classmethod
    def active(cls) -> Recording | None:
        """The one that is on in this thread."""
        return getattr(cls._threads, "active", None)

    @classmethod
    def work(cls, work: Callable[[], object]) -> None:
        """Does ``work``, of PyTorch's operations; a recording does it again, on the same memory."""
        if (recording := cls.active()) is None:
            work()
            return
        with recording.off():
            work()
        recording.calls.append(work)

    @classmethod
    def made(cls, make: Callable[[], Tensor]) -> Tensor:
        """What PyTorch's operations ``make``; a recording makes it again, in the same memory."""
        if (recording := cls.active()) is None:
            return make()
        with recording.off():
            out = make()
        recording.calls.append(lambda: out.copy_(make()))
        return out

    @classmethod
    def interrupt(cls) -> None:
        """Says that something is about to be done that cannot be done again; as a step it is a ChangedError."""
        if (recording := cls.active()) is not None:
            recording.calls.append(_refuse)

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

    @contextmanager
    def off(self) -> Iterator[None]:
        """Notes nothing of what is called within, while it is on."""
        self._threads.active = None
        try:
            yield
        finally:
            self._threads.active = self

    def is_whole(self, first: int = 0) -> bool:
        """Whether kernels did all that has been noted, from the call of number ``first`` on."""
        return not any(map(callable, self.calls[first:]))

    @property
    def numbers(self) -> Tensor:
        """What kernels have left for Python to read, float64."""
        return self._numbers[: self._used]

    @classmethod
    def numbers_for(cls, count: int) -> Tensor:
        """So many numbers, float64, that a kernel writes for Python to read: of a recording, the next of its `numbers`."""
        recording = cls.active()
        if recording is None or recording._used + count > _NUMBERS:
            cls.interrupt()
            return torch.empty(count, dtype=torch.float64, device="cpu")
        recording._used += count
        return recording.numbers[-count:]

    def steps(self) -> list[Calls | Callable[[], object]]:
        """What has been noted, to be done one after the other: kernels' calls between Python's work are one."""
        steps: list[Calls | Callable[[], object]] = []
        for is_work, noted in groupby(self.calls, callable):
            together = list(noted)
            steps += together if is_work else [Calls(self.library, together)]
        return steps


def _refuse() -> NoReturn:
    raise ChangedError


def noting(library: ctypes.CDLL, name: str) -> Callable[..., Any]:
    """The kernel ``name`` of ``library``, whose calls a `Recording` notes that is on."""
    function, again = getattr(library, name), _again(library, name)

    def call(*arguments):
        result = function(*arguments)
        if (recording := Recording.active()) is not None:
            recording.library = library  # of whichever dtype
            recording.calls.append(_refuse if again is None else (again, arguments))
        return result

    return call


def _again(library: ctypes.CDLL, name: str) -> int | None:
    """Where ``library`` has what calls the kernel ``name`` again; None where it cannot be."""
    function = getattr(library, f"again_{name}", None)
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value


class Calls:
    """Calls that are made again in one.

    Args:
        library: kernels, of whichever dtype.
        noted: those of a `Recording`'s ``calls`` that are made, none of them Python's.
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
