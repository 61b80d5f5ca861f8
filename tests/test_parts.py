"""Each part alone: its own gradient is autograd's."""

import pytest
import torch
from loss_cases import ACTIONS, COMPILED, F64, INPUTS, ROWS, STEPS, UNITS, data_of, loss_of
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from rl2_torchrl import GRUValueHead, MemoryValueHead
from rl2_torchrl.gradients import Program
from rl2_torchrl.gradients.networks import parts_of
from rl2_torchrl.gradients.policy import ENTROPY, LOG_PROB, log_scale_key
from rl2_torchrl.modules import MLPEncoder
from rl2_torchrl.modules.layers import Head


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
    "several": lambda: MLPEncoder(UNITS, [257, 4], **F64),
    "tanh": lambda: MLPEncoder(UNITS, [257, 4], activation=nn.Tanh, **F64),
    "head": lambda: Head(UNITS, 4, init_range=1.0, **F64),
    "head, tanh": lambda: Head(UNITS, 4, init_range=1.0, num_cells=[9], activation=nn.Tanh, **F64),
    "head, wide": lambda: Head(UNITS, 4, init_range=1.0, num_cells=[257], **F64),
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


def test_inputs_of_other_rows_are_not_put_side_by_side():
    [part] = parts_of(MemoryValueHead(UNITS, detach=True, extra_keys=["extra"], extra_size=2, features_key="x", **F64))
    state = {"x": torch.randn(ROWS, STEPS, UNITS, **F64), "extra": torch.randn(ROWS, 1, 2, **F64)}
    assert not part.forward_by_hand(state)


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
    *_, before, part = loss.network_parts()
    data = data_of(kind, torch.float64)
    slopes = {key: torch.randn(ROWS, STEPS, **F64) for key in reads}
    if kind == "categorical":
        state = {"action": data["action"], "logits": torch.randn(ROWS, STEPS, ACTIONS, **F64)}
        before.run(state)
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


def test_data_on_another_device_reach_no_kernel():
    part = Head(4, 2, init_range=1.0).gradient_part(["x"], ["y"])
    assert part is None or not part.forward_by_hand({"x": torch.zeros(3, 5, 4, device="meta")})
