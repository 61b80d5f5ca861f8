"""`Answers`: `RL2PPOLoss.forward` by parts, where a class below calls it in a forward of its own, or hooks hang on it.

What those add runs under autograd, as it always did; PPO's terms and their gradients, for which they ask by ``super().forward``,
are those of `Replays`, and autograd is handed them. These are of the losses' sum. Where one of them is given another weight, or is
asked for by itself, autograd makes them after all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from tensordict import TensorDictBase
from torch import nn

from rl2_torchrl.gradients.part import State, laid_as
from rl2_torchrl.gradients.program import losses_of
from rl2_torchrl.gradients.replays import Replays

__all__ = ["Answers"]


class Answers:
    """PPO's losses of minibatches of ``replays``, to whom asks for them as ``state`` says that its loss is.

    Args:
        replays: makes them.
        state: what a loss is as long as ``replays`` holds for it.

    Attributes:
        are_vain: whether other data were asked for, or one of the losses by itself or with a weight of its own, which parts do not
            have.
    """

    def __init__(self, replays: Replays, state: tuple):
        self._replays, self._state, self.are_vain = replays, state, False

    @contextmanager
    def given(self, own: torch.Tensor, entries: State) -> Iterator[None]:
        """Within it the loss has these as its ``_answers``, to be asked of the minibatch ``own``, whose data are ``entries``."""
        self._own, self._entries = own, [(key, entry, entry._version) for key, entry in entries.items()]
        self._replays.program.loss._answers = self
        try:
            yield
        finally:
            self._replays.program.loss._answers = None

    def __call__(self, data: TensorDictBase, state: tuple) -> dict[str, torch.Tensor] | None:
        """Losses and diagnostics of ``data``; None where these are not the minibatch, or the loss is another by now."""
        if not torch.is_grad_enabled():
            return None
        if state != self._state or not self._are_given(data):
            self.are_vain = True
            return None
        values, gradients = self._replays.run(self._own)
        trained = {p: g for p, g in gradients.items() if isinstance(p, nn.Parameter) and p.requires_grad}
        if not trained:
            return None
        pairs = [(parameter, laid_as(parameter, gradient)) for parameter, gradient in trained.items()]
        parameters, slopes = zip(*pairs, strict=True)
        numbers = {name: value for name, value in values.items() if not isinstance(value, torch.Tensor)}
        values = {name: value.clone() for name, value in values.items() if isinstance(value, torch.Tensor)}
        values |= zip(numbers, parameters[0].new_tensor(list(numbers.values())).unbind(), strict=True)
        names = [name for name in numbers if name.startswith("loss_")]
        losses = _Answered.apply((self, self._own), names, slopes, *(values[name] for name in names), *parameters)
        return {**values, **dict(zip(names, losses, strict=True))}

    def _are_given(self, data: TensorDictBase) -> bool:
        """Whether ``data`` are the minibatch's, as they were given."""
        are_same = (data.get(key, None) is entry for key, entry, _ in self._entries)
        are_untouched = (entry._version == version and not entry.requires_grad for _, entry, version in self._entries)
        return all(are_same) and len(self._entries) == len(data.keys(True, True)) and all(are_untouched)

    def by_autograd(
        self, own: torch.Tensor, weights: dict[str, torch.Tensor], parameters: Sequence[nn.Parameter]
    ) -> tuple[torch.Tensor | None, ...]:
        """The gradients of the losses of the minibatch ``own`` that ``weights`` names, each with its weight."""
        self.are_vain, create_graph, replays = True, torch.is_grad_enabled(), self._replays
        data = {key: chunk.index_select(0, own) for key, chunk in replays.chunks.items()}
        with torch.enable_grad():
            losses = losses_of(replays.parts, data, [term.function for term in replays.program.terms])
        asked = [(losses[name], weight) for name, weight in weights.items() if losses[name].requires_grad]
        if not asked:
            return (None,) * len(parameters)
        outs, slopes = zip(*asked, strict=True)
        return torch.autograd.grad(outs, parameters, slopes, allow_unused=True, create_graph=create_graph)


class _Answered(torch.autograd.Function):
    """The losses that are given, with the gradients of their sum."""

    @staticmethod
    def forward(ctx, answers, names, slopes, *losses_and_parameters):
        ctx.answers, ctx.names, ctx.slopes = answers, names, slopes
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*losses_and_parameters[len(names) :])
        return tuple(loss.clone() for loss in losses_and_parameters[: len(names)])

    @staticmethod
    def backward(ctx, *weights):
        parameters, (first, *others) = ctx.saved_tensors, weights  # which are gone once the graph is
        unlike = first is None or any(other is None or other != first for other in others)
        if unlike or torch.is_grad_enabled():
            (answers, own), pairs = ctx.answers, zip(ctx.names, weights, strict=True)
            given = {name: weight for name, weight in pairs if weight is not None}
            found = answers.by_autograd(own, given, parameters)
        else:
            found = (slope * first for slope in ctx.slopes)
        return None, None, None, *[None] * len(weights), *found
