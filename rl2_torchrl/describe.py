"""`describe`: the pipeline part by part, in the order in which data flows: shapes, parameters, what is fast and why not."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from tensordict import NestedKey
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import nn
from torchrl.collectors import BaseCollector
from torchrl.data import Composite
from torchrl.envs import EnvBase

from rl2_torchrl.agent.signature import name_of
from rl2_torchrl.arguments import require_collector
from rl2_torchrl.checks.probe import NetworkProbe
from rl2_torchrl.envs import GymVectorEnv
from rl2_torchrl.gradients import LOG_PROB, Part
from rl2_torchrl.transition import PreviousStep
from rl2_torchrl.trial import Trial, base_of, is_within, transforms_of
from rl2_torchrl.update import PPOUpdate
from rl2_torchrl.workers import TrialWorkers

__all__ = ["Description", "describe"]


@dataclass(frozen=True)
class Described:
    """One part of the pipeline.

    Args:
        section: where it stands: ``"env"``, ``"collector"``, ``"actor"``, ``"critic"``, ``"update"`` or ``"loss"``.
        name: its class, or what it is.
        what: what goes in and out, with the shape ``[...]`` of a single step of a single row, or its settings.
        parameters: number of its parameters; None where it can have none.
        backend: the way it is run: of a network's part ``"kernel"`` or ``"autograd"``; None where there is but one.
        reason: why that way; None where there is no more to say.
    """

    section: str
    name: str
    what: str = ""
    parameters: int | None = None
    backend: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Description:
    """The parts of a pipeline in the order in which data flows; as a string, a table."""

    parts: Sequence[Described]

    def __str__(self) -> str:
        lines, section = [], None
        counts = ["" if part.parameters is None else f"{part.parameters:,}" for part in self.parts]
        names, ways = [part.name for part in self.parts], [part.backend or "" for part in self.parts]
        widths = [max(map(len, column)) for column in (names, ways, counts)]
        for part, *cells in zip(self.parts, names, ways, counts, strict=True):
            lines += [part.section] * (part.section != section)
            section = part.section
            name, way, count = (f"{cell:{side}{width}}" for cell, side, width in zip(cells, "<<>", widths, strict=True))
            lines.append(f"  {name}  {way}  {count}  {part.what}".rstrip() + f" ({part.reason})" * bool(part.reason))
        return "\n".join(lines)


def describe(collector: BaseCollector, update: PPOUpdate) -> Description:
    """What a training is made of, part by part, and which way each part takes; `print` it.

    Parameters of a module that two networks share are counted in both.

    Args:
        collector: TorchRL's collector, `TrialCollector` or `TrialWorkers`, whose first worker is asked; of envs inside the
            processes of TorchRL's own collectors nothing is known.
        update: `PPOUpdate`.

    Raises:
        TypeError: the one is no collector, or the other no `PPOUpdate`.

    Examples:
        >>> from torchrl.envs import Compose, TransformedEnv
        >>> from rl2_torchrl import ActorCritic, GRUCategoricalActor, GRUValueHead, RL2PPOLoss, TaskSampler, TrialCollector
        >>> from rl2_torchrl.envs import BernoulliBandit, uniform_means
        >>> transforms = Compose(Trial(episodes=10), TaskSampler(uniform_means(3)), PreviousStep())
        >>> env = TransformedEnv(BernoulliBandit(num_arms=3, batch_size=(4,)), transforms)
        >>> actor, critic = GRUCategoricalActor.from_env(env), GRUValueHead.from_env(env)
        >>> collector = TrialCollector(env, ActorCritic(actor, critic), frames_per_batch=40)
        >>> description = describe(collector, PPOUpdate(RL2PPOLoss(actor, critic)))
        >>> [(part.name, part.what, part.parameters) for part in description.parts if part.name == "Head"]
        [('Head', 'actor_features [64] -> logits [3]', 195), ('Head', 'critic_features [64] -> state_value [1]', 65)]
    """
    require_collector(collector, "describe(collector, update)")
    if not isinstance(update, PPOUpdate):
        raise TypeError(f"{type(update).__name__} is no PPOUpdate: describe(collector, PPOUpdate(loss)).")
    parts, spec = _env_of(collector)
    parts += _collector(collector, spec)
    shapes = _shapes(spec, update.loss)
    ways = _ways(update)
    for section in ("actor", "critic"):
        network = getattr(update.loss, f"{section}_network")
        parts += [_module(section, leaf, shapes, ways, update) for leaf in _leaves(network)]
    return Description([*parts, *_update(update), *_loss(update)])


# ------------------------------------------------------------- what plays
def _env_of(collector: BaseCollector) -> tuple[list[Described], Composite | None]:
    """What the env is made of, and its observation spec; of TorchRL's collectors of several processes nothing."""
    if isinstance(collector, TrialWorkers):
        (first, *others), spec = collector.of_env(_env)
        return [replace(first, what=f"{first.what}, in each of {collector.num_workers} workers"), *others], spec
    env = getattr(collector, "env", None)
    return ([Described("env", "in other processes")], None) if env is None else _env(env)


def _env(env: EnvBase) -> tuple[list[Described], Composite]:
    base = base_of(env)
    rows = f"{env.batch_size.numel()} rows" + f" on {env.device}" * (env.device is not None) + _vector_of(base)
    transforms = [Described("env", type(t).__name__, _transform(t, env)) for t in transforms_of(env)]
    return [Described("env", type(base).__name__, rows), *transforms], env.observation_spec


def _vector_of(base: EnvBase) -> str:
    """Which of Gymnasium's vector envs plays, and what."""
    if not isinstance(base, GymVectorEnv):
        return ""
    kind = "closed vector env" if base.envs is None else type(base.envs).__name__
    return f", {kind}" + (f" of {base.env_id}" if base.env_id else "")


def _transform(transform: nn.Module, env: EnvBase) -> str:
    if isinstance(transform, Trial):
        bounds = {"episodes": transform.episodes, "steps": transform.steps}
        return "a trial is " + " or ".join(f"{bound} {name}" for name, bound in bounds.items() if bound)
    if isinstance(transform, PreviousStep):
        layout = transform.layout()
        told = [
            f"{name_of(key)} {part.size}" + " (uint8 / 255)" * part.is_bytes
            for key, part in layout.observations.items()
        ]
        told = ", ".join([*told, f"action {layout.action.size}", "reward 1", "done 1"])
        return f"{name_of(transform.out_key)} [{layout.size}] = {told}"
    keys = [getattr(transform, "task_key", None), *(getattr(transform, "primers", transform.out_keys) or ())]
    shapes = {key: list(spec.shape[len(env.batch_size) :]) for key, spec in env.observation_spec.items(True, True)}
    return ", ".join(_entry(each, shapes) for key in keys if key is not None for each in shapes if is_within(each, key))


def _collector(collector: BaseCollector, spec: Composite | None) -> list[Described]:
    # `RayCollector` has the second alone, and means all its processes together by it.
    frames = getattr(collector, "requested_frames_per_batch", None) or collector.frames_per_batch
    keep = getattr(collector, "keep", None)
    batch = f"{frames:,} steps a batch"
    if spec is not None:
        batch += f", {frames // (getattr(collector, 'num_workers', 1) * spec.shape.numel()):,} of each row"
    total = collector.total_frames
    batch += f", {total:,} in all" if total is not None and 0 < total < math.inf else ", without end"
    # TorchRL's own collectors have one way, and no name for it.
    way = {"backend": getattr(collector, "backend", "tensordicts"), "reason": getattr(collector, "reason", None)}
    kept = "all entries" if keep is None else ", ".join(map(name_of, keep))
    return [Described("collector", type(collector).__name__, batch, **way), Described("collector", "keeps", kept)]


# -------------------------------------------------------------- networks
def _leaves(network: TensorDictModuleBase | None) -> list[TensorDictModuleBase]:
    if isinstance(network, TensorDictSequential):
        return [leaf for module in network.module for leaf in _leaves(module)]
    return [] if network is None else [network]


def _module(
    section: str, leaf: TensorDictModuleBase, shapes, ways: dict[NestedKey, Part], update: PPOUpdate
) -> Described:
    is_policy = isinstance(leaf, ProbabilisticTensorDictModule)
    flow = " -> ".join(", ".join(_entry(key, shapes) for key in keys) for keys in (leaf.in_keys, leaf.out_keys))
    inner = getattr(leaf, "module", leaf)
    name = (leaf.distribution_class if is_policy else type(inner)).__name__
    flow += ", detached" * (vars(inner).get("detach") is True)  # as a critic on the actor's memory may be
    # The part of a policy judges actions: it writes their log-probability.
    part = next((ways[key] for key in ([LOG_PROB] if is_policy else leaf.out_keys) if key in ways), None)
    backend, reason = ("autograd", update.reason) if part is None else (part.kind, part.reason)
    return Described(section, name, flow, sum(p.numel() for p in leaf.parameters()), backend, reason)


def _ways(update: PPOUpdate) -> dict[NestedKey, Part]:
    """The parts that the update runs, by what they write; none where it runs the loss whole."""
    parts = [] if update.backend in ("autograd", "graph") else update.loss.network_parts()
    return {key: part for part in parts for key in part.out_keys}


def _shapes(spec: Composite | None, loss: nn.Module) -> dict[NestedKey, list[int]]:
    """Shapes of a single step of a single row, of the env's entries and of what the networks write for them."""
    if spec is None:
        return {}
    data = spec.zero()
    data["is_init"] = torch.ones(*spec.shape, 1, dtype=torch.bool, device=spec.device)
    NetworkProbe(copy.deepcopy(loss)).step(data)
    return {key: list(entry.shape[spec.ndim :]) for key, entry in data.items(True, True)}


def _entry(key: NestedKey, shapes: dict[NestedKey, list[int]]) -> str:
    return name_of(key) + (f" {shapes[key]}" if key in shapes else "")


# ---------------------------------------------------------- what learns
def _update(update: PPOUpdate) -> Iterable[Described]:
    bptt = "whole rows" if update.bptt is None else f"chunks of {update.bptt} steps"
    order = "drawn at random" if update.shuffle else "in order"
    passes = f"{update.epochs} epochs of {update.minibatches} minibatches of {bptt}, {order}"
    what = ", ".join(filter(None, [passes, _settings({"target_kl": update.target_kl})]))
    yield Described("update", type(update).__name__, what, backend=update.backend, reason=update.reason)
    names = ("gamma", "lmbda", "value_target", "normalize", "scale_rewards")
    numbers = {name: getattr(update.advantage, name, None) for name in names}
    yield Described("update", type(update.advantage).__name__, _settings(numbers))
    # As they were given: a schedule may have moved them since.
    rates = " and ".join(dict.fromkeys(_value(given["lr"]) for given in update.given_options))
    numbers = {"lr": rates, "max_grad_norm": update.max_grad_norm, "lr_schedule": update.lr_schedule}
    yield Described("update", type(update.optimizer).__name__, _settings(numbers))


def _loss(update: PPOUpdate) -> Iterable[Described]:
    loss = update.loss
    trained = sum(p.numel() for p in loss.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in loss.parameters()) - trained
    has_bonus = getattr(loss, "entropy_bonus", False)
    names = ("clip_epsilon", "critic_coeff", "clip_value", *["entropy_coeff"] * has_bonus)
    numbers = {name: update.given_coefficients.get(name, getattr(loss, name, None)) for name in names}
    numbers["entropy_schedule"] = update.entropy_schedule
    what = [_settings(numbers), f"{frozen:,} parameters frozen" if frozen else ""]
    yield Described("loss", type(loss).__name__, ", ".join(filter(None, what)), trained)
    # Other losses than RL2PPOLoss do not tell what they are made of.
    for term in loss.loss_terms() if hasattr(loss, "loss_terms") else ():
        backend = (
            "kernel" if hasattr(term, "with_gradients") and update.backend not in ("autograd", "graph") else "autograd"
        )
        what = "reads " + ", ".join(map(name_of, term.in_keys))
        if term in loss.terms and hasattr(term, "coefficient"):  # PPO's own stand above
            what += f"; {_settings({'coefficient': term.coefficient})}"
        yield Described("loss", type(term).__name__, what, sum(p.numel() for p in term.parameters()), backend)


def _settings(settings: dict[str, object]) -> str:
    return ", ".join(f"{name}={_value(value)}" for name, value in settings.items() if value is not None)


def _value(value: object) -> str:
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    return f"{value:.4g}" if isinstance(value, float) else getattr(value, "__name__", str(value))
