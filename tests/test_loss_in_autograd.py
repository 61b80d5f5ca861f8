"""A loss behaves within autograd, and whatever is done with it, as TorchRL's own does."""

import copy

import pytest
import torch
from loss_cases import batch_of, data_of, loss_of, needs_kernels
from tensordict import TensorDict
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.modules import ProbabilisticActor, TanhNormal
from torchrl.objectives import ClipPPOLoss

from rl2_torchrl import PPOUpdate, RL2PPOLoss

pytestmark = needs_kernels

F64 = torch.float64


def losses_of(kind="categorical", critic="shared", data=None, **options):
    """A loss, its data, and a copy of it that computes as `ClipPPOLoss` does."""
    loss = loss_of(kind, critic, F64, entropy_bonus=True, entropy_coeff=0.05, **options)
    theirs = copy.deepcopy(loss)
    theirs.forward = lambda td: ClipPPOLoss.forward(theirs, td)
    data = data_of(kind, F64) if data is None else data
    return loss, theirs, TensorDict(data, next(iter(data.values())).shape[:2])


def grads(loss):
    return [p.grad for p in loss.parameters()]


def assert_alike(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        if one is None or other is None:  # nothing, or zeros
            assert one is None or not one.any()
            assert other is None or not other.any()
        else:
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


KINDS = [("categorical", "shared"), ("categorical", "separate"), ("gaussian", "detached"), ("gaussian", "separate")]


@pytest.mark.parametrize(("kind", "critic"), KINDS)
def test_losses_may_be_weighted(kind, critic):
    loss, theirs, data = losses_of(kind, critic)
    for each in (loss, theirs):
        out = each(data)
        (2 * out["loss_objective"] - 0.3 * out["loss_critic"] + 0 * out["loss_entropy"]).backward()
    assert_alike(grads(loss), grads(theirs))


@pytest.mark.parametrize(("kind", "critic"), [kind for kind in KINDS if kind[1] != "shared"])
def test_networks_may_have_an_optimizer_each(kind, critic):
    """The critic's loss goes back when the actor's has, and has been learnt from: they share nothing that needs a gradient."""
    ends = []
    for each in losses_of(kind, critic)[:2]:
        data = losses_of(kind, critic)[2]
        out = each(data)
        for name, network in (("loss_objective", each.actor_network), ("loss_critic", each.critic_network)):
            out[name].backward()
            torch.optim.SGD(network.parameters(), lr=0.1).step()
        ends.append([p.detach() for p in each.parameters()])
    assert_alike(*ends)


def test_graphs_may_be_saved_elsewhere():
    """Hooks on what autograd saves give other tensors of the same numbers back."""
    loss, theirs, data = losses_of()
    for each in (loss, theirs):
        with torch.autograd.graph.save_on_cpu():
            out = each(data)
        (out["loss_objective"] + out["loss_critic"]).backward()
    assert_alike(grads(loss), grads(theirs))


@pytest.mark.parametrize("is_reversed", [False, True])
@pytest.mark.parametrize(("kind", "critic"), KINDS)
def test_losses_may_go_back_one_by_one(kind, critic, is_reversed):
    """As with an optimizer for each network; what no loss depends on that has gone back keeps its None."""
    loss, theirs, data = losses_of(kind, critic)
    for each in (loss, theirs):
        out = each(data)
        names = ["loss_objective", "loss_entropy", "loss_critic"]
        for name in reversed(names) if is_reversed else names:
            out[name].backward(retain_graph=True)
    assert_alike(grads(loss), grads(theirs))


def test_what_a_loss_does_not_depend_on_has_no_gradient():
    loss, _, data = losses_of(critic="separate")
    loss(data)["loss_critic"].backward()
    assert all(p.grad is None for p in loss.actor_network.parameters())
    assert all(p.grad is not None for p in loss.critic_network.parameters())


@pytest.mark.parametrize(("kind", "critic"), KINDS)
def test_several_losses_may_wait_for_their_backward(kind, critic):
    """Gradients of several minibatches, summed: a node keeps what it has seen, whatever was looked at since."""
    loss, theirs, data = losses_of(kind, critic)
    for each in (loss, theirs):
        first, second = (each(data[rows]) for rows in (slice(0, 4), slice(4, 9)))
        with torch.no_grad():
            each(data)
        (
            first["loss_objective"] + second["loss_objective"] + 2 * first["loss_critic"] - second["loss_critic"]
        ).backward()
    assert_alike(grads(loss), grads(theirs))


@pytest.mark.parametrize(("kind", "critic"), KINDS)
def test_gradients_of_gradients(kind, critic):
    loss, theirs, data = losses_of(kind, critic)
    for each in (loss, theirs):
        out = each(data)
        total, parameters = out["loss_objective"] + out["loss_critic"] ** 2, list(each.parameters())
        first = torch.autograd.grad(total, parameters, create_graph=True, allow_unused=True)
        (total + sum(g.square().sum() for g in first if g is not None)).backward()
    assert_alike(grads(loss), grads(theirs))


def test_a_backward_again_is_the_same_again():
    loss, _, data = losses_of()
    total = loss(data)["loss_objective"]
    first = torch.autograd.grad(total, list(loss.parameters()), retain_graph=True, allow_unused=True)
    assert_alike(torch.autograd.grad(total, list(loss.parameters()), allow_unused=True), first)


def test_weights_that_change_before_the_backward_are_noticed():
    loss, _, data = losses_of()
    total = loss(data)["loss_objective"]
    with torch.no_grad():
        next(loss.parameters()).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_a_loss_that_is_gone_still_goes_back():
    loss, theirs, data = losses_of()
    parameters = list(loss.parameters())
    total = loss(data)["loss_objective"]
    del loss
    total.backward()
    theirs(data)["loss_objective"].backward()
    assert_alike([p.grad for p in parameters], grads(theirs))


class Holder(nn.Module):
    """Something of a user's around a loss; TorchRL's losses are none of `torch.func.functional_call` by themselves."""

    def __init__(self, loss):
        super().__init__()
        self.loss = loss

    def forward(self, data):
        return self.loss(data)


@pytest.mark.parametrize("kind", ["tensors", "parameters"])
def test_weights_that_are_lent_for_a_call(kind):
    """`torch.func.functional_call`: gradients by the weights that were lent, first and second ones."""
    loss, _, data = losses_of()
    loss(data)
    lent = {name: (p.detach() * 1.5).requires_grad_() for name, p in loss.named_parameters()}
    expected = copy.deepcopy(loss)
    expected.load_state_dict({**expected.state_dict(), **{name: p.detach() for name, p in lent.items()}})
    lent = {n: nn.Parameter(p.detach()) for n, p in lent.items()} if kind == "parameters" else lent
    out = torch.func.functional_call(Holder(loss), {f"loss.{name}": p for name, p in lent.items()}, (data,))
    ends = [(out["loss_objective"], [*lent.values()]), (expected(data)["loss_objective"], [*expected.parameters()])]
    first = [torch.autograd.grad(end, by, allow_unused=True, create_graph=True) for end, by in ends]
    assert_alike(*first)
    squares = [sum(g.square().sum() for g in each if g is not None) for each in first]
    second = [torch.autograd.grad(total, by, allow_unused=True) for total, (_, by) in zip(squares, ends, strict=True)]
    assert_alike(*second)


def test_coefficients_keys_and_frozen_weights_are_those_of_the_call():
    loss, theirs, data = losses_of()
    for each in (loss, theirs):
        each(data)
        each.entropy_coeff.fill_(0.5)
        each.critic_coeff.fill_(3.0)
        each.set_keys(advantage="other")
        for parameter in list(each.parameters())[:2]:
            parameter.requires_grad_(False)
    out, expected = (each(data.copy().set("other", -data["advantage"])) for each in (loss, theirs))
    for name in ("loss_objective", "loss_critic", "loss_entropy"):
        torch.testing.assert_close(out[name], expected[name])
        for each in (out, expected):
            each[name].backward(retain_graph=True)
    assert_alike(grads(loss), grads(theirs))


def test_a_weight_that_is_another_is_seen():
    loss, theirs, data = losses_of(critic="separate")
    for each in (loss, theirs):
        each(data)
        gru = next(m for m in each.actor_network.modules() if isinstance(m, nn.GRU))
        gru.weight_hh_l0 = nn.Parameter(gru.weight_hh_l0.detach() * 2)
        head = [m for m in each.actor_network.modules() if isinstance(m, nn.Linear)][-1]
        head.weight = nn.Parameter(head.weight.detach() * 2)
        each(data)["loss_objective"].backward()
    assert_alike(grads(loss), grads(theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_may_get_another_dtype(dtype):
    """Of which there may be no kernels."""
    loss, _, data = losses_of(critic="separate")
    update = PPOUpdate(loss, minibatches=3, epochs=1)
    loss(data)["loss_objective"].backward()
    update(batch_of("categorical", F64))
    data = data.apply(lambda entry: entry.to(dtype) if entry.is_floating_point() else entry)
    found = []
    for each in (loss.to(dtype), copy.deepcopy(loss)):  # what a copy is made of, it looks for itself
        out = each(data)
        assert {value.dtype for value in out.values()} == {
            torch.float32
        }  # halves would round means, as ClipPPOLoss's do not
        each.zero_grad()
        out["loss_objective"].backward()
        found.append(grads(each))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    PPOUpdate(loss, minibatches=3, epochs=1)(batch_of("categorical", dtype))


def test_a_network_alone_may_be_set_to_train():
    """Of two layers with dropout between them, of which the kernels know nothing."""
    loss, _, data = losses_of("categorical, layers", data=data_of("categorical", F64, layers=2))
    [gru] = [module for module in loss.actor_network.modules() if isinstance(module, nn.GRU)]
    gru.dropout = 0.5
    gru.eval()
    assert torch.equal(loss(data)["loss_objective"], loss(data)["loss_objective"])
    gru.train()
    assert not torch.equal(loss(data)["loss_objective"], loss(data)["loss_objective"])


def test_a_distribution_may_get_other_bounds():
    ends = []
    for low in (-1.0, -2.0):  # from the beginning the second time
        torch.manual_seed(0)
        layer = nn.Linear(5, 2, **{"dtype": F64})
        given = {"distribution_class": TanhNormal, "distribution_kwargs": {"low": low, "high": 2.0}}
        net = TensorDictModule(nn.Sequential(layer, NormalParamExtractor()), ["trans"], ["loc", "scale"])
        loss = RL2PPOLoss(ProbabilisticActor(net, in_keys=["loc", "scale"], return_log_prob=True, **given))
        data = data_of("gaussian", F64)
        data["action"] = data["action"][..., :2].tanh() / 2
        data = TensorDict(data, data["trans"].shape[:2])
        loss(data)
        loss.actor_network[-1].distribution_kwargs["low"] = -2.0
        ends.append(loss(data)["loss_objective"])
    assert torch.equal(*ends)


@pytest.mark.parametrize("is_looked_at", [False, True])
def test_a_head_may_be_detached_later(is_looked_at):
    found = []
    for each in losses_of()[:2]:
        data = losses_of()[2]
        if is_looked_at:
            each(data)
        each.critic_network.detach = True
        each(data)["loss_critic"].backward()
        found.append(grads(each))
        assert not any(p.grad is not None and p.grad.any() for p in each.actor_network.parameters())
    assert_alike(*found)
    with pytest.raises(TypeError, match="detach"):
        each.critic_network.detach = "yes"


def test_data_may_carry_a_gradient():
    loss, theirs, _ = losses_of()
    found = []
    for each in (loss, theirs):
        data = data_of("categorical", F64)
        data["trans"].requires_grad_()
        out = each(TensorDict(data, data["trans"].shape[:2]))
        found.append(torch.autograd.grad(out["loss_objective"], data["trans"]))
    assert_alike(*found)


def test_a_loss_derived_in_the_old_way_trains_as_it_did():
    class Halved(RL2PPOLoss):
        def forward(self, tensordict):
            losses = super().forward(tensordict)
            return losses.set("loss_critic", 0.5 * losses["loss_critic"])

    ends = []
    for make in (Halved, lambda *networks: RL2PPOLoss(*networks, critic_coeff=0.25)):
        given = loss_of("categorical", "shared", F64)
        loss = make(given.actor_network, given.critic_network)
        update = PPOUpdate(loss, minibatches=3, epochs=2, lr=1e-2, shuffle=False)
        update(batch_of("categorical", F64))
        ends.append([p.detach() for p in loss.parameters()])
    assert_alike(*ends)
