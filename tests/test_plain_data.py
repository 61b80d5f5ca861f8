"""Values of many kinds, taken apart and put together again: equal, of the same types, and one thing in two places still one."""

import collections
import enum
import pathlib
import random
import sys
from datetime import datetime
from typing import NamedTuple

import numpy as np
import pytest
import torch

from rl2_torchrl.codec import Decoder, NoStateError
from rl2_torchrl.storage import from_bytes, to_bytes

HERE = {__name__.partition(".")[0]}


class Colour(enum.Enum):
    RED = "red"


class Has(enum.Flag):
    KEY, LAMP = 1, 2


class Level(enum.IntEnum):
    LOW, HIGH = 1, 2


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
    return from_bytes(to_bytes(value, HERE, known[0]), "the value", HERE, known[1], now)


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
        [range(1, 9, 2), pathlib.Path("levels", "1.txt"), Place(1, np.zeros(2)), Colour.RED, Has.KEY, Level.HIGH],
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


@pytest.mark.parametrize("names", [("whole", "part", "last"), ("last", "part", "whole")])
def test_what_looks_into_an_array_still_does(names):
    env, other = Room(), Room()
    whole = np.arange(6.0).reshape(3, 2)
    views = {"whole": whole, "part": whole[:2, 1], "last": whole[::-1].T}
    for name in names:
        setattr(env, name, views[name])
    there_and_back(env, now=other)
    for name in names:
        np.testing.assert_array_equal(getattr(other, name), views[name])
    other.whole += 1
    assert (other.part.tolist(), other.last[0, 0]) == ([2, 4], 5)


def test_arrays_are_two_where_they_were_two():
    env, other = Room(), Room()
    env.before, env.now = np.zeros(2), np.ones(2)
    other.before = other.now = np.full(2, 9.0)  # as after a reset
    there_and_back(env, now=other)
    assert (other.before.tolist(), other.now.tolist()) == ([0, 0], [1, 1])


def test_generators_that_are_one_become_two_where_they_were_two():
    env, other = Room(), Room()
    env.first, env.second = np.random.default_rng(0), np.random.default_rng(1)
    other.first = other.second = np.random.default_rng(2)
    there_and_back(env, now=other)
    assert [other.first.normal(), other.second.normal()] == [env.first.normal(), env.second.normal()]


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
        *(slice(1), datetime.now(), random.SystemRandom(), torch.zeros(1).to_sparse(), 1j, Has.KEY | Has.LAMP),
    ],
)
def test_what_is_no_plain_data_is_named(value):
    room = Room({"a": value})
    with pytest.raises(NoStateError, match=rf"things.0.a is a {type(value).__name__}"):
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
    with pytest.raises(ValueError, match="no class of the packages"):
        Decoder([], {*HERE, "planted"})({"object": [name, []]})
    assert "planted" not in sys.modules


def test_a_file_makes_no_member_but_an_enumerations():
    with pytest.raises(ValueError, match="no class"):
        Decoder([], HERE)({"member": [f"{__name__}:Room", "things"]})


def test_views_of_objects_come_back_apart():
    things = np.array([1, "two", None], dtype=object)
    again = from_bytes(to_bytes({"all": things, "last": things[1:]}), "here")
    assert again["all"].tolist() == [1, "two", None]
    assert again["last"].tolist() == ["two", None]


def test_nothing_is_made_of_a_kind_that_is_none():
    with pytest.raises(ValueError, match="'eval' is no kind of value"):
        Decoder([], HERE)({"eval": "1"})


def test_no_array_looks_into_objects():
    objects = {"items": ["|O", [2], [1, 2]]}
    with pytest.raises(ValueError, match="only arrays of numbers look into others"):
        Decoder([], HERE)({"view": [objects, [1], 4, [8]]})
    with pytest.raises(ValueError, match="strides"):
        Decoder([torch.zeros(2)], HERE)({"view": [{"array": {"tensor": [0, "cpu"]}}, [3], 0, [4]]})


def test_an_array_that_others_hold_gets_other_numbers():
    env, other = Room(), Room()
    env.level = np.full(2, 3.0)
    held = other.level = np.ones(2)
    there_and_back(env, now=other)
    assert other.level is held
    assert held.tolist() == [3, 3]
