"""Advantages from regrets: by hand, against rewards that have no noise, and in a batch of whole trials of the recipe's env."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import Compose, TransformedEnv

from recipes import bandit, tabular_mdp
from recipes.command import arguments
from rl2_torchrl import (
    ActorCritic,
    GRUCategoricalActor,
    MemoryValueHead,
    PreviousStep,
    TaskSampler,
    Trial,
    TrialCollector,
)
from rl2_torchrl.baselines import optimal_return
from rl2_torchrl.envs import TabularMDP, pack_mdps, random_mdps, unpack_mdps
from rl2_torchrl.objectives.regret import MDPValues, RegretAdvantage, bandit_values

STAY, GO = [1.0, 0.0], [0.0, 1.0]
# State 0: stay for 1 or go for 0; state 1: stay for 3 or go back for 5.
TASK = pack_mdps(torch.tensor([[1.0, 0.0], [3.0, 5.0]]), torch.tensor([[STAY, GO], [GO, STAY]]))


def batch_of(observation, action, task=TASK):
    shape = torch.tensor(action).shape
    done = torch.zeros(*shape, 1, dtype=torch.bool)
    done[:, -1] = True
    return TensorDict(
        {
            "task": task.expand(*shape, -1),
            "observation": torch.tensor(observation),
            "action": torch.tensor(action),
            "state_value": torch.zeros(*shape, 1),
            "next": {"reward": torch.full((*shape, 1), 7.0), "done": done, "terminated": done.clone()},
        },
        shape,
    )


def small(**options):
    return RegretAdvantage(
        MDPValues(TabularMDP(2, 2, episode_steps=2)), **{"gamma": 1.0, "lmbda": 1.0, "normalize": False, **options}
    )


def test_regrets_by_hand():
    # With two steps left: staying earns 1 + 1, going 0 + 5. With one left, in state 0: 1 or 0; in state 1: 3 or 5.
    batch = batch_of([[0, 0, 0, 1], [0, 0, 0, 1]], [[0, 1, 1, 1], [0, 0, 1, 0]])
    expected = torch.tensor([[3.0, 1.0, 0.0, 0.0], [3.0, 0.0, 0.0, 2.0]])
    torch.testing.assert_close(small().regrets(batch).squeeze(-1), expected)


def test_bandits_by_hand():
    batch = batch_of([[0, 0, 0]], [[0, 1, 2]], torch.tensor([0.5, 0.25, 0.75]))
    one_hot = torch.nn.functional.one_hot(batch["action"], 3)
    for action in (batch["action"], one_hot, one_hot.bool()):
        regrets = RegretAdvantage(bandit_values).regrets(batch.set("action", action))
        assert regrets.squeeze(-1).tolist() == [[0.25, 0.5, 0.0]]


def test_each_row_has_the_regrets_of_its_own_task():
    other = pack_mdps(torch.zeros(2, 2), torch.tensor([[STAY, GO], [GO, STAY]]))
    tasks = torch.stack([other, TASK]).unsqueeze(1).expand(2, 2, -1)
    batch = batch_of([[0, 0], [0, 0]], [[0, 1], [0, 1]], tasks)
    assert small().regrets(batch).squeeze(-1).tolist() == [[0, 0], [3, 1]]


def test_advantages_are_of_regrets_and_the_rewards_stay():
    batch = batch_of([[0, 0, 0, 1]], [[0, 1, 1, 1]])
    assert small()(batch)["advantage"].squeeze().tolist() == [-4, -1, 0, 0]  # across the episode's end after two steps
    assert batch["value_target"].squeeze().tolist() == [-4, -1, 0, 0]
    assert (batch["next", "reward"] == 7).all()
    with pytest.raises(FloatingPointError, match="state_value"):
        small()(batch.set("state_value", batch["state_value"] * torch.nan))
    assert (batch["next", "reward"] == 7).all()


def test_no_whole_episodes():
    with pytest.raises(ValueError, match="3 steps .* of 2 steps"):
        small()(batch_of([[0, 0, 0]], [[0, 0, 0]]))


def test_several_trials_in_a_row():
    tasks = torch.stack([TASK, TASK, TASK + 1, TASK + 1]).unsqueeze(0)
    with pytest.raises(ValueError, match="several tasks"):
        small()(batch_of([[0, 0, 0, 0]], [[0, 0, 0, 0]], tasks))


def test_a_trial_earns_the_optimum_less_its_regrets():
    """Where nothing is left to chance; elsewhere on average (Kakade & Langford 2002, lemma 6.1)."""

    def sure(batch_size, generator):
        tasks = random_mdps()(batch_size, generator).unflatten(-1, (10, 5, 11))
        successors = torch.nn.functional.one_hot(tasks[..., 1:].argmax(-1), 10).float()
        return pack_mdps(tasks[..., 0], successors)

    mdps = TabularMDP(episode_steps=10, noise=0.0, batch_size=(16,), seed=0)
    env = TransformedEnv(mdps, Compose(Trial(episodes=3), TaskSampler(sure, seed=0), PreviousStep()))
    actor = GRUCategoricalActor.from_env(env, hidden_size=4)
    policy = ActorCritic(actor, MemoryValueHead.from_env(env, actor, detach=True))
    keep = [
        "state_value",
        ("next", "reward"),
        ("next", "done"),
        ("next", "terminated"),
        "task",
        "observation",
        "action",
    ]
    batch = next(iter(TrialCollector(env, policy, frames_per_batch=16 * 30, total_frames=16 * 30, keep=keep)))
    earned = batch["next", "reward"].sum(1)
    regrets = RegretAdvantage(MDPValues(env.base_env)).regrets(batch)
    assert regrets.min() >= 0
    optimum = 3 * optimal_return(unpack_mdps(batch["task"][:, 0]), episode_steps=10)
    torch.testing.assert_close(earned.squeeze(-1) + regrets.sum(1).squeeze(-1), optimum, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("recipe", "trial", "steps"), [(bandit, {"pulls": 4}, 4), (tabular_mdp, {"episodes": 2}, 20)], ids=["bandit", "mdp"]
)
def test_recipes_take_regrets_where_asked(recipe, trial, steps, tmp_path, monkeypatch):
    asked, regrets_of = [], RegretAdvantage.regrets

    def recorded(self, batch):
        asked.append(batch.shape)
        return regrets_of(self, batch)

    monkeypatch.setattr(RegretAdvantage, "regrets", recorded)
    sizes = {
        **trial,
        "trials": 4,
        "env_steps": 4 * steps,
        "units": 4,
        "epochs": 1,
        "minibatches": 2,
        "report_tasks": 20,
        "learns_from": "rewards",
        "seen": False,
        "belief": 0.0,
        "optimism": 0.0,
    }
    for regret in (False, True):
        options = {**sizes, "regret": regret, "classical": False, "progress": False, "log_dir": tmp_path / str(regret)}
        recipe.main(**arguments(recipe.main, options))
        assert set(asked) == ({(4, steps)} if regret else set())
