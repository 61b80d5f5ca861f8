"""Tabular MDPs: steps by hand and in distribution, tasks packed and drawn, both collectors, seeds, checkpoints, resets."""

import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import Compose, SerialEnv, TransformedEnv

from rl2_torchrl import (
    ActorCritic,
    GRUCategoricalActor,
    MemoryValueHead,
    PreviousStep,
    TaskSampler,
    Trial,
    TrialCollector,
)
from rl2_torchrl.envs import TabularMDP, pack_mdps, random_mdps, unpack_mdps
from rl2_torchrl.envs.discrete import DiscreteState
from rl2_torchrl.settings import _env as settings_of_env
from rl2_torchrl.testing import check_trial_env

STATES, ACTIONS, STEPS, EPISODES = 4, 3, 5, 2


def ring(states=STATES, actions=ACTIONS):
    """Action a goes a states on, for sure; the mean reward is 10 s + a."""
    state, action = torch.arange(states), torch.arange(actions)
    rewards = (10 * state.unsqueeze(-1) + action).float()
    successor = (state.unsqueeze(-1) + action) % states
    return pack_mdps(rewards, torch.nn.functional.one_hot(successor, states).float())


def make(batch_size=(6,), seed=0, **kwargs):
    return TabularMDP(STATES, ACTIONS, episode_steps=STEPS, batch_size=batch_size, seed=seed, **kwargs)


def trial_env(base, distribution=None, seed=1):
    tasks = TaskSampler(distribution or random_mdps(STATES, ACTIONS), seed=seed)
    return TransformedEnv(base, Compose(Trial(episodes=EPISODES), tasks, PreviousStep()))


def started(env, task):
    return env.reset(TensorDict({"task": task}, env.batch_size)).set("task", task)


def played(env, task, actions):
    """Steps ``[*B, T]`` of ``actions`` ``[T]`` in every row."""
    tensordict, steps = started(env, task), []
    for action in actions:
        stepped = env.step(tensordict.set("action", torch.full(env.batch_size, action)))
        steps.append(stepped.clone())
        tensordict = stepped["next"].exclude("reward").clone().set("task", task)
    return torch.stack(steps, -1)


# ---- One step.


def test_episode_by_hand():
    env = make((2,), noise=0.0)
    steps = played(env, ring().expand(2, -1), [1, 2, 2, 0, 1])
    # 0 -1-> 1 -2-> 3 -2-> 5 = 1 -0-> 1 -1-> 2.
    assert steps["observation"].tolist() == [[0, 1, 3, 1, 1]] * 2
    assert steps["next", "observation"].tolist() == [[1, 3, 1, 1, 2]] * 2
    assert steps["next", "reward"].squeeze(-1).tolist() == [[1, 12, 32, 10, 11]] * 2
    assert steps["next", "done"].squeeze(-1).tolist() == [[False] * 4 + [True]] * 2
    assert steps["next", "terminated"].squeeze(-1).tolist() == [[False] * 4 + [True]] * 2


@pytest.mark.parametrize("batch_size", [(), (3,), (2, 3)])
def test_every_row_plays_its_own_task(batch_size):
    env = make(batch_size, noise=0.0)
    number = torch.arange(math.prod(batch_size)).float().reshape(batch_size)
    rewards = number[..., None, None].expand(*batch_size, STATES, ACTIONS)
    transitions = torch.full((*rewards.shape, STATES), 1 / STATES)
    state = DiscreteState(pack_mdps(rewards, transitions), torch.ones(batch_size).long())
    _, state, reward, _, _ = env.advance(state, torch.ones(batch_size).long())
    assert torch.equal(reward.squeeze(-1), number)
    assert state.shape == batch_size


def test_next_states_and_rewards_have_their_distribution():
    rows, probabilities = 40_000, torch.tensor([0.1, 0.0, 0.6, 0.3])
    env = make((rows,))
    rewards, transitions = (part.clone() for part in unpack_mdps(ring().expand(rows, -1), STATES, ACTIONS))
    transitions[:, 2, 1] = probabilities
    task = pack_mdps(rewards, transitions)
    _, state, reward, _, _ = env.advance(DiscreteState(task, torch.full((rows,), 2)), torch.full((rows,), 1))
    share = torch.bincount(state, minlength=STATES) / rows
    assert share[1] == 0
    assert ((share - probabilities).abs() <= 3 * (probabilities * (1 - probabilities) / rows).sqrt()).all()
    # Mean 10 * 2 + 1, deviation 1, whatever the next state; the standard error of a deviation is sigma / sqrt(2 n).
    assert reward.mean().item() == pytest.approx(21, abs=3 / rows**0.5)
    assert reward.std().item() == pytest.approx(1, abs=3 / (2 * rows) ** 0.5)
    assert abs(((reward.squeeze(-1) - 21) * (state - 2.0)).mean().item()) < 3 * 2 / rows**0.5


def test_sums_that_rounding_leaves_below_one_lead_to_no_state_beyond_the_last():
    env = make((100_000,))
    transitions = torch.full((STATES, ACTIONS, STATES), 0.2)  # sums to 0.8: rounding, exaggerated
    task = pack_mdps(torch.zeros(STATES, ACTIONS), transitions).expand(100_000, -1)
    zeros = torch.zeros(100_000, dtype=torch.int64)
    assert env.advance(DiscreteState(task, zeros), zeros)[1].unique().tolist() == [0, 1, 2, 3]


# ---- Tasks.


def test_packing_by_hand_and_back():
    rewards, transitions = torch.tensor([[5.0], [6.0]]), torch.tensor([[[0.25, 0.75]], [[1.0, 0.0]]])
    task = pack_mdps(rewards, transitions)
    assert task.tolist() == [5, 0.25, 0.75, 6, 1, 0]
    assert torch.equal(unpack_mdps(task, 2, 1)[0], rewards)
    assert torch.equal(unpack_mdps(task, 2, 1)[1], transitions)


def test_random_mdps_have_their_moments():
    number = 1000
    rewards, transitions = unpack_mdps(random_mdps()(torch.Size([number]), torch.Generator().manual_seed(0)))
    assert rewards.mean().item() == pytest.approx(1, abs=3 / rewards.numel() ** 0.5)
    assert rewards.std().item() == pytest.approx(1, abs=3 / (2 * rewards.numel()) ** 0.5)
    torch.testing.assert_close(transitions.sum(-1), torch.ones(number, 10, 5))
    # Dirichlet(1) over 10 states: each probability is Beta(1, 9), E[p] = 1/10, E[p²] = 1 * 2 / (10 * 11) = 1/55, and
    # E[p_i p_j] = 1 / (10 * 11). The variances of p² and p_i p_j are below 0.003 and 0.0003.
    assert transitions.square().mean().item() == pytest.approx(1 / 55, abs=3 * (0.003 / transitions.numel()) ** 0.5)
    product = transitions[..., 0] * transitions[..., 7]
    assert product.mean().item() == pytest.approx(1 / 110, abs=3 * (0.0003 / product.numel()) ** 0.5)


def test_tasks_come_from_the_given_generator_alone():
    state = torch.get_rng_state()
    first, again, other = (random_mdps()(torch.Size([3]), torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first != other).all()
    assert torch.equal(torch.get_rng_state(), state)


# ---- The trial contract.


@pytest.mark.parametrize("batch_size", [(), (4,), (2, 3)])
def test_contract(batch_size):
    check_trial_env(trial_env(make(batch_size)))


def test_contract_with_workers_inside():
    # Without a seed of their own: with one, all workers would draw the same.
    check_trial_env(trial_env(SerialEnv(2, lambda: make((2,), seed=None))))


def test_transition_input_is_one_hot():
    env = trial_env(make((2,), noise=0.0), lambda size, generator: ring().expand(*size, -1))
    tensordict = env.reset()
    assert tensordict["trans"].tolist() == [[1, 0, 0, 0] + [0] * 5] * 2
    trans = env.step(tensordict.set("action", torch.tensor([2, 1])))["next", "trans"]
    # State, action, reward, done.
    assert trans.tolist() == [[0, 0, 1, 0] + [0, 0, 1] + [2, 0], [0, 1, 0, 0] + [0, 1, 0] + [1, 0]]


def test_partial_reset_leaves_other_rows_where_they_are():
    env = make((3,), noise=0.0)
    task = ring().expand(3, -1)
    last = played(env, task, [1, 1, 1])[..., -1]["next"].clone()
    rows = torch.tensor([[False], [True], [False]])
    reset = env.reset(last.set("task", task.clone()).set("_reset", rows)).set("task", task)
    assert reset["observation"].tolist() == [3, 0, 3]
    data = []
    for _ in range(STEPS):
        step = env.step(reset.set("action", torch.tensor([0, 1, 2])))
        data.append((step["next", "done"].flatten().tolist(), step["next", "observation"].tolist()))
    # Rows 0 and 2 have taken 3 of 5 steps; 3 + 2 = 5 = 1, then 3.
    assert data[0] == ([False, False, False], [3, 1, 1])
    assert data[1] == ([True, False, True], [3, 2, 3])
    assert [done[1] for done, _ in data] == [False] * 4 + [True]


# ---- Collectors.

KEEP = ["trans", "is_init", "observation", "action", "task", "state_value", "action_log_prob"]
KEEP += [("next", key) for key in ("reward", "done", "episode_done")]


def collected(cls, base, distribution, rows, *, trials=1, batches=1):
    env = trial_env(base, distribution)
    torch.manual_seed(0)
    actor = GRUCategoricalActor.from_env(env, hidden_size=8, init_range=1.0)
    policy = ActorCritic(
        actor, MemoryValueHead.from_env(env, actor, detach=True, extra_keys=["task"])
    )  # reads the flat task
    frames = rows * EPISODES * STEPS * trials
    kwargs = {"keep": KEEP} if cls is TrialCollector else {"auto_register_policy_transforms": True}
    collector = cls(env, policy, frames_per_batch=frames, total_frames=batches * frames, **kwargs)
    if cls is TrialCollector:
        assert (collector.backend, collector.reason) == ("tensors", None)
    return [batch.select(*KEEP).clone() for batch in collector]


def test_rollout_gives_collectors_batches_in_distribution():
    # One task, so that all rows can be compared: in every step the mean of reward, state and action, and of their
    # products with the step before, which only the right order of the entries keeps.
    rows, one = 8000, random_mdps(STATES, ACTIONS)(torch.Size([]), torch.Generator().manual_seed(3))
    statistics = []
    for cls, seed in ((Collector, 0), (TrialCollector, 1)):
        (batch,) = collected(cls, make((rows,), seed), lambda size, generator: one.expand(*size, -1), rows)
        entries = torch.cat([batch["trans"], batch["next", "reward"]], -1)
        statistics.append((torch.cat([entries[:, 1:], entries[:, 1:] * entries[:, :-1]], -1), batch))
    (slow, one_batch), (fast, other_batch) = statistics
    error = ((slow.var(0) + fast.var(0)) / rows).sqrt()
    assert ((slow.mean(0) - fast.mean(0)).abs() <= 4.5 * error + 1e-6).all()
    for key in ("is_init", ("next", "done"), ("next", "episode_done")):
        assert torch.equal(one_batch[key], other_batch[key])


def test_rewards_and_states_follow_the_task_in_a_rollout():
    rows = 2000
    (batch,) = collected(TrialCollector, make((rows,)), None, rows, trials=2)
    assert (batch["task"][:, 0] != batch["task"][:, -1]).any(-1).all()
    state = batch["trans"][..., :STATES].argmax(-1)
    assert (state[:, ::STEPS] == 0).all()
    assert torch.equal(batch["observation"], state)
    rewards, transitions = unpack_mdps(batch["task"], STATES, ACTIONS)
    pair = state * ACTIONS + batch["action"]
    mean = rewards.flatten(-2).gather(-1, pair.unsqueeze(-1))
    assert abs((batch["next", "reward"] - mean).mean().item()) < 4 / mean.numel() ** 0.5
    inside = ~batch["next", "episode_done"][:, :-1].squeeze(-1)
    row = transitions.flatten(-3, -2).gather(-2, pair[..., None, None].expand(*pair.shape, 1, STATES)).squeeze(-2)
    seen = torch.nn.functional.one_hot(state[:, 1:], STATES).float()
    surprise = (seen - row[:, :-1])[inside]
    assert (surprise.mean(0).abs() < 4 * surprise.std(0) / len(surprise) ** 0.5).all()


# ---- Seeds and checkpoints.


def ten_rewards(env):
    task = ring().expand(*env.batch_size, -1)
    return played(env, task, [0, 1, 2, 1, 0, 0, 2, 1, 1, 0])["next", "reward"]


def test_the_envs_generator_is_the_only_randomness():
    state = torch.get_rng_state()
    first = ten_rewards(make(seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(ten_rewards(make(seed=1)), first)
    assert not torch.equal(ten_rewards(make(seed=2)), first)
    assert not torch.equal(ten_rewards(make(seed=None)), ten_rewards(make(seed=None)))
    env = make(seed=2)
    env.set_seed(1)
    assert torch.equal(ten_rewards(env), first)


def test_a_checkpoint_goes_on_in_the_middle_of_an_episode():
    task = random_mdps(STATES, ACTIONS)(torch.Size([6]), torch.Generator().manual_seed(0))
    env, resumed = make(seed=1), make(seed=2)
    stepped = played(env, task, [0, 1, 2])[..., -1]
    resumed.load_state_dict(env.state_dict())
    inputs = stepped["next"].clone().set("task", task).set("action", torch.ones(6).long())
    for _ in range(2):
        going_on, after = env.step(inputs.clone())["next"], resumed.step(inputs.clone())["next"]
        for key in ("observation", "reward", "done"):
            assert torch.equal(going_on[key], after[key]), key
    assert after["done"].all()


def test_the_noise_is_a_setting_and_a_curriculums_is_in_the_checkpoint():
    env, resumed = make((2,), noise=1.0), make((2,), noise=1.0)
    env.start(ring().expand(2, -1))
    env.noise = 0.1
    resumed.set_extra_state(env.get_extra_state())
    assert resumed.noise == 0.1
    assert settings_of_env(env)["env.noise"] == settings_of_env(resumed)["env.noise"] == 1.0


# ---- Bad input.


def test_noise_can_be_set_at_any_time():
    env = make((4000,), noise=0.0)
    env.start(ring().expand(4000, -1))
    action = torch.ones(4000, dtype=torch.int64)
    deviations = []
    for noise in (0.0, 0.3, 2.0):
        env.noise = noise
        assert env.noise == noise
        deviations.append(env.play(action)[1].std().item())
    # The standard error of a deviation is sigma / sqrt(2 n).
    assert deviations == pytest.approx([0, 0.3, 2.0], rel=3 / 8000**0.5)
    with pytest.raises(ValueError, match="noise=-1"):
        env.noise = -1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: TabularMDP(0), "num_states=0.*at least 1"),
        (lambda: TabularMDP(2, 0), "num_actions=0.*at least 1"),
        (lambda: TabularMDP(episode_steps=0), "episode_steps=0.*at least 1"),
        (lambda: TabularMDP(batch_size=(3, 0)), r"batch_size=\(3, 0\).*at least 1"),
        (lambda: TabularMDP(noise=-1.0), "noise=-1.0 is a standard deviation"),
        (lambda: pack_mdps(torch.zeros(3, 2), torch.zeros(3, 2, 2)), r"\[3, 2, 2\] are no MDPs"),
        (lambda: unpack_mdps(torch.zeros(5, 60), 4, 2), r"\[5, 60\]; with 4 states and 2 actions.*40\]"),
    ],
)
def test_bad_sizes(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("row", [[0.2, 0.2], [1.5, -0.5], [float("nan"), 1.0]])
def test_transitions_that_are_no_probabilities_are_refused(row):
    env = TabularMDP(2, 1, batch_size=(2,))
    right = torch.tensor([[[[0.25, 0.75]], [[1.0, 0.0]]]]).repeat(2, 1, 1, 1)
    wrong = right.clone()
    wrong[1, 1, 0] = torch.tensor(row)
    with pytest.raises(ValueError, match="transitions that are no probabilities.*pack_mdps"):
        env.reset(TensorDict({"task": pack_mdps(torch.zeros(2, 2, 1), wrong)}, [2]))
    env.reset(TensorDict({"task": pack_mdps(torch.zeros(2, 2, 1), right)}, [2]))


def test_an_action_that_does_not_exist_is_refused():
    env = TabularMDP(3, 2, batch_size=(2,))
    env.start(random_mdps(3, 2)(env.batch_size, torch.Generator().manual_seed(0)))
    with pytest.raises(IndexError):
        env.play(torch.tensor([0, 2]))
