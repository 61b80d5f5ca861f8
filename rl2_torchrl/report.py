"""`AdaptationReport`: how an agent adapts, beside classical agents on the same tasks; as table, JSON and plot."""

from __future__ import annotations

import json
import logging
import math
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl2_torchrl.arguments import needs, require_folder_name
from rl2_torchrl.evaluation import AdaptationCurve
from rl2_torchrl.history import TrainResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

__all__ = ["AdaptationReport"]

log = logging.getLogger(__name__)


@dataclass
class AdaptationReport:
    """Adaptation curves of an agent, its ablations and classical agents, all on the same held-out tasks.

    Beside returns it shows the agent's measures, and the steps of episodes where these differ in them.

    Args:
        agent: the agent's curve, acting as it was trained (sampling).
        greedy: the agent's curve in deterministic mode.
        baselines: curves of classical agents by name.
        ablations: curves of the agent with a part of its input destroyed, by name.
        optimum: the best possible mean trial return, where it is known.
        train: what the training run did; of its evaluations the plot shows ``trial_return``.
        seed: the run's seed.
        title: what was learnt, for the plot.
        episode_name: what an episode is called in the plot, e.g. ``"pull"``.

    Raises:
        ValueError: two curves would be shown under one name, or are of trials of different numbers of episodes.

    Examples:
        >>> import torch
        >>> curve = AdaptationCurve(torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
        >>> report = AdaptationReport(agent=curve, greedy=curve, baselines={"random": curve})
        >>> report.to_dict()["agent"]["mean"]
        1.5
    """

    agent: AdaptationCurve
    greedy: AdaptationCurve
    baselines: Mapping[str, AdaptationCurve] = field(default_factory=dict)
    ablations: Mapping[str, AdaptationCurve] = field(default_factory=dict)
    optimum: float | None = None
    train: TrainResult = field(default_factory=TrainResult)
    seed: int | None = None
    title: str = "RL²"
    episode_name: str = "episode"

    def __post_init__(self):
        self.optimum = None if self.optimum is None else float(self.optimum)
        curves = [*self._own(), *self._ablated(), *self._classical()]
        names = [name for name, _ in curves]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(
                f"two curves would be called {', '.join(twice)}, and one be lost: name baselines otherwise."
            )
        _require_alike(curves)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-compatible values, with the command, seed and versions that made it.

        JSON knows no NaN, as the standard error of a single task is: None stands for numbers that are not finite.
        """
        report = {
            "title": self.title,
            "summary": self.summary(),
            "agent": {**_summary(self.agent), "greedy_mean": self.greedy.mean, "greedy_se": self.greedy.se},
            "baselines": {name: _summary(curve) for name, curve in self.baselines.items()},
            "ablations": {name: _summary(curve) for name, curve in self.ablations.items()},
            "optimum": self.optimum,
            "train": {
                "env_steps": self.train.env_steps,
                "seconds": self.train.seconds,
                "interrupted": self.train.interrupted,
                "new_trials": self.train.new_trials,
                "history": list(self.train.history),
            },
            "seed": self.seed,
            **made_by(),
        }
        return _finite_or_none({**report, **self.entries()})

    def entries(self) -> dict[str, Any]:
        """What a report of further figures adds to `to_dict`; none here."""
        return {}

    def summary(self) -> dict[str, float | str]:
        """The few figures that a page of results shows of a run, in its order: the agent, its ablations, classical agents."""
        curves = [*self._own(), *self._ablated(), *self._classical()]
        figures: dict[str, float | str] = {name: f"{curve.mean:.3f} ± {curve.se:.3f}" for name, curve in curves}
        for name in self.agent.shown:
            ends = _ends(curve := self.agent.shown_as(name), curve.num_compared)
            which = "first and last" if len(ends) > 1 else "first"
            figures[f"{_label(name)}, {which} {self.episode_name}"] = ", ".join(ends)
        return figures if self.optimum is None else {**figures, "optimum": round(self.optimum, 3)}

    # What each curve is called, wherever one is shown: classical agents may have the names of ways in which ours plays.
    def _own(self) -> list[tuple[str, AdaptationCurve]]:
        return [("RL²", self.agent), ("RL², greedy", self.greedy)]

    def _ablated(self) -> list[tuple[str, AdaptationCurve]]:
        return [(f"RL², {_label(name)}", curve) for name, curve in self.ablations.items()]

    def _classical(self) -> list[tuple[str, AdaptationCurve]]:
        return [(_label(name), curve) for name, curve in self.baselines.items()]

    def save(self, folder: str | Path) -> Path:
        """Writes ``report.json`` and ``report.png`` into ``folder`` and returns the path of the first.

        Raises:
            ImportError: no ``matplotlib`` for the plot; ``report.json`` is written all the same.
            ValueError: ``folder`` is empty text.
        """
        require_folder_name(folder=folder)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "report.json"
        path.write_text(json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        self.plot().savefig(folder / "report.png", dpi=130)
        return path

    # ----------------------------------------------------------------- table
    def table(self) -> Table:
        """The report as a `rich.table.Table` (needs ``rich``): mean ± standard error of a trial, best first."""
        with needs('the table needs rich: pip install "rl2_torchrl[recipes]".'):
            from rich.markup import escape
            from rich.table import Table

        table = Table(title=escape(f"{self.title}: return of a held-out trial, {self.agent.num_tasks:,} tasks"))
        table.add_column("agent")
        measures = (f"{_label(name)}, first → last" for name in self.agent.shown)
        last = self.agent.num_compared
        of_last = "last {0}" if last in (1, self.agent.returns.shape[1]) else "{0} {1}"
        ends = f"first {self.episode_name}", of_last.format(self.episode_name, last)
        for column in ("mean", "± SE", *ends, *measures):
            table.add_column(escape(column), justify="right")
        if self.optimum is not None:
            table.add_row("Bayes optimum (exact)", f"{self.optimum:.3f}", "", "", "", style="dim")
        rows = [(f"[bold]{name}", curve) for name, curve in self._own()]
        rows += [(escape(name), curve) for name, curve in self._classical()]
        for name, curve in sorted(rows, key=lambda row: -row[1].mean):
            table.add_row(name, *_cells(curve, self.agent.shown, last))
        table.add_section()
        for name, curve in self._ablated():
            table.add_row(escape(name), *_cells(curve, self.agent.shown, last))
        return table

    # ------------------------------------------------------------------ plot
    def plot(self) -> Figure:
        """A `matplotlib.figure.Figure` (needs ``matplotlib``): learning and adaptation curves, bands of 2 SE."""
        with needs('the plot needs matplotlib: pip install "rl2_torchrl[recipes]".'):
            from matplotlib.figure import Figure

        measures = self.agent.shown
        figure = Figure(figsize=(12 + 5 * len(measures), 5), layout="constrained")
        learning, adaptation, *others = figure.subplots(1, 2 + len(measures))
        self._plot_learning(learning)
        self._plot_adaptation(adaptation)
        for axes, name in zip(others, measures, strict=True):
            self._plot_adaptation(axes, name)
        figure.suptitle(self.title, fontsize=14)
        return figure

    def _plot_learning(self, axes) -> None:
        axes.plot(*self._points("train/trial_return"), color=_AGENT, alpha=0.35, lw=1, label="training trials")
        steps, held_out = self._points("eval/trial_return")
        if held_out:
            axes.plot(steps, held_out, color=_AGENT, lw=2, marker="o", ms=3.5, label="held-out trials")
        if self.optimum is not None:
            axes.axhline(self.optimum, color="black", lw=1, ls="--", label=f"Bayes optimum {self.optimum:.2f}")
        for color, (name, curve) in zip(cycle(_COLORS), self._classical(), strict=False):
            axes.axhline(curve.mean, color=color, lw=1, ls=":", label=f"{name} {curve.mean:.2f}")
        axes.set(xlabel="env steps (millions)", ylabel="return of a trial", title="Learning: over training")
        axes.legend(loc="lower right", fontsize=9, frameon=False)
        _tidy(axes)

    def _points(self, name: str) -> tuple[list[float], list[float]]:
        """Where a scalar was logged, in millions of env steps, and its values; without NaN, as where no trial has ended."""
        rows = [row for row in self.train.history if not math.isnan(row.get(name, math.nan))]
        return [row["env_steps"] / 1e6 for row in rows], [row[name] for row in rows]

    def _plot_adaptation(self, axes, measure: str | None = None) -> None:
        """The mean return of each episode, or the mean of a measure, which classical agents may lack."""
        for color, (name, curve) in zip(cycle(_COLORS), self._classical(), strict=False):
            _band(axes, curve, measure, name, color=color, lw=1.5)
        for style, (name, curve) in zip(cycle(("--", ":", "-.")), self._ablated(), strict=False):
            _band(axes, curve, measure, name, color="grey", lw=1.5, ls=style)
        _band(axes, self.agent, measure, "RL²", color=_AGENT, lw=2.5)
        is_one = self.agent.num_compared == 1
        axes.set(
            xlabel=f"first {self.episode_name} of the trial" if is_one else f"{self.episode_name} of the trial",
            ylabel=f"mean {_label(measure or 'return')} of the {self.episode_name}",
            title="Adaptation: within a trial, weights fixed (bands: 2 SE)",
        )
        if is_one:
            axes.set_xticks([])
        else:
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc="best", fontsize=9, frameon=False)
        _tidy(axes)


_AGENT = "#c1272d"
_COLORS: Sequence[str] = ("#8a8a8a", "#0072b2", "#009e73", "#e69f00", "#56b4e9", "#cc79a7", "#5e3c99")


def made_by() -> dict[str, Any]:
    """Command, commit and versions that figures come from, as JSON-compatible values."""
    packages = ("rl2_torchrl", "torch", "torchrl", "tensordict", "gymnasium", "numpy")
    return {
        "command": _command(),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def _command() -> str:
    """What was typed: a module by its name, where Python was called with -m."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {spec.name}" if spec is not None else f"python {sys.argv[0]}"
    return " ".join((program, *sys.argv[1:]))


def _commit() -> str | None:
    """The commit that the code is from, "+" behind it where it was changed since; None outside a checkout."""
    folder = Path(__file__).parent
    try:
        git = partial(subprocess.run, cwd=folder, capture_output=True, text=True, check=True)
        # A repository around an installed package is not ours.
        git(["git", "ls-files", "--error-unmatch", Path(__file__).name])
        commit = git(["git", "rev-parse", "--short=10", "HEAD"]).stdout.strip()
        changed = git(
            ["git", "status", "--porcelain", "--untracked-files=no", "--", ":/*.py", ":/*.c", ":/*.h"]
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+" * bool(changed)


def _require_alike(curves: Sequence[tuple[str, AdaptationCurve]]) -> None:
    # One number a trial may be its whole return; bounded by steps, trials have as many episodes as they find time for.
    played = [(name, curve) for name, curve in curves if curve.finished is None or curve.episodes is not None]
    sizes = {name: curve.returns.shape[1] for name, curve in played}
    sizes = {name: sizes[name] for name, curve in played if 1 < sizes[name] == curve.num_compared}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"the curves are of trials of different numbers of episodes, {sizes}, over which returns add up: none is better for "
            "having more. Play all of them for as many."
        )
    if len(tasks := {curve.num_tasks for _, curve in curves}) > 1:
        log.warning(
            "the curves of a report are over different numbers of tasks, %s: the same ones compare best.", sorted(tasks)
        )


def _label(name: str) -> str:
    return name.replace("_", " ")


def _summary(curve: AdaptationCurve) -> dict[str, Any]:
    measures = {name: _by_episode(curve.shown_as(name)) for name in curve.shown}
    trials = {"mean": curve.mean, "se": curve.se, "num_tasks": curve.num_tasks, "num_compared": curve.num_compared}
    return {**trials, **_by_episode(curve), **({"measures": measures} if measures else {})}


def _by_episode(curve: AdaptationCurve) -> dict[str, list[float]]:
    # All that there is of a measure: over a trial's episodes returns add up, a share of successes does not.
    return {"per_episode": curve.per_episode.tolist(), "per_episode_se": curve.per_episode_se.tolist()}


def _finite_or_none(value: Any) -> Any:
    if not getattr(value, "ndim", 1):  # NumPy's and PyTorch's numbers
        value = value.item()
    if isinstance(value, Mapping):
        return {name: _finite_or_none(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite_or_none(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cells(curve: AdaptationCurve, shown: Sequence[str], last: int) -> list[str]:
    cells = [f"{figure:.3f}" for figure in (curve.mean, curve.se)]
    cells += (*_ends(curve, last), "")[:2]
    for each in map(curve.shown_as, shown):  # which classical agents may lack
        cells.append("" if each is None else " → ".join(_ends(each, last)))
    return cells


def _ends(curve: AdaptationCurve, last: int) -> list[str]:
    """The first episode of ``curve`` and the one of number ``last``, or its last that can be compared, with its number."""
    number = min(last, curve.num_compared)
    words = [f"{curve.per_episode[n]:.3f}" for n in dict.fromkeys((0, number - 1))]
    return words if number == last or number == 1 else [words[0], f"{words[1]} ({number})"]


def _band(axes, curve: AdaptationCurve, measure: str | None, label: str, **style) -> None:
    if measure is not None:
        curve = curve.shown_as(measure)
        if curve is None:
            return
    mean, se = (each[: curve.num_compared].cpu().numpy() for each in (curve.per_episode, curve.per_episode_se))
    episodes = range(1, len(mean) + 1)
    if len(mean) == 1:  # of which a line would show nothing: points with bars, side by side
        axes.errorbar([1 + 0.1 * len(axes.containers)], mean, 2 * se, label=label, fmt="o", capsize=4, **style)
        return
    axes.plot(episodes, mean, label=label, **style)
    axes.fill_between(episodes, mean - 2 * se, mean + 2 * se, color=style["color"], alpha=0.2, lw=0)


def _tidy(axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
