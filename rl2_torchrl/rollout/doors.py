"""Doors: the one interface through which a rollout resets and steps an env, on plain tensors of N flat rows."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.utils import expand_as_right
from torchrl.envs import EnvBase

from rl2_torchrl.envs.tensor_env import TensorEnv
from rl2_torchrl.modules.acting import State
from rl2_torchrl.rollout.clock import Rows

__all__ = ["Door", "Played", "TensorDoor", "TorchRLDoor", "door_to", "is_tensor_env"]


class Played(NamedTuple):
    """What a step gave: entries ``[N, ...]``, the reward ``[N, 1]``, and which episodes ended, bool ``[N]`` (None: it is known)."""

    observations: State
    reward: torch.Tensor
    done: torch.Tensor | None


class Door(Protocol):
    """How a rollout plays an env whose rows all hold a task."""

    #: Length of every episode where it is known ahead, else None.
    episode_steps: int | None
    #: Whether a step works on threads of its own.
    has_threads: bool

    def start(self, task: torch.Tensor | TensorDictBase | None, rows: Rows) -> State:
        """Starts an episode of ``task`` in ``rows``; the observations of all rows then."""

    def play(self, action: torch.Tensor, task: torch.Tensor | TensorDictBase | None) -> Played:
        """One step of all rows."""

    def adopt(self, reset: TensorDictBase) -> State:
        """The observations of a ``reset()`` that somebody has made."""

    def state_dict(self) -> dict:
        """What is needed beside the env's own state to go on."""

    def resume(self, state: dict) -> State:
        """Goes on in an env whose own state has been restored; its observations then."""


def door_to(env: EnvBase, observed: set[NestedKey], task_key: NestedKey) -> Door:
    """The door to ``env``; of its observations those in ``observed`` are asked for."""
    return TensorDoor(env, observed) if is_tensor_env(env) else TorchRLDoor(env, observed, task_key)


def is_tensor_env(env: EnvBase) -> bool:
    """Whether ``env`` is a `TensorEnv` that steps as such: a class below it may have TorchRL's methods of its own."""
    derived = ("_reset", "_step", "start", "play")
    return isinstance(env, TensorEnv) and all(getattr(type(env), m) is getattr(TensorEnv, m) for m in derived)


class TensorDoor:
    """A `TensorEnv`: no TensorDict anywhere."""

    def __init__(self, env: TensorEnv, observed: set[NestedKey]):
        self.env, self.has_threads = env, env.has_threads
        self.episode_steps = env.max_episode_steps if env.fixed_length else None
        self._asks_for_more = not observed.isdisjoint(env.more_keys)
        self._is_flat = len(env.batch_size) == 1

    def start(self, task, rows: Rows) -> State:
        task = self.env.zero_task() if task is None else task
        return self._entries(self.env.start(task, None if rows is True else rows))

    def play(self, action: torch.Tensor, task) -> Played:
        if not self._is_flat:
            action = action.reshape((*self.env.batch_size, *action.shape[1:]))
        observations, reward, terminated, truncated = self.env.play(action)
        if not self._is_flat:
            reward = reward.reshape(-1, 1)
        return Played(self._entries(observations), reward, self._done(reward, terminated, truncated))

    def _done(self, reward, terminated: torch.Tensor | None, truncated: torch.Tensor | None) -> torch.Tensor | None:
        if self.episode_steps is not None:
            return None
        if terminated is None or truncated is None:
            done = truncated if terminated is None else terminated
            return torch.zeros_like(reward, dtype=torch.bool).flatten() if done is None else done.reshape(-1)
        return (terminated | truncated).reshape(-1)

    def adopt(self, reset: TensorDictBase) -> State:
        """The observations of a ``reset()`` that somebody has made."""
        return self._entries(self.env.observation)

    def state_dict(self) -> dict:
        """What is needed beside the env's own state to go on: nothing."""
        return {}

    def resume(self, state: dict) -> State:
        """Goes on in an env whose own state has been restored; its observations then."""
        return self._entries(self.env.observation)

    def _entries(self, observations: State) -> State:
        if self._asks_for_more:
            observations = {**observations, **self.env.observe_more(self.env.state)}
        if self._is_flat:
            return observations
        dims = len(self.env.batch_size)
        return {key: value.reshape(-1, *value.shape[dims:]) for key, value in observations.items()}


class TorchRLDoor:
    """Any other TorchRL env: a TensorDict goes in and one comes out, and that is all that is made of them."""

    episode_steps, has_threads = None, False

    def __init__(self, env: EnvBase, observed: set[NestedKey], task_key: NestedKey):
        self.env, self.observed, self.task_key = env, observed, task_key
        self._action_key, self._reward_key = env.action_key, env.reward_key
        self._done_spec = env.full_done_spec
        self._state_keys = list(env.full_state_spec.keys(True, True))
        self._keys = list(env.full_observation_spec.keys(True, True))
        self._root: TensorDictBase | None = None
        self._carried: list[NestedKey] | None = None

    def start(self, task, rows: Rows) -> State:
        env = self.env
        given = TensorDict({}, batch_size=env.batch_size, device=env.device)
        if self._root is not None:
            given.update(self._root.select(*self._state_keys, *env.done_keys, strict=False))
        if task is not None:
            given.set(self.task_key, task)
        if rows is not True:
            given.set("_reset", rows.reshape(*env.batch_size, 1))
        first = env._reset(given)
        if self._root is None or rows is True:
            root = first if self._root is None else self._root.clone(False).update(first)
        else:
            root = self._merged(first, rows.reshape(env.batch_size))
        env._complete_done(self._done_spec, root)
        self._root = root
        if task is not None:
            root.set(self.task_key, task)
        return self._observations(root)

    def _merged(self, first: TensorDictBase, rows: torch.Tensor) -> TensorDictBase:
        root = self._root.clone(False)
        for key in first.keys(True, True):
            if key in self.env.reset_keys:
                continue
            old, new = root.get(key, None), first.get(key)
            root.set(key, new if old is None else torch.where(expand_as_right(rows, new), new, old))
        return root

    def play(self, action: torch.Tensor, task) -> Played:
        env, root = self.env, self._root
        root.set(self._action_key, action.reshape((*env.batch_size, *action.shape[1:])))
        after = env._step(root).copy()
        if self._carried is None:
            # What a step leaves as it is, such as the task; and whether the env says all its flags itself: looked at once.
            gone = {self._action_key, *after.keys(True, True)}
            self._carried = [key for key in root.keys(True, True) if key not in gone]
            self._says_all = set(env.done_keys) <= gone
        if not self._says_all:
            env._complete_done(self._done_spec, after)
        reward, done = after.pop(self._reward_key), after.get("done")
        for key in self._carried:
            after.set(key, root.get(key))
        self._root = after
        return Played(self._observations(after), reward.reshape(-1, 1), done.reshape(-1))

    def _observations(self, root: TensorDictBase) -> State:
        dims = len(self.env.batch_size)
        # Copies: many envs write their next step into the same memory.
        values = {key: root.get(key).clone() for key in self._keys if key in self.observed}
        return {key: value.reshape(-1, *value.shape[dims:]) for key, value in values.items()}

    def adopt(self, reset: TensorDictBase) -> State:
        """The observations of a ``reset()`` that somebody has made."""
        keys = {*self._keys, *self._state_keys, *self.env.done_keys}
        self._root = reset.select(*keys, strict=False)
        return self._observations(self._root)

    def state_dict(self) -> dict:
        """What is needed beside the env's own state to go on: the entries that it is stepped with."""
        return self._root.to_dict()

    def resume(self, state: dict) -> State:
        """Goes on in an env whose own state has been restored; its observations then."""
        self._root = TensorDict(state, self.env.batch_size, self.env.device)
        return self._observations(self._root)
