"""`ChainPart`: linear layers and ReLU in any order, as in heads and encoders; `ConcatPart`: inputs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from tensordict import NestedKey
from torch import nn
from torch.nn.functional import linear as affine

from rl2_torchrl import kernels
from rl2_torchrl.gradients.part import AutogradPart, State, accumulate, entries_of, runs
from rl2_torchrl.modules.gru import Workspace
from rl2_torchrl.modules.linear import MOST_OUTPUTS, relu_linear, relu_linear_gradients

__all__ = ["ChainPart", "ConcatPart", "are_relu_and_linear"]


def are_relu_and_linear(layers: Sequence[nn.Module]) -> bool:
    """Whether ``layers`` are a chain that `ChainPart` knows: linear layers and ReLU, no two ReLU side by side.

    Examples:
        >>> are_relu_and_linear([nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)]), are_relu_and_linear([nn.Tanh()])
        (True, False)
    """
    is_relu = [runs(layer, nn.ReLU) for layer in layers]
    known = all(relu or runs(layer, nn.Linear) for layer, relu in zip(layers, is_relu, strict=True))
    return known and not all(is_relu) and not any(one and other for one, other in pairwise(is_relu))


class ChainPart(AutogradPart):
    """Linear layers and ReLU, one after the other.

    Args:
        module: the whole as a module, which takes data that the kernels do not.
        layers: the layers that it is made of.
        in_keys: entries of the input ``[N, T, n]``; if there are several, all but the first go past the first layer, a ReLU.
        out_keys: entry of the output ``[N, T, m]``.
        detach: whether the gradient stops at the first of ``in_keys``.
    """

    kind = "kernel"

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[nn.Module],
        in_keys: Sequence[NestedKey],
        out_keys: Sequence[NestedKey],
        *,
        detach: bool = False,
    ):
        super().__init__(module, in_keys, out_keys)
        self.detach = detach
        linears = [number for number, layer in enumerate(layers) if isinstance(layer, nn.Linear)]
        # Whether a ReLU stands before each linear layer, and whether one ends the chain.
        self.linears = [layers[number] for number in linears]
        self.relus = [number > 0 and not isinstance(layers[number - 1], nn.Linear) for number in linears]
        self.ends_in_relu = linears[-1] + 1 < len(layers)
        # Further inputs are joined to what the first ReLU has let through.
        self._joins = len(self.in_keys) > 1

    def bind(self, gradients: Mapping[int, torch.Tensor]) -> None:
        super().bind(gradients)
        self._memory = []
        for layer in self.linears:
            bias = layer.weight.new_empty(len(layer.weight)) if layer.bias is None else gradients[id(layer.bias)]
            self._memory.append((gradients[id(layer.weight)], bias))

    @torch.no_grad()
    def forward(self, state: State) -> None:
        x, *more = entries_of(state, self.in_keys)
        self._by_kernels = self._covers(x, more)
        if not self._by_kernels:
            super().forward(state)
            return
        self._features, self._sizes = x, [x.shape[-1], *(other.shape[-1] for other in more)]
        x = torch.cat((x.relu(), *(other.to(x.dtype) for other in more)), -1) if more else x.contiguous()
        self._inputs = []
        for number, layer in enumerate(self.linears):
            self._inputs.append(x)
            relu = self._has_relu(number)
            x = relu_linear(x, layer.weight, layer.bias) if relu else affine(x, layer.weight, layer.bias)
        self._last = x
        state[self.out_keys[0]] = x.relu() if self.ends_in_relu else x

    def _covers(self, x: torch.Tensor, more: Sequence[torch.Tensor]) -> bool:
        size = x.shape[-1] + sum(other.shape[-1] for other in more)
        return x.dtype == self.linears[0].weight.dtype and size == self.linears[0].in_features and x.numel() > 0

    def _has_relu(self, number: int) -> bool:
        return self.relus[number] and not (number == 0 and self._joins)

    def backward(self, state: State, gradients: State) -> None:
        if not self._by_kernels:
            super().backward(state, gradients)
            return
        slope = gradients.pop(self.out_keys[0])
        if self.ends_in_relu:
            slope = slope.masked_fill_(self._last <= 0, 0.0)
        wanted = self.wanted - {self.in_keys[0]} if self.detach else self.wanted
        for number in reversed(range(len(self.linears))):
            x = self._inputs.pop()
            d_x = Workspace.take(x, x.shape) if number or wanted else None
            linear_gradients(x, self.linears[number].weight, slope, d_x, *self._memory[number], self._has_relu(number))
            slope = d_x
        if not self._joins:
            if wanted:
                self._hand_on(gradients, self.in_keys[0], slope)
            return
        first, *others = slope.split(self._sizes, -1) if wanted else (None,)
        if self.in_keys[0] in wanted:
            accumulate(gradients, self.in_keys[0], torch.where(self._features > 0, first, 0.0))
        for key, part in zip(self.in_keys[1:], others, strict=False):
            if key in wanted:
                accumulate(gradients, key, part.contiguous())

    def _hand_on(self, gradients: State, key: NestedKey, slope: torch.Tensor) -> None:
        known = key in gradients
        accumulate(gradients, key, slope)
        if known:
            Workspace.give(slope)


class ConcatPart(AutogradPart):
    """Inputs side by side, in the first one's dtype."""

    kind = "kernel"

    @torch.no_grad()
    def forward(self, state: State) -> None:
        inputs = entries_of(state, self.in_keys)
        self._sizes = [x.shape[-1] for x in inputs]
        state[self.out_keys[0]] = self.module(*inputs)

    def backward(self, state: State, gradients: State) -> None:
        slopes = gradients.pop(self.out_keys[0]).split(self._sizes, -1)
        for key, slope in zip(self.in_keys, slopes, strict=True):
            if key in self.wanted:
                accumulate(gradients, key, slope.to(state[key].dtype, copy=True))


def linear_gradients(x, weight, slope, d_x, d_weight, d_bias, has_relu: bool) -> None:
    """Writes the gradients of `relu_linear`, or without ReLU of a linear layer, into the last three (``d_x`` may be None)."""
    weight = weight.detach().contiguous()
    if has_relu and len(weight) <= MOST_OUTPUTS and kernels.load(x.dtype) is not None:
        relu_linear_gradients(x, weight, slope, d_x, d_weight, d_bias)
        return
    flat, slopes = x.view(-1, x.shape[-1]), slope.reshape(-1, len(weight))
    torch.mm(slopes.t(), flat.relu() if has_relu else flat, out=d_weight)
    torch.sum(slopes, 0, out=d_bias)
    if d_x is not None:
        torch.mm(slopes, weight, out=d_x.view(flat.shape))
        if has_relu:
            d_x.masked_fill_(x <= 0, 0.0)
