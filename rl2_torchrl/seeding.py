"""Seeds: what has none of its own takes one from PyTorch's generator, so that `torch.manual_seed` repeats a program."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from operator import index
from typing import SupportsIndex
from zlib import crc32

import numpy as np
import torch
from torchrl.checkpoint import GlobalRNGState

__all__ = ["derived_seed", "random_numbers_put_back", "require_seed", "seed_generator"]

_ROOM = 2**63  # of PyTorch's seeds


def seed_generator(generator: torch.Generator, seed: int | None) -> None:
    """Seeds ``generator``; None draws the seed from PyTorch's default generator.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> one, other = torch.Generator(), torch.Generator()
        >>> seed_generator(one, None), seed_generator(other, None)
        (None, None)
        >>> bool(torch.rand((), generator=one) == torch.rand((), generator=other))
        False
    """
    if seed is None:
        drawn = int(torch.randint(_ROOM - 1, ()))
        # Forked workers hold copies of one default generator: what they draw is told apart by the process's name.
        worker = multiprocessing.parent_process() is not None
        seed = derived_seed(drawn, multiprocessing.current_process().name) if worker else drawn
    require_seed(seed)
    generator.manual_seed(index(seed))


def on_device(generator: torch.Generator | None, device: torch.device) -> torch.Generator | None:
    """``generator``, or one of ``device`` that it seeds: operations draw by one of their own device alone.

    Examples:
        >>> on_device(None, torch.device("cpu")), on_device(torch.Generator(), torch.device("cpu")).device
        (None, device(type='cpu'))
    """
    if generator is None or generator.device.type == device.type:
        return generator
    drawn = torch.randint(_ROOM - 1, (), generator=generator, device=generator.device)
    return torch.Generator(device).manual_seed(int(drawn))


def require_seed(seed: int | None) -> None:
    """TypeError where ``seed`` is neither a whole number nor None, such as a number in quotes."""
    if seed is not None and not isinstance(seed, SupportsIndex):
        raise TypeError(f"seed={seed!r} is no whole number.")


def derived_seed(*parts: int | str | None) -> int:
    """A seed that follows from all ``parts`` and has nothing to do with that of other parts, or with a part itself.

    Examples:
        >>> derived_seed(0, "task") == derived_seed(0, "task"), derived_seed(0, "task") == derived_seed(0, "goal")
        (True, False)
    """
    numbers = [
        crc32(str(part).encode()) if part is None or isinstance(part, str) else index(part) % _ROOM for part in parts
    ]
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def random_numbers_put_back() -> Iterator[None]:
    """What is drawn inside from the program's generators does not change what is drawn afterwards."""
    before = GlobalRNGState().state_dict()
    try:
        yield
    finally:
        GlobalRNGState().load_state_dict(before)
