"""The distribution of a policy, its last slot: `ActionDistribution` says how a head's outputs become an action.

`Family`, `family_of` and `register_family` (file `families.py`) are what rollouts and losses call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import index
from typing import Any

import torch
from tensordict import NestedKey
from torch import nn
from torch.distributions import Categorical, Distribution, constraints
from torchrl.data import Binary, MultiCategorical, MultiOneHot, OneHot, TensorSpec
from torchrl.data import Categorical as CategoricalSpec
from torchrl.modules import IndependentNormal, OneHotCategorical, TanhNormal

from rl2_torchrl.gradients.gaussian import GaussianHeadPart
from rl2_torchrl.gradients.part import runs
from rl2_torchrl.modules.families import CategoricalFamily, Family, family_of, register_family

__all__ = [
    "ActionDistribution",
    "CategoricalActions",
    "Family",
    "Gaussian",
    "GaussianActions",
    "IndependentCategoricals",
    "MultiCategoricalActions",
    "TanhGaussianActions",
    "family_of",
    "register_family",
]


class ActionDistribution:
    """How a head's outputs become an action.

    Args:
        num_outputs: outputs of the head.
        parameter_keys: entries of the distribution's parameters, named as its constructor names them.
        distribution_class: a `torch.distributions.Distribution`.
        distribution_kwargs: further keywords of the class.

    Examples:
        >>> from torch.distributions import Bernoulli, Independent
        >>> laplace = ActionDistribution(1, ["loc"], torch.distributions.Laplace, {"scale": 0.1})
    """

    def __init__(
        self,
        num_outputs: int,
        parameter_keys: Sequence[str],
        distribution_class: type[Distribution],
        distribution_kwargs: Mapping[str, Any] | None = None,
    ):
        self.num_outputs, self.parameter_keys = index(num_outputs), list(parameter_keys)
        self.distribution_class, self.distribution_kwargs = distribution_class, dict(distribution_kwargs or {})

    def parameters_of(self, head: nn.Module, **factory) -> nn.Module:
        """``head`` with what makes the distribution's parameters of its outputs; ``factory`` is device and dtype."""
        return head

    @classmethod
    def from_spec(cls, spec: TensorSpec) -> ActionDistribution:
        """What fits the actions ``spec`` of one row: categorical choices, several of them, or a Gaussian for reals.

        Raises:
            TypeError: there is none.

        Examples:
            >>> ActionDistribution.from_spec(MultiCategorical([3, 2])).num_outputs
            5
        """
        if isinstance(spec, MultiCategorical | MultiOneHot | Binary):
            return MultiCategoricalActions.from_spec(spec)
        if isinstance(spec, CategoricalSpec | OneHot):
            return CategoricalActions.from_spec(spec)
        if spec.dtype.is_floating_point:
            return GaussianActions.from_spec(spec)
        raise TypeError(
            f"the env's actions are whole numbers of a range ({spec}), for which there is no distribution here: give the env a "
            "Discrete or MultiDiscrete action space, or the actor a distribution=."
        )


class CategoricalActions(ActionDistribution):
    """One of ``num_actions`` choices, ``[*B]``, or as a one-hot vector ``[*B, num_actions]``.

    Args:
        num_actions: number of choices.
        one_hot: whether the action is a one-hot vector, as TorchRL's `GymEnv` has it. Default False.

    Examples:
        >>> CategoricalActions(5).num_outputs
        5
    """

    def __init__(self, num_actions: int, *, one_hot: bool = False):
        self.one_hot = one_hot
        super().__init__(num_actions, ["logits"], OneHotCategorical if one_hot else Categorical)

    @classmethod
    def from_spec(cls, spec: TensorSpec) -> CategoricalActions:
        """Of the number of choices and the encoding of ``spec``."""
        is_one = isinstance(spec, CategoricalSpec | OneHot)
        if (
            not is_one
            or isinstance(spec, MultiCategorical | MultiOneHot | Binary)
            or spec.ndim > isinstance(spec, OneHot)
        ):
            raise TypeError(
                f"the env's actions are not one categorical choice ({spec}): use GRUGaussianActor for reals, and "
                "RecurrentActor for several choices at once."
            )
        return cls(spec.space.n, one_hot=isinstance(spec, OneHot))


class MultiCategoricalActions(ActionDistribution):
    """Several choices at once, each from its own number, independent given the memory.

    Args:
        nvec: number of choices in each place, as in Gymnasium's ``MultiDiscrete(nvec)``.
        one_hot: whether the action is the one-hot vectors end to end, ``[*B, sum(nvec)]``, in place of ``[*B, len(nvec)]``. Default
            False.
        dtype: of the action. Default `torch.int64`.

    Examples:
        >>> MultiCategoricalActions((3, 2)).num_outputs
        5
    """

    def __init__(self, nvec: Sequence[int], *, one_hot: bool = False, dtype: torch.dtype = torch.int64):
        nvec = tuple(map(index, nvec))
        kwargs = {"nvec": nvec, "one_hot": one_hot, "dtype": dtype}
        super().__init__(sum(nvec), ["logits"], IndependentCategoricals, kwargs)

    @classmethod
    def from_spec(cls, spec: TensorSpec) -> MultiCategoricalActions:
        """Of the numbers of choices and the encoding of ``spec``; a `Binary` spec is a choice of two in each place."""
        if isinstance(spec, Binary) and spec.ndim == 1:
            return cls((2,) * spec.shape[0], dtype=spec.dtype)
        if not isinstance(spec, MultiCategorical | MultiOneHot) or spec.ndim != 1:
            raise TypeError(f"the env's actions are not a vector of categorical choices ({spec}).")
        return cls([int(n) for n in spec.nvec], one_hot=isinstance(spec, MultiOneHot), dtype=spec.dtype)


class GaussianActions(ActionDistribution):
    """Reals ``[*B, action_dim]`` around the head's output, with a learnable scale that does not depend on the state.

    Args:
        action_dim: dimensions of the action.
        init_log_std: first value of every component of the scale's logarithm. Default -0.5.

    Examples:
        >>> GaussianActions(2).parameter_keys
        ['loc', 'scale']
    """

    def __init__(self, action_dim: int, *, init_log_std: float = -0.5):
        self.init_log_std = float(init_log_std)
        super().__init__(action_dim, ["loc", "scale"], IndependentNormal)

    def parameters_of(self, head: nn.Module, **factory) -> nn.Module:
        return Gaussian(head, self.num_outputs, self.init_log_std, **factory)

    @classmethod
    def from_spec(cls, spec: TensorSpec, **kwargs) -> GaussianActions:
        """Of the size of ``spec``."""
        return cls(_real_vector(spec).shape[0], **kwargs)


class TanhGaussianActions(GaussianActions):
    """A Gaussian squashed by tanh into the range of the actions, so that none lies outside it.

    Args:
        low: lower bounds ``[action_dim]``.
        high: upper bounds ``[action_dim]``.
        init_log_std: as in `GaussianActions`. Default -0.5.

    Examples:
        >>> from rl2_torchrl.modules import RecurrentActor
        >>> actor = RecurrentActor(5, TanhGaussianActions([-2.0], [2.0]))
    """

    def __init__(
        self, low: torch.Tensor | Sequence[float], high: torch.Tensor | Sequence[float], *, init_log_std: float = -0.5
    ):
        low, high = (torch.as_tensor(bound, dtype=torch.get_default_dtype()) for bound in (low, high))
        if low.ndim != 1 or low.shape != high.shape or not (low < high).all() or not (high - low).isfinite().all():
            raise ValueError(
                f"low={low} and high={high} must be vectors [action_dim] with low < high, all finite: tanh squashes into a range. "
                "For unbounded actions use GaussianActions."
            )
        super().__init__(len(low), init_log_std=init_log_std)
        self.distribution_class, self.distribution_kwargs = TanhNormal, {"low": low, "high": high}

    @classmethod
    def from_spec(cls, spec: TensorSpec, **kwargs) -> TanhGaussianActions:
        """Of the bounds of ``spec``."""
        space = _real_vector(spec).space
        return cls(space.low, space.high, **kwargs)


def _real_vector(spec: TensorSpec) -> TensorSpec:
    if not spec.dtype.is_floating_point:
        raise TypeError(
            f"the env's actions are discrete ({spec}): use GRUCategoricalActor, or RecurrentActor for several."
        )
    if spec.ndim != 1:
        raise TypeError(
            f"the env's actions have shape {tuple(spec.shape)} each, not [action_dim]: reshape them with a transform "
            "(for a scalar: UnsqueezeTransform with in_keys_inv)."
        )
    return spec


class Gaussian(nn.Module):
    """``features -> (mean, exp(log_std))``, both ``[*B, action_dim]``."""

    def __init__(self, mean: nn.Module, action_dim: int, init_log_std: float, device=None, dtype=None):
        super().__init__()
        self.mean = mean
        self.log_std = nn.Parameter(torch.full((action_dim,), float(init_log_std), device=device, dtype=dtype))

    def forward(self, *features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = self.mean(*features)
        return mean, self.log_std.exp().expand_as(mean)

    def step_function(self) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
        """`forward` of one step without gradient, for a rollout: made anew whenever the weights have changed."""
        if not runs(self, Gaussian):
            return self
        mean_of = self.mean.step_function() if hasattr(self.mean, "step_function") else self.mean
        scale = self.log_std.detach().exp()

        def step(*features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            mean = mean_of(*features)
            return mean, scale.expand_as(mean)

        return step

    def gradient_part(self, in_keys: Sequence[NestedKey], out_keys: Sequence[NestedKey]) -> GaussianHeadPart | None:
        """The part of a PPO step that this is, with its own gradient; None where the mean has none."""
        mean = self.mean.gradient_part(in_keys, out_keys[:1]) if hasattr(self.mean, "gradient_part") else None
        return (
            GaussianHeadPart(self, mean, self.log_std, out_keys) if mean is not None and runs(self, Gaussian) else None
        )


# ---------------------------------------------------------- several categoricals
class IndependentCategoricals(Distribution):
    """Several categorical choices, ``[*B, len(nvec)]``, whose log-probabilities and entropies add up.

    Args:
        logits: ``[*B, sum(nvec)]``, one place's after the other's.
        nvec: number of choices in each place.
        one_hot: whether a value is the one-hot vectors end to end, ``[*B, sum(nvec)]``. Default False.
        dtype: of values. Default `torch.int64`.

    Examples:
        >>> choices = IndependentCategoricals(torch.zeros(4, 5), nvec=(3, 2))
        >>> choices.sample().shape, choices.log_prob(choices.mode).shape
        (torch.Size([4, 2]), torch.Size([4]))
    """

    arg_constraints = {"logits": constraints.independent(constraints.real, 1)}

    def __init__(
        self, logits: torch.Tensor, nvec: Sequence[int], one_hot: bool = False, dtype: torch.dtype = torch.int64
    ):
        self.logits, self.family = logits, MultiCategoricalFamily(nvec, one_hot, dtype)
        super().__init__(logits.shape[:-1], torch.Size([sum(nvec) if one_hot else len(nvec)]), validate_args=False)

    def sample(self, sample_shape: Sequence[int] = ()) -> torch.Tensor:
        return self.family.act(self.logits.detach().expand(*sample_shape, *self.logits.shape))

    @property
    def mode(self) -> torch.Tensor:
        """The most probable choice in each place."""
        return self.family.mode(self.logits)

    @property
    def deterministic_sample(self) -> torch.Tensor:
        """What TorchRL's deterministic interaction gives: `mode`."""
        return self.mode

    def log_prob(self, value: torch.Tensor) -> torch.Tensor:
        return self.family.log_prob_and_entropy(value, self.logits)[0]

    def entropy(self) -> torch.Tensor:
        return self.family.log_prob_and_entropy(self.mode, self.logits)[1]


class MultiCategoricalFamily(CategoricalFamily):
    """`IndependentCategoricals` with logits ``[*B, sum(nvec)]``."""

    keywords = ("nvec", "one_hot", "dtype")

    def __init__(self, nvec: Sequence[int], one_hot: bool = False, dtype: torch.dtype = torch.int64):
        self.nvec, self.one_hot, self.dtype = list(nvec), one_hot, dtype

    def act(self, logits: torch.Tensor) -> torch.Tensor:
        return self._encoded([super(MultiCategoricalFamily, self).act(part) for part in logits.split(self.nvec, -1)])

    def mode(self, logits: torch.Tensor) -> torch.Tensor:
        return self._encoded([super(MultiCategoricalFamily, self).mode(part) for part in logits.split(self.nvec, -1)])

    def log_prob_and_entropy(self, action, logits):
        if self.one_hot:
            action = torch.stack([part.to(torch.uint8).argmax(-1) for part in action.split(self.nvec, -1)], -1)
        base, parts = super(), zip(action.unbind(-1), logits.split(self.nvec, -1), strict=True)
        terms = [base.log_prob_and_entropy(choice, part) for choice, part in parts]
        return sum(log_prob for log_prob, _ in terms), sum(entropy for _, entropy in terms)

    def _encoded(self, choices: list[torch.Tensor]) -> torch.Tensor:
        if self.one_hot:
            parts = zip(choices, self.nvec, strict=True)
            return torch.cat([nn.functional.one_hot(choice, n) for choice, n in parts], -1).to(self.dtype)
        return torch.stack(choices, -1).to(self.dtype)


register_family(IndependentCategoricals, MultiCategoricalFamily)
