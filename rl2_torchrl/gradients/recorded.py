"""`RecordedMinibatch`: minibatches of one size, whose kernels' calls are noted for the first and made again for the others."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import count

import torch
from tensordict import NestedKey
from torch import nn

from rl2_torchrl import kernels
from rl2_torchrl.gradients.adam import AdamSteps
from rl2_torchrl.gradients.part import Gradients, Part, State, accumulate
from rl2_torchrl.gradients.program import Program, TermPart, Values, merge_losses
from rl2_torchrl.kernels.recording import Calls, Recording
from rl2_torchrl.kernels.threads import one_thread
from rl2_torchrl.kernels.workspace import Workspace

__all__ = ["ChangedError", "RecordedMinibatch"]

#: Env steps of a minibatch up to which threads would wait for each other longer than they work.
_FEW_STEPS = 256


class ChangedError(Exception):
    """A minibatch cannot be made as the first one was."""


@dataclass(frozen=True)
class _Late:
    """Under this among gradients lies what Python has found by an entry, until kernels have found theirs."""

    key: NestedKey


class RecordedMinibatch:
    """Minibatches of as many chunks as ``own``, the first of which is run here.

    A step is what kernels do by themselves, as one call, or what a part or term does in Python. What that gives is copied to where
    the kernels read it; what it is shown are copies, which it may keep and write to. Where it is not what was given first, the step
    goes on with the rest by `_go_on`, and returns what that has made.

    Args:
        program: makes losses and gradients.
        parts: those of its parts that are run here.
        chunks: entries ``[num_chunks, T, ...]`` of which minibatches are drawn, and what other parts have made.
        own: the chunks ``[rows]`` of the first minibatch, int64.

    Attributes:
        values: losses and diagnostics of the first.
        gradients: of all minibatches that go as the first one did.
    """

    def __init__(self, program: Program, parts: Sequence[Part], chunks: State, own: torch.Tensor):
        self._program, self._parts, self._rows = program, parts, len(own)
        self._recording, self._at = Recording(), ctypes.c_int64(own.data_ptr())
        self._norm = self._recording.numbers_for(1)
        self._steps: list[Calls | Callable[[], tuple[Values, Gradients] | None]] = []
        self._end, self._in_python, self._pass = 0, set(), None
        #: Of each term what makes numbers of those that kernels leave, and what is more than a number.
        self._figures: list[tuple[Callable[[list[float]], Values], Values]] = []
        self._settings = [part.settings() for part in parts]
        #: The parameters and their memory, which is theirs as long as it is read here.
        self._weights = _places(self._program.loss)
        self._state: State = {}
        self._read: dict[Part, list[NestedKey]] = {}
        #: What parts that kernels run keep for their backward, which minibatches of other sizes write over.
        self._kept: dict[Part, list[tuple[Part, dict]]] = {}
        steps = len(own) * next(iter(chunks.values())).shape[1]
        with one_thread() if steps <= _FEW_STEPS else nullcontext():
            self._run_first(chunks)
        self.values = self._values()

    def close(self) -> None:
        """Hands the memory back, without waiting for whoever collects what refers to itself."""
        self._recording.close()
        vars(self).clear()

    # ------------------------------------------------------------ as it was
    def __call__(self, own: torch.Tensor) -> tuple[Values, Gradients]:
        """Losses and diagnostics of the chunks ``own``, and the gradients.

        Raises:
            ChangedError: they are not to be had so.
        """
        self._at.value = own.data_ptr()
        _require(self._follow_weights())
        _require([part.settings() for part in self._parts] == self._settings)
        for step in self._steps:
            if isinstance(step, Calls):
                _require(step())  # what is wrong will be said where it is called for itself
            elif (made := step()) is not None:
                return made
        return self._values(), self.gradients

    def _go_on(self, state: State, gradients: Gradients, values: Values, done: int) -> tuple[Values, Gradients]:
        """The rest of a minibatch of which so many turns are ``done``, as `Program.go_on` counts them."""
        # Whoever is shown something of it may keep it, and the next minibatch is made in its place.
        state, gradients = ({key: entry.clone() for key, entry in entries.items()} for entries in (state, gradients))
        for late in [source for source in gradients if isinstance(source, _Late)]:
            accumulate(gradients, late.key, gradients.pop(late))
        for part in self._parts[:done]:
            self._remember(part)
        return self._program.go_on(state, self._parts, gradients, values, done)

    def _remember(self, part: Part) -> None:
        for each, attributes in self._kept.get(part, ()):
            vars(each).update(attributes)

    def _follow_weights(self) -> bool:
        """Has the kernels read the parameters' memory where users have put other in its place; False where they cannot."""
        moved = {address: p.data_ptr() for p, address, _ in self._weights if p.data_ptr() != address}
        if not moved:
            return True
        if not all(parameter.is_contiguous() for parameter, *_ in self._weights):
            return False
        for calls in filter(lambda step: isinstance(step, Calls), self._steps):
            calls.move(moved)
        self._weights = _places(self._program.loss)
        return True

    def _values(self, terms: int | None = None) -> Values:
        """Of all terms, or of so many."""
        numbers, values = self._recording.numbers.tolist(), {}
        for figures, more in self._figures[:terms]:
            merge_losses(values, {**figures(numbers), **more})
        return values

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
        calls = self._pass
        numbers, count = self._recording.numbers_used, len(order) // self._rows
        out = numbers.new_empty(count, len(numbers))
        arguments = (order.data_ptr(), count, self._rows, numbers.data_ptr(), len(numbers), out.data_ptr())
        done = calls.make_passes(ctypes.addressof(self._at), *arguments)
        return list(map(self._metrics, out[:done].tolist()))

    def _metrics(self, numbers: list[float]) -> dict[str, float]:
        values: dict[str, float] = {}
        for figures, _ in self._figures:
            values |= figures(numbers)
        total = sum(value for name, value in values.items() if name.startswith("loss_"))
        return {"loss": total, **values, "grad_norm": numbers[0]}

    # ------------------------------------------------------------ the first
    def _run_first(self, chunks: State) -> None:
        self._by_kernels(lambda: self._gather(chunks))
        gradients, done = {}, count(1)
        for part in self._parts:
            self._forward(part, next(done))
        for term in self._program.terms:
            self._term(term, gradients, next(done))
        for part, now in zip(reversed(self._parts), done, strict=False):
            late = {key: gradients.pop(_Late(key)) for key in part.out_keys if _Late(key) in gradients}
            self._take(late, gradients)
            if not gradients.keys().isdisjoint(part.out_keys):
                self._backward(part, gradients, now)
        self._end_step()
        self.gradients = {p: gradient for p, gradient in gradients.items() if isinstance(p, nn.Parameter)}

    def _by_kernels(self, work: Callable[[], object]) -> bool:
        """Does ``work``; whether kernels alone did it, so that their calls are all there is to do again."""
        recording = self._recording
        first, recording.is_whole = len(recording.calls), True
        with recording.on():
            work()
        if not recording.is_whole:
            del recording.calls[first:]
        return recording.is_whole

    def _by_python(self, step: Callable[[], tuple[Values, Gradients] | None]) -> None:
        """Adds a ``step`` that has been done once, after what ended with `_end_step`."""
        self._steps.append(step)
        self._follow_weights()

    def _end_step(self) -> None:
        """What has been called since the last step is one."""
        if len(self._recording.calls) > self._end:
            self._steps.append(Calls(self._recording.library, self._recording.calls[self._end :]))
        self._end = len(self._recording.calls)

    def _gather(self, chunks: State) -> None:
        library = kernels.load(self._program.parameters[0].dtype)
        for key, chunk in chunks.items():
            entry = self._state[key] = Workspace.take(chunk, (self._rows, *chunk.shape[1:]))
            row = chunk.numel() // len(chunk) * chunk.element_size()
            library.gather_rows(ctypes.addressof(self._at), self._rows, row, chunk.data_ptr(), entry.data_ptr())

    def _forward(self, part: Part, done: int) -> None:
        # A part may write what it reads, or what others have read.
        before, is_known = dict(self._state), part.carries
        is_ours = _is_ours(part)
        if is_ours and self._by_kernels(lambda: part.starts_by_hand(self._state)) and part.is_by_hand:
            self._kept[part] = [(each, dict(vars(each))) for each in _with_inner(part)]
            return
        self._end_step()
        if is_ours and part.is_by_hand:
            entries = self._state
        else:
            entries = self._shown(part, before, part.forward_by_autograd if is_ours else part.forward)
        if part.carries != is_known:  # by parameters of others
            self._program.follow_gradients()
        self._in_python.add(part)
        carries, made = part.carries, {key: self._fixed(entries[key]) for key in part.out_keys}
        self._state.update(made)

        def again() -> tuple[Values, Gradients] | None:
            entries = self._shown(part, before, part.forward)
            is_as_before = self._follow_weights() and all(entries[k].shape == entry.shape for k, entry in made.items())
            if part.carries != carries:
                self._program.follow_gradients()
            if not is_as_before or part.carries != carries:
                return self._go_on(entries, {}, {}, done)
            for key, entry in made.items():
                entry.copy_(entries[key])
            return None

        self._by_python(again)

    def _term(self, term: TermPart, gradients: Gradients, done: int) -> None:
        made, number = [], len(self._figures)
        if term.brings_kernels() and self._by_kernels(lambda: made.extend(term.by_kernels(self._state))) and made:
            *figures, found = made
            self._figures.append(tuple(figures))
            self._take(found, gradients)
            return
        self._end_step()

        def run() -> Gradients:
            given: list = []
            self._shown(term, self._state, lambda state: given.extend(term.losses_and_gradients(state)))
            values, found = given
            self._figures[number:] = [(lambda _: values, {}), *self._figures[number + 1 :]]
            return found

        self._repeat(term, run, run(), gradients, done)

    def _backward(self, part: Part, gradients: Gradients, done: int) -> None:
        slopes = {key: gradients.pop(key) for key in part.out_keys if key in gradients}
        found = dict(slopes)
        if part not in self._in_python and self._by_kernels(lambda: part.backward(found)):
            self._take(found, gradients)
            return
        self._end_step()

        def run() -> Gradients:
            self._remember(part)
            if not part.is_by_hand:  # hooks may hold what they are shown
                return part.backward_by_autograd({key: slope.clone() for key, slope in slopes.items()})
            found = dict(slopes)
            part.backward(found)
            return found

        found = run() if part in self._in_python else found
        self._repeat(part, run, found, gradients, done)

    def _take(self, found: Gradients, gradients: Gradients) -> None:
        """Adds to ``gradients`` what kernels have ``found``."""

        def add() -> None:
            for source, gradient in found.items():
                accumulate(gradients, source, gradient)

        _require(self._by_kernels(add))  # else strided ones, which PyTorch has added up

    def _repeat(self, part: Part, run: Callable, found: Gradients, gradients: Gradients, done: int) -> None:
        """Adds to ``gradients`` what ``part`` has ``found`` in Python, and each time what it finds by ``run``."""
        before, terms = dict(gradients), len(self._figures)
        adds: dict[NestedKey | nn.Parameter, Callable] = {}
        for source, gradient in found.items():
            is_own = isinstance(source, nn.Parameter)  # which keeps its own
            key, place = (source, Workspace.make) if is_own else (_Late(source), Workspace.take)
            if key in gradients:
                adds[source] = gradients[key].add_
            else:
                gradients[key] = self._fixed(gradient, place)
                adds[source] = gradients[key].copy_
            adds[source](gradient)

        def again() -> tuple[Values, Gradients] | None:
            found = run()
            if not self._follow_weights() or found.keys() != adds.keys():
                own = dict(before)
                part.add(found, own)
                return self._go_on(self._state, own, self._values(terms), done)
            for source, gradient in found.items():
                adds[source](gradient)
            return None

        self._by_python(again)

    def _fixed(self, entry: torch.Tensor, place: Callable = Workspace.take) -> torch.Tensor:
        """A copy of ``entry`` where the kernels will read it again."""
        with self._recording.on():
            copy = place(entry, tuple(entry.shape))
        return copy.copy_(entry)

    def _shown(self, part: Part, state: State, run: Callable[[State], object]) -> State:
        """``run`` on a ``state`` that it may read, keep and write to; returns what it has made of it."""
        if part.is_by_hand and _is_ours(part):
            entries, shown = dict(state), {}
        else:
            if part not in self._read:
                paths = list(map(_path, part.in_keys))
                self._read[part] = [key for key in state if any(_path(key)[: len(path)] == path for path in paths)]
            shown = {key: state[key].clone() for key in self._read[part]}
            entries = {**state, **shown}
        run(entries)
        for key, entry in shown.items():
            if entry._version:
                state[key].copy_(entry)  # others read what has been written in place
        return entries


def _places(loss: nn.Module) -> list[tuple[nn.Parameter, int, torch.Tensor]]:
    """The parameters, where they lie, and what keeps that memory theirs."""
    return [(parameter, parameter.data_ptr(), parameter.detach()) for parameter in loss.parameters()]


def _with_inner(part: Part) -> list[Part]:
    """``part``, and those that it is made of."""
    return [part, *(each for each in vars(part).values() if isinstance(each, Part))]


def _is_ours(part: Part) -> bool:
    """Whether ``part`` is known to say what it does beside kernels."""
    return all(type(each).__module__.startswith("rl2_torchrl.") for each in _with_inner(part))


def _require(is_as_before: bool) -> None:
    if not is_as_before:
        raise ChangedError


def _path(key: NestedKey) -> tuple[str, ...]:
    return key if isinstance(key, tuple) else (key,)
