"""A policy as a list of functions on named tensors, for acting step by step: no TensorDict but for a module that wants one.

`acting_parts` takes a `TensorDictSequential` apart into its modules. What each of them does at one step is asked of itself: a
module with a ``step_function`` (our cores, heads, `RunningNorm`) brings it, its `forward` without gradient, which is asked for anew
before each batch, so that it may hold on to the weights as they are; a distribution acts by the functions of its
`ActionDistribution`; a plain `TensorDictModule` is called on its tensors, every other module with a TensorDict of all there is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from weakref import WeakSet

from tensordict import NestedKey, TensorDict
from tensordict.nn import InteractionType, ProbabilisticTensorDictModule, TensorDictModule, TensorDictModuleBase
from tensordict.nn.probabilistic import interaction_type
from torchrl.modules import SafeProbabilisticModule

from rl2_torchrl.gradients.networks import leaves_of, scores_alone
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
from rl2_torchrl.modules.distributions import ActionDistribution, distribution_of, stands_for

__all__ = ["ActingPart", "State", "acting_parts", "tell_of_generators"]

log = logging.getLogger(__name__)
_TOLD: WeakSet[ProbabilisticTensorDictModule] = WeakSet()

Run = Callable[[State], None]
_SAMPLES = (ProbabilisticTensorDictModule.forward, SafeProbabilisticModule.forward)


@dataclass(frozen=True)
class ActingPart:
    """What one module does at a step, on entries ``[N, ...]``.

    ``make`` gives, from the number of steps of a batch, the function on a `State`. It is made anew for each batch: it may hold on
    to the weights as they are, and to the noise of all steps. ``way`` says how the module is called. ``later`` is what can wait
    until it is asked for: a distribution's log-probability.
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
    given = scores_alone(module)
    parts = [_part(leaf, draws=all(leaf is not each for each in given)) for leaf in leaves_of(module)]
    return [part for part in parts if part is not None]


def _part(module: TensorDictModuleBase, *, draws: bool) -> ActingPart | None:
    is_plain_sample = type(module).forward in _SAMPLES and not has_hooks(module)
    if brings(module, "step_function"):
        # A rollout resets the memory itself: the core need not see where trials begin.
        return ActingPart(module, module.in_keys[:-1], module.out_keys, lambda _: _core(module), "core")
    if is_plain_sample and (distribution := distribution_of(module)) is not None:
        acts = _distribution(module, distribution)
        return acts if draws else acts.later
    written = [key for key in module.out_keys if key != IGNORED]
    if is_function(module):
        return ActingPart(module, module.in_keys, written, lambda _: _on_tensors(module), "tensors")
    call = module if draws else partial(module, _requires_sample=False)
    return ActingPart(module, module.in_keys, written, lambda _: _on_tensordict(call), "tensordict")


def tell_of_generators(parts: Iterable[ActingPart]) -> None:
    """Logs, once, that a generator of a distribution's own, or one that it would find in the TensorDict, is not drawn from."""
    for part in parts:
        module = part.module
        is_drawn = part.way == "distribution" and not set(part.out_keys) <= set(module.log_prob_keys)
        is_given = any(getattr(module, name, None) is not None for name in ("_generator", "_generator_key"))
        if not is_drawn or not is_given or module in _TOLD:
            continue
        _TOLD.add(module)
        log.warning(
            "the policy's own generator= is not drawn from, since no checkpoint would hold it: actions come from PyTorch's default "
            "one, which torch.manual_seed seeds, checkpoints hold and evaluations put back."
        )


def _on_tensors(module: TensorDictModule) -> Run:
    function, in_keys, out_keys = module.module, module.in_keys, module.out_keys
    if brings(function, "step_function") and is_bare(function):
        function = function.step_function()
    function = on_copies(function, module.module)

    def run(state: State) -> None:
        out = function(*entries_of(state, in_keys, dims=1))
        state.update(zip(out_keys, outputs_of(out, out_keys), strict=True))
        state.pop(IGNORED, None)

    return run


def _core(module: TensorDictModuleBase) -> Run:
    in_key, *memory_keys, _ = module.in_keys
    out_key, *next_keys = module.out_keys
    step = module.step_function()

    def run(state: State) -> None:
        state[out_key], *handed_on = step(state[in_key], *[state.get(key) for key in memory_keys])
        state.update(zip(next_keys, handed_on, strict=True))

    return run


def _distribution(module: ProbabilisticTensorDictModule, distribution: ActionDistribution) -> ActingPart:
    in_keys, later = module.in_keys, None
    action_key = next(key for key in module.out_keys if key not in module.log_prob_keys)
    is_own = stands_for(distribution, "sampler", "act", "mode")
    sampler = distribution.sampler if is_own else lambda _: distribution.act

    def make(steps: int) -> Run:
        kind = interaction_type() or module.default_interaction_type
        if kind not in (InteractionType.RANDOM, InteractionType.DETERMINISTIC):
            return _on_tensordict(module)
        act = sampler(steps) if kind is InteractionType.RANDOM else distribution.mode

        def run(state: State) -> None:
            state[action_key] = act(*[state[key] for key in in_keys])

        return run

    def log_prob(state: State) -> None:
        parameters = [state[key] for key in in_keys]
        state[module.log_prob_key], _ = distribution.log_prob_and_entropy(state[action_key], *parameters)

    if module.return_log_prob:
        read = [*in_keys, action_key]
        later = ActingPart(module, read, [module.log_prob_key], lambda _: log_prob, "distribution")
    return ActingPart(module, in_keys, [action_key], make, "distribution", later)


def _on_tensordict(module: Callable[[TensorDict], TensorDict]) -> Run:
    def run(state: State) -> None:
        written = module(TensorDict(state, batch_size=[len(next(iter(state.values())))]))
        state.update((key, value) for key, value in written.items(True, True) if value is not state.get(key))

    return run
