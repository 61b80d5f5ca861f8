"""GridNavi's recipe: the optimum's paths, goals in turn, and the page of seeds at a tiny size."""

import csv
import json
from dataclasses import replace
from functools import wraps

import pytest
import torch
from recipe_runs import run

from recipes import grid_navi, grid_navi_seeds
from recipes.grid_navi import EPISODE_STEPS, GOALS, best_paths, goals_in_turn
from rl2_torchrl.baselines import grid_search


@pytest.mark.parametrize("episodes", [1, 4])  # in one not all goals are found
def test_the_optimums_paths_earn_what_it_is_worth(episodes):
    best = grid_search(GOALS, episodes=episodes)
    assert bool((best.found < 0).any()) == (episodes == 1)
    paths = best_paths(best, GOALS, episodes)  # before each step
    assert (paths[:, :, 0] == 0).all()
    before, after = paths[:, :, :-1], paths[:, :, 1:]
    assert ((before % 5 - after % 5).abs() + (before // 5 - after // 5).abs() <= 1).all()
    goal = (5 * GOALS[:, 1] + GOALS[:, 0]).long()
    # After the last step it is where it was before, if that was on the goal; else in a cell of the walk.
    last = best.cells.view(episodes, EPISODE_STEPS)[:, -1].expand(21, episodes)
    last = torch.where(paths[:, :, -1] == goal.unsqueeze(-1), goal.unsqueeze(-1), last)
    on_goal = torch.cat([after, last.unsqueeze(-1)], -1) == goal.view(-1, 1, 1)
    earned = (1.1 * on_goal.double() - 0.1).sum((1, 2))
    assert earned.tolist() == pytest.approx(best.returns.tolist())


def test_goals_in_turn():
    goals = goals_in_turn(torch.Size([42]), torch.Generator())
    assert torch.equal(goals[:21], GOALS)
    assert torch.equal(goals[21:], GOALS)
    assert len(GOALS.unique(dim=0)) == 21


def report(greedy, commit="abc"):
    agent = {"greedy_mean": greedy, "mean": 36.0, "per_episode": [3.5, 11.0]}
    train = {"env_steps": 2_000_000, "seconds": 90.0}
    return {"agent": agent, "optimum": 40.0, "train": train, "commit": commit}


def test_page_of_seeds(tmp_path):
    runs, page = tmp_path / "runs", tmp_path / "pages" / "seeds.md"
    for seed, greedy in enumerate((40.0, 39.8, 39.79)):  # 100 %, 99.5 %, less
        folder = grid_navi_seeds.folder_of(seed, 2_000_000, "task", runs)
        folder.mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps(report(greedy)))
        (folder / "path.png").write_bytes(b"png")
    grid_navi_seeds.main(seeds=(0, 1, 2), env_steps=2_000_000, runs=runs, page=page)
    text = page.read_text()
    assert "the Bayes optimum is 40.000. Of 3 seeds 2 earn 99.5 % of it or more greedily, 1 all of it." in text
    assert "| 1 | 39.800 | 99.50 % | 36.000 | 2.0 | 1.5 |" in text
    assert "commits abc," in text
    [*rows] = csv.DictReader(page.with_suffix(".csv").open())
    assert [row["greedy"] for row in rows] == ["40.0", "39.8", "39.79"]
    assert page.with_suffix(".png").exists()


@pytest.mark.usefixtures("unpainted")
def test_what_is_trained_is_not_trained_again(tmp_path, monkeypatch):
    tiny = replace(grid_navi.PRESET.learning, trials=8, epochs=1, minibatches=2)
    monkeypatch.setattr(grid_navi, "PRESET", replace(grid_navi.PRESET, learning=tiny))
    monkeypatch.setitem(grid_navi.main.__kwdefaults__, "learning", tiny)
    options = {"seeds": (1,), "env_steps": 480, "runs": tmp_path / "runs", "page": tmp_path / "page.md"}
    [row] = grid_navi_seeds.main(**options)
    assert row["env_steps"] == 480
    assert row["share"] == pytest.approx(row["greedy"] / 37.2142857, abs=1e-4)
    [file] = (tmp_path / "runs").rglob("report.json")
    assert json.loads(file.read_text())["title"] == "RL² on GridNavi (task told in training: critic)"
    grid_navi_seeds.main(**options, learns_from="rewards")
    [other] = set((tmp_path / "runs").rglob("report.json")) - {file}
    assert json.loads(other.read_text())["title"] == "RL² on GridNavi (rewards only)"
    assert options["page"].read_text().startswith("# grid navi seeds, rewards only\n")
    monkeypatch.setattr(grid_navi, "main", wraps(grid_navi.main)(lambda **settings: pytest.fail("trained again")))
    assert grid_navi_seeds.main(**options) == [row]
    with pytest.raises(ValueError, match="seeds is empty"):
        grid_navi_seeds.main(seeds=())
    with pytest.raises(ValueError, match=r"seeds=\(1, 1\): each seed once"):
        grid_navi_seeds.main(**{**options, "seeds": (1, 1)})


def test_goals_are_reported_alike(tmp_path, caplog):
    report = run("grid_navi", tmp_path, report_tasks=22)
    assert report.agent.num_tasks == 42
    assert "report_tasks=22 is made 42: each goal as often" in caplog.text


def test_standard_errors_are_over_rounds_of_all_goals(tmp_path):
    report = run("grid_navi", tmp_path, report_tasks=10 * 21)
    for exact in (report.greedy, report.baselines["goal_known"]):
        assert exact.se == pytest.approx(0.0, abs=1e-6)
        assert exact.per_episode_se.tolist() == pytest.approx([0.0] * 4, abs=1e-6)
    rounds = torch.stack(report.agent.trial_returns.split(21)).mean(1)
    assert report.agent.se == pytest.approx(rounds.std().item() / 10**0.5)
    assert report.agent.se > 0


@pytest.mark.usefixtures("unpainted")
def test_a_run_that_is_ended_at_its_last_plot_is_gone_on_with(tmp_path, monkeypatch):
    tiny = replace(grid_navi.PRESET.learning, trials=8, epochs=1, minibatches=2)
    monkeypatch.setitem(grid_navi.main.__kwdefaults__, "learning", tiny)
    options = {"seeds": (1,), "env_steps": 480, "runs": tmp_path / "runs", "page": tmp_path / "page.md"}
    plot_paths = grid_navi.plot_paths
    monkeypatch.setattr(grid_navi, "plot_paths", ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        grid_navi_seeds.main(**options)
    monkeypatch.setattr(grid_navi, "plot_paths", plot_paths)
    grid_navi_seeds.main(**options)
    assert (tmp_path / "page.png").exists()


def ctrl_c(*_):
    raise KeyboardInterrupt
