"""`PreviousStep`: what an RL² agent sees, entry by entry, from values worked by hand."""

import ast

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Binary, Bounded, Categorical, Composite, OneHot, Unbounded
from torchrl.envs import (
    CatTensors,
    Compose,
    EnvBase,
    ExcludeTransform,
    GymWrapper,
    InitTracker,
    LineariseRewards,
    ObservationNorm,
    RenameTransform,
    RewardSum,
    SerialEnv,
    StepCounter,
    TensorDictPrimer,
    TransformedEnv,
    default_info_dict_reader,
)

from rl2_torchrl import AdaptiveAgent, GRUCategoricalActor, PreviousStep, Trial, TrialCollector
from rl2_torchrl.envs import GymVectorEnv
from rl2_torchrl.modules.layers import Concat


class ScriptedEnv(EnvBase):
    """Episodes of two steps. Step i of the env's life shows ``values[i]`` and pays ``10 * i``."""

    def __init__(self, obs_spec, values, action_spec, batch_size=()):
        super().__init__(batch_size=torch.Size(batch_size))
        self.values, self.clock = values, 0
        self.observation_spec = Composite(obs_spec, shape=self.batch_size)
        self.action_spec = action_spec
        self.reward_spec = Unbounded((*self.batch_size, 1))

    def _reset(self, tensordict=None, **kwargs):
        return TensorDict(self.values[self.clock], self.batch_size)

    def _step(self, tensordict):
        self.clock += 1
        done = torch.full((*self.batch_size, 1), self.clock % 2 == 0)
        entries = {"reward": torch.full(done.shape, 10.0 * self.clock), "done": done, "terminated": done.clone()}
        return TensorDict({**self.values[self.clock], **entries}, self.batch_size)

    def _set_seed(self, seed):
        pass


def see(env, actions):
    """The trans entries of a reset and of the steps with ``actions``."""
    tensordict = env.reset()
    seen = [tensordict["trans"]]
    for action in actions:
        data = env.step(tensordict.set(env.action_key, action))
        seen.append(data["next", "trans"])
        tensordict = env.step_mdp(data)
        assert torch.equal(tensordict["trans"], seen[-1])
    assert all(trans.dtype == torch.float32 for trans in seen)
    assert env.observation_spec["trans"].shape == seen[0].shape
    return [trans.tolist() for trans in seen]


def scripted(obs_spec, values, action_spec, *args, batch_size=(), **kwargs):
    env = ScriptedEnv(obs_spec, values, action_spec, batch_size)
    return TransformedEnv(env, Compose(Trial(episodes=2), PreviousStep(*args, **kwargs)))


def floats(*values):
    return [{"x": torch.tensor([value])} for value in values]


X = {"x": Unbounded((1,))}


# ---- (observation, previous action, previous reward, previous episode done). The episode ends with the second step,
# and the trial with the fourth; the scripted reset shows what the last step does.


@pytest.mark.parametrize(
    ("action_spec", "actions", "encoded"),
    [
        (Unbounded((2,)), [[0.5, -1.0], [2.0, 3.0]], [[0.5, -1.0], [2.0, 3.0]]),
        (Categorical(3), [2, 0], [[0, 0, 1], [1, 0, 0]]),
        (Categorical(3, dtype=torch.int32), [2, 0], [[0, 0, 1], [1, 0, 0]]),
        (OneHot(3, dtype=torch.int64), [[0, 1, 0], [0, 0, 1]], [[0, 1, 0], [0, 0, 1]]),
        (Binary(2, dtype=torch.int8), [[1, 0], [1, 1]], [[1, 0], [1, 1]]),
    ],
)
def test_layout_by_hand(action_spec, actions, encoded):
    env = scripted(X, floats(7.0, 8.0, 9.0), action_spec)
    actions = [torch.tensor(action, dtype=action_spec.dtype) for action in actions]
    size = len(encoded[0])
    assert see(env, actions) == [
        [7, *[0] * size, 0, 0],
        [8, *encoded[0], 10, 0],
        [9, *encoded[1], 20, 1],  # the new episode's observation, the finished one's last reward
    ]


@pytest.mark.parametrize(
    ("spec", "values", "encoded"),
    [
        (Categorical(4), [3, 0], [[0, 0, 0, 1], [1, 0, 0, 0]]),
        (OneHot(2, dtype=torch.int64), [[0, 1], [1, 0]], [[0, 1], [1, 0]]),
        (Binary(3, dtype=torch.bool), [[True, False, True], [False, False, True]], [[1, 0, 1], [0, 0, 1]]),
        (Categorical(2, shape=(1,), dtype=torch.bool), [[True], [False]], [[1], [0]]),
        (Unbounded((2, 2)), [[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]], [[1, 2, 3, 4], [5, 6, 7, 8]]),
        (Categorical(2, shape=(2,)), [[0, 1], [1, 1]], [[1, 0, 0, 1], [0, 1, 0, 1]]),
        (Unbounded((1,), dtype=torch.float64), [[0.5], [1.5]], [[0.5], [1.5]]),
        (Unbounded((1,), dtype=torch.uint8), [[255], [0]], [[1], [0]]),
        (Bounded(0, 255, (1,), dtype=torch.uint8), [[255], [0]], [[1], [0]]),
        (Bounded(0, 1, (1,), dtype=torch.uint8), [[1], [0]], [[1], [0]]),  # flags
        (Bounded(0, 204, (1,), dtype=torch.uint8), [[255], [0]], [[1], [0]]),
        (Binary(2, dtype=torch.uint8), [[1, 0], [1, 1]], [[1, 0], [1, 1]]),
    ],
)
def test_observations_by_hand(spec, values, encoded):
    values = [{"x": torch.tensor(value, dtype=spec.dtype)} for value in values]
    # Named: an observation of several dimensions is left to an encoder otherwise.
    env = scripted({"x": spec}, values, Unbounded((1,)), ["x"])
    assert see(env, [torch.tensor([0.5])]) == [[*encoded[0], 0, 0, 0], [*encoded[1], 0.5, 10, 0]]


def test_images_are_left_out_unless_they_are_named():
    values = [
        {"x": torch.tensor([7.0]), "image": torch.ones(2, 2)},
        {"x": torch.tensor([8.0]), "image": torch.ones(2, 2)},
    ]
    specs = {"x": Unbounded((1,)), "image": Unbounded((2, 2))}
    assert see(scripted(specs, values, Unbounded((1,))), [torch.tensor([0.5])])[0] == [7, 0, 0, 0]
    assert see(scripted(specs, values, Unbounded((1,)), ["image"]), [torch.tensor([0.5])])[0] == [1, 1, 1, 1, 0, 0, 0]


def test_batches_keep_their_rows():
    values = [{"x": torch.tensor([[1], [0]])}, {"x": torch.tensor([[2], [1]])}]
    env = scripted({"x": Categorical(3, shape=(2, 1))}, values, Categorical(2, shape=(2, 1)), batch_size=(2, 1))
    actions = [torch.tensor([[1], [0]])]
    assert see(env, actions) == [
        [[[0, 1, 0, 0, 0, 0, 0]], [[1, 0, 0, 0, 0, 0, 0]]],
        [[[0, 0, 1, 0, 1, 10, 0]], [[0, 1, 0, 1, 0, 10, 0]]],
    ]


# ---- Which observations. Two of them, one nested, beside a task that must stay hidden.

SPECS = {"b": Unbounded((1,)), "a": Composite({"pos": Unbounded((1,))}), "task": Unbounded((1,))}
VALUES = [{"b": torch.tensor([2.0]), "a": {"pos": torch.tensor([3.0])}, "task": torch.tensor([99.0])}] * 2


@pytest.mark.parametrize(
    ("obs_keys", "expected"),
    [
        (None, [2, 3]),
        ([("a", "pos"), "b"], [3, 2]),
        (["b", ("a", "pos")], [2, 3]),
        (["b"], [2]),
        ([], []),
        # A counter is an input when asked for.
        (["b", "time_left"], [2, 1]),
    ],
)
def test_observations_are_chosen_and_ordered(obs_keys, expected):
    env = scripted(SPECS, VALUES, Unbounded((1,)), obs_keys)
    assert see(env, []) == [[*expected, 0, 0, 0]]


@pytest.mark.parametrize("task_key", ["task", "a", ("a", "pos")])
def test_task_is_never_an_input(task_key):
    env = scripted(SPECS, VALUES, Unbounded((1,)), task_key=task_key)
    expected = {"task": [2, 3], "a": [2, 99], ("a", "pos"): [2, 99]}[task_key]
    assert see(env, []) == [[*expected, 0, 0, 0]]


@pytest.mark.parametrize("specs_first", [False, True])
def test_entries_of_later_transforms_are_no_inputs(specs_first):
    # The layout is the same whether specs or data are asked for first.
    later = (StepCounter(), RewardSum(), InitTracker(), TensorDictPrimer(memory=Unbounded((3,)), default_value=0.0))
    env = ScriptedEnv(X, floats(7.0, 8.0), Unbounded((1,)))
    env = TransformedEnv(env, Compose(Trial(episodes=2), PreviousStep(), *later))
    if specs_first:
        assert env.observation_spec["trans"].shape == (4,)
    assert see(env, [torch.tensor([0.5])]) == [[7, 0, 0, 0], [8, 0.5, 10, 0]]


def test_what_is_no_observation_is_left_out_and_said(told):
    reader = default_info_dict_reader(["lives"], spec={"lives": Unbounded((1,))})
    of_info = ObservationNorm(0.0, 2.0, in_keys=["lives"], out_keys=["lives_too"])
    of_seen = CatTensors(in_keys=["observation"], out_key="seen", del_keys=False)
    earlier = (
        StepCounter(),
        RewardSum(),
        TensorDictPrimer(memory=Unbounded((3,)), default_value=0.0),
        of_info,
        of_seen,
    )

    def telling(*args):
        base = GymWrapper(Told()).set_info_dict_reader(reader)
        return TransformedEnv(base, Compose(Trial(steps=5), *(t.clone() for t in earlier), PreviousStep(*args)))

    env = telling()
    assert env.reset()["trans"].shape == (2 + 2 + 1 + 2,)
    assert list(env.transform[-1].layout().observations) == ["observation", "seen"]
    [said] = [message for message in told if "leaves out" in message]
    assert said.startswith("PreviousStep leaves out ['lives', 'step_count', 'episode_reward', 'memory', 'lives_too']")
    named = said[said.index("PreviousStep([") + len("PreviousStep(") : -2]
    env = telling(ast.literal_eval(named))
    assert list(env.transform[-1].layout().observations) == ast.literal_eval(named)


def test_info_readers_in_other_envs_are_hinted_at(told, caplog):
    def telling():
        reader = default_info_dict_reader(["lives"], spec={"lives": Unbounded((1,))})
        return GymWrapper(Told()).set_info_dict_reader(reader)

    caplog.set_level("INFO", "torchrl")  # which another test may have raised
    env = memories(base=SerialEnv(2, telling))
    assert env.reset()["trans"].shape == (2, 2 + 1 + 1 + 2)
    [said] = [message for message in told if "shows the agent ['observation', 'lives']" in message]
    assert "PreviousStep(['observation', 'lives'])" in said
    told.clear()
    memories(base=SerialEnv(2, lambda: GymWrapper(Memory()))).reset()
    assert not [message for message in told if "PreviousStep" in message]


# ---- Options.


@pytest.mark.parametrize("done_at_start", [0.0, 1.0])
def test_done_at_the_trials_first_step_only(done_at_start):
    env = scripted(X, floats(7.0, 8.0, 9.0), Unbounded((1,)), done_at_start=done_at_start)
    seen = see(env, [torch.tensor([0.5])] * 2)
    assert [trans[-1] for trans in seen] == [done_at_start, 0, 1]
    assert seen[0][:-1] == [7, 0, 0]


@pytest.mark.parametrize("out_key", ["seen", ("agent", "seen")])
def test_out_key(out_key):
    env = scripted(X, floats(7.0, 8.0), Unbounded((1,)), out_key=out_key)
    assert env.reset()[out_key].tolist() == [7, 0, 0, 0]
    assert env.observation_spec[out_key].shape == (4,)
    assert env.rollout(1)["next", out_key].shape == (1, 4)


def test_new_trial_begins_with_zeros_and_a_batch_may_hold_both():
    # Trials of one episode of two steps: the third step starts from the second trial's first entry.
    env = TransformedEnv(
        ScriptedEnv(X, floats(*range(7, 12)), Unbounded((1,))), Compose(Trial(episodes=1), PreviousStep())
    )
    data = env.rollout(3, break_when_any_done=False)
    assert data["next", "trans"][1, [0, 2, 3]].tolist() == [9, 20, 1]
    assert data["trans"][2].tolist() == [9, 0, 0, 0]
    assert data["trans"][1].tolist() == data["next", "trans"][0].tolist()


# ---- Errors.


def test_a_reward_of_another_name_is_read_once_it_is_renamed():
    def env(*renaming):
        nested = TransformedEnv(
            ScriptedEnv(X, floats(7.0, 8.0), Unbounded((1,))), RenameTransform(["reward"], [("agents", "reward")])
        )
        return TransformedEnv(nested, Compose(Trial(episodes=2), *renaming, PreviousStep()), auto_unwrap=False)

    with pytest.raises(KeyError, match="the env's step returned no 'reward'"):
        env().rollout(1)
    renamed = env(RenameTransform([("agents", "reward")], ["reward"]))
    assert renamed.rollout(1)["next", "trans"][0, -2:].tolist() == [10, 0]


class _TwoRewards(EnvBase):
    def __init__(self):
        super().__init__(batch_size=(2,))
        self.observation_spec = Composite(observation=Unbounded((2, 1)), shape=(2,))
        self.action_spec, self.reward_spec = Unbounded((2, 1)), Unbounded((2, 2))

    def _reset(self, tensordict=None, **kwargs):
        return TensorDict({"observation": torch.zeros(2, 1)}, [2])

    def _step(self, tensordict):
        ends = {name: torch.zeros(2, 1, dtype=torch.bool) for name in ("done", "terminated")}
        reward = torch.tensor([[1.0, 3.0], [2.0, 5.0]])
        return TensorDict({"observation": torch.zeros(2, 1), "reward": reward, **ends}, [2])

    def _set_seed(self, seed):
        pass


def test_rewards_of_several_numbers_are_weighed_before():
    weighed = LineariseRewards(["reward"], weights=[1.0, 0.5])
    env = TransformedEnv(_TwoRewards(), Compose(Trial(steps=3), weighed, PreviousStep()))
    assert env.rollout(2)["trans"][:, 1, -2].tolist() == [2.5, 4.5]
    with pytest.raises(RuntimeError, match="stack"):  # the inputs of a first and of a later step
        TransformedEnv(_TwoRewards(), Compose(Trial(steps=3), PreviousStep())).rollout(2)["trans"]


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: PreviousStep(["x", "task"]), ValueError, "holds the task.*nothing to find out"),
        (lambda: PreviousStep([("a", "goal")], task_key=("a", "goal")), ValueError, "holds the task"),
        (lambda: PreviousStep()(TensorDict()), RuntimeError, "no meaning in a replay buffer.*take an AdaptiveAgent"),
        (lambda: scripted(X, floats(7.0), Unbounded((1,)), ["y"]).reset(), KeyError, r"no observation \['y'\].*'x'"),
        (
            lambda: TransformedEnv(ScriptedEnv(X, floats(7.0), Unbounded((1,))), PreviousStep()).reset(),
            ValueError,
            "no Trial before it.*Compose",
        ),
    ],
)
def test_bad_use(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_an_observation_of_its_name_may_be_read():
    def env(*args, **kwargs):
        base = ScriptedEnv({"trans": Unbounded((1,))}, [{"trans": torch.tensor([7.0])}], Unbounded((1,)))
        return TransformedEnv(base, Compose(Trial(steps=2), PreviousStep(*args, **kwargs)))

    assert env(out_key="seen").reset()["seen"][0] == env(["trans"]).reset()["trans"][0] == 7.0


@pytest.mark.parametrize(
    ("mend", "seen"), [(RenameTransform(["trans"], ["gear"]), 7.0), (ExcludeTransform("trans"), 0.0)]
)
def test_an_observation_of_its_name_may_be_renamed_or_left_out_on_the_way(mend, seen):
    base = ScriptedEnv({"trans": Unbounded((1,))}, [{"trans": torch.tensor([7.0])}], Unbounded((1,)))
    env = TransformedEnv(base, Compose(Trial(steps=2), mend, PreviousStep()))
    assert env.reset()["trans"][0] == seen


# ---- Bytes.


class Memory(gymnasium.Env):
    """Shows four bytes, as Atari's RAM: 0, 51, 102, 255, and after a step its reverse."""

    observation_space = gymnasium.spaces.Box(0, 255, (4,), np.uint8)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.array([0, 51, 102, 255], np.uint8), {}

    def step(self, action):
        return np.array([255, 102, 51, 0], np.uint8), 1.0, False, False, {}


class Told(gymnasium.Env):
    """Shows two numbers, and says something beside."""

    observation_space = gymnasium.spaces.Box(-1, 1, (2,))
    action_space = gymnasium.spaces.Box(-1, 1, (1,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {"lives": np.ones(1, np.float32)}

    def step(self, action):
        return np.zeros(2, np.float32), 1.0, False, False, {"lives": np.ones(1, np.float32)}


def memories(*transforms, base=None):
    base = GymVectorEnv(Memory, 2) if base is None else base
    return TransformedEnv(base, Compose(Trial(steps=2), *transforms, PreviousStep()))


@pytest.mark.parametrize("rollout", ["tensors", "tensordicts"])
def test_bytes_are_scaled_to_one(rollout):
    env = memories()
    actor = GRUCategoricalActor.from_env(env, hidden_size=4)
    (batch,) = TrialCollector(env, actor, frames_per_batch=4, total_frames=4, rollout=rollout)
    shown = torch.tensor([[0, 0.2, 0.4, 1.0], [1.0, 0.4, 0.2, 0]]).expand(2, 2, 4)
    assert torch.equal(batch["trans"][..., :4], shown)
    assert batch["observation"].dtype == torch.uint8


def test_bytes_of_torchrls_wrapper_and_those_that_a_transform_has_made_reals_of():
    base = SerialEnv(2, lambda: GymWrapper(Memory()))
    assert memories(base=base).reset()["trans"][0, :4].tolist() == pytest.approx([0, 0.2, 0.4, 1.0])
    halved = memories(ObservationNorm(0.0, 0.5, in_keys=["observation"]))
    assert halved.reset()["trans"][0, :4].tolist() == [0, 25.5, 51, 127.5]


def test_an_agent_and_a_critic_scale_bytes_too():
    env = memories()
    actor = GRUCategoricalActor.from_env(env, hidden_size=4, init_range=1.0)
    agent = AdaptiveAgent.from_policy(actor, env)
    agent.new_trial(2)
    shown = env.reset()["observation"]
    agent.act(shown.numpy(), deterministic=True)
    begun = {"is_init": torch.ones(2, 1, dtype=torch.bool)}
    torch.testing.assert_close(agent.memory[-1], actor(env.reset().update(begun))["next", "actor_hidden"])
    joined = Concat()(torch.zeros(2, 1), shown)
    assert joined[0].tolist() == pytest.approx([0, 0, 0.2, 0.4, 1.0])


@pytest.mark.parametrize(("bound", "is_marked"), [(1.0, False), (10.0, False), (200.0, True), (0.01, True)])
def test_actions_of_another_order_than_1_are_to_be_normalised(bound, is_marked):
    env = scripted(X, floats(0.0, 0.0), Bounded(-bound, bound, (1,)))
    transform = next(each for each in env.transform if isinstance(each, PreviousStep))
    assert transform.reals().tolist() == [True, is_marked, True, False]  # observation, action, reward, done
