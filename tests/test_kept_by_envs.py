"""What transforms and task distributions keep beside buffers goes on in a resumed run."""

import copy
import shutil
from functools import partial
from types import MethodType

import pytest
import torch
from runs import Run, saved_steps
from torchrl.data import Categorical, Unbounded
from torchrl.envs import (
    Compose,
    RandomTruncationTransform,
    SerialEnv,
    StepCounter,
    Transform,
    TransformedEnv,
)
from torchrl.envs.transforms import Timer

from rl2_torchrl import (
    ActorCritic,
    Callback,
    GRUCategoricalActor,
    GRUValueHead,
    PPOUpdate,
    PreviousStep,
    RL2PPOLoss,
    TaskSampler,
    Trial,
    TrialCollector,
    train,
)
from rl2_torchrl.envs import BernoulliBandit, TensorEnv, uniform_means
from rl2_torchrl.kept import Kept


class Keeps(Transform):
    """Pays by what it keeps: a number, a tensor that is there from the first step on, and a buffer."""

    def __init__(self, weight=0.5):
        super().__init__()
        self.steps, self.weight, self._mean = 0, torch.tensor([weight]), None
        self.register_buffer("total", torch.zeros(()))

    def _step(self, tensordict, next_tensordict):
        reward = next_tensordict["reward"]
        self._mean = reward if self._mean is None else self._mean + self.weight * (reward - self._mean)
        self.steps += 1
        self.total += reward.sum()
        return next_tensordict.set("reward", reward - self._mean)


def test_what_a_transform_keeps_goes_on(tmp_path):
    def run_of(updates, **options):
        run = Run(updates, transforms=[keeps := Keeps()])
        run.train(checkpoints=tmp_path, check=False, **options)
        return keeps.steps, keeps.total.item(), keeps._mean, run.everything()

    run_of(2)
    resumed = run_of(4, resume=True)
    shutil.rmtree(tmp_path)
    torch.testing.assert_close(resumed, run_of(4), rtol=0, atol=0)


@pytest.mark.parametrize("base", ["below Trial", "a SerialEnv's rows"])
def test_what_transforms_of_the_env_below_keep_goes_on(base, tmp_path):
    """Beside TorchRL's own, which draws a horizon for each episode."""

    def make():
        below = [Keeps(), StepCounter(), RandomTruncationTransform(min_horizon=2, max_horizon=5, prob=1.0)]
        if base == "below Trial":
            env = TransformedEnv(BernoulliBandit(3, batch_size=(2,), seed=0), Compose(*below))
        else:
            env = SerialEnv(
                2,
                [
                    lambda n=n: TransformedEnv(BernoulliBandit(3, seed=n), Compose(*map(copy.deepcopy, below)))
                    for n in (0, 1)
                ],
            )
        trial = Compose(Trial(episodes=3, steps=9), TaskSampler(uniform_means(3), seed=0), PreviousStep())
        return TransformedEnv(env, trial, auto_unwrap=False)

    def run_of(updates, **options):
        torch.manual_seed(0)
        env = make()
        actor, critic = (kind.from_env(env, hidden_size=4) for kind in (GRUCategoricalActor, GRUValueHead))
        update = PPOUpdate(RL2PPOLoss(actor, critic), epochs=1, minibatches=1, bptt=7)
        frames = {"frames_per_batch": 14, "total_frames": 14 * updates}
        collector = TrialCollector(env, ActorCritic(actor, critic), **frames)
        result = train(collector, update, evaluate=None, checkpoints=tmp_path, progress=False, check=False, **options)
        assert not result.new_trials
        return update.loss.state_dict()

    run_of(6, stop=lambda row: row["env_steps"] == 42)
    resumed = run_of(6, resume=True)
    shutil.rmtree(tmp_path)
    torch.testing.assert_close(resumed, run_of(6), rtol=0, atol=0)


def test_a_constant_of_a_transform_is_the_one_that_is_given(tmp_path):
    Run(2, transforms=[Keeps()]).train(checkpoints=tmp_path)
    run = Run(4, transforms=[keeps := Keeps(weight=0.25)])
    run.train(checkpoints=tmp_path, resume=True)
    assert keeps.weight.item() == 0.25


class Harder:
    """A task distribution without a state that something else moves."""

    level = 0.0

    def __call__(self, batch_size, generator):
        return self.level + 0.1 * torch.rand(*batch_size, 3, generator=generator)


class Raises(Callback):
    def __init__(self, tasks):
        self.tasks = tasks

    def after_update(self, row, progress):
        self.tasks.level += 0.2


def test_tasks_that_get_harder_go_on(tmp_path):
    def run_of(updates, **options):
        run = Run(updates)
        run.sampler.distribution = tasks = Harder()
        run.train(checkpoints=tmp_path, check=False, callbacks=[Raises(tasks)], **options)
        return tasks.level, run.everything()

    run_of(2)
    resumed = run_of(4, resume=True)
    shutil.rmtree(tmp_path)
    torch.testing.assert_close(resumed, run_of(4), rtol=0, atol=0)


def easy(level, batch_size, generator):
    return level + 0.1 * torch.rand(*batch_size, 3, generator=generator)


class Stage:
    def __init__(self):
        self.level = 0.0

    def sample(self, batch_size, generator):
        return easy(self.level, batch_size, generator)

    def raised(self):
        self.level += 0.2


class StatefulStage(Stage):
    def state_dict(self):
        return {"level": self.level}

    def load_state_dict(self, state):
        self.level = state["level"]


def of_a_method(stage, **given):
    stage = stage()
    return partial(stage.sample, **given), stage.raised


class Calls(Callback):
    def __init__(self, function):
        self.function = function

    def after_update(self, row, progress):
        self.function()


class ByClass(Stage):
    level = 0.0

    @classmethod
    def sample(cls, batch_size, generator):
        return easy(cls.level, batch_size, generator)

    def state_dict(self):
        raise AssertionError("of an object, which there is none of")


def of_attributes():
    def tasks(batch_size, generator):
        return easy(tasks.level, batch_size, generator)

    def harder():
        tasks.level += 0.2

    tasks.level = 0.0
    return tasks, harder


@pytest.mark.parametrize("make", [lambda: of_a_method(Stage), lambda: of_a_method(StatefulStage), of_attributes])
def test_tasks_of_methods_and_attributes_that_get_harder_go_on(make, tmp_path):
    def run_of(updates, **options):
        run, (tasks, harder) = Run(updates), make()
        run.sampler.distribution = tasks
        run.train(checkpoints=tmp_path, check=False, callbacks=[Calls(harder)], **options)
        return tasks(torch.Size([1]), torch.Generator().manual_seed(0)), run.everything()

    run_of(2)
    resumed = run_of(4, resume=True)
    shutil.rmtree(tmp_path)
    torch.testing.assert_close(resumed, run_of(4), rtol=0, atol=0)


class Draws(BernoulliBandit):
    def draw(self, batch_size, generator):
        return torch.rand(*batch_size, 3, generator=generator)


@pytest.mark.parametrize(
    "make",
    [
        lambda run: ByClass.sample,
        lambda run: partial(Harder()),
        lambda run: run.bandit.draw,
        lambda run: MethodType(Draws.draw, run.sampler),  # of what holds it
    ],
)
def test_other_forms_of_distributions_are_saved(make, tmp_path):
    run = Run(2, env=Draws(3, batch_size=(2,), seed=2), rows=2)
    run.sampler.distribution = make(run)
    run.train(checkpoints=tmp_path, check=False)
    assert saved_steps(tmp_path)


def test_another_distribution_is_told_of_once(tmp_path, caplog):
    run = Run(4)
    run.sampler.distribution = Harder()  # before the training: as it is given
    run.train(checkpoints=tmp_path, checkpoint_interval=1, check=False)
    assert "cannot hold it" not in caplog.text
    run = Run(4)
    other = Calls(lambda: setattr(run.sampler, "distribution", Harder()) if run.sampler.distribution is first else None)
    first = run.sampler.distribution
    run.train(checkpoints=tmp_path / "other", checkpoint_interval=1, check=False, callbacks=[other])
    assert (
        caplog.text.count("env.TaskSampler.distribution changes in the training, and checkpoints cannot hold it") == 1
    )


class Waves(TensorEnv):
    """Pays the task and noise, whose size is an attribute of its own."""

    def __init__(self, rows):
        spaces = {"task_spec": Unbounded(1), "observation_spec": Unbounded(1), "action_spec": Categorical(3)}
        super().__init__(**spaces, max_episode_steps=2, batch_size=(rows,), seed=0)
        self.noise, self.table = 1.0, torch.zeros(1000)  # too large to be looked at

    def begin(self, task, rows):
        return task, task.clone()

    def advance(self, state, action):
        noise = self.noise * torch.randn(state.shape, generator=self.generator)
        return state, noise, state + noise, None, None


def test_numbers_of_an_env_of_ones_own_go_on(tmp_path):
    def run_of(updates, **options):
        tasks = TaskSampler(lambda size, generator: torch.rand(*size, 1, generator=generator), seed=0)
        env = TransformedEnv(waves := Waves(2), Compose(Trial(episodes=2), tasks, PreviousStep()))
        torch.manual_seed(0)
        actor, critic = (kind.from_env(env, hidden_size=4) for kind in (GRUCategoricalActor, GRUValueHead))
        update = PPOUpdate(RL2PPOLoss(actor, critic), epochs=1, minibatches=1)
        frames = {"frames_per_batch": 8, "total_frames": 8 * updates}
        collector = TrialCollector(env, ActorCritic(actor, critic), keep=update.in_keys, **frames)
        calmer = Calls(lambda: setattr(waves, "noise", 0.5 * waves.noise))
        options |= {"evaluate": None, "checkpoints": tmp_path, "progress": False, "check": False}
        train(collector, update, callbacks=[calmer], **options)
        return waves.noise, update.loss.state_dict()

    run_of(2)
    resumed = run_of(4, resume=True)
    shutil.rmtree(tmp_path)
    torch.testing.assert_close(resumed, run_of(4), rtol=0, atol=0)
    assert resumed[0] == 0.0625


class Curriculum(TaskSampler):
    """What it adds is not in the state of the class that it derives from."""

    level = 0.0

    def _sample(self, batch_size, spec):
        self.level += 0.01
        return self.level + 0.1 * super()._sample(batch_size, spec)


def test_what_rows_keep_begins_anew_with_other_rows(tmp_path):
    def run_of(rows, updates, **options):
        below = Compose(Keeps(), StepCounter(), RandomTruncationTransform(min_horizon=2, max_horizon=5, prob=1.0))
        base = TransformedEnv(BernoulliBandit(3, batch_size=(rows,), seed=0), below)
        trial = Compose(Trial(episodes=3, steps=9), TaskSampler(uniform_means(3), seed=0), PreviousStep())
        env = TransformedEnv(base, trial, auto_unwrap=False)
        actor, critic = (kind.from_env(env, hidden_size=4) for kind in (GRUCategoricalActor, GRUValueHead))
        frames = {"frames_per_batch": 7 * rows, "total_frames": 28 * updates}
        collector = TrialCollector(env, ActorCritic(actor, critic), **frames)
        update = PPOUpdate(RL2PPOLoss(actor, critic), epochs=1, minibatches=1, bptt=7)
        return train(collector, update, evaluate=None, checkpoints=tmp_path, progress=False, check=False, **options)

    run_of(2, 1)
    changes = ["env.observation", "env.action", "env.state", "collector.frames_per_batch"]
    result = run_of(4, 2, resume=True, resume_changes=changes)
    assert result.new_trials == [(28, "settings of the env have changed")]


def test_what_a_librarys_transform_keeps_of_its_rows_is_kept():
    kept = Kept({"bound": (bound := RandomTruncationTransform(min_horizon=2, max_horizon=5))})
    bound._horizons = torch.tensor([3, 4])
    assert list(kept.state_dict()["bound"]) == ["_horizons"]


def test_the_time_of_day_is_nothing_to_go_on_with():
    kept = Kept({"timer": (timer := Timer())})
    timer.last_inv_time = 3.0
    assert kept.state_dict() == {}


def test_what_a_class_below_ours_adds_goes_on(tmp_path):
    def run_of(updates, **options):
        bandit = BernoulliBandit(3, batch_size=(2,), seed=0)
        sampler = Curriculum(uniform_means(3), seed=0)
        env = TransformedEnv(bandit, Compose(Trial(episodes=3), sampler, PreviousStep()))
        actor, critic = (kind.from_env(env, hidden_size=4) for kind in (GRUCategoricalActor, GRUValueHead))
        collector = TrialCollector(env, ActorCritic(actor, critic), frames_per_batch=12, total_frames=12 * updates)
        update = PPOUpdate(RL2PPOLoss(actor, critic), epochs=1, minibatches=1)
        train(collector, update, evaluate=None, checkpoints=tmp_path, progress=False, check=False, **options)
        return sampler.level

    run_of(2)
    assert run_of(4, resume=True) > 0.05
    resumed = run_of(5, resume=True)
    shutil.rmtree(tmp_path)
    assert resumed == run_of(5)
