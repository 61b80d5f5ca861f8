"""Gymnasium's envs in checkpoints: in the middle of a trial a resumed run goes on as the unbroken one, or says why it cannot."""

import functools
import logging
import random
import re
import time
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control import CartPoleEnv
from rollouts import Walk, make_policy, whole_numbers
from runs import Run
from tensordict import TensorDict
from torchrl.data import Unbounded
from torchrl.envs import Compose, GymEnv, ParallelEnv, RewardSum, SerialEnv, TransformedEnv

from rl2_torchrl import (
    ActorCritic,
    AdaptationCurve,
    AdaptationReport,
    Callback,
    GRUGaussianActor,
    GRUValueHead,
    PPOUpdate,
    PreviousStep,
    RL2PPOLoss,
    TaskSampler,
    Trial,
    TrialCollector,
)
from rl2_torchrl.codec import NoStateError
from rl2_torchrl.collector import begin_new_trials, load_rollout_state, rollout_state
from rl2_torchrl.envs import BernoulliBandit, GymTaskEnv, GymVectorEnv, Resumable
from rl2_torchrl.envs.env_state import env_state, put_env_state
from rl2_torchrl.envs.layers import made_of, put_state, state_of
from rl2_torchrl.settings import _env as settings_of_env
from rl2_torchrl.settings import differences, moved


@pytest.mark.parametrize(
    "env_id", ["CartPole-v1", "Pendulum-v1", "MountainCar-v0", "Acrobot-v1", "HalfCheetah-v5", "Ant-v5", "Reacher-v5"]
)
def test_an_env_goes_on_from_its_state_as_it_would_have(env_id):
    pytest.importorskip("mujoco")
    env, other = gymnasium.make(env_id), gymnasium.make(env_id)
    env.reset(seed=1), other.reset(seed=5)
    env.action_space.seed(0)
    for _ in range(17):
        env.step(env.action_space.sample())
    put_state(other, state_of(env))
    for _ in range(40):
        action = env.action_space.sample()
        ours, theirs = env.step(action), other.step(action)
        assert np.array_equal(ours[0], theirs[0])
        assert ours[1:4] == theirs[1:4]
        if ours[2] or ours[3]:
            assert np.array_equal(env.reset()[0], other.reset()[0])
    assert np.array_equal(env.reset()[0], other.reset()[0])  # the random numbers, too


@pytest.mark.parametrize(
    ("env", "vectorization", "env_id"),
    [
        ("Pendulum-v1", "sync", "Pendulum-v1"),
        ("Pendulum-v1", "async", "Pendulum-v1"),
        (partial(gymnasium.make, "CartPole-v1"), "sync", "CartPole-v1"),
        (partial(gymnasium.make, "CartPole-v1"), "async", None),  # known in its processes alone
    ],
)
def test_which_env_a_run_is_to_go_on_with(env, vectorization, env_id):
    vector = GymVectorEnv(env, 2, vectorization=vectorization)
    assert settings_of_env(vector)["env.env_id"] == env_id
    vector.close(raise_if_closed=False)


def set_gravity_by_name(env, task):
    set_gravity(env, task)


@pytest.mark.parametrize("make", [partial(GymVectorEnv, num_envs=2), GymTaskEnv])
def test_how_a_task_reaches_an_env_is_a_setting(make):
    settings = []
    for set_task in (set_gravity, set_gravity_by_name):
        env = make("Pendulum-v1", set_task=set_task, task_spec=Unbounded(1))
        settings.append(settings_of_env(env))
        env.close(raise_if_closed=False)
    assert list(differences(*settings)) == ["env.set_task"]


def test_statistics_by_which_observations_are_normalized_come_back():
    env, other = (gymnasium.wrappers.NormalizeObservation(gymnasium.make("CartPole-v1")) for _ in range(2))
    env.reset(seed=0), env.step(0), other.reset(seed=1)
    put_state(other, state_of(env))
    assert other.obs_rms.count == env.obs_rms.count > 2
    assert np.array_equal(other.step(1)[0], env.step(1)[0])


def contacts(env):
    return [contact.geom.tolist() for contact in env.unwrapped.data.contact]


def test_contacts_come_back():
    """Before its next step a simulation would still have those of what it did last."""
    pytest.importorskip("mujoco")
    env, other = gymnasium.make("Hopper-v5"), gymnasium.make("Hopper-v5")
    env.reset(seed=1), other.reset(seed=5)
    env.action_space.seed(0)
    for _ in range(12):
        env.step(env.action_space.sample())
    assert contacts(other) != contacts(env)
    put_state(other, state_of(env))
    assert contacts(other) == contacts(env)


class Counting(gymnasium.Env):
    """Counts, in numbers of many types."""

    observation_space, action_space = gymnasium.spaces.Box(-9, 9, (1,)), gymnasium.spaces.Box(-1, 1, (1,))

    def __init__(self):
        self.small, self.steps, self.seen = np.float32(0.1), [0], {"a": (1, np.zeros(2))}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.small = self.small * np.float32(1.5)
        self.steps.append(self.steps[-1] + 1)
        return np.array([self.np_random.normal()], np.float32), float(self.small), False, False, {}


def test_values_come_back_with_their_types():
    env, other = Counting(), Counting()
    env.reset(seed=0), env.step(None)
    put_state(other, state_of(env))
    assert type(other.small) is np.float32
    assert other.steps == [0, 1]
    assert other.steps is not env.steps
    assert other.seen["a"][1] is not env.seen["a"][1]
    assert env.step(None)[0] == other.step(None)[0]


class Tabled(Counting):
    """Holds a table of its moves, and of spaces."""

    def __init__(self):
        super().__init__()
        self.moves, self.parts = {0: self.step, 1: (len, [abs])}, {"a": gymnasium.spaces.Discrete(2)}


def test_tables_of_functions_stay_as_the_constructor_made_them():
    env, other = Tabled(), Tabled()
    env.reset(seed=0), env.step(None)
    put_state(other, state_of(env))
    assert other.steps == [0, 1]
    assert other.moves[0].__self__ is other


class Swinging(CartPoleEnv):
    """Somebody's own."""


def test_what_never_changes_is_no_state():
    inner, other = Swinging(), Swinging()
    env = gymnasium.wrappers.TransformReward(inner, lambda reward: reward * inner.tau)
    for each in (inner, other):
        each.reset(seed=0)
        each.dtype, each.device, each.of = (torch.float32, np.dtype("f4")), torch.device("cpu"), re.compile("a")
        each.log, each.rng = logging.getLogger("an env's"), np.random.default_rng(0)
        each.draws, each.moves = (each.rng.normal, lambda rng=each.rng: rng.normal()), {0: each.step}
    inner.rng.normal()
    put_state(gymnasium.wrappers.TransformReward(other, abs), state_of(env))
    assert [draw() for draw in other.draws] == [draw() for draw in inner.draws]  # of the generator that is there


def test_arrays_that_look_into_a_simulators_memory_still_do():
    pytest.importorskip("mujoco")
    env, other = gymnasium.make("Hopper-v5"), gymnasium.make("Hopper-v5")
    for each in (env, other):
        each.reset(seed=0)
        each.unwrapped.place = each.unwrapped.data.qpos
    env.step(env.action_space.sample())
    put_state(other, state_of(env))
    for each in (env, other):
        each.step(np.ones(3, np.float32))
    assert other.unwrapped.place.tolist() == env.unwrapped.place.tolist() == env.unwrapped.data.qpos.tolist()


def test_a_reader_of_infos_is_no_state():
    class Cartpole(Resumable, GymEnv):
        pass

    assert Cartpole("CartPole-v1").auto_register_info_dict().why_no_state() is None


class Remembering(Counting):
    def get_state(self):
        return {"small": float(self.small)}

    def set_state(self, state):
        self.small = np.float32(2 * state["small"])


def test_an_env_may_say_its_state_itself():
    env, other = Remembering(), Remembering()
    env.engine = object()  # which nobody could save
    put_state(other, state_of(env))
    assert other.small == pytest.approx(0.2)


class Draws(gymnasium.Env):
    """Pays what it draws of spaces, its own and its class's."""

    observation_space = gymnasium.spaces.Dict({"place": gymnasium.spaces.Box(-1, 1, (1,))})

    def __init__(self, table):
        self.action_space, self.table = gymnasium.spaces.Discrete(1000), table
        self.draw = self.action_space.sample

    def reset(self, *, seed=None, options=None):
        self.action_space.seed(seed), self.observation_space.seed(seed), self.table[0].seed(seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        drawn = float(self.draw()) + self.table[0].sample().item()
        return self.observation_space.sample(), drawn, False, False, {}


@pytest.mark.parametrize("table", [lambda box: [box, box], lambda box: {0: box}, lambda box: (box, {"a": [(box,)]})])
def test_what_an_env_draws_of_its_spaces_goes_on_too(table):
    def steps(env):
        return [(observed["place"].item(), reward) for observed, reward, *_ in (env.step(0) for _ in range(4))]

    env, other = (Draws(table(gymnasium.spaces.Box(-1, 1, (1,)))) for _ in range(2))
    env.reset(seed=1)
    steps(env)
    saved = state_of(env)
    expected = steps(env)
    other.reset(seed=5)
    put_state(other, saved)
    assert steps(other) == expected


def test_what_is_no_plain_data_is_named():
    env = Counting()
    env.seen["engine"] = object()
    with pytest.raises(NoStateError, match=r"Counting.seen.engine is a object, which cannot be saved"):
        state_of(env)


def set_mass(pendulum, task):
    pendulum.model.body_mass[-1] = task.item()  # of MuJoCo's model, which is no part of the state


def test_what_a_task_has_changed_in_the_model_is_changed_again():
    pytest.importorskip("mujoco")
    envs = [
        GymVectorEnv("InvertedPendulum-v5", 2, set_task=set_mass, task_spec=Unbounded(1), seed=seed) for seed in (0, 1)
    ]
    masses = torch.tensor([[1.0], [40.0]])
    envs[0].start(masses)
    envs[1].set_extra_state(envs[0].get_extra_state())
    envs[1].envs.envs[0].unwrapped.model.body_mass[-1] = 7.0  # as in an env that has played something else since
    envs[1].set_extra_state(envs[0].get_extra_state())
    for env in envs:
        assert [row.unwrapped.model.body_mass[-1] for row in env.envs.envs] == masses.flatten().tolist()
        env.close()


def test_rows_without_a_state_begin_when_it_is_put_back():
    env = GymVectorEnv(with_engine, 2, seed=0)
    env.rand_step(env.reset())
    env.set_extra_state(env.get_extra_state())
    with pytest.raises(RuntimeError, match="before reset"):  # it would go on where its rows are not
        env.rand_step()
    assert env.rollout(3).shape == (2, 3)


# ----------------------------------------------------------------- trainings
def set_gravity(pendulum, task):
    pendulum.g = task.item()


def gravities(batch_size, generator):
    return 5 + 10 * torch.rand(*batch_size, 1, generator=generator)


class PendulumRun(Run):
    """Batches of 9 steps of trials of 14: most end in the middle of an episode."""

    def __init__(self, *, updates=6, vectorization="sync", engine=False, make=None, elsewhere=False):
        torch.manual_seed(0)
        torch.rand(99 * elsewhere)
        self.sampler = TaskSampler(gravities, seed=1)
        options = {"max_episode_steps": 7, "vectorization": vectorization}
        env = with_engine if engine else "Pendulum-v1"
        options = {"vectorization": vectorization} if engine or make else options
        env = make or env
        self.bandit = GymVectorEnv(env, 3, set_task=set_gravity, task_spec=Unbounded(1), seed=2, **options)
        trials = TransformedEnv(self.bandit, Compose(Trial(episodes=2), self.sampler, PreviousStep()))
        actor = GRUGaussianActor.from_env(trials, hidden_size=4)
        critic = GRUValueHead.from_env(trials, hidden_size=4)
        self.policy = ActorCritic(actor, critic)
        self.update = PPOUpdate(RL2PPOLoss(actor, critic), bptt=3, epochs=2, minibatches=2, lr=1e-2)
        sizes = {"frames_per_batch": 27, "total_frames": 27 * updates}
        self.collector = TrialCollector(trials, self.policy, keep=[*self.update.in_keys, "task"], **sizes)


def with_engine():
    env = gymnasium.make("Pendulum-v1", max_episode_steps=7)
    env.unwrapped.engine = object()
    return env


class Effort(gymnasium.Wrapper):
    """Takes a share of what is paid."""

    def __init__(self, env, weight, folder=None):
        super().__init__(env)
        self._weight, self.folder = weight, folder
        # Others in another program: an env that draws in its constructor, or asks for the time.
        self.drawn, self.started = random.random(), time.perf_counter()

    def step(self, action):
        observation, reward, *ends, info = self.env.step(action)
        return observation, self._weight * reward, *ends, info


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_rows_that_are_made_otherwise_are_told_of(vectorization, tmp_path):
    """The state of the rows, which a resumed run goes on from, would write the new numbers over."""

    def run_of(updates, weight, limit=7, extra=(), **options):
        def make():
            env = Effort(gymnasium.make("Pendulum-v1", max_episode_steps=limit), weight)
            return functools.reduce(lambda env, wrapper: wrapper(env), extra, env)

        run, paid = PendulumRun(updates=updates, vectorization=vectorization, make=make), []
        batch = partial(lambda seen, batch, progress: seen.append(batch["next", "reward"].mean().item()), paid)
        run.train(checkpoints=tmp_path, callbacks=[Batches(batch)], check=False, **options)
        return paid

    run_of(1, 1.0)
    for how, name, then, now in [
        ({"weight": 0.0}, "Effort.weight", "1.0", "0.0"),
        ({"weight": 1.0, "limit": 8}, "TimeLimit.max_episode_steps", "7", "8"),
        ({"weight": 1.0, "extra": [gymnasium.Wrapper]}, "layers", r"\[.*\]", r"\[.*Wrapper.*\]"),
    ]:
        with pytest.raises(ValueError, match=rf"env.rows.{name}: {then} then, {now} now.*resume_changes"):
            run_of(3, **how, resume=True)
    assert run_of(2, 1.0, resume=True)[-1] < 0
    changes = ["env.rows.Effort.weight", "env.make"]  # which closes over the number
    assert run_of(3, 0.0, resume=True, resume_changes=changes) == [0.0]


def test_what_a_row_is_made_of_is_what_its_constructors_were_given():
    def drawn(row):
        pendulum = gymnasium.make("Pendulum-v1", max_episode_steps=7, g=9.0)
        return made_of(Effort(pendulum, 0.5, folder=f"runs/{row}"))  # each run has its own

    assert drawn(0) == drawn(1)
    assert drawn(0)["layers"] == ["Effort", "TimeLimit", "OrderEnforcing", "PassiveEnvChecker", "PendulumEnv"]
    given = {name: value for name, value in drawn(0).items() if name[:3] in ("Eff", "Tim", "Pen")}
    assert given == {"Effort.weight": 0.5, "TimeLimit.max_episode_steps": 7, "PendulumEnv.g": 9.0}


class Batches(Callback):
    def __init__(self, function):
        self.after_batch = function


def test_rows_of_a_serial_env_that_are_made_otherwise_are_told_of():
    started = {}
    for limit in (7, 8):
        row = partial(GymEnv, "CartPole-v1", max_episode_steps=limit)
        env = TransformedEnv(SerialEnv(2, row), Compose(Trial(episodes=2), PreviousStep()))
        env.reset()
        started[limit] = settings_of_env(env)
        env.close()
    assert "env.rows.TimeLimit.max_episode_steps" in differences(started[7], started[8])


def test_rows_that_began_alike_may_part():
    env = GymVectorEnv(lambda: Effort(gymnasium.make("Pendulum-v1"), 0.5), 2)
    alike = settings_of_env(env)
    env.envs.envs[0].made_of["Effort.weight"] = 0.7  # as a task does that a row keeps by the name of an argument
    assert moved(alike, settings_of_env(env)) == {"env.rows.Effort.weight"}


@pytest.mark.parametrize("at_the_end", [False, True])
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_a_resumed_training_goes_on_in_mid_trial(vectorization, at_the_end, tmp_path):
    whole = PendulumRun(vectorization=vectorization)
    expected = whole.train()
    folder, broken = tmp_path / "checkpoints", PendulumRun(vectorization=vectorization)
    left = iter(range(2, -1, -1))
    if at_the_end:  # TorchRL closes the envs after the last batch, and the checkpoint comes after that
        broken = PendulumRun(vectorization=vectorization, updates=3)
        broken.train(checkpoints=folder, checkpoint_interval=9)
    else:
        broken.train(checkpoints=folder, checkpoint_interval=1, stop=lambda _: next(left) == 0)
    broken.collector.shutdown()
    resumed = PendulumRun(vectorization=vectorization, elsewhere=True)
    result = resumed.train(checkpoints=folder, checkpoint_interval=1, resume=True)
    torch.testing.assert_close(
        dict(resumed.update.loss.named_parameters()), dict(whole.update.loss.named_parameters()), rtol=0, atol=0
    )
    returns = [[row["train/trial_return"] for row in each.history] for each in (result, expected)]
    assert returns[0] == pytest.approx(returns[1], abs=0, nan_ok=True)
    for run in (whole, resumed):
        run.collector.shutdown()


def test_envs_that_cannot_be_saved_begin_new_trials_and_that_is_said(tmp_path, caplog):
    caplog.set_level("INFO", "rl2_torchrl")
    run = PendulumRun(engine=True, updates=2)
    assert not run.train(checkpoints=tmp_path / "c", checkpoint_interval=1).new_trials
    assert re.search("a resumed run will begin new trials: .*PendulumEnv.engine is a object", caplog.text)
    caplog.clear()
    reason = "PendulumEnv.engine is a object, which cannot be saved"
    for updates, resumes in [(3, [54]), (4, [54, 81])]:
        result = PendulumRun(engine=True, updates=updates).train(checkpoints=tmp_path / "c", resume=True)
        assert [steps for steps, _ in result.new_trials] == resumes
        assert all(reason in why for _, why in result.new_trials)
    curve = AdaptationCurve(torch.zeros(2, 2))
    assert AdaptationReport(curve, curve, train=result).to_dict()["train"]["new_trials"] == result.new_trials
    assert reason in caplog.text


class Begins(Callback):
    """How batches begin: what is seen, and the task."""

    def __init__(self):
        self.seen = []

    def after_batch(self, batch, progress):
        self.seen.append(torch.cat((batch["trans"], batch["task"]), -1)[:, 0].clone())


def test_new_trials_of_a_resumed_run_are_none_that_it_has_played(tmp_path):
    begins = Begins()
    for updates in (1, 2, 3):
        run = PendulumRun(engine=True, updates=updates)
        run.train(checkpoints=tmp_path, resume=updates > 1, callbacks=[begins])
        assert run.bandit.given_seed == 2  # a setting, by which runs are told apart
    begun = torch.cat(begins.seen)
    assert len(begun) == 9
    assert len(begun[:, 0].unique()) == len(begun[:, -1].unique()) == 9


class ResumableWalk(Resumable, Walk):
    """Keeps the way it has gone, in the env itself."""

    def _reset(self, tensordict=None, **kwargs):
        self.way = torch.zeros(4, 1)
        return super()._reset(tensordict, **kwargs)

    def _step(self, tensordict):
        self.way = self.way + 1
        return super()._step(tensordict).set("reward", self.way)


def test_a_resumable_env_of_rows_goes_on_with_a_sampler_around_it():
    def make():
        tasks = TaskSampler(whole_numbers, seed=1)
        env = TransformedEnv(ResumableWalk(), Compose(Trial(steps=9), tasks, PreviousStep()))
        return TrialCollector(env, make_policy(env), frames_per_batch=20, total_frames=-1)

    one, other = make(), make()
    one.rollout()
    other.reset()
    assert load_rollout_state(other, rollout_state(one)) is None
    assert torch.equal(other.env.base_env.way, one.env.base_env.way)
    assert other.rollout()["trial_step"][:, 0].unique().tolist() == [5]


@pytest.mark.parametrize("kind", [SerialEnv, partial(ParallelEnv, mp_start_method="fork")])
def test_new_trials_of_rows_are_played_by_other_random_numbers(kind):
    begun = []
    for seed in (None, 1, 2):
        env = rows_of(lambda: GymTaskEnv("Pendulum-v1", set_task=set_gravity, task_spec=Unbounded((1,))), kind)
        env = TransformedEnv(env, Compose(Trial(steps=3), TaskSampler(gravities, seed=1), PreviousStep()))
        collector = TrialCollector(env, GRUGaussianActor.from_env(env), frames_per_batch=6, total_frames=-1)
        if seed is not None:
            torch.manual_seed(seed)
            begin_new_trials(collector)
        begun.append(collector.rollout()["trans"][:, 0, 0].clone())
        collector.shutdown()
    assert len(torch.cat(begun).unique()) == 6


def rows_of(row, kind=SerialEnv, rows=2):
    env = kind(rows, row)
    env.set_seed(3)
    return env


def hidden_mass():
    return GymTaskEnv("InvertedPendulum-v5", set_task=set_mass, task_spec=Unbounded(1))


@pytest.mark.parametrize("row", [hidden_mass, lambda: TransformedEnv(hidden_mass(), RewardSum())])
@pytest.mark.parametrize("kind", [SerialEnv, partial(ParallelEnv, mp_start_method="fork")])
def test_envs_side_by_side_go_on_and_hear_their_tasks_again(kind, row):
    pytest.importorskip("mujoco")
    ours, theirs = rows_of(row, kind), rows_of(row, kind)
    masses, action = torch.tensor([[1.0], [40.0]]), torch.tensor([[0.1], [-0.2]])
    seen = ours.reset(TensorDict({"task": masses}, [2]))
    theirs.reset(TensorDict({"task": masses.flip(0)}, [2]))
    ours.step(seen.set("action", action))
    put_env_state(theirs, env_state(ours))
    for turn in (1, -1, 1, 1, -1):  # each answer is that of its own question
        asked = seen.clone().set("action", turn * action)
        after = [env.step(asked.clone())["next", "observation"] for env in (ours, theirs)]
        assert torch.equal(*after)
    assert torch.equal(ours.reset()["observation"], theirs.reset()["observation"])  # the random numbers, too
    ours.close(), theirs.close()


def test_envs_side_by_side_go_on_below_transforms_too():
    ours, theirs = (TransformedEnv(rows_of(lambda: BernoulliBandit(2)), RewardSum()) for _ in range(2))
    begun = ours.reset(TensorDict({"task": torch.full((2, 2), 0.5)}, [2])).set("action", torch.tensor([0, 1]))
    ours.rand_step(begun.clone()), theirs.rand_step(theirs.reset())
    put_env_state(theirs, env_state(ours))
    for _ in range(10):
        assert torch.equal(*(env.step(begun.clone())["next", "reward"] for env in (ours, theirs)))


def test_the_state_of_another_number_of_rows_is_refused():
    state = env_state(rows_of(lambda: BernoulliBandit(2), rows=3))
    for rows in (2, 4):
        with pytest.raises(ValueError, match=f"the state is one of 3 rows, and this env has {rows}"):
            put_env_state(rows_of(lambda: BernoulliBandit(2), rows=rows), state)


@pytest.mark.parametrize("kind", [SerialEnv, partial(ParallelEnv, mp_start_method="fork")])
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            lambda: GymTaskEnv(with_engine, set_task=set_gravity, task_spec=Unbounded(1)),
            "PendulumEnv.engine is a object, which cannot be saved",
        ),
        (
            lambda: GymEnv("Pendulum-v1"),
            "GymEnv does not hand out its state: derive it from rl2_torchrl.envs.Resumable first",
        ),
        (lambda: TransformedEnv(GymEnv("Pendulum-v1"), RewardSum()), "GymEnv does not hand out its state"),
    ],
)
def test_envs_side_by_side_say_why_they_have_no_state(row, reason, kind):
    env = rows_of(row, kind)
    with pytest.raises(NoStateError, match=re.escape(reason)):
        env_state(env)
    env.reset()  # all are alive
    env.close()


def test_closed_envs_are_not_opened_anew_for_their_state():
    env = rows_of(lambda: BernoulliBandit(2))
    env.close()
    with pytest.raises(NoStateError, match="SerialEnv has closed its envs"):
        env_state(env)
    assert env.is_closed


def test_a_parallel_env_without_buffers_or_with_a_dead_process_has_no_state():
    env = rows_of(lambda: BernoulliBandit(2), partial(ParallelEnv, mp_start_method="fork", use_buffers=False))
    with pytest.raises(NoStateError, match="without buffers"):
        env_state(env)
    env.close()
    env = rows_of(lambda: BernoulliBandit(2), partial(ParallelEnv, mp_start_method="fork"))
    env._workers[1].kill()
    env._workers[1].join()
    with pytest.raises(NoStateError, match="a process of the ParallelEnv has ended"):
        env_state(env)


def test_what_looks_into_a_simulation_still_does():
    pytest.importorskip("mujoco")

    def made(seed):
        env = gymnasium.make("InvertedPendulum-v5").unwrapped
        env.cart, env.masses = env.data.qpos[:1], env.model.body_mass[1:]
        env.reset(seed=seed)
        return env

    env, other = made(1), made(5)
    for _ in range(3):
        env.step(np.array([1.0], np.float32))
    put_state(other, state_of(env))
    assert np.shares_memory(other.cart, other.data.qpos)
    assert np.shares_memory(other.masses, other.model.body_mass)
    assert other.cart == env.cart
