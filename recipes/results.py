"""A page of results from the reports of finished runs: figures by seed, learning curves, plots, and the commands that made them."""

import csv
import json
import re
import shutil
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

from recipes.cli import cli
from recipes.compare import curve_of, draw_curves, seeds
from recipes.reports import read_report

#: Options that the runs of one mean may differ in.
OF_ONE_RUN = re.compile(r"(seed|log.dir|(no.)?progress|resume|logger|(no.)?video)\b")


def main(*, runs: tuple[Path, ...], page: Path, intro: str = "") -> None:
    """Writes a page in Markdown, and beside it the plots of the first run of each title, and all learning curves as plot and CSV.

    Args:
        runs: folders of finished runs, each with its report.json; or folders of such folders, as ``--seeds`` leaves them.
        page: the file to write, its heading is the file's name.
        intro: a paragraph under the heading.
    """
    reports = defaultdict(list)
    for run in (each for folder in runs for each in seeds(folder)):
        report = read_report(run)
        if not report["train"]["history"]:
            raise ValueError(f"{run} holds no report of a training, which a page is made of.")
        same = [other for other, known in reports[report["title"]] if known["seed"] == report["seed"]]
        if same:
            raise ValueError(
                f"{run} and {same[0]} are both {report['title']!r} of seed {report['seed']}: one run, or two of other settings. "
                "Make a page for each."
            )
        for other, known in reports[report["title"]][:1]:
            if unlike := sorted(settings_of(known) ^ settings_of(report)):
                raise ValueError(
                    f"{run} and {other} are both {report['title']!r}, of other settings ({', '.join(unlike)}): they have no mean. "
                    "Make a page for each."
                )
        reports[report["title"]].append((run, report))
    if not reports:
        raise ValueError("runs is empty: name the folders of finished runs, as --runs runs/half_cheetah.")
    page.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"# {page.stem.replace('_', ' ')}", *([intro] if intro else [])]
    for title, entries in reports.items():
        lines += section(title, entries, page)
    page.write_text("\n\n".join(lines) + "\n")


def settings_of(report: dict) -> set[str]:
    """The options of a report's command, without those that belong to the single run."""
    _, *options = report["command"].split(" --")
    return {f"--{option.strip()}" for option in options if not OF_ONE_RUN.match(option)}


def section(title: str, entries: list[tuple[Path, dict]], page: Path) -> list[str]:
    """Paragraphs about the runs ``entries``: what came out by seed, how it was learnt, and how to make it again."""
    reports = [report for _, report in entries]
    first_run, first = entries[0]
    return [
        f"## {title}",
        figures(reports),
        *pictures(first["title"], first_run, page),
        *curves(first["title"], [run for run, _ in entries], page),
        f"Held-out trials while it was learnt, seed {first['seed']}:",
        learning_curve(first),
        "Made by:",
        "\n".join(["```", *(f"{report['command']}  # commit {report['commit']}" for report in reports), "```"]),
        "With " + ", ".join(f"{name} {number}" for name, number in first["versions"].items()) + ".",
    ]


def figures(reports: list[dict]) -> str:
    """A row for each figure, a column for each seed."""
    head = ["", *(f"seed {report['seed']}" for report in reports)]
    tasks = ["held-out tasks", *(f"{report['agent']['num_tasks']:,}" for report in reports)]
    cut = [" (cut short)" * bool(report["train"].get("interrupted")) for report in reports]
    steps = ["env steps", *(f"{r['train']['env_steps']:,}{short}" for r, short in zip(reports, cut, strict=True))]
    minutes = ["minutes of training", *(f"{report['train']['seconds'] / 60:.1f}" for report in reports)]
    names = dict.fromkeys(name for report in reports for name in report["summary"])
    rows = [[name, *(str(report["summary"].get(name, "")) for report in reports)] for name in names]
    return table(head, [*rows, tasks, steps, minutes])


def learning_curve(report: dict, rows: int = 12) -> str:
    """What evaluations during the training said, at most ``rows`` of them, the first and the last among them."""
    evaluated = evaluations(report)
    # Not all evaluations have all: steps are said where episodes differ in them.
    names = dict.fromkeys(name for row in evaluated for name in row if name.startswith("eval/"))
    count = min(rows, len(evaluated))
    shown = sorted({round(i * (len(evaluated) - 1) / max(1, count - 1)) for i in range(count)})
    cells = [
        [
            f"{row['env_steps'] / 1e6:.2f}",
            f"{row['time/seconds'] / 60:.1f}",
            *(f"{row[name]:.2f}" if name in row else "" for name in names),
        ]
        for row in map(evaluated.__getitem__, shown)
    ]
    return table(["million env steps", "minutes", *(name[5:].replace("_", " ") for name in names)], cells)


def evaluations(report: dict) -> list[dict[str, float]]:
    """The rows of a run's scalars that hold an evaluation."""
    return [row for row in report["train"]["history"] if "eval/trial_return" in row]


def curves(title: str, runs: list[Path], page: Path) -> list[str]:
    """Evaluations of all ``runs`` as a file of numbers, and their mean as a plot, by env steps and by minutes; both are shown."""
    plot, numbers = (page.with_name(f"{page.stem}_{slug(title)}_curves.{suffix}") for suffix in ("png", "csv"))
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    name = "mean" if len(runs) > 1 else runs[0].name
    for axes, by in zip(figure.subplots(1, 2), ("steps", "minutes"), strict=True):
        draw_curves(axes, [curve_of(name, runs, by, "eval/trial_return")], by, "held-out return of a trial")
    figure.savefig(plot, dpi=110)
    with numbers.open("w", newline="") as file:
        rows = [
            {"run": run.name, **row}
            for run in runs
            for row in evaluations(json.loads((run / "report.json").read_text()))
        ]
        shown = dict.fromkeys(name for row in rows for name in row)
        names = [name for name in shown if name in ("run", "env_steps", "time/seconds") or name.startswith("eval/")]
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return [f"![curves]({plot.name})", f"All curves: [{numbers.name}]({numbers.name})."]


def pictures(title: str, run: Path, page: Path) -> list[str]:
    """Copies the plots of a title's first ``run`` beside the page and shows them."""
    shown = []
    for picture in sorted(run.glob("*.png")):
        # Runs of two titles may both be called seed0.
        copy = page.with_name(f"{page.stem}_{slug(title)}_{picture.name}")
        shutil.copyfile(picture, copy)
        shown.append(f"![{picture.stem}]({copy.name})")
    return shown


def slug(title: str) -> str:
    """What the names of a title's files hold."""
    return re.sub("[^a-z0-9]+", "_", title.lower())


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


if __name__ == "__main__":
    cli(main)
