"""Classical algorithms to hold a meta-learned agent against, per task family.

Every bandit agent is a function ``agent(means, num_pulls, generator=None) -> rewards``:
``means`` of shape ``[num_tasks, num_arms]`` in, ``rewards`` of shape ``[num_tasks, num_pulls]``
out.

Every agent for tabular MDPs is a function ``agent(mdps, num_episodes, generator=None) -> returns``:
mean rewards ``[num_tasks, num_states, num_actions]`` and transition probabilities in, the returns of the episodes
``[num_tasks, num_episodes]`` out. Those that bandits have too are found in their module, ``mdps.greedy``. They play MDPs whose
rewards have normal noise of standard deviation 1, as the paper's do: an agent is compared in a `TabularMDP` with ``noise=1.0``, its
default.

``tune`` chooses the constants of those of either kind that have any.
"""

from rl2_torchrl.baselines.bandits import (
    epsilon_greedy,
    greedy,
    random_agent,
    ucb1,
)
from rl2_torchrl.baselines.bayes import bayes_optimal, bayes_optimal_return
from rl2_torchrl.baselines.gittins import gittins_agent, gittins_indices
from rl2_torchrl.baselines.grid_search import GridSearch, grid_search
from rl2_torchrl.baselines.mdps import beb, opsrl, psrl, ucrl2
from rl2_torchrl.baselines.planning import optimal_return
from rl2_torchrl.baselines.thompson import optimistic_thompson_sampling, thompson_sampling
from rl2_torchrl.baselines.tuning import tune

__all__ = [
    "GridSearch",
    "bayes_optimal",
    "bayes_optimal_return",
    "beb",
    "epsilon_greedy",
    "gittins_agent",
    "gittins_indices",
    "greedy",
    "grid_search",
    "opsrl",
    "optimal_return",
    "optimistic_thompson_sampling",
    "psrl",
    "random_agent",
    "thompson_sampling",
    "tune",
    "ucb1",
    "ucrl2",
]
