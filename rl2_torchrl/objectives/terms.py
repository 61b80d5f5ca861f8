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
``("policy", "entropy")``, those of the collected actions under the policy as it is now. A memory (``"actor_hidden"``) is the
batch's, as it was before each step, and carries no gradient. ``forward`` takes them in that order,
``[N, T, ...]``. What it returns under a name that begins with ``loss_`` is added to the loss by `PPOUpdate`, coefficient
included (in a loop of your own, by you); every scalar reaches the log, as its mean over an update's minibatches, or their largest
where its name begins with ``max_``. Parameters of a term are the loss's, and trained with it. A loss that is called by keyword
gives of a term what its ``out_keys`` name, if it has some, and then each time. Where a term has a loss in some minibatches and
none in others, all modules and terms may be asked twice for one minibatch of a batch.

Autograd makes a term's gradient, for that term alone.
"""

from abc import ABC, abstractmethod

import torch
from tensordict import NestedKey
from torch import Tensor, nn

from rl2_torchrl import kernels
from rl2_torchrl.gradients.policy import ENTROPY, LOG_PROB
from rl2_torchrl.gradients.program import Values
from rl2_torchrl.kernels.functions import contiguous
from rl2_torchrl.kernels.recording import Recording
from rl2_torchrl.kernels.workspace import Workspace

__all__ = ["ClippedObjective", "EntropyBonus", "KernelTerm", "SquaredError"]


def as_number(value: Tensor) -> float | Tensor:
    """``value`` as Python's float; on a device that would have to be waited for, as it is."""
    return value.item() if value.is_cpu else value


class KernelTerm(nn.Module, ABC):
    """One of PPO's own terms: one loss and its gradient, by kernels where they read the entries ``in_keys``, else by PyTorch."""

    def __init__(self, in_keys: list[NestedKey]):
        super().__init__()
        self.in_keys = in_keys

    def with_gradients(self, *entries: Tensor) -> tuple[Values, tuple]:
        """Its one ``loss_...`` and diagnostics; and the loss's gradient by each of ``entries``, or None for one that has none.

        It is called without gradients; under ``create_graph`` once more with them, and what PyTorch's operations then give is
        differentiated itself.
        """
        self.require_shapes(*entries)
        if torch.is_grad_enabled() or not kernels.covers(*entries):
            return self.by_torch(*entries)
        totals, slopes, more = self.by_kernels(*entries)
        return {**self.figures(totals.tolist(), entries[0]), **more}, slopes

    def forward(self, *entries: Tensor) -> dict[str, Tensor]:
        """Loss and diagnostics, the loss with its gradient as autograd takes it."""
        with torch.no_grad():
            values, slopes = self.with_gradients(*entries)
        device, dtype = (
            entries[0].device,
            torch.promote_types(entries[0].dtype, torch.float32),
        )  # halves would round them
        values = {name: v.to(device, dtype) if isinstance(v, Tensor) else v for name, v in values.items()}
        numbers = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        if numbers:  # on a device there are none; one alone would cost as much as all of them
            made = torch.tensor(list(numbers.values()), device=device, dtype=dtype)
            values |= zip(numbers, made.unbind(), strict=True)
        name = next(name for name in values if name.startswith("loss_"))
        values[name] = _WithGradients.apply(values[name], slopes, self, *entries)
        return values

    def require_shapes(self, *entries: Tensor) -> None:
        """ValueError where ``entries`` do not fit each other."""

    @abstractmethod
    def by_torch(self, *entries: Tensor) -> tuple[Values, tuple]:
        """`with_gradients` by PyTorch."""

    @abstractmethod
    def by_kernels(self, *entries: Tensor) -> tuple[Tensor, tuple, dict[str, Tensor]]:
        """By kernels alone: what `figures` reads, float64, the gradients, and diagnostics that are no single number."""

    @abstractmethod
    def figures(self, totals: list[float], like: Tensor) -> dict[str, float]:
        """Loss and diagnostics from the ``totals`` of as many steps as ``like`` ``[N, T, ...]`` has."""


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


class ClippedObjective(KernelTerm):
    """``-mean(min(r A, clip(r) A))`` with r = p / p_old (Schulman et al. 2017, eq. 7), and how far the policy has moved.

    ``log_low`` and ``log_high`` are the logarithms of the lowest and the highest ratio. The gradient by log p is ``-r A / N`` where
    ``r A`` is the smaller (within the clip both are the same), 0 elsewhere. The diagnostics are `ClipPPOLoss`'s:
    ``clip_fraction``, ``kl_approx``, ``mean_ratio``, ``max_ratio`` and ``ESS`` ``[T]``.
    """

    def __init__(self, log_low: float, log_high: float, old_log_prob_key="action_log_prob", advantage_key="advantage"):
        super().__init__([LOG_PROB, old_log_prob_key, advantage_key])
        self.log_low, self.log_high = log_low, log_high

    def require_shapes(self, log_prob, old_log_prob, advantage):
        shapes = [tuple(entry.shape) for entry in (log_prob, old_log_prob, advantage.squeeze(-1))]
        if log_prob.ndim != 2 or len(set(shapes)) > 1:
            raise ValueError(
                f"log-probabilities, old ones and advantages must be of one shape [N, T], not {shapes}: those of an "
                "action's dimensions add up, torch.distributions.Independent(..., 1)."
            )

    def by_torch(self, log_prob, old_log_prob, advantage):
        log_ratio, advantage = log_prob - old_log_prob, advantage.squeeze(-1)
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
        return figures, (torch.where(gain > bound, 0.0, gain).mul_(-1 / log_prob.numel()), None, None)

    def by_kernels(self, log_prob, old_log_prob, advantage):
        inputs = [contiguous(entry) for entry in (log_prob, old_log_prob, advantage)]
        slope, ratio = (Workspace.make(log_prob, log_prob.shape) for _ in range(2))
        ess, totals = Workspace.make(log_prob, log_prob.shape[1:]), Recording.numbers_for(5)
        bounds = float(self.log_low), float(self.log_high), -1 / log_prob.numel()
        outputs = map(kernels.address, (slope, ratio, ess, totals))
        kernels.load(log_prob.dtype).clipped_objective(
            *log_prob.shape, *map(kernels.address, inputs), *bounds, *outputs
        )
        return totals, (slope, None, None), {"ESS": ess}

    def figures(self, totals, like):
        objective, clipped, kl, ratios, largest = totals
        size = like.numel()
        figures = {"loss_objective": -objective / size, "clip_fraction": clipped / size, "kl_approx": kl / size}
        return figures | {"mean_ratio": ratios / size, "max_ratio": largest}


class SquaredError(KernelTerm):
    """``coefficient * mean((v - R)²)``, of values and targets ``[N, T, 1]``."""

    def __init__(self, coefficient: float, value_key="state_value", target_key="value_target"):
        super().__init__([value_key, target_key])
        self.coefficient = coefficient

    def require_shapes(self, value, target):
        if value.shape != target.shape:
            raise ValueError(f"values {tuple(value.shape)}, targets {tuple(target.shape)}: give one shape [N, T, 1].")

    def by_torch(self, value, target):
        error, factor = value - target, self.coefficient / value.numel()
        flat = error.flatten()
        return {"loss_critic": as_number(torch.dot(flat, flat)) * factor}, (error.mul_(2 * factor), None)

    def by_kernels(self, value, target):
        inputs, factor = (contiguous(value), contiguous(target)), 2 * self.coefficient / value.numel()
        slope, totals = Workspace.make(value, value.shape), Recording.numbers_for(1)
        run = kernels.load(value.dtype).squared_error
        run(value.numel(), *map(kernels.address, inputs), float(factor), *map(kernels.address, (slope, totals)))
        return totals, (slope, None), {}

    def figures(self, totals, like):
        return {"loss_critic": totals[0] * self.coefficient / like.numel()}


class EntropyBonus(KernelTerm):
    """``-coefficient * mean(H)``, H the policy's entropy ``[N, T]``."""

    def __init__(self, coefficient: float):
        super().__init__([ENTROPY])
        self.coefficient = coefficient

    def by_torch(self, entropy):
        mean = as_number(entropy.mean())
        slope = torch.empty_like(entropy, memory_format=torch.contiguous_format)
        slope.fill_(-self.coefficient / entropy.numel())
        return {"loss_entropy": -self.coefficient * mean, "entropy": mean}, (slope,)

    def by_kernels(self, entropy):
        entropy, factor = contiguous(entropy), -self.coefficient / entropy.numel()
        slope, totals = Workspace.make(entropy, entropy.shape), Recording.numbers_for(1)
        run = kernels.load(entropy.dtype).entropy_sum
        run(entropy.numel(), entropy.data_ptr(), float(factor), slope.data_ptr(), totals.data_ptr())
        return totals, (slope,), {}

    def figures(self, totals, like):
        mean = totals[0] / like.numel()
        return {"loss_entropy": -self.coefficient * mean, "entropy": mean}
