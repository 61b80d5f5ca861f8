"""Every recipe at a tiny size."""

from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch
from uuid import uuid4

import gymnasium
from matplotlib.figure import Figure

from recipes import (
    ant_direction,
    bandit,
    cartpole,
    grid_navi,
    half_cheetah,
    pendulum,
    point_robot,
    tabular_mdp,
    walker,
)
from recipes.command import arguments
from recipes.experiment import Experiment
from recipes.streams import HELD_OUT_TASKS


@dataclass
class Recipe:
    """A recipe's module, arguments that make it tiny, its batch in env steps, and what its report must hold."""

    module: Any
    tiny: dict[str, Any]
    batch: int
    baselines: set[str]
    optimum: float | None
    first_episode: float | None  # what an episode pays to one who knows nothing, whatever the policy
    bad: dict[str, dict[str, Any]] = field(default_factory=dict)


RECIPES = {
    "bandit": Recipe(
        bandit,
        {"arms": 2, "pulls": 3, "trials": 32, "units": 4, "report_tasks": 200, "epochs": 1, "minibatches": 2},
        batch=32 * 3,
        baselines={"random", "greedy", "ucb1", "thompson_sampling"},
        optimum=5 / 3,  # worked out by hand in test_baselines.py
        first_episode=0.5,
        bad={
            "num_arms=0": {"arms": 0},
            "episodes=0 must be": {"pulls": 0},
            "report_tasks=1: rewards": {"report_tasks": 1},
        },
    ),
    "grid_navi": Recipe(
        grid_navi,
        {"trials": 8, "units": 4, "report_tasks": 42, "epochs": 1, "minibatches": 2},
        batch=8 * 4 * 15,
        baselines={"goal_known"},
        optimum=37.2142857,  # see test_grid_search.py
        first_episode=None,
    ),
    "point_robot": Recipe(
        point_robot,
        {"trials": 8, "units": 4, "report_tasks": 21, "epochs": 1, "minibatches": 2},
        batch=8 * point_robot.BATCH_STEPS,
        baselines=set(),
        optimum=None,
        first_episode=None,
        bad={"episodes=0 must be": {"episodes": 0}},
    ),
    "cartpole": Recipe(
        cartpole,
        {"trials": 4, "units": 4, "report_tasks": 6, "epochs": 1},
        batch=4 * cartpole.BATCH_STEPS,
        baselines=set(),
        optimum=None,
        first_episode=None,
        bad={"episodes=0 must be": {"episodes": 0}},
    ),
    "pendulum": Recipe(
        pendulum,
        {"trials": 4, "units": 4, "episodes": 1, "report_tasks": 6, "epochs": 1},
        batch=4 * pendulum.BATCH_STEPS,
        baselines=set(),
        optimum=None,
        first_episode=None,
        bad={"episodes=0 must be": {"episodes": 0}},
    ),
    "walker": Recipe(
        walker,
        {"trials": 2, "units": 4, "horizon": 20, "report_tasks": 3, "epochs": 1, "minibatches": 2},
        batch=2 * walker.BATCH_STEPS,
        baselines=set(),
        optimum=None,
        first_episode=None,
        bad={"episodes=0 must be": {"episodes": 0}},
    ),
    "tabular_mdp": Recipe(
        tabular_mdp,
        {"episodes": 2, "trials": 8, "units": 4, "report_tasks": 200, "epochs": 1, "minibatches": 2},
        batch=8 * 2 * 10,
        baselines={"random", "psrl", "beb"},
        optimum=None,
        first_episode=None,
        bad={"episodes=0 must be": {"episodes": 0}},
    ),
    "ant_direction": Recipe(
        ant_direction,
        {"trials": 3, "units": 4, "horizon": 4, "report_tasks": 7, "epochs": 1, "minibatches": 2},
        batch=3 * 2 * 4,
        baselines=set(),
        optimum=None,
        first_episode=None,
        bad={"horizon=0": {"horizon": 0}},
    ),
    "half_cheetah": Recipe(
        half_cheetah,
        {"trials": 3, "units": 4, "horizon": 4, "report_tasks": 7, "epochs": 1, "minibatches": 2},
        batch=3 * 2 * 4,
        baselines=set(),
        optimum=None,
        first_episode=None,
        bad={
            "horizon=0": {"horizon": 0},
            "must be above the first": {"task": "velocity", "max_velocity": 0.0},
            "is for --task velocity": {"max_velocity": 3.0},
        },
    ),
}


def options_of(name, folder, *, updates=2, **options):
    recipe = RECIPES[name]
    return {**recipe.tiny, "env_steps": updates * recipe.batch, "log_dir": folder, "progress": False, **options}


def run(name, folder, *, painted=False, **options):
    """The report of a tiny run, whose figures are drawn up; ``painted``: and painted, which takes as long as all else."""
    main, options = RECIPES[name].module.main, options_of(name, folder, **options)
    with short_episodes(), few_held_out_tasks(), nullcontext() if painted else without_paint():
        return main(**arguments(main, options))


def trained(name, folder, **options):
    """The `TrainResult` of a tiny run, of which nothing is reported."""
    results, train = [], Experiment.train

    def kept(*args, **how):
        results.append(train(*args, **how))
        raise AfterTraining

    with patch.object(Experiment, "train", kept), suppress(AfterTraining):
        run(name, folder, **options)
    return results[0]


def short_episodes():
    """Those of Gymnasium's pendulums have 40 steps in place of 200."""
    return patch.object(gymnasium.spec("Pendulum-v1"), "max_episode_steps", 40)


def few_held_out_tasks(tasks=Experiment.tasks):
    """Trainings are evaluated on no more than 8 tasks."""

    def few(experiment, stream, number):
        return tasks(experiment, stream, min(number, 8) if stream == HELD_OUT_TASKS else number)

    return patch.object(Experiment, "tasks", few)


def without_paint():
    """Figures are drawn up and not painted: `Figure.savefig` leaves a file that no other is like."""

    def save(figure, path, **how):
        Path(path).write_bytes(b"\x89PNG of " + uuid4().bytes)

    return patch.object(Figure, "savefig", save)


def result_of(report):
    """What of a report, or of one that was stored, the seed decides."""
    report = report if isinstance(report, dict) else report.to_dict()
    rows = report["train"]["history"]
    rows = [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]
    return rows, report["agent"], report["baselines"], report["ablations"]


class BeforeTraining(Exception):
    """Raised in place of a training, with what was to be trained."""


class AfterTraining(Exception):
    """Raised in place of a report."""
