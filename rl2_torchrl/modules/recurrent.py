"""Networks put together by keyword: encoder -> core -> head (-> distribution). The usual ones have names of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torchrl.data import NonTensor, TensorSpec
from torchrl.envs import EnvBase
from torchrl.modules import ProbabilisticActor

from rl2_torchrl.arguments import as_list, require_callable, require_flags, require_layer_class, whole
from rl2_torchrl.modules.actor_critic import Network
from rl2_torchrl.modules.cores import sub_key
from rl2_torchrl.modules.distributions import ActionDistribution, CategoricalActions, GaussianActions
from rl2_torchrl.modules.gru import GRUCore
from rl2_torchrl.modules.layers import (
    ConvEncoder,
    Encoder,
    Head,
    SkipHead,
    by_entry,
    encoding,
    output_key,
    output_size,
)
from rl2_torchrl.modules.normalization import RunningNorm
from rl2_torchrl.transition import is_info, previous_steps, require_tensors

__all__ = [
    *("GRUCategoricalActor", "GRUGaussianActor", "GRUValueHead"),
    *("MemoryValueHead", "RecurrentActor", "RecurrentCritic"),
]

#: Shape of each entry that a network reads, batch dimensions aside; a number is the size of the transition input.
Shapes = int | Mapping[NestedKey, Sequence[int]]


# -------------------------------------------------------------------- actors
class RecurrentActor(ProbabilisticActor):
    """A policy with memory: encoder, core, head and distribution, each yours or ours.

    Reads ``in_key`` ``[*B, input_size]`` and whatever else has an encoder, the core's memory, and ``"is_init"`` ``[*B, 1]``;
    writes the action, its log-probability ``[*B]``, the distribution's parameters, the core's output under ``features_key``
    ``[*B, features_size]`` and ``("next", memory)``.

    Args:
        input_size: size of the transition input; with encoders by entry, the shape of each entry that is read, such as
            ``{"trans": [7], "pixels": [3, 64, 64]}``.
        distribution: how the head's outputs become an action, such as ``CategoricalActions(5)``.
        action_key, hidden_key, features_key: what is written, and the core's (first) memory.
        init_range: the default head's last layer is drawn from U(-init_range, init_range).
        device, dtype: of the parameters.
        encoder: reads ``in_key`` ``[*B, input_size]`` and gives ``[*B, n]``: a module or a function of the entry's shape, such as
            `MLPEncoder`; or a mapping of entries to such, whose outputs are concatenated with the entries that have none; or a
            TensorDictModule, of which the first output is taken, of a sequence that of its last module. Default none; `from_env`
            gives images that the transition input leaves out a `ConvEncoder`.
        core: carries the memory: a core, or a function of the size of its input, such as `LSTMCore` or
            ``partial(LSTMCore, hidden_size=128)``; its entries are named by this network. Default `GRUCore`.
        head: makes ``distribution.num_outputs`` numbers of the features: a module, or a function of both sizes. Default `Head`.
        hidden_size, num_layers: of the default core. Default 64 and 1.
        num_cells: hidden layers of the default head: what to do is often no linear function of what is remembered. Default none.
        skip: whether these layers read the core's input too, so that what is seen now need not pass through units that change
            slowly. Their weights are drawn for these inputs alone (He et al. 2015). Needs ``num_cells``. Default False.
        activation: module class before each linear layer of the default head. Default `torch.nn.ReLU`.
        in_key: transition input. Default ``"trans"``.
        normalize: bring the transition input to mean 0 and standard deviation 1 by a `RunningNorm`: all of its entries, or those
            that a bool tensor ``[input_size]`` marks. `from_env` marks observed numbers, no choices, and the reward. `PPOUpdate`
            tells it of batches; elsewhere do so by `RunningNorm.update_statistics`. Default False.

    Examples:
        >>> from tensordict import TensorDict
        >>> from rl2_torchrl.modules import CategoricalActions, LSTMCore, MLPEncoder
        >>> actor = RecurrentActor(5, CategoricalActions(3), encoder=MLPEncoder, core=LSTMCore, num_cells=[32])
        >>> td = actor(TensorDict({"trans": torch.zeros(4, 5), "is_init": torch.ones(4, 1, dtype=torch.bool)}, [4]))
        >>> td["logits"].shape, td["next", "actor_hidden_cell"].shape
        (torch.Size([4, 3]), torch.Size([4, 1, 64]))
    """

    def __init__(
        self,
        input_size: Shapes,
        distribution: ActionDistribution,
        *,
        action_key: NestedKey = "action",
        hidden_key: NestedKey = "actor_hidden",
        init_range: float = 1e-3,
        features_key: NestedKey = "actor_features",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **slots,
    ):
        if not isinstance(distribution, ActionDistribution):
            raise TypeError(
                f"distribution={distribution!r} is no ActionDistribution: give one such as CategoricalActions(3), or give from_env "
                "a function of the action spec such as TanhGaussianActions.from_spec."
            )
        factory = {"device": device, "dtype": dtype}
        slots |= {"hidden_key": hidden_key, "features_key": features_key, "init_range": init_range, **factory}
        body, head, head_keys, names = _slots(input_size, distribution.num_outputs, **slots)
        head = distribution.parameters_of(head, **factory)
        super().__init__(
            TensorDictSequential(*body, TensorDictModule(head, head_keys, distribution.parameter_keys)),
            in_keys=distribution.parameter_keys,
            out_keys=[action_key],
            distribution_class=distribution.distribution_class,
            distribution_kwargs=distribution.distribution_kwargs,
            return_log_prob=True,
        )
        self.hidden_key, self.features_key, self.hidden_size = names

    @classmethod
    def from_env(
        cls,
        env: EnvBase,
        *,
        distribution: ActionDistribution | Callable[[TensorSpec], ActionDistribution] = ActionDistribution.from_spec,
        **kwargs,
    ) -> RecurrentActor:
        """An actor of the sizes, device, action key and action space of ``env``, which has a `PreviousStep` among its transforms.

        ``distribution`` is one, or a function of the action spec of one row, such as ``TanhGaussianActions.from_spec``; by default
        the spec decides: categorical for one or several choices, Gaussian for reals. Further keywords are the constructor's. What
        the env shows in two dimensions, or more than an image's three, needs an encoder.
        """
        if callable(distribution) and not isinstance(distribution, ActionDistribution | type):
            distribution = distribution(_action_spec(env))
        kwargs = {"action_key": env.action_key, **kwargs}
        return cls(_read_shapes(env, kwargs), distribution, **kwargs)


class GRUGaussianActor(RecurrentActor):
    """Gaussian GRU policy: ``mean_t = W relu(GRU(trans_t, h_{t-1})) + b``, ``a_t ~ Normal(mean_t, exp(log_std))``.

    A `RecurrentActor` with ``GaussianActions(action_dim, init_log_std=...)``: the action ``[*B, action_dim]`` comes with ``"loc"``
    and ``"scale"``, and its log-probability is summed over the components. In deterministic mode it is the mean.

    Examples:
        >>> GRUGaussianActor(input_size=5, action_dim=2, hidden_size=8).out_keys
        ['actor_features', ('next', 'actor_hidden'), 'loc', 'scale', 'action', 'action_log_prob']
    """

    def __init__(self, input_size: Shapes, action_dim: int, *, init_log_std: float = -0.5, **kwargs):
        super().__init__(input_size, GaussianActions(action_dim, init_log_std=init_log_std), **kwargs)

    @classmethod
    def from_env(cls, env: EnvBase, **kwargs) -> GRUGaussianActor:
        """An actor of the sizes, device and action key of ``env``; TypeError where its actions are discrete."""
        action_dim = GaussianActions.from_spec(_action_spec(env)).num_outputs
        kwargs = {"action_key": env.action_key, **kwargs}
        return cls(_read_shapes(env, kwargs), action_dim, **kwargs)


class GRUCategoricalActor(RecurrentActor):
    """Categorical GRU policy: ``logits_t = W relu(GRU(trans_t, h_{t-1})) + b``.

    A `RecurrentActor` with ``CategoricalActions(num_actions, one_hot=...)``: the action, an index ``[*B]`` or a one-hot vector,
    comes with ``"logits"`` ``[*B, num_actions]``. In deterministic mode it is the most probable one.

    Examples:
        >>> GRUCategoricalActor(input_size=5, num_actions=3, hidden_size=8).out_keys
        ['actor_features', ('next', 'actor_hidden'), 'logits', 'action', 'action_log_prob']
    """

    def __init__(self, input_size: Shapes, num_actions: int, *, one_hot: bool = False, **kwargs):
        super().__init__(input_size, CategoricalActions(num_actions, one_hot=one_hot), **kwargs)

    @classmethod
    def from_env(cls, env: EnvBase, **kwargs) -> GRUCategoricalActor:
        """An actor of the sizes, device, action key and encoding of ``env``; TypeError where its actions are not one choice."""
        actions = CategoricalActions.from_spec(_action_spec(env))
        kwargs = {"action_key": env.action_key, "one_hot": actions.one_hot, **kwargs}
        return cls(_read_shapes(env, kwargs), actions.num_outputs, **kwargs)


# ------------------------------------------------------------------- critics
class RecurrentCritic(Network):
    """A value function with a memory of its own: encoder, core and head, each yours or ours.

    Reads ``in_key``, ``extra_keys`` and whatever else has an encoder, the core's memory, and ``"is_init"`` ``[*B, 1]``; writes
    ``value_key`` ``[*B, 1]``, the core's output under ``features_key`` and ``("next", memory)``.

    Args:
        input_size: summed size of ``in_key`` and ``extra_keys``; or the shape of each entry that is read.
        value_key: what is written.
        hidden_key, features_key, init_range, **slots: as in `RecurrentActor`.
        extra_keys: further inputs that the actor never sees, such as ``"time_left"`` or ``"task"``, each ``[*B, n]``. They are
            concatenated to the core's input.

    Examples:
        >>> from rl2_torchrl.modules import LSTMCore
        >>> RecurrentCritic(6, core=LSTMCore, extra_keys=["time_left"]).in_keys
        ['trans', 'time_left', 'critic_hidden', 'critic_hidden_cell', 'is_init']
    """

    def __init__(
        self,
        input_size: Shapes,
        *,
        value_key: NestedKey = "state_value",
        hidden_key: NestedKey = "critic_hidden",
        features_key: NestedKey = "critic_features",
        init_range: float = 3e-3,
        **slots,
    ):
        slots |= {"hidden_key": hidden_key, "features_key": features_key, "init_range": init_range}
        body, head, head_keys, names = _slots(input_size, 1, **slots)
        super().__init__(*body, TensorDictModule(head, head_keys, [value_key]))
        self.hidden_key, self.features_key, self.hidden_size = names
        self.value_key = value_key

    @classmethod
    def from_env(cls, env: EnvBase, **kwargs) -> RecurrentCritic:
        """A critic of the input sizes and device of ``env``; further keywords as in the constructor."""
        return cls(_read_shapes(env, kwargs), **kwargs)


class GRUValueHead(RecurrentCritic):
    """Value function with a GRU of its own, ``v_t = W relu(GRU(trans_t, h_{t-1})) + b``, ``[*B, 1]``: a `RecurrentCritic`.

    Examples:
        >>> GRUValueHead(input_size=5, hidden_size=8).out_keys
        ['critic_features', ('next', 'critic_hidden'), 'state_value']
    """


class MemoryValueHead(Network):
    """Value function on the *actor's* memory: no GRU of its own, so half the work of two separate networks.

    With ``detach=True`` it sends no gradient into the actor's memory, which the policy loss alone trains ("detached" wiring). With
    ``detach=False`` both losses train one trunk ("shared" wiring); on long trials the value loss then tends to crowd out the
    policy's. In a loss the actor must run first, as it does in `ClipPPOLoss` and `A2CLoss`.

    Args:
        features_size: size of the actor's features, its ``hidden_size``; ``features_key`` is their entry.
        detach: whether to stop the gradient into the actor's memory.
        extra_keys, extra_size: further inputs, as in `RecurrentCritic`, and their summed size.
        init_range, **layers: as in `Head`. A detached critic cannot shape its features, so that one hidden layer of its own helps.
        value_key: what is written.

    Examples:
        >>> MemoryValueHead(features_size=8, detach=True)(actor_features=torch.zeros(4, 8)).shape
        torch.Size([4, 1])
    """

    def __init__(
        self,
        features_size: int,
        *,
        detach: bool,
        extra_size: int = 0,
        extra_keys: Sequence[NestedKey] = (),
        init_range: float = 3e-3,
        features_key: NestedKey = "actor_features",
        value_key: NestedKey = "state_value",
        **layers,
    ):
        require_flags(detach=detach)
        head = Head(
            whole("features_size", features_size) + extra_size, 1, skip_size=extra_size, init_range=init_range, **layers
        )
        in_keys = [features_key, *as_list("extra_keys", extra_keys)]
        super().__init__(TensorDictModule(SkipHead(head, detach), in_keys, [value_key]))
        self.detach, self.value_key = detach, value_key

    @classmethod
    def from_env(cls, env: EnvBase, actor: RecurrentActor, **kwargs) -> MemoryValueHead:
        """A value head on the memory of ``actor``, one of this package's, with the device and extra inputs of ``env``."""
        if not hasattr(actor, "hidden_size"):
            raise TypeError(
                f"from_env knows the features of a RecurrentActor such as GRUCategoricalActor, not of {type(actor).__name__}: "
                "say them, MemoryValueHead(features_size=..., features_key=..., detach=...)."
            )
        kwargs.setdefault("device", env.device)
        shapes = _shapes_of(env, as_list("extra_keys", kwargs.get("extra_keys", ())))
        for key, shape in shapes.items():
            if len(shape) != 1:
                raise ValueError(
                    f"{key!r} has shape {tuple(shape)}, and this head, which has no encoders, reads vectors: give it to a critic "
                    f"with a memory of its own, GRUValueHead.from_env(env, extra_keys=[{key!r}], encoder={{{key!r}: ...}})."
                )
        extra_size = sum(shape.numel() for shape in shapes.values())
        return cls(actor.hidden_size, extra_size=extra_size, features_key=actor.features_key, **kwargs)


# --------------------------------------------------------------------- slots
def _slots(
    input_size: Shapes,
    num_outputs: int,
    *,
    init_range: float,
    hidden_key: NestedKey,
    features_key: NestedKey,
    encoder: Encoder | None = None,
    core: TensorDictModuleBase | Callable[[int], TensorDictModuleBase] | None = None,
    head: nn.Module | Callable[[int, int], nn.Module] | None = None,
    hidden_size: int | None = None,
    num_layers: int | None = None,
    num_cells: Sequence[int] = (),
    skip: bool = False,
    activation: Callable[[], nn.Module] = nn.ReLU,
    in_key: NestedKey = "trans",
    extra_keys: Sequence[NestedKey] = (),
    normalize: bool | Tensor = False,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    **unknown,
) -> tuple[list[TensorDictModuleBase], nn.Module, list[NestedKey], tuple[NestedKey, NestedKey, int]]:
    """Encoders and core, the head, the entries that it reads, and (hidden_key, features_key, features_size) of the core."""
    if unknown:
        raise TypeError(
            f"{list(unknown)} is no argument of a network, whose slots are {sorted(_slots.__kwdefaults__)}."
        )
    require_callable(head=head)
    require_layer_class(activation=activation)
    require_flags(skip=skip)
    normalize = _marks(normalize)
    factory, units = {"device": device, "dtype": dtype}, {"hidden_size": hidden_size, "num_layers": num_layers}
    units = {name: number for name, number in units.items() if number is not None}
    encoder, norms = by_entry(encoder, in_key), []
    keys = [in_key, *as_list("extra_keys", extra_keys)]
    entries = _entries(input_size, keys, in_sum=not encoder and normalize is False)
    if normalize is not False:
        norm, entries, encoder = _normalized(normalize, in_key, entries, encoder, features_key, device)
        norms.append(norm)
    encoders, key, size = encoding(encoder, entries, features_key, **factory)
    if core is None:
        core = GRUCore(size, **units, **factory)
    elif units:
        raise ValueError("hidden_size and num_layers are those of the default core: say core=partial(LSTMCore, ...).")
    else:
        core = _built_core(core, size, factory)
    features_size = _name_core(core, key, size, hidden_key, features_key)
    if head is None:
        layers = {"num_cells": num_cells, "activation": activation, "init_range": init_range, **factory}
        make = partial(SkipHead.built, size) if skip else Head
        head = make(features_size, num_outputs, **layers)
    elif num_cells or skip:
        raise ValueError("num_cells and skip are those of the default head; build your own with its hidden layers.")
    elif not isinstance(head, nn.Module):
        head = head(features_size, num_outputs).to(**factory)
    names = (core.in_keys[1], output_key(core), features_size)
    return [*norms, *encoders, core], head, [names[1], key] if skip else [names[1]], names


def _marks(normalize: bool | Tensor) -> bool | Tensor:
    """``normalize``, a flag as Python's own; TypeError where it is neither a flag nor a tensor of flags."""
    if isinstance(normalize, Tensor):
        return normalize
    require_flags(normalize=normalize)
    return bool(normalize)


def _normalized(normalize, in_key: NestedKey, entries: Mapping, encoder, features_key: NestedKey, device):
    """The module that normalises ``in_key``; then entries and encoders with what it gives in the place of that."""
    if isinstance(encoder, TensorDictModuleBase):
        raise ValueError(
            "normalize=True and an encoder that is a TensorDictModule: let that begin with a TensorDictModule(RunningNorm(n), ...)."
        )
    norm = RunningNorm(*entries[in_key], None if normalize is True else normalize, device=device)
    key = sub_key(features_key, "normalized")
    renamed = ({key if k == in_key else k: each for k, each in by_key.items()} for by_key in (entries, encoder))
    return TensorDictModule(norm, [in_key], [key]), *renamed


def _built_core(core: Any, size: int, factory: Mapping) -> TensorDictModuleBase:
    """``core``, or what it makes for inputs of ``size``."""
    kind = core if isinstance(core, type) else type(core)
    if not callable(core) or (issubclass(kind, nn.Module) and not issubclass(kind, TensorDictModuleBase)):
        raise TypeError(
            f"core={core!r} is no core: give one such as core=LSTMCore; a RecurrentCore shows how to write one."
        )
    return core if isinstance(core, nn.Module) else _built_core(core(size).to(**factory), size, factory)


def _name_core(core: TensorDictModuleBase, in_key, size: int, hidden_key, features_key) -> int:
    """Names the entries of ``core``, unless it is TorchRL's own module, and returns the size of its features."""
    if hasattr(core, "name_entries"):
        core.name_entries(in_key, hidden_key, features_key)
        return core.features_size
    if core.in_keys[0] != in_key:
        raise ValueError(f"the core reads {core.in_keys[0]!r}, but its input is {in_key!r}: build it with that key.")
    return output_size(core, {in_key: (size,)})


# ------------------------------------------------------------------- entries
def _entries(input_size: Shapes, keys: Sequence[NestedKey], *, in_sum: bool) -> Mapping[NestedKey, Sequence[int]]:
    """Shape of each of ``keys``, in the order in which they are concatenated; ``in_sum``: the size of all is enough."""
    if isinstance(input_size, Mapping):
        if missing := [key for key in keys if key not in input_size]:
            raise KeyError(f"the network reads {missing}, whose shape input_size={dict(input_size)} does not say.")
        return input_size
    if len(keys) > 1 and not in_sum:
        raise ValueError("say each entry's shape, input_size={'trans': [5], 'time_left': [1]}, not only their sum.")
    return {key: (0 if number else input_size,) for number, key in enumerate(keys)}


def _action_spec(env: EnvBase) -> TensorSpec:
    # With a nested action key a transformed env's `action_spec_unbatched` is the whole Composite.
    return env.full_action_spec_unbatched[env.action_key]


def _read_shapes(env: EnvBase, kwargs: dict[str, Any]) -> dict[NestedKey, torch.Size]:
    """Shape of each entry that a network with these keywords reads; completes them by what the env says."""
    kwargs.setdefault("device", env.device)
    keys = [kwargs.get("in_key", "trans"), *as_list("extra_keys", kwargs.get("extra_keys", ()))]
    writers = [each for each in previous_steps(env) if each.out_key == keys[0]]
    if writers and _marks(kwargs.get("normalize", False)) is True:
        kwargs["normalize"] = writers[-1].reals()
    encoder = by_entry(kwargs.get("encoder"), keys[0])
    if isinstance(encoder, TensorDictModuleBase):
        return _shapes_of(env, [*keys, *encoder.in_keys])
    encoders = {**encoder, **dict.fromkeys(_images(env, {*keys, *encoder}), ConvEncoder)}
    kwargs["encoder"] = {key: module for key, module in encoders.items() if module is not None}
    return _shapes_of(env, [*keys, *kwargs["encoder"]])


def _shapes_of(env: EnvBase, keys: Sequence[NestedKey]) -> dict[NestedKey, torch.Size]:
    """Shapes of the env's observations ``keys``, batch dimensions aside."""
    spec = env.observation_spec
    if missing := [key for key in keys if key not in spec.keys(True, True)]:
        mend = "name one of these (in_key, extra_keys, encoder={...})."
        if not previous_steps(env):
            mend = "an agent reads what PreviousStep() writes: Compose(Trial(...), TaskSampler(...), PreviousStep())."
        raise KeyError(f"the env has no observation {missing}, only {list(spec.keys(True, True))}: {mend}")
    require_tensors(spec, keys)
    return {key: spec[key].shape[len(env.batch_size) :] for key in keys}


def _images(env: EnvBase, known: set[NestedKey]) -> list[NestedKey]:
    """Observations of several dimensions that are in no input: `PreviousStep` leaves those out unless it is told."""
    told = [key for each in previous_steps(env) for key in each.obs_keys or ()]
    # What is an input of the env too, such as the task or a memory, is nothing that it shows.
    hidden = {*known, *told, *env.full_state_spec.keys(True, True)}
    shown = [key for key in env.observation_spec.keys(True, True) if key not in hidden and not is_info(key)]
    if told:  # what is named leaves text out
        shown = [key for key in shown if not isinstance(env.observation_spec[key], NonTensor)]
    unseen = {key: shape for key, shape in _shapes_of(env, shown).items() if len(shape) > 1}
    for key, shape in unseen.items():
        if len(shape) != 3:
            raise ValueError(
                f"the env shows {key!r} {tuple(shape)}, which is neither in the transition input nor an image, and has no encoder: "
                f"give it one, encoder={{{key!r}: MLPEncoder}}, or encoder={{{key!r}: None}} for a network that shall not see it."
            )
    return list(unseen)
