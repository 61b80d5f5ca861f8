"""`Loans`: memory that is shown to users before it is written over, with word of whether they have kept it."""

from __future__ import annotations

import weakref

import torch

__all__ = ["Loans"]

#: What NumPy has too.
_NUMPYS = (torch.float32, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)


class Loans:
    """What users are shown of a minibatch, which may lie where the next one will be written.

    Args:
        are_copies: shows copies, since somebody keeps what is shown.
    """

    def __init__(self, *, are_copies: bool):
        self._are_copies = are_copies
        #: Each lives as long as the storage of what was shown, and so as long as anybody holds that, or a view of it.
        self._arrays: list[weakref.ref] = []

    def show(self, entry: torch.Tensor) -> torch.Tensor:
        """``entry``, with a storage of its own."""
        if self._are_copies or entry.dtype not in _NUMPYS:
            return entry.clone()
        array = entry.detach().numpy()
        self._arrays.append(weakref.ref(array))
        return torch.from_numpy(array)

    def are_kept(self) -> bool:
        """Whether anybody holds what was shown."""
        self._arrays = [array for array in self._arrays if array() is not None]
        return bool(self._arrays)
