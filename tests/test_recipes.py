"""Every recipe at a tiny size: its report's promises, its seeds, resuming it, its command line and bad arguments."""

import importlib
import inspect
import json
import math
import re
import runpy
import shutil
import signal
import sys
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path

import pytest
import torch
from recipe_runs import (
    RECIPES,
    BeforeTraining,
    few_held_out_tasks,
    options_of,
    result_of,
    run,
    short_episodes,
    trained,
    without_paint,
)
from recipe_settings import unused
from tensordict import TensorDict
from torchrl.envs import Compose, TransformedEnv

from recipes import (
    bandit,
    experiment,
    half_cheetah,
    results,
)
from recipes.cli import cli
from recipes.command import arguments, command
from recipes.experiment import Experiment
from recipes.reports import read_report
from recipes.run import Run
from recipes.streams import CLASSICAL_AGENTS, ENVS, HELD_OUT_TASKS, draw_tasks, stream_seed
from rl2_torchrl import (
    AdaptiveAgent,
    Callback,
    GRUCategoricalActor,
    GRUValueHead,
    PPOUpdate,
    PreviousStep,
    RL2PPOLoss,
    TaskSampler,
    Trial,
    TrialCollector,
)
from rl2_torchrl.arguments import require_folder_name
from rl2_torchrl.envs import BernoulliBandit, uniform_means
from rl2_torchrl.locks import locked

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", params=RECIPES)
def finished(request, tmp_path_factory):
    """A recipe's name, its report and its folder."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, run(request.param, folder, seed=3, painted=True), folder


def test_report_holds_what_is_promised(finished):
    name, report, folder = finished
    recipe, stored = RECIPES[name], json.loads((folder / "report.json").read_text())
    assert stored == report.to_dict()
    num_tasks = recipe.tiny["report_tasks"]
    assert stored["agent"]["num_tasks"] == num_tasks
    assert {label.partition(" (")[0] for label in stored["baselines"]} == recipe.baselines
    assert set(stored["ablations"]) == {"memory_zeroed", "rewards_shuffled"}
    for label, curve in {"agent": stored["agent"], **stored["baselines"], **stored["ablations"]}.items():
        assert curve["num_tasks"] == num_tasks
        assert curve["mean"] == pytest.approx(sum(curve["per_episode"]))
        assert (curve["se"] > 0) == (label != "goal_known")  # which is exact
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


def test_another_seed_another_report(finished, tmp_path):
    name, report, _ = finished
    other, first = trained(name, tmp_path, seed=4).history[1], report.train.history[1]
    assert other["train/loss"] != first["train/loss"]
    assert other["eval/trial_return"] != first["eval/trial_return"]


def test_resume_goes_on(finished, tmp_path):
    name, report, folder = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    longer = trained(name, tmp_path, seed=3, updates=3, resume=True)
    assert longer.env_steps == 3 * RECIPES[name].batch
    assert longer.history[1]["train/loss"] == report.train.history[1]["train/loss"]
    assert len(longer.history) == 3


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


@pytest.mark.parametrize("distribution", [uniform_means(2), half_cheetah.velocities()], ids=["bandits", "cheetahs"])
def test_streams_of_tasks_never_meet(distribution):
    drawn = [draw_tasks(distribution, seed, stream, 500) for seed in range(3) for stream in range(4)]
    streams = [set(map(tuple, tasks.tolist())) for tasks in drawn]
    assert len(set.union(*streams)) == 12 * 500
    # The streams of a seed end before those of the next begin.
    assert stream_seed(1, 0) > stream_seed(0, max(CLASSICAL_AGENTS, ENVS))


def test_held_out_tasks_are_those_of_their_own_seed(tmp_path):
    def tasks(**options):
        trials = Experiment(None, None, uniform_means(2), Run(tmp_path, **options))
        return trials.tasks(HELD_OUT_TASKS, 5), trials.reported

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


@pytest.mark.parametrize(
    ("name", "value", "bounds"),
    [
        ("trials", -4, "a whole number of at least 1"),
        ("env_steps", -1000, "a whole number of at least 1"),
        ("epochs", 2.0, "a whole number of at least 1"),
        ("minibatches", 0, "a whole number of at least 1"),
        ("units", True, "a whole number of at least 1"),
        ("num_cells", (8, 0), "whole numbers of at least 1"),
        ("memory_steps", 0, "a whole number of at least 1"),
        ("encoder_cells", (-1,), "whole numbers of at least 1"),
        ("input_gain", -1.0, "a number of at least 0"),
        ("gamma", 1.5, "a number from 0 to 1"),
        ("lmbda", -0.1, "a number from 0 to 1"),
        ("entropy", None, "a number of at least 0"),
        ("lr", math.nan, "a number of at least 0"),
        ("max_grad_norm", -1.0, "a number of at least 0"),
        ("belief", -1.0, "a number of at least 0"),
        ("optimism", "much", "a number of at least 0"),
        ("optimism_after", 0.6, "a number from 0 to 0.5"),
        ("seed", 2**53 + 1, "a whole number from 0 to 9007199254740992"),
        ("held_out_seed", -1, "a whole number from 0 to 9007199254740992"),
        ("workers", -1, "a whole number of at least 0"),
    ],
)
def test_a_number_out_of_its_range_is_named_as_it_is_typed(name, value, bounds, tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"{name}={value!r} must be {bounds}.")):
        run("bandit", tmp_path, **{name: value})


@pytest.mark.parametrize("name", ["weights", "initial_weights"])
def test_weights_are_a_file(name, tmp_path):
    with pytest.raises(ValueError, match=rf"{name}='{tmp_path}' is no file: give an agent's"):
        Run(tmp_path, **{name: tmp_path})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": __file__, "resume": True}, "weights are played, not trained: leave out resume=True"),
        ({"weights": __file__, "initial_weights": __file__}, "leave out initial_weights='"),
        ({"weights": __file__, "seeds": (0, 1)}, r"leave out seeds=\(0, 1\)"),
        ({"seed": 7, "seeds": (0, 1)}, "seed=7 beside seeds="),
        ({"resume_changes": ("update.lr",)}, r"add resume \(--resume\)"),
        ({"log_dir": ""}, "log_dir is empty, and files would go to the current folder: name one, or that, log_dir='.'"),
        ({"log_dir": __file__}, "test_recipes.py' is a file: name a folder"),
        ({"log_dir": f"{__file__}/runs"}, "test_recipes.py' is a file: name a folder"),
    ],
)
def test_settings_that_do_not_agree(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Run(**{"log_dir": tmp_path, **settings})


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"posterior": True}, r"regret, posterior are all on, .* turn off the others \(--no-regret, --no-posterior\)"),
        ({"regret": False, "optimism": 5.0}, "optimism=5.0 is of standard deviations"),
    ],
)
def test_what_training_is_told_agrees(told, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run("bandit", tmp_path, **told)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds"], "--seeds names no seed: give some"),
        (["--seeds", "0", "0"], "seeds=(0, 0): each seed once"),
        (["--max-grad-norm", "0"], "max_grad_norm=0.0 would stop all learning"),
        (["--critic-keys", "nonsense"], "the env has no observation ['nonsense']"),
        (["--log-dir", ""], "an empty value in --log-dir '': is a variable"),
        (["--log-dir="], "an empty value in --log-dir=: is a variable"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_was_asked_wrongly_is_told_in_a_line(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(experiment, "train", None)
    monkeypatch.setattr("sys.argv", ["bandit", *words])
    with pytest.raises(SystemExit) as ended:
        command(bandit.main)
    assert ended.value.code.startswith(f"error: {message}")
    assert "\n" not in ended.value.code


def test_what_was_noted_of_an_error_is_told_too(monkeypatch):
    monkeypatch.setattr("sys.argv", ["mine"])

    def noted() -> None:
        try:
            require_folder_name(log_dir="")
        except ValueError as error:
            error.add_note("in the rollout of update 3")
            raise

    with pytest.raises(SystemExit, match=r"(?s)^error: log_dir is empty.*\nin the rollout of update 3$"):
        cli(noted)


def test_the_line_of_a_users_own_module_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["mine"])
    monkeypatch.syspath_prepend(tmp_path)
    source = "from rl2_torchrl.arguments import whole\n\n\ndef deep():\n    whole('rows', 0)\n"
    (tmp_path / "my_part_of_a_recipe.py").write_text(source)
    with pytest.raises(SystemExit, match=r"^error: rows=0 must be .* \(my_part_of_a_recipe.py, line 5\)$"):
        cli(import_module("my_part_of_a_recipe").deep)


def test_errors_of_ones_own_and_those_with_a_cause_keep_their_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["mine"])
    (tmp_path / "report.json").write_text("{")

    def mine() -> None:
        raise ValueError("my env is at fault")

    def caused() -> None:
        read_report(tmp_path)

    for main in (mine, caused):
        with pytest.raises(ValueError, match="at fault|is no report"):
            cli(main)


@pytest.mark.usefixtures("unpainted")
def test_a_folder_that_another_run_has_is_told_in_a_line(tmp_path, monkeypatch):
    run("bandit", tmp_path, report_tasks=2)
    sizes = ["--arms", "2", "--pulls", "3", "--units", "4", "--trials", "16", "--report-tasks", "4", "--no-classical"]
    monkeypatch.setattr("sys.argv", ["bandit", *sizes, "--log-dir", str(tmp_path), "--resume"])
    with (
        locked(tmp_path / "checkpoints" / "checkpoint.lock"),
        pytest.raises(SystemExit, match="^error: .* is in use by another"),
    ):
        command(bandit.main)


@pytest.mark.usefixtures("unpainted")
def test_settings_of_a_training_beside_weights_are_told_to_change_nothing(tmp_path, monkeypatch, caplog):
    run("bandit", tmp_path, report_tasks=2)
    sizes = ["--arms", "2", "--pulls", "3", "--units", "4", "--trials", "4", "--report-tasks", "4", "--no-classical"]
    words = [*sizes, "--weights", str(tmp_path / "agent.safetensors"), "--log-dir", str(tmp_path / "played")]
    for more, told in ([], "--trials"), (["--lr", "0.5", "--memory-steps", "7"], "--memory-steps, --trials, --lr"):
        caplog.clear()
        monkeypatch.setattr("sys.argv", ["bandit", *words, *more])
        command(bandit.main)
        assert f"agent.safetensors is played, not trained. Of no effect: {told}." in caplog.text


def test_a_recipes_own_settings_and_those_of_a_run_are_told_to_change_nothing_too(tmp_path, monkeypatch, caplog):
    here = Run(tmp_path)

    def main(*, horizon: int = 20, belief: float = 0.1, stop_at_goal: bool = False, run: Run = here) -> None:
        """Trains nothing."""

    words = ["--weights", __file__, "--horizon", "3", "--report-tasks", "5", "--belief", "0.1"]
    more = ["--belief", "0", "--stop-at-goal", "--workers", "3", "--backend", "ray", "--logger", "tensorboard"]
    monkeypatch.setattr("sys.argv", ["recipe", *words])
    command(main)
    assert "Of no effect" not in caplog.text
    monkeypatch.setattr("sys.argv", ["recipe", *words, *more])
    command(main)
    assert "Of no effect: --belief, --stop-at-goal, --workers, --backend, --logger." in caplog.text


@pytest.mark.usefixtures("unpainted")
def test_settings_of_first_weights_beside_initial_weights_are_told_to_change_nothing(tmp_path, monkeypatch, caplog):
    run("bandit", tmp_path, report_tasks=2)
    sizes = ["--arms", "2", "--pulls", "3", "--units", "4", "--trials", "16", "--report-tasks", "4", "--no-classical"]
    words = [*sizes, "--initial-weights", str(tmp_path / "agent.safetensors"), "--env-steps", "48", "--no-progress"]
    for more, told in (
        ([], ""),
        (["--input-gain", "2", "--lr", "0.5"], "agent.safetensors. Of no effect: --input-gain."),
    ):
        caplog.clear()
        monkeypatch.setattr("sys.argv", ["bandit", *words, "--log-dir", str(tmp_path / f"on{len(more)}"), *more])
        command(bandit.main)
        assert ("Of no effect" in caplog.text) == bool(told)
        assert told in caplog.text


@pytest.mark.usefixtures("unpainted")
def test_what_a_run_would_begin_with_is_told_to_change_nothing_when_it_goes_on(tmp_path, monkeypatch, caplog):
    weights = tmp_path / "first" / "agent.safetensors"
    run("bandit", weights.parent, report_tasks=2)
    sizes = ["--arms", "2", "--pulls", "3", "--units", "4", "--trials", "16", "--report-tasks", "4", "--no-classical"]
    words = [*sizes, "--log-dir", str(tmp_path / "on"), "--no-progress"]
    for more, what in (
        (["--initial-weights", str(weights), "--env-steps", "48"], None),
        (["--resume", "--env-steps", "96"], None),
        (["--resume", "--env-steps", "144", "--memory-steps", "2"], "--memory-steps"),
        (["--resume", "--env-steps", "192", "--initial-weights", str(weights)], "--initial-weights"),
    ):
        caplog.clear()
        monkeypatch.setattr("sys.argv", ["bandit", *words, *more])
        command(bandit.main)
        said = [record.message for record in caplog.records if "Of no effect" in record.message]
        assert said == [f"{tmp_path / 'on'} goes on from its checkpoint. Of no effect any more: {what}."] * bool(what)
    assert (tmp_path / "on" / "about.txt").read_text().count("initial_weights=") == 1  # where the run began


def test_a_part_that_no_agents_file_can_hold_is_refused_before_the_training(tmp_path):
    class Own(torch.nn.Tanh):
        pass

    trial = Compose(Trial(episodes=3), TaskSampler(uniform_means(2)), PreviousStep())
    env = TransformedEnv(BernoulliBandit(2, batch_size=(2,)), trial)
    actor = GRUCategoricalActor.from_env(env, hidden_size=4, activation=Own, num_cells=(4,))
    run = Run(tmp_path / "run", report_tasks=2)
    trained = Experiment(actor, lambda sampler, rows: env, uniform_means(2), run)
    update = PPOUpdate(RL2PPOLoss(actor, GRUValueHead.from_env(env, hidden_size=4)), minibatches=1)
    collector = TrialCollector(env, actor, frames_per_batch=6, total_frames=6)
    with pytest.raises(TypeError, match=r"Own cannot be written to an agent's file.*register_part"):
        trained.train(collector, update)
    assert not (tmp_path / "run").exists()


def test_a_seed_of_held_out_tasks_that_depend_on_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="held_out_seed=7 has no effect: which tasks are held out"):
        run("grid_navi", tmp_path, held_out_seed=7)


def test_a_seed_of_held_out_tasks_may_be_of_tasks_of_several_entries(tmp_path):
    def tasks(size, generator):
        entries = {"mass": torch.rand(*size, 1, generator=generator), "place": {"goal": torch.zeros(*size, 2)}}
        return TensorDict(entries, size)

    drawn = [Experiment(None, None, tasks, Run(tmp_path, held_out_seed=seed)).reported for seed in (7, 8, 7)]
    assert [(each == drawn[0]).all() for each in drawn] == [True, False, True]
    with pytest.raises(ValueError, match="held_out_seed=7 has no effect"):
        Experiment(None, None, lambda size, _: tasks(size, torch.Generator()), Run(tmp_path, held_out_seed=7))


@pytest.mark.usefixtures("unpainted")
def test_a_command_that_ctrl_c_ended_has_a_status_of_its_own(tmp_path, monkeypatch, capsys):
    train = experiment.train
    monkeypatch.setattr(
        experiment, "train", lambda *args, callbacks, **more: train(*args, callbacks=[*callbacks, CtrlC()], **more)
    )
    sizes = ["--arms", "2", "--pulls", "3", "--units", "4", "--trials", "16", "--report-tasks", "4", "--no-classical"]
    words = [*sizes, "--env-steps", "480", "--no-progress", "--log-dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["bandit", *words])
    with pytest.raises(SystemExit) as ended:
        command(bandit.main)
    assert ended.value.code == 130
    assert "48 steps in" in (said := " ".join(capsys.readouterr().out.split()))
    assert "cut short: --resume goes on" in said
    assert (tmp_path / "report.json").exists()
    monkeypatch.setattr(experiment, "train", train)
    monkeypatch.setattr("sys.argv", ["bandit", *words, "--resume"])
    assert command(bandit.main).train.env_steps == 480


class CtrlC(Callback):
    def after_update(self, row, progress):
        signal.raise_signal(signal.SIGINT)


def test_a_folder_may_be_text(tmp_path):
    assert Run(str(tmp_path)) == Run(tmp_path)


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


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ant_direction", "task told in training: critic"),
        ("point_mass", "task told in training: critic, belief"),
        ("minigrid_goals", "task told in training: belief"),
        ("minigrid_memory", "rewards only"),
    ],
)
def test_titles_of_recipes_for_robots_and_mazes_say_what_training_was_told(name, told, tmp_path, monkeypatch):
    def stop(self, result, *, title):
        raise BeforeTraining(title)

    monkeypatch.setattr(Experiment, "train", lambda *_, **__: None)
    monkeypatch.setattr(Experiment, "report", stop)
    pytest.importorskip({"point_mass": "dm_control", "ant_direction": "mujoco"}.get(name, "minigrid"))
    recipe = importlib.import_module(f"recipes.{name}")
    with pytest.raises(BeforeTraining) as stopped:
        recipe.main(**arguments(recipe.main, {"trials": 4, "units": 4, "log_dir": tmp_path}))
    assert str(stopped.value).endswith(f" ({told})")


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


def test_help_breaks_no_line_within_a_sentence():
    # As tyro does where a docstring's line begins with anything but a letter.
    text = "".join(path.read_text() for path in (ROOT / "recipes").glob("*.py"))
    assert re.findall(r"^ {8}[a-z_]+: .*\n(?: {12}\w.*\n)*? {12}[^a-zA-Z\s].*", text, re.MULTILINE) == []


def test_command_line_of_the_same_seed_gives_the_same_report(finished, tmp_path, monkeypatch):
    name, report, _ = finished
    options = options_of(name, tmp_path, seed=3)
    del options["progress"]
    words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    monkeypatch.setattr(sys, "argv", [name, *words, "--no-progress"])
    monkeypatch.delitem(sys.modules, f"recipes.{name}")
    with short_episodes(), few_held_out_tasks(), without_paint():
        runpy.run_module(f"recipes.{name}", run_name="__main__")
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["seed"] == 3
    assert "--seed 3" in stored["command"]
    assert result_of(stored) == result_of(report)


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
    page, other = tmp_path / "pages" / "my_page.md", tmp_path / "other"
    stored = report.to_dict()
    other.mkdir()
    (other / "report.json").write_text(json.dumps(stored | {"seed": 4}))
    results.main(runs=(folder, other), page=page, intro="An introduction.")
    text = page.read_text()
    assert text.startswith("# my page\n\nAn introduction.\n\n## " + stored["title"])
    for figure, value in stored["summary"].items():
        assert f"| {figure} | {value} | {value} |" in text
    assert text.count(f"# commit {stored['commit']}") == 2
    plots = sorted(path.name for path in page.parent.glob("*.png"))
    curves = [path for path in page.parent.glob("*_curves.*")]
    assert sorted(path.suffix for path in curves) == [".csv", ".png"]
    plots = [plot for plot in plots if not plot.endswith("_curves.png")]
    slug = results.slug(stored["title"])
    assert plots == [f"my_page_{slug}_{path.name}" for path in sorted(folder.glob("*.png"))]
    assert all(f"]({path.name})" in text for path in curves)
    numbers = next(path for path in curves if path.suffix == ".csv").read_text().splitlines()
    history = [row for row in stored["train"]["history"] if "eval/trial_return" in row]
    assert numbers[0].startswith("run,env_steps,")
    assert len(numbers) == 1 + 2 * len(history)
    assert str(history[-1]["eval/trial_return"]) in numbers[-1]
    assert all(f"]({plot})" in text for plot in plots)
    # Two updates, the last one evaluated: its row stands in the learning curve.
    assert f"| {2 * RECIPES[name].batch / 1e6:.2f} | " in text


@pytest.mark.usefixtures("unpainted")
def test_a_page_of_unlike_runs(finished, tmp_path):
    _, report, folder = finished
    with pytest.raises(ValueError, match=r"are both 'RL² on .*' of seed 3: one run, or two of other settings"):
        results.main(runs=(folder, folder), page=tmp_path / "page.md")
    stored = report.to_dict()
    *_, last = [row for row in stored["train"]["history"] if "eval/trial_return" in row]
    # An evaluation in which all episodes were as long says no steps; a report likewise. And it was cut short.
    stored["train"]["history"] = [{**last, "eval/first_steps": 7.0}, last]
    stored["train"]["interrupted"], stored["seed"] = True, 4
    stored["summary"] |= {"steps": "7.000"}
    (other := tmp_path / "other").mkdir()
    (other / "report.json").write_text(json.dumps(stored))
    results.main(runs=(other,), page=tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "first steps |" in text
    assert "| 7.00 |" in text
    assert f"| {stored['train']['env_steps']:,} (cut short) |" in text
    results.main(runs=(folder, other), page=tmp_path / "page.md")
    assert "| steps |  | 7.000 |" in (tmp_path / "page.md").read_text()


def test_plots_of_two_titles_are_apart_though_both_first_runs_are_called_seed0(tmp_path):
    report = run("grid_navi", tmp_path / "one" / "seed0", seed=3).to_dict()
    (other := tmp_path / "two" / "seed0").mkdir(parents=True)
    (other / "report.json").write_text(json.dumps(report | {"title": "RL² on another grid"}))
    (other / "report.png").write_bytes(b"another plot")
    results.main(runs=(tmp_path / "one" / "seed0", other), page=tmp_path / "page.md")
    shown = re.findall(r"!\[report\]\((.*)\)", (tmp_path / "page.md").read_text())
    assert [(tmp_path / name).read_bytes() == b"another plot" for name in shown] == [False, True]


@pytest.mark.usefixtures("unpainted")
def test_a_curve_of_one_run_is_no_mean(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(results, "draw_curves", lambda axes, curves, *_: shown.extend(each.name for each in curves))
    folders = [run("grid_navi", tmp_path / f"seed{seed}", seed=seed) and tmp_path / f"seed{seed}" for seed in (3, 4)]
    for runs in (folders[:1], folders):
        results.main(runs=runs, page=tmp_path / "page.md")
    assert shown == ["seed3", "seed3", "mean", "mean"]  # by env steps and by minutes


def test_a_folder_of_seeds_stands_for_the_runs_in_it(tmp_path):
    for seed in (3, 4):
        run("bandit", tmp_path / "runs" / f"seed{seed}", seed=seed)
    results.main(runs=(tmp_path / "runs",), page=tmp_path / "page.md")
    assert "|  | seed 3 | seed 4 |" in (tmp_path / "page.md").read_text()


def test_a_page_of_no_runs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="runs is empty"):
        results.main(runs=(), page=tmp_path / "page.md")
    (tmp_path / "half").mkdir()
    with pytest.raises(ValueError, match="half holds no run"):
        results.main(runs=(tmp_path / "half",), page=tmp_path / "page.md")
    (tmp_path / "half" / "report.json").write_text('{"train": {"history": []}}')
    with pytest.raises(ValueError, match="half holds no report of a training"):
        results.main(runs=(tmp_path / "half",), page=tmp_path / "page.md")
    (tmp_path / "half" / "report.json").write_text('{"train": ')
    with pytest.raises(ValueError, match=r"half/report.json is no report, or half of one .*: remove it"):
        results.main(runs=(tmp_path / "half",), page=tmp_path / "page.md")


@pytest.mark.usefixtures("unpainted")
@pytest.mark.parametrize("options", [{"core": "lstm"}, {"encoder_cells": (8,)}], ids=["lstm", "mlp"])
def test_another_core_or_encoder_is_an_option(options, tmp_path):
    tiny = RECIPES["bandit"].tiny | {"env_steps": 192, "classical": False, "progress": False, "log_dir": tmp_path}
    bandit.main(**arguments(bandit.main, tiny | options))
    names = AdaptiveAgent.load(tmp_path / "agent.safetensors").policy.state_dict()
    assert any(("lstm" if "core" in options else "module.0.module.0.module.layers.0") in name for name in names), (
        names.keys()
    )


def test_runs_of_other_settings_are_no_mean_on_a_page(tmp_path):
    report = run("bandit", tmp_path / "one", seed=3).to_dict()
    (other := tmp_path / "other").mkdir()
    command = "python -m recipes.bandit --lr 0.1"
    (tmp_path / "one" / "report.json").write_text(json.dumps(report | {"command": f"{command} --log-dir runs/one"}))
    same = f"{command} --seed 4 --log-dir runs/other --no-progress --resume"
    (other / "report.json").write_text(json.dumps(report | {"command": same, "seed": 4}))
    results.main(runs=(tmp_path / "one", other), page=tmp_path / "page.md")
    (other / "report.json").write_text(json.dumps(report | {"command": f"{same} --env-steps 9600", "seed": 4}))
    with pytest.raises(ValueError, match=r"of other settings \(--env-steps 9600\): they have no mean"):
        results.main(runs=(tmp_path / "one", other), page=tmp_path / "page.md")
