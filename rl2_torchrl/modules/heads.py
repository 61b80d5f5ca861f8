"""The head of a network: what it makes of its core's features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import index

import torch
from tensordict import NestedKey
from torch import nn

from rl2_torchrl.gradients.chain import ChainPart
from rl2_torchrl.gradients.part import is_bare, runs
from rl2_torchrl.modules.encoders import Concat
from rl2_torchrl.modules.linear import relu_linear, relu_linear_step

__all__ = ["Head", "SkipHead", "are_relu_linear"]


class Head(nn.Module):
    """``W f(h) + b``: an activation and one linear layer, with hidden layers before it if you like.

    Args:
        in_features: size of what it reads.
        out_features: size of what it gives.
        init_range: weights and bias of the last layer are drawn from U(-init_range, init_range).
        activation: module class before each linear layer. Default `torch.nn.ReLU`.
        num_cells: sizes of further hidden layers before the last. Default none.
        skip_size: the last so many inputs go past the first activation, which would cut off their sign. Default 0.
        device: device of the parameters.
        dtype: dtype of the parameters.

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
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        in_features, out_features, num_cells = index(in_features), index(out_features), [index(n) for n in num_cells]
        self.in_features, self.skip_size = in_features, skip_size
        if out_features < 1:
            raise ValueError(f"{out_features} outputs: an actor needs at least one action, or action dimension.")
        layers: list[nn.Module] = [activation()]
        for size in num_cells:
            layers += [nn.Linear(in_features, size, device=device, dtype=dtype), activation()]
            in_features = size
        last = nn.Linear(in_features, out_features, device=device, dtype=dtype)
        nn.init.uniform_(last.weight, -init_range, init_range)
        nn.init.uniform_(last.bias, -init_range, init_range)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Maps ``features`` ``[*B, in_features]`` to ``[*B, out_features]``."""
        if features.shape[-1] != self.in_features:
            raise ValueError(
                f"the head reads {features.shape[-1]} features but was built for {self.in_features}: mind the actor's "
                "hidden_size and the sizes of extra_keys, or let from_env(env, ...) add them up."
            )
        layers = list(self.layers)
        if self.skip_size:
            _, first, *layers = layers
            features = first(self.activated(features))
        return _chain(layers, features)

    def step_function(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """`forward` of one step without gradient, for a rollout: made anew whenever the weights have changed."""
        layers = list(self.layers)
        if self.skip_size or not are_relu_linear(layers) or not runs(self, Head):
            return self
        first, *others = [relu_linear_step(linear) for linear in layers[1::2]]

        def step(features: torch.Tensor) -> torch.Tensor:
            out = first(features)
            for layer in others:
                out = layer(out)
            return out

        return step

    def gradient_part(self, in_keys: Sequence[NestedKey], out_keys: Sequence[NestedKey]) -> ChainPart | None:
        """The part of a PPO step that this is, with its own gradient (`rl2_torchrl.gradients`); None for other activations."""
        is_chain = runs(self, Head) and not self.skip_size
        return ChainPart.of(self, self.layers, in_keys, out_keys) if is_chain else None

    def activated(self, features: torch.Tensor) -> torch.Tensor:
        """``features`` after the first activation, which the last ``skip_size`` of them go past."""
        features, skipped = features.split([self.in_features - self.skip_size, self.skip_size], -1)
        return torch.cat((self.layers[0](features), skipped), -1)


def _chain(layers: list[nn.Module], features: torch.Tensor) -> torch.Tensor:
    if are_relu_linear(layers):
        for linear in layers[1::2]:
            features = relu_linear(features, linear.weight, linear.bias)
        return features
    for layer in layers:
        features = layer(features)
    return features


def are_relu_linear(layers: list[nn.Module]) -> bool:
    """Whether ``layers`` are ReLU and linear by turns and nothing more: no parametrizations, no hooks."""
    kinds = (nn.ReLU, nn.Linear)
    return all(runs(layer, kinds[number % 2]) and is_bare(layer) for number, layer in enumerate(layers))


class SkipHead(nn.Module):
    """A head that reads a core's features ``[*B, features_size]`` and, past its first activation, further inputs.

    Args:
        head: the head; its ``skip_size`` is the size of the further inputs.
        detach: whether to stop the gradient into the features. Default False.
    """

    def __init__(self, head: Head, detach: bool = False):
        super().__init__()
        self.head, self.detach = head, detach
        self.concat = Concat()

    def forward(self, features: torch.Tensor, *extra: torch.Tensor) -> torch.Tensor:
        """Maps ``features`` and ``extra`` ``[*B, n]`` to ``[*B, out_features]``."""
        features = features.detach() if self.detach else features
        return self.head(self.concat(features, *extra))

    def gradient_part(self, in_keys: Sequence[NestedKey], out_keys: Sequence[NestedKey]) -> ChainPart | None:
        """As `Head.gradient_part`."""
        is_chain = runs(self, SkipHead) and runs(self.head, Head) and (self.head.skip_size > 0) == (len(in_keys) > 1)
        return ChainPart.of(self, self.head.layers, in_keys, out_keys, detach=self.detach) if is_chain else None

    @classmethod
    def built(
        cls, features_size: int, input_size: int, out_features: int, *, num_cells: Sequence[int], **kwargs
    ) -> SkipHead:
        """One on features and the core's input, whose weights are drawn for that input alone (He et al. 2015)."""
        if not num_cells:
            raise ValueError(
                "skip=True without num_cells: one layer can only add up what is seen and what is remembered, not choose by "
                "both. Give it a hidden layer, such as num_cells=[64]."
            )
        head = Head(features_size + input_size, out_features, num_cells=num_cells, skip_size=input_size, **kwargs)
        nn.init.kaiming_uniform_(head.layers[1].weight.detach()[:, features_size:], nonlinearity="relu")
        return cls(head)
