"""`Program`: a loss and all its gradients, part by part.

A minibatch is the forward of each part of the networks in order, the loss terms, and the backward of each part in reverse.
What travels back are gradients by the names of the entries that the forwards wrote, and by parameters. A part that knows its
own gradient brings it; any other runs under autograd, for itself alone, so that nothing around it slows down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property
from numbers import Number
from weakref import ref

import torch
from tensordict import NestedKey
from torch import nn

from rl2_torchrl import kernels
from rl2_torchrl.gradients.part import Gradients, Part, State, accumulate, entries_of, laid_as
from rl2_torchrl.kernels.workspace import Workspace

__all__ = ["Program", "merge_losses", "values_of"]


class Program:
    """The losses of an `RL2PPOLoss` as numbers, and their gradients written into ``parameter.grad``.

    The same as ``sum of losses . backward()`` to rounding. It holds for one state of the loss: when a coefficient, a hook or a
    parameter's ``requires_grad`` changes, it is another (`RL2PPOLoss.program`).

    Args:
        loss: whose it is.
        is_remembered: whether ``loss`` holds the program, which then does not hold it.

    Attributes:
        parameters: those of its parts that get a gradient.
    """

    def __init__(self, loss: nn.Module, *, is_remembered: bool = False):
        self._loss, self.parts = ref(loss) if is_remembered else lambda: loss, loss.network_parts()
        self.terms = [_Term(term) for term in loss.loss_terms()]
        used = {p for part in (*self.parts, *self.terms) for p in part.parameters}
        self._all = list(loss.parameters())
        self.parameters = [p for p in self._all if p.requires_grad and p in used]
        trainable = [p for p in self._all if p.requires_grad]
        for part in (*self.parts, *self.terms):
            part.sources = trainable  # a term on weights, or a layer tied to another's, reaches what it does not own
        self._follow_gradients()

    @property
    def loss(self) -> nn.Module:
        """The loss whose program it is."""
        return self._loss()

    def _follow_gradients(self) -> None:
        """Tells each part which entries carry a gradient to it."""
        carrying: set[NestedKey] = set()
        for part in (*self.parts, *self.terms):
            part.wanted = carrying.intersection(part.in_keys)
            part.carries |= bool(part.wanted) or any(p.requires_grad for p in part.parameters)
            if part.carries:
                carrying.update(part.out_keys)
            else:
                carrying.difference_update(part.out_keys)

    def __call__(self, data: Mapping[NestedKey, torch.Tensor]) -> dict[str, float]:
        """Losses and diagnostics of the sequences ``data``, entries ``[N, T, ...]``, and the gradients of all losses' sum.

        Raises:
            KeyError: an entry is missing.
            ValueError: two terms give a loss or diagnostic of one name, or one that is taken.
        """
        self.loss.require_starts(data)
        values, gradients = self.forward(data), self.backward()
        for parameter in self._all:
            gradient = gradients.get(parameter) if parameter.requires_grad else None
            parameter.grad = None if gradient is None else laid_as(parameter, gradient)
        scalars = {name: v for name, v in values.items() if not isinstance(v, torch.Tensor) or v.ndim == 0}
        return {name: v.item() if isinstance(v, torch.Tensor) else v for name, v in scalars.items()}

    @torch.no_grad()
    def forward(self, data: Mapping[NestedKey, torch.Tensor]) -> dict[str, float | torch.Tensor]:
        """Losses and diagnostics of ``data``; the parts keep what `backward` needs."""
        state, values = dict(data), {}
        for part in self.parts:
            is_known = part.carries
            part.forward(state)
            if part.carries != is_known:  # by parameters of others
                self._follow_gradients()
        for term in self.terms:
            merge_losses(values, term.look(state))
        return values

    @torch.no_grad()
    def backward(self, weights: Mapping[str, float] | None = None) -> Gradients:
        """Gradients of the sum of what `forward` gave, or of the losses that have ``weights``, weighted."""
        gradients: Gradients = {}
        for term in self.terms:
            term.give(gradients, weights)
        for part in reversed(self.parts):
            if not gradients.keys().isdisjoint(part.out_keys):
                part.backward(gradients)
        return gradients

    # ---------------------------------------------------------- within autograd
    @cached_property
    def is_by_hand(self) -> bool:
        """Whether all parts and terms bring gradients of their own, so that autograd sees parameters and losses alone."""
        terms_do = all(hasattr(term.function, "with_gradients") and not term.parameters for term in self.terms)
        parts_do = bool(self.parameters) and all(part.reason is None for part in self.parts)
        # Weights that are no parameters are lent for a call, as in MAML, and are others by the time of a second gradient.
        lent = [p for p in self.parameters if not isinstance(p, nn.Parameter)]
        return terms_do and parts_do and not lent and kernels.covers(*self.parameters)

    def losses(self, data: State) -> dict[str, torch.Tensor]:
        """Losses and diagnostics of ``data``, by a program that `is_by_hand`: the losses are one node of autograd's."""
        own = copy(self)  # parts remember what they have seen, and there may be other losses before this one's backward
        own.parts, own.terms = list(map(copy, self.parts)), list(map(copy, self.terms))
        values, like = own.forward(data), self.parameters[0]
        numbers = {name: value for name, value in values.items() if not isinstance(value, torch.Tensor)}
        values |= zip(numbers, like.new_tensor(list(numbers.values())).unbind(), strict=True)
        losses = {name: value for name, value in values.items() if name.startswith("loss_")}
        return values | dict(zip(losses, _Losses.apply(own, data, losses, *self.parameters), strict=True))


class _Losses(torch.autograd.Function):
    """The losses that are given, whose gradients ``program``, which has made them of ``data``, makes by hand."""

    @staticmethod
    def forward(ctx, program, data, losses, *parameters):
        ctx.program, ctx.loss, ctx.data, ctx.names, ctx.is_spent = program, program.loss, data, list(losses), False
        ctx.save_for_backward(*parameters)
        ctx.set_materialize_grads(False)
        return tuple(value.to(parameters[0], copy=True) for value in losses.values())

    @staticmethod
    def backward(ctx, *slopes):
        parameters, asked = ctx.saved_tensors, [slope is not None for slope in slopes]
        if not (torch.is_grad_enabled() or ctx.is_spent):
            ctx.is_spent = True  # parts write over what they have kept
            weights = {name: slope.item() for name, slope in zip(ctx.names, slopes, strict=True) if slope is not None}
            gradients = ctx.program.backward(weights)
            return None, None, None, *map(gradients.get, parameters)
        if missing := set(parameters).difference(ctx.loss.parameters()):
            raise RuntimeError(
                f"{len(missing)} of the parameters that the loss was computed with are no longer its own, and this second backward "
                "computes it anew: go back while they are, such as within torch.func.functional_call."
            )
        with torch.enable_grad():
            losses = ctx.loss.losses_of(ctx.data, [term.function for term in ctx.program.terms])
        ends = [losses[name] for name, is_asked in zip(ctx.names, asked, strict=True) if is_asked]
        slopes, options = [slope for slope in slopes if slope is not None], {"create_graph": torch.is_grad_enabled()}
        return None, None, None, *torch.autograd.grad(ends, parameters, slopes, allow_unused=True, **options)


#: What an update says of its minibatches beside the losses.
_TAKEN = ("loss", "grad_norm", "lr", "epochs")


def merge_losses(losses: dict, more: Mapping) -> None:
    """Adds ``more`` to ``losses``; ValueError where two are of one name, or one has that of a number of the update's own."""
    for name, value in more.items():
        if name in _TAKEN:
            raise ValueError(f"a loss term gives {name!r}, as the update itself does ({', '.join(_TAKEN)}): rename it.")
        if name in losses:
            raise ValueError(f"two loss terms give {name!r}: rename one, or it would be lost.")
        losses[name] = value


def values_of(term: nn.Module, entries: Sequence[torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """Losses and diagnostics that ``term`` gives of ``entries``, once its losses are numbers with a name."""
    values, name = term(*entries), type(term).__name__
    if not isinstance(values, Mapping):
        raise TypeError(
            f"{name} returned a {type(values).__name__}: a term gives numbers by name, {{'loss_mine': loss}}."
        )
    for key, value in values.items():
        if not isinstance(value, (torch.Tensor, Number)):
            raise TypeError(f"{name} gave {key!r}: {value!r}, which is no number: leave it out where there is none.")
        if key.startswith("loss_") and isinstance(value, torch.Tensor) and value.ndim:
            raise ValueError(
                f"{name} gave {key!r} of shape {tuple(value.shape)}: a loss is one number, such as its mean()."
            )
    device = entries[0].device if entries else None
    return {key: _as_real(value, device) for key, value in values.items()}


def _as_real(value: torch.Tensor | Number, device: torch.device | None) -> torch.Tensor:
    """Of counts and flags, and of Python's numbers too, there are means over minibatches."""
    if not isinstance(value, torch.Tensor) or value.device != device:
        value = torch.as_tensor(value, device=device)
    return value if value.is_floating_point() else value.double()


class _Term(Part):
    """A loss term as a part, which gives the sum of its losses."""

    def __init__(self, term: nn.Module):
        super().__init__(term, term.in_keys, [("loss", "sum")])
        #: Others may give an entry for its gradient, or one tensor for two: what is not ours is copied before it is added to.
        self._is_ours = type(term).__module__.startswith("rl2_torchrl.")

    def run(self, state: State) -> None:
        entries = entries_of(state, self.in_keys)
        self._values = values_of(self.function, entries)
        losses = [value for name, value in self._values.items() if name.startswith("loss_")]
        state[self.out_keys[0]] = torch.stack(losses).sum() if losses else torch.zeros(())

    def look(self, state: State) -> Mapping[str, float | torch.Tensor]:
        """Losses and diagnostics; keeps what `give` needs."""
        if not hasattr(self.function, "with_gradients"):
            self.forward(state)
            return self._values
        entries = entries_of(state, self.in_keys)
        Workspace.leave(*entries)  # users write such terms too
        self._values, slopes = self.function.with_gradients(*entries)
        self._slopes: list[tuple[NestedKey, torch.Tensor]] = []
        for key, entry, slope in zip(self.in_keys, entries, slopes, strict=True):
            if slope is not None and key in self.wanted:
                if slope.shape != entry.shape:
                    raise ValueError(
                        f"{type(self.function).__name__}.with_gradients gave a gradient {tuple(slope.shape)} by {key!r}, "
                        f"which is {tuple(entry.shape)}: give it that shape."
                    )
                slope = slope.to(entry)  # kernels take it for that
                own = slope if self._is_ours else slope.clone(memory_format=torch.contiguous_format)
                self._slopes.append((key, own))
        return self._values

    def give(self, gradients: Gradients, weights: Mapping[str, float] | None) -> None:
        """Adds the losses' gradients to ``gradients``, of a term with its own by the weight of its one loss."""
        if not hasattr(self.function, "with_gradients"):
            gradients[self.out_keys[0]] = torch.ones((), dtype=self._outputs[0].dtype, device=self._outputs[0].device)
            self.backward(gradients)
            return
        weight = 1.0 if weights is None else weights.get(next(n for n in self._values if n.startswith("loss_")))
        for key, slope in self._slopes if weight is not None else ():
            accumulate(gradients, key, slope if weight == 1 else slope.mul_(weight))
