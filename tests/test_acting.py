"""Policies and transforms of all kinds are called as they are, in a rollout too; and what distribution actions are drawn from."""

import pytest
import torch
from rollouts import Doubled, Guess, Rooms, assert_same, both, homes, make_env, make_policy, named, numbers
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.envs import (
    Compose,
    StepCounter,
    TransformedEnv,
)
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import GRUModule, IndependentNormal, LSTMModule, OneHotCategorical, ProbabilisticActor

from rl2_torchrl import (
    AdaptiveAgent,
    PreviousStep,
    TaskSampler,
    Trial,
)
from rl2_torchrl.envs import (
    BernoulliBandit,
    QuadraticBandit,
    uniform_means,
    uniform_targets,
)
from rl2_torchrl.gradients import parts_of
from rl2_torchrl.modules import (
    CategoricalActions,
    GaussianActions,
    Head,
    LSTMCore,
    MLPEncoder,
    RecurrentActor,
    RunningNorm,
)
from rl2_torchrl.modules.acting import acting_parts
from rl2_torchrl.modules.gru import FastGRUModule
from rl2_torchrl.modules.layers import SkipHead
from rl2_torchrl.rollout import Rollout


class NoBadNews(PreviousStep):
    """Shows no reward below 0, by a step of its own."""

    def _step(self, tensordict, next_tensordict):
        after = super()._step(tensordict, next_tensordict)
        after["trans"][..., -2].clamp_(min=0)
        return after


class NoNews(PreviousStep):
    """Shows no reward at all: a method that its step calls."""

    def combine(self, observations, action, reward, done):
        return super().combine(observations, action, torch.zeros_like(reward), done)


class Lucky(Trial):
    """Ends at a reward of 0, by a step of its own."""

    def _step(self, tensordict, next_tensordict):
        after = super()._step(tensordict, next_tensordict)
        self._set_done(after, after["done"] | (after["reward"] == 0))
        return after


class Short(Trial):
    """Ends at the second step: a method that its step calls."""

    def is_over(self, episode_index, trial_step):
        return trial_step >= 2


class Worthless(TaskSampler):
    """Draws the same task always, by a reset of its own."""

    def _reset_env_preprocess(self, tensordict):
        tensordict = super()._reset_env_preprocess(tensordict)
        return tensordict.set("task", torch.full_like(tensordict["task"], 3.0))


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("base", Doubled),
        ("previous", NoBadNews),
        ("previous", NoNews),
        ("trial", Lucky),
        ("trial", Short),
        ("sampler", Worthless),
    ],
    ids=named,
)
def test_a_class_below_ours_that_does_otherwise(part, kind):
    def make():
        kinds = {"base": Guess, "trial": Trial, "sampler": TaskSampler, "previous": PreviousStep, part: kind}
        trial, sampler = kinds["trial"](episodes=2), kinds["sampler"](numbers, seed=1)
        return TransformedEnv(kinds["base"](batch_size=(4,)), Compose(trial, sampler, kinds["previous"]()))

    (fast, ours), (_, theirs) = both(make, 9)
    assert_same(ours, theirs)
    # The env is called with a TensorDict; among transforms, one goes through all of them.
    named = "the env has _step of its own" if part == "base" else f"{kind.__name__} beside our transforms"
    assert named in fast.reason


def test_a_method_put_on_one_transform_alone():
    def make():
        trial = Trial(episodes=2)
        trial.is_over = lambda episode_index, trial_step: trial_step >= 2
        return TransformedEnv(Guess(batch_size=(4,)), Compose(trial, TaskSampler(numbers, seed=1), PreviousStep()))

    (fast, ours), (_, theirs) = both(make, 9)
    assert_same(ours, theirs)
    assert "Trial beside our transforms" in fast.reason


def categorical(network):
    options = {"in_keys": ["logits"], "distribution_class": torch.distributions.Categorical, "return_log_prob": True}
    return ProbabilisticActor(network, **options)


def torchrls(core_class, **keys):
    """A policy of TorchRL's own modules."""
    core = core_class(input_size=10, hidden_size=8, in_key="trans", out_key="features", python_based=False, **keys)
    return categorical(TensorDictSequential(core, TensorDictModule(nn.Linear(8, 5), ["features"], ["logits"])))


class Reversed(TensorDictSequential):
    """Modules in an order of its own."""

    def forward(self, tensordict):
        for module in reversed(self.module):
            tensordict = module(tensordict)
        return tensordict


class Negative(FastGRUModule):
    """A core with a forward of its own."""

    def forward(self, tensordict):
        tensordict = super().forward(tensordict)
        return tensordict.set("features", -tensordict["features"])


class Timid(ProbabilisticTensorDictModule):
    """Takes no action but the first two."""

    def forward(self, *args, **kwargs):
        tensordict = super().forward(*args, **kwargs)
        return tensordict.set("action", tensordict["action"] % 2)


def with_hook(policy, find):
    find(policy).register_forward_hook(lambda module, args, out: shifted(out))
    return policy


def shifted(out):
    """Makes what follows from ``out`` another one, whatever it is."""
    if isinstance(out, torch.Tensor):
        return out.roll(1, -1) + 0.3
    return (
        out.set("trans", out["trans"] * 0.5)
        if "logits" not in out.keys()
        else out.set("logits", out["logits"].roll(1, -1))
    )


def memoryless(network):
    return categorical(TensorDictModule(network, ["trans"], ["logits"]))


def linear():
    return nn.Linear(10, 5)


POLICIES = {
    "TorchRL's GRU": lambda env: torchrls(GRUModule),
    "TorchRL's LSTM": lambda env: torchrls(LSTMModule, in_keys=None),
    "our GRU by hand": lambda env: torchrls_core(FastGRUModule(10, 8, in_key="trans", out_key="features")),
    "one module": lambda env: TensorDictModule(lambda trans: trans[..., :5].argmax(-1), ["trans"], ["action"]),
    "one module, two entries": lambda env: TensorDictModule(
        lambda trans, left: (trans[..., 3:8].argmax(-1), 2 * left), ["trans", "time_left"], ["action", "twice"]
    ),
    "without memory": lambda env: memoryless(linear()),
    "several layers in one module": lambda env: memoryless(nn.Sequential(nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 5))),
    "hook on all": lambda env: with_hook(make_policy(env), lambda policy: policy),
    "hook on the actor": lambda env: with_hook(make_policy(env), lambda policy: policy.actor),
    "hook within a head": lambda env: with_hook(
        make_policy(env), lambda policy: next(m for m in policy.modules() if isinstance(m, nn.Linear))
    ),
    "hook within an encoder": lambda env: with_hook(
        RecurrentActor.from_env(env, encoder=MLPEncoder, hidden_size=8),
        lambda policy: next(m for m in policy.modules() if isinstance(m, MLPEncoder)).layers[0],
    ),
    "hook on a linear layer": lambda env: with_hook(memoryless(linear()), lambda policy: policy.module[0].module),
    "a sequence with its own forward": lambda env: Reversed(
        TensorDictModule(lambda logits: logits.argmax(-1), ["logits"], ["action"]),
        TensorDictModule(linear(), ["trans"], ["logits"]),
    ),
    "a core with its own forward": lambda env: torchrls_core(Negative(10, 8, in_key="trans", out_key="features")),
    "a distribution with its own forward": lambda env: TensorDictSequential(
        TensorDictModule(linear(), ["trans"], ["logits"]),
        Timid(
            ["logits"],
            ["action"],
            distribution_class=torch.distributions.Categorical,
            default_interaction_type="random",
        ),
    ),
    "a draw that is changed before the env takes it": lambda env: TensorDictSequential(
        memoryless(linear()), TensorDictModule(lambda action: (action + 1) % 5, ["action"], ["action"])
    ),
    "one module, entries by name": lambda env: TensorDictModule(
        lambda trans: {"twice": 2 * trans, "action": trans[..., 3:8].argmax(-1), "more": trans},
        ["trans"],
        ["action", "twice"],
    ),
    "reads whether a trial begins": lambda env: TensorDictModule(
        lambda trans, first, ended: first.long().squeeze(-1) + 2 * ended.long().squeeze(-1),
        ["trans", "is_init", "episode_done"],
        ["action"],
    ),
}


def torchrls_core(core):
    return categorical(TensorDictSequential(core, TensorDictModule(nn.Linear(8, 5), ["features"], ["logits"])))


@pytest.mark.parametrize(
    ("name", "transforms"),
    [*((name, []) for name in POLICIES), ("TorchRL's LSTM", [StepCounter]), ("one module", [StepCounter])],
)
def test_any_policy_plays_as_it_is(name, transforms):
    def make():
        return make_env("guess", *[kind() for kind in transforms], episodes=2)

    def policy(env):
        torch.manual_seed(3)
        return POLICIES[name](env)

    (_, ours), (_, theirs) = both(make, 9, policy, batches=2)
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("guess", "DETERMINISTIC"),
        ("cart pole", "DETERMINISTIC"),
        ("point", "DETERMINISTIC"),
        ("guess", "MODE"),
        ("point", "MEAN"),
    ],
)
def test_actions_without_noise_are_collectors(name, kind):
    (_, ours), (_, theirs) = both(lambda: make_env(name, episodes=2), 7, exploration_type=ExplorationType[kind])
    assert_same(ours, theirs, is_exact=name != "point")


def test_our_policies_need_no_tensordict():
    for name in ("guess", "point", "cart pole"):
        env = make_env(name, episodes=2)
        for wiring in ("own", "memory"):
            assert {part.way for part in acting_parts(make_policy(env, wiring))} <= {"tensors", "core", "distribution"}


# ------------------------------------------------------------ what is sampled

STEPS = 1500


def draws(base, tasks, policy):
    """Actions ``[rows, STEPS]`` of trials of one step."""
    env = TransformedEnv(base, Compose(Trial(steps=1), TaskSampler(tasks, seed=1), PreviousStep()))
    torch.manual_seed(0)
    with set_exploration_type(ExplorationType.RANDOM):
        return Rollout(env, policy, STEPS, ["action"])()["action"]


@pytest.mark.parametrize("one_hot", [False, True])
def test_choices_are_as_frequent_as_their_probabilities(one_hot):
    # The first two rows have the same probabilities, and still draws of their own.
    logits = torch.tensor([[0.0, 1.0, -1.0], [0.0, 1.0, -1.0], [2.0, 0.0, 0.5], [-9.0, -9.0, 0.0]])
    policy = ProbabilisticActor(
        TensorDictModule(lambda trans: logits + 0 * trans[..., :1], ["trans"], ["logits"]),
        in_keys=["logits"],
        distribution_class=OneHotCategorical if one_hot else torch.distributions.Categorical,
        return_log_prob=True,
    )
    base = Rooms(4, one_hot=True) if one_hot else BernoulliBandit(3, batch_size=(4,), seed=0)
    action = draws(base, homes if one_hot else uniform_means(3), policy)
    action = action if one_hot else nn.functional.one_hot(action, 3)
    probs = logits.softmax(-1)
    assert ((action.float().mean(1) - probs).abs() <= 4 * (probs * (1 - probs) / STEPS).sqrt() + 1e-9).all()
    # Two rows, or two steps, agree as often as independent draws do.
    agree = probs[0].square().sum()
    for one, other in ((action[0], action[1]), (action[0, 1:], action[0, :-1])):
        frequency = (one == other).all(-1).float().mean()
        assert abs(frequency - agree) < 4 * (agree * (1 - agree) / len(one)) ** 0.5


def test_gaussian_actions_have_mean_and_scale_of_their_row():
    loc = torch.tensor([[0.0, 5.0], [0.0, 5.0], [-1.0, 0.5]])
    scale = torch.tensor([[0.3, 2.0], [0.3, 2.0], [1.0, 0.1]])
    policy = ProbabilisticActor(
        TensorDictModule(lambda trans: (loc + 0 * trans[..., :1], scale), ["trans"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=IndependentNormal,
        return_log_prob=True,
    )
    action = draws(QuadraticBandit(2, batch_size=(3,), seed=0), uniform_targets(2), policy)
    assert ((action.mean(1) - loc).abs() < 4 * scale / STEPS**0.5).all()
    assert ((action.std(1) / scale - 1).abs() < 4 / (2 * STEPS) ** 0.5).all()
    # Rows, dimensions and steps have noise of their own.
    noise = (action - loc.unsqueeze(1)) / scale.unsqueeze(1)
    flat = noise.transpose(0, 1).flatten(1)  # [STEPS, 6]
    correlation = torch.corrcoef(torch.cat((flat[1:], flat[:-1]), -1).T) - torch.eye(12)
    assert correlation.abs().max() < 5 / STEPS**0.5


LAYERS = {
    "head": lambda: Head(4, 3, init_range=0.5),
    "head, two hidden layers": lambda: Head(4, 3, init_range=0.5, num_cells=[4, 4]),
    "head of tanh": lambda: Head(4, 3, init_range=0.5, num_cells=[5], activation=nn.Tanh),
    "head of ELU": lambda: Head(4, 3, init_range=0.5, num_cells=[5], activation=nn.ELU),
    "wide head": lambda: Head(4, 3, init_range=0.5, num_cells=[257, 5]),
    "head with a skip": lambda: Head(4, 3, init_range=0.5, num_cells=[5], skip_size=2),
    "encoder": lambda: MLPEncoder(4, [5, 3]),
    "encoder of tanh": lambda: MLPEncoder(4, [5], activation=nn.Tanh),
    "Gaussian": lambda: GaussianActions(3).parameters_of(Head(4, 3, init_range=0.5, num_cells=[4])),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_step_of_a_layer_is_its_forward(kind):
    layer = LAYERS[kind]()
    step, alike = layer.step_function(), {"rtol": 1e-5, "atol": 1e-6}
    assert (step == getattr(layer, "by_torch", None)) == (kind == "head of ELU")
    images = torch.randint(256, (6, 4), dtype=torch.uint8)  # which an encoder scales
    for x in (torch.randn(6, 4), torch.randn(4, 6).T, torch.randn(0, 4), *([images] if "encoder" in kind else [])):
        torch.testing.assert_close(step(x), layer(x), **alike)
        with torch.no_grad():  # as TorchRL's loop calls it: the same bits
            torch.testing.assert_close(step(x), layer(x), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, {"num_cells": [5]}, {"num_cells": [5], "skip_size": 2}])
def test_the_step_of_a_head_of_several_entries_is_its_forward(options):
    head = SkipHead(Head(4, 3, init_range=0.5, **options), detach=True)
    inputs = [torch.randn(6, 2), torch.randn(6, 1), torch.randint(256, (6, 1), dtype=torch.uint8)]
    [acting] = acting_parts(TensorDictModule(head, ["features", "a", "b"], ["y"]))
    state = dict(zip(["features", "a", "b"], inputs, strict=True))
    with torch.no_grad():
        acting.make(1)(state)
        torch.testing.assert_close(state["y"], head(*inputs), rtol=0, atol=0)
    torch.testing.assert_close(state["y"], head(*inputs).detach(), rtol=1e-5, atol=1e-6)
    assert acting.make(1).is_kernels is False


class _DoubleNorm(RunningNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class _DoubleHead(Head):
    def forward(self, features):
        return 2 * super().forward(features)


@pytest.mark.parametrize("layer", [_DoubleNorm(4), _DoubleHead(4, 3, init_range=0.5)], ids=["norm", "head"])
def test_a_layer_with_a_forward_of_its_own_acts_and_learns_by_that(layer):
    module, x = TensorDictModule(layer, ["x"], ["y"]), torch.randn(6, 4)
    [acting], [part] = acting_parts(module), parts_of(module)
    acted, learnt = {"x": x}, {"x": x.unsqueeze(1)}
    acting.make(1)(acted)
    part.run(learnt)
    torch.testing.assert_close(acted["y"], layer(x))
    torch.testing.assert_close(learnt["y"].squeeze(1), layer(x))
    assert part.kind == "autograd"


def test_a_layer_that_works_in_place_writes_over_nothing_that_others_read():
    layers = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3))
    [part], x = acting_parts(TensorDictModule(layers, ["x"], ["y"])), torch.randn(6, 4)
    state, expected = {"x": x.clone()}, layers(x.clone())
    part.make(1)(state)
    torch.testing.assert_close(state["y"], expected)
    assert torch.equal(state["x"], x)


def test_a_core_is_not_asked_where_trials_begin():
    # A rollout resets the memory itself.
    [core] = acting_parts(LSTMCore(5, 4))
    assert core.in_keys == ["trans", "hidden", "hidden_cell"]


@pytest.mark.parametrize("ignored", [lambda x: None, torch.sigmoid], ids=["None", "a tensor"])
def test_an_output_that_a_module_drops_is_nowhere(ignored):
    """As `torch.nn.MultiheadAttention` gives weights, or None."""

    def policy(env):
        torch.manual_seed(3)
        size = env.observation_spec["trans"].shape[-1]
        encoder = TensorDictModule(lambda x: (x.sin(), ignored(x), ignored(x)), ["trans"], ["seen", "_", "_"])
        return RecurrentActor({"trans": [size]}, CategoricalActions(5), encoder=encoder, hidden_size=6, init_range=0.5)

    (_, ours), (_, theirs) = both(lambda: make_env("guess", episodes=2), 5, policy, batches=1)
    assert_same(ours, theirs)
    assert "_" not in ours[0].keys()
    agent = AdaptiveAgent.from_policy(policy(env := make_env("guess", episodes=2)), env)
    agent.new_trial()
    assert agent.act(1) in range(5)
