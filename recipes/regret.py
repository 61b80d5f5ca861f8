"""`RegretAdvantage`: advantages from what the known task says about each action, in place of noisy rewards."""

import torch
from tensordict import TensorDictBase

from rl2_torchrl import TrialAdvantage
from rl2_torchrl.baselines.planning import value_iteration
from rl2_torchrl.envs import TabularMDP, unpack_mdps

__all__ = ["RegretAdvantage"]


class RegretAdvantage(TrialAdvantage):
    """`TrialAdvantage` in which minus the regret of an action stands for its reward; for `TabularMDP`.

    The regret is what the best action would have been worth beyond the one taken, ``V*_t(s_t) - Q*_t(s_t, a_t)``, by value
    iteration in the task. The rewards of an episode sum in expectation to ``V*_0(s_0)``, which no agent can change, less the
    regrets (Kakade & Langford 2002, lemma 6.1): the same to be gained, without the noise of rewards and the luck of transitions,
    so that an advantage can look over many steps. The critic then learns minus the regret to come. As a critic that reads
    the task, it is of use in training alone: the agent sees rewards and nothing of this.

    Reads, beside what `TrialAdvantage` reads, ``"task"`` ``[B, T, task_size]``, ``"observation"`` and ``"action"`` ``[B, T]``: for
    ``TrialCollector(keep=[*update.in_keys, *RegretAdvantage.extra_keys])``. A row must be one whole trial.

    Args:
        mdps: the env that is played, for its numbers of states, actions and steps of an episode.
        **kwargs: as for `TrialAdvantage`.

    Raises:
        ValueError: a row is no whole number of episodes.

    Examples:
        >>> from tensordict import TensorDict
        >>> from rl2_torchrl.envs import TabularMDP, pack_mdps
        >>> stay, go = [1.0, 0.0], [0.0, 1.0]  # state 0 pays 1 for staying, 0 for going to state 1, which pays 3
        >>> task = pack_mdps(torch.tensor([[1.0, 0.0], [3.0, 3.0]]), torch.tensor([[stay, go], [go, go]]))
        >>> done = torch.tensor([[False, True]]).unsqueeze(-1)
        >>> batch = TensorDict({"task": task.expand(1, 2, -1), "observation": torch.tensor([[0, 0]]),
        ...     "action": torch.tensor([[0, 0]]), "state_value": torch.zeros(1, 2, 1),
        ...     "next": {"reward": torch.ones(1, 2, 1), "done": done, "terminated": done}}, [1, 2])
        >>> advantage = RegretAdvantage(TabularMDP(2, 2, episode_steps=2), gamma=1.0, lmbda=0.0, normalize=False)
        >>> advantage(batch)["advantage"].squeeze()  # 1 + 1 in place of 0 + 3, then the best of what is left
        tensor([-1., 0.])
    """

    extra_keys = ("task", "observation", "action")

    def __init__(self, mdps: TabularMDP, **kwargs):
        super().__init__(**kwargs)
        self.num_states, self.num_actions, self.episode_steps = mdps.num_states, mdps.num_actions, mdps.episode_steps

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """As `TrialAdvantage`'s; the reward in ``tensordict`` ``[B, T]`` is the env's again afterwards."""
        reward = tensordict["next", "reward"]
        tensordict.set(("next", "reward"), -self.regrets(tensordict))
        try:
            return super().forward(tensordict)
        finally:
            tensordict.set(("next", "reward"), reward)

    def regrets(self, tensordict: TensorDictBase) -> torch.Tensor:
        """``[B, T, 1]``, at least 0."""
        rows, steps = tensordict.shape
        if steps % self.episode_steps:
            raise ValueError(f"a row of {steps} steps is no whole number of episodes of {self.episode_steps} steps.")
        rewards, transitions = unpack_mdps(tensordict["task"][:, 0], self.num_states, self.num_actions)
        plan = value_iteration(rewards, transitions, self.episode_steps)
        step = torch.arange(steps, device=plan.device) % self.episode_steps
        row = torch.arange(rows, device=plan.device).unsqueeze(-1)
        values = plan[step, row, tensordict["observation"]]  # [B, T, num_actions]
        return values.amax(-1, keepdim=True) - values.gather(-1, tensordict["action"].unsqueeze(-1))
