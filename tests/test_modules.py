"""GRU actors and value heads: shapes, first weights, hand-worked steps, keys, primers, and steps against sequences."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import InteractionType, TensorDictSequential, set_interaction_type
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torchrl.collectors import Collector
from torchrl.data import Composite, Unbounded
from torchrl.envs import Compose, GymEnv, RenameTransform, SerialEnv, TransformedEnv
from torchrl.modules import set_recurrent_mode
from torchrl.modules.utils import get_primers_from_module

from rl2_torchrl import (
    ActorCritic,
    GRUCategoricalActor,
    GRUGaussianActor,
    GRUValueHead,
    MemoryValueHead,
    PreviousStep,
    TaskSampler,
    Trial,
    orthogonal_init_,
)
from rl2_torchrl.envs import BernoulliBandit, QuadraticBandit, uniform_means, uniform_targets
from rl2_torchrl.modules import Head, LSTMCore, MLPEncoder
from rl2_torchrl.modules.actor_critic import hidden_keys

# Each kind of network: how to build it, the entry that its head writes, and that entry's size.
KINDS = {
    "value": (lambda **kwargs: GRUValueHead(5, **kwargs), "state_value", 1),
    "gaussian": (lambda **kwargs: GRUGaussianActor(5, 2, **kwargs), "loc", 2),
    "categorical": (lambda **kwargs: GRUCategoricalActor(5, 3, **kwargs), "logits", 3),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def build(kind, **kwargs):
    torch.manual_seed(0)
    return KINDS[kind][0](**{"hidden_size": 4, **kwargs})


def inputs(*shape, size=5, dtype=torch.float32):
    """Inputs of a batch ``shape``, a new trial everywhere."""
    trans = torch.randn(*shape, size, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return TensorDict({"trans": trans, "is_init": torch.ones(*shape, 1, dtype=torch.bool)}, shape)


def last_layer(module):
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]


def gru_of(module):
    return next(layer for layer in module.modules() if isinstance(layer, nn.GRU))


def quadratic_env(base=None, **kwargs):
    base = QuadraticBandit(2, batch_size=(3,), seed=0) if base is None else base
    tasks = TaskSampler(uniform_targets(2), seed=0)
    return TransformedEnv(base, Compose(Trial(episodes=4), tasks, PreviousStep(**kwargs)))


def bernoulli_env():
    return TransformedEnv(
        BernoulliBandit(3, batch_size=(2,)),
        Compose(Trial(episodes=4), TaskSampler(uniform_means(3), seed=0), PreviousStep()),
    )


# ------------------------------------------------------------------- shapes


@each_kind
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_shapes_of_one_step(kind, shape):
    module, (_, out_key, size) = build(kind, num_layers=2), KINDS[kind]
    out = module(inputs(*shape))
    assert out[out_key].shape == (*shape, size)
    assert out["next", module.hidden_key].shape == (*shape, 2, 4)


@each_kind
@pytest.mark.parametrize("rows", [(3,), (2, 3)])
def test_shapes_of_sequences(kind, rows):
    module, (_, out_key, size) = build(kind), KINDS[kind]
    with set_recurrent_mode(True):
        assert module(inputs(*rows, 6))[out_key].shape == (*rows, 6, size)


def test_actions_and_log_probs():
    td = build("gaussian")(inputs(3))
    assert td["action"].shape == (3, 2)
    # Summed over the components: one number a row, -1/2 |z|^2 - sum log_std - ln(2 pi), here at the mean, z = 0.
    assert torch.allclose(td["action_log_prob"], torch.full((3,), 1.0 - math.log(2 * math.pi)))
    assert build("categorical")(inputs(3))["action"].shape == (3,)
    one_hot = build("categorical", one_hot=True)(inputs(3))["action"]
    assert one_hot.shape == (3, 3)
    assert one_hot.sum(-1).tolist() == [1, 1, 1]


# ------------------------------------------------------------ first weights


@pytest.mark.parametrize(("kind", "init_range"), [("value", 3e-3), ("gaussian", 1e-3), ("categorical", 1e-3)])
def test_last_layer_starts_uniform_in_its_range(kind, init_range):
    layer = last_layer(build(kind, hidden_size=2000)).requires_grad_(False)
    # Of 2,000 draws from U(-r, r) the largest lies above 0.99 r but for a chance of 0.99^2000 < 1e-8, and the standard
    # deviation is r / sqrt(3).
    for weight in (layer.weight, layer.bias):
        assert weight.abs().max() <= init_range
    assert layer.weight.abs().max() > 0.99 * init_range
    assert layer.weight.std() == pytest.approx(init_range / math.sqrt(3), rel=0.05)
    assert layer.bias.abs().max() > 0


@each_kind
def test_init_range_is_an_argument(kind):
    layer = last_layer(build(kind, hidden_size=500, init_range=0.7))
    assert 0.6 < layer.weight.abs().max() <= 0.7


def test_log_std_is_one_parameter_a_dimension():
    actor = build("gaussian")
    log_std = dict(actor.named_parameters())["module.0.module.1.module.log_std"]
    assert log_std.tolist() == [-0.5, -0.5]
    # State-independent: the same scale, exp(log_std), for all inputs.
    with torch.no_grad():
        log_std.copy_(torch.tensor([0.0, math.log(3.0)]))
    assert torch.allclose(actor(inputs(7))["scale"], torch.tensor([1.0, 3.0]).expand(7, 2))
    assert torch.equal(
        dict(build("gaussian", init_log_std=1.5).named_parameters())["module.0.module.1.module.log_std"],
        torch.tensor([1.5, 1.5]),
    )


# ----------------------------------------------------------- one step by hand


@each_kind
def test_one_step_by_hand(kind):
    # One input, one unit. Gates (r, z, n): W_i = (0, ln 3, 1), W_h = (0, 0, 2), no biases. The head is 2 relu(h) + 0.1.
    #   r = 1/2; z = 1 / (1 + 3^-x); n = tanh(x + r * 2 h); h' = (1 - z) n + z h.
    #   x =  1, h = 0.5, same trial: z = 3/4, n = tanh 1.5 = 0.905148, h' = 0.226287 + 0.375 = 0.601287 -> 1.302574
    #   x = -1, h = 0.5, same trial: z = 1/4, n = tanh -0.5 = -0.462117, h' = -0.346588 + 0.125 = -0.221588 -> 0.1
    #   x =  1, h = 0.5, new trial:  h = 0, n = tanh 1 = 0.761594, h' = 0.190399 -> 0.480797
    make = {"value": GRUValueHead, "gaussian": GRUGaussianActor, "categorical": GRUCategoricalActor}[kind]
    module = make(1, *([] if kind == "value" else [1]), hidden_size=1)
    gru, last = gru_of(module), last_layer(module)
    with torch.no_grad():
        for parameter in gru.parameters():
            parameter.zero_()
        gru.weight_ih_l0.copy_(torch.tensor([[0.0], [math.log(3.0)], [1.0]]))
        gru.weight_hh_l0[2] = 2.0
        last.weight.fill_(2.0)
        last.bias.fill_(0.1)
    td = TensorDict({"trans": torch.tensor([[1.0], [-1.0], [1.0]])}, [3])
    td[module.hidden_key] = torch.full((3, 1, 1), 0.5)
    td["is_init"] = torch.tensor([[False], [False], [True]])
    module(td)
    assert td[KINDS[kind][1]].flatten().tolist() == pytest.approx([1.302574, 0.1, 0.480797], abs=1e-6)
    hidden = td["next", module.hidden_key].flatten().tolist()
    assert hidden == pytest.approx([0.601287, -0.221588, 0.190399], abs=1e-6)


def test_activation_is_an_argument():
    module = build("value", activation=nn.Identity)
    td = module(inputs(3))
    assert torch.allclose(td["state_value"], last_layer(module)(td["critic_features"]))
    assert (td["critic_features"] < 0).any()


@pytest.mark.parametrize(("extra", "value"), [(0.25, 4.5), (-0.25, 2.5)])
def test_memory_value_head_by_hand(extra, value):
    # W (relu(f), e) + b with W = (1, 2, 4), b = 0.5 on f = (3, -1) and the extra input e = ±0.25: 3 + 0 ± 1 + 0.5.
    module = MemoryValueHead(2, detach=True, extra_size=1, extra_keys=["time_left"])
    with torch.no_grad():
        last_layer(module).weight.copy_(torch.tensor([[1.0, 2.0, 4.0]]))
        last_layer(module).bias.fill_(0.5)
    td = TensorDict({"actor_features": torch.tensor([[3.0, -1.0]]), "time_left": torch.tensor([[extra]])}, [1])
    assert module(td)["state_value"].item() == value


def test_some_inputs_go_past_the_first_activation():
    head, x = Head(6, 3, init_range=0.5, num_cells=(5,), skip_size=2), torch.randn(4, 6)
    _, first, _, last = head.layers
    expected = last(torch.relu(first(torch.cat((torch.relu(x[:, :4]), x[:, 4:]), -1))))
    torch.testing.assert_close(head(x), expected)


LAYERS = [MLPEncoder(6, [5]), Head(6, 3, init_range=0.5), Head(6, 3, init_range=0.5, activation=nn.Tanh)]
TAKEN_APART = {
    "jit": torch.jit.trace,
    "fx": lambda module, x: make_fx(module)(x),
    "vmap": lambda module, x: torch.func.vmap(module),
    "compile": lambda module, x: torch.compile(module, backend="eager"),
}


@pytest.mark.parametrize("way", TAKEN_APART)
@pytest.mark.parametrize("module", LAYERS, ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_layers_are_taken_apart_into_pytorchs_operations(module, way, grad):
    x = torch.randn(4, 6)
    with torch.set_grad_enabled(grad):
        alone = TAKEN_APART[way](module, torch.randn(4, 6))
        torch.testing.assert_close(alone(x), module(x))


@pytest.mark.parametrize("make", [lambda: MLPEncoder(6, [5]), lambda: Head(6, 3, init_range=0.5, num_cells=(5,))])
@pytest.mark.parametrize("grad", [True, False])
def test_no_hook_on_a_layer_is_passed_over(make, grad):
    module, seen = make(), []
    next(m for m in module.modules() if isinstance(m, nn.Linear)).register_forward_hook(lambda *_: seen.append(1))
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(module(x := torch.randn(4, 6)), module.layers(x))
    assert len(seen) == 2


@pytest.mark.parametrize("module", LAYERS, ids=str)
@torch.no_grad()
def test_inputs_of_another_size_are_refused(module):
    for wrong in (torch.ones(5, 3), torch.ones(6, 12)):
        with pytest.raises(RuntimeError, match="shape"):
            module.step_function()(wrong)
        with pytest.raises(RuntimeError, match="shape"):
            module(wrong)


@pytest.mark.parametrize("detach", [True, False])
def test_only_the_shared_wiring_sends_value_gradients_into_the_actor(detach):
    actor, critic = build("categorical"), MemoryValueHead(4, detach=detach, num_cells=[8])
    ActorCritic(actor, critic)(inputs(3))["state_value"].sum().backward()
    touched = [p.grad is not None and bool(p.grad.any()) for p in gru_of(actor).parameters()]
    assert any(touched) is not detach
    assert all(p.grad is not None for p in critic.parameters())


def test_extra_keys_reach_the_critic():
    module = GRUValueHead(6, hidden_size=4, extra_keys=["time_left"], init_range=1.0)
    td = inputs(3)
    values = [module(td.clone().set("time_left", torch.full((3, 1), left)))["state_value"] for left in (0.0, 1.0)]
    assert (values[0] - values[1]).abs().min() > 1e-4


# ------------------------------------------------------- deterministic, random


def test_deterministic_mode_is_mean_or_mode():
    with set_interaction_type(InteractionType.DETERMINISTIC):
        gaussian, categorical = build("gaussian")(inputs(9)), build("categorical", init_range=3.0)(inputs(99))
    assert torch.equal(gaussian["action"], gaussian["loc"])
    assert torch.equal(categorical["action"], categorical["logits"].argmax(-1))
    assert categorical["action"].unique().numel() > 1


def test_random_mode_draws_with_the_scale():
    with set_interaction_type(InteractionType.RANDOM):
        td = build("gaussian")(inputs(20_000))
    # The sample's standard deviation has a standard error of s / sqrt(2 n) = 0.005 s.
    noise = td["action"] - td["loc"]
    assert noise.std(0).tolist() == pytest.approx([math.exp(-0.5)] * 2, rel=0.025)
    expected = torch.distributions.Normal(td["loc"], td["scale"]).log_prob(td["action"]).sum(-1)
    assert torch.allclose(td["action_log_prob"], expected, atol=1e-5)


# ---------------------------------------------------------- steps = sequences


@each_kind
@pytest.mark.parametrize("num_layers", [1, 2])
def test_stepping_equals_recurrent_mode(kind, num_layers):
    module, out_key = build(kind, num_layers=num_layers, init_range=1.0), KINDS[kind][1]
    td = inputs(3, 8)
    # Row 0 starts with a trial, row 1 has a second and third one, row 2 goes on from an earlier batch.
    starts = torch.zeros(3, 8, dtype=torch.bool)
    starts[0, 0] = starts[1, 0] = starts[1, 3] = starts[1, 7] = starts[2, 5] = True
    td["is_init"] = starts.unsqueeze(-1)
    hidden, stepped = torch.full((3, num_layers, 4), 0.5), []
    for t in range(8):
        # As the primers do it, the memory that is stored at a trial's first step is zero.
        hidden = torch.where(starts[:, t, None, None], 0.0, hidden)
        step = module(td[:, t].clone().set(module.hidden_key, hidden))
        hidden = step["next", module.hidden_key]
        stepped.append(step)
    stepped = torch.stack(stepped, 1)
    with set_recurrent_mode(True):
        sequence = module(stepped.select("trans", "is_init", module.hidden_key))
    assert torch.allclose(sequence[out_key], stepped[out_key], atol=1e-6)
    # A trial's start forgets: without its mark the outputs differ from there on, and not before.
    with set_recurrent_mode(True):
        unmarked = module(stepped.select("trans", module.hidden_key).set("is_init", torch.zeros(3, 8, 1).bool()))
    moved = ((unmarked[out_key] - sequence[out_key]).abs() > 1e-5).any(-1)
    assert moved[0].tolist() == [False] * 8
    assert moved[1].tolist() == [False] * 3 + [True] * 5
    assert moved[2].tolist() == [False] * 5 + [True] * 3


# ------------------------------------------------------------- dtype and state


@each_kind
def test_float64(kind):
    module = build(kind, dtype=torch.float64, num_layers=2)
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    td = module(inputs(3, dtype=torch.float64))
    assert td[KINDS[kind][1]].dtype == td["next", module.hidden_key].dtype == torch.float64


@each_kind
def test_state_dict_round_trip(kind):
    module, other = build(kind), KINDS[kind][0](hidden_size=4, init_range=1.0)
    td = inputs(3)
    assert not torch.equal(module(td.clone())[KINDS[kind][1]], other(td.clone())[KINDS[kind][1]])
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(td.clone())[KINDS[kind][1]], other(td.clone())[KINDS[kind][1]])


# -------------------------------------------------------- hidden keys, primers


def nested_actor_critic(env=None, **kwargs):
    keys = {"in_key": ("agent", "trans"), "hidden_size": 4, **kwargs}
    actor_keys = {"hidden_key": ("agent", "h"), "features_key": ("agent", "f"), **keys}
    critic_keys = {"hidden_key": ("agent", "c"), "features_key": ("agent", "g"), "value_key": ("agent", "v"), **keys}
    if env is not None:
        actor = GRUGaussianActor.from_env(env, **actor_keys)
        return ActorCritic(actor, GRUValueHead.from_env(env, extra_keys=["time_left"], **critic_keys))
    actor = GRUGaussianActor(5, 2, action_key=("agent", "action"), **actor_keys)
    return ActorCritic(actor, GRUValueHead(6, extra_keys=[("agent", "time")], **critic_keys))


def test_nested_keys():
    policy = nested_actor_critic()
    td = inputs(3).rename_key_("trans", ("agent", "trans")).set(("agent", "time"), torch.ones(3, 1))
    policy(td)
    assert td["agent", "action"].shape == (3, 2)
    assert td["agent", "v"].shape == (3, 1)
    assert td["agent", "action_log_prob"].shape == (3,)
    assert td["next", "agent", "h"].shape == td["next", "agent", "c"].shape == (3, 1, 4)
    # What the critic concatenates stands beside its features, not at the root.
    assert td["agent", "g_input"].shape == (3, 6)
    assert policy.hidden_keys == [("agent", "h"), ("agent", "c")]


def test_what_is_cut_out_of_a_network_is_a_plain_sequence():
    actor = GRUCategoricalActor(5, 3, hidden_size=4)
    critic, head = GRUValueHead(5, hidden_size=4), MemoryValueHead(4, detach=True)
    td = TensorDict({"trans": torch.randn(2, 5), "is_init": torch.ones(2, 1, dtype=torch.bool)}, [2])
    policy = ActorCritic(actor, critic)
    of_critic = policy.select_subsequence(out_keys=["state_value"])
    assert of_critic.out_keys == critic.out_keys
    assert torch.equal(of_critic(td.clone())["state_value"], critic(td.clone())["state_value"])
    features = critic.select_subsequence(out_keys=["critic_features"])(td.clone())["critic_features"]
    for cut in (critic[:1], policy[-1:][0][:1]):
        assert torch.equal(cut(td.clone())["critic_features"], features)
    assert type(head[:1]) is type(head.select_subsequence()) is TensorDictSequential
    assert policy[-1] is critic


def test_hidden_keys():
    actor = build("gaussian")
    assert ActorCritic(actor, GRUValueHead(5)).hidden_keys == ["actor_hidden", "critic_hidden"]
    assert hidden_keys(MemoryValueHead(4, detach=True)) == []
    assert ActorCritic(actor, MemoryValueHead(4, detach=True)).hidden_keys == ["actor_hidden"]


@pytest.mark.parametrize("nested", [False, True])
def test_primers_have_the_memories_shapes(nested):
    plain = ActorCritic(GRUGaussianActor(5, 2, hidden_size=4, num_layers=2), GRUValueHead(5, hidden_size=6))
    primers = get_primers_from_module(nested_actor_critic() if nested else plain, warn=False)
    shapes = {key: tuple(spec.shape) for primer in primers for key, spec in primer.primers.items(True, True)}
    expected = {("agent", "h"): (1, 4), ("agent", "c"): (1, 4)}
    assert shapes == (expected if nested else {"actor_hidden": (2, 4), "critic_hidden": (1, 6)})


# ------------------------------------------------------------------- from_env


def test_from_env_on_bandits():
    env = quadratic_env()
    # 2 action components, reward, done.
    assert gru_of(GRUGaussianActor.from_env(env)).input_size == 4
    assert last_layer(GRUGaussianActor.from_env(env)).out_features == 2
    value = GRUValueHead.from_env(env, hidden_size=7, num_layers=2, extra_keys=["time_left", "task"])
    assert (gru_of(value).input_size, gru_of(value).hidden_size, gru_of(value).num_layers) == (4 + 1 + 2, 7, 2)
    env = bernoulli_env()
    actor = GRUCategoricalActor.from_env(env, hidden_size=9, features_key="f")
    assert (gru_of(actor).input_size, last_layer(actor).out_features) == (3 + 2, 3)
    head = MemoryValueHead.from_env(env, actor, detach=True, extra_keys=["time_left"])
    assert last_layer(head).in_features == 9 + 1
    td = ActorCritic(actor, head)(env.reset().set("is_init", torch.ones(2, 1, dtype=torch.bool)))
    assert td["action"].shape == (2,)


@pytest.mark.parametrize(
    ("name", "categorical", "make", "input_size", "action_shape"),
    [
        ("Pendulum-v1", False, GRUGaussianActor, 3 + 1 + 2, (1,)),
        ("CartPole-v1", False, GRUCategoricalActor, 4 + 2 + 2, (2,)),
        ("CartPole-v1", True, GRUCategoricalActor, 4 + 2 + 2, ()),
    ],
)
def test_from_env_on_gymnasium(name, categorical, make, input_size, action_shape):
    base = GymEnv(name, categorical_action_encoding=categorical)
    env = TransformedEnv(base, Compose(Trial(steps=3), PreviousStep()))
    actor = make.from_env(env, hidden_size=4)
    td = actor(env.reset().set("is_init", torch.ones(1, dtype=torch.bool)))
    assert gru_of(actor).input_size == input_size
    assert td["action"].shape == action_shape
    assert env.full_action_spec.is_in(td.select("action"))


class NestedQuadratic(QuadraticBandit):
    """A bandit whose action stands at ("agent", "action")."""

    def __init__(self):
        super().__init__(2, batch_size=(3,), seed=0)
        agent = Composite(action=Unbounded((3, 2)), shape=(3,))
        self.full_action_spec = Composite(agent=agent, shape=(3,))

    def _step(self, tensordict):
        return super()._step(tensordict.copy().set("action", tensordict["agent", "action"]))


@pytest.mark.parametrize("renamed", [False, True])
def test_nested_action_keys_in_a_collector(renamed):
    # Nested by the env itself, or by a transform around a flat one.
    env = quadratic_env(None if renamed else NestedQuadratic(), out_key=("agent", "trans"))
    if renamed:
        key = ("agent", "action")
        env.append_transform(RenameTransform(in_keys=[], out_keys=[], in_keys_inv=["action"], out_keys_inv=[key]))
    policy = nested_actor_critic(env)
    (batch,) = Collector(env, policy, frames_per_batch=24, total_frames=24, auto_register_policy_transforms=True)
    assert batch["agent", "action"].shape == (3, 8, 2)
    assert torch.equal(batch["next", "agent", "trans"][:, :3, :2], batch["agent", "action"][:, :3])
    assert_memory_lasts_a_trial(batch, [("agent", "h"), ("agent", "c")])


# ------------------------------------------------------------ batched workers


def assert_memory_lasts_a_trial(batch, keys, trial=4):
    """Memory is zero at every trial's first step, and is handed on at all others."""
    for key in keys:
        hidden = batch[key].flatten(-2)
        alive = hidden.abs().sum(-1) > 0
        expected = torch.arange(batch.shape[-1]) % trial != 0
        assert torch.equal(alive, expected.expand_as(alive))


def test_primers_register_themselves_around_a_batched_env():
    env = SerialEnv(2, bernoulli_env)
    actor = GRUCategoricalActor.from_env(env, hidden_size=4)
    policy = ActorCritic(actor, GRUValueHead.from_env(env, hidden_size=3, extra_keys=["time_left"]))
    (batch,) = Collector(env, policy, frames_per_batch=32, total_frames=32, auto_register_policy_transforms=True)
    assert batch["actor_hidden"].shape == (2, 2, 8, 1, 4)
    assert_memory_lasts_a_trial(batch, policy.hidden_keys)
    with set_recurrent_mode(True):
        again = actor.get_dist(batch.clone(False).select(*policy.in_keys)).log_prob(batch["action"])
    assert torch.allclose(again, batch["action_log_prob"], atol=1e-6)


def test_orthogonal_init_draws_gates_apart_and_leaves_other_layers():
    torch.manual_seed(0)
    actor = GRUGaussianActor(5, 2, hidden_size=8, num_layers=2)
    heads = [p.clone() for name, p in actor.named_parameters() if "gru" not in name]
    assert orthogonal_init_(actor) is actor
    [gru] = [part for part in actor.modules() if isinstance(part, torch.nn.GRU)]
    for layer in (0, 1):
        gates = getattr(gru, f"weight_hh_l{layer}").chunk(3)
        for gate in gates:
            torch.testing.assert_close(gate @ gate.T, torch.eye(8), rtol=0, atol=1e-5)
        assert not torch.equal(gates[0], gates[1])
        assert not getattr(gru, f"bias_hh_l{layer}").any()
        assert not getattr(gru, f"bias_ih_l{layer}").any()
    # Xavier's bound is sqrt(6 / (8 + 5)) for a gate of 8 units and 5 inputs.
    bound = (6 / 13) ** 0.5
    largest = gru.weight_ih_l0.abs().max()
    assert 0.9 * bound < largest <= bound
    for before, after in zip(heads, [p for name, p in actor.named_parameters() if "gru" not in name], strict=True):
        assert torch.equal(before, after)


def test_an_lstm_remembers_over_memory_steps():
    torch.manual_seed(0)
    core = orthogonal_init_(LSTMCore(5, 400), memory_steps=50)
    for gate in core.lstm.weight_hh_l0.chunk(4):
        torch.testing.assert_close(gate @ gate.T, torch.eye(400), rtol=0, atol=1e-4)
    write, forget, new, show = core.lstm.bias_ih_l0.detach().chunk(4)
    assert not any(zero.any() for zero in (new, show, core.lstm.bias_hh_l0))
    # A cell keeps u / (1 + u) of itself in each step and adds 1 / (1 + u) of what is new, with u from U(1, 50).
    torch.testing.assert_close(write, -forget)
    assert 1 <= forget.exp().min() <= forget.exp().max() <= 50
    assert forget.exp().mean().item() == pytest.approx(25.5, abs=2.8)


def test_orthogonal_init_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no torch.nn.GRU or torch.nn.LSTM in this Linear"):
        orthogonal_init_(torch.nn.Linear(2, 2))


def test_units_remember_over_memory_steps():
    torch.manual_seed(0)
    gru = torch.nn.GRU(3, 400, num_layers=2)
    orthogonal_init_(gru, memory_steps=50)
    for layer in (0, 1):
        reset, update, new = getattr(gru, f"bias_ih_l{layer}").detach().chunk(3)
        for zero in (reset, new, getattr(gru, f"bias_hh_l{layer}")):
            assert not zero.any()
        # U(1, 50) has mean 25.5 and standard deviation 14.1, of 400 units' mean 0.7.
        steps = update.exp()
        assert steps.min() >= 1
        assert steps.max() <= 50
        assert steps.mean().item() == pytest.approx(25.5, abs=2.8)
    # Nothing comes in, and each unit's state is a constant: with each step it loses 1 of 1 + u, as an update gate's bias of
    # log(u) says. Eight steps of a unit with u = 50 leave (50 / 51)^8.
    for parameter in gru.parameters():
        parameter.data.zero_()
    gru.bias_ih_l0.data[400:800] = torch.log(torch.tensor(50.0))
    _, hidden = gru(torch.zeros(8, 1, 3), torch.ones(2, 1, 400))
    torch.testing.assert_close(hidden[0], torch.full((1, 400), (50 / 51) ** 8), rtol=1e-5, atol=0)


def test_input_gain_scales_the_input_matrices_alone():
    torch.manual_seed(0)
    gru = orthogonal_init_(torch.nn.GRU(5, 8), input_gain=3.0)
    bound = 3 * (6 / 13) ** 0.5
    largest = gru.weight_ih_l0.abs().max()
    assert 0.9 * bound < largest <= bound
    torch.testing.assert_close(gru.weight_hh_l0[:8] @ gru.weight_hh_l0[:8].T, torch.eye(8), rtol=0, atol=1e-5)


def test_memory_needs_steps_and_biases():
    for steps in (0, math.nan):
        with pytest.raises(ValueError, match=f"memory_steps={steps} must be at least 1"):
            orthogonal_init_(torch.nn.GRU(2, 2), memory_steps=steps)
    with pytest.raises(AttributeError, match="bias_ih_l0"):
        orthogonal_init_(torch.nn.GRU(2, 2, bias=False), memory_steps=10)


def test_gate_gain_is_of_the_update_gate_alone():
    torch.manual_seed(0)
    gru = orthogonal_init_(torch.nn.GRU(5, 8), input_gain=2.0, gate_gain=6.0)
    bound = (6 / 13) ** 0.5
    for gate, gain in zip(gru.weight_ih_l0.chunk(3), (2, 12, 2), strict=True):
        largest = gate.abs().max()
        assert 0.9 * gain * bound < largest <= gain * bound


def test_actor_whose_head_sees_what_the_gru_sees():
    actor = build("categorical", num_cells=[7], skip=True)
    first, last = (layer for layer in actor.modules() if isinstance(layer, nn.Linear))
    assert (first.in_features, first.out_features, last.in_features) == (4 + 5, 7, 7)
    # He's bound for 5 inputs, which a bound for all 9 would fall short of.
    largest = first.weight[:, 4:].abs().max()
    assert (6 / 9) ** 0.5 < largest <= (6 / 5) ** 0.5
    td = actor(inputs(3))
    # What is seen goes past the ReLU, as it is.
    hidden = first(torch.cat([td["actor_features"].relu(), td["trans"]], -1)).relu()
    torch.testing.assert_close(td["logits"], last(hidden))


def test_a_head_of_one_layer_cannot_choose_by_both():
    with pytest.raises(ValueError, match="skip=True without num_cells"):
        build("categorical", skip=True)


# Layers that begin with an activation, in each place where other modules read what they read.
IN_PLACE = {
    "head": lambda act: {"activation": act},
    "head, skip": lambda act: {"activation": act, "num_cells": [7], "skip": True},
    "own head": lambda act: {"head": lambda inputs, outputs: nn.Sequential(act(), nn.Linear(inputs, outputs))},
    "own encoder": lambda act: {"encoder": lambda shape: nn.Sequential(act(), nn.Linear(*shape, 7))},
}


@pytest.mark.parametrize("slots", IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize("kind", KINDS)
def test_layers_write_over_nothing_that_others_read(kind, slots):
    found = []
    for inplace in (False, True):
        network = build(kind, init_range=1.0, **slots(partial(nn.LeakyReLU, inplace=inplace)))
        td = network(inputs(3))
        td[KINDS[kind][1]].sum().backward()
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        found.append([td["trans"], *(td[key] for key in network.out_keys if key != "action"), *gradients])
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_scripted_encoder_may_work_in_place():
    encoder = torch.jit.script(nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True)))
    features = build("categorical", encoder=encoder)(inputs(3))["actor_features"]
    assert features.isfinite().all()


@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_actors_may_have_hidden_layers_after_the_gru(kind):
    actor = build(kind, num_cells=[7, 6])
    linears = [layer for layer in actor.modules() if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linears] == [(4, 7), (7, 6), (6, KINDS[kind][2])]
    features = actor(inputs(3))["actor_features"]
    hidden = features.relu()
    for layer in linears[:-1]:
        hidden = layer(hidden).relu()
    torch.testing.assert_close(actor(inputs(3))[KINDS[kind][1]], linears[-1](hidden))


@each_kind
def test_numpys_integers_are_sizes(kind):
    module = build(kind, hidden_size=np.int64(4), num_layers=np.int64(2), num_cells=[np.int64(6)])
    assert module(inputs(3))["next", module.hidden_key].shape == (3, 2, 4)


@each_kind
def test_networks_of_float64_read_float32_in_a_collector(kind):
    env = quadratic_env() if kind == "gaussian" else bernoulli_env()
    actor = {"gaussian": GRUGaussianActor}.get(kind, GRUCategoricalActor).from_env(
        env, hidden_size=4, dtype=torch.float64
    )
    critic = GRUValueHead.from_env(env, hidden_size=4, extra_keys=["time_left"], dtype=torch.float64)
    policy = ActorCritic(actor, critic)
    (batch,) = Collector(env, policy, frames_per_batch=24, total_frames=24, auto_register_policy_transforms=True)
    assert batch["trans"].dtype == torch.float32
    assert batch["actor_hidden"].dtype == batch["state_value"].dtype == batch["action_log_prob"].dtype == torch.float64
    with set_recurrent_mode(True):
        again = batch.select(*policy.in_keys).clone()
        log_prob = actor.get_dist(again).log_prob(batch["action"])
        value = critic(again)["state_value"]
    torch.testing.assert_close(log_prob, batch["action_log_prob"], rtol=0, atol=1e-12)
    torch.testing.assert_close(value, batch["state_value"], rtol=0, atol=1e-12)
