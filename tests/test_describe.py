"""`describe`: all parts of a pipeline in the order of data, with shapes, numbers of parameters and the way that each takes."""

from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from test_transition import Memory
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Composite, Unbounded
from torchrl.envs import Compose, ParallelEnv, TransformedEnv
from torchrl.modules import GRUModule, ProbabilisticActor
from torchrl.objectives import ClipPPOLoss

from rl2_torchrl import (
    ActorCritic,
    GRUCategoricalActor,
    GRUValueHead,
    MemoryValueHead,
    PPOUpdate,
    PreviousStep,
    RL2PPOLoss,
    TaskBelief,
    TaskSampler,
    Trial,
    TrialAdvantage,
    TrialCollector,
    linear_decay,
)
from rl2_torchrl.describe import _env, describe
from rl2_torchrl.envs import GymVectorEnv, TabularMDP, random_mdps

SIZE = 3 + 2 + 2  # a state of 3, an action of 2, reward, done


def mdp_env():
    base = TabularMDP(3, 2, episode_steps=4, batch_size=(6,), seed=0)
    transforms = Compose(Trial(episodes=3, steps=10), TaskSampler(random_mdps(3, 2), seed=1), PreviousStep())
    return TransformedEnv(base, transforms)


def described(actor, critic, *, loss=None, collector_class=TrialCollector, env=None, keep=False, **options):
    env = env or mdp_env()
    update = PPOUpdate(loss or RL2PPOLoss(actor, critic), **{"epochs": 3, "minibatches": 2, **options})
    kwargs = {"keep": update.in_keys} if keep else {}
    policy = ActorCritic(actor, critic)
    collector = collector_class(env, policy, frames_per_batch=60, auto_register_policy_transforms=True, **kwargs)
    return describe(collector, update), update


def networks(**kwargs):
    actor = GRUCategoricalActor(SIZE, 2, hidden_size=4, **kwargs)
    return actor, GRUValueHead(SIZE + 1, hidden_size=4, extra_keys=["time_left"])


def rows_of(description, section):
    return [part for part in description.parts if part.section == section]


def test_a_collector_in_processes_of_ray():
    collector = SimpleNamespace(total_frames=120, frames_per_batch=60)  # what `RayCollector` has of the two
    whole = str(describe(collector, PPOUpdate(RL2PPOLoss(*networks()))))
    assert "60 steps a batch, 120 in all" in whole


def test_parts_stand_in_the_order_in_which_data_flows():
    description, _ = described(*networks())
    sections = list(dict.fromkeys(part.section for part in description.parts))
    assert sections == ["env", "collector", "actor", "critic", "update", "loss"]
    env = {part.name: part.what for part in rows_of(description, "env")}
    assert env["TabularMDP"] == "6 rows on cpu"
    assert env["Trial"] == "a trial is 3 episodes or 10 steps"
    # 3 x 2 mean rewards, 3 x 2 x 3 transition probabilities.
    assert env["TaskSampler"] == "task [24]"
    assert env["PreviousStep"] == "trans [7] = observation 3, action 2, reward 1, done 1"


def test_what_is_scaled_is_said():
    env = TransformedEnv(GymVectorEnv(Memory, 2), Compose(Trial(steps=2), PreviousStep()))
    [told] = [part.what for part in _env(env)[0] if part.name == "PreviousStep"]
    assert told == "trans [8] = observation 4 (uint8 / 255), action 2, reward 1, done 1"


def test_shapes_and_parameters_of_networks():
    description, update = described(*networks())
    gru, head, policy = rows_of(description, "actor")
    # GRU: 3 gates of 4 units, over 7 inputs and 4 units, with two biases each.
    assert gru.parameters == 3 * 4 * (7 + 4 + 2)
    assert gru.what == ("trans [7], actor_hidden [1, 4], is_init [1] -> actor_features [4], next.actor_hidden [1, 4]")
    assert (head.what, head.parameters) == ("actor_features [4] -> logits [2]", 4 * 2 + 2)
    assert (policy.name, policy.what) == ("Categorical", "logits [2] -> action [], action_log_prob []")
    value = rows_of(description, "critic")[-1]
    assert (value.what, value.parameters) == ("critic_features [4] -> state_value [1]", 4 + 1)
    loss = rows_of(description, "loss")
    assert loss[0].parameters == sum(p.numel() for p in update.loss.parameters())
    assert [part.name for part in loss] == ["RL2PPOLoss", "ClippedObjective", "SquaredError"]


class Cube(nn.Module):
    """An activation that nobody knows."""

    def forward(self, x):
        return x**3


def test_a_task_of_several_entries_is_shown_by_them():
    def leaks(batch_size, generator):
        return TensorDict({"leak": torch.zeros(*batch_size, 2), "gain": torch.zeros(*batch_size, 1)}, batch_size)

    spec = Composite(leak=Unbounded(2), gain=Unbounded(1))
    base = GymVectorEnv("CartPole-v1", 2, set_task=lambda env, task: None, task_spec=spec)
    parts, _ = _env(TransformedEnv(base, Compose(Trial(episodes=2), TaskSampler(leaks))))
    assert parts[-1].what == "task.leak [2], task.gain [1]"


@pytest.mark.parametrize("detach", [True, False])
def test_a_critic_on_the_actors_memory_says_whether_it_is_detached(detach):
    actor = GRUCategoricalActor(SIZE, 2, hidden_size=4)
    description, _ = described(actor, MemoryValueHead(4, detach=detach))
    [head] = rows_of(description, "critic")
    assert head.what == "actor_features [4] -> state_value [1]" + ", detached" * detach


def test_which_way_each_part_takes_and_why():
    description, update = described(*networks(activation=Cube))
    gru, head, policy = rows_of(description, "actor")
    assert (gru.backend, gru.reason) == ("kernel", None)
    assert head.backend == "autograd"
    assert "brings no gradient of its own" in head.reason
    assert policy.backend == "kernel"
    assert (rows_of(description, "update")[0].backend, update.backend) == ("parts", "parts")
    assert rows_of(description, "update")[0].reason == f"autograd for these alone: {head.reason}"


def test_a_module_of_the_users_and_a_policy_of_torchrls_parts():
    keys = {"in_keys": ["trans", "actor_hidden", "is_init"], "out_keys": ["features", ("next", "actor_hidden")]}
    gru = GRUModule(input_size=SIZE, hidden_size=4, **keys)
    head = TensorDictModule(nn.Sequential(nn.Linear(4, 2, bias=False)), ["features"], ["logits"])
    options = {"distribution_class": torch.distributions.Categorical, "return_log_prob": True}
    actor = ProbabilisticActor(TensorDictSequential(gru, head), in_keys=["logits"], **options)
    description, _ = described(actor, networks()[1])
    rows = [(part.name, part.parameters, part.backend) for part in rows_of(description, "actor")]
    assert rows == [("GRUModule", 156, "autograd"), ("Sequential", 8, "autograd"), ("Categorical", 0, "kernel")]


@pytest.mark.parametrize("functional", [True, False])
def test_another_loss_runs_whole(functional):
    actor, critic = networks()
    description, update = described(actor, critic, loss=ClipPPOLoss(actor, critic, functional=functional))
    for part in (*rows_of(description, "actor"), *rows_of(description, "critic")):
        assert (part.backend, part.reason) == ("autograd", update.reason)
    assert "[4] -> logits [2]" in rows_of(description, "actor")[1].what


def test_settings_of_the_update():
    advantage = TrialAdvantage(scale_rewards=True)
    description, _ = described(*networks(), advantage=advantage, bptt=5, lr=0.25, max_grad_norm=2.0, shuffle=False)
    whats = {part.name: part.what for part in rows_of(description, "update")}
    assert whats["PPOUpdate"] == "3 epochs of 2 minibatches of chunks of 5 steps, in order"
    assert whats["Adam"] == "lr=0.25, max_grad_norm=2"
    assert whats["TrialAdvantage"] == "gamma=0.99, lmbda=0.97, value_target=return, normalize=True, scale_rewards=True"


def test_learning_rates_of_several_groups():
    loss = RL2PPOLoss(*networks())
    actor, critic = (list(network.parameters()) for network in (loss.actor_network, loss.critic_network))
    groups = [{"params": actor, "lr": 1e-3}, {"params": critic, "lr": 1e-2}]
    description, _ = described(loss.actor_network, loss.critic_network, loss=loss, optimizer=torch.optim.Adam(groups))
    assert rows_of(description, "update")[-1].what == "lr=0.001 and 0.01"


def test_settings_of_the_loss_and_of_what_decays():
    def halved(progress):
        return 0.5

    actor, critic = networks()
    loss = RL2PPOLoss(actor, critic, clip_epsilon=0.1, entropy_bonus=True, entropy_coeff=0.03)
    options = {"lr": 3e-4, "lr_schedule": linear_decay, "entropy_schedule": halved}
    description, _ = described(actor, critic, loss=loss, **options)
    assert rows_of(description, "update")[-1].what == "lr=0.0003, lr_schedule=linear_decay"
    told = "clip_epsilon=0.1, critic_coeff=0.5, entropy_coeff=0.03, entropy_schedule=halved"
    assert rows_of(description, "loss")[0].what == told


def test_settings_that_are_seldom_given():
    actor, critic = networks()
    terms = [TaskBelief(4, 2, coefficient=30.0)]
    loss = RL2PPOLoss(actor, critic, clip_value=0.2, terms=terms)
    description, _ = described(actor, critic, loss=loss, target_kl=0.02)
    assert rows_of(description, "update")[0].what.endswith("of whole rows, drawn at random, target_kl=0.02")
    assert rows_of(description, "loss")[0].what == "clip_epsilon=0.3, critic_coeff=0.5, clip_value=0.2"
    told = {part.name: part.what for part in rows_of(description, "loss")}
    assert told["TaskBelief"] == "reads actor_features, task; coefficient=30"
    assert told["SquaredError"] == "reads state_value, value_target"


def test_what_decays_is_told_as_it_was_given():
    actor, critic = networks()
    loss = RL2PPOLoss(actor, critic, entropy_bonus=True, entropy_coeff=0.03)
    description, update = described(actor, critic, loss=loss, lr_schedule=linear_decay, entropy_schedule=linear_decay)
    update.optimizer.param_groups[0]["lr"] *= 0.5
    update.loss.entropy_coeff.mul_(0.5)
    collector = TrialCollector(mdp_env(), ActorCritic(actor, critic), frames_per_batch=60)
    for section in ("update", "loss"):
        assert rows_of(describe(collector, update), section) == rows_of(description, section)


def test_a_loss_without_a_bonus_and_with_frozen_parameters_says_so():
    actor, critic = networks()
    critic.requires_grad_(False)
    description, _ = described(actor, critic, loss=RL2PPOLoss(actor, critic))
    frozen = sum(parameter.numel() for parameter in critic.parameters())
    assert rows_of(description, "loss")[0].what == f"clip_epsilon=0.3, critic_coeff=0.5, {frozen:,} parameters frozen"


def test_length_of_the_training_and_which_gymnasium_env_plays():
    trials = TransformedEnv(GymVectorEnv("CartPole-v1", 2), Compose(Trial(steps=5), PreviousStep()))
    actor = GRUCategoricalActor.from_env(trials, hidden_size=4)
    critic = GRUValueHead.from_env(trials, hidden_size=4)
    update = PPOUpdate(RL2PPOLoss(actor, critic), minibatches=1)
    collector = TrialCollector(trials, ActorCritic(actor, critic), frames_per_batch=10, total_frames=1000)
    description = describe(collector, update)
    trials.close()
    assert rows_of(describe(collector, update), "env")[0].what == "2 rows on cpu, closed vector env of CartPole-v1"
    collector.shutdown()
    assert rows_of(description, "env")[0].what == "2 rows on cpu, SyncRows of CartPole-v1"
    assert rows_of(description, "collector")[0].what == "10 steps a batch, 5 of each row, 1,000 in all"


@pytest.mark.parametrize("keep", [True, False])
def test_what_the_collector_keeps(keep):
    description, update = described(*networks(), keep=keep)
    collector, kept = rows_of(description, "collector")
    assert collector.what == "60 steps a batch, 10 of each row, without end"
    if keep:
        assert kept.what.split(", ") == [".".join([k] if isinstance(k, str) else k) for k in update.in_keys]
    else:
        assert kept.what == "all entries"


def test_torchrls_collector():
    description, _ = described(*networks(), collector_class=Collector)
    assert rows_of(description, "collector")[0].backend == "tensordicts"


def test_the_table():
    actor, critic = networks()
    next(actor.parameters()).requires_grad_(False)
    lines = str(described(actor, critic)[0]).splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        *("env", "collector", "actor", "critic", "update", "loss")
    ]
    # 3 gates x 4 units x 7 inputs are frozen.
    assert any("84 parameters frozen" in line for line in lines)
    assert not any(line.endswith(" ") for line in lines)
    columns = {line.index("->") for line in lines if "logits [2]" in line and "features" in line}
    assert len(columns) == 1


def test_it_leaves_no_trace(capsys):
    actor, critic = networks()
    state = torch.get_rng_state()
    env = mdp_env()
    update = PPOUpdate(RL2PPOLoss(actor, critic))
    collector = TrialCollector(env, ActorCritic(actor, critic), frames_per_batch=60)
    torch.set_rng_state(state)
    tasks = env.transform[1].get_extra_state().clone()
    capsys.readouterr()
    describe(collector, update)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(env.transform[1].get_extra_state(), tasks)
    assert capsys.readouterr() == ("", "")


def base_mdp():
    return TabularMDP(3, 2, episode_steps=4, batch_size=(6,), seed=0)


def test_an_env_in_other_processes():
    """Whatever it is asked for is looked up there: unwrapping must not ask it for a ``base_env``, for ever."""
    transforms = Compose(Trial(episodes=3), TaskSampler(random_mdps(3, 2), seed=1), PreviousStep())
    env = TransformedEnv(ParallelEnv(1, base_mdp), transforms)
    try:
        name, *_ = [part.name for part in _env(env)[0]]
    finally:
        env.close(raise_if_closed=False)
    assert name == "ParallelEnv"
