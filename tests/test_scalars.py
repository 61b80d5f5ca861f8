"""What loggers hold of a run that was stopped, killed or begun anew: each step once, and nobody else's rows touched."""

import csv

import pytest
from runs import BATCH, Run, checkpoint, forked
from torchrl.record.loggers import CSVLogger, TensorboardLogger

from rl2_torchrl import Callback


def test_scalars_after_a_kill_hold_each_step_once(tmp_path, unbroken):
    def train(**options):
        logger = CSVLogger("scalars", tmp_path)
        Run(5).train(checkpoints=tmp_path / "run", checkpoint_interval=2, logger=logger, **options)

    def until_killed(pause):
        train(
            stop=lambda row: row["env_steps"] >= 3 * BATCH and pause()
        )  # after a checkpoint, and a row that follows it

    with forked(until_killed):
        pass
    scalars = tmp_path / "scalars" / "scalars" / "train"
    with (scalars / "loss.csv").open("a") as file:
        file.write("84,0.25\n112,0.")  # rows of steps that were lost, the last one cut
    train(resume=True)
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


def test_a_log_of_a_run_whose_checkpoints_are_elsewhere_is_moved_aside(folder, tmp_path, caplog):
    Run(5).train(logger=CSVLogger("log", tmp_path), checkpoints=folder, resume=True)
    logged = (tmp_path / "log/scalars/train/loss.csv").read_bytes()
    Run(2).train(logger=CSVLogger("log", tmp_path), checkpoints=tmp_path / "rnu", resume=True)
    assert "rnu holds no checkpoint: starting anew" in caplog.text
    assert (tmp_path / "log/earlier-scalars/train/loss.csv").read_bytes() == logged


def test_a_log_that_is_open_is_gone_on_with(tmp_path, unbroken):
    logger = CSVLogger("log", tmp_path)
    options = {"checkpoints": tmp_path / "run", "logger": logger}
    Run(5).train(stop=lambda row: row["env_steps"] == 2 * BATCH, **options)
    Run(5).train(resume=True, **options)
    rows = csv_rows(tmp_path / "log/scalars/train/loss.csv")
    assert rows == [(row["env_steps"], row["train/loss"]) for row in unbroken.history]


def test_a_users_own_scalars_are_gone_on_with(tmp_path):
    class Logs(Callback):
        def __init__(self, logger):
            self.logger = logger

        def after_update(self, row, progress):
            self.logger.log_scalar("at_a_step", 1.0, step=row["env_steps"])  # a float, as all numbers of a row are
            self.logger.log_scalar("counted", 1.0)
            self.logger.log_scalar("in_words", 1.0, step="now")

    for updates, resume in ((3, False), (5, True)):
        logger = CSVLogger("log", tmp_path)
        options = {"logger": logger, "callbacks": [Logs(logger)], "resume": resume}
        Run(updates).train(checkpoints=tmp_path / "run", checkpoint_interval=2, **options)
        checkpoint(tmp_path / "run").unlink(missing_ok=True)  # the first run has gone on after its last one
    scalars = tmp_path / "log/scalars"
    assert csv_rows(scalars / "at_a_step.csv") == [(BATCH * update, 1.0) for update in range(1, 6)]
    assert [step for step, _ in csv_rows(scalars / "counted.csv")] == [0, 1, 2, 0, 1, 2]
    assert (scalars / "in_words.csv").read_text() == 6 * "now,1.0\n"


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
