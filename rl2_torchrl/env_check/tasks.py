"""Rules on tasks: a row plays the one that it was given, no other row's, and that one until its trial ends."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rl2_torchrl.env_check.outcomes import ENOUGH, Outcome, differ, unequal
from rl2_torchrl.env_check.playing import RUN_STEPS, EnvBelow, Task
from rl2_torchrl.env_check.shown import rows_of_task
from rl2_torchrl.envs.rows import merge

__all__ = ["RULES"]


def task_heard(below: EnvBelow) -> str | None:
    """The task reaches the env."""
    if below.tasks[0] is None:
        return None
    return _read_back(below) if below.task_of is not None else _seen(below)


def _read_back(below: EnvBelow) -> str | None:
    half = below.half()
    for task, other in pairwise(below.tasks):
        tensordict = below.start(task)
        seen = _unlike(below, "a reset", task)
        mixed = merge(half.reshape(below.env.batch_size), other, task)
        below.begin(tensordict, half, mixed, below.as_drawn(half, mixed))
        seen = seen or _unlike(below, "a reset of some rows", mixed)
        if seen is not None:
            return seen


def _unlike(below: EnvBelow, what: str, task: Task) -> str | None:
    found, expected = (rows_of_task(each, below.env.batch_size).float() for each in (below.task_of(below.env), task))
    if not torch.equal(found, expected):
        row = (found != expected).any(1).nonzero()[0].item()
        return f"after {what} row {row} has the task {found[row].tolist()}, not {expected[row].tolist()}"


def _seen(below: EnvBelow) -> str | None:
    """Whether another task shows in what follows: in episodes from the start, and in those that begin in some rows."""
    half = below.half().reshape(-1).cpu()
    unlike = torch.stack([pair.unlike for pair in below.pairs])  # [num_pairs, num_rows]
    heard = torch.stack([differ(pair.task, pair.other) for pair in below.pairs])
    later = torch.stack([differ(pair.same_later, pair.other_later) for pair in below.pairs])
    if unlike.any() and not heard.any():
        return f"{len(below.tasks)} tasks made no difference to anything in {RUN_STEPS} steps of random actions"
    if (heard & half).sum() >= ENOUGH and not (later & half).any():
        return "another task given at a reset of some rows made no difference, though it did at a reset of all"
    deaf = unlike.any(0) & ~heard.any(0)
    if deaf.any() and (heard == unlike)[:, ~deaf].all():  # all others hear each
        return (
            f"another task made no difference in the rows {deaf.nonzero().flatten().tolist()}, though it did in others"
        )


def task_own(below: EnvBelow) -> str | None:
    """Rows follow from their own tasks, whatever the others were given, or they themselves before."""
    for pair in below.pairs:
        for rows, run in ((pair.changed, pair.other), (~pair.changed, pair.task)):
            if (seen := _parted(below, run, pair.mixed, rows)) is not None:
                return f"twice given the same task, seed and actions, row {seen} played something else when others were not"


def task_kept(below: EnvBelow) -> str | None:
    """Rows that go on are not touched by the tasks that a reset of others brings."""
    going_on = ~below.half().reshape(-1).cpu()
    for pair in below.pairs:
        if (seen := _parted(below, pair.same_later, pair.other_later, going_on)) is not None:
            return (
                f"row {seen} went another way in the middle of an episode, since other rows had begun with another task"
            )


def _parted(below: EnvBelow, run: Sequence[Outcome], other: Sequence[Outcome], rows: Tensor) -> int | None:
    """The first of ``rows`` in which two runs differ before an episode ends, after which rows may draw in another order."""
    for one, another in zip(run, other, strict=False):
        parted = unequal(one[:, : below.step_size], another[:, : below.step_size]).any(1) & rows
        if parted.any():
            return int(parted.nonzero()[0])
        if one[:, 0].any() or another[:, 0].any():
            return None


RULES = (task_heard, task_own, task_kept)
