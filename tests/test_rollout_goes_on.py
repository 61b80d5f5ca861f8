"""`Rollout` from batch to batch: saved, reset, interrupted, replayed, and what must not change in between."""

from copy import deepcopy

import pytest
import torch
from rollouts import (
    assert_same,
    make_env,
    make_policy,
    named,
    same_noise,
)
from torchrl.envs import (
    RewardSum,
    StepCounter,
)

from rl2_torchrl import (
    TrialCollector,
)
from rl2_torchrl.collector import load_rollout_state, rollout_state
from rl2_torchrl.rollout import Rollout


@pytest.mark.parametrize(
    ("name", "trial", "transforms"),
    [
        ("guess", {"episodes": 3}, []),
        ("guess", {"episodes": 2, "steps": 7, "truncate": True}, []),
        ("guess 2x3", {"steps": 7}, []),
        ("rooms", {"steps": 12, "step_keys": ["move"]}, []),
        ("rooms", {"steps": 12, "step_keys": ["move"]}, [StepCounter]),
        ("mdp", {"episodes": 3}, []),
        ("mdp", {"episodes": 3}, [StepCounter]),
        ("cheetah", {"episodes": 2}, []),
        ("doubled", {"episodes": 3}, []),
    ],
    ids=named,
)
@pytest.mark.parametrize("batches_before", [0, 2])
def test_a_rollout_goes_on_where_it_was_saved(name, trial, transforms, batches_before, tmp_path):
    def make(seed):
        env = make_env(name, *[kind() for kind in transforms], **trial)
        policy = make_policy(env)
        torch.manual_seed(seed)
        frames = 5 * env.batch_size.numel()
        return env, TrialCollector(env, policy, frames_per_batch=frames, total_frames=-1, rollout="tensors")

    env, collector = make(0)
    unbroken = iter(collector)
    for _ in range(batches_before):
        next(unbroken)
    torch.save(
        (rollout_state(collector), env.transform[1].get_extra_state(), torch.get_rng_state()), tmp_path / "state"
    )
    expected = [next(unbroken).clone() for _ in range(3)]
    assert expected[0]["is_init"][..., 0, 0].all() == (batches_before == 0)  # else in the middle of a trial

    env, collector = make(1)
    next(iter(collector))  # stands elsewhere
    state, tasks, random = torch.load(tmp_path / "state")
    load_rollout_state(collector, state)
    env.transform[1].set_extra_state(tasks)
    torch.set_rng_state(random)
    resumed = iter(collector)
    for batch in expected:
        found = next(resumed)
        for key, value in batch.items(True, True):
            assert torch.equal(found[key], value), key


FEW = ["trans", "action"]


@pytest.mark.parametrize("is_torchrls", [False, True])
@pytest.mark.parametrize(("before", "after"), [(FEW, None), (None, FEW)], ids=["more", "less"])
def test_a_rollout_goes_on_with_more_or_fewer_entries_kept(is_torchrls, before, after):
    def make(keep):
        env = make_env("rooms", episodes=3)
        if is_torchrls:
            env.base_env._step = env.base_env._step
        policy = make_policy(env)
        frames = 5 * env.batch_size.numel()
        return TrialCollector(env, policy, frames_per_batch=frames, total_frames=-1, keep=keep)

    torch.manual_seed(0)
    collector, resumed = make(before), make(after)
    unbroken = iter(collector)
    next(unbroken)
    assert load_rollout_state(resumed, rollout_state(collector)) is None
    resumed.env.transform[1].set_extra_state(collector.env.transform[1].get_extra_state())
    batches = []
    for iterator in (unbroken, iter(resumed)):
        torch.manual_seed(1)
        batches.append(next(iterator).select(*FEW).clone())
    assert_same(*[[batch] for batch in batches])


@pytest.mark.parametrize(
    ("name", "transforms"), [("guess", []), ("mdp", []), ("walk", []), ("walk", [StepCounter])], ids=named
)
def test_a_collector_can_be_reset(name, transforms):
    results = []
    for rollout in ("tensors", "tensordicts"):
        env = make_env(name, *[kind() for kind in transforms], episodes=3)
        frames = (
            2 * env.batch_size.numel()
        )  # no trial of 3 episodes ends with them, whose next task only TorchRL has drawn then
        collector = TrialCollector(env, make_policy(env), frames_per_batch=frames, total_frames=-1, rollout=rollout)
        torch.manual_seed(7)
        iterator = iter(collector)
        results.append([])
        for _ in range(2):
            with same_noise():
                results[-1].append(next(iterator).clone())
            collector.reset()
    assert_same(*results)
    assert results[0][1]["is_init"][:, 0].all()


@pytest.mark.parametrize(
    ("name", "transforms"),
    [("mdp", []), ("guess", []), ("guess", [StepCounter]), ("walk", []), ("walk", [StepCounter])],
    ids=named,
)
@pytest.mark.parametrize("step", [9, 12, 16])
def test_after_an_interrupt_the_next_batch_begins_new_trials(name, transforms, step, monkeypatch):
    env, moves = make_env(name, *[kind() for kind in transforms], episodes=3), []
    kind, method = type(env.base_env), "_step" if name == "walk" else "advance"
    take = getattr(kind, method)

    def interrupted(*args):
        moves.append(args)
        if len(moves) == step:
            raise KeyboardInterrupt
        return take(*args)

    monkeypatch.setattr(kind, method, interrupted)
    rollout = Rollout(env, make_policy(env), 8)
    rollout()
    with pytest.raises(KeyboardInterrupt):
        rollout()
    batches = torch.cat([rollout().clone() for _ in range(2)], -1)
    first, counted = batches["is_init"].squeeze(-1), batches["trial_step"].squeeze(-1)
    assert first[:, 0].all()
    assert (counted[first] == 0).all()
    assert (counted[:, 1:] == counted[:, :-1] + 1)[~first[:, 1:]].all()
    assert (batches["trans"][first][:, -env.action_spec.space.n - 2 :] == 0).all()
    if name == "guess":
        assert (batches["observation"][first] == 1).all()
        right = batches["action"] == batches["task"].squeeze(-1)
        assert torch.equal(batches["next", "reward"].squeeze(-1), right.float() - 1)


@pytest.mark.parametrize("name", ["bandit", "rooms"])
def test_a_reset_leaves_the_batch_that_is_handed_out_as_it_is(name):
    env = make_env(name, steps=5)
    frames = 5 * env.batch_size.numel()
    collector = TrialCollector(env, make_policy(env), frames_per_batch=frames, total_frames=-1)
    for _ in range(3):
        batch = collector.rollout()
        shown = batch.clone()
        collector.reset()
        assert (batch == shown).all()


@pytest.mark.parametrize(("name", "transforms"), [("guess", []), ("mdp", []), ("walk", [StepCounter])], ids=named)
def test_the_first_trials_follow_a_seed_too(name, transforms):
    def make():
        return make_env(name, *[kind() for kind in transforms], episodes=3)

    results = []
    for rollout, seed in (("tensors", 5), ("tensordicts", 5), ("tensors", 6)):
        env = make()
        frames = 5 * env.batch_size.numel()
        collector = TrialCollector(env, make_policy(env), frames_per_batch=frames, total_frames=-1, rollout=rollout)
        collector.set_seed(seed)
        torch.manual_seed(7)
        iterator = iter(collector)
        with same_noise():
            results.append([next(iterator).clone() for _ in range(3)])
    assert_same(*results[:2])
    assert not torch.equal(results[0][0]["task"], results[2][0]["task"])


@pytest.mark.parametrize(
    ("options", "by_replay"),
    [({}, True), ({"on_step": lambda state: None}, False), ({"ablation": lambda state: state}, False)],
)
def test_what_a_user_looks_at_between_steps_is_in_no_graph(options, by_replay, monkeypatch):
    replays = []

    class Replay:
        refusal = None

        def __init__(self, function, *_):
            self.function = function

        def __call__(self):
            replays.append(self.function)
            self.function()

    monkeypatch.setattr("rl2_torchrl.rollout.rollout.GraphReplay", Replay)
    env = make_env("bandit", episodes=6)
    rollout = Rollout(env, make_policy(env), 6, ["action"], **options)
    rollout()
    assert bool(replays) == by_replay


class Recorded:
    """A graph of wood: what it replays is right only where the batch before was its own too."""

    calls, last, refusal = [], None, None

    def __init__(self, function, *_):
        self.function, self.number = function, 0

    def __call__(self):
        self.number += 1
        assert self.number == 1 or Recorded.last is self
        self.calls.append(self.number)
        self.function()
        Recorded.last = self


@pytest.mark.parametrize(
    ("between", "episodes", "calls"),
    [
        ("nothing", 6, [1, 2, 3, 4]),
        ("a batch that goes on with a trial", 12, [1]),
        ("shorter trials", 6, [1, 2, 1]),
        ("a reset", 6, [1, 2, 1]),
        ("a state that is loaded", 6, [1, 2, 1, 2]),
    ],
)
def test_a_graph_is_replayed_after_batches_of_its_own_alone(between, episodes, calls, monkeypatch):
    play = Rollout._play

    def noted(self):
        Recorded.last = None
        play(self)

    monkeypatch.setattr(Rollout, "_play", noted)
    monkeypatch.setattr(Recorded, "calls", [])
    monkeypatch.setattr("rl2_torchrl.rollout.rollout.GraphReplay", Recorded)
    env = make_env("bandit", episodes=episodes)
    rollout = Rollout(env, make_policy(env), 6, ["action"])
    rollout(), rollout()
    if between == "a reset":
        rollout.adopt(env.reset())
    if between == "a state that is loaded":
        rollout.load_state_dict(rollout.state_dict())
    if between == "shorter trials":
        env.transform[0].episodes = 3
    rollout(), rollout()
    assert Recorded.calls == calls


@pytest.mark.parametrize("kind", ["bandit", "cart pole"])
def test_a_state_stays_as_it_was_while_the_rollout_goes_on(kind):
    env = make_env(kind, episodes=6)
    rollout = Rollout(env, make_policy(env), 4, ["action"])
    rollout()
    state = rollout.state_dict()
    before = deepcopy(state)
    rollout()
    torch.testing.assert_close(state, before, rtol=0, atol=0)


def test_a_hook_that_is_hung_up_later_is_an_error_before_the_next_batch():
    env = make_env("bandit", episodes=6)
    policy = make_policy(env)
    rollout = Rollout(env, policy, 6, ["action"])
    rollout()
    hook = policy.actor.module[0].register_forward_hook(lambda module, args, out: None)
    with pytest.raises(RuntimeError, match="a hook on one, .* has changed since their rollout.*make a new collector"):
        rollout()
    hook.remove()
    rollout()


def test_a_transform_that_is_appended_later_is_an_error_before_the_next_batch():
    env = make_env("bandit", episodes=6)
    rollout = Rollout(env, make_policy(env), 6, ["action"])
    rollout()
    env.append_transform(RewardSum())
    with pytest.raises(RuntimeError, match="a transform of the env has changed.*make a new collector"):
        rollout()
