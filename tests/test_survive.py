"""A small part of what `survive` and `survive_ray` do at length; as programs, since they fork, and pytest's process has threads."""

import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.survive_ray import signalled


@pytest.mark.parametrize("env", ["pendulum-async", "pendulum-serial"])
def test_a_killed_run_becomes_what_it_would_have_been(env):
    command = [sys.executable, Path(__file__).with_name("survive.py"), "--env", env, "--kills", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{env}: 2 kills" in done.stdout
    assert "bitwise the unbroken run" in done.stdout
    assert "begins new trials" not in done.stderr


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_a_training_on_ray_that_is_asked_to_end_is_saved_and_leaves_no_process(capsys):
    assert signalled(signal.SIGTERM, "ray"), capsys.readouterr().out
