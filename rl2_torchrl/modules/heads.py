"""The head of a network: what it makes of its core's features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from operator import index

import torch
from tensordict import NestedKey
from torch import nn

from rl2_torchrl.gradients.chain import ChainPart
from rl2_torchrl.gradients.part import is_bare, runs
from rl2_torchrl.modules.encoders import Concat
from rl2_torchrl.modules.functions import relu_linear, relu_linear_step

__all__ = ["Head", "SkipHead"]


class Head(nn.Module):
    """``W f(h) + b``: an activation and one linear layer, with hidden layers before it if you like.

    Args:
        in_features: size of what it reads.
        out_features: size of what it gives.
        init_range: weights and bias of the last layer are drawn from U(-init_range, init_range).
        activation: module class before each linear layer. Default `torch.nn.ReLU`.
        num_cells: sizes of further hidden layers before the last. Default none.
        skip_size: the last so many inputs go past the first activation, which would cut off their sign. Default 0.
        **factory: device and dtype of the parameters.

    Examples:
        >>> Head(8, 3, init_range=1e-3, num_cells=[16])(torch.zeros(4, 8)).shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        init_range: float,
        activation: Callable[[], nn.Module] = nn.ReLU,
        num_cells: Sequence[int] = (),
        skip_size: int = 0,
        **factory,
    ):
        super().__init__()
        self.in_features, *sizes = map(index, (in_features, *num_cells, out_features))
        self.skip_size = skip_size
        if out_features < 1:
            raise ValueError(f"{out_features} outputs: an actor needs at least one action, or action dimension.")
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((self.in_features, *sizes)):
            layers += [activation(), nn.Linear(inputs, outputs, **factory)]
        for parameter in layers[-1].parameters():
            nn.init.uniform_(parameter, -init_range, init_range)
        self.layers = nn.Sequential(*layers)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Maps ``features`` ``[*B, in_features]`` to ``[*B, out_features]``."""
        if features.shape[-1] != self.in_features:
            raise ValueError(
                f"the head reads {features.shape[-1]} features but was built for {self.in_features}: mind the actor's "
                "hidden_size and the sizes of extra_keys, or let from_env(env, ...) add them up."
            )
        layers = list(self.layers)
        if self.skip_size:
            activation, first, *layers = layers
            features, skipped = features.split([self.in_features - self.skip_size, self.skip_size], -1)
            features = first(torch.cat((activation(features), skipped), -1))
        if _are_relu_linear(layers):
            for linear in layers[1::2]:
                features = relu_linear(features, linear.weight, linear.bias)
            return features
        for layer in layers:
            features = layer(features)
        return features

    def step_function(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """`forward` of one step without gradient, for a rollout: made anew whenever the weights have changed."""
        layers = list(self.layers)
        if self.skip_size or not _are_relu_linear(layers) or not runs(self, Head):
            return self
        steps = [relu_linear_step(linear) for linear in layers[1::2]]

        def step(features: torch.Tensor) -> torch.Tensor:
            for layer in steps:
                features = layer(features)
            return features

        return step

    def gradient_part(self, in_keys: Sequence[NestedKey], out_keys: Sequence[NestedKey]) -> ChainPart | None:
        """The part of a PPO step that this is, with its own gradient; None for other activations."""
        is_chain = runs(self, Head) and not self.skip_size
        return ChainPart.of(self, self.layers, in_keys, out_keys) if is_chain else None


def _are_relu_linear(layers: list[nn.Module]) -> bool:
    """Whether ``layers`` are ReLU and linear by turns and nothing more: no parametrizations, no hooks."""
    kinds = (nn.ReLU, nn.Linear)
    return all(runs(layer, kinds[number % 2]) and is_bare(layer) for number, layer in enumerate(layers))


class SkipHead(nn.Module):
    """A head that reads a core's features, detached or not, and further inputs, ``skip_size`` of which go past its activation."""

    def __init__(self, head: Head, detach: bool = False):
        super().__init__()
        self.head, self.detach = head, detach
        self.concat = Concat()

    def forward(self, features: torch.Tensor, *extra: torch.Tensor) -> torch.Tensor:
        return self.head(self.concat(features.detach() if self.detach else features, *extra))

    def gradient_part(self, in_keys: Sequence[NestedKey], out_keys: Sequence[NestedKey]) -> ChainPart | None:
        is_chain = runs(self, SkipHead) and runs(self.head, Head) and (self.head.skip_size > 0) == (len(in_keys) > 1)
        return ChainPart.of(self, self.head.layers, in_keys, out_keys, detach=self.detach) if is_chain else None

    @classmethod
    def built(cls, input_size: int, features_size: int, out_features: int, *, num_cells, **kwargs) -> SkipHead:
        """One on features and the core's input, whose weights are drawn for that input alone (He et al. 2015)."""
        if not num_cells:
            raise ValueError(
                "skip=True without num_cells: one layer can only add up what is seen and what is remembered, not choose by "
                "both. Give it a hidden layer, such as num_cells=[64]."
            )
        head = Head(features_size + input_size, out_features, num_cells=num_cells, skip_size=input_size, **kwargs)
        nn.init.kaiming_uniform_(head.layers[1].weight.detach()[:, features_size:], nonlinearity="relu")
        return cls(head)
