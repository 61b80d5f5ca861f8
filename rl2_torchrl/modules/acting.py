"""A policy as a list of functions on named tensors, for acting step by step: no TensorDict but for a module that wants one.

`acting_parts` takes a `TensorDictSequential` apart into its modules. What each of them does at one step is asked of itself: a
module with a ``step_function`` brings it (our cores), a distribution acts by the functions of its `ActionDistribution`, a plain
`TensorDictModule` is called on its tensors; every other module is called with a TensorDict, as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import unwrap

import torch
from tensordict import NestedKey, TensorDict
from tensordict.nn import (
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from tensordict.nn.probabilistic import InteractionType, interaction_type
from torchrl.modules import SafeProbabilisticModule

from rl2_torchrl.gradients.part import is_bare
from rl2_torchrl.modules.actor_critic import hidden_keys
from rl2_torchrl.modules.distributions import ActionDistribution, distribution_of

__all__ = ["ActingPart", "State", "acting_parts"]

#: Named tensors: entries ``[N, ...]`` of one step.
State = dict[NestedKey, torch.Tensor]


@dataclass(frozen=True)
class ActingPart:
    """What one module does at a step.

    Args:
        module: the module.
        in_keys: entries that it reads.
        out_keys: entries that it writes.
        make: from the number of steps of a batch, the function on a `State`. It is made anew for each batch: it may hold on to
            the weights as they are, and to the noise of all steps.
        way: how the module is called.
        log_prob: for a distribution: the same for the log-probability, which can wait until it is asked for.
        log_prob_key: where that stands.
    """

    module: TensorDictModuleBase
    in_keys: list[NestedKey]
    out_keys: list[NestedKey]
    make: Callable[[int], Callable[[State], None]]
    way: str
    log_prob: Callable[[State], None] | None = None
    log_prob_key: NestedKey | None = None

    @property
    def can_wait(self) -> bool:
        """Whether many steps can be looked at together, as rows of one call: the module hands nothing on."""
        return self.way == "tensors" and not hidden_keys(self.module)


def acting_parts(module: TensorDictModuleBase) -> list[ActingPart]:
    """The parts of ``module``, in order."""
    if _has_hooks(module):
        return [_with_tensordict(module)]
    if type(module).forward in (TensorDictSequential.forward, ProbabilisticTensorDictSequential.forward):
        return [part for child in module.module for part in acting_parts(child)]
    # Of the class: a TensorDictModule passes on what its inner module has.
    if hasattr(type(module), "step_function") and _steps_as_forward(module):
        return [_core(module)]
    if type(module).forward in (ProbabilisticTensorDictModule.forward, SafeProbabilisticModule.forward):
        distribution = distribution_of(module)
        return [_with_tensordict(module) if distribution is None else _distribution(module, distribution)]
    if _is_function_of_tensors(module):
        return [ActingPart(module, module.in_keys, module.out_keys, lambda _: _on_tensors(module), "tensors")]
    return [_with_tensordict(module)]


def _has_hooks(module: TensorDictModuleBase) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _steps_as_forward(module: TensorDictModuleBase) -> bool:
    """Whether ``step_function`` speaks of the ``forward`` that is called: a class below the one that brings it may have its own."""
    brings = next(n for n, cls in enumerate(type(module).__mro__) if "step_function" in vars(cls))
    written = next(cls for cls in type(module).__mro__[brings:] if "forward" in vars(cls))
    return unwrap(type(module).forward) is unwrap(vars(written)["forward"])


def _is_function_of_tensors(module: TensorDictModuleBase) -> bool:
    """Whether ``module`` is a function from entries to entries and nothing more."""
    is_plain = isinstance(module, TensorDictModule) and type(module).forward is TensorDictModule.forward
    return is_plain and module._kwargs is None and not module.method_kwargs and module.method is None


def _on_tensors(module: TensorDictModule) -> Callable[[State], None]:
    function, in_keys, out_keys = module.module, module.in_keys, module.out_keys
    if hasattr(function, "step_function") and is_bare(function):
        function = function.step_function()

    def run(state: State) -> None:
        out = function(*[state[key] for key in in_keys])
        if len(out_keys) == 1:
            state[out_keys[0]] = out if isinstance(out, torch.Tensor) else out[0]
        else:
            state.update(zip(out_keys, out, strict=True))

    return run


def _core(module: TensorDictModuleBase) -> ActingPart:
    in_key, *memory_keys, _ = module.in_keys
    out_key, *next_keys = module.out_keys

    def make(_: int) -> Callable[[State], None]:
        step = module.step_function()

        def run(state: State) -> None:
            state[out_key], *handed_on = step(state[in_key], *[state.get(key) for key in memory_keys])
            state.update(zip(next_keys, handed_on, strict=True))

        return run

    # A rollout resets the memory itself: the core need not see where trials begin.
    return ActingPart(module, [in_key, *memory_keys], module.out_keys, make, "core")


def _distribution(module: ProbabilisticTensorDictModule, distribution: ActionDistribution) -> ActingPart:
    in_keys, log_prob_key = module.in_keys, module.log_prob_key if module.return_log_prob else None
    action_key = next(key for key in module.out_keys if key not in module.log_prob_keys)

    def make(steps: int) -> Callable[[State], None]:
        kind = interaction_type() or module.default_interaction_type
        if kind not in (InteractionType.RANDOM, InteractionType.DETERMINISTIC):
            return _tensordict_function(module)
        act = distribution.sampler(steps) if kind is InteractionType.RANDOM else distribution.mode

        def run(state: State) -> None:
            state[action_key] = act(*[state[key] for key in in_keys])

        return run

    def log_prob(state: State) -> None:
        parameters = [state[key] for key in in_keys]
        state[log_prob_key], _ = distribution.log_prob_and_entropy(state[action_key], *parameters)

    return ActingPart(module, in_keys, [action_key], make, "distribution", log_prob, log_prob_key)


def _with_tensordict(module: TensorDictModuleBase) -> ActingPart:
    return ActingPart(module, module.in_keys, module.out_keys, lambda _: _tensordict_function(module), "tensordict")


def _tensordict_function(module: TensorDictModuleBase) -> Callable[[State], None]:
    in_keys, out_keys = module.in_keys, module.out_keys

    def run(state: State) -> None:
        read = {key: state[key] for key in in_keys if key in state}
        rows = len(next(iter(read.values())))
        written = module(TensorDict(read, batch_size=[rows]))
        state.update((key, written.get(key)) for key in out_keys if written.get(key, None) is not None)

    return run
