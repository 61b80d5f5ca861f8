"""Our networks in TorchRL's losses, our loss and update with TorchRL's networks, in plain TorchRL training loops."""

import io

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.envs import Compose, InitTracker, ParallelEnv, TransformedEnv
from torchrl.modules import MLP, GRUModule, ProbabilisticActor, ValueOperator, set_recurrent_mode
from torchrl.objectives import A2CLoss, ClipPPOLoss
from torchrl.objectives.value import GAE
from torchrl.trainers.algorithms.ppo import PPOTrainer

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

WIRINGS = ["separate", "shared", "detached"]


def make_env(kind="categorical", **kwargs):
    if kind == "categorical":
        base, tasks = BernoulliBandit(3, batch_size=(4,), seed=0), uniform_means(3)
    else:
        base, tasks = QuadraticBandit(2, batch_size=(4,), seed=0), uniform_targets(2)
    return TransformedEnv(base, Compose(Trial(episodes=4), TaskSampler(tasks, seed=0), PreviousStep(**kwargs)))


def make_networks(env, kind="categorical", wiring="separate", seed=0):
    torch.manual_seed(seed)
    # Wide first weights, so that the gradients into the memory are well above rounding.
    factory = GRUCategoricalActor if kind == "categorical" else GRUGaussianActor
    actor = factory.from_env(env, hidden_size=4, init_range=0.5)
    if wiring == "separate":
        return actor, GRUValueHead.from_env(env, hidden_size=4, init_range=0.5, extra_keys=["time_left"])
    kwargs = {"detach": wiring == "detached", "extra_keys": ["time_left"], "init_range": 0.5}
    return actor, MemoryValueHead.from_env(env, actor, **kwargs)


def collect(env, actor, critic, batches=1, steps=8):
    frames = env.batch_size.numel() * steps
    policy = ActorCritic(actor, critic)
    return Collector(
        env, policy, frames_per_batch=frames, total_frames=batches * frames, auto_register_policy_transforms=True
    )


def collected(kind="categorical", wiring="separate"):
    env = make_env(kind)
    actor, critic = make_networks(env, kind, wiring)
    (batch,) = collect(env, actor, critic)
    return actor, critic, TrialAdvantage()(batch)


def total(losses):
    return sum(value for name, value in losses.items() if name.startswith("loss_"))


def gradients(loss, batch):
    loss.zero_grad()
    total(loss(batch.clone())).backward()
    return {name: p.grad.clone() for name, p in loss.named_parameters()}


# ------------------------------------------------- our networks, TorchRL's losses


@pytest.mark.parametrize("wiring", WIRINGS)
@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
@pytest.mark.parametrize("make_loss", [ClipPPOLoss, A2CLoss])
def test_gradients_reach_every_parameter_in_torchrls_losses(make_loss, kind, wiring):
    actor, critic, batch = collected(kind, wiring)
    named = gradients(make_loss(actor, critic), batch)
    count = len({id(p) for module in (actor, critic) for p in module.parameters()})
    assert len(named) == count
    for name, gradient in named.items():
        assert gradient.isfinite().all(), name
        assert gradient.any(), name


@pytest.mark.parametrize("wiring", WIRINGS)
def test_our_loss_is_torchrls_with_other_settings(wiring):
    actor, critic, batch = collected(wiring=wiring)
    with torch.no_grad():
        next(iter(actor.parameters())).mul_(1.5)  # so that the ratios are not 1
    settings = {"clip_epsilon": 0.3, "critic_coeff": 0.5, "loss_critic_type": "l2", "entropy_bonus": False}
    theirs, ours = ClipPPOLoss(actor, critic, **settings), RL2PPOLoss(actor, critic, functional=True)
    assert ours(batch.clone())["max_ratio"] > 1.01
    assert total(ours(batch.clone())) == total(theirs(batch.clone()))
    one, other = gradients(ours, batch), gradients(theirs, batch)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_a2c_by_hand_and_as_the_first_step_of_ppo(kind):
    actor, critic, batch = collected(kind)
    a2c = A2CLoss(actor, critic, entropy_bonus=False, critic_coeff=0.5, loss_critic_type="l2")
    losses = a2c(batch.clone())
    # The policy has not moved since collection, so the collected log-probabilities and values are the present ones.
    expected = -(batch["action_log_prob"].unsqueeze(-1) * batch["advantage"]).mean()
    assert losses["loss_objective"].item() == pytest.approx(expected.item(), abs=1e-6)
    expected = 0.5 * (batch["state_value"] - batch["value_target"]).square().mean()
    assert losses["loss_critic"].item() == pytest.approx(expected.item(), rel=1e-5)
    # At ratio 1 the gradient of r A is that of A log pi.
    one, other = gradients(a2c, batch), gradients(RL2PPOLoss(actor, critic, functional=True), batch)
    for name in one:
        assert torch.allclose(one[name], other[name], atol=1e-6), name


@pytest.mark.parametrize("make_loss", [ClipPPOLoss, A2CLoss, RL2PPOLoss])
def test_nested_keys_in_every_loss(make_loss):
    names = {"in_key": ("agent", "trans"), "hidden_size": 4, "init_range": 0.5}
    env = make_env(out_key=("agent", "trans"))
    torch.manual_seed(0)
    actor = GRUCategoricalActor.from_env(env, hidden_key=("agent", "h"), features_key=("agent", "f"), **names)
    critic = GRUValueHead.from_env(env, hidden_key=("critic", "h"), value_key=("critic", "v"), **names)
    (batch,) = collect(env, actor, critic)
    advantage = TrialAdvantage(value_key=("critic", "v"))(batch)
    loss = make_loss(actor, critic)
    loss.set_keys(value=("critic", "v"))
    named = gradients(loss, advantage)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in named.values())


@pytest.mark.parametrize("wiring", WIRINGS)
def test_weights_move_between_losses_and_networks(wiring):
    actor, critic, batch = collected(wiring=wiring)
    file = io.BytesIO()
    settings = {"critic_coeff": 0.5, "loss_critic_type": "l2", "entropy_bonus": False}
    torch.save(ClipPPOLoss(actor, critic, **settings).state_dict(), file)
    file.seek(0)
    other_actor, other_critic = make_networks(make_env(), wiring=wiring, seed=9)
    loss = RL2PPOLoss(other_actor, other_critic, functional=True)
    loss.load_state_dict(torch.load(file, weights_only=True))
    for module, other in ((actor, other_actor), (critic, other_critic)):
        assert module.state_dict().keys() == other.state_dict().keys()
        for name, value in module.state_dict().items():
            assert torch.equal(value, other.state_dict()[name])


# ------------------------------------------------- TorchRL's networks, our loss


def plain_torchrl(env):
    """An actor and a critic on its memory, of TorchRL's parts alone; the env gets what they need."""
    gru = GRUModule(input_size=5, hidden_size=8, in_keys=["trans", "h", "is_init"], out_keys=["f", ("next", "h")])
    env.append_transform(InitTracker())
    env.append_transform(gru.make_tensordict_primer())
    logits = TensorDictModule(MLP(in_features=8, out_features=3, num_cells=[8]), ["f"], ["logits"])
    actor = ProbabilisticActor(
        TensorDictSequential(gru, logits),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    return actor, ValueOperator(MLP(in_features=8, out_features=1, num_cells=[8]), in_keys=["f"])


def test_our_loss_in_a_plain_torchrl_loop():
    torch.manual_seed(0)
    env = make_env()
    actor, critic = plain_torchrl(env)
    loss, advantage = RL2PPOLoss(actor, critic), TrialAdvantage()
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(4), sampler=SamplerWithoutReplacement(), batch_size=2)
    collector = Collector(env, TensorDictSequential(actor, critic), frames_per_batch=32, total_frames=64)
    divergences = []
    for batch in collector:
        buffer.extend(advantage(batch))
        for minibatch in buffer:
            losses = loss(minibatch)
            optimizer.zero_grad()
            total(losses).backward()
            assert all(p.grad.isfinite().all() and p.grad.any() for p in loss.parameters())
            optimizer.step()
            divergences.append(abs(float(losses["kl_approx"])))
    # Each batch's first minibatch is evaluated by the policy that collected it: replay parity. The second is not.
    assert max(divergences[0], divergences[2]) < 1e-6
    assert min(divergences[1], divergences[3]) > 1e-5


def test_our_update_with_torchrls_actor_and_with_torchrls_loss():
    torch.manual_seed(0)
    env = make_env()
    actor, critic = plain_torchrl(env)
    (batch,) = Collector(env, TensorDictSequential(actor, critic), frames_per_batch=32, total_frames=32)
    for make_loss in (RL2PPOLoss, ClipPPOLoss):
        metrics = PPOUpdate(make_loss(actor, critic), bptt=2, lr=1e-2, epochs=2)(batch.clone())
        assert metrics["epochs"] == 2
        assert abs(metrics["kl_approx"]) > 1e-5
        assert ("loss_entropy" in metrics) is (make_loss is ClipPPOLoss)


# ------------------------------------------------------------------ two workers


def worker():
    return BernoulliBandit(3, batch_size=(2,))


def test_two_workers_in_two_iterations():
    # The sampler stands around the workers, so that they cannot draw the same tasks.
    workers = ParallelEnv(2, worker, mp_start_method="fork")
    env = TransformedEnv(workers, Compose(Trial(episodes=4), TaskSampler(uniform_means(3), seed=0), PreviousStep()))
    actor, critic = make_networks(env)
    update = PPOUpdate(RL2PPOLoss(actor, critic), bptt=4, minibatches=2, epochs=2, lr=1e-2)
    collector = collect(env, actor, critic, batches=2)
    try:
        for batch in collector:
            assert batch.shape == (2, 2, 8)
            tasks = batch["task"].flatten(0, 1)
            assert tasks[:, 0, 0].unique().numel() == 4
            # Two trials a row: the memory is empty at their first steps, and only there.
            for key in ("actor_hidden", "critic_hidden"):
                alive = batch[key].flatten(0, 1).flatten(2).abs().sum(-1) > 0
                assert torch.equal(alive, (torch.arange(8) % 4 != 0).expand(4, 8))
            with set_recurrent_mode(True):
                again = actor.get_dist(batch.select(*actor.in_keys)).log_prob(batch["action"])
            assert torch.allclose(again, batch["action_log_prob"], atol=1e-6)
            metrics = update(batch)
            assert metrics["grad_norm"] > 0
            collector.update_policy_weights_()
    finally:
        collector.shutdown()


# ------------------------------------------------------- TorchRL's trainer


def ratio_of(loss, batch):
    zeros = {key: torch.zeros_like(batch["state_value"]) for key in ("advantage", "value_target")}
    return loss(batch.clone().update(zeros))["max_ratio"].item()


@pytest.mark.parametrize("wiring", WIRINGS)
def test_torchrls_gae_over_sequences_gives_our_advantages(wiring):
    actor, critic, batch = collected(wiring=wiring)
    ours = TrialAdvantage(gamma=0.9, lmbda=0.8, value_target="gae", normalize=False)(batch.clone())
    theirs = GAE(gamma=0.9, lmbda=0.8, value_network=critic, shifted=True)(batch.clone())  # the critic sees rows whole
    for key in ("advantage", "value_target"):
        torch.testing.assert_close(theirs[key], ours[key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("wiring", WIRINGS)
def test_torchrls_trainer(wiring):
    env = make_env()
    actor, critic = make_networks(env, wiring=wiring)
    collector = collect(env, actor, critic, batches=2)
    loss = RL2PPOLoss(actor, critic)
    options = {"frame_skip": 1, "optim_steps_per_batch": 1, "num_epochs": 2, "progress_bar": False, "total_frames": 64}
    optimizer = torch.optim.Adam(loss.parameters())
    with pytest.warns(UserWarning, match="PPOTrainer is an experimental"):
        trainer = PPOTrainer(
            collector=collector, loss_module=loss, optimizer=optimizer, gae=TrialAdvantage(), **options
        )
    before, ratios = [p.clone() for p in loss.parameters()], []
    trainer.register_op("batch_process", lambda batch: ratios.append(ratio_of(loss, batch)) or batch)
    trainer.train()
    assert ratios == pytest.approx([1.0, 1.0])  # each batch is played by the weights as they are
    assert all(not torch.equal(p, then) for p, then in zip(loss.parameters(), before, strict=True))


def test_a_collector_of_another_policy_takes_the_actors_weights_alone():
    env = make_env()
    collector = collect(env, *make_networks(env, seed=0))
    actor, critic = make_networks(make_env(), seed=1)
    before = [p.clone() for p in collector.policy.critic.parameters()]
    collector.update_policy_weights_(TensorDict.from_module(actor))
    pairs = zip(collector.policy.actor.parameters(), actor.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)
    assert all(torch.equal(*pair) for pair in zip(collector.policy.critic.parameters(), before, strict=True))
    collector.update_policy_weights_(TensorDict.from_module(ActorCritic(actor, critic)))
    assert all(
        torch.equal(*pair) for pair in zip(collector.policy.critic.parameters(), critic.parameters(), strict=True)
    )
