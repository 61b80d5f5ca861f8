"""Files that can be trusted: written whole or not at all, checked when they are read, and nothing in them is ever run.

A tree of values (`codec`) becomes one file in the safetensors format: its tensors as they are, all else as JSON in the header, and
there the digest of all of the file. No pickle is written or read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from rl2_torchrl.codec import Decoder, Encoder

__all__ = ["DamagedFileError", "from_bytes", "from_tensor", "load_tree", "save_tree", "to_bytes", "to_tensor"]
__all__ += ["write_durably"]

#: How the name of a file ends until it is whole.
SCRATCH = ".part"

#: A quotation mark within a JSON string has a backslash before it: this stands in the header once.
_DIGEST_FIELD = b'"sha256":"'
_NO_DIGEST = "0" * 64


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
        NoStateError: a TypeError; something in it is neither tensor nor plain value, and the message says where.
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


def to_bytes(tree: Any, packages: Collection[str] = (), known: Sequence[Any] = ()) -> bytes:
    """What `save_tree` writes, the same bytes for the same tree; ``packages`` and ``known`` as for `Encoder`."""
    encoder = Encoder(packages, known)
    about = {"tree": json.dumps(encoder(tree)), "sha256": _NO_DIGEST}
    # Copies: safetensors takes no views of one another.
    named = {str(number): tensor.cpu().contiguous().clone() for number, tensor in enumerate(encoder.tensors)}
    data = safetensors.torch.save(named)
    size = int.from_bytes(data[:8], "little")
    # By itself it would write what is said about them in an order that changes.
    header = json.dumps({"__metadata__": about, **json.loads(data[8 : 8 + size])}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    data = len(header).to_bytes(8, "little") + header + data[8 + size :]
    return _with_digest(data, hashlib.sha256(data).hexdigest())


def from_bytes(
    data: bytes, source: object, packages: Collection[str] = (), known: Sequence[Any] = (), now: Any = None
) -> Any:
    """The tree of `to_bytes`; ``source`` is where they come from, for the error's message, ``now`` what is there (`Decoder`)."""
    try:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])["__metadata__"]
        if hashlib.sha256(_with_digest(data, _NO_DIGEST)).hexdigest() != header["sha256"]:
            raise DamagedFileError(f"{source} is cut short or has changed since it was written: its digest is another.")
        tensors = safetensors.torch.load(data)
        in_order = [tensors[str(number)] for number in range(len(tensors))]
        return Decoder(in_order, packages, known)(json.loads(header["tree"]), now)
    except DamagedFileError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, safetensors.SafetensorError) as error:
        raise DamagedFileError(
            f"{source} is cut short, or no file of this package ({type(error).__name__}: {error})."
        ) from error


def to_tensor(tree: Any) -> torch.Tensor:
    """What `save_tree` writes as one tensor, uint8 ``[...]``, on the CPU."""
    return torch.frombuffer(bytearray(to_bytes(tree)), dtype=torch.uint8)


def from_tensor(data: torch.Tensor, source: object) -> Any:
    """The tree of `to_tensor`; ``source`` is where it comes from, for the error's message."""
    return from_bytes(data.cpu().numpy().tobytes(), source)


def _with_digest(data: bytes, digest: str) -> bytes:
    at = data.index(_DIGEST_FIELD) + len(_DIGEST_FIELD)
    return b"".join((data[:at], digest.encode(), data[at + len(_NO_DIGEST) :]))
