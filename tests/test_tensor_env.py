"""`TensorEnv`: what is derived from `begin` and `advance`, by hand; and `check_tensor_env`, shown faults put in by hand."""

from functools import partial
from typing import NamedTuple

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Binary, Bounded, Categorical, Composite, OneHot, Unbounded
from torchrl.envs import Compose, EnvCreator, ParallelEnv, SerialEnv, TransformedEnv, check_env_specs

from rl2_torchrl import GRUCategoricalActor, PreviousStep, RecurrentActor, TaskSampler, Trial, adaptation_curve
from rl2_torchrl.envs import (
    AntDirection,
    BernoulliBandit,
    GridNavi,
    GymVectorEnv,
    HalfCheetahVelocity,
    PointRobot,
    QuadraticBandit,
    TabularMDP,
    TensorEnv,
    directions,
    goals_on_half_circle,
    grid_goals,
    random_mdps,
    uniform_means,
    velocities,
)
from rl2_torchrl.testing import TensorEnvError, check_tensor_env, check_trial_env


class Walk(NamedTuple):
    goal: torch.Tensor
    where: dict


class Line(TensorEnv):
    """Steps of 0 or 1 along a line, with noise; the episode ends at the task, and is cut off where ``cliff`` is passed."""

    def __init__(self, *, cliff=99, max_episode_steps=6, fixed_length=False, **kwargs):
        super().__init__(
            task_spec=Bounded(1, 4, (1,)),
            observation_spec=Composite(place=Unbounded(2), seen=Categorical(100)),
            action_spec=Categorical(2),
            more_spec=Composite(twice=Unbounded(1)),
            max_episode_steps=max_episode_steps,
            fixed_length=fixed_length,
            **kwargs,
        )
        self.cliff = cliff

    def begin(self, task, rows):
        walk = Walk(task, {"place": torch.zeros(self.batch_size, dtype=torch.int64, device=self.device), "none": None})
        return walk, self.observe(walk.where["place"], torch.zeros_like(task))

    def advance(self, state, action):
        place = state.where["place"] + action
        noise = torch.randn(state.goal.shape, generator=self.generator, device=self.device)
        walk = Walk(state.goal, {"place": place, "none": None})
        arrived, over = place.unsqueeze(-1) >= state.goal, place.unsqueeze(-1) > self.cliff
        ends = (None, None) if self.fixed_length else (arrived, over)
        return walk, self.observe(place, noise), noise + place.unsqueeze(-1), *ends

    def observe(self, place, noise):
        return {"place": torch.cat([place.unsqueeze(-1).float(), noise], -1), "seen": place.clamp(max=99)}

    def observe_more(self, state):
        return {"twice": 2.0 * state.where["place"].unsqueeze(-1)}


def column(*values):
    return torch.tensor(values, dtype=torch.float32).unsqueeze(-1)


def flat(tensor):
    return tensor.squeeze(-1).tolist()


def ones(env):
    return torch.ones(env.batch_size, dtype=torch.int64)


# ---- On tensors.


def test_rows_end_at_steps_of_their_own():
    env = Line(batch_size=(3,), cliff=2, max_episode_steps=3, seed=0)
    env.start(column(1, 9, 9))
    ends = []
    for action in ([1, 0, 1], [0, 0, 1], [0, 0, 1]):
        _, _, terminated, truncated = env.play(torch.tensor(action))
        ends.append((flat(terminated), flat(truncated)))
    # Row 0 is at its goal after one step and stays; row 1 stands; row 2 passes 2 in the third step, which is the last.
    assert ends == [
        ([True, False, False], [False, False, False]),
        ([True, False, False], [False, False, False]),
        ([True, False, False], [True, True, True]),
    ]


def test_a_limit_may_be_part_of_the_task():
    class Timed(Line):
        time_limit_terminates = True

    env = Timed(batch_size=(2,), max_episode_steps=2, seed=0)
    env.start(column(1, 9))
    ends = [env.play(torch.tensor([1, 0]))[2:] for _ in range(2)]
    assert [flat(terminated) for terminated, _ in ends] == [[True, False], [True, True]]
    assert [flat(truncated) for _, truncated in ends] == [[False, False], [False, False]]
    assert "truncated" in env.full_done_spec.keys()


def test_no_limit():
    env = Line(batch_size=(1,), max_episode_steps=None, seed=0)
    env.start(column(9))
    assert [bool(env.play(ones(env))[2]) for _ in range(10)] == [False] * 8 + [True] * 2


def test_a_start_of_some_rows_leaves_the_others():
    env = Line(batch_size=(3,), max_episode_steps=4, seed=0)
    env.start(column(9, 9, 9))
    for _ in range(2):
        before, *_ = env.play(ones(env))
    entries = env.start(column(1, 2, 3), torch.tensor([False, True, False]))
    assert entries["seen"].tolist() == [2, 0, 2]
    assert torch.equal(entries["place"][[0, 2]], before["place"][[0, 2]])
    assert entries["place"][1].tolist() == [0, 0]
    state = env.state
    assert isinstance(state, Walk)
    assert (flat(state.goal), state.where["place"].tolist(), state.where["none"]) == ([9, 2, 9], [2, 0, 2], None)
    ends = [env.play(ones(env))[2:] for _ in range(4)]
    # Row 1 reaches its goal, 2, in two steps; rows 0 and 2 have taken two of their four.
    assert [flat(terminated) for terminated, _ in ends] == [[False] * 3] + [[False, True, False]] * 3
    assert [flat(truncated) for _, truncated in ends] == [[False] * 3] + [[True, False, True]] * 2 + [[True] * 3]


def test_rows_of_a_fixed_length_stay_together_until_some_begin_alone():
    env = Line(batch_size=(2,), max_episode_steps=3, fixed_length=True, seed=0)
    env.start(column(1, 9))
    for step in range(3):
        assert env.episode_step == step
        assert env.play(ones(env))[2:] == (None, None)
    env.start(column(1, 9))
    env.play(ones(env))
    env.start(column(1, 9), torch.tensor([[True], [False]]))
    assert env.episode_step is None
    ends = [env.play(ones(env))[2:] for _ in range(3)]
    assert all(terminated is None for terminated, _ in ends)
    assert [flat(truncated) for _, truncated in ends] == [[False, False], [False, True], [True, True]]
    env.start(column(1, 9))
    assert env.episode_step == 0


def test_an_end_in_spite_of_a_fixed_length_is_an_error():
    class Lying(Line):
        def advance(self, state, action):
            *step, _, _ = super().advance(state, action)
            return *step, torch.zeros(2, 1, dtype=torch.bool), None

    env = Lying(batch_size=(2,), fixed_length=True)
    env.start(column(1, 1))
    with pytest.raises(RuntimeError, match="Lying.advance says when an episode ends.*fixed_length=False"):
        env.play(ones(env))


# ---- As a TorchRL env.


def test_torchrl_is_given_the_same_steps():
    one, other = Line(batch_size=(3,), seed=0), Line(batch_size=(3,), seed=0)
    task, action = column(2, 3, 9), torch.tensor([1, 0, 1])
    entries, tensordict = one.start(task), other.reset(TensorDict({"task": task}, [3]))
    for _ in range(6):
        for key, value in entries.items():
            assert torch.equal(tensordict[key], value)
        assert torch.equal(tensordict["twice"], 2.0 * tensordict["seen"].unsqueeze(-1))
        entries, reward, terminated, truncated = one.play(action)
        tensordict = other.step(tensordict.set("action", action))["next"]
        assert torch.equal(tensordict["reward"], reward)
        assert torch.equal(tensordict["terminated"], terminated)
        assert torch.equal(tensordict["truncated"], truncated)
        assert torch.equal(tensordict["done"], terminated | truncated)
        if tensordict["done"].any():
            rows = tensordict["done"].clone()
            entries = one.start(task, rows)
            tensordict = other.reset(tensordict.exclude("reward").set("task", task).set("_reset", rows))
            assert not tensordict["done"].any()
    assert flat(tensordict["seen"].unsqueeze(-1)) == [0, 0, 0]  # the last of them ended by the limit


def test_a_fixed_length_ends_in_tensordicts_too():
    env = Line(batch_size=(2,), max_episode_steps=2, fixed_length=True, seed=0)
    tensordict = env.reset(TensorDict({"task": column(1, 1)}, [2])).set("action", ones(env))
    for done in (False, True):
        following = env.step(tensordict)["next"]
        assert [bool(following[key].all()) for key in ("done", "truncated", "terminated")] == [done, done, False]


@pytest.mark.parametrize(
    ("env", "names"),
    [(GridNavi(), {"done", "terminated"}), (PointRobot(), {"done", "terminated", "truncated"})],
)
def test_entries_of_ends_are_those_that_can_be_true(env, names):
    assert set(env.full_done_spec.keys()) == names


def test_what_is_written_into_a_tensordict_does_not_reach_the_env():
    env, task = Line(batch_size=(2,), seed=0), column(3, 9)
    tensordict = env.reset(TensorDict({"task": task}, [2]))
    task.zero_()
    for value in tensordict.values():
        value.zero_()
    tensordict = env.step(tensordict.set("action", ones(env)))
    for value in tensordict["next"].values():
        value.zero_()
    tensordict = env.step(tensordict.set("action", ones(env)))["next"]
    assert tensordict["seen"].tolist() == [2, 2]
    assert flat(tensordict["terminated"]) == [False, False]
    tensordict["seen"].zero_()
    reset = env._reset(TensorDict({"task": column(3, 9), "_reset": torch.tensor([[True], [False]])}, [2]))
    assert reset["seen"].tolist() == [0, 2]


def test_nor_where_the_observation_is_the_state():
    env = GridNavi(batch_size=(1,))
    tensordict = env.reset(TensorDict({"task": torch.ones(1, 2)}, [1]))
    right = torch.tensor([2])
    for place in (1, 2, 3):
        tensordict = env.step(tensordict.set("action", right))["next"]
        assert tensordict["observation"].tolist() == [place]
        tensordict["observation"].zero_()


def test_nested_tasks():
    class Nested(Line):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            task = Composite(goal=Bounded(1, 4, (*self.batch_size, 1)), shape=self.batch_size)
            self.state_spec = Composite(task=task, shape=self.batch_size)

        def begin(self, task, rows):
            return super().begin(task["goal"], rows)

    env = Nested(batch_size=(3,), seed=0)
    env.reset(TensorDict({"task": {"goal": column(1, 2, 3)}}, [3]))
    assert flat(env.play(ones(env))[2]) == [True, False, False]
    check_tensor_env(env)


class Aims(TensorEnv):
    """Keeps a task of two entries in its state, as it is."""

    def __init__(self, **kwargs):
        spec = Composite(a=Unbounded(1), b=Composite(c=Unbounded(1)))
        super().__init__(task_spec=spec, action_spec=Unbounded(1), observation_spec=Unbounded(1), **kwargs)

    def begin(self, task, rows):
        place = torch.zeros(*self.batch_size, 1)
        return (place, task), place

    def advance(self, state, action):
        place, task = state
        place = place + action + task["a"] + 2 * task["b", "c"]
        return (place, task), place, place, place.abs() > 5, None


def aims(a, b):
    return {"a": column(*a), "b": {"c": column(*b)}}


def test_a_nested_task_may_be_kept_in_the_state():
    env, alone = Aims(batch_size=(2,), seed=0), torch.tensor([True, False])
    env.start(TensorDict(aims([1, 1], [0, 1]), [2]))
    first = env.play(torch.zeros(2, 1))[0]["observation"]
    assert flat(first) == [1, 3]
    env.start(TensorDict(dict(reversed(aims([2, 9], [3, 9]).items())), [2]), alone)  # its entries in another order
    saved = env.get_extra_state()
    other = Aims(batch_size=(2,), seed=0)
    other.set_extra_state(saved)
    for each in (env, other):
        assert flat(each.play(torch.zeros(2, 1))[0]["observation"]) == [8, 6]


def test_an_env_that_keeps_a_nested_task_in_its_state_is_sound():
    def tasks(size, generator):
        a, b = torch.randn(2, *size, 1, generator=generator)
        return TensorDict({"b": {"c": b}, "a": a}, size)

    env = Aims(batch_size=(4,), max_episode_steps=5, seed=0)
    check_tensor_env(env, tasks)
    check_trial_env(TransformedEnv(env, Compose(Trial(episodes=3), TaskSampler(tasks, seed=0), PreviousStep())))


@pytest.mark.parametrize("batch_size", [(), (4,), (2, 3)])
def test_ragged_trials_keep_the_contract(batch_size):
    def tasks(size, generator):
        return torch.randint(1, 5, (*size, 1), generator=generator).float()

    transforms = Compose(Trial(episodes=3, steps=12), TaskSampler(tasks, seed=0), PreviousStep())
    check_trial_env(TransformedEnv(Line(batch_size=batch_size), transforms))


# ---- Without a task.

NATIVE = [
    (lambda **kwargs: BernoulliBandit(3, **kwargs), uniform_means(3)),
    (lambda **kwargs: QuadraticBandit(2, **kwargs), None),
    (lambda **kwargs: TabularMDP(3, 2, episode_steps=4, **kwargs), random_mdps(3, 2)),
    (lambda **kwargs: GridNavi(episode_steps=6, **kwargs), grid_goals()),
    (lambda **kwargs: PointRobot(max_episode_steps=6, **kwargs), goals_on_half_circle()),
    (lambda **kwargs: PointRobot(sparse=True, goal_radius=0.5, **kwargs), goals_on_half_circle()),
    (lambda **kwargs: HalfCheetahVelocity(horizon=4, **kwargs), velocities()),
    (lambda **kwargs: AntDirection(horizon=4, dtype=torch.float64, **kwargs), directions()),
    (Line, None),
]


@pytest.mark.parametrize("batch_size", [(), (3,), (2, 2)])
@pytest.mark.parametrize(("make", "tasks"), NATIVE)
def test_torchrl_may_look_at_an_env_that_has_no_task_yet(make, tasks, batch_size):
    env = make(batch_size=batch_size)
    check_env_specs(env)
    assert env.state_spec["task"].is_in(env.reset()["task"])
    if tasks is not None:
        assert (env.reset()["task"] == 0).all()


def test_playing_without_a_task_is_told_once(told):
    env = GridNavi(batch_size=(2,))
    EnvCreator(lambda: GridNavi())
    env.rollout(3)  # as check_env_specs
    assert told == []
    env.rollout(10)
    env.rollout(10)
    assert len(told) == 1
    assert "GridNavi was reset without a 'task'" in told[0]
    assert "Add a TaskSampler" in told[0]


def test_an_evaluation_without_a_task_tells_it_too(told):
    env = TransformedEnv(BernoulliBandit(3, batch_size=(2,)), Compose(Trial(episodes=5), PreviousStep()))
    adaptation_curve(env, GRUCategoricalActor.from_env(env), num_trials=4)
    assert len(told) == 1
    assert "BernoulliBandit was reset without a 'task'" in told[0]


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        (OneHot(3), torch.bool),
        (Categorical(3, dtype=torch.int32), torch.int32),
        (Binary(3), torch.int8),
        (Composite(pick=OneHot(3)), torch.bool),
    ],
)
def test_actions_come_in_the_dtype_of_their_spec(spec, dtype):
    seen = set()

    class Choices(TensorEnv):
        def begin(self, task, rows):
            return task, None

        def advance(self, state, action):
            seen.add(action.dtype)
            return state, None, action.float().reshape(2, -1).sum(-1, keepdim=True), None, None

    base = Choices(task_spec=Unbounded(1), action_spec=spec, max_episode_steps=2, fixed_length=True, batch_size=(2,))
    sampler = TaskSampler(lambda batch_size, generator: torch.rand(*batch_size, 1, generator=generator))
    env = TransformedEnv(base, Compose(Trial(episodes=2), sampler, PreviousStep()))
    actor = RecurrentActor.from_env(env, hidden_size=4)
    adaptation_curve(env, actor, 2)
    start = env.reset()
    env.step(start.set(env.action_key, env.rand_action(start)[env.action_key].long()))
    check_tensor_env(base)
    assert seen == {dtype}


@pytest.mark.parametrize("workers", [SerialEnv, partial(ParallelEnv, mp_start_method="fork")])
def test_workers_made_by_a_lambda_are_given_tasks(workers):
    tasks = TaskSampler.fixed(torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]))
    env = TransformedEnv(workers(2, lambda: BernoulliBandit(3)), Compose(Trial(episodes=4), tasks, PreviousStep()))
    try:
        data = env.rollout(8, lambda td: td.set("action", torch.tensor([2, 2])), break_when_any_done=False)
        assert data["next", "reward"].squeeze(-1).tolist() == [[1.0] * 4 + [1.0] * 4, [0.0] * 8]
    finally:
        env.close()


# ---- Seeds and checkpoints.


@pytest.mark.parametrize(("make", "tasks"), NATIVE)
def test_every_native_env_keeps_what_it_promises(make, tasks):
    check_tensor_env(make(batch_size=(4,)), tasks, num_steps=20)


@pytest.mark.parametrize(("make", "tasks"), NATIVE)
def test_a_checkpoint_goes_on_in_a_new_env(make, tasks):
    env, resumed = make(batch_size=(3,)), make(batch_size=(3,))
    task = env.state_spec["task"].rand() if tasks is None else tasks(env.batch_size, torch.Generator())
    actions = [env.action_spec.rand() for _ in range(6)]
    env.start(task.to(env.state_spec["task"].dtype))
    for action in actions[:2]:
        env.play(action)
    env.start(task, torch.tensor([True, False, False]))
    state = env.get_extra_state()
    assert state.dtype == torch.uint8
    resumed.set_extra_state(state)
    for action in actions:
        for (ours, *rest), (theirs, *others) in [(env.play(action), resumed.play(action))]:
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
            for one, other in zip(rest, others, strict=True):
                assert (one is other is None) or torch.equal(one, other)


def test_a_checkpoint_puts_dictionaries_back_by_key():
    class Swapped(Line):
        """Begins with state and observation in one order, and goes on in the other."""

        def begin(self, task, rows):
            return {"task": task, "place": torch.zeros_like(task)}, self.observe(torch.zeros_like(task))

        def advance(self, state, action):
            place = state["place"] + action.unsqueeze(-1)
            return {"place": place, "task": state["task"]}, self.observe(place), place, None, None

        def observe(self, place):
            return dict(
                sorted({"place": place.expand(-1, 2), "seen": -place.expand(-1, 2)}.items(), reverse=place.any())
            )

        def observe_more(self, state):
            return {"twice": 2 * state["place"]}

    env, resumed = Swapped(batch_size=(2,)), Swapped(batch_size=(2,))
    env.start(column(1, 2))
    env.play(ones(env))
    resumed.set_extra_state(env.get_extra_state())
    for ours, theirs in ((env.state, resumed.state), (env.observation, resumed.observation)):
        assert {key: value.tolist() for key, value in ours.items()} == {k: v.tolist() for k, v in theirs.items()}


def test_states_that_are_not_ones_own():
    env = Line(batch_size=(3,), seed=0)
    fresh = env.get_extra_state()
    env.start(column(1, 2, 3))
    with pytest.raises(ValueError, match=r"not one of Line of batch_size \(2,\): it is another env's"):
        Line(batch_size=(2,)).set_extra_state(env.get_extra_state())
    # The state of an env that has not begun puts one back that has.
    first = env.play(ones(env))[1]
    env.set_extra_state(fresh)
    with pytest.raises(RuntimeError, match="before reset"):
        env.step(TensorDict({"action": ones(env)}, [3]))
    env.start(column(1, 2, 3))
    assert torch.equal(env.play(ones(env))[1], first)


def test_draws_come_in_their_order():
    # A draw of each step's noise before that of the next state, as the published runs had them.
    generator = torch.Generator().manual_seed(3)
    env = TabularMDP(2, 2, noise=0.5, batch_size=(4,), seed=3)
    env.start(torch.tensor([0.0, 0.5, 0.5]).repeat(4).expand(4, -1))
    for _ in range(3):
        entries, reward, _, _ = env.play(torch.zeros(4, dtype=torch.int64))
        assert torch.equal(reward, 0.5 * torch.randn(4, 1, generator=generator))
        # The first state has probability 1/2.
        assert torch.equal(entries["observation"], (torch.rand(4, 1, generator=generator) >= 0.5).squeeze(-1).long())


# ---- Bad arguments.


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"action_spec": None}, "action_spec=None.*such as Categorical"),
        ({"more_spec": "speed"}, "more_spec='speed' names no entry: give a Composite"),
        ({"more_spec": Unbounded(1)}, "more_spec=.*names no entry: give a Composite"),
    ],
)
def test_specs_of_the_wrong_kind(spec, message):
    class Empty(TensorEnv):
        begin = advance = None

    with pytest.raises(TypeError, match=f"(?s){message}"):
        Empty(**{"task_spec": None, "action_spec": Categorical(2), **spec})


def test_a_step_on_tensors_before_the_first_start():
    with pytest.raises(RuntimeError, match=r"a step of Line before reset\(\).*start\(task\)"):
        Line(batch_size=(2,)).play(torch.ones(2, dtype=torch.int64))


def test_an_env_stays_on_its_device():
    env = Line(batch_size=(2,))
    assert env.to("cpu") is env
    with pytest.raises(ValueError, match=r"Line is on cpu and does not move to meta.*Line\(..., device='meta'\)"):
        TransformedEnv(env, Trial(episodes=2)).to("meta")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": (2, 0)}, r"batch_size=\(2, 0\) holds no env"),
        ({"max_episode_steps": 0}, "max_episode_steps=0.*at least 1"),
        ({"max_episode_steps": None, "fixed_length": True}, "fixed_length=True without max_episode_steps"),
        ({"reward_spec": Composite(profit=Unbounded(1))}, r"reward_spec names \['profit'\], .* is one, 'reward'"),
    ],
)
def test_impossible_sizes(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Line(**kwargs)


# ---- check_tensor_env.


def after_begin(change):
    """A `Line` of which ``change(env, task, rows, state, observation)`` is what `begin` returns."""

    class Broken(Line):
        def begin(self, task, rows):
            return change(self, task, rows, *super().begin(task, rows))

    return Broken


def after_step(change, **kwargs):
    """A `Line` of which ``change(env, state, action, step)`` is what `advance` returns."""

    class Broken(Line):
        def __init__(self, **others):
            super().__init__(**kwargs, **others)

        def advance(self, state, action):
            return change(self, state, action, super().advance(state, action))

    return Broken


class CountsOnItself(Line):
    """Its reward tells how many steps the env has taken, which is no part of the state."""

    steps = 0

    def begin(self, task, rows):
        if rows.all():
            self.steps = 0
        return super().begin(task, rows)

    def advance(self, state, action):
        self.steps += 1
        state, observation, reward, *ends = super().advance(state, action)
        return state, observation, reward + self.steps, *ends


class NeverForgets(CountsOnItself):
    def begin(self, task, rows):
        return Line.begin(self, task, rows)


class Outside(Line):
    """Keeps its place outside of the state, and begins all rows whatever it is told."""

    everywhere = True

    def begin(self, task, rows):
        state, observation = super().begin(task, rows)
        old = getattr(self, "outside", state.where["place"])
        rows = rows | self.everywhere
        self.outside = torch.where(rows, 0, old)
        return Walk(task, None), self.observe(self.outside, torch.zeros_like(task))

    def advance(self, state, action):
        walk, *others = super().advance(Walk(state.goal, {"place": self.outside}), action)
        self.outside = walk.where["place"]
        return Walk(walk.goal, None), *others

    def observe_more(self, state):
        return {"twice": 2.0 * self.outside.unsqueeze(-1)}

    def get_outside_state(self):
        return [self.outside]

    def set_outside_state(self, tensors):
        (self.outside,) = tensors


class OutsideRight(Outside):
    everywhere = False


class OutsideUnsaved(OutsideRight):
    def get_outside_state(self):
        return []

    def set_outside_state(self, tensors):
        pass


def in_place(env, state, action, step):
    state.where["place"].add_(action)
    return (
        Walk(state.goal, state.where),
        env.observe(state.where["place"].clone(), torch.zeros_like(state.goal)),
        *step[2:],
    )


def few_draws(env, state, action, step):
    # As many numbers as there are rows that move.
    noise = torch.zeros_like(step[2])
    moves = (action > 0).unsqueeze(-1)
    noise[moves] = torch.randn(int(moves.sum()), generator=env.generator)
    return *step[:2], noise, *step[3:]


def own_draws_at_begin(env, task, rows, state, observation):
    draws = torch.zeros_like(task)
    draws[rows] = torch.rand(int(rows.sum()), 1)
    return state, env.observe(state.where["place"], draws)


BROKEN = [
    ("specs", after_step(lambda env, state, action, step: (*step[:2], 1.0, *step[3:]))),
    (
        "state",
        after_begin(
            lambda env, task, rows, state, observation: (
                Walk(task, {**state.where, "other": torch.zeros(3)}),
                observation,
            )
        ),
    ),
    ("state", after_step(lambda env, state, action, step: (Walk(step[0].goal.double(), step[0].where), *step[1:]))),
    ("specs", after_step(lambda env, state, action, step: (*step[:2], step[2].squeeze(-1), *step[3:]))),
    ("specs", after_step(lambda env, state, action, step: (*step[:2], step[2].double(), *step[3:]))),
    ("specs", after_step(lambda env, state, action, step: (*step[:3], step[3].squeeze(-1), step[4]))),
    ("specs", after_step(lambda env, state, action, step: (step[0], {**step[1], "more": step[2]}, *step[2:]))),
    ("specs", after_begin(lambda env, task, rows, state, seen: (state, {**seen, "seen": seen["seen"] + 100}))),
    ("specs", after_begin(lambda env, task, rows, state, seen: (state, {**seen, "place": seen["place"].double()}))),
    (
        "finite",
        after_step(lambda env, state, action, step: (*step[:2], step[2] / (step[1]["seen"][:, None] != 2), *step[3:])),
    ),
    ("in_place", after_step(in_place)),
    ("in_place", after_step(lambda env, state, action, step: (action.zero_(), step)[1])),
    ("repeatable", after_step(lambda env, state, action, step: (*step[:2], torch.randn(step[2].shape), *step[3:]))),
    ("repeatable", after_begin(own_draws_at_begin)),
    ("repeatable", NeverForgets),
    ("round_trip", OutsideUnsaved),
    ("round_trip", CountsOnItself),
    ("rows_independent", after_step(lambda env, state, action, step: (*step[:2], step[2] - step[2].mean(), *step[3:]))),
    ("rows_independent", after_step(lambda env, state, action, step: (*step[:2], step[2].roll(1, 0), *step[3:]))),
    ("rows_independent", after_step(lambda env, state, action, step: (*step[:3], step[3] | step[3].any(), step[4]))),
    ("rows_independent", after_step(few_draws)),
    (
        "rows_independent",
        after_begin(lambda env, task, rows, state, seen: (Walk(task.mean().expand_as(task), state.where), seen)),
    ),
    ("partial_reset", Outside),
]


@pytest.mark.parametrize(("rule", "broken"), BROKEN)
def test_a_broken_promise_is_named(rule, broken):
    with pytest.raises(TensorEnvError, match=rf"rule '{rule}' is broken: .*\. [A-Z].*:") as error:
        check_tensor_env(broken(batch_size=(4,), seed=0))
    assert error.value.rule == rule


def test_an_end_in_spite_of_a_fixed_length_is_the_envs_own_error():
    ends = after_step(lambda env, state, action, step: (*step[:3], step[2] > 9, None), fixed_length=True)
    with pytest.raises(RuntimeError, match="fixed_length=True promises that none does"):
        check_tensor_env(ends(batch_size=(4,)))


def test_a_state_kept_elsewhere_may_be_sound():
    check_tensor_env(OutsideRight(batch_size=(4,), seed=0))
    check_tensor_env(OutsideRight(batch_size=(2, 2), seed=0))


def test_what_is_seen_is_told():
    broken = after_step(lambda env, state, action, step: (*step[:2], step[2].squeeze(-1), *step[3:]))
    with pytest.raises(TensorEnvError, match=r"reward is torch.float32 \[4\], its spec says torch.float32 \[4, 1\]"):
        check_tensor_env(broken(batch_size=(4,)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: GymVectorEnv("CartPole-v1", 2),
        lambda: TransformedEnv(Line(batch_size=(2,)), Trial(episodes=2)),
        lambda: SerialEnv(2, Line),
    ],
)
def test_what_no_author_has_written_is_for_the_other_check(make):
    with pytest.raises(TypeError, match="Env is no TensorEnv that its author has written.*check_trial_env"):
        check_tensor_env(make())


@pytest.mark.parametrize(("batch_size", "num_steps"), [((), 50), ((1,), 50), ((4,), 1)])
def test_nothing_to_compare(batch_size, num_steps):
    with pytest.raises(ValueError, match="two rows or more"):
        check_tensor_env(Line(batch_size=batch_size), num_steps=num_steps)


class Wanders(TensorEnv):
    """Without a task."""

    def __init__(self, **kwargs):
        specs = {"task_spec": None, "observation_spec": Unbounded(1), "action_spec": Unbounded(1)}
        super().__init__(**specs, max_episode_steps=4, **kwargs)

    def begin(self, task, rows):
        assert task is None
        place = torch.zeros(*self.batch_size, 1)
        return place, place

    def advance(self, state, action):
        place = state + action.tanh()
        return place, place, -place.abs(), None, None


def test_an_env_without_a_task_is_checked_too():
    check_tensor_env(Wanders(batch_size=(4,)), num_steps=10)

    class Leaks(Wanders):
        def advance(self, state, action):
            place, _, *others = super().advance(state, action)
            place = place + place.mean()
            return place, place, *others

    with pytest.raises(TensorEnvError, match="rows_independent"):
        check_tensor_env(Leaks(batch_size=(4,)), num_steps=10)
