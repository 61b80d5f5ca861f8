"""`TrialCollector`: TorchRL's `Collector`, whose batches are played by the rollout of this package."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from sys import getrefcount
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, WrapModule
from torchrl import torchrl_logger
from torchrl.collectors import BaseCollector, Collector
from torchrl.envs import EnvBase, TransformedEnv

from rl2_torchrl.arguments import as_list, kind_of, whole
from rl2_torchrl.codec import NoStateError
from rl2_torchrl.envs.env_state import env_state, put_env_state
from rl2_torchrl.gradients.networks import leaves_of
from rl2_torchrl.locks import exploring
from rl2_torchrl.quiet import quiet_torchrl
from rl2_torchrl.rollout import Rollout
from rl2_torchrl.rollout.trials import leaves, next_key
from rl2_torchrl.rollout.turns import Turns
from rl2_torchrl.seeding import derived_seed
from rl2_torchrl.trial import Trial, outermost, transforms_of

__all__ = ["TrialCollector"]

#: Options of `Collector` that its own loop alone serves.
_OF_COLLECTOR = ("reset_at_each_iter", "init_random_frames", "replay_buffer", "compile_policy", "cudagraph_policy")
_OF_COLLECTOR += ("interruptor", "track_traj_ids", "split_trajs", "trajs_per_batch", "set_truncated", "compact_obs")
_ELSEWHERE = (
    "the collector's envs are in other processes, in which what transforms and tasks have counted begins anew too"
)


class TrialCollector(Collector):
    """A `torchrl.collectors.Collector` that stores only what is asked for, and steps on plain tensors.

    **A batch, and each of its entries, is written over the last one**: keep clones, or pass ``return_same_td=False``.

    It has `Collector`'s options, hooks and batches: under the same ``torch.manual_seed`` flags, tasks and transition inputs are
    those of `Collector` bit for bit (but for the noise of categorical actions, which is drawn faster), and what networks give is
    the same to rounding. But its steps are those of `Rollout`, which makes a TensorDict only where an env or a module wants one;
    options that only `Collector`'s own loop serves (``replay_buffer``, ``init_random_frames``, …) get that loop.

    Args:
        create_env_fn: as for `Collector`.
        policy: as for `Collector`.
        keep: entries of the batch, such as ``PPOUpdate.in_keys``; what is not kept takes no memory, and the hidden states of
            every step take the most. None keeps all, but for text, which only `Collector`'s own loop keeps. Of trials that are
            truncated what the policy reads beyond their ends is kept too, since advantages go on with its value there.
        rollout: ``"tensors"``, `Rollout`'s steps; ``"tensordicts"``, `Collector`'s own loop; ``"auto"``, the first where it can
            serve.
        **kwargs: as for `Collector`. Other defaults: ``auto_register_policy_transforms=True`` (memory is never lost),
            ``return_same_td=True`` (what has been added to the last batch, such as advantages, still stands in this one, to be
            made anew; but not with a ``replay_buffer``), and ``track_traj_ids=False`` but for ``split_trajs`` and
            ``trajs_per_batch``: ``"is_init"`` marks trials.

    Attributes:
        reason: why `backend` is that, where it is not the fastest; None where it is.
        player: the `Rollout` that plays, or None with `Collector`'s own loop.
        turns: its turns at the env, which nobody else may move between two batches.

    Raises:
        KeyError: an entry of ``keep`` is not collected.
        TypeError: ``keep`` is a single key, or ``policy`` a class or an env.
        ValueError: ``rollout="tensors"`` with an option that it cannot serve.
        RuntimeError: somebody else, such as an evaluation, has reset or stepped the env between two batches.

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
        >>> [batch["action"].shape for batch in collector], collector.backend
        ([torch.Size([4, 10]), torch.Size([4, 10])], 'tensors')
    """

    def __init__(
        self,
        create_env_fn: EnvBase | Callable[[], EnvBase],
        policy: TensorDictModuleBase | None = None,
        *,
        keep: Sequence[NestedKey] | None = None,
        rollout: Literal["auto", "tensors", "tensordicts"] = "auto",
        **kwargs,
    ):
        if rollout not in ("auto", "tensors", "tensordicts"):
            raise ValueError(f"rollout={rollout!r}: choose 'auto', 'tensors' or 'tensordicts'.")
        if isinstance(policy, type | EnvBase):
            raise TypeError(f"{kind_of(policy)} is no policy, which comes second: TrialCollector(env, policy, ...).")
        if "frames_per_batch" in kwargs:
            kwargs["frames_per_batch"] = whole("frames_per_batch", kwargs["frames_per_batch"])
        keep = None if keep is None else as_list("keep", keep)
        by_trial = bool(kwargs.get("split_trajs") or kwargs.get("trajs_per_batch"))
        options = {"auto_register_policy_transforms": True, "track_traj_ids": by_trial}
        # A replay buffer takes batches one by one: TorchRL forbids one in the memory of another.
        options["return_same_td"] = kwargs.get("replay_buffer") is None
        # Buffers hold all entries of all steps, those that are not kept too.
        options |= kwargs if keep is None else {"use_buffers": False, **kwargs}
        with quiet_torchrl():
            super().__init__(create_env_fn, policy, **options)
        needed = [("collector", "traj_ids"), ("next", "done")] if by_trial else []
        is_truncated = any(isinstance(t, Trial) and t.truncate for t in transforms_of(self.env))
        if (is_truncated or options.get("set_truncated")) and not options.get("compact_obs"):
            needed += [next_key(key) for key in getattr(self.policy, "in_keys", ()) if key != "is_init"]
        self.keep = None if keep is None else list(dict.fromkeys((*keep, *needed)))
        self.reason = "rollout='tensordicts' was asked for" if rollout == "tensordicts" else self._refusal(options)
        if self.reason is not None and rollout == "tensors":
            raise ValueError(f"rollout='tensors' cannot serve: {self.reason}. Leave that out, or take rollout='auto'.")
        self.player = None if self.reason else Rollout(self.env, self._wrapped_policy, self.frames_per_batch, self.keep)
        if self.player is not None:
            self.player.adopt(self._carrier)  # Collector has reset the env already, and begins there
            self.reason = self.player.reason
        self.turns = Turns(self.env)
        #: Of a batch that is written over: how many refer to it, before each rollout, until that has been told of.
        self._holders: list[int] | None = [] if self.return_same_td else None
        if self.reason is not None:
            torchrl_logger.info(f"TrialCollector, backend {self.backend!r}: {self.reason}.")

    @property
    def backend(self) -> str:
        """What plays: ``"tensors"``, `Rollout`, or ``"tensordicts"``, `Collector`'s own loop."""
        return "tensordicts" if self.player is None else "tensors"

    def _refusal(self, options: dict) -> str | None:
        """Why `Collector`'s own loop must play, or None."""
        for name in _OF_COLLECTOR:
            if options.get(name) not in (None, False, -1):
                return f"{name}= is an option of TorchRL's own loop"
        if not isinstance(self._wrapped_policy, TensorDictModuleBase):
            return "the policy is no TensorDictModule"
        if any(isinstance(module, WrapModule) for module in leaves_of(self._wrapped_policy)):
            return "a function of TensorDicts in the policy does not name what it reads and writes"
        devices = (self.policy_device, self.env_device, self.storing_device, self.env.device)
        devices = {str(device) for device in devices if device}
        if len(devices) > 1:
            return f"policy, env and storage are on several devices {sorted(devices)}"
        return None

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        """As `Collector.set_seed`; the first trials, which `Collector` has begun before, follow the seed too."""
        seed = super().set_seed(seed, static_seed)
        self.reset()
        return seed

    def reset(self, index: Any = None, **kwargs) -> None:
        """Begins new trials in all rows, or in those of ``index``; the latter only by `Collector`'s own loop.

        That has drawn the next task already where a trial has ended with the last batch, and draws another one now.
        """
        if index is not None and self.player is not None:
            raise NotImplementedError(
                "a rollout on tensors begins trials in all rows: reset() without an index, or make the collector with "
                "rollout='tensordicts'."
            )
        super().reset(index, **kwargs)
        if self.player is not None:
            self.player.adopt(self._carrier)
        self.turns.leave()

    def rollout(self) -> TensorDictBase:
        """One batch ``[*B, T]`` of the entries ``keep``."""
        with self.turns.turn():
            if self.player is None:
                with exploring(self.exploration_type):
                    batch = super().rollout()
            else:
                if self.pre_collect_hook is not None:
                    self.pre_collect_hook()
                with exploring(self.exploration_type):
                    batch = self.player()
                self._tell_who_keeps(batch)
                return batch
        if self.keep is None or batch is None:  # None: it has gone into the replay buffer, step by step
            return batch
        made = list(batch.keys(True, True))  # a lazy stack's own keys() finds no nested one
        if missing := [key for key in self.keep if not leaves([key], made)]:
            raise KeyError(f"keep holds {missing}, which is not collected; there is {sorted(map(str, made))}.")
        return batch.select(*outermost(self.keep))

    def _tell_who_keeps(self, batch: TensorDictBase) -> None:
        """Says once that somebody keeps ``batch``, the same object each time, for every one that it has been."""
        if self._holders is None:
            return
        self._holders = [*self._holders[-3:], getrefcount(batch)]
        # The first rise may be a loop's own variable, the second another one's.
        if len(self._holders) == 4 and all(before < after for before, after in pairwise(self._holders)):
            self._holders = None
            torchrl_logger.warning(
                "TrialCollector: somebody keeps its batches, each of which is written over the last one, so that all that are kept "
                "are the newest. Keep batch.clone(), or make the collector with return_same_td=False."
            )


def batches_of(collector: BaseCollector) -> Iterator[TensorDictBase]:
    """Iterates over ``collector``, where one before has left off.

    A second iterator over TorchRL's collectors in processes would find its workers in the middle of what the first has asked for.
    """
    if not hasattr(collector, "procs"):
        return iter(collector)
    kept = vars(collector).get("_batches")
    if kept is None or kept.gi_frame is None:  # an error has ended it, or all frames are collected
        kept = collector._batches = iter(collector)
    return kept


def rollout_state(collector: BaseCollector) -> dict[str, Any]:
    """Where the collector stands in its trials, the env's state among it, for a checkpoint; what `Collector.state_dict` leaves out.

    Where the env cannot give its state it holds the reason alone, under ``"missing"``, and a resumed run begins new trials: put
    back in the middle of one, an env would play another task than the data says.
    """
    base = _base_env(collector)
    if base is None:
        return {"missing": _ELSEWHERE}
    try:
        env = env_state(base)
    except NoStateError as error:
        return {"missing": str(error)}
    player = getattr(collector, "player", None)
    if player is not None:
        return {"player": player.state_dict(), "env": env}
    return {"carrier": collector._carrier.exclude("next").to_dict(), "env": env}


def load_rollout_state(collector: BaseCollector, state: dict[str, Any]) -> str | None:
    """Goes on from what `rollout_state` returned, and returns None; or returns why it cannot, in words."""
    if "missing" in state:
        return state["missing"]
    if (base := _base_env(collector)) is None:  # in the place of a collector whose env was at hand
        return _ELSEWHERE
    player = getattr(collector, "player", None)
    if ("player" in state) != (player is not None):
        return "the run's were played by the other of TrialCollector's two loops, on tensors and on TensorDicts"
    put_env_state(base, state["env"])
    if player is not None:
        player.load_state_dict(state["player"])
    else:
        collector._carrier.update(TensorDict(state["carrier"], batch_size=collector._carrier.batch_size))
    if isinstance(collector, TrialCollector):
        collector.turns.leave()
    return None


def begin_new_trials(collector: BaseCollector) -> None:
    """Begins new trials by random numbers that the env has not drawn: a new env's would be those of the run's beginning again."""
    base = _base_env(collector)
    if base is None:  # envs in other processes are their collector's business
        return
    given = vars(base).get("given_seed")  # a setting, and stays
    # Of the class: samplers around the env go on with the tasks that follow.
    type(base).set_seed(base, derived_seed(given, int(torch.randint(2**62, ()))))
    if "given_seed" in vars(base):
        base.given_seed = given
    collector.reset()


def _base_env(collector: BaseCollector) -> EnvBase | None:
    env = getattr(collector, "env", None)
    return env.base_env if isinstance(env, TransformedEnv) else env
