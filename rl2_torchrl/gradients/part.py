"""`Part`: one function of a network, forward and back. `AutogradPart` takes any; those that know their gradient derive from it."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from tensordict import NestedKey
from torch import nn

__all__ = ["AutogradPart", "DataPart", "Part", "State", "accumulate", "entries_of", "is_bare", "on_entries", "runs"]

#: Named tensors: entries ``[N, T, ...]`` of a minibatch, what networks make of them, or gradients by them.
State = dict[NestedKey, torch.Tensor]


class Part:
    """One function of a network, from entries to entries, with its gradient.

    Args:
        in_keys: entries that it reads.
        out_keys: entries that it writes.

    Attributes:
        kind: ``"kernel"`` where it brings its own gradient, ``"autograd"`` where PyTorch makes it.
        reason: why it is not the former, in words; None where it is.
        wanted: those of ``in_keys`` that carry a gradient, as they are made from parameters. Whoever runs the part sets it.
    """

    kind: str = "kernel"
    reason: str | None = None

    def __init__(self, in_keys: Sequence[NestedKey], out_keys: Sequence[NestedKey]):
        self.in_keys, self.out_keys = list(in_keys), list(out_keys)
        self.wanted: set[NestedKey] = set()

    def parameters(self) -> list[nn.Parameter]:
        """Its parameters, each once."""
        return []

    def bind(self, gradients: Mapping[int, torch.Tensor]) -> None:
        """Takes the memory that `backward` writes the gradients of the parameters to, by their id."""

    def run(self, state: State) -> None:
        """Forward as ordinary PyTorch, so that autograd can follow, if it is on."""
        raise NotImplementedError

    def forward(self, state: State) -> None:
        """Reads entries ``[N, T, ...]`` of ``state`` and writes others; keeps what `backward` needs.

        It is called where autograd is off, as is `backward`.
        """
        raise NotImplementedError

    def backward(self, state: State, gradients: State) -> None:
        """Takes the gradients by ``out_keys`` out of ``gradients`` and adds to those by ``wanted``; writes the parameters'."""
        raise NotImplementedError


class AutogradPart(Part):
    """Any function of tensors, run under autograd for itself alone.

    Args:
        module: from the entries ``in_keys`` (None for one that is missing) to those of ``out_keys``: a module or a function.
        in_keys: entries that it reads.
        out_keys: entries that it writes.
        parameters: those that it has; of ``module`` by default.
        optional: those of ``in_keys`` that need not be there.
        reason: why its gradient is autograd's.

    Examples:
        >>> part = AutogradPart(nn.Linear(2, 1), ["x"], ["y"])
        >>> state = {"x": torch.ones(1, 1, 2)}
        >>> part.bind({id(p): torch.empty_like(p) for p in part.parameters()})
        >>> part.forward(state)
        >>> part.backward(state, {"y": torch.ones(1, 1, 1)})
        >>> part.gradient_of(part.parameters()[0])  # of y = w x + b by w
        tensor([[1., 1.]])
    """

    kind = "autograd"

    def __init__(
        self,
        module: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
        in_keys: Sequence[NestedKey],
        out_keys: Sequence[NestedKey],
        *,
        parameters: Iterable[nn.Parameter] | None = None,
        optional: Sequence[NestedKey] = (),
        reason: str | None = None,
    ):
        super().__init__(in_keys, out_keys)
        if parameters is None:
            parameters = module.parameters() if isinstance(module, nn.Module) else ()
        self.module, self.optional = module, frozenset(optional)
        self._parameters = list({id(p): p for p in parameters}.values())
        self._gradients: Mapping[int, torch.Tensor] = {}
        self.reason = reason

    def parameters(self) -> list[nn.Parameter]:
        return self._parameters

    def bind(self, gradients: Mapping[int, torch.Tensor]) -> None:
        self._gradients = gradients
        self._trained = [p for p in self._parameters if p.requires_grad]

    def gradient_of(self, parameter: nn.Parameter) -> torch.Tensor:
        """The memory that the gradient of ``parameter`` is written to."""
        return self._gradients[id(parameter)]

    def run(self, state: State) -> None:
        outputs = self.module(*entries_of(state, self.in_keys, self.optional))
        state.update(zip(self.out_keys, outputs if isinstance(outputs, tuple) else (outputs,), strict=True))

    @torch.enable_grad()
    def forward(self, state: State) -> None:
        inputs = dict(zip(self.in_keys, entries_of(state, self.in_keys, self.optional), strict=True))
        self._leaves = {key: inputs[key].detach().requires_grad_() for key in inputs.keys() & self.wanted}
        outputs = self.module(*[self._leaves.get(key, inputs[key]) for key in self.in_keys])
        self._outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        state.update((key, out.detach()) for key, out in zip(self.out_keys, self._outputs, strict=True))

    def backward(self, state: State, gradients: State) -> None:
        slopes = [gradients.pop(key, None) for key in self.out_keys]
        pairs = [
            (out, slope)
            for out, slope in zip(self._outputs, slopes, strict=True)
            if slope is not None and out.requires_grad
        ]
        self._outputs = ()
        sources = [*self._leaves.values(), *self._trained]
        found = [None] * len(sources)
        if pairs and sources:
            outs, slopes = zip(*pairs, strict=True)
            with _without_hooks(self._trained):
                found = torch.autograd.grad(outs, sources, slopes, allow_unused=True)
        for key, gradient in zip(self._leaves, found, strict=False):
            if gradient is not None:
                # Others add to it in place: it may be no view of another's.
                accumulate(gradients, key, gradient.clone() if len(self._leaves) > 1 else gradient.contiguous())
        self._write(found[len(self._leaves) :])

    def _write(self, found: Sequence[torch.Tensor | None]) -> None:
        memory = [self._gradients[id(p)] for p in self._trained]
        known = [(to, gradient) for to, gradient in zip(memory, found, strict=True) if gradient is not None]
        if len(known) < len(memory):
            torch._foreach_zero_(memory)
        if known:
            torch._foreach_copy_([to for to, _ in known], [gradient for _, gradient in known])


class DataPart(AutogradPart):
    """A function of data that has no parameters, such as a normalisation: nothing is differentiated, unless a gradient is wanted."""

    kind = "kernel"


@contextmanager
def _without_hooks(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Hooks on a parameter's gradient wait for the whole of it, which other parts may add to."""
    hooks = [(p._backward_hooks, dict(p._backward_hooks)) for p in parameters if p._backward_hooks]
    for kept, _ in hooks:
        kept.clear()
    try:
        yield
    finally:
        for kept, content in hooks:
            kept.update(content)


def accumulate(gradients: State, key: NestedKey, gradient: torch.Tensor) -> None:
    """Adds ``gradient``, whose memory is the caller's to give away, to the one under ``key``."""
    if key in gradients:
        gradients[key].add_(gradient)
    else:
        gradients[key] = gradient


def entries_of(state: State, keys: Sequence[NestedKey], optional: Container[NestedKey] = ()) -> list:
    """The entries ``keys`` of ``state``, None for an optional one that is missing.

    Raises:
        KeyError: another one is missing.
    """
    entries = list(map(state.get, keys))
    missing = [key for key, entry in zip(keys, entries, strict=True) if entry is None and key not in optional]
    if missing:
        raise KeyError(
            f"{missing} is read by the networks or the loss, but neither in the data nor made by what runs before; there is "
            f"{sorted(map(str, state))}. What the collector keeps must hold it: TrialCollector(keep=update.in_keys)."
        )
    return entries


def on_entries(sequence: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A core's ``sequence(x, memory, is_init)`` as a function of its entries ``x, *memory, is_init`` ``[N, T, ...]``."""

    def run(x: torch.Tensor, *memory_and_init: torch.Tensor | None) -> torch.Tensor:
        *memory, is_init = memory_and_init
        given = tuple(memory) if all(m is not None for m in memory) else None
        return sequence(x, given, is_init.squeeze(-1))

    return run


def is_bare(module: nn.Module) -> bool:
    """Whether nobody has hung a hook on ``module`` or those in it, or put another function in the place of one's forward."""
    for part in module.modules():
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            return False
        if "forward" in vars(part):
            return False
    return True


def runs(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether ``module`` does what ``cls`` does: no forward of a subclass, no parametrized weights.

    Examples:
        >>> runs(nn.Linear(2, 3), nn.Linear), runs(nn.Linear(2, 3), nn.ReLU)
        (True, False)
    """
    return type(module).forward is cls.forward and "parametrizations" not in module._modules
