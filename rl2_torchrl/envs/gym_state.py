"""What a Gymnasium env is at this moment, as plain data, so that a checkpoint goes on in the middle of an episode."""

from __future__ import annotations

import functools
import inspect
import random
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np

__all__ = ["NoStateError", "put_state", "state_of"]

#: What an env is made of and does not change: these stay as the env's own constructor made them.
_CONSTANT = (
    *(types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType, functools.partial, type),
    *(gymnasium.spaces.Space, gymnasium.envs.registration.EnvSpec, np.dtype),
)
#: Attributes of Gymnasium's own that hold the arguments of constructors, or the env below.
_SKIPPED = {"env", "_saved_kwargs", "_cached_spec", "spec", "metadata"}
#: Attributes of Gymnasium's MuJoCo envs that are looked after apart, or draw pictures.
_OF_MUJOCO = {"data", "model", "mujoco_renderer"}


class NoStateError(Exception):
    """An env holds something that cannot be saved as plain data; the message names it."""


def state_of(env: gymnasium.Env) -> list[dict[str, Any]]:
    """The state of ``env``, layer by layer from the outermost wrapper: numbers, texts, arrays, and lists of them.

    A layer with ``get_state()`` and ``set_state(state)`` of its own says what its state is. Of all others it is their attributes:
    numbers, texts, arrays, containers and random number generators; and, in Gymnasium's MuJoCo envs, the simulation.

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
    return [_layer_state(layer) for layer in _layers(env)]


def put_state(env: gymnasium.Env, state: list[dict[str, Any]]) -> None:
    """Puts back what `state_of` returned, into the same env or one that was made alike."""
    for layer, saved in zip(_layers(env), state, strict=True):
        if "own" in saved:
            layer.set_state(saved["own"])
            continue
        for name, value in saved["attributes"].items():
            vars(layer)[name] = _restored(value, vars(layer).get(name))
        if "simulation" in saved:
            _put_simulation(layer, saved["simulation"])


def _layers(env: gymnasium.Env) -> Iterator[gymnasium.Env]:
    while isinstance(env, gymnasium.Wrapper):
        yield env
        env = env.env
    yield env


def _layer_state(layer: gymnasium.Env) -> dict[str, Any]:
    if _says_its_state(layer):
        return {"own": layer.get_state()}
    is_mujoco = hasattr(layer, "mujoco_renderer") and hasattr(layer, "data")
    skipped = _SKIPPED | _OF_MUJOCO if is_mujoco else _SKIPPED
    attributes = {}
    for name, value in vars(layer).items():
        if name not in skipped and not isinstance(value, _CONSTANT):
            attributes[name] = _saved(value, f"{type(layer).__name__}.{name}")
    return {"attributes": attributes, **({"simulation": _simulation(layer)} if is_mujoco else {})}


def _says_its_state(layer: gymnasium.Env) -> bool:
    """Whether ``layer``'s class has ``get_state()`` and ``set_state(state)``; MuJoCo envs' own takes two arguments."""
    setter = getattr(type(layer), "set_state", None)
    return hasattr(type(layer), "get_state") and setter is not None and len(inspect.signature(setter).parameters) == 2


# ----------------------------------------------------------------- values
def _saved(value: Any, where: str) -> Any:
    """``value`` with its type, so that arithmetic on it goes on as it was."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, np.generic):
        return ["scalar", np.asarray(value)]
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return ["array", value.copy()]
    if isinstance(value, np.random.Generator):
        return ["generator", value.bit_generator.state]
    if isinstance(value, random.Random):
        return ["random", value.getstate()]
    if type(value) in (list, tuple, set):
        return [type(value).__name__, [_saved(item, f"{where}[{n}]") for n, item in enumerate(value)]]
    if type(value) is deque:
        return ["deque", [_saved(item, where) for item in value], value.maxlen]
    if type(value) is dict:
        return ["dict", [[_saved(key, where), _saved(item, f"{where}[{key!r}]")] for key, item in value.items()]]
    raise NoStateError(f"{where} is a {type(value).__name__}, which is no plain data")


def _restored(saved: Any, now: Any) -> Any:
    """The value that `_saved` took, in the memory of what is there ``now`` where others may look at that."""
    if not isinstance(saved, list):
        return saved
    kind, content, *more = saved
    if kind == "scalar":
        return content[()]
    if kind == "array":
        if (
            isinstance(now, np.ndarray)
            and now.flags.writeable
            and (now.shape, now.dtype) == (content.shape, content.dtype)
        ):
            now[...] = content
            return now
        return content.copy()
    if kind == "generator":
        generator = now if isinstance(now, np.random.Generator) else _generator(content["bit_generator"])
        generator.bit_generator.state = content
        return generator
    if kind == "random":
        generator = now if isinstance(now, random.Random) else random.Random()
        generator.setstate(content)
        return generator
    if kind == "deque":
        return deque((_restored(item, None) for item in content), *more)
    if kind == "dict":
        return {_restored(key, None): _restored(item, None) for key, item in content}
    return {"list": list, "tuple": tuple, "set": set}[kind](_restored(item, None) for item in content)


def _generator(name: str) -> np.random.Generator:
    return np.random.Generator({"PCG64": np.random.PCG64, "MT19937": np.random.MT19937}.get(name, np.random.PCG64)())


# ----------------------------------------------------------------- MuJoCo
def _simulation(env: Any) -> dict[str, np.ndarray]:
    """All arrays of the simulation, since envs read some of the last substep's before their next step, and its time."""
    arrays = {name: np.array(value) for name, value in _arrays(env.data)}
    return {**arrays, "time": np.asarray(env.data.time)}


def _put_simulation(env: Any, saved: dict[str, np.ndarray]) -> None:
    import mujoco

    data = env.data
    _write(data, saved)
    mujoco.mj_forward(env.model, data)  # contacts and constraints, whose number changes
    _write(data, saved)


def _write(data: Any, saved: dict[str, np.ndarray]) -> None:
    data.time = float(saved["time"])
    for name, value in _arrays(data):
        if name in saved and value.shape == saved[name].shape:
            value[...] = saved[name]


def _arrays(data: Any) -> Iterator[tuple[str, np.ndarray]]:
    for name in dir(data):
        if not name.startswith("_"):
            value = getattr(data, name, None)
            if isinstance(value, np.ndarray) and value.flags.writeable and value.dtype.kind in "biuf":
                yield name, value
