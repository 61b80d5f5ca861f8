"""A forward of a class below, and hooks on the loss, beside parts: what autograd would have made of it all."""

import pytest
import torch
from loss_cases import STEPS, batch_of, loss_of, needs_kernels
from tensordict import TensorDict
from torch import nn

from rl2_torchrl import PPOUpdate, RL2PPOLoss
from rl2_torchrl.gradients.answers import Answers


class Counted(RL2PPOLoss):
    """What tests derive from: counts its calls."""

    calls = 0

    def forward(self, tensordict):
        type(self).calls += 1
        return super().forward(tensordict)


def penalty(loss):
    return 1e-2 * sum(p.square().sum() for p in loss.actor_network.parameters())


class Adds(Counted):
    def forward(self, tensordict):
        return super().forward(tensordict).set("loss_more", penalty(self))


class AddsWhenCalled(RL2PPOLoss):
    calls = 0

    def __call__(self, tensordict):
        type(self).calls += 1
        return super().__call__(tensordict).set("loss_more", penalty(self))


class Halves(Counted):
    """Of all losses."""

    def forward(self, tensordict):
        losses = super().forward(tensordict)
        return losses.update({name: 0.5 * value for name, value in losses.items() if name.startswith("loss_")})


class WeighsOne(Counted):
    def forward(self, tensordict):
        losses = super().forward(tensordict)
        return losses.set("loss_critic", 2 * losses["loss_critic"])


class LeavesOut(Counted):
    def forward(self, tensordict):
        losses = super().forward(tensordict)
        return losses.set("loss_critic", losses["loss_critic"].detach())


class AsksForOne(Counted):
    """For the gradient of a single loss, as what weighs tasks against each other does."""

    def forward(self, tensordict):
        losses = super().forward(tensordict)
        trained = list(self.actor_network.parameters())
        found = torch.autograd.grad(losses["loss_objective"], trained, retain_graph=True, allow_unused=True)
        norm = sum(g.square().sum() for g in found if g is not None).sqrt()
        return losses.set("loss_norm", norm.detach() * penalty(self))


class ChangesInPlace(Counted):
    def forward(self, tensordict):
        tensordict["advantage"].mul_(2)
        return super().forward(tensordict)


class Replaces(Counted):
    def forward(self, tensordict):
        return super().forward(tensordict.copy().set("advantage", tensordict["advantage"].clamp(-0.5, 0.5)))


class LeavesAKeyOut(Counted):
    """So that memories begin with zeros, where the data say that trials do."""

    def forward(self, tensordict):
        other = tensordict.exclude("actor_hidden", "critic_hidden")
        return super().forward(other.set("is_init", torch.ones_like(other["is_init"])))


class Schedules(Counted):
    def forward(self, tensordict):
        self.entropy_coeff.mul_(0.9)
        return super().forward(tensordict)


class Freezes(Counted):
    def forward(self, tensordict):
        for parameter in self.critic_network.parameters():
            parameter.requires_grad_(self.calls % 3 > 0)
        return super().forward(tensordict)


class AsksTwice(Counted):
    def forward(self, tensordict):
        with torch.no_grad():
            before = RL2PPOLoss.forward(self, tensordict)
        losses = super().forward(tensordict)
        other = RL2PPOLoss.forward(self, tensordict.copy().set("advantage", -tensordict["advantage"]))
        return losses.set("loss_other", 0.1 * (other["loss_objective"] + before["loss_critic"]))


class ReadsAll(Counted):
    def forward(self, tensordict):
        losses = super().forward(tensordict)
        assert losses["ESS"].shape == tensordict.shape[1:]
        return losses.set("ess", losses["ESS"].mean())


class PutsOthersInTheirPlace(Counted):
    """Weights with noise, as for a search around them."""

    def forward(self, tensordict):
        noisy = TensorDict.from_module(self.actor_network, as_module=False).clone(recurse=False)
        noisy = noisy.apply(lambda weight: weight * (1 + 0.1 * torch.sin(torch.arange(weight.numel()).view_as(weight))))
        with noisy.to_module(self.actor_network):
            return super().forward(tensordict)


class AsksByData(Counted):
    """A penalty on how much the data matter."""

    def forward(self, tensordict):
        tensordict["trans"].requires_grad_()
        losses = super().forward(tensordict)
        [slope] = torch.autograd.grad(losses["loss_objective"], tensordict["trans"], create_graph=True)
        return losses.set("loss_slope", slope.square().sum())


class ChangesOnce(Counted):
    """Its clipping in the third minibatch, for good."""

    def forward(self, tensordict):
        if self.calls == 2:
            self.clip_epsilon.fill_(0.02)
        return super().forward(tensordict)


class PutsAnother(Counted):
    """A weight in the place of one."""

    def forward(self, tensordict):
        if self.calls == 2:
            [*_, linear] = [m for m in self.critic_network.modules() if isinstance(m, nn.Linear)]
            linear.weight.data = 0.5 * linear.weight.data
        return super().forward(tensordict)


class ChangesAnOption(Counted):
    """For one minibatch."""

    def forward(self, tensordict):
        self.loss_critic_type = "smooth_l1" if self.calls == 2 else "l2"
        return super().forward(tensordict)


class PutsAStep(Counted):
    """In the place of one of `ClipPPOLoss`'s, for one minibatch."""

    def forward(self, tensordict):
        vars(self).pop("_get_entropy", None)
        if self.calls == 2:
            self._get_entropy = lambda *args, **kwargs: 2 * RL2PPOLoss._get_entropy(self, *args, **kwargs)
        return super().forward(tensordict)


class PenalisesSlopes(Counted):
    """A penalty on the gradient of the losses' sum."""

    def forward(self, tensordict):
        losses = super().forward(tensordict)
        total = sum(value for name, value in losses.items() if name.startswith("loss_"))
        slopes = torch.autograd.grad(total, list(self.parameters()), create_graph=True)
        return losses.set("loss_slope", 1e-2 * sum(slope.square().sum() for slope in slopes))


class ChangesAfterwards(WeighsOne):
    def forward(self, tensordict):
        losses = super().forward(tensordict)
        tensordict["advantage"].abs_()
        return losses


class Anneals(Counted):
    """A term of its own whose size the forward moves."""

    size = 1.0

    def forward(self, tensordict):
        self.size = 0.8 * self.size
        return super().forward(tensordict)

    def loss_terms(self):
        return [*super().loss_terms(), Spread(self.size)]


class Spread(nn.Module):
    """A term that draws at random, and says something that has a gradient beside its loss."""

    in_keys = ("logits",)

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, logits):
        kept = nn.functional.dropout(logits, 0.3)
        return {"loss_spread": self.size * kept.square().mean(), "spread": logits.square().mean()}


class WeighsWhatTermsSay(Counted):
    def __init__(self, *networks, **options):
        super().__init__(*networks, terms=[Spread(0.1)], **options)

    def forward(self, tensordict):
        losses = super().forward(tensordict)
        return losses.set("loss_more", 0.7 * losses["spread"]).set("loss_critic", 2 * losses["loss_critic"])


# Which of them are answered to the end.
ALIKE = {Counted, Adds, AddsWhenCalled, Halves, ReadsAll, PutsAnother}
UNLIKE = {WeighsOne, LeavesOut, AsksForOne, PenalisesSlopes, ChangesAfterwards}
OTHERS = {ChangesInPlace, Replaces, LeavesAKeyOut, Schedules, Freezes, AsksTwice, PutsOthersInTheirPlace, AsksByData}
OTHERS |= {ChangesOnce, ChangesAnOption, PutsAStep}
NEVER = {Anneals, WeighsWhatTermsSay}


def update_of(cls, way, critic="shared", **options):
    loss = loss_of("categorical", critic, torch.float64)
    loss = cls(loss.actor_network, loss.critic_network, entropy_bonus=True, entropy_coeff=0.05)
    sizes = {"bptt": 2, "minibatches": 5, "epochs": 3, "max_grad_norm": 0.5, "lr": 1e-2}
    return PPOUpdate(loss, backend=way, generator=torch.Generator().manual_seed(0), **{**sizes, **options})


def run(update):
    torch.manual_seed(7)
    metrics = [update(batch_of("categorical", torch.float64)) for _ in range(2)]
    state = [v for p in update.loss.parameters() for v in update.optimizer.state[p].values()]
    return metrics, [*(p.detach() for p in update.loss.parameters()), *state]


def assert_same(update, cls, critic="shared", prepare=lambda loss: None):
    expected = update_of(cls, "autograd", critic)
    prepare(expected.loss)
    cls.calls = 0
    theirs, weights = run(expected)
    cls.calls = 0
    ours, own = run(update)
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-9)
    for a, b in zip(own, weights, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("critic", ["shared", "separate"])
@pytest.mark.parametrize("cls", sorted(ALIKE | OTHERS, key=lambda cls: cls.__name__))
def test_a_forward_of_a_class_below(cls, critic):
    update = update_of(cls, "auto", critic)
    method = "__call__" if "__call__" in vars(cls) else "forward"
    assert (update.backend, f"{cls.__name__} has a {method} of its own" in update.reason) == ("parts", True)
    assert_same(update, cls, critic)
    assert update.backend == ("parts" if cls in ALIKE else "autograd")
    assert cls.calls == 2 * 3 * 5  # never once more


class Trains(Counted):
    """Has another update within its forward, whose loss has a forward of its own, too."""

    def forward(self, tensordict):
        if (inner := vars(self).get("inner")) is not None:
            inner(batch_of("categorical", torch.float64))
        return super().forward(tensordict)


@needs_kernels
def test_an_update_within_anothers_forward(monkeypatch):
    """Both are answered to the end."""
    ends, given, call = [], [], Answers.__call__

    def noted(answers, *arguments):
        given.append((type(answers._replays.program.loss), losses := call(answers, *arguments)))
        return losses

    monkeypatch.setattr(Answers, "__call__", noted)
    for way in ("auto", "autograd"):
        outer, inner = update_of(Trains, way), update_of(Adds, way, minibatches=2, epochs=2)
        object.__setattr__(outer.loss, "inner", inner)
        ends.append([run(outer), [p.detach() for p in inner.loss.parameters()]])
        assert {outer.backend, inner.backend} == {"parts" if way == "auto" else "autograd"}
    assert [cls for cls, losses in given if losses is not None].count(Trains) == 2 * 3 * 5
    for ours, expected in zip(ends[0][0][1] + ends[0][1], ends[1][0][1] + ends[1][1], strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


@needs_kernels
@pytest.mark.parametrize("cls", sorted(ALIKE | OTHERS, key=lambda cls: cls.__name__))
def test_who_is_answered(cls, monkeypatch):
    given, call = [], Answers.__call__

    def noted(answers, *arguments):
        given.append(call(answers, *arguments))
        return given[-1]

    monkeypatch.setattr(Answers, "__call__", noted)
    cls.calls = 0
    run(update_of(cls, "parts"))
    assert all(losses is not None for losses in given) == (cls in ALIKE)
    assert len(given) >= 2 * 3 * 5


@pytest.mark.parametrize("cls", sorted(NEVER, key=lambda cls: cls.__name__))
def test_terms_beside_a_forward_are_autograds(cls):
    """They may draw at random, be others by now, or say what the forward goes on with."""
    update = update_of(cls, "auto")
    assert (update.backend, "parts or terms of others" in update.reason) == ("autograd", True)
    assert_same(update, cls)
    assert cls.calls == 2 * 3 * 5
    with pytest.raises(ValueError, match="'parts' cannot serve.*forward of its own"):
        update_of(cls, "parts")


def test_modules_of_others_beside_a_forward_are_autograds():
    """What they draw at random would be drawn twice where the losses have not one weight."""
    loss = loss_of("categorical, elu", "separate", torch.float64)
    update = PPOUpdate(Adds(loss.actor_network, loss.critic_network))
    assert (update.backend, "parts or terms of others" in update.reason) == ("autograd", True)


@pytest.mark.parametrize("cls", sorted(UNLIKE, key=lambda cls: cls.__name__))
def test_losses_without_a_common_weight_are_autograds(cls):
    update = update_of(cls, "auto")
    assert_same(update, cls)
    assert (update.backend, "all of one weight" in update.reason) == ("autograd", True)
    assert cls.calls == 2 * 3 * 5
    named = update_of(cls, "parts")  # which stays with it
    assert_same(named, cls)
    assert named.backend == "parts"


def _add_by_hook(loss):
    loss.register_forward_hook(lambda module, inputs, out: out.set("loss_more", penalty(module)))


def _another_forward(loss):
    forward = loss.forward
    loss.forward = lambda tensordict: forward(tensordict).set("loss_more", penalty(loss))


def _clip_by_hook(loss):
    for parameter in loss.parameters():
        parameter.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))


def _clip_afterwards(loss):
    def clip(parameter):
        parameter.grad.clamp_(-1e-3, 1e-3)

    for parameter in loss.parameters():
        parameter.register_post_accumulate_grad_hook(clip)


@pytest.mark.parametrize("change", [_add_by_hook, _another_forward, _clip_by_hook, _clip_afterwards])
def test_hooks_beside_parts(change):
    update = update_of(RL2PPOLoss, "auto")
    change(update.loss)
    assert_same(update, RL2PPOLoss, prepare=change)
    assert update.backend == "parts"
    assert update.reason


@pytest.mark.parametrize("weight", [1, 2])
@pytest.mark.parametrize("frozen", ["first", "all"])
def test_frozen_layers_beside_a_forward(frozen, weight):
    class Learns(Adds):
        """A weight of its own, which may be all that does."""

        def __init__(self, *networks):
            super().__init__(*networks)
            self.own = nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, tensordict):
            losses = super().forward(tensordict)
            losses["loss_objective"] = weight * losses["loss_objective"]
            return losses.set("loss_own", (self.own - losses["kl_approx"]).square())

    ends = []
    for way in ("auto", "autograd"):
        loss = loss_of("categorical", "shared", torch.float64)
        loss = Learns(loss.actor_network, loss.critic_network)
        _own, *networks = loss.parameters()
        for parameter in networks if frozen == "all" else networks[:1]:
            parameter.requires_grad_(False)
        update = PPOUpdate(loss, bptt=2, minibatches=5, epochs=3, shuffle=False, backend=way)
        metrics = [update(batch_of("categorical", torch.float64))]
        assert [p.grad is not None for p in loss.parameters()] == [p.requires_grad for p in loss.parameters()]
        ends.append((metrics, [p.detach() for p in loss.parameters()]))
    for one, other in zip(*(metrics for metrics, _ in ends), strict=True):
        assert one == pytest.approx(other, rel=1e-9)
    for a, b in zip(*(weights for _, weights in ends), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


class KeepsALoss(Counted):
    """Adds the last minibatch's, whose graph is gone."""

    last = 0

    def forward(self, tensordict):
        losses = super().forward(tensordict)
        last, self.last = self.last, losses["loss_critic"]
        return losses.set("loss_last", torch.zeros(()) + last)


@pytest.mark.parametrize("way", ["auto", "autograd"])
def test_a_graph_that_is_gone_cannot_be_gone_back_through(way):
    with pytest.raises(RuntimeError, match="second time"):
        run(update_of(KeepsALoss, way))


def test_more_data_than_were_given_are_others():
    """A part may read them: memory, say."""
    answers, entry = Answers.__new__(Answers), torch.zeros(2)
    answers._entries = [("a", entry, entry._version)]
    assert answers._are_given(TensorDict({"a": entry}, [2]))
    assert not answers._are_given(TensorDict({"a": entry, "b": entry}, [2]))


def test_a_loop_of_ones_own_is_autograds():
    loss = update_of(Adds, "auto").loss
    losses = loss(batch_of("categorical", torch.float64))
    [one] = torch.autograd.grad(losses["loss_critic"], [next(loss.critic_network.parameters())])
    assert one.shape[0] == 1
    assert losses["ESS"].shape == (STEPS,)
