"""Data-parallel updates: two processes (gloo) take the steps of one process on both batches. They run tests/data_parallel.py."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import nn

from rl2_torchrl.learners import Learners
from tests.data_parallel import CASES

FOLDER = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each of two processes has found."""
    folder = tmp_path_factory.mktemp("learners")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FOLDER)}
    command = [sys.executable, "-m", "tests.data_parallel", "2", str(folder)]
    options = {"cwd": folder, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    program = subprocess.Popen(command, start_new_session=True, **options)
    try:
        output = program.communicate(timeout=300)[0]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(program.pid, signal.SIGKILL)
    assert program.returncode == 0, output
    return [json.loads(Path(folder, f"found-{rank}.json").read_text()) for rank in range(2)]


def test_a_process_that_updates_alone_among_several_is_told_of(monkeypatch, caplog):
    Learners(None)
    monkeypatch.setenv("WORLD_SIZE", "")
    Learners(None)
    assert not caplog.records
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun sets it
    Learners(None)
    assert "None before init_process_group" in caplog.text


@pytest.mark.parametrize("name", CASES)
def test_two_processes_update_as_one_does_on_the_joint_batch(found, name):
    one, other = (each[name] for each in found)
    bound = 1e-12 if name == "float64" else 1e-5
    assert one["apart"] < bound
    assert other["apart"] < bound
    assert one["moved"] > 0.1
    assert max(one["metrics apart"].values()) < 1e-4


def test_gradients_are_clipped_and_passes_stopped_by_what_is_joint(found):
    clipped, early = found[0]["clipped gradients"], found[0]["early stop"]
    assert min(clipped["gradient"]) > 0.05  # before clipping: it was at work in the comparison above
    assert max(early["epochs"]) < 20
    assert found[1]["early stop"]["epochs"] == early["epochs"]


def test_gradients_are_made_part_by_part_in_several_processes_too(found):
    assert (found[0]["parts"]["backend"], found[0]["autograd"]["backend"]) == ("parts", "autograd")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("other rows", "batches are not alike in .*same number of rows"),
        ("other networks", "networks differ .*different updates"),
        ("few chunks", "2 chunks of the joint batch .* too few for each of 2 processes"),
        ("normalised by minibatch", "normalize_advantage=True"),
    ],
)
def test_what_cannot_be_joined_is_refused_in_all_processes(found, name, words):
    for each in found:
        assert re.search(words, each["refused"][name])


def test_a_training_that_one_process_stops_ends_in_all_with_the_same_networks(found):
    rows = {"evaluated": [True, False, True], "interrupted": False}
    assert [each["stopped"] for each in found] == [{"updates": 3, "same": True, **rows}] * 2


def test_a_training_that_is_interrupted_in_one_process_is_in_all(found):
    rows = {"evaluated": [True, False, False], "interrupted": True}
    assert [each["interrupted"] for each in found] == [{"updates": 3, "same": True, **rows}] * 2


def test_a_training_is_resumed_by_all_processes_from_the_same_update_or_by_none(found):
    for each in (one["resumed"] for one in found):
        assert re.search(r"begin at different env steps, \[216, 0\] by rank", each["lost"])
        assert re.search(r"begin at different env steps, \[216, 108\] by rank", each["older"])
        assert each["updates"] == 3


class Counting(nn.Linear):
    """A network that keeps more than tensors."""

    def get_extra_state(self):
        return {"seen": 3}

    def set_extra_state(self, state):
        self.seen = state["seen"]


def test_extra_state_is_given_to_all_processes():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        Learners(dist.group.WORLD).begin_alike(network := Counting(1, 1), torch.Generator())
    finally:
        dist.destroy_process_group()
    assert network.seen == 3
