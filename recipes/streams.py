"""Streams of random numbers that never meet: of tasks, of envs, and of classical agents."""

import torch

from rl2_torchrl import TaskDistribution

#: Streams of random numbers that never meet, for `stream_seed`: tasks first, then what envs and classical agents draw.
TRAIN_TASKS, HELD_OUT_TASKS, REPORT_TASKS, TUNING_TASKS, ENVS, CLASSICAL_AGENTS = 0, 1, 2, 3, 9, 10
WORKERS = 11


def stream_seed(seed: int, stream: int) -> int:
    """A seed for each purpose, so that no two draw the same numbers."""
    return 1000 * seed + stream


def draw_tasks(distribution: TaskDistribution, seed: int, stream: int, number: int) -> torch.Tensor:
    """``number`` tasks of a ``stream``, [number, task_size].

    Fewer bandits are the first of more; fewer MDPs are others, as all their rewards are drawn before their transitions.

    Examples:
        >>> from rl2_torchrl.envs import random_mdps, uniform_means
        >>> def are_the_first(distribution):
        ...     few, more = (draw_tasks(distribution, 0, REPORT_TASKS, number) for number in (20, 30))
        ...     return torch.equal(few, more[:20])
        >>> are_the_first(uniform_means(5)), are_the_first(random_mdps())
        (True, False)
    """
    return distribution(torch.Size([number]), torch.Generator().manual_seed(stream_seed(seed, stream)))
