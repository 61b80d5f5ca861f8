"""Settings that recipes share, in groups, and what they come to: options of networks, loss, advantages and update."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from tensordict import TensorDictBase

from recipes.posterior import (
    CountBonusAdvantage,
    OfRewards,
    Posterior,
    PosteriorAdvantage,
    PosteriorBelief,
    sample_moments,
)
from rl2_torchrl import GRUCore, LSTMCore, MLPEncoder, TaskBelief, TrialAdvantage, linear_decay
from rl2_torchrl.objectives import RegretAdvantage

__all__ = [
    "FirstWeights",
    "Learning",
    "Network",
    "Settings",
    "Told",
    "late_decay",
    "require_choices",
    "require_range",
    "require_whole",
    "told_of",
    "whole_batches",
]


class Settings:
    """Settings that belong together; ValueError where one of a few choices is none of them, or a number is out of its range."""

    def __post_init__(self):
        require_choices(type(self), vars(self))


def require_range(of: Any, *names: str, kind: type = Real, least: float = 0, most: float = math.inf) -> None:
    """Raises ValueError where one of these settings ``of`` a group is no number, or list of numbers, from ``least`` to ``most``."""
    for name in names:
        value = getattr(of, name)
        is_list = isinstance(value, (list, tuple))
        for each in value if is_list else [value]:
            if isinstance(each, bool) or not isinstance(each, kind) or not least <= each <= most:
                what = "whole " * (kind is Integral) + "number"
                bounds = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
                raise ValueError(f"{name}={value!r} must be {what + 's' if is_list else 'a ' + what} {bounds}.")


require_whole = partial(require_range, kind=Integral, least=1)


def require_choices(of: Callable, given: Mapping[str, Any]) -> None:
    """Raises ValueError where what is ``given`` to a function or class is none of the choices that its annotation names."""
    for name, hint in get_type_hints(of).items():
        if get_origin(hint) is Literal and name in given and given[name] not in get_args(hint):
            raise ValueError(f"{name}={given[name]!r} is none of {', '.join(map(repr, get_args(hint)))}.")


@dataclass(frozen=True)
class Network(Settings):
    """Actor and critic.

    Args:
        units: units of the core.
        core: what carries the memory.
        encoder_cells: sizes of the layers of an MLP before the core; empty: none.
        num_cells: hidden layers of actor and critic after the core. Empty: none, but for a critic on a memory that it does not
            train, which has one of ``units``.
        normalize: bring observed numbers and rewards to mean 0 and standard deviation 1 before the networks (`RunningNorm`).
        critic_keys: what the critic reads beside the actor's memory; the task among it makes advantages less noisy, and the
            actor never sees it.
    """

    units: int = 64
    core: Literal["gru", "lstm"] = "gru"
    encoder_cells: tuple[int, ...] = ()
    num_cells: tuple[int, ...] = ()
    normalize: bool = False
    critic_keys: tuple[str, ...] = ("time_left",)

    def __post_init__(self):
        super().__post_init__()
        require_whole(self, "units", "encoder_cells", "num_cells")

    @property
    def actor(self) -> dict[str, Any]:
        """Options of `RecurrentActor.from_env`, and of its subclasses'."""
        encoder = partial(MLPEncoder, num_cells=self.encoder_cells) if self.encoder_cells else None
        core = partial({"gru": GRUCore, "lstm": LSTMCore}[self.core], hidden_size=self.units)
        return {"normalize": self.normalize, "encoder": encoder, "core": core, "num_cells": self.num_cells}

    @property
    def critic(self) -> dict[str, Any]:
        """Options of `RecurrentCritic.from_env`, and of its subclasses': a critic with a core of its own."""
        return {**self.actor, "extra_keys": self.critic_keys}

    def value_head(self, *, detach: bool) -> dict[str, Any]:
        """Options of `MemoryValueHead.from_env`: a critic on the actor's memory."""
        own_layer = (self.units,) if detach else ()
        return {"detach": detach, "num_cells": self.num_cells or own_layer, "extra_keys": self.critic_keys}


@dataclass(frozen=True)
class FirstWeights(Settings):
    """What the core's weights are at first, as `orthogonal_init_` takes it.

    Args:
        memory_steps: steps over which the slowest units remember; None: all forget half with every step.
        input_gain: factor on the input weights.
        gate_gain: further factor on those of the update gates.
    """

    memory_steps: int | None = None
    input_gain: float = 1.0
    gate_gain: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.memory_steps is not None:
            require_whole(self, "memory_steps")
        require_range(self, "input_gain", "gate_gain")


@dataclass(frozen=True)
class Learning(Settings):
    """Batches, and PPO on them.

    Args:
        trials: trials in a batch, each on a task of its own.
        env_steps: env steps to train on, rounded up to whole batches.
        lr: learning rate, decayed to 0 over the training.
        gamma: discount per step.
        lmbda: GAE's lambda.
        epochs: passes over a batch.
        minibatches: minibatches a pass.
        max_grad_norm: clip the gradient's norm at this; None does not, which learns faster where the critic's gradient is by
            far the larger part of the norm.
        entropy: weight of the entropy bonus, decayed to 0 over the training.
        entropy_decay: how: linearly, or late, slowly at first and fast at the end (`late_decay`).
    """

    trials: int = 1024
    env_steps: int = 10_000_000
    lr: float = 3e-3
    gamma: float = 0.99
    lmbda: float = 0.9
    epochs: int = 4
    minibatches: int = 8
    max_grad_norm: float | None = None
    entropy: float = 0.02
    entropy_decay: Literal["linear", "late"] = "linear"

    def __post_init__(self):
        super().__post_init__()
        require_whole(self, "trials", "env_steps", "epochs", "minibatches")
        require_range(self, "gamma", "lmbda", most=1)
        require_range(self, "lr", "entropy", *["max_grad_norm"] * (self.max_grad_norm is not None))

    @property
    def loss(self) -> dict[str, Any]:
        """Options of `RL2PPOLoss`."""
        return {"entropy_bonus": self.entropy > 0, "entropy_coeff": self.entropy}

    @property
    def advantage(self) -> dict[str, Any]:
        """Options of `TrialAdvantage`."""
        return {"gamma": self.gamma, "lmbda": self.lmbda, "value_target": "gae"}

    @property
    def update(self) -> dict[str, Any]:
        """Options of `PPOUpdate`."""
        passes = {"epochs": self.epochs, "minibatches": self.minibatches}
        decays = {"lr_schedule": linear_decay, "entropy_schedule": self.entropy_schedule if self.entropy > 0 else None}
        return {"lr": self.lr, "max_grad_norm": self.max_grad_norm, **passes, **decays}

    def frames(self, steps: int) -> dict[str, int]:
        """Options of a collector: batches of ``steps`` env steps in each row, as many as ``env_steps`` take.

        Examples:
            >>> Learning(trials=16, env_steps=500).frames(10)
            {'frames_per_batch': 160, 'total_frames': 640}
        """
        batch = self.trials * steps
        return {"frames_per_batch": batch, "total_frames": whole_batches(self.env_steps, batch)}

    @property
    def entropy_schedule(self) -> Callable[[float], float]:
        """Factor on the weight of the entropy bonus, by progress."""
        return {"linear": linear_decay, "late": late_decay}[self.entropy_decay]


def whole_batches(env_steps: int, batch: int) -> int:
    """``env_steps`` rounded up to whole batches of ``batch`` steps."""
    return -(-env_steps // batch) * batch


def late_decay(progress: float) -> float:
    """1 - p²: slow at first and fast at the end, so that exploring goes on for most of the training.

    Examples:
        >>> late_decay(0.5)
        0.75
    """
    return 1.0 - progress**2


@dataclass(frozen=True)
class Told(Settings):
    """What the training is told of the task beside rewards; the agent is told of none of it. See also `Network.critic_keys`.

    Args:
        regret: whether regrets, which the task tells without noise, stand for rewards in the advantages (`RegretAdvantage`).
        belief: weight of the loss by which the memory learns to tell the task (`TaskBelief`); 0: none.
        posterior: whether what a trial has shown of the task, exactly (`recipes.posterior`), stands for the task in that loss, and
            for rewards in the advantages. Bandits and tabular MDPs have it.
        seen: whether the memory learns to tell, with the weight ``belief``, the means of the rewards that the trial has paid, and
            optimism is a bonus on rewards for what it has seldom tried (`CountBonusAdvantage`). Of the task nothing is told.
        optimism: standard deviations of the posterior, or of those means, on top of them, for what trying an action is worth later.
        optimism_after: share of the training without optimism, which then rises over as long a share again; 0: it is there at once.

    Raises:
        ValueError: of regrets, posterior and what was seen more than one is to be learnt from, or there is optimism without the
            latter two.
    """

    regret: bool = False
    belief: float = 0.0
    posterior: bool = False
    seen: bool = False
    optimism: float = 0.0
    optimism_after: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        require_range(self, "belief", "optimism")
        require_range(self, "optimism_after", most=0.5)
        on = [name for name in ("regret", "posterior", "seen") if getattr(self, name)]
        if len(on) > 1:
            off = ", ".join(f"--no-{name}" for name in on)
            raise ValueError(
                f"{', '.join(on)} are all on, some perhaps by default, and one alone says what advantages are made of: turn off "
                f"the others ({off})."
            )
        if self.optimism and not (self.posterior or self.seen):
            raise ValueError(
                f"optimism={self.optimism} is of standard deviations, and without posterior=True or seen=True nothing has any."
            )

    def moments(self, of_prior: OfRewards) -> OfRewards:
        """Means and deviations of what was seen: those of the posterior ``of_prior``, or of samples alone."""
        return sample_moments if self.seen else of_prior

    def terms(
        self,
        units: int,
        size: int,
        target: Callable[[torch.Tensor], torch.Tensor] | None = None,
        posterior: Posterior | None = None,
    ) -> list[TaskBelief]:
        """Terms of the loss: from ``units`` features ``size`` numbers are told, the task's or ``target``'s, or ``posterior``'s."""
        if not self.belief:
            return []
        if self.posterior or self.seen:
            return [PosteriorBelief(units, posterior, coefficient=self.belief)]
        return [TaskBelief(units, size, coefficient=self.belief, target=target)]

    def advantage(
        self, action_values: Callable[[TensorDictBase], torch.Tensor], posterior: Posterior, **horizon: Any
    ) -> TrialAdvantage:
        """Advantages of rewards, or of what stands for them."""
        if self.posterior:
            return PosteriorAdvantage(posterior, optimism_after=self.optimism_after, **horizon)
        if self.seen:
            return CountBonusAdvantage(posterior, optimism_after=self.optimism_after, **horizon)
        return RegretAdvantage(action_values, **horizon) if self.regret else TrialAdvantage(**horizon)


def told_of(network: Network, told: Told, weights: Path | None = None) -> str:
    """What a title adds of what the training was told; of ``weights``, whose training is not known here, their name."""
    if weights is not None:
        return f" ({Path(weights).name})"
    means = {"critic": "task" in network.critic_keys, "regrets": told.regret}
    means |= {"belief": told.belief > 0 and not told.seen, "posterior": told.posterior}
    used = [name for name, is_used in means.items() if is_used]
    return f" (task told in training: {', '.join(used)})" if used else " (rewards only)"
