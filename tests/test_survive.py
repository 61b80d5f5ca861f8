"""A small part of what `survive` does at length; as a program, since it forks, and pytest's process has threads."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("env", ["pendulum-async", "pendulum-serial"])
def test_a_killed_run_becomes_what_it_would_have_been(env):
    command = [sys.executable, Path(__file__).with_name("survive.py"), "--env", env, "--kills", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{env}: 2 kills" in done.stdout
    assert "bitwise the unbroken run" in done.stdout
    assert "begins new trials" not in done.stderr
