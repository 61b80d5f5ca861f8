"""`Rollout`: with the same noise its batches are those of TorchRL's `Collector` over the transforms, whatever env it plays."""

import math

import pytest
import torch
from rollouts import (
    assert_same,
    batches_of,
    both,
    make_env,
    make_policy,
    named,
    same_noise,
)
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.data import Unbounded
from torchrl.envs import (
    InitTracker,
    RewardSum,
    StepCounter,
    TensorDictPrimer,
)

from rl2_torchrl import (
    TrialCollector,
)
from rl2_torchrl.rollout.rollout import _steps_at_once

CASES = [
    # Native envs of one length: whole trials, several trials, and batches that cut them.
    ("bandit", {"episodes": 10}, 10),
    ("bandit", {"episodes": 4, "done_at_start": 1.0}, 8),
    ("bandit", {"episodes": 10}, 7),
    ("bandit", {"episodes": 4, "truncate": True}, 6),
    ("bandit", {"steps": 3}, 7),
    ("mdp", {"episodes": 3}, 15),
    ("mdp", {"episodes": 3, "steps": 8}, 20),
    ("mdp", {"steps": 8}, 7),
    ("mdp", {"episodes": 2, "truncate": True}, 7),
    ("mdp 2x3", {"episodes": 2}, 7),
    ("grid", {"episodes": 2}, 8),
    ("grid", {"episodes": 3, "steps": 10}, 7),
    # Ragged ones.
    ("guess", {"episodes": 3}, 9),
    ("guess", {"episodes": 1, "done_at_start": 1.0}, 9),
    ("guess", {"steps": 7}, 9),
    ("guess", {"episodes": 3, "steps": 7}, 9),
    ("guess", {"episodes": 2, "truncate": True}, 9),
    ("guess alone", {"episodes": 3}, 9),
    ("guess 2x3", {"episodes": 3, "steps": 9}, 9),
    ("walk", {"episodes": 2}, 9),
    ("walk", {"episodes": 3, "steps": 7, "truncate": True}, 9),
    # Gymnasium's, one by one.
    ("cart pole", {"episodes": 2}, 25),
    ("cart pole", {"episodes": 2, "steps": 17}, 20),
]


@pytest.mark.parametrize(("name", "trial", "steps"), CASES, ids=named)
def test_batches_of_discrete_actions_are_collectors(name, trial, steps):
    wiring = "memory" if "steps" in trial else "own"
    (fast, ours), (_, theirs) = both(lambda: make_env(name, **trial), steps, lambda env: make_policy(env, wiring))
    assert fast.reason is None
    assert_same(ours, theirs)


CONTINUOUS = [
    ("quadratic", {"episodes": 4}, 8),
    ("quadratic", {"steps": 4, "done_at_start": 1.0}, 6),
    ("point", {"episodes": 2}, 9),
    ("point", {"episodes": 3, "steps": 8, "truncate": True}, 7),
    ("cheetah", {"episodes": 2}, 6),
    ("pendulum", {"episodes": 2}, 7),
    ("pendulum", {"steps": 7}, 9),
    ("pendulum alone", {"episodes": 2}, 7),
]


@pytest.mark.parametrize("still", [True, False], ids=["noise alone", "networks"])
@pytest.mark.parametrize(("name", "trial", "steps"), CONTINUOUS, ids=named)
def test_batches_of_continuous_actions_are_collectors(name, trial, steps, still):
    (fast, ours), (_, theirs) = both(lambda: make_env(name, **trial), steps, lambda env: make_policy(env, still=still))
    assert fast.reason is None
    assert_same(ours, theirs, is_exact=still)


@pytest.mark.parametrize("keep", [None, ["trans", "action"]], ids=["all", "some"])
@pytest.mark.parametrize(
    ("name", "trial", "steps"),
    [
        ("bandit", {"episodes": 4}, 6),
        ("mdp", {"episodes": 3, "steps": 8}, 20),
        ("guess", {"episodes": 3, "steps": 7}, 9),
        ("guess 2x3", {"episodes": 2, "truncate": True, "done_at_start": 1.0}, 9),
        ("walk", {"episodes": 2}, 9),
        ("cart pole", {"episodes": 2, "steps": 17}, 20),
    ],
    ids=named,
)
def test_the_transition_input_may_show_the_trials_counters(name, trial, steps, keep):
    shown = ["time_left", "episode_done", "episode_index", "trial_step"]
    env = make_env(name, **trial)
    observed = list(env.transform[-1].layout().observations)
    (fast, ours), (_, theirs) = both(lambda: make_env(name, obs_keys=[*observed, *shown], **trial), steps, keep=keep)
    assert fast.reason is None
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["bandit", "guess"])
def test_a_distribution_may_draw_into_the_same_memory(name):
    def make():
        env = make_env(name, episodes=3)
        sampler = env.transform[1]
        draw, memory = sampler.distribution, sampler.draw()
        sampler.distribution = lambda size, generator: memory[: size.numel()].copy_(draw(size, generator))
        return env

    (_, ours), (_, theirs) = both(make, 9)
    assert_same(ours, theirs)


@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("length", [3, 7])
def test_episodes_may_get_another_length(length, after):
    """As in a curriculum; batches of 6 steps cut episodes of 5."""
    results = []
    for rollout in ("tensors", "tensordicts"):
        env = make_env("mdp", episodes=2)
        collector = TrialCollector(env, make_policy(env), frames_per_batch=24, total_frames=-1, rollout=rollout)
        torch.manual_seed(7)
        with same_noise():
            results.append([collector.rollout().clone() for _ in range(after)])
            env.base_env.max_episode_steps = length
            results[-1] += [collector.rollout().clone() for _ in range(4)]
    assert_same(*results)


def test_batches_in_which_trials_begin_and_others_in_which_none_does():
    # Trials of 8 steps in batches of 3: the task of a batch is now one, now two.
    (_, ours), (_, theirs) = both(lambda: make_env("bandit", episodes=8), 3, batches=9, keep=["task", ("next", "task")])
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["guess", "walk", "cart pole", "mdp"])
def test_further_transforms_play_on_tensordicts_and_say_so(name):
    def make():
        return make_env(name, StepCounter(), RewardSum(), episodes=2)

    (fast, ours), (_, theirs) = both(make, 9)
    assert "StepCounter, RewardSum beside our transforms" in fast.reason
    assert_same(ours, theirs)


OF_COLLECTORS = {
    "primer": lambda: TensorDictPrimer(context=Unbounded(3), default_value=1.0, expand_specs=True),
    "tracker": lambda: InitTracker(init_key="begins"),
}


@pytest.mark.parametrize("kind", OF_COLLECTORS)
@pytest.mark.parametrize("name", ["guess", "walk"])
def test_primers_and_trackers_of_a_users_own_do_what_they_say(name, kind):
    key = {"primer": "context", "tracker": "begins"}[kind]

    def policy(env):
        return TensorDictSequential(make_policy(env), TensorDictModule(lambda value: 2 * value, [key], ["twice"]))

    def make():
        return make_env(name, OF_COLLECTORS[kind](), episodes=2)

    (fast, ours), (_, theirs) = both(make, 9, policy)
    assert "beside our transforms" in fast.reason
    assert_same(ours, theirs)
    (fast, ours), (_, theirs) = both(make, 9, keep=["trans", "action"])  # nobody asks for it
    assert fast.reason is None
    assert_same(ours, theirs)


def test_batches_over_workers_are_those_of_envs_one_by_one():
    results = []
    for name, rollout in (("workers", "tensors"), ("pendulum", "tensordicts")):
        env = make_env(name, episodes=2)
        results.append(batches_of(env, make_policy(env, still=True), 7, rollout)[1])
    assert_same(*results)


@pytest.mark.parametrize(
    ("entries", "steps"), [([], math.inf), ([(64,)], 4096), ([(64,), (300,)], 512), ([(3, 84, 84)], 512)]
)
def test_large_entries_do_not_wait_for_long(entries, steps):
    """Of four rows: what caches hold of 2^14 steps of rows is 2^24 bytes, 1,024 a row."""
    assert _steps_at_once([torch.zeros(4, *shape) for shape in entries]) == steps
