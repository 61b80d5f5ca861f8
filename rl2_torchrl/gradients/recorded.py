"""`RecordedMinibatch`: minibatches of one size, of which the first is recorded and the others are made as it was."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import nn

from rl2_torchrl import kernels
from rl2_torchrl.gradients.adam import AdamSteps
from rl2_torchrl.gradients.part import Gradients, Part, State
from rl2_torchrl.gradients.program import Program, Values, numbers_of
from rl2_torchrl.kernels.recording import Calls, ChangedError, Recording
from rl2_torchrl.kernels.threads import one_thread
from rl2_torchrl.kernels.workspace import Workspace

__all__ = ["RecordedMinibatch"]

#: Env steps of a minibatch up to which threads would wait for each other longer than they work.
_FEW_STEPS = 256


class RecordedMinibatch:
    """Minibatches of as many chunks as ``own``, the first of which is run here.

    A step is what kernels do by themselves, as one call, or what is done in Python between.

    Args:
        program: makes losses and gradients.
        parts: those of its parts that are run here.
        chunks: entries ``[num_chunks, T, ...]`` of which minibatches are drawn, and what other parts have made.
        own: the chunks ``[rows]`` of the first minibatch, int64.

    Attributes:
        rows: how many chunks these are.
        values: losses and diagnostics of the first.
        gradients: of all minibatches.
    """

    def __init__(self, program: Program, parts: Sequence[Part], chunks: State, own: torch.Tensor):
        self._program, self._parts, self.rows = program, parts, len(own)
        self._recording, self._at = Recording(), ctypes.c_int64(own.data_ptr())
        self._norm, self._pass = self._recording.numbers_for(1), None
        #: The parameters, and their memory, which is theirs as long as it is read here.
        self._weights = [(parameter, parameter.detach()) for parameter in program.loss.parameters()]
        steps = len(own) * next(iter(chunks.values())).shape[1]
        with self._recording.on(), one_thread() if steps <= _FEW_STEPS else nullcontext():
            self._run_first(chunks)
        self.values, self._steps = self._figures(), self._recording.steps()
        self._carrying = [part.carries for part in parts]

    def _run_first(self, chunks: State) -> None:
        library, state = kernels.load(self._program.parameters[0].dtype), {}
        for key, chunk in chunks.items():
            entry = state[key] = Workspace.take(chunk, (self.rows, *chunk.shape[1:]))
            row = chunk.numel() // len(chunk) * chunk.element_size()
            library.gather_rows(ctypes.addressof(self._at), self.rows, row, chunk.data_ptr(), entry.data_ptr())
        self._figures, gradients = self._program.run(state, self._parts)
        self.gradients = {p: gradient for p, gradient in gradients.items() if isinstance(p, nn.Parameter)}

    def close(self) -> None:
        """Hands the memory back, without waiting for whoever collects what refers to itself."""
        self._recording.close()
        vars(self).clear()

    def __call__(self, own: torch.Tensor) -> tuple[Values, Gradients]:
        """Losses and diagnostics of the chunks ``own``, and the gradients.

        Raises:
            ChangedError: they are not to be had so, such as where a term gives other losses than before, or others have put a
                parameter elsewhere in memory.
        """
        self._at.value = own.data_ptr()
        # Also behind the steps, in which users' code may have moved parameters.
        if not self._are_in_place() or any(step() is False for step in self._steps) or not self._are_in_place():
            raise ChangedError
        if [part.carries for part in self._parts] != self._carrying:
            self._program.follow_gradients()
            raise ChangedError
        return self._figures(self._recording.numbers.tolist()), self.gradients

    def _are_in_place(self) -> bool:
        return all(parameter.data_ptr() == memory.data_ptr() for parameter, memory in self._weights)

    def passes(self, steps: AdamSteps, max_norm: float | None, order: torch.Tensor) -> list[dict[str, float]]:
        """As many minibatches as ``order`` has, each with a step of ``steps``, in one call, where kernels are all there is.

        Their metrics. They end before a minibatch whose gradient is not finite, or with an action that is none of the choices.
        """
        if [type(step) for step in self._steps] != [Calls]:
            return []
        self._program.set_gradients(self.gradients)
        table = steps.table()
        if self._pass is None:  # of one batch, for which steps and bound stay
            self._pass = self._steps[0].and_then("clip_and_step", *table, float(max_norm or 0), self._norm.data_ptr())
        numbers, count = self._recording.numbers, len(order) // self.rows
        out = numbers.new_empty(count, len(numbers))
        arguments = (order.data_ptr(), count, self.rows, numbers.data_ptr(), len(numbers), out.data_ptr())
        done = self._pass.make_passes(ctypes.addressof(self._at), *arguments)
        return list(map(self._metrics, out[:done].tolist()))

    def _metrics(self, numbers: list[float]) -> dict[str, float]:
        values = numbers_of(self._figures(numbers))
        total = sum(value for name, value in values.items() if name.startswith("loss_"))
        return {"loss": total, **values, "grad_norm": numbers[0]}
