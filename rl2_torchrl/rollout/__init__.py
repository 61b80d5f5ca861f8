"""The one loop over steps (`Rollout`), and the doors to what it plays."""

from rl2_torchrl.rollout.rollout import Rollout
from rl2_torchrl.rollout.transforms import is_native, trial_steps

__all__ = ["Rollout", "is_native", "trial_steps"]
