"""`TrialCollector`: what plays and why, what a batch holds and where it lies. That batches are `Collector`'s: test_rollout.py."""

import re

import pytest
import torch
from tensordict.nn import TensorDictModule
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.data import LazyTensorStorage, ReplayBuffer, Unbounded
from torchrl.envs import Compose, StepCounter, TensorDictPrimer, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import set_recurrent_mode

from rl2_torchrl import (
    ActorCritic,
    GRUCategoricalActor,
    GRUGaussianActor,
    GRUValueHead,
    MemoryValueHead,
    PreviousStep,
    TaskSampler,
    Trial,
    TrialCollector,
    kernels,
)
from rl2_torchrl.envs import BernoulliBandit, QuadraticBandit, uniform_means, uniform_targets
from rl2_torchrl.rollout import Rollout

ROWS, PULLS, ARMS = 6, 5, 3
KEEP = ["trans", "is_init", "time_left", "task", "episode_index", "episode_done", "trial_step", "action"]
KEEP += ["action_log_prob", "state_value", "actor_hidden", "done", "terminated"]
KEEP += [("next", key) for key in ("reward", "done", "terminated", "episode_done", "episode_index", "time_left")]


@pytest.fixture(autouse=True)
def several_blocks_of_steps(monkeypatch):
    """The critic looks at three steps at once, so that a batch of these sizes takes several looks."""
    monkeypatch.setattr("rl2_torchrl.rollout.rollout._ROWS_AT_ONCE", 3 * ROWS)


def bandit_env(kind="bernoulli", trial=None, seed=0):
    if kind == "bernoulli":
        base, tasks = BernoulliBandit(ARMS, batch_size=(ROWS,), seed=seed), uniform_means(ARMS)
    else:
        base, tasks = QuadraticBandit(2, batch_size=(ROWS,), seed=seed), uniform_targets(2)
    return TransformedEnv(
        base, Compose(trial or Trial(episodes=PULLS), TaskSampler(tasks, seed=seed + 1), PreviousStep())
    )


def policy_for(env, wiring="detached", layers=1):
    torch.manual_seed(0)
    continuous = isinstance(env.base_env, QuadraticBandit)
    actor_class = GRUGaussianActor if continuous else GRUCategoricalActor
    actor = actor_class.from_env(env, hidden_size=8, num_layers=layers, init_range=1.0)
    extra = {"extra_keys": ["time_left"], "init_range": 1.0}
    if wiring == "separate":
        return ActorCritic(actor, GRUValueHead.from_env(env, hidden_size=8, num_layers=layers, **extra))
    return ActorCritic(actor, MemoryValueHead.from_env(env, actor, detach=wiring == "detached", **extra))


def batches(cls, env, policy, number=2, steps=2 * PULLS, **kwargs):
    collector = cls(
        env,
        policy,
        frames_per_batch=ROWS * steps,
        total_frames=number * ROWS * steps,
        auto_register_policy_transforms=True,
        **kwargs,
    )
    return collector, [batch.clone() for batch in collector]


@pytest.mark.parametrize("kind", ["bernoulli", "quadratic"])
@pytest.mark.parametrize("wiring", ["separate", "shared", "detached"])
@pytest.mark.parametrize("layers", [1, 2])
def test_batches_replay_in_recurrent_mode(kind, wiring, layers):
    env = bandit_env(kind)
    policy = policy_for(env, wiring, layers)
    collector, collected = batches(TrialCollector, env, policy, keep=KEEP)
    assert (collector.backend, collector.reason) == ("tensors", None)
    for batch in collected:
        replayed = batch.clone()
        with set_recurrent_mode(True), torch.no_grad():
            log_prob = policy.actor.get_dist(replayed).log_prob(batch["action"])
            value = policy.critic(replayed)["state_value"]
        torch.testing.assert_close(log_prob, batch["action_log_prob"], rtol=0, atol=1e-6)
        torch.testing.assert_close(value, batch["state_value"], rtol=0, atol=1e-6)


def test_transition_input_tells_of_the_step_before():
    env = bandit_env()
    _, (batch, _) = batches(TrialCollector, env, policy_for(env), keep=KEEP)
    trans = batch["trans"]
    first = batch["is_init"].squeeze(-1)
    assert first.sum() == 2 * ROWS
    assert (trans[first] == 0).all()
    later = ~first[:, 1:]
    one_hot = torch.nn.functional.one_hot(batch["action"], ARMS).float()
    torch.testing.assert_close(trans[:, 1:, :ARMS][later], one_hot[:, :-1][later])
    torch.testing.assert_close(trans[:, 1:, -2:-1][later], batch["next", "reward"][:, :-1][later])
    assert (trans[:, 1:, -1][later] == 1).all()


def test_rewards_follow_the_task():
    env = bandit_env(seed=3)
    _, collected = batches(
        TrialCollector, env, policy_for(env), number=300, keep=["task", "action", ("next", "reward")]
    )
    data = torch.cat(collected)
    mean = data["task"].gather(-1, data["action"].unsqueeze(-1))
    surprise = (data["next", "reward"] - mean).mean()
    assert surprise.abs() < 4 * (mean * (1 - mean)).mean().sqrt() / data.numel() ** 0.5


def test_tasks_are_constant_in_a_trial_and_new_in_the_next():
    env = bandit_env()
    _, (batch, following) = batches(TrialCollector, env, policy_for(env), keep=["task"])
    for data in (batch, following):
        assert (data["task"][:, :PULLS] == data["task"][:, :1]).all()
        assert (data["task"][:, PULLS] != data["task"][:, 0]).all()
    assert (following["task"] != batch["task"]).all()
    assert (following["task"][:, 0] != batch["task"][:, -1]).all()


def test_the_task_of_a_row_that_is_one_trial_is_in_memory_once():
    env = bandit_env()
    collector = TrialCollector(
        env, policy_for(env), frames_per_batch=ROWS * PULLS, total_frames=2 * ROWS * PULLS, keep=["task"]
    )
    seen = []
    for batch in collector:
        task = batch["task"]
        assert task.shape == (ROWS, PULLS, ARMS)
        assert (task == task[:, :1]).all()
        assert task.untyped_storage().nbytes() == ROWS * ARMS * task.element_size()
        seen.append(task[:, 0].clone())
    assert (seen[0] != seen[1]).all()


@pytest.mark.parametrize(
    ("trial", "ends", "terminated"),
    [(Trial(steps=2), 2, True), (Trial(episodes=5, steps=10), 5, True), (Trial(episodes=5, truncate=True), 5, False)],
)
def test_trials_end_at_their_bound(trial, ends, terminated):
    env = bandit_env(trial=trial)
    keep = ["is_init", ("next", "done"), ("next", "terminated")]
    collector, (batch, _) = batches(TrialCollector, env, policy_for(env), keep=keep)
    assert (collector.backend, collector.reason) == ("tensors", None)
    done = torch.arange(1, 2 * PULLS + 1) % ends == 0
    assert (batch["next", "done"].squeeze(-1) == done).all()
    assert (batch["next", "terminated"].squeeze(-1) == (done & terminated)).all()


class NoHostReads(TorchDispatchMode):
    """Fails on what makes the host wait for a device: reading a number, or a size that depends on numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero", "_unique2"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("steps", [PULLS, 2 * PULLS - 1], ids=["whole trials", "parts of trials"])
@pytest.mark.parametrize("kind", ["bernoulli", "quadratic"])
@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "torch"])
def test_a_rollout_never_waits_for_the_device(kind, compiled, steps, monkeypatch):
    if not compiled:  # as on a CUDA device
        monkeypatch.setattr(kernels, "load", lambda dtype: None)
    env = bandit_env(kind)
    collector = TrialCollector(env, policy_for(env), frames_per_batch=ROWS * steps, total_frames=-1, keep=KEEP[:9])
    rollout = collector.player
    rollout()
    for _ in range(3):
        rollout.trials.start_batch()
        with NoHostReads(), torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
            rollout._play()


def test_batches_are_written_over_one_another():
    env = bandit_env()
    collector = TrialCollector(env, policy_for(env), frames_per_batch=ROWS * PULLS, total_frames=-1, keep=KEEP)
    iterator = iter(collector)
    addresses = [{key: next(iterator)[key].data_ptr() for key in KEEP if key != "task"} for _ in range(3)]
    assert addresses[0] == addresses[1] == addresses[2]


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
        {"replay_buffer": ReplayBuffer(storage=LazyTensorStorage(100)), "return_same_td": False},
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
def test_unknown_entry_is_named(rollout):
    env = bandit_env()
    with pytest.raises(KeyError, match="keep holds .*nonsense.*next.*nonsense.*there is.*action"):  # noqa: PT012
        collector = TrialCollector(
            env,
            policy_for(env),
            frames_per_batch=30,
            total_frames=30,
            rollout=rollout,
            keep=["action", "nonsense", ("next", "nonsense")],
        )
        next(iter(collector))


def test_what_the_policy_reads_and_nobody_makes_is_named():
    env = bandit_env()
    policy = TensorDictModule(lambda trans, map: trans[..., :ARMS].argmax(-1) + map, ["trans", "map"], ["action"])
    with pytest.raises(KeyError, match="the policy reads .*map.*, which nobody makes; there is.*trans"):
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


def test_an_entry_that_was_replaced_is_the_collectors_own_again():
    env = bandit_env()
    collector = TrialCollector(
        env, policy_for(env), frames_per_batch=ROWS * PULLS, total_frames=-1, keep=["action", ("next", "reward")]
    )
    assert (collector.backend, collector.reason) == ("tensors", None)
    iterator = iter(collector)
    for _ in range(3):
        batch = next(iterator)
        assert set(batch["next", "reward"].unique().tolist()) <= {0.0, 1.0}
        batch["mine"] = batch["action"].clone()
        batch["next", "reward"] = 0.1 * batch["next", "reward"]
    assert "mine" in next(iterator).keys()
