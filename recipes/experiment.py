"""What recipes share: settings, streams of random numbers, training or loading an actor, held-out evaluation, and the report."""

import inspect
import json
import logging
import math
import sys
from argparse import SUPPRESS, ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property, partial, wraps
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
import tyro
from rich.console import Console
from tensordict import NestedKey, TensorDictBase
from torchrl.envs import TransformedEnv
from torchrl.modules import ProbabilisticActor
from torchrl.record.loggers import get_logger

from recipes.help import as_typed, overview, program
from recipes.posterior import (
    CountBonusAdvantage,
    OfRewards,
    Posterior,
    PosteriorAdvantage,
    PosteriorBelief,
    sample_moments,
)
from recipes.seeds import run_seeds
from rl2_torchrl import (
    ActorCritic,
    AdaptationReport,
    AdaptiveAgent,
    Callback,
    GRUCore,
    LSTMCore,
    MLPEncoder,
    PPOUpdate,
    TaskBelief,
    TaskDistribution,
    TaskSampler,
    TrainResult,
    TrialAdvantage,
    TrialCollector,
    TrialWorkers,
    adaptation_curve,
    describe,
    linear_decay,
    load_weights,
    train,
)
from rl2_torchrl.evaluation import AdaptationCurve, with_shuffled_rewards, with_zeroed_memory
from rl2_torchrl.objectives import RegretAdvantage
from rl2_torchrl.report import made_by
from rl2_torchrl.trial import transforms_of

log = logging.getLogger(__name__)

#: Streams of random numbers that never meet, for `stream_seed`: tasks first, then what envs and classical agents draw.
TRAIN_TASKS, HELD_OUT_TASKS, REPORT_TASKS, TUNING_TASKS, ENVS, CLASSICAL_AGENTS = 0, 1, 2, 3, 9, 10
WORKERS = 11


# ------------------------------------------------------------------- settings
class Settings:
    """Settings that belong together; ValueError where one of a few choices is none of them."""

    def __post_init__(self):
        require_choices(type(self), vars(self))


def require_choices(of: Callable, given: Mapping[str, Any]) -> None:
    """Raises ValueError where what is ``given`` to a function or class is none of the choices that its annotation names."""
    for name, hint in get_type_hints(of).items():
        if get_origin(hint) is Literal and name in given and given[name] not in get_args(hint):
            raise ValueError(f"{name}={given[name]!r} is none of {', '.join(map(repr, get_args(hint)))}.")


@dataclass(frozen=True)
class Network(Settings):
    """Actor and critic.

    Args:
        units: units of the core.
        core: what carries the memory.
        encoder_cells: sizes of the layers of an MLP before the core; empty: none.
        num_cells: hidden layers of actor and critic after the core. Empty: none, but for a critic on a memory that it does not
            train, which has one of ``units``.
        normalize: bring observed numbers and rewards to mean 0 and standard deviation 1 before the networks (`RunningNorm`).
        critic_keys: what the critic reads beside the actor's memory; the task among it makes advantages less noisy, and the
            actor never sees it.
    """

    units: int = 64
    core: Literal["gru", "lstm"] = "gru"
    encoder_cells: tuple[int, ...] = ()
    num_cells: tuple[int, ...] = ()
    normalize: bool = False
    critic_keys: tuple[str, ...] = ("time_left",)

    @property
    def actor(self) -> dict[str, Any]:
        """Options of `RecurrentActor.from_env`, and of its subclasses'."""
        encoder = partial(MLPEncoder, num_cells=self.encoder_cells) if self.encoder_cells else None
        core = partial({"gru": GRUCore, "lstm": LSTMCore}[self.core], hidden_size=self.units)
        return {"normalize": self.normalize, "encoder": encoder, "core": core, "num_cells": self.num_cells}

    @property
    def critic(self) -> dict[str, Any]:
        """Options of `RecurrentCritic.from_env`, and of its subclasses': a critic with a core of its own."""
        return {**self.actor, "extra_keys": self.critic_keys}

    def value_head(self, *, detach: bool) -> dict[str, Any]:
        """Options of `MemoryValueHead.from_env`: a critic on the actor's memory."""
        own_layer = (self.units,) if detach else ()
        return {"detach": detach, "num_cells": self.num_cells or own_layer, "extra_keys": self.critic_keys}


@dataclass(frozen=True)
class FirstWeights:
    """What the core's weights are at first, as `orthogonal_init_` takes it.

    Args:
        memory_steps: steps over which the slowest units remember; None: all forget at once.
        input_gain: factor on the input weights.
        gate_gain: further factor on those of the update gates.
    """

    memory_steps: int | None = None
    input_gain: float = 1.0
    gate_gain: float = 1.0


@dataclass(frozen=True)
class Learning(Settings):
    """Batches, and PPO on them.

    Args:
        trials: trials in a batch, each on a task of its own.
        env_steps: env steps to train on, rounded up to whole batches.
        lr: learning rate, decayed to 0 over the training.
        gamma: discount per step.
        lmbda: GAE's lambda.
        epochs: passes over a batch.
        minibatches: minibatches a pass.
        max_grad_norm: clip the gradient's norm at this; None does not, which learns faster where the critic's gradient is by
            far the larger part of the norm.
        entropy: weight of the entropy bonus, decayed to 0 over the training.
        entropy_decay: how: linearly, or late, slowly at first and fast at the end (`late_decay`).
    """

    trials: int = 1024
    env_steps: int = 10_000_000
    lr: float = 3e-3
    gamma: float = 0.99
    lmbda: float = 0.9
    epochs: int = 4
    minibatches: int = 8
    max_grad_norm: float | None = None
    entropy: float = 0.02
    entropy_decay: Literal["linear", "late"] = "linear"

    @property
    def loss(self) -> dict[str, Any]:
        """Options of `RL2PPOLoss`."""
        return {"entropy_bonus": self.entropy > 0, "entropy_coeff": self.entropy}

    @property
    def advantage(self) -> dict[str, Any]:
        """Options of `TrialAdvantage`."""
        return {"gamma": self.gamma, "lmbda": self.lmbda, "value_target": "gae"}

    @property
    def update(self) -> dict[str, Any]:
        """Options of `PPOUpdate`."""
        passes = {"epochs": self.epochs, "minibatches": self.minibatches}
        decays = {"lr_schedule": linear_decay, "entropy_schedule": self.entropy_schedule if self.entropy > 0 else None}
        return {"lr": self.lr, "max_grad_norm": self.max_grad_norm, **passes, **decays}

    @property
    def entropy_schedule(self) -> Callable[[float], float]:
        """Factor on the weight of the entropy bonus, by progress."""
        return {"linear": linear_decay, "late": late_decay}[self.entropy_decay]


def late_decay(progress: float) -> float:
    """1 - p²: slow at first and fast at the end, so that exploring goes on for most of the training.

    Examples:
        >>> late_decay(0.5)
        0.75
    """
    return 1.0 - progress**2


@dataclass(frozen=True)
class Told:
    """What the training is told of the task beside rewards; the agent is told of none of it. See also `Network.critic_keys`.

    Args:
        regret: whether regrets, which the task tells without noise, stand for rewards in the advantages (`RegretAdvantage`).
        belief: weight of the loss by which the memory learns to tell the task (`TaskBelief`); 0: none.
        posterior: whether what a trial has shown of the task, exactly (`recipes.posterior`), stands for the task in that loss, and
            for rewards in the advantages. Bandits and tabular MDPs have it.
        seen: whether the memory learns to tell, with the weight ``belief``, the means of the rewards that the trial has paid, and
            optimism is a bonus on rewards for what it has seldom tried (`CountBonusAdvantage`). Of the task nothing is told.
        optimism: standard deviations of the posterior, or of those means, on top of them, for what trying an action is worth later.
        optimism_after: share of the training without optimism, which then rises over as long a share again; 0: it is there at once.

    Raises:
        ValueError: of regrets, posterior and what was seen more than one is to be learnt from, or there is optimism without the
            latter two.
    """

    regret: bool = False
    belief: float = 0.0
    posterior: bool = False
    seen: bool = False
    optimism: float = 0.0
    optimism_after: float = 0.0

    def __post_init__(self):
        if self.regret + self.posterior + self.seen > 1:
            raise ValueError(
                "of regret, posterior and seen one at most says what advantages are made of: leave the others out."
            )
        if self.optimism and not (self.posterior or self.seen):
            raise ValueError(
                f"optimism={self.optimism} is of standard deviations: without posterior=True or seen=True nothing has any."
            )

    def moments(self, of_prior: OfRewards) -> OfRewards:
        """Means and deviations of what was seen: those of the posterior ``of_prior``, or of samples alone."""
        return sample_moments if self.seen else of_prior

    def terms(
        self,
        units: int,
        size: int,
        target: Callable[[torch.Tensor], torch.Tensor] | None = None,
        posterior: Posterior | None = None,
    ) -> list[TaskBelief]:
        """Terms of the loss: from ``units`` features ``size`` numbers are told, the task's or ``target``'s, or ``posterior``'s."""
        if not self.belief:
            return []
        if self.posterior or self.seen:
            return [PosteriorBelief(units, posterior, coefficient=self.belief)]
        return [TaskBelief(units, size, coefficient=self.belief, target=target)]

    def advantage(
        self, action_values: Callable[[TensorDictBase], torch.Tensor], posterior: Posterior, **horizon: Any
    ) -> TrialAdvantage:
        """Advantages of rewards, or of what stands for them."""
        if self.posterior:
            return PosteriorAdvantage(posterior, **horizon)
        if self.seen:
            return CountBonusAdvantage(posterior, **horizon)
        return RegretAdvantage(action_values, **horizon) if self.regret else TrialAdvantage(**horizon)


def told_of(network: Network, told: Told) -> str:
    """What a title adds of what the training was told: nothing, where it learnt from rewards alone."""
    means = {"critic": "task" in network.critic_keys, "regrets": told.regret}
    means |= {"belief": told.belief > 0 and not told.seen, "posterior": told.posterior}
    used = [name for name, is_used in means.items() if is_used]
    return f" (task told in training: {', '.join(used)})" if used else " (rewards only)"


@dataclass(frozen=True)
class Run(Settings):
    """Seeds, where a run begins, which processes play, and what it leaves.

    Args:
        log_dir: folder of the run: report.json, report.png and other plots, agent.safetensors, scalars and checkpoints.
        seed: seed of networks, envs and tasks.
        seeds: of several runs side by side instead, each a program of its own in log_dir/seed0 and so on; their mean and its band
            are shown at the end. For the command line alone.
        workers: processes that play the trials that are trained on, in equal shares of a batch; 0: this one does. With backend ray
            0 stands for 2.
        backend: processes of this machine, or actors of a Ray cluster (extra ray): of the one that RAY_ADDRESS in the environment
            names, or of a new one here.
        report_tasks: held-out tasks in the final report.
        held_out_seed: seed of the tasks of evaluations and report, for runs to share them; the run's own by default.
        initial_weights: file of an agent to start from, such as one for shorter trials.
        weights: file of an agent, as a run leaves it in agent.safetensors: to evaluate in place of training, with the network
            that it has. Needs a log_dir without a training's report.
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
        object.__setattr__(self, "log_dir", Path(self.log_dir))  # text names a folder as well

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


def settings_by(rule: Callable[..., dict[str, Any]]) -> Callable[[Callable], Callable]:
    """Decorates a recipe's ``main``: the settings that a caller leaves out are those that ``rule`` gives for what was asked.

    ``rule(**asked)`` has some of ``main``'s arguments, all with defaults, and returns settings for others.
    """

    def decorate(main: Callable) -> Callable:
        @wraps(main)
        def with_settings(**given: Any) -> Any:
            require_choices(main, given)
            return main(**{**rule(**_asked(rule, given)), **given})

        with_settings.rule = rule
        return with_settings

    return decorate


def _asked(rule: Callable, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments ``given`` that ``rule`` takes."""
    return {name: given[name] for name in inspect.signature(rule).parameters if name in given}


def arguments(main: Callable, options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a recipe's ``main`` from flat ``options``, as its command line takes them: ``units=8`` goes to its network.

    Raises:
        TypeError: ``main`` has no such option.
    """
    filled, unknown = {}, dict(options)
    rule = getattr(main, "rule", None)
    by_rule = rule(**_asked(rule, options)) if rule else {}
    for name, parameter in inspect.signature(main).parameters.items():
        default = by_rule.get(name, parameter.default)
        if is_dataclass(default):
            names = [each.name for each in fields(default) if each.name in unknown]
            filled[name] = replace(default, **{key: unknown.pop(key) for key in names})
        elif name in unknown or name in by_rule:
            filled[name] = unknown.pop(name, default)
    if unknown:
        raise TypeError(f"{main.__module__} has no options {sorted(unknown)}; see its --help.")
    return filled


def command(main: Callable) -> Any:
    """Runs a recipe's ``main`` as a command, once or for each of its ``--seeds``.

    This package's INFO lines are shown, TorchRL's are not. Where its settings follow from a rule, they are those for the
    arguments on the command line, and ``--help`` shows them: all on one screen, ``--help-all`` each with what it is.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("rl2_torchrl").setLevel(logging.INFO)
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    rule, main = getattr(main, "rule", None), inspect.unwrap(main)

    @wraps(main)
    def once_or_for_each_seed(*, run: Run, **others: Any) -> Any:
        if run.seeds:
            return run_seeds(program(), run.seeds, run.log_dir, sys.argv[1:])
        return main(run=run, **others)

    words = ["--help" if word == "--help-all" else word for word in sys.argv[1:]]
    asked = {} if rule is None else typed(rule, words)
    settings = {} if rule is None else rule(**asked)
    if {"-h", "--help"}.intersection(sys.argv[1:]):
        Console(highlight=False).print(overview(main, {**asked, **settings}), markup=False, soft_wrap=True)
        sys.exit()
    with_settings = partial(once_or_for_each_seed, **settings)
    return tyro.cli(with_settings, prog=as_typed(), args=words, config=(tyro.conf.OmitArgPrefixes,))


def typed(rule: Callable, words: Sequence[str]) -> dict[str, Any]:
    """The arguments of ``rule`` that stand among the ``words`` of a command line; what is wrong there is left to its parser."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, argument_default=SUPPRESS)
    for name, parameter in inspect.signature(rule).parameters.items():
        parser.add_argument(*dict.fromkeys([f"--{name.replace('_', '-')}", f"--{name}"]), type=type(parameter.default))
    return vars(parser.parse_known_args(words)[0])


# -------------------------------------------------------------- random numbers
def stream_seed(seed: int, stream: int) -> int:
    """A seed for each purpose, so that no two draw the same numbers."""
    return 1000 * seed + stream


def draw_tasks(distribution: TaskDistribution, seed: int, stream: int, number: int) -> torch.Tensor:
    """``number`` tasks of a ``stream``, [number, task_size]; fewer are the first of more."""
    return distribution(torch.Size([number]), torch.Generator().manual_seed(stream_seed(seed, stream)))


def whole_batches(env_steps: int, batch: int) -> int:
    """``env_steps`` rounded up to whole batches of ``batch`` steps."""
    return -(-env_steps // batch) * batch


# ----------------------------------------------------------------- experiment
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
        ValueError: fewer than two tasks to report on, several seeds, which only the command line runs, or weights that would be
            played in the folder of a training.
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
        if run.report_tasks < 2:
            raise ValueError(f"report_tasks={run.report_tasks}: rewards can only be shuffled among at least 2 tasks.")
        if run.weights is not None and trained_in(run.log_dir):
            raise ValueError(
                f"log_dir={str(run.log_dir)!r} holds the report of a training, which that of weights={str(run.weights)!r} would "
                "replace: name another folder, such as --log-dir runs/played."
            )
        if run.seeds:
            raise ValueError(f"seeds={run.seeds}: one call is one run; call main for each, with a log_dir of its own.")
        self.actor, self.make_env, self.distribution, self.run = actor, make_env, distribution, run
        self.held_out_tasks, self.rows, self.episode_name, self.measures = held_out_tasks, rows, episode_name, measures

    def train(self, collector: TrialCollector | TrialWorkers, update: PPOUpdate, **options: Any) -> TrainResult:
        """Trains the actor and saves its agent, or loads the weights that the run names; ``options`` go to `train`."""
        run = self.run
        if run.weights is not None:
            load_weights(self.actor, run.weights)
            return TrainResult()
        if run.initial_weights is not None:
            load_weights(self.actor, run.initial_weights)
        self._agent(collector)  # what no agent can be made of is noticed before the training
        folder = RunFolder(run, about(collector, update))
        result = train(
            collector,
            update,
            **{"evaluate": self.evaluate, **options, "callbacks": [*options.get("callbacks", ()), folder]},
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

    def tasks(self, stream: int, number: int) -> torch.Tensor:
        """``number`` held-out tasks, [number, task_size]."""
        run = self.run
        seed = run.seed if run.held_out_seed is None else run.held_out_seed
        return draw_tasks(self.distribution, seed, stream, number)

    def play(self, tasks: torch.Tensor, **how: Any) -> AdaptationCurve:
        """One trial on each of ``tasks`` [num_tasks, task_size]; ``how`` goes to `adaptation_curve`."""
        rounds = math.ceil(len(tasks) / (self.rows or len(tasks)))
        env = self.make_env(
            TaskSampler.fixed(tasks), math.ceil(len(tasks) / rounds)
        )  # rows that have a task in each round
        with closing(env):  # it may have processes
            return adaptation_curve(env, self.actor, len(tasks), measures=self.measures, **how)

    def evaluate(self) -> dict[str, float]:
        """What `train` logs of held-out trials."""
        curve = self.play(self.tasks(HELD_OUT_TASKS, self.held_out_tasks))
        first, last = curve.per_episode[[0, -1]].tolist()
        figures = {"trial_return": curve.mean, f"first_{self.episode_name}": first, f"last_{self.episode_name}": last}
        for name in curve.shown:
            measured = curve.shown_as(name)
            figures |= {
                f"first_{name}": measured.per_episode[0].item(),
                f"last_{name}": measured.per_episode[-1].item(),
            }
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


class RunFolder(Callback):
    """Says in a run's folder what it is, once it has begun, and puts away what an earlier run has left there, unless it goes on."""

    def __init__(self, run: Run, about: str):
        self._folder, self._resume, self._about, self._begun = run.log_dir, run.resume, about, False

    def after_batch(self, batch: TensorDictBase, progress: float) -> None:
        """Before the first update; a training that is refused changes nothing."""
        if not self._begun:
            if not self._resume and files_of_a_run(self._folder):
                self._put_away()
            (self._folder / "about.txt").write_text(self._about)
        self._begun = True

    def _put_away(self) -> None:
        (earlier := self._folder / "earlier").mkdir(exist_ok=True)
        for path in files_of_a_run(earlier):
            path.unlink()  # and nothing else that somebody keeps there
        for path in files_of_a_run(self._folder):
            path.replace(earlier / path.name)
        log.warning("%s held an earlier run (without --resume): its report and agent are in %s.", self._folder, earlier)


def files_of_a_run(folder: Path) -> list[Path]:
    """What a run leaves directly in its ``folder``."""
    return [path for name in ("about.txt", "agent.safetensors", "report.json", "*.png") for path in folder.glob(name)]


def trained_in(folder: Path) -> bool:
    """Whether the ``folder`` holds the report of a training."""
    report = folder / "report.json"
    return report.is_file() and bool(json.loads(report.read_text())["train"]["history"])


def about(collector: TrialCollector, update: PPOUpdate) -> str:
    """What a run is: its command, versions, all parts with their settings, and its files."""
    made, parts = made_by(), describe(collector, update)
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    return f"{made['command']}\ncommit {made['commit']}; {versions}\n\n{parts}\n\n{_FILES}"


#: What stands in a run's folder.
_FILES = """\
report.json        all figures, with the scalars of each update
report.png         how it learnt, and how it adapts within a trial
agent.safetensors  the agent: rl2_torchrl.AdaptiveAgent.load("agent.safetensors")
scalars            what it logged as it learnt (wandb, with --logger wandb)
checkpoints        where --resume goes on
"""


def publish(report: AdaptationReport, run: Run) -> AdaptationReport:
    """Writes the report into the run's folder, shows its table, and returns it."""
    path, console = report.save(run.log_dir), Console()
    console.print(report.table())
    trained = f"{report.train.env_steps:,} steps in {report.train.seconds:.0f} s"
    console.print(f"{trained}; report and plots: {path.parent}")
    for env_steps, reason in report.train.new_trials:
        console.print(f"resumed at {env_steps:,} steps with new trials: {reason}")
    return report
