"""Numbers of steps as tables ``[num_trials, num_episodes]``: whose step each is (`Trials`), and what they make (`EpisodeTable`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from tensordict import NestedKey
from torch import nn

from rl2_torchrl.trial import EPISODE_INDEX

__all__ = ["EpisodeTable", "Measure", "Trials"]

#: How the numbers of an episode's steps become the episode's.
Measure = Literal["max", "sum", "mean", "last"]


class Trials:
    """Of which trial, and of which episode in it, each step is; those beyond the first ``num_trials`` trials are left out.

    Attributes:
        finished: how many episodes each trial has finished, ``[num_trials]`` int64, once it has ended.
    """

    def __init__(self, num_trials: int):
        self.number, self.finished = num_trials, torch.zeros(num_trials, dtype=torch.int64)
        self._unfinished = torch.ones(num_trials, dtype=torch.bool)
        self._begun, self._trial = 0, None

    @property
    def open(self) -> bool:
        """Whether a trial has not ended yet."""
        return bool(self._unfinished.any())

    def add(self, steps: Mapping[NestedKey, torch.Tensor]) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
        """Trial and episode of each step of a batch that counts, and which do: numbers of steps in ``[num_rows, T]``, flattened."""
        trial, episode = self._trials(steps["is_init"]), steps[EPISODE_INDEX]
        is_counted = trial < self.number
        for key, numbers in steps.items():
            _require_finite(key, torch.where(is_counted, numbers, 0), trial, episode)
        ends = is_counted & steps["next", "done"]
        self._unfinished[trial[ends]], self.finished[trial[ends]] = False, steps["next", EPISODE_INDEX][ends]
        # Numbers, for all entries: by flags PyTorch would look for them anew in each, and take five times as long.
        counted = is_counted.flatten().nonzero().squeeze(-1)
        return tuple(entry.flatten().index_select(0, counted) for entry in (trial, episode)), counted

    def _trials(self, is_init: torch.Tensor) -> torch.Tensor:
        """Which trial each step ``[num_rows, T]`` is of, counted in the order in which trials begin."""
        number = self._begun - 1 + is_init.t().flatten().cumsum(0).view(is_init.shape[1], -1).t()
        self._begun += int(is_init.sum())
        trial = torch.where(is_init, number, -1)
        if self._trial is not None:
            trial[:, 0] = torch.where(is_init[:, 0], trial[:, 0], self._trial)
        trial = trial.cummax(1).values
        self._trial = trial[:, -1]
        return trial


class EpisodeTable:
    """A number of each episode, made of those of its steps."""

    def __init__(self, how: Measure):
        self.how = how
        # In float64: returns of long episodes lose digits in float32.
        self._numbers, self._steps = (torch.zeros(0, 0, dtype=torch.float64) for _ in range(2))

    def add(self, index: tuple[torch.Tensor, torch.Tensor], values: torch.Tensor) -> None:
        """Adds the ``values`` ``[n]`` of steps, in the order in which they were played, of the trials and episodes ``index``."""
        if not len(values):
            return
        missing = [max(0, int(at.max()) + 1 - size) for at, size in zip(index, self._numbers.shape, strict=True)]
        padding = (0, missing[1], 0, missing[0])
        self._numbers, self._steps = (nn.functional.pad(t, padding) for t in (self._numbers, self._steps))
        numbers, steps, values = self._numbers.view(-1), self._steps.view(-1), values.double()
        at = index[0] * self._steps.shape[1] + index[1]
        if self.how == "max":
            highest = torch.full_like(numbers, -torch.inf).scatter_reduce_(0, at, values, "amax")
            numbers.copy_(torch.where(steps > 0, numbers.maximum(highest), highest))
        elif self.how == "last":
            last = torch.full(numbers.shape, -1).scatter_reduce_(0, at, torch.arange(len(at)), "amax")
            numbers[last >= 0] = values[last[last >= 0]]
        else:
            numbers.index_add_(0, at, values)
        steps.index_add_(0, at, torch.ones_like(values))

    def table(self, episodes: int = 0) -> torch.Tensor:
        """The table ``[num_trials, num_episodes]``, at least ``episodes``; NaN where a trial had no such episode."""
        return self._of_played(self._numbers / self._steps if self.how == "mean" else self._numbers, episodes)

    def counts(self, episodes: int = 0) -> torch.Tensor:
        """How many steps each episode took, as `table`."""
        return self._of_played(self._steps, episodes)

    def _of_played(self, numbers: torch.Tensor, episodes: int) -> torch.Tensor:
        is_played = self._steps > 0
        played = torch.where(is_played, numbers, torch.nan)[:, is_played.any(0)]
        return nn.functional.pad(played, (0, max(0, episodes - played.shape[1])), value=torch.nan)


def _require_finite(key: NestedKey, numbers: torch.Tensor, trial: torch.Tensor, episode: torch.Tensor) -> None:
    if not numbers.isfinite().all():
        row, step = (~numbers.isfinite()).nonzero()[0].tolist()
        raise FloatingPointError(
            f"the {key[-1]} is {numbers[row, step].item()} in row {row}, episode {int(episode[row, step])} of trial "
            f"{int(trial[row, step])}: no mean could be taken of it. Mend the env before evaluating on it."
        )
