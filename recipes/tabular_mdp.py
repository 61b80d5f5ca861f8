"""RL² on tabular MDPs (Duan et al. 2016, table 2): a GRU learns to explore an unknown MDP and to plan in it."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torchrl.envs import Compose, TransformedEnv

from recipes import experiment
from recipes.experiment import (
    CLASSICAL_AGENTS,
    ENVS,
    TRAIN_TASKS,
    Experiment,
    Learning,
    Network,
    Run,
    Told,
    stream_seed,
    told_of,
    whole_batches,
)
from recipes.posterior import Posterior, RisingOptimism, normal_moments
from recipes.presets import PRESETS
from rl2_torchrl import (
    ActorCritic,
    AdaptationReport,
    Callback,
    GRUCategoricalActor,
    MemoryValueHead,
    PPOUpdate,
    PreviousStep,
    RL2PPOLoss,
    TaskSampler,
    Trial,
    TrialCollector,
    linear_decay,
    orthogonal_init_,
)
from rl2_torchrl.baselines import mdps
from rl2_torchrl.envs import TabularMDP, random_mdps, unpack_mdps
from rl2_torchrl.evaluation import AdaptationCurve
from rl2_torchrl.objectives import MDPValues

EPISODE_STEPS = 10
NUM_STATES, NUM_ACTIONS = 10, 5
NUM_PAIRS = NUM_STATES * NUM_ACTIONS
#: With a gate_gain of 1, and a head that saw the memory alone, learning stood still where the agent had a memory for the first
#: state alone.
PRESET = PRESETS["TabularMDP"]
TOLD = Told()
RUN = Run(Path("runs/tabular_mdp"))


def main(
    *,
    episodes: int = 10,
    network: Network = PRESET.network,
    learning: Learning = PRESET.learning,
    told: Told = TOLD,
    noiseless: float = 0.6,
    classical: bool = True,
    run: Run = RUN,
) -> AdaptationReport:
    """Trains RL² on MDPs of 10 states, 5 actions and 10-step episodes, and reports how it adapts to held-out ones.

    Args:
        episodes: episodes of a trial, n in the paper's table.
        network: actor and critic.
        learning: batches, and PPO on them.
        told: what training is told of the task beside rewards.
        noiseless: share of the training, from its start, in which rewards are without noise: what a memory of single states and
            actions is worth then shows several times as clearly. Evaluations and report are always with noise.
        classical: whether classical agents play in the report too.
        run: seeds, where the run begins, and what it leaves.
    """
    torch.set_flush_denormal(True)  # gradients that fade over a long trial become such numbers, which are slow
    torch.manual_seed(run.seed)

    def make_env(sampler: TaskSampler, rows: int) -> TransformedEnv:
        worlds = TabularMDP(episode_steps=EPISODE_STEPS, batch_size=(rows,), seed=stream_seed(run.seed, ENVS))
        return TransformedEnv(worlds, Compose(Trial(episodes=episodes), sampler, PreviousStep()))

    env = make_env(TaskSampler(random_mdps(), seed=stream_seed(run.seed, TRAIN_TASKS)), learning.trials)
    actor = GRUCategoricalActor.from_env(env, **network.slots, num_cells=network.num_cells, skip=True)
    orthogonal_init_(actor, **network.initial)
    heads = {"extra_keys": network.critic_keys, "num_cells": network.critic_cells}
    critic = MemoryValueHead.from_env(env, actor, detach=True, **heads)
    horizon = {"gamma": learning.gamma, "lmbda": learning.lmbda, "value_target": "gae"}
    posterior = Posterior(normal_moments, NUM_ACTIONS, NUM_STATES, told.optimism)
    update = PPOUpdate(
        RL2PPOLoss(
            actor,
            critic,
            clip_epsilon=0.2,
            entropy_bonus=True,
            entropy_coeff=learning.entropy,
            terms=told.terms(network.units, NUM_PAIRS, mean_rewards, posterior),
        ),
        told.advantage(MDPValues(env.base_env), posterior, **horizon),
        lr=learning.lr,
        epochs=learning.epochs,
        minibatches=learning.minibatches,
        max_grad_norm=learning.max_grad_norm,
        lr_schedule=linear_decay,
        entropy_schedule=linear_decay,
    )
    batch = learning.trials * episodes * EPISODE_STEPS
    frames = {"frames_per_batch": batch, "total_frames": whole_batches(learning.env_steps, batch)}
    collector = TrialCollector(env, ActorCritic(actor, critic), keep=update.in_keys, **frames)

    curricula = [NoiseCurriculum(env.base_env, noiseless), RisingOptimism(posterior, told.optimism_after)]
    trials = Experiment(actor, make_env, random_mdps(), run)
    report = trials.report(
        trials.train(collector, update, callbacks=curricula),
        baselines=classical_agents(trials.reported, episodes, run.seed) if classical else {},
        title=f"RL² on tabular MDPs, {episodes} episodes{told_of(network, told)}",
    )
    return experiment.publish(report, run)


def mean_rewards(tasks: torch.Tensor) -> torch.Tensor:
    """Mean rewards of all states and actions, ``[..., 50]``, in the MDPs ``tasks`` ``[..., task_size]``."""
    return unpack_mdps(tasks)[0].flatten(-2)


class NoiseCurriculum(Callback):
    """Lets the rewards of ``worlds`` have their noise only after the share ``noiseless`` of the training."""

    def __init__(self, worlds: TabularMDP, noiseless: float):
        if not 0 <= noiseless < 1:
            raise ValueError(
                f"noiseless={noiseless} is a share of the training, at least 0 and below 1: the task has noise."
            )
        self.worlds, self.noiseless, self.noise = worlds, noiseless, worlds.noise
        self._set_noise(0.0)

    def after_update(self, row: dict[str, float], progress: float) -> dict[str, float]:
        """Sets the noise of the next batch."""
        self._set_noise(progress)
        return {"train/noise": self.worlds.noise}

    def _set_noise(self, progress: float) -> None:
        self.worlds.noise = self.noise if progress >= self.noiseless else 0.0

    def state_dict(self) -> dict[str, Any]:
        """The noise at which the training stands."""
        return {"noise": self.worlds.noise}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self.worlds.noise = state["noise"]


def classical_agents(held_out: torch.Tensor, episodes: int, seed: int) -> dict[str, AdaptationCurve]:
    """Three that humans designed, at the settings that tuning finds best, on the very tasks ``held_out`` [num_tasks, size]."""
    generator = torch.Generator().manual_seed(stream_seed(seed, CLASSICAL_AGENTS))
    agents = {"random": mdps.random_agent, "psrl": mdps.psrl, "beb": partial(mdps.beb, scaling=10**-2.8)}
    worlds = unpack_mdps(held_out)
    return {name: AdaptationCurve(agent(worlds, episodes, generator)) for name, agent in agents.items()}


if __name__ == "__main__":
    experiment.command(main)
