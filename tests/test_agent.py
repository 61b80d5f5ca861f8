"""`AdaptiveAgent`: it does what the training's policy does, step for step, and says what is wrong with what it is given."""

import copy
import pickle
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tensordict.nn import ProbabilisticTensorDictSequential
from torch import nn
from torchrl.data import Bounded, MultiOneHot, Unbounded
from torchrl.envs import (
    ActionScaling,
    Compose,
    DoubleToFloat,
    ExplorationType,
    FlattenObservation,
    GymEnv,
    GymWrapper,
    ObservationNorm,
    RenameTransform,
    RewardClipping,
    RewardScaling,
    SerialEnv,
    TransformedEnv,
    UnsqueezeTransform,
    set_exploration_type,
)

import rl2_torchrl as rl2
from rl2_torchrl import AdaptiveAgent
from rl2_torchrl.agent.signature import Signature
from rl2_torchrl.envs import (
    BernoulliBandit,
    GymTaskEnv,
    GymVectorEnv,
    QuadraticBandit,
    TensorEnv,
    uniform_means,
    uniform_targets,
)
from rl2_torchrl.rollout import Rollout

ROWS, EPISODES = 6, 3


class Toy(gymnasium.Env):
    """An env of any spaces, without chance: what it shows depends on what was done; episodes of 4 steps."""

    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space
        self.episodes = 0

    def reset(self, *, seed=None, options=None):
        self.steps, self.episodes, self.pay = 0, self.episodes + 1, 0.0
        return self._observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.steps += 1
        self.pay = float(np.sum(np.asarray(action, dtype=float))) + 0.1 * self.steps
        return self._observe(), self.pay, self.steps == 4, False, {}

    def _observe(self):
        self.observation_space.seed(100 * self.episodes + 10 * self.steps + int(7 * self.pay) % 7)
        return self.observation_space.sample()


SPACES = {
    "discrete from 5": (spaces.Discrete(3, start=5), spaces.Discrete(4, start=2)),
    "several": (spaces.MultiDiscrete([3, 2], start=[1, 4]), spaces.MultiDiscrete([3, 4], start=[2, 0])),
    "flags": (spaces.MultiBinary(3), spaces.MultiBinary(2)),
    "box": (spaces.Box(-1, 1, (2,)), spaces.Box(np.float32([-0.3, -0.1]), np.float32([0.2, 0.4]))),
    "float64": (spaces.Box(-1, 1, (3,), np.float64), spaces.Box(-1, 1, (), np.float64)),
    "words": (spaces.Box(0, 60_000, (2,), np.uint16), spaces.Discrete(3)),
    "image": (spaces.Box(0, 255, (12, 14, 3), np.uint8), spaces.Discrete(3)),
    "dict": (
        spaces.Dict(
            {
                "seen": spaces.Box(-1, 1, (2,)),
                "at": spaces.Discrete(4, start=1),
                "sub": spaces.Dict({"x": spaces.Box(-1, 1)}),
            }
        ),
        spaces.Discrete(3),
    ),
    "tuple": (spaces.Tuple([spaces.Box(-1, 1, (2,)), spaces.Discrete(3)]), spaces.Discrete(3)),
}


def toys(name, rows):
    return trial_env(GymVectorEnv(partial(Toy, *SPACES[name]), rows))


def trial_env(base, *transforms, episodes=EPISODES, before=(), **options):
    trial = rl2.Trial(episodes=episodes)
    return TransformedEnv(base, Compose(trial, *before, *transforms, rl2.PreviousStep(**options)))


def tasks(distribution):
    return rl2.TaskSampler(distribution, seed=1)


def bandits(rows=ROWS):
    return trial_env(BernoulliBandit(4, batch_size=(rows,), seed=2), tasks(uniform_means(4)))


def targets(*transforms, rows=ROWS):
    base = QuadraticBandit(2, batch_size=(rows,), seed=2)
    return trial_env(base, tasks(uniform_targets(2)), before=transforms, done_at_start=1.0)


def decided(actor, gain=1000.0):
    """First weights choose nearly at random: a larger last layer makes actions differ by what is seen and remembered."""
    [head] = [module for module in actor.modules() if isinstance(module, rl2.Head)]
    for parameter in head.layers[-1].parameters():
        parameter.data.mul_(gain)
    return actor


def make(env, seed=0, *, kind=rl2.RecurrentActor, **slots):
    torch.manual_seed(seed)
    return decided(kind.from_env(env, **slots))


NETWORKS = {
    "gru": {},
    "two layers": {"num_layers": 2, "hidden_size": 8},
    "lstm": {"core": partial(rl2.LSTMCore, hidden_size=8)},
    "mlp": {"encoder": partial(rl2.MLPEncoder, num_cells=[8, 6], activation=nn.Tanh)},
    "skip": {"num_cells": [16], "skip": True, "hidden_size": 8},
    "head": {"num_cells": [16, 8], "activation": partial(nn.LeakyReLU, 0.3)},
    "double": {"dtype": torch.float64, "hidden_size": 8},
    "norm": {"normalize": True},
}


def play(agent, env, steps, seed):
    """The actions and rewards ``[steps, N]`` of an agent on the env that is below all transforms, and the trials' starts."""
    torch.manual_seed(seed)
    td, actions, rewards = env.reset(), [], []
    agent.new_trial(ROWS)
    for _ in range(steps):
        shown = {key: td[key] for key in agent.signature.observations}
        action = agent.act(nested(shown) if shown else None)
        td, after = env.step_and_maybe_reset(td.set("action", as_policy(agent, torch.as_tensor(action))))
        agent.observe(td["next", "reward"], td["next", "episode_done"])
        if td["next", "done"].any():
            agent.new_trial(rows=td["next", "done"].squeeze(-1))
        actions.append(torch.as_tensor(action))
        rewards.append(td["next", "reward"])
        td = after
    return torch.stack(actions), torch.stack(rewards)


def rewards_of(agent, env, steps, *, seed):
    """The rewards ``[steps]`` of an agent on one Gymnasium env, in one trial."""
    torch.manual_seed(seed)
    agent.new_trial()
    (observation, _), rewards = env.reset(), []
    for _ in range(steps):
        observation, reward, terminated, _, _ = env.step(agent.act(observation))
        agent.observe(reward, terminated)
        if terminated:
            observation, _ = env.reset()
        rewards.append(reward)
    return np.asarray(rewards)


def nested(shown):
    out = {}
    for key, value in shown.items():
        *folders, name = (key,) if isinstance(key, str) else key
        place = out
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = value
    return out


def as_policy(agent, action):
    acted = agent.signature.action
    return action if acted.start is None else action - acted.start


def trained(env, actor, steps, seed):
    """Likewise by the training's own rollout."""
    torch.manual_seed(seed)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        batch = Rollout(env, actor, steps, [env.action_key, ("next", "reward")])()
    return batch[env.action_key].movedim(1, 0), batch["next", "reward"].movedim(1, 0)


# ------------------------------------------------------- the training's policy
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("make_env", [bandits, targets], ids=["categorical", "gaussian"])
def test_it_plays_as_the_training_does(make_env, name, tmp_path):
    actor = make(make_env(), **NETWORKS[name])
    if name == "norm":
        norm = next(module for module in actor.modules() if isinstance(module, rl2.RunningNorm))
        norm.update_statistics(3 + 2 * torch.randn(500, len(norm.mean)))
    steps = 40
    expected = trained(make_env(), actor, steps, seed=5)
    agent = AdaptiveAgent.from_policy(actor, make_env())
    again = AdaptiveAgent.load(agent.save(tmp_path / "agent.safetensors"))
    assert len(expected[0].reshape(len(expected[0]), -1).unique(dim=0)) > 5
    for each in (agent, again):
        actions, rewards = play(each, make_env(), steps, seed=5)
        # An env of float32 takes actions so from an agent; in training it computes with a network's float64.
        tolerance = {"rtol": 0, "atol": 1e-5 if name == "double" else 0}
        torch.testing.assert_close(actions, expected[0].to(actions.dtype), **tolerance)
        torch.testing.assert_close(rewards, expected[1].to(rewards.dtype), **tolerance)


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("rows", [None, ROWS], ids=["one", "rows"])
def test_it_plays_gymnasiums_own_env(name, rows, tmp_path):
    steps, count = 4 * EPISODES + 6, rows or 1
    actor = make(toys(name, count), hidden_size=8)
    actions, rewards = trained(toys(name, count), actor, steps, seed=3)
    agent = AdaptiveAgent.from_policy(actor, toys(name, count))
    agent = AdaptiveAgent.load(agent.save(tmp_path / "agent.safetensors"))
    makers, mode = [partial(Toy, *SPACES[name])] * count, gymnasium.vector.AutoresetMode.SAME_STEP
    env = Toy(*SPACES[name]) if rows is None else gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=mode)
    torch.manual_seed(3)
    observation, _ = env.reset()
    for t in range(steps):
        if t % (4 * EPISODES) == 0:
            agent.new_trial(rows)
        action = agent.act(observation)
        assert isinstance(action, np.ndarray | np.generic)
        observation, reward, terminated, _, _ = env.step(action)
        agent.observe(reward, terminated)
        if rows is None and terminated:
            observation, _ = env.reset()
        torch.testing.assert_close(torch.as_tensor(reward).reshape(-1).float(), rewards[t].squeeze(-1), rtol=0, atol=0)
    assert len(actions.reshape(steps, -1).unique(dim=0)) > 1


@pytest.mark.parametrize("rows", [None, 2])
@pytest.mark.parametrize("name", ["discrete from 5", "several", "box", "float64"])
def test_it_acts_as_a_task_env_has_its_env_act(name, rows, tmp_path):
    toy = partial(Toy, spaces.Box(-1, 1, (2,)), SPACES[name][1])
    row = partial(GymTaskEnv, toy, set_task=lambda env, task: None, task_spec=Unbounded(1))
    env = trial_env(row() if rows is None else SerialEnv(rows, row), tasks(uniform_means(1)))
    actor = make(env, hidden_size=8)
    agent = AdaptiveAgent.load(AdaptiveAgent.from_policy(actor, env).save(tmp_path / "agent.safetensors"))
    seen = env.reset()
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        rewards = env.step(actor(seen.clone().set("is_init", torch.ones_like(seen["done"]))))["next", "reward"]
    agent.new_trial(rows)
    action = agent.act(seen["observation"].numpy(), deterministic=True)
    for one, reward in zip([action] if rows is None else action, rewards.flatten(), strict=True):
        gym = toy()
        gym.reset()
        assert gym.step(one)[1] == pytest.approx(reward.item(), abs=1e-5)


# ------------------------------------------------------ what stands between env and policy
@pytest.mark.parametrize(
    "act",
    [
        lambda: ActionScaling(loc=0.1, scale=0.2),
        lambda: ActionScaling(standard_normal=False),
        lambda: ObservationNorm(0.1, 0.2, in_keys=[], in_keys_inv=["action"], standard_normal=True),
        lambda: ObservationNorm(0.1, 5.0, in_keys=[], in_keys_inv=["action"]),
    ],
    ids=["scaled", "of 0 to 1", "normal", "affine"],
)
def test_transforms_of_the_env_are_taken_along(tmp_path, act):
    def env():
        norm = ObservationNorm(loc=0.5, scale=2.0, in_keys=["observation"], standard_normal=True)
        shift = ObservationNorm(loc=torch.tensor([1.0, -1.0]), scale=3.0, in_keys=["observation"])
        base = GymVectorEnv(partial(Toy, *SPACES["box"]), 1)
        pay = RewardScaling(loc=0.25, scale=4.0)
        return trial_env(base, DoubleToFloat(), norm, shift, pay, act())

    actor = make(env(), hidden_size=8)
    actions, rewards = trained(env(), actor, 12, seed=3)
    agent = AdaptiveAgent.from_policy(actor, env())
    agent = AdaptiveAgent.load(agent.save(tmp_path / "agent.safetensors"))
    assert 4.0 * rewards_of(agent, Toy(*SPACES["box"]), 12, seed=3) + 0.25 == pytest.approx(
        rewards.flatten().numpy(), abs=1e-5
    )
    assert actions.std() > 0.1


def test_transforms_that_name_and_reshape_are_taken_along(tmp_path):
    shown, done = spaces.Box(-1, 1, (2, 3)), spaces.Box(-1, 1, ())

    def env(*norms):
        forms = [
            *norms,
            FlattenObservation(-2, -1, in_keys=["observation"]),
            ObservationNorm(loc=torch.arange(6.0), scale=2.0, in_keys=["observation"]),
            RenameTransform(["observation"], ["seen"]),
            RenameTransform(["reward"], ["pay"]),
            RenameTransform(["pay"], ["reward"]),
            ActionScaling(loc=torch.tensor([0.25]), scale=torch.tensor([0.5])),
            RenameTransform([], [], ["action"], ["push"]),
        ]
        return trial_env(GymVectorEnv(partial(Toy, shown, done), 1), DoubleToFloat(), before=forms)

    actor = make(env(), hidden_size=8)
    actions, rewards = trained(env(), actor, 12, seed=3)
    agent = AdaptiveAgent.from_policy(actor, env())
    assert (agent.signature.action.key, agent.signature.inputs[0]) == ("push", "seen")
    agent = AdaptiveAgent.load(agent.save(tmp_path / "agent.safetensors"))
    assert rewards_of(agent, Toy(shown, done), 12, seed=3) == pytest.approx(rewards.flatten().numpy(), abs=1e-5)
    assert actions.std() > 0.1
    norm = ObservationNorm(loc=torch.zeros(2, 3), scale=1.0, in_keys=["observation"])
    with pytest.raises(NotImplementedError, match="scales 'observation' place by place before it is reshaped"):
        AdaptiveAgent.from_policy(actor, env(norm))


def test_a_scalar_action_is_one_outside_too():
    class Scalar(TensorEnv):
        def begin(self, task, rows):
            return task, None

        def advance(self, state, action):
            return state, None, 1 - (action - 0.5).square().unsqueeze(-1), None, None

    def env():
        base = Scalar(task_spec=Unbounded(1), action_spec=Bounded(-9, 9, ()), max_episode_steps=3, batch_size=(2,))
        return trial_env(base, UnsqueezeTransform(-1, in_keys=[], in_keys_inv=["action"]), episodes=9)

    actor = make(env(), hidden_size=8)
    expected, _ = trained(env(), actor, 12, seed=3)
    agent = AdaptiveAgent.from_policy(actor, env())
    torch.manual_seed(3)
    agent.new_trial(2)
    for step in range(12):
        action = agent.act()
        assert action == pytest.approx(expected[step].squeeze(-1).numpy(), abs=1e-5)
        agent.observe(1 - (action - 0.5) ** 2, step % 3 == 2)


def test_transforms_that_cannot_be_taken_along():
    env = targets(RewardClipping(-1.0, 1.0))
    with pytest.raises(NotImplementedError, match="the env has a RewardClipping, which an agent cannot take along"):
        AdaptiveAgent.from_policy(make(env), env)


@pytest.mark.parametrize("key", ["observation", "trans", "reward"])
def test_what_changes_behind_the_transition_input_cannot_be_taken_along(key):
    norm = RewardScaling(0.0, 2.0) if key == "reward" else ObservationNorm(loc=1.0, scale=2.0, in_keys=[key])
    transforms = Compose(rl2.Trial(steps=5), rl2.PreviousStep(), norm)
    env = TransformedEnv(GymVectorEnv("CartPole-v1", 2), transforms)
    words = rf"{type(norm).__name__} stands behind PreviousStep and changes \['{key}'\].*Put it before PreviousStep"
    with pytest.raises(NotImplementedError, match=words):
        AdaptiveAgent.from_policy(make(env), env)


def test_an_agent_plays_without_what_only_training_does(tmp_path):
    env = bandits()
    actor = make(env, encoder=partial(rl2.MLPEncoder, activation=partial(nn.Dropout, 0.5)), hidden_size=8)
    agent = AdaptiveAgent.from_policy(actor, env)  # whose policy is in training, and stays so
    assert actor.training
    for each in (agent, AdaptiveAgent.load(agent.save(tmp_path / "agent.safetensors"))):
        memories = []
        for _ in range(2):
            each.new_trial()
            each.act(deterministic=True)
            memories.append(each.memory[-1].clone())
        assert torch.equal(*memories)


def test_one_hot_actions_are_numbers_outside():
    env = trial_env(GymEnv("CartPole-v1"))
    agent = AdaptiveAgent.from_policy(make(env), env)
    agent.new_trial()
    action = agent.act(np.zeros(4), deterministic=True)
    assert action in (0, 1)
    # What the policy is told of it is the one-hot vector.
    assert agent.memory[0].tolist() == [[float(action == 0), float(action == 1)]]


def test_several_one_hot_actions_are_a_number_each_outside(tmp_path):
    env = trial_env(GymWrapper(Toy(*SPACES["several"])))
    agent = AdaptiveAgent.from_policy(make(env), env)
    agent = AdaptiveAgent.load(agent.save(tmp_path / "agent.safetensors"))
    agent.new_trial()
    action = agent.act(np.zeros(5), deterministic=True)
    one_hot = [number == choice for choice, count in zip(action, (3, 4), strict=True) for number in range(count)]
    assert agent.memory[0].tolist() == [one_hot]


def test_one_hot_actions_of_flags_are_numbers_outside():
    class Choices(TensorEnv):
        def begin(self, task, rows):
            return task, None

        def advance(self, state, action):
            return state, None, action.sum(-1, keepdim=True).float(), None, None

    base = Choices(task_spec=Unbounded(1), action_spec=MultiOneHot([3, 2]), max_episode_steps=2, batch_size=(2,))
    env = TransformedEnv(base, Compose(rl2.Trial(episodes=2), rl2.PreviousStep()))
    agent = AdaptiveAgent.from_policy(make(env), env)
    agent.new_trial()
    assert agent.act(deterministic=True).shape == (2,)


def test_an_entry_that_the_trial_adds_is_asked_for():
    env = bandits()
    actor = make(env, extra_keys=["time_left"])
    agent = AdaptiveAgent.from_policy(actor, env)
    agent.new_trial()
    assert 0 <= agent.act({"time_left": [1.0]}) < 4
    with pytest.raises(RuntimeError, match="observe"):
        agent.act({"time_left": [1.0]})


# ------------------------------------------------------------------ how it is used
def test_rows_that_begin_anew_remember_nothing():
    env = bandits()
    agent = AdaptiveAgent.from_policy(make(env), env)
    noise = torch.zeros(ROWS, 4)
    agent.new_trial(ROWS)
    fresh = agent.act(noise=noise)
    for reward in (1.0, 0.0, 1.0):
        agent.observe(torch.full((ROWS,), reward), True)
        agent.act(noise=noise)
    agent.observe(np.ones((ROWS, 1)), np.ones((ROWS, 1), dtype=bool))
    anew = torch.arange(ROWS) % 2 == 0
    agent.new_trial(rows=anew)
    again = torch.as_tensor(agent.act(noise=noise))
    assert torch.equal(again[anew], torch.as_tensor(fresh)[anew])
    reference = AdaptiveAgent.from_policy(agent.policy, env)
    reference.new_trial(ROWS)
    reference.act(noise=noise)
    hidden, first = agent.memory[1], reference.memory[1]
    torch.testing.assert_close(hidden[anew], first[anew], rtol=0, atol=0)
    assert (hidden[~anew] - first[~anew]).abs().amax(dim=(1, 2)).min() > 0.01


def test_training_on_does_not_change_an_agent():
    env = bandits()
    actor = make(env)
    agent = AdaptiveAgent.from_policy(actor, env)
    expected = {name: value.clone() for name, value in agent.policy.state_dict().items()}
    for parameter in actor.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(agent.policy.state_dict(), expected, rtol=0, atol=0)


def test_weights_that_are_loaded_into_an_agents_policy_play_whole_from_the_next_trial_on():
    first, second = (rl2.AdaptiveAgent.from_policy(make(bandits(), seed), bandits()) for seed in (1, 2))
    play(first, bandits(), 5, seed=3)
    first.policy.load_state_dict(second.policy.state_dict())
    for one, other in zip(play(first, bandits(), 20, seed=3), play(second, bandits(), 20, seed=3), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda agent: pickle.loads(pickle.dumps(agent))])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_copy_plays_weights_of_its_own(copied, name):
    first, second = (AdaptiveAgent.from_policy(make(bandits(), seed, **NETWORKS[name]), bandits()) for seed in (1, 2))
    expected = [play(agent, bandits(), 5, seed=3) for agent in (first, second)]
    of_first = copied(first)
    of_first.policy.load_state_dict(second.policy.state_dict())  # in the copy alone
    kept = copied(first)
    first.policy.load_state_dict(second.policy.state_dict())
    for agent, played in ((of_first, expected[1]), (kept, expected[0]), (first, expected[1])):
        for one, other in zip(play(agent, bandits(), 5, seed=3), played, strict=True):
            assert torch.equal(one, other)


def test_a_copy_goes_on_with_the_trial():
    agent = AdaptiveAgent.from_policy(make(bandits()), bandits())
    play(agent, bandits(), 5, seed=3)
    other = copy.deepcopy(agent)
    assert agent.act(deterministic=True).tolist() == other.act(deterministic=True).tolist()
    assert all(map(torch.equal, agent.memory, other.memory))


@pytest.mark.parametrize("stands", ["after a reward", "before one", "at a trial's start"])
@pytest.mark.parametrize("rows", [None, 3])
def test_a_session_goes_on_in_another_agent(rows, stands, tmp_path):
    agent = AdaptiveAgent.from_policy(make(bandits()), bandits())
    agent.new_trial(rows)
    for done in (False, True):
        agent.act(deterministic=True)
        agent.observe(np.ones(rows or 1), done)
    if stands == "before one":
        agent.act(deterministic=True)
    elif stands == "at a trial's start":
        agent.new_trial(rows)
    state = agent.state_dict()
    state["memory"] = dict(reversed(state["memory"].items()))  # by its names, in whatever order
    torch.save(state, tmp_path / "session.pt")
    other = AdaptiveAgent.load(agent.save(tmp_path / "agent.safetensors"))
    with pytest.raises(RuntimeError, match="no trial has begun"):
        other.state_dict()
    other.load_state_dict(torch.load(tmp_path / "session.pt"))
    for each in (agent, other):
        if stands == "before one":
            each.observe(np.zeros(rows or 1))
        each.last = each.act(deterministic=True)
    assert np.array_equal(agent.last, other.last)
    assert all(map(torch.equal, agent.memory, other.memory))


def test_a_memory_that_nobody_would_look_at_is_refused():
    agent = AdaptiveAgent.from_policy(make(bandits()), bandits())
    agent.new_trial()
    with pytest.raises(RuntimeError, match="a trial begins, and no memory is looked at: .*load_state_dict"):
        agent.memory = [torch.zeros(1, *shape) for shape in agent.signature.memory.values()]
    other = AdaptiveAgent.from_policy(make(bandits(), hidden_size=8), bandits())
    with pytest.raises(ValueError, match="another policy's"):
        other.load_state_dict(agent.state_dict())
    with pytest.raises(KeyError, match="the state lacks .*'start'"):
        other.load_state_dict({})
    agent.act()
    agent.observe(1.0)
    with pytest.raises(ValueError, match="a memory of shapes"):
        agent.memory = [torch.zeros(1, 3)]


def test_a_memory_may_be_numpys():
    agent = AdaptiveAgent.from_policy(make(bandits()), bandits())
    agent.new_trial(2)
    agent.act()
    agent.observe([1.0, 0.0])
    agents = copy.deepcopy(agent), copy.deepcopy(agent)
    agents[0].memory = [each.numpy() for each in agent.memory]
    agents[1].memory = [each.numpy().astype(np.float64) for each in agent.memory]
    agent.act(deterministic=True)
    for each in agents:
        each.act(deterministic=True)
        torch.testing.assert_close(each.memory, agent.memory, rtol=0, atol=0)


def test_another_policy_makes_another_agent():
    agent = rl2.AdaptiveAgent.from_policy(make(bandits()), bandits())
    with pytest.raises(AttributeError, match="policy"):  # its step would go on with the first
        agent.policy = make(bandits(), 1)


@pytest.mark.parametrize("assign", [False, True], ids=["copied", "assigned"])
def test_weights_that_are_loaded_in_the_middle_of_a_trial_play_whole_from_the_next_step_on(assign):
    first, second = (rl2.AdaptiveAgent.from_policy(make(bandits(), seed), bandits()) for seed in (1, 2))
    for agent in (first, second):
        agent.new_trial(ROWS)
        agent.act(deterministic=True)
        agent.observe(torch.ones(ROWS), True)
    second.memory = [each.clone() for each in first.memory]
    first.policy.load_state_dict(second.policy.state_dict(), assign=assign)
    for agent in (first, second):
        agent.act(deterministic=True)
    for one, other in zip(first.memory, second.memory, strict=True):
        assert torch.equal(one, other)


def test_tensors_for_tensors_and_numpy_for_the_rest():
    env = toys("box", 1)
    agent = AdaptiveAgent.from_policy(make(env), env)
    for observation, kind in [(torch.zeros(2), torch.Tensor), (np.zeros(2), np.ndarray), ([0.0, 0.0], np.ndarray)]:
        agent.new_trial()
        assert isinstance(agent.act(observation), kind)
        agent.new_trial(3)
        action = agent.act(torch.zeros(3, 2) if kind is torch.Tensor else [[0.0, 0.0]] * 3)
        assert isinstance(action, kind)
        assert action.shape == (3, 2)


@pytest.mark.parametrize(
    ("name", "observation", "same"),
    [
        ("discrete from 5", np.uint32(6), 6),
        ("box", {"observation": [0.5, 0.25]}, [0.5, 0.25]),
        ("words", torch.tensor([7, 60_000], dtype=torch.uint16), [7, 60_000]),
        ("image", np.arange(504, dtype=np.uint8).reshape(12, 14, 3)[::-1], None),
    ],
)
def test_arrays_of_any_layout_and_whole_numbers_of_any_dtype_are_read(name, observation, same):
    agent, memories = AdaptiveAgent.from_policy(make(toys(name, 1), hidden_size=8), toys(name, 1)), []
    for given in (observation, observation.copy() if same is None else same):
        agent.new_trial()
        agent.act(given, deterministic=True)
        memories.append(agent.memory[-1])
    assert torch.equal(*memories)


def test_an_actor_and_critic_is_its_actor():
    env = bandits()
    actor = make(env)
    agent = AdaptiveAgent.from_policy(rl2.ActorCritic(actor, rl2.GRUValueHead.from_env(env)), env)
    torch.testing.assert_close(agent.policy.state_dict(), actor.state_dict(), rtol=0, atol=0)


def bad(call, error, match, name="box"):
    env = toys(name, 1) if name else bandits()
    agent = AdaptiveAgent.from_policy(make(env), env)
    with pytest.raises(error, match=match):
        call(agent)


def begun(call, rows=None):
    def run(agent):
        agent.new_trial(rows)
        call(agent)

    return run


BAD = {
    "no trial": (lambda agent: agent.act([0.0, 0.0]), RuntimeError, "no trial has begun"),
    "no rows": (lambda agent: agent.new_trial(0), ValueError, "num_rows=0.*at least 1"),
    "rows in the place of their number": (
        lambda agent: agent.new_trial(np.ones(2, bool)),
        ValueError,
        "num_rows=array.*must be a whole number",
    ),
    "a folder": (lambda agent: agent.save(Path(__file__).parent), IsADirectoryError, "is a folder.*/agent.safetensors"),
    "rows of nothing": (lambda agent: agent.new_trial(rows=[True]), ValueError, "begin one *first"),
    "rows and how many": (
        begun(lambda agent: agent.new_trial(2, rows=[True, False]), 2),
        ValueError,
        "num_rows=2 .* leave one",
    ),
    "numbers of rows": (begun(lambda agent: agent.new_trial(rows=[0, 1]), 2), ValueError, "bool"),
    "a flag in quotes": (begun(lambda agent: agent.act(deterministic="False")), TypeError, "neither True nor False"),
    "a graph's suffix": (lambda agent: agent.save("agent.onnx"), ValueError, "which export.. writes"),
    "an agent as a policy": (lambda agent: rl2.adaptation_curve(bandits(), agent, 2), TypeError, "its .policy"),
    "more rows": (begun(lambda agent: agent.new_trial(rows=[True] * 3), 2), ValueError, "begin one *first"),
    "reward in words": (
        begun(lambda agent: (agent.act([0, 0]), agent.observe("1"))),
        TypeError,
        "invalid data type 'str'",
    ),
    "no action": (begun(lambda agent: agent.observe(1.0)), RuntimeError, "act\\(\\) comes first"),
    "twice": (
        begun(lambda agent: (agent.act([0, 0]), agent.act([0, 0]))),
        RuntimeError,
        "the last action's reward is missing",
    ),
    "observation and info": (
        begun(lambda agent: agent.act((np.zeros(2), {}))),
        TypeError,
        "of what reset.. and step.. return give the first alone",
    ),
    "no observation": (begun(lambda agent: agent.act()), ValueError, "'observation', and there is no observation"),
    "shape": (
        begun(lambda agent: agent.act([0.0] * 3)),
        ValueError,
        r"'observation' has shape \(3,\); it must be \(2,\)",
    ),
    "rows": (begun(lambda agent: agent.act([[0.0] * 2] * 3), 2), ValueError, r"shape \(3, 2\); it must be \(2, 2\)"),
    "NaN": (begun(lambda agent: agent.act([0.0, np.nan])), FloatingPointError, "'observation' is not finite"),
    "more than float32 can say": (
        begun(lambda agent: agent.act(np.full(2, np.finfo(np.float64).max))),
        FloatingPointError,
        "'observation' is not finite in torch.float32",
    ),
    "reward": (
        begun(lambda agent: (agent.act([0, 0]), agent.observe(np.inf))),
        FloatingPointError,
        "is not finite: the memory",
    ),
    "rewards": (
        begun(lambda agent: (agent.act([0, 0]), agent.observe([1.0, 2.0]))),
        ValueError,
        "reward has 2 numbers, .* 1 trials",
    ),
    "entry": (
        begun(lambda agent: agent.act({"seen": [0, 0], "at": 1})),
        KeyError,
        "the observation lacks 'sub.x'",
        "dict",
    ),
    "another entry": (
        begun(lambda agent: agent.act({"seen": [0.0, 0.0]})),
        KeyError,
        "the observation lacks 'observation'",
    ),
    **{
        f"{name} in the place of an array": (
            begun(lambda agent, given=given: agent.act({"seen": given, "at": 1, "sub": {"x": [0.0]}})),
            TypeError,
            "the observation 'seen' is no array of numbers",
            "dict",
        )
        for name, given in {"ragged": [[0.0], [0.0, 0.0]], "text": ["a", "b"], "objects": [{}, None]}.items()
    },
    "choice": (
        begun(lambda agent: agent.act(4)),
        ValueError,
        "'observation' is .*4.*: choices are fewer than 3",
        "discrete from 5",
    ),
    "image": (
        begun(lambda agent: agent.act(np.zeros((3, 12, 14), np.uint8))),
        ValueError,
        r"must be \(12, 14, 3\)",
        "image",
    ),
    "pixels from 0 to 1": (
        begun(lambda agent: agent.act(np.full((12, 14, 3), 0.5))),
        ValueError,
        "'observation' holds 0.5, which the env's torch.uint8 cannot",
        "image",
    ),
    "pixels beyond 255": (
        begun(lambda agent: agent.act(np.full((12, 14, 3), 256))),
        ValueError,
        "'observation' holds 256, which the env's torch.uint8 cannot",
        "image",
    ),
    "half a choice": (
        begun(lambda agent: agent.act(5.5)),
        ValueError,
        "'observation' holds 5.5, which the env's torch.int64 cannot",
        "discrete from 5",
    ),
    "noise of one row": (
        begun(lambda agent: agent.act(torch.zeros(2, 2), noise=torch.zeros(1, 2)), 2),
        ValueError,
        r"noise has shape \(1, 2\); it must be \(2, \d+\), draws of its own for each row",
    ),
    "noise for no noise": (
        begun(lambda agent: agent.act([0, 0], deterministic=True, noise=torch.zeros(1, 2))),
        ValueError,
        "deterministic=True acts without noise",
    ),
    "no reward": (
        begun(lambda agent: (agent.act([0, 0]), agent.observe(None))),
        ValueError,
        "reward has 0 numbers, but there are 1 trials",
    ),
    "a complex reward": (
        begun(lambda agent: (agent.act([0, 0]), agent.observe(1j))),
        TypeError,
        "reward=1j is complex",
    ),
    "half an end": (
        begun(lambda agent: (agent.act(torch.zeros(2, 2)), agent.observe([0, 1], [0.3, np.nan])), 2),
        ValueError,
        "must be True or False",
    ),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_use(case):
    bad(*case)


def test_a_policy_that_is_one_flat_sequence(tmp_path):
    """As `ProbabilisticTensorDictSequential(core, head, distribution)` is one."""
    env = bandits()
    actor = make(env)
    networks, sample = actor.module
    flat = ProbabilisticTensorDictSequential(*networks.module, sample)
    agents = [AdaptiveAgent.from_policy(policy, env) for policy in (actor, flat)]
    agents.append(AdaptiveAgent.load(agents[1].save(tmp_path / "agent.safetensors")))
    first, *others = (play(agent, bandits(), 5, seed=3) for agent in agents)
    for other in others:
        assert all(map(torch.equal, first, other))


def test_an_agent_says_what_it_is():
    assert repr(AdaptiveAgent.from_policy(make(bandits()), bandits())).endswith(
        ": nothing -> action [] of torch.int64)"
    )


@pytest.mark.parametrize("done", [True, np.True_, [1, 1], torch.ones(2, 1)])
def test_ways_to_say_that_all_episodes_end(done):
    agent = AdaptiveAgent.from_policy(make(bandits()), bandits())
    agent.new_trial(2)
    agent.act()
    agent.observe([0.0, 1.0], done)
    assert agent._done.tolist() == [True, True]


def test_policies_that_are_no_agents():
    env = bandits()
    laplace = rl2.ActionDistribution(1, ["loc"], torch.distributions.Laplace, {"scale": 0.1})
    with pytest.raises(TypeError, match="one distribution that can act by noise from outside"):
        AdaptiveAgent.from_policy(rl2.RecurrentActor(6, laplace), env)
    with pytest.raises(ValueError, match="of which 0 are written by a PreviousStep"):
        AdaptiveAgent.from_policy(make(env), TransformedEnv(BernoulliBandit(4, batch_size=(2,)), rl2.Trial(episodes=2)))


def test_a_signature_comes_back_from_its_text():
    for name in SPACES:
        env = toys(name, 2)
        text = AdaptiveAgent.from_policy(make(env), env).signature.as_json()
        assert Signature.from_json(text).as_json() == text
