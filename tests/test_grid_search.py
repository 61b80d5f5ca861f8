"""The best search of a grid: all walks tried one by one, VariBAD's grid, and what the env itself pays for the walk."""

import math
from itertools import product

import pytest
import torch
from tensordict import TensorDict

from rl2_torchrl.baselines import grid_search
from rl2_torchrl.envs import GridNavi

VARIBAD = torch.tensor([[x, y] for y in range(5) for x in range(5) if x > 1 or y > 1]).float()


def by_trying_all_walks(goals, size, episode_steps, episodes):
    """The most that a walk earns in the mean over ``goals``, each walk followed until the goal is found."""
    moves = {"up": (0, 1), "right": (1, 0), "down": (0, -1), "left": (-1, 0)}
    cells = {(int(x), int(y)) for x, y in goals.tolist()}
    best = -1e9
    for walk in product(moves.values(), repeat=episodes * episode_steps):
        first, at = {}, (0, 0)
        for step, (dx, dy) in enumerate(walk):
            if step % episode_steps == 0:
                at = (0, 0)
            x, y = at[0] + dx, at[1] + dy
            at = (min(max(x, 0), size - 1), min(max(y, 0), size - 1))
            first.setdefault(at, step)
        earned = 0.0
        for x, y in cells:
            found = first.get((x, y), episodes * episode_steps)
            on_it = episode_steps - found % episode_steps if (x, y) in first else 0
            for _ in range(found // episode_steps + 1, episodes):
                on_it += max(episode_steps - (x + y - 1), 0)
            earned += 1.1 * on_it - 0.1 * episodes * episode_steps
        best = max(best, earned / len(cells))
    return best


@pytest.mark.parametrize(
    ("goals", "size", "episode_steps", "episodes"),
    [
        ([[2, 0], [0, 2]], 3, 3, 2),  # one of them in each episode
        ([[2, 0], [0, 2], [1, 1], [1, 2]], 3, 4, 2),
        ([[2, 0], [2, 1], [0, 2], [2, 2], [1, 2]], 3, 8, 1),
        ([[3, 0], [0, 1]], 4, 2, 3),  # the first is too far for any episode
    ],
)
def test_best_walk_by_trying_them_all(goals, size, episode_steps, episodes):
    goals = torch.tensor(goals).float()
    best = grid_search(goals, size=size, episode_steps=episode_steps, episodes=episodes)
    assert best.trial_return == pytest.approx(by_trying_all_walks(goals, size, episode_steps, episodes))


def test_varibads_grid():
    best = grid_search(VARIBAD)
    assert best.trial_return == pytest.approx(37.2142857)
    # 14 of the 21 goals in the first episode, the others in the second.
    assert ((best.found <= 15).sum().item(), best.found.max().item() <= 30) == (14, True)
    assert best.returns.mean().item() == pytest.approx(best.trial_return)


def test_the_env_pays_what_the_search_says():
    best = grid_search(VARIBAD)
    env = GridNavi(batch_size=(len(VARIBAD),))
    earned, known = torch.zeros(len(VARIBAD)), torch.zeros(len(VARIBAD), dtype=torch.bool)
    goal = (VARIBAD[:, 1] * 5 + VARIBAD[:, 0]).long()
    for episode in best.cells.view(4, 15):
        td = env.reset(TensorDict({"task": VARIBAD}, env.batch_size))
        for cell in episode.tolist():
            here = td["observation"]
            aim = torch.where(known, goal, cell)
            x, y = aim % 5 - here % 5, aim // 5 - here // 5  # right, left, up, down, stay: 2, 4, 1, 3, 0
            action = torch.where(x > 0, 2, torch.where(x < 0, 4, torch.where(y > 0, 1, torch.where(y < 0, 3, 0))))
            td = env.step(td.set("action", action).set("task", VARIBAD))["next"]
            earned += td["reward"].squeeze(-1)
            known |= td["reward"].squeeze(-1) > 0
    assert earned.tolist() == pytest.approx(best.returns.tolist(), abs=1e-3)


@pytest.mark.parametrize("goals", [[[0, 0]], [[5, 0]], [[2, 1], [2, 1]], [[-1, 0]], [[1.5, 0]], [[math.nan, 1]]])
def test_goals_that_cannot_be_searched(goals):
    with pytest.raises(ValueError, match="1 to 50 different cells"):
        grid_search(torch.tensor(goals).float())


@pytest.mark.parametrize("name", ["size", "episode_steps", "episodes"])
def test_no_cell_step_or_episode(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be a whole number, at least 1"):
        grid_search(torch.tensor([[2.0, 2.0]]), **{name: 0})
