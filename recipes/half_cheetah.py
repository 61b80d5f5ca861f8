"""RL² on HalfCheetah: a Gaussian GRU policy finds out, within a trial, which way or how fast it shall run."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from torchrl.envs import Compose, TransformedEnv
from torchrl.record.loggers import get_logger

from recipes.half_cheetah_report import CheetahReport, VelocityRecord
from rl2_torchrl import (
    ActorCritic,
    GRUGaussianActor,
    GRUValueHead,
    PPOUpdate,
    PreviousStep,
    RL2PPOLoss,
    TaskSampler,
    TrainResult,
    Trial,
    TrialAdvantage,
    TrialCollector,
    adaptation_curve,
    linear_decay,
    train,
)
from rl2_torchrl.envs import HalfCheetahDirection, HalfCheetahVelocity, signs, velocities
from rl2_torchrl.evaluation import AdaptationCurve, with_shuffled_rewards, with_zeroed_memory
from rl2_torchrl.video import record_trial, video_suffix

# Streams of random numbers that never meet.
TRAIN_TASKS, HELD_OUT_TASKS, REPORT_TASKS, TRAIN_STARTS, HELD_OUT_STARTS = range(5)
#: The original's goals, for the last episode of held-out trials: return in the worse direction, sum of |v - goal|.
STOP_RETURN, STOP_ERROR, STOP_EVALUATIONS = 180.0, 25.0, 3


@dataclass(frozen=True)
class Mode:
    """A way to train: sizes of a batch and of the networks, and how they are updated.

    Args:
        trials: trials in a batch, each on a task of its own.
        episodes: episodes of a trial.
        env_steps: env steps to train on.
        horizon: steps of an episode.
        units: GRU units, in actor and critic each.
        lr: learning rate.
        gamma: discount per step.
        lmbda: GAE's lambda.
        clip_epsilon: PPO's clipping.
        epochs: passes over a batch.
        minibatch_steps: env steps of a minibatch.
        max_grad_norm: clip the gradient's norm at this; None does not.
        bptt: steps of a chunk that gradients flow through; None takes the whole trial.
        value_target: what the critic learns, see `TrialAdvantage`.
        critic_keys: what the critic sees beside the actor's input.
        decay: let the learning rate fall to 0 over the training.
        shuffle: draw chunks in random order.
    """

    trials: int
    episodes: int
    env_steps: int
    horizon: int = 200
    units: int = 64
    lr: float = 3e-3
    gamma: float = 0.97
    lmbda: float = 0.9
    clip_epsilon: float = 0.2
    epochs: int = 4
    minibatch_steps: int = 3200
    max_grad_norm: float | None = 0.5
    bptt: int | None = None
    value_target: Literal["gae", "return"] = "gae"
    critic_keys: tuple[str, ...] = ("time_left", "task")
    decay: bool = True
    shuffle: bool = True

    @property
    def trial_steps(self) -> int:
        """Env steps of a trial."""
        return self.episodes * self.horizon

    @property
    def batch_steps(self) -> int:
        """Env steps of a batch."""
        return self.trials * self.trial_steps


#: The original (Duan et al. 2016 as first written for these envs): no gradient through time, chunks in order.
_ORIGINAL = {
    "lr": 1e-4,
    "gamma": 0.99,
    "lmbda": 0.97,
    "clip_epsilon": 0.3,
    "epochs": 10,
    "minibatch_steps": 32,
    "max_grad_norm": None,
    "bptt": 1,
    "value_target": "return",
    "critic_keys": (),
    "decay": False,
    "shuffle": False,
}
MODES = {
    ("trial", "direction"): Mode(trials=64, episodes=2, env_steps=8_000_000),
    ("trial", "velocity"): Mode(trials=64, episodes=2, env_steps=30_000_000),
    ("original", "direction"): Mode(trials=4, episodes=4, env_steps=4_000_000, **_ORIGINAL),
    ("original", "velocity"): Mode(trials=10, episodes=6, env_steps=4_000_000, **_ORIGINAL),
}


def main(
    *,
    task: Literal["direction", "velocity"] = "direction",
    mode: Literal["trial", "original"] = "trial",
    max_velocity: float = 2.0,
    env_steps: int | None = None,
    trials: int | None = None,
    units: int | None = None,
    horizon: int | None = None,
    stop_at_goal: bool = False,
    seed: int = 0,
    report_tasks: int = 200,
    logger: Literal["csv", "tensorboard", "wandb"] = "csv",
    log_dir: Path = Path("runs/half_cheetah"),
    resume: bool = False,
    video: bool = False,
    progress: bool = True,
) -> CheetahReport:
    """Trains RL² on HalfCheetah with a goal that only its rewards tell of, and reports how it adapts to held-out goals.

    Args:
        task: run forward or backward, or at a velocity.
        mode: "trial", whole trials through time and our best settings, or "original", the first implementation's.
        max_velocity: velocities are drawn from U[0, max_velocity] m/s: 2 in the original, 3 in later work.
        env_steps: env steps to train on, in place of the mode's; rounded up to whole batches.
        trials: trials in a batch, in place of the mode's.
        units: GRU units, in place of the mode's.
        horizon: steps of an episode, in place of the mode's 200.
        stop_at_goal: stop once the original's goal has held in three evaluations in a row: in the last episode of
            held-out trials a mean return of 180 in the worse direction, or a mean sum of |velocity - goal| of 25.
        seed: seed of networks, envs and tasks.
        report_tasks: held-out tasks in the final report.
        logger: where scalars go; tensorboard and wandb are extras of the package.
        log_dir: folder of the run: report.json, report.png, velocity.png, scalars and checkpoints.
        resume: go on from the newest checkpoint in log_dir.
        video: film a held-out trial before and after the training: untrained.mp4 and trial.mp4, or .gif without ffmpeg
            (extra video). Without a display set MUJOCO_GL=egl.
        progress: show a progress bar.
    """
    if report_tasks < 2:
        raise ValueError(f"report_tasks={report_tasks}: rewards can only be shuffled among at least 2 tasks.")
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)
    own = {"env_steps": env_steps, "trials": trials, "units": units, "horizon": horizon}
    settings = replace(MODES[mode, task], **{key: value for key, value in own.items() if value is not None})
    game = Game(task, settings.episodes, settings.horizon, max_velocity, seed)
    collector, update = compose(game, settings)
    actor = update.loss.actor_network
    if video:  # before the training, so that what is missing is missed now
        game.film(actor, log_dir / "untrained")
    result = train(
        collector,
        update,
        evaluate=lambda: game.scalars(actor, game.tasks(HELD_OUT_TASKS, 64)),
        eval_interval=max(1, 1_000_000 // settings.batch_steps),
        logger=get_logger(logger, str(log_dir), "scalars"),
        checkpoints=log_dir / "checkpoints",
        resume=resume,
        stop=StopAtGoal(task) if stop_at_goal else None,
        progress=progress,
    )
    report = make_report(game, actor, game.tasks(REPORT_TASKS, report_tasks), result)
    path = report.save(log_dir)
    if video:
        game.film(actor, log_dir / "trial")
    console = Console()
    console.print(report.table())
    console.print(f"{result.env_steps:,} steps in {result.seconds:.0f} s; report and plots: {path.parent}")
    return report


def compose(game: "Game", settings: Mode) -> tuple[TrialCollector, PPOUpdate]:
    """Collector and update, of the parts that any recipe is made of."""
    sampler = TaskSampler(game.distribution, seed=game.stream(TRAIN_TASKS))
    env = game.env(sampler, settings.trials, TRAIN_STARTS)
    actor = GRUGaussianActor.from_env(env, hidden_size=settings.units)
    critic = GRUValueHead.from_env(env, hidden_size=settings.units, extra_keys=list(settings.critic_keys))
    chunk = settings.bptt or settings.trial_steps
    update = PPOUpdate(
        RL2PPOLoss(actor, critic, clip_epsilon=settings.clip_epsilon),
        TrialAdvantage(gamma=settings.gamma, lmbda=settings.lmbda, value_target=settings.value_target),
        bptt=settings.bptt,
        epochs=settings.epochs,
        minibatches=max(1, settings.batch_steps // max(settings.minibatch_steps, chunk)),
        shuffle=settings.shuffle,
        lr=settings.lr,
        max_grad_norm=settings.max_grad_norm,
        lr_schedule=linear_decay if settings.decay else None,
    )
    total = math.ceil(settings.env_steps / settings.batch_steps) * settings.batch_steps
    policy, steps = ActorCritic(actor, critic), settings.batch_steps
    return TrialCollector(env, policy, frames_per_batch=steps, total_frames=total, keep=update.in_keys), update


@dataclass(frozen=True)
class Game:
    """What is played: the tasks, and trials of ``episodes`` episodes on them."""

    task: Literal["direction", "velocity"]
    episodes: int
    horizon: int
    max_velocity: float
    seed: int

    @property
    def distribution(self) -> Callable:
        """Where tasks come from."""
        return signs() if self.task == "direction" else velocities(0.0, self.max_velocity)

    def env(self, sampler: TaskSampler, rows: int, starts: int) -> TransformedEnv:
        """``rows`` cheetahs side by side, each on a task of its own; the stream ``starts`` says where episodes begin."""
        env_class = HalfCheetahDirection if self.task == "direction" else HalfCheetahVelocity
        cheetahs = env_class(batch_size=(rows,), horizon=self.horizon, seed=self.stream(starts))
        trial = Trial(episodes=self.episodes, step_keys=["velocity"])
        # Without "velocity", so that the agent sees what the original's did; it can tell its speed from the observation.
        transforms = Compose(trial, sampler, PreviousStep(["observation"]))
        return TransformedEnv(cheetahs, transforms)

    def tasks(self, kind: int, number: int) -> torch.Tensor:
        """``number`` tasks from the stream ``kind``, [number, 1]."""
        return self.distribution(torch.Size([number]), torch.Generator().manual_seed(self.stream(kind)))

    def stream(self, kind: int) -> int:
        """A seed for each purpose, so that no two draw the same numbers."""
        return 1000 * self.seed + kind

    def play(self, actor: GRUGaussianActor, tasks: torch.Tensor, **how) -> AdaptationCurve:
        """One trial on each of ``tasks`` [num_tasks, 1]; ``how`` goes to `adaptation_curve`."""
        env = self.env(TaskSampler.fixed(tasks), len(tasks), HELD_OUT_STARTS)
        return adaptation_curve(env, actor, len(tasks), **how)

    def film(self, actor: GRUGaussianActor, path: Path) -> Path:
        """Writes a video of one trial on the report's first task; random numbers elsewhere stay what they are without it."""
        env = self.env(TaskSampler.fixed(self.tasks(REPORT_TASKS, 1)), 1, HELD_OUT_STARTS)
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return record_trial(env, actor, path.with_suffix(video_suffix()))

    def scalars(self, actor: GRUGaussianActor, tasks: torch.Tensor) -> dict[str, float]:
        """What a held-out evaluation logs: returns of first and last episode, and how near the last one came to the task."""
        record = VelocityRecord()
        curve = self.play(actor, tasks, on_step=record)
        scalars = {"trial_return": curve.mean, "first_episode": curve.per_episode[0].item()}
        last = curve.returns[:, -1]
        scalars["last_episode"] = last.mean().item()
        if self.task == "velocity":
            return scalars | {"last_speed_error": record.errors(self.episodes).per_episode[-1].item()}
        forward, backward = last[tasks[:, 0] > 0].mean(), last[tasks[:, 0] < 0].mean()
        return scalars | {"last_forward": forward.item(), "last_backward": backward.item()}


class StopAtGoal:
    """The original's stop goals, for `train(stop=)`: true once one has held in `STOP_EVALUATIONS` evaluations in a row."""

    def __init__(self, task: Literal["direction", "velocity"]):
        self._task = task
        self._held = 0

    def __call__(self, row: dict[str, float]) -> bool:
        """Looks at one update's scalars; those without an evaluation change nothing."""
        if "eval/trial_return" in row:
            self._held = self._held + 1 if self._reached(row) else 0
        return self._held >= STOP_EVALUATIONS

    def _reached(self, row: dict[str, float]) -> bool:
        if self._task == "velocity":
            return row["eval/last_speed_error"] <= STOP_ERROR
        return min(row["eval/last_forward"], row["eval/last_backward"]) >= STOP_RETURN


# ------------------------------------------------------------------- report
def make_report(game: Game, actor: GRUGaussianActor, tasks: torch.Tensor, result: TrainResult) -> CheetahReport:
    """The agent, without its memory and without its rewards, all on ``tasks`` [num_tasks, 1]."""
    ablations = {"memory_zeroed": with_zeroed_memory(actor), "rewards_shuffled": with_shuffled_rewards()}
    records = {name: VelocityRecord() for name in ("agent", "greedy", *ablations)}
    return CheetahReport(
        agent=game.play(actor, tasks, on_step=records["agent"]),
        greedy=game.play(actor, tasks, deterministic=True, on_step=records["greedy"]),
        ablations={
            name: game.play(actor, tasks, ablation=ablation, on_step=records[name])
            for name, ablation in ablations.items()
        },
        train=result,
        seed=game.seed,
        title=f"RL² on HalfCheetah, {game.task}",
        horizon=game.horizon,
        tasks=tasks.squeeze(-1),
        velocities=records["agent"].velocities,
        speed_errors={name: record.errors(game.episodes) for name, record in records.items()},
        is_speed=game.task == "velocity",
    )


if __name__ == "__main__":
    tyro.cli(main)
