"""What steps return compared: with its spec, and with another run, in which rows it differs and whether that may be chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from traceback import walk_tb

import torch
from torch import Tensor
from torchrl.data import TensorSpec

__all__ = [
    *("CHANCE", "REFUSED", "Outcome", "chance_of_none", "counted", "differ", "in_a_step", "kind", "misfit"),
    *("none_by_rule", "same", "unequal"),
]

#: How likely what a rule tells may be chance at most.
CHANCE = 1 / 400
#: What is said where an env has raised in a step, of an action maybe.
REFUSED = (
    "The env raised this when it was played, by random actions of its action_spec, of which it may refuse none: an illegal one "
    "does nothing there, or costs something, since an ActionMask rules neither what this check plays nor a policy without a mask."
)

Outcome = Tensor  #: All that a step says of each row, [num_rows, n] float64; whether an episode ended comes first.


#: What envs, and those around them, name what begins an episode, and what takes a step.
_BEGINS, _STEPS = ("begin", "reset", "_reset"), ("advance", "step", "_step")


def in_a_step(error: Exception) -> bool:
    """Whether an env raised ``error`` in a step, and not where an episode begins."""
    names = [frame.f_code.co_name for frame, _ in walk_tb(error.__traceback__)]
    return [name for name in ["", *names] if name in ("", *_BEGINS, *_STEPS)][-1] in _STEPS


def misfit(value: Tensor, spec: TensorSpec) -> str | None:
    """In what ``value`` is not what ``spec`` says, in words; None where it is."""
    if not isinstance(value, Tensor) or (value.shape, value.dtype) != (spec.shape, spec.dtype):
        return f"is {kind(value)}, its spec says {spec.dtype} {list(spec.shape)}"
    if value.device != spec.device:
        return f"is on {value.device}, its spec on {spec.device}"
    return None if spec.is_in(value) else f"is outside its spec, {spec.space}: {value.flatten()[:8].tolist()} ..."


def kind(value: object) -> str:
    """What ``value`` is, in words."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return f"{len(value)} values" if isinstance(value, tuple) else type(value).__name__


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


def counted(count: Sequence[int], runs: Sequence[Sequence[Outcome]], rows: Tensor) -> list[int]:
    """``count``, of rows that differ and of all, with those of two more ``runs``, of which ``rows`` count."""
    return [count[0] + int((differ(*runs) & rows).sum()), count[1] + int(rows.sum())]


def none_by_rule(some: Sequence[int], none: Sequence[int]) -> bool:
    """Whether ``none`` were by chance in less than `CHANCE`, beside ``some``: how many, and of how many that are alike.

    All that were seen are then as likely to be any of both (Fisher 1922): rows must not have been chosen by what is counted.
    """
    hits, rows = some
    return none[0] == 0 and _log_choices(rows, hits) - _log_choices(rows + none[1], hits) < math.log(CHANCE)


def chance_of_none(heard: Tensor, asked: Tensor, deaf: Tensor) -> float:
    """How likely the rows ``deaf``, or as many others, hear nothing where all rows hear alike; ``[num_pairs, num_rows]`` bool."""
    chance = _log_choices(len(deaf), int(deaf.sum()))
    for hits, rows in zip(heard.sum(1).tolist(), asked, strict=True):
        chance += _log_choices(int((rows & ~deaf).sum()), hits) - _log_choices(int(rows.sum()), hits)
    return math.exp(min(0.0, chance))


def _log_choices(number: int, chosen: int) -> float:
    return math.lgamma(number + 1) - math.lgamma(chosen + 1) - math.lgamma(number - chosen + 1)
