"""The processes of Gymnasium's `AsyncVectorEnv`: made, called so that none is left behind, and asked for their rows."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import signal
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
from gymnasium.error import AlreadyPendingCallError, ClosedEnvironmentError, CustomSpaceError
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv
from torchrl import torchrl_logger

from rl2_torchrl.interrupts import signals_blocked

__all__ = ["call", "in_processes", "last_row_states", "processes_of"]

#: A terminal's signals reach all processes: these go on until a training has made its update and saved their state. Not SIGTERM,
#: by which a program's end ends them.
_OF_PARENT = [getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name)]
#: What a vector env raises whose processes are gone, closed, or in the middle of a step.
_NOT_ANSWERING = (ClosedEnvironmentError, AlreadyPendingCallError, EOFError, OSError)


def in_processes(makers: Sequence[Callable[[], gymnasium.Env]]) -> AsyncVectorEnv:
    """The envs that ``makers`` make, each in a process of its own, which whoever steps them resets."""
    # TorchRL makes "spawn" the default of the whole program, with which each env would import PyTorch for seconds.
    context = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    # What they return is copied by whoever reads it, with a change of dtype where there is one.
    options = {"context": context, "copy": False, "autoreset_mode": AutoresetMode.DISABLED}
    with signals_blocked(_OF_PARENT):
        try:
            return AsyncVectorEnv(makers, **options)
        except ValueError as error:
            if not isinstance(error.__cause__, CustomSpaceError):
                raise
            torchrl_logger.info(f"GymVectorEnv: observations go through pipes, not shared memory: {error.__cause__}")
            return AsyncVectorEnv(makers, shared_memory=False, **options)


def processes_of(envs: VectorEnv) -> AsyncVectorEnv | None:
    """The vector env that has processes, maybe below wrappers."""
    return envs.unwrapped if isinstance(envs.unwrapped, AsyncVectorEnv) else None


def call(envs: VectorEnv, function: Callable[..., Any], *args, **kwargs) -> Any:
    """``function()`` of ``envs``; where one of its processes fails, or an interrupt comes, all are ended."""
    try:
        return function(*args, **kwargs)
    except (Exception, KeyboardInterrupt) as error:
        envs = processes_of(envs)
        if envs is None:
            raise
        if isinstance(error, ClosedEnvironmentError):
            raise RuntimeError(
                "the processes of the envs have been ended, by close(), an error or an interrupt: make a new env."
            ) from error
        if isinstance(error, KeyboardInterrupt):
            # Gymnasium hands on what its processes have raised, where this one may be about to save.
            is_handed_on = None in envs.parent_pipes
            _end(envs)  # or answers that are still to come would pass for those of the next step
            if is_handed_on:
                raise RuntimeError("Ctrl-C has ended processes of the envs, and with them their trials.") from error
            raise
        # A process that has just died needs a moment to be seen as dead.
        ended = multiprocessing.connection.wait([process.sentinel for process in envs.processes], timeout=1)
        for process in envs.processes:
            process.join(1 if process.sentinel in ended else 0)
        dead = [n for n, process in enumerate(envs.processes) if process.exitcode not in (None, 0)]
        _end(envs)
        if not isinstance(error, EOFError | OSError) or not dead:
            raise
        raise RuntimeError(
            f"the processes of the envs {dead} have died (out of memory, or killed?), and with them their trials. Nothing "
            "that was checkpointed is lost: start again from the newest checkpoint."
        ) from error


def last_row_states(envs: VectorEnv) -> Sequence[Any]:
    """The state of each row of ``envs``, which are about to be closed; in words why there is none, where they do not answer."""
    try:
        processes = processes_of(envs)
        if processes is None:
            return envs.get_attr("row_state")
        processes.call_async("row_state")
        return processes.call_wait(timeout=10)
    except (*_NOT_ANSWERING, multiprocessing.TimeoutError) as error:
        return [f"the envs were closed in the middle of a step ({type(error).__name__})"]


def _end(envs: AsyncVectorEnv) -> None:
    """Ends all processes. Gymnasium's own way waits for the answer of one that has died, and fails."""
    for process in envs.processes:
        process.kill()
    for process in envs.processes:
        process.join()
    for pipe in envs.parent_pipes:
        if pipe is not None:
            pipe.close()
    envs.closed = True
