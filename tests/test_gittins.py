"""Gittins indices: published values, an independent calculation, and the tables kept on disk."""

import numpy as np
import pytest
import torch

from rl2_torchrl.baselines import gittins, gittins_agent, gittins_indices


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, and nothing in memory before and after."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gittins, "TABLE_PULLS", 5)
    gittins._stored_table.cache_clear()
    yield tmp_path / "rl2_torchrl"
    gittins._stored_table.cache_clear()


def index_by_bisection(successes, failures, gamma, steps):
    """The rate that makes leaving the arm as good as pulling it, from a tree of one state's own, in discounted sums."""
    low, high = 0.0, 1.0
    while high - low > 1e-5:
        rate = (low + high) / 2
        leave = rate / (1 - gamma)
        for pulls in reversed(range(steps + 1)):
            mean = (successes + 1 + np.arange(pulls + 1)) / (successes + failures + pulls + 2)
            if pulls == steps:
                value = np.maximum(leave, mean / (1 - gamma))
            else:
                pull = mean * (1 + gamma * value[1:]) + (1 - mean) * gamma * value[:-1]
                value = np.maximum(leave, pull)
        low, high = (rate, high) if pull[0] > leave else (low, rate)
    return low


@pytest.mark.parametrize(
    ("gamma", "expected"),
    # Gittins, Glazebrook and Weber 2011, tables of chapter 8; [s, f] is their (alpha, beta) = (s + 1, f + 1).
    [
        (0.9, {(0, 0): 0.7029, (0, 1): 0.5001, (1, 0): 0.8001, (0, 2): 0.3796, (1, 1): 0.6346, (2, 0): 0.8452}),
        (0.99, {(0, 0): 0.8699, (0, 1): 0.7005, (1, 0): 0.9102}),
    ],
)
def test_published_indices(gamma, expected):
    indices = gittins_indices(3, gamma)
    assert {state: round(indices[state].item(), 4) for state in expected} == expected


@pytest.mark.parametrize(
    ("gamma", "steps", "states"),
    [
        (0.5, 60, [(0, 0), (0, 3), (3, 0), (7, 2)]),
        (0.9, 200, [(0, 0), (4, 1), (1, 4), (30, 29), (59, 0), (0, 59)]),
        (0.99, 500, [(0, 0), (12, 7), (50, 9)]),
        # Here the band of the induction is far narrower than all counts.
        (0.999, 1200, [(3, 5)]),
    ],
)
def test_indices_by_an_independent_calculation(gamma, steps, states):
    indices = gittins_indices(60, gamma)
    for state in states:
        assert indices[state].item() == pytest.approx(index_by_bisection(*state, gamma, steps), abs=3e-4), state


def test_without_a_future_the_index_is_the_mean():
    indices = gittins_indices(4, gamma=0.0)
    # (s + 1) / (s + f + 2)
    expected = [[1 / 2, 1 / 3, 1 / 4, 1 / 5], [2 / 3, 1 / 2, 2 / 5], [3 / 4, 3 / 5], [4 / 5]]
    for row, means in zip(indices, expected, strict=True):
        assert row[: len(means)].tolist() == pytest.approx(means, abs=1e-12)
        assert row[len(means) :].isnan().all()


def test_the_index_is_the_mean_and_something_for_what_may_be_learnt():
    indices = gittins_indices(120, 0.99)
    successes, failures = torch.meshgrid(torch.arange(120.0), torch.arange(120.0), indexing="ij")
    bonus = indices - (successes + 1) / (successes + failures + 2)
    possible = ~indices.isnan()
    assert torch.equal(possible, successes + failures < 120)
    assert bonus[possible].min() > 0
    # More successes raise it, more failures lower it; at a mean of one half the bonus falls with the counts.
    assert (indices.diff(dim=0)[possible[1:]] > 0).all()
    assert (indices.diff(dim=1)[possible[:, 1:]] < 0).all()
    assert (bonus.diagonal()[:60].diff() < 0).all()
    assert (gittins_indices(10, 0.995) - indices[:10, :10]).nan_to_num(1).min() > 0


def test_few_pulls_have_the_indices_of_many():
    # Only truncation differs: far away at gamma = 0.99.
    few, many = gittins_indices(5, 0.99), gittins_indices(60, 0.99)
    assert (few - many[:5, :5]).nan_to_num(0).abs().max() < 1e-6


def test_agent_by_hand():
    # Equal indices: arm 0. A failure lowers its index from 0.70 to 0.50: the next arm. A success raises it to 0.80: stays.
    means = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    expected = torch.tensor([[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0]])
    assert torch.equal(gittins_agent(means, 4, gamma=0.9), expected)


def test_agent_pulls_the_arm_of_the_highest_index(empty_cache, monkeypatch):
    # An index that is highest after one failure, then untouched: a failing arm is pulled twice, then left for an untouched one.
    table = torch.zeros(5, 5, dtype=torch.float64)
    table[0, 1], table[0, 0] = 2.0, 1.0
    monkeypatch.setattr(gittins, "gittins_indices", lambda num_pulls, gamma: table)
    means = torch.tensor([[0.0, 1.0, 1.0]])
    # Arm 0 fails, fails; arm 1 succeeds (index 0), arm 2 succeeds; all at 0: arm 0.
    assert gittins_agent(means, 5, gamma=0.9).tolist() == [[0.0, 0.0, 1.0, 1.0, 0.0]]


def test_tables_are_computed_once(empty_cache, monkeypatch):
    means = torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
    first = gittins_agent(means, 5, torch.Generator().manual_seed(1), gamma=0.9)
    assert len(list(empty_cache.iterdir())) == 1

    def fail(num_pulls, gamma):
        raise AssertionError("computed again")

    monkeypatch.setattr(gittins, "gittins_indices", fail)
    again = gittins_agent(means, 5, torch.Generator().manual_seed(1), gamma=0.9)
    gittins._stored_table.cache_clear()  # as in another program
    from_disk = gittins_agent(means, 5, torch.Generator().manual_seed(1), gamma=0.9)
    assert torch.equal(again, first)
    assert torch.equal(from_disk, first)
    # Another discount, or more pulls, are other tables.
    with pytest.raises(AssertionError, match="computed again"):
        gittins_agent(means, 5, gamma=0.8)
    with pytest.raises(AssertionError, match="computed again"):
        gittins_agent(means, 6, gamma=0.9)


def test_without_a_cache_folder_the_agent_plays_on(empty_cache, monkeypatch):
    def none_will_do():
        raise PermissionError("nowhere")

    messages = []
    monkeypatch.setattr(gittins, "cache_folder", none_will_do)
    monkeypatch.setattr(gittins.torchrl_logger, "warning", messages.append)
    assert gittins_agent(torch.tensor([[0.0, 1.0]]), 3, gamma=0.9).tolist() == [[0.0, 1.0, 1.0]]
    assert "nowhere" in messages[0]


@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_damaged_table_is_made_anew(empty_cache, share):
    means = torch.tensor([[0.0, 1.0]])
    expected = gittins_agent(means, 3, gamma=0.5)
    [table] = empty_cache.iterdir()
    whole = table.read_bytes()
    table.write_bytes(whole[: int(share * len(whole))])
    gittins._stored_table.cache_clear()
    assert torch.equal(gittins_agent(means, 3, gamma=0.5), expected)
    assert len(table.read_bytes()) == len(whole)


@pytest.mark.parametrize("gamma", [-0.1, 1.0, 0.99999, float("nan")])
def test_bad_gamma(gamma):
    for call in (lambda: gittins_indices(3, gamma), lambda: gittins_agent(torch.rand(2, 2), 3, gamma=gamma)):
        with pytest.raises(ValueError, match=r"gamma=.* is not between 0 and 0.9999.*tune\(gittins_agent"):
            call()


def test_bad_number_of_pulls():
    with pytest.raises(ValueError, match=r"num_pulls=0 leaves no pull.*Pass num_pulls >= 1"):
        gittins_indices(0, 0.9)
