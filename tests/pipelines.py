"""Pipelines to be checked, and the rule that a planted fault breaks."""

import pytest
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
)
from rl2_torchrl.checks import TrainingCheckError, check_training
from rl2_torchrl.envs import BernoulliBandit, TabularMDP, random_mdps, uniform_means

ROWS, ARMS, STATES, ACTIONS, EPISODE, EPISODES = 16, 3, 3, 2, 4, 3


TRIAL = EPISODE * EPISODES


def mdp_env(transition=None, tasks=None, rows=ROWS, seed=0):
    """Trials of 3 episodes of 4 steps in small MDPs."""
    base = TabularMDP(STATES, ACTIONS, episode_steps=EPISODE, batch_size=(rows,), seed=seed)
    sampler = TaskSampler(tasks or random_mdps(STATES, ACTIONS), seed=seed + 1)
    return TransformedEnv(base, Compose(Trial(episodes=EPISODES), sampler, transition or PreviousStep()))


def bandit_env(tasks=None, seed=1):
    transforms = Compose(Trial(episodes=5), TaskSampler(tasks or uniform_means(ARMS), seed=seed), PreviousStep())
    return TransformedEnv(BernoulliBandit(ARMS, batch_size=(ROWS,), seed=0), transforms)


def networks(env, **kwargs):
    torch.manual_seed(0)
    return GRUCategoricalActor.from_env(env, hidden_size=8, **kwargs), GRUValueHead.from_env(env, hidden_size=8)


def pipeline(env, actor=None, critic=None, *, steps=2 * TRIAL, policy=None, loss=None, primers=True, **options):
    """TorchRL's collector, and an update of ``actor`` and ``critic``."""
    if actor is None:
        actor, critic = networks(env)
    policy = policy or ActorCritic(actor, critic)
    frames = {"frames_per_batch": env.batch_size.numel() * steps, "total_frames": -1}
    collector = Collector(env, policy, auto_register_policy_transforms=primers, **frames)
    return collector, PPOUpdate(loss or RL2PPOLoss(actor, critic), minibatches=2, epochs=1, **options)


def first_batch(collector):
    return next(iter(collector)).clone()


def broken_rule(collector, update, batch=None, **kwargs):
    with pytest.raises(TrainingCheckError) as error:
        check_training(collector, update, batch, **kwargs)
    return error.value.rule
