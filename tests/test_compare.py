"""`recipes.compare` and `recipes.seeds`: curves of several runs by hand, and programs side by side."""

import io
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from rich.console import Console

from recipes import bandit, compare
from recipes.command import command
from recipes.compare import curve, seeds, table
from recipes.run import Run
from recipes.seeds import run_seeds, without_seeds


def write_run(folder, rows, mean=0.0):
    """A run's folder with ``rows`` of env steps, seconds and a held-out return, None where there was no evaluation."""
    history = [
        {"env_steps": steps, "time/seconds": seconds} | ({} if value is None else {"eval/trial_return": value})
        for steps, seconds, value in rows
    ]
    folder.mkdir(parents=True)
    (folder / "report.json").write_text(json.dumps({"train": {"history": history}, "agent": {"mean": mean}}))
    return folder


@pytest.fixture
def two(tmp_path):
    """Two seeds of a run: one evaluated at 1, 2 and 3 million steps, the other at 2 and 4, from 1 on."""
    write_run(tmp_path / "a" / "seed0", [(1e6, 60, 1.0), (2e6, 120, 2.0), (3e6, 180, 4.0)], mean=5.0)
    write_run(tmp_path / "a" / "seed1", [(1e6, 30, 3.0), (1.5e6, 45, None), (2e6, 60, 4.0), (4e6, 120, 6.0)], mean=7.0)
    return tmp_path / "a"


def test_the_mean_of_two_seeds_as_far_as_both_go(two):
    both = curve(two, "steps", "eval/trial_return")
    assert both.runs == 2
    assert both.x.tolist() == [1, 2, 3]
    assert both.mean.tolist() == [2, 3, 4.5]  # the second is half-way between 4 and 6 at 3 million
    # Of two values that differ by d: standard deviation d / sqrt(2), standard error d / 2.
    assert both.se.tolist() == pytest.approx([1, 1, 0.5])
    assert both.reported == [5, 7]


def test_by_minutes(two):
    both = curve(two, "minutes", "eval/trial_return")
    assert both.x.tolist() == [0.5, 1, 2]
    assert both.mean.tolist() == [2, 2.5, 4]  # before its first evaluation a run is where that found it


def test_a_single_run_has_no_band(two):
    one = curve(two / "seed0", "steps", "eval/trial_return")
    assert (one.runs, one.mean.tolist()) == (1, [1, 2, 4])
    assert all(map(math.isnan, one.se))
    both = curve(two, "steps", "eval/trial_return")
    labels = [compare.draw([each], "steps", "x").axes[0].get_ylabel() for each in (one, both)]
    assert labels == ["x", "x (bands: 2 SE)"]


def test_a_run_that_is_not_over(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    rows = [{"env_steps": 1e6, "x": 1.0}, {"env_steps": 2e6, "x": 2.0}, {"env_steps": 2e6, "x": 2.0, "later": 3.0}]
    (tmp_path / "checkpoints" / "checkpoint-history.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert curve(tmp_path, "steps", "x").mean.tolist() == [1, 2]
    assert curve(tmp_path, "steps", "later").x.tolist() == [2]
    assert curve(tmp_path, "steps", "x").reported == []
    with (tmp_path / "checkpoints" / "checkpoint-history.jsonl").open("a") as file:
        file.write(json.dumps({"env_steps": 3e6, "x": math.nan}) + "\n")  # as where no trial has ended
        file.write('{"env_steps": 4e6, "x')  # which is being written
    assert curve(tmp_path, "steps", "x").mean.tolist() == [1, 2]


def test_figures_and_plot(two, tmp_path):
    other = write_run(tmp_path / "b", [(1e6, 60, 0.0), (2e6, 120, 1.0)])
    curves = compare.main((two, other), plot=tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    console = Console(file=io.StringIO(), width=200)
    console.print(table(curves, "steps", "eval/trial_return"))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in console.file.getvalue().splitlines()]
    # The last column is of the reports: 5 and 7.
    assert ["a", "2", "3", "4.500 ± 0.500", "3.000 ± 1.000", "6.000 ± 1.000"] in rows
    assert ["b", "1", "2", "1.000", "1.000", "0.000"] in rows


def test_a_run_may_have_brackets_in_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    compare.main((write_run(Path("gru[v2]"), [(1e6, 60, 0.0)]),), plot=Path("gru[v2]", "plot.png"))
    assert capsys.readouterr().out.count("gru[v2]") == 2


def test_what_was_reached_later_is_not_shown_for_earlier(tmp_path):
    write_run(tmp_path / "fast", [(1e6, 60, 1.0), (2e6, 120, 2.0)])
    write_run(tmp_path / "slow", [(1e6, 600, 5.0), (2e6, 1200, 9.0)])
    curves = compare.main((tmp_path / "fast", tmp_path / "slow"), by="minutes", plot=tmp_path / "plot.png")
    shown = [list(column.cells) for column in table(curves, "minutes", "eval/trial_return").columns]
    assert shown[4] == ["2.000", "-"]


def test_runs_that_learn_different_things_have_no_mean(tmp_path, monkeypatch):
    for name in ("bandit", "pendulum"):
        path = write_run(tmp_path / "runs" / name, [(1e6, 60, 1.0)]) / "report.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "title": f"RL² on {name}"}))
    with pytest.raises(
        ValueError, match=r"no mean.*: bandit \(RL² on bandit\), pendulum \(RL² on pendulum\). Name each"
    ):
        curve(tmp_path / "runs", "steps", "eval/trial_return")
    monkeypatch.chdir(tmp_path / "runs" / "bandit")
    assert curve(Path(), "steps", "eval/trial_return").name == "bandit"


def test_a_run_that_holds_others_is_not_shown_for_them(two):
    write_run(two / "earlier", [(1e6, 60, 9.0)], mean=9.0)
    assert seeds(two / "seed0") == [two / "seed0"]
    one = write_run(two / "seed0" / "earlier", [(1e6, 60, 9.0)], mean=9.0).parent
    assert seeds(one) == [one]
    shutil.copy(one / "report.json", two)
    with pytest.raises(ValueError, match=r"is a run, and holds others \(seed0, seed1\): .*--log-dir of their own"):
        seeds(two)


def test_what_cannot_be_compared(two, tmp_path):
    with pytest.raises(ValueError, match="nothing to compare: name folders"):
        compare.main(())
    with pytest.raises(ValueError, match=r"holds no run: .*report.json or a checkpoints/"):
        seeds(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"seed0 has no 'eval/x': --scalar may be one of \['eval/trial_return'"):
        curve(two, "steps", "eval/x")


# ---- Several seeds.

STUB = """
import json, os, pathlib, sys
folder, seed = pathlib.Path(sys.argv[-2]), int(sys.argv[sys.argv.index("--seed") + 1])
print("words", *sys.argv[1:], "threads", os.environ["OMP_NUM_THREADS"])
if seed == 7:
    sys.exit("a fault")
history = [{"env_steps": 1e6, "time/seconds": 60, "eval/trial_return": float(seed)}]
(folder / "report.json").write_text(json.dumps({"train": {"history": history}, "agent": {"mean": seed}}))
"""


@pytest.fixture(params=["module", "file"])
def stub(request, tmp_path, monkeypatch):
    """A module in place of a recipe, or a file of one's own."""
    (tmp_path / "stub_recipe.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    return ["-m", "stub_recipe"] if request.param == "module" else [str(tmp_path / "stub_recipe.py")]


def test_each_seed_is_a_program_on_one_thread(stub, tmp_path, capsys):
    run_seeds(stub, (3, 0, 1), tmp_path / "runs", ["--lr", "0.1", "--seeds", "3", "0", "1", "--units", "8"])
    for seed in (0, 1, 3):
        folder = tmp_path / "runs" / f"seed{seed}"
        words = f"--lr 0.1 --units 8 --seed {seed} --log-dir {folder} --no-progress"
        command = " ".join(["python", *stub, words])
        assert (folder / "output.txt").read_text() == f"{command}\nwords {words} threads 1\n"
    assert (
        "1.333 ± 0.882" in capsys.readouterr().out
    )  # of 0, 1 and 3: standard deviation 1.53, divided by the root of 3
    assert (tmp_path / "runs" / "compare.png").exists()


def test_seeds_are_compared_alone_and_what_they_had_said_stays(stub, tmp_path, capsys):
    write_run(tmp_path / "runs", [(1e6, 60, 100.0)])  # a run in the folder itself
    for _ in range(2):
        run_seeds(stub, (2, 4), tmp_path / "runs", [])
    assert "3.000 ± 1.000" in capsys.readouterr().out
    assert (tmp_path / "runs" / "seed2" / "output.txt").read_text().count("words --seed 2") == 2


def test_a_seed_that_fails_leaves_the_others_alone(stub, tmp_path):
    with pytest.raises(
        SystemExit, match=r"1 of 3 seeds have not come to their end:\n.*seed7/output.txt: a fault"
    ) as ended:
        run_seeds(stub, (0, 7, 1), tmp_path / "runs", [])
    assert ended.value.code != 0
    assert "a fault" in (tmp_path / "runs" / "seed7" / "output.txt").read_text()
    assert [(tmp_path / "runs" / f"seed{seed}" / "report.json").exists() for seed in (0, 1)] == [True, True]


@pytest.mark.parametrize(
    ("spec", "program"), [(ModuleSpec("recipes.bandit", None), ["-m", "recipes.bandit"]), (None, ["own/mine.py"])]
)
def test_seeds_of_a_command(spec, program, monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr("recipes.command.run_seeds", lambda *args: called.append(args))
    words = ["--arms", "3", "--seeds", "0", "2", "--log-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["own/mine.py", *words])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    command(bandit.main)
    assert called == [(program, (0, 2), tmp_path, words)]


SLOW = """
import pathlib, signal, sys, time
def save(signum, frame):
    (pathlib.Path(sys.argv[-2]) / "saved").write_text(signal.Signals(signum).name)
    sys.exit(128 + signum)
for name in ("SIGINT", "SIGTERM", "SIGHUP"):
    signal.signal(getattr(signal, name), save)
print("begun", flush=True)
time.sleep(60)
"""


def run_slow_seeds(folder):
    """Two seeds of ``folder/slow.py``, one at a time, in a process that has a session of its own, as those of a terminal have."""
    os.setsid()
    sys.stderr = (folder / "errors.txt").open("w", buffering=1)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # which the tests may have been started to ignore, as nohup has it
        signal.signal(getattr(signal, name), signal.SIG_DFL if name != "SIGINT" else signal.default_int_handler)
    os.sched_getaffinity = lambda pid: {0}
    run_seeds([str(folder / "slow.py")], (0, 1), folder, [])


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_ends_the_seeds_and_begins_no_other(name, status, tmp_path):
    (tmp_path / "slow.py").write_text(SLOW)
    seeds = multiprocessing.get_context("fork").Process(target=run_slow_seeds, args=(tmp_path,))
    seeds.start()
    try:
        said = tmp_path / "seed0" / "output.txt"
        while seeds.is_alive() and not (said.is_file() and "begun" in said.read_text()):
            time.sleep(0.1)
        send = os.killpg if name == "SIGINT" else os.kill  # Ctrl-C goes to all programs of a terminal
        send(seeds.pid, getattr(signal, name))
        seeds.join(50)
    finally:
        seeds.kill()
        with suppress(ProcessLookupError):
            os.killpg(seeds.pid, signal.SIGKILL)
    errors = (tmp_path / "errors.txt").read_text()
    assert seeds.exitcode == status, errors
    assert (tmp_path / "seed0" / "saved").read_text() == name
    assert "2 of 2 seeds have not come to their end:" in errors
    assert "seed0/output.txt: begun" in errors
    assert "seed1/output.txt: not begun" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "seed1" / "saved").exists()


def test_seeds_are_left_out_wherever_they_stand():
    assert without_seeds(["--seeds", "0", "1"]) == []
    assert without_seeds(["--seeds=0", "--arms=3"]) == ["--arms=3"]  # kept, each program would start itself once more
    assert without_seeds(["--a", "1", "--seeds", "0", "1", "--seed", "2"]) == ["--a", "1", "--seed", "2"]


def test_seeds_that_make_no_sense(tmp_path):
    with pytest.raises(ValueError, match="each seed once"):
        run_seeds(["-m", "stub"], (1, 1), tmp_path, [])
    with pytest.raises(ValueError, match=r"seeds=\(0, 1\): one call is one run"):
        bandit.main(run=Run(tmp_path, seeds=(0, 1)))


def test_a_run_that_goes_on_is_shown_as_far_as_it_is(tmp_path):
    run = write_run(tmp_path / "run", [(1e6, 60, 1.0)], mean=5.0)
    (run / "checkpoints").mkdir()
    rows = [{"env_steps": steps, "time/seconds": 60.0, "eval/trial_return": 2.0} for steps in (1e6, 2e6)]
    (run / "checkpoints" / "checkpoint-history.jsonl").write_text("\n".join(map(json.dumps, rows)))
    shown = curve(run, "steps", "eval/trial_return")
    assert (shown.x.tolist(), shown.reported) == ([1.0, 2.0], [])


def test_a_run_resumed_past_an_evaluation_has_ended_all_the_same(tmp_path):
    run = write_run(tmp_path / "run", [(1e6, 60, 2.0)], mean=5.0)
    (run / "checkpoints").mkdir()
    row = {"env_steps": 1e6, "time/seconds": 60.0}  # and once more with the evaluation: one row
    lines = [json.dumps(each) + "\n" for each in (row, {**row, "eval/trial_return": 2.0})]
    (run / "checkpoints" / "checkpoint-history.jsonl").write_text("".join(lines))
    assert curve(run, "steps", "eval/trial_return").reported == [5.0]
