"""`PPOUpdate`: how batches are cut and passed over, schedules, early stop, clipping, broken numbers, metrics, state."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch.nn.utils import prune
from torchrl.collectors import Collector
from torchrl.data import Unbounded
from torchrl.envs import Compose, InitTracker, TensorDictPrimer, TransformedEnv
from torchrl.modules import ProbabilisticActor
from update_cases import Seen, make_batch, make_loss, parameters, same, way

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
    TaskSampler,
    Trial,
    TrialAdvantage,
    TrialCollector,
    linear_decay,
)
from rl2_torchrl.envs import BernoulliBandit, QuadraticBandit, uniform_means, uniform_targets

__all__ = ["way"]  # as pytest sees it
pytestmark = pytest.mark.usefixtures("way")


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
    read = {"trans", "is_init", "action", "action_log_prob", "advantage"} | more
    read |= {"value_target"} if critic else set()
    for bptt, keys in ((2, read | memory), (None, read)):
        loss = RL2PPOLoss(GRUCategoricalActor(5, 3, hidden_size=4), critic, **kwargs)
        update = PPOUpdate(loss, TrialAdvantage(), bptt=bptt)
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


def test_a_loss_without_a_critic_needs_neither_values_nor_returns():
    def reinforce(batch):
        return batch.set("advantage", batch["next", "reward"].flip(1).cumsum(1).flip(1))

    update = PPOUpdate(RL2PPOLoss(GRUCategoricalActor(5, 3, hidden_size=4)), reinforce, bptt=3, epochs=1)
    assert not {"state_value", "value_target"} & {*update.in_keys, *update.loss.in_keys}
    assert math.isfinite(update(make_batch().select(*update.in_keys))["loss_objective"])


def test_a_loss_without_a_critic_is_handed_the_values_and_returns_that_it_names():
    class Fitted(RL2PPOLoss):
        def forward(self, data):
            return super().forward(data).set("loss_fit", (data["state_value"] - data["value_target"]).square().mean())

    loss = Fitted(GRUCategoricalActor(5, 3, hidden_size=4))
    with pytest.raises(KeyError, match="state_value"):
        PPOUpdate(loss, epochs=1)(make_batch())
    loss.in_keys = [*loss.in_keys, "state_value", "value_target"]
    update = PPOUpdate(loss, epochs=1)
    assert math.isfinite(update(make_batch())["loss_fit"])


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
    with pytest.raises(KeyError, match="kl_approx"):
        PPOUpdate(loss, target_kl=1e-9)(make_batch())
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
    update = PPOUpdate(RL2PPOLoss(GRUCategoricalActor(5, 3, hidden_size=4)), TrialAdvantage())
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


@pytest.mark.parametrize("by_term", [True, False])
def test_a_loss_that_is_infinite_is_refused_though_its_gradient_is_finite(by_term):
    class Infinite(torch.nn.Module):
        in_keys = ("trans",)

        def forward(self, trans):
            return {"loss_own": trans.sum() * 0 + math.inf}

    update = PPOUpdate(make_loss(terms=[Infinite()] if by_term else []), epochs=1)
    if not by_term:
        forward = update.loss.forward
        update.loss.forward = lambda minibatch: forward(minibatch).set("loss_own", torch.tensor(math.inf))
    with pytest.raises(FloatingPointError, match=r"the loss is not finite in .*'loss_own': inf.* were changed by it"):
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


def test_a_learning_rate_that_is_a_tensor_goes_on_as_a_schedule_has_left_it():
    def made():
        loss = make_loss()
        optimizer = torch.optim.Adam(loss.parameters(), lr=torch.tensor(0.5))
        update = PPOUpdate(loss, optimizer=optimizer)
        return update, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)  # moves it in place

    (update, schedule), (other, _) = made(), made()
    update(make_batch())
    schedule.step()
    other.load_state_dict(copy.deepcopy(update.state_dict()))
    assert other.optimizer.param_groups[0]["lr"].item() == 0.25


@pytest.mark.parametrize("others", [False, True])
def test_parameters_that_were_unfrozen_in_the_training_stay_so(others):
    def made(*frozen):
        loss = make_loss()
        for name, parameter in loss.named_parameters():
            parameter.requires_grad_(not any(each in name for each in frozen))
        return PPOUpdate(loss, optimizer=torch.optim.Adam(loss.parameters()))

    update, other = made("gru"), made("gru", "bias") if others else made("gru")
    for parameter in update.loss.parameters():
        parameter.requires_grad_()
    other.load_state_dict(copy.deepcopy(update.state_dict()))
    frozen = [name for name, parameter in other.loss.named_parameters() if not parameter.requires_grad]
    assert any("bias" in name for name in frozen) is others  # as this one was given them
    assert bool(frozen) is others


def test_an_update_that_takes_anothers_state_is_not_tied_to_it():
    update, other = PPOUpdate(make_loss()), PPOUpdate(make_loss())
    update(make_batch())
    other.load_state_dict(update.state_dict())
    before = copy.deepcopy(update.state_dict()["optimizer"]["state"])
    other(make_batch())
    torch.testing.assert_close(update.state_dict()["optimizer"]["state"], before, rtol=0, atol=0)


@pytest.mark.parametrize("replace", ["assign", "parameter"])
def test_parameters_that_are_replaced_are_refused(replace):
    update = PPOUpdate(make_loss())
    update(make_batch())
    if replace == "assign":
        update.loss.load_state_dict(make_loss().state_dict(), assign=True)
    else:
        module = next(
            module
            for module in update.loss.modules()
            if isinstance(getattr(module, "weight", None), torch.nn.Parameter)
        )
        module.weight = torch.nn.Parameter(module.weight.detach().clone())
    with pytest.raises(RuntimeError, match="optimizer holds the old ones"):
        update(make_batch())


def test_parameters_that_are_hung_up_anew_go_on():
    update = PPOUpdate(make_loss())
    update(make_batch())
    head = next(module for module in update.loss.actor_network.modules() if isinstance(module, torch.nn.Linear))
    prune.l1_unstructured(head, "weight", 0.3)
    before = head.weight_orig.clone()
    update(make_batch())
    assert not torch.equal(before, head.weight_orig)


def test_networks_may_grow():
    loss = make_loss()
    update = PPOUpdate(loss, optimizer=torch.optim.Adam(loss.parameters()))
    update(make_batch())
    loss.actor_network.register_parameter("more", torch.nn.Parameter(torch.zeros(2)))
    update.optimizer.add_param_group({"params": [loss.actor_network.more]})
    update(make_batch())


def test_groups_and_optimizers_that_come_later_are_scheduled_by_their_own_rates():
    loss = make_loss()
    of_critic, of_actor = loss.critic_network.parameters(), list(loss.actor_network.parameters())
    optimizer = torch.optim.SGD(of_critic, lr=0.1)
    update = PPOUpdate(loss, optimizer=optimizer, lr_schedule=linear_decay)
    update(make_batch(), progress=0.5)
    optimizer.add_param_group({"params": of_actor, "lr": 0.4})
    update(make_batch(), progress=0.75)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.025, 0.1])
    update.optimizer = torch.optim.SGD(loss.parameters(), lr=0.8)
    update(make_batch(), progress=0.75)
    assert update.optimizer.param_groups[0]["lr"] == pytest.approx(0.2)


def test_a_compiled_update_is_the_update():
    first, second = PPOUpdate(make_loss(), shuffle=False), PPOUpdate(make_loss(), shuffle=False)
    assert torch.compile(first)(make_batch()) == second(make_batch())


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


def test_rounding_of_many_dimensions_in_half_precision_is_no_lost_memory():
    dtype = torch.bfloat16
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
    # 40 dimensions of 1.4 nats and more: steps of 0.25 between such numbers in bfloat16.
    assert update(batch)["max_ratio"] > 1 + 16 * torch.finfo(dtype).eps
    batch["action_log_prob"] -= 2  # ratios of e^2 and more are no rounding
    with pytest.raises(ValueError, match="memory was lost"):
        update(batch)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda update: pickle.loads(pickle.dumps(update))])
@pytest.mark.parametrize("batches_before", [0, 1])
def test_a_copy_of_an_update_goes_on_as_the_update_does(copied, batches_before):
    update = PPOUpdate(make_loss(), minibatches=2, generator=torch.Generator().manual_seed(0))
    for _ in range(batches_before):
        update(make_batch())
    again = copied(update)
    assert (again.backend, again.reason) == (update.backend, update.reason)
    assert again(make_batch()) == pytest.approx(update(make_batch()), rel=1e-5)
    torch.testing.assert_close(parameters(again), parameters(update))
    assert not {id(p) for p in again.loss.parameters()} & {id(p) for p in update.loss.parameters()}
