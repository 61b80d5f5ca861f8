"""`leaves_of` and `parts_of`: a network as the list of its modules, and these as parts with a gradient of their own or autograd's.

Its own is what a module's ``gradient_part`` brings; that is None where the module has none, such as for other activations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import NestedKey, TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from torchrl.modules import set_recurrent_mode

from rl2_torchrl.gradients.part import (
    IGNORED,
    Part,
    brings,
    has_hooks,
    is_bare,
    is_function,
    on_copies,
    on_entries,
    outputs_of,
)

__all__ = ["keys_left", "leaves_of", "part_of", "parts_of"]


def parts_of(network: TensorDictModuleBase) -> list[Part]:
    """The parts of ``network``, in the order in which it runs them."""
    return list(map(part_of, leaves_of(network)))


def leaves_of(module: TensorDictModuleBase, *, is_policy: bool = False) -> list[TensorDictModuleBase]:
    """The modules that ``module`` runs, in order, if it is a plain sequence; else itself.

    So is a policy in which a module before the distribution gives the action (gSDE's does), which then draws nothing.

    ``is_policy``: of a policy the loss asks its distribution, past its own forward and the hooks on that.
    """
    is_plain = type(module).forward in (TensorDictSequential.forward, ProbabilisticTensorDictSequential.forward)
    is_plain = is_plain and getattr(module, "_requires_sample", True)
    if is_policy or (is_plain and not has_hooks(module)):
        return [leaf for part in module._module_iter() for leaf in leaves_of(part)]
    return [module]


def keys_left(module: TensorDictModuleBase) -> set[NestedKey]:
    """What ``module`` leaves in a TensorDict: what its leaves write, but for what `select_out_keys` has taken out of it."""
    if leaves_of(module) == [module]:
        return set(module.out_keys)
    return set(module.out_keys) & set().union(*map(keys_left, module._module_iter()))


def part_of(module: TensorDictModuleBase) -> Part:
    """Whatever a module is: a core, a function of tensors, or one that wants a TensorDict; with its own gradient, if it has one."""
    in_keys, optional, speaker = module.in_keys, (), module
    out_keys = [key for key in module.out_keys if key[0] != "next" and key != IGNORED]
    if brings(module, "step_function"):  # a core, and its sequence with it
        own, why = _own_gradient(module), "brings no gradient of its own here"
        function, optional = on_entries(module.sequence), in_keys[1:]
    elif is_function(module):
        function, speaker = _on_tensors(module, out_keys), module.module
        own, why = _own_gradient(speaker, in_keys, out_keys), "brings no gradient of its own here"
    else:
        own, why = None, "is called with a TensorDict"
        function, optional = _on_tensordict(module, out_keys), in_keys
    options = {"parameters": module.parameters(), "optional": optional}
    name = getattr(speaker, "__name__", type(speaker).__name__)
    return own or Part(function, in_keys, out_keys, **options, reason=f"{name} {why}")


def _own_gradient(module: Callable, *keys: list[NestedKey]) -> Part | None:
    return module.gradient_part(*keys) if brings(module, "gradient_part") and is_bare(module) else None


def _on_tensors(module: TensorDictModule, out_keys: list[NestedKey]) -> Callable[..., tuple[torch.Tensor, ...]]:
    function, made = on_copies(module.module, module.module), module.out_keys

    def call(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = zip(made, outputs_of(function(*inputs), made), strict=True)
        return tuple(out for key, out in outputs if key in out_keys)

    return call


def _on_tensordict(module: TensorDictModuleBase, out_keys: list[NestedKey]) -> Callable[..., tuple[torch.Tensor, ...]]:
    def call(*inputs: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        known = {key: x for key, x in zip(module.in_keys, inputs, strict=True) if x is not None}
        with set_recurrent_mode(True):
            out = module(TensorDict(known, next(iter(known.values())).shape[:2]))
        return tuple(out[key] for key in out_keys)

    return call
