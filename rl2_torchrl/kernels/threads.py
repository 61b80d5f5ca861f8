"""Threads: how many a kernel takes, and what other processes make of them."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torchrl import torchrl_logger

__all__ = ["one_thread", "threads_for", "warn_of_spinning"]

#: Whether this process has run kernels on several threads, and whether it has been warned.
_has_run = _is_warned = False
#: Whether work that this thread looks at is one thread's.
_single = threading.local()


def _least_work(environment: Mapping[str, str]) -> int:
    """Multiplications from which on waking the others costs less than they save: threads that sleep take 0.1 ms to wake."""
    sleep = environment.get("OMP_WAIT_POLICY", "").lower() == "passive" or environment.get("GOMP_SPINCOUNT") == "0"
    return 1_000_000 if sleep else 30_000


#: For the whole program: OpenMP, too, reads how its threads shall wait when it is loaded.
_LEAST_WORK = _least_work(os.environ)


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread for all work that is looked at within."""
    _single.is_on = True
    try:
        yield
    finally:
        _single.is_on = False


def threads_for(multiplications: int) -> int:
    """Threads for that much work."""
    global _has_run
    is_much = multiplications > _LEAST_WORK and not getattr(_single, "is_on", False)
    threads = torch.get_num_threads() if is_much else 1
    _has_run |= threads > 1
    return threads


def _take_one_thread() -> None:
    """In a forked process: the threads that GNU's OpenMP would wake there, for PyTorch's operations too, exist no more."""
    if _has_run and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        torchrl_logger.warning(
            "rl2_torchrl: this process was forked from one that ran several threads, which OpenMP does not survive: PyTorch takes "
            "one thread here. Start processes by 'spawn' or 'forkserver' to have more."
        )


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_take_one_thread)


def warn_of_spinning() -> None:
    """Says once that programs slow each other down: more threads want to run than there are cores, and those that wait spin.

    OpenMP reads how its threads shall wait when PyTorch is loaded; nothing in the program can change it afterwards.
    """
    global _is_warned
    if _is_warned or torch.get_num_threads() == 1 or {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        return
    load = os.getloadavg()[0]
    if load > 1.5 * (os.cpu_count() or math.inf):
        _is_warned = True
        torchrl_logger.warning(
            f"rl2_torchrl: {load:.0f} threads want to run on {os.cpu_count()} cores. PyTorch's hold a core while they wait for "
            "each other, so several programs at once crawl: set OMP_WAIT_POLICY=passive in the environment before Python starts."
        )
