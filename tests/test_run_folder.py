"""What runs leave in one folder, one after another."""

import json
import shutil
from functools import partial

import pytest
from recipe_runs import run, trained

from recipes import compare
from recipes.reports import finished_report


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def test_what_is_refused_changes_nothing_in_the_folder(tmp_path):
    run("bandit", tmp_path, seed=3)
    copy = shutil.copy(tmp_path / "agent.safetensors", tmp_path / "mine.safetensors")
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match="other settings"):
        run("bandit", tmp_path, seed=3, lr=0.5, resume=True)
    with pytest.raises(ValueError, match="holds a training.*name another folder"):
        run("bandit", tmp_path, weights=copy)
    assert files_of(tmp_path) == before


def test_a_new_run_puts_away_what_the_last_one_left(tmp_path, caplog):
    run("bandit", tmp_path, seed=3)
    kept = {
        name: (tmp_path / name).read_bytes() for name in ("about.txt", "agent.safetensors", "report.json", "report.png")
    }
    (tmp_path / "earlier").mkdir()
    for name in ("mine.png", "velocity.png"):  # the latter of the run before
        (tmp_path / "earlier" / name).touch()
    longer = run("bandit", tmp_path, seed=4, updates=3)
    assert (tmp_path / "earlier" / "mine.png").exists()
    assert not (tmp_path / "earlier" / "velocity.png").exists()
    assert {name: (tmp_path / "earlier" / name).read_bytes() for name in kept} == kept
    assert f"its report and agent are in {tmp_path / 'earlier'}" in caplog.text
    assert json.loads((tmp_path / "report.json").read_text())["seed"] == 4
    [losses] = (tmp_path / "scalars" / "scalars").rglob("loss.csv")
    assert len(losses.read_text().splitlines()) == len(longer.train.history) == 3


def test_a_resume_without_a_checkpoint_puts_the_last_run_away(tmp_path):
    first = run("bandit", tmp_path, seed=3)
    shutil.rmtree(tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "scalars")
    run("bandit", tmp_path, seed=4, resume=True)
    stored = json.loads((tmp_path / "earlier" / "report.json").read_text())
    assert stored["agent"]["mean"] == first.agent.mean


def test_a_training_that_is_refused_at_its_first_update_leaves_all_of_the_last_run(tmp_path):
    run("bandit", tmp_path, seed=3)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match="100 minibatches"):
        run("bandit", tmp_path, minibatches=100)
    assert files_of(tmp_path) == before
    assert len(run("bandit", tmp_path, seed=3, updates=3, resume=True).train.history) == 3


def test_commands_and_seeds_of_a_run_that_went_on(tmp_path):
    run("bandit", tmp_path, seed=3, held_out_seed=7)
    run("bandit", tmp_path, seed=3, held_out_seed=7, updates=3, resume=True)
    heading = (tmp_path / "about.txt").read_text().partition("\n\n")[0].splitlines()
    assert len(heading) == 6  # three lines of each
    assert heading[2] == heading[5] == "seed=3, held_out_seed=7, workers=0"


def test_an_agent_that_is_played_has_a_folder_of_its_own(tmp_path):
    run("grid_navi", tmp_path / "trained", seed=3)
    weights = tmp_path / "trained" / "agent.safetensors"
    for seed in (3, 4):
        played = run("grid_navi", tmp_path / "played", seed=seed, weights=weights)
    assert played.title == "RL² on GridNavi (agent.safetensors)"  # what its training was told nobody knows
    about = (tmp_path / "played" / "about.txt").read_text()
    assert about.endswith("played on held-out tasks, not trained: report.json, report.png\n")
    assert f"seed=4, weights={weights}" in about
    assert json.loads((tmp_path / "played" / "earlier" / "report.json").read_text())["seed"] == 3
    with pytest.raises(ValueError, match="played holds no training: its agent was played alone"):
        compare.main((tmp_path / "played",))
    (tmp_path / "trained" / "report.json").unlink()  # as of a training that is not over
    with pytest.raises(ValueError, match="holds a training.*name another folder"):
        run("grid_navi", tmp_path / "trained", weights=shutil.copy(weights, tmp_path / "mine.safetensors"))


@pytest.mark.parametrize("name", ["weights", "initial_weights"])
@pytest.mark.parametrize("where", ["agent.safetensors", "earlier/agent.safetensors"])
def test_weights_that_a_run_would_put_away_or_delete_are_refused(where, name, tmp_path):
    run("bandit", tmp_path / "trained")
    (path := tmp_path / "best" / where).parent.mkdir(parents=True)
    shutil.copy(tmp_path / "trained" / "agent.safetensors", path)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=rf"{name}='.*' was left by an earlier run in log_dir=.*: copy it elsewhere"):
        run("bandit", tmp_path / "best", **{name: path})
    assert files_of(tmp_path) == before


def test_a_resume_does_without_the_weights_that_the_run_began_with(tmp_path):
    run("bandit", tmp_path / "first", seed=3)
    weights = tmp_path / "first" / "agent.safetensors"
    run("bandit", tmp_path / "on", seed=3, initial_weights=weights)
    weights.unlink()
    on = {"updates": 3, "initial_weights": weights, "resume": True}
    assert len(run("bandit", tmp_path / "on", seed=3, **on).train.history) == 3
    shutil.rmtree(tmp_path / "on" / "checkpoints")
    with pytest.raises(ValueError, match="initial_weights='.*' is no file"):  # it would begin anew
        run("bandit", tmp_path / "on", seed=3, **on)


def test_a_resume_with_nothing_left_leaves_the_run_as_it_was(tmp_path):
    run("bandit", tmp_path, seed=3)
    run("bandit", tmp_path, seed=3, lr=0.5, resume=True, resume_changes=("update.lr",))
    assert run("bandit", tmp_path, seed=3, updates=3, resume=True).train.history[-1]["train/lr"] < 0.003


@pytest.mark.parametrize("learns_from", ["task", "rewards"])
def test_a_resume_with_other_optimism_or_other_held_out_tasks_is_refused(learns_from, tmp_path):
    begun = {"learns_from": learns_from, "pulls": 30, "optimism": 1.0, "optimism_after": 0.3, "held_out_seed": 7}
    begun = {**begun, "seed": 3, "classical": False, "env_steps": 3 * 32 * 30}
    run("bandit", tmp_path, **{**begun, "env_steps": 2 * 32 * 30})
    for name, value in {"optimism": 0.5, "optimism_after": 0.1, "held_out_seed": 8}.items():
        with pytest.raises(ValueError, match=rf"other settings \(\w+.{name}: {begun[name]} then, {value} now\)"):
            run("bandit", tmp_path, **{**begun, name: value, "resume": True})
    assert len(run("bandit", tmp_path, **begun, resume=True).train.history) == 3


def test_a_training_that_was_cut_short_is_gone_on_with(tmp_path):
    calls = []

    def train(interrupted, resume):
        calls.append(resume)
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        (tmp_path / "report.json").write_text(json.dumps({"train": {"history": [], "interrupted": interrupted}}))

    with pytest.raises(KeyboardInterrupt, match="is not finished: the same command goes on with it"):
        finished_report(tmp_path, partial(train, True), {})
    assert not finished_report(tmp_path, partial(train, False), {})["train"]["interrupted"]
    finished_report(tmp_path, partial(train, True), {})  # finished, and not trained again
    assert calls == [False, True]


@pytest.mark.parametrize(
    ("name", "option"),
    [("cartpole", {"observation_scale": 9.0}), ("pendulum", {"velocity_scale": 9.0}), ("walker", {"horizon": 9})],
)
def test_a_resume_with_another_env_of_gymnasiums_is_refused(name, option, tmp_path):
    if name == "walker":
        pytest.importorskip("mujoco")
    trained(name, tmp_path, updates=1)
    with pytest.raises(ValueError, match=r"other settings \(env.make: .* now\)"):
        run(name, tmp_path, **option, resume=True)
    assert len(trained(name, tmp_path, resume=True).history) == 2


def test_a_training_with_other_settings_is_not_taken_for_one_with_these(tmp_path, caplog):
    def train(resume):
        (tmp_path / "report.json").write_text(json.dumps({"train": {"history": []}}))

    assert finished_report(tmp_path, train, {"lr": 0.1, "cells": (3,)}) == {"train": {"history": []}}
    finished_report(tmp_path, train, {"lr": 0.1, "cells": (3,), "later": 1})  # which came later than the training
    with pytest.raises(ValueError, match=r"other settings \(lr was 0.1, is 0.2\), .*: move it away"):
        finished_report(tmp_path, train, {"lr": 0.2, "cells": (3,)})
    assert not caplog.text
    (tmp_path / "settings.json").unlink()
    finished_report(tmp_path, train, {"lr": 0.2})
    assert "is taken for a training with these settings" in caplog.text
