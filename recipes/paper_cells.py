"""The cells of the paper's tables: the tasks, the classical agents that play them, and the recipe that trains RL² on them.

Tasks for tuning, for evaluations during training and for the report are the same whatever the training's seed, and come from
streams that never meet: all agents of a cell are reported on the same tasks.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from functools import partial
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Generator

from recipes import bandit, tabular_mdp
from recipes.command import arguments
from recipes.paper_numbers import PAPER
from recipes.paper_settings import RL2_SETTINGS
from recipes.rules import LearnsFrom
from recipes.run import Run
from recipes.streams import CLASSICAL_AGENTS, REPORT_TASKS, TUNING_TASKS, draw_tasks, stream_seed
from rl2_torchrl import AdaptationReport, baselines
from rl2_torchrl.baselines import mdps
from rl2_torchrl.envs import random_mdps, uniform_means, unpack_mdps
from rl2_torchrl.evaluation import AdaptationCurve

__all__ = ["CELLS", "BanditCell", "Cell", "Classical", "MDPCell"]

TASK_SEED = 2016  # of all tasks but those of the trainings


@dataclass(frozen=True)
class Classical:
    """What a classical agent earned, the options that tuning chose for it, and on how many tasks."""

    curve: AdaptationCurve
    options: Mapping[str, float]
    tuning_tasks: int


@dataclass(frozen=True)
class _Cell:
    """What all cells have in common; a cell's sizes are its fields."""

    recipe: ClassVar[ModuleType]
    table: ClassVar[str]

    def train(self, learns_from: LearnsFrom, **options: Any) -> AdaptationReport:
        """Trains RL² as the cell's settings and ``options`` say, or evaluates it where ``options`` name weights."""
        return self.recipe.main(**self._arguments(learns_from, options))

    def settings(self, learns_from: LearnsFrom, **options: Any) -> dict[str, Any]:
        """All settings of a training, those of the rule among them."""
        return flat(self._arguments(learns_from, options))

    def _arguments(self, learns_from: LearnsFrom, options: dict[str, Any]) -> dict[str, Any]:
        chosen = RL2_SETTINGS[self.table][self.name].get(learns_from, {})
        settings = {**asdict(self), "learns_from": learns_from, **chosen, **options}
        return arguments(self.recipe.main, {**settings, "held_out_seed": TASK_SEED, "classical": False})


@dataclass(frozen=True)
class BanditCell(_Cell):
    """A cell of table 1: ``pulls`` pulls of a bandit of ``arms`` arms."""

    pulls: int
    arms: int
    recipe: ClassVar[ModuleType] = bandit
    table: ClassVar[str] = "bandits"
    agents: ClassVar[Mapping[str, Callable[..., torch.Tensor]]] = {
        "random": baselines.random_agent,
        "gittins": baselines.gittins_agent,
        "thompson_sampling": baselines.thompson_sampling,
        "optimistic_thompson_sampling": baselines.optimistic_thompson_sampling,
        "ucb1": baselines.ucb1,
        "epsilon_greedy": baselines.epsilon_greedy,
        "greedy": baselines.greedy,
    }

    @property
    def name(self) -> str:
        return f"{self.pulls},{self.arms}"

    @property
    def classical_agents(self) -> list[str]:
        """The table's agents, and the Bayes optimum where it can be computed."""
        return [*self.agents, *(["optimum"] if self.pulls <= 10 else [])]

    def num_tasks(self, agent: str, asked: int) -> int:
        """Reporting tasks for an agent: optimistic Thompson sampling would take 10 minutes for 10,000 of the largest cell."""
        slow = agent == "optimistic_thompson_sampling" and self.pulls * self.arms > 10_000
        return min(asked, 2000) if slow else asked

    def play(self, agent: str, num_tasks: int) -> Classical:
        """Tunes a classical agent on tasks of its own and plays it on the reporting tasks."""
        if agent == "optimum":
            exact = baselines.bayes_optimal_return(self.arms, self.pulls)  # over all tasks: no standard error
            return Classical(AdaptationCurve(torch.full((num_tasks, 1), exact, dtype=torch.float64)), {}, 0)
        generator = Generator().manual_seed(stream_seed(TASK_SEED, CLASSICAL_AGENTS))
        function, number = self.agents[agent], min(2 * num_tasks, self._most_tuning_tasks(agent))
        tuning = draw_tasks(uniform_means(self.arms), TASK_SEED, TUNING_TASKS, number)
        options = baselines.tune(function, tuning, self.pulls, generator)
        tasks = draw_tasks(uniform_means(self.arms), TASK_SEED, REPORT_TASKS, num_tasks)
        returns = function(tasks, self.pulls, generator, **options)
        return Classical(AdaptationCurve(returns.double()), options, number if options else 0)

    def _most_tuning_tasks(self, agent: str) -> int:
        if agent == "optimistic_thompson_sampling":
            return 4000 if self.pulls <= 10 else 1000
        return 20_000 if self.pulls <= 100 else 5000


@dataclass(frozen=True)
class MDPCell(_Cell):
    """A cell of table 2: ``episodes`` episodes of a tabular MDP."""

    episodes: int
    recipe: ClassVar[ModuleType] = tabular_mdp
    table: ClassVar[str] = "mdps"
    agents: ClassVar[Mapping[str, Callable[..., torch.Tensor]]] = {
        "random": mdps.random_agent,
        "psrl": mdps.psrl,
        "opsrl": mdps.opsrl,
        "ucrl2": mdps.ucrl2,
        "beb": mdps.beb,
        "epsilon_greedy": mdps.epsilon_greedy,
        "greedy": mdps.greedy,
        "perfect_memory": partial(mdps.perfect_memory, optimism=0.0),
        "optimistic_memory": mdps.perfect_memory,
    }

    @property
    def name(self) -> str:
        return str(self.episodes)

    @property
    def classical_agents(self) -> list[str]:
        """The table's agents, and the optimum of one who knows the task from the start."""
        return [*self.agents, "optimum"]

    def num_tasks(self, agent: str, asked: int) -> int:
        """Reporting tasks for an agent: as many as are asked for."""
        return asked

    def play(self, agent: str, num_tasks: int) -> Classical:
        """Tunes a classical agent on tasks of its own and plays it on the reporting tasks."""
        worlds = unpack_mdps(draw_tasks(random_mdps(), TASK_SEED, REPORT_TASKS, num_tasks))
        if agent == "optimum":
            returns = baselines.optimal_return(worlds).double() * self.episodes
            return Classical(AdaptationCurve(returns.unsqueeze(-1)), {}, 0)
        generator = Generator().manual_seed(stream_seed(TASK_SEED, CLASSICAL_AGENTS))
        # Of UCRL2's scalings 300 tasks chose one that cost 3 at n = 10; OPSRL is slow, and its choice matters little.
        number = min(num_tasks, 300 if agent == "opsrl" else 2000)
        tuning = unpack_mdps(draw_tasks(random_mdps(), TASK_SEED, TUNING_TASKS, number))
        options = baselines.tune(self.agents[agent], tuning, self.episodes, generator)
        returns = self.agents[agent](worlds, self.episodes, generator, **options)
        return Classical(AdaptationCurve(returns.double()), options, number if options else 0)


Cell = BanditCell | MDPCell

CELLS: dict[str, dict[str, Cell]] = {
    "bandits": {name: BanditCell(*map(int, name.split(","))) for name in PAPER["bandits"]},
    "mdps": {name: MDPCell(int(name)) for name in PAPER["mdps"]},
}
"""``CELLS[table][cell]``, with the names of `recipes.paper_numbers`."""


def flat(arguments: dict[str, Any]) -> dict[str, Any]:
    """Settings of network and learning, and what is told, of a recipe's ``arguments``, without what belongs to the single run."""
    parts = [asdict(part) for part in arguments.values() if is_dataclass(part) and not isinstance(part, Run)]
    others = {name: value for name, value in arguments.items() if not is_dataclass(value)}
    start = arguments["run"].initial_weights
    whole = {**others, **{name: value for part in parts for name, value in part.items()}}
    return whole if start is None else {**whole, "initial_weights": start}
