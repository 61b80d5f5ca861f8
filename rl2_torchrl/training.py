"""`train`: the loop only. Collect, update, log, evaluate, checkpoint, show progress."""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torchrl.checkpoint import Checkpoint, CheckpointError, CheckpointRotation, GlobalRNGState
from torchrl.collectors import BaseCollector
from torchrl.record.loggers import Logger

from rl2_torchrl.update import PPOUpdate

__all__ = ["TrainResult", "train"]

log = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """What a training run did, the parts before a resume included.

    Args:
        env_steps: env steps taken.
        seconds: wall-clock seconds, evaluations included.
        interrupted: whether Ctrl-C ended it.
        history: one row of scalars for each update, ``env_steps`` among them.
    """

    env_steps: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    history: list[dict[str, float]] = field(default_factory=list)


def train(
    collector: BaseCollector,
    update: PPOUpdate,
    *,
    evaluate: Callable[[], dict[str, float]] | None,
    eval_interval: int = 20,
    logger: Logger | None = None,
    checkpoints: str | Path | None = None,
    checkpoint_interval: int = 50,
    resume: bool = False,
    stop: Callable[[dict[str, float]], bool] | None = None,
    progress: bool = True,
) -> TrainResult:
    """Trains until the collector's ``total_frames``, Ctrl-C, or ``stop``.

    Args:
        collector: TorchRL collector over a trial env, with the policy (e.g. `ActorCritic`) that ``update`` trains.
        update: `PPOUpdate`, or any ``(batch, progress) -> metrics``; for checkpoints it needs ``state_dict`` and
            ``load_state_dict``.
        evaluate: held-out evaluation, returning scalars such as ``{"trial_return": 6.6}``; logged under ``eval/``. The
            random numbers that it draws are put back: training goes the same way however often it is evaluated. None
            trains blind.
        eval_interval: updates between evaluations, from the first update on; one more follows the last update.
        logger: TorchRL logger, e.g. `torchrl.record.loggers.CSVLogger`.
        checkpoints: folder for checkpoints; the newest two are kept. What an earlier run left there is moved aside
            unless ``resume``. None saves none.
        checkpoint_interval: updates between checkpoints; one more follows the end or a Ctrl-C.
        resume: go on from the newest checkpoint in ``checkpoints``, if there is one. On envs whose whole state is in
            the TensorDict and in ``get_extra_state`` (as `rl2_torchrl.envs.BernoulliBandit`) the run goes on as if
            it had never stopped; other envs, such as Gymnasium's, begin new trials.
        stop: called with each update's scalars, those of an evaluation among them; True ends the training early.
        progress: show a progress bar (needs ``tqdm``, extra ``recipes``).

    Returns:
        Steps, seconds and the history of scalars.

    Raises:
        FloatingPointError: reward, loss or gradient is not finite; the message says in which update and where. The
            newest checkpoint is from before it.
        Exception: whatever env or policy raise in a rollout, with a note that says in which update.
        ValueError: ``resume`` without ``checkpoints``, a checkpoint that does not fit, an interval below 1, fewer
            frames than one batch, or no end in sight: neither ``total_frames`` nor ``stop``.

    Ctrl-C once lets the running update finish, saves a checkpoint and returns; twice stops at once.
    """
    if resume and checkpoints is None:
        raise ValueError("resume=True needs the folder to resume from: checkpoints=...")
    if eval_interval < 1 or checkpoint_interval < 1:
        raise ValueError(
            f"eval_interval={eval_interval} and checkpoint_interval={checkpoint_interval} must be at least 1."
        )
    _require_an_end(collector, stop)
    result, returns = TrainResult(), _TrialReturns()
    saver = _Saver(collector, update, result, returns, checkpoints)
    if resume:
        saver.load_latest()
    else:
        saver.set_aside()
    total, clock = collector.total_frames, _Clock(result)
    with _progress_bar(total, result.env_steps, progress) as bar, _deferred_interrupt() as interrupted:
        for batch in _batches(collector, result):
            row = _one_update(update, batch, result, total)
            row["train/trial_return"] = returns(batch)
            collector.update_policy_weights_()
            due = len(result.history) % eval_interval == 0 and not interrupted.is_set()
            row.update(_evaluated(evaluate if due else None))
            last = (stop is not None and stop(row)) or result.env_steps >= total
            if last and not due:
                row.update(_evaluated(evaluate))
            last = last or interrupted.is_set()
            row.update(clock())
            result.history.append(row)
            _log(logger, row)
            bar(row, batch.numel())
            if last or len(result.history) % checkpoint_interval == 0:
                saver.save()
            if last:
                break
    result.interrupted = interrupted.is_set()
    return result


def _require_an_end(collector: BaseCollector, stop: Callable[[dict[str, float]], bool] | None) -> None:
    total, batch = collector.total_frames, getattr(collector, "requested_frames_per_batch", 1)
    if total < batch:
        raise ValueError(
            f"total_frames={total} is less than one batch of {batch} env steps: there is nothing to train on."
        )
    if total == math.inf and stop is None:
        raise ValueError(
            "the collector's total_frames is negative or None, so it never ends: give it a number of env steps, or "
            "pass a stop=, be it `lambda row: False` to train until Ctrl-C."
        )


def _batches(collector: BaseCollector, result: TrainResult) -> Iterator[TensorDictBase]:
    """The collector's batches; an error of env or policy gets a note of where it was raised."""
    batches = iter(collector)
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:
            where = f"in the rollout of update {len(result.history)}, after {result.env_steps} env steps"
            cause = "; most often the env paid a reward, or showed an observation, that is not finite"
            error.add_note(where + cause * ("nan" in str(error).lower()))
            raise
        if batch is None:
            return
        yield batch


def _one_update(update: PPOUpdate, batch: TensorDictBase, result: TrainResult, total: float) -> dict[str, float]:
    try:
        metrics = update(batch, min(1.0, result.env_steps / total))
    except FloatingPointError as error:
        raise FloatingPointError(
            f"training stopped in update {len(result.history)}, at {result.env_steps} env steps: {error}"
        ) from error
    result.env_steps += batch.numel()
    return {
        "env_steps": float(result.env_steps),
        **{f"train/{name}": value for name, value in metrics.items()},
    }


def _evaluated(evaluate: Callable[[], dict[str, float]] | None) -> dict[str, float]:
    if evaluate is None:
        return {}
    before = GlobalRNGState().state_dict()
    try:
        return {f"eval/{name}": value for name, value in evaluate().items()}
    finally:
        GlobalRNGState().load_state_dict(before)


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


def _log(logger: Logger | None, row: dict[str, float]) -> None:
    if logger is not None:
        for name, value in row.items():
            if name != "env_steps":
                logger.log_scalar(name, value, step=int(row["env_steps"]))


class _TrialReturns:
    """Mean return of the trials that end within a batch, those that began in an earlier one included."""

    def __init__(self):
        self.carry: torch.Tensor | None = None  # what each row's running trial has earned so far

    def __call__(self, batch: TensorDictBase) -> float:
        reward = batch["next", "reward"].reshape(-1, batch.shape[-1])
        done = batch["next", "done"].reshape(reward.shape)
        if self.carry is None:
            self.carry = reward.new_zeros(len(reward), dtype=torch.float64)
        finished, begin = [], 0
        for last in done.any(0).nonzero().flatten().tolist():
            self._add(reward[:, begin : last + 1])
            ended = done[:, last]
            finished.append(self.carry[ended])
            self.carry[ended] = 0.0
            begin = last + 1
        self._add(reward[:, begin:])
        return torch.cat(finished).mean().item() if finished else math.nan

    def _add(self, rewards: torch.Tensor) -> None:
        self.carry += rewards.sum(-1, dtype=torch.float64)


class _Saver:
    """Saves and restores all that a run goes on from: networks, optimizer, tasks, envs, random numbers, history."""

    def __init__(self, collector, update, result: TrainResult, returns: _TrialReturns, folder: str | Path | None):
        self._rotation = None if folder is None else CheckpointRotation(folder, keep_last=2)
        self._result = result
        self._checkpoint = Checkpoint(
            update=update,
            collector=collector,
            rollout=_RolloutState(collector, returns),
            result=_ResultState(result),
            rng=GlobalRNGState(),
        )

    def save(self) -> None:
        if self._rotation is not None:
            self._rotation.save(self._checkpoint, step=self._result.env_steps)

    def load_latest(self) -> None:
        latest = self._rotation.latest()
        if latest is None:
            log.warning("resume=True, but %s holds no checkpoint: starting anew.", self._rotation.directory)
            return
        try:
            self._checkpoint.load(latest)
        except CheckpointError as error:
            raise ValueError(
                f"cannot resume from {latest}: it was made with other networks, envs or tasks. Give them the sizes "
                f"they had, or start anew without resume. {error}"
            ) from error

    def set_aside(self) -> None:
        """Moves an earlier run's checkpoints away: the rotation would delete those with fewer steps, new or not."""
        if self._rotation is None or self._rotation.latest() is None:
            return
        folder = self._rotation.directory
        aside = next(path for n in count(1) if not (path := folder.with_name(f"{folder.name}-old{n}")).exists())
        folder.rename(aside)
        log.warning("%s held the checkpoints of an earlier run (resume=False): moved to %s.", folder, aside)


class _ResultState:
    """`TrainResult` as a component of a checkpoint."""

    def __init__(self, result: TrainResult):
        self._result = result

    def state_dict(self) -> dict[str, Any]:
        result = self._result
        return {
            "env_steps": result.env_steps,
            "seconds": result.seconds,
            "history": json.dumps(result.history),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._result.env_steps, self._result.seconds = state["env_steps"], state["seconds"]
        self._result.history[:] = json.loads(state["history"])


class _RolloutState:
    """The step at which the collector stands, what its trials have earned so far, and the base env's generators.

    `Collector.state_dict` leaves them out, so that a resumed run would begin with other tasks than the unbroken one.
    Only for envs that hand out all of their state: a Gymnasium env does not, and put back in the middle of a trial
    it would play another task than the TensorDict says.
    """

    def __init__(self, collector: BaseCollector, returns: _TrialReturns):
        self._collector, self._returns = collector, returns

    @property
    def _base_env(self) -> nn.Module | None:
        env = getattr(self._collector, "env", None)
        env = getattr(env, "base_env", env)
        whole = env is not None and type(env).get_extra_state is not nn.Module.get_extra_state
        return env if whole else None

    def state_dict(self) -> dict[str, Any]:
        if self._base_env is None:
            return {}
        return {
            "carrier": self._collector._carrier.exclude("next").to_dict(),
            "env": self._base_env.state_dict(),
            "earned": self._returns.carry,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            carrier = self._collector._carrier
            carrier.update(TensorDict(state["carrier"], batch_size=carrier.batch_size))
            self._base_env.load_state_dict(state["env"])
            self._returns.carry = state["earned"]


@contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """The first Ctrl-C only sets the event, so that no update is cut in the middle; the second raises as always."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.getsignal(signal.SIGINT)

    def first(signum: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, before)
        log.warning("Ctrl-C: finishing this update and saving. Once more stops at once.")
        event.set()

    signal.signal(signal.SIGINT, first)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _progress_bar(total: int, done: int, show: bool) -> Iterator[Callable[[dict[str, float], int], None]]:
    if not show:
        yield lambda row, frames: None
        return
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError(
            'the progress bar needs tqdm: pip install "rl2_torchrl[recipes]", or train(progress=False).'
        ) from error
    shown = {"train/trial_return": "trial return", "eval/trial_return": "held-out"}
    latest: dict[str, str] = {}
    with tqdm(total=total, initial=done, unit=" steps", unit_scale=True, smoothing=0.1) as bar:

        def advance(row: dict[str, float], frames: int) -> None:
            latest.update({label: f"{row[name]:.3f}" for name, label in shown.items() if name in row})
            bar.set_postfix(latest, refresh=False)
            bar.update(frames)

        yield advance
