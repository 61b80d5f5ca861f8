"""What may be handed to a compiled kernel: it reads as many numbers of one dtype as it is told, and asks nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["require_plain", "require_tensor", "unit_stride"]


def require_tensor(name: str, tensor: torch.Tensor, shape: Sequence[int], like: torch.Tensor) -> None:
    """Raises unless ``tensor`` has ``shape`` and the device and dtype of ``like``.

    Examples:
        >>> require_tensor("bias", torch.zeros(3), (4,), like=torch.zeros(2))
        Traceback (most recent call last):
        ValueError: bias has shape (3,); it must be (4,).
    """
    if tensor.shape != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(shape)}.")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, and what it is used with on {like.device}: move one of them.")
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} is {tensor.dtype}, and what it is used with {like.dtype}: convert one of them.")


def require_plain(name: str, tensor: torch.Tensor, shape: Sequence[int], like: torch.Tensor) -> None:
    """As `require_tensor`, for what a kernel writes to or reads as it lies: it must be contiguous too."""
    require_tensor(name, tensor, shape, like)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}; here it must be contiguous.")


def unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` detached, with its last dimension contiguous."""
    tensor = tensor.detach()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
