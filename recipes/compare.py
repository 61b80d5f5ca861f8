"""Compares runs: ``python -m recipes.compare runs/a runs/b``. The seeds of a run are one curve, their mean, in a band."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from recipes.cli import cli
from recipes.reports import read_report
from rl2_torchrl.history import readable_rows

#: What a run is asked for: its scalars by update, env steps and seconds among them.
_HISTORIES = ("report.json", "checkpoints/checkpoint-history.jsonl")
_X = {"steps": ("env_steps", 1e6, "env steps (millions)"), "minutes": ("time/seconds", 60.0, "minutes")}


@dataclass(frozen=True)
class Curve:
    """Mean of several runs over what ``x`` counts, and its standard error; NaN of a single run.

    Args:
        name: what is compared.
        runs: number of runs.
        x: env steps (millions) or minutes ``[n]``, as far as all runs go.
        mean: mean over runs ``[n]``.
        se: standard error over runs ``[n]``.
        reported: mean trial return in the report of each run that has ended.
    """

    name: str
    runs: int
    x: np.ndarray
    mean: np.ndarray
    se: np.ndarray
    reported: list[float]

    def at(self, x: float) -> tuple[float, float]:
        """Mean and standard error at ``x``; NaN before the first evaluation: what comes later was not known there."""
        return tuple(np.interp(x, self.x, values, left=np.nan) for values in (self.mean, self.se))


def main(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    *,
    by: Literal["steps", "minutes"] = "steps",
    scalar: str = "eval/trial_return",
    plot: Path = Path("compare.png"),
) -> list[Curve]:
    """Shows how far runs have come, and draws their curves: the mean of several seeds, with a band of 2 standard errors.

    Args:
        runs: folders of runs, running ones too; or folders of such folders, one a seed.
        by: what is compared at equal numbers of.
        scalar: which scalar, by its name in the log.
        plot: file of the plot.
    """
    if not runs:
        raise ValueError(
            "there is nothing to compare: name folders of runs, as in `python -m recipes.compare runs/a runs/b`."
        )
    return show([curve(folder, by, scalar) for folder in runs], by, scalar, plot=plot)


def show(curves: list[Curve], by: str = "steps", scalar: str = "eval/trial_return", *, plot: Path) -> list[Curve]:
    """Shows the table of ``curves`` and draws them."""
    draw(curves, by, scalar).savefig(plot, dpi=130)
    console = Console()
    console.print(table(curves, by, scalar))
    console.print(f"plot: {plot}", markup=False)
    return curves


def curve(folder: Path, by: str, scalar: str) -> Curve:
    """The curve of a run, or the mean of the runs within ``folder``.

    Raises:
        ValueError: there is no run, they are of different titles, or one has not logged ``scalar`` yet.
    """
    runs = seeds(folder)
    whose = {}
    for run in runs:
        if "title" in (report := read_report(run)):  # a run that is not over has none
            whose.setdefault(report["title"], run)
    if len(whose) > 1:
        unlike = ", ".join(f"{run.name} ({title})" for title, run in whose.items())
        raise ValueError(
            f"{folder} holds runs that have no mean, as they learn different things: {unlike}. Name each by itself."
        )
    return curve_of(folder.resolve().name, runs, by, scalar)


def curve_of(name: str, runs: list[Path], by: str = "steps", scalar: str = "eval/trial_return") -> Curve:
    """The mean of ``runs``."""
    each = [points(run, by, scalar) for run in runs]
    end = min(x[-1] for x, _ in each)
    # Each run's own points, as far as all go; between its own a run is taken to be on the line.
    x = np.unique(np.concatenate([x[x <= end] for x, _ in each]))
    values = np.stack([np.interp(x, *run) for run in each])
    reports = [report for run in runs if len((report := read_report(run))["train"]["history"]) == len(history(run))]
    reported = [report["agent"]["mean"] for report in reports]
    return Curve(name, len(each), x, values.mean(0), standard_error(values), reported)


def standard_error(values: np.ndarray) -> np.ndarray:
    """That of the mean over runs, the first dimension; NaN of a single run."""
    return values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.full(values.shape[1:], np.nan)


def seeds(folder: Path) -> list[Path]:
    """``folder`` itself, where it is a run; the runs within it otherwise.

    Raises:
        ValueError: there is none, or it is a run and holds others, such as those of ``--seeds``.
    """
    found = [run for run in (folder, *sorted(folder.glob("*"))) if any((run / name).is_file() for name in _HISTORIES)]
    if not found:
        raise ValueError(f"{folder} holds no run: neither it nor a folder in it has a {' or a '.join(_HISTORIES)}.")
    if folder not in found:
        return found
    if within := [run.name for run in found if run not in (folder, folder / "earlier")]:
        raise ValueError(
            f"{folder} is a run, and holds others ({', '.join(within)}): their mean is that of a folder of theirs alone. Name "
            "single runs, or begin the seeds with a --log-dir of their own."
        )
    return [folder]


def points(run: Path, by: str, scalar: str) -> tuple[np.ndarray, np.ndarray]:
    """Where ``run`` has logged ``scalar``, ``[n]``, and its values there."""
    key, unit, _ = _X[by]
    if not (rows := history(run)):
        raise ValueError(f"{run} holds no training: its agent was played alone, and has no curve.")
    x, values = (np.array([row.get(name) for row in rows], dtype=float) for name in (key, scalar))
    there = ~np.isnan(values)  # NaN is None in a report, and NaN in a checkpoint
    if not there.any():
        known = sorted({name for row in rows for name in row} - {key})
        raise ValueError(f"{run} has no {scalar!r}: --scalar may be one of {known}.")
    return x[there] / unit, values[there]


def history(run: Path) -> Sequence[dict[str, float]]:
    """A run's rows of scalars: its report's, or what its last checkpoint has, of one that is running or goes on."""
    checkpoints = run / _HISTORIES[1]
    saved = readable_rows(checkpoints.read_bytes()) if checkpoints.is_file() else []
    return max(read_report(run)["train"]["history"], saved, key=len)


def draw(curves: list[Curve], by: str, scalar: str) -> Figure:
    """All curves in one plot."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    draw_curves(figure.subplots(), curves, by, scalar)
    return figure


def draw_curves(axes: Axes, curves: list[Curve], by: str, scalar: str) -> None:
    """The curves, with a band of 2 standard errors where there are several runs."""
    for each in curves:
        (line,) = axes.plot(each.x, each.mean, label=f"{each.name} ({each.runs} runs)" if each.runs > 1 else each.name)
        axes.fill_between(
            each.x, each.mean - 2 * each.se, each.mean + 2 * each.se, color=line.get_color(), alpha=0.2, lw=0
        )
    bands = " (bands: 2 SE)" if any(each.runs > 1 for each in curves) else ""
    axes.set(xlabel=_X[by][2], ylabel=scalar + bands)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def table(curves: list[Curve], by: str, scalar: str) -> Table:
    """Where each curve ends, where all were when the first ended, and trial returns reported: ``mean ± standard error``."""
    end = min(each.x[-1] for each in curves)
    shown = Table(title=escape(scalar))
    shown.add_column("run")
    for column in ("runs", _X[by][2], "last", f"at {end:.3g}", "in the report"):
        shown.add_column(column, justify="right")
    for each in curves:
        reported = np.array(each.reported)
        final = with_error(reported.mean(), standard_error(reported)) if len(reported) == each.runs else ""
        last = with_error(each.mean[-1], each.se[-1])
        shown.add_row(escape(each.name), str(each.runs), f"{each.x[-1]:.3g}", last, with_error(*each.at(end)), final)
    return shown


def with_error(mean: float, se: float) -> str:
    """``mean ± se``, or the mean alone of a single run; a dash where nothing is known."""
    if np.isnan(mean):
        return "-"
    return f"{mean:.3f}" if np.isnan(se) else f"{mean:.3f} ± {se:.3f}"


if __name__ == "__main__":
    cli(main)
