"""`GraphedPass` and `gru_steps`, what they compute: on the CPU, where nothing is recorded (tests/test_cuda.py records)."""

import pytest
import torch

from rl2_torchrl.modules.gru_sequence import _loop
from rl2_torchrl.modules.gru_steps import gru_steps
from rl2_torchrl.objectives.advantages import _accumulate, _accumulate_by_doubling

ROWS, STEPS = 6, 5


@pytest.fixture
def fused_cell(monkeypatch):
    """What PyTorch has for CUDA alone, by equations (3)-(7) of `torch.nn.GRU`'s page."""

    def cell(by_x, by_h, h, b_x, b_h):
        (r, z, n), (by_r, by_z, by_n) = (
            (by_x + (0 if b_x is None else b_x)).chunk(3, -1),
            (by_h + (0 if b_h is None else b_h)).chunk(3, -1),
        )
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
    for function in (gru_steps, _loop):
        leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
        y = function(*leaves[:2], is_init, *leaves[2:])
        found.append([y, *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], slope)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_doubling_accumulates_what_steps_do(steps):
    torch.manual_seed(0)
    out, done = torch.randn(3, 2, steps, 1).double(), torch.rand(3, 2, steps, 1) < 0.1
    expected = _accumulate(out.clone(), done, 0.9)
    torch.testing.assert_close(_accumulate_by_doubling(out, done, 0.9), expected)
