"""Thompson sampling for Bernoulli bandits, and its optimistic variant.

Both start from Beta(1, 1), so an arm's posterior after ``s`` successes and ``f`` failures is Beta(s + 1, f + 1).
"""

import torch
from torch import Generator, Tensor

from rl2_torchrl.baselines.bandits import play

__all__ = ["optimistic_thompson_sampling", "thompson_sampling"]

BLOCK_SIZE = 50_000
"""Posterior samples drawn at a time: in the processor's cache, sampling is several times faster than outside."""


def thompson_sampling(means: Tensor, num_pulls: int, generator: Generator | None = None) -> Tensor:
    """Pull the best arm of one posterior sample (Thompson 1933), from Beta(1, 1) priors.

    Args:
        means: success probability of each arm, must have shape ``[num_tasks, num_arms]``.
        num_pulls: pulls a trial.
        generator: the only source of randomness, on the device of ``means``; None for torch's own.

    Returns:
        Rewards of 0 or 1, shape ``[num_tasks, num_pulls]``.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> rewards = thompson_sampling(torch.tensor([[0.0, 1.0]]), 100, generator)
        >>> bool(rewards[:, 50:].mean() > 0.9)
        True
    """
    return optimistic_thompson_sampling(means, num_pulls, generator, num_samples=1)


def optimistic_thompson_sampling(
    means: Tensor,
    num_pulls: int,
    generator: Generator | None = None,
    *,
    num_samples: int = 10,
) -> Tensor:
    """Pull the best arm of the likeliest of several posterior samples (Duan et al. 2016, "OTS").

    Each pull draws ``num_samples`` joint samples, one mean for every arm in each, keeps the one of highest posterior density
    and pulls its best arm: nearer to greedy the more samples there are. One sample is Thompson sampling. (Another algorithm of
    this name, May et al. 2012, raises each arm's sample to the posterior mean where it is below that.)

    The time of a pull is proportional to ``num_tasks * num_arms * num_samples``.

    Args:
        means: success probability of each arm, must have shape ``[num_tasks, num_arms]``.
        num_pulls: pulls a trial.
        generator: the only source of randomness, on the device of ``means``; None for torch's own.
        num_samples: joint samples a pull, 1 or more; the paper takes the best of 1, 10 and 50 (``tune``).

    Returns:
        Rewards of 0 or 1, shape ``[num_tasks, num_pulls]``.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> rewards = optimistic_thompson_sampling(torch.tensor([[0.0, 1.0]]), 100, generator, num_samples=10)
        >>> bool(rewards[:, 50:].mean() > 0.9)
        True
    """
    if num_samples < 1:
        raise ValueError(
            f"num_samples={num_samples} leaves no sample to pull the best arm of. Pass 1 (Thompson sampling) or more, or the "
            "result of tune(optimistic_thompson_sampling, means, num_pulls)."
        )

    def choose(successes: Tensor, failures: Tensor, pull: int) -> Tensor:
        tasks_a_block = max(1, BLOCK_SIZE // (num_samples * successes.shape[-1]))
        blocks = zip(successes.split(tasks_a_block), failures.split(tasks_a_block), strict=True)
        return torch.cat([_best_arm_of_likeliest_sample(*block, num_samples, generator) for block in blocks])

    return play(means, num_pulls, choose, generator)


def _best_arm_of_likeliest_sample(
    successes: Tensor, failures: Tensor, num_samples: int, generator: Generator | None
) -> Tensor:
    """Arms [num_tasks] for counts [num_tasks, num_arms]."""
    successes, failures = (counts.expand(num_samples, *counts.shape) for counts in (successes, failures))
    # Gamma variates a, b make the Beta variate a / (a + b); their logarithms give its density as well.
    log_a = _sample_log_gamma(successes + 1, generator)  # [num_samples, num_tasks, num_arms]
    log_b = _sample_log_gamma(failures + 1, generator)
    log_sum = torch.logaddexp(log_a, log_b)
    # Beta(s + 1, f + 1) at x, but for a constant of the posterior: s log(x) + f log(1 - x).
    log_density = successes * (log_a - log_sum) + failures * (log_b - log_sum)
    likeliest = log_density.sum(-1).argmax(0, keepdim=True)  # [1, num_tasks]
    best_arms = (log_a - log_b).argmax(-1)  # the logit of x, which has the order of x: [num_samples, num_tasks]
    return best_arms.gather(0, likeliest).squeeze(0)


def _sample_log_gamma(alpha: Tensor, generator: Generator | None) -> Tensor:
    """Logarithms of Gamma(alpha, 1) variates, ``alpha >= 1`` (Marsaglia and Tsang 2000, section 2).

    torch.distributions takes no generator, and draws one number at a time.
    """
    # The rejection of a tenth at most is drawn again by recursion. The floor stands for v <= 0, which is always rejected.
    d = alpha - 1 / 3
    x = torch.randn(alpha.shape, generator=generator, device=alpha.device)
    v = (1 + x * (9 * d).rsqrt()).clamp_min(1e-7).pow(3)
    log_v = v.log()
    u = torch.rand(alpha.shape, generator=generator, device=alpha.device)
    log_gamma = d.log() + log_v
    rejected = u.log() >= 0.5 * x * x + d * (1 - v + log_v)
    if rejected.any():
        log_gamma[rejected] = _sample_log_gamma(alpha[rejected], generator)
    return log_gamma
