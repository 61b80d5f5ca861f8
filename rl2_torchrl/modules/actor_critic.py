"""`ActorCritic`: the collector's policy, which acts and stores the value in one pass."""

from collections.abc import Iterable, Iterator

from tensordict import NestedKey
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase, TensorDictSequential
from tensordict.utils import unravel_key
from torch import Tensor, nn

from rl2_torchrl.arguments import kind_of

__all__ = ["ActorCritic", "Network"]


class Network(TensorDictSequential):
    """A sequence that is not made of modules by its constructor: what TorchRL cuts out of it is a plain sequence."""

    def select_subsequence(
        self, in_keys: Iterable[NestedKey] | None = None, out_keys: Iterable[NestedKey] | None = None
    ) -> TensorDictSequential:
        return TensorDictSequential(*self._module_iter()).select_subsequence(in_keys, out_keys)

    def __getitem__(self, index: int | slice) -> TensorDictModuleBase:
        return TensorDictSequential(*self.module[index]) if isinstance(index, slice) else self.module[index]


class ActorCritic(Network):
    """Actor, then critic: the policy to collect with, so that values are stored at collection and never computed twice.

    The critic's memory then is collected as the actor's is; a critic outside the collector's policy gets no primer, and refuses
    steps that go on from a memory that is not there. Reads and writes the entries of both, ``[*B]`` or, in recurrent mode,
    ``[*B, T]``.

    The actor's weights have the names here that they have in the actor, so that a collector takes them alone too, as TorchRL's
    `PPOTrainer` hands them over: give that ``gae=TrialAdvantage()``, and no replay buffer, which would shuffle single steps.
    (TorchRL's `GAE` asks the critic again, at each step and its successor, and ends in "The sets of keys in the tensordicts to
    stack are exclusive": values and features are stored at steps alone.)

    Args:
        actor: e.g. `GRUGaussianActor` or `GRUCategoricalActor`.
        critic: e.g. `GRUValueHead` or `MemoryValueHead`.

    Examples:
        >>> from rl2_torchrl.modules import GRUCategoricalActor, GRUValueHead
        >>> policy = ActorCritic(GRUCategoricalActor(5, 3), GRUValueHead(5))
        >>> policy.hidden_keys
        ['actor_hidden', 'critic_hidden']
    """

    def __init__(self, actor: TensorDictModuleBase, critic: TensorDictModuleBase):
        require_networks("ActorCritic", actor, critic)
        if shared := [key for key in hidden_keys(actor) if key in hidden_keys(critic)]:
            raise ValueError(
                f"actor and critic both keep their memory under {shared}: give one another hidden_key=, or take MemoryValueHead."
            )
        is_sequence = type(actor).forward is ProbabilisticTensorDictSequential.forward
        # A sequence's modules, so that their weights have the names here that they have in the actor.
        parts = actor.module if is_sequence and isinstance(actor.module, nn.ModuleList) else [actor]
        super().__init__(*parts, critic)
        self.__dict__["_actor"] = actor  # past the module tree, in which its parts stand

    @property
    def actor(self) -> TensorDictModuleBase:
        """The policy proper."""
        return self._actor

    @property
    def critic(self) -> TensorDictModuleBase:
        """The value function."""
        return self.module[-1]

    # What TensorDictSequential runs: the actor as a whole, with the hooks that it may have.
    def _module_iter(self) -> Iterator[TensorDictModuleBase]:
        yield from (self.actor, self.critic)

    def _get_module_num_or_key(self, mod: nn.Module) -> str:
        return "critic" if mod is self.critic else "actor"

    @property
    def hidden_keys(self) -> list[NestedKey]:
        """Entries of the hidden states, ``[*B, num_layers, hidden_size]`` each."""
        return hidden_keys(self)


def require_networks(where: str, actor: nn.Module | None, *critic: nn.Module | None) -> None:
    """Raises unless ``actor``, and ``critic``, if it is there, are what ``where`` is given.

    Raises:
        TypeError: the actor has no action distribution, or the critic is no network.
        ValueError: both have one core, and it goes by the names of one of them alone.
    """
    if isinstance(actor, type) or not hasattr(actor, "get_dist"):
        raise TypeError(
            f"{where}(actor, critic): {kind_of(actor)} has no action distribution. The actor comes first, such as GRUGaussianActor."
        )
    for each in critic:
        # A compiled one is a plain module that has these.
        if isinstance(each, type) or not (hasattr(each, "in_keys") and hasattr(each, "out_keys")):
            raise TypeError(
                f"{where}(actor, critic): {kind_of(each)} is no critic, which comes second, such as GRUValueHead.from_env(env)."
            )
    networks = (actor, *critic)
    for core in set.intersection(*(set(network.modules()) for network in networks)):
        if hasattr(type(core), "name_entries") and any(core.in_keys[1] not in each.in_keys for each in networks):
            raise ValueError(
                f"one {type(core).__name__} stands in actor and critic, and goes by the names that the second gave it, "
                f"{core.in_keys}: make one for each, core=partial(LSTMCore, ...), or share the actor's (MemoryValueHead)."
            )


def cores_of(policy: nn.Module) -> list[nn.Module]:
    """The cores within ``policy`` that say what they remember when a trial starts."""
    # Of the class: a TensorDictModule passes on what its inner module has.
    return [module for module in policy.modules() if hasattr(type(module), "initial_memory")]


def first_memory(cores: Iterable[nn.Module], rows: int) -> dict[NestedKey, Tensor]:
    """What ``cores`` remember when a trial starts, ``[rows, ...]`` each."""
    return {key: m for core in cores for key, m in zip(core.in_keys[1:-1], core.initial_memory(rows), strict=True)}


def hidden_keys(module: TensorDictModuleBase) -> list[NestedKey]:
    """Entries that ``module`` reads and hands on to the next step: ``k`` among its inputs and ``("next", k)`` written."""
    written = {unravel_key(key) for key in module.out_keys}
    return [key for key in module.in_keys if unravel_key(("next", key)) in written]
