"""Environments whose task is a tensor: bandits, tabular MDPs, a grid, a point robot, MuJoCo (extra ``mujoco``), the bridge to
Gymnasium; and `TensorEnv`, which one of your own derives from."""

from rl2_torchrl.envs.bandits import BernoulliBandit, QuadraticBandit, uniform_means, uniform_targets
from rl2_torchrl.envs.gridnavi import GridNavi, grid_goals
from rl2_torchrl.envs.gym_vector import GymVectorEnv
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
from rl2_torchrl.envs.point_robot import PointRobot, goals_on_half_circle
from rl2_torchrl.envs.tabular import TabularMDP, pack_mdps, random_mdps, unpack_mdps
from rl2_torchrl.envs.tensor_env import TensorEnv

__all__ = [
    "AntDirection",
    "AntGoal",
    "BernoulliBandit",
    "GridNavi",
    "GymTaskEnv",
    "GymVectorEnv",
    "HalfCheetahDirection",
    "HalfCheetahVelocity",
    "LocomotionEnv",
    "PointRobot",
    "QuadraticBandit",
    "TabularMDP",
    "TensorEnv",
    "directions",
    "goals_in_disc",
    "goals_on_half_circle",
    "grid_goals",
    "pack_mdps",
    "random_mdps",
    "signs",
    "uniform_means",
    "uniform_targets",
    "unpack_mdps",
    "velocities",
]
