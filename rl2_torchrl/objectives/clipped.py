"""`clipped_objective`: PPO's objective from log-probabilities, and how far the policy has moved, in one pass."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch

from rl2_torchrl import kernels

__all__ = ["ClippedObjective", "clipped_objective", "clipped_terms"]

_Totals = ctypes.c_double * 5


class ClippedObjective(NamedTuple):
    """What `clipped_objective` gives: ``loss`` with its gradient, and diagnostics without one, named as in `ClipPPOLoss`."""

    loss: torch.Tensor
    clip_fraction: torch.Tensor
    kl_approx: torch.Tensor
    mean_ratio: torch.Tensor
    max_ratio: torch.Tensor
    ESS: torch.Tensor


def clipped_objective(
    log_prob: torch.Tensor, old_log_prob: torch.Tensor, advantage: torch.Tensor, log_low: float, log_high: float
) -> ClippedObjective:
    """``-mean(min(r A, clip(r) A))`` with r = p / p_old (Schulman et al. 2017, eq. 7), in one pass.

    Without compiled kernels (`rl2_torchrl.kernels`) for the device and dtype, it is made of PyTorch's operations.
    Its gradient by log p is ``-r A / N`` where ``r A`` is the smaller (within the clip both are the same), 0 elsewhere.

    Args:
        log_prob: log p ``[B, T]``.
        old_log_prob: log p_old ``[B, T]``.
        advantage: A ``[B, T]``.
        log_low: logarithm of the lowest ratio, log(1 - clip_epsilon).
        log_high: logarithm of the highest ratio, log(1 + clip_epsilon).

    Raises:
        ValueError: the three are not of one shape ``[B, T]``.

    Examples:
        >>> twice, one = torch.tensor([[2.0]]).log(), torch.ones(1, 1)
        >>> round(float(clipped_objective(twice, 0 * one, one, -0.2, 0.0).loss), 3)
        -1.0
    """
    shapes = [tuple(tensor.shape) for tensor in (log_prob, old_log_prob, advantage)]
    if len(shapes[0]) != 2 or len(set(shapes)) > 1:
        raise ValueError(f"log-probabilities, old ones and advantages must be of one shape [B, T]; they are {shapes}.")
    if not kernels.covers(log_prob, old_log_prob, advantage):
        return _by_torch(log_prob, old_log_prob, advantage, log_low, log_high)
    loss, figures, ess = _ClippedObjective.apply(log_prob, old_log_prob, advantage, log_low, log_high)
    return ClippedObjective(loss, *figures.unbind(), ess)


def _by_torch(log_prob, old_log_prob, advantage, low, high) -> ClippedObjective:
    log_ratio = log_prob - old_log_prob
    clipped = log_ratio.clamp(low, high)
    loss = -torch.minimum(log_ratio.exp() * advantage, clipped.exp() * advantage).mean()
    log_ratio, clipped = log_ratio.detach(), clipped.detach()
    ratio, is_clipped = log_ratio.exp(), (clipped != log_ratio).to(log_ratio.dtype)
    ess = ratio.sum(0).square() / ratio.square().sum(0) / len(ratio)
    return ClippedObjective(loss, is_clipped.mean(), -log_ratio.mean(), ratio.mean(), ratio.max(), ess)


class _ClippedObjective(torch.autograd.Function):
    @staticmethod
    def forward(ctx, log_prob, old_log_prob, advantage, low, high):
        active, ess, totals = clipped_terms(log_prob, old_log_prob, advantage, low, high)
        ctx.save_for_backward(active)
        objective, *sums, largest = totals
        size = log_prob.numel()
        figures = log_prob.new_tensor([*(total / size for total in sums), largest])
        ctx.mark_non_differentiable(figures, ess)
        return log_prob.new_tensor(-objective / size), figures, ess

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient, *_):
        (active,) = ctx.saved_tensors
        return active * (-gradient / active.numel()), None, None, None, None


def clipped_terms(log_prob, old_log_prob, advantage, low: float, high: float):
    """By the kernels: the objective's gradient by log p ``[B, T]``, ESS ``[T]``, and five totals over all steps.

    The totals: the objective, how often the ratio was clipped, log p_old - log p, the ratio; and the largest ratio.
    """
    inputs = [tensor.contiguous() for tensor in (log_prob, old_log_prob, advantage)]
    active, ratio, totals = torch.empty_like(inputs[0]), torch.empty_like(inputs[0]), _Totals()
    ess = active.new_empty(active.shape[1])
    outputs = (*map(kernels.address, (active, ratio, ess)), ctypes.addressof(totals))
    kernels.load(log_prob.dtype).clipped_objective(*log_prob.shape, *map(kernels.address, inputs), low, high, *outputs)
    return active, ess, totals
