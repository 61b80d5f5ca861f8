"""Tabular MDPs as a batched TorchRL env: the task is the whole MDP, its mean rewards and transition probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from rl2_torchrl.arguments import whole
from rl2_torchrl.envs.discrete import DiscreteEnv, DiscreteState
from rl2_torchrl.tasks import TaskDistribution

__all__ = ["TabularMDP", "pack_mdps", "random_mdps", "unpack_mdps"]


class TabularMDP(DiscreteEnv):
    """MDPs of a few states and actions, a whole batch at once (Duan et al. 2016, section 3.2).

    Every episode begins in state 0. Action ``a`` in state ``s`` pays ``R(s, a)`` plus normal noise and leads to a state
    drawn from ``P(. | s, a)``. Observation and action are indices, ``[*B]`` int64; `PreviousStep` writes both one-hot. The
    reward is ``[*B, 1]``.

    The task is one flat tensor ``[*B, num_states * num_actions * (num_states + 1)]``: a row for every pair of state and
    action, its mean reward first and then its probabilities (`pack_mdps`, `unpack_mdps`). Flat, because a critic can read
    it as it is, and by rows, because one gather then finds all that a step needs. The probabilities are not stored as
    cumulative sums: summing up the one row that is read costs little, and whoever reads the task wants probabilities.

    Args:
        num_states: number of states.
        num_actions: number of actions.
        episode_steps: steps of an episode.
        noise: standard deviation of the reward's normal noise; what `rl2_torchrl.baselines` play has 1.
        batch_size: batch size ``B`` of the env.
        seed: seed of the env's own generator; None draws one from PyTorch's default generator.
        device: device of all tensors. Defaults to the CPU.

    Raises:
        ValueError: a size below 1, or negative ``noise``.

    Examples:
        >>> from tensordict import TensorDict
        >>> env = TabularMDP(num_states=2, num_actions=2, noise=0.0, batch_size=(1,))
        >>> stay, go = [1.0, 0.0], [0.0, 1.0]
        >>> task = pack_mdps(torch.tensor([[[0.0, 0.5], [2.0, 3.0]]]), torch.tensor([[[stay, go], [stay, go]]]))
        >>> td = env.reset(TensorDict({"task": task}, [1]))
        >>> td = env.step(td.set("action", torch.tensor([1])))
        >>> td["observation"], td["next", "reward"], td["next", "observation"]
        (tensor([0]), tensor([[0.5000]]), tensor([1]))
    """

    def __init__(
        self,
        num_states: int = 10,
        num_actions: int = 5,
        *,
        episode_steps: int = 10,
        noise: float = 1.0,
        batch_size: Sequence[int] = (),
        seed: int | None = None,
        device: torch.device | str | None = None,
    ):
        task_size = whole("num_states", num_states) * whole("num_actions", num_actions) * (num_states + 1)
        super().__init__(num_states, num_actions, task_size, episode_steps, batch_size, seed, device)
        self._rows = torch.arange(self.batch_size.numel(), device=self.device)
        # A tensor too: what a CUDA graph has recorded reads a new value from the same memory.
        self._noise_scale = torch.zeros((), device=self.device)
        self.noise = noise
        #: The noise that the env was made with.
        self.given_noise = self.noise

    @property
    def noise(self) -> float:
        """Standard deviation of the reward's normal noise; it may be set at any time, as a curriculum does."""
        return self._noise

    @noise.setter
    def noise(self, noise: float) -> None:
        if not noise >= 0:
            raise ValueError(f"noise={noise} is a standard deviation: it must be at least 0.")
        self._noise = float(noise)
        self._noise_scale.fill_(self._noise)

    def get_outside_state(self) -> list[Tensor]:
        """The noise, which may have been set since."""
        return [torch.tensor(self._noise, dtype=torch.float64)]

    def set_outside_state(self, tensors: Sequence[Tensor]) -> None:
        """Puts back what `get_outside_state` returned."""
        self.noise = tensors[0].item()

    def begin(self, task: Tensor, rows: Tensor) -> tuple[DiscreteState, Tensor]:
        """State 0 in every row.

        Raises:
            ValueError: transitions of a task are no probabilities.
        """
        if task.is_cpu:  # elsewhere a look would wait for the device
            probabilities = task.unflatten(-1, (-1, self.num_states + 1))[..., 1:]
            # Nothing but zeros is no task but TorchRL's look at the env.
            is_nothing = (task == 0).all(-1)
            is_mdp = ((probabilities >= 0).all(-1) & ((probabilities.sum(-1) - 1).abs() < 1e-3)).all(-1)
            if not bool((is_mdp | is_nothing | ~rows).all()):
                raise ValueError(
                    "a task has transitions that are no probabilities: those of each state and action are at least 0 and sum to 1. "
                    "Make tasks by pack_mdps(rewards, transitions)."
                )
        return super().begin(task, rows)

    def advance(self, state: DiscreteState, action: Tensor) -> tuple[DiscreteState, Tensor, Tensor, None, None]:
        """A draw of the reward and of the next state."""
        rows = state.task.reshape(-1, self.num_states, self.num_actions, self.num_states + 1)
        row = rows[self._rows, state.place.flatten(), action.flatten()].reshape(*self.batch_size, -1)
        mean, probabilities = row[..., :1], row[..., 1:]
        factory = {"generator": self.generator, "device": self.device}
        reward = mean + self._noise_scale * torch.randn(mean.shape, **factory)
        # The last sum would be 1: left out, no rounding of it can lead beyond the last state.
        passed = probabilities[..., :-1].cumsum(-1) <= torch.rand(mean.shape, **factory)
        place = passed.sum(-1)
        return DiscreteState(state.task, place), place, reward, None, None


def pack_mdps(rewards: Tensor, transitions: Tensor) -> Tensor:
    """Tasks of `TabularMDP` from mean rewards and transition probabilities.

    Args:
        rewards: mean reward of each state and action, ``[*B, S, A]``.
        transitions: probability of each next state, ``[*B, S, A, S]``.

    Returns:
        Tasks ``[*B, S * A * (S + 1)]``.

    Raises:
        ValueError: the shapes do not belong together.

    Examples:
        >>> pack_mdps(torch.tensor([[5.0], [6.0]]), torch.tensor([[[0.25, 0.75]], [[1.0, 0.0]]]))
        tensor([5.0000, 0.2500, 0.7500, 6.0000, 1.0000, 0.0000])
    """
    if rewards.ndim < 2 or transitions.shape != (*rewards.shape, rewards.shape[-2]):
        raise ValueError(
            f"rewards {list(rewards.shape)} and transitions {list(transitions.shape)} are no MDPs: their shapes must be "
            "[*B, S, A] and [*B, S, A, S]."
        )
    return torch.cat([rewards.unsqueeze(-1), transitions], -1).flatten(-3)


def unpack_mdps(task: Tensor, num_states: int = 10, num_actions: int = 5) -> tuple[Tensor, Tensor]:
    """Mean rewards ``[*B, S, A]`` and transition probabilities ``[*B, S, A, S]``: views of the parts of ``task``.

    Args:
        task: tasks of `TabularMDP`, ``[*B, S * A * (S + 1)]``.
        num_states: number of states ``S``.
        num_actions: number of actions ``A``.

    Raises:
        ValueError: the task has another size.

    Examples:
        >>> task = random_mdps()(torch.Size([3]), torch.Generator())
        >>> rewards, transitions = unpack_mdps(task)
        >>> rewards.shape, transitions.shape
        (torch.Size([3, 10, 5]), torch.Size([3, 10, 5, 10]))
    """
    size = num_states * num_actions * (num_states + 1)
    if task.ndim < 1 or task.shape[-1] != size:
        raise ValueError(
            f"task has shape {list(task.shape)}; with {num_states} states and {num_actions} actions it must be [*B, {size}]."
        )
    rows = task.unflatten(-1, (num_states, num_actions, num_states + 1))
    return rows[..., 0], rows[..., 1:]


def random_mdps(num_states: int = 10, num_actions: int = 5) -> TaskDistribution:
    """MDPs with mean rewards from N(1, 1) and transitions from Dirichlet(1, ..., 1) (Duan et al. 2016, section 3.2).

    Examples:
        >>> random_mdps(4, 2)(torch.Size([3]), torch.Generator()).shape  # 4 * 2 * (1 + 4)
        torch.Size([3, 40])
    """
    return partial(
        _random_mdps, num_states=whole("num_states", num_states), num_actions=whole("num_actions", num_actions)
    )


def _random_mdps(batch_size: torch.Size, generator: torch.Generator, *, num_states: int, num_actions: int) -> Tensor:
    rewards = 1 + torch.randn(*batch_size, num_states, num_actions, generator=generator)
    # Dirichlet(1, ..., 1) is exponential draws over their sum.
    uniform = torch.rand(*batch_size, num_states, num_actions, num_states, generator=generator)
    exponential = -torch.log1p(-uniform)
    return pack_mdps(rewards, exponential / exponential.sum(-1, keepdim=True))
