"""`Part`: one function of a network, forward and back."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from inspect import unwrap

import torch
from tensordict import NestedKey, TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torch import nn

from rl2_torchrl import kernels
from rl2_torchrl.kernels.recording import ChangedError, Recording
from rl2_torchrl.kernels.workspace import Workspace

__all__ = [
    *("IGNORED", "Gradients", "Part", "State", "accumulate", "entries_of", "in_python", "laid_as", "on_copies"),
    *("brings", "has_hooks", "is_bare", "is_function", "is_watched", "on_entries", "others_than", "outputs_of", "runs"),
]

#: Named tensors: entries ``[N, T, ...]`` of a minibatch, and what networks make of them.
State = dict[NestedKey, torch.Tensor]
#: Under this name a `TensorDictModule` drops an output.
IGNORED = "_"
#: Gradients by entries and by parameters.
Gradients = dict[NestedKey | nn.Parameter, torch.Tensor]


class Part:
    """One function of a network, from entries ``in_keys`` to entries ``out_keys``, with its gradient: autograd's, for it alone.

    What derives from it may bring its own, by `forward_by_hand` and `backward_by_hand`. Those of this package, while a `Recording`
    is on, do no more than kernels on memory of `Workspace`, and all else by `Recording.work` and `Recording.made`.

    Args:
        function: from tensors, None for those of ``optional`` that are missing, to a tensor or a tuple of them.
        in_keys: entries that it reads.
        out_keys: entries that it writes.
        parameters: its parameters; by default those of ``function``, if it is a module.
        optional: those of ``in_keys`` that may be missing.
        reason: why its gradient is autograd's, in words; None where it brings its own, or reads data alone.

    Attributes:
        wanted: those of ``in_keys`` that carry a gradient, as they are made from parameters; `start` sets it.
        sources: parameters by which autograd looks for a gradient, by default ``parameters``. Whoever runs the part adds those
            that its function may reach without owning them.
        carries: whether ``out_keys`` carry a gradient, after `forward`: also by parameters of others that its function reaches.
        dtypes: in which it reads some of ``in_keys`` by hand; its function converts them itself.
        is_by_hand: whether the last `forward` was that by hand.
    """

    def __init__(
        self,
        function: Callable[..., torch.Tensor | tuple[torch.Tensor, ...]],
        in_keys: Sequence[NestedKey],
        out_keys: Sequence[NestedKey],
        *,
        parameters: Iterable[nn.Parameter] | None = None,
        optional: Iterable[NestedKey] = (),
        reason: str | None = None,
    ):
        self.function, self.in_keys, self.out_keys = function, list(in_keys), list(out_keys)
        if parameters is None:
            parameters = function.parameters() if isinstance(function, nn.Module) else ()
        self.parameters, self.optional, self.reason = list(dict.fromkeys(parameters)), frozenset(optional), reason
        self.wanted: set[NestedKey] = set()
        self.sources, self.carries = self.parameters, False
        self.dtypes: dict[NestedKey, torch.dtype] = {}
        self.is_by_hand = False

    @property
    def kind(self) -> str:
        """``"kernel"`` where it brings its own gradient, ``"autograd"`` where PyTorch makes it."""
        return "kernel" if self.reason is None else "autograd"

    def run(self, state: State) -> None:
        """Reads entries ``[N, T, ...]`` of ``state`` and writes others, as ordinary PyTorch: autograd can follow, if it is on."""
        outputs = self.function(*entries_of(state, self.in_keys, self.optional))
        state.update(zip(self.out_keys, outputs if isinstance(outputs, tuple) else (outputs,), strict=True))

    def forward_by_hand(self, state: State) -> bool:
        """As `run`, and keeps what `backward_by_hand` needs; False where this cannot be, and nothing has been written.

        What it reads may not be held beyond that: later minibatches are written to the same memory.
        """
        return False

    def backward_by_hand(self, gradients: Gradients) -> None:
        """`backward`, after a `forward_by_hand`."""

    def start(self, carrying: set[NestedKey]) -> None:
        """Before `forward`: is told which entries carry a gradient."""
        self.wanted = carrying.intersection(self.in_keys)
        self.carries = bool(self.wanted) or any(p.requires_grad for p in self.parameters)

    def forward(self, state: State) -> None:
        """As `run`, where autograd is off, as it is for `backward`; keeps what that needs."""
        self.is_by_hand = self._is_ours() and self.forward_by_hand(state)
        if not self.is_by_hand:
            state.update(in_python(self._forward_in_python, state, self.in_keys))

    def _is_ours(self) -> bool:
        """Whether a `Recording` notes all that it does by hand; one of a user's may do more."""
        return type(self).__module__.startswith("rl2_torchrl.")

    def _forward_in_python(self, state: State) -> State:
        self.is_by_hand = self.forward_by_hand(state)
        if not self.is_by_hand:
            self._forward_by_autograd(state)
        return {key: state[key] for key in self.out_keys}

    def _forward_by_autograd(self, state: State) -> None:
        carrying = [key for key in self.in_keys if key in self.wanted and state[key].is_floating_point()]
        self._leaves = {key: state[key].detach().requires_grad_() for key in carrying}
        entries = {**state, **self._leaves}
        versions = {key: state[key]._version for key in self.in_keys if key in state}
        with torch.enable_grad():
            self.run(entries)
        if written := [key for key, version in versions.items() if state[key]._version != version]:
            name = type(self.function).__name__ if self.reason is None else self.reason.partition(" ")[0]
            raise RuntimeError(
                f"{written} of a minibatch has been modified by an inplace operation of {name}, and others read it too: "
                "work on a copy."
            )
        self._outputs = [entries[key] for key in self.out_keys]
        self.carries = any(out.requires_grad for out in self._outputs)
        state.update((key, out.detach()) for key, out in zip(self.out_keys, self._outputs, strict=True))

    def backward(self, gradients: Gradients) -> None:
        """Takes the gradients by ``out_keys`` out of ``gradients``; adds those by ``wanted`` and by its parameters."""
        if self.is_by_hand and self._is_ours():
            self.backward_by_hand(gradients)
            return
        slopes = {key: gradients.pop(key) for key in self.out_keys if key in gradients}
        self._add(in_python(self._backward_in_python, slopes, slopes), gradients)

    def _backward_in_python(self, gradients: Gradients) -> Gradients:
        """What is to be added, which may lie in each other's memory, from ``gradients`` by ``out_keys``."""
        if self.is_by_hand:
            self.backward_by_hand(gradients)
            return gradients
        ends = [(out, gradients.get(key)) for key, out in zip(self.out_keys, self._outputs, strict=True)]
        ends = [(out, slope) for out, slope in ends if slope is not None and out.requires_grad]
        sources, self._outputs = [*self._leaves, *(p for p in self.sources if p.requires_grad)], []
        if not ends or not sources:
            return {}
        outs, slopes = zip(*ends, strict=True)
        found = torch.autograd.grad(outs, [self._leaves.get(s, s) for s in sources], slopes, allow_unused=True)
        return {s: gradient for s, gradient in zip(sources, found, strict=True) if gradient is not None}

    def _add(self, found: Gradients, gradients: Gradients) -> None:
        """Adds what Python has ``found``: copies, since others add to it in place, and a hook may keep it."""
        is_copy = Recording.active() is not None
        for source, gradient in found.items():
            own = gradient if is_copy else gradient.clone(memory_format=torch.contiguous_format)
            accumulate(gradients, source, own)


def in_python(run: Callable[[State], Gradients], state: State, keys: Iterable[NestedKey]) -> Gradients:
    """``run(state)``, by more than kernels; a `Recording` that is on does it again.

    It then shows copies of the entries ``keys``, which may be kept, and copies what is made to where kernels read it.

    Raises:
        ChangedError: of what is made again some is missing, more than before, or of another shape.
    """
    if Recording.active() is None:
        return run(state)
    before, made = dict(state), None
    read = [name for key in keys for name in _within(before, key)]

    def work() -> None:
        nonlocal made
        found = run({**before, **{name: before[name].clone() for name in read}})
        if made is None:
            made = {key: Workspace.take(each, tuple(each.shape)) for key, each in found.items()}
        if {key: each.shape for key, each in found.items()} != {key: each.shape for key, each in made.items()}:
            raise ChangedError
        for key, each in found.items():
            made[key].copy_(each)

    Recording.work(work)
    return made


def _within(state: State, key: NestedKey) -> list[NestedKey]:
    """The entry ``key`` of ``state``, or what lies within it."""
    path = _path(key)
    return [name for name in state if _path(name)[: len(path)] == path]


def _path(key: NestedKey) -> tuple[str, ...]:
    return key if isinstance(key, tuple) else (key,)


def accumulate(gradients: Gradients, key: NestedKey | nn.Parameter, gradient: torch.Tensor) -> None:
    """Adds ``gradient``, whose memory is the caller's to give away, to the one under ``key``."""
    if key not in gradients:
        gradients[key] = gradient
        return
    total = gradients[key]
    alike = (total.shape, total.dtype, total.device.type) == (gradient.shape, gradient.dtype, "cpu")
    are_plain = alike and total.is_contiguous() and gradient.is_contiguous()
    if Recording.active() is not None and are_plain and (library := kernels.load(total.dtype)) is not None:
        size = gradient.numel()
        library.add(size, gradient.data_ptr(), total.data_ptr(), kernels.threads_for(size))
    else:
        Recording.work(lambda: total.add_(gradient))


def laid_as(parameter: nn.Parameter, gradient: torch.Tensor) -> torch.Tensor:
    """``gradient`` in memory as ``parameter`` lies there, as `Tensor.backward` gives it: fused optimizers take it for that."""
    are_plain = gradient.is_contiguous() and parameter.is_contiguous()  # a dimension of one entry may have any stride
    if are_plain or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter, requires_grad=False).copy_(gradient)


def entries_of(state: State, keys: Sequence[NestedKey], optional: Container[NestedKey] = (), dims: int = 2) -> list:
    """The entries ``keys`` of ``state``, None for an optional one that is missing; KeyError where it is another.

    An entry that is there by its sub-entries, such as a nested task, is a TensorDict of these, of ``dims`` batch dimensions.
    """
    missing = [key for key in keys if key not in state]
    if not missing:
        return list(map(state.get, keys))
    nested = {key: _sub_entries(state, key, dims) for key in missing}
    if nowhere := [key for key, entry in nested.items() if entry is None and key not in optional]:
        raise KeyError(
            f"{nowhere} is read by the networks or the loss, but neither in the data nor made by what runs before; there is "
            f"{sorted(map(str, state))}. What the collector keeps must hold it, TrialCollector(keep=update.in_keys), or a "
            "callback's after_batch must add it."
        )
    return [nested[key] if key in nested else state.get(key) for key in keys]


def _sub_entries(state: State, key: NestedKey, dims: int) -> TensorDict | None:
    """What lies within ``key``; None where there is nothing."""
    if not (below := _within(state, key)):
        return None
    return TensorDict({name[len(_path(key)) :]: state[name] for name in below}, state[below[0]].shape[:dims])


def on_entries(sequence: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A core's ``sequence(x, memory, is_init)`` as a function of its entries ``x, *memory, is_init`` ``[N, T, ...]``, or None."""

    def run(x: torch.Tensor, *memory_and_init: torch.Tensor | None) -> torch.Tensor:
        *memory, is_init = memory_and_init
        is_init = None if is_init is None else is_init.squeeze(-1)
        return sequence(x, None if any(m is None for m in memory) else tuple(memory), is_init)

    return run


def on_copies(function: Callable, module: Callable) -> Callable:
    """``function``, on copies if a layer of ``module``, as which it is called, may write over what it reads: others read it too."""
    layers = module.modules() if isinstance(module, nn.Module) else ()
    if not any(getattr(layer, "inplace", False) for layer in layers):
        return function
    return lambda *inputs: function(*[x.clone() for x in inputs])


def outputs_of(out: torch.Tensor | tuple | Mapping, keys: Sequence[NestedKey]) -> tuple[torch.Tensor, ...]:
    """What a function has given as the entries ``keys``, by name or in their order, as `TensorDictModule` takes it."""
    if isinstance(out, torch.Tensor):
        out = (out,)
    elif isinstance(out, Mapping):
        return tuple(out[key] for key in keys)
    if len(out) != len(keys):
        raise ValueError(
            f"{len(out)} tensors are given, a module's or a head's, for the {len(keys)} entries {list(keys)}."
        )
    return out


# ------------------------------------------------------ what is called as it is written
def has_hooks(module: nn.Module) -> bool:
    """Whether ``module`` itself has hooks on its forward, or another function in its place."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def is_watched(module: nn.Module) -> bool:
    """Whether ``module`` itself `has_hooks`, or some on its gradients."""
    return bool(has_hooks(module) or module._backward_hooks or module._backward_pre_hooks)


def is_bare(module: nn.Module) -> bool:
    """Whether nobody has hung a hook on ``module`` or those in it, or put another function in the place of one's forward."""
    return not any(map(is_watched, module.modules()))


def runs(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether ``module`` does what ``cls`` does: no forward of a subclass, no parametrized weights."""
    return type(module).forward is cls.forward and "parametrizations" not in module._modules


def is_function(module: TensorDictModuleBase) -> bool:
    """Whether ``module`` is its inner one on the entries that it reads, and nothing more."""
    if not isinstance(module, TensorDictModule) or not runs(module, TensorDictModule) or has_hooks(module):
        return False
    return not (module._kwargs is not None or module.method_kwargs or module.method or module._get_kwargs)


def brings(module: nn.Module, method: str) -> bool:
    """Whether ``module`` has a ``method`` that does what its ``forward`` does, and this is the forward that is called."""
    cls = type(module)  # a TensorDictModule passes on what its inner module has
    if not hasattr(cls, method) or has_hooks(module) or "parametrizations" in module._modules:
        return False
    # A class below the one that brings it may have another forward.
    first = next(n for n, base in enumerate(cls.__mro__) if method in vars(base))
    written = next(base for base in cls.__mro__[first:] if "forward" in vars(base))
    return unwrap(cls.forward) is unwrap(vars(written)["forward"])


def others_than(cls: type, thing: object, methods: Sequence[str]) -> list[str]:
    """Those of ``methods`` in whose place ``thing``, its class or it alone, has another than ``cls``."""
    return [m for m in methods if m in vars(thing) or getattr(type(thing), m, None) is not getattr(cls, m, None)]
