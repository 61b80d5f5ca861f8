"""Files that can be trusted: written whole or not at all, checked when they are read, and nothing in them is ever run.

A tree of dictionaries, lists, tuples, tensors, arrays and plain values becomes one file in the safetensors format: its tensors as
they are, its shape as JSON in the header, and there the digest of all of the file. No pickle is written or read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

__all__ = ["DamagedFileError", "from_tensor", "load_tree", "require_tree", "save_tree", "to_tensor", "write_durably"]

log = logging.getLogger(__name__)

#: How the name of a file ends until it is whole.
SCRATCH = ".part"

#: A quotation mark within a JSON string has a backslash before it: this stands in the header once.
_DIGEST_FIELD = b'"sha256":"'
_NO_DIGEST = "0" * 64

#: Tensors by what makes them the same one: their numbers and themselves.
Tensors = dict[tuple, tuple[int, torch.Tensor]]


class DamagedFileError(ValueError):
    """A file does not hold what was written: it is cut short, bits of it have changed, or it is something else."""


def write_durably(path: Path, data: bytes) -> None:
    """Puts ``data`` in the place of ``path``: all of it or nothing, even if the power fails or the program is killed.

    Raises:
        OSError: it cannot be written, as on a full disk; what stood in ``path`` still does.
    """
    # A name of its own: others may write the same file at the same time.
    scratch = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}{SCRATCH}")
    try:
        with scratch.open("wb") as file:
            file.write(data)
            sync(file.fileno())
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        sync(folder)
    finally:
        os.close(folder)


def whole_name(name: str) -> str:
    """The name of the file that ``name`` was to become, had the writing not been cut short; empty where it is another file."""
    return name.rsplit(".", 2)[0] if name.endswith(SCRATCH) else ""


def sync(descriptor: int) -> None:
    """Waits until what was written is on the disk."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that syncs no folders
            raise


def save_tree(tree: Any, path: Path) -> None:
    """Writes ``tree`` to ``path``, durably.

    Raises:
        TypeError: something in it is neither tensor nor plain value; the message says where.
        OSError: as `write_durably`.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder, "state")
        ...     save_tree({"weights": torch.ones(2), "betas": (0.9, 0.999), 3: None}, path)
        ...     load_tree(path)
        {'weights': tensor([1., 1.]), 'betas': (0.9, 0.999), 3: None}
    """
    write_durably(path, to_bytes(tree))


def load_tree(path: Path) -> Any:
    """The tree that `save_tree` wrote; tensors on the devices that they were on, or the CPU where the machine has none such.

    Raises:
        DamagedFileError: the file is not what was written.
    """
    return from_bytes(path.read_bytes(), path)


def to_bytes(tree: Any) -> bytes:
    """What `save_tree` writes."""
    tensors: Tensors = {}
    tree = _encoded(tree, tensors, ())
    # Copies: safetensors takes no views of one another.
    named = {str(number): tensor.cpu().contiguous().clone() for number, tensor in tensors.values()}
    data = safetensors.torch.save(named, {"tree": json.dumps(tree), "sha256": _NO_DIGEST})
    return _with_digest(data, hashlib.sha256(data).hexdigest())


def from_bytes(data: bytes, source: object) -> Any:
    """The tree of `to_bytes`; ``source`` is where they come from, for the error's message."""
    try:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])["__metadata__"]
        if hashlib.sha256(_with_digest(data, _NO_DIGEST)).hexdigest() != header["sha256"]:
            raise DamagedFileError(f"{source} is cut short or has changed since it was written: its digest is another.")
        return _decoded(json.loads(header["tree"]), safetensors.torch.load(data))
    except DamagedFileError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, safetensors.SafetensorError) as error:
        raise DamagedFileError(
            f"{source} is cut short, or no file of this package ({type(error).__name__})."
        ) from error


def to_tensor(tree: Any) -> torch.Tensor:
    """What `save_tree` writes as one tensor, uint8 ``[...]``, on the CPU."""
    return torch.frombuffer(bytearray(to_bytes(tree)), dtype=torch.uint8)


def from_tensor(data: torch.Tensor, source: object) -> Any:
    """The tree of `to_tensor`; ``source`` is where it comes from, for the error's message."""
    return from_bytes(data.cpu().numpy().tobytes(), source)


def require_tree(tree: Any) -> None:
    """Raises what `save_tree` would raise for ``tree``, without writing it."""
    _encoded(tree, {}, ())


def _with_digest(data: bytes, digest: str) -> bytes:
    at = data.index(_DIGEST_FIELD) + len(_DIGEST_FIELD)
    return b"".join((data[:at], digest.encode(), data[at + len(_NO_DIGEST) :]))


def _encoded(value: Any, tensors: Tensors, where: tuple[str, ...]) -> Any:
    """``value`` as JSON; a tensor as its number among ``tensors``, where each stands once."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.Tensor) and value.layout == torch.strided and _is_held(value.dtype):
        number, _ = tensors.setdefault(_identity(value), (len(tensors), value.detach()))
        return {"tensor": [number, str(value.device)]}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        # As PyTorch takes it: writable, and neither turned round nor of another machine's byte order.
        value = np.require(value, value.dtype.newbyteorder("="), ["C", "W"])
        return {"array": _encoded(torch.from_numpy(value), tensors, where)}
    if isinstance(value, (torch.device, torch.dtype)):
        return {type(value).__name__: str(value).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {
            "dict": [[_encoded(k, tensors, where), _encoded(v, tensors, (*where, str(k)))] for k, v in value.items()]
        }
    if isinstance(value, (list, tuple)):
        items = [_encoded(item, tensors, (*where, str(number))) for number, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    kind = f" of {value.dtype}" if isinstance(value, np.ndarray | torch.Tensor) else ""
    raise TypeError(
        f"{'.'.join(where) or 'it'} is a {type(value).__name__}{kind}, which cannot be saved in a file that runs no code when it "
        "is read: give tensors, arrays of numbers, numbers, texts and None, in dictionaries, lists and tuples."
    )


@cache
def _is_held(dtype: torch.dtype) -> bool:
    """Whether a file in the safetensors format may hold tensors of ``dtype``."""
    try:
        safetensors.torch.save({"tensor": torch.empty(0, dtype=dtype)})
    except KeyError:
        return False
    return True


def _identity(tensor: torch.Tensor) -> tuple:
    storage = tensor.untyped_storage().data_ptr() or id(tensor)
    return storage, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride()


def _decoded(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[str(content[0])].to(_device(content[1]), copy=True)  # a copy: each may be written to on its own
    if kind == "array":
        return _decoded(content, tensors).numpy()
    if kind in ("device", "dtype"):
        return torch.device(content) if kind == "device" else torch.empty(0, dtype=getattr(torch, content)).dtype
    if kind == "tuple":
        return tuple(_decoded(item, tensors) for item in content)
    return {_decoded(key, tensors): _decoded(item, tensors) for key, item in content}


@cache  # one line in the log for a device
def _device(name: str) -> torch.device:
    """The device ``name``, or the CPU where there is none such."""
    try:
        return torch.empty(0, device=name).device
    except (AssertionError, RuntimeError) as error:  # as a PyTorch without CUDA says it, or one with it
        log.warning("what was on %s when it was saved is read to the CPU: %s", name, error)
        return torch.device("cpu")
