"""RL² meta-reinforcement learning (Duan et al. 2016) on TorchRL.

The data flows: env -> `Trial`, `TaskSampler`, `PreviousStep` -> `ActorCritic` in TorchRL's ``Collector`` or `TrialCollector`
-> `PPOUpdate` (`TrialAdvantage`, `RL2PPOLoss`) -> `train` -> `adaptation_curve` -> `AdaptationReport`. Environments are in
`rl2_torchrl.envs`, classical agents in `rl2_torchrl.baselines`, contract checks in `rl2_torchrl.testing`.
"""

import rl2_torchrl.requirements  # noqa: F401  (first of all: it says in one line what is too new)
from rl2_torchrl.ablations import with_shuffled_rewards, with_zeroed_memory
from rl2_torchrl.agent import AdaptiveAgent, Signature, load_weights, register_part
from rl2_torchrl.callbacks import Callback
from rl2_torchrl.checks import TrainingCheckError, TrainingReport, check_training
from rl2_torchrl.collector import TrialCollector
from rl2_torchrl.describe import Description, describe
from rl2_torchrl.evaluation import AdaptationCurve, adaptation_curve
from rl2_torchrl.modules import (
    ActionDistribution,
    ActorCritic,
    CategoricalActions,
    ConvEncoder,
    FastGRUModule,
    GaussianActions,
    GRUCategoricalActor,
    GRUCore,
    GRUGaussianActor,
    GRUValueHead,
    Head,
    ImageEncoder,
    IndependentCategoricals,
    LSTMCore,
    MemoryValueHead,
    MLPEncoder,
    MultiCategoricalActions,
    RecurrentActor,
    RecurrentCore,
    RecurrentCritic,
    RunningNorm,
    TanhGaussianActions,
    orthogonal_init_,
    register_distribution,
)
from rl2_torchrl.objectives import MDPValues, RegretAdvantage, RL2PPOLoss, TaskBelief, TrialAdvantage, bandit_values
from rl2_torchrl.report import AdaptationReport
from rl2_torchrl.tasks import TaskDistribution, TaskSampler
from rl2_torchrl.training import TrainResult, train
from rl2_torchrl.transition import PreviousStep
from rl2_torchrl.trial import Trial
from rl2_torchrl.update import PPOUpdate, linear_decay
from rl2_torchrl.workers import TrialWorkers

__all__ = [
    "ActionDistribution",
    "ActorCritic",
    "AdaptationCurve",
    "AdaptationReport",
    "AdaptiveAgent",
    "Callback",
    "CategoricalActions",
    "ConvEncoder",
    "Description",
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
    "MDPValues",
    "MLPEncoder",
    "MemoryValueHead",
    "MultiCategoricalActions",
    "PPOUpdate",
    "PreviousStep",
    "RL2PPOLoss",
    "RecurrentActor",
    "RecurrentCore",
    "RecurrentCritic",
    "RegretAdvantage",
    "RunningNorm",
    "Signature",
    "TanhGaussianActions",
    "TaskBelief",
    "TaskDistribution",
    "TaskSampler",
    "TrainResult",
    "TrainingCheckError",
    "TrainingReport",
    "Trial",
    "TrialAdvantage",
    "TrialCollector",
    "TrialWorkers",
    "adaptation_curve",
    "bandit_values",
    "check_training",
    "describe",
    "linear_decay",
    "load_weights",
    "orthogonal_init_",
    "register_distribution",
    "register_part",
    "train",
    "with_shuffled_rewards",
    "with_zeroed_memory",
]
