"""`AdaptiveAgent`: it does what the training's policy does, step for step, and says what is wrong with what it is given."""

from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Unbounded
from torchrl.envs import (
    ActionScaling,
    Compose,
    DoubleToFloat,
    ExplorationType,
    GymEnv,
    ObservationNorm,
    RewardClipping,
    RewardScaling,
    TransformedEnv,
    set_exploration_type,
)

import rl2_torchrl as rl2
from rl2_torchrl import AdaptiveAgent
from rl2_torchrl.agent.signature import Signature
from rl2_torchrl.envs import BernoulliBandit, GridNavi, GymVectorEnv, QuadraticBandit, TensorEnv, uniform_means, uniform_targets
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
    "image": (spaces.Box(0, 255, (12, 14, 3), np.uint8), spaces.Discrete(3)),
    "dict": (
        spaces.Dict({"seen": spaces.Box(-1, 1, (2,)), "at": spaces.Discrete(4, start=1), "sub": spaces.Dict({"x": spaces.Box(-1, 1)})}),
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
    return trial_env(QuadraticBandit(2, batch_size=(rows,), seed=2), tasks(uniform_targets(2)), before=transforms)


def decided(actor, gain=300.0):
    """First weights choose nearly at random: larger ones make actions differ by what is seen and remembered."""
    for name, parameter in actor.named_parameters():
        if "layers" in name:
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
        batch = Rollout(env, actor, steps, ["action", ("next", "reward")])()
    return batch["action"].movedim(1, 0), batch["next", "reward"].movedim(1, 0)


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
    again = AdaptiveAgent.load(agent.save(tmp_path / "agent.pt"))
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
    agent = AdaptiveAgent.load(agent.save(tmp_path / "agent.pt"))
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
