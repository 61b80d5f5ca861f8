"""`RecordedMinibatch`: minibatches of one size, whose kernels' calls are noted for the first and made again for the others."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from tensordict import NestedKey
from torch import nn

from rl2_torchrl import kernels
from rl2_torchrl.gradients.adam import AdamSteps
from rl2_torchrl.gradients.part import Gradients, Part, State, accumulate
from rl2_torchrl.gradients.program import Program, TermPart, Values, merge_losses, numbers_of
from rl2_torchrl.kernels.recording import Calls, Recording
from rl2_torchrl.kernels.threads import one_thread
from rl2_torchrl.kernels.workspace import Workspace

__all__ = ["ChangedError", "RecordedMinibatch"]

#: Env steps of a minibatch up to which threads would wait for each other longer than they work.
_FEW_STEPS = 256


class ChangedError(Exception):
    """A minibatch cannot be made as the first one was."""


class RecordedMinibatch:
    """Minibatches of as many chunks as ``own``, the first of which is run here.

    A step is what kernels do by themselves, as one call, or what a part or term does in Python. What that gives is copied to where
    the kernels read it; what it is shown are copies, which it may keep. Steps say whether they went as the first time.

    Args:
        program: makes losses and gradients.
        parts: those of its parts that are run here.
        chunks: entries ``[num_chunks, T, ...]`` of which minibatches are drawn, and what other parts have made.
        own: the chunks ``[rows]`` of the first minibatch, int64.

    Attributes:
        rows: how many chunks these are.
        values: losses and diagnostics of the first.
        gradients: of all minibatches.

    Raises:
        ChangedError: kernels cannot add up the gradients.
    """

    def __init__(self, program: Program, parts: Sequence[Part], chunks: State, own: torch.Tensor):
        self._program, self.rows = program, len(own)
        self._recording, self._at = Recording(), ctypes.c_int64(own.data_ptr())
        self._norm = self._recording.numbers_for(1)
        self._steps: list[Callable[[], bool]] = []
        self._end, self._pass, self._is_made = 0, None, False
        #: What makes each term's values of the numbers that kernels leave.
        self._figures: list[Callable[[list[float]], Values]] = []
        #: The parameters, and their memory, which is theirs as long as it is read here.
        self._weights = [(parameter, parameter.detach()) for parameter in program.loss.parameters()]
        self._state: State = {}
        self._read: dict[Part, list[NestedKey]] = {}
        #: What parts that kernels run keep for their backward, which minibatches that are not recorded write over.
        self._kept: dict[Part, list[tuple[Part, dict]]] = {}
        steps = len(own) * next(iter(chunks.values())).shape[1]
        with one_thread() if steps <= _FEW_STEPS else nullcontext():
            self._run_first(parts, chunks)
        self.values, self._is_made = self._values(self._recording.numbers.tolist()), True

    def close(self) -> None:
        """Hands the memory back, without waiting for whoever collects what refers to itself."""
        self._recording.close()
        vars(self).clear()

    # ------------------------------------------------------------ as it was
    def __call__(self, own: torch.Tensor) -> tuple[Values, Gradients]:
        """Losses and diagnostics of the chunks ``own``, and the gradients.

        Raises:
            ChangedError: they are not to be had so, such as where a term gives other losses than before, or others have put a
                parameter elsewhere in memory.
        """
        self._at.value = own.data_ptr()
        # Also behind the steps, in which users' code may have moved parameters.
        if not (self._are_in_place() and all(step() for step in self._steps) and self._are_in_place()):
            raise ChangedError
        return self._values(self._recording.numbers.tolist()), self.gradients

    def _are_in_place(self) -> bool:
        return all(parameter.data_ptr() == memory.data_ptr() for parameter, memory in self._weights)

    def _values(self, numbers: list[float]) -> Values:
        values: Values = {}
        for figures in self._figures:
            merge_losses(values, figures(numbers))
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
        numbers, count = self._recording.numbers_used, len(order) // self.rows
        out = numbers.new_empty(count, len(numbers))
        arguments = (order.data_ptr(), count, self.rows, numbers.data_ptr(), len(numbers), out.data_ptr())
        done = self._pass.make_passes(ctypes.addressof(self._at), *arguments)
        return list(map(self._metrics, out[:done].tolist()))

    def _metrics(self, numbers: list[float]) -> dict[str, float]:
        values = numbers_of(self._values(numbers))
        total = sum(value for name, value in values.items() if name.startswith("loss_"))
        return {"loss": total, **values, "grad_norm": numbers[0]}

    # ------------------------------------------------------------ the first
    def _run_first(self, parts: Sequence[Part], chunks: State) -> None:
        self._by_kernels(lambda: self._gather(chunks))
        gradients: Gradients = {}
        for part in parts:
            self._forward(part)
        for term in self._program.terms:
            self._term(term, gradients)
        for part in reversed(parts):
            if not gradients.keys().isdisjoint(part.out_keys):
                self._backward(part, gradients)
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

    def _end_step(self) -> None:
        """What has been called since the last step is one."""
        if len(self._recording.calls) > self._end:
            self._steps.append(Calls(self._recording.library, self._recording.calls[self._end :]))
        self._end = len(self._recording.calls)

    def _gather(self, chunks: State) -> None:
        library = kernels.load(self._program.parameters[0].dtype)
        for key, chunk in chunks.items():
            entry = self._state[key] = Workspace.take(chunk, (self.rows, *chunk.shape[1:]))
            row = chunk.numel() // len(chunk) * chunk.element_size()
            library.gather_rows(ctypes.addressof(self._at), self.rows, row, chunk.data_ptr(), entry.data_ptr())

    def _forward(self, part: Part) -> None:
        before, state = self._state, dict(self._state)  # a part may write in the place of what it reads
        if self._by_kernels(lambda: part.starts_by_hand(state)) and part.is_by_hand:
            self._kept[part], self._state = [(each, dict(vars(each))) for each in _with_inner(part)], state
            return

        def run() -> State:
            entries = self._shown(part, before)
            if self._program.forward(part, entries) and self._is_made:
                raise ChangedError
            return {key: entries[key] for key in part.out_keys}

        made: State = {}
        self._by_python(run, made)
        self._state = {**before, **made}

    def _term(self, term: TermPart, gradients: Gradients) -> None:
        made, number = [], len(self._figures)
        if term.brings_kernels() and self._by_kernels(lambda: made.extend(term.by_kernels(self._state))) and made:
            figures, found = made
            self._figures.append(figures)
            self._take(found, gradients)
            return

        def run() -> Gradients:
            values, found = term.losses_and_gradients(self._shown(term, self._state))
            self._figures[number : number + 1] = [lambda _: values]
            return found

        self._by_python(run, gradients)

    def _backward(self, part: Part, gradients: Gradients) -> None:
        slopes = {key: gradients.pop(key) for key in part.out_keys if key in gradients}
        found = dict(slopes)
        if part in self._kept and self._by_kernels(lambda: part.backward(found)):
            self._take(found, gradients)
            return

        def run() -> Gradients:
            for each, attributes in self._kept.get(part, ()):
                vars(each).update(attributes)
            if not part.is_by_hand:  # hooks may hold what they are shown
                return part.backward_by_autograd({key: slope.clone() for key, slope in slopes.items()})
            found = dict(slopes)
            part.backward(found)
            return found

        # A part goes back once: it may have written over what came.
        self._by_python(run, gradients, found if part in self._kept else None)

    def _take(self, found: Gradients, gradients: Gradients) -> None:
        """Adds to ``gradients`` what kernels have ``found``."""

        def add() -> None:
            for source, gradient in found.items():
                accumulate(gradients, source, gradient)

        if not self._by_kernels(add):  # but PyTorch, strided ones
            raise ChangedError

    def _by_python(
        self, run: Callable[[], Gradients | State], total: Gradients | State, first: Gradients | None = None
    ) -> None:
        """Copies to ``total`` what Python makes by ``run``, now (where ``first`` is not that already) and each time, or adds it."""
        self._end_step()
        first, writes = run() if first is None else first, {}
        shapes = {key: made.shape for key, made in first.items()}
        for key, made in first.items():
            if key in total:
                writes[key] = total[key].add_
            else:
                place = Workspace.make if isinstance(key, nn.Parameter) else Workspace.take  # a parameter keeps its own
                with self._recording.on():
                    total[key] = place(made, tuple(made.shape))
                writes[key] = total[key].copy_
            writes[key](made)

        def again() -> bool:
            found = run()
            if {key: made.shape for key, made in found.items()} != shapes:
                return False
            for key, made in found.items():
                writes[key](made)
            return True

        self._steps.append(again)

    def _shown(self, part: Part, state: State) -> State:
        """``state`` for ``part``, copies of what it reads where it may keep that."""
        if part.is_by_hand:
            return dict(state)
        if part not in self._read:
            paths = list(map(_path, part.in_keys))
            self._read[part] = [key for key in state if any(_path(key)[: len(path)] == path for path in paths)]
        return {**state, **{key: state[key].clone() for key in self._read[part]}}


def _with_inner(part: Part) -> list[Part]:
    """``part``, and those that it is made of."""
    return [part, *(each for each in vars(part).values() if isinstance(each, Part))]


def _path(key: NestedKey) -> tuple[str, ...]:
    return key if isinstance(key, tuple) else (key,)
