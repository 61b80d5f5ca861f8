"""`check_trial_env` finds nothing wrong in the envs of this package, in all forms."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from line_envs import FORMS, Hidden, set_goal, theirs, trials
from rollouts import make_env
from torchrl.data import Unbounded
from torchrl.envs import SerialEnv

from rl2_torchrl.envs import GymTaskEnv, GymVectorEnv
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
