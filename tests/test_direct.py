"""`DirectGradients` must give what autograd gives through `RL2PPOLoss`, and hand on what it does not know."""

import pytest
import torch
from rl2_torchrl.modules.plain import NotPlainError
from rl2_torchrl.objectives.compiled_pass import CompiledPass
from rl2_torchrl.objectives.direct import DirectGradients
from tensordict import TensorDict
from torch import nn

from rl2_torchrl import (
    GRUCategoricalActor,
    GRUGaussianActor,
    GRUValueHead,
    MemoryValueHead,
    PPOUpdate,
    RL2PPOLoss,
    kernels,
)
from rl2_torchrl.modules.heads import Head

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


# What stands after the GRU of an actor.
HEADS = {
    "": {},
    ", cells": {"num_cells": [7, 9]},
    ", skip": {"num_cells": [7], "skip": True},
}


def direct_of(loss):
    """`DirectGradients`, or None without a C compiler, where every loss must be refused."""
    if COMPILED:
        return DirectGradients(loss)
    with pytest.raises(NotPlainError, match="no kernels"):
        DirectGradients(loss)
    return None


def loss_of(kind, critic, dtype, **options):
    torch.manual_seed(0)
    family, comma, head = kind.partition(",")
    actor_class = GRUGaussianActor if family == "gaussian" else GRUCategoricalActor
    actor = actor_class(INPUTS, ACTIONS, hidden_size=UNITS, init_range=1.0, dtype=dtype, **HEADS[comma + head])
    return RL2PPOLoss(actor, CRITICS[critic](init_range=1.0, dtype=dtype), **options)


def data_of(kind, dtype, steps=STEPS):
    draw = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(ROWS, steps, *shape, generator=draw, dtype=dtype)

    is_gaussian = kind.startswith("gaussian")
    return {
        "trans": normal(INPUTS),
        "is_init": torch.rand(ROWS, steps, 1, generator=draw) < 0.2,
        "time_left": normal(1),
        "task": normal(2),
        "actor_hidden": normal(1, UNITS),
        "critic_hidden": normal(1, 12),
        "advantage": normal(1),
        "value_target": normal(1),
        "action": normal(ACTIONS) if is_gaussian else torch.randint(ACTIONS, (ROWS, steps), generator=draw),
        "action_log_prob": 0.3 * normal() - (4 if is_gaussian else 1),
    }


def by_autograd(loss, data):
    """Losses and gradients, the latter taken off the parameters."""
    out = loss(TensorDict(data, next(iter(data.values())).shape[:2]))
    sum(value for name, value in out.items() if name.startswith("loss_")).backward()
    gradients = [p.grad.clone() for p in loss.parameters()]
    for p in loss.parameters():
        p.grad = None
    return out, gradients


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    "kind", ["categorical", "gaussian", "categorical, cells", "categorical, skip", "gaussian, cells"]
)
@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("entropy", [None, 0.1])
@pytest.mark.parametrize("steps", [1, STEPS])
def test_losses_and_gradients_are_autograds(dtype, tolerance, kind, critic, entropy, steps):
    loss = loss_of(kind, critic, dtype, entropy_bonus=entropy is not None, entropy_coeff=entropy)
    data = data_of(kind, dtype, steps)
    expected, gradients = by_autograd(loss, data)
    direct = direct_of(loss)
    if direct is None:
        return
    for _ in range(2):  # in the same memory, after a first pass through it
        losses = direct(data)
        assert set(losses) <= set(expected.keys())
        for name, value in losses.items():
            assert value == pytest.approx(float(expected[name]), rel=10 * tolerance, abs=10 * tolerance), name
        for (name, parameter), gradient in zip(loss.named_parameters(), gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=tolerance, atol=tolerance, msg=name)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    assert direct.norm() == pytest.approx(norm.item(), rel=10 * tolerance)
    direct.scale(0.5)
    torch.testing.assert_close(parameter.grad, 0.5 * gradients[-1], rtol=tolerance, atol=tolerance)


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
    direct = direct_of(loss)
    if direct is None:
        return
    assert direct(data)["loss_objective"] == pytest.approx(-3)
    gradients = {
        name.rpartition(".")[-1]: p.grad for name, p in loss.named_parameters() if "layers" in name or "log_std" in name
    }
    assert gradients["bias"].item() == pytest.approx(-3 * 2)  # -A z
    assert gradients["log_std"].item() == pytest.approx(-3 * (2**2 - 1))  # -A (z^2 - 1)


class OwnLoss(RL2PPOLoss):
    """A loss that someone has changed."""


def _with_layers(number):
    return RL2PPOLoss(GRUCategoricalActor(INPUTS, ACTIONS, num_layers=number), GRUValueHead(INPUTS))


def _with_tanh():
    return RL2PPOLoss(GRUCategoricalActor(INPUTS, ACTIONS, activation=nn.Tanh), GRUValueHead(INPUTS))


def _with_one_hot():
    return RL2PPOLoss(GRUCategoricalActor(INPUTS, ACTIONS, one_hot=True), GRUValueHead(INPUTS))


def _changed(change):
    loss = loss_of("categorical", "separate", torch.float32)
    change(loss)
    return loss


def _critic_on_features(**options):
    actor = GRUCategoricalActor(INPUTS, ACTIONS, hidden_size=UNITS)
    return RL2PPOLoss(actor, GRUValueHead(UNITS, in_key="actor_features", **options))


def _critic_on_logits():
    actor = GRUCategoricalActor(INPUTS, ACTIONS, hidden_size=UNITS)
    return RL2PPOLoss(actor, MemoryValueHead(UNITS, detach=False, extra_keys=["logits"], extra_size=ACTIONS))


def _same_features_key():
    actor = GRUCategoricalActor(INPUTS, ACTIONS, hidden_size=UNITS)
    return RL2PPOLoss(actor, GRUValueHead(INPUTS, hidden_size=UNITS, features_key="actor_features"))


def _gru(network):
    return next(part for part in network.modules() if isinstance(part, nn.GRU))


def _tied():
    actor, critic = GRUCategoricalActor(INPUTS, ACTIONS), GRUValueHead(INPUTS)
    _gru(critic).weight_hh_l0 = _gru(actor).weight_hh_l0
    return RL2PPOLoss(actor, critic)


def _hook_on(kind):
    def change(loss):
        part = next(module for module in loss.modules() if type(module) is kind)
        part.register_forward_hook(lambda module, inputs, out: 2 * out)

    return _changed(change)


def _transposed(loss):
    weight = _gru(loss.actor_network).weight_hh_l0
    weight.data = weight.data.t().contiguous().t()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_critic_on_features, "has a gradient"),
        (lambda: _critic_on_features(features_key="actor_features"), "has a gradient|twice"),
        (_critic_on_logits, "has a gradient"),
        (_same_features_key, "twice"),
        (_tied, "share"),
        (lambda: _hook_on(Head), "hooks"),
        (lambda: _hook_on(nn.GRU), "hooks"),
        (lambda: _changed(_transposed), "contiguous"),
        (lambda: loss_of("categorical", "separate", torch.float32, critic_coeff=0.0), "beside"),
        (lambda: OwnLoss(GRUCategoricalActor(INPUTS, ACTIONS), GRUValueHead(INPUTS)), "own options"),
        (
            lambda: RL2PPOLoss(GRUCategoricalActor(INPUTS, ACTIONS), GRUValueHead(INPUTS), clip_value=True),
            "own options",
        ),
        (lambda: _changed(lambda loss: loss.register_forward_hook(lambda *_: None)), "own options"),
        (lambda: _changed(lambda loss: setattr(loss, "forward", loss.forward)), "own options"),
        (lambda: _with_layers(2), "several layers"),
        (_with_tanh, "ReLU"),
        (_with_one_hot, "OneHotCategorical"),
        (lambda: _changed(lambda loss: next(loss.parameters()).requires_grad_(False)), "frozen"),
        (lambda: _changed(lambda loss: next(loss.parameters()).register_hook(lambda g: 0 * g)), "hooks"),
        (lambda: _changed(lambda loss: loss.register_parameter("more", nn.Parameter(torch.ones(1)))), "beside"),
        (lambda: loss_of("categorical", "separate", torch.float32).to(torch.bfloat16), "no kernels"),
    ],
)
def test_what_it_does_not_know_is_refused(make, message):
    with pytest.raises(NotPlainError, match=message if COMPILED else "no kernels|own options"):
        DirectGradients(make())


@pytest.mark.parametrize("key", ["trans", "is_init", "action", "advantage", "action_log_prob", "value_target", "task"])
def test_missing_entries_are_left_to_the_loss(key):
    data = data_of("categorical", torch.float32)
    del data[key]
    direct = direct_of(loss_of("categorical", "extra", torch.float32))
    if direct is not None:
        with pytest.raises(NotPlainError, match="missing"):
            direct(data)


# ------------------------------------------------------------------------ updates


def batch_of(kind, dtype):
    """A batch of whole trials with values, rewards and ends."""
    batch = TensorDict(data_of(kind, dtype), [ROWS, STEPS])
    batch["state_value"] = batch["value_target"].clone()
    done = torch.zeros(ROWS, STEPS, 1, dtype=torch.bool)
    done[:, -1] = True
    batch["next"] = TensorDict({"reward": batch["time_left"], "done": done, "terminated": done}, [ROWS, STEPS])
    return batch


def trained(way, kind, critic, monkeypatch, dtype=torch.float64, **options):
    """Metrics, parameters and Adam's state after two updates, by the way named."""
    monkeypatch.undo()
    loss = loss_of(kind, critic, dtype, entropy_bonus=True, entropy_coeff=0.05)
    sizes = {"bptt": 2, "minibatches": 5, "max_grad_norm": 0.1, "lr": 1e-2, "epochs": 3}
    update = PPOUpdate(loss, generator=torch.Generator().manual_seed(0), **{**sizes, **options})
    runs = []
    if COMPILED:
        run = CompiledPass.run
        monkeypatch.setattr(CompiledPass, "run", lambda self, order: runs.append(1) or run(self, order))
    if way != "compiled":
        monkeypatch.setattr(update, "_compile", _refuse)
    if way == "autograd":
        monkeypatch.setattr(update, "_direct_gradients", lambda: None)
    metrics = [update(batch_of(kind, dtype)) for _ in range(2)]
    assert len(runs) == (6 if way == "compiled" and COMPILED else 0)
    state = [value for p in loss.parameters() for value in update.optimizer.state[p].values()]
    return metrics, [p.detach().clone() for p in loss.parameters()], state


def _refuse(*_):
    raise NotPlainError("not here")


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
@pytest.mark.parametrize("critic", ["separate", "extra"])
@pytest.mark.parametrize(
    "options", [{}, {"bptt": 1, "shuffle": False, "max_grad_norm": None}, {"bptt": 6, "minibatches": 2}]
)
def test_updates_train_alike_all_ways(kind, critic, options, monkeypatch):
    """Clipped gradients, entropy, chunks in any order, a short last minibatch: the same numbers, Adam's averages too."""
    expected, parameters, state = trained("autograd", kind, critic, monkeypatch, **options)
    for way in ("direct", "compiled"):
        metrics, ours, our_state = trained(way, kind, critic, monkeypatch, **options)
        for one, other in zip(metrics, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-9)
        for a, b in zip([*ours, *our_state], [*parameters, *state], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_updates_without_a_critic_train_alike(monkeypatch):
    expected, parameters, _ = trained("autograd", "gaussian", "none", monkeypatch)
    for way in ("direct", "compiled"):
        metrics, ours, _ = trained(way, "gaussian", "none", monkeypatch)
        assert "loss_critic" not in metrics[0]
        for one, other in zip(metrics, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-9)
        for a, b in zip(ours, parameters, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_updates_in_single_precision(monkeypatch):
    _, parameters, _ = trained("autograd", "gaussian", "extra", monkeypatch, torch.float32)
    _, ours, _ = trained("compiled", "gaussian", "extra", monkeypatch, torch.float32)
    for a, b in zip(ours, parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("critic", "change", "message"),
    [
        ("shared", {}, "one GRU and one head each"),
        ("separate", {"minibatches": 1, "rows": 100}, "one by one"),
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
def test_what_is_no_pass_of_small_minibatches_is_refused(critic, change, message):
    direct = direct_of(loss_of("categorical", critic, torch.float32))
    if direct is not None:
        optimizer = change.get("optimizer", torch.optim.Adam)(list(direct.loss.parameters()))
        with pytest.raises(NotPlainError, match=message):
            CompiledPass(direct, optimizer, data_of("categorical", torch.float32), change.get("rows", 2), None)


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


def test_a_pass_in_an_order_that_lies_scattered_in_memory():
    direct = direct_of(loss_of("gaussian", "separate", torch.float64))
    if direct is None:
        return
    ends = []
    for order in (torch.arange(ROWS), torch.stack([torch.arange(ROWS), torch.full((ROWS,), -1)], 1)[:, 0]):
        direct = DirectGradients(loss_of("gaussian", "separate", torch.float64))
        optimizer = torch.optim.Adam(list(direct.loss.parameters()), lr=1e-2)
        CompiledPass(direct, optimizer, data_of("gaussian", torch.float64), 2, None).run(order)
        ends.append([p.detach().clone() for p in direct.loss.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("way", ["compiled", "direct", "autograd"])
def test_memory_that_was_lost_is_noticed_before_a_compiled_pass_takes_a_step(way, monkeypatch):
    update = PPOUpdate(loss_of("categorical", "separate", torch.float32), minibatches=3)
    if way != "compiled":
        monkeypatch.setattr(update, "_compile", _refuse)
    if way == "autograd":
        monkeypatch.setattr(update, "_direct_gradients", lambda: None)
    batch = batch_of("categorical", torch.float32).exclude("actor_hidden", "critic_hidden")
    batch["is_init"][:] = False
    batch["is_init"][:, 0] = True
    before = [p.detach().clone() for p in update.loss.parameters()]
    with pytest.raises(ValueError, match="memory was lost"):
        update(batch)
    same = all(torch.equal(a, b) for a, b in zip(before, update.loss.parameters(), strict=True))
    assert same == (way == "compiled" and COMPILED)


def test_an_entry_of_another_dtype_is_left_to_the_loss():
    direct = direct_of(loss_of("categorical", "separate", torch.float32))
    for key in ("advantage", "action_log_prob", "value_target"):
        data = data_of("categorical", torch.float32)
        data[key] = data[key].double()
        if direct is not None:
            with pytest.raises(NotPlainError, match="dtype"):
                direct(data)


def test_starts_marked_by_integers_are_read_as_what_they_mean():
    ends = []
    for dtype in (torch.bool, torch.int64):
        direct = direct_of(loss_of("gaussian", "separate", torch.float64))
        if direct is None:
            return
        data = data_of("gaussian", torch.float64)
        data["is_init"] = data["is_init"].to(dtype)
        optimizer = torch.optim.Adam(list(direct.loss.parameters()), lr=1e-2)
        CompiledPass(direct, optimizer, data, 3, None).run(torch.arange(ROWS))
        ends.append([p.detach().clone() for p in direct.loss.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
