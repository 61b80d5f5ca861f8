"""In a steady training no tensor of a whole batch is made anew: first touch of fresh memory costs more than the arithmetic."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recipes.benchmark import Workload, compose
from rl2_torchrl import kernels
from rl2_torchrl.training_loop import TrialReturns

# 64 minibatches: the largest tensor of one holds a quarter of a batch's numbers, 2 rows of 20 steps and 16 numbers a step.
WORKLOAD = Workload(arms=2, pulls=20, trials=128, units=2, minibatches=64, epochs=1)


class NewTensors(TorchDispatchMode):
    """Writes down the operations that make a tensor of at least ``size`` bytes in memory that none of its inputs has."""

    def __init__(self, size):
        super().__init__()
        self.size, self.made = size, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known and storage.nbytes() >= self.size:
                self.made.append(f"{function} of {storage.nbytes()} bytes")
        return out


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("value_target", ["gae", "return"])
def test_nothing_of_the_batchs_size_is_made_anew(value_target, monkeypatch):
    monkeypatch.setattr("rl2_torchrl.rollout.rollout._ROWS_AT_ONCE", 2 * WORKLOAD.trials)
    collector, update = compose(WORKLOAD)
    update.advantage.value_target = value_target
    batches, returns = iter(collector), TrialReturns()
    for _ in range(2):  # these make the buffers
        update(next(batches))
    with NewTensors(WORKLOAD.steps * 4) as new:  # one float32 a step
        batch = next(batches)
        update(batch)
        returns(batch)
    assert new.made == []


# Without TorchRL and the rest of the package, whose import takes longer than all else.
FREED_AND_MADE_AGAIN = """
import resource
import sys
from types import ModuleType

import torch

for name in ("rl2_torchrl", "rl2_torchrl.kernels", "rl2_torchrl.kernels.recording"):
    sys.modules[name] = ModuleType(name)
sys.modules["rl2_torchrl.kernels"].__path__ = [sys.argv[1]]
sys.modules["rl2_torchrl.kernels.recording"].Recording = None
from rl2_torchrl.kernels.workspace import keep_freed_memory

keep_freed_memory()
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(2**18) for _ in range(50)]  # 50 MB, as autograd's graph of a minibatch is
    del kept
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tells glibc what to keep")
def test_what_autograd_frees_with_a_minibatch_is_kept_for_the_next():
    # Three of them: untold, glibc keeps it in one process of seven, where something happens to lie behind it.
    for _ in range(3):
        command = [sys.executable, "-c", FREED_AND_MADE_AGAIN, Path(kernels.__file__).parent]
        pages = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        assert pages < 1000  # of 4 kB, touched for the first time: some 12,000 where memory is handed back


def test_an_update_asks_for_that(monkeypatch):
    asked = []
    monkeypatch.setattr("rl2_torchrl.update.keep_freed_memory", lambda: asked.append(True))
    compose(WORKLOAD)
    assert asked == [True]
