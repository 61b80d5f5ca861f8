"""Classical agents for tabular MDPs, played on a batch of tasks at once.

The definitions are those behind table 2 of Duan et al. 2016 (arXiv:1611.02779), which are TabulaRL's (Osband):
before every episode an agent makes a plan for its steps by value iteration over the episode, in the MDP that it samples,
expects or hopes for, and ties between actions are broken at random in every step. Two things are worth knowing.
The Bayesian agents' prior mean of the rewards is 0, while the tasks' mean rewards are drawn from N(1, 1): with
``prior_mean=1.0``, the truth, BEB is clearly better than the table says. And the transitions of
UCRL2 are more optimistic than those of Jaksch et al. (``carry_over`` of :func:`ucrl2`).

The agents do not know how many episodes they play: the returns of a trial of 10 episodes are the first ten of a trial of
100, so that one run gives all columns of the table, ``agent(mdps, 100).cumsum(-1).mean(0)[[9, 24, 49, 74, 99]]``.
"""

import math

import torch
from torch import Generator, Tensor

from rl2_torchrl.baselines.beliefs import Experience, posterior_mean, sample_posterior
from rl2_torchrl.baselines.mdp_trials import MDPs, play
from rl2_torchrl.baselines.planning import extended_value_iteration, value_iteration

__all__ = ["beb", "epsilon_greedy", "greedy", "opsrl", "perfect_memory", "psrl", "random_agent", "ucrl2"]


# ---------------------------------------------------------------- undirected
def random_agent(
    mdps: MDPs, num_episodes: int, generator: Generator | None = None, *, episode_steps: int = 10
) -> Tensor:
    """Take every action uniformly at random (Duan et al. 2016, "Random").

    Args:
        mdps: mean rewards ``[num_tasks, num_states, num_actions]`` and transition probabilities, see ``play``.
        num_episodes: episodes a trial.
        generator: the only source of randomness, on the device of ``mdps``; None for torch's own.
        episode_steps: steps of an episode.

    Returns:
        Returns of the episodes, shape ``[num_tasks, num_episodes]``.

    Example:
        >>> import torch
        >>> random_agent((torch.zeros(3, 2, 2), torch.full((3, 2, 2, 2), 0.5)), 4).shape
        torch.Size([3, 4])
    """
    nothing = mdps[0].new_zeros(1, 1, 1, 1)

    def make_plan(experience: Experience, episode: int) -> Tensor:
        return nothing.expand(episode_steps, *experience.visits.shape)

    return play(mdps, num_episodes, make_plan, generator, episode_steps=episode_steps)


def greedy(mdps: MDPs, num_episodes: int, generator: Generator | None = None, *, episode_steps: int = 10) -> Tensor:
    """Plan in the MDP that the counts suggest (Duan et al. 2016, "Greedy").

    Of an action never taken it expects no reward and any next state alike.

    Args:
        mdps: mean rewards ``[num_tasks, num_states, num_actions]`` and transition probabilities, see ``play``.
        num_episodes: episodes a trial.
        generator: the only source of randomness, on the device of ``mdps``; None for torch's own.
        episode_steps: steps of an episode.

    Returns:
        Returns of the episodes, shape ``[num_tasks, num_episodes]``.

    Example:
        >>> import torch
        >>> rewards = torch.tensor([[[-1e3, 1e3]]])  # at worst the first step is bad
        >>> greedy((rewards, torch.ones(1, 1, 2, 1)), 3, episode_steps=1)[0, 1:].round(decimals=-2)
        tensor([1000., 1000.])
    """
    return epsilon_greedy(mdps, num_episodes, generator, epsilon=0.0, episode_steps=episode_steps)


def epsilon_greedy(
    mdps: MDPs,
    num_episodes: int,
    generator: Generator | None = None,
    *,
    epsilon: float = 0.1,
    episode_steps: int = 10,
) -> Tensor:
    """:func:`greedy`, with a random action in a share ``epsilon`` of the steps.

    Args:
        mdps: mean rewards ``[num_tasks, num_states, num_actions]`` and transition probabilities, see ``play``.
        num_episodes: episodes a trial.
        generator: the only source of randomness, on the device of ``mdps``; None for torch's own.
        epsilon: share of random actions, between 0 and 1.
        episode_steps: steps of an episode.

    Returns:
        Returns of the episodes, shape ``[num_tasks, num_episodes]``.

    Example:
        >>> import torch
        >>> mdps = (torch.zeros(3, 2, 2), torch.full((3, 2, 2, 2), 0.5))
        >>> epsilon_greedy(mdps, 4, epsilon=0.2).shape
        torch.Size([3, 4])
    """

    def make_plan(experience: Experience, episode: int) -> Tensor:
        # A prior of next to nothing, as TabulaRL has it, decides where nothing has been seen.
        return value_iteration(*posterior_mean(experience, 0.0, 1e-4, 1e-4), episode_steps)

    return play(mdps, num_episodes, make_plan, generator, epsilon=epsilon, episode_steps=episode_steps)


def perfect_memory(
    mdps: MDPs,
    num_episodes: int,
    generator: Generator | None = None,
    *,
    optimism: float = 0.0,
    prior_mean: float = 1.0,
    episode_steps: int = 10,
) -> Tensor:
    """Take the action of the highest posterior mean reward in the state at hand, and make no plan beyond it.

    What an agent earns that remembers all rewards, and has learnt no more than to look up those of the state that it is in.

    Args:
        mdps: mean rewards ``[num_tasks, num_states, num_actions]`` and transition probabilities, see ``play``.
        num_episodes: episodes a trial.
        generator: the only source of randomness, on the device of ``mdps``; None for torch's own.
        optimism: standard deviations of the posterior that are added to its mean.
        prior_mean: mean of the normal prior of every mean reward, by default that of the tasks; its variance is 1.
        episode_steps: steps of an episode.

    Returns:
        Returns of the episodes, shape ``[num_tasks, num_episodes]``.

    Example:
        >>> import torch
        >>> rewards = torch.tensor([[[-1e3, 1e3]]])  # from the second step on it knows better
        >>> perfect_memory((rewards, torch.ones(1, 1, 2, 1)), 2, episode_steps=3)[0, 1].round(decimals=-2)
        tensor(3000.)
    """

    def make_plan(experience: Experience, episode: int) -> Tensor:
        means, _ = posterior_mean(experience, prior_mean, 1.0, 1.0)
        hoped = means + optimism * (1 + experience.visits).rsqrt()
        return hoped.expand(episode_steps, *hoped.shape)

    return play(mdps, num_episodes, make_plan, generator, episode_steps=episode_steps, plan_each_step=True)


# -------------------------------------------------------- posterior sampling
def psrl(
    mdps: MDPs,
    num_episodes: int,
    generator: Generator | None = None,
    *,
    prior_mean: float = 0.0,
    episode_steps: int = 10,
) -> Tensor:
    """Plan in one sample of the posterior (PSRL: Strens 2000; Osband, Russo and Van Roy 2013).

    The prior is N(prior_mean, 1) for mean rewards, whose noise is known to be N(0, 1), and Dirichlet(1) for transitions.

    Args:
        mdps: mean rewards ``[num_tasks, num_states, num_actions]`` and transition probabilities, see ``play``.
        num_episodes: episodes a trial.
        generator: the only source of randomness, on the device of ``mdps``; None for torch's own.
        prior_mean: prior mean of the rewards; the table has 0, the tasks' own distribution 1.
        episode_steps: steps of an episode.

    Returns:
        Returns of the episodes, shape ``[num_tasks, num_episodes]``.

    Example:
        >>> import torch
        >>> rewards = torch.tensor([[[0.0, 9.0]]])
        >>> returns = psrl((rewards, torch.ones(1, 1, 2, 1)), 50, torch.Generator().manual_seed(0))
        >>> bool(returns[0, 20:].mean() > 80)  # ten steps of 9
        True
    """
    return opsrl(mdps, num_episodes, generator, num_samples=1, prior_mean=prior_mean, episode_steps=episode_steps)


def opsrl(
    mdps: MDPs,
    num_episodes: int,
    generator: Generator | None = None,
    *,
    num_samples: int = 10,
    prior_mean: float = 0.0,
    episode_steps: int = 10,
) -> Tensor:
    """Plan in several samples of the posterior, and take each action at its best value (optimistic PSRL, Osband).

    Args:
        mdps: mean rewards ``[num_tasks, num_states, num_actions]`` and transition probabilities, see ``play``.
        num_episodes: episodes a trial.
        generator: the only source of randomness, on the device of ``mdps``; None for torch's own.
        num_samples: samples of the posterior in each episode; with 1 this is :func:`psrl`.
        prior_mean: prior mean of the rewards; the table has 0, the tasks' own distribution 1.
        episode_steps: steps of an episode.

    Returns:
        Returns of the episodes, shape ``[num_tasks, num_episodes]``.

    Example:
        >>> import torch
        >>> mdps = (torch.zeros(3, 2, 2), torch.full((3, 2, 2, 2), 0.5))
        >>> opsrl(mdps, 4, num_samples=3).shape
        torch.Size([3, 4])
    """
    if num_samples < 1:
        raise ValueError(f"num_samples={num_samples} leaves no MDP to plan in: pass 1 or more.")

    def make_plan(experience: Experience, episode: int) -> Tensor:
        plan = value_iteration(*sample_posterior(experience, prior_mean, generator), episode_steps)
        for _ in range(num_samples - 1):
            other = value_iteration(*sample_posterior(experience, prior_mean, generator), episode_steps)
            torch.maximum(plan, other, out=plan)
        return plan

    return play(mdps, num_episodes, make_plan, generator, episode_steps=episode_steps)


# ------------------------------------------------------------------ optimism
def beb(
    mdps: MDPs,
    num_episodes: int,
    generator: Generator | None = None,
    *,
    scaling: float = 1e-3,
    prior_mean: float = 0.0,
    episode_steps: int = 10,
) -> Tensor:
    """Plan in the posterior's mean, with bonuses that fall with the visits (BEB: Kolter and Ng 2009).

    After ``n`` visits and ``m`` seen next states an action's bonus is ``1 / (n + 2)``, and for each of the steps that
    follow it in the episode ``2 H² scaling · H / (1 + S + m)``, with ``H`` steps an episode and ``S`` states; the prior is
    that of :func:`psrl`.

    Args:
        mdps: mean rewards ``[num_tasks, num_states, num_actions]`` and transition probabilities, see ``play``.
        num_episodes: episodes a trial.
        generator: the only source of randomness, on the device of ``mdps``; None for torch's own.
        scaling: factor of the bonus of the transitions, at least 0.
        prior_mean: prior mean of the rewards; the table has 0, the tasks' own distribution 1.
        episode_steps: steps of an episode.

    Returns:
        Returns of the episodes, shape ``[num_tasks, num_episodes]``.

    Example:
        >>> import torch
        >>> mdps = (torch.zeros(3, 2, 2), torch.full((3, 2, 2, 2), 0.5))
        >>> beb(mdps, 4, scaling=0.01).shape
        torch.Size([3, 4])
    """
    _check_scaling(scaling)

    def make_plan(experience: Experience, episode: int) -> Tensor:
        rewards, transitions = posterior_mean(experience, prior_mean, 1.0, 1.0)
        observed = experience.successors.sum(-1) + transitions.shape[-1]  # the prior's among them
        bonus = 2 * episode_steps**3 * scaling / (1 + observed)
        return value_iteration(rewards + 1 / (2 + experience.visits), transitions, episode_steps, bonus)

    return play(mdps, num_episodes, make_plan, generator, episode_steps=episode_steps)


def ucrl2(
    mdps: MDPs,
    num_episodes: int,
    generator: Generator | None = None,
    *,
    scaling: float = 0.4,
    carry_over: bool = True,
    episode_steps: int = 10,
) -> Tensor:
    """Plan in the best MDP of a confidence set around the counts (UCRL2: Jaksch, Ortner and Auer 2010).

    In episode ``t``, with ``L = 4 ln(2 S A (t + 1) / 0.05)``, the mean reward of an action with ``n`` visits may be
    ``scaling · sqrt(L / n)`` above the empirical mean, and its transitions ``scaling · sqrt(S L / m)`` away in L1 from those
    seen ``m`` times; with 0 visits as with 1.

    Args:
        mdps: mean rewards ``[num_tasks, num_states, num_actions]`` and transition probabilities, see ``play``.
        num_episodes: episodes a trial.
        generator: the only source of randomness, on the device of ``mdps``; None for torch's own.
        scaling: factor of the radii of the confidence sets, at least 0.
        carry_over: let the optimism of the transitions add up over an episode, as in the table; False as in Jaksch et al.
        episode_steps: steps of an episode.

    Returns:
        Returns of the episodes, shape ``[num_tasks, num_episodes]``.

    Example:
        >>> import torch
        >>> mdps = (torch.zeros(3, 2, 2), torch.full((3, 2, 2, 2), 0.5))
        >>> ucrl2(mdps, 4, scaling=0.1).shape
        torch.Size([3, 4])
    """
    _check_scaling(scaling)

    def make_plan(experience: Experience, episode: int) -> Tensor:
        _, num_states, num_actions = experience.visits.shape
        log = 4 * math.log(2 * num_states * num_actions * (episode + 1) / 0.05)
        rewards, transitions = posterior_mean(experience, 0.0, 1e-4, 1e-5)
        rewards = rewards + scaling * (log / experience.visits.clamp(min=1)).sqrt()
        slack = scaling * (num_states * log / experience.successors.sum(-1).clamp(min=1)).sqrt()
        return extended_value_iteration(rewards, transitions, slack, episode_steps, carry_over)

    return play(mdps, num_episodes, make_plan, generator, episode_steps=episode_steps)


def _check_scaling(scaling: float) -> None:
    if not 0 <= scaling < math.inf:
        raise ValueError(
            f"scaling={scaling} is not a finite number of at least 0: the bonus would drive the agent away from what it "
            "does not know. Pass 0 (no bonus) or more, or a result of tune(beb, ...) or tune(ucrl2, ...)."
        )
