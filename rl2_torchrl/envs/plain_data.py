"""What an env remembers as plain data, and back: numbers, arrays, generators, containers, and objects of the env's own classes.

Nothing that a file says is imported or run: of an object the file names a class, which must be one of the env's own packages.
"""

from __future__ import annotations

import enum
import pathlib
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from copy import deepcopy
from datetime import timedelta
from typing import Any

import numpy as np
import torch

__all__ = ["NoStateError", "Restorer", "Saver"]

#: Values that do not change: their type, what is saved of one, and what makes it again of that.
_VALUES: dict[str, tuple[type, Callable[[Any], Any], Callable[[Any], Any]]] = {
    "complex": (complex, lambda number: [number.real, number.imag], lambda parts: complex(*parts)),
    "range": (range, lambda numbers: [numbers.start, numbers.stop, numbers.step], lambda ends: range(*ends)),
    "timedelta": (timedelta, lambda time: [time.days, time.seconds, time.microseconds], lambda time: timedelta(*time)),
    "path": (type(pathlib.Path()), lambda path: [str(path)], lambda parts: pathlib.Path(*parts)),
    "size": (torch.Size, list, torch.Size),
    "device": (torch.device, lambda device: [str(device)], lambda names: torch.device(*names)),
    "dtype": (torch.dtype, lambda dtype: [str(dtype).removeprefix("torch.")], lambda names: getattr(torch, *names)),
    "text": (np.str_, str, np.str_),
    "bytes": (bytes, lambda value: value.decode("latin-1"), lambda text: text.encode("latin-1")),
}
#: What a `defaultdict` may begin its entries with.
_FACTORIES = {"none": None, "int": int, "float": float, "list": list, "set": set, "dict": dict}


class NoStateError(Exception):
    """An env holds something that cannot be saved as plain data, or does not hand out its state; the message says what."""


class Saver:
    """Takes values apart. What is met a second time is said to be the first one, so that one thing in two places stays one.

    Args:
        packages: those whose objects are taken apart too, such as that of the env's class; or modules in a package.
        known: what the `Restorer` has, too, and is not taken apart, such as the env itself.

    Raises:
        NoStateError: a value is none of what `rl2_torchrl.envs.plain_data` knows.

    Examples:
        >>> place = np.zeros(2)
        >>> saved = Saver()({"place": place, "seen": [place, 3]}, "env")
        >>> again = Restorer()(saved)
        >>> again["seen"][0] is again["place"], again["seen"][1]
        (True, 3)
    """

    def __init__(self, packages: Collection[str] = (), known: Sequence[Any] = ()):
        self._packages = packages
        #: By id: its number, and itself, lest another gets its id.
        self._met: dict[int, tuple[int, Any]] = {id(value): (number, value) for number, value in enumerate(known)}

    def __call__(self, value: Any, where: str) -> Any:
        """``value`` as plain data with its type; ``where`` it stands, for the error's message."""
        if value is None or type(value) in (bool, int, float, str):
            return value
        if type(value) in (tuple, frozenset):
            return [type(value).__name__, self._items(value, where)]
        if _is_named_tuple(value):
            return ["named_tuple", self._class_of(value, where), self._items(value, where)]
        for kind, (cls, saved_of, _) in _VALUES.items():
            if type(value) is cls:
                return [kind, saved_of(value)]
        if isinstance(value, np.generic) and _is_numeric(value.dtype):
            return ["scalar", np.asarray(value)]
        if isinstance(value, enum.Flag):  # a combination has no name of its own
            return ["flag", self._class_of(value, where), value.value]
        if isinstance(value, enum.Enum):
            return ["member", self._class_of(value, where), value.name]
        if id(value) in self._met:
            return ["again", self._met[id(value)][0]]
        self._met[id(value)] = (len(self._met), value)
        return self._mutable(value, where)

    def has_met(self, value: Any) -> bool:
        """Whether ``value`` has been taken apart, or is known."""
        return id(value) in self._met

    def is_own(self, value: Any) -> bool:
        """Whether ``value`` is an object of a class of the env's own packages."""
        module = type(value).__module__
        return not {module, module.partition(".")[0]}.isdisjoint(self._packages)

    def _mutable(self, value: Any, where: str) -> list:
        if type(value) is np.ndarray and _is_numeric(value.dtype):
            return ["array", value.copy()]
        if type(value) is np.ndarray and value.dtype.kind in "USO":
            return ["items", self._items(value.ravel().tolist(), where), value.dtype.str, list(value.shape)]
        if type(value) is torch.Tensor and value.layout is torch.strided:
            return ["tensor", value.detach().clone()]
        if isinstance(value, np.random.Generator):
            return ["generator", value.bit_generator.state]
        if isinstance(value, np.random.RandomState):
            return ["random_state", value.get_state(legacy=False)]
        if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
            return ["random", value.getstate()]
        if isinstance(value, torch.Generator):
            return ["torch_generator", value.get_state(), str(value.device)]
        if type(value) in (list, set):
            return [type(value).__name__, self._items(value, where)]
        if type(value) is deque:
            return ["deque", self._items(value, where), value.maxlen]
        factory = value.default_factory if type(value) is defaultdict else ...
        factories = [name for name, each in _FACTORIES.items() if each is factory]
        if type(value) in (dict, OrderedDict, Counter) or factories:
            items = [[self(key, where), self(item, f"{where}[{key!r}]")] for key, item in value.items()]
            return [type(value).__name__, items, *factories]
        name = self._class_of(value, where)
        return ["object", name, [[key, self(item, f"{where}.{key}")] for key, item in vars(value).items()]]

    def _items(self, values: Collection, where: str) -> list:
        return [self(item, f"{where}[{number}]") for number, item in enumerate(values)]

    def _class_of(self, value: Any, where: str) -> str:
        """The name of ``value``'s class, which `_class_named` finds again, and which makes it from its attributes alone."""
        kind = type(value)
        name = f"{kind.__module__}:{kind.__qualname__}"
        try:
            is_whole = isinstance(value, enum.Enum | tuple) or _is_made_of_attributes(value)
            if is_whole and _class_named(name, self._packages) is kind:
                return name
        except ValueError:
            pass
        raise NoStateError(f"{where} is a {kind.__name__}, which is no plain data")


class Restorer:
    """Puts values together that a `Saver` has taken apart, one after the other in the order in which it did.

    Args:
        packages: as for `Saver`.
        known: what stands here in the place of the `Saver`'s.
        main: the module that the program was when this was saved, or is now: ``"__main__"`` stands for it.

    Raises:
        ValueError: an object's class is of another package, or there is none of that name.
    """

    def __init__(self, packages: Collection[str] = (), known: Sequence[Any] = (), *, main: str = "__main__"):
        self._packages, self._main = packages, main
        self._met: list[Any] = list(known)
        self._taken = {id(value) for value in known}
        self._written: list[tuple[np.ndarray, np.ndarray]] = []
        #: Memories of attributes that stand side by side.
        self._beside = [memory for value in known for memory in _memories(getattr(value, "__dict__", {}))]

    def __call__(self, saved: Any, now: Any = None) -> Any:
        """The value; it is what is there ``now`` with other contents where that can be, since others may look at that."""
        if not isinstance(saved, list):
            return saved
        kind, content, *more = saved
        match kind:
            case "tuple" | "frozenset":
                return {"tuple": tuple, "frozenset": frozenset}[kind](self(item) for item in content)
            case "named_tuple":
                return tuple.__new__(self._class(content, tuple), (self(item) for item in more[0]))
            case _ if kind in _VALUES:
                return _VALUES[kind][2](content)
            case "scalar":
                return content[()]
            case "member":
                return self._class(content).__members__[more[0]]
            case "flag":
                return self._class(content, enum.Flag)(more[0])
            case "again":
                return self._met[content]
        # Two names of one thing may be those of two by the time that was saved.
        now = None if id(now) in self._taken else now
        if kind in ("array", "tensor"):
            value = self._in_place(content, now)
        elif kind == "object":
            cls = self._class(content)
            value = now if type(now) is cls else object.__new__(cls)
        else:
            value = _empty(kind, content, more, now)
        self._met.append(value)  # before what is within, which may refer to it
        self._taken.add(id(value))
        self._fill(value, kind, more[0] if kind == "object" else content)
        return value

    def _class(self, name: str, kind: type = object) -> type:
        module, _, path = name.partition(":")
        module = self._main if module == "__main__" or module not in sys.modules else module
        return _class_named(f"{module}:{path}", self._packages, kind)

    def _fill(self, value: Any, kind: str, content: Any) -> None:
        if kind in ("list", "deque"):
            value.extend(self(item) for item in content)
        elif kind == "set":
            value.update(self(item) for item in content)
        elif kind in ("dict", "OrderedDict", "Counter", "defaultdict"):
            for key, item in content:
                value[self(key)] = self(item)
        elif kind == "items":
            for place, item in zip(np.ndindex(value.shape), content, strict=True):
                value[place] = self(item)
        elif kind == "object":
            before = dict(vars(value))
            self._beside += _memories(before)
            vars(value).clear()
            vars(value).update((name, self(item, before.get(name))) for name, item in content)

    def _in_place(self, content: np.ndarray | torch.Tensor, now: Any) -> np.ndarray | torch.Tensor:
        """``content`` in the memory of ``now``, unless that changes what is written already, which was one with it.

        A tensor only where another attribute looks into it: one is rarely written in place, and may be part of a constant.
        """
        memory, wanted = _memory(now) if isinstance(now, type(content)) else None, _memory(content)
        is_known = memory is not None and wanted is not None
        is_like = is_known and (memory.shape, memory.dtype) == (wanted.shape, wanted.dtype)
        if is_like and isinstance(now, torch.Tensor):
            is_like = sum(np.may_share_memory(memory, each) for each in self._beside) > 1  # itself, and another
        if not is_like or not memory.flags.writeable:
            return deepcopy(content)
        before, shared = memory.copy(), [pair for pair in self._written if np.may_share_memory(pair[0], memory)]
        memory[...] = wanted
        # With itself, too: a tensor that was expanded has fewer places than numbers.
        if any(array.tobytes() != numbers.tobytes() for array, numbers in (*shared, (memory, wanted))):
            memory[...] = before
            return deepcopy(content)
        self._written.append((memory, wanted))
        return now


def _empty(kind: str, content: Any, more: list, now: Any) -> Any:
    """A container without what is in it, or a generator."""
    match kind:
        case "list" | "set" | "dict" | "OrderedDict" | "Counter":
            return {"list": list, "set": set, "dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}[kind]()
        case "defaultdict":
            return defaultdict(_FACTORIES[more[0]])
        case "deque":
            return deque(maxlen=more[0])
        case "items":
            return np.empty(more[1], more[0])
        case "generator":
            generator = now if isinstance(now, np.random.Generator) else np.random.Generator(_bits(content))
            generator.bit_generator.state = content
        case "random_state":
            generator = now if isinstance(now, np.random.RandomState) else np.random.RandomState(_bits(content))
            generator.set_state(content)
        case "random":
            generator = now if isinstance(now, random.Random) else random.Random()
            generator.setstate(content)
        case "torch_generator":
            generator = now if isinstance(now, torch.Generator) else torch.Generator(more[0])
            generator.set_state(content)
        case _:
            raise ValueError(f"{kind!r} is no kind of value that this version of rl2_torchrl saves.")
    return generator


def _memory(value: np.ndarray | torch.Tensor) -> np.ndarray | None:
    """The memory of an array or tensor as an array; None where NumPy cannot read it: on a GPU, in bfloat16, with gradients."""
    try:
        return value.numpy() if isinstance(value, torch.Tensor) else value
    except (RuntimeError, TypeError):
        return None


def _memories(attributes: dict[str, Any]) -> list[np.ndarray]:
    found = [_memory(value) for value in attributes.values() if isinstance(value, np.ndarray | torch.Tensor)]
    return [memory for memory in found if memory is not None]


def _bits(state: dict[str, Any]) -> np.random.BitGenerator:
    """A bit generator of NumPy's of the kind whose ``state`` this is."""
    kinds = (np.random.PCG64, np.random.PCG64DXSM, np.random.MT19937, np.random.Philox, np.random.SFC64)
    return {kind.__name__: kind for kind in kinds}[state["bit_generator"]]()


def _is_numeric(dtype: np.dtype) -> bool:
    return dtype.kind in "biuf" and dtype.itemsize <= 8  # as PyTorch has them


def _is_named_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and hasattr(type(value), "_make") and not hasattr(value, "__dict__")


def _is_made_of_attributes(value: Any) -> bool:
    """Whether an object is its attributes and nothing beside, as one of a compiled class or with slots is not."""
    kind = type(value)
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
        raise ValueError(f"{name} is no class of the env's own packages, {sorted(packages)}.")
    return found
