"""TorchRL's transforms beside ours: each plays as in TorchRL's Collector and replays exactly, or is refused with a reason."""

from itertools import product

import pytest
import torch
from env_check_cases import Doubles, drifts
from rollouts import assert_same, batches_of, both, make_policy, same_noise, set_length
from torchrl.data import Unbounded
from torchrl.envs import CatFrames, Compose, DoubleToFloat, ObservationNorm, RewardScaling, TransformedEnv, VecNormV2

from rl2_torchrl import PPOUpdate, PreviousStep, RL2PPOLoss, TaskSampler, Trial, TrialCollector, adaptation_curve
from rl2_torchrl.envs import GymVectorEnv
from rl2_torchrl.testing import TrialContractError, check_trial_env


def lengths(batch_size, generator):
    return 0.25 + torch.rand(*batch_size, 1, generator=generator)


def cart_poles(before, behind):
    base = GymVectorEnv("CartPole-v1", 3, set_task=set_length, task_spec=Unbounded(1), seed=0)
    ours = [Trial(steps=20), TaskSampler(lengths, seed=1), *before, PreviousStep(), *behind]
    return TransformedEnv(base, Compose(*ours))


def doubles(before, behind):
    ours = [Trial(steps=20), TaskSampler(drifts, seed=1), *before, PreviousStep(), *behind]
    return TransformedEnv(Doubles(), Compose(*ours))


def norm(key):
    return ObservationNorm(loc=1.0, scale=2.0, in_keys=[key])


def scaled():
    return RewardScaling(loc=0.0, scale=2.0)


#: Name: env, and the rule by which it is refused, if it is.
GRID = {
    "ObservationNorm of observations, before": (lambda: cart_poles([norm("observation")], []), None),
    "ObservationNorm of observations, behind": (lambda: cart_poles([], [norm("observation")]), None),
    "ObservationNorm of the input": (lambda: cart_poles([], [norm("trans")]), "trans_previous_step"),
    "CatFrames of observations, before": (
        lambda: cart_poles([CatFrames(N=3, dim=-1, in_keys=["observation"])], []),
        None,
    ),
    "CatFrames of observations, behind": (
        lambda: cart_poles([], [CatFrames(N=3, dim=-1, in_keys=["observation"])]),
        None,
    ),
    "CatFrames of the input": (lambda: cart_poles([], [CatFrames(N=3, dim=-1, in_keys=["trans"])]), None),
    "RewardScaling, before": (lambda: cart_poles([scaled()], []), None),
    "RewardScaling, behind": (lambda: cart_poles([], [scaled()]), "trans_previous_step"),
    "DoubleToFloat, before": (lambda: doubles([DoubleToFloat(in_keys=["place"])], []), None),
    "DoubleToFloat, behind": (lambda: doubles([], [DoubleToFloat(in_keys=["place"])]), None),
    "VecNormV2 of observations, before": (lambda: cart_poles([VecNormV2(in_keys=["observation"])], []), None),
    "VecNormV2 of observations, behind": (lambda: cart_poles([], [VecNormV2(in_keys=["observation"])]), None),
    "VecNormV2 of the input": (lambda: cart_poles([], [VecNormV2(in_keys=["trans"])]), "trans_previous_step"),
    "VecNormV2 of rewards, before": (lambda: cart_poles([VecNormV2(in_keys=["reward"])], []), None),
    "VecNormV2 of rewards, behind": (lambda: cart_poles([], [VecNormV2(in_keys=["reward"])]), "trans_previous_step"),
}


@pytest.mark.parametrize("name", GRID)
def test_batches_are_collectors(name):
    (fast, ours), (_, theirs) = both(GRID[name][0], 10, lambda env: make_policy(env, still=True))
    assert "beside our transforms" in fast.reason
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", GRID)
def test_it_passes_the_check_or_is_refused_with_a_reason(name):
    make, rule = GRID[name]
    if rule is None:
        check_trial_env(make())
        return
    with pytest.raises(TrialContractError, match="put PreviousStep behind reward changes") as raised:
        check_trial_env(make())
    assert raised.value.rule == rule


@pytest.mark.parametrize("name", [name for name in GRID if GRID[name][1] is None])
def test_the_first_ratio_is_one_though_statistics_run_on(name):
    env = GRID[name][0]()
    policy = make_policy(env)
    collector = TrialCollector(env, policy, frames_per_batch=10 * env.batch_size.numel(), total_frames=-1)
    update = PPOUpdate(RL2PPOLoss(policy.actor, policy.critic), bptt=5, epochs=1, minibatches=1)
    for _, batch in zip(range(4), collector, strict=False):
        metrics = update(
            batch
        )  # one step of the optimizer a batch: all ratios are those of the networks that collected it
        assert metrics["max_ratio"] == pytest.approx(1, abs=1e-5)
        assert metrics["kl_approx"] == pytest.approx(0, abs=1e-6)
    collector.shutdown()


@pytest.mark.parametrize("name", [name for name in GRID if GRID[name][1] is None])
def test_it_is_evaluated_as_it_is_collected(name):
    trained, envs = GRID[name][0](), [GRID[name][0]() for _ in range(2)]
    trained.rollout(30, break_when_any_done=False)
    policy = make_policy(trained, still=True)
    statistics = [n for n, transform in enumerate(trained.transform) if isinstance(transform, VecNormV2)]
    if statistics:
        with pytest.raises(ValueError, match=r"VecNormV2 is not frozen.*frozen_copy\(\)"):
            adaptation_curve(trained, policy, 3)
    for env, n in product(envs, statistics):
        env.transform[n].load_state_dict(trained.transform[n].state_dict())
        env.transform[n].freeze()
    _, (batch,) = batches_of(envs[0], policy, 20, "tensordicts", batches=1)  # one trial a row
    inputs = []
    torch.manual_seed(7)
    with same_noise():
        curve = adaptation_curve(envs[1], policy, len(batch), on_step=lambda step: inputs.append(step["trans"].clone()))
    torch.testing.assert_close(torch.stack(inputs, 1), batch["trans"], rtol=0, atol=0)
    torch.testing.assert_close(curve.trial_returns, batch["next", "reward"].double().sum((1, 2)), rtol=0, atol=1e-9)
    for env, n in product(envs, statistics):
        torch.testing.assert_close(env.transform[n].state_dict(), trained.transform[n].state_dict(), rtol=0, atol=0)


def test_a_frozen_copy_made_anew_shows_an_evaluation_the_trainings_scale():
    statistics = VecNormV2(in_keys=["observation"])
    trained = cart_poles([statistics], [])
    policy = make_policy(trained, still=True)
    with pytest.raises(ValueError, match=r"each evaluation make its env anew, with the training's \.frozen_copy\(\)"):
        adaptation_curve(trained, policy, 3)
    for _ in range(2):
        trained.rollout(30, break_when_any_done=False)
        mean = statistics.loc["observation"].clone()
        env = cart_poles([statistics.frozen_copy()], [])
        adaptation_curve(env, policy, 3)
        for each in (statistics, env.transform[2]):
            assert torch.equal(each.loc["observation"], mean)


def test_the_input_is_made_of_what_stands_before_it_by_hand():
    env = cart_poles([norm("observation"), scaled()], [])
    plain = cart_poles([], [])
    torch.manual_seed(0)
    actions = [env.action_spec.rand() for _ in range(8)]
    batches = []
    for each in (env, plain):
        tensordict, inputs = each.reset(), []
        for action in actions:
            inputs.append(tensordict["trans"])
            _, tensordict = each.step_and_maybe_reset(tensordict.set("action", action))
        batches.append(torch.stack(inputs, 1))
    changed, raw = batches
    torch.testing.assert_close(changed[..., :4], 2 * raw[..., :4] + 1)
    assert torch.equal(changed[..., -2], 2 * raw[..., -2])
    assert torch.equal(changed[..., 4:6], raw[..., 4:6])
