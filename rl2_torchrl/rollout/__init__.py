"""The one loop over steps (`Rollout`), and the doors to what it plays."""

from rl2_torchrl.rollout.rollout import Rollout

__all__ = ["Rollout"]
