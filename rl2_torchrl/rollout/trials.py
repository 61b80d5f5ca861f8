"""What a rollout plays (`Trials`), and entries by their keys and rows."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TypeAlias

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.data import NonTensor
from torchrl.envs import EnvBase

from rl2_torchrl.modules.acting import State
from rl2_torchrl.rollout.clock import Rows
from rl2_torchrl.trial import is_within

__all__ = ["REWARD", "Keys", "Task", "Trials", "flat", "leaves", "next_key", "shown_by", "unflat"]

REWARD = ("next", "reward")
Keys = Collection[NestedKey]
Task: TypeAlias = torch.Tensor | TensorDictBase | None


class Trials:
    """Trials of ``env`` in N flat rows, entries ``[N, ...]``: of any env, with a TensorDict at each of its steps.

    Args:
        env: the env; its transforms say what trials are, whoever does their work.
        steps: T.
        read: entries that the policy reads.
        keep: entries of the batch; None for all tensors.
        reason: why this is not the fastest way; None where it is.
    """

    #: Whether a batch does the same operations whatever the numbers are; whether the env works on threads of its own.
    is_repeatable = has_threads = False
    #: Keys of `entries`: nobody need record them step by step.
    keys_at_once: Keys = ()
    #: Entries of the env that the policy writes anew, such as a memory that is primed and read under its own name.
    rewritten: Keys = ()

    def __init__(self, env: EnvBase, steps: int, read: Keys, keep: Keys | None, reason: str | None = None):
        self.env, self.steps, self.batch_size, self.rows = env, steps, env.batch_size, env.batch_size.numel()
        self.device, self.action_key, self.reason = env.device or torch.device("cpu"), env.action_key, reason
        root = shown_by(env)
        #: Entries that a batch can have, and those that somebody wants.
        self.keys = [*root, *map(next_key, (*root, *env.full_reward_spec.keys(True, True)))]
        self.wanted = {*read, *(self.keys if keep is None else leaves((*read, *keep), self.keys))}
        self._root_keys = [key for key in root if key in self.wanted]
        self._after_keys = [key for key in self.keys if key[0] == "next" and key in {*self.wanted, REWARD}]
        self._never = torch.zeros(self.rows, 1, dtype=torch.bool, device=self.device)
        self._root: TensorDictBase | None = None
        self._stepped: TensorDictBase | None = None

    def adopt(self, reset: TensorDictBase) -> None:
        """Takes a ``reset()`` that somebody has just made as the first step of the first trials."""
        self._root, self._stepped = reset.copy(), None

    def restart(self) -> None:
        """The next batch begins with new trials in all rows, wherever the env stands."""
        self._root = self._stepped = None

    def start_batch(self) -> None:
        """What the host does before a batch, once for each: `start` and `step` may be replayed on a device."""

    def start(self) -> tuple[State, Rows]:
        """The entries of a batch's first step, and the rows in which it begins a trial."""
        if self._stepped is not None:
            return self._go_on()
        self._root = self.env.reset() if self._root is None else self._root
        return self._shown(True)

    def step(self, t: int, state: State) -> tuple[State, State, Rows]:
        """Step ``t`` with what is in ``state``: entries under ``"next"``, and those of the next step as `start` gives them.

        A trial that a batch's last step ends is followed by one when the next batch asks for it.
        """
        for key, value in state.items():
            if key not in self._root_keys or key in self.rewritten:
                self._root.set(key, unflat(value, self.batch_size))
        self._stepped = self.env.step(self._root)
        after = {("next", "is_init"): self._never, **self._entries(self._stepped, self._after_keys)}
        return (after, {}, False) if t + 1 == self.steps else (after, *self._go_on())

    def _go_on(self) -> tuple[State, Rows]:
        done = self._stepped["next", "done"].reshape(-1)
        self._root = self.env.maybe_reset(self.env.step_mdp(self._stepped))
        return self._shown(True if done.all() else done.clone() if done.any() else False)

    def _shown(self, begun: Rows) -> tuple[State, Rows]:
        root = self._entries(self._root, self._root_keys)
        if "is_init" not in self.keys:  # no InitTracker, as a collector adds
            root["is_init"] = self._never | (begun if isinstance(begun, bool) else begun.unsqueeze(-1))
        return root, begun

    def _entries(self, tensordict: TensorDictBase, keys: Keys) -> State:
        # Copies: many envs write their next step into the same memory.
        return {key: flat(tensordict.get(key).clone(), self.batch_size) for key in keys}

    def flags(self, t: int) -> State:
        """Flags and counters of step ``t``, those under ``"next"`` among them, that `step` has not given."""
        return {}

    def entries(self) -> State:
        """What a whole batch has, ``[N, T, ...]``."""
        return {}

    def state_dict(self) -> dict:
        """Where the trials stand between two batches; the env's own state is the env's."""
        state = {"root": self._root, "stepped": self._stepped}
        return {name: None if entries is None else entries.to_dict() for name, entries in state.items()}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from what `state_dict` returned, with an env whose own state has been restored too."""
        entries = (state.get(name) for name in ("root", "stepped"))
        self._root, self._stepped = (e and TensorDict(e, self.batch_size, self.env.device) for e in entries)


def shown_by(env: EnvBase) -> list[NestedKey]:
    """All that ``env`` shows before a step, flags among it, but for what is no tensor."""
    spec = env.full_observation_spec
    tensors = [key for key in spec.keys(True, True) if not isinstance(spec[key], NonTensor)]
    return [*tensors, *env.full_done_spec.keys(True, True)]


def next_key(key: NestedKey) -> NestedKey:
    """``("next", key)``, flat."""
    return ("next", key) if isinstance(key, str) else ("next", *key)


def leaves(keys: Keys, entries: Iterable[NestedKey]) -> list[NestedKey]:
    """Those of ``entries`` that are among ``keys`` or lie within one of these.

    Examples:
        >>> leaves(["a", ("b", "c")], ["a", ("b", "c", "d"), ("b", "e")])
        ['a', ('b', 'c', 'd')]
    """
    return [entry for entry in entries if any(is_within(entry, key) for key in keys)]


def flat(value: torch.Tensor, batch_size: torch.Size) -> torch.Tensor:
    """``value`` ``[*B, ...]`` as ``[N, ...]``."""
    dims = len(batch_size)
    return value if dims == 1 else value.reshape(batch_size.numel(), *value.shape[dims:])


def unflat(value: torch.Tensor, batch_size: torch.Size) -> torch.Tensor:
    """``value`` ``[N, ...]`` as ``[*B, ...]``."""
    return value if len(batch_size) == 1 else value.reshape((*batch_size, *value.shape[1:]))
