"""RL² on Bernoulli bandits (Duan et al. 2016, table 1): a GRU learns to explore, then exploit, in its memory alone."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
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
    baselines,
    linear_decay,
    orthogonal_init_,
    train,
)
from rl2_torchrl.envs import BernoulliBandit, uniform_means
from rl2_torchrl.evaluation import AdaptationCurve, with_shuffled_rewards, with_zeroed_memory
from rl2_torchrl.objectives import RegretAdvantage, bandit_values

TRAIN_TASKS, HELD_OUT_TASKS, REPORT_TASKS, TUNING_TASKS = range(4)  # streams of tasks that never meet


def main(
    *,
    arms: int = 5,
    pulls: int = 10,
    trials: int = 1024,
    env_steps: int = 3_000_000,
    units: int = 64,
    num_cells: tuple[int, ...] = (),
    memory_steps: int | None = None,
    input_gain: float = 1.0,
    critic_keys: tuple[str, ...] = ("time_left",),
    lr: float = 3e-3,
    gamma: float = 1.0,
    lmbda: float = 0.3,
    epochs: int = 4,
    minibatches: int = 8,
    max_grad_norm: float | None = None,
    entropy: float = 0.02,
    regret: bool = False,
    seed: int = 0,
    report_tasks: int = 50_000,
    held_out_seed: int | None = None,
    classical: bool = True,
    initial_weights: Path | None = None,
    weights: Path | None = None,
    logger: Literal["csv", "tensorboard", "wandb"] = "csv",
    log_dir: Path = Path("runs/bandit"),
    resume: bool = False,
    progress: bool = True,
) -> AdaptationReport:
    """Trains RL² on Bernoulli bandits with arm means ~ U[0, 1] and reports how it adapts to held-out ones.

    Args:
        arms: arms of a bandit, k in the paper's table.
        pulls: pulls of a trial, n in the paper's table.
        trials: trials in a batch, each on a bandit of its own.
        env_steps: pulls to train on, rounded up to whole batches.
        units: GRU units.
        num_cells: hidden layers of actor and critic after the GRU; empty leaves the actor none and the critic one of ``units``.
        memory_steps: steps over which the slowest units remember at first (`orthogonal_init_`); None: all forget at once.
        input_gain: factor on the GRU's first input weights (`orthogonal_init_`).
        critic_keys: what the critic reads beside the actor's memory; the task among it makes advantages less noisy, and the
            actor never sees it.
        lr: learning rate, decayed to 0 over the training.
        gamma: discount per pull; 1 optimises the plain sum that is reported.
        lmbda: GAE's lambda.
        epochs: passes over a batch.
        minibatches: minibatches a pass.
        max_grad_norm: clip the gradient's norm at this; None does not, which learns faster: the critic's gradient is by far the
            larger part of the norm.
        entropy: weight of the entropy bonus, decayed to 0 over the training.
        regret: whether regrets, which the task tells without noise, stand for rewards in the advantages (`RegretAdvantage`).
        seed: seed of networks, envs and tasks.
        report_tasks: held-out bandits in the final report.
        held_out_seed: seed of the bandits of evaluations and report, for runs to share them; the run's own by default.
        classical: whether classical agents play in the report too.
        initial_weights: file of an actor's weights to start from, such as those for fewer pulls.
        weights: file of an actor's weights, as a run leaves it in actor.pt: to evaluate in place of training.
        logger: where scalars go; tensorboard and wandb are extras of the package.
        log_dir: folder of the run: report.json, report.png, actor.pt, scalars and checkpoints.
        resume: go on from the newest checkpoint in log_dir.
        progress: show a progress bar.
    """
    torch.set_flush_denormal(True)  # gradients that fade over a long trial become such numbers, which are slow
    torch.manual_seed(seed)
    test_seed = seed if held_out_seed is None else held_out_seed
    env = make_env(TaskSampler(uniform_means(arms), seed=stream(seed, TRAIN_TASKS)), arms, pulls, trials, seed)
    actor = GRUCategoricalActor.from_env(env, hidden_size=units, num_cells=num_cells)
    orthogonal_init_(actor, memory_steps=memory_steps, input_gain=input_gain)
    if initial_weights is not None and weights is None:
        load_actor(actor, initial_weights)
    critic = MemoryValueHead.from_env(env, actor, detach=True, extra_keys=critic_keys, num_cells=num_cells or [units])
    policy = ActorCritic(actor, critic)
    horizon = {"gamma": gamma, "lmbda": lmbda, "value_target": "gae"}
    update = PPOUpdate(
        RL2PPOLoss(actor, critic, clip_epsilon=0.2, entropy_bonus=True, entropy_coeff=entropy),
        RegretAdvantage(bandit_values, **horizon) if regret else TrialAdvantage(**horizon),
        lr=lr,
        epochs=epochs,
        minibatches=minibatches,
        max_grad_norm=max_grad_norm,
        lr_schedule=linear_decay,
        entropy_schedule=linear_decay,
    )
    batch = trials * pulls
    total = math.ceil(env_steps / batch) * batch
    keep = [*update.in_keys, *(("task",) if regret else ())]
    collector = TrialCollector(env, policy, frames_per_batch=batch, total_frames=total, keep=keep)

    def evaluate() -> dict[str, float]:
        curve = play(tasks(test_seed, HELD_OUT_TASKS, 2048, arms))
        first, last = curve.per_episode[[0, -1]].tolist()
        return {"trial_return": curve.mean, "first_pull": first, "last_pull": last}

    def play(held_out: torch.Tensor, **how) -> AdaptationCurve:
        rows = min(len(held_out), 4096)
        held_out_env = make_env(TaskSampler.fixed(held_out), arms, pulls, rows, seed)
        return adaptation_curve(held_out_env, actor, len(held_out), **how)

    if weights is not None:
        load_actor(actor, weights)
        result = TrainResult()
    else:
        result = train(
            collector,
            update,
            evaluate=evaluate,
            logger=get_logger(logger, str(log_dir), "scalars"),
            checkpoints=log_dir / "checkpoints",
            resume=resume,
            progress=progress,
        )
        save_actor(actor, log_dir / "actor.pt")
    reported = tasks(test_seed, REPORT_TASKS, report_tasks, arms)
    report = make_report(play, reported, actor, pulls, seed, result, classical)
    path = report.save(log_dir)
    console = Console()
    console.print(report.table())
    console.print(f"{result.env_steps:,} steps in {result.seconds:.0f} s; report and plot: {path.parent}")
    return report


def make_report(
    play: Callable[..., AdaptationCurve],
    means: torch.Tensor,
    actor: GRUCategoricalActor,
    pulls: int,
    seed: int,
    result: TrainResult,
    classical: bool,
) -> AdaptationReport:
    """The agent, without its memory, without its rewards, and classical agents, all on the bandits ``means`` [num_tasks, arms]."""
    arms = means.shape[1]
    return AdaptationReport(
        agent=play(means),
        greedy=play(means, deterministic=True),
        baselines=classical_agents(means, pulls, seed) if classical else {},
        ablations={
            "memory_zeroed": play(means, ablation=with_zeroed_memory(actor)),
            "rewards_shuffled": play(means, ablation=with_shuffled_rewards()),
        },
        optimum=baselines.bayes_optimal_return(arms, pulls) if pulls <= 10 else None,
        train=result,
        seed=seed,
        title=f"RL² on Bernoulli bandits, {arms} arms, {pulls} pulls",
        episode_name="pull",
    )


def make_env(sampler: TaskSampler, arms: int, pulls: int, rows: int, seed: int) -> TransformedEnv:
    """``rows`` bandits side by side, each played for trials of ``pulls`` pulls."""
    bandit = BernoulliBandit(arms, batch_size=(rows,), seed=stream(seed, 9))
    return TransformedEnv(bandit, Compose(Trial(episodes=pulls), sampler, PreviousStep()))


def classical_agents(means: torch.Tensor, pulls: int, seed: int) -> dict[str, AdaptationCurve]:
    """The algorithms that humans designed, on the very tasks ``means`` [num_tasks, arms]; UCB1 tuned on others."""
    generator = torch.Generator().manual_seed(stream(seed, 10))
    tuning = tasks(seed, TUNING_TASKS, 20_000, means.shape[1])
    best = baselines.tune(baselines.ucb1, tuning, pulls, generator)
    return {
        "random": AdaptationCurve(baselines.random_agent(means, pulls, generator)),
        "greedy": AdaptationCurve(baselines.greedy(means, pulls, generator)),
        "ucb1": AdaptationCurve(baselines.ucb1(means, pulls, generator, **best)),
        "thompson_sampling": AdaptationCurve(baselines.thompson_sampling(means, pulls, generator)),
    }


def tasks(seed: int, kind: int, number: int, arms: int) -> torch.Tensor:
    """``number`` bandits from the stream ``kind``, [number, arms]."""
    return uniform_means(arms)(torch.Size([number]), torch.Generator().manual_seed(stream(seed, kind)))


def stream(seed: int, kind: int) -> int:
    """A seed for each purpose, so that no two draw the same numbers."""
    return 1000 * seed + kind


if __name__ == "__main__":
    tyro.cli(main)
