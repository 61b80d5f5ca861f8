"""`Program`: a loss and all its gradients, part by part.

A minibatch is the forward of each part of the networks in order, the loss terms, and the backward of each part in reverse.
What travels back are gradients by the names of the entries that the forwards wrote. A part that knows its own gradient
brings it; any other runs under autograd, for itself alone, so that it costs what it costs and nothing around it slows down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from tensordict import NestedKey
from torch import nn

from rl2_torchrl.gradients.part import AutogradPart, Part, State, accumulate, entries_of

__all__ = ["Program", "merge_losses"]


class _Loss(Protocol):
    """What a program runs: `RL2PPOLoss` is one."""

    def network_parts(self) -> list[Part]: ...
    def loss_terms(self) -> list[nn.Module]: ...
    def parameters(self) -> list[nn.Parameter]: ...


class Program:
    """The losses of ``loss`` as numbers, and their gradients written into ``parameter.grad``.

    The same as ``sum of losses . backward()`` to rounding. It holds for one state of the loss: when a coefficient, a hook or a
    parameter's ``requires_grad`` changes, make a new one.

    Args:
        loss: gives the parts of its networks, its terms and its parameters.

    Examples:
        >>> from rl2_torchrl import GRUGaussianActor, GRUValueHead, RL2PPOLoss
        >>> program = Program(RL2PPOLoss(GRUGaussianActor(5, 2), GRUValueHead(5)))
        >>> len(program.parts)  # then program(minibatch), program.norm(), optimizer.step()
        5
    """

    def __init__(self, loss: _Loss):
        self.loss, self.parts = loss, loss.network_parts()
        self.terms = [_Term(term) for term in loss.loss_terms()]
        self._mark_what_carries_a_gradient()
        self._own([p for p in loss.parameters() if p.numel()])

    def _mark_what_carries_a_gradient(self) -> None:
        carrying: set[NestedKey] = set()
        for part in [*self.parts, *self.terms]:
            part.wanted = carrying.intersection(part.in_keys)
            if part.wanted or any(p.requires_grad for p in part.parameters()):
                carrying.update(part.out_keys)
            else:
                carrying.difference_update(part.out_keys)

    def _own(self, parameters: Sequence[nn.Parameter]) -> None:
        """Gradients side by side, so that their norm is one operation; where parts share a parameter they are added up."""
        users = [*self.parts, *self.terms]
        used = {id(p) for user in users for p in user.parameters()}
        kinds: dict[tuple, list[nn.Parameter]] = {}
        for parameter in parameters:
            if id(parameter) in used and parameter.requires_grad:
                kinds.setdefault((parameter.device, parameter.dtype), []).append(parameter)
        self._flat, self._views = [], {}
        for owned in kinds.values():
            sizes = [p.numel() for p in owned]
            self._flat.append(owned[0].new_zeros(sum(sizes)).detach())
            views = self._flat[-1].split(sizes)
            self._views.update({id(p): view.view(p.shape) for p, view in zip(owned, views, strict=True)})
        self._owned = [p for owned in kinds.values() for p in owned]
        self._pairs = [(p, self._views[id(p)]) for p in self._owned]
        self._unused = [p for p in parameters if id(p) not in self._views]
        self._hooked = [p for p in self._owned if p._backward_hooks or p._post_accumulate_grad_hooks]
        self._shared: list[tuple[torch.Tensor, torch.Tensor]] = []
        taken: set[int] = set()
        self._memory: dict[int, list[torch.Tensor]] = {}
        for user in users:
            memory = {id(p): self._memory_for(p, taken) for p in user.parameters()}
            user.bind(memory)
            self._memory[id(user)] = list(memory.values())

    def _memory_for(self, parameter: nn.Parameter, taken: set[int]) -> torch.Tensor:
        view = self._views.get(id(parameter))
        if view is not None and id(parameter) not in taken:
            taken.add(id(parameter))
            return view
        memory = torch.zeros_like(parameter, requires_grad=False, memory_format=torch.contiguous_format)
        if view is not None:
            self._shared.append((view, memory))
        return memory  # of a frozen parameter: written, and read by nobody

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those that get a gradient."""
        return self._owned

    @property
    def has_hooks_or_shares(self) -> bool:
        """Whether parameters have hooks on their gradients, or stand in several parts."""
        return bool(self._hooked or self._shared)

    def gradient_of(self, parameter: nn.Parameter) -> torch.Tensor:
        """Where the gradient of ``parameter`` is written."""
        return self._views[id(parameter)]

    def norm(self) -> float:
        """The norm of the whole gradient."""
        norms = [flat.norm().item() for flat in self._flat]
        return norms[0] if len(norms) == 1 else math.hypot(*norms)

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
        state: State = dict(data)
        for part in self.parts:
            part.forward(state)
        gradients: State = {}
        values: dict[str, float] = {}
        for term in self.terms:
            merge_losses(values, term.losses(state, gradients))
        for part in reversed(self.parts):
            if not gradients.keys().isdisjoint(part.out_keys):
                part.backward(state, gradients)
            elif self._memory[id(part)]:  # no loss depends on what it gives
                torch._foreach_zero_(self._memory[id(part)])
        for view, memory in self._shared:
            view.add_(memory)
        for parameter, view in self._pairs:
            parameter.grad = view
        for parameter in self._unused:
            parameter.grad = None
        for parameter in self._hooked:
            self._run_hooks(parameter)
        return values

    def _run_hooks(self, parameter: nn.Parameter) -> None:
        """As autograd runs them when it has the whole gradient of a parameter."""
        view = self._views[id(parameter)]
        parameter.grad = None
        with torch.enable_grad():
            torch.autograd.backward([parameter], [view.clone()])
        if parameter.grad is None:
            view.zero_()
        else:
            view.copy_(parameter.grad)
            parameter.grad = view


def merge_losses(losses: dict, more: dict) -> None:
    """Adds ``more`` to ``losses``.

    Raises:
        ValueError: two are of one name.
    """
    for name, value in more.items():
        if name in losses:
            raise ValueError(f"two loss terms give {name!r}: rename one, or it would be lost.")
        losses[name] = value


class _Term(AutogradPart):
    """A loss term as a part, which gives the sum of its losses."""

    def __init__(self, term: nn.Module):
        super().__init__(self._total, term.in_keys, [("loss", str(id(term)))], parameters=term.parameters())
        self.term, self._by_hand = term, getattr(term, "with_gradients", None)

    def _total(self, *entries: torch.Tensor) -> torch.Tensor:
        self._values = self.term(*entries)
        losses = [value for name, value in self._values.items() if name.startswith("loss_")]
        return torch.stack(losses).sum() if losses else entries[0].new_zeros(())

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
        return {
            name: value.item() if isinstance(value, torch.Tensor) else value
            for name, value in self._values.items()
            if not isinstance(value, torch.Tensor) or value.ndim == 0
        }
