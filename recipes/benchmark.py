"""How fast RL² trains on this machine: collection, advantages and update, on three bandit workloads or one of your own."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from json import dumps
from pathlib import Path
from timeit import timeit
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from tensordict import TensorDictBase
from torch.autograd import DeviceType
from torchrl.envs import Compose, EnvBase, TransformedEnv

from recipes.cli import cli
from rl2_torchrl import (
    ActorCritic,
    GRUCategoricalActor,
    MemoryValueHead,
    PPOUpdate,
    PreviousStep,
    RL2PPOLoss,
    TaskSampler,
    Trial,
    TrialAdvantage,
    TrialCollector,
)
from rl2_torchrl.envs import BernoulliBandit, uniform_means


@dataclass(frozen=True)
class Workload:
    """A bandit, a batch of trials and a network; one GRU serves actor and critic, and bptt spans the trial."""

    arms: int
    pulls: int
    trials: int
    units: int
    minibatches: int
    epochs: int = 4
    backend: str = "auto"

    @property
    def steps(self) -> int:
        """Env steps of a batch."""
        return self.trials * self.pulls

    @property
    def step_flops(self) -> int:
        """Floating-point operations of an env step: one pass forward in collection, three passes' worth in each epoch."""
        inputs = self.arms + 2
        forward = 2 * (3 * self.units * (inputs + self.units) + self.units * (self.arms + 1))
        return forward * (1 + 3 * self.epochs)


WORKLOADS = {
    "W1": Workload(arms=10, pulls=100, trials=1024, units=256, minibatches=8),
    "W2": Workload(arms=10, pulls=100, trials=64, units=64, minibatches=4),
    "W3": Workload(arms=5, pulls=10, trials=1024, units=64, minibatches=4),
}
SCALING = [("trials", (16, 64, 256, 1024, 4096)), ("units", (32, 64, 128, 256, 512))]


def main(
    *,
    workload: Literal["all", "W1", "W2", "W3"] = "all",
    repeats: int = 5,
    threads: int | None = None,
    trials: int | None = None,
    units: int | None = None,
    backend: Literal["auto", "parts", "autograd", "graph"] = "auto",
    scaling: Path | None = None,
    json: Path | None = None,
    device: str = "cpu",
    matmul_precision: Literal["highest", "high", "medium"] = "highest",
) -> dict[str, dict]:
    """Times whole training iterations and prints steps/s, GFLOP/s and the share of this machine's matrix-product peak.

    Args:
        workload: which workload to run.
        repeats: iterations that are timed, after one that is not; the medians are printed.
        threads: threads that PyTorch uses; all cores by default.
        trials: trials in a batch, in place of the workload's.
        units: GRU units, in place of the workload's.
        backend: of the update.
        scaling: folder for a plot and a table of steps/s against trials and units, around the workload (W1 for all).
        json: file to write all figures to.
        device: where everything lives, cpu or cuda. A collected batch is one CUDA graph there.
        matmul_precision: PyTorch's: on a CUDA device float32 products are made in float32, TensorFloat32 or bfloat16.
    """
    require_repeats(repeats)
    if threads is not None:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision(matmul_precision)
    names = list(WORKLOADS) if workload == "all" else [workload]
    own = {key: value for key, value in (("trials", trials), ("units", units)) if value is not None}
    own["backend"] = backend
    peak = matmul_peak(device)
    figures = {name: measure(replace(WORKLOADS[name], **own), repeats, peak, device) for name in names}
    Console().print(
        table(figures, f"{device}, {torch.get_num_threads()} threads, matrix products up to {peak / 1e9:.0f} GFLOP/s")
    )
    if scaling is not None:
        figures["scaling"] = scaling_study(replace(WORKLOADS[names[0]], **own), repeats, peak, scaling, device)
    write_json(json, figures)
    return figures


def require_repeats(repeats: int) -> None:
    """Raises ValueError where nothing would be timed."""
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: at least one run must be timed.")


def in_turns(runs: Mapping[Any, Callable[[], object]], repeats: int) -> dict[Any, list[float]]:
    """Seconds of each of ``repeats`` times of each run; a first of each, which compiles and allocates, does not count."""
    rounds = [{name: timeit(run, number=1) for name, run in runs.items()} for _ in range(repeats + 1)]
    return {name: [seconds[name] for seconds in rounds[1:]] for name in runs}


def write_json(path: Path | None, figures: Mapping[str, Any]) -> None:
    """Writes the figures to the file at ``path``, if there is to be one."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dumps(figures, indent=1) + "\n")


def compose(
    workload: Workload,
    device: str = "cpu",
    *,
    bandit: Callable[..., EnvBase] = BernoulliBandit,
    actor: Mapping[str, Any] | None = None,
    critic: Mapping[str, Any] | None = None,
    loss: Callable[..., RL2PPOLoss] = RL2PPOLoss,
) -> tuple[TrialCollector, PPOUpdate]:
    """The parts of `recipes.bandit`, of the workload's sizes; another bandit or loss, or further options of actor and critic."""
    env = TransformedEnv(
        bandit(workload.arms, batch_size=(workload.trials,), seed=0, device=device),
        Compose(Trial(episodes=workload.pulls), TaskSampler(uniform_means(workload.arms), seed=1), PreviousStep()),
    )
    policy = GRUCategoricalActor.from_env(env, **{"hidden_size": workload.units, **(actor or {})})
    value = MemoryValueHead.from_env(env, policy, detach=False, **(critic or {}))
    update = PPOUpdate(
        loss(policy, value, clip_epsilon=0.2, entropy_bonus=True),
        TrialAdvantage(gamma=0.99, lmbda=0.3, value_target="gae"),
        lr=1e-3,
        epochs=workload.epochs,
        minibatches=workload.minibatches,
        max_grad_norm=0.5,
        backend=workload.backend,
    )
    frames = {"frames_per_batch": workload.steps, "total_frames": -1}
    return TrialCollector(env, ActorCritic(policy, value), keep=update.in_keys, **frames), update


def measure(workload: Workload, repeats: int, peak: float, device: str = "cpu") -> dict:
    """Steps/s of each phase: all runs and their medians."""
    torch.manual_seed(0)
    collector, update = compose(workload, device)
    batches = iter(collector)
    runs = time_phases(batches, update, workload.steps, repeats, device)
    busy = {} if device == "cpu" else {"device_busy": device_busy(lambda: update(next(batches)))}
    collector.shutdown()
    medians = medians_of(runs)
    flops = medians["total_steps_per_second"] * workload.step_flops
    return {
        **asdict(workload),
        **medians,
        "gflops": flops / 1e9,
        "fraction_of_peak": flops / peak,
        **busy,
        "runs": runs,
    }


def time_phases(
    batches: Iterator[TensorDictBase], update: PPOUpdate, steps: int, repeats: int, device: str = "cpu"
) -> dict[str, list[float]]:
    """Steps/s of each phase in each of ``repeats`` iterations on batches of ``steps`` env steps."""
    advantage, now = _Stopwatch(device), partial(_now, device)
    update.advantage.register_forward_pre_hook(lambda *_: advantage.start())
    update.advantage.register_forward_hook(lambda *_: advantage.stop())
    runs: dict[str, list[float]] = {"collect": [], "advantage": [], "update": [], "total": []}
    warmup = 1 if device == "cpu" else 3
    for repeat in range(repeats + warmup):
        start = now()
        batch = next(batches)
        collected = now()
        update(batch)
        end = now()
        seconds = (collected - start, advantage.seconds, end - collected - advantage.seconds, end - start)
        if repeat >= warmup:  # what comes before compiles, allocates and records
            for phase, duration in zip(runs, seconds, strict=True):
                runs[phase].append(steps / duration)
    return runs


def medians_of(runs: dict[str, list[float]]) -> dict[str, float]:
    """Median steps/s of each phase, under ``<phase>_steps_per_second``."""
    return {f"{phase}_steps_per_second": statistics.median(values) for phase, values in runs.items()}


class _Stopwatch:
    seconds = 0.0

    def __init__(self, device: str):
        self._device = device

    def start(self) -> None:
        self._begin = _now(self._device)

    def stop(self) -> None:
        self.seconds = _now(self._device) - self._begin


def _now(device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def device_busy(iteration: Callable[[], object]) -> float:
    """Share of the wall-clock time of ``iteration`` in which a CUDA device works on a kernel or a copy."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        start = time.perf_counter()
        iteration()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    # The operations that launched a kernel count its time too.
    kernels = [event for event in profile.key_averages() if event.device_type == DeviceType.CUDA]
    return sum(kernel.self_device_time_total for kernel in kernels) / 1e6 / seconds


def matmul_peak(device: str = "cpu", size: int = 2048, repeats: int = 7) -> float:
    """Floating-point operations a second of a dense float32 product: the best of several."""
    a, b, out = (torch.randn(size, size, device=device) for _ in range(3))
    best = 0.0
    for _ in range(repeats):
        start = _now(device)
        torch.mm(a, b, out=out)
        best = max(best, 2 * size**3 / (_now(device) - start))
    return best


def table(figures: dict[str, dict], title: str) -> Table:
    """One row a workload; narrow enough for 80 columns."""
    out = Table(title=f"Thousand env steps/s ({title})", padding=(0, 0))
    columns = ("", "arms", "pulls", "trials", "units", "collect", "adv.", "update", "total", "GFLOP/s", "peak")
    for column in columns:
        out.add_column(column, justify="right", no_wrap=True)
    for name, row in figures.items():
        speeds = [row[f"{phase}_steps_per_second"] / 1e3 for phase in ("collect", "advantage", "update", "total")]
        phases = [f"{speed:,.1f}" if speed < 100 else f"{speed:,.0f}" for speed in speeds]
        sizes = [f"{row[size]:,}" for size in ("arms", "pulls", "trials", "units")]
        out.add_row(name, *sizes, *phases, f"{row['gflops']:.1f}", f"{row['fraction_of_peak']:.0%}")
    return out


def scaling_study(base: Workload, repeats: int, peak: float, folder: Path, device: str) -> dict[str, dict]:
    """Steps/s against trials a batch and units, as a table and ``scaling.png`` in ``folder``."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    rows: dict[str, dict] = {}
    for axes, (what, values) in zip(figure.subplots(1, 2), SCALING, strict=True):
        points = []
        for value in values:
            changed = replace(base, **{what: value})
            changed = replace(changed, minibatches=min(base.minibatches, changed.trials))
            points.append(measure(changed, repeats, peak, device))
            rows[f"{what} {value}"] = points[-1]
        for phase in ("collect", "update", "total"):
            axes.loglog(values, [p[f"{phase}_steps_per_second"] for p in points], marker="o", label=phase)
        for value, point in zip(values, points, strict=True):
            axes.annotate(
                f"{point['fraction_of_peak']:.0%}",
                (value, point["total_steps_per_second"]),
                (0, -14),
                textcoords="offset points",
                ha="center",
            )
        axes.set(xlabel=what, ylabel="env steps/s", title=f"{what} (labels: share of the matrix-product peak)")
        axes.set_xticks(values, [str(v) for v in values])
        axes.minorticks_off()
        axes.margins(y=0.12)  # room for the labels
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    figure.savefig(folder / "scaling.png", dpi=130)
    Console().print(table(rows, f"{base.arms} arms, {base.pulls} pulls"))
    return rows


if __name__ == "__main__":
    cli(main)
