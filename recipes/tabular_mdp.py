"""RL² on tabular MDPs (Duan et al. 2016, table 2): a GRU learns to explore an unknown MDP and to plan in it."""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torchrl.envs import Compose, TransformedEnv

from recipes.command import command, settings_by
from recipes.experiment import Experiment, publish
from recipes.posterior import Posterior, RisingOptimism, normal_moments
from recipes.rules import EPISODE_STEPS, LearnsFrom, mdp_settings
from recipes.run import Run
from recipes.settings import FirstWeights, Learning, Network, Told, told_of
from recipes.streams import CLASSICAL_AGENTS, ENVS, TRAIN_TASKS, stream_seed
from rl2_torchrl import (
    ActorCritic,
    AdaptationReport,
    GRUCategoricalActor,
    MemoryValueHead,
    PPOUpdate,
    PreviousStep,
    RL2PPOLoss,
    TaskSampler,
    Trial,
    orthogonal_init_,
)
from rl2_torchrl.baselines import mdps
from rl2_torchrl.envs import TabularMDP, random_mdps, unpack_mdps
from rl2_torchrl.evaluation import AdaptationCurve
from rl2_torchrl.objectives import MDPValues

RUN = Run(Path("runs/tabular_mdp"))


@settings_by(mdp_settings)
def main(
    *,
    states: int = 10,
    actions: int = 5,
    episodes: int = 10,
    learns_from: LearnsFrom = "task",
    network: Network,
    first_weights: FirstWeights,
    learning: Learning,
    told: Told,
    classical: bool = True,
    run: Run = RUN,
) -> AdaptationReport:
    """Trains RL² on random MDPs with 10-step episodes, and reports how it adapts to held-out ones.

    Settings that are left out follow from states, actions and episodes (`recipes.rules`): add --help to these to see them.

    Args:
        states: states of an MDP, 10 in the paper's table.
        actions: actions, 5 in the paper's table.
        episodes: episodes of a trial, n in the paper's table.
        learns_from: rewards alone, as the paper's agents, or what the task tells the training too; the agent sees rewards alone.
        network: actor and critic.
        first_weights: what the core's weights are at first.
        learning: batches, and PPO on them.
        told: what training is told of the task beside rewards.
        classical: whether classical agents play in the report too.
        run: seeds, where the run begins, which processes play, and what it leaves.
    """
    torch.set_flush_denormal(True)  # gradients that fade over a long trial become such numbers, which are slow
    torch.manual_seed(run.seed)

    def make_env(sampler: TaskSampler, rows: int) -> TransformedEnv:
        options = {"episode_steps": EPISODE_STEPS, "batch_size": (rows,), "seed": stream_seed(run.seed, ENVS)}
        worlds = TabularMDP(states, actions, **options)
        return TransformedEnv(worlds, Compose(Trial(episodes=episodes), sampler, PreviousStep()))

    tasks = random_mdps(states, actions)
    env = make_env(TaskSampler(tasks, seed=stream_seed(run.seed, TRAIN_TASKS)), learning.trials)
    actor = GRUCategoricalActor.from_env(env, **network.actor, skip=True)
    orthogonal_init_(actor, **asdict(first_weights))
    critic = MemoryValueHead.from_env(env, actor, **network.value_head(detach=True))
    posterior = Posterior(told.moments(normal_moments), actions, states, told.optimism)
    update = PPOUpdate(
        RL2PPOLoss(
            actor,
            critic,
            clip_epsilon=0.2,
            **learning.loss,
            terms=told.terms(
                network.units, states * actions, partial(mean_rewards, sizes=(states, actions)), posterior
            ),
        ),
        told.advantage(MDPValues(env.base_env), posterior, **learning.advantage),
        **learning.update,
    )
    collector = run.collector(
        make_env, env, ActorCritic(actor, critic), update, **learning.frames(episodes * EPISODE_STEPS)
    )
    trials = Experiment(actor, make_env, tasks, run)
    worlds = unpack_mdps(trials.reported, states, actions)
    report = trials.report(
        trials.train(collector, update, callbacks=[RisingOptimism(posterior, told.optimism_after)]),
        baselines=classical_agents(worlds, episodes, run.seed) if classical else {},
        title=f"RL² on tabular MDPs, {states} states, {actions} actions, {episodes} episodes{told_of(network, told, run.weights)}",
    )
    return publish(report, run)


def mean_rewards(tasks: torch.Tensor, sizes: tuple[int, int]) -> torch.Tensor:
    """Mean rewards of all states and actions, ``[..., S * A]``, in the MDPs ``tasks`` ``[..., task_size]`` of ``sizes`` (S, A)."""
    return unpack_mdps(tasks, *sizes)[0].flatten(-2)


def classical_agents(worlds: tuple[torch.Tensor, torch.Tensor], episodes: int, seed: int) -> dict[str, AdaptationCurve]:
    """Those that humans designed, at the settings that tuning finds best at n = 10, in the very ``worlds`` (`unpack_mdps`)."""
    generator = torch.Generator().manual_seed(stream_seed(seed, CLASSICAL_AGENTS))
    agents = {"random": mdps.random_agent, "psrl": mdps.psrl, "beb": partial(mdps.beb, scaling=10**-2.8)}
    return {name: AdaptationCurve(agent(worlds, episodes, generator)) for name, agent in agents.items()}


if __name__ == "__main__":
    command(main)
