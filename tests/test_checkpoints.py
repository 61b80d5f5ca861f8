"""`train` on tiny real runs: checkpoints, exact resume, after Ctrl-C too, and numbers that are not finite."""

import ast
import logging
import multiprocessing
import os
import re
import shutil
import signal
from contextlib import ExitStack, suppress
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from runs import BATCH, ROWS, STEPS, Run, saved_steps, without_time
from tensordict import TensorDict
from torchrl.collectors import Collector, MultiSyncCollector
from torchrl.data import Unbounded
from torchrl.envs import Compose, RewardScaling, TransformedEnv
from torchrl.record.loggers import CSVLogger

from rl2_torchrl import (
    ActorCritic,
    Callback,
    GRUGaussianActor,
    GRUValueHead,
    MemoryValueHead,
    PPOUpdate,
    PreviousStep,
    RecurrentActor,
    RL2PPOLoss,
    TanhGaussianActions,
    TaskSampler,
    Trial,
    TrialAdvantage,
    TrialCollector,
    adaptation_curve,
    check_training,
    train,
)
from rl2_torchrl.checkpoints import _CollectorState
from rl2_torchrl.checks import TrainingReport
from rl2_torchrl.envs import BernoulliBandit, GymTaskEnv, GymVectorEnv, PointRobot, uniform_means
from rl2_torchrl.storage import load_tree


class Swing(Run):
    """Pendulum with changing gravity, an env that keeps state of its own."""

    def __init__(self, updates=3):
        torch.manual_seed(0)
        self.sampler = TaskSampler(lambda size, gen: 5 + 10 * torch.rand(*size, 1, generator=gen), seed=1)
        self.pendulum = GymTaskEnv("Pendulum-v1", set_task=set_gravity, task_spec=Unbounded((1,)))
        env = TransformedEnv(self.pendulum, Compose(Trial(steps=40), self.sampler, PreviousStep()))
        self.update = self.networks(env, GRUGaussianActor, 4, minibatches=1)
        options = {"frames_per_batch": STEPS, "total_frames": STEPS * updates}
        self.collector = Collector(env, self.policy, auto_register_policy_transforms=True, **options)


def set_gravity(env, task):
    env.g = float(task)


# ---- The run as a whole.


def test_a_seed_of_numpys_is_a_number(tmp_path):
    run = Run(1)
    run.sampler.seed(np.int64(3))
    run.train(checkpoints=tmp_path, check=False)
    assert saved_steps(tmp_path)


def test_a_run_of_several_processes_is_not_gone_on_with_by_one(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(PPOUpdate, "processes", 2)
        Run(1).train(checkpoints=tmp_path, check=False)
    with pytest.raises(ValueError, match="update.processes: 2 then, 1 now"):
        Run(2).train(checkpoints=tmp_path, check=False, resume=True)


def test_a_file_is_no_folder(tmp_path):
    Run(1).train(checkpoints=tmp_path, check=False)
    [file] = tmp_path.glob("checkpoint-*.safetensors")
    with pytest.raises(NotADirectoryError, match="name the folder that it lies in"):
        Run(2).train(checkpoints=file, resume=True)


def tasks_above(low, arms=(3,)):
    def tasks(batch_size, generator):
        return low + 0.5 * torch.rand(*batch_size, *(3,) * bool(arms), generator=generator)

    return tasks


class Means:
    def __init__(self, low):
        self.low, self._drawn = low, 0

    def draw(self, batch_size, generator):
        self._drawn += 1
        return self.low + 0.5 * torch.rand(*batch_size, 3, generator=generator)


def one_after_the_other():
    at = 0

    def tasks(batch_size, generator):
        nonlocal at
        at += 1
        return torch.full((*batch_size, 3), 1 / at)

    return tasks


def fixed(low):
    return TaskSampler.fixed(low + torch.arange(9).view(3, 3) / 18).distribution


@pytest.mark.parametrize(
    ("then", "now", "told"),
    [
        (
            tasks_above(0.0),
            tasks_above(0.5),
            r'distribution: {"tasks_above.*": {"low": 0.0}} then, .*{"low": 0.5}} now',
        ),
        (Means(0.0).draw, Means(0.5).draw, "distribution.low: 0.0 then, 0.5 now"),
        (fixed(0.0), fixed(0.5), "distribution.digest: .* then, .* now"),
        (tasks_above(0.5), tasks_above(0.5, arms=[3]), None),  # no number, which may be all that the program knows
        (
            tasks_above(0.5, arms="runs/1"),
            tasks_above(0.5, arms="runs/2"),
            None,
        ),  # each run may have a folder of its own
        (fixed(0.5), fixed(0.5), None),
        (one_after_the_other(), one_after_the_other(), None),
    ],
)
def test_a_run_is_not_resumed_on_other_tasks(then, now, told, tmp_path):
    def run(updates, tasks, **options):
        one = Run(updates)
        one.sampler.distribution = tasks
        return one.train(checkpoints=tmp_path, check=False, **options)

    run(1, then)
    changes = {}
    if told:
        with pytest.raises(ValueError, match=told) as error:
            run(2, now, resume=True)
        changes = {"resume_changes": re.findall(r"resume_changes=\['(.*?)'\]", str(error.value))}
    assert bool(run(2, now, resume=True, **changes).new_trials) == bool(told)


@pytest.mark.parametrize(("total", "updates"), [(3, 3), (2.5, 3)])
def test_total_frames_are_reached(total, updates):
    result = Run(total).train()
    assert result.env_steps == updates * BATCH
    assert len(result.history) == updates


def test_fewer_frames_than_a_batch():
    with pytest.raises(ValueError, match=f"total_frames={BATCH // 2} is less than one batch of {BATCH}"):
        Run(updates=0.5).train()


def test_evaluations_leave_training_as_it_is():
    blind = Run(updates=3)
    blind.train()
    watched = Run(updates=3)
    watched.train(evaluate=lambda: {"noise": torch.rand(()).item()}, eval_interval=1)
    torch.testing.assert_close(watched.everything(), blind.everything(), rtol=0, atol=0)


@pytest.mark.parametrize(("options", "checks"), [({}, 1), ({"check": False}, 0)])
def test_the_first_batch_is_checked_before_the_first_update(options, checks, monkeypatch, caplog):
    run, seen = Run(updates=2), []
    before = [parameter.clone() for parameter in run.update.loss.parameters()]

    def check_training(collector, update, batch):
        assert (collector, update) == (run.collector, run.update)
        torch.testing.assert_close(list(update.loss.parameters()), before, rtol=0, atol=0)
        torch.rand(7)  # what a check draws is put back
        seen.append(batch.numel())
        return TrainingReport(notes=["worth knowing"])

    monkeypatch.setattr("rl2_torchrl.training_loop.check_training", check_training)
    run.train(**options)
    assert seen == [BATCH] * checks
    assert caplog.text.count("of the first batch: worth knowing.") == checks
    unchecked = Run(updates=2)
    unchecked.train(check=False)
    torch.testing.assert_close(run.everything(), unchecked.everything(), rtol=0, atol=0)


# ---- Checkpoints.


@pytest.mark.parametrize(("updates", "interval", "kept"), [(5, 2, [4, 5]), (4, 2, [2, 4]), (2, 50, [2])])
def test_checkpoints_every_interval_and_at_the_end(tmp_path, updates, interval, kept):
    Run(updates).train(checkpoints=tmp_path, checkpoint_interval=interval)
    assert saved_steps(tmp_path) == [BATCH * number for number in kept]


@pytest.mark.parametrize(
    ("broken_after", "kind"),
    [(1, {}), (3, {}), (3, {"lean": True, "episodes": STEPS})],
    ids=["early", "in the middle of a trial", "TrialCollector"],
)
def test_resume_equals_an_unbroken_run(tmp_path, broken_after, kind):
    options = {"evaluate": lambda: {"noise": torch.rand(()).item()}, "eval_interval": 2}
    unbroken = Run(**kind)
    expected = unbroken.train(**options)
    broken = Run(**kind)
    stopped = broken.train(**options, checkpoints=tmp_path, stop=lambda row: row["env_steps"] >= broken_after * BATCH)
    assert stopped.env_steps == broken_after * BATCH
    resumed = Run(elsewhere=True, **kind)
    result = resumed.train(**options, checkpoints=tmp_path, resume=True)
    assert result.env_steps == expected.env_steps == 6 * BATCH
    assert without_time(result.history) == without_time(expected.history)
    torch.testing.assert_close(resumed.everything(), unbroken.everything(), rtol=0, atol=0)


@pytest.mark.parametrize(("then", "now"), [("tensors", "tensordicts"), ("tensordicts", "tensors")])
def test_a_run_that_the_other_loop_goes_on_with_begins_new_trials(then, now, tmp_path, caplog):
    Run(updates=2, lean=True, rollout=then, bptt=STEPS).train(checkpoints=tmp_path)
    batches = Batches()
    resumed = Run(updates=4, lean=True, rollout=now, bptt=STEPS)
    result = resumed.train(checkpoints=tmp_path, resume=True, callbacks=[batches])
    assert "begins new trials: the run's were played by the other of TrialCollector's two loops" in caplog.text
    assert [steps for steps, _ in result.new_trials] == [2 * BATCH]
    steps = torch.cat([batch["is_init"] for batch in batches.seen], 1).squeeze(-1)
    assert (steps == (torch.arange(2 * STEPS) % 5 == 0)).all()


class Batches(Callback):
    """Copies of all batches."""

    def __init__(self):
        self.seen = []

    def after_batch(self, batch, progress):
        self.seen.append(batch.clone())


def test_a_resumed_clock_goes_on(tmp_path, monkeypatch):
    # Every look at the clock is 5 s later, and an update takes two, for `stop` and for history: 2.8 steps a second in each call.
    monkeypatch.setattr("rl2_torchrl.training_loop.time", SimpleNamespace(perf_counter=count(0, 5).__next__))
    Run(updates=2).train(checkpoints=tmp_path)
    result = Run(updates=3).train(checkpoints=tmp_path, resume=True)
    assert [row["time/seconds"] for row in result.history] == [10.0, 20.0, 30.0]
    assert [row["time/steps_per_second"] for row in result.history] == [BATCH / 10] * 3
    assert result.seconds == 30.0


def test_a_resumed_progress_bar_goes_on(tmp_path, capsys):
    Run(updates=1).train(checkpoints=tmp_path)
    Run(updates=3).train(checkpoints=tmp_path, resume=True, progress=True)
    assert f"{3 * BATCH:.1f}/{3 * BATCH:.1f}" in capsys.readouterr().err


def test_resuming_a_finished_run_trains_no_more_and_says_so(tmp_path, caplog):
    done = Run(updates=2).train(checkpoints=tmp_path)
    result = Run(updates=2).train(checkpoints=tmp_path, resume=True)
    assert result.history == done.history
    assert f"had reached its {2 * BATCH} env steps" in caplog.text


def test_a_resumed_gymnasium_env_plays_the_task_it_is_told(tmp_path):
    # The checkpoint is from the middle of a trial, whose gravity a new Pendulum does not have.
    Swing(updates=1).train(checkpoints=tmp_path)
    resumed = Swing()
    played = []

    def stop(row):
        played.append((resumed.collector._carrier["task"].item(), resumed.pendulum.unwrapped.g))
        return False

    result = resumed.train(checkpoints=tmp_path, resume=True, stop=stop)
    assert result.env_steps == 3 * STEPS
    assert len(result.history) == 3
    assert all(told == true for told, true in played)


def test_lost_trials_are_told_where_nothing_is_left_to_do(tmp_path):
    Run(updates=1).train(checkpoints=tmp_path)
    resumed = Run(updates=1)
    resumed.collector.lost_trials = 4  # as TrialWorkers have it
    assert resumed.train(checkpoints=tmp_path, resume=True).lost_trials == 4


class Counter(Callback):
    """Counts updates over the whole of a run."""

    updates = 0

    def after_update(self, row, progress):
        self.updates += 1
        return {} if "updates" in row else {"updates": self.updates}

    def state_dict(self):
        return {"updates": self.updates}

    def load_state_dict(self, state):
        self.updates = state["updates"]


def test_callbacks_go_on_too(tmp_path):
    Run(updates=2).train(checkpoints=tmp_path, callbacks=[Callback(), Counter()])
    result = Run(updates=3).train(checkpoints=tmp_path, callbacks=[Callback(), Counter()], resume=True)
    assert [row["updates"] for row in result.history] == [1.0, 2.0, 3.0]


class Counts(BernoulliBandit):
    """Counts its pulls in an attribute that anybody may read, as envs do with what they stand at."""

    def __init__(self, **options):
        super().__init__(3, batch_size=(ROWS,), seed=2, **options)
        self.pulls, self.goal = 0, 7

    def advance(self, state, action):
        self.pulls += 1
        return super().advance(state, action)


def test_where_an_env_stands_is_no_setting(tmp_path):
    run = Run(updates=4, env=Counts())
    run.train(checkpoints=tmp_path, stop=lambda row: True)
    assert run.bandit.pulls > 0
    assert len(run.train(checkpoints=tmp_path, resume=True, stop=lambda row: True).history) == 2
    other = Run(updates=4, env=Counts())
    other.bandit.goal = 8
    with pytest.raises(ValueError, match=r"other settings \(env.goal: 7 then, 8 now\)"):
        other.train(checkpoints=tmp_path, resume=True)
    assert len(Run(updates=4, env=Counts()).train(checkpoints=tmp_path, resume=True).history) == 4


class Means:
    """A distribution as an object; ``drawn`` is where it stands."""

    def __init__(self, high):
        self.high, self.drawn = high, 0

    def __call__(self, batch_size, generator):
        self.drawn += 1
        return self.high * torch.rand(*batch_size, 3, generator=generator)


def test_the_attributes_of_a_distribution_are_settings(tmp_path):
    def run(high):
        made = Run(updates=3)
        made.sampler.distribution = Means(high)
        return made

    run(0.5).train(checkpoints=tmp_path, stop=lambda row: True)
    with pytest.raises(ValueError, match=r"other settings \(env.TaskSampler.distribution.high: 0.5 then, 0.9 now\)"):
        run(0.9).train(checkpoints=tmp_path, resume=True)
    again = run(0.5)
    again.sampler.draw()
    assert len(again.train(checkpoints=tmp_path, resume=True).history) == 3


@pytest.mark.parametrize("lean", [False, True])
def test_settings_of_an_env_are_kept_where_a_rollout_has_failed(tmp_path, lean):
    class Breaks(Counts):
        def advance(self, state, action):
            if self.pulls == 3 * STEPS:
                raise ArithmeticError("in the fourth batch")
            return super().advance(state, action)

    run = Run(updates=6, env=Breaks(), lean=lean, episodes=STEPS)
    with pytest.raises(ArithmeticError):
        run.train(checkpoints=tmp_path, check=False)  # TorchRL's collector shuts itself down, and has no env any more
    other = Breaks()
    other.goal, other.pulls = 8, 0
    with pytest.raises(ValueError, match=r"other settings \(env.goal: 7 then, 8 now\)"):
        Run(updates=6, env=other, lean=lean, episodes=STEPS).train(checkpoints=tmp_path, resume=True)


def test_what_a_transform_scales_by_is_a_setting(tmp_path):
    Run(1, transforms=[RewardScaling(0.0, 0.5)]).train(checkpoints=tmp_path, check=False)
    other = [RewardScaling(0.0, 1.0)]
    with pytest.raises(ValueError, match=r"other settings \(env.RewardScaling.scale: \[?0.5\]? then, \[?1.0\]? now\)"):
        Run(2, transforms=other).train(checkpoints=tmp_path, resume=True, check=False)
    Run(2, transforms=other).train(
        checkpoints=tmp_path, resume=True, check=False, resume_changes=["env.RewardScaling.scale"]
    )
    assert other[0].scale == 1.0


class Pendulums(Run):
    """Pendulum with other heads and distributions of the same sizes."""

    def __init__(self, updates, detach=True, **actor):
        torch.manual_seed(0)
        swings = GymVectorEnv("Pendulum-v1", ROWS, set_task=set_gravity, task_spec=Unbounded(1), seed=0)
        tasks = TaskSampler(lambda size, gen: 5 + 10 * torch.rand(*size, 1, generator=gen), seed=1)
        env = TransformedEnv(swings, Compose(Trial(steps=STEPS), tasks, PreviousStep()))
        actor = RecurrentActor.from_env(env, hidden_size=4, **actor)
        critic = MemoryValueHead.from_env(env, actor, detach=detach)
        self.update = PPOUpdate(RL2PPOLoss(actor, critic), epochs=1)
        frames = {"frames_per_batch": BATCH, "total_frames": updates * BATCH}
        self.collector = TrialCollector(env, ActorCritic(actor, critic), keep=self.update.in_keys, **frames)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"detach": False}, "detach: true then, false now"),
        ({"distribution": TanhGaussianActions([-2.0], [2.0])}, "distribution_class: .*Normal. then, .*Tanh.* now"),
    ],
)
def test_networks_of_the_same_sizes_may_be_others(tmp_path, changed, words):
    Pendulums(1).train(checkpoints=tmp_path, check=False)
    with pytest.raises(ValueError, match=rf"other settings \(loss\.(actor|critic)_network\..*{words}"):
        Pendulums(2, **changed).train(checkpoints=tmp_path, resume=True, check=False)


def test_rewards_are_scaled_from_now_on(tmp_path, caplog):
    def run(updates, scale_rewards):
        one = Run(updates)
        one.update.advantage = TrialAdvantage(critic=one.policy, scale_rewards=scale_rewards)
        return one

    run(1, False).train(checkpoints=tmp_path, check=False)
    resumed = run(2, True)
    changes = {"resume_changes": ["advantage.scale_rewards"]}
    resumed.train(checkpoints=tmp_path, check=False, resume=True, **changes)
    assert resumed.update.advantage._returns.count == BATCH
    run(3, False).train(checkpoints=tmp_path, check=False, resume=True, **changes)
    assert "the advantage begins anew" in caplog.text


def test_adamw_goes_on_with_adams_averages():
    update, adam = Run().update, Run().update
    update.optimizer = torch.optim.AdamW(update.loss.parameters(), lr=1e-3)
    update.load_state_dict(adam.state_dict())
    assert update.optimizer.param_groups[0]["decoupled_weight_decay"]


def grouped(run):
    groups = [[], []]
    for each in run.update.loss.parameters():
        groups[each.ndim > 1].append(each)  # no decay of biases
    run.update.optimizer = torch.optim.Adam([{"params": groups[0], "weight_decay": 0.0}, {"params": groups[1]}], lr=0.5)
    return run


@pytest.mark.parametrize(
    ("make", "differs"),
    [
        (lambda: Run(2, sgd=True, lr=0.5), '"Adam" then, "SGD" now'),
        (lambda: grouped(Run(2)), "update.group1.lr: none then, 0.5 now"),
    ],
)
def test_another_kind_of_optimizer_begins_anew(make, differs, tmp_path, caplog):
    Run(1).train(checkpoints=tmp_path, check=False)
    with pytest.raises(ValueError, match=differs) as error:
        make().train(checkpoints=tmp_path, check=False, resume=True)
    changes = ast.literal_eval(re.search(r"resume_changes=(\[.*\])", str(error.value))[1])
    resumed, given = make(), make().update.given_options
    resumed.train(checkpoints=tmp_path, check=False, resume=True, resume_changes=changes)
    assert "the optimizer begins anew" in caplog.text
    assert resumed.update.given_options == given
    assert {int(each.get("step", 0)) for each in resumed.update.optimizer.state.values()} <= {0, 4}  # one update's


class Later(RewardScaling):
    """Another class, which scales as well."""


def scaled(updates, *transforms):
    return Run(updates, transforms=transforms)


def test_transforms_in_another_order_are_another_env(tmp_path):
    """And each has its own numbers all the same, if that is what is asked for."""
    scaled(1, RewardScaling(0.0, 2.0), Later(0.0, 3.0)).train(checkpoints=tmp_path, check=False)
    with pytest.raises(ValueError, match=r'env.transforms: .*"env.RewardScaling", "env.Later".* then'):
        scaled(2, Later(0.0, 3.0), RewardScaling(0.0, 2.0)).train(checkpoints=tmp_path, check=False, resume=True)
    pair = Later(0.0, 3.0), RewardScaling(0.0, 2.0)
    changes = {"resume": True, "resume_changes": ["env.transforms"]}
    result = scaled(2, *pair).train(checkpoints=tmp_path, check=False, **changes)
    assert [each.scale.item() for each in pair] == [3.0, 2.0]
    assert len(result.new_trials) == 1


@pytest.mark.parametrize(
    ("then", "now"), [([], [2.0]), ([2.0], []), ([2.0], [[3.0]])], ids=["more", "less", "of another shape"]
)
def test_transforms_that_a_run_has_not_had_begin_anew(then, now, tmp_path, caplog):
    def make(updates, scales):
        return scaled(updates, *(RewardScaling(0.0, torch.tensor(scale)) for scale in scales))

    make(1, then).train(checkpoints=tmp_path, check=False)
    with pytest.raises(ValueError, match="env.RewardScaling") as error:
        make(2, now).train(checkpoints=tmp_path, check=False, resume=True)
    changes = ast.literal_eval(re.search(r"resume_changes=(\[.*\])", str(error.value))[1])
    resumed = make(2, now)
    assert resumed.train(checkpoints=tmp_path, check=False, resume=True, resume_changes=changes).history
    assert [t.scale.tolist() for t in resumed.collector.env.transform if isinstance(t, RewardScaling)] == now
    assert ("env.RewardScaling begins anew" in caplog.text) == bool(now)


def test_networks_that_read_other_entries_or_act_within_other_bounds_are_others(tmp_path):
    def make(extra_keys, high):
        torch.manual_seed(0)
        robot = PointRobot(batch_size=(4,))
        trials = Compose(
            Trial(steps=4), TaskSampler(lambda b, g: torch.rand(*b, 2, generator=g), seed=0), PreviousStep()
        )
        env = TransformedEnv(robot, trials)
        actor = RecurrentActor.from_env(env, hidden_size=4, distribution=TanhGaussianActions([-1.0] * 2, high))
        critic = GRUValueHead.from_env(env, hidden_size=4, extra_keys=extra_keys)
        update = PPOUpdate(RL2PPOLoss(actor, critic), epochs=1)
        return TrialCollector(env, ActorCritic(actor, critic), frames_per_batch=16, total_frames=32), update

    def run(*arguments, **options):
        return train(*make(*arguments), evaluate=None, progress=False, check=False, checkpoints=tmp_path, **options)

    given = ["time_left", "trial_step"], [1.0, 1.0]
    run(*given)
    with pytest.raises(ValueError, match=r'loss.critic_network.in_keys: .*"time_left", "trial_step"'):
        run(given[0][::-1], given[1], resume=True)
    with pytest.raises(ValueError, match=r"distribution_kwargs: .*\[1.0, 1.0\]} then, .*\[1.0, 2.0\]} now"):
        run(given[0], [1.0, 2.0], resume=True)
    assert run(*given, resume=True).env_steps == 32


class Wrapped(PPOUpdate):
    def state_dict(self):
        return self.wrap(super().state_dict())

    def load_state_dict(self, state):
        super().load_state_dict(state[0])


@pytest.mark.parametrize("wrap", [lambda state: {0: state, "of": "mine"}, lambda state: [state]])
def test_an_update_of_ones_own_has_a_state_of_another_kind(wrap, tmp_path):
    def run(updates, **options):
        one = Run(updates, **options)
        one.update.__class__ = type("Mine", (Wrapped,), {"wrap": staticmethod(wrap)})
        return one

    run(1).train(checkpoints=tmp_path, check=False)
    resumed = run(2, lr=0.5)
    resumed.train(checkpoints=tmp_path, check=False, resume=True, resume_changes=["update.lr"])
    assert resumed.update.optimizer.param_groups[0]["lr"] == 0.5


class Doubles(Counter):
    """Another class, which counts as well."""


def test_states_of_callbacks_go_to_their_own_classes(tmp_path, caplog):
    first, second, double = Counter(), Counter(), Doubles()
    second.updates, double.updates = 10, 20
    Run(updates=2).train(checkpoints=tmp_path, callbacks=[first, second, double])
    among = [Callback(), Doubles(), Counter()]
    Run(updates=2).train(checkpoints=tmp_path, callbacks=among, resume=True)
    assert [each.updates for each in among[1:]] == [22, 2]
    assert "the state of Counter 2 is lost: the run had it among its callbacks, and this one has not" in caplog.text


class StopsAt:
    """True after ``number`` updates of the whole run."""

    def __init__(self, number):
        self.left = number

    def __call__(self, row):
        self.left -= 1
        return self.left <= 0

    def state_dict(self):
        return {"left": self.left}

    def load_state_dict(self, state):
        self.left = state["left"]


def test_a_stop_that_counts_goes_on_counting(tmp_path):
    Run(updates=2).train(checkpoints=tmp_path, stop=StopsAt(3))
    result = Run(updates=6).train(checkpoints=tmp_path, stop=StopsAt(3), resume=True)
    assert len(result.history) == 3


def test_a_stop_that_could_not_go_on_is_refused_at_once(tmp_path):
    class Forgets:
        def __call__(self, row):
            pytest.fail("an update was made before it was said")

        def state_dict(self):
            return {"left": 3}

    with pytest.raises(TypeError, match="Forgets has a state_dict, and no load_state_dict"):
        Run(updates=2).train(checkpoints=tmp_path, stop=Forgets())


class Outgrows(Counter):
    """Its state can be saved at first, and not after the second update."""

    def state_dict(self):
        return {"seen": self} if self.updates >= 2 else {"seen": self.updates}


def test_a_state_that_can_no_longer_be_saved_costs_checkpoints_and_not_the_training(tmp_path, caplog):
    run = Run(updates=4)
    with pytest.raises(
        TypeError, match=f"no checkpoint could be written at {4 * BATCH} env steps .*Outgrows, which cannot"
    ):
        run.train(checkpoints=tmp_path, checkpoint_interval=1, callbacks=[Outgrows()])
    assert f"no checkpoint could be written at {2 * BATCH} env steps" in caplog.text
    assert saved_steps(tmp_path) == [BATCH]


class Scaled(Counter):
    """An advantage of one's own, no module."""

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, batch):
        self.updates += 1
        return self.inner(batch)


class Curriculum(Counter):
    """A task distribution that changes in the course of a training."""

    def __call__(self, batch_size, generator):
        self.updates += 1
        return torch.rand(*batch_size, 3, generator=generator)


def test_what_changes_beside_networks_goes_on(tmp_path):
    def counts(updates, **options):
        run = Run(updates)
        run.sampler.distribution = tasks = Curriculum()
        run.update.advantage = advantage = Scaled(run.update.advantage)
        run.train(checkpoints=tmp_path, check=False, checkpoint_interval=1, **options)
        return tasks.updates, advantage.updates

    counts(2)
    resumed = counts(4, resume=True)
    shutil.rmtree(tmp_path)
    assert resumed == counts(4)


class Slotted:
    """An advantage of one's own without a ``__dict__``."""

    __slots__ = ("inner",)

    def __init__(self, inner):
        self.inner = inner

    def __call__(self, batch):
        return self.inner(batch)


def test_an_advantage_with_slots(tmp_path):
    run = Run(updates=1)
    run.update.advantage = Slotted(run.update.advantage)
    run.train(checkpoints=tmp_path)
    assert saved_steps(tmp_path) == [BATCH]


def test_a_second_call_on_one_collector(tmp_path):
    unbroken = Run(updates=4)
    unbroken.train()
    run = Run(updates=4)
    run.train(stop=lambda row: row["env_steps"] >= 2 * BATCH)
    result = run.train(evaluate=lambda: {"score": 1.0}, checkpoints=tmp_path)
    assert result.env_steps == 4 * BATCH
    assert "eval/score" in result.history[-1]
    assert saved_steps(tmp_path) == [4 * BATCH]
    torch.testing.assert_close(run.everything(), unbroken.everything(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=f"total_frames={4 * BATCH} already"):
        run.train(checkpoints=tmp_path)
    assert saved_steps(tmp_path) == [4 * BATCH]


def test_processes_of_torchrls_are_checked_and_trained_on_by_one_call_after_the_other():
    def bandits():
        trial = Compose(Trial(episodes=5), TaskSampler(uniform_means(3)), PreviousStep())
        return TransformedEnv(BernoulliBandit(3, batch_size=(ROWS,)), trial)

    run, before = Run(), multiprocessing.get_start_method(allow_none=True)
    with ExitStack() as ends:
        multiprocessing.set_start_method("fork", force=True)  # fresh ones would import PyTorch for seconds
        ends.callback(multiprocessing.set_start_method, before, force=True)
        collector = MultiSyncCollector(
            [bandits] * 2,
            run.policy,
            frames_per_batch=2 * BATCH,
            total_frames=6 * BATCH,
            cat_results="stack",
            auto_register_policy_transforms=True,
        )
        ends.callback(collector.shutdown)
        check_training(collector, run.update)
        for _ in range(2):
            result = train(collector, run.update, evaluate=None, progress=False, stop=lambda row: True)
            assert len(result.history) == 1
        assert result.env_steps == 6 * BATCH


def test_a_collector_that_cannot_be_asked_any_more_is_saved_as_it_last_was(tmp_path):
    run = Run(5)

    def stop(row):  # as where Ctrl-C has ended the processes of a MultiSyncCollector
        if ends := row["env_steps"] == 2 * BATCH:
            run.collector.state_dict = partial(os.close, -1)
        return ends

    run.train(checkpoints=tmp_path, stop=stop)
    (path,) = tmp_path.glob("*.safetensors")
    assert load_tree(path)["state"]["collector"]["frames"] == 2 * BATCH
    assert Run(5, elsewhere=True).train(checkpoints=tmp_path, resume=True).env_steps == 5 * BATCH


def test_an_evaluation_on_the_env_of_torchrls_collector_is_an_error():
    run = Run(4)

    def evaluate():
        return {"trial_return": adaptation_curve(run.collector.env, run.policy.actor, ROWS).mean}

    with pytest.raises(
        RuntimeError, match="env has been reset or stepped since.*evaluate on an env of its own"
    ) as error:
        run.train(evaluate=evaluate)
    assert "in the rollout of update 1," in error.value.__notes__[0]


def test_torchrls_collector_may_begin_anew_and_be_played_by_hand(tmp_path):
    run = Run(9)

    class BeginsAnew(Callback):
        def after_update(self, row, progress):
            run.collector.env.reset()
            run.collector.reset()

    run.train(callbacks=[BeginsAnew()], stop=lambda row: row["env_steps"] == 2 * BATCH)
    next(iter(run.collector))
    run.train(checkpoints=tmp_path, stop=lambda row: row["env_steps"] == 5 * BATCH)
    assert run.train(checkpoints=tmp_path, resume=True).env_steps == 9 * BATCH


def test_a_folder_that_cannot_be_written_to_is_found_at_the_start(tmp_path):
    (tmp_path / "file").touch()
    run = Run(updates=1)
    with pytest.raises(OSError, match=r"checkpoints='.*file/checkpoints' cannot be written to"):
        run.train(checkpoints=tmp_path / "file" / "checkpoints")
    assert run.collector._frames == 0


def test_resume_without_a_checkpoint_starts_anew(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        result = Run(updates=2).train(checkpoints=tmp_path / "none", resume=True)
    assert "holds no checkpoint: starting anew" in caplog.text
    assert result.env_steps == 2 * BATCH


def test_a_new_run_moves_an_earlier_ones_checkpoints_aside(tmp_path, caplog):
    (tmp_path / "mine.txt").touch()  # a folder may hold other things, a project's too
    before = {"mine.txt"}
    for updates, earlier in ((3, []), (2, [2, 3]), (1, [1, 2])):  # not more and more of them
        Run(updates).train(checkpoints=tmp_path, checkpoint_interval=1)
        assert saved_steps(tmp_path) == [BATCH * number for number in range(max(1, updates - 1), updates + 1)]
        assert saved_steps(tmp_path / "earlier-checkpoints") == [BATCH * number for number in earlier]
        left = {path.name for path in tmp_path.iterdir() if not path.name.startswith("checkpoint")}
        assert left == before | ({"earlier-checkpoints"} if earlier else set())
    assert "moved to" in caplog.text


@pytest.mark.parametrize("during", ["evaluate", "stop"])
def test_ctrl_c_leaves_a_checkpoint_to_resume_from(tmp_path, during):
    before = signal.getsignal(signal.SIGINT)
    calls = []

    def second_call_interrupts(row=None):
        calls.append(row)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return {}

    result = Run().train(checkpoints=tmp_path, eval_interval=1, **{during: second_call_interrupts})
    assert result.interrupted
    assert result.env_steps == 2 * BATCH
    assert saved_steps(tmp_path) == [2 * BATCH]
    assert signal.getsignal(signal.SIGINT) is before

    unbroken = Run()
    unbroken.train()
    resumed = Run(elsewhere=True)
    assert not resumed.train(checkpoints=tmp_path, resume=True).interrupted
    torch.testing.assert_close(resumed.everything(), unbroken.everything(), rtol=0, atol=0)


class Judges:
    """A `stop` that holds at its ``number``-th evaluation, and has seen the rows of so many updates."""

    def __init__(self, number):
        self.number, self.evaluations, self.rows = number, 0, 0

    def __call__(self, row):
        self.rows += 1
        self.evaluations += "eval/score" in row
        return self.evaluations >= self.number

    def state_dict(self):
        return {"evaluations": self.evaluations, "rows": self.rows}

    def load_state_dict(self, state):
        self.evaluations, self.rows = state["evaluations"], state["rows"]


class Interrupted(Callback):
    """Ctrl-C, or an error in the evaluation, in the ``at``-th update, whose evaluation is due; what it is told of evaluations."""

    def __init__(self, at, what):
        self.at, self.what, self.updates, self.progress = at, what, 0, []

    def after_update(self, row, progress):
        self.updates += 1
        if self.updates == self.at and self.what == "Ctrl-C":
            signal.raise_signal(signal.SIGINT)

    def after_evaluation(self, row, progress):
        self.progress.append(progress)

    def evaluation_of(self, run):
        def evaluate():
            if self.updates == self.at and self.what == "error":
                raise RuntimeError("the evaluation has failed")
            weights = sum(float(each.detach().sum()) for each in run.policy.parameters())
            return {"score": weights + torch.rand(1).item()}

        return evaluate


@pytest.mark.parametrize("what", ["Ctrl-C", "error"])
@pytest.mark.parametrize("ends_at", [9, 3], ids=["goes on", "is the last"])
def test_an_evaluation_that_an_interruption_has_put_off_is_made_up_for(tmp_path, what, ends_at):
    def go_on(ends_at, at=-1, **options):
        run, interrupted, stop = Run(), Interrupted(at, what), Judges(ends_at)
        parts = {"evaluate": interrupted.evaluation_of(run), "stop": stop, "callbacks": [interrupted]}
        with suppress(RuntimeError):
            result = run.train(eval_interval=2, **parts, **options)
            return without_time(result.history), (stop.rows, stop.evaluations), interrupted.progress
        return [], None, interrupted.progress

    unbroken, judged, progress = go_on(9)
    options = {"checkpoints": tmp_path / "run", "logger": CSVLogger("log", tmp_path)}
    interrupted, _, first = go_on(9, at=5, **options)
    assert not interrupted or "eval/score" not in interrupted[-1]
    resumed, _, second = go_on(ends_at, resume=True, **options)
    assert resumed == (unbroken if ends_at == 9 else unbroken[:5])
    if ends_at == 3:  # as it would have been at the end of the update
        resumed, judged_again, third = go_on(9, resume=True, **options)
        second += third
        assert (resumed, judged_again) == (unbroken, judged)
    assert first + second == progress
    logged = (tmp_path / "log/scalars/eval/score.csv").read_text().split()
    assert logged == [f"{int(row['env_steps'])},{row['eval/score']}" for row in unbroken if "eval/score" in row]


# ---- Numbers that are not finite.


class BreaksDown(BernoulliBandit):
    """Pays NaN from the third batch on."""

    pulls = 0

    def _step(self, tensordict):
        self.pulls += 1
        stepped = super()._step(tensordict)
        return stepped if self.pulls <= 2 * STEPS else stepped.set("reward", stepped["reward"] * torch.nan)


def test_a_number_that_is_not_finite_stops_before_it_is_saved(tmp_path):
    run = Run(env=BreaksDown(3, batch_size=(ROWS,), seed=2), episodes=1)
    parameters = []
    with pytest.raises(FloatingPointError, match=rf"in update 2, at {2 * BATCH} env steps: reward is nan at row"):
        run.train(
            checkpoints=tmp_path,
            checkpoint_interval=1,
            stop=lambda row: parameters.append([p.clone() for p in run.update.loss.parameters()]),
        )
    assert saved_steps(tmp_path) == [BATCH, 2 * BATCH]
    healthy = Run(elsewhere=True, episodes=1, updates=2)
    healthy.train(checkpoints=tmp_path, resume=True, resume_changes=["env.class"])
    torch.testing.assert_close(list(healthy.update.loss.parameters()), parameters[-1], rtol=0, atol=0)


def test_an_error_in_a_rollout_says_where(tmp_path):
    # The policy reads the NaN in the middle of the trial, before any update sees it.
    run = Run(env=BreaksDown(3, batch_size=(ROWS,), seed=2))
    with pytest.raises(Exception, match=rf"nan(.|\n)*rollout of update 2, after {2 * BATCH} .*reward.* not finite"):
        run.train(checkpoints=tmp_path, checkpoint_interval=1)
    assert saved_steps(tmp_path) == [BATCH, 2 * BATCH]


def test_a_collector_of_ones_own_has_the_state_that_it_says():
    class Own:
        def load_state_dict(self, state):
            self.state = state

    own = Own()
    _CollectorState(own).load_state_dict({"seen": 3})
    assert own.state == {"seen": 3}


class Best(NamedTuple):
    step: int
    weight: torch.Tensor


def test_what_a_callback_says_of_itself_may_be_parameters_tensordicts_and_named_tuples(tmp_path):
    class Keeps(Callback):
        def __init__(self, run):
            self.run, self.kept = run, None

        def after_update(self, row, progress):
            actor = self.run.update.loss.actor_network
            named = dict(actor.named_parameters())
            self.kept = {
                "named": named,
                "all": TensorDict.from_module(actor),
                "best": Best(3, next(iter(named.values()))),
            }

        def state_dict(self):
            return {"kept": self.kept}

        def load_state_dict(self, state):
            self.kept = state["kept"]

    run = Run(2)
    run.train(checkpoints=tmp_path, callbacks=[before := Keeps(run)])
    run = Run(2)
    run.train(checkpoints=tmp_path, callbacks=[after := Keeps(run)], resume=True)
    for name, weight in before.kept["named"].items():
        assert torch.equal(after.kept["named"][name], weight)
        assert torch.equal(TensorDict(after.kept["all"]).get(tuple(name.split("."))), weight)
    assert after.kept["best"][0] == 3
