"""What a run survives: what was done to it, what the user is told, and what was kept.

A row of a table is one fault. `DAMAGE`, to the newest checkpoint: the run goes on from the one before, as if it had never stopped.
`REFUSED`, to a run that is resumed: an error, and not a byte of the folder has changed. `RAISED`, by what a training calls: the
error reaches the user, and a checkpoint is left. Signals, disks, folders and planted code follow.

Elsewhere: compilers, caches and damaged libraries in `test_kernel_library`, memory that is not to be had in `test_kernels`, workers
that die in `test_workers`, threads and forks in `test_threads`, agents' files in `test_agent_files`, arguments in `test_bad_input`.
"""

import csv
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import safetensors.torch
import torch
from runs import BATCH, ROWS, STEPS, Run, saved_steps, without_time
from torchrl.checkpoint import Checkpoint
from torchrl.record.loggers import CSVLogger, TensorboardLogger

from recipes import compare
from rl2_torchrl import AdaptiveAgent, Callback, adaptation_curve, load_weights, train
from rl2_torchrl.agent.files import write_agent
from rl2_torchrl.baselines import gittins
from rl2_torchrl.checkpoints import FORMAT
from rl2_torchrl.envs import BernoulliBandit
from rl2_torchrl.history import History, HistoryFile
from rl2_torchrl.storage import DamagedFileError, load_tree, save_tree

HISTORY = "checkpoint-history.jsonl"


@pytest.fixture(scope="module")
def unbroken():
    """A run of five updates that nothing happens to."""
    run = Run(5)
    run.history = without_time(run.train().history)
    return run


@pytest.fixture
def folder(tmp_path):
    """The folder of a run that was stopped after three updates: checkpoints of the second and the third."""
    folder = tmp_path / "run"
    Run(5).train(checkpoints=folder, checkpoint_interval=1, stop=lambda row: row["env_steps"] >= 3 * BATCH)
    return folder


def checkpoint(folder, update=3):
    return folder / f"checkpoint-{update * BATCH}.safetensors"


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_goes_on_as_unbroken(folder, unbroken):
    resumed = Run(5, elsewhere=True)
    result = resumed.train(checkpoints=folder, resume=True)
    assert without_time(result.history) == unbroken.history
    torch.testing.assert_close(resumed.everything(), unbroken.everything(), rtol=0, atol=0)


# ---- The newest checkpoint is damaged.


def cut_to(share):
    def cut(path):
        os.truncate(path, int(share * path.stat().st_size))

    return cut


def flip(where):
    """One bit, at the share ``where`` of the file or at those bytes in it."""

    def flip_one(path):
        data = bytearray(path.read_bytes())
        at = data.index(where) + 1 if isinstance(where, bytes) else int(where * len(data))
        data[at] ^= 1
        path.write_bytes(data)

    return flip_one


DAMAGE = {
    "empty": cut_to(0),
    "cut in the size": lambda path: os.truncate(path, 5),
    "cut in the header": lambda path: os.truncate(path, 200),
    "half": cut_to(0.5),
    "nearly whole": cut_to(0.999),
    "lengthened with zeros": lambda path: (cut_to(0.5)(path), os.truncate(path, 60_000)),
    "all zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "more at the end": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "bit in a number": flip(b"env_steps"),
    "bit in the digest": flip(b'"sha256":"'),
    "bit in a name": flip(b'"tree"'),
    "bit in the weights": flip(0.75),
    "last bit": lambda path: flip((path.stat().st_size - 1) / path.stat().st_size)(path),
    "text": lambda path: path.write_text("see attachment"),
    "a file of another program": lambda path: safetensors.torch.save_file({"w": torch.ones(2)}, path),
    "a tree that is none": lambda path: path.write_bytes(
        safetensors.torch.save({}, {"tree": "{}", "sha256": "0" * 64})
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_the_newest_good_checkpoint_is_taken(damage, folder, unbroken, caplog):
    damage(checkpoint(folder))
    damaged = checkpoint(folder).read_bytes()
    assert_goes_on_as_unbroken(folder, unbroken)
    assert str(checkpoint(folder)) in caplog.text
    assert f"going on from {checkpoint(folder, 2)}, the newest checkpoint that is whole" in caplog.text
    assert (folder / "damaged-checkpoints" / checkpoint(folder).name).read_bytes() == damaged
    assert saved_steps(folder) == [2 * BATCH, 5 * BATCH]


def test_every_byte_of_a_file_counts(tmp_path):
    path = tmp_path / "tree"
    save_tree({"w": torch.arange(3.0), 3: (True, None, [1.5, "x"])}, path)
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(DamagedFileError):
            load_tree(path)
        path.write_bytes(whole[:at])
        with pytest.raises(DamagedFileError):
            load_tree(path)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, sync, replace = [], os.fsync, Path.replace

    def noted(what, act, status):
        def noting(it, *others):
            done.append((what, status(it).st_ino))
            return act(it, *others)

        return noting

    monkeypatch.setattr(os, "fsync", noted("synced", sync, os.fstat))
    monkeypatch.setattr(Path, "replace", noted("named", replace, Path.stat))
    Run(1).train(checkpoints=tmp_path)
    history, written, folder = (path.stat().st_ino for path in (tmp_path / HISTORY, checkpoint(tmp_path, 1), tmp_path))
    # The history first, since the checkpoint says how long it is; the folder last, which holds the name.
    assert done == [("synced", history), ("synced", written), ("named", written), ("synced", folder)]


HISTORY_DAMAGE = {
    "gone": (lambda path: path.unlink(), 0),
    "cut in a line": (lambda path: os.truncate(path, path.stat().st_size - 9), 2),
    "a line overwritten": (
        lambda path: path.write_bytes(path.read_bytes().replace(b'{"env_steps": 56', b'{"env-steps":!56')),
        2,
    ),
    "something else": (lambda path: path.write_text('[1, 2]\nnull\n{"a": 3}\n'), 0),
}


@pytest.mark.parametrize(("damage", "left"), HISTORY_DAMAGE.values(), ids=HISTORY_DAMAGE)
def test_a_damaged_history_costs_its_own_rows_alone(damage, left, folder, unbroken, caplog):
    damage(folder / HISTORY)
    resumed = Run(5, elsewhere=True)
    result = resumed.train(checkpoints=folder, resume=True)
    assert f"{folder / HISTORY} is damaged: {left} of 3 rows" in caplog.text
    torch.testing.assert_close(resumed.everything(), unbroken.everything(), rtol=0, atol=0)
    steps = [row["env_steps"] / BATCH for row in result.history]
    assert steps == [*{"cut in a line": [1, 2], "a line overwritten": [1, 3]}.get(_id(damage), []), 4, 5]
    # From here on the file is whole again.
    caplog.clear()
    again = Run(5).train(checkpoints=folder, resume=True)
    assert again.history == result.history
    assert "damaged" not in caplog.text


def _id(damage):
    return next(name for name, (own, _) in HISTORY_DAMAGE.items() if own is damage)


# ---- Resumed as it cannot be: an error that says why, and nothing has changed.


def other(**changes):
    return lambda folder: Run(5, **changes)


def after(act):
    def make(folder):
        act(folder)
        return Run(5)

    return make


def all_damaged(folder):
    for path in folder.glob("*.safetensors"):
        os.truncate(path, 300)


def rewritten(**entries):
    """Both checkpoints with other entries, and digests that are right."""

    def rewrite(folder):
        for path in folder.glob("*.safetensors"):
            save_tree({**load_tree(path), **entries}, path)

    return rewrite


def of_torchrl(folder):
    for path in folder.glob("checkpoint-*"):
        path.unlink()
    Checkpoint(update=Run().update).save(folder / "checkpoint-28")


class Slow(BernoulliBandit):
    """Another class, and all else alike."""


REFUSED = {
    "lr": (other(lr=2e-2), r"other settings \(update.lr: 0.01 then, 0.02 now\).*resume_changes=\['update.lr'\]"),
    "episodes of a trial": (other(episodes=6), r"other settings \(env.Trial.episodes: 5 then, 6 now\)"),
    "env": (
        lambda folder: Run(5, env=Slow(3, batch_size=(4,), seed=2)),
        "env.class: .BernoulliBandit. then, .Slow. now",
    ),
    "seed of PyTorch": (other(seed=7), "torch.seed: 0 then, 7 now"),
    "seed of the tasks": (other(task_seed=7), "env.TaskSampler.seed: 1 then, 7 now"),
    "no seed of the tasks": (other(task_seed=None), "env.TaskSampler.seed: 1 then, null now"),
    "seed of the env": (other(env_seed=7), "env.seed: 2 then, 7 now"),
    "clipping of the loss": (other(clip_epsilon=0.25), "loss.clip_epsilon: 0.3.* then, 0.25 now"),
    "discount": (other(gamma=0.5), "advantage.gamma: 0.99 then, 0.5 now"),
    "epochs": (other(epochs=3), "update.epochs: 2 then, 3 now"),
    "minibatches": (other(minibatches=4), "update.minibatches: 2 then, 4 now"),
    "back-propagation": (other(bptt=1), "update.bptt: null then, 1 now"),
    "optimizer": (other(sgd=True), "update.optimizer: .Adam. then, .SGD. now"),
    "schedule": (other(lr_schedule=abs), "update.lr_schedule: null then, .builtins.abs. now"),
    "steps of a batch": (other(steps=14), "collector.frames_per_batch: 28 then, 56 now"),
    "two at once": (
        other(lr=2e-2, epochs=3),
        "update.epochs: 2 then, 3 now; .*resume_changes=.'update.epochs', 'update.lr'.",
    ),
    "units": (
        other(units=5),
        r"other networks \(.*gru.weight_hh_l0: \[12, 4\] then, \[15, 5\] now.*sizes that they had; or start anew",
    ),
    "arms": (other(arms=4), "other networks .*, and with other settings .*env.num_arms: 3 then, 4 now"),
    "rows": (other(rows=3), r"env.state: .*\[4, 3\].* then, .*\[3, 3\].* now"),
    "all checkpoints damaged": (after(all_damaged), "all its 2 checkpoints are damaged.*start anew without resume"),
    "a later version": (
        after(rewritten(format=99, versions={"rl2_torchrl": "9.9"})),
        f"another version of rl2_torchrl, 9.9 with format 99, and this one, .* reads format {FORMAT}",
    ),
    "an earlier version": (after(of_torchrl), "of another version of rl2_torchrl, whose format this one"),
    "a state of something else": (
        after(rewritten(state={"update": 3})),
        "the state of the update does not fit, TypeError",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_a_run_that_cannot_be_resumed(make, message, folder):
    run = make(folder)
    before = contents(folder)
    with pytest.raises(ValueError, match=rf"(?s)cannot resume from .*{message}"):
        run.train(checkpoints=folder, resume=True)
    assert contents(folder) == before


def test_resume_changes_of_no_setting(folder):
    with pytest.raises(
        ValueError, match=r"resume_changes=\['lr'\] are no settings; near are \[[^,]*'update.lr'[^]]{,60}\]"
    ):
        Run(5).train(checkpoints=folder, resume=True, resume_changes=["lr"])
    with pytest.raises(ValueError, match="resume_changes= needs both"):
        Run(5).train(checkpoints=folder, resume_changes=["update.lr"])


def test_a_setting_that_may_change_counts_from_then_on(folder, caplog):
    changes = {"lr": 0.0, "clip_epsilon": 0.25, "epochs": 1}
    run = Run(5, elsewhere=True, **changes)
    parameters = []
    run.train(
        checkpoints=folder,
        resume=True,
        resume_changes=["update.lr", "loss.clip_epsilon", "update.epochs"],
        stop=lambda row: parameters.append([p.clone() for p in run.update.loss.parameters()]),
    )
    before = load_tree(checkpoint(folder, 5))["state"]["update"]
    assert run.update.optimizer.param_groups[0]["lr"] == 0.0
    torch.testing.assert_close(parameters[0], parameters[-1], rtol=0, atol=0)  # a learning rate of 0 learns nothing
    assert float(run.update.loss.clip_epsilon) == float(before["loss"]["clip_epsilon"]) == 0.25
    assert "resuming with a changed setting: update.lr: 0.01 then, 0.0 now" in caplog.text
    # The run has these settings now.
    Run(6, **changes).train(checkpoints=folder, resume=True)


def test_a_changed_env_begins_new_trials_and_says_so(folder, caplog):
    run = Run(5, episodes=6)
    result = run.train(checkpoints=folder, resume=True, resume_changes=["env.Trial.episodes"])
    assert "begins new trials: settings of the env have changed" in caplog.text
    assert result.env_steps == 5 * BATCH


def test_a_learning_rate_that_a_user_has_moved_is_kept(tmp_path):
    run = Run(4)
    run.update.optimizer.param_groups[0]["lr"] = 0.5  # as a callback would
    run.train(checkpoints=tmp_path, stop=lambda row: True)
    resumed = Run(4)
    resumed.train(checkpoints=tmp_path, resume=True)
    assert resumed.update.optimizer.param_groups[0]["lr"] == 0.5


def test_a_longer_training_is_the_same_one(folder):
    assert Run(9).train(checkpoints=folder, resume=True).env_steps == 9 * BATCH


# ---- Something that a training calls raises.


def fails_at(number):
    calls = []

    def fail(*_):
        calls.append(None)
        if len(calls) == number:
            raise ZeroDivisionError("on purpose")
        return {}

    return fail


class FailingLogger(CSVLogger):
    """A full disk, say, in the middle of the third row."""

    def log_scalar(self, name, value, step=None):
        if step == 3 * BATCH and name == "time/seconds":
            raise ZeroDivisionError("on purpose")
        super().log_scalar(name, value, step)


class Failing(Callback):
    """Fails at one of its points."""

    def __init__(self, point):
        setattr(self, point, fails_at(3))


RAISED = {
    "evaluate": lambda folder: {"evaluate": fails_at(3), "eval_interval": 1},
    "evaluate returns no scalars": lambda folder: {
        "evaluate": lambda: {"score": "high"} if saved_steps(folder) == [BATCH, 2 * BATCH] else {},
        "eval_interval": 1,
        "checkpoint_interval": 1,
    },
    "stop": lambda folder: {"stop": lambda row: fails_at(1)() if row["env_steps"] == 3 * BATCH else False},
    "logger": lambda folder: {"logger": FailingLogger("scalars", str(folder.parent / "log"))},
    "callback after an update": lambda folder: {"callbacks": [Failing("after_update")]},
    "callback after an evaluation": lambda folder: {
        "callbacks": [Failing("after_evaluation")],
        "evaluate": dict,
        "eval_interval": 1,
    },
}


@pytest.mark.parametrize("options", RAISED.values(), ids=RAISED)
def test_an_error_after_an_update_leaves_that_update(options, tmp_path, unbroken):
    folder = tmp_path / "run"
    with pytest.raises((ZeroDivisionError, TypeError), match="on purpose|one number"):
        Run(5).train(checkpoints=folder, **options(folder))
    assert saved_steps(folder)[-1] == 3 * BATCH
    assert_goes_on_as_unbroken(folder, unbroken)


def test_an_evaluation_that_returns_tensors_is_taken(tmp_path):
    seen, options = [], {"evaluate": lambda: {"score": torch.tensor([0.5])}, "eval_interval": 1}
    Run(2).train(checkpoints=tmp_path, stop=lambda row: seen.append(row["eval/score"]) or True, **options)
    result = Run(2).train(checkpoints=tmp_path, resume=True, **options)
    seen += [row["eval/score"] for row in result.history]
    assert [(type(score), score) for score in seen] == 3 * [(float, 0.5)]


class Breaks(BernoulliBandit):
    """Raises in the third batch."""

    pulls = 0

    def advance(self, state, action):
        self.pulls += 1
        if self.pulls == 2 * STEPS + 3:
            raise ZeroDivisionError("on purpose")
        return super().advance(state, action)


@pytest.mark.parametrize("lean", [False, True])
def test_an_env_that_fails_leaves_the_last_update(lean, tmp_path, caplog):
    kind = {"lean": lean, "episodes": STEPS if lean else 5}
    run = Run(5, env=Breaks(3, batch_size=(ROWS,), seed=2), **kind)
    learnt = []
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        run.train(
            checkpoints=tmp_path, stop=lambda row: learnt.append([p.clone() for p in run.update.loss.parameters()])
        )
    assert saved_steps(tmp_path) == [2 * BATCH]
    state = load_tree(checkpoint(tmp_path, 2))["state"]["update"]
    parameters = [state["loss"][name] for name, _ in run.update.loss.named_parameters()]
    torch.testing.assert_close(parameters, learnt[-1], rtol=0, atol=0)
    result = Run(5, **kind).train(checkpoints=tmp_path, resume=True, resume_changes=["env.class"])
    assert "begins new trials" in caplog.text
    assert [row["env_steps"] for row in result.history] == [BATCH * number for number in range(1, 6)]


@pytest.mark.parametrize("what", ["evaluate", "callback"])
def test_an_evaluation_on_the_collectors_env_is_an_error_before_the_next_update(what, tmp_path):
    run, folder = Run(5, lean=True), tmp_path / "run"

    def on_the_same_env(*_):
        adaptation_curve(run.collector.env, run.policy, 8)
        return {}

    after_update = type("Mine", (Callback,), {"after_update": on_the_same_env})()
    options = {"evaluate": on_the_same_env} if what == "evaluate" else {"callbacks": [after_update]}
    with pytest.raises(
        RuntimeError, match=r"env has been reset or stepped since.*Evaluate on an env of its own"
    ) as error:
        run.train(checkpoints=folder, **options)
    assert error.value.__notes__ == [f"in the rollout of update 1, after {BATCH} env steps"]
    assert saved_steps(folder) == [BATCH]


def test_an_error_in_an_update_saves_nothing(tmp_path, monkeypatch):
    run = Run(5)
    fail = fails_at(2 * 2 * 2 + 2)  # two epochs of two minibatches: in the middle of the third update
    step = run.update.optimizer.step
    monkeypatch.setattr(run.update.optimizer, "step", lambda: fail() or step())
    with pytest.raises(ZeroDivisionError):
        run.train(checkpoints=tmp_path)
    assert saved_steps(tmp_path) == []


def test_a_good_checkpoint_is_never_replaced_by_a_poorer_one(tmp_path, unbroken):
    run = Run(5, env=Breaks(3, batch_size=(ROWS,), seed=2))
    with pytest.raises(ZeroDivisionError):
        run.train(checkpoints=tmp_path, checkpoint_interval=1)
    # That of the second update stands where the env did.
    assert "missing" not in load_tree(checkpoint(tmp_path, 2))["state"]["rollout"]


class Opaque(Callback):
    """Has a state that cannot be saved."""

    def state_dict(self):
        return {"best": {"score": object()}}


def test_a_state_that_cannot_be_saved_is_found_at_the_start(tmp_path):
    run = Run(5)
    with pytest.raises(TypeError, match=r"callbacks\.0\.best\.score is a object, which cannot be saved") as kept:
        run.train(checkpoints=tmp_path, callbacks=[Opaque()])
    with pytest.raises(TypeError, match="the update has no state_dict"):
        train(run.collector, lambda batch, progress: {}, evaluate=None, checkpoints=tmp_path)
    assert kept.traceback  # as a notebook keeps it: the folder is free again all the same
    assert run.collector._frames == 0


# ---- Signals.


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_program_that_is_asked_to_end_is_saved(name, tmp_path, unbroken, caplog):
    signum = getattr(signal, name)
    before = signal.signal(signum, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as ended:
            Run(5).train(
                checkpoints=tmp_path,
                stop=lambda row: row["env_steps"] == 3 * BATCH and signal.raise_signal(signum),
            )
    finally:
        signal.signal(signum, before)
    assert ended.value.code == 128 + signum
    assert f"{name}: finishing this update and saving" in caplog.text
    assert saved_steps(tmp_path) == [3 * BATCH]
    assert_goes_on_as_unbroken(tmp_path, unbroken)


def test_what_a_program_does_at_a_signal_it_still_does(tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(saved_steps(tmp_path)))
    try:
        result = Run(5).train(checkpoints=tmp_path, stop=lambda row: signal.raise_signal(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.interrupted
    assert seen == [[BATCH]]


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        result = Run(5).train(stop=lambda row: signal.raise_signal(signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (result.env_steps, result.interrupted) == (5 * BATCH, False)


# ---- Programs: killed, on a full disk, two in one folder.


def program(text, *arguments, **options):
    """A Python program over `Run`, started."""
    text = "import logging; logging.basicConfig()\nfrom runs import *\n" + textwrap.dedent(text)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, "-c", text, *map(str, arguments)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes, **options)


def wait_for(process):
    """Until the program says "now"; TorchRL's loggers write to the same place."""
    assert "now\n" in iter(process.stdout.readline, "")


KILLED = """
    import sys
    from torchrl.record.loggers import CSVLogger
    folder, first = sys.argv[1], not sys.argv[2:]
    def told(row):
        if first and row["env_steps"] >= 3 * BATCH:  # after a checkpoint, and a row that follows it
            print("now", flush=True)
            input()
    logger = CSVLogger("scalars", folder)
    Run(5).train(checkpoints=folder + "/run", checkpoint_interval=2, resume=not first, stop=told, logger=logger)
"""


def test_scalars_after_a_kill_hold_each_step_once(tmp_path, unbroken):
    killed = program(KILLED, tmp_path)
    wait_for(killed)
    killed.kill()
    killed.wait()
    scalars = tmp_path / "scalars" / "scalars" / "train"
    with (scalars / "loss.csv").open("a") as file:
        file.write("84,0.25\n112,0.")  # rows of steps that were lost, the last one cut
    resumed = program(KILLED, tmp_path, "resume")
    assert resumed.wait() == 0, resumed.stderr.read()
    for name in ("loss", "trial_return"):
        assert csv_rows(scalars / f"{name}.csv") == [
            (row["env_steps"], row[f"train/{name}"]) for row in unbroken.history
        ]


def csv_rows(path):
    return [(float(step), float(value)) for step, value in csv.reader(path.open())]


@pytest.mark.parametrize("has_earlier_run", [False, True])
def test_scalars_after_a_kill_before_the_first_checkpoint_hold_each_step_once(has_earlier_run, tmp_path, unbroken):
    log = tmp_path / "scalars"
    options = {"checkpoints": tmp_path / "run", "checkpoint_interval": 10}
    if has_earlier_run:  # which is not to be gone on with
        Run(2).train(logger=CSVLogger("scalars", tmp_path), **options)
    with pytest.raises(KeyboardInterrupt):  # which is not caught, as a kill
        Run(5).train(logger=CSVLogger("scalars", tmp_path), callbacks=[Interrupts()], **options)
    logged = (log / "scalars/train/loss.csv").read_bytes()
    Run(5).train(logger=CSVLogger("scalars", tmp_path), callbacks=[Callback()], resume=True, **options)
    rows = csv_rows(log / "scalars/train/loss.csv")
    assert rows == [(row["env_steps"], row["train/loss"]) for row in unbroken.history]
    assert (log / "earlier-scalars/train/loss.csv").read_bytes() == logged


def test_a_new_run_does_not_go_on_with_the_scalars_of_the_last_one(tmp_path, caplog):
    for updates in (5, 2):
        result = Run(updates).train(logger=CSVLogger("scalars", tmp_path))
        rows = csv_rows(tmp_path / "scalars" / "scalars/train/loss.csv")
        assert rows == [(row["env_steps"], row["train/loss"]) for row in result.history]
    assert len(csv_rows(tmp_path / "scalars" / "earlier-scalars/train/loss.csv")) == 5
    assert "held the scalars of an earlier run: moved to earlier-scalars" in caplog.text


class Fails(Callback):
    """Raises before the first update."""

    def after_batch(self, batch, progress):
        raise BlockingIOError("before the first update")


@pytest.mark.parametrize("resume", [False, True])
def test_a_training_that_fails_before_its_first_update_leaves_the_earlier_run_as_it_was(resume, tmp_path, unbroken):
    def files():
        return {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.suffix in (".csv", ".safetensors")}

    folders = {"checkpoints": tmp_path / "run", "checkpoint_interval": 1}
    for updates in (1, 2):  # and the one before it
        Run(updates).train(logger=CSVLogger("scalars", tmp_path), callbacks=[Callback()], **folders)
    before = files()
    with pytest.raises(BlockingIOError, match="before the first update"):
        Run(5).train(logger=CSVLogger("scalars", tmp_path), callbacks=[Fails()], resume=resume, **folders)
    assert files() == before
    result = Run(5).train(logger=CSVLogger("scalars", tmp_path), callbacks=[Callback()], resume=True, **folders)
    assert [row["train/loss"] for row in result.history] == [row["train/loss"] for row in unbroken.history]


def test_what_the_users_logger_has_written_before_a_run_stays(tmp_path):
    logger = CSVLogger("scalars", tmp_path)
    logger.log_scalar("train/loss", 7.0, step=0)
    Run(1).train(logger=logger)
    assert csv_rows(tmp_path / "scalars" / "scalars/train/loss.csv")[0] == (0.0, 7.0)
    assert not (tmp_path / "scalars" / "earlier-scalars").exists()


@pytest.mark.parametrize("logger", [CSVLogger, TensorboardLogger])
@pytest.mark.parametrize("what", ["mistyped", "removed"])
def test_a_log_whose_run_has_checkpoints_elsewhere_is_not_begun_anew(what, logger, folder, tmp_path):
    given = tmp_path / "rnu" if what == "mistyped" else folder
    Run(5).train(logger=logger("log", tmp_path), checkpoints=folder, resume=True)
    if what == "removed":
        shutil.rmtree(folder)
    before = contents(tmp_path / "log")
    words = (
        rf"checkpoints='{given}' holds no checkpoint, .*'{tmp_path / 'log'}' holds the scalars .* saved to '{folder}'"
    )
    for _ in range(2):
        with pytest.raises(ValueError, match=words):
            Run(5).train(logger=logger("log", tmp_path), checkpoints=given, resume=True)
    assert before.items() <= contents(tmp_path / "log").items()  # TensorBoard's files are begun when the logger is made


def test_a_log_that_is_open_is_gone_on_with(tmp_path, unbroken):
    logger = CSVLogger("log", tmp_path)
    options = {"checkpoints": tmp_path / "run", "logger": logger}
    Run(5).train(stop=lambda row: row["env_steps"] == 2 * BATCH, **options)
    Run(5).train(resume=True, **options)
    rows = csv_rows(tmp_path / "log/scalars/train/loss.csv")
    assert rows == [(row["env_steps"], row["train/loss"]) for row in unbroken.history]


def test_tensorboard_after_a_kill_holds_each_step_once(tmp_path, unbroken, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.summary.writer import event_file_writer

    # Files of one second are read in the order of their names, which end in a program's count of them: the 10th before the 9th.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    options = {"checkpoints": tmp_path / "run", "checkpoint_interval": 2}
    with pytest.raises(KeyboardInterrupt):  # which is not caught, as a kill
        Run(5).train(
            logger=(logger := TensorboardLogger("scalars", str(tmp_path))),
            callbacks=[Interrupts()],
            **options,
        )
    logger.experiment.close()
    logger = TensorboardLogger("scalars", str(tmp_path))
    Run(5).train(logger=logger, callbacks=[Callback()], resume=True, **options)
    logger.experiment.close()
    events = EventAccumulator(str(tmp_path / "scalars")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [BATCH * number for number in range(1, 6)]


class Interrupts(Callback):
    """Ends the program at the fourth update."""

    def after_batch(self, batch, progress):
        if progress >= 3 / 5:
            raise KeyboardInterrupt


def test_what_a_killed_write_leaves_is_cleared(folder, unbroken):
    ours = checkpoint(folder, 4).name + ".123-456.part"
    theirs = ["thesis.part", "checkpoint-28.safetensors.bak", "model.123.part"]
    for name in (ours, *theirs):
        (folder / name).write_bytes(b"half")
    assert_goes_on_as_unbroken(folder, unbroken)
    assert not (folder / ours).exists()
    assert all((folder / name).exists() for name in theirs)


FULL = """
    import resource, sys
    from torchrl.record.loggers import CSVLogger
    folder, limit, saved = sys.argv[1], int(sys.argv[2]), []
    run = Run(5)
    def full(row):
        size = limit if row["env_steps"] == 3 * BATCH else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return row["env_steps"] == 3 * BATCH and sys.argv[3] == "last"
    run.train(checkpoints=folder, checkpoint_interval=1, stop=full)
"""


@pytest.mark.parametrize("limit", [0, 100, 4000, 20_000])
def test_a_full_disk_costs_one_checkpoint(limit, tmp_path, unbroken):
    # A file may not grow beyond the limit; writes fail as they do on a full disk.
    run = program(FULL, tmp_path, limit, "goes on")
    assert run.wait() == 0
    said = run.stderr.read()
    assert f"no checkpoint could be written at {3 * BATCH} env steps ([Errno 27] File too large" in said
    assert f"the newest one is {checkpoint(tmp_path, 2)}. The training goes on." in said
    assert saved_steps(tmp_path) == [4 * BATCH, 5 * BATCH]
    assert_goes_on_as_unbroken(tmp_path, unbroken)


@pytest.mark.parametrize("limit", [0, 20_000])
def test_a_disk_that_is_full_at_the_end_is_an_error(limit, tmp_path, unbroken):
    run = program(FULL, tmp_path, limit, "last")
    assert run.wait() == 1
    assert f"OSError: no checkpoint could be written at {3 * BATCH} env steps" in run.stderr.read()
    assert saved_steps(tmp_path) == [BATCH, 2 * BATCH]
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []
    assert_goes_on_as_unbroken(tmp_path, unbroken)


HOLDS = """
    import sys
    Run(5).train(checkpoints=sys.argv[1], checkpoint_interval=1, stop=lambda row: print("now", flush=True) or input())
"""


def test_two_runs_in_one_folder(tmp_path):
    holds = program(HOLDS, tmp_path)
    try:
        wait_for(holds)
        before = contents(tmp_path)
        for options in ({}, {"resume": True}):
            with pytest.raises(
                OSError, match=r"is in use by another training .*Give each its own, such as one for each seed"
            ):
                Run(5).train(checkpoints=tmp_path, **options)
        assert contents(tmp_path) == before
    finally:
        holds.kill()
        holds.wait()
    Run(5).train(checkpoints=tmp_path, resume=True)  # a lock ends with its program


def test_two_runs_of_one_process_in_one_folder(tmp_path):
    def inner(row):
        with pytest.raises(OSError, match="held by another training of this process"):
            Run(5).train(checkpoints=tmp_path)
        return True

    Run(5).train(checkpoints=tmp_path, stop=inner)
    Run(5).train(checkpoints=tmp_path)


def test_a_killed_run_is_not_held_by_its_envs_processes(tmp_path):
    forks = """
        import os, sys, time
        def fork(row):
            if os.fork() == 0:
                sys.stdout.close(); sys.stderr.close(); os.close(1); os.close(2)
                time.sleep(30)
                os._exit(0)
            print("now", flush=True)
            input()
        Run(5).train(checkpoints=sys.argv[1], stop=fork)
    """
    run = program(forks, tmp_path, start_new_session=True)
    try:
        wait_for(run)
        run.kill()
        run.wait()
        Run(5).train(checkpoints=tmp_path)
    finally:
        os.killpg(run.pid, signal.SIGKILL)


def test_the_current_folder_may_hold_other_things(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mine = {
        "thesis.tex": "text",
        "history.jsonl": "mine",
        "checkpoint-3": "mine",
        "checkpoint-best.safetensors": "mine",
    }
    for name, text in mine.items():
        Path(name).write_text(text)
    for _ in range(3):
        Run(2).train(checkpoints=".")
    Run(3).train(checkpoints=".", resume=True)
    assert {name: Path(name).read_text() for name in mine} == mine


# ---- Nothing that lies in a file is run.


class Harmful:
    """An object that runs code where a pickle is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def evil(tmp_path):
    """An object that leaves a trace where it is read from a pickle, and what looks for the trace."""
    trace = tmp_path / "code was run"
    pickle.loads(pickle.dumps(Harmful(trace)))
    assert trace.exists()
    trace.unlink()
    yield Harmful(trace)
    assert not trace.exists()


def planted_beside(folder, evil):
    for name in ("state.pickle", "other.pickle", "meta.pkl", "checkpoint-84.pickle"):
        (folder / name).write_bytes(pickle.dumps(evil))


def planted_as_checkpoint(folder, evil):
    checkpoint(folder).write_bytes(pickle.dumps(evil))


def planted_by_torch(folder, evil):
    torch.save({"state": evil}, checkpoint(folder))


def planted_as_folder(folder, evil):
    """As TorchRL's checkpoints and TensorDict's memory-mapped folders have it."""
    for sub in ("checkpoint-999", "checkpoint-999/state"):
        (folder / sub).mkdir()
        (folder / sub / "other.pickle").write_bytes(pickle.dumps(evil))
        (folder / sub / "meta.json").write_text('{"_type": "<class \'dict\'>", "shape": [], "device": "cpu"}')


def planted_as_history(folder, evil):
    (folder / HISTORY).write_bytes(pickle.dumps(evil))


PLANTED = [planted_beside, planted_as_checkpoint, planted_by_torch, planted_as_folder, planted_as_history]


@pytest.mark.parametrize("plant", PLANTED)
def test_code_planted_in_a_checkpoint_folder_is_not_run(plant, folder, evil):
    plant(folder, evil)
    assert Run(5).train(checkpoints=folder, resume=True).env_steps == 5 * BATCH


def by_pickle(evil, path):
    path.write_bytes(pickle.dumps(evil))


def by_torch(evil, path):
    torch.save({"w": evil}, path)


def loads_weights(path):
    load_weights(torch.nn.Linear(2, 3), path)


def loads_history(path):
    history, _ = HistoryFile(path).read({"size": path.stat().st_size, "sha256": "", "rows": 1})
    assert len(history) == 0
    raise ValueError("none of it could be read")


def loads_report(path):
    path.rename(path.with_name("report.json"))
    compare.history(path.parent)


def loads_agent(suffix):
    return lambda path: AdaptiveAgent.load(path.rename(path.with_suffix(suffix)))


LOADERS = {
    "checkpoint": load_tree,
    "history": loads_history,
    "weights": loads_weights,
    "agent": loads_agent(".safetensors"),
    "exported agent": loads_agent(".pt2"),
    "ONNX agent": loads_agent(".onnx"),
    "report": loads_report,
}


@pytest.mark.parametrize("plant", [by_pickle, by_torch])
@pytest.mark.parametrize("loader", LOADERS)
def test_code_planted_in_a_file_is_not_run(loader, plant, tmp_path, evil):
    if loader == "ONNX agent":
        pytest.importorskip("onnxruntime")
    plant(evil, tmp_path / "file")
    with pytest.raises(ValueError, match=r"file|none of it|codec"):
        LOADERS[loader](tmp_path / "file")


@pytest.mark.parametrize("plant", [by_pickle, by_torch, lambda evil, path: os.truncate(path, 100)])
def test_a_table_in_the_cache_that_cannot_be_trusted_is_made_anew(plant, tmp_path, evil, monkeypatch):
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(gittins, "cache_folder", lambda: tmp_path / "cache")
    gittins._stored_table.cache_clear()
    table = gittins._stored_table(3, 0.9)
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    plant(evil, path)
    gittins._stored_table.cache_clear()
    torch.testing.assert_close(gittins._stored_table(3, 0.9), table, equal_nan=True)
    gittins._stored_table.cache_clear()
    assert len(path.read_bytes()) == len(whole)


def test_no_module_reads_pickles():
    package = Path(sys.modules["rl2_torchrl"].__file__).parent
    for file in package.rglob("*.py"):
        text = file.read_text()
        for reader in (
            "pickle.load",
            "tensordict.load",
            "TensorDict.load",
            "load_memmap",
            "Checkpoint(",
            "np.load",
            "marshal",
        ):
            assert reader not in text, file
        assert len(re.findall(r"(?<!safetensors\.)torch\.load\(", text)) == text.count("weights_only=True)"), file


# ---- The history.


def test_a_checkpoint_does_not_grow_with_the_run(tmp_path):
    sizes = []
    Run(60, lean=True, episodes=STEPS).train(
        checkpoints=tmp_path,
        checkpoint_interval=1,
        stop=lambda row: [sizes.append(path.stat().st_size) for path in tmp_path.glob("*.safetensors")] and False,
    )
    assert max(sizes) - min(sizes[2:]) < 200  # digits
    rows = [json.loads(line) for line in (tmp_path / HISTORY).read_text().splitlines()]
    assert [row["env_steps"] for row in rows] == [BATCH * number for number in range(1, 61)]


def test_a_history_is_appended_to(tmp_path):
    file, history = HistoryFile(tmp_path / "history"), History()
    marks, contents = [], []
    for number in range(4):
        history.append({"env_steps": float(number), "loss": number / 3})
        marks.append(file.write(history))
        contents.append(file.path.read_bytes())
    assert all(later.startswith(sooner) for sooner, later in zip(contents, contents[1:], strict=False))
    again, damage = HistoryFile(file.path).read(marks[1])
    assert damage is None
    assert again == history[:2]
    assert file.path.read_bytes() == contents[1]  # what came later belongs to no checkpoint


def test_what_is_added_to_a_row_that_was_written(tmp_path):
    file, history = HistoryFile(tmp_path / "history"), History([{"env_steps": 1.0, "loss": 0.5}])
    file.write(history)
    history.append({"env_steps": 1.0, "score": float("nan")})
    history.append({"env_steps": 2.0, "loss": 0.25})
    rows, damage = HistoryFile(file.path).read(file.write(history))
    assert damage is None
    assert [list(row) for row in rows] == [["env_steps", "loss", "score"], ["env_steps", "loss"]]


def test_agents_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = write_agent(tmp_path / "agent.safetensors", {}, torch.nn.Linear(2, 3).state_dict())
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_agent(path, {}, torch.nn.Linear(2, 3).state_dict())
    assert contents(tmp_path) == {Path("agent.safetensors"): before}


# ---- Envs in processes of their own.

WORKERS = """
    import os, signal, sys, threading
    from torchrl.data import Unbounded
    from torchrl.envs import ParallelEnv
    from rl2_torchrl import GRUGaussianActor
    from rl2_torchrl.envs import GymTaskEnv

    class Parallel(Run):
        def __init__(self):
            make = lambda: GymTaskEnv("Pendulum-v1", set_task=lambda env, task: None, task_spec=Unbounded((1,)))
            sampler = TaskSampler(lambda size, generator: torch.rand(*size, 1, generator=generator), seed=1)
            parts = Compose(Trial(steps=STEPS), sampler, PreviousStep())
            env = TransformedEnv(ParallelEnv(2, make, mp_start_method="fork"), parts)
            self.update = self.networks(env, GRUGaussianActor, 4, minibatches=1)
            sizes = {"frames_per_batch": 2 * STEPS, "total_frames": 10_000 * STEPS}
            self.collector = Collector(env, self.policy, auto_register_policy_transforms=True, **sizes)

    def stop(row):
        if row["env_steps"] == 2 * STEPS * 3 and sys.argv[2] == "ctrl-c":  # as a terminal does: to every process, in a rollout
            threading.Timer(0.05, os.killpg, (0, signal.SIGINT)).start()
        return row["env_steps"] == 2 * STEPS * 3 and sys.argv[2] == "stop"

    signal.signal(signal.SIGINT, signal.default_int_handler)
    result = Parallel().train(checkpoints=sys.argv[1], stop=stop, check=False)
    print("returned", result.env_steps, result.interrupted, flush=True)
"""


@pytest.mark.parametrize("how", ["stop", "ctrl-c"])
def test_a_training_with_workers_is_saved_and_its_program_ends(how, tmp_path):
    run = program(WORKERS, tmp_path, how, start_new_session=True)
    try:
        said, errors = run.communicate(timeout=300)  # or it would not end
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    (line,) = [line for line in said.splitlines() if line.startswith("returned")]
    _, env_steps, interrupted = line.split()
    assert interrupted == str(how == "ctrl-c"), errors
    assert saved_steps(tmp_path) == [int(env_steps)]
