"""Cores: a user's own and the LSTM do in sequences what they do in steps, reset where a trial starts, and fit into networks."""

from functools import partial

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictSequential
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import prune
from torchrl.collectors import Collector
from torchrl.envs import Compose, InitTracker, ParallelEnv, TransformedEnv
from torchrl.modules import LSTMModule, set_recurrent_mode
from torchrl.modules.utils import get_primers_from_module

from rl2_torchrl import ActorCritic, AdaptiveAgent, PreviousStep, RL2PPOLoss, TaskSampler, Trial, TrialCollector
from rl2_torchrl.envs import BernoulliBandit, uniform_means
from rl2_torchrl.kernels.gru_sequence import gru_sequence, sequence_backward, sequence_forward
from rl2_torchrl.modules import (
    CategoricalActions,
    FastGRUModule,
    GRUCategoricalActor,
    GRUCore,
    GRUValueHead,
    Head,
    LSTMCore,
    RecurrentActor,
    RecurrentCore,
    RecurrentCritic,
)
from rl2_torchrl.modules.actor_critic import hidden_keys
from rl2_torchrl.modules.cores import where_rows


class TwoSpeeds(RecurrentCore):
    """A user's own core: a fast and a slow memory, the slow one starting at a learned value."""

    def __init__(self, input_size, size=6, **keys):
        super().__init__(2 * size, {"fast": (size,), "slow": (2, size)}, input_size=input_size, **keys)
        self.linear, self.start = nn.Linear(input_size + size, size), nn.Parameter(torch.full((2, size), 0.3))

    def initial_memory(self, num_rows):
        return self.start.new_zeros(num_rows, self.start.shape[1]), self.start.expand(num_rows, -1, -1)

    def step(self, x, fast, slow):
        fast = torch.tanh(self.linear(torch.cat((x, fast), -1)))
        slow = 0.9 * slow + 0.1 * fast.unsqueeze(1)
        return torch.cat((fast, slow.sum(1)), -1), fast, slow


class Ring(RecurrentCore):
    """The last three inputs, where the next one goes, and whether all three places are taken."""

    def __init__(self, input_size, **keys):
        super().__init__(input_size + 1, {"at": (), "full": (1,), "seen": (3, input_size)}, **keys)
        self.linear = nn.Linear(input_size, input_size)

    def initial_memory(self, num_rows):
        at, full = torch.zeros(num_rows, dtype=torch.int64), torch.zeros(num_rows, 1, dtype=torch.bool)
        return at, full, self.linear.weight.new_zeros(num_rows, *self.memory_shapes["seen"])

    def step(self, x, at, full, seen):
        place = nn.functional.one_hot(at, 3).bool().unsqueeze(-1)
        seen, full = torch.where(place, self.linear(x).unsqueeze(1), seen), full | (at == 2).unsqueeze(-1)
        return torch.cat((seen.sum(1), full.to(x.dtype)), -1), (at + 1) % 3, full, seen


class FromOnes(GRUCore):
    def initial_memory(self, num_rows):
        return (torch.ones(num_rows, *self.memory_shapes["hidden"]),)


class HalfGRU(GRUCore):
    """Steps of its own, upon those of the class above."""

    def step(self, x, hidden):
        features, hidden = super().step(x, hidden)
        return 0.5 * features, hidden


class HalfLSTM(LSTMCore):
    def step(self, x, *memory):
        features, *memory = super().step(x, *memory)
        return 0.5 * features, *memory


class LearnsItsStart(LSTMCore):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.start = nn.Parameter(torch.full(self.memory_shapes["cell"], 0.5))

    def initial_memory(self, num_rows):
        hidden, _ = super().initial_memory(num_rows)
        return hidden, self.start.expand(num_rows, -1, -1)


CORES = {
    "gru with a step of its own": lambda size, **keys: HalfGRU(size, 6, **keys),
    "lstm with a step of its own": lambda size, **keys: HalfLSTM(size, 6, **keys),
    "gru from ones": lambda size, **keys: FromOnes(size, 6, **keys),
    "lstm that learns its start": lambda size, **keys: LearnsItsStart(size, 6, **keys),
    "own": TwoSpeeds,
    "lstm": lambda size, **keys: LSTMCore(size, 6, **keys),
    "two LSTM layers": lambda size, **keys: LSTMCore(size, 6, 2, **keys),
    "gru": lambda size, **keys: GRUCore(size, 6, **keys),
    "two GRU layers": lambda size, **keys: GRUCore(size, 6, 2, **keys),
    "bidirectional GRU": lambda size: FastGRUModule(size, 6, bidirectional=True, in_key="x", out_key="y"),
}
each_core = pytest.mark.parametrize("kind", list(CORES)[:9])


def build(kind, **keys):
    torch.manual_seed(0)
    return CORES[kind](5, **keys)


def chosen(rows, yes, no):
    return tuple(torch.where(rows.view(-1, *(1,) * (m.ndim - 1)), m, old) for m, old in zip(yes, no, strict=True))


def stepped(core, x, memory, is_init):
    """Features ``[N, T, H]`` by `step`, one after the other."""
    initial, outputs = core.initial_memory(len(x)), []
    state = initial if memory is None else tuple(m[:, 0] for m in memory)
    for t in range(x.shape[1]):
        features, *state = core.step(x[:, t], *chosen(is_init[:, t], initial, state))
        outputs.append(features)
    return torch.stack(outputs, 1)


RESETS = {
    "none": lambda: torch.zeros(4, 7, dtype=torch.bool),
    "in all rows at once": lambda: (torch.arange(7) % 3 == 0).expand(4, 7),
    "of unlike length": lambda: torch.rand(4, 7, generator=torch.Generator().manual_seed(1)) < 0.3,
}


@each_core
@pytest.mark.parametrize("resets", RESETS)
@pytest.mark.parametrize("with_memory", [True, False])
def test_sequences_equal_steps(kind, resets, with_memory):
    core, is_init, x = build(kind), RESETS[resets](), torch.randn(4, 7, 5)
    memory = None
    if with_memory:  # as it is stored: that of a new trial where one starts
        memory = [(m.detach().unsqueeze(1).expand(4, 7, *m.shape[1:]), m.shape[1:]) for m in core.initial_memory(4)]
        memory = tuple(
            chosen(is_init.flatten(), [m.flatten(0, 1)], [torch.randn(28, *s)])[0].view(4, 7, *s) for m, s in memory
        )
    expected = stepped(core, x, memory, is_init)
    ours = core.sequence(x, memory, is_init)
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)
    weights = list(core.parameters())
    slope = torch.randn_like(expected)
    gradients = [torch.autograd.grad(out, weights, slope, allow_unused=True) for out in (ours, expected)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert all(g is not None for g in gradients[0]) or not is_init.any()  # a learned start is learned
    if not is_init[:, 1:].any():
        torch.testing.assert_close(core.sequence(x, memory, None), ours)


@pytest.mark.parametrize(
    ("starts_at", "calls"), [([3], 1), ([3, 5], 1), (range(1, 35), 0)], ids=["in one row", "twice", "mostly short"]
)
def test_an_lstm_takes_trials_of_unlike_lengths_as_rows(starts_at, calls, monkeypatch):
    core, forward, seen = build("lstm"), nn.LSTM.forward, []
    monkeypatch.setattr(nn.LSTM, "forward", lambda self, *args: seen.append(args[0].shape) or forward(self, *args))
    is_init, x = torch.zeros(2, 70, dtype=torch.bool), torch.randn(2, 70, 5)
    is_init[1, list(starts_at)] = True
    ours = core.sequence(x, None, is_init)
    assert len(seen) == calls  # or else its steps, which are fewer than the padding
    torch.testing.assert_close(ours, stepped(core, x, None, is_init), rtol=0, atol=2e-6)


def test_an_lstm_of_many_rows_takes_its_steps(monkeypatch):
    core, forward, seen = build("lstm"), nn.LSTM.forward, []
    monkeypatch.setattr(nn.LSTM, "forward", lambda self, *args: seen.append(args[0].shape) or forward(self, *args))
    for rows, calls in ((511, 1), (512, 0)):
        seen.clear()
        is_init = torch.zeros(rows, 4, dtype=torch.bool)
        is_init[1, 2] = True
        core.sequence(torch.randn(rows, 4, 5), None, is_init)
        assert len(seen) == calls


def test_padding_is_of_a_trials_own():
    core, x = build("lstm"), torch.randn(3, 9, 5)
    x[1] = torch.nan
    x.requires_grad_()
    is_init = torch.zeros(3, 9, dtype=torch.bool)
    is_init[0, 4] = is_init[1, 2] = is_init[1, 7] = is_init[2, 0] = is_init[2, 5] = True
    core.sequence(x, None, is_init)[[0, 2]].sum().backward()
    assert x.grad[[0, 2]].isfinite().all()


class WritesIntoItsMemory(RecurrentCore):
    def __init__(self):
        super().__init__(4, {"hidden": (4,)}, input_size=5)
        self.linear = nn.Linear(5, 4)

    def step(self, x, hidden):
        hidden.mul_(0.5).add_(self.linear(x))
        return hidden, hidden


def test_a_step_may_write_into_its_memory():
    torch.manual_seed(0)
    core, x, memory = WritesIntoItsMemory(), torch.randn(2, 6, 5), torch.ones(2, 6, 4)
    is_init = torch.zeros(2, 6, dtype=torch.bool)
    is_init[0, 3] = True
    features, hidden = core.sequence(x, (memory,), is_init), torch.ones(2, 4)
    for t in range(6):
        hidden = torch.where(is_init[:, t, None], 0.0, hidden)
        hidden = 0.5 * hidden + core.linear(x[:, t])
        torch.testing.assert_close(features[:, t], hidden)
    assert (memory == 1).all()
    features.sum().backward()


class Leaky(RecurrentCore):
    def __init__(self):
        super().__init__(4, {"hidden": (4,)}, input_size=5)
        self.linear = nn.Linear(5, 4)

    def step(self, x, hidden):
        hidden = 0.5 * hidden + self.linear(x)
        return hidden, hidden


def test_a_users_core_is_one_graph():
    core, x, is_init = Leaky(), torch.randn(2, 5, 5), torch.zeros(2, 5, dtype=torch.bool)
    is_init[0, 2] = True
    run = torch.compile(lambda x, is_init: core.sequence(x, None, is_init), backend="eager", fullgraph=True)
    torch.testing.assert_close(run(x, is_init), core.sequence(x, None, is_init))


def test_where_no_trial_starts_nobody_asks(monkeypatch):
    asked = []

    def asks(*args):
        asked.append(1)
        return where_rows(*args)

    monkeypatch.setattr("rl2_torchrl.modules.cores.where_rows", asks)
    core, is_init = build("lstm with a step of its own"), torch.zeros(3, 7, dtype=torch.bool)
    is_init[:, 0] = is_init[1, 4] = True
    core.sequence(torch.randn(3, 7, 5), None, is_init)
    assert len(asked) == 2 * len(core.initial_memory(1))


@pytest.mark.parametrize("kind", CORES)
def test_the_rollouts_step_is_one_of_a_sequence(kind):
    core, x = build(kind), torch.randn(3, 5)
    step, nothing = core.step_function(), [None] * len(core.initial_memory(1))
    first, *memory = step(x, *nothing)
    torch.testing.assert_close(first, core.sequence(x.unsqueeze(1), None, None).squeeze(1), rtol=0, atol=1e-6)
    assert [m.shape for m in memory] == [m.shape for m in core.initial_memory(3)]
    second, *_ = step(x, *memory)
    again = core.sequence(x.unsqueeze(1), tuple(m.unsqueeze(1) for m in memory), None).squeeze(1)
    torch.testing.assert_close(second, again, rtol=0, atol=1e-6)
    assert (second - first).abs().max() > 1e-3
    assert not first.requires_grad


@each_core
def test_a_tensordict_is_stepped_and_replayed(kind):
    core = build(kind)
    memory_keys = core.in_keys[1:-1]
    start = torch.zeros(4, 7, dtype=torch.bool)
    start[:, 0] = start[2, 3] = start[1, 5] = True
    x, state, steps = torch.randn(4, 7, 5), core.initial_memory(4), []
    for t in range(7):
        # What is stored at a trial's first step is what the primers write.
        state = chosen(start[:, t], [torch.zeros_like(m) for m in state], state)
        td = TensorDict(
            {"trans": x[:, t], "is_init": start[:, t, None], **dict(zip(memory_keys, state, strict=True))}, [4]
        )
        steps.append(core(td))
        state = [td["next", key] for key in memory_keys]
    batch = torch.stack(steps, 1)
    with set_recurrent_mode(True):
        replayed = core(batch.select(*core.in_keys).clone())
    torch.testing.assert_close(replayed["features"], batch["features"], rtol=0, atol=2e-6)
    ends = torch.cat((start[:, 1:], torch.ones(4, 1, dtype=torch.bool)), 1)
    for key in memory_keys:
        torch.testing.assert_close(replayed["next", key][ends], batch["next", key][ends], rtol=0, atol=2e-6)
        assert not replayed["next", key][~ends].any()


@each_core
def test_is_init_forgets_whatever_memory_a_step_is_given(kind):
    core = build(kind)
    memory = {
        key: torch.full((2, *m.shape[1:]), 0.7)
        for key, m in zip(core.in_keys[1:-1], core.initial_memory(1), strict=True)
    }
    first = torch.tensor([[True], [False]])
    td = core(TensorDict({"trans": torch.ones(2, 5), "is_init": first, **memory}, [2]))
    features, *_ = core.step(torch.ones(1, 5), *core.initial_memory(1))
    torch.testing.assert_close(td["features"][:1], features)
    assert (td["features"][1] - td["features"][0]).abs().max() > 1e-3


@pytest.mark.parametrize(("cls", "name"), [(GRUCore, "gru"), (LSTMCore, "lstm")])
def test_hooks_on_the_network_within_are_heard_in_steps_and_sequences(cls, name):
    torch.manual_seed(0)
    core, x = cls(5, 6, 2), torch.randn(3, 4, 5)
    plain, _ = core.unroll(x, None, None)[:2]
    heard, inner = [], getattr(core, name)
    hook = inner.register_forward_hook(lambda module, args, out: heard.append(module))
    memory = core.initial_memory(3)
    for t in range(4):
        features, *memory = core.step_function()(x[:, t], *memory)
        torch.testing.assert_close(features, plain[:, t])
    assert len(heard) == 4
    torch.testing.assert_close(core.sequence(x, None, None), plain)
    assert len(heard) > 4
    hook.remove()
    # Pruning puts the weights in place by such a hook: they follow those that are learnt.
    prune.l1_unstructured(inner, "weight_ih_l0", 0.5)
    before = core.step_function()(x[:, 0], *core.initial_memory(3))[0]
    with torch.no_grad():
        inner.weight_ih_l0_orig.mul_(2)
    assert (core.step_function()(x[:, 0], *core.initial_memory(3))[0] - before).abs().max() > 1e-3


@pytest.mark.parametrize("starts", [[], [2, 4, 6], [3, 4]], ids=["first step alone", "evenly", "anywhere"])
def test_lstm_equals_torchrls(starts):
    torch.manual_seed(0)
    theirs = LSTMModule(
        5, 6, 2, in_keys=["trans", "hidden", "hidden_cell"], out_keys=["y", ("next", "hidden"), ("next", "hidden_cell")]
    )
    ours = LSTMCore(5, 6, 2)
    ours.load_state_dict(theirs.state_dict())
    is_init = torch.zeros(4, 8, 1, dtype=torch.bool)
    is_init[:, [0, *starts]] = True
    is_init[1] |= starts == [3, 4]  # this row begins anew at every step
    entries = {"trans": torch.randn(4, 8, 5), "is_init": is_init}
    entries |= {key: torch.randn(4, 8, 2, 6) for key in ("hidden", "hidden_cell")}
    with set_recurrent_mode(True):
        expected, td = theirs(TensorDict(entries, [4, 8])), ours(TensorDict(entries, [4, 8]))
    torch.testing.assert_close(td["features"], expected["y"])
    for key in ("hidden", "hidden_cell"):
        torch.testing.assert_close(td["next", key], expected["next", key])


# ------------------------------------------------------------------ in networks


def make_env(rows=3):
    return TransformedEnv(
        BernoulliBandit(3, batch_size=(rows,), seed=0),
        Compose(Trial(episodes=4), TaskSampler(uniform_means(3), seed=0), PreviousStep()),
    )


def test_primers_are_found():
    core = build("own", hidden_key=("agent", "h"))
    env = TransformedEnv(make_env(), get_primers_from_module(TensorDictSequential(core), warn=False))
    td = env.reset()
    assert (td["agent", "h"].shape, td["agent", "h_slow"].shape) == ((3, 6), (3, 2, 6))


@pytest.mark.parametrize("kind", ["own", "lstm", "two GRU layers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_collected_and_replayed_in_an_actor_and_a_critic(kind, dtype):
    env = make_env()
    torch.manual_seed(0)
    actor = RecurrentActor.from_env(env, core=CORES[kind], init_range=0.5, dtype=dtype)
    critic = RecurrentCritic.from_env(env, core=CORES[kind], init_range=0.5, dtype=dtype, extra_keys=["time_left"])
    policy = ActorCritic(actor, critic)
    names = {"own": ["", "_slow"], "lstm": ["", "_cell"], "two GRU layers": [""]}[kind]
    assert policy.hidden_keys == [f"{who}_hidden{name}" for who in ("actor", "critic") for name in names]
    (batch,) = Collector(env, policy, frames_per_batch=24, total_frames=24, auto_register_policy_transforms=True)
    assert batch["actor_hidden"].dtype == batch["state_value"].dtype == dtype
    with set_recurrent_mode(True):
        again = batch.select(*policy.in_keys).clone()
        log_prob = actor.get_dist(again).log_prob(batch["action"])
        value = critic(again)["state_value"]
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(log_prob, batch["action_log_prob"], rtol=0, atol=tolerance)
    torch.testing.assert_close(value, batch["state_value"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rollout", ["tensors", "tensordicts"])
def test_a_memory_of_whole_numbers_and_flags_stays_that(rollout, dtype):
    env = make_env()
    torch.manual_seed(0)
    actor = RecurrentActor.from_env(env, core=Ring, init_range=0.5, dtype=dtype)
    frames = {"frames_per_batch": 24, "total_frames": 24}
    (batch,) = TrialCollector(env, actor, rollout=rollout, **frames)
    assert [batch[key].dtype for key in hidden_keys(actor)] == [torch.int64, torch.bool, dtype]
    with set_recurrent_mode(True):
        log_prob = actor.get_dist(batch.select(*actor.in_keys)).log_prob(batch["action"])
    torch.testing.assert_close(log_prob, batch["action_log_prob"], rtol=0, atol=1e-6)

    agent = AdaptiveAgent.from_policy(actor, env)
    agent.new_trial(3)
    for number in range(1, 4):
        agent.act()
        agent.observe(torch.zeros(3), True)
        assert agent.memory[1].tolist() == [number % 3] * 3


def test_torchrls_lstm_module_serves_as_a_core():
    keys = {"in_keys": ["trans", "h", "c"], "out_keys": ["f", ("next", "h"), ("next", "c")]}
    actor = RecurrentActor(5, CategoricalActions(3), core=LSTMModule(5, 7, **keys))
    assert (actor.hidden_key, actor.features_key, actor.hidden_size) == ("h", "f", 7)
    td = actor(TensorDict({"trans": torch.zeros(2, 5), "is_init": torch.ones(2, 1, dtype=torch.bool)}, [2]))
    assert td["logits"].shape == (2, 3)
    with pytest.raises(ValueError, match="reads 'x', but its input is 'trans'"):
        RecurrentActor(5, CategoricalActions(3), core=LSTMModule(5, 7, **{**keys, "in_keys": ["x", "h", "c"]}))


def make_parallel_env():
    return make_env(rows=2)


def test_an_lstm_in_worker_processes():
    env = ParallelEnv(2, make_parallel_env, mp_start_method="fork")
    try:
        policy = RecurrentActor.from_env(env, core=LSTMCore)
        env = TransformedEnv(env, Compose(InitTracker(), get_primers_from_module(policy, warn=False)))
        td = env.rollout(3, policy)
        assert td["next", "actor_hidden_cell"].shape == (2, 2, 3, 1, 64)
    finally:
        env.close()


def test_own_core_under_vmap_and_compile():
    core, x = build("own"), torch.randn(4, 7, 5)
    expected = core.sequence(x, None, None)
    torch.testing.assert_close(torch.compile(core.sequence, backend="eager")(x, None, None), expected)
    rows = torch.func.vmap(lambda row: core.sequence(row.unsqueeze(0), None, None).squeeze(0))(x)
    torch.testing.assert_close(rows, expected)


@pytest.mark.parametrize("kind", [GRUCore, LSTMCore])
@pytest.mark.parametrize("is_sequence", [False, True])
def test_ensembles_and_rows_under_vmap(is_sequence, kind):
    torch.manual_seed(0)
    cores = [kind(5, 7, 2) for _ in range(3)]
    batch = [4, 6] if is_sequence else [4]
    data = {key: torch.randn(*batch, 2, 7) for key in cores[0].in_keys[1:-1]}
    data = TensorDict({**data, "trans": torch.randn(*batch, 5), "is_init": torch.rand(*batch, 1) < 0.3}, batch)

    def outputs(parameters, data):
        out = torch.func.functional_call(cores[0], parameters, (data.copy(),))
        return [out[key] for key in cores[0].out_keys]

    with set_recurrent_mode(is_sequence):
        parameters, _ = torch.func.stack_module_state(cores)
        found = torch.func.vmap(outputs, (0, None))(parameters, data)
        each = [outputs(dict(core.named_parameters()), data) for core in cores]
        for one, other in zip(found, zip(*each, strict=True), strict=True):
            torch.testing.assert_close(one, torch.stack(other))
        found[0].square().sum().backward()
        sum(out[0].square().sum() for out in each).backward()
        for name, parameter in parameters.items():
            gradients = [core.get_parameter(name).grad for core in cores]
            torch.testing.assert_close(parameter.grad, torch.stack(gradients), rtol=1e-4, atol=1e-5)
        by_rows = torch.func.vmap(lambda row: outputs({}, row.unsqueeze(0)))(data)
        for one, other in zip(by_rows, each[0], strict=True):
            torch.testing.assert_close(one.squeeze(1), other)


def test_rows_under_vmap_that_share_a_first_memory():
    """Gradients of each sample, by steps from one `initial_memory`."""

    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.core = core

        def forward(self, row):
            memory, out = core.initial_memory(1), 0
            for t in range(6):
                features, *memory = core.step(row[t : t + 1], *memory)
                out = out + features.square().sum()
            return out

    core, x = GRUCore(5, 7, 2), torch.randn(4, 6, 5)
    steps = Steps()

    def total(parameters, row):
        return torch.func.functional_call(steps, {f"core.{name}": p for name, p in parameters.items()}, (row,))

    parameters = dict(core.named_parameters())
    found = torch.func.vmap(torch.func.grad(total), (None, 0))(parameters, x)
    for number, row in enumerate(x):
        expected = torch.autograd.grad(total(parameters, row), list(parameters.values()))
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found[name][number], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("has_grad", [False, True])
@pytest.mark.parametrize("make", [GRUCore, partial(GRUCore, num_layers=2), LSTMCore])
def test_forward_mode(make, has_grad):
    """A derivative along a tangent, as by reverse mode."""
    torch.manual_seed(0)
    core, head = make(5, 7).double(), Head(7, 3, init_range=1.0, num_cells=[4]).double()
    x, tangent = torch.randn(2, 4, 6, 5, dtype=torch.float64)

    def run(x):
        return head(core.sequence(x, None, None))

    with torch.set_grad_enabled(has_grad), forward_ad.dual_level():
        found = forward_ad.unpack_dual(run(forward_ad.make_dual(x, tangent))).tangent
    _, expected = torch.autograd.functional.jvp(run, x, tangent)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("is_sequence", [False, True])
@pytest.mark.parametrize("make", [GRUCore, LSTMCore])
def test_steps_and_sequences_are_exported(make, is_sequence):
    torch.manual_seed(0)
    critic = RecurrentCritic(5, core=lambda size: make(size, 7, 2), init_range=1.0)
    batch = [4, 6] if is_sequence else [4]

    def entries():
        memory = {key: torch.randn(*batch, 2, 7) for key in hidden_keys(critic)}
        return {"trans": torch.randn(*batch, 5), **memory, "is_init": torch.rand(*batch, 1) < 0.3}

    with set_recurrent_mode(is_sequence):
        step, others = torch.export.export(critic, (), entries(), strict=False).module(), entries()
        for one, other in zip(step(**others), critic(**others), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("is_sequence", [False, True])
@pytest.mark.parametrize("make", [GRUCore, LSTMCore])
def test_cores_are_exported_for_any_number_of_rows(make, is_sequence):
    core = make(5, 7, 2)

    def entries(rows):
        batch = [rows, 6] if is_sequence else [rows]
        memory = [torch.randn(*batch, 2, 7) for _ in core.in_keys[1:-1]]
        return torch.randn(*batch, 5), torch.rand(*batch, 1) < 0.3, *memory

    class Exported(nn.Module):
        def __init__(self):
            super().__init__()
            self.core = core

        def forward(self, x, is_init, *memory):
            data = dict(zip(core.in_keys, (x, *memory, is_init), strict=True))
            out = self.core(TensorDict(data))
            return tuple(out[key] for key in core.out_keys)

    with set_recurrent_mode(is_sequence):
        some = entries(4)
        rows = {0: torch.export.Dim("rows")}
        shapes = {"x": rows, "is_init": rows, "memory": (rows,) * (len(some) - 2)}
        graph = torch.export.export(Exported(), some, dynamic_shapes=shapes).module()
        for others in (entries(1), entries(9)):
            for one, other in zip(graph(*others), Exported()(*others), strict=True):
                torch.testing.assert_close(one, other)


def test_a_core_of_the_networks_own_input_and_nothing_ignored():
    with pytest.raises(ValueError, match="hidden_size and num_layers are those of the default core"):
        RecurrentActor(5, CategoricalActions(3), core=LSTMCore, hidden_size=8)
    with pytest.raises(ValueError, match="without memory cannot remember"):
        RecurrentCore(3, {})
    with pytest.raises(NotImplementedError, match=r"RecurrentCore must define step\(x, \*memory\)"):
        RecurrentCore(3, {"h": (2,)}).sequence(torch.zeros(1, 1, 1), None, None)


# --------------------------------------------------- as TorchRL's modules are called


@each_core
@pytest.mark.parametrize("size", [5, 1])
def test_by_keyword_and_without_a_batch_size(kind, size):
    torch.manual_seed(0)
    core = CORES[kind](size)
    x, is_init = torch.randn(8, size), torch.zeros(8, 1, dtype=torch.bool)
    memory = dict(zip(core.in_keys[1:-1], (torch.rand(8, *m.shape[1:]) for m in core.initial_memory(1)), strict=True))
    td = core(TensorDict({"trans": x, "is_init": is_init, **memory}, [8]))
    outputs = core(trans=x, is_init=is_init, **memory)
    assert torch.equal(outputs[0], td["features"])
    without = core(TensorDict({"trans": x, "is_init": is_init, **memory}, []))
    assert torch.equal(without["features"], td["features"])
    assert without["next", core.in_keys[1]].shape == td["next", core.in_keys[1]].shape
    alone = core(TensorDict({"trans": x[0], "is_init": is_init[0], **{k: m[0] for k, m in memory.items()}}, []))
    torch.testing.assert_close(alone["features"], td["features"][0])


def test_actor_by_keyword():
    actor = GRUCategoricalActor(5, 3, hidden_size=4)
    outputs = actor(
        trans=torch.zeros(8, 5), is_init=torch.ones(8, 1, dtype=torch.bool), actor_hidden=torch.zeros(8, 1, 4)
    )
    named = dict(zip(actor.out_keys, outputs, strict=True))
    assert named["action"].shape == named["action_log_prob"].shape == (8,)


@each_core
def test_what_is_missing_or_does_not_fit_is_named(kind):
    core = build(kind)
    entries = {"trans": torch.zeros(2, 5), "is_init": torch.zeros(2, 1, dtype=torch.bool)}
    for missing in entries:
        with pytest.raises(KeyError, match=f"'{missing}'"):
            core(TensorDict({key: value for key, value in entries.items() if key != missing}, [2]))
    with pytest.raises(ValueError, match="'trans' has 4 entries.*input_size=5"):
        core(TensorDict({**entries, "trans": torch.zeros(2, 4)}, [2]))
    with pytest.raises(RuntimeError, match=r"shape '\[2\]' is invalid for input of size 6"):
        core(TensorDict({**entries, "is_init": torch.zeros(2, 3, dtype=torch.bool)}, [2]))
    with pytest.raises(ValueError, match=r"'hidden' has shape \(2, 9\).*get_primers_from_module"):
        core(TensorDict({**entries, "hidden": torch.zeros(2, 9)}, [2]))
    if len(core.in_keys) > 3:
        shape = core.initial_memory(2)[0].shape
        with pytest.raises(KeyError, match="memory.*is missing"):
            core(TensorDict({**entries, "hidden": torch.zeros(shape)}, [2]))


SLIPS = {
    "one": (lambda h: h, TypeError, "2 tensors, and gave Tensor"),
    "a tuple": (lambda h: (h, (h,)), TypeError, "2 tensors, and gave Tensor, tuple"),
    "a dict": (lambda h: (h, {"h": h}), TypeError, "2 tensors, and gave Tensor, dict"),
    "nothing": (lambda h: None, TypeError, "2 tensors, and gave NoneType"),
    "features": (lambda h: (h[:, :5], h), ValueError, r"'features' \(2, 5\), and the core was built.*\(2, 8\)"),
    "memory": (lambda h: (h, h[:, :4]), ValueError, r"'h' \(2, 4\), and the core was built.*\(2, 8\)"),
}


@pytest.mark.parametrize("name", SLIPS)
def test_what_a_step_gives_is_looked_at(name):
    slip, error, message = SLIPS[name]

    class Slips(RecurrentCore):
        def __init__(self):
            super().__init__(8, {"h": (8,)})

        def step(self, x, h):
            return slip(h + x)

    core, x = Slips(), torch.zeros(2, 3, 8)
    entries = TensorDict({"trans": x[:, 0], "is_init": torch.ones(2, 1, dtype=torch.bool)}, [2])
    calls = [lambda: core.step_function()(x[:, 0], None), lambda: core.sequence(x, None, None), lambda: core(entries)]
    for call in calls:
        with pytest.raises(error, match=f"Slips.step.*{message}"):
            call()


@pytest.mark.parametrize("memory", [{"h": 8}, [("h", (8,))]])
def test_memory_is_named_shapes(memory):
    assert RecurrentCore(8, {"hidden": np.array([8])}).memory_shapes == {"hidden": (8,)}
    with pytest.raises((TypeError, AttributeError)):
        RecurrentCore(8, memory)


def test_one_memory_key_for_both_is_refused():
    actor, critic = GRUCategoricalActor(5, 3, hidden_key="h"), GRUValueHead(5, hidden_key="h")
    with pytest.raises(ValueError, match=r"under \['h'\].*hidden_key="):
        ActorCritic(actor, critic)


def test_one_core_for_both_is_refused():
    core = LSTMCore(5, 6)
    actor, critic = RecurrentActor(5, CategoricalActions(3), core=core), RecurrentCritic(5, core=core)
    for put_together in (ActorCritic, RL2PPOLoss):
        with pytest.raises(ValueError, match=r"one LSTMCore stands in actor and critic.*'critic_hidden'"):
            put_together(actor, critic)


# ------------------------------------------------------------ doors to the kernels


def weights(dtype=torch.float32, units=8, inputs=3):
    torch.manual_seed(0)
    gru = nn.GRU(inputs, units, batch_first=True, dtype=dtype)
    return gru, list(gru.parameters())


STRIDES = {
    "every second column": lambda: torch.randn(4, 6, 6)[..., ::2],
    "expanded columns": lambda: torch.randn(4, 6, 1).expand(4, 6, 3),
    "expanded rows": lambda: torch.randn(1, 6, 3).expand(4, 6, 3),
    "transposed": lambda: torch.randn(3, 6, 4).transpose(0, 2),
}


@pytest.mark.parametrize("strides", STRIDES)
def test_inputs_of_any_strides_give_the_right_numbers(strides):
    gru, parameters = weights()
    x, hidden = STRIDES[strides](), torch.randn(6, 4, 16).transpose(0, 1)[..., ::2]
    expected = gru(x, hidden[:, 0].unsqueeze(0).contiguous())[0]
    torch.testing.assert_close(gru_sequence(x, hidden, None, *parameters), expected)
    with torch.no_grad():
        torch.testing.assert_close(gru_sequence(x, hidden, None, *parameters), expected)
    core = GRUCore(3, 8)
    core.gru.load_state_dict(gru.state_dict())
    features, _ = core.step_function()(x[:, 0], hidden[:, :1])
    torch.testing.assert_close(features, expected[:, 0])
    saved_y, _ = sequence_forward(x, hidden, None, parameters, saves=True)
    torch.testing.assert_close(saved_y, expected)


@pytest.mark.parametrize("given", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_of_another_dtype_are_converted(given, dtype):
    gru, parameters = weights(dtype)
    x, hidden = torch.randn(4, 6, 3).to(given), torch.randn(4, 6, 8).to(given)
    expected = gru(x.to(dtype), hidden[:, 0].unsqueeze(0).to(dtype))[0]
    torch.testing.assert_close(gru_sequence(x, hidden, None, *parameters), expected)
    core = GRUCore(3, 8, dtype=dtype)
    core.gru.load_state_dict(gru.state_dict())
    torch.testing.assert_close(core.step_function()(x[:, 0], hidden[:, :1])[0], expected[:, 0])
    td = {"trans": x, "hidden": hidden.unsqueeze(2), "is_init": torch.zeros(4, 6, 1, dtype=torch.bool)}
    with set_recurrent_mode(True):
        torch.testing.assert_close(core(TensorDict(td, [4, 6]))["features"], expected)


@pytest.mark.parametrize("inputs", [1, 3, 16, 37, 70])
def test_the_input_has_a_gradient(inputs):
    gru, parameters = weights(torch.float64, inputs=inputs)
    x = torch.randn(3, 7, inputs, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(gru(x)[0].square().sum(), x)[0]
    y, saved = sequence_forward(x.detach(), None, None, parameters, saves=True)
    d_x, *_ = sequence_backward(2 * y, None, parameters, saved, by_x=True)
    torch.testing.assert_close(d_x, expected)


MISTAKES = {
    "x too narrow": (lambda w: gru_sequence(torch.zeros(4, 6, 2), None, None, *w), r"x has shape.*\[N, T, 3\]"),
    "x of two dimensions": (lambda w: gru_sequence(torch.zeros(4, 3), None, None, *w), r"x has shape \(4, 3\)"),
    "no steps": (lambda w: gru_sequence(torch.zeros(4, 0, 3), None, None, *w), "T at least 1"),
    "memory of one step": (lambda w: gru_sequence(X, torch.zeros(4, 8), None, *w), r"hidden has shape \(4, 8\)"),
    "resets of a column": (lambda w: gru_sequence(X, None, torch.zeros(4, 6, 1), *w), "is_init has shape"),
    "recurrent weights of one row": (lambda w: gru_sequence(X, None, None, w[0], w[1][0]), "w_hh has shape"),
    "one bias": (lambda w: gru_sequence(X, None, None, *w[:3]), "two biases, b_ih and b_hh, or none"),
    "a bias too short": (lambda w: gru_sequence(X, None, None, *w[:3], w[3][:7]), r"b_hh has shape \(7,\)"),
    "weights of two sizes": (lambda w: gru_sequence(X, None, None, w[0][:12], *w[1:]), r"w_ih has shape \(12, 3\)"),
    "weights on meta": (lambda w: gru_sequence(X, None, None, *(p.to("meta") for p in w)), "x is on cpu.*on meta"),
    "one weight on meta": (lambda w: gru_sequence(X, None, None, w[0].to("meta"), *w[1:]), "w_ih is on meta"),
    "a part's resets of two columns": (lambda w: part(w, "is_init", torch.ones(4, 6, 2)), "is_init has shape"),
    "a part's resets on meta": (lambda w: part(w, "is_init", torch.ones(4, 6, 1).to("meta")), "is_init .* on cpu"),
    "a part's memory on meta": (lambda w: part(w, "hidden", torch.zeros(4, 6, 1, 8).to("meta")), "hidden is on meta"),
    "a part's memory of one step": (lambda w: part(w, "hidden", torch.zeros(4, 1, 1, 8)), "hidden has shape"),
    "slopes of another size": (lambda w: slopes(w, torch.zeros(4, 6, 7)), "dy has shape"),
    "a step too narrow": (lambda w: GRUCore(3, 8).step_function()(torch.zeros(4, 2), None), r"x has shape \(4, 2\)"),
    "memory of three rows": (
        lambda w: GRUCore(3, 8).step_function()(torch.zeros(4, 3), torch.zeros(3, 1, 8)),
        r"memory has shape \(3, 1, 8\)",
    ),
}
X = torch.zeros(4, 6, 3)


def slopes(w, dy):
    _, saved = sequence_forward(X, None, None, w, saves=True)
    sequence_backward(dy, None, w, saved, by_x=True)


def part(w, key, entry):
    core = GRUCore(3, 8)
    state = {"trans": X, "hidden": torch.zeros(4, 6, 1, 8), "is_init": torch.zeros(4, 6, 1, dtype=torch.bool)}
    core.gradient_part().forward({**state, key: entry})


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_a_kernel_cannot_read_is_refused(mistake):
    make, message = MISTAKES[mistake]
    with pytest.raises(ValueError, match=message):
        make(weights()[1])


def test_weights_of_two_dtypes_are_refused():
    parameters = weights()[1]
    with pytest.raises(TypeError, match="b_hh is torch.float64"):
        gru_sequence(X, None, None, *parameters[:3], parameters[3].double())


def test_no_rows_are_no_matter():
    assert gru_sequence(torch.zeros(0, 6, 3), None, None, *weights()[1]).shape == (0, 6, 8)


@pytest.mark.parametrize("kind", [GRUCore, LSTMCore])
def test_no_rows_at_all(kind):
    core = kind(5, 8)
    data = {key: torch.zeros(0, 10, 1, 8) for key in core.in_keys[1:-1]}
    data |= {"trans": torch.zeros(0, 10, 5), "is_init": torch.zeros(0, 10, 1, dtype=torch.bool)}
    with set_recurrent_mode(True):
        out = core(TensorDict(data, [0, 10]))
    assert out[core.out_keys[0]].shape == (0, 10, 8)
