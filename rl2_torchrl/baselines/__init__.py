"""Classical algorithms to hold a meta-learned agent against, per task family.

Every bandit agent is a function ``agent(means, num_pulls, generator=None) -> rewards``:
``means`` of shape ``[num_tasks, num_arms]`` in, ``rewards`` of shape ``[num_tasks, num_pulls]``
out. ``tune`` chooses the constants of those that have any.
"""

from rl2_torchrl.baselines.bandits import (
    epsilon_greedy,
    greedy,
    random_agent,
    ucb1,
)
from rl2_torchrl.baselines.bayes import bayes_optimal, bayes_optimal_return
from rl2_torchrl.baselines.gittins import gittins_agent, gittins_indices
from rl2_torchrl.baselines.thompson import optimistic_thompson_sampling, thompson_sampling
from rl2_torchrl.baselines.tuning import tune

__all__ = [
    "bayes_optimal",
    "bayes_optimal_return",
    "epsilon_greedy",
    "gittins_agent",
    "gittins_indices",
    "greedy",
    "optimistic_thompson_sampling",
    "random_agent",
    "thompson_sampling",
    "tune",
    "ucb1",
]
