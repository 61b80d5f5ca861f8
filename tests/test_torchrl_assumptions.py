"""What this package takes for granted about TorchRL: one fact a test, so that a new TorchRL says what has moved."""

import re

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import (
    Binary,
    Categorical,
    LazyTensorStorage,
    OneHot,
    SamplerWithoutReplacement,
    TensorDictReplayBuffer,
)
from torchrl.envs import (
    Compose,
    EnvCreator,
    GymEnv,
    InitTracker,
    RewardSum,
    StepCounter,
    Transform,
    TransformedEnv,
)
from torchrl.modules import GRUModule, OneHotCategorical, ProbabilisticActor, set_recurrent_mode
from torchrl.modules.utils import get_primers_from_module
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE
from torchrl.objectives.value.functional import generalized_advantage_estimate

from rl2_torchrl import (
    ActorCritic,
    GRUCategoricalActor,
    MemoryValueHead,
    PreviousStep,
    TaskSampler,
    Trial,
    TrialAdvantage,
)
from rl2_torchrl.envs import BernoulliBandit, uniform_means


def cartpole(*transforms):
    return TransformedEnv(GymEnv("CartPole-v1"), Compose(*transforms))


def gru(input_size=4):
    torch.manual_seed(0)
    return GRUModule(input_size, 3, in_keys=["observation", "memory", "is_init"], out_keys=["out", ("next", "memory")])


def sequences(rows, steps):
    """Inputs of `gru` with a different memory stored at every step."""
    entries = {"observation": torch.randn(rows, steps, 4), "memory": torch.randn(rows, steps, 1, 3)}
    return TensorDict({**entries, "is_init": torch.zeros(rows, steps, 1, dtype=torch.bool)}, [rows, steps])


def run(module, data):
    with set_recurrent_mode(True):
        return module(data.clone())


# ---- Envs and transforms.


def test_parent_inside_compose_is_rebuilt_from_clones():
    """`Trial`, `TaskSampler` and `PreviousStep` go to the env by `container`, which is the env itself."""
    env = cartpole(RewardSum(), StepCounter())
    counter = env.transform[1]
    assert counter.parent is not env
    assert counter.parent.transform[0] is not env.transform[0]
    assert counter.container is env
    assert counter.container.base_env is env.base_env


def test_set_seed_does_not_reach_transforms():
    """`TaskSampler` therefore takes a seed of its own."""

    class Spy(Transform):
        seeded = False

        def set_seed(self, *args, **kwargs):
            self.seeded = True

        seed = _set_seed = set_seed

    env = cartpole(Spy())
    env.set_seed(0)
    assert not env.transform[0].seeded


class Seen(Transform):
    """Remembers the entries of the TensorDicts that resets are given."""

    def __init__(self):
        super().__init__()
        self.keys = []

    def _reset_env_preprocess(self, tensordict):
        self.keys.append(set() if tensordict is None else set(tensordict.keys()))
        return tensordict


def test_maybe_reset_passes_only_reset():
    """`TaskSampler` takes a task that a reset is given; the finished trial's must not come back that way."""
    env = TransformedEnv(BernoulliBandit(2, batch_size=(2,)), Compose(Given(), seen := Seen()))
    tensordict = env.reset()
    assert "task" not in seen.keys[-1]
    tensordict["task"] = torch.ones(2, 2)
    tensordict["done"] = torch.tensor([[True], [False]])
    env.maybe_reset(tensordict.clone())
    assert seen.keys[-1] == {"_reset"}
    env.reset(tensordict.clone())
    assert seen.keys[-1] == {"task"}


class Given(Transform):
    """Gives the bandit a task where there is none."""

    def _reset_env_preprocess(self, tensordict):
        tensordict = TensorDict({}, [2]) if tensordict is None else tensordict
        return tensordict if "task" in tensordict.keys() else tensordict.copy().set("task", torch.zeros(2, 2))


def test_collectors_resets_pass_only_reset():
    """The same where a collector starts every batch anew."""
    env = TransformedEnv(BernoulliBandit(2, batch_size=(2,)), Compose(Given(), seen := Seen()))

    def act(tensordict):
        return env.rand_action(tensordict.set("task", torch.ones(2, 2)))

    for _ in Collector(env, act, frames_per_batch=4, total_frames=12, reset_at_each_iter=True):
        pass
    assert len(seen.keys) >= 3
    assert all(keys <= {"_reset"} for keys in seen.keys)


def test_env_creator_copies_state_into_all_its_envs_but_no_plain_tensor():
    """`TaskSampler.get_extra_state` is one plain tensor, or the workers of a ``ParallelEnv`` draw the same tasks."""

    class Stateful(Transform):
        def __init__(self, as_dict):
            super().__init__()
            self.as_dict, self.value = as_dict, torch.rand(1).item()

        def get_extra_state(self):
            value = torch.tensor(self.value, dtype=torch.float64)
            return {"value": value} if self.as_dict else value

        def set_extra_state(self, state):
            self.value = float(state["value"] if self.as_dict else state)

    for as_dict in (True, False):
        creator = EnvCreator(lambda as_dict=as_dict: cartpole(Stateful(as_dict)))
        values = {creator().transform[0].value for _ in range(3)}
        assert len(values) == (1 if as_dict else 3)


def test_transformed_envs_state_leaves_the_base_env_out():
    """Checkpoints hold the base env's generator as a part of its own."""
    bandit = BernoulliBandit(2)
    assert "_extra_state" in bandit.state_dict()
    assert not TransformedEnv(bandit, RewardSum()).state_dict()


def test_collectors_state_lacks_the_step_at_which_it_stands():
    """Checkpoints hold the carrier as a part of their own."""
    collector = Collector(cartpole(StepCounter()), frames_per_batch=4, total_frames=8)
    next(iter(collector))
    assert set(collector.state_dict()) <= {"env_state_dict", "policy_state_dict", "frames", "iter", "traj_pool"}
    carrier = collector._carrier
    assert carrier["step_count"].item() == 4
    assert "observation" in carrier.keys()


def test_binary_is_a_categorical_and_one_hot_is_not():
    """`PreviousStep` makes a `Categorical` one-hot and leaves both of these as they are."""
    assert not issubclass(OneHot, Categorical)
    assert issubclass(Binary, Categorical)


def test_gym_actions_are_one_hot_vectors():
    """`GRUCategoricalActor.from_env` takes its encoding from the spec."""
    assert type(GymEnv("CartPole-v1").action_spec) is OneHot


# ---- Recurrent modules.


def test_recurrent_mode_reads_memory_at_the_first_step_of_each_trajectory_only():
    """A chunk of ``bptt`` steps starts from the memory stored at its first step; what is stored later is not read."""
    module, data = gru(), sequences(2, 5)
    data["is_init"][1, 3] = True
    out = run(module, data)["out"]
    for row, step, is_read in ((0, 0, True), (0, 2, False), (0, 3, False), (1, 2, False), (1, 3, True)):
        other = data.clone()
        other["memory"][row, step] += 1
        changed = run(module, other)["out"] != out
        assert changed.any() == is_read
        assert not changed[1 - row].any()
        assert not changed[row, :step].any()


def test_recurrent_mode_is_the_steps_one_by_one():
    """Replayed log-probabilities are those of collection."""
    module, data = gru(), sequences(2, 5)
    out, memory, steps = run(module, data)["out"], data["memory"][:, 0], []
    for step in range(5):
        stepped = module(data[:, step].clone().set("memory", memory))
        memory = stepped["next", "memory"]
        steps.append(stepped["out"])
    assert torch.allclose(out, torch.stack(steps, 1), atol=1e-6)


def test_recurrent_mode_hands_memory_on_at_trajectory_ends_only():
    """Chunks therefore take their first memory from collection, never from a recurrent pass."""
    data = sequences(2, 5)
    data["is_init"][1, 3] = True
    handed_on = run(gru(), data)["next", "memory"].flatten(2).any(-1)
    assert handed_on.int().tolist() == [[0, 0, 0, 0, 1], [0, 0, 1, 0, 1]]


def test_single_step_starts_from_zeros_where_is_init_says_so():
    """Memory is reset at a trial's start whatever is stored there."""
    module, data = gru(), sequences(2, 1)[:, 0]
    data["is_init"][1] = True
    out = module(data.clone())["out"]
    zeroed = data.clone()
    zeroed["memory"][1] = 0
    assert torch.equal(module(zeroed)["out"], out)
    zeroed["memory"][0] = 0
    assert not torch.equal(module(zeroed)["out"][0], out[0])


def test_primers_are_found_and_without_them_memory_is_silently_lost():
    """`adaptation_curve` adds them itself."""
    module = gru()
    assert "memory" in get_primers_from_module(nn.Sequential(module)).primers.keys()

    def memories(*transforms):
        torch.manual_seed(0)
        env = cartpole(InitTracker(), *transforms)
        env.set_seed(0)
        data = env.rollout(3, lambda tensordict: env.rand_action(module(tensordict)))
        return data.get("memory", None)

    assert memories() is None
    primed = memories(get_primers_from_module(module)).flatten(1).any(-1)
    assert primed.tolist() == [False, True, True]


def test_collector_gives_memory_to_its_own_policy_only():
    """A critic beside the collector's policy would start from nothing: hence `ActorCritic`."""
    policy = actor()
    collector = Collector(cartpole(), policy, frames_per_batch=4, total_frames=4, auto_register_policy_transforms=True)
    batch = next(iter(collector))
    assert {"memory", "is_init"} <= set(batch.keys())
    assert batch["memory"][1].any()
    collector = Collector(cartpole(), None, frames_per_batch=4, total_frames=4, auto_register_policy_transforms=True)
    assert "memory" not in next(iter(collector)).keys()


# ---- Loss, advantages, replay.


def actor():
    """A recurrent policy for CartPole: memory of 3 units, logits of 2 actions."""
    head = TensorDictModule(nn.Linear(3, 2), in_keys=["out"], out_keys=["logits"])
    return ProbabilisticActor(
        TensorDictSequential(gru(), head),
        in_keys=["logits"],
        distribution_class=OneHotCategorical,
        return_log_prob=True,
    )


def clip_loss(**kwargs):
    critic = TensorDictModule(nn.Linear(4, 1), in_keys=["observation"], out_keys=["state_value"])
    return ClipPPOLoss(actor(), critic, **kwargs)


def loss_data(rows, steps):
    data = sequences(rows, steps)
    data["action"] = torch.eye(2, dtype=torch.int64)[torch.randint(2, (rows, steps))]
    data["action_log_prob"] = torch.randn(rows, steps)
    data["advantage"], data["value_target"] = torch.randn(2, rows, steps, 1)
    return data


def test_clip_ppo_defaults_are_not_the_originals():
    """`RL2PPOLoss` sets l2, 0.5 and no entropy term in their place."""
    loss = clip_loss()
    assert loss.loss_critic_type == "smooth_l1"
    assert float(loss.critic_coeff) == 1.0
    assert loss.entropy_bonus
    assert float(loss.entropy_coeff) == pytest.approx(0.01)
    assert float(loss.clip_epsilon) == pytest.approx(0.2)
    assert loss.tensor_keys.sample_log_prob == "action_log_prob"


def test_clip_ppo_stores_its_threshold_in_float32():
    """`RL2PPOLoss` stores it in the networks' precision."""
    assert clip_loss(clip_epsilon=0.3).double().clip_epsilon.double().item() != 0.3


def test_clip_ppo_runs_its_networks_in_recurrent_mode():
    """`PPOUpdate` does not set it: memory stored behind the first step must not be read."""
    loss, data = clip_loss(), loss_data(2, 4)
    objective = loss(data.clone())["loss_objective"]
    other = data.clone()
    other["memory"][:, 1:] += 1
    assert torch.equal(loss(other)["loss_objective"], objective)
    other["memory"][:, 0] += 1
    assert not torch.equal(loss(other)["loss_objective"], objective)


@pytest.mark.parametrize("lmbda", [0.0, 0.3, 1.0])
def test_trial_advantages_are_those_of_torchrls_gae(lmbda):
    """`TrialAdvantage` computes them in its own memory; truncations, terminations and batches that cut a trial alike."""
    generator = torch.Generator().manual_seed(0)
    value, next_value, reward, draw = torch.randn(4, 50, 30, 1, generator=generator, dtype=torch.float64)
    done, terminated = draw > 1, draw > 1.5
    assert (done & ~terminated).any()
    assert terminated.any()
    next_value[:, :-1] = torch.where(done[:, :-1], next_value[:, :-1], value[:, 1:])
    expected, target = generalized_advantage_estimate(
        *(torch.tensor(number, dtype=torch.float64) for number in (0.9, lmbda)),
        *(value, next_value, reward, done, terminated),
    )

    class NextValue(TensorDictModule):
        in_keys = ["next_value"]

        def forward(self, data):
            return data.set("state_value", data["next_value"])

    critic = NextValue(torch.nn.Identity(), in_keys=["next_value"], out_keys=["state_value"])
    following = {"reward": reward, "done": done, "terminated": terminated, "next_value": next_value}
    data = TensorDict({"state_value": value, "next": TensorDict(following, [50, 30])}, [50, 30])
    for _ in range(2):  # the second call writes over the first one's entries
        TrialAdvantage(gamma=0.9, lmbda=lmbda, normalize=False, critic=critic, value_target="gae")(data)
        torch.testing.assert_close(data["advantage"], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(data["value_target"], target, rtol=0, atol=1e-12)


def test_torchrls_gae_refuses_values_that_are_stored():
    """`PPOTrainer`'s default: `ActorCritic` says what to give it in its place, and what stands here in quotes."""
    env = TransformedEnv(
        BernoulliBandit(3, batch_size=(4,)), Compose(Trial(2), TaskSampler(uniform_means(3)), PreviousStep())
    )
    actor = GRUCategoricalActor.from_env(env, hidden_size=4)
    critic = MemoryValueHead.from_env(env, actor, detach=True)
    collector = Collector(env, ActorCritic(actor, critic), frames_per_batch=8, auto_register_policy_transforms=True)
    batch = next(iter(collector))
    collector.shutdown()
    with pytest.raises(RuntimeError) as error:
        GAE(gamma=0.9, lmbda=0.9, value_network=critic)(batch)
    (quoted,) = re.findall(r'ends in "(.*?)"', re.sub(r"\s+", " ", ActorCritic.__doc__))
    assert str(error.value).startswith(quoted)


@pytest.mark.parametrize("dim", [0, 1])
def test_trial_advantages_of_a_lazy_stack(dim):
    """A lazy stack hands out copies of its entries: what is written into one of them is lost."""
    done = torch.zeros(2, 3, 1, dtype=torch.bool)
    done[:, -1] = True
    ends = {"reward": torch.ones(2, 3, 1), "done": done, "terminated": done}
    data = TensorDict({"state_value": torch.zeros(2, 3, 1), "next": TensorDict(ends, [2, 3])}, [2, 3])
    stack = TensorDict.lazy_stack(list(data.unbind(dim)), dim)
    for _ in range(2):
        TrialAdvantage(gamma=0.5, lmbda=1.0, normalize=False)(stack)
        assert stack["advantage"].squeeze(-1).tolist() == 2 * [[1.75, 1.5, 1.0]]


@pytest.mark.parametrize("shuffle", [False, True])
def test_one_pass_over_the_buffer_is_every_chunk_once(shuffle):
    """`PPOUpdate` makes a pass by iterating; unshuffled it is the original's order, with the short minibatch last."""
    buffer = TensorDictReplayBuffer(
        storage=LazyTensorStorage(7), sampler=SamplerWithoutReplacement(shuffle=shuffle), batch_size=3
    )
    for start in (0, 100):  # the next batch takes the first one's place
        chunks = start + torch.arange(14).reshape(7, 2)
        buffer.extend(TensorDict({"step": chunks}, [7, 2]))
        for _ in range(2):
            passed = [minibatch["step"] for minibatch in buffer]
            assert [len(minibatch) for minibatch in passed] == [3, 3, 1]
            order = torch.cat(passed)
            assert torch.equal(order, chunks) != shuffle
            assert torch.equal(order[order[:, 0].argsort()], chunks)
