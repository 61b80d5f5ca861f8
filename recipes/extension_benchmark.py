"""What it costs to bring a part of one's own: training with each of `recipes.extensions` beside training with none.

A figure is a *tax*: the median over rounds, in which base and variant take turns, of

    seconds of the variant / (seconds of the base + seconds of the arithmetic that the variant adds - of what it replaces)

That arithmetic is timed alone, in the same rounds: plain PyTorch modules of the same sizes, forward over a batch's steps one by
one, forward and backward over the same epochs and minibatches; what is replaced is timed as the base has it. Where a variant
adds none, the tax is simply variant / base. Of the two env variants only the collection is timed, beside that of the env or
collector named in the table.
"""

import json as json_files
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal, NoReturn

import torch
from rich.console import Console
from rich.table import Table

from recipes.benchmark import WORKLOADS, Workload, write_json
from recipes.cli import cli
from recipes.extension_variants import VARIANTS, Arithmetic, Timed, Variant, training

#: A round of a workload whose iterations are shorter repeats them until they take about so many seconds.
ROUND_SECONDS = 0.3
MIN_ROUNDS = 5


def main(
    *,
    variants: tuple[str, ...] = (),
    workloads: tuple[Literal["W1", "W2", "W3"], ...] = ("W1", "W2", "W3"),
    rounds: int = MIN_ROUNDS,
    threads: int | None = None,
    trials: int | None = None,
    units: int | None = None,
    base: Path | None = None,
    json: Path | None = None,
) -> dict[str, dict]:
    """Times trainings with a user's part beside trainings without, and prints what it costs beside what it may cost.

    A tax is seconds of the variant / (seconds of the base + seconds of the arithmetic that the variant adds - of what it
    replaces), that arithmetic alone in plain PyTorch: forward and backward of the modules over the same steps, epochs and
    minibatches. It is the median over rounds in which all of them take turns.

    Args:
        variants: which variants; all by default.
        workloads: which workloads of `recipes.benchmark`.
        rounds: rounds, at least 5.
        threads: threads that PyTorch uses; all cores by default.
        trials: trials in a batch, in place of the workload's.
        units: GRU units, in place of the workload's.
        base: another checkout of this repository, in which the base of the trainings runs, in place of this one.
        json: file to write all figures to.
    """
    if rounds < MIN_ROUNDS:
        raise ValueError(
            f"rounds={rounds}: a median of fewer than {MIN_ROUNDS} says little on a machine that does more."
        )
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown:
        raise ValueError(f"variants={unknown}: there are {' '.join(VARIANTS)}.")
    if threads is not None:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    own = {key: value for key, value in (("trials", trials), ("units", units)) if value is not None}
    sizes = {name: replace(WORKLOADS[name], **own) for name in workloads}
    figures = {name: measure(VARIANTS[name], sizes, rounds, base) for name in variants or VARIANTS}
    Console().print(table(figures, list(sizes), f"{torch.get_num_threads()} threads, medians of {rounds} rounds"))
    write_json(json, figures)
    return figures


# -------------------------------------------------------------------- measuring
class OtherCheckout:
    """The base's `Training` in a process of its own, with the code in the folder ``path``."""

    PROGRAM = """
import json, sys, time
from pathlib import Path
import torch
import rl2_torchrl
from recipes import benchmark
from recipes.benchmark import Workload, compose
for module in (rl2_torchrl, benchmark):
    if not Path(module.__file__).resolve().is_relative_to(Path.cwd().resolve()):
        sys.exit(f"{module.__name__} is not there, but in {module.__file__}")
sizes, threads = json.loads(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(threads)
torch.set_flush_denormal(True)
torch.manual_seed(0)
collector, update = compose(Workload(**sizes))
batches = iter(collector)
for _ in sys.stdin:
    start = time.perf_counter()
    update(next(batches))
    sys.stdout.write(f"seconds {time.perf_counter() - start}\\n")
    sys.stdout.flush()
"""

    def __init__(self, path: Path, workload: Workload):
        command = [sys.executable, "-c", self.PROGRAM, json_files.dumps(asdict(workload)), str(torch.get_num_threads())]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._path, self._process = path, subprocess.Popen(command, cwd=path, **pipes)

    def __call__(self) -> float:
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._end()
        for line in self._process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        self._end()

    def _end(self) -> NoReturn:
        raise RuntimeError(
            f"the base's process in {self._path} has ended, its own words above: is it a checkout of this repository?"
        )

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def measure(variant: Variant, workloads: dict[str, Workload], rounds: int, base: Path | None) -> dict:
    """The tax of a variant on each workload, its backend and why, and the ratios of all rounds."""
    figures, ways, ratios = {}, {}, {}
    for name, workload in workloads.items():
        torch.manual_seed(0)
        own = variant.build(workload)
        if variant.base is not None:
            other = variant.base(workload)
        else:
            other = training(workload) if base is None else OtherCheckout(base, workload)
        ratios[name] = in_turns(other, own, variant.arithmetic(workload), rounds)
        figures[f"tax_{name}"] = statistics.median(ratios[name])
        ways[name] = own.ways()
        own.close()
        other.close()
    backend, reason = (_in_words(ways, which) for which in (0, 1))
    return {**figures, "backend": backend, "reason": reason, "bound": variant.bound, "ratios": ratios}


def in_turns(base: Timed, variant: Timed, arithmetic: Timed, rounds: int) -> list[float]:
    """The tax in each round; two rounds before them, not counted, compile and allocate."""
    for _ in range(2):
        seconds = max(base(), 1e-6)
        variant()
        arithmetic()
    repeats = max(1, round(ROUND_SECONDS / seconds))
    ratios = []
    for _ in range(rounds):
        of_base, of_variant, of_arithmetic = (
            sum(timed() for _ in range(repeats)) for timed in (base, variant, arithmetic)
        )
        ratios.append(of_variant / (of_base + of_arithmetic))
    return ratios


def _in_words(ways: dict[str, dict[str, tuple[str, str | None]]], which: int) -> str:
    """Backends (0) or reasons (1) of all workloads, each once where they are the same."""
    words = {
        name: "; ".join(f"{part}: {way[which]}" for part, way in parts.items() if way[which])
        for name, parts in ways.items()
    }
    if len(set(words.values())) == 1:
        return next(iter(words.values()))
    return " | ".join(f"{name} {text}" for name, text in words.items())


def table(figures: dict[str, dict], workloads: list[str], title: str) -> Table:
    """One row a variant: its taxes, those above the bound in red, and the bound."""
    out = Table(title=f"Seconds of the variant / (base + added arithmetic alone in plain PyTorch) ({title})")
    for column in ("variant", "against", *workloads, "allowed", "backend"):
        out.add_column(column, justify="right" if column in (*workloads, "allowed") else "left")
    for name, row in figures.items():
        variant = VARIANTS[name]
        taxes = [row[f"tax_{workload}"] for workload in workloads]
        cells = [f"[red]{tax:.2f}" if tax > variant.bound else f"{tax:.2f}" for tax in taxes]
        plus = " + arithmetic" if variant.arithmetic is not Arithmetic else ""
        out.add_row(f"{name} ({variant.what})", variant.against + plus, *cells, f"{variant.bound:.2f}", row["backend"])
    return out


if __name__ == "__main__":
    cli(main)
