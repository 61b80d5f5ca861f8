"""The rule of `recipes.rules` on bandits that it was not made from: arms and pulls alone, beside UCB1 at its best constant."""

import csv
import json
from pathlib import Path

import tyro

from recipes import bandit
from recipes.experiment import arguments
from recipes.results import table
from rl2_torchrl.report import made_by

#: Arms and pulls of the cells, chosen before the rule was tuned on any: the rule was not made from them.
HELD_OUT = ((3, 150), (8, 25), (12, 70), (20, 40), (30, 110))
COLUMNS = ("arms", "pulls", "rl2", "rl2_se", "greedy_rl2", "ucb1", "ucb1_se", "share", "env_steps", "minutes", "commit")


def main(
    *,
    cells: tuple[tuple[int, int], ...] = HELD_OUT,
    runs: Path = Path("runs/rule_check"),
    page: Path = Path("recipes/results/rule_check.md"),
) -> list[dict[str, float]]:
    """Trains an agent for each cell that has none yet, by ``--arms`` and ``--pulls`` alone, and writes a page and a CSV file.

    Args:
        cells: arms and pulls of each.
        runs: where trainings are kept, a folder each: what is finished is not trained again.
        page: the page; the table is beside it as CSV.
    """
    if not cells:
        raise ValueError(
            "cells is empty: nothing would be trained. Pass arms and pulls of one or more, such as --cells 7 30."
        )
    rows = [row_of(arms, pulls, report_of(arms, pulls, runs)) for arms, pulls in cells]
    page.parent.mkdir(parents=True, exist_ok=True)
    with page.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    page.write_text(text_of(rows))
    return rows


def report_of(arms: int, pulls: int, runs: Path) -> dict:
    """The report of a training, which is run where there is none."""
    folder = runs / f"{arms}_arms_{pulls}_pulls"
    if not (folder / "report.json").exists():
        options = {"arms": arms, "pulls": pulls, "log_dir": folder, "progress": False}
        bandit.main(**arguments(bandit.main, options))
    return json.loads((folder / "report.json").read_text())


def row_of(arms: int, pulls: int, report: dict) -> dict[str, float]:
    """What the page says of a training; the share of UCB1 is the sampling agent's, on the same tasks."""
    agent, ucb1 = report["agent"], report["baselines"]["ucb1"]
    earned = (agent["mean"], agent["se"], agent["greedy_mean"], ucb1["mean"], ucb1["se"])
    train = report["train"]
    others = (
        round(agent["mean"] / ucb1["mean"], 5),
        train["env_steps"],
        round(train["seconds"] / 60, 2),
        report["commit"],
    )
    return dict(zip(COLUMNS, (arms, pulls, *(round(each, 4) for each in earned), *others), strict=True))


def text_of(rows: list[dict[str, float]]) -> str:
    """The page."""
    head = ["arms, pulls", "RL²", "greedily", "UCB1, tuned", "of UCB1", "million env steps", "minutes"]
    cells = [
        [
            f"{row['arms']}, {row['pulls']}",
            f"{row['rl2']:.3f} ± {row['rl2_se']:.3f}",
            f"{row['greedy_rl2']:.3f}",
            f"{row['ucb1']:.3f} ± {row['ucb1_se']:.3f}",
            f"{100 * row['share']:.2f} %",
            f"{row['env_steps'] / 1e6:.1f}",
            f"{row['minutes']:.1f}",
        ]
        for row in rows
    ]
    made = made_by()
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    commits = ", ".join(dict.fromkeys(row["commit"] or "-" for row in rows))
    commands = [f"python -m recipes.bandit --arms {row['arms']} --pulls {row['pulls']}" for row in rows]
    paragraphs = [
        "# rule check",
        "Bandits that the rule of `recipes/rules.py` was not made from, chosen before it was; nothing but arms and pulls was said. "
        f"Return of a held-out trial, RL² acting by sampling, one seed each; UCB1 on the same tasks, its constant tuned on others. "
        f"{sum(row['share'] >= 0.985 for row in rows)} of {len(rows)} earn 98.5 % of UCB1 or more.",
        table(head, cells),
        "\n".join(["```", *commands, "```"]),
        f"The page by `{made['command']}`, trainings at commits {commits}, with {versions}.",
    ]
    return "\n\n".join(paragraphs) + "\n"


if __name__ == "__main__":
    tyro.cli(main)
