"""Networks with memory, in four slots: encoder -> core -> head -> distribution. They go wherever TorchRL's own modules go."""

from rl2_torchrl.modules.actor_critic import ActorCritic
from rl2_torchrl.modules.cores import LSTMCore, RecurrentCore
from rl2_torchrl.modules.distributions import (
    ActionDistribution,
    CategoricalActions,
    GaussianActions,
    IndependentCategoricals,
    MultiCategoricalActions,
    TanhGaussianActions,
    register_distribution,
)
from rl2_torchrl.modules.gru import FastGRUModule, GRUCore
from rl2_torchrl.modules.init import orthogonal_init_
from rl2_torchrl.modules.layers import ConvEncoder, Head, ImageEncoder, MLPEncoder
from rl2_torchrl.modules.normalization import RunningNorm
from rl2_torchrl.modules.recurrent import (
    GRUCategoricalActor,
    GRUGaussianActor,
    GRUValueHead,
    MemoryValueHead,
    RecurrentActor,
    RecurrentCritic,
)

__all__ = [
    "ActionDistribution",
    "ActorCritic",
    "CategoricalActions",
    "ConvEncoder",
    "FastGRUModule",
    "GRUCategoricalActor",
    "GRUCore",
    "GRUGaussianActor",
    "GRUValueHead",
    "GaussianActions",
    "Head",
    "ImageEncoder",
    "IndependentCategoricals",
    "LSTMCore",
    "MLPEncoder",
    "MemoryValueHead",
    "MultiCategoricalActions",
    "RecurrentActor",
    "RecurrentCore",
    "RecurrentCritic",
    "RunningNorm",
    "TanhGaussianActions",
    "orthogonal_init_",
    "register_distribution",
]
