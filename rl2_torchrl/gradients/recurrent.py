"""`GRUPart`: a GRU's layers over sequences with back-propagation through time by the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import NestedKey
from torch import nn

from rl2_torchrl.gradients.part import Gradients, Part, State, accumulate, entries_of, on_entries
from rl2_torchrl.kernels.gru_sequence import as_bytes, sequence_backward, sequence_forward

__all__ = ["GRUPart"]


class GRUPart(Part):
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
        self.layers, self.inputs, self.units = gru.all_weights, gru.input_size, gru.hidden_size
        dtype = gru.weight_hh_l0.dtype
        self.dtypes = dict(zip(in_keys, (dtype, dtype, torch.bool), strict=True))

    def forward_by_hand(self, state: State) -> bool:
        x, hidden, is_init = entries_of(state, self.in_keys, self.optional)
        is_init = None if is_init is None else is_init.squeeze(-1)
        if not self._covers(x, hidden, is_init):
            return False
        self._is_init, self._saved = as_bytes(is_init), []
        for number, weights in enumerate(self.layers):
            first = None if hidden is None else hidden[:, :, number]
            x, saved = sequence_forward(x, first, self._is_init, weights, saves=True)
            self._saved.append(saved)
        state[self.out_keys[0]] = x
        return True

    def _covers(self, x: torch.Tensor, hidden: torch.Tensor | None, is_init: torch.Tensor | None) -> bool:
        weight = self.parameters[0]
        if (x.ndim, x.device, x.dtype, x.shape[-1]) != (3, weight.device, weight.dtype, self.inputs):
            return False
        memory = (*x.shape[:2], len(self.layers), self.units)
        known = hidden is None or (hidden.device, hidden.dtype, hidden.shape) == (x.device, x.dtype, memory)
        known &= is_init is None or (is_init.device, is_init.shape) == (x.device, x.shape[:2])
        return known and x.numel() > 0 and self.in_keys[1] not in self.wanted

    def backward_by_hand(self, gradients: Gradients) -> None:
        slope, layers = gradients.pop(self.out_keys[0]), enumerate(zip(self.layers, self._saved, strict=True))
        self._saved = []  # for others to take
        for number, (weights, saved) in reversed(list(layers)):
            by_x = number > 0 or self.in_keys[0] in self.wanted
            slope, *found = sequence_backward(slope, self._is_init, weights, saved, by_x=by_x)
            for weight, gradient in zip(weights, found, strict=True):
                accumulate(gradients, weight, gradient)
        if slope is not None:
            accumulate(gradients, self.in_keys[0], slope)
