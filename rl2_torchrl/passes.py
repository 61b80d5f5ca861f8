"""`Passes`: passes over a batch's minibatches, optimizer steps included, by one of the backends of `PPOUpdate`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial

import torch
from tensordict import NestedKey, TensorDict
from torchrl.objectives import ClipPPOLoss

from rl2_torchrl.arguments import noted
from rl2_torchrl.gradients import Program
from rl2_torchrl.gradients.adam import OptimizerSteps, steps_by, why_not_adam
from rl2_torchrl.gradients.answers import Answers
from rl2_torchrl.gradients.graphed import GraphedPass, why_not_graphed
from rl2_torchrl.gradients.program import Values, numbers_of
from rl2_torchrl.gradients.replays import Replays
from rl2_torchrl.minibatches import Minibatches
from rl2_torchrl.objectives.ppo import RL2PPOLoss

__all__ = ["Passes"]

_BACKENDS = ("auto", "parts", "autograd", "graph")


class Passes:
    """Passes over the ``minibatches`` of one batch after the other, each a step of the optimizer.

    Args:
        loss: whose gradients are made.
        minibatches: what the passes go over, of learners that join their gradients.
        named: the ``backend`` of `PPOUpdate`.
        optimizer: the first batch's.

    Attributes:
        backend, reason: the way that is taken, and why; chosen anew for every batch, since the loss may have changed.

    Raises:
        ValueError: there is no backend ``named`` so, or it cannot serve.
    """

    def __init__(self, loss: ClipPPOLoss, minibatches: Minibatches, named: str, optimizer: torch.optim.Optimizer):
        if named not in _BACKENDS:
            raise ValueError(f"backend={named!r}: choose 'auto', 'parts', 'autograd' or 'graph'.")
        self._loss, self._minibatches, self._learners, self._named = loss, minibatches, minibatches.learners, named
        # One list: walking through the loss's modules for them costs more than Adam's step.
        self._parameters = list(loss.parameters())
        self._device = self._parameters[0].device
        self._graphed = GraphedPass(loss)
        #: Why a forward beside PPO's terms is not answered by parts, once that has been found out.
        self._unlike: str | None = None
        self.backend, self.reason, _ = self._choose(optimizer)

    def _choose(self, optimizer: torch.optim.Optimizer) -> tuple[str, str, Program | None]:
        """Backend and reason, and what makes gradients part by part, if that is the way."""
        if self._named == "autograd":
            return "autograd", "it was asked for", None
        is_graph = self._named == "graph" or (self._named == "auto" and self._device.type == "cuda")
        beside = self._loss.runs_beside() if isinstance(self._loss, RL2PPOLoss) else None
        program, refusal = None, self._why_autograd(beside, optimizer, is_graph=is_graph)
        if refusal is None and not is_graph:
            program = Program(self._loss)
            if beside is not None and not self._loss.has_answers(program):
                refusal = f"{beside}, and there are parts or terms of others"
        if refusal is not None:
            if self._named != "auto":
                raise ValueError(f"backend={self._named!r} cannot serve: {refusal}. backend='auto' takes 'autograd'.")
            return "autograd", refusal, None
        if is_graph:
            return "graph", self._graphed.reason, None
        return "parts", self._in_words(program, beside, optimizer), program

    def _why_autograd(self, beside: str | None, optimizer: torch.optim.Optimizer, *, is_graph: bool) -> str | None:
        """What has all of the loss run under autograd, whatever its parts are; None where nothing does."""
        if not isinstance(self._loss, RL2PPOLoss):
            return f"{type(self._loss).__name__} is no RL2PPOLoss"
        if (refusal := self._loss.why_not_parts()) is not None:
            return refusal
        if beside is not None and (is_graph or self._unlike):
            return self._unlike or beside
        if is_graph and self._learners.size > 1:
            return "several processes join their gradients after each minibatch"
        if is_graph:
            return why_not_graphed(self._loss, optimizer)
        if self._named != "parts" and self._device.type != "cpu":
            return f"there are no kernels on {self._device}"
        return None

    def _in_words(self, program: Program, beside: str | None, optimizer: torch.optim.Optimizer) -> str:
        """What is the parts' own, and what is not."""
        if beside is not None:
            return f"{beside}; autograd runs that alone"
        slow = [part.reason for part in program.parts if part.reason is not None]
        alone = f"autograd for these alone: {'; '.join(dict.fromkeys(slow))}"
        reason = alone if slow else "each part of the networks brings its own gradient"
        if (refusal := why_not_adam(optimizer, self._parameters)) is not None:
            reason += f"; {type(optimizer).__name__} takes its steps itself: {refusal}"
        return reason

    # ------------------------------------------------------------------ a batch
    @contextmanager
    def over_batch(
        self, optimizer: torch.optim.Optimizer, max_grad_norm: float | None, passes: int, checks: Iterable[Callable]
    ) -> Iterator[Callable[[], Iterable[Values]]]:
        """Within it, a pass over the batch that the minibatches hold now, to be called once an epoch.

        It gives metrics of each minibatch. After those of one whose gradient is not finite, on which no step has been taken, ask
        for no more.

        Args:
            optimizer, max_grad_norm: as in `PPOUpdate`.
            passes: how many there will be, at most.
            checks: are shown the losses of the first minibatch before any step, such as `require_replay`.
        """
        self.backend, self.reason, program = self._choose(optimizer)
        checks = iter(checks)
        if self.backend == "graph":
            yield partial(self._by_graph, optimizer, max_grad_norm, checks)
            return
        steps = steps_by(optimizer, self._parameters)
        step = partial(self._step, steps, max_grad_norm, checks)
        if program is None:
            yield partial(self._by_autograd, step)
            return
        options = {"passes": passes, "are_kept": isinstance(steps, OptimizerSteps)}
        with closing(Replays(program, self._minibatches.chunks, self._minibatches.rows, **options)) as replayed:
            if self._loss.runs_beside() is None:
                yield partial(self._by_parts, step, replayed, partial(replayed.passes, steps, max_grad_norm))
            else:
                yield partial(self._by_autograd, step, self._loss.answers(replayed))

    def _by_parts(self, step: Callable, replays: Replays, passes: Callable) -> Iterator[Values]:
        order, done = self._minibatches.order(), 0
        while done < len(order):
            rows = min(self._minibatches.rows, len(order) - done)
            together = passes(order[done:], rows) if self._learners.size == 1 else []
            yield from together
            done += len(together) * rows
            if not together:
                yield step(replays(self._minibatches.share(order[done : done + rows])))
                done += rows

    def _by_autograd(self, step: Callable, answers: Answers | None = None) -> Iterator[Values]:
        """As long as the backend is parts, ``answers`` are given to the loss."""
        for own, entries in self._minibatches.entries():
            with answers.given(own, entries) if self.backend == "parts" else nullcontext():
                losses = self._losses_by_autograd(entries)
            if answers is not None and answers.are_vain and self._named == "auto":
                asked = "asked for otherwise than those of the minibatch, all of one weight"
                self._unlike = f"{self._loss.runs_beside()}, and PPO's losses are {asked}"
                self.backend, self.reason = "autograd", self._unlike
            yield step(losses)

    def _step(self, steps, max_grad_norm: float | None, checks: Iterator, losses: Values) -> Values:
        """The step on a minibatch whose gradients have been made, once these have passed the ``checks``, and its metrics."""
        losses = self._learners.join(numbers_of(losses), self._parameters, self._minibatches.weight)
        total = sum(value for name, value in losses.items() if name.startswith("loss_"))
        for check in checks:
            check(losses)
        return {"loss": total, **losses, "grad_norm": steps.take(max_grad_norm)}

    def _by_graph(self, optimizer, max_grad_norm: float | None, checks: Iterator) -> Iterator[Values]:
        starts = self._minibatches.chunks.get("is_init")
        # It says nothing where no chunk has a trial that starts after its first step.
        silent = {"is_init"} if starts is not None and not bool(starts[:, 1:].any()) else ()
        entries = ({k: e for k, e in each.items() if k not in silent} for _, each in self._minibatches.entries())
        yield from self._graphed.run(entries, optimizer, max_grad_norm, checks)
        self.reason = self._graphed.reason

    def _losses_by_autograd(self, entries: dict[NestedKey, torch.Tensor]) -> Values:
        with noted(
            f"The loss was given {sorted(map(str, entries))}; what it reads beside these its in_keys must name: loss.in_keys = "
            "[*loss.in_keys, ...]."
        ):
            losses = self._loss(TensorDict(entries, next(iter(entries.values())).shape[:2]))
        for parameter in self._parameters:
            parameter.grad = None
        sum(value for name, value in losses.items() if name.startswith("loss_")).backward()
        return {name: value.detach() for name, value in losses.items() if value.ndim == 0}

    def require_replay(self, losses: Values) -> None:
        """ValueError unless the networks give the collected log-probabilities back, as they must before the first step."""
        # All ratios are 1, to rounding.
        log_prob = self._minibatches.chunks[self._loss.tensor_keys.sample_log_prob]
        max_ratio = losses["max_ratio"]
        # Rounding is that of the coarsest dtype, and grows with the log-probability, a sum over the action's dimensions.
        eps = max(torch.finfo(entry.dtype).eps for entry in (log_prob, *self._parameters) if entry.is_floating_point())
        largest = max(map(abs, map(float, log_prob.aminmax())))
        if max_ratio > 1 + max(0.01, 4 * eps * (1 + largest)):
            raise ValueError(
                f"without hidden states in the batch, replaying its trials from zeros gives other log-probabilities than were "
                f"collected (ratios up to {float(max_ratio):.3g}): the memory was lost while collecting, or the networks have "
                "changed since. Collect with auto_register_policy_transforms=True (TrialCollector's default), which primes the "
                "memory. For squashed actions at their bounds it is no fault: what plays on TensorDicts scores them before tanh."
            )
