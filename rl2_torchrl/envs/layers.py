"""What an env is at this moment, as plain data, so that a checkpoint goes on in the middle of an episode: layer by layer."""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import os
import random
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import wrappers
from torch import Generator, default_generator
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase

from rl2_torchrl.envs.plain_data import NoStateError, Restorer, Saver
from rl2_torchrl.envs.simulation import put_simulation, simulation_of

__all__ = ["made_of", "moving_statistics", "put_state", "spaces_within", "state_of", "state_or_reason"]

#: What an env is made of and does not change: these stay as the env's own constructor made them.
_FUNCTIONS = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)
_CONSTANT = (
    *(*_FUNCTIONS, types.ModuleType, type),
    *(gymnasium.spaces.Space, gymnasium.envs.registration.EnvSpec, TensorSpec),
    *(np.dtype, torch.dtype, torch.device, logging.Logger, re.Pattern),
)
#: What is another with each use, but for the program's own generators, which are no env's.
_CHANGING = (np.random.Generator, np.random.RandomState, np.random.BitGenerator, random.Random, Generator, Iterator)
_OF_THE_PROGRAM = (np.random.random.__self__, random.random.__self__, default_generator)
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


def state_of(env: Any) -> list[dict[str, Any]]:
    """The state of ``env``, layer by layer from the outermost wrapper: numbers, texts, arrays, and lists of them.

    A layer with ``get_state()`` and ``set_state(state)`` of its own says what its state is. Of all others it is their attributes:
    numbers, texts, arrays, tensors, containers, random number generators, those of its spaces too, and objects of classes of the
    env's own package, such as MiniGrid's; and of MuJoCo's envs, Gymnasium's and DMControl's, the simulation.

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
    layers = list(_layers(env))
    saver, constants = Saver(_packages(layers), layers), {}
    try:
        states = [_layer_state(layer, saver, constants) for layer in layers]
        spaces = [space for layer in layers for each in _spaces_of(layer).values() for space in each]
        drawn = {id(each): each for space in spaces for each in (space, space._np_random)}
        for where, value in constants.items():  # once all is known that is saved
            if _hides_state(value, saver, dict(drawn)):
                raise NoStateError(f"{where} is a function with a state of its own, which is no attribute of the env")
        return states
    except RecursionError as error:
        raise NoStateError(f"what {type(env).__name__} holds is nested too deep to be saved") from error


def put_state(env: Any, state: list[dict[str, Any]]) -> None:
    """Puts back what `state_of` returned, into the same env or one that was made alike."""
    layers = list(_layers(env))
    restorer = Restorer(_packages(layers), layers)
    for layer, saved in zip(layers, state, strict=True):
        if "own" in saved:
            layer.set_state(saved["own"])
        for name, value in saved.get("attributes", {}).items():
            vars(layer)[name] = restorer(value, vars(layer).get(name))
        if "simulation" in saved:
            put_simulation(*_simulation(layer), saved)
        if "spaces" in saved:
            _put_draws(layer, saved["spaces"])


def made_of(env: Any, *, is_new: bool = False) -> dict[str, Any]:
    """The classes of ``env``'s layers, and the numbers, flags and texts that their constructors were given, by class and name.

    Gymnasium and TorchRL keep these. Of other layers, and where the env ``is_new`` alone, since a task may change them, they are
    the attributes that are named as the constructor's parameters; what it has drawn, or asked the program for, is none of these.

    Examples:
        >>> made_of(gymnasium.wrappers.TimeLimit(gymnasium.make("CartPole-v1").unwrapped, 20))["TimeLimit.max_episode_steps"]
        20
    """
    layers = list(_layers(env))
    found: dict[str, Any] = {"layers": [type(layer).__name__ for layer in layers]}
    for layer in layers:
        own = vars(layer)
        given = {**own.get("_saved_kwargs", {}), **own.get("_constructor_kwargs", {})}
        names = _parameters_of(layer) if is_new else {"frame_skip"} if isinstance(layer, EnvBase) else ()
        given |= {name: own[each] for name in names for each in (name, f"_{name}") if each in own}
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


def state_or_reason(env: Any) -> list[dict[str, Any]] | str:
    """`state_of` ``env``, or in words why it has none."""
    try:
        return state_of(env)
    except NoStateError as error:
        return str(error)


def moving_statistics(env: Any) -> list[str]:
    """Gymnasium's wrappers in ``env`` that normalize by statistics which move with what they see, by their classes' names."""
    return [type(each).__name__ for each in _layers(env) if isinstance(each, _NORMALIZING) and each.update_running_mean]


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


def _layer_state(layer: Any, saver: Saver, constants: dict[str, Any]) -> dict[str, Any]:
    """The state of one layer; attributes that stay as they are go to ``constants``."""
    simulation = _simulation(layer)
    state = {} if simulation is None else simulation_of(*simulation)
    if _is(layer, "dm_control.mujoco.engine", "Physics"):
        return state
    if _says_its_state(layer):
        return {"own": layer.get_state(), **state}
    skipped = {*_SKIPPED, *_names_below(layer), *(_OF_MUJOCO if simulation else ())}
    skipped |= _OF_TORCHRL if isinstance(layer, EnvBase) else set()
    attributes = {}
    for name, value in vars(layer).items():
        where = f"{type(layer).__name__}.{name}"
        if name not in skipped and _is_constant(value):
            constants[where] = value
        elif name not in skipped:
            attributes[name] = saver(value, where)
    return {"attributes": attributes, "spaces": _draws_of(layer), **state}


def _is_constant(value: Any) -> bool:
    """Whether ``value`` is a constant, or a container of nothing else, such as a table of moves."""
    if type(value) not in (dict, list, tuple):
        return isinstance(value, _CONSTANT)
    return len(value) > 0 and all(map(_is_constant, value.values() if type(value) is dict else value))


def _hides_state(value: Any, saver: Saver, seen: dict[int, Any]) -> bool:
    """Whether a constant has along what changes and is not saved: a generator, an iterator, or the object whose method it is.

    Numbers, arrays and containers that a function closes over are taken for its settings, as they nearly always are.
    """
    if id(value) in seen or saver.has_met(value) or any(value is each for each in _OF_THE_PROGRAM):
        return False
    seen[id(value)] = value
    is_method = (
        isinstance(value, types.MethodType) and saver.is_own(value.__self__) and not saver.has_met(value.__self__)
    )
    if is_method or isinstance(value, _CHANGING):
        return True
    return any(_hides_state(each, saver, seen) for each in _carried(value, saver))


def _carried(value: Any, saver: Saver) -> list[Any]:
    """What is in a container, a space or an object of the env's own; of a function what it closes over, and known arguments."""
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.FunctionType):
        # An empty cell, of a name that is not given yet, has no contents to ask for.
        known = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        return [*gc.get_referents(*(value.__closure__ or ())), *known]
    if isinstance(value, types.MethodType):
        return [value.__self__, *getattr(value.__self__, "__dict__", {}).values()]
    if isinstance(value, types.BuiltinFunctionType):  # whose own may be a whole module
        return [value.__self__]
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return list(value)
    if hasattr(value, "__wrapped__"):
        return [value.__wrapped__]
    is_open = isinstance(value, gymnasium.spaces.Space) or saver.is_own(value)
    return list(vars(value).values()) if is_open and hasattr(value, "__dict__") else []


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
    if _is(layer, "dm_control.mujoco.engine", "Physics"):
        return layer.model.ptr, layer.data.ptr
    if hasattr(layer, "mujoco_renderer") and hasattr(layer, "data"):
        return layer.model, layer.data
    return None


def _says_its_state(layer: Any) -> bool:
    """Whether ``layer``'s class has ``get_state()`` and ``set_state(state)``; MuJoCo envs' own takes two arguments."""
    setter = getattr(type(layer), "set_state", None)
    return hasattr(type(layer), "get_state") and setter is not None and len(inspect.signature(setter).parameters) == 2


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
