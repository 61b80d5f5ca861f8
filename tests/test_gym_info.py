"""`GymVectorEnv`: what an env says beside observation and reward has a place of its own."""

import numpy as np
import pytest
import torch
from line_envs import Line, lines, right, trials, with_task
from rollouts import make_policy
from tensordict import TensorDict

from rl2_torchrl import TrialCollector
from rl2_torchrl.envs import GymVectorEnv


def test_info_is_recorded_in_batches_and_hidden_from_networks():
    env = trials(lines(info_keys=["says"]), episodes=2)
    policy = make_policy(env)
    assert not any("info" in key for key in policy.in_keys)
    keep = [("info", "says"), ("next", "info", "says"), ("next", "episode_done"), "trans"]
    collector = TrialCollector(env, policy, frames_per_batch=30, total_frames=30, keep=keep)
    (batch,) = collector
    says = batch["next", "info", "says"].bool()
    assert says.any()
    assert (batch["next", "episode_done"] | ~says).all()
    collector.shutdown()


def test_an_info_key_beside_its_own_mask_is_refused():
    with pytest.raises(ValueError, match=r"info_keys holds \['says'\] and the same behind an underscore"):
        GymVectorEnv(Line, 2, info_keys=["_says", "says"])


def test_info_of_an_env_that_says_nothing_at_first_is_recorded_as_what_it_is():
    class Says(Line):
        def step(self, action):
            *stepped, _ = super().step(action)
            bonus = int(self.goal) if self.goal == 3 else 0.75  # the first row says a whole number
            return *stepped, {} if self.steps == 1 else {"bonus": bonus}

    env = lines(make=Says, info_keys=["bonus"])
    env.reset(TensorDict({"task": torch.tensor([[3.0], [4.0], [4.0]])}, [3]))
    for expected in ([0.0, 0.0, 0.0], [3.0, 0.75, 0.75]):
        env.play(right(env))
        assert env.observe_more(None)["info", "bonus"].flatten().tolist() == expected


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("info_keys", [[], ["says"]], ids=str)
def test_of_the_info_rows_hand_on_what_is_recorded_alone(info_keys, vectorization):
    env = lines(info_keys=info_keys, vectorization=vectorization)
    right = np.ones(3, np.int64)
    assert "resets" not in env.envs.reset()[1]
    env.reset(TensorDict({"task": torch.full((3, 1), 3.0)}, [3]))
    at_goal = {name for key in info_keys for name in (key, f"_{key}")}
    for said in (set(), set(), at_goal):  # a row looks at its first step more closely than at those that follow
        assert set(env.envs.step(right)[-1]) == said
    env.close()


def test_what_an_env_says_late_is_not_put_together_either():
    class Late(Line):
        def step(self, action):
            *stepped, _ = super().step(action)
            return *stepped, {"path": np.zeros(self.steps)} if stepped[2] else {}  # of another length in each row

    env = lines(make=Late)
    step, tensordict = env.envs.step, env.reset(with_task(env, 1.0, 2.0, 2.0))
    told = []
    env.envs.step = lambda actions: told.append(step(actions)) or told[-1]
    for action in ([0, 1, 1], [1, 1, 0]):
        tensordict = env.step(tensordict.set("action", torch.tensor(action)))["next"].exclude("reward")
    assert tensordict["done"].flatten().tolist() == [True, True, False]
    assert [infos for *_, infos in told] == [{}, {}]


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("kinds", [(int, float), (np.bool_, np.bool_), (bool, np.float32), (np.int64, float)])
def test_info_may_be_numbers_of_any_kind_in_any_row(kinds, vectorization):
    class Says(Line):
        def step(self, action):
            return *super().step(action)[:4], {"says": kinds[action](0.75 * action)}

    env = GymVectorEnv(Says, 3, info_keys=["says"], vectorization=vectorization)
    begun = env.reset()
    for action in ([0, 1, 1], [1, 0, 1]):
        stepped = env.step(begun.clone().set("action", torch.tensor(action)))["next"]
        assert stepped["info", "says"].flatten().tolist() == [float(kinds[each](0.75 * each)) for each in action]
    env.close()


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_info_keys_that_are_never_said_are_told_once(vectorization, told):
    env = lines(info_keys=["says", "stepz"], vectorization=vectorization)
    for count in (0, 1):
        env.start(torch.full((3, 1), 2.0))
        env.play(right(env))
        assert len(told) == count
        env.play(right(env))  # and the episodes end
    assert len(told) == 1
    assert "info_keys holds ['stepz']" in told[0]
    assert "Its info holds ['says', 'steps']" in told[0]
    env.close()


@pytest.mark.parametrize("value", ["text", np.zeros(2), None], ids=str)
def test_info_that_is_no_number_is_refused(value):
    class Says(Line):
        def step(self, action):
            return *super().step(action)[:4], {"says": value}

    env = GymVectorEnv(Says, 2, info_keys=["says"])
    with pytest.raises(TypeError, match="info_keys holds 'says'"):
        env.rollout(1)
