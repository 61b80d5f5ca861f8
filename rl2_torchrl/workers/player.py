"""`Player`: what runs in a worker."""

from __future__ import annotations

import os
import random
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.envs import EnvBase

from rl2_torchrl.collector import TrialCollector

__all__ = ["Player"]


class Player(TrialCollector):
    """A `TrialCollector` with seeds of its own, which plays a batch by the weights that it is sent.

    Args:
        create_env_fn: as for `TrialCollector`.
        policy: as for `TrialCollector`; a process's is made by ``policy_factory``.
        number: the worker's number, for messages.
        seed: seed of env, tasks and actions.
        **kwargs: as for `TrialCollector`.

    Attributes:
        pid: its process.
    """

    def __init__(self, create_env_fn: Callable[[], EnvBase], policy=None, *, number: int, seed: int, **kwargs):
        self._number, self.pid = number, os.getpid()
        self._seed_everything(seed)  # also what an env draws while it is made
        # What TorchRL's collectors hand on to their workers' are their own defaults.
        options = {**kwargs, "auto_register_policy_transforms": True, "use_buffers": False}
        super().__init__(create_env_fn, policy, **options)
        self.set_seed(seed)
        self._weights = TensorDict.from_module(self.policy).data

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        """As `TrialCollector.set_seed`, with the generators that have no owner too, of which actions are drawn."""
        self._seed_everything(seed)
        return super().set_seed(seed, static_seed)

    @staticmethod
    def _seed_everything(seed: int) -> None:
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)

    def play(self, weights: TensorDictBase, before: Callable[[EnvBase], object] | None = None) -> TensorDictBase:
        """One batch ``[*B, T]`` by the policy with ``weights``, in one piece of memory, after ``before(env)``."""
        try:
            if before is not None:
                before(self.env)
            self._weights.update_(weights)
            return self.rollout().consolidate()
        except Exception as error:
            error.add_note(f"in worker {self._number}:\n{traceback.format_exc()}")
            raise

    def of_env(self, function: Callable[[EnvBase], Any]) -> Any:
        """``function(env)``."""
        return function(self.env)

    def __repr__(self) -> str:  # which Ray puts before each line that an actor prints
        return f"Player(worker {self._number})"

    def __bool__(self) -> bool:  # Ray asks, and an endless collector's len() raises
        return True

    def rows(self) -> int:
        """Trials that are played side by side."""
        return self.env.batch_size.numel()
