"""`GymVectorEnv`: ends of episodes and resets of single rows are right, whatever mode of autoreset there is."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorWrapper
from line_envs import Line, lines, right, set_goals, theirs, trials, vector, with_task
from rollouts import assert_same, both, make_policy
from tensordict import TensorDict
from torchrl.data import Composite, Unbounded
from torchrl.envs import Compose, TransformedEnv

from rl2_torchrl import PreviousStep, TaskSampler, Trial
from rl2_torchrl.envs import GymVectorEnv
from rl2_torchrl.testing import check_trial_env

ENDS = [
    lambda: lines(info_keys=["steps", "says", "resets"]),
    lambda: lines(info_keys=["steps", "says", "resets"], vectorization="async"),
    lambda: theirs(AutoresetMode.DISABLED),
    lambda: theirs(AutoresetMode.SAME_STEP),
    lambda: theirs(AutoresetMode.SAME_STEP, copy=False),
]


@pytest.mark.parametrize("make", ENDS)
def test_the_last_observation_of_a_trial_and_the_first_of_an_episode_by_hand(make):
    base = make()
    fixed = TaskSampler.fixed(torch.tensor([[1.0], [2.0], [9.0], [3.0], [3.0], [3.0]]))
    env = TransformedEnv(base, Compose(Trial(episodes=2), fixed, PreviousStep()))
    tensordict, steps = env.reset(), []
    for _ in range(4):
        stepped, tensordict = env.step_and_maybe_reset(tensordict.set("action", right(env)))
        steps.append(stepped.clone())
    batch = torch.stack(steps, 1)
    place = {key: batch[key][..., 0].tolist() for key in ("observation", ("next", "observation"))}
    # Goals 1 and 2 are reached at steps 1 and 2; the trial of goal 1 ends at its second step, that of goal 2 at its fourth.
    assert place["observation"] == [[0, 0, 0, 1], [0, 1, 0, 1], [0, 1, 2, 3]]
    assert place["next", "observation"] == [[0, 1, 1, 2], [1, 0, 1, 2], [1, 2, 3, 4]]
    assert batch["next", "done"].squeeze(-1).int().tolist() == [[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]
    assert batch["observation"][0, :, 1].tolist() == [1, 1, 3, 3]
    # What info says is told of the step that was taken; a trial's first step tells what the reset said.
    told = {key: batch[key].squeeze(-1) for key in batch.keys(True, True) if "info" in key}
    assert told["next", "info", "steps"].tolist() == [[1, 1, 1, 2], [1, 2, 1, 2], [1, 2, 3, 4]]
    assert told["next", "info", "says"].tolist() == [[1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]]
    assert told["info", "steps"].tolist() == [[0, 1, 0, 1], [0, 1, 2, 1], [0, 1, 2, 3]]
    assert told["info", "resets"][:, 0].tolist() == [1, 1, 1]
    assert (told["info", "resets"][0] > 0).tolist() == [True, False, True, False]
    assert not told["next", "info", "resets"].any()
    # Observation, action, reward and done are the agent's, nothing else.
    assert batch["trans"].shape[-1] == 3 + 2 + 2
    base.close()


@pytest.mark.parametrize("make", ENDS)
def test_a_truncated_episode_is_truncated_and_not_terminated(make):
    env = make()
    tensordict = env.reset(with_task(env, 9.0, 5.0, 9.0))
    for _ in range(5):
        after = env.step(tensordict.set("action", right(env)))["next"]
        tensordict = after.exclude("reward")
    assert after["truncated"].flatten().tolist() == [True] * 3
    assert after["terminated"].flatten().tolist() == [False, True, False]
    assert after["observation"][:, 0].tolist() == [5, 5, 5]
    env.close()


class Places(Line):
    """Observes the place alone, a choice of ten counted from 1."""

    observation_space = spaces.Discrete(10, start=1)

    def observed(self):
        return 1 + self.place


def test_choices_that_are_observed_last_are_those_of_the_episode_that_ended():
    env = theirs(AutoresetMode.SAME_STEP, make=Places)
    tensordict = env.reset(with_task(env, 2.0, 1.0, 9.0))
    seen = []
    for _ in range(2):
        tensordict = env.step(tensordict.set("action", right(env)))["next"].exclude("reward")
        seen.append(tensordict["observation"].tolist())
    assert seen == [[1, 1, 1], [2, 1, 2]]


def test_an_inner_reset_of_a_vector_env_that_resets_itself_is_not_made_twice():
    base = theirs(AutoresetMode.SAME_STEP)
    fixed = TaskSampler.fixed(torch.tensor([[1.0], [1.0], [1.0], [1.0], [1.0], [2.0]]))
    env = TransformedEnv(base, Compose(Trial(episodes=2), fixed, PreviousStep()))
    tensordict = env.reset()
    resets = [[line.resets for line in base.envs.envs]]
    for _ in range(2):
        _, tensordict = env.step_and_maybe_reset(tensordict.set("action", right(env)))
        resets.append([line.resets for line in base.envs.envs])
    # Then a trial begins: by the vector env itself with the same task, again with a new one.
    assert resets == [[1, 1, 1], [2, 2, 2], [3, 3, 4]]
    assert tensordict["observation"][:, 1].tolist() == [1, 1, 2]
    assert tensordict["info", "resets"].flatten().tolist() == [3, 3, 4]
    assert not tensordict["info", "says"].any()


def test_a_nested_task_that_stays_the_same_is_not_begun_twice():
    def set_task(envs, task, rows):
        set_goals(envs, task["goal"], rows)

    spec = Composite(goal=Unbounded(1), other=Unbounded(1))
    env = GymVectorEnv(vector(AutoresetMode.SAME_STEP), set_task=set_task, task_spec=spec, seed=0)
    task = TensorDict({"goal": torch.ones(3, 1), "other": torch.zeros(3, 1)}, [3])
    after = env.step(env.reset(TensorDict({"task": task}, [3])).set("action", right(env)))["next"]
    assert after["done"].all()
    # The same entries in another order; in one row another task.
    task = TensorDict({"other": torch.tensor([[0.0], [0.0], [1.0]]), "goal": torch.ones(3, 1)}, [3])
    env.reset(TensorDict({"task": task}, [3]))
    assert [line.resets for line in env.envs.envs] == [2, 2, 3]


def test_info_that_a_vector_env_does_not_say_of_a_row_is_nought():
    def says(*stepped):
        return *stepped[:4], {"x": np.array([5.0, 6.0, 7.0]), "_x": np.array([True, False, True]), "y": np.arange(3)}

    env = GymVectorEnv(Numbers(spoil=says), info_keys=["x", "y", "z"], seed=0)
    info = env.rollout(1)["next", "info"]
    assert {key: value.flatten().tolist() for key, value in info.items()} == {
        "x": [5, 0, 7],
        "y": [0, 1, 2],
        "z": [0] * 3,
    }


def test_a_vector_env_that_resets_in_the_next_step_is_refused_with_the_mend():
    for envs in (SyncVectorEnv([Line]), vector(AutoresetMode.NEXT_STEP), gymnasium.make_vec("CartPole-v1", 2)):
        with pytest.raises(ValueError, match="autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED"):
            GymVectorEnv(envs)


def test_a_vector_env_without_last_observations_is_refused():
    class Forgets(VectorWrapper):
        def step(self, actions):
            *stepped, infos = super().step(actions)
            return *stepped, {key: value for key, value in infos.items() if "final" not in key}

    env = GymVectorEnv(Forgets(vector(AutoresetMode.SAME_STEP)), set_task=set_goals, task_spec=Unbounded(1))
    first = env.reset(with_task(env, 1.0, 2.0, 2.0))
    with pytest.raises(KeyError, match="has no 'final_obs'"):
        env.step(first.set("action", right(env)))


@pytest.mark.parametrize("name", ["final_obs", "final_info"])
def test_a_vector_env_that_tells_ends_in_another_form_is_refused(name):
    forms = {"final_obs": {"place": np.zeros(3)}, "final_info": [{"steps": 1.0}, None, None]}

    class OfItsOwn(VectorWrapper):
        def step(self, actions):
            *stepped, infos = super().step(actions)
            return *stepped, {**infos, name: forms[name]}

    envs = OfItsOwn(vector(AutoresetMode.SAME_STEP))
    env = GymVectorEnv(envs, set_task=set_goals, task_spec=Unbounded(1), info_keys=["steps"])
    first = env.reset(with_task(env, 1.0, 2.0, 2.0))
    with pytest.raises(TypeError, match=rf"info\['{name}'\] is .*Gymnasium's"):
        env.step(first.set("action", right(env)))


@pytest.mark.parametrize("mode", [AutoresetMode.DISABLED, AutoresetMode.SAME_STEP])
def test_a_vector_env_that_resets_all_rows_is_refused(mode):
    class IgnoresMask(VectorWrapper):
        def reset(self, *, seed=None, options=None):
            return super().reset(seed=seed)

    env = GymVectorEnv(IgnoresMask(vector(mode)), set_task=set_goals, task_spec=Unbounded(1), seed=0)
    first = env.reset(with_task(env, 1.0, 2.0, 2.0))
    after = env.step(first.set("action", right(env)))["next"]
    with pytest.raises(RuntimeError, match="has reset rows that were to go on"):
        env.reset(with_task(env, 2.0, 2.0, 2.0).update(after.select("done")).set("_reset", after["done"]))


class Numbers(gymnasium.vector.VectorEnv):
    """A vector env of its own kind: one seed for all rows; ``spoil`` changes what a step returns."""

    metadata = {"autoreset_mode": AutoresetMode.DISABLED}

    def __init__(self, num_envs=3, spoil=lambda *stepped: stepped):
        self.num_envs, self.spoil, self.seeds = num_envs, spoil, []
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.single_action_space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        mask = (options or {}).get("reset_mask", np.ones(self.num_envs, bool))
        begun = self.np_random.random((self.num_envs, 1)).astype(np.float32)
        self.numbers = np.where(mask[:, None], begun, getattr(self, "numbers", begun))
        return self.numbers, {}

    def step(self, actions):
        self.numbers += actions[:, None]  # in place, and handed out
        ends = self.numbers[:, 0] > 2
        return self.spoil(self.numbers, np.ones(self.num_envs), ends, np.zeros_like(ends), {})


def test_a_vector_env_of_another_kind_has_one_seed():
    env = GymVectorEnv(Numbers(), seed=0)
    (fast, ours), (_, expected) = both(
        lambda: trials(GymVectorEnv(Numbers(), seed=0), None), 9, lambda env: make_policy(env, still=True)
    )
    assert_same(ours, expected)
    check_trial_env(trials(env, None), task_key=None)
    assert isinstance(env.envs.seeds[0], int)
    assert env.envs.seeds.count(None) > 2


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("rewards", lambda obs, reward, *rest: (obs, reward[:, None], *rest)),
        ("terminations", lambda obs, reward, terminated, *rest: (obs, reward, terminated[:, None], *rest)),
        ("truncations", lambda *stepped: (*stepped[:3], stepped[3][:1], stepped[4])),
        ("rewards", lambda obs, reward, *rest: (obs, 1.0, *rest)),
    ],
)
def test_rewards_and_ends_of_other_shapes_are_refused(name, spoil):
    env = GymVectorEnv(Numbers(spoil=spoil))
    with pytest.raises(ValueError, match=rf"gives {name} of shape \(.*; they must be \(3,\), one a row"):
        env.rollout(1)
