"""`ActorCritic`: the collector's policy, which acts and stores the value in one pass."""

from __future__ import annotations

from tensordict import NestedKey
from tensordict.nn import TensorDictModuleBase, TensorDictSequential
from tensordict.utils import unravel_key

__all__ = ["ActorCritic"]


class ActorCritic(TensorDictSequential):
    """Actor, then critic: the policy to collect with, so that values are stored at collection and never computed twice.

    The critic's memory then is collected as the actor's is; a critic outside the collector's policy gets no primer, and its memory
    would silently be lost. Reads and writes the entries of both, ``[*B]`` or, in recurrent mode, ``[*B, T]``.

    TorchRL's `PPOTrainer` hands its collector the actor's weights alone, which are not this module's, and shuffles single steps,
    on which no memory is trained: `train`, or a loop of one's own, takes its place.

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
        if not hasattr(actor, "get_dist"):
            raise TypeError(
                f"ActorCritic(actor, critic): {type(actor).__name__} has no action distribution. The actor comes first, and "
                "it is a ProbabilisticActor such as GRUGaussianActor."
            )
        shared = [key for key in hidden_keys(actor) if key in hidden_keys(critic)]
        if shared:
            raise ValueError(
                f"actor and critic both keep their memory under {shared}: each would go on from the other's. Give one another "
                "hidden_key=, or build the critic on the actor's memory (MemoryValueHead)."
            )
        super().__init__(actor, critic)

    @property
    def actor(self) -> TensorDictModuleBase:
        """The policy proper."""
        return self.module[0]

    @property
    def critic(self) -> TensorDictModuleBase:
        """The value function."""
        return self.module[1]

    @property
    def hidden_keys(self) -> list[NestedKey]:
        """Entries of the hidden states, ``[*B, num_layers, hidden_size]`` each."""
        return hidden_keys(self)


def hidden_keys(module: TensorDictModuleBase) -> list[NestedKey]:
    """Entries that ``module`` reads and hands on to the next step: ``k`` among its inputs and ``("next", k)`` written."""
    written = {unravel_key(key) for key in module.out_keys}
    return [key for key in module.in_keys if unravel_key(("next", key)) in written]
