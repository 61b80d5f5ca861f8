"""Adaptation curves by hand, what the ablations do to the inputs, what an evaluation leaves alone, and the report."""

import io
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from rich.console import Console
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import (
    Compose,
    EnvBase,
    InitTracker,
    ParallelEnv,
    RewardSum,
    SerialEnv,
    StepCounter,
    Transform,
    TransformedEnv,
)
from torchrl.envs.utils import exploration_type
from torchrl.modules.utils import get_primers_from_module

from rl2_torchrl import (
    ActorCritic,
    AdaptationCurve,
    AdaptationReport,
    GRUCategoricalActor,
    GRUGaussianActor,
    GRUValueHead,
    PreviousStep,
    TaskSampler,
    TrainResult,
    Trial,
    adaptation_curve,
    with_shuffled_rewards,
    with_zeroed_memory,
)
from rl2_torchrl.envs import BernoulliBandit, GridNavi, QuadraticBandit, TensorEnv, grid_goals
from rl2_torchrl.evaluation import _tell_of_a_single_episode, _tell_of_single_steps
from rl2_torchrl.rollout import Rollout
from rl2_torchrl.testing import check_trial_env

NAN = math.nan
# Ten bandits of two certain arms: the first arm of task i pays in the tasks 0, 3, 4, 7, 9.
FIRST_PAYS = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0]
TASKS = torch.tensor([[pay, 1 - pay] for pay in FIRST_PAYS])


def bandit_env(tasks=TASKS, rows=4, pulls=3, seed=0):
    base = BernoulliBandit(tasks.shape[-1], batch_size=(rows,), seed=seed)
    return TransformedEnv(base, Compose(Trial(episodes=pulls), TaskSampler.fixed(tasks), PreviousStep()))


def act(function, out_key="action"):
    """A policy without memory: ``trans -> action``."""
    return TensorDictModule(function, in_keys=["trans"], out_keys=[out_key])


def first_arm(trans):
    return torch.zeros(trans.shape[:-1], dtype=torch.int64)


def win_stay_lose_shift(trans):
    """The first arm at first, then the last one if it paid, else the other."""
    last, paid = trans[..., :2].argmax(-1), trans[..., -2] > 0
    begun = trans[..., -1] > 0
    return torch.where(begun, torch.where(paid, last, 1 - last), 0)


class Countdown(EnvBase):
    """Episodes of ``task`` steps, each of which pays 1, 2, 3, ... in turn."""

    def __init__(self, rows):
        super().__init__(batch_size=(rows,))
        self.state_spec = Composite(task=Unbounded((rows, 1), dtype=torch.int64), shape=(rows,))
        self.observation_spec = Composite(step=Unbounded((rows, 1), dtype=torch.int64), shape=(rows,))
        self.action_spec = Categorical(2, shape=(rows,))
        self.reward_spec = Unbounded((rows, 1))

    def _reset(self, tensordict=None, **kwargs):
        return TensorDict({"step": torch.zeros(*self.batch_size, 1, dtype=torch.int64)}, self.batch_size)

    def _step(self, tensordict):
        step = tensordict["step"] + 1
        done = step >= tensordict["task"]
        entries = {"step": step, "reward": step.float(), "done": done, "terminated": done.clone()}
        return TensorDict(entries, self.batch_size)

    def _set_seed(self, seed):
        pass


class TensorCountdown(TensorEnv):
    """As `Countdown`; counts the steps that it is asked for."""

    def __init__(self, rows):
        number = Unbounded(1, dtype=torch.int64)
        spaces = {"observation_spec": Composite(step=number), "action_spec": Categorical(2)}
        super().__init__(task_spec=number, **spaces, batch_size=(rows,), seed=0)
        self.asked = 0

    def begin(self, task, rows):
        step = torch.zeros_like(task)
        return {"step": step, "task": task}, {"step": step}

    def advance(self, state, action):
        self.asked += 1
        step = state["step"] + 1
        return {**state, "step": step}, {"step": step}, step.float(), step >= state["task"], None


def countdown_env(lengths, rows, kind=Countdown, **bounds):
    tasks = TaskSampler.fixed(torch.tensor(lengths).unsqueeze(-1))
    return TransformedEnv(kind(rows), Compose(Trial(**bounds), tasks, PreviousStep(["step"])))


def same(one, other):
    return torch.equal(one.nan_to_num(-1.0), other.nan_to_num(-1.0))


# ------------------------------------------------------------ curves by hand


def test_statistics_by_hand():
    # Trials of 2, 3 and 1 episodes. Trial returns 3, 9, 4: mean 16/3; deviations -7/3, 11/3, -4/3, so the variance is
    # (49 + 121 + 16) / 9 / 2 = 31/3 and the standard error sqrt(31/3 / 3) = sqrt(31) / 3.
    # Episodes: (1, 2, 4): mean 7/3, variance (16 + 1 + 25) / 9 / 2 = 7/3, SE sqrt(7) / 3; (2, 3): 2.5, SE 1/2; (4).
    curve = AdaptationCurve(torch.tensor([[1.0, 2.0, NAN], [2.0, 3.0, 4.0], [4.0, NAN, NAN]]))
    assert curve.num_tasks == 3
    assert curve.trial_returns.tolist() == [3.0, 9.0, 4.0]
    assert curve.mean == pytest.approx(16 / 3)
    assert curve.se == pytest.approx(math.sqrt(31) / 3)
    assert curve.per_episode.tolist() == pytest.approx([7 / 3, 2.5, 4.0])
    assert curve.first_and_last == pytest.approx((7 / 3, 7 / 3))  # one trial has no second episode
    assert AdaptationCurve(curve.returns[:2]).first_and_last == pytest.approx((1.5, 2.5))
    assert curve.per_episode_se.tolist() == pytest.approx([math.sqrt(7) / 3, 0.5, NAN], nan_ok=True)


@pytest.mark.parametrize(("rows", "num_trials"), [(1, 10), (2, 10), (4, 10), (5, 10), (16, 10), (4, 1), (3, 7)])
def test_fixed_tasks_are_played_in_order(rows, num_trials):
    curve = adaptation_curve(bandit_env(rows=rows), act(first_arm), num_trials)
    assert curve.returns.tolist() == [[pay] * 3 for pay in FIRST_PAYS[:num_trials]]


@pytest.mark.parametrize("rows", [2, 4])
def test_every_evaluation_begins_with_the_first_task(rows):
    env = bandit_env(rows=rows)
    for number in (10, 10, 3, 10):  # rows that do not divide it draw tasks that are not played
        assert adaptation_curve(env, act(first_arm), number).returns[:, 0].tolist() == FIRST_PAYS[:number]


def test_an_adapting_policy_by_hand():
    # A first pull that fails is mended by the second: (0, 1, 1) where the second arm pays, (1, 1, 1) elsewhere.
    curve = adaptation_curve(bandit_env(), act(win_stay_lose_shift), 10)
    assert curve.returns.tolist() == [[pay, 1.0, 1.0] for pay in FIRST_PAYS]
    assert curve.per_episode.tolist() == [0.5, 1.0, 1.0]
    assert curve.per_episode_se.tolist() == pytest.approx([math.sqrt(10 / 9) * 0.5 / math.sqrt(10), 0.0, 0.0])


@pytest.mark.parametrize("kind", [Countdown, TensorCountdown])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_trials_of_different_lengths_in_order_and_padded(rows, kind):
    # Trials of 6 steps, episodes of n steps, each paying 1 + ... + n: six ones; one of 21; three times 1 + 2; twice
    # 1 + 2 + 3; 10 and then the 1 + 2 of an episode that the trial's end cuts.
    env = countdown_env([1, 6, 2, 3, 4], rows, kind, steps=6)
    expected = [[1.0] * 6, [21.0] + [NAN] * 5, [3.0] * 3 + [NAN] * 3, [6.0] * 2 + [NAN] * 4, [10.0, 3.0] + [NAN] * 4]
    curve = adaptation_curve(env, act(first_arm), 5)
    assert same(curve.returns, torch.tensor(expected, dtype=torch.float64))
    steps = [[1.0] * 6, [6.0], [2.0] * 3, [3.0] * 2, [4.0, 2.0]]
    steps = torch.tensor([each + [NAN] * (6 - len(each)) for each in steps], dtype=torch.float64)
    assert same(curve.steps.returns, steps)
    assert curve.shown == ["steps"]
    # Trials of 2 episodes last 2, 12, 4, 6 and 8 steps: one row goes on to tasks 2 and 3 while another is on task 1.
    env = countdown_env([1, 6, 2, 3, 4], rows, kind, episodes=2)
    expected = [[1.0, 1.0], [21.0, 21.0], [3.0, 3.0], [6.0, 6.0], [10.0, 10.0]]
    assert adaptation_curve(env, act(first_arm), 5).returns.tolist() == expected


def test_episodes_that_the_bound_cuts_or_that_some_trials_lack_are_not_compared(caplog):
    # In 7 steps: episodes of 2, 2, 2 steps and 1 of the next; of 3, 3 and 1; of 1 in each.
    env = countdown_env([2, 3, 1], 3, TensorCountdown, steps=7)
    curve = adaptation_curve(env, act(first_arm), 3)
    assert curve.steps.returns[:, :4].tolist() == [
        [2.0, 2.0, 2.0, 1.0],
        pytest.approx([3.0, 3.0, 1.0, NAN], nan_ok=True),
        [1.0] * 4,
    ]
    assert curve.finished.tolist() == [3, 2, 7]
    assert curve.num_compared == curve.steps.num_compared == 2
    assert curve.steps.first_and_last == (2.0, 2.0)  # where the third is (2 + 1 + 1) / 3
    line = next(line for line in make_report(agent=curve).plot().axes[1].lines if line.get_label() == "RL²")
    assert len(line.get_xydata()) == 2
    assert "second episode" not in caplog.text
    _tell_of_a_single_episode.cache_clear()
    assert adaptation_curve(countdown_env([2, 5, 1], 3, TensorCountdown, steps=7), act(first_arm), 3).num_compared == 1
    assert "Bound its trials by episodes" in caplog.text


def test_trials_of_unknown_length_are_played_a_few_steps_at_once(monkeypatch):
    batches, play = [], Rollout.__call__
    monkeypatch.setattr(Rollout, "__call__", lambda self: batches.append(self.steps) or play(self))
    env, seen = countdown_env([9, 9, 9, 9], 2, TensorCountdown, episodes=1), []
    curve = adaptation_curve(env, act(first_arm), 4)
    assert curve.returns.flatten().tolist() == [45.0] * 4
    assert sum(batches) == env.base_env.asked == 24  # of 18
    batches.clear()
    assert same(adaptation_curve(env, act(first_arm), 4, on_step=seen.append).returns, curve.returns)
    assert batches == [1] * len(seen) == [1] * 18  # nobody is shown a step beyond the last trial's end


def test_who_plays_step_by_step_is_told_of_once(caplog):
    caplog.set_level("INFO", "rl2_torchrl")
    _tell_of_single_steps.cache_clear()
    for _ in range(2):
        adaptation_curve(countdown_env([2, 3], 2, episodes=1), act(first_arm), 2)
        adaptation_curve(countdown_env([2, 3], 2, TensorCountdown, episodes=1), act(first_arm), 2)
    assert [line.getMessage()[:45] for line in caplog.records] == ["evaluations on Countdown play step by step: i"]


def test_trials_that_do_not_count_need_not_end():
    env = countdown_env([3, 9], 2, TensorCountdown, episodes=1)
    assert adaptation_curve(env, act(first_arm), 1, max_trial_steps=4).returns.tolist() == [[6.0]]


def test_a_trial_of_many_steps_is_told_of_once(monkeypatch, caplog):
    monkeypatch.setattr("rl2_torchrl.evaluation._MANY_STEPS", 6)
    for lengths, told in (([6, 6, 3], 0), ([3, 7, 9, 8], 1)):
        caplog.clear()
        adaptation_curve(countdown_env(lengths, 2, episodes=1), act(first_arm), len(lengths))
        assert caplog.text.count("a trial has not ended in 6 steps of an evaluation, which waits for it") == told


def test_no_column_without_a_counted_trial():
    # Row 1 plays a trial of six episodes that is not asked for, beside the one of a single episode that is.
    returns = adaptation_curve(countdown_env([6, 1], 2, steps=6), act(first_arm), 1).returns
    assert returns.tolist() == [[21.0]]


@pytest.mark.parametrize("shape", [(), (2, 2)])
def test_any_batch_size(shape):
    base = BernoulliBandit(2, batch_size=shape)
    env = TransformedEnv(base, Compose(Trial(episodes=2), TaskSampler.fixed(TASKS), PreviousStep()))
    assert adaptation_curve(env, act(first_arm), 10).returns[:, 1].tolist() == FIRST_PAYS


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_further_transforms_change_no_curve(rows):
    env = countdown_env([1, 6, 2, 3, 4], rows, episodes=2)
    env.append_transform(StepCounter())
    expected = [[1.0, 1.0], [21.0, 21.0], [3.0, 3.0], [6.0, 6.0], [10.0, 10.0]]
    assert adaptation_curve(env, act(first_arm), 5).returns.tolist() == expected


def test_parts_may_stand_in_a_compose_of_their_own():
    parts = Compose(TaskSampler.fixed(TASKS), Compose(PreviousStep()))
    env = TransformedEnv(BernoulliBandit(2, batch_size=(2,)), Compose(Trial(episodes=2), parts))
    for _ in range(2):  # each call begins with the first task
        assert adaptation_curve(env, act(first_arm), 7).returns[:, 1].tolist() == FIRST_PAYS[:7]
    check_trial_env(env)


def test_batched_workers():
    env = SerialEnv(2, lambda: BernoulliBandit(2, batch_size=(2,)))
    env = TransformedEnv(env, Compose(Trial(episodes=2), TaskSampler.fixed(TASKS), PreviousStep()))
    assert adaptation_curve(env, act(first_arm), 10).returns[:, 1].tolist() == FIRST_PAYS


# -------------------------------------------------------- memory, exploration


def remembering_actor(**kwargs):
    torch.manual_seed(0)
    return GRUCategoricalActor.from_env(bandit_env(), hidden_size=8, init_range=3.0, **kwargs)


@pytest.mark.parametrize("primed", [False, True])
def test_memory_lasts_a_trial_with_and_without_primers_in_the_env(primed):
    actor, seen = remembering_actor(), []
    env = bandit_env(rows=2)
    if primed:
        env.append_transform(InitTracker())
        env.append_transform(get_primers_from_module(actor, warn=False))

    def record(tensordict):
        seen.append(tensordict["actor_hidden"].flatten(1).abs().sum(1) > 0)
        return tensordict

    adaptation_curve(env, actor, 4, ablation=record)
    # Two rounds of three pulls: empty at the first pull of a trial, carried on at the others.
    assert torch.stack(seen).tolist() == [[False] * 2, [True] * 2, [True] * 2] * 2


def test_every_step_can_be_recorded():
    rewards = []
    curve = adaptation_curve(
        bandit_env(rows=10), act(first_arm), 10, on_step=lambda step: rewards.append(step["next", "reward"].flatten())
    )
    assert torch.equal(torch.stack(rewards, -1).double(), curve.returns)


@pytest.mark.parametrize(
    ("env", "trials"),
    [
        (lambda: bandit_env(rows=5), 10),
        (lambda: countdown_env([2, 3, 4], 2, TensorCountdown, episodes=2), 3),
        (lambda: countdown_env([2, 3, 4], 2, episodes=2), 3),
    ],
    ids=["fixed length", "ragged", "another env"],
)
def test_what_is_recorded_may_be_kept(env, trials):
    kept, clones = [], []

    def record(step):
        kept.append(dict(step))
        clones.append({key: value.clone() for key, value in step.items()})

    env = env()
    adaptation_curve(env, GRUCategoricalActor.from_env(env, hidden_size=4), trials, on_step=record)
    assert {"trans", "actor_hidden", "action", ("next", "reward")} <= kept[0].keys()
    for one, other in zip(kept, clones, strict=True):
        assert [key for key in one if not torch.equal(one[key], other[key])] == []


def test_deterministic_and_random():
    env = TransformedEnv(
        QuadraticBandit(1, noise=0.0, batch_size=(500,)),
        Compose(Trial(episodes=1), TaskSampler.fixed(torch.zeros(1, 1)), PreviousStep()),
    )
    actor = GRUGaussianActor.from_env(env, hidden_size=4, init_range=1e-6, init_log_std=math.log(2.0))
    # At the target: the mean costs nothing, sampling costs the variance, 4 +- 4 sqrt(2 / 500).
    assert adaptation_curve(env, actor, 500, deterministic=True).mean == pytest.approx(0.0, abs=1e-9)
    assert adaptation_curve(env, actor, 500).mean == pytest.approx(-4.0, abs=4 * 0.253)


def test_actor_critic_is_a_policy_too():
    env = bandit_env()
    policy = ActorCritic(remembering_actor(), GRUValueHead.from_env(env, hidden_size=4))
    torch.manual_seed(1)
    one = adaptation_curve(env, policy, 8).returns
    torch.manual_seed(1)
    assert torch.equal(one, adaptation_curve(bandit_env(), policy.actor, 8).returns)


@pytest.mark.parametrize("training", [True, False])
def test_an_evaluation_changes_nothing(training):
    actor = remembering_actor().train(training)
    before = {name: value.clone() for name, value in actor.state_dict().items()}
    env, kind = bandit_env(), exploration_type()
    transforms = len(env.transform)
    with_gradients = []

    def watch(tensordict):
        with_gradients.append(torch.is_grad_enabled())
        return tensordict

    adaptation_curve(env, actor, 8, deterministic=True, ablation=watch)
    assert all(torch.equal(value, before[name]) for name, value in actor.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in actor.parameters())
    assert actor.training is training
    assert exploration_type() is kind
    assert torch.is_grad_enabled()
    assert len(env.transform) == transforms
    assert not any(with_gradients)


# --------------------------------------------------------------- ablations


def test_zeroed_memory_zeroes_every_hidden_state_and_nothing_else():
    policy = ActorCritic(
        GRUCategoricalActor(4, 2, hidden_size=4), GRUValueHead(4, hidden_size=3, hidden_key=("a", "h"))
    )
    td = TensorDict({"trans": torch.randn(5, 4), "actor_hidden": torch.randn(5, 1, 4)}, [5])
    td["a", "h"] = torch.randn(5, 1, 3)
    out = with_zeroed_memory(policy)(td.clone())
    assert not out["actor_hidden"].any()
    assert not out["a", "h"].any()
    assert torch.equal(out["trans"], td["trans"])


def test_memory_zeroed_where_episodes_begin():
    env = countdown_env([2, 3], 2, TensorCountdown, episodes=2)
    actor, seen = GRUCategoricalActor.from_env(env, hidden_size=4, init_range=3.0), []
    zero = with_zeroed_memory(actor, at="episodes")

    def record(state):
        seen.append((state["step"].flatten() == 0, state["actor_hidden"], zero(state)["actor_hidden"]))
        return zero(state)

    adaptation_curve(env, actor, 2, ablation=record)
    begins, before, after = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert before[begins].any()
    assert not after[begins].any()
    assert torch.equal(before[~begins], after[~begins])
    with pytest.raises(ValueError, match="at='trials'.*'episodes' begin"):
        with_zeroed_memory(actor, at="trials")


@pytest.mark.parametrize("kind", [TensorCountdown, Countdown])
def test_an_ablation_sees_all_that_there_is_of_a_step(kind):
    seen = set()
    env = countdown_env([2, 3], 2, kind, episodes=2)
    adaptation_curve(env, act(first_arm), 2, ablation=lambda state: seen.update(state) or state)
    assert {"trans", "task", "step", "is_init", "episode_done", "episode_index", "trial_step", "time_left"} <= seen
    assert not {("next", "done"), ("next", "episode_done")} & seen  # which are not there yet
    with pytest.raises(TypeError, match=r"returned a NoneType.*\*\*state"):
        adaptation_curve(env, act(first_arm), 2, ablation=lambda state: None)


def test_a_policy_with_zeroed_memory_forgets():
    # With the memory zeroed, an action depends on the last step alone: two rows with the same last step act alike.
    actor, seen = remembering_actor(), []
    zero = with_zeroed_memory(actor)

    def record(state):
        state = zero(state)
        start = {"is_init": torch.zeros(10, 1, dtype=torch.bool)}
        seen.append((state["trans"].clone(), actor.get_dist(TensorDict({**state, **start}, [10])).logits))
        return state

    adaptation_curve(bandit_env(rows=10), actor, 10, ablation=record)
    trans, logits = (torch.cat(parts) for parts in zip(*seen, strict=True))
    unique, index = trans.unique(dim=0, return_inverse=True)
    assert len(unique) < len(trans)
    for i in range(len(unique)):
        group = logits[index == i]
        assert torch.allclose(group, group[:1].expand_as(group), atol=1e-6)


def test_an_actors_memory_is_zeroed_by_that_of_its_actor_critic_too():
    actor = remembering_actor()
    policy = ActorCritic(actor, GRUValueHead(5, hidden_size=4))
    curves = []
    for zeroed in (actor, policy):
        torch.manual_seed(0)
        curves.append(adaptation_curve(bandit_env(rows=10), actor, 10, ablation=with_zeroed_memory(zeroed)))
    assert torch.equal(*[curve.returns for curve in curves])


def test_shuffled_rewards_permutes_the_last_but_one_entry_and_nothing_else():
    trans = torch.arange(24.0).reshape(6, 4)
    state = {"trans": trans.clone(), "other": torch.ones(6)}
    out = with_shuffled_rewards(torch.Generator().manual_seed(0))(state)
    assert torch.equal(state["trans"], trans)  # the batch's own memory is left as it is
    assert out["other"] is state["other"]
    assert torch.equal(out["trans"][..., [0, 1, 3]], trans[..., [0, 1, 3]])
    assert sorted(out["trans"][..., 2].flatten().tolist()) == trans[..., 2].flatten().tolist()
    assert not torch.equal(out["trans"][..., 2], trans[..., 2])
    # The generator decides; a nested key works as well.
    nested = {("a", "trans"): trans.clone()}
    again = with_shuffled_rewards(torch.Generator().manual_seed(0), in_key=("a", "trans"))(nested)
    assert torch.equal(again["a", "trans"], out["trans"])


def test_ablations_reach_the_policy():
    # Win-stay, lose-shift lives on the reward: with another row's it does no better than chance after the first pull.
    tasks = torch.eye(2).repeat(1000, 1)
    generator = torch.Generator().manual_seed(0)
    policy = act(win_stay_lose_shift)
    curve = adaptation_curve(bandit_env(tasks, 2000), policy, 2000, ablation=with_shuffled_rewards(generator))
    assert curve.per_episode.tolist() == pytest.approx([0.5] * 3, abs=4 * 0.5 / math.sqrt(2000))
    assert adaptation_curve(bandit_env(tasks, 2000), policy, 2000).per_episode.tolist() == [0.5, 1.0, 1.0]


# ------------------------------------------------------------------- report


def make_report(**kwargs):
    agent = AdaptationCurve(torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 2.0]]))
    greedy = AdaptationCurve(torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 2.0]]))
    other = AdaptationCurve(torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    history = [
        {"env_steps": 10.0, "train/trial_return": 1.0},
        {"env_steps": 20.0, "train/trial_return": NAN, "eval/trial_return": 1.5},
    ]
    entries = {
        "agent": agent,
        "greedy": greedy,
        "baselines": {"random": other},
        "ablations": {"memory_zeroed": other},
        "optimum": 2.5,
        "train": TrainResult(env_steps=20, seconds=1.5, history=history),
        "seed": 7,
    }
    return AdaptationReport(**{**entries, **kwargs})


def test_numbers_of_other_kinds_are_written(tmp_path):
    report = make_report(optimum=torch.tensor(2.5), seed=np.int64(7))
    report.train.history[0]["mine"] = np.float32("nan")
    stored = json.loads(report.save(tmp_path).read_text())
    assert (stored["optimum"], stored["seed"], stored["train"]["history"][0]["mine"]) == (2.5, 7, None)


def test_trials_of_other_lengths_are_not_compared(caplog):
    report = partial(make_report, ablations={})
    agent, longer, whole = (AdaptationCurve(torch.zeros(2, n)) for n in (2, 3, 1))
    with pytest.raises(ValueError, match=r"different numbers of episodes, \{'RL²': 2.*'random': 3\}"):
        report(agent=agent, greedy=agent, baselines={"random": longer})
    report(agent=agent, greedy=agent, baselines={"random": whole})  # its trials' whole returns
    assert "numbers of tasks" not in caplog.text
    report(agent=agent, greedy=agent, baselines={"random": AdaptationCurve(torch.zeros(3, 2))})
    assert "different numbers of tasks, [2, 3]" in caplog.text


def test_a_classical_agent_called_as_a_way_to_play_takes_nothings_place():
    report = make_report(baselines={"greedy": make_report().agent})
    summary = report.summary()
    assert (summary["RL², greedy"], summary["greedy"]) == ("2.333 ± 0.333", "2.000 ± 0.577")
    with pytest.raises(ValueError, match="two curves would be called RL², greedy, and one be lost"):
        make_report(baselines={"RL², greedy": report.agent})


def test_report_as_dict():
    report = make_report().to_dict()
    # Trial returns 1, 2, 3 of the agent, 2, 2, 3 in deterministic mode, and 0, 1, 2.
    assert report["agent"]["mean"] == 2.0
    assert report["agent"]["se"] == pytest.approx(1 / math.sqrt(3))
    assert report["agent"]["num_tasks"] == 3
    assert report["agent"]["greedy_mean"] == pytest.approx(7 / 3)
    assert report["agent"]["per_episode"] == pytest.approx([2 / 3, 4 / 3])
    assert report["baselines"]["random"]["mean"] == 1.0
    assert report["baselines"]["random"]["se"] == pytest.approx(1 / math.sqrt(3))
    assert report["ablations"]["memory_zeroed"]["mean"] == 1.0
    assert report["train"]["env_steps"] == 20
    assert report["train"]["seconds"] == 1.5
    assert report["optimum"] == 2.5
    assert report["seed"] == 7
    assert isinstance(report["command"], str)
    assert {"rl2_torchrl", "torch", "torchrl", "tensordict", "python"} <= report["versions"].keys()


def strict_json(text):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_report_goes_to_no_folder_without_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"folder is empty, and files would go to the current folder: .* folder='\.'"):
        make_report().save("")


@pytest.mark.parametrize("returns", [[[0.0, 1.0], [1.0, 1.0]], [[1.0, 2.0]], [[1.0, NAN], [1.0, 2.0]]])
def test_saved_report_is_strict_json_with_a_picture(tmp_path, returns):
    # A single trial has no standard error, and an episode that one trial alone reached has none either.
    curve = AdaptationCurve(torch.tensor(returns))
    report = make_report(agent=curve, baselines={"random": curve})
    path = report.save(tmp_path / "new" / "folder")
    saved = strict_json(path.read_text())
    assert path.name == "report.json"
    assert saved["agent"]["mean"] == pytest.approx(curve.mean)
    assert saved["agent"]["se"] == (None if len(returns) == 1 else pytest.approx(curve.se))
    assert saved["train"]["history"][1]["train/trial_return"] is None
    assert (path.parent / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_table_ranks_the_agents():
    table = make_report().table()
    names = [str(cell) for cell in table.columns[0].cells]
    means = list(table.columns[1].cells)
    ranked = [names.index(name) for name in names if "greedy" in name or name.endswith("RL²") or name == "random"]
    assert ranked == sorted(ranked)
    assert [means[i] for i in ranked] == ["2.333", "2.000", "1.000"]
    assert "2.500" in means[0]
    assert "memory zeroed" in names[-1]


def test_names_in_brackets_are_names():
    random = AdaptationCurve(torch.tensor([[0.0, 1.0]]))
    report = make_report(
        title="bandits [v2]", episode_name="pull [short]", baselines={"psrl [ours]": random, "[/]": random}
    )
    console = Console(file=io.StringIO(), width=200)
    console.print(report.table())
    for name in ("bandits [v2]:", "first pull [short]", "psrl [ours]", " [/] ", " RL² "):
        assert name in console.file.getvalue()


def test_plot_shows_learning_and_adaptation():
    report = make_report(title="bandits", episode_name="pull")
    report.train.history.append({"env_steps": 30.0, "train/trial_return": 2.0})
    learning, adaptation = report.plot().axes
    training = next(line for line in learning.lines if line.get_label() == "training trials")
    assert training.get_xydata().tolist() == [
        [10 / 1e6, 1.0],
        [30 / 1e6, 2.0],
    ]  # over an update in which no trial ended
    assert adaptation.get_ylabel() == "mean return of the pull"
    assert adaptation.get_title().endswith("(bands: 2 SE)")
    held_out = next(line for line in learning.lines if line.get_label() == "held-out trials")
    assert held_out.get_xydata().tolist() == [[20 / 1e6, 1.5]]
    agent = next(line for line in adaptation.lines if line.get_label() == "RL²")
    assert agent.get_xydata().flatten().tolist() == pytest.approx([1, 2 / 3, 2, 4 / 3])
    assert "pull" in adaptation.get_xlabel()
    labels = {line.get_label() for line in adaptation.lines}
    assert {"random", "RL²"} <= labels
    assert any("memory zeroed" in label for label in labels)


def test_a_single_episode_is_points_with_bars_side_by_side():
    agent, other = (AdaptationCurve(torch.tensor(returns)) for returns in ([[1.0], [3.0]], [[0.0], [1.0]]))
    report = make_report(agent=agent, baselines={"random": other}, ablations={"memory_zeroed": other})
    _, adaptation = report.plot().axes
    agent = next(drawn for drawn in adaptation.containers if drawn.get_label() == "RL²")
    (point, _, (bar,)), where = agent, agent[0].get_xdata()[0]
    assert point.get_ydata().tolist() == [2.0]
    assert bar.get_segments()[0].flatten().tolist() == pytest.approx([where, 0.0, where, 4.0])  # 2 SE of 1
    drawn = [each[0].get_xdata()[0] for each in adaptation.containers]
    assert len(set(drawn)) == 3


def test_steps_of_episodes_are_shown_where_these_are_ragged():
    steps = AdaptationCurve(torch.tensor([[4.0, 1.0], [6.0, 3.0]]))
    returns = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    report = make_report(agent=AdaptationCurve(returns, steps=steps))
    # 5 steps on the mean of the first episode, 2 in the second. Of a trial a measure has no mean: a share has no sum.
    measured = report.to_dict()["agent"]["measures"]["steps"]
    assert (measured["per_episode"], measured.keys()) == ([5.0, 2.0], {"per_episode", "per_episode_se"})
    assert report.summary()["steps, first and last episode"] == "5.000, 2.000"
    table = report.table()
    column = next(column for column in table.columns if column.header == "steps, first → last")
    names = [str(cell) for cell in table.columns[0].cells]
    assert {name: cell for name, cell in zip(names, column.cells, strict=False) if cell} == {
        "[bold]RL²": "5.000 → 2.000"
    }
    agent = next(line for line in report.plot().axes[2].lines if line.get_label() == "RL²")
    assert agent.get_xydata().tolist() == [[1.0, 5.0], [2.0, 2.0]]
    for alike in ([[4.0, 2.0], [4.0, NAN]], [[3.0, 3.0]]):  # a trial's last episode may be cut in all trials
        assert AdaptationCurve(torch.tensor(alike), steps=AdaptationCurve(torch.tensor(alike))).shown == []


def test_an_empty_report_can_be_drawn():
    report = make_report(baselines={}, ablations={}, optimum=None, train=TrainResult())
    assert len(report.plot().axes) == 2
    assert report.table().row_count >= 2


def test_a_measure_that_an_inner_reset_overwrites_is_refused():
    class Reaches(TensorEnv):
        """Every episode succeeds, in its third step, its last."""

        def __init__(self):
            specs = {"observation_spec": Unbounded(1), "action_spec": Categorical(2), "task_spec": None}
            super().__init__(**specs, more_spec=Composite(success=Unbounded(1)), max_episode_steps=3, batch_size=(2,))

        def begin(self, task, rows):
            return torch.zeros(2, 1), torch.zeros(2, 1)

        def advance(self, state, action):
            return state + 1, state, torch.zeros_like(state), None, None

        def observe_more(self, state):
            return {"success": (state == 3).float()}

    def successes(how, **trial):
        env = TransformedEnv(Reaches(), Compose(Trial(**trial), PreviousStep(["observation"])))
        actor = GRUCategoricalActor.from_env(env, hidden_size=4)
        return adaptation_curve(env, actor, 2, measures={"success": how}).measures["success"].per_episode.tolist()

    for how in ("max", "last"):  # it would be 0 in the first episode, 1 in the last: as if the agent had learnt
        with pytest.raises(
            ValueError, match=r"\['success'\], which an inner reset overwrites.*step_keys=\['success'\]"
        ):
            successes(how, episodes=2)
        assert successes(how, episodes=2, step_keys=["success"]) == [1.0, 1.0]
    assert successes("max", episodes=1) == [1.0]


class Doubled(Transform):
    """An entry of its own, made of the observation."""

    def __init__(self):
        super().__init__(in_keys=["observation"], out_keys=["doubled"])

    def _apply_transform(self, observation):
        return 2.0 * observation.unsqueeze(-1)

    def _reset(self, _, after):
        return self._call(after)

    def transform_observation_spec(self, spec):
        spec["doubled"] = Unbounded((*spec["observation"].shape, 1))
        return spec


@pytest.mark.parametrize(
    ("below", "behind", "lost"),
    [
        ([StepCounter()], [], "step_count"),  # which its own step reads, as a reset gives it
        ([RewardSum()], [], "episode_reward"),
        ([], [Doubled()], "doubled"),
        ([Doubled()], [], "doubled"),
    ],
)
def test_a_measure_of_what_a_transform_makes_is_refused_where_an_inner_reset_overwrites_it(below, behind, lost):
    base = TransformedEnv(GridNavi(size=3, episode_steps=2, batch_size=(2,)), Compose(*below))
    trial = [Trial(episodes=2), TaskSampler(grid_goals(3)), *behind, PreviousStep(["observation"])]
    env = TransformedEnv(base, Compose(*trial), auto_unwrap=False)
    actor = GRUCategoricalActor.from_env(env, hidden_size=4)
    with pytest.raises(ValueError, match=rf"\['{lost}'\], which an inner reset overwrites"):
        adaptation_curve(env, actor, 2, measures={lost: "last"})


def test_a_measure_that_is_not_finite_is_an_error():
    class Unknown(Transform):
        """A number that only the first of two rows has."""

        def _step(self, _, after):
            return after.set("distance", torch.tensor([[1.0], [torch.nan]]))

        def _reset(self, _, after):
            return after.set("distance", torch.ones(2, 1))

        def transform_observation_spec(self, spec):
            spec["distance"] = Unbounded((2, 1))
            return spec

    env = bandit_env(rows=2, pulls=2)
    env.append_transform(Unknown())
    actor = GRUCategoricalActor.from_env(env, hidden_size=4)
    for kept in (["distance"], ["reward", "distance"]):
        with pytest.raises(
            FloatingPointError, match="the distance is nan in row 1, episode 0 of trial 1.*Mend the env"
        ):
            adaptation_curve(env, actor, 2, measures=dict.fromkeys(kept, "mean"))
    assert adaptation_curve(env, actor, 1, measures={"distance": "mean"}).measures["distance"].mean == 2.0


def test_measures_are_made_of_an_episodes_steps():
    class Said(
        TensorEnv
    ):  # episodes of three steps, in which step t of episode e of row n says 10 e + (1, 3, 2)[t] + 100 n
        def __init__(self, **kwargs):
            specs = {"observation_spec": Unbounded(1), "action_spec": Categorical(2), "task_spec": None}
            more = Composite(info=Composite(said=Unbounded(1)))
            super().__init__(**specs, more_spec=more, max_episode_steps=3, fixed_length=True, **kwargs)
            self.episode = -1

        def begin(self, task, rows):
            self.episode += 1
            return torch.zeros(*self.batch_size, 1), torch.zeros(*self.batch_size, 1)

        def advance(self, state, action):
            return state + 1, state, torch.zeros_like(state), None, None

        def observe_more(self, state):
            said = torch.tensor([0.0, 1.0, 3.0, 2.0])[state.long()]
            return {("info", "said"): said + 10 * self.episode + 100 * torch.arange(2).unsqueeze(-1)}

    expected = {"max": 3.0, "last": 2.0, "mean": 2.0, "sum": 6.0}
    for how, first in expected.items():
        env = TransformedEnv(Said(batch_size=(2,)), Compose(Trial(episodes=2), PreviousStep()))
        actor = GRUCategoricalActor.from_env(env, hidden_size=4)
        curve = adaptation_curve(env, actor, 2, measures={("info", "said"): how})
        steps = 3 if how == "sum" else 1
        rows = [[first, first + 10 * steps], [first + 100 * steps, first + 110 * steps]]
        assert curve.measures["said"].returns.tolist() == rows, how
        assert torch.equal(curve.returns, torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(KeyError, match="which the env does not say"):
        adaptation_curve(env, actor, 2, measures={("info", "other"): "max"})
    with pytest.raises(ValueError, match="one of two would be lost"):
        adaptation_curve(env, actor, 2, measures={("info", "said"): "max", ("other", "said"): "max"})
    with pytest.raises(ValueError, match=r"several numbers each, \{'trans': \(5,\)\}; a measure is one number"):
        adaptation_curve(env, actor, 2, measures={"trans": "max"})
    with pytest.raises(ValueError, match="choose of"):
        adaptation_curve(env, actor, 2, measures={("info", "said"): "best"})
    with pytest.raises(TypeError, match=r"measures=\['reward'\] does not say what is taken of an episode's steps"):
        adaptation_curve(env, actor, 2, measures=["reward"])


def trial_envs(kind, seed=0):
    """Two trial envs as the rows of another."""

    def make(number):
        tasks = TaskSampler.fixed(torch.arange(4.0).view(4, 1).expand(4, 2) / 10 + number / 2)
        trial = Compose(Trial(episodes=2), tasks, PreviousStep())
        return TransformedEnv(BernoulliBandit(2, batch_size=(1,), seed=seed), trial)

    return kind(2, make, create_env_kwargs=[{"number": 0}, {"number": 1}])


def test_trials_of_a_serial_envs_rows_begin_with_the_first_task_each_time():
    env = trial_envs(SerialEnv)
    actor = GRUCategoricalActor.from_env(env)

    def first_tasks():
        begun: list[float] = []
        adaptation_curve(
            env, actor, 4, on_step=lambda s: begun.extend(s["task"][s["is_init"].flatten()][:, 0].tolist())
        )
        return begun[:4]

    seen = [first_tasks() for _ in range(3)]  # the first finds the env not started
    assert seen[0] == pytest.approx([0.0, 0.5, 0.1, 0.6])
    assert seen[1] == seen[2] == seen[0]
    with pytest.raises(ValueError, match="normalize=True marks the reals in 'trans', which PreviousStep in the rows"):
        GRUCategoricalActor.from_env(env, normalize=True)


def test_trials_made_in_processes_are_told_of(caplog):
    env = trial_envs(ParallelEnv)
    try:
        adaptation_curve(env, GRUCategoricalActor.from_env(env), 2)
        assert "a TaskSampler.fixed there goes on from where it stands" in caplog.text
    finally:
        env.close()
