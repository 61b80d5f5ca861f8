"""`GymVectorEnv`: batches are `Collector`'s, tasks reach their rows, ends and resets are right, and what breaks ends clearly."""

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
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorWrapper
from rollouts import assert_same, batches_of, both, gravities, make_policy, set_gravity, set_length
from tensordict import TensorDict
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import Compose, TransformedEnv

from rl2_torchrl import (
    ActorCritic,
    GRUCategoricalActor,
    GRUValueHead,
    PreviousStep,
    TaskSampler,
    Trial,
    TrialCollector,
    adaptation_curve,
)
from rl2_torchrl.envs import GymVectorEnv
from rl2_torchrl.testing import check_trial_env

SYNC_AND_ASYNC = pytest.mark.parametrize("vectorization", ["sync", "async"])


class Line(gymnasium.Env):
    """A walk to the right, as far as ``goal``, in 5 steps at the most; observes place, goal and a random number."""

    metadata = {"render_modes": []}
    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = spaces.Discrete(2)

    def __init__(self, goal=3.0, at_step=None):
        self.goal, self.at_step, self.resets = goal, at_step or (lambda env: None), 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if options:
            self.goal = float(options["goal"][0])
        self.place, self.steps, self.resets = 0, 0, self.resets + 1
        return self.observed(), {"resets": self.resets}

    def step(self, action):
        self.place, self.steps = self.place + int(action), self.steps + 1
        there = self.place >= self.goal
        info = {"steps": self.steps, "says": 1.0} if there else {"steps": self.steps}
        found = self.at_step(self)
        return self.observed(), 1.0 if found is None else found, there, self.steps >= 5, info

    def observed(self):
        return np.array([self.place, self.goal, self.np_random.random()])


class Hidden(Line):
    """Shows no goal."""

    def observed(self):
        return super().observed() * [1, 0, 1]


def set_goal(env, task):
    env.goal = float(task[0])


def set_goals(envs, task, rows):
    for env, goal, begins in zip(envs.unwrapped.envs, task, rows, strict=True):
        if begins:
            env.unwrapped.goal = float(goal[0])


def goals(batch_size, generator):
    return torch.randint(1, 6, (*batch_size, 1), generator=generator).float()


def lines(rows=3, make=Line, **kwargs):
    return GymVectorEnv(make, rows, set_task=set_goal, task_spec=Unbounded(1), seed=0, **kwargs)


def trials(env, tasks=goals, **trial):
    sampler = [] if tasks is None else [TaskSampler(tasks, seed=1)]
    return TransformedEnv(env, Compose(Trial(**trial or {"episodes": 2}), *sampler, PreviousStep()))


def right(env):
    return torch.ones(env.batch_size, dtype=torch.int64)


def with_task(env, *tasks):
    return TensorDict({"task": torch.tensor(tasks).unsqueeze(-1)}, env.batch_size)


def vector(mode, rows=3, kind=SyncVectorEnv, make=Line, **kwargs):
    return kind([make] * rows, autoreset_mode=mode, **kwargs)


def gone(processes):
    deadline = time.time() + 30
    while any(process.is_alive() for process in processes) and time.time() < deadline:
        time.sleep(0.01)
    return not any(process.is_alive() for process in processes)


# ---- Batches are those of TorchRL's Collector over the same transforms.


def cart_poles(**kwargs):
    return GymVectorEnv("CartPole-v1", 3, set_task=set_length, task_spec=Unbounded(1), seed=0, **kwargs)


def pendulums(**kwargs):
    kwargs = {"max_episode_steps": 4, **kwargs}
    return GymVectorEnv("Pendulum-v1", 3, set_task=set_gravity, task_spec=Unbounded(1), seed=0, **kwargs)


def lengths(batch_size, generator):
    return 0.25 + torch.rand(*batch_size, 1, generator=generator)


FORMS = {
    "cart pole": lambda: trials(cart_poles(), lengths, episodes=2),
    "cart pole, cut": lambda: trials(cart_poles(), lengths, episodes=3, steps=17),
    "cart pole, truncated": lambda: trials(cart_poles(), lengths, steps=23, truncate=True),
    "cart pole without tasks": lambda: trials(GymVectorEnv("CartPole-v1", 3, seed=0), None, episodes=2),
    "pendulum": lambda: trials(pendulums(), gravities, episodes=2),
    "pendulum in processes": lambda: trials(pendulums(vectorization="async"), gravities, episodes=2),
    "lines": lambda: trials(lines(info_keys=["steps", "says", "resets"]), episodes=3),
    "lines, same step": lambda: trials(theirs(AutoresetMode.SAME_STEP), episodes=3),
    "lines, few tasks, same step": lambda: trials(theirs(AutoresetMode.SAME_STEP), one_or_two, episodes=2),
    "lines, disabled": lambda: trials(theirs(AutoresetMode.DISABLED), episodes=3),
}


def theirs(mode, **kwargs):
    keys = {"info_keys": ["steps", "says", "resets"]}
    return GymVectorEnv(vector(mode, **kwargs), set_task=set_goals, task_spec=Unbounded(1), seed=0, **keys)


def one_or_two(batch_size, generator):
    return torch.randint(1, 3, (*batch_size, 1), generator=generator).float()


@pytest.mark.parametrize("name", FORMS)
def test_batches_are_collectors(name):
    (fast, ours), (_, expected) = both(FORMS[name], 25, lambda env: make_policy(env, still=True))
    assert fast.reason is None
    assert_same(ours, expected)
    assert ours[0]["next", "episode_done"].any()
    assert not ours[-1]["is_init"][:, 0].all()  # a batch goes on in the middle of trials


def collected(make, **kwargs):
    env = make()
    _, batches = batches_of(env, make_policy(env, still=True), 25, "tensors", **kwargs)
    return batches


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: trials(lines(info_keys=["says"])), lambda: trials(lines(info_keys=["says"], vectorization="async"))),
        (FORMS["pendulum"], FORMS["pendulum in processes"]),
        (FORMS["lines, disabled"], FORMS["lines"]),
    ],
    ids=["lines in processes", "pendulum in processes", "their vector env"],
)
def test_all_forms_play_the_same(one, other):
    assert_same(collected(one), collected(other))


def test_a_vector_env_that_resets_itself_plays_the_same():
    def told(make):
        # It draws in resets that a new task makes void: the random number is another.
        keys = [
            "action",
            "task",
            "is_init",
            "episode_index",
            ("next", "reward"),
            ("next", "done"),
            ("next", "truncated"),
        ]
        keys += [("info", "steps"), ("next", "info", "steps"), ("next", "info", "says")]
        return [b.select(*keys).set("place", b["next", "observation"][..., :2].clone()) for b in collected(make)]

    assert_same(told(FORMS["lines, disabled"]), told(FORMS["lines, same step"]))


def test_a_curve_of_adaptation_and_the_check_work_on_it():
    env = trials(lines(4, make=Hidden), episodes=2)
    check_trial_env(env)
    curve = adaptation_curve(env, make_policy(env), num_trials=10)
    assert curve.returns.shape == (10, 2)
    assert (curve.returns >= 1).all()


# ---- Tasks.


@SYNC_AND_ASYNC
def test_each_row_gets_its_own_task(vectorization):
    env = lines(vectorization=vectorization)
    first = env.reset(with_task(env, 2.0, 3.0, 4.0))
    assert first["observation"][:, :2].tolist() == [[0, 2], [0, 3], [0, 4]]
    # A row alone, with another task; the others stay where they are.
    after = env.step(first.set("action", right(env)))["next"]
    rows = torch.tensor([[False], [True], [False]])
    again = env.reset(with_task(env, 9.0, 5.0, 9.0).update(after.exclude("reward")).set("_reset", rows))
    assert again["observation"][:, :2].tolist() == [[1, 2], [0, 5], [1, 4]]
    env.close()


@SYNC_AND_ASYNC
def test_a_task_can_be_one_of_a_list_of_objects(vectorization):
    objects = [{"goal": 2.0}, {"goal": 4.0}]

    def set_task(env, task):
        assert env is env.unwrapped
        env.goal = task["goal"]

    env = GymVectorEnv(Line, 3, set_task=set_task, tasks=objects, seed=0, vectorization=vectorization)
    assert (env.full_state_spec["task"].shape, env.full_state_spec["task"].space.n) == ((3,), 2)
    first = env.reset(TensorDict({"task": torch.tensor([1, 0, 1])}, [3]))
    assert first["observation"][:, 1].tolist() == [4, 2, 4]
    env.close()


@SYNC_AND_ASYNC
def test_a_task_can_be_an_option_of_reset(vectorization):
    seen = {"vectorization": vectorization, "task_option": "goal", "task_spec": Unbounded(1)}
    env = GymVectorEnv(Line, 3, seed=0, **seen)
    assert env.reset(with_task(env, 2.0, 3.0, 4.0))["observation"][:, 1].tolist() == [2, 3, 4]
    env.close()


@SYNC_AND_ASYNC
def test_a_task_can_have_several_entries(vectorization):
    def set_task(env, task):
        assert isinstance(task, TensorDict)
        assert task.batch_size == ()
        env.goal = float(task["far"] + task["by", "much"])

    spec = Composite(far=Unbounded(1), by=Composite(much=Unbounded(1)))
    env = GymVectorEnv(Line, 3, set_task=set_task, task_spec=spec, seed=0, vectorization=vectorization)
    far, much = torch.tensor([[1.0], [2], [3]]), torch.tensor([[0.5], [0], [0.5]])
    task = TensorDict({"far": far, "by": {"much": much}}, [3])
    assert env.reset(TensorDict({"task": task}, [3]))["observation"][:, 1].tolist() == [1.5, 2, 3.5]
    env.close()

    def drawn(batch_size, generator):
        return TensorDict(
            {"by": {"much": goals(batch_size, generator)}, "far": goals(batch_size, generator)}, batch_size
        )

    env = GymVectorEnv(Hidden, 3, set_task=set_task, task_spec=spec, seed=0, vectorization=vectorization)
    check_trial_env(trials(env, drawn))
    env.close()


def test_an_option_of_several_entries_is_a_dictionary():
    class Option(Line):
        def reset(self, *, seed=None, options=None):
            assert set(options["task"]) == {"a", "b"}
            return super().reset(seed=seed, options={"goal": options["task"]["a"] + options["task"]["b"]})

    spec = Composite(a=Unbounded(1), b=Unbounded(1))
    env = GymVectorEnv(Option, 2, task_option="task", task_spec=spec)
    task = TensorDict({"a": torch.tensor([[1.0], [2.0]]), "b": torch.ones(2, 1)}, [2])
    assert env.reset(TensorDict({"task": task}, [2]))["observation"][:, 1].tolist() == [2, 3]


@pytest.mark.parametrize("mode", [AutoresetMode.DISABLED, AutoresetMode.SAME_STEP])
def test_a_vector_env_of_ones_own_is_told_which_rows_begin_with_which_tasks(mode):
    calls = []

    def set_task(envs, tasks, rows):
        calls.append((tasks, rows.tolist()))
        set_goals(envs, [[task["goal"]] for task in tasks], rows)

    objects = [{"goal": 1.0}, {"goal": 2.0}]
    env = GymVectorEnv(vector(mode), set_task=set_task, tasks=objects, seed=0)
    first = env.reset(TensorDict({"task": torch.tensor([1, 0, 1])}, [3]))
    assert first["observation"][:, 1].tolist() == [2, 1, 2]
    after = env.step(first.set("action", right(env)))["next"]
    given = TensorDict({"task": torch.tensor([0, 1, 0])}, [3]).update(after.exclude("reward"))
    assert env.reset(given.set("_reset", after["done"]))["observation"][:, :2].tolist() == [[1, 2], [0, 2], [1, 2]]
    assert calls[0][0] == [objects[1], objects[0], objects[1]]
    assert [rows for _, rows in calls] == [[True] * 3, [False, True, False]]


@pytest.mark.parametrize("mode", [AutoresetMode.DISABLED, AutoresetMode.SAME_STEP])
def test_a_task_that_is_an_option_is_that_of_later_episodes_too(mode):
    class OwnGoal(Line):
        def reset(self, *, seed=None, options=None):
            goal = options["goal"][0] if options and "goal" in options else [99.0]  # without: one of its own
            return super().reset(seed=seed, options={"goal": goal})

    env = trials(GymVectorEnv(vector(mode, make=OwnGoal), task_option="goal", task_spec=Unbounded(1), seed=0))
    tensordict = env.reset(with_task(env, 2.0, 2.0, 2.0))
    for _ in range(3):
        _, tensordict = env.step_and_maybe_reset(tensordict.set("action", right(env)))
    assert tensordict["observation"][:, :2].tolist() == [[1, 2]] * 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"set_task": set_goal}, "what is a task"),
        ({"set_task": set_goal, "task_spec": Unbounded(1), "tasks": [1]}, "what is a task"),
        ({"task_spec": Unbounded(1)}, "how does a task reach the env"),
        ({"tasks": [1]}, "how does a task reach the env"),
        ({"task_option": "goal", "tasks": [1]}, "what is a task"),
        ({"set_task": set_goal, "task_option": "goal", "task_spec": Unbounded(1)}, "how does a task reach the env"),
    ],
)
def test_half_a_way_for_the_task_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GymVectorEnv(Line, 2, **kwargs)


def test_no_task_at_all():
    env = GymVectorEnv(Line, 3, seed=0)
    assert "task" not in env.full_state_spec.keys()
    check_trial_env(trials(env, None), task_key=None)
    assert env.rollout(3)["next", "observation"].shape == (3, 3, 3)


# ---- Ends of episodes, and resets.

ENDS = [
    lambda: lines(info_keys=["steps", "says", "resets"]),
    lambda: lines(info_keys=["steps", "says", "resets"], vectorization="async"),
    lambda: theirs(AutoresetMode.DISABLED),
    lambda: theirs(AutoresetMode.SAME_STEP),
    lambda: theirs(AutoresetMode.SAME_STEP, copy=False),
]


@pytest.mark.parametrize("make", ENDS)
def test_the_last_observation_of_a_trial_and_the_first_of_an_episode_by_hand(make):
    base = make()
    fixed = TaskSampler.fixed(torch.tensor([[1.0], [2.0], [9.0], [3.0], [3.0], [3.0]]))
    env = TransformedEnv(base, Compose(Trial(episodes=2), fixed, PreviousStep()))
    tensordict, steps = env.reset(), []
    for _ in range(4):
        stepped, tensordict = env.step_and_maybe_reset(tensordict.set("action", right(env)))
        steps.append(stepped.clone())
    batch = torch.stack(steps, 1)
    place = {key: batch[key][..., 0].tolist() for key in ("observation", ("next", "observation"))}
    # Goals 1 and 2 are reached at steps 1 and 2; the trial of goal 1 ends at its second step, that of goal 2 at its fourth.
    assert place["observation"] == [[0, 0, 0, 1], [0, 1, 0, 1], [0, 1, 2, 3]]
    assert place["next", "observation"] == [[0, 1, 1, 2], [1, 0, 1, 2], [1, 2, 3, 4]]
    assert batch["next", "done"].squeeze(-1).int().tolist() == [[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert batch["observation"][0, :, 1].tolist() == [1, 1, 3, 3]
    # What info says is told of the step that was taken; a trial's first step tells what the reset said.
    told = {key: batch[key].squeeze(-1) for key in batch.keys(True, True) if "info" in key}
    assert told["next", "info", "steps"].tolist() == [[1, 1, 1, 2], [1, 2, 1, 2], [1, 2, 3, 4]]
    assert told["next", "info", "says"].tolist() == [[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]
    assert told["info", "steps"].tolist() == [[0, 1, 0, 1], [0, 1, 2, 1], [0, 1, 2, 3]]
    assert told["info", "resets"][:, 0].tolist() == [1, 1, 1]
    assert (told["info", "resets"][0] > 0).tolist() == [True, False, True, False]
    assert not told["next", "info", "resets"].any()
    # Observation, action, reward and done are the agent's, nothing else.
    assert batch["trans"].shape[-1] == 3 + 2 + 2
    base.close()


@pytest.mark.parametrize("make", ENDS)
def test_a_truncated_episode_is_truncated_and_not_terminated(make):
    env = make()
    tensordict = env.reset(with_task(env, 9.0, 5.0, 9.0))
    for _ in range(5):
        after = env.step(tensordict.set("action", right(env)))["next"]
        tensordict = after.exclude("reward")
    assert after["truncated"].flatten().tolist() == [True] * 3
    assert after["terminated"].flatten().tolist() == [False, True, False]
    assert after["observation"][:, 0].tolist() == [5, 5, 5]
    env.close()


class Places(Line):
    """Observes the place alone, a choice of ten counted from 1."""

    observation_space = spaces.Discrete(10, start=1)

    def observed(self):
        return 1 + self.place


def test_choices_that_are_observed_last_are_those_of_the_episode_that_ended():
    env = theirs(AutoresetMode.SAME_STEP, make=Places)
    tensordict = env.reset(with_task(env, 2.0, 1.0, 9.0))
    seen = []
    for _ in range(2):
        tensordict = env.step(tensordict.set("action", right(env)))["next"].exclude("reward")
        seen.append(tensordict["observation"].tolist())
    assert seen == [[1, 1, 1], [2, 1, 2]]


def test_an_inner_reset_of_a_vector_env_that_resets_itself_is_not_made_twice():
    base = theirs(AutoresetMode.SAME_STEP)
    fixed = TaskSampler.fixed(torch.tensor([[1.0], [1.0], [1.0], [1.0], [1.0], [2.0]]))
    env = TransformedEnv(base, Compose(Trial(episodes=2), fixed, PreviousStep()))
    tensordict = env.reset()
    resets = [[line.resets for line in base.envs.envs]]
    for _ in range(2):
        _, tensordict = env.step_and_maybe_reset(tensordict.set("action", right(env)))
        resets.append([line.resets for line in base.envs.envs])
    # Then a trial begins: by the vector env itself with the same task, again with a new one.
    assert resets == [[1, 1, 1], [2, 2, 2], [3, 3, 4]]
    assert tensordict["observation"][:, 1].tolist() == [1, 1, 2]
    assert tensordict["info", "resets"].flatten().tolist() == [3, 3, 4]
    assert not tensordict["info", "says"].any()


def test_a_nested_task_that_stays_the_same_is_not_begun_twice():
    def set_task(envs, task, rows):
        set_goals(envs, task["goal"], rows)

    spec = Composite(goal=Unbounded(1), other=Unbounded(1))
    env = GymVectorEnv(vector(AutoresetMode.SAME_STEP), set_task=set_task, task_spec=spec, seed=0)
    task = TensorDict({"goal": torch.ones(3, 1), "other": torch.zeros(3, 1)}, [3])
    after = env.step(env.reset(TensorDict({"task": task}, [3])).set("action", right(env)))["next"]
    assert after["done"].all()
    # The same entries in another order; in one row another task.
    task = TensorDict({"other": torch.tensor([[0.0], [0.0], [1.0]]), "goal": torch.ones(3, 1)}, [3])
    env.reset(TensorDict({"task": task}, [3]))
    assert [line.resets for line in env.envs.envs] == [2, 2, 3]


def test_info_that_a_vector_env_does_not_say_of_a_row_is_nought():
    def says(*stepped):
        return *stepped[:4], {"x": np.array([5.0, 6.0, 7.0]), "_x": np.array([True, False, True]), "y": np.arange(3)}

    env = GymVectorEnv(Numbers(spoil=says), info_keys=["x", "y", "z"], seed=0)
    info = env.rollout(1)["next", "info"]
    assert {key: value.flatten().tolist() for key, value in info.items()} == {
        "x": [5, 0, 7],
        "y": [0, 1, 2],
        "z": [0] * 3,
    }


def test_a_vector_env_that_resets_in_the_next_step_is_refused_with_the_mend():
    for envs in (SyncVectorEnv([Line]), vector(AutoresetMode.NEXT_STEP), gymnasium.make_vec("CartPole-v1", 2)):
        with pytest.raises(ValueError, match="autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED"):
            GymVectorEnv(envs)


def test_a_vector_env_without_last_observations_is_refused():
    class Forgets(VectorWrapper):
        def step(self, actions):
            *stepped, infos = super().step(actions)
            return *stepped, {key: value for key, value in infos.items() if "final" not in key}

    env = GymVectorEnv(Forgets(vector(AutoresetMode.SAME_STEP)), set_task=set_goals, task_spec=Unbounded(1))
    first = env.reset(with_task(env, 1.0, 2.0, 2.0))
    with pytest.raises(KeyError, match="has no 'final_obs'"):
        env.step(first.set("action", right(env)))


@pytest.mark.parametrize("mode", [AutoresetMode.DISABLED, AutoresetMode.SAME_STEP])
def test_a_vector_env_that_resets_all_rows_is_refused(mode):
    class IgnoresMask(VectorWrapper):
        def reset(self, *, seed=None, options=None):
            return super().reset(seed=seed)

    env = GymVectorEnv(IgnoresMask(vector(mode)), set_task=set_goals, task_spec=Unbounded(1), seed=0)
    first = env.reset(with_task(env, 1.0, 2.0, 2.0))
    after = env.step(first.set("action", right(env)))["next"]
    with pytest.raises(RuntimeError, match="has reset rows that were to go on"):
        env.reset(with_task(env, 2.0, 2.0, 2.0).update(after.select("done")).set("_reset", after["done"]))


class Numbers(gymnasium.vector.VectorEnv):
    """A vector env of its own kind: one seed for all rows; ``spoil`` changes what a step returns."""

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}

    def __init__(self, num_envs=3, spoil=lambda *stepped: stepped):
        self.num_envs, self.spoil, self.seeds = num_envs, spoil, []
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.single_action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        begun = self.np_random.random((self.num_envs, 1)).astype(np.float32)
        self.numbers = np.where(mask[:, None], begun, getattr(self, "numbers", begun))
        return self.numbers, {}

    def step(self, actions):
        self.numbers += actions[:, None]  # in place, and handed out
        ends = self.numbers[:, 0] > 2
        return self.spoil(self.numbers, np.ones(self.num_envs), ends, np.zeros_like(ends), {})


def test_a_vector_env_of_another_kind_has_one_seed():
    env = GymVectorEnv(Numbers(), seed=0)
    (fast, ours), (_, expected) = both(
        lambda: trials(GymVectorEnv(Numbers(), seed=0), None), 9, lambda env: make_policy(env, still=True)
    )
    assert_same(ours, expected)
    check_trial_env(trials(env, None), task_key=None)
    assert isinstance(env.envs.seeds[0], int)
    assert env.envs.seeds.count(None) > 2


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("rewards", lambda obs, reward, *rest: (obs, reward[:, None], *rest)),
        ("terminations", lambda obs, reward, terminated, *rest: (obs, reward, terminated[:, None], *rest)),
        ("truncations", lambda *stepped: (*stepped[:3], stepped[3][:1], stepped[4])),
        ("rewards", lambda obs, reward, *rest: (obs, 1.0, *rest)),
    ],
)
def test_rewards_and_ends_of_other_shapes_are_refused(name, spoil):
    env = GymVectorEnv(Numbers(spoil=spoil))
    with pytest.raises(ValueError, match=rf"gives {name} of shape \(.*; they must be \(3,\), one a row"):
        env.rollout(1)


# ---- Seeds.


@SYNC_AND_ASYNC
def test_a_seed_repeats_a_run_and_rows_differ(vectorization):
    def noise(env, seed):
        env.set_seed(seed)
        return torch.stack([env.reset(with_task(env, 3.0, 3.0, 3.0))["observation"][:, 2] for _ in range(2)])

    env, other = lines(vectorization=vectorization), lines(vectorization=vectorization)
    before = torch.get_rng_state()
    first = noise(env, 5)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(first.unique()) == first.numel()
    assert torch.equal(noise(env, 5), first)
    assert torch.equal(noise(other, 5), first)
    assert not torch.equal(noise(env, 6), first)
    env.close()
    other.close()


def test_a_seed_repeats_a_run_of_a_vector_env_that_resets_itself():
    env = theirs(AutoresetMode.SAME_STEP)
    found = []
    for _ in range(2):
        env.set_seed(3)
        first = env.reset(with_task(env, 1.0, 1.0, 1.0))
        found.append(first["observation"].clone())
        env.step(first.set("action", right(env)))  # all rows end, and have begun again with the same task
    assert torch.equal(*found)


def test_without_a_seed_pytorchs_generator_seeds():
    def first(seed):
        torch.manual_seed(seed)
        env = GymVectorEnv(Line, 2)
        return env.reset()["observation"]

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


# ---- Info.


def test_info_is_recorded_in_batches_and_hidden_from_networks():
    env = trials(lines(info_keys=["says"]), episodes=2)
    policy = make_policy(env)
    assert not any("info" in key for key in policy.in_keys)
    keep = [("info", "says"), ("next", "info", "says"), ("next", "episode_done"), "trans"]
    collector = TrialCollector(env, policy, frames_per_batch=30, total_frames=30, keep=keep)
    (batch,) = collector
    says = batch["next", "info", "says"].bool()
    assert says.any()
    assert (batch["next", "episode_done"] | ~says).all()
    collector.shutdown()


def test_info_of_an_env_that_says_nothing_at_first_is_recorded_as_what_it_is():
    class Says(Line):
        def step(self, action):
            *stepped, _ = super().step(action)
            bonus = int(self.goal) if self.goal == 3 else 0.75  # the first row says a whole number
            return *stepped, {} if self.steps == 1 else {"bonus": bonus}

    env = lines(make=Says, info_keys=["bonus"])
    env.reset(TensorDict({"task": torch.tensor([[3.0], [4.0], [4.0]])}, [3]))
    for expected in ([0.0, 0.0, 0.0], [3.0, 0.75, 0.75]):
        env.play(right(env))
        assert env.observe_more(None)["info", "bonus"].flatten().tolist() == expected


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("info_keys", [[], ["says"]], ids=str)
def test_of_the_info_rows_hand_on_what_is_recorded_alone(info_keys, vectorization):
    env = lines(info_keys=info_keys, vectorization=vectorization)
    right = np.ones(3, np.int64)
    assert "resets" not in env.envs.reset()[1]
    env.reset(TensorDict({"task": torch.full((3, 1), 3.0)}, [3]))
    at_goal = {name for key in info_keys for name in (key, f"_{key}")}
    for said in (set(), set(), at_goal):  # a row looks at its first step more closely than at those that follow
        assert set(env.envs.step(right)[-1]) == said
    env.close()


def test_what_an_env_says_late_is_not_put_together_either():
    class Late(Line):
        def step(self, action):
            *stepped, _ = super().step(action)
            return *stepped, {"path": np.zeros(self.steps)} if stepped[2] else {}  # of another length in each row

    env = lines(make=Late)
    step, tensordict = env.envs.step, env.reset(with_task(env, 1.0, 2.0, 2.0))
    told = []
    env.envs.step = lambda actions: told.append(step(actions)) or told[-1]
    for action in ([0, 1, 1], [1, 1, 0]):
        tensordict = env.step(tensordict.set("action", torch.tensor(action)))["next"].exclude("reward")
    assert tensordict["done"].flatten().tolist() == [True, True, False]
    assert [infos for *_, infos in told] == [{}, {}]


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("kinds", [(int, float), (np.bool_, np.bool_), (bool, np.float32), (np.int64, float)])
def test_info_may_be_numbers_of_any_kind_in_any_row(kinds, vectorization):
    class Says(Line):
        def step(self, action):
            return *super().step(action)[:4], {"says": kinds[action](0.75 * action)}

    env = GymVectorEnv(Says, 3, info_keys=["says"], vectorization=vectorization)
    begun = env.reset()
    for action in ([0, 1, 1], [1, 0, 1]):
        stepped = env.step(begun.clone().set("action", torch.tensor(action)))["next"]
        assert stepped["info", "says"].flatten().tolist() == [float(kinds[each](0.75 * each)) for each in action]
    env.close()


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_info_keys_that_are_never_said_are_told_once(vectorization, told):
    env = lines(info_keys=["says", "stepz"], vectorization=vectorization)
    for count in (0, 1):
        env.start(torch.full((3, 1), 2.0))
        env.play(right(env))
        assert len(told) == count
        env.play(right(env))  # and the episodes end
    assert len(told) == 1
    assert "info_keys holds ['stepz']" in told[0]
    assert "Its info holds ['says', 'steps']" in told[0]
    env.close()


@pytest.mark.parametrize("value", ["text", np.zeros(2), None], ids=str)
def test_info_that_is_no_number_is_refused(value):
    class Says(Line):
        def step(self, action):
            return *super().step(action)[:4], {"says": value}

    env = GymVectorEnv(Says, 2, info_keys=["says"])
    with pytest.raises(TypeError, match="info_keys holds 'says'"):
        env.rollout(1)


# ---- Actions beyond the bounds.


def test_actions_are_clipped_on_their_way_and_their_log_probability_is_that_of_the_drawn_one():
    taken = []

    class Bounded(gymnasium.Env):
        observation_space, action_space = spaces.Box(-1, 1, (1,)), spaces.Box(-0.1, 0.2, (2,))

        def reset(self, *, seed=None, options=None):
            return np.zeros(1, np.float32), {}

        def step(self, action):
            assert self.action_space.contains(action)
            taken.append(action.tolist())
            return np.zeros(1, np.float32), 0.0, False, False, {}

    env = trials(GymVectorEnv(Bounded, 2, seed=0), None, steps=4)
    policy = make_policy(env)
    collector = TrialCollector(env, policy, frames_per_batch=8, total_frames=8)
    (batch,) = collector
    drawn = batch["action"]
    assert (drawn.abs() > 0.2).any()
    clipped = drawn.transpose(0, 1).flatten(0, 1).clamp(torch.tensor(-0.1), torch.tensor(0.2))
    assert torch.equal(torch.tensor(taken), clipped)
    normal = torch.distributions.Normal(batch["loc"], batch["scale"])
    torch.testing.assert_close(batch["action_log_prob"], normal.log_prob(drawn).sum(-1))
    assert torch.equal(batch["trans"][:, 1:, 1:3], drawn[:, :-1])
    collector.shutdown()


# ---- What breaks.


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

    def remember(*args, **kwargs):
        made.append(AsyncVectorEnv(*args, shared_memory=False, **kwargs))
        return made[0]

    monkeypatch.setattr("rl2_torchrl.envs.gym_vector.AsyncVectorEnv", remember)
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
