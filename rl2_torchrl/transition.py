"""`PreviousStep`: the transition input of RL², (observation, previous action, previous reward, previous done)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.data import Binary, Categorical, Composite, OneHot, TensorSpec, Unbounded
from torchrl.envs import Transform

from rl2_torchrl.trial import EPISODE_DONE, TRIAL_KEYS

__all__ = ["PreviousStep"]


class PreviousStep(Transform):
    """Writes ``trans_t = concat(obs_t, action_{t-1}, reward_{t-1}, done_{t-1})``, what an RL² agent sees (SPEC 2).

    Discrete observations and actions are one-hot. ``done`` is the *episode's*. At a trial's first step action, reward
    and done are 0. On the step that ends an episode the agent sees the new episode's first observation together with
    the finished step's action, reward and done = 1, so that an episode's last reward is never lost (Duan et al. 2016,
    section 2.2).

    ``trans`` has shape ``[*B, obs_dim + action_dim + 2]``, float32; several observations are flattened and
    concatenated in the order of ``obs_keys``. The last entry is done, the last but one the reward.

    Args:
        obs_keys: observations to include. Defaults to all of the env's, less the task and the trial's counters.
            An empty list leaves none, as in bandits.
        out_key: entry to write. Defaults to ``"trans"``.
        task_key: the task's entry, which must not be among the inputs. Defaults to ``"task"``.
        done_at_start: the value of done at a trial's first step; the paper's authors set 1. Defaults to 0.

    Raises:
        ValueError: ``obs_keys`` holds the task, or no `Trial` comes before this transform.
        KeyError: the env has no such observation.

    Examples:
        >>> from torchrl.envs import Compose, GymEnv, TransformedEnv
        >>> from rl2_torchrl.trial import Trial
        >>> env = TransformedEnv(GymEnv("CartPole-v1"), Compose(Trial(episodes=2), PreviousStep()))
        >>> env.reset()["trans"].shape  # 4 observations, 2 actions, reward, done
        torch.Size([8])
    """

    def __init__(
        self,
        obs_keys: Sequence[NestedKey] | None = None,
        *,
        out_key: NestedKey = "trans",
        task_key: NestedKey = "task",
        done_at_start: float = 0.0,
    ):
        super().__init__(out_keys=[out_key])
        if obs_keys is not None and task_key in obs_keys:
            raise ValueError(
                f"obs_keys holds the task ({task_key!r}): an agent that sees its task has nothing to find out. Give it to "
                "the critic, if to anyone (GRUValueHead(extra_keys=[...]))."
            )
        self.obs_keys = None if obs_keys is None else list(obs_keys)
        self.task_key = task_key
        self.done_at_start = float(done_at_start)
        self._layout: tuple[dict[NestedKey, TensorSpec], TensorSpec, NestedKey] | None = None

    @property
    def out_key(self) -> NestedKey:
        """The entry that is written."""
        return self.out_keys[0]

    # ------------------------------------------------------------ step, reset
    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        obs_specs, action_spec, action_key = self._specs()
        parts = [self._encode(next_tensordict.get(key), spec) for key, spec in obs_specs.items()]
        parts.append(self._encode(tensordict.get(action_key), action_spec))
        parts.append(next_tensordict.get("reward").to(torch.float32))
        parts.append(next_tensordict.get(EPISODE_DONE).to(torch.float32))
        return next_tensordict.set(self.out_key, torch.cat(parts, -1))

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        obs_specs, action_spec, _ = self._specs()
        parts = [self._encode(tensordict_reset.get(key), spec) for key, spec in obs_specs.items()]
        done = tensordict_reset.get("done")
        parts.append(done.new_zeros(*done.shape[:-1], self._size(action_spec) + 1, dtype=torch.float32))
        parts.append(torch.full_like(done, self.done_at_start, dtype=torch.float32))
        return tensordict_reset.set(self.out_key, torch.cat(parts, -1))

    def _encode(self, value: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
        """``value`` as float32 of shape ``[*B, size]``, one-hot where it is an index."""
        if _is_index(spec):
            value = spec.to_one_hot(value)
        batch_dims = len(self._batch_size)
        return value.to(torch.float32).reshape(*value.shape[:batch_dims], -1)

    def _size(self, spec: TensorSpec) -> int:
        size = spec.shape[len(self._batch_size) :].numel()
        return size * spec.space.n if _is_index(spec) else size

    # ------------------------------------------------------------------ specs
    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        self._layout = None
        obs_specs, action_spec, _ = self._specs(observation_spec)
        size = sum(map(self._size, obs_specs.values())) + self._size(action_spec) + 2
        env = self.container.base_env
        observation_spec[self.out_key] = Unbounded((*self._batch_size, size), dtype=torch.float32, device=env.device)
        return observation_spec

    @property
    def _batch_size(self) -> torch.Size:
        return self.container.batch_size

    def _specs(self, observation_spec: Composite | None = None):
        """Specs of the observations and the action, read once: building specs costs more than a step."""
        if self._layout is None:
            # The base env's, since `_step` sees the action after all inverse transforms.
            env = self.container.base_env
            if observation_spec is None:
                observation_spec = self.container.observation_spec
            keys = self._default_keys(observation_spec) if self.obs_keys is None else self.obs_keys
            if len(env.action_keys) != 1 or len(env.reward_keys) != 1:
                raise NotImplementedError(
                    f"PreviousStep knows envs with one action and one reward; this one has {env.action_keys} and "
                    f"{env.reward_keys}."
                )
            missing = [key for key in keys if key not in observation_spec.keys(True, True)]
            if missing:
                raise KeyError(
                    f"the env has no observation {missing}; it has {list(observation_spec.keys(True, True))}."
                )
            specs = {key: observation_spec[key] for key in keys}
            self._layout = (specs, env.full_action_spec[env.action_key], env.action_key)
        return self._layout

    def _default_keys(self, observation_spec: Composite) -> list[NestedKey]:
        if EPISODE_DONE not in observation_spec.keys():
            raise ValueError(
                "PreviousStep found no Trial before it: without Trial an episode's end is lost and memory is reset with "
                "every episode. Use Compose(Trial(...), TaskSampler(...), PreviousStep())."
            )
        hidden = {*TRIAL_KEYS, self.out_key, "is_init"}
        keys = observation_spec.keys(True, True)
        return [key for key in keys if key not in hidden and not _is_within(key, self.task_key)]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        raise RuntimeError("PreviousStep is a transform of environments; it has no meaning in a replay buffer.")


def _is_index(spec: TensorSpec) -> bool:
    # OneHot and Binary are classes beside Categorical, not below it, and are vectors already.
    return isinstance(spec, Categorical) and not isinstance(spec, (OneHot, Binary)) and spec.dtype != torch.bool


def _is_within(key: NestedKey, root: NestedKey) -> bool:
    key, root = (k if isinstance(k, tuple) else (k,) for k in (key, root))
    return key[: len(root)] == root
