"""`quiet_torchrl`: what TorchRL says of its own inner doings stays off the screen where this package is the one that uses it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torchrl
from torchrl import torchrl_logger

__all__ = ["quiet_torchrl"]

_TORCHRL = str(Path(torchrl.__file__).parent)


@contextmanager
def quiet_torchrl() -> Iterator[None]:
    """Drops INFO lines from TorchRL's own files; its warnings, and what we say through its logger, are heard.

    Whoever has asked for more than TorchRL says by default (``RL_LOGGING_LEVEL=DEBUG``) gets all of it.

    Examples:
        >>> import torch
        >>> from torchrl.data import LazyTensorStorage
        >>> with quiet_torchrl():  # "Initialized LazyTensorStorage with ..." would stand in the midst of a progress bar
        ...     LazyTensorStorage(3).set(0, torch.zeros(2))
    """
    if torchrl_logger.level < logging.INFO:
        yield
        return
    torchrl_logger.addFilter(_is_heard)
    try:
        yield
    finally:
        torchrl_logger.removeFilter(_is_heard)


def _is_heard(record: logging.LogRecord) -> bool:
    return record.levelno > logging.INFO or not record.pathname.startswith(_TORCHRL)
