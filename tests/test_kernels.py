"""The compiled functions of heads and loss give PyTorch's numbers and gradients, and so do their fallbacks."""

import pytest
import torch
from torch import nn
from torch.distributions import Categorical

from rl2_torchrl import kernels
from rl2_torchrl.kernels.functions import largest, linear_gradients, linear_kernel, log_prob_and_entropy
from rl2_torchrl.objectives.terms import ClippedObjective

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}

needs_kernels = pytest.mark.skipif(kernels.load(torch.float32) is None, reason="no C compiler")
HUGE = 2**26  # units; with as many threads no machine has the memory
NOTHING = (None, 0, 0)
MEMORYLESS = [
    ("gru_forward", (1, 1, 1, HUGE, *NOTHING, *NOTHING, None, None, None, None, HUGE)),
    ("gru_backward", (1, 1, 1, HUGE, *NOTHING, None, None, None, None, HUGE)),
    ("gru_input_gradient", (1, 1, HUGE, None, None, None, HUGE)),
    ("linear_forward", (1, HUGE, HUGE, 1, *(None,) * 4, HUGE)),
    ("linear_backward", (1, HUGE, 1, 1, *(None,) * 6, HUGE)),
]


@pytest.fixture(params=["kernels", "fallback"])
def path(request, monkeypatch):
    if request.param == "fallback":
        monkeypatch.setattr(kernels, "load", lambda dtype: None)
    return request.param


def close(ours, theirs):
    size = max(1.0, float(theirs.abs().max()))
    assert (ours - theirs).abs().max() <= TOLERANCE[theirs.dtype] * size


# --------------------------------------------------------------------- choices
@needs_kernels
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("choices", [1, 5, 40])
def test_the_largest_sum_is_torchs(choices, dtype):
    torch.manual_seed(0)
    logits, noise = torch.randint(-2, 3, (2, 60, choices)).to(dtype)  # many are as large
    logits[0], logits[1, -1], noise[2, 0], logits[3, choices // 2 :] = -torch.inf, torch.inf, torch.nan, torch.nan
    assert torch.equal(largest(logits, noise), (logits + noise).argmax(-1))


@pytest.mark.parametrize("noise", [torch.zeros(3, 4).double(), torch.zeros(3, 1), torch.zeros(4, 3).t()])
def test_a_kernel_leaves_what_it_cannot_read_to_torch(noise):
    assert largest(torch.zeros(3, 4), noise) is None


# --------------------------------------------------------------- linear layers
@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [
        (1, 1, 1),
        (7, 5, 1),
        (33, 64, 10),
        (8, 16, 16),
        (9, 50, 17),
        (70, 12, 64),
        (1600, 64, 1),
        (1600, 64, 11),
        (40, 128, 256),
    ],
)
def test_a_linear_layer_by_kernels_equals_torchs(rows, inputs, outputs, relu, dtype):
    torch.manual_seed(0)
    shapes = ((rows, inputs), (outputs, inputs), (outputs,), (rows, outputs))
    x, w, b, slope = (torch.randn(*shape, dtype=dtype) for shape in shapes)
    slope /= rows**0.5  # a sum of many rows rounds by what it has passed through, not by what it is
    ours, alone = ([torch.empty_like(tensor) for tensor in (x, w, b)] for _ in range(2))
    linear_gradients(x, w, slope, *ours, relu=relu)
    linear_gradients(x, w, slope, None, *alone[1:], relu=relu)
    leaves = [leaf.requires_grad_() for leaf in (x, w, b)]
    y = nn.functional.linear(torch.relu(x) if relu else x, w, b)
    close(linear_kernel(w, b, relu=relu)(x), y)
    close(linear_kernel(w, None, relu=relu)(x), y - b)
    for our, their in zip(
        (*ours, *alone[1:]), (*(theirs := torch.autograd.grad(y, leaves, slope)), *theirs[1:]), strict=True
    ):
        close(our, their)


@needs_kernels
def test_a_linear_layer_by_kernels_reads_strided_weights():
    torch.manual_seed(0)
    x, w, b = torch.randn(6, 4), torch.randn(4, 3).t(), torch.randn(6)[::2]
    kernel = linear_kernel(w, b, relu=True)
    torch.randn(3)  # in the place of a bias that nobody holds
    close(kernel(x), nn.functional.linear(torch.relu(x), w, b))


@needs_kernels
@pytest.mark.parametrize("relu", [True, False])
def test_a_linear_layer_by_kernels_carries_nan(relu):
    x = torch.ones(9, 8)
    x[3, 5] = torch.nan
    out = linear_kernel(torch.ones(2, 8), None, relu=relu)(x)
    assert out.isnan().any(-1).nonzero().tolist() == [[3]]


# ----------------------------------------------------------------- categorical
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (5, 2), (3, 7, 10), (40, 33)])
def test_categorical_equals_torchs_distribution(path, shape, dtype):
    torch.manual_seed(0)
    logits = (3 * torch.randn(shape, dtype=dtype)).requires_grad_()
    action = torch.randint(shape[-1], shape[:-1])
    theirs = Categorical(logits=logits)
    ours = log_prob_and_entropy(action, logits)
    theirs = (theirs.log_prob(action), theirs.entropy())
    slopes = [torch.randn(shape[:-1], dtype=dtype) for _ in ours]
    for our, their in zip(ours, theirs, strict=True):
        close(our, their)
    close(torch.autograd.grad(ours, logits, slopes)[0], torch.autograd.grad(theirs, logits, slopes)[0])


def test_impossible_and_certain_choices(path):
    logits = torch.tensor([[0.0, -torch.inf, 0.0], [500.0, 0.0, -500.0]], requires_grad=True)
    log_prob, entropy = log_prob_and_entropy(torch.tensor([0, 1]), logits)
    close(log_prob, torch.tensor([0.5, 0.0]).log().nan_to_num(neginf=-500.0))
    close(entropy, torch.tensor([2.0, 1.0]).log())
    (log_prob.sum() + entropy.sum()).backward()
    assert logits.grad.isfinite().all()
    assert log_prob_and_entropy(torch.tensor([1]), logits[:1])[0] == -torch.inf


def test_nan_logits_give_nan(path):
    logits = torch.zeros(3, 4)
    logits[1, 2] = torch.nan
    for out in log_prob_and_entropy(torch.zeros(3, dtype=torch.int64), logits):
        assert out.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("action", [-1, 4])
def test_an_action_that_is_no_choice_is_an_error(path, action):
    with pytest.raises((IndexError, RuntimeError), match="choices|out of bounds"):
        log_prob_and_entropy(torch.tensor([0, action]), torch.zeros(2, 4))


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1), ()])
def test_there_is_one_action_a_row(path, shape):
    with pytest.raises(ValueError, match="one a row"):
        log_prob_and_entropy(torch.zeros(shape, dtype=torch.int64), torch.zeros(2, 4))


def test_actions_of_other_whole_dtypes(path):
    action, logits = torch.tensor([2, 0, 1]), torch.randn(3, 4)
    for ours, theirs in zip(
        log_prob_and_entropy(action.int(), logits), log_prob_and_entropy(action, logits), strict=True
    ):
        assert torch.equal(ours, theirs)


# ----------------------------------------------------------------- clipped objective
def clipped_objective(log_prob, old, advantage, low, high):
    return ClippedObjective(low, high)(log_prob, old, advantage.unsqueeze(-1))


def reference(log_prob, old, advantage, low, high):
    ratio = (log_prob - old).exp()
    clipped = ratio.clamp(low, high)
    out = {"loss_objective": -torch.min(ratio * advantage, clipped * advantage).mean()}
    out |= {"clip_fraction": (ratio != clipped).to(ratio).mean(), "kl_approx": (old - log_prob).mean()}
    out |= {"mean_ratio": ratio.mean(), "max_ratio": ratio.max()}
    return out | {"ESS": ratio.sum(0).square() / ratio.square().sum(0) / len(ratio)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 100)])
def test_clipped_objective_equals_its_formula(path, shape, dtype):
    torch.manual_seed(0)
    old, advantage = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    log_prob = (old + 0.4 * torch.randn(shape, dtype=dtype)).requires_grad_()
    bounds = torch.tensor([0.8, 1.3], dtype=dtype)
    ours = clipped_objective(log_prob, old, advantage, *bounds.log().tolist())
    theirs = reference(log_prob, old, advantage, *bounds)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        close(ours[name], value)
        assert ours[name].requires_grad == (name == "loss_objective")
    slopes = [torch.autograd.grad(3 * out["loss_objective"], log_prob)[0] for out in (ours, theirs)]
    close(*slopes)


def test_a_ratio_beyond_all_numbers_is_infinite(path):
    out = clipped_objective(torch.full((1, 2), 200.0), torch.zeros(1, 2), -torch.ones(1, 2), -0.2, 0.2)
    assert out["loss_objective"] == torch.inf
    assert out["max_ratio"] == torch.inf


@pytest.mark.parametrize("which", range(3))
def test_clipped_objective_carries_nan(path, which):
    inputs = [torch.zeros(2, 20), torch.zeros(2, 20), torch.ones(2, 20)]
    inputs[which][1, 3] = torch.nan
    assert clipped_objective(*inputs, -0.2, 0.2)["loss_objective"].isnan()


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("shape", [(1, 20), (2, 20, 1), (40,)])
def test_clipped_objective_of_several_shapes(path, which, shape):
    inputs = [torch.zeros(2, 20) for _ in range(3)]
    inputs[which] = torch.zeros(shape)
    with pytest.raises(ValueError, match="one shape"):
        clipped_objective(*inputs, -0.2, 0.2)


def test_strided_inputs_of_the_clipped_objective(path):
    torch.manual_seed(0)
    inputs = [torch.randn(5, 3).t() for _ in range(3)]
    bounds = (-0.2, 0.2)
    strided, contiguous = (
        clipped_objective(*inputs, *bounds),
        clipped_objective(*[x.contiguous() for x in inputs], *bounds),
    )
    for name, theirs in contiguous.items():
        close(strided[name], theirs)


# ------------------------------------------------------------------ memory
@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("call", MEMORYLESS)
def test_a_kernel_without_memory_to_work_in_says_so(call, dtype):
    name, arguments = call
    with pytest.raises(MemoryError, match=f"no memory for {name}"):
        getattr(kernels.load(dtype), name)(*arguments)


# ------------------------------------------------------------------ what they refuse
def test_kernels_refuse_what_they_cannot_read():
    logits, action = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    for wrong in (action[:3], action.unsqueeze(-1), action.to("meta")):
        with pytest.raises(ValueError, match="give one a row.*on the same device"):
            log_prob_and_entropy(wrong, logits)
    x, w = torch.zeros(5, 4), torch.zeros(2, 4)
    for dy, error in ((torch.zeros(4, 2), ValueError), (torch.zeros(5, 2).double(), TypeError)):
        with pytest.raises(error, match="dy"):
            linear_gradients(x, w, dy, None, torch.zeros(2, 4), torch.zeros(2), relu=True)
