"""The benchmark recipes at tiny sizes: what they promise to write, never how fast they are."""

import json
from dataclasses import replace

import pytest
import torch

from recipes import (
    benchmark,
    evaluation_benchmark,
    gru_benchmark,
    gym_benchmark,
    half_cheetah,
    locomotion_benchmark,
    workers_benchmark,
)


@pytest.fixture(autouse=True)
def threads_as_before():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def small_peak(monkeypatch):
    monkeypatch.setattr(benchmark, "matmul_peak", lambda device: 1e9)


def test_json_holds_every_phase_and_all_runs(tmp_path):
    file = tmp_path / "speed.json"
    benchmark.main(workload="all", repeats=2, threads=1, trials=8, units=4, json=file)
    stored = json.loads(file.read_text())
    assert set(stored) == {"W1", "W2", "W3"}
    for name, row in stored.items():
        assert (row["trials"], row["units"]) == (8, 4)
        assert row["arms"] == benchmark.WORKLOADS[name].arms
        for phase in ("collect", "advantage", "update", "total"):
            assert len(row["runs"][phase]) == 2
            assert min(row["runs"][phase]) <= row[f"{phase}_steps_per_second"] <= max(row["runs"][phase])
        assert row["fraction_of_peak"] == pytest.approx(row["gflops"])  # of a peak of 1 GFLOP/s


def test_workloads_play_on_tensors():
    workload = benchmark.Workload(arms=3, pulls=4, trials=8, units=4, minibatches=2)
    collector, update = benchmark.compose(workload)
    assert (collector.backend, collector.reason) == ("tensors", None)
    assert "actor_hidden" not in update.in_keys
    # By hand: inputs 3 + 2; gates 3 * 4 * (5 + 4), heads 4 * (3 + 1); twice that forward, and 3 passes' worth in 4 epochs.
    assert workload.step_flops == 2 * (108 + 16) * 13


def test_scaling_study_writes_a_plot(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "SCALING", [("trials", (4, 8)), ("units", (2, 4))])
    figures = benchmark.main(workload="W3", repeats=1, trials=8, units=4, scaling=tmp_path / "plots")
    assert set(figures["scaling"]) == {"trials 4", "trials 8", "units 2", "units 4"}
    assert (tmp_path / "plots" / "scaling.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("module", [benchmark, evaluation_benchmark, gru_benchmark, gym_benchmark, workers_benchmark])
def test_nothing_to_time_is_refused(module):
    with pytest.raises(ValueError, match="repeats=0: at least one run must be timed"):
        module.main(repeats=0)


@pytest.mark.parametrize(
    ("message", "bad"),
    {
        "workers is empty: name numbers of them": {"workers": ()},
        r"workers=\[3\] cannot share 1024 rows of bandit evenly: name divisors": {"workers": (2, 3)},
        r"workers=\[4\] cannot share 10 rows of pendulum evenly": {
            "workload": "pendulum",
            "rows": 10,
            "workers": (2, 4),
        },
        r"workers=\[0\] cannot share": {"workers": (0,)},
        r"workers=\[1\] cannot share 0 rows": {"workers": (1,), "rows": 0},
    }.items(),
)
def test_workers_that_cannot_share_the_rows_are_refused_at_once(message, bad, monkeypatch):
    monkeypatch.setattr(workers_benchmark, "measure", lambda *_: pytest.fail("measured before it was checked"))
    with pytest.raises(ValueError, match=message):
        workers_benchmark.main(**bad)


def test_gru_table_compares_every_backend():
    figures = gru_benchmark.main(rows=(2,), units=(4,), steps=3, inputs=2, repeats=1, threads=1)
    assert set(figures) == {"2x4 one step", "2x4 forward", "2x4 forward + backward"}
    assert all(set(times) == {"pad", "scan", "python", "fast"} for times in figures.values())


def test_evaluations_are_timed_by_rows(tmp_path):
    file = tmp_path / "a folder to be made" / "evaluation.json"
    evaluation_benchmark.main(rows=(2, 3), tasks=7, arms=2, pulls=3, units=4, repeats=3, threads=1, json=file)
    stored = json.loads(file.read_text())
    assert set(stored) == {"2", "3"}
    for rows, figure in stored.items():
        assert len(figure["runs"]) == 3
        assert figure["seconds"] == sorted(figure["runs"])[1]
        steps = {"2": 4 * 3, "3": 3 * 3}[rows]  # the last round has rows to spare
        assert figure["microseconds_per_step"] == pytest.approx(1e6 * figure["seconds"] / steps)


@pytest.mark.parametrize("rows", [(), (64, 0)])
def test_evaluations_of_no_rows_are_refused(rows):
    with pytest.raises(ValueError, match="rows=.*: name numbers of trials side by side"):
        evaluation_benchmark.main(rows=rows, repeats=1)


def test_a_device_that_did_nothing_was_not_busy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert benchmark.device_busy(lambda: torch.ones(10).sum()) == 0


def test_cheetahs_are_timed_on_the_same_work(tmp_path):
    file = tmp_path / "cheetahs.json"
    locomotion_benchmark.main(rows=(1, 3), threads=2, steps=4, repeats=2, training=False, json=file)
    stored = json.loads(file.read_text())
    assert set(stored) == {"1", "3"}
    for rows, figure in stored.items():
        assert figure["difference"] == 0  # the env leaves its cheetahs where bare MuJoCo does
        names = {"mujoco.rollout", "env.play", "env.rollout", "backend mujoco"}
        assert names == set(figure["share"]) == set(figure["steps_per_second"]) == set(figure["seconds_per_step"])
        assert figure["share"]["mujoco.rollout"] == 1
        for name, seconds in figure["seconds_per_step"].items():
            assert len(seconds) == 2
            speeds = sorted(int(rows) / own for own in seconds)
            assert speeds[0] <= figure["steps_per_second"][name] <= speeds[1]


def test_cheetahs_trainings_are_timed_phase_by_phase(monkeypatch):
    def tiny(task, mode):
        given = settings(task, mode)
        return given | {"episodes": 1, "learning": replace(given["learning"], trials=2, epochs=1, minibatches=2)}

    settings = half_cheetah.cheetah_settings
    monkeypatch.setattr(half_cheetah, "cheetah_settings", tiny)
    figures = locomotion_benchmark.main(rows=(1,), threads=1, steps=2, repeats=2)["training"]
    assert set(figures) == {"original", "trial"}
    for figure in figures.values():
        for phase in ("collect", "advantage", "update", "total"):
            assert len(figure["runs"][phase]) == 2
            assert min(figure["runs"][phase]) <= figure[f"{phase}_steps_per_second"] <= max(figure["runs"][phase])
        # A phase alone is faster than all of them together.
        assert min(figure["runs"]["collect"]) > min(figure["runs"]["total"])


def test_no_cheetahs_to_time():
    with pytest.raises(ValueError, match="steps=0"):
        locomotion_benchmark.main(steps=0)


@pytest.mark.parametrize("env", ["CartPole-v1", "Acrobot-v1"])  # with a task and without
def test_gym_benchmark_times_every_phase_and_the_env_alone(env, tmp_path):
    file = tmp_path / "gym.json"
    gym_benchmark.main(env=env, num_envs=4, steps=8, units=4, repeats=2, json=file)
    stored = json.loads(file.read_text())
    for phase in ("collect", "update", "total", "env"):
        assert stored[f"{phase}_steps_per_second"] > 0
    assert len(stored["runs"]["total"]) == 2


def test_gym_benchmark_shares_the_envs_out():
    figures = gym_benchmark.main(env="CartPole-v1", num_envs=4, steps=8, units=4, workers=2, repeats=1)
    assert len(figures["runs"]["collect"]) == 1
    with pytest.raises(ValueError, match="num_envs=4 .* workers=3: choose a multiple"):
        gym_benchmark.main(num_envs=4, workers=3)
