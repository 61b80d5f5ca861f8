"""`Loop`: what happens to one batch of a training after the other: rollout, update, evaluation, row of scalars."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.collectors import BaseCollector

from rl2_torchrl.checks import check_training
from rl2_torchrl.collector import batches_of
from rl2_torchrl.kernels.threads import warn_of_spinning
from rl2_torchrl.locks import exploring, taking_turns
from rl2_torchrl.seeding import random_numbers_put_back
from rl2_torchrl.update import PPOUpdate
from rl2_torchrl.workers import TrialWorkers

__all__ = ["Loop", "TrialReturns", "frames_of"]

log = logging.getLogger(__name__)

#: Batches without the end of a trial until that is said.
_PATIENCE = 10


class Loop:
    """What happens to one batch after the other; `TrainResult` keeps count.

    Attributes:
        in_rollout: whether the collector is at work: envs, and where it stands in their trials, are then of no moment.
    """

    def __init__(
        self, *, update, collector, callbacks, result, returns, evaluate, scalars, check, schedule_frames, begin
    ):
        self._update, self._collector, self._callbacks = update, collector, callbacks
        self._result, self._returns, self._evaluate, self._scalars = result, returns, evaluate, scalars
        self._check, self._schedule_frames, self._begin = check, schedule_frames, begin
        self._started = time.perf_counter()
        self._steps_before, self._seconds_before = result.env_steps, result.seconds
        self._progress = 0.0
        self._first = True
        self._batches_without_end = 0
        self.in_rollout = False
        self._in_update = False
        self._pending: dict[str, float] | None = None  # the row of an update that is made, until it is recorded

    def batches(self, before_each: Callable[[], None]) -> Iterator[TensorDictBase]:
        """The collector's batches; an error of env or policy gets a note of where it was raised."""
        batches = batches_of(self._collector)
        while True:
            before_each()
            self.in_rollout = True
            try:
                with taking_turns():
                    batch = next(batches, None)
            except Exception as error:
                where = (
                    f"in the rollout of update {len(self._result.history)}, after {self._result.env_steps} env steps"
                )
                cause = "; most often the env paid a reward, or showed an observation, that is not finite"
                error.add_note(where + cause * ("nan" in str(error).lower()))
                raise
            self.in_rollout = False
            if batch is None:
                return
            yield batch

    @taking_turns()
    def learn(self, batch: TensorDictBase) -> dict[str, float]:
        """One update on ``batch`` ``[*B, T]``: its row of scalars."""
        result = self._result
        self._in_update = True
        self._progress = min(1.0, result.env_steps / self._schedule_frames)
        trial_return = self._returns(batch)
        self._warn_of_endless_trials(trial_return, batch)
        self._check_and_call_back(batch)
        try:
            with exploring(None):
                metrics = self._update(batch, self._progress)
        except FloatingPointError as error:
            raise FloatingPointError(
                f"training stopped in update {len(result.history)}, at {result.env_steps} env steps: {error}"
            ) from error
        if self._first:
            self._first = False
            self._begin()  # not before: a training that is refused, or stops at its first batch, leaves an earlier run as it is
            _say_which_way(self._collector, self._update)
        warn_of_spinning()
        result.env_steps = frames_of(self._collector, result.env_steps + batch.numel())
        self._collector.update_policy_weights_()
        self._pending = row = {
            "env_steps": float(result.env_steps),
            "train/trial_return": trial_return,
            **self._clock(),
        }
        if isinstance(self._collector, TrialWorkers):
            result.lost_trials = self._collector.lost_trials
            row["train/lost_trials"] = float(result.lost_trials)
        self._in_update = False
        _add(row, "train/", metrics, "update")
        for callback in self._callbacks:
            _add(row, "", callback.after_update(row, self._progress) or {}, "a callback's after_update")
        return row

    def _check_and_call_back(self, batch: TensorDictBase) -> None:
        """Callbacks may change ``batch``; a training's first one is checked as it was collected, with what they add for terms."""
        is_checked = self._first and self._check
        # A copy writes out what is a view, as a row's task is: none where nobody may change the batch.
        collected = batch.clone() if is_checked and self._callbacks else batch
        for callback in self._callbacks:
            returned = callback.after_batch(batch, self._progress)
            if returned is not None and returned is not batch:
                raise TypeError(
                    f"{type(callback).__name__}.after_batch returned what no update would see: change the batch in place, or "
                    "return nothing."
                )
        if is_checked:
            added = [key for key in batch.keys(True, True) if key not in collected.keys(True, True)]
            with random_numbers_put_back():
                report = check_training(self._collector, self._update, collected.update(batch.select(*added)))
            for note in report.notes:
                log.warning("of the first batch: %s.", note)

    def in_any_process(self, *flags: bool) -> list[bool]:
        """Whether each flag is set in this process, or in one of those that update together with it; all of them must ask."""
        return [any(each) for each in zip(*self._everyones(flags), strict=True)]

    def require_abreast(self) -> None:
        """ValueError where processes that update together have not taken the same number of env steps."""
        steps = self._everyones(self._result.env_steps)
        if len(set(steps)) > 1:
            raise ValueError(
                f"the processes begin at different env steps, {steps} by rank, so their networks are not the same: leave in each "
                "one's folder the newest checkpoint that all of them have, or start all anew without resume."
            )

    def _everyones(self, value: Any) -> list:
        return self._update.everyones(value) if isinstance(self._update, PPOUpdate) else [value]

    def _warn_of_endless_trials(self, trial_return: float, batch: TensorDictBase) -> None:
        """Says once that no trial has ended, be it after long ones, or never since an env forgets to say so."""
        if not math.isnan(trial_return):
            self._batches_without_end = -math.inf
        self._batches_without_end += 1
        if self._batches_without_end == _PATIENCE:
            log.warning(
                "no trial has ended in %s batches, %s steps of each row: do the env's episodes ever end (terminated, truncated)? "
                "Trial(steps=...) bounds trials however long episodes are.",
                _PATIENCE,
                _PATIENCE * batch.shape[-1],
            )

    @property
    def evaluates(self) -> bool:
        """Whether there are evaluations."""
        return self._evaluate is not None

    def evaluate(self, row: dict[str, float]) -> None:
        """Adds the scalars of a held-out evaluation to ``row``; random numbers are put back."""
        if not self.evaluates:
            return
        with taking_turns(), random_numbers_put_back():
            _add(row, "eval/", self._evaluate(), "evaluate")
            for callback in self._callbacks:
                more = callback.after_evaluation(row, self._progress) or {}
                _add(row, "", more, "a callback's after_evaluation")

    def record(self, row: dict[str, float]) -> dict[str, float]:
        """Writes the finished ``row`` into history and log, and returns it."""
        self._remember(row)
        self._scalars.write(row, row["env_steps"])
        return row

    def _remember(self, row: dict[str, float]) -> None:
        row.update(self._clock())  # anew: an evaluation takes its time
        self._result.history.append(row)
        self._pending = None

    def _clock(self) -> dict[str, float]:
        """Seconds of the whole run, the parts before a resume included, and this call's speed."""
        seconds = time.perf_counter() - self._started
        self._result.seconds = self._seconds_before + seconds
        speed = (self._result.env_steps - self._steps_before) / seconds
        return {"time/seconds": self._result.seconds, "time/steps_per_second": speed}

    def finish(self) -> bool:
        """What is still due where the collector itself has ended the loop; whether there was a batch at all."""
        history = self._result.history
        if not (history or self._result.env_steps):  # a checkpoint may have lost the one
            raise RuntimeError(
                "the collector gave no batch to train on: has something iterated over it before? Make a new one."
            )
        if self._first:
            log.warning(
                "the resumed training had reached its %s env steps: nothing is left to do.", self._result.env_steps
            )
        elif not _is_evaluated(history[-1]):
            self._evaluate_last()
        return not self._first

    def make_up(self, eval_interval: int, total: int) -> bool:
        """Evaluates the last update of a resumed run, where that was due and an interruption or an error was in its way; or not."""
        history, env_steps = self._result.history, self._result.env_steps
        if not self.evaluates or not history or history[-1]["env_steps"] != env_steps or _is_evaluated(history[-1]):
            return False
        due = (len(history) - 1) % eval_interval == 0 or env_steps >= total
        if due:
            begun = history[-2]["env_steps"] if len(history) > 1 else 0.0
            self._progress = min(1.0, begun / self._schedule_frames)
            self._evaluate_last()
        return due

    def _evaluate_last(self) -> None:
        """Evaluates an update whose row is recorded already."""
        row = (history := self._result.history)[-1]  # a copy
        before = set(row)
        self.evaluate(row)
        history.append(row)
        self._scalars.write({name: row[name] for name in row if name not in before}, row["env_steps"])

    def keep_what_is_learnt(self) -> bool:
        """After an error: records an update that was made; False where the networks are in the middle of one."""
        if self._in_update:
            return False
        if self._pending is not None:
            self._remember(self._pending)
        return True


def _is_evaluated(row: Mapping[str, float]) -> bool:
    return any(name.startswith("eval/") for name in row)


def frames_of(collector: BaseCollector, counted: int) -> int:
    """Env steps that the collector has taken, by its own count; ``counted`` where it keeps none."""
    return getattr(collector, "_frames", counted)


def _say_which_way(collector: BaseCollector, update: PPOUpdate) -> None:
    """One line that says which way batches are collected and networks updated, and why; after the first of each."""
    ways = [
        f"{name}: {part.backend}" + (f" ({part.reason})" if getattr(part, "reason", None) else "")
        for name, part in (("collector", collector), ("update", update))
        if hasattr(part, "backend")
    ]
    if ways:
        log.info("training with %s", "; ".join(ways))


def _add(row: dict[str, float], prefix: str, values: Mapping[str, Any], source: str) -> None:
    """Adds ``values`` as numbers under ``prefix`` to ``row``; a tensor of one element is a number too."""
    if not isinstance(values, Mapping):
        raise TypeError(
            f"{source} returned a {type(values).__name__}; it must return scalars by name, such as {{'trial_return': 6.6}}, "
            "for history and logger."
        )
    try:
        scalars = {f"{prefix}{name}": float(value) for name, value in values.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        kinds = {name: getattr(value, "shape", type(value).__name__) for name, value in values.items()}
        raise TypeError(f"{source} must return one number for each name: {error}. It returned {kinds}.") from error
    if twice := sorted(row.keys() & scalars):
        raise ValueError(
            f"{source} returned {twice}, which the update's row holds already: one of the two would be lost. Return what is new "
            "alone, by names of its own."
        )
    row |= scalars


class TrialReturns:
    """Mean return of the trials that end within a batch and were seen from their beginning, be it in an earlier one."""

    def __init__(self):
        self.carry: torch.Tensor | None = None  # what each row's running trial has earned so far

    def __call__(self, batch: TensorDictBase) -> float:
        reward = batch["next", "reward"].reshape(-1, batch.shape[-1])
        done = batch["next", "done"].reshape(reward.shape)
        if self.carry is None:  # NaN: who begins in the middle of a trial has not seen what it had earned
            unseen = math.nan if "is_init" in batch.keys() else 0.0
            self.carry = reward.new_full((len(reward),), unseen, dtype=torch.float64)
        if "is_init" in batch.keys():  # the running trial may be lost, with a worker that has died
            self.carry[batch["is_init"][..., 0, :].reshape(-1)] = 0.0
        finished, begin = [], 0
        for last in done.any(0).nonzero().flatten().tolist():
            self.carry += reward[:, begin : last + 1].sum(-1, dtype=torch.float64)
            ended = done[:, last]
            finished.append(self.carry[ended])
            self.carry[ended] = 0.0
            begin = last + 1
        self.carry += reward[:, begin:].sum(-1, dtype=torch.float64)
        return torch.cat(finished).nanmean().item() if finished else math.nan
