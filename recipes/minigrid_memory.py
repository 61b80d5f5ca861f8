"""RL² on MiniGrid's memory corridors: what is seen at the start says which way to turn at the end; a grid read by convolutions."""

from functools import partial
from pathlib import Path

import gymnasium
import torch
from torchrl.envs import Compose, TransformedEnv

from recipes.command import command
from recipes.experiment import Experiment, publish
from recipes.minigrid_envs import Corridor, OneHotView
from recipes.presets import PRESETS
from recipes.run import Run
from recipes.settings import Learning, Network, Told, told_of
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

PRESET = PRESETS["MiniGrid-MemoryS7-v0"]
RUN = Run(Path("runs/minigrid_memory"), report_tasks=512)
#: Steps of a batch in each row, and of a chunk that gradients go through.
BATCH_STEPS = 64


def main(
    *,
    env_id: str = "MiniGrid-MemoryS7-v0",
    from_room: bool = False,
    belief: float = 0.0,
    network: Network = PRESET.network,
    learning: Learning = PRESET.learning,
    run: Run = RUN,
) -> AdaptationReport:
    """Trains a GRU that remembers an object until the corridor's end, and reports how often it goes to the same one there.

    Each episode is a corridor of its own, and a trial: what is to be remembered is within it.

    Args:
        env_id: one of MiniGrid's memory envs.
        from_room: whether episodes begin beside the object (`Corridor`), and not anywhere in the corridor, from where one must go
            back to see it. From size 11 on what was seen must then be remembered, since it cannot be looked up from the end.
        belief: weight of a loss that the memory tells the object by (`TaskBelief`), which only training sees; 0 for none.
        network: actor and critic, which share the core.
        learning: batches, and PPO on them.
        run: seeds, where the run begins, which processes play, and what it leaves.
    """
    torch.manual_seed(run.seed)

    def make_env(_: TaskSampler | None, rows: int) -> TransformedEnv:
        corridors = GymVectorEnv(partial(corridor, env_id, from_room), rows, info_keys=["success", "is_ball"])
        return TransformedEnv(corridors, Compose(Trial(episodes=1), PreviousStep()))

    env = make_env(None, learning.trials)
    actor = GRUCategoricalActor.from_env(env, **network.actor)  # the image gets a ConvEncoder
    critic = MemoryValueHead.from_env(env, actor, **network.value_head(detach=False))
    policy = ActorCritic(actor, critic)
    terms = [TaskBelief(network.units, 1, coefficient=belief, task_key=("info", "is_ball"))] if belief else []
    update = PPOUpdate(
        RL2PPOLoss(actor, critic, clip_epsilon=0.2, **learning.loss, terms=terms),
        TrialAdvantage(**learning.advantage, critic=policy),
        bptt=BATCH_STEPS,
        **learning.update,
    )
    collector = run.collector(make_env, env, policy, update, **learning.frames(BATCH_STEPS))
    measured = {"rows": 64, "held_out_tasks": 128, "measures": {("info", "success"): "max"}}
    corridors = Experiment(actor, make_env, no_tasks, run, **measured)
    result = corridors.train(collector, update, eval_interval=100)
    title = f"RL² on {env_id}{told_of(network, Told(belief=belief), run.weights)}"
    return publish(corridors.report(result, title=title), run)


def corridor(env_id: str, from_room: bool) -> OneHotView:
    """A corridor as the agent sees it; its episode is a success if it ends at the right one of two objects."""
    return OneHotView(Corridor(gymnasium.make(env_id), from_room))


def no_tasks(batch_size: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Stand-ins for tasks, ``[*batch_size, 1]``: every episode is a corridor of its own."""
    return torch.zeros(*batch_size, 1)


if __name__ == "__main__":
    command(main)
