"""The body that actor and critic share in kind: inputs -> GRU -> activation -> one linear layer (SPEC 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule
from tensordict.utils import unravel_key
from torch import nn
from torchrl.modules import GRUModule

__all__ = ["Concat", "Head", "gru_body", "sub_key"]


class Head(nn.Module):
    """``W f(h) + b``: an activation and one linear layer whose weights and bias are drawn from U(-init_range, init_range).

    With ``num_cells`` further hidden layers of those sizes stand before the last.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        init_range: float,
        activation: Callable[[], nn.Module] = nn.ReLU,
        num_cells: Sequence[int] = (),
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
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
        return self.layers(features)


class Concat(nn.Module):
    """Concatenates its inputs ``[*B, n_i]`` in the first one's dtype, to ``[*B, sum n_i]``."""

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Concatenates along the last dimension."""
        return torch.cat([x.to(inputs[0].dtype) for x in inputs], -1)


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
    if hidden_size < 1 or input_size < 1:
        raise ValueError(f"input_size={input_size} and hidden_size={hidden_size} must be at least 1.")
    modules = []
    in_key = in_keys[0]
    if len(in_keys) > 1:
        in_key = sub_key(features_key, "input")
        modules.append(TensorDictModule(Concat(), in_keys=list(in_keys), out_keys=[in_key]))
    gru = GRUModule(
        input_size=input_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        in_keys=[in_key, hidden_key, "is_init"],
        out_keys=[features_key, unravel_key(("next", hidden_key))],
        device=device,
    )
    return [*modules, gru.to(dtype) if dtype is not None else gru]


def sub_key(key: NestedKey, suffix: str) -> NestedKey:
    """``key`` with ``suffix`` on its last part: ``("a", "b"), "c"`` gives ``("a", "b_c")``."""
    return f"{key}_{suffix}" if isinstance(key, str) else (*key[:-1], f"{key[-1]}_{suffix}")
