"""Minibatches that are made again, beside modules, terms and optimizers of users': as they would have been by themselves."""

from functools import partial

import pytest
import torch
from loss_cases import (
    ACTIONS,
    F64,
    INPUTS,
    UNITS,
    batch_of,
    data_of,
    loss_of,
    needs_kernels,
)
from replay_cases import Term, assert_alike, both_ways, policy_of, replays_of
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl import torchrl_logger
from torchrl.modules import ProbabilisticActor

from rl2_torchrl import PPOUpdate, RL2PPOLoss
from rl2_torchrl.gradients import Part, Program
from rl2_torchrl.gradients.chain import ChainPart
from rl2_torchrl.gradients.replays import RecordedMinibatch, _tell_of_change
from rl2_torchrl.kernels.recording import Calls, ChangedError, Recording
from rl2_torchrl.kernels.workspace import Workspace
from rl2_torchrl.modules import MLPEncoder, RunningNorm
from rl2_torchrl.objectives.terms import SquaredError


# ------------------------------------------------------------------ beside what is not ours
def with_term(way, kind="categorical", critic="shared", weights=False, **options):
    loss = loss_of(kind, critic, torch.float64)
    term = Term(loss.actor_network.parameters() if weights else (), **options)
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


def test_what_a_term_was_shown_stays_as_it_was(monkeypatch):
    """Also once the memory of a batch is another's."""
    monkeypatch.setattr(Workspace, "_LEAST", 0)
    _, term = with_term("parts")
    assert len(term.kept) == term.calls == 2 * 3 * 5  # and no minibatch twice
    assert all(torch.equal(shown, before) for shown, before in term.kept)


@pytest.mark.parametrize("way", ["parts", "autograd"])
def test_what_is_shown_beside_a_term_that_gives_otherwise_stays_too(way):
    """The rest of such a minibatch is made step by step, of what the kernels have left."""
    loss = loss_of("categorical", "shared", torch.float64)
    some, term = _Some(), Term()
    some.in_keys = ("actor_features", "task")
    loss = RL2PPOLoss(loss.actor_network, loss.critic_network, terms=[some, term])
    update = PPOUpdate(loss, bptt=2, minibatches=5, epochs=3, shuffle=False, backend=way)
    for _ in range(2):
        update(batch_of("categorical", torch.float64))
    assert all(torch.equal(shown, before) for shown, before in term.kept)


@needs_kernels
def test_a_term_is_all_that_python_does():
    loss = loss_of("categorical", "shared", torch.float64)
    loss = RL2PPOLoss(loss.actor_network, loss.critic_network, terms=[Term()])
    _, minibatch = replays_of(loss, data_of("categorical", torch.float64))
    assert [isinstance(step, Calls) for step in minibatch._steps] == [True, False, True]


class _Looks(nn.Module):
    """A term that keeps what it is shown in some calls, or what shares its memory."""

    in_keys = ("actor_features", "task")

    def __init__(self, keeps=(), what=lambda features: features):
        super().__init__()
        self.linear, self._keeps, self._what = nn.Linear(UNITS, 2, **F64), keeps, what
        self.calls, self.kept = 0, []

    def forward(self, features, task):
        if self.calls in self._keeps:
            kept = self._what(features)
            self.kept.append((kept, torch.as_tensor(kept).detach().clone()))
        self.calls += 1
        return {"loss_looks": (self.linear(features) - task).square().mean()}


def look(*arguments):
    """A term that has looked at three batches of ten minibatches each."""
    loss, term = loss_of("categorical", "shared", torch.float64), _Looks(*arguments)
    loss = RL2PPOLoss(loss.actor_network, loss.critic_network, terms=[term])
    update = PPOUpdate(loss, bptt=2, minibatches=5, epochs=2)
    for _ in range(3):
        update(batch_of("categorical", torch.float64))
    return term


@needs_kernels
@pytest.mark.parametrize("what", [lambda x: x, lambda x: x.detach()[0], lambda x: x.detach().numpy()])
@pytest.mark.parametrize("keeps", [[0], [3], [9], [19], [2, 3, 11]], ids=str)
def test_what_a_term_keeps_now_and_then_stays_as_it_was(keeps, what, monkeypatch):
    monkeypatch.setattr(Workspace, "_LEAST", 0)
    term = look(keeps, what)
    assert term.calls == 3 * 10
    assert len(term.kept) == len(keeps)
    assert all(torch.equal(torch.as_tensor(kept), before) for kept, before in term.kept)


@pytest.mark.parametrize("keeps", [[], range(99)], ids=["keeps nothing", "keeps all"])
def test_a_term_after_one_that_has_found_gradients_by_the_same_entries(keeps):
    """What the first has found is put off until kernels have made theirs, also where the second gives otherwise than before."""
    ends = []
    for way in ("parts", "autograd"):
        loss = loss_of("categorical", "shared", torch.float64)
        torch.manual_seed(2)
        terms = [_Looks(keeps), Term(depends=True)]
        loss = RL2PPOLoss(loss.actor_network, loss.critic_network, terms=terms)
        update = PPOUpdate(loss, bptt=2, minibatches=5, epochs=3, shuffle=False, backend=way)
        metrics = [update(batch_of("categorical", torch.float64)) for _ in range(2)]
        ends.append((metrics, [p.detach() for p in loss.parameters()], []))
    assert_alike(*ends)


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


@pytest.mark.parametrize("layout", [None, 1, 4, 8])
@pytest.mark.parametrize(("who", "minibatches"), [("module", 5), ("both", 3), ("both", 5), ("term", 3)])
def test_weights_that_move_in_every_minibatch(minibatches, layout, who):
    """The first of a size too, of which there is a short one last; nobody is called twice for it."""

    def make():
        loss = loss_of("categorical", "separate", torch.float64)
        weight = next(loss.actor_network.parameters())
        moves = TensorDictModule(_Moves(weight, every=1, layout=layout), ["trans"], ["trans"])
        term = _MovesToo(weight, layout if who == "term" else None)
        return policy_of(*([moves] if who != "term" else []), loss=loss, terms=[term] if who != "module" else [])

    loss = both_ways(make, minibatches=minibatches)
    assert {m.calls for m in loss.modules() if isinstance(m, _Moves | _MovesToo)} == {2 * 3 * minibatches}


class _Hears(nn.Linear):
    """A layer that keeps the gradients by what it gives."""

    def __init__(self):
        super().__init__(INPUTS, INPUTS, **F64)
        self.kept = []

    def forward(self, x):
        out = super().forward(x)
        out.register_hook(lambda gradient: self.kept.append((gradient, gradient.clone())))
        return out


def test_gradients_that_a_hook_keeps_stay_as_they_were(monkeypatch):
    monkeypatch.setattr(Workspace, "_LEAST", 0)
    hears = _Hears()
    update = PPOUpdate(policy_of(TensorDictModule(hears, ["trans"], ["trans"])), bptt=2, minibatches=5, epochs=3)
    update(batch_of("categorical", torch.float64))
    assert len(hears.kept) == 3 * 5
    assert all(torch.equal(gradient, before) for gradient, before in hears.kept)


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
    both_ways(lambda: policy_of(*twice), batch)


class _Clamps(nn.Module):
    """Writes in place what others read too."""

    def forward(self, x):
        return x.clamp_(-0.5, 0.5).tanh()


@pytest.mark.parametrize("minibatches", [1, 5])  # one is not recorded
def test_a_module_that_writes_in_place_what_others_read_is_told_of(minibatches):
    clamps = TensorDictModule(_Clamps(), ["trans"], ["seen"])
    update = PPOUpdate(policy_of(clamps), bptt=2, minibatches=minibatches, backend="parts")
    with pytest.raises(
        RuntimeError, match=r"\['trans'\] .* modified by an inplace operation of _Clamps, .*work on a copy"
    ):
        update(batch_of("categorical", torch.float64))


class _Encodes(nn.Module):
    """Saves what it reads for its backward."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(INPUTS, INPUTS, **F64)

    def forward(self, x):
        return nn.functional.gelu(self.linear(x))


class _Centres(nn.Module):
    """A term that predicts what an encoder has read, about its mean, in place where it is told to."""

    in_keys = ("actor_features", "trans")

    def __init__(self, in_place):
        super().__init__()
        self.linear, self._in_place, self.calls = nn.Linear(UNITS, INPUTS, **F64), in_place, 0

    def forward(self, features, target):
        self.calls += 1
        centre = target.sub_ if self._in_place(self.calls) else target.sub
        return {"loss_centred": (self.linear(features) - centre(target.mean((0, 1)))).square().mean()}


def encoded(in_place, way="parts", encoder=_Encodes):
    loss = loss_of("categorical", "separate", torch.float64)
    torch.manual_seed(2)
    core, head = loss.actor_network.module[0].module
    core.in_keys = ["encoded", *core.in_keys[1:]]
    encoder = TensorDictModule(encoder(), ["trans"], ["encoded"])
    loss = policy_of(encoder, loss=loss, terms=[_Centres(in_place)])
    update = PPOUpdate(loss, shuffle=False, backend=way, bptt=2, minibatches=5, epochs=3)
    metrics = [update(batch_of("categorical", torch.float64)) for _ in range(2)]
    return metrics, [p.detach() for p in loss.parameters()], []


def refuse(*_):
    raise ChangedError


@needs_kernels
@pytest.mark.parametrize("is_recorded", [True, False])
def test_what_our_parts_read_again_is_written_over_by_nobody(is_recorded, monkeypatch):
    def encoder():
        return MLPEncoder(INPUTS, [INPUTS], **F64)

    assert_alike(encoded(lambda call: False, encoder=encoder), encoded(lambda call: False, "autograd", encoder))
    if not is_recorded:
        monkeypatch.setattr(RecordedMinibatch, "_run_first", refuse)
    with pytest.raises(
        RuntimeError, match=r"\['trans'\] of a minibatch has been modified by an inplace operation of _Centres"
    ):
        encoded(lambda call: True, encoder=encoder)


class _Some(nn.Module):
    """A term that has a loss where there is something to look at, in each minibatch or not."""

    in_keys = ("seen", "task")

    def forward(self, seen, task):
        chosen = task[..., 0] > 0.8
        return {"loss_some": seen[chosen].square().mean()} if chosen.sum() > 1 else {}


@needs_kernels
@pytest.mark.parametrize("reads", ["trans", "actor_features"])
def test_a_term_that_has_a_loss_in_some_minibatches(reads, monkeypatch):
    def make():
        term = _Some()
        term.in_keys = (reads, "task")
        return policy_of(terms=[term])

    said = []
    monkeypatch.setattr(torchrl_logger, "info", said.append)
    _tell_of_change.cache_clear()
    both_ways(make)
    # What reads data alone has no gradient, and goes as it did.
    assert sum("a term gives other losses" in line for line in said) == (reads == "actor_features")


class _Skips(nn.Module):
    """Leaves its layer out at random, which then has no gradient."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(INPUTS, INPUTS, **F64)

    def forward(self, x):
        return x if torch.rand(()) < 0.3 else x + self.linear(x).tanh()


def test_a_module_that_draws_draws_the_same_where_a_minibatch_is_made_anew():
    both_ways(lambda: policy_of(TensorDictModule(_Skips(), ["trans"], ["trans"])))


class _Borrows(nn.Module):
    """A module without weights that reads another's where ``borrows`` says so of its input's sum."""

    def __init__(self, weight, borrows):
        super().__init__()
        self._weight, self._borrows = [weight], borrows

    def forward(self, x):
        return x + 0.1 * self._weight[0].sum() if self._borrows(x.sum()) else x + 1


@pytest.mark.parametrize(
    "borrows", [lambda _: True, lambda x: x > 0, lambda x: x < 0], ids=["always", "some", "others"]
)
def test_modules_that_borrow_a_weight(borrows):
    """Of two halves of the minibatches one begins with the first."""

    def make():
        loss = loss_of("categorical", "separate", torch.float64)
        weight = list(loss.actor_network.parameters())[-1]
        borrow = (TensorDictModule(_Borrows(weight, borrows), ["trans"], [key]) for key in ("seen", "trans"))
        return policy_of(*borrow, loss=loss)

    both_ways(make)


def test_no_gradient_is_made_by_what_frozen_modules_give():
    for is_frozen in (False, True):
        encoder = TensorDictModule(_Encodes().requires_grad_(not is_frozen), ["trans"], ["trans"])
        program = Program(policy_of(encoder))
        program(data_of("categorical", torch.float64))
        assert ("trans" in program.parts[1].wanted) != is_frozen


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
        loss = RL2PPOLoss(loss.actor_network, loss.critic_network, terms=[Term()] if terms else ())
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
        term = Term(features=INPUTS)
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

    both_ways(lambda: policy_of(*(TensorDictModule(_ByHand(), ["trans"], ["trans"]) for _ in range(count))))


def test_a_part_of_a_users_within_one_of_ours():
    def make():
        loss = loss_of("gaussian", "separate", torch.float64)
        head = next(m for m in loss.actor_network.modules() if "log_std" in m._parameters)
        head.mean = _ByHand(UNITS, ACTIONS)
        return RL2PPOLoss(loss.actor_network, loss.critic_network)

    both_ways(make, kind="gaussian")


def test_a_part_whose_way_back_is_not_kernels_alone_goes_it_once(monkeypatch):
    """It writes over the slopes that come, those behind its last activation."""
    back = ChainPart.backward_by_hand

    def backward_by_hand(part, gradients):
        Recording.interrupt()
        back(part, gradients)

    monkeypatch.setattr(ChainPart, "backward_by_hand", backward_by_hand)
    encoder = partial(MLPEncoder, INPUTS, [INPUTS], activation=nn.Tanh, **F64)
    both_ways(lambda: policy_of(TensorDictModule(encoder(), ["trans"], ["trans"])))


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
