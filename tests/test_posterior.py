"""What a trial has shown of the task: counted beside real trials, and what the advantages and the memory make of it."""

import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import Compose, TransformedEnv

from recipes.posterior import (
    CountBonusAdvantage,
    Posterior,
    PosteriorAdvantage,
    PosteriorBelief,
    RisingOptimism,
    beta_moments,
    normal_moments,
    sample_moments,
)
from recipes.settings import Told
from rl2_torchrl import PreviousStep, TaskSampler, Trial, TrialAdvantage
from rl2_torchrl.envs import BernoulliBandit, TabularMDP, random_mdps, uniform_means

ROWS = 6


def bandits(rows=ROWS, pulls=8):
    sampler = TaskSampler(uniform_means(3), seed=1)
    return TransformedEnv(
        BernoulliBandit(3, batch_size=(rows,), seed=0), Compose(Trial(episodes=pulls), sampler, PreviousStep())
    )


def mdps(rows=ROWS):
    sampler = TaskSampler(random_mdps(), seed=1)
    worlds = TabularMDP(episode_steps=4, batch_size=(rows,), seed=0)
    return TransformedEnv(worlds, Compose(Trial(episodes=5), sampler, PreviousStep()))


KINDS = {
    "bandits": (bandits, Posterior(beta_moments, num_actions=3)),
    "mdps": (mdps, Posterior(normal_moments, num_actions=5, num_states=10)),
}


def played(env, num_actions, steps):
    """A trial of random actions in each row, ``[N, T]``, and what had been seen of each action in each state before each step."""
    td, rows, entries, seen = env.reset(), env.batch_size[0], [], [[{} for _ in range(env.batch_size[0])]]
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        action = torch.randint(num_actions, (rows,), generator=generator)
        before, after = td.clone(), env.step(td.set("action", action))["next"]
        reward = after["reward"].squeeze(-1).tolist()
        place = before["observation"].tolist() if "observation" in before.keys() else [0] * rows
        latest = [{key: list(rewards) for key, rewards in row.items()} for row in seen[-1]]
        for row, key in enumerate(zip(place, action.tolist(), strict=True)):
            latest[row].setdefault(key, []).append(reward[row])
        seen.append(latest)
        ends = {key: after[key] for key in ("reward", "done", "terminated")}
        value = torch.zeros(rows, 1)
        step = {
            "trans": before["trans"],
            "action": action,
            "place": torch.tensor(place),
            "state_value": value,
            "next": ends,
        }
        entries.append(TensorDict(step, [rows]))
        td = after
    return torch.stack(entries, 1), seen[:-1]


def by_hand(kind, rewards, optimism=0.0):
    number = len(rewards)
    mean = (1 + sum(rewards)) / ((2 if kind == "bandits" else 1) + number)
    variance = mean * (1 - mean) / (3 + number) if kind == "bandits" else 1 / (1 + number)
    return mean + optimism * math.sqrt(variance)


@pytest.mark.parametrize("optimism", [0.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_was_seen_before_each_step(kind, optimism):
    make, posterior = KINDS[kind]
    posterior = Posterior(posterior.of_rewards, posterior.num_actions, posterior.num_states, optimism)
    steps = 8 if kind == "bandits" else 20
    batch, seen = played(make(), posterior.num_actions, steps)
    means = posterior(batch["trans"])
    assert means.shape == (ROWS, steps, posterior.num_states * posterior.num_actions)
    for step, rows in enumerate(seen):
        for row, known in enumerate(rows):
            pairs = [divmod(pair, posterior.num_actions) for pair in range(means.shape[-1])]
            assert means[row, step].tolist() == pytest.approx(
                [by_hand(kind, known.get(pair, []), optimism) for pair in pairs], abs=1e-5
            )


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_are_of_the_means_of_the_actions_that_were_taken(kind):
    make, posterior = KINDS[kind]
    batch, seen = played(make(), posterior.num_actions, 8 if kind == "bandits" else 20)
    advantage = PosteriorAdvantage(posterior, gamma=1.0, lmbda=1.0, normalize=False)
    to_go = advantage(batch)["advantage"].squeeze(-1)
    for row in range(ROWS):
        places, actions = batch["place"][row].tolist(), batch["action"][row].tolist()
        taken = [
            by_hand(kind, known[row].get(pair, []))
            for known, pair in zip(seen, zip(places, actions, strict=True), strict=True)
        ]
        for step in range(len(taken)):
            assert to_go[row, step].item() == pytest.approx(sum(taken[step:]), abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_bonuses_are_for_what_the_trial_has_seldom_tried(kind):
    make, posterior = KINDS[kind]
    seldom = Posterior(sample_moments, posterior.num_actions, posterior.num_states, optimism=0.5)
    batch, seen = played(make(), posterior.num_actions, 8 if kind == "bandits" else 20)
    advantage = CountBonusAdvantage(seldom, gamma=0.0, lmbda=0.0, normalize=False)
    assert "task" not in advantage.in_keys
    earned = advantage(batch)["advantage"].squeeze(-1)
    for row in range(ROWS):
        pairs = zip(batch["place"][row].tolist(), batch["action"][row].tolist(), strict=True)
        numbers = [len(known[row].get(pair, [])) for known, pair in zip(seen, pairs, strict=True)]
        bonuses = [0.5 / math.sqrt(1 + number) for number in numbers]
        rewards = batch["next", "reward"][row, :, 0].tolist()
        assert earned[row].tolist() == pytest.approx(
            [sum(each) for each in zip(rewards, bonuses, strict=True)], abs=1e-5
        )


def test_one_thing_at_most_stands_for_rewards():
    for two in ({"regret": True, "seen": True}, {"posterior": True, "seen": True}, {"regret": True, "posterior": True}):
        with pytest.raises(ValueError, match="one alone"):
            Told(**two)
    with pytest.raises(ValueError, match=r"optimism=0.3.*without posterior=True or seen=True"):
        Told(optimism=0.3)


def test_the_means_are_as_much_as_the_rewards():
    """In expectation; of 4,000 trials of 8 pulls the rewards less the means sum to 0 with a standard error of 0.026."""
    posterior = KINDS["bandits"][1]
    batch, _ = played(bandits(rows=4000), 3, 8)
    more = batch["next", "reward"] - posterior.of_actions(batch["trans"], batch["action"])
    assert abs(more.sum(1).mean()) < 0.1
    assert 0.4 < more.std() < 0.55  # the noise that is left out: of a success with chances from U[0, 1]


def test_what_it_stands_for():
    posterior = KINDS["mdps"][1]
    [term] = Told(belief=3.0, posterior=True).terms(4, 50, posterior=posterior)
    assert term.in_keys == ["actor_features", "trans"]
    with torch.no_grad():
        term.layer.weight.zero_()
        term.layer.bias.fill_(1.0)  # at a trial's start all means are 1
        term.is_fitted.fill_(True)
    trans = torch.zeros(2, 1, 17)
    assert term(torch.zeros(2, 1, 4), trans)["loss_belief"].item() == pytest.approx(0.0)
    assert Told(posterior=True).terms(4, 50, posterior=posterior) == []
    ways = (Told(posterior=True), Told(regret=True), Told(), Told(seen=True))
    made = [type(told.advantage(len, posterior, gamma=1.0)) for told in ways]
    assert made[0] is PosteriorAdvantage
    assert made[2] is TrialAdvantage
    assert made[3] is CountBonusAdvantage
    assert len(set(made)) == 4
    assert Told(seen=True).moments(normal_moments) is sample_moments
    assert Told(posterior=True).moments(normal_moments) is normal_moments


def test_what_a_memory_holds_is_told_from_the_first_minibatch_on():
    """Of features that the posterior means are a linear function of: a random layer errs by the means' own size, 1."""
    posterior = KINDS["mdps"][1]
    batch, _ = played(mdps(rows=40), 5, 20)
    trans, generator = batch["trans"], torch.Generator().manual_seed(0)
    features = posterior(trans) @ torch.randn(50, 64, generator=generator)
    term, random = (PosteriorBelief(64, posterior, coefficient=2.0) for _ in range(2))
    random.is_fitted.fill_(True)
    assert random(features, trans)["belief_error"] > 0.5
    first = term(features.requires_grad_(), trans)
    assert first["belief_error"] < 0.01
    assert first["loss_belief"].item() == pytest.approx(2 * first["belief_error"].item())
    first["loss_belief"].backward()
    assert features.grad.abs().max() > 0
    weight = term.layer.weight.clone()
    term(features.flip(0), trans)  # another minibatch: what was learnt since is not undone
    assert torch.equal(term.layer.weight, weight)
    assert term.state_dict()["is_fitted"]


def test_optimism_rises_in_mid_training_and_goes_on_where_it_stood():
    def begun(after):
        posterior = Posterior(beta_moments, num_actions=3, optimism=0.8)
        return posterior, RisingOptimism(posterior, after)

    posterior, rising = begun(0.3)
    stood = [posterior.optimism]
    for progress in (0.2, 0.3, 0.45, 0.6, 1.0):
        assert rising.after_update({}, progress) == {"train/optimism": posterior.optimism}
        stood.append(posterior.optimism)
    assert stood == pytest.approx([0.0, 0.0, 0.0, 0.4, 0.8, 0.8])
    other, resumed = begun(0.3)
    resumed.load_state_dict(rising.state_dict())
    assert other.optimism == pytest.approx(0.8)
    assert begun(0.0)[0].optimism == pytest.approx(0.8)
    with pytest.raises(ValueError, match="optimism_after=0.6"):
        begun(0.6)
