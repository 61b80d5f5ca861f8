"""A CUDA device of wood, for machines that have none: ``pytest -p wooden_cuda tests/test_cuda.py`` (``PYTHONPATH=tests``).

What is on ``cuda:0`` is computed on the CPU, by tensors that say that they are there. As on a device an operation on
tensors of both raises, as does a generator of the other one; the host has neither addresses nor NumPy's arrays of them;
and while a graph is recorded nothing is done, nor can anything be read back. It does not know how fast a device is, how
its kernels round, and what they lack.
"""

from __future__ import annotations

import copy
import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

if "torch" in sys.modules:
    raise ImportError("wooden_cuda must be loaded before torch, which looks for devices once: pytest -p wooden_cuda.")


def _load_guard() -> None:
    """Compiles and loads ``wooden_cuda.cpp``; CalledProcessError or FileNotFoundError without a compiler that can."""
    package = Path(find_spec("torch").origin).parent
    libraries = package / "lib"
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "guard.so")
        arguments = ["-std=c++20", "-shared", "-fPIC", f"-I{package / 'include'}", Path(__file__).with_suffix(".cpp")]
        linked = [f"-L{libraries}", "-Wl,--no-as-needed", "-lc10", "-ltorch_cpu", "-ltorch", f"-Wl,-rpath,{libraries}"]
        subprocess.run(["c++", *arguments, "-o", made, *linked], check=True)
        ctypes.CDLL(str(made), ctypes.RTLD_GLOBAL)


_load_guard()

import torch  # noqa: E402
from torch.utils import _python_dispatch as dispatch  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: E402

CUDA = torch.device("cuda:0")
#: Operations that go from one device to the other; whose indices may be the CPU's; that tell the host a number or a size.
_BETWEEN = ("_to_copy", "copy_")
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index")
_READING = ("_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select", "_unique2", "unique_dim")


class Wood(torch.Tensor):
    """A tensor on ``cuda:0``, whose numbers are those of the CPU's ``inner``."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wood:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, inner.size(), device=CUDA, **layout)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.inner.data_ptr() | 1 << 62  # where the host has nothing

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def tolist(self) -> list:
        return self.cpu().tolist()

    def __repr__(self, **kwargs) -> str:
        return f"Wood({self.inner!r})"

    def __reduce_ex__(self, protocol: int) -> tuple:
        return _wood, (self.inner, self.requires_grad, isinstance(self, torch.nn.Parameter))

    def __deepcopy__(self, memo: dict) -> torch.Tensor:
        if id(self) not in memo:
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = made = _wood(self.inner.detach().clone(), self.requires_grad, is_parameter)
            made.grad = copy.deepcopy(self.grad, memo)
        return memo[id(self)]


def _wood(inner: torch.Tensor, requires_grad: bool, is_parameter: bool) -> torch.Tensor:
    made = Wood(inner)
    return torch.nn.Parameter(made, requires_grad) if is_parameter else made.requires_grad_(requires_grad)


# --------------------------------------------------------------- one operation
def _run(function, args: tuple, kwargs: dict):
    """``function`` on what lies within the wood of its arguments; what it gives is on the device that a device would give it on."""
    name = function.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    are_there = [isinstance(tensor, Wood) for tensor in tensors]
    is_there = isinstance(args[0], Wood) if name in _BETWEEN else any(are_there)
    if kwargs.get("device") is not None:
        is_there = torch.device(kwargs["device"]).type == "cuda"
        kwargs = {**kwargs, "device": torch.device("cpu") if is_there else kwargs["device"]}
    _require_one_device(function, name, args, kwargs, tensors, is_there)
    given, named = tree_map_only(Wood, lambda wood: wood.inner, (args, {**kwargs, **_unpinned(kwargs)}))
    own = _CELLS.get(name, function)
    recording = Graph.recording
    if recording is not None and (any(are_there) or is_there):
        _require_no_reading(function, name, args, is_there)
    if recording is not None and is_there:
        recording.keep(function, given, named)
    out = own(*given, **named)
    if not is_there:
        return out
    if recording is not None:
        recording.calls.append((own, given, named, out))
    known = {id(wood.inner): wood for wood in tensors if isinstance(wood, Wood)}
    wrapped = tree_map_only(torch.Tensor, lambda inner: known[id(inner)] if id(inner) in known else Wood(inner), out)
    if name == "_pack_padded_sequence":  # whose sizes are the host's
        return wrapped[0], out[1]
    is_within = any(are_there) and own is function and name not in _BETWEEN
    return dispatch.return_and_correct_aliasing(function, args, kwargs, wrapped) if is_within else wrapped


def _unpinned(kwargs: dict) -> dict:
    return {"pin_memory": False} if kwargs.get("pin_memory") else {}


def _require_one_device(function, name: str, args: tuple, kwargs: dict, tensors: list, is_there: bool) -> None:
    generator = kwargs.get("generator")
    if generator is not None and (Generator.devices.get(generator._cdata) == CUDA) != is_there:
        raise RuntimeError(f"{function}: a generator of one device, and tensors of another")
    if name in (*_BETWEEN, "_pack_padded_sequence"):  # whose lengths are the CPU's
        return
    others = [tensor for tensor in tensors if isinstance(tensor, Wood) != is_there and (tensor.ndim or not is_there)]
    if name in _INDEXING:  # a device's tensor may be indexed by the CPU's, not the other way round
        others = [tensor for tensor in others if not isinstance(args[0], Wood) or any(tensor is a for a in args[2:3])]
    if others and any(isinstance(tensor, Wood) for tensor in tensors):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cuda:0 and cpu! ({function})")


def _require_no_reading(function, name: str, args: tuple, is_there: bool) -> None:
    ends = {is_there, *(isinstance(a, Wood) for a in args[:2] if isinstance(a, torch.Tensor))}
    is_sent = name in _BETWEEN and len(ends) > 1
    masks = [index for index in args[1] if index is not None and index.dtype == torch.bool] if name in _INDEXING else []
    if name in _READING or is_sent or masks:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({function})")


class _Everywhere(dispatch.TorchDispatchMode):
    """What makes tensors on the device, of none or of the CPU's."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


# ------------------------------------------------- cells that PyTorch has for devices alone
def _gru_cell(by_x, by_h, hidden, b_ih=None, b_hh=None):
    by_x, by_h = (by_x, by_h) if b_ih is None else (by_x + b_ih, by_h + b_hh)
    (r, z, n), (by_r, by_z, by_n) = by_x.chunk(3, -1), by_h.chunk(3, -1)
    r, z = (r + by_r).sigmoid(), (z + by_z).sigmoid()
    n = (n + r * by_n).tanh()
    return n + z * (hidden - n), torch.cat((r, z, n, hidden, by_n), -1)


def _gru_cell_backward(slope, saved, has_bias):
    r, z, n, hidden, by_n = saved.chunk(5, -1)
    d_z, d_n = slope * (hidden - n) * z * (1 - z), slope * (1 - z) * (1 - n * n)
    d_r = d_n * by_n * r * (1 - r)
    by_x, by_h = torch.cat((d_r, d_z, d_n), -1), torch.cat((d_r, d_z, d_n * r), -1)
    return by_x, by_h, slope * z, *((by_x.sum(0), by_h.sum(0)) if has_bias else (None, None))


def _lstm_cell(by_x, by_h, cell, b_ih=None, b_hh=None):
    gates = by_x + by_h if b_ih is None else by_x + by_h + b_ih + b_hh
    write, keep, new, read = gates.chunk(4, -1)
    write, keep, new, read = write.sigmoid(), keep.sigmoid(), new.tanh(), read.sigmoid()
    after = keep * cell + write * new
    return read * after.tanh(), after, torch.cat((write, keep, new, read), -1)


def _lstm_cell_backward(slope, d_after, cell, after, saved, has_bias):
    write, keep, new, read = saved.chunk(4, -1)
    slope, shown = torch.zeros_like(after) if slope is None else slope, after.tanh()
    d_after = slope * read * (1 - shown**2) + (0 if d_after is None else d_after)
    d_write, d_keep = d_after * new * write * (1 - write), d_after * cell * keep * (1 - keep)
    gates = torch.cat((d_write, d_keep, d_after * write * (1 - new**2), slope * shown * read * (1 - read)), -1)
    return gates, d_after * keep, gates.sum(0) if has_bias else None


_CELLS: dict[str, Callable] = {
    "_thnn_fused_gru_cell": _gru_cell,
    "_thnn_fused_gru_cell_backward": _gru_cell_backward,
    "_thnn_fused_lstm_cell": _lstm_cell,
    "_thnn_fused_lstm_cell_backward_impl": _lstm_cell_backward,
}


# ------------------------------------------------------------- graphs, streams
class Graph:
    """What was called while it was recorded, on the memory that it was called on."""

    recording: Graph | None = None

    def __init__(self):
        self.calls, self._generators, self._before = [], [torch.default_generator], {}

    def register_generator_state(self, generator: torch.Generator) -> None:
        self._generators.append(generator)

    def keep(self, function, args: tuple, kwargs: dict) -> None:
        """Notes what the memory holds that ``function`` is about to write to: a device does nothing while it records."""
        for number, argument in enumerate(function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[number] if number < len(args) else kwargs.get(argument.name)
                for tensor in tree_leaves(value):
                    if isinstance(tensor, torch.Tensor):
                        storage = tensor.untyped_storage()
                        self._before.setdefault(storage.data_ptr(), (storage, storage.clone()))

    @contextmanager
    def record(self) -> Iterator[None]:
        states, Graph.recording = [generator.get_state() for generator in self._generators], self
        try:
            yield
        finally:
            Graph.recording = None
            for generator, state in zip(self._generators, states, strict=True):
                generator.set_state(state)
            for storage, before in self._before.values():
                storage.copy_(before)

    def replay(self) -> None:
        with dispatch._disable_current_modes():
            for function, args, kwargs, out in self.calls:
                for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

    def __reduce_ex__(self, protocol: int) -> tuple:
        raise TypeError("cannot pickle 'CUDAGraph' object")


class Stream:
    """Also an event: all that was asked of it is done."""

    def __init__(self, *args, **kwargs):
        pass

    def done(self, *args) -> Stream:
        return self

    wait_stream = wait_event = wait = record_event = record = synchronize = query = done


class Generator(torch.Generator):
    """One that says on which device it draws."""

    #: By their addresses: operations are given another object for the same one.
    devices: dict[int, torch.device] = {}

    def __new__(cls, device: torch.device | str = "cpu") -> Generator:
        made = super().__new__(cls)
        cls.devices[made._cdata] = CUDA if torch.device(device).type == "cuda" else torch.device("cpu")
        return made

    @property
    def device(self) -> torch.device:
        return self.devices[self._cdata]

    def __reduce__(self) -> tuple:
        return _generator, (self.device, self.get_state())


def _generator(device: torch.device, state: torch.Tensor) -> Generator:
    made = Generator(device)
    made.set_state(state)
    return made


@contextmanager
def _as_it_is(*args, **kwargs) -> Iterator[None]:
    yield


_move = torch.nn.Module._apply


def _swapping(module: torch.nn.Module, *args, **kwargs) -> torch.nn.Module:
    # A parameter stays the same object, as it does on a device, whose tensors are of the CPU's class.
    before = torch.__future__.get_swap_module_params_on_conversion()  # True within a module that is being moved
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return _move(module, *args, **kwargs)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def _install() -> None:
    """Puts all this in the places of CUDA's own, for good."""
    own = {"CUDAGraph": Graph, "graph": lambda graph, **_: graph.record(), "Stream": Stream, "Event": Stream}
    own |= {"current_stream": Stream, "default_stream": Stream, "stream": _as_it_is, "device": _as_it_is}
    own |= {"_lazy_init": lambda: None, "is_initialized": lambda: True, "is_available": lambda: True}
    own |= {"device_count": lambda: 1, "current_device": lambda: 0, "get_device_name": lambda *_: "wood"}
    own |= {name: lambda *_, **__: None for name in ("synchronize", "manual_seed", "manual_seed_all", "empty_cache")}
    own |= {
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
    }
    own |= {
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": lambda s: torch.set_rng_state(s[0]),
    }
    own |= {"is_current_stream_capturing": lambda: Graph.recording is not None}
    for name, value in own.items():
        setattr(torch.cuda, name, value)
    torch.Generator, torch.nn.Module._apply = Generator, _swapping
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) makes one on the CPU, and moves it
    _Everywhere().__enter__()


_install()
