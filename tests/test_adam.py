"""The kernels' Adam takes the steps of PyTorch's, and says where it does not."""

import ctypes
import math
import subprocess
import sys
import warnings
from functools import partial, wraps
from types import MethodType

import pytest
import torch
from loss_cases import INPUTS, batch_of, loss_of, needs_kernels
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torchrl.modules import ProbabilisticActor

from rl2_torchrl import PPOUpdate, RL2PPOLoss, kernels
from rl2_torchrl.gradients.adam import AdamSteps, OptimizerSteps, _Options, _Row, steps_by, why_not_adam

pytestmark = needs_kernels

SHAPES = ((7, 5), (33,), (1,), (4, 16))
#: One parameter gets its first gradient late, and another none in between; one gradient lies transposed.
LATE, PAUSING, TRANSPOSED = 1, 2, 0


def _after(steps_of, cls, dtype, max_norm, fused):
    """Parameters, state and norms after five steps with two groups."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    groups = [
        {"params": parameters[:2]},
        {"params": parameters[2:], "lr": 0.02, "weight_decay": 0.3, "betas": (0.5, 0.8), "eps": 1e-3},
    ]
    optimizer, norms = cls(groups, lr=0.1, fused=fused), []
    steps = steps_of(optimizer, parameters)
    for number in range(5):
        for which, parameter in enumerate(parameters):
            is_missing = (which == LATE and number < 2) or (which == PAUSING and number == 3)
            gradient = torch.randn(parameter.shape, dtype=dtype)
            gradient = gradient.t().contiguous().t() if which == TRANSPOSED else gradient
            parameter.grad = None if is_missing else gradient
        norms.append(steps.take(max_norm))
    return parameters, [optimizer.state[p] for p in parameters], norms


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.AdamW, partial(torch.optim.Adam, weight_decay=0.1)])
@pytest.mark.parametrize("max_norm", [None, 3.0, 1e3])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_steps_of_pytorchs_adam(cls, dtype, tolerance, max_norm):
    expected, states, norms = _after(OptimizerSteps, cls, dtype, max_norm, fused=False)
    ours, our_states, our_norms = _after(lambda optimizer, _: AdamSteps(optimizer), cls, dtype, max_norm, fused=True)
    assert our_norms == pytest.approx(norms, rel=tolerance)
    for one, other, state, our_state in zip(expected, ours, states, our_states, strict=True):
        torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance)
        assert state.keys() == our_state.keys()
        for name, entry in state.items():
            torch.testing.assert_close(our_state[name], entry, rtol=tolerance, atol=tolerance)
    assert [float(state["step"]) for state in our_states] == [5, 3, 4, 5]


def test_a_norm_by_hand():
    parameter = nn.Parameter(torch.zeros(20))
    parameter.grad = torch.zeros(20)
    parameter.grad[[3, 18]] = torch.tensor([3.0, 4.0])
    steps = AdamSteps(torch.optim.Adam([parameter], lr=0.5))
    assert steps.take(None) == 5  # the first step is lr against the gradient's sign, whatever its size
    expected = torch.zeros(20)
    expected[[3, 18]] = -0.5
    torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_norm_and_no_step_is_taken(bad):
    parameter = nn.Parameter(torch.zeros(40))
    optimizer = torch.optim.Adam([parameter])
    for place in (0, 39):
        for steps in (AdamSteps(optimizer), OptimizerSteps(optimizer, [parameter])):
            parameter.grad = torch.ones(40)
            parameter.grad[place] = bad
            assert not math.isfinite(steps.take(1.0))
            assert not parameter.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "more than torch.optim.Adam"),
        (lambda p: torch.optim.Adam(p, maximize=True), "more than torch.optim.Adam"),
        (lambda p: _hooked(torch.optim.Adam(p)), "more than torch.optim.Adam"),
        (lambda p: _with_own_step(torch.optim.Adam(p)), "more than torch.optim.Adam"),
        (lambda p: _scheduled(_with_own_step(torch.optim.Adam(p))), "more than torch.optim.Adam"),
        (lambda p: _with_own_step(_scheduled(torch.optim.Adam(p))), "more than torch.optim.Adam"),
        (lambda p: torch.optim.Adam(p[1:]), "does not hold all"),
        (lambda p: torch.optim.Adam([*p, nn.Parameter(torch.ones(1, dtype=torch.float64))]), "no kernels"),
        (lambda p: torch.optim.Adam(p), None),
        (lambda p: torch.optim.Adam(p, weight_decay=0.1), None),
        (lambda p: _scheduled(torch.optim.Adam(p)), None),
        (lambda p: torch.optim.AdamW(p), None),
    ],
)
def test_other_optimizers_take_their_own_steps(make, message):
    parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = make(parameters)
    refusal = why_not_adam(optimizer, parameters)
    assert refusal is None if message is None else message in refusal
    assert not optimizer.state
    assert isinstance(steps_by(optimizer, parameters), AdamSteps if message is None else OptimizerSteps)


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adagrad", "Adamax", "ASGD", "NAdam", "Adam", "AdamW"])
def test_all_of_pytorchs_optimizers_may_let_weights_decay(name):
    loss = loss_of("categorical", "separate", torch.float32)
    optimizer = getattr(torch.optim, name)(loss.parameters(), lr=0.1, weight_decay=0.1)
    PPOUpdate(loss, optimizer=optimizer)
    is_ours = isinstance(steps_by(optimizer, list(loss.parameters())), AdamSteps)
    assert is_ours is (name in ("Adam", "AdamW"))


def _hooked(optimizer):
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


def _with_own_step(optimizer):
    step = optimizer.step

    @wraps(step)
    def own(*args, **kwargs):
        return step(*args, **kwargs)

    optimizer.step = MethodType(own, optimizer)
    return optimizer


def test_a_scheduler_is_followed_and_has_nothing_to_warn_of():
    rates, parameter = [], nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([parameter], lr=1.0)
    scheduler, steps = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5), steps_by(optimizer, [parameter])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            before, parameter.grad = parameter.item(), torch.ones(1)
            steps.take(None)
            rates.append(before - parameter.item())  # a constant gradient's step is lr
            scheduler.step()
    assert isinstance(steps, AdamSteps)
    assert rates == pytest.approx([1.0, 0.5, 0.25], rel=1e-6)


def _scheduled(optimizer):
    torch.optim.lr_scheduler.ConstantLR(optimizer)
    return optimizer


def test_averages_that_lie_transposed_and_steps_counted_by_numbers_are_pytorchs():
    parameter = nn.Parameter(torch.zeros(3, 2))
    optimizer = torch.optim.Adam([parameter])
    state = optimizer.state[parameter]
    state |= {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2, 3).T, "exp_avg_sq": torch.zeros(3, 2)}
    assert "dtypes, device or layout" in why_not_adam(optimizer, [parameter])
    state |= {"step": torch.tensor(1.0, dtype=torch.float64), "exp_avg": torch.zeros(3, 2)}
    assert "dtypes, device or layout" in why_not_adam(optimizer, [parameter])
    state["step"] = torch.tensor(1.0)
    assert why_not_adam(optimizer, [parameter]) is None


@pytest.mark.parametrize("backend", ["parts", "autograd"])
def test_weights_may_be_put_anew_between_two_minibatches(backend):
    """As a bound on their size does it; one of them lies transposed afterwards."""
    ends = []
    for is_own in (False, True):
        loss = loss_of("categorical", "separate", torch.float64)
        layers = [m for m in loss.actor_network.modules() if isinstance(m, nn.Linear | nn.GRU)]

        def bound(module, inputs):
            for parameter in module.parameters():
                data = parameter.data.clamp(-0.05, 0.05)
                parameter.data = data.t().contiguous().t() if data.ndim == 2 else data

        for layer in layers:
            layer.register_forward_pre_hook(bound)
        optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2, foreach=False)
        if is_own:
            optimizer.register_step_post_hook(lambda *_: None)
        update = PPOUpdate(loss, minibatches=3, epochs=2, shuffle=False, optimizer=optimizer, backend=backend)
        for _ in range(3):
            update(batch_of("categorical", torch.float64))
        ends.append([p.detach() for p in loss.parameters()])
    for ours, expected in zip(*ends, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)


class _Slows(nn.Module):
    """A term that lowers the learning rate."""

    in_keys = ("logits",)

    def forward(self, logits):
        self.group["lr"] *= 0.8
        return {"loss_size": 1e-3 * logits.square().mean()}


@pytest.mark.parametrize("backend", ["parts", "autograd"])
def test_a_learning_rate_may_change_between_two_minibatches(backend):
    ends = []
    for is_own in (False, True):
        loss = loss_of("categorical", "separate", torch.float64)
        loss = RL2PPOLoss(loss.actor_network, loss.critic_network, terms=[_Slows()])
        optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
        loss.terms[0].group = optimizer.param_groups[0]
        if is_own:
            optimizer.register_step_post_hook(lambda *_: None)
        update = PPOUpdate(loss, minibatches=3, epochs=2, shuffle=False, optimizer=optimizer, backend=backend)
        update(batch_of("categorical", torch.float64))
        ends.append([p.detach() for p in loss.parameters()])
    for ours, expected in zip(*ends, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", ["parts", "autograd"])
def test_a_graph_of_before_an_update_cannot_be_gone_back_through(backend):
    loss, batch = loss_of("categorical", "separate", torch.float64), batch_of("categorical", torch.float64)
    update = PPOUpdate(loss, minibatches=3, epochs=1, backend=backend)
    before = loss(batch)["loss_objective"]
    update(batch)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.backward()


def test_hooks_on_all_optimizers_are_called():
    loss, calls = loss_of("categorical", "separate", torch.float32), []
    handle = register_optimizer_step_post_hook(lambda *_: calls.append(1))
    try:
        PPOUpdate(loss, minibatches=3, epochs=2)(batch_of("categorical", torch.float32))
    finally:
        handle.remove()
    assert len(calls) == 6


def test_a_class_below_adam_takes_its_own_steps_and_the_first_adamw_of_a_process_does_not():
    class Other(torch.optim.Adam):
        def step(self, closure=None):
            return super().step(closure)

    parameters = [nn.Parameter(torch.ones(3))]
    assert "more than" in why_not_adam(Other(parameters), parameters)
    # PyTorch puts another step in the place of that of each class whose first object is made, and more when it compiles.
    code = (
        "import torch; from rl2_torchrl.gradients.adam import why_not_adam; p = [torch.nn.Parameter(torch.ones(3))]\n"
        "assert why_not_adam(torch.optim.AdamW(p), p) is None\n"
        "torch.compile(lambda x: x + 1, backend='eager')(p[0])\n"
        "assert [why_not_adam(cls(p), p) for cls in (torch.optim.Adam, torch.optim.AdamW)] == [None, None]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_whose_steps_are_taken_is_told():
    loss = loss_of("categorical", "separate", torch.float32)
    for optimizer, told in (
        (torch.optim.SGD(loss.parameters(), lr=0.1), True),
        (torch.optim.AdamW(loss.parameters()), False),
    ):
        reason = PPOUpdate(loss, minibatches=3, optimizer=optimizer).reason
        assert ("SGD takes its steps itself: the optimizer is more than" in reason) == told


def test_a_step_of_the_users_own_is_called():
    loss = loss_of("categorical", "separate", torch.float32)
    optimizer, calls = torch.optim.Adam(loss.parameters()), []
    update = PPOUpdate(loss, minibatches=3, epochs=2, optimizer=optimizer)
    step = optimizer.step
    optimizer.step = lambda *args: (calls.append(1), step(*args))
    update(batch_of("categorical", torch.float32))
    assert len(calls) == 6


class _Tilted(nn.Module):
    """What reads its weight transposed, so that autograd gives a transposed gradient."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(
            torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        )

    def forward(self, x):
        return x + (x.unsqueeze(-1) * self.weight.t()).sum(-2).sin()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_gradient_lies_in_memory_as_its_parameter_does(weight_decay):
    """PyTorch's fused optimizers take any other for it, without a word (seen with 2.13)."""
    ends = []
    for backend in ("parts", "autograd"):
        loss = loss_of("categorical", "separate", torch.float64)
        tilted = TensorDictModule(_Tilted(INPUTS), ["trans"], ["trans"])
        actor = ProbabilisticActor(
            TensorDictSequential(tilted, loss.actor_network.module[0]),
            in_keys=["logits"],
            distribution_class=torch.distributions.Categorical,
            return_log_prob=True,
        )
        loss = RL2PPOLoss(actor, loss.critic_network)
        optimizer = torch.optim.Adam(loss.parameters(), lr=0.1, weight_decay=weight_decay, fused=True)
        update = PPOUpdate(loss, minibatches=3, epochs=2, optimizer=optimizer, shuffle=False, backend=backend)
        update(batch_of("categorical", torch.float64))
        assert all(p.grad is None or p.grad.stride() == p.stride() for p in loss.parameters())
        ends.append([p.detach() for p in loss.parameters()])
    for ours, expected in zip(*ends, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_structures_are_laid_out_as_the_kernels_have_them(dtype):
    layout = kernels.load(dtype).adam_layout
    assert list(map(ctypes.sizeof, (_Options, _Row))) == [layout(0), layout(1)]
