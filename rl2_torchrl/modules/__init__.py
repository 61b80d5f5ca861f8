"""GRU actors and value heads: TensorDictModules that go wherever TorchRL's own go."""

from rl2_torchrl.modules.actor import GRUCategoricalActor, GRUGaussianActor
from rl2_torchrl.modules.actor_critic import ActorCritic
from rl2_torchrl.modules.cores import LSTMCore, RecurrentCore
from rl2_torchrl.modules.gru import FastGRUModule, GRUCore
from rl2_torchrl.modules.init import orthogonal_init_
from rl2_torchrl.modules.value import GRUValueHead, MemoryValueHead

__all__ = [
    "ActorCritic",
    "FastGRUModule",
    "GRUCategoricalActor",
    "GRUCore",
    "GRUGaussianActor",
    "GRUValueHead",
    "LSTMCore",
    "MemoryValueHead",
    "RecurrentCore",
    "orthogonal_init_",
]
