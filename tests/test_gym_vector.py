"""`GymVectorEnv`: batches are those of TorchRL's `Collector`; seeds, and actions beyond the bounds."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import NormalizeObservation, NormalizeReward, TimeLimit
from gymnasium.wrappers.vector import NormalizeReward as VectorNormalizeReward
from line_envs import (
    FORMS,
    SYNC_AND_ASYNC,
    Hidden,
    Line,
    lines,
    right,
    set_goals,
    theirs,
    trials,
    vector,
    with_task,
)
from rollouts import assert_same, batches_of, both, make_policy
from torchrl.data import Unbounded

from rl2_torchrl import TrialCollector, adaptation_curve
from rl2_torchrl.envs import GymVectorEnv
from rl2_torchrl.testing import check_trial_env

# ---- Batches are those of TorchRL's Collector over the same transforms.


@pytest.mark.parametrize("name", FORMS)
def test_batches_are_collectors(name):
    (fast, ours), (_, expected) = both(FORMS[name], 25, lambda env: make_policy(env, still=True))
    assert fast.reason is None
    assert_same(ours, expected)
    assert ours[0]["next", "episode_done"].any()
    assert not ours[-1]["is_init"][:, 0].all()  # a batch goes on in the middle of trials


def collected(make, **kwargs):
    env = make()
    _, batches = batches_of(env, make_policy(env, still=True), 25, "tensors", **kwargs)
    return batches


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: trials(lines(info_keys=["says"])), lambda: trials(lines(info_keys=["says"], vectorization="async"))),
        (FORMS["pendulum"], FORMS["pendulum in processes"]),
        (FORMS["lines, disabled"], FORMS["lines"]),
    ],
    ids=["lines in processes", "pendulum in processes", "their vector env"],
)
def test_all_forms_play_the_same(one, other):
    assert_same(collected(one), collected(other))


def test_a_vector_env_that_resets_itself_plays_the_same():
    def told(make):
        # It draws in resets that a new task makes void: the random number is another.
        keys = [
            "action",
            "task",
            "is_init",
            "episode_index",
            ("next", "reward"),
            ("next", "done"),
            ("next", "truncated"),
        ]
        keys += [("info", "steps"), ("next", "info", "steps"), ("next", "info", "says")]
        return [b.select(*keys).set("place", b["next", "observation"][..., :2].clone()) for b in collected(make)]

    assert_same(told(FORMS["lines, disabled"]), told(FORMS["lines, same step"]))


def test_a_curve_of_adaptation_and_the_check_work_on_it():
    env = trials(lines(4, make=Hidden), episodes=2)
    check_trial_env(env)
    curve = adaptation_curve(env, make_policy(env), num_trials=10)
    assert curve.returns.shape == (10, 2)
    assert (curve.returns >= 1).all()


@SYNC_AND_ASYNC
def test_statistics_of_gymnasiums_wrappers_are_to_stand_still_in_an_evaluation(vectorization):
    def make():
        return TimeLimit(NormalizeReward(NormalizeObservation(Hidden())), 3)

    env = trials(lines(2, make=make, vectorization=vectorization), episodes=2)
    policy = make_policy(env)
    with pytest.raises(ValueError, match="NormalizeReward and NormalizeObservation, whose statistics begin anew"):
        adaptation_curve(env, policy, 2)
    env.base_env.close()

    def still():
        env = NormalizeReward(Hidden())
        env.update_running_mean = False
        return env

    adaptation_curve(trials(lines(2, make=still, vectorization=vectorization), episodes=2), policy, 2)


@pytest.mark.parametrize("of_rows", [False, True])
def test_statistics_of_a_vector_env_of_ones_own_are_to_stand_still(of_rows):
    make = (lambda: NormalizeReward(Line())) if of_rows else Line
    envs = vector(AutoresetMode.SAME_STEP, make=make)
    envs = GymVectorEnv(envs if of_rows else VectorNormalizeReward(envs), set_task=set_goals, task_spec=Unbounded(1))
    env = trials(envs, episodes=2)
    assert env.base_env.moving_statistics(of_rows=True) == ["NormalizeReward"] * of_rows
    with pytest.raises(ValueError, match="Gymnasium.s NormalizeReward, whose"):
        adaptation_curve(env, make_policy(env), 2)


# ---- Seeds.


@SYNC_AND_ASYNC
def test_a_seed_repeats_a_run_and_rows_differ(vectorization):
    def noise(env, seed):
        env.set_seed(seed)
        return torch.stack([env.reset(with_task(env, 3.0, 3.0, 3.0))["observation"][:, 2] for _ in range(2)])

    env, other = lines(vectorization=vectorization), lines(vectorization=vectorization)
    before = torch.get_rng_state()
    first = noise(env, 5)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(first.unique()) == first.numel()
    assert torch.equal(noise(env, 5), first)
    assert torch.equal(noise(other, 5), first)
    assert not torch.equal(noise(env, 6), first)
    env.close()
    other.close()


def test_a_seed_repeats_a_run_of_a_vector_env_that_resets_itself():
    env = theirs(AutoresetMode.SAME_STEP)
    found = []
    for _ in range(2):
        env.set_seed(3)
        first = env.reset(with_task(env, 1.0, 1.0, 1.0))
        found.append(first["observation"].clone())
        env.step(first.set("action", right(env)))  # all rows end, and have begun again with the same task
    assert torch.equal(*found)


def test_without_a_seed_pytorchs_generator_seeds():
    def first(seed):
        torch.manual_seed(seed)
        env = GymVectorEnv(Line, 2)
        return env.reset()["observation"]

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


# ---- Actions beyond the bounds.


def test_actions_are_clipped_on_their_way_and_their_log_probability_is_that_of_the_drawn_one():
    taken = []

    class Bounded(gymnasium.Env):
        observation_space, action_space = spaces.Box(-1, 1, (1,)), spaces.Box(-0.1, 0.2, (2,))

        def reset(self, *, seed=None, options=None):
            return np.zeros(1, np.float32), {}

        def step(self, action):
            assert self.action_space.contains(action)
            taken.append(action.tolist())
            return np.zeros(1, np.float32), 0.0, False, False, {}

    env = trials(GymVectorEnv(Bounded, 2, seed=0), None, steps=4)
    policy = make_policy(env)
    collector = TrialCollector(env, policy, frames_per_batch=8, total_frames=8)
    (batch,) = collector
    drawn = batch["action"]
    assert (drawn.abs() > 0.2).any()
    clipped = drawn.transpose(0, 1).flatten(0, 1).clamp(torch.tensor(-0.1), torch.tensor(0.2))
    assert torch.equal(torch.tensor(taken), clipped)
    normal = torch.distributions.Normal(batch["loc"], batch["scale"])
    torch.testing.assert_close(batch["action_log_prob"], normal.log_prob(drawn).sum(-1))
    assert torch.equal(batch["trans"][:, 1:, 1:3], drawn[:, :-1])
    collector.shutdown()
