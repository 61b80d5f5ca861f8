"""Trials on tabular MDPs: `play`, with a plan made before every episode, on a batch of tasks at once."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from rl2_torchrl.arguments import require_generator, require_torch, whole
from rl2_torchrl.baselines.beliefs import Experience

__all__ = ["MDPs", "MakePlan", "check_mdps", "play"]

MDPs = tuple[Tensor, Tensor]
"""Mean rewards ``[num_tasks, num_states, num_actions]`` and transition probabilities
``[num_tasks, num_states, num_actions, num_states]``, as ``rl2_torchrl.envs.unpack_mdps`` gives them."""

MakePlan = Callable[[Experience, int], Tensor]
"""``(experience, episode) -> plan``: the value of every action,
``[episode_steps, num_tasks, num_states, num_actions]``; ``episode`` is 1 in the first episode."""

_TASKS_AT_ONCE = 512  # what a plan is made from then stays in the processor's cache
_TIE = 1e-4  # actions whose values are nearer than this are a tie


def play(
    mdps: MDPs,
    num_episodes: int,
    make_plan: MakePlan,
    generator: Generator | None = None,
    *,
    epsilon: float = 0.0,
    episode_steps: int = 10,
    plan_each_step: bool = False,
) -> Tensor:
    """Play one trial on every task by the plans that ``make_plan`` makes before each episode.

    Args:
        mdps: mean rewards ``[num_tasks, num_states, num_actions]`` and transition probabilities
            ``[num_tasks, num_states, num_actions, num_states]``, as ``unpack_mdps`` gives them.
        num_episodes: episodes a trial. Each begins in state 0; a reward is its mean plus N(0, 1) noise.
        make_plan: ``(experience, episode) -> plan``, see ``MakePlan``; the best action of the plan is taken. It is called
            for a part of the tasks at a time.
        generator: the only source of randomness, on the device of ``mdps``; None for torch's own.
        epsilon: share of the actions that are taken uniformly at random in place of the plan's.
        episode_steps: steps of an episode.
        plan_each_step: make a plan before every step, in place of once an episode: what was seen a step ago then counts.

    Returns:
        Returns of the episodes, float32, shape ``[num_tasks, num_episodes]``.

    Example:
        >>> import torch
        >>> rewards = torch.tensor([[[0.0, 1e3]]])  # one state; the second action pays
        >>> second = lambda experience, episode: torch.tensor([0.0, 1.0]).expand(4, 1, 1, 2)
        >>> play((rewards, torch.ones(1, 1, 2, 1)), 2, second, episode_steps=4).round(decimals=-2)
        tensor([[4000., 4000.]])
    """
    require_generator(generator)
    check_mdps(mdps, num_episodes, episode_steps)
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon={epsilon} is a share of the actions: pass a number between 0 and 1.")
    parts = zip(*[part.float().split(_TASKS_AT_ONCE) for part in mdps], strict=True)
    returns = [
        _play(part, num_episodes, make_plan, generator, epsilon, episode_steps, plan_each_step) for part in parts
    ]
    return torch.cat(returns)


def _play(
    mdps: MDPs,
    num_episodes: int,
    make_plan: MakePlan,
    generator: Generator | None,
    epsilon: float,
    episode_steps: int,
    plan_each_step: bool,
) -> Tensor:
    rewards, transitions = mdps
    num_tasks, _, num_actions = rewards.shape
    tasks = torch.arange(num_tasks, device=rewards.device)
    means, cumulative = rewards.flatten(1), transitions.cumsum(-1).flatten(1, 2)[..., :-1]
    experience = Experience.none_of(transitions)
    returns = rewards.new_zeros(num_tasks, num_episodes)
    for episode in range(num_episodes):
        plan = make_plan(experience, episode + 1)
        state = torch.zeros_like(tasks)
        for step in range(episode_steps):
            if plan_each_step and step:
                plan = make_plan(experience, episode + 1)
            action = _choose(plan[step][tasks, state], epsilon, generator)
            pair = state * num_actions + action
            reward = means[tasks, pair]
            reward = reward + torch.randn(reward.shape, generator=generator, device=reward.device)
            noise = torch.rand(num_tasks, 1, generator=generator, device=reward.device)
            state = (cumulative[tasks, pair] <= noise).sum(-1)
            experience.add(pair, reward, state if step + 1 < episode_steps else None)
            returns[:, episode] += reward
    return returns


def _choose(values: Tensor, epsilon: float, generator: Generator | None) -> Tensor:
    """Actions ``[num_tasks]``: the best of ``values`` ``[num_tasks, num_actions]``, ties at random, or any with ``epsilon``."""
    shape, factory = values.shape, {"generator": generator, "device": values.device}
    # Less the highest: beside large values the noise would be lost in rounding.
    best = (values - values.amax(-1, keepdim=True) + _TIE * torch.rand(shape, **factory)).argmax(-1)
    if not epsilon:
        return best
    explores = torch.rand(shape[0], **factory) < epsilon
    return torch.where(explores, torch.randint(shape[1], (shape[0],), **factory), best)


def check_mdps(mdps: MDPs, num_episodes: int, episode_steps: int) -> None:
    """Raise ValueError or TypeError unless agents can play ``num_episodes`` of ``episode_steps`` on ``mdps``."""
    if isinstance(mdps, Tensor) or len(mdps) != 2:
        raise TypeError(
            "mdps must be a pair, mean rewards and transition probabilities: unpack_mdps(tasks, ...) makes it."
        )
    rewards, transitions = mdps
    require_torch(rewards=rewards, transitions=transitions)
    whole("num_episodes", num_episodes)
    whole("episode_steps", episode_steps)
    shape = rewards.shape
    if len(shape) != 3 or 0 in shape or transitions.shape != (*shape, shape[1]):
        raise ValueError(
            f"mdps has mean rewards {list(shape)} and transitions {list(transitions.shape)}, not [num_tasks, num_states, "
            "num_actions] and [num_tasks, num_states, num_actions, num_states]: agents play a batch of tasks. Pass "
            "unpack_mdps(tasks), or unsqueeze(0) of a single task's parts."
        )
    # Written so that a NaN fails too.
    sums_to_one = (transitions.sum(-1) - 1).abs() < 1e-4
    if not bool((transitions >= 0).all() & sums_to_one.all() & rewards.isfinite().all()):
        raise ValueError(
            "mdps has transitions that are no probabilities, or rewards that are not finite. The last dimension of the "
            "transitions, the next state, must be at least 0 and sum to 1."
        )
