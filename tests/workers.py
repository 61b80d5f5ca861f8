"""What workers make in tests: envs whose tasks can end or fail the process in which they are drawn."""

import os
import signal
from functools import partial
from pathlib import Path

import torch
from torchrl.envs import Compose, TransformedEnv

from rl2_torchrl import (
    ActorCritic,
    GRUCategoricalActor,
    GRUValueHead,
    PPOUpdate,
    PreviousStep,
    RL2PPOLoss,
    TaskSampler,
    Trial,
    TrialWorkers,
)
from rl2_torchrl.envs import BernoulliBandit, uniform_means

WORKERS, ROWS, ARMS, EPISODES = 2, 4, 3, 5
STEPS = 2 * EPISODES
FRAMES = WORKERS * ROWS * STEPS


def tasks(folder, batch_size, generator):
    """Arm means; a file "kill", "kill-next" or "fail" in ``folder`` strikes the first process that finds it here."""
    for name in ("kill", "kill-next", "fail"):
        try:
            Path(folder, name).unlink()
        except FileNotFoundError:
            continue
        if name != "fail":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ArithmeticError("no task could be drawn")
    return torch.rand(*batch_size, ARMS, generator=generator)


def make_env(folder, rows=ROWS):
    """Bandits with the task in the data; all workers give the same seeds, which are to be replaced."""
    sampler = TaskSampler(partial(tasks, folder), seed=0)
    trial = Compose(Trial(episodes=EPISODES), sampler, PreviousStep())
    return TransformedEnv(BernoulliBandit(ARMS, batch_size=(rows,), seed=0), trial)


def same_tasks(batch_size, generator):
    """Drawn by a generator of its own, which begins alike in all workers."""
    return torch.rand(*batch_size, ARMS, generator=torch.Generator().manual_seed(0))


def draws_from(distribution, env):
    sampler = next(each for each in env.transform if isinstance(each, TaskSampler))
    sampler.distribution = distribution


class Counts(BernoulliBandit):
    """With a goal, and a count of its steps, as attributes that anybody may read."""

    def __init__(self, goal, **options):
        super().__init__(ARMS, **options)
        self.goal, self.pulls = goal, 0

    def advance(self, state, action):
        self.pulls += 1
        return super().advance(state, action)


def make_counting_env(folder, rows=ROWS, goal=7):
    trial = Compose(Trial(episodes=EPISODES), TaskSampler(uniform_means(ARMS)), PreviousStep())
    return TransformedEnv(Counts(goal, batch_size=(rows,)), trial)


def leaves_its_number(folder, env):
    """A file of the process's number and of how many rows ``env`` has."""
    Path(folder, f"{os.getpid()}.told-{env.batch_size.numel()}").touch()


def rows_and_process(env):
    return env.batch_size.numel(), os.getpid()


class Setup:
    """Networks, and workers whose envs look into ``folder``."""

    def __init__(self, folder, bptt=None, make_env=make_env, **options):
        torch.manual_seed(0)
        self.folder, self.backend, env = folder, options.get("backend"), make_env(folder)
        actor = GRUCategoricalActor.from_env(env, hidden_size=4)
        critic = GRUValueHead.from_env(env, hidden_size=4)
        self.policy = ActorCritic(actor, critic)
        self.update = PPOUpdate(RL2PPOLoss(actor, critic), lr=1e-2, epochs=2, bptt=bptt)
        self.keep = [*self.update.in_keys, "task"]
        options = {"workers": WORKERS, "frames_per_batch": FRAMES, "keep": self.keep, "seed": 0, **options}
        self.collector = TrialWorkers(partial(make_env, folder), self.policy, **options)
