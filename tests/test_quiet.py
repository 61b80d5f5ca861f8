"""TorchRL's own INFO lines are not on a user's screen; its warnings, and this package's lines, are."""

import logging

import pytest
import torch
from torchrl import torchrl_logger
from torchrl.data import LazyTensorStorage
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
    TrialCollector,
)
from rl2_torchrl.envs import BernoulliBandit, uniform_means
from rl2_torchrl.quiet import quiet_torchrl
from rl2_torchrl.testing import check_tensor_env, check_trial_env


@pytest.fixture
def said():
    """What a user sees of TorchRL's logger at its default level, which another test, or a recipe's command, may have changed."""
    lines, handler, level = [], logging.Handler(), torchrl_logger.level
    handler.emit = lambda record: lines.append(record.getMessage())
    torchrl_logger.addHandler(handler)
    torchrl_logger.setLevel(logging.INFO)
    yield lines
    torchrl_logger.setLevel(level)
    torchrl_logger.removeHandler(handler)


def store():
    LazyTensorStorage(3).set(0, torch.zeros(2))


def test_a_training_and_the_checks_say_nothing_of_torchrls(said):
    bandits = BernoulliBandit(3, batch_size=(4,))
    trials = Compose(Trial(episodes=2), TaskSampler(uniform_means(3)), PreviousStep())
    env = TransformedEnv(bandits, trials)
    actor, critic = GRUCategoricalActor.from_env(env, hidden_size=4), GRUValueHead.from_env(env, hidden_size=4)
    update = PPOUpdate(RL2PPOLoss(actor, critic), minibatches=2, epochs=1)
    for batch in TrialCollector(env, ActorCritic(actor, critic), frames_per_batch=8, total_frames=8):
        update(batch)
    check_tensor_env(BernoulliBandit(3, batch_size=(4,)), uniform_means(3))
    check_trial_env(env)
    assert said == []
    store()
    assert said[0].startswith("Initialized LazyTensorStorage")  # elsewhere TorchRL says what it did


def test_warnings_and_our_own_lines_are_heard(said):
    with quiet_torchrl():
        store()
        torchrl_logger.info("of this file")
        torchrl_logger.handle(logging.LogRecord("torchrl", logging.WARNING, torch.__file__, 1, "a warning", (), None))
    assert said == ["of this file", "a warning"]


def test_who_asks_for_more_gets_all(said):
    torchrl_logger.setLevel(logging.DEBUG)
    with quiet_torchrl():
        store()
    assert any(line.startswith("Initialized LazyTensorStorage") for line in said)
