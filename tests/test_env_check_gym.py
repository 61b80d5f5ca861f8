"""`check_trial_env` on Gymnasium envs, vector envs and workers that are broken."""

import numpy as np
import pytest
import torch
from env_check_cases import (
    ROWS,
    BeginsAll,
    Doubles,
    NeverEnds,
    NeverHears,
    OneBefore,
    ShowsTask,
    Sound,
    drifts,
    trial_env,
)
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from line_envs import Hidden, Line, goals, set_goal, set_goals, trials
from tensordict import TensorDict
from torchrl.data import Unbounded
from torchrl.envs import Compose, SerialEnv, TransformedEnv

from rl2_torchrl import PreviousStep, TaskSampler, Trial
from rl2_torchrl.env_check import EnvBelow
from rl2_torchrl.env_check.rows import rows_go_on
from rl2_torchrl.envs import GymTaskEnv, GymVectorEnv
from rl2_torchrl.envs.task_setter import _warn_of_drift
from rl2_torchrl.testing import TrialContractError, check_trial_env


def misspelt(env, task):
    env.gaol = task.item()


def first_only(env, task):
    env.goal = task.item() if env.resets == 0 else env.goal


def on_the_class(env, task):
    env.__dict__.pop("goal", None)
    type(env).goal = task.item()


def one_before(env, task):
    env.goal, env.following = vars(env).get("following", 3.0), task.item()


def drifting(env, task):
    env.goal = (env.goal + task.item()) % 7  # stays within the line


class OwnGoal(Hidden):
    def reset(self, **kwargs):
        seen = super().reset(**kwargs)
        self.goal = self.np_random.integers(1, 6)
        return seen


@pytest.mark.parametrize(
    ("make", "set_task", "rule", "message"),
    [
        (
            Hidden,
            misspelt,
            "task_heard",
            "8 tasks made no difference to anything",
        ),
        (Hidden, first_only, "task_heard", "8 tasks made no difference to anything in 30 steps of random actions. All"),
        (OwnGoal, set_goal, "task_heard", "8 tasks made no difference .* set the task in each reset"),
        (type("Fresh", (Hidden,), {}), on_the_class, "task_own", "not on the class"),
        (Hidden, one_before, "task_own", "not the one before"),
        (Hidden, drifting, "seed_repeats", "differ after . steps.* not from what the last task left"),
    ],
)
def test_a_task_that_does_not_reach_its_row_is_told(make, set_task, rule, message):
    env = GymVectorEnv(make, 4, set_task=set_task, task_spec=Unbounded(1), seed=0)
    with pytest.raises(TrialContractError, match=message) as raised:
        check_trial_env(trials(env))
    assert raised.value.rule == rule


ALONE = {
    "vector": lambda set_task: GymVectorEnv(Hidden, 4, set_task=set_task, task_spec=Unbounded(1)),
    "processes": lambda set_task: GymVectorEnv(
        Hidden, 2, set_task=set_task, task_spec=Unbounded(1), vectorization="async"
    ),
    "single": lambda set_task: GymTaskEnv(Hidden, set_task=set_task, task_spec=Unbounded(1)),
}


@pytest.mark.parametrize("kind", ALONE)
def test_a_misspelt_attribute_is_told_once_at_the_first_reset(kind, told):
    for set_task, said in ((set_goal, 0), (misspelt, 1)):
        env = TransformedEnv(ALONE[kind](set_task), Compose(Trial(2), TaskSampler(goals, seed=1)))
        env.reset()
        assert len(told) == said
        env.reset()
        assert len(told) == said
        env.close()
    assert told[0].startswith("set_task gave the env ['gaol'], which it did not have before: misspelt? Or a wrapper's?")


def scaled(env, task):
    env.goal = 0.5 * env.goal + task.item()


@pytest.mark.parametrize("kind", ["vector", "single"])
def test_tasks_that_drift_are_told_of_once(kind, told):
    _warn_of_drift.cache_clear()
    for set_task, said in ((set_goal, 0), (scaled, 1)):
        env = TransformedEnv(ALONE[kind](set_task), Compose(Trial(2), TaskSampler(goals, seed=1), PreviousStep()))
        env.rollout(20, break_when_any_done=False)
        assert len(told) == said
        env.close()
    assert "other numbers in the env the second time: ['goal']" in told[0]


def grown(env, task):
    env.goal *= task.item()


@pytest.mark.parametrize(
    ("episodes", "tasks"), [(99, [1.0, 1.0, 2.0, 1.0]), (2, [1.0] * 4 + [2.0] * 4)], ids=["in a row", "in a trial"]
)
def test_a_task_that_changes_nothing_hides_no_drift(episodes, tasks, told):
    _warn_of_drift.cache_clear()
    env = ALONE["vector"](grown)
    for row in env.envs.envs:
        row.unwrapped.goal = 1.0
    sampler = TaskSampler.fixed(torch.tensor(tasks).unsqueeze(-1))
    env = TransformedEnv(env, Compose(Trial(episodes), sampler, PreviousStep()))
    env.rollout(30, break_when_any_done=False)
    assert len(told) == 1


def heavier(env, task):
    env.model.body_mass[-1] *= task.item()


def test_masses_that_drift_are_told_of(told):
    pytest.importorskip("mujoco")
    _warn_of_drift.cache_clear()
    env = GymTaskEnv("InvertedPendulum-v5", set_task=heavier, task_spec=Unbounded(1))
    for task in (2.0, 3.0, 3.0):
        env.reset(TensorDict({"task": torch.tensor([task])}))
    assert len(told) == 1
    assert "the second time: ['model']" in told[0]


class OwnSeed(Hidden):
    def reset(self, *, seed=None, options=None):
        super().reset(seed=3 if self.resets == 0 else None)
        return self.observed(), {}


def test_envs_that_seed_themselves_alike_are_told():
    with pytest.raises(TrialContractError, match="drew the same random numbers") as raised:
        check_trial_env(trials(GymVectorEnv(OwnSeed, 4, set_task=set_goal, task_spec=Unbounded(1))))
    assert raised.value.rule == "rows_draw_apart"


class Endless(Hidden):
    def step(self, action):
        observation, reward, *_, info = super().step(action)
        return observation, reward, False, False, info


@pytest.mark.parametrize(("make", "rule"), [(Endless, "trials_end"), (Line, "task_hidden")])
def test_faults_of_a_gymnasium_env_are_told(make, rule):
    with pytest.raises(TrialContractError) as raised:
        check_trial_env(trials(GymVectorEnv(make, 4, set_task=set_goal, task_spec=Unbounded(1), seed=0)), max_steps=100)
    assert raised.value.rule == rule


class OneBuffer(Hidden):
    """Observes in float64, in the same memory at every step."""

    def observed(self):
        self.buffer = vars(self).get("buffer", np.zeros(3))
        self.buffer[:] = super().observed()
        return self.buffer


def test_what_gymnasium_envs_may_do_with_their_observations_is_mended_on_the_way():
    check_trial_env(trials(GymVectorEnv(OneBuffer, 4, set_task=set_goal, task_spec=Unbounded(1), seed=0)))


class Column(SyncVectorEnv):
    def step(self, actions):
        observations, reward, *rest = super().step(actions)
        return observations, reward[:, None], *rest


def test_a_vector_env_with_a_column_of_rewards_is_told():
    envs = Column([Hidden] * 4, autoreset_mode=AutoresetMode.DISABLED)
    env = GymVectorEnv(envs, set_task=set_goals, task_spec=Unbounded(1), seed=0)
    with pytest.raises(TrialContractError, match=r"gives rewards of shape \(4, 1\); they must be \(4,\)") as raised:
        check_trial_env(trials(env, goals))
    assert raised.value.rule == "specs"


class SharedDraws(Sound):
    """Rows that draw in turn from one generator, so that where others begin a row goes on with other numbers."""

    def _set_seed(self, seed):
        self.generator = np.random.default_rng(seed)

    def noise(self, rows):
        drawn = torch.zeros(rows.shape)
        drawn[rows] = torch.tensor(self.generator.random(int(rows.sum())), dtype=torch.float32)
        return drawn


def test_rows_that_draw_from_one_generator_do_not_pass_for_begun():
    below = EnvBelow(SharedDraws(), [drifts(torch.Size([ROWS]), None)] * 2, "task", None)
    assert rows_go_on(below) is None


class TwinWorkers(SerialEnv):
    """Seeds its workers all alike."""

    def set_seed(self, seed=None, static_seed=False):
        return super().set_seed(seed, static_seed=True)


def test_workers_with_the_same_seed_are_told():
    workers = TwinWorkers(2, lambda: Sound(1))
    workers.set_seed(0)
    with pytest.raises(TrialContractError, match="rows 0 and 1 drew the same") as raised:
        check_trial_env(trial_env(workers))
    assert raised.value.rule == "rows_draw_apart"


class FirstOnly(Sound):
    """Hears its first task alone, also as the only row of a worker."""

    def hear(self, rows, task):
        self.resets = self.__dict__.get("resets", 0) + 1
        if self.resets <= 3:  # the first two are TorchRL's own, to look at the env
            super().hear(rows, task)


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (NeverHears, "task_heard"),
        (FirstOnly, "task_heard"),
        (OneBefore, "task_own"),
        (Doubles, "float32"),
        (NeverEnds, "trials_end"),
        (ShowsTask, "task_hidden"),
    ],
)
def test_faults_within_workers_are_told(make, rule):
    workers = SerialEnv(2, lambda: make(1))
    workers.set_seed(0)
    with pytest.raises(TrialContractError) as raised:
        check_trial_env(trial_env(workers), max_steps=100)
    assert raised.value.rule == rule


def test_workers_of_several_rows_that_begin_all_are_told():
    workers = SerialEnv(2, lambda: BeginsAll(2))
    workers.set_seed(0)
    with pytest.raises(TrialContractError) as raised:
        check_trial_env(trial_env(workers), max_steps=100)
    assert raised.value.rule == "rows_go_on"
