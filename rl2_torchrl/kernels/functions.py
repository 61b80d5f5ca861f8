"""Linear layers, and `log_prob_and_entropy` of choices, by kernels in one pass each way."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import NoReturn

import torch
from torch import Tensor

from rl2_torchrl import kernels
from rl2_torchrl.kernels.recording import Recording
from rl2_torchrl.kernels.workspace import Workspace

__all__ = [
    *("as_reals", "categorical_gradient", "categorical_terms", "contiguous", "differentiable_gradients", "is_small"),
    *("largest", "layout_of", "linear_gradients", "linear_kernel", "log_prob_and_entropy", "out_of_autocast"),
    *("raise_unknown_actions", "require_tensor", "unit_stride"),
]


# --------------------------------------------------------------------- doors
def require_tensor(name: str, tensor: Tensor, shape: Sequence[int], like: Tensor) -> None:
    """Raises unless ``tensor`` has ``shape`` and the device and dtype of ``like``.

    A kernel reads as many numbers of one dtype as it is told, and asks nothing.
    """
    if tensor.shape != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be {tuple(shape)}.")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, and what it is used with on {like.device}: move one of them.")
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} is {tensor.dtype}, and what it is used with {like.dtype}: convert one of them.")


def layout_of(tensor: Tensor) -> tuple:
    """What a kernel that has been called with a tensor must know of another one, to read it in its place."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def unit_stride(tensor: Tensor) -> Tensor:
    """``tensor`` detached, with its last dimension contiguous."""
    tensor = tensor.detach()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else contiguous(tensor)


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """``tensor``, contiguous, or None for None."""
    return tensor if tensor is None or tensor.is_contiguous() else Recording.made(tensor.contiguous)


def as_reals(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the dtype of ``like``; uint8, as in images, is scaled to [0, 1]."""
    return x.to(like.dtype) / 255 if x.dtype == torch.uint8 else x.to(like.dtype)


def out_of_autocast(function: Callable) -> Callable:
    """``function`` of a `torch.autograd.Function`, where autocast would cast what its products are written to otherwise.

    `torch.amp.custom_fwd` does that too, and costs a tenth of a GRU's step where there is no autocast.
    """

    @wraps(function)
    def run(*args):
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return function(*args)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args)

    return run


def differentiable_gradients(
    function: Callable[..., Tensor | Sequence[Tensor]], inputs: Sequence, needed: Sequence[bool], *slopes: Tensor
) -> tuple[Tensor | None, ...]:
    """For a backward under ``create_graph``: gradients by those of ``inputs`` that are ``needed``, themselves differentiable.

    ``function`` is what the kernels compute, by PyTorch's operations; ``slopes`` are the gradients by its outputs.
    """
    # Aliases, since an input may have been made of another one, as a memory is of the weights.
    inputs = [x.view_as(x) if is_needed else x for x, is_needed in zip(inputs, needed, strict=True)]
    leaves = [x for x, is_needed in zip(inputs, needed, strict=True) if is_needed]
    found = iter(torch.autograd.grad(function(*inputs), leaves, slopes, create_graph=True, allow_unused=True))
    return tuple(next(found) if is_needed else None for is_needed in needed)


# ------------------------------------------------------------- linear layers
def is_small(weight: Tensor) -> bool:
    """Whether a layer is one for the kernels; a larger one is a matrix library's own field."""
    return 0 < len(weight) <= 256 and weight.numel() <= 2**15


def linear_kernel(weight: Tensor, bias: Tensor | None, *, relu: bool) -> Callable[[Tensor], Tensor]:
    """A linear layer that `is_small`, with ReLU before it or not, by the kernel; it makes no graph.

    ``x`` is contiguous, in the dtype of ``weight``.
    """
    weight, bias = contiguous(weight.detach()), contiguous(None if bias is None else bias.detach())
    (outputs, inputs), kernel = weight.shape, kernels.load(weight.dtype).linear_forward

    def forward(x: Tensor) -> Tensor:
        rows, y = x.numel() // inputs, Workspace.make(weight, (*x.shape[:-1], outputs))
        entries = map(kernels.address, (x, weight, bias, y))
        kernel(rows, inputs, outputs, relu, *entries, kernels.threads_for(rows * inputs * outputs))
        return y

    return forward


def linear_gradients(x, weight, dy, dx, d_weight, d_bias, *, relu: bool) -> None:
    """Writes the gradients of `linear_kernel` into ``dx`` (None: it is not needed), ``d_weight`` and ``d_bias``."""
    (outputs, inputs), dy = weight.shape, contiguous(dy)
    rows = dy.numel() // outputs
    require_tensor("dy", dy, (*x.shape[:-1], outputs), x)  # which a part of a user's may have given
    addresses = map(kernels.address, (x, weight, dy, dx, d_weight, d_bias))
    threads = kernels.threads_for(2 * rows * inputs * outputs)
    kernels.load(x.dtype).linear_backward(rows, inputs, outputs, relu, *addresses, threads)


# --------------------------------------------------------------- categorical
def log_prob_and_entropy(action: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """``log p(action)`` and ``H = -sum p log p``, ``[*B]``, with p = softmax(logits); an impossible choice adds 0 to H.

    Their gradients by the logits ``[*B, num_actions]`` are ``1_action - p`` and ``-p (log p + H)``.
    """
    # The kernels read as many actions as there are rows.
    if (action.shape, action.device) != (logits.shape[:-1], logits.device):
        raise ValueError(
            f"actions {tuple(action.shape)} on {action.device} for logits {tuple(logits.shape)} on {logits.device}: give one a "
            "row, [*B], on the same device."
        )
    action = action.long()
    return (_CategoricalTerms.apply if kernels.covers(logits) else _categorical_by_torch)(action, logits)


def _categorical_by_torch(action: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    log_probs = logits.log_softmax(-1)
    finite = log_probs.clamp_min(torch.finfo(logits.dtype).min)
    return log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1), -(log_probs.exp() * finite).sum(-1)


class _CategoricalTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, action, logits):
        log_prob, entropy, log_total = categorical_terms(contiguous(action), contiguous(logits))
        ctx.save_for_backward(logits, action, entropy, log_total)
        return log_prob, entropy

    @staticmethod
    def backward(ctx, d_log_prob, d_entropy):
        if torch.is_grad_enabled():
            logits, action, *_ = ctx.saved_tensors
            slopes = (d_log_prob, d_entropy)
            return differentiable_gradients(_categorical_by_torch, (action, logits), ctx.needs_input_grad, *slopes)
        return None, categorical_gradient(*map(contiguous, (*ctx.saved_tensors, d_log_prob, d_entropy)))


def categorical_terms(action: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p(action), entropy and log sum exp(logits), ``[*B]`` each, by the kernels; ``action`` int64, both contiguous."""
    terms = tuple(Workspace.make(logits, logits.shape[:-1]) for _ in range(3))
    if kernels.load(logits.dtype).categorical_forward(*_rows(logits, action, *terms)):
        raise_unknown_actions(action, logits.shape[-1])
    return terms


def raise_unknown_actions(action: Tensor, num_actions: int) -> NoReturn:
    """Raises the IndexError that says which of ``action`` are none of the ``num_actions`` choices."""
    unknown = int(((action < 0) | (action >= num_actions)).sum())
    raise IndexError(
        f"{unknown} actions are none of the policy's {num_actions} choices, which count from 0; there are "
        f"{int(action.min())} to {int(action.max())}. Was the policy built for this env's action_spec?"
    )


def largest(logits: Tensor, noise: Tensor) -> Tensor | None:
    """The numbers ``[*B]`` of the largest of ``logits + noise`` ``[*B, num_actions]``; None where the kernel does not make them."""
    alike = (noise.shape, noise.dtype) == (logits.shape, logits.dtype)
    if not alike or not kernels.covers(logits, noise) or not (logits.is_contiguous() and noise.is_contiguous()):
        return None
    choice, choices = Workspace.make(logits, logits.shape[:-1], torch.int64), logits.shape[-1]
    addresses = map(kernels.address, (logits, noise, choice))
    kernels.load(logits.dtype).largest(logits.numel() // choices, choices, *addresses)
    return choice


def categorical_gradient(logits, action, entropy, log_total, d_log_prob, d_entropy) -> Tensor:
    """The gradient by ``logits`` ``[*B, num_actions]``, from those by log-probability and entropy ``[*B]``, None for 0."""
    d_logits = Workspace.make(logits, logits.shape)
    entries = (action, entropy, log_total, d_log_prob, d_entropy, d_logits)
    kernels.load(logits.dtype).categorical_backward(*_rows(logits, *entries))
    return d_logits


def _rows(logits: Tensor, *entries: Tensor) -> tuple:
    """Sizes, addresses and threads as the categorical kernels take them, which read one number of each entry for each row."""
    addresses = map(kernels.address, (logits, *entries))
    # An exponential and its sums are about 20 multiplications.
    threads = kernels.threads_for(20 * logits.numel())
    return logits.numel() // logits.shape[-1], logits.shape[-1], *addresses, threads
