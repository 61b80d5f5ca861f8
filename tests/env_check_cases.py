"""What tests of `check_trial_env` share: a sound env, and trials around an env."""

import numpy as np
import torch
from tensordict import TensorDict
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import Compose, EnvBase, TransformedEnv

from rl2_torchrl import PreviousStep, TaskSampler, Trial

ROWS = 4


class Sound(EnvBase):
    """A walk with a drift, which is the task, and noise of each row's own; episodes last ``5`` steps."""

    dtype, seeds = torch.float32, range(1, ROWS + 1)

    def __init__(self, rows=ROWS):
        super().__init__(batch_size=(rows,))
        self.state_spec = Composite(task=Unbounded((rows, 1)), shape=(rows,))
        self.observation_spec = Composite(place=Unbounded((rows, 1), dtype=self.dtype), shape=(rows,))
        self.action_spec, self.reward_spec = Categorical(3, shape=(rows,)), Unbounded((rows, 1))
        self.place, self.drift = torch.zeros(rows, 1, dtype=self.dtype), torch.zeros(rows, 1)
        self.steps = torch.zeros(rows, 1, dtype=torch.int64)
        self._set_seed(0)

    def _reset(self, tensordict=None, **kwargs):
        rows = tensordict.get("_reset", torch.ones(*self.batch_size, 1, dtype=torch.bool))
        self.hear(rows, tensordict["task"] if "task" in tensordict.keys() else self.drift)
        return self.begin(rows)

    def hear(self, rows, task):
        self.drift = torch.where(rows, task, self.drift)

    def begin(self, rows):
        self.place = torch.where(rows, self.noise(rows), self.place)
        self.steps = torch.where(rows, 0, self.steps)
        return self.shown(done=torch.zeros_like(rows), terminated=torch.zeros_like(rows))

    def _step(self, tensordict):
        every = torch.ones(*self.batch_size, 1, dtype=torch.bool)
        self.place = self.place + tensordict["action"].unsqueeze(-1) - 1 + self.drift + self.noise(every)
        self.steps = self.steps + 1
        done = self.ended()
        return self.shown(reward=self.paid(), done=done, terminated=done.clone())

    def ended(self):
        return self.steps >= 5

    def paid(self):
        return -self.place.abs().float()

    def shown(self, **flags):
        return TensorDict({"place": self.place.clone(), **flags}, self.batch_size)

    def noise(self, rows):
        pairs = zip(self.generators, rows.flatten().tolist(), strict=True)
        return torch.tensor([[generator.random() if draws else 0.0] for generator, draws in pairs], dtype=self.dtype)

    def _set_seed(self, seed):
        self.generators = [np.random.default_rng([seed or 0, own]) for own in list(self.seeds)[: self.batch_size[0]]]


class NeverHears(Sound):
    def hear(self, rows, task):
        pass


class OneBefore(Sound):
    """Hears a task when the next one is given."""

    def hear(self, rows, task):
        self.drift, self.next = self.__dict__.get("next", self.drift), torch.where(rows, task, self.drift)


class BeginsAll(Sound):
    """A reset of some rows is one of all."""

    def begin(self, rows):
        return super().begin(torch.ones_like(rows))


class Doubles(Sound):
    dtype = torch.float64


class NeverEnds(Sound):
    def ended(self):
        return self.steps < 0


class ShowsTask(Sound):
    def __init__(self, rows=ROWS):
        super().__init__(rows)
        self.observation_spec["hint"] = Unbounded((rows, 1))

    def shown(self, **flags):
        return super().shown(**flags).set("hint", self.drift.clone())


def drifts(batch_size, generator):
    return torch.randn(*batch_size, 1, generator=generator)


def trial_env(env, *behind):
    return TransformedEnv(env, Compose(Trial(episodes=3), TaskSampler(drifts, seed=0), PreviousStep(), *behind))
