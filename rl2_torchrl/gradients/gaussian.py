"""`GaussianHeadPart`: means by another part, and a scale that is a parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tensordict import NestedKey
from torch import nn

from rl2_torchrl.gradients.chain import ChainPart
from rl2_torchrl.gradients.part import Part, State
from rl2_torchrl.gradients.policy import log_scale_key

__all__ = ["GaussianHeadPart"]


class GaussianHeadPart(Part):
    """``features -> (mean, exp(log_std))``.

    Args:
        module: both as a module.
        mean: the part that gives the mean.
        log_std: the scale's logarithm ``[action_dim]``.
        out_keys: entries of mean and scale ``[N, T, action_dim]``.
    """

    def __init__(self, module: nn.Module, mean: ChainPart, log_std: nn.Parameter, out_keys: Sequence[NestedKey]):
        super().__init__(mean.in_keys, [*out_keys, log_scale_key(out_keys[1])])
        self.module, self.mean, self.log_std = module, mean, log_std

    def parameters(self) -> list[nn.Parameter]:
        return [*self.mean.parameters(), self.log_std]

    def bind(self, gradients: Mapping[int, torch.Tensor]) -> None:
        self.mean.bind(gradients)
        self._gradient = gradients[id(self.log_std)]

    def run(self, state: State) -> None:
        loc, scale, _ = self.out_keys
        state[loc], state[scale] = self.module(*[state[key] for key in self.in_keys])

    def forward(self, state: State) -> None:
        self.mean.wanted = self.wanted
        self.mean.forward(state)
        loc, scale, log_scale = self.out_keys
        state[log_scale] = self.log_std.detach()
        state[scale] = state[log_scale].exp().expand_as(state[loc])

    def backward(self, state: State, gradients: State) -> None:
        loc, scale, log_scale = self.out_keys
        by_scale, by_log = gradients.pop(scale, None), gradients.pop(log_scale, None)
        self._gradient.zero_()
        if by_log is not None:
            self._gradient.add_(by_log)
        if by_scale is not None:
            self._gradient.addcmul_(by_scale.flatten(0, -2).sum(0), self.log_std.detach().exp())
        if loc not in gradients:
            gradients[loc] = by_scale.new_zeros(by_scale.shape)
        self.mean.backward(state, gradients)
