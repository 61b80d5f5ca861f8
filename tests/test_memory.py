"""Memory lasts a trial and no longer: in the gradient, in envs and collectors, in advantages, in a trained agent."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import Bounded, Composite
from torchrl.envs import Compose, GymEnv, InitTracker, SerialEnv, TransformedEnv
from torchrl.modules import GRUModule, set_recurrent_mode
from torchrl.modules.utils import get_primers_from_module
from torchrl.objectives.value import GAE

from rl2_torchrl import (
    ActorCritic,
    FastGRUModule,
    GRUCategoricalActor,
    GRUGaussianActor,
    GRUValueHead,
    LSTMCore,
    MemoryValueHead,
    PPOUpdate,
    PreviousStep,
    RecurrentCritic,
    RL2PPOLoss,
    TaskSampler,
    Trial,
    TrialAdvantage,
    adaptation_curve,
    with_shuffled_rewards,
    with_zeroed_memory,
)
from rl2_torchrl.envs import BernoulliBandit, QuadraticBandit, uniform_targets
from rl2_torchrl.modules.actor_critic import hidden_keys

TRIAL = 6


def quadratic(rows=3):
    return TransformedEnv(
        QuadraticBandit(2, batch_size=(rows,), seed=0),
        Compose(Trial(episodes=TRIAL), TaskSampler(uniform_targets(2), seed=0), PreviousStep()),
    )


def networks(env, wiring="separate"):
    torch.manual_seed(0)
    body = {"hidden_size": 8, "init_range": 0.5}
    discrete = env.action_spec.dtype == torch.int64
    actor = (GRUCategoricalActor if discrete else GRUGaussianActor).from_env(env, **body)
    if wiring == "separate":
        return actor, GRUValueHead.from_env(env, **body)
    return actor, MemoryValueHead.from_env(env, actor, detach=wiring == "detached", init_range=0.5)


def collect(env, policy, steps, batches=1):
    frames = env.batch_size.numel() * steps
    sizes = {"frames_per_batch": frames, "total_frames": batches * frames}
    collector = Collector(env, policy, **sizes, auto_register_policy_transforms=True)
    collected = [batch.clone() for batch in collector]
    collector.shutdown()
    return collected


# ------------------------------------------------------------------ gradient


def last_reward_alone(batch):
    """The batch with one reward only, in each row's last step, and values of zero: its advantage is the last step's."""
    batch["next", "reward"].zero_()
    batch["next", "reward"][:, -1] = 1.0
    batch["state_value"].zero_()
    return batch


def reach(term, bptt, wiring):
    """Largest gradient of the last step's ``term`` of the loss in the transition input of each step, ``[T]``."""
    env = quadratic()
    actor, critic = networks(env, wiring)
    batch = last_reward_alone(collect(env, ActorCritic(actor, critic), TRIAL)[0])
    advantage = TrialAdvantage(lmbda=0.0, normalize=False)
    update = PPOUpdate(RL2PPOLoss(actor, critic, reduction="none"), advantage, bptt=bptt, minibatches=1)
    batch["trans"].requires_grad_()
    chunks = update.chunks(update.advantage(batch))
    losses = update.loss(chunks)
    terms = losses[term].reshape(3, TRIAL)
    if term == "loss_objective":
        # The advantage is zero elsewhere, and the whole policy loss is its last step.
        assert (terms[:, :-1] == 0).all()
    terms[:, -1].sum().backward()
    return batch["trans"].grad.abs().amax((0, 2))


@pytest.mark.parametrize("term", ["loss_objective", "loss_critic"])
@pytest.mark.parametrize("bptt", [1, 2, 3, TRIAL])
@pytest.mark.parametrize("wiring", ["separate", "shared"])
def test_gradient_reaches_back_over_bptt_steps_and_no_further(term, bptt, wiring):
    # Each pull is an episode. From the last reward back to the first episode, but exactly nothing beyond the chunk.
    gradient = reach(term, bptt, wiring)
    assert (gradient[: TRIAL - bptt] == 0).all()
    assert (gradient[TRIAL - bptt :] > 1e-6).all()


@pytest.mark.parametrize("whole", [True, False])
def test_gradient_stops_at_the_trials_start(whole):
    # Two trials in a row, one chunk: the second one's last reward has nothing to say to the first.
    env = quadratic()
    actor, critic = networks(env)
    batch = last_reward_alone(collect(env, ActorCritic(actor, critic), 2 * TRIAL)[0])
    if not whole:
        batch["is_init"][:, TRIAL] = False
    update = PPOUpdate(RL2PPOLoss(actor, critic), TrialAdvantage(lmbda=0.0, normalize=False), minibatches=1)
    batch["trans"].requires_grad_()
    update.loss(update.chunks(update.advantage(batch)))["loss_objective"].backward()
    gradient = batch["trans"].grad.abs().amax((0, 2))
    assert (gradient[TRIAL:] > 0).all()
    assert (gradient[:TRIAL] == 0).all() == whole


@pytest.mark.parametrize(("wiring", "reached"), [("separate", False), ("detached", False), ("shared", True)])
def test_the_value_loss_trains_the_actors_memory_in_the_shared_wiring_only(wiring, reached):
    env = quadratic()
    actor, critic = networks(env, wiring)
    batch = collect(env, ActorCritic(actor, critic), TRIAL)[0]
    update = PPOUpdate(RL2PPOLoss(actor, critic), minibatches=1)
    update.loss(update.chunks(update.advantage(batch)))["loss_critic"].backward()
    touched = [p.grad is not None and bool(p.grad.any()) for p in actor.parameters()]
    recurrent = [p.grad is not None and bool(p.grad.any()) for n, p in actor.named_parameters() if "_hh_" in n]
    assert any(touched) is reached
    assert all(recurrent) is reached
    assert all(p.grad.any() for p in critic.parameters())


# ------------------------------------------------------- envs and collectors


def cartpole():
    return GymEnv("CartPole-v1", max_episode_steps=25)


def test_memory_survives_an_episodes_end_and_not_a_trials():
    env = TransformedEnv(SerialEnv(2, cartpole), Compose(Trial(episodes=2), PreviousStep()))
    env.set_seed(0)
    policy = ActorCritic(*networks(env))
    batch = torch.cat(collect(env, policy, steps=60, batches=2), 1)
    trial_end = batch["next", "done"][:, :-1, 0]
    episode_end = batch["next", "episode_done"][:, :-1, 0] & ~trial_end
    # Rows' trials end at different steps, so that a reset of one row meets another row's running trial.
    assert (trial_end.sum(1) > 1).all()
    assert (episode_end.sum(1) > 1).all()
    assert (trial_end[0] & ~trial_end[1]).any()
    for key in policy.hidden_keys:
        before, after = batch["next", key][:, :-1], batch[key][:, 1:]
        assert torch.equal(after[~trial_end], before[~trial_end])
        assert (after[episode_end].abs().amax((1, 2)) > 1e-3).all()
        assert (before[trial_end].abs().amax((1, 2)) > 1e-3).all()
        assert (after[trial_end] == 0).all()
        assert (batch[key][:, 0] == 0).all()
    assert torch.equal(batch["is_init"][:, 1:, 0], trial_end)
    assert batch["is_init"][:, 0].all()


def test_a_rows_reset_leaves_the_other_rows_memory_alone():
    env = quadratic()
    policy = ActorCritic(*networks(env))
    env = TransformedEnv(env, Compose(InitTracker(), get_primers_from_module(policy, warn=False)), auto_unwrap=False)
    td = env.reset()
    for _ in range(3):
        _, td = env.step_and_maybe_reset(policy(td))
    rows = torch.tensor([[False], [True], [False]])
    reset = env.reset(td.clone().set("_reset", rows))
    assert reset["is_init"].tolist() == rows.tolist()
    for key in (*policy.hidden_keys, "trans"):
        assert torch.equal(reset[key][[0, 2]], td[key][[0, 2]])
        assert (td[key][1] != 0).any()
        assert (reset[key][1] == 0).all()
    # The networks then say what they would have said; in the row that began anew, what an empty memory says.
    went_on, began, first = policy(td.clone()), policy(reset.clone()), policy(env.reset())
    for key in ("loc", "state_value", ("next", "actor_hidden"), ("next", "critic_hidden")):
        assert torch.equal(began[key][[0, 2]], went_on[key][[0, 2]])
        assert torch.equal(began[key][1], first[key][1])
        assert not torch.equal(began[key][1], went_on[key][1])


# --------------------------------------------------- memory that is not there

NETWORKS = {
    "actor": lambda env: networks(env)[0],
    "critic": lambda env: networks(env)[1],
    "LSTM": lambda env: RecurrentCritic.from_env(env, core=LSTMCore),
}


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_rows_that_go_on_without_a_memory_are_refused(name, recurrent):
    network, rows = NETWORKS[name](quadratic()), (3, 2) if recurrent else (3,)
    data = TensorDict({"trans": torch.randn(*rows, 4), "is_init": torch.ones(*rows, 1, dtype=torch.bool)}, rows)
    with set_recurrent_mode(recurrent):
        written = network(data.clone())
        data["is_init"][1] = False  # one row of three
        with pytest.raises(KeyError, match=rf"rows go on .* memory \['{network.hidden_key}'.*forgotten its trial"):
            network(data.clone())
        for key in hidden_keys(network):
            data[key] = torch.zeros_like(written["next", key])
        network(data)


def test_torchrls_gru_and_its_drop_in_start_from_zeros_there():
    data = TensorDict({"trans": torch.randn(3, 4), "is_init": torch.zeros(3, 1, dtype=torch.bool)}, [3])
    for module in (GRUModule, FastGRUModule):
        gru = module(4, 8, in_key="trans", out_key="features")
        without = gru(data.clone())["features"]
        assert torch.equal(without, gru(data.clone().set(gru.in_keys[1], torch.zeros(3, 1, 8)))["features"])


def test_a_rollout_without_primers_is_refused_at_its_second_step():
    env = TransformedEnv(quadratic(), InitTracker())
    env.rollout(1, networks(env)[0])
    with pytest.raises(KeyError, match="'actor_hidden'.*auto_register_policy_transforms=True"):
        env.rollout(2, networks(env)[0])


@pytest.mark.parametrize("options", [{}, {"deactivate_vmap": True}, {"shifted": True}])
def test_torchrls_gae_does_not_ask_a_critic_that_has_no_memory(options):
    # `PPOTrainer` asks so by default, of a collector that plays the actor alone.
    env = quadratic()
    actor, critic = networks(env)
    (batch,) = collect(env, actor, TRIAL)
    with pytest.raises(KeyError, match=r"'critic_hidden'.*let TrialAdvantage\(\) read the values that are stored"):
        GAE(gamma=0.9, lmbda=0.9, value_network=critic, **options)(batch)


def test_a_loss_of_rows_that_go_on_without_a_memory_is_refused():
    env = quadratic()
    actor, critic = networks(env)
    batch = TrialAdvantage()(collect(env, ActorCritic(actor, critic), TRIAL)[0]).exclude(
        "actor_hidden", "critic_hidden"
    )
    loss = RL2PPOLoss(actor, critic)
    loss(batch)
    with pytest.raises(KeyError, match=r"memory \['actor_hidden', 'critic_hidden'\]"):
        loss(batch[:, 1:])


# ---------------------------------------------------------------- advantages


def two_trials():
    """Rows of two trials of three steps, ``[2, 6]``; the second one is cut by the row's end."""
    reward, value = torch.randn(2, 2, 6, 1, generator=torch.Generator().manual_seed(0))
    done = torch.zeros(2, 6, 1, dtype=torch.bool)
    done[:, 2] = True
    following = {"reward": reward, "done": done, "terminated": done.clone(), "state_value": torch.ones(2, 6, 1)}
    return TensorDict({"state_value": value, "next": following}, [2, 6])


class StoredValue(torch.nn.Module):
    """A critic that knows the last value already."""

    in_keys = ("state_value",)

    def forward(self, tensordict):
        return tensordict


@pytest.mark.parametrize("value_target", ["return", "gae"])
@pytest.mark.parametrize("key", ["state_value", ("next", "reward"), ("next", "state_value")])
def test_advantages_do_not_depend_on_the_next_trial(key, value_target):
    compute = TrialAdvantage(normalize=False, critic=StoredValue(), value_target=value_target)
    before, changed = compute(two_trials()), two_trials()
    changed[key][:, 3:] += 1000.0
    after = compute(changed)
    for name in ("advantage", "value_target"):
        # The whole first trial, its last step above all, is as it was; the second is not.
        assert torch.equal(after[name][:, :3], before[name][:, :3])
    assert not torch.isclose(after["advantage"][:, 3:], before["advantage"][:, 3:]).any()


def test_advantages_flow_across_the_episodes_of_a_trial():
    compute = TrialAdvantage(normalize=False, critic=StoredValue())
    before, changed = compute(two_trials()), two_trials()
    changed["next", "reward"][:, 2] += 1.0
    after = compute(changed)
    # One more reward in the trial's last step: (gamma lambda)^k on the advantage k steps before, gamma^k on the return.
    for name, rate in (("advantage", 0.99 * 0.97), ("value_target", 0.99)):
        gain = (after[name] - before[name])[..., 0]
        assert torch.allclose(gain, torch.tensor([rate**2, rate, 1.0, 0.0, 0.0, 0.0]).expand(2, 6), atol=1e-6)


# ------------------------------------------------------------ a trained agent


class PullThenWait(BernoulliBandit):
    """Two-step episodes: a pull, then a wait in which actions do nothing.

    At the next pull the last reward is out of sight: only memory can tell the better arm. In a plain bandit the
    transition input alone, "stay with what has just paid", would be worth most of the gain.
    """

    def __init__(self, num_arms, **kwargs):
        super().__init__(num_arms, **kwargs)
        self.observation_spec = Composite(waiting=Bounded(0, 1, (*self.batch_size, 1)), shape=self.batch_size)
        self.state_spec["waiting"] = self.observation_spec["waiting"].clone()

    def _reset(self, tensordict=None, **kwargs):
        return super()._reset(tensordict, **kwargs).set("waiting", torch.zeros(*self.batch_size, 1))

    def _step(self, tensordict):
        waiting = tensordict["waiting"]
        stepped = super()._step(tensordict)
        stepped["reward"] = stepped["reward"] * (1 - waiting)
        stepped["done"], stepped["terminated"] = waiting.bool(), waiting.bool()
        return stepped.set("waiting", 1 - waiting)


def one_arm_pays(batch_size, generator):
    arm = torch.randint(2, batch_size, generator=generator)
    return torch.nn.functional.one_hot(arm, 2).float()


def pull_then_wait(rows, seed):
    return TransformedEnv(
        PullThenWait(2, batch_size=(rows,), seed=seed),
        Compose(Trial(episodes=4), TaskSampler(one_arm_pays, seed=seed), PreviousStep()),
    )


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    env = pull_then_wait(rows=256, seed=0)
    actor = GRUCategoricalActor.from_env(env, hidden_size=32)
    critic = MemoryValueHead.from_env(env, actor, detach=True, num_cells=[32])
    update = PPOUpdate(
        RL2PPOLoss(actor, critic, clip_epsilon=0.2),
        TrialAdvantage(gamma=1.0, lmbda=0.9, value_target="gae"),
        lr=1e-2,
        epochs=4,
        minibatches=4,
    )
    collector = Collector(
        env,
        ActorCritic(actor, critic),
        frames_per_batch=256 * 8,
        total_frames=60 * 256 * 8,
        auto_register_policy_transforms=True,
    )
    for batch in collector:
        update(batch)
    collector.shutdown()
    return actor


ABLATIONS = {
    "none": (lambda actor: None, True),
    "memory zeroed": (with_zeroed_memory, False),
    "rewards shuffled": (lambda actor: with_shuffled_rewards(torch.Generator().manual_seed(0)), False),
}


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_a_trained_agents_gain_is_in_its_memory(trained, ablation):
    make, gains = ABLATIONS[ablation]
    torch.manual_seed(1)
    pulls = adaptation_curve(pull_then_wait(2000, seed=1), trained, 2000, ablation=make(trained)).per_episode
    # On held-out tasks the first pull is a guess, 1/2; it tells all, so later ones can earn 1. Standard error 0.011.
    assert abs(pulls[0] - 0.5) < 0.05
    if gains:
        assert (pulls[1:] > 0.9).all()
    else:
        assert (pulls[1:] < 0.6).all()
