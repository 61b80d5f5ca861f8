"""`settings_of`: what decides how a training goes on, by name, so that a resumed run is told from another one."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterable, Mapping
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import torch
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModuleBase
from torch import nn
from torchrl.collectors import BaseCollector
from torchrl.envs import EnvBase

from rl2_torchrl.envs import GymTaskEnv, GymVectorEnv
from rl2_torchrl.envs.layers import made_of
from rl2_torchrl.tasks import TaskSampler, owner_of
from rl2_torchrl.trial import base_of, own_transforms, rows_of, transforms_of
from rl2_torchrl.update import PPOUpdate
from rl2_torchrl.workers import TrialWorkers

__all__ = ["differences", "moved", "named", "networks_of", "parts_of", "settings_of"]

Settings = dict[str, Any]

#: Attributes that no user sets, or that say how a thing is done and not what.
_INNER = {"training", "is_closed", "backend", "reason", "foreach", "fused", "capturable", "differentiable", "params"}
_INNER |= {"given_options", "given_coefficients"}
_NOT_PLAIN = object()
_FEW = 64  # numbers of a buffer that is compared
#: From here on a seed is taken for one of the 64 bits that PyTorch draws for a program which gives none.
_DRAWN = 2**32


def settings_of(collector: BaseCollector, update: Any) -> Settings:
    """Settings of env, tasks, collector, update, loss, networks, and PyTorch's seed, as plain values by dotted name.

    Of a part, also of one of yours: its class, and its public attributes that are numbers, texts, functions, or lists of these; of
    a function its name, and the numbers, texts and flags that it closes over.
    Of `TrialWorkers` the first one's env is asked. Of envs in other processes else nothing is known, nor of an ``update`` that
    is no `PPOUpdate`.
    """
    settings = {"torch.seed": _given_seed(), **_env_of(collector)}
    settings |= {"collector.class": _name(collector)}
    if hasattr(collector, "requested_frames_per_batch"):
        settings["collector.frames_per_batch"] = collector.requested_frames_per_batch
    return settings | (_update(update) if isinstance(update, PPOUpdate) else {"update.class": _name(update)})


def _given_seed() -> int | None:
    """`torch.manual_seed`'s; None where nobody has called it: each process has another one then, which is no setting."""
    return seed if (seed := torch.initial_seed()) < _DRAWN else None


def networks_of(collector: BaseCollector, update: Any) -> dict[str, Any]:
    """Shapes of all that the loss trains or keeps, by name; and the kinds of device that env and networks are on."""
    env, loss = getattr(collector, "env", None), getattr(update, "loss", None)
    state = loss.state_dict() if isinstance(loss, nn.Module) else {}
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    devices = {"env": getattr(env, "device", None), "networks": next((t.device for t in tensors.values()), None)}
    shapes = {name: list(value.shape) for name, value in tensors.items()}
    return {**{f"device of {name}": torch.device(each or "cpu").type for name, each in devices.items()}, **shapes}


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What differs, in words by name."""
    words = {
        name: [json.dumps(side[name]) if name in side else "none" for side in (then, now)] for name in {**then, **now}
    }
    differing = [name for name, (old, new) in words.items() if old != new]
    return {name: "{}: {} then, {} now".format(name, *words[name]) for name in differing}


def moved(then: Mapping[str, Any], now: Mapping[str, Any]) -> set[str]:
    """Names of attributes of env, update and networks that are others ``now`` than ``then``: where they stand, and no settings.

    Of an env that is gone, as where a rollout has failed, nothing is said: what is missing has not moved.
    """
    kinds = ("env.", "advantage.", "loss.", "update.")
    return {name for name in differences(then, now) if name in now and name.startswith(kinds)}


def _env_of(collector: BaseCollector) -> Settings:
    if not isinstance(collector, TrialWorkers):
        return _env(getattr(collector, "env", None))
    # Without seeds: they are the worker's, of whom a resumed run has others.
    return {name: value for name, value in collector.of_env(_env).items() if not name.endswith(".seed")}


def _env(env: EnvBase | None) -> Settings:
    if env is None:
        return {}
    base = base_of(env)
    settings = {**_part("env", base), **_gymnasium(base), **_rows(env)}
    specs = {"observation": env.observation_spec, "action": env.full_action_spec, "state": env.full_state_spec}
    for name, spec in specs.items():
        settings[f"env.{name}"] = {str(key): list(leaf.shape) for key, leaf in spec.items(True, True)}
    transforms = named("env", transforms_of(env))
    # In their order, each after the other.
    settings["env.transforms"] = [name for each in own_transforms(env) for name, t in transforms.items() if t is each]
    for name, transform in transforms.items():
        settings |= _part(name, transform)
        # What it scales and shifts by, as RewardScaling does, are buffers.
        buffers = {
            each: value.tolist() for each, value in transform.named_buffers(recurse=False) if value.numel() <= _FEW
        }
        settings |= {f"{name}.{each}": value for each, value in buffers.items() if each[0] != "_"}
        if isinstance(transform, TaskSampler):
            settings[f"{name}.seed"] = _plain(transform.given_seed)
            owner = owner_of(transform.distribution)
            if not hasattr(owner, "__code__"):  # an object, with its range among its attributes
                settings |= _part(f"{name}.distribution", owner)
    return settings


def _rows(env: EnvBase) -> Settings:
    """What all rows below ``env`` are made of alike; of what differs, such as what a row has drawn, only that it does."""
    base = base_of(env)
    if isinstance(base, GymVectorEnv):
        made = base.rows_made_of()
    else:
        rows = map(base_of, rows_of(env))
        made = [row._made_of if isinstance(row, GymTaskEnv) else made_of(row) for row in rows]
    if not made:
        return {}
    first, *others = made
    alike = {name for name, value in first.items() if all(other.get(name) == value for other in others)}
    return {f"env.rows.{name}": value if name in alike else "each row's own" for name, value in first.items()}


def named(prefix: str, parts: Iterable[Any]) -> dict[str, Any]:
    """``parts`` by the names of their settings: their classes, with a number where there are several of one."""
    found: dict[str, Any] = {}
    for part in parts:
        name = f"{prefix}.{_name(part)}"
        names = (name, *(f"{name}{number}" for number in range(2, 2 + len(found))))
        found[next(each for each in names if each not in found)] = part
    return found


def _gymnasium(base: EnvBase) -> Settings:
    """Id and options of a Gymnasium env, single or as a vector."""
    # Not getattr: envs in other processes are asked for each attribute that is not here.
    inner = vars(base).get("envs") or vars(base).get("_env")
    spec = getattr(inner, "spec", None)
    kwargs = _plain(getattr(spec, "kwargs", {}))
    return {} if spec is None else {"env.id": getattr(spec, "id", None), "env.kwargs": kwargs}


def parts_of(update: PPOUpdate) -> dict[str, Any]:
    """What an update is made of, by the names of their settings: advantage, loss, and all modules of terms and networks."""
    loss = update.loss
    parts = {"update": update, "loss": loss, "advantage": update.advantage}
    for name in ("actor_network", "critic_network"):
        if (network := getattr(loss, name, None)) is not None:
            parts |= network.named_modules(prefix=f"loss.{name}")
    terms = named("loss", getattr(loss, "terms", ()))
    for name, term in terms.items():
        parts |= {f"{name}.modules.{inner}": module for inner, module in term.named_modules() if inner}
    return parts | terms


def _update(update: PPOUpdate) -> Settings:
    settings: Settings = {"update.optimizer": _name(update.optimizer), "update.processes": update.processes}
    for name, part in parts_of(update).items():
        settings |= _part(name, part)
        if isinstance(part, TensorDictModuleBase) and part is not update.loss:
            settings |= {f"{name}.{keys}": _plain(list(getattr(part, keys))) for keys in ("in_keys", "out_keys")}
        if isinstance(part, ProbabilisticTensorDictModule):  # bounds of actions are tensors
            given = (part.distribution_kwargs or {}).items()
            given = {key: each.tolist() if isinstance(each, torch.Tensor) else each for key, each in given}
            settings[f"{name}.distribution_kwargs"] = _plain(given)
    for number, options in enumerate(update.given_options):
        group = "update" if number == 0 else f"update.group{number}"
        settings |= {f"{group}.{name}": _plain(value) for name, value in options.items() if name not in _INNER}
    settings |= {f"loss.{name}": value for name, value in update.given_coefficients.items()}
    return {name: value for name, value in settings.items() if value is not _NOT_PLAIN}


def _part(prefix: str, part: Any) -> Settings:
    own = getattr(part, "__dict__", {})  # none where there are __slots__
    values = {name: _plain(value) for name, value in own.items() if name[0] != "_" and name not in _INNER}
    settings = {f"{prefix}.{name.removeprefix('given_')}": v for name, v in values.items() if v is not _NOT_PLAIN}
    return {f"{prefix}.class": _name(part), **settings}


def _plain(value: Any) -> Any:
    """``value`` as JSON has it, a function by its name; else `_NOT_PLAIN`."""
    if isinstance(value, (np.generic, torch.Tensor)) and value.ndim == 0:
        value = value.item()
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [_plain(item) for item in value]
        return _NOT_PLAIN if _NOT_PLAIN in items else items
    if isinstance(value, dict):
        items = {str(name): _plain(item) for name, item in value.items()}
        return {name: item for name, item in items.items() if item is not _NOT_PLAIN}
    if isinstance(value, partial):
        given = [_plain(item) for item in (*value.args, *value.keywords.values())]
        of = _plain(value.func)
        return [_name(value.func) if of is _NOT_PLAIN else of, *(item for item in given if item is not _NOT_PLAIN)]
    # Without its module, as classes: a program has another name than where it is imported, or spawned.
    is_function = callable(value) and not isinstance(value, nn.Module) and hasattr(value, "__qualname__")
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}".replace("__mp_main__", "__main__")
    if not is_function:
        return _NOT_PLAIN
    name, numbers = f"{value.__qualname__}()", _closed_over(value)
    return {name: numbers} if numbers else name


def _closed_over(function: Any) -> dict[str, Any]:
    """The numbers, flags and texts, but for paths, that ``function`` closes over: what is more may be the whole program's."""
    names = function.__code__.co_freevars if hasattr(function, "__code__") else ()
    cells = zip(names, getattr(function, "__closure__", None) or (), strict=True)
    values = (
        (name, each) for name, cell in cells for each in gc.get_referents(cell)
    )  # none in a cell that is still empty
    plain = {name: each for name, each in values if isinstance(each, bool | int | float | str)}
    return {
        name: each for name, each in plain.items() if os.sep not in str(each)
    }  # each run may have a folder of its own


def _name(part: Any) -> str:
    return type(part).__qualname__ if not hasattr(part, "__qualname__") else part.__qualname__
