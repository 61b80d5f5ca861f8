"""RL² on Meta-World (Yu et al. 2019): a robot arm finds out within a trial where the hidden goal of its task lies."""

import pickle
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gymnasium
import numpy as np
import torch
from torchrl.envs import Compose, TransformedEnv

from recipes.command import command
from recipes.experiment import Experiment, publish
from recipes.presets import PRESETS
from recipes.run import Run
from recipes.settings import Learning, Network, Told, told_of
from recipes.streams import TRAIN_TASKS, stream_seed
from rl2_torchrl import (
    ActorCritic,
    AdaptationReport,
    GRUGaussianActor,
    GRUValueHead,
    PPOUpdate,
    PreviousStep,
    RL2PPOLoss,
    TaskBelief,
    TaskSampler,
    Trial,
    TrialAdvantage,
)
from rl2_torchrl.envs import GymVectorEnv
from rl2_torchrl.envs.layers import put_state, state_of

PRESET = PRESETS["Meta-World ML1"]
RUN = Run(Path("runs/meta_world"), report_tasks=50)
#: Training tasks of an env after `recombine`.
RECOMBINED = 2500


def main(
    *,
    benchmark: Literal["ML1", "ML10", "ML45"] = "ML1",
    task: str = "reach-v3",
    episodes: int = 3,
    horizon: int = 60,
    recombined: bool = True,
    belief: float = 1.0,
    vectorization: Literal["sync", "async"] = "sync",
    network: Network = PRESET.network,
    learning: Learning = PRESET.learning,
    run: Run = RUN,
) -> AdaptationReport:
    """Trains RL² on the training goals of a Meta-World benchmark, and reports successes on its test goals, episode by episode.

    An episode is a success if any of its steps is, as the benchmark counts. Goals are hidden from the observation, as it asks.

    Args:
        benchmark: goals of one task, or ten or 45 tasks to train on and five others to test on.
        task: the task of ML1; the others have their own.
        episodes: episodes of a trial.
        horizon: steps of an episode, up to Meta-World's 500.
        recombined: train on the goals of some training tasks with the objects of others, which the agent cannot learn by heart.
        belief: weight of a loss that the memory tells the task by (`TaskBelief`), which only training sees; 0 for none.
        vectorization: of the envs, one after the other or each in a process.
        network: actor and critic.
        learning: batches, and PPO on them.
        run: seeds, where the run begins, which processes play, and what it leaves.
    """
    if benchmark != "ML1" and task != "reach-v3":
        raise ValueError(f"task={task!r} is for ML1: {benchmark} has tasks of its own. Leave it out.")
    torch.manual_seed(run.seed)
    # Meta-World's own test goals of a seed are the training goals of the next one.
    goals = load_benchmark(benchmark, task, stream_seed(run.seed, TRAIN_TASKS))
    train_tasks = recombine(goals.train_tasks, run.seed) if recombined else goals.train_tasks

    def make_env(tasks: Sequence[Any], sampler: TaskSampler, rows: int) -> TransformedEnv:
        classes = {**goals.train_classes, **goals.test_classes}
        arms = GymVectorEnv(
            partial(Arm, classes, horizon), rows, set_task=Arm.set_task, tasks=tasks, info_keys=["success"],
            vectorization=vectorization,
        )  # fmt: skip
        return TransformedEnv(arms, Compose(Trial(episodes=episodes), sampler, PreviousStep()))

    draw = partial(indices, len(train_tasks))
    env = make_env(train_tasks, TaskSampler(draw, seed=stream_seed(run.seed, TRAIN_TASKS)), learning.trials)
    actor = GRUGaussianActor.from_env(env, **network.actor)
    critic = GRUValueHead.from_env(env, **network.critic)
    policy = ActorCritic(actor, critic)
    told = told_tasks(train_tasks)
    target = {"coefficient": belief, "target": lambda number: told[number]}
    terms = [TaskBelief(network.units, told.shape[1], **target)] if belief else []
    update = PPOUpdate(
        RL2PPOLoss(actor, critic, clip_epsilon=0.2, **learning.loss, terms=terms),
        TrialAdvantage(**learning.advantage, scale_rewards=True),
        **learning.update,
    )
    collector = run.collector(
        partial(make_env, train_tasks), env, policy, update, **learning.frames(episodes * horizon)
    )
    test, each = partial(make_env, goals.test_tasks), partial(spread, len(goals.test_tasks))
    measures = {"held_out_tasks": 50, "rows": 50, "measures": {("info", "success"): "max"}}
    arms = Experiment(actor, test, each, run, **measures)
    result = arms.train(collector, update, eval_interval=25)
    title = f"{title_of(benchmark, task, recombined)}{told_of(network, Told(belief=belief), run.weights)}"
    return publish(arms.report(result, title=title), run)


def title_of(benchmark: str, task: str, recombined: bool) -> str:
    """What is learnt, and from which tasks."""
    return f"RL² on Meta-World {benchmark}{f' {task}' * (benchmark == 'ML1')}{', not recombined' * (not recombined)}"


class Arm(gymnasium.Env):
    """The env of whichever task it is given, cut at ``horizon`` steps."""

    def __init__(self, classes: dict[str, Callable[[], gymnasium.Env]], horizon: int):
        self._classes, self._made, self._horizon = classes, {}, horizon
        self._env = self._of(next(iter(classes)))
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, self._env.observation_space.shape)
        self.action_space = self._env.action_space

    def _of(self, name: str) -> gymnasium.Env:
        if name not in self._made:
            self._made[name] = self._classes[name]()
        return self._made[name]

    def set_task(self, task: Any) -> None:
        """Takes one of the benchmark's tasks, env and goal."""
        self._env = self._of(task.env_name)
        self._env.set_task(task)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self._steps = 0
        return self._env.reset(seed=seed)

    def step(self, action: np.ndarray):
        observation, reward, terminated, truncated, info = self._env.step(action)
        self._steps += 1
        return observation, reward, terminated, truncated or self._steps >= self._horizon, info

    # For checkpoints, which bring the task back before.
    def get_state(self) -> dict[str, Any]:
        return {"steps": self._steps, "envs": {name: state_of(env) for name, env in self._made.items()}}

    def set_state(self, state: dict[str, Any]) -> None:
        self._steps = state["steps"]
        for name, env in state["envs"].items():
            put_state(self._of(name), env)


class Task(NamedTuple):
    """A task as Meta-World's envs take it: an env's name, and pickled places and options."""

    env_name: str
    data: bytes


def load_benchmark(benchmark: str, task: str, seed: int):
    """Meta-World's object with tasks to train and to test on."""
    try:
        import metaworld
    except ImportError as error:
        raise ImportError('Meta-World is an extra: pip install "rl2_torchrl[metaworld]".') from error
    if benchmark == "ML1":
        return metaworld.ML1(task, seed=seed)
    return getattr(metaworld, benchmark)(seed=seed)


def recombine(tasks: Sequence[Any], seed: int) -> list[Any]:
    """`RECOMBINED` tasks of each env in ``tasks``: the goal of one of its tasks with the object of another.

    Objects are seen: with fifty tasks an agent learns by heart which goal goes with which, adapts to nothing, and is lost on
    other tasks. Meta-World draws both independently, but for pairs too close to each other: none is taken that is closer
    than the closest in ``tasks``. Tasks that are not an object and a goal, ``[3 + 3]``, stay as they are.
    """
    generator = np.random.default_rng(seed)
    chosen = []
    for name in sorted({task.env_name for task in tasks}):
        data = [pickle.loads(task.data) for task in tasks if task.env_name == name]  # noqa: S301
        own = np.stack([each["rand_vec"] for each in data])
        objects, goals = generator.integers(len(own), size=(2, 4 * RECOMBINED))
        places = own[goals]
        if own.shape[1] == 6:
            places[:, :3] = own[objects, :3]
            places = places[gaps(places) >= gaps(own).min()]
        chosen += [Task(name, pickle.dumps({**data[0], "rand_vec": place})) for place in places[:RECOMBINED]]
    return chosen


def gaps(places: np.ndarray) -> np.ndarray:
    """How far goals are from objects ``[n, 3 + 3]`` on the table (m), ``[n]``."""
    return np.linalg.norm(places[:, :2] - places[:, 3:5], axis=1)


def told_tasks(tasks: Sequence[Any]) -> torch.Tensor:
    """What training may know of the tasks: where goal and objects are, at unit scale, and which env, ``[num_tasks, n]``."""
    places = [torch.as_tensor(pickle.loads(task.data)["rand_vec"], dtype=torch.float32) for task in tasks]  # noqa: S301
    places = torch.nn.utils.rnn.pad_sequence(places, batch_first=True)
    places = (places - places.mean(0)) / places.std(0).clamp_min(1e-6)
    names = sorted({task.env_name for task in tasks})
    which = torch.nn.functional.one_hot(torch.tensor([names.index(task.env_name) for task in tasks])).float()
    return torch.cat([places, which], 1) if len(names) > 1 else places


def indices(number: int, batch_size: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Which task to train on, ``[*batch_size]``: each of ``number`` as often."""
    return torch.randint(number, batch_size, generator=generator)


def spread(number: int, batch_size: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Test tasks ``[*batch_size]``, of every env as many: a benchmark has its ``number`` of them env by env."""
    chosen = batch_size.numel()
    return (torch.arange(chosen) * number // chosen).reshape(batch_size)


if __name__ == "__main__":
    command(main)
