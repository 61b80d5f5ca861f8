"""`RegretAdvantage`: advantages from what the known task says about each action, in place of noisy rewards."""

from collections.abc import Callable

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from rl2_torchrl.baselines.planning import value_iteration
from rl2_torchrl.envs import TabularMDP, unpack_mdps
from rl2_torchrl.objectives.advantages import TrialAdvantage

__all__ = ["MDPValues", "RegretAdvantage", "bandit_values"]


class RegretAdvantage(TrialAdvantage):
    """`TrialAdvantage` in which minus the regret of an action stands for its reward.

    The regret is what the best action would have been worth beyond the one taken, ``max_a Q*(s_t, a) - Q*(s_t, a_t)``, in the
    task as it is. The rewards of an episode sum in expectation to ``V*(s_0)``, which no agent can change, less the regrets
    (Kakade & Langford 2002, lemma 6.1): the same to be gained, without the noise of rewards and the luck of transitions.
    It reads the task, so it is of use in training alone: the agent sees rewards and nothing of this.

    Reads ``"action"``, ``[B, T]`` or one-hot ``[B, T, num_actions]``, and what ``action_values`` reads, beside what
    `TrialAdvantage` reads.

    Args:
        action_values: the values of all actions ``[B, T, num_actions]`` for a batch ``[B, T]``: `bandit_values`, `MDPValues`. Its
            ``in_keys`` say what it reads; without them that is ``"task"``.
        **kwargs: as for `TrialAdvantage`.

    Examples:
        >>> from tensordict import TensorDict
        >>> done = torch.tensor([[False, True]]).unsqueeze(-1)
        >>> batch = TensorDict({"task": torch.tensor([[[0.25, 0.75], [0.25, 0.75]]]), "action": torch.tensor([[0, 1]]),
        ...     "state_value": torch.zeros(1, 2, 1),
        ...     "next": {"reward": torch.ones(1, 2, 1), "done": done, "terminated": done}}, [1, 2])
        >>> RegretAdvantage(bandit_values, gamma=1.0, lmbda=1.0, normalize=False)(batch)["advantage"].squeeze()
        tensor([-0.5000,  0.0000])
    """

    def __init__(self, action_values: Callable[[TensorDictBase], Tensor], **kwargs):
        super().__init__(**kwargs)
        self.action_values = action_values

    @property
    def in_keys(self) -> list[NestedKey]:
        """As `TrialAdvantage`'s, with what the regrets are made of."""
        of_values = getattr(self.action_values, "in_keys", ["task"])
        return list(dict.fromkeys([*super().in_keys, "action", *of_values]))

    def rewards(self, tensordict: TensorDictBase) -> Tensor:
        """Minus the regrets, ``[B, T, 1]``."""
        return -self.regrets(tensordict)

    def regrets(self, tensordict: TensorDictBase) -> Tensor:
        """``[B, T, 1]``, at least 0."""
        values, action = self.action_values(tensordict), tensordict["action"]
        action = action.to(torch.uint8).argmax(-1) if action.shape == values.shape else action
        return values.amax(-1, keepdim=True) - values.gather(-1, action.unsqueeze(-1))


def bandit_values(batch: TensorDictBase) -> Tensor:
    """The means of all arms ``[B, T, num_arms]``: the task itself.

    Examples:
        >>> bandit_values({"task": torch.tensor([[[0.25, 0.75]]])})
        tensor([[[0.2500, 0.7500]]])
    """
    return batch["task"]


class MDPValues:
    """Values of all actions ``[B, T, num_actions]`` in trials of `TabularMDP`, by value iteration in each trial's MDP.

    Reads ``"task"`` ``[B, T, task_size]`` and ``"observation"`` ``[B, T]``. A row must be one whole trial.

    Args:
        mdps: the env that is played, for its numbers of states, actions and steps of an episode.

    Examples:
        >>> from tensordict import TensorDict
        >>> from rl2_torchrl.envs import TabularMDP, pack_mdps
        >>> stay, go = [1.0, 0.0], [0.0, 1.0]  # state 0 pays 1 for staying, 0 for going to state 1, which pays 3
        >>> task = pack_mdps(torch.tensor([[1.0, 0.0], [3.0, 3.0]]), torch.tensor([[stay, go], [go, go]]))
        >>> batch = TensorDict({"task": task.expand(1, 2, -1), "observation": torch.tensor([[0, 0]])}, [1, 2])
        >>> MDPValues(TabularMDP(2, 2, episode_steps=2))(batch)[0].tolist()  # with two steps to go, then with one
        [[2.0, 3.0], [1.0, 0.0]]
    """

    in_keys = ("task", "observation")

    def __init__(self, mdps: TabularMDP):
        self.sizes, self.episode_steps = (mdps.num_states, mdps.num_actions), mdps.max_episode_steps

    def __call__(self, batch: TensorDictBase) -> Tensor:
        """Values ``[B, T, num_actions]`` at the steps of ``batch`` ``[B, T]``."""
        (rows, steps), task = batch.shape, batch["task"][:, 0]
        if steps % self.episode_steps:
            raise ValueError(f"a row of {steps} steps is no whole number of episodes of {self.episode_steps} steps.")
        if not torch.equal(task, batch["task"][:, -1]):
            raise ValueError("a row holds trials of several tasks: make frames_per_batch one trial of each row.")
        plan = value_iteration(*unpack_mdps(task, *self.sizes), self.episode_steps)
        step = torch.arange(steps, device=plan.device) % self.episode_steps
        row = torch.arange(rows, device=plan.device).unsqueeze(-1)
        return plan[step, row, batch["observation"]]
