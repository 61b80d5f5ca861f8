"""`train`: the loop only. Collect, update, log, evaluate, checkpoint, show progress."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.checkpoint import Checkpoint, CheckpointRotation, GlobalRNGState
from torchrl.collectors import BaseCollector
from torchrl.record.loggers import Logger

from rl2_torchrl.update import PPOUpdate

__all__ = ["TrainResult", "train"]

log = logging.getLogger(__name__)


@dataclass
class TrainResult:
    """What a training run did.

    Args:
        env_steps: env steps taken, those before a resume included.
        seconds: wall-clock seconds of this call, evaluations included.
        interrupted: whether Ctrl-C ended it.
        history: one row of scalars for each update of this call, ``env_steps`` among them.
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
        update: `PPOUpdate`, or any ``(batch, progress) -> metrics`` with a ``state_dict``.
        evaluate: held-out evaluation, returning scalars such as ``{"trial_return": 6.6}``; logged under ``eval/``. None
            trains blind.
        eval_interval: updates between evaluations; one more follows the last update.
        logger: TorchRL logger, e.g. `torchrl.record.loggers.CSVLogger`.
        checkpoints: folder for checkpoints; the newest two are kept. None saves none.
        checkpoint_interval: updates between checkpoints; one more follows the end or a Ctrl-C.
        resume: go on from the newest checkpoint in ``checkpoints``, if there is one.
        stop: called with each update's scalars; True ends the training early.
        progress: show a progress bar (needs ``tqdm``, extra ``recipes``).

    Returns:
        Steps, seconds and the history of scalars.

    Raises:
        FloatingPointError: reward, loss or gradient is not finite; the message says in which update and where.
        ValueError: ``resume`` without ``checkpoints``, or an interval below 1.

    Ctrl-C once lets the running update finish, saves a checkpoint and returns; twice stops at once.
    """
    if resume and checkpoints is None:
        raise ValueError("resume=True needs the folder to resume from: checkpoints=...")
    if eval_interval < 1 or checkpoint_interval < 1:
        raise ValueError(
            f"eval_interval={eval_interval} and checkpoint_interval={checkpoint_interval} must be at least 1."
        )
    saver = _Saver(collector, update, checkpoints)
    result = TrainResult(env_steps=saver.load_latest() if resume else 0)
    total, returns, started = collector.total_frames, _TrialReturns(), time.perf_counter()
    with _progress_bar(total, result.env_steps, progress) as bar, _deferred_interrupt() as interrupted:
        for batch in collector if result.env_steps < total else ():
            row = _one_update(update, batch, result, total, len(result.history))
            row["train/trial_return"] = returns(batch)
            collector.update_policy_weights_()
            result.history.append(row)
            done = interrupted.is_set() or (stop is not None and stop(row)) or result.env_steps >= total
            if evaluate is not None and (done or len(result.history) % eval_interval == 1 or eval_interval == 1):
                row.update({f"eval/{name}": value for name, value in evaluate().items()})
            row["time/seconds"] = time.perf_counter() - started
            row["time/steps_per_second"] = (result.env_steps - saver.resumed_at) / row["time/seconds"]
            _log(logger, row)
            bar(row, batch.numel())
            if done or len(result.history) % checkpoint_interval == 0:
                saver.save(result.env_steps)
            if done:
                break
    result.seconds = time.perf_counter() - started
    result.interrupted = interrupted.is_set()
    return result


def _one_update(
    update: PPOUpdate, batch: TensorDictBase, result: TrainResult, total: int, number: int
) -> dict[str, float]:
    try:
        metrics = update(batch, min(1.0, result.env_steps / total))
    except FloatingPointError as error:
        raise FloatingPointError(
            f"training stopped in update {number}, at {result.env_steps} env steps: {error}"
        ) from error
    result.env_steps += batch.numel()
    return {
        "env_steps": float(result.env_steps),
        **{f"train/{name}": value for name, value in metrics.items()},
    }


def _log(logger: Logger | None, row: dict[str, float]) -> None:
    if logger is not None:
        for name, value in row.items():
            if name != "env_steps":
                logger.log_scalar(name, value, step=int(row["env_steps"]))


class _TrialReturns:
    """Mean return of the trials that end within a batch, those that began in an earlier one included."""

    def __init__(self):
        self._carry: torch.Tensor | None = None

    def __call__(self, batch: TensorDictBase) -> float:
        reward = batch["next", "reward"].double().reshape(-1, batch.shape[-1])
        done = batch["next", "done"].reshape(reward.shape)
        if self._carry is None:
            self._carry = reward.new_zeros(len(reward))
        running = reward.cumsum(1) + self._carry.unsqueeze(1)
        rows, steps = done.nonzero(as_tuple=True)
        at_end = running[rows, steps]
        finished = at_end.clone()
        again = rows[1:] == rows[:-1]  # a row's second trial in this batch: take off what the first had earned
        finished[1:] -= torch.where(again, at_end[:-1], 0.0)
        last = torch.ones_like(rows, dtype=torch.bool)
        last[:-1] = ~again
        last_end = torch.zeros_like(self._carry).index_copy(0, rows[last], at_end[last])
        self._carry = running[:, -1] - last_end
        return finished.mean().item()


class _Saver:
    """Saves and restores everything that a run goes on from: networks, optimizer, tasks, envs, random numbers."""

    def __init__(self, collector: BaseCollector, update: PPOUpdate, folder: str | Path | None):
        self.resumed_at = 0
        self._rotation = None if folder is None else CheckpointRotation(folder, keep_last=2)
        self._checkpoint = Checkpoint(
            update=update, collector=collector, rollout=_RolloutState(collector), rng=GlobalRNGState()
        )

    def save(self, env_steps: int) -> None:
        if self._rotation is not None:
            self._rotation.save(self._checkpoint, step=env_steps, metadata={"env_steps": env_steps})

    def load_latest(self) -> int:
        latest = self._rotation.latest()
        if latest is None:
            log.warning("resume=True, but %s holds no checkpoint: starting anew.", self._rotation.directory)
            return 0
        self._checkpoint.load(latest)
        self.resumed_at = int(Checkpoint.manifest(latest)["metadata"]["env_steps"])
        return self.resumed_at


class _RolloutState:
    """The step at which the collector stands, and the base env's own state (its generators).

    `Collector.state_dict` leaves both out, so that a resumed run would begin with other tasks than the unbroken one.
    """

    def __init__(self, collector: BaseCollector):
        self._collector = collector

    def state_dict(self) -> dict[str, Any]:
        carrier = getattr(self._collector, "_carrier", None)
        env = getattr(self._collector, "env", None)
        return {
            "carrier": {} if carrier is None else carrier.exclude("next").flatten_keys(".").to_dict(),
            "env": {} if env is None else getattr(env, "base_env", env).state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        carrier = getattr(self._collector, "_carrier", None)
        for key, value in state["carrier"].items():
            carrier.set(tuple(key.split(".")) if "." in key else key, value)
        if state["env"]:
            env = self._collector.env
            getattr(env, "base_env", env).load_state_dict(state["env"])


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
