"""`relu_linear`: an activation and a linear layer as one function, the step that heads are made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from rl2_torchrl import kernels
from rl2_torchrl.modules.kernel_tensors import require_plain, require_tensor

__all__ = ["MOST_OUTPUTS", "relu_linear", "relu_linear_gradients", "relu_linear_step"]

#: More outputs than this are a matrix library's own field.
MOST_OUTPUTS = 64


def relu_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``max(x, 0) W^T + b``: `torch.relu` and `torch.nn.functional.linear` in one pass each way, for few outputs.

    Without compiled kernels for the device and dtype, it is these two calls.
    """
    # The kernels read as many numbers as the weight's sizes say. What does not fit gets PyTorch's error.
    outputs, inputs = weight.shape
    fits = x.shape[-1] == inputs and (bias is None or bias.shape == (outputs,))
    if not fits or outputs > MOST_OUTPUTS or not outputs or not x.numel() or not kernels.covers(x, weight, bias):
        return nn.functional.linear(torch.relu(x), weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        return _ReLULinear.apply(x, weight, bias)
    return _forward(x.detach(), weight.detach(), bias)


def relu_linear_step(linear: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    """`relu_linear` of a layer without gradient, for rollouts: all that is the same in every step is looked at once, here."""
    weight, bias = (p if p is None else p.detach().contiguous() for p in (linear.weight, linear.bias))
    if not kernels.covers(weight, bias) or len(weight) > MOST_OUTPUTS:
        return lambda x: relu_linear(x, weight, bias)
    outputs, inputs = weight.shape
    forward, addresses = kernels.load(weight.dtype).linear_forward, (weight.data_ptr(), kernels.address(bias))

    def step(x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 2 or x.shape[1] != inputs or x.dtype != weight.dtype or not x.is_contiguous() or x.requires_grad:
            return relu_linear(x, weight, bias)
        rows = len(x)
        y = x.new_empty(rows, outputs)
        threads = kernels.threads_for(rows * inputs * outputs)
        forward(rows, inputs, outputs, x.data_ptr(), *addresses, y.data_ptr(), threads)
        return y

    return step


def _forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    (outputs, inputs), rows = weight.shape, x.numel() // x.shape[-1]
    x, weight, bias = (t if t is None else t.contiguous() for t in (x, weight, bias))
    y = x.new_empty(*x.shape[:-1], outputs)
    kernels.load(x.dtype).linear_forward(
        *(rows, inputs, outputs, x.data_ptr(), weight.data_ptr(), kernels.address(bias), y.data_ptr()),
        kernels.threads_for(rows * inputs * outputs),
    )
    return y


class _ReLULinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _forward(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight = (tensor.contiguous() for tensor in ctx.saved_tensors)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        d_weight, d_bias = torch.empty_like(weight), weight.new_empty(len(weight))
        relu_linear_gradients(x, weight, dy, dx, d_weight, d_bias)
        return dx, d_weight, d_bias if ctx.has_bias else None


def relu_linear_gradients(x, weight, dy, dx, d_weight, d_bias) -> None:
    """Writes the gradients of `relu_linear` into ``dx`` (None: it is not needed), ``d_weight`` and ``d_bias``, by the kernels."""
    (outputs, inputs), dy = weight.shape, dy.contiguous()
    rows = dy.numel() // outputs
    require_tensor("dy", dy, (*x.shape[:-1], outputs), x)
    require_plain("x", x, (*x.shape[:-1], inputs), x)
    require_plain("weight", weight, weight.shape, x)
    for name, out, shape in (("dx", dx, x.shape), ("d_weight", d_weight, weight.shape), ("d_bias", d_bias, (outputs,))):
        if out is not None:
            require_plain(name, out, shape, x)
    kernels.load(x.dtype).linear_backward(
        *(rows, inputs, outputs, x.data_ptr(), weight.data_ptr(), dy.data_ptr(), kernels.address(dx)),
        *(d_weight.data_ptr(), d_bias.data_ptr(), kernels.threads_for(2 * rows * inputs * outputs)),
    )
