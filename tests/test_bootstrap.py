"""Trials that are cut by a batch's end, or truncated, go on with the critic's value, by default: by hand, and end to end."""

import re
from functools import partial

import pytest
import torch
from gymnasium.vector import AutoresetMode
from line_envs import lines, theirs, trials
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Categorical, Unbounded
from torchrl.envs import Compose, SerialEnv, TransformedEnv
from torchrl.objectives.value import GAE, TD0Estimator, TDLambdaEstimator

from rl2_torchrl import (
    ActorCritic,
    GRUCategoricalActor,
    GRUValueHead,
    MemoryValueHead,
    PPOUpdate,
    PreviousStep,
    RL2PPOLoss,
    TaskSampler,
    Trial,
    TrialAdvantage,
    TrialCollector,
    train,
)
from rl2_torchrl.checks import TrainingCheckError, check_training
from rl2_torchrl.envs import TensorEnv
from rl2_torchrl.modules import GRUCore, LSTMCore, RecurrentCore
from rl2_torchrl.objectives.advantages import advantages_of


def networks(env, wiring="own"):
    torch.manual_seed(0)
    actor = GRUCategoricalActor.from_env(env, hidden_size=4, init_range=1.0)
    if wiring == "own":
        return actor, GRUValueHead.from_env(env, hidden_size=4, init_range=1.0)
    return actor, MemoryValueHead.from_env(env, actor, detach=False, init_range=1.0)


def collected(env, actor, critic, steps, update, **kwargs):
    frames = steps * env.batch_size.numel()
    collector = TrialCollector(env, ActorCritic(actor, critic), frames_per_batch=frames, total_frames=-1, **kwargs)
    torch.manual_seed(0)
    batches = [batch.clone() for batch, _ in zip(collector, range(2), strict=False)]
    collector.shutdown()
    return batches


@pytest.mark.parametrize("keeps_all", [True, False])
@pytest.mark.parametrize("wiring", ["own", "memory"])
def test_the_value_beyond_a_cut_is_that_of_the_next_batchs_first_step(wiring, keeps_all):
    env = trials(lines(), steps=20)
    actor, critic = networks(env, wiring)
    update = PPOUpdate(RL2PPOLoss(actor, critic), TrialAdvantage(gamma=0.5, lmbda=1.0, normalize=False), bptt=4)
    keep = None if keeps_all else update.in_keys
    first, second = collected(env, actor, critic, 8, update, keep=keep)
    state = torch.get_rng_state()
    found = update.with_advantages(first)["value_target"]
    assert torch.equal(torch.get_rng_state(), state)  # nobody acts beyond the end
    # No trial ends in 8 of 20 steps: each step earns its rewards to come, and the value of the step that comes next.
    target, expected = second["state_value"][:, 0], []
    for reward in reversed(first["next", "reward"].unbind(1)):
        target = reward + 0.5 * target
        expected.append(target)
    torch.testing.assert_close(found, torch.stack(expected[::-1], 1))
    assert update(first)["epochs"] == 10


@pytest.mark.parametrize(
    "make", [lines, lambda: theirs(AutoresetMode.DISABLED), lambda: theirs(AutoresetMode.SAME_STEP)]
)
def test_a_truncated_trial_goes_on_from_its_last_observation(make):
    env = trials(make(), lambda size, generator: torch.full((*size, 1), 9.0), steps=5, truncate=True)
    actor, critic = networks(env)
    update = PPOUpdate(RL2PPOLoss(actor, critic), TrialAdvantage(gamma=0.5, lmbda=0.0, normalize=False))
    batch = collected(env, actor, critic, 10, update)[0]
    ends = batch["next", "truncated"].squeeze(-1)
    assert ends[:, 4::5].all()
    assert not batch["next", "terminated"].any()
    # The walker's place after 5 steps, as the number of steps to the right says; the next trial's first place is 0.
    places = batch["action"].reshape(-1, 5).sum(1).float()
    assert torch.equal(batch["next", "trans"][ends][:, 0], places)
    assert torch.equal(batch["next", "observation"][ends][:, 0], places)
    after = critic(batch["next"][ends].select("trans", "critic_hidden", "is_init"))["state_value"]
    value, reward = batch["state_value"][ends], batch["next", "reward"][ends]
    torch.testing.assert_close(update.with_advantages(batch)["advantage"][ends], reward + 0.5 * after.detach() - value)


@pytest.mark.parametrize("rollout", ["tensors", "tensordicts"])
@pytest.mark.parametrize("wiring", ["own", "memory"])
def test_what_truncated_trials_need_is_kept(wiring, rollout):
    advantages = []
    for keeps_all in (True, False):
        env = trials(lines(), lambda size, generator: torch.full((*size, 1), 9.0), steps=5, truncate=True)
        actor, critic = networks(env, wiring)
        update = PPOUpdate(RL2PPOLoss(actor, critic), TrialAdvantage(gamma=0.5, normalize=False))
        keep = None if keeps_all else update.in_keys
        batch = collected(env, actor, critic, 10, update, keep=keep, rollout=rollout)[0]
        assert ("observation" in batch.keys()) == keeps_all
        advantages.append(update.with_advantages(batch)["advantage"])
    torch.testing.assert_close(*advantages)


def by_hand():
    """r = 1; two trials, of which one ends: v' = 3 beyond the other."""
    false = torch.zeros(2, 2, 1, dtype=torch.bool)
    ended = false.clone()
    ended[0, 1] = True
    following = {
        "reward": torch.ones(2, 2, 1),
        "done": ended,
        "terminated": ended.clone(),
        "seen": torch.full((2, 2, 1), 3.0),
    }
    return TensorDict({"state_value": torch.full((2, 2, 1), 2.0), "next": following}, [2, 2])


def test_values_worked_by_hand():

    advantage = TrialAdvantage(gamma=0.5, lmbda=1.0, value_target="gae", normalize=False)
    advantage.__dict__["stand_in"] = TensorDictModule(torch.nn.Identity(), ["seen"], ["state_value"])
    out = advantage(by_hand())
    # Ended: 1 - 2 = -1, before 1 + 0.5 * 1 - 2 = -0.5. Cut: 1 + 0.5 * 3 - 2 = 0.5, before 1 + 0.5 (1 + 1.5) - 2 = 0.25.
    assert out["advantage"].squeeze(-1).tolist() == [[-0.5, -1.0], [0.25, 0.5]]
    assert out["value_target"].squeeze(-1).tolist() == [[1.5, 1.0], [2.25, 2.5]]
    with pytest.raises(ValueError, match="1 trials are cut by the batch's end"):
        TrialAdvantage()(by_hand())


def test_a_batch_whose_rows_are_its_last_dimension_is_refused():
    env = trials(lines(), steps=4)
    update = PPOUpdate(RL2PPOLoss(*networks(env)))
    batch = collected(env, update.loss.actor_network, update.loss.critic_network, 4, update)[0]
    batch.names = [None, "time"]
    turned = update.with_advantages(batch).transpose(0, 1)
    for reader in (update.advantage, update.loss, update):
        with pytest.raises(ValueError, match=r"named \['time', None\].*rows would be taken for steps"):
            reader(turned)


@pytest.mark.parametrize("wiring", ["own", "memory"])
def test_torchrls_gae_has_room_for_what_is_beyond_truncated_trials_or_is_refused(wiring):
    env = trials(lines(), lambda size, generator: torch.full((*size, 1), 9.0), steps=5, truncate=True)
    actor, critic = networks(env, wiring)
    loss, policy, discounts = RL2PPOLoss(actor, critic), ActorCritic(actor, critic), {"gamma": 0.9, "lmbda": 0.8}
    gae = partial(GAE, **discounts, value_network=policy, shifted=True)
    batch = collected(env, actor, critic, 12, None)[0]
    for reads in (lambda batch: loss(gae()(batch)), PPOUpdate(loss, gae())):
        with pytest.raises(ValueError, match="6 steps have no advantage.*shifted_budget"):
            reads(batch.clone())
    theirs = gae(shifted_budget=3)(batch.clone())
    ours = TrialAdvantage(**discounts, value_target="gae", normalize=False, critic=policy)(batch)
    for key in ("advantage", "value_target"):
        torch.testing.assert_close(theirs[key], ours[key], rtol=0, atol=1e-6)
    loss(theirs)


class Warm(RecurrentCore):
    """Begins with a memory of its own."""

    def __init__(self, input_size):
        super().__init__(4, {"hidden": (4,)}, input_size=input_size)
        self.cell = nn.GRUCell(input_size, 4)

    def initial_memory(self, num_rows):
        return (torch.ones(num_rows, 4),)

    def step(self, x, hidden):
        hidden = self.cell(x, hidden)
        return hidden, hidden


@pytest.mark.parametrize("estimator", [partial(GAE, lmbda=0.8), TD0Estimator, partial(TDLambdaEstimator, lmbda=0.8)])
@pytest.mark.parametrize("core", [GRUCore, LSTMCore, Warm])
@pytest.mark.parametrize("trial", [{"steps": 5}, {"steps": 1, "truncate": True}, {"steps": 1}])
def test_torchrls_estimators_beyond_a_trials_first_step(trial, core, estimator):
    """A row's last step, of 11, or one that is truncated: the critic remembers it, or who would let it forget is refused."""
    env = trials(lines(), lambda size, generator: torch.full((*size, 1), 9.0), **trial)
    actor, _ = networks(env)
    options = {} if core is Warm else {"hidden_size": 4}
    critic = GRUValueHead.from_env(env, core=partial(core, **options), hidden_size=None, init_range=1.0)
    batch = collected(env, actor, critic, 11, None)[0]
    theirs = estimator(gamma=0.9, value_network=critic, shifted=True, shifted_budget=12)
    if core is Warm and trial != {"steps": 1}:  # beyond whose terminal steps nobody looks
        with pytest.raises(
            ValueError, match="rows end with a trial's first step.*Warm begins its memory anew there. Take Trial"
        ):
            advantages_of(theirs, None, batch)
        return
    found = advantages_of(theirs, None, batch.clone())
    lmbda = getattr(theirs, "lmbda", torch.zeros(()))
    ours = TrialAdvantage(gamma=0.9, lmbda=float(lmbda), value_target="gae", normalize=False, critic=critic)(batch)
    torch.testing.assert_close(found["advantage"], ours["advantage"], rtol=0, atol=1e-6)


def test_a_critic_that_is_given_is_asked_and_an_advantage_serves_several_updates():
    env = trials(lines(), steps=4)
    one, other = RL2PPOLoss(*networks(env)), RL2PPOLoss(*networks(env))
    shared = TrialAdvantage()
    updates = [PPOUpdate(loss, shared) for loss in (one, other)]
    for update, loss in zip(updates, (one, other), strict=True):
        assert {id(p) for p in update.stand_in.parameters()} == {id(p) for p in loss.critic_network.parameters()}
        assert update.advantage is shared
        assert not list(shared.parameters())
        assert not any(key[0] == "next" and "hidden" in str(key) for key in update.in_keys)
    given = ActorCritic(one.actor_network, one.critic_network)
    update = PPOUpdate(other, TrialAdvantage(critic=given))
    assert update.stand_in is None
    assert update.advantage.critic is given


@pytest.mark.parametrize("critic_is_given", [False, True])
def test_what_is_not_kept_is_asked_for_once(critic_is_given):
    actor, critic = networks(trials(lines(), steps=20))
    loss, advantage = (
        RL2PPOLoss(actor, critic),
        TrialAdvantage(critic=ActorCritic(actor, critic) if critic_is_given else None),
    )

    def epochs(update):
        batches = collected(trials(lines(), steps=20), actor, critic, 8, update, keep=update.in_keys)
        return [update(batch)["epochs"] for batch in batches]

    lacks = "the batch lacks .*'actor_hidden'" if critic_is_given else "3 trials are cut .*lacks .*'critic_hidden'"
    with pytest.raises(KeyError, match=f"{lacks}.*whole") as error:
        epochs(PPOUpdate(loss, advantage, minibatches=1))
    (advised,) = re.findall(r"PPOUpdate\(..., bptt=(\d+)\)", str(error.value))
    assert epochs(PPOUpdate(loss, advantage, minibatches=1, bptt=int(advised))) == [10, 10]


class Corridor(TensorEnv):
    """Left at its end, which is three steps to the right."""

    def __init__(self, **kwargs):
        specs = {"task_spec": Unbounded(1), "observation_spec": Unbounded(1), "action_spec": Categorical(2)}
        super().__init__(**specs, max_episode_steps=4, batch_size=(8,), seed=0, **kwargs)

    def begin(self, task, rows):
        return torch.zeros(8, 1), torch.zeros(8, 1)

    def advance(self, state, action):
        place = state + action.unsqueeze(-1)
        return place, place, place, None if self.fixed_length else place >= 3, None


def walks(
    acting, *, bptt=None, keeps_all=False, episodes=2, steps=None, advantage=None, reset_at_each_iter=False, **kwargs
):
    """A collector of trials of at most eight steps, in which the policy acts so, and its update."""
    torch.manual_seed(0)
    sampler = TaskSampler(lambda size, generator: torch.rand(*size, 1, generator=generator), seed=0)
    env = TransformedEnv(Corridor(**kwargs), Compose(Trial(episodes, steps), sampler, PreviousStep()))
    actor, critic = networks(env)
    with torch.no_grad():
        list(actor.parameters())[-1].copy_(torch.tensor([0.0, acting]))
    update = PPOUpdate(RL2PPOLoss(actor, critic), advantage, bptt=bptt)
    options = {"keep": None if keeps_all else update.in_keys, "reset_at_each_iter": reset_at_each_iter}
    return TrialCollector(env, ActorCritic(actor, critic), frames_per_batch=64, total_frames=-1, **options), update


def test_that_a_later_batch_may_cut_a_trial_is_told_before_the_first_update():
    """Who never walks never leaves early: no trial of the first batch is cut."""
    (note,) = check_training(*walks(-99.0)).notes[:1]
    assert re.search(r"may differ in length.*lacks .*'actor_hidden'.*PPOUpdate\(..., bptt=8\).*keep=None", note)
    for sound in ({"bptt": 8}, {"keeps_all": True}, {"fixed_length": True}, {"episodes": None, "steps": 8}):
        report = check_training(*walks(-99.0, **sound))
        assert "kept_at_cuts" in report.checked
        assert not any("length" in note for note in report.notes)


class Earned(nn.Module):
    """What was earned from a step on within the batch, which asks for nothing beyond."""

    in_keys = ["state_value"]

    def forward(self, batch):
        earned = batch["next", "reward"].flip(1).cumsum(1).flip(1)
        return batch.set("value_target", earned).set("advantage", earned - batch["state_value"])


def test_rows_that_begin_anew_in_each_batch_go_on_from_no_memory():
    trials = {"episodes": 3, "advantage": Earned()}  # of 12 steps, as nobody walks, in batches of 8
    assert "kept_at_cuts" in check_training(*walks(-99.0, reset_at_each_iter=True, **trials)).checked
    with pytest.raises(TrainingCheckError, match="kept_at_cuts.*lacks .*actor_hidden"):
        check_training(*walks(-99.0, **trials))
    # What its critic reads beyond a cut an advantage needs there too.
    with pytest.raises(TrainingCheckError, match=r"kept_at_cuts.*lacks \[\('next', 'trans'\)"):
        check_training(*walks(-99.0, reset_at_each_iter=True, episodes=3))


def test_a_critic_that_the_collector_does_not_play_is_told_of_where_trials_are_cut():
    """No keep= could mend that."""
    env = trials(lines(), steps=5)
    actor, critic = networks(env)
    alone = TrialCollector(env, actor, frames_per_batch=9, total_frames=9)
    with pytest.raises(TrainingCheckError, match=r"hands no \['critic_hidden'\] on.*ActorCritic\(actor, critic\)"):
        train(alone, PPOUpdate(RL2PPOLoss(actor, critic), bptt=3), evaluate=None, progress=False)


def test_a_batch_that_cuts_trials_whose_ends_are_not_kept_is_an_error():
    with pytest.raises(
        TrainingCheckError, match=r"'kept_at_cuts'.*trials are cut.*PPOUpdate\(..., bptt=8\) asks for them"
    ):
        check_training(*walks(0.0))
    collector, update = walks(0.0, bptt=8)
    check_training(collector, update)
    assert [update(batch.clone())["epochs"] for batch, _ in zip(collector, range(3), strict=False)] == [10] * 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gamma", [0.99, 1.0])
def test_sums_over_a_long_trial_do_not_stand_still_in_half_precision(dtype, gamma):
    ends = torch.zeros(1, 3000, 1, dtype=torch.bool)
    ends[:, -1] = True
    following = {"reward": torch.ones(1, 3000, 1), "done": ends, "terminated": ends}
    data = TensorDict({"state_value": torch.zeros(1, 3000, 1, dtype=dtype), "next": following}, [1, 3000])
    data = TrialAdvantage(gamma=gamma, normalize=False)(data)
    expected = 3000.0 if gamma == 1 else (1 - 0.99**3000) / 0.01
    for key in ("value_target", "advantage"):
        assert data[key].dtype == dtype
    assert data["value_target"][0, 0].item() == pytest.approx(expected, rel=torch.finfo(dtype).eps)


def test_a_batch_of_a_single_step_has_an_advantage():
    ends = torch.ones(1, 1, 1, dtype=torch.bool)
    following = {"reward": torch.ones(1, 1, 1), "done": ends, "terminated": ends}
    data = TrialAdvantage()(TensorDict({"state_value": torch.zeros(1, 1, 1), "next": following}, [1, 1]))
    assert data["advantage"].item() == 1.0


def test_rows_of_a_batched_env_say_how_long_trials_are_until_it_is_closed():
    """As it is after a last batch: an attribute that a `SerialEnv` no longer has recurses until Python gives up."""
    for fixed_length, last, told in ((True, False, False), (False, False, True), (False, True, True)):
        sampler = TaskSampler(lambda size, generator: torch.rand(*size, 1, generator=generator), seed=0)
        rows = SerialEnv(2, partial(Corridor, fixed_length=fixed_length))
        env = TransformedEnv(rows, Compose(Trial(2), sampler, PreviousStep()))
        actor, critic = networks(env)
        with torch.no_grad():
            list(actor.parameters())[-1].copy_(torch.tensor([0.0, -99.0]))  # nobody walks, no trial is cut
        update = PPOUpdate(RL2PPOLoss(actor, critic))
        options = {"frames_per_batch": 128, "total_frames": 128 if last else -1, "keep": update.in_keys}
        collector = TrialCollector(env, ActorCritic(actor, critic), **options)
        report = check_training(collector, update, next(iter(collector)))
        assert env.is_closed == last
        assert any("may differ in length" in note for note in report.notes) == told
