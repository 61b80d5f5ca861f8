"""Entries of a rollout by their keys, and what all trials have in common that a rollout plays (`Trials`)."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.envs import EnvBase

from rl2_torchrl.modules.acting import State
from rl2_torchrl.rollout.clock import Rows

__all__ = ["REWARD", "Task", "Trials", "Turn", "flat", "leaves", "next_key", "unflat", "where_rows"]

REWARD = ("next", "reward")
Task = torch.Tensor | TensorDictBase | None


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
    """``one`` ``[*B, ...]`` in ``rows``, bool ``[*B]``, and ``other`` elsewhere."""
    return torch.where(rows.view(*rows.shape, *[1] * (one.ndim - rows.ndim)), one, other)


def flat(value: torch.Tensor, batch_size: torch.Size) -> torch.Tensor:
    """``value`` ``[*B, ...]`` as ``[N, ...]``."""
    dims = len(batch_size)
    return value if dims == 1 else value.reshape(batch_size.numel(), *value.shape[dims:])


def unflat(value: torch.Tensor, batch_size: torch.Size) -> torch.Tensor:
    """``value`` ``[N, ...]`` as ``[*B, ...]``."""
    return value if len(batch_size) == 1 else value.reshape((*batch_size, *value.shape[1:]))


class Turn(NamedTuple):
    """What a step led to: entries under ``"next"``, entries of the step after it, and the rows in which that begins a trial."""

    after: State
    root: State
    begun: Rows


class Trials:
    """What a rollout plays: N flat rows of ``env``, entries ``[N, ...]``.

    The env's transforms are the reference, whoever does their work. Beside what stands here trials have ``adopt(reset)``, which
    takes a ``reset()`` that somebody has just made as the first step of the first trials; ``start()``, the entries of a batch's
    first step and the rows in which it begins a trial; ``step(t, state)``, a `Turn`; ``state_dict`` and ``load_state_dict``, where
    they stand between two batches, the env's own state aside.

    Args:
        env: the env, transforms and all.
        steps: T.
        read: entries that the policy reads.
        keep: entries of the batch; None for all.
    """

    #: Why this is not the fastest way, or None where it is.
    reason: str | None = None
    #: Whether the next batch does the same operations whatever the numbers are; whether the env works on threads of its own.
    is_repeatable = has_threads = False
    #: Keys of `entries`: nobody need record them step by step.
    keys_at_once: Collection[NestedKey] = ()

    def __init__(self, env: EnvBase, steps: int, read: Collection[NestedKey], keep: Collection[NestedKey] | None):
        self.env, self.steps, self.batch_size, self.rows = env, steps, env.batch_size, env.batch_size.numel()
        self.device, self.action_key = env.device or torch.device("cpu"), env.action_key
        root = [*env.full_observation_spec.keys(True, True), *env.full_done_spec.keys(True, True)]
        #: Entries that a batch can have, and those of them that somebody wants.
        self.keys = [*root, *map(next_key, (*root, *env.full_reward_spec.keys(True, True)))]
        self.wanted = {*read, *(self.keys if keep is None else leaves(keep, self.keys))}

    def start_batch(self) -> None:
        """Makes ready for a batch: all that the host does and that `is_repeatable` does not promise."""

    def flags(self, t: int) -> State:
        """Flags and counters of step ``t``, those under ``"next"`` among them, that no `Turn` holds."""
        return {}

    def entries(self) -> State:
        """What a whole batch has, ``[N, T, ...]``."""
        return {}
