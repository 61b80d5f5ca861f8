"""What an agent sees of its task: numbers that stand in its input as they are, or at another scale."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["BITS", "Shown", "shown"]

#: Evidence, in coin tosses, from which on equal numbers are no coincidence.
BITS = 14.0
#: Evidence in a number that is not round, since it was hardly drawn from a few: that it is met, and that a line meets it.
_BITS_OF_A_NUMBER, _BITS_ON_A_LINE = 20.0, 8.0
#: What of an entry's variance may be noise, or rounding in half precision, where it is the task at another scale.
_UNLIKE = 1e-5


class Shown(NamedTuple):
    """A number of the task, the column of an entry that shows it, and how much that says, in coin tosses."""

    number: int
    column: int
    as_it_is: bool
    bits: float

    def __str__(self) -> str:
        return f"[{self.column}]" + ("" if self.as_it_is else ", at another scale")


def shown(entry: Tensor, task: Tensor, starts: Tensor) -> list[Shown]:
    """Numbers of ``task`` ``[R, T, m]`` in ``entry`` ``[R, T, n]``, at all steps; ``starts``, bool ``[R, T]``: where drawn."""
    first, draws = entry[starts].double(), task[starts].double()
    equal = (first.float().unsqueeze(-1) == draws.float().unsqueeze(-2)).all(0) & (draws != draws[:1]).any(0)
    found = []
    for column, number in (equal | _on_a_line(first, draws)).nonzero().tolist():
        one, other = entry[..., column].reshape(-1, 1), task[..., number].reshape(-1, 1)
        as_it_is = bool(equal[column, number]) and torch.equal(one.float(), other.float())
        if as_it_is or _on_a_line(one, other).item():
            found.append(Shown(number, column, as_it_is, _bits(draws[:, number], as_it_is)))
    return found


def _on_a_line(one: Tensor, other: Tensor) -> Tensor:
    """Which columns of ``one`` ``[S, n]`` are ``a * x + b`` of those of ``other`` ``[S, m]``, and vary; bool ``[n, m]``."""
    one, other = (
        (x := each.double() - each.double().mean(0)) / x.norm(dim=0).clamp_min(1e-30) for each in (one, other)
    )
    return 1 - (one.T @ other).square() < _UNLIKE


def _bits(draws: Tensor, as_it_is: bool) -> float:
    """How much it says, in coin tosses, that ``draws`` ``[K]`` are met; any two points lie on a line."""
    round_numbers = bool((8 * draws == (8 * draws).round()).all())
    of_others = _BITS_OF_A_NUMBER if as_it_is else _BITS_ON_A_LINE
    return (len(draws) - (1 if as_it_is else 2)) * (math.log2(len(draws.unique())) if round_numbers else of_others)
