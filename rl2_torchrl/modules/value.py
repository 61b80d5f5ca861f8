"""Critics: `GRUValueHead` with a memory of its own, `MemoryValueHead` on the actor's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.envs import EnvBase

from rl2_torchrl.modules.heads import Head, SkipHead
from rl2_torchrl.modules.recurrent import RecurrentActor, RecurrentCritic, as_keys, entry_shapes

__all__ = ["GRUValueHead", "MemoryValueHead"]


class GRUValueHead(RecurrentCritic):
    """Value function with a GRU of its own: ``v_t = W relu(GRU(trans_t, h_{t-1})) + b``.

    Reads ``in_key`` and ``extra_keys``, ``hidden_key`` ``[*B, num_layers, hidden_size]`` and ``"is_init"`` ``[*B, 1]``;
    writes ``value_key`` ``[*B, 1]``, ``features_key`` and ``("next", hidden_key)``. Arguments are those of `RecurrentCritic`,
    whose default core is a GRU.

    Examples:
        >>> from tensordict import TensorDict
        >>> value = GRUValueHead(input_size=6, hidden_size=8, extra_keys=["time_left"])
        >>> td = TensorDict({"trans": torch.zeros(4, 5), "time_left": torch.ones(4, 1)}, [4])
        >>> value(td.set("is_init", torch.ones(4, 1, dtype=torch.bool)))["state_value"].shape
        torch.Size([4, 1])
    """


class MemoryValueHead(TensorDictSequential):
    """Value function on the *actor's* memory: no GRU of its own, so half the work of two separate networks.

    With ``detach=True`` it sends no gradient into the actor's memory: the actor's GRU is trained by the policy loss
    alone ("detached" wiring). With ``detach=False`` both losses train one trunk ("shared" wiring); on long trials the
    value loss then tends to crowd out the policy's.

    In a loss the actor must run first, as it does in `ClipPPOLoss` and `A2CLoss`: the head reads the features that the
    actor has just computed.

    Args:
        features_size: size of the actor's features, its ``hidden_size``.
        detach: whether to stop the gradient into the actor's memory.
        extra_size: summed size of ``extra_keys``.
        extra_keys: further inputs that the actor never sees, such as ``"time_left"`` or ``"task"``, each ``[*B, n]``.
        num_cells: sizes of further hidden layers. A detached critic cannot shape its features, so that one layer of its
            own helps. Default none.
        activation: Default `torch.nn.ReLU`.
        init_range: the last layer is drawn from U(-init_range, init_range). Default 3e-3.
        features_key: the actor's features. Default ``"actor_features"``.
        value_key: Default ``"state_value"``.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Examples:
        >>> from tensordict import TensorDict
        >>> from rl2_torchrl.modules import GRUCategoricalActor
        >>> actor = GRUCategoricalActor(input_size=5, num_actions=3, hidden_size=8)
        >>> value = MemoryValueHead(features_size=8, detach=True)
        >>> td = TensorDict({"trans": torch.zeros(4, 5), "is_init": torch.ones(4, 1, dtype=torch.bool)}, [4])
        >>> value(actor(td))["state_value"].shape
        torch.Size([4, 1])
    """

    def __init__(
        self,
        features_size: int,
        *,
        detach: bool,
        extra_size: int = 0,
        extra_keys: Sequence[NestedKey] = (),
        num_cells: Sequence[int] = (),
        activation: Callable[[], nn.Module] = nn.ReLU,
        init_range: float = 3e-3,
        features_key: NestedKey = "actor_features",
        value_key: NestedKey = "state_value",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        layers = {
            "num_cells": num_cells,
            "activation": activation,
            "init_range": init_range,
            "device": device,
            "dtype": dtype,
        }
        head = Head(features_size + extra_size, 1, skip_size=extra_size, **layers)
        in_keys = [features_key, *as_keys(extra_keys)]
        super().__init__(TensorDictModule(SkipHead(head, detach), in_keys, [value_key]))
        self.detach, self.value_key = detach, value_key

    @classmethod
    def from_env(cls, env: EnvBase, actor: RecurrentActor, **kwargs) -> MemoryValueHead:
        """A value head on ``actor``'s memory, with the device and extra inputs of ``env``.

        Raises:
            KeyError: the env lacks one of ``extra_keys``.
            TypeError: ``actor`` is none of this package's.
        """
        if not hasattr(actor, "hidden_size"):
            raise TypeError(
                f"from_env knows the features of a RecurrentActor such as GRUCategoricalActor, not of {type(actor).__name__}: "
                "say them, MemoryValueHead(features_size=..., features_key=..., detach=...)."
            )
        kwargs.setdefault("device", env.device)
        shapes = entry_shapes(env, as_keys(kwargs.get("extra_keys", ())))
        extra_size = sum(shape[-1] for shape in shapes.values())
        return cls(actor.hidden_size, extra_size=extra_size, features_key=actor.features_key, **kwargs)
