"""Families of distributions as functions of their parameters, for rollouts and losses: no object is made at every step.

Each gives the numbers of its class; `Family.act` draws what the class would draw under the same `torch.manual_seed`. A distribution
without a family of its own has `GeneralFamily`, which calls the module itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import InteractionType, ProbabilisticTensorDictModule, set_interaction_type
from torch.distributions import Categorical, Distribution
from torchrl.modules import IndependentNormal, OneHotCategorical, TanhNormal

from rl2_torchrl.modules.categorical import log_prob_and_entropy

__all__ = ["CategoricalFamily", "Family", "family_of", "register_family"]


class Family:
    """A distribution class as functions of its parameters; derive yours from it and `register_family` it.

    Attributes:
        names: the keywords of the class's parameters, in the order in which the functions take them.
        keywords: further keywords of the class that the family's constructor takes.

    Examples:
        >>> class PoissonFamily(Family):  # then register_family(torch.distributions.Poisson, PoissonFamily)
        ...     names = ("rate",)
        ...     def act(self, rate):
        ...         return torch.poisson(rate)
        >>> PoissonFamily().act(torch.zeros(3))
        tensor([0., 0., 0.])
    """

    names: tuple[str, ...] = ()
    keywords: tuple[str, ...] = ()

    def act(self, *parameters: torch.Tensor) -> torch.Tensor:
        """A draw, by torch's default generator."""
        raise NotImplementedError

    def sampler(self, steps: int) -> Callable[..., torch.Tensor]:
        """`act` for ``steps`` steps in a row, all of one shape; the noise of all of them may be drawn at once."""
        return self.act

    def mode(self, *parameters: torch.Tensor) -> torch.Tensor:
        """What deterministic interaction gives."""
        raise NotImplementedError

    def log_prob_and_entropy(
        self, action: torch.Tensor, *parameters: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Both ``[*B]``, differentiable; the entropy is None where the class has none in closed form."""
        raise NotImplementedError


class GeneralFamily(Family):
    """Whatever distribution a probabilistic module makes."""

    def __init__(self, module: ProbabilisticTensorDictModule):
        self.module = module

    def act(self, *parameters: torch.Tensor) -> torch.Tensor:
        return self._sample(InteractionType.RANDOM, parameters)

    def mode(self, *parameters: torch.Tensor) -> torch.Tensor:
        return self._sample(InteractionType.DETERMINISTIC, parameters)

    def log_prob_and_entropy(self, action, *parameters):
        distribution = self.module.get_dist(self._entries(parameters))
        try:
            entropy = distribution.entropy()
        except NotImplementedError:
            entropy = None
        return distribution.log_prob(action), entropy

    def _sample(self, interaction: InteractionType, parameters: tuple[torch.Tensor, ...]) -> torch.Tensor:
        with set_interaction_type(interaction):
            return self.module(self._entries(parameters)).get(self.module.out_keys[0])

    def _entries(self, parameters: tuple[torch.Tensor, ...]) -> TensorDict:
        return TensorDict(dict(zip(self.module.in_keys, parameters, strict=True)))


class CategoricalFamily(Family):
    """`torch.distributions.Categorical` with logits ``[*B, num_actions]``.

    `act` draws what the class would. `sampler` adds Gumbel noise, of which the largest sum wins: the same distribution from other
    numbers, at a sixth of the time, since its noise can be drawn for many steps at once.
    """

    names = ("logits",)
    _noise: torch.Tensor | None = None

    def sampler(self, steps: int) -> Callable[..., torch.Tensor]:
        noise: Iterator[torch.Tensor] = iter(())

        def act(logits: torch.Tensor) -> torch.Tensor:
            nonlocal noise
            drawn = next(noise, None)
            if drawn is None:
                noise = iter(self._noise_like(steps, logits).uniform_().log_().neg_().log_().neg_())
                drawn = next(noise)
            return self.mode(logits + drawn)

        return act

    def _noise_like(self, steps: int, logits: torch.Tensor) -> torch.Tensor:
        """Memory ``[steps, *B, num_actions]``, the same for every batch."""
        shape, kept = (steps, *logits.shape), self._noise
        if kept is None or (kept.shape, kept.dtype, kept.device) != (shape, logits.dtype, logits.device):
            self._noise = torch.empty(shape, dtype=logits.dtype, device=logits.device)
        return self._noise

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
        return _one_hot(super().act(logits), logits)

    def mode(self, logits: torch.Tensor) -> torch.Tensor:
        return _one_hot(super().mode(logits), logits)

    def log_prob_and_entropy(self, action, logits):
        return log_prob_and_entropy(action.to(torch.uint8).argmax(-1), logits)


def _one_hot(index: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    # `torch.nn.functional.one_hot` looks for choices that are none first, which costs more than the rest.
    return torch.zeros_like(logits, dtype=torch.int64).scatter_(-1, index.unsqueeze(-1), 1)


class NormalFamily(Family):
    """`torchrl.modules.IndependentNormal` with loc and scale ``[*B, action_dim]``."""

    names = ("loc", "scale")

    def act(self, loc: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(loc, memory_format=torch.contiguous_format).normal_().mul_(scale).add_(loc)

    def mode(self, loc: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return loc

    def log_prob_and_entropy(self, action, loc, scale):
        log_scale = scale.log() + 0.5 * math.log(2 * math.pi)
        return (-0.5 * ((action - loc) / scale).square() - log_scale).sum(-1), (log_scale + 0.5).sum(-1)


class TanhNormalFamily(NormalFamily):
    """`torchrl.modules.TanhNormal` with loc and scale ``[*B, action_dim]``, between ``low`` and ``high``."""

    keywords = ("low", "high")

    def __init__(self, low: Any = -1.0, high: Any = 1.0):
        low, high = torch.as_tensor(low), torch.as_tensor(high)
        self.middle, self.half = (high + low) / 2, (high - low) / 2

    def act(self, loc: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.mode(super().act(loc, scale), scale)

    def mode(self, loc: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        limit = self._limit(loc)
        return self.middle + self.half * loc.tanh().clamp(-limit, limit)

    def log_prob_and_entropy(self, action, loc, scale):
        limit = self._limit(loc)
        before = ((action - self.middle) / self.half).clamp(-limit, limit).atanh()
        log_prob, _ = super().log_prob_and_entropy(before, loc, scale)
        # log |d tanh(x) / dx| = 2 (log 2 - x - softplus(-2 x))
        log_slope = 2 * (math.log(2) - before - torch.nn.functional.softplus(-2 * before))
        return log_prob - (log_slope + self.half.log()).sum(-1), None

    def _limit(self, like: torch.Tensor) -> float:
        # Kept on the device of what comes: a copy at every step would wait for the device.
        if self.middle.device != like.device:
            self.middle, self.half = self.middle.to(like.device), self.half.to(like.device)
        return 1 - torch.finfo(like.dtype).resolution


# ------------------------------------------------------------------ registry
_FAMILIES: dict[type[Distribution], type[Family]] = {
    Categorical: CategoricalFamily,
    OneHotCategorical: OneHotFamily,
    IndependentNormal: NormalFamily,
    TanhNormal: TanhNormalFamily,
}


def register_family(distribution_class: type[Distribution], family: type[Family]) -> None:
    """Gives ``distribution_class`` (exactly: what is derived from it may be another distribution) a family of its own.

    Examples:
        >>> class Constant(Family):
        ...     names = ("loc",)
        >>> register_family(torch.distributions.HalfCauchy, Constant)
    """
    _FAMILIES[distribution_class] = family


def family_of(module: ProbabilisticTensorDictModule) -> Family | None:
    """The family of a policy's probabilistic module; None for actions that are more than one tensor each.

    Examples:
        >>> module = ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=Categorical)
        >>> type(family_of(module)).__name__
        'CategoricalFamily'
    """
    actions = [key for key in module.out_keys if key not in module.log_prob_keys]
    if len(actions) != 1 or module.num_samples is not None:
        return None
    family, kwargs = _FAMILIES.get(module.distribution_class), module.distribution_kwargs or {}
    names = tuple(key if isinstance(key, str) else key[-1] for key in module.dist_keys)
    if family is None or names != family.names or not kwargs.keys() <= {*family.keywords}:
        return GeneralFamily(module)
    return family(**kwargs)
