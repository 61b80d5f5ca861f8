"""`RecurrentActor` and `RecurrentCritic`: encoder -> core -> head (-> distribution), put together by keyword."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import nn
from torchrl.data import TensorSpec
from torchrl.envs import Compose, EnvBase, TransformedEnv
from torchrl.modules import ProbabilisticActor

from rl2_torchrl.modules.distributions import ActionDistribution
from rl2_torchrl.modules.encoders import Encoder, encoding
from rl2_torchrl.modules.gru import GRUCore
from rl2_torchrl.modules.heads import Head, SkipHead
from rl2_torchrl.transition import PreviousStep

__all__ = ["RecurrentActor", "RecurrentCritic", "action_spec", "as_keys", "entry_shapes", "read_shapes"]

#: Shape of each entry that a network reads, batch dimensions aside; a number is the size of the transition input.
Shapes = int | Mapping[NestedKey, Sequence[int]]


class RecurrentActor(ProbabilisticActor):
    """A policy with memory: encoder, core, head and distribution, each yours or ours.

    Reads ``in_key`` ``[*B, input_size]`` and whatever else has an encoder, the core's memory, and ``"is_init"`` ``[*B, 1]``;
    writes the action, its log-probability ``[*B]``, the distribution's parameters, the core's output under ``features_key``
    ``[*B, features_size]`` and ``("next", memory)``.

    Args:
        input_size: size of the transition input; with encoders by entry, the shape of each entry that is read, such as
            ``{"trans": [7], "pixels": [3, 64, 64]}``.
        distribution: how the head's outputs become an action, such as ``CategoricalActions(5)``.
        action_key: Default ``"action"``.
        hidden_key: the core's (first) memory. Default ``"actor_hidden"``.
        features_key: Default ``"actor_features"``.
        init_range: the default head's last layer is drawn from U(-init_range, init_range). Default 1e-3.
        device: device of the parameters.
        dtype: dtype of the parameters.
        encoder: reads ``in_key`` ``[*B, input_size]`` and gives ``[*B, n]``: a module or a function of the entry's shape, such as
            `MLPEncoder`; or a mapping of entries to such, whose outputs are concatenated with the entries that have none; or a
            TensorDictModule. Default none.
        core: carries the memory: a core, or a function of the size of its input, such as `LSTMCore` or
            ``partial(LSTMCore, hidden_size=128)``; its entries are named by this network. Default `GRUCore`.
        head: makes ``distribution.num_outputs`` numbers of the features: a module, or a function of both sizes. Default `Head`.
        hidden_size: units of the default core. Default 64.
        num_layers: layers of the default core. Default 1.
        num_cells: sizes of hidden layers in the default head: what to do is often no linear function of what is remembered.
            Default none.
        skip: whether these layers read the core's input beside the memory, so that what is seen now need not pass through
            units that change slowly. Their weights are drawn for these inputs alone (He et al. 2015). Needs ``num_cells``.
            Default False.
        activation: module class before each linear layer of the default head. Default `torch.nn.ReLU`.
        in_key: transition input. Default ``"trans"``.

    Examples:
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
        features_key: NestedKey = "actor_features",
        init_range: float = 1e-3,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **slots,
    ):
        factory = {"device": device, "dtype": dtype}
        keys = {"hidden_key": hidden_key, "features_key": features_key}
        slots = _Slots(input_size, distribution.num_outputs, init_range=init_range, **keys, **factory, **slots)
        head = distribution.parameters_of(slots.head, **factory)
        super().__init__(
            TensorDictSequential(*slots.body, TensorDictModule(head, slots.head_keys, distribution.parameter_keys)),
            in_keys=distribution.parameter_keys,
            out_keys=[action_key],
            distribution_class=distribution.distribution_class,
            distribution_kwargs=distribution.distribution_kwargs,
            return_log_prob=True,
        )
        self.hidden_key, self.features_key, self.hidden_size = slots.names

    @classmethod
    def from_env(
        cls,
        env: EnvBase,
        *,
        distribution: ActionDistribution | Callable[[TensorSpec], ActionDistribution] = ActionDistribution.from_spec,
        **kwargs,
    ) -> RecurrentActor:
        """An actor of the sizes, device, action key and action space of ``env``.

        Args:
            env: with `PreviousStep` among its transforms.
            distribution: one, or a function of the action spec of one row, such as ``TanhGaussianActions.from_spec``. By default
                the spec decides: categorical for one choice, several categoricals for MultiDiscrete and MultiBinary, Gaussian
                for reals.
            **kwargs: as in the constructor.

        Raises:
            TypeError: there is no distribution for the env's actions.
            KeyError: the env has no transition input.
            ValueError: an image of the env is neither in the transition input nor has an encoder.
        """
        if not isinstance(distribution, ActionDistribution):
            distribution = distribution(action_spec(env))
        kwargs = {"action_key": env.action_key, **kwargs}
        return cls(read_shapes(env, kwargs), distribution, **kwargs)


class RecurrentCritic(TensorDictSequential):
    """A value function with a memory of its own: encoder, core and head, each yours or ours.

    Reads ``in_key``, ``extra_keys`` and whatever else has an encoder, the core's memory, and ``"is_init"`` ``[*B, 1]``; writes
    ``value_key`` ``[*B, 1]``, the core's output under ``features_key`` and ``("next", memory)``.

    Args:
        input_size: summed size of ``in_key`` and ``extra_keys``; or the shape of each entry that is read.
        value_key: Default ``"state_value"``.
        hidden_key: the core's (first) memory. Default ``"critic_hidden"``.
        features_key: Default ``"critic_features"``.
        init_range: the default head's last layer is drawn from U(-init_range, init_range). Default 3e-3.
        extra_keys: further inputs that the actor never sees, such as ``"time_left"`` or ``"task"``, each
            ``[*B, n]``. They are concatenated to the core's input.
        **slots: as in `RecurrentActor`, from ``device`` on.

    Examples:
        >>> from rl2_torchrl.modules import LSTMCore
        >>> critic = RecurrentCritic(6, core=LSTMCore, extra_keys=["time_left"])
        >>> td = TensorDict({"trans": torch.zeros(4, 5), "time_left": torch.ones(4, 1)}, [4])
        >>> critic(td.set("is_init", torch.ones(4, 1, dtype=torch.bool)))["state_value"].shape
        torch.Size([4, 1])
    """

    def __init__(
        self,
        input_size: Shapes,
        *,
        value_key: NestedKey = "state_value",
        hidden_key: NestedKey = "critic_hidden",
        features_key: NestedKey = "critic_features",
        init_range: float = 3e-3,
        extra_keys: Sequence[NestedKey] = (),
        **slots,
    ):
        keys = {"hidden_key": hidden_key, "features_key": features_key, "extra_keys": extra_keys}
        slots = _Slots(input_size, 1, init_range=init_range, **keys, **slots)
        super().__init__(*slots.body, TensorDictModule(slots.head, slots.head_keys, [value_key]))
        self.hidden_key, self.features_key, self.hidden_size = slots.names
        self.value_key = value_key

    @classmethod
    def from_env(cls, env: EnvBase, **kwargs) -> RecurrentCritic:
        """A critic of the input sizes and device of ``env``; further keywords as in the constructor.

        Raises:
            KeyError: the env lacks the transition input or one of ``extra_keys``.
            ValueError: an image of the env is neither in the transition input nor has an encoder.
        """
        return cls(read_shapes(env, kwargs), **kwargs)


class _Slots:
    """Encoder, core and head of a network, by the keywords of `RecurrentActor`.

    Attributes:
        body: encoder and core, TensorDictModules in the order in which data flows.
        head: maps the entries ``head_keys`` to ``num_outputs`` numbers.
        names: hidden_key and features_key as the core has them, and the size of its features.
    """

    def __init__(
        self,
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
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        factory = {"device": device, "dtype": dtype}
        entries = _entries(input_size, in_key, as_keys(extra_keys), encoder)
        encoders, key, size = encoding(encoder, entries, in_key, features_key, **factory)
        if core is None:
            sizes = (64 if hidden_size is None else hidden_size, 1 if num_layers is None else num_layers)
            core = GRUCore(size, *sizes, **factory)
        elif hidden_size is not None or num_layers is not None:
            raise ValueError(
                "hidden_size and num_layers are those of the default core; say them to your own, such as "
                "core=partial(LSTMCore, hidden_size=128)."
            )
        elif not isinstance(core, nn.Module):
            core = core(size).to(**factory)
        features_size = _name_core(core, key, size, hidden_key, features_key)
        self.body, self.names = [*encoders, core], (core.in_keys[1], core.out_keys[0], features_size)
        self.head_keys = [core.out_keys[0], key] if skip else [core.out_keys[0]]
        if head is None:
            layers = {"num_cells": num_cells, "activation": activation, "init_range": init_range, **factory}
            sizes = (features_size, size, num_outputs)
            self.head = SkipHead.built(*sizes, **layers) if skip else Head(features_size, num_outputs, **layers)
        elif num_cells or skip:
            raise ValueError("num_cells and skip are those of the default head; build your own with its hidden layers.")
        else:
            self.head = head if isinstance(head, nn.Module) else head(features_size, num_outputs).to(**factory)


def _name_core(core: TensorDictModuleBase, in_key, size: int, hidden_key, features_key) -> int:
    """Names the entries of ``core`` and returns the size of its features; TorchRL's own modules keep their names."""
    if hasattr(core, "name_entries"):
        core.name_entries(in_key, hidden_key, features_key)
        return core.features_size
    if core.in_keys[0] != in_key:
        raise ValueError(f"the core reads {core.in_keys[0]!r}, but its input is {in_key!r}: build it with that key.")
    like = next(core.parameters())
    start = {in_key: like.new_zeros(1, size), "is_init": torch.ones(1, 1, dtype=torch.bool, device=like.device)}
    with torch.no_grad():
        return core(TensorDict(start, [1])).get(core.out_keys[0]).shape[-1]


# ------------------------------------------------------------------- entries
def _entries(input_size: Shapes, in_key: NestedKey, extra_keys: Sequence[NestedKey], encoder: Encoder | None):
    """Shape of each entry that a network reads, in the order in which they are concatenated."""
    if isinstance(input_size, Mapping):
        missing = [key for key in (in_key, *extra_keys) if key not in input_size]
        if missing:
            raise KeyError(f"the network reads {missing}, whose shape input_size={dict(input_size)} does not say.")
        return input_size
    if extra_keys and encoder is not None:
        raise ValueError(
            "with an encoder and extra_keys say each entry's shape: input_size={'trans': [5], 'time_left': [1]}."
        )
    # The extra entries' sizes are part of the sum.
    return {in_key: (input_size,), **dict.fromkeys(extra_keys, (0,))}


def as_keys(extra_keys: Sequence[NestedKey]) -> list[NestedKey]:
    """``extra_keys`` as a list. A single string is an error: its letters would be taken for keys."""
    if isinstance(extra_keys, str):
        raise TypeError(f"extra_keys={extra_keys!r} is a single key; give a list: extra_keys=[{extra_keys!r}].")
    return list(extra_keys)


def action_spec(env: EnvBase) -> TensorSpec:
    """The env's action spec of one row."""
    # With a nested action key a transformed env's `action_spec_unbatched` is the whole Composite.
    return env.full_action_spec_unbatched[env.action_key]


def read_shapes(env: EnvBase, kwargs: dict[str, Any]) -> dict[NestedKey, torch.Size]:
    """Shape of each entry that a network with these keywords reads; puts the env's device among them.

    An entry whose encoder is None is one that the network shall not see.
    """
    kwargs.setdefault("device", env.device)
    keys, encoder = [kwargs.get("in_key", "trans"), *as_keys(kwargs.get("extra_keys", ()))], kwargs.get("encoder")
    known = {*keys}
    if isinstance(encoder, Mapping):
        known |= encoder.keys()
        kwargs["encoder"] = {key: module for key, module in encoder.items() if module is not None}
        keys += [key for key in kwargs["encoder"] if key not in keys]
    elif isinstance(encoder, TensorDictModuleBase):
        keys += [key for key in encoder.in_keys if key not in keys]
    _require_sight_of_images(env, known.union(keys))
    return entry_shapes(env, keys)


def entry_shapes(env: EnvBase, keys: Sequence[NestedKey]) -> dict[NestedKey, torch.Size]:
    """Shapes of the env's observations ``keys``, batch dimensions aside.

    Raises:
        KeyError: the env has no such observation.
    """
    spec = env.observation_spec
    missing = [key for key in keys if key not in spec.keys(True, True)]
    if missing:
        raise KeyError(
            f"the env has no observation {missing}, only {list(spec.keys(True, True))}. An RL² agent reads the transition "
            "input that PreviousStep() writes: Compose(Trial(...), TaskSampler(...), PreviousStep())."
        )
    return {key: spec[key].shape[len(env.batch_size) :] for key in keys}


def _require_sight_of_images(env: EnvBase, known: set[NestedKey]) -> None:
    """Raises where an observation of several dimensions is in no input: `PreviousStep` leaves those out unless it is told."""
    transform = env.transform if isinstance(env, TransformedEnv) else None
    transforms = transform if isinstance(transform, Compose) else [transform]
    told = [key for each in transforms if isinstance(each, PreviousStep) for key in each.obs_keys or ()]
    # What is an input of the env too, such as the task or a memory, is nothing that it shows.
    hidden = {*known, *told, *env.full_state_spec.keys(True, True)}
    for key, spec in env.observation_spec.items(True, True):
        shape = spec.shape[len(env.batch_size) :]
        if len(shape) > 1 and key not in hidden:
            raise ValueError(
                f"the env shows {key!r} {tuple(shape)}, which is not in the transition input and has no encoder: give it one, "
                f"encoder={{{key!r}: ConvEncoder}}, or encoder={{{key!r}: None}} for a network that shall not see it."
            )
