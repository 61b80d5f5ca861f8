"""`TrialClock`: where every row stands in its trial, counted on the host."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from tensordict import NestedKey

from rl2_torchrl.trial import EPISODE_DONE, TRIAL_KEYS, Trial

__all__ = ["Ends", "Rows", "TrialClock"]

#: Some rows of a batch: True is all of them, False none, otherwise a mask ``[N]``.
Rows = bool | torch.Tensor
#: Which rows a step has ended: an episode inside a trial, which the next episode follows; a trial; either.
Ends = tuple[Rows, Rows, Rows]


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
        position = self._episode_step, *(int(array[-1, 0]) for array in self._numbers)
        if self.is_shared and position == self._planned:
            return  # all is as it was in the last batch
        for array in self._numbers:
            array[0] = array[-1]
        if self.is_shared:
            self._planned = position
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
        return sum(trial is True for _, trial, _ in self._plan[:-1])

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
            return False, False, False
        self._episode_step = 0
        return self._rows(episode & ~trial), self._rows(trial), self._rows(episode)

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
            return {key: self._entries[key][:, t] for key in keys or self._entries}
        return self._made(t, t + 1) if keys is None else self._shown(self._named(t, False), keys)

    def _made(self, before: int | slice, after: int | slice) -> dict[NestedKey, torch.Tensor]:
        named = {("next", key): value for key, value in self._named(after, True).items()}
        return self._shown({**self._named(before, False), **named})

    def _named(self, at: int | slice, is_after: bool) -> dict[str, torch.Tensor]:
        index, step, over, ended = (array[at] for array in self._arrays)
        begun = never = torch.zeros_like(over)
        if not is_after:  # a trial that has ended is followed by one that begins
            goes_on = ~over
            index, step, ended, begun, over = index * goes_on, step * goes_on, ended & goes_on, over, never
        terminated, truncated = (never, over) if self.trial.truncate else (over, never)
        flags = {"is_init": begun, "done": over, "terminated": terminated, "truncated": truncated, EPISODE_DONE: ended}
        return {**flags, **self.trial.counters(index, step)}

    def _shown(self, named, keys: Collection[NestedKey] | None = None) -> dict[NestedKey, torch.Tensor]:
        shown = {key: named[key].to(self.device).t().unsqueeze(-1) for key in keys or named}
        # Copies, since what others do to a batch must not reach the counts.
        form = torch.contiguous_format
        return {k: v.expand(self.rows, *v.shape[1:]).clone(memory_format=form) for k, v in shown.items()}

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
