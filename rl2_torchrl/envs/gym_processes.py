"""The processes of Gymnasium's `AsyncVectorEnv`: calls that leave none of them behind, and what their rows are at the end."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
from collections.abc import Callable, Sequence
from typing import Any

from gymnasium.error import AlreadyPendingCallError, ClosedEnvironmentError
from gymnasium.vector import AsyncVectorEnv, VectorEnv

__all__ = ["call", "last_row_states", "processes_of"]

#: What a vector env raises whose processes are gone, closed, or in the middle of a step.
_NOT_ANSWERING = (ClosedEnvironmentError, AlreadyPendingCallError, EOFError, OSError)


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
