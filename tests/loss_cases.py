"""Losses and data of every kind, and what TorchRL's `ClipPPOLoss` makes of them."""

from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.objectives import ClipPPOLoss

from rl2_torchrl import (
    GRUCategoricalActor,
    GRUGaussianActor,
    GRUValueHead,
    MemoryValueHead,
    PPOUpdate,
    RL2PPOLoss,
    TrialAdvantage,
    kernels,
)
from rl2_torchrl.gradients import Program
from rl2_torchrl.modules import MLPEncoder

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
    "wide": lambda **options: MemoryValueHead(UNITS, detach=False, num_cells=[257], **options),
}


COMPILED = kernels.load(torch.float32) is not None


needs_kernels = pytest.mark.skipif(not COMPILED, reason="no C compiler")


# What stands around the GRU of an actor.
HEADS = {
    "": {},
    ", tanh": {"activation": nn.Tanh},
    ", elu": {"activation": nn.ELU, "num_cells": [4]},
    ", layers": {"num_layers": 2},
    ", cells": {"num_cells": [7, 9]},
    ", encoder": {"encoder": partial(MLPEncoder, num_cells=[7])},
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


F64 = {"dtype": torch.float64}


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
    loss = loss_of(kind, critic, dtype, entropy_bonus=True, entropy_coeff=0.05)
    sizes = {"bptt": 2, "minibatches": 5, "max_grad_norm": 0.1, "lr": 1e-2, "epochs": 3, "lr_schedule": lambda p: 1 - p}
    generator = torch.Generator().manual_seed(0)
    # Of values that are stored, which without a critic are another one's.
    update = PPOUpdate(loss, TrialAdvantage(), generator=generator, backend=way, **{**sizes, **options})
    metrics = [update(batch_of(kind, dtype), progress) for progress in (0.0, 0.75)]
    assert update.backend == way
    assert metrics[1]["lr"] == pytest.approx(0.25e-2)
    state = [value for p in loss.parameters() for value in update.optimizer.state[p].values()]
    return metrics, [p.detach().clone() for p in loss.parameters()], state
