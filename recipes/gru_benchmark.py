"""TorchRL's `GRUModule` (each backend that runs here) against `FastGRUModule`: one step and whole sequences."""

import statistics
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from tensordict import TensorDict
from torchrl.modules import GRUModule, set_recurrent_mode

from recipes.benchmark import in_turns, require_repeats
from recipes.cli import cli
from rl2_torchrl.modules import FastGRUModule

KEYS = {"in_keys": ["x", "h"], "out_keys": ["y", ("next", "h")]}


def main(
    *,
    rows: tuple[int, ...] = (16, 64, 1024),
    units: tuple[int, ...] = (64, 256),
    steps: int = 100,
    inputs: int = 12,
    repeats: int = 5,
    threads: int | None = None,
) -> dict[str, dict[str, float]]:
    """Prints median milliseconds, and how many times faster `FastGRUModule` is than the fastest other.

    Args:
        rows: sequences in a batch.
        units: GRU units.
        steps: steps of a sequence.
        inputs: size of the input.
        repeats: runs of each, taken in turns.
        threads: threads that PyTorch uses; all cores by default.
    """
    require_repeats(repeats)
    if threads is not None:
        torch.set_num_threads(threads)
    table = Table(
        title=f"milliseconds, medians of {repeats}; {torch.get_num_threads()} threads, {steps} steps a sequence"
    )
    names = ["pad", "scan", "python", "fast"]
    for column in ("rows x units", "what", *names, "faster"):
        table.add_column(column, justify="right")
    figures = {}
    for size in [(n, h) for n in rows for h in units]:
        modules = dict(zip(names, build(inputs, size[1]), strict=True))
        for what, run in WORK.items():
            runs = {name: run(module, size[0], steps, inputs) for name, module in modules.items()}
            times = {name: 1e3 * statistics.median(each) for name, each in in_turns(runs, repeats).items()}
            faster = min(t for name, t in times.items() if name != "fast") / times["fast"]
            table.add_row(f"{size[0]} x {size[1]}", what, *(f"{times[name]:.2f}" for name in names), f"{faster:.1f}")
            figures[f"{size[0]}x{size[1]} {what}"] = times
    Console().print(table)
    return figures


def build(inputs: int, units: int) -> list[GRUModule]:
    """TorchRL's backends, then ours, with the same weights."""
    sizes = {"input_size": inputs, "hidden_size": units, **KEYS}
    modules = [
        GRUModule(**sizes),
        GRUModule(**sizes, recurrent_backend="scan"),
        GRUModule(**sizes, python_based=True),
        FastGRUModule(**sizes),
    ]
    for module in modules[1:]:
        module.load_state_dict(modules[0].state_dict())
    return modules


def one_step(module: GRUModule, rows: int, steps: int, inputs: int) -> Callable[[], None]:
    """A step of a rollout, without gradient."""
    batch = TensorDict({"x": torch.randn(rows, inputs), "is_init": torch.zeros(rows, 1, dtype=torch.bool)}, [rows])
    batch["h"] = torch.zeros(rows, 1, module.gru.hidden_size)

    def run() -> None:
        with torch.no_grad():
            module(batch)

    return run


def forward(module: GRUModule, rows: int, steps: int, inputs: int) -> Callable[[], None]:
    """A whole sequence, without gradient."""
    batch = sequences(rows, steps, inputs)

    def run() -> None:
        with torch.no_grad(), set_recurrent_mode(True):
            module(batch.copy())

    return run


def forward_and_backward(module: GRUModule, rows: int, steps: int, inputs: int) -> Callable[[], None]:
    """A whole sequence and the gradient of all weights."""
    batch, gradient = sequences(rows, steps, inputs), torch.randn(rows, steps, module.gru.hidden_size)

    def run() -> None:
        with set_recurrent_mode(True):
            module(out := batch.copy())
        out["y"].backward(gradient)

    return run


WORK = {"one step": one_step, "forward": forward, "forward + backward": forward_and_backward}


def sequences(rows: int, steps: int, inputs: int) -> TensorDict:
    """Sequences that start from zeros and run to their end."""
    is_init = torch.zeros(rows, steps, 1, dtype=torch.bool)
    is_init[:, 0] = True
    return TensorDict({"x": torch.randn(rows, steps, inputs), "is_init": is_init}, [rows, steps])


if __name__ == "__main__":
    cli(main)
