"""`Rollout`: with the same noise its batches are those of TorchRL's `Collector` over the transforms, whatever it plays."""

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.data import Categorical, Composite, OneHot, Unbounded
from torchrl.envs import (
    Compose,
    DoubleToFloat,
    EnvBase,
    GymEnv,
    ParallelEnv,
    RewardSum,
    SerialEnv,
    StepCounter,
    TransformedEnv,
)
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import GRUModule, IndependentNormal, LSTMModule, OneHotCategorical, ProbabilisticActor

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
from rl2_torchrl.collector import load_rollout_state, rollout_state
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
from rl2_torchrl.modules.acting import acting_parts
from rl2_torchrl.modules.gru import FastGRUModule
from rl2_torchrl.rollout import Rollout

#: Entries that networks give; with continuous actions all that follows from these is as near, no nearer.
OF_NETWORKS = {"action", "action_log_prob", "logits", "loc", "scale", "state_value"}
OF_NETWORKS |= {f"{network}_{entry}" for network in ("actor", "critic") for entry in ("hidden", "features")}


@pytest.fixture(autouse=True)
def several_looks_at_a_batch(monkeypatch):
    """What can wait looks at a few steps at once, so that a batch of these sizes takes several looks."""
    monkeypatch.setattr("rl2_torchrl.rollout.rollout._ROWS_AT_ONCE", 16)


@pytest.fixture(autouse=True)
def gumbel_noise(monkeypatch):
    """TorchRL's categorical draws by Gumbel noise, as a rollout does; the default is another of the same distribution."""

    def sample(self, sample_shape=()):
        noise = torch.empty((*sample_shape, *self.logits.shape)).uniform_().log_().neg_().log_().neg_()
        return (self.logits + noise).argmax(-1)

    monkeypatch.setattr(torch.distributions.Categorical, "sample", sample)


# ------------------------------------------------------------------- what is played


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
}


def make_env(name, *transforms, sampled=True, **trial):
    make, tasks = ENVS[name]
    sampler = [TaskSampler(tasks, seed=1)] if sampled else []
    previous = PreviousStep(done_at_start=trial.pop("done_at_start", 0.0))
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
        assert batch.batch_size == expected.batch_size
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


CASES = [
    # Native envs of one length: whole trials, several trials, and batches that cut them.
    ("bandit", {"episodes": 10}, 10),
    ("bandit", {"episodes": 4, "done_at_start": 1.0}, 8),
    ("bandit", {"episodes": 10}, 7),
    ("bandit", {"episodes": 4, "truncate": True}, 6),
    ("bandit", {"steps": 3}, 7),
    ("mdp", {"episodes": 3}, 15),
    ("mdp", {"episodes": 3, "steps": 8}, 20),
    ("mdp", {"steps": 8}, 7),
    ("mdp", {"episodes": 2, "truncate": True}, 7),
    ("mdp 2x3", {"episodes": 2}, 7),
    ("grid", {"episodes": 2}, 8),
    ("grid", {"episodes": 3, "steps": 10}, 7),
    # Ragged ones.
    ("guess", {"episodes": 3}, 9),
    ("guess", {"episodes": 1, "done_at_start": 1.0}, 9),
    ("guess", {"steps": 7}, 9),
    ("guess", {"episodes": 3, "steps": 7}, 9),
    ("guess", {"episodes": 2, "truncate": True}, 9),
    ("guess alone", {"episodes": 3}, 9),
    ("guess 2x3", {"episodes": 3, "steps": 9}, 9),
    ("walk", {"episodes": 2}, 9),
    ("walk", {"episodes": 3, "steps": 7, "truncate": True}, 9),
    # Gymnasium's, one by one.
    ("cart pole", {"episodes": 2}, 25),
    ("cart pole", {"episodes": 2, "steps": 17}, 20),
]


@pytest.mark.parametrize(("name", "trial", "steps"), CASES, ids=str)
def test_batches_of_discrete_actions_are_collectors(name, trial, steps):
    wiring = "memory" if "steps" in trial else "own"
    (fast, ours), (_, theirs) = both(lambda: make_env(name, **trial), steps, lambda env: make_policy(env, wiring))
    assert fast.reason is None
    assert_same(ours, theirs)


CONTINUOUS = [
    ("quadratic", {"episodes": 4}, 8),
    ("quadratic", {"steps": 4, "done_at_start": 1.0}, 6),
    ("point", {"episodes": 2}, 9),
    ("point", {"episodes": 3, "steps": 8, "truncate": True}, 7),
    ("cheetah", {"episodes": 2}, 6),
    ("pendulum", {"episodes": 2}, 7),
    ("pendulum", {"steps": 7}, 9),
    ("pendulum alone", {"episodes": 2}, 7),
]


@pytest.mark.parametrize("still", [True, False], ids=["noise alone", "networks"])
@pytest.mark.parametrize(("name", "trial", "steps"), CONTINUOUS, ids=str)
def test_batches_of_continuous_actions_are_collectors(name, trial, steps, still):
    (fast, ours), (_, theirs) = both(lambda: make_env(name, **trial), steps, lambda env: make_policy(env, still=still))
    assert fast.reason is None
    assert_same(ours, theirs, is_exact=still)


def test_batches_in_which_trials_begin_and_others_in_which_none_does():
    # Trials of 8 steps in batches of 3: the task of a batch is now one, now two.
    (_, ours), (_, theirs) = both(lambda: make_env("bandit", episodes=8), 3, batches=9, keep=["task", ("next", "task")])
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["guess", "walk", "cart pole", "mdp"])
def test_further_transforms_play_on_tensordicts_and_say_so(name):
    def make():
        return make_env(name, StepCounter(), RewardSum(), episodes=2)

    (fast, ours), (_, theirs) = both(make, 9)
    assert "StepCounter, RewardSum beside our transforms" in fast.reason
    assert_same(ours, theirs)


def test_batches_over_workers_are_those_of_envs_one_by_one():
    results = []
    for name, rollout in (("workers", "tensors"), ("pendulum", "tensordicts")):
        env = make_env(name, episodes=2)
        results.append(batches_of(env, make_policy(env, still=True), 7, rollout)[1])
    assert_same(*results)


# ------------------------------------------------------- envs of other kinds


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
        return state, self.look(state), at_home.float() - noise * state["cost"], None, at_home

    def look(self, state):
        room = state["room"]
        light = torch.stack((room.float(), -room.float()), -1)
        return {"room": room, ("inside", "light"): light, "picture": light.unsqueeze(-1).expand(-1, 2, 2) / 2}

    def observe_more(self, state):
        return {"move": state["move"].unsqueeze(-1)}


def homes(batch_size, generator):
    home = torch.randint(1, 4, (*batch_size, 1), generator=generator)
    return TensorDict({"home": home, "cost": torch.rand(home.shape, generator=generator)}, batch_size)


def no_tasks(name):
    return {
        "gym": lambda: seeded(GymEnv("CartPole-v1")),
        "guess": lambda: Guess(batch_size=(3,)),
    }[name]()


ENVS["rooms"] = (Rooms, homes)
ENVS["one-hot rooms"] = (lambda: Rooms(one_hot=True), homes)
ENVS["inner transforms"] = (
    lambda: TransformedEnv(Walk(), Compose(StepCounter(), RewardSum(), DoubleToFloat())),
    whole_numbers,
)


@pytest.mark.parametrize("name", ["rooms", "one-hot rooms"])
@pytest.mark.parametrize("trial", [{"episodes": 3}, {"episodes": 2, "steps": 7, "step_keys": ["move"]}], ids=str)
def test_entries_of_all_kinds_and_tasks_of_several_entries(name, trial):
    (fast, ours), (_, theirs) = both(lambda: make_env(name, **trial), 11)
    assert fast.reason is None
    assert_same(ours, theirs)
    assert "picture" in ours[0].keys()
    assert ours[0]["trans"].shape[-1] == 4 + 2 + 1 + 3 + 2  # without the picture


def test_an_entry_that_is_kept_is_kept_with_all_that_it_holds():
    kept = ["task", "inside", ("next", "inside", "light"), ("next", "task")]
    (_, ours), (_, theirs) = both(lambda: make_env("rooms", episodes=2), 6, keep=kept)
    assert_same(ours, theirs)
    inner = {("inside", "light"), ("task", "home"), ("task", "cost")}
    assert set(ours[0].keys(True, True)) == inner | {("next", *key) for key in inner}


def test_velocity_is_kept_when_asked_for():
    def make():
        return make_env("cheetah", episodes=2, step_keys=["velocity"])

    keep = ["velocity", ("next", "velocity"), "action"]
    (_, ours), (_, theirs) = both(make, 6, lambda env: make_policy(env, still=True), keep=keep)
    assert_same(ours, theirs)
    assert set(ours[0].keys(True, True)) == set(keep)


def test_transforms_inside_are_the_envs_own():
    def make():
        make_inner, tasks = ENVS["inner transforms"]
        ours = Compose(Trial(episodes=2), TaskSampler(tasks, seed=1), PreviousStep())
        return TransformedEnv(make_inner(), ours, auto_unwrap=False)

    (fast, ours), (_, theirs) = both(make, 9)
    assert fast.reason is None
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["gym", "guess"])
def test_envs_without_a_task(name):
    def make():
        return TransformedEnv(no_tasks(name), Compose(Trial(episodes=2), PreviousStep()))

    (fast, ours), (_, theirs) = both(make, 15)
    assert fast.reason is None
    # A TensorEnv plays the task of zeros, and writes it in a reset; nobody has asked for it.
    assert_same(ours, [batch.exclude("task") for batch in theirs])


# ------------------------------------------------------------- what is asked of itself


class Doubled(Guess):
    """Pays twice as much, by a step of its own."""

    def _step(self, tensordict):
        after = super()._step(tensordict)
        return after.set("reward", 2 * after["reward"])


class NoBadNews(PreviousStep):
    """Shows no reward below 0, by a step of its own."""

    def _step(self, tensordict, next_tensordict):
        after = super()._step(tensordict, next_tensordict)
        after["trans"][..., -2].clamp_(min=0)
        return after


class NoNews(PreviousStep):
    """Shows no reward at all: a method that its step calls."""

    def combine(self, observations, action, reward, done):
        return super().combine(observations, action, torch.zeros_like(reward), done)


class Lucky(Trial):
    """Ends at a reward of 0, by a step of its own."""

    def _step(self, tensordict, next_tensordict):
        after = super()._step(tensordict, next_tensordict)
        self._set_done(after, after["done"] | (after["reward"] == 0))
        return after


class Short(Trial):
    """Ends at the second step: a method that its step calls."""

    def _is_over(self, episode_index, trial_step):
        return trial_step >= 2


class Worthless(TaskSampler):
    """Draws the same task always, by a reset of its own."""

    def _reset_env_preprocess(self, tensordict):
        tensordict = super()._reset_env_preprocess(tensordict)
        return tensordict.set("task", torch.full_like(tensordict["task"], 3.0))


ENVS["doubled"] = (lambda: Doubled(batch_size=(4,)), numbers)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"base": Doubled}, None),
        ({"previous": NoBadNews}, "NoBadNews"),
        ({"previous": NoNews}, "NoNews"),
        ({"trial": Lucky}, "Lucky beside"),
        ({"trial": Short}, "Short beside"),
        ({"sampler": Worthless}, "Worthless"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, dict) else next(iter(value.values())).__name__,
)
def test_a_class_below_ours_that_does_otherwise(parts, reason):
    def make():
        kinds = {"base": Guess, "trial": Trial, "sampler": TaskSampler, "previous": PreviousStep, **parts}
        trial, sampler = kinds["trial"](episodes=2), kinds["sampler"](numbers, seed=1)
        return TransformedEnv(kinds["base"](batch_size=(4,)), Compose(trial, sampler, kinds["previous"]()))

    (fast, ours), (_, theirs) = both(make, 9)
    assert_same(ours, theirs)
    assert (fast.reason is None) if reason is None else reason in fast.reason


def categorical(network):
    options = {"in_keys": ["logits"], "distribution_class": torch.distributions.Categorical, "return_log_prob": True}
    return ProbabilisticActor(network, **options)


def torchrls(core_class, **keys):
    """A policy of TorchRL's own modules."""
    core = core_class(input_size=10, hidden_size=8, in_key="trans", out_key="features", python_based=False, **keys)
    return categorical(TensorDictSequential(core, TensorDictModule(nn.Linear(8, 5), ["features"], ["logits"])))


class Reversed(TensorDictSequential):
    """Modules in an order of its own."""

    def forward(self, tensordict):
        for module in reversed(self.module):
            tensordict = module(tensordict)
        return tensordict


class Negative(FastGRUModule):
    """A core with a forward of its own."""

    def forward(self, tensordict):
        tensordict = super().forward(tensordict)
        return tensordict.set("features", -tensordict["features"])


class Timid(ProbabilisticTensorDictModule):
    """Takes no action but the first two."""

    def forward(self, *args, **kwargs):
        tensordict = super().forward(*args, **kwargs)
        return tensordict.set("action", tensordict["action"] % 2)


def with_hook(policy, find):
    find(policy).register_forward_hook(lambda module, args, out: shifted(out))
    return policy


def shifted(out):
    """Makes what follows from ``out`` another one, whatever it is."""
    if isinstance(out, torch.Tensor):
        return out.roll(1, -1) + 0.3
    return (
        out.set("trans", out["trans"] * 0.5)
        if "logits" not in out.keys()
        else out.set("logits", out["logits"].roll(1, -1))
    )


def memoryless(network):
    return categorical(TensorDictModule(network, ["trans"], ["logits"]))


def linear():
    return nn.Linear(10, 5)


POLICIES = {
    "TorchRL's GRU": lambda env: torchrls(GRUModule),
    "TorchRL's LSTM": lambda env: torchrls(LSTMModule, in_keys=None),
    "our GRU by hand": lambda env: torchrls_core(FastGRUModule(10, 8, in_key="trans", out_key="features")),
    "one module": lambda env: TensorDictModule(lambda trans: trans[..., :5].argmax(-1), ["trans"], ["action"]),
    "one module, two entries": lambda env: TensorDictModule(
        lambda trans, left: (trans[..., 3:8].argmax(-1), 2 * left), ["trans", "time_left"], ["action", "twice"]
    ),
    "without memory": lambda env: memoryless(linear()),
    "several layers in one module": lambda env: memoryless(nn.Sequential(nn.Linear(10, 6), nn.Tanh(), nn.Linear(6, 5))),
    "hook on all": lambda env: with_hook(make_policy(env), lambda policy: policy),
    "hook on the actor": lambda env: with_hook(make_policy(env), lambda policy: policy.actor),
    "hook on a linear layer": lambda env: with_hook(memoryless(linear()), lambda policy: policy.module[0].module),
    "a sequence with its own forward": lambda env: Reversed(
        TensorDictModule(lambda logits: logits.argmax(-1), ["logits"], ["action"]),
        TensorDictModule(linear(), ["trans"], ["logits"]),
    ),
    "a core with its own forward": lambda env: torchrls_core(Negative(10, 8, in_key="trans", out_key="features")),
    "a distribution with its own forward": lambda env: TensorDictSequential(
        TensorDictModule(linear(), ["trans"], ["logits"]),
        Timid(
            ["logits"],
            ["action"],
            distribution_class=torch.distributions.Categorical,
            default_interaction_type="random",
        ),
    ),
    "reads whether a trial begins": lambda env: TensorDictModule(
        lambda trans, first, ended: first.long().squeeze(-1) + 2 * ended.long().squeeze(-1),
        ["trans", "is_init", "episode_done"],
        ["action"],
    ),
}


def torchrls_core(core):
    return categorical(TensorDictSequential(core, TensorDictModule(nn.Linear(8, 5), ["features"], ["logits"])))


@pytest.mark.parametrize(
    ("name", "transforms"),
    [*((name, []) for name in POLICIES), ("TorchRL's LSTM", [StepCounter]), ("one module", [StepCounter])],
)
def test_any_policy_plays_as_it_is(name, transforms):
    def make():
        return make_env("guess", *[kind() for kind in transforms], episodes=2)

    def policy(env):
        torch.manual_seed(3)
        return POLICIES[name](env)

    (_, ours), (_, theirs) = both(make, 9, policy, batches=2)
    assert_same(ours, theirs)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("guess", "DETERMINISTIC"),
        ("cart pole", "DETERMINISTIC"),
        ("point", "DETERMINISTIC"),
        ("guess", "MODE"),
        ("point", "MEAN"),
    ],
)
def test_actions_without_noise_are_collectors(name, kind):
    (_, ours), (_, theirs) = both(lambda: make_env(name, episodes=2), 7, exploration_type=ExplorationType[kind])
    assert_same(ours, theirs, is_exact=name != "point")


def test_our_policies_need_no_tensordict():
    for name in ("guess", "point", "cart pole"):
        env = make_env(name, episodes=2)
        for wiring in ("own", "memory"):
            assert {part.way for part in acting_parts(make_policy(env, wiring))} <= {"tensors", "core", "distribution"}


# ------------------------------------------------------------ what is sampled

STEPS = 1500


def draws(base, tasks, policy):
    """Actions ``[rows, STEPS]`` of trials of one step."""
    env = TransformedEnv(base, Compose(Trial(steps=1), TaskSampler(tasks, seed=1), PreviousStep()))
    torch.manual_seed(0)
    with set_exploration_type(ExplorationType.RANDOM):
        return Rollout(env, policy, STEPS, ["action"])()["action"]


@pytest.mark.parametrize("one_hot", [False, True])
def test_choices_are_as_frequent_as_their_probabilities(one_hot):
    # The first two rows have the same probabilities, and still draws of their own.
    logits = torch.tensor([[0.0, 1.0, -1.0], [0.0, 1.0, -1.0], [2.0, 0.0, 0.5], [-9.0, -9.0, 0.0]])
    policy = ProbabilisticActor(
        TensorDictModule(lambda trans: logits + 0 * trans[..., :1], ["trans"], ["logits"]),
        in_keys=["logits"],
        distribution_class=OneHotCategorical if one_hot else torch.distributions.Categorical,
        return_log_prob=True,
    )
    base = Rooms(4, one_hot=True) if one_hot else BernoulliBandit(3, batch_size=(4,), seed=0)
    action = draws(base, homes if one_hot else uniform_means(3), policy)
    action = action if one_hot else nn.functional.one_hot(action, 3)
    probs = logits.softmax(-1)
    assert ((action.float().mean(1) - probs).abs() <= 4 * (probs * (1 - probs) / STEPS).sqrt() + 1e-9).all()
    # Two rows, or two steps, agree as often as independent draws do.
    agree = probs[0].square().sum()
    for one, other in ((action[0], action[1]), (action[0, 1:], action[0, :-1])):
        frequency = (one == other).all(-1).float().mean()
        assert abs(frequency - agree) < 4 * (agree * (1 - agree) / len(one)) ** 0.5


def test_gaussian_actions_have_mean_and_scale_of_their_row():
    loc = torch.tensor([[0.0, 5.0], [0.0, 5.0], [-1.0, 0.5]])
    scale = torch.tensor([[0.3, 2.0], [0.3, 2.0], [1.0, 0.1]])
    policy = ProbabilisticActor(
        TensorDictModule(lambda trans: (loc + 0 * trans[..., :1], scale), ["trans"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=IndependentNormal,
        return_log_prob=True,
    )
    action = draws(QuadraticBandit(2, batch_size=(3,), seed=0), uniform_targets(2), policy)
    assert ((action.mean(1) - loc).abs() < 4 * scale / STEPS**0.5).all()
    assert ((action.std(1) / scale - 1).abs() < 4 / (2 * STEPS) ** 0.5).all()
    # Rows, dimensions and steps have noise of their own.
    noise = (action - loc.unsqueeze(1)) / scale.unsqueeze(1)
    flat = noise.transpose(0, 1).flatten(1)  # [STEPS, 6]
    correlation = torch.corrcoef(torch.cat((flat[1:], flat[:-1]), -1).T) - torch.eye(12)
    assert correlation.abs().max() < 5 / STEPS**0.5


# ------------------------------------------------------------ going on


@pytest.mark.parametrize(
    ("name", "trial", "transforms"),
    [
        ("guess", {"episodes": 3}, []),
        ("guess", {"episodes": 2, "steps": 7, "truncate": True}, []),
        ("guess 2x3", {"steps": 7}, []),
        ("rooms", {"episodes": 3, "step_keys": ["move"]}, []),
        ("rooms", {"episodes": 3, "step_keys": ["move"]}, [StepCounter]),
        ("mdp", {"episodes": 3}, []),
        ("mdp", {"episodes": 3}, [StepCounter]),
        ("cheetah", {"episodes": 2}, []),
        ("doubled", {"episodes": 3}, []),
    ],
    ids=str,
)
def test_a_rollout_goes_on_where_it_was_saved(name, trial, transforms, tmp_path):
    def make(seed):
        env = make_env(name, *[kind() for kind in transforms], **trial)
        policy = make_policy(env)
        torch.manual_seed(seed)
        frames = 5 * env.batch_size.numel()
        return env, TrialCollector(env, policy, frames_per_batch=frames, total_frames=-1, rollout="tensors")

    env, collector = make(0)
    unbroken = iter(collector)
    for _ in range(2):
        next(unbroken)
    torch.save(
        (rollout_state(collector), env.transform[1].get_extra_state(), torch.get_rng_state()), tmp_path / "state"
    )
    expected = [next(unbroken).clone() for _ in range(3)]
    assert not expected[0]["is_init"][:, 0].all()  # in the middle of a trial

    env, collector = make(1)
    next(iter(collector))  # stands elsewhere
    state, tasks, random = torch.load(tmp_path / "state")
    load_rollout_state(collector, state)
    env.transform[1].set_extra_state(tasks)
    torch.set_rng_state(random)
    resumed = iter(collector)
    for batch in expected:
        found = next(resumed)
        for key, value in batch.items(True, True):
            assert torch.equal(found[key], value), key


@pytest.mark.parametrize(("name", "transforms"), [("guess", []), ("mdp", []), ("walk", []), ("walk", [StepCounter])])
def test_a_collector_can_be_reset(name, transforms):
    results = []
    for rollout in ("tensors", "tensordicts"):
        env = make_env(name, *[kind() for kind in transforms], episodes=3)
        frames = 5 * env.batch_size.numel()
        collector = TrialCollector(env, make_policy(env), frames_per_batch=frames, total_frames=-1, rollout=rollout)
        torch.manual_seed(7)
        iterator = iter(collector)
        results.append([])
        for _ in range(2):
            results[-1].append(next(iterator).clone())
            collector.reset()
    assert_same(*results)
    assert results[0][1]["is_init"][:, 0].all()
