"""Experiments: one file each, importable (``recipes.bandit.main(...)``) and runnable (``python -m recipes.bandit``)."""

import os
import sys

# OpenMP reads this once, when PyTorch is loaded. Threads that spin while they wait hold the cores that other programs need: two
# trainings at once would be several times slower. Benchmarks have a machine of their own, where spinning is up to twice as fast.
if not any(argument.endswith("benchmark") for argument in sys.orig_argv):
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
