"""The distribution of a policy, its last slot: how a head's outputs become an action, and what rollouts and losses ask of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property, partial
from itertools import groupby
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDict
from tensordict.nn import CompositeDistribution, InteractionType, ProbabilisticTensorDictModule, set_interaction_type
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, constraints
from torchrl.data import Binary, Bounded, MultiCategorical, MultiOneHot, OneHot, TensorSpec
from torchrl.data import Categorical as CategoricalSpec
from torchrl.modules import IndependentNormal, OneHotCategorical, TanhNormal

from rl2_torchrl.arguments import require_flags, require_own_name, whole, whole_numbers
from rl2_torchrl.gradients import policy
from rl2_torchrl.gradients.chain import ChainPart
from rl2_torchrl.gradients.part import Part, brings, others_than
from rl2_torchrl.kernels.functions import largest, log_prob_and_entropy
from rl2_torchrl.kernels.recording import Recording

__all__ = [
    *("ActionDistribution", "CategoricalActions", "Gaussian", "GaussianActions", "IndependentCategoricals"),
    *("MultiCategoricalActions", "TanhGaussianActions", "distribution_named", "distribution_of"),
    *("gumbel_", "register_distribution", "require_asked"),
]

log = logging.getLogger(__name__)

#: Log-probability ``[*B]``, and entropy ``[*B]``, None where it has no closed form.
Terms = tuple[Tensor, Tensor | None]


class ActionDistribution:
    """How a head's outputs become an action, and a distribution class as functions of its parameters ``[*B, n]``.

    Rollouts and losses call these functions, so that no object is made at every step. Here they ask the class; what is derived
    gives the class's numbers, and under the same `torch.manual_seed` its draws, in less time (`register_distribution`). A class
    with another `act` or `log_prob_and_entropy` than the one above it inherits no `sampler`, `noise` and `part`, which are other
    forms of these.

    Args:
        num_outputs: outputs of the head.
        parameter_keys: entries of the distribution's parameters, named as its constructor names them.
        distribution_class: a `torch.distributions.Distribution` whose log-probability is one number ``[*B]``: `Independent` adds
            those of several dimensions up.
        distribution_kwargs: further keywords of the class.

    Attributes:
        part: the `rl2_torchrl.gradients.Part` that brings the gradient of `log_prob_and_entropy`; None: autograd's.
        noise: what `with_noise` turns into a draw: ``"gumbel"`` or ``"normal"``, standard ones; None: it cannot.

    Examples:
        >>> class Laplaces(torch.distributions.Independent):
        ...     def __init__(self, loc, scale):
        ...         super().__init__(torch.distributions.Laplace(loc, scale), 1)
        >>> ActionDistribution(2, ["loc"], Laplaces, {"scale": 0.1}).mode(torch.ones(2))
        tensor([1., 1.])
    """

    part: type[Part] | None = None
    noise: Literal["gumbel", "normal"] | None = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        other_forms = {"part": ["log_prob_and_entropy"], "noise": ["act"], "sampler": ["act", "mode"]}
        for name, methods in other_forms.items():  # another class of several, such as a mixin, may bring the methods
            brings = next(base for base in cls.__mro__ if name in vars(base))
            if any(getattr(cls, method) is not getattr(brings, method) for method in methods):
                setattr(cls, name, vars(ActionDistribution)[name])

    def __init__(
        self,
        num_outputs: int,
        parameter_keys: Sequence[str],
        distribution_class: type[Distribution],
        distribution_kwargs: Mapping[str, Any] | None = None,
    ):
        self.num_outputs, self.parameter_keys = whole("num_outputs", num_outputs), list(parameter_keys)
        self.distribution_class, self.distribution_kwargs = distribution_class, dict(distribution_kwargs or {})

    @classmethod
    def from_spec(cls, spec: TensorSpec) -> ActionDistribution:
        """What fits the actions ``spec`` of one row: categorical choices, several of them, or a Gaussian for reals."""
        if isinstance(spec, MultiOneHot) or (isinstance(spec, CategoricalSpec) and spec.ndim):
            return MultiCategoricalActions.from_spec(spec)
        if isinstance(spec, CategoricalSpec | OneHot):
            return CategoricalActions.from_spec(spec)
        return GaussianActions.from_spec(spec)

    def parameters_of(self, head: nn.Module, **factory) -> nn.Module:
        """``head`` with what makes the distribution's parameters of its outputs; ``factory`` is device and dtype."""
        return head

    def act(self, *parameters: Tensor) -> Tensor:
        """A draw, by torch's default generator."""
        return self._sample(InteractionType.RANDOM, parameters)

    def sampler(self, steps: int) -> Callable[..., Tensor]:
        """`act` for ``steps`` steps in a row, all of one shape; the noise of all of them may be drawn at once."""
        return self.act

    def with_noise(self, noise: Tensor, *parameters: Tensor) -> Tensor:
        """The draw that ``noise`` ``[*B, num_outputs]``, of the kind ``noise``, makes; that of zeros is the `mode`."""
        raise NotImplementedError(f"{type(self).__name__} does not say how noise becomes an action.")

    def mode(self, *parameters: Tensor) -> Tensor:
        """What deterministic interaction gives."""
        return self._sample(InteractionType.DETERMINISTIC, parameters)

    def drawn_log_prob(self, *parameters: Tensor) -> Tensor:
        """The log-probability of a draw, differentiable: where the entropy has no closed form, minus this stands for it."""
        return self.log_prob_and_entropy(self.act(*parameters), *parameters)[0]

    def log_prob_and_entropy(self, action: Tensor, *parameters: Tensor) -> Terms:
        """Both, differentiable."""
        distribution = self._module.get_dist(self._entries(parameters))
        try:
            entropy = distribution.entropy()
        except NotImplementedError:
            entropy = None
        return distribution.log_prob(action), entropy

    @cached_property
    def _module(self) -> ProbabilisticTensorDictModule:
        options = {"distribution_class": self.distribution_class, "distribution_kwargs": self.distribution_kwargs}
        return ProbabilisticTensorDictModule(self.parameter_keys, ["action"], **options)

    def _sample(self, interaction: InteractionType, parameters: tuple[Tensor, ...]) -> Tensor:
        with set_interaction_type(interaction):
            return self._module(self._entries(parameters)).get(self._module.out_keys[0])

    def _entries(self, parameters: tuple[Tensor, ...]) -> TensorDict:
        return TensorDict(dict(zip(self._module.in_keys, parameters, strict=True)))


# ------------------------------------------------------------------- choices
class CategoricalActions(ActionDistribution):
    """One of ``num_actions`` choices, ``[*B]``, or as a one-hot vector ``[*B, num_actions]``.

    `act` draws what the class would. `sampler` adds Gumbel noise, of which the largest sum wins: the same distribution from other
    numbers, at a sixth of the time, since its noise can be drawn for many steps at once.

    Args:
        num_actions: number of choices.
        one_hot: whether the action is a one-hot vector, as TorchRL's `GymEnv` has it. Default False.

    Examples:
        >>> CategoricalActions(5).mode(torch.tensor([0.0, 1.0, 0.0, 3.0, 2.0]))
        tensor(3)
    """

    part = policy.CategoricalPart
    noise = "gumbel"
    _noise: Tensor | None = None

    def __init__(self, num_actions: int, *, one_hot: bool = False):
        require_flags(one_hot=one_hot)
        super().__init__(whole("num_actions", num_actions), ["logits"], OneHotCategorical if one_hot else Categorical)
        self.one_hot = one_hot

    @classmethod
    def from_spec(cls, spec: TensorSpec) -> CategoricalActions:
        """Of the number of choices and the encoding of ``spec``."""
        is_several = isinstance(spec, MultiCategorical | MultiOneHot | Binary) or spec.ndim > isinstance(spec, OneHot)
        is_one = isinstance(spec, CategoricalSpec | OneHot) and not is_several
        _require(is_one, spec, "not one categorical choice: use GRUGaussianActor for reals, RecurrentActor for several")
        return cls(spec.space.n, one_hot=isinstance(spec, OneHot))

    def act(self, logits: Tensor) -> Tensor:
        return self._action(_draw, logits)

    def mode(self, logits: Tensor) -> Tensor:
        return self._action(partial(torch.argmax, dim=-1), logits)

    def _action(self, choose: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
        choice = choose(logits)
        return _one_hot(choice, logits) if self.one_hot else choice

    def with_noise(self, noise: Tensor, logits: Tensor) -> Tensor:
        # Alone the kernel costs what PyTorch's two operations do.
        choice = largest(logits, noise) if Recording.active() is not None and self._is_largest() else None
        if choice is None:
            Recording.interrupt()
            choice = self.mode(logits + noise)
        return choice

    def _is_largest(self) -> bool:
        """Whether an action is no more than the number of the largest sum."""
        return not self.one_hot and not others_than(CategoricalActions, self, ["with_noise", "mode", "_action"])

    def log_prob_and_entropy(self, action: Tensor, logits: Tensor) -> Terms:
        return log_prob_and_entropy(action.to(torch.uint8).argmax(-1) if self.one_hot else action, logits)

    def sampler(self, steps: int) -> Callable[..., Tensor]:
        noise: Iterator[Tensor] = iter(())

        def draw(like: Tensor) -> Tensor:
            nonlocal noise
            drawn = next(noise, None)
            if drawn is None:
                shape, kept = (steps, *like.shape), self._noise
                dtype = torch.promote_types(like.dtype, torch.float32)  # halves have too few numbers for what is rare
                if kept is None or (kept.shape, kept.dtype, kept.device) != (shape, dtype, like.device):
                    self._noise = like.new_empty(shape, dtype=dtype)  # the same memory for every batch
                noise = iter(gumbel_(self._noise))
                drawn = next(noise)
            return drawn

        def act(logits: Tensor) -> Tensor:
            drawn = draw(logits)
            Recording.replaces(drawn, partial(draw, drawn))
            return self.with_noise(drawn, logits)

        act.is_kernels = self._is_largest()
        return act


class MultiCategoricalActions(CategoricalActions):
    """Several choices at once, each from its own number, independent given the memory.

    Args:
        nvec: number of choices in each place, as in Gymnasium's ``MultiDiscrete(nvec)``.
        one_hot: whether the action is the one-hot vectors end to end, ``[*B, sum(nvec)]``, in place of ``[*B, len(nvec)]``. Default
            False.
        dtype: of the action. Default `torch.int64`.

    Examples:
        >>> MultiCategoricalActions((3, 2)).mode(torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0]))
        tensor([1, 0])
    """

    def __init__(self, nvec: Sequence[int], *, one_hot: bool = False, dtype: torch.dtype = torch.int64):
        self.nvec, self.dtype = whole_numbers("nvec", nvec), dtype
        super().__init__(sum(self.nvec), one_hot=one_hot)
        self.distribution_class = IndependentCategoricals
        self.distribution_kwargs = {"nvec": tuple(self.nvec), "one_hot": one_hot, "dtype": dtype}

    @classmethod
    def from_spec(cls, spec: TensorSpec) -> MultiCategoricalActions:
        """Of the numbers of choices and the encoding of ``spec``; of one number, as a `Binary` spec has it, each place has that."""
        if isinstance(spec, CategoricalSpec) and not isinstance(spec, MultiCategorical) and spec.ndim == 1:
            return cls((spec.space.n,) * spec.shape[0], dtype=spec.dtype)
        is_vector = isinstance(spec, MultiCategorical | MultiOneHot) and spec.ndim == 1
        _require(is_vector, spec, "not a vector of categorical choices")
        return cls([int(n) for n in spec.nvec], one_hot=isinstance(spec, MultiOneHot), dtype=spec.dtype)

    def log_prob_and_entropy(self, action: Tensor, logits: Tensor) -> Terms:
        if self.one_hot:
            action = torch.cat([part.to(torch.uint8).argmax(-1) for part in self._alike(action)], -1)
        actions = action.split([part.shape[-2] for part in self._alike(logits)], -1)
        terms = [log_prob_and_entropy(*pair) for pair in zip(actions, self._alike(logits), strict=True)]
        log_probs, entropies = (torch.cat(each, -1).sum(-1) for each in zip(*terms, strict=True))
        return log_probs, entropies

    def _action(self, choose: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
        parts = self._alike(logits)
        if self.one_hot:
            return torch.cat([_one_hot(choose(part), part).flatten(-2) for part in parts], -1).to(self.dtype)
        return torch.cat([choose(part) for part in parts], -1).to(self.dtype)

    def _alike(self, choices: Tensor) -> list[Tensor]:
        """``choices`` ``[*B, sum(nvec)]`` as ``[*B, k, n]`` for each k places in a row of n choices: those are one call."""
        runs = [(n, len(list(places))) for n, places in groupby(self.nvec)]
        parts = choices.split([n * k for n, k in runs], -1)
        return [part.unflatten(-1, (k, n)) for part, (n, k) in zip(parts, runs, strict=True)]


def _draw(logits: Tensor) -> Tensor:
    # As torch.multinomial draws one: probabilities over exponential noise, the largest wins.
    noise = torch.empty_like(logits, memory_format=torch.contiguous_format).exponential_()
    return (logits.softmax(-1) / noise).argmax(-1)


def _one_hot(choice: Tensor, logits: Tensor) -> Tensor:
    # `torch.nn.functional.one_hot` looks for choices that are none first, which costs more than the rest.
    return torch.zeros_like(logits, dtype=torch.int64).scatter_(-1, choice.unsqueeze(-1), 1)


class IndependentCategoricals(Distribution):
    """Several categorical choices, ``[*B, len(nvec)]``, whose log-probabilities and entropies add up.

    Args:
        logits: ``[*B, sum(nvec)]``, one place's after the other's.
        **kwargs: ``nvec``, ``one_hot`` and ``dtype``, as in `MultiCategoricalActions`.

    Examples:
        >>> choices = IndependentCategoricals(torch.zeros(4, 5), nvec=(3, 2))
        >>> choices.sample().shape, choices.log_prob(choices.mode).shape
        (torch.Size([4, 2]), torch.Size([4]))
    """

    arg_constraints = {"logits": constraints.independent(constraints.real, 1)}

    def __init__(self, logits: Tensor, **kwargs):
        self.logits, self._kwargs, self._actions = logits, kwargs, MultiCategoricalActions(**kwargs)
        size = self._actions.num_outputs if self._actions.one_hot else len(self._actions.nvec)
        super().__init__(logits.shape[:-1], torch.Size([size]), validate_args=False)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self._actions.act(self.logits.detach().expand(*sample_shape, *self.logits.shape))

    @property
    def mode(self) -> Tensor:
        """The most probable choice in each place."""
        return self._actions.mode(self.logits)

    deterministic_sample = mode  # what TorchRL's deterministic interaction asks for

    def log_prob(self, value: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)  # of several draws, say
        return self._actions.log_prob_and_entropy(value.expand(*shape, -1), self.logits.expand(*shape, -1))[0]

    def entropy(self) -> Tensor:
        return self._actions.log_prob_and_entropy(self.mode, self.logits)[1]

    def expand(self, batch_shape: Sequence[int], _instance: None = None) -> IndependentCategoricals:
        return type(self)(self.logits.expand(*batch_shape, -1), **self._kwargs)


# --------------------------------------------------------------------- reals
class GaussianActions(ActionDistribution):
    """Reals ``[*B, action_dim]`` around the head's output, with a learnable scale that does not depend on the state.

    Args:
        action_dim: dimensions of the action.
        init_log_std: first value of every component of the scale's logarithm. Default -0.5.

    Examples:
        >>> GaussianActions(2).parameter_keys
        ['loc', 'scale']
    """

    part = policy.GaussianPart
    noise = "normal"

    def __init__(self, action_dim: int, *, init_log_std: float = -0.5):
        super().__init__(whole("action_dim", action_dim), ["loc", "scale"], IndependentNormal)
        self.init_log_std = float(init_log_std)

    @classmethod
    def from_spec(cls, spec: TensorSpec, **kwargs) -> GaussianActions:
        """Of the size of ``spec``; the log tells of bounds of another order than the first scale, which it would rarely meet."""
        made = cls(_real_vector(spec).shape[0], **kwargs)
        if isinstance(spec, Bounded):
            made._tell_of_bounds(spec.space.low, spec.space.high)
        return made

    def _tell_of_bounds(self, low: Tensor, high: Tensor) -> None:
        scale = math.exp(self.init_log_std)
        half, nearest = (high - low) / 2, torch.zeros_like(low).clamp(low, high).abs()
        far = half.isfinite() & ((half > 10 * scale) | (half < scale / 10) | (nearest > 3 * scale))
        if far.any():
            n = int(far.nonzero()[0])
            log.warning(
                "actions go from %g to %g, and the Gaussian begins around 0 with a scale of %.2g, cut off at the bounds: they "
                "would hardly be learnt. Give distribution=TanhGaussianActions.from_spec, or let the env take actions from -1 to 1 "
                "(gymnasium.wrappers.RescaleAction, TorchRL's ActionScaling).",
                low[n],
                high[n],
                scale,
            )

    def parameters_of(self, head: nn.Module, **factory) -> nn.Module:
        return Gaussian(head, self.num_outputs, self.init_log_std, **factory)

    def act(self, loc: Tensor, scale: Tensor) -> Tensor:
        noise = torch.empty_like(loc, memory_format=torch.contiguous_format).normal_()
        return self.with_noise(noise, loc, scale)

    def with_noise(self, noise: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        return self.mode(noise * scale + loc, scale)

    def mode(self, loc: Tensor, scale: Tensor) -> Tensor:
        return loc

    def log_prob_and_entropy(self, action: Tensor, loc: Tensor, scale: Tensor) -> Terms:
        log_scale = scale.log() + 0.5 * math.log(2 * math.pi)
        return (-0.5 * ((action - loc) / scale).square() - log_scale).sum(-1), (log_scale + 0.5).sum(-1)


class TanhGaussianActions(GaussianActions):
    """A Gaussian squashed by tanh between the bounds ``low`` and ``high`` ``[action_dim]``, its own in every env.

    Examples:
        >>> from rl2_torchrl.modules import RecurrentActor
        >>> actor = RecurrentActor(5, TanhGaussianActions([-2.0], [2.0]))
    """

    def __init__(self, low: Tensor | Sequence[float], high: Tensor | Sequence[float], *, init_log_std: float = -0.5):
        default = torch.get_default_dtype()
        low, high = (torch.atleast_1d(torch.as_tensor(bound, dtype=default)) for bound in (low, high))
        if low.ndim != 1 or low.shape != high.shape or not (low < high).all() or not (high - low).isfinite().all():
            raise ValueError(f"{low=} and {high=} must be vectors, low < high, all finite: else use GaussianActions.")
        super().__init__(len(low), init_log_std=init_log_std)
        self.distribution_class, self.distribution_kwargs = TanhNormal, {"low": low, "high": high}
        self._middle, self._half = (high + low) / 2, (high - low) / 2

    @classmethod
    def from_spec(cls, spec: TensorSpec, **kwargs) -> TanhGaussianActions:
        """Of the bounds of ``spec``."""
        space = _real_vector(spec).space
        return cls(space.low, space.high, **kwargs)

    def mode(self, loc: Tensor, scale: Tensor) -> Tensor:
        limit = self._limit(loc)
        return self._middle + self._half * loc.tanh().clamp(-limit, limit)

    def log_prob_and_entropy(self, action: Tensor, loc: Tensor, scale: Tensor) -> Terms:
        limit = self._limit(loc)
        before = ((action - self._middle) / self._half).clamp(-limit, limit).atanh()
        return self._log_prob_before(before, loc, scale), None

    def drawn_log_prob(self, loc: Tensor, scale: Tensor) -> Tensor:
        # As drawn, before tanh: at the bounds it rounds, and the entropy would rise where the mean runs away.
        self._limit(loc)
        return self._log_prob_before(torch.randn_like(loc) * scale + loc, loc, scale)

    def _log_prob_before(self, before: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        """The log-probability of tanh of ``before``, between the bounds."""
        log_prob, _ = super().log_prob_and_entropy(before, loc, scale)
        # log |d tanh(x) / dx| = 2 (log 2 - x - softplus(-2 x))
        log_slope = 2 * (math.log(2) - before - nn.functional.softplus(-2 * before))
        return log_prob - (log_slope + self._half.log()).sum(-1)

    def _limit(self, like: Tensor) -> float:
        # Kept on the device of what comes: a copy at every step would wait for the device.
        if self._middle.device != like.device:
            self._middle, self._half = self._middle.to(like.device), self._half.to(like.device)
        return 1 - torch.finfo(like.dtype).resolution


def gumbel_(noise: Tensor) -> Tensor:
    """Standard Gumbel noise in the memory of ``noise``, finite: a uniform number of 0 would forbid a choice, or allow all."""
    return noise.uniform_(torch.finfo(noise.dtype).tiny, 1).log_().neg_().log_().neg_()


def _real_vector(spec: TensorSpec) -> TensorSpec:
    _require(spec.dtype.is_floating_point, spec, "discrete: use GRUCategoricalActor, or RecurrentActor for several")
    shape = f"of shape {tuple(spec.shape)} each, not [action_dim]: reshape them (a scalar by UnsqueezeTransform, in_keys_inv)"
    _require(spec.ndim == 1, spec, shape)
    return spec


def _require(fits: bool, spec: TensorSpec, what: str) -> None:
    """Raises a TypeError that says ``what`` the actions ``spec`` of one row are, unless they fit."""
    if not spec.dtype.is_floating_point and not isinstance(spec, CategoricalSpec | OneHot | MultiOneHot | Binary):
        fits, what = False, "whole numbers of a range: give the env a Discrete space, or the actor a distribution="
    if not fits:
        raise TypeError(f"the env's actions are {what} ({spec}).")


class Gaussian(nn.Module):
    """``features -> (mean, exp(log_std))``, both ``[*B, action_dim]``."""

    def __init__(self, mean: nn.Module, action_dim: int, init_log_std: float, device=None, dtype=None):
        super().__init__()
        self.mean = mean
        self.log_std = nn.Parameter(torch.full((action_dim,), float(init_log_std), device=device, dtype=dtype))

    def forward(self, *features: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.mean(*features)
        return mean, self.log_std.exp().expand_as(mean)

    def step_function(self) -> Callable[..., tuple[Tensor, Tensor]]:
        mean_of = self.mean.step_function() if brings(self.mean, "step_function") else self.mean
        scale = Recording.made(self.log_std.detach().exp)

        def step(*features: Tensor) -> tuple[Tensor, Tensor]:
            mean = mean_of(*features)
            return mean, scale.expand_as(mean)

        step.is_kernels = getattr(mean_of, "is_kernels", False)
        return step

    def gradient_part(self, in_keys: Sequence[NestedKey], out_keys: Sequence[NestedKey]):
        mean = self.mean.gradient_part(in_keys, out_keys[:1]) if brings(self.mean, "gradient_part") else None
        # Kernels read as many scales as there are means, where forward takes one for all of them too.
        fits = not isinstance(mean, ChainPart) or self.log_std.shape == (mean.linears[-1].out_features,)
        return policy.GaussianHeadPart(self, mean, self.log_std, out_keys) if mean and fits else None


# ------------------------------------------------------------ of a policy's module
#: What has its own functions, of the class's further keywords. The head's size matters to nobody here: it is given as 1.
_KNOWN: dict[type[Distribution], Callable[..., ActionDistribution]] = {
    Categorical: lambda: CategoricalActions(1),
    OneHotCategorical: lambda: CategoricalActions(1, one_hot=True),
    IndependentCategoricals: MultiCategoricalActions,
    IndependentNormal: lambda: GaussianActions(1),
    TanhNormal: lambda low=-1.0, high=1.0: TanhGaussianActions(low, high),
}
_OURS = frozenset(_KNOWN)
#: What rollouts, losses and agents ask for.
_FUNCTIONS = ("act", "sampler", "with_noise", "mode", "drawn_log_prob", "log_prob_and_entropy")


def register_distribution(distribution_class: type[Distribution], make: Callable[..., ActionDistribution]) -> None:
    """Lets policies of ``distribution_class`` (exactly: what is derived from it may be another one) act by your functions.

    ``make`` gives what has them, from the class's further keywords (a policy's ``distribution_kwargs``).

    Raises:
        ValueError: another class of that name is registered.

    Examples:
        >>> class Counts(torch.distributions.Independent):
        ...     def __init__(self, rate):
        ...         super().__init__(torch.distributions.Poisson(rate), 1)
        >>> class PoissonActions(ActionDistribution):
        ...     def __init__(self):
        ...         super().__init__(1, ["rate"], Counts)
        ...     def act(self, rate):
        ...         return torch.poisson(rate)
        >>> register_distribution(Counts, PoissonActions)
    """
    require_own_name(distribution_class, _KNOWN)
    _KNOWN[distribution_class] = make


def distribution_named(name: str) -> type[Distribution]:
    """The class of that name that has functions of its own here (`register_distribution`), or a ValueError."""
    known = {cls.__name__: cls for cls in _KNOWN}
    if name not in known:
        raise ValueError(f"there is no distribution {name!r}, only {sorted(known)}: call register_distribution for it.")
    return known[name]


def distribution_of(module: ProbabilisticTensorDictModule) -> ActionDistribution | None:
    """What acts in the place of a policy's probabilistic module; None for actions that are more than one tensor each, or may be."""
    actions, kind = [key for key in module.out_keys if key not in module.log_prob_keys], module.distribution_class
    is_composite = isinstance(kind, type) and issubclass(kind, CompositeDistribution)
    if len(actions) != 1 or module.num_samples is not None or is_composite:
        return None
    names = [key if isinstance(key, str) else key[-1] for key in module.dist_keys]
    kwargs = module.distribution_kwargs or {}
    try:
        known = _KNOWN[kind](**kwargs) if kind in _KNOWN else None
    except (TypeError, ValueError):
        if kind not in _OURS:
            raise
        known = None  # keywords that ours does not have
    if known is None or names != known.parameter_keys:
        known = ActionDistribution(1, names, module.distribution_class, kwargs)
        known._module = copy(module)  # whose class may say otherwise what is drawn
        known._module.return_log_prob = False  # or it would score each draw, too
    return known


def require_asked(distribution: ActionDistribution, module: ProbabilisticTensorDictModule) -> None:
    """ValueError where ``distribution``, of which ``module`` was made, has functions that nobody would call."""
    own = others_than(ActionDistribution, distribution, _FUNCTIONS)  # which act and score as any class says
    if own := others_than(type(distribution_of(module)), distribution, own):
        kind = module.distribution_class.__name__
        raise ValueError(
            f"nobody would call {own} of {type(distribution).__name__}: a policy of {kind} acts and is scored as that "
            "says, by TorchRL's collectors too. For other numbers write a class of torch.distributions that has them, and call "
            "register_distribution(the_class, make): all functions of what make gives must be that class's."
        )
