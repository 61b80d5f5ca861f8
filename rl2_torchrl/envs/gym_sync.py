"""`SyncRows`: Gymnasium's `SyncVectorEnv`, whose step spends less between its rows' own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.vector.utils import concatenate, iterate
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit

from rl2_torchrl.envs.gym_row import GymRow

__all__ = ["SyncRows"]


class SyncRows(SyncVectorEnv):
    """The rows that ``makers`` make, stepped one after the other; who steps them resets those whose episodes have ended.

    Gymnasium's own step does the same in more of a light env's time, which it takes to choose among its ways to reset, to put the
    observations together, and in wrappers that have nothing to do after a row's first steps.

    Args:
        makers: functions that make a `GymRow` each.
        asks: whether anything of what the rows say beside is recorded. If not, they are looked at once each, and then passed by.
    """

    def __init__(self, makers: Sequence[Callable[[], GymRow]], *, asks: bool):
        super().__init__(makers, copy=False, autoreset_mode=AutoresetMode.DISABLED)
        self._asks, self._has_looked = asks, False
        self._ways = list(self.envs)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, dtype=bool))
        begun = super().reset(seed=seed, options=options)
        for n in np.flatnonzero(mask):
            self._ways[n] = _way(self.envs[n], asks=self._asks)
        return begun

    def step(self, actions: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        assert not self._autoreset_envs.any(), f"{self._autoreset_envs=}"  # as Gymnasium's own says
        shown, rewards, terminations, truncations = self._env_obs, self._rewards, self._terminations, self._truncations
        infos: dict[str, Any] = {}
        for n, (row, action) in enumerate(zip(self._ways, iterate(self.action_space, actions), strict=True)):
            shown[n], rewards[n], terminations[n], truncations[n], info = row.step(action)
            if info and self._asks:
                infos = self._with(infos, info, n)
        if not self._has_looked:
            self._has_looked, self._ways = True, [_way(row, asks=self._asks) for row in self.envs]
        self._autoreset_envs = terminations | truncations
        return self._together(shown), rewards.copy(), terminations.copy(), truncations.copy(), infos

    def _with(self, infos: dict[str, Any], info: dict[str, Any], row: int) -> dict[str, Any]:
        """`_add_info`, which takes longer than many an env's step, of what are mostly floats."""
        if any(type(value) is not float for value in info.values()):
            return self._add_info(infos, info, row)
        for key, value in info.items():
            if key not in infos:
                infos[key], infos[f"_{key}"] = np.zeros(self.num_envs), np.zeros(self.num_envs, dtype=bool)
            infos[key][row], infos[f"_{key}"][row] = value, True
        return infos

    def _together(self, shown: Sequence[Any]) -> Any:
        one, of_all = self.single_observation_space, self.observation_space
        if isinstance(one, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
            rows = np.array(shown)
            if rows.shape == of_all.shape and np.can_cast(rows.dtype, of_all.dtype, "same_kind"):
                return rows.astype(of_all.dtype, copy=False)
        self._observations = concatenate(one, shown, self._observations)
        return self._observations


class _Limited:
    """The step of a `TimeLimit`, whose count it keeps, around the way to what that limits."""

    def __init__(self, limit: TimeLimit, way: Any):
        self._limit, self._way = limit, way

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self._way.step(action)
        limit = self._limit
        limit._elapsed_steps += 1
        return observation, reward, terminated, truncated or limit._elapsed_steps >= limit._max_episode_steps, info


class _Recorded:
    """The step of a `GymRow` of which something is recorded, around the way to its env."""

    def __init__(self, row: GymRow, way: Any):
        self._row, self._way = row, way

    def step(self, action: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self._way.step(action)
        return observation, reward, terminated, truncated, info and self._row.recorded(info)


def _way(env: gymnasium.Env, *, asks: bool) -> gymnasium.Env | _Limited | _Recorded:
    """What steps as ``env`` does, past what only hands a step on; nothing of a user's, around a row or within it, is passed by."""
    own, kind = vars(env), type(env)
    if kind is GymRow:  # which has put another step in the place of its own once it has looked
        passes = "step" in own
        if passes and asks:
            return _Recorded(env, _way(env.env, asks=asks))
    elif "step" in own:
        passes = False
    elif kind is TimeLimit and {"_elapsed_steps", "_max_episode_steps"} <= own.keys():
        return _Limited(env, _way(env.env, asks=asks))
    else:
        is_checked = own.get("checked_step") and own.get("checked_data_reuse", True)  # as newer Gymnasiums check too
        passes = kind is OrderEnforcing or (kind is PassiveEnvChecker and is_checked)
    return _way(env.env, asks=asks) if passes else env
