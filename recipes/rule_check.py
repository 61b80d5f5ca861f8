"""The rules of `recipes.rules` on tasks that they were not made from: sizes alone, beside the best that humans designed."""

import csv
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Literal

from recipes import bandit, tabular_mdp
from recipes.cli import cli
from recipes.command import arguments
from recipes.paper_cells import flat
from recipes.reports import finished_report
from recipes.results import table
from rl2_torchrl.report import made_by


@dataclass(frozen=True)
class Check:
    """Tasks that a rule was not made from.

    Args:
        recipe: whose rule it is.
        tasks: what they are, in plural.
        sizes: what alone is said of them, as the recipe calls it.
        cells: these sizes for each, chosen before the rule was tuned on any.
        rival: the recipe's classical agent that ours stands beside.
        rival_title: how the page calls it.
        tuned: on what its constant was tuned.
        remark: what else the page says of the cells.
    """

    recipe: ModuleType
    tasks: str
    sizes: tuple[str, ...]
    cells: tuple[tuple[int, ...], ...]
    rival: str
    rival_title: str
    tuned: str
    remark: str = ""

    def numbers_of(self, cell: str) -> tuple[int, ...]:
        """The sizes of ``cell``, as ``"7,30"`` says them."""
        numbers = tuple(map(int, cell.split(",")))
        if len(numbers) != len(self.sizes):
            raise ValueError(f"cells holds {cell!r}, which must be {', '.join(self.sizes)}, such as {self.cells[0]}.")
        return numbers

    def command(self, cell: tuple[int, ...]) -> str:
        """The command that trains a cell."""
        options = " ".join(f"--{size} {number}" for size, number in zip(self.sizes, cell, strict=True))
        return f"python -m {self.recipe.__name__} {options}"


CHECKS = {
    "bandits": Check(
        bandit,
        "Bandits",
        ("arms", "pulls"),
        ((3, 150), (8, 25), (12, 70), (20, 40), (30, 110)),
        "ucb1",
        "UCB1",
        "on others",
        "What the rule does in long trials was chosen after a first check, in which (30, 110) earned 98.04 %. Its settings come "
        "from trainings at (24, 90); that an agent of perfect memory does well in these cells that way had been seen before.",
    ),
    "mdps": Check(
        tabular_mdp,
        "Tabular MDPs",
        ("states", "actions", "episodes"),
        ((6, 3, 15), (10, 5, 20)),
        "beb",
        "BEB",
        "at 10 states, 5 actions, 10 episodes",
    ),
}


def main(
    *,
    rule: Literal["bandits", "mdps"] = "bandits",
    cells: tuple[str, ...] | None = None,
    runs: Path = Path("runs/rule_check"),
    page: Path | None = None,
) -> list[dict[str, float]]:
    """Trains an agent for each cell that has none yet, by its sizes alone, and writes a page and a CSV file.

    Args:
        rule: whose rule.
        cells: arms and pulls of each, as 7,30; or states, actions and episodes, as 6,3,15. By default those that were held apart.
        runs: where trainings are kept, a folder each: what is finished is not trained again.
        page: the page; the table is beside it as CSV. By default recipes/results/rule_check.md, or rule_check_mdps.md.
    """
    check = CHECKS[rule]
    numbers = check.cells if cells is None else [check.numbers_of(cell) for cell in cells]
    if not numbers:
        raise ValueError("cells is empty: nothing would be trained. Leave it out for those that were held apart.")
    if page is None:
        page = Path("recipes/results") / ("rule_check.md" if rule == "bandits" else f"rule_check_{rule}.md")
    rows = [row_of(check, cell, report_of(check, cell, runs)) for cell in numbers]
    page.parent.mkdir(parents=True, exist_ok=True)
    with page.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    page.write_text(text_of(check, rows))
    return rows


def report_of(check: Check, cell: tuple[int, ...], runs: Path) -> dict:
    """The report of a training, which is run where it is not finished."""
    sizes = dict(zip(check.sizes, cell, strict=True))
    folder = runs / "_".join(f"{number}_{size}" for size, number in sizes.items())
    main, options = check.recipe.main, {**sizes, "log_dir": folder, "progress": False}
    settings = flat(arguments(main, options))
    return finished_report(folder, lambda **how: main(**arguments(main, options | how)), settings)


def row_of(check: Check, cell: tuple[int, ...], report: dict) -> dict[str, float]:
    """What the page says of a training; the share of the rival is the sampling agent's, on the same tasks."""
    agent, rival, train = report["agent"], report["baselines"][check.rival], report["train"]
    return {
        **dict(zip(check.sizes, cell, strict=True)),
        "rl2": round(agent["mean"], 4),
        "rl2_se": round(agent["se"], 4),
        "greedy_rl2": round(agent["greedy_mean"], 4),
        check.rival: round(rival["mean"], 4),
        f"{check.rival}_se": round(rival["se"], 4),
        "share": round(agent["mean"] / rival["mean"], 5),
        "env_steps": train["env_steps"],
        "minutes": round(train["seconds"] / 60, 2),
        "commit": report["commit"],
    }


def text_of(check: Check, rows: list[dict[str, float]]) -> str:
    """The page."""
    cells = [tuple(row[size] for size in check.sizes) for row in rows]
    head = [", ".join(check.sizes), "RL²", "greedily", check.rival_title, f"of {check.rival_title}"]
    lines = [
        [
            ", ".join(map(str, cell)),
            f"{row['rl2']:.3f} ± {row['rl2_se']:.3f}",
            f"{row['greedy_rl2']:.3f}",
            f"{row[check.rival]:.3f} ± {row[f'{check.rival}_se']:.3f}",
            f"{100 * row['share']:.2f} %",
            f"{row['env_steps'] / 1e6:.1f}",
            f"{row['minutes']:.1f}",
        ]
        for cell, row in zip(cells, rows, strict=True)
    ]
    made = made_by()
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    commits = ", ".join(dict.fromkeys(row["commit"] or "-" for row in rows))
    enough = f"{sum(row['share'] >= 0.985 for row in rows)} of {len(rows)} earn 98.5 % of {check.rival_title} or more."
    is_held_apart = set(cells) <= set(check.cells)
    held_apart = " that the rule of `recipes/rules.py` was not made from, chosen before it was" if is_held_apart else ""
    paragraphs = [
        "# rule check",
        f"{check.tasks}{held_apart}; nothing but "
        f"{', '.join(check.sizes[:-1])} and {check.sizes[-1]} was said. Return of a held-out trial, RL² acting by sampling, one "
        f"seed each; {check.rival_title} on the same tasks, its constant tuned {check.tuned}. {enough}"
        f"{f' {check.remark}' if check.remark and is_held_apart else ''}",
        table([*head, "million env steps", "minutes"], lines),
        "\n".join(["```", *(check.command(cell) for cell in cells), "```"]),
        f"The page by `{made['command']}`, trainings at commits {commits}, with {versions}.",
    ]
    return "\n\n".join(paragraphs) + "\n"


if __name__ == "__main__":
    cli(main)
