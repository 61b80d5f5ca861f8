"""`Part`: one function of a network, forward and back; `AutogradPart`: any function of tensors as a part."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import nn

__all__ = [
    *("AutogradPart", "DataPart", "Part", "State", "accumulate", "entries_of", "on_entries"),
    *("has_hooks", "is_bare", "is_function", "runs"),
]

#: Named tensors: entries ``[N, T, ...]`` of a minibatch, what networks make of them, or gradients by them.
State = dict[NestedKey, torch.Tensor]


class Part:
    """One function of a network, from entries ``in_keys`` to entries ``out_keys``, with its gradient.

    What derives from it says `run`, and its gradient is autograd's, for that alone; or `forward` and `backward` too.

    Attributes:
        reason: why its gradient is autograd's, in words; None where it brings its own.
        wanted: those of ``in_keys`` that carry a gradient, as they are made from parameters. Whoever runs the part sets it.
    """

    reason: str | None = None

    def __init__(
        self, in_keys: Sequence[NestedKey], out_keys: Sequence[NestedKey], parameters: Iterable[nn.Parameter] = ()
    ):
        self.in_keys, self.out_keys = list(in_keys), list(out_keys)
        self.wanted: set[NestedKey] = set()
        self._parameters = list(dict.fromkeys(parameters))

    @property
    def kind(self) -> str:
        """``"kernel"`` where it brings its own gradient, ``"autograd"`` where PyTorch makes it."""
        return "autograd" if type(self).backward is Part.backward else "kernel"

    def parameters(self) -> list[nn.Parameter]:
        """Its parameters, each once."""
        return self._parameters

    def bind(self, gradients: Mapping[int, torch.Tensor]) -> None:
        """Takes the memory that `backward` writes the gradients of the parameters to, by their id."""
        self._trained = [p for p in self.parameters() if p.requires_grad]
        self._memory = [gradients[id(p)] for p in self._trained]

    def run(self, state: State) -> None:
        """Reads entries ``[N, T, ...]`` of ``state`` and writes others, as ordinary PyTorch: autograd can follow, if it is on."""
        raise NotImplementedError

    def forward(self, state: State) -> None:
        """As `run`, where autograd is off, as it is for `backward`; keeps what that needs."""
        self._leaves = {key: state[key].detach().requires_grad_() for key in self.in_keys if key in self.wanted}
        entries = {**state, **self._leaves}
        with torch.enable_grad():
            self.run(entries)
        self._outputs = [entries[key] for key in self.out_keys]
        state.update((key, out.detach()) for key, out in zip(self.out_keys, self._outputs, strict=True))

    def backward(self, state: State, gradients: State) -> None:
        """Takes the gradients by ``out_keys`` out of ``gradients`` and adds to those by ``wanted``; writes the parameters'."""
        slopes = [gradients.pop(key, None) for key in self.out_keys]
        ends = zip(self._outputs, slopes, strict=True)
        ends = [(out, slope) for out, slope in ends if slope is not None and out.requires_grad]
        sources, self._outputs = [*self._leaves.values(), *self._trained], []
        found: Sequence[torch.Tensor | None] = [None] * len(sources)
        if ends and sources:
            outs, slopes = zip(*ends, strict=True)
            found = torch.autograd.grad(outs, sources, slopes, allow_unused=True)
        for key, gradient in zip(self._leaves, found, strict=False):
            if gradient is not None:
                # Others add to it in place: it may be no view of another's.
                accumulate(gradients, key, gradient.clone() if len(self._leaves) > 1 else gradient.contiguous())
        by_parameters = list(zip(self._memory, found[len(self._leaves) :], strict=True))
        known = [pair for pair in by_parameters if pair[1] is not None]
        if len(known) < len(self._memory):
            torch._foreach_zero_(self._memory)
        if known:
            torch._foreach_copy_(*map(list, zip(*known, strict=True)))


class AutogradPart(Part):
    """Any function of tensors, from the entries ``in_keys`` (None for one of ``optional`` that is missing) to ``out_keys``."""

    def __init__(self, module: Callable, in_keys, out_keys, *, parameters=None, optional=(), reason: str | None = None):
        if parameters is None:
            parameters = module.parameters() if isinstance(module, nn.Module) else ()
        super().__init__(in_keys, out_keys, parameters)
        self.module, self.optional, self.reason = module, frozenset(optional), reason

    def run(self, state: State) -> None:
        outputs = self.module(*entries_of(state, self.in_keys, self.optional))
        state.update(zip(self.out_keys, outputs if isinstance(outputs, tuple) else (outputs,), strict=True))


class DataPart(AutogradPart):
    """A function without parameters that mostly reads data, so that there is nothing to differentiate."""

    kind = "kernel"


def accumulate(gradients: State, key: NestedKey, gradient: torch.Tensor) -> None:
    """Adds ``gradient``, whose memory is the caller's to give away, to the one under ``key``."""
    if key in gradients:
        gradients[key].add_(gradient)
    else:
        gradients[key] = gradient


def entries_of(state: State, keys: Sequence[NestedKey], optional: Container[NestedKey] = ()) -> list:
    """The entries ``keys`` of ``state``, None for an optional one that is missing; KeyError where it is another."""
    missing = [key for key in keys if key not in state and key not in optional]
    if missing:
        raise KeyError(
            f"{missing} is read by the networks or the loss, but neither in the data nor made by what runs before; there is "
            f"{sorted(map(str, state))}. What the collector keeps must hold it: TrialCollector(keep=update.in_keys)."
        )
    return list(map(state.get, keys))


def on_entries(sequence: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A core's ``sequence(x, memory, is_init)`` as a function of its entries ``x, *memory, is_init`` ``[N, T, ...]``.

    An ``is_init`` of None says that no trial starts after the first step.
    """

    def run(x: torch.Tensor, *memory_and_init: torch.Tensor | None) -> torch.Tensor:
        *memory, is_init = memory_and_init
        is_init = None if is_init is None else is_init.squeeze(-1)
        return sequence(x, None if any(m is None for m in memory) else tuple(memory), is_init)

    return run


# ------------------------------------------------------ what is called as it is written
def has_hooks(module: nn.Module) -> bool:
    """Whether ``module`` itself has hooks on its forward, or another function in its place."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def is_bare(module: nn.Module) -> bool:
    """Whether nobody has hung a hook on ``module`` or those in it, or put another function in the place of one's forward."""
    return not any(has_hooks(m) or m._backward_hooks or m._backward_pre_hooks for m in module.modules())


def runs(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether ``module`` does what ``cls`` does: no forward of a subclass, no parametrized weights."""
    return type(module).forward is cls.forward and "parametrizations" not in module._modules


def is_function(module: TensorDictModuleBase) -> bool:
    """Whether ``module`` is its inner one on the entries that it reads, and nothing more."""
    if not isinstance(module, TensorDictModule) or not runs(module, TensorDictModule) or has_hooks(module):
        return False
    return not (module._kwargs is not None or module.method_kwargs or module.method or module._get_kwargs)
