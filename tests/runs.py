"""Tiny real runs for tests of checkpoints and faults."""

import multiprocessing
import os
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import torch
from torchrl.collectors import Collector
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
    TrialAdvantage,
    TrialCollector,
    train,
)
from rl2_torchrl.envs import BernoulliBandit, uniform_means

HISTORY = "checkpoint-history.jsonl"
ROWS, STEPS = 4, 7
BATCH = ROWS * STEPS  # trials last 5 steps: a batch of 7 ends in the middle of one


class Run:
    """A tiny real run; `update` is a `PPOUpdate` whose gradients flow through the chunk of a whole batch."""

    def __init__(
        self,
        updates=6,
        *,
        rows=ROWS,
        steps=STEPS,
        arms=3,
        units=4,
        episodes=5,
        env=None,
        lean=False,
        rollout="auto",
        elsewhere=False,
        seed=0,
        task_seed=1,
        env_seed=2,
        transforms=(),
        **update,
    ):
        torch.manual_seed(seed)
        torch.rand(99 * elsewhere)  # another process has other random numbers
        self.sampler = TaskSampler(uniform_means(arms), seed=task_seed)
        self.bandit = env or BernoulliBandit(arms, batch_size=(rows,), seed=env_seed)
        trials = TransformedEnv(
            self.bandit, Compose(Trial(episodes=episodes), self.sampler, *transforms, PreviousStep())
        )
        self.update = self.networks(trials, GRUCategoricalActor, units, **update)
        options = {"frames_per_batch": rows * steps, "total_frames": int(rows * steps * updates)}
        if lean:
            self.collector = TrialCollector(trials, self.policy, keep=self.update.in_keys, rollout=rollout, **options)
        else:
            self.collector = Collector(trials, self.policy, auto_register_policy_transforms=True, **options)

    def networks(
        self,
        env,
        actor_class,
        units,
        *,
        minibatches=2,
        lr=1e-2,
        clip_epsilon=0.3,
        gamma=0.99,
        sgd=False,
        actor=None,
        **options,
    ):
        actor = actor_class.from_env(env, hidden_size=units, **(actor or {}))
        critic = GRUValueHead.from_env(env, hidden_size=units)
        self.policy = ActorCritic(actor, critic)
        advantage = TrialAdvantage(critic=self.policy, gamma=gamma)
        loss = RL2PPOLoss(actor, critic, clip_epsilon=clip_epsilon)
        optimizer = {"optimizer": torch.optim.SGD(loss.parameters(), lr=lr, momentum=0.9)} if sgd else {"lr": lr}
        return PPOUpdate(loss, advantage, **{"epochs": 2, "minibatches": minibatches, **optimizer, **options})

    def train(self, *, evaluate=None, progress=False, **options):
        return train(self.collector, self.update, evaluate=evaluate, progress=progress, **options)

    def everything(self):
        """All that the next update depends on."""
        return {
            "parameters": dict(self.update.loss.named_parameters()),
            "optimizer": self.update.optimizer.state_dict(),
            "tasks": self.sampler.generator.get_state(),
            "env": self.bandit.generator.get_state(),
            "random numbers": torch.get_rng_state(),
        }


def without_time(history):
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in history]


def saved_steps(folder):
    return sorted(int(path.stem.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*.safetensors"))


def checkpoint(folder, update=3):
    return folder / f"checkpoint-{update * BATCH}.safetensors"


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_goes_on_as_unbroken(folder, unbroken):
    resumed = Run(5, elsewhere=True)
    result = resumed.train(checkpoints=folder, resume=True)
    assert without_time(result.history) == unbroken.history
    torch.testing.assert_close(resumed.everything(), unbroken.everything(), rtol=0, atol=0)


def program(text, *arguments, **options):
    """A Python program over `Run`, started."""
    text = "import logging; logging.basicConfig()\nfrom runs import *\n" + textwrap.dedent(text)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", text, *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes, **options)


@contextmanager
def forked(function):
    """A process that calls ``function(pause)``, from where it pauses, which it is not told to end, until it is killed."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def pause():
        theirs.send("now")
        theirs.recv()

    process = context.Process(target=function, args=(pause,))
    process.start()
    try:
        theirs.close()
        assert ours.recv() == "now"
        yield process
    finally:
        process.kill()
        process.join()
