"""The choice of an agent's constant on tasks of its own, as behind the tables of Duan et al. 2016: the best of a grid."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

from torch import Generator, Tensor

from rl2_torchrl.baselines import mdps
from rl2_torchrl.baselines.bandits import epsilon_greedy, ucb1
from rl2_torchrl.baselines.gittins import gittins_agent
from rl2_torchrl.baselines.thompson import optimistic_thompson_sampling

__all__ = ["tune"]

TENTHS = tuple(i / 10 for i in range(11))
#: 21 from 1e-4 to 1, evenly in the logarithm.
SCALINGS = tuple(10 ** (i / 5 - 4) for i in range(21))

PAPER_GRIDS: Mapping[Callable[..., Tensor], Mapping[str, Sequence[float]]] = {
    epsilon_greedy: {"epsilon": TENTHS},
    gittins_agent: {"gamma": (0.9, 0.99, 0.999, 0.9999)},
    optimistic_thompson_sampling: {"num_samples": (1, 10, 50)},
    ucb1: {"exploration": TENTHS},
    mdps.beb: {"scaling": SCALINGS},
    mdps.epsilon_greedy: {"epsilon": TENTHS[1:]},
    mdps.opsrl: {"num_samples": range(1, 21)},
    mdps.perfect_memory: {"optimism": TENTHS},
    mdps.ucrl2: {"scaling": SCALINGS},
}
"""What the paper's authors chose from, for each agent that has a constant; `perfect_memory` is not theirs."""


def tune(
    agent: Callable[..., Tensor],
    tasks: Any,
    length: int,
    generator: Generator | None = None,
    **grid: Sequence[float],
) -> dict[str, float]:
    """Options with which ``agent`` earns most on ``tasks``.

    Tune on other tasks than those reported, or the choice fits the luck of the reported ones.

    Args:
        agent: ``agent(tasks, length, generator, **options) -> rewards``, any shape.
        tasks: what the agent takes first: arm means ``[num_tasks, num_arms]``, or mean rewards and transitions of MDPs.
        length: what the agent takes second: pulls of a trial, or episodes.
        generator: the only source of randomness, on the device of ``tasks``; None for torch's own.
        **grid: the values to try for each option that is tuned. Without any, those of the paper (``PAPER_GRIDS``).

    Returns:
        The best options, ready for ``agent(..., **options)``: of several that earn the same the first of the grid;
        ``{}`` for an agent that has none, such as ``greedy``.

    Example:
        >>> import torch
        >>> from rl2_torchrl.baselines import ucb1
        >>> generator = torch.Generator().manual_seed(0)
        >>> tuning, reporting = torch.rand(2, 1000, 5, generator=generator)
        >>> best = tune(ucb1, tuning, 100, generator, exploration=(0.0, 0.2, 3.0))
        >>> best
        {'exploration': 0.2}
        >>> ucb1(reporting, 100, generator, **best).shape
        torch.Size([1000, 100])
        >>> from rl2_torchrl.baselines import beb
        >>> worlds = (torch.rand(50, 3, 2, generator=generator), torch.full((50, 3, 2, 3), 1 / 3))
        >>> tune(beb, worlds, 2, generator, scaling=(0.001, 1.0), prior_mean=(0.5,)).keys()
        dict_keys(['scaling', 'prior_mean'])
    """
    grid = grid or PAPER_GRIDS.get(agent, {})
    grid = {option: values.tolist() if hasattr(values, "tolist") else list(values) for option, values in grid.items()}
    for option, values in grid.items():
        if not values:
            raise ValueError(
                f"{option} holds no value: there is nothing to choose from. Pass one or more, such as "
                f"{option}=(0.1, 0.2), or no grid at all for the paper's."
            )
    candidates = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    if len(candidates) == 1:
        return candidates[0]

    def mean_reward(options: dict[str, float]) -> float:
        return agent(tasks, length, generator, **options).double().mean().item()

    return max(candidates, key=mean_reward)
