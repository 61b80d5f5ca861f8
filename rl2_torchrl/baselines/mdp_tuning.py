"""Settings with which the agents for tabular MDPs earn most, of the grids behind table 2 of Duan et al. 2016.

Tune on other tasks than those reported, or the choice fits the luck of the reported ones. A few hundred tasks are
enough for OPSRL; between UCRL2's scalings, over trials of ten episodes, 300 chose one that cost 3 of 147.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from rl2_torchrl.baselines.mdp_trials import MDPs
from rl2_torchrl.baselines.mdps import beb, epsilon_greedy, opsrl, perfect_memory, ucrl2

__all__ = ["tune_beb", "tune_epsilon_greedy", "tune_opsrl", "tune_perfect_memory", "tune_ucrl2"]

EPSILON_GRID = tuple(i / 10 for i in range(1, 11))
"""Shares of random actions that :func:`tune_epsilon_greedy` chooses from: 0.1, 0.2, ..., 1.0."""

OPTIMISM_GRID = tuple(i / 10 for i in range(11))
"""Standard deviations that :func:`tune_perfect_memory` chooses from: 0, 0.1, ..., 1.0."""

SAMPLES_GRID = tuple(range(1, 21))
"""Numbers of samples that :func:`tune_opsrl` chooses from: 1 to 20."""

SCALING_GRID = tuple(10 ** (i / 5 - 4) for i in range(21))
"""Scalings that :func:`tune_beb` and :func:`tune_ucrl2` choose from: 21 from 1e-4 to 1, evenly in the logarithm."""


def tune_epsilon_greedy(
    mdps: MDPs, num_episodes: Sequence[int], generator: Generator | None = None, **kwargs
) -> dict[int, float]:
    """Share of random actions, of 0.1, 0.2, ..., 1.0, with which ``epsilon_greedy`` earns most.

    Args:
        mdps: mean rewards ``[num_tasks, num_states, num_actions]`` and transition probabilities, see ``play``.
        num_episodes: lengths of trials, in episodes; a run of the longest serves all.
        generator: the only source of randomness, on the device of ``mdps``; None for torch's own.
        **kwargs: further arguments of the agent.

    Returns:
        The best value for each length of a trial; the lowest one of several that earn the same.

    Example:
        >>> import torch
        >>> mdps = (torch.rand(50, 3, 2), torch.full((50, 3, 2, 3), 1 / 3))
        >>> list(tune_epsilon_greedy(mdps, [5, 10], torch.Generator().manual_seed(0)))
        [5, 10]
    """

    def agent(epsilon: float, episodes: int) -> Tensor:
        return epsilon_greedy(mdps, episodes, generator, epsilon=epsilon, **kwargs)

    return _best(agent, EPSILON_GRID, num_episodes)


def tune_perfect_memory(
    mdps: MDPs, num_episodes: Sequence[int], generator: Generator | None = None, **kwargs
) -> dict[int, float]:
    """Optimism, of 0, 0.1, ..., 1.0 standard deviations, with which ``perfect_memory`` earns most.

    Args:
        mdps: mean rewards ``[num_tasks, num_states, num_actions]`` and transition probabilities, see ``play``.
        num_episodes: lengths of trials, in episodes; a run of the longest serves all.
        generator: the only source of randomness, on the device of ``mdps``; None for torch's own.
        **kwargs: further arguments of the agent.

    Returns:
        The best value for each length of a trial; the lowest one of several that earn the same.

    Example:
        >>> import torch
        >>> mdps = (torch.rand(50, 3, 2), torch.full((50, 3, 2, 3), 1 / 3))
        >>> best = tune_perfect_memory(mdps, [2], torch.Generator().manual_seed(0), episode_steps=3)
        >>> 0 <= best[2] <= 1
        True
    """

    def agent(optimism: float, episodes: int) -> Tensor:
        return perfect_memory(mdps, episodes, generator, optimism=optimism, **kwargs)

    return _best(agent, OPTIMISM_GRID, num_episodes)


def tune_opsrl(mdps: MDPs, num_episodes: Sequence[int], generator: Generator | None = None, **kwargs) -> dict[int, int]:
    """Number of samples, of 1 to 20, with which ``opsrl`` earns most.

    Args:
        mdps: mean rewards ``[num_tasks, num_states, num_actions]`` and transition probabilities, see ``play``.
        num_episodes: lengths of trials, in episodes; a run of the longest serves all.
        generator: the only source of randomness, on the device of ``mdps``; None for torch's own.
        **kwargs: further arguments of the agent.

    Returns:
        The best value for each length of a trial; the lowest one of several that earn the same.

    Example:
        >>> import torch
        >>> mdps = (torch.rand(50, 3, 2), torch.full((50, 3, 2, 3), 1 / 3))
        >>> best = tune_opsrl(mdps, [2], torch.Generator().manual_seed(0), episode_steps=3)
        >>> best[2] in range(1, 21)
        True
    """

    def agent(num_samples: int, episodes: int) -> Tensor:
        return opsrl(mdps, episodes, generator, num_samples=num_samples, **kwargs)

    return _best(agent, SAMPLES_GRID, num_episodes)


def tune_beb(mdps: MDPs, num_episodes: Sequence[int], generator: Generator | None = None, **kwargs) -> dict[int, float]:
    """Scaling, of 21 values from 1e-4 to 1, with which ``beb`` earns most.

    Args:
        mdps: mean rewards ``[num_tasks, num_states, num_actions]`` and transition probabilities, see ``play``.
        num_episodes: lengths of trials, in episodes; a run of the longest serves all.
        generator: the only source of randomness, on the device of ``mdps``; None for torch's own.
        **kwargs: further arguments of the agent.

    Returns:
        The best value for each length of a trial; the lowest one of several that earn the same.

    Example:
        >>> import torch
        >>> mdps = (torch.rand(50, 3, 2), torch.full((50, 3, 2, 3), 1 / 3))
        >>> best = tune_beb(mdps, [2], torch.Generator().manual_seed(0), prior_mean=1.0, episode_steps=3)
        >>> 1e-4 <= best[2] <= 1
        True
    """

    def agent(scaling: float, episodes: int) -> Tensor:
        return beb(mdps, episodes, generator, scaling=scaling, **kwargs)

    return _best(agent, SCALING_GRID, num_episodes)


def tune_ucrl2(
    mdps: MDPs, num_episodes: Sequence[int], generator: Generator | None = None, **kwargs
) -> dict[int, float]:
    """Scaling, of 21 values from 1e-4 to 1, with which ``ucrl2`` earns most.

    Args:
        mdps: mean rewards ``[num_tasks, num_states, num_actions]`` and transition probabilities, see ``play``.
        num_episodes: lengths of trials, in episodes; a run of the longest serves all.
        generator: the only source of randomness, on the device of ``mdps``; None for torch's own.
        **kwargs: further arguments of the agent.

    Returns:
        The best value for each length of a trial; the lowest one of several that earn the same.

    Example:
        >>> import torch
        >>> mdps = (torch.rand(50, 3, 2), torch.full((50, 3, 2, 3), 1 / 3))
        >>> best = tune_ucrl2(mdps, [2], torch.Generator().manual_seed(0), episode_steps=3)
        >>> 1e-4 <= best[2] <= 1
        True
    """

    def agent(scaling: float, episodes: int) -> Tensor:
        return ucrl2(mdps, episodes, generator, scaling=scaling, **kwargs)

    return _best(agent, SCALING_GRID, num_episodes)


def _best(
    agent: Callable[[float, int], Tensor], grid: Sequence[float], num_episodes: Sequence[int]
) -> dict[int, float]:
    if not num_episodes or min(num_episodes) < 1:
        raise ValueError(
            f"num_episodes={num_episodes} must name one length of a trial or more, each at least 1 episode."
        )
    earned = [agent(value, max(num_episodes)).double().mean(0).cumsum(0) for value in grid]
    return {length: grid[int(torch.stack(earned)[:, length - 1].argmax())] for length in num_episodes}
