"""`check_trial_env` finds nothing wrong in the envs of this package, in all forms."""

import itertools

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from line_envs import FORMS, Hidden, set_goal, theirs, trials
from rollouts import make_env
from torchrl.collectors import Collector
from torchrl.data import Categorical, Unbounded
from torchrl.envs import SerialEnv

from rl2_torchrl import GRUCategoricalActor, TrialCollector
from rl2_torchrl.envs import GymTaskEnv, GymVectorEnv, TensorEnv, uniform_means
from rl2_torchrl.testing import check_trial_env


@pytest.mark.parametrize("name", ["cart pole", "cart pole without tasks", "pendulum", "pendulum in processes"])
def test_all_forms_of_vector_envs_pass(name):
    env = FORMS[name]()
    check_trial_env(env, task_key=None if "without" in name else "task")
    env.close()


@pytest.mark.parametrize("mode", [AutoresetMode.DISABLED, AutoresetMode.SAME_STEP])
def test_vector_envs_of_ones_own_pass(mode):
    check_trial_env(trials(theirs(mode, make=Hidden)))


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_tasks_by_an_option_pass(vectorization):
    env = trials(
        GymVectorEnv(Hidden, 4, seed=0, vectorization=vectorization, task_option="goal", task_spec=Unbounded(1))
    )
    check_trial_env(env)
    env.close()


def test_a_list_of_tasks_passes():
    def numbers(batch_size, generator):
        return torch.randint(4, batch_size, generator=generator)

    def set_task(env, task):
        env.goal = task

    check_trial_env(trials(GymVectorEnv(Hidden, 4, set_task=set_task, tasks=[1.0, 2.0, 3.0, 4.0], seed=0), numbers))


class Drifting(TensorEnv):
    """A place that moves on by the task, one of three choices."""

    def __init__(self, **options):
        spec = Unbounded(1)
        super().__init__(
            task_spec=Categorical(3), observation_spec=spec, action_spec=Categorical(2), max_episode_steps=3, **options
        )

    def begin(self, task, rows):
        return {"task": task, "place": torch.zeros(*task.shape, 1)}, torch.zeros(*task.shape, 1)

    def advance(self, state, action):
        place = state["place"] + (state["task"] + action).unsqueeze(-1)
        return {"task": state["task"], "place": place}, place, place, None, None


def test_one_env_without_a_batch_whose_task_is_a_choice_passes():
    check_trial_env(
        trials(Drifting(seed=0), lambda batch_size, generator: torch.randint(3, batch_size, generator=generator))
    )


class HalfPaid(TensorEnv):
    """What it pays is float64 where that is PyTorch's default, and no number of float32."""

    def __init__(self, rows=4):
        specs = {"task_spec": Unbounded(1), "observation_spec": Unbounded(1), "action_spec": Categorical(2)}
        specs["reward_spec"] = Unbounded(1, dtype=torch.get_default_dtype())
        super().__init__(**specs, max_episode_steps=3, batch_size=(rows,), seed=0)

    def begin(self, task, rows):
        return task, torch.zeros_like(task)

    def advance(self, state, action):
        return state, state, 0.1 + action.unsqueeze(-1) / 3 + state, None, None


@pytest.fixture
def _doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("_doubles")
@pytest.mark.parametrize("collector", [TrialCollector, Collector])
def test_trials_are_as_their_specs_say_under_another_default_dtype(collector):
    env = trials(HalfPaid(), uniform_means(1))
    check_trial_env(env)
    actor = GRUCategoricalActor.from_env(env, hidden_size=4)
    sizes = {"frames_per_batch": 4 * 6, "total_frames": -1, "auto_register_policy_transforms": True}
    [batch] = itertools.islice(collector(env, actor, **sizes), 1)
    assert batch["time_left"].dtype == torch.float32
    paid, shown = batch["next", "reward"][:, :-1, 0], batch["trans"][:, 1:, -2]
    went_on = ~batch["is_init"][:, 1:, 0]
    assert torch.equal(shown[went_on], paid[went_on])


class Speaks(Hidden):
    observation_space = spaces.Dict(place=spaces.Box(-np.inf, np.inf, (3,)), says=spaces.Text(5))

    def observed(self):
        return {"place": super().observed().astype(np.float32), "says": "a" * (1 + self.steps % 3)}


@pytest.mark.parametrize("rows", [None, 3])
def test_text_that_an_env_observes_passes(rows):
    def make():
        return GymTaskEnv(Speaks, set_task=set_goal, task_spec=Unbounded(1))

    check_trial_env(trials(make() if rows is None else SerialEnv(rows, make)))


#: Those of the package's own classes are checked beside each class, and in test_testing.py.
@pytest.mark.parametrize("name", ["guess 2x3", "pendulum", "cart pole", "walk", "rooms", "one-hot rooms", "doubled"])
def test_the_envs_of_other_tests_pass(name):
    check_trial_env(make_env(name, steps=15))
