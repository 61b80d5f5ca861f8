"""The cheetah's modes and tasks, its report of speeds, its film and its stop goals."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recipe_runs import BeforeTraining, result_of, run
from tensordict import TensorDict

from recipes import (
    half_cheetah,
)
from recipes.experiment import Experiment
from recipes.run import Run
from rl2_torchrl import GRUGaussianActor, TaskSampler, Trial


@pytest.mark.parametrize("mode", ["trial", "original"])
@pytest.mark.parametrize("task", ["direction", "velocity"])
def test_cheetahs_modes_and_tasks(mode, task, tmp_path):
    run("half_cheetah", tmp_path, mode=mode, task=task, updates=1, painted=task == "velocity")
    stored = json.loads((tmp_path / "report.json").read_text())
    episodes = half_cheetah.cheetah_settings(task, mode)["episodes"]
    tables = [stored["forward"], stored["backward"]] if task == "direction" else [stored["speed_error"]]
    for table in tables:
        assert set(table) == {"agent", "greedy", "memory_zeroed", "rewards_shuffled"}
        for entry in table.values():
            per_episode = entry if task == "direction" else entry["per_episode"]
            assert len(per_episode) == episodes
            assert all(map(math.isfinite, per_episode))
    assert (tmp_path / "velocity.png").read_bytes().startswith(b"\x89PNG")


def test_a_title_tells_runs_of_other_tasks_and_modes_apart(tmp_path):
    names = {
        "direction (task told in training: critic)": {"task": "direction"},
        "direction, original mode (rewards only)": {"task": "direction", "mode": "original"},
        "velocity up to 2 m/s (rewards only)": {"task": "velocity", "critic_keys": ()},
        "velocity up to 2.5 m/s (task told in training: critic)": {"task": "velocity", "max_velocity": 2.5},
    }
    for number, (name, options) in enumerate(names.items()):
        report = run("half_cheetah", tmp_path / str(number), updates=1, **options)
        assert report.title == f"RL² on HalfCheetah, {name}"
    weights = tmp_path / "0" / "agent.safetensors"
    played = run("half_cheetah", tmp_path / "played", weights=weights)
    assert played.title == "RL² on HalfCheetah, direction (agent.safetensors)"


@pytest.mark.parametrize(("task", "tasks", "steps"), [("direction", 4, 800), ("velocity", 10, 1200)])
def test_original_mode_is_the_first_implementation(task, tasks, steps, tmp_path, monkeypatch):
    # Its defaults, and its meta-batches: 4 tasks of 800 steps and 10 of 1200, episodes of 200 steps.
    def stop(self, collector, update, **_):
        raise BeforeTraining(collector, update)

    monkeypatch.setattr(Experiment, "train", stop)
    with pytest.raises(BeforeTraining) as stopped:
        half_cheetah.main(task=task, mode="original", run=Run(tmp_path))
    collector, update = stopped.value.args
    (trial,) = [transform for transform in collector.env.transform if isinstance(transform, Trial)]
    assert (trial.episodes, collector.env.base_env.max_episode_steps) == (steps // 200, 200)
    assert (collector.env.batch_size, collector.requested_frames_per_batch) == ((tasks,), tasks * steps)
    loss, advantage, options = update.loss, update.advantage, update.optimizer.param_groups[0]
    assert (update.epochs, update.bptt, update.shuffle, update.max_grad_norm) == (10, 1, False, None)
    assert update.minibatches == tasks * steps // 32
    assert (options["lr"], update.lr_schedule, update.entropy_schedule) == (1e-4, None, None)
    assert (advantage.gamma, advantage.lmbda, advantage.value_target) == (0.99, 0.97, "return")
    assert not advantage.scale_rewards
    assert float(loss.clip_epsilon) == pytest.approx(0.3)
    assert (float(loss.critic_coeff), loss.entropy_bonus) == (0.5, False)


@pytest.mark.parametrize("task", ["direction", "velocity"])
def test_the_cheetah_scales_rewards_and_its_entropy_bonus_decays(task):
    trials = half_cheetah.CheetahTrials(task, episodes=2, horizon=4, max_velocity=2.0, seed=0)
    settings = half_cheetah.cheetah_settings(task)
    learning = replace(settings["learning"], trials=2, minibatches=2)
    _, update = half_cheetah.compose(trials, "trial", settings["network"], learning)
    assert (update.advantage.scale_rewards, update.loss.entropy_bonus) == (True, True)
    assert float(update.loss.entropy_coeff) == pytest.approx(0.01)
    assert (update.lr_schedule(0.5), update.entropy_schedule(0.5)) == (0.5, 0.5)


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_report_leaves_out_a_direction_that_no_task_has(tmp_path, monkeypatch):
    monkeypatch.setattr(half_cheetah.Cheetahs, "tasks", lambda cheetahs, stream, number: torch.ones(number, 1))
    run("half_cheetah", tmp_path, updates=1)
    stored = json.loads((tmp_path / "report.json").read_text())
    assert not [name for name in (*stored, *stored["summary"]) if name.startswith("backward")]
    assert all(map(math.isfinite, stored["forward"]["agent"]))


@pytest.mark.filterwarnings("error::UserWarning")
def test_a_report_has_directions_of_one_task_each(tmp_path, monkeypatch):
    one_each = torch.tensor([[1.0], [-1.0]])
    monkeypatch.setattr(half_cheetah.Cheetahs, "tasks", lambda cheetahs, stream, number: one_each)
    stored = run("half_cheetah", tmp_path, updates=1, report_tasks=2).to_dict()
    assert all(map(math.isfinite, [*stored["forward"]["agent"], *stored["backward"]["agent"]]))


@pytest.fixture
def drawn(monkeypatch):
    """Pictures without OpenGL."""

    def black(env, row, *, width, height):
        return torch.zeros(height, width, 3, dtype=torch.uint8)

    monkeypatch.setattr(half_cheetah.HalfCheetahDirection, "render", black)


def test_filming_changes_nothing_else(tmp_path, drawn):
    filmed = run("half_cheetah", tmp_path / "filmed", seed=3, video=True)
    assert result_of(filmed) == result_of(run("half_cheetah", tmp_path / "not", seed=3))
    for name in ("untrained.mp4", "trial.mp4"):
        assert (tmp_path / "filmed" / name).stat().st_size > 0
    assert not list((tmp_path / "not").glob("*.mp4"))


def test_the_first_film_is_of_what_the_training_begins_with(tmp_path, drawn, monkeypatch):
    run("half_cheetah", tmp_path / "first")
    weights, filmed = tmp_path / "first" / "agent.safetensors", {}
    film = half_cheetah.Cheetahs.film

    def noted(cheetahs, path):
        filmed[path.stem] = [weight.clone() for weight in cheetahs.actor.state_dict().values()]
        return film(cheetahs, path)

    monkeypatch.setattr(half_cheetah.Cheetahs, "film", noted)
    run("half_cheetah", tmp_path / "on", video=True, initial_weights=weights, lr=0.0)
    assert all(map(torch.equal, filmed["untrained"], filmed["trial"]))
    filmed.clear()
    run("half_cheetah", tmp_path / "played", video=True, weights=weights)
    assert [*filmed] == [path.stem for path in (tmp_path / "played").glob("*.mp4")] == ["trial"]


def test_films_are_put_away_and_those_of_a_refused_training_are_not_written(tmp_path, drawn):
    (tmp_path / "agent.safetensors").touch()
    (tmp_path / "untrained.mp4").write_bytes(b"of the earlier run")
    with pytest.raises(ValueError, match="100 minibatches"):
        run("half_cheetah", tmp_path, video=True, minibatches=100)
    assert (tmp_path / "untrained.mp4").read_bytes() == b"of the earlier run"
    run("half_cheetah", tmp_path, video=True)
    assert (tmp_path / "earlier" / "untrained.mp4").read_bytes() == b"of the earlier run"
    assert (tmp_path / "untrained.mp4").stat().st_size > 100


def test_errors_of_speed_are_made_positive_before_any_mean():
    record = half_cheetah.VelocityRecord()
    for velocity in ([1.0, 3.0], [3.0, 2.0], [2.0, 0.0], [2.0, 2.0]):
        step = {"next": {"velocity": torch.tensor(velocity).unsqueeze(-1)}, "task": torch.full((2, 1), 2.0)}
        record(TensorDict(step, [2]))
    assert record.errors(episodes=2).returns.tolist() == [[2.0, 0.0], [1.0, 2.0]]
    assert record.velocities.tolist() == [[1.0, 3.0, 2.0, 2.0], [3.0, 2.0, 0.0, 2.0]]


def test_the_last_velocity_of_an_episode_is_recorded():
    """An inner reset puts the cheetah to rest; the velocity of the step before it must not be lost."""
    trials = half_cheetah.CheetahTrials("velocity", episodes=2, horizon=4, max_velocity=2.0, seed=0)
    actor = GRUGaussianActor.from_env(trials.env(TaskSampler.fixed(torch.ones(3, 1)), 3), hidden_size=4)
    record = half_cheetah.VelocityRecord()
    half_cheetah.Cheetahs(actor, trials, Run(Path(), report_tasks=3)).play(torch.ones(3, 1), on_step=record)
    assert record.velocities.shape == (3, 8)
    assert (record.velocities != 0).all()


def test_cheetahs_stop_goals():
    row = {"eval/trial_return": 0.0, "eval/last_forward": 181.0, "eval/last_backward": 180.0}
    stop = half_cheetah.StopAtGoal("direction")
    rows = [row, row, {}, {**row, "eval/last_forward": 179.0}, row, {"train/loss": 1.0}, row, row]
    assert [stop(r) for r in rows] == [False] * 7 + [True]
    other = half_cheetah.StopAtGoal("direction")
    other.load_state_dict(stop.state_dict())
    assert other(row)  # held, as of the run that is gone on with
    stop, row = half_cheetah.StopAtGoal("velocity"), {"eval/trial_return": 0.0, "eval/last_speed_error": 25.0}
    assert [stop(r) for r in [row, row, {**row, "eval/last_speed_error": 25.1}, row, row, row]] == [False] * 5 + [True]
