"""`GRUPart`: a GRU's layers over sequences with back-propagation through time by the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import NestedKey
from torch import nn

from rl2_torchrl.gradients.part import Gradients, Part, State, accumulate, entries_of, on_entries
from rl2_torchrl.kernels.gru_sequence import (
    as_bytes,
    backward_in_place,
    forward_saving,
    input_gradient,
    weight_gradients,
)
from rl2_torchrl.kernels.recording import Recording

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

    def prepared(self, data: State) -> State:
        read = [key for key in self.in_keys if key in data and data[key].dtype != self._dtype(key)]
        return {self._name(key): data[key].to(self._dtype(key)) for key in read if key not in self.wanted}

    def _dtype(self, key: NestedKey) -> torch.dtype:
        """That of an entry as the kernels read it, and the module itself: the weights', or that of flags."""
        return torch.bool if key == self.in_keys[2] else self.parameters[0].dtype

    def _name(self, key: NestedKey) -> tuple:
        return ("prepared", str(self._dtype(key)), key)

    def _as_read(self, state: State, key: NestedKey, entry: torch.Tensor | None) -> torch.Tensor | None:
        """``entry`` in its `_dtype`; ``state`` stays as others read it."""
        if entry is None or entry.dtype == self._dtype(key) or key in self.wanted:
            return entry
        if (prepared := state.get(self._name(key))) is not None:
            return prepared
        Recording.interrupt()
        return entry.to(self._dtype(key))

    def forward_by_hand(self, state: State) -> bool:
        entries = entries_of(state, self.in_keys, self.optional)
        x, hidden, is_init = (self._as_read(state, *pair) for pair in zip(self.in_keys, entries, strict=True))
        is_init = None if is_init is None else is_init.squeeze(-1)
        if not self._covers(x, hidden, is_init):
            return False
        self._is_init, self._saved = as_bytes(is_init), []
        for number, weights in enumerate(self.layers):
            first = None if hidden is None else hidden[:, :, number]
            x, saved = forward_saving(x, first, self._is_init, weights)
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
            backward_in_place(slope, self._is_init, weights[0].shape[1], weights[1], saved, None)
            for weight, gradient in zip(weights, weight_gradients(saved, *weights[0].shape), strict=False):
                accumulate(gradients, weight, gradient)
            is_read = number or self.in_keys[0] in self.wanted
            slope = input_gradient(saved, weights[0]) if is_read else None
        if slope is not None:
            accumulate(gradients, self.in_keys[0], slope)
