"""How fast RL² trains on a Gymnasium env through `GymVectorEnv`: collection, update, and the vector env alone."""

import time
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium
import torch
from gymnasium.vector import AutoresetMode
from rich.console import Console
from torchrl.data import Unbounded
from torchrl.envs import Compose, EnvBase, TransformedEnv

from recipes.benchmark import medians_of, require_repeats, time_phases, write_json
from recipes.cli import cli
from rl2_torchrl import (
    ActorCritic,
    MemoryValueHead,
    PPOUpdate,
    PreviousStep,
    RecurrentActor,
    RL2PPOLoss,
    TaskSampler,
    Trial,
    TrialAdvantage,
    TrialCollector,
    TrialWorkers,
)
from rl2_torchrl.envs import GymVectorEnv

#: What a task changes, by env id: an attribute and its range. An env that is not here has no task.
TASKS = {"CartPole-v1": ("length", 0.25, 1.0), "Pendulum-v1": ("g", 5.0, 15.0)}


def main(
    *,
    env: str = "CartPole-v1",
    num_envs: int = 64,
    steps: int = 128,
    units: int = 128,
    vectorization: Literal["sync", "async"] = "sync",
    workers: int = 0,
    threads: int = 1,
    repeats: int = 5,
    json: Path | None = None,
) -> dict[str, float]:
    """Times whole training iterations (4 passes of 4 minibatches, back-propagation over whole rows) and prints steps/s.

    Args:
        env: Gymnasium id.
        num_envs: envs side by side.
        steps: steps of a trial, which is a row of the batch: several episodes where they are shorter.
        units: GRU units.
        vectorization: of the envs.
        workers: processes that play an equal share of the envs each; 0: this one plays.
        threads: threads that PyTorch uses.
        repeats: iterations that are timed, after one that is not; the medians are printed.
        json: file to write all figures to.
    """
    require_repeats(repeats)
    if workers and num_envs % workers:
        raise ValueError(f"num_envs={num_envs} cannot be shared out evenly among workers={workers}: choose a multiple.")
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    collector, update = compose(env, num_envs, steps, units, vectorization, workers)
    runs = time_phases(iter(collector), update, num_envs * steps, repeats)
    collector.shutdown()
    alone = env_alone(env, num_envs, vectorization, steps, repeats)
    figures = {**medians_of(runs), "env_steps_per_second": alone, "runs": runs}
    told = ", ".join(f"{key.split('_')[0]} {value / 1e3:,.1f} k" for key, value in figures.items() if key != "runs")
    played = f"{num_envs} envs x {steps} steps, {units} units, {threads} threads, {workers} workers"
    Console().print(f"{env}, {played}; env steps/s: {told}")
    write_json(json, figures)
    return figures


def compose(
    env: str, num_envs: int, steps: int, units: int, vectorization: str = "sync", workers: int = 0
) -> tuple[TrialCollector | TrialWorkers, PPOUpdate]:
    """One GRU for actor and critic, as in the loops that people write by hand."""
    trials = trial_env(env, num_envs, steps, vectorization)
    actor = RecurrentActor.from_env(trials, hidden_size=units)
    critic = MemoryValueHead.from_env(trials, actor, detach=False)
    update = PPOUpdate(
        RL2PPOLoss(actor, critic, clip_epsilon=0.2),
        TrialAdvantage(gamma=0.99, lmbda=0.95, value_target="gae"),
        lr=3e-4,
        epochs=4,
        minibatches=4,
        max_grad_norm=0.5,
    )
    policy = ActorCritic(actor, critic)
    options = {"keep": update.in_keys, "frames_per_batch": num_envs * steps, "total_frames": -1}
    if not workers:
        return TrialCollector(trials, policy, **options), update
    trials.close()
    make_env = partial(trial_env, env, num_envs // workers, steps, vectorization)
    return TrialWorkers(make_env, policy, workers=workers, seed=0, **options), update


def trial_env(env: str, num_envs: int, steps: int, vectorization: str = "sync") -> EnvBase:
    """Trials of ``steps`` steps, with the env's task if `TASKS` names one."""
    trial, previous = Trial(steps=steps), PreviousStep()
    if env not in TASKS:
        return TransformedEnv(GymVectorEnv(env, num_envs, vectorization=vectorization), Compose(trial, previous))
    attribute, low, high = TASKS[env]

    def set_task(changed, task):
        setattr(changed, attribute, task.item())

    def tasks(batch_size, generator):
        return low + (high - low) * torch.rand(*batch_size, 1, generator=generator)

    vector = GymVectorEnv(env, num_envs, set_task=set_task, task_spec=Unbounded(1), vectorization=vectorization)
    return TransformedEnv(vector, Compose(trial, TaskSampler(tasks), previous))


def env_alone(env: str, num_envs: int, vectorization: str, steps: int, repeats: int) -> float:
    """Steps/s of the vector env that Gymnasium makes, with random actions, all rows reset first, and each as its episode ends: the
    median of ``repeats`` rollouts."""
    resets = {"autoreset_mode": AutoresetMode.DISABLED}
    vector = gymnasium.make_vec(env, num_envs, vectorization_mode=vectorization, vector_kwargs=resets)
    actions = [vector.action_space.sample() for _ in range(steps)]
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        vector.reset()  # as at the beginning of a batch of trials
        for action in actions:
            _, _, terminated, truncated, _ = vector.step(action)
            if (ended := terminated | truncated).any():
                vector.reset(options={"reset_mask": ended})
        rates.append(vector.num_envs * steps / (time.perf_counter() - start))
    vector.close()
    return sorted(rates)[len(rates) // 2]


if __name__ == "__main__":
    cli(main)
