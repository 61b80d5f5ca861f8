"""`gru_steps`: a GRU layer over sequences with resets on a CUDA device, and its gradient; nothing is read back to the host."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["gru_steps"]


def gru_steps(x: Tensor, hidden: Tensor | None, is_init: Tensor | None, *weights: Tensor | None) -> Tensor:
    """`gru_sequence` step by step: in each a matrix product and PyTorch's fused cell; what needs no memory is one product.

    Going back it is the same; gradients of weights are single products over all steps. The host only launches, so that it all can
    be part of a CUDA graph. Matrix products are of PyTorch's float32 precision, as cuDNN's are not.
    """
    return _GRUSteps.apply(x, hidden, is_init, *weights)


class _GRUSteps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, hidden, is_init, w_ih, w_hh, b_ih, b_hh):
        x = x.transpose(0, 1).contiguous()  # a step's rows side by side
        gates = x @ w_ih.t() if b_ih is None else torch.addmm(b_ih, x.flatten(0, 1), w_ih.t()).unflatten(0, x.shape[:2])
        resets = None if is_init is None else is_init.bool().t().unsqueeze(-1)
        zeros = x.new_zeros(x.shape[1], w_hh.shape[1])
        h = zeros if hidden is None else hidden[:, 0].contiguous()
        before, after, saved = [], [], []
        for t in range(len(x)):
            if t and resets is not None:
                h = torch.where(resets[t], zeros if hidden is None else hidden[:, t], h)
            before.append(h)
            by_h = h @ w_hh.t() if b_hh is None else torch.addmm(b_hh, h, w_hh.t())
            h, kept = torch.ops.aten._thnn_fused_gru_cell(gates[t], by_h, h)  # and what its gradient needs [N, 5 H]
            after.append(h)
            saved.append(kept)
        ctx.save_for_backward(x, torch.stack(before), resets, w_ih, w_hh, *saved)
        ctx.has_bias = b_ih is not None
        return torch.stack(after, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, before, resets, w_ih, w_hh, *saved = ctx.saved_tensors
        d_hidden = torch.zeros_like(dy) if ctx.needs_input_grad[1] else None
        dy, d_h, by_x, by_h = dy.transpose(0, 1).contiguous(), torch.zeros_like(before[0]), [], []
        for t in reversed(range(len(saved))):
            d_x_gates, d_h_gates, d_h, *_ = torch.ops.aten._thnn_fused_gru_cell_backward(d_h + dy[t], saved[t], False)
            by_x.append(d_x_gates)
            by_h.append(d_h_gates)
            d_h.addmm_(d_h_gates, w_hh)
            if d_hidden is not None:
                d_hidden[:, t] = d_h if t == 0 else 0 if resets is None else torch.where(resets[t], d_h, 0.0)
            if t and resets is not None:
                d_h = torch.where(resets[t], 0.0, d_h)
        by_x, by_h = torch.stack(by_x[::-1]), torch.stack(by_h[::-1])
        d_x = (by_x @ w_ih).transpose(0, 1) if ctx.needs_input_grad[0] else None
        d_biases = (by_x.sum((0, 1)), by_h.sum((0, 1))) if ctx.has_bias else (None, None)
        return d_x, d_hidden, None, _product(by_x, x), _product(by_h, before), *d_biases


def _product(gates: Tensor, inputs: Tensor) -> Tensor:
    """The sum over all steps and rows of the outer products of ``gates`` ``[T, N, 3 H]`` and ``inputs`` ``[T, N, n]``."""
    return gates.flatten(0, 1).t() @ inputs.flatten(0, 1)
