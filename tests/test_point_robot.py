"""PointRobot: moves, rewards and ends by hand; trials whose rows part; the goals."""

import pytest
import torch
from torchrl.envs import Compose, SerialEnv, TransformedEnv

from rl2_torchrl import PreviousStep, TaskSampler, Trial
from rl2_torchrl.envs import PointRobot, goals_on_half_circle
from rl2_torchrl.testing import check_tensor_env, check_trial_env


def played(env, goals, *actions):
    """Places, rewards, terminated and truncated ``[T, B, ...]`` of ``actions`` in every row."""
    env.start(torch.tensor(goals))
    steps = [env.play(torch.tensor(action).expand(*env.batch_size, 2)) for action in actions]
    return [torch.stack(parts) for parts in zip(*((s[0]["observation"], *s[1:]) for s in steps), strict=True)]


def test_moves_are_cut_to_the_longest():
    places, *_ = played(PointRobot(batch_size=(1,)), [[9.0, 9.0]], [1.0, 0.0], [0.5, -1.0], [7.0, -7.0])
    torch.testing.assert_close(places[:, 0], torch.tensor([[0.2, 0.0], [0.3, -0.2], [0.5, -0.4]]))
    places, *_ = played(PointRobot(step_size=0.5, batch_size=(1,)), [[9.0, 9.0]], [1.0, 0.2])
    torch.testing.assert_close(places[:, 0], torch.tensor([[0.5, 0.1]]))


def test_dense_rewards_by_hand():
    # 0.2 a step along x. Row 0: 0.7, 0.5, 0.3 and 0.1 are left; row 1: the hypotenuses to (0.4, 0.3).
    goals = [[0.9, 0.0], [0.4, 0.3]]
    _, rewards, terminated, _ = played(PointRobot(batch_size=(2,)), goals, *[[1.0, 0.0]] * 4)
    expected = torch.tensor([[-0.7, -0.5, -0.3, -0.1], [-(0.13**0.5), -0.3, -(0.13**0.5), -0.5]])
    torch.testing.assert_close(rewards.squeeze(-1).T, expected)
    assert terminated.squeeze(-1).T.tolist() == [[False, False, False, True], [False] * 4]


def test_sparse_rewards_by_hand():
    env = PointRobot(sparse=True, goal_radius=0.35, batch_size=(2,))
    _, rewards, terminated, _ = played(env, [[0.9, 0.0], [0.4, 0.3]], *[[1.0, 0.0]] * 3)
    # Row 0 comes within 0.3 in the third step; row 1 within 0.3 in the second, and away again.
    torch.testing.assert_close(rewards.squeeze(-1).T, torch.tensor([[-0.1, -0.1, 0.9], [-0.1, 0.9, -0.1]]))
    assert terminated.squeeze(-1).T.tolist() == [[False, False, True], [False, True, False]]


def test_an_episode_is_cut_off():
    env = PointRobot(max_episode_steps=3, batch_size=(2,))
    *_, terminated, truncated = played(env, [[0.3, 0.0], [9.0, 0.0]], *[[1.0, 0.0]] * 3)
    assert terminated.squeeze(-1).T.tolist() == [[True, True, False], [False] * 3]
    assert truncated.squeeze(-1).T.tolist() == [[False, False, True]] * 2


def test_who_knows_the_goal_is_there_in_a_few_steps():
    rows = 500
    env, goals = PointRobot(batch_size=(rows,)), goals_on_half_circle()(torch.Size([rows]), torch.Generator())
    env.start(goals)
    place, steps = torch.zeros(rows, 2), torch.zeros(rows)
    arrived = torch.zeros(rows, dtype=torch.bool)
    while not arrived.all():
        steps += ~arrived
        entries, _, terminated, _ = env.play((goals - place) / 0.2)
        place, arrived = entries["observation"], arrived | terminated.squeeze(-1)
    # 0.8 of the way is to be gone, by 0.2 along the axes and by 0.283 along the diagonals.
    assert set(steps.tolist()) <= {3.0, 4.0, 5.0}
    assert 3 < steps.mean() < 4


def test_goals_are_on_the_half_circle_in_all_directions_alike():
    goals = goals_on_half_circle(2.0)(torch.Size([100, 200]), torch.Generator().manual_seed(0))
    torch.testing.assert_close(goals.norm(dim=-1), torch.full((100, 200), 2.0))
    assert (goals[..., 1] >= 0).all()
    angle = torch.atan2(goals[..., 1], goals[..., 0]) / torch.pi
    # U[0, 1] has mean 1/2 and variance 1/12.
    assert angle.mean().item() == pytest.approx(1 / 2, abs=3 / (12 * 20_000) ** 0.5)
    assert angle.square().mean().item() == pytest.approx(1 / 3, abs=3 * (4 / 45 / 20_000) ** 0.5)


@pytest.mark.parametrize("sparse", [False, True])
def test_it_keeps_what_an_env_promises(sparse):
    check_tensor_env(PointRobot(sparse=sparse, max_episode_steps=7, batch_size=(6,)), goals_on_half_circle(0.5))


def trial_env(base, **bounds):
    transforms = Compose(Trial(**bounds), TaskSampler(goals_on_half_circle(0.5), seed=1), PreviousStep())
    return TransformedEnv(base, transforms)


@pytest.mark.parametrize(
    ("batch_size", "bounds"),
    [((), {"episodes": 2}), ((2, 3), {"episodes": 2}), ((4,), {"steps": 12}), ((4,), {"episodes": 3, "steps": 12})],
)
def test_the_trial_contract(batch_size, bounds):
    check_trial_env(trial_env(PointRobot(max_episode_steps=8, batch_size=batch_size), **bounds))


def test_the_trial_contract_with_workers_inside():
    check_trial_env(trial_env(SerialEnv(2, lambda: PointRobot(max_episode_steps=8, batch_size=(2,))), episodes=2))


def test_trials_of_rows_end_at_different_steps():
    env = trial_env(PointRobot(max_episode_steps=8, batch_size=(30,)), episodes=2)
    torch.manual_seed(0)
    data = env.rollout(16, break_when_any_done=False)
    last = data["next", "done"].squeeze(-1).int().argmax(-1)
    assert last.unique().numel() > 3
    for row, end in enumerate(last.tolist()):
        trial = data[row, : end + 1]
        assert trial["next", "episode_done"].sum() == 2
        # The second episode starts at (0, 0), with the first one's last action, reward and end in the input.
        (first,) = trial["next", "episode_done"].squeeze(-1).nonzero()[0].tolist()
        start = trial["trans"][first + 1]
        assert start[:2].tolist() == [0, 0]
        assert torch.equal(start[2:4], trial["action"][first])
        assert torch.equal(start[4:5], trial["next", "reward"][first])
        assert start[5] == 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"step_size": 0.0}, "step_size=0.0.*above 0"),
        ({"goal_radius": -1.0}, "goal_radius=-1.0.*above 0"),
        ({"goal_radius": float("nan")}, "goal_radius=nan"),
        ({"max_episode_steps": 0}, "max_episode_steps=0"),
        ({"batch_size": (0,)}, "holds no env"),
    ],
)
def test_impossible_sizes(kwargs, message):
    with pytest.raises(ValueError, match=message):
        PointRobot(**kwargs)
