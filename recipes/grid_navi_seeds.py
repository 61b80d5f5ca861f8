"""Seeds of RL² on GridNavi that come to the Bayes optimum (in VariBAD's appendix 0 of 20): a training each, and a page of them."""

import csv
import shutil
from pathlib import Path
from typing import Any

from recipes import grid_navi
from recipes.cli import cli
from recipes.command import arguments
from recipes.paper_cells import flat
from recipes.reports import finished_report
from recipes.results import table
from recipes.rules import LearnsFrom
from rl2_torchrl.report import made_by

#: What differs from the recipe's own settings, which tell the critic the goal.
DIFFERS: dict[LearnsFrom, dict[str, Any]] = {
    "rewards": {"critic_keys": ("time_left",), "entropy_decay": "linear"},
    "task": {},
}
COLUMNS = ("seed", "greedy", "share", "sampling", "first_episode", "env_steps", "minutes", "commit")


def main(
    *,
    seeds: tuple[int, ...] = tuple(range(20)),
    learns_from: LearnsFrom = "task",
    env_steps: int = grid_navi.PRESET.learning.env_steps,
    runs: Path = Path("runs/grid_navi_seeds"),
    page: Path | None = None,
) -> list[dict[str, float]]:
    """Trains the seeds that are not there yet, and writes a page and a CSV file of all that are asked for.

    Args:
        seeds: seeds of the trainings.
        learns_from: rewards alone, or also the goal, which the critic is told then.
        env_steps: env steps of each.
        runs: where trainings are kept, a folder each: what is finished is not trained again.
        page: the page; the table is beside it as CSV, with the paths of the first seed. By default grid_navi_seeds.md, or
            grid_navi_seeds_rewards.md, in recipes/results.
    """
    if not seeds:
        raise ValueError("seeds is empty: nothing would be trained. Pass one or more, such as --seeds 0 1 2.")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={seeds}: each seed once, or one would be counted twice.")
    if page is None:
        page = Path("recipes/results") / f"grid_navi_seeds{'_rewards' * (learns_from == 'rewards')}.md"
    folders = [folder_of(seed, env_steps, learns_from, runs) for seed in seeds]
    rows = [
        row_of(seed, report_of(seed, env_steps, folder, learns_from))
        for seed, folder in zip(seeds, folders, strict=True)
    ]
    page.parent.mkdir(parents=True, exist_ok=True)
    with page.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    shutil.copyfile(folders[0] / "path.png", page.with_suffix(".png"))
    page.write_text(text_of(rows, page, learns_from))
    return rows


def folder_of(seed: int, env_steps: int, learns_from: LearnsFrom, runs: Path) -> Path:
    """Where a training is kept."""
    return runs / f"{learns_from}_{env_steps}_seed{seed}"


def report_of(seed: int, env_steps: int, folder: Path, learns_from: LearnsFrom) -> dict:
    """The report of the training in ``folder``, which is run where it is not finished."""
    options = {"seed": seed, "env_steps": env_steps, "log_dir": folder, "progress": False, **DIFFERS[learns_from]}
    settings = flat(arguments(grid_navi.main, options))
    return finished_report(folder, lambda **how: grid_navi.main(**arguments(grid_navi.main, options | how)), settings)


def row_of(seed: int, report: dict) -> dict[str, float]:
    """What the page says of a training."""
    agent, optimum = report["agent"], report["optimum"]
    figures = (agent["greedy_mean"], agent["greedy_mean"] / optimum, agent["mean"], agent["per_episode"][0])
    figures = (round(figure, 5) for figure in figures)
    effort = (report["train"]["env_steps"], round(report["train"]["seconds"] / 60, 2), report["commit"])
    return dict(zip(COLUMNS, (seed, *figures, *effort), strict=True))


def text_of(rows: list[dict[str, float]], page: Path, learns_from: LearnsFrom) -> str:
    """The page."""
    near, exact = (sum(row["share"] >= share for row in rows) for share in (0.995, 0.99999))
    optimum = rows[0]["greedy"] / rows[0]["share"]
    head = ["seed", "greedy return", "of the Bayes optimum", "by sampling", "million env steps", "minutes"]
    cells = [
        [
            str(row["seed"]),
            f"{row['greedy']:.3f}",
            f"{100 * row['share']:.2f} %",
            f"{row['sampling']:.3f}",
            f"{row['env_steps'] / 1e6:.1f}",
            f"{row['minutes']:.1f}",
        ]
        for row in rows
    ]
    made = made_by()
    paragraphs = [
        f"# grid navi seeds{', rewards only' * (learns_from == 'rewards')}",
        f"Return of 4 episodes, over all 21 goals alike; the Bayes optimum is {optimum:.3f}. Of {len(rows)} seeds {near} "
        f"earn 99.5 % of it or more greedily, {exact} all of it. VariBAD's appendix: RL² in 0 of 20.",
        table(head, cells),
        f"![paths of seed {rows[0]['seed']}]({page.with_suffix('.png').name})",
        f"Made by `{made['command']}`, trainings at commits {', '.join(dict.fromkeys(row['commit'] or '-' for row in rows))}, with "
        + ", ".join(f"{name} {number}" for name, number in made["versions"].items())
        + ".",
    ]
    return "\n\n".join(paragraphs) + "\n"


if __name__ == "__main__":
    cli(main)
