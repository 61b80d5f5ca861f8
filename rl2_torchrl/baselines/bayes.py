"""Exact Bayes optimum of the finite-horizon Bernoulli bandit with arm means drawn from U[0, 1].

The ceiling of what any agent, meta-learned or classical, earns on average over tasks. Dynamic
programming over posterior states (Bellman 1956): arms with equal counts are interchangeable, so a
state is the sorted tuple of each arm's ``(successes, failures)``.
"""

import torch
from torch import Generator, Tensor

from rl2_torchrl.baselines.bandits import check_tasks, play

__all__ = ["bayes_optimal", "bayes_optimal_return"]

MAX_STATES = 60_000
"""Posterior states up to which the dynamic programme runs: a matter of seconds."""

Arm = tuple[int, int]
State = tuple[Arm, ...]


def bayes_optimal_return(num_arms: int, num_pulls: int) -> float:
    """Largest expected total reward, undiscounted, of a trial on arm means from U[0, 1].

    Args:
        num_arms: arms of the bandit; any number, as no more than ``num_pulls`` can be touched.
        num_pulls: pulls a trial; up to 15 with any number of arms, more with few arms.

    Returns:
        The expected total reward of a trial. Table 1 of Duan et al. 2016 has 6.7, 6.7 and 6.8 for
        RL² at 10 pulls of 5, 10 and 50 arms, where the optimum is 6.660, 6.714 and 6.714.

    Example:
        >>> round(bayes_optimal_return(num_arms=5, num_pulls=10), 3)
        6.66
    """
    values, _ = _solve(num_arms, num_pulls)
    return values[_initial_state(num_arms, num_pulls)]


def bayes_optimal(means: Tensor, num_pulls: int, generator: Generator | None = None) -> Tensor:
    """Play the Bayes-optimal policy for arm means from U[0, 1] (see :func:`bayes_optimal_return`).

    Args:
        means: success probability of each arm, must have shape ``[num_tasks, num_arms]``.
        num_pulls: pulls a trial; up to 15 with any number of arms, more with few arms.
        generator: the only source of randomness, on the device of ``means``; None for torch's own.

    Returns:
        Rewards of 0 or 1, shape ``[num_tasks, num_pulls]``.

    Example:
        >>> import torch
        >>> bayes_optimal(torch.tensor([[0.0, 1.0]]), 4)
        tensor([[0., 1., 1., 1.]])
    """
    check_tasks(means, num_pulls, generator)
    _, policy = _solve(means.shape[-1], num_pulls)
    base = num_pulls + 1

    def choose(successes: Tensor, failures: Tensor, pull: int) -> Tensor:
        codes = (successes * base + failures).long()
        # No more than num_pulls arms can be touched: the columns beyond add nothing to the state.
        codes, order = codes.sort(dim=-1, descending=True, stable=True)
        groups, group = codes[:, :num_pulls].unique(dim=0, return_inverse=True)
        states = [tuple(divmod(code, base) for code in row) for row in groups.tolist()]
        columns = [state.index(policy[state]) for state in states]
        column = torch.tensor(columns, device=means.device)[group]  # [num_tasks]
        return order.gather(-1, column.unsqueeze(-1)).squeeze(-1)

    return play(means, num_pulls, choose, generator)


def _solve(num_arms: int, num_pulls: int) -> tuple[dict[State, float], dict[State, Arm]]:
    """Expected reward to go of every posterior state, and the arm to pull there."""
    layers = _reachable_states(num_arms, num_pulls)
    values: dict[State, float] = {}
    policy: dict[State, Arm] = {}
    for layer in reversed(layers):
        for state in layer:
            options = {arm: _pull_value(state, arm, values) for arm in state}
            policy[state] = max(options, key=options.__getitem__)
            values[state] = options[policy[state]]
    return values, policy


def _pull_value(state: State, arm: Arm, values: dict[State, float]) -> float:
    successes, failures = arm
    mean = (successes + 1) / (successes + failures + 2)  # of the posterior Beta(s + 1, f + 1)
    success, failure = _successors(state, arm)
    # A state without a value is past the last pull.
    return mean * (1 + values.get(success, 0.0)) + (1 - mean) * values.get(failure, 0.0)


def _successors(state: State, arm: Arm) -> tuple[State, State]:
    successes, failures = arm
    others = list(state)
    others.remove(arm)
    success = sorted([*others, (successes + 1, failures)], reverse=True)
    failure = sorted([*others, (successes, failures + 1)], reverse=True)
    return tuple(success), tuple(failure)


def _reachable_states(num_arms: int, num_pulls: int) -> list[list[State]]:
    """States after 0, 1, ..., ``num_pulls - 1`` pulls, in a fixed order."""
    layers = [[_initial_state(num_arms, num_pulls)]]
    num_states = 1
    while len(layers) < num_pulls:
        following: dict[State, None] = {}
        for state in layers[-1]:
            for arm in dict.fromkeys(state):
                following.update(dict.fromkeys(_successors(state, arm)))
            if num_states + len(following) > MAX_STATES:
                raise ValueError(
                    f"num_pulls={num_pulls} with num_arms={num_arms} has more than {MAX_STATES:,} "
                    "posterior states, too many to enumerate. Use fewer pulls or arms, "
                    "or compare with ucb1 and thompson_sampling, which have no such limit."
                )
        layers.append(list(following))
        num_states += len(following)
    return layers


def _initial_state(num_arms: int, num_pulls: int) -> State:
    if num_arms < 1 or num_pulls < 1:
        raise ValueError(
            f"num_arms={num_arms} and num_pulls={num_pulls} must both be 1 or more: there is no "
            "reward to expect without an arm and a pull. Pass positive integers."
        )
    # More arms than pulls cannot all be touched, and untouched ones are alike.
    return ((0, 0),) * min(num_arms, num_pulls)
