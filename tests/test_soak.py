"""What `soak` counts, over a few trainings, and what it takes for growth."""

import re
from dataclasses import replace

import pytest

from tests import soak
from tests.soak import Usage, verdict

FIRST = Usage(mark=1, updates=90, memory=400.0, files=9, threads=1, seconds=0.1, checkpoint=45.0, history=9.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"memory": 424.0}, "memory leaves 5% of 400 MB"),
        ({"files": 10}, r"files change: \[9, 10\]"),
        ({"threads": 2}, r"threads change: \[1, 2\]"),
        ({"checkpoint": 46.0}, "checkpoints grow"),
    ],
)
def test_what_grows_is_named(change, words):
    [wrong] = verdict([FIRST, replace(FIRST, mark=2), replace(FIRST, mark=3, **change)])
    assert re.search(words, wrong)


def test_what_stays_is_not():
    assert not verdict([FIRST, replace(FIRST, updates=180, memory=410.0, seconds=0.2, history=18.0)])


def test_trainings_one_after_the_other_leave_no_file_open(monkeypatch, capsys):
    monkeypatch.setattr(soak, "UPDATES", 1)
    monkeypatch.setattr(soak, "EVERY", 1)
    monkeypatch.setattr(soak, "BOUND", 1.0)  # this process does other things as well
    usages = soak.main(trainings=2)
    assert [usage.updates for usage in usages] == [1, 2]
    assert len({usage.files for usage in usages}) == 1
    assert "nothing grows" in capsys.readouterr().out
