"""On a CUDA device: the same numbers as on the CPU, batches as one graph, checkpoints that go on bitwise. Skipped without one."""

import copy

import pytest
import torch
from torchrl.collectors import Collector
from torchrl.data import Unbounded
from torchrl.envs import Compose, TransformedEnv
from torchrl.envs.utils import ExplorationType

from rl2_torchrl import (
    ActorCritic,
    AdaptationReport,
    AdaptiveAgent,
    GRUCategoricalActor,
    GRUCore,
    GRUGaussianActor,
    GRUValueHead,
    LSTMCore,
    PPOUpdate,
    PreviousStep,
    RL2PPOLoss,
    TaskSampler,
    Trial,
    TrialAdvantage,
    TrialCollector,
    adaptation_curve,
    check_training,
    linear_decay,
    train,
)
from rl2_torchrl.envs import BernoulliBandit, PointRobot, TensorEnv, goals_on_half_circle, uniform_means
from rl2_torchrl.evaluation import AdaptationCurve
from rl2_torchrl.kernels.gru_sequence import gru_sequence

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

CUDA = "cuda:0"
ROWS, PULLS, ARMS = 16, 12, 4


def bandit_env(device, rows=ROWS, pulls=PULLS, *, task_seed=1):
    return TransformedEnv(
        BernoulliBandit(ARMS, batch_size=(rows,), seed=2, device=device),
        Compose(Trial(episodes=pulls), TaskSampler(uniform_means(ARMS), seed=task_seed), PreviousStep()),
    )


def composed(
    device,
    *,
    core=None,
    pulls=PULLS,
    dtype=None,
    keep=True,
    total_frames=-1,
    exploration_type=ExplorationType.RANDOM,
    **options,
):
    """Collector and update of a small bandit agent, networks the same on every device."""
    torch.manual_seed(0)
    env = bandit_env("cpu", pulls=pulls)
    slots = {"hidden_size": 8} if core is None else {"core": copy.deepcopy(core)}
    actor = GRUCategoricalActor.from_env(env, **slots)
    critic = GRUValueHead.from_env(env, hidden_size=8)
    policy = ActorCritic(actor, critic).to(device).to(dtype)
    loss = RL2PPOLoss(actor, critic, clip_epsilon=0.2, entropy_bonus=True).to(device).to(dtype)
    advantage = TrialAdvantage(gamma=0.99, lmbda=0.9, value_target="gae")
    update = PPOUpdate(loss, advantage, lr=1e-2, **{"epochs": 2, "minibatches": 2, "shuffle": False, **options})
    collector = TrialCollector(
        bandit_env(device, pulls=pulls),
        policy,
        keep=update.in_keys if keep else None,
        frames_per_batch=ROWS * PULLS,
        total_frames=total_frames,
        exploration_type=exploration_type,
    )
    return collector, update


def moved(update, **options):
    """The same update on a CUDA device, of its own copy of the networks."""
    advantage = TrialAdvantage(gamma=0.99, lmbda=0.9, value_target="gae")
    options = {"lr": 1e-2, "epochs": 2, "minibatches": 2, "shuffle": False, **options}
    return PPOUpdate(copy.deepcopy(update.loss).to(CUDA), advantage, **options)


class Stop:
    """True at the update of that number."""

    def __init__(self, number):
        self.left = number

    def __call__(self, scalars):
        self.left -= 1
        return self.left == 0


# ------------------------------------------------ the device itself, also one of wood


def test_a_device_is_not_the_cpu():
    here, there = torch.ones(2), torch.ones(2, device=CUDA)
    refused = [
        lambda: there + here,
        lambda: here[there.long()],
        lambda: there.copy_(here).numpy(),
        lambda: there.normal_(generator=torch.Generator()),
        lambda: here.normal_(generator=torch.Generator(CUDA)),
    ]
    for each in refused:
        with pytest.raises((RuntimeError, TypeError)):
            each()
    assert (there * torch.tensor(2.0))[torch.tensor([0])].tolist() == [2.0]
    assert there.normal_(generator=torch.Generator(CUDA)).device == torch.device(CUDA)


def test_a_graph_does_nothing_while_it_is_recorded_and_reads_nothing_back():
    total, generator = torch.zeros(3, device=CUDA), torch.Generator(CUDA).manual_seed(0)
    drawn, graph = torch.rand(3, device=CUDA, generator=generator), torch.cuda.CUDAGraph()
    graph.register_generator_state(generator.manual_seed(0))
    with torch.cuda.graph(graph):
        total.add_(torch.rand(3, device=CUDA, generator=generator))
    assert total.tolist() == [0.0] * 3
    graph.replay()
    assert total.tolist() == drawn.tolist()
    graph.replay()
    assert total.tolist() != (2 * drawn).tolist()  # other numbers
    with pytest.raises(TypeError):
        copy.deepcopy(graph)


def parameters_of(update):
    return torch.cat([p.detach().flatten().cpu().double() for p in update.loss.parameters()])


@pytest.mark.parametrize("core", [None, GRUCore(ARMS + 2, 8, num_layers=2), LSTMCore(ARMS + 2, 8)])
def test_an_update_is_that_of_the_cpu(core):
    """In float64: Adam makes large steps of what float32 rounds off."""
    options = {"entropy_schedule": linear_decay, "lr_schedule": linear_decay, "max_grad_norm": 0.5}
    collector, update = composed("cpu", core=core, dtype=torch.float64, **options)
    other = moved(update, **options)
    before = parameters_of(update)
    for number, batch in zip(range(4), collector, strict=False):
        metrics = [u(b, number / 4) for u, b in ((update, batch.clone()), (other, batch.clone().to(CUDA)))]
        assert metrics[0] == pytest.approx(metrics[1], abs=1e-9)
    torch.testing.assert_close(parameters_of(update), parameters_of(other), atol=1e-8, rtol=0)
    assert (parameters_of(update) - before).abs().max() > 1e-2
    assert other.backend == "graph"
    assert "one CUDA graph" in other.reason


@pytest.mark.parametrize(("rows", "units"), [(5, 20), (33, 70), (128, 256)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_gru_steps_are_those_of_the_cpu(rows, units, with_bias):
    torch.manual_seed(0)
    gru = torch.nn.GRU(6, units, bias=with_bias)
    weights = [*gru.parameters(), *([] if with_bias else [None, None])]
    x, hidden, is_init = torch.randn(rows, 9, 6), torch.randn(rows, 9, units), torch.rand(rows, 9) < 0.2
    slope, found = torch.randn(rows, 9, units), []
    for device in ("cpu", CUDA):
        leaves = [None if t is None else t.detach().to(device).requires_grad_() for t in (x, hidden, *weights)]
        y = gru_sequence(*leaves[:2], is_init.to(device), *leaves[2:])
        gradients = torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], slope.to(device))
        found.append([y, *gradients])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other.cpu(), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("core", [None, LSTMCore(ARMS + 2, 8)])
def test_trials_that_begin_inside_chunks_are_recorded_too_but_of_cores_that_look_for_them(core):
    collector, update = composed("cpu", core=core, dtype=torch.float64, pulls=PULLS // 3)
    other = moved(update)
    for batch, _ in zip(collector, range(3), strict=False):
        assert batch["is_init"][:, 1:].any()
        update(batch.clone()), other(batch.clone().to(CUDA))
    torch.testing.assert_close(parameters_of(update), parameters_of(other), atol=1e-8, rtol=0)
    assert ("one CUDA graph" if core is None else "launched kernel by kernel") in other.reason


def test_a_replayed_minibatch_that_is_not_finite_changes_nothing():
    collector, update = composed("cpu", dtype=torch.float64)
    other = moved(update)
    for number, batch in zip(range(3), collector, strict=False):
        if number == 2:
            batch["action_log_prob"][ROWS - 1] = torch.nan
            for u, b in ((update, batch), (other, batch.to(CUDA))):
                with pytest.raises(FloatingPointError, match="epoch 0, minibatch 1"):
                    u(b)
        else:
            update(batch.clone()), other(batch.clone().to(CUDA))
    torch.testing.assert_close(parameters_of(update), parameters_of(other), atol=1e-8, rtol=0)


def test_trials_replay_and_every_check_holds():
    collector, update = composed(CUDA)
    check_training(collector, update)


def test_graphs_play_what_single_steps_play():
    """Batches 1 (warm-up), 2 (recorded) and later (replayed) against TorchRL's collector: the same generator, so the same steps."""
    collector, _ = composed(CUDA, keep=False, exploration_type=ExplorationType.DETERMINISTIC)
    plain = Collector(
        bandit_env(CUDA),
        collector.policy,
        frames_per_batch=ROWS * PULLS,
        total_frames=-1,
        auto_register_policy_transforms=True,
        exploration_type=ExplorationType.DETERMINISTIC,
    )
    for batch, other, _ in zip(collector, plain, range(5), strict=False):
        for key in ("action", ("next", "reward"), "trans", "task", "is_init", ("next", "done")):
            assert torch.equal(batch[key].cpu(), other[key].cpu()), key
        torch.testing.assert_close(batch["action_log_prob"], other["action_log_prob"], atol=1e-5, rtol=0)


def test_replayed_batches_differ_and_play_the_tasks_that_they_show():
    collector, _ = composed(CUDA, keep=False)
    seen = []
    for batch, _ in zip(collector, range(6), strict=False):
        seen.append(batch.select("action", "task", ("next", "reward")).clone())
    actions = torch.stack([batch["action"] for batch in seen]).float()
    assert len({tuple(row.flatten().tolist()) for row in actions.cpu()}) == len(seen)
    assert len({tuple(batch["task"].flatten().tolist()) for batch in seen}) == len(seen)
    # With these few steps a mean is rough; rewards of graphs that kept their first tasks would not follow the shown ones at all.
    means = torch.cat(
        [batch["task"].gather(-1, batch["action"].long().reshape(ROWS, PULLS, 1)).flatten() for batch in seen]
    )
    rewards = torch.cat([batch["next", "reward"].flatten() for batch in seen])
    assert torch.corrcoef(torch.stack([means, rewards]))[0, 1] > 0.4


def test_a_gaussian_agent_trains_on_cuda():
    env = TransformedEnv(
        PointRobot(batch_size=(8,), device=CUDA),
        Compose(Trial(episodes=2), TaskSampler(goals_on_half_circle(), seed=1), PreviousStep()),
    )
    actor = GRUGaussianActor.from_env(env, hidden_size=8)
    critic = GRUValueHead.from_env(env, hidden_size=8)
    update = PPOUpdate(RL2PPOLoss(actor, critic), bptt=10, epochs=1, minibatches=2)
    collector = TrialCollector(
        env, ActorCritic(actor, critic), keep=update.in_keys, frames_per_batch=320, total_frames=960
    )
    for batch in collector:
        metrics = update(batch)
    assert metrics["epochs"] == 1
    assert next(actor.parameters()).device.type == "cuda"


def test_a_run_goes_on_bitwise(tmp_path):
    def run(frames, **options):
        collector, update = composed(CUDA, total_frames=frames)
        train(collector, update, evaluate=None, progress=False, **options)
        return parameters_of(update)

    frames = ROWS * PULLS
    whole = run(8 * frames)
    run(8 * frames, checkpoints=tmp_path / "c", checkpoint_interval=2, stop=Stop(4))
    torch.testing.assert_close(run(8 * frames, checkpoints=tmp_path / "c", resume=True), whole, atol=0, rtol=0)


@pytest.mark.parametrize(("then", "now"), [(CUDA, "cpu"), ("cpu", CUDA)])
def test_a_run_does_not_go_on_elsewhere(then, now, tmp_path):
    def run(device, **options):
        collector, update = composed(device, total_frames=4 * ROWS * PULLS)
        train(collector, update, evaluate=None, progress=False, check=False, checkpoints=tmp_path / "c", **options)

    run(then, stop=Stop(2))
    with pytest.raises(ValueError, match=r"elsewhere \(device of env: .*then, .*now; device of networks: .*start anew"):
        run(now, resume=True)


def test_evaluation_plays_there():
    collector, _ = composed(CUDA)
    curve = adaptation_curve(bandit_env(CUDA), collector.policy, num_trials=64)
    assert curve.returns.shape == (64, PULLS)


# -------------------------------------------------------- what a user may combine


def trained(collector, update, batches=3):
    """Metrics of a few updates."""
    return [update(batch) for batch, _ in zip(collector, range(batches), strict=False)]


def test_rewards_are_scaled_there():
    collector, update = composed(CUDA)
    update.advantage = TrialAdvantage(scale_rewards=True)
    assert all(torch.tensor(metrics["loss"]).isfinite() for metrics in trained(collector, update))


def test_a_generator_of_the_cpu_seeds_the_shuffling_there():
    losses = []
    for _ in range(2):
        collector, update = composed(CUDA, shuffle=True, generator=torch.Generator().manual_seed(3))
        torch.manual_seed(1)
        losses.append([metrics["loss"] for metrics in trained(collector, update)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("devices", [{"storing_device": "cpu"}, {"policy_device": CUDA, "env_device": "cpu"}], ids=str)
def test_batches_may_lie_elsewhere_than_the_networks(devices):
    _, update = composed(CUDA)
    actor, critic = update.loss.actor_network, update.loss.critic_network
    collector = TrialCollector(
        bandit_env("cpu" if "env_device" in devices else CUDA),
        ActorCritic(actor, critic),
        keep=update.in_keys,
        frames_per_batch=ROWS * PULLS,
        total_frames=-1,
        **devices,
    )
    check_training(collector, update)
    assert all(torch.tensor(metrics["loss"]).isfinite() for metrics in trained(collector, update))


def test_collectors_own_loop_counts_trajectories_on_the_cpu():
    _, update = composed(CUDA)
    policy = ActorCritic(update.loss.actor_network, update.loss.critic_network)
    frames = {"frames_per_batch": ROWS * PULLS, "total_frames": -1}
    trained(Collector(bandit_env(CUDA), policy, auto_register_policy_transforms=True, **frames), update)


def test_networks_that_are_moved_after_their_update_was_made_are_told_of():
    _, update = composed("cpu")
    update.loss.to(CUDA)
    with pytest.raises(RuntimeError, match="networks are on cuda:0, and were on cpu when this update was made"):
        trained(composed(CUDA)[0], update)


def test_agents_are_taken_away_from_there():
    collector, update = composed(CUDA)
    trained(collector, update)
    agent = AdaptiveAgent.from_policy(update.loss.actor_network, collector.env)
    agent.new_trial()
    assert 0 <= int(agent.act()) < ARMS


def test_what_is_frozen_in_mid_training_stays():
    collector, update = composed(CUDA)
    trained(collector, update)
    frozen = next(update.loss.critic_network.parameters())
    before = frozen.requires_grad_(False).detach().clone()
    trained(collector, update)
    assert torch.equal(frozen, before)


class Walk(TensorEnv):
    """A walk of 5 steps, pushed by ``wind``; ``reads`` a number in each step."""

    def __init__(self, *, reads=False, **kwargs):
        specs = {"task_spec": Unbounded(1), "observation_spec": Unbounded(1), "action_spec": Unbounded(1)}
        super().__init__(**specs, max_episode_steps=5, fixed_length=True, **kwargs)
        self.reads, self.wind = reads, 0.0

    def begin(self, task, rows):
        return task, torch.zeros_like(task)

    def advance(self, state, action):
        place = state + self.wind + (state.sum().item() if self.reads else 0) * 0
        return place, place, place, None, None


def walking(**options):
    tasks = TaskSampler(lambda batch_size, generator: torch.zeros(*batch_size, 1), seed=1)
    env = TransformedEnv(
        Walk(batch_size=(4,), device=CUDA, **options), Compose(Trial(episodes=1), tasks, PreviousStep())
    )
    actor = GRUGaussianActor.from_env(env, hidden_size=4)
    return env.base_env, TrialCollector(env, actor, frames_per_batch=20, total_frames=-1)


def test_an_env_that_reads_a_number_is_launched_step_by_step_which_the_log_says(caplog):
    env, collector = walking(reads=True)
    for batch, _ in zip(collector, range(4), strict=False):
        assert batch["next", "reward"][0, :, 0].tolist() == [0] * 5
    assert caplog.text.count("a batch cannot be one CUDA graph") == 1


def test_a_graph_is_recorded_anew_where_a_number_of_the_env_has_changed(caplog):
    env, collector = walking()
    seen = []
    for batch, number in zip(collector, range(8), strict=False):
        seen.append(batch["next", "reward"][0, -1, 0].item())
        env.wind = float(number // 4)
    assert seen == [0, 0, 0, 0, 0, 5, 5, 5]
    assert not caplog.text


def test_a_report_shows_curves_of_the_device(tmp_path):
    curve = AdaptationCurve(torch.rand(8, PULLS, device=CUDA))
    AdaptationReport(agent=curve, greedy=curve, baselines={"random": curve}).save(tmp_path)
    assert list(tmp_path.glob("*.png"))
