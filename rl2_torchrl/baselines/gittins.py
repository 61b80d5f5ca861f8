"""Gittins indices of Bernoulli arms with Beta posteriors, computed, and the agent that pulls the arm of the highest.

For pulls without end, discounted by ``gamma`` each, pulling the arm of the highest index is the Bayes optimum (Gittins 1979).
A trial has an end and no discount, so there the agent is a heuristic and ``gamma`` a constant to tune.

The index of an arm is the sure reward a pull, the *rate*, for which one would as well leave the arm for good as pull it once
more and go on with the choice (calibration: Gittins, Glazebrook and Weber 2011, section 8.4). With values in units of a
reward a pull, that is ``1 - gamma`` times the discounted sum, and ``mean = (s + 1) / (s + f + 2)`` after ``s`` successes and
``f`` failures,

    pull(s, f) = (1 - gamma) mean + gamma (mean value(s + 1, f) + (1 - mean) value(s, f + 1))
    value(s, f) = max(rate, pull(s, f))

by backward induction from a horizon far away, where ``value = max(rate, mean)`` as if nothing were learnt any more. One
induction serves all arms at once, and many rates side by side; an arm's index is where ``pull - rate`` changes sign.

Far from the rate there is nothing to compute: an arm of much lower mean is left at once, one of much higher mean never. So
beyond the counts asked for, the induction keeps a band around the rate, sqrt(horizon) successes to either side or two standard
deviations of the mean, which makes a horizon of 20,000 pulls a matter of seconds (and moves no index by more than 1e-8).
"""

import hashlib
import math
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Generator, Tensor
from torchrl import torchrl_logger

from rl2_torchrl.baselines.bandits import check_tasks, play
from rl2_torchrl.kernels import cache_folder
from rl2_torchrl.storage import DamagedFileError, load_tree, save_tree

__all__ = ["gittins_agent", "gittins_indices"]

NUM_RATES = 1000
"""Rates between which an index is interpolated: its error is below 3e-4, a hundredth of what it is above the mean."""

RATES_A_BLOCK = 125
"""Rates of one induction: the band of so many fits the processor's cache."""

TABLE_PULLS = 500
"""Tables are kept for multiples of so many pulls, as most of their time goes into the pulls beyond them."""

MAX_GAMMA = 0.9999


def gittins_agent(means: Tensor, num_pulls: int, generator: Generator | None = None, *, gamma: float = 0.99) -> Tensor:
    """Pull the arm of the highest Gittins index (Gittins 1979), from Beta(1, 1) priors; ties go to the lowest arm index.

    The indices are computed once, in seconds, or half a minute at ``gamma=0.9999``, and then kept in the cache folder,
    ``$XDG_CACHE_HOME/rl2_torchrl`` (by default ``~/.cache/rl2_torchrl``).

    Args:
        means: success probability of each arm, must have shape ``[num_tasks, num_arms]``.
        num_pulls: pulls a trial.
        generator: the only source of randomness, on the device of ``means``; None for torch's own.
        gamma: discount per pull; the more pulls there are, the nearer to 1 the best one is.

    Returns:
        Rewards of 0 or 1, shape ``[num_tasks, num_pulls]``.

    Example:
        >>> import torch
        >>> gittins_agent(torch.tensor([[0.0, 0.0, 1.0]]), 4, gamma=0.9)
        tensor([[0., 0., 1., 1.]])
    """
    check_tasks(means, num_pulls, generator)
    _check_gamma(gamma)
    size = TABLE_PULLS * math.ceil(num_pulls / TABLE_PULLS)
    table = _stored_table(size, gamma).to(means.device, torch.float32).flatten()

    def choose(successes: Tensor, failures: Tensor, pull: int) -> Tensor:
        return table[successes.long() * size + failures.long()].argmax(-1)

    return play(means, num_pulls, choose, generator)


def gittins_indices(num_pulls: int, gamma: float) -> Tensor:
    """Gittins index after each number of successes and failures that may precede one of ``num_pulls`` pulls.

    The index is too low by the truncation at the horizon, and too high by the interpolation between rates: at ``gamma=0.9999``
    by 6e-5 and 3e-4 at most (a longer horizon and more rates tell), and by far less at few counts.

    Args:
        num_pulls: pulls a trial.
        gamma: discount per pull, from 0 to 0.9999.

    Returns:
        Indices of shape ``[num_pulls, num_pulls]``, float64: ``[s, f]`` for a posterior Beta(s + 1, f + 1); NaN where
        ``s + f >= num_pulls``.

    Example:
        >>> gittins_indices(3, gamma=0.9)  # Gittins et al. 2011 have 0.7029, 0.5001, 0.8001, ...
        tensor([[0.7029, 0.5001, 0.3796],
                [0.8001, 0.6346,    nan],
                [0.8452,    nan,    nan]], dtype=torch.float64)
    """
    if num_pulls < 1:
        raise ValueError(f"num_pulls={num_pulls} leaves no pull to have an index for. Pass num_pulls >= 1.")
    _check_gamma(gamma)
    # Denser towards 0 and 1, as the standard deviation sqrt(rate (1 - rate)) of a reward is smaller there.
    rates = torch.linspace(0, math.pi / 2, NUM_RATES, dtype=torch.float64).sin().square().unsqueeze(-1)
    values = torch.cat([_values_after(num_pulls, block, gamma) for block in rates.split(RATES_A_BLOCK)])
    indices = rates.new_full((num_pulls, num_pulls), math.nan)
    for pulls in reversed(range(num_pulls)):
        successes = torch.arange(pulls + 1)
        mean = _mean(successes, pulls)
        pull = _pull_value(mean.expand(NUM_RATES, -1), values[:, :-1], values[:, 1:], gamma)  # [NUM_RATES, pulls + 1]
        indices[successes, pulls - successes] = _sign_change(pull - rates, rates.squeeze(-1))
        values = torch.maximum(pull, rates)
    return indices


def _values_after(pulls: int, rates: Tensor, gamma: float) -> Tensor:
    """Values of arms pulled ``pulls`` times, [num_rates, pulls + 1 successes], at ``rates`` [num_rates, 1]."""
    horizon = pulls + max(1000, round(2 / (1 - gamma)))
    width = math.ceil(math.sqrt(horizon))
    offsets = torch.arange(-width, width + 1, dtype=rates.dtype)
    center = _successes_at(rates, horizon)  # of the band, [num_rates, 1]
    mean = _mean(center + offsets, horizon)  # [num_rates, band]
    # A column on either side of the band: arms left for good, and arms pulled for ever.
    values = torch.cat([rates, torch.maximum(mean, rates), rates], -1)
    for level in reversed(range(pulls, horizon)):
        values[:, -1:] = _mean(center + width + 1, level + 1)
        # One pull less has as many successes in the middle, or one less: a shift to the right or none.
        previous, center = center, _successes_at(rates, level)
        shifted = torch.where(previous > center, values[:, :-1], values[:, 1:])  # [num_rates, band + 1]
        pull = _pull_value(_mean(center + offsets, level), shifted[:, :-1], shifted[:, 1:], gamma)
        torch.maximum(pull, rates, out=values[:, 1:-1])
    successes = torch.arange(pulls + 1)
    column = (successes - center + width + 1).long()  # [num_rates, pulls + 1]
    last = values.shape[-1] - 1
    # Beyond the band an arm is worth its mean or the rate, whichever is higher.
    beyond = torch.maximum(_mean(successes, pulls), rates)
    inside = values.gather(-1, column.clamp(0, last))
    return torch.where((column > 0) & (column < last), inside, beyond)


def _pull_value(mean: Tensor, after_failure: Tensor, after_success: Tensor, gamma: float) -> Tensor:
    following = torch.lerp(after_failure, after_success, mean)
    return torch.lerp(mean, following, gamma)  # (1 - gamma) mean + gamma following


def _mean(successes: Tensor, pulls: int) -> Tensor:
    """Posterior mean; the clamp is for counts that cannot be, at the ends of a band."""
    return (successes.double() + 1).div_(pulls + 2).clamp_(0, 1)


def _successes_at(rates: Tensor, pulls: int) -> Tensor:
    """Most successes with a posterior mean no higher than the rate."""
    return (rates * (pulls + 2)).floor() - 1


def _sign_change(advantage: Tensor, rates: Tensor) -> Tensor:
    """Rate where ``advantage`` [num_rates, n] of pulling falls to 0, between the ``rates`` [num_rates]: shape [n]."""
    after = (advantage > 0).sum(0)  # the advantage is positive at rate 0 and negative at 1
    before = after - 1
    left, right = (advantage.gather(0, i.unsqueeze(0)).squeeze(0) for i in (before, after))
    return torch.lerp(rates[before], rates[after], left / (left - right))


@cache
def _stored_table(num_pulls: int, gamma: float) -> Tensor:
    """:func:`gittins_indices`, from the cache folder if it is there."""
    # A new version of this file makes new tables.
    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    name = f"gittins-{num_pulls}-{gamma}-{version}.safetensors"
    # No table, a damaged one, or no folder: a new one is made; if it cannot be kept either, that is said.
    with suppress(OSError):
        try:
            return load_tree(cache_folder() / name)
        except DamagedFileError as error:
            torchrl_logger.warning(f"rl2_torchrl: {error} It is made anew.")
    torchrl_logger.info(
        f"rl2_torchrl: computing Gittins indices for gamma={gamma} once, into {name} of the cache folder"
    )
    indices = gittins_indices(num_pulls, gamma)
    try:
        save_tree(indices, cache_folder() / name)
    except OSError as error:
        torchrl_logger.warning(f"rl2_torchrl: the Gittins indices could not be kept for the next time. {error}")
    return indices


def _check_gamma(gamma: float) -> None:
    # Written so that a NaN fails too.
    if not 0 <= gamma <= MAX_GAMMA:
        raise ValueError(
            f"gamma={gamma} is not between 0 and {MAX_GAMMA}: without discount there is no index, and near it the horizon is "
            f"too far to compute. Pass one of 0.9, 0.99, 0.999 and 0.9999, or the result of tune(gittins_agent, means, num_pulls)."
        )
