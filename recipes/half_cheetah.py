"""RL² on HalfCheetah: a Gaussian GRU policy finds out, within a trial, which way or how fast it shall run."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from torchrl.envs import Compose, TransformedEnv

from recipes.command import command, settings_by
from recipes.experiment import Experiment, publish
from recipes.half_cheetah_report import CheetahReport, VelocityRecord
from recipes.presets import PRESETS
from recipes.run import Run
from recipes.settings import Learning, Network, Told, told_of
from recipes.streams import HELD_OUT_TASKS, REPORT_TASKS, TRAIN_TASKS, stream_seed
from rl2_torchrl import (
    ActorCritic,
    Callback,
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
)
from rl2_torchrl.envs import HalfCheetahDirection, HalfCheetahVelocity, signs, velocities
from rl2_torchrl.video import record_trial, video_suffix

#: Streams of random numbers beside those of tasks: where episodes begin. (Nothing is tuned here.)
TRAIN_STARTS, HELD_OUT_STARTS = 3, 4
MAX_VELOCITY = 2.0  # m/s
#: The original's goals, for the last episode of held-out trials: return in the worse direction, sum of |v - goal|.
STOP_RETURN, STOP_ERROR, STOP_EVALUATIONS = 180.0, 25.0, 3
RUN = Run(Path("runs/half_cheetah"), report_tasks=200)

#: Options of loss, advantages and update that a mode says beside its settings.
MODES: dict[str, dict[str, dict[str, Any]]] = {
    # In units of return, of hundreds here, the critic's gradient is nearly all of the norm that is clipped, and the actor's is
    # shrunk by chance: rewards are scaled.
    "trial": {"loss": {"clip_epsilon": 0.2}, "advantage": {"scale_rewards": True}, "update": {}},
    # No gradient through time, chunks in order, a constant learning rate.
    "original": {
        "loss": {"clip_epsilon": 0.3},
        "advantage": {"value_target": "return"},
        "update": {"bptt": 1, "shuffle": False, "lr_schedule": None},
    },
}


def cheetah_settings(
    task: str = "direction", mode: str = "trial", trials: int = 0, episodes: int = 0, horizon: int = 200
) -> dict[str, Any]:
    """Episodes of a trial, network and learning of a mode: our best settings, or those of RL² as first written for these envs.

    Of ``trials`` and ``episodes`` 0 stands for the mode's own; the original's minibatches are of 32 steps.

    Examples:
        >>> settings = cheetah_settings("velocity", mode="original")
        >>> settings["episodes"], settings["learning"].trials, settings["learning"].minibatches
        (6, 10, 375)
        >>> cheetah_settings("velocity", mode="original", trials=4)["learning"].minibatches
        150
    """
    if mode != "original":
        preset = PRESETS[f"HalfCheetah {'velocity' if task == 'velocity' else 'direction'}"]
        return {"episodes": episodes or 2, "network": preset.network, "learning": preset.learning}
    own_trials, own_episodes = (10, 6) if task == "velocity" else (4, 4)
    trials, episodes = max(trials, 0) or own_trials, episodes or own_episodes
    minibatches = max(1, trials * episodes * horizon // 32)
    learning = Learning(
        trials=trials,
        env_steps=4_000_000,
        lr=1e-4,
        gamma=0.99,
        lmbda=0.97,
        epochs=10,
        minibatches=minibatches,
        entropy=0.0,
    )
    return {"episodes": episodes, "network": Network(critic_keys=()), "learning": learning}


@settings_by(cheetah_settings)
def main(
    *,
    task: Literal["direction", "velocity"] = "direction",
    mode: Literal["trial", "original"] = "trial",
    episodes: int,
    horizon: int = 200,
    max_velocity: float = MAX_VELOCITY,
    network: Network,
    learning: Learning,
    stop_at_goal: bool = False,
    video: bool = False,
    run: Run = RUN,
) -> CheetahReport:
    """Trains RL² on HalfCheetah with a goal that only its rewards tell of, and reports how it adapts to held-out goals.

    Args:
        task: run forward or backward, or at a velocity.
        mode: "trial", whole trials through time and our best settings, or "original", the first implementation's, with a constant
            learning rate; settings that are left out follow from it.
        episodes: episodes of a trial.
        horizon: steps of an episode.
        max_velocity: velocities are drawn from U[0, max_velocity] m/s: 2 in the original, 3 in later work. Directions have none.
        network: actor and critic.
        learning: batches, and PPO on them.
        stop_at_goal: stop once the original's goal has held in three evaluations in a row: in the last episode of
            held-out trials a mean return of 180 in the worse direction, or a mean sum of |velocity - goal| of 25.
        video: film a held-out trial before and after the training: untrained.mp4, of what it begins with, and trial.mp4, or .gif
            without ffmpeg (extra video). Without a display set MUJOCO_GL=egl.
        run: seeds, where the run begins, which processes play, and what it leaves, velocity.png among it.
    """
    torch.manual_seed(run.seed)
    torch.set_flush_denormal(True)
    trials = CheetahTrials(task, episodes, horizon, max_velocity, run.seed)
    collector, update = compose(trials, mode, network, learning, run)
    cheetahs = Cheetahs(update.loss.actor_network, trials, run)
    result = cheetahs.train(
        collector,
        update,
        eval_interval=max(1, 1_000_000 // (learning.trials * episodes * horizon)),
        stop=StopAtGoal(task) if stop_at_goal else None,
        callbacks=[FirstFilm(cheetahs)] if video else [],
    )
    title = f"{trials.title}{', original mode' * (mode == 'original')}{told_of(network, Told(), run.weights)}"
    report = publish(cheetahs.report(result, title=title), run)
    if video:
        cheetahs.film(run.log_dir / "trial")
    return report


def compose(
    trials: "CheetahTrials", mode: str, network: Network, learning: Learning, run: Run = RUN
) -> tuple[TrialCollector | TrialWorkers, PPOUpdate]:
    """Collector and update, of the parts that any recipe is made of."""
    sampler = TaskSampler(trials.distribution, seed=stream_seed(trials.seed, TRAIN_TASKS))
    env = trials.env(sampler, learning.trials, TRAIN_STARTS)
    actor = GRUGaussianActor.from_env(env, **network.actor)
    critic = GRUValueHead.from_env(env, **network.critic)
    options = MODES[mode]
    update = PPOUpdate(
        RL2PPOLoss(actor, critic, **{**learning.loss, **options["loss"]}),
        TrialAdvantage(**{**learning.advantage, **options["advantage"]}),
        **{**learning.update, **options["update"]},
    )
    make_env = partial(trials.env, starts=TRAIN_STARTS)
    frames = learning.frames(trials.episodes * trials.horizon)
    return run.collector(make_env, env, ActorCritic(actor, critic), update, **frames), update


@dataclass(frozen=True)
class CheetahTrials:
    """What cheetahs run: tasks of one kind, and trials of ``episodes`` episodes on them."""

    task: Literal["direction", "velocity"]
    episodes: int
    horizon: int
    max_velocity: float
    seed: int

    def __post_init__(self):
        if self.task == "direction" and self.max_velocity != MAX_VELOCITY:
            raise ValueError(
                f"max_velocity={self.max_velocity} is for --task velocity: directions are forward and backward."
            )

    @property
    def distribution(self) -> Callable:
        """Where tasks come from."""
        return signs() if self.task == "direction" else velocities(0.0, self.max_velocity)

    @property
    def title(self) -> str:
        """What is learnt."""
        most = "" if self.task == "direction" else f" up to {self.max_velocity:g} m/s"
        return f"RL² on HalfCheetah, {self.task}{most}"

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

    def report(self, result: TrainResult, **entries: Any) -> CheetahReport:
        """The agent and its ablations on the tasks ``reported``; ``entries`` go to `CheetahReport`."""
        ways = self.ways()
        records = {name: VelocityRecord() for name in ways}
        curves = {name: self.play(self.reported, on_step=records[name], **how) for name, how in ways.items()}
        return CheetahReport(
            agent=curves.pop("agent"),
            greedy=curves.pop("greedy"),
            ablations=curves,
            train=result,
            seed=self.run.seed,
            horizon=self.trials.horizon,
            tasks=self.reported.squeeze(-1),
            velocities=records["agent"].velocities,
            speed_errors={name: record.errors(self.trials.episodes) for name, record in records.items()},
            is_speed=self.trials.task == "velocity",
            **entries,
        )


class FirstFilm(Callback):
    """Films the network that the training begins with; once its first update has gone well, the film is in the run's folder."""

    def __init__(self, cheetahs: Cheetahs):
        self._cheetahs = cheetahs

    def after_batch(self, batch: TensorDictBase, progress: float) -> None:
        """Films, unless the training goes on."""
        if progress == 0:
            self._scratch = TemporaryDirectory()
            self._film = self._cheetahs.film(Path(self._scratch.name) / "untrained")

    def after_update(self, row: dict[str, float], progress: float) -> None:
        """Moves the film into its place."""
        if progress == 0:
            shutil.move(self._film, self._cheetahs.run.log_dir / self._film.name)
            self._scratch.cleanup()


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

    def state_dict(self) -> dict[str, int]:
        return {"held": self._held}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._held = state["held"]

    def _reached(self, row: dict[str, float]) -> bool:
        if self._task == "velocity":
            return row["eval/last_speed_error"] <= STOP_ERROR
        return min(row["eval/last_forward"], row["eval/last_backward"]) >= STOP_RETURN


if __name__ == "__main__":
    command(main)
