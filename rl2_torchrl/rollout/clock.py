"""`TrialClock`: where every row stands in its trial, counted on the host."""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import torch
from tensordict import NestedKey

from rl2_torchrl.trial import EPISODE_DONE, TRIAL_KEYS, Trial

__all__ = ["Ends", "Rows", "TrialClock"]

#: Some rows of a batch: True is all of them, False none, otherwise a mask ``[N]``.
Rows = bool | torch.Tensor


class Ends(NamedTuple):
    """Which rows a step has ended: an episode inside a trial, which the next episode follows; a trial; either."""

    inner: Rows
    trial: Rows
    episode: Rows


class TrialClock:
    """Counts the episodes and steps of N trials, and says when they end, by the bounds of `Trial`.

    Where no row can part from the others (all begin together, and ``episode_steps`` is the length of every episode) it is shared:
    one count serves all rows, a batch is counted ahead, and nothing is read back from a device.
    """

    #: Entries that a clock gives.
    names = ("is_init", "done", "terminated", "truncated", *TRIAL_KEYS)

    def __init__(self, trial: Trial, rows: int, steps: int, episode_steps: int | None, device: torch.device):
        self.trial, self.rows, self.steps, self.episode_steps, self.device = trial, rows, steps, episode_steps, device
        self.is_shared = episode_steps is not None
        # In row t + 1: episodes and steps of the trial after step t, and whether this has ended the trial, and an episode; in
        # row 0 where the last batch has ended. NumPy's calls on a few numbers cost a third of PyTorch's.
        shape = (steps + 1, 1 if self.is_shared else rows)
        self._arrays = [torch.zeros(shape, dtype=dtype) for dtype in (torch.int64, torch.int64, torch.bool, torch.bool)]
        self._numbers = [array.numpy() for array in self._arrays]
        self._plan: list[Ends] = []  # of a shared clock: of the batches that begin at `_planned`
        self._entries: dict[NestedKey, torch.Tensor] = {}
        self.restart()

    def restart(self) -> None:
        """The next batch begins with new trials in all rows."""
        self.load_state_dict({"counts": torch.tensor([0, 0, 1, 0]), "episode_step": 0})

    def start_batch(self) -> None:
        """Goes on where the last batch ended."""
        if self.is_shared:
            position = self._episode_step, *(int(array[-1, 0]) for array in self._numbers)
            if position == self._planned:
                return  # all is as it was in the last batch
            self._planned = position
        for array in self._numbers:
            array[0] = array[-1]
        if self.is_shared:
            self._plan = [self._count(t, None) for t in range(self.steps)]
            for key, value in self._made(slice(0, -1), slice(1, None)).items():
                self._entries.setdefault(key, value).copy_(value)  # in the memory that a CUDA graph knows

    def tick(self, t: int, done: torch.Tensor | None) -> Ends:
        """Counts step ``t``, at which the episodes of the rows ``done`` (bool ``[N]``) end; None with a shared clock."""
        return self._plan[t] if self.is_shared else self._count(t, done.cpu().numpy())

    @property
    def begins(self) -> Rows:
        """The rows in which the batch's first step begins a trial."""
        return self._rows(self._numbers[2][0])

    @property
    def trials_begun(self) -> int:
        """How many times all rows of a shared clock begin a trial within a batch, after its first step."""
        return sum(ends.trial is True for ends in self._plan[:-1])

    def _count(self, t: int, done: np.ndarray | None) -> Ends:
        index, step, over, ended = self._numbers
        if done is None:
            self._episode_step += 1
            done = self._episode_step == self.episode_steps
        goes_on = ~over[t]
        index[t + 1], step[t + 1], ended[t + 1] = index[t] * goes_on + done, step[t] * goes_on + 1, done
        over[t + 1] = self.trial.is_over(index[t + 1], step[t + 1])
        trial, episode = over[t + 1], ended[t + 1]
        if not (trial.any() or episode.any()):
            return Ends(False, False, False)
        self._episode_step = 0
        return Ends(*map(self._rows, (episode & ~trial, trial, episode)))

    def _rows(self, mask: np.ndarray) -> Rows:
        if not mask.any():
            return False
        return True if mask.all() else torch.from_numpy(mask).to(self.device)

    def entries(self) -> dict[NestedKey, torch.Tensor]:
        """Flags and counters ``[N, T, 1]`` of the batch that has been played, before its steps and, under ``"next"``, after."""
        return self._entries if self.is_shared else self._made(slice(0, -1), slice(1, None))

    def at(self, t: int, keys: Collection[NestedKey] | None = None) -> dict[NestedKey, torch.Tensor]:
        """Those of `entries` for step ``t``, ``[N, 1]``: some ``keys`` before it is taken, or all when it has been."""
        if self.is_shared:
            return {key: self._entries[key][:, t] for key in (self._entries if keys is None else keys)}
        if keys is None:
            return self._made(t, t + 1)
        before = self._before(t)
        return self._shown({key: before[key] for key in keys})

    def _made(self, before: int | slice, after: int | slice) -> dict[NestedKey, torch.Tensor]:
        return self._shown({**self._before(before), **{("next", k): v for k, v in self._after(after).items()}})

    def _before(self, at: int | slice) -> dict[str, torch.Tensor]:
        index, step, over, ended = (array[at] for array in self._arrays)
        goes_on, never = ~over, torch.zeros_like(over)
        flags = {"is_init": over, "done": never, "terminated": never, "truncated": never, EPISODE_DONE: ended & goes_on}
        return {**flags, **self.trial.counters(index * goes_on, step * goes_on)}

    def _after(self, at: int | slice) -> dict[str, torch.Tensor]:
        index, step, over, ended = (array[at] for array in self._arrays)
        never = torch.zeros_like(over)
        terminated, truncated = (never, over) if self.trial.truncate else (over, never)
        flags = {"is_init": never, "done": over, "terminated": terminated, "truncated": truncated, EPISODE_DONE: ended}
        return {**flags, **self.trial.counters(index, step)}

    def _shown(self, made: dict[NestedKey, torch.Tensor]) -> dict[NestedKey, torch.Tensor]:
        made = {key: value.to(self.device).t().unsqueeze(-1) for key, value in made.items()}
        return {key: value.expand(self.rows, *value.shape[1:]).contiguous() for key, value in made.items()}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Where the rows stand after the last batch."""
        counts = torch.stack([array[-1].long() for array in self._arrays])
        return {"counts": counts, "episode_step": torch.tensor(self._episode_step)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Goes on from what `state_dict` returned."""
        for array, counts in zip(self._arrays, state["counts"], strict=True):
            array[-1] = counts
        # The last batch's plan no longer leads to where its last row stands.
        self._episode_step, self._planned = int(state["episode_step"]), None
