import math

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import Compose, TransformedEnv

from rl2_torchrl import (
    ActorCritic,
    GRUValueHead,
    PPOUpdate,
    PreviousStep,
    RecurrentActor,
    RL2PPOLoss,
    TaskSampler,
    TrainingCheckError,
    Trial,
    TrialAdvantage,
    TrialCollector,
    adaptation_curve,
    check_training,
    train,
)
from rl2_torchrl.envs import PointRobot, TensorEnv, goals_on_half_circle
from rl2_torchrl.modules import RunningNorm


def points(rows=8, seed=0):
    transforms = Compose(Trial(episodes=2), TaskSampler(goals_on_half_circle(), seed=seed), PreviousStep())
    return TransformedEnv(PointRobot(batch_size=(rows,)), transforms)


def training(backend="auto", bptt=20, **options):
    torch.manual_seed(0)
    env = points()
    networks = {"hidden_size": 8, "normalize": True, **options}
    actor, critic = RecurrentActor.from_env(env, **networks), GRUValueHead.from_env(env, **networks)
    policy = ActorCritic(actor, critic)
    advantage = TrialAdvantage(critic=policy, value_target="gae", scale_rewards=True)
    update = PPOUpdate(
        RL2PPOLoss(actor, critic), advantage, bptt=bptt, epochs=1, minibatches=1, lr=1e-2, backend=backend
    )
    return TrialCollector(env, policy, frames_per_batch=8 * 40, total_frames=-1, keep=update.in_keys), update


def norms(module):
    return [each for each in module.modules() if isinstance(each, RunningNorm)]


# ----------------------------------------------------------------- the module
def test_statistics_are_those_of_all_data():
    torch.manual_seed(0)
    data = torch.randn(5, 7, 4, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 1e3, 2.0]) + 1e4
    norm = RunningNorm(4, [True, True, True, False])
    for part in data.split([1, 3, 1]):
        norm.update_statistics(part)
    flat = data.flatten(0, 1)
    torch.testing.assert_close(norm.mean, flat.mean(0))
    torch.testing.assert_close(norm.std, flat.std(0, correction=0))
    expected = (flat - flat.mean(0)) / flat.std(0, correction=0)
    expected[:, 3] = flat[:, 3]
    torch.testing.assert_close(norm(flat), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_whole_numbers_are_normalised_as_the_reals_they_are(dtype):
    data = torch.tensor([[0, 100], [1, 200], [1, 120]]).to(dtype)
    norm = RunningNorm(2)
    torch.testing.assert_close(norm(data), data.float())
    norm.update_statistics(data)
    torch.testing.assert_close(norm(data), norm(data.float()))


def test_before_the_first_data_nothing_changes():
    x = torch.randn(3, 2) * 100
    assert torch.equal(RunningNorm(2)(x), x)


def test_bounds_and_what_does_not_vary():
    norm = RunningNorm(3, [True, True, False], clip=2.0)
    norm.update_statistics(torch.tensor([[0.0, 5.0, 1.0], [2.0, 5.0, 1.0]]))
    assert norm(torch.tensor([9.0, 6.0, 99.0])).tolist() == [2.0, 1.0, 99.0]


def test_bad_input():
    with pytest.raises(ValueError, match="one flag an entry"):
        RunningNorm(3, [True])
    with pytest.raises(FloatingPointError, match="not finite"):
        RunningNorm(1).update_statistics(torch.tensor([[math.nan]]))
    norm = RunningNorm(2, [True, False])  # what passes as it is may be infinite
    norm.update_statistics(torch.tensor([[1.0, math.inf], [3.0, 0.0]]))
    assert norm(torch.tensor([3.0, math.inf])).tolist() == [1.0, math.inf]
    with pytest.raises(ValueError, match="say each entry's shape"):
        GRUValueHead(6, extra_keys=["time_left"], normalize=True)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_a_cast_policy_has_the_statistics_of_one_that_is_not(cast):
    torch.manual_seed(0)
    plain, changed = RunningNorm(2), nn.Sequential(RunningNorm(2))
    for _ in range(3):  # cast before any data, and in the middle; 90,000 is beyond float16's largest number
        getattr(changed, cast)()
        data = torch.randn(30_000, 2) * torch.tensor([1.0, 50.0]) + 300
        plain.update_statistics(data)
        changed[0].update_statistics(data)
    assert all(torch.equal(*pair) for pair in zip(plain.buffers(), changed.buffers(), strict=True))
    x = torch.tensor([[301.0, 350.0]], dtype={"half": torch.half, "bfloat16": torch.bfloat16}.get(cast))
    assert changed(x).dtype == x.dtype
    torch.testing.assert_close(changed(x), plain(x))
    assert {buffer.device.type for buffer in changed.to("meta", torch.half).buffers()} == {"meta"}


def test_what_is_normalised_of_an_env():
    class Seen(TensorEnv):
        def __init__(self):
            seen = Composite(choice=Categorical(3), number=Unbounded(2))
            super().__init__(task_spec=None, observation_spec=seen, action_spec=Categorical(2), batch_size=(2,))

        def begin(self, task, rows): ...
        def advance(self, state, action): ...

    env = TransformedEnv(Seen(), Compose(Trial(steps=3), PreviousStep()))
    for flag in (True, np.True_):
        [norm] = norms(RecurrentActor.from_env(env, normalize=flag))
        # One-hot choice, numbers, one-hot action, reward, done.
        assert norm.columns.tolist() == [False] * 3 + [True] * 2 + [False] * 2 + [True, False]
    assert not norms(RecurrentActor.from_env(env, normalize=np.False_))


# ----------------------------------------------------------------- in training
@pytest.mark.parametrize(("backend", "bptt"), [("parts", 20), ("autograd", 20)])
def test_the_first_ratio_is_1_and_statistics_move_between_updates(backend, bptt):
    collector, update = training(backend, bptt)
    batches = iter(collector)
    first = next(batches)
    assert update(first)["epochs"] == 0  # it is only measured
    one, other = norms(update.loss)
    torch.testing.assert_close(one.mean, first["trans"].double().mean((0, 1)))
    assert torch.equal(one.mean, other.mean)
    for _ in range(2):
        batch, before = next(batches), one.mean.clone()
        metrics = update(batch)
        assert update.backend == backend
        assert metrics["max_ratio"] == pytest.approx(1.0, abs=1e-5)
        assert not torch.equal(one.mean, before)
    assert one.count == 3 * 8 * 40


def test_an_evaluation_moves_nothing_and_a_checkpoint_holds_all():
    collector, update = training()
    batches = iter(collector)
    for _ in range(3):
        update(next(batches))
    state = {key: value.clone() for key, value in update.loss.state_dict().items()}
    adaptation_curve(points(4, seed=1), update.loss.actor_network, 8)
    assert all(torch.equal(value, state[key]) for key, value in update.loss.state_dict().items())
    _, other = training()
    other.load_state_dict(update.state_dict())
    for mine, theirs in zip(norms(update.loss), norms(other.loss), strict=True):
        assert torch.equal(mine.mean, theirs.mean)
        assert torch.equal(mine.std, theirs.std)
    batch = next(batches)
    mine, theirs = (each.advantage(batch.clone())["value_target"] for each in (update, other))
    assert torch.equal(mine, theirs)


def test_check_training_passes_and_sees_statistics_that_move_within_a_rollout():
    collector, update = training()
    batches = iter(collector)
    for _ in range(2):
        update(next(batches))
    check_training(collector, update)

    class Moving(RunningNorm):
        def step_function(self):
            step = super().step_function()

            def moving(x):
                self.update_statistics(x + 1.0)
                return step(x)

            return moving

    for norm in norms(update.loss):
        norm.__class__ = Moving
    with pytest.raises(TrainingCheckError):
        check_training(collector, update)


# -------------------------------------------------------------- scaled rewards
def test_rewards_are_scaled_by_the_returns_of_batches_before():
    def batch(reward):
        done = torch.tensor([[False, True], [False, True]]).unsqueeze(-1)
        reward = torch.tensor(reward).unsqueeze(-1)
        following = {"reward": reward, "done": done, "terminated": done}
        return TensorDict({"state_value": torch.zeros(2, 2, 1), "next": following}, [2, 2])

    options = {"gamma": 0.5, "lmbda": 1.0, "normalize": False}
    scaled, plain = TrialAdvantage(scale_rewards=True, **options), TrialAdvantage(**options)
    first, second = batch([[0.0, 4.0], [8.0, 0.0]]), batch([[1.0, 1.0], [1.0, 1.0]])
    # Returns to go [[2, 4], [8, 0]]: mean 3.5, variance (4 + 16 + 64 + 0) / 4 - 3.5² = 8.75.
    std = math.sqrt(8.75)
    torch.testing.assert_close(scaled(first.clone())["advantage"], plain(first.clone())["advantage"] / std)
    torch.testing.assert_close(
        scaled.eval()(second.clone())["value_target"], plain(second.clone())["value_target"] / std
    )
    torch.testing.assert_close(scaled.train()(second.clone())["advantage"], plain(second.clone())["advantage"] / std)
    # Now those of both: [2, 4, 8, 0, 1.5, 1, 1.5, 1].
    both = torch.tensor([2, 4, 8, 0, 1.5, 1, 1.5, 1]).std(correction=0)
    torch.testing.assert_close(scaled.eval()(second.clone())["advantage"], plain(second.clone())["advantage"] / both)


def test_a_policy_that_normalises_is_the_same_policy_as_a_module():
    collector, update = training()
    batches = iter(collector)
    update(next(batches))
    batch = next(batches)
    with torch.no_grad():
        losses = update.loss(update.advantage(batch.clone()))
    assert losses["max_ratio"].item() == pytest.approx(1.0, abs=1e-5)
    assert isinstance(norms(update.loss.actor_network)[0], nn.Module)


# ---------------------------------------------------------- what it is worth
class Dial(TensorEnv):
    """A dial of unknown gain is to be turned to a level from 0 to 1, which is shown beside another number, times ``scales``."""

    def __init__(self, scales, **kwargs):
        specs = {"task_spec": Unbounded(1), "observation_spec": Unbounded(2), "action_spec": Unbounded(1)}
        super().__init__(**specs, batch_size=(32,), max_episode_steps=10, fixed_length=True, **kwargs)
        self.scales = torch.tensor(scales)

    def begin(self, task, rows):
        numbers = torch.rand(32, 2, generator=self.generator)
        return (task, numbers[:, :1]), numbers * self.scales

    def advance(self, state, action):
        gain, level = state
        reward = 1 - 2 * (level - gain * action).abs()
        return *self.begin(gain, None), reward, None, None


def paid_after_training(scales, normalize):
    """Per step of the second episode, in trials of other gains than those of the training."""

    def gains(batch_size, generator):
        return 0.5 + torch.rand(*batch_size, 1, generator=generator)

    torch.manual_seed(0)
    transforms = [Compose(Trial(episodes=2), TaskSampler(gains, seed=seed), PreviousStep()) for seed in (0, 1)]
    env, held_out = (TransformedEnv(Dial(scales, seed=seed), each) for seed, each in enumerate(transforms))
    slots = {"hidden_size": 32, "normalize": normalize}
    actor, critic = RecurrentActor.from_env(env, **slots), GRUValueHead.from_env(env, **slots)
    advantage = TrialAdvantage(gamma=0.0, lmbda=0.0, value_target="gae", scale_rewards=True)
    update = PPOUpdate(RL2PPOLoss(actor, critic), advantage, bptt=20, lr=3e-3, epochs=4, minibatches=4)
    frames = {"frames_per_batch": 32 * 40, "total_frames": 30 * 32 * 40}
    for batch in TrialCollector(env, ActorCritic(actor, critic), keep=update.in_keys, **frames):
        update(batch)
    return adaptation_curve(held_out, actor, 256, deterministic=True).per_episode[1].item() / 10


@pytest.mark.parametrize("scales", [[1e-3, 1e-3], [1.0, 1e3]], ids=["too small to see", "beside a large number"])
def test_a_task_that_is_not_learnt_without_is_learnt_with(scales):
    # Who does not see the level l turns the dial to x for 1 - 2 E|l - x| = 1 - x² - (1 - x)², which is 0.5 at best.
    assert paid_after_training(scales, normalize=False) < 0.52
    assert paid_after_training(scales, normalize=True) > 0.6


def test_the_rounding_of_what_does_not_vary_is_no_spread():
    norm = RunningNorm(1)
    norm.update_statistics(torch.full((1000, 1), 0.1, dtype=torch.float64))
    assert norm.std.item() == 1
    assert norm(torch.tensor([0.2], dtype=torch.float64)).item() == pytest.approx(0.1)
    batch = {"reward": torch.full((4, 50, 1), 0.1, dtype=torch.float64), "done": torch.ones(4, 50, 1, dtype=torch.bool)}
    batch["terminated"] = batch["done"]
    data = TensorDict({"state_value": torch.zeros(4, 50, 1, dtype=torch.float64), "next": batch}, [4, 50])
    assert TrialAdvantage(scale_rewards=True)(data)["value_target"].unique().item() == pytest.approx(0.1)


@pytest.mark.parametrize("where", ["within", "behind an encoder"])
def test_a_norm_that_no_batch_would_reach_is_refused(where):
    env = points()

    def encoder(shape):
        if where == "within":
            return nn.Sequential(RunningNorm(*shape), nn.Linear(*shape, 4))
        return nn.Sequential(nn.Linear(*shape, 4), RunningNorm(4))

    actor = RecurrentActor.from_env(env, hidden_size=8, encoder=encoder)
    with pytest.raises(
        ValueError, match="a RunningNorm stands within another module.*would change nothing.*normalize=True"
    ):
        PPOUpdate(RL2PPOLoss(actor, GRUValueHead.from_env(env, hidden_size=8)))


def test_a_norm_in_a_loss_term_is_refused():
    class Small(nn.Module):
        in_keys = ("actor_features",)

        def __init__(self):
            super().__init__()
            self.norm = RunningNorm(8)

        def forward(self, features):
            return {"loss_small": self.norm(features).square().mean()}

    actor = RecurrentActor.from_env(points(), hidden_size=8)
    with pytest.raises(ValueError, match="a RunningNorm stands within another module or a loss term"):
        PPOUpdate(RL2PPOLoss(actor, terms=[Small()]))


def test_a_norm_in_an_encoder_of_ones_own_is_told_of_batches():
    env = points()
    size = env.observation_spec["trans"].shape[-1]
    encoder = TensorDictSequential(
        TensorDictModule(RunningNorm(size), ["trans"], ["normalized"]),
        TensorDictModule(nn.Linear(size, 4), ["normalized"], ["encoded"]),
    )
    actor, critic = (
        RecurrentActor.from_env(env, hidden_size=8, encoder=encoder),
        GRUValueHead.from_env(env, hidden_size=8),
    )
    update = PPOUpdate(RL2PPOLoss(actor, critic), epochs=1, minibatches=1)
    collector = TrialCollector(env, ActorCritic(actor, critic), frames_per_batch=8 * 40, keep=update.in_keys)
    update(collector.rollout())
    assert norms(actor)[0].count == 8 * 40


def test_a_first_batch_that_is_too_small_is_refused_before_it_is_measured():
    collector, update = training(bptt=None)
    update.minibatches = 9
    batch = next(iter(collector))
    with pytest.raises(ValueError, match="9 minibatches cannot be made of 8 chunks of 40 steps"):
        update(batch)
    assert norms(update.loss)[0].count == 0


@pytest.mark.parametrize("batches", [1, 2])
def test_a_training_that_has_only_measured_is_told_of(batches, caplog):
    collector, update = training()
    collector.shutdown()
    collector = TrialCollector(
        points(), collector.policy, frames_per_batch=320, total_frames=320 * batches, keep=update.in_keys
    )
    result = train(collector, update, evaluate=None, progress=False)
    assert len(result.history) == batches
    assert ("nothing has been learnt" in caplog.text) == (batches == 1)
