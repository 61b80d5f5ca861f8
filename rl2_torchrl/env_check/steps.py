"""Rules on what a step returns: it is as the specs say, stays as it was, and follows from the action."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tensordict import TensorDictBase
from torch import Tensor

from rl2_torchrl.env_check.outcomes import ENOUGH, Outcome, differ, misfit, same
from rl2_torchrl.env_check.playing import STEPS_TO_AN_END, EnvBelow
from rl2_torchrl.envs.tensor_env import TensorEnv

__all__ = ["RULES"]

#: Steps whose shapes are looked at, those whose tensors are held, and pairs of actions compared until one makes a difference.
_LOOKED_AT, _HELD, _PAIRS = 16, 4, 40
#: Added to a seed where rows chosen by what a run has led to must begin by numbers that the run has not drawn.
_OTHER_NUMBERS = 1000


def step_specs(below: EnvBelow) -> str | None:
    """What the env returns as it is: TorchRL gives rewards and flags another shape on their way, where it can."""
    env, task = below.env, below.tasks[0]
    tensordict = below.start(task)
    for number, action in enumerate(below.actions[:_LOOKED_AT]):
        after = env._step(tensordict.clone().set(env.action_key, action.clone()))
        specs = dict(env.full_observation_spec.items(True, True))
        specs |= {**dict(env.full_reward_spec.items()), **dict(env.full_done_spec.items())}
        for key, spec in specs.items():
            value = after.get(key, None)
            if isinstance(value, Tensor) and (wrong := misfit(value, spec)):
                return f"the {key!r} that step {number} returned {wrong}"
        tensordict = below.given(tensordict.clone().update(after.exclude(*env.reward_keys)), task)
        env._complete_done(env.full_done_spec, tensordict)
        if tensordict["done"].any():
            tensordict = below.begin(tensordict, tensordict["done"], task)


def kept_tensors(below: EnvBelow) -> str | None:
    """What was returned before is not written over."""
    tensordict = below.start(below.tasks[0])
    held = dict(_returned(below, tensordict, "a reset"))
    for number, action in enumerate(below.actions[:_HELD]):
        copies = {name: value.clone() for name, value in held.items()}
        stepped = below.env.step(tensordict.set(below.env.action_key, action.clone()))
        for name, value in held.items():
            if not same(value, copies[name]):
                return f"step {number} wrote over {name}"
        held |= dict(_returned(below, stepped["next"], f"step {number}"))
        tensordict = below.env.step_mdp(stepped)
        if tensordict["done"].any():
            tensordict = below.begin(tensordict, tensordict["done"], below.tasks[0])


def _returned(below: EnvBelow, tensordict: TensorDictBase, at: str) -> Iterator[tuple[str, Tensor]]:
    env = below.env
    for key in (*env.full_observation_spec.keys(True, True), *env.reward_keys, *env.done_keys):
        value = tensordict.get(key, None)
        if isinstance(value, Tensor):
            yield f"the {key!r} of {at}", value
    if isinstance(env, TensorEnv):  # its own methods hand out what it holds, without TorchRL's copies
        for key, value in env.observation.items():
            yield f"the env's {key!r} of {at}", value


def action_heard(below: EnvBelow) -> str | None:
    """The action of an episode's first step counts, in later episodes as in the first."""
    at_start = 0
    pairs = zip(below.actions[:_PAIRS], below.actions[_PAIRS : 2 * _PAIRS], strict=True)
    for seed, (one, other) in enumerate(pairs):
        (outcome, ended), (another, _) = (_first_step(below, seed, each, STEPS_TO_AN_END) for each in (one, other))
        if not ended.any() or (differ([outcome], [another]) & ended).any():
            return None
        # In rows whose task ends episodes early an action may count for more, or less, than in others.
        (outcome, _), (another, _) = (_first_step(below, seed, each, 0) for each in (one, other))
        at_start += int((differ([outcome], [another]) & ended).sum())
        if at_start >= ENOUGH:
            return "the first step of an episode that began within a trial was the same whatever the action"


def _first_step(below: EnvBelow, seed: int, action: Tensor, steps: int) -> tuple[Outcome, Tensor]:
    """What ``action`` leads to once an episode has ended, after ``steps`` steps at the latest, and in which rows one has."""
    below.seed(seed if steps else seed + _OTHER_NUMBERS)
    task = below.tasks[seed % len(below.tasks)]
    tensordict = below.start(task)
    ended = torch.zeros_like(tensordict["done"])
    for _, after, ends in below.run(tensordict, task, below.actions[:steps]):
        tensordict, ended = after, ends
        if ends.any():
            break
    return below.step(tensordict, action)[0], ended.reshape(-1).cpu()


RULES = (step_specs, kept_tensors, action_heard)
