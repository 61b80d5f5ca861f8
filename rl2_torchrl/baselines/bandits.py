"""Classical agents for Bernoulli bandits, played on a batch of tasks at once.

The definitions are those behind table 1 of Duan et al. 2016 (arXiv:1611.02779): greedy, ε-greedy and UCB1
start from a prior of two pulls with one success per arm (the posterior mean under Beta(1, 1)). Constants are chosen by ``tune``.
The mean total reward of an agent is ``agent(means, num_pulls).sum(-1).mean()``.
"""

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from rl2_torchrl.arguments import require_generator, require_torch, whole

__all__ = [
    "check_tasks",
    "epsilon_greedy",
    "greedy",
    "play",
    "random_agent",
    "ucb1",
]

ChooseArms = Callable[[Tensor, Tensor, int], Tensor]
"""``(successes, failures, pull) -> arms``, with the shapes that :func:`play` gives."""


def play(means: Tensor, num_pulls: int, choose: ChooseArms, generator: Generator | None = None) -> Tensor:
    """Play one trial on every task with the arms that ``choose`` picks from the counts.

    Args:
        means: success probability of each arm, must have shape ``[num_tasks, num_arms]``.
        num_pulls: pulls a trial.
        choose: ``(successes, failures, pull) -> arms``. The counts of the trial so far have shape
            ``[num_tasks, num_arms]`` and include no prior; ``pull`` is 1 on the first pull;
            ``arms`` has shape ``[num_tasks]`` and dtype int64.
        generator: the only source of randomness, on the device of ``means``; None for torch's own.

    Returns:
        Rewards of 0 or 1, float32, shape ``[num_tasks, num_pulls]``.

    Example:
        >>> import torch
        >>> always_last = lambda successes, failures, pull: successes.new_full((1,), 1).long()
        >>> play(torch.tensor([[0.0, 1.0]]), 3, always_last)
        tensor([[1., 1., 1.]])
    """
    check_tasks(means, num_pulls, generator)
    # Half precision would round both the means and, past 256 pulls, the counts.
    means = means.float()
    successes, failures = torch.zeros_like(means), torch.zeros_like(means)
    rewards = means.new_empty(means.shape[0], num_pulls)
    for pull in range(num_pulls):
        arms = choose(successes, failures, pull + 1).unsqueeze(-1)  # [num_tasks, 1]
        reward = _reward(means.gather(-1, arms), generator)  # [num_tasks, 1]
        successes.scatter_add_(-1, arms, reward)
        failures.scatter_add_(-1, arms, 1 - reward)
        rewards[:, pull] = reward.squeeze(-1)
    return rewards


def check_tasks(means: Tensor, num_pulls: int, generator: Generator | None) -> None:
    """Raise ValueError or TypeError unless agents can play ``num_pulls`` on ``means``, [num_tasks, num_arms]."""
    require_torch(means=means)
    require_generator(generator)
    whole("num_pulls", num_pulls)
    if means.ndim != 2 or means.shape[-1] == 0:
        raise ValueError(
            f"means has shape {list(means.shape)}, not [num_tasks, num_arms] with one arm or more: "
            "agents play a batch of tasks. For a single task pass means.unsqueeze(0)."
        )
    if not means.is_floating_point():
        raise ValueError(
            f"means has dtype {means.dtype}, which cannot hold probabilities between 0 and 1. Pass means.float()."
        )
    # Written so that a NaN fails too.
    if not bool(((means >= 0) & (means <= 1)).all()):
        raise ValueError(
            "means has entries outside [0, 1] or NaN: they are the success probabilities of "
            "Bernoulli arms. Pass probabilities, for example torch.rand(num_tasks, num_arms)."
        )


def random_agent(means: Tensor, num_pulls: int, generator: Generator | None = None) -> Tensor:
    """Pull an arm uniformly at random, whatever came of it (Duan et al. 2016, "Random").

    Args:
        means: success probability of each arm, must have shape ``[num_tasks, num_arms]``.
        num_pulls: pulls a trial.
        generator: the only source of randomness, on the device of ``means``; None for torch's own.

    Returns:
        Rewards of 0 or 1, shape ``[num_tasks, num_pulls]``.

    Example:
        >>> import torch
        >>> random_agent(torch.ones(2, 5), 3)
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """

    def choose(successes: Tensor, failures: Tensor, pull: int) -> Tensor:
        num_tasks, num_arms = successes.shape
        return torch.randint(num_arms, (num_tasks,), generator=generator, device=means.device)

    return play(means, num_pulls, choose, generator)


def greedy(means: Tensor, num_pulls: int, generator: Generator | None = None) -> Tensor:
    """Pull the arm of the best empirical mean (Duan et al. 2016, "Greedy").

    The mean counts the two prior pulls with their one success; ties go to the lowest arm index.

    Args:
        means: success probability of each arm, must have shape ``[num_tasks, num_arms]``.
        num_pulls: pulls a trial.
        generator: the only source of randomness, on the device of ``means``; None for torch's own.

    Returns:
        Rewards of 0 or 1, shape ``[num_tasks, num_pulls]``.

    Example:
        >>> import torch
        >>> greedy(torch.tensor([[0.0, 0.0, 1.0]]), 4)
        tensor([[0., 0., 1., 1.]])
    """
    return ucb1(means, num_pulls, generator, exploration=0.0)


def ucb1(
    means: Tensor,
    num_pulls: int,
    generator: Generator | None = None,
    *,
    exploration: float = 0.2,
) -> Tensor:
    """Pull the arm of the highest upper confidence bound (UCB1: Auer et al. 2002).

    The score after ``t`` pulls is ``s / m + c * sqrt(2 * ln(t) / m)``, with ``m`` pulls and ``s`` successes of the arm, the two
    prior pulls with their one success among them; ties go to the lowest arm index. The first pull, where ``ln(0)`` is none, has
    no bonus.
    Auer et al. have ``c = 1`` and pull every arm once first; Duan et al. 2016 take the best ``c`` of 0, 0.1, ..., 1 (``tune``)
    and have the prior in place of the first round. (With one prior pull and half a success, 500 pulls of 50 arms would earn
    451 in place of their 457.6.)

    Args:
        means: success probability of each arm, must have shape ``[num_tasks, num_arms]``.
        num_pulls: pulls a trial.
        generator: the only source of randomness, on the device of ``means``; None for torch's own.
        exploration: the constant ``c``, at least 0.

    Returns:
        Rewards of 0 or 1, shape ``[num_tasks, num_pulls]``.

    Example:
        >>> import torch
        >>> ucb1(torch.tensor([[1.0, 0.0]]), 4, exploration=2.0)
        tensor([[1., 1., 0., 1.]])
    """
    if not 0 <= exploration < math.inf:
        raise ValueError(
            f"exploration={exploration} is not a finite number of at least 0: the bound would fall "
            "below the empirical mean. Pass 0 (greedy) or more, or the result of "
            "tune(ucb1, means, num_pulls)."
        )

    def choose(successes: Tensor, failures: Tensor, pull: int) -> Tensor:
        pulls = successes + failures + 2
        bonus = exploration * (2 * math.log(max(1, pull - 1)) / pulls).sqrt()
        return (_posterior_mean(successes, failures) + bonus).argmax(-1)

    return play(means, num_pulls, choose, generator)


def epsilon_greedy(
    means: Tensor,
    num_pulls: int,
    generator: Generator | None = None,
    *,
    epsilon: float = 0.1,
) -> Tensor:
    """Pull an arm uniformly at random with probability ``epsilon``, else as :func:`greedy` (Duan et al. 2016, "ε-greedy").

    The random arm is any of all arms, the greedy one among them.

    Args:
        means: success probability of each arm, must have shape ``[num_tasks, num_arms]``.
        num_pulls: pulls a trial.
        generator: the only source of randomness, on the device of ``means``; None for torch's own.
        epsilon: the probability, from 0 to 1; the paper takes the best of 0, 0.1, ..., 1 (``tune``).

    Returns:
        Rewards of 0 or 1, shape ``[num_tasks, num_pulls]``.

    Example:
        >>> import torch
        >>> epsilon_greedy(torch.tensor([[0.0, 0.0, 1.0]]), 4, epsilon=0.0)
        tensor([[0., 0., 1., 1.]])
    """
    if not 0 <= epsilon <= 1:
        raise ValueError(
            f"epsilon={epsilon} is no probability: it is that of a random pull. Pass a number from 0 (greedy) to 1 (random), "
            "or the result of tune(epsilon_greedy, means, num_pulls)."
        )

    def choose(successes: Tensor, failures: Tensor, pull: int) -> Tensor:
        num_tasks, num_arms = successes.shape
        best = _posterior_mean(successes, failures).argmax(-1)
        other = torch.randint(num_arms, (num_tasks,), generator=generator, device=means.device)
        # rand is in [0, 1), so that 0 never explores and 1 always does.
        explore = torch.rand(num_tasks, generator=generator, device=means.device) < epsilon
        return torch.where(explore, other, best)

    return play(means, num_pulls, choose, generator)


def _posterior_mean(successes: Tensor, failures: Tensor) -> Tensor:
    """Mean of Beta(s + 1, f + 1), shapes as in :func:`play`."""
    return (successes + 1) / (successes + failures + 2)


def _reward(probability: Tensor, generator: Generator | None) -> Tensor:
    # rand is in [0, 1), so the strict comparison keeps means of 0 and 1 certain.
    noise = torch.rand(probability.shape, generator=generator, device=probability.device)
    return (noise < probability).to(probability.dtype)
