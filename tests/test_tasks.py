"""`TaskSampler`: which task each trial is given, and that a stopped run resumes with the next one."""

import copy
import pickle

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import Composite, MultiCategorical, Unbounded
from torchrl.envs import Compose, EnvBase, EnvCreator, GymEnv, RewardSum, SerialEnv, TransformedEnv

from rl2_torchrl import PreviousStep, TaskSampler, Trial
from rl2_torchrl.envs import (
    BernoulliBandit,
    GymTaskEnv,
    directions,
    goals_in_disc,
    goals_on_half_circle,
    grid_goals,
    random_mdps,
    signs,
    uniform_means,
    uniform_targets,
    velocities,
)
from rl2_torchrl.seeding import derived_seed


class EchoEnv(EnvBase):
    """One-step episodes; the observation is the task's ``size`` entry, as the env was given it at its reset."""

    def __init__(self, batch_size, task_key, task_spec, size_key):
        super().__init__(batch_size=torch.Size(batch_size))
        self.size_key = size_key
        self.state_spec = Composite(shape=self.batch_size)
        self.state_spec[task_key] = task_spec
        for entry in ("observation", "action", "reward"):
            setattr(self, f"{entry}_spec", Unbounded((*self.batch_size, 1)))
        self.observation_spec = Composite(seen=Unbounded((*self.batch_size, 1)), shape=self.batch_size)

    def _reset(self, tensordict=None, **kwargs):
        return TensorDict({"seen": tensordict[self.size_key].clone()}, self.batch_size)

    def _step(self, tensordict):
        done = torch.ones(*self.batch_size, 1, dtype=torch.bool)
        seen = torch.zeros(*self.batch_size, 1)
        entries = {"seen": seen, "reward": seen.clone(), "done": done, "terminated": done.clone()}
        return TensorDict(entries, self.batch_size)

    def _set_seed(self, seed):
        pass


def bandits(sampler, batch_size=(3,), *, pulls=2):
    return TransformedEnv(BernoulliBandit(2, batch_size=batch_size, seed=0), Compose(Trial(episodes=pulls), sampler))


def uniform(seed=0):
    return TaskSampler(uniform_means(2), seed=seed)


def tasks_generator(seed):
    """What a sampler of this seed draws from."""
    return torch.Generator().manual_seed(derived_seed(seed, "task"))


def numbered(count):
    """Tasks that can be told apart: task i is (i, i) / count."""
    return torch.arange(count).unsqueeze(-1).expand(count, 2) / count


def end(env, tensordict, rows):
    """A partial reset, as collectors make it once ``rows`` are done."""
    return env.maybe_reset(tensordict.clone().set("done", torch.tensor(rows).unsqueeze(-1)))


def first_of_trials(env, trials, pulls=2):
    return env.rollout(trials * pulls, break_when_any_done=False)["task"][..., ::pulls, :]


# ---- Seeds.


def test_what_stands_around_an_env_says_how():
    sampler = TaskSampler(uniform_means(3), seed=4)
    assert repr(sampler) == "TaskSampler(_uniform, seed=4)"
    assert repr(TaskSampler.fixed(torch.rand(2, 3))) == "TaskSampler.fixed(2 tasks)"
    assert repr(Trial(episodes=3, steps=20, truncate=True)) == "Trial(episodes=3, steps=20, truncate=True)"
    assert repr(PreviousStep(["step"])) == "PreviousStep(obs_keys=['step'], out_key='trans')"


def test_same_seed_same_tasks_and_other_seeds_others():
    tasks = [first_of_trials(bandits(uniform(seed)), 4) for seed in (7, 7, 8, None, None)]
    assert torch.equal(tasks[0], tasks[1])
    for one, other in ((0, 2), (0, 3), (3, 4)):
        assert not (tasks[one] == tasks[other]).any()
    # Rows and trials differ too: 3 rows, 4 trials, 2 arms.
    assert tasks[0].unique().numel() == 24


def test_draws_are_the_distributions_in_order():
    generator = tasks_generator(3)
    expected = [torch.rand(3, 2, generator=generator) for _ in range(3)]
    assert torch.equal(first_of_trials(bandits(uniform(3)), 3), torch.stack(expected, 1))


def test_an_env_of_the_same_seed_and_held_out_tasks_of_it_draw_other_numbers():
    env = bandits(uniform(0))
    held_out = uniform_means(2)(torch.Size([3]), torch.Generator().manual_seed(0))
    drawn, theirs = env.reset()["task"], torch.rand(3, 2, generator=env.base_env.generator)
    assert not (drawn == theirs).any()
    assert not (drawn == held_out).any()


def test_sampler_can_be_seeded_again():
    sampler = uniform(0)
    env = bandits(sampler)
    first = env.reset()["task"]
    assert not (env.reset()["task"] == first).any()
    sampler.seed(0)
    assert torch.equal(env.reset()["task"], first)
    sampler.seed(None)
    assert not (env.reset()["task"] == first).any()


def test_tasks_and_the_rest_draw_from_separate_streams():
    # Neither the global stream nor the env's moves with the draws, and tasks do not hang on them.
    torch.manual_seed(0)
    state = torch.get_rng_state()
    env = bandits(uniform(0))
    rewards = env.base_env.generator.get_state()
    first = env.reset()["task"]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(env.base_env.generator.get_state(), rewards)
    torch.manual_seed(1)
    assert torch.equal(bandits(uniform(0)).reset()["task"], first)


def test_what_has_no_seed_follows_pytorchs():
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        env = TransformedEnv(BernoulliBandit(2, batch_size=(3,)), Compose(Trial(episodes=8), uniform(None)))
        data = env.rollout(8, policy=lambda td: td.set("action", torch.zeros(3, dtype=torch.int64)))
        drawn.append((data["task"], data["next", "reward"]))
    for first, again, other in zip(*drawn, strict=True):
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


BASES = {
    "one env": lambda: BernoulliBandit(2, batch_size=(2,)),
    "gymnasium": lambda: GymTaskEnv("Pendulum-v1", set_task=lambda env, task: None, task_spec=Unbounded((2,))),
    "workers": lambda: SerialEnv(2, lambda: BernoulliBandit(2)),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("how", ["env", "around it", "collector"])
def test_an_envs_seed_reaches_its_tasks(base, how):
    def seeded(seed, own):
        env = TransformedEnv(BASES[base](), Compose(Trial(episodes=2), uniform(own)))
        around = TransformedEnv(env, RewardSum()) if how == "around it" else env
        (Collector(around, frames_per_batch=4, total_frames=4) if how == "collector" else around).set_seed(seed)
        return around.reset()["task"]

    assert torch.equal(seeded(5, None), seeded(5, None))
    assert torch.equal(seeded(5, 1), seeded(5, 1))
    # Training and held-out tasks stay different ones when their envs are given the same seed.
    tasks = [seeded(5, None), seeded(5, 1), seeded(5, 2), seeded(6, None), seeded(6, 1)]
    assert len({tuple(task.flatten().tolist()) for task in tasks}) == 5


def test_tasks_and_rewards_of_one_seed_have_nothing_to_do_with_one_another():
    env = bandits(uniform(None), (3,))
    env.set_seed(5)
    rewards = torch.rand(3, 2, generator=env.base_env.generator)
    assert not (env.reset()["task"] == rewards).any()


def test_workers_of_one_seed_draw_tasks_of_their_own():
    env = SerialEnv(2, lambda: bandits(uniform(None), ()))
    env.set_seed(5)
    first = env.reset()["task"]
    assert not (first[0] == first[1]).any()
    env.set_seed(5)
    assert torch.equal(env.reset()["task"], first)


def test_numpys_integers_are_seeds():
    for own in (0, np.int64(0), np.uint32(0)):
        assert torch.equal(bandits(uniform(own)).reset()["task"], bandits(uniform(0)).reset()["task"])
    one, other = bandits(uniform(0)), bandits(uniform(0))
    one.set_seed(5), other.set_seed(np.int64(5))
    assert torch.equal(one.reset()["task"], other.reset()["task"])


@pytest.mark.parametrize(
    "distribution",
    [
        uniform_means(2),
        uniform_targets(2),
        random_mdps(),
        grid_goals(),
        goals_on_half_circle(),
        velocities(),
        signs(),
        directions(),
        goals_in_disc(),
        TaskSampler.fixed(numbered(3)).distribution,
    ],
)
def test_samplers_can_be_pickled(distribution):
    sampler = TaskSampler(distribution, seed=0)
    one, other = pickle.loads(pickle.dumps(sampler)), copy.deepcopy(sampler)
    for each in (one, other):
        generator = tasks_generator(0)
        expected = copy.deepcopy(distribution)(torch.Size([2]), generator)
        assert torch.equal(each.distribution(torch.Size([2]), each.generator), expected)
    assert one.generator is not sampler.generator


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_a_copied_env_is_seeded_by_itself(duplicate):
    env = bandits(uniform(None))
    other = duplicate(env)
    other.set_seed(5)
    first = other.reset()["task"]
    env.set_seed(6)
    other.set_seed(5)
    assert torch.equal(other.reset()["task"], first)
    assert not torch.equal(env.reset()["task"], first)


# ---- When a task is drawn.


def around(transform):
    return TransformedEnv(BernoulliBandit(2, batch_size=(3,), seed=0), transform)


@pytest.mark.parametrize("seed", [0, None])
@pytest.mark.parametrize("used", ["around an env", "nowhere yet"])
def test_a_clone_around_another_env_draws_by_itself(seed, used):
    """As TorchRL's scripts make an env for evaluations, `TransformedEnv(base, env.transform.clone())`."""

    def make(cloned):
        torch.manual_seed(1)  # what a seed of None is drawn by
        transform = Compose(Trial(episodes=2), uniform(seed))
        env = around(transform if used == "around an env" else transform.clone())
        other = around(transform.clone()) if cloned else None
        return env, other

    env, other = make(cloned=True)
    theirs = first_of_trials(other, 2)
    other.transform[1].seed(5)
    tasks = first_of_trials(env, 3)
    assert not (tasks[:, :2] == theirs).any()
    assert torch.equal(tasks, first_of_trials(make(cloned=False)[0], 3))
    third = around(env.transform.clone())
    assert not (first_of_trials(third, 2) == theirs).any()


def test_a_clone_around_the_same_env_draws_the_same_tasks():
    env = around(Compose(Trial(episodes=2), uniform()))
    assert TransformedEnv(env.base_env, env.transform.clone()).transform[1].generator is env.transform[1].generator
    assert env.transform[1].parent is not None


def test_clones_of_fixed_tasks_hand_out_one_after_the_other():
    """As the rows of a `SerialEnv` that are made of one template."""
    template = Compose(Trial(episodes=2), TaskSampler.fixed(numbered(6)))
    tasks = [around(template.clone()).reset()["task"] for _ in range(2)]
    assert torch.equal(torch.cat(tasks), numbered(6))


def test_a_sampler_around_a_second_env_is_the_same_one():
    transform = Compose(Trial(episodes=2), uniform())
    first = around(transform)
    stream = transform[1].generator
    around(transform)
    assert transform[1].generator is stream
    first.set_seed(7)
    seeded = stream.get_state()
    first.set_seed(7)
    assert torch.equal(stream.get_state(), seeded)


def test_task_stays_for_the_trial_and_only_finished_rows_draw():
    env = bandits(TaskSampler.fixed(numbered(8)), pulls=5)
    tensordict = env.reset()
    data = env.step(env.rand_action(tensordict))
    assert torch.equal(data["next", "task"], numbered(8)[:3])
    # One row ends, then two: they are given the next tasks in order of rows; nobody else's task is used up.
    tensordict = end(env, env.step_mdp(data), [False, True, False])
    assert torch.equal(tensordict["task"], numbered(8)[[0, 3, 2]])
    tensordict = end(env, tensordict, [True, False, True])
    assert torch.equal(tensordict["task"], numbered(8)[[4, 3, 5]])
    # The last tasks, and round again.
    tensordict = end(env, tensordict, [True, True, True])
    assert torch.equal(tensordict["task"], numbered(8)[[6, 7, 0]])


def test_partial_draws_are_fresh_draws():
    generator = tasks_generator(0)
    first, later = torch.rand(3, 2, generator=generator), torch.rand(1, 2, generator=generator)
    env = bandits(uniform(0))
    tensordict = end(env, env.reset(), [False, True, False])
    assert torch.equal(tensordict["task"], torch.stack([first[0], later[0], first[2]]))


def test_fixed_tasks_fill_batch_dimensions_in_order():
    env = bandits(TaskSampler.fixed(numbered(5)), (2, 2))
    assert torch.equal(env.reset()["task"].reshape(4, 2), numbered(5)[:4])
    assert torch.equal(env.reset()["task"].reshape(4, 2), numbered(5)[[4, 0, 1, 2]])


@pytest.mark.parametrize("tasks", [torch.tensor(3.0), TensorDict({"mass": torch.rand(5, 1)})])
def test_fixed_tasks_without_rows_are_refused(tasks):
    with pytest.raises(ValueError, match=r"got no task, its shape is \[\].*of a TensorDict by its batch_size"):
        TaskSampler.fixed(tasks)


def test_single_env():
    env = bandits(TaskSampler.fixed(numbered(3)), ())
    assert torch.equal(first_of_trials(env, 4), numbered(3)[[0, 1, 2, 0]])


def test_given_task_is_taken_and_uses_up_no_draw():
    env = bandits(TaskSampler.fixed(numbered(8)))
    given = torch.full((3, 2), 0.3)
    tensordict = env.reset(TensorDict({"task": given}, [3]))
    data = env.rollout(2, auto_reset=False, tensordict=tensordict, break_when_any_done=False)
    assert (data["task"] == 0.3).all()
    assert torch.equal(env.reset()["task"], numbered(8)[:3])


@pytest.mark.parametrize("reset_at_each_iter", [False, True])
def test_collectors_resets_draw_anew(reset_at_each_iter):
    # Two pulls a trial, two a batch: each batch is one trial of three new tasks.
    collector = Collector(
        bandits(TaskSampler.fixed(numbered(64))),
        frames_per_batch=6,
        total_frames=18,
        reset_at_each_iter=reset_at_each_iter,
    )
    drawn = [(batch["task"][:, 0, 0] * 64).long() for batch in collector]
    assert torch.cat(drawn).unique().numel() == 9
    for batch in drawn:
        assert (batch.diff() == 1).all()


def test_workers_tasks_reach_the_right_worker():
    workers = SerialEnv(2, lambda: BernoulliBandit(2, batch_size=(2,)))
    env = TransformedEnv(workers, Compose(Trial(episodes=3), TaskSampler.fixed(torch.eye(2)[[0, 0, 1, 1]])))
    tensordict = env.reset()
    for _ in range(2):
        tensordict["action"] = torch.zeros(2, 2, dtype=torch.int64)
        data = env.step(tensordict)
        # Arm 0 pays always in worker 0 and never in worker 1.
        assert data["next", "reward"].squeeze(-1).tolist() == [[1, 1], [0, 0]]
        tensordict = env.step_mdp(data)


def test_env_creators_copies_draw_tasks_of_their_own():
    # ParallelEnv wraps a lambda in an EnvCreator, which copies transforms' state into every worker.
    fresh = EnvCreator(lambda: bandits(uniform(None)))
    assert not (fresh().reset()["task"] == fresh().reset()["task"]).any()
    seeded = EnvCreator(lambda: bandits(uniform(4)))
    assert torch.equal(seeded().reset()["task"], bandits(uniform(4)).reset()["task"])


# ---- Resume.


@pytest.mark.parametrize("make", [lambda: uniform(0), lambda: TaskSampler.fixed(numbered(8))])
def test_resumed_sampler_goes_on_where_it_stopped(make):
    env, resumed = bandits(make()), bandits(make())
    env.reset()
    resumed.load_state_dict(env.state_dict())
    for _ in range(3):
        assert torch.equal(env.reset()["task"], resumed.reset()["task"])
    # A sampler of another seed is brought there too.
    other = bandits(uniform(9))
    env = bandits(uniform(0))
    other.load_state_dict(env.state_dict())
    assert torch.equal(other.reset()["task"], env.reset()["task"])


# ---- Other tasks than a tensor under "task".


def gridworlds(size, generator):
    goal = torch.rand(*size, 2, generator=generator)
    return TensorDict({"goal": goal, "walls": {"size": goal[..., :1] + 1}}, size)


def gridworld_env(batch_size):
    spec = Composite({"goal": Unbounded((*batch_size, 2))}, shape=batch_size)
    spec["walls"] = Composite({"size": Unbounded((*batch_size, 1))}, shape=batch_size)
    below = EchoEnv(batch_size, "task", spec, ("task", "walls", "size"))
    return TransformedEnv(below, Compose(Trial(episodes=2), TaskSampler(gridworlds, seed=0)))


@pytest.mark.parametrize("batch_size", [(3,), (2, 2)])
def test_nested_task(batch_size):
    env = gridworld_env(batch_size)
    drawn = gridworlds(torch.Size(batch_size), tasks_generator(0))
    data = env.rollout(4, break_when_any_done=False)
    for step in range(2):
        assert (data["task"][..., step] == drawn).all()
    assert not (data["task", "goal"][..., 2, :] == drawn["goal"]).any()
    # The env was given it, at the inner reset too.
    assert torch.equal(data["seen"][..., :2, :], drawn["walls", "size"].unsqueeze(-2).expand(*batch_size, 2, 1))


def test_nested_task_in_a_partial_reset():
    env = gridworld_env((3,))
    before = env.reset()
    after = end(env, before, [False, True, False])
    assert (after["task"][[0, 2]] == before["task"][[0, 2]]).all()
    assert not (after["task", "goal"][1] == before["task", "goal"][1]).any()
    assert torch.equal(after["seen"], after["task", "walls", "size"])


@pytest.mark.parametrize("task_key", ["goal", ("agent", "goal")])
def test_task_under_another_key(task_key):
    env = TransformedEnv(
        EchoEnv((3,), task_key, Unbounded((3, 1)), task_key),
        Compose(Trial(episodes=2), TaskSampler.fixed(torch.arange(6.0).unsqueeze(-1), task_key=task_key)),
    )
    data = env.rollout(4, break_when_any_done=False)
    assert data[task_key].squeeze(-1).tolist() == [[0, 0, 3, 3], [1, 1, 4, 4], [2, 2, 5, 5]]
    assert torch.equal(data["seen"], data[task_key])


@pytest.mark.parametrize("task_key", ["goal", ("agent", "goal")])
def test_a_task_under_another_key_is_hidden_too(task_key, caplog):
    def env(previous):
        sampler = TaskSampler(lambda size, generator: torch.rand(*size, 1, generator=generator), task_key=task_key)
        base = EchoEnv((3,), task_key, Unbounded((3, 1)), task_key)
        return TransformedEnv(base, Compose(Trial(episodes=2), sampler, previous))

    assert env(PreviousStep()).reset()["trans"].shape == (3, 1 + 1 + 2)
    assert "leaves out" not in caplog.text
    with pytest.raises(ValueError, match="obs_keys holds the task .*goal"):
        env(PreviousStep(["seen", task_key])).reset()


# ---- Errors.


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (lambda size, generator: torch.rand(2), r"gave \(2,\) of torch.float32 for batch_size \(3,\).*\(3, 2\)"),
        (lambda size, generator: torch.rand(*size, 3), r"gave \(3, 3\).*asks for \(3, 2\).*one task a row"),
        (lambda size, generator: torch.ones(*size, 2).long(), r"torch.int64.*of torch.float32"),
    ],
)
def test_task_that_does_not_fit_the_env(task, message):
    with pytest.raises(ValueError, match=message):
        bandits(TaskSampler(task)).reset()


@pytest.mark.parametrize("task", [torch.rand(3, 3), torch.rand(3, 2).double(), torch.ones(3, 2).long(), torch.rand(3)])
def test_given_task_that_does_not_fit_the_env(task):
    with pytest.raises(ValueError, match=r"the task given to reset\(\) is .* asks for \(3, 2\) of torch.float32"):
        bandits(uniform()).reset(TensorDict({"task": task}, [3]))


def test_tasks_of_several_choices():
    spec = MultiCategorical([3, 4]).expand(2, 2)
    tasks = torch.tensor([[2, 3], [0, 3], [3, 0]])
    env = TransformedEnv(EchoEnv((2,), "task", spec, "task"), Compose(Trial(episodes=2), TaskSampler.fixed(tasks)))
    assert env.reset()["task"].tolist() == [[2, 3], [0, 3]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"goal": torch.zeros(3, 5)},
            r"gave goal \(3, 5\) of torch.float32, .*asks for goal \(3, 2\) of torch.float32",
        ),
        ({"goal": torch.zeros(3, 2).double()}, r"gave goal \(3, 2\) of torch.float64"),
        ({"gaol": torch.zeros(3, 2)}, r"gaol \(3, 2\)"),
        ({"walls": None}, r"gave goal \(3, 2\) of torch.float32 for batch_size"),
    ],
)
def test_nested_task_that_does_not_fit_the_env(changes, message):
    def distribution(size, generator):
        task = gridworlds(size, generator)
        for name, value in changes.items():
            task = task.exclude(name) if value is None else task.set(name, value)
        return task

    env = gridworld_env((3,))
    env.transform[1].distribution = distribution
    with pytest.raises(ValueError, match=message):
        env.reset()


def test_bad_arguments():
    with pytest.raises(TypeError, match="needs a callable.*got Tensor.*TaskSampler.fixed"):
        TaskSampler(torch.zeros(3))
    for tasks in ([[0.1], [0.2]], torch.rand(2, 1).numpy()):
        with pytest.raises(TypeError, match=r"got a (list|ndarray): give a tensor or TensorDict \[num_tasks, ...\]"):
            TaskSampler.fixed(tasks)
    with pytest.raises(ValueError, match="got no task"):
        TaskSampler.fixed(torch.zeros(0, 2))
    with pytest.raises(RuntimeError, match="no meaning in a replay buffer"):
        uniform()(TensorDict())


def test_env_that_knows_no_tasks():
    with pytest.raises(KeyError, match="GymEnv has no 'task' in its state_spec.*GymVectorEnv"):
        TransformedEnv(GymEnv("CartPole-v1"), Compose(Trial(episodes=2), uniform())).reset()
