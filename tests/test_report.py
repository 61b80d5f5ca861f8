"""The report: as a table, a plot and a file."""

import io
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from evaluation_cases import NAN, make_report
from rich.console import Console

from rl2_torchrl import (
    AdaptationCurve,
    TrainResult,
)


def test_numbers_of_other_kinds_are_written(tmp_path):
    report = make_report(optimum=torch.tensor(2.5), seed=np.int64(7))
    report.train.history[0]["mine"] = np.float32("nan")
    stored = json.loads(report.save(tmp_path).read_text())
    assert (stored["optimum"], stored["seed"], stored["train"]["history"][0]["mine"]) == (2.5, 7, None)


def test_trials_of_other_lengths_are_not_compared(caplog):
    report = partial(make_report, ablations={})
    agent, longer, whole = (AdaptationCurve(torch.zeros(2, n)) for n in (2, 3, 1))
    with pytest.raises(ValueError, match=r"different numbers of episodes, \{'RL²': 2.*'random': 3\}"):
        report(agent=agent, greedy=agent, baselines={"random": longer})
    report(agent=agent, greedy=agent, baselines={"random": whole})  # its trials' whole returns
    assert "numbers of tasks" not in caplog.text
    report(agent=agent, greedy=agent, baselines={"random": AdaptationCurve(torch.zeros(3, 2))})
    assert "different numbers of tasks, [2, 3]" in caplog.text


def test_a_classical_agent_called_as_a_way_to_play_takes_nothings_place():
    report = make_report(baselines={"greedy": make_report().agent})
    summary = report.summary()
    assert (summary["RL², greedy"], summary["greedy"]) == ("2.333 ± 0.333", "2.000 ± 0.577")
    with pytest.raises(ValueError, match="two curves would be called RL², greedy, and one be lost"):
        make_report(baselines={"RL², greedy": report.agent})


def test_report_as_dict():
    report = make_report().to_dict()
    # Trial returns 1, 2, 3 of the agent, 2, 2, 3 in deterministic mode, and 0, 1, 2.
    assert report["agent"]["mean"] == 2.0
    assert report["agent"]["se"] == pytest.approx(1 / math.sqrt(3))
    assert report["agent"]["num_tasks"] == 3
    assert report["agent"]["greedy_mean"] == pytest.approx(7 / 3)
    assert report["agent"]["per_episode"] == pytest.approx([2 / 3, 4 / 3])
    assert report["baselines"]["random"]["mean"] == 1.0
    assert report["baselines"]["random"]["se"] == pytest.approx(1 / math.sqrt(3))
    assert report["ablations"]["memory_zeroed"]["mean"] == 1.0
    assert report["train"]["env_steps"] == 20
    assert report["train"]["seconds"] == 1.5
    assert report["optimum"] == 2.5
    assert report["seed"] == 7
    assert isinstance(report["command"], str)
    assert {"rl2_torchrl", "torch", "torchrl", "tensordict", "python"} <= report["versions"].keys()


def strict_json(text):
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_a_report_goes_to_no_folder_without_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"folder is empty, and files would go to the current folder: .* folder='\.'"):
        make_report().save("")


@pytest.mark.parametrize("returns", [[[0.0, 1.0], [1.0, 1.0]], [[1.0, 2.0]], [[1.0, NAN], [1.0, 2.0]]])
def test_saved_report_is_strict_json_with_a_picture(tmp_path, returns):
    # A single trial has no standard error, and an episode that one trial alone reached has none either.
    curve = AdaptationCurve(torch.tensor(returns))
    report = make_report(agent=curve, baselines={"random": curve})
    path = report.save(tmp_path / "new" / "folder")
    saved = strict_json(path.read_text())
    assert path.name == "report.json"
    assert saved["agent"]["mean"] == pytest.approx(curve.mean)
    assert saved["agent"]["se"] == (None if len(returns) == 1 else pytest.approx(curve.se))
    assert saved["train"]["history"][1]["train/trial_return"] is None
    assert (path.parent / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_table_ranks_the_agents():
    table = make_report().table()
    names = [str(cell) for cell in table.columns[0].cells]
    means = list(table.columns[1].cells)
    ranked = [names.index(name) for name in names if "greedy" in name or name.endswith("RL²") or name == "random"]
    assert ranked == sorted(ranked)
    assert [means[i] for i in ranked] == ["2.333", "2.000", "1.000"]
    assert "2.500" in means[0]
    assert "memory zeroed" in names[-1]


def test_the_last_episode_is_the_same_one_in_all_rows_or_has_its_number():
    three = AdaptationCurve(torch.tensor([[0.0, 1.0, 2.0, NAN]]), finished=torch.tensor([3]))
    two, one = (AdaptationCurve(three.returns[:, :n], finished=torch.tensor([n])) for n in (2, 1))
    table = make_report(
        agent=three, greedy=two, baselines={"random": one}, ablations={"none": one}, optimum=None
    ).table()
    assert [column.header for column in table.columns][3:5] == ["first episode", "episode 3"]
    assert list(table.columns[3].cells) == ["0.000"] * 4
    assert list(table.columns[4].cells) == ["2.000", "1.000 (2)", "", ""]
    table = make_report(agent=two, greedy=three, baselines={}, ablations={}, optimum=None).table()
    assert table.columns[4].header == "last episode"
    assert list(table.columns[4].cells) == ["1.000", "1.000"]  # not the third
    shown = make_report(agent=AdaptationCurve(one.returns, measures={"success": one}), baselines={}, ablations={})
    assert shown.summary()["success, first episode"] == "0.000"


def test_names_in_brackets_are_names():
    random = AdaptationCurve(torch.tensor([[0.0, 1.0]]))
    report = make_report(
        title="bandits [v2]", episode_name="pull [short]", baselines={"psrl [ours]": random, "[/]": random}
    )
    console = Console(file=io.StringIO(), width=200)
    console.print(report.table())
    for name in ("bandits [v2]:", "first pull [short]", "psrl [ours]", " [/] ", " RL² "):
        assert name in console.file.getvalue()


def test_plot_shows_learning_and_adaptation():
    report = make_report(title="bandits", episode_name="pull")
    report.train.history.append({"env_steps": 30.0, "train/trial_return": 2.0})
    learning, adaptation = report.plot().axes
    training = next(line for line in learning.lines if line.get_label() == "training trials")
    assert training.get_xydata().tolist() == [
        [10 / 1e6, 1.0],
        [30 / 1e6, 2.0],
    ]  # over an update in which no trial ended
    assert adaptation.get_ylabel() == "mean return of the pull"
    assert adaptation.get_title().endswith("(bands: 2 SE)")
    held_out = next(line for line in learning.lines if line.get_label() == "held-out trials")
    assert held_out.get_xydata().tolist() == [[20 / 1e6, 1.5]]
    agent = next(line for line in adaptation.lines if line.get_label() == "RL²")
    assert agent.get_xydata().flatten().tolist() == pytest.approx([1, 2 / 3, 2, 4 / 3])
    assert "pull" in adaptation.get_xlabel()
    labels = {line.get_label() for line in adaptation.lines}
    assert {"random", "RL²"} <= labels
    assert any("memory zeroed" in label for label in labels)


def test_a_single_episode_is_points_with_bars_side_by_side():
    agent, other = (AdaptationCurve(torch.tensor(returns)) for returns in ([[1.0], [3.0]], [[0.0], [1.0]]))
    report = make_report(agent=agent, baselines={"random": other}, ablations={"memory_zeroed": other})
    _, adaptation = report.plot().axes
    agent = next(drawn for drawn in adaptation.containers if drawn.get_label() == "RL²")
    (point, _, (bar,)), where = agent, agent[0].get_xdata()[0]
    assert point.get_ydata().tolist() == [2.0]
    assert bar.get_segments()[0].flatten().tolist() == pytest.approx([where, 0.0, where, 4.0])  # 2 SE of 1
    drawn = [each[0].get_xdata()[0] for each in adaptation.containers]
    assert len(set(drawn)) == 3


def test_steps_of_episodes_are_shown_where_these_are_ragged():
    steps = AdaptationCurve(torch.tensor([[4.0, 1.0], [6.0, 3.0]]))
    returns = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    report = make_report(agent=AdaptationCurve(returns, steps=steps))
    # 5 steps on the mean of the first episode, 2 in the second. Of a trial a measure has no mean: a share has no sum.
    measured = report.to_dict()["agent"]["measures"]["steps"]
    assert (measured["per_episode"], measured.keys()) == ([5.0, 2.0], {"per_episode", "per_episode_se"})
    assert report.summary()["steps, first and last episode"] == "5.000, 2.000"
    table = report.table()
    column = next(column for column in table.columns if column.header == "steps, first → last")
    names = [str(cell) for cell in table.columns[0].cells]
    assert {name: cell for name, cell in zip(names, column.cells, strict=False) if cell} == {
        "[bold]RL²": "5.000 → 2.000"
    }
    agent = next(line for line in report.plot().axes[2].lines if line.get_label() == "RL²")
    assert agent.get_xydata().tolist() == [[1.0, 5.0], [2.0, 2.0]]
    for alike in ([[4.0, 2.0], [4.0, NAN]], [[3.0, 3.0]]):  # a trial's last episode may be cut in all trials
        assert AdaptationCurve(torch.tensor(alike), steps=AdaptationCurve(torch.tensor(alike))).shown == []


def test_an_empty_report_can_be_drawn():
    report = make_report(baselines={}, ablations={}, optimum=None, train=TrainResult())
    assert len(report.plot().axes) == 2
    assert report.table().row_count >= 2
