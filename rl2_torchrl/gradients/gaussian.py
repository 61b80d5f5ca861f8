"""`GaussianHeadPart`: means by a chain of layers, and a scale that is a parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tensordict import NestedKey
from torch import nn

from rl2_torchrl.gradients.chain import ChainPart
from rl2_torchrl.gradients.part import State
from rl2_torchrl.gradients.policy import log_scale_key

__all__ = ["GaussianHeadPart"]


class GaussianHeadPart(ChainPart):
    """``features -> (mean, exp(log_std))``.

    Args:
        module: the whole as a module, which takes data that the kernels do not.
        layers: linear layers and ReLU that give the mean.
        log_std: the scale's logarithm ``[action_dim]``.
        in_keys: entry of the features ``[N, T, n]``.
        out_keys: entries of mean and scale ``[N, T, action_dim]``.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[nn.Module],
        log_std: nn.Parameter,
        in_keys: Sequence[NestedKey],
        out_keys: Sequence[NestedKey],
    ):
        super().__init__(module, layers, in_keys, out_keys)
        self.log_std, self._log_key = log_std, log_scale_key(out_keys[1])

    def bind(self, gradients: Mapping[int, torch.Tensor]) -> None:
        super().bind(gradients)
        self._log_std_memory = gradients[id(self.log_std)]

    @torch.no_grad()
    def forward(self, state: State) -> None:
        super().forward(state)
        if self._by_kernels:
            state[self._log_key] = self.log_std.detach()
            state[self.out_keys[1]] = self.log_std.exp().expand_as(state[self.out_keys[0]])

    def backward(self, state: State, gradients: State) -> None:
        if self._by_kernels:
            by_log, by_scale = gradients.pop(self._log_key, None), gradients.pop(self.out_keys[1], None)
            self._log_std_memory.zero_()
            if by_log is not None:
                self._log_std_memory.add_(by_log)
            if by_scale is not None:
                self._log_std_memory.addcmul_(by_scale.flatten(0, -2).sum(0), self.log_std.detach().exp())
            if self.out_keys[0] not in gradients:
                gradients[self.out_keys[0]] = torch.zeros_like(self._last)
        super().backward(state, gradients)
