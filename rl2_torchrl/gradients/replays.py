"""`Replays`: a `Program` over one batch's minibatches, whose kernels' calls are noted for the first and made again for the others.

What kernels do from one foreign part to the next is one call then, and a whole pass is one, Adam's steps included, where there
is no foreign part. The original takes an optimizer step on 32 env steps at a time: 0.1 ms of arithmetic, on which Python would
spend 0.6 ms.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache

import torch
from torch import nn
from torchrl import torchrl_logger

from rl2_torchrl import kernels
from rl2_torchrl.gradients.adam import AdamSteps
from rl2_torchrl.gradients.part import Gradients, Part, State
from rl2_torchrl.gradients.policy import LOG_PROB
from rl2_torchrl.gradients.program import Program, Values, numbers_of
from rl2_torchrl.kernels.recording import Calls, ChangedError, Recording
from rl2_torchrl.kernels.threads import one_thread
from rl2_torchrl.kernels.workspace import Workspace

__all__ = ["Replays"]

#: Env steps of a minibatch up to which threads would wait for each other longer than they work.
_FEW_STEPS = 256


class Replays:
    """Losses and gradients of minibatches of ``chunks``, entries ``[num_chunks, T, ...]``, by ``program``.

    What reads data alone is made once, of all chunks. A minibatch that cannot be made as the first of its size was, such as where
    a term gives other losses, is made anew, all of it, part by part, and so are the batch's later ones; so is one of another size,
    the last of a pass. `close` hands the memory back when the batch is done.

    Args:
        program: makes them, for the whole batch.
        chunks: the batch.
        rows: chunks of a minibatch; the last one of a pass may have fewer.
        passes: passes over the chunks.
        are_kept: whether somebody may keep a parameter's gradient, which otherwise the next minibatch's is written over.
    """

    def __init__(self, program: Program, chunks: State, rows: int, *, passes: int, are_kept: bool = False):
        program.loss.require_starts(chunks)
        self._are_kept = are_kept
        made, self.program = _of_data_alone(program.parts), program
        self.parts = [part for part in program.parts if part not in made]
        #: Those that are given, and what is made of data alone.
        self.chunks = dict(chunks)
        with torch.no_grad():
            for part in made:
                part.forward(self.chunks)
        self._convert()
        self.chunks = {key: entry.contiguous() for key, entry in self.chunks.items()}
        self._recorded: RecordedMinibatch | None = None
        on_cpu = all(entry.is_cpu for entry in self.chunks.values())
        # Noting what the first does takes a third of its time.
        is_worth_it = passes * (len(next(iter(chunks.values()))) // rows) > 2
        self._is_recording = is_worth_it and on_cpu and kernels.covers(*program.parameters[:1])

    def _convert(self) -> None:
        """Data in another dtype than parts read, such as float32 where networks are float64: once, and beside what there is.

        Bytes are the module's own to convert, which may scale them.
        """
        made = {key for part in self.parts for key in part.out_keys}
        for part in self.parts:
            for number, key in enumerate(part.in_keys):
                entry, dtype = self.chunks.get(key), part.dtypes.get(key)
                if entry is None or key in made or entry.dtype == torch.uint8 or dtype in (None, entry.dtype):
                    continue
                part.in_keys[number] = name = ("converted", str(dtype), *(key if isinstance(key, tuple) else (key,)))
                if name not in self.chunks:  # for another part
                    self.chunks[name] = entry.to(dtype)

    def __call__(self, own: torch.Tensor) -> Values:
        """Losses and diagnostics of the chunks ``own`` ``[rows]``, int64, and the gradients of all losses' sum."""
        values, gradients = self.run(own)
        if self._are_kept:
            gradients = {source: gradient.clone() for source, gradient in gradients.items()}
        self.program.set_gradients(gradients)
        return values

    @torch.no_grad()
    def run(self, own: torch.Tensor) -> tuple[Values, Gradients]:
        """Losses, diagnostics and gradients, which lie where the next ones will."""
        numbers = torch.get_rng_state()
        try:
            if self._recorded is None and self._is_recording:
                self._recorded = RecordedMinibatch(self.program, self.parts, self.chunks, own)
                return self._recorded.values, self._recorded.gradients
            if self._recorded is not None and self._recorded.rows == len(own):
                return self._recorded(own)
        except ChangedError:
            _tell_of_change()
            self.close()
            torch.set_rng_state(numbers)  # modules that draw draw the same again
        entries = {key: entry.index_select(0, own) for key, entry in self.chunks.items()}
        figures, gradients = self.program.run(entries, self.parts)
        return figures(), gradients

    def passes(self, steps: object, max_norm: float | None, order: torch.Tensor, rows: int) -> list[dict[str, float]]:
        """`RecordedMinibatch.passes` of those of ``rows`` chunks at the beginning of ``order``; none where it cannot be."""
        is_recorded = self._recorded is not None and self._recorded.rows == rows
        return self._recorded.passes(steps, max_norm, order) if is_recorded and isinstance(steps, AdamSteps) else []

    def close(self) -> None:
        """Hands the memory back; what minibatches there are yet, Python makes."""
        self._recorded, self._is_recording = None, False


@cache
def _tell_of_change() -> None:
    torchrl_logger.info(
        "PPOUpdate: a minibatch went otherwise than its batch's first: a term gives other losses, entries have other shapes, or "
        "a parameter lies elsewhere. The rest of such a batch is made part by part, which takes longer with small minibatches."
    )


def _of_data_alone(parts: Sequence[Part]) -> list[Part]:
    """Those of ``parts`` that may run before all others, on data that change in no minibatch."""
    found, read, written = [], set(), set()
    for part in parts:
        is_plain = part.reason is None and not part.parameters and LOG_PROB not in part.out_keys
        if is_plain and written.isdisjoint([*part.in_keys, *part.out_keys]) and read.isdisjoint(part.out_keys):
            found.append(part)
        else:
            read.update(part.in_keys)
            written.update(part.out_keys)
    return found


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
        self._pass: Calls | None = None
        #: The parameters, and their memory, which is theirs as long as it is read here.
        self._weights = [(parameter, parameter.detach()) for parameter in program.loss.parameters()]
        steps = len(own) * next(iter(chunks.values())).shape[1]
        with self._recording.on(), one_thread() if steps <= _FEW_STEPS else nullcontext():
            self._run_first(chunks)
        self.values, self._steps = self._figures(), self._recording.steps()
        self._carrying = [part.carries for part in parts]

    def _run_first(self, chunks: State) -> None:
        library, state = kernels.load(self._program.parameters[0].dtype), {}
        self._norm = Recording.numbers_for(1)
        for key, chunk in chunks.items():
            entry = state[key] = Workspace.take(chunk, (self.rows, *chunk.shape[1:]))
            row = chunk.numel() // len(chunk) * chunk.element_size()
            library.gather_rows(ctypes.addressof(self._at), self.rows, row, chunk.data_ptr(), entry.data_ptr())
        self._figures, gradients = self._program.run(state, self._parts)
        self.gradients = {p: gradient for p, gradient in gradients.items() if isinstance(p, nn.Parameter)}

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
