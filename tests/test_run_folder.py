"""What runs leave in one folder, one after another."""

import json

import pytest
import torch
from recipe_runs import run

from rl2_torchrl import kernels


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


def test_it_says_which_way_the_update_has_found(tmp_path):
    if kernels.load(torch.float32) is None:
        pytest.skip("without kernels")
    arguments = {"mode": "original", "trials": 2, "episodes": 1, "horizon": 20}
    run("half_cheetah", tmp_path, **arguments)
    [update] = [line.split() for line in (tmp_path / "about.txt").read_text().splitlines() if "PPOUpdate" in line]
    assert update[:2] == ["PPOUpdate", "compiled"]  # known once there was a batch: its minibatches are tiny


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
