"""The benchmark of users' parts at tiny sizes: its arithmetic, what it promises to write, never how fast anything is."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torchrl.envs import Compose, TransformedEnv
from torchrl.envs.utils import check_env_specs

from recipes import extension_benchmark, extension_variants
from recipes.benchmark import WORKLOADS
from recipes.extension_variants import VARIANTS, Arithmetic, Layer, feed_forward
from recipes.extensions import OneHotBandit, PlainSeeker, Seeker
from rl2_torchrl import PreviousStep, TaskSampler, Trial
from rl2_torchrl.envs import BernoulliBandit, PointRobot, goals_on_half_circle

ROOT = Path(__file__).parent.parent
TINY = replace(WORKLOADS["W3"], trials=8, units=4, epochs=2)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(extension_benchmark, "ROUND_SECONDS", 0.0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


class Lasts:
    """Something that takes the given seconds, one after the other."""

    def __init__(self, *seconds):
        self.seconds, self.calls = seconds, 0

    def __call__(self):
        self.calls += 1
        return self.seconds[(self.calls - 1) % len(self.seconds)]


# ---- The arithmetic of a tax.


def test_a_tax_is_taken_round_by_round():
    # Two rounds warm up, then: 3 / (1 + 1), 6 / (2 + 2), 4 / (1 + 0).
    base, variant = Lasts(9, 9, 1, 2, 1), Lasts(9, 9, 3, 6, 4)
    arithmetic = Lasts(9, 9, 1, 2, 0)
    assert extension_benchmark.in_turns(base, variant, arithmetic, 3) == [1.5, 1.5, 4.0]


def test_short_iterations_are_repeated(monkeypatch):
    monkeypatch.setattr(extension_benchmark, "ROUND_SECONDS", 0.3)
    base, variant = Lasts(0.1), Lasts(0.2)
    assert extension_benchmark.in_turns(base, variant, Lasts(0.0), 5) == pytest.approx([2.0] * 5)
    assert base.calls == variant.calls == 2 + 5 * 3


def test_what_a_layer_is_asked_for():
    steps, sequences = [], []
    linear = nn.Linear(3, 2)

    def sequence(x):
        sequences.append(tuple(x.shape))
        return linear(x)

    workload = replace(TINY, trials=10, pulls=7, minibatches=4, epochs=2)
    Layer(sequence, lambda x: steps.append(tuple(x.shape)), 3).seconds(workload)
    assert steps == [(10, 3)] * 7  # a step for each of a batch's
    assert sequences == [(3, 7, 3)] * 8  # 4 minibatches of at most 3 trials, twice
    assert linear.weight.grad is not None
    # A loss is no part of the collection.
    assert Layer(sequence, None, 3).seconds(workload) > 0
    assert len(steps) == 7


def test_what_is_replaced_is_taken_off(monkeypatch):
    monkeypatch.setattr(Layer, "seconds", lambda layer, workload: float(layer.input_size))
    two, five = feed_forward(nn.Identity(), 2), feed_forward(nn.Identity(), 5)
    assert Arithmetic(TINY, [five, two], [two])() == 5.0
    assert Arithmetic(TINY, [two], [five])() == 0.0  # no variant is thanked for computing less
    assert Arithmetic(TINY)() == 0.0


# ---- The variants.


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_runs_and_says_which_way(name):
    variant = VARIANTS[name]
    own = variant.build(TINY)
    assert own() > 0
    ways = own.ways()
    assert set(ways) <= {"collector", "update"}
    assert all(backend for backend, _ in ways.values())
    own.close()
    if variant.base is not None:
        other = variant.base(TINY)
        assert other() > 0
        other.close()
    assert variant.arithmetic(TINY)() >= 0


def test_variants_are_those_asked_for():
    bounds = {name: variant.bound for name, variant in VARIANTS.items()}
    assert bounds == {
        "extra_loss": 1.15,
        "loss_subclass": 1.4,
        "tanh": 1.15,
        "one_hot": 1.1,
        "two_layers": 1.3,
        "lstm": 1.3,
        "mlp_encoder": 1.3,
        "user_module": 1.3,
        "user_tensor_env": 1.2,
        "torchrl_env": 1 / 3,
    }
    assert set(bounds) <= set(vars(extension_variants))


# ---- Users' envs are those that they are compared with.


def play(env, task, actions):
    """Rewards and ends ``[*B, T]`` of the first episode."""
    td = env.reset(env.full_state_spec.zero().set("task", task))
    steps = []
    for action in actions:
        stepped = env.step(td.set("action", action).set("task", task))["next"]
        steps.append(torch.cat((stepped["reward"], stepped["done"].float()), -1))
        td = stepped.exclude("reward", "done", "terminated", "truncated")
    return torch.stack(steps, -1)


# Moves of 0.9 * goal, 0.2 of it a step. A goal at distance 1: 1 - 0.18 t <= 0.2 from t = 5 on; at 0.3: 0.3 - 0.054 t from 2 on;
# who does not move is sent home after 25 steps.
@pytest.mark.parametrize(
    ("goal", "speed", "steps"), [((0.6, 0.8), 0.9, 5), ((0.0, 0.3), 0.9, 2), ((0.6, 0.8), 0.0, 25)]
)
def test_seekers_move_as_the_native_env(goal, speed, steps):
    task = torch.tensor([goal])
    actions = [speed * task] * steps
    played = [
        play(env, task, actions) for env in (PointRobot(batch_size=(1,)), Seeker(batch_size=(1,)), PlainSeeker((1,)))
    ]
    for ours in played:
        assert ours[0, 1].tolist() == [0.0] * (steps - 1) + [1.0]
        torch.testing.assert_close(ours, played[0], rtol=0, atol=1e-6)


def test_the_plain_env_keeps_torchrls_rules():
    trial = Compose(Trial(steps=30), TaskSampler(goals_on_half_circle(), seed=0), PreviousStep(["observation"]))
    check_env_specs(TransformedEnv(PlainSeeker((2,)), trial))


def test_one_hot_bandits_pay_as_the_native_ones():
    arms = torch.tensor([0, 2, 1])
    task = torch.rand(3, 3, generator=torch.Generator().manual_seed(1))
    native = play(BernoulliBandit(3, batch_size=(3,), seed=0), task, [arms] * 20)
    one_hot = nn.functional.one_hot(arms, 3)
    assert torch.equal(play(OneHotBandit(3, batch_size=(3,), seed=0), task, [one_hot] * 20), native)


# ---- The command.


def test_json_holds_taxes_backend_and_reason(tmp_path, capsys):
    file = tmp_path / "tax.json"
    sizes = {"trials": 8, "units": 4, "threads": 1}
    options = {"variants": ("tanh", "user_tensor_env"), "workloads": ("W2", "W3"), "json": file}
    extension_benchmark.main(**options, **sizes)
    stored = json.loads(file.read_text())
    assert set(stored) == {"tanh", "user_tensor_env"}
    for name, row in stored.items():
        assert {"tax_W2", "tax_W3", "backend", "reason", "bound", "ratios"} == set(row)
        assert row["bound"] == VARIANTS[name].bound
        for workload in ("W2", "W3"):
            assert len(row["ratios"][workload]) == 5
            assert row[f"tax_{workload}"] == sorted(row["ratios"][workload])[2]
    shown = capsys.readouterr().out
    assert "1.15" in shown
    assert "PointRobot" in shown


def test_another_checkout_is_the_base(tmp_path):
    base = extension_benchmark.OtherCheckout(ROOT, TINY)
    start = time.perf_counter()
    seconds = base()
    assert 0 < seconds < time.perf_counter() - start
    base.close()


def test_a_checkout_that_has_no_base_says_so(tmp_path):
    base = extension_benchmark.OtherCheckout(tmp_path, TINY)
    with pytest.raises(RuntimeError, match=r"base's process in .* has ended"):
        base()
    base.close()


def test_backends_that_differ_are_named_by_workload():
    same = {"W1": {"update": ("parts", None)}, "W2": {"update": ("parts", "why")}}
    assert extension_benchmark._in_words(same, 0) == "update: parts"
    assert extension_benchmark._in_words(same, 1) == "W1  | W2 update: why"


@pytest.mark.parametrize(
    ("bad", "message"),
    [({"rounds": 4}, "rounds=4"), ({"variants": ("tan",)}, r"variants=\['tan'\]: there are extra_loss")],
)
def test_bad_arguments(bad, message):
    with pytest.raises(ValueError, match=message):
        extension_benchmark.main(**bad)
