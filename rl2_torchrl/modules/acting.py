"""A policy as a list of functions on named tensors, for acting step by step: no TensorDict but for a module that wants one.

`acting_parts` takes a `TensorDictSequential` apart into its modules. What each of them does at one step is asked of itself: a
module with a ``step_function`` (our cores, heads, `RunningNorm`) brings it, its `forward` without gradient, which is asked for anew
before each batch, so that it may hold on to the weights as they are; a distribution acts by the functions of its
`ActionDistribution`; a plain `TensorDictModule` is called on its tensors, every other module with a TensorDict of all
there is: so is a distribution with a ``generator`` of its own, which no checkpoint holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from tensordict import NestedKey, TensorDict
from tensordict.nn import InteractionType, ProbabilisticTensorDictModule, TensorDictModuleBase
from tensordict.nn.probabilistic import interaction_type
from torch import Tensor
from torchrl.modules import SafeProbabilisticModule

from rl2_torchrl.gradients.networks import leaves_of
from rl2_torchrl.gradients.part import (
    IGNORED,
    State,
    brings,
    entries_of,
    has_hooks,
    is_bare,
    is_function,
    on_copies,
    outputs_of,
)
from rl2_torchrl.modules.actor_critic import hidden_keys
from rl2_torchrl.modules.distributions import ActionDistribution, distribution_of

__all__ = ["ActingPart", "Run", "State", "acting_parts", "dtype_of", "on_state", "step_of"]

Run = Callable[[State], None]
Function = Callable[..., Tensor | tuple[Tensor, ...]]
_SAMPLES = (ProbabilisticTensorDictModule.forward, SafeProbabilisticModule.forward)


@dataclass(frozen=True)
class ActingPart:
    """What one module does at a step, on entries ``[N, ...]``.

    ``make`` gives, from the number of steps of a batch, the function on a `State`. It is made anew for each batch: it may hold on
    to the weights as they are, and to the noise of all steps. Where it has an ``is_kernels`` that is True, it does what kernels
    do on memory of `Workspace`, and what more it does by `Recording.made`, or says so by its ``interrupt``; so does ``make``.
    ``way`` says how the module is called.
    ``later`` is what can wait until it is asked for: a distribution's log-probability.
    """

    module: TensorDictModuleBase
    in_keys: list[NestedKey]
    out_keys: list[NestedKey]
    make: Callable[[int], Run]
    way: str
    later: ActingPart | None = None

    @property
    def can_wait(self) -> bool:
        """Whether many steps can be looked at together, as rows of one call: the module hands nothing on, nor counts its calls."""
        names = {name for m in self.module.modules() if m.training for name in m._buffers}
        counts = any(name.startswith(("running_", "num_batches")) for name in names)  # as BatchNorm and its kin have it
        return self.way == "tensors" and not hidden_keys(self.module) and not counts


def acting_parts(module: TensorDictModuleBase) -> list[ActingPart]:
    """The parts of ``module``, in order."""
    return [_part(leaf) for leaf in leaves_of(module)]


def _part(module: TensorDictModuleBase) -> ActingPart:
    has_generator = any(getattr(module, name, None) is not None for name in ("_generator", "_generator_key"))
    is_plain_sample = type(module).forward in _SAMPLES and not has_hooks(module) and not has_generator
    is_core, in_keys = brings(module, "step_function"), module.in_keys
    if is_plain_sample and not is_core and (distribution := distribution_of(module)) is not None:
        return _distribution(module, distribution)
    written = [key for key in module.out_keys if key != IGNORED]
    if is_core or is_function(module):
        # A rollout resets the memory itself: the core need not see where trials begin.
        way, in_keys = ("core", in_keys[:-1]) if is_core else ("tensors", in_keys)
        return ActingPart(module, in_keys, written, lambda _: on_state(step_of(module), in_keys, module.out_keys), way)
    return ActingPart(module, in_keys, written, lambda _: _on_tensordict(module), "tensordict")


def step_of(module: TensorDictModuleBase, *, compiled: bool = True) -> Function | None:
    """One step of ``module`` as a function of its entries, a core's but for ``"is_init"``; None where it wants a TensorDict.

    ``compiled``: by a function of its own, which may hold on to the weights as they are; else in PyTorch's operations alone.
    """
    if brings(module, "step_function"):
        return module.step_function() if compiled else partial(_plain_step, module)
    if not is_function(module):
        return None
    function = module.module
    if compiled and brings(function, "step_function") and is_bare(function):
        function = function.step_function()
    return on_copies(function, module.module)


def _plain_step(core: TensorDictModuleBase, x: Tensor, *memory: Tensor) -> tuple[Tensor, ...]:
    return core.step(x.to(dtype_of(memory)), *memory)


def dtype_of(memory: Iterable[Tensor]) -> torch.dtype:
    """That of its reals."""
    return next((m.dtype for m in memory if m.is_floating_point()), torch.float32)


def on_state(function: Function, in_keys: Sequence[NestedKey], out_keys: Sequence[NestedKey]) -> Run:
    """``function``, which reads and writes entries ``[N, ...]`` of a `State`."""

    def run(state: State) -> None:
        outputs = outputs_of(function(*entries_of(state, in_keys, dims=1)), out_keys)
        for key, out in zip(out_keys, outputs, strict=True):
            if key != IGNORED:
                state[key] = out

    run.is_kernels = getattr(function, "is_kernels", False)
    return run


def _distribution(module: ProbabilisticTensorDictModule, distribution: ActionDistribution) -> ActingPart:
    in_keys, later = module.in_keys, None
    action_key = next(key for key in module.out_keys if key not in module.log_prob_keys)

    def make(steps: int) -> Run:
        kind = interaction_type() or module.default_interaction_type
        if kind not in (InteractionType.RANDOM, InteractionType.DETERMINISTIC):
            return _on_tensordict(module)
        act = distribution.sampler(steps) if kind is InteractionType.RANDOM else distribution.mode

        def run(state: State) -> None:
            state[action_key] = act(*[state[key] for key in in_keys])

        run.is_kernels = getattr(act, "is_kernels", False)
        return run

    def log_prob(*acted: Tensor) -> Tensor:
        return distribution.log_prob_and_entropy(*acted)[0]

    if module.return_log_prob:
        keys = [action_key, *in_keys], [module.log_prob_key]
        later = ActingPart(module, *keys, lambda _: on_state(log_prob, *keys), "distribution")
    return ActingPart(module, in_keys, [action_key], make, "distribution", later)


def _on_tensordict(module: TensorDictModuleBase) -> Run:
    def run(state: State) -> None:
        written = module(TensorDict(state, batch_size=[len(next(iter(state.values())))]))
        state.update((key, value) for key, value in written.items(True, True) if value is not state.get(key))

    return run
