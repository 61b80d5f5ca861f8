"""RL² meta-reinforcement learning (Duan et al. 2016) on TorchRL."""

from rl2_torchrl.tasks import TaskDistribution, TaskSampler
from rl2_torchrl.transition import PreviousStep
from rl2_torchrl.trial import Trial

__all__ = ["PreviousStep", "TaskDistribution", "TaskSampler", "Trial"]
