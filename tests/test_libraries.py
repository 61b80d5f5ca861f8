"""Recipes on other libraries' envs, at tiny sizes: the contracts hold for each, and what they report. Libraries may be missing."""

import math
from importlib import import_module
from pathlib import Path

import pytest
import torch

from recipes import pop_gym
from recipes.experiment import HELD_OUT_TASKS, Experiment, arguments
from rl2_torchrl import check_training
from rl2_torchrl.testing import check_trial_env

#: Of each recipe's module: the library that it needs, options that make it tiny, and rules of `check_training` that nobody can
#: check there: of tasks that there are none of (an episode is one), or so few that training plays all of them.
NO_TASKS = {"task_constant", "tasks_drawn", "tasks_differ", "tasks_held_out", "task_hidden"}
FEW_TASKS = {"tasks_held_out"}
RECIPES = {
    "cartpole": ("gymnasium", {}, set()),
    "minigrid_memory": ("minigrid", {}, NO_TASKS),
    "meta_world": ("metaworld", {"horizon": 20}, FEW_TASKS),
    "pop_gym": ("popgym", {}, NO_TASKS),
    "point_mass": ("dm_control", {"steps": 13}, set()),
    "brax_pendulum": ("brax", {"steps": 20}, FEW_TASKS),
}
TINY = {"trials": 4, "units": 4, "report_tasks": 4, "epochs": 1, "minibatches": 2, "env_steps": 1, "progress": False}


def run(name, folder, **options):
    library, sizes, _ = RECIPES[name]
    pytest.importorskip(library)
    main = import_module(f"recipes.{name}").main
    return main(**arguments(main, {**TINY, **sizes, "log_dir": Path(folder), **options}))


class BeforeTraining(Exception):
    """Raised in place of a training, with what was to be trained."""


@pytest.mark.parametrize("name", RECIPES)
def test_contracts_hold(name, tmp_path, monkeypatch):
    def stop(self, collector, update, **options):
        raise BeforeTraining(self, collector, update)

    monkeypatch.setattr(Experiment, "train", stop)
    with pytest.raises(BeforeTraining) as stopped:
        run(name, tmp_path)
    played, collector, update = stopped.value.args
    has_tasks, unknown = RECIPES[name][2] is not NO_TASKS, RECIPES[name][2]
    held_out = played.tasks(HELD_OUT_TASKS, 8) if has_tasks else None
    # Where all trials are as long as a batch, none begins within one.
    assert set(check_training(collector, update, held_out=held_out).unchecked) - {"trials_apart"} == unknown
    check_trial_env(collector.env, task_key="task" if has_tasks else None)
