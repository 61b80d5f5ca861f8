"""MiniGrid as its recipes play it: a view that convolutions read, and mazes of which each is a task."""

from itertools import combinations, product

import gymnasium
import numpy as np

try:
    from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX, STATE_TO_IDX
    from minigrid.core.grid import Grid
    from minigrid.core.mission import MissionSpace
    from minigrid.core.world_object import Door, Goal
    from minigrid.minigrid_env import MiniGridEnv
except ImportError as error:
    raise ImportError('MiniGrid is an extra: pip install "rl2_torchrl[minigrid]".') from error

__all__ = ["Corridor", "Doors", "OneHotView", "all_mazes"]

#: What MiniGrid says of a cell: object, colour, state; one-hot as by `OneHotPartialObsWrapper`, without its loop over cells.
_KINDS = [np.eye(len(indices), dtype=np.float32) for indices in (OBJECT_TO_IDX, COLOR_TO_IDX, STATE_TO_IDX)]


class OneHotView(gymnasium.ObservationWrapper):
    """A MiniGrid env that shows its view one-hot, ``[20, width, height]``; info says ``success``."""

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
        return observation, reward, terminated, truncated, {**info, "success": reward > 0}


class Corridor(gymnasium.Wrapper):
    """A memory corridor whose info says what lies in its room: ``is_ball``, 1 or 0.

    Args:
        env: one of MiniGrid's memory envs.
        from_room: whether episodes begin in the room, beside the object, with those actions alone that move. MiniGrid's own begin
            anywhere in the corridor. From size 11 on the object is out of view at the corridor's other end.
    """

    def __init__(self, env: gymnasium.Env, from_room: bool):
        super().__init__(env)
        self.from_room = from_room
        if from_room:
            self.action_space = gymnasium.spaces.Discrete(3)  # left, right, forward

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        observation, info = self.env.reset(seed=seed, options=options)
        maze = self.unwrapped
        middle = maze.height // 2
        self._is_ball = float(maze.grid.get(1, middle - 1).type == "ball")
        if self.from_room:
            maze.agent_pos = np.array((1, middle))
            observation = maze.gen_obs()
        return observation, {**info, "is_ball": self._is_ball}

    def step(self, action: int):
        *stepped, info = self.env.step(action)
        return *stepped, {**info, "is_ball": self._is_ball}


class Doors(MiniGridEnv):
    """A hall with closed doors on both sides, 7 × 11 cells; behind one lies the goal, which is out of view until its door is open.

    The agent starts in the middle of the hall and looks along it; it turns left or right, goes forward, or opens the door
    before it. An episode pays MiniGrid's ``1 - 0.9 steps / max_steps`` at the goal and ends there; in the next one all doors
    are closed again.

    Args:
        max_steps: steps until an episode is cut.
    """

    def __init__(self, max_steps: int = 60):
        self.maze = np.array([[2, 5]])
        super().__init__(MissionSpace(mission_func=lambda: "reach the goal"), width=7, height=11, max_steps=max_steps)
        self._choices = (self.actions.left, self.actions.right, self.actions.forward, self.actions.toggle)
        self.action_space = gymnasium.spaces.Discrete(len(self._choices))  # there is nothing to pick up

    def set_task(self, maze: np.ndarray) -> None:
        """Takes a maze ``[num_doors, 2]``: x and y of each door, the goal's first."""
        self.maze = maze

    def step(self, action: int):
        return super().step(self._choices[action])

    def _gen_grid(self, width: int, height: int) -> None:
        self.grid = Grid(width, height)
        for x in range(width):
            self.grid.vert_wall(x, 0)
        hall = width // 2
        for y in range(1, height - 1):
            self.grid.set(hall, y, None)
        for number, (x, y) in enumerate(self.maze):
            self.grid.set(x, y, Door("grey"))
            self.grid.set(2 * x - hall, y, Goal() if number == 0 else None)  # what is behind it
        self.agent_pos, self.agent_dir = (hall, height // 2), 3


def all_mazes() -> np.ndarray:
    """All mazes of three doors on each side, none next to another, ``[num_mazes, 6, 2]``, in an order that is mixed but fixed."""
    rows = [rows for rows in combinations(range(1, 10), 3) if min(np.diff(rows)) > 1]
    halls = [[*((2, y) for y in left), *((4, y) for y in right)] for left, right in product(rows, rows)]
    mazes = [[doors[goal], *doors[:goal], *doors[goal + 1 :]] for doors in halls for goal in range(6)]
    return np.random.default_rng(0).permutation(np.array(mazes))
