"""`Workspace`: memory for kernels, which is used again once nobody holds it; `keep_freed_memory`, for what others ask for."""

from __future__ import annotations

import math
import threading
import weakref
from collections import deque

import torch
from torch import Tensor

from rl2_torchrl.kernels.recording import Recording

__all__ = ["Workspace", "keep_freed_memory"]


class Workspace:
    """Memory that kernels write; while a `Recording` is on, the recording holds it, too."""

    _free = threading.local()
    _KEPT = 16  # two networks in one loss: states, gradients and what forward saves of each, and a little more
    _LEAST = 2**14  # numbers; what is smaller, PyTorch's allocator has at hand

    @classmethod
    def take(cls, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        """As `make`, of memory that nobody holds any more: the first touch of fresh memory costs more than the arithmetic on it."""
        if (count := math.prod(shape)) < cls._LEAST:
            return cls.make(like, shape)
        size, free = count * like.element_size(), vars(cls._free).setdefault("memory", deque(maxlen=cls._KEPT))
        for _ in range(len(free)):
            memory = free.popleft()
            if len(memory) == size:
                break
            free.append(memory)
        else:
            memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        # It lives as long as the storage that is made of it, and so as long as anybody holds a tensor there, or a view of one.
        array = memory.numpy()
        weakref.finalize(array, free.append, memory)
        return cls._held(like.new_empty(0).set_(torch.from_numpy(array).untyped_storage(), 0, shape))

    @classmethod
    def make(cls, like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """A contiguous tensor of ``shape``, of ``dtype``, by default that of ``like``, and on its device, the CPU."""
        return cls._held(like.new_empty(shape, dtype=dtype))

    @staticmethod
    def _held(tensor: Tensor) -> Tensor:
        if (recording := Recording.active()) is not None:
            recording.held.append(tensor)
        return tensor


def keep_freed_memory() -> None:
    """Has the process keep up to 64 MB of freed memory, which what runs under autograd asks for again in each minibatch.

    What glibc keeps is twice the largest block of up to 32 MB that has been freed (``man 3 mallopt``, M_MMAP_THRESHOLD). Left as it
    is it may hand memory back, and fetch it anew, all the time: an LSTM's update then takes up to 1.7 times as long.
    """
    torch.empty(32 * 2**20 - 2**16, dtype=torch.uint8, device="cpu")
