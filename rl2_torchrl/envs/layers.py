"""What an env is at this moment, as plain data, so that a checkpoint goes on in the middle of an episode: layer by layer."""

from __future__ import annotations

import functools
import inspect
import logging
import os
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import wrappers
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase

from rl2_torchrl.codec import NoStateError
from rl2_torchrl.envs.simulation import put_simulation, simulation_of
from rl2_torchrl.storage import from_bytes, to_bytes

__all__ = ["made_of", "moving_statistics", "put_state", "spaces_within", "state_of", "state_or_reason"]

#: What an env is made of and does not change: these stay as the env's own constructor made them.
_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
_CONSTANT = (
    *(*_FUNCTIONS, types.ModuleType, type),
    *(gymnasium.spaces.Space, gymnasium.envs.registration.EnvSpec, TensorSpec),
    *(np.dtype, torch.dtype, torch.device, logging.Logger, re.Pattern),
)
#: Attributes of Gymnasium's and TorchRL's own that hold the arguments of constructors, or read an info.
_SKIPPED = {"_saved_kwargs", "_cached_spec", "spec", "metadata", "_constructor_kwargs", "_info_dict_reader"}
#: Attributes of Gymnasium's MuJoCo envs that are looked after apart, or draw pictures.
_OF_MUJOCO = {"data", "model", "mujoco_renderer"}
#: Packages whose objects are none of an env's own.
_LIBRARIES = {"abc", "builtins", "gymnasium", "rl2_torchrl", "tensordict", "torch", "torchrl", "typing"}
#: Gymnasium's wrappers that normalize, of an env and of a vector env.
_NORMALIZING = (wrappers.NormalizeObservation, wrappers.NormalizeReward)
_NORMALIZING += (wrappers.vector.NormalizeObservation, wrappers.vector.NormalizeReward)
#: Gymnasium's module of the statistics by which its wrappers normalize.
_STATISTICS = "gymnasium.wrappers.utils"


def state_of(env: Any) -> bytes:
    """The state of ``env``, layer by layer from the outermost wrapper, as `to_bytes` writes it.

    A layer with ``get_state()`` and ``set_state(state)`` of its own says what its state is. Of all others it is their attributes:
    numbers, texts, arrays, tensors, containers, random number generators, those of its spaces too, and objects of classes of the
    env's own package, such as MiniGrid's; and of MuJoCo's envs, Gymnasium's and DMControl's, the simulation. Functions are no
    state, nor is what they close over.

    Args:
        env: an env of Gymnasium's, or one of TorchRL's, such as DMControl's.

    Raises:
        NoStateError: an attribute is none of these.

    Examples:
        >>> env = gymnasium.make("CartPole-v1")
        >>> _ = env.reset(seed=0)
        >>> saved = state_of(env)
        >>> once = env.step(0)[0]
        >>> put_state(env, saved)
        >>> bool((env.step(0)[0] == once).all())
        True
    """
    layers = _layers_of(env)
    state = {name: _attributes_of(layer) for name, layer in layers.items()}
    state["beside"] = [_beside(layer) for layer in layers.values()]
    known = list(layers.values())
    try:
        return to_bytes(state, _packages(known), known)
    except RecursionError as error:
        raise NoStateError(f"what {type(env).__name__} holds is nested too deep to be saved") from error


def put_state(env: Any, state: bytes) -> None:
    """Puts back what `state_of` returned, into the same env or one that was made alike."""
    layers = _layers_of(env)
    known, now = list(layers.values()), {name: vars(layer) for name, layer in layers.items()}
    saved = from_bytes(state, f"the state of {type(env).__name__}", _packages(known), known, now)
    for (name, layer), beside in zip(layers.items(), saved["beside"], strict=True):
        if "own" in beside:
            layer.set_state(beside["own"])
        vars(layer).update(saved[name])
        if "simulation" in beside:
            put_simulation(*_simulation(layer), beside)
        _put_draws(layer, beside["spaces"])


def made_of(env: Any) -> dict[str, Any]:
    """The classes of ``env``'s layers, and the numbers, flags and texts that their constructors were given, by class and name.

    Gymnasium and TorchRL keep these; of other layers they are the attributes that are named as the constructor's parameters.

    Examples:
        >>> made_of(gymnasium.wrappers.TimeLimit(gymnasium.make("CartPole-v1").unwrapped, 20))["TimeLimit.max_episode_steps"]
        20
    """
    layers = list(_layers(env))
    found: dict[str, Any] = {"layers": [type(layer).__name__ for layer in layers]}
    for layer in layers:
        own = vars(layer)
        given = {**own.get("_saved_kwargs", {}), **own.get("_constructor_kwargs", {})}
        given |= {name: own[each] for name in _parameters_of(layer) for each in (name, f"_{name}") if each in own}
        plain = {name: value for name, value in given.items() if isinstance(value, bool | int | float | str)}
        # Not where it writes to: each run may have a folder of its own.
        plain = {name: value for name, value in plain.items() if os.sep not in str(value)}
        found |= {f"{type(layer).__name__}.{name}": value for name, value in plain.items()}
    return found


def _parameters_of(layer: Any) -> set[str]:
    """Names of the parameters of the constructors of ``layer``'s class and those above it."""
    constructors = [vars(cls)["__init__"] for cls in type(layer).__mro__ if "__init__" in vars(cls)]
    functions = [each for each in constructors if isinstance(each, types.FunctionType)]
    return {name for each in functions for name in inspect.signature(each).parameters}


def state_or_reason(env: Any) -> bytes | str:
    """`state_of` ``env``, or in words why it has none."""
    try:
        return state_of(env)
    except NoStateError as error:
        return str(error)


def moving_statistics(env: Any) -> list[str]:
    """Gymnasium's wrappers in ``env`` that normalize by statistics which move with what they see, by their classes' names."""
    return [type(each).__name__ for each in _layers(env) if isinstance(each, _NORMALIZING) and each.update_running_mean]


def _layers_of(env: Any) -> dict[str, Any]:
    """The layers by their numbers and classes, the outermost first."""
    return {f"layer {number}, {type(layer).__name__}": layer for number, layer in enumerate(_layers(env))}


def _layers(env: Any) -> Iterator[Any]:
    yield env
    for name in _names_below(env):
        yield from _layers(vars(env)[name])


def _names_below(layer: Any) -> tuple[str, ...]:
    """Attributes of a layer that are layers, too."""
    if isinstance(layer, gymnasium.Wrapper | gymnasium.vector.VectorWrapper):
        return ("env",)
    if isinstance(layer, EnvBase) and "_env" in vars(layer):
        return ("_env",)
    return ("_task", "_physics") if _is(layer, "dm_control.rl.control", "Environment") else ()


def _attributes_of(layer: Any) -> dict[str, Any]:
    """The attributes of one layer, but for those that stay as they are, or of which it says by itself what they are."""
    if _is_physics(layer) or _says_its_state(layer):
        return {}
    skipped = {*_SKIPPED, *_names_below(layer), *(_OF_MUJOCO if _simulation(layer) else ())}
    skipped |= _OF_TORCHRL if isinstance(layer, EnvBase) else set()
    attributes = {name: each for name, each in vars(layer).items() if name not in skipped and not _is_constant(each)}
    if _simulation(layer):  # whose arrays are looked into from elsewhere, too
        attributes = {name: each for name, each in attributes.items() if not _is_others_memory(each)}
    return attributes


def _is_others_memory(value: Any) -> bool:
    owner = value
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return isinstance(value, np.ndarray) and not isinstance(owner, torch.Tensor | bytes | None)


def _beside(layer: Any) -> dict[str, Any]:
    """What else the state of one layer is: its own, MuJoCo's simulation, and where the draws of its spaces stand."""
    simulation = _simulation(layer)
    own = {"own": layer.get_state()} if _says_its_state(layer) else {}
    return {**own, **(simulation_of(*simulation) if simulation else {}), "spaces": _draws_of(layer)}


def _is_constant(value: Any) -> bool:
    """Whether ``value`` is a constant, or a container of nothing else, such as a table of moves."""
    if type(value) not in (dict, list, tuple):
        return isinstance(value, _CONSTANT)
    return len(value) > 0 and all(map(_is_constant, value.values() if type(value) is dict else value))


def _draws_of(layer: Any) -> dict[str, list[dict[str, Any] | None]]:
    """Where the random numbers of a layer's spaces stand, of which some envs draw; None of a space that has drawn none."""
    drawn = {name: [each._np_random for each in spaces] for name, spaces in _spaces_of(layer).items()}
    return {name: [each and each.bit_generator.state for each in rng] for name, rng in drawn.items() if any(rng)}


def _put_draws(layer: Any, states: dict[str, list[dict[str, Any] | None]]) -> None:
    for name, spaces in _spaces_of(layer).items():
        for space, state in zip(spaces, states.get(name, [None] * len(spaces)), strict=True):
            if state is None:
                space._np_random = None
            else:
                space.np_random.bit_generator.state = state


def _spaces_of(layer: Any) -> dict[str, list[gymnasium.spaces.Space]]:
    """A layer's spaces by the names of attributes that are, or hold, some, with those within; they may be its class's."""
    attributes = {name: value for each in (*reversed(type(layer).__mro__), layer) for name, value in vars(each).items()}
    found = {name: list(spaces_within(each)) for name, each in attributes.items()}
    return {name: spaces for name, spaces in found.items() if spaces}


def spaces_within(value: Any, seen: dict[int, Any] | None = None) -> Iterator[gymnasium.spaces.Space]:
    """The spaces in ``value``, a space, a container of spaces, or something else, but for those that were ``seen``."""
    seen = {} if seen is None else seen
    if not isinstance(value, gymnasium.spaces.Space | dict | list | tuple) or id(value) in seen:
        return
    seen[id(value)] = value
    if isinstance(value, gymnasium.spaces.Space):
        yield value
        value = vars(value)
    for each in value.values() if isinstance(value, dict) else value:
        yield from spaces_within(each, seen)


def _simulation(layer: Any) -> tuple[Any, Any] | None:
    """MuJoCo's model and data, of a layer that has them."""
    if _is_physics(layer):
        return layer.model.ptr, layer.data.ptr
    if hasattr(layer, "mujoco_renderer") and hasattr(layer, "data"):
        return layer.model, layer.data
    return None


def _says_its_state(layer: Any) -> bool:
    """Whether ``layer``'s class has ``get_state()`` and ``set_state(state)``; MuJoCo envs' own takes two arguments."""
    setter = getattr(type(layer), "set_state", None)
    is_pair = hasattr(type(layer), "get_state") and setter is not None and not _is_physics(layer)
    return is_pair and len(inspect.signature(setter).parameters) == 2


def _is_physics(layer: Any) -> bool:
    return _is(layer, "dm_control.mujoco.engine", "Physics")


def _is(layer: Any, module: str, name: str) -> bool:
    """Whether ``layer`` is of a class of a library that may not be there."""
    return module in sys.modules and isinstance(layer, getattr(sys.modules[module], name))


def _packages(layers: list[Any]) -> set[str]:
    """The packages of the layers' classes, but for libraries of no envs; of these the module of statistics."""
    classes = (kind for layer in layers for kind in type(layer).__mro__)
    return {kind.__module__.partition(".")[0] for kind in classes} - _LIBRARIES | {_STATISTICS}


class _Bare(EnvBase):
    """An env with nothing of its own."""

    _reset = _step = _set_seed = None


#: Attributes that every env of TorchRL's has: specs, modules, hooks, whether it is closed; and what a `TaskSampler` and a
#: collector's `Turns` hang up there.
_OF_TORCHRL = {*vars(_Bare()), "set_seed", "_reset", "_step"}
