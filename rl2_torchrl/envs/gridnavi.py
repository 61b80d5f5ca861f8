"""GridNavi (Zintgraf et al. 2020, VariBAD, arXiv:1910.08348, section 5.1): find a goal in a grid that is not shown."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from rl2_torchrl.arguments import whole
from rl2_torchrl.envs.discrete import DiscreteEnv, DiscreteState
from rl2_torchrl.tasks import TaskDistribution

__all__ = ["GridNavi", "grid_goals"]

#: Steps (dx, dy) of the actions stay, up, right, down, left.
_MOVES = ((0, 0), (0, 1), (1, 0), (0, -1), (-1, 0))


class GridNavi(DiscreteEnv):
    """A square grid with a hidden goal: -0.1 for a step that ends elsewhere, +1 for each that ends on the goal.

    An episode begins at the bottom left, (0, 0), and goes on at the goal: who has found it stays there. The actions
    are stay, up, right, down and left, ``[*B]`` int64; a step against the wall stays. The task is the goal (x, y),
    ``[*B, 2]`` float32, the reward ``[*B, 1]``.

    The observation is the cell's index ``size * y + x``, ``[*B]`` int64, which `PreviousStep` writes one-hot: which cells
    have been visited, the sufficient statistic of this task, is then a sum of inputs, where the coordinates of VariBAD's
    own observation would have to be told apart by the network first.

    With a known goal at distance ``d`` (steps) an episode of 15 steps is worth at most ``-0.1 (d - 1) + (15 - (d - 1))``;
    over the goals of `grid_goals` that is between 7.3 and 13.9, 11.07 in the mean.

    Args:
        size: cells along each side.
        episode_steps: steps of an episode.
        batch_size: batch size ``B`` of the env.
        device: device of all tensors. Defaults to the CPU.

    Raises:
        ValueError: a size below 1.

    Examples:
        >>> from tensordict import TensorDict
        >>> env = GridNavi(batch_size=(2,))
        >>> goals = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
        >>> td = env.reset(TensorDict({"task": goals}, [2]))
        >>> td = env.step(td.set("action", torch.tensor([1, 2])))  # up, right
        >>> td["next", "observation"], td["next", "reward"].squeeze(-1)
        (tensor([5, 1]), tensor([-0.1000,  1.0000]))
    """

    def __init__(
        self,
        size: int = 5,
        *,
        episode_steps: int = 15,
        batch_size: Sequence[int] = (),
        device: torch.device | str | None = None,
    ):
        # Nothing is drawn in this env; the seed is of no consequence.
        size = whole("size", size)
        super().__init__(size * size, len(_MOVES), 2, episode_steps, batch_size, 0, device)
        self.size = size
        self._next_cell = self._make_next_cell().to(self.device)

    def _make_next_cell(self) -> Tensor:
        """Cell after each action in each cell, ``[size * size, 5]``."""
        cell = torch.arange(self.size**2).unsqueeze(-1)
        dx, dy = torch.tensor(_MOVES).unbind(-1)
        x = (cell % self.size + dx).clamp(0, self.size - 1)
        y = (cell // self.size + dy).clamp(0, self.size - 1)
        return y * self.size + x

    def begin(self, task: Tensor, rows: Tensor) -> tuple[DiscreteState, Tensor]:
        """Cell 0 in every row.

        Raises:
            ValueError: a goal is no cell of the grid.
        """
        if task.is_cpu:  # elsewhere a look would wait for the device
            is_cell = ((task >= 0) & (task < self.size) & (task == task.round())).all(-1)
            if not bool((is_cell | ~rows).all()):
                goal = task[rows & ~is_cell][0].tolist()
                raise ValueError(
                    f"the goal {goal} is no cell of a grid of {self.size} by {self.size}, whose cells are (0, 0) to "
                    f"({self.size - 1}, {self.size - 1}): draw goals by grid_goals({self.size})."
                )
        return super().begin(task, rows)

    def advance(self, state: DiscreteState, action: Tensor) -> tuple[DiscreteState, Tensor, Tensor, None, None]:
        """The next cell, and whether it is the goal."""
        task, place = state
        cell = self._next_cell[place, action]
        goal = (task[..., 1] * self.size + task[..., 0]).long()
        on_goal = (cell == goal).unsqueeze(-1).to(task.dtype)
        return DiscreteState(task, cell), cell, 1.1 * on_goal - 0.1, None, None


def grid_goals(size: int = 5) -> TaskDistribution:
    """Goals ``[*B, 2]``, all cells alike but for the start and its three neighbours: 21 of a 5×5 grid (VariBAD).

    Raises:
        ValueError: the grid has no other cells.

    Examples:
        >>> goals = grid_goals()(torch.Size([1000]), torch.Generator())
        >>> goals.unique(dim=0).shape
        torch.Size([21, 2])
    """
    if whole("size", size) < 3:
        raise ValueError(f"grid_goals({size}): a grid below 3×3 has no cell that is not next to the start.")
    cell = torch.arange(size * size)
    goals = torch.stack([cell % size, cell // size], -1).float()
    goals = goals[(goals > 1).any(-1)]
    return partial(_one_of, goals=goals)


def _one_of(batch_size: torch.Size, generator: torch.Generator, *, goals: Tensor) -> Tensor:
    return goals[torch.randint(len(goals), batch_size, generator=generator)]
