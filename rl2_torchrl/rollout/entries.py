"""Entries of a rollout by their keys, and what one of its steps leads to."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.envs import EnvBase

from rl2_torchrl.modules.acting import State
from rl2_torchrl.rollout.clock import Rows

__all__ = ["REWARD", "Task", "Turn", "is_next", "keys_of", "leaves", "next_key", "where_rows"]

REWARD = ("next", "reward")
Task = torch.Tensor | TensorDictBase | None


class Turn(NamedTuple):
    """What a step led to: entries under ``"next"``, entries of the step after it, and the rows in which that begins a trial."""

    after: State
    root: State
    begun: Rows


def keys_of(env: EnvBase) -> list[NestedKey]:
    """Entries of a batch that ``env`` makes."""
    root = [*env.full_observation_spec.keys(True, True), *env.full_done_spec.keys(True, True)]
    return [*root, *map(next_key, (*root, *env.full_reward_spec.keys(True, True)))]


def next_key(key: NestedKey) -> NestedKey:
    """``("next", key)``, flat."""
    return ("next", key) if isinstance(key, str) else ("next", *key)


def leaves(keys: Iterable[NestedKey], entries: Iterable[NestedKey]) -> list[NestedKey]:
    """Those of ``entries`` that are among ``keys`` or lie within one of these.

    Examples:
        >>> leaves(["a", ("b", "c")], ["a", ("b", "c", "d"), ("b", "e")])
        ['a', ('b', 'c', 'd')]
    """
    roots = {key if isinstance(key, tuple) else (key,) for key in keys}
    paths = [(entry, entry if isinstance(entry, tuple) else (entry,)) for entry in entries]
    return [entry for entry, path in paths if any(path[:n] in roots for n in range(1, len(path) + 1))]


def where_rows(rows: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """``one`` ``[N, ...]`` in ``rows``, bool ``[N]``, and ``other`` elsewhere."""
    return torch.where(rows.view(-1, *[1] * (one.ndim - 1)), one, other)


def is_next(key: NestedKey) -> bool:
    """Whether ``key`` stands under ``"next"``."""
    return isinstance(key, tuple) and key[0] == "next"
