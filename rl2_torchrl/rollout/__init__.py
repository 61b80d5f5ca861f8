"""The one loop over steps (`Rollout`), and the doors to what it plays."""

from rl2_torchrl.rollout.rollout import Rollout
from rl2_torchrl.rollout.transforms import trial_and_base

__all__ = ["Rollout", "trial_and_base"]
