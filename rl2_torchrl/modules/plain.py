"""Networks as functions on a dictionary of tensors: what a TensorDict costs at every step and module is saved.

`TensorDictSequential`s of this package's modules and of plain `TensorDictModule`s are taken apart once, into their modules
(`flat_modules`) and the family of their distribution (`family_of`), for `LockstepRollout` and `RL2PPOLoss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch.distributions import Categorical
from torchrl.modules import IndependentNormal, OneHotCategorical

from rl2_torchrl.modules.categorical import log_prob_and_entropy
from rl2_torchrl.modules.gru import FastGRUModule

__all__ = ["Family", "NotPlainError", "State", "family_of", "flat_modules", "module_function", "run_sequences"]

State = dict[NestedKey, torch.Tensor]


class NotPlainError(ValueError):
    """A network or its data are more than functions of tensors; what runs TensorDicts can take them."""


class Family(NamedTuple):
    """A family of distributions as functions of its parameters, the same as its class's methods.

    ``log_prob_and_entropy(action, *parameters)`` gives both, ``[*B]``; ``act(noise, *parameters)`` draws from noise (Gumbel
    noise for categorical, standard normal noise for normal distributions), or with None gives the mode.
    """

    act: Callable[..., torch.Tensor]
    log_prob_and_entropy: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    gumbel: bool


def flat_modules(module: TensorDictModuleBase) -> list[TensorDictModuleBase]:
    """The modules that a `TensorDictSequential` runs, in order.

    Raises:
        NotPlainError: one of them is more than a function of tensors.
    """
    if isinstance(module, TensorDictSequential):
        return [leaf for part in module.module for leaf in flat_modules(part)]
    if isinstance(module, FastGRUModule):
        plain = module.is_plain()
    elif isinstance(module, ProbabilisticTensorDictModule):
        plain = True
    else:
        plain = type(module) is TensorDictModule and module._kwargs is None and not module.method_kwargs
    if not plain or module._forward_hooks or module._forward_pre_hooks:
        raise NotPlainError(f"{type(module).__name__} is no plain function of tensors")
    return [module]


def family_of(modules: list[TensorDictModuleBase]) -> tuple[ProbabilisticTensorDictModule, Family]:
    """The probabilistic module among ``modules`` and its family.

    Raises:
        NotPlainError: there is not one, or its family is unknown.
    """
    found = [module for module in modules if isinstance(module, ProbabilisticTensorDictModule)]
    if len(found) != 1 or found[0].distribution_class not in _FAMILIES or found[0].distribution_kwargs:
        raise NotPlainError(
            "the policy has not one plain Categorical, OneHotCategorical or IndependentNormal distribution"
        )
    return found[0], _FAMILIES[found[0].distribution_class]


def module_function(module: TensorDictModule) -> Callable[[State], None]:
    """``module`` as a function that writes into a dictionary."""
    function, in_keys, out_keys = module.module, module.in_keys, module.out_keys

    def run(state: State) -> None:
        out = function(*[state[key] for key in in_keys])
        if len(out_keys) == 1:
            state[out_keys[0]] = out
        else:
            state.update(zip(out_keys, out, strict=True))

    return run


def run_sequences(modules: list[TensorDictModuleBase], data: TensorDictBase, state: State) -> None:
    """Runs ``modules`` on sequences ``data`` ``[B, T]`` in recurrent mode and writes what they give into ``state``.

    Raises:
        NotPlainError: an entry is missing or has another size or dtype than the network's; the network itself says which.
    """
    for module in modules:
        if isinstance(module, ProbabilisticTensorDictModule):
            continue
        for key in module.in_keys:
            if key not in state and (value := data.get(key, None)) is not None:
                state[key] = value
        if isinstance(module, FastGRUModule):
            x, hidden, is_init = (state.get(key) for key in module.in_keys)
            if is_init is None or not fits(module, x, hidden) or not module.has_kernels():
                raise NotPlainError(f"the input of {type(module).__name__} does not fit it, or TorchRL's GRU is faster")
            state[module.out_keys[0]] = module.sequence(x, None if hidden is None else (hidden,), is_init.squeeze(-1))
        elif not set(module.in_keys) <= state.keys():
            raise NotPlainError(f"{type(module).__name__} reads {module.in_keys}, not all of which are there")
        else:
            module_function(module)(state)


def fits(module: FastGRUModule, x: torch.Tensor | None, hidden: torch.Tensor | None) -> bool:
    """Whether ``x`` and ``hidden`` ``[..., num_layers, hidden_size]`` have the sizes and dtype of ``module``."""
    gru, weight = module.gru, module.gru.weight_hh_l0
    if x is None or (x.device, x.dtype, x.shape[-1]) != (weight.device, weight.dtype, gru.input_size):
        return False
    sizes = (weight.dtype, gru.num_layers, gru.hidden_size)
    return hidden is None or (hidden.dtype, *hidden.shape[-2:]) == sizes


# ------------------------------------------------------------------ families
def _choose(noise: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    # Gumbel-max: the argmax of logits + Gumbel noise is a draw from the categorical distribution.
    return (logits if noise is None else logits + noise).argmax(-1)


def _choose_one_hot(noise: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(_choose(noise, logits), logits.shape[-1])


def _of_index(action: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return log_prob_and_entropy(action, logits)


def _of_one_hot(action: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _of_index(action.long().argmax(-1), logits)


def _shift(noise: torch.Tensor | None, loc: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return loc if noise is None else loc + scale * noise


def _of_real(action: torch.Tensor, loc: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_scale = scale.log() + 0.5 * math.log(2 * math.pi)
    return (-0.5 * ((action - loc) / scale).square() - log_scale).sum(-1), (log_scale + 0.5).sum(-1)


_FAMILIES = {
    Categorical: Family(_choose, _of_index, gumbel=True),
    OneHotCategorical: Family(_choose_one_hot, _of_one_hot, gumbel=True),
    IndependentNormal: Family(_shift, _of_real, gumbel=False),
}
