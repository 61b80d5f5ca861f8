"""Planning in tabular MDPs of known model: finite-horizon value iteration, with bonuses or over a confidence set.

All of it runs on a batch of MDPs: mean rewards ``[num_tasks, num_states, num_actions]``, transition probabilities
``[num_tasks, num_states, num_actions, num_states]``. A plan is the value of every action,
``[num_steps, num_tasks, num_states, num_actions]``: ``plan[t]`` is what an action is worth at step ``t`` of an episode.
"""

import torch
from torch import Tensor

__all__ = ["extended_value_iteration", "optimal_return", "value_iteration"]


def value_iteration(rewards: Tensor, transitions: Tensor, num_steps: int, bonus: Tensor | None = None) -> Tensor:
    """Value of every action by backward induction: ``Q_t = R + P V_{t+1}``, ``V_t = max Q_t``, 0 after the last step.

    Args:
        rewards: mean rewards, must have shape ``[num_tasks, num_states, num_actions]``.
        transitions: probabilities, must have shape ``[num_tasks, num_states, num_actions, num_states]``.
        num_steps: steps of an episode.
        bonus: added to an action's value once for each step that follows it, of the shape of ``rewards``; None for none.

    Returns:
        Values, shape ``[num_steps, num_tasks, num_states, num_actions]``.

    Example:
        >>> import torch
        >>> rewards = torch.tensor([[[1.0, 0.0], [3.0, 2.0]]])
        >>> stay, go = [[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]
        >>> transitions = torch.tensor([stay, go]).transpose(0, 1).unsqueeze(0)
        >>> value_iteration(rewards, transitions, 2)[0]  # go first: 0 + 3
        tensor([[[2., 3.],
                 [6., 3.]]])
    """
    pairs = transitions.flatten(1, 2)  # [num_tasks, num_states * num_actions, num_states]
    plan = rewards.new_empty(num_steps, *rewards.shape)
    values = rewards.new_zeros(*rewards.shape[:2], 1)
    for following in range(num_steps):
        step = plan[num_steps - 1 - following]
        torch.add(rewards, torch.bmm(pairs, values).view_as(rewards), out=step)
        if bonus is not None:
            step += following * bonus
        values = step.amax(-1, keepdim=True)
    return plan


def extended_value_iteration(
    rewards: Tensor, transitions: Tensor, slack: Tensor, num_steps: int, carry_over: bool = True
) -> Tensor:
    """Value iteration with the most optimistic transitions near the given ones (Jaksch et al. 2010, figure 2).

    In every backup half the ``slack`` of an action, the L1 radius of its confidence set, is moved to the best
    next state, away from the worst ones; where there is no room for it the best next state becomes certain.

    Args:
        rewards: optimistic mean rewards, must have shape ``[num_tasks, num_states, num_actions]``.
        transitions: probabilities, must have shape ``[num_tasks, num_states, num_actions, num_states]``.
        slack: radius of the confidence set of each action, of the shape of ``rewards``.
        num_steps: steps of an episode.
        carry_over: start each backup from the last one's optimistic transitions, unless the best state had become
            certain, so that optimism adds up over an episode: how table 2 of Duan et al. 2016 was made. False starts from
            ``transitions`` each time, as Jaksch et al. do.

    Returns:
        Values, shape ``[num_steps, num_tasks, num_states, num_actions]``.

    Example:
        >>> import torch
        >>> rewards, transitions = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[[1.0, 0.0]], [[0.5, 0.5]]]])
        >>> slack = torch.tensor([[[0.5], [0.5]]])
        >>> extended_value_iteration(rewards, transitions, slack, 2, carry_over=False)[0].flatten()
        tensor([0.2500, 1.7500])
    """
    transitions, half = transitions.flatten(1, 2), slack.flatten(1).unsqueeze(-1) / 2
    plan = rewards.new_empty(num_steps, *rewards.shape)
    values = rewards.new_zeros(rewards.shape[:2])
    places = torch.arange(rewards.shape[1], device=rewards.device)
    for step in reversed(range(num_steps)):
        # Stable, since before the last step all states are worth the same and the order counts for what is carried over.
        best_first = values.sort(dim=-1, stable=True).indices.flip(-1)
        rank = best_first.argsort(-1).unsqueeze(-1)  # [num_tasks, num_states, 1], 0 for the best state
        # Filled up from the best state on until the sum is 1: what is cut off is taken from the worst. Sorting, summing up
        # and their inverse are products with matrices of 0 and 1, which are faster than gather, cumsum and scatter.
        filled = torch.bmm(transitions, (rank <= places).to(half.dtype)) + half  # [.., k]: the k + 1 best states
        certain = (filled[..., :1] > 1).to(half.dtype)
        apart = (rank == places).to(half.dtype) - (rank == places + 1).to(half.dtype)
        optimistic = torch.bmm(filled.clamp_(max=1), apart.transpose(1, 2))
        if carry_over:
            transitions = optimistic.lerp(transitions, certain)
        torch.add(rewards, torch.bmm(optimistic, values.unsqueeze(-1)).view_as(rewards), out=plan[step])
        values = plan[step].amax(-1)
    return plan


def optimal_return(mdps: tuple[Tensor, Tensor], *, episode_steps: int = 10) -> Tensor:
    """Mean return of an episode of the best policy for a known MDP, from state 0, exactly.

    Args:
        mdps: mean rewards ``[num_tasks, num_states, num_actions]`` and transition probabilities
            ``[num_tasks, num_states, num_actions, num_states]``, as ``unpack_mdps`` gives them.
        episode_steps: steps of an episode.

    Returns:
        Returns, shape ``[num_tasks]``.

    Example:
        >>> import torch
        >>> rewards = torch.tensor([[[1.0, 2.0]]])  # one state, two actions
        >>> optimal_return((rewards, torch.ones(1, 1, 2, 1)), episode_steps=3)
        tensor([6.])
    """
    return value_iteration(*mdps, episode_steps)[0, :, 0].amax(-1)
