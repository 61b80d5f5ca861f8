"""RL² on HalfCheetah: a Gaussian GRU policy finds out, within a trial, which way or how fast it shall run."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torchrl.envs import Compose, TransformedEnv

from recipes import experiment
from recipes.experiment import HELD_OUT_TASKS, REPORT_TASKS, TRAIN_TASKS, Experiment, Run, stream_seed, whole_batches
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
    TrialWorkers,
    linear_decay,
)
from rl2_torchrl.envs import HalfCheetahDirection, HalfCheetahVelocity, signs, velocities
from rl2_torchrl.video import record_trial, video_suffix

#: Streams of random numbers beside those of tasks: where episodes begin. (Nothing is tuned here.)
TRAIN_STARTS, HELD_OUT_STARTS = 3, 4
#: The original's goals, for the last episode of held-out trials: return in the worse direction, sum of |v - goal|.
STOP_RETURN, STOP_ERROR, STOP_EVALUATIONS = 180.0, 25.0, 3
RUN = Run(Path("runs/half_cheetah"), report_tasks=200)


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
        scale_rewards: let the critic learn numbers around 1, see `TrialAdvantage`. In units of return, of hundreds here, its
            gradient is nearly all of the norm that ``max_grad_norm`` clips, and the actor's is shrunk by chance.
        entropy: weight of the entropy bonus. Without it both directions share a spread that the first one learnt makes narrow.
        critic_keys: what the critic sees beside the actor's input.
        decay: let the learning rate and the entropy bonus fall to 0 over the training.
        shuffle: draw chunks in random order.
    """

    trials: int
    episodes: int
    env_steps: int
    horizon: int = 200
    units: int = 64
    lr: float = 2e-3
    gamma: float = 0.97
    lmbda: float = 0.9
    clip_epsilon: float = 0.2
    epochs: int = 4
    minibatch_steps: int = 3200
    max_grad_norm: float | None = 0.5
    bptt: int | None = None
    value_target: Literal["gae", "return"] = "gae"
    scale_rewards: bool = True
    entropy: float = 0.01
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
    "scale_rewards": False,
    "entropy": 0.0,
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


@dataclass(frozen=True)
class Changes:
    """What is changed in a mode; None leaves it.

    Args:
        env_steps: env steps to train on, rounded up to whole batches.
        trials: trials in a batch.
        units: GRU units.
        horizon: steps of an episode.
        lr: learning rate at first.
    """

    env_steps: int | None = None
    trials: int | None = None
    units: int | None = None
    horizon: int | None = None
    lr: float | None = None


NO_CHANGES = Changes()


def main(
    *,
    task: Literal["direction", "velocity"] = "direction",
    mode: Literal["trial", "original"] = "trial",
    max_velocity: float = 2.0,
    changes: Changes = NO_CHANGES,
    stop_at_goal: bool = False,
    video: bool = False,
    run: Run = RUN,
) -> CheetahReport:
    """Trains RL² on HalfCheetah with a goal that only its rewards tell of, and reports how it adapts to held-out goals.

    Args:
        task: run forward or backward, or at a velocity.
        mode: "trial", whole trials through time and our best settings, or "original", the first implementation's.
        max_velocity: velocities are drawn from U[0, max_velocity] m/s: 2 in the original, 3 in later work.
        changes: in place of the mode's.
        stop_at_goal: stop once the original's goal has held in three evaluations in a row: in the last episode of
            held-out trials a mean return of 180 in the worse direction, or a mean sum of |velocity - goal| of 25.
        video: film a held-out trial before and after the training: untrained.mp4 and trial.mp4, or .gif without ffmpeg
            (extra video). Without a display set MUJOCO_GL=egl.
        run: seeds, where the run begins, which processes play, and what it leaves, velocity.png among it.
    """
    torch.manual_seed(run.seed)
    torch.set_flush_denormal(True)
    own = {key: value for key, value in asdict(changes).items() if value is not None}
    settings = replace(MODES[mode, task], **own)
    trials = CheetahTrials(task, settings.episodes, settings.horizon, max_velocity, run.seed)
    collector, update = compose(trials, settings, run)
    cheetahs = Cheetahs(update.loss.actor_network, trials, run)
    if video:  # before the training, so that what is missing is missed now
        cheetahs.film(run.log_dir / "untrained")
    result = cheetahs.train(
        collector,
        update,
        eval_interval=max(1, 1_000_000 // settings.batch_steps),
        stop=StopAtGoal(task) if stop_at_goal else None,
    )
    report = experiment.publish(cheetahs.report(result), run)
    if video:
        cheetahs.film(run.log_dir / "trial")
    return report


def compose(trials: "CheetahTrials", settings: Mode, run: Run = RUN) -> tuple[TrialCollector | TrialWorkers, PPOUpdate]:
    """Collector and update, of the parts that any recipe is made of."""
    sampler = TaskSampler(trials.distribution, seed=stream_seed(trials.seed, TRAIN_TASKS))
    env = trials.env(sampler, settings.trials, TRAIN_STARTS)
    actor = GRUGaussianActor.from_env(env, hidden_size=settings.units)
    critic = GRUValueHead.from_env(env, hidden_size=settings.units, extra_keys=list(settings.critic_keys))
    chunk = settings.bptt or settings.trial_steps
    bonus = {"entropy_bonus": settings.entropy > 0, "entropy_coeff": settings.entropy}
    horizon = {"gamma": settings.gamma, "lmbda": settings.lmbda, "value_target": settings.value_target}
    update = PPOUpdate(
        RL2PPOLoss(actor, critic, clip_epsilon=settings.clip_epsilon, **bonus),
        TrialAdvantage(**horizon, scale_rewards=settings.scale_rewards),
        bptt=settings.bptt,
        epochs=settings.epochs,
        minibatches=max(1, settings.batch_steps // max(settings.minibatch_steps, chunk)),
        shuffle=settings.shuffle,
        lr=settings.lr,
        max_grad_norm=settings.max_grad_norm,
        lr_schedule=linear_decay if settings.decay else None,
        entropy_schedule=linear_decay if settings.decay and settings.entropy > 0 else None,
    )
    batch = settings.batch_steps
    frames = {"frames_per_batch": batch, "total_frames": whole_batches(settings.env_steps, batch)}
    make_env = partial(trials.env, starts=TRAIN_STARTS)
    return run.collector(make_env, env, ActorCritic(actor, critic), update, **frames), update


@dataclass(frozen=True)
class CheetahTrials:
    """What cheetahs run: tasks of one kind, and trials of ``episodes`` episodes on them."""

    task: Literal["direction", "velocity"]
    episodes: int
    horizon: int
    max_velocity: float
    seed: int

    @property
    def distribution(self) -> Callable:
        """Where tasks come from."""
        return signs() if self.task == "direction" else velocities(0.0, self.max_velocity)

    def env(self, sampler: TaskSampler, rows: int, starts: int = HELD_OUT_STARTS) -> TransformedEnv:
        """``rows`` cheetahs side by side, each on a task of its own; the stream ``starts`` says where episodes begin."""
        env_class = HalfCheetahDirection if self.task == "direction" else HalfCheetahVelocity
        cheetahs = env_class(batch_size=(rows,), horizon=self.horizon, seed=stream_seed(self.seed, starts))
        trial = Trial(episodes=self.episodes, step_keys=["velocity"])
        # Without "velocity", so that the agent sees what the original's did; it can tell its speed from the observation.
        transforms = Compose(trial, sampler, PreviousStep(["observation"]))
        return TransformedEnv(cheetahs, transforms)


class Cheetahs(Experiment):
    """An `Experiment` that looks at velocities beside returns, and films."""

    def __init__(self, actor: GRUGaussianActor, trials: CheetahTrials, run: Run):
        super().__init__(actor, trials.env, trials.distribution, run, held_out_tasks=64, rows=None)
        self.trials = trials

    def film(self, path: Path) -> Path:
        """Writes a video of one trial on the report's first task; random numbers elsewhere stay what they are without it."""
        env = self.make_env(TaskSampler.fixed(self.tasks(REPORT_TASKS, 1)), 1)
        with torch.random.fork_rng():
            torch.manual_seed(self.run.seed)
            return record_trial(env, self.actor, path.with_suffix(video_suffix()))

    def evaluate(self) -> dict[str, float]:
        """Returns of first and last episode, and how near the last one came to the task."""
        tasks, record = self.tasks(HELD_OUT_TASKS, self.held_out_tasks), VelocityRecord()
        curve = self.play(tasks, on_step=record)
        scalars = {"trial_return": curve.mean, "first_episode": curve.per_episode[0].item()}
        last = curve.returns[:, -1]
        scalars["last_episode"] = last.mean().item()
        if self.trials.task == "velocity":
            return scalars | {"last_speed_error": record.errors(self.trials.episodes).per_episode[-1].item()}
        forward, backward = last[tasks[:, 0] > 0].mean(), last[tasks[:, 0] < 0].mean()
        return scalars | {"last_forward": forward.item(), "last_backward": backward.item()}

    def report(self, result: TrainResult) -> CheetahReport:
        """The agent, without its memory and without its rewards, all on the tasks ``reported``."""
        ways = self.ways()
        records = {name: VelocityRecord() for name in ways}
        curves = {name: self.play(self.reported, on_step=records[name], **how) for name, how in ways.items()}
        return CheetahReport(
            agent=curves.pop("agent"),
            greedy=curves.pop("greedy"),
            ablations=curves,
            train=result,
            seed=self.run.seed,
            title=f"RL² on HalfCheetah, {self.trials.task}",
            horizon=self.trials.horizon,
            tasks=self.reported.squeeze(-1),
            velocities=records["agent"].velocities,
            speed_errors={name: record.errors(self.trials.episodes) for name, record in records.items()},
            is_speed=self.trials.task == "velocity",
        )


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


if __name__ == "__main__":
    experiment.command(main)
