"""Planning, posteriors and agents of tabular MDPs: by hand, against loops, and against table 2 of Duan et al. 2016."""

import math

import pytest
import torch

from rl2_torchrl.baselines import beb, beliefs, mdps, opsrl, optimal_return, planning, psrl, tune, ucrl2
from rl2_torchrl.baselines.beliefs import Experience, posterior_mean, sample_posterior
from rl2_torchrl.baselines.mdp_trials import play
from rl2_torchrl.baselines.mdps import perfect_memory
from rl2_torchrl.baselines.tuning import PAPER_GRIDS
from rl2_torchrl.envs import random_mdps, unpack_mdps

AGENTS = [mdps.random_agent, mdps.greedy, mdps.epsilon_greedy, psrl, opsrl, beb, ucrl2, perfect_memory]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(number, seed=0, num_states=10, num_actions=5):
    tasks = random_mdps(num_states, num_actions)(torch.Size([number]), seeded(seed))
    return unpack_mdps(tasks, num_states, num_actions)


def bandit(*means, number=1):
    """One state, an action for each of the means."""
    rewards = torch.tensor(means).expand(number, 1, -1)
    return rewards, torch.ones(*rewards.shape, 1)


def stay_or_go(rewards):
    """Two states; the first action stays, the second goes to the other state."""
    rewards = torch.tensor([rewards])
    return rewards, torch.tensor([[[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]]])


# ---- Planning.


def test_value_iteration_by_hand():
    plan = planning.value_iteration(*stay_or_go([[1.0, 0.0], [3.0, 2.0]]), 3)
    # Last step: the rewards; V = (1, 3). Second: stay 1 + 1, go 0 + 3; stay 3 + 3, go 2 + 1; V = (3, 6).
    # First: stay 1 + 3, go 0 + 6; stay 3 + 6, go 2 + 3.
    assert plan.squeeze(1).tolist() == [[[4, 6], [9, 5]], [[2, 3], [6, 3]], [[1, 0], [3, 2]]]


def test_a_bonus_counts_for_every_step_that_follows():
    bonus = torch.tensor([[[0.0, 10.0], [0.0, 0.0]]])
    plan = planning.value_iteration(*stay_or_go([[1.0, 0.0], [3.0, 2.0]]), 3, bonus)
    # Second: go from the first state 3 + 1 * 10, V = (13, 6). First: stay 1 + 13, go 0 + 6 + 2 * 10; 3 + 6, 2 + 13.
    assert plan.squeeze(1).tolist() == [[[14, 26], [9, 15]], [[2, 13], [6, 3]], [[1, 0], [3, 2]]]


# One action and three states, worth (0, 1, 2) in the last step; half the slack of the first state is 0.2.
#
# The mean transition of state 0 is (0.5, 0.3, 0.2). Second step: state 2 is best, 0.2 + 0.2; the 0.2 come from the worst,
# 0.5 - 0.2: (0.3, 0.3, 0.4), worth 0.3 + 0.8 = 1.1. States 1 and 2 stay where they are, 2 and 4. First step, from the
# mean again: (0.3, 0.3, 0.4) on (1.1, 2, 4): 0.33 + 0.6 + 1.6 = 2.53.
# Carried over: already before the last step, when all states are worth 0, the last one counts as best and the first as
# worst, (0.3, 0.3, 0.4); then (0.1, 0.3, 0.6), worth 0.3 + 1.2 = 1.5; then 0.8 for the best, where 0.1 of the worst and 0.1
# of the next are left to take: (0, 0.2, 0.8) on (1.5, 2, 4): 0.4 + 3.2 = 3.6.
@pytest.mark.parametrize(("carry_over", "expected"), [(False, [2.53, 1.1]), (True, [3.6, 1.5])])
def test_extended_value_iteration_by_hand(carry_over, expected):
    rewards = torch.tensor([[[0.0], [1.0], [2.0]]])
    transitions = torch.tensor([[[[0.5, 0.3, 0.2]], [[0.0, 1.0, 0.0]], [[0.0, 0.0, 1.0]]]])
    slack = torch.tensor([[[0.4], [0.0], [0.0]]])
    plan = planning.extended_value_iteration(rewards, transitions, slack, 3, carry_over)
    assert plan[:2, 0, 0, 0].tolist() == pytest.approx(expected)
    assert plan[2].flatten().tolist() == [0, 1, 2]
    assert plan[0, 0, 1:, 0].tolist() == pytest.approx([3, 6])


def extended_by_loops(rewards, transitions, slack, num_steps, carry_over):
    """One MDP, an action at a time: raise the best state's probability, then lower the worst until the sum is 1."""
    num_states, num_actions = rewards.shape
    current, values, plan = transitions.double().clone(), torch.zeros(num_states, dtype=torch.float64), []
    for _ in range(num_steps):
        worst_first = sorted(range(num_states), key=lambda state: values[state].item())
        step = torch.zeros(num_states, num_actions, dtype=torch.float64)
        for state in range(num_states):
            for action in range(num_actions):
                p = (current if carry_over else transitions.double())[state, action].clone()
                if p[worst_first[-1]] + slack[state, action] / 2 > 1:
                    p = torch.zeros(num_states, dtype=torch.float64)
                    p[worst_first[-1]] = 1
                else:
                    p[worst_first[-1]] += slack[state, action] / 2
                    for other in worst_first:
                        p[other] = max(0, p[other] - max(0, p.sum() - 1))
                    current[state, action] = p
                step[state, action] = rewards[state, action] + p @ values
        plan.insert(0, step)
        values = step.amax(-1)
    return torch.stack(plan)


@pytest.mark.parametrize("carry_over", [True, False])
@pytest.mark.parametrize("size", [0.05, 0.4, 3.0])
def test_extended_value_iteration_against_loops(carry_over, size):
    rewards, transitions = drawn(3, num_states=5, num_actions=2)
    slack = size * torch.rand(rewards.shape, generator=seeded(1))
    plan = planning.extended_value_iteration(rewards, transitions, slack, 6, carry_over)
    for task in range(3):
        expected = extended_by_loops(rewards[task], transitions[task], slack[task], 6, carry_over)
        torch.testing.assert_close(plan[:, task].double(), expected, rtol=0, atol=1e-5)


def test_known_optimum():
    # stay_or_go: as above, 6 in three steps from the first state.
    assert optimal_return(stay_or_go([[1.0, 0.0], [3.0, 2.0]]), episode_steps=3).tolist() == [6]
    returns = optimal_return(drawn(10_000)).double()
    # 21.85 an episode; 0.07 is the standard error of the 1,000 tasks behind it.
    assert abs(returns.mean().item() - 21.85) < 3 * math.hypot(0.07, returns.std().item() / 100)


# ---- Beliefs.


def test_experience_and_posterior_mean_by_hand():
    experience = Experience.none_of(torch.zeros(2, 2, 3, 2))
    experience.add(torch.tensor([4, 0]), torch.tensor([2.0, 5.0]), torch.tensor([0, 1]))
    experience.add(torch.tensor([4, 1]), torch.tensor([4.0, 1.0]), torch.tensor([0, 0]))
    experience.add(torch.tensor([4, 1]), torch.tensor([3.0, 1.0]), None)  # an episode's end
    assert experience.visits[0].tolist() == [[0, 0, 0], [0, 3, 0]]
    assert experience.visits[1].tolist() == [[1, 2, 0], [0, 0, 0]]
    assert experience.reward_sum[0, 1, 1] == 9
    assert experience.successors[0, 1, 1].tolist() == [2, 0]
    assert experience.successors.sum() == 4
    rewards, transitions = posterior_mean(experience, 1.0, 2.0, 0.5)
    # (1 * 2 + 9) / (2 + 3); (0.5 + 2, 0.5) / 3; the priors.
    assert rewards[0, 1].tolist() == pytest.approx([1, 11 / 5, 1])
    assert transitions[0, 1, 1].tolist() == pytest.approx([5 / 6, 1 / 6])
    assert transitions[0, 0, 0].tolist() == [0.5, 0.5]


def test_posterior_samples_have_the_posteriors_moments():
    number = 40_000
    visits = torch.tensor([0.0, 3.0]).expand(number, 1, 2)
    # Rewards: N(1, 1) before, N((1 + 5) / 4, 1/4) after three of sum 5. Transitions: Dirichlet(1, 1, 1) and (1, 2, 41).
    successors = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 40.0]]).expand(number, 1, 2, 3)
    experience = Experience(visits, torch.tensor([0.0, 5.0]).expand(number, 1, 2), successors)
    rewards, transitions = (part.squeeze(1).double() for part in sample_posterior(experience, 1.0, seeded()))
    mean, variance = torch.tensor([1.0, 1.5]), torch.tensor([1.0, 0.25])
    assert ((rewards.mean(0) - mean).abs() < 3 * (variance / number).sqrt()).all()
    assert ((rewards.var(0) / variance - 1).abs() < 3 * (2 / number) ** 0.5).all()
    alpha = torch.tensor([[1.0, 1.0, 1.0], [1.0, 2.0, 41.0]])
    total = alpha.sum(-1, keepdim=True)
    mean = alpha / total
    variance = mean * (1 - mean) / (total + 1)
    assert ((transitions.mean(0) - mean).abs() < 3.5 * (variance / number).sqrt()).all()
    assert (transitions.var(0) / variance - 1).abs().max() < 0.06
    torch.testing.assert_close(transitions.sum(-1), torch.ones(number, 2, dtype=torch.float64))


@pytest.mark.parametrize("count", [0, 1, 7, 300])
def test_gamma_samples_against_torchs_own(count):
    number, alpha = 100_000, count + 1.0
    ours = beliefs._sample_gamma(torch.full((number,), float(count)), seeded()).double()
    theirs = torch._standard_gamma(torch.full((number,), alpha, dtype=torch.float64), generator=seeded(1))
    quantiles = torch.tensor([0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.999], dtype=torch.float64)
    # Of 100,000 samples below their 0.1 % quantile there are 100, give or take 10.
    below = (ours.unsqueeze(-1) <= theirs.quantile(quantiles)).double().mean(0)
    assert ((below - quantiles).abs() < 4 * (2 * quantiles * (1 - quantiles) / number).sqrt()).all()


# ---- Trials.


def always(*values, steps=1):
    return lambda experience, episode: torch.tensor(values).expand(steps, *experience.visits.shape)


def test_play_by_hand():
    seen = []

    def go(experience, episode):
        seen.append((episode, experience.visits[0].clone(), experience.successors[0].clone()))
        return always(0.0, 1.0, steps=3)(experience, episode)

    returns = play(stay_or_go([[1e3, 2e3], [3e3, 5e3]]), 2, go, seeded(), episode_steps=3)
    # 0 -> 1 -> 0 -> 1, each episode from state 0 again: 2 + 5 + 2 thousand, and a noise of deviation sqrt(3).
    assert returns[0].tolist() == pytest.approx([9e3, 9e3], abs=10)
    assert [episode for episode, _, _ in seen] == [1, 2]
    assert (seen[0][1] == 0).all()
    assert seen[1][1].tolist() == [[0, 2], [0, 1]]
    # The step that ended the episode, the second from state 0, leads nowhere.
    assert seen[1][2].tolist() == [[[0, 0], [0, 1]], [[0, 0], [1, 0]]]


def test_noise_of_the_rewards():
    number = 40_000
    returns = play(bandit(3.0, number=number), 2, always(0.0), seeded(), episode_steps=1).double()
    assert returns.mean(0).tolist() == pytest.approx([3, 3], abs=3 / number**0.5)
    assert returns.std(0).tolist() == pytest.approx([1, 1], abs=3 / (2 * number) ** 0.5)
    assert abs(((returns[:, 0] - 3) * (returns[:, 1] - 3)).mean().item()) < 3 / number**0.5


@pytest.mark.parametrize(
    ("values", "epsilon", "share"),
    [
        ((0.0, 1.0, 0.0, 0.0), 0.0, 1.0),
        ((0.0, 1.0, 0.0, 0.0), 0.4, 0.7),  # 0.6 + 0.4 / 4
        ((1.0, 1.0, 0.0, 0.0), 0.0, 0.5),  # a tie
        ((1.0, 1.0 + 1e-6, 0.0, 0.0), 0.0, 0.5),  # a tie but for rounding
        ((1e5, 1e5, 0.0, 0.0), 0.0, 0.5),  # a tie of large values
        ((0.0, 0.0, 0.0, 0.0), 0.0, 0.25),
    ],
)
def test_share_of_an_action(values, epsilon, share):
    number, means = 20_000, (0.0, 1e4, 0.0, 0.0)
    mdp = bandit(*means, number=number)
    returns = play(mdp, 1, always(*values, steps=2), seeded(), epsilon=epsilon, episode_steps=2)
    times = (returns.squeeze(-1) / 1e4).round()  # of two steps: 0, 1 or 2
    assert times.mean().item() == pytest.approx(2 * share, abs=3 * (2 * share * (1 - share) / number) ** 0.5 + 0.02)
    # Drawn anew in every step, not once an episode.
    assert (times == 2).double().mean().item() == pytest.approx(share**2, abs=0.02)


@pytest.mark.parametrize("agent", AGENTS)
def test_the_generator_is_the_only_randomness(agent):
    tasks, state = drawn(20), torch.get_rng_state()
    first = agent(tasks, 3, seeded())
    assert first.shape == (20, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(agent(tasks, 3, seeded()), first)
    assert not torch.equal(agent(tasks, 3, seeded(1)), first)
    # The tasks are not written to, and a longer trial begins like a shorter one.
    assert all(torch.equal(one, other) for one, other in zip(tasks, drawn(20), strict=True))


def test_tasks_beyond_one_block_are_played_alike(monkeypatch):
    monkeypatch.setattr("rl2_torchrl.baselines.mdp_trials._TASKS_AT_ONCE", 3)
    means = torch.arange(8) * 1e4
    rewards = means[:, None, None].expand(8, 1, 2)
    returns = psrl((rewards, torch.ones(8, 1, 2, 1)), 2, seeded(), episode_steps=1)
    assert (returns / 1e4).round()[:, 1].tolist() == list(range(8))


# ---- Plans of the agents, caught on their way to play.


def caught_plan(monkeypatch, agent, experience, episode=1, **kwargs):
    monkeypatch.setattr(mdps, "play", lambda *args, **_: args[2](experience, episode))
    return agent((experience.visits, experience.successors), 1, seeded(), **kwargs)


def one_visit():
    """Two states, two actions; action 1 in state 0 was taken twice, paid 3 and 4 and led to state 1 once."""
    experience = Experience.none_of(torch.zeros(1, 2, 2, 2))
    experience.add(torch.tensor([1]), torch.tensor([3.0]), torch.tensor([1]))
    experience.add(torch.tensor([1]), torch.tensor([4.0]), None)
    return experience


def test_greedy_plan_by_hand(monkeypatch):
    plan = caught_plan(monkeypatch, mdps.greedy, one_visit(), episode_steps=2)
    # Last step: 3.5 where it has been seen, 0 elsewhere; V = (3.5, 0). First: unseen actions lead to either state, 1.75;
    # the seen one led to state 1: 3.5 + 0.
    assert plan[1, 0].flatten().tolist() == pytest.approx([0, 3.5, 0, 0], abs=1e-3)
    assert plan[0, 0].flatten().tolist() == pytest.approx([1.75, 3.5, 1.75, 1.75], abs=1e-3)


def test_beb_plan_by_hand(monkeypatch):
    plan = caught_plan(monkeypatch, beb, one_visit(), scaling=0.1, prior_mean=1.0, episode_steps=2)
    # Last step: posterior means (1 + 7) / 3 and 1, bonuses 1 / (2 + 2) and 1 / 2: V = (2.9167, 1.5).
    last = [1.5, 8 / 3 + 0.25, 1.5, 1.5]
    # First: one step follows; bonuses 2 * 2³ * 0.1 / (1 + 2 + m) = 1.6 / 3, and 1.6 / 4 after m = 1. Unseen: 1/2, 1/2;
    # seen: (1, 2) / 3.
    unseen = 1.5 + (last[1] + 1.5) / 2 + 1.6 / 3
    first = [unseen, last[1] + last[1] / 3 + 2 / 3 * 1.5 + 0.4, unseen, unseen]
    assert plan[1, 0].flatten().tolist() == pytest.approx(last)
    assert plan[0, 0].flatten().tolist() == pytest.approx(first)


@pytest.mark.parametrize("carry_over", [True, False])
def test_ucrl2_plan_by_hand(monkeypatch, carry_over):
    scaling, episode = 0.02, 6
    plan = caught_plan(
        monkeypatch, ucrl2, one_visit(), episode, scaling=scaling, carry_over=carry_over, episode_steps=2
    )
    log = 4 * math.log(2 * 2 * 2 * (episode + 1) / 0.05)
    # Two visits and 0, the latter as 1; one next state or none, both as 1.
    last = [scaling * log**0.5, 3.5 + scaling * (log / 2) ** 0.5]
    assert plan[1, 0].flatten().tolist() == pytest.approx([last[0], last[1], last[0], last[0]], abs=1e-3)
    # State 0 is the better next state. Half the slack goes there; carried over, half the slack went to state 1 before:
    # unseen 1/2 - half + half, seen (led to state 1) no room for more: certain, which is not carried over.
    half = scaling * (2 * log) ** 0.5 / 2
    unseen = 0.5 if carry_over else 0.5 + half
    first = [
        last[0] + unseen * last[1] + (1 - unseen) * last[0],
        last[1] + half * last[1] + (1 - half) * last[0],
        last[0] + unseen * last[1] + (1 - unseen) * last[0],
    ]
    assert plan[0, 0].flatten()[:3].tolist() == pytest.approx(first, abs=1e-3)


# One state, two actions, one step an episode; means 0 and 4. After a reward r the sample of the action is N(r/2, 1/2) and of
# the other N(0, 1); r is N(mean, 1), so that their difference is N(mean / 2, 1/4 + 1/2 + 1). The action is taken again
# with probability 1/2 for mean 0 and Phi(2 / sqrt(1.75)) = 0.93471 for mean 4: 1/2 * (1/2 * 4 + 0.93471 * 4) = 2.8694.
# With a prior mean of 1 they are Phi(-0.5 / sqrt(1.75)) = 0.35273 and Phi(1.5 / sqrt(1.75)) = 0.87158:
# 1/2 * (0.64727 * 4 + 0.87158 * 4) = 3.0377.
@pytest.mark.parametrize(("prior_mean", "expected"), [(0.0, 2.8694), (1.0, 3.0377)])
def test_psrl_samples_its_posterior(prior_mean, expected):
    number = 100_000
    returns = psrl(bandit(0.0, 4.0, number=number), 2, seeded(), prior_mean=prior_mean, episode_steps=1)
    # A return has the variance 1 of its noise and at most 4 of its mean.
    assert returns.mean(0).tolist() == pytest.approx([2, expected], abs=3 * (5 / number) ** 0.5)


def test_opsrl_takes_each_actions_best_sample(monkeypatch):
    rewards = iter(torch.tensor([[[[1.0, 5.0]]], [[[3.0, 4.0]]], [[[2.0, 0.0]]]]))
    monkeypatch.setattr(mdps, "sample_posterior", lambda *args: (next(rewards), torch.ones(1, 1, 2, 1)))
    experience = Experience.none_of(torch.zeros(1, 1, 2, 1))
    plan = caught_plan(monkeypatch, opsrl, experience, num_samples=3, episode_steps=2)
    # Values of the last step (1, 5), (3, 4), (2, 0); of the first (6, 10), (7, 8), (4, 2).
    assert plan.flatten(1).tolist() == [[7, 10], [3, 5]]


# ---- Agents: table 2 of Duan et al. 2016.

# 10 and 25 episodes; the standard errors of the table's 1,000 tasks are 0.7 and 1.8.
TABLE = {
    "random": (mdps.random_agent, {}, 100.1, 250.2),
    "psrl": (psrl, {}, 138.1, 408.8),
    "opsrl": (opsrl, {"num_samples": 4}, 144.1, 425.2),
    "ucrl2": (ucrl2, {"scaling": 10**-0.4}, 146.6, 424.1),
    "beb": (beb, {"scaling": 10**-2.8}, 150.2, 427.8),
    "epsilon_greedy": (mdps.epsilon_greedy, {"epsilon": 0.1}, 132.8, 377.3),
    "greedy": (mdps.greedy, {}, 134.8, 368.8),
}


@pytest.mark.parametrize("name", TABLE)
def test_table_of_the_paper(name):
    agent, setting, *expected = TABLE[name]
    returns = agent(drawn(1000), 25, seeded(1), **setting).double()
    totals = torch.stack([returns[:, :10].sum(-1), returns.sum(-1)])
    for total, cell, error in zip(totals, expected, (0.7, 1.8), strict=True):
        assert abs(total.mean().item() - cell) < 3 * math.hypot(error, total.std().item() / len(total) ** 0.5)


def test_beb_earns_more_with_the_tasks_own_prior():
    tasks = drawn(500)
    told = beb(tasks, 25, seeded(1), scaling=10**-3.2, prior_mean=1.0)
    difference = (told - beb(tasks, 25, seeded(2), scaling=10**-2.8)).double().sum(-1)
    assert difference.mean() > 3 * difference.std() / len(difference) ** 0.5


def test_perfect_memory_by_hand():
    # Rewards of 5 and 3. Who expects -20 finds the first action of the two, drawn by lot, better than that, and stays with it; who
    # expects 20 tries both until they have sunk to 5 or so, which is the better one.
    worlds = bandit(5.0, 3.0, number=400)
    returns = [perfect_memory(worlds, 12, seeded(0), prior_mean=prior)[:, -1] / 10 for prior in (-20.0, 20.0)]
    better = [(each > 4).double().mean().item() for each in returns]
    assert better[0] == pytest.approx(0.5, abs=0.1)  # SE 0.025
    assert better[1] > 0.97


def test_perfect_memory_counts_what_was_seen_a_step_ago():
    # An action that pays -1000 is not taken twice, within the first episode either.
    returns = perfect_memory(bandit(-1e3, -1e3, 1e3, number=60), 1, seeded(0), episode_steps=5).round(decimals=-3)
    assert set(returns.flatten().tolist()) == {5e3, 3e3, 1e3}


def test_perfect_memory_on_the_tasks_of_the_paper():
    # 158.6 and, with 0.6 standard deviations of optimism, 161.8: measured by a program of its own on other tasks.
    for optimism, expected in ((0.0, 158.6), (0.6, 161.8)):
        total = perfect_memory(drawn(2000), 10, seeded(1), optimism=optimism).double().sum(-1)
        assert abs(total.mean().item() - expected) < 3 * math.hypot(0.3, total.std().item() / len(total) ** 0.5)


# ---- Tuning.


@pytest.mark.parametrize(
    ("agent", "option", "grid"),
    [
        (mdps.epsilon_greedy, "epsilon", [i / 10 for i in range(1, 11)]),
        (opsrl, "num_samples", list(range(1, 21))),
        (perfect_memory, "optimism", [i / 10 for i in range(11)]),
        (beb, "scaling", torch.logspace(-4, 0, 21, dtype=torch.float64).tolist()),
        (ucrl2, "scaling", torch.logspace(-4, 0, 21, dtype=torch.float64).tolist()),
    ],
)
def test_what_the_papers_authors_chose_from(agent, option, grid):
    assert {name: list(values) for name, values in PAPER_GRIDS[agent].items()} == {option: pytest.approx(grid)}


def test_an_agent_for_mdps_is_tuned_as_one_for_bandits():
    # Two actions of 0 and 1 in a single state: chance costs.
    assert tune(mdps.epsilon_greedy, bandit(0.0, 1.0, number=500), 10, seeded(0)) == {"epsilon": 0.1}
    assert tune(mdps.greedy, TWO, 3) == {}


# ---- Bad input.

TWO = drawn(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: psrl((TWO[0][0], TWO[1][0]), 3), r"\[10, 5\] and transitions \[10, 5, 10\].*Pass unpack_mdps"),
        (lambda: psrl((TWO[0], TWO[1][..., :9]), 3), "agents play a batch of tasks"),
        (lambda: psrl((TWO[0], 2 * TWO[1]), 3), "no probabilities"),
        (lambda: psrl((TWO[0], -TWO[1]), 3), "no probabilities"),
        (lambda: psrl((TWO[0] * math.nan, TWO[1]), 3), "rewards that are not finite"),
        (lambda: psrl(TWO, 0), "num_episodes=0 must be a whole"),
        (lambda: psrl(TWO, 3, episode_steps=0), "episode_steps=0 must be a whole"),
        (lambda: opsrl(TWO, 3, num_samples=0), "num_samples=0 leaves no MDP"),
        (lambda: mdps.epsilon_greedy(TWO, 3, epsilon=1.5), "epsilon=1.5 is a share"),
        (lambda: beb(TWO, 3, scaling=-1.0), "scaling=-1.0 is not a finite number of at least 0"),
        (lambda: ucrl2(TWO, 3, scaling=math.nan), "scaling=nan is not a finite number"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: psrl([part.numpy() for part in TWO], 3), "rewards is no tensor but ndarray"),
        (lambda: psrl(torch.rand(2, 150), 3), "must be a pair.*unpack_mdps"),
        (lambda: psrl(TWO, 3, 0), "int is no generator"),
    ],
)
def test_input_of_another_kind(call, message):
    with pytest.raises(TypeError, match=message):
        call()
