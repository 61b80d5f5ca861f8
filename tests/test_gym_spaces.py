"""Gymnasium's spaces as specs, and what is handed over between them, by hand."""

import re

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from tensordict import assert_close
from torchrl.data import Binary, Bounded, Categorical, MultiCategorical, Unbounded
from torchrl.envs import Compose, TransformedEnv
from torchrl.modules import set_recurrent_mode

from rl2_torchrl import ActorCritic, GRUValueHead, PreviousStep, RecurrentActor, Trial, TrialCollector
from rl2_torchrl.envs import GymTaskEnv, GymVectorEnv
from rl2_torchrl.envs.gym_spaces import ActionSpace, ObservationSpace
from rl2_torchrl.testing import check_trial_env

INF = np.inf
OBSERVED = [
    # space, spec, rows as a vector env gives them, and as tensors
    (spaces.Box(-INF, INF, (2,), np.float64), Unbounded(2), [[1.5, 2], [3, 4]], [[1.5, 2], [3, 4]]),
    (spaces.Box(-1, 1, ()), Unbounded(1), [0.5, -0.5], [[0.5], [-0.5]]),
    (spaces.Box(0, 10, (2,), np.uint8), Unbounded(2, dtype=torch.int16), [[10, 0]] * 2, [[10, 0]] * 2),  # symbols
    (spaces.Box(0, 100, (2,), np.uint8), Unbounded(2, dtype=torch.uint8), [[100, 0]] * 2, [[100, 0]] * 2),
    (spaces.Box(0, 255, (1, 2), np.uint8), Unbounded((1, 2), dtype=torch.uint8), [[[255, 0]]] * 2, [[[255, 0]]] * 2),
    (spaces.Box(0, 60_000, (1,), np.uint16), Unbounded(1, dtype=torch.int64), [[60_000], [1]], [[60_000], [1]]),
    (spaces.Box(-(2**40), 2**40, (1,), np.int64), Unbounded(1, dtype=torch.int64), [[2**40], [1]], [[2**40], [1]]),
    (spaces.Discrete(3), Categorical(3), [0, 2], [0, 2]),
    (spaces.Discrete(3, start=-1), Categorical(3), [-1, 1], [0, 2]),
    (spaces.MultiDiscrete([3, 2], start=[0, 5]), MultiCategorical([3, 2]), [[2, 6], [0, 5]], [[2, 1], [0, 0]]),
    (spaces.MultiDiscrete([[3, 2]]), MultiCategorical([3, 2]), [[[2, 1]], [[0, 0]]], [[2, 1], [0, 0]]),
    (spaces.MultiBinary((1, 2)), Binary(2), [[[1, 0]], [[0, 1]]], [[1, 0], [0, 1]]),
]


@pytest.mark.parametrize(("space", "spec", "rows", "expected"), OBSERVED, ids=str)
def test_an_observation_by_hand(space, spec, rows, expected):
    observations = ObservationSpace(space)
    found = observations.spec["observation"]
    assert (type(found), found.shape, found.dtype) == (type(spec), spec.shape, spec.dtype)
    array = np.array(rows, dtype=space.dtype)
    given = torch.from_numpy(observations.arrays(array)["observation"])
    assert (given.tolist(), given.dtype) == (expected, spec.dtype)
    # One row, and a copy: vector envs write over their own arrays.
    assert observations.of_one(array[1])["observation"].tolist() == [expected[1]]
    array[:] = array[0]
    assert given.tolist() == expected


@pytest.mark.parametrize(
    ("space", "right", "wrong", "words"),
    [
        (spaces.MultiDiscrete([3, 2]), [2, 1], [3, 0], "[3, 0] in row 1, of [3, 2] choices from 0 on"),
        (spaces.MultiDiscrete([3, 2]), [2, 1], [0, -1], "[0, -1] in row 1, of [3, 2] choices from 0 on"),
        (spaces.Discrete(5), 4, 5, "5 in row 1, of 5 choices from 0 on"),
        (spaces.Discrete(5, start=1), 1, 0, "0 in row 1, of 5 choices from 1 on"),
        (spaces.MultiBinary(2), [0, 1], [0, 5], "[0, 5] in row 1, of 2 choices from 0 on"),
    ],
    ids=str,
)
def test_a_choice_that_does_not_exist_is_told(space, right, wrong, words):
    with pytest.raises(ValueError, match=re.escape(f"'observation' {words}")):
        ObservationSpace(space).arrays(np.array([right, wrong]))


def test_entries_of_dicts_and_tuples():
    inner = spaces.Tuple((spaces.Discrete(2), spaces.Dict(deep=spaces.Box(0, 1, (2,)))))
    observations = ObservationSpace(spaces.Dict(pair=inner, said=spaces.Text(5), flags=spaces.MultiBinary(2)))
    keys = {("pair", "0"), ("pair", "1", "deep"), "flags"}
    assert set(observations.spec.keys(True, True)) == keys
    rows = {"pair": (np.array([1, 0]), {"deep": np.ones((2, 2))}), "said": ["a", "b"], "flags": np.zeros((2, 2))}
    given = observations.arrays(rows)
    assert set(given) == keys
    assert given["pair", "0"].tolist() == [1, 0]
    # A tuple at the root lies under "observation".
    assert set(ObservationSpace(inner).spec.keys(True, True)) == {("observation", "0"), ("observation", "1", "deep")}


@pytest.mark.parametrize(
    ("space", "error", "message"),
    [
        (spaces.Sequence(spaces.Discrete(2)), TypeError, "'observation' is a Sequence, which has no fixed size"),
        (spaces.Dict(a=spaces.Graph(spaces.Discrete(2), None)), TypeError, "'a' is a Graph"),
        (
            spaces.Dict(task=spaces.Discrete(2)),
            ValueError,
            "{'task'} would stand in the place of the env's own: rename",
        ),
        (spaces.Dict(reward=spaces.Discrete(2), a=spaces.Discrete(2)), ValueError, "{'reward'}"),
        (spaces.Dict(info=spaces.Dict(a=spaces.Discrete(2))), ValueError, "{'info'}"),
        (spaces.Dict(trans=spaces.Discrete(2)), ValueError, "{'trans'}"),
        (spaces.Dict(episode_done=spaces.Discrete(2)), ValueError, "{'episode_done'}"),
        (spaces.Dict(said=spaces.Text(5)), None, None),
    ],
    ids=str,
)
def test_spaces_that_are_no_tensors_and_names_that_are_taken(space, error, message):
    if error is None:
        assert not list(ObservationSpace(space).spec.keys())
        return
    with pytest.raises(error, match=message):
        ObservationSpace(space)


ACTIONS = [
    (spaces.Discrete(3), Categorical(3), [0, 2], [0, 2]),
    (spaces.Discrete(3, start=4), Categorical(3), [0, 2], [4, 6]),
    (spaces.MultiDiscrete([3, 2], start=[1, -2]), MultiCategorical([3, 2]), [[0, 1], [2, 0]], [[1, -1], [3, -2]]),
    (spaces.MultiDiscrete([[3], [2]]), MultiCategorical([3, 2]), [[0, 1], [2, 0]], [[[0], [1]], [[2], [0]]]),
    (spaces.MultiBinary(2), Binary(2), [[0, 1], [1, 1]], [[0, 1], [1, 1]]),
    (spaces.Box(-1, 1, (2,)), Bounded(-1, 1, (2,)), [[0.5, 3], [-3, 1]], [[0.5, 1], [-1, 1]]),
    (spaces.Box(-2, 2, (), np.float64), Bounded(-2, 2, (1,)), [[0.5], [3]], [0.5, 2]),
    (spaces.Box(0, 1, (1, 2)), Bounded(0, 1, (1, 2)), [[[-1, 0.5]], [[2, 0]]], [[[0, 0.5]], [[1, 0]]]),
    (
        spaces.Box(np.float32([-1, -INF]), np.float32([INF, 1])),
        Unbounded(2),
        [[-5, -5], [5, 5]],
        [[-1, -5], [5, 1]],
    ),
    (spaces.Box(-INF, INF, (1,)), Unbounded(1), [[-5], [5]], [[-5], [5]]),
]


@pytest.mark.parametrize(("space", "spec", "action", "expected"), ACTIONS, ids=str)
def test_an_action_by_hand(space, spec, action, expected):
    actions = ActionSpace(space)
    assert (type(actions.spec), actions.spec.shape, actions.spec.dtype) == (type(spec), spec.shape, spec.dtype)
    given = torch.tensor(action, dtype=spec.dtype)
    before = given.clone()
    array = actions.array(given)
    assert (array.tolist(), array.dtype) == (expected, space.dtype)
    assert torch.equal(given, before)
    assert batch_space(space, 2).contains(array)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_policy_may_act_in_another_precision(dtype):
    array = ActionSpace(spaces.Box(-1, 1, (2,))).array(torch.tensor([[0.5, 3], [-3, 1]], dtype=dtype))
    assert (array.tolist(), array.dtype) == ([[0.5, 1], [-1, 1]], np.float32)


@pytest.mark.parametrize(
    "space", [spaces.Dict(a=spaces.Discrete(2)), spaces.Text(3), spaces.Box(0, 9, (1,), np.int64)], ids=str
)
def test_actions_for_which_there_is_no_distribution(space):
    with pytest.raises(TypeError, match="for which no policy here has a distribution"):
        ActionSpace(space)


class Samples(gymnasium.Env):
    """Observes samples of a space with all there is; insists on actions of its space."""

    observation_space = spaces.Dict(
        a=spaces.Discrete(3, start=2),
        b=spaces.Tuple((spaces.MultiDiscrete([3, 2]), spaces.Box(-1, 1, (2,), np.float64))),
        c=spaces.MultiBinary(3),
        t=spaces.Text(5),
        s=spaces.Box(0, 1, ()),
    )

    def __init__(self, action_space):
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        self.observation_space.seed(int(self.np_random.integers(1000)))
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), (action, self.action_space)
        self.steps += 1
        return self.observation_space.sample(), 1.0, self.np_random.random() < 0.2, self.steps >= 9, {}


#: One of each kind of spec, by which all but the env tells actions apart; `Samples` itself insists on its space.
CHECKED = [ACTIONS[number][0] for number in (1, 2, 4, 5, 9)]


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("space", [space for space, *_ in ACTIONS if space.shape != (1, 2)], ids=str)
def test_from_env_makes_a_policy_for_each_action_space(space, vectorization):
    if vectorization == "async" and space != ACTIONS[2][0]:
        pytest.skip("processes are another matter: one space will do")
    base = GymVectorEnv(lambda: Samples(space), 3, seed=0, vectorization=vectorization)
    env = TransformedEnv(base, Compose(Trial(episodes=3), PreviousStep()))
    if space in CHECKED:
        check_trial_env(env, task_key=None)
    policy = ActorCritic(RecurrentActor.from_env(env), GRUValueHead.from_env(env))
    collector = TrialCollector(env, policy, frames_per_batch=60, total_frames=120)
    batches = [batch.clone() for batch in collector]
    assert collector.reason is None
    assert all(batch["trans"].shape[-1] == 3 + 5 + 2 + 3 + 1 + base_action_size(env) + 2 for batch in batches)
    collector.shutdown()


def base_action_size(env):
    return env.transform[1].action_size


class Pictures(gymnasium.Env):
    """Shows an image in bytes beside a place."""

    action_space = spaces.Discrete(3)

    def __init__(self, shape):
        self.observation_space = spaces.Dict(pixels=spaces.Box(0, 255, shape, np.uint8), place=spaces.Box(-1, 1, (2,)))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observed(), {}

    def observed(self):
        shape = self.observation_space["pixels"].shape
        return {"pixels": self.np_random.integers(0, 256, shape, np.uint8), "place": np.float32([self.steps / 5, 0])}

    def step(self, action):
        self.steps += 1
        return self.observed(), float(action), False, self.steps >= 5, {}


@pytest.mark.parametrize("shape", [(3, 11, 9), (11, 9, 3)], ids=["channels first", "channels last"])
def test_images_are_kept_in_bytes_and_read_by_convolutions(shape):
    env = TransformedEnv(GymVectorEnv(lambda: Pictures(shape), 3, seed=0), Compose(Trial(episodes=2), PreviousStep()))
    check_trial_env(env, task_key=None)
    actor, critic = RecurrentActor.from_env(env), GRUValueHead.from_env(env)
    for network in (actor, critic):
        [first, _] = [layer for layer in network.modules() if isinstance(layer, torch.nn.Conv2d)]
        assert first.in_channels == 3
    collector = TrialCollector(env, ActorCritic(actor, critic), frames_per_batch=30, total_frames=30)
    [batch] = list(collector)
    assert (batch["pixels"].dtype, batch["pixels"].shape) == (torch.uint8, (3, 10, *shape))
    assert batch["trans"].shape[-1] == 2 + 3 + 2  # place, action, reward and done
    read = batch.clone()
    with torch.no_grad(), set_recurrent_mode(True):
        before = actor(read)["logits"].clone()
        read["pixels"][1, 4] = 255 - read["pixels"][1, 4]
        changed = (actor(read)["logits"] != before).any(-1)
    assert changed.tolist() == [[False] * 10, [False] * 4 + [True] * 6, [False] * 10]  # from then on, in memory too


class Mission(spaces.Space):
    """Words of an env's own, as MiniGrid's, for which Gymnasium has no shared memory."""

    def __init__(self):
        super().__init__((), str)

    def sample(self, mask=None, probability=None):
        return "go"

    def contains(self, x):
        return isinstance(x, str)

    def __eq__(self, other):
        return isinstance(other, Mission)


class Told(gymnasium.Env):
    observation_space = spaces.Dict(place=spaces.Box(-9, 9, (1,)), mission=Mission())
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.random()
        return self.seen(), {}

    def step(self, action):
        self.place += 2 * action - 1
        return self.seen(), self.place, abs(self.place) > 2, False, {}

    def seen(self):
        return {"place": np.array([self.place], np.float32), "mission": "go"}


def test_words_of_an_envs_own_are_left_out_in_processes_too():
    batches = []
    for vectorization in ("sync", "async"):
        env = GymVectorEnv(Told, 3, vectorization=vectorization)
        env = TransformedEnv(env, Compose(Trial(episodes=2), PreviousStep()))
        env.set_seed(0)
        torch.manual_seed(0)
        batches.append(env.rollout(20, break_when_any_done=False))
        env.close()
    assert batches[0]["next", "episode_done"].sum() > 3
    assert_close(*batches)


def test_of_what_torchrls_gym_env_cannot_show_the_way_to_show_it_is_told():
    with pytest.raises(KeyError, match="No conversion tool") as told:
        GymTaskEnv(Told, set_task=lambda env, task: None, task_spec=Unbounded(1))
    assert any("GymVectorEnv(make_env, num_envs, ...) may" in note for note in told.value.__notes__)
