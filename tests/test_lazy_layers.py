"""Layers without sizes, as TorchRL's `MLP` makes them where it is not told `in_features`."""

import pytest
import torch
from torch import nn
from torchrl.envs import Compose, TransformedEnv
from torchrl.modules import MLP

from rl2_torchrl import (
    ActorCritic,
    GRUValueHead,
    PPOUpdate,
    PreviousStep,
    RL2PPOLoss,
    Trial,
    TrialCollector,
)
from rl2_torchrl.envs import BernoulliBandit
from rl2_torchrl.modules import RecurrentActor


def bandit():
    return TransformedEnv(BernoulliBandit(3, batch_size=(4,)), Compose(Trial(episodes=5), PreviousStep()))


def test_encoders_and_heads_take_their_sizes_from_the_slot():
    env = bandit()
    actor = RecurrentActor.from_env(env, hidden_size=8, encoder=MLP(out_features=6), head=MLP(out_features=3))
    critic = GRUValueHead.from_env(env, hidden_size=7, head=MLP(out_features=1, num_cells=[5]))
    update = PPOUpdate(RL2PPOLoss(actor, critic), epochs=1, lr=0.0)  # whose optimizer needs the sizes
    frames = {"frames_per_batch": 20, "total_frames": 20}
    (batch,) = TrialCollector(env, ActorCritic(actor, critic), keep=update.in_keys, **frames)
    assert update(batch)["max_ratio"] == pytest.approx(1, abs=1e-5)


def test_others_must_have_run_before_an_update_is_made():
    class Guess(nn.Module):
        in_keys = ["actor_features"]

        def __init__(self):
            super().__init__()
            self.layer = nn.LazyLinear(2)

        def forward(self, features):
            return {"loss_guess": self.layer(features).square().mean()}

    env = bandit()
    actor, critic = RecurrentActor.from_env(env, hidden_size=8), GRUValueHead.from_env(env, hidden_size=8)
    term = Guess()
    loss = RL2PPOLoss(actor, critic, terms=[term])
    with pytest.raises(ValueError, match="uninitialized parameter.*Call `forward` with a dummy batch"):
        PPOUpdate(loss)
    term(torch.zeros(2, 3, 8))
    PPOUpdate(loss)
