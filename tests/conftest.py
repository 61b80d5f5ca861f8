"""The suite runs in several processes side by side (pytest-xdist): threads of one that wait must not spin on another's core."""

import logging
import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # read by OpenMP when PyTorch is loaded, which is later
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture
def told():
    """What is said through TorchRL's log."""
    from torchrl import torchrl_logger  # which loads PyTorch

    told, handler = [], logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    torchrl_logger.addHandler(handler)
    yield told
    torchrl_logger.removeHandler(handler)
