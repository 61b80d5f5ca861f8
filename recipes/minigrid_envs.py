"""MiniGrid as its recipes play it: a view that convolutions read, and mazes of which each is a task."""

from itertools import combinations, product

import gymnasium
import numpy as np

try:
    from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX, STATE_TO_IDX
    from minigrid.core.grid import Grid
    from minigrid.core.mission import MissionSpace
    from minigrid.core.world_object import Goal
    from minigrid.minigrid_env import MiniGridEnv
except ImportError as error:
    raise ImportError('MiniGrid is an extra: pip install "rl2_torchrl[minigrid]".') from error

__all__ = ["Alcoves", "OneHotView", "all_mazes"]

#: What MiniGrid says of a cell: object, colour, state; one-hot as by `OneHotPartialObsWrapper`, without its loop over cells.
_KINDS = [np.eye(len(indices), dtype=np.float32) for indices in (OBJECT_TO_IDX, COLOR_TO_IDX, STATE_TO_IDX)]


class OneHotView(gymnasium.ObservationWrapper):
    """A MiniGrid env that shows its view one-hot, ``[20, width, height]``; info says ``success`` and an episode's ``steps``."""

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        width, height, _ = env.observation_space["image"].shape
        view = gymnasium.spaces.Box(0.0, 1.0, (sum(map(len, _KINDS)), width, height), np.float32)
        self.observation_space = gymnasium.spaces.Dict(direction=env.observation_space["direction"], view=view)

    def observation(self, observation: dict) -> dict:
        image = observation["image"]
        view = np.concatenate([kinds[:, image[..., which]] for which, kinds in enumerate(_KINDS)])
        return {"direction": observation["direction"], "view": view}

    def step(self, action: int):
        observation, reward, terminated, truncated, info = super().step(action)
        said = {"success": reward > 0, "steps": self.unwrapped.step_count}
        return observation, reward, terminated, truncated, {**info, **said}


class Alcoves(MiniGridEnv):
    """A hall with alcoves on both sides, 11 × 9 cells; the goal lies at the end of one, out of view from along the hall.

    The agent starts in the middle of the hall and looks along it. An episode pays MiniGrid's ``1 - 0.9 steps / max_steps`` at the
    goal, and ends there.

    Args:
        max_steps: steps until an episode is cut.
    """

    def __init__(self, max_steps: int = 60):
        self.maze = np.array([[1, 1]])
        super().__init__(MissionSpace(mission_func=lambda: "reach the goal"), width=11, height=9, max_steps=max_steps)
        self.action_space = gymnasium.spaces.Discrete(3)  # turn left or right, go forward: nothing can be picked up

    def set_task(self, maze: np.ndarray) -> None:
        """Takes a maze ``[alcoves, 2]``: x and y of the end of each alcove, the goal's first."""
        self.maze = maze

    def _gen_grid(self, width: int, height: int) -> None:
        self.grid = Grid(width, height)
        for x in range(width):
            self.grid.vert_wall(x, 0)
        middle = width // 2
        for y in range(1, height - 1):
            self.grid.set(middle, y, None)
        for end, y in self.maze:
            for x in range(min(end, middle), max(end, middle) + 1):
                self.grid.set(x, y, None)
        self.put_obj(Goal(), *self.maze[0])
        self.agent_pos, self.agent_dir = (middle, height // 2), 3


def all_mazes(seed: int, alcoves: int = 3) -> np.ndarray:
    """All mazes with so many ``alcoves`` on each side, ``[num_mazes, 2 * alcoves, 2]``, in random order."""
    sides = [[[(x, y) for y in rows] for rows in combinations(range(1, 8), alcoves)] for x in (1, 9)]
    halls = [left + right for left, right in product(*sides)]
    everywhere = [[ends[goal], *ends[:goal], *ends[goal + 1 :]] for ends in halls for goal in range(2 * alcoves)]
    return np.random.default_rng(seed).permutation(np.array(everywhere))
