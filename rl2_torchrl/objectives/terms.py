"""Loss terms: PPO's own three, each with its gradient, and what a further one is.

A term is an `nn.Module` that reads named entries and returns named numbers:

    class FeatureNorm(nn.Module):
        in_keys = ["actor_features"]

        def forward(self, features):  # [N, T, hidden_size]
            size = features.square().mean()
            return {"loss_norm": 1e-3 * size, "feature_norm": size.detach()}

    loss = RL2PPOLoss(actor, critic, terms=[FeatureNorm()])

``in_keys`` are entries of the collected batch (also those that only training sees, such as ``"task"``: `PPOUpdate.in_keys`
holds them), of what the networks write (``"logits"``, ``"actor_features"``, ``"state_value"``), and ``("policy", "log_prob")`` and
``("policy", "entropy")``, those of the collected actions under the policy as it is now. ``forward`` takes them in that order,
``[N, T, ...]``. What it returns under a name that begins with ``loss_`` is added to the loss by `PPOUpdate`, coefficient
included (in a loop of your own, by you); every scalar reaches the log, as its mean over an update's minibatches, or their largest
where its name begins with ``max_``. Parameters of a term are the loss's, and trained with it. A loss that is called by keyword
gives of a term what its ``out_keys`` name, if it has some, and then each time.

Autograd makes a term's gradient, for that term alone. A term without parameters that knows it better derives from `OwnGradient`.
"""

import ctypes
from abc import ABC, abstractmethod

import torch
from tensordict import NestedKey
from torch import Tensor, nn

from rl2_torchrl import kernels
from rl2_torchrl.gradients.policy import ENTROPY, LOG_PROB, has_kernels

__all__ = ["ClippedObjective", "EntropyBonus", "OwnGradient", "SquaredError"]

_Totals = ctypes.c_double * 5


def as_number(value: Tensor) -> float | Tensor:
    """``value`` as Python's float; on a device that would have to be waited for, as it is."""
    return value.item() if value.is_cpu else value


class OwnGradient(nn.Module, ABC):
    """A term that gives one loss and its gradient by hand, from the entries ``in_keys``."""

    def __init__(self, in_keys: list[NestedKey]):
        super().__init__()
        self.in_keys = in_keys

    @abstractmethod
    def with_gradients(self, *entries: Tensor) -> tuple[dict[str, float | Tensor], tuple]:
        """Its one ``loss_...`` and diagnostics; and the loss's gradient by each of ``entries``, or None for one that has none.

        It is called without gradients; under ``create_graph`` once more with them, and what PyTorch's operations then give is
        differentiated itself.
        """

    def forward(self, *entries: Tensor) -> dict[str, Tensor]:
        """Loss and diagnostics, the loss with its gradient as autograd takes it."""
        with torch.no_grad():
            values, slopes = self.with_gradients(*entries)
        like = entries[0]
        values = {name: value.to(like) if isinstance(value, Tensor) else value for name, value in values.items()}
        numbers = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        if numbers:  # on a device there are none; one alone would cost as much as all of them
            values |= zip(numbers, like.new_tensor(list(numbers.values())).unbind(), strict=True)
        name = next(name for name in values if name.startswith("loss_"))
        values[name] = _WithGradients.apply(values[name], slopes, self, *entries)
        return values


class _WithGradients(torch.autograd.Function):
    """The number that is given, with the gradients that are given."""

    @staticmethod
    def forward(ctx, value, slopes, term, *entries):
        ctx.slopes, ctx.term, ctx.entries = slopes, term, entries
        return value.clone()

    @staticmethod
    def backward(ctx, slope):
        slopes = ctx.term.with_gradients(*ctx.entries)[1] if torch.is_grad_enabled() else ctx.slopes
        return None, None, None, *(None if own is None else own * slope for own in slopes)


class ClippedObjective(OwnGradient):
    """``-mean(min(r A, clip(r) A))`` with r = p / p_old (Schulman et al. 2017, eq. 7), and how far the policy has moved.

    ``log_low`` and ``log_high`` are the logarithms of the lowest and the highest ratio. The gradient by log p is ``-r A / N`` where
    ``r A`` is the smaller (within the clip both are the same), 0 elsewhere. The diagnostics are `ClipPPOLoss`'s:
    ``clip_fraction``, ``kl_approx``, ``mean_ratio``, ``max_ratio`` and ``ESS`` ``[T]``.
    """

    def __init__(self, log_low: float, log_high: float, old_log_prob_key="action_log_prob", advantage_key="advantage"):
        super().__init__([LOG_PROB, old_log_prob_key, advantage_key])
        self.log_low, self.log_high = log_low, log_high

    def with_gradients(self, log_prob, old_log_prob, advantage):
        advantage = advantage.squeeze(-1)
        if log_prob.ndim != 2 or not log_prob.shape == old_log_prob.shape == advantage.shape:
            shapes = [tuple(entry.shape) for entry in (log_prob, old_log_prob, advantage)]
            raise ValueError(
                f"log-probabilities, old ones and advantages must be of one shape [N, T], of several actions summed, not {shapes}."
            )
        by_kernels = not torch.is_grad_enabled() and has_kernels(log_prob, old_log_prob, advantage)
        active, figures = (self._by_kernels if by_kernels else self._by_torch)(log_prob, old_log_prob, advantage)
        return figures, (active.mul_(-1 / log_prob.numel()), None, None)

    def _by_torch(self, log_prob, old_log_prob, advantage):
        log_ratio = log_prob - old_log_prob
        clipped, ratio = log_ratio.clamp(self.log_low, self.log_high), log_ratio.exp()
        gain, bound = ratio * advantage, clipped.exp() * advantage
        objective = torch.minimum(gain, bound)
        figures = {
            "loss_objective": -objective.mean(),
            "clip_fraction": (clipped != log_ratio).to(ratio.dtype).mean(),
            "kl_approx": -log_ratio.mean(),
            "mean_ratio": ratio.mean(),
            "max_ratio": ratio.max(),
            "ESS": ratio.sum(0).square() / ratio.square().sum(0) / len(ratio),
        }
        return torch.where(gain > bound, 0.0, gain), figures

    def _by_kernels(self, log_prob, old_log_prob, advantage):
        inputs = [entry.contiguous() for entry in (log_prob, old_log_prob, advantage)]
        active, ratio, totals = torch.empty_like(inputs[0]), torch.empty_like(inputs[0]), _Totals()
        ess = active.new_empty(active.shape[1])
        outputs = (*map(kernels.address, (active, ratio, ess)), ctypes.addressof(totals))
        kernels.load(log_prob.dtype).clipped_objective(
            *log_prob.shape, *map(kernels.address, inputs), self.log_low, self.log_high, *outputs
        )
        size, (objective, clipped, kl, ratios, largest) = log_prob.numel(), totals
        figures = {"loss_objective": -objective / size, "clip_fraction": clipped / size, "kl_approx": kl / size}
        return active, figures | {"mean_ratio": ratios / size, "max_ratio": largest, "ESS": ess}


class SquaredError(OwnGradient):
    """``coefficient * mean((v - R)²)``, of values and targets ``[N, T, 1]``."""

    def __init__(self, coefficient: float, value_key="state_value", target_key="value_target"):
        super().__init__([value_key, target_key])
        self.coefficient = coefficient

    def with_gradients(self, value, target):
        if value.shape != target.shape:
            raise ValueError(f"values {tuple(value.shape)}, targets {tuple(target.shape)}: give one shape [N, T, 1].")
        error, factor = value - target, self.coefficient / value.numel()
        flat = error.flatten()
        return {"loss_critic": as_number(torch.dot(flat, flat)) * factor}, (error.mul_(2 * factor), None)


class EntropyBonus(OwnGradient):
    """``-coefficient * mean(H)``, H the policy's entropy ``[N, T]``."""

    def __init__(self, coefficient: float):
        super().__init__([ENTROPY])
        self.coefficient = coefficient

    def with_gradients(self, entropy):
        mean = as_number(entropy.mean())
        slope = torch.empty_like(entropy, memory_format=torch.contiguous_format)
        slope.fill_(-self.coefficient / entropy.numel())
        return {"loss_entropy": -self.coefficient * mean, "entropy": mean}, (slope,)
