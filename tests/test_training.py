"""`train`, the loop on hand-made batches: history, evaluation, loggers, progress bar and Ctrl-C."""

import csv
import math
import signal
import threading
import time
from contextlib import nullcontext

import pytest
import torch
from tensordict import TensorDict
from torchrl.record.loggers import CSVLogger, TensorboardLogger, WandbLogger

from rl2_torchrl import Callback, train


class Batches:
    """A collector of given batches."""

    def __init__(self, *batches, total_frames=None):
        self.batches = batches
        self.total_frames = total_frames or sum(batch.numel() for batch in batches)
        self.weight_updates = 0

    def __iter__(self):
        return iter(self.batches)

    def update_policy_weights_(self):
        self.weight_updates += 1


def batch_of(rewards, dones):
    """A batch ``[rows, T]`` from nested lists."""
    reward, done = torch.tensor(rewards, dtype=torch.float32), torch.tensor(dones, dtype=torch.bool)
    return TensorDict({"next": {"reward": reward.unsqueeze(-1), "done": done.unsqueeze(-1)}}, reward.shape)


def ones(number, steps=2):
    return [batch_of([[1] * steps], [[0] * (steps - 1) + [1]]) for _ in range(number)]


def no_update(batch, progress):
    return {"loss": 0.0}


def train_on(batches, update=no_update, *, evaluate=None, **options):
    return train(Batches(*batches), update, evaluate=evaluate, progress=False, **options)


def without_time(history):
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in history]


# ---- The loop.


def test_a_row_an_update():
    seen = []

    def update(batch, progress):
        seen.append((batch["next", "reward"].sum().item(), progress))
        return {"loss": 10.0 * len(seen), "lr": 0.5}

    collector = Batches(*ones(4, steps=2), total_frames=8)
    result = train(collector, update, evaluate=None, progress=False)
    assert seen == [(2.0, 0.0), (2.0, 0.25), (2.0, 0.5), (2.0, 0.75)]
    assert without_time(result.history) == [
        {"env_steps": 2.0 * n, "train/loss": 10.0 * n, "train/lr": 0.5, "train/trial_return": 2.0} for n in (1, 2, 3, 4)
    ]
    assert (result.env_steps, result.interrupted) == (8, False)
    assert collector.weight_updates == 4  # the collector's policy may be a copy
    assert result.seconds == result.history[-1]["time/seconds"]


def test_trial_returns_by_hand():
    # Row 0: a trial of 1 + 2, then one of 4 + 8 | + 16, cut by the batch's end; row 1: 1 + 1 + 1 + 1 | + 1 + 1.
    first = batch_of([[1, 2, 4, 8], [1, 1, 1, 1]], [[0, 1, 0, 0], [0, 0, 0, 0]])
    second = batch_of([[16, 32], [1, 1]], [[1, 1], [0, 1]])
    rows = train_on([first, second]).history
    # First batch: 3. Second: 28 and 32 in row 0, 6 in row 1.
    assert [row["train/trial_return"] for row in rows] == [3.0, 22.0]


def test_trials_whose_beginning_was_not_seen_do_not_count():
    first = batch_of([[1, 2, 4, 8], [1, 1, 1, 1]], [[0, 1, 0, 1], [0, 0, 0, 1]])
    first["is_init"] = torch.tensor([[False, False, True, False], [True, False, False, False]]).unsqueeze(-1)
    second = batch_of([[3], [5]], [[1], [1]])
    second["is_init"] = torch.ones(2, 1, 1, dtype=torch.bool)
    # Row 0 was in the middle of a trial, of which 1 + 2 is the tail; then 4 + 8. Row 1: 4.
    assert [row["train/trial_return"] for row in train_on([first, second]).history] == [8.0, 4.0]


@pytest.mark.parametrize(("ends", "said"), [([], [10]), ([9], []), ([12], [10])])
def test_trials_that_do_not_end_are_said_once(ends, said, caplog):
    batches = [batch_of([[1, 1]], [[0, number in ends]]) for number in range(25)]
    seen = []
    train_on(batches, stop=lambda row: seen.append(len(caplog.records)) and False)
    assert [
        number for number, (before, now) in enumerate(zip([0, *seen], seen, strict=False), 1) if now > before
    ] == said
    begin = "no trial has ended in 10 batches, 20 steps of each row: do the"
    assert [record.getMessage()[: len(begin)] for record in caplog.records] == len(said) * [begin]


def test_a_batch_in_which_no_trial_ends():
    rows = train_on([batch_of([[1, 2]], [[0, 0]]), batch_of([[4, 8]], [[0, 1]])]).history
    assert math.isnan(rows[0]["train/trial_return"])
    assert rows[1]["train/trial_return"] == 15.0


@pytest.mark.parametrize(
    ("updates", "interval", "expected"),
    [(7, 3, [1, 4, 7]), (6, 3, [1, 4, 6]), (3, 1, [1, 2, 3]), (3, 20, [1, 3]), (1, 20, [1])],
)
def test_evaluates_every_interval_and_at_the_end(updates, interval, expected):
    calls = []
    result = train_on(ones(updates), evaluate=lambda: calls.append(1) or {"calls": len(calls)}, eval_interval=interval)
    evaluated = {n: row["eval/calls"] for n, row in enumerate(result.history, start=1) if "eval/calls" in row}
    assert evaluated == {n: call for call, n in enumerate(expected, start=1)}


def test_stop_sees_the_evaluation_and_one_follows_the_last_update():
    scores = iter([1.0, 2.0, 3.0, 4.0])
    seen = []

    def stop(row):
        seen.append(row.get("eval/score"))
        return row["env_steps"] >= 8

    result = train_on(ones(9), evaluate=lambda: {"score": next(scores)}, eval_interval=2, stop=stop)
    assert seen == [1.0, None, 2.0, None]
    assert [row.get("eval/score") for row in result.history] == [1.0, None, 2.0, 3.0]
    assert (result.env_steps, result.interrupted) == (8, False)


def test_stop_sees_what_history_has():
    seen = []
    result = train_on(ones(2), stop=lambda row: seen.append(dict(row)))
    assert [set(row) for row in seen] == [set(row) for row in result.history]
    # The time is that until then.
    assert 0 < seen[0]["time/seconds"] < result.history[0]["time/seconds"] < seen[1]["time/seconds"]


def test_speed_is_of_all_the_time_evaluations_included():
    rows = train_on(ones(3), evaluate=lambda: time.sleep(0.01) or {"score": 0.5}, eval_interval=1).history
    assert rows[-1]["time/seconds"] > 0.03
    for row in rows:
        assert row["time/steps_per_second"] == pytest.approx(row["env_steps"] / row["time/seconds"])


def test_an_endless_collector_trains_until_stop():
    progress = []
    collector = Batches(*ones(9), total_frames=math.inf)
    options = {"evaluate": lambda: {"score": 1.0}, "progress": False}
    result = train(collector, lambda _, at: progress.append(at) or {}, stop=lambda row: len(progress) == 3, **options)
    assert progress == [0.0, 0.0, 0.0]
    assert ["eval/score" in row for row in result.history] == [True, False, True]


@pytest.mark.parametrize(
    ("total", "message"), [(math.inf, "never ends.*stop="), (0, "total_frames=0 is less than one")]
)
def test_a_training_has_an_end(total, message):
    collector = Batches()
    collector.total_frames = total
    with pytest.raises(ValueError, match=message):
        train(collector, no_update, evaluate=None, progress=False)


def test_a_failing_evaluation_propagates():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError):
        train_on(ones(1), evaluate=lambda: {"score": 1 / 0})
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("name", ["eval_interval", "checkpoint_interval"])
@pytest.mark.parametrize("number", [0, math.nan])
def test_intervals_are_at_least_one(name, number):
    with pytest.raises(ValueError, match=f"{name}={number}.*at least 1"):
        train_on(ones(1), **{name: number})


def test_autocast_is_left_out_with_a_word(caplog):
    seen = []

    def update(batch, progress):
        seen.append(torch.is_autocast_enabled("cpu"))
        return {}

    with torch.autocast("cpu"):
        train_on(ones(1), update)
    train_on(ones(1), update)
    assert seen == [False, False]
    assert [record.getMessage()[:20] for record in caplog.records].count("autocast is left out") == 1


def test_trains_outside_the_main_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(train_on(ones(2))))
    thread.start()
    thread.join()
    assert results[0].env_steps == 4


def test_resume_needs_a_folder():
    with pytest.raises(ValueError, match="resume=True needs the folder"):
        train_on(ones(1), resume=True)


# ---- What is shown and logged.


def test_csv_logger_gets_every_scalar(tmp_path):
    result = train_on(
        ones(3), evaluate=lambda: {"score": 0.5}, eval_interval=2, logger=CSVLogger("scalars", str(tmp_path))
    )
    names = {name for row in result.history for name in row} - {"env_steps"}
    assert {"train/loss", "train/trial_return", "eval/score", "time/seconds"} < names
    for name in names:
        path = tmp_path / "scalars" / "scalars" / f"{name}.csv"
        logged = [(float(step), float(value)) for step, value in csv.reader(path.open())]
        assert logged == [(row["env_steps"], row[name]) for row in result.history if name in row]


def test_tensorboard_logger_gets_every_scalar(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorboardLogger("scalars", str(tmp_path))
    result = train_on(ones(3), lambda batch, progress: {"loss": progress}, logger=logger)
    logger.experiment.close()
    events = EventAccumulator(str(tmp_path / "scalars")).Reload()
    assert set(events.Tags()["scalars"]) == set(result.history[0]) - {"env_steps"}
    logged = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert logged == [(2, 0.0), (4, pytest.approx(1 / 3)), (6, pytest.approx(2 / 3))]


def test_wandb_logger_gets_every_scalar_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger("scalars", offline=True, save_dir=str(tmp_path))
    last = train_on(ones(3), lambda batch, progress: {"loss": progress}, logger=logger).history[-1]
    summary = dict(logger.experiment.summary)  # the last value of each scalar
    assert {name: summary[name] for name in last if name != "env_steps"} == {
        n: last[n] for n in last if n != "env_steps"
    }
    assert 6 in [value for name, value in summary.items() if "step" in name]
    logger.experiment.finish()
    (file,) = tmp_path.rglob("run-*.wandb")
    for _ in range(600):  # a process of W&B's own writes it
        if b"train/loss" in file.read_bytes():
            break
        time.sleep(0.05)
    assert b"train/loss" in file.read_bytes()


def test_progress_bar_shows_frames_and_returns(capsys):
    train(Batches(*ones(2)), no_update, evaluate=lambda: {"trial_return": 0.125}, progress=True)
    shown = capsys.readouterr().err
    assert "4.00/4.00" in shown
    assert "trial return=2.000" in shown
    assert "held-out=0.125" in shown


def test_progress_of_an_endless_training_shows_steps_alone(capsys):
    collector = Batches(*ones(2), total_frames=math.inf)
    train(collector, no_update, evaluate=None, stop=lambda row: row["env_steps"] >= 4, progress=True)
    assert "4.00 steps" in capsys.readouterr().err


def test_one_line_says_which_way_was_taken(caplog):
    class Collector(Batches):
        backend, reason = "tensordicts", "the env is no TensorEnv"

    class Update:
        backend = "parts"

        def __call__(self, batch, progress):
            return {"loss": 0.0}

    with caplog.at_level("INFO", logger="rl2_torchrl"):
        train(Collector(*ones(3)), Update(), evaluate=None, progress=False)
        train(Batches(*ones(3)), no_update, evaluate=None, progress=False)  # these do not say
    lines = [record.message for record in caplog.records if record.name == "rl2_torchrl.training_loop"]
    assert lines == ["training with collector: tensordicts (the env is no TensorEnv); update: parts"]


# ---- Callbacks.


class Recorder(Callback):
    """Writes down what it is called with, and says something of its own."""

    def __init__(self):
        self.calls = []

    def after_batch(self, batch, progress):
        self.calls.append(("batch", batch["next", "reward"].sum().item(), progress))
        batch["next", "reward"] += 1

    def after_update(self, row, progress):
        self.calls.append(("update", row["train/loss"], progress))
        return {"updates": len(self.calls)}

    def after_evaluation(self, row, progress):
        self.calls.append(("evaluation", row["eval/score"], progress))
        return {"eval/twice": 2 * row["eval/score"]}


def test_a_batch_that_a_callback_returns_is_refused_where_it_is_another():
    class Copies(Callback):
        def after_batch(self, batch, progress):
            return batch.clone() if self.copies else batch

    callback = Copies()
    for callback.copies in (False, True):
        refused = pytest.raises(TypeError, match="Copies.after_batch returned what no update would see.*in place")
        with refused if callback.copies else nullcontext():
            train(Batches(*ones(1)), no_update, evaluate=None, progress=False, callbacks=[callback])


def test_callbacks_are_called_in_order_and_add_to_the_row(tmp_path):
    recorder = Recorder()

    def update(batch, progress):
        return {"loss": batch["next", "reward"].sum()}  # a tensor of one element is a number

    options = {"evaluate": lambda: {"score": torch.tensor(0.5)}, "eval_interval": 2, "callbacks": [recorder]}
    logger = CSVLogger("scalars", str(tmp_path))
    result = train(Batches(*ones(2)), update, logger=logger, progress=False, **options)
    # Rewards of 1 + 1; after_batch makes them 2 + 2, which the update sees and the trial's return does not.
    assert recorder.calls == [
        ("batch", 2.0, 0.0),
        ("update", 4.0, 0.0),
        ("evaluation", 0.5, 0.0),
        ("batch", 2.0, 0.5),
        ("update", 4.0, 0.5),
        ("evaluation", 0.5, 0.5),
    ]
    assert [row["updates"] for row in result.history] == [2.0, 5.0]
    assert [row["eval/twice"] for row in result.history] == [1.0, 1.0]
    assert [row["train/trial_return"] for row in result.history] == [2.0, 2.0]
    assert all(type(value) is float for row in result.history for value in row.values())
    assert (tmp_path / "scalars" / "scalars" / "updates.csv").read_text().split() == ["2,2.0", "4,5.0"]


@pytest.mark.parametrize("callbacks", [Recorder(), [print]])
def test_callbacks_that_are_none(callbacks):
    with pytest.raises(TypeError, match=r"must be a list of Callback objects"):
        train_on(ones(1), callbacks=callbacks)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.tensor(0.5), "evaluate returned a Tensor"),
        ({"a": 1.0, "per_episode": torch.ones(2)}, "one number for each"),
    ],
)
def test_evaluations_that_are_no_scalars(returned, message):
    with pytest.raises(TypeError, match=message):
        train_on(ones(1), evaluate=lambda: returned)


@pytest.mark.parametrize("source", ["after_update", "after_evaluation", "update"])
def test_an_entry_that_the_row_holds_is_not_written_over(source):
    parts = {"callbacks": [Callback()], "evaluate": lambda: {"score": 0.5}, "eval_interval": 1}
    setattr(parts["callbacks"][0], source, lambda row, progress: row)  # a slip, where it was to be looked at
    update = (lambda batch, progress: {"trial_return": 7.0}) if source == "update" else no_update
    with pytest.raises(
        ValueError, match=rf"{source} returned \[.*'[a-z]+/[a-z_]+'.*which the update's row holds already"
    ):
        train(Batches(*ones(2)), update, progress=False, **parts)


# ---- The collector counts.


class Counting(Batches):
    """A collector that counts its frames, as TorchRL's do, and can be iterated over again."""

    _frames = 0

    def __iter__(self):
        while self._frames < self.total_frames:
            batch = self.batches[0]
            self._frames += batch.numel()
            yield batch


def test_a_second_call_goes_on_where_the_first_ended():
    progress, evaluations = [], []

    def update(batch, at):
        progress.append(at)
        return {"loss": at}

    def evaluate():
        evaluations.append(None)
        return {"score": 1.0}

    collector = Counting(*ones(1), total_frames=8)
    options = {"evaluate": evaluate, "eval_interval": 10, "progress": False}
    first = train(collector, update, stop=lambda row: row["env_steps"] >= 4, **options)
    second = train(collector, update, **options)
    assert progress == [0.0, 0.25, 0.5, 0.75]
    assert [row["env_steps"] for row in first.history] == [2, 4]
    assert [row["env_steps"] for row in second.history] == [6, 8]
    assert (first.env_steps, second.env_steps) == (4, 8)
    assert len(evaluations) == 4  # after the first and the last update of each call
    with pytest.raises(ValueError, match=r"has collected its total_frames=8 already.*Make a new env and collector"):
        train(collector, update, **options)


def test_a_spent_collector_touches_no_checkpoints(tmp_path):
    collector = Counting(*ones(1), total_frames=2)
    collector._frames = 2
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(ValueError, match="already"):
        train(collector, no_update, evaluate=None, progress=False, checkpoints=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_collector_that_ends_early_ends_the_training(tmp_path):
    scores = iter([1.0, 2.0])
    collector = Batches(*ones(3), total_frames=100)
    logger = CSVLogger("scalars", str(tmp_path))
    options = {"evaluate": lambda: {"score": next(scores)}, "logger": logger, "progress": False}
    result = train(collector, no_update, **options)
    assert [row.get("eval/score") for row in result.history] == [1.0, None, 2.0]
    assert (tmp_path / "scalars" / "scalars" / "eval" / "score.csv").read_text().split() == ["2,1.0", "6,2.0"]


def test_a_collector_without_a_batch():
    with pytest.raises(RuntimeError, match="gave no batch"):
        train(Batches(total_frames=4), no_update, evaluate=None, progress=False)


# ---- Schedules of an endless training.


def test_schedules_of_an_endless_collector_run_over_their_own_length():
    progress = []
    collector = Batches(*ones(4), total_frames=math.inf)
    options = {"evaluate": None, "progress": False, "schedule_frames": 4}
    train(collector, lambda _, at: progress.append(at) or {}, stop=lambda row: len(progress) == 4, **options)
    assert progress == [0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("name", ["lr_schedule", "entropy_schedule"])
def test_a_schedule_without_a_length(name):
    class Update:
        def __call__(self, batch, progress):
            return {}

    update = Update()
    setattr(update, name, lambda progress: 1.0)
    collector = Batches(*ones(1), total_frames=math.inf)
    with pytest.raises(ValueError, match=rf"{name} would never move.*schedule_frames"):
        train(collector, update, evaluate=None, progress=False, stop=lambda row: True)
    train(collector, update, evaluate=None, progress=False, stop=lambda row: True, schedule_frames=10)


def test_schedules_have_a_length_of_at_least_one():
    with pytest.raises(ValueError, match="schedule_frames=0"):
        train_on(ones(1), schedule_frames=0)


# ---- Ctrl-C.


@pytest.fixture
def before():
    """The signal handler of an ordinary process; one in the background ignores Ctrl-C."""
    outer = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, outer)


def ctrl_c_at(number):
    """An update that raises SIGINT at its ``number``-th call."""
    calls = []

    def callback(*_):
        calls.append(None)
        if len(calls) == number:
            signal.raise_signal(signal.SIGINT)
        return {"calls": float(len(calls))}

    return callback


def test_ctrl_c_lets_the_update_finish_and_skips_the_evaluation():
    interrupt, evaluations = ctrl_c_at(2), []
    result = train_on(ones(5), interrupt, evaluate=lambda: evaluations.append(1) or {"score": 1.0}, eval_interval=1)
    assert [row["train/calls"] for row in result.history] == [1.0, 2.0]
    assert len(evaluations) == 1


def test_ctrl_c_twice_stops_at_once(before):
    calls = []

    def update(batch, progress):
        calls.append(None)
        signal.raise_signal(signal.SIGINT)
        calls.append(None)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second Ctrl-C did nothing")

    with pytest.raises(KeyboardInterrupt):
        train_on(ones(5), update)
    assert len(calls) == 2
    assert signal.getsignal(signal.SIGINT) is before
