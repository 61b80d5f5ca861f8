"""`Workspace`: memory that each minibatch needs, made once; `keep_freed_memory`, for what others ask for."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from rl2_torchrl.kernels.recording import Recording

__all__ = ["Workspace", "keep_freed_memory"]


class Workspace:
    """Memory of one minibatch that the next one uses again: first touch of fresh memory costs more than the arithmetic on it."""

    _free = threading.local()  # a tensor that two threads took would be written by both
    _KEPT = 16  # two networks in one loss: states, gradients and what forward saves of each, and a little more
    _LEAST = 2**14  # numbers of a recording's memory; what is smaller, PyTorch's allocator has at hand

    @classmethod
    def take(cls, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A contiguous tensor of ``shape``, and of the dtype and device of ``like``, to be given back by `give`.

        What is taken while a `Recording` is on is the recording's.
        """
        free = vars(cls._free).setdefault("tensors", [])
        fitting = (i for i, tensor in enumerate(free) if tensor.shape == shape and tensor.dtype == like.dtype)
        number = next(fitting, None)
        tensor = like.new_empty(shape) if number is None else free.pop(number)
        if (recording := Recording.active()) is not None:
            recording.kept.append(tensor)
        else:
            tensor.is_lent = True
        return tensor

    @classmethod
    def make(cls, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """As `take`, of what stays with whoever asked for it, as a parameter's gradient does."""
        tensor = like.new_empty(shape)
        if (recording := Recording.active()) is not None:
            recording.held.append(tensor)
        return tensor

    @classmethod
    def numbers(cls, count: int) -> Tensor:
        """So many numbers, float64, that a kernel writes for Python to read; a `Recording` has them of each minibatch."""
        if (recording := Recording.active()) is None:
            return torch.empty(count, dtype=torch.float64, device="cpu")
        return recording.numbers_for(count)

    @classmethod
    def leave(cls, *entries: Any) -> None:
        """Leaves those of ``entries`` that were taken to whoever is shown them, and may hold them for as long as they like."""
        for entry in entries:
            if getattr(entry, "is_lent", False):
                entry.is_lent = False

    @classmethod
    def give(cls, tensor: Tensor) -> None:
        """Takes ``tensor`` back, if it was taken here and left to nobody: any other may be strided, or be read by others still."""
        if getattr(tensor, "is_lent", False):
            tensor.is_lent = False
            cls._put([tensor])

    @classmethod
    def give_all(cls, recording: Recording) -> None:
        """Takes back what is the recording's, which is not made again."""
        cls._put([tensor for tensor in recording.kept if tensor.numel() >= cls._LEAST])
        recording.kept.clear()

    @classmethod
    def _put(cls, tensors: list[Tensor]) -> None:
        free = vars(cls._free).setdefault("tensors", [])
        free.extend(tensors)
        del free[: -cls._KEPT]


def keep_freed_memory() -> None:
    """Has the process keep up to 64 MB of freed memory, which what runs under autograd asks for again in each minibatch.

    What glibc keeps is twice the largest block of up to 32 MB that has been freed (``man 3 mallopt``, M_MMAP_THRESHOLD). Left as it
    is it may hand memory back, and fetch it anew, all the time: an LSTM's update then takes up to 1.7 times as long.
    """
    torch.empty(32 * 2**20 - 2**16, dtype=torch.uint8, device="cpu")
