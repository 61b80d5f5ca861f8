"""`TrialCollector`: options, reasons and errors; which loop plays."""

import re

import pytest
from rollouts import Walk, whole_numbers
from tensordict.nn import TensorDictModule
from test_collector import ARMS, KEEP, PULLS, ROWS, bandit_env, batches, policy_for, several_blocks_of_steps  # noqa: F401
from torchrl.data import LazyTensorStorage, ReplayBuffer, Unbounded
from torchrl.envs import Compose, StepCounter, TensorDictPrimer, TransformedEnv

from rl2_torchrl import ActorCritic, GRUCategoricalActor, PreviousStep, TaskSampler, Trial, TrialCollector
from rl2_torchrl.envs import BernoulliBandit
from rl2_torchrl.modules import GRUCore
from rl2_torchrl.rollout import Rollout


def test_what_is_not_on_tensors_plays_on_tensordicts_in_the_same_rollout():
    env = bandit_env()
    env.append_transform(StepCounter())
    collector, (batch, _) = batches(TrialCollector, env, policy_for(env), keep=[*KEEP, "step_count"])
    assert collector.backend == "tensors"
    assert "StepCounter beside our transforms" in collector.reason
    assert set(batch.keys(True, True)) == {*KEEP, "step_count"}


def test_the_reason_is_said_once(monkeypatch):
    said = []
    monkeypatch.setattr("rl2_torchrl.collector.torchrl_logger.info", said.append)
    env = bandit_env()
    batches(TrialCollector, env, policy_for(env), keep=KEEP)
    assert not said
    env = bandit_env()
    collector, _ = batches(TrialCollector, env, policy_for(env), keep=KEEP, reset_at_each_iter=True)
    (line,) = said
    assert "'tensordicts'" in line
    assert collector.reason in line


def test_a_module_that_wants_a_tensordict_at_each_step_is_named(monkeypatch):
    said = []
    monkeypatch.setattr("rl2_torchrl.collector.torchrl_logger.info", said.append)
    env = bandit_env()
    actor = GRUCategoricalActor.from_env(env)
    next(m for m in actor.modules() if isinstance(m, GRUCore)).register_forward_hook(lambda *_: None)
    collector = TrialCollector(env, actor, frames_per_batch=ROWS * PULLS, total_frames=-1, keep=["action"])
    reason = "GRUCore of the policy is called with a TensorDict at each step"
    assert (collector.backend, collector.reason) == ("tensors", reason)
    assert reason in said[-1]


class Counts(BernoulliBandit):
    """Counts what is begun."""

    begun = 0

    def start(self, task, rows=None):
        self.begun += 1
        return super().start(task, rows)


def test_an_env_that_does_otherwise_what_is_derived_is_named(monkeypatch):
    said = []
    monkeypatch.setattr("rl2_torchrl.collector.torchrl_logger.info", said.append)
    env = TransformedEnv(Counts(ARMS, batch_size=(ROWS,)), Compose(*bandit_env().transform))
    collector = TrialCollector(env, policy_for(env), frames_per_batch=ROWS * PULLS, total_frames=-1, keep=KEEP)
    collector.rollout()
    assert env.base_env.begun
    assert collector.backend == "tensors"
    assert "the env has start of its own, beside begin and advance: a TensorDict goes in" in collector.reason
    assert collector.reason in said[-1]


@pytest.mark.parametrize("keep", [None, ["action", ("next", "reward")]], ids=["all", "some"])
@pytest.mark.parametrize(
    "options",
    [
        {"reset_at_each_iter": True},
        {"init_random_frames": 10},
        {"track_traj_ids": True},
        {"split_trajs": True},
        {"trajs_per_batch": 4},
        {"set_truncated": True},
        {"compact_obs": True},
        {"replay_buffer": ReplayBuffer(storage=LazyTensorStorage(100))},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_of_collectors_own_loop(options, keep):
    env = bandit_env(trial=Trial(episodes=PULLS, truncate=True))
    policy, options = policy_for(env), {"frames_per_batch": 30, "total_frames": 60, "keep": keep, **options}
    reason = "(track_traj_ids|split_trajs|trajs_per_batch|" + list(options)[3] + ")= is an option of TorchRL's own loop"
    with pytest.raises(ValueError, match=rf"rollout='tensors' cannot serve: {reason}.*rollout='auto'"):
        TrialCollector(env, policy, rollout="tensors", **options)
    collector = TrialCollector(env, policy, **options)
    assert collector.backend == "tensordicts"
    assert re.fullmatch(reason, collector.reason)
    assert len(list(collector)) >= 2


@pytest.mark.parametrize("frames", [None, 0, -1])
def test_no_random_frames_are_none(frames):
    env = bandit_env()
    options = {"frames_per_batch": 30, "total_frames": 30, "init_random_frames": frames, "compile_policy": False}
    assert TrialCollector(env, policy_for(env), **options).backend == "tensors"


def test_a_policy_that_is_no_tensordict_module():
    env = bandit_env()
    options = {"frames_per_batch": 30, "total_frames": 30}
    with pytest.raises(ValueError, match="the policy is no TensorDictModule"):
        TrialCollector(env, env.rand_action, rollout="tensors", **options)
    collector = TrialCollector(env, env.rand_action, **options)
    assert collector.backend == "tensordicts"
    assert next(iter(collector))["action"].shape == (ROWS, PULLS)


def test_the_last_step_is_truncated_when_asked_for():
    env = bandit_env(trial=Trial(episodes=10, truncate=True))
    _, (batch, _) = batches(TrialCollector, env, policy_for(env), steps=3, set_truncated=True)
    assert batch["next", "truncated"].squeeze(-1).tolist() == [[False, False, True]] * ROWS


@pytest.mark.parametrize("rollout", ["fast", None, True])
def test_unknown_rollouts_are_named(rollout):
    env = bandit_env()
    with pytest.raises(ValueError, match=rf"rollout={rollout!r}: choose 'auto', 'tensors' or 'tensordicts'"):
        TrialCollector(env, policy_for(env), frames_per_batch=30, total_frames=30, rollout=rollout)


def test_asked_for_tensordicts():
    env = bandit_env()
    collector, (batch, _) = batches(TrialCollector, env, policy_for(env), keep=KEEP, rollout="tensordicts")
    assert (collector.backend, collector.reason) == ("tensordicts", "rollout='tensordicts' was asked for")
    assert set(batch.keys(True, True)) == set(KEEP)


def test_without_keep_all_is_kept():
    env = bandit_env()
    collector, (batch, _) = batches(TrialCollector, env, policy_for(env))
    assert collector.backend == "tensors"
    assert {*KEEP, ("next", "trans"), ("next", "actor_hidden"), "actor_features", "logits"} <= set(
        batch.keys(True, True)
    )


@pytest.mark.parametrize("rollout", ["tensors", "tensordicts"])
def test_what_is_not_selected_of_a_policy_is_in_no_batch(rollout):
    env = bandit_env()
    policy = policy_for(env, "separate")
    policy.actor.select_out_keys("action", "action_log_prob", ("next", "actor_hidden"))
    policy = ActorCritic(policy.actor, policy.critic)
    _, (batch, _) = batches(TrialCollector, env, policy, rollout=rollout)
    assert {"action", "action_log_prob", "actor_hidden", "state_value"} <= set(batch.keys())
    assert not {"logits", "actor_features"} & set(batch.keys())


def test_what_the_policy_reads_and_nobody_makes_is_named():
    env = bandit_env()
    policy = TensorDictModule(lambda trans, map: trans[..., :ARMS].argmax(-1) + map, ["trans", "map"], ["action"])
    with pytest.raises(
        KeyError, match="the policy reads .*map.*, which nobody makes: look at the in_keys.*there is.*trans"
    ):
        Rollout(env, policy, 5)
    policy = TensorDictModule(lambda trans: trans[..., :ARMS].argmax(-1), ["trans"], ["act"])
    with pytest.raises(KeyError, match="the policy writes no .*action.*which the env takes.*act"):
        Rollout(env, policy, 5)


def test_a_memory_that_nobody_begins_is_named():
    env = bandit_env()
    policy = TensorDictModule(
        lambda trans, memory: (trans[..., :ARMS].argmax(-1), memory),
        ["trans", "memory"],
        ["action", ("next", "memory")],
    )
    with pytest.raises(KeyError, match="hands .*memory.* on.*make_tensordict_primer"):
        Rollout(env, policy, 5)
    primed = TransformedEnv(env, TensorDictPrimer(memory=Unbounded((2,)), default_value=7.0, expand_specs=True))
    batch = Rollout(primed, policy, 2 * PULLS, ["memory"])()
    assert (batch["memory"] == 7.0).all()


class Unpaid(Walk):
    """Forgets its reward."""

    def _step(self, tensordict):
        return super()._step(tensordict).exclude("reward")


@pytest.mark.parametrize("rollout", ["tensors", "tensordicts"])
def test_a_reward_that_is_missing_is_named(rollout):
    env = TransformedEnv(Unpaid(), Compose(Trial(episodes=2), TaskSampler(whole_numbers, seed=0), PreviousStep()))
    collector = TrialCollector(env, GRUCategoricalActor.from_env(env), frames_per_batch=8, rollout=rollout)
    with pytest.raises(KeyError, match="the env's step returned no 'reward'.*one a row"):
        collector.rollout()


def test_who_keeps_one_batch_is_not_told(caplog):
    env, one = bandit_env(), None
    for number, batch in enumerate(
        TrialCollector(env, policy_for(env), frames_per_batch=ROWS * PULLS, total_frames=400)
    ):
        one = batch if number else None
    assert one is batch
    assert not any("somebody keeps" in record.message for record in caplog.records)


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("same", [True, False])
def test_who_keeps_batches_that_are_written_over_is_told_so(keeps, same, caplog):
    env, kept = bandit_env(), []
    frames = {"frames_per_batch": ROWS * PULLS, "total_frames": 6 * ROWS * PULLS, "return_same_td": same}
    for batch in TrialCollector(env, policy_for(env), **frames):
        kept[len(kept) if keeps else 0 :] = [batch]
    tells = [record.message for record in caplog.records if "somebody keeps its batches" in record.message]
    assert len(tells) == (keeps and same)
    assert (len({batch["task"].sum().item() for batch in kept}) > 1) == (keeps and not same)
