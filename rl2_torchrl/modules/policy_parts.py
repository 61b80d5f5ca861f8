"""A policy as parts with gradients: `actor_parts`, the last of which scores actions by the policy's distribution."""

from __future__ import annotations

from tensordict import NestedKey
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor

from rl2_torchrl import kernels
from rl2_torchrl.gradients import policy
from rl2_torchrl.gradients.networks import leaves_of, part_of
from rl2_torchrl.gradients.part import Part
from rl2_torchrl.modules.distributions import distribution_of

__all__ = ["actor_parts", "why_no_parts"]

_GIVEN = ("policy", "given_action")


def why_no_parts(actor: TensorDictModuleBase) -> str | None:
    """Why the policy ``actor`` is no list of parts that ends in one distribution, in words; None if it is."""
    if isinstance(actor, TensorDictSequential) and not getattr(actor, "return_composite", False):
        *others, last = leaves_of(actor, is_policy=True)
        is_sample = isinstance(last, ProbabilisticTensorDictModule) and len(last.dist_keys) == len(last.in_keys)
        is_only = not any(isinstance(module, ProbabilisticTensorDictModule) for module in others)
        if is_sample and is_only and distribution_of(last):
            return None
    return f"{type(actor).__name__} is no sequence of modules that ends in one distribution, its only one"


def actor_parts(actor: TensorDictModuleBase, action_key: NestedKey, *, entropy: bool) -> list[Part]:
    """The parts of the policy ``actor``, the last of which writes ``LOG_PROB`` and, where it is asked for, ``ENTROPY``."""
    *modules, sample = leaves_of(actor, is_policy=True)
    distribution = distribution_of(sample)

    def terms(action: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        log_prob, its_entropy = distribution.log_prob_and_entropy(action, *parameters)
        if not entropy:
            return (log_prob,)
        if its_entropy is None:  # no closed form: from one draw, as ClipPPOLoss takes it
            its_entropy = -distribution.drawn_log_prob(*parameters)
        return log_prob, its_entropy

    # Of the device and dtype of the parameters, if there are any, the distribution will be.
    like = next(actor.parameters(), None)
    has_kernels = like is not None and kernels.covers(like)
    keys = ([action_key, *sample.in_keys], [policy.LOG_PROB, policy.ENTROPY] if entropy else [policy.LOG_PROB])
    if has_kernels and distribution.part:
        last = distribution.part(terms, *keys)
    else:
        missing = "brings no gradient of its own" if has_kernels else "has no kernels here"
        last = Part(terms, *keys, reason=f"{sample.distribution_class.__name__} {missing}")
    parts, names = list(map(part_of, modules)), {}
    for part in parts:
        part.in_keys = [names.get(key, key) for key in part.in_keys]
        if action_key in part.out_keys:
            # gSDE's module gives actions itself: others by now, and those that were collected are scored.
            names = {action_key: _GIVEN}
            part.out_keys = [names.get(key, key) for key in part.out_keys]
    numbers = [policy.index_part(action_key)] if isinstance(last, policy.CategoricalPart) else []
    return [*parts, *numbers, last]
