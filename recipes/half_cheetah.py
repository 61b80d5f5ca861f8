"""RL² on HalfCheetah with a goal direction or velocity: a Gaussian GRU policy finds out within a trial how it should run."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from tensordict import TensorDictBase
from torchrl.envs import Compose, TransformedEnv
from torchrl.record.loggers import get_logger

from rl2_torchrl import (
    ActorCritic,
    AdaptationReport,
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

TRAIN_TASKS, HELD_OUT_TASKS, REPORT_TASKS, PHYSICS = range(4)  # streams of random numbers that never meet
HORIZON = 200


@dataclass(frozen=True)
class Settings:
    """What the two modes differ in."""

    trials: int
    episodes: int
    env_steps: int
    units: int
    lr: float
    gamma: float
    lmbda: float
    epochs: int
    minibatches: int
    clip: float
    entropy: float
    bptt: int | None
    shuffle: bool
    value_target: Literal["gae", "return"]
    privileged: bool
    decay: bool


TRIAL = Settings(
    trials=64,
    episodes=2,
    env_steps=40_000_000,
    units=64,
    lr=1e-3,
    gamma=0.99,
    lmbda=0.95,
    epochs=4,
    minibatches=8,
    clip=0.2,
    entropy=0.0,
    bptt=None,
    shuffle=True,
    value_target="gae",
    privileged=True,
    decay=True,
)


def main(
    task: Literal["direction", "velocity"] = "direction",
    *,
    settings: Settings = TRIAL,
    seed: int = 0,
    log_dir: Path = Path("runs/half_cheetah"),
    progress: bool = True,
):
    torch.manual_seed(seed)
    torch.set_flush_denormal(True)
    s = settings
    distribution = signs() if task == "direction" else velocities()
    env = make_env(task, TaskSampler(distribution, seed=1000 * seed + TRAIN_TASKS), s.episodes, s.trials, seed)
    actor = GRUGaussianActor.from_env(env, hidden_size=s.units)
    extra = ["time_left", "task"] if s.privileged else []
    critic = GRUValueHead.from_env(env, hidden_size=s.units, extra_keys=extra)
    policy = ActorCritic(actor, critic)
    update = PPOUpdate(
        RL2PPOLoss(actor, critic, clip_epsilon=s.clip, entropy_bonus=s.entropy > 0, entropy_coeff=s.entropy),
        TrialAdvantage(gamma=s.gamma, lmbda=s.lmbda, value_target=s.value_target),
        bptt=s.bptt, shuffle=s.shuffle, lr=s.lr, epochs=s.epochs, minibatches=s.minibatches,
        lr_schedule=linear_decay if s.decay else None,
    )
    batch = s.trials * s.episodes * HORIZON
    total = math.ceil(s.env_steps / batch) * batch
    collector = TrialCollector(env, policy, frames_per_batch=batch, total_frames=total, keep=update.in_keys)

    def evaluate():
        held = distribution(torch.Size([64]), torch.Generator().manual_seed(1000 * seed + HELD_OUT_TASKS))
        e = make_env(task, TaskSampler.fixed(held), s.episodes, 64, seed)
        curve = adaptation_curve(e, actor, 64)
        out = {f"episode_{i}": v for i, v in enumerate(curve.per_episode.tolist())}
        if task == "direction":
            out |= {"last_forward": curve.returns[held[:, 0] > 0, -1].mean().item(), "last_backward": curve.returns[held[:, 0] < 0, -1].mean().item()}
        else:
            e = make_env(task, TaskSampler.fixed(held), s.episodes, 64, seed)
            err = adaptation_curve(e, actor, 64, score=speed_error)
            out |= {f"error_{i}": v for i, v in enumerate(err.per_episode.tolist())}
        out["trial_return"] = curve.mean
        print({k: round(v, 1) for k, v in out.items()}, actor.get_submodule("0") if False else "", flush=True)
        return out

    return train(collector, update, evaluate=evaluate, eval_interval=20, logger=get_logger("csv", str(log_dir), "scalars"), checkpoints=log_dir / "checkpoints", progress=progress)


def speed_error(td):
    return (td["next", "velocity"] - td["task"]).abs()


def make_env(task, sampler, episodes, rows, seed):
    env_class = HalfCheetahDirection if task == "direction" else HalfCheetahVelocity
    base = env_class(batch_size=(rows,), horizon=HORIZON, seed=1000 * seed + PHYSICS)
    return TransformedEnv(base, Compose(Trial(episodes=episodes), sampler, PreviousStep(["observation"])))


if __name__ == "__main__":
    tyro.cli(main)
