"""The batched MuJoCo envs are Gymnasium's, step by step, and their rows do not touch one another."""

import builtins
import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.envs import Compose, TransformedEnv
from torchrl.envs.utils import ExplorationType

from rl2_torchrl import ActorCritic, GRUGaussianActor, GRUValueHead, PreviousStep, TaskSampler, Trial, TrialCollector
from rl2_torchrl.envs import (
    AntDirection,
    AntGoal,
    HalfCheetahDirection,
    HalfCheetahVelocity,
    directions,
    goals_in_disc,
    goals_on_half_circle,
    signs,
    velocities,
)
from rl2_torchrl.envs.physics import Bodies, RolloutBackend
from rl2_torchrl.testing import check_trial_env

TASKS = {
    HalfCheetahDirection: signs(),
    HalfCheetahVelocity: velocities(),
    AntDirection: directions(),
    AntGoal: goals_in_disc(),
}


def reset(env, seed=0):
    task = TASKS[type(env)](env.batch_size, torch.Generator().manual_seed(seed)).to(env.dtype)
    return env.reset(TensorDict({"task": task}, env.batch_size)).set("task", task)


def act(env, td, seed=0):
    torch.manual_seed(seed)
    return td.set("action", 2 * torch.rand(env.action_spec.shape, dtype=env.dtype) - 1)


def cheetahs_observation(theirs):
    return np.concatenate((theirs.state_vector()[1:], theirs.get_body_com("torso")))


@dataclass
class Twin:
    """Gymnasium's env of the same body; what ours observes and pays, from the state that Gymnasium's is in."""

    name: str
    observation: Callable
    reward: Callable  # of task, velocity, data and the action's squared norm


TWINS = {
    HalfCheetahDirection: Twin("HalfCheetah-v5", cheetahs_observation, lambda d, v, _, a: d * v - 0.05 * a),
    HalfCheetahVelocity: Twin("HalfCheetah-v5", cheetahs_observation, lambda u, v, _, a: -abs(v - u) - 0.05 * a),
    AntDirection: Twin(
        "Ant-v5",
        lambda theirs: theirs.state_vector()[2:],
        lambda d, v, data, a: d @ v + (0.2 <= data.qpos[2] <= 1.0) - 0.5 * a,
    ),
    AntGoal: Twin(
        "Ant-v5",
        lambda theirs: theirs.state_vector(),
        lambda goal, _, data, a: -abs(data.qpos[:2] - goal).sum() - 0.1 * a,
    ),
}


@pytest.mark.parametrize("env_class", TWINS)
def test_every_step_is_gymnasiums(env_class):
    rows, steps, twin, near = 4, 1000, TWINS[env_class], {"rtol": 0, "atol": 1e-10}
    env = env_class(batch_size=(rows,), horizon=steps, seed=0, dtype=torch.float64)
    theirs = gymnasium.make(twin.name).unwrapped
    theirs.reset(seed=0)
    td = reset(env)
    for step in range(steps // rows):
        start = {name: part.clone() for name, part in zip(Bodies._fields, env.get_outside_state(), strict=True)}
        td = act(env, td, seed=step)
        following = env.step(td)["next"]
        for row in range(rows):
            qpos, action, task = start["qpos"][row].numpy(), td["action"][row].numpy(), td["task"][row].numpy()
            theirs.set_state(qpos, start["qvel"][row].numpy())
            *_, info = theirs.step(action)
            state = np.concatenate((env.physics.qpos[row], env.physics.qvel[row]))
            np.testing.assert_allclose(state, theirs.state_vector(), **near)
            np.testing.assert_allclose(following["observation"][row], twin.observation(theirs), **near)
            velocity = (theirs.data.qpos - qpos)[: env.axes] / theirs.dt
            np.testing.assert_allclose(following["velocity"][row], velocity, **near)
            if twin.name == "HalfCheetah-v5":  # Ant-v5 measures its torso's a step of the simulation before
                np.testing.assert_allclose(velocity, info["x_velocity"], **near)
            reward = twin.reward(task, velocity, theirs.data, action @ action)
            np.testing.assert_allclose(following["reward"][row], np.atleast_1d(reward), **near)
        td = following.set("task", td["task"])


def test_first_observation_is_gymnasiums():
    env = HalfCheetahVelocity(batch_size=(2,), seed=0, dtype=torch.float64)
    td, theirs = reset(env), gymnasium.make("HalfCheetah-v5").unwrapped
    theirs.reset(seed=0)
    theirs.set_state(env.physics.qpos[1].numpy(), env.physics.qvel[1].numpy())
    torso = torch.from_numpy(theirs.get_body_com("torso").copy())
    expected = torch.cat((torch.from_numpy(theirs.state_vector())[1:], torso))
    torch.testing.assert_close(td["observation"][1], expected, rtol=0, atol=1e-12)


def test_episodes_begin_where_gymnasiums_do():
    env = HalfCheetahDirection(batch_size=(4000,), seed=0)
    reset(env)
    qpos, qvel = env.physics.qpos, env.physics.qvel
    assert qpos.abs().max() <= 0.1
    assert qpos.std().item() == pytest.approx(0.2 / 12**0.5, rel=0.02)
    assert qvel.std().item() == pytest.approx(0.1, rel=0.02)
    ant = AntGoal(batch_size=(4000,), seed=0)
    reset(ant)
    torch.testing.assert_close(ant.physics.qpos.mean(0)[2:4], torch.tensor([0.75, 1.0]).double(), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("env_class", "task", "expected"),
    [
        (HalfCheetahDirection, [[1.0], [-1.0]], [2.0 - 0.3, 3.0 - 0.3]),
        (HalfCheetahVelocity, [[1.5], [1.0]], [-0.5 - 0.3, -4.0 - 0.3]),
    ],
)
def test_cheetahs_rewards(env_class, task, expected):
    env = env_class(batch_size=(2,))
    task, velocity = torch.tensor(task), torch.tensor([[2.0], [-3.0]])
    reward = env.reward(task, velocity, velocity, torch.ones(2, 6))
    torch.testing.assert_close(reward.squeeze(-1), torch.tensor(expected))


def test_ants_rewards():
    ones, velocity = np.ones((2, 8)), np.array([[2.0, 1.0], [-3.0, 0.0]])
    runner = AntDirection(batch_size=(2,), seed=0)
    reset(runner)
    runner.physics.qpos[1, 2] = 1.5  # not upright
    reward = runner.reward(np.array([[0.6, 0.8], [1.0, 0.0]]), velocity, velocity, ones)
    np.testing.assert_allclose(reward, [[2.0 + 1 - 4], [-3.0 - 4]])
    reward = AntGoal(batch_size=(2,)).reward(np.array([[1.0, 1.0], [0.0, 3.0]]), velocity, velocity, ones)
    np.testing.assert_allclose(reward, [[-1.0 - 0.8], [-6.0 - 0.8]])


@pytest.mark.parametrize("env_class", TASKS)
def test_masked_resets_touch_only_their_rows(env_class):
    env = env_class(batch_size=(3,), seed=0)
    td = act(env, reset(env))
    env.step(td)
    before = [part.clone() for part in (*env.get_outside_state(), env._row_steps())]
    mask = torch.tensor([[False], [True], [False]])
    after = env.reset(TensorDict({"task": td["task"], "_reset": mask}, [3]))
    for now, then in zip((*env.get_outside_state(), env._row_steps()), before, strict=True):
        assert torch.equal(now[[0, 2]], then[[0, 2]])
        assert not torch.equal(now[1], then[1])
    assert env._row_steps().flatten().tolist() == [1, 0, 1]
    assert after["velocity"][1].abs().sum() == 0


def test_rows_do_not_depend_on_one_another():
    batch, alone = HalfCheetahVelocity(batch_size=(5,), seed=0), HalfCheetahVelocity(batch_size=(), seed=0)
    td = reset(batch)
    reset(alone)
    alone.start(td["task"][3])
    alone.physics.reset_mask(torch.ones(1, dtype=torch.bool), batch.physics.qpos[3:4], batch.physics.qvel[3:4])
    single = TensorDict({"task": td["task"][3]})
    for step in range(20):
        td = batch.step(act(batch, td, seed=step))["next"].set("task", td["task"])
        single = alone.step(single.set("action", act(batch, td.clone(), seed=step)["action"][3]))["next"]
        single["task"] = td["task"][3]
    assert torch.equal(single["observation"], td["observation"][3])
    assert torch.equal(single["reward"], td["reward"][3])


def test_episodes_last_the_horizon():
    env = AntDirection(batch_size=(2,), horizon=3, seed=0)
    td = reset(env)
    ends = []
    for step in range(3):
        following = env.step(act(env, td, seed=step))["next"]
        ends.append([following[key].all().item() for key in ("done", "truncated", "terminated")])
        td = following.set("task", td["task"])
    assert ends == [[False] * 3, [False] * 3, [True, True, False]]


@pytest.mark.parametrize("env_class", TASKS)
def test_keeps_the_trial_contract(env_class):
    tasks = TASKS[env_class]

    def make():
        transforms = Compose(Trial(episodes=2), TaskSampler(tasks, seed=1), PreviousStep(["observation"]))
        return TransformedEnv(env_class(batch_size=(2,), horizon=4, seed=0), transforms)

    check_trial_env(make())


def test_what_a_step_returned_is_not_written_over():
    env = HalfCheetahVelocity(batch_size=(3,), seed=0)
    td = reset(env)
    returned = [env.play(torch.full((3, 6), level)) for level in (0.5, -0.5)]
    returned = [(entries["observation"], reward) for entries, reward, _, _ in returned]
    td = act(env, td)
    returned += [[env.step(td.clone())["next", key] for key in ("observation", "reward", "velocity")]]
    as_they_were = [[tensor.clone() for tensor in tensors] for tensors in returned]
    env.step(td), reset(env, seed=1)
    for tensors, earlier in zip(returned, as_they_were, strict=True):
        assert all(map(torch.equal, tensors, earlier))
    assert not torch.equal(returned[0][0], returned[1][0])


def trial_env(rows=4, episodes=2, horizon=3):
    env = HalfCheetahVelocity(batch_size=(rows,), horizon=horizon, seed=0)
    transforms = Compose(Trial(episodes=episodes), TaskSampler(velocities(), seed=1), PreviousStep(["observation"]))
    return TransformedEnv(env, transforms)


def test_collection_equals_collectors():
    batches = []
    keep = ["trans", "action", "action_log_prob", "state_value", ("next", "reward"), ("next", "done"), "is_init"]
    for cls, kwargs in ((Collector, {"auto_register_policy_transforms": True}), (TrialCollector, {"keep": keep})):
        env = trial_env()
        torch.manual_seed(0)
        policy = ActorCritic(GRUGaussianActor.from_env(env, init_range=1.0), GRUValueHead.from_env(env))
        how = {"frames_per_batch": 2 * 24, "total_frames": 48, "exploration_type": ExplorationType.DETERMINISTIC}
        collector = cls(env, policy, **how, **kwargs)
        batches.append(next(iter(collector)).clone())
    assert (collector.backend, collector.reason) == ("tensors", None)
    slow, fast = batches
    for key in keep:
        torch.testing.assert_close(fast[key], slow[key], msg=str(key))


def test_further_observations_are_played_on_tensors():
    transforms = Compose(Trial(episodes=2), TaskSampler(velocities(), seed=1), PreviousStep())
    env = TransformedEnv(HalfCheetahVelocity(batch_size=(2,), horizon=3, seed=0), transforms)
    actor = GRUGaussianActor.from_env(env)
    collector = TrialCollector(env, actor, frames_per_batch=12, total_frames=12, keep=["trans"])
    assert (collector.backend, collector.reason) == ("tensors", None)
    (batch,) = list(collector)
    assert batch["trans"].shape == (2, 6, 20 + 1 + 6 + 2)


@pytest.mark.parametrize("env_class", TASKS)
def test_doubles_are_played_with_the_tasks_of_this_package(env_class):
    env = env_class(batch_size=(2,), horizon=3, dtype=torch.float64, seed=0)
    env = TransformedEnv(env, Compose(Trial(episodes=2), TaskSampler(TASKS[env_class], seed=0), PreviousStep()))
    data = env.rollout(6)
    assert data["task"].dtype == torch.float32
    assert data["next", "observation"].dtype == data["next", "reward"].dtype == torch.float64


def test_checkpoints_go_on_as_the_run_would_have():
    env = HalfCheetahDirection(batch_size=(3,), seed=0)
    td = act(env, reset(env))
    td = env.step(td)["next"].set("task", td["task"])
    state, seen = env.get_extra_state(), env._observe()
    going_on = [env.step(act(env, td))["next"], reset(env)]
    other = HalfCheetahDirection(batch_size=(3,), seed=7)
    other.set_extra_state(state)
    assert torch.equal(other._observe(), seen)
    resumed = [other.step(act(other, td))["next"], reset(other)]
    for ours, theirs in zip(resumed, going_on, strict=True):
        assert (ours == theirs).all()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_a_copied_env_simulates_on_by_itself(duplicate):
    env = HalfCheetahVelocity(batch_size=(2,), seed=0)
    td = act(env, reset(env))
    td = env.step(td)["next"].set("task", td["task"])
    other = duplicate(env)
    for step in range(3):
        td = act(env, td, seed=step)
        ours, theirs = env.step(td)["next"], other.step(td)["next"]
        assert (ours == theirs).all()
        assert not torch.equal(ours["observation"], td["observation"])
        td = ours.set("task", td["task"])
    reset(env)
    assert torch.equal(other._observe(), theirs["observation"])


#: TorchRL's backends that are installed here: mjx takes minutes to compile and is no part of the extra `test`.
BACKENDS = ["mujoco"]
BACKENDS += ["mujoco-torch"] if find_spec("mujoco_torch") else []
BACKENDS += ["mjx"] if find_spec("jax") and find_spec("mujoco.mjx") else []


@pytest.mark.parametrize("backend", BACKENDS)
def test_torchrls_backends_are_a_switch(backend):
    steps = {}
    for name in ("rollout", backend):
        env = HalfCheetahVelocity(batch_size=(1,), seed=0, backend=name, dtype=torch.float64)
        td = reset(env)
        for step in range(5):
            td = env.step(act(env, td, seed=step))["next"].set("task", td["task"])
        steps[name] = td
    # TorchRL's backends round to float32, and contacts make such differences grow.
    for key in ("observation", "reward", "velocity"):
        torch.testing.assert_close(steps[backend][key], steps["rollout"][key], rtol=0, atol=1e-4)


# ------------------------------------------------------------------- bad input
def test_nan_actions_are_an_error():
    env = HalfCheetahDirection(batch_size=(2,))
    td = act(env, reset(env))
    td["action"][1, 3] = torch.nan
    with pytest.raises(FloatingPointError, match="policy has broken down"):
        env.step(td)


@pytest.mark.parametrize(
    "reward",
    [
        lambda velocity, task: -abs(velocity - task).sum(-1),
        lambda velocity, task: -abs(velocity[:, 0] - task),
    ],
)
def test_a_reward_of_another_shape_is_named(reward):
    class Own(HalfCheetahVelocity):
        def reward(self, task, velocity, place, action):
            return reward(velocity, task)

    env = Own(batch_size=(3,), seed=0)
    env.start(torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"Own.reward\(\) gives \[3(, 3)?\]: it must be \[3, 1\], one a row"):
        env.play(torch.zeros(3, 6))


@pytest.mark.parametrize("steps", [0, 3])
def test_a_simulation_that_blows_up_is_an_error(steps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where MuJoCo writes of it
    env = HalfCheetahVelocity(batch_size=(2,), seed=0)
    td = reset(env)
    for step in range(steps):
        td = env.step(act(env, td, step))["next"].set("task", td["task"])
    env.physics.qvel[1] = 1e9
    with pytest.raises(FloatingPointError, match="the simulation blew up"):
        env.step(act(env, td))
    env.step(act(env, reset(env)))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": (0,)}, "at least one env"),
        ({"horizon": 0}, "horizon=0 must be a whole number"),
        ({"horizon": "200"}, "horizon='200' must be a whole number"),
        ({"num_threads": "2"}, "num_threads='2' must be a whole number"),
        ({"dtype": torch.bfloat16}, "float32 or torch.float64"),
    ],
)
def test_impossible_sizes_and_types(kwargs, message):
    with pytest.raises(ValueError, match=message):
        HalfCheetahVelocity(**kwargs)


@pytest.mark.parametrize("kwargs", [{"num_threads": 0}, {"num_threads": 2, "backend": "mujoco"}])
def test_impossible_numbers_of_threads(kwargs):
    with pytest.raises(ValueError, match="num_threads"):
        HalfCheetahVelocity(**kwargs)


def test_unknown_backend_and_device():
    with pytest.raises(ValueError, match="unknown backend"):
        HalfCheetahVelocity(backend="bullet")
    with pytest.raises(ValueError, match="simulates on the CPU"):
        HalfCheetahVelocity(device="meta")


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (lambda: goals_in_disc(0.0), "radius=0.0 must be above 0"),
        (lambda: goals_on_half_circle(-1.0), "radius=-1.0 must be above 0"),
    ],
)
def test_ranges_of_tasks(tasks, message):
    with pytest.raises(ValueError, match=message):
        tasks()


def test_empty_range_of_velocities():
    with pytest.raises(ValueError, match="above the first"):
        velocities(2.0, 2.0)


def test_missing_mujoco_names_the_extra(monkeypatch):
    original = builtins.__import__

    def without_mujoco(name, *args, **kwargs):
        if name.split(".")[0] == "mujoco":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_mujoco)
    with pytest.raises(ImportError, match=r"rl2_torchrl\[mujoco\]"):
        HalfCheetahVelocity()


@pytest.mark.parametrize("backend", ["rollout", "mujoco"])
def test_a_model_is_loaded_in_silence(backend, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    HalfCheetahVelocity(backend=backend)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("threads", [1, 2])
def test_number_of_threads_changes_nothing(threads):
    model = HalfCheetahVelocity().model
    one, several = RolloutBackend(model, 7, 5, 1), RolloutBackend(model, 7, 5, threads)
    ctrl = torch.linspace(-1, 1, 42).reshape(7, 6)
    for _ in range(5):
        one.step(ctrl), several.step(ctrl)
    assert torch.equal(one.qpos, several.qpos)
    assert torch.equal(one.qvel, several.qvel)
