"""The body that actor and critic share in kind: inputs -> GRU -> activation -> one linear layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule
from tensordict.utils import unravel_key
from torch import nn

from rl2_torchrl import kernels
from rl2_torchrl.gradients.chain import ChainPart, ConcatPart, are_relu_and_linear
from rl2_torchrl.gradients.part import runs
from rl2_torchrl.modules.gru import FastGRUModule
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

    def gradient_part(self, in_keys: Sequence[NestedKey], out_keys: Sequence[NestedKey]) -> ChainPart | None:
        """The part of a PPO step that this is, with its own gradient (`rl2_torchrl.gradients`); None for other activations."""
        return self.chain_part(self, in_keys, out_keys) if runs(self, Head) and not self.skip_size else None

    def chain_part(self, module: nn.Module, in_keys, out_keys, *, detach: bool = False) -> ChainPart | None:
        """As `gradient_part`, of a ``module`` that is this head and what it reads beside the features."""
        known = are_relu_and_linear(list(self.layers)) and kernels.covers(*self.parameters())
        return ChainPart(module, list(self.layers), in_keys, out_keys, detach=detach) if known else None

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

    def gradient_part(self, in_keys: Sequence[NestedKey], out_keys: Sequence[NestedKey]) -> ConcatPart | None:
        """The part of a PPO step that this is, with its own gradient."""
        return ConcatPart(self, in_keys, out_keys) if runs(self, Concat) else None


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

    def gradient_part(self, in_keys: Sequence[NestedKey], out_keys: Sequence[NestedKey]) -> ChainPart | None:
        """The part of a PPO step that this is, with its own gradient."""
        is_ours = runs(self, OnMemory) and runs(self.head, Head) and (self.head.skip_size > 0) == (len(in_keys) > 1)
        return self.head.chain_part(self, in_keys, out_keys, detach=self.detach) if is_ours else None


class _CheckedGRU(FastGRUModule):
    """TorchRL's `GRUModule`, which says in the user's terms what is wrong with its input."""

    # torch.compile breaks the graph at a GRU in any case; stopping here saves tracing the code around it.
    @torch.compiler.disable
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        in_key, hidden_key, _ = self.in_keys
        value, hidden = tensordict.get(in_key, None), tensordict.get(hidden_key, None)
        if value is None or tensordict.get("is_init", None) is None:
            raise KeyError(
                f"the GRU reads {in_key!r} and 'is_init', one of which is missing; there is {list(tensordict.keys(True))}. "
                "PreviousStep() writes the transition input; InitTracker(), which a Collector with "
                "auto_register_policy_transforms=True adds by itself, marks where a trial starts."
            )
        if value.shape[-1] != self.gru.input_size:
            raise ValueError(
                f"{in_key!r} has {value.shape[-1]} entries, but the GRU was built with input_size={self.gru.input_size} "
                "(the sum of all its inputs). Build the network with from_env(env, ...)."
            )
        memory = (self.gru.num_layers, self.gru.hidden_size)
        if hidden is not None and hidden.shape[tensordict.ndim :] != memory:
            raise ValueError(
                f"{hidden_key!r} has shape {tuple(hidden.shape)}; it must be [*B, num_layers, hidden_size] with {memory} at "
                "its end. Take the primers from this network: get_primers_from_module(policy)."
            )
        return super().forward(tensordict)


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
    gru = _CheckedGRU(
        input_size=input_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        in_keys=[in_key, hidden_key, "is_init"],
        out_keys=[features_key, unravel_key(("next", hidden_key))],
        device=device,
    )
    return [*modules, gru.to(dtype) if dtype is not None else gru]


def as_keys(extra_keys: Sequence[NestedKey]) -> list[NestedKey]:
    """``extra_keys`` as a list. A single string is an error: its letters would be taken for keys."""
    if isinstance(extra_keys, str):
        raise TypeError(f"extra_keys={extra_keys!r} is a single key; give a list: extra_keys=[{extra_keys!r}].")
    return list(extra_keys)


def sub_key(key: NestedKey, suffix: str) -> NestedKey:
    """``key`` with ``suffix`` on its last part: ``("a", "b"), "c"`` gives ``("a", "b_c")``."""
    return f"{key}_{suffix}" if isinstance(key, str) else (*key[:-1], f"{key[-1]}_{suffix}")
