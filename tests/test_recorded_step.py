"""Steps of a rollout whose kernels' calls are made again: the same numbers as with each part called, bit for bit, and no others."""

from copy import deepcopy

import pytest
import torch
from tensordict.nn import InteractionType, TensorDictModule
from torch import nn
from torchrl.data import Categorical, MultiCategorical, Unbounded
from torchrl.envs import Compose, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import TanhNormal

from rl2_torchrl import PreviousStep, TaskSampler, Trial, kernels
from rl2_torchrl.envs import BernoulliBandit, QuadraticBandit, TensorEnv, uniform_means, uniform_targets
from rl2_torchrl.kernels.recording import Calls
from rl2_torchrl.modules import (
    ActionDistribution,
    CategoricalActions,
    GRUCore,
    Head,
    LSTMCore,
    MLPEncoder,
    RecurrentActor,
    TanhGaussianActions,
    register_distribution,
)
from rl2_torchrl.modules.acting import acting_parts
from rl2_torchrl.rollout import Rollout
from rl2_torchrl.rollout.recorded_step import RecordedStep

pytestmark = pytest.mark.skipif(kernels.load(torch.float32) is None, reason="no C compiler")

ROWS, STEPS = 6, 7


def bandit():
    return wrapped(BernoulliBandit(5, batch_size=(ROWS,), seed=0), uniform_means(5))


def targets():
    return wrapped(QuadraticBandit(2, batch_size=(ROWS,), seed=0), uniform_targets(2))


def wrapped(env, tasks):
    return TransformedEnv(env, Compose(Trial(episodes=5), TaskSampler(tasks, seed=1), PreviousStep()))


class Thrice(nn.Module):
    """A user's layer, in which there is one of ours."""

    def __init__(self, size):
        super().__init__()
        self.layer = Head(size, size, init_range=1.0)

    def forward(self, x):
        return 3 * self.layer(x)


def hooked(n, out):
    head = nn.Sequential(Head(n, out, init_range=1.0))
    head.register_forward_hook(lambda *args: -args[-1])
    return head


def of_inverted_mode():
    actions = CategoricalActions(5)
    actions.mode = lambda logits: (-logits).argmax(-1)
    return actions


class Inverted(torch.distributions.Categorical):
    """A distribution whose functions are put on an object of ours."""

    @property
    def mode(self):
        return (-self.logits).argmax(-1)


register_distribution(Inverted, of_inverted_mode)


class SeveralChoices(TensorEnv):
    """One choice, as a vector of one."""

    def __init__(self):
        spaces = {"observation_spec": Unbounded(1), "action_spec": MultiCategorical((3,)), "task_spec": Unbounded(1)}
        super().__init__(**spaces, max_episode_steps=4, batch_size=(ROWS,), seed=0)

    def begin(self, task, rows):
        return task, task

    def advance(self, state, action):
        return state, state + action, action.float(), None, None


def several():
    return wrapped(SeveralChoices(), uniform_targets(1))


POLICIES = {
    "GRU": (bandit, {}, 1),
    "encoder, hidden layers, tanh": (bandit, {"encoder": MLPEncoder, "num_cells": [8], "activation": nn.Tanh}, 1),
    "a hidden layer": (bandit, {"num_cells": [8]}, 1),
    "two layers": (bandit, {"core": lambda n: GRUCore(n, 8, num_layers=2)}, 1),
    "LSTM": (bandit, {"core": lambda n: LSTMCore(n, 8), "encoder": MLPEncoder}, 2),
    "a user's encoder": (bandit, {"encoder": lambda shape: Thrice(*shape)}, 1),
    "a user's head": (bandit, {"head": lambda n, out: nn.Sequential(Thrice(n), nn.Linear(n, out))}, 1),
    "a user's head within ours": (targets, {"head": lambda n, out: nn.Sequential(nn.Linear(n, out), Thrice(out))}, 1),
    "normalized": (bandit, {"normalize": True}, 1),
    "a layer too large for kernels": (bandit, {"num_cells": [257]}, 1),
    "Gaussian": (targets, {}, 1),
    "squashed": (targets, {"distribution": lambda spec: TanhGaussianActions([-2.0] * 2, [2.0] * 2)}, 1),
    "float64": (bandit, {"dtype": torch.float64}, 1),
    "layers before ours": (bandit, {"encoder": lambda s: nn.Sequential(nn.LayerNorm(s), MLPEncoder(s, [8]))}, 1),
    "layers behind ours": (bandit, {"encoder": lambda s: nn.Sequential(MLPEncoder(s, [8]), nn.LayerNorm(8))}, 1),
    "a hook around ours": (bandit, {"head": hooked}, 1),
    "in place": (bandit, {"encoder": lambda s: MLPEncoder(s, [8]), "num_cells": [8]}, 1),
    "several choices": (several, {}, 1),
    "functions of an object": (bandit, {"distribution": ActionDistribution(5, ["logits"], Inverted)}, 1),
}


def make(name):
    torch.manual_seed(0)
    env_of, options, stages = POLICIES[name]
    env = env_of()
    policy = RecurrentActor.from_env(env, **{"core": lambda n: GRUCore(n, 8), **options})
    for parameter in policy.parameters():
        parameter.data.mul_(3)
    if name == "in place":
        for module in policy.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = True
    return env, policy, stages


def played(rollout, policy, change, batches=5):
    """What some batches hold, drawn in several ways; between them there is a ``change`` of the policy, told the batch's number."""
    torch.manual_seed(1)
    kept, kinds = [], [*3 * [ExplorationType.RANDOM], ExplorationType.DETERMINISTIC, ExplorationType.MODE]
    if policy.module[-1].distribution_class is TanhNormal:
        kinds.pop()  # which it has not
    for number in range(batches):
        with set_exploration_type(kinds[number % len(kinds)]):
            kept.append(rollout().clone())
        change(policy, number)
    return kept


def move_weights(policy, number):
    for parameter in policy.parameters():
        if number == 0:
            parameter.data.mul_(-0.5)
        elif number == 1:
            parameter.data = parameter.data + 0.5


def as_they_are(rollout):
    """``rollout`` with each part called at every step."""
    for part in rollout._acting:
        object.__setattr__(part, "make", plain(part.make))
    return rollout


def plain(make):
    def make_plain(steps):
        run = make(steps)
        return lambda state: run(state)

    return make_plain


def number_recorded(rollout):
    return sum(part is None for part, _ in rollout._act._stages)


def both(name, change):
    """Batches of a policy as it is recorded, and as it is called; and how many stages have been recorded."""
    batches, numbers = [], []
    for is_recorded in (True, False):
        env, policy, _ = make(name)
        rollout = Rollout(env, policy, STEPS)
        rollout = rollout if is_recorded else as_they_are(rollout)
        batches.append(played(rollout, policy, change))
        numbers.append(number_recorded(rollout))
    assert numbers[1] == 0
    return batches, numbers[0]


@pytest.mark.parametrize("name", POLICIES)
def test_steps_are_those_of_their_parts(name):
    batches, stages = both(name, move_weights)
    assert stages == POLICIES[name][-1]
    assert_same(*batches)


def core_of(policy):
    return next(module for module in policy.modules() if isinstance(module, GRUCore))


def last_of(policy):
    return [module for module in policy.modules() if isinstance(module, nn.Linear)][-1]


def square_of(policy):
    return next(m for m in policy.modules() if isinstance(m, nn.Linear) and m.in_features == m.out_features)


def assign(policy):
    state = {key: -1.5 * value for key, value in policy.state_dict().items()}
    policy.load_state_dict(state, assign=True)


def step_of_a_users(policy):
    core = core_of(policy)
    core.step = lambda x, hidden: GRUCore.step(core, 2 * x, hidden)


CHANGES = {
    "assigned": assign,
    "another parameter": lambda policy: setattr(last_of(policy), "weight", nn.Parameter(torch.randn(5, 8))),
    "no bias": lambda policy: setattr(last_of(policy), "bias", None),
    "another layout": lambda policy: setattr(square_of(policy).weight, "data", square_of(policy).weight.data.t()),
    "a step of its own": step_of_a_users,
    "a memory of its own": lambda policy: setattr(core_of(policy), "initial_memory", lambda n: (torch.ones(n, 1, 8),)),
    "a layer in place": lambda policy: [
        setattr(m, "inplace", True) for m in policy.modules() if isinstance(m, nn.ReLU)
    ],
    "other numbers of threads": lambda policy: torch.set_num_threads(1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_between_batches_is_seen(name):
    def change(policy, number):
        if number == 1:
            torch.manual_seed(2)
            CHANGES[name](policy)

    assert_same(*both("a hidden layer", change)[0])


def test_how_actions_are_drawn_by_default_may_change():
    batches = []
    for is_recorded in (True, False):
        env, policy, _ = make("GRU")
        rollout = Rollout(env, policy, STEPS)
        rollout, sample = rollout if is_recorded else as_they_are(rollout), policy.module[-1]
        torch.manual_seed(1)
        kept = []
        for kind in (InteractionType.RANDOM, InteractionType.DETERMINISTIC):
            sample.default_interaction_type = kind
            kept.append(rollout().clone())
        batches.append(kept)
    assert_same(*batches)


def assert_same(*batches):
    for recorded, called in zip(*batches, strict=True):
        assert set(recorded.keys(True, True)) == set(called.keys(True, True))
        for key, entry in recorded.items(True, True):
            assert torch.equal(entry, called[key]), key


class Follows(TensorEnv):
    """Keeps the first actions of an episode as they come, and pays for each that is the same."""

    def __init__(self, breaks_at=None):
        spaces = {"observation_spec": Unbounded(1), "action_spec": Categorical(3), "task_spec": Unbounded(1)}
        super().__init__(**spaces, max_episode_steps=4, batch_size=(ROWS,), seed=0)
        self.steps, self.breaks_at = 0, breaks_at

    def begin(self, task, rows):
        return torch.full((len(task),), -1), task

    def advance(self, state, action):
        self.steps += 1
        if self.steps == self.breaks_at:
            raise InterruptedError
        first = action if (state < 0).all() else state
        return first, torch.zeros(ROWS, 1), (first == action).float().unsqueeze(-1), None, None


def follows(**kwargs):
    env = TransformedEnv(
        Follows(**kwargs), Compose(Trial(episodes=2), TaskSampler(uniform_targets(1), seed=1), PreviousStep())
    )
    torch.manual_seed(0)
    return env, RecurrentActor.from_env(env, core=lambda n: GRUCore(n, 8))


@set_exploration_type(ExplorationType.RANDOM)
def test_an_action_stays_as_it_was_played():
    env, policy = follows()
    batch = Rollout(env, policy, 8)()
    actions = batch["action"].unflatten(1, (2, 4))
    assert not (actions == actions[..., :1]).all()
    assert torch.equal(batch["next", "reward"].unflatten(1, (2, 4))[..., 0], (actions == actions[..., :1]).float())


@set_exploration_type(ExplorationType.RANDOM)
def test_after_an_error_all_noise_is_new():
    batches = []
    for change in (lambda rollout: rollout, as_they_are):
        env, policy = follows(breaks_at=12)
        rollout = change(Rollout(env, policy, 8))
        torch.manual_seed(0)
        rollout()
        with pytest.raises(InterruptedError):
            rollout()
        batches.append(rollout().clone())
    assert torch.equal(batches[0]["action"], batches[1]["action"])


def steps_of(policy, xs, memory):
    """Logits of steps on ``xs``, of which each takes the memory that the one before left, or ``memory`` at the step it names."""
    step = RecordedStep(acting_parts(policy)[:2], len(xs))
    step.start_batch()
    logits, hidden = [], torch.zeros(ROWS, 1, 8)
    for number, x in enumerate(xs):
        state = {"trans": x, "actor_hidden": memory.get(number, hidden)}
        step(state)
        hidden = state["next", "actor_hidden"]
        logits.append(state["logits"])
    return step, logits


@torch.no_grad()
def test_a_step_of_another_layout_is_made_by_its_parts():
    env, policy, _ = make("GRU")
    xs = list(torch.randn(6, ROWS, env.observation_spec["trans"].shape[-1]))
    memory = torch.randn(ROWS, 1, 8)
    _, expected = steps_of(policy, xs, {4: memory})
    strided = xs[:2] + [xs[2].t().contiguous().t(), xs[3].double(), *xs[4:]]
    assert strided[2].stride() != xs[2].stride()
    _, logits = steps_of(policy, strided, {4: memory.expand(2, -1, -1, -1)[1]})
    for made, due in zip(logits, expected, strict=True):
        assert torch.equal(made, due)


@torch.no_grad()
@pytest.mark.parametrize(
    "is_one", [True, False], ids=["one entry in two places", "written in the place of what is read"]
)
def test_entries_part_from_the_second_step_on(is_one):
    torch.manual_seed(0)
    core = GRUCore(8, 8)
    encoder = [] if is_one else [TensorDictModule(MLPEncoder(8, [8]), ["trans"], ["trans"])]
    step = RecordedStep([part for module in (*encoder, core) for part in acting_parts(module)], 3)
    step.start_batch()
    for number in range(3):
        x, memory = torch.randn(ROWS, 8), torch.randn(ROWS, 1, 8)
        memory = x.unsqueeze(1) if is_one and number == 0 else memory
        state = {"trans": x, "hidden": memory}
        step(state)
        x = x if is_one else encoder[0].module(x)
        assert torch.equal(state["features"], core.step_function()(x, memory)[0])


@torch.no_grad()
def test_kernels_for_two_dtypes_are_not_one_call():
    torch.manual_seed(0)
    encoder = TensorDictModule(MLPEncoder(8, [8]), ["trans"], ["encoded"])
    double = TensorDictModule(lambda x: x.double(), ["encoded"], ["doubled"])
    head = TensorDictModule(Head(8, 3, init_range=1.0, dtype=torch.float64), ["doubled"], ["logits"])
    step = RecordedStep([part for module in (encoder, double, head) for part in acting_parts(module)], STEPS)
    step.start_batch()
    for _ in range(STEPS):
        state = {"trans": torch.randn(ROWS, 8)}
        step(state)
        assert torch.equal(state["logits"], head.module(encoder.module(state["trans"]).double()))


class MyCore(GRUCore):
    """A user's, around a step of ours."""

    def step_function(self):
        step = super().step_function()
        return lambda x, hidden: step(2 * x, hidden)


def test_what_a_users_core_packs_is_not_packed_again():
    env = bandit()
    rollout = Rollout(env, RecurrentActor.from_env(env, core=lambda n: MyCore(n, 8)), STEPS)
    rollout()
    assert not rollout._act._packing


def test_what_a_module_writes_over_is_no_kernels():
    torch.manual_seed(0)
    encoder = TensorDictModule(MLPEncoder(8, [8]), ["trans"], ["encoded"])
    norm = TensorDictModule(nn.LayerNorm(8), ["encoded"], ["encoded"])
    head = TensorDictModule(Head(8, 3, init_range=1.0), ["encoded"], ["logits"])
    step = RecordedStep([part for module in (encoder, norm, head) for part in acting_parts(module)], STEPS)
    step.start_batch()
    for _ in range(STEPS):
        state = {"trans": torch.randn(ROWS, 8)}
        step(state)
        torch.testing.assert_close(state["logits"], head.module(norm.module(encoder.module(state["trans"]))).detach())


@pytest.mark.parametrize("fails_at", [1, 2], ids=["weights", "step"])
def test_no_memory_is_an_error(fails_at, monkeypatch):
    env, policy, _ = make("GRU")
    rollout = Rollout(env, policy, STEPS)
    rollout()
    results = iter([True] * (fails_at - 1))
    monkeypatch.setattr(Calls, "__call__", lambda self: next(results, False))
    with pytest.raises(MemoryError, match="fewer threads, rows or units"):
        rollout()


def test_an_ablation_that_leaves_an_entry_out_is_told_of():
    env, policy, _ = make("GRU")
    steps = iter(range(STEPS))

    def left_out(state):
        return {key: entry for key, entry in state.items() if key != "trans" or next(steps) < 3}

    with pytest.raises(KeyError, match="nor made by what runs before"):
        Rollout(env, policy, STEPS, ablation=left_out)()


@pytest.mark.parametrize(("name", "written"), [("GRU", "logits"), ("Gaussian", "scale")])
def test_batches_in_inference_mode_and_others(name, written):
    env, policy, _ = make(name)
    rollout = Rollout(env, policy, STEPS)
    rollout()
    seen = []
    rollout.on_step = lambda state: seen.append(state[written].is_inference())
    for is_on in (True, False, True):
        with torch.inference_mode(is_on):
            rollout()
    assert seen == [True] * STEPS + [False] * STEPS + [True] * STEPS


def test_a_copy_notes_its_own_calls():
    env, policy, _ = make("GRU")
    rollout = Rollout(env, policy, STEPS)
    rollout()
    copied = deepcopy(rollout._act)
    copied.start_batch()
    x, memory = torch.randn(ROWS, 7), torch.zeros(ROWS, 1, 8)
    first, second = ({"trans": x, "actor_hidden": memory} for _ in range(2))
    copied(first), copied(second)
    assert torch.equal(first["logits"], second["logits"])


def test_what_hangs_on_a_layer_is_called_at_each_step():
    env, policy, _ = make("GRU")
    head = next(module for module in policy.modules() if isinstance(module, Head))
    calls = []
    head.register_forward_hook(lambda *_: calls.append(1))
    rollout = Rollout(env, policy, STEPS)
    rollout()
    assert len(calls) == STEPS
    assert number_recorded(rollout) == 1  # the GRU
