"""`DiscreteEnv`: episodes of a fixed number of steps over numbered states; what tabular MDPs and grids share."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import NamedTuple

import torch
from torch import Tensor
from torchrl.data import Categorical, Unbounded

from rl2_torchrl.arguments import whole
from rl2_torchrl.envs.tensor_env import TensorEnv

__all__ = ["DiscreteEnv", "DiscreteState"]


class DiscreteState(NamedTuple):
    """Where the rows of a `DiscreteEnv` stand.

    Attributes:
        task: the task ``[*B, task_size]``.
        place: index of the state that each row is in, ``[*B]`` int64.
    """

    task: Tensor
    place: Tensor


class DiscreteEnv(TensorEnv):
    """Every episode begins in state 0 and ends after ``episode_steps`` steps; a class below says what a step does.

    The observation is the state's index ``[*B]`` int64, which `PreviousStep` writes one-hot, the action the index of a
    choice ``[*B]`` int64, the task a vector ``[*B, task_size]`` float32, the reward ``[*B, 1]`` float32.

    Args:
        num_states: number of states.
        num_actions: number of actions.
        task_size: size of a task.
        episode_steps: steps of an episode.
        batch_size: batch size ``B`` of the env.
        seed: seed of the env's own generator; None draws one from PyTorch's default generator.
        device: device of all tensors; None is the CPU.

    Raises:
        ValueError: a size below 1.
    """

    time_limit_terminates = True

    def __init__(
        self,
        num_states: int,
        num_actions: int,
        task_size: int,
        episode_steps: int,
        batch_size: Sequence[int],
        seed: int | None,
        device: torch.device | str | None,
    ):
        self.num_states, self.num_actions = whole("num_states", num_states), whole("num_actions", num_actions)
        super().__init__(
            task_spec=Unbounded(index(task_size)),
            observation_spec=Categorical(self.num_states),
            action_spec=Categorical(self.num_actions),
            max_episode_steps=whole("episode_steps", episode_steps),
            fixed_length=True,
            batch_size=batch_size,
            seed=seed,
            device=device,
        )
        self._first = torch.zeros(self.batch_size, dtype=torch.int64, device=self.device)

    def begin(self, task: Tensor, rows: Tensor) -> tuple[DiscreteState, Tensor]:
        """State 0 in every row."""
        return DiscreteState(task, self._first), self._first
