"""What `check_trial_env` asks of the env below `Trial`, the one that somebody has written: seeds, tasks, actions, memory."""

from rl2_torchrl.env_check import rows, steps, tasks
from rl2_torchrl.env_check.playing import EnvBelow

__all__ = ["RULES", "EnvBelow"]

#: The rules by name. Each returns what breaks it, or None.
RULES = {rule.__name__: rule for module in (rows, steps, tasks) for rule in module.RULES}
