"""A small part of what `survive` and `survive_ray` do at length; as programs, since they fork, and pytest's process has threads."""

import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.survive_ray import signalled


def test_killed_runs_become_what_they_would_have_been():
    envs = ("pendulum-async", "pendulum-serial")
    program = f"from tests.survive import main\nfor env in {envs}:\n    main(env, kills=2)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 0, done.stderr
    for env, said in zip(envs, done.stdout.splitlines(), strict=True):
        assert f"{env}: 2 kills" in said
        assert "bitwise the unbroken run" in said
    assert "begins new trials" not in done.stderr


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_a_training_on_ray_that_is_asked_to_end_is_saved_and_leaves_no_process(capsys):
    assert signalled(signal.SIGTERM, "ray"), capsys.readouterr().out
