"""`Signature`: what an agent and the outside hand each other at a step, of one row, and how it becomes what the policy reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey
from torch import Tensor
from torchrl.data import Binary, Bounded, Categorical, MultiCategorical, MultiOneHot, OneHot, TensorSpec, Unbounded
from torchrl.envs import (
    ActionScaling,
    DoubleToFloat,
    EnvBase,
    FlattenObservation,
    InitTracker,
    ObservationNorm,
    ParallelEnv,
    RenameTransform,
    RewardScaling,
    RewardSum,
    SerialEnv,
    SqueezeTransform,
    StepCounter,
    TensorDictPrimer,
    UnsqueezeTransform,
)

from rl2_torchrl.agent.architecture import as_dtype, as_key
from rl2_torchrl.envs import GymTaskEnv, GymVectorEnv
from rl2_torchrl.envs.gym_spaces import ActionSpace
from rl2_torchrl.tasks import TaskSampler
from rl2_torchrl.transition import Encoding, Layout, PreviousStep, previous_steps
from rl2_torchrl.trial import Trial, base_of, transforms_of

__all__ = ["Acted", "Affine", "Observed", "Signature", "name_of"]

#: Transforms that leave observations, rewards and actions as they are.
_NEUTRAL = (Trial, TaskSampler, InitTracker, TensorDictPrimer, StepCounter, RewardSum, DoubleToFloat)
#: Those that name or reshape: an agent takes whatever has as many numbers.
_FORMS = (FlattenObservation, RenameTransform, SqueezeTransform, UnsqueezeTransform)


@dataclass(frozen=True)
class Affine:
    """``x * scale + loc``, or ``(x - loc) / scale`` where it is ``inverse``, as TorchRL's transforms have it."""

    loc: Tensor
    scale: Tensor
    inverse: bool

    def __call__(self, x: Tensor) -> Tensor:
        loc, scale = self.loc.to(x.device), self.scale.to(x.device)
        return (x - loc) / scale if self.inverse else x * scale + loc


@dataclass(frozen=True)
class Observed:
    """An entry that the policy reads of what the env shows.

    Args:
        spec: of one row, as the policy reads it.
        path: where it lies in what the env shows, a mapping or tuple; a single entry may be handed over by itself.
        start: the number from which the env counts choices, where that is not 0.
        affine: what is done to it before the policy reads it, in order.
    """

    spec: TensorSpec
    path: tuple[str | int, ...]
    start: Tensor | None = None
    affine: tuple[Affine, ...] = ()

    @property
    def number_of_choices(self) -> Tensor | None:
        """Of how many it is one, in each of its places; None for numbers and one-hot vectors."""
        if isinstance(self.spec, Binary) or not isinstance(self.spec, Categorical | MultiCategorical):
            return None
        return self.spec.nvec if isinstance(self.spec, MultiCategorical) else torch.tensor(self.spec.space.n)

    def read(self, value: Tensor) -> Tensor:
        """``value`` ``[N, ...]`` of the env as the policy reads it."""
        value = value if self.start is None else value - self.start.to(value.device)
        for affine in self.affine:
            value = affine(value)
        return value


@dataclass(frozen=True)
class Acted:
    """The action: from what the policy draws to what the env takes.

    Args:
        key: the policy's entry.
        spec: of one row, as the base env has it.
        shape: of one row, as the env takes it.
        dtype: likewise.
        start: as in `Observed`.
        bounds: the lowest and highest action, which the env's are clipped to; the policy goes on with what it drew.
        affine: what becomes of the policy's action before the base env sees it.
    """

    key: NestedKey
    spec: TensorSpec
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: Tensor | None = None
    bounds: tuple[Tensor, Tensor] | None = None
    affine: tuple[Affine, ...] = ()

    def scaled(self, action: Tensor) -> Tensor:
        """The policy's action ``[N, ...]`` as the base env sees it, and with it the policy at its next step."""
        for affine in self.affine:
            action = affine(action)
        return action

    def to_env(self, action: Tensor) -> Tensor:
        """What `scaled` gave, ``[N, *shape]``, as the env takes it: choices by their number, reals within the bounds."""
        if isinstance(self.spec, MultiOneHot):  # a OneHot too
            places = action.split(list(self.spec.nvec), -1)
            action = torch.stack([place.to(torch.uint8).argmax(-1) for place in places], -1)
        elif isinstance(self.spec, OneHot):
            action = action.to(torch.uint8).argmax(-1)
        action = action.reshape(-1, *self.shape)
        action = action if self.start is None else action + self.start.to(action.device)
        if self.bounds is not None:
            low, high = (bound.to(action.device, action.dtype) for bound in self.bounds)
            action = action.clamp(low, high)
        return action.to(self.dtype)


@dataclass(frozen=True)
class Signature:
    """All that an agent knows of its env.

    Args:
        observations: by the policy's keys, those of the transition input first.
        encoded: how many of them are in the transition input; the policy reads the others whole.
        action: the action.
        trans_key: the policy's entry of the transition input.
        done_at_start: as in `PreviousStep`.
        reward: what is done to rewards.
        noise: of what kind a draw's noise is, ``"gumbel"`` or ``"normal"``.
        noise_size: numbers of noise of one row.
        memory: name and shape (of one row) of what is handed on from step to step.
        dtype: of noise and memory.

    Examples:
        >>> from torchrl.envs import Compose, GymEnv, TransformedEnv
        >>> from rl2_torchrl import AdaptiveAgent, GRUCategoricalActor, PreviousStep, Trial
        >>> env = TransformedEnv(GymEnv("CartPole-v1"), Compose(Trial(episodes=2), PreviousStep()))
        >>> AdaptiveAgent.from_policy(GRUCategoricalActor.from_env(env), env).signature.inputs
        ['observation', 'reward', 'done', 'start', 'noise', 'last_action', 'actor_hidden']
    """

    observations: dict[NestedKey, Observed]
    encoded: int
    action: Acted
    trans_key: NestedKey
    done_at_start: float
    reward: tuple[Affine, ...]
    noise: str
    noise_size: int
    memory: dict[str, tuple[int, ...]]
    dtype: torch.dtype

    @property
    def layout(self) -> Layout:
        """Of the transition input."""
        entries = list(self.observations.items())[: self.encoded]
        encodings = {key: Encoding.of(observed.spec, 0) for key, observed in entries}
        return Layout(encodings, Encoding.of(self.action.spec, 0), self.action.key)

    @property
    def inputs(self) -> list[str]:
        """Names of a step's inputs, in order: an observation that has the name of another tensor is ``"observation.<name>"``."""
        own = ["reward", "done", "start", "noise", *self.memory]
        taken = {*own, "action", *(f"next_{name}" for name in self.memory)}
        shown = map(name_of, self.observations)
        return [*(f"observation.{name}" if name in taken else name for name in shown), *own]

    def as_json(self) -> str:
        """The signature as text, from which `from_json` makes it again."""
        plain = {**vars(self), "observations": [*self.observations.items()], "noise": (self.noise, self.noise_size)}
        del plain["noise_size"]
        return json.dumps(plain, default=_as_plain)

    @classmethod
    def from_json(cls, text: str) -> Signature:
        """The signature that gave this text."""
        plain = json.loads(text)
        noise, noise_size = plain["noise"]
        return cls(
            observations={as_key(key): _observed(each) for key, each in plain["observations"]},
            encoded=plain["encoded"],
            action=_acted(plain["action"]),
            trans_key=as_key(plain["trans_key"]),
            done_at_start=plain["done_at_start"],
            reward=_affine(plain["reward"]),
            noise=noise,
            noise_size=noise_size,
            memory={name: tuple(shape) for name, shape in plain["memory"].items()},
            dtype=as_dtype(plain["dtype"]),
        )


def name_of(key: NestedKey) -> str:
    """``("a", "b")`` as ``"a.b"``."""
    return key if isinstance(key, str) else ".".join(key)


# ------------------------------------------------------------------ of an env
def observed_of(env: EnvBase, keys: Sequence[NestedKey]) -> dict[NestedKey, Observed]:
    """The entries ``keys`` of what ``env`` shows.

    Raises:
        KeyError: the env has no such observation.
        NotImplementedError: a transform of the env makes them, which an agent cannot take along.
    """
    specs, base = env.full_observation_spec_unbatched, base_of(env)
    missing = [key for key in keys if key not in specs.keys(True, True)]
    if missing:
        raise KeyError(
            f"the policy reads {missing}, which the env does not show; it has {list(specs.keys(True, True))}."
        )
    leaves = {leaf.key: leaf for leaf in base.observations.leaves} if isinstance(base, GymVectorEnv) else {}
    observed = {}
    for key in keys:
        shown, affine = _way_of(env, key)
        leaf = leaves.get(shown)
        path = ((shown,) if isinstance(shown, str) else shown) if leaf is None else leaf.path
        start = None if leaf is None or leaf.start is None else leaf.start.reshape(specs[key].shape)
        observed[key] = Observed(specs[key].cpu(), tuple(path), start, affine[::-1])
    return observed


def acted_of(env: EnvBase) -> Acted:
    """The action of ``env``."""
    base, key = base_of(env), env.action_key
    spec = base.full_action_spec_unbatched[base.action_key].cpu()
    _, affine = _way_of(env, key, actions=True)
    if (actions := _actions_of(base)) is not None:
        bounds = None if actions.bounds is None else tuple(map(torch.as_tensor, actions.bounds))
        dtype = torch.from_numpy(np.zeros(1, actions.space.dtype)).dtype
        return Acted(key, spec, tuple(actions.space.shape), dtype, actions.start, bounds, affine)
    is_one_hot = isinstance(spec, OneHot)
    shape = () if is_one_hot else tuple(spec.shape)
    shape = (len(spec.nvec),) if isinstance(spec, MultiOneHot) else shape
    return Acted(key, spec, shape, torch.int64 if is_one_hot else spec.dtype, affine=affine)


def _actions_of(base: EnvBase) -> ActionSpace | None:
    """How actions reach the Gymnasium envs of ``base``; None of envs of TorchRL's."""
    if isinstance(base, SerialEnv | ParallelEnv):  # which show no row where they have not begun, or run in processes
        row = base.create_env_fn[0](**base.create_env_kwargs[0])
        actions = _actions_of(base_of(row))
        row.close()
        return actions
    if isinstance(base, GymTaskEnv):
        return ActionSpace(base._env.action_space)
    return base.actions if isinstance(base, GymVectorEnv) else None


def reward_of(env: EnvBase) -> tuple[Affine, ...]:
    """What becomes of rewards."""
    _, affine = _way_of(env, env.reward_key)
    return affine[::-1]


def transition_of(env: EnvBase, keys: Sequence[NestedKey]) -> PreviousStep:
    """The transform of ``env`` that writes one of ``keys``.

    Raises:
        ValueError: there is none.
    """
    writers = [each for each in previous_steps(env) if each.out_key in keys]
    if len(writers) != 1:
        raise ValueError(
            f"the policy reads {list(keys)}, of which {len(writers)} are written by a PreviousStep; it must be one: give "
            "the env that the policy was trained on, with its Trial and PreviousStep."
        )
    return writers[0]


def require_nothing_behind(env: EnvBase, transition: PreviousStep, keys: Sequence[NestedKey]) -> None:
    """NotImplementedError where a transform behind ``transition`` writes one of ``keys``, or its input, made last."""
    transforms = list(transforms_of(env))
    behind = transforms[next(n for n, each in enumerate(transforms) if each is transition) + 1 :]
    for each in behind:
        changed = [key for key in (*keys, transition.out_key) if key in each.out_keys]
        if changed and type(each) in (ObservationNorm, RewardScaling, *_FORMS):
            raise NotImplementedError(
                f"{type(each).__name__} stands behind PreviousStep and changes {changed}, which an agent makes its input of: what "
                "it is shown would not be what it was trained on. Put it before PreviousStep."
            )


def _way_of(env: EnvBase, key: NestedKey, *, actions: bool = False) -> tuple[NestedKey, tuple[Affine, ...]]:
    """The name that the policy's ``key`` has in the base env, and what the transforms do to it, from the policy inwards."""
    affine, is_reshaped = [], False
    for each in reversed(transforms_of(env)):
        # What is derived from PreviousStep may write another transition input.
        if isinstance(each, _NEUTRAL) or type(each) is PreviousStep:
            continue
        if type(each) not in (ObservationNorm, RewardScaling, ActionScaling, *_FORMS):
            raise NotImplementedError(
                f"the env has a {type(each).__name__}, which an agent cannot take along: what it is shown or does would not be "
                "what it was trained on. It takes ObservationNorm, RewardScaling, ActionScaling, and what names or reshapes, "
                "RenameTransform, FlattenObservation and UnsqueezeTransform; RecurrentActor(normalize=True) normalises within the "
                "networks."
            )
        keys, written = (each.in_keys_inv, each.out_keys_inv) if actions else (each.in_keys, each.out_keys)
        if key not in written or (isinstance(each, ActionScaling) and not actions):
            continue
        if type(each) in _FORMS:
            key, is_reshaped = keys[list(written).index(key)], is_reshaped or type(each) is not RenameTransform
            continue
        if list(keys) != list(written):
            raise NotImplementedError(f"{type(each).__name__} makes {key!r} of {keys}: let it write what it reads.")
        affine.append(_as_affine(each, undone=actions))
        if is_reshaped and max(affine[-1].loc.numel(), affine[-1].scale.numel()) > 1:
            raise NotImplementedError(
                f"{type(each).__name__} scales {key!r} place by place before it is reshaped: reshape it first."
            )
    return key, tuple(affine)


def _as_affine(each: ObservationNorm | RewardScaling | ActionScaling, *, undone: bool) -> Affine:
    """What a transform does to what the env shows, or to undo that, to an action on its way to the env."""
    loc, scale, is_normal = each.loc.detach().cpu(), each.scale.detach().cpu(), bool(each.standard_normal)
    if not isinstance(each, ActionScaling):
        return Affine(loc, scale, inverse=is_normal != undone)
    return Affine(loc, scale, False) if is_normal else Affine(loc - scale, 2 * scale, False)  # of [-1, 1], of [0, 1]


# -------------------------------------------------------------------- as JSON
_KINDS = {cls.__name__: cls for cls in (Binary, Bounded, Categorical, MultiCategorical, MultiOneHot, OneHot, Unbounded)}


def _as_plain(value: Any) -> list | dict | str:
    """What JSON has no type for: an `Observed` or `Acted`, and what is in them."""
    if isinstance(value, Tensor):
        return [value.tolist(), _name(value.dtype)]
    if isinstance(value, torch.dtype):
        return _name(value)
    if isinstance(value, Affine):
        return [value.loc, value.scale, value.inverse]
    return _plain_spec(value) if isinstance(value, TensorSpec) else vars(value)


def _plain_spec(spec: TensorSpec) -> dict[str, Any]:
    kind = type(spec).__name__
    if _KINDS.get(kind) is not type(spec):
        # Such as UnboundedDiscrete: what matters here is shape and dtype.
        kind = "Unbounded"
        if isinstance(spec, Categorical | OneHot | MultiOneHot | Binary):
            raise NotImplementedError(f"a spec of {type(spec).__name__} cannot be written to an agent's file.")
    plain = {"kind": kind, "shape": spec.shape, "dtype": spec.dtype}
    if kind in ("Categorical", "OneHot"):
        plain["n"] = spec.space.n
    elif kind in ("MultiCategorical", "MultiOneHot"):
        plain["nvec"] = torch.as_tensor(spec.nvec).tolist()  # of one-hot vectors it is a list
    elif kind == "Bounded":
        plain |= {"low": spec.space.low, "high": spec.space.high}
    return plain


def _spec(plain: dict[str, Any]) -> TensorSpec:
    sizes = [plain[name] for name in ("n", "nvec") if name in plain]
    bounds = [_tensor(plain[name]) for name in ("low", "high") if name in plain]
    options = {"shape": torch.Size(plain["shape"]), "dtype": as_dtype(plain["dtype"])}
    return _KINDS[plain["kind"]](*sizes, *bounds, **options)


def _observed(plain: dict[str, Any]) -> Observed:
    return Observed(_spec(plain["spec"]), tuple(plain["path"]), _tensor(plain["start"]), _affine(plain["affine"]))


def _acted(plain: dict[str, Any]) -> Acted:
    bounds = plain["bounds"] and tuple(_tensor(bound) for bound in plain["bounds"])
    sizes = (as_key(plain["key"]), _spec(plain["spec"]), tuple(plain["shape"]), as_dtype(plain["dtype"]))
    return Acted(*sizes, _tensor(plain["start"]), bounds, _affine(plain["affine"]))


def _affine(plain: list) -> tuple[Affine, ...]:
    return tuple(Affine(_tensor(loc), _tensor(scale), inverse) for loc, scale, inverse in plain)


def _tensor(plain: list | None) -> Tensor | None:
    return None if plain is None else torch.tensor(plain[0], dtype=as_dtype(plain[1]))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
