"""The shipped agents: the page of their scores is that of the files, they score so, and their exports play the same trials."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from recipes import agent_benchmark, agents, bandit, grid_navi, half_cheetah, probe
from recipes.command import arguments, command
from rl2_torchrl import AdaptiveAgent

pytestmark = pytest.mark.usefixtures("unpainted")
PRETRAINED = Path(__file__).parents[1] / "recipes" / "pretrained"
PAGE = (PRETRAINED / "README.md").read_text(encoding="utf-8")
#: File: env, what it was trained with, network, bytes, score, standard error, trials.
ROWS = {
    cells[0].strip("`"): cells[1:]
    for cells in re.findall(r"^\| (`.*?`) \| " + r"(.*?) \| " * 6 + r"(.*?) \|$", PAGE, re.MULTILINE)
}


def test_the_page_is_of_the_files_that_are_there():
    assert sorted(ROWS) == sorted(path.name for path in PRETRAINED.glob("*.safetensors"))
    for name, (_, told, network, size, *_) in ROWS.items():
        assert told == ("the task told" if name.endswith("_task.safetensors") else "rewards only")
        assert int(size) == (PRETRAINED / name).stat().st_size
        assert network == agents.network_of(AdaptiveAgent.load(PRETRAINED / name))


def test_a_recipe_plays_an_agent_by_the_command_on_the_page(tmp_path, monkeypatch):
    assert agents.PLAYED in PAGE
    words = shlex.split(re.search(r"`python -m recipes.bandit (.*?)`", PAGE)[1])
    words[words.index("--log-dir") + 1] = str(tmp_path)
    monkeypatch.chdir(PRETRAINED.parents[1])
    monkeypatch.setattr("sys.argv", ["bandit", *words, "--report-tasks", "20", "--no-classical"])
    assert 5 < command(bandit.main).agent.mean < 8


@pytest.mark.parametrize("name", ["bandits_10_5_rewards.safetensors", "mdps_10_rewards.safetensors"])
def test_agents_score_what_the_page_says(name):
    curve = agents.score(PRETRAINED / name, 400)
    *_, mean, se, trials = ROWS[name]
    assert abs(curve.mean - float(mean)) < 4 * curve.se
    # 400 trials are fewer than the page's by so much in the standard error.
    assert curve.se == pytest.approx(float(se) * (int(trials) / 400) ** 0.5, rel=0.25)


def test_a_page_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(agents, "made_by", lambda: {"command": "the command that was given", "commit": "abc"})
    monkeypatch.chdir(tmp_path)  # where a page of the shipped agents would be written
    with pytest.raises(ValueError, match=r"holds no agents, .*: name one that does"):
        agents.main(folder=tmp_path)
    (tmp_path / "bandits_10_5_rewards.safetensors").write_bytes(
        (PRETRAINED / "bandits_10_5_rewards.safetensors").read_bytes()
    )
    page = tmp_path / "README.md"
    curves = agents.main(folder=tmp_path, trials=50)
    assert "by sampling: `the command that was given`, commit abc." in page.read_text()
    assert (
        f"| {curves['bandits_10_5_rewards.safetensors'].mean:.2f} | {curves['bandits_10_5_rewards.safetensors'].se:.2f} | 50 |"
        in page.read_text()
    )
    with pytest.raises(ValueError, match="trials=1: a standard error needs two"):
        agents.main(folder=tmp_path, trials=1, page=page)


@pytest.mark.parametrize("name", ["ponies_3", "agent", "bandits_10", "mdps_few", "grid_navi_task"])
def test_a_name_without_an_env_is_refused_with_what_helps(name, tmp_path):
    message = (
        f"'{name}' is named after no bandits and no MDPs, .*copy its file to bandits_<pulls>_<arms>.*--weights FILE"
    )
    with pytest.raises(ValueError, match=message):
        agents.held_out(name, 2)
    if name != "grid_navi_task":  # which its recipe plays
        (tmp_path / f"{name}.safetensors").write_bytes((PRETRAINED / "bandits_10_5_rewards.safetensors").read_bytes())
        with pytest.raises(ValueError, match=message):
            agents.main(folder=tmp_path, trials=2)


def test_an_agent_of_another_recipe_scores_what_that_recipe_reports(tmp_path):
    preset = {"units": grid_navi.PRESET.network.units, "trials": 8, "env_steps": 480, "minibatches": 2}
    run = {"report_tasks": 42, "progress": False, "log_dir": tmp_path}
    report = grid_navi.main(**arguments(grid_navi.main, {**preset, **run}))
    weights = (tmp_path / "agent.safetensors").rename(tmp_path / "grid_navi_task.safetensors")
    curve = agents.score(weights, 42)
    assert curve.num_tasks == 42
    assert abs(curve.mean - report.agent.mean) < 4 * curve.se  # the same tasks, other noise
    torch.manual_seed(1)
    assert agents.score(weights, 42).mean == curve.mean  # whatever was drawn before
    assert agents.about(weights)[1:3] == ["grid navi", "the task told"]


@pytest.mark.parametrize(
    ("options", "network"), [({"core": "lstm"}, "LSTM 4, 128"), ({"encoder_cells": (7,)}, "7, GRU 4, 128")]
)
def test_agents_of_other_networks_are_played_and_probed(options, network, tmp_path):
    tiny = {"trials": 8, "units": 4, "env_steps": 80, "minibatches": 1, "report_tasks": 2, "classical": False}
    run = {"log_dir": tmp_path / "run", "progress": False}
    bandit.main(**arguments(bandit.main, {"learns_from": "rewards", **tiny, **run, **options}))
    path = (tmp_path / "run" / "agent.safetensors").rename(tmp_path / "bandits_10_5_rewards.safetensors")
    agents.main(folder=tmp_path, trials=20)
    assert f"| {network} |" in (tmp_path / "README.md").read_text()
    assert probe.main(agents=(path,), trials=100, page=tmp_path / "probe.md")[path.stem].shape == (9, 2)


@pytest.mark.parametrize("learns_from", ["rewards", "task"])
def test_what_an_agent_learnt_from_is_said_as_its_file_is_named(learns_from):
    name = f"grid_navi_{learns_from}.safetensors"
    assert agents.report_of(PRETRAINED / name, 21).title == f"RL² on GridNavi ({name})"


@pytest.mark.parametrize("form", ["pt2", "onnx"])
def test_exported_agents_earn_what_the_training_policy_earns(form):
    if form == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    path = PRETRAINED / "bandits_10_5_rewards.safetensors"
    figures = agent_benchmark.main(agent=path, trials=100, forms=(form,), actions=10, rows=2)
    returns = {name: figure["return"] for name, figure in figures.items()}
    assert set(returns) == {"training's policy", "agent", f".{form}"}
    assert figures[f".{form}"]["difference"] == 0
    assert len(set(returns.values())) == 1  # whole pulls that paid: the same actions, or it would not be
    assert all(figure["microseconds"] > 0 for figure in figures.values())


def test_exported_cheetahs_run_as_the_training_policy_does(tmp_path, monkeypatch):
    pytest.importorskip("mujoco")
    tiny = {
        "trials": 2,
        "units": 4,
        "horizon": 5,
        "minibatches": 1,
        "env_steps": 20,
        "report_tasks": 2,
        "progress": False,
        "log_dir": tmp_path,
    }
    half_cheetah.main(**arguments(half_cheetah.main, {"task": "velocity", **tiny}))
    monkeypatch.setattr(
        agent_benchmark,
        "CheetahTrials",
        lambda *env, **sizes: half_cheetah.CheetahTrials(*env, **{**sizes, "horizon": 50}),
    )
    played = {"agent": tmp_path / "agent.safetensors", "env": "velocity", "trials": 2, "forms": ("pt2",), "actions": 0}
    figures = agent_benchmark.main(**played)
    assert figures["agent"] == {"return": figures["training's policy"]["return"], "difference": 0}
    # What rounding does to one action leads a cheetah, which is chaotic, elsewhere in time: so, shown the same.
    assert 0 < figures[".pt2"]["difference"] < 1e-5
    assert figures[".pt2"]["return"] == pytest.approx(figures["agent"]["return"], rel=0.3)
    # Its digits beyond those that the env takes lead it nowhere.
    figures = agent_benchmark.main(**played, dtype="float64")
    assert {figure["return"] for figure in figures.values()} == {figures[".pt2"]["return"]}
