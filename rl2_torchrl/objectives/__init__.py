"""The RL² loss and its terms, and advantages over trials."""

from rl2_torchrl.objectives.advantages import TrialAdvantage
from rl2_torchrl.objectives.belief import TaskBelief
from rl2_torchrl.objectives.ppo import RL2PPOLoss
from rl2_torchrl.objectives.regret import MDPValues, RegretAdvantage, bandit_values

__all__ = ["MDPValues", "RL2PPOLoss", "RegretAdvantage", "TaskBelief", "TrialAdvantage", "bandit_values"]
