"""Environments whose task is a tensor: bandits, locomotion in MuJoCo (extra ``mujoco``), and the bridge to Gymnasium."""

from rl2_torchrl.envs.bandits import BernoulliBandit, QuadraticBandit, uniform_means, uniform_targets
from rl2_torchrl.envs.gymnasium import GymTaskEnv
from rl2_torchrl.envs.locomotion import (
    AntDirection,
    AntGoal,
    HalfCheetahDirection,
    HalfCheetahVelocity,
    LocomotionEnv,
    directions,
    goals_in_disc,
    signs,
    velocities,
)

__all__ = [
    "AntDirection",
    "AntGoal",
    "BernoulliBandit",
    "GymTaskEnv",
    "HalfCheetahDirection",
    "HalfCheetahVelocity",
    "LocomotionEnv",
    "QuadraticBandit",
    "directions",
    "goals_in_disc",
    "signs",
    "uniform_means",
    "uniform_targets",
    "velocities",
]
