"""Where a `Player` runs: a process, or a Ray actor. TorchRL's collectors start it, pass calls on to it, and end it."""

from __future__ import annotations

import signal
import threading
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

from rl2_torchrl.interrupts import signals_blocked
from rl2_torchrl.workers.player import Player

__all__ = ["ActorHost", "Host", "threads_kept"]

_SECONDS_TO_DIE = 5.0


class Host:
    """A worker, here a process: started when it is made, which takes seconds, since it imports PyTorch.

    Args:
        create_env_fn: makes its env.
        policy: its policy, on the CPU.
        frames: env steps of its batches.
        player: further arguments of `Player`.
        options: further arguments of TorchRL's collector.

    Attributes:
        collector: TorchRL's collector of one worker.
    """

    def __init__(
        self, create_env_fn: Callable[[], EnvBase], policy: nn.Module, frames: int, player: dict, options: dict
    ):
        defaults = {"num_threads": torch.get_num_threads(), "init_fn": _leave_signals_to_parent, "cat_results": "stack"}
        self.collector: BaseCollector = MultiSyncCollector(
            [create_env_fn],
            policy_factory=partial(_given, policy),
            frames_per_batch=frames,
            collector_class=partial(Player, **player),
            **{**defaults, **options},
        )

    @staticmethod
    def begin(options: dict) -> None:
        """Starts what all workers of a collector need, of the thread that calls; ImportError where that is not installed."""

    def call(self, method: str, *arguments: Any) -> Any:
        """What the player's ``method`` returns, or raises."""
        return self.collector.map_fn(method, [arguments])[0]

    @staticmethod
    def sendable(weights: TensorDictBase) -> Any:
        """``weights`` for a `call` of many workers, packed once."""
        return weights

    def why_dead(self, error: Exception) -> str | None:
        """After a `call` raised ``error``: how the worker died, in words; None where it lives, and the error is the player's."""
        process = self.collector.procs[0]
        if isinstance(error, (EOFError, OSError)):  # its end of the pipe is closed: it dies, and may not have yet
            process.join(_SECONDS_TO_DIE)
        return None if process.is_alive() else f"exit code {process.exitcode}"

    @staticmethod
    def why_not_started(error: Exception) -> str | None:
        """As `why_dead`, after ``error`` where a worker was to be made."""
        return "while it was starting" if isinstance(error.__cause__, EOFError) else None

    def shutdown(self) -> None:
        """Ends the worker, and waits for that."""
        self.collector.shutdown()


class ActorHost(Host):
    """A Ray actor."""

    @staticmethod
    def begin(options):
        if find_spec("ray") is None:
            raise ImportError('backend="ray" needs Ray, which is not installed: pip install "rl2_torchrl[ray]".')
        import ray

        # Here, in the thread that makes the collector: the kernel kills what Ray starts when the thread ends that has started it.
        # The cluster ends with the program.
        if not ray.is_initialized():
            before = signal.getsignal(signal.SIGTERM)
            with signals_blocked(_OF_PARENT):
                ray.init(**options.get("ray_init_config", {"logging_level": "error"}))
            if threading.current_thread() is threading.main_thread() and before is not None:
                signal.signal(signal.SIGTERM, before)  # which Ray has replaced

    def __init__(self, create_env_fn, policy, frames, player, options):
        from torchrl.collectors.distributed import RayCollector

        self.collector = RayCollector(
            [create_env_fn],
            policy,
            frames_per_batch=frames,
            collector_class=Player,
            collector_kwargs=[dict(player)],
            sync=True,
            weight_sync_schemes={},
            **{"remote_configs": {"num_cpus": 1, "num_gpus": 0}, **options},
        )

    @staticmethod
    def sendable(weights):
        import ray

        return ray.put(weights)

    def why_dead(self, error):
        return self.why_not_started(error)

    @staticmethod
    def why_not_started(error):
        from ray.exceptions import RayError, RayTaskError

        is_own = isinstance(error, RayError) and not isinstance(error, RayTaskError)
        return str(error).partition("\n")[0] if is_own else None


def _given(policy: nn.Module) -> nn.Module:
    return policy


#: A terminal's and a scheduler's signals reach all processes: the training ends the workers when it has saved what it needs.
_OF_PARENT = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def _leave_signals_to_parent() -> None:
    for signum in _OF_PARENT:
        signal.signal(signum, signal.SIG_IGN)


@contextmanager
def threads_kept() -> Iterator[None]:
    """Around `Host.shutdown`: `MultiSyncCollector` gives PyTorch a thread more when it ends."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
