"""What the ablations do to the inputs, and nothing else."""

import math

import pytest
import torch
from evaluation_cases import (
    Countdown,
    TensorCountdown,
    act,
    bandit_env,
    countdown_env,
    first_arm,
    remembering_actor,
    same,
    win_stay_lose_shift,
)
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.data import Composite, Unbounded
from torchrl.envs import Compose, TransformedEnv

from rl2_torchrl import (
    ActorCritic,
    GRUCategoricalActor,
    GRUValueHead,
    PreviousStep,
    RecurrentCore,
    TaskSampler,
    Trial,
    adaptation_curve,
    with_shuffled_rewards,
    with_zeroed_memory,
)
from rl2_torchrl.envs import TensorEnv
from rl2_torchrl.modules.actor_critic import hidden_keys


def test_zeroed_memory_zeroes_every_hidden_state_and_nothing_else():
    policy = ActorCritic(
        GRUCategoricalActor(4, 2, hidden_size=4), GRUValueHead(4, hidden_size=3, hidden_key=("a", "h"))
    )
    td = TensorDict({"trans": torch.randn(5, 4), "actor_hidden": torch.randn(5, 1, 4)}, [5])
    td["a", "h"] = torch.randn(5, 1, 3)
    out = with_zeroed_memory(policy)(td.clone())
    assert not out["actor_hidden"].any()
    assert not out["a", "h"].any()
    assert torch.equal(out["trans"], td["trans"])


def test_memory_zeroed_where_episodes_begin():
    env = countdown_env([2, 3], 2, TensorCountdown, episodes=2)
    actor, seen = GRUCategoricalActor.from_env(env, hidden_size=4, init_range=3.0), []
    zero = with_zeroed_memory(actor, at="episodes")

    def record(state):
        seen.append((state["step"].flatten() == 0, state["actor_hidden"], zero(state)["actor_hidden"]))
        return zero(state)

    adaptation_curve(env, actor, 2, ablation=record)
    begins, before, after = (torch.cat(parts) for parts in zip(*seen, strict=True))
    assert before[begins].any()
    assert not after[begins].any()
    assert torch.equal(before[~begins], after[~begins])
    with pytest.raises(ValueError, match="at='trials'.*'episodes' begin"):
        with_zeroed_memory(actor, at="trials")


@pytest.mark.parametrize("kind", [TensorCountdown, Countdown])
def test_an_ablation_sees_all_that_there_is_of_a_step(kind):
    seen = set()
    env = countdown_env([2, 3], 2, kind, episodes=2)
    adaptation_curve(env, act(first_arm), 2, ablation=lambda state: seen.update(state) or state)
    assert {"trans", "task", "step", "is_init", "episode_done", "episode_index", "trial_step", "time_left"} <= seen
    assert not {("next", "done"), ("next", "episode_done")} & seen  # which are not there yet
    with pytest.raises(TypeError, match=r"returned a NoneType.*\*\*state"):
        adaptation_curve(env, act(first_arm), 2, ablation=lambda state: None)


@pytest.mark.parametrize("kind", [TensorCountdown, Countdown])
def test_an_ablation_of_the_trials_counters_leaves_the_curve_as_it_is(kind):
    """Which episode a reward is of does not depend on what the policy is shown."""

    def zero(state):
        return {**state, **{key: torch.zeros_like(state[key]) for key in ("episode_index", "is_init")}}

    policy = TensorDictModule(lambda trans, _: first_arm(trans), ["trans", "episode_index"], ["action"])
    curve, expected = (
        adaptation_curve(countdown_env([2, 3, 1, 4], 2, kind, episodes=2), policy, 4, ablation=ablation)
        for ablation in (zero, None)
    )
    assert same(curve.returns, expected.returns)
    assert same(curve.steps.returns, expected.steps.returns)


def test_an_ablation_of_what_the_policy_does_not_read_is_told():
    def zeroed(*keys):
        return lambda state: {**state, **{key: torch.zeros_like(state["step"]) for key in keys}}

    for keys in (["step"], ["stpe"], ["task", "step"]):
        with pytest.raises(
            ValueError, match=rf"the ablation changes \['{keys[0]}'.*nothing that the policy reads, \['trans'\]"
        ):
            adaptation_curve(countdown_env([2, 3], 2, episodes=2), act(first_arm), 2, ablation=zeroed(*keys))
    read = TensorDictModule(lambda trans, _: first_arm(trans), ["trans", "step"], ["action"])
    adaptation_curve(countdown_env([2, 3], 2, episodes=2), read, 2, ablation=zeroed("task", "step"))
    adaptation_curve(countdown_env([2, 3], 2, episodes=2), read, 2, ablation=lambda state: state)


def test_a_policy_with_zeroed_memory_forgets():
    # With the memory zeroed, an action depends on the last step alone: two rows with the same last step act alike.
    actor, seen = remembering_actor(), []
    zero = with_zeroed_memory(actor)

    def record(state):
        state = zero(state)
        start = {"is_init": torch.zeros(10, 1, dtype=torch.bool)}
        seen.append((state["trans"].clone(), actor.get_dist(TensorDict({**state, **start}, [10])).logits))
        return state

    adaptation_curve(bandit_env(rows=10), actor, 10, ablation=record)
    trans, logits = (torch.cat(parts) for parts in zip(*seen, strict=True))
    unique, index = trans.unique(dim=0, return_inverse=True)
    assert len(unique) < len(trans)
    for i in range(len(unique)):
        group = logits[index == i]
        assert torch.allclose(group, group[:1].expand_as(group), atol=1e-6)


def test_a_memory_is_put_to_what_a_trial_begins_with():
    class Told(RecurrentCore):
        """Hands on what it begins with, and gives it."""

        def __init__(self, input_size):
            super().__init__(3, {"told": (3,)}, input_size=input_size)

        def step(self, x, memory):
            return memory, memory

        def initial_memory(self, num_rows):
            return (torch.tensor([3.0, 1.0, 2.0]).repeat(num_rows, 1),)

    actor = GRUCategoricalActor.from_env(bandit_env(), core=Told)
    for at in ("steps", "episodes"):
        zero = with_zeroed_memory(actor, at=at)
        begins = torch.tensor([[True], [False]])
        [key] = hidden_keys(actor)
        memory = zero({key: torch.zeros(2, 3), "episode_done": begins})[key]
        assert memory.tolist() == [[3.0, 1.0, 2.0], [3.0, 1.0, 2.0] if at == "steps" else [0.0] * 3]


def test_an_actors_memory_is_zeroed_by_that_of_its_actor_critic_too():
    actor = remembering_actor()
    policy = ActorCritic(actor, GRUValueHead(5, hidden_size=4))
    curves = []
    for zeroed in (actor, policy):
        torch.manual_seed(0)
        curves.append(adaptation_curve(bandit_env(rows=10), actor, 10, ablation=with_zeroed_memory(zeroed)))
    assert torch.equal(*[curve.returns for curve in curves])


def test_shuffled_rewards_permutes_the_last_but_one_entry_and_nothing_else():
    trans = torch.arange(24.0).reshape(6, 4)
    state = {"trans": trans.clone(), "other": torch.ones(6)}
    out = with_shuffled_rewards(torch.Generator().manual_seed(0))(state)
    assert torch.equal(state["trans"], trans)  # the batch's own memory is left as it is
    assert out["other"] is state["other"]
    assert torch.equal(out["trans"][..., [0, 1, 3]], trans[..., [0, 1, 3]])
    assert sorted(out["trans"][..., 2].flatten().tolist()) == trans[..., 2].flatten().tolist()
    assert not torch.equal(out["trans"][..., 2], trans[..., 2])
    # The generator decides; a nested key works as well.
    nested = {("a", "trans"): trans.clone()}
    again = with_shuffled_rewards(torch.Generator().manual_seed(0), in_key=("a", "trans"))(nested)
    assert torch.equal(again["a", "trans"], out["trans"])


def test_ablations_reach_the_policy():
    # Win-stay, lose-shift lives on the reward: with another row's it does no better than chance after the first pull.
    tasks = torch.eye(2).repeat(1000, 1)
    generator = torch.Generator().manual_seed(0)
    policy = act(win_stay_lose_shift)
    curve = adaptation_curve(bandit_env(tasks, 2000), policy, 2000, ablation=with_shuffled_rewards(generator))
    assert curve.per_episode.tolist() == pytest.approx([0.5] * 3, abs=4 * 0.5 / math.sqrt(2000))
    assert adaptation_curve(bandit_env(tasks, 2000), policy, 2000).per_episode.tolist() == [0.5, 1.0, 1.0]


class Boats(TensorEnv):
    """Paid for being at 0, to which a current, the task, lets nobody come."""

    def __init__(self, **options):
        spaces = {"observation_spec": Unbounded(1), "action_spec": Unbounded(1), **options}
        super().__init__(task_spec=Unbounded(1), max_episode_steps=5, batch_size=(3,), **spaces)

    def begin(self, task, rows):
        place = torch.ones(3, 1)
        return (place, task), place

    def advance(self, state, action):
        place, current = state
        return (place + current, current), place + current, -place.abs(), None, None


def test_an_ablation_in_place_reaches_the_policy_alone():
    """What it is given would be the env's own state and task."""

    def zeroed(*keys):
        def ablation(state):
            for key in keys:
                state[key].zero_()
            return state

        return ablation

    def curve(ablation, *read):
        tasks = TaskSampler.fixed(torch.tensor([[1.0], [2.0], [3.0]]))
        env = TransformedEnv(Boats(), Compose(Trial(episodes=1), tasks, PreviousStep()))
        seen = []
        policy = TensorDictModule(lambda *read: seen.append(read[0].clone()) or read[0], list(read), ["action"])
        return adaptation_curve(env, policy, 3, ablation=ablation).returns, torch.stack(seen)

    intact, _ = curve(None, "task")
    assert intact.tolist() == [[-15.0], [-25.0], [-35.0]]
    ablated, seen = curve(zeroed("observation", "task"), "task")
    assert ablated.tolist() == intact.tolist()
    assert not seen.any()
    with pytest.raises(ValueError, match=r"the ablation changes \['observation'\], and nothing that the policy reads"):
        curve(zeroed("observation"), "task")


def test_a_policy_of_nan_is_no_curve():
    env = bandit_env(rows=10)
    actor = GRUCategoricalActor.from_env(env)
    nn.init.constant_(next(actor.parameters()), torch.nan)
    with pytest.raises(FloatingPointError, match=r"the policy gives NaN as .*'logits'"):
        adaptation_curve(env, actor, 10)


def test_what_an_env_shows_may_be_nan():
    """It does not know how far the goal is; a controller does without."""

    class Searches(Boats):
        def __init__(self):
            super().__init__(more_spec=Composite(distance=Unbounded(1)))

        def observe_more(self, state):
            return {"distance": torch.full((3, 1), torch.nan)}

    tasks = TaskSampler.fixed(torch.tensor([[1.0], [2.0], [3.0]]))
    env = TransformedEnv(Searches(), Compose(Trial(episodes=1), tasks, PreviousStep(["observation"])))
    by_hand = TensorDictModule(lambda distance: distance.nan_to_num(1.0), ["distance"], ["action"])
    assert adaptation_curve(env, by_hand, 3).returns.tolist() == [[-15.0], [-25.0], [-35.0]]
    by_hand = TensorDictModule(lambda distance: distance, ["distance"], ["action"])
    with pytest.raises(FloatingPointError, match="the policy gives NaN"):
        adaptation_curve(env, by_hand, 3)
