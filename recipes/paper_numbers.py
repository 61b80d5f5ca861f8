"""The published numbers of the tables of the RL² paper (Duan et al. 2016, arXiv:1611.02779v2), as data.

RL² cells are the best of 5 seeds there. SNAIL's are from Mishra et al. 2018 (arXiv:1707.03141).
"""

__all__ = ["PAPER", "PAPER_SE"]

BANDIT_AGENTS = (
    "random",
    "gittins",
    "thompson_sampling",
    "optimistic_thompson_sampling",
    "ucb1",
    "epsilon_greedy",
    "greedy",
    "rl2",
    "snail",
)
# Table 1: total reward of n pulls of k arms, by "n,k".
BANDITS = {
    "10,5": (5.0, 6.6, 5.7, 6.5, 6.7, 6.6, 6.6, 6.7, 6.6),
    "10,10": (5.0, 6.6, 5.5, 6.2, 6.7, 6.6, 6.6, 6.7, 6.7),
    "10,50": (5.1, 6.5, 5.2, 5.5, 6.6, 6.5, 6.5, 6.8, 6.7),
    "100,5": (49.9, 78.3, 74.7, 77.9, 78.0, 75.4, 74.8, 78.7, 79.1),
    "100,10": (49.9, 82.8, 76.7, 81.4, 82.4, 77.4, 77.1, 83.5, 83.5),
    "100,50": (49.8, 85.2, 64.5, 67.7, 84.3, 78.3, 78.0, 84.9, 85.1),
    "500,5": (249.8, 405.8, 402.0, 406.7, 405.8, 388.2, 380.6, 401.6, 408.1),
    "500,10": (249.0, 437.8, 429.5, 438.9, 437.1, 408.0, 395.0, 432.5, 432.4),
    "500,50": (249.6, 463.7, 427.2, 437.6, 457.6, 413.6, 402.8, 438.9, 442.6),
}

MDP_AGENTS = ("random", "psrl", "opsrl", "ucrl2", "beb", "epsilon_greedy", "greedy", "rl2", "snail")
# Table 2: total reward of n episodes of 10 steps, by "n".
MDPS = {
    "10": (100.1, 138.1, 144.1, 146.6, 150.2, 132.8, 134.8, 156.2, 159.1),
    "25": (250.2, 408.8, 425.2, 424.1, 427.8, 377.3, 368.8, 445.7, 447.2),
    "50": (499.7, 904.4, 930.7, 918.9, 917.8, 823.3, 769.3, 936.1, 942.3),
    "75": (749.9, 1417.1, 1449.2, 1427.6, 1422.6, 1293.9, 1172.9, 1428.8, 1447.5),
    "100": (999.4, 1939.5, 1973.9, 1942.1, 1935.1, 1778.2, 1578.5, 1913.7, 1953.1),
}

PAPER: dict[str, dict[str, dict[str, float]]] = {
    "bandits": {cell: dict(zip(BANDIT_AGENTS, row, strict=True)) for cell, row in BANDITS.items()},
    "mdps": {cell: dict(zip(MDP_AGENTS, row, strict=True)) for cell, row in MDPS.items()},
}
"""``PAPER[table][cell][agent]``: the published mean total reward."""

PAPER_SE: dict[str, dict[str, float]] = {
    "bandits": {
        **dict.fromkeys(("10,5", "10,10", "10,50"), 0.07),
        **{"100,5": 0.52, "100,10": 0.41, "100,50": 0.39},
        **{"500,5": 2.6, "500,10": 2.1, "500,50": 1.9},
    },
    "mdps": {"10": 0.7, "25": 1.8, "50": 3.6, "75": 5.4, "100": 7.2},
}
"""``PAPER_SE[table][cell]``: standard error of a published number, a mean over 1,000 tasks (it is not in the paper: it is that of
agents that play well; for MDPs of the known-task optimum, the spread of tasks alone)."""
