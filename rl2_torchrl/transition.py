"""`PreviousStep`: the transition input of RL², (observation, previous action, previous reward, previous done)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl import torchrl_logger
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    NonTensor,
    OneHot,
    TensorSpec,
    Unbounded,
)
from torchrl.envs import EnvBase, Transform
from torchrl.envs.batched_envs import BatchedEnvBase

from rl2_torchrl.arguments import as_list
from rl2_torchrl.tasks import TaskSampler
from rl2_torchrl.trial import EPISODE_DONE, INFO, TRIAL_KEYS, base_of, is_within, made_of, transforms_of

__all__ = ["PreviousStep"]

#: Bytes of bounds up to this are no shades of grey, and are read as they are.
LARGEST_SYMBOL = 31

NO_REWARD = (
    "the env's step returned no 'reward', which the agent is shown and learns from: _step returns one a row, [*B, 1]."
)


class PreviousStep(Transform):
    """Writes ``trans_t = concat(obs_t, action_{t-1}, reward_{t-1}, done_{t-1})``, what an RL² agent sees.

    Discrete observations and actions are one-hot. ``done`` is the *episode's*. At a trial's first step action, reward
    and done are 0. On the step that ends an episode the agent sees the new episode's first observation together with
    the finished step's action, reward and done = 1, so that an episode's last reward is never lost (Duan et al. 2016,
    section 2.2).

    ``trans`` has shape ``[*B, obs_dim + action_dim + 2]``, reals of PyTorch's default dtype; several observations are flattened and
    concatenated in the order of ``obs_keys``, and bytes (uint8) scaled to [0, 1], but for flags and symbols, whose bound is at
    most `LARGEST_SYMBOL`. The last entry is done, the last but one the reward.

    Transforms of observations and rewards stand before it, so that the agent sees what they make, and is shown the rewards that
    it learns from; `rl2_torchrl.testing.check_trial_env` refuses rewards that change behind it. `CatFrames` and
    `DoubleToFloat` may stand on either side.

    Args:
        obs_keys: observations to include. Defaults to all numbers and vectors among the env's, and what transforms make of these,
            less the task, ``"info"`` and the trial's counters: images (two dimensions and more) are for an encoder that reads them
            whole, text is for nobody here. What info readers and other transforms (`StepCounter`, `RewardSum`) add is left out,
            and a line of the log says so. `rl2_torchrl.describe` lists all. An empty list leaves none, as in bandits.
        out_key: entry to write, over one that the env may show. Defaults to ``"trans"``.
        task_key: the task's entry, which must not be among the inputs, nor those of `TaskSampler`. Defaults to ``"task"``.
        done_at_start: the value of done at a trial's first step; the paper's authors set 1. Defaults to 0.

    Raises:
        TypeError: ``obs_keys`` is a single key.
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
        self.obs_keys = None if obs_keys is None else as_list("obs_keys", obs_keys)
        self.task_key = task_key
        _refuse_task(self.obs_keys or (), [task_key])
        self.done_at_start = float(done_at_start)
        self._read_layout: Layout | None = None
        self._said: str | None = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}(obs_keys={self.obs_keys}, out_key={self.out_keys[0]!r})"

    @property
    def out_key(self) -> NestedKey:
        """The entry that is written."""
        return self.out_keys[0]

    # ------------------------------------------------------------ step, reset
    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        layout = self.layout()
        observations = [next_tensordict.get(key) for key in layout.observations]
        reward, done = next_tensordict.get("reward", None), next_tensordict.get(EPISODE_DONE)
        if reward is None:
            raise KeyError(NO_REWARD)
        trans = self.combine(observations, tensordict.get(layout.action_key), reward, done)
        return next_tensordict.set(self.out_key, trans)

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        observations = [tensordict_reset.get(key) for key in self.layout().observations]
        return tensordict_reset.set(self.out_key, self.begin(observations))

    def combine(
        self, observations: Sequence[torch.Tensor], action: torch.Tensor, reward: torch.Tensor, done: torch.Tensor
    ) -> torch.Tensor:
        """The transition input ``[*B, size]`` after a step with ``action``, ``reward`` and the episode's ``done`` ``[*B, 1]``."""
        layout, batch_size = self.layout(), reward.shape[:-1]
        parts = layout.encode(observations, batch_size)
        parts.append(layout.action.encode(action, batch_size))
        parts += [reward.to(parts[-1]), done.to(parts[-1])]
        return torch.cat(parts, -1)

    def begin(self, observations: Sequence[torch.Tensor]) -> torch.Tensor:
        """The transition input ``[*B, size]`` at a trial's first step."""
        layout, env = self.layout(), self.container.base_env
        zeros = torch.zeros((*env.batch_size, layout.action.size + 1), device=env.device)
        done = torch.full_like(zeros[..., :1], self.done_at_start)
        return torch.cat([*layout.encode(observations, env.batch_size), zeros, done], -1)

    @property
    def action_size(self) -> int:
        """Size of the action's part: its dimensions, or the number of choices."""
        return self.layout().action.size

    def reals(self) -> torch.Tensor:
        """Which entries of the transition input can be of any size, bool ``[size]``: observed numbers and the reward.

        The action's, too, where its bounds are of another order than 1.
        """
        layout, base = self.layout(), self.container.base_env
        observed = [(part.size, part.is_real) for part in layout.observations.values()]
        is_far = _is_far_from_1(base.full_action_spec[base.action_key])
        parts = [*observed, (layout.action.size, is_far), (1, True), (1, False)]
        return torch.cat([torch.full((size,), is_real) for size, is_real in parts])

    # ------------------------------------------------------------------ specs
    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        env = self.container.base_env
        self._read_layout = self._make_layout(observation_spec)
        shape = (*env.batch_size, self._read_layout.size)
        observation_spec[self.out_key] = Unbounded(shape, dtype=torch.get_default_dtype(), device=env.device)
        return observation_spec

    def layout(self) -> Layout:
        """How the parts lie in the transition input."""
        # Read once: building specs costs more than a step. The env builds them from front to back, so that
        # `transform_observation_spec` sees no entry of a later transform; the finished spec holds those too.
        if self._read_layout is None:
            _ = self.container.output_spec
        return self._read_layout

    def _make_layout(self, observation_spec: Composite) -> Layout:
        if EPISODE_DONE not in observation_spec.keys():
            raise ValueError(
                "PreviousStep found no Trial before it: without Trial an episode's end is lost and memory is reset with "
                "every episode. Use Compose(Trial(...), TaskSampler(...), PreviousStep())."
            )
        # The base env's action, since `_step` sees it after all inverse transforms.
        env = self.container.base_env
        keys = self._default_keys(observation_spec) if self.obs_keys is None else self.obs_keys
        _refuse_task(keys, self._task_keys())
        missing = [key for key in keys if key not in observation_spec.keys(True, True)]
        if missing:
            raise KeyError(f"the env has no observation {missing}; it has {list(observation_spec.keys(True, True))}.")
        require_tensors(observation_spec, keys)
        batch_dims = len(env.batch_size)
        observations = {key: Encoding.of(observation_spec[key], batch_dims) for key in keys}
        return Layout(observations, Encoding.of(env.full_action_spec[env.action_key], batch_dims), env.action_key)

    def _default_keys(self, observation_spec: Composite) -> list[NestedKey]:
        hidden = {*TRIAL_KEYS, self.out_key, "is_init"}
        keys = [key for key in observation_spec.keys(True, True) if key not in hidden]
        keys = [key for key in keys if not _is_task(key, self._task_keys()) and not is_info(key)]
        batch_dims = len(self.container.base_env.batch_size)
        keys = [key for key in keys if not isinstance(observation_spec[key], NonTensor)]
        keys = [key for key in keys if len(observation_spec[key].shape) - batch_dims < 2]
        shown = _observations(self.container, self)
        self._say([key for key in keys if key in shown], [key for key in keys if key not in shown])
        return [key for key in keys if key in shown]

    def _task_keys(self) -> list[NestedKey]:
        samplers = [each for each in transforms_of(self.container) if isinstance(each, TaskSampler)]
        return [self.task_key, *(sampler.task_key for sampler in samplers)]

    def _say(self, shown: list[NestedKey], left_out: list[NestedKey]) -> None:
        """Logs what is left out, or may be there by mistake; once."""
        if left_out:
            said = (
                f"leaves out {left_out}, which are no observations of the env nor made of them. To show them name all"
            )
        elif len(shown) > 1 and isinstance(self.container.base_env, BatchedEnvBase):
            said = f"shows the agent {shown}, of which it cannot see here what info readers have added. For fewer name them"
        else:
            return
        said = f"PreviousStep {said}: PreviousStep({[*shown, *left_out]})."
        if said != self._said:
            self._said = said
            (torchrl_logger.warning if left_out else torchrl_logger.info)(said)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        raise RuntimeError(
            "PreviousStep is a transform of environments; it has no meaning in a replay buffer, nor outside an env: to feed a "
            "trained agent by hand take an AdaptiveAgent."
        )


@dataclass(frozen=True)
class Encoding:
    """How one entry becomes a vector of reals: one-hot where it is made of choices, flattened otherwise."""

    size: int
    #: Where the one-hot vector of each choice begins, or None.
    offsets: torch.Tensor | None
    #: Whether it can be of any size: neither choices nor flags.
    is_real: bool
    #: Whether it is declared as bytes: what is of that kind (a transform may have changed it) is scaled to [0, 1].
    is_bytes: bool = False

    @classmethod
    def of(cls, spec: TensorSpec, batch_dims: int) -> Encoding:
        size = spec.shape[batch_dims:].numel()
        # OneHot is a class beside Categorical. Binary is one below it, and a vector already.
        if not isinstance(spec, Categorical) or isinstance(spec, Binary) or spec.dtype == torch.bool:
            is_real = not isinstance(spec, Binary | OneHot) and spec.dtype != torch.bool
            is_bytes = is_real and spec.dtype == torch.uint8
            return cls(size, None, is_real, is_bytes and bool(spec.space.high.max() > LARGEST_SYMBOL))
        choices = (
            spec.nvec.reshape(-1)[-size:].cpu()
            if isinstance(spec, MultiCategorical)
            else torch.tensor([spec.space.n] * size)
        )
        return cls(int(choices.sum()), (choices.cumsum(0) - choices).to(spec.device), False)

    def encode(self, value: torch.Tensor, batch_size: torch.Size, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The vector ``[*B, size]`` of ``value``; by default in PyTorch's default dtype."""
        out = torch.zeros(*batch_size, self.size, dtype=dtype, device=value.device)
        self.write(out, value)
        return out

    def write(self, out: torch.Tensor, value: torch.Tensor) -> None:
        """Writes the encoded ``value`` into ``out`` ``[*B, size]``, which holds zeros."""
        if self.offsets is None:
            out.copy_(value if value.shape == out.shape else value.reshape(out.shape))
            if self.is_bytes and value.dtype == torch.uint8:
                out.div_(255)
        else:
            choices = value.long().reshape(*out.shape[:-1], len(self.offsets))
            try:
                out.scatter_(-1, choices if len(self.offsets) == 1 else choices + self.offsets, 1.0)
            except RuntimeError as error:
                error.add_note(
                    f"{choices.unique().tolist()} were played or shown, and the spec has {self.size} choices in all."
                )
                raise


@dataclass(frozen=True)
class Layout:
    """The parts of the transition input: observations by key, then action, reward and done."""

    observations: dict[NestedKey, Encoding]
    action: Encoding
    action_key: NestedKey

    @property
    def size(self) -> int:
        return sum(part.size for part in self.observations.values()) + self.action.size + 2

    def split(self, trans: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views of the parts of ``trans``: each observation, action, reward, done."""
        return trans.split([*(part.size for part in self.observations.values()), self.action.size, 1, 1], -1)

    def encode(
        self, observations: Sequence[torch.Tensor], batch_size: torch.Size, dtype: torch.dtype | None = None
    ) -> list[torch.Tensor]:
        parts = zip(self.observations.values(), observations, strict=True)
        return [encoding.encode(value, batch_size, dtype) for encoding, value in parts]


def _is_far_from_1(spec: TensorSpec) -> bool:
    """Whether bounds of reals are far beyond 1, or far below."""
    if not isinstance(spec, Bounded) or not spec.dtype.is_floating_point:
        return False
    reach = torch.maximum(spec.space.low.abs(), spec.space.high.abs())
    return bool((reach.isfinite() & ((reach > 10) | (reach < 0.1))).any())


def _observations(env: EnvBase, before: Transform) -> set[NestedKey]:
    """What the base env observes, without what info readers add, and what transforms ``before`` one make of that."""
    base, transforms = base_of(env), transforms_of(env)
    readers = () if isinstance(base, BatchedEnvBase) else getattr(base, "info_dict_reader", ())
    specs = [getattr(reader, "info_spec", None) for reader in readers]
    told = {key for spec in specs if spec is not None for key in spec.keys(True, True)}
    shown = set(base.observation_spec.keys(True, True)) - told
    return made_of(shown, transforms[: transforms.index(before)])


def _is_task(key: NestedKey, task_keys: Sequence[NestedKey]) -> bool:
    return any(is_within(key, task_key) for task_key in task_keys)


def _refuse_task(keys: Sequence[NestedKey], task_keys: Sequence[NestedKey]) -> None:
    if seen := [key for key in keys if _is_task(key, task_keys)]:
        raise ValueError(
            f"obs_keys holds the task ({seen[0]!r}): an agent that sees its task has nothing to find out. Give it to the critic, "
            "if to anyone (GRUValueHead(extra_keys=[...]))."
        )


def require_tensors(spec: Composite, keys: Sequence[NestedKey]) -> None:
    """TypeError where one of the entries ``keys`` is text, or other metadata, which no network reads."""
    if texts := [key for key in keys if isinstance(spec[key], NonTensor)]:
        raise TypeError(
            f"{texts} are no numbers, but text, say: make numbers of them in the env, or leave them out by naming what the agent "
            "sees, PreviousStep([...])."
        )


def previous_steps(env: EnvBase) -> list[PreviousStep]:
    """Those around ``env``, from the inside out."""
    return [each for each in transforms_of(env) if isinstance(each, PreviousStep)]


def has_trials_within(env: EnvBase) -> bool:
    """Whether the env below all transforms has trials of its own, as a ``SerialEnv`` of trial envs has in its rows."""
    return any(key in TRIAL_KEYS for key in base_of(env).observation_spec.keys())


def is_info(key: NestedKey) -> bool:
    """Whether the entry ``key`` is what an env says beside its observation, which no policy reads."""
    return is_within(key, INFO)
