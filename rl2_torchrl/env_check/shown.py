"""Tasks that are drawn, and what is no coincidence: the same again, and an agent's input that shows its task, at any scale."""

from __future__ import annotations

import copy
import math

import torch
from tensordict import TensorDictBase
from torch import Tensor

from rl2_torchrl.env_check.outcomes import flat
from rl2_torchrl.tasks import TaskDistribution

__all__ = ["BITS", "bits_of", "drawn", "rows_of_task", "shown"]

#: Evidence, in coin tosses, from which on equal numbers are no coincidence.
BITS = 14.0
#: What of an entry's variance may be noise, or rounding in half precision, where it is the task at another scale.
_UNLIKE = 1e-5


def drawn(distribution: TaskDistribution, size: torch.Size, seed: int, times: int) -> Tensor:
    """``times`` draws of ``size`` tasks by a copy of ``distribution``, ``[times, N, n]``; one with a state goes on from it."""
    distribution, generator = copy.deepcopy(distribution), torch.Generator().manual_seed(seed)
    return torch.stack([rows_of_task(distribution(size, generator), size) for _ in range(times)])


def rows_of_task(task: Tensor | TensorDictBase, size: torch.Size) -> Tensor:
    """``task`` ``[*size, ...]``, nested or not, as ``[N, n]``."""
    return flat(task, len(size)).reshape(size.numel(), -1)


def bits_of(tasks: Tensor, known: Tensor) -> float:
    """How much it says, in coin tosses, that ``tasks`` ``[K, n]`` are drawn again, by how often each is among ``known``."""
    _, kind, counts = torch.cat([tasks, known]).unique(dim=0, return_inverse=True, return_counts=True)
    return -(counts[kind[: len(tasks)]] / len(kind)).log2().sum().item()


def shown(entry: Tensor, task: Tensor, starts: Tensor) -> dict[int, str]:
    """Numbers of ``task`` ``[R, T, m]`` that ``entry`` ``[R, T, n]`` shows at all steps, each with the column in words.

    ``starts``, bool ``[R, T]``: where tasks are drawn. Any two points lie on a line.
    """
    draws, found = task[starts].double(), {}
    for column, number in _on_a_line(entry[starts], draws).nonzero().tolist():
        one, other = entry[..., column].reshape(-1, 1), task[..., number].reshape(-1, 1)
        if torch.equal(one.float(), other.float()):
            found[number] = f"[{column}]"
        elif (len(draws) - 2) * math.log2(len(draws[:, number].unique())) >= BITS and _on_a_line(one, other).item():
            found.setdefault(number, f"[{column}], at another scale")
    return found


def _on_a_line(one: Tensor, other: Tensor) -> Tensor:
    """Which columns of ``one`` ``[S, n]`` are ``a * x + b`` of those of ``other`` ``[S, m]``, and vary; bool ``[n, m]``."""
    one, other = (
        (x := each.double() - each.double().mean(0)) / x.norm(dim=0).clamp_min(1e-30) for each in (one, other)
    )
    return 1 - (one.T @ other).square() < _UNLIKE
