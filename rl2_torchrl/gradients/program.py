"""`Program`: a loss and all its gradients, part by part.

A minibatch is the forward of each part of the networks in order, the loss terms, and the backward of each part in reverse.
What travels back are gradients by the names of the entries that the forwards wrote. A part that knows its own gradient
brings it; any other runs under autograd, for itself alone, so that it costs what it costs and nothing around it slows down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from tensordict import NestedKey
from torch import nn

from rl2_torchrl.gradients.part import Part, State, accumulate, entries_of

__all__ = ["Program", "merge_losses"]


class Program:
    """The losses of an `RL2PPOLoss` as numbers, and their gradients written into ``parameter.grad``.

    The same as ``sum of losses . backward()`` to rounding. It holds for one state of the loss: when a coefficient, a hook or a
    parameter's ``requires_grad`` changes, make a new one.

    Attributes:
        parameters: those that get a gradient.
        shares: whether some of them stand in several parts.

    Examples:
        >>> from rl2_torchrl import GRUGaussianActor, GRUValueHead, RL2PPOLoss
        >>> program = Program(RL2PPOLoss(GRUGaussianActor(5, 2), GRUValueHead(5)))
        >>> len(program.parts)  # then program(minibatch), program.norm(), optimizer.step()
        5
    """

    def __init__(self, loss: nn.Module):
        self.loss, self.parts = loss, loss.network_parts()
        self.terms = [_Term(term) for term in loss.loss_terms()]
        self._mark_what_carries_a_gradient()
        used = {p for part in (*self.parts, *self.terms) for p in part.parameters()}
        parameters = [p for p in loss.parameters() if p.numel()]
        self._own([p for p in parameters if p.requires_grad and p in used])
        self._unused = [p for p in parameters if p not in self._views]
        self._bind()

    def _mark_what_carries_a_gradient(self) -> None:
        carrying: set[NestedKey] = set()
        for part in (*self.parts, *self.terms):
            part.wanted = carrying.intersection(part.in_keys)
            if part.wanted or any(p.requires_grad for p in part.parameters()):
                carrying.update(part.out_keys)
            else:
                carrying.difference_update(part.out_keys)

    def _own(self, parameters: list[nn.Parameter]) -> None:
        """Gradients side by side, so that their norm is one operation."""
        self._flat: list[torch.Tensor] = []
        self._views: dict[nn.Parameter, torch.Tensor] = {}
        for kind in dict.fromkeys((p.device, p.dtype) for p in parameters):
            owned = [p for p in parameters if (p.device, p.dtype) == kind]
            sizes = [p.numel() for p in owned]
            self._flat.append(owned[0].new_zeros(sum(sizes)).detach())
            views = zip(owned, self._flat[-1].split(sizes), strict=True)
            self._views.update((p, view.view(p.shape)) for p, view in views)
        self.parameters = list(self._views)

    def _bind(self) -> None:
        """Each part writes to the gradients themselves; what several share, all but the first write elsewhere, to be added."""
        self._shared: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._memory: dict[Part, list[torch.Tensor]] = {}
        free = dict(self._views)
        for part in (*self.parts, *self.terms):
            memory = {}
            for p in part.parameters():
                memory[id(p)] = free.pop(p, None)
                if memory[id(p)] is None:  # of a frozen one: written, and read by nobody
                    memory[id(p)] = torch.zeros_like(p, requires_grad=False, memory_format=torch.contiguous_format)
                    self._shared += [(self._views[p], memory[id(p)])] if p in self._views else []
            part.bind(memory)
            self._memory[part] = list(memory.values())
        self.shares = bool(self._shared)

    def gradient_of(self, parameter: nn.Parameter) -> torch.Tensor:
        """Where the gradient of ``parameter`` is written."""
        return self._views[parameter]

    @property
    def gradients(self) -> list[torch.Tensor]:
        """The whole gradient, flat, a tensor for each device and type."""
        return self._flat

    def norm(self) -> float:
        """The norm of the whole gradient."""
        return math.hypot(*(flat.norm().item() for flat in self._flat))

    def scale(self, factor: float) -> None:
        """Multiplies the whole gradient by ``factor``."""
        for flat in self._flat:
            flat.mul_(factor)

    @torch.no_grad()
    def __call__(self, data: Mapping[NestedKey, torch.Tensor]) -> dict[str, float]:
        """Losses and diagnostics of the sequences ``data``, entries ``[N, T, ...]``, and the gradients of all losses' sum.

        Raises:
            KeyError: an entry is missing.
            ValueError: two terms give a loss or diagnostic of one name.
        """
        self.loss.require_starts(data)
        state, gradients, values = dict(data), {}, {}
        for part in self.parts:
            part.forward(state)
        for term in self.terms:
            merge_losses(values, term.losses(state, gradients))
        for part in reversed(self.parts):
            if not gradients.keys().isdisjoint(part.out_keys):
                part.backward(state, gradients)
            elif self._memory[part]:  # no loss depends on what it gives
                torch._foreach_zero_(self._memory[part])
        for view, memory in self._shared:
            view.add_(memory)
        for parameter, view in self._views.items():
            parameter.grad = view
        for parameter in self._unused:
            parameter.grad = None
        return values


def merge_losses(losses: dict, more: dict) -> None:
    """Adds ``more`` to ``losses``; ValueError where two are of one name."""
    for name, value in more.items():
        if name in losses:
            raise ValueError(f"two loss terms give {name!r}: rename one, or it would be lost.")
        losses[name] = value


class _Term(Part):
    """A loss term as a part, which gives the sum of its losses."""

    def __init__(self, term: nn.Module):
        super().__init__(term.in_keys, [("loss", "sum")], term.parameters())
        self.term, self._by_hand = term, getattr(term, "with_gradients", None)

    def run(self, state: State) -> None:
        entries = entries_of(state, self.in_keys)
        self._values = self.term(*entries)
        losses = [value for name, value in self._values.items() if name.startswith("loss_")]
        state[self.out_keys[0]] = torch.stack(losses).sum() if losses else entries[0].new_zeros(())

    def losses(self, state: State, gradients: State) -> dict[str, float]:
        """Losses and scalar diagnostics; the losses' gradients by the entries that are wanted are added to ``gradients``."""
        if self._by_hand is None:
            self.forward(state)
            gradients[self.out_keys[0]] = torch.ones_like(state[self.out_keys[0]])
            self.backward(state, gradients)
        else:
            self._values, slopes = self._by_hand(*entries_of(state, self.in_keys))
            for key, slope in zip(self.in_keys, slopes, strict=True):
                if slope is not None and key in self.wanted:
                    accumulate(gradients, key, slope)
        scalars = {name: v for name, v in self._values.items() if not isinstance(v, torch.Tensor) or v.ndim == 0}
        return {name: v.item() if isinstance(v, torch.Tensor) else v for name, v in scalars.items()}
