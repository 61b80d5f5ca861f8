"""`TrialClock`: where every row stands in its trial, counted on the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import NestedKey

from rl2_torchrl.trial import TRIAL_KEYS, Trial

__all__ = ["Ends", "Rows", "TrialClock"]

#: Some rows of a batch: True is all of them, False none, otherwise a mask ``[N]``.
Rows = bool | torch.Tensor
#: Which rows a step has ended: an episode that is not a trial's last; a trial; any episode.
Ends = tuple[Rows, Rows, Rows]


class TrialClock:
    """Counts the episodes and steps of N trials, and says when they end, by the bounds of `Trial`.

    Where no row can part from the others (all begin together, and ``episode_steps`` is the length of every episode) it is shared:
    one count serves all rows, a batch is counted ahead, and nothing is read back from a device.
    """

    #: Flags and counters before each step and, under ``"next"``, after it. A clock gives those that are ``wanted``.
    names = ("is_init", "done", "terminated", "truncated", *TRIAL_KEYS)
    next_names = tuple(("next", name) for name in names)

    def __init__(
        self, trial: Trial, rows: int, steps: int, episode_steps: int | None, device: torch.device, wanted: set
    ):
        self.trial, self.rows, self.steps, self.episode_steps, self.device = trial, rows, steps, episode_steps, device
        self.is_shared, self._wanted = episode_steps is not None, wanted
        # Before each step and after the last: episodes and steps of the trial, and whether the step before has ended it, and an
        # episode. Numbers for all rows with a shared clock, else NumPy's arrays [N], whose calls cost a third of PyTorch's.
        self._counts: list[tuple[Any, Any, Any, Any]] = []
        self._plan: list[Ends] = []  # of a shared clock
        #: Whether all that begins and ends in the batch of a shared clock does so as in the last one.
        self.is_as_before = True
        # Of a shared clock's batch: what is shown, the same as it was counted, and where it began, from which all follows.
        self._entries: dict[NestedKey, torch.Tensor] = {}
        self._counted: dict[NestedKey, torch.Tensor] = {}
        self._began_at: tuple | None = None
        self.restart()

    def restart(self) -> None:
        """The next batch begins with new trials in all rows."""
        self.load_state_dict({"counts": torch.tensor([[0], [0], [1], [0]]).repeat(1, self.rows)})

    def start_batch(self, episode_steps: int | None) -> None:
        """Goes on where the last batch ended; with a shared clock ``episode_steps`` are those of episodes from now on."""
        if not self.is_shared:
            self._counts = self._counts[-1:]
            return
        bounds = (self.trial.episodes, self.trial.steps, self.trial.truncate, episode_steps)
        begins_at = (self._counts[-1], self._episode_step, bounds)
        self.is_as_before = begins_at == self._began_at
        if not self.is_as_before:
            self._counts, self.episode_steps, self._began_at = self._counts[-1:], episode_steps, begins_at
            before, self._plan = self._plan, [self._count(None) for _ in range(self.steps)]
            self.is_as_before, self._counted = before in ([], self._plan), self._made(0, self.steps)
        # In the memory that a CUDA graph knows, whatever others have written there.
        for key, value in self._counted.items():
            self._entries.setdefault(key, value.clone()).copy_(value)

    def tick(self, t: int, done: np.ndarray | None) -> Ends:
        """Counts step ``t``, at which the episodes of the rows ``done`` (bool ``[N]``) end; None with a shared clock."""
        # A copy: an env may write its next flags into the same memory.
        return self._plan[t] if self.is_shared else self._count(done.copy())

    @property
    def begins(self) -> Rows:
        """The rows in which the batch's first step begins a trial."""
        return self._rows(self._counts[0][2])

    @property
    def trials_begun(self) -> int:
        """How many times all rows of a shared clock begin a trial within a batch, after its first step."""
        return sum(trial is True for _, trial, _ in self._plan[:-1])

    def _count(self, done: Any) -> Ends:
        index, step, over, ended = self._counts[-1]
        if self._begun is not False:
            index, step = index * (1 - over), step * (1 - over)
        if self.is_shared:
            self._episode_step = 1 if over or ended else self._episode_step + 1
            done = self._episode_step >= self.episode_steps
        index, step = index + done, step + 1
        over = self.trial.is_over(index, step)
        self._counts.append((index, step, over, done))
        ended, self._begun = self._rows(done), self._rows(over)
        return (ended if self._begun is False else self._rows(done > over)), self._begun, ended

    def _rows(self, mask: Any) -> Rows:
        if isinstance(mask, bool):
            return mask
        if (count := np.count_nonzero(mask)) in (0, self.rows):
            return bool(count)
        return torch.from_numpy(mask).to(self.device)

    def entries(self) -> dict[NestedKey, torch.Tensor]:
        """Flags and counters ``[N, T, 1]`` of the batch that has been played."""
        return self._entries if self.is_shared else self._made(0, self.steps)

    def at(self, t: int) -> dict[NestedKey, torch.Tensor]:
        """Those of `entries` for step ``t``, ``[N, 1]``; before it has been taken perhaps without those under ``"next"``."""
        made, column = (self._entries, t) if self.is_shared else (self._made(t, t + 1), 0)
        return {key: value[:, column] for key, value in made.items()}

    def _made(self, start: int, end: int) -> dict[NestedKey, torch.Tensor]:
        made = {**self._named(self._counts[start:end], False), **self._named(self._counts[start + 1 : end + 1], True)}
        # Copies, since what others do to a batch must not reach the counts.
        shown = {key: value.to(self.device).t().unsqueeze(-1).expand(self.rows, -1, 1) for key, value in made.items()}
        return {key: value.clone(memory_format=torch.contiguous_format) for key, value in shown.items()}

    def _named(self, counts: list[tuple], is_after: bool) -> dict[NestedKey, torch.Tensor]:
        keys = self.next_names if is_after else self.names
        if not counts or self._wanted.isdisjoint(keys):
            return {}
        arrays = map(np.array, zip(*counts, strict=True))
        index, step, over, ended = (torch.from_numpy(array).view(len(counts), -1) for array in arrays)
        begun = never = torch.zeros_like(over)
        if not is_after:  # a trial that has ended is followed by one that begins
            goes_on = ~over
            index, step, ended, begun, over = index * goes_on, step * goes_on, ended & goes_on, over, never
        terminated, truncated = (never, over) if self.trial.truncate else (over, never)
        values = (begun, over, terminated, truncated, ended, *self.trial.counters(index, step).values())
        return {key: value for key, value in zip(keys, values, strict=True) if key in self._wanted}

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Where the rows stand after the last batch."""
        return {"counts": torch.from_numpy(np.array(self._counts[-1], dtype=np.int64)).view(4, -1)}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Goes on from what `state_dict` returned."""
        counts = state["counts"][:, 0].tolist() if self.is_shared else state["counts"].numpy()
        self._counts = [(counts[0], counts[1], counts[2] > 0, counts[3] > 0)]
        self._begun = self._rows(self._counts[0][2])
        self._episode_step, self._began_at = counts[1] % self.episode_steps if self.is_shared else None, None
