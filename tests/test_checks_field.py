"""`check_training` names the rule on the field's own faults, put in by hand."""

import threading
from functools import partial

import gymnasium
import pytest
import torch
from gymnasium.wrappers import NormalizeReward, TimeLimit
from pipelines import (
    ACTIONS,
    ARMS,
    ROWS,
    STATES,
    TRIAL,
    bandit_env,
    broken_rule,
    first_batch,
    mdp_env,
    networks,
    pipeline,
)
from torchrl.collectors import Collector
from torchrl.data import Unbounded
from torchrl.envs import Compose, InitTracker, SerialEnv, Transform, TransformedEnv, VecNormV2

from rl2_torchrl import (
    ActorCritic,
    FastGRUModule,
    GRUCategoricalActor,
    GRUValueHead,
    PPOUpdate,
    PreviousStep,
    RegretAdvantage,
    RL2PPOLoss,
    TaskSampler,
    Trial,
    TrialAdvantage,
    TrialCollector,
    bandit_values,
    orthogonal_init_,
    train,
)
from rl2_torchrl.checks import TrainingCheckError, TrainingReport, check_training, inputs
from rl2_torchrl.checks.evidence import Evidence
from rl2_torchrl.env_check.shown import shown
from rl2_torchrl.envs import BernoulliBandit, GymVectorEnv, random_mdps, uniform_means
from rl2_torchrl.seeding import derived_seed


class LosesLastReward(PreviousStep):
    """What a wrapper that resets before the agent looks does."""

    def combine(self, observations, action, reward, done):
        return super().combine(observations, action, reward * ~done, done)


class NeverDone(PreviousStep):
    def combine(self, observations, action, reward, done):
        return super().combine(observations, action, reward, torch.zeros_like(done))


class NoAction(PreviousStep):
    def combine(self, observations, action, reward, done):
        return super().combine(observations, torch.zeros_like(action), reward, done)


class RewardAtStart(PreviousStep):
    def begin(self, observations):
        trans = super().begin(observations)
        trans[..., -2] = 0.5
        return trans


TRANSITIONS = {
    LosesLastReward: "the reward .* where an episode has ended",
    NeverDone: "the done of a step",
    NoAction: "the action of a step",
    RewardAtStart: "at a trial's first step",
}


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_transition_input(transition):
    collector, update = pipeline(mdp_env(transition()))
    with pytest.raises(TrainingCheckError, match=f"transition_input.*{TRANSITIONS[transition]}"):
        check_training(collector, update, first_batch(collector))


def test_done_that_is_never_told_where_the_batch_does_not_tell():
    # Trials of 3 episodes: two ends are told within each.
    collector, update = pipeline(mdp_env(NeverDone()))
    batch = first_batch(collector).exclude(("next", "episode_done"))
    with pytest.raises(TrainingCheckError, match="told 0 times .* trial of 3 episodes"):
        check_training(collector, update, batch)


def test_rows_that_end_where_the_batch_does_tell_of_no_episodes_end():
    env = mdp_env(PreviousStep())
    env.base_env.add_truncated_keys()
    actor, critic = networks(env)
    options = {"frames_per_batch": ROWS * env.base_env.max_episode_steps, "set_truncated": True}
    collector = TrialCollector(env, ActorCritic(actor, critic), **options)
    batch = first_batch(collector).exclude(("next", "episode_done"))
    assert "transition_input" in check_training(collector, PPOUpdate(RL2PPOLoss(actor, critic)), batch).checked


class OwnInput(Transform):
    """A user's own transition input, which knows of no episode."""

    def _step(self, tensordict, next_tensordict):
        reward, done = next_tensordict["reward"], next_tensordict["episode_done"]
        return next_tensordict.set("trans", torch.cat([torch.rand_like(reward), reward * ~done], -1))

    def _reset(self, tensordict, tensordict_reset):
        zeros = torch.zeros_like(tensordict_reset["done"], dtype=torch.float32)
        return tensordict_reset.set("trans", torch.cat([zeros, zeros], -1))

    def transform_observation_spec(self, observation_spec):
        observation_spec["trans"] = Unbounded((ROWS, 2))
        return observation_spec


def test_last_reward_lost_by_an_input_of_the_users_own():
    collector, update = pipeline(mdp_env(OwnInput()))
    with pytest.raises(TrainingCheckError, match="transition_input.*not where an episode has ended"):
        check_training(collector, update, first_batch(collector))


@pytest.mark.parametrize("bptt", [None, 2])
def test_memory_lost_without_primers(bptt):
    env = TransformedEnv(mdp_env(), InitTracker())
    # As TorchRL's GRUModule, it starts from zeros where it is given no memory.
    core = partial(FastGRUModule, hidden_size=8, in_key="trans", out_key="features")
    actor, critic = GRUCategoricalActor.from_env(env, core=core), GRUValueHead.from_env(env, core=core)
    collector, update = pipeline(env, actor, critic, primers=False, bptt=bptt, steps=TRIAL)
    assert broken_rule(collector, update, first_batch(collector)) == "replay"


def test_memory_lost_in_every_step():
    """Replayed step by step from the lost memory, everything agrees."""
    collector, update = pipeline(mdp_env(), bptt=1)
    batch = first_batch(collector)
    batch["actor_hidden"].zero_()
    with pytest.raises(TrainingCheckError, match="memory_carried.*initial state inside a trial"):
        check_training(collector, update, batch)


def test_a_memory_that_has_been_told_nothing_may_stay_as_it_is():
    """A trial's first input is all 0, and so is what a GRU without biases makes of it, though the critic sees the time left."""
    env = bandit_env()
    actor, critic = networks(env)[0], GRUValueHead.from_env(env, hidden_size=8, extra_keys=["time_left"])
    orthogonal_init_(actor, memory_steps=5)
    collector, update = pipeline(env, actor, critic, steps=5)
    batch = first_batch(collector)
    assert not batch["actor_hidden"][:, 1].any()
    assert batch["time_left"].all()
    check_training(collector, update, batch)


def test_memory_of_the_trial_before():
    collector, update = pipeline(mdp_env(), bptt=1)
    batch = first_batch(collector)
    batch["critic_hidden"][:, TRIAL] = batch["next", "critic_hidden"][:, TRIAL - 1] + 0.1
    with pytest.raises(TrainingCheckError, match="memory_carried.*trials start with different 'critic_hidden'"):
        check_training(collector, update, batch)


class OneLongTrial(TrialAdvantage):
    """Looks at no end but the last."""

    def forward(self, tensordict):
        never = tensordict["next", "done"].clone()
        never[:, :-1] = False
        out = super().forward(tensordict.copy().update({"next": {"done": never, "terminated": never}}))
        return tensordict.update(out.select("advantage", "value_target"))


@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"value_target": "gae"}])
def test_advantages_that_run_into_the_next_task(options):
    collector, update = pipeline(mdp_env(), advantage=OneLongTrial(**options))
    assert broken_rule(collector, update, first_batch(collector)) == "advantages_apart"


def less_its_mean(made_of):
    """REINFORCE with ``made_of(reward)`` less its mean over rows."""

    def advantage(batch):
        made = made_of(batch["next", "reward"])
        return TrialAdvantage()(batch).set("advantage", made - made.mean())

    return advantage


@pytest.mark.parametrize("trials", [2, 3])
@pytest.mark.parametrize(
    "made_of",
    [
        lambda reward: reward.sum(1, keepdim=True).expand_as(reward).clone(),
        lambda reward: reward.flip(1).cumsum(1).flip(1),
    ],
)
def test_returns_of_a_whole_row_run_into_other_trials(made_of, trials):
    collector, update = pipeline(mdp_env(), steps=trials * TRIAL, advantage=less_its_mean(made_of))
    assert broken_rule(collector, update, first_batch(collector)) == "advantages_apart"


class EndToEnd(TrialAdvantage):
    """Takes all rows for one, where each begins as the one before it ends; ``stops`` where a trial is done."""

    def __init__(self, stops=False, **options):
        super().__init__(**options)
        self.stops = stops

    def forward(self, tensordict):
        one = tensordict.reshape(1, -1)
        done = one["next", "done"] & self.stops
        done[:, -1] = True
        out = super().forward(one.copy().update({"next": {"done": done, "terminated": done}}))
        made = out.select("advantage", "value_target").reshape(tensordict.shape)
        return tensordict.update(made)


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"value_target": "gae"}, {"gamma": 1.0}])
@pytest.mark.parametrize("steps", [TRIAL - 2, TRIAL + 4])
def test_advantages_that_run_into_the_row_before_mix_rows(options, stops, steps):
    collector, update = pipeline(mdp_env(), steps=steps, advantage=EndToEnd(stops=stops, **options), bptt=steps)
    report = check_training(collector, update, first_batch(collector))
    assert MIXED in report.unchecked["advantages_apart"]
    [note] = report.notes  # which `train` logs as a warning
    assert "credited to another's actions" in note


MIXED = "the advantage mixes rows"


def of_baseline(baseline):
    """Returns to go less ``baseline`` of them, as of POMO, RLOO and GRPO."""

    def advantage(batch):
        to_go = TrialAdvantage(gamma=1.0, normalize=False)(batch)["value_target"]
        return batch.set("advantage", to_go - baseline(to_go))

    return advantage


def by_step(to_go):
    """The mean of all trials at a step of theirs."""
    return to_go.reshape(-1, TRIAL).mean(0).repeat(to_go.shape[1] // TRIAL).view(-1, 1)


def linear(to_go):
    """Of time alone, as rllab's LinearFeatureBaseline."""
    time = torch.arange(to_go.shape[1]) % TRIAL / TRIAL
    features = torch.stack([torch.ones_like(time), time, time**2], -1).repeat(len(to_go), 1)
    return (features @ torch.linalg.lstsq(features, to_go.reshape(-1, 1)).solution).view_as(to_go)


@pytest.mark.parametrize("steps", [TRIAL, 2 * TRIAL])
@pytest.mark.parametrize(
    "baseline",
    [
        by_step,
        linear,
        lambda to_go: to_go.mean(0),
        lambda to_go: to_go.view(ROWS // 4, 4, -1, 1).mean(1, keepdim=True).expand(-1, 4, -1, -1).reshape(to_go.shape),
    ],
)
def test_baselines_that_rows_share_are_no_leak(baseline, steps):
    collector, update = pipeline(mdp_env(), steps=steps, advantage=of_baseline(baseline))
    report = check_training(collector, update, first_batch(collector))
    assert MIXED in report.unchecked["advantages_apart"]
    assert MIXED in report.unchecked["advantages_in_time"]
    assert "gradients" in report.checked


@pytest.mark.parametrize("leaks", [True, False])
def test_a_row_that_is_alone_is_looked_at_beside_itself(leaks):
    collector, update = pipeline(mdp_env(rows=1), advantage=OneLongTrial() if leaks else TrialAdvantage())
    if leaks:
        assert broken_rule(collector, update, first_batch(collector)) == "advantages_apart"
    else:
        assert {"advantages_apart", "advantages_in_time"} <= set(
            check_training(collector, update, first_batch(collector)).checked
        )


def test_an_advantage_of_groups_of_rows_is_asked_for_all_of_them():
    def advantage(batch):
        assert len(batch) == ROWS, "rows must be whole groups"
        return TrialAdvantage()(batch)

    collector, update = pipeline(bandit_env(), steps=10, advantage=advantage)
    report = check_training(collector, update, first_batch(collector))
    assert {"advantages_apart", "advantages_in_time"} <= set(report.checked)
    assert not report.notes


def test_an_advantage_that_knows_no_other_rewards_is_not_checked():
    def advantage(batch):
        if not torch.isin(batch["next", "reward"], torch.tensor([0.0, 1.0])).all():
            raise ValueError("a pull pays 0 or 1")
        return TrialAdvantage()(batch)

    collector, update = pipeline(bandit_env(), steps=10, advantage=advantage)
    report = check_training(collector, update, first_batch(collector))
    assert report.unchecked["advantages_apart"] == "the advantage raised ValueError: a pull pays 0 or 1"
    assert "gradients" in report.checked


class RewardSoFar(TrialAdvantage):
    """Sums from the front, in each trial."""

    def forward(self, tensordict):
        tensordict, total = super().forward(tensordict), 0.0
        for step in tensordict.unbind(1):
            total = total + step["next", "reward"]
            step["advantage"].copy_(total)
            total = torch.where(step["next", "done"], 0.0, total)
        return tensordict


class OfCosts(TrialAdvantage):
    def forward(self, tensordict):
        tensordict = super().forward(tensordict)
        return tensordict.set("advantage", -tensordict["advantage"])


class OneStepEarly(TrialAdvantage):
    def forward(self, tensordict):
        tensordict = super().forward(tensordict)
        own = tensordict["advantage"]
        return tensordict.set("advantage", torch.where(tensordict["next", "done"], own, own.roll(-1, 1)))


@pytest.mark.parametrize(
    ("kind", "seen"),
    [
        (RewardSoFar, "moves the advantages of later steps, and none of steps before it"),
        (OfCosts, "lowers the advantage of its step"),
        (OneStepEarly, "does not move the advantage of its step"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"normalize": False, "gamma": 1.0}, {"lmbda": 0.9}])
def test_advantages_that_run_the_wrong_way(kind, seen, options):
    collector, update = pipeline(mdp_env(), advantage=kind(**options))
    with pytest.raises(TrainingCheckError, match=f"advantages_in_time.*{seen}"):
        check_training(collector, update, first_batch(collector))


class WholeTrial(TrialAdvantage):
    """The return of all the trial at each of its steps, as of REINFORCE; ``alone``: of mean 0 and deviation 1 in each trial."""

    def __init__(self, alone):
        super().__init__(normalize=False)
        self.alone = alone

    def forward(self, tensordict):
        tensordict = super().forward(tensordict)
        trials = tensordict["advantage"].reshape(-1, TRIAL)
        trials = (
            (trials - trials.mean(1, True)) / trials.std(1, keepdim=True)
            if self.alone
            else trials[:, :1].expand_as(trials)
        )
        return tensordict.set("advantage", trials.reshape(*tensordict.shape, 1).clone())


@pytest.mark.parametrize(
    "advantage",
    [
        WholeTrial(alone=False),
        WholeTrial(alone=True),
        TrialAdvantage(lmbda=0.0),
        TrialAdvantage(gamma=0.0, scale_rewards=True),
        TrialAdvantage(gamma=1.0, lmbda=1.0, value_target="gae"),
    ],
)
def test_advantages_of_other_kinds_run_the_right_way(advantage):
    collector, update = pipeline(mdp_env(), advantage=advantage)
    assert "advantages_in_time" in check_training(collector, update, first_batch(collector)).checked


class Clipped(TrialAdvantage):
    """At 0.5: what the noise of the check has raised stands at the bound already."""

    def __init__(self, cut=lambda advantage: advantage.clamp(-0.5, 0.5), **options):
        super().__init__(**options)
        self.cut = cut

    def forward(self, tensordict):
        tensordict = super().forward(tensordict)
        return tensordict.set("advantage", self.cut(tensordict["advantage"]))


def test_advantages_at_their_bounds_are_no_fault():
    collector, update = pipeline(bandit_env(), steps=10, advantage=Clipped(normalize=False))
    assert "advantages_in_time" in check_training(collector, update, first_batch(collector)).checked


@pytest.mark.parametrize("steps", [5, 10])
@pytest.mark.parametrize(
    "cut",
    [
        lambda advantage: advantage.clamp(-2, 2),
        lambda advantage: advantage.clamp(-advantage.abs().max() + 1e-3, advantage.abs().max() - 1e-3),  # one alone
        lambda advantage: advantage.clamp(advantage.quantile(0.05), advantage.quantile(0.95)),
        lambda advantage: advantage.clamp_min(0.0),
    ],
)
def test_normalised_advantages_that_are_cut_are_no_fault(cut, steps):
    collector, update = pipeline(bandit_env(), steps=steps, advantage=Clipped(cut))
    assert "gradients" in check_training(collector, update, first_batch(collector)).checked


def test_advantages_normalised_by_row_are_no_fault_where_a_row_is_a_trial():
    advantage = Clipped(lambda advantage: (advantage - advantage.mean(1, True)) / advantage.std(1, keepdim=True))
    collector, update = pipeline(bandit_env(), steps=5, advantage=advantage)
    assert "advantages_apart" in check_training(collector, update, first_batch(collector)).checked


class Counted(TrialAdvantage):
    """How many steps it was asked for, in each copy."""

    steps = 0

    def forward(self, tensordict):
        Counted.steps += tensordict.numel()
        return super().forward(tensordict)


def test_advantages_are_checked_on_a_few_rows():
    collector, update = pipeline(mdp_env(rows=256), advantage=Counted())
    batch, before = first_batch(collector), Counted.steps
    report = check_training(collector, update, batch)
    assert {"advantages_apart", "advantages_in_time", "gradients"} <= set(report.checked)
    assert 0 < Counted.steps - before <= batch.numel() / 4


def test_groups_by_task_are_checked_on_the_whole_batch():
    """A few rows are each a group of their own, whose advantages are 0."""

    def advantage(batch):
        batch = TrialAdvantage(normalize=False)(batch)
        total, groups = batch["value_target"], batch["task"].flatten(2)[:, 0].unique(dim=0, return_inverse=True)[1]
        mean = torch.stack([total[groups == group].mean(0) for group in range(groups.max() + 1)])
        return batch.set("advantage", total - mean[groups])

    def tasks(size, generator):
        return random_mdps(STATES, ACTIONS)(torch.Size([size.numel() // 8]), generator).repeat_interleave(8, 0)

    collector, update = pipeline(mdp_env(tasks=tasks, rows=64), steps=TRIAL, advantage=advantage)
    report = check_training(collector, update, first_batch(collector))
    assert MIXED in report.unchecked["advantages_apart"]
    assert "gradients" in report.checked


def test_an_advantage_that_knows_better_than_rewards_is_not_checked():
    collector, update = pipeline(bandit_env(), steps=10, advantage=RegretAdvantage(bandit_values))
    unchecked = check_training(collector, update, first_batch(collector)).unchecked
    assert "does not depend on the reward" in unchecked["advantages_in_time"]


@pytest.mark.parametrize("cls", [Collector, TrialCollector])
def test_a_task_that_nobody_draws(cls):
    bandit = BernoulliBandit(ARMS, batch_size=(ROWS,), seed=0)
    env = TransformedEnv(bandit, Compose(Trial(episodes=5), PreviousStep()))
    actor, critic = networks(env)
    options = {"frames_per_batch": 10 * ROWS, "total_frames": 10 * ROWS, "auto_register_policy_transforms": True}
    collector = cls(env, ActorCritic(actor, critic), **options)
    with pytest.raises(
        TrainingCheckError, match="'task_given'.*nobody draws one.*nothing to adapt to: add a TaskSampler"
    ):
        train(collector, PPOUpdate(RL2PPOLoss(actor, critic)), evaluate=None, progress=False)


def test_an_env_that_takes_no_task_needs_none():
    env = TransformedEnv(GymVectorEnv("CartPole-v1", 4), Compose(Trial(steps=10), PreviousStep()))
    collector, update = pipeline(env, steps=20)
    assert "task_given" in check_training(collector, update, first_batch(collector)).checked


def test_one_task_for_all_rows():
    def one_task(batch_size, generator):
        return uniform_means(ARMS)(torch.Size([1]), generator).expand(*batch_size, ARMS)

    collector, update = pipeline(bandit_env(one_task), steps=10)
    assert broken_rule(collector, update, first_batch(collector)) == "tasks_drawn"


def test_rare_tasks_are_no_fault():
    def users(batch_size, generator):
        return (torch.rand(*batch_size, 1, generator=generator) < 0.02).float().expand(*batch_size, ARMS)

    for seed in range(4):
        collector, update = pipeline(bandit_env(users, seed=seed), steps=10)
        report = check_training(collector, update, first_batch(collector))
        assert "tasks_drawn" in report.checked
        assert report.unchecked.keys() <= {"tasks_held_out", "tasks_differ"}


def test_rare_tasks_of_workers_are_no_fault():
    """Each row with a sampler of its own, which the rows of a `SerialEnv` show and processes hide."""

    def users(batch_size, generator):
        odd = torch.rand(*batch_size, 1, generator=generator) < 0.01
        return torch.where(odd, 1 - _OF_MOST, _OF_MOST)

    def env_of(seed):
        transforms = Compose(Trial(episodes=5), TaskSampler(users, seed=seed), PreviousStep())
        return TransformedEnv(BernoulliBandit(ARMS, batch_size=(4,)), transforms)

    env = SerialEnv(4, [partial(env_of, seed) for seed in range(4)])
    actor, critic = networks(env_of(0))
    collector, update = pipeline(env, actor, critic, steps=10)
    batch = first_batch(collector)
    for rows_at_hand in (env._envs, []):
        env._envs, kept = rows_at_hand, env._envs
        report = check_training(collector, update, batch)
        assert report.unchecked["tasks_differ"] == "16 rows are too few to tell equal tasks from chance"
        env._envs = kept


_OF_MOST = torch.linspace(0.1, 0.9, ARMS)


def test_no_more_tasks_are_asked_for_at_once_than_there_are_rows():
    tasks, asked = torch.rand(2 * ROWS - 1, ARMS), []

    def different(batch_size, generator):
        asked.append(batch_size.numel())
        return tasks[torch.multinomial(torch.ones(len(tasks)), batch_size.numel(), generator=generator)]

    collector, update = pipeline(bandit_env(different), steps=10)
    report = check_training(collector, update, first_batch(collector), held_out=bandit_env(different, seed=2))
    assert "tasks_drawn" in report.checked
    assert set(asked) == {ROWS}


@pytest.mark.parametrize("count", [1, ROWS])
def test_the_same_tasks_in_every_draw(count):
    def seeded(batch_size, generator):
        size = torch.Size([count])
        return uniform_means(ARMS)(size, torch.Generator().manual_seed(0)).expand(*batch_size, ARMS)

    collector, update = pipeline(bandit_env(seeded), steps=10)
    assert broken_rule(collector, update, first_batch(collector)) == "tasks_drawn"


def test_a_task_distribution_that_cannot_be_copied_is_not_drawn_from():
    class Locked:
        def __init__(self):
            self.lock = threading.Lock()

        def __call__(self, batch_size, generator):
            return uniform_means(ARMS)(batch_size, generator)

    collector, update = pipeline(bandit_env(Locked()), steps=10)
    report = check_training(collector, update, first_batch(collector), held_out=bandit_env(seed=2))
    for rule in ("tasks_drawn", "tasks_held_out"):
        assert report.unchecked[rule].startswith("a copy of the task distribution gives no")


@pytest.mark.parametrize("seeds", [(7, 7), (7, 8)])
def test_workers_with_the_same_tasks(seeds):
    makers = [lambda seed=seed: mdp_env(rows=8, seed=seed) for seed in seeds]
    env = SerialEnv(2, makers)
    example = mdp_env()
    actor, critic = networks(example)
    collector, update = pipeline(env, actor, critic, steps=TRIAL)
    batch = first_batch(collector)
    if seeds == (7, 7):
        assert broken_rule(collector, update, batch) == "tasks_differ"
    else:
        assert "tasks_differ" in check_training(collector, update, batch).checked


def test_held_out_tasks_of_the_same_seed():
    collector, update = pipeline(bandit_env(), steps=10)
    batch = first_batch(collector)
    same = uniform_means(ARMS)(torch.Size([100]), torch.Generator().manual_seed(derived_seed(1, "task")))
    for held_out in (bandit_env(), TaskSampler(uniform_means(ARMS), seed=1), TaskSampler.fixed(same), same):
        assert broken_rule(collector, update, batch, held_out=held_out) == "tasks_held_out"
    assert "tasks_held_out" in check_training(collector, update, batch, held_out=bandit_env(seed=2)).checked


class Hint(Transform):
    """Tells the first numbers of the task, or what is ``made`` of them."""

    def __init__(self, size, made=torch.clone):
        super().__init__()
        self.size, self.made = size, made

    def _step(self, tensordict, next_tensordict):
        return next_tensordict.set("hint", self.made(next_tensordict["task"][..., : self.size]))

    def _reset(self, tensordict, tensordict_reset):
        return tensordict_reset.set("hint", self.made(tensordict_reset["task"][..., : self.size]))

    def transform_observation_spec(self, observation_spec):
        observation_spec["hint"] = Unbounded((ROWS, self.size))
        return observation_spec


def hinted_env(size, **made):
    transforms = Compose(
        Trial(episodes=5), TaskSampler(uniform_means(ARMS), seed=1), Hint(size, **made), PreviousStep(["hint"])
    )
    return TransformedEnv(BernoulliBandit(ARMS, batch_size=(ROWS,), seed=0), transforms)


def test_task_in_the_observation():
    collector, update = pipeline(hinted_env(ARMS), steps=10)
    with pytest.raises(TrainingCheckError, match=r"task_hidden.*all of the task: number 0 of the task is 'trans'\[0\]"):
        check_training(collector, update, first_batch(collector))
    collector, update = pipeline(hinted_env(1), steps=10)
    assert check_training(collector, update, first_batch(collector)).notes == ["number 0 of the task is 'trans'[0]"]


@pytest.mark.parametrize("made", [lambda task: task / 5 + 0.5, lambda task: (1 - 3 * task).half().float()])
def test_task_in_the_observation_at_another_scale(made):
    collector, update = pipeline(hinted_env(ARMS, made=made), steps=10)
    with pytest.raises(
        TrainingCheckError, match=r"all of the task: number 0 of the task is 'trans'\[0\], at another scale,"
    ):
        check_training(collector, update, first_batch(collector))


@pytest.mark.parametrize("made", [lambda task: task + 0.1 * torch.rand_like(task), torch.zeros_like, torch.round])
def test_what_is_no_task_at_another_scale(made):
    collector, update = pipeline(hinted_env(ARMS, made=made), steps=10)
    report = check_training(collector, update, first_batch(collector))
    assert "task_hidden" in report.checked
    assert report.notes == []


def test_two_tasks_are_at_any_scale_by_chance():
    entry, task = torch.tensor([[[0.5], [0.5]], [[0.75], [0.75]]]), torch.tensor([[[0.1], [0.1]], [[0.2], [0.2]]])
    firsts = torch.tensor([[True, False]] * 2)
    assert shown(entry, task, firsts) == {}
    assert shown(task, task, firsts) == {0: "[0]"}


def test_task_that_the_actor_is_given():
    env = bandit_env()
    actor, critic = networks(env)
    seeing = GRUCategoricalActor(ARMS, ARMS, hidden_size=8, in_key="task")
    collector, update = pipeline(env, seeing, critic, steps=10)
    with pytest.raises(TrainingCheckError, match="task_hidden.*the actor reads 'task'"):
        check_training(collector, update, first_batch(collector))


@pytest.mark.parametrize("count", [1, ROWS])
@pytest.mark.parametrize("reduced", [False, True])
def test_statistics_of_each_row(reduced, count):
    norm = VecNormV2(in_keys=["observation"], reduce_batch_dims=reduced)
    env = TransformedEnv(GymVectorEnv("CartPole-v1", count), Compose(Trial(steps=6), norm, PreviousStep()))
    collector, update = pipeline(env, steps=6)
    one = Evidence(first_batch(collector), collector, update, None, TrainingReport())
    found = inputs.one_scale(one)
    assert found == (
        None if reduced or count == 1 else f"VecNormV2 of ['observation'] keeps statistics for each of the {count} rows"
    )


@pytest.mark.parametrize(("count", "wrapper"), [(1, NormalizeReward), (ROWS, NormalizeReward), (ROWS, TimeLimit)])
def test_statistics_of_each_row_of_gymnasiums(count, wrapper):
    def make():
        env = gymnasium.make("CartPole-v1")
        return TimeLimit(env, 5) if wrapper is TimeLimit else wrapper(env)

    env = TransformedEnv(GymVectorEnv(make, count), Compose(Trial(steps=6), PreviousStep()))
    collector, update = pipeline(env, steps=6)
    found = inputs.one_scale(Evidence(first_batch(collector), collector, update, None, TrainingReport()))
    is_apart = wrapper is NormalizeReward and count > 1
    assert found == (f"Gymnasium's NormalizeReward keeps statistics for each of the {count} rows" if is_apart else None)
