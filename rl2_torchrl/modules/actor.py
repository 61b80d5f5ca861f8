"""Recurrent policies: `GRUGaussianActor` and `GRUCategoricalActor`, both TorchRL `ProbabilisticActor`s."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Categorical, OneHot, TensorSpec
from torchrl.envs import EnvBase
from torchrl.modules import IndependentNormal, OneHotCategorical, ProbabilisticActor

from rl2_torchrl.gradients.gaussian import GaussianHeadPart
from rl2_torchrl.gradients.part import runs
from rl2_torchrl.modules.body import Head, OnMemory, gru_body

__all__ = ["GRUCategoricalActor", "GRUGaussianActor"]


class GRUGaussianActor(ProbabilisticActor):
    """Gaussian GRU policy: ``mean_t = W relu(GRU(trans_t, h_{t-1})) + b``, ``a_t ~ Normal(mean_t, exp(log_std))``.

    The scale is a learnable parameter vector ``log_std`` ``[action_dim]``, independent of the state. The log-probability
    is summed over the components. In deterministic mode the action is the mean.

    Reads ``in_key`` ``[*B, input_size]``, ``hidden_key`` ``[*B, num_layers, hidden_size]`` and ``"is_init"`` ``[*B, 1]``;
    writes the action ``[*B, action_dim]``, its log-probability ``[*B]``, ``"loc"`` and ``"scale"``, the GRU's output under
    ``features_key`` ``[*B, hidden_size]`` and ``("next", hidden_key)``.

    Args:
        input_size: size of the transition input.
        action_dim: dimensions of the action.
        hidden_size: GRU units. Default 64.
        num_layers: GRU layers. Default 1.
        num_cells: sizes of further hidden layers between GRU and last layer: what to do is often no linear function of what is
            remembered. Default none.
        activation: module class between GRU and linear layer. Default `torch.nn.ReLU`.
        init_range: the last layer is drawn from U(-init_range, init_range). Default 1e-3.
        init_log_std: first value of every component of ``log_std``. Default -0.5.
        in_key: transition input. Default ``"trans"``.
        action_key: Default ``"action"``.
        hidden_key: Default ``"actor_hidden"``.
        features_key: Default ``"actor_features"``.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Examples:
        >>> from tensordict import TensorDict
        >>> actor = GRUGaussianActor(input_size=5, action_dim=2, hidden_size=8)
        >>> td = TensorDict({"trans": torch.zeros(4, 5), "is_init": torch.ones(4, 1, dtype=torch.bool)}, [4])
        >>> actor(td)["action"].shape, td["next", "actor_hidden"].shape
        (torch.Size([4, 2]), torch.Size([4, 1, 8]))
    """

    def __init__(
        self,
        input_size: int,
        action_dim: int,
        *,
        hidden_size: int = 64,
        num_layers: int = 1,
        num_cells: Sequence[int] = (),
        activation: Callable[[], nn.Module] = nn.ReLU,
        init_range: float = 1e-3,
        init_log_std: float = -0.5,
        in_key: NestedKey = "trans",
        action_key: NestedKey = "action",
        hidden_key: NestedKey = "actor_hidden",
        features_key: NestedKey = "actor_features",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        factory = {"device": device, "dtype": dtype}
        keys = {"hidden_key": hidden_key, "features_key": features_key}
        layers = {"num_cells": num_cells, "init_range": init_range, "activation": activation}
        body = gru_body([in_key], input_size, hidden_size, num_layers=num_layers, **keys, **factory)
        mean = Head(hidden_size, action_dim, **layers, **factory)
        head = TensorDictModule(Gaussian(mean, action_dim, init_log_std, **factory), [features_key], ["loc", "scale"])
        super().__init__(
            TensorDictSequential(*body, head),
            in_keys=["loc", "scale"],
            out_keys=[action_key],
            distribution_class=IndependentNormal,
            return_log_prob=True,
        )
        self.hidden_key, self.features_key, self.hidden_size = hidden_key, features_key, hidden_size

    @classmethod
    def from_env(cls, env: EnvBase, **kwargs) -> GRUGaussianActor:
        """An actor of the sizes, device and action key of ``env``; further keywords as in the constructor.

        Raises:
            TypeError: the env's actions are discrete.
            KeyError: the env has no transition input.
        """
        spec = _action_spec(env)
        if not spec.dtype.is_floating_point:
            raise TypeError(f"the env's actions are discrete ({spec}): use GRUCategoricalActor.")
        if len(spec.shape) != 1:
            raise TypeError(
                f"the env's actions have shape {tuple(spec.shape)} each, not [action_dim]: reshape them with a transform "
                "(for a scalar: UnsqueezeTransform with in_keys_inv)."
            )
        sizes = _sizes_from_env(env, kwargs)
        return cls(action_dim=spec.shape[-1], **sizes, **kwargs)


class GRUCategoricalActor(ProbabilisticActor):
    """Categorical GRU policy with the body of `GRUGaussianActor`: ``logits_t = W relu(GRU(trans_t, h_{t-1})) + b``.

    Reads and writes the entries of `GRUGaussianActor`, with ``"logits"`` ``[*B, num_actions]`` in place of ``"loc"`` and
    ``"scale"``. In deterministic mode the action is the most probable one.

    Args:
        input_size: size of the transition input.
        num_actions: number of actions.
        one_hot: the action is a one-hot vector ``[*B, num_actions]``, as TorchRL's `GymEnv` has it, in place of an
            index ``[*B]``. Default False.
        hidden_size: GRU units. Default 64.
        num_layers: GRU layers. Default 1.
        num_cells: sizes of further hidden layers between GRU and last layer: what to do is often no linear function of what is
            remembered. Default none.
        skip: whether these layers read the transition input beside the memory, so that what is seen now need not pass through
            units that change slowly. Their weights are drawn for these inputs alone (He et al. 2015). Needs ``num_cells``.
            Default False.
        activation: module class between GRU and linear layer. Default `torch.nn.ReLU`.
        init_range: the last layer is drawn from U(-init_range, init_range). Default 1e-3.
        in_key: transition input. Default ``"trans"``.
        action_key: Default ``"action"``.
        hidden_key: Default ``"actor_hidden"``.
        features_key: Default ``"actor_features"``.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Examples:
        >>> from tensordict import TensorDict
        >>> actor = GRUCategoricalActor(input_size=5, num_actions=3, hidden_size=8)
        >>> td = TensorDict({"trans": torch.zeros(4, 5), "is_init": torch.ones(4, 1, dtype=torch.bool)}, [4])
        >>> actor(td)["action"].shape, td["logits"].shape
        (torch.Size([4]), torch.Size([4, 3]))
    """

    def __init__(
        self,
        input_size: int,
        num_actions: int,
        *,
        one_hot: bool = False,
        hidden_size: int = 64,
        num_layers: int = 1,
        num_cells: Sequence[int] = (),
        skip: bool = False,
        activation: Callable[[], nn.Module] = nn.ReLU,
        init_range: float = 1e-3,
        in_key: NestedKey = "trans",
        action_key: NestedKey = "action",
        hidden_key: NestedKey = "actor_hidden",
        features_key: NestedKey = "actor_features",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        factory = {"device": device, "dtype": dtype}
        keys = {"hidden_key": hidden_key, "features_key": features_key}
        layers = {"num_cells": num_cells, "init_range": init_range, "activation": activation}
        body = gru_body([in_key], input_size, hidden_size, num_layers=num_layers, **keys, **factory)
        if skip:
            logits = _head_with_skip(hidden_size, input_size, num_actions, **layers, **factory)
            head = TensorDictModule(logits, [features_key, in_key], ["logits"])
        else:
            head = TensorDictModule(Head(hidden_size, num_actions, **layers, **factory), [features_key], ["logits"])
        super().__init__(
            TensorDictSequential(*body, head),
            in_keys=["logits"],
            out_keys=[action_key],
            distribution_class=OneHotCategorical if one_hot else torch.distributions.Categorical,
            return_log_prob=True,
        )
        self.hidden_key, self.features_key, self.hidden_size = hidden_key, features_key, hidden_size

    @classmethod
    def from_env(cls, env: EnvBase, **kwargs) -> GRUCategoricalActor:
        """An actor of the sizes, device, action key and action encoding of ``env``; further keywords as in the constructor.

        Raises:
            TypeError: the env's actions are not one categorical choice.
            KeyError: the env has no transition input.
        """
        spec = _action_spec(env)
        if type(spec) not in (Categorical, OneHot):
            raise TypeError(
                f"the env's actions are not one categorical choice ({spec}): use GRUGaussianActor for reals."
            )
        sizes = _sizes_from_env(env, kwargs)
        return cls(num_actions=spec.space.n, one_hot=isinstance(spec, OneHot), **sizes, **kwargs)


def _head_with_skip(
    hidden_size: int, input_size: int, num_actions: int, *, num_cells: Sequence[int], **kwargs
) -> OnMemory:
    """A head that reads the transition input too."""
    if not num_cells:
        raise ValueError(
            "skip=True without num_cells: one layer can only add up what is seen and what is remembered, not choose by both. "
            "Give it a hidden layer, such as num_cells=[64]."
        )
    head = Head(hidden_size + input_size, num_actions, num_cells=num_cells, skip_size=input_size, **kwargs)
    nn.init.kaiming_uniform_(head.layers[1].weight.detach()[:, hidden_size:], nonlinearity="relu")
    return OnMemory(head, detach=False)


class Gaussian(nn.Module):
    """``features -> (mean, exp(log_std))``, both ``[*B, action_dim]``."""

    def __init__(self, mean: nn.Module, action_dim: int, init_log_std: float, device=None, dtype=None):
        super().__init__()
        self.mean = mean
        self.log_std = nn.Parameter(torch.full((action_dim,), float(init_log_std), device=device, dtype=dtype))

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean = self.mean(features)
        return mean, self.log_std.exp().expand_as(mean)

    def gradient_part(self, in_keys: Sequence[NestedKey], out_keys: Sequence[NestedKey]) -> GaussianHeadPart | None:
        """The part of a PPO step that this is, with its own gradient; None where the mean is no chain of ReLU and linear."""
        is_ours = runs(self, Gaussian) and runs(self.mean, Head) and self.mean.chain_part(self, in_keys, out_keys)
        return GaussianHeadPart(self, list(self.mean.layers), self.log_std, in_keys, out_keys) if is_ours else None


def _action_spec(env: EnvBase) -> TensorSpec:
    # With a nested action key a transformed env's `action_spec_unbatched` is the whole Composite.
    return env.full_action_spec_unbatched[env.action_key]


def _sizes_from_env(env: EnvBase, kwargs: dict) -> dict:
    in_key = kwargs.get("in_key", "trans")
    kwargs.setdefault("action_key", env.action_key)
    kwargs.setdefault("device", env.device)
    return {"input_size": input_size(env, [in_key])}


def input_size(env: EnvBase, in_keys) -> int:
    """Sum of the last dimensions of the env's observations ``in_keys``.

    Raises:
        KeyError: the env has no such observation.
    """
    spec = env.observation_spec
    missing = [key for key in in_keys if key not in spec.keys(True, True)]
    if missing:
        raise KeyError(
            f"the env has no observation {missing}, only {list(spec.keys(True, True))}. An RL² agent reads the transition "
            "input that PreviousStep() writes: Compose(Trial(...), TaskSampler(...), PreviousStep())."
        )
    return sum(spec[key].shape[-1] for key in in_keys)
