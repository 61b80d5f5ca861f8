"""Bandits and the Gymnasium bridge: rewards by hand and in the mean, tasks that reach the env, resumed generators."""

import math

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control import PendulumEnv
from gymnasium.wrappers import TimeLimit, TransformReward
from tensordict import TensorDict
from torchrl.data import Unbounded
from torchrl.envs import Compose, ParallelEnv, SerialEnv, TransformedEnv, check_env_specs

from rl2_torchrl import PreviousStep, TaskSampler, Trial
from rl2_torchrl.envs import BernoulliBandit, GymTaskEnv, QuadraticBandit, uniform_means, uniform_targets
from rl2_torchrl.testing import check_trial_env


def pull(env, task, action):
    """The rewards of ``action`` on ``task``, both ``[*B, ...]``."""
    tensordict = env.reset(TensorDict({"task": task}, env.batch_size))
    data = env.step(tensordict.set("action", action))
    assert data["next", "done"].all()  # each pull is an episode
    assert data["next", "terminated"].all()
    return data["next", "reward"].squeeze(-1)


# ---- Bernoulli bandit.


def test_certain_arms_by_hand():
    env = BernoulliBandit(3, batch_size=(2, 2), seed=0)
    task = torch.tensor([[[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], [[0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]])
    action = torch.tensor([[1, 1], [2, 2]])
    assert pull(env, task, action).tolist() == [[1, 0], [1, 0]]


def test_arms_pay_as_often_as_their_means_say():
    rows, means = 40_000, torch.tensor([0.1, 0.5, 0.85])
    env = BernoulliBandit(3, batch_size=(rows,), seed=0)
    for arm, mean in enumerate(means.tolist()):
        rewards = [pull(env, means.expand(rows, 3), torch.full((rows,), arm)) for _ in range(2)]
        tolerance = 3 * math.sqrt(mean * (1 - mean) / rows)
        for reward in rewards:
            assert set(reward.unique().tolist()) == {0.0, 1.0}
            assert abs(reward.mean().item() - mean) < tolerance
        # Pulls are independent of each other.
        assert abs((rewards[0] * rewards[1]).mean().item() - mean**2) < tolerance


# ---- Quadratic bandit.


def test_quadratic_reward_by_hand():
    env = QuadraticBandit(2, noise=0.0, batch_size=(3,))
    task = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-0.5, 2.0]])
    action = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.5, 0.0]])
    # 0; 1 + 4; 1 + 4.
    assert pull(env, task, action).tolist() == [0, -5, -5]


def test_quadratic_noise_has_its_mean_and_scale():
    rows, noise = 40_000, 0.3
    env = QuadraticBandit(1, noise=noise, batch_size=(rows,), seed=0)
    rewards = pull(env, torch.zeros(rows, 1), torch.ones(rows, 1))
    assert abs(rewards.mean().item() + 1) < 3 * noise / math.sqrt(rows)
    # The standard error of a standard deviation is sigma / sqrt(2 n).
    assert abs(rewards.std().item() - noise) < 3 * noise / math.sqrt(2 * rows)


# ---- Both.

BANDITS = [
    lambda **kwargs: BernoulliBandit(3, **kwargs),
    lambda **kwargs: QuadraticBandit(3, **kwargs),
]


def ten_rewards(env):
    rows = env.batch_size
    action = torch.zeros(*rows, 3) if isinstance(env, QuadraticBandit) else torch.zeros(rows, dtype=torch.int64)
    return torch.stack([pull(env, torch.full((*rows, 3), 0.5), action) for _ in range(10)])


@pytest.mark.parametrize("make", BANDITS)
def test_the_envs_generator_is_the_only_randomness(make):
    state = torch.get_rng_state()
    first = ten_rewards(make(batch_size=(8,), seed=1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(ten_rewards(make(batch_size=(8,), seed=1)), first)
    assert not torch.equal(ten_rewards(make(batch_size=(8,), seed=2)), first)
    assert not torch.equal(ten_rewards(make(batch_size=(8,))), ten_rewards(make(batch_size=(8,))))
    env = make(batch_size=(8,), seed=2)
    env.set_seed(1)
    assert torch.equal(ten_rewards(env), first)


@pytest.mark.parametrize("make", BANDITS)
def test_generator_state_round_trip(make):
    env, resumed = make(batch_size=(8,), seed=1), make(batch_size=(8,), seed=2)
    ten_rewards(env)
    resumed.load_state_dict(env.state_dict())
    assert torch.equal(ten_rewards(env), ten_rewards(resumed))


@pytest.mark.parametrize("batch_size", [(), (4,), (2, 3)])
@pytest.mark.parametrize("make", BANDITS)
def test_specs_fit_the_data(make, batch_size):
    env = make(batch_size=batch_size)
    assert (env.action_spec.shape, env.reward_spec.shape) == (
        (*batch_size, 3) if isinstance(env, QuadraticBandit) else batch_size,
        (*batch_size, 1),
    )
    check_env_specs(TransformedEnv(env, Compose(Trial(episodes=2), TaskSampler(uniform_means(3)), PreviousStep())))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BernoulliBandit(0), "num_arms=0 must be a whole number"),
        (lambda: BernoulliBandit(2, batch_size=(0,)), r"batch_size=\(0,\) holds no env"),
        (lambda: QuadraticBandit(1, batch_size=(3, 0)), r"batch_size=\(3, 0\) holds no env"),
        (lambda: QuadraticBandit(0), "dim=0 must be a whole number"),
        (lambda: QuadraticBandit(1, noise=-0.1), "must be at least 0"),
        (lambda: QuadraticBandit(1, noise=math.nan), "must be at least 0"),
    ],
)
def test_bad_sizes(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("distribution", "low", "high"),
    [(uniform_means(3), 0.0, 1.0), (uniform_targets(3), -1.0, 1.0), (uniform_targets(3, 2.0, 6.0), 2.0, 6.0)],
)
def test_task_distributions_are_uniform(distribution, low, high):
    tasks = distribution(torch.Size([200, 100]), torch.Generator().manual_seed(0))
    assert tasks.shape == (200, 100, 3)
    assert low <= tasks.min() < low + 1e-2 * (high - low)
    assert high - 1e-2 * (high - low) < tasks.max() <= high
    share = (tasks - low) / (high - low)
    # Mean 1/2 and mean square 1/3, of variances 1/12 and 4/45; the three entries are drawn independently.
    assert abs(share.mean().item() - 1 / 2) < 3 * math.sqrt(1 / 12 / share.numel())
    assert abs(share.square().mean().item() - 1 / 3) < 3 * math.sqrt(4 / 45 / share.numel())
    assert abs((share[..., 0] * share[..., 1]).mean().item() - 1 / 4) < 3 * math.sqrt(7 / 144 / 20_000)


# ---- Gymnasium.


class Spied:
    """Applies the task to the pendulum and remembers it."""

    def __init__(self):
        self.given = []

    def __call__(self, env, task):
        self.given.append(task.tolist())
        env.g = float(task)


def pendulum(set_task):
    task_spec = Unbounded((1,))
    return GymTaskEnv("Pendulum-v1", set_task=set_task, task_spec=task_spec, max_episode_steps=3)


def test_gym_env_is_given_its_task_at_every_reset():
    spy = Spied()
    env = TransformedEnv(
        pendulum(spy), Compose(Trial(episodes=2), TaskSampler.fixed(torch.tensor([[9.0], [1.0]])), PreviousStep())
    )
    data = env.rollout(12, break_when_any_done=False)
    # Two trials of two episodes: the inner resets bring the same task.
    assert spy.given == [[9.0], [9.0], [1.0], [1.0]]
    assert data["task"].squeeze(-1).tolist() == [9.0] * 6 + [1.0] * 6


FORMS = {
    "id": lambda **kwargs: GymTaskEnv("Pendulum-v1", max_episode_steps=3, **kwargs),
    "env": lambda **kwargs: GymTaskEnv(gymnasium.make("Pendulum-v1", max_episode_steps=3), **kwargs),
    "function": lambda **kwargs: GymTaskEnv(lambda: gymnasium.make("Pendulum-v1", max_episode_steps=3), **kwargs),
    "wrapped": lambda **kwargs: GymTaskEnv(
        TransformReward(gymnasium.make("Pendulum-v1", max_episode_steps=3), lambda reward: reward), **kwargs
    ),
    "class": lambda **kwargs: GymTaskEnv(Limited, **kwargs),
}


class Limited(TimeLimit):
    def __init__(self):
        super().__init__(PendulumEnv(), 3)


@pytest.mark.parametrize("form", FORMS)
def test_gym_env_by_id_as_an_env_and_by_a_function(form):
    spy = Spied()
    base = FORMS[form](set_task=spy, task_spec=Unbounded((1,)))
    base.set_seed(0)
    env = TransformedEnv(base, Compose(Trial(episodes=2), TaskSampler(uniform_means(1), seed=0), PreviousStep()))
    check_trial_env(env)
    tensordict, played = env.reset(), len(spy.given)
    assert base.unwrapped.g == tensordict["task"].item()
    data = env.rollout(6, auto_reset=False, tensordict=tensordict)
    assert data["next", "episode_done"].squeeze(-1).tolist() == [False, False, True] * 2
    assert spy.given[played:] == [tensordict["task"].tolist()]


def test_gym_env_in_workers_by_a_function():
    env = ParallelEnv(
        2, lambda: FORMS["function"](set_task=set_gravity, task_spec=Unbounded((1,))), mp_start_method="fork"
    )
    first = env.reset(TensorDict({"task": torch.tensor([[1.0], [2.0]])}, [2]))
    assert first["task"].tolist() == [[1.0], [2.0]]
    env.close()


def set_gravity(env, task):
    env.g = float(task)


@pytest.mark.parametrize(
    ("env", "options", "message"),
    [
        (None, {}, "None is no gymnasium.Env"),
        (lambda: "Pendulum-v1", {}, "Pendulum-v1 is no gymnasium.Env"),
        (PendulumEnv, {"max_episode_steps": 3}, r"\['max_episode_steps'\] are options of gymnasium.make"),
    ],
)
def test_gym_env_of_what_is_no_env(env, options, message):
    with pytest.raises(TypeError, match=message):
        GymTaskEnv(env, set_task=set_gravity, task_spec=Unbounded((1,)), **options)


class Heard(gymnasium.Env):
    """Keeps the actions that it is given."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,))

    def __init__(self, action_space):
        self.action_space, self.heard = action_space, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.heard.append(action)
        return self.observation_space.sample(), 0.0, False, False, {}


@pytest.mark.parametrize(
    ("space", "action", "expected"),
    [
        (gymnasium.spaces.Discrete(3, start=2), [0, 1, 0], 3),
        (gymnasium.spaces.MultiDiscrete([2, 3], start=[5, 7]), [0, 1, 0, 0, 1], [6, 9]),
        (gymnasium.spaces.Box(-0.1, 0.5, (2,)), [-0.3, 0.3], [-0.1, 0.3]),
        (gymnasium.spaces.Box(-1, 1, ()), [0.25], 0.25),
    ],
    ids=str,
)
def test_gym_actions_reach_the_env_as_its_space_says(space, action, expected):
    env = GymTaskEnv(lambda: Heard(space), set_task=lambda env, task: None, task_spec=Unbounded((1,)))
    env.step(env.reset().set("action", torch.tensor(action, dtype=env.action_spec.dtype)))
    (heard,) = env.unwrapped.heard
    assert heard == pytest.approx(np.asarray(expected))


@pytest.mark.parametrize(
    "space",
    [
        gymnasium.spaces.Discrete(4, start=1),
        gymnasium.spaces.Dict({"at": gymnasium.spaces.MultiDiscrete([2, 3], start=[0, 1])}),
        gymnasium.spaces.Box(0, 9, (1,), np.uint16),
    ],
    ids=str,
)
def test_gym_observations_that_torchrl_would_show_otherwise_are_refused(space):
    env = Heard(gymnasium.spaces.Discrete(2))
    env.observation_space = space
    with pytest.raises(ValueError, match=r"observes (Multi)?(Box|Discrete).*GymVectorEnv\(make_env, num_envs"):
        GymTaskEnv(env, set_task=set_gravity, task_spec=Unbounded((1,)))


def test_workers_with_several_choices_as_numbers():
    space = gymnasium.spaces.MultiDiscrete([2, 3])
    options = {"set_task": lambda env, task: None, "task_spec": Unbounded((1,)), "categorical_action_encoding": True}
    workers = SerialEnv(2, lambda: GymTaskEnv(lambda: Heard(space), **options))
    env = TransformedEnv(workers, Compose(Trial(steps=2), TaskSampler(uniform_means(1)), PreviousStep()))
    first = env.reset()
    seen = env.step(first.set("action", torch.tensor([[1, 2], [0, 1]])))["next", "trans"]
    assert seen[:, 1:6].tolist() == [
        [0, 1, 0, 0, 1],
        [1, 0, 0, 1, 0],
    ]  # one-hot; the observation is before, reward and done after


def test_gym_tasks_change_the_dynamics():
    # From rest at angle th, without torque, the speed after one step of 0.05 s is 3 g / (2 l) sin(th) * 0.05.
    for gravity in (0.0, 4.0):
        env = pendulum(Spied())
        tensordict = env.reset(TensorDict({"task": torch.tensor([gravity])}))
        env.unwrapped.state = torch.tensor([0.5, 0.0]).numpy()
        data = env.step(tensordict.set("action", torch.zeros(1)))
        expected = 1.5 * gravity * math.sin(0.5) * 0.05
        assert data["next", "observation"][2].item() == pytest.approx(expected, abs=1e-6)


def test_gym_workers_are_given_their_own_tasks():
    spies = [Spied(), Spied()]
    workers = SerialEnv(2, [lambda spy=spy: pendulum(spy) for spy in spies])
    tasks = TaskSampler.fixed(torch.tensor([[1.0], [2.0], [3.0], [4.0]]))
    env = TransformedEnv(workers, Compose(Trial(episodes=2), tasks, PreviousStep()))
    data = env.rollout(12, break_when_any_done=False)
    assert data["task"].squeeze(-1).tolist() == [[1.0] * 6 + [3.0] * 6, [2.0] * 6 + [4.0] * 6]
    assert [spy.given for spy in spies] == [[[1.0], [1.0], [3.0], [3.0]], [[2.0], [2.0], [4.0], [4.0]]]
    check_env_specs(env)


def test_gym_env_without_a_task_keeps_its_own():
    spy = Spied()
    env = pendulum(spy)
    env.reset()
    assert spy.given == []
    assert env.unwrapped.g == 10.0
