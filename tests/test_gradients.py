"""Parts, programs and compiled passes give the losses and gradients that TorchRL's own `ClipPPOLoss` gives under autograd."""

import ctypes

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import ClipPPOLoss

from rl2_torchrl import (
    GRUCategoricalActor,
    GRUGaussianActor,
    GRUValueHead,
    MemoryValueHead,
    PPOUpdate,
    RL2PPOLoss,
    kernels,
)
from rl2_torchrl.gradients import Program
from rl2_torchrl.gradients.compiled import _METRICS, CompiledPass, _Network, _Parameter, _Pass, why_not_compiled
from rl2_torchrl.gradients.networks import parts_of
from rl2_torchrl.gradients.policy import ENTROPY, LOG_PROB, log_scale_key
from rl2_torchrl.kernels.workspace import Workspace
from rl2_torchrl.modules import CategoricalActions, GRUCore, LSTMCore, MLPEncoder, RecurrentActor, RecurrentCritic
from rl2_torchrl.modules.distributions import Gaussian, MultiCategoricalActions, TanhGaussianActions
from rl2_torchrl.modules.layers import Head

ROWS, STEPS, INPUTS, ACTIONS, UNITS = 9, 6, 5, 3, 20
CRITICS = {
    "none": lambda **_: None,
    "separate": lambda **options: GRUValueHead(INPUTS, hidden_size=12, **options),
    "extra": lambda **options: GRUValueHead(INPUTS + 3, hidden_size=12, extra_keys=["time_left", "task"], **options),
    "shared": lambda **options: MemoryValueHead(UNITS, detach=False, **options),
    "shared, cells": lambda **options: MemoryValueHead(UNITS, detach=False, num_cells=[7, 9], **options),
    "shared, extra": lambda **options: MemoryValueHead(
        UNITS, detach=False, extra_keys=["time_left", "task"], extra_size=3, num_cells=[7], **options
    ),
    "detached": lambda **options: MemoryValueHead(UNITS, detach=True, **options),
    "detached, extra": lambda **options: MemoryValueHead(
        UNITS, detach=True, extra_keys=["time_left", "task"], extra_size=3, num_cells=[7], **options
    ),
    "wide": lambda **options: MemoryValueHead(UNITS, detach=False, num_cells=[70], **options),
}

COMPILED = kernels.load(torch.float32) is not None
needs_kernels = pytest.mark.skipif(not COMPILED, reason="no C compiler")

# What stands after the GRU of an actor.
HEADS = {
    "": {},
    ", tanh": {"activation": nn.Tanh},
    ", elu": {"activation": nn.ELU, "num_cells": [4]},
    ", layers": {"num_layers": 2},
    ", cells": {"num_cells": [7, 9]},
    ", skip": {"num_cells": [7], "skip": True},
}


def loss_of(kind, critic, dtype, **options):
    torch.manual_seed(0)
    family, comma, head = kind.partition(",")
    actor_class = GRUGaussianActor if family == "gaussian" else GRUCategoricalActor
    actor = actor_class(INPUTS, ACTIONS, hidden_size=UNITS, init_range=1.0, dtype=dtype, **HEADS[comma + head])
    return RL2PPOLoss(actor, CRITICS[critic](init_range=1.0, dtype=dtype), **options)


def data_of(kind, dtype, steps=STEPS, layers=1):
    draw = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(ROWS, steps, *shape, generator=draw, dtype=dtype)

    is_gaussian = kind.startswith("gaussian")
    return {
        "trans": normal(INPUTS),
        "is_init": torch.rand(ROWS, steps, 1, generator=draw) < 0.2,
        "time_left": normal(1),
        "task": normal(2),
        "actor_hidden": normal(layers, UNITS),
        "critic_hidden": normal(1, 12),
        "advantage": normal(1),
        "value_target": normal(1),
        "action": normal(ACTIONS) if is_gaussian else torch.randint(ACTIONS, (ROWS, steps), generator=draw),
        "action_log_prob": 0.3 * normal() - (4 if is_gaussian else 1),
    }


def by_torchrl(loss, data):
    """Losses and gradients of `ClipPPOLoss` on the same networks, by autograd."""
    out = ClipPPOLoss.forward(loss, TensorDict(data, next(iter(data.values())).shape[:2]))
    total = sum(value for name, value in out.items() if name.startswith("loss_"))
    trained = [p for p in loss.parameters() if p.requires_grad]
    return out, torch.autograd.grad(total, trained, allow_unused=True)


def assert_same(loss, data, tolerance=1e-12, grads_are_none=False):
    """`Program` and `RL2PPOLoss` both give what TorchRL gives, and twice in the same memory."""
    expected, gradients = by_torchrl(loss, data)
    out = loss(TensorDict(data, next(iter(data.values())).shape[:2]))
    program = Program(loss)
    assert loss.why_not_parts() is None
    assert set(out.keys()) == set(expected.keys())
    for _ in range(2):
        losses = program(data)
        for name, value in losses.items():
            assert value == pytest.approx(float(expected[name].detach()), rel=10 * tolerance, abs=10 * tolerance), name
            torch.testing.assert_close(out[name], expected[name].to(out[name]), rtol=tolerance, atol=tolerance)
        trained = [(name, p) for name, p in loss.named_parameters() if p.requires_grad]
        for (name, parameter), gradient in zip(trained, gradients, strict=True):
            if gradient is None:
                assert parameter.grad is None or not parameter.grad.any(), name
            else:
                torch.testing.assert_close(parameter.grad, gradient, rtol=tolerance, atol=tolerance, msg=name)
    ours = [p for _, p in trained]
    total = sum(value for name, value in out.items() if name.startswith("loss_"))
    for one, gradient in zip(torch.autograd.grad(total, ours, allow_unused=True), gradients, strict=True):
        assert (one is None) == (gradient is None)
        if one is not None:
            torch.testing.assert_close(one, gradient, rtol=tolerance, atol=tolerance)
    return program


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", [f"{family}{head}" for family in ("categorical", "gaussian") for head in HEADS])
@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize(("steps", "entropy"), [(1, None), (STEPS, 0.1)])
def test_losses_and_gradients_are_torchrls(dtype, tolerance, kind, critic, entropy, steps):
    if kind == "gaussian, skip":
        pytest.skip("a Gaussian actor has no skip here")
    loss = loss_of(kind, critic, dtype, entropy_bonus=entropy is not None, entropy_coeff=entropy)
    program = assert_same(loss, data_of(kind, dtype, steps, layers=2 if "layers" in kind else 1), tolerance)
    if COMPILED:
        kinds = [part.kind for part in program.parts]
        assert kinds.count("autograd") == ("elu" in kind)


@pytest.mark.parametrize("family", ["categorical", "gaussian"])
@pytest.mark.parametrize("entry", ["advantage", "action_log_prob"])
def test_data_of_another_dtype_than_the_policys(family, entry):
    data = data_of(family, torch.float32)
    assert_same(loss_of(family, "separate", torch.float32), {**data, entry: data[entry].double()}, 1e-5)


def test_a_gradient_by_hand():
    """One step, one unit, all GRU weights 0: h = 0, so that the mean is the last bias, and z = a - mean with log_std = 0."""
    actor = GRUGaussianActor(1, 1, hidden_size=1, init_log_std=0.0)
    loss = RL2PPOLoss(actor, clip_epsilon=0.2)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.zero_()
    # a = 2: log p = -2 - log(2 pi) / 2. The old log-probability is the same: r = 1, the objective is A = 3.
    data = {"trans": torch.ones(1, 1, 1), "is_init": torch.ones(1, 1, 1, dtype=torch.bool)}
    data |= {"action": torch.full((1, 1, 1), 2.0), "advantage": torch.full((1, 1, 1), 3.0)}
    data["action_log_prob"] = torch.full((1, 1), -2 - 0.9189385332)
    assert Program(loss)(data)["loss_objective"] == pytest.approx(-3)
    gradients = {
        name.rpartition(".")[-1]: p.grad for name, p in loss.named_parameters() if "layers" in name or "log_std" in name
    }
    assert gradients["bias"].item() == pytest.approx(-3 * 2)  # -A z
    assert gradients["log_std"].item() == pytest.approx(-3 * (2**2 - 1))  # -A (z^2 - 1)


# ------------------------------------------------------- what a user puts together


class Doubled(nn.Module):
    """Something of a user's, with a parameter of its own."""

    def __init__(self, size, dtype=torch.float64):
        super().__init__()
        self.scale = nn.Parameter(torch.full((size,), 2.0, dtype=dtype))

    def forward(self, x):
        return (x * self.scale).sin()


F64 = {"dtype": torch.float64}


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
    """They are autograd's to run, and an update says so, also where they come between two batches."""
    update = PPOUpdate(loss_of("categorical", "separate", torch.float64), minibatches=1, epochs=1, lr=0.0)
    weight, bias, seen = _gru(update.loss).weight_hh_l0, _gru(update.loss).bias_hh_l0, []
    update(batch_of("categorical", torch.float64))
    assert update.backend != "autograd"
    expected = 3 * weight.grad
    weight.register_hook(lambda gradient: 3 * gradient)
    bias.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    update(batch_of("categorical", torch.float64))
    assert (update.backend, "hooks on their gradients" in update.reason) == ("autograd", True)
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


class _ShownByHand(_Shown):
    def with_gradients(self, features):
        self.keep(features)
        return {"loss_size": features.square().mean()}, (2 / features.numel() * features,)


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
    "term by hand": (_ShownByHand, lambda shown: loss_of("categorical", "separate", torch.float64, terms=[shown])),
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

    monkeypatch.setattr(Workspace, "take", noted)
    program, data = Program(loss_of("categorical", critic, torch.float32)), data_of("categorical", torch.float32)
    for _ in range(4):
        places.append(set())
        program(data)
    assert len(places[0]) >= 3
    assert places[1] == places[2] == places[3]


# ------------------------------------------------------------------- parts alone


def _run(part, state, wanted, slopes):
    """Gradients of ``sum(slope * output)`` by entries and parameters, by the part and by autograd through its `run`."""
    part.wanted = set(wanted)
    gradients = {key: slope.clone() for key, slope in slopes.items()}
    entries = dict(state)
    with torch.no_grad():
        part.forward(entries)
        part.backward(gradients)
    leaves = {key: state[key].clone().requires_grad_() for key in wanted}
    entries = {**state, **leaves}
    part.run(entries)
    total = sum((slope * entries[key]).sum() for key, slope in slopes.items())
    sources = [*leaves.values(), *part.parameters]
    expected = torch.autograd.grad(total, sources, allow_unused=True)
    ours = [gradients.get(source) for source in (*leaves, *part.parameters)]
    for one, other in zip(ours, expected, strict=True):
        if other is None:
            assert one is None
        else:
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("has_memory", [True, False])
@pytest.mark.parametrize("wants_input", [True, False])
@pytest.mark.parametrize("steps", [1, STEPS])
def test_the_grus_gradients(layers, has_memory, wants_input, steps):
    torch.manual_seed(0)
    data = data_of("categorical", torch.float64, steps=steps, layers=layers)
    [part, _] = parts_of(GRUValueHead(INPUTS, hidden_size=UNITS, num_layers=layers, hidden_key="actor_hidden", **F64))
    state = {key: data[key] for key in ("trans", "is_init", *(["actor_hidden"] if has_memory else []))}
    slope = torch.randn(ROWS, steps, UNITS, **F64)
    _run(part, state, ["trans"] if wants_input else [], {"critic_features": slope})


CHAINS = {
    "linear": lambda: MLPEncoder(UNITS, [4], activation=nn.Identity, **F64),
    "relu at the end": lambda: MLPEncoder(UNITS, [4], **F64),
    "several": lambda: MLPEncoder(UNITS, [70, 4], **F64),
    "tanh": lambda: MLPEncoder(UNITS, [70, 4], activation=nn.Tanh, **F64),
    "head": lambda: Head(UNITS, 4, init_range=1.0, **F64),
    "head, tanh": lambda: Head(UNITS, 4, init_range=1.0, num_cells=[9], activation=nn.Tanh, **F64),
    "head, wide": lambda: Head(UNITS, 4, init_range=1.0, num_cells=[90], **F64),
}


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("wants_input", [True, False])
def test_the_gradients_of_chains(name, wants_input):
    torch.manual_seed(0)
    module = TensorDictModule(CHAINS[name](), ["x"], ["y"])
    [part] = parts_of(module)
    x = torch.randn(ROWS, STEPS, UNITS, **F64)
    for state in ({"x": x}, {"x": x.transpose(0, 1).contiguous().transpose(0, 1)}):
        _run(part, state, ["x"] if wants_input else [], {"y": torch.randn(ROWS, STEPS, 4, **F64)})


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
@pytest.mark.parametrize("wanted", [(), ("x",), ("extra",), ("x", "extra")])
def test_the_gradients_of_heads_with_further_inputs(activation, wanted):
    torch.manual_seed(0)
    critic = MemoryValueHead(
        UNITS, detach=False, extra_keys=["extra"], extra_size=2, num_cells=[5], features_key="x",
        activation=activation, init_range=1.0, **F64,
    )  # fmt: skip
    [part] = parts_of(critic)
    state = {"x": torch.randn(ROWS, STEPS, UNITS, **F64), "extra": torch.randn(ROWS, STEPS, 2, **F64)}
    _run(part, state, wanted, {"state_value": torch.randn(ROWS, STEPS, 1, **F64)})


@pytest.mark.parametrize("wanted", [(), ("x",), ("y", "x")])
def test_the_gradients_of_inputs_side_by_side(wanted):
    from rl2_torchrl.modules.layers import Concat

    [part] = parts_of(TensorDictModule(Concat(), ["x", "y"], ["z"]))
    state = {"x": torch.randn(ROWS, STEPS, 2, **F64), "y": torch.randn(ROWS, STEPS, 1, **F64)}
    slopes = {"z": torch.randn(ROWS, STEPS, 3, **F64)}
    part.wanted = set(wanted)
    part.forward(state)
    gradients = dict(slopes)
    part.backward(gradients)
    expected = {"x": slopes["z"][..., :2], "y": slopes["z"][..., 2:]}
    assert gradients.keys() == set(wanted)
    assert all(torch.equal(gradients[key], expected[key]) for key in wanted)


@pytest.mark.parametrize("reads", [(LOG_PROB,), (ENTROPY,), (LOG_PROB, ENTROPY)])
@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_the_gradients_of_policies(kind, reads):
    if not COMPILED:
        pytest.skip("autograd's")
    loss = loss_of(kind, "none", torch.float64, entropy_bonus=True)
    part = loss.network_parts()[-1]
    data = data_of(kind, torch.float64)
    slopes = {key: torch.randn(ROWS, STEPS, **F64) for key in reads}
    if kind == "categorical":
        state = {"action": data["action"], "logits": torch.randn(ROWS, STEPS, ACTIONS, **F64)}
        _run(part, state, ["logits"], slopes)
        return
    log_std = torch.randn(ACTIONS, **F64)
    loc = torch.randn(ROWS, STEPS, ACTIONS, **F64)
    state = {"action": data["action"], "loc": loc, "scale": log_std.exp().expand_as(loc)}
    _run(part, state, ["loc", "scale"], slopes)  # nobody says that the scale is the same in all steps
    by_entries = {key: slope.clone() for key, slope in slopes.items()}
    part.forward(state | {log_scale_key("scale"): log_std})
    part.forward(state | {log_scale_key("scale"): log_std})
    part.backward(by_entries)
    leaves = [loc.clone().requires_grad_(), log_std.clone().requires_grad_()]
    entries = {**state, "loc": leaves[0], "scale": leaves[1].exp().expand_as(loc)}
    part.run(entries)
    total = sum((slope * entries[key]).sum() for key, slope in slopes.items())
    expected = torch.autograd.grad(total, leaves, allow_unused=True)
    torch.testing.assert_close(by_entries[log_scale_key("scale")], expected[1], rtol=1e-11, atol=1e-11)
    if expected[0] is not None:
        torch.testing.assert_close(by_entries["loc"], expected[0], rtol=1e-11, atol=1e-11)


def test_a_scale_that_another_term_reads_gets_its_gradient_too():
    class Wide(nn.Module):
        in_keys = ("scale", "loc")

        def forward(self, scale, loc):
            return {"loss_wide": (scale.square() + loc.square()).mean()}

    loss = loss_of("gaussian", "none", torch.float64)
    loss.terms.append(Wide())
    data = data_of("gaussian", torch.float64)
    out = loss(TensorDict(data, [ROWS, STEPS]))
    gradients = torch.autograd.grad(out["loss_objective"] + out["loss_wide"], list(loss.parameters()))
    Program(loss)(data)
    for parameter, gradient in zip(loss.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------ updates


def batch_of(kind, dtype):
    """A batch of whole trials with values, rewards and ends."""
    batch = TensorDict(data_of(kind, dtype), [ROWS, STEPS])
    batch["state_value"] = batch["value_target"].clone()
    done = batch["is_init"].roll(-1, 1)
    done[:, -1] = True
    batch["next"] = TensorDict({"reward": batch["time_left"], "done": done, "terminated": done}, [ROWS, STEPS])
    return batch


def trained(way, kind, critic, dtype=torch.float64, **options):
    """Metrics, parameters and Adam's state after two updates, by the way named."""
    if way == "compiled" and not COMPILED:
        way = "parts"
    loss = loss_of(kind, critic, dtype, entropy_bonus=True, entropy_coeff=0.05)
    sizes = {"bptt": 2, "minibatches": 5, "max_grad_norm": 0.1, "lr": 1e-2, "epochs": 3, "lr_schedule": lambda p: 1 - p}
    update = PPOUpdate(loss, generator=torch.Generator().manual_seed(0), backend=way, **{**sizes, **options})
    metrics = [update(batch_of(kind, dtype), progress) for progress in (0.0, 0.75)]
    assert update.backend == way
    assert metrics[1]["lr"] == pytest.approx(0.25e-2)
    state = [value for p in loss.parameters() for value in update.optimizer.state[p].values()]
    return metrics, [p.detach().clone() for p in loss.parameters()], state


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
@pytest.mark.parametrize("critic", ["separate", "extra", "shared", "detached"])
@pytest.mark.parametrize(
    "options", [{}, {"bptt": 1, "shuffle": False, "max_grad_norm": None}, {"bptt": 6, "minibatches": 2}]
)
def test_updates_train_alike_all_ways(kind, critic, options):
    """Clipped gradients, entropy, chunks in any order, a short last minibatch: the same numbers, Adam's averages too."""
    expected, parameters, state = trained("autograd", kind, critic, **options)
    for way in ("parts", "compiled"):
        metrics, ours, our_state = trained(way, kind, critic, **options)
        for one, other in zip(metrics, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-9)
        for a, b in zip([*ours, *our_state], [*parameters, *state], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_updates_without_a_critic_train_alike():
    expected, parameters, _ = trained("autograd", "gaussian", "none")
    for way in ("parts", "compiled"):
        metrics, ours, _ = trained(way, "gaussian", "none")
        assert "loss_critic" not in metrics[0]
        for one, other in zip(metrics, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-9)
        for a, b in zip(ours, parameters, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_updates_in_single_precision():
    _, parameters, _ = trained("autograd", "gaussian", "extra", torch.float32)
    _, ours, _ = trained("compiled", "gaussian", "extra", torch.float32)
    for a, b in zip(ours, parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("critic", "change", "message"),
    [
        ("shared, cells", {}, "more than a GRU and a head"),
        ("shared, extra", {}, "more than a GRU and a head"),
        ("separate", {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}, "optimizer"),
        ("separate", {"optimizer": lambda p: torch.optim.Adam(p, weight_decay=0.1)}, "optimizer"),
        ("separate", {"optimizer": lambda p: torch.optim.Adam(p, amsgrad=True)}, "optimizer"),
        ("separate", {"optimizer": lambda p: torch.optim.Adam([{"params": [q]} for q in p])}, "optimizer"),
        ("separate", {"optimizer": lambda p: torch.optim.Adam(p[1:])}, "does not hold"),
        ("separate", {"optimizer": lambda p: torch.optim.Adam([*p, nn.Parameter(torch.ones(1))])}, "does not hold"),
        ("separate", {"optimizer": lambda p: _stepped(torch.optim.Adam(p), p[:1])}, "different numbers of steps"),
        ("separate", {"optimizer": lambda p: _scheduled(torch.optim.Adam(p))}, "more than"),
    ],
)
@needs_kernels
def test_what_is_no_compiled_pass_says_why(critic, change, message):
    loss = loss_of("categorical", critic, torch.float32)
    optimizer = change.get("optimizer", torch.optim.Adam)(list(loss.parameters()))
    data = data_of("categorical", torch.float32)
    assert message in why_not_compiled(Program(loss), optimizer, data)
    assert why_not_compiled(Program(loss), torch.optim.Adam(loss.parameters()), data) is None or not change


@needs_kernels
def test_terms_of_a_class_below_are_no_compiled_pass():
    class Weighed(RL2PPOLoss):
        def loss_terms(self):
            objective, *others = super().loss_terms()
            return [*others, objective]

    actor = GRUCategoricalActor(INPUTS, ACTIONS, hidden_size=UNITS)
    for loss, serves in ((RL2PPOLoss(actor), True), (Weighed(actor), False)):
        optimizer = torch.optim.Adam(loss.parameters())
        why = why_not_compiled(Program(loss), optimizer, data_of("categorical", torch.float32))
        assert why is None if serves else "terms beside PPO's own" in why


@needs_kernels
def test_one_hot_actions_are_no_compiled_pass():
    actor = GRUCategoricalActor(INPUTS, ACTIONS, hidden_size=UNITS, one_hot=True)
    loss, data = RL2PPOLoss(actor), data_of("categorical", torch.float32)
    data["action"] = nn.functional.one_hot(data["action"], ACTIONS)
    assert "one-hot" in why_not_compiled(Program(loss), torch.optim.Adam(loss.parameters()), data)


def _stepped(optimizer, parameters):
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def _scheduled(optimizer):
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    return optimizer


def test_an_action_that_is_no_choice_is_an_error_in_a_compiled_pass():
    update = PPOUpdate(loss_of("categorical", "separate", torch.float32), bptt=1, minibatches=6, shuffle=False)
    batch = batch_of("categorical", torch.float32)
    batch["action"][3, 2] = ACTIONS
    with pytest.raises((IndexError, RuntimeError), match="3 choices|out of bounds"):
        update(batch)
    # 9 chunks a minibatch, and this one is the 21st: two steps were taken before it.
    assert {float(state["step"]) for state in update.optimizer.state.values()} == {2.0}


def _after_one_pass(data, rows, order, kind="gaussian"):
    program = Program(loss_of(kind, "separate", torch.float64))
    optimizer = torch.optim.Adam(program.parameters, lr=1e-2)
    assert why_not_compiled(program, optimizer, data) is None
    CompiledPass(program, optimizer, data, rows, None).run(order)
    return [p.detach().clone() for p in program.parameters]


@needs_kernels
def test_a_pass_in_an_order_that_lies_scattered_in_memory():
    data, scattered = data_of("gaussian", torch.float64), torch.stack([torch.arange(ROWS), torch.full((ROWS,), -1)], 1)
    ends = [_after_one_pass(data, 2, order) for order in (torch.arange(ROWS), scattered[:, 0])]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@needs_kernels
def test_starts_marked_by_integers_are_read_as_what_they_mean():
    data, ends = data_of("gaussian", torch.float64), []
    for dtype in (torch.bool, torch.int64):
        ends.append(_after_one_pass({**data, "is_init": data["is_init"].to(dtype)}, 3, torch.arange(ROWS)))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("way", ["compiled", "parts", "autograd"])
def test_memory_that_was_lost_is_noticed_before_the_first_step(way):
    way = way if COMPILED or way != "compiled" else "parts"
    update = PPOUpdate(loss_of("categorical", "separate", torch.float32), minibatches=3, backend=way)
    batch = batch_of("categorical", torch.float32).exclude("actor_hidden", "critic_hidden")
    batch["is_init"][:] = False
    batch["is_init"][:, 0] = True
    batch["next", "done"][:, :-1] = batch["next", "terminated"][:, :-1] = False
    before = [p.detach().clone() for p in update.loss.parameters()]
    with pytest.raises(ValueError, match="memory was lost"):
        update(batch)
    assert all(torch.equal(a, b) for a, b in zip(before, update.loss.parameters(), strict=True))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_structures_are_laid_out_as_the_kernels_have_them(dtype):
    layout = kernels.load(dtype).ppo_pass_layout
    ours = [*map(ctypes.sizeof, (_Parameter, _Network, _Pass)), len(_METRICS)]
    assert ours == [layout(which) for which in range(4)]
