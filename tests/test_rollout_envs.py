"""`Rollout` over envs, entries and modules of all kinds: what they write, leave out, tell or read beside."""

import pytest
import torch
from rollouts import (
    Guess,
    Walk,
    assert_same,
    batches_of,
    both,
    make_env,
    make_policy,
    named,
    seeded,
    whole_numbers,
)
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torchrl.data import Categorical as CategoricalSpec
from torchrl.data import NonTensor, Unbounded
from torchrl.envs import (
    Compose,
    DoubleToFloat,
    GymEnv,
    PendulumEnv,
    RewardSum,
    StepCounter,
    TransformedEnv,
)

from rl2_torchrl import (
    ActorCritic,
    GRUCategoricalActor,
    GRUValueHead,
    PPOUpdate,
    PreviousStep,
    RL2PPOLoss,
    TaskSampler,
    Trial,
    adaptation_curve,
)
from rl2_torchrl.envs import GymVectorEnv, TensorEnv
from rl2_torchrl.modules import MLPEncoder, RecurrentCore, RunningNorm
from rl2_torchrl.rollout import Rollout


def no_tasks(name):
    return {
        "gym": lambda: seeded(GymEnv("CartPole-v1")),
        "guess": lambda: Guess(batch_size=(3,)),
    }[name]()


@pytest.mark.parametrize("name", ["rooms", "one-hot rooms"])
@pytest.mark.parametrize("trial", [{"episodes": 3}, {"episodes": 2, "steps": 7, "step_keys": ["move"]}], ids=named)
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


@pytest.mark.parametrize("keep", [["surprise"], None])
def test_a_module_of_the_policy_may_read_the_log_probability(keep):
    def surprised(env):
        surprise = TensorDictModule(torch.neg, ["action_log_prob"], ["surprise"])
        return TensorDictSequential(make_policy(env), surprise)

    (_, ours), (_, theirs) = both(lambda: make_env("guess", episodes=2), 9, surprised, keep=keep)
    for batch, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(batch["surprise"], expected["surprise"], rtol=1e-6, atol=1e-6)
        assert batch["surprise"].min() > 0


def test_velocity_is_kept_when_asked_for():
    def make():
        return make_env("cheetah", episodes=2, step_keys=["velocity"])

    keep = ["velocity", ("next", "velocity"), "action"]
    (_, ours), (_, theirs) = both(make, 6, lambda env: make_policy(env, still=True), keep=keep)
    assert_same(ours, theirs)
    assert set(ours[0].keys(True, True)) == set(keep)


class TellsTheTask(TensorDictModuleBase):
    """Reads a task of several entries from a TensorDict."""

    in_keys, out_keys = ["task"], ["told"]

    def forward(self, tensordict):
        return tensordict.set("told", told_of(tensordict["task"]))


def told_of(task):
    return torch.cat([task["home"].float(), task["cost"]], -1)


@pytest.mark.parametrize("keep", [None, ["action", "state_value"]], ids=["all", "some"])
@pytest.mark.parametrize(
    "teller", [TensorDictModule(told_of, ["task"], ["told"]), TellsTheTask()], ids=["function", "module"]
)
def test_a_critic_may_read_a_task_of_several_entries(teller, keep):
    def policy(env):
        torch.manual_seed(0)
        unseen = {"encoder": {"picture": None}, "hidden_size": 6}
        actor = GRUCategoricalActor.from_env(env, init_range=0.5, **unseen)
        shapes = {"trans": env.observation_spec["trans"].shape[1:], "told": [2]}
        value = GRUValueHead(shapes, extra_keys=["told"], hidden_size=6)
        return ActorCritic(actor, TensorDictSequential(teller, value))

    (_, ours), (_, theirs) = both(lambda: make_env("rooms", episodes=2), 5, policy, batches=2, keep=keep)
    assert_same(ours, theirs)
    if keep is None:
        losses = []
        for backend in ("parts", "autograd"):
            loss = RL2PPOLoss(*policy(make_env("rooms", episodes=2))._module_iter())
            update = PPOUpdate(loss, bptt=5, backend=backend, epochs=1, minibatches=1)
            losses.append(update(ours[0].clone())["loss_critic"])
        assert losses[0] == pytest.approx(losses[1])


def test_transforms_inside_are_the_envs_own():
    def make():
        inner = TransformedEnv(Walk(), Compose(StepCounter(), RewardSum(), DoubleToFloat()))
        ours = Compose(Trial(episodes=2), TaskSampler(whole_numbers, seed=1), PreviousStep())
        return TransformedEnv(inner, ours, auto_unwrap=False)

    (fast, ours), (_, theirs) = both(make, 9)
    assert fast.reason is None
    assert_same(ours, theirs)


class InPlace(Walk):
    """Shows where it is in the same memory at every step."""

    def _reset(self, tensordict=None, **kwargs):
        return self._shown(super()._reset(tensordict, **kwargs))

    def _step(self, tensordict):
        return self._shown(super()._step(tensordict))

    def _shown(self, after):
        self.memory = self.__dict__.get("memory", after["place"])
        return after.set("place", self.memory.copy_(after["place"]))


def test_an_env_may_write_over_its_observations():
    far = TaskSampler.fixed(torch.tensor([[9]]))
    env = TransformedEnv(InPlace(), Compose(Trial(steps=6), far, PreviousStep()))
    policy = TensorDictSequential(
        TensorDictModule(lambda trans: torch.ones(len(trans), dtype=torch.int64), ["trans"], ["action"]),
        TensorDictModule(lambda place: 2 * place, ["place"], ["seen"]),
    )
    batch = Rollout(env, policy, 6, ["place", "seen", "trans"])()
    assert batch["place"].squeeze(-1).tolist() == [[0, 1, 2, 3, 4, 5]] * 4
    assert torch.equal(batch["seen"], 2 * batch["place"])
    assert torch.equal(batch["trans"][..., :1], batch["place"].float())


class Speaks(Walk):
    """Says in words where it is."""

    def __init__(self):
        super().__init__()
        self.observation_spec["words"] = NonTensor(self.batch_size, example_data="0")

    def _reset(self, tensordict=None, **kwargs):
        return super()._reset(tensordict, **kwargs).set_non_tensor("words", "0")

    def _step(self, tensordict):
        after = super()._step(tensordict)
        return after.set_non_tensor("words", str(after["place"].tolist()))


@pytest.mark.parametrize("transforms", [[], [StepCounter]], ids=named)
def test_text_that_is_no_input_is_in_no_batch(transforms):
    def make():
        transition = PreviousStep(["place"])
        sampler = TaskSampler(whole_numbers, seed=1)
        return TransformedEnv(Speaks(), Compose(Trial(episodes=2), sampler, transition, *(t() for t in transforms)))

    (_, ours), (_, theirs) = both(make, 9)
    assert_same(ours, [batch.exclude("words", ("next", "words")) for batch in theirs])


def test_text_that_nobody_has_left_out_is_told():
    env = TransformedEnv(Speaks(), Compose(Trial(episodes=2), TaskSampler(whole_numbers), PreviousStep()))
    with pytest.raises(TypeError, match=r"\['words'\] are no numbers.*PreviousStep\(\[\.\.\.\]\)"):
        make_policy(env)
    for seen in ([], ["place"]):  # as the message says
        trial = Compose(Trial(episodes=2), TaskSampler(whole_numbers), PreviousStep(seen))
        make_policy(TransformedEnv(Speaks(), trial))


class SameFlags(Walk):
    """Says in the same memory at every step whether an episode is done."""

    def _step(self, tensordict):
        after = super()._step(tensordict)
        self.flags = self.__dict__.get("flags", after["done"])
        return after.set("done", self.flags.copy_(after["done"]))


def test_an_env_may_write_over_its_flags():
    def make():
        return TransformedEnv(
            SameFlags(), Compose(Trial(episodes=3), TaskSampler(whole_numbers, seed=1), PreviousStep())
        )

    (_, ours), (_, theirs) = both(make, 9)
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["gym", "guess"])
def test_envs_without_a_task(name):
    def make():
        return TransformedEnv(no_tasks(name), Compose(Trial(episodes=2), PreviousStep()))

    (fast, ours), (_, theirs) = both(make, 15)
    assert fast.reason is None
    # A TensorEnv plays the task of zeros, and writes it in a reset; nobody has asked for it.
    assert_same(ours, [batch.exclude("task") for batch in theirs])


class Terse(Walk):
    """Says when an episode ends in one of its flags alone, and keeps what the flags are when it is reset."""

    def __init__(self, left_out):
        super().__init__()
        self.left_out, self.told = left_out, []

    def _reset(self, tensordict=None, **kwargs):
        if tensordict is not None and "terminated" in tensordict.keys():
            self.told.append((tensordict["done"].clone(), tensordict["terminated"].clone()))
        return super()._reset(tensordict, **kwargs)

    def _step(self, tensordict):
        return super()._step(tensordict).exclude(self.left_out)


@pytest.mark.parametrize("left_out", ["done", "terminated"])
def test_flags_that_an_env_leaves_out_are_those_of_the_step(left_out):
    env = TransformedEnv(
        Terse(left_out), Compose(Trial(episodes=3), TaskSampler(whole_numbers, seed=1), PreviousStep())
    )
    batches_of(env, make_policy(env), 30, "tensors")
    done, terminated = map(torch.stack, zip(*env.base_env.told, strict=True))
    assert torch.equal(done, terminated)
    assert set(done.flatten().tolist()) == {True, False}


class Stays(Walk):
    """Its rows stay where they are, unpaid, once they are done, and a reset says nothing of it."""

    def _step(self, tensordict):
        goes_on = ~tensordict["done"]
        after = super()._step(tensordict.copy().set("action", tensordict["action"] * goes_on.squeeze(-1)))
        return after.set("steps", tensordict["steps"] + goes_on).set("reward", after["reward"] * goes_on)


@pytest.mark.parametrize("trial", [{"episodes": 3}, {"steps": 7}], ids=named)
def test_an_env_may_read_whether_it_is_done(trial):
    def make():
        return TransformedEnv(Stays(), Compose(Trial(**trial), TaskSampler(whole_numbers, seed=1), PreviousStep()))

    (fast, ours), (_, theirs) = both(make, 15)
    assert fast.reason is None
    assert_same(ours, theirs)


class StaticPendulum(PendulumEnv):
    """As TorchRL's tutorial on envs writes it."""

    _step = staticmethod(PendulumEnv._step)


@pytest.mark.parametrize("kind", [PendulumEnv, StaticPendulum])
def test_the_step_of_an_env_may_be_a_class_or_static_method(kind):
    def make():
        torch.manual_seed(0)
        return TransformedEnv(kind(), Compose(Trial(steps=7), PreviousStep()))

    (fast, ours), (_, expected) = both(make, 10, lambda env: make_policy(env, still=True))
    assert fast.reason is None
    assert_same(ours, expected)


@pytest.mark.parametrize("name", ["walk", "guess"])
def test_an_env_may_have_a_step_of_its_own(name):
    def make():
        env = make_env(name, episodes=2)
        take = env.base_env._step
        env.base_env._step = lambda tensordict: take(tensordict).set("reward", torch.full((4, 1), 5.0))
        return env

    (_, ours), (_, theirs) = both(make, 9)
    assert_same(ours, theirs)
    assert all((batch["next", "reward"] == 5).all() for batch in ours)


class StartsWarm(RecurrentCore):
    """A core whose memories are neither 0 nor the same at a trial's start."""

    def __init__(self, input_size, **keys):
        super().__init__(4, {"sum": (4,), "count": (1,)}, input_size=input_size, **keys)
        self.linear = torch.nn.Linear(input_size, 4)

    def initial_memory(self, num_rows):
        return torch.full((num_rows, 4), 3.0), torch.full((num_rows, 1), -7.0)

    def step(self, x, total, count):
        total, count = total + self.linear(x), count + 1
        return total / 9 + count, total, count


@pytest.mark.parametrize("transforms", [[], [StepCounter]], ids=named)
@pytest.mark.parametrize("name", ["guess", "mdp", "walk"])
def test_a_trial_starts_with_the_memory_that_the_core_says(name, transforms):
    env = make_env(name, *[kind() for kind in transforms], episodes=2)
    torch.manual_seed(0)
    core = StartsWarm(env.observation_spec["trans"].shape[-1], hidden_key="warm")
    choices = env.action_spec.space.n
    act = TensorDictModule(lambda features: (100 * features.sum(-1)).long() % choices, ["features"], ["action"])
    rollout = Rollout(env, TensorDictSequential(core, act), 25)
    keys, begun = core.in_keys[1:-1], 0
    for _ in range(2):
        batch = rollout()
        first = batch["is_init"].squeeze(-1)
        begun += int(first[:, 1:].sum())
        initial = core.initial_memory(int(first.sum()))
        assert all(torch.equal(batch[key][first], value) for key, value in zip(keys, initial, strict=True))
        for key in keys:
            assert torch.equal(batch[key][:, 1:][~first[:, 1:]], batch["next", key][:, :-1][~first[:, 1:]])
        features, *_ = core.step(batch["trans"][first], *initial)
        torch.testing.assert_close(batch["features"][first], features)
    assert begun


def test_gymnasiums_envs_take_actions_of_a_dimension_more():
    env = TransformedEnv(GymVectorEnv("CartPole-v1", 2), Compose(Trial(episodes=1), PreviousStep()))
    policy = TensorDictModule(lambda trans: (trans[..., :1] > 0).long(), ["trans"], ["action"])
    assert adaptation_curve(env, policy, 2).returns.shape == (2, 1)


def test_a_module_may_write_an_observation_of_another_size():
    env = make_env("walk", episodes=2)
    doubles = TensorDictModule(lambda trans: torch.cat([trans, trans], -1), ["trans"], ["trans"])
    reads = TensorDictModule(MLPEncoder(2 * env.observation_spec["trans"].shape[-1], [4]), ["trans"], ["seen"])
    act = TensorDictModule(lambda seen: torch.zeros(len(seen), dtype=torch.int64), ["seen"], [env.action_key])
    assert Rollout(env, TensorDictSequential(doubles, reads, act), 4)()["seen"].shape == (*env.batch_size, 4, 4)


@pytest.mark.parametrize("reader", [RunningNorm(3), MLPEncoder(3, [4])], ids=["norm", "mlp"])
def test_a_module_may_read_a_stack_piece_by_piece(reader):
    class Stack(TensorEnv):
        def __init__(self):
            spaces = {"observation_spec": Unbounded((2, 3)), "action_spec": CategoricalSpec(2), "task_spec": None}
            super().__init__(**spaces, max_episode_steps=2, batch_size=(2,))

        def begin(self, task, rows):
            return torch.zeros(2, 2, 3), torch.ones(2, 2, 3)

        def advance(self, state, action):
            return state, torch.ones(2, 2, 3), torch.zeros(2, 1), None, None

    env = TransformedEnv(Stack(), Compose(Trial(episodes=2), PreviousStep([])))
    reads = TensorDictModule(reader, ["observation"], ["seen"])
    act = TensorDictModule(lambda seen: torch.zeros(len(seen), dtype=torch.int64), ["seen"], ["action"])
    assert Rollout(env, TensorDictSequential(reads, act), 4)()["seen"].shape[:3] == (2, 4, 2)


def test_choices_of_two_dimensions_are_played_by_whoever_makes_them():
    class Board(TensorEnv):
        def __init__(self):
            spaces = {
                "observation_spec": Unbounded(1),
                "action_spec": CategoricalSpec(3, shape=(2, 2)),
                "task_spec": None,
            }
            super().__init__(**spaces, max_episode_steps=2, batch_size=(4,))

        def begin(self, task, rows):
            return torch.zeros(4, 1), torch.zeros(4, 1)

        def advance(self, state, action):
            reward = action.flatten(1).float().sum(1, keepdim=True)
            return state, state, reward, None, None

    env = TransformedEnv(Board(), Compose(Trial(episodes=2), PreviousStep()))
    act = TensorDictModule(lambda trans: torch.full((4, 2, 2), 2), ["trans"], ["action"])
    assert adaptation_curve(env, act, 4).per_episode.tolist() == [16.0, 16.0]
