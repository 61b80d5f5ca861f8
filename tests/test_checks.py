"""`check_training`: silent on pipelines that are right, and names the rule on faults that are put in by hand."""

import copy
import threading
from functools import partial

import pytest
import torch
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Unbounded
from torchrl.envs import Compose, ExplorationType, InitTracker, SerialEnv, Transform, TransformedEnv, VecNormV2
from torchrl.modules import GRUModule, ProbabilisticActor, recurrent_mode, set_recurrent_mode
from torchrl.objectives import ClipPPOLoss

from rl2_torchrl import (
    ActorCritic,
    FastGRUModule,
    GRUCategoricalActor,
    GRUGaussianActor,
    GRUValueHead,
    MemoryValueHead,
    PPOUpdate,
    PreviousStep,
    RL2PPOLoss,
    TaskSampler,
    Trial,
    TrialAdvantage,
    TrialCollector,
    orthogonal_init_,
    train,
)
from rl2_torchrl.checks import TrainingCheckError, TrainingReport, check_training, inputs, memory, rows
from rl2_torchrl.checks.evidence import Evidence
from rl2_torchrl.envs import (
    BernoulliBandit,
    GymVectorEnv,
    QuadraticBandit,
    TabularMDP,
    random_mdps,
    uniform_means,
    uniform_targets,
)

ROWS, ARMS, STATES, ACTIONS, EPISODE, EPISODES = 16, 3, 3, 2, 4, 3
TRIAL = EPISODE * EPISODES


def mdp_env(transition=None, tasks=None, rows=ROWS, seed=0):
    """Trials of 3 episodes of 4 steps in small MDPs."""
    base = TabularMDP(STATES, ACTIONS, episode_steps=EPISODE, batch_size=(rows,), seed=seed)
    sampler = TaskSampler(tasks or random_mdps(STATES, ACTIONS), seed=seed + 1)
    return TransformedEnv(base, Compose(Trial(episodes=EPISODES), sampler, transition or PreviousStep()))


def bandit_env(tasks=None, seed=1):
    transforms = Compose(Trial(episodes=5), TaskSampler(tasks or uniform_means(ARMS), seed=seed), PreviousStep())
    return TransformedEnv(BernoulliBandit(ARMS, batch_size=(ROWS,), seed=0), transforms)


def networks(env, **kwargs):
    torch.manual_seed(0)
    return GRUCategoricalActor.from_env(env, hidden_size=8, **kwargs), GRUValueHead.from_env(env, hidden_size=8)


def pipeline(env, actor=None, critic=None, *, steps=2 * TRIAL, policy=None, loss=None, primers=True, **options):
    """TorchRL's collector, and an update of ``actor`` and ``critic``."""
    if actor is None:
        actor, critic = networks(env)
    policy = policy or ActorCritic(actor, critic)
    frames = {"frames_per_batch": env.batch_size.numel() * steps, "total_frames": -1}
    collector = Collector(env, policy, auto_register_policy_transforms=primers, **frames)
    return collector, PPOUpdate(loss or RL2PPOLoss(actor, critic), minibatches=2, epochs=1, **options)


def first_batch(collector):
    return next(iter(collector)).clone()


def broken_rule(collector, update, batch=None, **kwargs):
    with pytest.raises(TrainingCheckError) as error:
        check_training(collector, update, batch, **kwargs)
    return error.value.rule


# ---- Nothing to find.


@pytest.mark.parametrize("bptt", [None, 1, 2, TRIAL, 2 * TRIAL])
def test_all_rules_hold(bptt):
    collector, update = pipeline(mdp_env(), bptt=bptt)
    report = check_training(collector, update, first_batch(collector), held_out=mdp_env(seed=5))
    unchecked = {"gradient_through_time": "bptt=1 asks for no gradient through time"} if bptt == 1 else {}
    assert report.unchecked == unchecked
    assert len(report.checked) == 23 - len(unchecked)
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


def test_rewards_that_are_all_the_same_are_noted():
    collector, update = pipeline(mdp_env())
    batch = first_batch(collector)
    batch["next", "reward"].fill_(0.5)
    report = TrainingReport()
    assert rows.finite(Evidence(batch, collector, update, None, report)) is None
    assert report.notes == ["all rewards of the batch are 0.5"]


# ---- Faults of the field.


class LosesLastReward(PreviousStep):
    """What a wrapper that resets before the agent looks does."""

    def combine(self, observations, action, reward, done):
        return super().combine(observations, action, reward * ~done, done)


class NeverDone(PreviousStep):
    def combine(self, observations, action, reward, done):
        return super().combine(observations, action, reward, torch.zeros_like(done))


class NoAction(PreviousStep):
    def combine(self, observations, action, reward, done):
        return super().combine(observations, torch.zeros_like(action), reward, done)


class RewardAtStart(PreviousStep):
    def begin(self, observations):
        trans = super().begin(observations)
        trans[..., -2] = 0.5
        return trans


TRANSITIONS = {
    LosesLastReward: "the reward .* where an episode has ended",
    NeverDone: "the done of a step",
    NoAction: "the action of a step",
    RewardAtStart: "at a trial's first step",
}


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_transition_input(transition):
    collector, update = pipeline(mdp_env(transition()))
    with pytest.raises(TrainingCheckError, match=f"transition_input.*{TRANSITIONS[transition]}"):
        check_training(collector, update, first_batch(collector))


def test_done_that_is_never_told_where_the_batch_does_not_tell():
    # Trials of 3 episodes: two ends are told within each.
    collector, update = pipeline(mdp_env(NeverDone()))
    batch = first_batch(collector).exclude(("next", "episode_done"))
    with pytest.raises(TrainingCheckError, match="told 0 times .* trial of 3 episodes"):
        check_training(collector, update, batch)


class OwnInput(Transform):
    """A user's own transition input, which knows of no episode."""

    def _step(self, tensordict, next_tensordict):
        reward, done = next_tensordict["reward"], next_tensordict["episode_done"]
        return next_tensordict.set("trans", torch.cat([torch.rand_like(reward), reward * ~done], -1))

    def _reset(self, tensordict, tensordict_reset):
        zeros = torch.zeros_like(tensordict_reset["done"], dtype=torch.float32)
        return tensordict_reset.set("trans", torch.cat([zeros, zeros], -1))

    def transform_observation_spec(self, observation_spec):
        observation_spec["trans"] = Unbounded((ROWS, 2))
        return observation_spec


def test_last_reward_lost_by_an_input_of_the_users_own():
    collector, update = pipeline(mdp_env(OwnInput()))
    with pytest.raises(TrainingCheckError, match="transition_input.*not where an episode has ended"):
        check_training(collector, update, first_batch(collector))


@pytest.mark.parametrize("bptt", [None, 2])
def test_memory_lost_without_primers(bptt):
    env = TransformedEnv(mdp_env(), InitTracker())
    # As TorchRL's GRUModule, it starts from zeros where it is given no memory.
    core = partial(FastGRUModule, hidden_size=8, in_key="trans", out_key="features")
    actor, critic = GRUCategoricalActor.from_env(env, core=core), GRUValueHead.from_env(env, core=core)
    collector, update = pipeline(env, actor, critic, primers=False, bptt=bptt, steps=TRIAL)
    assert broken_rule(collector, update, first_batch(collector)) == "replay"


def test_memory_lost_in_every_step():
    """Replayed step by step from the lost memory, everything agrees."""
    collector, update = pipeline(mdp_env(), bptt=1)
    batch = first_batch(collector)
    batch["actor_hidden"].zero_()
    with pytest.raises(TrainingCheckError, match="memory_carried.*initial state inside a trial"):
        check_training(collector, update, batch)


def test_a_memory_that_has_been_told_nothing_may_stay_as_it_is():
    """A trial's first input is all 0, and so is what a GRU without biases makes of it, though the critic sees the time left."""
    env = bandit_env()
    actor, critic = networks(env)[0], GRUValueHead.from_env(env, hidden_size=8, extra_keys=["time_left"])
    orthogonal_init_(actor, memory_steps=5)
    collector, update = pipeline(env, actor, critic, steps=5)
    batch = first_batch(collector)
    assert not batch["actor_hidden"][:, 1].any()
    assert batch["time_left"].all()
    check_training(collector, update, batch)


def test_memory_of_the_trial_before():
    collector, update = pipeline(mdp_env(), bptt=1)
    batch = first_batch(collector)
    batch["critic_hidden"][:, TRIAL] = batch["next", "critic_hidden"][:, TRIAL - 1] + 0.1
    with pytest.raises(TrainingCheckError, match="memory_carried.*trials start with different 'critic_hidden'"):
        check_training(collector, update, batch)


class OneLongTrial(TrialAdvantage):
    """Looks at no end but the last."""

    def forward(self, tensordict):
        never = tensordict["next", "done"].clone()
        never[:, :-1] = False
        out = super().forward(tensordict.copy().update({"next": {"done": never, "terminated": never}}))
        return tensordict.update(out.select("advantage", "value_target"))


@pytest.mark.parametrize("options", [{}, {"normalize": False}, {"value_target": "gae"}])
def test_advantages_that_run_into_the_next_task(options):
    collector, update = pipeline(mdp_env(), advantage=OneLongTrial(**options))
    assert broken_rule(collector, update, first_batch(collector)) == "advantages_apart"


@pytest.mark.parametrize("cls", [Collector, TrialCollector])
def test_a_task_that_nobody_draws(cls):
    bandit = BernoulliBandit(ARMS, batch_size=(ROWS,), seed=0)
    env = TransformedEnv(bandit, Compose(Trial(episodes=5), PreviousStep()))
    actor, critic = networks(env)
    options = {"frames_per_batch": 10 * ROWS, "total_frames": 10 * ROWS, "auto_register_policy_transforms": True}
    collector = cls(env, ActorCritic(actor, critic), **options)
    with pytest.raises(
        TrainingCheckError, match="'task_given'.*nobody draws one.*nothing to adapt to: add a TaskSampler"
    ):
        train(collector, PPOUpdate(RL2PPOLoss(actor, critic)), evaluate=None, progress=False)


def test_an_env_that_takes_no_task_needs_none():
    env = TransformedEnv(GymVectorEnv("CartPole-v1", 4), Compose(Trial(steps=10), PreviousStep()))
    collector, update = pipeline(env, steps=20)
    assert "task_given" in check_training(collector, update, first_batch(collector)).checked


def test_one_task_for_all_rows():
    def one_task(batch_size, generator):
        return uniform_means(ARMS)(torch.Size([1]), generator).expand(*batch_size, ARMS)

    collector, update = pipeline(bandit_env(one_task), steps=10)
    assert broken_rule(collector, update, first_batch(collector)) == "tasks_drawn"


def test_the_same_tasks_in_every_draw():
    def seeded(batch_size, generator):
        return uniform_means(ARMS)(batch_size, torch.Generator().manual_seed(0))

    collector, update = pipeline(bandit_env(seeded), steps=10)
    assert broken_rule(collector, update, first_batch(collector)) == "tasks_drawn"


def test_a_task_distribution_that_cannot_be_copied_is_not_drawn_from():
    class Locked:
        def __init__(self):
            self.lock = threading.Lock()

        def __call__(self, batch_size, generator):
            return uniform_means(ARMS)(batch_size, generator)

    collector, update = pipeline(bandit_env(Locked()), steps=10)
    report = check_training(collector, update, first_batch(collector), held_out=bandit_env(seed=2))
    for rule in ("tasks_drawn", "tasks_held_out"):
        assert report.unchecked[rule].startswith("the task distribution cannot be copied")


@pytest.mark.parametrize("seeds", [(7, 7), (7, 8)])
def test_workers_with_the_same_tasks(seeds):
    makers = [lambda seed=seed: mdp_env(rows=8, seed=seed) for seed in seeds]
    env = SerialEnv(2, makers)
    example = mdp_env()
    actor, critic = networks(example)
    collector, update = pipeline(env, actor, critic, steps=TRIAL)
    batch = first_batch(collector)
    if seeds == (7, 7):
        assert broken_rule(collector, update, batch) == "tasks_differ"
    else:
        assert "tasks_differ" in check_training(collector, update, batch).checked


def test_held_out_tasks_of_the_same_seed():
    collector, update = pipeline(bandit_env(), steps=10)
    batch = first_batch(collector)
    same = uniform_means(ARMS)(torch.Size([100]), torch.Generator().manual_seed(1))
    for held_out in (bandit_env(), TaskSampler(uniform_means(ARMS), seed=1), TaskSampler.fixed(same), same):
        assert broken_rule(collector, update, batch, held_out=held_out) == "tasks_held_out"
    assert "tasks_held_out" in check_training(collector, update, batch, held_out=bandit_env(seed=2)).checked


class Hint(Transform):
    """Tells the first numbers of the task."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def _step(self, tensordict, next_tensordict):
        return next_tensordict.set("hint", next_tensordict["task"][..., : self.size].clone())

    def _reset(self, tensordict, tensordict_reset):
        return tensordict_reset.set("hint", tensordict_reset["task"][..., : self.size].clone())

    def transform_observation_spec(self, observation_spec):
        observation_spec["hint"] = Unbounded((ROWS, self.size))
        return observation_spec


def hinted_env(size):
    transforms = Compose(
        Trial(episodes=5), TaskSampler(uniform_means(ARMS), seed=1), Hint(size), PreviousStep(["hint"])
    )
    return TransformedEnv(BernoulliBandit(ARMS, batch_size=(ROWS,), seed=0), transforms)


def test_task_in_the_observation():
    collector, update = pipeline(hinted_env(ARMS), steps=10)
    with pytest.raises(TrainingCheckError, match=r"task_hidden.*all of the task: number 0 of the task is 'trans'\[0\]"):
        check_training(collector, update, first_batch(collector))
    collector, update = pipeline(hinted_env(1), steps=10)
    assert check_training(collector, update, first_batch(collector)).notes == ["number 0 of the task is 'trans'[0]"]


def test_task_that_the_actor_is_given():
    env = bandit_env()
    actor, critic = networks(env)
    seeing = GRUCategoricalActor(ARMS, ARMS, hidden_size=8, in_key="task")
    collector, update = pipeline(env, seeing, critic, steps=10)
    with pytest.raises(TrainingCheckError, match="task_hidden.*the actor reads 'task'"):
        check_training(collector, update, first_batch(collector))


@pytest.mark.parametrize("count", [1, ROWS])
@pytest.mark.parametrize("reduced", [False, True])
def test_statistics_of_each_row(reduced, count):
    norm = VecNormV2(in_keys=["observation"], reduce_batch_dims=reduced)
    env = TransformedEnv(GymVectorEnv("CartPole-v1", count), Compose(Trial(steps=6), norm, PreviousStep()))
    collector, update = pipeline(env, steps=6)
    one = Evidence(first_batch(collector), collector, update, None, TrainingReport())
    found = inputs.one_scale(one)
    assert found == (
        None if reduced or count == 1 else f"VecNormV2 of ['observation'] keeps statistics for each of the {count} rows"
    )


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
    assert broken_rule(collector, update, first_batch(collector)) == "hidden_keys_differ"


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
def test_rounding_in_half_precision_is_no_fault(dtype):
    torch.manual_seed(0)
    trial = Compose(Trial(episodes=10), TaskSampler(uniform_means(10), seed=0), PreviousStep())
    env = TransformedEnv(BernoulliBandit(10, batch_size=(64,), seed=0), trial)
    actor = GRUCategoricalActor.from_env(env, hidden_size=16, dtype=dtype)
    critic = GRUValueHead.from_env(env, hidden_size=16, dtype=dtype)
    update = PPOUpdate(RL2PPOLoss(actor, critic), lr=0.0)
    collector = TrialCollector(env, ActorCritic(actor, critic), frames_per_batch=640, keep=update.in_keys)
    check_training(collector, update)
    update(collector.rollout().clone())
