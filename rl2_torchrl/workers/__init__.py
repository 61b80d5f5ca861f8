"""Trials played by several processes, on one machine or more: `TrialWorkers` drives `Host`s, in each of which a `Player` plays."""

from rl2_torchrl.workers.trial_workers import TrialWorkers

__all__ = ["TrialWorkers"]
