"""`GRUPart`: a GRU's layers over sequences with back-propagation through time by the kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from tensordict import NestedKey
from torch import nn

from rl2_torchrl import kernels
from rl2_torchrl.gradients.part import AutogradPart, State, accumulate, entries_of, on_entries
from rl2_torchrl.modules.gru_sequence import Workspace, as_bytes, backward_in_place, forward_saving, weight_products

__all__ = ["GRUPart"]


class GRUPart(AutogradPart):
    """The layers of a `torch.nn.GRU`; hidden states are data, which get no gradient.

    Args:
        gru: the layers.
        sequence: the same under autograd, ``(x, memory, is_init) -> features``, which takes data that the kernels do not.
        in_keys: entries of the input ``[N, T, input_size]``, of the hidden state ``[N, T, num_layers, hidden_size]``, which may
            be missing, and of ``is_init`` ``[N, T, 1]``, without which no trial starts after the first step.
        out_key: entry of the last layer's output ``[N, T, hidden_size]``.
    """

    def __init__(self, gru: nn.GRU, sequence: Callable[..., torch.Tensor], in_keys: Sequence[NestedKey], out_key):
        super().__init__(on_entries(sequence), in_keys, [out_key], parameters=gru.parameters(), optional=in_keys[1:])
        self.layers = [_Layer([getattr(gru, name) for name in names]) for names in gru._all_weights]
        self.inputs, self.units = gru.input_size, gru.hidden_size

    def bind(self, gradients: Mapping[int, torch.Tensor]) -> None:
        super().bind(gradients)
        for layer in self.layers:
            layer.bind(gradients)

    def forward(self, state: State) -> None:
        self.convert(state)
        x, hidden, is_init = entries_of(state, self.in_keys, self.optional)
        self._by_kernels = self._covers(x, hidden)
        if not self._by_kernels:
            super().forward(state)
            return
        self._is_init = None if is_init is None else as_bytes(is_init.squeeze(-1))
        for number, layer in enumerate(self.layers):
            x = layer.forward(x, None if hidden is None else hidden[:, :, number], self._is_init)
        state[self.out_keys[0]] = x

    def convert(self, state: State) -> None:
        """Input and hidden state to the weights' dtype, as the module itself does it."""
        dtype = self.layers[0].weights[0].dtype
        for key in self.in_keys[:2]:
            if key in state and key not in self.wanted:
                state[key] = state[key].to(dtype)

    def _covers(self, x: torch.Tensor, hidden: torch.Tensor | None) -> bool:
        weight = self.layers[0].weights[0]
        if (x.ndim, x.device, x.dtype, x.shape[-1]) != (3, weight.device, weight.dtype, self.inputs):
            return False
        memory = (*x.shape[:2], len(self.layers), self.units)
        known = hidden is None or (hidden.dtype == x.dtype and hidden.shape == memory)
        return known and x.numel() > 0 and self.in_keys[1] not in self.wanted

    def backward(self, state: State, gradients: State) -> None:
        if not self._by_kernels:
            super().backward(state, gradients)
            return
        slope, wants_x = gradients.pop(self.out_keys[0]), self.in_keys[0] in self.wanted
        for layer in reversed(self.layers):
            slope = layer.backward(slope, self._is_init, wants_x=wants_x or layer is not self.layers[0])
        if wants_x:
            accumulate(gradients, self.in_keys[0], slope)


class _Layer:
    """One layer: ``weights`` are those by inputs and by states, and their biases, if there are."""

    def __init__(self, weights: list[nn.Parameter]):
        self.weights = weights
        self.inputs, self.units = weights[0].shape[1], weights[1].shape[1]

    def bind(self, gradients: Mapping[int, torch.Tensor]) -> None:
        units, inputs = self.units, self.inputs
        columns = kernels.load(self.weights[0].dtype).saved_size(inputs, units) - 4 * units
        # (r's, z's and W_hn h's) by (h, x, 1, ...), and n's by (x, 1, ...)
        d_rzh = self.weights[0].new_empty(3 * units, columns)
        d_n = self.weights[0].new_empty(units, columns - units)
        self._products = (d_rzh, d_n)
        w_ih, w_hh, *biases = (gradients[id(weight)] for weight in self.weights)
        self._to = [w_hh, w_ih[: 2 * units], w_ih[2 * units :]]
        self._of = [d_rzh[:, :units], d_rzh[: 2 * units, units : units + inputs], d_n[:, :inputs]]
        if biases:
            b_ih, b_hh = biases
            self._to += [b_hh, b_ih[: 2 * units], b_ih[2 * units :]]
            self._of += [d_rzh[:, units + inputs], d_rzh[: 2 * units, units + inputs], d_n[:, inputs]]

    def forward(self, x: torch.Tensor, hidden: torch.Tensor | None, is_init: torch.Tensor | None) -> torch.Tensor:
        y = Workspace.take(x, (*x.shape[:2], self.units))
        self._y, self._saved = forward_saving(x, hidden, is_init, self.weights, y)
        return self._y

    def backward(self, slope: torch.Tensor, is_init: torch.Tensor | None, *, wants_x: bool) -> torch.Tensor | None:
        backward_in_place(slope, is_init, self.inputs, self.weights[1], self._saved, None)
        weight_products(self._saved, self.units, self._products)
        torch._foreach_copy_(self._to, self._of)
        d_x = self._input_gradient(slope) if wants_x else None
        # What read the output has gone back already: nobody looks at these any more.
        for memory in (self._saved, slope, self._y):
            Workspace.give(memory)
        self._saved = self._y = None
        return d_x

    def _input_gradient(self, like: torch.Tensor) -> torch.Tensor:
        """(dr, dz, dn) W_ih, from the places where the kernel leaves them."""
        units, weight = self.units, self.weights[0].detach()
        flat = self._saved.view(-1, self._saved.shape[-1])
        out = Workspace.take(like, (*like.shape[:2], self.inputs))
        view = out.view(-1, self.inputs)
        torch.mm(flat[:, : 2 * units], weight[: 2 * units], out=view)
        view.addmm_(flat[:, 3 * units : 4 * units], weight[2 * units :])
        return out
