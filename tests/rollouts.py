"""Envs, policies and batches for the tests of rollouts: the same trials by `Rollout` and by TorchRL's `Collector`."""

from contextlib import contextmanager
from unittest.mock import patch

import torch
from tensordict import TensorDict
from torchrl.data import Categorical, Composite, OneHot, Unbounded
from torchrl.envs import (
    Compose,
    EnvBase,
    ParallelEnv,
    SerialEnv,
    TransformedEnv,
)

from rl2_torchrl import (
    ActorCritic,
    GRUCategoricalActor,
    GRUGaussianActor,
    GRUValueHead,
    MemoryValueHead,
    PreviousStep,
    TaskSampler,
    Trial,
    TrialCollector,
)
from rl2_torchrl.envs import (
    BernoulliBandit,
    GridNavi,
    GymTaskEnv,
    HalfCheetahVelocity,
    PointRobot,
    QuadraticBandit,
    TabularMDP,
    TensorEnv,
    grid_goals,
    random_mdps,
    uniform_means,
    uniform_targets,
    velocities,
)

#: Entries that networks give; with continuous actions all that follows from these is as near, no nearer.
OF_NETWORKS = {"action", "action_log_prob", "logits", "loc", "scale", "state_value"}
OF_NETWORKS |= {f"{network}_{entry}" for network in ("actor", "critic") for entry in ("hidden", "features")}


@contextmanager
def same_noise():
    """TorchRL's categorical draws by Gumbel noise, as a rollout does; the default is another of the same distribution.

    What can wait looks at a few steps at once, so that batches of these sizes take several looks.
    """

    def sample(self, sample_shape=()):
        noise = torch.empty((*sample_shape, *self.logits.shape)).uniform_().log_().neg_().log_().neg_()
        return (self.logits + noise).argmax(-1)

    with (
        patch("torch.distributions.Categorical.sample", sample),
        patch("rl2_torchrl.rollout.rollout._ROWS_AT_ONCE", 16),
    ):
        yield


def named(value):
    """A test's name for classes, alone or in a list, and for all else."""
    if isinstance(value, list):
        return "+".join(each.__name__ for each in value) or "ours"
    return value.__name__ if isinstance(value, type) else str(value)


class Guess(TensorEnv):
    """A hidden number is to be guessed; the episode ends at the right guess, and after 6 guesses at the latest."""

    def __init__(self, numbers=5, **kwargs):
        spaces = {"observation_spec": Categorical(3), "action_spec": Categorical(numbers)}
        super().__init__(task_spec=Unbounded(1), **spaces, max_episode_steps=6, seed=0, **kwargs)

    def begin(self, task, rows):
        number = task.squeeze(-1).long()
        return number, torch.ones_like(number)

    def advance(self, state, action):
        right = (action == state).unsqueeze(-1)
        return state, 1 + torch.sign(action - state), -1.0 + right, right, None


class Walk(EnvBase):
    """A user's env: where a row stands is kept in the TensorDict alone, in "place", which it shows, and "steps", which it hides.

    An episode ends at ``task``, or after 6 steps.
    """

    def __init__(self, rows=4):
        super().__init__(batch_size=(rows,))
        number = Unbounded((rows, 1), dtype=torch.int64)
        self.state_spec = Composite(task=number.clone(), steps=number.clone(), shape=(rows,))
        self.observation_spec = Composite(place=number.clone(), steps=number.clone(), shape=(rows,))
        self.action_spec, self.reward_spec = Categorical(2, shape=(rows,)), Unbounded((rows, 1))

    def _reset(self, tensordict=None, **kwargs):
        zeros = torch.zeros(*self.batch_size, 1, dtype=torch.int64)
        return TensorDict({"place": zeros, "steps": zeros.clone()}, self.batch_size)

    def _step(self, tensordict):
        place, steps = tensordict["place"] + tensordict["action"].unsqueeze(-1), tensordict["steps"] + 1
        terminated, late = place >= tensordict["task"], steps >= 6
        ends = {"done": terminated | late, "terminated": terminated}
        return TensorDict({"place": place, "steps": steps, "reward": 0.5 * place, **ends}, self.batch_size)

    def _set_seed(self, seed):
        pass


def numbers(batch_size, generator):
    return torch.randint(1, 5, (*batch_size, 1), generator=generator).float()


def whole_numbers(batch_size, generator):
    return numbers(batch_size, generator).long()


def gravities(batch_size, generator):
    return 5 + 10 * torch.rand(*batch_size, 1, generator=generator)


def set_gravity(env, task):
    env.g = task.item()


def set_length(env, task):
    env.length = task.item()


def pendulum():
    return GymTaskEnv("Pendulum-v1", set_task=set_gravity, task_spec=Unbounded((1,)), max_episode_steps=5)


def cart_pole():
    return GymTaskEnv("CartPole-v1", set_task=set_length, task_spec=Unbounded((1,)))


def seeded(env):
    env.set_seed(0)
    return env


class Doubled(Guess):
    """Pays twice as much, by a step of its own."""

    def _step(self, tensordict):
        after = super()._step(tensordict)
        return after.set("reward", 2 * after["reward"])


class Rooms(TensorEnv):
    """Entries of all kinds: an index, a nested vector, a picture, and the last move, which tells of the step itself."""

    def __init__(self, rows=3, one_hot=False, **kwargs):
        self.one_hot = one_hot
        spec = {"room": Categorical(4), "inside": {"light": Unbounded(2)}, "picture": Unbounded((2, 2))}
        move = Composite(move=Unbounded(1, dtype=torch.int64))
        action = OneHot(3) if one_hot else Categorical(3)
        spaces = {"observation_spec": Composite(spec), "action_spec": action, "more_spec": move}
        task = Composite(home=Unbounded(1, dtype=torch.int64), cost=Unbounded(1))
        super().__init__(task_spec=task, **spaces, max_episode_steps=5, batch_size=(rows,), seed=0, **kwargs)

    def begin(self, task, rows):
        home = task["home"].squeeze(-1)
        state = {"room": torch.zeros_like(home), "home": home, "cost": task["cost"], "move": torch.zeros_like(home)}
        return state, self.look(state)

    def advance(self, state, action):
        move = action.long().argmax(-1) if self.one_hot else action
        state = {**state, "room": (state["room"] + move) % 4, "move": move}
        at_home = (state["room"] == state["home"]).unsqueeze(-1)
        noise = torch.rand(state["cost"].shape, generator=self.generator)
        seen = dict(reversed(self.look(state).items()))  # in another order than an episode's first
        return state, seen, at_home.float() - noise * state["cost"], None, at_home

    def look(self, state):
        room = state["room"]
        light = torch.stack((room.float(), -room.float()), -1)
        return {"room": room, ("inside", "light"): light, "picture": light.unsqueeze(-1).expand(-1, 2, 2) / 2}

    def observe_more(self, state):
        return {"move": state["move"].unsqueeze(-1)}


def homes(batch_size, generator):
    home = torch.randint(1, 4, (*batch_size, 1), generator=generator)
    return TensorDict({"home": home, "cost": torch.rand(home.shape, generator=generator)}, batch_size)


ENVS = {
    "bandit": (lambda: BernoulliBandit(3, batch_size=(4,), seed=0), uniform_means(3)),
    "quadratic": (lambda: QuadraticBandit(2, batch_size=(4,), seed=0), uniform_targets(2)),
    "mdp": (lambda: TabularMDP(4, 2, episode_steps=5, batch_size=(4,), seed=0), random_mdps(4, 2)),
    "grid": (lambda: GridNavi(3, episode_steps=4, batch_size=(4,)), grid_goals(3)),
    "point": (
        lambda: PointRobot(step_size=0.5, goal_radius=0.6, max_episode_steps=6, batch_size=(5,)),
        uniform_targets(2),
    ),
    "guess": (lambda: Guess(batch_size=(4,)), numbers),
    "guess alone": (lambda: Guess(), numbers),
    "guess 2x3": (lambda: Guess(batch_size=(2, 3)), numbers),
    "mdp 2x3": (lambda: TabularMDP(4, 2, episode_steps=5, batch_size=(2, 3), seed=0), random_mdps(4, 2)),
    "cheetah": (lambda: HalfCheetahVelocity(horizon=4, batch_size=(2,), seed=0), velocities()),
    "pendulum": (lambda: seeded(SerialEnv(3, pendulum)), gravities),
    "cart pole": (lambda: seeded(SerialEnv(3, cart_pole)), gravities),
    "pendulum alone": (lambda: seeded(pendulum()), gravities),
    "workers": (lambda: seeded(ParallelEnv(3, pendulum, mp_start_method="fork")), gravities),
    "walk": (Walk, whole_numbers),
    "rooms": (Rooms, homes),
    "doubled": (lambda: Doubled(batch_size=(4,)), numbers),
    "one-hot rooms": (lambda: Rooms(one_hot=True), homes),
}


def make_env(name, *transforms, sampled=True, **trial):
    make, tasks = ENVS[name]
    sampler = [TaskSampler(tasks, seed=1)] if sampled else []
    previous = PreviousStep(trial.pop("obs_keys", None), done_at_start=trial.pop("done_at_start", 0.0))
    return TransformedEnv(make(), Compose(Trial(**trial), *sampler, previous, *transforms))


def make_policy(env, wiring="own", still=False):
    """Actor and critic; ``still``: the actions are noise alone, of which the networks do not change a bit."""
    torch.manual_seed(3)
    actor_class = GRUGaussianActor if env.action_spec.dtype.is_floating_point else GRUCategoricalActor
    unseen = {"encoder": {"picture": None}} if "picture" in env.observation_spec.keys() else {}
    actor = actor_class.from_env(env, hidden_size=8, init_range=0.0 if still else 0.5, **unseen)
    if wiring == "own":
        critic = GRUValueHead.from_env(env, hidden_size=6, extra_keys=["time_left"], **unseen)
    else:
        critic = MemoryValueHead.from_env(env, actor, detach=True, extra_keys=["time_left"], init_range=1.0)
    return ActorCritic(actor, critic)


def batches_of(env, policy, steps, rollout, batches=3, keep=None, **kwargs):
    frames = steps * env.batch_size.numel()
    collector = TrialCollector(
        env, policy, frames_per_batch=frames, total_frames=-1, rollout=rollout, keep=keep, **kwargs
    )
    torch.manual_seed(7)
    iterator = iter(collector)
    with same_noise():
        collected = [next(iterator).clone() for _ in range(batches)]
    collector.shutdown()
    return collector, collected


def both(make, steps, policy=make_policy, **kwargs):
    """Batches of the rollout and of `Collector`, of the same env, policy and noise."""
    results = []
    for rollout in ("tensors", "tensordicts"):
        env = make()
        collector, collected = batches_of(env, policy(env), steps, rollout, **kwargs)
        assert collector.backend == rollout
        results.append((collector, collected))
    return results


def assert_same(fast, slow, is_exact=True):
    for number, (batch, expected) in enumerate(zip(fast, slow, strict=True)):
        assert (batch.batch_size, batch.names) == (expected.batch_size, expected.names)
        assert set(batch.keys(True, True)) == set(expected.keys(True, True))
        for key in expected.keys(True, True):
            one, other = batch[key], expected[key]
            where = f"batch {number}, {key}"
            assert (one.shape, one.dtype) == (other.shape, other.dtype), where
            of_networks = (key[-1] if isinstance(key, tuple) else key) in OF_NETWORKS
            if one.is_floating_point() and (of_networks or not (is_exact or key == "task")):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, msg=lambda text, at=where: f"{at}: {text}")
            else:
                assert torch.equal(one, other), f"{where}: {(one != other).nonzero()[:3].tolist()}"
