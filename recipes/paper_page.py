"""The page of the paper's tables, made from the files of figures alone: ours beside the published numbers, and how to get them."""

import json
from collections.abc import Iterable, Sequence
from math import hypot
from pathlib import Path
from statistics import fmean, mode, stdev
from typing import Any, Literal

from recipes.paper_cells import CELLS
from recipes.paper_numbers import PAPER, PAPER_SE
from recipes.results import table as markdown

__all__ = ["LONGER", "mark", "over_seeds", "short", "write_page"]

LONGER = "_steps"  # in the name of a training's figure, before its env steps where they are not those of the settings

Figure = dict[str, Any]
Figures = dict[tuple[str, str, str], Figure]  # by table, cell and agent

TITLES = {
    "bandits": "Table 1: Bernoulli bandits, total reward of n pulls of k arms",
    "mdps": "Table 2: tabular MDPs, total reward of n episodes of 10 steps",
}
#: Agents that the paper has not, after its own.
MORE_AGENTS = {"bandits": (), "mdps": ("perfect_memory", "optimistic_memory")}
WAYS = {"rewards": "trained on rewards only", "task": "task told in training"}
OPTIMUM = {"bandits": "Bayes optimum", "mdps": "known-task optimum"}
LABELS = {
    "thompson_sampling": "Thompson sampling (TS)",
    "optimistic_thompson_sampling": "optimistic TS",
    "epsilon_greedy": "ε-greedy",
    "gittins": "Gittins",
    "perfect_memory": "perfect memory, no plan",
    "optimistic_memory": "the same, optimistic",
    **{name: name.upper() for name in ("ucb1", "psrl", "opsrl", "ucrl2", "beb")},
}
INTRO = """\
Ours ± standard error over held-out tasks, the published number in brackets, and how ours stands to it: **within** where they
differ by no more than 3 standard errors of the difference, else **above** or **below**. A published number is a mean over 1,000
tasks, whose standard error is in the first column. All agents of a cell play the same tasks, on which nothing was tuned or
trained. `-`: not computed yet."""
ABOUT_RL2 = """\
Two kinds of RL² are kept apart. *Rewards only*, as the paper's: what training learns from at any time is rewards. In long trials
the memory is taught to tell the means of those that the trial has paid, and actions that were seldom tried have a bonus; of tasks,
or of how they are drawn, nothing is told. *Task told in training*: advantages from regrets, a critic that sees the task, a
memory that is taught to tell it; or in the task's place its exact posterior given what a trial has shown, for which training is
told the prior, with some of its standard deviations on top of the means. When they play, neither is told anything but rewards.

RL² with PPO and a GRU: the mean over training seeds, whose standard error holds both that over tasks and that over seeds, and the
seed that was best on held-out tasks (not on those reported). The paper's RL² is the best of 5 seeds. Acting is by sampling, as in
training, but in the column that says greedy; without memory the same agent has its hidden state zeroed before every step. The
shipped weights are those of the best training, longer ones among them, evaluated once more. Minutes are the training's own: where
it goes on from the weights of another, that one's come on top."""


def write_page(folder: Path, page: Path) -> None:
    """Writes ``page`` from the files in ``folder``, with ``paper_notes.md`` beside the page, if it is there, word for word."""
    figures = load(folder)
    notes = page.with_name("paper_notes.md")
    lines = ["# The tables of the RL² paper", INTRO, ABOUT_RL2]
    lines += [notes.read_text().strip()] if notes.exists() else []
    for table, title in TITLES.items():
        lines += [f"## {title}", classical_table(figures, table), *tasks_of(figures, table)]
        lines += time_taken(figures, table)
        for way, heading in WAYS.items():
            lines += [f"### RL², {heading}", rl2_table(figures, table, way), *longer_table(figures, table, way)]
        lines += ["### What tuning chose", tuning_table(figures, table), "### Made by", *commands(figures, table)]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join(lines) + "\n")


def load(folder: Path) -> Figures:
    """All figures in ``folder``."""
    figures = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return {(figure["table"], figure["cell"], figure["agent"]): figure for figure in figures}


# ------------------------------------------------------------------- figures
def mark(ours: float, se: float, paper: float, paper_se: float) -> Literal["above", "within", "below"]:
    """How ``ours`` stands to ``paper``: within, where they differ by 3 standard errors of the difference at most."""
    difference = ours - paper
    if abs(difference) <= 3 * hypot(se, paper_se):
        return "within"
    return "above" if difference > 0 else "below"


def over_seeds(figures: Sequence[Figure]) -> tuple[float, float]:
    """Mean over training seeds and its standard error.

    Seeds are reported on the same tasks, so that the error over tasks does not fall with the number of seeds; the spread of
    the seeds comes on top of it.
    """
    means = [figure["mean"] for figure in figures]
    tasks = fmean(figure["se"] ** 2 for figure in figures) ** 0.5
    seeds = stdev(means) / len(means) ** 0.5 if len(means) > 1 else 0.0
    return fmean(means), hypot(tasks, seeds)


def best_seed(figures: Sequence[Figure]) -> Figure:
    """The seed that earned most on the held-out tasks of its last evaluation during training."""
    return max(figures, key=lambda figure: figure["held_out"])


def short(mean: float, se: float | None = None) -> str:
    """With as many digits as the figure's size asks for."""
    digits = 3 if mean < 20 else 2 if mean < 200 else 1
    return f"{mean:.{digits}f}" if se is None else f"{mean:.{digits}f} ± {se:.{digits}f}"


def beside(mean: float, se: float, table: str, cell: str, agent: str) -> str:
    """Ours beside the published number, if there is one."""
    paper = PAPER[table][cell].get(agent)
    if paper is None:
        return short(mean, se)
    return f"{short(mean, se)} ({paper}: {mark(mean, se, paper, PAPER_SE[table][cell])})"


# -------------------------------------------------------------------- tables
def classical_table(figures: Figures, table: str) -> str:
    """A row for each cell, a column for each classical agent."""
    columns = [name for name in next(iter(PAPER[table].values())) if name not in ("rl2", "snail")]
    columns += [*MORE_AGENTS[table], "optimum"]

    def entry(cell: str, agent: str) -> str:
        figure = figures.get((table, cell, agent))
        if figure is None:
            return f"- ({PAPER[table][cell][agent]})" if agent in PAPER[table][cell] else "-"
        return beside(figure["mean"], figure["se"], table, cell, agent)

    head = [head_of(table), *map(label, columns[:-1]), OPTIMUM[table]]
    return markdown(head, [[row_of(table, cell), *(entry(cell, name) for name in columns)] for cell in PAPER[table]])


def rl2_table(figures: Figures, table: str, way: str) -> str:
    """A row for each cell: seeds together, the best one, and what the training took."""
    head = [head_of(table), "seeds", "mean of seeds (RL²)", "(SNAIL)", "best seed (RL²)", "greedily", "without memory"]
    head += ["shipped weights", "million env steps", "minutes"]
    return markdown(head, [[row_of(table, cell), *rl2_row(figures, table, cell, way)] for cell in PAPER[table]])


def rl2_row(figures: Figures, table: str, cell: str, way: str) -> list[str]:
    """What `rl2_table` shows of a cell."""
    shipped = figures.get((table, cell, f"rl2_{way}_pretrained"))
    again = "-" if shipped is None else short(shipped["mean"], shipped["se"])
    seeds = seeds_of(figures, table, cell, way)
    paper = PAPER[table][cell]
    if not seeds:
        return ["-", f"- ({paper['rl2']})", f"({paper['snail']})", *["-"] * 3, again, "-", "-"]
    mean, se = over_seeds(seeds)
    best = best_seed(seeds)
    return [
        str(len(seeds)),
        beside(mean, se, table, cell, "rl2"),
        f"({paper['snail']}: {mark(mean, se, paper['snail'], PAPER_SE[table][cell])})",
        beside(best["mean"], best["se"], table, cell, "rl2"),
        short(best["greedy_mean"], best["greedy_se"]),
        short(best["memory_zeroed"]),
        again,
        f"{fmean(seed['env_steps'] for seed in seeds) / 1e6:.1f}",
        f"{fmean(seed['seconds'] for seed in seeds) / 60:.1f}{start_of(best)}",
    ]


def start_of(figure: Figure) -> str:
    """Whose weights a training started from, in words; empty for none."""
    weights = figure.get("settings", {}).get("initial_weights")
    return "" if weights is None else f", on from {Path(weights).stem}"


def longer_table(figures: Figures, table: str, way: str) -> list[str]:
    """A row for each training that took other than the settings' env steps, if there are any."""
    longer = [
        figure
        for cell in PAPER[table]
        for figure in trainings_of(figures, table, cell, way)
        if LONGER in figure["agent"]
    ]
    if not longer:
        return []
    head = [head_of(table), "seed (RL²)", "(SNAIL)", "greedily", "without memory", "million env steps", "minutes"]
    return [
        "Single seeds, trained for other numbers of env steps:",
        markdown(head, [longer_row(figure) for figure in longer]),
    ]


def longer_row(figure: Figure) -> list[str]:
    """What `longer_table` shows of a training."""
    table, cell = figure["table"], figure["cell"]
    snail = PAPER[table][cell]["snail"]
    return [
        row_of(table, cell),
        beside(figure["mean"], figure["se"], table, cell, "rl2"),
        f"({snail}: {mark(figure['mean'], figure['se'], snail, PAPER_SE[table][cell])})",
        short(figure["greedy_mean"], figure["greedy_se"]),
        short(figure["memory_zeroed"]),
        f"{figure['env_steps'] / 1e6:.1f}",
        f"{figure['seconds'] / 60:.1f}",
    ]


def seeds_of(figures: Figures, table: str, cell: str, way: str) -> list[Figure]:
    """The figures of RL² in a cell, one for each training seed."""
    return [figure for figure in trainings_of(figures, table, cell, way) if LONGER not in figure["agent"]]


def trainings_of(figures: Figures, table: str, cell: str, way: str) -> list[Figure]:
    """The figures of all trainings of RL² in a cell that learnt from ``way``, those for other numbers of env steps among them."""
    own = [(key[2], figure) for key, figure in figures.items() if key[:2] == (table, cell)]
    return [figure for agent, figure in own if agent.startswith(f"rl2_{way}_seed")]


def tuning_table(figures: Figures, table: str) -> str:
    """A row for each cell, a column for each agent that has something to tune."""
    tuned = sorted({key[2] for key, figure in figures.items() if key[0] == table and figure.get("options")})
    if not tuned:
        return "-"

    def entry(cell: str, agent: str) -> str:
        options = figures.get((table, cell, agent), {}).get("options", {})
        return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in options.items()) or "-"

    head = [head_of(table), *map(label, tuned)]
    return markdown(head, [[row_of(table, cell), *(entry(cell, name) for name in tuned)] for cell in PAPER[table]])


def label(agent: str) -> str:
    """What an agent is called on the page."""
    return LABELS.get(agent, agent.replace("_", " "))


def head_of(table: str) -> str:
    """The first column's heading."""
    return f"{'n, k' if table == 'bandits' else 'n'} (SE of the paper)"


def row_of(table: str, cell: str) -> str:
    """A cell's name, and the standard error of its published numbers."""
    return f"{cell.replace(',', ', ')} ({PAPER_SE[table][cell]})"


# ---------------------------------------------------------------- provenance
def tasks_of(figures: Figures, table: str) -> list[str]:
    """How many tasks most figures have, and which have others: an agent that is slow has fewer."""
    numbers = {key: figure["num_tasks"] for key, figure in figures.items() if key[0] == table}
    if not numbers:
        return []
    usual = mode(numbers.values())
    text = f"Tasks in a cell: {usual:,}"
    for (_, cell, agent), number in numbers.items():
        if number != usual:
            slow = CELLS[table][cell].num_tasks(agent, usual) == number
            text += f"; {number:,} for {label(agent)} in cell {cell}{', which takes long' * slow}"
    return [f"{text}."]


def time_taken(figures: Figures, table: str) -> list[str]:
    """How long the table's classical agents took, tuning included."""
    seconds = [figure["seconds"] for key, figure in figures.items() if key[0] == table and "tuning_tasks" in figure]
    if not seconds:
        return []
    return [
        f"The {len(seconds)} figures took {sum(seconds) / 60:.0f} minutes together, one after the other, tuning included."
    ]


def commands(figures: Figures, table: str) -> Iterable[str]:
    """The commands that made the figures, each with its commit, and the versions at the time."""
    own = [figure for key, figure in figures.items() if key[0] == table]
    if not own:
        return ["-"]
    lines = dict.fromkeys(f"{figure['command']}  # commit {figure['commit']}" for figure in own)
    versions = dict.fromkeys(", ".join(f"{name} {v}" for name, v in figure["versions"].items()) for figure in own)
    return ["\n".join(["```", *lines, "```"]), *(f"With {line}." for line in versions)]
