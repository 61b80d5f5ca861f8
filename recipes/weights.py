"""Trained actors as small files: the weights alone, and the sizes that say which network they fit."""

from pathlib import Path

import torch
from torch import nn

__all__ = ["load_actor", "save_actor"]


def save_actor(actor: nn.Module, path: Path) -> Path:
    """Writes the actor's ``state_dict`` to ``path`` and returns it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(actor.state_dict(), path)
    return path


def load_actor(actor: nn.Module, path: Path) -> None:
    """Puts the weights in ``path`` into ``actor``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: they are those of another network.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"there are no weights in {path}: a finished run leaves them in its folder as actor.pt."
        )
    weights = torch.load(path, weights_only=True)
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    expected = {name: tuple(value.shape) for name, value in actor.state_dict().items()}
    if shapes != expected:
        raise ValueError(
            f"{path} holds the weights of another network: {shapes}; this one's are {expected}. Mind --units."
        )
    actor.load_state_dict(weights)
