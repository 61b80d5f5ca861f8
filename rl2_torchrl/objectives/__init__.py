"""The RL² loss, and advantages over trials."""

from rl2_torchrl.objectives.advantages import TrialAdvantage
from rl2_torchrl.objectives.ppo import RL2PPOLoss

__all__ = ["RL2PPOLoss", "TrialAdvantage"]
