"""Measures: what a curve takes of an episode's steps beside their rewards."""

import pytest
import torch
from evaluation_cases import bandit_env
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import (
    Compose,
    RewardSum,
    StepCounter,
    Transform,
    TransformedEnv,
)

from rl2_torchrl import (
    GRUCategoricalActor,
    PreviousStep,
    TaskSampler,
    Trial,
    adaptation_curve,
)
from rl2_torchrl.envs import GridNavi, TensorEnv, grid_goals


def test_a_measure_that_an_inner_reset_overwrites_is_refused():
    class Reaches(TensorEnv):
        """Every episode succeeds, in its third step, its last."""

        def __init__(self):
            specs = {"observation_spec": Unbounded(1), "action_spec": Categorical(2), "task_spec": None}
            super().__init__(**specs, more_spec=Composite(success=Unbounded(1)), max_episode_steps=3, batch_size=(2,))

        def begin(self, task, rows):
            return torch.zeros(2, 1), torch.zeros(2, 1)

        def advance(self, state, action):
            return state + 1, state, torch.zeros_like(state), None, None

        def observe_more(self, state):
            return {"success": (state == 3).float()}

    def successes(how, **trial):
        env = TransformedEnv(Reaches(), Compose(Trial(**trial), PreviousStep(["observation"])))
        actor = GRUCategoricalActor.from_env(env, hidden_size=4)
        return adaptation_curve(env, actor, 2, measures={"success": how}).measures["success"].per_episode.tolist()

    for how in ("max", "last"):  # it would be 0 in the first episode, 1 in the last: as if the agent had learnt
        with pytest.raises(
            ValueError, match=r"\['success'\], which an inner reset overwrites.*step_keys=\['success'\]"
        ):
            successes(how, episodes=2)
        assert successes(how, episodes=2, step_keys=["success"]) == [1.0, 1.0]
    assert successes("max", episodes=1) == [1.0]


class Doubled(Transform):
    """An entry of its own, made of the observation."""

    def __init__(self):
        super().__init__(in_keys=["observation"], out_keys=["doubled"])

    def _apply_transform(self, observation):
        return 2.0 * observation.unsqueeze(-1)

    def _reset(self, _, after):
        return self._call(after)

    def transform_observation_spec(self, spec):
        spec["doubled"] = Unbounded((*spec["observation"].shape, 1))
        return spec


@pytest.mark.parametrize(
    ("below", "behind", "lost"),
    [
        ([StepCounter()], [], "step_count"),  # which its own step reads, as a reset gives it
        ([RewardSum()], [], "episode_reward"),
        ([], [Doubled()], "doubled"),
        ([Doubled()], [], "doubled"),
    ],
)
def test_a_measure_of_what_a_transform_makes_is_refused_where_an_inner_reset_overwrites_it(below, behind, lost):
    base = TransformedEnv(GridNavi(size=3, episode_steps=2, batch_size=(2,)), Compose(*below))
    trial = [Trial(episodes=2), TaskSampler(grid_goals(3)), *behind, PreviousStep(["observation"])]
    env = TransformedEnv(base, Compose(*trial), auto_unwrap=False)
    actor = GRUCategoricalActor.from_env(env, hidden_size=4)
    with pytest.raises(ValueError, match=rf"\['{lost}'\], which an inner reset overwrites"):
        adaptation_curve(env, actor, 2, measures={lost: "last"})


def test_a_measure_that_is_not_finite_is_an_error():
    class Unknown(Transform):
        """A number that only the first of two rows has."""

        def _step(self, _, after):
            return after.set("distance", torch.tensor([[1.0], [torch.nan]]))

        def _reset(self, _, after):
            return after.set("distance", torch.ones(2, 1))

        def transform_observation_spec(self, spec):
            spec["distance"] = Unbounded((2, 1))
            return spec

    env = bandit_env(rows=2, pulls=2)
    env.append_transform(Unknown())
    actor = GRUCategoricalActor.from_env(env, hidden_size=4)
    for kept in (["distance"], ["reward", "distance"]):
        with pytest.raises(
            FloatingPointError, match="the distance is nan in row 1, episode 0 of trial 1.*Mend the env"
        ):
            adaptation_curve(env, actor, 2, measures=dict.fromkeys(kept, "mean"))
    assert adaptation_curve(env, actor, 1, measures={"distance": "mean"}).measures["distance"].mean == 2.0


def test_measures_are_made_of_an_episodes_steps():
    class Said(
        TensorEnv
    ):  # episodes of three steps, in which step t of episode e of row n says 10 e + (1, 3, 2)[t] + 100 n
        def __init__(self, **kwargs):
            specs = {"observation_spec": Unbounded(1), "action_spec": Categorical(2), "task_spec": None}
            more = Composite(info=Composite(said=Unbounded(1)))
            super().__init__(**specs, more_spec=more, max_episode_steps=3, fixed_length=True, **kwargs)
            self.episode = -1

        def begin(self, task, rows):
            self.episode += 1
            return torch.zeros(*self.batch_size, 1), torch.zeros(*self.batch_size, 1)

        def advance(self, state, action):
            return state + 1, state, torch.zeros_like(state), None, None

        def observe_more(self, state):
            said = torch.tensor([0.0, 1.0, 3.0, 2.0])[state.long()]
            return {("info", "said"): said + 10 * self.episode + 100 * torch.arange(2).unsqueeze(-1)}

    expected = {"max": 3.0, "last": 2.0, "mean": 2.0, "sum": 6.0}
    for how, first in expected.items():
        env = TransformedEnv(Said(batch_size=(2,)), Compose(Trial(episodes=2), PreviousStep()))
        actor = GRUCategoricalActor.from_env(env, hidden_size=4)
        curve = adaptation_curve(env, actor, 2, measures={("info", "said"): how})
        steps = 3 if how == "sum" else 1
        rows = [[first, first + 10 * steps], [first + 100 * steps, first + 110 * steps]]
        assert curve.measures["said"].returns.tolist() == rows, how
        assert torch.equal(curve.returns, torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(KeyError, match="which the env does not say"):
        adaptation_curve(env, actor, 2, measures={("info", "other"): "max"})
    with pytest.raises(ValueError, match="one of two would be lost"):
        adaptation_curve(env, actor, 2, measures={("info", "said"): "max", ("other", "said"): "max"})
    with pytest.raises(ValueError, match=r"several numbers each, \{'trans': \(5,\)\}; a measure is one number"):
        adaptation_curve(env, actor, 2, measures={"trans": "max"})
    with pytest.raises(ValueError, match="choose of"):
        adaptation_curve(env, actor, 2, measures={("info", "said"): "best"})
    with pytest.raises(TypeError, match=r"measures=\['reward'\] does not say what is taken of an episode's steps"):
        adaptation_curve(env, actor, 2, measures=["reward"])
