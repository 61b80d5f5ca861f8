"""Recipes on other libraries' envs, at tiny sizes: the contracts hold for each, and what they report. Libraries may be missing."""

import gc
import json
import math
import sys
import weakref
from contextlib import closing
from functools import partial
from importlib import import_module
from pathlib import Path

import gymnasium
import pytest
import torch
from recipe_settings import unused
from tensordict import TensorDict
from torchrl.envs import Compose, DMControlEnv, DoubleToFloat, ParallelEnv, SerialEnv, TransformedEnv

from recipes import pop_gym
from recipes.command import arguments
from recipes.experiment import Experiment
from recipes.streams import HELD_OUT_TASKS
from rl2_torchrl import PreviousStep, TaskSampler, Trial, check_training
from rl2_torchrl.collector import load_rollout_state, rollout_state
from rl2_torchrl.envs import Resumable
from rl2_torchrl.envs.env_state import env_state, put_env_state
from rl2_torchrl.envs.layers import put_state, state_of
from rl2_torchrl.evaluation import AdaptationCurve
from rl2_torchrl.storage import from_bytes, to_bytes
from rl2_torchrl.testing import check_trial_env

#: Of each recipe's module: the library that it needs, options that make it tiny, and rules of `check_training` that nobody can
#: check there: of tasks that there are none of (an episode is one), or so few that training plays all of them.
NO_TASKS = {"task_constant", "tasks_drawn", "tasks_differ", "tasks_held_out", "task_hidden"}
FEW_TASKS = {"tasks_held_out"}
RECIPES = {
    "cartpole": ("gymnasium", {}, set()),
    "pendulum": ("gymnasium", {}, set()),
    "minigrid_memory": ("minigrid", {}, NO_TASKS),
    "minigrid_goals": ("minigrid", {}, FEW_TASKS),
    "meta_world": ("metaworld", {"horizon": 20}, FEW_TASKS),
    "pop_gym": ("popgym", {}, NO_TASKS),
    "point_mass": ("dm_control", {"steps": 13}, set()),
    "brax_pendulum": ("brax", {"steps": 20}, FEW_TASKS),
}
TINY = {"trials": 4, "units": 4, "report_tasks": 4, "epochs": 1, "minibatches": 2, "env_steps": 1, "progress": False}


def run(name, folder, **options):
    library, sizes, _ = RECIPES[name]
    pytest.importorskip(library)
    main = import_module(f"recipes.{name}").main
    return main(**arguments(main, {**TINY, **sizes, "log_dir": Path(folder), **options}))


class BeforeTraining(Exception):
    """Raised in place of a training, with what was to be trained."""


def stopped_before_training(name, folder, monkeypatch, **options):
    """The experiment of a recipe, its collector and its update."""

    def stop(self, collector, update, **_):
        raise BeforeTraining(self, collector, update)

    monkeypatch.setattr(Experiment, "train", stop)
    with pytest.raises(BeforeTraining) as stopped:
        run(name, folder, **options)
    return stopped.value.args


@pytest.mark.parametrize("name", RECIPES)
def test_contracts_hold(name, tmp_path, monkeypatch):
    # Frames for several batches, as the checks collect some.
    played, collector, update = stopped_before_training(name, tmp_path, monkeypatch, env_steps=1_000_000)
    has_tasks, unknown = RECIPES[name][2] is not NO_TASKS, RECIPES[name][2]
    held_out = played.tasks(HELD_OUT_TASKS, 8) if has_tasks else None
    # Where all trials are as long as a batch, none begins within one.
    assert set(check_training(collector, update, held_out=held_out).unchecked) - {"trials_apart"} == unknown
    check_trial_env(collector.env, task_key="task" if has_tasks else None)


@pytest.mark.parametrize("name", [name for name, (library, *_) in RECIPES.items() if library != "gymnasium"])
def test_what_was_played_is_played_again_from_a_checkpoint(name, tmp_path, monkeypatch):
    _, collector, _ = stopped_before_training(name, tmp_path, monkeypatch, env_steps=1_000_000)
    collector.rollout()
    saved = to_bytes({"tasks": collector.env.state_dict(), "rollout": rollout_state(collector)})
    batches = []
    for _ in range(2):
        state = from_bytes(saved, "the checkpoint")
        assert "missing" not in state["rollout"]
        collector.env.load_state_dict(state["tasks"])
        load_rollout_state(collector, state["rollout"])
        torch.manual_seed(0)
        batches.append(collector.rollout().clone())
    assert (batches[0] == batches[1]).all()


@pytest.mark.parametrize("entropy", [0.3, 0.0])
@pytest.mark.parametrize("name", [name for name, (library, *_) in RECIPES.items() if library != "gymnasium"])
def test_the_entropy_bonus_decays_as_it_is_told_and_may_be_left_out(name, entropy, tmp_path, monkeypatch):
    options = {"entropy": entropy, "entropy_decay": "late"}
    _, _, update = stopped_before_training(name, tmp_path, monkeypatch, **options)
    assert (update.lr_schedule(0.5), update.loss.entropy_bonus) == (0.5, entropy > 0)
    if entropy:
        assert (float(update.loss.entropy_coeff), update.entropy_schedule(0.5)) == (pytest.approx(0.3), 0.75)
    else:
        assert update.entropy_schedule is None


@pytest.mark.parametrize("name", [name for name, (library, *_) in RECIPES.items() if library != "gymnasium"])
def test_no_setting_is_without_effect(name, tmp_path, monkeypatch):
    def stopped(**options):
        return stopped_before_training(name, tmp_path, monkeypatch, **options)[1:]

    pytest.importorskip(RECIPES[name][0])
    assert unused(import_module(f"recipes.{name}").main, stopped, {**TINY, "entropy": 0.5}) == []


def test_what_has_been_played_leaves_the_memory(tmp_path, monkeypatch):
    played, _, _ = stopped_before_training("cartpole", tmp_path, monkeypatch)
    make_env, envs = played.make_env, []

    def recorded(sampler, rows):
        env = make_env(sampler, rows)
        envs.append(weakref.ref(env.base_env.envs))
        return env

    monkeypatch.setattr(played, "make_env", recorded)
    gc.disable()
    try:
        played.play(played.tasks(HELD_OUT_TASKS, 4))
        alive = [env() is not None for env in envs]
    finally:
        gc.enable()
    assert alive == [False]


# ---- MiniGrid


def kinds_in_view(observation):
    """Keys and balls that are seen, as MiniGrid numbers them."""
    kinds = observation["image"][..., 0]
    return sorted(kinds[(kinds == 5) | (kinds == 6)].tolist())


@pytest.mark.parametrize(("size", "seen"), [("S7", 3), ("S9", 3), ("S11", 2)])
def test_what_is_seen_in_the_room_is_out_of_view_at_a_long_corridors_end(size, seen):
    pytest.importorskip("minigrid")
    from recipes.minigrid_envs import Corridor

    env = Corridor(gymnasium.make(f"MiniGrid-Memory{size}-v0"), from_room=True)
    left, forward = 0, 2
    for seed in range(4):
        observation, info = env.reset(seed=seed)
        grid = env.unwrapped
        kind = grid.grid.get(1, grid.height // 2 - 1).type
        assert {"key": 5, "ball": 6}[kind] in kinds_in_view(observation)
        assert info["is_ball"] == (kind == "ball")
        for action in [forward] * (grid.width - 3) + [left] * 2:  # to the corridor's end, and a look back
            observation, _, terminated, _, info = env.step(action)
            assert info["is_ball"] == (kind == "ball")
        assert tuple(grid.agent_pos) == (grid.width - 2, grid.height // 2)
        assert not terminated
        assert len(kinds_in_view(observation)) == seen  # two at the end, to choose from, and that of the room
    assert env.action_space.n == 3


# ---- POPGym


def test_a_game_of_memory(tmp_path):
    report = run("pop_gym", tmp_path, env_steps=3 * 4 * pop_gym.BATCH_STEPS)
    paid = [row["train/trial_return"] for row in report.train.history]
    assert len(paid) == 3
    stored = json.loads((tmp_path / "report.json").read_text())
    assert stored["epoch_returns"] == [pytest.approx(sum(paid) / 3)]  # all within the first epoch
    assert stored["mmer"] == stored["mean_over_training"] == stored["epoch_returns"][0]
    assert report.agent.returns.shape == (4, 1)
    assert (report.agent.returns.abs() <= 1).all()


def test_returns_of_epochs(monkeypatch):
    monkeypatch.setattr(pop_gym, "EPOCH_STEPS", 10)
    # Batches of 4 steps: those that end at 4 and 8 are of the first epoch, at 12, 16 and 20 of the second; no episode ended at 16.
    paid = {4: 0.0, 8: 1.0, 12: 0.5, 16: math.nan, 20: -0.5, 24: 0.25}
    history = [{"env_steps": float(steps), "train/trial_return": value} for steps, value in paid.items()]
    epochs = pop_gym.epoch_returns(history)
    assert epochs == [0.5, 0.0]  # without the part of the third
    assert pop_gym.epoch_returns(history[:1]) == [0.0]
    assert pop_gym.epoch_returns([]) == []
    report = pop_gym.EpochsReport(*[AdaptationCurve(torch.zeros(2, 1))] * 2, epochs=epochs)
    assert report.entries()["mmer"] == 0.5
    assert report.entries()["mean_over_training"] == 0.25
    assert list(report.summary().items())[:2] == [("best epoch (MMER)", "0.500"), ("mean over training", "0.250")]
    report.epochs = [math.nan, 0.25]
    assert (report.entries()["mmer"], report.entries()["mean_over_training"]) == (0.25, 0.25)
    report.epochs = []  # of an agent that was only played
    assert set(report.entries()) == {"epoch_returns"}


@pytest.mark.parametrize(
    ("env_id", "size"),  # of the transition input: observations, actions, reward and done
    [
        ("RepeatFirstEasy", 4 + 4 + 2),  # Discrete
        ("AutoencodeEasy", 2 + 4 + 4 + 2),  # Tuple of Discrete
        ("CountRecallEasy", 2 + 2 + 27 + 2),  # MultiDiscrete
        ("PositionOnlyCartPoleEasy", 2 + 2 + 2),  # Box
        ("PositionOnlyPendulumEasy", 2 + 1 + 2),  # actions of a Box
        ("BattleshipEasy", 2 + 8 + 8 + 2),  # actions of a MultiDiscrete
    ],
)
def test_spaces_of_popgym(env_id, size, tmp_path, monkeypatch):
    played, collector, _ = stopped_before_training("pop_gym", tmp_path, monkeypatch, env_id=f"popgym-{env_id}-v0")
    assert collector.env.observation_spec["trans"].shape == (4, size)
    check_trial_env(played.make_env(None, 2), task_key=None)


def test_popgym_is_an_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "popgym", None)
    with pytest.raises(ImportError, match=r"rl2_torchrl\[popgym\]"):
        pop_gym.main(**arguments(pop_gym.main, {**TINY, "log_dir": tmp_path}))


# ---- DMControl


def test_a_hidden_target(tmp_path):
    report = run("point_mass", tmp_path)
    assert report.agent.returns.shape == (4, 2)


def test_the_target_lies_where_the_task_says():
    pytest.importorskip("dm_control")
    from recipes.point_mass import HiddenTarget

    env = HiddenTarget(steps=5)
    here, there = torch.tensor([0.1, 0.0]), torch.tensor([0.1, 0.29])
    for target in (here, there):
        env.reset(TensorDict(task=target))
        physics = env._env.physics
        for place in (here, there):
            with physics.reset_context():
                physics.named.data.qpos[:] = place.numpy()
            paid = env.step(TensorDict(action=torch.zeros(2, dtype=torch.float64)))["next", "reward"].item()
            # DMControl pays 1 on the target, and next to nothing at nearly three times its radius from it.
            assert (paid > 0.99) == torch.equal(place, target), (target, place, paid)
    # A reset that names no task keeps the one before: what is observed does not tell where the target is.
    assert env.model.geom_pos["target"][:2].tolist() == pytest.approx(there.tolist())
    assert set(env.observation_spec.keys()) == {"position", "velocity"}


@pytest.mark.parametrize("kind", [SerialEnv, ParallelEnv])
def test_workers_of_dmcontrol_are_sound(kind):
    pytest.importorskip("dm_control")
    from recipes.point_mass import HiddenTarget, targets

    workers = kind(2, lambda: HiddenTarget(8))
    trials = Compose(Trial(episodes=2), TaskSampler(targets, seed=0), DoubleToFloat(), PreviousStep())
    with closing(TransformedEnv(workers, trials)) as env:
        check_trial_env(env)


@pytest.mark.parametrize("kind", [SerialEnv, partial(ParallelEnv, mp_start_method="fork")])
def test_point_masses_go_on_in_mid_episode(kind):
    pytest.importorskip("dm_control")
    from recipes.point_mass import HiddenTarget

    def masses(seed):
        workers = kind(2, lambda: TransformedEnv(HiddenTarget(8), DoubleToFloat()))
        workers.set_seed(seed)
        targets = torch.tensor([[0.1, 0.0], [0.0, -0.1]]) * (-1) ** seed
        return workers, workers.reset(TensorDict(task=targets, batch_size=[2]))

    (ours, seen), (theirs, _) = masses(0), masses(1)
    with closing(ours), closing(theirs):
        pushes = torch.rand(20, 2, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1
        for push in pushes[:3]:
            ours.step(seen.set("action", push))
        put_env_state(theirs, env_state(ours))
        played = []
        for workers in (ours, theirs):
            data = TensorDict({"done": torch.zeros(2, 1, dtype=torch.bool)}, [2])
            for push in pushes[3:]:  # over the end of an episode
                begun = workers.reset() if data["done"].any() else data
                data = workers.step(begun.clone().set("action", push))["next"]
                played.append(data.clone())
        ours, theirs = torch.stack(played).split(len(pushes) - 3)
        assert ours["done"].any()
        assert (ours == theirs).all()


def test_a_walker_goes_on_with_its_feet_on_the_ground():
    pytest.importorskip("dm_control")

    class Walker(Resumable, DMControlEnv):
        pass

    ours, theirs = Walker("walker", "walk"), Walker("walker", "walk")
    ours.set_seed(0), theirs.set_seed(1)
    start, steps = ours.reset(), 0
    while steps < 40 or not ours._env.physics.data.ncon:
        start, steps = ours.rand_step(start)["next"], steps + 1
    put_env_state(theirs, env_state(ours))
    actions = iter([action for action in ours.action_spec.rand([20]) for _ in range(2)])
    for _ in range(20):
        after = [env.step(start.clone().set("action", next(actions)))["next"] for env in (ours, theirs)]
        assert (after[0] == after[1]).all()


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_episodes_of_point_masses_last_as_long_as_they_shall(steps):
    pytest.importorskip("dm_control")
    from recipes.point_mass import HiddenTarget

    rollout = HiddenTarget(steps).rollout(100)
    assert len(rollout) == steps
    assert rollout["next", "truncated"].flatten().tolist() == [False] * (steps - 1) + [True]


# ---- MiniGrid


@pytest.mark.parametrize("env_id", ["MiniGrid-KeyCorridorS3R2-v0", "BabyAI-UnlockPickup-v0"])
def test_mazes_go_on_in_mid_episode_with_all_that_is_in_them(env_id):
    pytest.importorskip("minigrid")
    ours, theirs = gymnasium.make(env_id), gymnasium.make(env_id)
    ours.reset(seed=0), theirs.reset(seed=1)
    actions = torch.randint(7, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    for action in actions[:60]:
        ours.step(action)
    put_state(theirs, state_of(ours))
    assert theirs.unwrapped.grid == ours.unwrapped.grid
    assert not {id(cell) for cell in theirs.unwrapped.grid.grid if cell} & {
        id(cell) for cell in ours.unwrapped.grid.grid
    }
    for action in actions[60:]:
        (seen, *ends, _), (again, *others, _) = ours.step(action), theirs.step(action)
        assert (seen["image"] == again["image"]).all()
        assert ends == others
    assert (ours.reset()[0]["image"] == theirs.reset()[0]["image"]).all()


# ---- Brax


def test_a_pendulum_of_unknown_sign():
    pytest.importorskip("brax")
    from recipes.brax_pendulum import SignedPendulum

    env = SignedPendulum(2)
    signs = torch.tensor([[1.0], [-1.0]])
    start = env.reset(TensorDict(task=signs, batch_size=[2]))
    assert torch.equal(start["state", "info", "sign"], signs)
    # Both begin at the first one's place: the same push then sends them apart, and opposite ones together.
    start["state"] = torch.stack([start["state"][0], start["state"][0].clone()])
    start["state", "info", "sign"] = signs
    cart = [
        env.step(start.clone().set("action", torch.tensor(pushes)))["next", "observation"][:, 2]
        for pushes in ([[0.5], [0.5]], [[0.5], [-0.5]])
    ]
    assert cart[0][0] > 0.01 > -0.01 > cart[0][1]
    assert cart[1][0] == cart[1][1] == cart[0][0]


def test_a_run_of_point_masses_is_repeated_by_its_seed(tmp_path):
    pytest.importorskip("dm_control")
    one, other = (run("point_mass", tmp_path / name, seed=3) for name in ("one", "other"))
    assert torch.equal(one.agent.returns, other.agent.returns)
