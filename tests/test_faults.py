"""What a run survives: what was done to its files or raised within it, what the user is told, and what was kept.

A row of a table is one fault. `DAMAGE`, to the newest checkpoint: the run goes on from the one before, as if it had never stopped.
`REFUSED`, to a run that is resumed: an error, and not a byte of the folder has changed. `RAISED`, by what a training calls: the
error reaches the user, and a checkpoint is left. What lies beside them in the folder, and the history, follow.

Elsewhere: signals, kills and full disks in `test_interruptions`, loggers after them in `test_scalars`, files that would run
code in `test_planted_code`, compilers, caches and damaged libraries in `test_kernel_library`, memory that is not to be had in
`test_kernels`, workers that die in `test_workers`, threads and forks in `test_threads`, agents' files in `test_agent_files`,
arguments in `test_bad_input`.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from runs import BATCH, HISTORY, ROWS, STEPS, Run, assert_goes_on_as_unbroken, checkpoint, contents, saved_steps
from torchrl.record.loggers import CSVLogger

from rl2_torchrl import Callback, adaptation_curve, train
from rl2_torchrl.agent.files import write_agent
from rl2_torchrl.checkpoints import FORMAT
from rl2_torchrl.envs import BernoulliBandit
from rl2_torchrl.history import History, HistoryFile
from rl2_torchrl.seeding import derived_seed
from rl2_torchrl.storage import DamagedFileError, load_tree, save_tree

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


def with_update(update):
    """Both checkpoints with another state of the update."""

    def rewrite(folder):
        for path in folder.glob("*.safetensors"):
            tree = load_tree(path)
            save_tree({**tree, "state": {**tree["state"], "update": update}}, path)

    return rewrite


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
    "no seed of PyTorch": (other(seed=2**40), "torch.seed: 0 then, null now"),
    "seed of the tasks": (other(task_seed=7), "env.TaskSampler.seed: 1 then, 7 now"),
    "no seed of the tasks": (other(task_seed=None), "env.TaskSampler.seed: 1 then, null now"),
    "seed of the env": (other(env_seed=7), "env.seed: 2 then, 7 now"),
    "discount by NumPy": (other(gamma=np.float32(0.5)), "advantage.gamma: 0.99 then, 0.5 now"),
    "discount as a tensor": (other(gamma=torch.tensor(0.5)), "advantage.gamma: 0.99 then, 0.5 now"),
    "clipping of the loss": (other(clip_epsilon=0.25), "loss.clip_epsilon: 0.3.* then, 0.25 now"),
    "discount": (other(gamma=0.5), "advantage.gamma: 0.99 then, 0.5 now"),
    "activation": (
        other(actor={"activation": torch.nn.Tanh}),
        r"other settings \(loss.actor_network.*.layers.0.class: .ReLU. then, .Tanh. now",
    ),
    "epochs": (other(epochs=3), "update.epochs: 2 then, 3 now"),
    "minibatches": (other(minibatches=4), "update.minibatches: 2 then, 4 now"),
    "back-propagation": (other(bptt=1), "update.bptt: null then, 1 now"),
    "optimizer": (other(sgd=True), "update.optimizer: .Adam. then, .SGD. now"),
    "schedule": (other(lr_schedule=abs), r"update.lr_schedule: null then, .abs\(\). now"),
    "steps of a batch": (other(steps=14), "collector.frames_per_batch: 28 then, 56 now"),
    "two at once": (
        other(lr=2e-2, epochs=3),
        "update.epochs: 2 then, 3 now; .*resume_changes=.'update.epochs', 'update.lr'.",
    ),
    "units": (
        other(units=5),
        r"other networks, or elsewhere \(.*gru.weight_hh_l0: \[12, 4\] then, \[15, 5\] now.*sizes and devices.*start anew",
    ),
    "arms": (other(arms=4), "other networks.*Other settings differ, too: .*env.num_arms: 3 then, 4 now"),
    "rows": (other(rows=3), r"env.state: .*\[4, 3\].* then, .*\[3, 3\].* now"),
    "all checkpoints damaged": (after(all_damaged), "all its 2 checkpoints are damaged.*start anew without resume"),
    "another version": (
        after(rewritten(format=99, versions={"rl2_torchrl": "9.9"})),
        f"another version of rl2_torchrl, 9.9 with format 99, and this one, .* reads format {FORMAT}",
    ),
    "a state of something else": (
        after(with_update(3)),
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


def test_a_state_of_something_else_with_a_changed_setting(folder):
    with_update({"optimizer": 3})(folder)
    with pytest.raises(ValueError, match="the state of the update does not fit, TypeError"):
        Run(5, lr=0.5).train(checkpoints=folder, resume=True, resume_changes=["update.lr"])


def test_resume_changes_of_no_setting(folder):
    with pytest.raises(
        ValueError, match=r"\['lr'\] are no settings; those that differ from the run's are \['update.lr'\]"
    ):
        Run(5, lr=0.0).train(checkpoints=folder, resume=True, resume_changes=["lr"])
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


class FirstOf(Callback):
    """Tasks and actions of the first batch."""

    def __init__(self):
        self.tasks = self.actions = None

    def after_batch(self, batch, progress):
        if self.tasks is None:
            self.tasks, self.actions = batch["task"][:, 0].clone(), batch["action"].clone()


@pytest.mark.parametrize(
    ("changed", "seeds"),
    [("torch.seed", {"seed": 5}), ("env.TaskSampler.seed", {"task_seed": 5}), ("env.seed", {"env_seed": 5})],
)
def test_another_seed_counts_from_then_on(changed, seeds, folder, tmp_path):
    firsts = []
    for number, options in enumerate(({}, seeds, seeds)):
        firsts.append(FirstOf())
        shutil.copytree(folder, tmp_path / str(number))
        changes = {"resume_changes": [changed], "callbacks": [firsts[-1]]}
        Run(5, **options).train(checkpoints=tmp_path / str(number), resume=True, **changes)
    as_was, other, again = firsts
    assert torch.equal(other.tasks, again.tasks)
    assert torch.equal(other.actions, again.actions)
    new_trials = changed != "torch.seed"  # which begin with the tasks that the sampler comes to
    assert torch.equal(as_was.tasks, other.tasks) != new_trials
    assert not torch.equal(as_was.actions, other.actions)
    if changed == "env.TaskSampler.seed":
        assert torch.equal(
            other.tasks, torch.rand(ROWS, 3, generator=torch.Generator().manual_seed(derived_seed(5, "task")))
        )


def test_a_program_that_seeds_nothing_goes_on_in_a_process_that_has_another_seed(tmp_path):
    whole = Run(4, seed=2**40 + 1)  # of 64 bits, as PyTorch draws them
    whole.train()
    Run(4, seed=2**40 + 1).train(checkpoints=tmp_path, stop=lambda row: row["env_steps"] > 2 * BATCH)
    resumed = Run(4, seed=2**50)
    resumed.train(checkpoints=tmp_path, resume=True)
    torch.testing.assert_close(resumed.everything(), whole.everything(), rtol=0, atol=0)


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


def test_a_callbacks_method_that_nothing_would_call():
    with pytest.raises(TypeError, match=r"Misspelt has \['after_updates'\], which nothing calls"):

        class Misspelt(Callback):
            def after_updates(self, row, progress):
                pass


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
    run, folder = Run(5, lean=True, episodes=STEPS), tmp_path / "run"

    def on_the_same_env(*_):
        adaptation_curve(run.collector.env, run.policy, 8)
        return {}

    after_update = type("Mine", (Callback,), {"after_update": on_the_same_env})()
    options = {"evaluate": on_the_same_env} if what == "evaluate" else {"callbacks": [after_update]}
    with pytest.raises(
        RuntimeError, match=r"env has been reset or stepped since.*evaluate on an env of its own"
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
    with pytest.raises(TypeError, match=r"callbacks\.Opaque\.best\.score is a object, which cannot be saved") as kept:
        run.train(checkpoints=tmp_path, callbacks=[Opaque()])
    with pytest.raises(TypeError, match="the update has no state_dict"):
        train(run.collector, lambda batch, progress: {}, evaluate=None, checkpoints=tmp_path)
    assert kept.traceback  # as a notebook keeps it: the folder is free again all the same
    assert run.collector._frames == 0


def test_what_a_killed_write_leaves_is_cleared(folder, unbroken):
    ours = checkpoint(folder, 4).name + ".123-456.part"
    theirs = ["thesis.part", "checkpoint-28.safetensors.bak", "model.123.part"]
    for name in (ours, *theirs):
        (folder / name).write_bytes(b"half")
    assert_goes_on_as_unbroken(folder, unbroken)
    assert not (folder / ours).exists()
    assert all((folder / name).exists() for name in theirs)


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
