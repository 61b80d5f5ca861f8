"""`GymVectorEnv`: what breaks ends clearly, and leaves no process behind."""

import gc
import os
import signal
import threading
import time
import weakref

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorWrapper
from line_envs import SYNC_AND_ASYNC, Line, lines, right, set_goal, theirs, trials, vector, with_task
from rollouts import make_policy
from torchrl.data import Categorical, Unbounded
from torchrl.envs import Compose, FrameSkipTransform, TransformedEnv

from rl2_torchrl import ActorCritic, GRUCategoricalActor, GRUValueHead, PreviousStep, Trial, TrialCollector
from rl2_torchrl.envs import GymVectorEnv


def gone(processes):
    deadline = time.time() + 30
    while any(process.is_alive() for process in processes) and time.time() < deadline:
        time.sleep(0.01)
    return not any(process.is_alive() for process in processes)


def test_a_process_that_dies_is_told_and_leaves_none_behind():
    base = lines(vectorization="async")
    env = trials(base)
    collector = TrialCollector(env, make_policy(env), frames_per_batch=15, total_frames=-1)
    iterator = iter(collector)
    next(iterator)
    processes = base.envs.processes
    os.kill(processes[1].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"the processes of the envs \[1\] have died .* newest checkpoint"):
        next(iterator)
    assert gone(processes)
    collector.shutdown()  # has nothing more to end


def test_a_process_that_dies_between_resets_is_told():
    env = lines(vectorization="async")
    env.reset(with_task(env, 1.0, 2.0, 3.0))
    processes = env.envs.processes
    for number in (0, 2):
        os.kill(processes[number].pid, signal.SIGKILL)
    assert gone(processes[::2])
    assert processes[1].is_alive()
    with pytest.raises(RuntimeError, match=r"the processes of the envs \[0, 2\] have died"):
        env.reset(with_task(env, 1.0, 2.0, 3.0))
    assert gone(processes)
    env.close()


def test_after_an_interrupt_processes_are_ended_and_that_is_said():
    env = lines(make=lambda: Line(at_step=lambda env: time.sleep(1)), vectorization="async")
    processes = env.envs.processes
    tensordict = env.reset(with_task(env, 3.0, 4.0, 5.0))
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        env.step(tensordict.set("action", right(env)))
    assert gone(processes)
    for call in (lambda: env.reset(with_task(env, 3.0, 4.0, 5.0)), env.get_extra_state):
        with pytest.raises(RuntimeError, match="by close.., an error or an interrupt: make a new env"):
            call()
    env.close()


class OutOfFuelError(Exception):
    pass


def breaks(env):
    if env.steps == 2 and env.goal == 4:
        raise OutOfFuelError("at step 2")


@SYNC_AND_ASYNC
def test_an_env_that_raises_ends_with_its_own_error(vectorization):
    env = lines(make=lambda: Line(at_step=breaks), vectorization=vectorization)
    processes = getattr(env.envs, "processes", [])
    tensordict = env.reset(with_task(env, 3.0, 4.0, 5.0))
    tensordict = env.step(tensordict.set("action", right(env)))["next"]
    with pytest.raises(OutOfFuelError, match="at step 2"):
        env.step(tensordict.exclude("reward").set("action", right(env)))
    assert gone(processes)
    env.close()


@SYNC_AND_ASYNC
def test_a_task_that_cannot_be_set_ends_with_its_own_error(vectorization):
    def set_task(env, task):
        if task == 2:
            raise OutOfFuelError("no such task")

    env = GymVectorEnv(Line, 2, set_task=set_task, task_spec=Unbounded(1), vectorization=vectorization)
    processes = getattr(env.envs, "processes", [])
    with pytest.raises(OutOfFuelError, match="no such task"):
        env.reset(with_task(env, 1.0, 2.0))
    assert gone(processes)
    env.close()


@SYNC_AND_ASYNC
def test_close_ends_the_processes(vectorization):
    closed = []

    class Closes(Line):
        def close(self):
            closed.append(self)

    env = trials(lines(make=Closes, vectorization=vectorization))
    env.reset()
    processes = getattr(env.base_env.envs, "processes", [])
    assert all(process.is_alive() for process in processes)
    env.close()
    assert gone(processes)
    assert len(closed) >= (3 if vectorization == "sync" else 0)
    assert env.is_closed


def test_no_process_is_left_of_an_env_that_cannot_be_made(monkeypatch):
    class Graphs(Line):
        observation_space = spaces.Dict(a=spaces.Sequence(spaces.Discrete(2)))

    made = []

    def remember(makers):
        made.append(AsyncVectorEnv(makers, shared_memory=False, context="fork", autoreset_mode=AutoresetMode.DISABLED))
        return made[0]

    monkeypatch.setattr("rl2_torchrl.envs.gym_vector.in_processes", remember)
    with pytest.raises(TypeError, match="no fixed size"):
        GymVectorEnv(Graphs, 2, vectorization="async")
    assert gone(made[0].processes)


def same_step(make):
    return theirs(AutoresetMode.SAME_STEP, make=make)


@pytest.mark.parametrize("make", [lambda make: lines(make=make), same_step])
@pytest.mark.parametrize("number", [np.nan, -np.inf])
def test_a_reward_that_is_no_number_is_refused_with_its_row(make, number):
    env = make(lambda: Line(at_step=lambda line: number if line.goal == 4 else None))
    first = env.reset(with_task(env, 3.0, 4.0, 4.0))
    with pytest.raises(FloatingPointError, match=r"'reward' that is NaN or infinite, in rows \[1, 2\]"):
        env.step(first.set("action", right(env)))


def test_an_action_that_is_no_number_is_not_blamed_on_the_env():
    env = GymVectorEnv("MountainCarContinuous-v0", 2, seed=0)
    action = torch.tensor([[0.0], [np.nan]])
    with pytest.raises(FloatingPointError, match="an action is NaN or infinite: the policy has broken down"):
        env.step(env.reset().set("action", action))


def test_a_step_beyond_an_episodes_end_is_told():
    env = TransformedEnv(lines(), FrameSkipTransform(3))
    first = env.reset(with_task(env, 9.0, 4.0, 5.0))
    with pytest.raises(RuntimeError, match="a row whose episode has ended was stepped again .* FrameSkipTransform"):
        env.step(env.step_mdp(env.step(first.set("action", right(env)))).set("action", right(env)))


class Spoilt(Line):
    """What it observes at goals from 4 on is no number, from step ``first`` on."""

    first = 1

    def observed(self):
        observed = super().observed()
        observed[2] = np.nan if self.goal >= 4 and self.steps >= self.first else observed[2]
        return observed


@pytest.mark.parametrize("make", [lambda make: lines(make=make), same_step])
@pytest.mark.parametrize("first", [0, 1, 5])
def test_an_observation_that_is_no_number_is_refused_with_its_row(make, first):
    # At a reset, at a step, and in the last observation of an episode.
    env = make(type("SpoiltFrom", (Spoilt,), {"first": first}))

    def play():
        tensordict = env.reset(with_task(env, 3.0, 3.0, 9.0))
        for _ in range(5):
            tensordict = env.step(tensordict.set("action", 0 * right(env)))["next"].exclude("reward")

    with pytest.raises(FloatingPointError, match=r"'observation' that is NaN or infinite, in rows \[2\]"):
        play()


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        (("CartPole-v1",), {}, ValueError, "num_envs=None: say how many"),
        (("CartPole-v1", 0), {}, ValueError, "num_envs=0 must be a whole number, at least 1"),
        (("CartPole-v1", 16 / 2), {}, ValueError, "num_envs=8.0 must be a whole number"),
        ((Line, 2), {"set_task": set_goal, "tasks": []}, ValueError, r"tasks=\[\] holds no task"),
        ((Line, 2), {"set_task": set_goal, "tasks": 3}, TypeError, "tasks=3 is no list"),
        ((Line, 2), {"info_keys": [("episode", "r")]}, TypeError, "holds .*'episode', 'r'.*have a wrapper say one"),
        ((Line, 2), {"vectorization": "threads"}, ValueError, "choose 'sync' or 'async'"),
        ((Line, 2), {"max_episode_steps": 3}, TypeError, "are gymnasium.make's"),
        (([Line, Line], 3), {}, ValueError, "2 functions and num_envs=3"),
        (([],), {}, ValueError, "0 functions"),
        ((Line(), 2), {}, TypeError, "is one env, and each row needs its own"),
        ((lambda line=Line(): line, 2), {}, ValueError, "several rows got the same env"),  # noqa: B008
        ((vector(AutoresetMode.DISABLED), 4), {}, TypeError, "has 3 rows, and is made already"),
        ((vector(AutoresetMode.DISABLED),), {"max_episode_steps": 3}, TypeError, "is made already"),
    ],
)
def test_arguments_that_make_no_env(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        GymVectorEnv(*args, **kwargs)


def test_a_spec_is_as_good_as_its_id_and_any_iterable_of_tasks_as_a_list():
    told = []
    env = GymVectorEnv(
        gymnasium.spec("CartPole-v1"),
        np.int64(2),
        set_task=lambda env, task: told.append(task),
        tasks=(name for name in "ab"),
        max_episode_steps=3,
    )
    assert env.env_id == "CartPole-v1"
    env.start(torch.tensor([1, 0]))
    assert told == ["b", "a"]
    state = env.get_extra_state()
    env.close()
    with pytest.raises(RuntimeError, match="has been closed"):
        env.set_extra_state(state)


class ReturnsOtherwise(Line):
    """A `Line` that returns what the functions make of it."""

    def __init__(self, of_reset=lambda returned: returned, of_step=lambda returned: returned):
        super().__init__()
        self.of_reset, self.of_step = of_reset, of_step

    def reset(self, **kwargs):
        return self.of_reset(super().reset(**kwargs))

    def step(self, action):
        return self.of_step(super().step(action))


@SYNC_AND_ASYNC
@pytest.mark.parametrize(
    ("of", "change", "error", "message"),
    [
        ("of_reset", lambda it: it[0], TypeError, r"reset\(\) returns ndarray; .* tuple \(observation, info\)"),
        ("of_reset", lambda it: (it[0][:2], it[1]), ValueError, r"reset\(\) observes shape \(2,\), but .* is \(3,\)"),
        ("of_reset", lambda it: (float(it[0][0]), {}), ValueError, r"reset\(\) observes shape \(\), but .* is \(3,\)"),
        ("of_step", lambda it: it[:4], TypeError, r"step\(\) returns 4 values; .*, terminated, truncated, info\)"),
        (
            "of_step",
            lambda it: (it[0], np.ones(1), *it[2:]),
            TypeError,
            r"step\(\) pays array\(\[1.\]\); .* is one number",
        ),
    ],
)
def test_what_is_no_gymnasium_env_is_told_by_what_it_returns(of, change, error, message, vectorization):
    env = lines(2, make=lambda: ReturnsOtherwise(**{of: change}), vectorization=vectorization)
    with pytest.raises(error, match=message):
        env.rollout(2)
    env.close()


def test_functions_one_a_row():
    env = GymVectorEnv([lambda: Line(goal=1.0), lambda: Line(goal=2.0)])
    assert env.reset()["observation"][:, 1].tolist() == [1, 2]


def test_a_wrapper_around_processes_is_known_for_what_it_is():
    env = GymVectorEnv(VectorWrapper(vector(AutoresetMode.DISABLED, kind=AsyncVectorEnv, context="fork")), seed=0)
    assert env.has_threads
    env.reset()
    processes = env.envs.unwrapped.processes
    os.kill(processes[0].pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"of the envs \[0\] have died"):
        env.rollout(2)
    assert gone(processes)


def test_tasks_of_choices_are_categorical():
    env = GymVectorEnv(Line, 2, set_task=lambda env, task: None, tasks=["a", "b", "c"])
    assert isinstance(env.full_state_spec["task"], Categorical)


def test_a_collector_that_is_shut_down_ends_the_processes():
    env = TransformedEnv(GymVectorEnv("CartPole-v1", 2, vectorization="async"), Compose(Trial(steps=4), PreviousStep()))
    policy = ActorCritic(GRUCategoricalActor.from_env(env, hidden_size=4), GRUValueHead.from_env(env, hidden_size=4))
    collector, processes = TrialCollector(env, policy, frames_per_batch=8, total_frames=8), env.base_env.envs.processes
    assert len(list(collector)) == 1
    collector.shutdown()
    assert gone(processes)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_a_closed_env_lets_its_envs_go_and_says_that_it_is_closed(vectorization):
    env = GymVectorEnv("CartPole-v1", 2, vectorization=vectorization)
    step = env.rand_action(env.reset())
    envs = weakref.ref(env.envs)
    gc.disable()
    try:
        env.close()
        assert envs() is None
    finally:
        gc.enable()
    for use in (env.reset, lambda: env.step(step)):
        with pytest.raises(RuntimeError, match="has been closed"):
            use()
    env.close()  # once more, as __del__ may


class Parts(gymnasium.Env):
    """Shows what ``spoilt`` makes of an observation of several entries, from the reset on or from the first step on."""

    space = {"image": spaces.Box(0, 255, (4, 4, 3), np.uint8), "inner": spaces.Dict(place=spaces.Box(-1, 1, (2,)))}
    observation_space, action_space = (
        spaces.Dict(pair=spaces.Tuple([spaces.Discrete(2), spaces.Dict(space)])),
        spaces.Discrete(2),
    )

    def __init__(self, spoilt, at):
        self._spoilt, self._at = spoilt, at

    def shown(self, is_spoilt):
        entries = {"image": np.zeros((4, 4, 3), np.uint8), "inner": {"place": np.zeros(2)}}
        return {"pair": (1, self._spoilt(entries) if is_spoilt else entries)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.shown(self._at == "reset"), {}

    def step(self, action):
        return self.shown(True), 0.0, True, False, {}


SPOILT = {
    "dtype": (
        lambda o: {**o, "image": o["image"] / 255},
        r"'pair.1.image' as float64 \[4, 4, 3\], .* says uint8 \[4, 4, 3\]",
    ),
    "shape": (lambda o: {**o, "image": o["image"].transpose(2, 0, 1)}, r"'pair.1.image' as uint8 \[3, 4, 4\]"),
    "depth": (
        lambda o: {**o, "inner": {"place": np.zeros(3)}},
        r"'pair.1.inner.place' as float64 \[3\], .* float32 \[2\]",
    ),
    "entry": (lambda o: {"image": o["image"]}, r"'pair.1' as \['image'\], .* says \['image', 'inner'\]"),
    "kind": (lambda o: None, r"'pair.1' as NoneType, .* says \['image', 'inner'\]"),
}


@pytest.mark.parametrize("at", ["reset", "step"])
@pytest.mark.parametrize("kind", SPOILT)
def test_an_entry_that_does_not_fit_its_space_is_named(kind, at):
    spoilt, message = SPOILT[kind]
    env = GymVectorEnv(lambda: Parts(spoilt, at), 2)
    with pytest.raises(ValueError, match="row 0 shows " + message):
        env.rollout(2)


def test_a_choice_that_is_no_whole_number_is_named():
    class Half(gymnasium.Env):
        observation_space, action_space = spaces.Discrete(3), spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            return 1, {}

        def step(self, action):
            return 1.5, 0.0, True, False, {}

    env = GymVectorEnv(Half, 2)
    with pytest.raises(ValueError, match=r"row 0 shows 'observation' as float64 \[\], and its .* says int64 \[\]"):
        env.rollout(2)


class Forgets(gymnasium.Env):
    """Forgets to return its observation at the reset (0), or at the step ``at``."""

    observation_space, action_space = spaces.Box(-1, 1, (2,)), spaces.Discrete(2)

    def __init__(self, at):
        self.at, self.steps = at, 0

    def shown(self):
        return None if self.steps == self.at else np.zeros(2, np.float32)

    def reset(self, *, seed=None, options=None):
        return self.shown(), {}

    def step(self, action):
        self.steps += 1
        return self.shown(), 0.0, False, False, {}


@pytest.mark.parametrize(
    ("at", "message"),
    [
        (0, r"reset\(\) observes None"),
        (1, r"step\(\) observes None"),
        (2, r"row 0 shows 'observation' as None, and .* says float32 \[2\]"),
    ],
)
def test_an_observation_that_is_forgotten_is_told_of(at, message):
    env = GymVectorEnv(lambda: Forgets(at), 2)
    with pytest.raises((TypeError, ValueError), match=message):
        env.rollout(3)


def test_entries_that_fit_their_space_as_gymnasium_casts_them():
    assert GymVectorEnv(lambda: Parts(lambda entries: entries, "reset"), 2).rollout(2).shape == (2, 1)


def test_what_gymnasium_takes_is_taken():
    """It casts what goes through memory that processes share, and takes parts by their number from anything that has them."""
    cast = {"image": np.full((4, 4, 3), 7), "inner": {"place": [0.5, 1]}}
    env = GymVectorEnv(lambda: Parts(lambda entries: cast, "reset"), 2, vectorization="async")
    assert (env.rollout(2)["pair", "1", "image"] == 7).all()
    env.close()

    class Pair(gymnasium.Env):
        observation_space, action_space = spaces.Tuple([spaces.Discrete(3), spaces.Discrete(4)]), spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            return np.array([1, 2]), {}

        def step(self, action):
            return np.array([2, 3]), 0.0, True, False, {}

    assert GymVectorEnv(Pair, 2).rollout(2)["next", "observation", "1"].tolist() == [[3], [3]]
