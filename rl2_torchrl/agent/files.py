"""An agent's file: weights, architecture and the env's specs, written by `rl2_torchrl.storage`. Nothing runs when it is read."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchrl.modules import ProbabilisticActor

from rl2_torchrl.agent.architecture import Plan, plan_of_policy
from rl2_torchrl.arguments import kind_of
from rl2_torchrl.modules.actor_critic import ActorCritic
from rl2_torchrl.storage import DamagedFileError, load_tree, save_tree

__all__ = ["load_weights", "read_agent", "write_agent"]

log = logging.getLogger(__name__)

#: The mark of these files; another number where what they hold means something else.
_FORMAT = "rl2_torchrl.agent.1"


def write_agent(path: str | Path, about: Mapping[str, Any], weights: Mapping[str, Any]) -> Path:
    """Writes ``about``, in JSON's types, and ``weights``, a ``state_dict``, to ``path``, whose folder is made, and returns it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in weights.items()}
    save_tree({"format": _FORMAT, "about": about, "weights": weights}, path)
    return path


def read_agent(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `write_agent` was given.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no agent's, only a part of one, or damaged.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, and no agent's file" if path.is_dir() else "is no file"
        raise FileNotFoundError(f"{path} {what}: a recipe leaves its agent in its run's folder, as agent.safetensors.")
    try:
        held = load_tree(path)
    except DamagedFileError as error:
        raise ValueError(
            f"{error} An agent was to be read from it: copy it once more, or save it anew: "
            "AdaptiveAgent.from_policy(policy, env).save(path)."
        ) from error
    form = held.get("format") if isinstance(held, dict) else None
    if form != _FORMAT:
        hint = (
            " A training's checkpoint holds its whole run: train(..., checkpoints=folder, resume=True) puts the newest one's "
            "networks back, even once it is over, and AdaptiveAgent.from_policy(actor, env).save(path) then writes an agent, as "
            "recipes do."
        )
        raise ValueError(
            f"{path} is of the format {form!r}; an agent's, for this version of the package, is {_FORMAT!r}."
            + hint * isinstance(form, int)
        )
    return held["about"], held["weights"]


def load_weights(policy: nn.Module, path: str | Path) -> None:
    """Puts the weights of the agent in ``path`` into ``policy``, an actor of the sizes and parts that it was saved from.

    Parts of your own are compared where `register_part` knows them. Of an `ActorCritic` the actor gets them: an agent's file holds
    no critic.

    Raises:
        TypeError: ``policy`` is no network.
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
        ...     load_weights(fresh, AdaptiveAgent.from_policy(trained, env).save(f"{folder}/agent.safetensors"))
        >>> all(torch.equal(a, b) for a, b in zip(trained.parameters(), fresh.parameters(), strict=True))
        True
    """
    if not isinstance(policy, nn.Module):
        raise TypeError(
            f"{kind_of(policy)} is no network: load_weights(policy, path) takes an actor, of an agent its .policy."
        )
    about, weights = read_agent(path)
    policy = policy.actor if isinstance(policy, ActorCritic) else policy
    held, here = _shapes(weights), _shapes(policy.state_dict())
    if held == here and isinstance(policy, ProbabilisticActor):
        try:
            plans = about["policy"], plan_of_policy(policy)
            held, here = map(_networks, plans)
            read = list(map(_entries_read, plans))
            if sorted(read[0]) == sorted(read[1]):  # others may be the same by another name
                held["entries read"], here["entries read"] = read
        except TypeError as error:
            log.info("of the networks only sizes are compared with those of %s: %s", path, error)
    names = [name for name in {**held, **here} if held.get(name) != here.get(name)]
    if names:
        told = ", ".join(f"{name} {held.get(name, 'missing')}, here {here.get(name, 'none')}" for name in names[:3])
        more = f", and {len(names) - 3} more" * (len(names) > 3)
        run = Path(path).with_name("about.txt")
        command = f"; {run} has its command" * run.is_file()
        raise ValueError(
            f"{path} holds the weights of another network: {told}{more}. Build this one with the sizes that were saved: the same "
            f"env, units, layers, activations (a recipe's --units, --num-cells, which may be empty, and --core{command})."
        )
    policy.load_state_dict(weights)


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes by name; of a module's ``get_extra_state``, which may be anything, only that it is there."""
    return {name: tuple(getattr(value, "shape", ())) for name, value in state.items()}


def _entries_read(plan: Plan) -> list[str]:
    """What a policy's networks read that none of them writes, in order."""
    read, written = [], []
    for part in plan["parts"]:
        first, *others = part["keys"]
        reads, writes = ([first], others[1:]) if "core" in part else (first, others[0])
        read += [json.dumps(key) for key in reads if key not in written]
        written += writes
    return read


def _networks(plan: Plan) -> dict[str, Any]:
    """What a policy's networks and distribution are; not which entries they read, nor between which bounds they act."""
    parts = [{name: each for name, each in part.items() if name != "keys"} for part in plan["parts"]]
    return {"distribution": plan["distribution"], **{f"part {number}": part for number, part in enumerate(parts)}}
