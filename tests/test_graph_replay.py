"""`GraphReplay`: plain calls on the CPU; on a CUDA device warm-up, one recording, replays (here a CUDA of wood)."""

import copy
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from rl2_torchrl.kernels.graph import GraphReplay


@pytest.fixture
def events(monkeypatch):
    """Everything that is asked of CUDA, in order; a graph replays what was called while it was recorded."""
    log, recording = [], []

    class Stream:
        def __init__(self, device):
            self.device = device

        def wait_stream(self, other):
            log.append("wait")

    class Graph:
        def register_generator_state(self, generator):
            log.append(("generator", generator))

        def replay(self):
            log.append("replay")

        def __reduce_ex__(self, protocol):
            raise TypeError("cannot pickle 'CUDAGraph' object")

    @contextmanager
    def stream(on):
        log.append("side stream")
        yield

    @contextmanager
    def graph(of):
        recording.append(of)
        log.append("record")
        yield
        log.append("recorded")

    cuda = {"Stream": Stream, "current_stream": Stream, "stream": stream, "CUDAGraph": Graph, "graph": graph}
    for name, fake in cuda.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return SimpleNamespace(log=log, recording=recording)


def test_every_call_is_a_plain_one_on_the_cpu(events):
    calls = []
    replay = GraphReplay(lambda: calls.append(1), torch.device("cpu"))
    replay(), replay(), replay()
    assert len(calls) == 3
    assert events.log == []


def test_cuda_warms_up_records_once_and_replays(events):
    generator = torch.Generator()
    replay = GraphReplay(lambda: events.log.append("work"), torch.device("cuda"), [generator])
    replay()
    assert events.log == ["wait", "side stream", "work", "wait"]
    events.log.clear()
    replay()
    assert events.log == [("generator", generator), "side stream", "record", "work", "recorded", "replay"]
    events.log.clear()
    replay(), replay()
    assert events.log == ["replay", "replay"]
    assert len(events.recording) == 1


def test_a_copy_makes_a_recording_of_its_own(events):
    replay = GraphReplay(lambda: events.log.append("work"), torch.device("cuda"))
    replay(), replay()
    events.log.clear()
    again = copy.deepcopy(replay)
    again(), again(), replay()
    assert events.log == [
        "wait",
        "side stream",
        "work",
        "wait",
        "side stream",
        "record",
        "work",
        "recorded",
        "replay",
        "replay",
    ]


def test_what_cannot_be_recorded_is_called_each_time(events):
    def work():
        events.log.append("work")
        if events.recording and events.log[-2] == "record":
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    replay = GraphReplay(work, torch.device("cuda"))
    replay()
    assert replay.refusal is None
    events.log.clear()
    replay(), replay()
    assert events.log == ["side stream", "record", "work", "work", "work"]
    assert replay.refusal == "operation not permitted when stream is capturing"
