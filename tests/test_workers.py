"""`TrialWorkers`: processes and Ray actors that play as a `TrialCollector` does, also when some of them are killed."""

import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from recipes import cartpole, grid_navi, half_cheetah, tabular_mdp
from recipes.command import arguments
from rl2_torchrl import (
    GRUCategoricalActor,
    PPOUpdate,
    RL2PPOLoss,
    TaskSampler,
    TrainingCheckError,
    TrialCollector,
    TrialWorkers,
    check_training,
    describe,
    train,
)
from rl2_torchrl.callbacks import Callback
from rl2_torchrl.minibatches import require_trials
from rl2_torchrl.seeding import derived_seed
from rl2_torchrl.storage import load_tree
from rl2_torchrl.workers import trial_workers
from rl2_torchrl.workers.player import Player
from tests.workers import (
    ARMS,
    EPISODES,
    FRAMES,
    ROWS,
    STEPS,
    WORKERS,
    Setup,
    draws_from,
    leaves_its_number,
    make_counting_env,
    make_env,
    rows_and_process,
    same_tasks,
    tasks,
)

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
BACKENDS = ["process", pytest.param("ray", marks=needs_ray)]


@pytest.fixture(scope="module", autouse=True)
def fast_starts():
    """A server that has imported PyTorch is forked for each process."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_forkserver_preload(["rl2_torchrl"])
    multiprocessing.set_start_method("forkserver", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.fixture(scope="module", params=BACKENDS)
def setup(request, tmp_path_factory):
    own = Setup(tmp_path_factory.mktemp("workers"), backend=request.param)
    yield own
    own.collector.shutdown()


def has_ended(pid):
    """Whether there is no such process; a zombie is one."""
    for _ in range(600):  # on a busy machine Ray takes its time
        if not Path(f"/proc/{pid}").exists():
            return True
        time.sleep(0.05)
    return False


def test_the_first_worker_says_what_its_env_is(setup):
    here = TrialCollector(make_env(setup.folder), setup.policy, keep=setup.keep, frames_per_batch=ROWS * STEPS)
    alone, shared = describe(here, setup.update).parts, describe(setup.collector, setup.update).parts
    assert [(there.what, here.what) for there, here in zip(shared, alone, strict=True) if there.what != here.what] == [
        (f"{ROWS} rows on cpu, in each of {WORKERS} workers", f"{ROWS} rows on cpu"),
        (
            f"{FRAMES} steps a batch, {STEPS} of each row, without end",
            f"40 steps a batch, {STEPS} of each row, without end",
        ),
    ]


def test_rows_are_trials_and_every_worker_has_tasks_of_its_own(setup):
    batch = setup.collector.rollout()
    assert batch.shape == (WORKERS * ROWS, STEPS)
    require_trials(batch)
    assert batch["is_init"].squeeze(-1).nonzero()[:, 1].unique().tolist() == [0, EPISODES]
    tasks = batch["task"][:, ::EPISODES].flatten(0, 1)
    assert len(tasks.unique(dim=0)) == len(tasks) == 2 * WORKERS * ROWS
    assert len(batch["action"].view(WORKERS, -1).unique(dim=0)) == WORKERS  # nor is their noise the same


def test_a_worker_plays_as_the_collector_in_this_process_does(setup):
    setup.collector.set_seed(7)
    batches = [setup.collector.rollout() for _ in range(2)]
    alone = {"number": 1, "keep": setup.keep, "frames_per_batch": ROWS * STEPS, "total_frames": -1}
    player = Player(partial(make_env, setup.folder), setup.policy, seed=derived_seed(7, 1), **alone)
    assert setup.collector.backend == player.backend == "tensors"
    for batch in batches:
        expected = player.rollout()
        for key in setup.keep:
            assert torch.equal(batch[ROWS:][key], expected[key]), key


def test_a_batch_is_played_by_the_weights_as_the_last_update_left_them(setup):
    before = setup.collector.rollout()
    setup.update(before.clone())
    after = setup.collector.rollout()
    ratios = [setup.update.loss(setup.update.advantage(batch))["max_ratio"].item() for batch in (before, after)]
    assert ratios[0] > 1.001
    assert ratios[1] == pytest.approx(1, abs=1e-6)


def test_a_batch_is_played_by_parameters_that_have_got_other_memory(setup):
    values = [parameter.detach().clone() for parameter in setup.policy.parameters()]
    for parameter in setup.policy.parameters():
        parameter.data = 3 * parameter.data + 0.1
    try:
        batch = setup.collector.rollout()
        assert setup.update.loss(setup.update.advantage(batch))["max_ratio"].item() == pytest.approx(1, abs=1e-5)
    finally:
        for parameter, value in zip(setup.policy.parameters(), values, strict=True):
            parameter.data = value


@pytest.mark.parametrize("when", ["in a rollout", "between batches"])
def test_a_worker_that_is_killed_is_started_anew_and_its_trials_are_counted(setup, caplog, when):
    collector = setup.collector
    if when == "between batches" and setup.backend == "ray":
        pytest.skip("in the training below")
    pids, deaths, lost = list(collector.pids), collector.deaths, collector.lost_trials
    before = collector.rollout()
    if when == "between batches":
        os.kill(pids[0], signal.SIGKILL)
    else:
        Path(setup.folder, "kill").touch()
    with caplog.at_level(logging.WARNING, "rl2_torchrl"):
        batch = collector.rollout()
    assert (collector.deaths, collector.lost_trials) == (deaths + 1, lost + ROWS)
    assert re.search(rf"worker \d has died \(.+\): the trials of its {ROWS} rows are lost", caplog.text)
    assert batch.shape == before.shape
    require_trials(batch)
    tasks = torch.cat([each["task"][:, ::EPISODES].flatten(0, 1) for each in (before, batch)])
    assert len(tasks.unique(dim=0)) == len(tasks)  # it does not play again what the dead one has played
    [killed] = set(pids) - set(collector.pids)
    assert has_ended(killed)


def test_of_a_killed_worker_the_one_that_is_started_anew_is_asked(setup):
    deaths, killed = setup.collector.deaths, setup.collector.pids[0]
    os.kill(killed, signal.SIGKILL)
    assert setup.collector.of_env(rows_and_process) == (ROWS, setup.collector.pids[0])
    assert setup.collector.pids[0] != killed
    assert setup.collector.deaths == deaths + 1


def test_workers_do_what_they_are_told_before_they_play_those_started_anew_too(setup):
    setup.collector.before_play = partial(leaves_its_number, setup.folder)
    before = set(setup.collector.pids)
    Path(setup.folder, "kill").touch()
    try:
        setup.collector.rollout()
    finally:
        setup.collector.before_play = None
    told = {int(path.stem): path.suffix for path in setup.folder.glob("*.told-*")}
    assert set(told) == before | set(setup.collector.pids)
    assert set(told.values()) == {f".told-{ROWS}"}


@pytest.mark.parametrize("fixed", [False, True])
def test_the_same_tasks_in_all_workers_are_found_unless_they_are_a_list(setup, fixed):
    given = torch.rand(64, ARMS, generator=torch.Generator().manual_seed(0))
    setup.collector.before_play = partial(draws_from, TaskSampler.fixed(given).distribution if fixed else same_tasks)
    try:
        setup.collector.rollout()
        batch = setup.collector.rollout()
        if fixed:
            report = check_training(setup.collector, setup.update, batch)
            assert "a list on purpose" in report.unchecked["tasks_differ"]
            assert {"task_given", "policy_is_trained"} <= set(report.checked)
        else:
            with pytest.raises(TrainingCheckError, match="all 2 workers draw the same tasks"):
                check_training(setup.collector, setup.update, batch)
    finally:
        setup.collector.before_play = partial(draws_from, partial(tasks, setup.folder))
        setup.collector.rollout()
        setup.collector.before_play = None


def test_workers_by_a_copy_of_the_policy_that_is_trained_are_found(setup):
    batch, loss = setup.collector.rollout(), setup.update.loss
    other = PPOUpdate(RL2PPOLoss(*deepcopy((loss.actor_network, loss.critic_network))))
    with pytest.raises(TrainingCheckError, match="policy does not hold"):
        check_training(setup.collector, other, batch)


def test_an_error_in_a_worker_is_raised_here_and_says_where(setup):
    Path(setup.folder, "fail").touch()
    deaths = setup.collector.deaths
    with pytest.raises(ArithmeticError, match="no task could be drawn") as raised:
        setup.collector.rollout()
    text = "\n".join([*getattr(raised.value, "__notes__", []), str(raised.value)])
    assert re.search(r"worker \d", text)
    assert "tests/workers.py" in text
    assert setup.collector.deaths == deaths


class Kill(Callback):
    """Kills a worker after an update."""

    def __init__(self, collector, after=2):
        self.collector, self.after, self.updates, self.pids = collector, after, 0, set(collector.pids)

    def after_update(self, row, progress):
        self.updates += 1
        if self.updates == self.after:
            os.kill(self.collector.pids[1], signal.SIGKILL)
        if self.updates == self.after + 1:
            self.pids |= set(self.collector.pids)


def test_a_training_with_a_killed_worker_makes_all_its_updates(setup):
    collector = setup.collector
    lost, collector.total_frames = collector.lost_trials, collector._frames + 5 * FRAMES
    kill = Kill(collector)
    result = train(collector, setup.update, callbacks=[kill], evaluate=None, progress=False)
    assert (len(result.history), result.lost_trials) == (5, lost + ROWS)
    assert [row["train/lost_trials"] - lost for row in result.history] == [0, 0, *[ROWS] * 3]
    collector.shutdown()
    assert len(kill.pids) == WORKERS + 1
    assert all(map(has_ended, kill.pids))


def test_a_resumed_training_counts_on_and_begins_trials_that_no_worker_has_played(tmp_path, caplog):
    options = {"evaluate": None, "progress": False, "checkpoints": tmp_path / "run"}
    first, second = (Setup(tmp_path, total_frames=updates * FRAMES) for updates in (5, 7))
    seen = Seen()
    result = train(first.collector, first.update, callbacks=[Kill(first.collector), seen], **options)
    with caplog.at_level(logging.WARNING, "rl2_torchrl"):
        resumed = train(second.collector, second.update, callbacks=[seen], resume=True, **options)
    first.collector.shutdown()
    second.collector.shutdown()
    assert (len(resumed.history), resumed.lost_trials, resumed.env_steps) == (7, ROWS, 7 * FRAMES)
    assert list(resumed.history)[:5] == list(result.history)
    assert "begins new trials: the collector's envs are in other processes" in caplog.text
    tasks = torch.cat(seen.tasks)[:, ::EPISODES].flatten(0, 1)
    assert len(tasks.unique(dim=0)) == len(tasks)


def test_a_training_with_other_envs_in_its_workers_is_refused_and_one_whose_env_has_moved_is_not(tmp_path):
    options = {"evaluate": None, "progress": False, "check": False, "checkpoints": tmp_path / "run"}
    first = Setup(tmp_path, total_frames=2 * FRAMES, make_env=make_counting_env, seed=None)
    train(first.collector, first.update, stop=lambda row: True, **options)
    assert len(train(first.collector, first.update, resume=True, **options).history) == 2
    first.collector.shutdown()
    other = Setup(tmp_path, total_frames=3 * FRAMES, make_env=partial(make_counting_env, goal=8), seed=None)
    with pytest.raises(ValueError, match=r"other settings \(env.goal: 7 then, 8 now\)"):
        train(other.collector, other.update, resume=True, **options)
    result = train(other.collector, other.update, resume=True, resume_changes=["env.goal"], **options)
    other.collector.shutdown()
    assert len(result.history) == 3


def test_workers_take_the_place_of_a_collector_in_this_process_and_the_other_way_round(tmp_path):
    changes = ["collector.class", "env.TaskSampler.seed", "env.seed"]
    options = {"evaluate": None, "progress": False, "check": False, "checkpoints": tmp_path / "run"}
    own = Setup(tmp_path, total_frames=2 * FRAMES)
    for updates in (1, 2, 3):
        collector = own.collector
        if updates != 2:
            sizes = {"frames_per_batch": FRAMES, "total_frames": updates * FRAMES}
            collector = TrialCollector(make_env(tmp_path), own.policy, keep=own.keep, **sizes)
        resumes = {"resume": True, "resume_changes": changes} if updates > 1 else {}
        result = train(collector, own.update, **resumes, **options)
        assert (len(result.history), result.env_steps) == (updates, updates * FRAMES)
        assert len(result.new_trials) == updates - 1
        collector.shutdown()


def test_what_is_saved_after_an_error_in_a_rollout_knows_of_the_deaths_before(tmp_path):
    own = Setup(tmp_path, total_frames=9 * FRAMES)

    def fails(row):
        if row["env_steps"] == 2 * FRAMES:
            Path(tmp_path, "fail").touch()

    options = {"evaluate": None, "progress": False, "check": False, "checkpoints": tmp_path / "run", "stop": fails}
    with pytest.raises(ArithmeticError):
        train(own.collector, own.update, callbacks=[Kill(own.collector, after=1)], **options)
    own.collector.shutdown()
    (path,) = Path(tmp_path, "run").glob("*.safetensors")
    state = load_tree(path)["state"]["collector"]
    assert {name: state[name] for name in ("frames", "deaths", "lost_trials", "lives")} == {
        "frames": 2 * FRAMES,
        "deaths": 1,
        "lost_trials": ROWS,
        "lives": WORKERS + 1,
    }


class Seen(Callback):
    def __init__(self):
        self.tasks, self.rewards = [], []

    def after_batch(self, batch, progress):
        self.tasks.append(batch["task"].clone())
        self.rewards.append(batch["next", "reward"].clone())


def test_a_worker_that_dies_each_time_ends_the_run_with_the_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(trial_workers, "MOST_DEATHS", 1)
    own = Setup(tmp_path)
    Path(tmp_path, "kill").touch()
    with pytest.raises(RuntimeError, match=r"has died 1 times in a row \(exit code -9\).*is there memory"):
        own.collector.rollout()
    own.collector.shutdown()


def test_a_worker_that_dies_while_it_is_started_anew_is_started_once_more(tmp_path, caplog):
    own = Setup(tmp_path, workers=1)
    for name in ("kill", "kill-next"):
        Path(tmp_path, name).touch()
    try:
        assert own.collector.rollout().numel() == FRAMES
        assert (own.collector.deaths, own.collector.lost_trials) == (2, ROWS)
        assert "worker 0 has died (while it was starting): the trials of its 0 rows are lost" in caplog.text
    finally:
        own.collector.shutdown()


def test_the_returns_of_a_trial_that_is_lost_do_not_count_for_the_next(tmp_path):
    batch = WORKERS * ROWS * 4  # four of five steps of a trial
    own = Setup(tmp_path, bptt=4, frames_per_batch=batch, total_frames=3 * batch)
    kill, seen = Kill(own.collector, after=1), Seen()
    result = train(own.collector, own.update, evaluate=None, progress=False, check=False, callbacks=[kill, seen])
    own.collector.shutdown()
    rewards = torch.cat(seen.rewards[1:], 1).squeeze(
        -1
    )  # [rows, 8]: those of the worker that was killed begin trials here
    earned = [seen.rewards[0][:ROWS].sum((1, 2)) + rewards[:ROWS, 0], rewards[ROWS:, :EPISODES].sum(1)]
    assert result.history[1]["train/trial_return"] == pytest.approx(earned[0].mean().item())
    # The third batch ends the trials that both have begun in the second, one step apart.
    earned[0] = rewards[:ROWS, 1 : 1 + EPISODES].sum(1)
    assert result.history[2]["train/trial_return"] == pytest.approx(torch.cat(earned).mean().item())


TRAINING = """
    import logging, multiprocessing, sys
    from rl2_torchrl import train
    from tests.workers import FRAMES, Setup

    if __name__ == "__main__":
        logging.basicConfig()
        multiprocessing.set_forkserver_preload(["rl2_torchrl"])
        multiprocessing.set_start_method("forkserver", force=True)
        own = Setup(sys.argv[1], total_frames=10**9)
        def told(row):
            if row["env_steps"] == 2 * FRAMES:
                print("pids", *own.collector.pids, flush=True)
        result = train(own.collector, own.update, evaluate=None, progress=False, check=False, stop=told)
        print("interrupted", result.interrupted, own.collector.deaths, flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="there are no process groups")
def test_workers_leave_ctrl_c_to_the_training(tmp_path):
    script = tmp_path / "training.py"
    script.write_text(textwrap.dedent(TRAINING))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    options = {"env": environment, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    process = subprocess.Popen([sys.executable, script, tmp_path], **options)
    pids = next(line for line in process.stdout if line[:4] == "pids").split()[1:]
    os.killpg(process.pid, signal.SIGINT)
    assert "interrupted True 0" in process.communicate(timeout=300)[0]
    assert process.returncode == 0
    assert all(map(has_ended, pids))


def test_workers_end_when_the_training_is_killed(tmp_path):
    own = Setup(tmp_path)
    pids = list(own.collector.pids)
    for host in own.collector._hosts:
        host.collector.pipes[0].close()  # as the end of this process would
    assert all(map(has_ended, pids))
    own.collector.shutdown()
    calls = (own.collector.rollout, own.collector.reset, lambda: own.collector.of_env(str))
    for call in (*calls, lambda: own.collector.set_seed(0)):
        with pytest.raises(RuntimeError, match="have been shut down, and their envs are gone"):
            call()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"workers": 0}, ValueError, "workers=0 must be a whole number, at least 1"),
        ({"workers": 2.0}, ValueError, "workers=2.0 must be a whole number"),
        ({"workers": True}, ValueError, "workers=True must be a whole number"),
        ({"seed": "0"}, TypeError, "seed='0' is no whole number"),
        ({"workers": 3}, ValueError, "workers=3 must divide frames_per_batch=80"),
        ({"backend": "threads"}, ValueError, "choose one of"),
        ({"frames_per_batch": 80.0}, ValueError, "frames_per_batch=80.0 must be a whole number"),
        ({"keep": "trans"}, TypeError, "keep"),
    ],
)
def test_what_cannot_be_played_is_refused_before_a_process_starts(tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        Setup(tmp_path, **options)


def test_an_env_in_place_of_a_function_is_refused(tmp_path):
    with pytest.raises(TypeError, match="each worker makes an env"):
        TrialWorkers(make_env(tmp_path), lambda td: td, workers=1, frames_per_batch=20)


def test_ray_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("rl2_torchrl.workers.hosts.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "rl2_torchrl\[ray\]"'):
        Setup(tmp_path, backend="ray")


def test_an_error_while_a_worker_starts_is_raised_here():
    with pytest.raises(FileNotFoundError, match="no such env"):
        TrialWorkers(_no_env, GRUCategoricalActor(5, 3), workers=1, frames_per_batch=20)


def _no_env():
    raise FileNotFoundError("no such env")


@pytest.mark.usefixtures("unpainted")
@pytest.mark.parametrize("name", ["grid_navi", "half_cheetah", "tabular_mdp", "cartpole"])
def test_a_recipe_trains_with_workers(name, tmp_path, monkeypatch):
    recipe, options = {
        "grid_navi": (grid_navi, {"env_steps": 4 * 480}),
        "half_cheetah": (half_cheetah, {"horizon": 3, "env_steps": 4 * 48}),
        "tabular_mdp": (tabular_mdp, {"episodes": 2, "env_steps": 4 * 160, "classical": False}),
        "cartpole": (cartpole, {"env_steps": 4 * 8 * cartpole.BATCH_STEPS}),
    }[name]
    if name == "half_cheetah":
        pytest.importorskip("mujoco")
    else:
        options |= {"minibatches": 2, "epochs": 1, "critic_keys": ("task",)}
    tiny = {"trials": 8, "units": 4, "report_tasks": 4, "progress": False, "log_dir": tmp_path, **options}
    with pytest.raises(ValueError, match="trials=8 cannot be shared out evenly among workers=3"):
        recipe.main(**arguments(recipe.main, {**tiny, "workers": 3}))
    played, rollout = [], TrialWorkers.rollout
    monkeypatch.setattr(TrialWorkers, "rollout", lambda self: played.append(rollout(self)) or played[-1])
    report = recipe.main(**arguments(recipe.main, {**tiny, "workers": 2}))
    assert len(report.train.history) == len(played) == 4
    assert (tmp_path / "agent.safetensors").exists()
    if name == "grid_navi":
        # A training draws its goals. Evaluations go through them in turn, which all workers would do alike.
        mine, others = played[0]["task"][:, 0].chunk(2)
        assert not torch.equal(mine, others)
