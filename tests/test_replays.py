"""Minibatches that are made again from the first one's calls: by kernels alone, in whole passes, and in whose memory."""

import gc
import threading
import weakref

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
    batch_of,
    data_of,
    loss_of,
    needs_kernels,
    trained,
)
from replay_cases import Term, assert_alike, replays_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rl2_torchrl import GRUCategoricalActor, GRUValueHead, PPOUpdate, RL2PPOLoss, kernels
from rl2_torchrl.gradients import Program
from rl2_torchrl.gradients.adam import steps_by
from rl2_torchrl.gradients.replays import RecordedMinibatch, Replays
from rl2_torchrl.kernels.recording import Calls, Recording
from rl2_torchrl.kernels.workspace import Workspace

SIZES = [{}, {"bptt": 1, "shuffle": False, "max_grad_norm": None}, {"bptt": 6, "minibatches": 2}]


# ------------------------------------------------------------------ all kinds
CRITICS = ["none", "separate", "extra", "shared", "shared, cells", "shared, extra", "detached", "wide"]


@pytest.mark.parametrize(
    ("kind", "critic", "options"),
    [
        *((kind, critic, SIZES[0]) for kind in ("categorical", "gaussian") for critic in CRITICS),
        *((*pair, size) for pair in (("categorical", "shared, extra"), ("gaussian", "separate")) for size in SIZES[1:]),
    ],
    ids=str,
)
def test_updates_train_alike_both_ways(kind, critic, options):
    """Clipped gradients, entropy, chunks in any order, a short last minibatch: the same numbers, Adam's averages too."""
    ours, expected = (trained(way, kind, critic, **options) for way in ("parts", "autograd"))
    assert ("loss_critic" in ours[0][0]) == (critic != "none")
    assert_alike(ours, expected)


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
@pytest.mark.parametrize("head", [", tanh", ", elu", ", encoder", ", cells", ", skip"])
def test_heads_train_alike_both_ways(kind, head):
    ours, expected = (trained(way, kind + head, "separate") for way in ("parts", "autograd"))
    assert_alike(ours, expected)


def test_updates_in_single_precision():
    ours, expected = (trained(way, "gaussian", "extra", torch.float32) for way in ("parts", "autograd"))
    assert_alike(ours, expected, 1e-4)


# ------------------------------------------------------------------ by kernels
class _NoOperations(TorchDispatchMode):
    """Fails where PyTorch computes something while calls are noted."""

    ALLOWED = (
        "empty",
        "new_empty",
        "new_empty",
        "detach",
        "view",
        "squeeze",
        "unsqueeze",
        "select",
        "alias",
        "slice",
        "expand",
        "as_strided",
        "split",
    )

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        recording = Recording.active()
        name = func.overloadpacket.__name__
        if recording is not None and not name.startswith(self.ALLOWED):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@needs_kernels
@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
@pytest.mark.parametrize("head", ["", ", cells", ", tanh", ", encoder", ", layers", ", skip"])
@pytest.mark.parametrize(
    "critic", ["none", "separate", "extra", "shared", "shared, cells", "shared, extra", "detached", "detached, extra"]
)
def test_kernels_do_it_alone(kind, head, critic):
    """Nothing that PyTorch does on the way would be done again."""
    loss = loss_of(kind + head, critic, torch.float32, entropy_bonus=True)
    with _NoOperations() as mode:
        _, minibatch = replays_of(loss, data_of(kind, torch.float32, layers=2 if head == ", layers" else 1))
    assert not mode.seen
    assert [type(step) for step in minibatch._steps] == [Calls]


@needs_kernels
@pytest.mark.parametrize(("head", "critic"), [("", "wide"), (", skip", "wide"), (", elu", "shared, extra")])
def test_what_kernels_do_not_do_alone_says_so(head, critic):
    with _NoOperations() as mode:
        _, minibatch = replays_of(
            loss_of("categorical" + head, critic, torch.float32), data_of("categorical", torch.float32)
        )
    assert not mode.seen
    assert [Calls] != [type(step) for step in minibatch._steps]


@needs_kernels
@pytest.mark.parametrize("change", ["one-hot", "small integers", "flags as integers", "other precision"])
def test_data_are_converted_once_for_all_minibatches(change):
    loss = loss_of("categorical", "separate", torch.float64)
    data = data_of("categorical", torch.float64)
    expected = after_one_pass(loss_of("categorical", "separate", torch.float64), data, torch.arange(ROWS))
    if change == "one-hot":
        actor = GRUCategoricalActor(INPUTS, ACTIONS, hidden_size=UNITS, one_hot=True, **F64)
        actor.load_state_dict(loss.actor_network.state_dict())
        loss = RL2PPOLoss(actor, loss.critic_network)
        data["action"] = nn.functional.one_hot(data["action"], ACTIONS)
    elif change == "small integers":
        data["action"] = data["action"].to(torch.uint8)
    elif change == "flags as integers":
        data["is_init"] = data["is_init"].long()
    else:
        data["trans"] = data["trans"].float()
        expected = after_one_pass(
            loss_of("categorical", "separate", torch.float64),
            {**data, "trans": data["trans"].double()},
            torch.arange(ROWS),
        )
    assert [type(step) for step in replays_of(loss, data)[1]._steps] == [Calls]
    assert all(torch.equal(a, b) for a, b in zip(after_one_pass(loss, data, torch.arange(ROWS)), expected, strict=True))


def after_one_pass(loss, data, order, rows=2):
    """Weights after a minibatch by itself and a pass of all in one call, and what is left of them one by one."""
    replays = Replays(Program(loss), data, rows, passes=4)
    steps = steps_by(torch.optim.Adam(loss.parameters(), lr=1e-2), list(loss.parameters()))
    replays(order[:rows].contiguous())
    assert len(replays.passes(steps, 0.1, order.contiguous(), rows)) == len(order) // rows
    return [p.detach().clone() for p in loss.parameters()]


@pytest.mark.parametrize("shape", [(1,), (ACTIONS + 2,), (ACTIONS - 1,)])
def test_actions_of_another_shape_are_refused_as_ever(shape):
    batch = batch_of("categorical", torch.float32)
    batch["action"] = torch.zeros(*batch.shape, *shape, dtype=torch.int64)
    for way in ("parts", "autograd"):
        with pytest.raises(ValueError, match="actions .* for logits .*give one a row"):
            PPOUpdate(loss_of("categorical", "separate", torch.float32), bptt=2, backend=way)(batch)


@needs_kernels
@pytest.mark.parametrize(("epochs", "minibatches", "count"), [(1, 1, 0), (2, 1, 0), (3, 1, 1), (1, 4, 1), (3, 4, 1)])
def test_calls_are_noted_where_they_will_be_made_again(epochs, minibatches, count, monkeypatch):
    """Of 27 chunks: 7, 7, 7 and 6."""
    noted, run_first = [], RecordedMinibatch._run_first
    monkeypatch.setattr(RecordedMinibatch, "_run_first", lambda *arguments: noted.append(run_first(*arguments)))
    options = {"bptt": 2, "epochs": epochs, "minibatches": minibatches}
    PPOUpdate(loss_of("categorical", "separate", torch.float32), **options)(batch_of("categorical", torch.float32))
    assert len(noted) == count


@needs_kernels
def test_a_pass_is_one_call_with_frozen_weights_too():
    loss = loss_of("gaussian", "shared", torch.float64)
    weight = next(loss.actor_network.parameters()).requires_grad_(False)
    before = weight.clone()
    after_one_pass(loss, data_of("gaussian", torch.float64), torch.arange(ROWS))
    assert torch.equal(before, weight)


@needs_kernels
def test_a_pass_reads_the_chunks_in_their_order():
    data, ends = data_of("gaussian", torch.float64), []
    order = torch.tensor([4, 1, 7, 8, 0, 2, 6, 3])
    ends.append(after_one_pass(loss_of("gaussian", "separate", torch.float64), data, order))
    shuffled = {key: entry[order] for key, entry in data.items()}
    ends.append(after_one_pass(loss_of("gaussian", "separate", torch.float64), shuffled, torch.arange(8)))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_an_action_that_is_no_choice_is_an_error_in_a_pass():
    update = PPOUpdate(loss_of("categorical", "separate", torch.float32), bptt=1, minibatches=6, shuffle=False)
    batch = batch_of("categorical", torch.float32)
    batch["action"][3, 2] = ACTIONS
    with pytest.raises((IndexError, RuntimeError), match="3 choices|out of bounds"):
        update(batch)
    # 9 chunks a minibatch, and this one is the 21st: two steps were taken before it.
    assert {float(state["step"]) for state in update.optimizer.state.values()} == {2.0}


@pytest.mark.parametrize("way", ["parts", "autograd"])
def test_a_gradient_that_is_not_finite_ends_a_pass_before_its_step(way):
    update = PPOUpdate(
        loss_of("gaussian", "separate", torch.float32), bptt=1, minibatches=6, shuffle=False, backend=way
    )
    batch = batch_of("gaussian", torch.float32)
    batch["trans"][3, 2] = torch.nan
    with pytest.raises(FloatingPointError, match="epoch 0, minibatch 2"):
        update(batch)
    assert {float(state["step"]) for state in update.optimizer.state.values()} == {2.0}
    assert all(p.isfinite().all() for p in update.loss.parameters())


@pytest.mark.parametrize("way", ["parts", "autograd"])
def test_memory_that_was_lost_is_noticed_before_the_first_step(way):
    update = PPOUpdate(loss_of("categorical", "separate", torch.float32), minibatches=3, backend=way)
    batch = batch_of("categorical", torch.float32).exclude("actor_hidden", "critic_hidden")
    batch["is_init"][:] = False
    batch["is_init"][:, 0] = True
    batch["next", "done"][:, :-1] = batch["next", "terminated"][:, :-1] = False
    before = [p.detach().clone() for p in update.loss.parameters()]
    with pytest.raises(ValueError, match="memory was lost"):
        update(batch)
    assert all(torch.equal(a, b) for a, b in zip(before, update.loss.parameters(), strict=True))


# ------------------------------------------------------------------ memory
@needs_kernels
@pytest.mark.parametrize("terms", [(), (Term(),)], ids=["", "term"])
def test_gradients_of_after_an_update_are_nobody_elses(terms, monkeypatch):
    """They stay as they are until something is added to them, though all other memory goes back."""
    monkeypatch.setattr(Workspace, "_LEAST", 0)
    monkeypatch.setattr(Workspace, "_KEPT", 1000)
    monkeypatch.setattr(Workspace, "_free", threading.local())
    loss = loss_of("categorical", "separate", torch.float64)
    loss = RL2PPOLoss(loss.actor_network, loss.critic_network, terms=terms)
    batch = batch_of("categorical", torch.float64)
    PPOUpdate(loss, minibatches=3, lr=0.0)(batch)
    before = [p.grad.clone() for p in loss.parameters()]
    other = loss_of("categorical", "separate", torch.float64)
    other = RL2PPOLoss(other.actor_network, other.critic_network, terms=[Term() for _ in terms])
    PPOUpdate(other, minibatches=3, lr=1e-2)(batch)
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(loss.parameters(), before, strict=True))
    batch["advantage"], batch["value_target"] = torch.zeros(2, ROWS, STEPS, 1, **F64)
    losses = loss(batch)
    sum(value for name, value in losses.items() if name.startswith("loss_")).backward()
    more = [p.grad - gradient for p, gradient in zip(loss.parameters(), before, strict=True)]
    losses = loss(batch)
    total = sum(value for name, value in losses.items() if name.startswith("loss_"))
    for ours, expected in zip(more, torch.autograd.grad(total, list(loss.parameters())), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@needs_kernels
def test_nothing_of_a_batch_waits_for_the_garbage_collector(monkeypatch):
    seen, run_first = [], RecordedMinibatch._run_first

    def noted(minibatch, *arguments):
        run_first(minibatch, *arguments)
        seen.extend(weakref.ref(tensor) for tensor in minibatch._recording.held)
        seen.append(weakref.ref(minibatch))

    monkeypatch.setattr(RecordedMinibatch, "_run_first", noted)
    monkeypatch.setattr(Workspace, "_LEAST", 10**9)
    loss = loss_of("categorical", "shared", torch.float64)
    update = PPOUpdate(RL2PPOLoss(loss.actor_network, loss.critic_network, terms=[Term()]), bptt=2, minibatches=5)
    gc.collect()
    gc.disable()
    try:
        update(batch_of("categorical", torch.float64))
        gradients = {id(p.grad) for p in update.loss.parameters()}
        left = [ref() for ref in seen if ref() is not None]
        assert len(seen) > 20
        assert {id(each) for each in left} <= gradients
    finally:
        gc.enable()


@needs_kernels
def test_memory_goes_back_when_the_batch_is_done(monkeypatch):
    monkeypatch.setattr(Workspace, "_LEAST", 0)
    monkeypatch.setattr(Workspace, "_KEPT", 1000)
    monkeypatch.setattr(Workspace, "_free", threading.local())
    places, run_first, take = [], RecordedMinibatch._run_first, Workspace.take

    def noted(minibatch, *arguments):
        places.append(set())
        run_first(minibatch, *arguments)

    def taken(like, shape):
        places[-1].add((tensor := take(like, shape)).data_ptr())
        return tensor

    monkeypatch.setattr(RecordedMinibatch, "_run_first", noted)
    monkeypatch.setattr(Workspace, "take", taken)
    update = PPOUpdate(loss_of("categorical", "shared", torch.float32), bptt=2, minibatches=5)
    for _ in range(3):
        update(batch_of("categorical", torch.float32))
    assert len(places[0]) > 5
    assert places[1] == places[2]


@needs_kernels
def test_every_kernel_that_is_noted_can_be_called_again():
    library, signatures = kernels.load(torch.float32), kernels._signatures()
    noted = [arguments for name, (_, arguments) in signatures.items() if hasattr(library, f"again_{name}")]
    assert len(noted) > 20
    assert all(len(arguments) <= 19 for arguments in noted)
    recording = Recording()
    with recording.on():
        kernels.load(torch.float32).adam_layout(0)  # one that is not
    assert not recording.is_whole()


def test_what_is_run_without_kernels_is_right_too(monkeypatch):
    monkeypatch.setattr(kernels, "covers", lambda *_: False)
    ours, expected = (trained(way, "gaussian", "extra") for way in ("parts", "autograd"))
    assert_alike(ours, expected)
    assert COMPILED or kernels.load(torch.float32) is None


def test_a_critic_of_ones_own_in_another_dtype_runs_minibatch_by_minibatch():
    ends = []
    for way in ("parts", "autograd"):
        loss = loss_of("categorical", "none", torch.float32)
        torch.manual_seed(1)
        critic = GRUValueHead(INPUTS, hidden_size=12, **F64)
        update = PPOUpdate(RL2PPOLoss(loss.actor_network, critic), bptt=2, minibatches=5, shuffle=False, backend=way)
        batch = batch_of("categorical", torch.float32)
        batch["value_target"] = batch["state_value"] = batch["value_target"].double()
        ends.append(([update(batch)], [p.detach().double() for p in update.loss.parameters()], []))
    assert_alike(*ends, atol=1e-4)


@pytest.mark.parametrize("way", ["parts", "autograd"])
def test_another_default_device_is_none_of_the_kernels(way):
    update = PPOUpdate(loss_of("categorical", "separate", torch.float32), bptt=2, minibatches=5, backend=way)
    batch = batch_of("categorical", torch.float32)
    torch.set_default_device("meta")
    try:
        assert update(batch)["loss"] != 0
    finally:
        torch.set_default_device(None)
