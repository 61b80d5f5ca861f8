"""Parts that make log-probability and entropy of the actions from a distribution's parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import NestedKey
from tensordict.nn import ProbabilisticTensorDictModule

from rl2_torchrl import kernels
from rl2_torchrl.gradients.part import AutogradPart, State, accumulate, entries_of
from rl2_torchrl.modules.categorical import categorical_gradient, categorical_terms
from rl2_torchrl.modules.families import CategoricalFamily, Family, NormalFamily, OneHotFamily, family_of

__all__ = [
    "ENTROPY",
    "LOG_PROB",
    "CategoricalPart",
    "GaussianPart",
    "has_kernels",
    "log_scale_key",
    "policy_part",
    "register_policy_part",
]

#: Entries ``[N, T]`` that loss terms read: log-probability of the collected actions, and entropy.
LOG_PROB, ENTROPY = ("policy", "log_prob"), ("policy", "entropy")

#: Entropy of a normal distribution of standard deviation 1.
_NORMAL_ENTROPY = 1.4189385332046727

_PARTS: dict[type[Family], type[AutogradPart]] = {}


def register_policy_part(family: type[Family], part: type[AutogradPart]) -> None:
    """Lets ``part`` take the policies of ``family``, exactly: it is made as `AutogradPart` is, of the action and the parameters."""
    _PARTS[family] = part


def policy_part(
    sample: ProbabilisticTensorDictModule, action_key: NestedKey, *, entropy: bool, like: torch.Tensor | None
) -> AutogradPart:
    """The part that writes ``("policy", "log_prob")`` and, where ``entropy`` is asked for, ``("policy", "entropy")``.

    Args:
        sample: the policy's last module, which has the distribution.
        action_key: entry of the collected actions.
        entropy: whether anybody reads the entropy.
        like: one of the policy's parameters, if it has any: of the device and dtype that its distribution will have.
    """
    family = family_of(sample)
    known = like is not None and has_kernels(like)
    part = _PARTS.get(type(family), AutogradPart) if known else AutogradPart
    in_keys, out_keys = [action_key, *sample.in_keys], [LOG_PROB, ENTROPY] if entropy else [LOG_PROB]
    made = part(_terms_of(family, entropy), in_keys, out_keys)
    if part is AutogradPart:
        missing = "brings no gradient of its own" if known else "has no kernels here"
        made.reason = f"{sample.distribution_class.__name__} {missing}"
    return made


def _terms_of(family: Family, entropy: bool) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Log-probability and, where it is asked for, entropy ``[N, T]`` under autograd."""

    def terms(action: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        log_prob, its_entropy = family.log_prob_and_entropy(action, *parameters)
        if not entropy:
            return (log_prob,)
        if its_entropy is None:  # no closed form: from one draw, as ClipPPOLoss takes it
            its_entropy = -family.log_prob_and_entropy(family.act(*parameters), *parameters)[0]
        return log_prob, its_entropy

    return terms


class CategoricalPart(AutogradPart):
    """Of a categorical distribution with logits ``[N, T, num_actions]``; actions are indices ``[N, T]``."""

    kind = "kernel"

    def forward(self, state: State) -> None:
        action, logits = entries_of(state, self.in_keys)
        action = self.index_of(action)
        self._by_kernels = action.shape == logits.shape[:-1] and has_kernels(logits)
        if not self._by_kernels:
            super().forward(state)
            return
        self._terms = (logits.contiguous(), action.long().contiguous())
        log_prob, *self._totals = categorical_terms(self._terms[1], self._terms[0])
        state.update(zip(self.out_keys, (log_prob, self._totals[0]), strict=False))

    def index_of(self, action: torch.Tensor) -> torch.Tensor:
        """The number of the choice ``[N, T]``."""
        return action

    def backward(self, state: State, gradients: State) -> None:
        if not self._by_kernels:
            super().backward(state, gradients)
            return
        slopes = [gradients.pop(key, None) for key in (LOG_PROB, ENTROPY)]
        slopes = [torch.zeros_like(self._totals[0]) if slope is None else slope.contiguous() for slope in slopes]
        accumulate(gradients, self.in_keys[1], categorical_gradient(*self._terms, *self._totals, *slopes))


class OneHotPart(CategoricalPart):
    """As `CategoricalPart`; actions are one-hot vectors ``[N, T, num_actions]``."""

    def index_of(self, action: torch.Tensor) -> torch.Tensor:
        return (action.view(torch.uint8) if action.dtype == torch.bool else action).argmax(-1)


def log_scale_key(scale_key: NestedKey) -> NestedKey:
    """Entry of the logarithm ``[action_dim]`` of a scale that is the same in all steps, beside the scale ``[N, T, action_dim]``."""
    return ("policy", "log_scale", *(scale_key if isinstance(scale_key, tuple) else (scale_key,)))


class GaussianPart(AutogradPart):
    """Of independent normal distributions with mean and scale ``[N, T, action_dim]``.

    Where the scale's maker says its logarithm too (`log_scale_key`), it is the same in all steps, and so is its gradient's
    memory: ``[action_dim]``.
    """

    kind = "kernel"

    def __init__(self, function: Callable, in_keys: Sequence[NestedKey], out_keys: Sequence[NestedKey]):
        super().__init__(function, in_keys, out_keys)
        self._log_key = log_scale_key(in_keys[2])

    def forward(self, state: State) -> None:
        action, loc, scale = entries_of(state, self.in_keys)
        log_scale = state.get(self._log_key)
        fits = (action.shape, action.dtype) == (loc.shape, loc.dtype) == (scale.shape, scale.dtype)
        self._by_kernels = log_scale is not None and fits and has_kernels(loc)
        if not self._by_kernels:
            super().forward(state)
            return
        self._tensors = (action.contiguous(), loc.contiguous(), log_scale.contiguous())
        state[LOG_PROB] = loc.new_empty(loc.shape[:-1])
        tensors = map(kernels.address, (*self._tensors, state[LOG_PROB]))
        kernels.load(loc.dtype).gaussian_forward(*_sizes(loc), *tensors)
        if ENTROPY in self.out_keys:
            state[ENTROPY] = (log_scale + _NORMAL_ENTROPY).sum().expand(loc.shape[:-1])

    def backward(self, state: State, gradients: State) -> None:
        if not self._by_kernels:
            super().backward(state, gradients)
            return
        slope, by_entropy = (gradients.pop(key, None) for key in (LOG_PROB, ENTROPY))
        action, loc, log_scale = self._tensors
        slope = loc.new_zeros(loc.shape[:-1]) if slope is None else slope.contiguous()
        d_loc, d_log_scale = torch.empty_like(loc), torch.empty_like(log_scale)
        tensors = map(kernels.address, (action, loc, log_scale, slope, d_loc, d_log_scale))
        kernels.load(loc.dtype).gaussian_backward(*_sizes(loc), *tensors)
        if by_entropy is not None:
            d_log_scale.add_(by_entropy.sum())
        accumulate(gradients, self.in_keys[1], d_loc)
        accumulate(gradients, self._log_key, d_log_scale)


def has_kernels(*entries: torch.Tensor) -> bool:
    """Whether the kernels read ``entries``: all of one dtype that they know, on the CPU."""
    dtype = entries[0].dtype
    return all(entry.dtype is dtype and entry.is_cpu for entry in entries) and kernels.load(dtype) is not None


def _sizes(loc: torch.Tensor) -> tuple[int, int]:
    return loc.numel() // loc.shape[-1], loc.shape[-1]


register_policy_part(CategoricalFamily, CategoricalPart)
register_policy_part(OneHotFamily, OneHotPart)
register_policy_part(NormalFamily, GaussianPart)
