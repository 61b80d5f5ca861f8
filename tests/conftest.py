"""The suite runs in several processes side by side (pytest-xdist): threads of one that wait must not spin on another's core."""

import logging
import os
import shutil
import signal

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # read by OpenMP when PyTorch is loaded, which is later
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

collect_ignore = ["wooden_cuda.py"]  # a plugin, which must come before PyTorch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a script's background; tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def told():
    """What is said through TorchRL's log."""
    from torchrl import torchrl_logger  # which loads PyTorch

    told, handler = [], logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    torchrl_logger.addHandler(handler)
    yield told
    torchrl_logger.removeHandler(handler)


@pytest.fixture(scope="session")
def unbroken():
    """A run of five updates that nothing happens to."""
    from runs import Run, without_time

    run = Run(5)
    run.history = without_time(run.train().history)
    return run


@pytest.fixture(scope="session")
def stopped(tmp_path_factory):
    """The folder of a run that was stopped after three updates: checkpoints of the second and the third."""
    from runs import BATCH, Run

    folder = tmp_path_factory.mktemp("stopped") / "run"
    Run(5).train(checkpoints=folder, checkpoint_interval=1, stop=lambda row: row["env_steps"] >= 3 * BATCH)
    return folder


@pytest.fixture
def folder(stopped, tmp_path):
    """One's own of `stopped`."""
    return shutil.copytree(stopped, tmp_path / "run")


@pytest.fixture
def unpainted():
    """No figure is painted: of a tiny run it takes as long as all else."""
    from recipe_runs import without_paint

    with without_paint():
        yield
