"""What steps return compared: with its spec, and with another run, in which rows it differs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import TensorSpec

__all__ = ["ENOUGH", "BrokenRule", "Outcome", "differ", "flat", "misfit", "same", "unequal"]

#: So many differences on one of two sides that are as large, and none on the other, are chance in 1 of 512 where both are alike.
ENOUGH = 9


class BrokenRule(AssertionError):
    """A rule is broken; ``rule`` is its short name."""

    def __init__(self, rule: str, seen: str, advice: str):
        super().__init__(f"rule {rule!r} is broken: {seen.rstrip().removesuffix('.')}. {advice}")
        self.rule = rule


Outcome = Tensor  #: All that a step says of each row, [num_rows, n] float64; whether an episode ended comes first.


def flat(entry: Tensor | TensorDictBase, lead: int) -> Tensor:
    """``entry``, nested or not, in float64: its first ``lead`` dimensions kept, all others made one."""
    leaves = [entry] if isinstance(entry, Tensor) else list(entry.values(True, True))
    return torch.cat([leaf.reshape(*leaf.shape[:lead], -1).double() for leaf in leaves], -1)


def misfit(value: Tensor, spec: TensorSpec) -> str | None:
    """In what ``value`` is not what ``spec`` says, in words; None where it is."""
    if not isinstance(value, Tensor):
        return f"is {type(value).__name__}, its spec says a tensor"
    if (value.shape, value.dtype) != (spec.shape, spec.dtype):
        return f"is {value.dtype} {list(value.shape)}, its spec says {spec.dtype} {list(spec.shape)}"
    if value.device != spec.device:
        return f"is on {value.device}, its spec on {spec.device}"
    return None if spec.is_in(value) else f"is outside its spec, {spec.space}: {value.flatten()[:8].tolist()} ..."


def same(one: Tensor, other: Tensor) -> bool:
    """Whether shapes and numbers are the same; NaN is as NaN."""
    return one.shape == other.shape and not unequal(one, other).any()


def unequal(one: Tensor, other: Tensor) -> Tensor:
    """Where the numbers are not the same; NaN is as NaN."""
    return (one != other) & ((one == one) | (other == other))


def differ(run: Sequence[Outcome], other: Sequence[Outcome]) -> Tensor:
    """The rows in which two runs differ, bool ``[num_rows]``."""
    found = torch.zeros(len(run[0]), dtype=torch.bool)
    for one, another in zip(run, other, strict=True):
        found |= (one != another).any(1) if one.shape == another.shape else True
    return found
