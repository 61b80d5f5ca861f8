"""`GraphedPass` and `_GRUSteps`, what they compute: on the CPU, where nothing is recorded (tests/test_cuda.py records)."""

import copy

import pytest
import torch
from tensordict import TensorDict

from rl2_torchrl import GRUCategoricalActor, GRUValueHead, PPOUpdate, RL2PPOLoss, TaskBelief
from rl2_torchrl.gradients import graphed
from rl2_torchrl.kernels.gru_sequence import _GRUSteps, _loop
from rl2_torchrl.objectives.advantages import _accumulate, _accumulate_by_doubling

ROWS, STEPS = 6, 5


@pytest.fixture
def fused_cell(monkeypatch):
    """What PyTorch has for CUDA alone, by equations (3)-(7) of `torch.nn.GRU`'s page."""

    def cell(by_x, by_h, h):
        (r, z, n), (by_r, by_z, by_n) = by_x.chunk(3, -1), by_h.chunk(3, -1)
        r, z = (r + by_r).sigmoid(), (z + by_z).sigmoid()
        n = (n + r * by_n).tanh()
        return n + z * (h - n), torch.cat((r, z, n, h, by_n), -1)

    def backward(slope, saved, has_bias):
        r, z, n, h, by_n = saved.chunk(5, -1)
        d_z, d_n = slope * (h - n) * z * (1 - z), slope * (1 - z) * (1 - n * n)
        d_r = d_n * by_n * r * (1 - r)
        return torch.cat((d_r, d_z, d_n), -1), torch.cat((d_r, d_z, d_n * r), -1), slope * z, None, None

    monkeypatch.setattr(torch.ops.aten, "_thnn_fused_gru_cell", cell)
    monkeypatch.setattr(torch.ops.aten, "_thnn_fused_gru_cell_backward", backward)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("with_hidden", [True, False])
@pytest.mark.parametrize("with_resets", [True, False])
def test_steps_equal_the_loop(fused_cell, with_hidden, with_resets, with_bias):
    torch.manual_seed(0)
    x, hidden = torch.randn(ROWS, STEPS, 3).double(), torch.randn(ROWS, STEPS, 4).double() if with_hidden else None
    is_init = torch.rand(ROWS, STEPS) < 0.4 if with_resets else None
    weights = [torch.randn(12, n).double() for n in (3, 4)] + [torch.randn(12).double() if with_bias else None] * 2
    tensors = [x, hidden, *weights]
    slope, found = torch.randn(ROWS, STEPS, 4).double(), []
    for function in (_GRUSteps.apply, _loop):
        leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
        y = function(*leaves[:2], is_init, *leaves[2:])
        leaves = [leaf for leaf in leaves if leaf is not None]
        found.append([y, *torch.autograd.grad(y, leaves, slope, retain_graph=True)])
        first = torch.autograd.grad(y, leaves, slope, create_graph=True)
        found[-1] += torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("is_strided", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_all_ways_to_sum_over_the_rest_of_a_trial(steps, is_strided):
    torch.manual_seed(0)
    expected, done = torch.randn(3, 2, steps, 1).double(), torch.rand(3, 2, steps, 1) < 0.1
    if is_strided:  # as of a collector that writes step by step
        expected, done = (entry.transpose(0, 2).contiguous().transpose(0, 2) for entry in (expected, done))
    ours, doubled = expected.clone(), expected.clone()
    for t in range(steps - 2, -1, -1):
        expected[..., t, :] += 0.9 * expected[..., t + 1, :].masked_fill(done[..., t, :], 0)
    flags = torch.empty_like(ours).copy_(done)  # numbers say the same, and no kernel reads them as they are
    torch.testing.assert_close(_accumulate(ours.clone(), flags, 0.9), expected)
    assert _accumulate(ours, done, 0.9) is ours
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(_accumulate_by_doubling(doubled, done, 0.9), expected)


def make_loss(**options):
    torch.manual_seed(0)
    return RL2PPOLoss(GRUCategoricalActor(5, 3, hidden_size=4), GRUValueHead(5, hidden_size=4), **options)


class Term(torch.nn.Module):
    in_keys = ["logits"]

    def forward(self, logits):
        return {"loss_size": logits.square().mean()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: {"loss": make_loss(terms=[Term()])}, "what Term does may depend on more than tensors"),
        (lambda: {"optimizer": torch.optim.Adam}, "Adam cannot skip a step"),
        (lambda: {"hook": lambda *_: None}, "would not run the hooks"),
    ],
)
def test_what_a_recording_could_not_follow_is_left_to_autograd(change, message):
    change = change()
    loss = change.get("loss", make_loss())
    if "hook" in change:
        loss.critic_network.module[0].register_forward_hook(change["hook"])
    optimizer = change["optimizer"](loss.parameters(), fused=False) if "optimizer" in change else None
    with pytest.raises(ValueError, match=message):
        PPOUpdate(loss, optimizer=optimizer, backend="graph")


def test_a_minibatch_that_cannot_be_recorded_is_launched_kernel_by_kernel(monkeypatch):
    class Refuses:
        def __init__(self, function, device):
            self.function, self.refusal = function, "operation not permitted when stream is capturing"

        def __call__(self):
            self.function()

    monkeypatch.setattr(graphed, "GraphReplay", Refuses)
    loss = make_loss()
    passes, optimizer = graphed.GraphedPass(loss), torch.optim.Adam(loss.parameters(), lr=1e-2, fused=True)
    plain = copy.deepcopy(loss)
    entries = {
        "trans": torch.randn(4, 6, 5),
        "action": torch.randint(3, (4, 6)),
        "action_log_prob": torch.zeros(4, 6) - 1.1,
        "advantage": torch.randn(4, 6, 1),
        "value_target": torch.randn(4, 6, 1),
    }
    metrics = list(passes.run([entries, entries], optimizer, 0.5))
    assert passes.reason == "launched kernel by kernel: operation not permitted when stream is capturing"
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-2, fused=True)
    for metric in metrics:
        data = {**entries, "is_init": (torch.arange(6) == 0).expand(4, 6).unsqueeze(-1)}
        losses = plain(TensorDict(data, [4, 6]))
        total = losses["loss_objective"] + losses["loss_critic"]
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        assert metric["loss"] == pytest.approx(total.item(), abs=1e-6)
    for one, other in zip(loss.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_recorded_is_forgotten_when_the_loss_changes():
    loss = make_loss(entropy_bonus=True, terms=[TaskBelief(4, 3)])
    passes = graphed.GraphedPass(loss)
    passes._forget_what_changed(0.5)
    passes._minibatches["one"] = object()
    loss.entropy_coeff.fill_(0.5)  # in the memory that a recording reads
    passes._forget_what_changed(0.5)
    assert passes._minibatches
    for change in (
        lambda: setattr(loss, "entropy_coeff", torch.tensor(0.1)),
        lambda: loss.eval(),
        lambda: setattr(loss.terms[0], "coefficient", 2.0),
        lambda: setattr(loss.terms[0], "target", torch.sin),
        lambda: torch.set_float32_matmul_precision("high"),
        lambda: next(loss.parameters()).requires_grad_(False),
    ):
        try:
            change()
            passes._forget_what_changed(0.5)
            assert not passes._minibatches
            passes._minibatches["one"] = object()
        finally:
            torch.set_float32_matmul_precision("highest")
            passes._forget_what_changed(0.5)
            passes._minibatches["one"] = object()
    passes._forget_what_changed(0.1)
    assert not passes._minibatches
