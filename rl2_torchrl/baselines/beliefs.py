"""What an agent knows of tabular MDPs: counts of what it has seen, the posterior's mean, samples from the posterior."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

__all__ = ["Experience", "posterior_mean", "sample_posterior"]


@dataclass
class Experience:
    """Counts of all steps so far.

    The step that ends an episode counts as a visit and pays a reward, but leads nowhere.

    Args:
        visits: steps with each action in each state, shape ``[num_tasks, num_states, num_actions]``.
        reward_sum: sum of the rewards of these steps, the same shape.
        successors: how often each state came next, shape ``[num_tasks, num_states, num_actions, num_states]``.
    """

    visits: Tensor
    reward_sum: Tensor
    successors: Tensor

    @classmethod
    def none_of(cls, transitions: Tensor) -> "Experience":
        """No experience, for MDPs of the shape of ``transitions``."""
        pairs = transitions.shape[:-1]
        zeros = transitions.new_zeros
        return cls(zeros(pairs), zeros(pairs), zeros(transitions.shape))

    def add(self, pair: Tensor, reward: Tensor, successor: Tensor | None) -> None:
        """Count one step of every task.

        Args:
            pair: index ``state * num_actions + action``, shape ``[num_tasks]``.
            reward: rewards, shape ``[num_tasks]``.
            successor: next states, shape ``[num_tasks]``; None on the step that ends an episode.
        """
        tasks = torch.arange(len(pair), device=pair.device)
        self.visits.flatten(1)[tasks, pair] += 1
        self.reward_sum.flatten(1)[tasks, pair] += reward
        if successor is not None:
            self.successors.flatten(1, 2)[tasks, pair, successor] += 1


def posterior_mean(
    experience: Experience, prior_mean: float, precision: float, concentration: float
) -> tuple[Tensor, Tensor]:
    """Posterior means of the mean rewards ``[N, S, A]`` and of the transition probabilities ``[N, S, A, S]``.

    Args:
        experience: counts.
        prior_mean: mean of the normal prior of every mean reward.
        precision: its precision, in observations (the noise of a reward has precision 1).
        concentration: of the symmetric Dirichlet prior of the transitions, in observations of each next state.
    """
    rewards = (prior_mean * precision + experience.reward_sum) / (precision + experience.visits)
    weights = experience.successors + concentration
    return rewards, weights / weights.sum(-1, keepdim=True)


def sample_posterior(experience: Experience, prior_mean: float, generator: Generator | None) -> tuple[Tensor, Tensor]:
    """One sample of mean rewards ``[N, S, A]`` and transitions ``[N, S, A, S]``, from N(prior_mean, 1) and Dirichlet(1) priors."""
    precision = 1 + experience.visits
    noise = torch.randn(precision.shape, generator=generator, device=precision.device)
    rewards = (prior_mean + experience.reward_sum) / precision + noise * precision.rsqrt()
    weights = _sample_gamma(experience.successors, generator)
    return rewards, weights.div_(weights.sum(-1, keepdim=True))


def _sample_gamma(counts: Tensor, generator: Generator | None) -> Tensor:
    """Gamma(1 + counts) samples, over whose sum they are Dirichlet.

    ``torch._standard_gamma`` takes ten times as long, and this is most of what posterior sampling costs: where nothing
    has been counted yet, in most places, the sample is a plain exponential.
    """
    samples = _uniform(counts.shape, counts, generator).neg_().log1p_().neg_()
    counted = counts.flatten().nonzero().squeeze(-1)
    samples.view(-1)[counted] = _marsaglia_tsang(counts.flatten()[counted] + 1, generator)
    return samples


def _marsaglia_tsang(alpha: Tensor, generator: Generator | None) -> Tensor:
    """Gamma(alpha) samples for ``alpha`` ``[n]`` of at least 1, by rejection (Marsaglia and Tsang 2000, section 4)."""
    d = alpha - 1 / 3
    x = torch.randn(alpha.shape, generator=generator, device=alpha.device)
    v = (1 + x * (9 * d).rsqrt()).clamp_(min=0) ** 3  # at 0 the logarithm below is -inf, which is never accepted
    log_uniform = _uniform(alpha.shape, alpha, generator).neg_().log1p_()
    samples = d * v
    rejected = (log_uniform >= 0.5 * x * x + d * (1 - v + v.log())).nonzero().squeeze(-1)
    if len(rejected):
        samples[rejected] = _marsaglia_tsang(alpha[rejected], generator)
    return samples


def _uniform(shape: torch.Size, like: Tensor, generator: Generator | None) -> Tensor:
    return torch.rand(shape, generator=generator, device=like.device, dtype=like.dtype)
