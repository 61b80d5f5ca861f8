"""Policies of parts that keep something in the TensorDict between steps, or give actions before the distribution does."""

from functools import partial

import pytest
import torch
from rollouts import assert_same, batches_of, both, make_env, make_policy
from tensordict import TensorDict
from tensordict.nn import (
    CompositeDistribution,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from torch import nn
from torchrl.data import Unbounded
from torchrl.envs import TensorDictPrimer
from torchrl.modules import (
    IndependentNormal,
    MultiStepActorWrapper,
    OrnsteinUhlenbeckProcessModule,
    ProbabilisticActor,
    set_recurrent_mode,
)
from torchrl.objectives import ClipPPOLoss

from rl2_torchrl import (
    ActorCritic,
    AdaptiveAgent,
    GRUCore,
    GRUValueHead,
    PPOUpdate,
    RL2PPOLoss,
    TrialAdvantage,
    TrialCollector,
    adaptation_curve,
    check_training,
)
from rl2_torchrl.collector import load_rollout_state, rollout_state

ROWS, SIZE = 5, 6  # of "point": 2 numbers seen, 2 of the action, reward and done


def loc_of(features=8):
    torch.manual_seed(5)
    return nn.Linear(features, 2)


def with_memory_of_its_own(env):
    torch.manual_seed(3)
    core = GRUCore(SIZE, 8)
    core.name_entries("trans", "actor_hidden", "actor_features")
    return core


def noisy(env):
    noise = OrnsteinUhlenbeckProcessModule(spec=Unbounded((ROWS, 2)), sigma=0.3, annealing_num_steps=10**9)
    loc = TensorDictModule(loc_of(), ["actor_features"], ["action"])
    return TensorDictSequential(with_memory_of_its_own(env), loc, noise)


class Planned(nn.Module):
    """Three actions ahead."""

    def __init__(self):
        super().__init__()
        self.loc = loc_of(SIZE)

    def forward(self, trans):
        loc = self.loc(trans)
        return torch.stack((loc, loc + 1, loc + 2), -2)


def planning(env):
    return MultiStepActorWrapper(TensorDictModule(Planned(), ["trans"], ["action"]), n_steps=3)


class Given(nn.Module):
    """Mean, scale, and a draw from them, as gSDE's module gives."""

    def __init__(self):
        super().__init__()
        self.loc = loc_of()

    def forward(self, features):
        loc = self.loc(features)
        return loc, torch.ones_like(loc), (loc + torch.randn_like(loc)).detach()


def giving(env, **options):
    given = TensorDictModule(Given(), ["actor_features"], ["loc", "scale", "action"])
    networks = TensorDictSequential(with_memory_of_its_own(env), given)
    drawn = {"distribution_class": IndependentNormal, "default_interaction_type": "random", **options}
    return ProbabilisticActor(networks, in_keys=["loc", "scale"], **drawn)


def composed(env):
    """Of one action by its name, whose parameters are read whole, from the level above them."""
    loc = TensorDictModule(loc_of(), ["actor_features"], [("params", "action", "loc")])
    scale = TensorDictModule(lambda loc: torch.full_like(loc, 0.3), [loc.out_keys[0]], [("params", "action", "scale")])
    options = {"distribution_kwargs": {"distribution_map": {"action": IndependentNormal}}, "return_log_prob": True}
    networks = TensorDictSequential(with_memory_of_its_own(env), loc, scale)
    return ProbabilisticActor(
        networks,
        in_keys=["params"],
        out_keys=["action"],
        distribution_class=CompositeDistribution,
        default_interaction_type="random",
        **options,
    )


@pytest.mark.parametrize("steps", [4, 7])
@pytest.mark.parametrize("trial", [{"episodes": 2}, {"steps": 5}], ids=str)
@pytest.mark.parametrize("policy", [noisy, planning, giving, composed])
def test_batches_are_collectors(policy, trial, steps):
    if policy is planning:
        trial = {"steps": 6}  # all rows must begin together, as the wrapper says itself
    (fast, ours), (_, expected) = both(lambda: make_env("point", **trial), steps, policy)
    assert fast.backend == "tensors"
    assert fast.reason.endswith("of the policy is called with a TensorDict at each step")
    for batch, other in zip(ours, expected, strict=True):
        for key in ("action", "trans", "is_init", ("next", "reward")):
            torch.testing.assert_close(batch[key], other[key], rtol=1e-5, atol=1e-5)


def counting(env):
    """A memory under one name, which the env's own primer begins."""

    class Count(nn.Module):
        def forward(self, trans, count):
            return trans[..., :2].sin() + count, count + 1

    return TensorDictModule(Count(), ["trans", "count"], ["action", "count"])


@pytest.mark.parametrize("trial", [{"episodes": 2}, {"steps": 5}], ids=str)
def test_a_memory_under_one_name_goes_on(trial):
    primer = partial(TensorDictPrimer, {"count": Unbounded((1,))}, expand_specs=True)
    (fast, ours), (_, expected) = both(lambda: make_env("point", primer(), **trial), 7, counting)
    assert "TensorDictPrimer" in fast.reason
    assert_same(ours, expected)
    assert ours[0]["count"].max() > 2


class Remembers(TensorDictModuleBase):
    """A memory under one name, which the module primes itself."""

    in_keys, out_keys = ["trans", "count"], ["action", "count"]

    def make_tensordict_primer(self) -> TensorDictPrimer:
        return TensorDictPrimer({"count": Unbounded((1,))}, default_value=0.5, expand_specs=True)

    def forward(self, tensordict: TensorDict) -> TensorDict:
        count = tensordict["count"]
        return tensordict.set("action", tensordict["trans"][..., :2].sin() + count).set("count", count + 1)


def test_a_memory_under_one_name_that_the_module_primes_goes_on_in_evaluations_too():
    (fast, ours), (_, expected) = both(lambda: make_env("point", episodes=2), 7, lambda env: Remembers())
    assert_same(ours, expected)
    assert "TensorDictPrimer" in fast.reason
    seen = []
    adaptation_curve(
        make_env("point", steps=5), Remembers(), 4, on_step=lambda state: seen.append(state["count"][0].item())
    )
    assert seen[:5] == [1.5, 2.5, 3.5, 4.5, 5.5]


def test_a_module_finds_all_that_the_env_shows():
    class Late(TensorDictModuleBase):
        in_keys, out_keys = ["trans"], ["action"]

        def forward(self, tensordict: TensorDict) -> TensorDict:
            missing = {"time_left", "episode_done", "observation", "done"} - set(tensordict.keys())
            assert not missing, missing
            return tensordict.set("action", tensordict["time_left"].expand(-1, 2).clone())

    def make():
        return make_env("point", steps=5)

    for keep in (None, ["action"]):
        _, batches = batches_of(make(), Late(), 5, "tensors", batches=1, keep=keep)
        assert batches[0]["action"][0, :, 0].tolist() == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])
    adaptation_curve(make(), Late(), 4)


def test_what_counts_its_calls_is_called_at_each_step():
    def norm(env):
        torch.manual_seed(2)
        layers = nn.Sequential(nn.BatchNorm1d(SIZE), nn.Linear(SIZE, 1))
        return ActorCritic(make_policy(env, still=True).actor, TensorDictModule(layers, ["trans"], ["state_value"]))

    (fast, ours), (slow, expected) = both(lambda: make_env("point", steps=5), 5, norm)
    batches, theirs = (
        dict(each.policy.named_buffers())["module.2.module.0.num_batches_tracked"] for each in (fast, slow)
    )
    assert batches == theirs == 1 + 3 * 5  # a collector runs its policy once when it is made
    for batch, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(batch["state_value"], other["state_value"], rtol=1e-4, atol=1e-4)


def test_a_policys_own_generator_is_drawn_from():
    def drawing(env):
        core = with_memory_of_its_own(env)
        loc = TensorDictModule(
            lambda x: (x[..., :2], torch.ones_like(x[..., :2])), ["actor_features"], ["loc", "scale"]
        )
        own = {"distribution_class": IndependentNormal, "default_interaction_type": "random"}
        own["generator"] = torch.Generator().manual_seed(0)
        return ProbabilisticActor(TensorDictSequential(core, loc), ["loc", "scale"], **own)

    drawn = []
    for seed in range(2):
        env = make_env("point", steps=5)
        policy = drawing(env)
        torch.manual_seed(seed)
        _, batches = batches_of(env, policy, 5, "tensors")
        drawn.append(torch.stack([batch["action"] - batch["loc"] for batch in batches]))
    assert torch.equal(*drawn)


def test_a_function_of_tensordicts_is_played_by_collectors_own_loop():
    networks = TensorDictModule(loc_of(SIZE), ["trans"], ["made"])
    policy = TensorDictSequential(networks, lambda tensordict: tensordict.set("action", tensordict["made"].tanh()))
    collector = TrialCollector(make_env("point", steps=5), policy, frames_per_batch=5 * ROWS, total_frames=-1)
    assert "does not name" in collector.reason
    batch = collector.rollout()
    assert torch.equal(batch["action"], batch["made"].tanh())


def test_a_policy_may_come_from_a_factory():
    env = make_env("point", steps=5)
    collector = TrialCollector(env, policy_factory=lambda: noisy(env), frames_per_batch=5 * ROWS, total_frames=-1)
    assert collector.rollout()["action"].shape == (ROWS, 5, 2)
    assert collector.backend == "tensors"


@pytest.mark.parametrize("return_log_prob", [True, False])
def test_an_action_that_is_given_is_scored_alone(return_log_prob):
    policy = giving(None, return_log_prob=return_log_prob)
    _, batches = batches_of(make_env("point", steps=5), policy, 5, "tensors")
    batch = batches[0]
    assert ("action_log_prob" in batch.keys()) == return_log_prob
    if return_log_prob:
        normal = torch.distributions.Normal(batch["loc"], batch["scale"])
        expected = normal.log_prob(batch["action"]).sum(-1)
        torch.testing.assert_close(batch["action_log_prob"], expected)


@pytest.mark.parametrize("backend", ["parts", "autograd"])
def test_the_update_scores_the_actions_that_were_collected(backend):
    env = make_env("point", steps=5)
    actor, critic = giving(env, return_log_prob=True), GRUValueHead.from_env(env, hidden_size=6)
    update = PPOUpdate(RL2PPOLoss(actor, critic), lr=0.0, epochs=1, minibatches=2, backend=backend)
    frames = {"frames_per_batch": 5 * ROWS, "total_frames": -1}
    collector = TrialCollector(env, ActorCritic(actor, critic), keep=update.in_keys, **frames)
    for _ in range(2):
        assert update(collector.rollout())["max_ratio"] == pytest.approx(1, abs=1e-5)
    check_training(collector, update)


def test_no_agent_is_made_of_a_policy_that_gives_actions_before_its_distribution():
    env = make_env("point", steps=5)
    with pytest.raises(TypeError, match="networks and one distribution"):
        AdaptiveAgent.from_policy(giving(env, return_log_prob=True), env)


def test_no_agent_is_made_of_a_memory_under_one_name():
    env = make_env("point", TensorDictPrimer({"count": Unbounded((1,))}, expand_specs=True), steps=5)
    core, counts = (
        with_memory_of_its_own(env),
        TensorDictModule(lambda x, n: (n / 10, n + 1), ["trans", "count"], ["shift", "count"]),
    )
    loc = TensorDictModule(
        lambda x, n: (x[..., :2] + n, torch.ones_like(x[..., :2])), ["actor_features", "shift"], ["loc", "scale"]
    )
    networks = TensorDictSequential(core, counts, loc)
    actor = ProbabilisticActor(networks, ["loc", "scale"], distribution_class=IndependentNormal)
    with pytest.raises(TypeError, match=r"keeps \['count'\] under one name.*RecurrentCore"):
        AdaptiveAgent.from_policy(actor, env)


def test_what_is_left_between_steps_is_part_of_the_state():
    def make():
        env, options = make_env("point", episodes=2), {"frames_per_batch": 4 * ROWS, "total_frames": -1}
        torch.manual_seed(1)
        return TrialCollector(env, noisy(env), **options)

    whole, first = make(), make()
    for each in (whole, first):
        torch.manual_seed(2)
        each.rollout()
    state, env_state = rollout_state(first), first.env.state_dict()
    resumed = make()
    resumed.env.load_state_dict(env_state)
    load_rollout_state(resumed, state)
    torch.manual_seed(4)
    expected = whole.rollout().clone()
    torch.manual_seed(4)
    assert_same([resumed.rollout()], [expected])


class Counts(TensorDictModuleBase):
    """Counts steps under a name that it does not tell of, and acts by the count."""

    in_keys, out_keys = ["trans"], ["action"]

    def forward(self, tensordict: TensorDict) -> TensorDict:
        count = tensordict.get("mine", torch.zeros(ROWS, 1)) + 1
        return tensordict.set("mine", count).set("action", count.expand(-1, 2) / 100)


def test_what_a_module_does_not_name_goes_on_too():
    _, batches = batches_of(make_env("point", steps=5), Counts(), 4, "tensors", batches=2)
    assert [(100 * batch["action"][0, :, 0]).round().tolist() for batch in batches] == [[1, 2, 3, 4], [5, 6, 7, 8]]


def test_in_rows_that_begin_alone_nothing_goes_on():
    (_, ours), (_, expected) = both(lambda: make_env("point", episodes=1), 9, lambda env: Counts())
    assert all(torch.equal(batch["action"], other["action"]) for batch, other in zip(ours, expected, strict=True))
    begun = torch.cat([batch["is_init"] for batch in ours], 1).squeeze(-1)
    assert (begun.any(0) & ~begun.all(0)).any()  # some rows alone
    counts = torch.cat([100 * batch["action"][..., 0] for batch in ours], 1).round()
    assert (counts[begun] == 1).all()


def test_a_sequence_without_any_distribution_plays():
    """tensordict says of it too that it draws nothing."""
    (_, ours), (_, expected) = both(
        lambda: make_env("point", steps=5), 5, lambda env: ProbabilisticTensorDictSequential(Counts())
    )
    assert all(torch.equal(batch["action"], other["action"]) for batch, other in zip(ours, expected, strict=True))


def test_after_a_reset_nothing_goes_on():
    env = make_env("point", steps=5)
    collector = TrialCollector(env, Counts(), frames_per_batch=3 * ROWS, total_frames=-1)
    for _ in range(2):
        assert (100 * collector.rollout()["action"][0, :, 0]).round().tolist() == [1, 2, 3]
        collector.reset()


def test_a_memory_that_is_not_asked_at_each_step_is_told_of():
    loc = TensorDictModule(nn.Linear(8, 2), ["actor_features"], ["flat"])
    plan = TensorDictModule(lambda flat: flat.unsqueeze(-2).expand(-1, 3, -1), ["flat"], ["action"])
    policy = MultiStepActorWrapper(TensorDictSequential(with_memory_of_its_own(None), loc, plan), n_steps=3)
    with pytest.raises(KeyError, match="one with a memory must see each step"):
        batches_of(make_env("point", steps=6), policy, 6, "tensors")


@pytest.mark.parametrize("how", ["generator", "hook"])
def test_what_only_scores_does_not_draw_whatever_hangs_on_it(how):
    def made(env):
        generator = {"generator": torch.Generator().manual_seed(0)} if how == "generator" else {}
        policy = giving(env, return_log_prob=True, **generator)
        if how == "hook":
            policy[-1].register_forward_hook(lambda *args: None)
        return policy

    (_, ours), (_, expected) = both(lambda: make_env("point", steps=5), 5, made)
    for batch, other in zip(ours, expected, strict=True):
        for key in ("action", "action_log_prob"):
            torch.testing.assert_close(batch[key], other[key], rtol=1e-5, atol=1e-5)


def test_an_entry_that_is_read_whole_is_no_part_of_what_is_left():
    light = TensorDictModule(lambda inside: inside["light"].sum(-1, keepdim=True), ["inside"], ["sum"])

    class Moves(Counts):
        def forward(self, tensordict: TensorDict) -> TensorDict:
            return tensordict.set("mine", tensordict["sum"]).set("action", torch.zeros(3, dtype=torch.int64))

    env = make_env("rooms", episodes=2)
    frames = {"frames_per_batch": 12, "total_frames": -1}
    collector = TrialCollector(env, TensorDictSequential(light, Moves()), keep=["action"], **frames)
    collector.rollout()
    left = rollout_state(collector)["player"]["left"]
    assert "mine" in left
    assert all(isinstance(value, torch.Tensor) for value in left.values())


def test_a_module_that_is_given_a_tensordict_finds_all_of_it():
    """As in TorchRL's `Collector`: also what its in_keys do not name."""

    seen = []

    class Looks(TensorDictSequential):
        def forward(self, tensordict: TensorDict) -> TensorDict:
            seen.append(set(tensordict.keys(True, True)))
            return super().forward(tensordict)

    batches_of(make_env("point", episodes=2), Looks(noisy(None)), 4, "tensors", batches=2)
    read, left = {"trans", "is_init", "actor_hidden"}, {"_ou_prev_noise", "_ou_steps", "action"}
    assert [read <= each for each in seen] == [True] * len(seen)
    assert [left <= each for each in seen[-8:]] == [False] + [True] * 7  # from the first batch to the second, too


def test_a_function_reads_whole_what_one_before_it_has_made():
    def policy(env):
        torch.manual_seed(5)
        parts = TensorDictModule(nn.Linear(SIZE, 2), ["trans"], [("made", "loc")])
        return TensorDictSequential(parts, TensorDictModule(lambda made: made["loc"].sin(), ["made"], ["action"]))

    (_, ours), (_, expected) = both(lambda: make_env("point", episodes=2), 7, policy)
    assert_same(ours, expected)


def test_a_composite_of_one_action_is_trained_as_clip_ppo_loss_says():
    env = make_env("point", episodes=2)
    actor, critic = composed(env), GRUValueHead.from_env(env, hidden_size=6)
    _, (batch, *_) = batches_of(env, ActorCritic(actor, critic), 7, "tensors")
    batch = TrialAdvantage(critic=critic)(batch)
    loss = RL2PPOLoss(actor, critic)
    theirs = ClipPPOLoss(actor, critic, entropy_bonus=False, critic_coeff=0.5, loss_critic_type="l2")
    with set_recurrent_mode(True):
        expected = theirs(batch.clone())
    found = loss(batch.clone())
    for name in ("loss_objective", "loss_critic"):
        torch.testing.assert_close(found[name], expected[name])
    assert PPOUpdate(loss, lr=1e-3).backend == "autograd"
