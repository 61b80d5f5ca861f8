"""Classical algorithms to hold a meta-learned agent against, per task family.

Every bandit agent is a function ``agent(means, num_pulls, generator=None) -> rewards``:
``means`` of shape ``[num_tasks, num_arms]`` in, ``rewards`` of shape ``[num_tasks, num_pulls]``
out.
"""

from rl2_torchrl.baselines.bandits import (
    greedy,
    random_agent,
    thompson_sampling,
    tune_ucb1,
    ucb1,
)
from rl2_torchrl.baselines.bayes import bayes_optimal, bayes_optimal_return

__all__ = [
    "bayes_optimal",
    "bayes_optimal_return",
    "greedy",
    "random_agent",
    "thompson_sampling",
    "tune_ucb1",
    "ucb1",
]
