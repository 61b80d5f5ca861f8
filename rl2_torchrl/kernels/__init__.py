"""Kernels in C, compiled on first use: the GRU, small linear layers, PPO's terms, returns, Adam.

`functions` and `gru_sequence` are what autograd and the networks see of them; a `Recording` makes many calls in one.

Compiling takes a second or two and happens once: the library is kept in `cache_folder`. Without a C compiler (``$CC``, ``cc``,
``gcc`` or ``clang``), or with ``RL2_TORCHRL_KERNELS=0`` in the environment, everything works as well, on PyTorch's own
operations; wheels bring no compiled kernels, since these are made for the processor that runs them.
"""

from __future__ import annotations

import ctypes
import os
import re
from functools import cache
from pathlib import Path

import torch
from torch.autograd import forward_ad
from torchrl import torchrl_logger

from rl2_torchrl.kernels.library import cache_folder, compiled
from rl2_torchrl.kernels.recording import noting
from rl2_torchrl.kernels.threads import threads_for

__all__ = ["address", "cache_folder", "covers", "is_transformed", "load", "threads_for"]

_SOURCES = sorted(Path(__file__).parent.glob("*.[ch]"))
# -ffast-math stays out: it would let a NaN pass for a number.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno")
_DEFINES = {torch.float32: (), torch.float64: ("-DDOUBLE",)}
#: What a kernel returns that found no memory to work in; see vector.h.
_NO_MEMORY = -(2**31)

_TYPES = {"void": None, "int": ctypes.c_int, "long": ctypes.c_long, "double": ctypes.c_double}
_is_announced = False


@cache
def load(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels for ``dtype``, whose calls a `Recording` notes while it is on; None where there are none.

    The reason is logged once.
    """
    if dtype not in _DEFINES or os.environ.get("RL2_TORCHRL_KERNELS") == "0":
        return None
    try:
        library = ctypes.CDLL(str(compiled(_SOURCES, (*_FLAGS, *_DEFINES[dtype]))))
    except OSError as error:
        _announce(str(error))
        return None
    for name, (result, arguments) in _signatures().items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
        if result is ctypes.c_int:
            function.errcheck = _checked
        if not name.endswith("_size"):  # which works on no memory
            setattr(library, name, noting(library, name))
    return library


def _signatures() -> dict[str, tuple[type | None, list[type]]]:
    """Types of result and arguments by kernel, as functions.h declares them; arrays are given by their addresses."""
    header = (Path(__file__).parent / "functions.h").read_text()
    signatures = {}
    for result, name, arguments in re.findall(r"^(\w+) (\w+)\(([^)]*)\);", header, re.MULTILINE):
        types = [ctypes.c_void_p if "*" in each else _TYPES[each.split()[0]] for each in arguments.split(",")]
        signatures[name] = _TYPES[result], types
    return signatures


def _announce(reason: str) -> None:
    global _is_announced
    if _is_announced:  # for the other dtype
        return
    _is_announced = True
    torchrl_logger.warning(
        f"rl2_torchrl: no compiled kernels; PyTorch's operations do the same, several times slower. {reason}"
    )


def _checked(result: int, function, arguments) -> int:
    if result == _NO_MEMORY:
        raise MemoryError(f"there is no memory for {function.__name__} to work in: take fewer threads, rows or units.")
    return result


def covers(*tensors: torch.Tensor | None) -> bool:
    """Whether there are kernels for ``tensors``, and nothing but plain numbers and autograd is asked of them."""
    kinds = {(tensor.device.type, tensor.dtype) for tensor in tensors if tensor is not None}
    if len(kinds) != 1 or torch.compiler.is_compiling() or is_transformed():
        return False
    device, dtype = kinds.pop()
    return device == "cpu" and load(dtype) is not None


def is_transformed() -> bool:
    """Whether what runs here is taken apart, into PyTorch's operations.

    By `torch.func` (`vmap`, …), forward-mode AD, `torch.export`, `torch.jit.trace`, `make_fx`, or with tensors without numbers.
    """
    is_dual, modes = forward_ad._current_level >= 0, torch._C._TorchDispatchModeKey
    is_transformed = is_dual or torch._C._functorch.maybe_current_level() is not None
    is_traced = torch.compiler.is_exporting() or torch.jit.is_tracing()
    return is_transformed or is_traced or any(map(torch._C._get_dispatch_mode, (modes.FAKE, modes.PROXY)))


def address(tensor: torch.Tensor | None) -> int | None:
    """Address of the first entry; None for None."""
    return None if tensor is None else tensor.data_ptr()
