"""The variants of `recipes.extension_benchmark`: a builder for each, what it is compared with, and the arithmetic that it adds."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import Compose, EnvBase, TransformedEnv

from recipes.benchmark import Workload, compose
from recipes.extensions import (
    Gate,
    OneHotBandit,
    PlainSeeker,
    Seeker,
    TaskPrediction,
    WeightPenalty,
    gated_head,
    weight_penalty,
)
from rl2_torchrl import (
    ActorCritic,
    GRUCategoricalActor,
    GRUGaussianActor,
    MemoryValueHead,
    PPOUpdate,
    PreviousStep,
    RL2PPOLoss,
    TaskSampler,
    Trial,
    TrialCollector,
)
from rl2_torchrl.envs import PointRobot, goals_on_half_circle
from rl2_torchrl.modules import GRUCore, LSTMCore, MLPEncoder


# --------------------------------------------------------------- what is timed
class Timed(Protocol):
    """Something whose seconds a call measures."""

    def __call__(self) -> float:
        """Does it once and returns the seconds that it took."""


class Training:
    """An iteration: a batch is collected, and the networks learn from it."""

    def __init__(self, collector: Collector, update: PPOUpdate):
        self._collector, self._update, self._batches = collector, update, iter(collector)

    def __call__(self) -> float:
        start = time.perf_counter()
        self._update(next(self._batches))
        return time.perf_counter() - start

    def ways(self) -> dict[str, tuple[str, str | None]]:
        """Backend and reason of collector and update."""
        return {"collector": _way(self._collector), "update": _way(self._update)}

    def close(self) -> None:
        """Ends the collector."""
        self._collector.shutdown()


class Collection(Training):
    """A batch is collected, no more."""

    def __init__(self, collector: Collector):
        super().__init__(collector, None)

    def __call__(self) -> float:
        start = time.perf_counter()
        next(self._batches)
        return time.perf_counter() - start

    def ways(self) -> dict[str, tuple[str, str | None]]:
        """Backend and reason of the collector."""
        return {"collector": _way(self._collector)}


def _way(part: object) -> tuple[str, str | None]:
    return getattr(part, "backend", type(part).__name__), getattr(part, "reason", None)


@dataclass(frozen=True)
class Layer:
    """A piece of arithmetic, alone.

    Args:
        sequence: maps ``[N, T, input_size]`` to a tensor to differentiate; None where a batch's steps alone play it.
        step: maps ``[N, input_size]``; None where it is not played.
        input_size: size of its input.
        reads_data: whether its input is data, by which nobody asks for a gradient.
    """

    sequence: Callable[[torch.Tensor], torch.Tensor] | None
    step: Callable[[torch.Tensor], object] | None
    input_size: int
    reads_data: bool = False

    def seconds(self, workload: Workload) -> float:
        """Seconds of what an iteration of ``workload`` asks of it."""
        rows = -(-workload.trials // workload.minibatches)
        one = torch.randn(workload.trials, self.input_size)
        many = torch.randn(rows, workload.pulls, self.input_size, requires_grad=not self.reads_data)
        start = time.perf_counter()
        if self.step is not None:
            with torch.no_grad():
                for _ in range(workload.pulls):
                    self.step(one)
        for _ in range(workload.epochs * workload.minibatches if self.sequence is not None else 0):
            out = self.sequence(many)
            out.backward(torch.ones_like(out))
        return time.perf_counter() - start


@dataclass(frozen=True)
class BaseGRU:
    """The GRU of the base's update and collection, as they run it: no autograd, and packed once for a batch's steps.

    Args:
        core: the core that the base has.
    """

    core: GRUCore

    @torch.no_grad()
    def seconds(self, workload: Workload) -> float:
        """Seconds of what an iteration of ``workload`` asks of it."""
        rows, inputs = -(-workload.trials // workload.minibatches), self.core.input_size
        one, many = torch.randn(workload.trials, inputs), torch.randn(rows, workload.pulls, inputs)
        part, memory = self.core.gradient_part(), self.core.initial_memory(workload.trials)
        start = time.perf_counter()
        step = self.core.step_function()
        for _ in range(workload.pulls):
            step(one, *memory)
        for _ in range(workload.epochs * workload.minibatches):
            state = {part.in_keys[0]: many}
            part.forward(state)
            part.backward({part.out_keys[0]: torch.ones_like(state[part.out_keys[0]])})
        return time.perf_counter() - start


@dataclass(frozen=True)
class PenaltyAlone:
    """A `WeightPenalty`'s own entry, forward and back.

    Args:
        parameters: what it punishes.
    """

    parameters: Sequence[nn.Parameter]

    def seconds(self, workload: Workload) -> float:
        """Seconds of what an iteration of ``workload`` asks of it."""
        start = time.perf_counter()
        for _ in range(workload.epochs * workload.minibatches):
            torch.autograd.grad(weight_penalty(self.parameters), self.parameters)
        return time.perf_counter() - start


def feed_forward(module: nn.Module, input_size: int, *, reads_data: bool = False) -> Layer:
    """A module that is called in the same way in collection and update."""
    return Layer(module, module, input_size, reads_data)


@dataclass(frozen=True)
class Arithmetic:
    """What a variant computes beyond the base (``added``), and what it does not that the base does (``removed``)."""

    workload: Workload
    added: Sequence[Layer | PenaltyAlone] = ()
    removed: Sequence[Layer | BaseGRU] = ()

    def __call__(self) -> float:
        added, removed = (sum(layer.seconds(self.workload) for layer in side) for side in (self.added, self.removed))
        return max(0.0, added - removed)


# ------------------------------------------------------------------- variants
@dataclass(frozen=True)
class Variant:
    """A user's part in a training.

    Args:
        bound: the largest tax allowed.
        what: what it is, in words.
        build: makes it for a workload.
        base: makes what it is compared with.
        arithmetic: what it computes beyond the base, for a workload.
        against: what the base is, in words.
    """

    bound: float
    what: str
    build: Callable[[Workload], Training]
    base: Callable[[Workload], Training] | None = None
    arithmetic: Callable[[Workload], Arithmetic] = Arithmetic
    against: str = "base"


def training(workload: Workload, **parts) -> Training:
    """The base's training, or one with other ``parts`` (`recipes.benchmark.compose`)."""
    return Training(*compose(workload, **parts))


def extra_loss(workload: Workload) -> Training:
    """A loss term with a linear layer."""
    return training(workload, loss=partial(RL2PPOLoss, terms=[TaskPrediction(workload.units, workload.arms)]))


def extra_loss_arithmetic(workload: Workload) -> Arithmetic:
    """The term alone, which no collection plays."""
    rows = -(-workload.trials // workload.minibatches)
    term = TaskPrediction(workload.units, workload.arms)
    task = torch.rand(rows, workload.pulls, workload.arms)
    layer = Layer(lambda x: term(x, task)["loss_prediction"], None, workload.units)
    return Arithmetic(workload, [layer])


def loss_subclass(workload: Workload) -> Training:
    """A subclass of the loss."""
    return training(workload, loss=WeightPenalty)


def loss_subclass_arithmetic(workload: Workload) -> Arithmetic:
    """The penalty alone."""
    actor = GRUCategoricalActor(workload.arms + 2, workload.arms, hidden_size=workload.units)
    return Arithmetic(workload, [PenaltyAlone(list(actor.parameters()))])


def tanh(workload: Workload) -> Training:
    """Tanh between GRU and both heads."""
    return training(workload, actor={"activation": nn.Tanh}, critic={"activation": nn.Tanh})


def tanh_arithmetic(workload: Workload) -> Arithmetic:
    """Two Tanh in place of two ReLU."""
    both = [[feed_forward(activation(), workload.units)] * 2 for activation in (nn.Tanh, nn.ReLU)]
    return Arithmetic(workload, *both)


def one_hot(workload: Workload) -> Training:
    """One-hot actions."""
    return training(workload, bandit=OneHotBandit)


def two_layers(workload: Workload) -> Training:
    """Two GRU layers."""
    return training(workload, actor={"num_layers": 2})


def two_layers_arithmetic(workload: Workload) -> Arithmetic:
    """The second layer: `torch.nn.GRU` and `torch.nn.GRUCell`."""
    gru = nn.GRU(workload.units, workload.units, batch_first=True)
    return Arithmetic(
        workload, [Layer(lambda x: gru(x)[0], nn.GRUCell(workload.units, workload.units), workload.units)]
    )


def lstm(workload: Workload) -> Training:
    """An LSTM for a core."""
    return training(workload, actor={"core": partial(LSTMCore, hidden_size=workload.units), "hidden_size": None})


def lstm_arithmetic(workload: Workload) -> Arithmetic:
    """`torch.nn.LSTM` and `torch.nn.LSTMCell` in place of the base's GRU."""
    inputs, units = workload.arms + 2, workload.units
    plain, cell = nn.LSTM(inputs, units, batch_first=True), nn.LSTMCell(inputs, units)
    return Arithmetic(
        workload, [Layer(lambda x: plain(x)[0], cell, inputs, reads_data=True)], [BaseGRU(GRUCore(inputs, units))]
    )


def mlp_encoder(workload: Workload) -> Training:
    """An MLP in front of the GRU."""
    return training(workload, actor={"encoder": partial(MLPEncoder, num_cells=[workload.units])})


def mlp_encoder_arithmetic(workload: Workload) -> Arithmetic:
    """The MLP, and the GRU's product with a wider input in place of a narrower one."""
    inputs, units = workload.arms + 2, workload.units
    mlp = feed_forward(nn.Sequential(nn.Linear(inputs, units), nn.ReLU()), inputs, reads_data=True)
    wide = feed_forward(nn.Linear(units, 3 * units), units)
    narrow = feed_forward(nn.Linear(inputs, 3 * units), inputs, reads_data=True)
    return Arithmetic(workload, [mlp, wide], [narrow])


def user_module(workload: Workload) -> Training:
    """A module that nobody knows, between GRU and head."""
    return training(workload, actor={"head": gated_head})


def user_module_arithmetic(workload: Workload) -> Arithmetic:
    """The module alone."""
    return Arithmetic(workload, [feed_forward(Gate(workload.units), workload.units)])


def seeking(env: EnvBase, workload: Workload, collector: type[Collector] = TrialCollector) -> Collection:
    """Collection of trials of ``workload.pulls`` steps in which points look for goals; episodes are ragged."""
    trial = Compose(
        Trial(steps=workload.pulls), TaskSampler(goals_on_half_circle(), seed=1), PreviousStep(["observation"])
    )
    env = TransformedEnv(env, trial)
    actor = GRUGaussianActor.from_env(env, hidden_size=workload.units)
    critic = MemoryValueHead.from_env(env, actor, detach=False)
    options = {"frames_per_batch": workload.steps, "total_frames": -1}
    if collector is Collector:
        options |= {"auto_register_policy_transforms": True}
    else:
        options |= {"keep": PPOUpdate(RL2PPOLoss(actor, critic)).in_keys}
    return Collection(collector(env, ActorCritic(actor, critic), **options))


def user_tensor_env(workload: Workload) -> Collection:
    """A user's ragged env on tensors."""
    return seeking(Seeker(batch_size=(workload.trials,)), workload)


def native_env(workload: Workload) -> Collection:
    """The package's env of the same arithmetic."""
    return seeking(PointRobot(batch_size=(workload.trials,)), workload)


def torchrl_env(workload: Workload) -> Collection:
    """A user's plain TorchRL env."""
    return seeking(PlainSeeker((workload.trials,)), workload)


def torchrl_collector(workload: Workload) -> Collection:
    """The same env in TorchRL's own collector."""
    return seeking(PlainSeeker((workload.trials,)), workload, Collector)


VARIANTS = {
    "extra_loss": Variant(1.15, "loss term of a linear layer", extra_loss, arithmetic=extra_loss_arithmetic),
    "loss_subclass": Variant(1.4, "subclass of the loss", loss_subclass, arithmetic=loss_subclass_arithmetic),
    "tanh": Variant(1.15, "Tanh for ReLU", tanh, arithmetic=tanh_arithmetic),
    "one_hot": Variant(1.1, "one-hot actions", one_hot),
    "two_layers": Variant(1.3, "two GRU layers", two_layers, arithmetic=two_layers_arithmetic),
    "lstm": Variant(1.3, "LSTM for GRU", lstm, arithmetic=lstm_arithmetic),
    "mlp_encoder": Variant(1.3, "MLP before the GRU", mlp_encoder, arithmetic=mlp_encoder_arithmetic),
    "user_module": Variant(1.3, "module before the head", user_module, arithmetic=user_module_arithmetic),
    "user_tensor_env": Variant(1.2, "ragged TensorEnv", user_tensor_env, native_env, against="PointRobot"),
    "torchrl_env": Variant(1 / 3, "plain EnvBase", torchrl_env, torchrl_collector, against="TorchRL's Collector"),
}
