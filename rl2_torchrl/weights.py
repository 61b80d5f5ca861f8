"""A trained module as a small file: its weights alone, nothing that runs when it is read."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import torch
from torch import nn

from rl2_torchrl.storage import write_durably

__all__ = ["load_weights", "save_weights"]

#: What `torch.load` raises on files that are cut short, or no state_dict of tensors.
_UNREADABLE = (EOFError, OSError, RuntimeError, AttributeError, LookupError, ValueError, pickle.UnpicklingError)
_UNREADABLE += (zipfile.BadZipFile, NotImplementedError)


def save_weights(module: nn.Module, path: str | Path) -> Path:
    """Writes the ``state_dict`` of ``module``, such as an actor, to ``path`` and returns it; folders are made.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from rl2_torchrl.modules import GRUCategoricalActor
        >>> with TemporaryDirectory() as folder:
        ...     save_weights(GRUCategoricalActor(5, 3), f"{folder}/runs/actor.pt").name
        'actor.pt'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    write_durably(path, buffer.getvalue())
    return path


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Puts the weights in ``path`` into ``module``, which must have the sizes that they were saved from.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no weights, only a part of them, or those of another network.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from rl2_torchrl.modules import GRUCategoricalActor
        >>> trained, fresh = GRUCategoricalActor(5, 3), GRUCategoricalActor(5, 3)
        >>> with TemporaryDirectory() as folder:
        ...     load_weights(fresh, save_weights(trained, f"{folder}/actor.pt"))
        >>> all(torch.equal(a, b) for a, b in zip(trained.parameters(), fresh.parameters(), strict=True))
        True
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"there are no weights in {path}: a recipe leaves them in its run's folder, as actor.pt."
        )
    try:
        data = path.read_bytes()
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if (part := archive.testzip()) is not None:  # torch.load looks at no checksum
                raise zipfile.BadZipFile(f"{part} has changed")
        weights = torch.load(io.BytesIO(data), weights_only=True)
        shapes = {name: tuple(value.shape) for name, value in weights.items()}
    except _UNREADABLE as error:
        raise ValueError(
            f"{path} cannot be read as weights ({type(error).__name__}): it is cut short or damaged, or something else. Copy it "
            "once more, or save it anew with save_weights."
        ) from error
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    if shapes != expected:
        raise ValueError(
            f"{path} holds the weights of another network: {shapes}; this one's are {expected}. Build it with the sizes "
            "that were saved, such as the same number of units."
        )
    module.load_state_dict(weights)
