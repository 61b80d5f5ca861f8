"""`TrialCollector`: TorchRL's `Collector`, with a fast path for whole trials of native envs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl import torchrl_logger
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from rl2_torchrl.lockstep import LockstepRollout
from rl2_torchrl.modules.plain import NotPlainError

__all__ = ["TrialCollector"]


class TrialCollector(Collector):
    """A `torchrl.collectors.Collector` that stores only what is asked for, and is fast on this package's native envs.

    On any env and policy it is `Collector`. Where the env is a `TensorEnv` of fixed length under the transforms of trials,
    the policy is made of this package's modules or plain ones, and a batch is a whole number of trials, steps run on plain
    tensors (`LockstepRollout`): the same batches in distribution, several times faster for small networks. Otherwise
    ``lockstep`` is None, and TorchRL's logger says why (level DEBUG).

    Args:
        create_env_fn: as for `Collector`.
        policy: as for `Collector`.
        keep: entries of the batch, such as ``PPOUpdate.in_keys``; what is not kept takes no memory, and the hidden states of
            every step take the most. None keeps all, by `Collector`'s own loop.
        **kwargs: as for `Collector`; ``auto_register_policy_transforms`` and ``return_same_td`` default to True here (memory is
            never lost; each batch is written over the last one), ``track_traj_ids`` to False: ``"is_init"`` marks trials.

    Raises:
        KeyError: an entry of ``keep`` is not collected.

    Examples:
        >>> from torchrl.envs import Compose, TransformedEnv
        >>> from rl2_torchrl import ActorCritic, GRUCategoricalActor, GRUValueHead, PreviousStep, TaskSampler, Trial
        >>> from rl2_torchrl.envs import BernoulliBandit, uniform_means
        >>> env = TransformedEnv(
        ...     BernoulliBandit(num_arms=3, batch_size=(4,)),
        ...     Compose(Trial(episodes=10), TaskSampler(uniform_means(3)), PreviousStep()),
        ... )
        >>> policy = ActorCritic(GRUCategoricalActor.from_env(env), GRUValueHead.from_env(env))
        >>> collector = TrialCollector(env, policy, frames_per_batch=40, total_frames=80, keep=["trans", "action"])
        >>> [batch["action"].shape for batch in collector]
        [torch.Size([4, 10]), torch.Size([4, 10])]
    """

    def __init__(
        self,
        create_env_fn: EnvBase | Callable[[], EnvBase],
        policy: TensorDictModuleBase,
        *,
        keep: Sequence[NestedKey] | None = None,
        **kwargs,
    ):
        defaults = {"auto_register_policy_transforms": True, "return_same_td": True, "track_traj_ids": False}
        if keep is not None:
            defaults["use_buffers"] = False  # they hold all entries of all steps, those that are not kept too
        super().__init__(create_env_fn, policy, **{**defaults, **kwargs})
        self.keep = None if keep is None else list(dict.fromkeys(keep))
        self.lockstep = self._plan()

    def _plan(self) -> LockstepRollout | None:
        options = (self.track_traj_ids, self.reset_at_each_iter, self.init_random_frames, self.replay_buffer)
        options += (self.compiled_policy, self.cudagraphed_policy, self.interruptor, self.pre_collect_hook)
        devices = {self.policy_device, self.env_device, self.storing_device, self.env.device} - {None}
        exploring = self.exploration_type in (ExplorationType.RANDOM, ExplorationType.DETERMINISTIC)
        if self.keep is None or any(options) or len(devices) > 1 or not exploring:
            return None
        try:
            return LockstepRollout(self.env, self._wrapped_policy, self.frames_per_batch, self.keep)
        except NotPlainError as reason:
            # Collector's own loop takes every env, policy and entry.
            torchrl_logger.debug(f"TrialCollector steps as Collector does: {reason}.")
            return None

    def rollout(self) -> TensorDictBase:
        """One batch ``[*B, T]`` of the entries ``keep``."""
        if self.lockstep is not None:
            with set_exploration_type(self.exploration_type):
                return self.lockstep()
        batch = super().rollout()
        if self.keep is None:
            return batch
        missing = [key for key in self.keep if key not in batch.keys(True, True)]
        if missing:
            raise KeyError(
                f"keep holds {missing}, which is not collected; there is {sorted(map(str, batch.keys(True, True)))}."
            )
        return batch.select(*self.keep)
