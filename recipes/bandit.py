"""RL² on Bernoulli bandits (Duan et al. 2016, table 1): a GRU learns to explore, then exploit, in its memory alone."""

from dataclasses import asdict
from pathlib import Path

import torch
from torchrl.envs import Compose, TransformedEnv

from recipes.command import command, settings_by
from recipes.experiment import Experiment, publish
from recipes.posterior import Posterior, RisingOptimism, beta_moments
from recipes.rules import LearnsFrom, bandit_settings
from recipes.run import Run
from recipes.settings import FirstWeights, Learning, Network, Told, told_of
from recipes.streams import CLASSICAL_AGENTS, ENVS, TRAIN_TASKS, TUNING_TASKS, draw_tasks, stream_seed
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
    baselines,
    orthogonal_init_,
)
from rl2_torchrl.envs import BernoulliBandit, uniform_means
from rl2_torchrl.evaluation import AdaptationCurve
from rl2_torchrl.objectives import bandit_values

RUN = Run(Path("runs/bandit"), report_tasks=50_000)


@settings_by(bandit_settings)
def main(
    *,
    arms: int = 5,
    pulls: int = 10,
    learns_from: LearnsFrom = "task",
    network: Network,
    first_weights: FirstWeights,
    learning: Learning,
    told: Told,
    classical: bool = True,
    run: Run = RUN,
) -> AdaptationReport:
    """Trains RL² on Bernoulli bandits with arm means ~ U[0, 1] and reports how it adapts to held-out ones.

    Settings that are left out follow from arms and pulls (`recipes.rules`): add --help to these to see them.

    Args:
        arms: arms of a bandit, k in the paper's table.
        pulls: pulls of a trial, n in the paper's table.
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
        bandit = BernoulliBandit(arms, batch_size=(rows,), seed=stream_seed(run.seed, ENVS))
        return TransformedEnv(bandit, Compose(Trial(episodes=pulls), sampler, PreviousStep()))

    tasks = uniform_means(arms)
    env = make_env(TaskSampler(tasks, seed=stream_seed(run.seed, TRAIN_TASKS)), learning.trials)
    actor = GRUCategoricalActor.from_env(env, **network.actor)
    orthogonal_init_(actor, **asdict(first_weights))
    critic = MemoryValueHead.from_env(env, actor, **network.value_head(detach=True))
    posterior = Posterior(told.moments(beta_moments), arms, optimism=told.optimism)
    update = PPOUpdate(
        RL2PPOLoss(
            actor,
            critic,
            clip_epsilon=0.2,
            **learning.loss,
            terms=told.terms(network.units, arms, posterior=posterior),
        ),
        told.advantage(bandit_values, posterior, **learning.advantage),
        **learning.update,
    )

    held_out = {"held_out_tasks": 2048, "rows": 4096, "episode_name": "pull"}
    bandits = Experiment(actor, make_env, tasks, run, **held_out)
    collector = run.collector(make_env, env, ActorCritic(actor, critic), update, **learning.frames(pulls))
    report = bandits.report(
        bandits.train(collector, update, callbacks=[RisingOptimism(posterior, told.optimism_after)]),
        baselines=classical_agents(bandits.reported, pulls, run.seed) if classical else {},
        optimum=baselines.bayes_optimal_return(arms, pulls) if pulls <= 10 else None,
        title=f"RL² on Bernoulli bandits, {arms} arms, {pulls} pulls{told_of(network, told, run.weights)}",
    )
    return publish(report, run)


def classical_agents(means: torch.Tensor, pulls: int, seed: int) -> dict[str, AdaptationCurve]:
    """The algorithms that humans designed, on the very bandits ``means`` [num_tasks, arms]; UCB1 tuned on others."""
    generator = torch.Generator().manual_seed(stream_seed(seed, CLASSICAL_AGENTS))
    tuning = draw_tasks(uniform_means(means.shape[1]), seed, TUNING_TASKS, 20_000)
    best = baselines.tune(baselines.ucb1, tuning, pulls, generator)
    return {
        "random": AdaptationCurve(baselines.random_agent(means, pulls, generator)),
        "greedy": AdaptationCurve(baselines.greedy(means, pulls, generator)),
        "ucb1": AdaptationCurve(baselines.ucb1(means, pulls, generator, **best)),
        "thompson_sampling": AdaptationCurve(baselines.thompson_sampling(means, pulls, generator)),
    }


if __name__ == "__main__":
    command(main)
