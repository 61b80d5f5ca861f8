"""Values of many kinds, taken apart and put together again: equal, of the same types, and one thing in two places still one."""

import collections
import enum
import pathlib
import random
import sys
from datetime import datetime, timedelta
from typing import NamedTuple

import numpy as np
import pytest
import torch

from rl2_torchrl.envs.plain_data import NoStateError, Restorer, Saver
from rl2_torchrl.storage import from_bytes, to_bytes

HERE = {__name__.partition(".")[0]}


class Colour(enum.Enum):
    RED = "red"


class Has(enum.Flag):
    KEY, LAMP = 1, 2


class Place(NamedTuple):
    floor: int
    at: np.ndarray


class Room:
    def __init__(self, *things):
        self.things, self.next = list(things), None


class Slotted:
    __slots__ = ("place",)


class PartlySlotted(Slotted):
    pass


class Numbers(dict):
    pass


def there_and_back(value, now=None, known=((), ())):
    data = to_bytes(Saver(HERE, known[0])(value, "env.value"))
    return Restorer(HERE, known[1])(from_bytes(data, "the value"), now)


@pytest.mark.parametrize(
    "value",
    [
        (1, 2.5, "a", None, True, float("inf"), 2**100),
        [np.float32(0.1), np.int8(3), np.bool_(True), np.str_("b"), b"\x00\xff"],
        {("a", 1): {2, 3}, "b": collections.deque([1, 2], maxlen=2), "c": frozenset([4])},
        collections.OrderedDict(b=1, a=[2]),
        {
            "letters": np.array([[b"S", b"F"]]),
            "words": np.array(["a", "bc"]),
            "mixed": np.array([1, "a", None], dtype=object),
        },
        [1j, range(1, 9, 2), timedelta(3, 2, 1), pathlib.Path("levels", "1.txt"), Place(1, np.zeros(2))],
        [Colour.RED, Has.KEY, Has.KEY | Has.LAMP, Has(0)],
    ],
)
def test_values_come_back_equal_and_of_their_types(value):
    def types(value):
        inner = value.items() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
        return (
            type(value),
            getattr(value, "dtype", None),
            getattr(value, "maxlen", None),
            [types(item) for item in inner],
        )

    back = there_and_back(value)
    np.testing.assert_equal(back, value)
    assert types(back) == types(value)


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (np.random.default_rng, lambda generator: generator.normal()),
        (lambda seed: np.random.Generator(np.random.MT19937(seed)), lambda generator: generator.normal()),
        (lambda seed: np.random.Generator(np.random.Philox(seed)), lambda generator: generator.normal()),
        (np.random.RandomState, lambda generator: generator.normal()),
        (lambda seed: np.random.RandomState(np.random.SFC64(seed)), lambda generator: generator.normal()),
        (random.Random, lambda generator: generator.gauss(0, 1)),
        (lambda seed: torch.Generator().manual_seed(seed), lambda generator: torch.rand(1, generator=generator).item()),
    ],
)
def test_generators_go_on(make, draw):
    generator = make(0)
    draw(generator)
    back, other = there_and_back(generator), make(1)
    assert there_and_back(generator, now=other) is other
    assert draw(generator) == draw(back) == draw(other)


def test_one_thing_in_two_places_stays_one():
    place, tensor = np.zeros(2), torch.zeros(1)
    room = Room(place, tensor, Colour.RED)
    room.next = Room(room, place, tensor)
    room.next.next = room.next  # a circle
    back = there_and_back(room)
    assert back.next.things[0] is back
    assert back.next.next is back.next
    assert back.next.things[1] is back.things[0]
    assert back.next.things[2] is back.things[1]
    assert back.things[2] is Colour.RED
    assert back is not room


def test_what_both_sides_know_is_not_taken_apart():
    ours, theirs = object(), object()
    assert there_and_back(Room(ours), known=([ours], [theirs])).things == [theirs]


ARRAYS_AND_TENSORS = pytest.mark.parametrize("of", [np, torch])


@ARRAYS_AND_TENSORS
@pytest.mark.parametrize("same", [lambda array: array, lambda array: array[:]])
def test_arrays_that_are_one_become_two_where_they_were_two(same, of):
    env, other = Room(), Room()
    env.before, env.now = of.zeros(2), of.ones(2)
    other.before = of.full((2,), 9.0)
    other.now = same(other.before)  # as after a reset
    there_and_back(env, now=other)
    assert (other.before.tolist(), other.now.tolist()) == ([0, 0], [1, 1])


def test_generators_that_are_one_become_two_where_they_were_two():
    env, other = Room(), Room()
    env.first, env.second = np.random.default_rng(0), np.random.default_rng(1)
    other.first = other.second = np.random.default_rng(2)
    there_and_back(env, now=other)
    assert [other.first.normal(), other.second.normal()] == [env.first.normal(), env.second.normal()]


@ARRAYS_AND_TENSORS
@pytest.mark.parametrize("names", [("whole", "part"), ("part", "whole")])
def test_what_looks_into_an_array_still_does(names, of):
    env, other = Room(), Room()
    for room, value in ((env, 1.0), (other, 9.0)):
        whole = of.full((3,), value)
        views = {"whole": whole, "part": whole[:2]}
        for name in names:
            setattr(room, name, views[name])
    there_and_back(env, now=other)
    other.whole += 1
    assert other.part.tolist() == [2, 2]


def test_a_tensor_that_looks_into_an_array_still_does():
    env, other = Room(), Room()
    for room, value in ((env, 1.0), (other, 9.0)):
        room.whole = np.full(3, value)
        room.part = torch.from_numpy(room.whole)[:2]
    there_and_back(env, now=other)
    other.whole += 1
    assert other.part.tolist() == [2, 2]


def test_a_tensor_that_is_a_row_of_a_constant_leaves_that_alone():
    goals = torch.tensor([[1.0], [2.0]])
    env, other = Room(), Room()
    env.goal, other.start, other.goal = goals[1], goals[1], goals[0]
    env.start = goals[0]
    there_and_back(env, now=other)
    assert (goals.tolist(), other.goal.tolist()) == ([[1], [2]], [2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "now",
    [
        torch.zeros(1).expand(2),
        torch.zeros(2, requires_grad=True),
        torch.zeros(3),
        torch.zeros(2, device="meta"),
        np.zeros(2, np.float32),
    ],
)
def test_a_tensor_of_another_kind_is_replaced(now, dtype):
    env, other = Room(), Room()
    env.place, other.place = torch.tensor([1.0, 2.0], dtype=dtype), now
    there_and_back(env, now=other)
    assert torch.equal(other.place, env.place)
    assert other.place is not now


@pytest.mark.parametrize(
    "value",
    [
        *(
            object(),
            Slotted(),
            PartlySlotted(),
            Numbers(),
            np.zeros(1, complex),
            torch.nn.Linear(1, 1),
            len,
            Colour,
        ),
        *(slice(1), datetime.now(), random.SystemRandom(), torch.zeros(1).to_sparse()),
    ],
)
def test_what_is_no_plain_data_is_named(value):
    room = Room({"a": value})
    with pytest.raises(NoStateError, match=rf"env.value.things\[0\]\['a'\] is a {type(value).__name__}"):
        there_and_back(room)


@pytest.mark.parametrize(
    "name",
    [
        "subprocess:Popen",  # of another package
        "planted:Thing",  # not imported
        f"{__name__}:pytest",  # no class
        f"{__name__}:random.Random",  # by way of this module
        f"{__name__}:Nothing",
    ],
)
def test_a_file_names_no_class_but_the_envs_own_and_nothing_is_imported(name, tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text("class Thing: ...")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="no class of the env's own packages"):
        Restorer({*HERE, "planted"})(["object", name, []])
    assert "planted" not in sys.modules


def test_a_file_makes_no_class_but_a_flag_of_a_number():
    with pytest.raises(ValueError, match="no class"):
        Restorer(HERE)(["flag", f"{__name__}:Room", 3])
