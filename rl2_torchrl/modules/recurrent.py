"""Networks put together by keyword: encoder -> core -> head (-> distribution). The usual ones have names of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase
from torchrl.modules import ProbabilisticActor

from rl2_torchrl.arguments import as_list, require_env, require_flags, whole
from rl2_torchrl.modules.actor_critic import Network
from rl2_torchrl.modules.distributions import (
    ActionDistribution,
    CategoricalActions,
    GaussianActions,
    require_asked,
)
from rl2_torchrl.modules.layers import Head, SkipHead
from rl2_torchrl.modules.slots import Shapes, fill_slots, read_specs, specs_of

__all__ = [
    *("GRUCategoricalActor", "GRUGaussianActor", "GRUValueHead"),
    *("MemoryValueHead", "RecurrentActor", "RecurrentCritic"),
]


# -------------------------------------------------------------------- actors
class RecurrentActor(ProbabilisticActor):
    """A policy with memory: encoder, core, head and distribution, each yours or ours.

    Reads ``in_key`` ``[*B, input_size]`` and whatever else has an encoder, the core's memory, and ``"is_init"`` ``[*B, 1]``;
    writes the action, its log-probability ``[*B]``, the distribution's parameters, the core's output under ``features_key``
    ``[*B, features_size]`` and ``("next", memory)``.

    Args:
        input_size: size of the transition input; with encoders by entry, the shape of each entry that is read, such as
            ``{"trans": [7], "pixels": [3, 64, 64]}``, or its spec where it is no reals.
        distribution: how the head's outputs become an action, such as ``CategoricalActions(5)``.
        action_key, hidden_key, features_key: what is written, and the core's (first) memory.
        init_range: the default head's last layer is drawn from U(-init_range, init_range).
        device, dtype: of the parameters.
        encoder: reads ``in_key`` ``[*B, input_size]`` and gives ``[*B, n]``: a module or a function of the entry's shape, such as
            `MLPEncoder`; or a mapping of entries to such, whose outputs are concatenated with the entries that have none; or a
            TensorDictModule, of which the first output is taken, of a sequence that of its last module. Default none; `from_env`
            gives images that the transition input leaves out a `ConvEncoder`. A module of yours is given images
            ``[N, *shape]`` as the env shows them: bytes are for it to divide or embed, unless it is an `ImageEncoder`,
            which scales them to [0, 1].
        core: carries the memory: a core, or a function of the size of its input, such as `LSTMCore` or
            ``partial(LSTMCore, hidden_size=128)``; its entries are named by this network. Default `GRUCore`.
        head: makes ``distribution.num_outputs`` numbers of the features: a module, or a function of both sizes; a TensorDictModule
            may read further entries, such as a mask of legal actions. Default `Head`.
        hidden_size, num_layers: of the default core. Default 64 and 1.
        num_cells: hidden layers of the default head: what to do is often no linear function of what is remembered. Default none.
        skip: whether these layers read the core's input too, so that what is seen now need not pass through units that change
            slowly. Their weights are drawn for these inputs alone (He et al. 2015). Needs ``num_cells``. Default False.
        activation: module class before each linear layer of the default head. Default `torch.nn.ReLU`.
        in_key: transition input. Default ``"trans"``.
        normalize: bring the transition input to mean 0 and standard deviation 1 by a `RunningNorm`: all of its entries, or those
            that a bool tensor ``[input_size]`` marks. `from_env` marks observed numbers, no choices, the reward, and actions whose
            bounds are of another order than 1. `PPOUpdate` tells it of batches; elsewhere do so by
            `RunningNorm.update_statistics`. Default False.

    Examples:
        >>> from tensordict import TensorDict
        >>> from rl2_torchrl.modules import CategoricalActions, LSTMCore, MLPEncoder
        >>> actor = RecurrentActor(5, CategoricalActions(3), encoder=MLPEncoder, core=LSTMCore, num_cells=[32])
        >>> td = actor(TensorDict({"trans": torch.zeros(4, 5), "is_init": torch.ones(4, 1, dtype=torch.bool)}, [4]))
        >>> td["logits"].shape, td["next", "actor_hidden_cell"].shape
        (torch.Size([4, 3]), torch.Size([4, 1, 64]))
    """

    def __init__(
        self,
        input_size: Shapes,
        distribution: ActionDistribution,
        *,
        action_key: NestedKey = "action",
        hidden_key: NestedKey = "actor_hidden",
        init_range: float = 1e-3,
        features_key: NestedKey = "actor_features",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **slots,
    ):
        if not isinstance(distribution, ActionDistribution):
            raise TypeError(
                f"distribution={distribution!r} is no ActionDistribution: give one such as CategoricalActions(3), or give from_env "
                "a function of the action spec such as TanhGaussianActions.from_spec."
            )
        factory = {"device": device, "dtype": dtype}
        slots |= {"hidden_key": hidden_key, "features_key": features_key, "init_range": init_range, **factory}
        body, head, head_keys, names = fill_slots(input_size, distribution.num_outputs, **slots)
        head = distribution.parameters_of(head, **factory)
        super().__init__(
            TensorDictSequential(*body, TensorDictModule(head, head_keys, distribution.parameter_keys)),
            in_keys=distribution.parameter_keys,
            out_keys=[action_key],
            distribution_class=distribution.distribution_class,
            distribution_kwargs=distribution.distribution_kwargs,
            return_log_prob=True,
        )
        require_asked(distribution, self.module[-1])
        self.hidden_key, self.features_key, self.hidden_size = names

    @classmethod
    def from_env(
        cls,
        env: EnvBase,
        *,
        distribution: ActionDistribution | Callable[[TensorSpec], ActionDistribution] = ActionDistribution.from_spec,
        **kwargs,
    ) -> RecurrentActor:
        """An actor of the sizes, device, action key and action space of ``env``, which has a `PreviousStep` among its transforms.

        ``distribution`` is one, or a function of the action spec of one row, such as ``TanhGaussianActions.from_spec``; by default
        the spec decides: categorical for one or several choices, Gaussian for reals. Further keywords are the constructor's. What
        the env shows in two dimensions, or more than an image's three, needs an encoder.
        """
        spec = _action_spec(cls, env)
        if callable(distribution) and not isinstance(distribution, ActionDistribution | type):
            distribution = distribution(spec)
        kwargs = {"action_key": env.action_key, **kwargs}
        return cls(read_specs(env, kwargs), distribution, **kwargs)


class GRUGaussianActor(RecurrentActor):
    """Gaussian GRU policy: ``mean_t = W relu(GRU(trans_t, h_{t-1})) + b``, ``a_t ~ Normal(mean_t, exp(log_std))``.

    A `RecurrentActor` with ``GaussianActions(action_dim, init_log_std=...)``: the action ``[*B, action_dim]`` comes with ``"loc"``
    and ``"scale"``, and its log-probability is summed over the components. In deterministic mode it is the mean.

    Examples:
        >>> GRUGaussianActor(input_size=5, action_dim=2, hidden_size=8).out_keys
        ['actor_features', ('next', 'actor_hidden'), 'loc', 'scale', 'action', 'action_log_prob']
    """

    def __init__(self, input_size: Shapes, action_dim: int, *, init_log_std: float = -0.5, **kwargs):
        super().__init__(input_size, GaussianActions(action_dim, init_log_std=init_log_std), **kwargs)

    @classmethod
    def from_env(cls, env: EnvBase, **kwargs) -> GRUGaussianActor:
        """An actor of the sizes, device and action key of ``env``; TypeError where its actions are discrete."""
        scale = {name: value for name, value in kwargs.items() if name == "init_log_std"}
        actions = GaussianActions.from_spec(_action_spec(cls, env), **scale)
        kwargs = {"action_key": env.action_key, **kwargs}
        return cls(read_specs(env, kwargs), actions.num_outputs, **kwargs)


class GRUCategoricalActor(RecurrentActor):
    """Categorical GRU policy: ``logits_t = W relu(GRU(trans_t, h_{t-1})) + b``.

    A `RecurrentActor` with ``CategoricalActions(num_actions, one_hot=...)``: the action, an index ``[*B]`` or a one-hot vector,
    comes with ``"logits"`` ``[*B, num_actions]``. In deterministic mode it is the most probable one.

    Examples:
        >>> GRUCategoricalActor(input_size=5, num_actions=3, hidden_size=8).out_keys
        ['actor_features', ('next', 'actor_hidden'), 'logits', 'action', 'action_log_prob']
    """

    def __init__(self, input_size: Shapes, num_actions: int, *, one_hot: bool = False, **kwargs):
        super().__init__(input_size, CategoricalActions(num_actions, one_hot=one_hot), **kwargs)

    @classmethod
    def from_env(cls, env: EnvBase, **kwargs) -> GRUCategoricalActor:
        """An actor of the sizes, device, action key and encoding of ``env``; TypeError where its actions are not one choice."""
        actions = CategoricalActions.from_spec(_action_spec(cls, env))
        kwargs = {"action_key": env.action_key, "one_hot": actions.one_hot, **kwargs}
        return cls(read_specs(env, kwargs), actions.num_outputs, **kwargs)


# ------------------------------------------------------------------- critics
class RecurrentCritic(Network):
    """A value function with a memory of its own: encoder, core and head, each yours or ours.

    Reads ``in_key``, ``extra_keys`` and whatever else has an encoder, the core's memory, and ``"is_init"`` ``[*B, 1]``; writes
    ``value_key`` ``[*B, 1]``, the core's output under ``features_key`` and ``("next", memory)``.

    Args:
        input_size: summed size of ``in_key`` and ``extra_keys``; or the shape of each entry that is read.
        value_key: what is written.
        hidden_key, features_key, init_range, **slots: as in `RecurrentActor`.
        extra_keys: further inputs that the actor never sees, such as ``"time_left"`` or ``"task"``, each ``[*B, n]``. They are
            concatenated to the core's input, as they are: a task in other units than 1 is to be scaled by the env.

    Examples:
        >>> from rl2_torchrl.modules import LSTMCore
        >>> RecurrentCritic(6, core=LSTMCore, extra_keys=["time_left"]).in_keys
        ['trans', 'time_left', 'critic_hidden', 'critic_hidden_cell', 'is_init']
    """

    def __init__(
        self,
        input_size: Shapes,
        *,
        value_key: NestedKey = "state_value",
        hidden_key: NestedKey = "critic_hidden",
        features_key: NestedKey = "critic_features",
        init_range: float = 3e-3,
        **slots,
    ):
        slots |= {"hidden_key": hidden_key, "features_key": features_key, "init_range": init_range}
        body, head, head_keys, names = fill_slots(input_size, 1, **slots)
        super().__init__(*body, TensorDictModule(head, head_keys, [value_key]))
        self.hidden_key, self.features_key, self.hidden_size = names
        self.value_key = value_key

    @classmethod
    def from_env(cls, env: EnvBase, **kwargs) -> RecurrentCritic:
        """A critic of the input sizes and device of ``env``; further keywords as in the constructor."""
        require_env(env, f"{cls.__name__}.from_env(env, ...)")
        return cls(read_specs(env, kwargs), **kwargs)


class GRUValueHead(RecurrentCritic):
    """Value function with a GRU of its own, ``v_t = W relu(GRU(trans_t, h_{t-1})) + b``, ``[*B, 1]``: a `RecurrentCritic`.

    Examples:
        >>> GRUValueHead(input_size=5, hidden_size=8).out_keys
        ['critic_features', ('next', 'critic_hidden'), 'state_value']
    """


class MemoryValueHead(Network):
    """Value function on the *actor's* memory: no GRU of its own, so half the work of two separate networks.

    With ``detach=True`` it sends no gradient into the actor's memory, which the policy loss alone trains ("detached" wiring). With
    ``detach=False`` both losses train one trunk ("shared" wiring); on long trials the value loss then tends to crowd out the
    policy's. In a loss the actor must run first, as it does in `ClipPPOLoss` and `A2CLoss`.

    Args:
        features_size: size of the actor's features, its ``hidden_size``; ``features_key`` is their entry.
        detach: whether to stop the gradient into the actor's memory; an update looks at it once a batch.
        extra_keys, extra_size: further inputs, as in `RecurrentCritic`, and their summed size.
        init_range, **layers: as in `Head`. A detached critic cannot shape its features, so that one hidden layer of its own helps.
        value_key: what is written.

    Examples:
        >>> MemoryValueHead(features_size=8, detach=True)(actor_features=torch.zeros(4, 8)).shape
        torch.Size([4, 1])
    """

    def __init__(
        self,
        features_size: int,
        *,
        detach: bool,
        extra_size: int = 0,
        extra_keys: Sequence[NestedKey] = (),
        init_range: float = 3e-3,
        features_key: NestedKey = "actor_features",
        value_key: NestedKey = "state_value",
        **layers,
    ):
        size = whole("features_size", features_size) + extra_size
        head = Head(size, 1, skip_size=extra_size, init_range=init_range, **layers)
        in_keys = [features_key, *as_list("extra_keys", extra_keys)]
        super().__init__(TensorDictModule(SkipHead(head, detach), in_keys, [value_key]))
        self.detach, self.value_key = detach, value_key

    def __setattr__(self, name: str, value: object) -> None:
        if name == "detach":  # whenever it is set
            require_flags(detach=value)
            self[0].module.detach = value
        super().__setattr__(name, value)

    @classmethod
    def from_env(cls, env: EnvBase, actor: RecurrentActor, **kwargs) -> MemoryValueHead:
        """A value head on the memory of ``actor``, a `RecurrentActor`, with the device and extra vectors of ``env``."""
        require_env(env, f"{cls.__name__}.from_env(env, actor, ...)")
        kwargs.setdefault("device", env.device)
        specs = specs_of(env, as_list("extra_keys", kwargs.get("extra_keys", ())))
        extra_size = sum(spec.shape.numel() for spec in specs.values())
        return cls(actor.hidden_size, extra_size=extra_size, features_key=actor.features_key, **kwargs)


def _action_spec(cls: type[RecurrentActor], env: EnvBase) -> TensorSpec:
    """The actions of one row of ``env``, from which a ``cls`` is made; TypeError where that is no env."""
    require_env(env, f"{cls.__name__}.from_env(env, ...)")
    # With a nested action key a transformed env's `action_spec_unbatched` is the whole Composite.
    return env.full_action_spec_unbatched[env.action_key]
