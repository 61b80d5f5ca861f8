"""`GraphedPass`: on a CUDA device a minibatch's losses, gradients and clipping as one CUDA graph, read back once a pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn

from rl2_torchrl.gradients.part import State, is_bare, laid_as
from rl2_torchrl.kernels.graph import GraphReplay, held_by

__all__ = ["GraphedPass", "why_not_graphed"]

#: Whose modules do the same operations in every call, whatever Python's variables say.
_KNOWN = ("rl2_torchrl.", "tensordict.", "torch.", "torchrl.")


class GraphedPass:
    """A pass of minibatch steps for which the host only launches: what it reads of them, it reads when all are on their way.

    Where a gradient is not finite, the optimizer, a fused one, takes no step on that minibatch nor on any later one of the pass.
    """

    def __init__(self, loss: nn.Module):
        self.loss = loss
        self._minibatches: dict[object, _Minibatch] = {}
        self._layout: object = None

    @property
    def reason(self) -> str:
        """What is recorded, or why a minibatch could not be, so that each is launched kernel by kernel."""
        if refusal := next((m.refusal for m in self._minibatches.values() if m.refusal), None):
            return f"launched kernel by kernel: {refusal}"
        device = next(self.loss.parameters()).device
        on_cuda = "a minibatch's gradients are one CUDA graph"
        return on_cuda if device.type == "cuda" else f"there is nothing to record on {device}"

    def run(
        self,
        minibatches: Iterable[State],
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float | None,
        checks: Iterable[Callable[[dict[str, torch.Tensor]], object]] = (),
    ) -> Iterator[dict[str, float]]:
        """Takes a step of ``optimizer`` on each of ``minibatches``, then gives the metrics of each.

        ``checks`` are shown the figures of the first minibatch, before its step.
        """
        self._forget_what_changed(max_grad_norm)
        figures, finite = [], None
        try:
            for entries in minibatches:
                layout = tuple((key, entry.shape, entry.dtype) for key, entry in entries.items())
                if layout not in self._minibatches:
                    self._minibatches[layout] = _Minibatch(self.loss, entries, max_grad_norm)
                minibatch = self._minibatches[layout]
                minibatch(entries)
                for check in checks if not figures else ():
                    check(minibatch.figures)
                is_finite = minibatch.figures["grad_norm"].isfinite()
                finite = is_finite if finite is None else finite & is_finite
                optimizer.found_inf = (~finite).float()
                optimizer.step()
                figures.append((list(minibatch.figures), torch.stack(list(minibatch.figures.values()))))
        finally:
            vars(optimizer).pop("found_inf", None)
        rows = torch.stack([values for _, values in figures]).tolist()
        yield from (dict(zip(names, row, strict=True)) for (names, _), row in zip(figures, rows, strict=True))

    def _forget_what_changed(self, max_grad_norm: float | None) -> None:
        """Recordings know the memory of tensors, not what else Python has changed since."""
        settings = (repr(self.loss.tensor_keys), max_grad_norm, torch.get_float32_matmul_precision())
        layout = (held_by(self.loss.modules()), settings)
        if layout != self._layout:
            self._layout, self._minibatches = layout, {}


class _Minibatch:
    """Losses, gradients and clipping of minibatches of one layout; the gradients become the parameters' ``grad``."""

    def __init__(self, loss: nn.Module, entries: State, max_grad_norm: float | None):
        self.loss, self.max_norm = loss, max_grad_norm or math.inf
        self.parameters = [p for p in loss.parameters() if p.requires_grad]
        self.entries = {key: entry.clone() for key, entry in entries.items()}
        self.figures: dict[str, torch.Tensor] = {}
        self._run = GraphReplay(self._work, self.parameters[0].device)
        self._run()  # the first call sets libraries up, and what is wrong with the data is said
        self._run()
        self.refusal = self._run.refusal

    def __call__(self, entries: State) -> None:
        for key, entry in entries.items():
            self.entries[key].copy_(entry)
        self._run()
        for parameter in self.loss.parameters():  # also of those that have been frozen since
            parameter.grad = self.gradients.get(parameter)

    def _work(self) -> None:
        losses = self.loss.losses_of(self.entries, self.loss.loss_terms())
        total = sum(value for name, value in losses.items() if name.startswith("loss_"))
        found = zip(self.parameters, torch.autograd.grad(total, self.parameters, allow_unused=True), strict=True)
        self.gradients = {p: laid_as(p, gradient) for p, gradient in found if gradient is not None}
        for parameter in self.parameters:
            parameter.grad = self.gradients.get(parameter)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        scalars = {name: value.detach() for name, value in losses.items() if value.ndim == 0}
        self.figures = {"loss": total.detach(), **scalars, "grad_norm": norm}


def why_not_graphed(loss: nn.Module, optimizer: torch.optim.Optimizer) -> str | None:
    """Why minibatches of ``loss``, which is made of parts, are no CUDA graph, in words; None if they are worth a try."""
    if strangers := {type(m).__name__ for m in loss.modules() if not type(m).__module__.startswith(_KNOWN)}:
        names = ", ".join(sorted(strangers))
        return f"what {names} does may depend on more than tensors, which a recording does not see"
    if not all(map(is_bare, loss.children())):
        return "a recording would not run the hooks on modules of the loss"
    if whole := [part.reason for part in loss.network_parts() if (part.reason or "").endswith("TensorDict")]:
        return whole[0]
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return f"{type(optimizer).__name__} cannot skip a step on a broken gradient: its fused=True can"
    return None
