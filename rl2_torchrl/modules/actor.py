"""The usual policies, `RecurrentActor`s by name: `GRUGaussianActor` and `GRUCategoricalActor`."""

from __future__ import annotations

from torchrl.envs import EnvBase

from rl2_torchrl.modules.distributions import CategoricalActions, GaussianActions
from rl2_torchrl.modules.recurrent import RecurrentActor, Shapes, action_spec, read_shapes

__all__ = ["GRUCategoricalActor", "GRUGaussianActor"]


class GRUGaussianActor(RecurrentActor):
    """Gaussian GRU policy: ``mean_t = W relu(GRU(trans_t, h_{t-1})) + b``, ``a_t ~ Normal(mean_t, exp(log_std))``.

    The scale is a learnable parameter vector ``log_std`` ``[action_dim]``, independent of the state. The log-probability
    is summed over the components. In deterministic mode the action is the mean.

    Reads ``in_key`` ``[*B, input_size]``, ``hidden_key`` ``[*B, num_layers, hidden_size]`` and ``"is_init"`` ``[*B, 1]``;
    writes the action ``[*B, action_dim]``, its log-probability ``[*B]``, ``"loc"`` and ``"scale"``, the GRU's output under
    ``features_key`` ``[*B, hidden_size]`` and ``("next", hidden_key)``.

    Args:
        input_size: size of the transition input.
        action_dim: dimensions of the action.
        init_log_std: first value of every component of ``log_std``. Default -0.5.
        **kwargs: as in `RecurrentActor`: ``hidden_size``, ``num_cells``, ``skip``, ``encoder``, ``core``, ...

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> actor = GRUGaussianActor(input_size=5, action_dim=2, hidden_size=8)
        >>> td = TensorDict({"trans": torch.zeros(4, 5), "is_init": torch.ones(4, 1, dtype=torch.bool)}, [4])
        >>> actor(td)["action"].shape, td["next", "actor_hidden"].shape
        (torch.Size([4, 2]), torch.Size([4, 1, 8]))
    """

    def __init__(self, input_size: Shapes, action_dim: int, *, init_log_std: float = -0.5, **kwargs):
        super().__init__(input_size, GaussianActions(action_dim, init_log_std=init_log_std), **kwargs)

    @classmethod
    def from_env(cls, env: EnvBase, **kwargs) -> GRUGaussianActor:
        """An actor of the sizes, device and action key of ``env``; TypeError where its actions are discrete."""
        action_dim = GaussianActions.from_spec(action_spec(env)).num_outputs
        kwargs = {"action_key": env.action_key, **kwargs}
        return cls(read_shapes(env, kwargs), action_dim, **kwargs)


class GRUCategoricalActor(RecurrentActor):
    """Categorical GRU policy: ``logits_t = W relu(GRU(trans_t, h_{t-1})) + b``.

    Reads and writes the entries of `GRUGaussianActor`, with ``"logits"`` ``[*B, num_actions]`` in place of ``"loc"`` and
    ``"scale"``. In deterministic mode the action is the most probable one.

    Args:
        input_size: size of the transition input.
        num_actions: number of actions.
        one_hot: the action is a one-hot vector ``[*B, num_actions]``, as TorchRL's `GymEnv` has it, in place of an
            index ``[*B]``. Default False.
        **kwargs: as in `RecurrentActor`: ``hidden_size``, ``num_cells``, ``skip``, ``encoder``, ``core``, ...

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> actor = GRUCategoricalActor(input_size=5, num_actions=3, hidden_size=8)
        >>> td = TensorDict({"trans": torch.zeros(4, 5), "is_init": torch.ones(4, 1, dtype=torch.bool)}, [4])
        >>> actor(td)["action"].shape, td["logits"].shape
        (torch.Size([4]), torch.Size([4, 3]))
    """

    def __init__(self, input_size: Shapes, num_actions: int, *, one_hot: bool = False, **kwargs):
        super().__init__(input_size, CategoricalActions(num_actions, one_hot=one_hot), **kwargs)

    @classmethod
    def from_env(cls, env: EnvBase, **kwargs) -> GRUCategoricalActor:
        """An actor of the sizes, device, action key and encoding of ``env``; TypeError where its actions are not one choice."""
        actions = CategoricalActions.from_spec(action_spec(env))
        kwargs = {"action_key": env.action_key, "one_hot": actions.one_hot, **kwargs}
        return cls(read_shapes(env, kwargs), actions.num_outputs, **kwargs)
