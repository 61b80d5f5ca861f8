"""An agent's file: its weights, and as text its architecture and its env's specs. Nothing runs when it is read."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rl2_torchrl.storage import write_durably

__all__ = ["load_weights", "read_agent", "write_agent"]

#: The mark of these files; another number where what they hold means something else.
_FORMAT = "rl2_torchrl.agent.1"
#: What `torch.load` raises on files that are cut short, or hold anything but tensors, numbers and text.
_UNREADABLE = (
    EOFError,
    OSError,
    RuntimeError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


def write_agent(path: str | Path, about: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> Path:
    """Writes ``about``, in JSON's types, and ``weights`` to ``path``, whose folder is made, and returns it."""
    path, text = Path(path), json.dumps(about)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    written = io.BytesIO()
    torch.save({"format": _FORMAT, "about": text, "weights": weights, "digest": _digest(text, weights)}, written)
    write_durably(path, written.getvalue())
    return path


def read_agent(path: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What `write_agent` was given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no agent's, only a part of one, or damaged.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no agent in {path}: a recipe leaves its own in its run's folder, as agent.pt."
        )
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
        form, text, weights, digest = (held[name] for name in ("format", "about", "weights", "digest"))
        is_whole = form == _FORMAT and digest == _digest(text, weights)
    except _UNREADABLE as error:
        raise ValueError(
            f"{path} cannot be read as an agent's file ({type(error).__name__}): it is cut short, or something else. Copy it once "
            "more, or save it anew: AdaptiveAgent.from_policy(policy, env).save(path)."
        ) from error
    if form != _FORMAT:
        raise ValueError(f"{path} is of the format {form!r}, and this version of the package reads {_FORMAT!r}.")
    if not is_whole:
        raise ValueError(f"{path} is damaged: what it holds is not what was saved. Copy it once more.")
    return json.loads(text), weights


def load_weights(policy: nn.Module, path: str | Path) -> None:
    """Puts the weights of the agent in ``path`` into ``policy``, an actor of the sizes that it was saved from.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no agent's, only a part of one, damaged, or that of another network.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> from torchrl.envs import Compose, TransformedEnv
        >>> from rl2_torchrl import AdaptiveAgent, GRUCategoricalActor, PreviousStep, TaskSampler, Trial
        >>> from rl2_torchrl.envs import BernoulliBandit, uniform_means
        >>> trial = Compose(Trial(episodes=10), TaskSampler(uniform_means(3)), PreviousStep())
        >>> env = TransformedEnv(BernoulliBandit(3, batch_size=(4,)), trial)
        >>> trained, fresh = (GRUCategoricalActor.from_env(env) for _ in range(2))
        >>> with TemporaryDirectory() as folder:
        ...     load_weights(fresh, AdaptiveAgent.from_policy(trained, env).save(f"{folder}/agent.pt"))
        >>> all(torch.equal(a, b) for a, b in zip(trained.parameters(), fresh.parameters(), strict=True))
        True
    """
    _, weights = read_agent(path)
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    expected = {name: tuple(value.shape) for name, value in policy.state_dict().items()}
    if shapes != expected:
        raise ValueError(
            f"{path} holds the weights of another network: {shapes}; this one's are {expected}. Build it with the sizes "
            "that were saved, such as the same number of units."
        )
    policy.load_state_dict(weights)


def _digest(text: str, weights: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name, weight in weights.items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
