"""What a trial has shown of the task by each step, exactly: posterior means of what every action pays in every state.

Or of how tasks are drawn nothing is told, and means are those of the rewards that the trial has paid: then training learns from
rewards alone.

They stand for the task in training. What the task says of an action that was never tried is luck to the agent, and what a reward
says beyond its posterior mean is too: without either, memory and policy are taught the same, with far less noise.

What trying an action is worth for later shows after many steps, in long and noisy sums. With optimism some standard deviations on
top of the mean stand for it at once, as in UCB: advantages can look a step or two ahead, and still teach to explore.
"""

from collections.abc import Callable
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase

from rl2_torchrl import Callback, TaskBelief, TrialAdvantage

__all__ = [
    "CountBonusAdvantage",
    "Posterior",
    "PosteriorAdvantage",
    "PosteriorBelief",
    "RisingOptimism",
    "beta_moments",
    "normal_moments",
    "sample_moments",
]

#: Mean and standard deviation of the posterior, from the number of rewards seen and their sum, all of one shape.
OfRewards = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def beta_moments(number: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a bandit's arm, whose success has a probability drawn from U[0, 1].

    Examples:
        >>> mean, deviation = beta_moments(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 2.0]))
        >>> mean.tolist(), deviation.square().mul(240).round().tolist()  # variances 1/12 and 3/80
        ([0.5, 0.75], [20.0, 9.0])
    """
    mean = (1 + total) / (2 + number)
    return mean, (mean * (1 - mean) / (3 + number)).sqrt()


def normal_moments(number: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a mean reward drawn from N(1, 1), seen with noise N(0, 1), as `rl2_torchrl.envs.random_mdps` has them.

    Examples:
        >>> normal_moments(torch.tensor([0.0, 3.0]), torch.tensor([0.0, 7.0]))
        (tensor([1., 2.]), tensor([1.0000, 0.5000]))
    """
    return (1 + total) / (1 + number), (1 + number).rsqrt()


def sample_moments(number: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of any reward: the mean of those seen and a first one of 0, and how it narrows with their number, whatever the tasks are.

    Examples:
        >>> sample_moments(torch.tensor([0.0, 3.0]), torch.tensor([0.0, 8.0]))
        (tensor([0., 2.]), tensor([1.0000, 0.5000]))
    """
    return total / (1 + number), (1 + number).rsqrt()


class Posterior:
    """Posterior means of what every action pays in every state, from the transition input ``[N, T, input_size]`` of whole trials.

    Args:
        of_rewards: `beta_moments`, `normal_moments` or `sample_moments`.
        num_actions: number of actions.
        num_states: number of states, which the transition input begins with, one-hot; 1: it has none.
        optimism: standard deviations that are added to the means.

    Examples:
        >>> trans = torch.tensor([[[0.0, 0, 0, 0], [0, 1, 1, 1]]])  # two arms; at the second step the second has paid 1
        >>> Posterior(beta_moments, num_actions=2)(trans)[0]
        tensor([[0.5000, 0.5000],
                [0.5000, 0.6667]])
    """

    def __init__(self, of_rewards: OfRewards, num_actions: int, num_states: int = 1, optimism: float = 0.0):
        self.of_rewards, self.num_actions, self.num_states = of_rewards, num_actions, num_states
        self.optimism = optimism

    def __call__(self, trans: torch.Tensor) -> torch.Tensor:
        """Means before each step, ``[N, T, num_states * num_actions]``."""
        mean, deviation = self._moments(trans)
        return mean.add_(deviation, alpha=self.optimism).flatten(-2)

    def of_actions(self, trans: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Means of the reward of each ``action`` ``[N, T]`` in the state where it is taken, ``[N, T, 1]``."""
        means = self(trans).unflatten(-1, (self.num_states, self.num_actions))
        return self._taken(means, trans, action)

    def bonuses(self, trans: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """What of `of_actions` is optimism, ``[N, T, 1]``."""
        return self._taken(self._moments(trans)[1], trans, action).mul_(self.optimism)

    def _moments(self, trans: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Means and standard deviations before each step, ``[N, T, num_states, num_actions]``."""
        *_, reward, _ = trans.unbind(-1)
        action = trans[..., -2 - self.num_actions : -2]
        taken = trans.new_zeros(*trans.shape[:-1], self.num_states, self.num_actions)
        taken[:, 1:] = self._states(trans)[:, :-1, :, None] * action[:, 1:, None, :]
        return self.of_rewards(taken.cumsum(1), (taken * reward[..., None, None]).cumsum(1))

    def _taken(self, values: torch.Tensor, trans: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return (values * self._states(trans).unsqueeze(-1)).sum(-2).gather(-1, action.unsqueeze(-1))

    def _states(self, trans: torch.Tensor) -> torch.Tensor:
        return trans[..., : self.num_states] if self.num_states > 1 else torch.ones_like(trans[..., :1])


class PosteriorAdvantage(TrialAdvantage):
    """`TrialAdvantage` in which the posterior mean of an action's reward, given what the trial has shown before, stands for it.

    Without optimism the expectation over rewards is the same, whatever the policy, and so is what is to be gained.

    Args:
        posterior: the posterior.
        optimism_after: as for `RisingOptimism`, if the posterior's optimism rises.
        **kwargs: as for `TrialAdvantage`.
    """

    def __init__(self, posterior: Posterior, *, optimism_after: float = 0.0, **kwargs):
        super().__init__(**kwargs)
        self.posterior = posterior
        # Settings of the run, by which a resumed one is told from another; the posterior's own optimism moves.
        self.optimism, self.optimism_after = posterior.optimism, optimism_after

    @property
    def in_keys(self) -> list[NestedKey]:
        """As `TrialAdvantage`'s, with what the posterior is made of."""
        return list(dict.fromkeys([*super().in_keys, "trans", "action"]))

    def rewards(self, tensordict: TensorDictBase) -> torch.Tensor:
        """Posterior means ``[B, T, 1]``."""
        return self.posterior.of_actions(tensordict["trans"], tensordict["action"])


class CountBonusAdvantage(PosteriorAdvantage):
    """`TrialAdvantage` of rewards with a bonus for what the trial has seldom tried (Strehl and Littman 2008, section 3.2).

    The bonus of an action that was taken n times in its state is ``optimism / sqrt(1 + n)``, with `sample_moments`.
    """

    def rewards(self, tensordict: TensorDictBase) -> torch.Tensor:
        """Rewards and bonuses ``[B, T, 1]``."""
        return tensordict["next", "reward"] + self.posterior.bonuses(tensordict["trans"], tensordict["action"])


class PosteriorBelief(TaskBelief):
    """`TaskBelief` of a posterior, whose layer starts where least squares put it on the first minibatch.

    What a random layer tells is wrong for the most part by the layer's own fault: the first steps on it would make a memory
    that another training has left forget what it knows.

    Args:
        features_size: as for `TaskBelief`.
        posterior: the posterior.
        coefficient: as for `TaskBelief`.
    """

    RIDGE = 1e-3

    def __init__(self, features_size: int, posterior: Posterior, *, coefficient: float):
        size = posterior.num_states * posterior.num_actions
        super().__init__(features_size, size, coefficient=coefficient, target=posterior, task_key="trans")
        self.register_buffer("is_fitted", torch.tensor(False))  # not once more where a training is resumed

    def forward(self, features: torch.Tensor, task: torch.Tensor) -> dict[str, torch.Tensor]:
        """As `TaskBelief`'s, of features ``[N, T, features_size]`` and transition inputs ``[N, T, input_size]``."""
        if not self.is_fitted:
            self._fit(features.detach().flatten(0, 1), self.target(task).flatten(0, 1))
        return super().forward(features, task)

    @torch.no_grad()
    def _fit(self, features: torch.Tensor, means: torch.Tensor) -> None:
        known = torch.cat([features, torch.ones_like(features[:, :1])], -1)
        moments = known.T @ known / len(known) + self.RIDGE * torch.eye(known.shape[-1])
        solution = torch.linalg.solve(moments, known.T @ means.to(known.dtype) / len(known))
        self.layer.weight.copy_(solution[:-1].T)
        self.layer.bias.copy_(solution[-1])
        self.is_fitted.fill_(True)


class RisingOptimism(Callback):
    """Leaves the optimism of ``posterior`` out until the share ``after`` of the training; by twice that it has risen to what it is.

    A memory of the means is learnt sooner where all that is told and paid is means; optimism tries more of what has to be
    remembered.
    """

    def __init__(self, posterior: Posterior, after: float):
        if not 0 <= after <= 0.5:
            raise ValueError(
                f"optimism_after={after} is a share of the training, from 0 to 0.5: by twice that optimism is whole."
            )
        self.posterior, self.after, self.whole = posterior, after, posterior.optimism
        self._rise(0.0)

    def after_update(self, row: dict[str, float], progress: float) -> dict[str, float]:
        """Sets the optimism of the next batch."""
        self._rise(progress)
        return {"train/optimism": self.posterior.optimism}

    def _rise(self, progress: float) -> None:
        risen = 1.0 if self.after == 0 else min(max(progress / self.after - 1, 0.0), 1.0)
        self.posterior.optimism = risen * self.whole

    def state_dict(self) -> dict[str, Any]:
        """The optimism at which the training stands."""
        return {"optimism": self.posterior.optimism}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.posterior.optimism = state["optimism"]
