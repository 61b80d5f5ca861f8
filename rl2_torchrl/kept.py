"""`Kept`: attributes that change as a run goes on, such as a filter's mean or a penalty's weight, for checkpoints."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torchrl.envs import Transform

from rl2_torchrl.envs.plain_data import NoStateError, Restorer, Saver
from rl2_torchrl.storage import from_tensor, to_tensor

__all__ = ["Kept"]

log = logging.getLogger(__name__)

#: What PyTorch's modules and TorchRL's transforms are made of.
_INNER = {*vars(nn.Module()), "_container", "_parent", "_missing_tolerance"}
#: Packages whose private attributes are their own business, but for what transforms keep of their rows.
_LIBRARIES = {"rl2_torchrl", "torchrl", "tensordict", "torch"}


class Kept:
    """Attributes of ``parts``, by their names, that have changed since this was made: a module's state has buffers alone.

    Attributes may be what `Saver` knows. Of a part that has come to hold anything else nothing is kept, since one attribute may go
    with another; the log names it. A part with a state of its own, a module by ``get_extra_state``, says by itself what it keeps.

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
        self._first = {name: _Attributes(each) for name, each in self._parts.items()}
        self._told: set[str] = set()

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """By part and attribute what is another by now, as bytes."""
        state = {}
        for name, part in self._parts.items():
            first, now = self._first[name], _Attributes(part)
            if lost := [each for each, value in now.others.items() if value is not first.others.get(each)]:
                self._tell(f"{name}.{lost[0]}")
            else:
                changed = [each for each, digest in now.digests.items() if digest != first.digests.get(each)]
                state[name] = {each: to_tensor(now.plain[each]) for each in changed}
        return {name: changed for name, changed in state.items() if changed}

    def _tell(self, name: str) -> None:
        if name not in self._told:
            self._told.add(name)
            log.warning(
                "%s changes in the training, and checkpoints cannot hold it: a resumed run begins with the first values of all "
                "that stands beside it. Write get_extra_state() and set_extra_state(state) (of a module), or state_dict() and "
                "load_state_dict(state).",
                name,
            )

    def load_state_dict(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Gives the parts that are there what `state_dict` returned."""
        for name, attributes in state.items():
            if (part := self._parts.get(name)) is not None:
                for each, value in attributes.items():
                    vars(part)[each] = Restorer(_packages(part))(from_tensor(value, f"{name}.{each}"))


class _Attributes:
    """The attributes of ``part``: ``plain`` as `Saver` takes them apart, with their ``digests``, and the ``others``."""

    def __init__(self, part: Any):
        self.plain: dict[str, Any] = {}
        self.others: dict[str, Any] = {}
        is_ours = _root(type(part)) in _LIBRARIES
        for name, value in vars(part).items():
            if name in _INNER or isinstance(value, nn.Module):
                continue
            if is_ours and name[0] == "_" and not isinstance(part, Transform):
                continue
            try:
                self.plain[name] = Saver(_packages(part))(value, name)
            except NoStateError:  # a function, a spec, …
                if not is_ours:
                    self.others[name] = value
        self.digests = {name: hashlib.sha256(b"".join(_bytes(value))).hexdigest() for name, value in self.plain.items()}


def _has_state(part: Any) -> bool:
    if isinstance(part, nn.Module):
        return type(part).get_extra_state is not nn.Module.get_extra_state
    written = next((cls for cls in type(part).__mro__ if "state_dict" in vars(cls)), None)
    return written is not None and _root(written) not in _LIBRARIES  # PPOUpdate's own has what it learns


def _root(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _packages(part: Any) -> set[str]:
    """Those of which objects may be saved; the libraries' are specs and envs."""
    return {_root(type(part))} - _LIBRARIES


def _bytes(saved: Any) -> Iterator[bytes]:
    """What `Saver` gave, in bytes that are the same for the same."""
    if isinstance(saved, list | tuple):
        yield f"{type(saved).__name__} {len(saved)}".encode()
        for each in saved:
            yield from _bytes(each)
    elif isinstance(saved, dict):
        yield from _bytes([list(item) for item in saved.items()])
    elif isinstance(saved, torch.Tensor):
        yield f"{saved.dtype} {tuple(saved.shape)}".encode()
        yield saved.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    elif isinstance(saved, np.ndarray):
        yield f"{saved.dtype} {saved.shape}".encode()
        yield saved.tobytes()
    else:
        yield repr(saved).encode()
