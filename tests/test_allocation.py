"""In a steady training no tensor of a whole batch is made anew: first touch of fresh memory costs more than the arithmetic."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recipes.benchmark import Workload, compose
from rl2_torchrl.training import _TrialReturns

# 32 minibatches: the largest tensor of one holds half a batch's numbers, 2 rows of 20 steps and 16 numbers a step.
WORKLOAD = Workload(arms=2, pulls=20, trials=64, units=2, minibatches=32, epochs=1)


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
    batches, returns = iter(collector), _TrialReturns()
    for _ in range(2):  # these make the buffers
        update(next(batches))
    with NewTensors(WORKLOAD.steps * 4) as new:  # one float32 a step
        batch = next(batches)
        update(batch)
        returns(batch)
    assert new.made == []
