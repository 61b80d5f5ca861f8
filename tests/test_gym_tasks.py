"""`GymVectorEnv`: the task of a trial reaches its row, by a function, by reset options or as a choice among envs."""

from functools import wraps

import pytest
import torch
from gymnasium.vector import AutoresetMode
from line_envs import SYNC_AND_ASYNC, Hidden, Line, goals, lines, right, set_goal, set_goals, trials, vector, with_task
from tensordict import TensorDict
from torchrl.data import Composite, Unbounded

from rl2_torchrl.envs import GymVectorEnv
from rl2_torchrl.testing import check_trial_env


@SYNC_AND_ASYNC
def test_each_row_gets_its_own_task(vectorization):
    env = lines(vectorization=vectorization)
    first = env.reset(with_task(env, 2.0, 3.0, 4.0))
    assert first["observation"][:, :2].tolist() == [[0, 2], [0, 3], [0, 4]]
    # A row alone, with another task; the others stay where they are.
    after = env.step(first.set("action", right(env)))["next"]
    rows = torch.tensor([[False], [True], [False]])
    again = env.reset(with_task(env, 9.0, 5.0, 9.0).update(after.exclude("reward")).set("_reset", rows))
    assert again["observation"][:, :2].tolist() == [[1, 2], [0, 5], [1, 4]]
    env.close()


@SYNC_AND_ASYNC
def test_a_task_can_be_one_of_a_list_of_objects(vectorization):
    objects = [{"goal": 2.0}, {"goal": 4.0}]

    def set_task(env, task):
        assert env is env.unwrapped
        env.goal = task["goal"]

    env = GymVectorEnv(Line, 3, set_task=set_task, tasks=objects, seed=0, vectorization=vectorization)
    assert (env.full_state_spec["task"].shape, env.full_state_spec["task"].space.n) == ((3,), 2)
    first = env.reset(TensorDict({"task": torch.tensor([1, 0, 1])}, [3]))
    assert first["observation"][:, 1].tolist() == [4, 2, 4]
    env.close()


@SYNC_AND_ASYNC
def test_a_task_can_be_an_option_of_reset(vectorization):
    seen = {"vectorization": vectorization, "task_option": "goal", "task_spec": Unbounded(1)}
    env = GymVectorEnv(Line, 3, seed=0, **seen)
    assert env.reset(with_task(env, 2.0, 3.0, 4.0))["observation"][:, 1].tolist() == [2, 3, 4]
    env.close()


@SYNC_AND_ASYNC
def test_a_task_can_have_several_entries(vectorization):
    def set_task(env, task):
        assert isinstance(task, TensorDict)
        assert task.batch_size == ()
        env.goal = float(task["far"] + task["by", "much"])

    spec = Composite(far=Unbounded(1), by=Composite(much=Unbounded(1)))
    env = GymVectorEnv(Line, 3, set_task=set_task, task_spec=spec, seed=0, vectorization=vectorization)
    far, much = torch.tensor([[1.0], [2], [3]]), torch.tensor([[0.5], [0], [0.5]])
    task = TensorDict({"far": far, "by": {"much": much}}, [3])
    assert env.reset(TensorDict({"task": task}, [3]))["observation"][:, 1].tolist() == [1.5, 2, 3.5]
    env.close()

    def drawn(batch_size, generator):
        return TensorDict(
            {"by": {"much": goals(batch_size, generator)}, "far": goals(batch_size, generator)}, batch_size
        )

    env = GymVectorEnv(Hidden, 3, set_task=set_task, task_spec=spec, seed=0, vectorization=vectorization)
    check_trial_env(trials(env, drawn))
    env.close()


def test_an_option_of_several_entries_is_a_dictionary():
    class Option(Line):
        def reset(self, *, seed=None, options=None):
            assert set(options["task"]) == {"a", "b"}
            return super().reset(seed=seed, options={"goal": options["task"]["a"] + options["task"]["b"]})

    spec = Composite(a=Unbounded(1), b=Unbounded(1))
    env = GymVectorEnv(Option, 2, task_option="task", task_spec=spec)
    task = TensorDict({"a": torch.tensor([[1.0], [2.0]]), "b": torch.ones(2, 1)}, [2])
    assert env.reset(TensorDict({"task": task}, [2]))["observation"][:, 1].tolist() == [2, 3]


@pytest.mark.parametrize("mode", [AutoresetMode.DISABLED, AutoresetMode.SAME_STEP])
def test_a_vector_env_of_ones_own_is_told_which_rows_begin_with_which_tasks(mode):
    calls = []

    def set_task(envs, tasks, rows):
        calls.append((tasks, rows.tolist()))
        set_goals(envs, [[task["goal"]] for task in tasks], rows)

    objects = [{"goal": 1.0}, {"goal": 2.0}]
    env = GymVectorEnv(vector(mode), set_task=set_task, tasks=objects, seed=0)
    first = env.reset(TensorDict({"task": torch.tensor([1, 0, 1])}, [3]))
    assert first["observation"][:, 1].tolist() == [2, 1, 2]
    after = env.step(first.set("action", right(env)))["next"]
    given = TensorDict({"task": torch.tensor([0, 1, 0])}, [3]).update(after.exclude("reward"))
    assert env.reset(given.set("_reset", after["done"]))["observation"][:, :2].tolist() == [[1, 2], [0, 2], [1, 2]]
    assert calls[0][0] == [objects[1], objects[0], objects[1]]
    assert [rows for _, rows in calls] == [[True] * 3, [False, True, False]]


@pytest.mark.parametrize("mode", [AutoresetMode.DISABLED, AutoresetMode.SAME_STEP])
def test_a_task_that_is_an_option_is_that_of_later_episodes_too(mode):
    class OwnGoal(Line):
        def reset(self, *, seed=None, options=None):
            goal = options["goal"][0] if options and "goal" in options else [99.0]  # without: one of its own
            return super().reset(seed=seed, options={"goal": goal})

    env = trials(GymVectorEnv(vector(mode, make=OwnGoal), task_option="goal", task_spec=Unbounded(1), seed=0))
    tensordict = env.reset(with_task(env, 2.0, 2.0, 2.0))
    for _ in range(3):
        _, tensordict = env.step_and_maybe_reset(tensordict.set("action", right(env)))
    assert tensordict["observation"][:, :2].tolist() == [[1, 2]] * 3


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"set_task": set_goal}, "what is a task"),
        ({"set_task": set_goal, "task_spec": Unbounded(1), "tasks": [1]}, "what is a task"),
        ({"task_spec": Unbounded(1)}, "how does a task reach the env"),
        ({"tasks": [1]}, "how does a task reach the env"),
        ({"task_option": "goal", "tasks": [1]}, "what is a task"),
        ({"set_task": set_goal, "task_option": "goal", "task_spec": Unbounded(1)}, "how does a task reach the env"),
    ],
)
def test_half_a_way_for_the_task_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        GymVectorEnv(Line, 2, **kwargs)


def test_a_function_around_another_is_asked_for_its_own_arguments():
    def set_entry(env, task, name):
        setattr(env, name, float(task[0]))

    @wraps(set_entry)
    def set_task(env, task):
        set_entry(env, task, "goal")

    env = GymVectorEnv(Line, 3, set_task=set_task, task_spec=Unbounded(1), seed=0)
    assert env.reset(with_task(env, 2.0, 3.0, 4.0))["observation"][:, 1].tolist() == [2, 3, 4]


def test_a_vector_envs_function_has_three_arguments():
    env = GymVectorEnv(vector(AutoresetMode.DISABLED), set_task=lambda env, task: None, task_spec=Unbounded(1))
    with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
        env.reset(with_task(env, 2.0, 3.0, 4.0))


def test_no_task_at_all():
    env = GymVectorEnv(Line, 3, seed=0)
    assert "task" not in env.full_state_spec.keys()
    check_trial_env(trials(env, None), task_key=None)
    assert env.rollout(3)["next", "observation"].shape == (3, 3, 3)
