"""`train`: the loop only. Collect, update, log, evaluate, checkpoint, show progress."""

from __future__ import annotations

import atexit
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.checkpoint import GlobalRNGState
from torchrl.collectors import BaseCollector
from torchrl.objectives import LossModule
from torchrl.record.loggers import Logger

from rl2_torchrl.arguments import as_list, require_collector, require_flags, require_numbers, whole
from rl2_torchrl.callbacks import Callback
from rl2_torchrl.checkpoints import RunCheckpoints
from rl2_torchrl.checks import check_training
from rl2_torchrl.collector import batches_of
from rl2_torchrl.history import History
from rl2_torchrl.interrupts import deferred_interrupts
from rl2_torchrl.kernels.threads import warn_of_spinning
from rl2_torchrl.logs import ScalarLog
from rl2_torchrl.progress import progress_bar
from rl2_torchrl.rollout.turns import watch
from rl2_torchrl.update import PPOUpdate
from rl2_torchrl.workers import TrialWorkers

__all__ = ["TrainResult", "train"]

log = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """What a training run did, the parts before a resume included.

    Args:
        env_steps: env steps that the collector has taken.
        seconds: wall-clock seconds, evaluations included.
        interrupted: whether Ctrl-C ended it, in this process or in one that trains together with it.
        lost_trials: trials that were lost with workers that died (`TrialWorkers`).
        new_trials: where a resumed run has begun new trials, as it does where the last ones could not be saved: the env steps of
            each such resume, and why.
        history: one row of scalars for each update, ``env_steps`` among them.
    """

    env_steps: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    lost_trials: int = 0
    new_trials: list[tuple[int, str]] = field(default_factory=list)
    history: Sequence[dict[str, float]] = field(default_factory=History)

    def state_dict(self) -> dict[str, Any]:
        """The result as a component of a checkpoint, but for the history, which has a file of its own."""
        return {"env_steps": self.env_steps, "seconds": self.seconds, "new_trials": self.new_trials}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.env_steps, self.seconds, self.new_trials = state["env_steps"], state["seconds"], state["new_trials"]


def train(
    collector: BaseCollector,
    update: PPOUpdate,
    *,
    evaluate: Callable[[], Mapping[str, float]] | None,
    eval_interval: int = 20,
    callbacks: Sequence[Callback] = (),
    schedule_frames: int | None = None,
    logger: Logger | None = None,
    checkpoints: str | Path | None = None,
    checkpoint_interval: int = 50,
    resume: bool = False,
    resume_changes: Collection[str] = (),
    stop: Callable[[dict[str, float]], bool] | None = None,
    check: bool = True,
    progress: bool = True,
) -> TrainResult:
    """Trains until the collector's ``total_frames``, Ctrl-C, or ``stop``.

    Args:
        collector: TorchRL collector over a trial env, with the policy (e.g. `ActorCritic`) that ``update`` trains. It counts
            the env steps: after a Ctrl-C or a ``stop`` a further call goes on where the last one ended, schedules too.
        update: `PPOUpdate`, or any ``(batch, progress) -> metrics``; for checkpoints it needs ``state_dict`` and
            ``load_state_dict``.
        evaluate: held-out evaluation on an env of its own, never the collector's, returning scalars such as
            ``{"trial_return": 6.6}``; logged under ``eval/``. The random numbers that it draws are put back: training goes the
            same way however often it is evaluated. None trains blind.
        eval_interval: updates between evaluations, from the first update on; one more follows the last update.
        callbacks: what else is done after each batch, update and evaluation, in this order.
        schedule_frames: env steps over which ``progress`` goes from 0 to 1 for schedules and callbacks. Default the collector's
            ``total_frames``. An endless collector (``total_frames=-1``) has none: without this argument progress stays 0 there.
        logger: TorchRL logger, e.g. `torchrl.record.loggers.CSVLogger`, whose files of an earlier run are moved to a subfolder
            after the first update, unless ``resume``, in the place of those of the run before that.
        checkpoints: folder for checkpoints, of one run at a time; the newest two are kept. What an earlier run left there is
            moved likewise. None saves none.
        checkpoint_interval: updates between checkpoints; one more follows the end, a Ctrl-C or an error.
        resume: go on from the newest checkpoint in ``checkpoints`` that is whole, if there is any. Where the env hands out its
            state (a `TensorEnv`; `GymVectorEnv`, `GymTaskEnv` and TorchRL envs that are `Resumable`, over envs of plain data;
            ``SerialEnv`` and ``ParallelEnv`` of them) the run goes on as if it had never stopped, in the middle of its trials;
            with other envs it begins new trials, and the log and ``new_trials`` of the result say why. An env of ``evaluate``'s
            is no part of it: with `TaskSampler.fixed` that plays the same tasks again. CSV files and TensorBoard
            then hold each step once: what the logger has there of later steps is taken back. Where there is no checkpoint the
            run starts anew, and CSV files of one that was killed before its first are moved to a subfolder; a log whose run has
            had checkpoints, elsewhere say, is an error.
        resume_changes: settings that may be others than the run's, by the names that the error gives, such as
            ``["update.lr"]``. The new ones count from then on; after a change of the env new trials begin. How long the training
            is (``total_frames``) may always change.
        stop: called with each update's scalars, those of an evaluation among them, by the names that ``history`` has:
            ``"env_steps"``, ``"train/..."``, ``"time/seconds"``; True ends the training early. One that counts, such as
            evaluations in a row, has a ``state_dict`` and a ``load_state_dict``, for checkpoints.
        check: look for what goes wrong without a word (`check_training`) on the first batch, before the first update; it
            costs less than an iteration. An ``update`` that is no `PPOUpdate` cannot be checked.
        progress: show a progress bar.

    Returns:
        Steps, seconds and the history of scalars.

    Raises:
        FloatingPointError: reward, loss or gradient is not finite; the message says in which update and where. The
            newest checkpoint is from before it.
        Exception: whatever env or policy raise in a rollout, with a note that says in which update; and whatever ``evaluate``,
            ``stop``, ``logger`` or callbacks raise.
        ValueError: ``resume`` without ``checkpoints``, or from none where the logger has a run that had some, a checkpoint of other
            networks, settings, of another version or of another update than that of the processes that train together, an interval
            below 1, fewer frames than one batch, a collector that has spent its frames, no end in sight (neither ``total_frames``
            nor ``stop``), or a schedule without a length (neither ``total_frames`` nor ``schedule_frames``).
        DamagedFileError: a ValueError; no checkpoint can be read.
        TypeError: ``evaluate`` returns no scalars, an argument or a callback is none, or a part has no state that can be saved.
        OSError: nothing can be written to ``checkpoints``, or another training is using it.
        SystemExit: the program was asked to end (SIGTERM, SIGHUP), and is saved.
        TrainingCheckError: ``check`` found something, and says what to do.

    Ctrl-C once lets the running update finish, saves a checkpoint and returns; SIGTERM and SIGHUP save likewise and end the
    program; a second signal stops at once. An evaluation that was due then, or that failed, is made up for by a resumed run. An
    error after an update (``evaluate``, ``stop``, ``logger``, callbacks) leaves a checkpoint of that update. One in a rollout
    leaves networks and all else as the last update left them, and a resumed run begins new trials. One within an update (from
    ``after_batch`` on) saves nothing, since the networks may be half changed: the newest checkpoint is from before.

    Trainings in several threads of one program take turns, since TorchRL's modes and PyTorch's random numbers are the program's:
    for speed, and for numbers that do not depend on the other's, give each a process.

    When the program ends the collector is shut down, so that its processes do not keep the program from ending.
    """
    if (resume or resume_changes) and not (resume and checkpoints is not None):
        raise ValueError("resume=True needs the folder to resume from, checkpoints=...; resume_changes= needs both.")
    resume_changes = as_list("resume_changes", resume_changes)
    _check_kinds(collector, update, checkpoints, logger, evaluate=evaluate, stop=stop)
    _check_arguments(eval_interval, checkpoint_interval, callbacks, schedule_frames)
    require_flags(resume=resume, check=check, progress=progress)
    _check_frames(collector, update, stop, schedule_frames)
    result, returns, scalars = TrainResult(env_steps=_frames(collector, 0)), _TrialReturns(), ScalarLog(logger)
    parts = {"update": update, "collector": collector, "callbacks": callbacks, "result": result, "returns": returns}
    total = collector.total_frames
    stateful = [*callbacks, *[stop] * hasattr(stop, "state_dict")]
    with RunCheckpoints(checkpoints, **{**parts, "callbacks": stateful}, scalars=scalars) as saved:
        goes_on = resume and (saved.load_latest(resume_changes) or result.env_steps > 0)
        if goes_on:
            scalars.go_on_from(result.history, result.env_steps)
            result.lost_trials = getattr(collector, "lost_trials", 0)  # there may be no further batch
        elif resume:
            scalars.require_new(Path(checkpoints))
            log.warning("resume=True, but %s holds no checkpoint: starting anew.", checkpoints)

        def begin() -> None:
            if not goes_on:
                saved.set_aside()
                scalars.set_aside()

        _shut_down_at_exit(collector)
        watch(collector)
        check = check and isinstance(update, PPOUpdate)
        options = {
            "evaluate": evaluate,
            "scalars": scalars,
            "check": check,
            "schedule_frames": schedule_frames or total,
        }
        loop = _Loop(**parts, **options, begin=begin)
        loop.require_abreast()

        def is_last(row: dict[str, float]) -> bool:
            return (stop is not None and stop(row)) or result.env_steps >= total

        with progress_bar(total, result.env_steps, progress) as bar, deferred_interrupts() as interrupts:
            try:
                made_up = goes_on and loop.make_up(eval_interval, total)
                [last] = loop.in_any_process(made_up and is_last(result.history[-1]))
                for batch in () if last else loop.batches(before_each=saved.before_rollout):
                    with _turn:
                        row = loop.learn(batch)
                    due = len(result.history) % eval_interval == 0
                    # With `stop`, which sees it, to be made up for when the run is resumed.
                    put_off = due and evaluate is not None and bool(interrupts) and result.env_steps < total
                    if due and not put_off:
                        loop.evaluate(row)
                    ends, result.interrupted = loop.in_any_process(not put_off and is_last(row), bool(interrupts))
                    if ends and not due:
                        loop.evaluate(row)
                    last = ends or result.interrupted
                    bar(loop.record(row))
                    if last or len(result.history) % checkpoint_interval == 0:
                        saved.save(last=last)
                    if last:
                        break
                else:
                    if last or loop.finish():
                        saved.save(last=True)
            except Exception as error:
                if loop.keep_what_is_learnt():
                    saved.save_on_the_way_out(rollout=not loop.in_rollout)
                if not (interrupts and loop.in_rollout):
                    raise
                log.warning("the rollout was cut short, since the signal has ended its processes, too: %r", error)
    result.interrupted |= bool(interrupts)
    interrupts.pass_on()
    return result


#: Trainings in several threads take turns, a rollout, an update or an evaluation each: TorchRL's modes (exploration, recurrence)
#: and PyTorch's random numbers are the program's, and one's evaluation would make the other's rollout deterministic.
_turn = threading.RLock()


#: Batches without the end of a trial until that is said.
_PATIENCE = 10


class _Loop:
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
        self._clock = _Clock(result)
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
                with _turn:
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

    def learn(self, batch: TensorDictBase) -> dict[str, float]:
        """One update on ``batch`` ``[*B, T]``: its row of scalars."""
        result = self._result
        self._in_update = True
        self._progress = min(1.0, result.env_steps / self._schedule_frames)
        trial_return = self._returns(batch)
        self._warn_of_endless_trials(trial_return, batch)
        if self._first and self._check:
            with _random_numbers_put_back():
                check_training(self._collector, self._update, batch)
        for callback in self._callbacks:
            callback.after_batch(batch, self._progress)
        try:
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
        result.env_steps = _frames(self._collector, result.env_steps + batch.numel())
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

    def evaluate(self, row: dict[str, float]) -> None:
        """Adds the scalars of a held-out evaluation to ``row``; random numbers are put back."""
        if self._evaluate is None:
            return
        with _turn, _random_numbers_put_back():
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

    def finish(self) -> bool:
        """What is still due where the collector itself has ended the loop; whether there was a batch at all."""
        history = self._result.history
        if not history:
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
        if self._evaluate is None or not history or history[-1]["env_steps"] != env_steps or _is_evaluated(history[-1]):
            return False
        due = (len(history) - 1) % eval_interval == 0 or env_steps >= total
        if due:
            begun = history[-2]["env_steps"] if len(history) > 1 else 0.0
            self._progress = min(1.0, begun / self._schedule_frames)
            self._evaluate_last()
        return due

    def _evaluate_last(self) -> None:
        """Evaluates an update whose row is recorded already."""
        row = (history := self._result.history)[-1]
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


#: Collectors that have trained, to be shut down with the program.
_trained: weakref.WeakSet = weakref.WeakSet()


@atexit.register
def _shut_down() -> None:
    # Python waits for processes that are no daemons, as envs' are; they wait for a word of the collector.
    for collector in list(_trained):
        collector.shutdown()


def _shut_down_at_exit(collector: BaseCollector) -> None:
    if hasattr(collector, "shutdown"):
        _trained.add(collector)


def _check_kinds(collector, update, checkpoints, logger, **functions) -> None:
    require_collector(collector, "train(collector, update, ...)")
    if not callable(update) or isinstance(update, LossModule):
        raise TypeError(f"{type(update).__name__} is no update, such as PPOUpdate(RL2PPOLoss(actor, critic)).")
    for name, function in functions.items():
        if function is not None and not callable(function):
            number = {"evaluate": "how often is eval_interval=", "stop": "how long is the collector's total_frames="}[
                name
            ]
            raise TypeError(f"{name}={function!r} is no function; {number}.")
    if logger is not None and not hasattr(logger, "log_scalar"):
        raise TypeError(f"{logger=} is no logger: give one of torchrl.record.loggers, such as CSVLogger(name, folder).")
    if checkpoints is not None and not isinstance(checkpoints, str | PathLike):
        raise TypeError(f"{checkpoints=} is no folder: give its path.")


def _check_arguments(eval_interval, checkpoint_interval, callbacks, schedule_frames) -> None:
    whole("eval_interval", eval_interval)
    whole("checkpoint_interval", checkpoint_interval)
    require_numbers(schedule_frames=schedule_frames)
    if schedule_frames is not None and not schedule_frames >= 1:
        raise ValueError(f"schedule_frames={schedule_frames}: schedules need a length, of at least 1 env step.")
    if not isinstance(callbacks, Sequence) or not all(isinstance(callback, Callback) for callback in callbacks):
        raise TypeError(
            f"callbacks={callbacks!r} must be a list of Callback objects: class Mine(Callback) with the methods that you "
            "need, then callbacks=[Mine()]."
        )


def _check_frames(collector: BaseCollector, update, stop, schedule_frames: int | None) -> None:
    total, batch = collector.total_frames, getattr(collector, "requested_frames_per_batch", 1)
    if total < batch:
        raise ValueError(
            f"total_frames={total} is less than one batch of {batch} env steps: there is nothing to train on."
        )
    if _frames(collector, 0) >= total:
        raise ValueError(
            f"this collector has collected its total_frames={total} already, perhaps in an earlier call: nothing is left to "
            "train on. Make a new env and collector to go on: networks and update may stay."
        )
    if total == math.inf and stop is None:
        raise ValueError(
            "the collector's total_frames is negative or None, so it never ends: give it a number of env steps, or "
            "pass a stop=, be it `lambda row: False` to train until Ctrl-C."
        )
    schedules = [name for name in ("lr_schedule", "entropy_schedule") if getattr(update, name, None) is not None]
    if total == math.inf and schedule_frames is None and schedules:
        raise ValueError(
            f"the update's {' and '.join(schedules)} would never move: the collector's total_frames is negative or None, so "
            "there is no end to count towards. Say over how many env steps they run, train(schedule_frames=...)."
        )


def _frames(collector: BaseCollector, counted: int) -> int:
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


class _Clock:
    """Seconds of the whole run, the parts before a resume included, and this call's speed."""

    def __init__(self, result: TrainResult):
        self._result, self._started = result, time.perf_counter()
        self._steps_before, self._seconds_before = result.env_steps, result.seconds

    def __call__(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._started
        self._result.seconds = self._seconds_before + seconds
        speed = (self._result.env_steps - self._steps_before) / seconds
        return {"time/seconds": self._result.seconds, "time/steps_per_second": speed}


class _TrialReturns:
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
            self._add(reward[:, begin : last + 1])
            ended = done[:, last]
            finished.append(self.carry[ended])
            self.carry[ended] = 0.0
            begin = last + 1
        self._add(reward[:, begin:])
        return torch.cat(finished).nanmean().item() if finished else math.nan

    def _add(self, rewards: torch.Tensor) -> None:
        self.carry += rewards.sum(-1, dtype=torch.float64)


@contextmanager
def _random_numbers_put_back() -> Iterator[None]:
    """What is drawn inside does not change what is drawn afterwards."""
    before = GlobalRNGState().state_dict()
    try:
        yield
    finally:
        GlobalRNGState().load_state_dict(before)
