"""What may be handed to a compiled kernel: it reads as many numbers of one dtype as it is told, and asks nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

__all__ = ["require_plain", "require_tensor", "unit_stride"]


def require_tensor(name: str, tensor: torch.Tensor, shape: Sequence[int], like: torch.Tensor) -> None:
    """Raises unless ``tensor`` has ``shape`` and the device and dtype of ``like``.

    Raises:
        ValueError: it has another shape, lies on another device or has no memory (device "meta").
        TypeError: it has another dtype.

    Examples:
        >>> require_tensor("bias", torch.zeros(3), (3,), like=torch.zeros(2))
    """
    if tensor.shape != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(shape)}.")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, and what it is used with on {like.device}: move one of them.")
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} is {tensor.dtype}, and what it is used with {like.dtype}: convert one of them.")


def require_plain(name: str, tensor: torch.Tensor, shape: Sequence[int], like: torch.Tensor) -> None:
    """As `require_tensor`, for memory that a kernel writes to: ``tensor`` must be contiguous too.

    Examples:
        >>> require_plain("out", torch.zeros(3, 2).t(), (2, 3), like=torch.zeros(2))
        Traceback (most recent call last):
        ValueError: out has strides (1, 2): what a kernel writes to must be contiguous.
    """
    require_tensor(name, tensor, shape, like)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}: what a kernel writes to must be contiguous.")


def unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` detached, with its last dimension contiguous.

    Examples:
        >>> unit_stride(torch.zeros(3, 4)[:, ::2]).stride()
        (2, 1)
    """
    tensor = tensor.detach()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()
