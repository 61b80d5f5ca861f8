"""Every recipe at a tiny size: its report's promises, its seeds, resuming it, its command line and bad arguments."""

import inspect
import json
import math
import pickle
import re
import runpy
import sys
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from recipe_settings import unused
from tensordict import TensorDict

from recipes import (
    ant_direction,
    bandit,
    cartpole,
    experiment,
    grid_navi,
    half_cheetah,
    pendulum,
    point_robot,
    results,
    tabular_mdp,
    walker,
)
from recipes.experiment import Experiment, Run, arguments, draw_tasks, stream_seed
from rl2_torchrl import AdaptiveAgent, GRUGaussianActor, TaskSampler, Trial
from rl2_torchrl.envs import uniform_means
from rl2_torchrl.testing import check_trial_env

ROOT = Path(__file__).parent.parent


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
            r"batch_size=\(0,\)": {"trials": 0},
            "total_frames=0": {"env_steps": 0},
            "never ends": {"env_steps": -1000},
            "report_tasks=1: rewards": {"report_tasks": 1},
            "hidden_size=0": {"units": 0},
            "minibatches=0": {"minibatches": 0},
            "epochs=0": {"epochs": 0},
            "gamma=1.5": {"gamma": 1.5},
            "lmbda=-0.1": {"lmbda": -0.1},
            "learning rate": {"lr": -1.0},
        },
    ),
    "grid_navi": Recipe(
        grid_navi,
        {"trials": 8, "units": 4, "report_tasks": 21, "epochs": 1, "minibatches": 2},
        batch=8 * 4 * 15,
        baselines={"goal_known"},
        optimum=37.2142857,  # see test_grid_search.py
        first_episode=None,
        bad={
            r"batch_size=\(0,\)": {"trials": 0},
            "total_frames=0": {"env_steps": 0},
            "hidden_size=0": {"units": 0},
            "lmbda=-0.1": {"lmbda": -0.1},
        },
    ),
    "point_robot": Recipe(
        point_robot,
        {"trials": 8, "units": 4, "report_tasks": 21, "epochs": 1, "minibatches": 2},
        batch=8 * point_robot.BATCH_STEPS,
        baselines=set(),
        optimum=None,
        first_episode=None,
        bad={
            "episodes=0 must be": {"episodes": 0},
            r"batch_size=\(0,\)": {"trials": 0},
            "total_frames=0": {"env_steps": 0},
            "hidden_size=0": {"units": 0},
        },
    ),
    "cartpole": Recipe(
        cartpole,
        {"trials": 4, "units": 4, "report_tasks": 6, "epochs": 1},
        batch=4 * cartpole.BATCH_STEPS,
        baselines=set(),
        optimum=None,
        first_episode=None,
        bad={
            "episodes=0 must be": {"episodes": 0},
            "num_envs=0": {"trials": 0},
            "hidden_size=0": {"units": 0},
        },
    ),
    "pendulum": Recipe(
        pendulum,
        {"trials": 4, "units": 4, "report_tasks": 6, "epochs": 1},
        batch=4 * pendulum.BATCH_STEPS,
        baselines=set(),
        optimum=None,
        first_episode=None,
        bad={
            "episodes=0 must be": {"episodes": 0},
            "num_envs=0": {"trials": 0},
            "hidden_size=0": {"units": 0},
        },
    ),
    "walker": Recipe(
        walker,
        {"trials": 2, "units": 4, "horizon": 20, "report_tasks": 3, "epochs": 1, "minibatches": 2},
        batch=2 * walker.BATCH_STEPS,
        baselines=set(),
        optimum=None,
        first_episode=None,
        bad={
            "episodes=0 must be": {"episodes": 0},
            "num_envs=0": {"trials": 0},
            "hidden_size=0": {"units": 0},
        },
    ),
    "tabular_mdp": Recipe(
        tabular_mdp,
        {"episodes": 2, "trials": 8, "units": 4, "report_tasks": 200, "epochs": 1, "minibatches": 2},
        batch=8 * 2 * 10,
        baselines={"random", "psrl", "beb"},
        optimum=None,
        first_episode=None,
        bad={
            "episodes=0 must be": {"episodes": 0},
            r"batch_size=\(0,\)": {"trials": 0},
            "total_frames=0": {"env_steps": 0},
            "hidden_size=0": {"units": 0},
            "gamma=1.5": {"gamma": 1.5},
        },
    ),
    "ant_direction": Recipe(
        ant_direction,
        {"trials": 3, "units": 4, "horizon": 4, "report_tasks": 7, "epochs": 1, "minibatches": 2},
        batch=3 * 2 * 4,
        baselines=set(),
        optimum=None,
        first_episode=None,
        bad={
            "horizon=0": {"horizon": 0},
            r"batch_size=\(0,\)": {"trials": 0},
            "total_frames=0": {"env_steps": 0},
            "hidden_size=0": {"units": 0},
        },
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
            r"batch_size=\(0,\)": {"trials": 0},
            "total_frames=0": {"env_steps": 0},
            "hidden_size=0": {"units": 0},
            "report_tasks=1": {"report_tasks": 1},
            "must be above the first": {"task": "velocity", "max_velocity": 0.0},
        },
    ),
}


def run(name, folder, *, updates=2, **options):
    recipe = RECIPES[name]
    sizes = {**recipe.tiny, "env_steps": updates * recipe.batch}
    options = {**sizes, "log_dir": folder, "progress": False, **options}
    return recipe.module.main(**arguments(recipe.module.main, options))


def result_of(report):
    """What of a report the seed decides."""
    report = report.to_dict()
    rows = report["train"]["history"]
    rows = [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]
    return rows, report["agent"], report["baselines"], report["ablations"]


@pytest.fixture(scope="module", params=RECIPES)
def finished(request, tmp_path_factory):
    """A recipe's name, its report and its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, run(request.param, folder, seed=3), folder


def test_report_holds_what_is_promised(finished):
    name, report, folder = finished
    recipe, stored = RECIPES[name], json.loads((folder / "report.json").read_text())
    assert stored == report.to_dict()
    num_tasks = recipe.tiny["report_tasks"]
    assert stored["agent"]["num_tasks"] == num_tasks
    assert {label.partition(" (")[0] for label in stored["baselines"]} == recipe.baselines
    assert set(stored["ablations"]) == {"memory_zeroed", "rewards_shuffled"}
    for curve in (stored["agent"], *stored["baselines"].values(), *stored["ablations"].values()):
        assert curve["num_tasks"] == num_tasks
        assert curve["mean"] == pytest.approx(sum(curve["per_episode"]))
        assert curve["se"] > 0
        # Nobody, trained or not, knows a held-out task before its first episode.
        if recipe.first_episode is not None:
            assert abs(curve["per_episode"][0] - recipe.first_episode) < 4 * curve["per_episode_se"][0]
    assert stored["optimum"] == (None if recipe.optimum is None else pytest.approx(recipe.optimum))
    assert math.isfinite(stored["agent"]["greedy_mean"])
    assert stored["train"]["env_steps"] == 2 * recipe.batch
    assert stored["train"]["seconds"] > 0
    assert [row["env_steps"] for row in stored["train"]["history"]] == [recipe.batch, 2 * recipe.batch]
    assert "eval/trial_return" in stored["train"]["history"][-1]
    assert stored["seed"] == 3
    assert stored["command"]
    assert {"python", "torch", "torchrl", "rl2_torchrl"} <= set(stored["versions"])


def test_run_folder(finished):
    _, report, folder = finished
    about = (folder / "about.txt").read_text()
    assert about.startswith(f"{report.to_dict()['command']}\ncommit ")
    for told in ("torchrl 0.", "PreviousStep", "GRUCore", "Advantage", "lmbda=", "Adam", "lr="):
        assert told in about
    files = about.rpartition("\n\n")[2].splitlines()
    assert [line.split()[0] for line in files if not (folder / line.split()[0]).exists()] == []
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "checkpoints").iterdir())
    assert list(folder.rglob("trial_return.csv"))


def test_same_seed_same_report(finished, tmp_path):
    name, report, _ = finished
    assert result_of(run(name, tmp_path / "same", seed=3)) == result_of(report)
    assert result_of(run(name, tmp_path / "other", seed=4)) != result_of(report)


def test_resume_goes_on(finished, tmp_path):
    name, report, _ = finished
    run(name, tmp_path, seed=3)
    longer = run(name, tmp_path, seed=3, updates=3, resume=True)
    assert longer.train.env_steps == 3 * RECIPES[name].batch
    assert longer.train.history[1]["train/loss"] == report.train.history[1]["train/loss"]
    assert len(longer.train.history) == 3


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_what_is_refused_changes_nothing_in_the_folder(tmp_path):
    run("grid_navi", tmp_path, seed=3)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match="other settings"):
        run("grid_navi", tmp_path, seed=3, lr=0.5, resume=True)
    with pytest.raises(ValueError, match="holds the report of a training.*name another folder"):
        run("grid_navi", tmp_path, weights=tmp_path / "agent.safetensors")
    assert files_of(tmp_path) == before


def test_a_new_run_puts_away_what_the_last_one_left(tmp_path, caplog):
    run("grid_navi", tmp_path, seed=3)
    kept = {
        name: (tmp_path / name).read_bytes() for name in ("about.txt", "agent.safetensors", "report.json", "report.png")
    }
    (tmp_path / "earlier").mkdir()
    for name in ("mine.txt", "path_of_the_run_before.png"):
        (tmp_path / "earlier" / name).touch()
    longer = run("grid_navi", tmp_path, seed=4, updates=3)
    assert (tmp_path / "earlier" / "mine.txt").exists()
    assert not (tmp_path / "earlier" / "path_of_the_run_before.png").exists()
    assert {name: (tmp_path / "earlier" / name).read_bytes() for name in kept} == kept
    assert f"its report and agent are in {tmp_path / 'earlier'}" in caplog.text
    assert json.loads((tmp_path / "report.json").read_text())["seed"] == 4
    [losses] = (tmp_path / "scalars" / "scalars").rglob("loss.csv")
    assert len(losses.read_text().splitlines()) == len(longer.train.history) == 3


def test_a_resume_with_nothing_left_leaves_the_run_as_it_was(tmp_path):
    run("grid_navi", tmp_path, seed=3)
    run("grid_navi", tmp_path, seed=3, lr=0.5, resume=True, resume_changes=("update.lr",))
    assert run("grid_navi", tmp_path, seed=3, updates=3, resume=True).train.history[-1]["train/lr"] < 0.003


def test_bandits_of_training_agent_and_classical_agents(tmp_path, monkeypatch):
    seen = {"training": set(), "held out": set(), "classical": set(), "tuning": set()}

    def record(what, tasks):
        seen[what].update(map(tuple, tasks.tolist()))
        return tasks

    class Recorded(TaskSampler):
        def __init__(self, distribution, **options):
            super().__init__(lambda size, generator: record("training", distribution(size, generator)), **options)

        @classmethod
        def fixed(cls, tasks, **options):
            return TaskSampler.fixed(record("held out", tasks), **options)

    def recorded_curve(*args, deterministic=False, **options):
        modes.append(deterministic)
        return adaptation_curve(*args, deterministic=deterministic, **options)

    modes, adaptation_curve, greedy = [], experiment.adaptation_curve, bandit.baselines.greedy
    tune = bandit.baselines.tune
    monkeypatch.setattr(
        bandit.baselines, "tune", lambda agent, means, *args: tune(agent, record("tuning", means), *args)
    )
    monkeypatch.setattr(experiment, "adaptation_curve", recorded_curve)
    monkeypatch.setattr(experiment, "TaskSampler", Recorded)
    monkeypatch.setattr(bandit, "TaskSampler", Recorded)
    monkeypatch.setattr(bandit.baselines, "greedy", lambda means, *args: greedy(record("classical", means), *args))
    run("bandit", tmp_path)
    assert len(seen["training"]) >= 2 * 32
    assert not seen["training"] & seen["held out"]
    assert len(seen["tuning"]) >= 1000
    assert not seen["tuning"] & (seen["held out"] | seen["training"])
    assert len(seen["classical"]) == 200
    assert seen["classical"] < seen["held out"]  # the rest are the bandits of the evaluations during training
    assert modes == [False, False, False, True, False, False]  # 2 evaluations, sampling, greedy, 2 ablations


@pytest.mark.parametrize("mode", ["trial", "original"])
@pytest.mark.parametrize("task", ["direction", "velocity"])
def test_cheetahs_modes_and_tasks(mode, task, tmp_path):
    run("half_cheetah", tmp_path, mode=mode, task=task, updates=1)
    stored = json.loads((tmp_path / "report.json").read_text())
    episodes = half_cheetah.cheetah_settings(task, mode)["episodes"]
    tables = [stored["forward"], stored["backward"]] if task == "direction" else [stored["speed_error"]]
    for table in tables:
        assert set(table) == {"agent", "greedy", "memory_zeroed", "rewards_shuffled"}
        for entry in table.values():
            per_episode = entry if task == "direction" else entry["per_episode"]
            assert len(per_episode) == episodes
            assert all(map(math.isfinite, per_episode))
    assert (tmp_path / "velocity.png").read_bytes().startswith(b"\x89PNG")


class BeforeTraining(Exception):
    """Raised in place of a training, with what was to be trained."""


@pytest.mark.parametrize(("task", "tasks", "steps"), [("direction", 4, 800), ("velocity", 10, 1200)])
def test_original_mode_is_the_first_implementation(task, tasks, steps, tmp_path, monkeypatch):
    # Its defaults, and its meta-batches: 4 tasks of 800 steps and 10 of 1200, episodes of 200 steps.
    def stop(self, collector, update, **_):
        raise BeforeTraining(collector, update)

    monkeypatch.setattr(Experiment, "train", stop)
    with pytest.raises(BeforeTraining) as stopped:
        half_cheetah.main(task=task, mode="original", run=Run(tmp_path))
    collector, update = stopped.value.args
    (trial,) = [transform for transform in collector.env.transform if isinstance(transform, Trial)]
    assert (trial.episodes, collector.env.base_env.max_episode_steps) == (steps // 200, 200)
    assert (collector.env.batch_size, collector.requested_frames_per_batch) == ((tasks,), tasks * steps)
    loss, advantage, options = update.loss, update.advantage, update.optimizer.param_groups[0]
    assert (update.epochs, update.bptt, update.shuffle, update.max_grad_norm) == (10, 1, False, None)
    assert update.minibatches == tasks * steps // 32
    assert (options["lr"], update.lr_schedule, update.entropy_schedule) == (1e-4, None, None)
    assert (advantage.gamma, advantage.lmbda, advantage.value_target) == (0.99, 0.97, "return")
    assert not advantage.scale_rewards
    assert float(loss.clip_epsilon) == pytest.approx(0.3)
    assert (float(loss.critic_coeff), loss.entropy_bonus) == (0.5, False)


@pytest.mark.parametrize("task", ["direction", "velocity"])
def test_the_cheetah_scales_rewards_and_its_entropy_bonus_decays(task):
    trials = half_cheetah.CheetahTrials(task, episodes=2, horizon=4, max_velocity=2.0, seed=0)
    settings = half_cheetah.cheetah_settings(task)
    learning = replace(settings["learning"], trials=2, minibatches=2)
    _, update = half_cheetah.compose(trials, "trial", settings["network"], learning)
    assert (update.advantage.scale_rewards, update.loss.entropy_bonus) == (True, True)
    assert float(update.loss.entropy_coeff) == pytest.approx(0.01)
    assert (update.lr_schedule(0.5), update.entropy_schedule(0.5)) == (0.5, 0.5)


@pytest.mark.parametrize("entropy", [0.3, 0.0])
@pytest.mark.parametrize("name", RECIPES)
def test_the_entropy_bonus_decays_as_it_is_told_and_may_be_left_out(name, entropy, tmp_path, monkeypatch):
    def stop(self, collector, update, **_):
        raise BeforeTraining(update)

    monkeypatch.setattr(Experiment, "train", stop)
    with pytest.raises(BeforeTraining) as stopped:
        run(name, tmp_path, entropy=entropy, entropy_decay="late")
    (update,) = stopped.value.args
    assert (update.lr_schedule(0.5), update.loss.entropy_bonus) == (0.5, entropy > 0)
    if entropy:
        assert (float(update.loss.entropy_coeff), update.entropy_schedule(0.5)) == (pytest.approx(0.3), 0.75)
    else:
        assert update.entropy_schedule is None


@pytest.mark.parametrize("name", RECIPES)
def test_no_setting_is_without_effect(name, tmp_path, monkeypatch):
    def stop(self, collector, update, **_):
        raise BeforeTraining(collector, update)

    def stopped(**options):
        with pytest.raises(BeforeTraining) as caught:
            run(name, tmp_path, **options)
        return caught.value.args

    monkeypatch.setattr(Experiment, "train", stop)
    assert unused(RECIPES[name].module.main, stopped, {**RECIPES[name].tiny, "entropy": 0.5}) == []


def test_a_report_without_one_of_the_directions_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(half_cheetah.Cheetahs, "tasks", lambda cheetahs, stream, number: torch.ones(number, 1))
    run("half_cheetah", tmp_path, updates=1)
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["backward"]["agent"] == [None, None]
    assert all(map(math.isfinite, stored["forward"]["agent"]))


def test_filming_changes_nothing_else(tmp_path, monkeypatch):
    def drawn(env, row, *, width, height):  # a stand-in, which needs no OpenGL
        return torch.zeros(height, width, 3, dtype=torch.uint8)

    monkeypatch.setattr(half_cheetah.HalfCheetahDirection, "render", drawn)
    filmed = run("half_cheetah", tmp_path / "filmed", seed=3, video=True)
    assert result_of(filmed) == result_of(run("half_cheetah", tmp_path / "not", seed=3))
    for name in ("untrained.mp4", "trial.mp4"):
        assert (tmp_path / "filmed" / name).stat().st_size > 0
    assert not list((tmp_path / "not").glob("*.mp4"))


def test_errors_of_speed_are_made_positive_before_any_mean():
    record = half_cheetah.VelocityRecord()
    for velocity in ([1.0, 3.0], [3.0, 2.0], [2.0, 0.0], [2.0, 2.0]):
        step = {"next": {"velocity": torch.tensor(velocity).unsqueeze(-1)}, "task": torch.full((2, 1), 2.0)}
        record(TensorDict(step, [2]))
    assert record.errors(episodes=2).returns.tolist() == [[2.0, 0.0], [1.0, 2.0]]
    assert record.velocities.tolist() == [[1.0, 3.0, 2.0, 2.0], [3.0, 2.0, 0.0, 2.0]]


def test_the_last_velocity_of_an_episode_is_recorded():
    """An inner reset puts the cheetah to rest; the velocity of the step before it must not be lost."""
    trials = half_cheetah.CheetahTrials("velocity", episodes=2, horizon=4, max_velocity=2.0, seed=0)
    actor = GRUGaussianActor.from_env(trials.env(TaskSampler.fixed(torch.ones(3, 1)), 3), hidden_size=4)
    record = half_cheetah.VelocityRecord()
    half_cheetah.Cheetahs(actor, trials, Run(Path(), report_tasks=3)).play(torch.ones(3, 1), on_step=record)
    assert record.velocities.shape == (3, 8)
    assert (record.velocities != 0).all()


def test_cheetahs_stop_goals():
    row = {"eval/trial_return": 0.0, "eval/last_forward": 181.0, "eval/last_backward": 180.0}
    stop = half_cheetah.StopAtGoal("direction")
    rows = [row, row, {}, {**row, "eval/last_forward": 179.0}, row, {"train/loss": 1.0}, row, row]
    assert [stop(r) for r in rows] == [False] * 7 + [True]
    stop, row = half_cheetah.StopAtGoal("velocity"), {"eval/trial_return": 0.0, "eval/last_speed_error": 25.0}
    assert [stop(r) for r in [row, row, {**row, "eval/last_speed_error": 25.1}, row, row, row]] == [False] * 5 + [True]


@pytest.mark.parametrize("distribution", [uniform_means(2), half_cheetah.velocities()], ids=["bandits", "cheetahs"])
def test_streams_of_tasks_never_meet(distribution):
    drawn = [draw_tasks(distribution, seed, stream, 500) for seed in range(3) for stream in range(4)]
    streams = [set(map(tuple, tasks.tolist())) for tasks in drawn]
    assert len(set.union(*streams)) == 12 * 500
    # The streams of a seed end before those of the next begin.
    assert stream_seed(1, 0) > stream_seed(0, max(experiment.CLASSICAL_AGENTS, experiment.ENVS))


def test_held_out_tasks_are_those_of_their_own_seed(tmp_path):
    def tasks(**options):
        trials = Experiment(None, None, uniform_means(2), Run(tmp_path, **options))
        return trials.tasks(experiment.HELD_OUT_TASKS, 5), trials.reported

    for ours, others in zip(tasks(seed=3, held_out_seed=7), tasks(seed=7), strict=True):
        assert torch.equal(ours, others)
    assert not torch.equal(tasks(seed=3)[0], tasks(seed=7)[0])
    evaluated, reported = (set(map(tuple, drawn.tolist())) for drawn in tasks(seed=3))
    assert not evaluated & reported


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("half_cheetah", {"task": "sideways"}),
        ("half_cheetah", {"mode": "fast"}),
        ("bandit", {"learns_from": "reward"}),
        ("tabular_mdp", {"learns_from": "tasks"}),
        ("grid_navi", {"core": "rnn"}),
        ("grid_navi", {"entropy_decay": "early"}),
        ("grid_navi", {"logger": "cvs"}),
        ("grid_navi", {"backend": "thread"}),
    ],
)
def test_a_choice_that_is_none_is_named(name, bad, tmp_path):
    [(setting, value)] = bad.items()
    with pytest.raises(ValueError, match=f"{setting}='{value}' is none of '"):
        run(name, tmp_path, **bad)


def test_a_folder_may_be_text(tmp_path):
    assert Run(str(tmp_path)) == Run(tmp_path)


@pytest.mark.parametrize("name", ["bandit", "grid_navi"])  # with settings by a rule, and without
def test_a_command_trains_as_its_words_say(name, tmp_path, monkeypatch, capsys):
    sizes = RECIPES[name].tiny | {"env_steps": RECIPES[name].batch, "seed": 3, "log_dir": tmp_path}
    words = [word for key, value in sizes.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words, "--no-progress"])
    report = experiment.command(RECIPES[name].module.main)
    assert (report.seed, report.train.env_steps) == (3, RECIPES[name].batch)
    assert report.title in " ".join(capsys.readouterr().out.split())


def test_options_find_their_place():
    filled = arguments(bandit.main, {"arms": 3, "units": 7, "lr": 0.5, "seed": 4})
    assert (filled["arms"], filled["network"].units, filled["learning"].lr, filled["run"].seed) == (3, 7, 0.5, 4)
    assert filled["learning"].lmbda == 0.9  # the rule's, where nothing is said
    with pytest.raises(TypeError, match=r"recipes.bandit has no options \['unit'\]; see its --help"):
        arguments(bandit.main, {"unit": 7})


def test_weights_are_played_without_training(tmp_path, monkeypatch):
    trained = run("grid_navi", tmp_path / "trained", seed=3)
    monkeypatch.setattr(experiment, "train", None)
    played = run("grid_navi", tmp_path / "played", seed=3, weights=tmp_path / "trained" / "agent.safetensors")
    assert played.train.env_steps == 0
    assert (tmp_path / "played" / "path.png").exists()
    difference = abs(played.agent.mean - trained.agent.mean)
    assert difference < 5 * (played.agent.se + trained.agent.se)


@pytest.mark.parametrize(
    ("name", "message", "bad"),
    [(name, message, bad) for name, recipe in RECIPES.items() for message, bad in recipe.bad.items()],
)
def test_bad_arguments(name, message, bad, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(name, tmp_path, **bad)


@pytest.mark.parametrize("name", ["bandit", "tabular_mdp"])
def test_training_begins_with_weights_of_shorter_trials(name, tmp_path):
    short, long = ({"pulls": 2}, {"pulls": 3}) if name == "bandit" else ({"episodes": 1}, {"episodes": 2})
    run(name, tmp_path / "short", **short)
    begin = AdaptiveAgent.load(tmp_path / "short" / "agent.safetensors").policy.state_dict()
    # A learning rate of 1e-12 moves nothing: what is left is what it began with.
    run(name, tmp_path / "long", **long, lr=1e-12, initial_weights=tmp_path / "short" / "agent.safetensors")
    end = AdaptiveAgent.load(tmp_path / "long" / "agent.safetensors").policy.state_dict()
    for key, value in begin.items():
        torch.testing.assert_close(end[key], value, rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["bandit", "tabular_mdp"])
def test_networks_of_a_recipe_are_as_its_arguments_say(name, tmp_path):
    options = {"num_cells": (6,), "memory_steps": 1, "critic_keys": ("time_left", "task")}
    options |= {"input_gain": 0.01, "gate_gain": 1.0}
    run(name, tmp_path, updates=1, lr=1e-12, **options)
    weights = AdaptiveAgent.load(tmp_path / "agent.safetensors").policy.state_dict()
    hidden, last = [value for key, value in weights.items() if "gru" not in key and value.ndim == 2]
    assert hidden.shape == (6, 4 if name == "bandit" else 4 + 10 + 5 + 2)  # MDPs: what is seen now goes past the GRU
    assert last.shape[1] == 6
    inputs = next(value for key, value in weights.items() if key.endswith("weight_ih_l0"))
    # Xavier's bound for 4 units, times the gain.
    bound = 0.01 * math.sqrt(6 / (4 + inputs.shape[1]))
    assert 0.5 * bound < inputs.abs().max() <= bound + 1e-8


@pytest.mark.parametrize("name", ["bandit", "tabular_mdp"])
def test_training_by_the_posterior_says_so(name, tmp_path):
    report = run(name, tmp_path, updates=1, regret=False, posterior=True, belief=1.0, critic_keys=("time_left",))
    assert "(task told in training: belief, posterior)" in report.title
    # The layer starts where least squares put it: of what is to be told, whose mean square is 1/4 of arms and 1 of MDPs, it leaves
    # what varies with a trial. The task's own mean rewards have 2.
    error = report.train.history[0]["train/belief_error"]
    assert 0 < error < {"bandit": 0.05, "tabular_mdp": 0.3}[name]


@pytest.mark.parametrize("name", ["bandit", "tabular_mdp"])
def test_what_was_seen_is_no_task_told(name, tmp_path):
    how = {
        "regret": False,
        "posterior": False,
        "seen": True,
        "belief": 1.0,
        "optimism": 0.5,
        "critic_keys": ("time_left",),
    }
    report = run(name, tmp_path, updates=1, **how)
    assert "(rewards only)" in report.title
    assert report.train.history[0]["train/belief_error"] > 0


# ---- The command line.


def helped(name, word, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, word])
    monkeypatch.delitem(sys.modules, f"recipes.{name}", raising=False)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(f"recipes.{name}", run_name="__main__")
    assert not stopped.value.code
    return capsys.readouterr().out


def programs():
    """The recipes that `recipes/README.md` lists, and all other commands there."""
    return sorted(set(re.findall(r"python -m recipes\.(\w+)", (ROOT / "recipes" / "README.md").read_text())))


@pytest.mark.parametrize("name", programs())
def test_help_fits_one_screen(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    try:
        lines = helped(name, "--help", monkeypatch, capsys).splitlines()
    except ImportError as error:
        pytest.skip(str(error))
    assert 5 < sum(max(1, math.ceil(len(line) / 100)) for line in lines) <= 45


@pytest.mark.parametrize("name", RECIPES)
def test_help_documents_every_argument(name, monkeypatch, capsys):
    short, shown = (helped(name, word, monkeypatch, capsys) for word in ("--help", "--help-all"))
    main = RECIPES[name].module.main
    by_rule = main.rule() if hasattr(main, "rule") else {}
    defaults = {name: by_rule.get(name, each.default) for name, each in inspect.signature(main).parameters.items()}
    groups = [default for default in defaults.values() if is_dataclass(default)]
    flat = [name for name, default in defaults.items() if not is_dataclass(default)]
    flags = [name.replace("_", "-") for name in (*flat, *(each.name for group in groups for each in fields(group)))]
    assert {"seed", "log-dir", "resume", "units", "env-steps", "weights", "logger"} <= set(flags)
    assert len(flags) == len(set(flags))
    assert [flag for flag in flags if f"--{flag} " not in shown and f"--{flag}," not in shown] == []
    typed = [f"--no-{flag}" if f"--no-{flag}" in short else f"--{flag}" for flag in flags]
    assert [word for word in typed if word not in short.split()] == []
    assert all(inspect.getdoc(main).splitlines()[0][:40] in text for text in (short, shown))


@pytest.mark.parametrize("name", RECIPES)
def test_command_line(name, tmp_path, monkeypatch):
    options = {**RECIPES[name].tiny, "env_steps": RECIPES[name].batch, "seed": 5, "log_dir": tmp_path}
    words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    monkeypatch.setattr(sys, "argv", [name, *words, "--no-progress"])
    monkeypatch.delitem(sys.modules, f"recipes.{name}")
    runpy.run_module(f"recipes.{name}", run_name="__main__")
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["seed"] == 5
    assert "--seed 5" in stored["command"]


# ---- The extra `recipes` missing.


@pytest.mark.parametrize(("missing", "part"), [("matplotlib.figure", "plot"), ("rich.table", "table")])
def test_a_report_without_its_extra(missing, part, finished, tmp_path, monkeypatch):
    _, report, _ = finished
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"the {part} needs .*rl2_torchrl\[recipes\]"):
        getattr(report, part)()


def test_numbers_are_saved_before_the_plot(finished, tmp_path, monkeypatch):
    _, report, _ = finished
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="matplotlib"):
        report.save(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text()) == report.to_dict()


def test_page_of_results_holds_figures_plots_and_commands(finished, tmp_path):
    name, report, folder = finished
    page = tmp_path / "pages" / "my_page.md"
    results.main(runs=(folder, folder), page=page, intro="An introduction.")
    text, stored = page.read_text(), report.to_dict()
    assert text.startswith("# my page\n\nAn introduction.\n\n## " + stored["title"])
    for figure, value in stored["summary"].items():
        assert f"| {figure} | {value} | {value} |" in text
    assert text.count(f"# commit {stored['commit']}") == 2
    plots = sorted(path.name for path in page.parent.glob("*.png"))
    curves = [path for path in page.parent.glob("*_curves.*")]
    assert sorted(path.suffix for path in curves) == [".csv", ".png"]
    plots = [plot for plot in plots if not plot.endswith("_curves.png")]
    assert plots == [f"my_page_{folder.name}_{path.name}" for path in sorted(folder.glob("*.png"))]
    assert all(f"]({path.name})" in text for path in curves)
    numbers = next(path for path in curves if path.suffix == ".csv").read_text().splitlines()
    history = [row for row in stored["train"]["history"] if "eval/trial_return" in row]
    assert numbers[0].startswith("run,env_steps,")
    assert len(numbers) == 1 + 2 * len(history)
    assert str(history[-1]["eval/trial_return"]) in numbers[-1]
    assert all(f"]({plot})" in text for plot in plots)
    # Two updates, the last one evaluated: its row stands in the learning curve.
    assert f"| {2 * RECIPES[name].batch / 1e6:.2f} | " in text


def test_a_curve_of_one_run_is_no_mean(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(results, "draw_curves", lambda axes, curves, *_: shown.extend(each.name for each in curves))
    run("grid_navi", tmp_path / "seed3")
    for runs in ((tmp_path / "seed3",), (tmp_path / "seed3", tmp_path / "seed3")):
        results.main(runs=runs, page=tmp_path / "page.md")
    assert shown == ["seed3", "seed3", "mean", "mean"]  # by env steps and by minutes


def test_a_page_of_no_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="runs is empty"):
        results.main(runs=(), page=tmp_path / "page.md")


@pytest.mark.parametrize("options", [{"core": "lstm"}, {"encoder_cells": (8,)}], ids=["lstm", "mlp"])
def test_another_core_or_encoder_is_an_option(options, tmp_path):
    tiny = RECIPES["bandit"].tiny | {"env_steps": 192, "classical": False, "progress": False, "log_dir": tmp_path}
    bandit.main(**arguments(bandit.main, tiny | options))
    names = AdaptiveAgent.load(tmp_path / "agent.safetensors").policy.state_dict()
    assert any(("lstm" if "core" in options else "module.0.module.0.module.layers.0") in name for name in names), (
        names.keys()
    )


def test_a_pendulum_has_the_physics_of_its_task_and_is_seen_at_its_scales():
    plain, scaled = pendulum.scaled_pendulum(), pendulum.scaled_pendulum(10.0, 100.0)
    for each in (plain, scaled):
        pendulum.set_physics(each.unwrapped, torch.tensor([0.5, 2.0, 8.0]))
        each.reset(seed=0)
        each.unwrapped.state = np.array([np.pi / 2, 1.0])  # level, rad/s
    seen, cost, *_ = plain.step(np.array([2.0]))
    # Angular acceleration 3 g / (2 l) sin(angle) + 3 torque / (m l²) = 6 + 3 rad/s², over 0.05 s.
    speed, angle = 1.0 + 0.05 * 9.0, np.pi / 2 + 0.05 * 1.45
    np.testing.assert_allclose(seen, [np.cos(angle), np.sin(angle), speed], rtol=1e-5)
    assert cost == pytest.approx(-((np.pi / 2) ** 2 + 0.1 + 0.001 * 4))
    np.testing.assert_allclose(scaled.step(np.array([2.0]))[0], seen * [10.0, 10.0, 1000.0], rtol=1e-5)


def test_a_walker_has_the_body_of_its_task_and_the_next_ones_is_not_on_top():
    with gymnasium.make("Walker2d-v5") as env:
        each = env.unwrapped
        for name, values in walker.standard_body().items():  # the env's own model
            np.testing.assert_array_equal(values, getattr(each.model, name))
        mass, damping = each.model.body_mass.copy(), each.model.dof_damping.copy()
        for _ in range(2):
            walker.set_body(each, torch.ones(walker.task_size()))
            torch.testing.assert_close(each.model.body_mass, 1.5 * mass, rtol=1e-12, atol=0)
            torch.testing.assert_close(each.model.dof_damping, 1.3 * damping, rtol=1e-12, atol=0)
        assert each.model.body_subtreemass[0] == pytest.approx(1.5 * mass.sum())  # derived from the others
        walker.set_body(each, torch.zeros(walker.task_size()))
        torch.testing.assert_close(each.model.body_mass, mass)


def test_bodies_of_walkers_are_in_their_ranges():
    tasks = walker.bodies(torch.Size([1000]), torch.Generator().manual_seed(0))
    # 8 bodies with 3 inertias each, 9 degrees of freedom, and the ground's and 7 bodies' 3 frictions.
    assert tasks.shape == (1000, 8 + 24 + 9 + 24)
    assert -3 <= tasks.min() < -2.9
    assert 2.9 < tasks.max() <= 3


def test_physics_of_pendulums_are_in_their_ranges():
    tasks = pendulum.physics(torch.Size([1000]), torch.Generator().manual_seed(0))
    least, most = tasks.min(0).values, tasks.max(0).values
    torch.testing.assert_close(least, torch.tensor([0.6, 0.6, 6.0]), rtol=0.02, atol=0)
    torch.testing.assert_close(most, torch.tensor([1.2, 1.2, 12.0]), rtol=0.02, atol=0)


def test_a_memory_corridor(tmp_path):
    pytest.importorskip("minigrid")
    from recipes import minigrid_memory

    tiny = {"trials": 4, "units": 4, "report_tasks": 8, "epochs": 1, "env_steps": 4 * minigrid_memory.BATCH_STEPS}
    report = minigrid_memory.main(**arguments(minigrid_memory.main, {**tiny, "log_dir": tmp_path, "progress": False}))
    assert report.agent.measures["success"].returns.shape == (8, 1)
    assert ((report.agent.measures["success"].returns > 0) == (report.agent.returns > 0)).all()


def test_goals_to_find_again(tmp_path):
    pytest.importorskip("minigrid")
    from recipes import minigrid_goals

    tiny = {"trials": 4, "units": 4, "report_tasks": 8, "epochs": 1, "episodes": 2, "max_steps": 12}
    options = {**tiny, "env_steps": 4 * minigrid_goals.BATCH_STEPS, "log_dir": tmp_path, "progress": False}
    agent = minigrid_goals.main(**arguments(minigrid_goals.main, options)).agent
    steps, success = agent.steps.returns, agent.measures["success"].returns
    assert steps.shape == success.shape == (8, 2)
    # What MiniGrid pays, and that an episode lasts until the goal is reached or time is up.
    torch.testing.assert_close(agent.returns, success * (1 - 0.9 * steps / 12), rtol=0, atol=1e-6)
    assert (steps[success == 0] == 12).all()


def test_doors_and_goal_are_the_same_in_all_episodes_of_a_trial():
    pytest.importorskip("minigrid")
    from recipes import minigrid_goals
    from recipes.minigrid_envs import all_mazes

    mazes = all_mazes()
    # 3 of 9 rows, none next to another: C(7, 3) = 35 ways on each side.
    assert len({tuple(map(tuple, maze)) for maze in mazes.tolist()}) == len(mazes) == 35 * 35 * 6
    sampler = TaskSampler(partial(minigrid_goals.numbers, 100), seed=0)
    env = minigrid_goals.trial_env(mazes[:100], sampler, 3, episodes=2, max_steps=9)

    def tasks(halls):
        return torch.tensor([(mazes[:100] == row.unwrapped.maze).all((1, 2)).argmax() for row in halls.envs.envs])

    check_trial_env(env, task_of=tasks)


def test_a_goal_is_out_of_view_until_its_door_is_open():
    pytest.importorskip("minigrid")
    from minigrid.core.constants import OBJECT_TO_IDX

    from recipes.minigrid_envs import Doors, OneHotView, all_mazes

    hall, goal = OneHotView(Doors(max_steps=30)), OBJECT_TO_IDX["goal"]
    left, right, forward, toggle = range(4)
    for maze in all_mazes()[:50]:
        hall.unwrapped.set_task(maze)
        seen = [hall.reset()[0]["view"]]
        x, y = maze[0]
        down = [left, left] if y > 5 else []
        walk = [*down, *[forward] * abs(y - 5), left if (x == 2) == (y <= 5) else right]
        seen += [hall.step(action)[0]["view"] for action in walk]
        assert not np.stack(seen)[:, goal].any()
        assert hall.step(toggle)[0]["view"][goal].sum() == 1
        hall.step(forward)
        _, reward, terminated, _, info = hall.step(forward)
        assert terminated
        assert info == {"success": True}
        assert reward == pytest.approx(1 - 0.9 * (len(walk) + 3) / 30)


@pytest.mark.parametrize("benchmark", ["ML1", "ML10"])
def test_a_robot_arm(benchmark, tmp_path):
    pytest.importorskip("metaworld")
    from recipes import meta_world

    tiny = {"trials": 2, "units": 4, "horizon": 50, "episodes": 2, "report_tasks": 4, "epochs": 1, "minibatches": 2}
    options = {**tiny, "benchmark": benchmark, "env_steps": 2 * 2 * 50, "log_dir": tmp_path, "progress": False}
    report = meta_world.main(**arguments(meta_world.main, options))
    assert report.agent.measures["success"].returns.shape == (4, 2)


def test_training_tasks_of_a_robot_arm_pair_goals_with_other_objects():
    from recipes import meta_world

    def task(name, *place):
        return meta_world.Task(name, pickle.dumps({"rand_vec": np.array(place), "partially_observable": True}))

    # Objects at x = 0, 0.1 and 0.2; the third goal lies nearer to the first and second object than any goal to its own.
    places = [[0.0, 0, 0, 0.0, 0.5, 1], [0.1, 0, 0, 0.1, 0.5, 2], [0.2, 0, 0, 0.0, 0.46, 3]]
    tasks = [task("reach", *place) for place in places] + [task("door", 0.1, 0.2, 0.3), task("door", 0.4, 0.5, 0.6)]
    recombined = meta_world.recombine(tasks, seed=0)
    assert len(recombined) == 2 * meta_world.RECOMBINED
    reach = {tuple(pickle.loads(each.data)["rand_vec"]) for each in recombined if each.env_name == "reach"}
    pairs = {(*one[:3], *other[3:]) for one in places for other in places}
    assert reach == pairs - {(0.0, 0, 0, 0.0, 0.46, 3), (0.1, 0, 0, 0.0, 0.46, 3)}
    doors = [pickle.loads(each.data) for each in recombined if each.env_name == "door"]
    assert {tuple(each["rand_vec"]) for each in doors} == {(0.1, 0.2, 0.3), (0.4, 0.5, 0.6)}
    assert all(each["partially_observable"] for each in doors)
