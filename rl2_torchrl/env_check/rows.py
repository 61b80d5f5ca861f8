"""Rules on rows: each draws its own numbers, a seed repeats them, and a row goes on where others begin."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from torch import Tensor

from rl2_torchrl.env_check.outcomes import ENOUGH, Outcome, differ, same
from rl2_torchrl.env_check.playing import RUN_STEPS, EnvBelow
from rl2_torchrl.env_check.shown import BITS, bits_of

__all__ = ["RULES"]

#: Resets of which rows are compared; and those of some rows, after so many steps at most. Few enough for a simulator.
_RESETS, _PARTIAL_RESETS, _STEPS_BEFORE = 16, 24, 3


def rows_draw_apart(below: EnvBelow) -> str | None:
    """Rows of one task and one action: where an env draws at random, two rows hardly ever draw the same each time."""
    if below.num_rows < 2:
        return None
    batch_size = below.env.batch_size
    task = None if below.tasks[0] is None else _first_in_all_rows(below.tasks[0], batch_size)
    action, drawn = _first_in_all_rows(below.actions[0], batch_size), []
    for _ in range(_RESETS):
        tensordict = below.start(task)
        drawn.append(torch.cat([below.outcome(tensordict), below.step(tensordict, action)[0]], 1))
    by_row = torch.stack(drawn, 1).nan_to_num()  # [num_rows, _RESETS, n]
    alike = (by_row[1:] == by_row[0]).flatten(1).all(1).nonzero().flatten().tolist()
    if alike and bits_of(by_row[0], by_row[0]) >= BITS + math.log2(below.num_rows):  # any of them may by chance
        return f"in {_RESETS} episodes rows 0 and {1 + alike[0]} drew the same random numbers"


def _first_in_all_rows(value: Tensor | TensorDictBase, batch_size: torch.Size):
    return value.flatten(0, len(batch_size) - 1)[0].expand(*batch_size, *value.shape[len(batch_size) :]).clone()


def seed_repeats(below: EnvBelow) -> str | None:
    """A seed repeats a run."""
    runs, task = [], below.tasks[0]
    below.start(task)  # both runs have the same task behind them: one that is heard late is told as such
    for _ in range(2):
        below.seed()
        runs.append(below.outcomes(below.start(task), task, below.actions[:RUN_STEPS]))
    for number, (one, other) in enumerate(zip(*runs, strict=True)):
        if not same(one, other):
            return f"two runs of one seed, task and sequence of actions differ after {number} steps"


def rows_go_on(below: EnvBelow) -> str | None:
    """A row in mid-episode remembers what was done in it where others begin.

    What two sequences of actions have led to is compared one step on, with and without a reset of other rows before it. Only
    that is looked at, and not whether the row went on as without the reset, which may have used up random numbers of the row's.
    """
    going_on = ~below.half().reshape(-1).cpu()
    alone = 0
    for seed in range(_PARTIAL_RESETS):
        steps = 1 + seed % _STEPS_BEFORE
        pasts = [below.actions[first : first + steps] for first in (seed, _PARTIAL_RESETS + seed)]
        runs = [[_one_step_on(below, seed, past, others_begin) for past in pasts] for others_begin in (False, True)]
        if any(outcome is None for run in runs for outcome in run):
            continue
        unlike, unlike_beside = (differ([one], [other]) & going_on for one, other in runs)
        if unlike_beside.any():
            return None
        alone += int(unlike.sum())
    if alone >= ENOUGH:
        return "rows in mid-episode forgot what had been done in them where every other row began anew"


def _one_step_on(below: EnvBelow, seed: int, past: Sequence[Tensor], others_begin: bool) -> Outcome | None:
    """A step after the actions ``past`` and, maybe, a reset of every other row; None where an episode ended before."""
    task = below.tasks[seed % len(below.tasks)]
    below.seed(seed)
    tensordict = below.start(task)
    for _, after, ended in below.run(tensordict, task, past):
        if ended.any():  # from here on rows may draw in another order
            return None
        tensordict = after
    if others_begin:
        tensordict = below.begin(tensordict, below.half(), task, task)
    return below.step(tensordict, below.actions[-1])[0]


RULES = (rows_draw_apart, seed_repeats, rows_go_on)
