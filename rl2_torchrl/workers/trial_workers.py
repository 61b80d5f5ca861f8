"""`TrialWorkers`: a collector whose trials are played in several processes."""

from __future__ import annotations

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from copy import deepcopy
from functools import partial
from operator import methodcaller
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import BaseCollector
from torchrl.envs import EnvBase

from rl2_torchrl.arguments import as_list, whole
from rl2_torchrl.minibatches import beside
from rl2_torchrl.seeding import derived_seed, require_seed
from rl2_torchrl.workers.hosts import ActorHost, Host, threads_kept

__all__ = ["TrialWorkers"]

log = logging.getLogger(__name__)

_HOSTS = {"process": Host, "ray": ActorHost}
#: How often in a row a worker may die: more is no accident.
MOST_DEATHS = 3


class TrialWorkers(BaseCollector):
    """A `TrialCollector` in each of several processes; their rows, side by side, are a batch.

    For each batch the workers are sent the policy's weights as they are then, and each plays ``frames_per_batch / workers`` steps,
    on tasks of its own. A worker that dies (killed, out of memory, its machine lost) is started anew with other seeds and plays its
    share of the batch again: its trials are lost, which the log says and `lost_trials` counts. An error that env or policy raise in
    a worker is raised here.

    Each process is a `MultiSyncCollector` of TorchRL's with one worker, or a `RayCollector`. (With several workers, one that is
    killed takes the others with it, or is waited for without end.) A program that makes this collector needs its
    ``if __name__ == "__main__":``, since TorchRL spawns processes; ``multiprocessing.set_start_method("forkserver", force=True)``
    after ``set_forkserver_preload(["rl2_torchrl"])`` starts them without the seconds in which each imports PyTorch.

    A signal to the program's whole group, as Ctrl-C is, does not end the workers; the end of the program does, also by a kill.

    Args:
        create_env_fn: makes the env of one worker, its rows alone. Seeds that it gives are replaced by the worker's. Gymnasium ids
            that an import makes known need that import within it, or ``"module:id"``: a worker is a program of its own.
        policy: as for `TrialCollector`. Workers have copies on the CPU; batches come on the policy's device.
        workers: number of processes.
        frames_per_batch: env steps of a batch, of all workers together.
        total_frames: env steps of all batches; -1: there is no end.
        keep: as for `TrialCollector`; what is not kept is not sent either.
        backend: ``"process"``, on this machine, or ``"ray"`` (extra ``ray``): actors of the cluster that ``RAY_ADDRESS`` in the
            environment names, or of a new one on this machine, which ends with the program. They need this package, and the
            program's own, where they run.
        seed: what the workers' seeds follow from; None draws one from PyTorch's default generator. Seed and number of workers
            repeat a run in which no worker dies.
        options: further arguments of `MultiSyncCollector` or `RayCollector`, such as ``{"remote_configs": {"num_cpus": 2}}``
            or ``{"ray_init_config": {...}}``. An actor takes one CPU and no GPU by default.

    Attributes:
        backend: what plays in a worker, and ``reason``: why; as of a `TrialCollector`.
        deaths: how many workers have died.
        lost_trials: the trials that they were playing, one a row.
        pids: the workers' processes, by their numbers on their machines.
        before_play: what a worker calls with its env before it plays a batch, such as to change one of the env's settings; it is
            pickled. None, as at first: nothing.

    A resumed training begins new trials, by seeds that no worker has had, and what transforms (`VecNormV2`), task distributions and
    envs have counted in the workers begins anew: let networks normalize, and `before_play` make tasks harder. All else goes on
    exactly.

    Raises:
        ValueError: ``workers`` is below 1 or does not divide ``frames_per_batch``, or there is no such ``backend``.
        TypeError: ``create_env_fn`` is no function, ``keep`` a single key, or ``seed`` no whole number.
        ImportError: Ray is not installed.
        RuntimeError: a worker dies three times in a row, or they have been shut down.

    Examples:
        >>> from torchrl.envs import Compose, TransformedEnv
        >>> from rl2_torchrl import ActorCritic, GRUCategoricalActor, GRUValueHead, PreviousStep, TaskSampler, Trial
        >>> from rl2_torchrl.envs import BernoulliBandit, uniform_means
        >>> def make_env():
        ...     trial = Compose(Trial(episodes=10), TaskSampler(uniform_means(3)), PreviousStep())
        ...     return TransformedEnv(BernoulliBandit(num_arms=3, batch_size=(4,)), trial)
        >>> env = make_env()
        >>> policy = ActorCritic(GRUCategoricalActor.from_env(env), GRUValueHead.from_env(env))
        >>> collector = TrialWorkers(make_env, policy, workers=2, frames_per_batch=80, total_frames=160)  # doctest: +SKIP
        >>> [batch["action"].shape for batch in collector]  # doctest: +SKIP
        [torch.Size([8, 10]), torch.Size([8, 10])]
        >>> collector.shutdown()  # doctest: +SKIP
    """

    def __init__(
        self,
        create_env_fn: Callable[[], EnvBase],
        policy: TensorDictModuleBase,
        *,
        workers: int,
        frames_per_batch: int,
        total_frames: int = -1,
        keep: Sequence[NestedKey] | None = None,
        backend: Literal["process", "ray"] = "process",
        seed: int | None = None,
        options: Mapping[str, Any] | None = None,
    ):
        require_seed(seed)
        super().__init__()
        _check(create_env_fn, workers, frames_per_batch, backend)
        self.policy, self.num_workers = policy, workers
        self.keep = None if keep is None else as_list("keep", keep)
        self.requested_frames_per_batch = frames_per_batch
        self.total_frames = total_frames if total_frames is not None and total_frames >= 0 else float("inf")
        self.deaths = self.lost_trials = self._frames = self._lives = 0
        self._seed = int(torch.randint(2**62, ())) if seed is None else seed
        self._host = _HOSTS[backend]
        given = (create_env_fn, deepcopy(policy).cpu(), frames_per_batch // workers)
        self._start = partial(self._host, *given, options=dict(options or {}))
        self._hosts: list[Host | None] = [None] * workers
        self.pids = [0] * workers
        self.before_play: Callable[[EnvBase], object] | None = None
        self._lock, self._pool = threading.Lock(), ThreadPoolExecutor(workers, "TrialWorkers")
        self._host.begin(dict(options or {}))
        # Also when the program ends, which would wait for its processes else.
        self._end = weakref.finalize(self, _shut_down, self._hosts, self._pool)
        try:
            self._each(self._begin, self._new_seeds())
            self._rows, self.backend, self.reason = map(self._hosts[0].call, ("rows", "backend", "reason"))
        except BaseException:
            self.shutdown()
            raise

    # ----------------------------------------------------------------- a batch
    def iterator(self) -> Iterator[TensorDictBase]:
        """Batches ``[*B, T]``, until there are ``total_frames`` steps."""
        while self._frames < self.total_frames:
            batch = self.rollout()
            self._frames += batch.numel()
            yield batch

    def rollout(self) -> TensorDictBase:
        """One batch ``[*B, T]``: the rows of all workers, in the order of their numbers; of envs without rows ``[workers, T]``."""
        weights = TensorDict.from_module(self.policy).data  # looked up each time: a parameter may get other memory
        # A copy, since what is sent to a process is moved to shared memory, where the learner would change it under the players.
        sent = self._host.sendable(weights.cpu().clone().consolidate())
        batches = self._each(self._ask, [("play", sent, self.before_play)] * self.num_workers)
        joined = torch.stack(batches) if batches[0].ndim == 1 else torch.cat(batches)
        return beside(self.policy, joined)

    def of_env(self, function: Callable[[EnvBase], Any]) -> Any:
        """``function(env)`` of the first worker's env; function and result are pickled."""
        self._require_workers()
        return self._ask(0, ("of_env", function))

    def _each(self, function: Callable, arguments: Sequence) -> list:
        """``function(number, argument)`` of all workers at the same time; the first error is raised once all have ended."""
        self._require_workers()
        futures = [self._pool.submit(function, number, argument) for number, argument in enumerate(arguments)]
        wait(futures)
        return [future.result() for future in futures]

    def _require_workers(self) -> None:
        if not self._end.alive:
            raise RuntimeError("these TrialWorkers have been shut down, and their envs are gone: make new ones.")

    def _ask(self, number: int, what: tuple) -> Any:
        """What a worker's `Host.call` returns; if the worker dies, a new one is asked."""
        deaths = 0
        while True:
            try:
                if self._hosts[number] is None:
                    log.warning("worker %s is started anew", number)
                    self._begin(number, self._new_seeds(1)[0])
                return self._hosts[number].call(*what)
            except Exception as error:
                host = self._hosts[number]
                how = self._host.why_not_started(error) if host is None else host.why_dead(error)
                if how is None:
                    raise
                self._bury(number, how)
                deaths += 1
                if deaths == MOST_DEATHS:
                    raise RuntimeError(
                        f"worker {number} has died {deaths} times in a row ({how}), which is no accident: is there memory for "
                        "all workers, or does the env end its process? A TrialCollector in this process may show it."
                    ) from error

    # ------------------------------------------------------------------ deaths
    def _bury(self, number: int, how: str) -> None:
        """Counts the death of a worker, and ends what is left of it; one that died while it was starting has lost no trials."""
        host, self._hosts[number] = self._hosts[number], None
        lost = 0 if host is None else self._rows
        log.warning("worker %s has died (%s): the trials of its %s rows are lost", number, how, lost)
        with self._lock, threads_kept():
            self.deaths += 1
            self.lost_trials += lost
            if host is not None:
                host.shutdown()

    def _begin(self, number: int, seed: int) -> None:
        self._hosts[number] = self._start({"keep": self.keep, "number": number, "seed": seed})
        self.pids[number] = self._hosts[number].call("pid")

    def _new_seeds(self, number: int | None = None) -> list[int]:
        """Seeds for as many workers, all by default, that none has had before."""
        with self._lock:
            first = self._lives
            self._lives += self.num_workers if number is None else number
            return [derived_seed(self._seed, life) for life in range(first, self._lives)]

    # ------------------------------------------------------- what TorchRL asks for
    def update_policy_weights_(self, *args: Any, **kwargs: Any) -> None:
        """There is nothing to do: the next batch is played by the policy as it is then."""

    def set_seed(self, seed: int, static_seed: bool = False) -> int:
        """Seeds the workers anew, each otherwise, and begins new trials."""
        require_seed(seed)
        self._seed, self._lives = seed, 0
        self._reseed()
        return seed

    def _reseed(self) -> None:
        self._each(lambda number, seed: self._hosts[number].call("set_seed", seed), self._new_seeds())

    def reset(self) -> None:
        """Begins new trials."""
        self._each(lambda number, _: self._hosts[number].call("reset"), [None] * self.num_workers)

    def state_dict(self) -> OrderedDict:
        """What has been counted, and which seeds have been used; where the workers stand in their trials is not in it."""
        counted = ("frames", self._frames), ("deaths", self.deaths), ("lost_trials", self.lost_trials)
        return OrderedDict(counted, lives=self._lives, seed=self._seed)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Goes on counting; workers begin new trials by new seeds."""
        self._frames, self.deaths, self.lost_trials = (state_dict[name] for name in ("frames", "deaths", "lost_trials"))
        self._seed, self._lives = state_dict["seed"], state_dict["lives"]
        self._reseed()

    def shutdown(self, timeout: float | None = None, close_env: bool = True, raise_on_error: bool = True) -> None:
        """Ends all workers. It may be called again."""
        self._end()


def _shut_down(hosts: list[Host | None], pool: ThreadPoolExecutor) -> None:
    running = [host for host in hosts if host is not None]
    hosts[:] = [None] * len(hosts)
    with threads_kept():
        try:
            list(pool.map(methodcaller("shutdown"), running))
        except RuntimeError:  # the program is ending, and runs nothing in threads any more
            for host in running:
                host.shutdown()
    pool.shutdown()


def _check(create_env_fn: Any, workers: int, frames_per_batch: int, backend: str) -> None:
    if backend not in _HOSTS:
        raise ValueError(f"backend={backend!r}: choose one of {list(_HOSTS)}.")
    if whole("frames_per_batch", frames_per_batch) % whole("workers", workers):
        raise ValueError(f"workers={workers} must divide frames_per_batch={frames_per_batch}: all play as many steps.")
    if isinstance(create_env_fn, EnvBase) or not callable(create_env_fn):
        raise TypeError(
            f"create_env_fn is a {type(create_env_fn).__name__}: each worker makes an env, so give a function that returns one."
        )
