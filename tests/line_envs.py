"""`Line`: a Gymnasium env of a few steps, whose goal is its task, and trials of several of them."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from rollouts import gravities, set_gravity, set_length
from tensordict import TensorDict
from torchrl.data import Unbounded
from torchrl.envs import Compose, TransformedEnv

from rl2_torchrl import PreviousStep, TaskSampler, Trial
from rl2_torchrl.envs import GymVectorEnv

SYNC_AND_ASYNC = pytest.mark.parametrize("vectorization", ["sync", "async"])


class Line(gymnasium.Env):
    """A walk to the right, as far as ``goal``, in 5 steps at the most; observes place, goal and a random number."""

    metadata = {"render_modes": []}
    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = spaces.Discrete(2)

    def __init__(self, goal=3.0, at_step=None):
        self.goal, self.at_step, self.resets = goal, at_step or (lambda env: None), 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if options:
            self.goal = float(options["goal"][0])
        self.place, self.steps, self.resets = 0, 0, self.resets + 1
        return self.observed(), {"resets": self.resets}

    def step(self, action):
        self.place, self.steps = self.place + int(action), self.steps + 1
        there = self.place >= self.goal
        info = {"steps": self.steps, "says": 1.0} if there else {"steps": self.steps}
        found = self.at_step(self)
        return self.observed(), 1.0 if found is None else found, there, self.steps >= 5, info

    def observed(self):
        return np.array([self.place, self.goal, self.np_random.random()])


class Hidden(Line):
    """Shows no goal."""

    def observed(self):
        return super().observed() * [1, 0, 1]


def set_goal(env, task):
    env.goal = float(task[0])


def set_goals(envs, task, rows):
    for env, goal, begins in zip(envs.unwrapped.envs, task, rows, strict=True):
        if begins:
            env.unwrapped.goal = float(goal[0])


def goals(batch_size, generator):
    return torch.randint(1, 6, (*batch_size, 1), generator=generator).float()


def lines(rows=3, make=Line, **kwargs):
    return GymVectorEnv(make, rows, set_task=set_goal, task_spec=Unbounded(1), seed=0, **kwargs)


def trials(env, tasks=goals, **trial):
    sampler = [] if tasks is None else [TaskSampler(tasks, seed=1)]
    return TransformedEnv(env, Compose(Trial(**trial or {"episodes": 2}), *sampler, PreviousStep()))


def right(env):
    return torch.ones(env.batch_size, dtype=torch.int64)


def with_task(env, *tasks):
    return TensorDict({"task": torch.tensor(tasks).unsqueeze(-1)}, env.batch_size)


def vector(mode, rows=3, kind=SyncVectorEnv, make=Line, **kwargs):
    return kind([make] * rows, autoreset_mode=mode, **kwargs)


def cart_poles(**kwargs):
    return GymVectorEnv("CartPole-v1", 3, set_task=set_length, task_spec=Unbounded(1), seed=0, **kwargs)


def pendulums(**kwargs):
    kwargs = {"max_episode_steps": 4, **kwargs}
    return GymVectorEnv("Pendulum-v1", 3, set_task=set_gravity, task_spec=Unbounded(1), seed=0, **kwargs)


def lengths(batch_size, generator):
    return 0.25 + torch.rand(*batch_size, 1, generator=generator)


FORMS = {
    "cart pole": lambda: trials(cart_poles(), lengths, episodes=2),
    "cart pole, cut": lambda: trials(cart_poles(), lengths, episodes=3, steps=17),
    "cart pole, truncated": lambda: trials(cart_poles(), lengths, steps=23, truncate=True),
    "cart pole without tasks": lambda: trials(GymVectorEnv("CartPole-v1", 3, seed=0), None, episodes=2),
    "pendulum": lambda: trials(pendulums(), gravities, episodes=2),
    "pendulum in processes": lambda: trials(pendulums(vectorization="async"), gravities, episodes=2),
    "lines": lambda: trials(lines(info_keys=["steps", "says", "resets"]), episodes=3),
    "lines, same step": lambda: trials(theirs(AutoresetMode.SAME_STEP), episodes=3),
    "lines, few tasks, same step": lambda: trials(theirs(AutoresetMode.SAME_STEP), one_or_two, episodes=2),
    "lines, disabled": lambda: trials(theirs(AutoresetMode.DISABLED), episodes=3),
}


def theirs(mode, **kwargs):
    keys = {"info_keys": ["steps", "says", "resets"]}
    return GymVectorEnv(vector(mode, **kwargs), set_task=set_goals, task_spec=Unbounded(1), seed=0, **keys)


def one_or_two(batch_size, generator):
    return torch.randint(1, 3, (*batch_size, 1), generator=generator).float()
