"""`TaskBelief`: the actor's memory learns to tell the task, which only training sees."""

from collections.abc import Callable

import torch
from tensordict import NestedKey
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from rl2_torchrl.arguments import whole

__all__ = ["TaskBelief"]


class TaskBelief(nn.Module):
    """A loss term: a linear layer tells the task, or a function of it, from the actor's features (Humplik et al. 2019).

    ``coefficient * mean((W features + b - target)²)``. The features minimise it where they hold the posterior mean of the target
    given all that was seen, which is what an agent must know to act well. The task is the env's, and read in training alone:
    the layer is not part of the agent (arXiv:1905.06424, section 3; there a stochastic belief of its own is trained, here the
    memory that acts). Gives ``loss_belief`` and ``belief_error``, the mean squared error without the coefficient.

    Args:
        features_size: size of the actor's features, its ``hidden_size``.
        target_size: size of what is told.
        coefficient: weight in the loss. Default 1.
        target: from the task ``[N, T, ...]`` to what is told ``[N, T, target_size]``. By default the task itself.
        features_key: what a network writes; a stored memory has no gradient. Default ``"actor_features"``.
        task_key: Default ``"task"``.
        name: what loss and error are called by, where a loss has several. Default ``"belief"``.
        device, dtype: of the layer.

    Examples:
        >>> from rl2_torchrl import GRUCategoricalActor, GRUValueHead, PPOUpdate, RL2PPOLoss
        >>> belief = TaskBelief(64, 3, coefficient=10.0)  # the means of a bandit's three arms
        >>> update = PPOUpdate(RL2PPOLoss(GRUCategoricalActor(5, 3), GRUValueHead(5), terms=[belief]))
        >>> "task" in update.in_keys
        True
    """

    def __init__(
        self,
        features_size: int,
        target_size: int,
        *,
        coefficient: float = 1.0,
        target: Callable[[Tensor], Tensor] | None = None,
        features_key: NestedKey = "actor_features",
        task_key: NestedKey = "task",
        name: str = "belief",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not coefficient > 0:
            raise ValueError(f"coefficient={coefficient}: without a positive weight nothing learns to tell the task.")
        sizes = whole("features_size", features_size), whole("target_size", target_size)
        self.layer = nn.Linear(*sizes, device=device, dtype=dtype)
        self.coefficient, self.target = coefficient, target
        self.in_keys, self._name = [features_key, task_key], name

    @property
    def out_keys(self) -> tuple[str, str]:
        """Loss and error."""
        return f"loss_{self._name}", f"{self._name}_error"

    def forward(self, features: Tensor, task: Tensor) -> dict[str, Tensor]:
        """Loss and error, from features ``[N, T, features_size]`` and tasks ``[N, T, ...]``."""
        if features.shape[-1] != self.layer.in_features:
            raise ValueError(
                f"features_size={self.layer.in_features}, and the actor's features are {features.shape[-1]} numbers: give its "
                "hidden_size."
            )
        told = self.layer(features)
        if self.target is None and not isinstance(task, Tensor):
            raise TypeError(
                f"the task has several entries, {sorted(map(str, task.keys(True, True)))}: say which numbers shall be told, target="
                "lambda task: torch.cat([task['mass'], ...], -1), or one of them by task_key=('task', 'mass')."
            )
        with torch.no_grad():
            target = (task if self.target is None else self.target(task)).to(told.dtype)
        if target.shape != told.shape:
            raise ValueError(
                f"target(task), or the task itself, has shape {tuple(target.shape)}, but target_size gives {tuple(told.shape)}."
            )
        error = mse_loss(told, target)
        return dict(zip(self.out_keys, (self.coefficient * error, error.detach()), strict=True))
