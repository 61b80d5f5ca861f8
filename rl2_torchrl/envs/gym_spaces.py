"""Gymnasium's spaces as TorchRL's specs of one row, and what is handed over between them: arrays of rows and tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from tensordict import NestedKey
from torch import Tensor
from torchrl import torchrl_logger
from torchrl.data import Binary, Bounded, Categorical, Composite, MultiCategorical, TensorSpec, Unbounded

from rl2_torchrl.transition import LARGEST_SYMBOL
from rl2_torchrl.trial import INFO, TRIAL_KEYS

__all__ = ["ActionSpace", "ObservationSpace", "misfits"]

#: Entries that an env has beside its observations, and those that trials add.
_TAKEN = {"task", INFO, "action", "reward", "done", "terminated", "truncated", "next", "_reset", "trans", "is_init"}
_TAKEN |= {*TRIAL_KEYS}
_CHOICES = spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary


@dataclass(frozen=True)
class _Leaf:
    """One entry of an observation: where it lies in what Gymnasium gives, and what it becomes."""

    key: NestedKey
    path: tuple[str | int, ...]
    spec: TensorSpec
    #: The number from which its choices count, where that is not 0.
    start: Tensor | None

    @cached_property
    def dtype(self) -> np.dtype:
        return torch.empty(0, dtype=self.spec.dtype).numpy().dtype

    @cached_property
    def choices(self) -> np.ndarray | None:
        """Of choices, how many there are, in each of their places: one beyond them would pass for a neighbour's, or be none."""
        if isinstance(self.spec, MultiCategorical):
            return self.spec.nvec.numpy()
        return np.array(self.spec.space.n) if isinstance(self.spec, Categorical | Binary) else None

    @property
    def root(self) -> str:
        return self.key if isinstance(self.key, str) else self.key[0]

    def array(self, rows: Any, *, is_one: bool = False) -> np.ndarray:
        for step in self.path:
            rows = rows[step]
        # A copy: vector envs write their next step over this one.
        array = np.array(rows, self.dtype)
        array = array.reshape(1 if is_one else len(array), *self.spec.shape)
        array = array if self.start is None else array - self.start.numpy()
        if self.choices is not None and (wrong := (array < 0) | (array >= self.choices)).any():
            row, first = int(wrong.nonzero()[0][0]), 0 if self.start is None else self.start.numpy()
            raise ValueError(
                f"the env gives {self.key!r} {(array[row] + first).tolist()} in row {row}, of {self.choices.tolist()} choices from "
                f"{np.asarray(first).tolist()} on: the agent would be shown another one. Mend the env or its observation_space."
            )
        return array


class ObservationSpace:
    """The entries of a Gymnasium observation: a `Dict`'s and a `Tuple`'s own ones, or ``"observation"``.

    Reals are handed over as float32, whole numbers and bytes as they are, choices counted from 0. Text is left out, which the
    log says.

    Args:
        space: of one row.

    Raises:
        TypeError: a space that is no tensor of a fixed size, such as a `Sequence` or a `Graph`.
        ValueError: an entry has a name that an env uses itself.
    """

    def __init__(self, space: spaces.Space):
        is_nested = isinstance(space, spaces.Dict | spaces.Tuple)
        self.leaves = list(_leaves(space, () if isinstance(space, spaces.Dict) else ("observation",), ()))
        taken = {leaf.root for leaf in self.leaves if is_nested} & _TAKEN
        if taken:
            raise ValueError(
                f"the observation's entries {taken} would stand in the place of the env's own: rename them."
            )
        self.spec = Composite({})
        for leaf in self.leaves:
            self.spec[leaf.key] = leaf.spec

    def arrays(self, rows: Any) -> dict[NestedKey, np.ndarray]:
        """All entries ``[N, ...]`` of what a vector env gives for N rows, of the specs' dtypes."""
        return {leaf.key: leaf.array(rows) for leaf in self.leaves}

    def of_one(self, row: Any) -> dict[NestedKey, np.ndarray]:
        """All entries ``[1, ...]`` of what an env gives for one row."""
        return {leaf.key: leaf.array(row, is_one=True) for leaf in self.leaves}


def _leaves(space: spaces.Space, key: tuple[str, ...], path: tuple[str | int, ...]) -> Iterator[_Leaf]:
    if isinstance(space, spaces.Dict):
        for name, part in space.spaces.items():
            yield from _leaves(part, (*key, name), (*path, name))
    elif isinstance(space, spaces.Tuple):
        for number, part in enumerate(space.spaces):
            yield from _leaves(part, (*key, str(number)), (*path, number))
    elif isinstance(space, spaces.Text) or space.dtype in (str, np.str_):
        torchrl_logger.info(
            f"The observation's entry {'.'.join(key)!r} is text, which no network here reads: left out."
        )
    else:
        spec, start = _observed(space, ".".join(key))
        yield _Leaf(key[0] if len(key) == 1 else key, path, spec, start)


def _observed(space: spaces.Space, name: str) -> tuple[TensorSpec, Tensor | None]:
    """Spec of one row of ``space``, and the number from which its choices count."""
    if isinstance(space, _CHOICES):
        return _of_choices(space)
    if isinstance(space, spaces.Box):
        return Unbounded(space.shape or (1,), dtype=_of_box(space)), None
    raise TypeError(
        f"the observation {name!r} is a {type(space).__name__}, which has no fixed size: make a Box, Discrete, MultiDiscrete, "
        "MultiBinary, or a Dict or Tuple of these of it, by one of gymnasium.wrappers."
    )


def _of_choices(space: _CHOICES) -> tuple[TensorSpec, Tensor | None]:
    """As `_observed`, of choices and flags."""
    if isinstance(space, spaces.MultiBinary):
        return Binary(int(np.prod(space.shape))), None
    start = torch.as_tensor(np.asarray(space.start), dtype=torch.int64)
    if isinstance(space, spaces.Discrete):
        spec = Categorical(int(space.n))
    else:
        spec, start = MultiCategorical(space.nvec.flatten().tolist()), start.flatten()
    return spec, start if start.any() else None


def _of_box(space: spaces.Box) -> torch.dtype:
    if np.issubdtype(space.dtype, np.floating):
        return torch.float32
    # Bytes are scaled as images are, by 255, which would leave nothing of flags and symbols.
    if space.dtype == np.uint8 and space.high.max(initial=0) <= LARGEST_SYMBOL:
        return torch.int16
    # PyTorch knows no arithmetic of unsigned numbers wider than a byte.
    is_small = space.dtype in (np.uint8, np.bool_, np.int8)
    return torch.from_numpy(np.zeros(1, space.dtype)).dtype if is_small else torch.int64


def misfits(space: spaces.Space, value: Any, path: tuple[str | int, ...] = ()) -> Iterator[str]:
    """What of an observation, and of those within it, ``space`` says otherwise, in words."""
    name, shown, said = ".".join(map(str, path)) or "observation", type(value).__name__, None
    parts: list[tuple] = []
    if isinstance(space, spaces.Dict):
        shown, said = (sorted(value) if isinstance(value, Mapping) else shown), sorted(space.spaces)
        if isinstance(value, Mapping) and value.keys() >= space.spaces.keys():
            parts, said = [(part, value[key], key) for key, part in space.spaces.items()], None
    elif isinstance(space, spaces.Tuple):
        said = f"{len(space.spaces)} parts"
        if hasattr(value, "__len__") and len(value) == len(space.spaces):
            parts, said = list(zip(space.spaces, value, itertools.count(), strict=False)), None
    elif isinstance(space, spaces.Box | _CHOICES):
        array = np.asarray(value)
        if array.shape != space.shape or not np.can_cast(array.dtype, space.dtype, "same_kind"):
            shown = None if value is None else f"{array.dtype} {list(array.shape)}"
            said = f"{space.dtype} {list(space.shape)}"
    if said is not None:
        yield f"{name!r} as {shown}, and its observation_space says {said}"
    for part, each, key in parts:
        yield from misfits(part, each, (*path, key))


class ActionSpace:
    """A Gymnasium action space, with its spec and the way from actions to what a vector env takes.

    Actions beyond the bounds of a `Box` are clipped to them, as they reach the env; their log-probability stays that of the
    action as it was drawn (so that the ratio of PPO's loss is that of the policy), and the agent is shown that action too.

    Args:
        space: of one row.

    Raises:
        TypeError: there is no such spec: a `Dict`, a `Tuple`, text.
    """

    def __init__(self, space: spaces.Space):
        self.space, self.start, self.bounds = space, None, None
        if isinstance(space, _CHOICES):
            self.spec, self.start = _of_choices(space)
        elif isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
            low, high = (
                torch.as_tensor(np.atleast_1d(bound), dtype=torch.float32) for bound in (space.low, space.high)
            )
            self.spec = Bounded(low, high) if space.is_bounded() else Unbounded(low.shape)
            self.bounds = (space.low, space.high)
        else:
            raise TypeError(
                f"actions are a {space}, for which no policy here has a distribution: make a Box of reals, Discrete, MultiDiscrete "
                "or MultiBinary of it by a gymnasium.ActionWrapper."
            )

    def array(self, action: Tensor) -> np.ndarray:
        """Actions ``[N, ...]`` as a vector env takes them."""
        action = action.float() if action.dtype is torch.bfloat16 else action  # which NumPy does not have
        array = action.detach().cpu().numpy()
        array = array if self.start is None else array + self.start.numpy()
        array = array.reshape(len(array), *self.space.shape)
        array = array if self.bounds is None else array.clip(*self.bounds)
        return array.astype(self.space.dtype, copy=False)
