"""Settings of `recipes.bandit` as a rule: what follows from the numbers of arms and pulls.

Made from trainings of (k, n) = (20, 60), with one of (10, 100) beside it, at 6 and 12 M env steps; `recipes.rule_check` holds it
against UCB1 on cells that it was not made from. Shares of UCB1 at (20, 60) after 6 M steps: minibatches of 128 trials 97.2 %, of 64
98.5 %, of 32 and 16 98.7 %; with those of 128 and no discount 96.5 %, with lambda 0.97 beside it 95.8 %.
"""

from math import log2, sqrt
from typing import Any, Literal

from recipes.experiment import Learning, Network, Told

__all__ = ["LearnsFrom", "bandit_settings"]

#: What training learns from; the agent itself sees rewards alone, in either way.
LearnsFrom = Literal["rewards", "task"]

TRIALS = 1024


def bandit_settings(arms: int = 5, pulls: int = 10, learns_from: LearnsFrom = "task") -> dict[str, Any]:
    """Network, learning and what training is told, for bandits of ``arms`` arms and trials of ``pulls`` pulls.

    Examples:
        >>> settings = bandit_settings(arms=10, pulls=100)
        >>> settings["learning"].env_steps, settings["learning"].minibatches, settings["network"].memory_steps
        (10000000, 32, 100)
    """
    arms, pulls, is_told = max(arms, 1), max(pulls, 1), learns_from == "task"
    network = Network(
        units=64,
        num_cells=(128,),
        memory_steps=pulls,  # the slowest units remember the whole trial from the start
        input_gain=3.0,
        critic_keys=("time_left", "task") if is_told else ("time_left",),
    )
    learning = Learning(
        trials=TRIALS,
        minibatches=minibatches(pulls),
        # More arms and longer trials are more to learn; without the task it is drowned in the noise of rewards for longer.
        env_steps=round((1 if is_told else 2) * (3_000_000 + 20_000 * pulls + 5_000 * arms * pulls)),
        gamma=1 - 1 / (2 * pulls),  # what an exploring pull finds pays to the end of the trial
        lmbda=0.9,
        # Exploring is worth more the longer the trial; the entropy of a choice among many arms is large by itself.
        entropy=min(0.04, 0.01 * sqrt(pulls / arms)),
    )
    return {"network": network, "learning": learning, "told": Told(regret=is_told)}


def minibatches(pulls: int) -> int:
    """Minibatches of a pass, a power of 2, so that each holds 2,000 to 4,000 steps; for short trials fewer steps."""
    return 2 ** min(6, max(3, round(log2(pulls / 2.5))))
