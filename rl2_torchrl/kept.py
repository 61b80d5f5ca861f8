"""`Kept`: attributes that change as a run goes on, such as a filter's mean or a penalty's weight, for checkpoints."""

from __future__ import annotations

import dis
import gc
import hashlib
import logging
import math
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from functools import cached_property
from types import CodeType, FunctionType
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchrl.envs import Transform
from torchrl.envs.transforms import Timer

from rl2_torchrl.envs.plain_data import NoStateError, Restorer, Saver
from rl2_torchrl.envs.tensor_env import TensorEnv
from rl2_torchrl.storage import from_tensor, require_tree, to_tensor

__all__ = ["Kept"]

log = logging.getLogger(__name__)

#: What PyTorch's modules and TorchRL's transforms are made of.
_INNER = {*vars(nn.Module()), "_container", "_parent", "_missing_tolerance"}
#: Entries of what a function reads that are looked at.
_FEW = 64
_NUMBERS = (int, float, str, np.number)
#: Attributes that every optimizer has; what of them changes is in its ``state_dict``.
_OF_OPTIMIZERS = set(vars(torch.optim.SGD([torch.zeros(1)], lr=1.0)))
#: Values that are saved, and put back in place, by their ``state_dict``.
_STATEFUL = (Optimizer, LRScheduler, TensorDictBase)
#: Packages whose private attributes are their own business, but for what transforms keep of their rows.
_LIBRARIES = {"rl2_torchrl", "torchrl", "tensordict", "torch"}


class Kept:
    """Attributes of ``parts``, and of modules within them, that have changed since this was made: module states have buffers alone.

    Attributes may be what `Saver` knows, optimizers, schedulers and TensorDicts. What has changed in place is put back in place,
    since others may hold it too; what another has taken the place of is replaced. Of a part that has come to hold what cannot be
    saved nothing is kept, since one attribute may go with another, and the log names it; what changes within such an object nobody
    sees. A part with a state of its own, a module by ``get_extra_state``, says by itself what it keeps.

    Args:
        parts: by name; a module within one has a name below that, as PyTorch has it.

    Examples:
        >>> first, second = nn.Module(), nn.Module()
        >>> kept, others = Kept({"filter": first}), Kept({"filter": second})
        >>> first.mean = torch.ones(2)
        >>> others.load_state_dict(kept.state_dict())
        >>> second.mean
        tensor([1., 1.])
    """

    def __init__(self, parts: Mapping[str, Any]):
        modules = [
            each
            for name, part in parts.items()
            if isinstance(part, nn.Module)
            for each in part.named_modules(prefix=name)
        ]
        by_id = {id(each): (name, each) for name, each in [*reversed(modules), *parts.items()]}
        self._parts = {
            name: each for name, each in by_id.values() if hasattr(each, "__dict__") and not _has_state(each)
        }
        memories = self._memories()
        self._first = {name: _Attributes(each, memories) for name, each in self._parts.items()}
        for first in self._first.values():
            first.saved.clear()  # as large as all constants together
        functions = {name: each for name, each in self._parts.items() if isinstance(each, FunctionType)}
        self._functions = {name: (each, _read_by(each)) for name, each in functions.items()}
        self._told: set[str] = set()
        #: What has been put back had changed before this was made, and how it was given then.
        self._restored: dict[tuple[str, str], str | None] = {}

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """By part and attribute what is another by now, as bytes."""
        state, memories = {}, self._memories()
        for name, (function, first) in self._functions.items():
            now = _read_by(function)
            for each in [each for each, digest in first.items() if now.get(each) != digest]:
                self._tell(f"{each!r}, which {name} reads,")
        for name, part in self._parts.items():
            first, now = self._first[name], _Attributes(part, memories)
            is_same = {each: value is first.values.get(each) for each, value in now.values.items()}
            if lost := [each for each in (*now.others, *now.put_into) if not is_same[each]]:
                self._tell(f"{name}.{lost[0]}")
                continue
            changed = [
                each
                for each, digest in now.digests.items()
                if digest != first.digests.get(each) or (name, each) in self._restored
            ]
            state[name] = {
                each: to_tensor(
                    [is_same[each], now.saved[each], self._restored.get((name, each), first.constants.get(each))]
                )
                for each in changed
            }
        return {name: changed for name, changed in state.items() if changed}

    def load_state_dict(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Gives the parts that are there what `state_dict` returned."""
        for name, attributes in state.items():
            if (part := self._parts.get(name)) is not None:
                for each, value in attributes.items():
                    self._load(name, part, each, *from_tensor(value, f"{name}.{each}"))

    def _load(self, name: str, part: Any, attribute: str, in_place: bool, saved: Any, given: str | None) -> None:
        first = self._first[name]
        is_there = _digest(saved) == first.digests.get(attribute)  # as in a second call with the same objects
        if given != first.constants.get(attribute) and not is_there:
            log.warning(
                "%s.%s is given otherwise than the run began with: it begins as it is given, and what it had come to is left.",
                name,
                attribute,
            )
            return
        self._restored[name, attribute] = given
        if not is_there:
            _put(part, attribute, in_place, saved)

    def _memories(self) -> set[int]:
        """Where parameters and buffers lie, which a ``state_dict`` holds."""
        modules = [part for part in self._parts.values() if isinstance(part, nn.Module)]
        tensors = [t for module in modules for t in (*module._parameters.values(), *module._buffers.values())]
        return {_memory(t) for t in tensors if t is not None and t.layout is torch.strided}

    def _tell(self, name: str) -> None:
        if name not in self._told:
            self._told.add(name)
            log.warning(
                "%s changes in the training, and checkpoints cannot hold it: a resumed run begins with the first values of all "
                "that stands beside it. Make it an attribute of an object, one that draws the tasks, say; or write "
                "get_extra_state() and set_extra_state(state) (of a module), state_dict() and load_state_dict(state) (else).",
                name,
            )


class _Attributes:
    """The attributes of ``part``, but for what lies in ``memories``.

    Attributes:
        values: themselves; what is looked at later must be the same object, and not another at its address.
        saved, digests: of those that can be saved, what is saved of each, and a digest of that.
        constants: digests of the numbers, texts, … among these, as a user gives them.
        put_into: the names of those among them that are put into one of the kind, but cannot be made.
        others: the names of those that cannot.
    """

    def __init__(self, part: Any, memories: set[int]):
        self.values = {name: value for name, value in _variables(part) if _is_looked_at(part, name, value, memories)}
        self.saved: dict[str, Any] = {}
        self.others: list[str] = []
        for name, value in self.values.items():
            try:
                self.saved[name] = _taken(part, value, name)
            except NoStateError:  # a function, a spec, …
                is_inner = _is_librarys(part) and (name[0] == "_" or not callable(value))
                self.others += [] if is_inner else [name]
        self.put_into = [name for name, each in self.saved.items() if not _can_be_made(part, self.values[name], each)]
        self.digests = {name: _digest(each) for name, each in self.saved.items()}
        self.constants = {name: _digest(each, arrays=False) for name, each in self.saved.items()}


def _variables(part: Any) -> Iterator[tuple[str, Any]]:
    """Attributes of ``part`` by name."""
    if isinstance(part, TensorEnv):
        cached = {
            name
            for cls in type(part).__mro__
            for name, value in vars(cls).items()
            if isinstance(value, cached_property)
        }
        public = [name for name in vars(part) if name[0] != "_" and name not in cached]
        yield from ((name, vars(part)[name]) for name in public if isinstance(vars(part)[name], _NUMBERS))
    elif isinstance(part, Optimizer):
        # A scheduler puts a function of its own in the place of step.
        own = (item for item in vars(part).items() if item[0] not in _OF_OPTIMIZERS)
        yield from ((name, value) for name, value in own if not callable(value))
    else:
        yield from vars(part).items()


def _read_by(function: FunctionType) -> dict[str, str]:
    """Digests of the few numbers that a function closes over, or reads of its file, by their names."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    read = {name: each for name, cell in cells for each in gc.get_referents(cell)}  # none in a cell that is still empty
    loaded = set(_globals_in(function.__code__))
    read |= {name: function.__globals__[name] for name in loaded if name in function.__globals__}
    return {name: _digest(Saver(set())(value, name)) for name, value in read.items() if _is_of_numbers(value)}


def _globals_in(code: CodeType) -> Iterator[str]:
    """Names of the file's own that ``code`` loads, or functions and comprehensions within it."""
    yield from (each.argval for each in dis.get_instructions(code) if each.opname == "LOAD_GLOBAL")
    for within in code.co_consts:
        if isinstance(within, CodeType):
            yield from _globals_in(within)


def _is_of_numbers(value: Any) -> bool:
    """Whether ``value`` is a number, or a few of them; what is larger, or an object, is taken for data."""
    if isinstance(value, torch.Tensor | np.ndarray):
        return not getattr(value, "is_nested", False) and math.prod(value.shape) <= _FEW
    if type(value) in (list, tuple, dict):
        within = value.values() if isinstance(value, dict) else value
        return len(value) <= _FEW and all(isinstance(each, _NUMBERS) for each in within)
    return isinstance(value, _NUMBERS)


def _is_looked_at(part: Any, name: str, value: Any, memories: set[int]) -> bool:
    if name in _INNER or isinstance(value, nn.Module | nn.Parameter):
        return False
    if isinstance(value, _STATEFUL) and hasattr(part, "state_dict") and not isinstance(part, nn.Module):
        return False  # the optimizer of an update, which is in the update's state
    if _is_librarys(part) and name[0] == "_" and not isinstance(part, Transform):
        return False
    return not (type(value) is torch.Tensor and value.layout is torch.strided and _memory(value) in memories)


def _taken(part: Any, value: Any, name: str) -> Any:
    if isinstance(value, _STATEFUL):
        try:
            require_tree(state := value.state_dict())
        except TypeError as error:
            raise NoStateError(str(error)) from error
        return ["state", state]
    return Saver(_packages(part, value))(value, name)


def _can_be_made(part: Any, value: Any, saved: Any) -> bool:
    """Whether what was ``saved`` of ``value`` can be made where there is none: of objects those of the part's own package."""
    kind = saved[0] if isinstance(saved, list) else None
    return kind != "state" and (kind != "object" or _root(type(value)) == _root(type(part)))


def _put(part: Any, name: str, in_place: bool, saved: Any) -> None:
    """Gives ``part`` the attribute ``name`` as it was ``saved``."""
    now, kind = dict(_variables(part)).get(name), saved[0] if isinstance(saved, list) else None
    if kind == "state":
        now.load_state_dict(saved[1])
        return
    owner = next((each for each in (now, part) if _root(type(each)) not in _LIBRARIES | sys.stdlib_module_names), None)
    restore = Restorer(_packages(part, now), main="__main__" if owner is None else type(owner).__module__)
    made = restore(saved, now if in_place and kind not in ("array", "tensor") else None)
    if made is not now and not (in_place and _write_into(now, made)):
        vars(part)[name] = made


@torch.no_grad()
def _write_into(now: Any, made: Any) -> bool:
    """Gives ``now`` the contents of ``made``; False where it is something else."""
    if type(now) is not type(made):
        return False
    if isinstance(made, torch.Tensor | np.ndarray):
        is_written = (now.shape, now.dtype) == (made.shape, made.dtype) and 0 not in _strides(now)
        if is_written:
            now[...] = made
        return is_written
    if isinstance(made, list | deque):
        now.clear()
        now.extend(made)
    elif isinstance(made, dict | set):
        now.clear()
        now.update(made)
    else:
        return False
    return True


def _strides(array: torch.Tensor | np.ndarray) -> tuple[int, ...]:
    if isinstance(array, torch.Tensor):
        return array.stride()
    return array.strides if array.flags.writeable else (0,)


def _has_state(part: Any) -> bool:
    if isinstance(part, Timer):  # the time of day
        return True
    name = "get_extra_state" if isinstance(part, nn.Module) else "state_dict"
    written = next((cls for cls in type(part).__mro__ if name in vars(cls)), None)
    if written in (None, nn.Module):
        return False
    # A library's knows nothing of what a class below has added; PPOUpdate's has what it learns.
    return _root(written) not in _LIBRARIES or (_is_librarys(part) and isinstance(part, nn.Module))


def _is_librarys(part: Any) -> bool:
    return _root(type(part)) in _LIBRARIES


def _root(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _packages(part: Any, value: Any) -> set[str]:
    """Those of which objects may be saved; the libraries' are specs and envs."""
    return {_root(type(part)), _root(type(value))} - _LIBRARIES - sys.stdlib_module_names


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _digest(saved: Any, *, arrays: bool = True) -> str:
    digest = hashlib.sha256()
    for each in _bytes(saved):
        if arrays or isinstance(each, bytes):
            digest.update(each)
    return digest.hexdigest()


def _bytes(saved: Any) -> Iterator[bytes | np.ndarray]:
    """What `Saver` gave, in bytes that are the same for the same, of arrays as arrays."""
    if isinstance(saved, list) and saved[:1] in (["object"], ["member"], ["flag"], ["named_tuple"]):
        kind, name, *more = saved
        # A program's module has another name than it has where it is imported.
        saved = [kind, name.partition(":")[2], *more]
    if isinstance(saved, list | tuple):
        yield f"{type(saved).__name__} {len(saved)}".encode()
        for each in saved:
            yield from _bytes(each)
    elif isinstance(saved, dict):
        yield from _bytes([list(item) for item in saved.items()])
    elif isinstance(saved, torch.Tensor):
        yield f"{saved.dtype} {tuple(saved.shape)}".encode()
        yield saved.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy()
    elif isinstance(saved, np.ndarray):
        yield f"{saved.dtype} {saved.shape}".encode()
        yield np.ascontiguousarray(saved).reshape(-1).view(np.uint8)
    else:
        yield repr(saved).encode()
