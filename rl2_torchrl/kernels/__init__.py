"""Kernels in C, compiled on first use: the GRU, the heads' linear layers, and a policy's terms in PPO's loss.

Compiling takes a second or two and happens once: the library is kept in ``$XDG_CACHE_HOME/rl2_torchrl`` (by default
``~/.cache/rl2_torchrl``), under a name that changes with the source, the compiler and the processor. Without a C compiler
(``$CC``, ``cc``, ``gcc`` or ``clang``), or with ``RL2_TORCHRL_KERNELS=0`` in the environment, everything works as well, on
PyTorch's own operations.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torchrl import torchrl_logger

__all__ = ["address", "cache_folder", "covers", "load", "threads_for"]

_SOURCES = sorted(Path(__file__).parent.glob("*.[ch]"))
_DEFINES = {torch.float32: (), torch.float64: ("-DDOUBLE",)}
# -ffast-math stays out: it would let a NaN pass for a number.
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-shared", "-fPIC")

_int, _long, _double, _pointer = ctypes.c_int, ctypes.c_long, ctypes.c_double, ctypes.c_void_p
_STRIDED = (_pointer, _long, _long)
_SIGNATURES = {
    "forward_size": (_long, (_int, _int)),
    "backward_size": (_long, (_int,)),
    "saved_size": (_long, (_int, _int)),
    "pack_forward": (None, (_int, _int, *(_pointer,) * 5)),
    "pack_backward": (None, (_int, _pointer, _pointer)),
    "gru_forward": (None, (*(_int,) * 4, *_STRIDED, *_STRIDED, *(_pointer,) * 4, _int)),
    "gru_backward": (None, (*(_int,) * 4, *_STRIDED, *(_pointer,) * 4, _int)),
    "linear_forward": (None, (*(_int,) * 3, *(_pointer,) * 4, _int)),
    "linear_backward": (None, (*(_int,) * 3, *(_pointer,) * 6, _int)),
    "tanh_forward": (None, (_long, _pointer, _pointer, _int)),
    "categorical_forward": (_int, (*(_int,) * 2, *(_pointer,) * 5, _int)),
    "categorical_backward": (None, (*(_int,) * 2, *(_pointer,) * 7, _int)),
    "gaussian_forward": (None, (*(_int,) * 2, *(_pointer,) * 4)),
    "gaussian_backward": (None, (*(_int,) * 2, *(_pointer,) * 6)),
    "ppo_pass": (_int, (_pointer,)),
    "ppo_pass_layout": (_int, (_int,)),
    "clipped_objective": (None, (_int, _int, *(_pointer,) * 3, _double, _double, *(_pointer,) * 4)),
}


@cache
def load(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels for ``dtype``, or None where there are none; the reason is logged once.

    Examples:
        >>> load(torch.int64) is None
        True
    """
    if dtype not in _DEFINES or os.environ.get("RL2_TORCHRL_KERNELS") == "0":
        return None
    try:
        library = ctypes.CDLL(str(_compiled(_DEFINES[dtype])))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        torchrl_logger.warning(
            f"rl2_torchrl: no compiled kernels; PyTorch's operations do the same, several times slower. {reason}"
        )
        return None
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def covers(*tensors: torch.Tensor | None) -> bool:
    """Whether there are kernels for ``tensors``, and nothing but plain numbers and autograd is asked of them.

    Examples:
        >>> covers(torch.zeros(2, dtype=torch.int64))
        False
    """
    kinds = {(tensor.device.type, tensor.dtype) for tensor in tensors if tensor is not None}
    if len(kinds) != 1 or torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return False
    device, dtype = kinds.pop()
    return device == "cpu" and load(dtype) is not None


def address(tensor: torch.Tensor | None) -> int | None:
    """Address of the first entry; None for None.

    Examples:
        >>> address(None) is None
        True
    """
    return None if tensor is None else tensor.data_ptr()


def threads_for(multiplications: int) -> int:
    """Threads for that much work: below 100,000 waking the others costs more than they save.

    Examples:
        >>> threads_for(1000)
        1
    """
    return torch.get_num_threads() if multiplications > 100_000 else 1


def cache_folder() -> Path:
    """Where the package keeps what it computes once for all programs; it may not exist yet.

    Examples:
        >>> cache_folder().name
        'rl2_torchrl'
    """
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rl2_torchrl"


def _compiled(defines: tuple[str, ...]) -> Path:
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        raise OSError("There is no C compiler on the path; set CC, or install gcc or clang.")
    folder = cache_folder()
    path = folder / f"kernels-{_fingerprint(compiler, defines)}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        torchrl_logger.info(f"rl2_torchrl: compiling the kernels once, into {path}")
        # Workers may compile at the same time: each into a file of its own, then moved into place at once.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            library = Path(scratch) / path.name
            sources = [str(source) for source in _SOURCES if source.suffix == ".c"]
            _compile(compiler, [*_FLAGS, *defines, *sources, "-o", str(library), "-lm"])
            library.replace(path)
    return path


def _compile(compiler: str, arguments: list[str]) -> None:
    """Compiles with OpenMP, or where the compiler has none (Apple's), for one thread."""
    try:
        subprocess.run([compiler, "-fopenmp", *arguments], check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError:
        subprocess.run([compiler, *arguments], check=True, capture_output=True, text=True)


def _fingerprint(compiler: str, defines: tuple[str, ...]) -> str:
    """Changes with the source, the compiler and what the processor can do, as a home folder may serve many machines."""
    command = [compiler, "-march=native", "-dM", "-E", "-x", "c", os.devnull]
    macros = subprocess.run(command, check=True, capture_output=True).stdout
    sources = b"".join(source.read_bytes() for source in _SOURCES)
    return hashlib.sha256(sources + macros + repr((_FLAGS, defines)).encode()).hexdigest()[:16]
