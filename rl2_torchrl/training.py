"""`train`: the loop only. Collect, update, log, evaluate, checkpoint, show progress."""

from __future__ import annotations

import atexit
import logging
import math
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import BaseCollector
from torchrl.record.loggers import Logger

from rl2_torchrl.arguments import (
    as_list,
    kind_of,
    require_collector,
    require_flags,
    require_folder_name,
    whole,
)
from rl2_torchrl.callbacks import Callback
from rl2_torchrl.checkpoints import RunCheckpoints
from rl2_torchrl.history import TrainResult
from rl2_torchrl.interrupts import EndRequested, Interrupts, deferred_interrupts
from rl2_torchrl.logs import ScalarLog
from rl2_torchrl.progress import progress_bar
from rl2_torchrl.rollout.turns import watch
from rl2_torchrl.training_loop import Loop, TrialReturns, frames_of
from rl2_torchrl.update import PPOUpdate

__all__ = ["TrainResult", "train"]

log = logging.getLogger(__name__)


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
            with other envs it begins new trials, and the log and ``new_trials`` of the result say why. Attributes of transforms
            (not in a ``ParallelEnv``'s processes), of what draws the tasks, of advantage, networks, terms and update that have
            moved (numbers, tensors, ...), public numbers of a `TensorEnv` and parameters' ``requires_grad`` go on too, whatever
            they are given now; what has taken an attribute's place and cannot be saved is named in the log, and what a function
            closes over, or an object within an attribute holds, is not kept. An env of ``evaluate``'s is no
            part of it: with `TaskSampler.fixed` that plays the same tasks again. CSV files and TensorBoard then hold each step
            once: what the logger has there of later steps is taken back. Where there is no checkpoint the run starts anew, as
            one without ``resume``.
        resume_changes: settings that may be others than the run's, by the names that the error gives, such as
            ``["update.lr"]``. The new ones count from then on; after a change of the env new trials begin. A transform, an
            optimizer or an advantage that is another one then, whose state does not fit, begins anew, which the log says. How long
            the training is (``total_frames``) may always change.
        stop: called with each update's scalars, those of an evaluation among them, by the names that ``history`` has:
            ``"env_steps"``, ``"train/..."`` (no losses where a first batch told a normalisation alone), ``"time/seconds"`` (of the
            whole run, with those before a resume: a job's own limit is a clock of its own); True ends the training early. One that
            counts, such as evaluations in a row, has a ``state_dict`` and a ``load_state_dict``, for checkpoints.
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
        ValueError: ``resume`` without ``checkpoints``, a checkpoint of other networks, settings, of another version or of another
            update than that of the processes that train together, an interval below 1, an empty name for a folder, fewer frames
            than one batch, a collector that has spent its frames, no end in sight (neither ``total_frames`` nor ``stop``), or a
            schedule without a length (neither ``total_frames`` nor ``schedule_frames``).
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
    result, returns, scalars = TrainResult(env_steps=frames_of(collector, 0)), TrialReturns(), ScalarLog(logger)
    parts = {"update": update, "collector": collector, "callbacks": callbacks, "result": result, "returns": returns}
    total = collector.total_frames
    stateful = [*callbacks, *[stop] * hasattr(stop, "state_dict")]
    with _own_modes(), RunCheckpoints(checkpoints, **{**parts, "callbacks": stateful}).held() as saved:
        goes_on = resume and (saved.load_latest(resume_changes) or result.env_steps > 0)
        if goes_on:
            scalars.go_on_from(result.history, result.env_steps)
            result.lost_trials = getattr(collector, "lost_trials", 0)  # there may be no further batch
        elif resume:
            scalars.begin_anew()
            log.warning("resume=True, but %s holds no checkpoint: starting anew.", checkpoints)

        def begin() -> None:
            if not goes_on:
                saved.set_aside()
                scalars.set_aside()

        if hasattr(collector, "shutdown"):
            _trained.add(collector)
        watch(collector)
        check = check and isinstance(update, PPOUpdate)
        given = {"evaluate": evaluate, "scalars": scalars, "check": check, "begin": begin}
        loop = Loop(**parts, **given, schedule_frames=schedule_frames or total)
        loop.require_abreast()
        with progress_bar(total, result.env_steps, progress) as bar, deferred_interrupts() as interrupts:
            run = _Run(loop, saved, result, total, bar, interrupts, stop, eval_interval, checkpoint_interval)
            run(goes_on=goes_on)
    result.interrupted |= bool(interrupts)
    _warn_where_nothing_is_learnt(result)
    interrupts.pass_on()
    return result


@dataclass
class _Run:
    """The loop over batches, until the frames are spent, ``stop`` says so, or a signal comes; and what becomes of an error."""

    loop: Loop
    saved: RunCheckpoints
    result: TrainResult
    total: float
    bar: Callable[[dict[str, float]], None]
    interrupts: Interrupts
    stop: Callable[[dict[str, float]], bool] | None
    eval_interval: int
    checkpoint_interval: int

    def __call__(self, *, goes_on: bool) -> None:
        try:
            self._until_the_end(goes_on)
        except Exception as error:
            if self.loop.keep_what_is_learnt():
                self.saved.save_on_the_way_out(rollout=not self.loop.in_rollout)
            if not (self.interrupts and self.loop.in_rollout):
                raise
            log.warning("the rollout was cut short, since the signal has ended its processes, too: %r", error)

    def _until_the_end(self, goes_on: bool) -> None:
        made_up = goes_on and self.loop.make_up(self.eval_interval, self.total)
        [is_over] = self.loop.in_any_process(made_up and self._is_last(self.result.history[-1]))
        if not is_over:
            for batch in self.loop.batches(before_each=self.saved.before_rollout):
                if self._is_done_after(batch):
                    return
        if is_over or self.loop.finish():
            self.saved.save(last=True)

    def _is_done_after(self, batch: TensorDictBase) -> bool:
        """One update, with what is due after it; whether it is the last."""
        loop, history = self.loop, self.result.history
        row = loop.learn(batch)
        due = len(history) % self.eval_interval == 0
        is_put_off = due and not self._evaluated(row)
        ends, self.result.interrupted = loop.in_any_process(
            not is_put_off and self._is_last(row), bool(self.interrupts)
        )
        if ends and not due:
            loop.evaluate(row)  # in any case: a resumed run does not make up for the last one of all
        is_last = ends or self.result.interrupted
        self.bar(loop.record(row))
        if is_last or len(history) % self.checkpoint_interval == 0:
            self.saved.save(last=is_last)
        return is_last

    def _evaluated(self, row: dict[str, float]) -> bool:
        """Whether an evaluation that is due has been made; if not, a resumed run makes up for it, with ``stop``, which sees it."""
        if self.loop.evaluates and self.interrupts and self.result.env_steps < self.total:
            return False
        try:
            with self.interrupts.at_once():  # a job that shall end may be given less time than an evaluation takes
                self.loop.evaluate(row)
        except EndRequested:
            log.warning("the evaluation is given up, and made up for when the run is resumed.")
            return False
        return True

    def _is_last(self, row: dict[str, float]) -> bool:
        if is_stopped := self.stop is not None and bool(self.stop(row)):
            steps, seconds = self.result.env_steps, self.result.seconds
            log.info("stop() ends the training at %s env steps, with time/seconds %.3g.", steps, seconds)
        return is_stopped or self.result.env_steps >= self.total


def _warn_where_nothing_is_learnt(result: TrainResult) -> None:
    if result.history and result.history[-1].get("train/epochs") == 0 and not result.interrupted:
        log.warning(
            "nothing has been learnt: the only batch went to the networks' normalisation (normalize=True), which must know data "
            "before an update can be made. Train for more batches (total_frames)."
        )


@contextmanager
def _own_modes() -> Iterator[None]:
    """Gradients are on. Autocast is off, as in updates: actions scored otherwise than they were drawn have other ratios than 1."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        log.warning(
            "autocast is left out of the training: networks compute in their own dtype, from_env(..., dtype=...)."
        )
    with torch.enable_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


#: Collectors that have trained, to be shut down with the program.
_trained: weakref.WeakSet = weakref.WeakSet()


@atexit.register
def _shut_down() -> None:
    # Python waits for processes that are no daemons, as envs' are; they wait for a word of the collector.
    for collector in list(_trained):
        collector.shutdown()


def _check_kinds(collector, update, checkpoints, logger, **functions) -> None:
    require_collector(collector, "train(collector, update, ...)")
    # Losses and policies can be called too, and end deep in TensorDict's code.
    if not callable(update) or isinstance(update, TensorDictModuleBase | type):
        raise TypeError(f"{kind_of(update)} is no update, such as PPOUpdate(RL2PPOLoss(actor, critic)).")
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
    require_folder_name(checkpoints=checkpoints)


def _check_arguments(eval_interval, checkpoint_interval, callbacks, schedule_frames) -> None:
    whole("eval_interval", eval_interval)
    whole("checkpoint_interval", checkpoint_interval)
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
    if frames_of(collector, 0) >= total:
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
