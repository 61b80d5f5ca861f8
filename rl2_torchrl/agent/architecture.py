"""A policy's networks as plain data, and networks built of it again: names, sizes and keys, nothing that runs."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import nn
from torchrl.modules import ProbabilisticActor

from rl2_torchrl.arguments import require_own_name
from rl2_torchrl.gradients.part import is_bare, is_function
from rl2_torchrl.modules import ConvEncoder, GRUCore, Head, ImageEncoder, LSTMCore, MLPEncoder, RunningNorm
from rl2_torchrl.modules.distributions import Gaussian, distribution_named
from rl2_torchrl.modules.layers import Concat, SkipHead

__all__ = ["Plan", "as_dtype", "as_key", "build_policy", "plan_of_policy", "register_part"]

#: ``{"class": name, argument: value, ...}``: a class, and what its constructor is given, in JSON's types.
Plan = dict[str, Any]
Arguments = Callable[[nn.Module], Mapping[str, Any]]

_PARTS: dict[str, tuple[type[nn.Module], Arguments]] = {}


def register_part(cls: type[nn.Module], arguments: Arguments) -> None:
    """Lets agents with parts of ``cls``, such as an encoder or a core of your own, be saved to files and loaded from them.

    Call it in the program that saves and in the one that loads: a file names its parts, and only what is registered is built.

    Args:
        cls: the class (exactly: what is derived from it may be another one).
        arguments: a module of it to the keywords with which its constructor makes one like it: numbers, strings, lists, or
            modules that are known themselves. A core's entries (``in_key``, ``hidden_key``, ``features_key``) need not be said.

    Raises:
        ValueError: another class of that name is registered.

    Examples:
        >>> class Double(torch.nn.Module):
        ...     def __init__(self, size):
        ...         super().__init__()
        ...         self.size = size
        ...     def forward(self, x):
        ...         return torch.cat([x, x], -1)
        >>> register_part(Double, lambda module: {"size": module.size})
    """
    require_own_name(cls, [known for known, _ in _PARTS.values()])
    _PARTS[cls.__name__] = (cls, arguments)


# ----------------------------------------------------------------- policies
def plan_of_policy(policy: TensorDictModuleBase) -> Plan:
    """The plan of an actor such as `RecurrentActor`.

    Raises:
        TypeError: it has a part that is not known here.
    """
    networks, sample = policy.module
    return {
        "parts": [_plan_of_step(module) for module in networks.module],
        "action_key": next(key for key in sample.out_keys if key not in sample.log_prob_keys),
        "parameter_keys": list(sample.in_keys),
        "distribution": sample.distribution_class.__name__,
        "distribution_kwargs": {name: _as_plain(each) for name, each in (sample.distribution_kwargs or {}).items()},
    }


def build_policy(plan: Plan, weights: Mapping[str, torch.Tensor]) -> ProbabilisticActor:
    """The actor of a plan, with its ``weights``, named as in the ``state_dict`` of the one that was saved.

    Raises:
        ValueError: a part that is not known here, or weights of another network.
    """
    with torch.random.fork_rng(devices=[]):  # first weights are drawn, and thrown away
        networks = TensorDictSequential(*map(_built_step, plan["parts"]))
    kwargs = {name: _as_value(each) for name, each in plan["distribution_kwargs"].items()}
    policy = ProbabilisticActor(
        networks,
        in_keys=[as_key(key) for key in plan["parameter_keys"]],
        out_keys=[as_key(plan["action_key"])],
        distribution_class=distribution_named(plan["distribution"]),
        distribution_kwargs=kwargs,
        return_log_prob=True,
    )
    try:
        policy.load_state_dict(weights, assign=True)  # in the dtype in which they were saved
    except RuntimeError as error:
        raise ValueError(f"the weights are not those of the networks that the file describes: {error}") from error
    return policy


def _plan_of_step(module: TensorDictModuleBase) -> Plan:
    """The plan of one module of a policy, with the entries that it reads and writes."""
    if hasattr(module, "name_entries"):
        [in_key, hidden_key, *_], [features_key, *_] = module.in_keys, module.out_keys
        return {"keys": [in_key, hidden_key, features_key], "core": _plan_of(module)}
    if not is_function(module):
        raise TypeError(
            f"{type(module).__name__} cannot be written to an agent's file, which holds modules of tensors, one after the other, "
            "and no further TensorDictModule around them: export the agent to .pt2 or .onnx."
        )
    return {"keys": [module.in_keys, module.out_keys], "module": _plan_of(module.module)}


def _built_step(plan: Plan) -> TensorDictModuleBase:
    if "core" in plan:
        core = _built(plan["core"])
        core.name_entries(*map(as_key, plan["keys"]))
        return core
    in_keys, out_keys = ([as_key(key) for key in keys] for keys in plan["keys"])
    return TensorDictModule(_built(plan["module"]), in_keys, out_keys)


# -------------------------------------------------------------------- parts
def _plan_of(module: nn.Module) -> Plan:
    cls, arguments = _PARTS.get(type(module).__name__, (None, None))
    if cls is not type(module) or not is_bare(module):
        raise TypeError(_unknown(module))
    return {"class": cls.__name__, **{name: _as_plain(value) for name, value in arguments(module).items()}}


def _unknown(module: nn.Module) -> str:
    return (
        f"{type(module).__name__} cannot be written to an agent's file, which holds names and sizes and no code: register a class "
        "of your own with rl2_torchrl.agent.register_part, use RecurrentActor's parts, or export the agent to .pt2 or .onnx."
    )


def _built(plan: Plan) -> nn.Module:
    if plan["class"] not in _PARTS:
        raise ValueError(
            f"the file has a part {plan['class']!r}, which this program does not know: call register_part for it before loading, "
            "as the program did that saved it."
        )
    cls, _ = _PARTS[plan["class"]]
    arguments = {name: _as_value(value) for name, value in plan.items() if name != "class"}
    if cls in _OF_LAYERS:
        arguments["activation"] = partial(_built, plan["activation"])
    return _sequential(**arguments) if cls is nn.Sequential else cls(**arguments)


def _as_plain(value: Any) -> Any:
    """``value`` in JSON's types."""
    if isinstance(value, nn.Module):
        return _plan_of(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.Tensor):
        return {"tensor": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, tuple | list):
        return [_as_plain(each) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{value!r} is no number, string, list, tensor, dtype or module, and cannot be written to a file.")


def _as_value(plain: Any) -> Any:
    """What `_as_plain` was given."""
    if isinstance(plain, list):
        return [_as_value(each) for each in plain]
    if not isinstance(plain, dict):
        return plain
    if "class" in plain:
        return _built(plain)
    dtype = as_dtype(plain["dtype"])
    return torch.tensor(plain["tensor"], dtype=dtype) if "tensor" in plain else dtype


def as_dtype(name: str) -> torch.dtype:
    """The dtype of a name, such as ``"float32"``."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no dtype of PyTorch.")
    return dtype


def as_key(plain: str | list) -> NestedKey:
    """The key that JSON made a list of, if it was a tuple."""
    return plain if isinstance(plain, str) else tuple(plain)


# ------------------------------------------------------------ what is known here
def _as_constructed(module: nn.Module) -> dict[str, Any]:
    """A module's constructor's arguments where it keeps them under their names, as those of PyTorch do."""
    parameters = inspect.signature(type(module)).parameters.values()
    names = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    arguments = {name: getattr(module, name) for name in names if name not in ("bias", "device", "dtype")}
    return {**arguments, **({"bias": module.bias is not None} if "bias" in names else {})}


def _of_layers(linears: list[nn.Linear], activation: nn.Module) -> dict[str, Any]:
    return {"num_cells": [layer.out_features for layer in linears], "activation": activation}


def _of_images(encoder: ConvEncoder) -> dict[str, Any]:
    convolutions = [layer for layer in encoder.net if isinstance(layer, nn.Conv2d)]
    sizes = {"kernel_size": convolutions[0].kernel_size[0], "stride": convolutions[0].stride[0]}
    sizes["num_channels"] = [layer.out_channels for layer in convolutions]
    *_, last, activation = encoder.net
    return {"shape": encoder.shape, "out_features": last.out_features, "activation": activation, **sizes}


def _of_head(head: Head) -> dict[str, Any]:
    *hidden, last = head.layers[1::2]
    sizes = {"in_features": head.in_features, "out_features": last.out_features, "skip_size": head.skip_size}
    return {**sizes, **_of_layers(hidden, head.layers[0]), "init_range": 0.0}


def _of_rnn(rnn: nn.RNNBase) -> dict[str, int]:
    return {name: getattr(rnn, name) for name in ("input_size", "hidden_size", "num_layers")}


def _of_sequential(net: nn.Sequential) -> dict[str, list]:
    modules, names = list(net), list(net._modules)
    return {"modules": modules} if names == _numbers(modules) else {"modules": modules, "names": names}


def _sequential(modules: list[nn.Module], names: list[str] | None = None) -> nn.Sequential:
    return nn.Sequential(OrderedDict(zip(names or _numbers(modules), modules, strict=True)))


def _numbers(modules: list[nn.Module]) -> list[str]:
    return list(map(str, range(len(modules))))


#: Their constructors are given what makes an activation, where others are given the module.
_OF_LAYERS = (MLPEncoder, ConvEncoder, Head)
_TORCH = (nn.Linear, nn.Conv2d, nn.Flatten, nn.LayerNorm, nn.Identity, nn.Dropout)
_ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.ELU, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Sigmoid, nn.Softplus, nn.Mish)
for _cls in (*_TORCH, *_ACTIVATIONS):
    register_part(_cls, _as_constructed)
register_part(nn.Sequential, _of_sequential)
register_part(RunningNorm, lambda norm: {"size": len(norm.mean), "clip": norm.clip})
register_part(MLPEncoder, lambda mlp: {"shape": mlp.shape, **_of_layers(mlp.layers[::2], mlp.layers[1])})
register_part(
    ImageEncoder,
    lambda encoder: {"net": encoder.net, "shape": encoder.shape, **({} if encoder.scale else {"scale": False})},
)
register_part(ConvEncoder, _of_images)
register_part(Concat, lambda _: {})
register_part(Head, _of_head)
register_part(SkipHead, lambda head: {"head": head.head, "detach": head.detach})
register_part(Gaussian, lambda head: {"mean": head.mean, "action_dim": len(head.log_std), "init_log_std": 0.0})
register_part(GRUCore, lambda core: _of_rnn(core.gru))
register_part(LSTMCore, lambda core: _of_rnn(core.lstm))
