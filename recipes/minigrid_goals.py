"""RL² on MiniGrid: a trial's first episode searches a goal behind one of six doors, and the next ones go straight back to it."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torchrl.envs import Compose, TransformedEnv

from recipes.command import command
from recipes.experiment import Experiment, publish
from recipes.minigrid_envs import Doors, OneHotView, all_mazes
from recipes.presets import PRESETS
from recipes.run import Run
from recipes.settings import Learning, Network, Told, told_of
from recipes.streams import TRAIN_TASKS, stream_seed
from rl2_torchrl import (
    ActorCritic,
    AdaptationReport,
    GRUCategoricalActor,
    MemoryValueHead,
    PPOUpdate,
    PreviousStep,
    RL2PPOLoss,
    TaskBelief,
    TaskSampler,
    Trial,
    TrialAdvantage,
)
from rl2_torchrl.envs import GymVectorEnv

PRESET = PRESETS["MiniGrid doors"]
RUN = Run(Path("runs/minigrid_goals"), report_tasks=512)
#: Steps of a batch in each row, and of a chunk that gradients go through.
BATCH_STEPS = 64
#: Mazes that are never trained on, the same ones whatever the seed.
HELD_OUT_MAZES = 512


def main(
    *,
    episodes: int = 3,
    max_steps: int = 60,
    belief: float = 0.1,
    network: Network = PRESET.network,
    learning: Learning = PRESET.learning,
    run: Run = RUN,
) -> AdaptationReport:
    """Trains RL² to search a maze for its goal, and reports its steps in mazes that it was not trained on, episode by episode.

    Args:
        episodes: episodes of a trial, all in the same maze with the same goal.
        max_steps: steps until an episode without the goal is cut.
        belief: weight of a loss that the memory tells the goal's door by (`TaskBelief`), which only training sees; 0 for none.
        network: actor and critic, which share the core.
        learning: batches, and PPO on them.
        run: seeds, where the run begins, which processes play, and what it leaves.
    """
    torch.manual_seed(run.seed)
    held_out, trained = np.split(all_mazes(), [HELD_OUT_MAZES])
    make_env = partial(trial_env, episodes=episodes, max_steps=max_steps)
    sampler = TaskSampler(partial(numbers, len(trained)), seed=stream_seed(run.seed, TRAIN_TASKS))
    env = make_env(trained, sampler, learning.trials)
    actor = GRUCategoricalActor.from_env(env, **network.actor)  # the view gets a ConvEncoder
    critic = MemoryValueHead.from_env(env, actor, **network.value_head(detach=False))
    policy = ActorCritic(actor, critic)
    places = torch.tensor((trained[:, 0] - [3, 5]) / [1, 4], dtype=torch.float32)  # of the goals' doors
    terms = [TaskBelief(network.units, 2, coefficient=belief, target=lambda maze: places[maze])] if belief else []
    update = PPOUpdate(
        RL2PPOLoss(actor, critic, clip_epsilon=0.2, **learning.loss, terms=terms),
        TrialAdvantage(**learning.advantage, critic=policy),
        bptt=BATCH_STEPS,
        **learning.update,
    )
    collector = run.collector(partial(make_env, trained), env, policy, update, **learning.frames(BATCH_STEPS))
    measures = {("info", "success"): "max"}
    others, draw = partial(make_env, held_out), partial(numbers, len(held_out))
    searches = Experiment(actor, others, draw, run, rows=64, held_out_tasks=128, measures=measures)
    result = searches.train(collector, update, eval_interval=50)
    title = f"RL² on MiniGrid: a goal to find again{told_of(network, Told(belief=belief), run.weights)}"
    return publish(searches.report(result, title=title), run)


def trial_env(
    mazes: Sequence[np.ndarray], sampler: TaskSampler, rows: int, *, episodes: int, max_steps: int
) -> TransformedEnv:
    """Trials of which each plays one of ``mazes``, that whose number the sampler draws."""
    halls = GymVectorEnv(
        partial(seen_hall, max_steps), rows, set_task=Doors.set_task, tasks=mazes, info_keys=["success"]
    )
    return TransformedEnv(halls, Compose(Trial(episodes=episodes), sampler, PreviousStep()))


def seen_hall(max_steps: int) -> OneHotView:
    """A hall as the agent sees it."""
    return OneHotView(Doors(max_steps))


def numbers(number: int, batch_size: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Which of ``number`` mazes, ``[*batch_size]``: each as often."""
    return torch.randint(number, batch_size, generator=generator)


if __name__ == "__main__":
    command(main)
