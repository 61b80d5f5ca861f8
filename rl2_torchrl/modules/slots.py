"""A network's slots: encoder, core and head from keywords (`fill_slots`), and what an env says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchrl.data import NonTensor, TensorSpec, Unbounded
from torchrl.envs import EnvBase

from rl2_torchrl.arguments import as_list, noted, require_flags
from rl2_torchrl.gradients.part import is_function
from rl2_torchrl.modules.cores import sub_key
from rl2_torchrl.modules.gru import GRUCore
from rl2_torchrl.modules.layers import (
    ConvEncoder,
    Encoder,
    Entries,
    Head,
    SkipHead,
    by_entry,
    encoding,
    out_of_place,
    output_key,
    output_size,
    shape_of,
)
from rl2_torchrl.modules.normalization import RunningNorm
from rl2_torchrl.transition import has_trials_within, is_info, previous_steps, require_tensors

__all__ = ["Shapes", "fill_slots", "read_specs", "specs_of"]

#: What a network reads; a number is the size of the transition input.
Shapes = int | Entries


def fill_slots(
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
) -> tuple[list[TensorDictModuleBase], nn.Module, list[NestedKey], tuple[NestedKey, NestedKey, int]]:
    """Encoders and core, the head, the entries that it reads, and (hidden_key, features_key, features_size) of the core."""
    if isinstance(activation, nn.Module) or not callable(activation):
        raise TypeError(f"{activation=} makes no layers, one for each place: give the class, such as nn.ReLU.")
    require_flags(skip=skip)
    normalize = _marks(normalize)
    factory, units = {"device": device, "dtype": dtype}, {"hidden_size": hidden_size, "num_layers": num_layers}
    units = {name: number for name, number in units.items() if number is not None}
    encoder, norms = by_entry(encoder, in_key), []
    keys = [in_key, *as_list("extra_keys", extra_keys)]
    entries = _entries(input_size, keys, in_sum=not encoder and normalize is False)
    if normalize is not False:
        norms, entries, encoder = _normalized(normalize, in_key, entries, encoder, features_key, device)
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
        with noted(f"{head=} is called with the sizes of features and outputs, {features_size} and {num_outputs}."):
            head = head(features_size, num_outputs).to(**factory)
    names = (core.in_keys[1], output_key(core), features_size)
    head, head_keys = _with_keys(head, [names[1], key] if skip else [names[1]])
    if head_keys == [names[1]] and any(map(is_lazy, head.parameters())):
        head(torch.zeros(2, 3, features_size, **factory))  # from which lazy layers take their sizes, as an encoder's do
    for module in (*encoders, core, head):
        out_of_place(module)
    return [*norms, *encoders, core], head, head_keys, names


def _with_keys(head: nn.Module, keys: list[NestedKey]) -> tuple[nn.Module, list[NestedKey]]:
    """The head, and the entries that it reads: ``keys``, or those that it names itself, the core's features among them."""
    if not isinstance(head, TensorDictModuleBase) or list(head.in_keys) == keys:
        return head, keys
    if keys[0] not in head.in_keys:
        raise ValueError(f"the head reads {head.in_keys}, and not the core's features {keys[0]!r}: add these.")
    if not is_function(head) or not isinstance(head.module, nn.Module):
        raise ValueError(
            f"a head that reads {head.in_keys} is one TensorDictModule(module, in_keys, out_keys) of a torch.nn.Module, and this "
            f"is a {type(head).__name__}: write a module that takes all of them."
        )
    return head.module, list(head.in_keys)


def _marks(normalize: bool | Tensor) -> bool | Tensor:
    """``normalize``, a flag as Python's own; TypeError where it is neither a flag nor a tensor of flags."""
    if isinstance(normalize, Tensor):
        return normalize
    require_flags(normalize=normalize)
    return bool(normalize)


def _normalized(normalize, in_key: NestedKey, entries: Entries, encoder, features_key: NestedKey, device):
    """The one module that normalises ``in_key``; then entries and encoders with what it gives in the place of that."""
    if isinstance(encoder, TensorDictModuleBase):
        raise ValueError(
            "normalize=True and an encoder that is a TensorDictModule: let that begin with a TensorDictModule(RunningNorm(n), ...)."
        )
    entry, key = entries[in_key], sub_key(features_key, "normalized")
    shape = shape_of(entry)
    norm = RunningNorm(*shape, None if normalize is True else normalize, device=device)
    if isinstance(entry, TensorSpec):  # what is given in whole numbers becomes reals
        dtype = entry.dtype if entry.dtype.is_floating_point else torch.get_default_dtype()
        entry = Unbounded(shape, dtype=dtype)
    reals = {**entries, in_key: entry}
    renamed = ({key if k == in_key else k: each for k, each in by_key.items()} for by_key in (reals, encoder))
    return [TensorDictModule(norm, [in_key], [key])], *renamed


def _built_core(core: Any, size: int, factory: Mapping) -> TensorDictModuleBase:
    """``core``, or what it makes for inputs of ``size``."""
    if not isinstance(core, nn.Module):
        with noted(f"{core=} is called with the size of its input, {size}, and makes a core."):
            core = core(size).to(**factory)
    if not isinstance(core, TensorDictModuleBase):
        raise TypeError(f"core={core!r} is no core: give one such as core=LSTMCore, or write a RecurrentCore.")
    return core


def _name_core(core: TensorDictModuleBase, in_key, size: int, hidden_key, features_key) -> int:
    """Names the entries of ``core``, unless it is TorchRL's own module, and returns the size of its features."""
    if hasattr(core, "name_entries"):
        core.name_entries(in_key, hidden_key, features_key)
        return core.features_size
    if core.in_keys[0] != in_key:
        raise ValueError(f"the core reads {core.in_keys[0]!r}, but its input is {in_key!r}: build it with that key.")
    return output_size(core, {in_key: (size,)})


# ------------------------------------------------------------------- entries
def _entries(input_size: Shapes, keys: Sequence[NestedKey], *, in_sum: bool) -> Entries:
    """Spec or shape of each of ``keys``, in the order of their concatenation; ``in_sum``: the size of all is enough."""
    if isinstance(input_size, Mapping):
        if missing := [key for key in keys if key not in input_size]:
            raise KeyError(f"the network reads {missing}, whose shape input_size={dict(input_size)} does not say.")
        return input_size
    if len(keys) > 1 and not in_sum:
        raise ValueError("say each entry's shape, input_size={'trans': [5], 'time_left': [1]}, not only their sum.")
    return {key: (0 if number else input_size,) for number, key in enumerate(keys)}


def read_specs(env: EnvBase, kwargs: dict[str, Any]) -> dict[NestedKey, TensorSpec]:
    """Spec of each entry that a network with these keywords reads; completes them by what the env says."""
    kwargs.setdefault("device", env.device)
    keys = [kwargs.get("in_key", "trans"), *as_list("extra_keys", kwargs.get("extra_keys", ()))]
    writers = [each for each in previous_steps(env) if each.out_key == keys[0]]
    if _marks(kwargs.get("normalize", False)) is True:
        if writers:
            kwargs["normalize"] = writers[-1].reals()
        elif has_trials_within(env):
            raise ValueError(
                f"normalize=True marks the reals in {keys[0]!r}, which PreviousStep in the rows knows: put Trial, TaskSampler "
                "and PreviousStep around the batched env, or give the marks, normalize=torch.tensor([True, ...])."
            )
    encoder = by_entry(kwargs.get("encoder"), keys[0])
    if isinstance(encoder, TensorDictModuleBase):
        return specs_of(env, [*keys, *encoder.in_keys])
    head = kwargs.get("head")
    read = head.in_keys if isinstance(head, TensorDictModuleBase) else ()
    encoders = {**encoder, **dict.fromkeys(_images(env, {*keys, *encoder}, read), ConvEncoder)}
    kwargs["encoder"] = encoders = {key: module for key, module in encoders.items() if module is not None}
    return specs_of(env, [*keys, *encoders])


def specs_of(env: EnvBase, keys: Sequence[NestedKey]) -> dict[NestedKey, TensorSpec]:
    """Specs of the env's observations ``keys``, batch dimensions aside."""
    spec = env.observation_spec
    if missing := [key for key in keys if key not in spec.keys(True, True)]:
        mend = "name one of these (in_key, extra_keys, encoder={...})."
        if not previous_steps(env):
            mend = "an agent reads what PreviousStep() writes: Compose(Trial(...), TaskSampler(...), PreviousStep())."
        raise KeyError(f"the env has no observation {missing}, only {list(spec.keys(True, True))}: {mend}")
    require_tensors(spec, keys)
    one = env.observation_spec_unbatched
    return {key: one[key] for key in keys}


def _images(env: EnvBase, known: set[NestedKey], by_head: Sequence[NestedKey]) -> list[NestedKey]:
    """Observations of several dimensions that are in no input: `PreviousStep` leaves those out unless it is told.

    What the head reads (``by_head``), a table of legal actions say, needs no encoder, but an image is for the memory too.
    """
    told, spec = [each.obs_keys for each in previous_steps(env) if each.obs_keys is not None], env.observation_spec
    # What is an input of the env too, such as the task or a memory, is nothing that it shows.
    hidden = {*known, *chain.from_iterable(told), *env.full_state_spec.keys(True, True)}
    shown = [key for key in spec.keys(True, True) if key not in hidden and not is_info(key)]
    if told:  # what is named, be it nothing, leaves text out
        shown = [key for key in shown if not isinstance(spec[key], NonTensor)]
    shapes = {key: one.shape for key, one in specs_of(env, shown).items()}
    unseen = [key for key, shape in shapes.items() if len(shape) == 3 or (len(shape) > 1 and key not in by_head)]
    for key in unseen:
        if len(shape := shapes[key]) != 3:
            raise ValueError(
                f"the env shows {key!r} {tuple(shape)}, which is neither in the transition input nor an image, and has no encoder: "
                "give a grey image its channel (GrayscaleObservation(keep_dim=True) of gymnasium.wrappers); or let the env flatten "
                "it (FlattenObservation of gymnasium.wrappers, or TorchRL's), which puts it there, normalised "
                f"with it where normalize=True says so; or give it an encoder, which reads it as it is, encoder={{{key!r}: "
                f"MLPEncoder}}, or encoder={{{key!r}: None}} for a network that shall not see it."
            )
    return unseen
