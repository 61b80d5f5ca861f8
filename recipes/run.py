"""A run: its seeds, where it begins, which processes play, and what stands in its folder."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from torchrl.envs import TransformedEnv

from recipes.reports import read_report
from recipes.settings import Settings, require_whole
from recipes.streams import WORKERS, stream_seed
from rl2_torchrl import (
    ActorCritic,
    Callback,
    PPOUpdate,
    TaskDistribution,
    TaskSampler,
    TrialCollector,
    TrialWorkers,
    describe,
)
from rl2_torchrl.arguments import require_folder_name
from rl2_torchrl.report import made_by
from rl2_torchrl.trial import transforms_of

__all__ = ["Run", "RunFolder", "begin_folder", "trained_in"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run(Settings):
    """Seeds, where a run begins, which processes play, and what it leaves.

    Args:
        log_dir: folder of the run: report.json, report.png and other plots, agent.safetensors, scalars and checkpoints.
        seed: seed of networks, envs and tasks.
        seeds: of several runs side by side instead, each a program of its own in log_dir/seed0 and so on; their mean and its band
            are shown at the end. For the command line alone.
        workers: processes that play the trials that are trained on, in equal shares of a batch; 0: this one does. With backend
            ray 0 stands for 2.
        backend: processes of this machine, or actors of a Ray cluster (extra ray): of the one that RAY_ADDRESS in the environment
            names, or of a new one here.
        report_tasks: held-out tasks in the final report.
        held_out_seed: seed of the tasks of evaluations and report, for runs to share them; the run's own by default.
        initial_weights: file of an agent to start from, such as one for shorter trials; of another log_dir.
        weights: file of an agent, as a run leaves it in agent.safetensors: to evaluate in place of training, with the network
            that it has. Needs a log_dir without a training's report, and not the file's own.
        logger: where scalars go; tensorboard and wandb are extras of the package.
        resume: go on from the newest checkpoint in log_dir.
        resume_changes: settings that may differ from those of the run that is resumed, by the names that the error gives.
        progress: show a progress bar.
    """

    log_dir: Path
    seed: int = 0
    seeds: tuple[int, ...] = ()
    workers: int = 0
    backend: Literal["process", "ray"] = "process"
    report_tasks: int = 10_000
    held_out_seed: int | None = None
    initial_weights: Path | None = None
    weights: Path | None = None
    logger: Literal["csv", "tensorboard", "wandb"] = "csv"
    resume: bool = False
    resume_changes: tuple[str, ...] = ()
    progress: bool = True

    def __post_init__(self):
        super().__post_init__()
        seeds = ("seed", "seeds", *["held_out_seed"] * (self.held_out_seed is not None))
        require_whole(self, *seeds, least=0, most=2**53)  # `stream_seed` is to fit into 64 bits
        require_whole(self, "workers", least=0)
        require_whole(self, "report_tasks")
        if self.report_tasks < 2:
            raise ValueError(f"report_tasks={self.report_tasks}: rewards can only be shuffled among at least 2 tasks.")
        require_folder_name(log_dir=self.log_dir)
        object.__setattr__(self, "log_dir", Path(self.log_dir))  # text names a folder as well
        there = next(path for path in (self.log_dir, *self.log_dir.parents) if path.exists())
        if not there.is_dir():
            raise ValueError(
                f"log_dir={str(self.log_dir)!r}: {str(there)!r} is a file: name a folder, which may be new."
            )
        for name in ("weights", "initial_weights"):
            self._require_agents_file(name)
        self._require_agreement()

    @property
    def goes_on(self) -> bool:
        """Whether there is a checkpoint to go on from: what the run began with is not needed any more."""
        return self.resume and _has_checkpoints(self.log_dir)

    def _require_agents_file(self, name: str) -> None:
        """Raises ValueError where weights are no file, or one that this run would put away and a later one delete."""
        path = getattr(self, name)
        if path is None or (name == "initial_weights" and self.goes_on):
            return
        if not Path(path).is_file():
            raise ValueError(
                f"{name}={str(path)!r} is no file: give an agent's, such as runs/bandit/agent.safetensors."
            )
        left = [*files_of_a_run(self.log_dir), *files_of_a_run(self.log_dir / "earlier")]
        if Path(path).resolve() in [each.resolve() for each in left]:
            raise ValueError(
                f"{name}={str(path)!r} was left by an earlier run in log_dir={str(self.log_dir)!r}, which this one would put away, "
                "and a later one delete: copy it elsewhere, or name another folder, such as --log-dir runs/new."
            )

    def _require_agreement(self) -> None:
        """Raises ValueError where one setting would be without effect beside another."""
        for name in ("resume", "initial_weights", "seeds"):
            if self.weights is not None and (value := getattr(self, name)):
                raise ValueError(f"weights are played, not trained: leave out {name}={value!r}, or weights.")
        if self.seeds and self.seed:
            raise ValueError(f"seed={self.seed} beside seeds={self.seeds}: the latter are those of the runs.")
        if self.resume_changes and not self.resume:
            raise ValueError(f"resume_changes={self.resume_changes} is for a run that goes on: add resume (--resume).")

    def collector(
        self,
        make_env: Callable[[TaskSampler | None, int], TransformedEnv],
        env: TransformedEnv,
        policy: ActorCritic,
        update: PPOUpdate,
        **frames: int,
    ) -> TrialCollector | TrialWorkers:
        """What plays the trials of ``env`` that are trained on: this process, or others, a share of its rows each.

        Args:
            make_env: ``(sampler, rows)`` to an env such as ``env``, for a worker; the sampler has the tasks of ``env``'s own, and
                seeds of the worker's. It is None where ``env`` has none.
            env: the trial env of all rows.
            policy: plays.
            update: what batches are for.
            **frames: ``frames_per_batch`` and ``total_frames``.

        Raises:
            ValueError: the rows cannot be shared out among the workers.
        """
        number = self.workers or (2 if self.backend == "ray" else 0)
        if not number or self.weights is not None:
            return TrialCollector(env, policy, keep=update.in_keys, **frames)
        share, rest = divmod(env.batch_size.numel(), number)
        if rest:
            raise ValueError(
                f"trials={env.batch_size.numel()} cannot be shared out evenly among workers={number}: choose a multiple."
            )
        sampler = next((each for each in transforms_of(env) if isinstance(each, TaskSampler)), None)
        create_env = partial(_share, make_env, None if sampler is None else sampler.distribution, share)
        options = {"workers": number, "backend": self.backend, "seed": stream_seed(self.seed, WORKERS)}
        return TrialWorkers(create_env, policy, keep=update.in_keys, **options, **frames)


def _share(make_env: Callable, distribution: TaskDistribution | None, rows: int) -> TransformedEnv:
    """A worker's env; the worker gives the sampler a seed."""
    return make_env(None if distribution is None else TaskSampler(distribution), rows)


class RunFolder(Callback):
    """Says in a training's folder what it is, once it has begun, and puts away what an earlier run has left there."""

    def __init__(self, run: Run, collector: TrialCollector | TrialWorkers, update: PPOUpdate):
        self._run, self._parts, self._begun = run, (collector, update), False

    def after_update(self, row: dict[str, float], progress: float) -> None:
        """After the first one, which has found its way; a training that is refused changes nothing."""
        if not self._begun:
            begin_folder(self._run, f"{describe(*self._parts)}\n\n{_FILES}", goes_on=progress > 0)
        self._begun = True


def begin_folder(run: Run, what: str, *, goes_on: bool = False) -> None:
    """Writes ``about.txt`` into a run's folder: by which command it is made, or which ones, where it ``goes_on``; then ``what``."""
    path = run.log_dir / "about.txt"
    before = [path.read_text().partition("\n\n")[0]] if goes_on and path.is_file() else []
    if not goes_on:
        put_away(run.log_dir)
    run.log_dir.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*before, made(run, goes_on=goes_on)]) + f"\n\n{what}")


def made(run: Run, *, goes_on: bool = False) -> str:
    """By which command, commit and versions a run is made, and from which seeds and weights."""
    by = made_by()
    versions = ", ".join(f"{name} {number}" for name, number in by["versions"].items())
    names = ("seed", "held_out_seed", *["initial_weights"] * (not goes_on), "weights", "workers")
    begun = {name: getattr(run, name) for name in names}
    begun = ", ".join(f"{name}={value}" for name, value in begun.items() if value is not None)
    return f"{by['command']}\ncommit {by['commit']}; {versions}\n{begun}"


def put_away(folder: Path) -> None:
    """Moves what an earlier run has left directly in ``folder`` to its subfolder ``earlier``, in the place of the run before it."""
    if not (files := files_of_a_run(folder)):
        return
    (earlier := folder / "earlier").mkdir(exist_ok=True)
    for path in files_of_a_run(earlier):
        path.unlink()  # and nothing else that somebody keeps there
    for path in files:
        path.replace(earlier / path.name)
    log.warning("%s held an earlier run: its report and agent are in %s.", folder, earlier)


def files_of_a_run(folder: Path) -> list[Path]:
    """What a run leaves directly in its ``folder``."""
    names = ["about.txt", "agent.safetensors", "report.json", "report.png", "path.png", "velocity.png"]
    names += [f"{film}{suffix}" for film in ("untrained", "trial") for suffix in (".mp4", ".gif")]
    return [folder / name for name in names if (folder / name).is_file()]


def trained_in(folder: Path) -> bool:
    """Whether the ``folder`` holds a training, finished or not."""
    return _has_checkpoints(folder) or bool(read_report(folder)["train"]["history"])


def _has_checkpoints(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("checkpoint-*.safetensors"))


#: What stands in a training's folder.
_FILES = """\
report.json        all figures, with the scalars of each update
report.png         how it learnt, and how it adapts within a trial
agent.safetensors  the agent: rl2_torchrl.AdaptiveAgent.load("agent.safetensors")
scalars            what it logged as it learnt (wandb, with --logger wandb)
checkpoints        where --resume goes on
"""
