"""Arguments that Python would take for something else, or refuse far from where they were given: checks for all who take them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from operator import index
from os import PathLike
from typing import Any, SupportsIndex

import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase

__all__ = [
    *(
        "above_0",
        "as_batch_size",
        "as_list",
        "kind_of",
        "needs",
        "noted",
        "require_collector",
        "require_env",
        "require_flags",
    ),
    *("require_folder_name", "require_generator", "require_network", "require_numbers", "require_own_name"),
    *("require_time_last", "require_torch", "whole", "whole_numbers"),
]


def as_list(name: str, values: Iterable) -> list:
    """``values`` as a list, and no single string, whose letters would be taken for them."""
    if isinstance(values, str):
        raise TypeError(f"{name}={values!r} would be read as its letters: give a list, {name}=[{values!r}].")
    if not isinstance(values, Iterable):
        raise TypeError(f"{name}={values!r} is no list: give one, such as {name}=[{values!r}].")
    return list(values)


def kind_of(value: Any) -> str:
    """What ``value`` is, for messages: its class's name, or that it is a class itself."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__


@contextmanager
def needs(said: str) -> Iterator[None]:
    """ImportError of what is ``said``, such as which extra to install, where an import within fails."""
    try:
        yield
    except ImportError as error:
        raise ImportError(said) from error


@contextmanager
def noted(said: str) -> Iterator[None]:
    """Adds to errors of a user's own part what it was asked: Python's and PyTorch's words do not name the argument."""
    try:
        yield
    except Exception as error:
        error.add_note(said)
        raise


def require_own_name(cls: type, known: Iterable[type]) -> None:
    """ValueError where ``cls`` has the name of another of the ``known`` classes; not of itself, made once more in a notebook."""
    for other in known:
        same = (other.__module__, other.__qualname__) == (cls.__module__, cls.__qualname__)
        if other.__name__ == cls.__name__ and not same:
            raise ValueError(
                f"{cls.__module__}.{cls.__qualname__} has the name of {other.__module__}.{other.__qualname__}, which "
                "is known: agents' files say names alone, and those saved with that one would be played by yours. Give "
                "it another name."
            )


def above_0(name: str, value: float) -> float:
    """``value``; ValueError unless it is a number above 0.

    Examples:
        >>> above_0("radius", 0.5)
        0.5
    """
    if not value > 0:
        raise ValueError(f"{name}={value} must be above 0.")
    return value


def require_collector(collector: Any, call: str) -> None:
    """TypeError where what comes first in ``call`` is no collector, as where two arguments have changed places."""
    if not hasattr(collector, "total_frames"):
        raise TypeError(f"{kind_of(collector)} is no collector, which comes first: {call}.")


def require_env(env: Any, call: str) -> None:
    """TypeError where what is given as ``env`` in ``call`` is none, such as its class, or a function that makes one."""
    if not isinstance(env, EnvBase):
        raise TypeError(f"{kind_of(env)} is no env: {call}.")


def require_flags(**arguments: Any) -> None:
    """TypeError where what is given is not True or False: to Python any text is true, ``"no"`` and ``"False"`` too."""
    for name, value in arguments.items():
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"{name}={value!r} is neither True nor False.")


def require_generator(generator: Any) -> None:
    """TypeError where what is given is neither a generator nor None, such as a seed."""
    if not isinstance(generator, torch.Generator | None):
        raise TypeError(f"{kind_of(generator)} is no generator: give torch.Generator().manual_seed(0), say.")


def require_folder_name(**arguments: str | PathLike) -> None:
    """ValueError where what names a folder is empty, as a variable of the shell that is not set: that is the current folder."""
    for name, value in arguments.items():
        if value == "":
            raise ValueError(
                f"{name} is empty, and files would go to the current folder: name one, or that, {name}='.'."
            )


def require_numbers(**arguments: Any) -> None:
    """TypeError where what is given is neither a number nor None, such as text: YAML's ``1e-3`` is, ``1.0e-3`` is none."""
    for name, value in arguments.items():
        if not isinstance(value, Real | torch.Tensor | None):
            raise TypeError(
                f"{name}={value!r} is no number but {kind_of(value)}: in YAML write 1.0e-3, since 1e-3 is text."
            )


def as_batch_size(batch_size: Sequence[int]) -> torch.Size:
    """``batch_size`` as PyTorch's; TypeError where it is one number."""
    if isinstance(batch_size, int):
        raise TypeError(f"batch_size={batch_size} is a number: give the dimensions, batch_size=({batch_size},).")
    return torch.Size(batch_size)


def require_network(policy: Any, call: str) -> None:
    """TypeError where what is given as ``policy`` in ``call`` is none, such as an `AdaptiveAgent`."""
    if not isinstance(policy, TensorDictModuleBase):
        raise TypeError(
            f"{kind_of(policy)} is no policy: {call} takes an actor, of an agent that was loaded its .policy, or any "
            "TensorDictModule that gives actions, such as a controller by hand, TensorDictModule(function, ['observation'], "
            "['action'])."
        )


def require_time_last(batch: TensorDictBase) -> None:
    """ValueError where ``batch`` says, by its dimensions' names, that it is not ``[*B, T]``, as one that was transposed does."""
    if "time" in batch.names[:-1]:
        raise ValueError(
            f"the batch {list(batch.shape)} has its dimensions named {batch.names}, so that rows would be taken for steps: "
            "give it as [*B, T], batch.transpose(0, 1), say."
        )


def require_played(batch: TensorDictBase) -> None:
    """ValueError where steps of ``batch`` ``[*B, T]`` are padding."""
    mask = batch.get(("collector", "mask"), None)
    if mask is not None and not bool(mask.all()):
        raise ValueError(
            f"{int((~mask).sum())} steps of the batch are padding (('collector', 'mask') says so), and would be trained on as if "
            "they had been played: collect with split_trajs=False, the default. Rows may hold several trials."
        )


def require_torch(**arguments: Any) -> None:
    """TypeError where what is given is no tensor, such as a list or an array of NumPy's."""
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} is no tensor but {kind_of(value)}: give torch.as_tensor({name}).")


def whole(name: str, value: SupportsIndex) -> int:
    """``value`` as Python's integer, NumPy's too; ValueError unless it is a whole number, at least 1."""
    try:
        number = 0 if isinstance(value, bool) else index(value)
    except TypeError:  # of arrays and tensors of many numbers too
        number = 0
    if number < 1:
        raise ValueError(f"{name}={value!r} must be a whole number, at least 1.")
    return number


def whole_numbers(name: str, values: Iterable[SupportsIndex]) -> list[int]:
    """The list ``values``, each of them `whole`."""
    return [whole(name, value) for value in as_list(name, values)]
