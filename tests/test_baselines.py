from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

from rl2_torchrl.baselines import (
    bandits,
    bayes_optimal,
    bayes_optimal_return,
    epsilon_greedy,
    gittins_agent,
    greedy,
    optimistic_thompson_sampling,
    random_agent,
    thompson,
    thompson_sampling,
    tune,
    ucb1,
)

AGENTS = [
    random_agent,
    greedy,
    epsilon_greedy,
    ucb1,
    thompson_sampling,
    optimistic_thompson_sampling,
    gittins_agent,
    bayes_optimal,
]


def tune_ucb1(means, num_pulls, generator=None):
    return tune(ucb1, means, num_pulls, generator)["exploration"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def mean_and_se(rewards):
    totals = rewards.double().sum(-1)
    return totals.mean().item(), totals.std().item() / totals.numel() ** 0.5


# ---- Bayes optimum by hand. The posterior mean after s successes, f failures: (s+1)/(s+f+2).


@pytest.mark.parametrize(
    ("num_arms", "num_pulls", "expected"),
    [
        # One arm: nothing to choose, half a reward a pull.
        (1, 1, 0.5),
        (1, 7, 3.5),
        # One pull: nothing learnt before it.
        (9, 1, 0.5),
        # Two pulls: success (1/2) -> the same arm, 2/3; failure -> the other, 1/2 (same: 1/3).
        # 1/2 + 1/2 * 2/3 + 1/2 * 1/2 = 13/12.
        (2, 2, 13 / 12),
        # Three pulls of two arms.
        #   After a success: the same arm, 2/3 * (1 + 3/4) + 1/3 * max(2/4, 1/2) = 4/3
        #     (the other: 1/2 * (1 + 2/3) + 1/2 * 2/3 = 7/6).
        #   After a failure: the other arm, 1/2 * (1 + 2/3) + 1/2 * 1/3 = 1
        #     (the same: 1/3 * (1 + 1/2) + 2/3 * 1/2 = 5/6).
        # 1/2 + 1/2 * 4/3 + 1/2 * 1 = 5/3.
        (2, 3, 5 / 3),
        # With a third arm two failures leave an untouched arm, 1/2 in place of 1/3:
        # after a failure 5/6 + 1/2 * 1/2 = 13/12, so 1/2 + 1/2 * 4/3 + 1/2 * 13/12 = 41/24.
        (3, 3, 41 / 24),
    ],
)
def test_bayes_optimum_by_hand(num_arms, num_pulls, expected):
    assert bayes_optimal_return(num_arms, num_pulls) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("num_arms", "expected"), [(5, 6.660), (10, 6.714), (50, 6.714)])
def test_bayes_optimum_at_ten_pulls(num_arms, expected):
    assert bayes_optimal_return(num_arms, 10) == pytest.approx(expected, abs=1e-3)


def test_arms_beyond_the_pulls_are_worth_nothing():
    assert bayes_optimal_return(1000, 4) == bayes_optimal_return(4, 4)
    assert bayes_optimal_return(4, 4) > bayes_optimal_return(3, 4)


@pytest.mark.parametrize(("num_arms", "num_pulls"), [(5, 10), (20, 8), (2, 20)])
def test_bayes_optimal_agent_earns_the_optimum(num_arms, num_pulls):
    generator = seeded()
    means = torch.rand(20_000, num_arms, generator=generator)
    mean, se = mean_and_se(bayes_optimal(means, num_pulls, generator))
    assert abs(mean - bayes_optimal_return(num_arms, num_pulls)) < 3 * se


def test_bayes_optimal_explores_an_untouched_arm_after_failures():
    # Failures move to untouched arms in order of index; a success there is never left.
    means = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert torch.equal(bayes_optimal(means, 4), expected)


# ---- Agents: trials on certain arms (means of 0 and 1), worked by hand.


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        # All arms score 1/2, so arm 0; a failure makes it (0 + 1) / (1 + 2) = 1/3, and arm 1 is next.
        ([0.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]),
        ([0.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0]),
        # The lowest index wins the tie at 1/2, the worse arm is never seen.
        ([1.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]),
        # All arms failed once: back to arm 0 (1/3 each).
        ([0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_greedy_by_hand(means, expected):
    assert greedy(torch.tensor([means]), 4)[0].tolist() == expected


@pytest.mark.parametrize("paying_arm", [0, 1, 3])
def test_random_agent_pulls_every_arm_alike(paying_arm):
    # One arm in four pays, always: 1/4 a pull, before and after a success.
    means = torch.eye(4)[paying_arm].expand(20_000, 4)
    rewards = random_agent(means, 4, seeded()).double()
    tolerance = 3 * (3 / 16 / 20_000) ** 0.5
    assert rewards.mean(0).tolist() == pytest.approx([0.25] * 4, abs=tolerance)
    assert (rewards[:, 0] * rewards[:, 1]).mean().item() == pytest.approx(1 / 16, abs=tolerance)


@pytest.mark.parametrize(
    ("exploration", "expected"),
    [
        # Pulls 1 and 2: no bonus (ln 1 = 0); a tie, then 2/3 against 1/2: arm 0 succeeds twice.
        # Pull 3: 3/4 + c * sqrt(2 ln 2 / 4) = 0.75 + 0.589 c for arm 0,
        # 1/2 + c * sqrt(2 ln 2 / 2) = 0.5 + 0.833 c for arm 1: arm 1 from c = 1.025 on. It fails.
        # Pull 4 then: 3/4 + 0.741 c against 1/3 + c * sqrt(2 ln 3 / 3) = 0.333 + 0.856 c: arm 0 below c = 3.6.
        # Pull 4 else, after three successes: 4/5 + c * sqrt(2 ln 3 / 5) = 0.8 + 0.663 c
        # against 0.5 + c * sqrt(2 ln 3 / 2) = 0.5 + 1.048 c: arm 1 from c = 0.779 on.
        (0.75, [1.0, 1.0, 1.0, 1.0]),
        (0.80, [1.0, 1.0, 1.0, 0.0]),
        (1.00, [1.0, 1.0, 1.0, 0.0]),
        (1.05, [1.0, 1.0, 0.0, 1.0]),
        (3.50, [1.0, 1.0, 0.0, 1.0]),
        (3.80, [1.0, 1.0, 0.0, 0.0]),
    ],
)
def test_ucb1_by_hand(exploration, expected):
    rewards = ucb1(torch.tensor([[1.0, 0.0]]), len(expected), exploration=exploration)
    assert rewards[0].tolist() == expected


def test_prior_of_greedy():
    # Two pulls with one success: 3 of 4 is 4/6, like 1 of 1, 2/3. (With one pull and half a success 3.5/5 against 1.5/2.)
    mean = bandits._posterior_mean(torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
    assert mean[0].tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 2])


def test_ucb1_without_exploration_is_greedy():
    means = torch.rand(500, 6, generator=seeded())
    expected = greedy(means, 30, seeded(1))
    assert torch.equal(ucb1(means, 30, seeded(1), exploration=0.0), expected)
    assert not torch.equal(ucb1(means, 30, seeded(1)), expected)


@pytest.mark.parametrize(
    ("agent", "expected"),
    [
        (random_agent, 1.0),
        (greedy, 13 / 12),
        (bayes_optimal, 13 / 12),
        # The untouched arm's sample is U[0, 1], so the pulled arm's is the larger with the
        # probability of its posterior mean. After a success 2/3 * 2/3 + 1/3 * 1/2 = 11/18, after a
        # failure 1/3 * 1/3 + 2/3 * 1/2 = 8/18:
        # 1/2 + 1/2 * (11/18 + 8/18) = 37/36.
        (thompson_sampling, 37 / 36),
    ],
)
def test_two_pulls_of_two_arms_by_hand(agent, expected):
    generator = seeded()
    mean, se = mean_and_se(agent(torch.rand(200_000, 2, generator=generator), 2, generator))
    assert abs(mean - expected) < 3 * se


def test_thompson_sampling_samples_the_posterior_not_its_mean():
    # A trial that starts with a success pulled arm 0. Pull 2 is Beta(2, 1) against U[0, 1]: arm 0
    # with probability 2/3, which pays, else arm 1, which does not.
    means = torch.tensor([[1.0, 0.0]]).expand(200_000, 2)
    rewards = thompson_sampling(means, 2, seeded())
    stayed = rewards[rewards[:, 0] == 1, 1].double()
    assert abs(stayed.mean().item() - 2 / 3) < 3 * (2 / 9 / stayed.numel()) ** 0.5


@pytest.mark.parametrize(
    ("means", "expected"),
    [
        # One pull in two is random, one in two of those goes to the other arm: the greedy arm has 3/4.
        # Arm 0 pays and is greedy from the tie at the start on: 3/4 a pull.
        ([1.0, 0.0], [3 / 4, 3 / 4]),
        # Pull 1: arm 1 by chance only, 1/4. It paid and is greedy, or arm 0 failed and arm 1 is greedy: 3/4.
        ([0.0, 1.0], [1 / 4, 3 / 4]),
    ],
)
def test_epsilon_greedy_by_hand(means, expected):
    rewards = epsilon_greedy(torch.tensor([means]).expand(50_000, 2), 2, seeded(), epsilon=0.5)
    assert rewards.double().mean(0).tolist() == pytest.approx(expected, abs=3 * (3 / 16 / 50_000) ** 0.5)


def test_epsilon_greedy_between_greedy_and_random():
    certain = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert torch.equal(epsilon_greedy(certain, 6, epsilon=0.0), greedy(certain, 6))
    rewards = epsilon_greedy(torch.eye(4)[2].expand(20_000, 4), 4, seeded(), epsilon=1.0).double()
    assert rewards.mean(0).tolist() == pytest.approx([0.25] * 4, abs=3 * (3 / 16 / 20_000) ** 0.5)


@pytest.mark.parametrize("num_samples", [1, 2, 10])
def test_optimistic_thompson_sampling_by_hand(num_samples):
    # A trial that starts with a success pulled arm 0: Beta(2, 1), of density 2x, against U[0, 1]. The likeliest of m samples
    # has the largest x, of distribution x^2m and mean 2m / (2m + 1): the probability that U[0, 1] is below. Arm 0 pays.
    # (The larger of sample and mean, the other algorithm of the name, would be 0.765 on average.)
    m = num_samples
    means = torch.tensor([[1.0, 0.0]]).expand(50_000, 2)
    rewards = optimistic_thompson_sampling(means, 2, seeded(), num_samples=m)
    stayed = rewards[rewards[:, 0] == 1, 1].double()
    expected = 2 * m / (2 * m + 1)
    assert abs(stayed.mean().item() - expected) < 3 * (expected * (1 - expected) / stayed.numel()) ** 0.5
    # After a failure Beta(1, 2), of density 2 (1 - x): the smallest x, of mean 1 / (2m + 1). Here arm 0 always fails, arm 1 pays.
    rewards = optimistic_thompson_sampling(means.flip(-1), 2, seeded(), num_samples=m)
    moved = rewards[rewards[:, 0] == 0, 1].double()
    assert abs(moved.mean().item() - expected) < 3 * (expected * (1 - expected) / moved.numel()) ** 0.5


def test_blocks_of_samples_belong_to_their_tasks(monkeypatch):
    # Each task pays on another arm: 100 pulls find it, unless a block decided for other tasks.
    means = torch.eye(4).repeat(16, 1)
    for size in (40, 10_000):
        monkeypatch.setattr(thompson, "BLOCK_SIZE", size)
        rewards = optimistic_thompson_sampling(means, 60, seeded(), num_samples=3)
        assert rewards[:, 40:].mean(-1).min() > 0.7


@pytest.mark.parametrize("alpha", [1.0, 2.0, 7.0, 300.0])
def test_log_gamma_variates(alpha):
    samples = thompson._sample_log_gamma(torch.full((400_000,), alpha), seeded()).double()
    # log X has mean digamma(alpha) and variance trigamma(alpha); X has mean and variance alpha.
    exact = torch.tensor(alpha, dtype=torch.float64)
    error = samples.mean() - torch.digamma(exact)
    assert abs(error) < 3 * samples.std() / 400_000**0.5
    assert samples.var().item() == pytest.approx(torch.polygamma(1, exact).item(), rel=0.02)
    assert samples.exp().mean().item() == pytest.approx(alpha, rel=3 * (alpha * 400_000) ** -0.5)
    assert samples.exp().var().item() == pytest.approx(alpha, rel=0.02)
    # The probability of a sample below alpha is the regularised incomplete gamma function.
    below = (samples.exp() < alpha).double().mean().item()
    assert below == pytest.approx(torch.special.gammainc(exact, exact).item(), abs=3 * 0.5 / 400_000**0.5)


# ---- Agents: table 1 of Duan et al. 2016.

# (pulls, arms) -> the table's cells, and the standard error of its 1,000 tasks.
AGENTS_OF_TABLE = (
    random_agent,
    gittins_agent,
    thompson_sampling,
    optimistic_thompson_sampling,
    ucb1,
    epsilon_greedy,
    greedy,
)
TABLE = {
    (10, 5): ((5.0, 6.6, 5.7, 6.5, 6.7, 6.6, 6.6), 0.07),
    (100, 5): ((49.9, 78.3, 74.7, 77.9, 78.0, 75.4, 74.8), 0.52),
}
# Chosen by tune where the grid is cheap, and where it is not as tune chose on more tasks than a test has time for.
TUNED = {
    (10, gittins_agent): {"gamma": 0.9},
    (10, optimistic_thompson_sampling): {"num_samples": 50},
    (100, gittins_agent): {"gamma": 0.99},
    (100, optimistic_thompson_sampling): {"num_samples": 10},
}


@pytest.mark.parametrize("cell", TABLE, ids=str)
@pytest.mark.parametrize("agent", AGENTS_OF_TABLE)
def test_mean_total_reward_of_the_paper(cell, agent):
    (num_pulls, num_arms), (row, paper_se) = cell, TABLE[cell]
    expected = row[AGENTS_OF_TABLE.index(agent)]
    generator = seeded()
    options = TUNED.get((num_pulls, agent))
    if options is None:
        options = tune(agent, torch.rand(2_000, num_arms, generator=generator), num_pulls, generator)
    num_tasks = 10_000 if "num_samples" not in options else 2_000
    means = torch.rand(num_tasks, num_arms, generator=generator)
    mean, se = mean_and_se(agent(means, num_pulls, generator, **options))
    assert abs(mean - expected) < 3 * (se**2 + paper_se**2) ** 0.5


@pytest.mark.parametrize(
    ("agent", "options", "expected"),
    [(ucb1, {"exploration": 0.2}, 457.6), (epsilon_greedy, {"epsilon": 0.1}, 413.6)],
)
def test_the_cell_that_tells_priors_apart(agent, options, expected):
    # 500 pulls of 50 arms, SE 1.9: a prior of one pull with half a success would give 435.6 (451 with 0.1) and 424.
    generator = seeded()
    mean, se = mean_and_se(agent(torch.rand(1_000, 50, generator=generator), 500, generator, **options))
    assert abs(mean - expected) < 3 * (se**2 + 1.9**2) ** 0.5


def test_order_of_the_agents():
    # The table at 500 pulls of 50 arms: 249.6, 402.8, 427.2, 457.6, 463.7. Here on the same tasks, far beyond their noise.
    generator = seeded()
    means = torch.rand(500, 50, generator=generator)
    agents = (random_agent, greedy, thompson_sampling, ucb1, partial(gittins_agent, gamma=0.999))
    totals = [agent(means, 500, generator).double().sum(-1) for agent in agents]
    for worse, better in pairwise(totals):
        difference = better - worse
        assert difference.mean() > 3 * difference.std() / 500**0.5


def test_tuned_constant_of_the_paper():
    # At 100 pulls of 5 arms 0.2 earns most; the ends of the grid are far below it.
    generator = seeded()
    best = tune_ucb1(torch.rand(4_000, 5, generator=generator), 100, generator)
    assert best in (0.1, 0.2, 0.3)
    # On certain arms the lowest constant that earns all is as good as any.
    assert tune_ucb1(torch.ones(3, 2), 5) == 0.0


def quadratic(tasks, length, generator, *, x=0, y=0):
    """Earns most at x = 2, y = -1."""
    return torch.full((tasks, length), -float((x - 2) ** 2 + (y + 1) ** 2))


def test_tuning_takes_the_best_of_the_grid():
    assert tune(quadratic, 3, 4, x=(0, 2, 5)) == {"x": 2}
    assert tune(quadratic, 3, 4, x=(0, 2, 5), y=(-3, -1, 0)) == {"x": 2, "y": -1}
    # 1 and 3 earn the same: the first.
    assert tune(quadratic, 3, 4, x=(3, 1)) == {"x": 3}
    assert tune(quadratic, 3, 4, x=(1, 3)) == {"x": 1}


def test_tuning_an_agent_without_options():
    assert tune(greedy, torch.rand(2, 2), 3) == {}
    assert tune(thompson_sampling, torch.rand(2, 2), 3) == {}


@pytest.mark.parametrize(
    "values", [np.array([0.0, 0.5]), torch.tensor([0.0, 0.5]), (each / 2 for each in range(2)), [0.0, 0.5]], ids=type
)
def test_values_to_try_may_stand_in_anything(values):
    def agent(tasks, length, generator, x):
        return torch.tensor([x])

    assert repr(tune(agent, None, 1, x=values)) == "{'x': 0.5}"


def test_tuning_needs_values():
    with pytest.raises(ValueError, match=r"x holds no value.*Pass one or more"):
        tune(quadratic, 3, 4, x=())


# ---- Contract.


@pytest.mark.parametrize("agent", AGENTS)
def test_rewards_are_zero_or_one_a_pull(agent):
    rewards = agent(torch.rand(40, 3, generator=seeded()), 6, seeded())
    assert rewards.shape == (40, 6)
    assert rewards.dtype == torch.float32
    assert set(rewards.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("agent", AGENTS)
def test_generator_is_the_only_randomness(agent):
    means = torch.rand(200, 4, generator=seeded())
    torch.manual_seed(0)
    first = agent(means, 8, seeded(7))
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(agent(means, 8, seeded(7)), first)
    assert not torch.equal(agent(means, 8, seeded(8)), first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)  # the global stream was not drawn from


def test_tuning_draws_from_the_generator_only():
    means = torch.rand(200, 4, generator=seeded())
    state = torch.get_rng_state()
    assert tune_ucb1(means, 20, seeded(7)) == tune_ucb1(means, 20, seeded(7))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("agent", AGENTS)
def test_means_are_left_as_they_were(agent):
    means = torch.rand(20, 4, generator=seeded())
    before = means.clone()
    agent(means, 8)
    assert torch.equal(means, before)


@pytest.mark.parametrize("agent", [*AGENTS, tune_ucb1])
@pytest.mark.parametrize(
    ("means", "num_pulls", "message"),
    [
        (torch.rand(3), 2, r"means has shape \[3\].*num_tasks, num_arms.*unsqueeze"),
        (torch.tensor(0.5), 2, r"means has shape \[\]"),
        (torch.rand(2, 3, 4), 2, r"means has shape \[2, 3, 4\]"),
        (torch.rand(2, 0), 2, r"means has shape \[2, 0\].*one arm"),
        (torch.ones(2, 2).long(), 2, r"means has dtype torch.int64.*means.float\(\)"),
        (torch.tensor([[0.5, 1.1]]), 2, r"means has entries outside \[0, 1\].*Pass probabilities"),
        (torch.tensor([[0.5, -0.1]]), 2, r"means has entries outside \[0, 1\]"),
        (torch.tensor([[0.5, float("nan")]]), 2, r"means has entries outside \[0, 1\] or NaN"),
        (torch.rand(2, 2), 0, r"num_pulls=0 must be a whole number"),
        (torch.rand(2, 2), -1, r"num_pulls=-1"),
    ],
)
def test_bad_tasks(agent, means, num_pulls, message):
    with pytest.raises(ValueError, match=message):
        agent(means, num_pulls)


@pytest.mark.parametrize("agent", [*AGENTS, tune_ucb1])
def test_arrays_seeds_and_words_are_told_apart_from_tensors_generators_and_numbers(agent):
    with pytest.raises(TypeError, match=r"means is no tensor but ndarray: give torch.as_tensor\(means\)"):
        agent(np.full((2, 2), 0.5), 2)
    with pytest.raises(TypeError, match=r"int is no generator: give torch.Generator\(\).manual_seed"):
        agent(torch.rand(2, 2), 2, 0)
    with pytest.raises(ValueError, match="num_pulls='5' must be a whole number"):
        agent(torch.rand(2, 2), "5")


@pytest.mark.parametrize("exploration", [-0.1, float("nan"), float("inf")])
def test_bad_exploration(exploration):
    with pytest.raises(ValueError, match=r"exploration=.*tune\(ucb1"):
        ucb1(torch.rand(2, 2), 3, exploration=exploration)


@pytest.mark.parametrize("epsilon", [-0.1, 1.1, float("nan")])
def test_bad_epsilon(epsilon):
    with pytest.raises(ValueError, match=r"epsilon=.*is no probability.*tune\(epsilon_greedy"):
        epsilon_greedy(torch.rand(2, 2), 3, epsilon=epsilon)


@pytest.mark.parametrize("num_samples", [0, -1])
def test_bad_number_of_samples(num_samples):
    with pytest.raises(ValueError, match=r"num_samples=.*leaves no sample.*tune\(optimistic"):
        optimistic_thompson_sampling(torch.rand(2, 2), 3, num_samples=num_samples)


@pytest.mark.parametrize(("num_arms", "num_pulls"), [(0, 5), (5, 0), (-1, 5), (5, -1)])
def test_bayes_optimum_needs_an_arm_and_a_pull(num_arms, num_pulls):
    with pytest.raises(ValueError, match=rf"num_arms={num_arms} and num_pulls={num_pulls} must"):
        bayes_optimal_return(num_arms, num_pulls)


@pytest.mark.parametrize(("num_arms", "num_pulls"), [(50, 16), (5, 100), (2, 1_000)])
def test_bayes_optimum_refuses_a_long_horizon(num_arms, num_pulls):
    with pytest.raises(ValueError, match=rf"num_pulls={num_pulls} with num_arms={num_arms}.*ucb1"):
        bayes_optimal_return(num_arms, num_pulls)
    with pytest.raises(ValueError, match="posterior states"):
        bayes_optimal(torch.rand(2, num_arms), num_pulls)


def test_bayes_optimum_takes_a_longer_horizon_with_few_arms():
    assert bayes_optimal_return(1, 100) == pytest.approx(50.0)
    # No more than knowing the better of two arms, 2/3 a pull; no less than ucb1 earns.
    optimum = bayes_optimal_return(2, 30)
    assert optimum < 30 * 2 / 3
    mean, se = mean_and_se(ucb1(torch.rand(10_000, 2, generator=seeded()), 30, seeded(1)))
    assert optimum > mean - 3 * se
