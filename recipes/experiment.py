"""An actor and its tasks: training or loading it, held-out evaluation, and the report."""

import math
from collections.abc import Callable, Mapping
from contextlib import closing
from functools import cached_property
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from tensordict import NestedKey
from torchrl.envs import TransformedEnv
from torchrl.modules import ProbabilisticActor
from torchrl.record.loggers import get_logger

from recipes.run import Run, RunFolder, begin_folder, trained_in
from recipes.streams import HELD_OUT_TASKS, REPORT_TASKS, draw_tasks
from rl2_torchrl import (
    AdaptationReport,
    AdaptiveAgent,
    PPOUpdate,
    TaskDistribution,
    TaskSampler,
    TrainResult,
    TrialCollector,
    TrialWorkers,
    adaptation_curve,
    load_weights,
    train,
)
from rl2_torchrl.ablations import with_shuffled_rewards, with_zeroed_memory
from rl2_torchrl.evaluation import AdaptationCurve

__all__ = ["Experiment", "publish"]


class Experiment:
    """An actor and the tasks that it shall adapt to: trained on some, evaluated and reported on others.

    Args:
        actor: the policy.
        make_env: ``(sampler, rows)`` to a trial env of ``rows`` rows, for evaluations.
        distribution: where tasks come from.
        run: seeds and places.
        held_out_tasks: tasks of an evaluation during the training.
        rows: most trials that are played side by side; None plays all of them so.
        episode_name: what an episode is called, e.g. "pull".
        measures: what else is reported of each episode, as `adaptation_curve` takes it.

    Raises:
        ValueError: several seeds, which only the command line runs, weights that would be played in the folder of a training, or a
            ``held_out_seed`` where tasks are the same by any.
    """

    def __init__(
        self,
        actor: ProbabilisticActor,
        make_env: Callable[[TaskSampler, int], TransformedEnv],
        distribution: TaskDistribution,
        run: Run,
        *,
        held_out_tasks: int = 1024,
        rows: int | None = 2048,
        episode_name: str = "episode",
        measures: Mapping[NestedKey, str] | None = None,
    ):
        if run.weights is not None and trained_in(run.log_dir):
            raise ValueError(
                f"log_dir={str(run.log_dir)!r} holds a training, whose report that of weights={str(run.weights)!r} would replace: "
                "name another folder, such as --log-dir runs/played."
            )
        if run.seeds:
            raise ValueError(f"seeds={run.seeds}: one call is one run; call main for each, with a log_dir of its own.")
        self.actor, self.make_env, self.distribution, self.run = actor, make_env, distribution, run
        if run.held_out_seed is not None and not self._depends_on_seed():
            raise ValueError(
                f"held_out_seed={run.held_out_seed} has no effect: which tasks are held out does not depend on it. Leave it out."
            )
        self.held_out_tasks, self.rows, self.episode_name, self.measures = held_out_tasks, rows, episode_name, measures

    def train(self, collector: TrialCollector | TrialWorkers, update: PPOUpdate, **options: Any) -> TrainResult:
        """Trains the actor and saves its agent, or loads the weights that the run names; ``options`` go to `train`."""
        run = self.run
        if run.weights is not None:
            load_weights(self.actor, run.weights)
            begin_folder(run, "played on held-out tasks, not trained: report.json, report.png\n")
            return TrainResult()
        if run.initial_weights is not None and not run.goes_on:
            load_weights(self.actor, run.initial_weights)
        # What no agent can be made of, or none that is saved, is noticed before the training.
        with TemporaryDirectory() as scratch:
            self._agent(collector).save(f"{scratch}/agent.safetensors")
        if run.held_out_seed is not None:
            update.held_out_seed = run.held_out_seed  # among the settings that a resumed run must share
        folder = RunFolder(run, collector, update)
        result = train(
            collector,
            update,
            # The folder first: the earlier run's files are away when other callbacks write theirs.
            **{"evaluate": self.evaluate, **options, "callbacks": [folder, *options.get("callbacks", ())]},
            logger=get_logger(run.logger, str(run.log_dir), "scalars"),
            checkpoints=run.log_dir / "checkpoints",
            resume=run.resume,
            resume_changes=run.resume_changes,
            progress=run.progress,
        )
        self._agent(collector).save(run.log_dir / "agent.safetensors")
        if isinstance(collector, TrialWorkers):
            collector.shutdown()  # their cores are for the report
        return result

    def _agent(self, collector: TrialCollector | TrialWorkers) -> AdaptiveAgent:
        is_here = isinstance(collector, TrialCollector)
        env = collector.env if is_here else self.make_env(TaskSampler(self.distribution, seed=0), 1)
        return AdaptiveAgent.from_policy(self.actor, env)

    def _depends_on_seed(self) -> bool:
        one, other = (self.distribution(torch.Size([8]), torch.Generator().manual_seed(seed)) for seed in (0, 1))
        return not (one == other).all()  # tensors, or TensorDicts

    def tasks(self, stream: int, number: int) -> torch.Tensor:
        """``number`` held-out tasks, [number, task_size]."""
        run = self.run
        seed = run.seed if run.held_out_seed is None else run.held_out_seed
        return draw_tasks(self.distribution, seed, stream, number)

    def play(self, tasks: torch.Tensor, **how: Any) -> AdaptationCurve:
        """One trial on each of ``tasks`` [num_tasks, task_size]; ``how`` goes to `adaptation_curve`."""
        rounds = math.ceil(len(tasks) / (self.rows or len(tasks)))
        # Rows that have a task in each round. The env may have processes.
        with closing(self.make_env(TaskSampler.fixed(tasks), math.ceil(len(tasks) / rounds))) as env:
            return adaptation_curve(env, self.actor, len(tasks), measures=self.measures, **how)

    def evaluate(self) -> dict[str, float]:
        """What `train` logs of held-out trials."""
        curve = self.play(self.tasks(HELD_OUT_TASKS, self.held_out_tasks))
        figures = {"trial_return": curve.mean}
        for name, each in ((self.episode_name, curve), *((name, curve.shown_as(name)) for name in curve.shown)):
            figures[f"first_{name}"], figures[f"last_{name}"] = each.first_and_last
        return figures

    @cached_property
    def reported(self) -> torch.Tensor:
        """The tasks of the report, [report_tasks, task_size], on which nothing was tuned or trained."""
        return self.tasks(REPORT_TASKS, self.run.report_tasks)

    def ways(self) -> dict[str, dict[str, Any]]:
        """How the agent plays for the report: options of `play` by name, as it was trained, greedily, and its ablations."""
        return {
            "agent": {},
            "greedy": {"deterministic": True},
            "memory_zeroed": {"ablation": with_zeroed_memory(self.actor)},
            "rewards_shuffled": {"ablation": with_shuffled_rewards()},
        }

    def report(self, result: TrainResult, **entries: Any) -> AdaptationReport:
        """The agent and its ablations on the tasks ``reported``; ``entries`` go to `AdaptationReport`."""
        curves = {name: self.play(self.reported, **how) for name, how in self.ways().items()}
        agent, greedy = curves.pop("agent"), curves.pop("greedy")
        whose = {"train": result, "seed": self.run.seed, "episode_name": self.episode_name}
        return AdaptationReport(agent, greedy, ablations=curves, **whose, **entries)


def publish(report: AdaptationReport, run: Run) -> AdaptationReport:
    """Writes the report into the run's folder, shows its table, and returns it."""
    path, console = report.save(run.log_dir), Console()
    console.print(report.table())
    cut = ", cut short: --resume goes on" if report.train.interrupted else ""
    trained = f"{report.train.env_steps:,} steps in {report.train.seconds:.0f} s{cut}; "
    console.print(f"{trained * bool(report.train.env_steps)}report and plots: {path.parent}", markup=False)
    for env_steps, reason in report.train.new_trials:
        console.print(f"resumed at {env_steps:,} steps with new trials: {reason}", markup=False)
    return report
