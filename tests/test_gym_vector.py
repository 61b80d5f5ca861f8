import multiprocessing
import os
import signal

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import Bounded, Categorical, Composite, MultiCategorical, Unbounded
from torchrl.envs import Compose, TransformedEnv

from rl2_torchrl import (
    ActorCritic,
    GRUValueHead,
    PreviousStep,
    RecurrentActor,
    TaskSampler,
    Trial,
    TrialCollector,
    adaptation_curve,
)
from rl2_torchrl.envs import GymVectorEnv
from rl2_torchrl.testing import check_trial_env


class Counter(gymnasium.Env):
    """Shows (task, steps, noise); an episode ends after ``task`` steps, or is truncated after 5."""

    def __init__(self, action_space=None):
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
        self.action_space = action_space or spaces.Discrete(2)
        self.task, self.actions, self.fails_at = 2, [], None

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.task, self.steps = (options or {}).get("length", self.task), 0
        self.task = int(np.asarray(self.task).item())
        return self._seen(), {"resets": 1}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.actions.append(action)
        self.steps += 1
        if self.steps == self.fails_at:
            raise ArithmeticError("the env is broken")
        info = {"success": self.steps == 2, "steps": self.steps}
        return self._seen(), float(self.steps), self.steps >= self.task, self.steps >= 5, info

    def _seen(self):
        return np.array([self.task, self.steps, self.np_random.random()])


def set_length(env, task):
    env.task = int(task.item())


def lengths(batch_size, generator):
    return torch.randint(1, 9, (*batch_size, 1), generator=generator).float()


def counters(rows=3, seed=0, **kwargs):
    options = {
        "set_task": set_length,
        "task_spec": Unbounded(1),
        "seed": seed,
        "info_keys": ["success", "steps"],
        **kwargs,
    }
    return GymVectorEnv(Counter, rows, **options)


def trials(env, *tasks, **bounds):
    sampler = TaskSampler.fixed(torch.tensor(tasks).float().unsqueeze(-1)) if tasks else TaskSampler(lengths, seed=0)
    return TransformedEnv(env, Compose(Trial(**(bounds or {"episodes": 2})), sampler, PreviousStep()))


def vector_of(mode, kind=SyncVectorEnv, rows=3, make=Counter):
    return kind([make] * rows, autoreset_mode=mode)


def set_lengths(envs, task, rows):
    for n in rows.nonzero()[0]:
        envs.envs[n].task = int(task[n].item())


def batches_of(env, kind, number=3, **kwargs):
    torch.manual_seed(0)
    policy = ActorCritic(RecurrentActor.from_env(env, hidden_size=4), GRUValueHead.from_env(env, hidden_size=4))
    env.set_seed(3)
    torch.manual_seed(1)
    frames = {"frames_per_batch": 7 * env.batch_size.numel(), "total_frames": -1}
    collector = kind(env, policy, **frames, **kwargs)
    batches = [batch.clone() for batch, _ in zip(collector, range(number), strict=False)]
    collector.shutdown()
    return batches


# -------------------------------------------------------------------- episodes
def test_episodes_and_trials_by_hand():
    env = trials(counters(2), 2, 7)
    steps = env.rollout(10, break_when_any_done=False)
    shown, after = steps["observation"][..., :2], steps["next", "observation"][..., :2]
    # Row 0: episodes of two steps, row 1: truncated after five. Inside a trial the next observation is the new episode's first ...
    assert shown[0, :4].tolist() == [[2, 0], [2, 1], [2, 0], [2, 1]]
    assert after[0, 1].tolist() == [2, 0]
    # ... and at its end the episode's last.
    assert after[0, 3].tolist() == [2, 2]
    assert shown[1, :, 1].tolist() == [0, 1, 2, 3, 4] * 2
    assert after[1, 9].tolist() == [7, 5]
    assert steps["next", "reward"][1, :, 0].tolist() == [1, 2, 3, 4, 5] * 2
    assert steps["next", "episode_done"][0, :4, 0].tolist() == [False, True, False, True]
    assert steps["next", "done"][0, :4, 0].tolist() == [False, False, False, True]


def test_truncation_is_told_from_termination():
    env = counters(2)
    env.reset(TensorDict({"task": torch.tensor([[5.0], [9.0]])}, [2]))
    for _ in range(5):
        _, _, terminated, truncated = env.play(torch.zeros(2, dtype=torch.int64))
    assert terminated.flatten().tolist() == [True, False]
    assert truncated.flatten().tolist() == [True, True]


def test_what_an_env_says_beside_is_recorded_and_never_read():
    env = trials(counters(1), 3)
    steps = env.rollout(6, break_when_any_done=False)
    # At an episode's end the info is that of the step that ended it, not of the reset.
    assert steps["next", "info", "steps"].flatten().tolist() == [1, 2, 3, 1, 2, 3]
    assert steps["next", "info", "success"].flatten().tolist() == [0, 1, 0, 0, 1, 0]
    assert steps["trans"].shape[-1] == 3 + 2 + 2
    actor = RecurrentActor.from_env(env, hidden_size=4)
    curve = adaptation_curve(trials(counters(2), 1, 3), actor, 2, measures={("info", "success"): "max"})
    assert curve.measures["success"].returns.tolist() == [[0, 0], [1, 1]]
    assert curve.returns.tolist() == [[1, 1], [6, 6]]


@pytest.mark.parametrize("bounds", [{"episodes": 2}, {"steps": 4}, {"episodes": 2, "steps": 5}])
def test_batches_are_those_of_torchrls_collector(bounds):
    # Actions are a Gaussian's: categorical noise is drawn otherwise.
    def make():
        return trials(GymVectorEnv(lambda: Counter(spaces.Box(-1, 1, (2,))), 3, **options), **bounds)

    options = {"set_task": set_length, "task_spec": Unbounded(1), "seed": 0, "info_keys": ["steps"]}
    ours = batches_of(make(), TrialCollector)
    theirs = batches_of(make(), Collector, auto_register_policy_transforms=True)
    for one, other in zip(ours, theirs, strict=True):
        for key in [
            ("next", "done"),
            "is_init",
            "task",
            "observation",
            ("next", "observation"),
            ("next", "info", "steps"),
        ]:
            assert torch.equal(one[key], other[key]), key
        torch.testing.assert_close(one["trans"], other["trans"])
        torch.testing.assert_close(one["state_value"], other["state_value"], atol=1e-6, rtol=0)


def test_processes_play_what_one_process_plays():
    sync, processes = (batches_of(trials(counters(vectorization=how)), TrialCollector) for how in ("sync", "async"))
    for one, other in zip(sync, processes, strict=True):
        assert (one == other).all()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_contract(vectorization):
    def set_task(cartpole, task):
        cartpole.length = task.item()

    poles = GymVectorEnv("CartPole-v1", 3, set_task=set_task, task_spec=Unbounded(1), vectorization=vectorization)
    env = trials(poles)
    check_trial_env(env)
    env.close()


# ----------------------------------------------------------------------- tasks
def test_tasks_by_option_and_by_list_of_objects():
    by_option = GymVectorEnv(Counter, 2, task_option="length", task_spec=Unbounded(1))
    by_option.reset(TensorDict({"task": torch.tensor([[3.0], [4.0]])}, [2]))
    assert by_option.observation["observation"][:, 0].tolist() == [3, 4]
    objects = GymVectorEnv(
        Counter, 2, set_task=lambda env, task: setattr(env, "task", task["n"]), tasks=[{"n": 5}, {"n": 6}, {"n": 7}]
    )
    assert isinstance(objects.full_state_spec["task"], Categorical)
    for vectorization in ("sync", "async"):
        objects = GymVectorEnv(
            Counter,
            2,
            set_task=lambda env, task: setattr(env, "task", task["n"]),
            tasks=[{"n": 5}, {"n": 6}, {"n": 7}],
            vectorization=vectorization,
        )
        objects.reset(TensorDict({"task": torch.tensor([2, 0])}, [2]))
        assert objects.observation["observation"][:, 0].tolist() == [7, 5]
        objects.close()


def test_nested_tasks():
    def set_task(env, task):
        env.task = int(task["length"].item())

    spec = Composite(length=Unbounded(1), other=Unbounded(2))
    env = GymVectorEnv(Counter, 2, set_task=set_task, task_spec=spec)
    task = TensorDict({"length": torch.tensor([[3.0], [4.0]]), "other": torch.zeros(2, 2)}, [2])
    env.reset(TensorDict({"task": task}, [2]))
    assert env.observation["observation"][:, 0].tolist() == [3, 4]


def test_an_env_without_a_task():
    env = TransformedEnv(GymVectorEnv("CartPole-v1", 4), Compose(Trial(episodes=2), PreviousStep()))
    check_trial_env(env, task_key=None)
    assert all("task" not in batch.keys() for batch in batches_of(env, TrialCollector))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_spec": Unbounded(1)}, "how does a task reach the env"),
        ({"set_task": set_length, "task_option": "length", "task_spec": Unbounded(1)}, "how does a task reach the env"),
        ({"set_task": set_length}, "what is a task"),
        ({"task_option": "length", "tasks": [1, 2]}, "what is a task"),
        ({"num_envs": None}, "how many envs"),
        ({"vectorization": "threads"}, "choose 'sync' or 'async'"),
    ],
)
def test_half_of_a_task_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GymVectorEnv(Counter, **{"num_envs": 2, **options})


def test_options_of_make_are_for_ids_alone():
    with pytest.raises(TypeError, match="gymnasium.make's"):
        GymVectorEnv(Counter, 2, max_episode_steps=3)
    with pytest.raises(ValueError, match="one function makes one row"):
        GymVectorEnv([Counter, Counter], 3)
    assert GymVectorEnv([Counter, Counter]).batch_size == (2,)


# ----------------------------------------------------------------------- seeds
def test_seeds_repeat_a_run_and_rows_differ():
    def noise(seed):
        env = counters(3, seed=None)
        env.set_seed(seed)
        return trials(env).rollout(12, break_when_any_done=False)["observation"][..., 2]

    assert torch.equal(noise(1), noise(1))
    assert not torch.equal(noise(1), noise(2))
    assert noise(1).unique().numel() == 36  # no row repeats another's, nor an episode the one before


# ------------------------------------------------------------- user's vector envs
@pytest.mark.parametrize("mode", [AutoresetMode.DISABLED, AutoresetMode.SAME_STEP])
def test_a_vector_env_of_the_users(mode):
    env = GymVectorEnv(vector_of(mode), set_task=set_lengths, task_spec=Unbounded(1), info_keys=["steps"])
    ours, own = (trials(each, 2, 7, 3, 4).rollout(14, break_when_any_done=False) for each in (env, counters(3)))
    keys = [("next", "done"), ("next", "episode_done"), ("next", "reward"), ("next", "info", "steps"), "task"]
    for key in keys:
        assert torch.equal(ours[key], own[key]), key
    for key in ("observation", ("next", "observation")):
        assert torch.equal(ours[key][..., :2], own[key][..., :2])


def test_a_vector_env_that_resets_itself_is_not_reset_twice_inside_a_trial():
    resets = []

    class Told(Counter):
        def reset(self, **kwargs):
            resets.append(self)
            return super().reset(**kwargs)

    vector = vector_of(AutoresetMode.SAME_STEP, rows=1, make=Told)
    env = trials(GymVectorEnv(vector, set_task=set_lengths, task_spec=Unbounded(1)), 2, episodes=3)
    env.reset()
    resets.clear()
    env.rollout(4, auto_reset=False, tensordict=env.reset(), break_when_any_done=False)
    assert len(resets) == 1 + 2  # the first, and one after each of two episodes


def test_a_vector_env_that_resets_in_the_next_step_is_refused():
    with pytest.raises(ValueError, match="AutoresetMode.DISABLED"):
        GymVectorEnv(vector_of(AutoresetMode.NEXT_STEP))


def test_a_vector_env_that_resets_all_rows_is_refused():
    class Careless(SyncVectorEnv):
        def reset(self, *, seed=None, options=None):
            return super().reset(seed=seed)

    env = GymVectorEnv(vector_of(AutoresetMode.DISABLED, Careless), set_task=set_lengths, task_spec=Unbounded(1))
    with pytest.raises(RuntimeError, match="has reset rows that were to go on"):
        trials(env, 2, 7, 4).rollout(14, break_when_any_done=False)


def test_rewards_of_another_shape_are_refused():
    class Column(SyncVectorEnv):
        def step(self, actions):
            observation, reward, *rest = super().step(actions)
            return observation, reward[:, None], *rest

    env = GymVectorEnv(vector_of(AutoresetMode.DISABLED, Column))
    env.reset()
    with pytest.raises(ValueError, match="one number a row"):
        env.play(torch.zeros(3, dtype=torch.int64))


# ---------------------------------------------------------------------- faults
def test_numbers_that_are_not_finite_are_refused():
    class Broken(Counter):
        def step(self, action):
            observation, reward, *rest = super().step(action)
            return observation, np.nan if self.task == 4 else reward, *rest

    env = GymVectorEnv(Broken, 3, set_task=set_length, task_spec=Unbounded(1))
    env.reset(TensorDict({"task": torch.tensor([[2.0], [4.0], [3.0]])}, [3]))
    with pytest.raises(FloatingPointError, match=r"'reward' that is NaN or infinite, in rows \[1\]"):
        env.play(torch.zeros(3, dtype=torch.int64))


def test_a_dead_process_is_told_and_leaves_none_behind():
    env = counters(3, vectorization="async")
    env.reset(TensorDict({"task": torch.ones(3, 1)}, [3]))
    os.kill(env.envs.processes[1].pid, signal.SIGKILL)
    env.envs.processes[1].join()
    with pytest.raises(RuntimeError, match=r"the envs \[1\] have died"):
        env.play(torch.zeros(3, dtype=torch.int64))
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_an_env_that_fails_says_so_itself(vectorization):
    class Failing(Counter):
        def __init__(self):
            super().__init__()
            self.fails_at = 2

    env = GymVectorEnv(Failing, 2, vectorization=vectorization)
    env.reset()
    env.play(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ArithmeticError, match="the env is broken"):
        env.play(torch.zeros(2, dtype=torch.int64))
    assert not multiprocessing.active_children()


def test_closing_ends_the_processes():
    env = counters(2, vectorization="async")
    assert isinstance(env.envs, AsyncVectorEnv)
    assert len(multiprocessing.active_children()) == 2
    env.close()
    assert not multiprocessing.active_children()


# ---------------------------------------------------------------------- spaces
class Seen(gymnasium.Env):
    """Shows samples of a space."""

    def __init__(self, space, action_space=None):
        self.observation_space, self.action_space = space, action_space or spaces.Discrete(2)
        self.sampled, self.taken = [], []

    def reset(self, *, seed=None, options=None):
        self.observation_space.seed(0)
        return self._sample(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.taken.append(action)
        return self._sample(), 0.0, False, False, {}

    def _sample(self):
        self.sampled.append(self.observation_space.sample())
        return self.sampled[-1]


@pytest.mark.parametrize(
    ("space", "spec", "expected"),
    [
        (spaces.Box(-1, 1, (2, 3), np.float64), Unbounded((2, 3)), lambda x: x),
        (spaces.Box(-1, 1, ()), Unbounded(1), lambda x: [x]),
        (spaces.Box(0, 255, (4, 4, 3), np.uint8), Unbounded((4, 4, 3), dtype=torch.uint8), lambda x: x),
        (spaces.Box(0, 9, (2,), np.uint16), Unbounded((2,), dtype=torch.int64), lambda x: x),
        (spaces.Discrete(3, start=5), Categorical(3), lambda x: x - 5),
        (spaces.MultiDiscrete([3, 2], start=[1, 4]), MultiCategorical([3, 2]), lambda x: x - np.array([1, 4])),
        (spaces.MultiDiscrete([[3], [2]]), MultiCategorical([3, 2]), lambda x: x.flatten()),
        (spaces.MultiBinary([2, 2]), None, lambda x: x.flatten()),
    ],
)
def test_observations_by_space(space, spec, expected):
    env = GymVectorEnv(lambda: Seen(space), 1)
    seen = env.reset()["observation"]
    [row] = env.envs.envs
    assert spec is None or env.full_observation_spec_unbatched["observation"] == spec
    torch.testing.assert_close(seen[0], torch.as_tensor(np.array(expected(row.unwrapped.sampled[-1]))).to(seen.dtype))
    assert env.observation_spec["observation"].is_in(seen)


def test_nested_observations_and_text():
    place = spaces.Tuple((spaces.Discrete(3), spaces.Box(-1, 1, (2,))))
    space = spaces.Dict(place=place, deep=spaces.Dict(a=spaces.Discrete(2)), said=spaces.Text(4))
    env = GymVectorEnv(lambda: Seen(space), 2)
    seen = env.reset()
    assert seen["place", "1"].shape == (2, 2)
    assert seen["deep", "a"].shape == (2,)
    assert "said" not in seen.keys()
    whole = TransformedEnv(env, Compose(Trial(steps=4), PreviousStep()))
    assert whole.reset()["trans"].shape == (2, 3 + 2 + 2 + 2 + 2)


def test_spaces_that_cannot_be_are_refused():
    with pytest.raises(TypeError, match="no fixed size"):
        GymVectorEnv(lambda: Seen(spaces.Sequence(spaces.Discrete(2), stack=True)), 1)
    with pytest.raises(TypeError, match="no policy here has a distribution"):
        GymVectorEnv(lambda: Seen(spaces.Discrete(2), spaces.Tuple((spaces.Discrete(2),))), 1)
    with pytest.raises(ValueError, match="rename them"):
        GymVectorEnv(lambda: Seen(spaces.Dict(reward=spaces.Discrete(2))), 1)


@pytest.mark.parametrize(
    ("space", "action", "taken"),
    [
        (spaces.Discrete(3, start=4), torch.tensor([2]), 6),
        (spaces.MultiDiscrete([3, 2], start=[1, 4]), torch.tensor([[2, 0]]), [3, 4]),
        (spaces.MultiBinary(2), torch.tensor([[1, 0]], dtype=torch.int8), [1, 0]),
        (spaces.Box(-2, 2, (2,)), torch.tensor([[5.0, 1.0]]), [2.0, 1.0]),
        (spaces.Box(np.float32([-1, -np.inf]), np.float32([np.inf, 1])), torch.tensor([[-9.0, 9.0]]), [-1.0, 1.0]),
        (spaces.Box(-2, 2, ()), torch.tensor([[5.0]]), 2.0),
    ],
)
def test_actions_by_space(space, action, taken):
    env = GymVectorEnv(lambda: Seen(spaces.Discrete(2), space), 1)
    env.reset()
    env.play(action)
    [row] = env.envs.envs
    assert np.array_equal(row.unwrapped.taken[-1], taken)
    trial = TransformedEnv(env, Compose(Trial(steps=3), PreviousStep()))
    for batch in batches_of(trial, TrialCollector, number=2):
        assert batch["action_log_prob"].isfinite().all()


def test_a_clipped_action_keeps_its_own_log_probability():
    env = GymVectorEnv(lambda: Seen(spaces.Discrete(2), spaces.Box(-1e-3, 1e-3, (1,))), 2)
    assert isinstance(env.full_action_spec_unbatched["action"], Bounded)
    trial = TransformedEnv(env, Compose(Trial(steps=3), PreviousStep()))
    [batch] = batches_of(trial, TrialCollector, number=1)
    assert (batch["action"].abs() > 1e-3).any()  # as drawn, in the data
    normal = torch.distributions.Normal(batch["loc"], batch["scale"])
    torch.testing.assert_close(batch["action_log_prob"], normal.log_prob(batch["action"]).sum(-1))
    assert np.abs([row.unwrapped.taken for row in env.envs.envs]).max() <= 1e-3
