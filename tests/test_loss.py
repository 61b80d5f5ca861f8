"""`RL2PPOLoss`: defaults, hand-worked losses on both sides of the clip, options, keys, state and compilation."""

import gc
import math
import weakref

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import ProbabilisticActor
from torchrl.objectives import ClipPPOLoss, ValueEstimators

from rl2_torchrl import ActorCritic, GRUCategoricalActor, GRUGaussianActor, GRUValueHead, RL2PPOLoss
from rl2_torchrl.gradients import Program
from rl2_torchrl.modules.layers import Head

PROBS = (0.5, 0.25, 0.25)
VALUE = 2.0
# Ratio and advantage of six steps: outside the clip on both sides with either sign, and twice inside it.
RATIOS = (2.0, 2.0, 0.5, 0.5, 1.1, 0.9)
ADVANTAGES = (1.0, -1.0, 1.0, -1.0, 2.0, -2.0)
RETURNS = (1.0, 2.0, 3.0, 4.0, 0.0, 2.0)


def head(module, bias):
    """Makes the network's output a constant, whatever it remembers."""
    layer = [layer for layer in module.modules() if isinstance(layer, nn.Linear)][-1]
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.as_tensor(bias))
    return module


def networks(**critic_kwargs):
    """An actor of probabilities 1/2, 1/4, 1/4 and a critic that says 2."""
    torch.manual_seed(0)
    actor = head(GRUCategoricalActor(5, 3, hidden_size=4), torch.tensor(PROBS).log())
    return actor, head(GRUValueHead(5, hidden_size=4, **critic_kwargs), [VALUE])


def column(values):
    return torch.tensor([values]).unsqueeze(-1)


def data(ratios=RATIOS, advantages=ADVANTAGES, returns=RETURNS):
    """A batch [1, T] of action 0, whose old log-probability is ln(1/2) - ln(ratio)."""
    torch.manual_seed(1)
    steps = len(ratios)
    td = {
        "trans": torch.randn(1, steps, 5),
        "is_init": torch.zeros(1, steps, 1, dtype=torch.bool),
        "actor_hidden": torch.randn(1, steps, 1, 4),
        "critic_hidden": torch.randn(1, steps, 1, 4),
        "action": torch.zeros(1, steps, dtype=torch.int64),
        "action_log_prob": math.log(0.5) - torch.tensor([ratios]).log(),
        "advantage": column(advantages),
        "value_target": column(returns),
    }
    return TensorDict(td, [1, steps])


def total(losses):
    return sum(value for name, value in losses.items() if name.startswith("loss_"))


def test_defaults_are_the_originals():
    loss = RL2PPOLoss(*networks())
    assert isinstance(loss, ClipPPOLoss)
    assert loss.clip_epsilon == pytest.approx(0.3)
    assert loss.critic_coeff == 0.5
    assert loss.loss_critic_type == "l2"
    assert not loss.clip_value
    losses = loss(data())
    assert {name for name in losses.keys() if name.startswith("loss_")} == {"loss_objective", "loss_critic"}
    assert "explained_variance" not in losses.keys()


@pytest.mark.parametrize(
    ("clip_epsilon", "expected", "clipped"),
    [
        # min(r A, clip(r) A), the clip at 0.7 and 1.3: 1.3 - 2 + 0.5 - 0.7 + 2.2 - 1.8 = -0.5
        (0.3, 0.5 / 6, 4 / 6),
        # at 0.8 and 1.2: 1.2 - 2 + 0.5 - 0.8 + 2.2 - 1.8 = -0.7
        (0.2, 0.7 / 6, 4 / 6),
        # at 0.6 and 1.05: 1.05 - 2 + 0.5 - 0.6 + 2.1 - 1.8 = -0.75
        ((0.4, 0.05), 0.75 / 6, 5 / 6),
    ],
)
def test_policy_loss_by_hand(clip_epsilon, expected, clipped):
    losses = RL2PPOLoss(*networks(), clip_epsilon=clip_epsilon)(data())
    assert losses["loss_objective"].item() == pytest.approx(expected, abs=1e-6)
    assert losses["clip_fraction"].item() == pytest.approx(clipped)
    # mean(log pi_old - log pi) = -mean ln r = -ln(2 * 2 * 0.5 * 0.5 * 1.1 * 0.9) / 6
    assert losses["kl_approx"].item() == pytest.approx(-math.log(0.99) / 6, abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"), [(2.0, 1.0, False), (2.0, -1.0, True), (0.5, 1.0, True), (0.5, -1.0, False)]
)
def test_the_clip_stops_only_steps_that_go_further_away(ratio, advantage, moves):
    actor, critic = networks()
    RL2PPOLoss(actor, critic)(data([ratio], [advantage], [0.0]))["loss_objective"].backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in actor.parameters()) is moves


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        # (2 - R)^2 = 1, 0, 1, 4, 4, 0: mean 10/6.
        ({}, 0.5 * 10 / 6),
        ({"critic_coeff": 1.0}, 10 / 6),
        # |2 - R| = 1, 0, 1, 2, 2, 0, so smooth l1 = 0.5, 0, 0.5, 1.5, 1.5, 0.
        ({"loss_critic_type": "smooth_l1"}, 0.5 * 4 / 6),
        # The stored value is 1, so the clipped one 1.5: (1.5 - R)^2 = 0.25, 0.25, 2.25, 6.25, 2.25, 0.25. The larger of
        # the two counts: 1 + 0.25 + 2.25 + 6.25 + 4 + 0.25 = 14.
        ({"clip_value": 0.5}, 0.5 * 14 / 6),
    ],
)
def test_value_loss_by_hand(kwargs, expected):
    losses = RL2PPOLoss(*networks(), **kwargs)(data().set("state_value", torch.ones(1, 6, 1)))
    assert losses["loss_critic"].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("coeff", [None, 0.2, np.float32(0.2)])
def test_entropy_of_categorical_by_hand(coeff):
    losses = RL2PPOLoss(*networks(), entropy_bonus=True, entropy_coeff=coeff)(data())
    # 1/2 ln 2 + 2 * 1/4 ln 4 = 1.5 ln 2
    assert losses["entropy"].item() == pytest.approx(1.5 * math.log(2))
    assert losses["loss_entropy"].item() == pytest.approx(-(coeff or 0.01) * 1.5 * math.log(2), rel=1e-5)


def test_gaussian_policy_loss_and_entropy_by_hand():
    # Mean (0, 1), scale exp(-0.5), action (1, 1): log pi = -e / 2 + 1 - ln(2 pi) = -2.197; the old one is 0, so the
    # ratio is 0.1111, below 0.7. For A = -3 the clipped term, -3 * 0.7, is the smaller one: the loss is 2.1. For A = 3
    # it is the unclipped one: -3 * 0.1111.
    ratio = math.exp(1 - math.e / 2 - math.log(2 * math.pi))
    actor = head(GRUGaussianActor(5, 2, hidden_size=4), [0.0, 1.0])
    for advantage, expected in ((-3.0, 2.1), (3.0, -3 * ratio)):
        td = data([1.0], [advantage], [0.0])
        td["action"], td["action_log_prob"] = torch.ones(1, 1, 2), torch.zeros(1, 1)
        losses = RL2PPOLoss(actor, networks()[1], entropy_bonus=True)(td)
        assert losses["loss_objective"].item() == pytest.approx(expected, abs=1e-5)
        # Summed over the components: 2 * (1/2 ln(2 pi e) - 1/2) = ln(2 pi)
        assert losses["entropy"].item() == pytest.approx(math.log(2 * math.pi), abs=1e-6)


def test_clip_in_the_networks_precision():
    actor = head(GRUCategoricalActor(5, 3, hidden_size=4, dtype=torch.float64), torch.tensor(PROBS).log())
    critic = GRUValueHead(5, hidden_size=4, dtype=torch.float64)
    losses = RL2PPOLoss(actor, critic, clip_epsilon=0.3)(data([2.0], [1.0], [0.0]).double())
    # float32's 0.3 is 0.3 + 1.2e-8.
    assert losses["loss_objective"].item() == pytest.approx(-1.3, abs=1e-14)


def test_parameters_are_the_networks_own():
    actor, critic = networks()
    loss = RL2PPOLoss(actor, critic)
    total(loss(data())).backward()
    before = [p.clone() for p in actor.parameters()]
    torch.optim.SGD(loss.parameters(), lr=1.0).step()
    assert any(not torch.equal(old, new) for old, new in zip(before, actor.parameters(), strict=True))
    assert len(list(loss.parameters())) == len(list(actor.parameters())) + len(list(critic.parameters()))


def test_state_dict_round_trip():
    loss = RL2PPOLoss(*networks(), entropy_bonus=True, entropy_coeff=0.2)
    torch.manual_seed(5)
    other = RL2PPOLoss(GRUCategoricalActor(5, 3, hidden_size=4), GRUValueHead(5, hidden_size=4), entropy_bonus=True)
    assert total(other(data())) != total(loss(data()))
    other.load_state_dict(loss.state_dict())
    # The coefficients are part of the state too.
    assert total(other(data())) == total(loss(data()))


def test_keys_are_settable():
    loss = RL2PPOLoss(*networks(value_key=("critic", "v")), clip_value=0.5)
    expected = RL2PPOLoss(*networks(), clip_value=0.5)(data().set("state_value", torch.ones(1, 6, 1)))
    names = {"advantage": ("agent", "adv"), "value_target": "ret", "sample_log_prob": "old", "value": ("critic", "v")}
    loss.set_keys(**names)
    td = data().set(("critic", "v"), torch.ones(1, 6, 1))
    for old, new in (("advantage", ("agent", "adv")), ("value_target", "ret"), ("action_log_prob", "old")):
        td.rename_key_(old, new)
    assert total(loss(td)) == total(expected)


def test_a_compiled_critic_is_one():
    actor, critic = GRUCategoricalActor(5, 3), torch.compile(GRUValueHead(5), backend="eager")
    assert RL2PPOLoss(actor, critic).critic_network is critic
    assert ActorCritic(actor, critic).out_keys[-1] == "state_value"


def test_compiled_loss_gives_the_same_numbers_and_gradients():
    # Dynamo breaks the graph at nn.GRU and goes on. The default backend does so too, but takes a minute here.
    td = data([0.9, 1.1], [1.0, -1.0], [0.0, 1.0])
    td["action"] = torch.tensor([[[0.1, 0.2], [0.3, -0.5]]])
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        loss = RL2PPOLoss(GRUGaussianActor(5, 2, hidden_size=4, init_range=1.0), GRUValueHead(5, hidden_size=4))
        value = total((torch.compile(loss, backend="aot_eager") if compiled else loss)(td))
        value.backward()
        results.append([value.detach(), *(p.grad for p in loss.parameters())])
    for plain, fast in zip(*results, strict=True):
        assert plain.abs().sum() > 0
        assert torch.allclose(plain, fast, rtol=0, atol=1e-6)


# ------------------------------------------------------------ as ClipPPOLoss is used


class Entropy(nn.Module):
    in_keys = (("policy", "entropy"),)

    def forward(self, entropy):
        return {"loss_entropy_term": entropy.mean()}


class Value(nn.Module):
    in_keys = ("state_value",)

    def forward(self, value):
        return {"loss_value": value.mean()}


def _other_bias(loss):
    layer = TensorDictModule(nn.Linear(4, 3), ["actor_features"], ["logits"])
    body = loss.actor_network.module[0]
    body.module[-1] = head(layer, [0.0, 0.0, 1.0])


def _head(loss):
    return loss.actor_network.module[0].module[-1].module


CHANGES = {
    "a module in another's place": _other_bias,
    "a hook on a module": lambda loss: (
        loss.actor_network.module[0]
        .module[-1]
        .register_forward_hook(lambda module, inputs, out: out.set("logits", out["logits"] * 3))
    ),
    "a hook within a head": lambda loss: (
        _head(loss).layers[1].register_forward_hook(lambda module, inputs, out: 0 * out)
    ),
    "a head's weights": lambda loss: setattr(_head(loss).layers[1], "weight", nn.Parameter(torch.randn(3, 4))),
    "a bonus": lambda loss: setattr(loss, "entropy_bonus", True),
    "a term that reads the entropy": lambda loss: loss.terms.append(Entropy()),
    "a term that reads the values": lambda loss: loss.terms.append(Value()),
    "another name of the action": lambda loss: loss.set_keys(action="chosen"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_after_a_first_call_counts(name):
    """The loss keeps the parts of its networks from call to call: they must be those of the networks as they are now."""
    td = data().set("chosen", torch.full((1, 6), 2))
    used, fresh = (RL2PPOLoss(*networks(), critic_coeff=0.0) for _ in range(2))
    before = used(td)
    torch.manual_seed(3)
    CHANGES[name](used)
    torch.manual_seed(3)
    CHANGES[name](fresh)
    after, expected = used(td), fresh(td)
    assert set(after.keys()) == set(expected.keys())
    for key, value in expected.items():
        torch.testing.assert_close(after[key], value)
    assert set(before.keys()) != set(after.keys()) or not torch.equal(before["max_ratio"], after["max_ratio"])


def test_a_hook_on_gradients_that_is_hung_up_later_is_called():
    loss, seen = RL2PPOLoss(*networks()), []
    loss(data())
    _head(loss).register_full_backward_hook(lambda module, by_inputs, by_outputs: seen.append(by_outputs[0].shape))
    loss(data())["loss_objective"].backward()
    assert seen == [(1, 6, 3)]


def test_a_head_of_another_size_says_so():
    actor, _ = networks()
    critic = TensorDictModule(Head(9, 1, init_range=1e-3), ["actor_features"], ["state_value"])
    for run in (lambda loss: loss(data()), lambda loss: Program(loss)(dict(data().items()))):
        with pytest.raises(RuntimeError, match="6x4 and 9x1"):
            run(RL2PPOLoss(actor, critic))


def test_a_loss_is_freed():
    loss = RL2PPOLoss(*networks())
    loss(data())["loss_objective"].backward()
    known = weakref.ref(loss)
    del loss
    gc.collect()
    assert known() is None


class Plain(RL2PPOLoss):
    """Nothing of its own."""


class Tenfold(RL2PPOLoss):
    """A method of TorchRL's is another one."""

    def loss_critic(self, tensordict):
        loss, *more = super().loss_critic(tensordict)
        return 10 * loss, *more


class Longer(RL2PPOLoss):
    def forward(self, tensordict):
        return super().forward(tensordict)


def test_a_loss_below_ours_is_run_part_by_part_unless_it_does_something_else():
    assert Plain(*networks()).why_not_parts() is None
    assert "Longer has a forward of its own" in Longer(*networks()).runs_beside()
    loss, td = Tenfold(*networks()), data()
    assert "['loss_critic'] of ClipPPOLoss" in loss.why_not_parts()
    torch.testing.assert_close(loss(td)["loss_critic"], 10 * Plain(*networks())(td)["loss_critic"])


@pytest.mark.parametrize(
    ("name", "value"), [("normalize_advantage", True), ("loss_critic_type", "smooth_l1"), ("reduction", "sum")]
)
def test_options_that_are_set_later_count(name, value):
    loss, td = RL2PPOLoss(*networks()), data()
    before = loss(td)
    setattr(loss, name, value)
    assert name in loss.why_not_parts()
    after, expected = loss(td), ClipPPOLoss.forward(loss, td)
    for key in ("loss_objective", "loss_critic"):
        assert torch.equal(after[key], expected[key])
    assert not all(torch.equal(before[key], after[key]) for key in ("loss_objective", "loss_critic"))


def test_called_by_keyword():
    loss, td = RL2PPOLoss(*networks(), entropy_bonus=True), data()
    expected = loss(td)
    out = loss(**{key: td[key] for key in td.keys()})
    assert len(out) == len(loss.out_keys)
    for name, value in zip(loss.out_keys, out, strict=True):
        torch.testing.assert_close(value, expected[name])


def test_keywords_hold_what_terms_read():
    class Term(nn.Module):
        in_keys = ("task", "actor_features", ("policy", "entropy"))

        def forward(self, task, features, entropy):
            return {"loss_term": (task * features.sum(-1, keepdim=True)).mean()}

    loss = RL2PPOLoss(*networks(), terms=[Term()])
    assert {"task", "advantage", "value_target", "trans", "is_init"} <= set(loss.in_keys)
    assert not {"actor_features", ("policy", "entropy")} & set(loss.in_keys)
    loss.set_keys(advantage="adv")
    assert {"task", "adv"} <= set(loss.in_keys)


def memoryless(action=3):
    actor = ProbabilisticActor(
        TensorDictModule(nn.Linear(5, action), ["trans"], ["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    return actor, TensorDictModule(nn.Linear(5, 1), ["trans"], ["state_value"])


def test_an_estimator_is_made_where_there_is_no_advantage():
    """Of networks that can be asked step by step, as `ClipPPOLoss` does it."""
    torch.manual_seed(0)
    actor, critic = memoryless()
    td = data(RATIOS).exclude("advantage", "value_target")
    ends = torch.zeros(1, 6, 1, dtype=torch.bool)
    td["next"] = {"reward": torch.ones(1, 6, 1), "done": ends, "terminated": ends, "trans": torch.randn(1, 6, 5)}
    options = {"clip_epsilon": 0.3, "entropy_bonus": False, "critic_coeff": 0.5, "loss_critic_type": "l2"}
    ours, theirs = RL2PPOLoss(actor, critic)(td.clone()), ClipPPOLoss(actor, critic, **options)(td.clone())
    for name in ("loss_objective", "loss_critic"):
        torch.testing.assert_close(ours[name], theirs[name])
    # With a memory that would be wrong, and raises.
    with pytest.raises(KeyError, match="no 'advantage'.*call TrialAdvantage"):
        RL2PPOLoss(*networks())(td)
    loss = RL2PPOLoss(*networks())
    for each in (loss, RL2PPOLoss(actor, loss.critic_network)):
        each.make_value_estimator(ValueEstimators.GAE, deactivate_vmap=True)
        with pytest.raises(ValueError, match=r"GAE would ask the critic, whose memory is \['critic_hidden'\]"):
            each(td.clone())
    loss.make_value_estimator(ValueEstimators.GAE, deactivate_vmap=True, shifted=True)
    assert loss(td.clone())["loss_objective"].isfinite()


def test_networks_without_parameters():
    class Fixed(nn.Module):
        def forward(self, x):
            return x[..., :3]

    actor = ProbabilisticActor(
        TensorDictModule(Fixed(), ["trans"], ["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
    )
    loss = RL2PPOLoss(actor)
    assert list(loss.parameters()) == []
    assert torch.isfinite(loss(data().exclude("value_target"))["loss_objective"])


def test_single_steps_are_refused_where_there_is_a_memory():
    loss = RL2PPOLoss(*networks())
    with pytest.raises(ValueError, match=r"single steps \[6\].*\[\*B, T\]"):
        loss(data()[0])
    # Without a memory steps are steps.
    actor, critic = memoryless()
    RL2PPOLoss(actor, critic)(data()[0])


def test_several_batch_dimensions():
    loss = RL2PPOLoss(*networks())
    flat = torch.cat([data(), data()])
    for name, value in loss(flat.reshape(2, 1, 6)).items():
        if name.startswith("loss_"):
            torch.testing.assert_close(value, loss(flat)[name])


def test_coefficients_in_the_networks_precision():
    torch.manual_seed(0)
    factory = {"hidden_size": 4, "dtype": torch.float64}
    loss = RL2PPOLoss(
        GRUCategoricalActor(5, 3, **factory),
        GRUValueHead(5, **factory),
        entropy_bonus=True,
        entropy_coeff=0.1,
        critic_coeff=0.3,
    )
    # float32's 0.1 is 0.1 + 1.5e-9.
    assert float(loss.entropy_coeff) == 0.1
    assert float(loss.critic_coeff) == 0.3
    assert float(RL2PPOLoss(*networks(), entropy_bonus=True).entropy_coeff) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("clip_epsilon", math.nan),
        ("clip_epsilon", (0.2, math.nan)),
        ("critic_coeff", math.nan),
        ("entropy_coeff", math.nan),
        ("entropy_coeff", -0.1),
    ],
)
def test_numbers_that_are_none(name, value):
    with pytest.raises(ValueError, match=name):
        RL2PPOLoss(*networks(), **{name: value})


@pytest.mark.parametrize("name", ["clip_eps", "value_coef", "loss_critic", "normalise_advantage", "critic_coef"])
def test_options_that_there_are_not_are_refused(name):
    with pytest.raises(TypeError, match=rf"no options \['{name}'\].*'clip_epsilon'.*'terms'"):
        RL2PPOLoss(*networks(), **{name: 0.1})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("entropy_bonus", 0.5, "neither True nor False"),
        ("entropy_bonus", "no", "neither True nor False"),
        ("normalize_advantage", "False", "neither True nor False"),
        ("functional", 1, "neither True nor False"),
    ],
)
def test_flags_that_are_none(name, value, message):
    with pytest.raises(TypeError, match=f"{name}={value!r}.*{message}"):
        RL2PPOLoss(*networks(), **{name: value})
