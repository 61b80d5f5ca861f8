"""`RecordedStep`: what a policy does at a step, of which the kernels' calls are noted once and made again at all others.

Of networks of some ten thousand weights a step is 20 microseconds of arithmetic, on which Python and PyTorch would spend 40 more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from tensordict.nn.probabilistic import interaction_type
from torch import Tensor

from rl2_torchrl.kernels.functions import layout_of
from rl2_torchrl.kernels.recording import Calls, Recording
from rl2_torchrl.modules.acting import ActingPart, Run, State

__all__ = ["RecordedStep"]

#: A part that is called as it is, and its function; or None, and what takes the place of several.
Stage = tuple[ActingPart | None, Run]


class RecordedStep:
    """All ``parts`` at one step, called with the `State` of each of the ``steps`` of a batch, into which they write.

    Functions that are ``is_kernels`` are one call, if there is nothing else between them; all others are called as they are.
    """

    def __init__(self, parts: Sequence[ActingPart], steps: int):
        self._parts, self._steps = parts, steps
        self._modules = [module for part in parts for module in part.module.modules()]
        self.forget()

    def __reduce__(self) -> tuple:
        return type(self), (self._parts, self._steps)  # a copy's calls would be made on this one's memory

    def forget(self) -> None:
        """The next batch notes all calls anew."""
        self._noted_for: tuple | None = None
        self._held: list = []

    def start_batch(self) -> None:
        """Takes the weights as they are now."""
        now, held = self._all_that_matters()
        if now == self._noted_for:
            _require_memory(all(step() is not False for step in self._packing))
            self._stages = [(part, stage if part is None else part.make(self._steps)) for part, stage in self._stages]
        else:
            self._make_anew()
            self._noted_for, self._held = now, held  # held, or others could come to lie where they lay

    def _all_that_matters(self) -> tuple[tuple, list]:
        """What a step depends on beside its entries and the numbers that weights have; and what that is said of."""
        attributes = [value for module in self._modules for value in vars(module).values()]
        weights = [w for module in self._modules for w in (*module._parameters.values(), *module._buffers.values())]
        lie = [w if w is None else (w.data_ptr(), layout_of(w)) for w in weights]
        modes = interaction_type(), torch.is_inference_mode_enabled(), torch.get_num_threads()
        return (modes, [*map(id, attributes)], lie), [attributes, weights]

    def __call__(self, state: State) -> None:
        if not self._stages:
            self._first(state)
            return
        for _, stage in self._stages:
            stage(state)

    # ---------------------------------------------------------------- noting
    def _make_anew(self) -> None:
        self._recording = recording = Recording()
        #: A batch's functions; and, once there has been a step, those that are no kernels, and what takes the others' place.
        self._made: list[Stage] = []
        self._stages: list[Stage] = []
        for part in self._parts:
            packed = len(recording.calls)
            with recording.on():
                self._made.append((part, part.make(self._steps)))
            if not _is_kernels(self._made[-1]):
                del recording.calls[packed:]
        self._packing, recording.calls = recording.steps(), []

    def _first(self, state: State) -> None:
        """The first step, whose calls are noted."""
        recording, before, together = self._recording, dict(state), []
        for stage in self._made:
            calls, replaced, now = len(recording.calls), len(recording.replaced), dict(state)
            if _is_kernels(stage):
                with recording.on():
                    stage[1](state)
                if recording.is_whole(calls) and len(recording.calls) > calls:  # none is noted where PyTorch did it
                    together.append(stage)
                    continue
            else:
                stage[1](state)
            del recording.calls[calls:], recording.replaced[replaced:]
            self._end_stage(together, before, now)  # what this one has written may have the name of what they have
            self._stages.append(stage)
            before, together = dict(state), []
        self._end_stage(together, before, state)

    def _end_stage(self, together: list[Stage], before: State, after: State) -> None:
        if together:
            again = _Again(self._recording, together, before, after)
            self._stages += [(None, again)] if again.is_certain else together
        self._recording.calls, self._recording.replaced = [], []


class _Again:
    """What a ``recording`` has noted of ``together``, which made ``after`` of ``before``, on other entries of the same layout."""

    def __init__(self, recording: Recording, together: list[Stage], before: State, after: State):
        self._runs, self._calls = [run for _, run in together], Calls(recording.library, recording.calls)
        places, read, written = self._calls.places, {}, {}
        for part, _ in together:
            read |= {key: before[key] for key in part.in_keys if key not in written}
            written |= {key: after[key] for key in part.out_keys}
        #: What is read at each step: its layout, and where its address stands.
        self._read = [(key, layout_of(entry), places(entry)) for key, entry in read.items()]
        self._drawn = [(make, places(made)) for made, make in recording.replaced]
        #: What is written, in memory that each step has of its own.
        self._written = [(memory, places(memory), dict(_in(memory, written))) for memory in recording.held]
        self._written = [each for each in self._written if each[-1]]
        made = [key for *_, views in self._written for key in views]
        moved = [place for *_, pairs in (*self._read, *self._drawn) for place, _ in pairs]
        moved += [place for _, pairs, _ in self._written for place, _ in pairs]
        #: What is the same at all steps.
        self._constants = {key: entry for key, entry in written.items() if key not in made}
        are_fixed = {_storage(entry) for entry in read.values()}.isdisjoint(map(_storage, self._constants.values()))
        #: Whether no entry is another one's memory at the first step, which it need not be at the next.
        self.is_certain = are_fixed and len(set(moved)) == len(moved) and len(set(made)) == len(made)

    def __call__(self, state: State) -> None:
        if any(key not in state or layout_of(state[key]) != layout for key, layout, _ in self._read):
            for run in self._runs:
                run(state)
            return
        for key, _, places in self._read:
            self._put(state[key], places)
        for make, places in self._drawn:
            self._put(make(), places)
        for like, places, views in self._written:
            memory = like.new_empty(like.shape)
            self._put(memory, places)
            for key, view in views.items():
                state[key] = memory if view is None else memory.as_strided(*view)
        state.update(self._constants)
        _require_memory(self._calls())

    def _put(self, tensor: Tensor, places: list[tuple[int, int]]) -> None:
        address = tensor.data_ptr()
        for place, offset in places:
            self._calls.table[place] = address + offset


def _in(memory: Tensor, entries: State) -> Iterator[tuple]:
    """The keys of those ``entries`` that lie in ``memory``, and how; None where one is all of it."""
    for key, entry in entries.items():
        if _storage(entry) == _storage(memory):
            view = (entry.shape, entry.stride(), entry.storage_offset())
            yield key, (None if view == (memory.shape, memory.stride(), 0) else view)


def _is_kernels(stage: Stage) -> bool:
    return getattr(stage[1], "is_kernels", False)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _require_memory(is_done: bool) -> None:
    if not is_done:
        raise MemoryError("there is no memory for a step of the networks: take fewer threads, rows or units.")
