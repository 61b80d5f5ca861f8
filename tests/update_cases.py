"""A small loss and a batch for `PPOUpdate`, what an update sees of them, and the ways that it goes."""

from functools import partial, partialmethod

import pytest
import torch
from tensordict import TensorDict

from rl2_torchrl import (
    GRUCategoricalActor,
    GRUValueHead,
    RL2PPOLoss,
)
from rl2_torchrl.gradients.graphed import why_not_graphed
from rl2_torchrl.passes import Passes


def make_loss(**kwargs):
    torch.manual_seed(0)
    return RL2PPOLoss(GRUCategoricalActor(5, 3, hidden_size=4), GRUValueHead(5, hidden_size=4), **kwargs)


def make_batch(rows=4, steps=6):
    """Whole trials ``[rows, steps]`` of random numbers; the memory is empty at their first steps."""
    generator = torch.Generator().manual_seed(1)

    def normal(*size):
        return torch.randn(rows, steps, *size, generator=generator)

    done = torch.zeros(rows, steps, 1, dtype=torch.bool)
    done[:, -1] = True
    later = ~done.roll(1, 1).unsqueeze(-1)
    entries = {
        "trans": normal(5),
        "is_init": done.roll(1, 1),
        "actor_hidden": normal(1, 4) * later,
        "critic_hidden": normal(1, 4) * later,
        "action": torch.randint(3, (rows, steps), generator=generator),
        "action_log_prob": normal(),
        "state_value": normal(1),
        "logits": normal(3),
        "next": {"reward": normal(1), "done": done, "terminated": done.clone(), "trans": normal(5)},
    }
    return TensorDict(entries, [rows, steps])


@pytest.fixture(params=["parts", "autograd", "graph"])
def way(request, monkeypatch):
    """Every test with gradients part by part and as on a CUDA device, where they serve; with autograd's."""
    if request.param == "graph":
        monkeypatch.setattr(Passes, "_choose", partialmethod(_choose_graph, Passes._choose))
    if request.param == "autograd":
        monkeypatch.setattr(RL2PPOLoss, "why_not_parts", lambda _: "not here")
    return request.param


def _choose_graph(passes, choose, optimizer):
    backend, reason, program = choose(passes, optimizer)
    is_alone = backend == "parts" and passes._loss.runs_beside() is None
    serves = passes._named == "auto" and is_alone and why_not_graphed(passes._loss, optimizer) is None
    return ("graph", "as on a device", None) if serves else (backend, reason, program)


class Seen:
    """Records what the loss is given, and the state in which it is."""

    def __init__(self, update):
        self.minibatches, self.lrs, self.coeffs = [], [], []
        self.update, self.chunks = update, update._minibatches
        self.chunks.order = partial(self.record, self.chunks.order)

    def record(self, order):
        """The minibatches of a pass, whichever way they will go."""
        index = order()
        for own in index.split(self.chunks.rows):
            entries = {key: entry[own] for key, entry in self.chunks.chunks.items()}
            self.minibatches.append(TensorDict(entries, entries["value_target"].shape[:2]))
            self.lrs.append(self.update.optimizer.param_groups[0]["lr"])
            self.coeffs.append(float(self.update.loss.entropy_coeff))
        return index

    def order(self, entry="value_target"):
        return [minibatch[entry].flatten() for minibatch in self.minibatches]


def parameters(update):
    return [p.detach().clone() for p in update.loss.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
