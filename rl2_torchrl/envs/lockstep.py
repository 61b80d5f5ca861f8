"""`LockstepEnv`: what a native env tells of itself, so that whole trials can be collected on plain tensors."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torchrl.envs import EnvBase

__all__ = ["LockstepEnv"]


class LockstepEnv(EnvBase):
    """A batched env on tensors whose episodes all last the same number of steps, so that its rows never part.

    Beside TorchRL's ``_reset`` and ``_step`` it gives the same step as a function of tensors, which
    `rl2_torchrl.collector.TrialCollector` calls without a TensorDict around it. The two must agree.
    """

    #: Steps of every episode.
    episode_steps: int
    #: What all of the env's own draws are made from.
    generator: torch.Generator
    #: Whether `transition` works on threads of its own, which PyTorch's waiting threads would then keep from the cores.
    has_threads: bool = False

    @abstractmethod
    def first(self, task: torch.Tensor) -> torch.Tensor | None:
        """First observation ``[*B, ...]`` of an episode of ``task`` ``[*B, ...]``; None in an env without observations."""

    @abstractmethod
    def transition(
        self, task: torch.Tensor, observation: torch.Tensor | None, action: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Reward ``[*B, 1]`` and next observation."""
