"""`Replays`: a `Program` over one batch's minibatches, whose kernels' calls are noted for the first and made again for the others.

What kernels do from one foreign part to the next is one call then, and a whole pass is one, Adam's steps included, where there
is no foreign part. The original takes an optimizer step on 32 env steps at a time: 0.1 ms of arithmetic, on which Python would
spend 0.6 ms.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext

import torch
from tensordict import NestedKey
from torch import nn

from rl2_torchrl import kernels
from rl2_torchrl.gradients.adam import AdamSteps
from rl2_torchrl.gradients.part import Gradients, Part, State, accumulate
from rl2_torchrl.gradients.policy import LOG_PROB
from rl2_torchrl.gradients.program import Program, TermPart, Values, merge_losses
from rl2_torchrl.kernels.recording import Calls, Recording
from rl2_torchrl.kernels.threads import one_thread
from rl2_torchrl.kernels.workspace import Workspace

__all__ = ["Replays"]

#: Env steps of a minibatch up to which threads would wait for each other longer than they work.
_FEW_STEPS = 256


class Replays:
    """Losses and gradients of minibatches of ``chunks``, entries ``[num_chunks, T, ...]``, by ``program``.

    What reads data alone is made once, of all chunks. `close` hands the memory back when the batch is done.
    """

    def __init__(self, program: Program, chunks: Mapping[NestedKey, torch.Tensor]):
        program.loss.require_starts(chunks)
        self.program, self.chunks = program, dict(chunks)
        made = _of_data_alone(program.parts)
        self.parts = [part for part in program.parts if part not in made]
        with torch.no_grad():
            for part in made:
                part.forward(self.chunks)
            for part in self.parts:
                self.chunks.update(part.prepared(self.chunks))
        self.chunks = {key: entry.contiguous() for key, entry in self.chunks.items()}
        self._sizes: dict[int, _Minibatch | None] = {}
        on_cpu = all(entry.is_cpu for entry in self.chunks.values())
        self._can_record = on_cpu and kernels.covers(*program.parameters[:1])

    def __call__(self, own: torch.Tensor) -> Values:
        """Losses and diagnostics of the chunks ``own`` ``[rows]``, int64, and the gradients of all losses' sum."""
        values, gradients = self.run(own)
        self.program.set_gradients(gradients)
        return values

    @torch.no_grad()
    def run(self, own: torch.Tensor) -> tuple[Values, Gradients]:
        """As `Program.run`; the gradients lie where the next ones will."""
        size = len(own)
        if (minibatch := self._sizes.get(size)) is not None:
            try:
                return minibatch(own), minibatch.gradients
            except _ChangedError:
                self._sizes[size] = None
        elif self._can_record and size not in self._sizes:
            try:
                minibatch = self._sizes[size] = _Minibatch(self, own)
            except _ChangedError:
                self._sizes[size] = None
            else:
                return minibatch.values, minibatch.gradients
        entries = {key: entry.index_select(0, own) for key, entry in self.chunks.items()}
        return self.program.run(entries, self.parts)

    def passes(self, steps: object, max_norm: float | None, order: torch.Tensor, rows: int) -> list[Values]:
        """All minibatches of ``rows`` chunks at the beginning of ``order`` in one call, with a step of ``steps`` on each.

        Their metrics, none where there is more to them than kernels. They end before one whose gradient is not finite, or an action
        none of the choices.
        """
        minibatch = self._sizes.get(rows)
        if minibatch is None or not isinstance(steps, AdamSteps) or len(order) < rows:
            return []
        return minibatch.passes(steps, max_norm, order)

    def close(self) -> None:
        """Hands the memory back."""
        for minibatch in self._sizes.values():
            if minibatch is not None:
                Workspace.give_all(minibatch.recording)
        self._sizes, self._can_record = {}, False


class _ChangedError(Exception):
    """A minibatch is not as the first one was."""


class _Minibatch:
    """Minibatches of as many chunks as ``own``, the first of which is run here.

    A step is what kernels do by themselves, as one call, or what a part or term does in Python. That works on memory of its own,
    which whoever is shown it may keep, and what it gives is copied to where the kernels read it.

    Attributes:
        values: losses and diagnostics of the first.
        gradients: of the last one that was run.
        recording: what the kernels did.
    """

    def __init__(self, replays: Replays, own: torch.Tensor):
        self._program, self._rows = replays.program, len(own)
        self.recording, self._at = Recording(), ctypes.c_int64(own.data_ptr())
        self._norm = self.recording.numbers_for(1)
        self._steps: list[Calls | Callable[[], None]] = []
        self._end, self._in_python, self._pass = 0, set(), None
        self._figures: list[Callable[[list[float]], Values]] = []
        #: The parameters and their memory, which is theirs as long as it is read here.
        self._weights = [(p, p.data_ptr(), p.detach()) for p in self._program.loss.parameters()]
        self._state: State = {}
        self._read: dict[Part, list[NestedKey]] = {}
        steps = len(own) * next(iter(replays.chunks.values())).shape[1]
        with one_thread() if steps <= _FEW_STEPS else nullcontext():
            self._run_first(replays.parts, replays.chunks)
        self.values = self._values()

    # ------------------------------------------------------------ as it was
    def __call__(self, own: torch.Tensor) -> dict[str, float]:
        """Losses and diagnostics of the chunks ``own``, and their ``gradients``; `_ChangedError` where these are others."""
        self._at.value = own.data_ptr()
        self._follow_weights()
        for step in self._steps:
            if isinstance(step, Calls):
                _require(step())  # what is wrong will be said where it is called for itself
            else:
                step()
                self._follow_weights()
        return self._values()

    def _follow_weights(self) -> None:
        """Has the kernels read the parameters' memory where hooks or forwards of users have put other in its place."""
        for number, (parameter, address, _) in enumerate(self._weights):
            if parameter.data_ptr() != address:
                _require(parameter.is_contiguous())
                for calls in filter(lambda step: isinstance(step, Calls), self._steps):
                    calls.move(address, parameter.data_ptr())
                self._weights[number] = (parameter, parameter.data_ptr(), parameter.detach())

    def _values(self) -> Values:
        numbers, values = self.recording.numbers.tolist(), {}
        for figures in self._figures:
            merge_losses(values, figures(numbers))
        return values

    def passes(self, steps: AdamSteps, max_norm: float | None, order: torch.Tensor) -> list[Values]:
        """`Replays.passes`."""
        if [type(step) for step in self._steps] != [Calls]:
            return []
        self._program.set_gradients(self.gradients)
        table = steps.table()
        if self._pass is None:  # of one batch, for which steps and bound stay
            self._pass = self._steps[0].and_then("clip_and_step", *table, float(max_norm or 0), self._norm.data_ptr())
        calls = self._pass
        numbers, count = self.recording.numbers_used, len(order) // self._rows
        out = numbers.new_empty(count, len(numbers))
        arguments = (order.data_ptr(), count, self._rows, numbers.data_ptr(), len(numbers), out.data_ptr())
        done = calls.make_passes(ctypes.addressof(self._at), *arguments)
        steps.tell_autograd()
        return list(map(self._metrics, out[:done].tolist()))

    def _metrics(self, numbers: list[float]) -> Values:
        values: Values = {}
        for figures in self._figures:
            values |= figures(numbers)
        total = sum(value for name, value in values.items() if name.startswith("loss_"))
        return {"loss": total, **values, "grad_norm": numbers[0]}

    # ------------------------------------------------------------ the first
    def _run_first(self, parts: Sequence[Part], chunks: State) -> None:
        self._by_kernels(lambda: self._gather(chunks))
        for part in parts:
            self._forward(part)
        gradients: Gradients = {}
        for term in self._program.terms:
            self._term(term, gradients)
        for part in reversed(parts):
            if not gradients.keys().isdisjoint(part.out_keys):
                self._backward(part, gradients)
        self._end_step()
        self.gradients = gradients

    def _by_kernels(self, work: Callable[[], object]) -> bool:
        """Does ``work``; whether kernels alone did it, so that their calls are all there is to do again."""
        recording = self.recording
        first, recording.is_whole = len(recording.calls), True
        with recording.on():
            work()
        if not recording.is_whole:
            del recording.calls[first:]
        return recording.is_whole

    def _by_python(self, step: Callable[[], None]) -> None:
        self._end_step()
        self._steps.append(step)

    def _end_step(self) -> None:
        """What has been called since the last step is one."""
        if len(self.recording.calls) > self._end:
            self._steps.append(Calls(self.recording, self._end))
        self._end = len(self.recording.calls)

    def _gather(self, chunks: State) -> None:
        library = kernels.load(self._program.parameters[0].dtype)
        for key, chunk in chunks.items():
            entry = self._state[key] = Workspace.take(chunk, (self._rows, *chunk.shape[1:]))
            row = chunk.numel() // len(chunk) * chunk.element_size()
            library.gather_rows(ctypes.addressof(self._at), self._rows, row, chunk.data_ptr(), entry.data_ptr())

    def _forward(self, part: Part) -> None:
        # A part may write what it reads, or what others have read.
        before, is_known = dict(self._state), part.carries
        if self._by_kernels(lambda: part.starts_by_hand(self._state)) and part.is_by_hand:
            return
        entries = self._state
        if not part.is_by_hand:
            entries = self._shown(part, before)
            part.forward_by_autograd(entries)
        if part.carries != is_known:  # by parameters of others
            self._program.follow_gradients()
        self._in_python.add(part)
        carries, made = part.carries, {key: self._fixed(entries[key]) for key in part.out_keys}
        self._state.update(made)

        def again() -> None:
            entries = self._shown(part, before)
            part.forward(entries)
            _require(part.carries == carries)
            for key, entry in made.items():
                _require(entries[key].shape == entry.shape)
                entry.copy_(entries[key])

        self._by_python(again)

    def _term(self, term: TermPart, gradients: Gradients) -> None:
        made: list = []
        if term.brings_kernels() and self._by_kernels(lambda: made.extend(term.by_kernels(self._state))) and made:
            figures, found = made
            self._figures.append(figures)
            self._take(found, gradients)
            return
        number = len(self._figures)

        def run() -> Gradients:
            values, found = term.losses_and_gradients(self._shown(term, self._state))
            self._figures[number:] = [lambda _: values, *self._figures[number + 1 :]]
            return found

        add = self._adding(run(), gradients)
        self._by_python(lambda: add(run()))

    def _backward(self, part: Part, gradients: Gradients) -> None:
        slopes = {key: gradients.pop(key) for key in part.out_keys if key in gradients}
        found = dict(slopes)
        if part not in self._in_python and self._by_kernels(lambda: part.backward(found)):
            self._take(found, gradients)
            return

        kept = _kept(part) if part not in self._in_python else []  # by kernels, whose forward others have done since

        def run() -> Gradients:
            for each, attributes in kept:
                vars(each).update(attributes)
            if not part.is_by_hand:  # hooks may hold what they are shown
                return part.backward_by_autograd({key: slope.clone() for key, slope in slopes.items()})
            found = dict(slopes)
            part.backward(found)
            return found

        add = self._adding(run() if part in self._in_python else found, gradients)
        self._by_python(lambda: add(run()))

    def _take(self, found: Gradients, gradients: Gradients) -> None:
        """Adds to ``gradients`` what kernels have ``found``."""

        def add() -> None:
            for source, gradient in found.items():
                accumulate(gradients, source, gradient)

        calls = len(self.recording.calls)
        if not self._by_kernels(add):  # strided ones, which PyTorch has added up
            del self.recording.calls[calls:]
            raise _ChangedError

    def _adding(self, found: Gradients, gradients: Gradients) -> Callable[[Gradients], None]:
        """Adds to ``gradients`` what Python has ``found``; returns what does so again, with what it has found then."""
        firsts = {source for source in found if source not in gradients}
        for source, gradient in found.items():
            if source in firsts:  # a parameter keeps its own
                place = Workspace.make if isinstance(source, nn.Parameter) else Workspace.take
                gradients[source] = self._fixed(gradient, place)
            else:
                gradients[source].add_(gradient)
        totals = {source: gradients[source] for source in found}

        def add(found: Gradients) -> None:
            _require(found.keys() == totals.keys())
            for source, gradient in found.items():
                (totals[source].copy_ if source in firsts else totals[source].add_)(gradient)

        return add

    def _fixed(self, entry: torch.Tensor, place: Callable = Workspace.take) -> torch.Tensor:
        """A copy of ``entry`` where the kernels will read it again."""
        with self.recording.on():
            copy = place(entry, tuple(entry.shape))
        return copy.copy_(entry)

    def _shown(self, part: Part, state: State) -> State:
        """The ``state`` as ``part`` may read it, and write to it."""
        if part.is_by_hand and type(part).__module__.startswith("rl2_torchrl."):
            return dict(state)
        if part not in self._read:
            paths = list(map(_path, part.in_keys))
            self._read[part] = [key for key in state if any(_path(key)[: len(p)] == p for p in paths)]
        return {**state, **{key: state[key].clone() for key in self._read[part]}}


def _kept(part: Part) -> list[tuple[Part, dict]]:
    """What ``part``, and those that it is made of, keep for their backward."""
    parts = [part, *(each for each in vars(part).values() if isinstance(each, Part))]
    return [(each, dict(vars(each))) for each in parts]


def _require(is_as_before: bool) -> None:
    if not is_as_before:
        raise _ChangedError


def _path(key: NestedKey) -> tuple[str, ...]:
    return key if isinstance(key, tuple) else (key,)


def _of_data_alone(parts: Sequence[Part]) -> list[Part]:
    """Those of ``parts`` that may run before all others, on data that change in no minibatch."""
    found, read, written = [], set(), set()
    for part in parts:
        is_plain = part.reason is None and not part.parameters and not part.wanted and LOG_PROB not in part.out_keys
        if is_plain and written.isdisjoint(part.in_keys) and read.isdisjoint(part.out_keys):
            found.append(part)
        else:
            read.update(part.in_keys)
            written.update(part.out_keys)
    return found
