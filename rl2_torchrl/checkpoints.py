"""`RunCheckpoints`: all that a training goes on from, saved to a folder and restored from it."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from torchrl.checkpoint import Checkpoint, CheckpointError, CheckpointRotation, GlobalRNGState
from torchrl.collectors import BaseCollector

from rl2_torchrl.collector import load_rollout_state, rollout_state

__all__ = ["RunCheckpoints", "Stateful"]

log = logging.getLogger(__name__)


class Stateful(Protocol):
    """What a checkpoint holds: anything with a state to save and to put back."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class RunCheckpoints:
    """The newest checkpoints of a run: networks, optimizer, tasks, envs, random numbers, history and callbacks.

    Args:
        folder: where they are; None saves nothing.
        update: the `PPOUpdate`.
        collector: the collector, and with it the policy, the tasks and the env.
        callbacks: objects with a state of their own.
        result: what the training has done so far, a `TrainResult`.
        returns: what the running trials have earned so far.

    Raises:
        OSError: nothing can be written to ``folder``. Found here, before hours of training that could not be saved.
    """

    def __init__(
        self,
        folder: str | Path | None,
        *,
        update: Stateful,
        collector: BaseCollector,
        callbacks: Sequence[Stateful],
        result: Stateful,
        returns: Any,
    ):
        self._rotation = None if folder is None else CheckpointRotation(folder, keep_last=2)
        if self._rotation is not None:
            _require_writable(self._rotation.directory)
        self._checkpoint = Checkpoint(
            update=update,
            collector=collector,
            rollout=_RolloutState(collector, returns),
            callbacks=_States(callbacks),
            result=result,
            rng=GlobalRNGState(),
        )

    def save(self, env_steps: int) -> None:
        """Writes a checkpoint named after ``env_steps``; the two newest are kept."""
        if self._rotation is not None:
            self._rotation.save(self._checkpoint, step=env_steps)

    def load_latest(self) -> None:
        """Restores the newest checkpoint; where there is none a warning says so.

        Raises:
            ValueError: it was made with other networks, envs or tasks.
        """
        latest = self._rotation.latest()
        if latest is None:
            log.warning("resume=True, but %s holds no checkpoint: starting anew.", self._rotation.directory)
            return
        try:
            self._checkpoint.load(latest)
        except CheckpointError as error:
            raise ValueError(
                f"cannot resume from {latest}: it was made with other networks, envs, tasks or callbacks. Give them the "
                f"sizes they had, or start anew without resume. {error}"
            ) from error

    def set_aside(self) -> None:
        """Moves an earlier run's checkpoints away: the rotation would delete those with fewer steps, new or not."""
        if self._rotation is None or self._rotation.latest() is None:
            return
        folder = self._rotation.directory
        aside = next(path for n in count(1) if not (path := folder.with_name(f"{folder.name}-old{n}")).exists())
        folder.rename(aside)
        log.warning("%s held the checkpoints of an earlier run (resume=False): moved to %s.", folder, aside)


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"checkpoints={str(folder)!r} cannot be written to ({error}), so the training could not be saved: name another "
            "folder, or None to save no checkpoints."
        ) from error


class _States:
    """Several objects as one component of a checkpoint, by their place in the list."""

    def __init__(self, objects: Sequence[Stateful]):
        self._objects = objects

    def state_dict(self) -> dict[str, Any]:
        return {str(number): state for number, each in enumerate(self._objects) if (state := each.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for number, own in state.items():
            self._objects[int(number)].load_state_dict(own)


class _RolloutState:
    """Where the collector stands in its trials, and what these have earned so far."""

    def __init__(self, collector: BaseCollector, returns: Any):
        self._collector, self._returns = collector, returns

    def state_dict(self) -> dict[str, Any]:
        state = rollout_state(self._collector)
        return {**state, "earned": self._returns.carry} if state else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            load_rollout_state(self._collector, state)
            self._returns.carry = state["earned"]
