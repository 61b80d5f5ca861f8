"""`TransformedTrials`: trials of an env with further transforms, a TensorDict at each of its steps."""

from __future__ import annotations

from collections.abc import Collection

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.envs import EnvBase

from rl2_torchrl.modules.acting import State
from rl2_torchrl.rollout.clock import Rows
from rl2_torchrl.rollout.entries import REWARD, Turn, is_next, keys_of, leaves

__all__ = ["TransformedTrials"]


class TransformedTrials:
    """Trials of an env with further transforms, or with others in place of ours: a TensorDict at each of its steps.

    Args:
        env: the env, transforms and all.
        reason: why it is not played on tensors.
        steps: T.
        read: entries that the policy reads.
        keep: entries of the batch; None for all.
    """

    is_repeatable = has_threads = False
    keys_at_once: frozenset = frozenset()

    def __init__(
        self, env: EnvBase, reason: str, steps: int, read: Collection[NestedKey], keep: Collection[NestedKey] | None
    ):
        self.reason, self.steps = reason, steps
        self.env, self.batch_size, self.rows = env, env.batch_size, env.batch_size.numel()
        self.device, self.action_key = env.device or torch.device("cpu"), env.action_key
        self.keys = keys_of(env)
        wanted = {*read, *(self.keys if keep is None else leaves(keep, self.keys))}
        self._root_keys = [key for key in self.keys if not is_next(key) and key in wanted]
        self._after_keys = [key for key in self.keys if is_next(key) and key in {*wanted, REWARD, ("next", "done")}]
        self._never = torch.zeros(self.rows, 1, dtype=torch.bool, device=self.device)
        self._tensordict: TensorDictBase | None = None
        self._stepped: TensorDictBase | None = None

    def adopt(self, reset: TensorDictBase) -> None:
        """Takes a ``reset()`` of the env that somebody has just made as the first step of the first trials."""
        self._tensordict, self._stepped = reset.copy(), None

    def start_batch(self) -> None:
        """Nothing is known ahead."""

    def start(self) -> tuple[State, Rows]:
        """The entries of a batch's first step, and the rows in which it begins a trial."""
        if self._stepped is not None:
            return self._go_on()
        self._tensordict = self.env.reset() if self._tensordict is None else self._tensordict
        return self._root(True), True

    def step(self, t: int, state: State) -> Turn:
        """Step ``t`` of all rows, with what the policy has written into ``state``."""
        root = self._tensordict
        for key, value in state.items():
            if key not in self._root_keys:
                root.set(
                    key,
                    value if isinstance(value, TensorDictBase) else value.reshape((*self.batch_size, *value.shape[1:])),
                )
        self._stepped = self.env.step(root)
        after = {("next", "is_init"): self._never, **self._entries(self._stepped, self._after_keys)}
        # A trial that a batch's last step ends is followed by one when the next batch asks for it.
        return Turn(after, {}, False) if t + 1 == self.steps else Turn(after, *self._go_on())

    def _go_on(self) -> tuple[State, Rows]:
        done = self._stepped["next", "done"].reshape(-1)
        begun: Rows = True if done.all() else done.clone() if done.any() else False
        self._tensordict = self.env.maybe_reset(self.env.step_mdp(self._stepped))
        return self._root(begun), begun

    def _root(self, begun: Rows) -> State:
        root = self._entries(self._tensordict, self._root_keys)
        if "is_init" not in self.keys:  # no InitTracker, as a collector adds
            root["is_init"] = self._never | (begun if isinstance(begun, bool) else begun.unsqueeze(-1))
        return root

    def _entries(self, tensordict: TensorDictBase, keys: Collection[NestedKey]) -> State:
        dims, state = len(self.batch_size), {}
        for key in keys:
            value = tensordict.get(key).clone()  # many envs write their next step into the same memory
            state[key] = value if dims == 1 else value.reshape(self.rows, *value.shape[dims:])
        return state

    def flags(self, t: int) -> State:
        """None: they are among the entries."""
        return {}

    def entries(self) -> State:
        """None: all is recorded step by step."""
        return {}

    def state_dict(self) -> dict:
        """Where the trials stand between two batches; the env's own state is the env's."""
        return {"stepped": None if self._stepped is None else self._stepped.to_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from what `state_dict` returned, with an env whose own state has been restored too."""
        if state["stepped"] is not None:
            self._stepped = TensorDict(state["stepped"], self.batch_size, self.env.device)
