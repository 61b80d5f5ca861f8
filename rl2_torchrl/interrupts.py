"""`deferred_interrupts`: Ctrl-C and requests to end wait until a training can be saved; `signals_blocked`, where to ignore them."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

__all__ = ["EndRequested", "Interrupts", "deferred_interrupts", "signals_blocked"]

log = logging.getLogger(__name__)

#: What asks a program to end: a schedulers' and containers' stop, and a terminal that is closed.
_ENDS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class EndRequested(BaseException):
    """A request to end the program, that has come where `Interrupts.at_once` says so."""


class Interrupts:
    """Whether a signal has come, and which.

    Attributes:
        signum: the first signal's number, or None.
        ends_at_once: whether `at_once` is entered.
    """

    signum: int | None = None
    ends_at_once = False

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it a request that ends the program raises `EndRequested`: what is done there can be done again.

        Not Ctrl-C, and none that the program answers itself: it may go on with envs that are in the middle of a step.
        """
        self.ends_at_once = True
        try:
            yield
        finally:
            self.ends_at_once = False

    def __bool__(self) -> bool:
        return self.signum is not None

    def pass_on(self) -> None:
        """Ends the program, where a signal has asked for that: to be called once all is saved."""
        if self.signum not in _ENDS:
            return
        if callable(signal.getsignal(self.signum)):
            signal.raise_signal(self.signum)
        else:
            raise SystemExit(128 + self.signum)  # as a shell names it; an exit that lets envs' processes end, too


@contextmanager
def deferred_interrupts() -> Iterator[Interrupts]:
    """The first signal is only noted, so that no update is cut in the middle; the second does what it always does.

    Only in the main thread, where Python handles signals. What is ignored, as SIGHUP under nohup and
    SIGINT in a script's background, stays so.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    signums = (signal.SIGINT, *_ENDS)
    before = {signum: handler for signum in signums if (handler := signal.getsignal(signum)) is not signal.SIG_IGN}

    def first(signum: int, frame: Any) -> None:
        restore()
        name = signal.Signals(signum).name
        log.warning(
            "%s: finishing this update and saving. Once more stops at once.", "Ctrl-C" if name == "SIGINT" else name
        )
        interrupts.signum = signum
        if interrupts.ends_at_once and signum in _ENDS and not callable(before[signum]):
            raise EndRequested

    def restore() -> None:
        for signum, handler in before.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)  # None: it was not set by Python

    for signum in before:
        signal.signal(signum, first)
    try:
        yield interrupts
    finally:
        restore()


@contextmanager
def signals_blocked(signums: Sequence[int]) -> Iterator[None]:
    """In this thread, and for good in the processes that it starts."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signums)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
