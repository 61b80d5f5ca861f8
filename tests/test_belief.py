"""`TaskBelief`: by hand, its gradient into the actor's memory, and that the memory comes to hold the posterior mean."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import Compose, TransformedEnv
from torchrl.modules import set_recurrent_mode
from update_cases import make_batch

from rl2_torchrl import (
    ActorCritic,
    GRUCategoricalActor,
    GRUValueHead,
    MemoryValueHead,
    PPOUpdate,
    PreviousStep,
    RL2PPOLoss,
    TaskSampler,
    Trial,
    TrialCollector,
)
from rl2_torchrl.envs import BernoulliBandit, TensorEnv, uniform_means
from rl2_torchrl.objectives import TaskBelief


def test_a_task_is_read_whole_and_in_part():
    class Labelled(TensorEnv):
        def __init__(self):
            task = Composite(means=Unbounded(3), labels=Unbounded(2))
            spaces = {"observation_spec": Unbounded(1), "action_spec": Categorical(3)}
            super().__init__(task_spec=task, **spaces, max_episode_steps=2, batch_size=(4,))

        def begin(self, task, rows):
            return task["means"], task["labels"][..., :1]

        def advance(self, state, action):
            return state, state[..., :1], state.gather(-1, action.unsqueeze(-1)), None, None

    def tasks(batch_size, generator):
        sizes = {"means": 3, "labels": 2}
        return TensorDict(
            {name: torch.rand(*batch_size, n, generator=generator) for name, n in sizes.items()}, batch_size
        )

    for rollout in ("tensors", "tensordicts"):
        env = TransformedEnv(Labelled(), Compose(Trial(episodes=2), TaskSampler(tasks), PreviousStep()))
        actor = GRUCategoricalActor.from_env(env, hidden_size=8)
        critic = GRUValueHead.from_env(env, extra_keys=[("task", "labels")], hidden_size=8)
        belief = TaskBelief(8, 3, target=lambda task: task["means"])
        update = PPOUpdate(RL2PPOLoss(actor, critic, terms=[belief]), epochs=1, bptt=4)
        frames = {"frames_per_batch": 16, "total_frames": 16}
        collector = TrialCollector(env, ActorCritic(actor, critic), keep=update.in_keys, rollout=rollout, **frames)
        batch = next(iter(collector))
        assert {("task", "means"), ("task", "labels")} <= set(batch.keys(True, True))
        assert update(batch)["loss_belief"] > 0
    whole = PPOUpdate(RL2PPOLoss(actor, critic, terms=[TaskBelief(8, 5)]), epochs=1, bptt=4)
    with pytest.raises(TypeError, match=r"the task has several entries, \['labels', 'means'\]: .* target=lambda task"):
        whole(batch)


@pytest.mark.parametrize("key", ["actor_hidden", "critic_hidden"])
def test_a_memory_as_it_was_collected_has_no_gradient_to_tell_by(key):
    actor, critic = GRUCategoricalActor(5, 3, hidden_size=4), GRUValueHead(5, hidden_size=4)
    update = PPOUpdate(RL2PPOLoss(actor, critic, terms=[TaskBelief(4, 5, features_key=key)]))
    with pytest.raises(ValueError, match="target_size gives"):
        update(make_batch().set("task", torch.zeros(4, 6, 5)))


def test_features_of_another_size_are_told():
    actor, critic = GRUCategoricalActor(5, 3, hidden_size=4), GRUValueHead(5, hidden_size=4)
    update = PPOUpdate(RL2PPOLoss(actor, critic, terms=[TaskBelief(8, 5)]))
    with pytest.raises(
        ValueError, match="features_size=8, and the actor's features are 4 numbers: give its hidden_size"
    ):
        update(make_batch().set("task", torch.zeros(4, 6, 5)))


def test_the_loss_by_hand():
    belief = TaskBelief(2, 1, coefficient=3.0, target=lambda task: task.mean(-1, keepdim=True))
    with torch.no_grad():
        belief.layer.weight.copy_(torch.tensor([[1.0, 2.0]]))
        belief.layer.bias.fill_(0.5)
    # told: 1 + 2 + 0.5 = 3.5 and 0.5; targets 1 and 2: ((2.5)^2 + (1.5)^2) / 2 = 4.25
    features = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    losses = belief(features, torch.tensor([[[0.0, 2.0], [1.0, 3.0]]]))
    assert float(losses["belief_error"]) == pytest.approx(4.25)
    assert float(losses["loss_belief"].detach()) == pytest.approx(3 * 4.25)
    assert not losses["belief_error"].requires_grad


@pytest.mark.parametrize("coefficient", [0.0, -1.0, float("nan")])
def test_a_coefficient_that_trains_nothing(coefficient):
    with pytest.raises(ValueError, match="positive weight"):
        TaskBelief(2, 1, coefficient=coefficient)


def test_a_target_of_another_size():
    with pytest.raises(ValueError, match=r"\(1, 1, 3\).*target_size"):
        TaskBelief(2, 1)(torch.zeros(1, 1, 2), torch.zeros(1, 1, 3))


def test_the_memory_comes_to_hold_the_posterior_mean():
    """After n pulls of one arm with s successes its posterior mean is (s + 1) / (n + 2); told from features, within 0.12 on
    average, where the prior's 1/2 is 0.17 off."""
    torch.manual_seed(0)
    env = TransformedEnv(
        BernoulliBandit(2, batch_size=(128,), seed=0),
        Compose(Trial(episodes=10), TaskSampler(uniform_means(2), seed=1), PreviousStep()),
    )
    actor = GRUCategoricalActor.from_env(env, hidden_size=32)
    critic = MemoryValueHead.from_env(env, actor, detach=True)
    belief = TaskBelief(32, 2, coefficient=5.0)
    update = PPOUpdate(RL2PPOLoss(actor, critic, terms=[belief]), lr=3e-3, epochs=4)
    collector = TrialCollector(
        env, ActorCritic(actor, critic), frames_per_batch=1280, total_frames=1280 * 40, keep=update.in_keys
    )
    errors = [update(batch)["belief_error"] for batch in collector]
    assert update.backend == "parts"
    # The prior's variance is 1/12 = 0.083; what ten pulls can tell leaves about 0.045 on average over a trial.
    assert errors[0] > 0.08
    assert errors[-1] < 0.062
    batch = collector.rollout()
    with torch.no_grad(), set_recurrent_mode(True):
        told = belief.layer(actor.get_dist_params(batch.clone())["actor_features"])
    pulled = torch.nn.functional.one_hot(batch["action"], 2)
    wins = (pulled * batch["next", "reward"]).cumsum(1)[:, :-1]
    posterior = (wins + 1) / (pulled.cumsum(1)[:, :-1] + 2)
    away = (told[:, 1:] - posterior).abs().mean()
    assert away < 0.08
    assert away < 0.6 * (0.5 - posterior).abs().mean()


def test_a_loss_of_several_beliefs():
    """Of a task of several parts."""
    beliefs = [TaskBelief(4, 2, task_key=("task", "goal"), name="goal"), TaskBelief(4, 1, task_key=("task", "kind"))]
    features, goal, kind = torch.randn(2, 3, 4), torch.randn(2, 3, 2), torch.randn(2, 3, 1)
    given = [belief(features, part) for belief, part in zip(beliefs, (goal, kind), strict=True)]
    assert [list(each) for each in given] == [["loss_goal", "goal_error"], ["loss_belief", "belief_error"]]
    assert all(list(belief.out_keys) == list(each) for belief, each in zip(beliefs, given, strict=True))
