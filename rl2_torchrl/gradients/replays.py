"""`Replays`: a `Program` over one batch's minibatches, whose kernels' calls are noted for the first and made again for the others.

What kernels do from one foreign part to the next is one call then, and a whole pass is one, Adam's steps included, where there
is no foreign part. The original takes an optimizer step on 32 env steps at a time: 0.1 ms of arithmetic, on which Python would
spend 0.6 ms.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torchrl import torchrl_logger

from rl2_torchrl import kernels
from rl2_torchrl.gradients.adam import AdamSteps
from rl2_torchrl.gradients.part import Gradients, Part, State
from rl2_torchrl.gradients.policy import LOG_PROB
from rl2_torchrl.gradients.program import Program, Values
from rl2_torchrl.gradients.recorded import RecordedMinibatch
from rl2_torchrl.kernels.recording import ChangedError

__all__ = ["Replays"]


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
        if self._recorded is not None:
            self._recorded.close()
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
        is_plain = part.reason is None and not part.parameters and not part.wanted and LOG_PROB not in part.out_keys
        if is_plain and written.isdisjoint([*part.in_keys, *part.out_keys]) and read.isdisjoint(part.out_keys):
            found.append(part)
        else:
            read.update(part.in_keys)
            written.update(part.out_keys)
    return found
