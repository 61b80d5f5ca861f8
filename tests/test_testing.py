"""`check_trial_env`: passes on sound trial envs, and names the one rule that an unsound env breaks."""

import threading

import pytest
import torch
from test_env_check import BROKEN
from test_trial import CountingEnv, lengths
from torchrl.data import Unbounded
from torchrl.envs import Compose, GymEnv, ObservationNorm, RewardScaling, SerialEnv, Transform, TransformedEnv

from rl2_torchrl import PreviousStep, TaskSampler, Trial
from rl2_torchrl.envs import BernoulliBandit, GymTaskEnv, QuadraticBandit, uniform_means, uniform_targets
from rl2_torchrl.testing import _RULES, TrialContractError, check_tensor_env, check_trial_env


def bandit(*behind, trial=None, tasks=None, batch_size=(4,), previous=None, cls=BernoulliBandit):
    trial = Trial(episodes=3) if trial is None else trial
    tasks = TaskSampler(uniform_means(3), seed=0) if tasks is None else tasks
    previous = PreviousStep() if previous is None else previous
    return TransformedEnv(cls(3, batch_size=batch_size, seed=0), Compose(trial, tasks, previous, *behind))


def counting(*behind, trial=None, tasks=(1, 2, 3, 4, 5), previous=None, **kwargs):
    trial = Trial(episodes=2) if trial is None else trial
    previous = PreviousStep() if previous is None else previous
    return TransformedEnv(CountingEnv((3,), **kwargs), Compose(trial, lengths(*tasks), previous, *behind))


def uniform(size, generator):
    return torch.rand(*size, 1, generator=generator)


def pendulum(seed=0, *, sampler=TaskSampler):
    def set_gravity(env, task):
        env.g = 10 * float(task)

    env = GymTaskEnv("Pendulum-v1", set_task=set_gravity, task_spec=Unbounded((1,)), max_episode_steps=4)
    return TransformedEnv(env, Compose(Trial(episodes=2), sampler(uniform, seed=seed), PreviousStep()))


def cartpole(*transforms, make=GymEnv):
    return TransformedEnv(make("CartPole-v1"), Compose(Trial(episodes=2), *transforms))


# ---- Sound envs.

SOUND = {
    "bandit": bandit,
    "one bandit": lambda: bandit(batch_size=()),
    "bandits in two dimensions, truncated": lambda: bandit(batch_size=(2, 3), trial=Trial(steps=3, truncate=True)),
    "continuous bandit": lambda: TransformedEnv(
        QuadraticBandit(2, batch_size=(4,)),
        Compose(Trial(episodes=3), TaskSampler(uniform_targets(2)), PreviousStep(done_at_start=1.0)),
    ),
    "episodes of unequal length": counting,
    "nested observations": lambda: counting(nested=True, discrete=True),
    "an observation overwritten later": lambda: counting(ObservationNorm(loc=1.0, scale=2.0, in_keys=["count"])),
    "pendulum with tasks": pendulum,
    "workers inside": lambda: TransformedEnv(
        SerialEnv(2, lambda: BernoulliBandit(3, batch_size=(2,))),
        Compose(Trial(episodes=3), TaskSampler(uniform_means(3)), PreviousStep()),
    ),
    "workers around": lambda: SerialEnv(2, pendulum, create_env_kwargs=[{"seed": 0}, {"seed": 1}]),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_env_passes(name):
    check_trial_env(SOUND[name]())


@pytest.mark.parametrize("num_workers", [None, 2])
def test_env_without_tasks_passes_when_it_is_on_purpose(num_workers):
    make = GymEnv if num_workers is None else lambda name: SerialEnv(num_workers, lambda: GymEnv(name))
    check_trial_env(cartpole(PreviousStep(), make=make), task_key=None)
    check_trial_env(cartpole(make=make), task_key=None, in_key=None)


def test_two_possible_tasks_are_not_mistaken_for_equal_rows():
    def coin(size, generator):
        return torch.randint(2, (*size, 1), generator=generator).float().expand(*size, 3)

    for seed in range(2):
        check_trial_env(bandit(tasks=TaskSampler(coin, seed=seed), batch_size=(2,)))
        check_trial_env(bandit(tasks=TaskSampler(coin, seed=seed), batch_size=()))


@pytest.mark.parametrize("rows", [1, 2, 16])
def test_rare_tasks_are_not_mistaken_for_equal_ones(rows):
    def users(size, generator):
        return (torch.rand(*size, 1, generator=generator) < 0.02).float().expand(*size, 3)

    for seed in range(3):
        check_trial_env(bandit(tasks=TaskSampler(users, seed=seed), batch_size=(rows,)))


class Forgetful(BernoulliBandit):
    """Plays one task, whatever it is given."""

    def begin(self, task, rows):
        return super().begin(task * 0 + 0.5, rows)


def test_a_single_task_is_told_of(caplog):
    one = TaskSampler(lambda size, generator: torch.ones(*size, 3))
    check_trial_env(bandit(tasks=one, cls=Forgetful))
    assert "all tasks of 8 resets were the same: whether the env hears its task is not checked" in caplog.text


def test_groups_of_rows_may_play_one_task_on_purpose():
    def groups(size, generator):
        return torch.rand(size.numel(), 3, generator=generator)[torch.arange(size.numel()) // 4 * 4]

    check_trial_env(bandit(tasks=TaskSampler(groups), batch_size=(16,)))


def test_no_more_tasks_are_asked_for_at_once_than_there_are_rows():
    tasks = torch.rand(20, 3)

    def different(size, generator):
        return tasks[torch.multinomial(torch.ones(20), size.numel(), generator=generator)]

    check_trial_env(bandit(tasks=TaskSampler(different), batch_size=(16,)))


class Deck:
    """A list of tasks, each dealt once before any comes again."""

    def __init__(self):
        self.tasks, self.left = torch.rand(100, 3), torch.empty(0, dtype=torch.int64)

    def __call__(self, size, generator):
        while len(self.left) < size.numel():
            self.left = torch.cat([self.left, torch.randperm(100, generator=generator)])
        dealt, self.left = self.left[: size.numel()], self.left[size.numel() :]
        return self.tasks[dealt].reshape(*size, 3)


def test_tasks_without_replacement_follow_their_seed():
    for rows in (5, 8, 64):
        deck = Deck()
        check_trial_env(bandit(tasks=TaskSampler(deck, seed=0), batch_size=(rows,)))
        assert len(deck.left)
    deck.lock = threading.Lock()  # which cannot be copied
    check_trial_env(bandit(tasks=TaskSampler(deck, seed=0)))


def test_one_task_by_chance_is_not_mistaken_for_a_leak():
    # Both trials played have task 0, as the previous action has many zeros; later draws differ.
    tasks = torch.tensor([[0.0, 0.0, 0.0]] * 8 + [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    check_trial_env(bandit(trial=Trial(steps=1), tasks=TaskSampler.fixed(tasks), batch_size=()), num_trials=1)


def test_env_is_left_usable():
    env = counting()
    check_trial_env(env)
    assert env.rollout(20)["next", "done"].any()


def test_checked_envs_draw_as_others_do():
    generators = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        for _ in range(2):
            env, tasks = BernoulliBandit(3, batch_size=(4,)), TaskSampler(uniform_means(3))
            check_tensor_env(env, uniform_means(3))
            check_trial_env(TransformedEnv(env, Compose(Trial(episodes=3), tasks, PreviousStep())))
            assert env.given_seed is None  # a setting, which a checkpoint compares
            generators += [env.generator, tasks.generator]
    assert len({tuple(generator.get_state().tolist()) for generator in generators}) == len(generators)


def test_a_checked_env_is_seeded_as_it_was_made():
    env, other = (BernoulliBandit(3, batch_size=(4,), seed=7) for _ in range(2))
    check_tensor_env(env, uniform_means(3))
    assert torch.equal(env.generator.get_state(), other.generator.get_state())
    tasks = TaskSampler(uniform_means(3), seed=0)
    check_trial_env(TransformedEnv(env, Compose(Trial(episodes=3), tasks, PreviousStep())))
    assert torch.equal(env.generator.get_state(), other.generator.get_state())
    assert env.given_seed == 7


# ---- Unsound envs, each of which breaks one rule.


class Meddle(Transform):
    """Lets ``after`` and ``first`` change what a step and a reset return."""

    def __init__(self, after=None, first=None):
        super().__init__()
        self.after, self.first = after, first

    def _step(self, tensordict, next_tensordict):
        if self.after is not None:
            self.after(tensordict, next_tensordict)
        return next_tensordict

    def _reset(self, tensordict, tensordict_reset):
        if self.first is not None:
            self.first(tensordict_reset)
        return tensordict_reset


def put(key, value):
    """Sets ``key`` to ``value(root, next)`` in what a step returns."""
    return Meddle(lambda root, after: after.set(key, value(root, after)))


def put_first(key, value):
    return Meddle(first=lambda first: first.set(key, value(first)))


def with_entry(trans, index, value):
    trans = trans.clone()
    trans[..., index] = value
    return trans


class SeenTask(Transform):
    """A task among the observations that the env below knows nothing of."""

    def _reset(self, tensordict, tensordict_reset):
        return tensordict_reset.set("task", torch.zeros(1))

    def _step(self, tensordict, next_tensordict):
        return next_tensordict.set("task", torch.zeros(1))

    def transform_observation_spec(self, observation_spec):
        observation_spec["task"] = Unbounded((1,))
        return observation_spec


class OwnCounter(Transform):
    """Counts the trial's steps in itself in place of the TensorDict: right until one row is reset alone."""

    def _reset(self, tensordict, tensordict_reset):
        self.steps = 0
        return tensordict_reset

    def _step(self, tensordict, next_tensordict):
        self.steps += 1
        return next_tensordict.set("trial_step", torch.full_like(next_tensordict["trial_step"], self.steps))


class RedrawsAllTasks(TransformedEnv):
    def maybe_reset(self, tensordict):
        any_done = tensordict["done"].any()
        tensordict = super().maybe_reset(tensordict)
        return tensordict.set("task", torch.rand(4, 3)) if any_done else tensordict


class BetweenSteps(TransformedEnv):
    """Every step is right in itself, but the next one of the trial does not start from what it left."""

    def maybe_reset(self, tensordict):
        tensordict = super().maybe_reset(tensordict)
        inside, value = tensordict["trial_step"] > 0, tensordict[self.spoilt]
        spoilt = value / 2 if value.is_floating_point() else value + 1
        return tensordict.set(self.spoilt, torch.where(inside, spoilt, value))


def between_steps(key):
    transforms = Compose(Trial(episodes=3), TaskSampler(uniform_means(3)), PreviousStep())
    env = BetweenSteps(BernoulliBandit(3, batch_size=(4,), seed=0), transforms)
    env.spoilt = key
    return env


class WhateverTheSeed:
    """Tasks in one order for every generator, its seed ignored."""

    def __init__(self):
        self.calls = {}

    def __call__(self, size, generator):
        self.calls[generator] = self.calls.get(generator, 0) + 1
        return (torch.arange(3.0 * size.numel()).reshape(*size, 3) + self.calls[generator]) / 100


class PaysNoNumber(BernoulliBandit):
    """Rows that draw nothing but NaN are no rows that draw the same."""

    def advance(self, state, action):
        state, observation, reward, *ends = super().advance(state, action)
        return state, observation, reward * NAN, *ends


def twins(size, generator):
    return torch.rand(3, generator=generator).expand(*size, 3)


NAN, FALSE = float("nan"), lambda root, after: torch.zeros_like(after["done"])
UNSOUND = [
    ("trial_counters", lambda: TransformedEnv(BernoulliBandit(3, batch_size=(4,)), TaskSampler(uniform_means(3)))),
    ("task_present", lambda: cartpole(PreviousStep())),
    ("task_in_state_spec", lambda: cartpole(SeenTask(), PreviousStep())),
    ("trans_present", lambda: TransformedEnv(CountingEnv((3,)), Compose(Trial(episodes=2), lengths(1, 2)))),
    ("specs", lambda: bandit(put("time_left", lambda root, after: after["time_left"].double()))),
    ("specs", lambda: bandit(put("undeclared", lambda root, after: after["done"]))),
    ("trials_end", lambda: counting(tasks=(1, 1, 1000))),
    ("rewards_finite", lambda: bandit(put("reward", lambda root, after: torch.full_like(after["reward"], NAN)))),
    ("rewards_finite", lambda: bandit(cls=PaysNoNumber)),
    # A done at every episode's end, and none at all where the step ends a trial.
    ("done_at_trial_end", lambda: bandit(put("done", lambda root, after: after["episode_done"]))),
    ("done_at_trial_end", lambda: counting(put("done", lambda root, after: after["trial_step"] % 50 == 0))),
    ("terminated_at_done", lambda: bandit(put("terminated", lambda root, after: after["episode_done"]))),
    ("terminated_at_done", lambda: bandit(put("terminated", FALSE))),
    ("trial_step", lambda: bandit(put("trial_step", lambda root, after: root["trial_step"]))),
    ("trial_step", lambda: bandit(put_first("trial_step", lambda first: first["trial_step"] + 1))),
    (
        "episode_index",
        lambda: bandit(put("episode_index", lambda root, after: root["episode_index"]), trial=Trial(steps=3)),
    ),
    ("episode_index", lambda: bandit(put("episode_done", FALSE))),
    ("task_constant", lambda: bandit(put("task", lambda root, after: root["task"] / 2))),
    ("trial_step", lambda: between_steps("trial_step")),
    ("task_constant", lambda: between_steps("task")),
    ("trans_previous_step", lambda: between_steps("trans")),
    # The last entry of a trial alone.
    (
        "task_constant",
        lambda: bandit(put("task", lambda root, after: torch.where(after["done"], root["task"] / 2, root["task"]))),
    ),
    ("task_follows_seed", lambda: bandit(tasks=TaskSampler(WhateverTheSeed()))),
    ("task_changes", lambda: bandit(tasks=TaskSampler.fixed(torch.rand(4, 3)))),
    ("task_differs_by_row", lambda: bandit(tasks=TaskSampler(twins))),
    ("task_differs_by_row", lambda: SerialEnv(2, pendulum)),
    ("task_follows_seed", lambda: bandit(tasks=TaskSampler(lambda size, generator: torch.rand(*size, 3)))),
    # What known implementations get wrong: an episode's last reward is dropped; done is always 0.
    (
        "trans_previous_step",
        lambda: counting(
            put(
                "trans",
                lambda root, after: with_entry(
                    after["trans"], -2, (after["reward"] * ~after["episode_done"]).squeeze(-1)
                ),
            )
        ),
    ),
    ("trans_previous_step", lambda: bandit(put("trans", lambda root, after: with_entry(after["trans"], -1, 0)))),
    ("trans_previous_step", lambda: counting(RewardScaling(loc=0.0, scale=2.0))),
    ("trans_at_trial_start", lambda: bandit(put_first("trans", lambda first: with_entry(first["trans"], -2, 1)))),
    ("trans_at_trial_start", lambda: bandit(put_first("trans", lambda first: with_entry(first["trans"], 0, 1)))),
    ("trans_at_trial_start", lambda: counting(put_first("trans", lambda first: with_entry(first["trans"], 1, 1)))),
    ("partial_reset", lambda: bandit(OwnCounter())),
    (
        "partial_reset",
        lambda: RedrawsAllTasks(
            BernoulliBandit(3, batch_size=(4,)),
            Compose(Trial(episodes=3), TaskSampler(uniform_means(3)), PreviousStep()),
        ),
    ),
]


@pytest.mark.parametrize(("rule", "build"), UNSOUND)
def test_broken_rule_is_named(rule, build):
    with pytest.raises(TrialContractError) as raised:
        check_trial_env(build(), max_steps=300)
    assert raised.value.rule == rule
    # The rule, what was seen, why it matters and what to do.
    assert str(raised.value).startswith(f"rule {rule!r} is broken: ")
    assert str(raised.value).endswith(_RULES[rule])


def test_every_rule_has_an_env_that_breaks_it():
    assert {rule for rule, _ in UNSOUND} | {rule for _, rule, _ in BROKEN} == set(_RULES)


def test_place_of_a_broken_step_is_told():
    # Trials of three steps, two of them; the last but one reward of row 2 alone is wrong.
    def spoil(root, after):
        if (root["trial_step"] == 1).all():
            after["reward"][2] = NAN

    with pytest.raises(AssertionError, match="'rewards_finite' is broken: at row 2, step 1 of the trials played"):
        check_trial_env(bandit(Meddle(spoil)))


@pytest.mark.parametrize("bounds", [{"num_trials": 0}, {"max_steps": 0}])
def test_nothing_to_play(bounds):
    with pytest.raises(ValueError, match="must be a whole number, at least 1"):
        check_trial_env(bandit(), **bounds)
