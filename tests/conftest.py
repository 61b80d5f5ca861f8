"""The suite runs in several processes side by side (pytest-xdist): threads of one that wait must not spin on another's core."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # read by OpenMP when PyTorch is loaded, which is later
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
