"""The paper's tables at a tiny size: the page, marks worked out by hand, resuming, weights, and tasks that never meet."""

import json
from dataclasses import replace
from math import sqrt
from pathlib import Path

import pytest
import torch
import tyro

from recipes import bandit, experiment, paper_cells, paper_page, paper_tables, tabular_mdp
from recipes.paper_cells import CELLS, TASK_SEED, BanditCell, MDPCell
from recipes.paper_numbers import PAPER, PAPER_SE
from recipes.paper_settings import RL2_SETTINGS
from recipes.streams import HELD_OUT_TASKS, REPORT_TASKS, TUNING_TASKS, draw_tasks
from rl2_torchrl import AdaptiveAgent, TaskSampler, baselines
from rl2_torchrl.envs import random_mdps, uniform_means, unpack_mdps

TINY = {"bandits": BanditCell(pulls=3, arms=2), "mdps": MDPCell(episodes=2)}
#: What makes it the task: bandits' rule says it.
WAY = {"bandits": {}, "mdps": {"belief": 1.0, "posterior": True}}
BATCH = {"bandits": 16 * 3, "mdps": 16 * 20}
FEW_AGENTS = (
    "random",
    "optimistic_thompson_sampling",
    "ucb1",
    "greedy",
)  # Gittins indices take long where none are stored


@pytest.fixture(autouse=True)
def tiny(monkeypatch, unpainted):
    """A tiny cell in each table."""
    for table, cell in TINY.items():
        settings = {"trials": 16, "units": 4, "epochs": 1, "minibatches": 1, "env_steps": BATCH[table]}
        monkeypatch.setitem(CELLS[table], cell.name, cell)
        monkeypatch.setitem(PAPER[table], cell.name, dict.fromkeys(next(iter(PAPER[table].values())), 1.5))
        monkeypatch.setitem(PAPER_SE[table], cell.name, 0.4)
        monkeypatch.setitem(RL2_SETTINGS[table], cell.name, {"rewards": settings, "task": settings | WAY[table]})
    monkeypatch.setattr(BanditCell, "agents", {name: BanditCell.agents[name] for name in FEW_AGENTS})


def run(path, table="bandits", **options):
    """The command on the tiny cell of a table, with everything that it writes under ``path``."""
    places = {"folder": path / "results" / "figures", "runs": path / "runs", "pretrained": path / "pretrained"}
    asked = {
        "table": table,
        "cells": (TINY[table].name,) if table in TINY else (),
        "tasks": 40,
    }
    if options.get("part") != "classical":
        asked["learns_from"] = "rewards"
    return paper_tables.main(**{**asked, **places, **options})


def figures(path):
    """What is in the files, by their names."""
    return {file.stem: json.loads(file.read_text()) for file in (path / "results" / "figures").iterdir()}


# ---- Published numbers, marks and means over seeds.


def test_published_numbers():
    assert {table: len(rows) - 1 for table, rows in PAPER.items()} == {"bandits": 9, "mdps": 5}
    assert PAPER["bandits"]["500,10"]["optimistic_thompson_sampling"] == 438.9
    assert PAPER["bandits"]["100,50"]["snail"] == 85.1
    assert PAPER["bandits"]["100,10"]["rl2"] == 83.5
    assert PAPER["mdps"]["75"]["opsrl"] == 1449.2
    for table, rows in PAPER.items():
        assert rows.keys() == PAPER_SE[table].keys() == RL2_SETTINGS[table].keys() == CELLS[table].keys()


@pytest.mark.parametrize(
    ("ours", "expected"), [(78.0, "within"), (78.01, "above"), (75.0, "within"), (74.99, "below"), (76.5, "within")]
)
def test_mark(ours, expected):
    # The standard error of the difference is sqrt(0.3² + 0.4²) = 0.5, three of them are 1.5.
    assert paper_page.mark(ours, 0.3, 76.5, 0.4) == expected


def test_mean_over_seeds():
    # 1, 2, 3: standard deviation 1, so 1/sqrt(3) for their mean; 0.3 over the tasks, which are the same for all.
    seeds = [{"mean": mean, "se": 0.3} for mean in (1.0, 2.0, 3.0)]
    assert paper_page.over_seeds(seeds) == pytest.approx((2.0, sqrt(0.09 + 1 / 3)))
    assert paper_page.over_seeds(seeds[:1]) == pytest.approx((1.0, 0.3))


# ---- The page.


def figure(agent, mean, **more):
    whole = {"table": "bandits", "cell": "100,10", "agent": agent, "mean": mean, "se": 0.1, "num_tasks": 10_000}
    return {**whole, "command": f"command of {agent}", "commit": "abc", "versions": {"torch": "2"}, **more}


def trained(seed, mean, held_out, way="task"):
    sizes = {"env_steps": 60_000_000, "seconds": 1800.0 + 1200 * seed}
    more = {"held_out": held_out, "greedy_mean": 82.0, "greedy_se": 0.2, "memory_zeroed": 50.0}
    return figure(f"rl2_{way}_seed{seed}", mean, cell="100,5", **more, **sizes)


def test_page_is_made_of_the_files(tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    (tmp_path / "paper_notes.md").write_text("## What differs\n\nA note, *word for word*.\n")
    entries = [
        figure("ucb1", 82.45, options={"exploration": 0.2}, tuning_tasks=5, seconds=100.0),
        figure("random", 60.0, num_tasks=20_000, tuning_tasks=0, seconds=260.0),
        figure("optimistic_thompson_sampling", 250.0, cell="500,50", num_tasks=2000),
        trained(0, 77.4, held_out=83.0),  # above the other on the tasks that are reported, which must not choose
        {**trained(1, 77.2, held_out=83.1), "settings": {"initial_weights": "weights/bandits_10_5.pt"}},
        figure("rl2_task_pretrained", 77.25, cell="100,5"),
        trained(0, 76.3, held_out=76.0, way="rewards"),
    ]
    for number, entry in enumerate(entries):
        (folder / f"{number}.json").write_text(json.dumps(entry))
    page = paper_tables.main(part="page", folder=folder)
    assert page == tmp_path / "tables.md"
    text = page.read_text()
    assert "\n\n## What differs\n\nA note, *word for word*.\n\n" in text
    # 0.05 from 82.4 and 10.1 from 49.9, with SE sqrt(0.1² + 0.41²) = 0.42.
    row = "| 60.00 ± 0.10 (49.9: above) | - (82.8) | - (76.7) | - (81.4) | 82.45 ± 0.10 (82.4: within) |"
    assert f"| 100, 10 (0.41) {row}" in text
    # Mean 77.3, SE over tasks 0.1, over seeds 0.141/sqrt(2) = 0.1: 0.141. Three SE of the difference, with 0.52, are 1.6; it is
    # 1.4 from 78.7 and 1.8 from 79.1. Minutes: 30 and 50.
    row = "| 2 | 77.30 ± 0.14 (78.7: within) | (79.1: below) | 77.20 ± 0.10 (78.7: within) | 82.00 ± 0.20 | 50.00 |"
    assert f"| 100, 5 (0.52) {row} 77.25 ± 0.10 | 60.0 | 40.0, on from bandits_10_5 |" in text
    # The one that saw rewards alone is in a table of its own, before; 0.52 from 78.7 and from 79.1 as well, times 3: 1.6.
    rewards, task = text.index("### RL², trained on rewards only"), text.index("### RL², task told in training")
    alone = text.index("| 1 | 76.30 ± 0.10 (78.7: below) | (79.1: below) | 76.30 ± 0.10 (78.7: below) |")
    assert rewards < alone < task < text.index("| 2 | 77.30 ±")
    assert "exploration 0.2" in text
    assert "The 2 figures took 6 minutes together" in text
    others = "20,000 for random in cell 100,10; 2,000 for optimistic TS in cell 500,50, which takes long"
    assert f"Tasks in a cell: 10,000; {others}." in text
    for entry in entries:
        assert f"{entry['command']}  # commit abc" in text
    # Another cell has no file.
    assert "| 500, 50 (1.9) | - (249.6) | - (463.7) |" in text
    assert "| 500, 50 (1.9) | - | - (438.9) | (442.6) | - | - | - | - | - | - |" in text


# ---- Classical agents.


def test_classical_agents_and_what_is_kept_of_them(tmp_path):
    run(tmp_path, part="classical")
    stored = figures(tmp_path)
    assert set(stored) == {f"bandits_3_2_{name}" for name in (*FEW_AGENTS, "optimum")}
    means = draw_tasks(uniform_means(2), TASK_SEED, REPORT_TASKS, 40)
    earned = baselines.greedy(means, 3, torch.Generator().manual_seed(1000 * TASK_SEED + 10)).double().sum(-1)
    greedy = stored["bandits_3_2_greedy"]
    assert greedy["mean"] == pytest.approx(earned.mean().item())
    assert greedy["se"] == pytest.approx(earned.std().item() / sqrt(40))
    assert (greedy["num_tasks"], greedy["options"], greedy["tuning_tasks"]) == (40, {}, 0)
    assert stored["bandits_3_2_optimum"]["mean"] == pytest.approx(5 / 3)  # worked out by hand in test_baselines.py
    ucb1 = stored["bandits_3_2_ucb1"]
    assert 0 <= ucb1["options"]["exploration"] <= 1
    assert ucb1["tuning_tasks"] == 80
    assert ucb1["command"].endswith("--table bandits --cells 3,2 --tasks 40 --part classical --fresh")
    assert "torch" in ucb1["versions"]


def test_classical_agents_for_mdps(tmp_path):
    run(tmp_path, "mdps", part="classical", tasks=10)
    stored = figures(tmp_path)
    assert set(stored) == {f"mdps_2_{name}" for name in (*MDPCell.agents, "optimum")}
    best = baselines.optimal_return(unpack_mdps(draw_tasks(random_mdps(), TASK_SEED, REPORT_TASKS, 10)))
    assert stored["mdps_2_optimum"]["mean"] == pytest.approx(2 * best.mean().item(), rel=1e-5)
    options = {name: next(iter(stored[f"mdps_2_{name}"]["options"]), None) for name in MDPCell.agents}
    scalings = {"beb": "scaling", "ucrl2": "scaling", "opsrl": "num_samples", "epsilon_greedy": "epsilon"}
    scalings["optimistic_memory"] = "optimism"
    assert options == {**dict.fromkeys(MDPCell.agents), **scalings}


def test_nothing_is_computed_twice(tmp_path, monkeypatch):
    played, play = [], BanditCell.play
    monkeypatch.setattr(BanditCell, "play", lambda cell, agent, n: played.append(agent) or play(cell, agent, n))
    everyone = [*FEW_AGENTS, "optimum"]
    run(tmp_path, part="classical")
    assert played == everyone
    run(tmp_path, part="classical", tasks=30)
    assert played == everyone
    (tmp_path / "results" / "figures" / "bandits_3_2_ucb1.json").unlink()
    run(tmp_path, part="classical")
    assert played == [*everyone, "ucb1"]
    run(tmp_path, part="classical", tasks=50)  # fewer are there than are asked for
    assert played == [*everyone, "ucb1", *everyone]
    run(tmp_path, part="classical", tasks=50, fresh=True)
    assert played == [*everyone, "ucb1", *everyone, *everyone]


def test_the_slow_agent_plays_fewer_tasks():
    asked = [BanditCell(500, 50).num_tasks(name, 10_000) for name in ("optimistic_thompson_sampling", "ucb1")]
    assert asked == [2000, 10_000]
    assert BanditCell(500, 10).num_tasks("optimistic_thompson_sampling", 10_000) == 10_000
    # They are the first of those of the others.
    many, few = (draw_tasks(uniform_means(50), TASK_SEED, REPORT_TASKS, n) for n in (10_000, 2000))
    assert torch.equal(many[:2000], few)


# ---- Tasks.


@pytest.mark.parametrize("table", TINY)
def test_all_agents_are_reported_on_the_same_tasks_which_none_was_tuned_or_trained_on(table, tmp_path, monkeypatch):
    module = {"bandits": bandit, "mdps": tabular_mdp}[table]
    drawn = {kind: [] for kind in range(4)}
    trained_on = []

    def recorded_tasks(distribution, seed, stream, number):
        drawn[stream].append(draw_tasks(distribution, seed, stream, number))
        return drawn[stream][-1]

    class Recorded(TaskSampler):
        def __init__(self, distribution, **options):
            super().__init__(lambda *args: trained_on.append(distribution(*args)) or trained_on[-1], **options)

        @classmethod
        def fixed(cls, tasks, **options):
            return TaskSampler.fixed(tasks, **options)

    for where in (bandit, paper_cells, experiment):
        monkeypatch.setattr(where, "draw_tasks", recorded_tasks)
    monkeypatch.setattr(module, "TaskSampler", Recorded)
    run(tmp_path, table, seeds=(0, 7))
    reported = drawn[REPORT_TASKS]
    assert len(reported) == {"bandits": 4, "mdps": 10}[table] + 2  # classical agents and two trainings
    assert len(drawn[TUNING_TASKS]) == {"bandits": 4, "mdps": 9}[table]  # all but the optimum
    assert all(torch.equal(each, reported[0]) for each in reported)
    assert all(torch.equal(each, drawn[HELD_OUT_TASKS][0]) for each in drawn[HELD_OUT_TASKS])
    others = [*trained_on, *drawn[TUNING_TASKS], *drawn[HELD_OUT_TASKS]]
    others = {tuple(task) for each in others for task in each.tolist()}
    assert len(others) > 100
    assert not {tuple(task) for task in reported[0].tolist()} & others


# ---- RL².


@pytest.mark.parametrize("table", TINY)
def test_trainings_figures_and_weights(table, tmp_path, monkeypatch):
    run(tmp_path, table, part="rl2", seeds=(0, 1))
    stem = f"{table}_{TINY[table].name.replace(',', '_')}"
    stored = figures(tmp_path)
    assert set(stored) == {f"{stem}_rl2_rewards_seed0", f"{stem}_rl2_rewards_seed1"}
    for seed in (0, 1):
        report = json.loads((tmp_path / "runs" / f"{stem}_rewards_seed{seed}" / "report.json").read_text())
        kept = stored[f"{stem}_rl2_rewards_seed{seed}"]
        assert (report["seed"], report["baselines"]) == (seed, {})
        assert kept["mean"] == report["agent"]["mean"]
        assert kept["held_out"] == report["train"]["history"][-1]["eval/trial_return"]
        assert kept["memory_zeroed"] == report["ablations"]["memory_zeroed"]["mean"]
        assert kept["env_steps"] == BATCH[table]
        assert kept["settings"].items() >= RL2_SETTINGS[table][TINY[table].name]["rewards"].items()
        assert f"--part rl2 --learns-from rewards --seeds {seed} --fresh" in kept["command"]
    best = max((0, 1), key=lambda seed: stored[f"{stem}_rl2_rewards_seed{seed}"]["held_out"])
    actor = (tmp_path / "runs" / f"{stem}_rewards_seed{best}" / "agent.safetensors").read_bytes()
    assert (tmp_path / "pretrained" / f"{stem}_rewards.safetensors").read_bytes() == actor


def test_weights_of_a_folder_of_ones_own_stay_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paper_tables, "PRETRAINED", shipped := tmp_path / "shipped")
    for folder, kept in (("figures", "figures/pretrained"), ("default", "shipped")):
        monkeypatch.setattr(paper_tables, "FOLDER", tmp_path / "default")
        run(tmp_path, part="rl2", seeds=(0,), folder=tmp_path / folder, pretrained=None)
        assert f"{tmp_path / kept / 'bandits_3_2_rewards.safetensors'}: the agent of rl2_rewards_seed0" in "".join(
            capsys.readouterr().out.split("\n")
        )
        assert shipped.exists() == (folder == "default")


def test_pretrained_weights_are_evaluated_without_training(tmp_path, monkeypatch, capsys):
    run(tmp_path, part="rl2", seeds=(0,))
    loaded, load = [], experiment.load_weights
    monkeypatch.setattr(experiment, "load_weights", lambda actor, path: loaded.append(path) or load(actor, path))
    monkeypatch.setattr(experiment, "train", None)
    run(tmp_path, part="rl2", from_pretrained=True)
    run(tmp_path, part="rl2", from_pretrained=True)  # an evaluation is what was asked for, twice
    assert loaded == [tmp_path / "pretrained" / "bandits_3_2_rewards.safetensors"] * 2
    evaluated = figures(tmp_path)["bandits_3_2_rl2_rewards_pretrained"]
    assert "settings" not in evaluated  # weights do not say which training left them
    assert 0.8 < evaluated["mean"] < 2.2  # 1.5 for who knows nothing, SE 0.14
    assert (
        f"3,2 rl2_rewards_pretrained: {evaluated['mean']:.3f} ± {evaluated['se']:.3f} (1.5: within)"
        in capsys.readouterr().out
    )


def test_all_weights_that_are_shipped_are_evaluated_in_one_command(tmp_path):
    run(tmp_path, part="rl2", seeds=(0,), learns_from="task")
    run(tmp_path, "mdps", part="rl2", seeds=(0,))
    assert not [name for name in figures(tmp_path) if name.endswith("_pretrained")]
    run(tmp_path, "all", cells=(), part="rl2", from_pretrained=True, learns_from="both")
    evaluated = {name for name in figures(tmp_path) if name.endswith("_pretrained")}
    assert evaluated == {"bandits_3_2_rl2_task_pretrained", "mdps_2_rl2_rewards_pretrained"}


def test_weights_that_a_chain_led_to_are_played_without_those_that_it_began_with(tmp_path, monkeypatch):
    run(tmp_path, part="rl2", seeds=(0,))
    chained = {**RL2_SETTINGS["bandits"]["3,2"]["rewards"], "initial_weights": tmp_path / "gone.safetensors"}
    monkeypatch.setitem(RL2_SETTINGS["bandits"], "3,2", {"rewards": chained})
    run(tmp_path, part="rl2", from_pretrained=True)
    assert "bandits_3_2_rl2_rewards_pretrained" in figures(tmp_path)


def test_a_seed_or_cell_named_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cells=\('3,2', '3,2'\): each cell once"):
        run(tmp_path, cells=("3,2", "3,2"))
    with pytest.raises(ValueError, match=r"seeds=\(1, 1\): each seed once"):
        run(tmp_path, seeds=(1, 1))


def test_the_seed_that_was_best_on_held_out_tasks_is_shipped(tmp_path):
    book = paper_tables.Figures(tmp_path / "figures", 40, False)
    for seed, (mean, held_out) in enumerate([(1.0, 2.0), (2.0, 1.0)]):
        run_folder = tmp_path / "runs" / f"bandits_3_2_rewards_seed{seed}"
        run_folder.mkdir(parents=True)
        (run_folder / "agent.safetensors").write_text(f"seed {seed}")
        (run_folder / "report.json").write_text(json.dumps({"train": {"history": [], "seconds": 1.0 + seed}}))
        own = {"mean": mean, "se": 0.1, "held_out": held_out, "seconds": 1.0 + seed}
        book.add(TINY["bandits"], f"rl2_rewards_seed{seed}", "", own)
    book.add(TINY["bandits"], "rl2_rewards_pretrained", "", {"mean": 1.0, "se": 0.1})
    paper_tables.keep_best(TINY["bandits"], "rewards", book, tmp_path / "runs", tmp_path / "pretrained")
    assert (tmp_path / "pretrained" / "bandits_3_2_rewards.safetensors").read_text() == "seed 0"
    assert not book.path(TINY["bandits"], "rl2_rewards_pretrained").exists()  # it was the figure of other weights


def test_the_agent_of_another_training_is_not_shipped_for_a_figure(tmp_path, monkeypatch):
    def shipped(folder):
        run(tmp_path, part="rl2", seeds=(0,), folder=tmp_path / folder, pretrained=tmp_path / folder / "agents")
        return (tmp_path / folder / "agents" / "bandits_3_2_rewards.safetensors").read_bytes()

    first = shipped("a")
    with monkeypatch.context() as others:
        others.setitem(RL2_SETTINGS["bandits"]["3,2"]["rewards"], "lr", 0.2)
        assert shipped("b") != first  # in the same folder of runs
    assert shipped("a") == first


def test_a_figure_of_other_settings_is_kept_and_told(tmp_path, monkeypatch, capsys):
    run(tmp_path, part="rl2", seeds=(0,))
    before = figures(tmp_path)
    capsys.readouterr()
    run(tmp_path, part="rl2", seeds=(0,))
    assert "kept" not in capsys.readouterr().out
    monkeypatch.setitem(RL2_SETTINGS["bandits"]["3,2"]["rewards"], "lr", 1e-4)
    run(tmp_path, part="rl2", seeds=(0,))
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "bandits 3,2 rl2_rewards_seed0: kept, though made with other settings than the cell's (lr was 0.003, is 0.0001)."
        in said
    )
    assert "--fresh" in said
    assert figures(tmp_path) == before


def test_shipped_figures_are_of_the_cells_settings():
    shipped = (Path(__file__).parents[1] / paper_tables.FOLDER).glob("*_rl2_*_seed*.json")
    kept = {path.stem: json.loads(path.read_text()) for path in shipped}
    assert len(kept) >= 50
    others = {}
    for name, figure in kept.items():
        settings = CELLS[figure["table"]][figure["cell"]].settings(figure["agent"].split("_")[1])
        assert {"trials", "env_steps", "lr", "units"} <= figure["settings"].keys() & settings.keys()
        others[name] = paper_tables.other_settings(figure["settings"], settings)
    assert {name: differ for name, differ in others.items() if differ} == {}


def test_a_finished_training_is_not_repeated(tmp_path, monkeypatch):
    run(tmp_path, part="rl2", seeds=(0,))
    before = figures(tmp_path)
    train = experiment.train
    monkeypatch.setattr(experiment, "train", None)
    run(tmp_path, part="rl2", seeds=(0,))
    assert figures(tmp_path) == before
    # For more tasks the agent plays again, trained as it is.
    options = []
    monkeypatch.setattr(experiment, "train", lambda *args, **more: options.append(more) or train(*args, **more))
    run(tmp_path, part="rl2", seeds=(0,), tasks=60)
    again = figures(tmp_path)["bandits_3_2_rl2_rewards_seed0"]
    assert again["num_tasks"] == 60
    assert [again[key] for key in ("held_out", "env_steps", "seconds")] == [
        before["bandits_3_2_rl2_rewards_seed0"][key] for key in ("held_out", "env_steps", "seconds")
    ]
    # With other settings, or on demand, it is trained anew.
    monkeypatch.setitem(RL2_SETTINGS["bandits"]["3,2"]["rewards"], "lr", 1e-4)
    run(tmp_path, part="rl2", seeds=(0,), tasks=80)
    run(tmp_path, part="rl2", seeds=(0,), tasks=80, fresh=True)
    assert [more["resume"] for more in options] == [True, False, False]


def test_a_longer_training_is_a_figure_of_its_own(tmp_path):
    run(tmp_path, part="rl2", seeds=(0,))
    before = figures(tmp_path)["bandits_3_2_rl2_rewards_seed0"]
    page = run(tmp_path, part="rl2", seeds=(0,), env_steps=3 * BATCH["bandits"])
    longer = figures(tmp_path)["bandits_3_2_rl2_rewards_seed0_steps144"]
    assert longer["env_steps"] == 3 * before["env_steps"] == longer["settings"]["env_steps"] == 144
    assert longer["command"].endswith("--part rl2 --learns-from rewards --seeds 0 --fresh --env-steps 144")
    assert figures(tmp_path)["bandits_3_2_rl2_rewards_seed0"] == before
    # It is shown in a table of its own, not as one more seed, and shipped where it is the better one.
    text = page.read_text()
    assert text.count("Single seeds, trained for other numbers of env steps:") == 1
    row = f"| 3, 2 (0.4) | {longer['mean']:.3f} ± {longer['se']:.3f} (1.5: "
    assert row in text.partition("other numbers of env steps:")[2]
    assert "| 3, 2 (0.4) | 1 |" in text
    best = "seed0_steps144" if longer["held_out"] > before["held_out"] else "seed0"
    actor = (tmp_path / "runs" / f"bandits_3_2_rewards_{best}" / "agent.safetensors").read_bytes()
    assert (tmp_path / "pretrained" / "bandits_3_2_rewards.safetensors").read_bytes() == actor


def test_pretrained_weights_are_not_trained_for_longer(tmp_path):
    with pytest.raises(ValueError, match="from_pretrained=True takes no env_steps"):
        run(tmp_path, from_pretrained=True, env_steps=144)


def test_an_interrupted_training_leaves_no_figure(tmp_path, monkeypatch, capsys):
    def interrupted(*args, **options):
        return replace(train(*args, **options), interrupted=True)

    train = experiment.train
    monkeypatch.setattr(experiment, "train", interrupted)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on"):
        run(tmp_path, part="rl2", seeds=(0,))
    assert "cut short: --resume goes on" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "results").exists()
    assert not (tmp_path / "pretrained").exists()


def test_an_agent_that_was_cut_short_is_not_shipped_for_an_older_figure(tmp_path, monkeypatch):
    def cut_short(*args, **options):
        return replace(train(*args, **{**options, "stop": lambda row: True}), interrupted=True)

    def shipped():
        agent = AdaptiveAgent.load(tmp_path / "pretrained" / "bandits_3_2_rewards.safetensors")
        return torch.cat([weight.flatten() for weight in agent.policy.state_dict().values()])

    three = {"part": "rl2", "seeds": (0,), "env_steps": 3 * BATCH["bandits"]}
    run(tmp_path, **three)
    before, train = shipped(), experiment.train
    monkeypatch.setattr(experiment, "train", cut_short)
    with pytest.raises(KeyboardInterrupt, match="the same command, without --fresh, goes on with it"):
        run(tmp_path, **three, fresh=True)
    monkeypatch.setattr(experiment, "train", train)
    run(tmp_path, **three)
    assert torch.equal(shipped(), before)


# ---- Bad arguments and the command line.


@pytest.mark.parametrize(
    ("message", "bad"),
    {
        r"cells=\['7,7'\]: there is no such cell in table='bandits'. It has 10,5 10,10": {"cells": ("100,10", "7,7")},
        r"cells=\['25'\]: there is no such cell in table='bandits'": {"cells": ("25",)},
        "tasks=1: a standard error needs two": {"tasks": 1},
        "seeds is empty": {"seeds": ()},
        "part='page' takes no table, cells, learns_from, seeds, tasks, fresh: it computes nothing, and .* Leave them out": {
            "part": "page",
            "seeds": (9,),
            "fresh": True,
        },
        "part='classical' takes no learns_from, env_steps, from_pretrained: it leaves RL² out": {
            "part": "classical",
            "learns_from": "task",
            "env_steps": 5,
            "from_pretrained": True,
        },
        "from_pretrained=True takes no seeds: weights are evaluated as they are": {
            "from_pretrained": True,
            "seeds": (7,),
        },
        "cells 500,5 with learns_from='rewards': they have no settings": {"cells": ("500,5",)},
        "with learns_from='rewards': .*/pretrained has no weights of theirs": {"cells": (), "from_pretrained": True},
    }.items(),
)
def test_bad_arguments(message, bad, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, **bad)
    assert not list(tmp_path.iterdir())


def test_cells_without_weights(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no weights in .* 3,2 \(rewards\)\. Train the others: .* --part rl2, with"
    ):
        run(tmp_path, part="rl2", from_pretrained=True)
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained" / "bandits_10_5_rewards.safetensors").touch()
    with pytest.raises(
        FileNotFoundError, match=r"cells 3,2 \(rewards\)\. Name only those .*: 10,5 \(rewards\); or train"
    ):
        run(tmp_path, part="rl2", from_pretrained=True, cells=("10,5", "3,2"))


def test_command_line(tmp_path):
    folder = tmp_path / "tables"
    page = tyro.cli(paper_tables.main, args=["--part", "page", "--folder", str(folder)])
    assert page.read_text().startswith("# The tables of the RL² paper")
    assert paper_tables.choose("all", ("100,10", "25")) == [CELLS["bandits"]["100,10"], CELLS["mdps"]["25"]]
    assert paper_cells.CELLS["bandits"]["100,10"] == BanditCell(pulls=100, arms=10)


def test_weights_that_settings_start_from_are_in_the_repository():
    starts = [settings["initial_weights"] for _, settings in every_settings() if "initial_weights" in settings]
    root = Path(__file__).parents[1]
    assert starts
    assert not [str(path) for path in starts if not (root / path).exists()]


def every_settings():
    """What each training of the tables learns from, and all its settings."""
    cells = [cell for table in CELLS.values() for cell in table.values() if cell not in TINY.values()]
    return [(way, cell.settings(way)) for cell in cells for way in RL2_SETTINGS[cell.table][cell.name]]


def test_rewards_only_is_told_nothing_of_the_task():
    told = {"rewards": [], "task": []}
    for way, settings in every_settings():
        starts_told = str(settings.get("initial_weights", "")).endswith("_task.safetensors")
        by_loss = settings["regret"] or settings["posterior"] or (settings["belief"] and not settings["seen"])
        told[way].append(by_loss or "task" in settings["critic_keys"] or starts_told)
    assert len(told["rewards"]) >= 7
    assert not any(told["rewards"])
    assert all(told["task"])


@pytest.mark.parametrize("table", TINY)
def test_what_the_task_told_is_a_column_of_its_own(table, tmp_path):
    page = run(tmp_path, table, part="rl2", seeds=(0,), learns_from="both")
    stem = f"{table}_{TINY[table].name.replace(',', '_')}"
    stored = figures(tmp_path)
    assert set(stored) == {f"{stem}_rl2_rewards_seed0", f"{stem}_rl2_task_seed0"}
    told = stored[f"{stem}_rl2_task_seed0"]["settings"]
    assert told["regret"] or told["belief"]
    titles = [
        json.loads((tmp_path / "runs" / f"{stem}_{way}_seed0" / "report.json").read_text())["title"]
        for way in ("rewards", "task")
    ]
    assert titles[0].endswith("(rewards only)")
    assert "(task told in training: " in titles[1]
    assert {path.name for path in (tmp_path / "pretrained").iterdir()} == {
        f"{stem}_rewards.safetensors",
        f"{stem}_task.safetensors",
    }
    section = page.read_text().split({"bandits": "## Table 1", "mdps": "## Table 2"}[table])[1]
    for way, part in zip(("rewards", "task"), section.split("### RL², ")[1:3], strict=True):
        figure = stored[f"{stem}_rl2_{way}_seed0"]
        assert f"| 1 | {paper_page.short(figure['mean'], figure['se'])} (1.5: " in part
