"""`TrialCollector`: its batches are those of TorchRL's `Collector`, made without waiting and in memory that stays."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchrl.collectors import Collector
from torchrl.envs import Compose, GymEnv, SerialEnv, TransformedEnv
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
    adaptation_curve,
    kernels,
)
from rl2_torchrl.envs import BernoulliBandit, QuadraticBandit, uniform_means, uniform_targets
from rl2_torchrl.modules import distributions
from rl2_torchrl.modules.distributions import gumbel_

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
def test_deterministic_batches_equal_collectors(kind, wiring):
    results = []
    for cls in (Collector, TrialCollector):
        env = bandit_env(kind)
        kwargs = {"keep": KEEP} if cls is TrialCollector else {}
        kwargs["exploration_type"] = ExplorationType.DETERMINISTIC
        collector, collected = batches(cls, env, policy_for(env, wiring), number=1, **kwargs)
        results.append(collected[0])
    assert (collector.backend, collector.reason) == ("tensors", None)
    slow, fast = results
    for key in KEEP:
        assert slow[key].shape == fast[key].shape, key
        assert slow[key].dtype == fast[key].dtype, key
        torch.testing.assert_close(fast[key], slow[key], msg=str(key))


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


@pytest.mark.parametrize("kind", ["bernoulli", "quadratic"])
@pytest.mark.parametrize("wiring", ["separate", "shared", "detached"])
def test_no_tensordict_is_made_for_the_policies_of_this_package(kind, wiring):
    env = bandit_env(kind)
    collector = TrialCollector(env, policy_for(env, wiring), frames_per_batch=ROWS * PULLS, total_frames=-1, keep=KEEP)
    ways = {type(part.module).__name__: part.way for part in collector.player.parts}
    assert set(ways.values()) == {"core", "tensors", "distribution"}, ways


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


def test_actions_follow_the_policys_distribution():
    env = bandit_env()
    policy = policy_for(env)
    _, collected = batches(TrialCollector, env, policy, number=200, steps=PULLS, keep=["is_init", "action"])
    first = torch.stack([batch["action"][:, 0] for batch in collected]).flatten()
    with torch.no_grad():
        probs = policy.actor.get_dist(env.reset()).probs[0]
    observed = torch.bincount(first, minlength=ARMS) / len(first)
    assert ((observed - probs).abs() < 4 * (probs * (1 - probs) / len(first)).sqrt()).all()


@pytest.mark.parametrize(
    ("kind", "mean", "std"),
    [("bernoulli", 0.57722, math.pi / 6**0.5), ("quadratic", 0.0, 1.0)],
    ids=["Gumbel", "normal"],
)
def test_noise_of_the_actions(kind, mean, std, monkeypatch):
    env, steps = bandit_env(kind), 1000 * PULLS
    torch.manual_seed(0)
    drawn = []
    monkeypatch.setattr(distributions, "gumbel_", lambda memory: drawn.append(gumbel_(memory)) or memory)
    keep = ["action", "logits"] if kind == "bernoulli" else ["action", "loc", "scale"]
    collector = TrialCollector(env, policy_for(env), frames_per_batch=ROWS * steps, total_frames=-1, keep=keep)
    batch = next(iter(collector))
    if kind == "quadratic":
        noise = (batch["action"] - batch["loc"]) / batch["scale"]
    else:
        noise = drawn[0].transpose(0, 1)
        assert torch.equal(batch["action"], (batch["logits"] + noise).argmax(-1))  # the largest sum wins
    assert noise.shape[:2] == (ROWS, steps)
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(mean, abs=4 * std / noise.numel() ** 0.5)
    assert noise.std().item() == pytest.approx(std, rel=0.02)


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


@pytest.mark.parametrize("steps", [PULLS - 1, PULLS + 1])
def test_tasks_of_trials_that_batches_cut(steps):
    """A batch may hold one task in each row or several, in turn."""
    keep, results = ["task", ("next", "task"), "trial_step"], []
    for rollout in ("tensors", "tensordicts"):
        env = bandit_env()
        _, collected = batches(TrialCollector, env, policy_for(env), 4 * PULLS, steps, keep=keep, rollout=rollout)
        results.append(torch.cat(collected, 1))
    for key in keep:
        assert torch.equal(results[0][key], results[1][key]), key


@pytest.mark.parametrize("batches_before", [0, 1, 2])
def test_trials_begin_anew_with_a_reset_and_then_at_their_ends_alone(batches_before):
    # Batches of 3 steps cut trials of 5, so that a reset comes in the middle of one.
    env = bandit_env()
    collector = TrialCollector(env, policy_for(env), frames_per_batch=3 * ROWS, total_frames=-1, keep=["is_init"])
    iterator = iter(collector)
    for _ in range(batches_before):
        next(iterator)
    collector.reset()
    begun = torch.cat([next(iterator)["is_init"].squeeze(-1).clone() for _ in range(5)], 1)
    assert (begun == (torch.arange(15) % PULLS == 0)).all()


def cartpole_env():
    base = SerialEnv(2, lambda: GymEnv("CartPole-v1"))  # which does not count its own steps, as a TensorEnv does
    return TransformedEnv(base, Compose(Trial(steps=PULLS), PreviousStep()))


MOVES = {
    "evaluation": lambda env, policy: adaptation_curve(env, policy, 1),
    "evaluation through transforms of its own": lambda env, policy: adaptation_curve(
        TransformedEnv(env.base_env, Compose(Trial(episodes=1, steps=1), PreviousStep())), policy, 1
    ),
    "rollout": lambda env, policy: env.rollout(2),
    "reset": lambda env, policy: env.reset(),
    "step": lambda env, policy: env.step(env.rand_action(env.fake_tensordict().exclude("next"))),
}


@pytest.mark.parametrize("rollout", ["tensors", "tensordicts"])
@pytest.mark.parametrize("make", [bandit_env, cartpole_env])
@pytest.mark.parametrize("move", MOVES)
def test_an_env_that_another_has_moved_is_an_error(move, make, rollout):
    env = make()
    policy = GRUCategoricalActor.from_env(env, hidden_size=8)
    options = {"frames_per_batch": env.batch_size.numel() * 3, "total_frames": -1, "rollout": rollout}
    collector = TrialCollector(env, policy, **options)
    MOVES[move](env, policy)
    for _ in range(2):  # before the first batch, and between batches
        with pytest.raises(RuntimeError, match=r"env has been reset or stepped since.*evaluate on an env of its own"):
            collector.rollout()
        collector.reset()
        collector.rollout()
        other = make()
        other.reset()
        MOVES[move](other, policy)
        collector.rollout()
        MOVES[move](env, policy)


def test_the_task_of_a_row_that_is_one_trial_is_in_memory_once():
    env = bandit_env()
    collector = TrialCollector(
        env, policy_for(env), frames_per_batch=ROWS * PULLS, total_frames=2 * ROWS * PULLS, keep=["task"]
    )
    seen = []
    for batch in collector:
        task = batch["task"]
        assert task.shape == (ROWS, PULLS, ARMS)
        assert (task == env.base_env.state.unsqueeze(1)).all()
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


@pytest.mark.parametrize("kind", ["bernoulli", "quadratic"])
def test_deterministic_rollouts_draw_no_noise(kind):
    env = bandit_env(kind)
    player = TrialCollector(env, policy_for(env), frames_per_batch=30, total_frames=-1, keep=["action"]).player
    before = torch.get_rng_state()
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        actions = player()["action"].float()
    assert torch.equal(torch.get_rng_state(), before)  # the env's and the tasks' numbers are of generators of their own
    assert actions.isfinite().all()
    assert (actions[:, 0] == actions[0, 0]).all()
    with set_exploration_type(ExplorationType.RANDOM):
        player()
    assert not torch.equal(torch.get_rng_state(), before)


class NoHostReads(TorchDispatchMode):
    """Fails on what makes the host wait for a device: reading a number, or a size that depends on numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero", "_unique2"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["bernoulli", "quadratic"])
@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "torch"])
def test_rollout_never_waits_for_the_device(kind, compiled, monkeypatch):
    if not compiled:  # as on a CUDA device
        monkeypatch.setattr(kernels, "load", lambda dtype: None)
    env = bandit_env(kind)
    collector = TrialCollector(env, policy_for(env), frames_per_batch=ROWS * PULLS, total_frames=-1, keep=KEEP[:9])
    player = collector.player
    player()
    assert player.trials.is_repeatable
    player.trials.start_batch()
    with NoHostReads(), torch.no_grad():
        player._play()


@pytest.mark.parametrize("pulls", [2 * PULLS, PULLS - 1], ids=["whole trials", "part of a trial"])
def test_rollout_always_works_in_the_same_memory(pulls):
    env = bandit_env()
    keep = [*KEEP[:9], ("next", "reward")]
    player = TrialCollector(env, policy_for(env), frames_per_batch=ROWS * pulls, total_frames=-1, keep=keep).player

    def addresses():
        kept = player()
        # Where batches cut trials, flags and counters change, and a row has one task or two.
        changing = () if pulls == 2 * PULLS else (*player.trials.clock.names, "task")
        same = [key for key in keep if key not in changing]
        return {key: kept[key].data_ptr() for key in same}

    assert addresses() == addresses() == addresses()


def test_batches_are_written_over_one_another():
    env = bandit_env()
    collector = TrialCollector(env, policy_for(env), frames_per_batch=ROWS * PULLS, total_frames=-1, keep=KEEP)
    iterator = iter(collector)
    # But for the tasks, which are a view of what was drawn.
    addresses = [
        {key: value.data_ptr() for key, value in next(iterator).items(True, True) if key != "task"} for _ in range(3)
    ]
    assert set(addresses[0]) == set(KEEP) - {"task"}
    assert addresses[0] == addresses[1] == addresses[2]


def test_batches_may_be_kept_where_that_is_asked_for():
    """As in a replay buffer that a user fills: without ``return_same_td`` a batch is not written over."""
    env = bandit_env()
    frames = {"frames_per_batch": ROWS * PULLS, "total_frames": 3 * ROWS * PULLS}
    collector = TrialCollector(env, policy_for(env), keep=KEEP, return_same_td=False, **frames)
    kept, copies = [], []
    for batch in collector:
        kept.append(batch)
        copies.append(batch.clone())
    assert collector.backend == "tensors"
    for batch, copy in zip(kept, copies, strict=True):
        assert (batch == copy).all()
    assert (kept[0]["task"] != kept[1]["task"]).any()


@pytest.mark.parametrize("case", ["no keep", "part of a trial", "transition input of the next step", "gymnasium"])
def test_whatever_is_kept_and_played_is_played_on_tensors(case, monkeypatch):
    said = []
    monkeypatch.setattr("rl2_torchrl.collector.torchrl_logger.info", said.append)
    env = bandit_env()
    keep, frames = KEEP, ROWS * PULLS
    if case == "no keep":
        keep = None
    if case == "part of a trial":
        frames = ROWS * 4
    if case == "transition input of the next step":
        keep = [*KEEP, ("next", "trans")]
    if case == "gymnasium":
        env = TransformedEnv(GymEnv("CartPole-v1"), Compose(Trial(episodes=2), PreviousStep()))
        keep, frames = ["trans", "action"], 20
    policy = policy_for(env) if case != "gymnasium" else GRUCategoricalActor.from_env(env)
    collector = TrialCollector(env, policy, frames_per_batch=frames, total_frames=2 * frames, keep=keep)
    assert (collector.backend, collector.reason) == ("tensors", None)
    assert not any("TrialCollector" in line for line in said)
    for batch in collector:
        assert batch.numel() == frames
        names = set(batch.keys(True, True))
        assert names == set(keep) if keep is not None else names >= {*KEEP, ("next", "trans"), ("next", "actor_hidden")}


def test_collectors_own_loop_when_it_is_asked_for():
    env, frames = bandit_env(), {"frames_per_batch": ROWS * PULLS, "total_frames": ROWS * PULLS}
    collector = TrialCollector(env, policy_for(env), rollout="tensordicts", keep=KEEP, **frames)
    assert (collector.backend, collector.player) == ("tensordicts", None)
    assert collector.reason == "rollout='tensordicts' was asked for"
    (batch,) = list(collector)
    assert set(batch.keys(True, True)) == set(KEEP)
    with pytest.raises(ValueError, match="rollout='fast': choose 'auto', 'tensors' or 'tensordicts'"):
        TrialCollector(env, policy_for(env), rollout="fast", **frames)


def test_unknown_entry_is_named():
    env = bandit_env()
    with pytest.raises(KeyError, match="keep holds .*nonsense.*nobody makes"):
        TrialCollector(env, policy_for(env), frames_per_batch=30, total_frames=30, keep=["nonsense"])


def test_unknown_entry_of_collectors_own_loop_is_named():
    env = bandit_env()
    collector = TrialCollector(
        env, policy_for(env), rollout="tensordicts", frames_per_batch=30, total_frames=30, keep=["nonsense"]
    )
    with pytest.raises(KeyError, match="nonsense.*not collected"):
        next(iter(collector))


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
