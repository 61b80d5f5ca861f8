"""`ChainPart`: linear layers, ReLU and tanh, as in heads and encoders; `ConcatPart`: inputs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import nn

from rl2_torchrl import kernels
from rl2_torchrl.gradients.part import AutogradPart, DataPart, State, accumulate, entries_of, runs
from rl2_torchrl.modules.functions import MOST_OUTPUTS, relu_linear, relu_linear_gradients
from rl2_torchrl.modules.gru_sequence import Workspace

__all__ = ["ChainPart", "ConcatPart"]


class ChainPart(AutogradPart):
    """Linear layers and activations by turns: ReLU or tanh.

    Args:
        module: the whole as a module, which takes data that the kernels do not.
        layers: the layers that it is made of.
        in_keys: entries of the input ``[N, T, n]``; if there are several, all but the first go past the first layer, an
            activation.
        out_keys: entry of the output ``[N, T, m]``.
        detach: whether the gradient stops at the first of ``in_keys``.
    """

    @classmethod
    def of(cls, module: nn.Module, layers: Sequence[nn.Module], in_keys, out_keys, *, detach=False) -> ChainPart | None:
        """The part, or None where ``layers`` are something else, or there are no kernels for them."""
        layers = list(layers)
        parameters = [p for layer in layers for p in layer.parameters()]
        by_turns = all((_name_of(one) is None) != (_name_of(other) is None) for one, other in pairwise(layers))
        known = by_turns and all(_name_of(layer) or runs(layer, nn.Linear) for layer in layers)
        has_kernels = known and any(p.numel() for p in parameters) and kernels.covers(*parameters)
        return cls(module, layers, in_keys, out_keys, detach=detach) if has_kernels else None

    def __init__(self, module: nn.Module, layers: Sequence[nn.Module], in_keys, out_keys, *, detach: bool = False):
        super().__init__(module, in_keys, out_keys)
        self.detach, self._joins = detach, len(self.in_keys) > 1
        names = [None, *map(_name_of, layers)]
        #: The linear layers, what stands before each of them, and after the last.
        self.linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
        self.before = [name for name, layer in zip(names, layers, strict=False) if isinstance(layer, nn.Linear)]
        self.after = names[-1]

    def bind(self, gradients: Mapping[int, torch.Tensor]) -> None:
        super().bind(gradients)
        self._products = [
            (gradients[id(w)], w.new_empty(len(w)) if bias is None else gradients[id(bias)])
            for w, bias in ((layer.weight, layer.bias) for layer in self.linears)
        ]

    def forward(self, state: State) -> None:
        x, *more = entries_of(state, self.in_keys)
        self._by_kernels = self._covers(x, more)
        if not self._by_kernels:
            super().forward(state)
            return
        if more:
            self._sizes = [x.shape[-1], *(other.shape[-1] for other in more)]
            self._joined = _activated(x, self.before[0])
            x = torch.cat((self._joined, *(other.to(x.dtype) for other in more)), -1)
        self._inputs = []
        for number, layer in enumerate(self.linears):
            before = self._before(number)
            x = _activated(x, "tanh") if before == "tanh" else x.contiguous()
            self._inputs.append(x)
            # relu_linear makes the activation itself, and forgets it.
            run = relu_linear if before == "relu" else nn.functional.linear
            x = run(x, layer.weight, layer.bias)
        self._out = state[self.out_keys[0]] = _activated(x, self.after)

    def _covers(self, x: torch.Tensor, more: Sequence[torch.Tensor]) -> bool:
        size = x.shape[-1] + sum(other.shape[-1] for other in more)
        return x.dtype == self.linears[0].weight.dtype and size == self.linears[0].in_features and x.numel() > 0

    def _before(self, number: int) -> str | None:
        # Where inputs are joined, the first activation has been made already.
        return None if number == 0 and self._joins else self.before[number]

    def backward(self, state: State, gradients: State) -> None:
        if not self._by_kernels:
            super().backward(state, gradients)
            return
        slope = _before_activation(gradients.pop(self.out_keys[0]), self._out, self.after)
        wanted = self.wanted - {self.in_keys[0]} if self.detach else self.wanted
        for number in reversed(range(len(self.linears))):
            x, before = self._inputs.pop(), self._before(number)
            d_x = Workspace.take(x, x.shape) if number or wanted else None
            linear_gradients(x, self.linears[number].weight, slope, d_x, *self._products[number], before == "relu")
            slope = _before_activation(d_x, x, "tanh") if before == "tanh" and d_x is not None else d_x
        if wanted and not self._joins:
            known = self.in_keys[0] in gradients
            accumulate(gradients, self.in_keys[0], slope)
            if known:
                Workspace.give(slope)
        elif wanted:
            for key, part in zip(self.in_keys, slope.split(self._sizes, -1), strict=True):
                before = self.before[0] if key == self.in_keys[0] else None
                if key in wanted:
                    accumulate(gradients, key, _before_activation(part.contiguous(), self._joined, before))


class ConcatPart(DataPart):
    """Inputs side by side, in the first one's dtype."""

    def forward(self, state: State) -> None:
        self._kinds = [(x.shape[-1], x.dtype) for x in entries_of(state, self.in_keys)]
        self.run(state)

    def backward(self, state: State, gradients: State) -> None:
        slopes = gradients.pop(self.out_keys[0]).split([size for size, _ in self._kinds], -1)
        for key, slope, (_, dtype) in zip(self.in_keys, slopes, self._kinds, strict=True):
            if key in self.wanted:
                accumulate(gradients, key, slope.to(dtype, copy=True))


def linear_gradients(x, weight, slope, d_x, d_weight, d_bias, has_relu: bool) -> None:
    """Writes the gradients of `relu_linear`, or without ReLU of a linear layer, into ``d_x`` (may be None) and the last two."""
    weight = weight.detach().contiguous()
    if has_relu and len(weight) <= MOST_OUTPUTS:
        relu_linear_gradients(x, weight, slope, d_x, d_weight, d_bias)
        return
    flat, slopes = x.view(-1, x.shape[-1]), slope.reshape(-1, len(weight))
    torch.mm(slopes.t(), flat.relu() if has_relu else flat, out=d_weight)
    torch.sum(slopes, 0, out=d_bias)
    if d_x is not None:
        torch.mm(slopes, weight, out=d_x.view(flat.shape))
        _before_activation(d_x, x, "relu" if has_relu else None)


def _name_of(layer: nn.Module) -> str | None:
    return next((name for name, cls in (("relu", nn.ReLU), ("tanh", nn.Tanh)) if runs(layer, cls)), None)


def _activated(x: torch.Tensor, name: str | None) -> torch.Tensor:
    if name == "tanh":
        x, y = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        kernels.load(x.dtype).tanh_forward(x.numel(), x.data_ptr(), y.data_ptr(), kernels.threads_for(20 * x.numel()))
        return y
    return x.relu() if name == "relu" else x


def _before_activation(slope: torch.Tensor, y: torch.Tensor, name: str | None) -> torch.Tensor:
    """The gradient by what an activation reads, from that by what it gives, ``y``; in the memory of ``slope``."""
    if name == "tanh":
        return torch.ops.aten.tanh_backward.grad_input(slope, y, grad_input=slope)
    return torch.ops.aten.threshold_backward.grad_input(slope, y, 0, grad_input=slope) if name == "relu" else slope
