"""`log_prob_and_entropy` of a categorical distribution, in one pass each way."""

from __future__ import annotations

from typing import NoReturn

import torch

from rl2_torchrl import kernels
from rl2_torchrl.modules.kernel_tensors import require_plain

__all__ = ["categorical_gradient", "categorical_terms", "log_prob_and_entropy", "raise_unknown_actions"]


def log_prob_and_entropy(action: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``log p(action)`` and ``H = -sum p log p``, ``[*B]``, with p = softmax(logits); an impossible choice adds 0 to H.

    Their gradients by the logits are ``1_action - p`` and ``-p (log p + H)``. Without compiled kernels for the device and dtype,
    both are made of PyTorch's operations.
    """
    # The kernels read as many actions as there are rows.
    if action.shape != logits.shape[:-1]:
        raise ValueError(
            f"actions {tuple(action.shape)} for logits {tuple(logits.shape)}: there must be one a row, [*B]."
        )
    action = action.long()
    if not kernels.covers(logits):
        log_probs = logits.log_softmax(-1)
        finite = log_probs.clamp_min(torch.finfo(logits.dtype).min)
        return log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1), -(log_probs.exp() * finite).sum(-1)
    return _CategoricalTerms.apply(action, logits)


class _CategoricalTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, action, logits):
        action, logits = action.contiguous(), logits.contiguous()
        log_prob, entropy, log_total = categorical_terms(action, logits)
        ctx.save_for_backward(logits, action, entropy, log_total)
        return log_prob, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_log_prob, d_entropy):
        return None, categorical_gradient(*ctx.saved_tensors, d_log_prob.contiguous(), d_entropy.contiguous())


def categorical_terms(action: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log p(action), entropy and log sum exp(logits), ``[*B]`` each, by the kernels; ``action`` int64, both contiguous."""
    _require_rows(logits, action)
    log_prob, entropy, log_total = (logits.new_empty(logits.shape[:-1]) for _ in range(3))
    unknown = kernels.load(logits.dtype).categorical_forward(
        *_sizes(logits), *map(kernels.address, (logits, action, log_prob, entropy, log_total)), _threads(logits)
    )
    if unknown:
        raise_unknown_actions(action, logits.shape[-1])
    return log_prob, entropy, log_total


def raise_unknown_actions(action: torch.Tensor, num_actions: int) -> NoReturn:
    """Raises the IndexError that says which of ``action`` are none of the ``num_actions`` choices."""
    unknown = int(((action < 0) | (action >= num_actions)).sum())
    raise IndexError(
        f"{unknown} actions are none of the policy's {num_actions} choices, which count from 0; there are "
        f"{int(action.min())} to {int(action.max())}. Was the policy built for this env's action_spec?"
    )


def categorical_gradient(logits, action, entropy, log_total, d_log_prob, d_entropy) -> torch.Tensor:
    """The gradient by ``logits`` ``[*B, num_actions]``, from those by log-probability and entropy ``[*B]``."""
    d_logits = torch.empty_like(logits)
    _require_rows(logits, action, entropy=entropy, log_total=log_total, d_log_prob=d_log_prob, d_entropy=d_entropy)
    tensors = (logits, action, entropy, log_total, d_log_prob, d_entropy, d_logits)
    kernels.load(logits.dtype).categorical_backward(*_sizes(logits), *map(kernels.address, tensors), _threads(logits))
    return d_logits


def _require_rows(logits: torch.Tensor, action: torch.Tensor, **entries: torch.Tensor) -> None:
    """The kernels read one number of each entry for each row of ``logits``."""
    require_plain("logits", logits, logits.shape, logits)
    require_plain("action", action, logits.shape[:-1], logits.new_empty(0, dtype=torch.int64))
    for name, entry in entries.items():
        require_plain(name, entry, logits.shape[:-1], logits)


def _sizes(logits: torch.Tensor) -> tuple[int, int]:
    return logits.numel() // logits.shape[-1], logits.shape[-1]


def _threads(logits: torch.Tensor) -> int:
    # An exponential and its sums are about 20 multiplications.
    return kernels.threads_for(20 * logits.numel())
