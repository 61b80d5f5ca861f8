"""`Trial`: episodes of one task joined into one trial, on mock, Gymnasium and worker envs, single and batched."""

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Categorical, Composite, NonTensor, Unbounded
from torchrl.envs import (
    Compose,
    EnvBase,
    FrameSkipTransform,
    GymEnv,
    InitTracker,
    ParallelEnv,
    RenameTransform,
    RewardSum,
    SerialEnv,
    StepCounter,
    TransformedEnv,
    check_env_specs,
)

from rl2_torchrl import PreviousStep, TaskSampler, Trial


class CountingEnv(EnvBase):
    """Episodes of ``task`` steps; observation and reward are the number of steps made in the episode.

    Count and length live in the env, so that a reset of the wrong rows, or without the task, shows.
    """

    def __init__(self, batch_size=(), *, discrete=False, nested=False):
        super().__init__(batch_size=torch.Size(batch_size))
        size, self.nested = self.batch_size, nested
        self.count, self.length = torch.zeros(*size, 1), torch.zeros(*size, 1)
        self.state_spec = Composite(task=Unbounded((*size, 1)), shape=size)
        self.observation_spec = Composite(count=Unbounded((*size, 1)), shape=size)
        if nested:
            self.observation_spec["inner"] = Composite(twice=Unbounded((*size, 1)), shape=size)
        self.action_spec = Categorical(3, shape=size) if discrete else Unbounded((*size, 2))
        self.reward_spec = Unbounded((*size, 1))

    def _observation(self):
        observation = TensorDict({"count": self.count.clone()}, self.batch_size)
        return observation.set(("inner", "twice"), 2 * self.count) if self.nested else observation

    def _reset(self, tensordict=None, **kwargs):
        rows = tensordict.get("_reset", torch.ones_like(self.count, dtype=torch.bool))
        self.count = torch.where(rows, 0.0, self.count)
        self.length = torch.where(rows, tensordict["task"], self.length)
        return self._observation()

    def _step(self, tensordict):
        self.count = self.count + 1
        done = self.count >= self.length
        ends = {"reward": self.count.clone(), "done": done, "terminated": done.clone()}
        return self._observation().update(ends)

    def _set_seed(self, seed):
        pass


def lengths(*values):
    return TaskSampler.fixed(torch.tensor(values, dtype=torch.float32).unsqueeze(-1))


def counting(batch_size, tasks, *after, trial=None, **kwargs):
    trial = Trial(episodes=2) if trial is None else trial
    return TransformedEnv(CountingEnv(batch_size, **kwargs), Compose(trial, lengths(*tasks), *after))


def play(env, steps):
    torch.manual_seed(0)
    return env.rollout(steps, break_when_any_done=False).reshape(-1, steps)


def table(data, key, *, after=True):
    entries = data["next"] if after else data
    return entries[key].squeeze(-1).long().tolist()


# ---- One hand-worked table for every batching. Trials of two episodes of 1, 2 and 3 steps. Row 0 ends its trials at
# steps 2 and 4 and is then given a task of 2 steps, row 1 ends at step 4 and is given 3 steps, row 2 ends at step 6.

EXPECTED = {
    # The new episode's first observation at an inner end, the episode's last one at the trial's end.
    "count": [[0, 1, 0, 1, 1, 0], [1, 0, 1, 2, 1, 2], [1, 2, 0, 1, 2, 3]],
    "reward": [[1, 1, 1, 1, 1, 2], [1, 2, 1, 2, 1, 2], [1, 2, 3, 1, 2, 3]],
    "episode_done": [[1, 1, 1, 1, 0, 1], [0, 1, 0, 1, 0, 0], [0, 0, 1, 0, 0, 1]],
    "done": [[0, 1, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1]],
    "terminated": [[0, 1, 0, 1, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1]],
    "episode_index": [[1, 2, 1, 2, 0, 1], [0, 1, 1, 2, 0, 0], [0, 0, 1, 1, 1, 2]],
    "trial_step": [[1, 2, 1, 2, 1, 2], [1, 2, 3, 4, 1, 2], [1, 2, 3, 4, 5, 6]],
    "task": [[1, 1, 1, 1, 2, 2], [2, 2, 2, 2, 3, 3], [3, 3, 3, 3, 3, 3]],
}
ROWS = ((1, 1, 2), (2, 3), (3,))  # the tasks that each row is given
MAKERS = [lambda tasks=tasks: counting((), tasks) for tasks in ROWS]
BATCHINGS = {
    "batched": lambda: counting((3,), (1, 2, 3)),
    "two batch dimensions": lambda: counting((3, 1), (1, 2, 3)),
    "workers inside": lambda: TransformedEnv(SerialEnv(3, CountingEnv), Compose(Trial(episodes=2), lengths(1, 2, 3))),
    "workers around": lambda: SerialEnv(3, MAKERS),
    "batched workers around": lambda: SerialEnv(3, [lambda tasks=tasks: counting((1,), tasks) for tasks in ROWS]),
    "parallel workers around": lambda: ParallelEnv(3, MAKERS, mp_start_method="fork"),
    "parallel workers inside": lambda: TransformedEnv(
        ParallelEnv(3, CountingEnv, mp_start_method="fork"), Compose(Trial(episodes=2), lengths(1, 2, 3))
    ),
}


def test_numpys_integers_are_bounds():
    trial = Trial(np.int64(2), np.int32(5))
    assert (trial.episodes, trial.steps) == (2, 5)
    assert type(trial.episodes) is int


@pytest.mark.parametrize("batching", BATCHINGS)
def test_episodes_of_unequal_length_by_hand(batching):
    env = BATCHINGS[batching]()
    data = play(env, 6)
    env.close(raise_if_closed=False)
    assert {key: table(data, key) for key in EXPECTED} == EXPECTED
    # What follows a step is what the next step starts from, but where a trial ended.
    for key in ("count", "episode_index", "trial_step", "episode_done"):
        carried = torch.where(data["next", "done"], 0, data["next", key])
        assert torch.equal(data[key][:, 1:], carried[:, :-1].to(data[key].dtype))


@pytest.mark.parametrize("row", range(3))
def test_single_env_plays_its_row_of_the_table(row):
    data = play(MAKERS[row](), 6)
    assert {key: table(data, key) for key in EXPECTED} == {key: [rows[row]] for key, rows in EXPECTED.items()}


def test_nested_observations_are_the_new_episodes_first_too():
    data = play(counting((3,), (1, 2, 3), PreviousStep(), nested=True), 6)
    assert table(data, "count") == EXPECTED["count"]
    twice = torch.tensor(EXPECTED["count"]) * 2
    assert torch.equal(data["next", "inner", "twice"].squeeze(-1), twice.float())
    # trans: count, twice, two action components, reward, episode done.
    assert torch.equal(data["next", "trans"][..., 1].long(), twice)


@pytest.mark.parametrize("discrete", [False, True])
def test_last_reward_of_an_episode_stands_beside_the_new_first_observation(discrete):
    data = play(counting((3,), (1, 2, 3), PreviousStep(), discrete=discrete), 6)
    trans = data["next", "trans"]
    for entry, key in ((0, "count"), (-2, "reward"), (-1, "episode_done")):
        assert trans[..., entry].long().tolist() == EXPECTED[key]
    # Row 2, step 3: the count starts anew while the reward is the finished episode's third; the policy reads it next.
    assert trans[2, 2, [0, -2, -1]].tolist() == [0, 3, 1]
    assert torch.equal(data["trans"][2, 3], trans[2, 2])


# ---- Bounds. Episodes of 1 and of 3 steps.


@pytest.mark.parametrize(
    ("bounds", "ends", "counts", "time_left"),
    [
        # Steps alone: the trial ends inside an episode, and its last observation is shown, not a first one.
        ({"steps": 4}, [4, 4], [[0, 0, 0, 1], [1, 2, 0, 1]], [[0.75, 0.5, 0.25, 0], [0.75, 0.5, 0.25, 0]]),
        # An episode ends with the trial: no reset inside.
        ({"steps": 3}, [3, 3], [[0, 0, 1], [1, 2, 3]], [[2 / 3, 1 / 3, 0], [2 / 3, 1 / 3, 0]]),
        # Whichever bound is nearer: 2 episodes for the short ones, 4 steps for the long ones.
        ({"episodes": 2, "steps": 4}, [2, 4], [[0, 1], [1, 2, 0, 1]], [[0.5, 0], [0.75, 0.5, 0.25, 0]]),
        ({"episodes": 1}, [1, 3], [[1], [1, 2, 3]], [[0], [1, 1, 0]]),
        ({"episodes": 4}, [4, 12], [[0, 0, 0, 1], [1, 2, 0] * 3 + [1, 2, 3]], [[0.75, 0.5, 0.25, 0], None]),
    ],
)
def test_bounds_by_hand(bounds, ends, counts, time_left):
    data = play(counting((2,), (1, 3), trial=Trial(**bounds)), 12)
    for row in range(2):
        done = data["next", "done"][row].squeeze(-1)
        assert done.nonzero()[0].item() + 1 == ends[row]
        assert table(data, "count")[row][: ends[row]] == counts[row]
        if time_left[row] is not None:
            left = data["next", "time_left"][row, : ends[row]].squeeze(-1)
            assert left.tolist() == pytest.approx(time_left[row])
    assert (data["time_left"][:, 0] == 1).all()


def test_truncated_trials_are_not_terminated():
    data = play(counting((3,), (1, 2, 3), trial=Trial(episodes=2, truncate=True)), 6)
    assert table(data, "truncated") == table(data, "done") == EXPECTED["done"]
    assert not data["next", "terminated"].any()
    assert not data["truncated"].any()


# ---- Partial resets.


def test_partial_reset_starts_a_trial_in_its_row_only():
    # Rows of 2 and 3 steps an episode. After three steps both are in their second episode.
    env = counting((2,), (2, 3, 5), PreviousStep())
    tensordict = env.reset()
    for _ in range(3):
        tensordict = env.step_mdp(env.step(env.rand_action(tensordict)))
    before = tensordict.clone()
    assert (table(before, "count", after=False), table(before, "episode_index", after=False)) == ([1, 0], [1, 1])

    after = env.maybe_reset(tensordict.set("done", torch.tensor([[False], [True]])))
    assert (after[0] == before[0].exclude("_reset")).all()
    row = {key: after[key][1].item() for key in ("task", "count", "episode_index", "trial_step", "time_left")}
    assert row == {"task": 5, "count": 0, "episode_index": 0, "trial_step": 0, "time_left": 1}
    assert after["trans"][1].tolist() == [0] * 5

    # Row 0 ends its second episode, hence its trial; row 1 is one step into its first.
    data = env.step(env.rand_action(after))
    keys = ("count", "done", "episode_done", "episode_index", "trial_step")
    assert [table(data, key) for key in keys] == [[2, 1], [1, 0], [1, 0], [2, 0], [4, 1]]


# ---- Other transforms.


def test_transforms_behind_see_trials():
    data = play(counting((3,), (1, 2, 3), RewardSum(), InitTracker()), 6)
    # Summed over the trial; anew where one starts.
    sums = [[1, 2, 1, 2, 1, 3], [1, 3, 4, 6, 1, 3], [1, 3, 6, 7, 9, 12]]
    assert table(data, "episode_reward") == sums
    starts = [[1, 0, 1, 0, 1, 0], [1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0]]
    assert table(data, "is_init", after=False) == starts


def test_transforms_of_the_env_below_see_episodes():
    below = TransformedEnv(CountingEnv((3,)), StepCounter())
    env = TransformedEnv(below, Compose(Trial(episodes=2), lengths(1, 2, 3)), auto_unwrap=False)
    data = play(env, 6)
    assert table(data, "step_count") == table(data, "count") == EXPECTED["count"]


def test_trial_may_stand_first_in_a_nested_compose():
    env = TransformedEnv(CountingEnv((3,)), Compose(Compose(Trial(episodes=2)), lengths(1, 2, 3)))
    assert table(play(env, 6), "done") == EXPECTED["done"]


def test_trial_alone_needs_no_compose():
    env = TransformedEnv(GymEnv("CartPole-v1"), Trial(episodes=2))
    assert env.rollout(1000)["next", "episode_index"][-1].item() == 2


@pytest.mark.parametrize(
    "build",
    [
        lambda: TransformedEnv(CountingEnv((3,)), Compose(RewardSum(), Trial(episodes=2))),
        lambda: TransformedEnv(TransformedEnv(CountingEnv((3,)), StepCounter()), Trial(episodes=2)),
    ],
)
def test_trial_must_be_first(build):
    with pytest.raises(RuntimeError, match="Trial must be the first transform, but .* comes before it.*auto_unwrap"):
        build().fake_tensordict()


# ---- Gymnasium.


@pytest.mark.parametrize("make", [GymEnv, lambda name: SerialEnv(2, lambda: GymEnv(name))])
def test_cartpole_starts_anew_at_inner_ends(make):
    env = TransformedEnv(make("CartPole-v1"), Compose(Trial(episodes=3), PreviousStep()))
    env.set_seed(0)
    data = play(env, 150)
    ended, done = data["next", "episode_done"].squeeze(-1), data["next", "done"].squeeze(-1)
    assert done.sum() > 0
    for row in range(len(data)):
        assert done[row].nonzero().squeeze(-1).tolist() == ended[row].nonzero().squeeze(-1).tolist()[2::3]
    # An episode begins within 0.05 of upright and ends beyond 0.2 rad or 2.4 units.
    shown = data["next", "observation"]
    assert (shown[ended & ~done].abs() <= 0.05).all()
    assert ((shown[done][:, 0].abs() > 2.4) | (shown[done][:, 2].abs() > 0.2)).all()
    assert torch.equal(data["next", "trans"][..., :4], shown)
    assert torch.equal(data["next", "trans"][..., 4:6], data["action"].float())


def test_pendulum_time_limits_end_episodes_and_not_trials():
    env = TransformedEnv(GymEnv("Pendulum-v1", max_episode_steps=5), Compose(Trial(episodes=2), PreviousStep()))
    env.set_seed(0)
    data = play(env, 20)
    assert table(data, "episode_done") == [[0, 0, 0, 0, 1] * 4]
    assert table(data, "done") == table(data, "terminated") == [([0] * 9 + [1]) * 2]
    assert not data["next", "truncated"].any()
    assert torch.equal(data["next", "trans"][..., 3:5], torch.cat([data["action"], data["next", "reward"]], -1))


# ---- Specs and errors.


@pytest.mark.parametrize("truncate", [False, True])
@pytest.mark.parametrize("batch_size", [(), (2,), (2, 3)])
def test_specs_fit_the_data(batch_size, truncate):
    trial = Trial(episodes=2, steps=5, truncate=truncate)
    env = counting(batch_size, (1, 2), PreviousStep(), trial=trial, nested=True, discrete=True)
    check_env_specs(env, break_when_any_done="both")


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({}, "needs a bound"),
        ({"episodes": 0}, r"episodes=0.*at least 1"),
        ({"steps": -1}, r"steps=-1.*at least 1"),
        ({"episodes": 1.5}, r"episodes=1.5.*whole number"),
        ({"steps": True}, r"steps=True.*whole number"),
    ],
)
def test_bad_bounds(bounds, message):
    with pytest.raises(ValueError, match=message):
        Trial(**bounds)


def test_step_without_counters():
    env = counting((2,), (1, 2))
    env.reset()
    with pytest.raises(KeyError, match="trial_step.*pass on what reset"):
        env.step(TensorDict({"action": torch.zeros(2, 2), "task": torch.ones(2, 1)}, [2]))


class _TwoAgents(CountingEnv):
    def __init__(self):
        super().__init__()
        done = Categorical(2, shape=(1,), dtype=torch.bool)
        self.done_spec = Composite(agents=Composite(done=done, terminated=done.clone()))


def test_several_done_entries_are_refused():
    with pytest.raises(NotImplementedError, match="one done per env.*aggregate"):
        TransformedEnv(_TwoAgents(), Trial(episodes=2)).fake_tensordict()


@pytest.mark.parametrize("size", [(), (2,)])
def test_a_done_of_another_shape_is_refused(size):
    base = CountingEnv((3,))
    base.done_spec = Composite(done=Categorical(2, shape=(3, *size), dtype=torch.bool), shape=(3,))
    with pytest.raises(
        ValueError, match=r"the env's done is \[3.*counts in \[3, 1\].*Binary\(1, \(3, 1\), dtype=torch.bool"
    ):
        _ = TransformedEnv(base, Trial(episodes=2)).output_spec


def test_trial_works_in_envs_only():
    with pytest.raises(RuntimeError, match="no meaning in a replay buffer"):
        Trial(episodes=2)(TensorDict())


@pytest.mark.parametrize(("step_keys", "expected"), [((), [[0, 1], [1, 0]]), (["count"], [[1, 1], [1, 2]])])
def test_inner_resets_leave_what_tells_of_the_step(step_keys, expected):
    # Row 0 plays two episodes of one step, row 1 the first of two: what is reset counts from 0 again.
    env = counting((2,), (1, 2), trial=Trial(episodes=2, step_keys=step_keys))
    assert table(play(env, 2), "count") == expected


def test_unknown_step_keys_are_refused():
    with pytest.raises(KeyError, match="no entry .*speed"):
        counting((2,), (1, 2), trial=Trial(episodes=2, step_keys=["speed"])).reset()


def test_step_keys_that_the_env_reads_back_are_refused():
    base, trial = TransformedEnv(CountingEnv((2,)), RewardSum()), Trial(episodes=2, step_keys=["episode_reward"])
    with pytest.raises(ValueError, match=r"reads \['episode_reward'\] back at its next step"):
        _ = TransformedEnv(base, trial, auto_unwrap=False).observation_spec


@pytest.mark.parametrize("name", ["time_left", "trial_step"])
def test_an_env_that_shows_a_counter_of_that_name_is_refused(name):
    class Shown(CountingEnv):
        def __init__(self):
            super().__init__()
            self.observation_spec = Composite({name: self.observation_spec["count"]})

        def _observation(self):
            return super()._observation().rename_key_("count", name)

    with pytest.raises(ValueError, match=rf"shows \['{name}'\], where Trial writes its counters.*RenameTransform"):
        TransformedEnv(Shown(), Compose(Trial(steps=2), lengths(1))).reset()
    below = TransformedEnv(Shown(), RenameTransform([name], ["left"]))
    env = TransformedEnv(below, Compose(Trial(steps=2), lengths(1), PreviousStep()), auto_unwrap=False)
    assert env.reset()["trans"].tolist() == [0] * 5  # the count, an action of two, reward, done


def test_an_init_tracker_below_is_refused():
    with pytest.raises(ValueError, match="InitTracker stands below Trial.*memory"):
        _ = TransformedEnv(TransformedEnv(CountingEnv(), InitTracker()), Trial(steps=2), auto_unwrap=False).output_spec


def test_transforms_that_step_on_from_an_inner_reset_are_refused():
    behind = TransformedEnv(CountingEnv(), Compose(Trial(steps=4), FrameSkipTransform(2)))
    below = TransformedEnv(TransformedEnv(CountingEnv(), FrameSkipTransform(2)), Trial(steps=4), auto_unwrap=False)
    for env in (behind, below):
        with pytest.raises(
            ValueError, match="FrameSkipTransform steps .*its end would be lost. Let the env itself repeat"
        ):
            _ = env.observation_spec
    _ = TransformedEnv(CountingEnv(), Compose(Trial(steps=4), FrameSkipTransform(1))).specs


def test_rows_that_an_env_was_not_made_with_are_refused():
    class Unlocked(CountingEnv):
        batch_locked = False

        def _reset(self, tensordict):
            return TensorDict({"count": torch.zeros(*tensordict.batch_size, 1)}, tensordict.batch_size)

    with pytest.raises(ValueError, match=r"has begun \(5,\) rows, and was made with batch_size \(\).*SerialEnv"):
        TransformedEnv(Unlocked(), Trial(steps=2)).reset(TensorDict({}, [5]))


class Saying(EnvBase):
    """Says in words what it also says in numbers; an episode has two steps."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.observation_spec = Composite(count=Unbounded(1), text=NonTensor(()))
        self.action_spec, self.reward_spec = Unbounded(1), Unbounded(1)

    def _reset(self, tensordict=None):
        self.count = 0
        return TensorDict({"count": torch.zeros(1), "text": "an episode begins"})

    def _step(self, tensordict):
        self.count += 1
        said = {"count": torch.tensor([float(self.count)]), "text": f"step {self.count}"}
        return TensorDict({**said, "reward": torch.zeros(1), "done": torch.tensor([self.count == 2])})

    def _set_seed(self, seed):
        pass


@pytest.mark.parametrize("num_rows", [None, 2])
def test_text_after_an_inner_reset_is_the_new_episodes(num_rows):
    base = Saying() if num_rows is None else SerialEnv(num_rows, Saying)
    env = TransformedEnv(base, Trial(steps=3))
    td = env.reset()
    if num_rows is not None:  # row 1 is a step behind row 0
        td = env.step_mdp(env.rand_step(td))
        td = env.reset(td.set("_reset", torch.tensor([[False], [True]])))
    texts = []
    for _ in range(2):
        stepped = env.rand_step(td)
        texts.append(stepped["next", "text"] if num_rows is None else stepped["next"].get("text").tolist())
        td = env.step_mdp(stepped)
    if num_rows is None:
        assert texts == ["step 1", "an episode begins"]
    else:
        assert texts == [["an episode begins", "step 1"], ["step 1", "an episode begins"]]
