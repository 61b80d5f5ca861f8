"""RL² on tabular MDPs (Duan et al. 2016, table 2): a GRU learns to explore an unknown MDP and to plan in it."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from tensordict import TensorDictBase
from torchrl.envs import Compose, TransformedEnv
from torchrl.record.loggers import get_logger

from recipes.weights import load_actor, save_actor
from rl2_torchrl import (
    ActorCritic,
    AdaptationReport,
    GRUCategoricalActor,
    MemoryValueHead,
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
    orthogonal_init_,
    train,
)
from rl2_torchrl.baselines import mdps
from rl2_torchrl.envs import TabularMDP, random_mdps, unpack_mdps
from rl2_torchrl.evaluation import AdaptationCurve, with_shuffled_rewards, with_zeroed_memory
from rl2_torchrl.objectives import MDPValues, RegretAdvantage

TRAIN_TASKS, HELD_OUT_TASKS, REPORT_TASKS, TUNING_TASKS = range(4)  # streams of tasks that never meet
EPISODE_STEPS = 10


def main(
    *,
    episodes: int = 10,
    trials: int = 1024,
    env_steps: int = 150_000_000,
    units: int = 64,
    num_cells: tuple[int, ...] = (128,),
    memory_steps: int | None = 30,
    input_gain: float = 2.0,
    gate_gain: float = 6.0,
    critic_keys: tuple[str, ...] = ("time_left",),
    lr: float = 2e-3,
    gamma: float = 0.5,
    lmbda: float = 0.0,
    epochs: int = 2,
    minibatches: int = 32,
    max_grad_norm: float | None = None,
    entropy: float = 0.12,
    noiseless: float = 0.6,
    regret: bool = False,
    seed: int = 0,
    report_tasks: int = 10_000,
    held_out_seed: int | None = None,
    classical: bool = True,
    initial_weights: Path | None = None,
    weights: Path | None = None,
    logger: Literal["csv", "tensorboard", "wandb"] = "csv",
    log_dir: Path = Path("runs/tabular_mdp"),
    resume: bool = False,
    progress: bool = True,
) -> AdaptationReport:
    """Trains RL² on MDPs of 10 states, 5 actions and 10-step episodes, and reports how it adapts to held-out ones.

    Args:
        episodes: episodes of a trial, n in the paper's table.
        trials: trials in a batch, each on an MDP of its own.
        env_steps: env steps to train on, rounded up to whole batches.
        units: GRU units.
        num_cells: hidden layers of actor and critic after the GRU; empty leaves the actor none and the critic one of ``units``.
        memory_steps: steps over which the slowest units remember at first (`orthogonal_init_`); None: all forget at once.
        input_gain: factor on the GRU's first input weights (`orthogonal_init_`).
        gate_gain: further factor on those of its update gates (`orthogonal_init_`): with 1, and a head that saw the memory alone,
            learning stood still where the agent had a memory for the first state alone.
        critic_keys: what the critic reads beside the actor's memory; the task among it makes advantages less noisy, and the
            actor never sees it.
        lr: learning rate, decayed to 0 over the training.
        gamma: discount per step.
        lmbda: GAE's lambda.
        epochs: passes over a batch.
        minibatches: minibatches a pass.
        max_grad_norm: clip the gradient's norm at this; None does not, which learns faster: the critic's gradient is by far the
            larger part of the norm.
        entropy: weight of the entropy bonus, decayed to 0 over the training.
        noiseless: share of the training, from its start, in which rewards are without noise: what a memory of single states and
            actions is worth then shows several times as clearly. Evaluations and report are always with noise.
        regret: whether regrets, which the task tells without noise, stand for rewards in the advantages (`RegretAdvantage`).
        seed: seed of networks, envs and tasks.
        report_tasks: held-out MDPs in the final report.
        held_out_seed: seed of the MDPs of evaluations and report, for runs to share them; the run's own by default.
        classical: whether classical agents play in the report too.
        initial_weights: file of an actor's weights to start from, such as those for shorter trials.
        weights: file of an actor's weights, as a run leaves it in actor.pt: to evaluate in place of training.
        logger: where scalars go; tensorboard and wandb are extras of the package.
        log_dir: folder of the run: report.json, report.png, actor.pt, scalars and checkpoints.
        resume: go on from the newest checkpoint in log_dir.
        progress: show a progress bar.
    """
    torch.set_flush_denormal(True)  # gradients that fade over a long trial become such numbers, which are slow
    torch.manual_seed(seed)
    test_seed = seed if held_out_seed is None else held_out_seed
    env = make_env(TaskSampler(random_mdps(), seed=stream(seed, TRAIN_TASKS)), episodes, trials, seed)
    actor = GRUCategoricalActor.from_env(env, hidden_size=units, num_cells=num_cells, skip=True)
    orthogonal_init_(actor, memory_steps=memory_steps, input_gain=input_gain, gate_gain=gate_gain)
    if initial_weights is not None and weights is None:
        load_actor(actor, initial_weights)
    critic = MemoryValueHead.from_env(env, actor, detach=True, extra_keys=critic_keys, num_cells=num_cells or [units])
    policy = ActorCritic(actor, critic)
    horizon = {"gamma": gamma, "lmbda": lmbda, "value_target": "gae"}
    update = PPOUpdate(
        RL2PPOLoss(actor, critic, clip_epsilon=0.2, entropy_bonus=True, entropy_coeff=entropy),
        RegretAdvantage(MDPValues(env.base_env), **horizon) if regret else TrialAdvantage(**horizon),
        lr=lr,
        epochs=epochs,
        minibatches=minibatches,
        max_grad_norm=max_grad_norm,
        lr_schedule=linear_decay,
        entropy_schedule=linear_decay,
    )
    curriculum = NoiseCurriculum(update, env.base_env, noiseless)
    batch = trials * episodes * EPISODE_STEPS
    total = math.ceil(env_steps / batch) * batch
    keep = [*update.in_keys, *(("task", "observation") if regret else ())]
    collector = TrialCollector(env, policy, frames_per_batch=batch, total_frames=total, keep=keep)

    def evaluate() -> dict[str, float]:
        curve = play(tasks(test_seed, HELD_OUT_TASKS, 1024))
        first, last = curve.per_episode[[0, -1]].tolist()
        return {"trial_return": curve.mean, "first_episode": first, "last_episode": last}

    def play(held_out: torch.Tensor, **how) -> AdaptationCurve:
        rows = min(len(held_out), 2048)
        held_out_env = make_env(TaskSampler.fixed(held_out), episodes, rows, seed)
        return adaptation_curve(held_out_env, actor, len(held_out), **how)

    if weights is not None:
        load_actor(actor, weights)
        result = TrainResult()
    else:
        result = train(
            collector,
            curriculum,
            evaluate=evaluate,
            logger=get_logger(logger, str(log_dir), "scalars"),
            checkpoints=log_dir / "checkpoints",
            resume=resume,
            progress=progress,
        )
        save_actor(actor, log_dir / "actor.pt")
    reported = tasks(test_seed, REPORT_TASKS, report_tasks)
    report = make_report(play, reported, actor, episodes, seed, result, classical)
    path = report.save(log_dir)
    console = Console()
    console.print(report.table())
    console.print(f"{result.env_steps:,} steps in {result.seconds:.0f} s; report and plot: {path.parent}")
    return report


class NoiseCurriculum:
    """`PPOUpdate` on the batches of ``mdps``, whose rewards get their noise after the share ``noiseless`` of the training."""

    def __init__(self, update: PPOUpdate, mdps: TabularMDP, noiseless: float):
        if not 0 <= noiseless < 1:
            raise ValueError(
                f"noiseless={noiseless} is a share of the training, at least 0 and below 1: the task has noise."
            )
        self.update, self.mdps, self.noiseless, self.noise = update, mdps, noiseless, mdps.noise
        self._set_noise(0.0)

    def __call__(self, batch: TensorDictBase, progress: float) -> dict[str, float]:
        metrics = self.update(batch, progress)
        self._set_noise(progress)
        return {**metrics, "noise": self.mdps.noise}

    def _set_noise(self, progress: float) -> None:
        self.mdps.noise = self.noise if progress >= self.noiseless else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"update": self.update.state_dict(), "noise": self.mdps.noise}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.update.load_state_dict(state["update"])
        self.mdps.noise = state["noise"]


def make_report(
    play: Callable[..., AdaptationCurve],
    held_out: torch.Tensor,
    actor: GRUCategoricalActor,
    episodes: int,
    seed: int,
    result: TrainResult,
    classical: bool,
) -> AdaptationReport:
    """The agent, without its memory, without its rewards, and classical agents, all on the MDPs ``held_out`` [num_tasks, size]."""
    return AdaptationReport(
        agent=play(held_out),
        greedy=play(held_out, deterministic=True),
        baselines=classical_agents(held_out, episodes, seed) if classical else {},
        ablations={
            "memory_zeroed": play(held_out, ablation=with_zeroed_memory(actor)),
            "rewards_shuffled": play(held_out, ablation=with_shuffled_rewards()),
        },
        train=result,
        seed=seed,
        title=f"RL² on tabular MDPs, {episodes} episodes",
    )


def make_env(sampler: TaskSampler, episodes: int, rows: int, seed: int) -> TransformedEnv:
    """``rows`` MDPs side by side, each played for trials of ``episodes`` episodes."""
    mdps = TabularMDP(episode_steps=EPISODE_STEPS, batch_size=(rows,), seed=stream(seed, 9))
    return TransformedEnv(mdps, Compose(Trial(episodes=episodes), sampler, PreviousStep()))


def classical_agents(held_out: torch.Tensor, episodes: int, seed: int) -> dict[str, AdaptationCurve]:
    """Three that humans designed, at the settings that tuning finds best, on the very tasks ``held_out`` [num_tasks, size]."""
    generator = torch.Generator().manual_seed(stream(seed, 10))
    agents = {"random": mdps.random_agent, "psrl": mdps.psrl, "beb": partial(mdps.beb, scaling=10**-2.8)}
    worlds = unpack_mdps(held_out)
    return {name: AdaptationCurve(agent(worlds, episodes, generator)) for name, agent in agents.items()}


def tasks(seed: int, kind: int, number: int) -> torch.Tensor:
    """``number`` MDPs from the stream ``kind``, [number, size]."""
    return random_mdps()(torch.Size([number]), torch.Generator().manual_seed(stream(seed, kind)))


def stream(seed: int, kind: int) -> int:
    """A seed for each purpose, so that no two draw the same numbers."""
    return 1000 * seed + kind


if __name__ == "__main__":
    tyro.cli(main)
