"""Adaptation curves by hand, and what an evaluation leaves alone."""

import math

import pytest
import torch
from evaluation_cases import (
    FIRST_PAYS,
    NAN,
    TASKS,
    Countdown,
    TensorCountdown,
    act,
    bandit_env,
    countdown_env,
    first_arm,
    make_report,
    remembering_actor,
    same,
    win_stay_lose_shift,
)
from torchrl.envs import (
    Compose,
    InitTracker,
    RewardSum,
    SerialEnv,
    StepCounter,
    TransformedEnv,
)
from torchrl.envs.utils import exploration_type
from torchrl.modules.utils import get_primers_from_module

from rl2_torchrl import (
    ActorCritic,
    AdaptationCurve,
    GRUCategoricalActor,
    GRUGaussianActor,
    GRUValueHead,
    PreviousStep,
    TaskSampler,
    Trial,
    adaptation_curve,
    with_zeroed_memory,
)
from rl2_torchrl.envs import BernoulliBandit, QuadraticBandit
from rl2_torchrl.rollout import Rollout
from rl2_torchrl.testing import check_trial_env

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


def test_episodes_that_the_bound_cuts_or_that_some_trials_lack_are_not_compared():
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
    assert adaptation_curve(countdown_env([2, 5, 1], 3, TensorCountdown, steps=7), act(first_arm), 3).num_compared == 1


def test_a_curve_has_as_many_episodes_as_its_trials_may_have():
    """Whoever plays, and for however long: tables of several seeds stack, and a report holds those of good agents and bad ones."""
    quick, slow = (adaptation_curve(countdown_env(n, 1, steps=8, episodes=3), act(first_arm), 1) for n in ([2], [4]))
    assert same(quick.returns, torch.tensor([[3.0, 3.0, 3.0]]))
    assert same(slow.returns, torch.tensor([[10.0, 10.0, NAN]]))
    assert same(slow.steps.returns, torch.tensor([[4.0, 4.0, NAN]]))
    assert (quick.num_compared, slow.num_compared, slow.episodes) == (3, 2, 3)
    assert make_report(agent=quick, greedy=quick, baselines={}, ablations={"memory zeroed": slow}).table()
    by_steps = [adaptation_curve(countdown_env([n], 1, steps=8), act(first_arm), 1) for n in (2, 4)]
    assert [curve.returns.shape[1] for curve in by_steps] == [4, 2]  # all of them finished, by chance
    assert make_report(agent=by_steps[0], greedy=by_steps[1], baselines={}, ablations={}).table()


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


@pytest.mark.parametrize("kind", [Countdown, TensorCountdown])
def test_trials_of_so_many_steps_are_played_at_once_whatever_the_env(kind, monkeypatch):
    batches, play, seen = [], Rollout.__call__, []
    monkeypatch.setattr(Rollout, "__call__", lambda self: batches.append(self.steps) or play(self))
    adaptation_curve(countdown_env([2, 5], 2, kind, steps=7), act(first_arm), 4, on_step=seen.append)
    assert batches == [7, 7]
    assert len(seen) == 14
    monkeypatch.setattr("rl2_torchrl.evaluation._NUMBERS_AT_ONCE", 64)  # no more memory than that of a few steps
    batches.clear()
    adaptation_curve(countdown_env([2, 5], 2, kind, steps=12), act(first_arm), 4, on_step=seen.append)
    assert batches == [2] * 12


@pytest.mark.parametrize(("other", "length"), [(RewardSum(), 7), (StepCounter(max_steps=3), 3)])
def test_they_are_beside_transforms_of_others(other, length, monkeypatch):
    batches, play, seen = [], Rollout.__call__, []
    monkeypatch.setattr(Rollout, "__call__", lambda self: batches.append(self.steps) or play(self))
    env = countdown_env([9, 9, 9, 9], 2, TensorCountdown, steps=7).append_transform(other)
    curve = adaptation_curve(env, act(first_arm), 4)
    assert batches == [7] * math.ceil(2 * length / 7)
    assert curve.returns.flatten().tolist() == [sum(range(length + 1))] * 4
    batches.clear()
    assert same(adaptation_curve(env, act(first_arm), 4, on_step=seen.append).returns, curve.returns)
    assert batches == [1] * len(seen) == [1] * 2 * length


@pytest.mark.parametrize(("episodes", "tells"), [(1, 1), (2, 0)])
def test_an_ablation_that_never_changes_anything_is_told_of(episodes, tells, caplog):
    bandit = BernoulliBandit(2, batch_size=(4,))
    env = TransformedEnv(bandit, Compose(Trial(episodes=episodes), TaskSampler.fixed(TASKS), PreviousStep()))
    actor = remembering_actor()
    for ablation in (with_zeroed_memory(actor, at="episodes"), None):
        adaptation_curve(env, actor, 10, ablation=ablation)
    assert sum("the ablation changed nothing" in record.message for record in caplog.records) == tells
    adaptation_curve(env, actor, 10, ablation=lambda state: {**state, "trans": state["trans"].clone()})
    assert sum("the ablation changed nothing" in record.message for record in caplog.records) == tells + 1


def test_trials_that_do_not_count_need_not_end():
    env = countdown_env([3, 9], 2, TensorCountdown, episodes=1)
    assert adaptation_curve(env, act(first_arm), 1, max_trial_steps=4).returns.tolist() == [[6.0]]


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


def test_rows_that_hand_out_one_list_of_tasks_each():
    def make(number):
        tasks = TaskSampler.fixed(TASKS[number::2] if number < 2 else TASKS)
        return TransformedEnv(BernoulliBandit(2), Compose(Trial(episodes=2), tasks, PreviousStep()))

    shared = SerialEnv(2, [lambda: make(2), lambda: make(2)])
    with pytest.raises(ValueError, match="of the 2 rows of the SerialEnv several hand out the same fixed tasks"):
        adaptation_curve(shared, act(first_arm), 4)
    assert adaptation_curve(SerialEnv(2, [lambda: make(0), lambda: make(1)]), act(first_arm), 4).num_tasks == 4


# -------------------------------------------------------- memory, exploration


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
