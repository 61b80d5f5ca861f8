"""Several trainings: one after the other, in two threads, in a forked process, beside other programs."""

import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torchrl.envs import Compose, ExplorationType, TransformedEnv, set_exploration_type
from torchrl.envs.utils import exploration_type

from recipes.benchmark import Workload, compose
from rl2_torchrl import (
    Callback,
    GRUCategoricalActor,
    PreviousStep,
    TaskSampler,
    Trial,
    TrialCollector,
    adaptation_curve,
    kernels,
    train,
)
from rl2_torchrl.envs import BernoulliBandit
from rl2_torchrl.kernels import threads

needs_linux = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts what Linux lists in /proc")
SMALL = Workload(arms=3, pulls=10, trials=64, units=32, minibatches=2, epochs=2)


def training(updates=2, workload=SMALL, **options):
    collector, update = compose(workload)
    collector.total_frames = updates * workload.steps
    return train(collector, update, **{"evaluate": None, "progress": False, **options})


def python(program, *arguments, **environment):
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), **environment}
    environment = {name: value for name, value in environment.items() if value is not None}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    # The limit is for what would hang for ever, not for what is slow.
    return subprocess.run(
        [sys.executable, "-c", program, *arguments], env=environment, cwd=root, text=True, timeout=300, **pipes
    )


#: Runs each of its programs in a fork that has imported what they need: fresh ones would import PyTorch for seconds.
FORKS = """
import os, sys
import tests.test_threads

folder, *programs = sys.argv[1:]
for number, program in enumerate(programs):
    if os.fork() == 0:
        said = os.open(f"{folder}/{number}", os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(said, 1), os.dup2(said, 2)
        exec(program, {})
        raise SystemExit
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """By program: its exit code, and what it said."""
    if not hasattr(os, "fork"):
        pytest.skip("there is no fork")
    folder, programs = tmp_path_factory.mktemp("forks"), (TWENTY_TRAININGS, FORK, CHEETAHS, FORK_BESIDE_THREADS)
    codes = python(FORKS, folder, *programs, OMP_NUM_THREADS="2").stdout.split()
    said = [(folder / str(number)).read_text() for number in range(len(programs))]
    return dict(zip(programs, zip(map(int, codes), said, strict=True), strict=True))


# ----------------------------------------------------------------- one process
# In a process of its own: what other tests left behind is closed whenever the garbage collector comes by, also in here.
TWENTY_TRAININGS = """
import os
import torch
from tests.test_threads import training

before, counts = torch.get_num_threads(), []
for _ in range(20):
    training()
    counts.append([len(os.listdir(f"/proc/self/{what}")) for what in ("task", "fd")])
assert counts[-1] == counts[4], counts  # the first ones start threads that the next ones use
assert torch.get_num_threads() == before
"""


@needs_linux
def test_twenty_trainings_leave_no_threads_files_or_number_of_threads_behind(ran):
    code, said = ran[TWENTY_TRAININGS]
    assert code == 0, said


def test_two_trainings_in_two_threads():
    alone, results, errors = training(10), [], []

    def run():
        try:
            results.append(training(10))
        except BaseException as error:  # noqa: BLE001 (a thread's error is nobody's else)
            errors.append(error)

    both = [threading.Thread(target=run) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert not errors
    for result in results:
        assert result.env_steps == alone.env_steps
        for row, row_alone in zip(result.history, alone.history, strict=True):
            # Memory that both wrote to would show in the ratios, which begin at 1.
            assert row["train/mean_ratio"] == pytest.approx(1, abs=0.05)
            assert row.keys() == row_alone.keys()


def test_an_evaluation_in_one_thread_does_not_reach_into_another_s_rollout():
    """TorchRL's modes and PyTorch's random numbers are the program's: trainings take turns."""
    modes = {"evaluated": [], "rolled out": []}
    evaluating = threading.Event()

    class Watched(Callback):
        def after_batch(self, batch, progress):
            modes["rolled out"].append(exploration_type())

    def evaluate():
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            evaluating.set()
            time.sleep(0.5)  # time enough for many updates of the other
            modes["evaluated"].append(exploration_type())
        return {"score": 0.0}

    other = threading.Thread(target=training, kwargs={"evaluate": evaluate, "eval_interval": 1})
    other.start()
    assert evaluating.wait(60)
    training(30, callbacks=[Watched()])
    other.join()
    assert modes["rolled out"] == [None] * 30
    assert modes["evaluated"] == [ExplorationType.DETERMINISTIC] * 2
    assert exploration_type() is None


# -------------------------------------------------------------------- a fork
FORK = """
import os, sys, torch
from tests.test_threads import Workload, training
torch.set_num_threads(2)
wide = Workload(arms=3, pulls=50, trials=64, units=64, minibatches=2, epochs=1)
training(workload=wide)
child = os.fork()
if not child:
    sys.stdout.flush()
    result = training(workload=wide)
    print("child has", torch.get_num_threads(), "thread and", len(result.history), "updates", flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print("parent has", torch.get_num_threads(), flush=True)
"""


@pytest.mark.skipif(kernels.load(torch.float32) is None, reason="no C compiler")
def test_a_process_forked_after_the_kernels_threads_have_run_trains_on_one_and_says_so(ran):
    code, said = ran[FORK]
    assert code == 0, said
    assert "child has 1 thread and 2 updates" in said
    assert "parent has 2" in said
    assert said.count("PyTorch takes one thread here") == 1


def test_a_fork_of_a_process_of_one_thread_changes_nothing(monkeypatch):
    monkeypatch.setattr(threads, "_has_run", False)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: pytest.fail("changed"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    threads._take_one_thread()


CHEETAHS = """
import gc, os, signal, torch
from tensordict import TensorDict
from rl2_torchrl.envs import HalfCheetahVelocity

def cheetah():
    return HalfCheetahVelocity(batch_size=(4,), horizon=5, seed=0, num_threads=2)

def play(env):
    begun = env.reset(TensorDict({"task": torch.ones(4, 1)}, [4]))
    return env.step(begun.set("action", torch.full((4, 6), 0.3)))["next", "reward"]

gc.disable()
kept, dropped = cheetah(), cheetah()
expected = [play(kept) for _ in range(2)], play(dropped)
dropped.itself = dropped
del dropped  # and its pool of threads with it, as soon as there is time
kept = cheetah()
play(kept)
child = os.fork()
if not child:
    signal.alarm(60)
    gc.collect()
    assert torch.equal(play(kept), expected[0][1])
    print("child has played", flush=True)
    raise SystemExit
assert os.waitpid(child, 0)[1] == 0
"""


def test_simulations_outlive_a_fork_and_end_in_it(ran):
    pytest.importorskip("mujoco")
    code, said = ran[CHEETAHS]
    assert code == 0, said
    assert "child has played" in said


# -------------------------------------------------------------- other programs
@pytest.mark.parametrize("given", [None, "active"])
def test_threads_of_recipes_sleep_while_they_wait(given):
    # As `python -m recipes.bandit` does: recipes is imported before PyTorch, whose OpenMP then reads it.
    process = python(
        "import os, recipes, sys; print(os.environ.get('OMP_WAIT_POLICY'), 'torch' in sys.modules)",
        "--log-dir",
        "runs/my_benchmark",  # no benchmark's name
        OMP_WAIT_POLICY=given,
    )
    assert process.stdout.split() == [given or "passive", "False"]


@pytest.mark.parametrize("words", [["-m", "recipes.gym_benchmark"], ["recipes/gym_benchmark.py"]])
def test_threads_of_benchmarks_spin(words, tmp_path):
    root = Path(__file__).parents[1]
    (tmp_path / "recipes").mkdir()
    shutil.copy(root / "recipes" / "__init__.py", tmp_path / "recipes")
    (tmp_path / "recipes" / "gym_benchmark.py").write_text(
        "import os, recipes; print(os.environ.get('OMP_WAIT_POLICY'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment["PYTHONPATH"] = str(tmp_path)
    command = [sys.executable, *words, "--repeats", "3"]
    assert subprocess.run(command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE).stdout.split() == [b"None"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 2),
        ({"OMP_WAIT_POLICY": "active"}, 2),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, 1),
        ({"GOMP_SPINCOUNT": "0"}, 1),
        ({"GOMP_SPINCOUNT": "1000"}, 2),
    ],
)
def test_threads_that_sleep_are_woken_for_more_work_than_those_that_spin(monkeypatch, environment, expected):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(threads, "_LEAST_WORK", threads._least_work(environment))
    assert threads.threads_for(30_000) == 1
    assert threads.threads_for(500_000) == expected
    assert threads.threads_for(1_000_001) == 2


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(threads, "_is_warned", False)
    monkeypatch.setattr(threads.torchrl_logger, "warning", messages.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(os, "getloadavg", lambda: (4.0, 0.0, 0.0))
    return messages


def test_a_training_among_others_says_once_what_to_set(warnings):
    training()
    training()
    [message] = warnings
    assert "4 threads want to run on 2 cores" in message
    assert "OMP_WAIT_POLICY=passive" in message


@pytest.mark.parametrize("quiet", ["one thread", "few want to run", "told how to wait"])
def test_nothing_is_said_where_nobody_is_in_the_way(warnings, monkeypatch, quiet):
    if quiet == "one thread":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    elif quiet == "few want to run":
        monkeypatch.setattr(os, "getloadavg", lambda: (2.9, 9.0, 9.0))
    else:
        monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    threads.warn_of_spinning()
    assert not warnings


def test_evaluations_in_threads_play_as_each_of_them_says():
    """Greedily or not: the mode is TorchRL's, and one for all threads."""
    means = torch.rand(64, 3, generator=torch.Generator().manual_seed(0))

    def env():
        trial = Compose(Trial(episodes=30), TaskSampler.fixed(means), PreviousStep())
        return TransformedEnv(BernoulliBandit(3, batch_size=(64,), seed=0), trial)

    torch.manual_seed(0)
    actor = GRUCategoricalActor.from_env(env(), init_range=0.1)

    def switches(deterministic):
        actions = []
        adaptation_curve(
            env(), actor, 64, deterministic=deterministic, on_step=lambda state: actions.append(state["action"])
        )
        return any((one != other).any() for one, other in pairwise(actions))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(switches, (False, True) * 8)) == [True, False] * 8


@pytest.mark.parametrize("by", ["train", "hand", "TorchRL's loop"])
def test_a_greedy_evaluation_in_a_thread_waits_for_a_rollout(by):
    collector, update = compose(SMALL)
    if by == "TorchRL's loop":
        collector = TrialCollector(collector.env, collector.policy, frames_per_batch=SMALL.steps, rollout="tensordicts")
    collector.total_frames = SMALL.steps
    played, ended, seen = threading.Event(), threading.Event(), []

    def on_step(state):
        played.set()
        ended.wait(10)

    def evaluate():
        other, _ = compose(SMALL)
        adaptation_curve(other.env, other.policy, 4, deterministic=True, on_step=on_step)

    evaluation = threading.Thread(target=evaluate, daemon=True)

    def within_the_rollout(*_):
        if not seen:
            evaluation.start()
            seen.append(played.wait(0.5))
            ended.set()

    if by == "TorchRL's loop":
        collector.pre_collect_hook = within_the_rollout
    else:
        collector.player.on_step = within_the_rollout
    if by == "train":
        train(collector, update, evaluate=None, progress=False, check=False)
    else:
        next(iter(collector))
    evaluation.join(60)
    assert seen == [False]
    assert played.is_set()


def evaluated(on_step, **options):
    collector, _ = compose(SMALL)
    adaptation_curve(collector.env, collector.policy, 4, on_step=on_step, **options)


def test_evaluations_within_evaluations_of_another_mode_do_not_wait_for_one_another():
    mine, seen = threading.local(), []

    def within(_):
        if not hasattr(mine, "begun"):
            mine.begun = True
            evaluated(lambda _: seen.append(exploration_type()), deterministic=True)
            seen.append(exploration_type())

    threads = [threading.Thread(target=evaluated, args=[within], daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert seen.count(ExplorationType.RANDOM) == 2
    assert set(seen) == {ExplorationType.RANDOM, ExplorationType.DETERMINISTIC}
    assert exploration_type() is None


def test_an_error_leaves_no_mode_behind():
    def fail(_):
        raise RuntimeError("on_step")

    with pytest.raises(RuntimeError, match="on_step"):
        evaluated(fail, deterministic=True)
    assert exploration_type() is None
    with ThreadPoolExecutor(1) as pool:
        pool.submit(evaluated, None).result(60)


FORK_BESIDE_THREADS = """
import os, signal, threading, torch
from torchrl.envs.utils import ExplorationType, exploration_type
from rl2_torchrl.locks import exploring, taking_turns
from tests.test_threads import evaluated, training
torch.set_num_threads(1)
held, ended = threading.Event(), threading.Event()

def hold():
    with taking_turns(), exploring(ExplorationType.DETERMINISTIC):
        held.set()
        ended.wait()

threading.Thread(target=hold).start()
held.wait()
child = os.fork()
if not child:
    signal.alarm(30)
    evaluated(None)
    training()
    print("child has played", flush=True)
    os._exit(0)
ended.set()
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_process_forked_beside_a_greedy_evaluation_and_a_training_waits_for_neither(ran):
    code, said = ran[FORK_BESIDE_THREADS]
    assert code == 0, said
    assert "child has played" in said
