"""`ChainPart`: linear layers, ReLU and tanh, as in heads and encoders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import nn

from rl2_torchrl import kernels
from rl2_torchrl.gradients.part import Gradients, Part, State, accumulate, entries_of, runs
from rl2_torchrl.kernels.functions import as_reals, contiguous, is_small, linear_gradients, linear_kernel
from rl2_torchrl.kernels.recording import Recording
from rl2_torchrl.kernels.workspace import Workspace

__all__ = ["ChainPart"]


class ChainPart(Part):
    """Linear layers and activations by turns: ReLU or tanh.

    Args:
        module: the whole as a module, which takes data that the kernels do not. If it has ``detach = True``, the gradient
            stops at the first of ``in_keys``.
        named: the layers that it is made of, each after the name of its activation, or None for a linear one.
        in_keys: entries of the input ``[N, T, n]``; if there are several, all but the first go past the first layer, an
            activation.
        out_keys: entry of the output ``[N, T, m]``.
        parameters: those of the linear layers.
    """

    @classmethod
    def of(cls, module: nn.Module, layers: Iterable[nn.Module], in_keys, out_keys) -> ChainPart | None:
        """The part, or None where ``layers`` are something else, or there are no kernels for them."""
        named = [(_name_of(layer), layer) for layer in layers]
        by_turns = all((one is None) != (other is None) for (one, _), (other, _) in pairwise(named))
        linears = [layer for name, layer in named if name is None]
        if not by_turns or not all(runs(layer, nn.Linear) for layer in linears):
            return None
        parameters = [p for layer in linears for p in (layer.weight, layer.bias) if p is not None]
        has_kernels = any(p.numel() for p in parameters) and kernels.covers(*parameters)
        return cls(module, named, in_keys, out_keys, parameters) if has_kernels else None

    def __init__(self, module: nn.Module, named: Sequence[tuple[str | None, nn.Module]], in_keys, out_keys, parameters):
        super().__init__(module, in_keys, out_keys, parameters=parameters)
        self.detach = bool(vars(module).get("detach"))
        joins = len(self.in_keys) > 1
        #: What is done to the first input alone, where others join it behind that.
        self.first, named = named[0][0] if joins else None, named[joins:]
        names = [None, *(name for name, _ in named)]
        #: The linear layers, what stands before each of them, and after the last.
        self.linears = [layer for name, layer in named if name is None]
        self.before = [before for before, (name, _) in zip(names, named, strict=False) if name is None]
        self.dtypes = dict.fromkeys(in_keys, self.linears[0].weight.dtype)
        self.after = names[-1]

    def step_function(
        self, otherwise: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The module as a function of its one input, without gradient; the weights are those that there are now.

        ``otherwise``: what takes the input where kernels do not.
        """
        inputs, dtype, layers = self.linears[0].in_features, self.linears[0].weight.dtype, list(self._layers())

        def step(x: torch.Tensor) -> torch.Tensor:
            if x.shape[-1] != inputs or x.dtype != dtype or not (x.is_cpu and x.numel()):
                return otherwise(x)
            for activation, layer in layers:
                x = layer(_activated(x, activation))
            return _activated(x, self.after)

        step.is_kernels = True
        return step

    def forward_by_hand(self, state: State) -> bool:
        x, *more = entries_of(state, self.in_keys)
        self._sizes = [entry.shape[-1] for entry in (x, *more)]
        weight = self.linears[0].weight
        fits = (sum(self._sizes), x.dtype, x.device) == (self.linears[0].in_features, weight.dtype, weight.device)
        fits = fits and all((other.shape[:-1], other.device) == (x.shape[:-1], x.device) for other in more)
        if not fits or not x.numel():
            return False
        if more:
            self._joined = first = _activated(x, self.first)
            x = _side_by_side([first, *(_as_reals(other, first) for other in more)])
        self._inputs = []
        for activation, layer in self._layers():
            self._inputs.append(_activated(x, activation))
            x = layer(self._inputs[-1])
        self._out = state[self.out_keys[0]] = _activated(x, self.after)
        return True

    def _layers(self) -> Iterator[tuple[str | None, Callable[[torch.Tensor], torch.Tensor]]]:
        """The linear layers as functions, a ReLU before them included, each after the activation that is not."""
        for before, layer in zip(self.before, self.linears, strict=True):
            has_relu = before == "relu"
            yield None if has_relu else before, _layer(layer, has_relu=has_relu)

    def backward_by_hand(self, gradients: Gradients) -> None:
        slope = _before_activation(gradients.pop(self.out_keys[0]), self._out, self.after)
        layers = enumerate(zip(self._inputs, self.before, self.linears, strict=True))
        self._inputs, self._out = [], None  # for others to take
        wanted = self.wanted - {self.in_keys[0]} if self.detach else self.wanted
        for number, (x, before, layer) in reversed(list(layers)):
            d_x = Workspace.take(x, x.shape) if number or wanted else None
            d_weight, d_bias = _linear_gradients(x, layer.weight, slope, d_x, before == "relu")
            accumulate(gradients, layer.weight, d_weight)
            if layer.bias is not None:
                accumulate(gradients, layer.bias, d_bias)
            slope = _before_activation(d_x, x, "tanh") if before == "tanh" and d_x is not None else d_x
        if not wanted:
            return
        if len(self.in_keys) == 1:
            accumulate(gradients, self.in_keys[0], slope)
            return
        begin = 0
        for key, size in zip(self.in_keys, self._sizes, strict=True):
            if key in wanted:
                first = self.first if key == self.in_keys[0] else None
                accumulate(gradients, key, _before_activation(_columns(slope, begin, size), self._joined, first))
            begin += size


def _layer(layer: nn.Linear, *, has_relu: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """``layer`` behind a ReLU or not, without gradient."""
    weight, bias = layer.weight, layer.bias
    if is_small(weight):
        return linear_kernel(weight, bias, relu=has_relu)

    return lambda x: Recording.made(lambda: nn.functional.linear(x.relu() if has_relu else x, weight, bias))


def _linear_gradients(x, weight, slope, d_x, has_relu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of a linear layer, behind a ReLU or not, by weight and bias; that by ``x`` is written to ``d_x``."""
    weight = contiguous(weight.detach())
    if is_small(weight):
        gradients = Workspace.make(weight, weight.shape), Workspace.make(weight, weight.shape[:1])
        linear_gradients(x, weight, slope, d_x, *gradients, relu=has_relu)
        return gradients
    flat, slopes = x.view(-1, x.shape[-1]), contiguous(slope).view(-1, len(weight))
    if d_x is not None:
        Recording.work(lambda: torch.mm(slopes, weight, out=d_x.view(flat.shape)))
        _before_activation(d_x, x, "relu" if has_relu else None)
    d_weight = Recording.made(lambda: slopes.t() @ (flat.relu() if has_relu else flat))
    return d_weight, Recording.made(lambda: slopes.sum(0))


def _as_reals(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == like.dtype else Recording.made(lambda: as_reals(x, like))


def _side_by_side(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """``parts`` ``[*B, n]`` as `torch.cat` joins them, by a kernel."""
    begin, out = 0, Workspace.take(parts[0], (*parts[0].shape[:-1], sum(part.shape[-1] for part in parts)))
    for part in map(contiguous, parts):
        _copy_columns(part, 0, out, begin, part.shape[-1])
        begin += part.shape[-1]
    return out


def _columns(x: torch.Tensor, begin: int, size: int) -> torch.Tensor:
    """``x[..., begin : begin + size]`` in memory of its own, by a kernel."""
    out = Workspace.take(x, (*x.shape[:-1], size))
    _copy_columns(contiguous(x), begin, out, 0, size)
    return out


def _copy_columns(x: torch.Tensor, begin: int, out: torch.Tensor, at: int, size: int) -> None:
    """Columns of ``x`` from ``begin`` on to those of ``out`` from ``at`` on, both contiguous and of as many rows."""
    sides = [(side.data_ptr() + first * side.element_size(), side.shape[-1]) for side, first in ((x, begin), (out, at))]
    rows = out.numel() // out.shape[-1]
    kernels.load(x.dtype).copy_columns(rows, size, *sides[0], *sides[1], kernels.threads_for(rows * size))


def _name_of(layer: nn.Module) -> str | None:
    return next((name for name, cls in (("relu", nn.ReLU), ("tanh", nn.Tanh)) if runs(layer, cls)), None)


def _activated(x: torch.Tensor, name: str | None) -> torch.Tensor:
    x = contiguous(x)
    if name is None:
        return x
    y = Workspace.make(x, x.shape)
    forward = getattr(kernels.load(x.dtype), f"{name}_forward")
    forward(x.numel(), x.data_ptr(), y.data_ptr(), kernels.threads_for(_COST[name] * x.numel()))
    return y


def _before_activation(slope: torch.Tensor, y: torch.Tensor, name: str | None) -> torch.Tensor:
    """The gradient by what an activation reads, from that by what it gives, ``y``; in the memory of ``slope``."""
    if name is None:
        return slope
    slope, y = contiguous(slope), contiguous(y)
    backward = getattr(kernels.load(slope.dtype), f"{name}_backward")
    backward(slope.numel(), y.data_ptr(), slope.data_ptr(), kernels.threads_for(slope.numel()))
    return slope


#: Multiplications that an entry of an activation takes as long as.
_COST = {"relu": 1, "tanh": 20}
