"""Settings of `recipes.bandit` and `recipes.tabular_mdp` as rules: what follows from the sizes of a task and of a trial.

The bandits' was made from trainings of (k, n) = (20, 60) and (24, 90), with one of (10, 100) beside them; that of MDPs from
trainings at n = 10, which `recipes/results/paper_tables.md` has. `recipes.rule_check` holds them against classical agents on cells
that they were not made from. Shares of UCB1: by returns at (20, 60) after 6 M steps with minibatches of 128 trials 97.2 %, of 64
98.5 %, of 32 and 16 98.7 %; with those of 128 and no discount 96.5 %, with lambda 0.97 beside it 95.8 %. By the index at (24, 90)
after 8 M steps with 64 units 99.3 % in 3.2 minutes, with 128 99.7 % in 7.0.
"""

from dataclasses import replace
from math import log2, sqrt
from typing import Any, Literal

from recipes.settings import FirstWeights, Learning, Network, Told

__all__ = ["LearnsFrom", "bandit_settings", "mdp_settings"]

#: What training learns from; the agent itself sees rewards alone, in either way.
LearnsFrom = Literal["rewards", "task"]

TRIALS = 1024
#: Pulls from which on a trial is long.
LONG = 30
BY_INDEX = Told(posterior=True, belief=300.0, optimism=1.3, optimism_after=0.2)
#: Of perfect memory by posterior means and such a bonus, optimism / sqrt(1 + n), 4,000 tasks: (5, 100) 78.6, 78.8 and 78.5 with
#: optimism 0.3, 0.4, 0.5; (10, 100) 83.7, 83.5, 83.1; (50, 100) 84.0, 85.1 and 85.0 with 0.2, 0.3 and 0.4.
BY_COUNTS = Told(seen=True, belief=300.0, optimism=0.35, optimism_after=0.2)
#: Steps of a batch of MDPs, and of an episode there.
MDP_BATCH, EPISODE_STEPS = 102_400, 10


def bandit_settings(arms: int = 5, pulls: int = 10, learns_from: LearnsFrom = "task") -> dict[str, Any]:
    """Network, first weights, learning and what training is told, for bandits of ``arms`` arms and trials of ``pulls`` pulls.

    In short trials regrets, or rewards, teach over the whole trial what exploring is worth. In long ones that drowns: an agent that
    always takes the highest sum of its posterior's mean and 1.3 standard deviations earns about what tuned UCB1 does, and is learnt
    pull by pull, without a horizon. By rewards alone a bonus for what was seldom pulled stands for the deviations.

    Examples:
        >>> settings = bandit_settings(arms=10, pulls=100)
        >>> settings["learning"].env_steps, settings["learning"].minibatches, settings["first_weights"].memory_steps
        (5500000, 32, 100)
        >>> settings["told"].optimism, bandit_settings(arms=10, pulls=100, learns_from="rewards")["told"].optimism
        (1.3, 0.35)
    """
    arms, pulls = max(arms, 1), max(pulls, 1)
    network = Network(units=64, num_cells=(128,), critic_keys=("time_left",))
    # The slowest units remember the whole trial from the start.
    first = {"first_weights": FirstWeights(memory_steps=pulls, input_gain=3.0)}
    learning = Learning(trials=TRIALS, minibatches=minibatches(pulls))
    is_told = learns_from == "task"
    if pulls >= LONG:
        told = BY_INDEX if is_told else BY_COUNTS
        return {"network": network, **first, "learning": _by_index(learning, arms, pulls, is_told), "told": told}
    return {
        "network": replace(network, critic_keys=("time_left", "task")) if is_told else network,
        **first,
        "learning": _by_returns(learning, arms, pulls, is_told),
        "told": Told(regret=is_told),
    }


def _by_index(learning: Learning, arms: int, pulls: int, is_told: bool) -> Learning:
    # What rewards teach of a choice has the noise that a posterior's means have not.
    env_steps = (1 if is_told else 2) * (3_000_000 + 2_500 * arms * pulls)
    return replace(learning, env_steps=env_steps, gamma=0.5, lmbda=0.0, entropy=0.02)


def _by_returns(learning: Learning, arms: int, pulls: int, is_told: bool) -> Learning:
    return replace(
        learning,
        # More arms and longer trials are more to learn; without the task it is drowned in the noise of rewards for longer.
        env_steps=round((1 if is_told else 2) * (3_000_000 + 20_000 * pulls + 5_000 * arms * pulls)),
        gamma=1 - 1 / (2 * pulls),  # what an exploring pull finds pays to the end of the trial
        lmbda=0.9,
        # Exploring is worth more the longer the trial; the entropy of a choice among many arms is large by itself.
        entropy=min(0.04, 0.01 * sqrt(pulls / arms)),
    )


def minibatches(pulls: int) -> int:
    """Minibatches of a pass, a power of 2, so that each holds 2,000 to 4,000 steps; for short trials fewer steps."""
    return 2 ** min(6, max(3, round(log2(pulls / 2.5))))


def mdp_settings(
    states: int = 10, actions: int = 5, episodes: int = 10, learns_from: LearnsFrom = "task"
) -> dict[str, Any]:
    """Network, first weights, learning, and what training is told, for MDPs and trials of ``episodes`` episodes.

    Who remembers all rewards and always takes the best action for the state at hand earns more than all classical agents: what is
    hard to learn is the memory, not the plan. A short horizon leaves the advantages little noise. The entropy bonus is large,
    because memories of actions that are never tried are worth nothing; with 0.01 learning stopped at 107 of 158.

    Examples:
        >>> settings = mdp_settings(episodes=25)
        >>> settings["learning"].env_steps, settings["learning"].trials, settings["told"].optimism
        (22135944, 512, 0.8)
    """
    pairs, episodes, is_told = max(states * actions, 1), max(episodes, 1), learns_from == "task"
    longer = sqrt(episodes / 10)
    # The wider layer picks what is remembered for the state that the agent is in.
    network = Network(units=128, num_cells=(256,), critic_keys=("time_left",))
    learning = Learning(
        trials=2 ** max(7, round(log2(MDP_BATCH / (episodes * EPISODE_STEPS)))),
        # What rewards teach of a choice has the noise that a posterior's means have not.
        env_steps=round((280_000 if is_told else 560_000) * pairs * longer),
        lr=3e-3,
        gamma=0.5,
        lmbda=0.0,
        epochs=2,
        minibatches=32,
        entropy=(0.12 if is_told else 0.09) / longer,
    )
    # Optimism stands for what exploring is worth later; from the start it slowed the memory.
    told = Told(belief=30.0, posterior=is_told, seen=not is_told, optimism=0.8, optimism_after=0.3)
    return {
        "network": network,
        "first_weights": FirstWeights(memory_steps=30, input_gain=2.0, gate_gain=6.0),
        "learning": learning,
        "told": told,
    }
