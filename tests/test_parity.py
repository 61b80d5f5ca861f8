"""Parity: our networks, loss, advantages and update against an oracle (`oracle.py`), in float64, within 1e-8."""

import oracle
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from rl2_torchrl import (
    ActorCritic,
    GRUCategoricalActor,
    GRUGaussianActor,
    GRUValueHead,
    MemoryValueHead,
    PPOUpdate,
    RL2PPOLoss,
    TrialAdvantage,
    kernels,
)

ROWS, STEPS, INPUTS, ACTIONS, UNITS = 7, 6, 4, 3, 5
GAMMA, LMBDA, LR, MINIBATCHES = 0.9, 0.8, 1e-3, 4

each_kind = pytest.mark.parametrize("kind", ["gaussian", "categorical"])
# One step from its stored memory (the original), a length between, the whole row (the paper).
each_bptt = pytest.mark.parametrize("bptt", [1, 3, STEPS])
# Actor and critic apart at each length; on one memory at the length at which chunks start and trials end in them.
each_wiring = pytest.mark.parametrize(
    ("bptt", "wiring", "num_layers"),
    [
        (1, "separate", 1),
        (3, "separate", 1),
        (6, "separate", 1),
        (3, "shared", 1),
        (6, "detached", 1),
        (3, "separate", 2),
    ],
)


@pytest.fixture(params=["compiled", "pytorch"])
def _each_gru(request, monkeypatch):
    if request.param == "pytorch":
        monkeypatch.setattr(kernels, "load", lambda dtype: None)


def networks(kind, wiring="separate", num_layers=1):
    """Actor and critic whose weights, the last layers' too, are far from zero."""
    torch.manual_seed(0)
    body = {"num_layers": num_layers, "init_range": 1.0, "dtype": torch.float64}
    actor_class = GRUGaussianActor if kind == "gaussian" else GRUCategoricalActor
    actor = actor_class(INPUTS, ACTIONS, hidden_size=UNITS, **body)
    if wiring == "separate":
        return actor, GRUValueHead(INPUTS, hidden_size=UNITS + 2, **body)
    return actor, MemoryValueHead(UNITS, detach=wiring == "detached", init_range=1.0, dtype=torch.float64)


def weights(module):
    """The module's own parameters under PyTorch's short names."""
    return {name.rpartition(".")[-1]: parameter for name, parameter in module.named_parameters()}


def copies(module):
    return {name: p.detach().clone().requires_grad_() for name, p in weights(module).items()}


def random_data(actor, critic, kind, wiring):
    """A random batch, as the oracle's dictionary; trials end inside rows and rows are cut inside trials."""
    generator = torch.Generator().manual_seed(1)

    def normal(*size):
        return torch.randn(ROWS, STEPS, *size, generator=generator, dtype=torch.float64)

    done = torch.zeros(ROWS, STEPS, dtype=torch.bool)
    done[0, 1] = done[1, 3] = done[1, 5] = done[2:5, 4] = True
    is_init = done.roll(1, 1)
    is_init[:, 0] = torch.tensor([True, False, False, True, False, True, False])
    fresh = is_init[..., None, None]
    layers = sum("weight_ih" in name for name in weights(actor))
    gaussian = kind == "gaussian"
    data = {
        "trans": normal(INPUTS),
        "is_init": is_init,
        "actor_hidden": 0.5 * normal(layers, UNITS) * ~fresh,
        "critic_hidden": 0.5 * normal(layers, UNITS + 2) * ~fresh,
        "action": normal(ACTIONS) if gaussian else torch.randint(ACTIONS, (ROWS, STEPS), generator=generator),
        "reward": normal(),
        "value": normal(),
        "done": done,
        "advantage": normal(),
        "value_target": normal(),
        "next_trans": normal(INPUTS),
        "next_actor_hidden": 0.5 * normal(layers, UNITS),
        "next_critic_hidden": 0.5 * normal(layers, UNITS + 2),
    }
    with torch.no_grad():
        current, _ = oracle.actor_and_value(weights(actor), weights(critic), data, wiring)
    return {**data, "log_prob": current + 0.5 * normal()}


def as_batch(data):
    """The same batch as a collector would return it."""
    columns = ("reward", "done", "advantage", "value_target", "is_init", "value")
    column = {name: data[name].unsqueeze(-1) for name in columns}
    names = ("trans", "actor_hidden", "critic_hidden", "action")
    following = {name: data[f"next_{name}"] for name in names[:3]}
    entries = {
        **{name: data[name] for name in names},
        "is_init": column["is_init"],
        "action_log_prob": data["log_prob"],
        "advantage": column["advantage"],
        "value_target": column["value_target"],
        "state_value": column["value"],
        "next": {"reward": column["reward"], "done": column["done"], "terminated": column["done"], **following},
    }
    return TensorDict(entries, [ROWS, STEPS]).clone()


def with_advantages(data, actor, critic, wiring, value_target):
    """The oracle's advantages and returns, with the critic asked once more where rows are cut."""
    following = {
        "trans": data["next_trans"],
        "is_init": torch.zeros_like(data["is_init"]),
        "actor_hidden": data["next_actor_hidden"],
        "critic_hidden": data["next_critic_hidden"],
        "action": data["action"],
    }
    with torch.no_grad():
        _, after = oracle.actor_and_value(actor, critic, oracle.chunks(following, 1), wiring)
    after = after.reshape(ROWS, STEPS)
    series = (data["reward"], data["value"], after, data["done"], data["done"])
    gae, returns = oracle.advantages(*series, gamma=GAMMA, lmbda=LMBDA)
    target = returns if value_target == "return" else gae + data["value"]
    return {**data, "advantage": oracle.normalized(gae), "value_target": target}


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert (ours[name] - expected).abs().max() < 1e-8, name


def gradients(total, parameters):
    computed = torch.autograd.grad(total, list(parameters.values()), retain_graph=True)
    return dict(zip(parameters, computed, strict=True))


# ------------------------------------------------------- losses and gradients


@pytest.mark.usefixtures("_each_gru")
@each_kind
@each_wiring
def test_losses_and_every_gradient(kind, bptt, wiring, num_layers):
    actor, critic = networks(kind, wiring, num_layers)
    data = random_data(actor, critic, kind, wiring)
    update = PPOUpdate(RL2PPOLoss(actor, critic), bptt=bptt)
    ours = update.loss(update.chunks(as_batch(data)))
    theirs = [copies(actor), copies(critic)]
    expected = oracle.losses(*theirs, oracle.chunks(data, bptt), wiring=wiring)
    # The case has to be there: ratios beyond the clip on both sides, with advantages of both signs.
    ratio, advantage = expected["ratio"], oracle.chunks(data, bptt)["advantage"]
    for beyond in (ratio > 1.3, ratio < 0.7):
        assert (beyond & (advantage > 0)).any()
        assert (beyond & (advantage < 0)).any()
    assert abs(ours["loss_objective"] - expected["policy"]) < 1e-8
    assert abs(ours["loss_critic"] - 0.5 * expected["value"]) < 1e-8
    total = ours["loss_objective"] + ours["loss_critic"]
    assert abs(total - expected["total"]) < 1e-8
    for module, their_weights in zip((actor, critic), theirs, strict=True):
        their_gradients = gradients(expected["total"], their_weights)
        assert_close(gradients(total, weights(module)), their_gradients)
        assert all(g.abs().max() > 1e-4 for g in their_gradients.values())


# -------------------------------------------------------------- whole update


@pytest.mark.parametrize("value_target", ["return", "gae"])
@each_kind
@each_wiring
def test_every_parameter_after_a_whole_update(kind, bptt, wiring, num_layers, value_target):
    actor, critic = networks(kind, wiring, num_layers)
    data = random_data(actor, critic, kind, wiring)
    theirs = [copies(actor), copies(critic)]
    before = {name: p.detach().clone() for module in (actor, critic) for name, p in module.named_parameters()}
    sizes = {"bptt": bptt, "epochs": 10, "minibatches": MINIBATCHES, "lr": LR}
    # The advantages already there are not the batch's own: the update has to write them itself.
    advantage = TrialAdvantage(gamma=GAMMA, lmbda=LMBDA, value_target=value_target, critic=ActorCritic(actor, critic))
    metrics = PPOUpdate(RL2PPOLoss(actor, critic), advantage, shuffle=False, **sizes)(as_batch(data))
    data = with_advantages(data, *theirs, wiring, value_target)
    expected = oracle.update(*theirs, data, wiring=wiring, **sizes)
    for module, their_weights in zip((actor, critic), theirs, strict=True):
        assert_close(weights(module), their_weights)
        moved = [(p - before[name]).abs().max() for name, p in module.named_parameters()]
        assert min(moved) > LR
    assert metrics["loss_objective"] == pytest.approx(expected["policy"], abs=1e-8)
    assert metrics["loss_critic"] == pytest.approx(0.5 * expected["value"], abs=1e-8)
    assert metrics["loss"] == pytest.approx(expected["total"], abs=1e-8)
    assert metrics["clip_fraction"] > 0.1


@each_kind
def test_bptt_is_seen_in_the_gradient(kind):
    # What the comparisons above rest on: the three lengths are three different gradients of the recurrent weights.
    actor, critic = networks(kind)
    data, theirs = random_data(actor, critic, kind, "separate"), [copies(actor), copies(critic)]
    seen = []
    for bptt in (1, 3, STEPS):
        total = oracle.losses(*theirs, oracle.chunks(data, bptt))["total"]
        seen.append(gradients(total, theirs[0])["weight_hh_l0"])
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert (seen[one] - seen[other]).abs().max() > 1e-3


# ---------------------------------------------------------------- advantages


def our_advantages(reward, value, after, done, terminated, *, normalize=False, **kwargs):
    """`TrialAdvantage` on ``[B, T]`` each: advantages, returns-to-go and the usual PPO target."""
    columns = [x.unsqueeze(-1) for x in (reward, value, after, done, terminated)]
    reward, value, after, done, terminated = columns
    following = {"reward": reward, "done": done, "terminated": terminated, "after": after}
    batch = TensorDict({"state_value": value, "next": following}, reward.shape[:2])
    critic = TensorDictModule(nn.Identity(), ["after"], ["state_value"])
    results = [
        TrialAdvantage(**kwargs, normalize=normalize, critic=critic, value_target=target)(batch.clone())
        for target in ("return", "gae")
    ]
    assert torch.equal(results[0]["advantage"], results[1]["advantage"])
    columns = (results[0]["advantage"], results[0]["value_target"], results[1]["value_target"])
    return [column.squeeze(-1) for column in columns]


def row(*values):
    return torch.tensor([values], dtype=torch.float64)


@pytest.mark.parametrize("compute", [our_advantages, oracle.advantages])
@pytest.mark.parametrize(
    ("terminated", "gae", "returns"),
    [
        # gamma = lambda = 1/2. A trial of two steps, then one that the row's end cuts, before a state of value 8.
        # delta = 1 + 4/2 - 2, 2 - 4, 4 + 6/2 - 2, 1 + 8/2 - 6 = 1, -2, 5, -1; A = delta + A' / 4 within a trial.
        # R = 1 + 2/2, 2, 4 + 5/2, 1 + 8/2.
        (True, (0.5, -2.0, 4.75, -1.0), (2.0, 2.0, 6.5, 5.0)),
        # The same with the first trial truncated before a state of value 10: delta_1 = 2 + 10/2 - 4 = 3, R_1 = 7.
        (False, (1.75, 3.0, 4.75, -1.0), (4.5, 7.0, 6.5, 5.0)),
    ],
)
def test_advantages_and_returns_by_hand(compute, terminated, gae, returns):
    reward, value, after = row(1, 2, 4, 1), row(2, 4, 2, 6), row(99, 10, 99, 8)
    done = torch.tensor([[False, True, False, False]])
    computed = compute(reward, value, after, done, done & terminated, gamma=0.5, lmbda=0.5)
    assert torch.equal(computed[0], row(*gae))
    assert torch.equal(computed[1], row(*returns))
    if compute is our_advantages:
        assert torch.equal(computed[2], row(*gae) + value)


@pytest.mark.parametrize(("gamma", "lmbda"), [(0.99, 0.97), (1.0, 1.0), (0.9, 0.0), (0.0, 0.9)])
@pytest.mark.parametrize("normalize", [True, False])
def test_advantages_and_returns_of_random_trials(gamma, lmbda, normalize):
    generator = torch.Generator().manual_seed(0)
    reward, value, after = torch.randn(3, 5, 40, generator=generator, dtype=torch.float64)
    ends = torch.rand(5, 40, generator=generator)
    done, terminated = ends < 0.2, ends < 0.1
    # Rows 0 and 1 end with their trial, the others are cut.
    done[:2, -1] = terminated[:2, -1] = True
    series = (reward, value, after, done, terminated)
    ours = our_advantages(*series, gamma=gamma, lmbda=lmbda, normalize=normalize)
    gae, returns = oracle.advantages(*series, gamma=gamma, lmbda=lmbda)
    advantage = oracle.normalized(gae) if normalize else gae
    for computed, expected in zip(ours, (advantage, returns, gae + value), strict=True):
        assert (computed - expected).abs().max() < 1e-8
