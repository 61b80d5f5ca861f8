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
from rl2_torchrl.gradients.part import Gradients, Part, State, entries_of, laid_as

__all__ = ["Program", "TermPart", "Values", "losses_of", "merge_losses", "numbers_of", "values_of"]


#: Losses and diagnostics by name: numbers, and tensors where one is more than a number.
Values = dict[str, float | torch.Tensor]


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
        self._follow_gradients()

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

    def forward(self, part: Part, state: State) -> bool:
        """`Part.forward`; whether its outputs are now known to carry a gradient, by parameters of others, which they were not."""
        carried = part.carries
        part.forward(state)
        if part.carries != carried:
            self._follow_gradients()
        return part.carries != carried

    @torch.no_grad()
    def __call__(self, data: Mapping[NestedKey, torch.Tensor]) -> dict[str, float]:
        """Losses and diagnostics of the sequences ``data``, entries ``[N, T, ...]``, and the gradients of all losses' sum.

        Raises:
            KeyError: an entry is missing.
            ValueError: two terms give a loss or diagnostic of one name, or one that is taken.
        """
        self.loss.require_starts(data)
        values, gradients = self.run(dict(data), self.parts)
        self.set_gradients(gradients)
        return numbers_of(values)

    def run(self, state: State, parts: Sequence[Part]) -> tuple[Values, Gradients]:
        """Losses and diagnostics, and the gradients, from a ``state`` that holds what all but ``parts`` have made."""
        values, gradients = {}, {}
        for part in parts:
            self.forward(part, state)
        for term in self.terms:
            merge_losses(values, term.losses(state, gradients))
        for part in reversed(parts):
            if not gradients.keys().isdisjoint(part.out_keys):
                part.backward(gradients)
        return values, gradients

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

    def brings_kernels(self) -> bool:
        """Whether its gradients are its ``by_kernels``, as PPO's own terms have it; a class below one may do more there."""
        return type(self.function).__module__.startswith("rl2_torchrl.") and hasattr(self.function, "by_kernels")

    def by_kernels(self, state: State) -> tuple[Callable[[list[float]], Values], Gradients] | tuple[()]:
        """What makes `losses` of the numbers that kernels leave, and the gradients.

        Nothing where kernels cannot do it.
        """
        entries = entries_of(state, self.in_keys)
        self.function.require_shapes(*entries)
        if not kernels.covers(*entries):
            return ()
        totals, slopes, more = self.function.by_kernels(*entries)
        first, end, like = totals.storage_offset(), totals.storage_offset() + len(totals), entries[0]
        pairs = zip(self.in_keys, slopes, strict=True)
        found = {key: slope for key, slope in pairs if slope is not None and key in self.wanted}
        return lambda numbers: {**self.function.figures(numbers[first:end], like), **more}, found

    def losses(self, state: State, gradients: Gradients) -> Values:
        """Losses and diagnostics; the losses' gradients are added to ``gradients``."""
        values, found = self.losses_and_gradients(state)
        self.add(found, gradients)
        return values

    def losses_and_gradients(self, state: State) -> tuple[Values, Gradients]:
        """Losses and diagnostics, and the losses' gradients, which may lie in each other's memory."""
        if hasattr(self.function, "with_gradients"):  # PPO's own
            self._values, found = self._by_hand(entries_of(state, self.in_keys))
        else:
            self.forward(state)
            found = self.backward_by_autograd({self.out_keys[0]: torch.ones_like(state[self.out_keys[0]])})
        values = {name: v.detach() if isinstance(v, torch.Tensor) else v for name, v in self._values.items()}
        numbers = {name: v.item() for name, v in values.items() if isinstance(v, torch.Tensor) and v.ndim == 0}
        return {**values, **numbers}, found

    def _by_hand(self, entries: list[torch.Tensor]) -> tuple[Values, Gradients]:
        values, slopes = self.function.with_gradients(*entries)
        of_keys = zip(self.in_keys, entries, slopes, strict=True)
        # In the entry's dtype, as which kernels take it.
        return values, {
            key: slope.to(entry) for key, entry, slope in of_keys if slope is not None and key in self.wanted
        }
