"""Where there is no CUDA device its tests run on one of wood (tests/wooden_cuda.py), in a process of its own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_what_is_asked_of_a_device_holds_on_one_of_wood():
    options = ("-o", "addopts=", "-q", "-p", "no:cacheprovider", "-p", "wooden_cuda", "-W", "ignore")
    command = [sys.executable, "-m", "pytest", *options, TESTS / "test_cuda.py"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
