"""`check_training` names the rule on faults of networks and batches, put in by hand."""

import copy
import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from gymnasium.wrappers import TransformObservation
from pipelines import (
    ACTIONS,
    ARMS,
    ROWS,
    STATES,
    TRIAL,
    bandit_env,
    broken_rule,
    first_batch,
    mdp_env,
    networks,
    pipeline,
)
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Binary, Categorical, Composite, Unbounded
from torchrl.envs import CatFrames, Compose, ExplorationType, TransformedEnv, UnsqueezeTransform
from torchrl.modules import GRUModule, MaskedCategorical, ProbabilisticActor, recurrent_mode, set_recurrent_mode

from rl2_torchrl import (
    ActorCritic,
    GRUCategoricalActor,
    GRUValueHead,
    PPOUpdate,
    PreviousStep,
    RecurrentActor,
    RL2PPOLoss,
    TaskSampler,
    Trial,
    TrialCollector,
)
from rl2_torchrl.checks import TrainingCheckError, TrainingReport, check_training, memory, rows
from rl2_torchrl.checks.evidence import Evidence
from rl2_torchrl.envs import BernoulliBandit, GymVectorEnv, PointRobot, TensorEnv, goals_on_half_circle, uniform_means
from rl2_torchrl.modules import ActionDistribution, TanhGaussianActions

# ---- Faults of networks.


def own_policy(gru, features=8, before=()):
    """An actor of TorchRL's parts around a GRUModule ``gru``, and a critic of ours."""
    torch.manual_seed(0)
    size = STATES + ACTIONS + 2
    head = TensorDictModule(nn.Linear(features, ACTIONS), ["actor_features"], ["logits"])
    body = TensorDictSequential(*before, gru, head)
    actor = ProbabilisticActor(
        body, in_keys=["logits"], distribution_class=torch.distributions.Categorical, return_log_prob=True
    )
    return actor, GRUValueHead(size, hidden_size=8)


def gru_module(cls=GRUModule, in_key="trans"):
    keys = {"in_keys": [in_key, "actor_hidden", "is_init"], "out_keys": ["actor_features", ("next", "actor_hidden")]}
    return cls(input_size=STATES + ACTIONS + 2, hidden_size=8, **keys)


def test_networks_of_torchrls_parts_are_right():
    env = mdp_env()
    collector, update = pipeline(env, *own_policy(gru_module()))
    assert set(check_training(collector, update, first_batch(collector)).unchecked) == {"tasks_held_out"}


class Sees(nn.Module):
    """An encoder that drops all but some ``columns``."""

    def __init__(self, columns):
        super().__init__()
        self.columns, self.layer = columns, nn.Linear(len(columns), 8)

    def forward(self, trans):
        return self.layer(trans[..., self.columns])


TOLD = STATES + ACTIONS  # and then reward and done


@pytest.mark.parametrize(
    ("columns", "dropped"),
    [
        (range(TOLD), "the reward and done in 'trans'"),
        (range(STATES), "the action and reward and done in 'trans'"),
        ([*range(TOLD), TOLD + 1], "the reward in 'trans'"),
    ],
)
def test_an_encoder_that_drops_what_was_earned(columns, dropped):
    env = mdp_env()
    actor = GRUCategoricalActor.from_env(env, encoder=Sees(list(columns)), hidden_size=8)
    collector, update = pipeline(env, actor, networks(env)[1])
    with pytest.raises(TrainingCheckError, match=f"transition_read.*does not depend on {dropped}.*cannot adapt"):
        check_training(collector, update, first_batch(collector))


def test_an_encoder_that_drops_the_ends_of_episodes_is_noted():
    env = mdp_env()
    actor = GRUCategoricalActor.from_env(env, encoder=Sees(list(range(TOLD + 1))), hidden_size=8)
    collector, update = pipeline(env, actor, networks(env)[1])
    report = check_training(collector, update, first_batch(collector))
    assert "transition_read" in report.checked
    assert report.notes == ["what the actor writes does not depend on the done in 'trans'"]


def test_an_actor_that_never_reads_the_transition_input():
    env = mdp_env()
    gru = gru_module(in_key="one_hot")
    gru.gru = nn.GRU(STATES, 8, batch_first=True)
    states = TensorDictModule(lambda state: nn.functional.one_hot(state, STATES).float(), ["observation"], ["one_hot"])
    collector, update = pipeline(env, *own_policy(gru, before=[states]))
    with pytest.raises(TrainingCheckError, match=r"transition_read.*does not read 'trans', but \['observation'\]"):
        check_training(collector, update, first_batch(collector))


def test_an_actor_that_reads_what_is_made_of_the_transition_input():
    """Its last steps, say."""
    env = mdp_env()
    env.append_transform(UnsqueezeTransform(-2, in_keys=["trans"], out_keys=["past"]))
    env.append_transform(CatFrames(3, -2, in_keys=["past"], out_keys=["past"]))
    flat = TensorDictModule(nn.Flatten(-2), ["past"], ["seen"])
    gru = gru_module(in_key="seen")
    gru.gru = nn.GRU(3 * (STATES + ACTIONS + 2), 8, batch_first=True)
    collector, update = pipeline(env, *own_policy(gru, before=[flat]))
    unchecked = check_training(collector, update, first_batch(collector)).unchecked
    assert unchecked["transition_read"] == "the actor reads ['past'], which transforms make of 'trans'"
    assert "transition_input" not in unchecked


class ForgetsEpisodes(GRUModule):
    """Starts anew with every episode."""

    def forward(self, tensordict):
        given = tensordict["is_init"]
        anew = given | (tensordict["trans"][..., -1:] != 0)
        hidden = tensordict.get("actor_hidden", None)
        if hidden is not None:
            tensordict["actor_hidden"] = hidden * ~anew.unsqueeze(-1)
        out = super().forward(tensordict.set("is_init", anew)).set("is_init", given)
        return out if hidden is None else out.set("actor_hidden", hidden)


def test_memory_reset_at_the_ends_of_episodes():
    collector, update = pipeline(mdp_env(), *own_policy(gru_module(ForgetsEpisodes)))
    with pytest.raises(TrainingCheckError, match="memory_used.*after the end of an episode"):
        check_training(collector, update, first_batch(collector))


class NeverStartsAnew(GRUModule):
    def forward(self, tensordict):
        given = tensordict["is_init"]
        return super().forward(tensordict.set("is_init", torch.zeros_like(given))).set("is_init", given)


def scaled_cart_poles(scale):
    def make():
        return TransformObservation(
            gymnasium.make("CartPole-v1"), lambda seen: seen * scale, Box(-np.inf, np.inf, (4,))
        )

    return TransformedEnv(GymVectorEnv(make, ROWS, seed=0), Compose(Trial(steps=10), PreviousStep()))


@pytest.mark.parametrize(("scale", "rule"), [(1e4, "memory_used"), (1e7, "transition_read")])
def test_a_memory_that_large_observations_drown(scale, rule):
    with pytest.raises(TrainingCheckError, match=rf"{rule}.*observations.*normalize=True"):
        check_training(*pipeline(scaled_cart_poles(scale), steps=20))


@pytest.mark.parametrize("scale", [1e4, 1e7])
def test_large_observations_that_networks_will_normalize(scale):
    """Before the first update they know nothing yet, and memories are drowned."""
    env = scaled_cart_poles(scale)
    actor = GRUCategoricalActor.from_env(env, hidden_size=8, normalize=True)
    critic = GRUValueHead.from_env(env, hidden_size=8, normalize=True)
    collector, update = pipeline(env, actor, critic, steps=20)
    check_training(collector, update)
    assert all(norm.count == 0 for norm, _ in update.normalizations())


def test_memory_that_no_trial_resets():
    collector, update = pipeline(mdp_env(), *own_policy(gru_module(NeverStartsAnew)))
    batch = first_batch(collector)
    assert broken_rule(collector, update, batch) == "replay"
    # Where the outputs hardly move, as those of networks that are still to be trained, it shows all the same.
    seen = memory.trials_apart(Evidence(batch, collector, update, None, None))
    assert "'actor_features'" in seen
    assert "depend on the trial before" in seen


class Detached(GRUModule):
    """Back-propagates through one step only."""

    def forward(self, tensordict):
        if not recurrent_mode():
            return super().forward(tensordict)
        hidden, steps = tensordict["actor_hidden"][:, 0], []
        for step in tensordict.unbind(1):
            init = step["is_init"].unsqueeze(-1)
            step = step.copy().set("actor_hidden", torch.where(init, step["actor_hidden"], hidden).detach())
            with set_recurrent_mode(False):
                steps.append(super().forward(step.set("is_init", torch.zeros_like(step["is_init"]))))
            hidden = steps[-1]["next", "actor_hidden"]
        return tensordict.set("actor_features", torch.stack([step["actor_features"] for step in steps], 1))


def test_no_gradient_through_memory():
    collector, update = pipeline(mdp_env(), *own_policy(gru_module(Detached)))
    assert broken_rule(collector, update, first_batch(collector)) == "gradient_through_time"
    collector, update = pipeline(mdp_env(), *own_policy(gru_module(Detached)), bptt=1)
    check_training(collector, update, first_batch(collector))


class RunningNorm(nn.Module):
    """Normalises by statistics that move whenever it is called."""

    def __init__(self):
        super().__init__()
        self.mean, self.count = torch.zeros(STATES + ACTIONS + 2), 1

    def forward(self, x):
        self.count += 1
        self.mean = self.mean + (x.detach().flatten(0, -2).mean(0) - self.mean) / self.count
        return x - self.mean


def test_normalisation_that_moves_within_the_batch():
    norm = RunningNorm()
    before = [TensorDictModule(norm, ["trans"], ["normed"])]
    collector, update = pipeline(mdp_env(), *own_policy(gru_module(in_key="normed"), before=before))
    batch = first_batch(collector)
    count = norm.count
    assert broken_rule(collector, update, batch) == "replay"
    assert norm.count == count


def test_dropout():
    before = [TensorDictModule(nn.Dropout(0.2), ["trans"], ["dropped"])]
    collector, update = pipeline(mdp_env(), *own_policy(gru_module(in_key="dropped"), before=before))
    assert broken_rule(collector, update, first_batch(collector)) == "replay"


def test_actor_and_critic_share_a_hidden_key():
    env = mdp_env()
    actor, _ = networks(env)
    critic = GRUValueHead.from_env(env, hidden_size=8, hidden_key="actor_hidden")
    collector, update = pipeline(env, actor, critic, policy=TensorDictSequential(actor, critic))
    assert broken_rule(collector, update, first_batch(collector)) == "replay"


@pytest.mark.parametrize("network", ["actor_network", "critic_network"])
def test_weights_that_have_changed_since(network):
    collector, update = pipeline(mdp_env())
    batch = first_batch(collector)
    with torch.no_grad():
        next(getattr(update.loss, network).parameters()).mul_(1.01)
    assert broken_rule(collector, update, batch) == "replay"


def test_a_policy_that_is_not_trained():
    env = mdp_env()
    actor, critic = networks(env)
    collector, update = pipeline(env, actor, critic, policy=copy.deepcopy(ActorCritic(actor, critic)))
    assert broken_rule(collector, update, first_batch(collector)) == "policy_is_trained"


def copied_actor(actor, critic):
    return copy.deepcopy(actor), critic


def copied_head(actor, critic):
    """The core is the loss's own, what stands behind it a copy."""
    acting = copy.deepcopy(actor)
    acting.module[0].module[0] = actor.module[0].module[0]
    return acting, critic


def copied_critic(actor, critic):
    return actor, copy.deepcopy(critic)


@pytest.mark.parametrize("acting", [copied_actor, copied_head, copied_critic])
@pytest.mark.parametrize("functional", [True, False])
@pytest.mark.parametrize("make_collector", [TrialCollector, Collector])
def test_a_policy_with_a_copy_of_one_of_the_losss_networks(acting, functional, make_collector):
    env = mdp_env()
    actor, critic = networks(env)
    update = PPOUpdate(RL2PPOLoss(actor, critic, functional=functional), minibatches=2, epochs=1)
    options = {"total_frames": -1, "auto_register_policy_transforms": True} if make_collector is Collector else {}
    policy = ActorCritic(*acting(actor, critic))
    collector = make_collector(env, policy, frames_per_batch=ROWS * TRIAL, **options)
    with pytest.raises(TrainingCheckError, match=r"policy_is_trained.*layers\.1\.weight.*first weights") as error:
        check_training(collector, update, first_batch(collector))
    assert ("gru" in str(error.value)) == (acting is not copied_head)
    assert ("critic_network" in str(error.value)) == (acting is copied_critic)


class WithOneMore(nn.Module):
    """The logits, and behind them a layer that the loss alone reads."""

    def __init__(self, head):
        super().__init__()
        self.head, self.more = head, nn.Linear(8, ACTIONS)

    def forward(self, features):
        return self.head(features) + 0 * self.more(features)


@pytest.mark.parametrize("functional", [True, False])
def test_a_policy_that_is_a_part_of_the_actor(functional):
    env = mdp_env()
    actor, critic = networks(env)
    core, head = actor.module[0].module
    more = TensorDictModule(WithOneMore(head.module), head.in_keys, head.out_keys)
    larger = copy.deepcopy(actor)
    larger.module[0].module = nn.ModuleList([core, more])
    loss = RL2PPOLoss(larger, critic, functional=functional)
    collector, update = pipeline(env, actor, critic, loss=loss)
    assert "policy_is_trained" in check_training(collector, update, first_batch(collector)).checked


def test_a_policy_may_hold_a_copy_of_what_never_changes():
    env = mdp_env()
    actor, critic = networks(env)
    core, head = actor.module[0].module
    acting = copy.deepcopy(actor)
    acting.module[0].module = nn.ModuleList([copy.deepcopy(core.requires_grad_(False)), head])
    collector, update = pipeline(env, actor, critic, policy=ActorCritic(acting, critic))
    assert "policy_is_trained" in check_training(collector, update, first_batch(collector)).checked


def test_parameters_that_no_loss_reaches():
    env = mdp_env()
    actor, critic = networks(env)
    loss = RL2PPOLoss(actor, critic)
    loss.forgotten = nn.Linear(2, 2)
    collector, update = pipeline(env, actor, critic, loss=loss)
    with pytest.raises(TrainingCheckError, match=r"gradients.*\['forgotten.weight', 'forgotten.bias'\]"):
        check_training(collector, update, first_batch(collector))


class Told(nn.Module):
    """The features' size: as a loss, weighed, or without a gradient."""

    in_keys = ["actor_features"]

    def __init__(self, made):
        super().__init__()
        self.made = made

    def forward(self, features):
        return {"loss_size": self.made(features.square().mean()), "size": features.square().mean().detach()}


@pytest.mark.parametrize("made", [torch.Tensor.detach, torch.Tensor.item, lambda size: size, lambda size: 0.0])
def test_a_term_that_trains_nothing(made):
    env = mdp_env()
    actor, critic = networks(env)
    collector, update = pipeline(env, actor, critic, loss=RL2PPOLoss(actor, critic, terms=[Told(made)]))
    if made in (torch.Tensor.detach, torch.Tensor.item):
        with pytest.raises(
            TrainingCheckError, match=r"losses_have_gradients.*\['loss_size'\] are numbers without a gradient"
        ):
            check_training(collector, update, first_batch(collector))
    else:
        assert "losses_have_gradients" in check_training(collector, update, first_batch(collector)).checked


def test_a_collector_that_acts_without_draws():
    collector, update = pipeline(mdp_env())
    batch = first_batch(collector)
    collector.exploration_type = ExplorationType.DETERMINISTIC
    with pytest.raises(TrainingCheckError, match="actions_are_drawn.*exploration_type is DETERMINISTIC"):
        check_training(collector, update, batch)


def test_what_an_env_says_beside_may_be_nan_where_nobody_reads_it():
    collector, update = pipeline(mdp_env())
    batch = first_batch(collector)
    for key in (("info", "distance"), ("next", "info", "distance")):
        batch[key] = torch.full((*batch.shape, 1), torch.nan)
    assert "finite" in check_training(collector, update, batch).checked
    report = TrainingReport()
    update.loss.terms.append(Told(lambda size: size))
    update.loss.terms[0].in_keys = [("info", "distance")]
    assert "('info', 'distance')" in rows.finite(Evidence(batch, collector, update, None, report))


class NeverTheFirst(nn.Linear):
    """A head whose first action is illegal."""

    def forward(self, features):
        return super().forward(features).masked_fill(torch.arange(self.out_features) == 0, -torch.inf)


def test_logits_of_illegal_actions_are_minus_infinity():
    env = bandit_env()
    actor = RecurrentActor.from_env(env, head=TensorDictModule(NeverTheFirst(64, ARMS), ["actor_features"], ["logits"]))
    collector, update = pipeline(env, actor, GRUValueHead.from_env(env, hidden_size=8), steps=10)
    batch = first_batch(collector)
    assert batch["logits"][..., 0].isneginf().all()
    assert {"finite", "replay"} <= set(check_training(collector, update, batch).checked)
    other = batch.clone()
    other["logits"] += 1
    with pytest.raises(TrainingCheckError, match="do not give the collected 'logits' back.* off by up to 1"):
        check_training(collector, update, other)
    other = batch.clone()
    other["action_log_prob"][3, 2] = -torch.inf
    with pytest.raises(TrainingCheckError, match="'action_log_prob' is not finite at row 3, step 2"):
        check_training(collector, update, other)
    for number in (torch.inf, torch.nan):
        other = batch.clone()
        other["logits"][3, 2] = number
        assert broken_rule(collector, update, other) == "replay"


class AllLegal(nn.Linear):
    """A head that hands on which actions are legal, as `MaskedCategorical` asks for them."""

    def forward(self, features, mask):
        return super().forward(features), mask


def test_an_entry_that_a_head_reads_and_hands_on():
    class Pays(TensorEnv):
        def __init__(self):
            shown = Composite(mask=Binary(ARMS, dtype=torch.bool))
            spaces = {"task_spec": Unbounded(ARMS), "observation_spec": shown, "action_spec": Categorical(ARMS)}
            super().__init__(max_episode_steps=1, batch_size=(ROWS,), **spaces)

        def begin(self, task, rows):
            return (task,), {"mask": torch.ones(ROWS, ARMS, dtype=torch.bool)}

        def advance(self, state, action):
            return *self.begin(*state, None), state[0].gather(-1, action.unsqueeze(-1)), None, None

    tasks = TaskSampler(uniform_means(ARMS), seed=0)
    env = TransformedEnv(Pays(), Compose(Trial(episodes=5), tasks, PreviousStep([])))
    head = TensorDictModule(AllLegal(64, ARMS), ["actor_features", "mask"], ["logits", "mask"])
    masked = ActionDistribution(ARMS, ["logits", "mask"], MaskedCategorical)
    actor = RecurrentActor.from_env(env, head=head, distribution=masked)
    collector, update = pipeline(env, actor, GRUValueHead.from_env(env, hidden_size=8), steps=5)
    assert "replay" in check_training(collector, update, first_batch(collector)).checked


def test_parameters_that_the_optimizer_does_not_hold():
    collector, update = pipeline(mdp_env())
    update.optimizer = torch.optim.Adam(update.loss.actor_network.parameters())
    with pytest.raises(TrainingCheckError, match="optimizer.*critic_network"):
        check_training(collector, update, first_batch(collector))


# ---- Faults of batches.


def shuffle_time(batch):
    return batch[:, torch.randperm(batch.shape[1], generator=torch.Generator().manual_seed(0))]


def shuffle_inside_trials(batch):
    order = torch.arange(batch.shape[1])
    order[[2, 5]] = order[[5, 2]]
    return batch[:, order]


def workers_end_to_end(batch):
    half = batch[:, : TRIAL // 2]
    return torch.cat(list(half.split(ROWS // 2)), 1)


def padding(batch):
    mask = torch.ones(batch.shape, dtype=torch.bool)
    mask[0, -2:] = False
    return batch.set(("collector", "mask"), mask)


def nan_reward(batch):
    batch["next", "reward"][3, 2] = torch.nan
    batch["trans"][3, 3, -2] = torch.nan  # the input of the step after
    return batch


def early_end(batch):
    batch["next", "terminated"][3, 2] = True
    return batch


def task_that_changes(batch):
    batch["task"][3, 5:] += 1
    return batch


BATCHES = {
    shuffle_time: "trial_bounds",
    shuffle_inside_trials: "transition_input",
    workers_end_to_end: "trial_bounds",
    padding: "no_padding",
    nan_reward: "finite",
    early_end: "trial_bounds",
    task_that_changes: "task_constant",
}


@pytest.mark.parametrize("fault", BATCHES)
def test_batches(fault):
    collector, update = pipeline(mdp_env())
    assert broken_rule(collector, update, fault(first_batch(collector))) == BATCHES[fault]


def test_padding_of_split_trajectories():
    env = mdp_env()
    actor, critic = networks(env)
    _, update = pipeline(mdp_env(), actor, critic)
    options = {"frames_per_batch": ROWS * (TRIAL + 3), "split_trajs": True, "auto_register_policy_transforms": True}
    collector = Collector(env, ActorCritic(actor, critic), **options)
    assert broken_rule(collector, update, first_batch(collector)) == "no_padding"


def test_the_message_says_what_why_and_what_to_do():
    collector, update = pipeline(mdp_env())
    expected = r"rule 'finite' is broken: \('next', 'reward'\) is not finite at row 3, step 2. One such .* mend the env"
    with pytest.raises(TrainingCheckError, match=expected):
        check_training(collector, update, nan_reward(first_batch(collector)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["choices", "squashed"])  # whose log-probability is float32, as the env's actions are
def test_rounding_in_half_precision_is_no_fault(kind, dtype):
    torch.manual_seed(0)
    if kind == "choices":
        base, tasks, options = BernoulliBandit(10, batch_size=(64,), seed=0), uniform_means(10), {}
    else:
        base, tasks = PointRobot(batch_size=(64,)), goals_on_half_circle()
        options = {"distribution": TanhGaussianActions.from_spec}
    env = TransformedEnv(base, Compose(Trial(steps=10), TaskSampler(tasks, seed=0), PreviousStep()))
    actor = RecurrentActor.from_env(env, hidden_size=16, dtype=dtype, **options)
    critic = GRUValueHead.from_env(env, hidden_size=16, dtype=dtype)
    update = PPOUpdate(RL2PPOLoss(actor, critic), lr=0.0)
    collector = TrialCollector(env, ActorCritic(actor, critic), frames_per_batch=640, keep=update.in_keys)
    check_training(collector, update)
    update(collector.rollout().clone())


@pytest.mark.parametrize(
    ("replayed", "is_same"),
    [
        ([-math.inf, 1.0], True),
        ([0.0, 1.0], False),
        ([-math.inf, math.nan], False),
        ([-math.inf, -math.inf], False),
        ([math.inf, 1.0], False),
        ([-math.inf, 1.5], False),
    ],
)
def test_what_is_replayed_differs_where_only_one_is_infinite_or_nan(replayed, is_same):
    """Logits of illegal actions are minus infinity in both."""
    collected = torch.tensor([-math.inf, 1.0])
    assert (memory._difference(torch.tensor(replayed), collected, set()) is None) == is_same
