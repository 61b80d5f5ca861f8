"""`TransitionInputs`: the transition inputs of a batch, as `PreviousStep` makes them, written in place."""

from __future__ import annotations

import torch

from rl2_torchrl.modules.acting import State
from rl2_torchrl.rollout.clock import Rows
from rl2_torchrl.transition import PreviousStep

__all__ = ["TransitionInputs"]


class TransitionInputs:
    """The inputs ``[T + 1, N, size]`` of T steps, and of the step that the next batch begins with."""

    def __init__(self, transition: PreviousStep, steps: int, rows: int, device: torch.device):
        self._layout, self._done_at_start = transition.layout(), transition.done_at_start
        self.data = torch.zeros(steps + 1, rows, self._layout.size, device=device)
        # Views of all steps at once: an index in each step costs as much as the copy.
        self.steps = self.data.unbind()
        *parts, self._actions, self._rewards, self._dones = (part.unbind() for part in self._layout.split(self.data))
        self._observations = list(zip(self._layout.observations.items(), parts, strict=True))

    def start_batch(self) -> None:
        """The last batch's last row becomes the first; all others are empty."""
        self.data[0].copy_(self.data[-1])
        self.data[1:].zero_()

    def follow(self, t: int, action: torch.Tensor, reward: torch.Tensor, done: Rows, observations: State) -> None:
        """Writes step ``t``: what it sees, and action ``[N, ...]``, reward ``[N, 1]`` and episode's end of the step before."""
        self._layout.action.write(self._actions[t], action)
        self._rewards[t].copy_(reward)
        if done is True:
            self._dones[t].fill_(1.0)
        elif done is not False:
            self._dones[t].copy_(done.unsqueeze(-1))
        self._observe(t, observations)

    def begin(self, t: int, rows: Rows, observations: State) -> None:
        """Step ``t`` is the first of a trial in ``rows``: there is no step before it, and the ``observations`` are others."""
        if rows is True:
            self.data[t].zero_()
            self._dones[t].fill_(self._done_at_start)
        else:
            mask = rows.unsqueeze(-1)
            self.data[t].masked_fill_(mask, 0.0)
            self._dones[t].masked_fill_(mask, self._done_at_start)
        self._observe(t, observations)

    def _observe(self, t: int, observations: State) -> None:
        for (key, encoding), parts in self._observations:
            encoding.write(parts[t], observations[key])
