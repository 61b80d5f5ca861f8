"""Exact Bayes optimum of GridNavi: the best search of a grid for a goal that is equally likely in every cell.

Until the goal is found an agent learns nothing but where it is not, so that a policy is one walk; from then on it goes straight to
the goal and stays. What a walk earns with a goal depends on the step alone at which it first comes to that cell. The best walk is
found by dynamic programming over position and cells seen (Bellman 1956), step by step over the whole trial. States that could not
beat the best walk of a narrow search, whatever came after, are left out, which takes away most of them and no optimum.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rl2_torchrl.arguments import whole

__all__ = ["GridSearch", "grid_search"]

_NARROW = 200  # states a step of the search that gives the bound


@dataclass(frozen=True)
class GridSearch:
    """The best search of a grid.

    Args:
        trial_return: return of a trial, in expectation over the goals.
        cells: cells after each step where the goal is not found, ``[episodes * episode_steps]``; every episode begins at cell 0.
        found: step of the trial, from 1, at which each goal is found, ``[num_goals]``; -1: never.
        returns: return of a trial with each goal, ``[num_goals]`` float64.
    """

    trial_return: float
    cells: Tensor
    found: Tensor
    returns: Tensor


def grid_search(goals: Tensor, *, size: int = 5, episode_steps: int = 15, episodes: int = 4) -> GridSearch:
    """The search that earns most of `GridNavi` in the mean over ``goals``, and what it earns.

    Args:
        goals: the goals (x, y), equally likely, ``[num_goals, 2]``, at most 50, none at the start, all different.
        size: cells along each side of the grid.
        episode_steps: steps of an episode.
        episodes: episodes of a trial.

    Raises:
        ValueError: a goal is at the start, no cell of the grid, or named twice, or there are none or too many; or there is no
            cell, step or episode.

    Example:
        >>> import torch
        >>> corner, side = [2.0, 2.0], [1.0, 0.0]  # of a 3×3 grid: the way to the one can lead over the other
        >>> best = grid_search(torch.tensor([corner, side]), size=3, episode_steps=5, episodes=2)
        >>> best.cells[:4].tolist(), best.found.tolist()
        ([1, 2, 5, 8], [4, 1])
        >>> best.returns.round(decimals=3).tolist()  # -0.1 three times and 2 on the goal, then once more; 5 and 5
        [3.4, 10.0]
    """
    size, episode_steps = whole("size", size), whole("episode_steps", episode_steps)
    place = _places(goals.cpu(), size)
    search = _Search(place, size, episode_steps, whole("episodes", episodes))
    narrow, _ = search.best(keep=_NARROW)
    gain, cells = search.best(at_least=narrow)
    steps = torch.full((len(place),), -1)
    for step in reversed(range(len(cells))):
        steps[place == cells[step]] = step + 1
    returns = torch.stack([search.value[step, cell] for step, cell in zip(steps.tolist(), place.tolist(), strict=True)])
    returns = torch.where(steps > 0, returns, 0.0) + search.never
    return GridSearch(gain / len(place) + search.never, cells, steps, returns)


def _places(goals: Tensor, size: int) -> Tensor:
    """Cells of ``goals``, ``[num_goals]``."""
    place = (goals[:, 1] * size + goals[:, 0]).long()
    are_cells = ((goals >= 0) & (goals < size) & (goals == goals.round())).all()  # not so of NaN
    if not are_cells or not 1 <= len(place) <= 50 or (place == 0).any() or len(place.unique()) < len(place):
        raise ValueError(
            f"goals {goals.tolist()} of a grid of {size}×{size}: the search needs 1 to 50 different cells of it, and not the start "
            "(0, 0), where an episode begins. Pass grid_goals' cells once each."
        )
    return place


def _next_cells(size: int) -> Tensor:
    """The cell that each action of `GridNavi` leads to, ``[cells, actions]``: none, then up, right, down, left."""
    x, y = torch.arange(size * size) % size, torch.arange(size * size) // size
    moves = [(x, y), (x, y + 1), (x + 1, y), (x, y - 1), (x - 1, y)]
    return torch.stack([b.clamp(0, size - 1) * size + a.clamp(0, size - 1) for a, b in moves], -1)


class _Search:
    """Walks through a grid, merged where they are in the same cell and have seen the same cells.

    ``value[step, cell]`` is what the first visit of a cell with a goal at a step of the trial earns over never finding it.
    """

    def __init__(self, place: Tensor, size: int, episode_steps: int, episodes: int):
        self.steps, self.episode_steps, self.place = episodes * episode_steps, episode_steps, place
        self.next_cell = _next_cells(size)
        self.bit = torch.zeros(size * size, dtype=torch.int64)
        self.bit[place] = 1 << torch.arange(len(place))
        x, y = torch.arange(size * size) % size, torch.arange(size * size) // size
        self.distance = (x - x.unsqueeze(-1)).abs() + (y - y.unsqueeze(-1)).abs()  # [cell, cell]
        self.never = -0.1 * self.steps
        self.value = self._values(episodes)

    def _values(self, episodes: int) -> Tensor:
        """``[steps + 1, cells]``, 0 where there is no goal."""
        step = torch.arange(self.steps + 1, dtype=torch.float64).unsqueeze(-1)
        episode = ((step - 1) / self.episode_steps).floor().clamp(min=0)
        stays = (episode + 1) * self.episode_steps - step + 1  # steps of this episode that end on the goal
        # The return of a later episode, straight to the goal.
        again = self.episode_steps - 1.1 * (self.distance[0].double() - 1)
        value = -0.1 * (step - 1) + stays + (episodes - 1 - episode) * again - self.never
        return torch.where(self.bit > 0, value, 0.0)

    def best(self, *, keep: int | None = None, at_least: float = -torch.inf) -> tuple[float, Tensor]:
        """Sum of values and cells of the best walk; of the ``keep`` most promising states a step alone, or of all that can reach
        ``at_least``.
        """
        cell, seen = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        gain, history = torch.zeros(1, dtype=torch.float64), []
        for step in range(1, self.steps + 1):
            came_to = self.next_cell[cell]  # [states, actions]
            is_new = (self.bit[came_to] & ~seen.unsqueeze(-1)) > 0
            after = (gain.unsqueeze(-1) + torch.where(is_new, self.value[step][came_to], 0.0)).flatten()
            now_seen = (seen.unsqueeze(-1) | self.bit[came_to]).flatten()
            came_to = came_to.flatten()
            start = torch.zeros_like(came_to) if step % self.episode_steps == 0 else came_to
            chosen = _best_of_each(now_seen * len(self.bit) + start, after)
            hope = after[chosen] + self._hope(step, start[chosen], now_seen[chosen])
            chosen = chosen[hope >= at_least - 1e-9]
            if keep is not None and len(hope) > keep:
                chosen = chosen[hope.topk(keep).indices]
            history.append((chosen // self.next_cell.shape[1], came_to[chosen]))
            cell, seen, gain = start[chosen], now_seen[chosen], after[chosen]
        return gain.max().item(), _walk(history, int(gain.argmax()))

    def _hope(self, step: int, cell: Tensor, seen: Tensor) -> Tensor:
        """No less than states can still gain: as if each cell not seen yet were gone to straight, all at once."""
        hope, left = torch.zeros(len(cell), dtype=torch.float64), -step % self.episode_steps
        for number, goal in enumerate(self.place.tolist()):
            way = self.distance[cell, goal]
            soonest = torch.where(way <= left, step + way, step + left + self.distance[0, goal])
            value = torch.where(soonest <= self.steps, self.value[soonest.clamp(max=self.steps), goal], 0.0)
            hope += torch.where((seen >> number) & 1 > 0, 0.0, value.clamp(min=0.0))
        return hope


def _best_of_each(code: Tensor, gain: Tensor) -> Tensor:
    """Where the highest ``gain`` of each different ``code`` stands, ``[num_codes]``."""
    order = gain.argsort(descending=True, stable=True)
    order = order[code[order].argsort(stable=True)]
    ordered = code[order]
    first = torch.ones(len(code), dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    return order[first]


def _walk(history: list[tuple[Tensor, Tensor]], state: int) -> Tensor:
    """The cells of the walk that led to the last step's ``state``, ``[steps]``."""
    cells = []
    for parent, cell in reversed(history):
        cells.append(int(cell[state]))
        state = int(parent[state])
    return torch.tensor(cells[::-1])
