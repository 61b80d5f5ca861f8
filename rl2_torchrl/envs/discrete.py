"""`DiscreteEnv`: episodes of a fixed number of steps over numbered states; what tabular MDPs and grids share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Categorical, Composite, Unbounded

from rl2_torchrl.envs.lockstep import LockstepEnv

__all__ = ["DiscreteEnv"]


class DiscreteEnv(LockstepEnv):
    """Every episode begins in state 0 and ends after ``episode_steps`` steps; a class below says what a step does.

    The observation is the state's index ``[*B]`` int64, which `PreviousStep` writes one-hot, the action the index of a
    choice ``[*B]`` int64, the task a vector ``[*B, task_size]`` float32, the reward ``[*B, 1]`` float32.

    Args:
        num_states: number of states.
        num_actions: number of actions.
        task_size: size of a task.
        episode_steps: steps of an episode.
        batch_size: batch size ``B`` of the env.
        seed: seed of the env's own generator; None takes fresh entropy.
        device: device of all tensors; None is the CPU.

    Raises:
        ValueError: a size below 1.
        KeyError: at a reset without a task.
    """

    batch_locked = True

    def __init__(
        self,
        num_states: int,
        num_actions: int,
        task_size: int,
        episode_steps: int,
        batch_size: Sequence[int],
        seed: int | None,
        device: torch.device | str | None,
    ):
        batch_size = torch.Size(batch_size)
        if min(num_states, num_actions, episode_steps, *batch_size) < 1:
            raise ValueError(
                f"{type(self).__name__} has num_states={num_states}, num_actions={num_actions}, "
                f"episode_steps={episode_steps}, batch_size={tuple(batch_size)}: all of them must be at least 1."
            )
        super().__init__(device=device or "cpu", batch_size=batch_size)
        self.num_states, self.num_actions, self.episode_steps = num_states, num_actions, episode_steps
        self.generator = torch.Generator(self.device)
        self._set_seed(seed)
        self._state = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
        self._steps = torch.zeros(*batch_size, 1, dtype=torch.int64, device=self.device)
        within = {"shape": batch_size, "device": self.device}
        self.state_spec = Composite(task=Unbounded((*batch_size, task_size), device=self.device), **within)
        self.observation_spec = Composite(observation=Categorical(num_states, **within), **within)
        self.action_spec = Categorical(num_actions, **within)
        self.reward_spec = Unbounded((*batch_size, 1), device=self.device)

    # -------------------------------------------------------- plain tensors
    def first(self, task: torch.Tensor) -> torch.Tensor:
        """State 0 in every row, ``[*B]``."""
        return torch.zeros(self.batch_size, dtype=torch.int64, device=self.device)

    # ---------------------------------------------------------- TensorDicts
    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs) -> TensorDictBase:
        if tensordict is None or "task" not in tensordict.keys():
            raise KeyError(
                f"{type(self).__name__}.reset() needs a 'task' {list(self.state_spec['task'].shape)}: which one shall be "
                "played? Add a TaskSampler (TransformedEnv(env, Compose(Trial(...), TaskSampler(...)))) or pass "
                "TensorDict({'task': ...})."
            )
        rows = tensordict.get("_reset", None)
        rows = torch.ones_like(self._steps, dtype=torch.bool) if rows is None else rows.reshape(self._steps.shape)
        self._steps = self._steps.masked_fill(rows, 0)
        self._state = torch.where(rows.squeeze(-1), self.first(tensordict["task"]), self._state)
        return self._entries()

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        reward, self._state = self.transition(tensordict["task"], self._state, tensordict["action"])
        self._steps = self._steps + 1
        return self._entries().set("reward", reward)

    def _entries(self) -> TensorDict:
        done = self._steps >= self.episode_steps
        entries = {"observation": self._state.clone(), "done": done, "terminated": done.clone()}
        return TensorDict(entries, batch_size=self.batch_size, device=self.device)

    # ---------------------------------------------------- seeds, checkpoints
    def _set_seed(self, seed: int | None) -> None:
        # The generator is the env's own: the draws of tasks, policy and env must not depend on one another.
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def get_extra_state(self) -> torch.Tensor:
        """Generator, states and step counts, so that a checkpoint goes on as the run would have."""
        # One plain tensor, as TaskSampler's: all else TorchRL would copy into every worker.
        numbers = torch.stack([self._state.flatten(), self._steps.flatten()]).cpu()
        return torch.cat([self.generator.get_state(), numbers.flatten().view(torch.uint8)])

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Restores what `get_extra_state` returned."""
        size = 2 * self._state.numel() * self._state.element_size()
        generator, numbers = state.cpu().split([len(state) - size, size])
        self.generator.set_state(generator.clone())
        states, steps = numbers.clone().view(torch.int64).to(self.device).chunk(2)
        self._state, self._steps = states.reshape(self._state.shape), steps.reshape(self._steps.shape)
