"""Where the rows of a `TensorEnv` stand: the state that its author returned, merged from rows old and new, and taken apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

__all__ = ["Entries", "EnvState", "Rows", "by_key", "entries_of", "merge", "rebuilt", "tensors_of"]

#: What an env remembers from step to step: a tensor, TensorDict, tuple or dictionary of them, or None; each tensor ``[*B, ...]``.
EnvState = Any
Entries = dict[NestedKey, Tensor]


@dataclass(slots=True)
class Rows:
    """Where an env's rows stand. A plain object, since a `Module` takes longer to set an attribute than a step may last."""

    started: bool = False  # whether the rows have ever begun
    state: EnvState = None
    observation: Entries = field(default_factory=dict)
    steps: Tensor | None = None  # of the current episode ``[*B, 1]``; None where all rows have taken ``episode_step``
    episode_step: int = 0
    terminated: Tensor | None = None  # of the last step, ``[*B, 1]``
    truncated: Tensor | None = None  # likewise
    moves: int = 0  # how many times rows have begun or stepped


def entries_of(observation: Tensor | Entries | None) -> Entries:
    """Entries of what an author returns as the observation, those within others by tuples.

    Examples:
        >>> entries_of(torch.ones(2)), entries_of(None), entries_of({"inner": {"place": torch.ones(2)}})
        ({'observation': tensor([1., 1.])}, {}, {('inner', 'place'): tensor([1., 1.])})
    """
    if isinstance(observation, Tensor):
        return {"observation": observation}
    if observation is None:
        return {}
    is_nested = isinstance(observation, TensorDictBase) or any(
        not isinstance(value, Tensor) and isinstance(value, dict | TensorDictBase) for value in observation.values()
    )
    return dict(TensorDict(observation).items(True, True)) if is_nested else observation


def merge(rows: Tensor, new: EnvState, old: EnvState) -> EnvState:
    """``new`` in ``rows`` (bool ``[*B]``), ``old`` elsewhere.

    Examples:
        >>> merge(torch.tensor([True, False]), {"place": torch.ones(2, 1)}, {"place": torch.zeros(2, 1)})["place"].tolist()
        [[1.0], [0.0]]
    """
    if isinstance(new, Tensor):
        return torch.where(rows.reshape((*rows.shape, *[1] * (new.ndim - rows.ndim))), new, old)
    if new is None:
        return None
    if isinstance(new, TensorDictBase):
        return new.where(rows, old)
    if isinstance(new, dict):
        return {key: merge(rows, value, old[key]) for key, value in new.items()}
    return _tuple_like(new, [merge(rows, *values) for values in zip(new, old, strict=True)])


def by_key(entries: dict) -> dict:
    """``entries`` in the order of their keys, since a step may return them in another than a reset.

    Examples:
        >>> by_key({"speed": 1, "place": 2})
        {'place': 2, 'speed': 1}
    """
    return dict(sorted(entries.items(), key=lambda item: str(item[0])))


def tensors_of(state: EnvState) -> Iterator[Tensor]:
    """All tensors of a state, in order; those of a dictionary or TensorDict `by_key`.

    Examples:
        >>> list(tensors_of((torch.tensor(1), {"place": torch.tensor(2)})))
        [tensor(1), tensor(2)]
    """
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, TensorDictBase):
        yield from state.values(True, True, sort=True)
    elif state is not None:
        for value in by_key(state).values() if isinstance(state, dict) else state:
            yield from tensors_of(value)


def rebuilt(state: EnvState, leaves: Iterator[Tensor]) -> EnvState:
    """``state`` with its tensors replaced by ``leaves``, which `tensors_of` would give.

    Examples:
        >>> rebuilt((torch.tensor(1), None), iter([torch.tensor(5)]))
        (tensor(5), None)
    """
    if isinstance(state, Tensor):
        return next(leaves)
    if state is None:
        return None
    if isinstance(state, TensorDictBase):
        return state.clone(False).update(dict(zip(state.keys(True, True, sort=True), leaves, strict=False)))
    if isinstance(state, dict):
        return {key: rebuilt(value, leaves) for key, value in by_key(state).items()}
    return _tuple_like(state, [rebuilt(value, leaves) for value in state])


def _tuple_like(example: Sequence, values: list) -> Sequence:
    return type(example)(*values) if hasattr(example, "_fields") else type(example)(values)
