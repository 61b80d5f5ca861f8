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
        #: What has been shown of each entry in this minibatch. Who reads it too shares its version: PyTorch notices, at the
        #: backward, where one has written over what another has saved.
        self._shown: dict[int, torch.Tensor] = {}
        #: Each lives as long as the storage of what was shown, and so as long as anybody holds that, or a view of it.
        self._arrays: list[weakref.ref] = []

    def show(self, entry: torch.Tensor) -> torch.Tensor:
        """``entry``, with a storage of its own."""
        if self._are_copies or entry.dtype not in _NUMPYS:
            return entry.clone()
        if id(entry) not in self._shown:
            array = entry.detach().numpy()
            self._arrays.append(weakref.ref(array))
            self._shown[id(entry)] = torch.from_numpy(array)
        return self._shown[id(entry)].detach()

    def are_kept(self) -> bool:
        """Whether anybody holds what was shown of the last minibatch, which is over."""
        self._shown.clear()
        self._arrays = [array for array in self._arrays if array() is not None]
        return bool(self._arrays)
