"""Where a `Player` runs: a process, or a Ray actor. TorchRL's collectors start it, pass calls on to it, and end it."""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl.collectors import BaseCollector, MultiSyncCollector
from torchrl.envs import EnvBase

from rl2_torchrl.workers.player import Player

__all__ = ["ActorHost", "Host", "ProcessHost", "threads_kept"]

_SECONDS_TO_DIE = 5.0


class Host(ABC):
    """A worker: started when it is made, which takes seconds, since it imports PyTorch.

    Args:
        create_env_fn: makes its env.
        policy: its policy, on the CPU.
        frames: env steps of its batches.
        player: further arguments of `Player`.
        options: further arguments of TorchRL's collector.
    """

    #: TorchRL's collector of one worker.
    collector: BaseCollector

    @abstractmethod
    def __init__(
        self, create_env_fn: Callable[[], EnvBase], policy: nn.Module, frames: int, player: dict, options: dict
    ): ...

    @staticmethod
    @abstractmethod
    def require() -> None:
        """ImportError where what it takes is not installed."""

    def call(self, method: str, *arguments: Any) -> Any:
        """What the player's ``method`` returns, or raises."""
        return self.collector.map_fn(method, [arguments])[0]

    @staticmethod
    def sendable(weights: TensorDictBase) -> Any:
        """``weights`` for a `call` of many workers, packed once."""
        return weights

    @abstractmethod
    def why_dead(self, error: Exception) -> str | None:
        """After a `call` raised ``error``: how the worker died, in words; None where it lives, and the error is the player's."""

    def shutdown(self) -> None:
        """Ends the worker, and waits for that."""
        self.collector.shutdown()


class ProcessHost(Host):
    """A process."""

    @staticmethod
    def require():
        return

    def __init__(self, create_env_fn, policy, frames, player, options):
        defaults = {"num_threads": torch.get_num_threads(), "init_fn": _leave_signals_to_parent, "cat_results": "stack"}
        self.collector = MultiSyncCollector(
            [create_env_fn],
            policy_factory=partial(_given, policy),
            frames_per_batch=frames,
            collector_class=partial(Player, **player),
            **{**defaults, **options},
        )

    def why_dead(self, error):
        process = self.collector.procs[0]
        if isinstance(error, (EOFError, OSError)):  # its end of the pipe is closed: it dies, and may not have yet
            process.join(_SECONDS_TO_DIE)
        return None if process.is_alive() else f"exit code {process.exitcode}"


class ActorHost(Host):
    """A Ray actor."""

    @staticmethod
    def require():
        if find_spec("ray") is None:
            raise ImportError('backend="ray" needs Ray, which is not installed: pip install "rl2_torchrl[ray]".')

    def __init__(self, create_env_fn, policy, frames, player, options):
        from torchrl.collectors.distributed import RayCollector

        defaults = {"remote_configs": {"num_cpus": 1, "num_gpus": 0}, "ray_init_config": {"logging_level": "error"}}
        self.collector = RayCollector(
            [create_env_fn],
            policy,
            frames_per_batch=frames,
            collector_class=Player,
            collector_kwargs=[dict(player)],
            sync=True,
            weight_sync_schemes={},
            **{**defaults, **options},
        )

    @staticmethod
    def sendable(weights):
        import ray

        return ray.put(weights)

    def why_dead(self, error):
        from ray.exceptions import RayError, RayTaskError

        is_own = isinstance(error, RayError) and not isinstance(error, RayTaskError)
        return str(error).partition("\n")[0] if is_own else None


def _given(policy: nn.Module) -> nn.Module:
    return policy


def _leave_signals_to_parent() -> None:
    """A terminal's and a scheduler's signals reach all processes: the training ends the workers when it has saved what it needs."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


@contextmanager
def threads_kept() -> Iterator[None]:
    """Around `Host.shutdown`: `MultiSyncCollector` gives PyTorch a thread more when it ends."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
