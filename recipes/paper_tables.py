"""The two tables of the RL² paper (Duan et al. 2016), cell by cell: classical agents, RL², and a page of ours beside theirs.

All cells take hours. Every figure is a small file in ``folder``, and what is there is not computed again.
"""

import inspect
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from recipes.cli import cli
from recipes.paper_cells import CELLS, Cell
from recipes.paper_numbers import PAPER
from recipes.paper_page import LONGER, beside, best_seed, load, trainings_of, write_page
from recipes.paper_settings import PRETRAINED, RL2_SETTINGS
from recipes.reports import as_json, other_settings, read_report
from recipes.rules import LearnsFrom
from rl2_torchrl import AdaptationReport
from rl2_torchrl.report import made_by

FOLDER = Path("recipes/results/paper_tables")
#: A setting's value, what would have no effect beside it, and why.
WITHOUT_EFFECT = [
    (
        ("part", "page"),
        ("table", "cells", "learns_from", "seeds", "env_steps", "tasks", "from_pretrained", "fresh"),
        "it computes nothing, and writes the page of all figures that are there",
    ),
    (("part", "classical"), ("learns_from", "seeds", "env_steps", "from_pretrained"), "it leaves RL² out"),
    (("from_pretrained", True), ("seeds", "env_steps"), "weights are evaluated as they are"),
]


def main(
    *,
    table: Literal["bandits", "mdps", "all"] = "all",
    part: Literal["classical", "rl2", "page", "all"] = "all",
    cells: tuple[str, ...] = (),
    learns_from: Literal["rewards", "task", "both"] = "both",
    seeds: tuple[int, ...] = (0, 1, 2),
    env_steps: int | None = None,
    tasks: int = 10_000,
    from_pretrained: bool = False,
    fresh: bool = False,
    folder: Path = FOLDER,
    runs: Path = Path("runs/paper_tables"),
    pretrained: Path | None = None,
) -> Path:
    """Computes figures of the paper's tables that are not there yet, and writes the page of all that are.

    Args:
        table: which table.
        part: classical agents, RL², or only the page, which is written at the end of the others too.
        cells: which cells, as 100,10 for 100 pulls of 10 arms (table bandits) or 25 for 25 episodes (table mdps); all by default.
        learns_from: RL² that is trained on rewards alone, as the paper's, or with the task told in training too; both by default,
            where a cell has settings for both.
        seeds: seeds of the trainings of RL².
        env_steps: train RL² for so many env steps, in place of those of the cell's settings; figures of their own on the page.
        tasks: held-out tasks that an agent is reported on.
        from_pretrained: evaluate RL² with the weights in ``pretrained``, all where no cells are named, in place of training it.
        fresh: compute what is there already once more, and train from the start.
        folder: where the figures are; the page is beside it, under the folder's name.
        runs: where trainings keep their checkpoints: what was interrupted goes on from there.
        pretrained: folder of agents, <table>_<cell>_<learns from>.safetensors, by default recipes/pretrained. After its trainings a
            cell's best seed is put there; by default into a subfolder of ``folder``, where that is one of your own.
    """
    require_effect(locals())
    kept, pretrained = (
        pretrained or (PRETRAINED if folder == FOLDER else folder / "pretrained"),
        pretrained or PRETRAINED,
    )
    if tasks < 2:
        raise ValueError(f"tasks={tasks}: a standard error needs two tasks at least. Pass 10000 for figures to report.")
    if part in ("rl2", "all") and not seeds:
        raise ValueError("seeds is empty: nothing would be trained. Pass one or more, such as --seeds 0 1 2.")
    for name, each in (("cells", cells), ("seeds", seeds)):
        if len(set(each)) < len(each):
            raise ValueError(f"{name}={each}: each {name[:-1]} once, or it would be computed twice.")
    chosen = choose(table, cells)
    book = Figures(folder, tasks, fresh)
    trained = [(cell, way) for cell in chosen for way in ways(cell, learns_from)]
    if from_pretrained:
        if not cells:  # all that are shipped
            trained = [(cell, way) for cell, way in trained if weights_of(cell, way, pretrained).exists()]
        check_weights(trained, pretrained)
    if part in ("rl2", "all") and not trained:
        why = f"{pretrained} has no weights of theirs" if from_pretrained else "they have no settings for it"
        raise ValueError(
            f"RL² has nothing to do in the cells {' '.join(cell.name for cell in chosen)} with learns_from={learns_from!r}: "
            f"{why}. Name other cells, another learns_from{' or pretrained' * from_pretrained}, or part='classical'."
        )
    for cell in chosen if part in ("classical", "all") else []:
        classical(cell, book)
    for cell, way in trained if part in ("rl2", "all") else []:
        if from_pretrained:
            evaluate(cell, way, book, runs, pretrained)
        else:
            for seed in seeds:
                train(cell, way, seed, book, runs, env_steps)
            keep_best(cell, way, book, runs, kept)
    page = folder.with_name(f"{folder.name}.md")
    write_page(folder, page)
    Console().print(f"page: {page}", markup=False)
    return page


def require_effect(given: Mapping[str, Any]) -> None:
    """Raises ValueError where one of the arguments ``given`` to `main` is without effect beside another."""
    usual = {name: each.default for name, each in inspect.signature(main).parameters.items()}
    for (setting, value), others, why in WITHOUT_EFFECT:
        unused = [name for name in others if given[name] != usual[name]]
        if given[setting] == value and unused:
            raise ValueError(f"{setting}={value!r} takes no {', '.join(unused)}: {why}. Leave them out.")


def choose(table: str, cells: tuple[str, ...]) -> list[Cell]:
    """The cells that are named, or all of the table.

    Raises:
        ValueError: there is no such cell.
    """
    there = {name: cell for key, row in CELLS.items() if table in (key, "all") for name, cell in row.items()}
    unknown = [name for name in cells if name not in there]
    if unknown:
        raise ValueError(f"cells={unknown}: there is no such cell in table={table!r}. It has {' '.join(there)}.")
    return [there[name] for name in cells or there]


def ways(cell: Cell, learns_from: str) -> list[LearnsFrom]:
    """What RL² may learn from in a cell, of what is asked for: that of which there are settings."""
    return [way for way in RL2_SETTINGS[cell.table][cell.name] if learns_from in (way, "both")]


class Figures:
    """The folder of figures, one small file for each.

    Args:
        folder: the folder.
        tasks: held-out tasks that are asked for.
        fresh: whether figures that are there are computed once more.
    """

    def __init__(self, folder: Path, tasks: int, fresh: bool):
        self.folder, self.tasks, self.fresh = folder, tasks, fresh

    def path(self, cell: Cell, agent: str) -> Path:
        """The file of a figure."""
        return self.folder / f"{stem(cell)}_{agent}.json"

    def has(self, cell: Cell, agent: str) -> bool:
        """Whether the figure need not be computed: it is there, on as many tasks as are asked for."""
        path = self.path(cell, agent)
        if self.fresh or not path.exists():
            return False
        return json.loads(path.read_text())["num_tasks"] >= cell.num_tasks(agent, self.tasks)

    def tell_others(self, cell: Cell, agent: str, settings: dict[str, Any]) -> None:
        """Says so where a figure that is kept was made with other settings than these."""
        others = other_settings(json.loads(self.path(cell, agent).read_text())["settings"], settings)
        if others:
            kept = f"kept, though made with other settings than the cell's ({', '.join(others)})"
            Console().print(f"{cell.table} {cell.name} {agent}: {kept}. Pass --fresh to train again.", highlight=False)

    def add(self, cell: Cell, agent: str, arguments: str, figure: dict[str, Any]) -> None:
        """Writes a figure, with the command that computes it again, and prints it beside the published one."""
        command = (
            f"python -m recipes.paper_tables --table {cell.table} --cells {cell.name} --tasks {self.tasks} {arguments}"
        )
        whole = {"table": cell.table, "cell": cell.name, "agent": agent, **figure, **made_by(), "command": command}
        self.folder.mkdir(parents=True, exist_ok=True)
        # Moved into place at once: no half a file is left where the command is stopped.
        scratch = self.path(cell, agent).with_suffix(".part")
        scratch.write_text(as_json(whole) + "\n")
        scratch.replace(self.path(cell, agent))
        name = agent if agent in PAPER[cell.table][cell.name] else agent.partition("_")[0]
        shown = beside(figure["mean"], figure["se"], cell.table, cell.name, name)
        Console().print(f"{cell.table} {cell.name} {agent}: {shown}", highlight=False)


def stem(cell: Cell) -> str:
    """What the names of a cell's files begin with."""
    return f"{cell.table}_{cell.name.replace(',', '_')}"


def weights_of(cell: Cell, way: LearnsFrom, pretrained: Path) -> Path:
    """The file of a cell's shipped agent."""
    return pretrained / f"{stem(cell)}_{way}.safetensors"


# ------------------------------------------------------------------ the parts
def classical(cell: Cell, book: Figures) -> None:
    """Tunes and plays the classical agents whose figures are missing."""
    for agent in cell.classical_agents:
        if book.has(cell, agent):
            continue
        started = time.perf_counter()
        played = cell.play(agent, cell.num_tasks(agent, book.tasks))
        figure = {
            "mean": played.curve.mean,
            "se": played.curve.se,
            "num_tasks": played.curve.num_tasks,
            "options": dict(played.options),
            "tuning_tasks": played.tuning_tasks,
            "seconds": time.perf_counter() - started,
        }
        book.add(cell, agent, "--part classical --fresh", figure)


def train(cell: Cell, way: LearnsFrom, seed: int, book: Figures, runs: Path, env_steps: int | None) -> None:
    """Trains RL² with a seed, or goes on where that was interrupted, unless its figure is there."""
    longer, arguments, options = "", f"--part rl2 --learns-from {way} --seeds {seed} --fresh", {}
    if env_steps is not None:
        longer, arguments = f"{LONGER}{env_steps}", f"{arguments} --env-steps {env_steps}"
        options = {"env_steps": env_steps}
    agent = f"rl2_{way}_seed{seed}{longer}"
    settings = cell.settings(way, **options)
    if book.has(cell, agent):
        book.tell_others(cell, agent, settings)
        return
    # Or the agent of a training that is cut short would be shipped for the figure of the one before.
    book.path(cell, agent).unlink(missing_ok=True)
    run = run_folder(runs, cell, agent)
    resume = same_settings(run, settings) and not book.fresh
    report = cell.train(way, seed=seed, report_tasks=book.tasks, log_dir=run, resume=resume, **options)
    if report.train.interrupted:
        command = f"the same command{', without --fresh,' * book.fresh} goes on with it"
        raise KeyboardInterrupt(f"the training in {run} is not finished: {command}.")
    figure = {
        **rl2_figure(report),
        "settings": settings,
        "held_out": report.train.history[-1]["eval/trial_return"],
        "env_steps": report.train.env_steps,
        "seconds": report.train.seconds,
    }
    book.add(cell, agent, arguments, figure)


def run_folder(runs: Path, cell: Cell, agent: str) -> Path:
    """Where a training keeps its checkpoints and leaves its agent."""
    return runs / f"{stem(cell)}_{agent.removeprefix('rl2_')}"


def same_settings(run: Path, settings: dict[str, Any]) -> bool:
    """Whether a run was begun with these settings, so that it can go on; they are kept in its folder."""
    note, text = run / "settings.json", as_json(settings)
    same = note.exists() and note.read_text() == text
    run.mkdir(parents=True, exist_ok=True)
    note.write_text(text)
    return same


def evaluate(cell: Cell, way: LearnsFrom, book: Figures, runs: Path, pretrained: Path) -> None:
    """Plays a cell's pretrained weights on the reporting tasks, whether or not that was done before."""
    started, log_dir = time.perf_counter(), runs / f"{stem(cell)}_{way}_pretrained"
    options = {"initial_weights": None, "weights": weights_of(cell, way, pretrained)}
    report = cell.train(way, report_tasks=book.tasks, log_dir=log_dir, **options)
    # Without the cell's settings: a longer training may have left these weights.
    figure = {**rl2_figure(report), "seconds": time.perf_counter() - started}
    book.add(cell, f"rl2_{way}_pretrained", f"--part rl2 --learns-from {way} --from-pretrained", figure)


def rl2_figure(report: AdaptationReport) -> dict[str, Any]:
    """What is kept of a report."""
    return {
        "mean": report.agent.mean,
        "se": report.agent.se,
        "num_tasks": report.agent.num_tasks,
        "greedy_mean": report.greedy.mean,
        "greedy_se": report.greedy.se,
        "memory_zeroed": report.ablations["memory_zeroed"].mean,
        "rewards_shuffled": report.ablations["rewards_shuffled"].mean,
    }


# -------------------------------------------------------------------- weights
def check_weights(chosen: list[tuple[Cell, LearnsFrom]], pretrained: Path) -> None:
    """Raises FileNotFoundError where a cell has no weights."""
    there = [weights_of(cell, way, pretrained).exists() for cell, way in chosen]
    missing = [f"{cell.name} ({way})" for (cell, way), is_there in zip(chosen, there, strict=True) if not is_there]
    if missing:
        others = [f"{cell.name} ({way})" for (cell, way), is_there in zip(chosen, there, strict=True) if is_there]
        raise FileNotFoundError(
            f"no weights in {pretrained} for the cells {', '.join(missing)}. "
            + (
                f"Name only those that have some, by --cells and --learns-from: {', '.join(others)}; or train"
                if others
                else "Train"
            )
            + " the others: python -m recipes.paper_tables --part rl2, with the same --cells and --learns-from"
        )


def keep_best(cell: Cell, way: LearnsFrom, book: Figures, runs: Path, pretrained: Path) -> None:
    """Puts the agent of the best training, by held-out tasks that are not reported, among the pretrained ones."""
    best = best_seed(trainings_of(load(book.folder), cell.table, cell.name, way))
    run, weights = run_folder(runs, cell, best["agent"]), weights_of(cell, way, pretrained)
    # Another training, as for another folder of figures, may have put its agent there since.
    if read_report(run)["train"].get("seconds") != best["seconds"]:
        return
    agent = run / "agent.safetensors"
    if not agent.exists() or (weights.exists() and weights.read_bytes() == agent.read_bytes()):
        return
    pretrained.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(agent, weights)
    Console().print(f"{weights}: the agent of {best['agent']}", highlight=False, markup=False)
    book.path(cell, f"rl2_{way}_pretrained").unlink(missing_ok=True)  # the figure of other weights


if __name__ == "__main__":
    cli(main)
