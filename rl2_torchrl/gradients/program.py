"""`Program`: a loss and all its gradients, part by part.

A minibatch is the forward of each part of the networks in order, the loss terms, and the backward of each part in reverse.
What travels back are gradients by the names of the entries that the forwards wrote, and by parameters. A part that knows its
own gradient brings it; any other runs under autograd, for itself alone, so that nothing around it slows down.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Number

import torch
from tensordict import NestedKey, TensorDictBase
from torch import nn

from rl2_torchrl import kernels
from rl2_torchrl.gradients.part import Gradients, Part, State, accumulate, entries_of, in_python, laid_as

__all__ = ["Program", "TermPart", "Values", "losses_of", "merge_losses", "numbers_of", "values_of"]


#: Losses and diagnostics by name: numbers, and tensors where one is more than a number.
Values = dict[str, float | torch.Tensor]
#: Gives those of the last minibatch, or of the ``numbers`` that a `Recording`'s kernels have left of one.
Figures = Callable[[Sequence[float] | None], Values]


class Program:
    """The losses of an `RL2PPOLoss` as numbers, and their gradients written into ``parameter.grad``.

    The same as ``sum of losses . backward()`` to rounding. It holds for one state of the loss: when a coefficient, a hook or a
    parameter's ``requires_grad`` changes, make a new one.

    Attributes:
        parameters: those of the loss that are trained.
    """

    def __init__(self, loss: nn.Module):
        self.loss, self.parts = loss, loss.network_parts()
        self.terms = [TermPart(term) for term in loss.loss_terms()]
        self._all = list(loss.parameters())
        self.parameters = [p for p in self._all if p.requires_grad]
        for part in (*self.parts, *self.terms):
            # A term on weights, or a layer tied to another's, reaches what it does not own.
            part.sources = self.parameters

    @torch.no_grad()
    def __call__(self, data: Mapping[NestedKey, torch.Tensor]) -> dict[str, float]:
        """Losses and diagnostics of the sequences ``data``, entries ``[N, T, ...]``, and the gradients of all losses' sum.

        Raises:
            KeyError: an entry is missing.
            ValueError: two terms give a loss or diagnostic of one name, or one that is taken.
        """
        self.loss.require_starts(data)
        figures, gradients = self.run(dict(data), self.parts)
        self.set_gradients(gradients)
        return numbers_of(figures())

    def run(self, state: State, parts: Sequence[Part]) -> tuple[Figures, Gradients]:
        """What gives losses and diagnostics, and the gradients, from a ``state`` that holds what all but ``parts`` have made.

        A `Recording` may be on, which does all of it again.
        """
        gradients: Gradients = {}
        carrying: set[NestedKey] = set()
        for part in parts:
            part.start(carrying)
            part.forward(state)
            if part.carries:
                carrying.update(part.out_keys)
            else:
                carrying.difference_update(part.out_keys)
        for term in self.terms:
            term.start(carrying)
        of_terms = [term.losses(state, gradients) for term in self.terms]
        for part in reversed(parts):
            if not gradients.keys().isdisjoint(part.out_keys):
                part.backward(gradients)

        def figures(numbers: Sequence[float] | None = None) -> Values:
            values: Values = {}
            for term in of_terms:
                merge_losses(values, term(numbers))
            return values

        return figures, gradients

    def set_gradients(self, gradients: Gradients) -> None:
        """``parameter.grad`` of all parameters, None for those that have none."""
        for parameter in self._all:
            gradient = gradients.get(parameter) if parameter.requires_grad else None
            if parameter.grad is not gradient:
                parameter.grad = None if gradient is None else laid_as(parameter, gradient)


#: What an update says of its minibatches beside the losses.
_TAKEN = ("loss", "grad_norm", "lr", "epochs")


def merge_losses(losses: dict, more: Mapping) -> None:
    """Adds ``more`` to ``losses``; ValueError where two are of one name, or one has that of a number of the update's own."""
    for name, value in more.items():
        if name in _TAKEN:
            raise ValueError(f"a loss term gives {name!r}, as the update itself does ({', '.join(_TAKEN)}): rename it.")
        if name in losses:
            raise ValueError(
                f"two loss terms give {name!r}: rename one, or it would be lost (a TaskBelief by name=...)."
            )
        losses[name] = value


def numbers_of(values: Values) -> Values:
    """Those of ``values`` that are one number."""
    return {name: value for name, value in values.items() if not isinstance(value, torch.Tensor) or value.ndim == 0}


def losses_of(
    parts: Sequence[Part], data: TensorDictBase | State, terms: Sequence[nn.Module]
) -> dict[str, torch.Tensor]:
    """What ``terms`` give of ``data``, entries ``[N, T, ...]``, once all ``parts`` have run; autograd can follow."""
    state: State = dict(data) if isinstance(data, dict) else {}
    if not state:
        read = {key for reader in (*parts, *terms) for key in reader.in_keys}
        state = {key: entry for key in read if (entry := data.get(key, None)) is not None}
    for part in parts:
        part.run(state)
    losses: dict[str, torch.Tensor] = {}
    for term in terms:
        merge_losses(losses, values_of(term, entries_of(state, term.in_keys)))
    return losses


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


class TermPart(Part):
    """A loss term as a part, which gives the sum of its losses."""

    def __init__(self, term: nn.Module):
        super().__init__(term, term.in_keys, [("loss", "sum")])

    def run(self, state: State) -> None:
        entries = entries_of(state, self.in_keys)
        self._values = values_of(self.function, entries)
        losses = [value for name, value in self._values.items() if name.startswith("loss_")]
        state[self.out_keys[0]] = sum(losses[1:], start=losses[0]) if losses else torch.zeros(())

    def losses(self, state: State, gradients: Gradients) -> Figures:
        """Adds the losses' gradients to ``gradients``; what gives losses and diagnostics."""
        if self._is_ours_by_kernels():
            entries = entries_of(state, self.in_keys)
            self.function.require_shapes(*entries)
            if kernels.covers(*entries):
                return self._by_kernels(entries, gradients)
        self._add(in_python(self._in_python, state, self.in_keys), gradients)
        return lambda _: self._numbers

    def _is_ours_by_kernels(self) -> bool:
        """Whether its gradients are its ``by_kernels``, as PPO's own terms have it; a class below one may do more there."""
        return type(self.function).__module__.startswith("rl2_torchrl.") and hasattr(self.function, "by_kernels")

    def _by_kernels(self, entries: list[torch.Tensor], gradients: Gradients) -> Figures:
        totals, slopes, more = self.function.by_kernels(*entries)
        for key, slope in self._by_wanted(entries, slopes).items():
            accumulate(gradients, key, slope)
        first, end, like = totals.storage_offset(), totals.storage_offset() + len(totals), entries[0]

        def figures(numbers: Sequence[float] | None) -> Values:
            own = totals.tolist() if numbers is None else numbers[first:end]
            return {**self.function.figures(own, like), **more}

        return figures

    def _in_python(self, state: State) -> Gradients:
        """The losses' gradients, which may lie in each other's memory."""
        if hasattr(self.function, "with_gradients"):  # PPO's own
            entries = entries_of(state, self.in_keys)
            self._values, slopes = self.function.with_gradients(*entries)
            found = self._by_wanted(entries, slopes)
        else:
            self._forward_by_autograd(state)
            found = self._backward_in_python({self.out_keys[0]: torch.ones_like(state[self.out_keys[0]])})
        values = {name: v.detach() if isinstance(v, torch.Tensor) else v for name, v in self._values.items()}
        numbers = {name: v.item() for name, v in values.items() if isinstance(v, torch.Tensor) and v.ndim == 0}
        self._numbers = {**values, **numbers}
        return found

    def _by_wanted(self, entries: Sequence[torch.Tensor], slopes: Sequence[torch.Tensor | None]) -> Gradients:
        """Those of ``slopes`` that are wanted, in the entry's dtype, as which kernels take them."""
        of_keys = zip(self.in_keys, entries, slopes, strict=True)
        return {key: slope.to(entry) for key, entry, slope in of_keys if slope is not None and key in self.wanted}
