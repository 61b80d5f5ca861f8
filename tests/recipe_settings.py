"""Whether a recipe's settings are used: what is to be trained with one of them changed is not what it was without."""

from dataclasses import fields

from recipes.command import arguments
from recipes.settings import FirstWeights, Learning, Network
from rl2_torchrl import describe

#: Values that no recipe has.
OTHER = {
    "units": 5,
    "core": "lstm",
    "encoder_cells": (3,),
    "num_cells": (3,),
    "memory_steps": 7,
    "input_gain": 1.5,
    "gate_gain": 1.7,
    "trials": 16,
    "env_steps": 5_000_000,
    "lr": 0.123,
    "gamma": 0.123,
    "lmbda": 0.123,
    "epochs": 3,
    "minibatches": 1,
    "max_grad_norm": 0.123,
    "entropy": 0.123,
}


def unused(main, stopped, options):
    """Names of ``main``'s settings without effect; ``stopped(**options)`` is (collector, update) of its training, not begun."""
    base, untouched = made(*stopped(**options)), []
    for group in arguments(main, options).values():
        for name in (
            [each.name for each in fields(group)] if isinstance(group, Network | FirstWeights | Learning) else []
        ):
            if made(*stopped(**options | {name: other(name, getattr(group, name))})) == base:
                untouched.append(name)
    return untouched


def other(name, value):
    """A value of a setting that is not ``value``."""
    if name == "entropy_decay":
        return "late" if value == "linear" else "linear"
    if name == "critic_keys":
        return () if value else ("time_left",)
    return not value if name == "normalize" else OTHER[name]


def made(collector, update):
    """All that settings may change of what is trained."""
    schedules = [each and each(0.5) for each in (update.lr_schedule, update.entropy_schedule)]
    sizes = collector.requested_frames_per_batch, collector.total_frames, collector.env.batch_size
    weights = {name: (weight.shape, weight.double().sum().item()) for name, weight in update.loss.named_parameters()}
    return str(describe(collector, update)), schedules, sizes, weights
