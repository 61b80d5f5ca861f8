"""Families of distributions as functions of their parameters, for rollouts and losses: no object is made at every step.

Each gives the numbers of its class; `Family.act` draws what the class would draw under the same `torch.manual_seed`. A distribution
without a family of its own has the general one, `Family`, which makes the object.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import InteractionType, ProbabilisticTensorDictModule, set_interaction_type
from torch.distributions import Categorical, Distribution
from torchrl.modules import IndependentNormal, OneHotCategorical, TanhNormal

from rl2_torchrl.modules.categorical import log_prob_and_entropy

__all__ = [
    "CategoricalFamily",
    "Family",
    "NormalFamily",
    "OneHotFamily",
    "TanhNormalFamily",
    "family_of",
    "register_family",
]


class Family:
    """A distribution class as functions of its parameters.

    Args:
        distribution_class: a `torch.distributions.Distribution`.
        names: the keywords of its parameters.
        kwargs: further keywords.

    Examples:
        >>> family = Family(torch.distributions.Bernoulli, ["logits"], {})
        >>> family.mode(torch.tensor([-1.0, 1.0]))
        tensor([0., 1.])
    """

    def __init__(self, distribution_class: type[Distribution], names: Sequence[str], kwargs: Mapping[str, Any]):
        self.kwargs = dict(kwargs)
        self._module = ProbabilisticTensorDictModule(
            dict(zip(names, names, strict=True)),
            ["action"],
            distribution_class=distribution_class,
            distribution_kwargs=self.kwargs,
        )

    def act(self, *parameters: torch.Tensor) -> torch.Tensor:
        """A draw, by torch's default generator."""
        return self._sample(InteractionType.RANDOM, parameters)

    def sampler(self, steps: int) -> Callable[..., torch.Tensor]:
        """`act` for ``steps`` steps in a row, all of one shape; the noise of all of them may be drawn at once."""
        return self.act

    def mode(self, *parameters: torch.Tensor) -> torch.Tensor:
        """What deterministic interaction gives."""
        return self._sample(InteractionType.DETERMINISTIC, parameters)

    def log_prob_and_entropy(
        self, action: torch.Tensor, *parameters: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Both ``[*B]``, differentiable; the entropy is None where the class has none in closed form."""
        distribution = self._module.get_dist(self._entries(parameters))
        try:
            entropy = distribution.entropy()
        except NotImplementedError:
            entropy = None
        return distribution.log_prob(action), entropy

    def _sample(self, interaction: InteractionType, parameters: tuple[torch.Tensor, ...]) -> torch.Tensor:
        with set_interaction_type(interaction):
            return self._module(self._entries(parameters)).get("action")

    def _entries(self, parameters: tuple[torch.Tensor, ...]) -> TensorDict:
        return TensorDict(dict(zip(self._module.in_keys, parameters, strict=True)))


class CategoricalFamily(Family):
    """`torch.distributions.Categorical` with logits ``[*B, num_actions]``.

    `act` draws what the class would. `sampler` adds Gumbel noise, of which the largest sum wins: the same distribution from other
    numbers, at a sixth of the time, since its noise can be drawn for many steps at once.
    """

    def sampler(self, steps: int) -> Callable[..., torch.Tensor]:
        noise: Iterator[torch.Tensor] = iter(())

        def act(logits: torch.Tensor) -> torch.Tensor:
            nonlocal noise
            drawn = next(noise, None)
            if drawn is None:
                uniform = torch.empty(steps, *logits.shape, dtype=logits.dtype, device=logits.device).uniform_()
                noise = iter(uniform.log_().neg_().log_().neg_())
                drawn = next(noise)
            return self.mode(logits + drawn)

        return act

    def act(self, logits: torch.Tensor) -> torch.Tensor:
        # As torch.multinomial draws one: probabilities over exponential noise, the largest wins.
        noise = torch.empty_like(logits, memory_format=torch.contiguous_format).exponential_()
        return (logits.softmax(-1) / noise).argmax(-1)

    def mode(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(-1)

    def log_prob_and_entropy(self, action, logits):
        return log_prob_and_entropy(action, logits)


class OneHotFamily(CategoricalFamily):
    """`torchrl.modules.OneHotCategorical` with logits ``[*B, num_actions]``."""

    def act(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(super().act(logits), logits.shape[-1])

    def mode(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(super().mode(logits), logits.shape[-1])

    def log_prob_and_entropy(self, action, logits):
        return log_prob_and_entropy(action.to(torch.uint8).argmax(-1), logits)


class NormalFamily(Family):
    """`torchrl.modules.IndependentNormal` with loc and scale ``[*B, action_dim]``."""

    def act(self, loc: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(loc, memory_format=torch.contiguous_format).normal_().mul_(scale).add_(loc)

    def mode(self, loc: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return loc

    def log_prob_and_entropy(self, action, loc, scale):
        log_scale = scale.log() + 0.5 * math.log(2 * math.pi)
        return (-0.5 * ((action - loc) / scale).square() - log_scale).sum(-1), (log_scale + 0.5).sum(-1)


class TanhNormalFamily(NormalFamily):
    """`torchrl.modules.TanhNormal` with loc and scale ``[*B, action_dim]``, between ``low`` and ``high``."""

    def act(self, loc: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self._squashed(super().act(loc, scale))

    def mode(self, loc: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self._squashed(loc)

    def log_prob_and_entropy(self, action, loc, scale):
        middle, half = self._bounds(loc)
        limit = 1 - torch.finfo(loc.dtype).resolution
        before = ((action - middle) / half).clamp(-limit, limit).atanh()
        log_prob, _ = super().log_prob_and_entropy(before, loc, scale)
        # log |d tanh(x) / dx| = 2 (log 2 - x - softplus(-2 x))
        log_slope = 2 * (math.log(2) - before - torch.nn.functional.softplus(-2 * before))
        return log_prob - (log_slope + half.abs().log()).sum(-1), None

    def _squashed(self, x: torch.Tensor) -> torch.Tensor:
        middle, half = self._bounds(x)
        limit = 1 - torch.finfo(x.dtype).resolution
        return middle + half * x.tanh().clamp(-limit, limit)

    def _bounds(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Middle and half width of the range, made once for a device and dtype."""
        kind, bounds = getattr(self, "_made", (None, None))
        if kind != (like.device, like.dtype):
            low, high = (torch.as_tensor(self.kwargs.get(k, v)).to(like) for k, v in (("low", -1.0), ("high", 1.0)))
            kind, bounds = (like.device, like.dtype), ((high + low) / 2, (high - low) / 2)
            self._made = kind, bounds
        return bounds


# ------------------------------------------------------------------ registry
FamilyFactory = Callable[[type[Distribution], list[str], Mapping[str, Any]], Family | None]
_FACTORIES: dict[type[Distribution], FamilyFactory] = {}


def register_family(distribution_class: type[Distribution], factory: FamilyFactory) -> None:
    """Gives a distribution class a family of its own.

    Args:
        distribution_class: the class, exactly: what is derived from it may be another distribution.
        factory: ``(distribution_class, parameter names, further keywords)`` to a `Family`, or to None where these names or keywords
            ask for more than it knows; the general family serves then.

    Examples:
        >>> register_family(torch.distributions.Normal, lambda *args: Family(*args))
    """
    _FACTORIES[distribution_class] = factory


def family_of(module: ProbabilisticTensorDictModule) -> Family | None:
    """The family of a policy's probabilistic module; None for actions that are more than one tensor each.

    Examples:
        >>> module = ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=Categorical)
        >>> type(family_of(module)).__name__
        'CategoricalFamily'
    """
    distribution_class, kwargs = module.distribution_class, module.distribution_kwargs or {}
    actions = [key for key in module.out_keys if key not in module.log_prob_keys]
    is_class = isinstance(distribution_class, type) and issubclass(distribution_class, Distribution)
    if not is_class or len(actions) != 1 or module.num_samples is not None:
        return None
    names = [key if isinstance(key, str) else key[-1] for key in module.dist_keys]
    factory = _FACTORIES.get(distribution_class)
    family = factory(distribution_class, names, kwargs) if factory is not None else None
    return Family(distribution_class, names, kwargs) if family is None else family


def _factory(family: type[Family], names: list[str], known: set[str] = frozenset()) -> FamilyFactory:
    def make(distribution_class, its_names, kwargs):
        knows_all = its_names == names and known >= kwargs.keys()
        return family(distribution_class, its_names, kwargs) if knows_all else None

    return make


register_family(Categorical, _factory(CategoricalFamily, ["logits"]))
register_family(OneHotCategorical, _factory(OneHotFamily, ["logits"]))
register_family(IndependentNormal, _factory(NormalFamily, ["loc", "scale"]))
register_family(TanhNormal, _factory(TanhNormalFamily, ["loc", "scale"], {"low", "high"}))
