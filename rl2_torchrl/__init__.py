"""RL² meta-reinforcement learning (Duan et al. 2016) on TorchRL.

The data flows: env -> `Trial`, `TaskSampler`, `PreviousStep` -> `ActorCritic` in TorchRL's ``Collector`` or `TrialCollector`
-> `PPOUpdate` (`TrialAdvantage`, `RL2PPOLoss`) -> `train` -> `adaptation_curve` -> `AdaptationReport`. Environments are in
`rl2_torchrl.envs`, classical agents in `rl2_torchrl.baselines`, contract checks in `rl2_torchrl.testing`.
"""

from rl2_torchrl.callbacks import Callback
from rl2_torchrl.collector import TrialCollector
from rl2_torchrl.evaluation import (
    AdaptationCurve,
    adaptation_curve,
    with_shuffled_rewards,
    with_zeroed_memory,
)
from rl2_torchrl.modules import (
    ActorCritic,
    FastGRUModule,
    GRUCategoricalActor,
    GRUGaussianActor,
    GRUValueHead,
    MemoryValueHead,
    orthogonal_init_,
)
from rl2_torchrl.objectives import RL2PPOLoss, TrialAdvantage
from rl2_torchrl.report import AdaptationReport
from rl2_torchrl.tasks import TaskDistribution, TaskSampler
from rl2_torchrl.training import TrainResult, train
from rl2_torchrl.transition import PreviousStep
from rl2_torchrl.trial import Trial
from rl2_torchrl.update import PPOUpdate, linear_decay
from rl2_torchrl.weights import load_weights, save_weights

__all__ = [
    "ActorCritic",
    "AdaptationCurve",
    "AdaptationReport",
    "Callback",
    "FastGRUModule",
    "GRUCategoricalActor",
    "GRUGaussianActor",
    "GRUValueHead",
    "MemoryValueHead",
    "PPOUpdate",
    "PreviousStep",
    "RL2PPOLoss",
    "TaskDistribution",
    "TaskSampler",
    "TrainResult",
    "Trial",
    "TrialAdvantage",
    "TrialCollector",
    "adaptation_curve",
    "linear_decay",
    "load_weights",
    "orthogonal_init_",
    "save_weights",
    "train",
    "with_shuffled_rewards",
    "with_zeroed_memory",
]
