"""The body that actor and critic share in kind: inputs -> GRU -> activation -> one linear layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule
from torch import nn

from rl2_torchrl.modules.cores import sub_key
from rl2_torchrl.modules.gru import GRUCore
from rl2_torchrl.modules.linear import relu_linear

__all__ = ["Concat", "Head", "OnMemory", "are_relu_linear", "as_keys", "gru_body", "sub_key"]


class Head(nn.Module):
    """``W f(h) + b``: an activation and one linear layer whose weights and bias are drawn from U(-init_range, init_range).

    With ``num_cells`` further hidden layers of those sizes stand before the last. The last ``skip_size`` inputs go past the
    first activation, which would cut off their sign.
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
    for number, layer in enumerate(layers):
        if type(layer) is not (nn.Linear if number % 2 else nn.ReLU):
            return False
        if layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks:
            return False
    return True


class Concat(nn.Module):
    """Concatenates its inputs ``[*B, n_i]`` in the first one's dtype, to ``[*B, sum n_i]``."""

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Concatenates along the last dimension."""
        return torch.cat([x.to(inputs[0].dtype) for x in inputs], -1) if len(inputs) > 1 else inputs[0]


class OnMemory(nn.Module):
    """A head that reads a GRU's features ``[*B, hidden_size]`` and, past its first activation, further inputs.

    Args:
        head: the head; its ``skip_size`` is the size of the further inputs.
        detach: whether to stop the gradient into the features.
    """

    def __init__(self, head: Head, detach: bool):
        super().__init__()
        self.head, self.detach = head, detach
        self.concat = Concat()

    def forward(self, features: torch.Tensor, *extra: torch.Tensor) -> torch.Tensor:
        features = features.detach() if self.detach else features
        return self.head(self.concat(features, *extra))


def gru_body(
    in_keys: Sequence[NestedKey],
    input_size: int,
    hidden_size: int,
    *,
    hidden_key: NestedKey,
    features_key: NestedKey,
    num_layers: int = 1,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> list[TensorDictModule]:
    """Modules from ``in_keys`` to the GRU's output under ``features_key`` ``[*B, hidden_size]``.

    The hidden state ``[*B, num_layers, hidden_size]`` is read from ``hidden_key`` and written to ``("next", hidden_key)``.
    """
    modules = []
    in_key = in_keys[0]
    if len(in_keys) > 1:
        in_key = sub_key(features_key, "input")
        modules.append(TensorDictModule(Concat(), in_keys=list(in_keys), out_keys=[in_key]))
    keys = {"in_key": in_key, "hidden_key": hidden_key, "features_key": features_key}
    return [*modules, GRUCore(input_size, hidden_size, num_layers, **keys, device=device, dtype=dtype)]


def as_keys(extra_keys: Sequence[NestedKey]) -> list[NestedKey]:
    """``extra_keys`` as a list. A single string is an error: its letters would be taken for keys."""
    if isinstance(extra_keys, str):
        raise TypeError(f"extra_keys={extra_keys!r} is a single key; give a list: extra_keys=[{extra_keys!r}].")
    return list(extra_keys)
