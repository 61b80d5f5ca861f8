"""`ChainPart`: linear layers, ReLU and tanh, as in heads and encoders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import nn

from rl2_torchrl import kernels
from rl2_torchrl.gradients.part import Gradients, Part, State, accumulate, entries_of, runs
from rl2_torchrl.kernels.functions import (
    as_reals,
    contiguous,
    is_small,
    linear_gradients,
    linear_kernel,
)
from rl2_torchrl.kernels.recording import Recording
from rl2_torchrl.kernels.workspace import Workspace

__all__ = ["ChainPart"]


class ChainPart(Part):
    """Linear layers and activations by turns: ReLU or tanh.

    Args:
        module: the whole as a module, which takes data that the kernels do not. If it has ``detach = True``, the gradient
            stops at the first of ``in_keys``.
        layers: the layers that it is made of.
        in_keys: entries of the input ``[N, T, n]``; if there are several, all but the first go past the first layer, an
            activation.
        out_keys: entry of the output ``[N, T, m]``.
    """

    @classmethod
    def of(cls, module: nn.Module, layers: Sequence[nn.Module], in_keys, out_keys) -> ChainPart | None:
        """The part, or None where ``layers`` are something else, or there are no kernels for them."""
        layers = list(layers)
        parameters = [p for layer in layers for p in layer.parameters()]
        by_turns = all((_name_of(one) is None) != (_name_of(other) is None) for one, other in pairwise(layers))
        known = by_turns and all(_name_of(layer) or runs(layer, nn.Linear) for layer in layers)
        has_kernels = known and any(p.numel() for p in parameters) and kernels.covers(*parameters)
        return cls(module, layers, in_keys, out_keys) if has_kernels else None

    def __init__(self, module: nn.Module, layers: Sequence[nn.Module], in_keys, out_keys):
        super().__init__(module, in_keys, out_keys)
        self.detach = bool(vars(module).get("detach"))
        joins = len(self.in_keys) > 1
        #: What is done to the first input alone, where others join it behind that.
        self.first, layers = _name_of(layers[0]) if joins else None, layers[joins:]
        names = [None, *map(_name_of, layers)]
        #: The linear layers, what stands before each of them, and after the last.
        self.linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
        self.before = [name for name, layer in zip(names, layers, strict=False) if isinstance(layer, nn.Linear)]
        self.dtypes = dict.fromkeys(in_keys, self.linears[0].weight.dtype)
        self.after = names[-1]

    def step_function(
        self, otherwise: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The module as a function of its one input, without gradient; the weights are those that there are now.

        ``otherwise``: what takes the input where kernels do not.
        """
        if not all(is_small(layer.weight) for layer in self.linears):
            return otherwise
        inputs, dtype, functions = self.linears[0].in_features, self.linears[0].weight.dtype, []
        for before, layer in zip(self.before, self.linears, strict=True):
            functions += [partial(_activated, name="tanh")] if before == "tanh" else []
            functions.append(linear_kernel(layer.weight, layer.bias, relu=before == "relu"))
        functions += [] if self.after is None else [partial(_activated, name=self.after)]

        def step(x: torch.Tensor) -> torch.Tensor:
            if x.shape[-1] != inputs or x.dtype != dtype or not (x.is_cpu and x.numel()):
                return otherwise(x)
            x = contiguous(x)
            for function in functions:
                x = function(x)
            return x

        return step

    def forward_by_hand(self, state: State) -> bool:
        x, *more = entries_of(state, self.in_keys)
        self._sizes = [entry.shape[-1] for entry in (x, *more)]
        weight = self.linears[0].weight
        fits = (sum(self._sizes), x.dtype, x.device) == (self.linears[0].in_features, weight.dtype, weight.device)
        if not fits or not x.numel():
            return False
        if more:
            Recording.interrupt()
            self._joined = _activated(x, self.first)
            x = torch.cat((self._joined, *(as_reals(other, x) for other in more)), -1)
        self._inputs = []
        for before, layer in zip(self.before, self.linears, strict=True):
            x = _activated(x, "tanh") if before == "tanh" else contiguous(x)
            self._inputs.append((x, layer.weight, layer.bias))
            x = _linear(x, layer.weight, layer.bias, before == "relu")
        self._out = state[self.out_keys[0]] = _activated(x, self.after)
        return True

    def backward_by_hand(self, gradients: Gradients) -> None:
        slope = _before_activation(gradients.pop(self.out_keys[0]), self._out, self.after)
        inputs, self._inputs, self._out = self._inputs, [], None  # for others to take
        wanted = self.wanted - {self.in_keys[0]} if self.detach else self.wanted
        for number, before in reversed(list(enumerate(self.before))):
            x, weight, bias = inputs[number]
            d_x = Workspace.take(x, x.shape) if number or wanted else None
            d_weight, d_bias = _linear_gradients(x, weight, slope, d_x, before == "relu")
            accumulate(gradients, weight, d_weight)
            if bias is not None:
                accumulate(gradients, bias, d_bias)
            slope = _before_activation(d_x, x, "tanh") if before == "tanh" and d_x is not None else d_x
        if not wanted:
            return
        if len(self.in_keys) == 1:
            accumulate(gradients, self.in_keys[0], slope)
            return
        for key, part in zip(self.in_keys, slope.split(self._sizes, -1), strict=True):
            if key in wanted:
                first = self.first if key == self.in_keys[0] else None
                accumulate(gradients, key, _before_activation(contiguous(part), self._joined, first))


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, has_relu: bool) -> torch.Tensor:
    if is_small(weight):
        return linear_kernel(weight, bias, relu=has_relu)(x)
    Recording.interrupt()
    return nn.functional.linear(x.relu() if has_relu else x, weight, bias)


def _linear_gradients(x, weight, slope, d_x, has_relu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of a linear layer, behind a ReLU or not, by weight and bias; that by ``x`` is written to ``d_x``."""
    weight = contiguous(weight.detach())
    if is_small(weight):
        gradients = Workspace.make(weight, weight.shape), Workspace.make(weight, weight.shape[:1])
        linear_gradients(x, weight, slope, d_x, *gradients, relu=has_relu)
        return gradients
    Recording.interrupt()
    flat, slopes = x.view(-1, x.shape[-1]), slope.reshape(-1, len(weight))
    if d_x is not None:
        torch.mm(slopes, weight, out=d_x.view(flat.shape))
        _before_activation(d_x, x, "relu" if has_relu else None)
    return slopes.t() @ (flat.relu() if has_relu else flat), slopes.sum(0)


def _name_of(layer: nn.Module) -> str | None:
    return next((name for name, cls in (("relu", nn.ReLU), ("tanh", nn.Tanh)) if runs(layer, cls)), None)


def _activated(x: torch.Tensor, name: str | None) -> torch.Tensor:
    if name is None:
        return x
    x, y = contiguous(x), Workspace.make(x, x.shape)
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
