"""What tests of replayed minibatches share: trainings that must go alike, a loss of modules of one's own, a term of a user's."""

import pytest
import torch
from loss_cases import (
    F64,
    UNITS,
    batch_of,
    loss_of,
)
from tensordict.nn import TensorDictSequential
from torch import nn
from torchrl.modules import ProbabilisticActor

from rl2_torchrl import PPOUpdate, RL2PPOLoss
from rl2_torchrl.gradients import Program
from rl2_torchrl.gradients.replays import Replays


def assert_alike(one, other, atol=1e-10):
    """Metrics, parameters and Adam's state of two trainings."""
    for ours, expected in zip(one[0], other[0], strict=True):
        assert ours == pytest.approx(expected, rel=1e-9 if atol < 1e-6 else 1e-3)
    for ours, expected in zip([*one[1], *one[2]], [*other[1], *other[2]], strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=atol)


def replays_of(loss, data, rows=3):
    replays = Replays(Program(loss), data, rows, passes=4)
    replays(torch.arange(rows))
    return replays, replays._recorded


def policy_of(*modules, loss=None, **options):
    """A loss whose actor is ``modules``, then the core and the head of ``loss``."""
    loss = loss_of("categorical", "separate", torch.float64) if loss is None else loss
    core, head = loss.actor_network.module[0].module
    actor = ProbabilisticActor(
        TensorDictSequential(*modules, core, head),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    return RL2PPOLoss(actor, loss.critic_network, **options)


def both_ways(make, batch=batch_of, kind="categorical", **options):
    """Asserts that updates of the loss that ``make`` gives go the same way by parts as by autograd; returns the loss of parts."""
    ends, losses = [], []
    for way in ("autograd", "parts"):
        torch.manual_seed(2)
        losses.append(loss := make())
        sizes = {"bptt": 2, "minibatches": 5, "epochs": 3, **options}
        update = PPOUpdate(loss, shuffle=False, backend=way, **sizes)
        torch.manual_seed(4)
        metrics = [update(batch(kind, torch.float64)) for _ in range(2)]
        ends.append((metrics, [p.detach() for p in loss.parameters()], []))
    assert_alike(*ends)
    return losses[1]


class Term(nn.Module):
    """A loss of the features, by a layer of its own, of the actor's weights and of what only some minibatches have."""

    in_keys = ("actor_features", "task", ("policy", "entropy"))

    def __init__(self, weights=(), depends=False, features=UNITS):
        super().__init__()
        torch.manual_seed(5)
        self.linear, self._weights, self._depends = nn.Linear(features, 2, **F64), list(weights), depends
        self.calls, self.kept = 0, []

    def forward(self, features, task, entropy):
        self.calls += 1
        self.kept.append((features, features.detach().clone()))
        loss = (self.linear(features) - task).square().mean() + sum(1e-3 * w.square().sum() for w in self._weights)
        if self._depends and task.sum() > 0:
            loss = loss - 0.01 * entropy.mean()
        return {"loss_task": loss, "task_seen": task.mean()}
