"""`SyncRows`: steps as Gymnasium's `SyncVectorEnv` does, and raises where that does."""

from functools import partial

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit
from line_envs import Line, lines

from rl2_torchrl.envs.gym_row import GymRow
from rl2_torchrl.envs.gym_sync import SyncRows

SPACES = {
    "reals": spaces.Box(-1, 1, (3,), np.float64),
    "number": spaces.Box(-1, 1, (), np.float32),
    "pictures": spaces.Box(0, 255, (4, 4, 3), np.uint8),
    "choice": spaces.Discrete(5, start=-2),
    "choices": spaces.MultiDiscrete([2, 3]),
    "flags": spaces.MultiBinary(4),
    "dictionary": spaces.Dict({"one": spaces.Discrete(3), "other": spaces.Box(-1, 1, (2,))}),
    "tuple": spaces.Tuple([spaces.Discrete(3), spaces.Box(-1, 1, (2,))]),
    "text": spaces.Dict({"text": spaces.Text(3), "number": spaces.Box(-1, 1, (1,))}),
}


class Shows(gymnasium.Env):
    """Observes what its space draws, for 3 steps, or what ``shown`` says of a step."""

    action_space = spaces.Discrete(2)

    def __init__(self, space, shown=None):
        self.observation_space, self.shown, self.steps = space, shown, 0
        self.observation_space.seed(0)

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.steps += 1
        shown = self.observation_space.sample() if self.shown is None else self.shown
        info = {"steps": self.steps} if action else {}
        return shown, float(action) / 3, self.steps >= 3, False, info


def rows_of(kind, makers, asks=True):
    keys = ["steps"] if asks else []
    makers = [partial(GymRow, make, n, None, None, None, keys) for n, make in enumerate(makers)]
    if kind is SyncRows:
        return SyncRows(makers, asks=asks)
    return SyncVectorEnv(makers, copy=False, autoreset_mode=AutoresetMode.DISABLED)


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return np.array_equal(one, other) and np.asarray(one).dtype == np.asarray(other).dtype


@pytest.mark.parametrize("name", SPACES)
def test_a_step_is_gymnasiums(name):
    ours, theirs = (rows_of(kind, [partial(Shows, SPACES[name])] * 3) for kind in (SyncRows, SyncVectorEnv))
    for envs in (ours, theirs):
        SPACES[name].seed(7)  # all envs share it
        envs.reset()
        envs.played = []
        for actions in ([0, 1, 0], [1, 1, 1], [0, 0, 0]):
            *played, infos = envs.step(np.array(actions))
            envs.played.append((*(np.copy(each) if isinstance(each, np.ndarray) else each for each in played), infos))
            if isinstance(played[0], dict | tuple):
                break  # Gymnasium writes the next ones over these
    assert all(map(same, ours.played, theirs.played))
    assert ours.played[0][-1]["steps"].tolist() == [0, 1, 0]


def test_observations_are_rounded_to_their_spaces_dtype():
    """As those of a reset and of other processes are, which Gymnasium puts into an array of it."""
    space, shown = spaces.Box(-1, 1, (2,), np.float16), np.array([0.1, 1 / 3])
    for kind in (SyncRows, SyncVectorEnv):
        envs = rows_of(kind, [partial(Shows, space, shown)] * 2)
        envs.reset()
        observations, *_ = envs.step(np.array([0, 0]))
        assert observations.dtype == np.float16
        assert (observations == shown.astype(np.float16)).all()


def test_what_nobody_asks_for_is_passed_by_after_one_look():
    envs = rows_of(SyncRows, [Line] * 2, asks=False)
    envs.reset(seed=[0, 1])
    assert envs.step(np.array([1, 0]))[-1] == {}
    assert [row.said for row in envs.envs] == [["steps"]] * 2
    for row in envs.envs:
        row.step = None  # looked at, and not called any more
    assert envs.step(np.array([1, 0]))[-1] == {}
    assert [row.unwrapped.steps for row in envs.envs] == [2, 2]


def test_what_a_step_gives_stays():
    envs = rows_of(SyncRows, [Line] * 2)
    envs.reset(seed=[0, 1])
    steps = [envs.step(np.array([1, 0])) for _ in range(3)]
    assert [terminated.tolist() for _, _, terminated, *_ in steps] == [[False, False], [False, False], [True, False]]
    assert len({observations.tobytes() for observations, *_ in steps}) == 3


def test_what_is_put_around_a_row_is_stepped():
    class Spy(gymnasium.Wrapper):
        steps = 0

        def step(self, action):
            self.steps += 1
            return super().step(action)

    envs = rows_of(SyncRows, [Line] * 2, asks=False)
    envs.envs[0] = spy = Spy(envs.envs[0])
    envs.reset(seed=[0, 1])
    for _ in range(3):
        envs.step(np.array([0, 0]))
    assert spy.steps == 3


def limited(limit):
    """Of episodes of 3 steps."""
    return TimeLimit(OrderEnforcing(PassiveEnvChecker(Shows(SPACES["reals"]))), limit)


def ends_of(envs):
    """Ends and elapsed steps in 14 steps of 3 rows, each of which is reset as its episode ends."""
    envs.reset(seed=[0, 1, 2])
    for _ in range(14):
        _, _, terminated, truncated, _ = envs.step(np.zeros(3, int))
        yield terminated.tolist(), truncated.tolist(), [row.get_wrapper_attr("_elapsed_steps") for row in envs.envs]
        if (ended := terminated | truncated).any():
            envs.reset(options={"reset_mask": ended})


def test_time_limits_count_where_the_wrappers_in_them_are_passed_by():
    makers = [partial(limited, steps) for steps in (2, 5, 3)]
    ours, theirs = (rows_of(kind, makers, asks=False) for kind in (SyncRows, SyncVectorEnv))
    assert list(ends_of(ours)) == list(ends_of(theirs))
    for row in ours.envs:
        limit = row.env
        limit.step = limit.env.step = limit.env.env.step = None  # not called any more
    ours.step(np.zeros(3, int))


def test_checkers_look_before_they_are_passed_by():
    envs = rows_of(SyncRows, [partial(limited, 9)], asks=False)
    envs.reset()
    for _ in range(2):
        envs.step(np.zeros(1, int))
    checker = envs.envs[0].env.env.env
    assert checker.checked_step
    assert getattr(checker, "checked_data_reuse", True)


@pytest.mark.parametrize("kind", [OrderEnforcing, partial(TimeLimit, max_episode_steps=2)])
@pytest.mark.parametrize("is_class", [True, False])
def test_a_step_of_a_users_is_called_wherever_it_stands(kind, is_class):
    def spied(count):
        wrapper = kind(limited(9))

        def step(action):
            count.append(action)
            return type(wrapper).__mro__[is_class].step(wrapper, action)

        if is_class:
            wrapper.__class__ = type("Mine", (type(wrapper),), {"step": lambda self, action: step(action)})
        else:
            wrapper.step = step
        return TimeLimit(wrapper, 5)

    counts = [[], [], []]
    list(ends_of(rows_of(SyncRows, [partial(spied, count) for count in counts], asks=False)))
    assert list(map(len, counts)) == [14] * 3


def test_numbers_of_several_kinds_are_taken_as_gymnasium_takes_them():
    for kind in (SyncRows, SyncVectorEnv):
        envs = rows_of(kind, [partial(Shows, spaces.Discrete(9), shown) for shown in (3, np.uint64(7))])
        envs.reset()
        assert envs.step(np.array([0, 0]))[0].tolist() == [3, 7]


@pytest.mark.parametrize(
    ("space", "shown"),
    [
        (spaces.Box(-1, 1, (3,)), [np.zeros(2), np.zeros(4)]),
        (spaces.Box(-1, 1, (3,)), [np.zeros(1), np.zeros(1)]),
        (spaces.Box(-1, 1, (3,)), [np.zeros((3, 1)), np.zeros((3, 1))]),
        (spaces.Discrete(3), [0.5, 1.5]),
        (spaces.Discrete(3), [{}, 1]),
        (spaces.Box(-1, 1, (2,)), ["no", "array"]),
        (spaces.Box(-1, 1, (2,)), [np.zeros(2, np.complex64)] * 2),
    ],
)
def test_what_does_not_fit_the_space_is_an_error_of_gymnasiums_kind(space, shown):
    for kind in (SyncRows, SyncVectorEnv):
        envs = rows_of(kind, [partial(Shows, space, each) for each in shown])
        envs.reset()
        with pytest.raises((ValueError, TypeError)):
            envs.step(np.array([0, 0]))


@pytest.mark.parametrize("action", [0, 1], ids=["truncated", "terminated"])
def test_rows_that_have_ended_are_not_stepped(action):
    envs = rows_of(SyncRows, [Line] * 2)
    envs.reset()
    for _ in range(5 if action == 0 else 3):
        _, _, terminated, truncated, _ = envs.step(np.array([action, 0]))
    assert (truncated if action == 0 else terminated)[0]
    with pytest.raises(AssertionError, match="autoreset_envs"):
        envs.step(np.array([0, 0]))
    envs.reset(options={"reset_mask": np.array([True, True])})
    envs.step(np.array([0, 0]))


def test_an_info_that_is_none_is_told_of():
    class Silent(Line):
        def step(self, action):
            return *super().step(action)[:4], None

    env = lines(2, Silent)
    with pytest.raises(TypeError, match=r"step\(\) says None beside; an info is a dictionary"):
        env.rollout(2)
