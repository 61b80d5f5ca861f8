"""`parts_of`: a network as the list of its parts, each with its own gradient or autograd's."""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import nn
from torchrl.modules import set_recurrent_mode

from rl2_torchrl.gradients.part import AutogradPart, Part, is_bare, on_entries
from rl2_torchrl.modules import distributions

__all__ = ["actor_parts", "parts_of", "why_no_parts"]


def why_no_parts(actor: TensorDictModuleBase) -> str | None:
    """Why the policy ``actor`` is no list of parts that ends in one distribution, in words; None if it is."""
    if not isinstance(actor, TensorDictSequential) or getattr(actor, "return_composite", False):
        return f"{type(actor).__name__} is no sequence of modules with one distribution"
    *others, last = _leaves(actor, is_policy=True)
    if not isinstance(last, ProbabilisticTensorDictModule) or len(last.dist_keys) != len(last.in_keys):
        return f"{type(actor).__name__} does not end in a distribution"
    if distributions.distribution_of(last) is None or any(isinstance(m, ProbabilisticTensorDictModule) for m in others):
        return f"{type(actor).__name__} has several distributions"
    return None


def actor_parts(actor: TensorDictModuleBase, action_key: NestedKey, *, entropy: bool) -> list[Part]:
    """The parts of the policy ``actor``, the last of which writes log-probability and entropy (`policy_part`)."""
    *modules, sample = _leaves(actor, is_policy=True)
    like = next(actor.parameters(), None)
    return [*map(_part, modules), distributions.policy_part(sample, action_key, entropy=entropy, like=like)]


def parts_of(network: TensorDictModuleBase) -> list[Part]:
    """The parts of ``network``, in the order in which it runs them.

    Examples:
        >>> from rl2_torchrl import GRUValueHead
        >>> [part.out_keys for part in parts_of(GRUValueHead(5, activation=nn.ELU))]
        [['critic_features'], ['state_value']]
    """
    return [_part(module) for module in _leaves(network)]


def _leaves(module: TensorDictModuleBase, *, is_policy: bool = False) -> list[TensorDictModuleBase]:
    # Of a policy the loss asks its distribution, past its own forward and the hooks on that.
    if isinstance(module, TensorDictSequential) and (is_policy or _is_plain_sequence(module)):
        return [leaf for part in module.module for leaf in _leaves(part)]
    return [module]


def _is_plain_sequence(module: TensorDictSequential) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    owner = next(cls for cls in type(module).__mro__ if "forward" in vars(cls))
    return not hooks and owner.__module__.startswith("tensordict.")


def _part(module: TensorDictModuleBase) -> Part:
    """Whatever a module is: one that knows its gradient, a core, a function of tensors, or one that wants a TensorDict."""
    if hasattr(type(module), "sequence"):
        part = module.gradient_part() if hasattr(module, "gradient_part") and is_bare(module) else None
        return part or _core(module)
    if not _is_function(module):
        return _on_tensordict(module)
    function, keys = module.module, (module.in_keys, module.out_keys)
    part = None
    if hasattr(function, "gradient_part") and is_bare(function):
        part = function.gradient_part(*keys)
    return part or AutogradPart(function, *keys, reason=f"{_name(function)} brings no gradient of its own here")


def _is_function(module: TensorDictModuleBase) -> bool:
    """Whether ``module`` is its inner one on the entries that it reads, and nothing more."""
    is_plain = isinstance(module, TensorDictModule) and type(module).forward is TensorDictModule.forward
    more = is_plain and (module._kwargs is not None or module.method_kwargs or module.method or module._get_kwargs)
    return is_plain and not more and not module._forward_hooks and not module._forward_pre_hooks


def _core(module: TensorDictModuleBase) -> AutogradPart:
    features = [key for key in module.out_keys if not _is_next(key)]
    options = {"parameters": module.parameters(), "optional": module.in_keys[1:-1]}
    reason = f"{_name(module)} brings no gradient of its own"
    return AutogradPart(on_entries(module.sequence), module.in_keys, features, **options, reason=reason)


def _on_tensordict(module: TensorDictModuleBase) -> AutogradPart:
    in_keys, out_keys = list(module.in_keys), [key for key in module.out_keys if not _is_next(key)]

    def call(*inputs: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        known = {key: x for key, x in zip(in_keys, inputs, strict=True) if x is not None}
        with set_recurrent_mode(True):
            out = module(TensorDict(known, next(iter(known.values())).shape[:2]))
        return tuple(out[key] for key in out_keys)

    options = {"parameters": module.parameters(), "optional": in_keys}
    return AutogradPart(call, in_keys, out_keys, **options, reason=f"{_name(module)} is called with a TensorDict")


def _name(module: nn.Module) -> str:
    return type(module).__name__ if isinstance(module, nn.Module) else getattr(module, "__name__", str(module))


def _is_next(key: NestedKey) -> bool:
    return isinstance(key, tuple) and key[0] == "next"
