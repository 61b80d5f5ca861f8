"""`TrialClock`: where every row stands in its trial, counted on the host."""

from __future__ import annotations

from typing import NamedTuple

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

    Where no row can part from the others (all begin together, and ``episode_steps`` is known) one count serves all rows, and
    nothing is read back from a device.

    Args:
        trial: the bounds.
        rows: N.
        steps: steps T of a batch.
        episode_steps: length of every episode, where all have the same; None where the env says when one ends.
        device: of the entries.
    """

    def __init__(self, trial: Trial, rows: int, steps: int, episode_steps: int | None, device: torch.device):
        self.trial, self.rows, self.steps, self.episode_steps, self.device = trial, rows, steps, episode_steps, device
        width = 1 if self.is_shared else rows
        # What holds at step t, before it is taken, and one row more: where the next batch goes on.
        self._index, self._step = (torch.zeros(steps + 1, width, dtype=torch.int64) for _ in range(2))
        self._begun, self._ended = (torch.zeros(steps + 1, width, dtype=torch.bool) for _ in range(2))
        # What step t does: ends an episode, ends a trial.
        self._episode_done, self._trial_done = (torch.zeros(steps, width, dtype=torch.bool) for _ in range(2))
        self._carried = (self._index, self._step, self._begun, self._ended)
        # The same memory for NumPy, whose calls on a few numbers cost a third of PyTorch's.
        self._arrays = [array.numpy() for array in (*self._carried, self._episode_done, self._trial_done)]
        self._start: tuple[int, ...] | None = None
        self.restart()
        self._plan: list[Ends] = []  # with a shared clock: of the batches that begin at `_start`
        self._entries: dict[NestedKey, torch.Tensor] | None = None

    def restart(self) -> None:
        """The next batch begins with new trials in all rows."""
        for array in self._carried:
            array[-1] = 0
        self._begun[-1] = True
        self._episode_step, self._start = 0, None  # the last batch's plan no longer leads to where its last row stands

    @property
    def names(self) -> tuple[str, ...]:
        """Entries that a clock gives."""
        return ("is_init", "done", "terminated", "truncated", *TRIAL_KEYS)

    @property
    def is_shared(self) -> bool:
        """Whether all rows have one count."""
        return self.episode_steps is not None

    @property
    def position(self) -> tuple[int, ...]:
        """Where a batch of a shared clock begins; batches that begin at the same place have the same entries."""
        return self._episode_step, *(int(array[-1, 0]) for array in self._carried)

    def start_batch(self) -> None:
        """Goes on where the last batch ended."""
        if self.is_shared and self.position == self._start:
            return  # all is as it was in the last batch
        self._start, self._entries = self.position, None
        for array in self._carried:
            array[0] = array[-1]
        if self.is_shared:
            self._plan = [self._count(t, None) for t in range(self.steps)]

    def tick(self, t: int, done: torch.Tensor | None) -> Ends:
        """Counts step ``t``, at which the episodes of the rows ``done`` (bool ``[N]``) end; None with a shared clock."""
        return self._plan[t] if self.is_shared else self._count(t, done)

    @property
    def trials_begun(self) -> int:
        """How many times all rows of a shared clock begin a trial within a batch, after its first step."""
        return sum(ends.trial is True for ends in self._plan[:-1])

    def _count(self, t: int, done: torch.Tensor | None) -> Ends:
        index, step, begun, ended, episode_done, trial_done = self._arrays
        over, trial = trial_done[t], self.trial
        if self.is_shared:
            self._episode_step += 1
            episode_done[t] = self._episode_step == self.episode_steps
        else:
            episode_done[t] = done.cpu().numpy()
        index[t + 1] = index[t] + episode_done[t]
        step[t + 1] = step[t] + 1
        over[:] = False if trial.episodes is None else index[t + 1] >= trial.episodes
        if trial.steps is not None:
            over |= step[t + 1] >= trial.steps
        begun[t + 1], ended[t + 1] = over, episode_done[t] & ~over
        if over.any():
            index[t + 1][over] = 0
            step[t + 1][over] = 0
        elif not ended[t + 1].any():
            return Ends(False, False, False)
        self._episode_step *= not self.is_shared or not (episode_done[t, 0] or over[0])
        return Ends(*map(self._rows, (self._ended[t + 1], self._trial_done[t], self._episode_done[t])))

    def _rows(self, mask: torch.Tensor) -> Rows:
        if not mask.any():
            return False
        return True if mask.all() else mask.to(self.device)

    # ---------------------------------------------------------------- entries
    def at(self, t: int) -> dict[NestedKey, torch.Tensor]:
        """Flags and counters ``[N, 1]`` of step ``t``, before it is taken."""
        entries = self._entries_before(self._index[t], self._step[t], self._begun[t], self._ended[t])
        return {key: value.to(self.device).expand(self.rows).unsqueeze(-1) for key, value in entries.items()}

    def around(self, t: int) -> dict[NestedKey, torch.Tensor]:
        """Flags and counters ``[N, 1]`` of step ``t``, before it is taken and, under ``"next"``, after it."""
        after = {("next", key): value[t] for key, value in self._entries_after().items()}
        return self.at(t) | {key: value.to(self.device).expand(self.rows).unsqueeze(-1) for key, value in after.items()}

    def entries(self) -> dict[NestedKey, torch.Tensor]:
        """Flags and counters ``[N, T, 1]`` of the batch that has been played, those under ``"next"`` among them."""
        if self.is_shared and self._entries is not None:
            return self._entries
        before = self._entries_before(*(array[:-1] for array in self._carried))
        after = self._entries_after()
        named = {**before, **{("next", key): value for key, value in after.items()}}
        shape = (self.rows, self.steps, 1)
        self._entries = {k: v.to(self.device).t().unsqueeze(-1).expand(shape).contiguous() for k, v in named.items()}
        return self._entries

    def _entries_before(self, index, step, begun, ended) -> dict[str, torch.Tensor]:
        never = torch.zeros_like(begun)
        flags = {"is_init": begun, "done": never, "terminated": never, "truncated": never, EPISODE_DONE: ended}
        return {**flags, **self.trial.counters(index, step)}

    def _entries_after(self) -> dict[str, torch.Tensor]:
        done, never = self._trial_done, torch.zeros_like(self._trial_done)
        terminated, truncated = (never, done) if self.trial.truncate else (done, never)
        flags = {"is_init": never, "done": done, "terminated": terminated, "truncated": truncated}
        flags[EPISODE_DONE] = self._episode_done
        return {**flags, **self.trial.counters(self._index[:-1] + self._episode_done, self._step[:-1] + 1)}

    # ------------------------------------------------------------ checkpoints
    def state_dict(self) -> dict[str, torch.Tensor]:
        """Where the rows stand after the last batch."""
        counts = torch.stack([array[-1].long() for array in self._carried])
        return {"counts": counts, "episode_step": torch.tensor(self._episode_step)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Goes on from what `state_dict` returned."""
        for array, counts in zip(self._carried, state["counts"], strict=True):
            array[-1] = counts
        self._episode_step, self._start = int(state["episode_step"]), None
