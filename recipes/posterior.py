"""What a trial has shown of the task by each step, exactly: posterior means of what every action pays in every state.

They stand for the task in training. What the task says of an action that was never tried is luck to the agent, and what a reward
says beyond its posterior mean is too: without either, memory and policy are taught the same, with far less noise.
"""

from collections.abc import Callable

import torch
from tensordict import NestedKey, TensorDictBase

from rl2_torchrl import TrialAdvantage

__all__ = ["Posterior", "PosteriorAdvantage", "beta_mean", "normal_mean"]

#: A posterior mean from the number of rewards seen and their sum, all of one shape.
OfRewards = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def beta_mean(number: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Of a bandit's arm, whose success has a probability drawn from U[0, 1].

    Examples:
        >>> beta_mean(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 2.0])).tolist()
        [0.5, 0.75]
    """
    return (1 + total) / (2 + number)


def normal_mean(number: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Of a mean reward drawn from N(1, 1), seen with noise N(0, 1), as `rl2_torchrl.envs.random_mdps` has them.

    Examples:
        >>> normal_mean(torch.tensor([0.0, 3.0]), torch.tensor([0.0, 7.0])).tolist()
        [1.0, 2.0]
    """
    return (1 + total) / (1 + number)


class Posterior:
    """Posterior means of what every action pays in every state, from the transition input ``[N, T, input_size]`` of whole trials.

    Args:
        of_rewards: `beta_mean` or `normal_mean`.
        num_actions: number of actions.
        num_states: number of states, which the transition input begins with, one-hot; 1: it has none.

    Examples:
        >>> trans = torch.tensor([[[0.0, 0, 0, 0], [0, 1, 1, 1]]])  # two arms; at the second step the second has paid 1
        >>> Posterior(beta_mean, num_actions=2)(trans)[0]
        tensor([[0.5000, 0.5000],
                [0.5000, 0.6667]])
    """

    def __init__(self, of_rewards: OfRewards, num_actions: int, num_states: int = 1):
        self.of_rewards, self.num_actions, self.num_states = of_rewards, num_actions, num_states

    def __call__(self, trans: torch.Tensor) -> torch.Tensor:
        """Means before each step, ``[N, T, num_states * num_actions]``."""
        *_, reward, _ = trans.unbind(-1)
        action = trans[..., -2 - self.num_actions : -2]
        taken = trans.new_zeros(*trans.shape[:-1], self.num_states, self.num_actions)
        taken[:, 1:] = self._states(trans)[:, :-1, :, None] * action[:, 1:, None, :]
        return self.of_rewards(taken.cumsum(1), (taken * reward[..., None, None]).cumsum(1)).flatten(-2)

    def of_actions(self, trans: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Means of the reward of each ``action`` ``[N, T]`` in the state where it is taken, ``[N, T, 1]``."""
        means = self(trans).unflatten(-1, (self.num_states, self.num_actions))
        return (means * self._states(trans).unsqueeze(-1)).sum(-2).gather(-1, action.unsqueeze(-1))

    def _states(self, trans: torch.Tensor) -> torch.Tensor:
        return trans[..., : self.num_states] if self.num_states > 1 else torch.ones_like(trans[..., :1])


class PosteriorAdvantage(TrialAdvantage):
    """`TrialAdvantage` in which the posterior mean of an action's reward, given what the trial has shown before, stands for it.

    The expectation over rewards is the same, whatever the policy, and so is what is to be gained.

    Args:
        posterior: the posterior.
        **kwargs: as for `TrialAdvantage`.
    """

    def __init__(self, posterior: Posterior, **kwargs):
        super().__init__(**kwargs)
        self.posterior = posterior

    @property
    def in_keys(self) -> list[NestedKey]:
        """As `TrialAdvantage`'s, with what the posterior is made of."""
        return list(dict.fromkeys([*super().in_keys, "trans", "action"]))

    def rewards(self, tensordict: TensorDictBase) -> torch.Tensor:
        """Posterior means ``[B, T, 1]``."""
        return self.posterior.of_actions(tensordict["trans"], tensordict["action"])
