"""Environments whose task is a tensor: bandits, and the bridge to Gymnasium."""

from rl2_torchrl.envs.bandits import BernoulliBandit, QuadraticBandit, uniform_means, uniform_targets
from rl2_torchrl.envs.gymnasium import GymTaskEnv

__all__ = ["BernoulliBandit", "GymTaskEnv", "QuadraticBandit", "uniform_means", "uniform_targets"]
