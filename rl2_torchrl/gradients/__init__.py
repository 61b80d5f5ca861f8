"""A PPO minibatch part by part: each part of a network with its own gradient, or with autograd's for itself alone."""

from rl2_torchrl.gradients.networks import parts_of
from rl2_torchrl.gradients.part import Part, State
from rl2_torchrl.gradients.policy import ENTROPY, LOG_PROB
from rl2_torchrl.gradients.program import Program

__all__ = ["ENTROPY", "LOG_PROB", "Part", "Program", "State", "parts_of"]
