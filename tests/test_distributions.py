"""Distributions: ours give their classes' numbers and draws, actors find theirs by the env's action space."""

import math

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    TensorDictModule,
    TensorDictSequential,
    set_interaction_type,
)
from torch import distributions as D
from torch import nn
from torchrl.data import Binary, Bounded, Categorical, MultiCategorical, MultiOneHot, OneHot, Unbounded
from torchrl.envs import Compose, GymEnv, GymWrapper, TransformedEnv
from torchrl.modules import IndependentNormal, NormalParamExtractor, OneHotCategorical, TanhNormal
from torchrl.objectives import ClipPPOLoss

from rl2_torchrl import GRUValueHead, PreviousStep, RL2PPOLoss, TaskSampler, Trial, kernels
from rl2_torchrl.agent.step import actor_of
from rl2_torchrl.envs import BernoulliBandit, QuadraticBandit, uniform_means, uniform_targets
from rl2_torchrl.gradients import ENTROPY, LOG_PROB
from rl2_torchrl.kernels.functions import log_prob_and_entropy
from rl2_torchrl.modules import (
    ActionDistribution,
    CategoricalActions,
    GaussianActions,
    GRUCategoricalActor,
    GRUGaussianActor,
    IndependentCategoricals,
    MultiCategoricalActions,
    RecurrentActor,
    TanhGaussianActions,
    register_distribution,
)
from rl2_torchrl.modules.acting import acting_parts
from rl2_torchrl.modules.distributions import distribution_of, gumbel_
from rl2_torchrl.modules.policy_parts import actor_parts
from rl2_torchrl.rollout import Rollout

LOW, HIGH = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 1.0])
# Class, names and sizes of its parameters, further keywords, whether there are functions of our own for it.
KINDS = {
    "categorical": (D.Categorical, {"logits": 5}, {}, True),
    "one-hot": (OneHotCategorical, {"logits": 5}, {}, True),
    "two categoricals": (IndependentCategoricals, {"logits": 5}, {"nvec": (3, 2)}, True),
    "two one-hot": (
        IndependentCategoricals,
        {"logits": 5},
        {"nvec": (3, 2), "one_hot": True, "dtype": torch.bool},
        True,
    ),
    "normal": (IndependentNormal, {"loc": 2, "scale": 2}, {}, True),
    "tanh normal": (TanhNormal, {"loc": 2, "scale": 2}, {"low": LOW, "high": HIGH}, True),
    "tanh normal of -1 to 1": (TanhNormal, {"loc": 2, "scale": 2}, {}, True),
    "tanh normal, bounded loc": (TanhNormal, {"loc": 2, "scale": 2}, {"tanh_loc": True}, False),
    "probabilities": (D.Categorical, {"probs": 5}, {}, False),
    "beta": (D.Beta, {"concentration1": 1, "concentration0": 1}, {}, False),
}


def build(kind, rows=64, dtype=torch.float32):
    distribution_class, sizes, kwargs, _ = KINDS[kind]
    generator = torch.Generator().manual_seed(1)
    parameters = {key: 2 * torch.randn(rows, size, generator=generator, dtype=dtype) for key, size in sizes.items()}
    for key in parameters:
        if key not in ("logits", "loc"):
            parameters[key] = 0.2 + parameters[key].abs()
    module = ProbabilisticTensorDictModule(
        list(sizes), ["action"], distribution_class=distribution_class, distribution_kwargs=kwargs, return_log_prob=True
    )
    return module, distribution_of(module), parameters


@pytest.mark.parametrize("kind", KINDS)
def test_draws_and_numbers_are_the_classes(kind):
    module, ours, parameters = build(kind)
    assert (type(ours) is not ActionDistribution) == KINDS[kind][3]
    for seed in range(20):
        torch.manual_seed(seed)
        with set_interaction_type(InteractionType.RANDOM):
            td = module(TensorDict(parameters, [64]))
        state = torch.get_rng_state()
        torch.manual_seed(seed)
        action = ours.act(*parameters.values())
        assert torch.equal(torch.get_rng_state(), state)
        assert action.dtype == td["action"].dtype or kind == "one-hot"
        assert torch.equal(action, td["action"])
        log_prob, _ = ours.log_prob_and_entropy(td["action"], *parameters.values())
        torch.testing.assert_close(log_prob, td["action_log_prob"], rtol=1e-5, atol=2e-6)
    with set_interaction_type(InteractionType.DETERMINISTIC):
        assert torch.equal(ours.mode(*parameters.values()), module(TensorDict(parameters, [64]))["action"])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_entropies_are_the_classes(kind):
    module, ours, parameters = build(kind, dtype=torch.float64)
    leaves = [p.requires_grad_() for p in parameters.values()]
    distribution = module.get_dist(TensorDict(parameters, [64]))
    action = distribution.sample()
    log_prob, entropy = ours.log_prob_and_entropy(action, *leaves)
    expected = distribution.log_prob(action)
    slope = torch.randn(log_prob.shape, dtype=torch.float64)
    pairs = [(log_prob, expected)]
    if distribution_has_entropy(distribution):
        pairs.append((entropy, distribution.entropy()))
    else:
        assert entropy is None
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        grads = [
            torch.autograd.grad(out, leaves, slope, retain_graph=True, allow_unused=True) for out in (ours, theirs)
        ]
        for a, b in zip(*grads, strict=True):
            zero = torch.zeros(1, dtype=torch.float64)
            torch.testing.assert_close(
                *((zero if g is None else g).expand(64, -1) for g in (a, b)), rtol=1e-5, atol=1e-6
            )


def distribution_has_entropy(distribution):
    return not isinstance(distribution, TanhNormal)


def test_two_categoricals_by_hand():
    logits = torch.tensor([[0.0, math.log(2.0), 0.0, math.log(3.0), 0.0]])  # 1/4 1/2 1/4, and 3/4 1/4
    choices = IndependentCategoricals(logits, nvec=(3, 2))
    assert choices.mode.tolist() == [[1, 0]]
    torch.testing.assert_close(choices.log_prob(torch.tensor([[1, 1]])), torch.tensor([math.log(1 / 2 * 1 / 4)]))
    entropy = 1.5 * math.log(2) - (0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(choices.entropy(), torch.tensor([entropy]))
    torch.manual_seed(0)
    share = choices.sample((40_000,)).double().mean(0)[0]
    # Standard errors 0.0035 and 0.0022.
    assert share.tolist() == pytest.approx([1.0, 0.25], abs=0.015)


@pytest.mark.parametrize("one_hot", [False, True])
def test_several_choices_as_torchs_own_distributions_of_each(one_hot):
    torch.manual_seed(0)
    logits = torch.randn(4, 5)
    ours = IndependentCategoricals(logits, nvec=(3, 2), one_hot=one_hot)
    theirs = [D.Categorical(logits=part) for part in logits.split((3, 2), -1)]
    drawn = ours.sample((6,))
    choices = torch.stack([part.argmax(-1) for part in drawn.split((3, 2), -1)], -1) if one_hot else drawn
    expected = sum(each.log_prob(choice) for each, choice in zip(theirs, choices.unbind(-1), strict=True))
    torch.testing.assert_close(ours.log_prob(drawn), expected)
    torch.testing.assert_close(ours.expand((6, 4)).log_prob(drawn), expected)


def test_samples_spread_as_the_scale_says_and_unlike_in_each_row():
    ours = distribution_of(build("normal")[0])
    loc, scale = torch.zeros(20_000, 2), torch.tensor([0.5, 3.0]).expand(20_000, 2)
    torch.manual_seed(0)
    action = ours.act(loc, scale)
    # The sample's standard deviation has a standard error of s / sqrt(2 n) = 0.005 s.
    assert action.std(0).tolist() == pytest.approx([0.5, 3.0], rel=0.025)
    assert len(action[:, 0].unique()) > 19_000


def test_a_distribution_of_ones_own():
    class Always(D.Laplace):
        pass

    class AlwaysSeven(ActionDistribution):
        def __init__(self):
            super().__init__(1, ["loc", "scale"], Always)

        def act(self, loc, scale):
            return loc + 7

    register_distribution(Always, AlwaysSeven)
    module = ProbabilisticTensorDictModule(["loc", "scale"], ["action"], distribution_class=Always)
    assert distribution_of(module).act(torch.zeros(2), torch.ones(2)).tolist() == [7, 7]


class Lapses(CategoricalActions):
    """Other numbers than those of the class, which TorchRL's collectors and losses would go on playing."""

    def act(self, logits):
        return super().act(logits / 2)

    def log_prob_and_entropy(self, action, logits):
        return super().log_prob_and_entropy(action, logits / 2)


def test_functions_that_nobody_would_call_are_refused():
    with pytest.raises(
        ValueError,
        match=r"nobody would call .*'act', 'log_prob_and_entropy'.* of Lapses.*register_distribution",
    ):
        RecurrentActor(5, Lapses(3))

    class Named(CategoricalActions):
        """Has no function of its own."""

    RecurrentActor(5, Named(3))
    RecurrentActor(5, Doubled(2, ["logits"], D.Categorical))
    RecurrentActor(5, ActionDistribution(3, ["logits"], D.Categorical))
    with pytest.raises(ValueError, match=r"nobody would call \['act', .* of LaplaceActions"):
        RecurrentActor(5, LaplaceActions(2))


class Doubled(ActionDistribution):
    """Makes more parameters than the head has outputs; acts and scores as the class says."""

    def parameters_of(self, head, **factory):
        return nn.Sequential(head, nn.Linear(2, 5))


class Halves:
    """Plays and scores at twice the temperature, whatever it is mixed into."""

    def act(self, logits):
        return super().act(logits / 2)

    def log_prob_and_entropy(self, action, logits):
        return super().log_prob_and_entropy(action, logits / 2)


def test_other_forms_of_functions_that_a_mixin_changes_are_not_inherited():
    class Halved(Halves, CategoricalActions):
        pass

    class Again(Halved):
        part = CategoricalActions.part

    assert (Halved.part, Halved.noise, Halved.sampler) == (None, None, ActionDistribution.sampler)
    assert (Again.part, Again.noise) == (CategoricalActions.part, None)


class LaplaceActions(GaussianActions):
    """Has a Gaussian's functions, and another class, which nobody would ask by them."""

    def __init__(self, action_dim):
        super().__init__(action_dim)
        self.distribution_class = IndependentLaplace


class IndependentLaplace(D.Independent):
    def __init__(self, loc, scale):
        super().__init__(D.Laplace(loc, scale), 1)


def test_what_is_registered_takes_the_policys_keywords():
    class Rare(D.Laplace):
        pass

    register_distribution(Rare, lambda: ActionDistribution(1, ["loc", "scale"], Rare))
    names, kwargs = ["loc", "scale"], {"validate_args": False}
    module = ProbabilisticTensorDictModule(names, ["action"], distribution_class=Rare, distribution_kwargs=kwargs)
    with pytest.raises(TypeError, match="unexpected keyword argument 'validate_args'"):
        distribution_of(module)


@pytest.mark.parametrize(
    ("spec", "distribution", "told"),
    [
        (Categorical(5), CategoricalActions(4), "gives 4 logits, and the env has 5 choices"),
        (Categorical(5), ActionDistribution(1, ["logits"], D.Categorical), "gives 1 logits, and the env has 5 choices"),
        (MultiCategorical([5]), MultiCategoricalActions((2,)), "gives 2 logits, and the env has 5 choices"),
        (OneHot(5), CategoricalActions(6, one_hot=True), "was made for another env"),
    ],
)
def test_choices_that_would_never_be_played_are_told_of(spec, distribution, told):
    env = of_choices(spec)
    actor = RecurrentActor.from_env(env, distribution=distribution)
    with pytest.raises(ValueError, match=told):
        Rollout(env, actor, 2)()
    RecurrentActor.from_env(env, distribution=ActionDistribution.from_spec(spec))


def of_choices(spec):
    base = BernoulliBandit(5, batch_size=(3,))
    base.action_spec = spec.expand(3, *spec.shape)
    return TransformedEnv(base, Compose(Trial(episodes=2), TaskSampler(uniform_means(5)), PreviousStep()))


def test_a_head_of_too_few_logits_for_several_choices_is_told_of():
    env = of_choices(MultiCategorical([3, 2]))
    actor = RecurrentActor({"trans": env.observation_spec["trans"].shape[1:]}, MultiCategoricalActions((2, 2)))
    with pytest.raises(ValueError, match="gives 4 logits, and the env has 5 choices"):
        Rollout(env, actor, 2)()


class Pinned(D.Categorical):
    """The last of the logits is 0."""

    def __init__(self, logits):
        super().__init__(logits=nn.functional.pad(logits, (0, 1)))


class Joint(D.Categorical):
    """One draw for two places."""


@pytest.mark.parametrize(
    ("spec", "distribution", "head"),
    [
        (Categorical(4), ActionDistribution(3, ["logits"], Pinned), None),
        (Categorical(3, shape=(2,)), ActionDistribution(9, ["logits"], Joint), None),
        (Categorical(5), Doubled(2, ["logits"], D.Categorical), None),
        (Categorical(5), ActionDistribution(1, ["logits"], D.Categorical), nn.Linear(64, 5)),
    ],
)
def test_what_plays_all_choices_by_another_number_of_outputs_plays(spec, distribution, head):
    env = of_choices(spec)
    actor = RecurrentActor.from_env(env, distribution=distribution, head=head)
    if not spec.ndim:  # as a bandit's
        Rollout(env, actor, 2)()


class Coldly(D.Categorical):
    def __init__(self, logits):
        super().__init__(logits=3 * logits)


class ColdActions(CategoricalActions):
    """Choices whose draws and log-probabilities are other ones than those of the class above."""

    def __init__(self, num_actions=1):
        super().__init__(num_actions)
        self.distribution_class = Coldly

    def act(self, logits):
        return super().act(3 * logits)

    def log_prob_and_entropy(self, action, logits):
        return super().log_prob_and_entropy(action, 3 * logits)


def test_a_class_below_ours_plays_and_learns_by_its_own_functions():
    register_distribution(Coldly, ColdActions)
    torch.manual_seed(0)
    actor = RecurrentActor(5, ColdActions(3), hidden_size=8, init_range=1.0)
    [*_, part] = actor_parts(actor, "action", entropy=True)
    logits, action = torch.randn(4, 6, 3), torch.randint(3, (4, 6))
    state = {"logits": logits, "action": action}
    part.forward(state)
    torch.testing.assert_close(state[LOG_PROB], Coldly(logits).log_prob(action))
    torch.testing.assert_close(state[ENTROPY], Coldly(logits).entropy())
    [*_, acting] = acting_parts(actor)
    state = {"logits": torch.tensor([[0.0, 1.0, 0.0]]).expand(20000, 3)}
    with set_interaction_type(InteractionType.RANDOM):
        acting.make(1)(state)
    probability = Coldly(state["logits"][0]).probs[1]
    assert (state["action"] == 1).float().mean() == pytest.approx(float(probability), abs=0.015)
    with pytest.raises(TypeError, match="can act by noise"):  # which would be drawn as the class above draws
        actor_of(actor)


def test_what_is_no_single_action_has_no_functions():
    module = ProbabilisticTensorDictModule(["logits"], ["action"], distribution_class=D.Categorical, num_samples=3)
    assert distribution_of(module) is None


# --------------------------------------------------------------------- from specs
SPECS = {
    "choice": (Categorical(3), CategoricalActions, 3),
    "one-hot": (OneHot(3), CategoricalActions, 3),
    "choices": (MultiCategorical([3, 2]), MultiCategoricalActions, 5),
    "one-hot choices": (MultiOneHot([3, 2]), MultiCategoricalActions, 5),
    "choices of one size": (Categorical(3, shape=(2,)), MultiCategoricalActions, 6),
    "one choice in a vector": (Categorical(3, shape=(1,)), MultiCategoricalActions, 3),
    "switches": (Binary(4), MultiCategoricalActions, 8),
    "reals": (Unbounded(2), GaussianActions, 2),
    "bounded reals": (Bounded(-1, 1, (2,)), GaussianActions, 2),
}


@pytest.mark.parametrize("kind", SPECS)
def test_the_distribution_is_chosen_by_the_action_spec(kind):
    spec, expected, size = SPECS[kind]
    distribution = ActionDistribution.from_spec(spec)
    assert type(distribution) is expected
    assert distribution.num_outputs == size
    actor = RecurrentActor(5, distribution, hidden_size=4)
    td = TensorDict({"trans": torch.zeros(6, 5), "is_init": torch.ones(6, 1, dtype=torch.bool)}, [6])
    for interaction in (InteractionType.RANDOM, InteractionType.DETERMINISTIC):
        with set_interaction_type(interaction):
            out = actor(td.clone())
        assert out["action"].shape == (6, *spec.shape)
        assert out["action_log_prob"].shape == (6,)
        for action in out["action"]:
            assert expected is GaussianActions or spec.is_in(action.to(spec.dtype))  # a Gaussian knows no bounds
            assert action.dtype == spec.dtype or isinstance(spec, OneHot)


def test_specs_without_a_distribution():
    for cls in (ActionDistribution, GaussianActions, CategoricalActions):  # none refers to another that refuses it too
        with pytest.raises(TypeError, match="(?s)whole numbers of a range.*give the env a Discrete"):
            cls.from_spec(Bounded(0, 3, (2,), dtype=torch.int64))
    with pytest.raises(ValueError, match="all finite.*GaussianActions"):
        TanhGaussianActions.from_spec(Unbounded(2))
    with pytest.raises(ValueError, match="all finite"):
        TanhGaussianActions([-math.inf], [1.0])
    with pytest.raises(TypeError, match="not a vector of categorical choices"):
        MultiCategoricalActions.from_spec(Categorical(3))


class Choices(gymnasium.Env):
    """Three steps of whatever the action space asks for."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,))

    def __init__(self, action_space):
        self.action_space = action_space

    def reset(self, seed=None, options=None):
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(np.asarray(action, self.action_space.dtype)), action
        self.steps += 1
        return np.zeros(2, np.float32), 0.0, self.steps == 3, False, {}


@pytest.mark.parametrize("categorical", [True, False])
def test_several_choices_are_played_in_gymnasium(categorical):
    base = GymWrapper(Choices(gymnasium.spaces.MultiDiscrete([3, 2])), categorical_action_encoding=categorical)
    actor = RecurrentActor(4, ActionDistribution.from_spec(base.action_spec_unbatched), hidden_size=4)
    td = base.reset().set("trans", torch.zeros(4)).set("is_init", torch.ones(1, dtype=torch.bool))
    with set_interaction_type(InteractionType.RANDOM):
        for _ in range(5):
            base.step(actor(td))


def test_a_squashed_gaussian_stays_within_the_actions_bounds():
    env = TransformedEnv(GymEnv("Pendulum-v1"), Compose(Trial(steps=3), PreviousStep()))
    torch.manual_seed(0)
    actor = RecurrentActor.from_env(env, distribution=TanhGaussianActions.from_spec, hidden_size=4)
    log_std = dict(actor.named_parameters())["module.0.module.1.module.log_std"]
    log_std.data.fill_(2.0)
    td = TensorDict({"trans": torch.randn(2000, 6), "is_init": torch.ones(2000, 1, dtype=torch.bool)}, [2000])
    with set_interaction_type(InteractionType.RANDOM):
        action = actor(td)["action"]
    assert action.abs().max() <= 2
    assert action.abs().max() > 1.9
    with set_interaction_type(InteractionType.DETERMINISTIC):
        td = actor(td)
    torch.testing.assert_close(td["action"], 2 * td["loc"].tanh())


def test_skip_in_a_gaussian_actor():
    actor = GRUGaussianActor(5, 2, num_cells=[7], skip=True, hidden_size=4)
    td = actor(TensorDict({"trans": torch.randn(3, 5), "is_init": torch.ones(3, 1, dtype=torch.bool)}, [3]))
    head = actor.module[0].module[1].module.mean.head
    read = torch.cat((td["actor_features"].relu(), td["trans"]), -1)
    torch.testing.assert_close(td["loc"], head.layers[1:](read))


def test_a_head_of_ones_own():
    actor = RecurrentActor(5, CategoricalActions(3), head=torch.nn.Linear, hidden_size=4)
    td = actor(TensorDict({"trans": torch.randn(3, 5), "is_init": torch.ones(3, 1, dtype=torch.bool)}, [3]))
    torch.testing.assert_close(td["logits"], actor.module[0].module[1].module(td["actor_features"]))
    with pytest.raises(ValueError, match="those of the default head"):
        RecurrentActor(5, CategoricalActions(3), head=torch.nn.Linear, num_cells=[4])


class LegalMoves(torch.nn.Linear):
    def forward(self, features, legal):
        return super().forward(features).masked_fill(~legal, -torch.inf)


def test_a_head_may_read_further_entries():
    head = TensorDictModule(LegalMoves(4, 3), ["actor_features", "mask"], ["logits"])
    actor = RecurrentActor(5, CategoricalActions(3), head=head, hidden_size=4)
    legal = torch.rand(50, 3) > 0.5
    legal[:, 1] = True
    start = {"trans": torch.randn(50, 5), "is_init": torch.ones(50, 1, dtype=torch.bool)}
    td = actor(TensorDict({**start, "mask": legal}, [50]))
    assert "mask" in actor.in_keys
    assert legal.gather(-1, td["action"].unsqueeze(-1)).all()
    masked = torch.nn.Linear.forward(head.module, td["actor_features"]).masked_fill(~legal, -torch.inf)
    torch.testing.assert_close(td["logits"], masked)
    with pytest.raises(ValueError, match=r"reads \['mask'\], and not the core's features 'actor_features'"):
        RecurrentActor(5, CategoricalActions(3), head=TensorDictModule(LegalMoves(4, 3), ["mask"], ["logits"]))
    with pytest.raises(ValueError, match="of a torch.nn.Module, and this is a TensorDictSequential"):
        RecurrentActor(5, CategoricalActions(3), head=TensorDictSequential(head), hidden_size=4)


def test_a_head_gives_as_many_tensors_as_the_distribution_has_parameters():
    both = ActionDistribution(2, ["loc", "scale"], IndependentNormal)
    actor = RecurrentActor(5, both, head=torch.nn.Linear, hidden_size=4)
    with pytest.raises(ValueError, match=r"1 tensors are given.*2 entries \['loc', 'scale'\]"):
        acting_parts(actor)[-2].make(1)({"actor_features": torch.zeros(2, 4)})


def test_an_actors_module_finds_its_distribution():
    found = distribution_of(GRUCategoricalActor(5, 3, one_hot=True).module[1])
    assert type(found) is CategoricalActions
    assert found.one_hot
    [*_, index, part] = actor_parts(GRUCategoricalActor(5, 3, one_hot=True), "action", entropy=True)
    state = {"action": torch.eye(3, dtype=torch.int64).expand(2, 3, 3), "logits": torch.randn(2, 3, 3)}
    index.forward(state)
    part.forward(state)
    assert part.is_by_hand == (kernels.load(torch.float32) is not None)


@pytest.mark.parametrize("mean", [2.0, 8.0, 10.0])
def test_the_entropy_of_a_squashed_gaussian_falls_as_its_mean_runs_away(mean):
    torch.manual_seed(0)
    actions, scale = TanhGaussianActions([-1.0], [1.0]), torch.full((4000, 1), 0.6)
    loc = torch.full((4000, 1), mean, requires_grad=True)
    entropy = -actions.drawn_log_prob(loc, scale)
    # That of the Gaussian, and the mean of log |d tanh(x) / dx| = 2 log 2 - 2 x - 2 log(1 + exp(-2 x)).
    before = mean + 0.6 * torch.randn(400_000).double()
    expected = (
        0.5 * math.log(2 * math.pi * math.e * 0.36) + 2 * (math.log(2) - before - (-2 * before).exp().log1p()).mean()
    )
    assert entropy.mean().item() == pytest.approx(expected.item(), abs=0.1)
    (gradient,) = torch.autograd.grad(entropy.sum(), loc)
    assert gradient.mean().item() == pytest.approx(-2 * before.tanh().mean().item(), abs=0.05)


def test_the_entropy_bonus_of_squashed_actions_is_what_clip_ppo_loss_has():
    bonuses = []
    for cls in (RL2PPOLoss, ClipPPOLoss):
        torch.manual_seed(0)
        actor, critic = (
            RecurrentActor(3, TanhGaussianActions([-1.0], [1.0]), hidden_size=4),
            GRUValueHead(3, hidden_size=4),
        )
        bias = next(p for name, p in actor.named_parameters() if "bias" in name and p.shape == (1,))
        bias.data.fill_(9.0)
        loss = cls(actor, critic, entropy_bonus=True, entropy_coeff=1.0)
        data = TensorDict({"trans": torch.randn(64, 5, 3), "is_init": torch.ones(64, 5, 1, dtype=torch.bool)}, [64, 5])
        with torch.no_grad():
            data = critic(actor(data))
        data = data.update({"advantage": torch.zeros(64, 5, 1), "value_target": torch.zeros(64, 5, 1)})
        torch.manual_seed(1)
        loss(data)["loss_entropy"].backward()
        bonuses.append(bias.grad.item())
    assert bonuses == pytest.approx([2.0, 2.0], abs=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_forbidden_or_rare_is_not_drawn_in_any_precision(dtype):
    torch.manual_seed(0)
    logits = torch.tensor([[-math.inf, 0.0, -math.inf], [-20.0, 0.0, -20.0]], dtype=dtype).repeat(5000, 1)
    actions = CategoricalActions(3).sampler(20)
    assert all((actions(logits) == 1).all() for _ in range(20))
    logits, actions = torch.tensor([[6.0, 0.0]], dtype=dtype).repeat(20_000, 1), CategoricalActions(2).sampler(20)
    share = torch.stack([actions(logits) for _ in range(20)]).double().mean().item()
    rare = 1 / (1 + math.exp(6))
    assert share == pytest.approx(rare, abs=5 * math.sqrt(rare / 400_000))


def test_gumbel_noise_is_finite_where_a_uniform_number_is_zero(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low=0.0, high=1.0: self.fill_(low))
    assert gumbel_(torch.empty(3)).isfinite().all()


@pytest.mark.parametrize(
    ("low", "high", "is_told"),
    [
        (-1.0, 1.0, False),
        (-2.0, 2.0, False),
        (0.0, 500.0, True),
        (0.0, 1e-3, True),
        (5.0, 6.0, True),
        (-20.0, 20.0, True),
    ],
)
def test_bounds_that_a_gaussian_rarely_meets_are_told_of(low, high, is_told, caplog):
    spec = Bounded(torch.tensor([-1.0, low]), torch.tensor([1.0, high]))
    GaussianActions.from_spec(spec)
    assert (f"actions go from {low:g} to {high:g}" in caplog.text) == is_told
    caplog.clear()
    TanhGaussianActions.from_spec(spec)
    GaussianActions.from_spec(Unbounded(2))
    assert not caplog.text


@pytest.mark.parametrize(("scale", "is_told"), [({}, True), ({"init_log_std": 2.0}, False)])
def test_an_actors_bounds_are_looked_at_with_the_scale_that_it_is_given(scale, is_told, caplog):
    base = QuadraticBandit(2, batch_size=(3,))
    base.action_spec = Bounded(-20.0, 20.0, (3, 2))
    env = TransformedEnv(base, Compose(Trial(episodes=2), TaskSampler(uniform_targets(2)), PreviousStep()))
    GRUGaussianActor.from_env(env, **scale)
    assert ("would hardly be learnt" in caplog.text) == is_told


def test_a_head_that_gives_the_scale_too():
    def head(features, outputs):
        return nn.Sequential(nn.Linear(features, 2 * outputs), NormalParamExtractor())

    data = TensorDict({"trans": torch.zeros(3, 5), "is_init": torch.ones(3, 1, dtype=torch.bool)}, [3])
    with pytest.raises(TypeError, match="must be Tensor, not tuple"):
        RecurrentActor(5, GaussianActions(2), head=head)(data.clone())
    both = ActionDistribution(2, ["loc", "scale"], IndependentNormal)
    assert RecurrentActor(5, both, head=head)(data)["action"].shape == (3, 2)


class Counted(D.Laplace):
    """A distribution that is not registered."""

    scored = 0

    def log_prob(self, value):
        Counted.scored += 1
        return super().log_prob(value).sum(-1)

    @property
    def deterministic_sample(self):
        return self.mean


def test_a_draw_of_any_class_is_scored_once_for_a_batch():
    base = QuadraticBandit(2, batch_size=(3,), seed=0)
    env = TransformedEnv(base, Compose(Trial(episodes=4), TaskSampler(uniform_targets(2)), PreviousStep()))
    laplace = ActionDistribution(2, ["loc"], Counted, {"scale": torch.tensor([0.1, 0.2])})
    rollout = Rollout(env, RecurrentActor.from_env(env, distribution=laplace), 4)
    Counted.scored = 0
    batch = rollout()
    assert Counted.scored == 1
    noise = D.Laplace(batch["loc"], torch.tensor([0.1, 0.2]))
    torch.testing.assert_close(batch["action_log_prob"], noise.log_prob(batch["action"]).sum(-1))


@pytest.mark.parametrize(("nvec", "calls"), [([3] * 8, 1), ([3, 3, 2], 2), ([2, 3, 2], 3)])
@pytest.mark.parametrize("one_hot", [False, True])
def test_choices_of_one_size_are_one_call(nvec, calls, one_hot, monkeypatch):
    seen, logits = [], torch.randn(4, sum(nvec))
    counted = "rl2_torchrl.modules.distributions.log_prob_and_entropy"
    monkeypatch.setattr(counted, lambda *args: seen.append(args) or log_prob_and_entropy(*args))
    actions = MultiCategoricalActions(nvec, one_hot=one_hot)
    action = actions.act(logits)
    parts = [D.Categorical(logits=part) for part in logits.split(nvec, -1)]
    index = torch.stack([part.argmax(-1) for part in action.split(nvec, -1)], -1) if one_hot else action
    due = sum(part.log_prob(choice) for part, choice in zip(parts, index.unbind(-1), strict=True))
    log_prob, entropy = actions.log_prob_and_entropy(action, logits)
    torch.testing.assert_close(log_prob, due)
    torch.testing.assert_close(entropy, sum(part.entropy() for part in parts))
    assert len(seen) == calls
    assert action.shape[-1] == (sum(nvec) if one_hot else len(nvec))


class Calm(ProbabilisticTensorDictModule):
    """Draws what it says itself."""

    def get_dist(self, tensordict, *args, **kwargs):
        return D.Laplace(tensordict["loc"], torch.full_like(tensordict["loc"], 1e-3))


def test_a_class_says_what_it_draws_and_how_it_is_scored():
    module = Calm(["loc", "scale"], ["action"], distribution_class=D.Laplace, return_log_prob=True)
    loc, scale = torch.zeros(3), torch.ones(3)
    action = distribution_of(module).act(loc, scale)
    assert action.abs().max() < 0.1
    log_prob, _ = distribution_of(module).log_prob_and_entropy(action, loc, scale)
    torch.testing.assert_close(log_prob, D.Laplace(loc, 1e-3).log_prob(action))


def test_keywords_of_a_distribution_may_change():
    options = {"distribution_class": D.Laplace, "distribution_kwargs": {"scale": 1e-3}}
    module = ProbabilisticTensorDictModule(["loc"], ["action"], **options)
    distribution = distribution_of(module)
    module.distribution_kwargs["scale"] = 1e3
    assert distribution.act(torch.zeros(30)).abs().max() > 1
