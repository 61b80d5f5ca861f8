"""Minibatches that are made again from the first one's calls are what they would have been by themselves."""

import gc
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
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.modules import ProbabilisticActor

from rl2_torchrl import GRUCategoricalActor, GRUValueHead, PPOUpdate, RL2PPOLoss, kernels
from rl2_torchrl.gradients import Part, Program
from rl2_torchrl.gradients.adam import steps_by
from rl2_torchrl.gradients.recorded import RecordedMinibatch
from rl2_torchrl.gradients.replays import Replays
from rl2_torchrl.kernels.recording import Calls, Recording
from rl2_torchrl.kernels.workspace import Workspace
from rl2_torchrl.modules import RunningNorm
from rl2_torchrl.objectives.terms import SquaredError

SIZES = [{}, {"bptt": 1, "shuffle": False, "max_grad_norm": None}, {"bptt": 6, "minibatches": 2}]


def assert_alike(one, other, atol=1e-10):
    """Metrics, parameters and Adam's state of two trainings."""
    for ours, expected in zip(one[0], other[0], strict=True):
        assert ours == pytest.approx(expected, rel=1e-9 if atol < 1e-6 else 1e-3)
    for ours, expected in zip([*one[1], *one[2]], [*other[1], *other[2]], strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=atol)


# ------------------------------------------------------------------ all kinds
@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
@pytest.mark.parametrize(
    "critic", ["none", "separate", "extra", "shared", "shared, cells", "shared, extra", "detached", "wide"]
)
@pytest.mark.parametrize("options", SIZES, ids=str)
def test_updates_train_alike_both_ways(kind, critic, options):
    """Clipped gradients, entropy, chunks in any order, a short last minibatch: the same numbers, Adam's averages too."""
    ours, expected = (trained(way, kind, critic, **options) for way in ("parts", "autograd"))
    assert ("loss_critic" in ours[0][0]) == (critic != "none")
    assert_alike(ours, expected)


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
@pytest.mark.parametrize("head", [", tanh", ", elu", ", cells", ", skip"])
def test_heads_train_alike_both_ways(kind, head):
    ours, expected = (trained(way, kind + head, "separate") for way in ("parts", "autograd"))
    assert_alike(ours, expected)


def test_updates_in_single_precision():
    ours, expected = (trained(way, "gaussian", "extra", torch.float32) for way in ("parts", "autograd"))
    assert_alike(ours, expected, 1e-4)


# ------------------------------------------------------------------ by kernels
def replays_of(loss, data, rows=3):
    replays = Replays(Program(loss), data, rows, passes=4)
    replays(torch.arange(rows))
    return replays, replays._sizes[rows]


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
        if recording is not None and recording.is_whole and not name.startswith(self.ALLOWED):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@needs_kernels
@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
@pytest.mark.parametrize("head", ["", ", cells"])
@pytest.mark.parametrize("critic", ["none", "separate", "extra", "shared", "shared, cells", "detached"])
def test_kernels_do_it_alone(kind, head, critic):
    """Nothing that PyTorch does on the way would be done again."""
    loss = loss_of(kind + head, critic, torch.float32, entropy_bonus=True)
    with _NoOperations() as mode:
        _, minibatch = replays_of(loss, data_of(kind, torch.float32))
    assert not mode.seen
    assert [type(step) for step in minibatch._steps] == [Calls]


@needs_kernels
@pytest.mark.parametrize("head", [", tanh", ", elu", ", skip", ", layers"])
@pytest.mark.parametrize("critic", ["shared, extra", "detached, extra", "wide"])
def test_what_kernels_do_not_do_alone_says_so(head, critic):
    layers = 2 if head == ", layers" else 1
    with _NoOperations() as mode:
        _, minibatch = replays_of(
            loss_of("categorical" + head, critic, torch.float32), data_of("categorical", torch.float32, layers=layers)
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
@pytest.mark.parametrize(("epochs", "minibatches", "count"), [(1, 1, 0), (2, 1, 0), (3, 1, 1), (1, 4, 1), (3, 4, 2)])
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


# ------------------------------------------------------------------ beside what is not ours
class _Term(nn.Module):
    """A loss of the features, by a layer of its own, of the actor's weights and of what only some minibatches have."""

    in_keys = ("actor_features", "task", ("policy", "entropy"))

    def __init__(self, weights=(), depends=False, features=UNITS):
        super().__init__()
        torch.manual_seed(5)
        self.linear, self._weights, self._depends = nn.Linear(features, 2, **F64), list(weights), depends
        self.calls, self.kept = 0, []

    def forward(self, features, task, entropy):
        self.calls += 1
        self.kept.append((features, features.detach().clone()))
        loss = (self.linear(features) - task).square().mean() + sum(1e-3 * w.square().sum() for w in self._weights)
        if self._depends and task.sum() > 0:
            loss = loss - 0.01 * entropy.mean()
        return {"loss_task": loss, "task_seen": task.mean()}


def with_term(way, kind="categorical", critic="shared", weights=False, **options):
    loss = loss_of(kind, critic, torch.float64)
    term = _Term(loss.actor_network.parameters() if weights else (), **options)
    loss = RL2PPOLoss(loss.actor_network, loss.critic_network, terms=[term])
    update = PPOUpdate(loss, bptt=2, minibatches=5, epochs=3, max_grad_norm=0.5, lr=1e-2, backend=way)
    torch.manual_seed(3)
    metrics = [update(batch_of(kind, torch.float64)) for _ in range(2)]
    state = [value for p in loss.parameters() for value in update.optimizer.state[p].values()]
    return (metrics, [p.detach().clone() for p in loss.parameters()], state), term


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
@pytest.mark.parametrize("critic", ["separate", "shared", "shared, extra"])
@pytest.mark.parametrize("options", [{}, {"weights": True}, {"depends": True}], ids=str)
def test_a_term_of_a_users_beside_kernels(kind, critic, options):
    """On weights that the kernels differentiate too; with a gradient by an entry in some minibatches alone."""
    (ours, _), (expected, _) = (with_term(way, kind, critic, **options) for way in ("parts", "autograd"))
    assert_alike(ours, expected)


def test_what_a_term_was_shown_stays_as_it_was():
    _, term = with_term("parts")
    assert len(term.kept) == term.calls == 2 * 3 * 5  # and no minibatch twice
    assert all(torch.equal(shown, before) for shown, before in term.kept)


@needs_kernels
def test_a_term_is_all_that_python_does():
    loss = loss_of("categorical", "shared", torch.float64)
    loss = RL2PPOLoss(loss.actor_network, loss.critic_network, terms=[_Term()])
    _, minibatch = replays_of(loss, data_of("categorical", torch.float64))
    assert [isinstance(step, Calls) for step in minibatch._steps] == [True, False, True]


class _Moves(nn.Module):
    """A layer that puts its weight, and the one that is given, elsewhere in memory in some calls, transposed in others."""

    def __init__(self, other, every=3, layout=None):
        super().__init__()
        self.linear, self._other = nn.Linear(INPUTS, INPUTS, **F64), [other]
        self.calls, self._every, self._layout = 0, every, layout

    def forward(self, x):
        self.calls += 1
        if self.calls % self._every == 0:
            for weight in (self.linear.weight, *self._other):
                weight.data = 0.9 * weight.data
        if self.calls == self._layout:
            for weight in (self.linear.weight, *self._other):
                weight.data = weight.data.t().contiguous().t()
        return self.linear(x)


class _MovesToo(nn.Module):
    """A term that does so in each minibatch."""

    in_keys = ("logits",)

    def __init__(self, weight, layout=None):
        super().__init__()
        self._weight, self.calls, self._layout = [weight], 0, layout

    def forward(self, logits):
        self.calls += 1
        [weight] = self._weight
        weight.data = weight.data.clamp(-0.3, 0.3)
        if self.calls == self._layout:
            weight.data = weight.data.t().contiguous().t()
        return {"loss_size": 1e-3 * logits.square().mean()}


@pytest.mark.parametrize("minibatches", [3, 5])
@pytest.mark.parametrize("layout", [None, 1, 4, 8])
@pytest.mark.parametrize("who", ["module", "both", "term"])
def test_weights_that_move_in_every_minibatch(minibatches, layout, who):
    """The first of a size too, of which there is a short one last; nobody is called twice for it."""

    def make():
        loss = loss_of("categorical", "separate", torch.float64)
        weight = next(loss.actor_network.parameters())
        moves = TensorDictModule(_Moves(weight, every=1, layout=layout), ["trans"], ["trans"])
        term = _MovesToo(weight, layout if who == "term" else None)
        return _policy_of(*([moves] if who != "term" else []), loss=loss, terms=[term] if who != "module" else [])

    loss = both_ways(make, minibatches=minibatches)
    assert {m.calls for m in loss.modules() if isinstance(m, _Moves | _MovesToo)} == {2 * 3 * minibatches}


@pytest.mark.parametrize("writes", ["trans", "seen"])
def test_a_module_before_the_core_that_moves_weights(writes):
    """What it writes may stand in the place of what it has read."""
    ends = []
    for way in ("parts", "autograd"):
        loss = loss_of("categorical", "separate", torch.float64)
        torch.manual_seed(2)
        core, head = loss.actor_network.module[0].module
        moves = TensorDictModule(_Moves(next(core.parameters())), ["trans"], [writes])
        core.in_keys = [writes, *core.in_keys[1:]]
        actor = ProbabilisticActor(
            TensorDictSequential(moves, core, head),
            in_keys=["logits"],
            distribution_class=torch.distributions.Categorical,
            return_log_prob=True,
        )
        update = PPOUpdate(
            RL2PPOLoss(actor, loss.critic_network), bptt=2, minibatches=5, epochs=3, shuffle=False, backend=way
        )
        metrics = [update(batch_of("categorical", torch.float64)) for _ in range(2)]
        ends.append((metrics, [p.detach() for p in update.loss.parameters()], []))
    assert_alike(*ends)


def _policy_of(*modules, loss=None, **options):
    """A loss whose actor is ``modules``, then the core and the head of ``loss``."""
    loss = loss_of("categorical", "separate", torch.float64) if loss is None else loss
    core, head = loss.actor_network.module[0].module
    actor = ProbabilisticActor(
        TensorDictSequential(*modules, core, head),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    return RL2PPOLoss(actor, loss.critic_network, **options)


def both_ways(make, batch=batch_of, kind="categorical", **options):
    """Asserts that updates of the loss that ``make`` gives go the same way by parts as by autograd; returns the loss of parts."""
    ends, losses = [], []
    for way in ("autograd", "parts"):
        torch.manual_seed(2)
        losses.append(loss := make())
        sizes = {"bptt": 2, "minibatches": 5, "epochs": 3, **options}
        update = PPOUpdate(loss, shuffle=False, backend=way, **sizes)
        torch.manual_seed(4)
        metrics = [update(batch(kind, torch.float64)) for _ in range(2)]
        ends.append((metrics, [p.detach() for p in loss.parameters()], []))
    assert_alike(*ends)
    return losses[1]


class _Twice(nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_module_without_weights_that_writes_over_what_it_reads(dtype):
    """Also where the data have another dtype than the weights, and the flags another than flags."""

    def batch(kind, _):
        data = batch_of(kind, torch.float64)
        data["trans"], data["is_init"] = data["trans"].to(dtype), data["is_init"].long()
        return data

    twice = [TensorDictModule(_Twice(), [key], [key]) for key in ("trans",)]
    both_ways(lambda: _policy_of(*twice), batch)


class _Clamps(nn.Module):
    """Writes in place what others read too."""

    def forward(self, x):
        return x.clamp_(-0.5, 0.5).tanh()


def test_a_module_that_writes_in_place_what_others_read():
    both_ways(lambda: _policy_of(TensorDictModule(_Clamps(), ["trans"], ["seen"])))


class _Some(nn.Module):
    """A term that has a loss where there is something to look at, in each minibatch or not, and what a module draws beside it."""

    in_keys = ("seen", "task")

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, seen, task):
        self.calls += 1
        chosen = task[..., 0] > 0.8
        return {"loss_some": seen[chosen].square().mean()} if chosen.sum() > 1 else {}


class _Drops(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(INPUTS, INPUTS, **F64), 0

    def forward(self, x):
        self.calls += 1
        return nn.functional.dropout(self.linear(x), 0.3)


@pytest.mark.parametrize("reads", ["seen", "actor_features"])
def test_a_term_that_has_a_loss_in_some_minibatches(reads):
    """Whatever it gives, nothing is asked twice, and what is drawn at random stays in step."""

    def make():
        term = _Some()
        term.in_keys = (reads, "task")
        drops = TensorDictModule(_Drops(), ["trans"], ["seen"])
        loss = _policy_of(drops, terms=[term])
        loss.actor_network.module[0].module[1].in_keys[0] = "seen"
        return loss

    loss = both_ways(make)
    assert {m.calls for m in loss.modules() if isinstance(m, _Some | _Drops)} == {2 * 3 * 5}


class _Grows(nn.Module):
    """A module whose output has a gradient in some calls alone, and one that looks at the rows one by one."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(INPUTS, INPUTS, **F64), 0

    def forward(self, x):
        self.calls += 1
        y = self.linear(x)
        return y if self.calls % 2 == 0 else y.detach()


def test_a_module_that_has_a_gradient_in_some_minibatches():
    loss = both_ways(lambda: _policy_of(TensorDictModule(_Grows(), ["trans"], ["trans"])))
    assert next(m.calls for m in loss.modules() if isinstance(m, _Grows)) == 2 * 3 * 5


class _Borrows(nn.Module):
    """A module without weights that reads another's in some calls."""

    def __init__(self, weight):
        super().__init__()
        self._weight, self.calls = [weight], 0

    def forward(self, x):
        self.calls += 1
        return x + 0.1 * self._weight[0].sum() if self.calls % 2 == 0 else x + 1


def test_a_module_that_borrows_a_weight_in_some_minibatches():
    def make():
        loss = loss_of("categorical", "separate", torch.float64)
        borrows = _Borrows(list(loss.actor_network.parameters())[-1])
        return _policy_of(TensorDictModule(borrows, ["trans"], ["trans"]), loss=loss)

    loss = both_ways(make)
    assert next(m.calls for m in loss.modules() if isinstance(m, _Borrows)) == 2 * 3 * 5


def test_weights_of_one_row_with_strides_of_their_own():
    """As those of another framework's are: contiguous, though not as PyTorch would have laid them."""

    def make():
        loss = loss_of("categorical", "separate", torch.float64)
        head = [m for m in loss.critic_network.modules() if isinstance(m, nn.Linear)][-1]
        weight = torch.empty_strided((1, 12), (1, 1), **F64).copy_(head.weight.detach())
        head.weight = nn.Parameter(weight)
        assert head.weight.is_contiguous()
        return loss

    both_ways(make)


class _Optimistic(torch.optim.SGD):
    """Steps by twice the gradient less the last one, which it keeps as it was shown it."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            gradient, last = parameter.grad, self.state[parameter].get("last", parameter.grad)
            self.state[parameter]["last"] = gradient
            parameter.data.add_(2 * gradient - last, alpha=-1e-2)


@pytest.mark.parametrize("terms", [False, True])
def test_an_optimizer_may_keep_the_gradients_that_it_is_shown(terms):
    losses = []
    for way in ("parts", "autograd"):
        loss = loss_of("categorical", "separate", torch.float64)
        loss = RL2PPOLoss(loss.actor_network, loss.critic_network, terms=[_Term()] if terms else ())
        optimizer = _Optimistic(loss.parameters(), lr=1e-2)
        PPOUpdate(loss, optimizer=optimizer, bptt=2, minibatches=5, epochs=3, shuffle=False, backend=way)(
            batch_of("categorical", torch.float64)
        )
        losses.append(loss)
    for ours, expected in zip(*(loss.parameters() for loss in losses), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("spied", "written"), [("spied", "trans"), ("trans", "trans"), ("spied", "spied")])
@pytest.mark.parametrize("is_first", [True, False])
def test_what_reads_data_alone_waits_for_who_reads_them_as_they_were(is_first, spied, written):
    """A normalisation in place, before or behind a module that reads what it writes over, or writes there too."""
    ends = []
    for way in ("parts", "autograd"):
        loss = loss_of("categorical", "separate", torch.float64)
        torch.manual_seed(2)
        core, head = loss.actor_network.module[0].module
        spy = TensorDictModule(nn.Linear(INPUTS, INPUTS, **F64), ["trans"], [spied])
        norm = RunningNorm(INPUTS).double()
        norm.update_statistics(3 * torch.randn(50, INPUTS, **F64) + 1)
        modules = [spy, TensorDictModule(norm, ["trans"], [written])]
        core.in_keys = [written, *core.in_keys[1:]]
        actor = ProbabilisticActor(
            TensorDictSequential(*(modules if is_first else modules[::-1]), core, head),
            in_keys=["logits"],
            distribution_class=torch.distributions.Categorical,
            return_log_prob=True,
        )
        term = _Term(features=INPUTS)
        term.in_keys = (spied, *term.in_keys[1:])
        loss = RL2PPOLoss(actor, loss.critic_network, terms=[term])
        update = PPOUpdate(loss, bptt=2, minibatches=5, epochs=3, shuffle=False, backend=way)
        ends.append(([update(batch_of("categorical", torch.float64))], [p.detach() for p in loss.parameters()], []))
    assert_alike(*ends)


@pytest.mark.parametrize("frozen", ["core", "head", "bias"])
def test_frozen_weights_stay_and_have_no_gradient(frozen):
    ends = []
    for way in ("parts", "autograd"):
        loss = loss_of("categorical", "separate", torch.float64)
        core, head = loss.actor_network.module[0].module
        chosen = {
            "core": core.parameters(),
            "head": head.parameters(),
            "bias": [p for p in head.parameters() if p.ndim == 1],
        }
        for parameter in chosen[frozen]:
            parameter.requires_grad_(False)
        update = PPOUpdate(loss, bptt=2, minibatches=5, epochs=3, shuffle=False, backend=way)
        metrics = [update(batch_of("categorical", torch.float64)) for _ in range(2)]
        assert all((p.grad is None) != p.requires_grad for p in loss.parameters())
        ends.append((metrics, [p.detach() for p in loss.parameters()], []))
    assert_alike(*ends)


# ------------------------------------------------------------------ memory
@needs_kernels
@pytest.mark.parametrize("terms", [(), (_Term(),)], ids=["", "term"])
def test_gradients_of_after_an_update_are_nobody_elses(terms, monkeypatch):
    """They stay as they are until something is added to them, though all other memory goes back."""
    monkeypatch.setattr(Workspace, "_LEAST", 0)
    monkeypatch.setattr(Workspace, "_KEPT", 1000)
    loss = loss_of("categorical", "separate", torch.float64)
    loss = RL2PPOLoss(loss.actor_network, loss.critic_network, terms=terms)
    batch = batch_of("categorical", torch.float64)
    PPOUpdate(loss, minibatches=3, lr=0.0)(batch)
    before = [p.grad.clone() for p in loss.parameters()]
    other = loss_of("categorical", "separate", torch.float64)
    other = RL2PPOLoss(other.actor_network, other.critic_network, terms=[_Term() for _ in terms])
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
        seen.extend(weakref.ref(tensor) for tensor in (*minibatch._recording.kept, *minibatch._recording.held))
        seen.append(weakref.ref(minibatch))

    monkeypatch.setattr(RecordedMinibatch, "_run_first", noted)
    monkeypatch.setattr(Workspace, "_LEAST", 10**9)
    loss = loss_of("categorical", "shared", torch.float64)
    update = PPOUpdate(RL2PPOLoss(loss.actor_network, loss.critic_network, terms=[_Term()]), bptt=2, minibatches=5)
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
    places, run_first = [], RecordedMinibatch._run_first

    def noted(minibatch, *arguments):
        run_first(minibatch, *arguments)
        places.append({tensor.data_ptr() for tensor in minibatch._recording.kept})

    monkeypatch.setattr(RecordedMinibatch, "_run_first", noted)
    update = PPOUpdate(loss_of("categorical", "shared", torch.float32), bptt=2, minibatches=5)
    for _ in range(3):
        update(batch_of("categorical", torch.float32))
    assert len(places[0]) > 5
    assert places[2:4] == places[4:6]


@needs_kernels
def test_every_kernel_that_is_noted_can_be_called_again():
    library, number, names = kernels.load(torch.float32), 0, []
    while (name := library.kernel_name(number)) is not None:
        names.append(name.decode())
        number += 1
    assert len(set(names)) == len(names) == number
    assert all(len(kernels._SIGNATURES[name][1]) <= 19 for name in names)
    recording = Recording()
    with recording.on():
        kernels.load(torch.float32).adam_layout(0)  # one that is not
    assert not recording.is_whole


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


class _Toggles(nn.Module):
    """A term in which a head is detached from now on, or is no more."""

    in_keys = ("logits",)

    def __init__(self, head):
        super().__init__()
        self._head = [head]

    def forward(self, logits):
        self._head[0].detach = not self._head[0].detach
        return {"loss_size": 1e-3 * logits.square().mean()}


def test_a_head_that_is_detached_between_two_minibatches():
    def make():
        loss = loss_of("categorical", "shared", torch.float64)
        return RL2PPOLoss(loss.actor_network, loss.critic_network, terms=[_Toggles(loss.critic_network)])

    both_ways(make)


class _MovesStatistics(nn.Module):
    """A term in which a normalisation learns, within a batch."""

    in_keys = ("trans",)

    def __init__(self, norm):
        super().__init__()
        self._norm = [norm]

    def forward(self, trans):
        self._norm[0].update_statistics(trans + 1)
        return {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_normalisation_that_moves_within_a_batch(dtype):
    def make():
        norm = RunningNorm(INPUTS).to(dtype)
        norm.update_statistics(torch.randn(50, INPUTS, dtype=dtype))
        return _policy_of(TensorDictModule(norm, ["trans"], ["trans"]), terms=[_MovesStatistics(norm)])

    both_ways(make)


class _Swaps(nn.Module):
    """A term in which two weights change places in memory."""

    in_keys = ("logits",)

    def __init__(self, one, other):
        super().__init__()
        self._pair = [one, other]

    def forward(self, logits):
        one, other = self._pair
        one.data, other.data = other.data, one.data
        return {"loss_size": 1e-3 * logits.square().mean()}


def test_weights_that_change_places():
    def make():
        loss = loss_of("categorical", "separate", torch.float64)
        core = loss.actor_network.module[0].module[0]
        return RL2PPOLoss(
            loss.actor_network, loss.critic_network, terms=[_Swaps(core.gru.bias_ih_l0, core.gru.bias_hh_l0)]
        )

    both_ways(make)


class _ByHand(nn.Module):
    """A layer with a gradient of its own, of PyTorch's operations."""

    def __init__(self, inputs=INPUTS, outputs=INPUTS):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs, **F64))

    def forward(self, x):
        return x @ self.weight

    def gradient_part(self, in_keys, out_keys):
        return _ByHandPart(self, in_keys, out_keys)


class _ByHandPart(Part):
    def forward_by_hand(self, state):
        self.x = state[self.in_keys[0]]
        state[self.out_keys[0]] = self.x @ self.function.weight
        return True

    def backward_by_hand(self, gradients):
        slope = gradients.pop(self.out_keys[0])
        weight = self.function.weight
        gradients[weight] = self.x.flatten(0, 1).t() @ slope.flatten(0, 1)
        if self.in_keys[0] in self.wanted:
            gradients[self.in_keys[0]] = slope @ weight.t()


@pytest.mark.parametrize("count", [1, 2])
def test_a_part_of_a_users_that_knows_nothing_of_recordings(count):

    both_ways(lambda: _policy_of(*(TensorDictModule(_ByHand(), ["trans"], ["trans"]) for _ in range(count))))


def test_a_part_of_a_users_within_one_of_ours():
    def make():
        loss = loss_of("gaussian", "separate", torch.float64)
        head = next(m for m in loss.actor_network.modules() if "log_std" in m._parameters)
        head.mean = _ByHand(UNITS, ACTIONS)
        return RL2PPOLoss(loss.actor_network, loss.critic_network)

    both_ways(make, kind="gaussian")


class _Scaled(SquaredError):
    """A term of a class below one of ours."""

    def by_kernels(self, value, target):
        totals, slopes, more = super().by_kernels(value, target)
        return 3 * totals, (3 * slopes[0], None), more


def test_a_term_below_one_of_ours_is_asked_what_it_does():
    class Own(RL2PPOLoss):
        def loss_terms(self):
            objective, *_ = super().loss_terms()
            return [objective, _Scaled(0.5)]

    ends = []
    for way in ("parts", "autograd"):
        loss = loss_of("categorical", "separate", torch.float64)
        update = PPOUpdate(
            Own(loss.actor_network, loss.critic_network), bptt=2, minibatches=5, shuffle=False, backend=way
        )
        ends.append(([update(batch_of("categorical", torch.float64))], [p.detach() for p in loss.parameters()], []))
    assert_alike(*ends)
