"""Programs of what users put together: modules, hooks, terms and ties of their own keep their gradients."""

import pytest
import torch
from loss_cases import (
    ACTIONS,
    COMPILED,
    F64,
    INPUTS,
    ROWS,
    STEPS,
    UNITS,
    assert_same,
    batch_of,
    data_of,
    loss_of,
    needs_kernels,
)
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import ClipPPOLoss

from rl2_torchrl import GRUCategoricalActor, GRUValueHead, MemoryValueHead, PPOUpdate, RL2PPOLoss
from rl2_torchrl.gradients import Program
from rl2_torchrl.kernels.workspace import Workspace
from rl2_torchrl.modules import CategoricalActions, GRUCore, LSTMCore, MLPEncoder, RecurrentActor, RecurrentCritic
from rl2_torchrl.modules.distributions import Gaussian, MultiCategoricalActions, TanhGaussianActions
from rl2_torchrl.modules.layers import Head


class Doubled(nn.Module):
    """Something of a user's, with a parameter of its own."""

    def __init__(self, size, dtype=torch.float64):
        super().__init__()
        self.scale = nn.Parameter(torch.full((size,), 2.0, dtype=dtype))

    def forward(self, x):
        return (x * self.scale).sin()


def _actor(**options):
    return GRUCategoricalActor(INPUTS, ACTIONS, hidden_size=UNITS, init_range=1.0, **F64, **options)


def _user_module_between():
    """An unknown module between core and head, and one in front of the core."""
    body = [*_actor().module[0].module[:1]]
    modules = [
        TensorDictModule(Doubled(INPUTS), ["trans"], ["seen"]),
        RecurrentActor(INPUTS, CategoricalActions(ACTIONS), hidden_size=UNITS, **F64).module[0][0],
    ]
    gru = body[0]
    gru.in_keys[0] = "seen"
    head = TensorDictModule(Head(UNITS, ACTIONS, init_range=1.0, **F64), ["mixed"], ["logits"])
    mixed = TensorDictModule(Doubled(UNITS), ["actor_features"], ["mixed"])
    actor = ProbabilisticActor(
        TensorDictSequential(modules[0], gru, mixed, head),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    return RL2PPOLoss(actor, MemoryValueHead(UNITS, detach=False, init_range=1.0, **F64))


def _critic_on(key, **options):
    return RL2PPOLoss(_actor(), GRUValueHead(UNITS, hidden_size=12, in_key=key, init_range=1.0, **F64, **options))


def _critic_on_logits(**options):
    critic = MemoryValueHead(
        UNITS,
        detach=False,
        extra_keys=["logits"],
        extra_size=ACTIONS,
        num_cells=[4],
        init_range=1.0,
        **F64,
        **options,
    )
    return RL2PPOLoss(_actor(), critic)


def _tied():
    actor, critic = _actor(), GRUValueHead(INPUTS, hidden_size=UNITS, hidden_key="actor_hidden", init_range=1.0, **F64)
    _gru(critic).weight_hh_l0 = _gru(actor).weight_hh_l0
    return RL2PPOLoss(actor, critic)


def _gru(network):
    return next(part for part in network.modules() if isinstance(part, nn.GRU))


def _changed(change, critic="separate", **options):
    loss = loss_of("categorical", critic, torch.float64, **options)
    change(loss)
    return loss


def _hook_on(kind):
    def change(loss):
        part = next(module for module in loss.modules() if type(module) is kind)
        part.register_forward_hook(
            lambda module, inputs, out: 2 * out if isinstance(out, torch.Tensor) else (2 * out[0], *out[1:])
        )

    return _changed(change)


def _hook_on_core(loss):
    core = next(module for module in loss.modules() if isinstance(module, GRUCore))
    core.register_forward_hook(lambda module, inputs, out: out.set("actor_features", 2 * out["actor_features"]))


class _Doubling(GRUCore):
    def forward(self, tensordict):
        out = super().forward(tensordict)
        return out.set(self.out_keys[0], 2 * out[self.out_keys[0]])


class _DoublingSequences(GRUCore):
    def unroll(self, x, memory, is_init, *, with_memory=True):
        features, *memory = super().unroll(x, memory, is_init, with_memory=with_memory)
        return 2 * features, *memory


def _core_of_its_own(kind):
    actor = RecurrentActor(
        INPUTS, CategoricalActions(ACTIONS), core=kind(INPUTS, UNITS, **F64), hidden_key="actor_hidden", **F64
    )
    return RL2PPOLoss(actor, GRUValueHead(INPUTS, hidden_size=12, **F64))


def _transposed(loss):
    for name in ("weight_hh_l0", "weight_ih_l0"):
        weight = getattr(_gru(loss.actor_network), name)
        weight.data = weight.data.t().contiguous().t()
    layer = [m for m in loss.modules() if isinstance(m, nn.Linear)][0]
    layer.weight.data = layer.weight.data.t().contiguous().t()


def _strided_encoder():
    class Strided(nn.Module):
        def forward(self, x):
            return torch.cat((x, x), -1)[..., ::2]

    actor = RecurrentActor(
        INPUTS, CategoricalActions(ACTIONS), encoder=Strided(), hidden_size=UNITS, hidden_key="actor_hidden", **F64
    )
    return RL2PPOLoss(actor, GRUValueHead(INPUTS, hidden_size=12, **F64))


class _Codes(nn.Module):
    """Two outputs by name, one of them whole numbers."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(INPUTS, 4, **F64)

    def forward(self, x):
        seen = self.layer(x)
        return {"code": seen.argmax(-1, keepdim=True), "more": x, "seen": seen}


def _encoder_with_codes():
    critic = TensorDictSequential(
        TensorDictModule(_Codes(), ["trans"], ["seen", "code"]),
        TensorDictModule(lambda seen, code: seen + code, ["seen", "code"], ["summed"]),
        GRUValueHead(4, hidden_size=12, in_key="summed", init_range=1.0, **F64),
    )
    return RL2PPOLoss(_actor(), critic)


def _drops_an_output():
    head = TensorDictModule(lambda x: (x[..., :1].sin(), None), ["actor_features"], ["state_value", "_"])
    return RL2PPOLoss(_actor(), TensorDictSequential(head))


def _hands_on():
    """An output that goes to the next step is nothing to the loss."""
    head = TensorDictModule(lambda x: (x[..., :1].sin(), x), ["actor_features"], ["state_value", ("next", "handed")])
    return RL2PPOLoss(_actor(), TensorDictSequential(head))


def _lstm():
    actor = RecurrentActor(
        INPUTS, CategoricalActions(ACTIONS), core=LSTMCore(INPUTS, UNITS, **F64), hidden_key="actor_hidden", **F64
    )
    return RL2PPOLoss(actor, GRUValueHead(INPUTS, hidden_size=12, **F64))


def _mlp_encoder(**options):
    encoder = MLPEncoder(INPUTS, [8, 7], **F64, **options)
    actor = RecurrentActor(
        INPUTS, CategoricalActions(ACTIONS), encoder=encoder, hidden_size=UNITS, hidden_key="actor_hidden", **F64
    )
    critic = RecurrentCritic(
        INPUTS, encoder=MLPEncoder(INPUTS, [6], **F64), hidden_size=12, hidden_key="critic_hidden", **F64
    )
    return RL2PPOLoss(actor, critic)


def _tied_to_anothers():
    """In front of the critic's GRU stands a function on a weight of the actor's."""
    loss = _mlp_encoder()
    weight = next(m for m in loss.actor_network.modules() if isinstance(m, MLPEncoder)).layers[0].weight
    tied = TensorDictModule(lambda x: x @ weight.t(), ["trans"], ["tied"])
    critic = GRUValueHead(8, hidden_size=12, in_key="tied", init_range=1.0, **F64)
    return RL2PPOLoss(loss.actor_network, TensorDictSequential(tied, critic))


COMPOSED = {
    "user's modules": (_user_module_between, 2),
    "critic on the actor's features": (lambda: _critic_on("actor_features"), 0),
    "critic that writes over them": (lambda: _critic_on("actor_features", features_key="actor_features"), 0),
    "critic on logits": (_critic_on_logits, 0),
    "shared weights": (_tied, 0),
    "function on another's weight": (_tied_to_anothers, 1),
    "hook on a head": (lambda: _hook_on(Head), 1),
    "hook on a GRU": (lambda: _hook_on(nn.GRU), 1),
    "hook on a core": (lambda: _changed(_hook_on_core), 1),
    "core with a forward of its own": (lambda: _core_of_its_own(_Doubling), 1),
    "core with sequences of its own": (lambda: _core_of_its_own(_DoublingSequences), 1),
    "transposed weights": (lambda: _changed(_transposed), 0),
    "frozen": (lambda: _changed(lambda loss: _gru(loss.actor_network).requires_grad_(False)), 0),
    "frozen layer": (lambda: _changed(lambda loss: _gru(loss.actor_network).bias_hh_l0.requires_grad_(False)), 0),
    "no value loss": (lambda: loss_of("categorical", "separate", torch.float64, critic_coeff=0.0), 0),
    "parameter of nobody's": (
        lambda: _changed(lambda loss: loss.register_parameter("more", nn.Parameter(torch.ones(1)))),
        0,
    ),
    "weight norm": (
        lambda: _changed(
            lambda loss: nn.utils.parametrizations.weight_norm(
                [m for m in loss.modules() if isinstance(m, nn.Linear)][0]
            )
        ),
        1,
    ),
    "strided encoder": (_strided_encoder, 1),
    "outputs by name, of whole numbers too": (_encoder_with_codes, 2),
    "output that is dropped": (_drops_an_output, 1),
    "output for the next step": (_hands_on, 1),
    "LSTM": (_lstm, 1),
    "MLP encoder": (_mlp_encoder, 0),
    "MLP encoder, tanh": (lambda: _mlp_encoder(activation=nn.Tanh), 0),
    "MLP encoder, SiLU": (lambda: _mlp_encoder(activation=nn.SiLU), 1),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_whatever_is_put_together_is_right_and_only_the_unknown_runs_under_autograd(name):
    make, unknown = COMPOSED[name]
    torch.manual_seed(0)
    loss = make()
    data = data_of("categorical", torch.float64)
    data["actor_hidden_cell"] = data["actor_hidden"].flip(0)
    program = assert_same(loss, data)
    if COMPILED:
        assert sum(part.kind == "autograd" for part in program.parts) == unknown


ACTIONS_OF = {
    "one-hot": (
        lambda: CategoricalActions(ACTIONS, one_hot=True),
        lambda n: nn.functional.one_hot(n[..., 0].long().abs() % 3, 3),
        0,
    ),
    "several": (
        lambda: MultiCategoricalActions([2, 3]),
        lambda n: torch.stack((n[..., 0].long().abs() % 2, n[..., 1].long().abs() % 3), -1),
        1,
    ),
    "squashed": (lambda: TanhGaussianActions([-1.0, -2.0], [1.0, 2.0]), lambda n: n[..., :2].tanh(), 1),
}


@pytest.mark.parametrize("name", ACTIONS_OF)
def test_distributions(name):
    make, action, unknown = ACTIONS_OF[name]
    torch.manual_seed(0)
    actor = RecurrentActor(INPUTS, make(), hidden_size=UNITS, hidden_key="actor_hidden", init_range=0.5, **F64)
    loss = RL2PPOLoss(actor, GRUValueHead(INPUTS, hidden_size=12, **F64), entropy_bonus=name != "squashed")
    data = data_of("gaussian", torch.float64)
    data["action"] = action(3 * data["action"])
    program = assert_same(loss, data, tolerance=1e-8 if name == "squashed" else 1e-12)
    assert sum(part.kind == "autograd" for part in program.parts) == (unknown if COMPILED else len(program.parts))


def test_a_head_that_works_in_place():
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        head = nn.Sequential(nn.ReLU(inplace=inplace), nn.Linear(UNITS, ACTIONS, **F64))
        actor = RecurrentActor(INPUTS, CategoricalActions(ACTIONS), head=head, hidden_size=UNITS, **F64)
        loss = RL2PPOLoss(actor, MemoryValueHead(UNITS, detach=False, **F64))
        Program(loss)(data_of("categorical", torch.float64))
        found.append([parameter.grad for parameter in loss.parameters()])
    torch.testing.assert_close(*found)


def test_one_scale_for_all_dimensions():
    loss = loss_of("gaussian", "separate", torch.float64, entropy_bonus=True)
    gaussian = next(module for module in loss.modules() if isinstance(module, Gaussian))
    gaussian.log_std = nn.Parameter(torch.tensor([-0.5], **F64))
    program = assert_same(loss, data_of("gaussian", torch.float64))
    assert "autograd" in [part.kind for part in program.parts]


def test_entropy_without_a_closed_form_is_estimated_as_torchrl_does():
    actor = RecurrentActor(
        INPUTS, TanhGaussianActions([-1.0] * 3, [1.0] * 3), hidden_size=UNITS, hidden_key="actor_hidden", **F64
    )
    loss = RL2PPOLoss(actor, entropy_bonus=True)
    data = data_of("gaussian", torch.float64)
    data["action"] = data["action"].tanh()
    # -log p of one draw of 54 steps; both estimate the same entropy.
    values = [Program(loss)(data)["entropy"] for _ in range(50)]
    theirs = [float(ClipPPOLoss.forward(loss, TensorDict(data, [ROWS, STEPS]))["entropy"]) for _ in range(50)]
    assert sum(values) / 50 == pytest.approx(sum(theirs) / 50, abs=0.1)


def test_parameters_frozen_after_a_step_lose_their_gradient():
    """A stale one would be stepped along for ever."""
    loss, data = loss_of("categorical", "separate", torch.float64), data_of("categorical", torch.float64)
    Program(loss)(data)
    weight = _gru(loss).weight_hh_l0
    assert weight.grad is not None
    weight.requires_grad_(False)
    Program(loss)(data)
    assert weight.grad is None


def test_hooks_on_gradients_are_honoured():
    """Autograd runs them, and an update says so, also where they come between two batches."""
    update = PPOUpdate(loss_of("categorical", "separate", torch.float64), minibatches=1, epochs=1, lr=0.0)
    weight, bias, seen = _gru(update.loss).weight_hh_l0, _gru(update.loss).bias_hh_l0, []
    update(batch_of("categorical", torch.float64))
    assert update.backend != "autograd"
    expected = 3 * weight.grad
    weight.register_hook(lambda gradient: 3 * gradient)
    bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    update(batch_of("categorical", torch.float64))
    assert "hooks on their gradients" in update.reason
    torch.testing.assert_close(weight.grad, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen, [bias.grad])


@pytest.mark.parametrize("key", ["trans", "is_init", "action", "advantage", "action_log_prob", "value_target", "task"])
def test_missing_entries_are_named(key):
    data = data_of("categorical", torch.float32)
    del data[key]
    loss = loss_of("categorical", "extra", torch.float32)
    with pytest.raises(KeyError, match=key):
        Program(loss)(data)
    with pytest.raises(KeyError, match=key):
        loss(TensorDict(data, [ROWS, STEPS]))


def test_sizes_and_dtypes_of_data():
    """What does not fit raises; numbers of another precision are converted or promoted as PyTorch does it."""
    loss = loss_of("categorical", "separate", torch.float64)
    data = data_of("categorical", torch.float64)
    for key in ("trans", "actor_hidden", "critic_hidden", "advantage", "action_log_prob", "value_target"):
        changed = {**data, key: data[key].float()}
        expected = Program(loss)({**data, key: data[key].float().double()})
        assert Program(loss)(changed) == pytest.approx(expected, rel=1e-7)
    for key in ("trans", "actor_hidden"):
        with pytest.raises((ValueError, RuntimeError)):
            Program(loss)({**data, key: data[key][..., :-1]})
    with pytest.raises(ValueError, match="one a row"):
        Program(loss)({**data, "action": data["action"].unsqueeze(-1)})
    with pytest.raises(ValueError, match="one shape"):
        Program(loss)({**data, "value_target": data["value_target"].squeeze(-1)})


def _reads_bytes(critic):
    """An actor whose GRU reads bytes as they are, and ``critic``, one that scales them to [0, 1]."""
    torch.manual_seed(0)
    actor = RecurrentActor({"ram": [4]}, CategoricalActions(ACTIONS), in_key="ram", hidden_size=UNITS, **F64)
    return RL2PPOLoss(actor, critic())


BYTES = {
    "beside the features": lambda: MemoryValueHead(
        UNITS, detach=True, extra_keys=["ram"], extra_size=4, num_cells=[8], init_range=1.0, **F64
    ),
    "past the core": lambda: RecurrentCritic(
        {"ram": [4]}, in_key="ram", hidden_size=12, num_cells=[6], skip=True, init_range=1.0, **F64
    ),
    "to an encoder": lambda: RecurrentCritic(
        {"ram": [4]}, in_key="ram", encoder=MLPEncoder, hidden_size=12, init_range=1.0, **F64
    ),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_are_scaled_as_the_networks_themselves_scale_them(name):
    """Also where a GRU has read the same entry before, without a scale."""
    data = data_of("categorical", torch.float64)
    data["ram"] = torch.randint(256, (ROWS, STEPS, 4), generator=torch.Generator().manual_seed(2)).byte()
    assert_same(_reads_bytes(BYTES[name]), data)


class _Shown(nn.Module):
    """Keeps what it is shown, and a copy of it as it then was."""

    in_keys = ("actor_features",)

    def __init__(self):
        super().__init__()
        self.kept = []

    def keep(self, tensor):
        self.kept.append((tensor.detach(), tensor.detach().clone()))

    def forward(self, features):
        self.keep(features)
        return {"loss_size": features.square().mean()}


class _ShownOnTheWay(_Shown):
    """Between core and head, where it is shown the gradient too."""

    def forward(self, features):
        self.keep(features)
        if features.requires_grad:
            features.register_hook(self.keep)
        return features


def _hook_that_keeps(shown):
    loss = loss_of("categorical", "separate", torch.float64)
    head = next(module for module in loss.modules() if isinstance(module, Head))
    head.register_forward_hook(lambda module, inputs, out: shown.keep(inputs[0]))
    return loss


def _module_that_keeps(shown):
    actor = _actor()
    core, head = actor.module[0].module
    head.in_keys[0] = "shown"
    between = TensorDictModule(shown, ["actor_features"], ["shown"])
    policy = TensorDictSequential(core, between, head)
    actor = ProbabilisticActor(
        policy, in_keys=["logits"], distribution_class=torch.distributions.Categorical, return_log_prob=True
    )
    return RL2PPOLoss(actor, GRUValueHead(INPUTS, hidden_size=12, **F64))


KEPT = {
    "hook on a head": (_Shown, _hook_that_keeps),
    "term": (_Shown, lambda shown: loss_of("categorical", "separate", torch.float64, terms=[shown])),
    "module on the way": (_ShownOnTheWay, _module_that_keeps),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_users_were_shown_stays_as_it_was(name):
    """Later minibatches are written to memory that nobody else has seen."""
    make, loss_with = KEPT[name]
    shown = make()
    program, data = Program(loss_with(shown)), data_of("categorical", torch.float64)
    for scale in (1.0, 2.0, 3.0):
        program({**data, "trans": scale * data["trans"]})
    assert len(shown.kept) >= 3
    assert all(torch.equal(tensor, before) for tensor, before in shown.kept)


class _TimeFirst(nn.Module):
    """A term whose gradient by the features lies time-major in memory."""

    in_keys = ("actor_features", "logits")

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, UNITS, **F64))

    def forward(self, features, logits):
        features = features.transpose(0, 1).contiguous() * self.weight
        return {"loss_first": features.square().mean() + logits.square().mean()}


def test_a_term_that_works_time_first_is_right_in_every_minibatch():
    loss = loss_of("categorical", "shared", torch.float64, terms=[_TimeFirst()])
    data = data_of("categorical", torch.float64)
    losses = loss(TensorDict(data, [ROWS, STEPS]))
    total = sum(value for name, value in losses.items() if name.startswith("loss_"))
    expected = torch.autograd.grad(total, list(loss.parameters()))
    program = Program(loss)
    for _ in range(3):
        program(data)
        for parameter, gradient in zip(loss.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-12)


@needs_kernels
@pytest.mark.parametrize("critic", ["separate", "shared"])
def test_what_users_are_not_shown_lies_in_the_memory_of_the_minibatch_before(critic, monkeypatch):
    take, places = Workspace.take, []

    def noted(like, shape):
        places[-1].add((tensor := take(like, shape)).data_ptr())
        return tensor

    monkeypatch.setattr(Workspace, "_LEAST", 0)
    monkeypatch.setattr(Workspace, "take", noted)
    program, data = Program(loss_of("categorical", critic, torch.float32)), data_of("categorical", torch.float32)
    for _ in range(4):
        places.append(set())
        program(data)
    assert len(places[0]) >= 3
    assert places[1] == places[2] == places[3]
