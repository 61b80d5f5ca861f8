"""Doors: the one interface through which a rollout resets and steps an env, on plain tensors of N flat rows."""

from __future__ import annotations

from functools import reduce

import numpy as np
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.envs import EnvBase

from rl2_torchrl.envs.tensor_env import TensorEnv
from rl2_torchrl.gradients.part import State, others_than
from rl2_torchrl.rollout.clock import Rows
from rl2_torchrl.rollout.trials import Task, flat, unflat
from rl2_torchrl.transition import NO_REWARD
from rl2_torchrl.trial import put_rows

__all__ = ["TensorDoor", "TorchRLDoor", "is_tensor_env"]

#: What a step gave: entries ``[N, ...]``, the reward ``[N, 1]``, and which episodes ended, bool ``[N]`` (None: it is known), on the
#: host, where trials are counted.
Played = tuple[State, torch.Tensor, np.ndarray | None]


def is_tensor_env(env: EnvBase) -> bool:
    """Whether ``env`` is a `TensorEnv` that steps as such, with no method of its own for one that is derived."""
    return isinstance(env, TensorEnv) and not _own_methods(env)


def _own_methods(env: EnvBase) -> list[str]:
    """Of the methods that `TensorEnv` derives those that ``env``, or a class below, has in their place."""
    return others_than(TensorEnv, env, ["_reset", "_step", "start", "play"])


class TensorDoor:
    """A `TensorEnv`: no TensorDict anywhere. All doors have the methods that are described here.

    Attributes:
        episode_steps: length of every episode where it is known ahead, else None.
        has_threads: whether a step works on threads of its own.
        reason: why this is not the fastest door that there is to such an env; None where it is.
    """

    reason = None

    def __init__(self, env: TensorEnv, observed: set[NestedKey]):
        self.env, self.has_threads, self._is_fixed = env, env.has_threads, env.fixed_length
        self._asks_for_more = not observed.isdisjoint(env.more_keys)

    @property
    def episode_steps(self) -> int | None:
        return self.env.max_episode_steps if self._is_fixed else None

    def start(self, task: Task, rows: Rows) -> State:
        """Starts an episode of ``task`` in ``rows``; the observations of all rows then."""
        if task is None and (task := self.env.zero_task()) is not None:
            self.env.tell_of_no_task()
        return self._entries(self.env.start(task, None if rows is True else rows))

    def play(self, action: torch.Tensor) -> Played:
        """One step of all rows."""
        observations, reward, *flags = self.env.play(unflat(action, self.env.batch_size))
        done = None
        if not self._is_fixed:
            ends = [flag for flag in flags if flag is not None] or [torch.zeros_like(reward, dtype=torch.bool)]
            done = reduce(torch.logical_or, ends).cpu().numpy().reshape(-1)  # one wait for a device
        return self._entries(observations), flat(reward, self.env.batch_size), done

    def adopt(self, root: TensorDictBase) -> State:
        """The observations of a ``reset()`` that somebody has made, or of an env whose own state has been restored."""
        return self._entries(self.env.observation)

    def state_dict(self) -> dict:
        """What `adopt` needs beside the env's own state to go on."""
        return {}

    def _entries(self, observations: State) -> State:
        if self._asks_for_more:
            observations = {**observations, **self.env.observe_more(self.env.state)}
        return {key: flat(value, self.env.batch_size) for key, value in observations.items()}


class TorchRLDoor:
    """Any other TorchRL env: a TensorDict goes in and one comes out, and that is all that is made of them."""

    episode_steps, has_threads, reason = None, False, None

    def __init__(self, env: EnvBase, observed: set[NestedKey], task_key: NestedKey):
        self.env, self._task_key = env, task_key
        if isinstance(env, TensorEnv):
            self.reason = (
                f"the env has {', '.join(_own_methods(env))} of its own, beside begin and advance: a TensorDict goes in and comes "
                "out at each step"
            )
        self._action_key, self._reward_key, self._done_keys = env.action_key, env.reward_key, env.done_keys
        self._given = [*env.full_state_spec.keys(True, True), *self._done_keys]
        keys, self._done_spec = list(env.full_observation_spec.keys(True, True)), env.full_done_spec
        self._observed, self._adopted = [key for key in keys if key in observed], {*keys, *self._given}
        self._root: TensorDictBase = TensorDict({}, env.batch_size, env.device)  # what the env is stepped with

    def start(self, task: Task, rows: Rows) -> State:
        env, old = self.env, self._root
        given = old.select(*self._given, strict=False)
        if task is not None:
            given.set(self._task_key, task)
        if rows is not True:
            given.set("_reset", rows.reshape(*env.batch_size, 1))
        first = env._complete_done(self._done_spec, env._reset(given))  # or "done" would stay as the last step left it
        self._root = old.clone(False)
        if rows is True:
            self._root.update(first)
        else:
            put_rows(first, self._root, rows.reshape(env.batch_size), env.reset_keys.__contains__)
        if task is not None:
            self._root.set(self._task_key, task)
        return self._observations()

    def play(self, action: torch.Tensor) -> Played:
        root = self._root.set(self._action_key, unflat(action, self.env.batch_size))
        # What a step leaves as it is, such as the task, stays.
        after = root.exclude(self._action_key, *self._done_keys).update(self.env._step(root))
        if any(after.get(key, None) is None for key in self._done_keys):
            self.env._complete_done(self._done_spec, after)
        self._root, reward = after, after.pop(self._reward_key, None)
        if reward is None:
            raise KeyError(NO_REWARD)
        return self._observations(), reward.reshape(-1, 1), after.get("done").cpu().numpy().reshape(-1)

    def _observations(self) -> State:
        # Copies: many envs write their next step into the same memory.
        return {key: flat(self._root.get(key).clone(), self.env.batch_size) for key in self._observed}

    def adopt(self, root: TensorDictBase) -> State:
        self._root = root.select(*self._adopted, strict=False)
        return self._observations()

    def state_dict(self) -> dict:
        return self._root.to_dict()
