"""`Kept`: attributes that change as a run goes on, such as a filter's mean or a penalty's weight, for checkpoints."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torchrl.envs import Transform

from rl2_torchrl.codec import put_where
from rl2_torchrl.envs.tensor_env import TensorEnv
from rl2_torchrl.storage import to_bytes
from rl2_torchrl.update import PPOUpdate

__all__ = ["Kept"]

log = logging.getLogger(__name__)

#: What PyTorch's modules and TorchRL's transforms are made of, and the time of day of TorchRL's `Timer`.
_INNER = {*vars(nn.Module()), "_container", "_parent", "_missing_tolerance", "last_inv_time"}
#: Packages whose private attributes are their own business, but for what transforms keep of their rows.
_LIBRARIES = {"rl2_torchrl", "torchrl", "tensordict", "torch"}


class Kept:
    """Attributes of ``parts`` that have changed since this was made: module states have buffers alone.

    Attributes may be what `save_tree` takes, or have a ``state_dict``. What has changed in place is put back in place, since others
    may hold it too; what another has taken the place of is replaced, and a tensor that looked into another one's memory no more
    does. The log names what another has taken the place of where that cannot be saved, and objects of the part's own package that
    have changed within, without a ``state_dict``. What changes within others nobody sees, nor what a function closes over or reads
    of its file: make it an attribute of a part. A part with a state of its own, a module by ``get_extra_state``, says by itself
    what it keeps; of a `TensorEnv` it is public numbers.

    Args:
        parts: by name.

    Examples:
        >>> first, second = nn.Module(), nn.Module()
        >>> kept, others = Kept({"filter": first}), Kept({"filter": second})
        >>> first.mean = torch.ones(2)
        >>> others.load_state_dict(kept.state_dict())
        >>> second.mean
        tensor([1., 1.])
    """

    def __init__(self, parts: Mapping[str, Any]):
        self._parts = {name: each for name, each in parts.items() if hasattr(each, "__dict__") and not _has_state(each)}
        #: Values themselves, since what is looked at later may be another at its address; and what tells whether they have changed.
        self._first = {
            name: {attribute: (value, _digest(value, part)) for attribute, value in _attributes(part)}
            for name, part in self._parts.items()
        }
        #: What has been put back had changed before this was made.
        self._restored: set[tuple[str, str]] = set()
        self._told: set[str] = set()

    def state_dict(self) -> dict[str, dict[str, list]]:
        """By part and attribute what is another by now, and whether it is the same object."""
        state = defaultdict(dict)
        for name, part in self._parts.items():
            for attribute, value in _attributes(part):
                first, digest = self._first[name].get(attribute, (None, None))
                now, is_another = _digest(value, part), value is not first
                if now is None or (is_another and hasattr(value, "state_dict")):
                    # A library's specs and caches are its own business.
                    if is_another and (_root(type(part)) not in _LIBRARIES or callable(value)):
                        self._tell(f"{name}.{attribute}")
                elif now != digest and _digest(value) is None:
                    self._tell(f"{name}.{attribute}")
                elif now != digest or (name, attribute) in self._restored:
                    state[name][attribute] = [not is_another, _saved(value)]
        return dict(state)

    def load_state_dict(self, state: Mapping[str, Mapping[str, list]]) -> None:
        """Gives the parts that are there what `state_dict` returned."""
        for name, attributes in state.items():
            if name in self._parts:
                for attribute, (in_place, saved) in attributes.items():
                    self._restored.add((name, attribute))
                    _put(self._parts[name], attribute, in_place, saved)

    def _tell(self, name: str) -> None:
        if name not in self._told:
            self._told.add(name)
            log.warning(
                "%s changes in the training, and checkpoints cannot hold it: a resumed run begins with its first value. Let "
                "numbers or tensors change that are attributes; or write get_extra_state() and set_extra_state(state) (of a "
                "module), state_dict() and load_state_dict(state) (else).",
                name,
            )


def _attributes(part: Any) -> Iterator[tuple[str, Any]]:
    """Attributes of ``part`` that may be kept, by name."""
    is_private = _root(type(part)) in _LIBRARIES and not isinstance(part, Transform)
    in_its_state = ("optimizer", "advantage") if isinstance(part, PPOUpdate) else ()
    for name, value in vars(part).items():
        if name in _INNER or name in in_its_state or isinstance(value, nn.Module | nn.Parameter):
            continue
        if isinstance(part, TensorEnv) and not isinstance(value, int | float | str | np.number):
            continue
        if name[0] != "_" or not (is_private or isinstance(part, TensorEnv)):
            yield name, value


def _saved(value: Any) -> Any:
    return value.state_dict() if hasattr(value, "state_dict") else value


def _digest(value: Any, part: Any = None) -> bytes | None:
    """What tells whether ``value`` has changed, also within objects of the package of ``part``; None where it cannot be saved."""
    packages = set() if part is None else {_root(type(part))} - _LIBRARIES
    try:
        return hashlib.sha256(to_bytes(_saved(value), packages)).digest()
    except TypeError:
        return None


@torch.no_grad()
def _put(part: Any, name: str, in_place: bool, saved: Any) -> None:
    """Gives ``part`` the attribute ``name`` as it was ``saved``."""
    now = vars(part).get(name)
    if hasattr(now, "state_dict"):
        now.load_state_dict(saved)
    elif not in_place or type(now) is not type(saved):
        vars(part)[name] = saved
    elif put_where(now, saved):
        return
    elif isinstance(now, torch.Tensor | np.ndarray) and (now.shape, now.dtype) == (saved.shape, saved.dtype):
        now[...] = saved
    elif isinstance(now, list | deque):
        now.clear()
        now.extend(saved)
    elif isinstance(now, dict | set):
        now.clear()
        now.update(saved)
    else:
        vars(part)[name] = saved


def _has_state(part: Any) -> bool:
    """Whether a class that is no library's says what its state is; a library's knows nothing of what a class below has added."""
    name = "get_extra_state" if isinstance(part, nn.Module) else "state_dict"
    written = next((cls for cls in type(part).__mro__ if name in vars(cls)), None)
    return written is not None and _root(written) not in _LIBRARIES


def _root(cls: type) -> str:
    return cls.__module__.partition(".")[0]
