"""The compiled GRU against TorchRL's own `GRUModule`: outputs, gradients, resets, and the cases that it hands on."""

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.envs import TensorDictPrimer
from torchrl.modules import GRUModule, set_recurrent_mode
from torchrl.modules.utils import get_primers_from_module

from rl2_torchrl import kernels
from rl2_torchrl.kernels import gru_sequence as gru_module
from rl2_torchrl.kernels.gru_sequence import gru_sequence
from rl2_torchrl.modules.gru import FastGRUModule, StepGRU

KEYS = {"in_keys": ["x", "h"], "out_keys": ["y", ("next", "h")]}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


COMPILED = kernels.load(torch.float32) is not None  # without a compiler all of this must hold as well


@pytest.fixture
def counted(monkeypatch):
    """Counts the calls of the compiled path, so that no test passes by taking TorchRL's."""
    calls = []
    forward = gru_module.sequence_forward
    monkeypatch.setattr(gru_module, "sequence_forward", lambda *args, **kw: calls.append(1) or forward(*args, **kw))
    return calls


@pytest.fixture(params=["kernels", "loop"])
def sequence(request, monkeypatch):
    """`gru_sequence` on the kernels and without them."""
    if request.param == "loop":
        monkeypatch.setattr(kernels, "load", lambda dtype: None)
    return gru_sequence


def pair(dtype=torch.float32, units=50, **kwargs):
    """TorchRL's module and ours, with the same weights."""
    modules = [cls(input_size=3, hidden_size=units, **KEYS, **kwargs).to(dtype) for cls in (GRUModule, FastGRUModule)]
    modules[1].load_state_dict(modules[0].state_dict())
    return modules


def data(rows, steps, layers, units=50, dtype=torch.float32, share_of_resets=0.2):
    generator = torch.Generator().manual_seed(rows * 100 + steps)
    draw = {"generator": generator, "dtype": dtype}
    return {
        "x": torch.randn(rows, steps, 3, **draw),
        "h": torch.randn(rows, steps, layers, units, **draw),
        "is_init": torch.rand(rows, steps, 1, generator=generator) < share_of_resets,
    }


def outputs_and_gradients(module, entries, recurrent=True):
    leaves = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in entries.items()}
    batch = entries["is_init"].shape[:-1]
    with set_recurrent_mode(recurrent):
        out = module(TensorDict(leaves, batch))
    y, last = out["y"], out["next", "h"]
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    inputs = [leaves["x"], leaves["h"], *module.parameters()]
    gradients = torch.autograd.grad((y * weight).sum() + last.square().sum(), inputs)
    return [y, last, *gradients]


def assert_same(ours, theirs, dtype):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        scale = b.abs().max().clamp_min(1)
        torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "steps"), [(1, 1), (5, 9), (17, 12)])
def test_sequences_equal_torchrl(counted, dtype, layers, bias, rows, steps):
    theirs, ours = pair(dtype, num_layers=layers, bias=bias)
    entries = data(rows, steps, layers, dtype=dtype)
    expected = outputs_and_gradients(theirs, entries)
    assert_same(outputs_and_gradients(ours, entries), expected, dtype)
    assert len(counted) == layers * COMPILED


@pytest.mark.skipif(not COMPILED, reason="no C compiler")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_kernels_compute_in_the_weights_dtype_under_autocast(dtype):
    _, ours = pair(dtype, num_layers=2)
    entries = data(5, 9, 2, dtype=dtype)
    expected = outputs_and_gradients(ours, entries)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outputs_and_gradients(ours, entries)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("recurrent", [True, False])
def test_gradients_of_gradients_equal_torchrls(recurrent):
    entries, results = data(4, 3, 2, 5, torch.float64), []
    for module in pair(torch.float64, units=5, num_layers=2):
        leaves = {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in entries.items()}
        inputs = [leaves["x"], leaves["h"], *module.parameters()]
        if recurrent:
            with set_recurrent_mode(True):
                y = module(TensorDict(leaves, [4, 3]))["y"]
        else:  # the second step's memory is made of the same weights
            steps = TensorDict(leaves, [4, 3]).unbind(1)
            h = module(steps[0])["next", "h"]
            y = module(steps[1].set("h", h).set("is_init", torch.zeros(4, 1, dtype=torch.bool)))["y"]
        first = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
        results.append([*first, *torch.autograd.grad(y.sum() + sum(g.square().sum() for g in first), inputs)])
    assert_same(*reversed(results), torch.float64)


@pytest.mark.parametrize("units", [1, 15, 16, 33, 64])
def test_every_number_of_units_fills_its_vectors(counted, units):
    theirs, ours = pair(units=units)
    entries = data(9, 4, 1, units)
    assert_same(outputs_and_gradients(ours, entries), outputs_and_gradients(theirs, entries), torch.float32)
    assert bool(counted) == COMPILED


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("rows", "units", "is_packed"), [(7, 50, True), (7, 128, False), (48, 128, True)])
def test_one_step_equals_torchrl(counted, layers, rows, units, is_packed):
    theirs, ours = pair(num_layers=layers, units=units)
    entries = {key: value[:, 0] for key, value in data(rows, 1, layers, units, share_of_resets=0.5).items()}
    expected = outputs_and_gradients(theirs, entries, recurrent=False)
    assert_same(outputs_and_gradients(ours, entries, recurrent=False), expected, torch.float32)
    assert bool(counted) == (is_packed and COMPILED)


def test_step_for_rollouts_equals_the_module():
    _, ours = pair(num_layers=2)
    entries = {key: value[:, 0] for key, value in data(7, 1, 2, share_of_resets=0).items()}
    with torch.no_grad():
        out = ours(TensorDict(entries, [7]))
        features, hidden = StepGRU(ours.gru)(entries["x"], entries["h"])
    torch.testing.assert_close(features, out["y"])
    torch.testing.assert_close(hidden, out["next", "h"])


@pytest.mark.parametrize("steps", [1, 5])
def test_a_broken_weight_is_seen_at_a_trials_first_step(steps):
    gru = nn.GRU(3, 20, batch_first=True)
    gru.weight_hh_l0.data[7, 2] = torch.nan
    with torch.no_grad():
        ours = gru_sequence(torch.randn(9, steps, 3), None, None, *gru.all_weights[0])
        assert torch.equal(ours.isnan(), gru(torch.zeros(9, steps, 3))[0].isnan())


def test_step_without_kernels_is_torchs(monkeypatch):
    _, ours = pair(num_layers=2)
    entries = {key: value[:, 0] for key, value in data(7, 1, 2).items()}
    expected = StepGRU(ours.gru)(entries["x"], entries["h"])
    monkeypatch.setattr(kernels, "load", lambda dtype: None)
    for a, b in zip(StepGRU(ours.gru)(entries["x"], entries["h"]), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "case",
    ["dropout", "bidirectional", "python_based", "scan", "half", "no kernels"],
)
def test_what_is_not_covered_takes_torchrls_path(counted, monkeypatch, case):
    kwargs = {
        "dropout": {"dropout": 0.5, "num_layers": 2},
        "bidirectional": {"bidirectional": True},
        "python_based": {"python_based": True},
        "scan": {"recurrent_backend": "scan"},
    }.get(case, {})
    dtype = torch.bfloat16 if case == "half" else torch.float32
    theirs, ours = pair(dtype, **kwargs)
    if case == "no kernels":
        monkeypatch.setattr(kernels, "load", lambda dtype: None)
    entries = data(4, 6, kwargs.get("num_layers", 1) * (2 if case == "bidirectional" else 1), dtype=dtype)
    results = []
    for module in (theirs, ours):
        torch.manual_seed(0)
        with set_recurrent_mode(True):
            results.append(module(TensorDict(entries, [4, 6])))
    torch.testing.assert_close(results[1]["y"], results[0]["y"], rtol=0, atol=0)
    assert not counted


def test_compiled_program_gives_the_same_numbers():
    _, ours = pair()
    entries = data(4, 6, 1)
    with set_recurrent_mode(True):
        expected = ours(TensorDict(entries, [4, 6]))["y"]
        compiled = torch.compile(ours, backend="aot_eager")(TensorDict(entries, [4, 6]))["y"]
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-5)


def test_drop_in_state_dict_and_primer():
    theirs, ours = pair(num_layers=2)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    primer = get_primers_from_module(nn.Sequential(ours), warn=False)
    assert isinstance(primer, TensorDictPrimer)
    assert primer.primers["h"].shape == (2, 50)


@pytest.mark.parametrize("with_hidden", [True, False])
def test_loop_equals_kernels(monkeypatch, with_hidden):
    gru, entries = nn.GRU(3, 8).double(), data(5, 9, 1, 8, torch.float64)
    hidden = entries["h"].squeeze(2) if with_hidden else None
    arguments = (entries["x"], hidden, entries["is_init"].squeeze(-1), *gru.parameters())
    weight = torch.linspace(-1, 1, 8, dtype=torch.float64)
    results = []
    for load in (kernels.load, lambda dtype: None):
        monkeypatch.setattr(kernels, "load", load)
        y = gru_sequence(*arguments)
        results.append([y, *torch.autograd.grad((y * weight).sum(), list(gru.parameters()))])
    assert_same(*results, torch.float64)


def test_graph_can_be_walked_twice_only_when_it_is_kept(sequence):
    x, gru = torch.randn(2, 5, 3), nn.GRU(3, 8)
    y = sequence(x, None, None, *gru.parameters())
    first = torch.autograd.grad(y.sum(), gru.weight_hh_l0, retain_graph=True)[0]
    second = torch.autograd.grad(y.sum(), gru.weight_hh_l0)[0]
    torch.testing.assert_close(first, second)
    with pytest.raises(RuntimeError, match="retain_graph=True|second time"):
        torch.autograd.grad(y.sum(), gru.weight_hh_l0)


def test_two_open_graphs_do_not_share_memory(sequence):
    gru = nn.GRU(3, 8)
    xs = [torch.randn(2, 5, 3) for _ in range(2)]
    alone = [torch.autograd.grad(sequence(x, None, None, *gru.parameters()).sum(), gru.weight_hh_l0)[0] for x in xs]
    ys = [sequence(x, None, None, *gru.parameters()) for x in xs]
    both = torch.autograd.grad(ys[0].sum() + ys[1].sum(), gru.weight_hh_l0)[0]
    torch.testing.assert_close(both, alone[0] + alone[1])


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 12, 17])
def test_any_number_of_rows_equals_torch(sequence, rows):
    gru = nn.GRU(3, 21, batch_first=True).double()  # kernels take rows in blocks of 2, 4 or 8
    x = torch.randn(rows, 6, 3, dtype=torch.float64, requires_grad=True)
    found, expected = (
        (y, *torch.autograd.grad(y.square().sum(), [x, *gru.parameters()]))
        for y in (sequence(x, None, None, *gru.parameters()), gru(x)[0])
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize(("rows", "steps"), [(1, 2), (33, 9), (65, 14)])
def test_any_number_of_threads_equals_torch(monkeypatch, threads, rows, steps):
    monkeypatch.setattr(kernels, "threads_for", lambda multiplications: threads)
    gru, x = nn.GRU(3, 21, batch_first=True).double(), torch.randn(rows, steps, 3, dtype=torch.float64)
    found, expected = (
        (y, *torch.autograd.grad(y.square().sum(), gru.parameters()))
        for y in (gru_sequence(x, None, None, *gru.parameters()), gru(x)[0])
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_strided_inputs_are_read_rightly(sequence):
    gru = nn.GRU(3, 8, batch_first=True)
    x = torch.randn(3, 5, 4).transpose(0, 2)
    torch.testing.assert_close(sequence(x, None, None, *gru.parameters()), gru(x)[0])


def test_nan_is_carried_to_the_output(sequence):
    gru, x = nn.GRU(3, 8), torch.randn(2, 5, 3)
    x[0, 2, 1] = torch.nan
    y = sequence(x, None, None, *gru.parameters())
    assert y[0, :2].isfinite().all()
    assert y[0, 2:].isnan().all()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
def test_gates_saturate_without_overflow(sequence, scale):
    gru, x = nn.GRU(3, 8, batch_first=True).double(), scale * torch.randn(4, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(sequence(x, None, None, *gru.parameters()), gru(x)[0], rtol=0, atol=1e-10)
