"""Experiments: one file each, importable (``recipes.bandit.main(...)``) and runnable (``python -m recipes.bandit``)."""

import os

# OpenMP reads this once, when PyTorch is loaded. Threads that spin while they wait would hold the cores that other runs on the
# same machine need: two trainings at once on two cores are then twenty times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
