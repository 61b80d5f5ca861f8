"""GridNavi: moves and rewards by hand, the ceiling of a known goal, the goals, the trial contract, rollouts."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import Compose, TransformedEnv

from rl2_torchrl import (
    ActorCritic,
    GRUCategoricalActor,
    MemoryValueHead,
    PreviousStep,
    TaskSampler,
    Trial,
    TrialCollector,
)
from rl2_torchrl.envs import GridNavi, grid_goals
from rl2_torchrl.testing import check_trial_env

STAY, UP, RIGHT, DOWN, LEFT = range(5)
GOALS = torch.tensor([[x, y] for x in range(5) for y in range(5) if x > 1 or y > 1]).float()


def play(env, goals, act):
    """Rewards and cells ``[B, T]`` of an episode in which ``act(cell)`` chooses the actions, by the env's TensorDicts."""
    tensordict = env.reset(TensorDict({"task": goals}, env.batch_size)).set("task", goals)
    rewards, cells = [], [tensordict["observation"]]
    while not tensordict["done"].any():
        tensordict = env.step(tensordict.set("action", act(cells[-1])))["next"].set("task", goals)
        rewards.append(tensordict["reward"].squeeze(-1))
        cells.append(tensordict["observation"].clone())
    assert tensordict["done"].all()
    return torch.stack(rewards, -1), torch.stack(cells, -1)


def shortest_path(goals, size=5):
    """Right until the column is the goal's, then up."""
    x, y = goals.long().unbind(-1)

    def act(cell):
        right, up = cell % size < x, cell // size < y
        return torch.where(right, RIGHT, torch.where(up, UP, STAY))

    return act


def script(*actions):
    actions = iter(actions)
    return lambda cell: torch.full_like(cell, next(actions))


def test_moves_by_hand():
    env = GridNavi(batch_size=(1,), episode_steps=9)
    _, cells = play(env, torch.tensor([[4.0, 4.0]]), script(UP, UP, RIGHT, STAY, DOWN, LEFT, LEFT, DOWN, DOWN))
    # (0, 0), up (0, 1) = 5, up 10, right (1, 2) = 11, stay, down (1, 1) = 6, left (0, 1) = 5, the wall: 5, down 0, wall.
    assert cells[0].tolist() == [0, 5, 10, 11, 11, 6, 5, 5, 0, 0]
    _, cells = play(GridNavi(batch_size=(1,)), torch.tensor([[0.0, 2.0]]), script(*[RIGHT] * 5, *[UP] * 10))
    # Along the lower wall to (4, 0), up to (4, 4) = 24, and no further.
    assert cells[0].tolist() == [0, 1, 2, 3, 4, 4, 9, 14, 19, 24, 24, 24, 24, 24, 24, 24]


def test_rewards_by_hand():
    env = GridNavi(batch_size=(2,), episode_steps=5)
    # Up, up, right: (1, 2). Staying pays again, leaving costs again. A mirrored goal, (2, 1), is none.
    rewards, _ = play(env, torch.tensor([[1.0, 2.0], [2.0, 1.0]]), script(UP, UP, RIGHT, STAY, UP))
    assert rewards[0].tolist() == pytest.approx([-0.1, -0.1, 1, 1, -0.1])
    assert rewards[1].tolist() == pytest.approx([-0.1] * 5)


def test_known_goal_ceiling():
    returns = play(GridNavi(batch_size=(21,)), GOALS, shortest_path(GOALS))[0].sum(-1)
    # d steps to the goal, of which d - 1 end elsewhere: 15 - (d - 1) rewards of 1 and d - 1 of -0.1.
    distance = GOALS.sum(-1)
    torch.testing.assert_close(returns, 15 - 1.1 * (distance - 1))
    # Nearest d = 2: 14 - 0.1; farthest d = 8: 8 - 0.7. Distances 2 to 8 have 2, 4, 5, 4, 3, 2, 1 goals:
    # 4 + 12 + 20 + 20 + 18 + 14 + 8 = 96 steps in all, 15 - 1.1 (96 / 21 - 1) = 11.071.
    assert returns.max().item() == pytest.approx(13.9)
    assert returns.min().item() == pytest.approx(7.3)
    assert returns.mean().item() == pytest.approx(11.0714, abs=1e-4)


def test_goals_are_all_cells_away_from_the_start_alike():
    number = 42_000
    goals = grid_goals()(torch.Size([number]), torch.Generator().manual_seed(0))
    assert goals.dtype == torch.float32
    found, counts = goals.unique(dim=0, return_counts=True)
    assert torch.equal(found, GOALS)
    # 2,000 of each expected, deviation sqrt(42,000 * 1/21 * 20/21) = 43.6.
    assert ((counts - 2000).abs() < 4 * 43.6).all()
    assert grid_goals(3)(torch.Size([2, 50]), torch.Generator()).flatten(0, 1).unique(dim=0).shape == (5, 2)


@pytest.mark.parametrize("batch_size", [(), (5,), (2, 3)])
def test_contract(batch_size):
    trial = Compose(Trial(episodes=4), TaskSampler(grid_goals(), seed=0), PreviousStep())
    check_trial_env(TransformedEnv(GridNavi(batch_size=batch_size), trial))


def test_rollout_plays_the_same_steps():
    rows, episodes = 50, 2
    trial = Compose(Trial(episodes=episodes), TaskSampler(grid_goals(), seed=0), PreviousStep())
    env = TransformedEnv(GridNavi(batch_size=(rows,)), trial)
    actor = GRUCategoricalActor.from_env(env, hidden_size=8)
    policy = ActorCritic(actor, MemoryValueHead.from_env(env, actor, detach=True, extra_keys=["task"]))
    keep = ["trans", "action", "task", "state_value", ("next", "reward")]
    collector = TrialCollector(env, policy, frames_per_batch=rows * 30, total_frames=-1, keep=keep)
    assert (collector.backend, collector.reason) == ("tensors", None)
    batch = next(iter(collector))
    assert len(batch["task"][:, 0].unique(dim=0)) > 10
    for episode in range(episodes):
        steps = slice(15 * episode, 15 * (episode + 1))
        actions = iter(batch["action"][:, steps].unbind(1))
        goals = batch["task"][:, 0].clone()
        rewards, cells = play(GridNavi(batch_size=(rows,)), goals, lambda cell, actions=actions: next(actions))
        assert torch.equal(rewards, batch["next", "reward"][:, steps].squeeze(-1))
        assert torch.equal(cells[:, :-1], batch["trans"][:, steps, :25].argmax(-1))


def test_a_checkpoint_goes_on_in_the_middle_of_an_episode():
    goals = GOALS[:3]
    env, resumed = GridNavi(batch_size=(3,)), GridNavi(batch_size=(3,))
    tensordict = env.reset(TensorDict({"task": goals}, [3])).set("task", goals)
    env.step(tensordict.set("action", torch.tensor([UP, RIGHT, STAY])))
    resumed.load_state_dict(env.state_dict())
    after = resumed.step(tensordict.set("action", torch.full((3,), UP)))["next", "observation"]
    assert after.tolist() == [10, 6, 5]
    assert resumed._row_steps().flatten().tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GridNavi(0), "size=0.*at least 1"),
        (lambda: GridNavi(episode_steps=0), "episode_steps=0"),
        (lambda: grid_goals(2), "below 3×3 has no cell"),
    ],
)
def test_bad_sizes(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("goal", [(5.0, 0.0), (-1.0, 2.0), (1.5, 2.0), (float("nan"), 1.0)])
def test_a_goal_that_is_no_cell_is_refused(goal):
    env = GridNavi(batch_size=(2,))
    with pytest.raises(ValueError, match=r"is no cell of a grid of 5 by 5, .*grid_goals\(5\)"):
        env.reset(TensorDict({"task": torch.tensor([(1.0, 2.0), goal])}, [2]))
    env.reset(TensorDict({"task": torch.tensor([(1.0, 2.0), (4.0, 4.0)])}, [2]))


def test_an_action_that_does_not_exist_is_refused():
    env = GridNavi(batch_size=(2,))
    env.start(torch.full((2, 2), 2.0))
    with pytest.raises(IndexError):
        env.play(torch.tensor([0, 5]))
