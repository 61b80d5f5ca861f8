"""`PointRobot`: a point in the plane looks for a goal that it is not shown; the episode ends there, so that rows part."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torchrl.data import Bounded, Unbounded

from rl2_torchrl.arguments import above_0, require_flags
from rl2_torchrl.envs.tensor_env import TensorEnv
from rl2_torchrl.tasks import TaskDistribution

__all__ = ["PointRobot", "goals_on_half_circle"]


class PointState(NamedTuple):
    """Where the rows stand.

    Attributes:
        goal: the task ``[*B, 2]``.
        place: where the point is ``[*B, 2]``.
    """

    goal: Tensor
    place: Tensor


class PointRobot(TensorEnv):
    """A point that starts at (0, 0) and shall come within ``goal_radius`` of a goal; the sooner, the better.

    The task is the goal (x, y), ``[*B, 2]``, the observation where the point is, ``[*B, 2]``. An action ``[*B, 2]`` in [-1, 1],
    cut to that, moves it by ``step_size`` times the action. At the goal the episode ends (``terminated``), and it is
    ``truncated`` after ``max_episode_steps``: episodes have lengths of their own in each row.

    Every step costs, so that a way that is shorter pays: in the dense env the distance to the goal after it, from which the
    goal can be worked out in a few steps; in the sparse one 0.1, with 1 for arriving. There the goal has to be searched
    for once, and can be gone to from then on.

    Args:
        sparse: whether the reward tells of the goal only where it is reached. Default False.
        step_size: length of the longest move along each axis.
        goal_radius: distance within which the goal is reached.
        max_episode_steps: steps after which an episode ends at the latest.
        batch_size: batch size ``B`` of the env.
        device: device of all tensors. Defaults to the CPU.

    Raises:
        ValueError: a length that is not positive, or a size below 1.

    Examples:
        >>> env = PointRobot(batch_size=(2,))
        >>> _ = env.start(torch.tensor([[0.0, 1.0], [0.3, 0.3]]))
        >>> observation, reward, terminated, truncated = env.play(torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
        >>> observation["observation"], terminated.squeeze(-1)
        (tensor([[0.0000, 0.2000],
            [0.2000, 0.2000]]), tensor([False,  True]))
        >>> reward.squeeze(-1)
        tensor([-0.8000, -0.1414])
    """

    def __init__(
        self,
        *,
        sparse: bool = False,
        step_size: float = 0.2,
        goal_radius: float = 0.2,
        max_episode_steps: int = 25,
        batch_size: Sequence[int] = (),
        device: torch.device | str | None = None,
    ):
        require_flags(sparse=sparse)
        step_size, goal_radius = above_0("step_size", step_size), above_0("goal_radius", goal_radius)
        super().__init__(
            task_spec=Unbounded(2),
            observation_spec=Unbounded(2),
            action_spec=Bounded(-1, 1, (2,)),
            max_episode_steps=max_episode_steps,
            batch_size=batch_size,
            seed=0,  # nothing is drawn in this env; the seed is of no consequence
            device=device,
        )
        self.sparse, self.step_size, self.goal_radius = sparse, step_size, goal_radius

    def begin(self, task: Tensor, rows: Tensor) -> tuple[PointState, Tensor]:
        """The point at (0, 0)."""
        place = torch.zeros_like(task)
        return PointState(task, place), place

    def advance(self, state: PointState, action: Tensor) -> tuple[PointState, Tensor, Tensor, Tensor, None]:
        """A move, what it costs, and whether it ends at the goal."""
        goal, place = state
        place = place + self.step_size * action.clamp(-1, 1)
        distance = (place - goal).norm(dim=-1, keepdim=True)
        arrived = distance <= self.goal_radius
        reward = arrived.to(distance.dtype) - 0.1 if self.sparse else -distance
        return PointState(goal, place), place, reward, arrived, None


def goals_on_half_circle(radius: float = 1.0) -> TaskDistribution:
    """Goals ``[*B, 2]`` at ``radius`` from the start, in all directions with y ≥ 0 alike.

    Raises:
        ValueError: ``radius`` is not above 0.

    Examples:
        >>> goals = goals_on_half_circle()(torch.Size([100]), torch.Generator())
        >>> goals.shape, bool((goals[:, 1] >= 0).all())
        (torch.Size([100, 2]), True)
    """
    return partial(_on_half_circle, radius=above_0("radius", radius))


def _on_half_circle(batch_size: torch.Size, generator: torch.Generator, *, radius: float) -> Tensor:
    angle = torch.pi * torch.rand(batch_size, generator=generator)
    return radius * torch.stack((angle.cos(), angle.sin()), -1)
