"""`PPOUpdate`: how batches are cut and passed over, schedules, early stop, clipping, broken numbers, metrics, state."""

import copy
import math
import pickle
from functools import partial, partialmethod

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torchrl.collectors import Collector
from torchrl.collectors.utils import split_trajectories
from torchrl.data import Unbounded
from torchrl.envs import Compose, InitTracker, TensorDictPrimer, TransformedEnv
from torchrl.modules import ProbabilisticActor, set_recurrent_mode
from torchrl.objectives import ClipPPOLoss, KLPENPPOLoss

from rl2_torchrl import (
    ActorCritic,
    FastGRUModule,
    GRUCategoricalActor,
    GRUGaussianActor,
    GRUValueHead,
    MemoryValueHead,
    PPOUpdate,
    PreviousStep,
    RL2PPOLoss,
    TaskBelief,
    TaskSampler,
    Trial,
    TrialAdvantage,
    TrialCollector,
    kernels,
    linear_decay,
)
from rl2_torchrl.envs import BernoulliBandit, QuadraticBandit, uniform_means, uniform_targets
from rl2_torchrl.gradients.graphed import why_not_graphed
from rl2_torchrl.passes import Passes


def make_loss(**kwargs):
    torch.manual_seed(0)
    return RL2PPOLoss(GRUCategoricalActor(5, 3, hidden_size=4), GRUValueHead(5, hidden_size=4), **kwargs)


def make_batch(rows=4, steps=6):
    """Whole trials ``[rows, steps]`` of random numbers; the memory is empty at their first steps."""
    generator = torch.Generator().manual_seed(1)

    def normal(*size):
        return torch.randn(rows, steps, *size, generator=generator)

    done = torch.zeros(rows, steps, 1, dtype=torch.bool)
    done[:, -1] = True
    later = ~done.roll(1, 1).unsqueeze(-1)
    entries = {
        "trans": normal(5),
        "is_init": done.roll(1, 1),
        "actor_hidden": normal(1, 4) * later,
        "critic_hidden": normal(1, 4) * later,
        "action": torch.randint(3, (rows, steps), generator=generator),
        "action_log_prob": normal(),
        "state_value": normal(1),
        "logits": normal(3),
        "next": {"reward": normal(1), "done": done, "terminated": done.clone(), "trans": normal(5)},
    }
    return TensorDict(entries, [rows, steps])


@pytest.fixture(autouse=True, params=["parts", "autograd", "graph"])
def way(request, monkeypatch):
    """Every test with gradients part by part and as on a CUDA device, where they serve; with autograd's."""
    if request.param == "graph":
        monkeypatch.setattr(Passes, "_choose", partialmethod(_choose_graph, Passes._choose))
    if request.param == "autograd":
        monkeypatch.setattr(RL2PPOLoss, "why_not_parts", lambda _: "not here")
    return request.param


def _choose_graph(passes, choose, optimizer):
    backend, reason, program = choose(passes, optimizer)
    is_alone = backend == "parts" and passes._loss.runs_beside() is None
    serves = passes._named == "auto" and is_alone and why_not_graphed(passes._loss, optimizer) is None
    return ("graph", "as on a device", None) if serves else (backend, reason, program)


class Seen:
    """Records what the loss is given, and the state in which it is."""

    def __init__(self, update):
        self.minibatches, self.lrs, self.coeffs = [], [], []
        self.update, self.chunks = update, update._minibatches
        self.chunks.order = partial(self.record, self.chunks.order)

    def record(self, order):
        """The minibatches of a pass, whichever way they will go."""
        index = order()
        for own in index.split(self.chunks.rows):
            entries = {key: entry[own] for key, entry in self.chunks.chunks.items()}
            self.minibatches.append(TensorDict(entries, entries["value_target"].shape[:2]))
            self.lrs.append(self.update.optimizer.param_groups[0]["lr"])
            self.coeffs.append(float(self.update.loss.entropy_coeff))
        return index

    def order(self, entry="value_target"):
        return [minibatch[entry].flatten() for minibatch in self.minibatches]


def parameters(update):
    return [p.detach().clone() for p in update.loss.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ------------------------------------------------------------ chunks, passes


@pytest.mark.parametrize("bptt", [1, 2, 3, 6, None])
def test_chunks_are_consecutive_steps_of_a_row(bptt):
    update = PPOUpdate(make_loss(), bptt=bptt)
    batch = update.advantage(make_batch())
    chunks = update.chunks(batch)
    length = bptt or 6
    assert chunks.shape == (4 * 6 // length, length)
    for i, chunk in enumerate(chunks):
        row, first = divmod(i * length, 6)
        source = batch[row, first : first + length]
        assert torch.equal(chunk["trans"], source["trans"])
        # A chunk starts from the memory stored at its own first step; a whole trial starts from none.
        assert ("actor_hidden" in chunk.keys()) is (length < 6)
        if length < 6:
            assert torch.equal(chunk["actor_hidden"], source["actor_hidden"])


@pytest.mark.parametrize(
    ("critic", "kwargs", "memory", "more"),
    [
        (GRUValueHead(5, hidden_size=4), {}, {"actor_hidden", "critic_hidden"}, set()),
        (GRUValueHead(5, hidden_size=4), {"clip_value": 0.2}, {"actor_hidden", "critic_hidden"}, {"state_value"}),
        (MemoryValueHead(4, detach=True), {}, {"actor_hidden"}, set()),
        (None, {}, {"actor_hidden"}, set()),
    ],
)
def test_chunks_hold_only_what_the_loss_reads(critic, kwargs, memory, more):
    read = {"trans", "is_init", "action", "action_log_prob", "advantage", "value_target"} | more
    for bptt, keys in ((2, read | memory), (None, read)):
        update = PPOUpdate(RL2PPOLoss(GRUCategoricalActor(5, 3, hidden_size=4), critic, **kwargs), bptt=bptt)
        assert set(update.chunks(update.advantage(make_batch())).keys()) == keys
        # What has to be collected for it: the same, and what the advantage is made of.
        ends = {"state_value", ("next", "reward"), ("next", "done"), ("next", "terminated")}
        # Where rows may be cut, also what the critic reads beyond.
        beyond = memory & {"actor_hidden" if isinstance(critic, MemoryValueHead) else "critic_hidden"} | {"trans"}
        beyond = {("next", key) for key in beyond} if bptt and critic else set()
        assert set(update.in_keys) == keys - {"advantage", "value_target"} | ends | beyond
        update.chunks(
            update.advantage(make_batch().select(*update.in_keys, strict=False))
        )  # whole trials: nothing beyond


def test_rows_that_begin_inside_a_trial_start_from_their_memory():
    batch = make_batch()
    batch["is_init"][1, 0] = False
    batch["actor_hidden"][1, 0] = 0.5
    update = PPOUpdate(make_loss())
    chunks = update.chunks(update.advantage(batch))
    assert torch.equal(chunks["actor_hidden"], batch["actor_hidden"])
    # The memory counts: another one gives another loss.
    other = batch.clone()
    other["actor_hidden"][1, 0] = -0.5
    one, two = (PPOUpdate(make_loss(), lr=0.0, epochs=1)(b)["loss_objective"] for b in (batch, other))
    assert one != two


def test_batches_with_several_batch_dimensions():
    flat, nested = make_batch(), make_batch().reshape(2, 2, 6)
    one, two = PPOUpdate(make_loss(), shuffle=False), PPOUpdate(make_loss(), shuffle=False)
    assert one(flat) == two(nested)


@pytest.mark.parametrize(
    ("bptt", "minibatches", "sizes"),
    [
        # As torch.chunk: ceil(chunks / minibatches) in each, the last one smaller.
        (None, 4, [1, 1, 1, 1]),
        (None, 2, [2, 2]),
        (2, 3, [4, 4, 4]),
        (1, 5, [5, 5, 5, 5, 4]),
        (1, 1, [24]),
    ],
)
def test_sizes_and_number_of_minibatches(bptt, minibatches, sizes):
    update = PPOUpdate(make_loss(), bptt=bptt, minibatches=minibatches, epochs=3)
    seen = Seen(update)
    update(make_batch())
    assert [len(minibatch) for minibatch in seen.minibatches] == sizes * 3


def test_fewer_minibatches_than_were_asked_for_are_said_once(caplog):
    update = PPOUpdate(make_loss(), minibatches=4, epochs=1)
    with caplog.at_level("INFO", logger="rl2_torchrl"):
        for rows in (8, 9, 9):
            update(make_batch(rows))
    assert [record.getMessage()[:31] for record in caplog.records] == ["3 minibatches a pass, not 4: 9 "]


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_pass_sees_every_chunk_once(shuffle):
    update = PPOUpdate(make_loss(), bptt=1, minibatches=3, epochs=3, shuffle=shuffle)
    seen = Seen(update)
    update(make_batch())
    returns = update.advantage(make_batch())["value_target"].flatten()
    epochs = torch.cat(seen.order()).reshape(3, 24)
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, returns.sort().values)
        assert torch.equal(epoch, returns) is not shuffle
    assert torch.equal(epochs[0], epochs[1]) is not shuffle


def test_number_and_order_of_minibatches_may_change_between_two_updates():
    update = PPOUpdate(make_loss(), bptt=1, minibatches=1, epochs=1)
    seen = Seen(update)
    update(make_batch())
    update.minibatches, update.shuffle = 3, False
    update(make_batch())
    assert [len(minibatch) for minibatch in seen.minibatches] == [24, 8, 8, 8]
    assert torch.equal(torch.cat(seen.order()[1:]), update.advantage(make_batch())["value_target"].flatten())
    update.minibatches = 0
    with pytest.raises(ValueError, match="minibatches=0"):
        update(make_batch())


def test_the_generator_decides_the_order():
    orders = []
    for seed in (3, 3, 4):
        update = PPOUpdate(make_loss(), bptt=1, generator=torch.Generator().manual_seed(seed))
        seen = Seen(update)
        update(make_batch())
        orders.append(torch.cat(seen.order()))
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_every_call_trains_on_its_own_batch():
    # The buffer is kept between calls; neither old chunks, nor an old size, nor old entries may stay in it.
    update = PPOUpdate(make_loss(), bptt=6, minibatches=2, epochs=1, shuffle=False)
    seen = Seen(update)
    for rows, shift, whole in ((4, 0.0, True), (4, 5.0, False), (4, 2.0, True), (2, 9.0, True), (2, 1.0, False)):
        batch = make_batch(rows)
        batch["trans"] += shift
        batch["is_init"] &= whole
        batch["actor_hidden"] += shift
        seen.minibatches.clear()
        update(batch)
        assert torch.equal(torch.cat([m["trans"] for m in seen.minibatches]), batch["trans"])
        hidden = [m.get("actor_hidden", None) for m in seen.minibatches]
        assert all(h is None for h in hidden) if whole else torch.equal(torch.cat(hidden), batch["actor_hidden"])


# ------------------------------------------------------- schedules, early stop


def test_schedules_follow_the_progress():
    loss = make_loss(entropy_bonus=True, entropy_coeff=0.2)
    update = PPOUpdate(loss, lr=1e-3, epochs=1, lr_schedule=linear_decay, entropy_schedule=lambda p: (1 - p) ** 2)
    seen = Seen(update)
    for progress in (0.0, 0.25, 0.5):
        seen.lrs.clear()
        seen.coeffs.clear()
        metrics = update(make_batch(), progress)
        # Factors on the initial values, not on those of the last call.
        assert seen.lrs == pytest.approx([1e-3 * (1 - progress)] * 4)
        assert seen.coeffs == pytest.approx([0.2 * (1 - progress) ** 2] * 4, rel=1e-6)
        assert metrics["lr"] == pytest.approx(1e-3 * (1 - progress))


def test_steps_are_of_the_size_that_the_schedule_says():
    begin, trained = [p.detach().clone() for p in make_loss().parameters()], []
    for lr, schedule in ((1e-2, lambda progress: 0.5 * progress), (2.5e-3, None)):
        update = PPOUpdate(loss := make_loss(), lr=lr, epochs=1, lr_schedule=schedule)
        update(make_batch(), 0.5)
        trained.append([p.detach() for p in loss.parameters()])
    for before, scheduled, given in zip(begin, *trained, strict=True):
        assert torch.equal(scheduled, given)
        assert not torch.equal(scheduled, before)


def test_without_schedules_progress_changes_nothing():
    update = PPOUpdate(make_loss(), lr=1e-3)
    assert update(make_batch(), 0.9)["lr"] == 1e-3


def test_early_stop_on_kl():
    # At a learning rate of 0 the KL estimate is that of the data: the mean of log pi_old - log pi.
    batch = make_batch()
    kl = PPOUpdate(make_loss(), lr=0.0, epochs=1)(batch.clone())["kl_approx"]
    batch["action_log_prob"] += 1.0 - kl
    assert PPOUpdate(make_loss(), lr=0.0, epochs=5, target_kl=0.9)(batch.clone())["epochs"] == 1
    assert PPOUpdate(make_loss(), lr=0.0, epochs=5, target_kl=1.1)(batch.clone())["epochs"] == 5
    assert PPOUpdate(make_loss(), lr=0.0, epochs=5)(batch.clone())["epochs"] == 5


def test_a_loss_that_says_no_kl_cannot_stop_by_it():
    class Silent(RL2PPOLoss):
        def forward(self, tensordict):
            return super().forward(tensordict).exclude("kl_approx")

    loss = make_loss()
    loss = Silent(loss.actor_network, loss.critic_network)
    before = [p.detach().clone() for p in loss.parameters()]
    with pytest.raises(KeyError, match="'kl_approx', which this loss does not give.*leave target_kl out"):
        PPOUpdate(loss, target_kl=1e-9)(make_batch())
    assert all(map(torch.equal, before, loss.parameters()))
    assert PPOUpdate(loss, epochs=1)(make_batch())["epochs"] == 1


def test_autocast_changes_nothing():
    changed = []
    for is_on in (False, True):
        torch.manual_seed(0)
        options = {"hidden_size": 4, "num_cells": [4], "activation": torch.nn.Tanh}
        update = PPOUpdate(RL2PPOLoss(GRUCategoricalActor(5, 3, **options), GRUValueHead(5, **options)), epochs=2)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_on):
            update(make_batch())
        changed.append(parameters(update))
    assert same(*changed)


# -------------------------------------------------------------- one step's rules


def test_gradient_is_clipped_to_its_norm():
    # With plain gradient descent at a learning rate of 1 the step is the gradient itself.
    steps, norms = {}, {}
    for limit in (None, 1e-3, 1e3):
        loss = make_loss()
        optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
        update = PPOUpdate(loss, epochs=1, minibatches=1, max_grad_norm=limit, optimizer=optimizer)
        before = parameters(update)
        norms[limit] = update(make_batch())["grad_norm"]
        steps[limit] = torch.cat([(a - b).flatten() for a, b in zip(before, parameters(update), strict=True)])
    assert steps[None].norm().item() == pytest.approx(norms[None], rel=1e-4)
    assert steps[1e-3].norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert torch.allclose(steps[1e3], steps[None])
    # The norm that is reported is the one before clipping.
    assert norms[1e-3] == pytest.approx(norms[None])


def test_adam_by_default_and_a_custom_optimizer():
    assert isinstance(PPOUpdate(make_loss()).optimizer, torch.optim.Adam)
    # Adam's first step is lr * sign(gradient).
    update = PPOUpdate(make_loss(), lr=0.01, epochs=1, minibatches=1)
    before = parameters(update)
    update(make_batch())
    largest = max((a - b).abs().max().item() for a, b in zip(before, parameters(update), strict=True))
    assert largest == pytest.approx(0.01, rel=1e-3)
    # An optimizer over the critic alone leaves the actor as it is.
    loss = make_loss()
    critic = torch.optim.SGD(loss.critic_network.parameters(), lr=0.1)
    update = PPOUpdate(loss, optimizer=critic)
    actor = [p.clone() for p in loss.actor_network.parameters()]
    assert update(make_batch())["lr"] == 0.1
    assert same(actor, loss.actor_network.parameters())
    assert not same(parameters(PPOUpdate(make_loss())), parameters(update))


def test_metrics_are_means_over_all_minibatches():
    # At a learning rate of 0 nothing moves, so that every pass repeats the first one.
    update = PPOUpdate(make_loss(entropy_bonus=True), lr=0.0, epochs=2, minibatches=3, shuffle=False)
    metrics = update(make_batch(6))
    losses = [update.loss(chunk) for chunk in update.chunks(update.advantage(make_batch(6))).split(2)]
    for name in ("loss_objective", "loss_critic", "loss_entropy", "kl_approx", "clip_fraction", "entropy"):
        assert metrics[name] == pytest.approx(sum(float(one[name]) for one in losses) / 3, abs=1e-6)
    total = metrics["loss_objective"] + metrics["loss_critic"] + metrics["loss_entropy"]
    assert metrics["loss"] == pytest.approx(total, abs=1e-6)
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in metrics.values())
    # Of the largest ratios it is the largest.
    assert metrics["max_ratio"] == pytest.approx(max(float(one["max_ratio"]) for one in losses), rel=1e-5)


def test_a_loss_without_critic_term():
    update = PPOUpdate(RL2PPOLoss(GRUCategoricalActor(5, 3, hidden_size=4)))
    metrics = update(make_batch())
    assert "loss_critic" not in metrics
    assert metrics["loss"] == metrics["loss_objective"]


@pytest.mark.parametrize("minibatch", [0, 2])
def test_a_loss_that_is_not_finite_says_where_and_changes_nothing(minibatch):
    update = PPOUpdate(make_loss(), bptt=6, minibatches=4, shuffle=False)
    batch = make_batch()
    batch["trans"][minibatch] = math.nan
    untouched = parameters(update)
    with pytest.raises(FloatingPointError, match=rf"epoch 0, minibatch {minibatch}.*loss_objective.*nan"):
        update(batch)
    assert all(p.isfinite().all() for p in update.loss.parameters())
    assert same(untouched, parameters(update)) is (minibatch == 0)


def test_a_gradient_that_is_not_finite_says_where_and_changes_nothing():
    update = PPOUpdate(make_loss(), bptt=6, minibatches=2, shuffle=False)
    # A loss of sqrt(0) is finite, its gradient is not.
    forward, calls = update.loss.forward, []

    def broken(minibatch):
        losses = forward(minibatch)
        calls.append(parameters(update))
        if len(calls) == 2:
            losses["loss_critic"] = (losses["loss_critic"] * 0).sqrt()
        return losses

    update.loss.forward = broken
    with pytest.raises(FloatingPointError, match=r"gradient.*epoch 0, minibatch 1"):
        update(make_batch())
    assert same(calls[1], parameters(update))


# --------------------------------------------------------------- wrong arguments

NUMBERS = {
    "epochs": (0, -1, 2.0, True, "4", math.nan),
    "minibatches": (0, 1.5, False),
    "bptt": (0, 0.5),
    "max_grad_norm": (0.0, -1.0, math.nan),
    "target_kl": (0.0, math.nan),
    "lr": (-1e-3, math.nan, math.inf),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NUMBERS.items() for value in values])
def test_numbers_out_of_range(name, value):
    with pytest.raises(ValueError, match=name):
        PPOUpdate(make_loss(), **{name: value})


def test_numpys_integers_are_whole_numbers():
    update = PPOUpdate(make_loss(), bptt=np.int64(2), epochs=np.int32(1), minibatches=np.int64(3))
    assert (update.bptt, update.epochs, update.minibatches) == (2, 1, 3)
    assert update(make_batch())["epochs"] == 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("advantage", "gae", "no function.*TrialAdvantage"),
        ("advantage", TrialAdvantage, "no function.*TrialAdvantage\\(value_target"),
        ("lr_schedule", 0.5, "no function.*linear_decay"),
        ("lr_schedule", torch.optim.lr_scheduler.LinearLR, "no function.*linear_decay"),
        ("entropy_schedule", 0.5, "no function.*linear_decay"),
        ("generator", 3, "no generator"),
        ("optimizer", torch.optim.SGD, "no optimizer"),
    ],
)
def test_arguments_of_another_kind(name, value, message):
    with pytest.raises(TypeError, match=message):
        PPOUpdate(make_loss(entropy_bonus=True), **{name: value})


def test_an_advantage_that_returns_nothing_is_named():
    with pytest.raises(TypeError, match="the advantage returned None: it returns the batch"):
        PPOUpdate(make_loss(), lambda batch: None)(make_batch())


@pytest.mark.parametrize("name", ["lr_schedule", "entropy_schedule"])
@pytest.mark.parametrize("factor", [-0.5, math.nan, math.inf])
def test_factors_that_would_climb_the_loss_or_break_it_are_refused(name, factor):
    update = PPOUpdate(make_loss(entropy_bonus=True), **{name: lambda progress: factor if progress else 1.0})
    with pytest.raises(ValueError, match=f"{name} gave {factor} at progress 0.75"):
        update(make_batch(), 0.75)
    with pytest.raises(ValueError, match=f"{name} gave {factor} at progress 0:"):
        PPOUpdate(make_loss(entropy_bonus=True), **{name: lambda progress: factor})
    with pytest.raises(TypeError, match=f"{name} gave None at progress 0: a factor"):
        PPOUpdate(make_loss(entropy_bonus=True), **{name: lambda progress: None})


@pytest.mark.parametrize(("name", "scheduled"), [("lr_schedule", "lr"), ("entropy_schedule", "entropy_coeff")])
def test_schedules_that_give_the_values_themselves_are_refused(name, scheduled):
    def update_by(schedule, initial=0.01):
        lr, entropy_coeff = {"lr": (initial, 0.01), "entropy_coeff": (1e-3, initial)}[scheduled]
        loss = make_loss(entropy_bonus=True, entropy_coeff=entropy_coeff)
        return PPOUpdate(loss, lr=lr, **{name: schedule})

    with pytest.raises(ValueError, match=rf"{name} is a factor on {scheduled}=0.01 .* never be above 0.0001.*=1.0\."):
        update_by(lambda progress: 0.01 * (1 - progress))
    update_by(lambda progress: 0.01 * (1 - progress), 1.0)
    # Factors that begin, go on or stay next to 0; NumPy's and PyTorch's.
    for schedule in (lambda p: min(1.0, 30 * p), lambda p: min(50 * p, 0.01 ** (10 * p)), lambda p: 0.0):
        update_by(schedule)
    for one in (np.array(1.0), np.float32(1), torch.tensor(1.0), True):
        update_by(lambda p, one=one: one)
    for none in (None, "1.0", [1.0], np.ones(2)):
        with pytest.raises(TypeError, match=rf"{name} gave .* a factor on the initial value is a number"):
            update_by(lambda p, none=none: none)


def test_a_schedule_of_several_weights_is_refused():
    loss = make_loss(entropy_bonus=True, entropy_coeff={"action": 0.1})
    with pytest.raises(
        ValueError, match="entropy_schedule moves one weight, and the loss has one for each of several heads"
    ):
        PPOUpdate(loss, entropy_schedule=linear_decay)


def test_an_optimizer_of_other_parameters_or_with_a_learning_rate_beside_it():
    loss, other = make_loss(), make_loss()
    with pytest.raises(ValueError, match="are not the loss's"):
        PPOUpdate(loss, optimizer=torch.optim.Adam(other.parameters()))
    stranger = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="1 of the optimizer's"):
        PPOUpdate(loss, optimizer=torch.optim.Adam([*loss.parameters(), stranger]))
    with pytest.raises(ValueError, match="lr=0.1 is Adam's"):
        PPOUpdate(loss, lr=0.1, optimizer=torch.optim.Adam(loss.parameters()))


def test_an_optimizer_that_asks_for_the_loss_again_is_refused():
    loss = make_loss()
    with pytest.raises(ValueError, match="LBFGS asks for the loss again within a step, by a closure"):
        PPOUpdate(loss, optimizer=torch.optim.LBFGS(loss.parameters()))


def test_values_go_by_one_name():
    loss = RL2PPOLoss(make_loss().actor_network, GRUValueHead(5, hidden_size=4, value_key="v"))
    with pytest.raises(
        ValueError, match=r"loss reads values under 'state_value', but its critic writes .*'v'.*set_keys"
    ):
        PPOUpdate(loss)
    loss.set_keys(value="v")
    with pytest.raises(ValueError, match=r"advantage reads values under 'state_value', but .*'v'.*value_key"):
        PPOUpdate(loss)
    batch = make_batch()
    batch["v"] = batch.pop("state_value")
    PPOUpdate(loss, TrialAdvantage(value_key="v"), epochs=1)(batch)


def test_a_loss_in_which_everything_is_frozen():
    with pytest.raises(ValueError, match="no parameters to train"):
        PPOUpdate(make_loss().requires_grad_(False))


# --------------------------------------------------------------- rows that are no trials


def test_padding_is_refused():
    batch = make_batch()
    batch["collector", "mask"] = torch.ones(4, 6, dtype=torch.bool)
    PPOUpdate(make_loss(), epochs=1)(batch.clone())
    batch["collector", "mask"][1, 4:] = False
    with pytest.raises(ValueError, match="2 steps of the batch are padding.*split_trajs=False"):
        PPOUpdate(make_loss())(batch)


def test_workers_end_to_end_are_refused():
    # Two rows of three steps each behind one another: a trial begins at step 3, where none has ended.
    batch = make_batch()
    batch["is_init"][2, 3] = True
    with pytest.raises(ValueError, match=r"row \[2\]: .* step 2 .* step 3.*cat_results=-1"):
        PPOUpdate(make_loss())(batch)
    # Both in the middle of a trial: only their numbers tell them apart.
    batch = make_batch()
    batch["collector", "traj_ids"] = torch.arange(4).unsqueeze(-1).expand(4, 6).clone()
    PPOUpdate(make_loss(), epochs=1)(batch.clone())
    batch["collector", "traj_ids"][0, 3:] = 9
    with pytest.raises(ValueError, match=r"row \[0\]: .* step 2"):
        PPOUpdate(make_loss())(batch)


@pytest.mark.parametrize("of", [{"split_trajs": True}, {"cat_results": -1}])
def test_what_torchrl_makes_of_them_is_refused(of):
    """Trials of several lengths padded by TorchRL, and the batches of two workers as it puts them end to end."""
    batch = make_batch(rows=2, steps=6)
    batch["next", "done"][0, 2] = batch["next", "terminated"][0, 2] = batch["is_init"][0, 3] = True
    PPOUpdate(make_loss(), minibatches=1, epochs=1)(batch.clone())
    if "split_trajs" in of:
        batch["collector", "traj_ids"] = torch.tensor([[0, 0, 0, 1, 1, 1], [2] * 6])
        batch = split_trajectories(batch)
        assert ("collector", "mask") in batch.keys(True)
    else:
        cut = make_batch(rows=2, steps=3)
        cut["next", "done"][:] = cut["next", "terminated"][:] = False
        batch = torch.cat([cut, make_batch(rows=2, steps=3)], -1)
    with pytest.raises(ValueError, match="padding|trial"):
        PPOUpdate(make_loss(), TrialAdvantage(critic=None), minibatches=1)(batch)


# ------------------------------------------------------------------ what is read


def test_entries_that_losses_and_terms_read_are_kept():
    class Term(torch.nn.Module):
        in_keys = ("actor_features", "task", ("policy", "log_prob"))

        def forward(self, features, task, log_prob):
            return {"loss_term": features.mean() + task.mean() + log_prob.mean()}

    class Own(RL2PPOLoss):
        def forward(self, tensordict):
            return super().forward(tensordict).set("loss_own", 0.0 * tensordict["seen"].mean())

    networks = make_loss()
    update = PPOUpdate(RL2PPOLoss(networks.actor_network, networks.critic_network, terms=[Term()]))
    assert "task" in update.in_keys
    assert not {"actor_features", ("policy", "log_prob")} & set(update.in_keys)
    own = Own(networks.actor_network, networks.critic_network)
    own.in_keys = [*own.in_keys, "seen"]
    assert "seen" in PPOUpdate(own).in_keys
    metrics = PPOUpdate(own, epochs=1)(make_batch().set("seen", torch.ones(4, 6, 1)))
    assert metrics["loss_own"] == 0
    with pytest.raises(KeyError, match="seen"):
        PPOUpdate(own)(make_batch())


def test_a_loss_may_read_what_the_networks_wrote_while_collecting():
    class ToOld(RL2PPOLoss):
        def forward(self, tensordict):
            old = tensordict["logits"].log_softmax(-1)
            with set_recurrent_mode(True):
                new = self.actor_network.get_dist(tensordict.copy()).logits
            return super().forward(tensordict).set("loss_kl", (old.exp() * (old - new)).sum(-1).mean())

    networks = make_loss()
    losses = [cls(networks.actor_network, networks.critic_network) for cls in (ToOld, KLPENPPOLoss, ClipPPOLoss)]
    update = PPOUpdate(losses[0], epochs=1)
    with pytest.raises(KeyError, match="logits") as error:
        update(make_batch())
    assert "'action', 'action_log_prob'" in error.value.__notes__[-1]
    assert "loss.in_keys = [*loss.in_keys, ...]" in error.value.__notes__[-1]
    update.loss.in_keys = [*update.loss.in_keys, "logits"]
    assert update(make_batch())["loss_kl"] > 0
    assert ["logits" in PPOUpdate(loss).in_keys for loss in losses] == [
        True,
        True,
        False,
    ]  # KLPENPPOLoss names it itself
    PPOUpdate(losses[1], epochs=1)(make_batch())


@pytest.mark.parametrize("key", [("next", "reward"), ("next", "done"), ("next", "trans"), "actor_hidden"])
def test_terms_may_read_what_a_step_led_to_and_stored_memories(key):
    class Mean(torch.nn.Module):
        in_keys = ("actor_features", key)

        def forward(self, features, entry):
            return {"loss_mean": 0.0 * features.mean() + entry.double().mean()}

    networks = make_loss()
    update = PPOUpdate(
        RL2PPOLoss(networks.actor_network, networks.critic_network, terms=[Mean()]), epochs=1, minibatches=1
    )
    assert key in update.in_keys
    batch = make_batch()
    assert update(batch)["loss_mean"] == pytest.approx(float(batch[key].double().mean()))


def test_terms_may_read_a_task_of_several_entries():
    networks = make_loss()
    belief = TaskBelief(4, 2, target=lambda task: torch.cat((task["mass"], task["at"]["goal"]), -1))
    update = PPOUpdate(RL2PPOLoss(networks.actor_network, networks.critic_network, terms=[belief]), epochs=1)
    task = {"mass": torch.zeros(4, 6, 1), "at": {"goal": torch.ones(4, 6, 1)}}
    assert update(make_batch().set("task", TensorDict(task, [4, 6])))["loss_belief"] > 0
    with pytest.raises(KeyError, match="task"):
        update(make_batch())


def test_with_a_critic_for_cut_trials_its_inputs_beyond_are_kept():
    loss = make_loss()
    policy = ActorCritic(loss.actor_network, loss.critic_network)
    beyond = {("next", key) for key in ("trans", "actor_hidden", "critic_hidden")}
    assert beyond <= set(PPOUpdate(loss, TrialAdvantage(critic=policy)).in_keys)
    assert not beyond & set(PPOUpdate(loss).in_keys)


def test_the_batchs_last_step_is_bootstrapped_by_terminated_not_by_done():
    """r = 1, v = 2, gamma = 1: a truncated trial's last step earns 1 + v' - 2 with v' = 7, a terminated one's 1 - 2."""
    done = torch.ones(2, 1, 1, dtype=torch.bool)
    terminated = torch.tensor([[[False]], [[True]]])
    following = {
        "reward": torch.ones(2, 1, 1),
        "done": done,
        "terminated": terminated,
        "seen": torch.full((2, 1, 1), 7.0),
    }
    batch = TensorDict({"state_value": torch.full((2, 1, 1), 2.0), "next": following}, [2, 1])
    critic = TensorDictModule(torch.nn.Identity(), ["seen"], ["state_value"])
    out = TrialAdvantage(gamma=1.0, normalize=False, critic=critic)(batch)
    assert out["advantage"].flatten().tolist() == [6.0, -1.0]


# ---------------------------------------------------------------------- backends


def test_the_way_that_is_taken_is_said(way):
    update = PPOUpdate(make_loss(), epochs=1, minibatches=2)
    assert update.backend == (way if way in ("autograd", "graph") else "parts")
    update(make_batch())
    assert update.backend == (way if kernels.load(torch.float32) is not None else update.backend)
    assert update.reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda loss: loss.register_forward_hook(lambda *_: None), "hooks on the RL2PPOLoss"),
        (lambda loss: setattr(loss, "forward", loss.forward), "another function"),
    ],
)
def test_what_runs_beside_parts_is_named(change, message, way):
    loss = make_loss()
    change(loss)
    update = PPOUpdate(loss)
    assert update.backend == ("autograd" if way == "autograd" else "parts")
    assert message in update.reason or way == "autograd"
    with pytest.raises(
        ValueError, match=f"backend='graph' cannot serve.*{'not here' if way == 'autograd' else message}"
    ):
        PPOUpdate(loss, backend="graph")


def test_a_named_backend_that_cannot_serve_raises():
    loss = make_loss(reduction="sum")
    assert PPOUpdate(loss).backend == "autograd"
    with pytest.raises(ValueError, match=r"backend='parts' cannot serve.*(not here|\['reduction'\])"):
        PPOUpdate(loss, backend="parts")
    with pytest.raises(ValueError, match="choose 'auto'"):
        PPOUpdate(loss, backend="fast")


def test_options_beyond_ours_are_left_to_torchrl():
    for options in (
        {"clip_value": 0.2},
        {"reduction": "sum"},
        {"loss_critic_type": "smooth_l1"},
        {"functional": True},
    ):
        update = PPOUpdate(make_loss(**options), epochs=1)
        assert update.backend == "autograd"
        update(make_batch())


# ------------------------------------------------------------------------ state


def test_the_shufflings_generator_is_part_of_the_state():
    """Resumed, the third update takes the chunks in the order in which the unbroken run's third takes them."""
    orders = []
    for resumed in (False, True):
        update = PPOUpdate(make_loss(), bptt=1, epochs=1, lr=0.0, generator=torch.Generator().manual_seed(3))
        for _ in range(2):
            update(make_batch())
        if resumed:
            state = copy.deepcopy(update.state_dict())
            update = PPOUpdate(make_loss(), bptt=1, epochs=1, lr=0.0, generator=torch.Generator().manual_seed(99))
            update.load_state_dict(state)
        seen = Seen(update)
        update(make_batch())
        orders.append(torch.cat(seen.order()))
    assert torch.equal(*orders)


def test_going_on_with_another_optimizer_is_refused():
    loss = make_loss()
    update, other = PPOUpdate(loss), PPOUpdate(loss, optimizer=torch.optim.SGD(loss.parameters(), lr=0.1, momentum=0.9))
    with pytest.raises(ValueError, match="another optimizer than this SGD"):
        other.load_state_dict(update.state_dict())


def test_state_dict_round_trip_goes_on_alike():
    update = PPOUpdate(make_loss(), shuffle=False, lr=1e-2)
    update(make_batch())
    other = PPOUpdate(make_loss(), shuffle=False, lr=1e-2)
    other.load_state_dict(copy.deepcopy(update.state_dict()))
    assert same(parameters(update), parameters(other))
    # Adam's moments are part of the state: without them the next step would be another one.
    assert update(make_batch()) == other(make_batch())
    assert same(parameters(update), parameters(other))


def test_schedules_go_on_from_the_initial_rate_after_a_resume():
    update = PPOUpdate(make_loss(), lr=1e-3, lr_schedule=linear_decay)
    update(make_batch(), 0.5)
    other = PPOUpdate(make_loss(), lr=1e-3, lr_schedule=linear_decay)
    other.load_state_dict(update.state_dict())
    assert other(make_batch(), 0.75)["lr"] == pytest.approx(0.25e-3)


def test_what_a_schedule_moved_is_as_given_where_none_moves_it_any_more():
    entropy = {"entropy_bonus": True, "entropy_coeff": 0.25}
    schedules = {"lr_schedule": linear_decay, "entropy_schedule": linear_decay}
    update = PPOUpdate(make_loss(**entropy), lr=1e-3, **schedules)
    update(make_batch(), 0.75)
    for kept in schedules:
        other = PPOUpdate(make_loss(**entropy), lr=1e-3, **{kept: schedules[kept]})
        other.load_state_dict(copy.deepcopy(update.state_dict()))
        lr, coefficient = other.optimizer.param_groups[0]["lr"], other.loss.entropy_coeff.item()
        assert (lr, coefficient) == pytest.approx((0.25e-3, 0.25) if kept == "lr_schedule" else (1e-3, 0.0625))
    # What a user has moved stays where it is.
    update = PPOUpdate(make_loss(), lr=1e-3)
    update.optimizer.param_groups[0]["lr"] = 5e-4
    other = PPOUpdate(make_loss(), lr=1e-3)
    other.load_state_dict(update.state_dict())
    assert other.optimizer.param_groups[0]["lr"] == 5e-4


def test_one_update_trains_on_trials_of_one_length_and_then_of_another():
    update = PPOUpdate(make_loss(), minibatches=2)
    for steps in (6, 9, 6):
        assert math.isfinite(update(make_batch(steps=steps))["loss"])
        assert {entry.shape[:2] for entry in update._minibatches.chunks.values()} == {(4, steps)}


def test_the_advantage_is_computed_once_and_on_the_whole_batch():
    calls = []

    class Counted(TrialAdvantage):
        def forward(self, tensordict):
            calls.append(tensordict.shape)
            return super().forward(tensordict)

    PPOUpdate(make_loss(), Counted(), bptt=2, epochs=3)(make_batch())
    assert calls == [(4, 6)]


def test_what_is_set_of_an_advantage_later_counts():
    advantage = TrialAdvantage(scale_rewards=True, normalize=False)
    update = PPOUpdate(make_loss(), advantage)
    assert update.advantage is advantage
    update(make_batch())
    advantage.eval()
    advantage.gamma = 0.0
    before, batch = copy.deepcopy(advantage.state_dict()), make_batch()
    update(batch)
    torch.testing.assert_close(advantage.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(batch["value_target"], batch["next", "reward"] / advantage._returns.std.float())


def test_memory_lost_while_collecting_is_noticed():
    env = TransformedEnv(
        BernoulliBandit(3, batch_size=(8,), seed=0),
        Compose(Trial(episodes=6), TaskSampler(uniform_means(3), seed=1), PreviousStep(), InitTracker()),
    )
    torch.manual_seed(0)
    # As TorchRL's GRUModule, it starts from zeros where it is given no memory.
    core = partial(FastGRUModule, hidden_size=8, in_key="trans", out_key="features")
    actor = GRUCategoricalActor.from_env(env, core=core, init_range=2.0)
    critic = GRUValueHead.from_env(env, core=core)
    update = PPOUpdate(RL2PPOLoss(actor, critic))
    options = {"frames_per_batch": 48, "total_frames": 48}
    # Without primers the hidden state never reaches the next step; nothing in the batch says so.
    lost = next(iter(Collector(env, ActorCritic(actor, critic), **options))).select(*update.in_keys)
    with pytest.raises(ValueError, match="memory was lost.*auto_register_policy_transforms"):
        update(lost)
    primed = Collector(env, ActorCritic(actor, critic), auto_register_policy_transforms=True, **options)
    update(next(iter(primed)).select(*update.in_keys))


class FromThrees(TensorDictModuleBase):
    """A module with a memory, no core, which its primer alone says to begin with threes."""

    def __init__(self, size):
        super().__init__()
        self.cell, self.in_keys, self.out_keys = torch.nn.GRUCell(size, 4), ["trans", "h"], ["features", ("next", "h")]

    def make_tensordict_primer(self):
        return TensorDictPrimer({"h": Unbounded((4,))}, default_value=3.0, expand_specs=True)

    def forward(self, tensordict):
        x = tensordict["trans"]
        hidden = tensordict.get("h", x.new_zeros(*x.shape[:-1], 4))
        states = [hidden if x.ndim == 2 else hidden[:, 0]]
        for step in x.unsqueeze(1).unbind(1) if x.ndim == 2 else x.unbind(1):
            states.append(self.cell(step, states[-1]))
        out = states[-1] if x.ndim == 2 else torch.stack(states[1:], 1)
        return tensordict.set("features", out).set(("next", "h"), out)


def test_trials_of_a_module_that_is_no_core_begin_with_what_was_stored():
    env = TransformedEnv(
        BernoulliBandit(3, batch_size=(8,), seed=0),
        Compose(Trial(episodes=6), TaskSampler(uniform_means(3), seed=1), PreviousStep()),
    )
    torch.manual_seed(0)
    head = TensorDictModule(torch.nn.Linear(4, 3), ["features"], ["logits"])
    options = {"in_keys": ["logits"], "distribution_class": torch.distributions.Categorical, "return_log_prob": True}
    actor = ProbabilisticActor(TensorDictSequential(FromThrees(5), head), **options)
    critic = GRUValueHead.from_env(env, hidden_size=4)
    update = PPOUpdate(RL2PPOLoss(actor, critic), epochs=1, minibatches=1, lr=0.0)
    assert "h" in update.in_keys
    assert "critic_hidden" not in update.in_keys
    batch = TrialCollector(env, ActorCritic(actor, critic), frames_per_batch=48, keep=update.in_keys).rollout()
    assert batch["h"][:, 0].eq(3).all()
    assert update(batch)["max_ratio"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_many_dimensions_in_half_precision_is_no_lost_memory(dtype):
    torch.manual_seed(0)
    trial = Compose(Trial(episodes=10), TaskSampler(uniform_targets(40), seed=0), PreviousStep())
    env = TransformedEnv(QuadraticBandit(40, batch_size=(64,), seed=0), trial)
    actor = GRUGaussianActor.from_env(env, hidden_size=64, dtype=dtype)
    critic = GRUValueHead.from_env(env, hidden_size=16, dtype=dtype)
    with torch.no_grad():
        next(p for name, p in actor.named_parameters() if name.endswith("mean.layers.1.weight")).mul_(
            100
        )  # as if trained
    update = PPOUpdate(RL2PPOLoss(actor, critic), lr=0.0, epochs=1)
    batch = TrialCollector(env, ActorCritic(actor, critic), frames_per_batch=640, keep=update.in_keys).rollout()
    # 40 dimensions of 1.4 nats and more: steps of 0.25 between such numbers in bfloat16, of 0.03 in float16.
    assert update(batch)["max_ratio"] > 1 + 16 * torch.finfo(dtype).eps
    batch["action_log_prob"] -= 2  # ratios of e^2 and more are no rounding
    with pytest.raises(ValueError, match="memory was lost"):
        update(batch)


def test_an_update_may_be_pickled():
    update = PPOUpdate(make_loss(), minibatches=2)
    again = pickle.loads(pickle.dumps(update))
    assert (again.backend, again.reason) == (update.backend, update.reason)
