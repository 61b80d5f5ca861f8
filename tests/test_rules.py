"""Settings by a rule: what it says, where it is heard, and its check on cells held apart, at a tiny size."""

import csv
import inspect
import json
from functools import partial
from pathlib import Path

import pytest
import torch

from recipes import bandit, paper_cells, rule_check, rules, tabular_mdp
from recipes.command import arguments, command, settings_by, typed
from recipes.help import overview
from recipes.paper_settings import RL2_SETTINGS
from recipes.run import Run
from recipes.settings import Learning, Network, Told, told_of
from rl2_torchrl.envs import pack_mdps

TINY = {"trials": 16, "units": 4, "epochs": 1, "minibatches": 1, "env_steps": 96, "report_tasks": 50, "progress": False}


def values_of(settings: dict, expected: dict) -> dict:
    return {name: getattr(settings["learning"], name) for name in expected}


def test_the_rule_of_long_trials_by_hand():
    settings = rules.bandit_settings(16, 100)
    # 3 M, and 4 M for arms times pulls; a minibatch of 1,024 / 32 trials has 3,200 steps.
    expected = {"env_steps": 7_000_000, "minibatches": 32, "gamma": 0.5, "lmbda": 0.0, "entropy": 0.02}
    assert values_of(settings, expected) == expected
    assert settings["told"] == Told(posterior=True, belief=300.0, optimism=1.3, optimism_after=0.2)
    assert (settings["first_weights"].memory_steps, settings["network"].critic_keys) == (100, ("time_left",))
    assert rules.bandit_settings(16, 30)["told"].posterior
    assert not rules.bandit_settings(16, 29)["told"].posterior


def test_the_rule_of_short_trials_by_hand():
    settings = rules.bandit_settings(16, 25)
    # 3 M, 0.5 M for the pulls and 2 M for arms times pulls.
    expected = {"env_steps": 5_500_000, "minibatches": 8, "gamma": 0.98, "lmbda": 0.9, "entropy": 0.0125}
    assert values_of(settings, expected) == pytest.approx(expected)
    assert settings["told"] == Told(regret=True)
    assert settings["network"].critic_keys == ("time_left", "task")


@pytest.mark.parametrize(
    ("pulls", "expected"), [(1, 8), (10, 8), (30, 16), (60, 32), (100, 32), (200, 64), (10_000, 64)]
)
def test_minibatches_are_some_thousand_steps(pulls, expected):
    assert rules.minibatches(pulls) == expected
    assert rules.TRIALS % expected == 0


def test_rewards_alone_are_rewards_alone():
    settings = rules.bandit_settings(16, 100, "rewards")
    # Twice those of long trials that are told of the task.
    expected = {"env_steps": 14_000_000, "minibatches": 32, "gamma": 0.5, "lmbda": 0.0, "entropy": 0.02}
    assert values_of(settings, expected) == expected
    assert settings["told"] == Told(seen=True, belief=300.0, optimism=0.35, optimism_after=0.2)
    assert settings["network"].critic_keys == ("time_left",)


def test_short_trials_by_rewards_alone():
    settings = rules.bandit_settings(16, 25, "rewards")
    # Twice 3 M, 0.5 M for the pulls and 2 M for arms times pulls.
    expected = {"env_steps": 11_000_000, "minibatches": 8, "gamma": 0.98, "lmbda": 0.9, "entropy": 0.0125}
    assert values_of(settings, expected) == pytest.approx(expected)
    assert settings["told"] == Told()
    assert rules.bandit_settings(1, 29, "rewards")["learning"].entropy == 0.04


def test_the_rule_of_mdps_by_hand():
    settings = rules.mdp_settings(states=5, actions=4, episodes=40)
    # Twice the steps for four times the episodes, 20 of 50 pairs; 256 trials of 400 steps.
    expected = {"env_steps": 11_200_000, "trials": 256, "entropy": 0.06, "gamma": 0.5, "lmbda": 0.0}
    assert {name: getattr(settings["learning"], name) for name in expected} == pytest.approx(expected)
    assert settings["told"] == Told(belief=30.0, posterior=True, optimism=0.8, optimism_after=0.3)
    assert rules.mdp_settings(episodes=1000)["learning"].trials == 128
    alone = rules.mdp_settings(learns_from="rewards")
    seen = Told(belief=30.0, seen=True, optimism=0.8, optimism_after=0.3)
    assert (alone["told"], alone["learning"].env_steps) == (seen, 28_000_000)
    assert RL2_SETTINGS["mdps"]["10"] == {"rewards": {}, "task": {}}


def test_mdps_of_other_sizes(tmp_path):
    given = {**TINY, "states": 3, "actions": 2, "episodes": 1, "log_dir": tmp_path}
    report = tabular_mdp.main(**arguments(tabular_mdp.main, given))
    assert "3 states, 2 actions, 1 episodes (task told in training: belief, posterior)" in report.title


def test_the_papers_cells_are_instances_of_the_rule():
    cell = paper_cells.CELLS["bandits"]["100,10"]
    by_rule = rules.bandit_settings(10, 100)["learning"]
    assert list(RL2_SETTINGS["bandits"]["100,10"]["task"]) == ["env_steps"]
    settings = cell.settings("task")
    assert (settings["minibatches"], settings["entropy"]) == (by_rule.minibatches, by_rule.entropy)
    # A stated exception, with the rest by the rule.
    settings = paper_cells.CELLS["bandits"]["10,50"].settings("rewards")
    assert (settings["entropy"], settings["memory_steps"]) == (0.005, None)


# ---- Where it is heard.


def test_settings_left_out_are_the_rules_for_what_was_asked():
    seen = []

    def rule(arms: int = 5, pulls: int = 10):
        return {"network": Network(units=arms), "learning": Learning(env_steps=pulls)}

    @settings_by(rule)
    def main(*, arms: int = 5, pulls: int = 10, network: Network, learning: Learning):
        """A recipe."""
        seen.append((arms, network.units, learning.env_steps))

    main(arms=7)
    main(arms=7, pulls=3, network=Network(units=1))
    main(**arguments(main, {"arms": 7, "pulls": 3, "lr": 0.5}))
    assert seen == [(7, 7, 10), (7, 1, 3), (7, 7, 3)]
    assert arguments(main, {"pulls": 3, "lr": 0.5})["learning"] == Learning(env_steps=3, lr=0.5)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--arms", "7", "--units", "3", "--pulls=30"], {"arms": 7, "pulls": 30}),
        (["--help", "--learns_from", "rewards"], {"learns_from": "rewards"}),
        (["--learns-from", "rewards"], {"learns_from": "rewards"}),
        (["--arm", "7"], {}),
        (["--arms", "seven"], {}),
        (["--arms"], {}),
        ([], {}),
    ],
)
def test_what_is_typed(words, expected):
    assert typed(rules.bandit_settings, words) == expected


def test_help_of_a_main_that_says_little():
    def main(*, way: rules.LearnsFrom, depth: int, width: float = 0.5, learning: Learning = Learning()):  # noqa: B008
        pass

    lines = overview(main, {}, "python mine.py").splitlines()
    assert lines[0] == "python mine.py [settings]"
    assert [line.split() for line in lines[3:6]] == [["--way", "..."], ["--depth", "..."], ["--width", "0.5"]]
    assert any("--trials 1024" in line for line in lines)


def test_an_argument_named_as_a_shared_setting_is_refused(monkeypatch):
    def main(*, seed: int = 3, learning: Learning = Learning(), run: Run = bandit.RUN):  # noqa: B008
        """Seed or seed?"""

    monkeypatch.setattr("sys.argv", ["mine.py"])
    with pytest.raises(TypeError, match=r"has arguments \['seed'\], which are shared settings"):
        command(main)


def test_help_says_what_the_rule_chose(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bandit", "--arms", "16", "--pulls", "100", "--help-all"])
    with pytest.raises(SystemExit):
        command(bandit.main)
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for default in ("7000000", "0.5", "0.02", "32", "100"):
        assert f"(default: {default})" in said
    for pulls, steps in ((100, 7_000_000), (10, 4_000_000)):
        monkeypatch.setattr("sys.argv", ["bandit", "--arms", "16", "--pulls", str(pulls), "--help"])
        with pytest.raises(SystemExit):
            command(bandit.main)
        assert f"--pulls {pulls} " in (said := capsys.readouterr().out)
        assert f"--env-steps {steps} " in said


# ---- Its check.


def test_cells_held_apart():
    held_out = rule_check.CHECKS["bandits"].cells
    assert len(set(held_out)) == 5
    assert all(3 <= arms <= 30 and 15 <= pulls <= 200 for arms, pulls in held_out)
    tuned = {(20, 60), (10, 100), (7, 30), (24, 90)} | {
        (cell.arms, cell.pulls) for cell in paper_cells.CELLS["bandits"].values()
    }
    assert not tuned & set(held_out)
    papers = {(10, 5, cell.episodes) for cell in paper_cells.CELLS["mdps"].values()}
    assert not papers & set(rule_check.CHECKS["mdps"].cells)


@pytest.mark.parametrize(
    ("rule", "settings_of", "cells", "folder", "title"),
    [
        ("bandits", rules.bandit_settings, ((2, 3), (3, 4)), "2_arms_3_pulls", "UCB1"),
        ("mdps", rules.mdp_settings, ((3, 2, 1), (2, 4, 2)), "3_states_2_actions_1_episodes", "BEB"),
    ],
)
def test_page_of_the_check(rule, settings_of, cells, folder, title, tmp_path, monkeypatch):
    check = rule_check.CHECKS[rule]
    asked, main = [], check.recipe.main

    def recorded(**given):
        sizes = {size: given[size] for size in check.sizes}
        asked.append((*sizes.values(), given["learning"], given["told"]))
        return main(**arguments(main, {**TINY, **sizes, "log_dir": given["run"].log_dir}))

    recorded.rule, recorded.__signature__ = main.rule, inspect.signature(main)
    monkeypatch.setattr(check.recipe, "main", recorded)
    named = [",".join(map(str, cell)) for cell in cells]
    options = {"rule": rule, "cells": named, "runs": tmp_path / "runs", "page": tmp_path / "pages" / "check.md"}
    rows = rule_check.main(**options)
    by_rule = [settings_of(*cell) for cell in cells]
    assert asked == [(*cell, s["learning"], s["told"]) for cell, s in zip(cells, by_rule, strict=True)]
    report = json.loads((tmp_path / "runs" / folder / "report.json").read_text())
    rival = report["baselines"][check.rival]["mean"]
    assert rows[0]["share"] == pytest.approx(report["agent"]["mean"] / rival, abs=1e-5)
    enough = sum(row["share"] >= 0.985 for row in rows)
    text = options["page"].read_text()
    assert f"{enough} of 2 earn 98.5 % of {title} or more" in text
    assert "was not made from" not in text  # which is said of the cells that were held apart alone
    numbers = ", ".join(map(str, cells[0]))
    assert f"| {numbers} | {report['agent']['mean']:.3f} ± {report['agent']['se']:.3f} |" in text
    assert f"{check.command(cells[0])}\n" in text
    [first, _] = csv.DictReader(options["page"].with_suffix(".csv").open())
    assert float(first[check.rival]) == pytest.approx(rival, abs=1e-4)
    assert rule_check.main(**options) == rows
    assert len(asked) == 2  # what is trained is not trained again
    note = tmp_path / "runs" / folder / "settings.json"
    note.write_text(note.read_text().replace('"lr": ', '"lr": 9'))  # as after a change of the rule
    with pytest.raises(
        ValueError, match=r"other settings \(lr was 9.*, is .*\), which would be shown as one with these"
    ):
        rule_check.main(**options)
    with pytest.raises(ValueError, match="cells is empty"):
        rule_check.main(rule=rule, cells=())
    with pytest.raises(ValueError, match=f"'4', which must be {', '.join(check.sizes)}"):
        rule_check.main(rule=rule, cells=("4",))


@pytest.mark.parametrize("rule", rule_check.CHECKS)
def test_columns_of_the_shipped_pages_are_those_that_the_command_writes(rule):
    check = rule_check.CHECKS[rule]
    page = Path(__file__).parents[1] / "recipes" / "results" / f"rule_check{'_mdps' * (rule == 'mdps')}.md"
    columns = [", ".join(check.sizes), "RL²", "greedily", check.rival_title, f"of {check.rival_title}"]
    assert f"| {' | '.join(columns)} |" in page.read_text()


# ---- What training is told.


@pytest.mark.parametrize(
    ("critic_keys", "told", "expected"),
    [
        (("time_left",), Told(), " (rewards only)"),
        (("time_left", "task"), Told(), " (task told in training: critic)"),
        (("time_left",), Told(regret=True, belief=2.0), " (task told in training: regrets, belief)"),
        (("time_left",), Told(posterior=True, belief=2.0), " (task told in training: belief, posterior)"),
    ],
)
def test_a_title_says_what_training_was_told(critic_keys, told, expected):
    assert told_of(Network(critic_keys=critic_keys), told) == expected


def test_a_belief_is_of_the_mean_rewards():
    rewards, transitions = torch.arange(50.0).view(1, 10, 5), torch.full((1, 10, 5, 10), 0.1)
    task = pack_mdps(rewards, transitions).expand(3, 1, -1)  # [N, T, task_size]
    mean_rewards = partial(tabular_mdp.mean_rewards, sizes=(10, 5))
    assert mean_rewards(task).tolist() == [[[float(n) for n in range(50)]]] * 3
    [belief] = Told(belief=3.0).terms(4, 50, mean_rewards)
    torch.nn.init.zeros_(belief.layer.weight)
    torch.nn.init.zeros_(belief.layer.bias)
    told = belief(torch.zeros(3, 1, 4), task)
    # Told nothing, it says 0: the error is the mean of the squares of 0 ... 49.
    assert told["loss_belief"].item() == pytest.approx(3 * 49 * 99 / 6, rel=1e-5)
    assert Told().terms(4, 50) == []
