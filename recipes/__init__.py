"""Experiments: one file each, importable (``recipes.bandit.main(...)``) and runnable (``python -m recipes.bandit``)."""

import os
import sys

# OpenMP reads this once, when PyTorch is loaded. Threads that spin while they wait hold the cores that other programs need: two
# trainings at once would be several times slower. Benchmarks have a machine of their own, where spinning is up to twice as fast.
# A benchmark is known by the script, or by the word behind -m: arguments that come after it may be called anything.
if not "".join(sys.orig_argv[-len(sys.argv) :][:1]).endswith(("benchmark", "benchmark.py")):
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
