"""`Rollout`: with the same noise its batches are those of TorchRL's `Collector` over the transforms, whatever env it plays."""

from copy import deepcopy

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
    same_noise,
    seeded,
    whole_numbers,
)
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torchrl.data import Bounded, NonTensor, Unbounded
from torchrl.data import Categorical as CategoricalSpec
from torchrl.envs import (
    Compose,
    DoubleToFloat,
    GymEnv,
    InitTracker,
    RewardSum,
    StepCounter,
    TensorDictPrimer,
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
    TrialCollector,
)
from rl2_torchrl.collector import load_rollout_state, rollout_state
from rl2_torchrl.envs import PointRobot, TensorEnv, goals_on_half_circle
from rl2_torchrl.modules import MLPEncoder, RecurrentActor, RecurrentCore, RunningNorm, TanhGaussianActions
from rl2_torchrl.rollout import Rollout

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


@pytest.mark.parametrize(("name", "trial", "steps"), CASES, ids=named)
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
@pytest.mark.parametrize(("name", "trial", "steps"), CONTINUOUS, ids=named)
def test_batches_of_continuous_actions_are_collectors(name, trial, steps, still):
    (fast, ours), (_, theirs) = both(lambda: make_env(name, **trial), steps, lambda env: make_policy(env, still=still))
    assert fast.reason is None
    assert_same(ours, theirs, is_exact=still)


@pytest.mark.parametrize("keep", [None, ["trans", "action"]], ids=["all", "some"])
@pytest.mark.parametrize(
    ("name", "trial", "steps"),
    [
        ("bandit", {"episodes": 4}, 6),
        ("mdp", {"episodes": 3, "steps": 8}, 20),
        ("guess", {"episodes": 3, "steps": 7}, 9),
        ("guess 2x3", {"episodes": 2, "truncate": True, "done_at_start": 1.0}, 9),
        ("walk", {"episodes": 2}, 9),
        ("cart pole", {"episodes": 2, "steps": 17}, 20),
    ],
    ids=named,
)
def test_the_transition_input_may_show_the_trials_counters(name, trial, steps, keep):
    shown = ["time_left", "episode_done", "episode_index", "trial_step"]
    env = make_env(name, **trial)
    observed = list(env.transform[-1].layout().observations)
    (fast, ours), (_, theirs) = both(lambda: make_env(name, obs_keys=[*observed, *shown], **trial), steps, keep=keep)
    assert fast.reason is None
    assert_same(ours, theirs)


@pytest.mark.parametrize("name", ["bandit", "guess"])
def test_a_distribution_may_draw_into_the_same_memory(name):
    def make():
        env = make_env(name, episodes=3)
        sampler = env.transform[1]
        draw, memory = sampler.distribution, sampler.draw()
        sampler.distribution = lambda size, generator: memory[: size.numel()].copy_(draw(size, generator))
        return env

    (_, ours), (_, theirs) = both(make, 9)
    assert_same(ours, theirs)


@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("length", [3, 7])
def test_episodes_may_get_another_length(length, after):
    """As in a curriculum; batches of 6 steps cut episodes of 5."""
    results = []
    for rollout in ("tensors", "tensordicts"):
        env = make_env("mdp", episodes=2)
        collector = TrialCollector(env, make_policy(env), frames_per_batch=24, total_frames=-1, rollout=rollout)
        torch.manual_seed(7)
        with same_noise():
            results.append([collector.rollout().clone() for _ in range(after)])
            env.base_env.max_episode_steps = length
            results[-1] += [collector.rollout().clone() for _ in range(4)]
    assert_same(*results)


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


OF_COLLECTORS = {
    "primer": lambda: TensorDictPrimer(context=Unbounded(3), default_value=1.0, expand_specs=True),
    "tracker": lambda: InitTracker(init_key="begins"),
}


@pytest.mark.parametrize("kind", OF_COLLECTORS)
@pytest.mark.parametrize("name", ["guess", "walk"])
def test_primers_and_trackers_of_a_users_own_do_what_they_say(name, kind):
    key = {"primer": "context", "tracker": "begins"}[kind]

    def policy(env):
        return TensorDictSequential(make_policy(env), TensorDictModule(lambda value: 2 * value, [key], ["twice"]))

    def make():
        return make_env(name, OF_COLLECTORS[kind](), episodes=2)

    (fast, ours), (_, theirs) = both(make, 9, policy)
    assert "beside our transforms" in fast.reason
    assert_same(ours, theirs)
    (fast, ours), (_, theirs) = both(make, 9, keep=["trans", "action"])  # nobody asks for it
    assert fast.reason is None
    assert_same(ours, theirs)


def test_batches_over_workers_are_those_of_envs_one_by_one():
    results = []
    for name, rollout in (("workers", "tensors"), ("pendulum", "tensordicts")):
        env = make_env(name, episodes=2)
        results.append(batches_of(env, make_policy(env, still=True), 7, rollout)[1])
    assert_same(*results)


# ------------------------------------------------------- envs of other kinds


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


# ------------------------------------------------------------ going on


@pytest.mark.parametrize(
    ("name", "trial", "transforms"),
    [
        ("guess", {"episodes": 3}, []),
        ("guess", {"episodes": 2, "steps": 7, "truncate": True}, []),
        ("guess 2x3", {"steps": 7}, []),
        ("rooms", {"steps": 12, "step_keys": ["move"]}, []),
        ("rooms", {"steps": 12, "step_keys": ["move"]}, [StepCounter]),
        ("mdp", {"episodes": 3}, []),
        ("mdp", {"episodes": 3}, [StepCounter]),
        ("cheetah", {"episodes": 2}, []),
        ("doubled", {"episodes": 3}, []),
    ],
    ids=named,
)
@pytest.mark.parametrize("batches_before", [0, 2])
def test_a_rollout_goes_on_where_it_was_saved(name, trial, transforms, batches_before, tmp_path):
    def make(seed):
        env = make_env(name, *[kind() for kind in transforms], **trial)
        policy = make_policy(env)
        torch.manual_seed(seed)
        frames = 5 * env.batch_size.numel()
        return env, TrialCollector(env, policy, frames_per_batch=frames, total_frames=-1, rollout="tensors")

    env, collector = make(0)
    unbroken = iter(collector)
    for _ in range(batches_before):
        next(unbroken)
    torch.save(
        (rollout_state(collector), env.transform[1].get_extra_state(), torch.get_rng_state()), tmp_path / "state"
    )
    expected = [next(unbroken).clone() for _ in range(3)]
    assert expected[0]["is_init"][..., 0, 0].all() == (batches_before == 0)  # else in the middle of a trial

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


FEW = ["trans", "action"]


@pytest.mark.parametrize("is_torchrls", [False, True])
@pytest.mark.parametrize(("before", "after"), [(FEW, None), (None, FEW)], ids=["more", "less"])
def test_a_rollout_goes_on_with_more_or_fewer_entries_kept(is_torchrls, before, after):
    def make(keep):
        env = make_env("rooms", episodes=3)
        if is_torchrls:
            env.base_env._step = env.base_env._step
        policy = make_policy(env)
        frames = 5 * env.batch_size.numel()
        return TrialCollector(env, policy, frames_per_batch=frames, total_frames=-1, keep=keep)

    torch.manual_seed(0)
    collector, resumed = make(before), make(after)
    unbroken = iter(collector)
    next(unbroken)
    assert load_rollout_state(resumed, rollout_state(collector)) is None
    resumed.env.transform[1].set_extra_state(collector.env.transform[1].get_extra_state())
    batches = []
    for iterator in (unbroken, iter(resumed)):
        torch.manual_seed(1)
        batches.append(next(iterator).select(*FEW).clone())
    assert_same(*[[batch] for batch in batches])


@pytest.mark.parametrize(
    ("name", "transforms"), [("guess", []), ("mdp", []), ("walk", []), ("walk", [StepCounter])], ids=named
)
def test_a_collector_can_be_reset(name, transforms):
    results = []
    for rollout in ("tensors", "tensordicts"):
        env = make_env(name, *[kind() for kind in transforms], episodes=3)
        frames = (
            2 * env.batch_size.numel()
        )  # no trial of 3 episodes ends with them, whose next task only TorchRL has drawn then
        collector = TrialCollector(env, make_policy(env), frames_per_batch=frames, total_frames=-1, rollout=rollout)
        torch.manual_seed(7)
        iterator = iter(collector)
        results.append([])
        for _ in range(2):
            with same_noise():
                results[-1].append(next(iterator).clone())
            collector.reset()
    assert_same(*results)
    assert results[0][1]["is_init"][:, 0].all()


@pytest.mark.parametrize(
    ("name", "transforms"),
    [("mdp", []), ("guess", []), ("guess", [StepCounter]), ("walk", []), ("walk", [StepCounter])],
    ids=named,
)
@pytest.mark.parametrize("step", [9, 12, 16])
def test_after_an_interrupt_the_next_batch_begins_new_trials(name, transforms, step, monkeypatch):
    env, moves = make_env(name, *[kind() for kind in transforms], episodes=3), []
    kind, method = type(env.base_env), "_step" if name == "walk" else "advance"
    take = getattr(kind, method)

    def interrupted(*args):
        moves.append(args)
        if len(moves) == step:
            raise KeyboardInterrupt
        return take(*args)

    monkeypatch.setattr(kind, method, interrupted)
    rollout = Rollout(env, make_policy(env), 8)
    rollout()
    with pytest.raises(KeyboardInterrupt):
        rollout()
    batches = torch.cat([rollout().clone() for _ in range(2)], -1)
    first, counted = batches["is_init"].squeeze(-1), batches["trial_step"].squeeze(-1)
    assert first[:, 0].all()
    assert (counted[first] == 0).all()
    assert (counted[:, 1:] == counted[:, :-1] + 1)[~first[:, 1:]].all()
    assert (batches["trans"][first][:, -env.action_spec.space.n - 2 :] == 0).all()
    if name == "guess":
        assert (batches["observation"][first] == 1).all()
        right = batches["action"] == batches["task"].squeeze(-1)
        assert torch.equal(batches["next", "reward"].squeeze(-1), right.float() - 1)


@pytest.mark.parametrize("name", ["bandit", "rooms"])
def test_a_reset_leaves_the_batch_that_is_handed_out_as_it_is(name):
    env = make_env(name, steps=5)
    frames = 5 * env.batch_size.numel()
    collector = TrialCollector(env, make_policy(env), frames_per_batch=frames, total_frames=-1)
    for _ in range(3):
        batch = collector.rollout()
        shown = batch.clone()
        collector.reset()
        assert (batch == shown).all()


@pytest.mark.parametrize(("name", "transforms"), [("guess", []), ("mdp", []), ("walk", [StepCounter])], ids=named)
def test_the_first_trials_follow_a_seed_too(name, transforms):
    def make():
        return make_env(name, *[kind() for kind in transforms], episodes=3)

    results = []
    for rollout, seed in (("tensors", 5), ("tensordicts", 5), ("tensors", 6)):
        env = make()
        frames = 5 * env.batch_size.numel()
        collector = TrialCollector(env, make_policy(env), frames_per_batch=frames, total_frames=-1, rollout=rollout)
        collector.set_seed(seed)
        torch.manual_seed(7)
        iterator = iter(collector)
        with same_noise():
            results.append([next(iterator).clone() for _ in range(3)])
    assert_same(*results[:2])
    assert not torch.equal(results[0][0]["task"], results[2][0]["task"])


@pytest.mark.parametrize(
    ("options", "by_replay"),
    [({}, True), ({"on_step": lambda state: None}, False), ({"ablation": lambda state: state}, False)],
)
def test_what_a_user_looks_at_between_steps_is_in_no_graph(options, by_replay, monkeypatch):
    replays = []

    class Replay:
        def __init__(self, function, *_):
            self.function = function

        def __call__(self):
            replays.append(self.function)
            self.function()

    monkeypatch.setattr("rl2_torchrl.rollout.rollout.GraphReplay", Replay)
    env = make_env("bandit", episodes=6)
    rollout = Rollout(env, make_policy(env), 6, ["action"], **options)
    rollout()
    assert bool(replays) == by_replay


class Recorded:
    """A graph of wood: what it replays is right only where the batch before was its own too."""

    calls, last = [], None

    def __init__(self, function, *_):
        self.function, self.number = function, 0

    def __call__(self):
        self.number += 1
        assert self.number == 1 or Recorded.last is self
        self.calls.append(self.number)
        self.function()
        Recorded.last = self


@pytest.mark.parametrize(
    ("between", "episodes", "calls"),
    [
        ("nothing", 6, [1, 2, 3, 4]),
        ("a batch that goes on with a trial", 12, [1]),
        ("shorter trials", 6, [1, 2, 1]),
        ("a reset", 6, [1, 2, 1]),
        ("a state that is loaded", 6, [1, 2, 1, 2]),
    ],
)
def test_a_graph_is_replayed_after_batches_of_its_own_alone(between, episodes, calls, monkeypatch):
    play = Rollout._play

    def noted(self):
        Recorded.last = None
        play(self)

    monkeypatch.setattr(Rollout, "_play", noted)
    monkeypatch.setattr(Recorded, "calls", [])
    monkeypatch.setattr("rl2_torchrl.rollout.rollout.GraphReplay", Recorded)
    env = make_env("bandit", episodes=episodes)
    rollout = Rollout(env, make_policy(env), 6, ["action"])
    rollout(), rollout()
    if between == "a reset":
        rollout.adopt(env.reset())
    if between == "a state that is loaded":
        rollout.load_state_dict(rollout.state_dict())
    if between == "shorter trials":
        env.transform[0].episodes = 3
    rollout(), rollout()
    assert Recorded.calls == calls


@pytest.mark.parametrize("kind", ["bandit", "cart pole"])
def test_a_state_stays_as_it_was_while_the_rollout_goes_on(kind):
    env = make_env(kind, episodes=6)
    rollout = Rollout(env, make_policy(env), 4, ["action"])
    rollout()
    state = rollout.state_dict()
    before = deepcopy(state)
    rollout()
    torch.testing.assert_close(state, before, rtol=0, atol=0)


def test_a_hook_that_is_hung_up_later_is_an_error_before_the_next_batch():
    env = make_env("bandit", episodes=6)
    policy = make_policy(env)
    rollout = Rollout(env, policy, 6, ["action"])
    rollout()
    hook = policy.actor.module[0].register_forward_hook(lambda module, args, out: None)
    with pytest.raises(RuntimeError, match="a hook on one, .* has changed since their rollout.*make a new collector"):
        rollout()
    hook.remove()
    rollout()


def test_a_transform_that_is_appended_later_is_an_error_before_the_next_batch():
    env = make_env("bandit", episodes=6)
    rollout = Rollout(env, make_policy(env), 6, ["action"])
    rollout()
    env.append_transform(RewardSum())
    with pytest.raises(RuntimeError, match="a transform of the env has changed.*make a new collector"):
        rollout()


def test_a_policy_that_keeps_to_bounds_of_another_env_is_told_of(caplog):
    def env(bound):
        trial = Compose(Trial(steps=4), TaskSampler(goals_on_half_circle()), PreviousStep())
        base = PointRobot(batch_size=(2,))
        base.action_spec = Bounded(-bound, bound, (2, 2))
        return TransformedEnv(base, trial)

    actor = RecurrentActor.from_env(env(1.0), distribution=TanhGaussianActions.from_spec, hidden_size=4)
    for bound, is_told in ((1.0, False), (3.0, True), (3.0, False)):  # once
        caplog.clear()
        Rollout(env(bound), actor, 4)
        words = "acts from [-1.0, -1.0] to [1.0, 1.0], and the env takes actions from [-3.0, -3.0] to [3.0, 3.0]"
        assert (words in caplog.text) is is_told


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
