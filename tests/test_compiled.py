"""Compiled passes take the steps that programs and Adam take."""

import ctypes

import pytest
import torch
from loss_cases import ACTIONS, COMPILED, INPUTS, ROWS, UNITS, batch_of, data_of, loss_of, needs_kernels, trained
from torch import nn

from rl2_torchrl import GRUCategoricalActor, PPOUpdate, RL2PPOLoss, kernels
from rl2_torchrl.gradients import Program
from rl2_torchrl.gradients.compiled import _METRICS, CompiledPass, _Network, _Pass, why_not_compiled


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
        ("separate", {"optimizer": lambda p: torch.optim.Adam(p[1:])}, "does not hold"),
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
    ours = [*map(ctypes.sizeof, (_Network, _Pass)), len(_METRICS)]
    assert ours == [layout(which) for which in range(3)]
