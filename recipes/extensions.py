"""What a user might bring to this package: envs, a loss, a loss term and a module, as `recipes.extension_benchmark` times them."""

from collections.abc import Iterable, Sequence

import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torchrl.data import Bounded, Composite, OneHot, Unbounded
from torchrl.envs import EnvBase

from rl2_torchrl import RL2PPOLoss
from rl2_torchrl.envs import TensorEnv


# ----------------------------------------------------------------------- losses
class TaskPrediction(nn.Module):
    """A loss term with a layer of its own: the task ``[*B, task_size]`` from the actor's features, by squared error.

    Args:
        features_size: size of the features.
        task_size: size of the task.
    """

    in_keys = ["actor_features", "task"]

    def __init__(self, features_size: int, task_size: int):
        super().__init__()
        self.linear = nn.Linear(features_size, task_size)

    def forward(self, features: torch.Tensor, task: torch.Tensor) -> dict[str, torch.Tensor]:
        """The loss of ``features`` ``[*B, features_size]``."""
        return {"loss_prediction": nn.functional.mse_loss(self.linear(features), task)}


class WeightPenalty(RL2PPOLoss):
    """A loss that was derived in the old way: whatever `RL2PPOLoss` gives, and one more entry."""

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Losses of the sequences ``tensordict`` ``[*B, T]``."""
        losses = super().forward(tensordict)
        return losses.set("loss_penalty", weight_penalty(self.actor_network.parameters()))


def weight_penalty(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """A small multiple of the sum of all squares."""
    return 1e-5 * sum(parameter.square().sum() for parameter in parameters)


# ---------------------------------------------------------------------- modules
class Gate(nn.Module):
    """A module of which this package knows nothing: ``x * sigmoid(W x + b)``.

    Args:
        size: size of ``x``.
    """

    def __init__(self, size: int):
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps ``[*B, size]`` to ``[*B, size]``."""
        return x * self.linear(x).sigmoid()


def gated_head(features_size: int, num_outputs: int) -> nn.Module:
    """A head with a `Gate` before it."""
    return nn.Sequential(Gate(features_size), nn.ReLU(), nn.Linear(features_size, num_outputs))


# ------------------------------------------------------------------------- envs
class OneHotBandit(TensorEnv):
    """`rl2_torchrl.envs.BernoulliBandit` with one-hot actions, as many Gymnasium envs have them through TorchRL."""

    time_limit_terminates = True

    def __init__(self, num_arms: int, **kwargs):
        one_pull = {"max_episode_steps": 1, "fixed_length": True}
        super().__init__(task_spec=Unbounded(num_arms), action_spec=OneHot(num_arms), **one_pull, **kwargs)

    def begin(self, task, rows):
        """There is nothing to observe."""
        return task, None

    def advance(self, state, action):
        """A draw of the pulled arm's reward."""
        chance = (state * action).sum(-1, keepdim=True)
        return state, None, torch.bernoulli(chance, generator=self.generator), None, None


class Seeker(TensorEnv):
    """A point that looks for a goal, as `rl2_torchrl.envs.PointRobot` does, in a user's words: each row ends when it arrives."""

    def __init__(self, **kwargs):
        action, plane = Bounded(-1, 1, (2,)), Unbounded(2)
        super().__init__(
            task_spec=plane, observation_spec=plane.clone(), action_spec=action, max_episode_steps=25, **kwargs
        )

    def begin(self, task, rows):
        """The point at (0, 0)."""
        place = torch.zeros_like(task)
        return {"goal": task, "place": place}, place

    def advance(self, state, action):
        """A move of at most 0.2 along each axis; the distance to the goal is its cost."""
        place = state["place"] + 0.2 * action.clamp(-1, 1)
        distance = (place - state["goal"]).norm(dim=-1, keepdim=True)
        return {"goal": state["goal"], "place": place}, place, -distance, distance <= 0.2, None


class PlainSeeker(EnvBase):
    """`Seeker` as a plain TorchRL env, written by someone who knows nothing of this package but that tasks are entries.

    Args:
        batch_size: rows side by side.
    """

    batch_locked = True

    def __init__(self, batch_size: Sequence[int]):
        super().__init__(batch_size=torch.Size(batch_size))
        size = self.batch_size
        self.state_spec = Composite(task=Unbounded((*size, 2)), shape=size)
        self.observation_spec = Composite(
            observation=Unbounded((*size, 2)), steps=Unbounded((*size, 1), dtype=torch.int64), shape=size
        )
        self.action_spec = Bounded(-1, 1, (*size, 2))
        self.reward_spec = Unbounded((*size, 1))

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs) -> TensorDictBase:
        first = {
            "observation": torch.zeros(*self.batch_size, 2),
            "steps": torch.zeros(*self.batch_size, 1, dtype=torch.int64),
        }
        return TensorDict(first, self.batch_size)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        place = tensordict["observation"] + 0.2 * tensordict["action"].clamp(-1, 1)
        distance, steps = (place - tensordict["task"]).norm(dim=-1, keepdim=True), tensordict["steps"] + 1
        arrived = distance <= 0.2
        ends = {"terminated": arrived, "done": arrived | (steps >= 25)}
        return TensorDict({"observation": place, "steps": steps, "reward": -distance, **ends}, self.batch_size)

    def _set_seed(self, seed: int | None) -> None:
        """Nothing is drawn here."""
