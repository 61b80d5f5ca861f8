"""Parts that make log-probability and entropy of the actions from a distribution's parameters, and a Gaussian's parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey
from torch import nn

from rl2_torchrl import kernels
from rl2_torchrl.gradients.part import Gradients, Part, State, accumulate, entries_of
from rl2_torchrl.kernels.functions import categorical_gradient, categorical_terms, contiguous
from rl2_torchrl.kernels.recording import Recording
from rl2_torchrl.kernels.workspace import Workspace

__all__ = [
    *("ENTROPY", "LOG_PROB", "CategoricalPart", "GaussianHeadPart", "GaussianPart", "index_part", "log_scale_key"),
]

#: Entries ``[N, T]`` that loss terms read: log-probability of the collected actions, and entropy.
LOG_PROB, ENTROPY = ("policy", "log_prob"), ("policy", "entropy")


def log_scale_key(scale_key: NestedKey) -> NestedKey:
    """Entry of the logarithm ``[action_dim]`` of a scale that is the same in all steps, beside the scale ``[N, T, action_dim]``."""
    return ("policy", "log_scale", *(scale_key if isinstance(scale_key, tuple) else (scale_key,)))


#: Entry of the numbers ``[N, T]`` of actions, which may be one-hot vectors or of another dtype than the kernels read.
_INDEX = ("policy", "index")


def index_part(action_key: NestedKey) -> Part:
    """What makes them, of data alone, so that an update does it once."""
    return Part(_index_of, [action_key], [_INDEX])


def _index_of(action: torch.Tensor) -> torch.Tensor:
    if action.ndim == 2:
        return action.long()
    return (action.view(torch.uint8) if action.dtype == torch.bool else action).argmax(-1)


class CategoricalPart(Part):
    """Of a categorical distribution with logits ``[N, T, n]``; actions are indices ``[N, T]`` or one-hot vectors ``[N, T, n]``.

    An `index_part` stands before it.
    """

    def forward_by_hand(self, state: State) -> bool:
        action, logits = entries_of(state, self.in_keys)
        fits = action.shape in (logits.shape, logits.shape[:-1]) and action.is_cpu
        if not fits or not kernels.covers(logits):
            return False
        self._terms = (contiguous(logits), contiguous(state[_INDEX]))
        log_prob, *self._totals = categorical_terms(self._terms[1], self._terms[0])
        state.update(zip(self.out_keys, (log_prob, self._totals[0]), strict=False))
        return True

    def backward_by_hand(self, gradients: Gradients) -> None:
        slopes = [contiguous(gradients.pop(key, None)) for key in (LOG_PROB, ENTROPY)]
        accumulate(gradients, self.in_keys[1], categorical_gradient(*self._terms, *self._totals, *slopes))


class GaussianPart(Part):
    """Of independent normal distributions with mean and scale ``[N, T, action_dim]``.

    Where the scale's maker says its logarithm too (`log_scale_key`), it is the same in all steps, and so is its gradient's
    memory: ``[action_dim]``.
    """

    def forward_by_hand(self, state: State) -> bool:
        action, loc, scale = entries_of(state, self.in_keys)
        log_scale = state.get(log_scale_key(self.in_keys[2]))
        fits = (action.shape, action.dtype) == (loc.shape, loc.dtype) == (scale.shape, scale.dtype)
        fits = fits and log_scale is not None and log_scale.shape == loc.shape[-1:]
        if not fits or not kernels.covers(action, loc, log_scale):
            return False
        self._tensors = tuple(map(contiguous, (action, loc, log_scale)))
        made = [Workspace.make(loc, loc.shape[:-1]) for _ in self.out_keys]
        kernels.load(loc.dtype).gaussian_forward(*_addresses(*self._tensors, *made, None)[:7])
        state.update(zip(self.out_keys, made, strict=True))
        return True

    def backward_by_hand(self, gradients: Gradients) -> None:
        slopes = [contiguous(gradients.pop(key, None)) for key in (LOG_PROB, ENTROPY)]
        _, loc, log_scale = self._tensors
        d_loc, d_log_scale = (Workspace.make(entry, entry.shape) for entry in (loc, log_scale))
        kernels.load(loc.dtype).gaussian_backward(*_addresses(*self._tensors, *slopes, d_loc, d_log_scale))
        accumulate(gradients, self.in_keys[1], d_loc)
        accumulate(gradients, log_scale_key(self.in_keys[2]), d_log_scale)


def _addresses(action: torch.Tensor, *others: torch.Tensor | None) -> tuple[int | None, ...]:
    """Number of actions, their dimensions, and where all of these lie, as the Gaussian kernels take them."""
    size = action.shape[-1]
    return action.numel() // size, size, action.data_ptr(), *map(kernels.address, others)


def _scale(log_scale: torch.Tensor, loc: torch.Tensor) -> torch.Tensor:
    """``exp(log_scale)`` ``[action_dim]`` for each of ``loc`` ``[N, T, action_dim]``."""
    if not kernels.covers(loc, log_scale) or not log_scale.is_contiguous() or log_scale.shape != loc.shape[-1:]:
        return Recording.made(log_scale.exp).expand_as(loc)
    scale = Workspace.make(loc, loc.shape)
    rows, size, _, *addresses = _addresses(loc, log_scale, scale)
    kernels.load(loc.dtype).gaussian_scale(rows, size, *addresses)
    return scale


class GaussianHeadPart(Part):
    """``features -> (mean, exp(log_std))``.

    Args:
        module: both as a module.
        mean: the part that gives the mean.
        log_std: the scale's logarithm ``[action_dim]``.
        out_keys: entries of mean and scale ``[N, T, action_dim]``.
    """

    def __init__(self, module: nn.Module, mean: Part, log_std: nn.Parameter, out_keys: Sequence[NestedKey]):
        super().__init__(module, mean.in_keys, [*out_keys, log_scale_key(out_keys[1])])
        self.mean, self.log_std = mean, log_std

    def run(self, state: State) -> None:
        loc, scale, _ = self.out_keys
        state[loc], state[scale] = self.function(*[state[key] for key in self.in_keys])

    def forward_by_hand(self, state: State) -> bool:
        self.mean.wanted = self.wanted
        self.mean.forward(state)
        loc, scale, log_scale = self.out_keys
        state[log_scale] = self.log_std.detach()
        state[scale] = _scale(state[log_scale], state[loc])
        return True

    def backward_by_hand(self, gradients: Gradients) -> None:
        loc, *by_scale = self.out_keys
        by_scale, by_log = (gradients.pop(key, None) for key in by_scale)
        if by_log is not None:
            accumulate(gradients, self.log_std, by_log)
        if by_scale is not None:
            log_std = self.log_std.detach()
            slope = Recording.made(lambda: by_scale.flatten(0, -2).sum(0) * log_std.exp())
            accumulate(gradients, self.log_std, slope)
        if loc in gradients:
            self.mean.backward(gradients)
