"""Replay: what TorchRL's Collector stored step by step comes back in recurrent mode, wherever trials begin and end."""

import pytest
import torch
from torchrl.collectors import Collector
from torchrl.envs import Compose, GymEnv, SerialEnv, TransformedEnv
from torchrl.modules import set_recurrent_mode

from rl2_torchrl import (
    ActorCritic,
    GRUCategoricalActor,
    GRUGaussianActor,
    GRUValueHead,
    MemoryValueHead,
    PPOUpdate,
    PreviousStep,
    RL2PPOLoss,
    TaskSampler,
    Trial,
    TrialAdvantage,
)
from rl2_torchrl.envs import BernoulliBandit, QuadraticBandit, uniform_means, uniform_targets

STEPS, TRIAL = 10, 4  # a batch holds two and a half trials of the bandits


def bandit(env, distribution):
    return TransformedEnv(env, Compose(Trial(episodes=TRIAL), TaskSampler(distribution, seed=0), PreviousStep()))


def cartpole():
    return GymEnv("CartPole-v1", max_episode_steps=25)


# Each env: a maker, its steps in a batch, its actor.
ENVS = {
    "quadratic": (
        lambda: bandit(QuadraticBandit(2, batch_size=(3,), seed=0), uniform_targets(2)),
        STEPS,
        GRUGaussianActor,
    ),
    "bernoulli": (
        lambda: bandit(BernoulliBandit(3, batch_size=(3,), seed=0), uniform_means(3)),
        STEPS,
        GRUCategoricalActor,
    ),
    # Episodes of different lengths, so that the rows' trials end at different steps.
    "cartpole": (
        lambda: TransformedEnv(SerialEnv(2, cartpole), Compose(Trial(episodes=2), PreviousStep())),
        60,
        GRUCategoricalActor,
    ),
}
each_env = pytest.mark.parametrize("name", ENVS)
each_wiring = pytest.mark.parametrize("wiring", ["separate", "shared", "detached"])


def networks(env, name, wiring, num_layers=2):
    """Networks whose last layers are far from zero, so that a wrong memory shows."""
    body = {"hidden_size": 8, "init_range": 0.5}
    actor = ENVS[name][2].from_env(env, num_layers=num_layers, **body)
    if wiring == "separate":
        return actor, GRUValueHead.from_env(env, num_layers=num_layers, extra_keys=["time_left"], **body)
    head = {"detach": wiring == "detached", "extra_keys": ["time_left"], "init_range": 0.5}
    return actor, MemoryValueHead.from_env(env, actor, **head)


def collect(name, wiring, batches=2):
    """Networks, and batches one after the other from one collector."""
    torch.manual_seed(0)
    make_env, steps, _ = ENVS[name]
    env = make_env()
    env.set_seed(0)
    actor, critic = networks(env, name, wiring)
    frames = env.batch_size.numel() * steps
    sizes = {"frames_per_batch": frames, "total_frames": frames * batches}
    collector = Collector(env, ActorCritic(actor, critic), **sizes, auto_register_policy_transforms=True)
    collected = [batch.clone() for batch in collector]
    collector.shutdown()
    return actor, critic, collected


@torch.no_grad()
def replay(actor, critic, batch):
    """Log-probabilities and values ``[*B, T]`` of the stored inputs, none of the stored outputs, in recurrent mode."""
    entries = [key for key in (*actor.in_keys, *critic.in_keys) if key not in actor.out_keys]
    inputs = batch.select(*entries, strict=False)
    with set_recurrent_mode(True):
        log_prob = actor.get_dist(inputs).log_prob(batch["action"])
        return log_prob, critic(inputs)["state_value"].squeeze(-1)


def stored(batch):
    return batch["action_log_prob"], batch["state_value"].squeeze(-1)


def assert_replayed(actor, critic, batch):
    for again, before in zip(replay(actor, critic, batch), stored(batch), strict=True):
        assert again.shape == before.shape
        assert (again - before).abs().max() <= 1e-6


def moved(actor, critic, batch):
    """Steps ``[*B, T]`` at which a replay, of log-probability or value, is not what was stored."""
    return torch.stack(
        [(a - b).abs() > 1e-4 for a, b in zip(replay(actor, critic, batch), stored(batch), strict=True)]
    ).any(0)


@each_env
@each_wiring
def test_collected_log_probs_and_values_come_back(name, wiring):
    actor, critic, batches = collect(name, wiring)
    for number, batch in enumerate(batches):
        # A trial ends inside each row; a row begins with a trial in the first batch, inside a cut one in the second.
        assert batch["next", "done"][:, :-1].any(1).all()
        assert (batch["is_init"][:, 0] == (number == 0)).all()
        assert_replayed(actor, critic, batch)


@each_wiring
def test_memory_crosses_the_border_between_batches(wiring):
    actor, critic, (first, second) = collect("bernoulli", wiring)
    # Ten steps of trials of four: the second batch goes on with the third trial's last two.
    assert first["is_init"][0, :, 0].nonzero().flatten().tolist() == [0, 4, 8]
    assert second["is_init"][0, :, 0].nonzero().flatten().tolist() == [2, 6]
    for key in ActorCritic(actor, critic).hidden_keys:
        assert torch.equal(second[key][:, 0], first["next", key][:, -1])
        assert (second[key][:, 0].abs().amax(-1) > 1e-3).all()
        without = second.clone()
        without[key][:, 0] = 0.0
        # Without that memory the cut trial is replayed wrong, up to its end.
        assert moved(actor, critic, without)[:, :2].all()
        assert not moved(actor, critic, without)[:, 2:].any()


@each_wiring
def test_a_trial_that_is_not_marked_is_replayed_wrong(wiring):
    # The tests above can fail: with one mark gone the earlier trial's memory runs on, up to the next trial's start.
    actor, critic, (batch, _) = collect("quadratic", wiring)
    batch["is_init"][1, 4] = False
    assert moved(actor, critic, batch)[1].tolist() == [False] * 4 + [True] * 4 + [False] * 2
    assert not moved(actor, critic, batch)[[0, 2]].any()


@pytest.mark.parametrize("bptt", [1, 2, 5, STEPS])
@each_wiring
@pytest.mark.parametrize("name", ["quadratic", "bernoulli"])
def test_chunks_start_from_their_stored_memory(name, wiring, bptt):
    actor, critic, batches = collect(name, wiring)
    advantage = TrialAdvantage(critic=ActorCritic(actor, critic))
    update = PPOUpdate(RL2PPOLoss(actor, critic), advantage, bptt=bptt, minibatches=1)
    for batch in batches:
        chunks = update.chunks(update.advantage(batch))
        chunks["state_value"] = batch["state_value"].reshape(-1, bptt, 1)
        assert chunks.shape == (3 * STEPS // bptt, bptt)
        assert_replayed(actor, critic, chunks)
        # Hence the ratio is 1 in the first minibatch, and nothing is clipped.
        losses = update.loss(chunks)
        assert losses["kl_approx"].abs() <= 1e-6
        assert losses["clip_fraction"] == 0
