"""Loss terms: PPO's own by hand, what a user adds, and how both reach loss, gradients, parameters and log."""

import copy
import math

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.modules import set_recurrent_mode
from torchrl.objectives import ClipPPOLoss

from rl2_torchrl import (
    GRUCategoricalActor,
    GRUGaussianActor,
    GRUValueHead,
    MemoryValueHead,
    PPOUpdate,
    RL2PPOLoss,
    TaskBelief,
    TrialAdvantage,
    kernels,
)
from rl2_torchrl.gradients import Program
from rl2_torchrl.objectives.terms import ClippedObjective, EntropyBonus, SquaredError
from rl2_torchrl.settings import settings_of

F64 = {"dtype": torch.float64}


class Told(nn.Module):
    """What somebody writes: a layer that tells an entry from the features, and how far the policy is from certain."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 2, **F64)
        self.in_keys = ["actor_features", "task", ("policy", "log_prob"), ("policy", "entropy"), "state_value"]

    def forward(self, features, task, log_prob, entropy, value):
        error = (self.layer(features) - task).square().mean()
        return {
            "loss_told": 0.5 * error + 0.1 * (log_prob * entropy).mean() + value.mean(),
            "told_error": error.detach(),
            "each": entropy.detach(),
        }


def loss_with(*terms, critic="shared", **options):
    torch.manual_seed(0)
    actor = GRUCategoricalActor(5, 3, hidden_size=8, init_range=1.0, **F64)
    head = MemoryValueHead(8, detach=False, init_range=1.0, **F64) if critic == "shared" else GRUValueHead(5, **F64)
    return RL2PPOLoss(actor, head, terms=terms, **options)


def data_of(rows=4, steps=6):
    draw = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(rows, steps, *shape, generator=draw, **F64)

    is_init = torch.zeros(rows, steps, 1, dtype=torch.bool)
    is_init[:, 0] = True
    entries = {
        "trans": normal(5),
        "is_init": is_init,
        "task": normal(2),
        "advantage": normal(1),
        "value_target": normal(1),
    }
    entries |= {"action": torch.randint(3, (rows, steps), generator=draw), "action_log_prob": 0.1 * normal() - 1}
    return TensorDict(entries, [rows, steps])


def total(losses):
    return sum(value for name, value in losses.items() if name.startswith("loss_"))


# ------------------------------------------------------------------ PPO's own


@torch.no_grad()  # as the kernels are called
def differentiated(term, *entries):
    """Gradients of a term's loss by its entries as it gives them, and by finite differences."""
    values, slopes = term.with_gradients(*entries)
    name = next(name for name in values if name.startswith("loss_"))
    for number, (entry, slope) in enumerate(zip(entries, slopes, strict=True)):
        if slope is None:
            continue
        expected = torch.empty_like(entry)
        for i in range(entry.numel()):
            ends = []
            for step in (1e-6, -1e-6):
                moved = entry.clone()
                moved.view(-1)[i] += step
                shifted = [*entries[:number], moved, *entries[number + 1 :]]
                ends.append(float(term.with_gradients(*shifted)[0][name]))
            expected.view(-1)[i] = (ends[0] - ends[1]) / 2e-6
        torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("by_kernels", [True, False])
def test_gradients_of_ppos_terms_are_those_of_their_numbers(by_kernels, monkeypatch):
    if not by_kernels:
        monkeypatch.setattr("rl2_torchrl.kernels.load", lambda dtype: None)
    torch.manual_seed(0)
    log_prob, old = 0.5 * torch.randn(2, 3, 4, **F64)
    advantage, value, target = torch.randn(3, 3, 4, 1, **F64)
    differentiated(ClippedObjective(math.log(0.8), math.log(1.2)), log_prob, old, advantage)
    differentiated(SquaredError(0.7), value, target)
    differentiated(EntropyBonus(0.3), log_prob)


def test_a_term_under_autograd_hands_on_the_gradient_that_it_gives():
    value, target = torch.randn(2, 3, 4, 1, **F64)
    value.requires_grad_()
    losses = SquaredError(0.5)(value, target)
    [gradient] = torch.autograd.grad(3 * losses["loss_critic"], value)
    torch.testing.assert_close(gradient, 3 * (value - target).detach() / 12)


@pytest.mark.parametrize("kind", [GRUCategoricalActor, GRUGaussianActor])
def test_gradients_of_a_losss_gradients_are_torchrls(kind, monkeypatch):
    torch.manual_seed(0)
    actor = kind(5, 3, hidden_size=8, init_range=1.0, **F64)
    loss, data = RL2PPOLoss(actor, GRUValueHead(5, init_range=1.0, **F64), entropy_bonus=True), data_of()
    if kind is GRUGaussianActor:
        data["action"] = data["trans"][..., :3]
    found = []
    for forward in (RL2PPOLoss.forward, ClipPPOLoss.forward):  # the second without kernels
        first = torch.autograd.grad(total(forward(loss, data)), list(loss.parameters()), create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), list(loss.parameters())))
        monkeypatch.setattr(kernels, "load", lambda dtype: None)
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------- a user's own


def test_a_users_term_is_right_everywhere():
    loss, data = loss_with(Told(), entropy_bonus=True, entropy_coeff=0.1), data_of()
    out = loss(data)
    # By hand, through TorchRL's loss and the networks themselves.
    base = ClipPPOLoss.forward(loss, data)
    with set_recurrent_mode(True):
        dist = loss.actor_network.get_dist(td := data.clone())
        value = loss.critic_network(td)["state_value"]
    entries = (td["actor_features"], data["task"], dist.log_prob(data["action"]), dist.entropy(), value)
    theirs = loss.terms[0](*entries)
    expected = total(base) + theirs["loss_told"]
    torch.testing.assert_close(total(out), expected)
    gradients = torch.autograd.grad(expected, list(loss.parameters()))
    assert len(gradients) == len(list(loss.actor_network.parameters())) + 2 + 2  # critic's layer and the term's
    for one, other in zip(torch.autograd.grad(total(out), list(loss.parameters())), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    losses = Program(loss)(dict(data.items()))
    assert losses["told_error"] == pytest.approx(float(theirs["told_error"]))
    assert "each" not in losses  # no scalar
    for parameter, gradient in zip(loss.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"clip_value": 0.2}, {"functional": True}])
def test_terms_beside_options_that_are_torchrls(options):
    data = data_of().set("state_value", torch.zeros(4, 6, 1, **F64))
    if "functional" in options:
        with pytest.raises(ValueError, match="functional"):
            loss_with(Told(), **options)
        return
    with_term, without = loss_with(Told(), **options)(data), loss_with(**options)(data)
    term = loss_with(Told())(data)
    assert set(with_term.keys()) == {*without.keys(), "loss_told", "told_error", "each"}
    torch.testing.assert_close(total(with_term), total(without) + term["loss_told"])


def test_a_terms_parameters_are_trained_saved_and_in_the_log():
    loss = loss_with(Told(), critic="shared")
    update = PPOUpdate(loss, lr=1e-2, epochs=1, minibatches=2)
    assert "task" in update.in_keys
    batch = data_of().set("state_value", torch.zeros(4, 6, 1, **F64))
    done = torch.zeros(4, 6, 1, dtype=torch.bool)
    done[:, -1] = True
    batch["next"] = TensorDict({"reward": torch.ones(4, 6, 1, **F64), "done": done, "terminated": done}, [4, 6])
    del batch["advantage"], batch["value_target"]
    with torch.no_grad(), set_recurrent_mode(True):
        batch["action_log_prob"] = loss.actor_network.get_dist(batch.clone()).log_prob(batch["action"])
    before = loss.terms[0].layer.weight.detach().clone()
    saved = copy.deepcopy(loss.state_dict())
    metrics = update(batch)
    assert update.backend == "parts"
    assert {"loss_told", "told_error"} <= metrics.keys()
    assert metrics["loss"] == pytest.approx(sum(v for name, v in metrics.items() if name.startswith("loss_")))
    assert (loss.terms[0].layer.weight - before).abs().min() > 1e-3
    loss.load_state_dict(saved)
    assert torch.equal(loss.terms[0].layer.weight, before)


class WeightDecay(nn.Module):
    """Reaches the actor's parameters without being their owner, and after a while the critic's, too."""

    in_keys = []

    def __init__(self, loss):
        super().__init__()
        self.networks, self.calls = [list(loss.actor_network.parameters()), list(loss.critic_network.parameters())], 0

    def forward(self):
        self.calls += 1
        reached = [p for network in self.networks[: self.calls] for p in network]
        return {"loss_decay": 0.1 * sum(p.square().sum() for p in reached)}


def test_parameters_that_a_term_reaches_but_does_not_own_are_trained_by_it():
    loss = loss_with()
    loss.terms.append(decay := WeightDecay(loss))
    program, named = Program(loss), dict(loss.named_parameters())
    for calls in range(2):
        decay.calls = calls
        expected = torch.autograd.grad(total(loss(data_of())), named.values())
        decay.calls = calls
        program(data_of())
        for (name, parameter), gradient in zip(named.items(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, msg=name)


def test_a_term_that_only_tells_something_needs_no_entry():
    class Answer(nn.Module):
        in_keys = []

        def forward(self):
            return {"answer": 42}

    assert Program(loss_with(Answer()))(data_of())["answer"] == 42


def test_a_term_reads_the_critics_values_even_without_a_value_loss():
    loss, data = loss_with(Told(), critic_coeff=0.0), data_of()
    assert "loss_critic" not in loss(data).keys()
    Program(loss)(dict(data.items()))
    head = next(m for m in loss.critic_network.modules() if isinstance(m, nn.Linear))
    torch.testing.assert_close(head.bias.grad, torch.ones(1, **F64))  # of the mean value by its bias


def test_a_part_that_no_loss_depends_on_in_this_minibatch_has_no_gradient_left_of_the_last():
    class Sometimes(nn.Module):
        in_keys = ("state_value", "task")

        def forward(self, value, task):
            return {"loss_sometimes": value.mean() if bool(task.any()) else task.sum()}

    loss, data = loss_with(Sometimes(), critic="separate", critic_coeff=0.0), dict(data_of().items())
    program = Program(loss)
    for task, counts in ((data["task"], True), (torch.zeros_like(data["task"]), False), (data["task"], True)):
        program({**data, "task": task})
        assert all(parameter.grad is not None for parameter in loss.critic_network.parameters()) == counts
        assert any(parameter.grad is not None for parameter in loss.critic_network.parameters()) == counts


def test_an_entry_of_both_networks_is_no_terms():
    actor = GRUCategoricalActor(5, 3, hidden_size=8, features_key="features")
    critic = GRUValueHead(5, hidden_size=8, features_key="features")
    with pytest.raises(ValueError, match=r"TaskBelief reads \['features'\], which actor and critic both write"):
        RL2PPOLoss(actor, critic, terms=[TaskBelief(8, 2, features_key="features")])
    RL2PPOLoss(actor, critic)
    shared = TensorDictModule(nn.Linear(5, 8), ["trans"], ["actor_features"])  # one module: both write the same
    actor = GRUCategoricalActor(8, 3, in_key="actor_features", features_key="remembered")
    actor.module[0].module.insert(0, shared)
    critic = TensorDictSequential(shared, MemoryValueHead(8, detach=True))
    RL2PPOLoss(actor, critic, terms=[TaskBelief(8, 2)])


def test_what_is_no_term():
    for term in (lambda features: {}, nn.Linear(2, 2), "entropy", Told):
        with pytest.raises((TypeError, AttributeError)):
            loss_with(term)


class Says(nn.Module):
    """Gives numbers of all kinds."""

    in_keys = ("logits",)

    def __init__(self, **values):
        super().__init__()
        self.values = values

    def forward(self, logits):
        return {"loss_none": 0.0, **{name: value(logits) for name, value in self.values.items()}}


@pytest.mark.parametrize("backend", ["parts", "autograd"])
def test_counts_flags_and_pythons_numbers_are_numbers_too(backend):
    term = Says(count=lambda x: (x == x).sum(), flag=lambda x: (x == x).any(), number=lambda x: 3)
    batch = data_of().set("state_value", torch.zeros(4, 6, 1, **F64))
    ended = batch["is_init"].roll(-1, 1)
    batch["next"] = TensorDict({"reward": torch.ones(4, 6, 1, **F64), "done": ended, "terminated": ended}, [4, 6])
    batch["actor_hidden"] = torch.zeros(4, 6, 1, 8, **F64)
    metrics = PPOUpdate(loss_with(term), epochs=1, minibatches=2, backend=backend)(batch)
    assert [metrics[name] for name in ("count", "flag", "number", "loss_none")] == [2 * 6 * 3, 1, 3, 0]


def test_names_that_are_taken_and_what_is_no_number():
    for run in (lambda loss: loss(data_of()), lambda loss: Program(loss)(dict(data_of().items()))):
        for name in ("loss", "grad_norm", "lr", "epochs"):
            with pytest.raises(ValueError, match=f"gives '{name}', as the update itself does"):
                run(loss_with(Says(**{name: lambda x: x.mean()})))
        with pytest.raises(TypeError, match="Says gave 'nothing': None, which is no number"):
            run(loss_with(Says(nothing=lambda x: None)))


def test_settings_of_several_terms_of_one_class_are_told_apart():
    def settings(*coefficients):
        beliefs = [TaskBelief(8, 2, coefficient=coefficient) for coefficient in coefficients]
        loss = RL2PPOLoss(GRUCategoricalActor(5, 3, hidden_size=8), terms=beliefs)
        update = PPOUpdate(loss, TrialAdvantage())
        return settings_of(None, update)

    names = ["loss.TaskBelief.coefficient", "loss.TaskBelief2.coefficient"]
    assert [settings(1.0, 2.0)[name] for name in names] == [1.0, 2.0]


def test_terms_that_come_one_by_one():
    loss = RL2PPOLoss(GRUCategoricalActor(5, 3, hidden_size=8, **F64), terms=(term for term in [Told()]))
    assert [type(term) for term in loss.terms] == [Told]


def test_two_terms_of_one_name_and_one_that_reads_what_is_not_there():
    with pytest.raises(ValueError, match="two loss terms give 'loss_told'"):
        Program(loss_with(Told(), Told()))(dict(data_of().items()))
    with pytest.raises(ValueError, match="two loss terms give 'loss_told'"):
        loss_with(Told(), Told())(data_of())
    for run in (lambda loss, data: loss(data), lambda loss, data: Program(loss)(dict(data.items()))):
        with pytest.raises(KeyError, match="task"):
            run(loss_with(Told()), data_of().exclude("task"))


@pytest.mark.parametrize("key", ["logits", "actor_features"])
def test_a_gradient_that_a_hook_of_a_terms_keeps_stays_as_it_was(key):
    class Watched(nn.Module):
        in_keys = [key]

        def forward(self, entry):
            entry.register_hook(kept.append)
            return {"loss_watched": entry.square().sum()}

    kept, data = [], dict(data_of().items())
    Program(loss_with(Watched()))(data)
    [shown], before = kept, kept[0].clone()
    Program(loss_with(Watched()))(data)
    assert torch.equal(shown, kept[1])
    assert torch.equal(shown, before)


class _Weighed(RL2PPOLoss):
    """A loss that adds a term, and has PPO's own in another order."""

    def __init__(self, *networks, **options):
        super().__init__(*networks, **options)
        self.set_keys(value_target="value_target")  # before there is what loss_terms needs
        self.told = Told()

    def loss_terms(self):
        objective, *others = super().loss_terms()
        return [*others, objective, self.told]


def _weighed(**options):
    torch.manual_seed(0)
    actor = GRUCategoricalActor(5, 3, hidden_size=8, init_range=1.0, **F64)
    return _Weighed(actor, MemoryValueHead(8, detach=False, init_range=1.0, **F64), **options)


def test_terms_of_a_class_below_are_those_of_every_batch():
    loss, given, data = _weighed(), loss_with(Told()), data_of()
    loss.told.load_state_dict(given.terms[0].state_dict())
    expected = given(data)
    assert set(loss(data).keys()) == set(expected.keys())
    assert "task" in loss.in_keys
    assert "task" in PPOUpdate(loss).in_keys
    for rows in (data, data.reshape(2, 2, 6)):
        for name, value in loss(rows).items():
            torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("options", [{"clip_value": 0.2}, {"loss_critic_type": "smooth_l1"}])
def test_terms_of_a_class_below_that_nobody_would_call_are_refused(options):
    loss = _weighed(**options)
    with pytest.raises(ValueError, match=r"_Weighed has a loss_terms\(\) of its own.*as terms="):
        loss(data_of())
    with pytest.raises(ValueError, match=r"loss_terms\(\) of its own"):
        PPOUpdate(loss)


def test_terms_of_a_class_below_read_advantages_that_are_there():
    with pytest.raises(KeyError, match="advantage"):
        _weighed()(data_of().exclude("advantage"))


def test_by_keyword_a_loss_gives_what_its_terms_name():
    loss, data = loss_with(TaskBelief(8, 2, **F64)), data_of()
    expected, out = loss(data), loss(**{key: data[key] for key in data.keys()})
    named = dict(zip(loss.out_keys, out, strict=True))
    for name in ("loss_objective", "loss_critic", "loss_belief", "belief_error"):
        assert torch.equal(named[name], expected[name])
    plain, told = Told(), Told()
    plain.out_keys, told.out_keys = None, "loss_told"
    assert loss_with(plain).out_keys == loss_with().out_keys
    with pytest.raises(TypeError, match="read as its letters"):
        loss_with(told)


def test_no_coefficient_of_the_values_is_the_default():
    assert float(loss_with(critic_coeff=None).critic_coeff) == float(loss_with().critic_coeff) == 0.5
