"""Envs of recipes: what a task changes in them, and that they play."""

import pickle
from dataclasses import replace
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch

from recipes import (
    pendulum,
    walker,
)
from recipes.command import arguments
from rl2_torchrl import TaskSampler
from rl2_torchrl.envs import HalfCheetahDirection
from rl2_torchrl.testing import check_trial_env


def test_a_pendulum_has_the_physics_of_its_task_and_is_seen_at_its_scales():
    plain, scaled = pendulum.scaled_pendulum(), pendulum.scaled_pendulum(10.0, 100.0)
    for each in (plain, scaled):
        pendulum.set_physics(each.unwrapped, torch.tensor([0.5, 2.0, 8.0]))
        each.reset(seed=0)
        each.unwrapped.state = np.array([np.pi / 2, 1.0])  # level, rad/s
    seen, cost, *_ = plain.step(np.array([2.0]))
    # Angular acceleration 3 g / (2 l) sin(angle) + 3 torque / (m l²) = 6 + 3 rad/s², over 0.05 s.
    speed, angle = 1.0 + 0.05 * 9.0, np.pi / 2 + 0.05 * 1.45
    np.testing.assert_allclose(seen, [np.cos(angle), np.sin(angle), speed], rtol=1e-5)
    assert cost == pytest.approx(-((np.pi / 2) ** 2 + 0.1 + 0.001 * 4))
    np.testing.assert_allclose(scaled.step(np.array([2.0]))[0], seen * [10.0, 10.0, 1000.0], rtol=1e-5)


def test_a_walker_has_the_body_of_its_task_and_the_next_ones_is_not_on_top():
    with gymnasium.make("Walker2d-v5") as env:
        each = env.unwrapped
        for name, values in walker.standard_body().items():  # the env's own model
            np.testing.assert_array_equal(values, getattr(each.model, name))
        mass, damping = each.model.body_mass.copy(), each.model.dof_damping.copy()
        for _ in range(2):
            walker.set_body(each, torch.ones(walker.task_size()))
            torch.testing.assert_close(each.model.body_mass, 1.5 * mass, rtol=1e-12, atol=0)
            torch.testing.assert_close(each.model.dof_damping, 1.3 * damping, rtol=1e-12, atol=0)
        assert each.model.body_subtreemass[0] == pytest.approx(1.5 * mass.sum())  # derived from the others
        walker.set_body(each, torch.zeros(walker.task_size()))
        torch.testing.assert_close(each.model.body_mass, mass)


def test_bodies_of_walkers_are_in_their_ranges():
    tasks = walker.bodies(torch.Size([1000]), torch.Generator().manual_seed(0))
    # 8 bodies with 3 inertias each, 9 degrees of freedom, and the ground's and 7 bodies' 3 frictions.
    assert tasks.shape == (1000, 8 + 24 + 9 + 24)
    assert -3 <= tasks.min() < -2.9
    assert 2.9 < tasks.max() <= 3


def test_physics_of_pendulums_are_in_their_ranges():
    tasks = pendulum.physics(torch.Size([1000]), torch.Generator().manual_seed(0))
    least, most = tasks.min(0).values, tasks.max(0).values
    torch.testing.assert_close(least, torch.tensor([0.6, 0.6, 6.0]), rtol=0.02, atol=0)
    torch.testing.assert_close(most, torch.tensor([1.2, 1.2, 12.0]), rtol=0.02, atol=0)


def test_a_memory_corridor(tmp_path):
    pytest.importorskip("minigrid")
    from recipes import minigrid_memory

    tiny = {"trials": 4, "units": 4, "report_tasks": 8, "epochs": 1, "env_steps": 4 * minigrid_memory.BATCH_STEPS}
    report = minigrid_memory.main(**arguments(minigrid_memory.main, {**tiny, "log_dir": tmp_path, "progress": False}))
    assert report.agent.measures["success"].returns.shape == (8, 1)
    assert ((report.agent.measures["success"].returns > 0) == (report.agent.returns > 0)).all()


def test_goals_to_find_again(tmp_path):
    pytest.importorskip("minigrid")
    from recipes import minigrid_goals

    tiny = {"trials": 4, "units": 4, "report_tasks": 8, "epochs": 1, "episodes": 2, "max_steps": 12}
    options = {**tiny, "env_steps": 4 * minigrid_goals.BATCH_STEPS, "log_dir": tmp_path, "progress": False}
    agent = minigrid_goals.main(**arguments(minigrid_goals.main, options)).agent
    steps, success = agent.steps.returns, agent.measures["success"].returns
    assert steps.shape == success.shape == (8, 2)
    # What MiniGrid pays, and that an episode lasts until the goal is reached or time is up.
    torch.testing.assert_close(agent.returns, success * (1 - 0.9 * steps / 12), rtol=0, atol=1e-6)
    assert (steps[success == 0] == 12).all()


def test_doors_and_goal_are_the_same_in_all_episodes_of_a_trial():
    pytest.importorskip("minigrid")
    from recipes import minigrid_goals
    from recipes.minigrid_envs import all_mazes

    mazes = all_mazes()
    # 3 of 9 rows, none next to another: C(7, 3) = 35 ways on each side.
    assert len({tuple(map(tuple, maze)) for maze in mazes.tolist()}) == len(mazes) == 35 * 35 * 6
    sampler = TaskSampler(partial(minigrid_goals.numbers, 100), seed=0)
    env = minigrid_goals.trial_env(mazes[:100], sampler, 3, episodes=2, max_steps=9)

    def tasks(halls):
        return torch.tensor([(mazes[:100] == row.unwrapped.maze).all((1, 2)).argmax() for row in halls.envs.envs])

    check_trial_env(env, task_of=tasks)


def test_a_goal_is_out_of_view_until_its_door_is_open():
    pytest.importorskip("minigrid")
    from minigrid.core.constants import OBJECT_TO_IDX

    from recipes.minigrid_envs import Doors, OneHotView, all_mazes

    hall, goal = OneHotView(Doors(max_steps=30)), OBJECT_TO_IDX["goal"]
    left, right, forward, toggle = range(4)
    for maze in all_mazes()[:50]:
        hall.unwrapped.set_task(maze)
        seen = [hall.reset()[0]["view"]]
        x, y = maze[0]
        down = [left, left] if y > 5 else []
        walk = [*down, *[forward] * abs(y - 5), left if (x == 2) == (y <= 5) else right]
        seen += [hall.step(action)[0]["view"] for action in walk]
        assert not np.stack(seen)[:, goal].any()
        assert hall.step(toggle)[0]["view"][goal].sum() == 1
        hall.step(forward)
        _, reward, terminated, _, info = hall.step(forward)
        assert terminated
        assert info == {"success": True}
        assert reward == pytest.approx(1 - 0.9 * (len(walk) + 3) / 30)


def test_test_tasks_of_all_envs_are_played_alike():
    from recipes.meta_world import spread

    assert (spread(250, torch.Size([50]), None) // 50).bincount().tolist() == [
        10
    ] * 5  # ML10's five test envs have 50 each
    assert torch.equal(spread(50, torch.Size([50]), None), torch.arange(50))
    assert spread(2, torch.Size([2, 2]), None).tolist() == [[0, 0], [1, 1]]


def test_goals_of_one_seed_are_not_tested_on_by_another(monkeypatch):
    from recipes import meta_world

    seeds = []
    monkeypatch.setattr(meta_world, "load_benchmark", lambda *args: seeds.append(args[-1]) or pytest.fail("enough"))
    for seed in range(3):
        with pytest.raises(pytest.fail.Exception):
            meta_world.main(run=replace(meta_world.RUN, seed=seed))
    # Meta-World tests on the goals that it would train on by the next seed.
    assert not {seed + 1 for seed in seeds} & set(seeds)


def test_a_task_beside_a_benchmark_of_several_is_refused():
    from recipes import meta_world

    with pytest.raises(ValueError, match="task='push-v3' is for ML1: ML10 has tasks of its own"):
        meta_world.main(benchmark="ML10", task="push-v3")


def test_a_title_says_what_a_robot_arm_learns():
    from recipes.meta_world import title_of

    assert title_of("ML1", "push-v3", True) == "RL² on Meta-World ML1 push-v3"
    assert title_of("ML10", "reach-v3", False) == "RL² on Meta-World ML10, not recombined"


def test_a_batch_of_one_trial_on_pendulums_is_reported(tmp_path, monkeypatch):
    from recipes import brax_pendulum

    def cheetahs(rows):  # in place of Brax, an extra
        return HalfCheetahDirection(batch_size=(rows,), horizon=4, seed=0)

    monkeypatch.setattr(brax_pendulum, "SignedPendulum", cheetahs)
    tiny = {"trials": 1, "units": 4, "steps": 10, "report_tasks": 4, "epochs": 1, "minibatches": 1, "env_steps": 1}
    options = {**tiny, "log_dir": tmp_path, "progress": False}
    report = brax_pendulum.main(**arguments(brax_pendulum.main, options))
    assert report.ablations["rewards_shuffled"].num_tasks == 4


@pytest.mark.parametrize("benchmark", ["ML1", "ML10"])
def test_a_robot_arm(benchmark, tmp_path):
    pytest.importorskip("metaworld")
    from recipes import meta_world

    tiny = {"trials": 2, "units": 4, "horizon": 50, "episodes": 2, "report_tasks": 4, "epochs": 1, "minibatches": 2}
    options = {**tiny, "benchmark": benchmark, "env_steps": 2 * 2 * 50, "log_dir": tmp_path, "progress": False}
    report = meta_world.main(**arguments(meta_world.main, options))
    assert report.agent.measures["success"].returns.shape == (4, 2)
    named = "ML1 reach-v3" if benchmark == "ML1" else benchmark
    assert report.title == f"RL² on Meta-World {named} (task told in training: belief)"


def test_training_tasks_of_a_robot_arm_pair_goals_with_other_objects():
    from recipes import meta_world

    def task(name, *place):
        return meta_world.Task(name, pickle.dumps({"rand_vec": np.array(place), "partially_observable": True}))

    # Objects at x = 0, 0.1 and 0.2; the third goal lies nearer to the first and second object than any goal to its own.
    places = [[0.0, 0, 0, 0.0, 0.5, 1], [0.1, 0, 0, 0.1, 0.5, 2], [0.2, 0, 0, 0.0, 0.46, 3]]
    tasks = [task("reach", *place) for place in places] + [task("door", 0.1, 0.2, 0.3), task("door", 0.4, 0.5, 0.6)]
    recombined = meta_world.recombine(tasks, seed=0)
    assert len(recombined) == 2 * meta_world.RECOMBINED
    reach = {tuple(pickle.loads(each.data)["rand_vec"]) for each in recombined if each.env_name == "reach"}
    pairs = {(*one[:3], *other[3:]) for one in places for other in places}
    assert reach == pairs - {(0.0, 0, 0, 0.0, 0.46, 3), (0.1, 0, 0, 0.0, 0.46, 3)}
    doors = [pickle.loads(each.data) for each in recombined if each.env_name == "door"]
    assert {tuple(each["rand_vec"]) for each in doors} == {(0.1, 0.2, 0.3), (0.4, 0.5, 0.6)}
    assert all(each["partially_observable"] for each in doors)
