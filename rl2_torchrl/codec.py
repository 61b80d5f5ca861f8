"""Trees of values as JSON and tensors, and back: numbers, texts, arrays, generators, containers, and objects of named packages.

Nothing that a file says is imported or run: of an object it names a class, which must be one of the packages that the reader names.
"""

from __future__ import annotations

import enum
import logging
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn

__all__ = ["Decoder", "Encoder", "NoStateError", "put_where"]

log = logging.getLogger(__name__)

#: Values that do not change: by type the name of the kind, what is saved of one, and what makes it again of that.
_VALUES: dict[type, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]] = {
    tuple: ("tuple", list, tuple),
    frozenset: ("frozenset", list, frozenset),
    range: ("range", lambda numbers: [numbers.start, numbers.stop, numbers.step], lambda ends: range(*ends)),
    bytes: ("bytes", lambda value: np.frombuffer(value, np.uint8), lambda array: array.tobytes()),
    type(Path()): ("path", str, Path),
    torch.Size: ("size", list, torch.Size),
    torch.device: ("device", str, torch.device),
    torch.dtype: ("dtype", lambda dtype: str(dtype).removeprefix("torch."), lambda name: _dtype(name)),
}
_MAKERS = {name: make for name, _, make in _VALUES.values()}
_MAPPINGS = {kind.__name__: kind for kind in (dict, OrderedDict, Counter)}
#: What a `defaultdict` may begin its entries with.
_FACTORIES = {"none": None, "int": int, "float": float, "list": list, "set": set, "dict": dict}
_GENERATORS = {
    "generator": np.random.Generator,
    "random_state": np.random.RandomState,
    "torch_generator": torch.Generator,
    "random": random.Random,
}
_BITS = (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64)


class NoStateError(TypeError):
    """Something cannot be saved as plain data, or an env does not hand out its state; the message says what."""


class Encoder:
    """Takes values apart. What is met a second time is said to be the first one, so that one thing in two places stays one, and
    an array that looks into another's memory still does; tensors do no more.

    Args:
        packages: those whose objects are taken apart too, such as that of an env's class; or modules in a package.
        known: what the `Decoder` has, too, and is not taken apart, such as the env itself.

    Attributes:
        tensors: those that the JSON gives the numbers of, each once.

    Examples:
        >>> place = np.zeros(2)
        >>> encoder = Encoder()
        >>> saved = encoder({"place": place, "seen": [place, 3]})
        >>> again = Decoder(encoder.tensors)(saved)
        >>> again["seen"][0] is again["place"], again["seen"][1]
        (True, 3)
    """

    def __init__(self, packages: Collection[str] = (), known: Sequence[Any] = ()):
        self._packages = packages
        self.tensors: list[torch.Tensor] = []
        self._numbers: dict[tuple, int] = {}
        #: By id: its number, and itself, lest another gets its id.
        self._met: dict[int, tuple[int, Any]] = {id(value): (number, value) for number, value in enumerate(known)}

    def __call__(self, value: Any, *where: str) -> Any:
        """``value`` as JSON has it; ``where`` it stands, for the error's message.

        Raises:
            NoStateError: it is, or holds, none of what this module knows.
        """
        if value is None or type(value) in (bool, int, float, str):
            return value
        if type(value) in _VALUES:
            kind, saved_of, _ = _VALUES[type(value)]
            return {kind: self(saved_of(value), *where)}
        if isinstance(value, np.generic):
            return {"scalar": self(np.asarray(value), *where)}
        if isinstance(value, enum.Enum):
            return {"member": [self._class_of(value, where), value.name]}
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return {"named_tuple": [self._class_of(value, where), self(list(value), *where)]}
        if id(value) in self._met:
            return {"again": self._met[id(value)][0]}
        self._met[id(value)] = (len(self._met), value)
        return self._mutable(value, where)

    def _mutable(self, value: Any, where: tuple[str, ...]) -> Any:
        kind = type(value)
        is_tensor = isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter)
        if is_tensor and value.layout is torch.strided and _is_held(value.dtype):
            return self._tensor(value)
        base = value.base if kind is np.ndarray and value.size > 0 else None
        is_of_base = type(base) is np.ndarray and base.flags.c_contiguous and base.dtype.isnative  # the memory's owner
        if is_of_base and base.dtype == value.dtype and _is_numeric(value.dtype):
            offset = value.__array_interface__["data"][0] - base.__array_interface__["data"][0]
            return {"view": [self(base, *where), list(value.shape), offset, list(value.strides)]}
        if kind is np.ndarray and _is_numeric(value.dtype):
            # As PyTorch takes it: writable, and neither turned round nor of another machine's byte order.
            value = np.require(value, value.dtype.newbyteorder("="), ["C", "W"])
            return {"array": self._tensor(torch.from_numpy(value))}
        if kind is np.ndarray and value.dtype.kind in "USO":
            return {"items": [value.dtype.str, list(value.shape), self._items(value.ravel().tolist(), where)]}
        if kind is list:
            return self._items(value, where)
        if kind is set:
            return {"set": self._items(value, where)}
        if kind is deque:
            return {"deque": [value.maxlen, self._items(value, where)]}
        if kind in _MAPPINGS.values():
            return {kind.__name__: self._pairs(value, where)}
        if kind is defaultdict and value.default_factory in _FACTORIES.values():
            factory = next(name for name, each in _FACTORIES.items() if each is value.default_factory)
            return {"defaultdict": [factory, self._pairs(value, where)]}
        if kind in _GENERATORS.values():
            name = next(name for name, each in _GENERATORS.items() if each is kind)
            which, state = _state_of(value)
            return {name: [which, self(state, *where)]}
        name = self._class_of(value, where)
        return {"object": [name, self._pairs(vars(value), where)]}

    def _items(self, values: Collection, where: tuple[str, ...]) -> list:
        return [self(item, *where, str(number)) for number, item in enumerate(values)]

    def _pairs(self, values: Mapping, where: tuple[str, ...]) -> list:
        return [[self(key, *where), self(item, *where, str(key))] for key, item in values.items()]

    def _tensor(self, tensor: torch.Tensor) -> dict[str, list]:
        storage = tensor.untyped_storage().data_ptr() or id(tensor)
        identity = (storage, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride())
        if identity not in self._numbers:
            self._numbers[identity] = len(self.tensors)
            self.tensors.append(tensor.detach())
        return {"tensor": [self._numbers[identity], str(tensor.device)]}

    def _class_of(self, value: Any, where: tuple[str, ...]) -> str:
        """The name of ``value``'s class, which `_class_named` finds again, and which makes it from its attributes alone."""
        kind = type(value)
        name = f"{kind.__module__}:{kind.__qualname__}"
        is_whole = value.name in kind.__members__ if isinstance(value, enum.Enum) else _is_made_of_attributes(value)
        try:
            if is_whole and _class_named(name, self._packages) is kind:
                return name
        except ValueError:
            pass
        of = f" of {value.dtype}" if isinstance(value, np.ndarray | torch.Tensor) else ""
        raise NoStateError(
            f"{'.'.join(where) or 'it'} is a {kind.__name__}{of}, which cannot be saved in a file that runs no code when it is "
            "read: give tensors, arrays, numbers, texts and None, in dictionaries, lists and tuples"
        )


class Decoder:
    """Puts together what an `Encoder` has taken apart, in the order in which it did.

    Args:
        tensors: the encoder's, by number.
        packages: as for `Encoder`.
        known: what stands here in the place of the encoder's.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], packages: Collection[str] = (), known: Sequence[Any] = ()):
        self._tensors, self._packages = tensors, packages
        self._met: list[Any] = list(known)
        self._taken = {id(value) for value in known}

    def __call__(self, saved: Any, now: Any = None) -> Any:
        """The value. A generator, array or object that is there ``now``, or in a dictionary that is, gets other contents, since
        others may hold it; all else is new.

        Raises:
            ValueError: an object's class is of another package, or there is none of that name.
        """
        if isinstance(saved, list):
            self._meet(made := [])
            made.extend(self(item) for item in saved)
            return made
        if not isinstance(saved, dict):
            return saved
        ((kind, content),) = saved.items()
        match kind:
            case _ if kind in _MAKERS:
                return _MAKERS[kind](self(content))
            case "scalar":
                return self(content)[()]
            case "member":
                return _class_named(content[0], self._packages, enum.Enum).__members__[content[1]]
            case "named_tuple":
                return tuple.__new__(_class_named(content[0], self._packages, tuple), self(content[1]))
            case "again":
                return self._met[content]
        # Two names of one thing may be those of two by the time that was saved.
        return self._mutable(kind, content, None if id(now) in self._taken else now)

    def _mutable(self, kind: str, content: Any, now: Any) -> Any:
        match kind:
            case "tensor":
                return self._meet(self._tensor(*content))
            case "array":
                return self._meet(_put_into(now, self._tensor(*content["tensor"]).numpy()))
            case "view":
                number = len(self._met)  # before that of the memory that it looks into
                self._meet(None)
                base, (shape, offset, strides) = self(content[0]), content[1:]
                if not _is_numeric(base.dtype):  # objects are addresses, which a file could make up
                    raise ValueError("only arrays of numbers look into others.")
                made = self._met[number] = np.ndarray(shape, base.dtype, base, offset, strides)
            case "items":
                made = self._meet(np.empty(content[1], content[0]))
                for place, item in zip(np.ndindex(made.shape), content[2], strict=True):
                    made[place] = self(item)
            case "set":
                made = self._meet(set())
                made.update(self(item) for item in content)
            case "deque":
                made = self._meet(deque(maxlen=content[0]))
                made.extend(self(item) for item in content[1])
            case "defaultdict":
                made = self._meet(defaultdict(_FACTORIES[content[0]]))
                self._fill(made, content[1], {})
            case _ if kind in _MAPPINGS:
                made = self._meet(_MAPPINGS[kind]())
                self._fill(made, content, now if isinstance(now, dict) else {})
            case _ if kind in _GENERATORS:
                made = now if isinstance(now, _GENERATORS[kind]) else _new_generator(kind, content[0])
                _put_state(self._meet(made), self(content[1]))
            case "object":
                cls = _class_named(content[0], self._packages)
                made = self._meet(now if type(now) is cls else object.__new__(cls))
                before = dict(vars(made))
                vars(made).clear()
                self._fill(vars(made), content[1], before)
            case _:
                raise ValueError(f"{kind!r} is no kind of value that this version of rl2_torchrl saves.")
        return made

    def _meet(self, value: Any) -> Any:
        """``value``, before what is within it is made, which may refer to it."""
        self._met.append(value)
        self._taken.add(id(value))
        return value

    def _fill(self, made: dict, pairs: list, now: Mapping) -> None:
        for key, item in pairs:
            key = self(key)
            made[key] = self(item, now.get(key))

    def _tensor(self, number: int, device: str) -> torch.Tensor:
        return self._tensors[number].to(_device(device), copy=True)  # a copy: each may be written to on its own


def _put_into(now: Any, array: np.ndarray) -> np.ndarray:
    """``array`` in the memory that is there ``now``, where that is an array's own of the same kind."""
    if type(now) is not np.ndarray or now.base is not None or not now.flags.writeable:
        return array
    if (now.shape, now.dtype) != (array.shape, array.dtype):
        return array
    now[...] = array
    return now


def _state_of(generator: Any) -> tuple[str | None, Any]:
    """Which kind of generator it is, and its state."""
    if isinstance(generator, torch.Generator):
        return str(generator.device), generator.get_state()
    if isinstance(generator, random.Random):
        return None, generator.getstate()
    is_new = isinstance(generator, np.random.Generator)
    state = generator.bit_generator.state if is_new else generator.get_state(legacy=False)
    return state["bit_generator"], state


def _put_state(generator: Any, state: Any) -> None:
    match generator:
        case np.random.Generator():
            generator.bit_generator.state = state
        case random.Random():
            generator.setstate(state)
        case _:
            generator.set_state(state)


def put_where(generator: Any, other: Any) -> bool:
    """Lets ``generator`` go on where the ``other`` stands; False where it is none."""
    if is_one := type(generator) in _GENERATORS.values():
        _put_state(generator, _state_of(other)[1])
    return is_one


def _new_generator(kind: str, which: str | None) -> Any:
    if kind == "random":
        return random.Random()
    if kind == "torch_generator":
        return torch.Generator(which)
    return _GENERATORS[kind](next(bits for bits in _BITS if bits.__name__ == which)())


def _is_numeric(dtype: np.dtype) -> bool:
    return dtype.kind in "biufc" and dtype.itemsize <= 8  # as PyTorch has them


def _dtype(name: str) -> torch.dtype:
    return torch.empty(0, dtype=getattr(torch, name)).dtype


@cache
def _is_held(dtype: torch.dtype) -> bool:
    """Whether a file in the safetensors format may hold tensors of ``dtype``."""
    try:
        safetensors.torch.save({"tensor": torch.empty(0, dtype=dtype)})
    except KeyError:
        return False
    return True


@cache  # one line in the log for a device
def _device(name: str) -> torch.device:
    """The device ``name``, or the CPU where there is none such."""
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:  # as a PyTorch without CUDA says it, or one with it
        log.warning("what was on %s when it was saved is read to the CPU: %s", name, error)
        return torch.device("cpu")


def _is_made_of_attributes(value: Any) -> bool:
    """Whether an object is its attributes and nothing beside, as one of a compiled class or with slots is not; or a named tuple."""
    kind = type(value)
    if isinstance(value, tuple):
        return hasattr(value, "_fields") and not hasattr(value, "__dict__")
    has_slots = any(vars(base).get("__slots__") for base in kind.__mro__)
    return hasattr(value, "__dict__") and kind.__new__ is object.__new__ and not has_slots


def _class_named(name: str, packages: Collection[str], kind: type = object) -> type:
    """The class ``package.module:Class`` of one of ``packages``, which is imported already, and one of ``kind``.

    Raises:
        ValueError: it is no such class.
    """
    module, _, path = name.partition(":")
    is_known = not {module, module.partition(".")[0]}.isdisjoint(packages)
    found: Any = sys.modules.get(module) if is_known else None
    for part in path.split("."):
        found = vars(found).get(part) if found is not None else None
    if not isinstance(found, type) or not issubclass(found, kind) or f"{found.__module__}:{found.__qualname__}" != name:
        raise ValueError(f"{name} is no class of the packages {sorted(packages)}, whose objects alone are made.")
    return found
