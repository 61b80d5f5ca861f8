"""`check_training`: silent on pipelines that are right, and leaves no trace."""

import pytest
import torch
from pipelines import ARMS, ROWS, TRIAL, bandit_env, first_batch, mdp_env, networks, pipeline
from tensordict.nn import TensorDictModule
from torch import distributions, nn
from torchrl.collectors import Collector
from torchrl.envs import Compose, RewardScaling, TransformedEnv
from torchrl.modules import ProbabilisticActor, recurrent_mode
from torchrl.objectives import ClipPPOLoss

from rl2_torchrl import (
    ActorCritic,
    Callback,
    GRUCategoricalActor,
    GRUGaussianActor,
    GRUValueHead,
    MemoryValueHead,
    PPOUpdate,
    PreviousStep,
    RecurrentActor,
    RecurrentCore,
    RL2PPOLoss,
    TaskSampler,
    Trial,
    TrialAdvantage,
    TrialCollector,
    orthogonal_init_,
    train,
)
from rl2_torchrl.checks import TrainingReport, check_training, rows
from rl2_torchrl.checks.evidence import Evidence
from rl2_torchrl.envs import BernoulliBandit, QuadraticBandit, uniform_means, uniform_targets

# ---- Nothing to find.


def test_a_baseline_without_memory_is_told_of_and_checked_for_the_rest(caplog):
    env = TransformedEnv(
        BernoulliBandit(3, batch_size=(8,)), Compose(Trial(episodes=4), TaskSampler(uniform_means(3)), PreviousStep())
    )
    layers = TensorDictModule(nn.Linear(env.observation_spec["trans"].shape[-1], 3), ["trans"], ["logits"])
    actor = ProbabilisticActor(
        layers, in_keys=["logits"], distribution_class=distributions.Categorical, return_log_prob=True
    )
    critic = GRUValueHead.from_env(env, hidden_size=4)
    update = PPOUpdate(RL2PPOLoss(actor, critic))
    assert "That is a baseline" in caplog.text
    collector = TrialCollector(
        env, ActorCritic(actor, critic), frames_per_batch=32, total_frames=64, keep=update.in_keys
    )
    report = check_training(collector, update)
    assert {"memory_used", "gradient_through_time"} <= report.unchecked.keys()
    assert report.unchecked["memory_used"] == "the actor has no memory"


@pytest.mark.parametrize(
    ("scale", "normalize", "is_told"), [(1.0, False, False), (100.0, False, True), (100.0, True, False)]
)
def test_large_rewards_are_told_of_unless_they_are_brought_in_order(scale, normalize, is_told, caplog):
    base = TransformedEnv(BernoulliBandit(3, batch_size=(8,)), RewardScaling(loc=0.0, scale=scale))
    trial = Compose(Trial(episodes=4), TaskSampler(uniform_means(3)), PreviousStep())
    env = TransformedEnv(base, trial, auto_unwrap=False)
    actor, critic = (
        kind.from_env(env, hidden_size=4, normalize=normalize) for kind in (GRUCategoricalActor, GRUValueHead)
    )
    update = PPOUpdate(RL2PPOLoss(actor, critic), TrialAdvantage(scale_rewards=normalize))
    collector = TrialCollector(env, ActorCritic(actor, critic), frames_per_batch=32, total_frames=64)
    with torch.no_grad():  # as around a whole script
        train(collector, update, evaluate=None, progress=False)
    assert ("which drowns the rest" in caplog.text) is is_told


class Counts(RecurrentCore):
    """A core one of whose memories is large, and goes into no layer."""

    def __init__(self, input_size):
        super().__init__(4, {"state": (4,), "count": (1,)}, input_size=input_size)
        self.linear = nn.Linear(input_size, 4)

    def step(self, x, state, count):
        state = torch.tanh(self.linear(x) + state)
        return state, state, count + 1

    def initial_memory(self, num_rows):
        return torch.zeros(num_rows, 4), torch.full((num_rows, 1), 500.0)


@pytest.mark.parametrize(("scale", "is_told"), [(1.0, False), (400.0, True)])
def test_inputs_of_another_order_are_told_of(scale, is_told, caplog):
    """Such as a task in grams that the critic is told, which normalize=True leaves as it is."""
    caplog.set_level("INFO")  # with the whole report, as after other tests

    def tasks(batch_size, generator):
        return scale * uniform_means(3)(batch_size, generator)

    torch.manual_seed(0)
    trial = Compose(Trial(episodes=4), TaskSampler(tasks, seed=0), PreviousStep())
    env = TransformedEnv(QuadraticBandit(3, batch_size=(8,), seed=0), trial)
    actor = RecurrentActor.from_env(env, core=Counts, normalize=True)
    critic = GRUValueHead.from_env(env, hidden_size=4, normalize=True, extra_keys=["task"])
    update = PPOUpdate(RL2PPOLoss(actor, critic), TrialAdvantage(scale_rewards=True), bptt=2)
    collector = TrialCollector(env, ActorCritic(actor, critic), frames_per_batch=32, total_frames=64)
    train(collector, update, evaluate=None, progress=False)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    told = [line for line in warnings if "drowns whatever else the networks read" in line]
    assert [("'task' is around" in line) for line in told] == [True] * is_told


class Teacher(Callback):
    def after_batch(self, batch, progress):
        batch["teacher"] = torch.zeros(*batch.shape, ARMS)


class Imitation(nn.Module):
    in_keys = ["logits", "teacher"]

    def forward(self, logits, teacher):
        return {"loss_imitation": (logits - teacher).square().mean()}


def test_what_a_callback_adds_for_a_term_is_there_when_the_first_batch_is_checked():
    env = bandit_env()
    actor, critic = networks(env)
    update = PPOUpdate(RL2PPOLoss(actor, critic, terms=[Imitation()]), bptt=TRIAL, epochs=1)
    frames = {"frames_per_batch": ROWS * TRIAL, "total_frames": ROWS * TRIAL}
    keep = [key for key in update.in_keys if key != "teacher"]
    collector = TrialCollector(env, ActorCritic(actor, critic), keep=keep, **frames)
    result = train(collector, update, evaluate=None, progress=False, callbacks=[Teacher()])
    assert result.history[-1]["train/loss_imitation"] > 0
    with pytest.raises(KeyError, match="nobody makes.*after_batch.*leave it out"):
        TrialCollector(env, ActorCritic(actor, critic), keep=update.in_keys, **frames)


@pytest.mark.parametrize("bptt", [None, 1, 2, TRIAL, 2 * TRIAL])
def test_all_rules_hold(bptt):
    collector, update = pipeline(mdp_env(), bptt=bptt)
    report = check_training(collector, update, first_batch(collector), held_out=mdp_env(seed=5))
    unchecked = {"gradient_through_time": "bptt=1 asks for no gradient through time"} if bptt == 1 else {}
    assert report.unchecked == unchecked
    assert len(report.checked) == 25 - len(unchecked)
    assert (report.frozen, report.zero_gradient) == ([], [])


def gaussian(env):
    torch.manual_seed(0)
    actor = GRUGaussianActor.from_env(env, hidden_size=8)
    return actor, MemoryValueHead.from_env(env, actor, detach=True, extra_keys=["time_left"])


def orthogonal(env):
    actor, critic = networks(env)
    return orthogonal_init_(actor), orthogonal_init_(critic)


CASES = {
    "continuous, detached critic": (
        lambda: TransformedEnv(
            QuadraticBandit(2, batch_size=(ROWS,), seed=0),
            Compose(Trial(episodes=5), TaskSampler(uniform_targets(2), seed=1), PreviousStep(done_at_start=1.0)),
        ),
        gaussian,
    ),
    "biases 0, and a first input of zeros": (bandit_env, orthogonal),
    "two layers": (bandit_env, lambda env: networks(env, num_layers=2)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("steps", [5, 10, 8])  # one trial, two, and one that the batch cuts
def test_no_false_alarm(case, steps):
    make_env, make_networks = CASES[case]
    env = make_env()
    actor, critic = make_networks(env)
    advantage = TrialAdvantage(critic=ActorCritic(actor, critic))
    collector, update = pipeline(env, actor, critic, steps=steps, advantage=advantage, bptt=steps)
    report = check_training(collector, update, first_batch(collector))
    assert set(report.unchecked) <= {"tasks_held_out", "trials_apart"}


def test_no_false_alarm_on_networks_that_are_trained():
    env = bandit_env()
    actor, critic = networks(env)
    collector, update = pipeline(env, actor, critic, steps=5, lr=0.05)
    for number, batch in enumerate(collector):
        check_training(collector, update, batch)
        if number == 10:
            break
        update(batch)


@pytest.mark.parametrize("loss_class", [RL2PPOLoss, ClipPPOLoss])
@pytest.mark.parametrize("functional", [True, False])
def test_any_loss(loss_class, functional):
    env = mdp_env()
    actor, critic = networks(env)
    collector, update = pipeline(env, actor, critic, loss=loss_class(actor, critic, functional=functional))
    assert set(check_training(collector, update, first_batch(collector)).unchecked) == {"tasks_held_out"}


def test_what_is_not_kept_is_reported_and_checked_alone():
    env = bandit_env()
    actor, critic = networks(env)
    update = PPOUpdate(RL2PPOLoss(actor, critic))
    collector = TrialCollector(env, ActorCritic(actor, critic), frames_per_batch=ROWS * 10, keep=update.in_keys)
    report = check_training(collector, update, next(iter(collector)))
    assert report.unchecked["task_hidden"] == "the batch has no 'task'"
    assert "replay" in report.checked
    assert set(check_training(collector, update).unchecked) == {"tasks_held_out"}
    assert next(iter(collector))["is_init"][:, 0].all()


@pytest.mark.parametrize("cls", [Collector, TrialCollector])
def test_a_collector_that_is_exhausted_is_told(cls):
    env = bandit_env()
    actor, critic = networks(env)
    options = {} if cls is TrialCollector else {"auto_register_policy_transforms": True}
    collector = cls(env, ActorCritic(actor, critic), frames_per_batch=ROWS * 5, total_frames=ROWS * 5, **options)
    batches = list(collector)
    with pytest.raises(ValueError, match="the collector has no batches left"):
        check_training(collector, PPOUpdate(RL2PPOLoss(actor, critic)))
    assert len(batches) == 1


def test_any_callable_is_an_update():
    collector, _ = pipeline(mdp_env())
    report = check_training(collector, lambda batch, progress: {}, first_batch(collector))
    assert {"trial_bounds", "finite", "tasks_differ"} <= set(report.checked)
    assert report.unchecked["replay"] == "the update has no loss"


def test_frozen_parameters_are_named():
    env = mdp_env()
    actor, critic = networks(env)
    weight = next(actor.parameters()).requires_grad_(False)
    collector, update = pipeline(env, actor, critic)
    report = check_training(collector, update, first_batch(collector))
    assert report.frozen == [name for name, p in update.loss.named_parameters() if p is weight]
    assert f"frozen: {report.frozen[0]}" in str(report)


# ---- No trace.


@pytest.mark.parametrize("cls", [Collector, TrialCollector])
def test_training_goes_the_same_way_with_and_without(cls):
    results = []
    for check in (False, True):
        env = bandit_env()
        actor, critic = networks(env)
        update = PPOUpdate(RL2PPOLoss(actor, critic), epochs=2, minibatches=2)
        options = {"keep": update.in_keys} if cls is TrialCollector else {"auto_register_policy_transforms": True}
        collector = cls(env, ActorCritic(actor, critic), frames_per_batch=ROWS * 10, total_frames=ROWS * 30, **options)
        metrics = []
        for number, batch in enumerate(collector):
            if check and number == 0:
                modes = [module.training for module in update.loss.modules()]
                entries = batch.clone()
                check_training(collector, update, batch)
                assert all(p.grad is None for p in update.loss.parameters())
                assert not update.optimizer.state
                assert [module.training for module in update.loss.modules()] == modes
                assert set(batch.keys(True, True)) == set(entries.keys(True, True))
                assert (batch == entries).all()
            metrics.append(update(batch))
        results.append((metrics, [p.detach().clone() for p in update.loss.parameters()], batch.clone()))
    (metrics, parameters, batch), (metrics_checked, parameters_checked, batch_checked) = results
    assert metrics == metrics_checked
    assert all(torch.equal(*pair) for pair in zip(parameters, parameters_checked, strict=True))
    assert (batch == batch_checked).all()
    assert recurrent_mode() in (None, False)


def test_random_numbers_are_put_back():
    env = bandit_env(tasks=lambda batch_size, generator: torch.rand(*batch_size, ARMS))
    collector, update = pipeline(env, steps=10)
    batch, sampler = first_batch(collector), env.transform[1]
    state, tasks = torch.get_rng_state(), sampler.get_extra_state().clone()
    check_training(collector, update, batch, held_out=bandit_env())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(sampler.get_extra_state(), tasks)


def test_rewards_may_be_whole_numbers():
    collector, update = pipeline(bandit_env(), steps=10)
    batch = first_batch(collector)
    whole = batch.clone().set(("next", "reward"), batch["next", "reward"].long())
    assert check_training(collector, update, whole).checked == check_training(collector, update, batch).checked
    assert whole["next", "reward"].dtype is torch.int64


def test_rewards_that_are_all_the_same_are_noted():
    collector, update = pipeline(mdp_env())
    batch = first_batch(collector)
    batch["next", "reward"].fill_(0.5)
    report = TrainingReport()
    assert rows.finite(Evidence(batch, collector, update, None, report)) is None
    assert report.notes == ["all rewards of the batch are 0.5"]
