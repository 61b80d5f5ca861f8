"""`Trial`: joins the episodes of one task into one trial. Inside, "done" means *end of trial*."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import reduce
from inspect import getattr_static
from itertools import product
from operator import or_
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase, is_leaf_nontensor
from tensordict.utils import expand_as_right
from torchrl.data import Binary, Bounded, Composite, Unbounded
from torchrl.envs import (
    AutoResetTransform,
    Compose,
    EnvBase,
    FrameSkipTransform,
    SerialEnv,
    Transform,
    TransformedEnv,
    VecGymEnvTransform,
)

from rl2_torchrl.arguments import as_list, require_flags, whole
from rl2_torchrl.tasks import TaskSampler

__all__ = ["Trial"]

EPISODE_DONE = "episode_done"
EPISODE_INDEX = "episode_index"
TRIAL_STEP = "trial_step"
TIME_LEFT = "time_left"
#: Entries that `Trial` adds beside the env's own observations; never policy inputs by default.
TRIAL_KEYS = (EPISODE_DONE, EPISODE_INDEX, TRIAL_STEP, TIME_LEFT)
#: Where an env puts what it says beside observation and reward, such as whether a goal was reached: recorded, and never read by a
#: policy.
INFO = "info"


class Trial(Transform):
    """Turns any TorchRL env into a trial env: several episodes of one task, one "done" at the end.

    When an episode of the base env ends before the trial does, the base env is reset *for those rows only* and
    with the same task; ``("next", "done")`` stays False, ``("next", "episode_done")`` is True, and
    the next observation is the new episode's *first* one (Duan et al. 2016, section 2.2). The last observation of the
    finished episode is not shown to the agent; its action, reward and done are, through `PreviousStep`.
    When the trial ends, ``done`` and ``terminated`` are True, so that no value is bootstrapped across trials, and the
    next observation is the episode's last.

    Must be the first transform of its `TransformedEnv`: it resets the base env itself, so a transform before it
    would be skipped at inner resets. Wrap an already transformed env with
    ``TransformedEnv(env, Compose(Trial(...), ...), auto_unwrap=False)``. What stands behind it sees the trial as one episode:
    there `CatFrames` puts the last frames of one episode before the first of the next, which below it does not.

    Entries added, all of shape ``[*B, 1]`` and all kept in the TensorDict, so that partial resets and workers just
    work:

    - ``"episode_done"`` (bool): the base env's own done on the step that led here.
    - ``"episode_index"`` (int64): index of the current episode in the trial, from 0.
    - ``"trial_step"`` (int64): steps taken in the trial so far.
    - ``"time_left"`` (float32): share of the trial that is left, from 1 to 0, by whichever bound is nearer. A useful
      further input for a critic.

    Args:
        episodes: number of episodes in a trial, or None for no such bound.
        steps: number of steps in a trial, or None for no such bound. A trial ends at whichever bound comes first.
        truncate: mark the trial's end as ``truncated`` in place of ``terminated``, so that the value of the last
            observation is bootstrapped. Default False: a trial's end is terminal.
        step_keys: entries that tell of the step that was taken rather than of the state that it led to, such as a velocity or
            whether a goal was reached. An inner reset leaves them; all others are those of the new episode then. Those within
            ``"info"`` always are, which is no place for a state that networks read, such as which actions are legal. Default none
            more.

    Raises:
        ValueError: neither bound is given, or one is below 1; ``step_keys`` names an entry of the env's ``state_spec``; the env
            shows an entry of one of those names; a transform behind it steps the env several times in one.
        TypeError: ``step_keys`` is a single key, or the base env resets its rows by itself (`GymEnv` with ``num_envs``, any with
            ``auto_reset=True``).
        RuntimeError: when attached anywhere but first in the `TransformedEnv`.
        NotImplementedError: the base env has nested or several done entries (multi-agent envs).

    Examples:
        >>> import torch
        >>> from torchrl.envs import GymEnv, TransformedEnv
        >>> env = TransformedEnv(GymEnv("CartPole-v1"), Trial(episodes=2))
        >>> rollout = env.rollout(1000)
        >>> rollout["next", "episode_done"].sum().item(), rollout["next", "done"].sum().item()
        (2, 1)
    """

    def __init__(
        self,
        episodes: int | None = None,
        steps: int | None = None,
        *,
        truncate: bool = False,
        step_keys: Sequence[NestedKey] = (),
    ):
        super().__init__()
        if episodes is None and steps is None:
            raise ValueError("Trial needs a bound, or no trial ever ends: give episodes=, steps= or both.")
        require_flags(truncate=truncate)
        self.episodes = None if episodes is None else whole("episodes", episodes)
        self.steps = None if steps is None else whole("steps", steps)
        self.truncate = truncate
        self.step_keys = as_list("step_keys", step_keys)

    def __repr__(self) -> str:
        own = {name: getattr(self, name) for name in ("episodes", "steps", "truncate", "step_keys")}
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in own.items() if value)})"

    # ---------------------------------------------------------------- step
    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        self._require_counters(tensordict)
        episode_done = next_tensordict["done"]
        # The index says which episode an observation belongs to, so it moves on with the reset below.
        episode_index = tensordict[EPISODE_INDEX] + episode_done
        trial_step = tensordict[TRIAL_STEP] + 1
        trial_done = self.is_over(episode_index, trial_step)

        inner_reset = episode_done & ~trial_done
        if inner_reset.any():
            self._reset_rows(inner_reset, tensordict, next_tensordict)
        self._set_done(next_tensordict, trial_done)
        next_tensordict.set(EPISODE_DONE, episode_done.clone())
        return next_tensordict.update(self.counters(episode_index, trial_step))

    def is_over(self, episode_index: Any, trial_step: Any) -> Any:
        """Whether a trial has ended after so many episodes and steps; of tensors, NumPy's arrays or numbers."""
        bounds = ((episode_index, self.episodes), (trial_step, self.steps))
        return reduce(or_, (count >= bound for count, bound in bounds if bound is not None))

    def _reset_rows(self, rows: torch.Tensor, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> None:
        """Starts the next episode in ``rows`` [*B, 1] and writes its first observation; other rows stay as they are."""
        env = self._base_env
        # The task must be given again: without it the base env would draw or keep a task of its own.
        reset_input = tensordict.select(*env.state_spec.keys(True, True), strict=False)
        reset_input.update(next_tensordict.select(*env.state_spec.keys(True, True), strict=False))
        reset_input.update(next_tensordict.select(*env.done_keys))
        reset_input.set("_reset", rows)
        first = env._reset(reset_input)
        flags = {*env.done_keys, *env.reset_keys}
        rows = rows.reshape(env.batch_size)
        put_rows(first, next_tensordict, rows, lambda key: key in flags or self.tells_of_step(key))

    def tells_of_step(self, key: NestedKey) -> bool:
        """Whether the entry ``key`` tells of the step that was taken, so that an inner reset leaves it."""
        return key in self.step_keys or is_within(key, INFO)

    def overwritten(self, env: EnvBase) -> set[NestedKey]:
        """Entries of ``env``, around this trial, that are not those of an episode's last step but of the next one's beginning."""
        if self.episodes == 1:
            return set()
        transforms = transforms_of(env)
        tasks = [each.task_key for each in transforms if isinstance(each, TaskSampler)]
        keys = self._base_env.observation_spec.keys(True, True)
        keys = [key for key in keys if not self.tells_of_step(key) and not any(is_within(key, task) for task in tasks)]
        return made_of(keys, transforms[transforms.index(self) + 1 :])

    def _set_done(self, next_tensordict: TensorDictBase, trial_done: torch.Tensor) -> None:
        next_tensordict.set("done", trial_done)
        next_tensordict.set("terminated", torch.zeros_like(trial_done) if self.truncate else trial_done.clone())
        if self.truncate or "truncated" in self._base_env.full_done_spec.keys():
            next_tensordict.set("truncated", trial_done.clone() if self.truncate else torch.zeros_like(trial_done))

    # --------------------------------------------------------------- reset
    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        env = self._base_env
        if tensordict_reset.batch_size != env.batch_size:
            raise ValueError(
                f"the env has begun {tuple(tensordict_reset.batch_size)} rows, and was made with batch_size "
                f"{tuple(env.batch_size)}: Trial counts, and resets, the rows that an env is made with. Make it with its rows "
                "(batch_size and specs), or put single ones side by side in a SerialEnv."
            )
        shape = env.full_done_spec["done"].shape
        device = tensordict_reset["done"].device
        zeros = torch.zeros(shape, dtype=torch.int64, device=device)
        tensordict_reset.set(EPISODE_DONE, torch.zeros(shape, dtype=torch.bool, device=device))
        if self.truncate:
            tensordict_reset.set("truncated", torch.zeros(shape, dtype=torch.bool, device=device))
        return tensordict_reset.update(self.counters(zeros, zeros.clone()))

    def counters(self, episode_index: torch.Tensor, trial_step: torch.Tensor) -> dict[str, torch.Tensor]:
        """The counters' entries, of the shape of ``episode_index`` and ``trial_step``."""
        bounds = ((episode_index, self.episodes), (trial_step, self.steps))
        time_left = reduce(torch.minimum, (1 - count.float() / bound for count, bound in bounds if bound))
        return {EPISODE_INDEX: episode_index, TRIAL_STEP: trial_step, TIME_LEFT: time_left}

    def _require_counters(self, tensordict: TensorDictBase) -> None:
        if TRIAL_STEP not in tensordict.keys():
            raise KeyError(
                f"Trial found no {TRIAL_STEP!r} in the TensorDict that was given to step(). Its counters live there, so "
                "that partial resets and workers keep them: pass on what reset() or step_mdp() returned, whole."
            )

    # --------------------------------------------------------------- specs
    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        env = self._base_env
        _require_plain_resets(env)
        unknown = [key for key in self.step_keys if key not in observation_spec.keys(True, True)]
        if unknown:
            raise KeyError(
                f"Trial(step_keys=...): the env has no entry {unknown}, only {list(observation_spec.keys(True, True))}."
            )
        if "is_init" in observation_spec.keys():
            raise ValueError(
                "an InitTracker stands below Trial: it would flag the beginning of each episode, where an agent that adapts must "
                "not lose its memory. Leave it out; collectors put one behind Trial."
            )
        taken = [key for key in TRIAL_KEYS if key in observation_spec.keys()]
        if 0 < len(taken) < len(TRIAL_KEYS):  # all of them are those of trials below
            raise ValueError(
                f"the env itself shows {taken}, where Trial writes its counters, which no agent is shown: rename them, in "
                f"the env or by TransformedEnv(TransformedEnv(env, RenameTransform({taken}, [...])), "
                "Compose(Trial(...), ...), auto_unwrap=False)."
            )
        if read := [key for key in self.step_keys if key in env.state_spec.keys(True, True)]:
            raise ValueError(
                f"Trial(step_keys=...): the env reads {read} back at its next step: left as they are by an inner reset, the new "
                "episode would go on from the last one's."
            )
        transforms = [*own_transforms(self.container), *transforms_of(env)]
        if any(isinstance(each, FrameSkipTransform) and each.frame_skip > 1 for each in transforms):
            raise ValueError(
                "FrameSkipTransform steps the env several times in one, and does not look whether an episode has ended in between: "
                "its end would be lost. Let the env itself repeat actions until its episode ends; a Gymnasium env by a wrapper."
            )
        shape, device = env.full_done_spec["done"].shape, env.device
        if shape != (due := (*env.batch_size, 1)):
            raise ValueError(
                f"the env's done is {list(shape)}, and Trial counts in {list(due)}, as rewards are: make it so, done_spec="
                f"Binary(1, {due}, dtype=torch.bool), with terminated and truncated, and what the env returns."
            )
        observation_spec[EPISODE_DONE] = Binary(1, shape=shape, dtype=torch.bool, device=device)
        observation_spec[EPISODE_INDEX] = Unbounded(shape, dtype=torch.int64, device=device)
        observation_spec[TRIAL_STEP] = Unbounded(shape, dtype=torch.int64, device=device)
        observation_spec[TIME_LEFT] = Bounded(0, 1, shape=shape, dtype=torch.float32, device=device)
        return observation_spec

    def transform_done_spec(self, done_spec: Composite) -> Composite:
        if self.truncate and "truncated" not in done_spec.keys():
            done_spec["truncated"] = done_spec["done"].clone()
        return done_spec

    # ------------------------------------------------------------ attaching
    @property
    def _base_env(self) -> EnvBase:
        """The env below, itself and not a clone (`Transform.parent` inside a `Compose` is rebuilt from clones)."""
        env = self.container
        if env is None:
            raise RuntimeError("Trial works inside a TransformedEnv: TransformedEnv(env, Compose(Trial(...), ...)).")
        self._require_first(env)
        base = env.base_env
        if set(base.done_keys) - {"done", "terminated", "truncated"}:
            raise NotImplementedError(
                f"Trial needs one done per env, at the root; this env has {base.done_keys}. In a multi-agent env trials "
                "of different agents would end at different times: aggregate its done entries first."
            )
        return base

    def _require_first(self, env: TransformedEnv) -> None:
        first = env.transform
        while isinstance(first, Compose) and len(first):
            first = first.transforms[0]
        if first is not self:
            _require_plain_resets(env)
            raise RuntimeError(
                f"Trial must be the first transform, but {type(first).__name__} comes before it: Trial resets the base "
                "env itself at every inner episode's end, and that transform would not see it. Put Trial first, or "
                "wrap the transformed env whole: TransformedEnv(env, Compose(Trial(...), ...), auto_unwrap=False)."
            )

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        raise RuntimeError("Trial is a transform of environments; it has no meaning in a replay buffer.")


def _require_plain_resets(env: EnvBase) -> None:
    """Raises where an env below ``env`` resets its rows by itself: its episodes would be no trial's."""
    is_told = vars(base_of(env)).get("_torchrl_native_autoreset", False)  # TorchRL's flag of a simulator that does so
    if is_told or any(isinstance(each, VecGymEnvTransform | AutoResetTransform) for each in transforms_of(env)):
        raise TypeError(
            "the env resets its rows by itself, out of Trial's sight: an episode would begin with the last one's final "
            "observation, or be the last task's. A GymEnv with num_envs= make GymVectorEnv(id, num_envs, ...), which leaves resets "
            "to trials, and others without auto_reset=True."
        )


def put_rows(
    first: TensorDictBase, into: TensorDictBase, rows: torch.Tensor, is_kept: Callable[[NestedKey], bool]
) -> None:
    """Writes ``first`` into the ``rows`` (bool ``[*B]``) of ``into``, text too; entries that are ``is_kept`` stay as they are."""
    for key, new in first.items(True, True, is_leaf=is_leaf_nontensor):
        if is_kept(key):
            continue
        if (old := into.get(key, None)) is not None:
            is_tensor = isinstance(new, torch.Tensor)
            new = torch.where(expand_as_right(rows, new), new, old) if is_tensor else new.where(rows, old)
        into.set(key, new)


def is_within(key: NestedKey, root: NestedKey) -> bool:
    """Whether the entry ``key`` is ``root``, or lies within it."""
    key, root = (k if isinstance(k, tuple) else (k,) for k in (key, root))
    return key[: len(root)] == root


def outermost(keys: Iterable[NestedKey]) -> list[NestedKey]:
    """Those of ``keys`` that lie within no other: for one that does, ``select`` leaves out all that stands beside it.

    Examples:
        >>> outermost(["task", ("task", "labels"), "action"])
        ['task', 'action']
    """
    keys = list(dict.fromkeys(keys))
    return [key for key in keys if not any(is_within(key, other) for other in keys if other != key)]


def own_transforms(env: EnvBase) -> list[Transform]:
    """The transforms of ``env`` itself, those in a `Compose` within a `Compose` too, not those of an env inside it."""
    return _parts(env.transform) if isinstance(env, TransformedEnv) else []


def _parts(transform: Transform) -> list[Transform]:
    return [each for part in transform for each in _parts(part)] if isinstance(transform, Compose) else [transform]


def base_of(env: EnvBase) -> EnvBase:
    """The env below all transforms."""
    return base_of(env.base_env) if isinstance(env, TransformedEnv) else env


def method_of(env: EnvBase, name: str) -> Callable:
    """A method of the class of ``env``, whatever has been put before it; also a static or class method, as in `PendulumEnv`."""
    return getattr_static(type(env), name).__get__(env, type(env))


def rows_of(env: EnvBase) -> list[EnvBase]:
    """The rows of a ``SerialEnv`` below all transforms, once it has been started; of another env none are at hand."""
    return vars(base_of(env)).get("_envs") or [] if isinstance(base_of(env), SerialEnv) else []


def transforms_of(env: EnvBase | None) -> list[Transform]:
    """The transforms around ``env``, from the inside out."""
    return [*transforms_of(env.base_env), *own_transforms(env)] if isinstance(env, TransformedEnv) else []


def made_of(keys: Iterable[NestedKey], transforms: Sequence[Transform]) -> set[NestedKey]:
    """The entries ``keys``, and what ``transforms`` make of them."""
    made = set(keys)
    for transform in transforms:
        read, written = transform.in_keys or (), transform.out_keys or ()
        # As many of one as of the other are pairs to TorchRL's transforms.
        pairs = zip(read, written, strict=True) if len(read) == len(written) else product(read, written)
        made |= {out for key, out in pairs if key in made}
    return made
