"""`PPOUpdate`: arguments, rows that are no trials, what is read of a batch, and the backends."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors.utils import split_trajectories
from torchrl.modules import ValueOperator, set_recurrent_mode
from torchrl.objectives import ClipPPOLoss, KLPENPPOLoss
from torchrl.objectives.value import GAE, TD0Estimator, TDLambdaEstimator
from update_cases import make_batch, make_loss, way

from rl2_torchrl import (
    ActorCritic,
    GRUValueHead,
    PPOUpdate,
    RL2PPOLoss,
    TaskBelief,
    TrialAdvantage,
    kernels,
    linear_decay,
)

__all__ = ["way"]  # as pytest sees it
pytestmark = pytest.mark.usefixtures("way")


# --------------------------------------------------------------- wrong arguments

NUMBERS = {
    "epochs": (0, -1, 2.0, True, "4", math.nan),
    "minibatches": (0, 1.5, False),
    "bptt": (0, 0.5),
    "max_grad_norm": (0.0, -1.0, math.nan),
    "target_kl": (0.0, math.nan),
    "lr": (-1e-3, math.nan),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NUMBERS.items() for value in values])
def test_numbers_out_of_range(name, value):
    with pytest.raises(ValueError, match="learning rate" if name == "lr" else name):
        PPOUpdate(make_loss(), **{name: value})


def test_numpys_integers_are_whole_numbers():
    update = PPOUpdate(make_loss(), bptt=np.int64(2), epochs=np.int32(1), minibatches=np.int64(3))
    assert (update.bptt, update.epochs, update.minibatches) == (2, 1, 3)
    assert update(make_batch())["epochs"] == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("advantage", "gae"),
        ("advantage", TrialAdvantage),
        ("lr_schedule", 0.5),
        ("lr_schedule", torch.optim.lr_scheduler.LinearLR),
        ("process_group", "gloo"),
        ("entropy_schedule", 0.5),
        ("generator", 3),
        ("optimizer", torch.optim.SGD),
        ("optimizer", torch.optim.LBFGS([torch.nn.Parameter(torch.zeros(1))])),
    ],
)
def test_arguments_of_another_kind_do_not_pass(name, value):
    with pytest.raises((TypeError, AttributeError, ValueError)):
        PPOUpdate(make_loss(entropy_bonus=True), **{name: value})(make_batch())


@pytest.mark.parametrize("estimator", [partial(GAE, lmbda=0.9), TD0Estimator, partial(TDLambdaEstimator, lmbda=0.9)])
def test_torchrls_estimators_see_rows_of_a_critic_with_a_memory_whole(estimator):
    loss = make_loss()
    with pytest.raises(
        ValueError, match=r"memory is \['critic_hidden'\].*\(..., shifted=True\), or take TrialAdvantage"
    ):
        PPOUpdate(loss, estimator(gamma=0.9, value_network=loss.critic_network))
    PPOUpdate(loss, estimator(gamma=0.9, value_network=loss.critic_network, shifted=True))
    PPOUpdate(loss, estimator(gamma=0.9, value_network=ValueOperator(nn.Linear(5, 1), ["trans"])))
    PPOUpdate(loss, estimator(gamma=0.9, value_network=None))


def test_a_loss_for_each_step_is_refused():
    networks = make_loss().actor_network, make_loss().critic_network
    with pytest.raises(RuntimeError, match="only for scalar outputs"):
        PPOUpdate(make_loss(reduction="none"))(make_batch())

    class Weighed(RL2PPOLoss):
        def _reduce_loss(self, value, *args, **kwargs):
            return value.mean()

    assert math.isfinite(PPOUpdate(Weighed(*networks, reduction="none"), epochs=1)(make_batch())["loss"])


def test_an_advantage_that_reads_what_is_not_kept_is_told_how():
    def baseline(batch):
        return TrialAdvantage()(batch.set(("next", "reward"), batch["next", "reward"] - batch["level"]))

    update, batch = PPOUpdate(make_loss(), baseline, bptt=6), make_batch().set("level", torch.zeros(4, 6, 1))
    with pytest.raises(KeyError, match="level") as told:
        update(batch.select(*update.in_keys))
    assert "what it reads its in_keys must name" in told.value.__notes__[0]
    baseline.in_keys = [*TrialAdvantage().in_keys, "level"]
    update(batch.select(*update.in_keys))


def test_a_loss_without_a_critic_asks_for_values_of_another():
    update = PPOUpdate(RL2PPOLoss(make_loss().actor_network), epochs=1)
    assert math.isfinite(update(make_batch())["loss"])  # of values of another critic
    with pytest.raises(KeyError, match="no 'state_value' in the data") as told:
        update(make_batch().exclude("state_value"))
    assert not getattr(told.value, "__notes__", [])


def test_an_advantage_that_returns_nothing_is_named():
    with pytest.raises(TypeError, match="returned None: it returns the batch"):
        PPOUpdate(make_loss(), lambda batch: None)(make_batch())


@pytest.mark.parametrize("name", ["lr_schedule", "entropy_schedule"])
@pytest.mark.parametrize("factor", [-0.5, math.nan, math.inf])
def test_factors_that_would_climb_the_loss_or_break_it_are_refused(name, factor):
    update = PPOUpdate(make_loss(entropy_bonus=True), **{name: lambda progress: factor if progress == 0.755 else 1.0})
    with pytest.raises(ValueError, match=f"{name} gave {factor} at progress 0.755"):
        update(make_batch(), 0.755)
    with pytest.raises(ValueError, match=f"{name} gave {factor} at progress 0:"):
        PPOUpdate(make_loss(entropy_bonus=True), **{name: lambda progress: factor})


@pytest.mark.parametrize(("name", "scheduled"), [("lr_schedule", "lr"), ("entropy_schedule", "entropy_coeff")])
def test_schedules_that_give_the_values_themselves_are_refused(name, scheduled):
    def update_by(schedule, initial=0.01):
        lr, entropy_coeff = {"lr": (initial, 0.01), "entropy_coeff": (1e-3, initial)}[scheduled]
        loss = make_loss(entropy_bonus=True, entropy_coeff=entropy_coeff)
        return PPOUpdate(loss, lr=lr, **{name: schedule})

    with pytest.raises(ValueError, match=rf"{name} is a factor on {scheduled}=0.01 .* never be above 0.0001.*=1.0\."):
        update_by(lambda progress: 0.01 * (1 - progress))
    loss = make_loss()
    with pytest.raises(ValueError, match=r"or for values the optimizer's lr=1.0\."):
        PPOUpdate(loss, optimizer=torch.optim.SGD(loss.parameters(), lr=1e-3), lr_schedule=lambda progress: 1e-3)
    update_by(lambda progress: 0.01 * (1 - progress), 1.0)
    # Factors that begin, go on or stay next to 0; NumPy's and PyTorch's.
    for schedule in (lambda p: min(1.0, 30 * p), lambda p: min(50 * p, 0.01 ** (10 * p)), lambda p: 0.0):
        update_by(schedule)
    for one in (np.array(1.0), np.float32(1), torch.tensor(1.0), True):
        update_by(lambda p, one=one: one)
    for none in (None, [1.0], np.ones(2)):
        with pytest.raises(TypeError):
            update_by(lambda p, none=none: none)


def test_a_schedule_of_several_weights_is_refused():
    loss = make_loss(entropy_bonus=True, entropy_coeff={"action": 0.1})
    with pytest.raises(ValueError, match="entropy_schedule moves one weight"):
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


def test_values_go_by_one_name():
    loss = RL2PPOLoss(make_loss().actor_network, GRUValueHead(5, hidden_size=4, value_key="v"))
    batch = make_batch()
    batch["v"] = batch.pop("state_value")
    with pytest.raises(KeyError, match="state_value"):
        PPOUpdate(loss, TrialAdvantage(value_key="v"), epochs=1)(batch.clone())
    loss.set_keys(value="v")
    with pytest.raises((KeyError, ValueError)):
        PPOUpdate(loss)(batch.clone())
    PPOUpdate(loss, TrialAdvantage(value_key="v"), epochs=1)(batch)


def test_advantages_go_by_one_name():
    loss = make_loss()
    loss.set_keys(advantage="a", value_target="r")
    with pytest.raises(KeyError, match=r"the batch lacks \['a', 'r'\].*Advantages come from advantage="):
        PPOUpdate(loss)(make_batch())

    def renamed(batch):
        batch = TrialAdvantage()(batch)
        return batch.set("a", batch.pop("advantage")).set("r", batch.pop("value_target"))

    PPOUpdate(loss, renamed, epochs=1)(make_batch())
    with pytest.raises(KeyError, match=r"the batch lacks \['a', 'r'\].*Advantages come from advantage="):
        PPOUpdate(loss, lambda batch: batch, epochs=1)(make_batch())


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
    if "split_trajs" in of:  # and in a plain loop
        with pytest.raises(ValueError, match="padding"):
            TrialAdvantage(critic=None)(batch)
        with pytest.raises(ValueError, match="padding"):
            make_loss()(batch.set("advantage", batch["state_value"]).set("value_target", batch["state_value"]))


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


@pytest.mark.parametrize("key", [("next", "reward"), ("next", "done"), "actor_hidden"])
def test_a_loss_may_read_what_its_class_has_for_its_value_estimator(key):
    """`ClipPPOLoss` names it already, so that nobody would read it."""

    class Own(RL2PPOLoss):
        def forward(self, tensordict):
            return super().forward(tensordict).set("seen", tensordict[key].float().mean())

    networks, batch = make_loss(), make_batch()
    own = Own(networks.actor_network, networks.critic_network)
    assert key in own.in_keys
    with pytest.raises(KeyError):
        PPOUpdate(own, epochs=1)(batch.clone())
    own.in_keys = [*own.in_keys, key]
    assert PPOUpdate(own, epochs=1)(batch)["seen"] == pytest.approx(batch[key].float().mean().item(), abs=1e-6)


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
