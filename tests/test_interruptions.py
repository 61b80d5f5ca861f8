"""What a run survives from outside: signals, a kill, a full disk, another run in its folder, processes of its envs."""

import os
import resource
import signal
import time

import pytest
import torch
from runs import BATCH, Run, assert_goes_on_as_unbroken, checkpoint, contents, forked, program, saved_steps

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


def test_a_request_to_end_does_not_wait_for_an_evaluation(tmp_path, unbroken, caplog):
    calls, asked = [], []

    def evaluate():
        calls.append("begun")
        torch.rand(3)  # whose draws the training does not see
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
            calls.append("not given up")
        return {"score": len(calls)}

    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit):
            Run(5).train(checkpoints=tmp_path, evaluate=evaluate, eval_interval=2, stop=asked.append)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert calls == ["begun"] * 2
    assert [row["env_steps"] for row in asked] == [BATCH, 2 * BATCH]  # it sees an evaluation, which was not made
    assert "made up for when the run is resumed" in caplog.text
    assert saved_steps(tmp_path) == [3 * BATCH]
    resumed = Run(5)
    history = resumed.train(checkpoints=tmp_path, resume=True, evaluate=evaluate, eval_interval=2).history
    assert [row["env_steps"] for row in history if "eval/score" in row] == [BATCH, 3 * BATCH, 5 * BATCH]
    torch.testing.assert_close(resumed.everything(), unbroken.everything(), rtol=0, atol=0)


def test_what_a_program_does_at_a_signal_it_still_does(tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(saved_steps(tmp_path)))
    try:
        result = Run(5).train(checkpoints=tmp_path, stop=lambda row: signal.raise_signal(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.interrupted
    assert seen == [[BATCH]]


def test_a_program_that_answers_a_signal_waits_for_an_evaluation(tmp_path):
    def evaluate():
        signal.raise_signal(signal.SIGTERM)
        return {"score": 1.0}  # envs may be in the middle of a step

    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        result = Run(5).train(checkpoints=tmp_path, evaluate=evaluate)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.interrupted
    assert result.history[-1]["eval/score"] == 1.0


@pytest.mark.parametrize("name", ["SIGHUP", "SIGINT"])  # as under nohup, and in a script's background
def test_a_signal_that_is_ignored_stays_so(name, tmp_path):
    signum = getattr(signal, name)
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        result = Run(5).train(stop=lambda row: signal.raise_signal(signum))
    finally:
        signal.signal(signum, before)
    assert (result.env_steps, result.interrupted) == (5 * BATCH, False)


# ---- A full disk; two runs in one folder.


def run_on_a_full_disk(folder, limit, *, is_last):
    """Trains until after the third update, or on from there: at its checkpoint a file may not grow beyond ``limit`` bytes."""

    def full(row):  # writes fail then as they do on a full disk
        is_full = row["env_steps"] == 3 * BATCH
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit if is_full else resource.RLIM_INFINITY, hard))
        return is_full and is_last

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        Run(5).train(checkpoints=folder, checkpoint_interval=1, stop=full)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [0, 100, 4000, 20_000])
def test_a_full_disk_costs_one_checkpoint(limit, tmp_path, unbroken, caplog):
    run_on_a_full_disk(tmp_path, limit, is_last=False)
    assert f"no checkpoint could be written at {3 * BATCH} env steps ([Errno 27] File too large" in caplog.text
    assert f"the newest one is {checkpoint(tmp_path, 2)}. The training goes on." in caplog.text
    assert saved_steps(tmp_path) == [4 * BATCH, 5 * BATCH]
    assert_goes_on_as_unbroken(tmp_path, unbroken)


@pytest.mark.parametrize("limit", [0, 20_000])
def test_a_disk_that_is_full_at_the_end_is_an_error(limit, tmp_path, unbroken):
    with pytest.raises(OSError, match=f"no checkpoint could be written at {3 * BATCH} env steps"):
        run_on_a_full_disk(tmp_path, limit, is_last=True)
    assert saved_steps(tmp_path) == [BATCH, 2 * BATCH]
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []
    assert_goes_on_as_unbroken(tmp_path, unbroken)


def test_two_runs_in_one_folder(tmp_path):
    def hold(pause):
        Run(5).train(checkpoints=tmp_path, checkpoint_interval=1, stop=lambda row: pause())

    with forked(hold):
        before = contents(tmp_path)
        for options in ({}, {"resume": True}):
            with pytest.raises(
                OSError, match=r"is in use by another training .*Give each its own, such as one for each seed"
            ):
                Run(5).train(checkpoints=tmp_path, **options)
        assert contents(tmp_path) == before
    Run(5).train(checkpoints=tmp_path, resume=True)  # a lock ends with its program


def test_two_runs_of_one_process_in_one_folder(tmp_path):
    def inner(row):
        with pytest.raises(OSError, match="held by another training of this process"):
            Run(5).train(checkpoints=tmp_path)
        return True

    Run(5).train(checkpoints=tmp_path, stop=inner)
    Run(5).train(checkpoints=tmp_path)


def test_a_killed_run_is_not_held_by_its_envs_processes(tmp_path):
    def fork(pause):
        def begin(row):
            if os.fork() == 0:
                time.sleep(30)
                os._exit(0)
            pause()

        os.setsid()
        Run(5).train(checkpoints=tmp_path, stop=begin)

    with forked(fork) as run:
        pass
    try:
        Run(5).train(checkpoints=tmp_path)
    finally:
        os.killpg(run.pid, signal.SIGKILL)


# ---- Envs in processes of their own.

WORKERS = """
    import os, signal, sys, threading
    import gymnasium
    from gymnasium.vector import AsyncVectorEnv
    from torchrl.data import Unbounded
    from torchrl.envs import ParallelEnv
    from rl2_torchrl import GRUGaussianActor
    from rl2_torchrl.envs import GymTaskEnv, GymVectorEnv

    task = {"set_task": lambda env, task, *rows: None, "task_spec": Unbounded(1)}

    def parallel():
        return ParallelEnv(2, lambda: GymTaskEnv("Pendulum-v1", **task), mp_start_method="fork")

    def rows():
        return GymVectorEnv("Pendulum-v1", 2, vectorization="async", **task)

    def own_rows():
        make, mode = lambda: gymnasium.make("Pendulum-v1"), gymnasium.vector.AutoresetMode.DISABLED
        return GymVectorEnv(AsyncVectorEnv([make] * 2, context="fork", autoreset_mode=mode), **task)

    class Parallel(Run):
        def __init__(self):
            sampler = TaskSampler(lambda size, generator: torch.rand(*size, 1, generator=generator), seed=1)
            parts = Compose(Trial(steps=STEPS), sampler, PreviousStep())
            env = TransformedEnv(make(), parts)
            self.update = self.networks(env, GRUGaussianActor, 4, minibatches=1)
            sizes = {"frames_per_batch": 2 * STEPS, "total_frames": 10_000 * STEPS}
            self.collector = Collector(env, self.policy, auto_register_policy_transforms=True, **sizes)

    signal.signal(signal.SIGINT, signal.default_int_handler)
    for case in sys.argv[2:]:
        how, envs = case.split()
        make = globals()[envs]

        def stop(row):
            if row["env_steps"] == 2 * STEPS * 3 and how == "ctrl-c":  # as a terminal does: to every process, in a rollout
                threading.Timer(0.05, os.killpg, (0, signal.SIGINT)).start()
            return row["env_steps"] == 2 * STEPS * 3 and how == "stop"

        print(case, file=sys.stderr)
        result = Parallel().train(checkpoints=f"{sys.argv[1]}/{case}", stop=stop, check=False)
        print("returned", result.env_steps, result.interrupted, flush=True)
"""


def test_trainings_with_workers_are_saved_and_their_program_ends(tmp_path):
    cases = ["stop parallel", "ctrl-c parallel", "ctrl-c rows", "ctrl-c own_rows"]
    run = program(WORKERS, tmp_path, *cases, start_new_session=True)
    try:
        said, errors = run.communicate(timeout=300)  # or it would not end
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    returned = [line.split()[1:] for line in said.splitlines() if line.startswith("returned")]
    assert [interrupted for _, interrupted in returned] == ["False", "True", "True", "True"], errors
    for case, (env_steps, _) in zip(cases, returned, strict=True):
        assert saved_steps(tmp_path / case) == [int(env_steps)]
    of_rows = errors.partition("ctrl-c rows\n")[2].partition("ctrl-c own_rows\n")[0]
    assert "the rollout was cut short" not in of_rows, errors
