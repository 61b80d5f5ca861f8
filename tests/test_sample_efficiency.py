"""Other programs on our trials: they see and earn what our agent does, and the page holds what they learnt."""

import json
import sys

import pytest
import torch
from matplotlib.figure import Figure
from tensordict import TensorDict
from torchrl.envs import Compose, TransformedEnv

from recipes import sample_efficiency
from recipes.other_programs import PROGRAMS, PlainRL2, trial_return
from recipes.sample_efficiency import WORLDS
from recipes.settings import Learning
from rl2_torchrl import PreviousStep, TaskSampler, Trial, TrialAdvantage

LEARNING = Learning(trials=8, env_steps=1, gamma=0.9, lmbda=0.7, epochs=2, minibatches=2)
TINY = {"env_steps": 200, "trials": 32, "seeds": (0,)}


@pytest.mark.parametrize("name", WORLDS)
def test_they_see_and_earn_what_our_agent_does(name):
    world = WORLDS[name]
    tasks = world.tasks(torch.Size([4]), torch.Generator().manual_seed(0))
    ours = world.make_env(4, 3)
    ours = TransformedEnv(ours, Compose(Trial(episodes=world.episodes), TaskSampler.fixed(tasks), PreviousStep()))
    theirs = world.trials(4, 0, lambda batch_size, generator: tasks)
    theirs.env.set_seed(3)
    td, entries, done = ours.reset(), theirs.begin(), False
    for _ in range(theirs.steps):
        assert not done
        torch.testing.assert_close(entries, td["trans"])
        action = ours.action_spec.rand()
        td, after = ours.step_and_maybe_reset(td.set("action", action))[::-1]
        entries, reward, done = theirs.step(action)
        torch.testing.assert_close(reward, after["next", "reward"].squeeze(-1))
    assert done
    assert after["next", "done"].all()


def test_advantages_by_hand_flow_across_episodes_as_ours_do():
    torch.manual_seed(0)
    trials = WORLDS["grid_navi"].trials(6, 0)
    learner = PlainRL2(trials, LEARNING, 0)
    rewards, step = [], trials.step
    trials.step = lambda action: rewards.append(step(action)) or rewards[-1]
    *_, advantage, target = learner._rollout()
    value = (target - advantage).t().unsqueeze(-1)
    ends = torch.zeros(6, trials.steps, 1, dtype=torch.bool)
    ends[:, -1] = True
    batch = {
        "reward": torch.stack([reward for _, reward, _ in rewards], 1).unsqueeze(-1),
        "done": ends,
        "terminated": ends,
    }
    following = TensorDict(batch, [6, trials.steps])
    data = TensorDict({"state_value": value, "next": following, "is_init": ends.roll(1, 1)}, [6, trials.steps])
    expected = TrialAdvantage(gamma=0.9, lmbda=0.7, normalize=False)(data)["advantage"].squeeze(-1).t()
    torch.testing.assert_close(advantage, expected)


def always_pays(batch_size, generator):
    """Bandits whose first arm always pays, and no other."""
    return torch.eye(5)[0].expand(*batch_size, 5)


@pytest.mark.parametrize("name", PROGRAMS)
def test_they_learn(name):
    if name == "sb3":
        pytest.importorskip("sb3_contrib")
    torch.manual_seed(0)
    trials = WORLDS["bandit"].trials(32, 0, always_pays)
    steps = 30 * 32 * trials.steps
    learner = PROGRAMS[name](trials, Learning(lr=1e-2, gamma=0.5, lmbda=0.5, minibatches=2, entropy=0.0), steps)
    seen = []
    learner.learn(seen.append)
    assert seen == list(range(320, steps + 1, 320))
    assert trial_return(WORLDS["bandit"].trials(32, 1, always_pays), learner.act) > 9


@pytest.mark.parametrize("name", PROGRAMS)
def test_their_entropy_bonus_decays_as_ours(name, monkeypatch):
    trials, weights = WORLDS["bandit"].trials(8, 0), []
    if name == "sb3":
        sb3 = pytest.importorskip("sb3_contrib")
        monkeypatch.setattr(sb3.RecurrentPPO, "train", lambda model: weights.append(model.ent_coef))
    else:
        monkeypatch.setattr(
            PROGRAMS[name], "_update", lambda self, *batch_and_weight: weights.append(batch_and_weight[-1])
        )
    learning = Learning(entropy=0.4, entropy_decay="late", minibatches=2)
    PROGRAMS[name](trials, learning, 2 * 8 * trials.steps).learn(lambda env_steps: None)
    assert weights == pytest.approx([0.4, 0.3])  # 1 - p² of it, half-way


def test_the_page_holds_what_was_learnt_and_nothing_is_learnt_twice(tmp_path, monkeypatch):
    paint = Figure.savefig  # what the page shows alone: the runs' figures are of the recipes' tests
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda figure, path, **how: paint(figure, path, **how) if path.name == "page.png" else path.touch(),
    )
    where = {"programs": ("rl2_torchrl", "plain"), "folder": tmp_path / "runs", "page": tmp_path / "page.md"}
    page = sample_efficiency.main(**where, **TINY).read_text()
    assert (tmp_path / "page.png").stat().st_size > 10_000
    for world in WORLDS:
        [runs] = (tmp_path / "runs").glob(f"{world}_*_32_1")
        report = json.loads((runs / "plain" / "seed0" / "report.json").read_text())
        assert f"| {sample_efficiency.NAMES['plain']} | {report['agent']['mean']:.3f} |" in page
        ours = json.loads((runs / "rl2_torchrl" / "seed0" / "report.json").read_text())
        assert ours["title"].endswith("(rewards only)")  # as the others learn from
    monkeypatch.setattr(sample_efficiency, "learn", lambda *args: pytest.fail("learnt again"))
    assert sample_efficiency.main(**where, **TINY).read_text() == page


@pytest.mark.usefixtures("unpainted")
def test_trainings_of_another_length_are_others(tmp_path):
    where = {"programs": ("plain",), "worlds": ("bandit",), "folder": tmp_path / "runs", "page": tmp_path / "page.md"}
    sample_efficiency.main(**where, **{**TINY, "seeds": (0, 1)})
    # Of the seeds that are asked for alone: a mean of several would have an error.
    assert sample_efficiency.OF_SEEDS in (tmp_path / "page.md").read_text()
    assert "±" not in sample_efficiency.main(**where, **TINY).read_text()
    for another in ({"threads": 2}, {"env_steps": 700}):
        sample_efficiency.main(**where, **{**TINY, **another})
    trained = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert trained == ["bandit_320_32_1", "bandit_320_32_2", "bandit_960_32_1"]
    with pytest.raises(ValueError, match="seeds is empty"):
        sample_efficiency.main(**where, seeds=())
    with pytest.raises(ValueError, match=r"seeds=\(0, 0\): each seed once"):
        sample_efficiency.main(**where, **{**TINY, "seeds": (0, 0)})


def test_minutes_are_means_of_the_seeds_and_each_is_looked_at_to_its_end(tmp_path):
    def run(seed, minutes, returns):
        steps = range(1, len(returns) + 1)
        rows = [{"env_steps": 1e6 * n, "time/seconds": 60 * minutes * n / len(returns)} for n in steps]
        rows = [row | {"eval/trial_return": value} for row, value in zip(rows, returns, strict=True)]
        (folder := tmp_path / f"seed{seed}").mkdir()
        (folder / "report.json").write_text(
            json.dumps({"train": {"history": rows}, "agent": {"mean": 0}, "title": "one"})
        )
        return folder

    # 95 % of 6.66 after the whole of 4 minutes, of 8, and never.
    runs = [run(0, 4, [1.0, 6.5]), run(1, 8, [1.0, 6.5]), run(2, 6, [1.0, 2.0])]
    page = sample_efficiency.figures({("bandit", "plain"): runs}, "bandit", ("plain",))
    *_, to_95, in_all, rate = [cell.strip() for cell in page.splitlines()[-1].split("|")[1:-1]]
    assert to_95 == "6.00 (2 of 3 seeds)"
    assert in_all == "6.00"
    assert float(rate) == pytest.approx(2e6 / 360 / 1e3, abs=0.05)


@pytest.mark.usefixtures("unpainted")
def test_all_programs_are_evaluated_after_the_same_updates(tmp_path):
    where = {"programs": ("rl2_torchrl", "plain"), "worlds": ("bandit",), "folder": tmp_path, "page": tmp_path / "p.md"}
    sample_efficiency.main(**where, env_steps=22 * 80, trials=8, seeds=(0,))
    reports = [json.loads(path.read_text()) for path in tmp_path.glob("*/*/seed0/report.json")]
    evaluated = [
        [row["env_steps"] for row in report["train"]["history"] if "eval/trial_return" in row] for report in reports
    ]
    assert evaluated == [[80, 21 * 80, 22 * 80]] * 2


def test_what_cannot_be_trained_is_refused_before_anything_is(tmp_path, monkeypatch):
    monkeypatch.setattr(sample_efficiency, "train", lambda *args, **how: pytest.fail("trained"))
    where = {"folder": tmp_path / "runs", "page": tmp_path / "page.md"}
    for bad, message in (
        ({"worlds": ()}, "worlds is empty"),
        ({"programs": ()}, "programs is empty"),
        ({"trials": 0}, "trials=0"),
        ({"env_steps": 0}, "env_steps=0"),
    ):
        with pytest.raises(ValueError, match=message):
            sample_efficiency.main(**where, **{**TINY, "programs": ("plain",), **bad})
    monkeypatch.setitem(sys.modules, "sb3_contrib", None)
    with pytest.raises(ModuleNotFoundError, match="or name other programs"):
        sample_efficiency.main(**where, **TINY)
    assert not (tmp_path / "runs").exists()
