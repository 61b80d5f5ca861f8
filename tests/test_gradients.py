"""Programs give the losses and gradients that TorchRL's own `ClipPPOLoss` gives under autograd."""

import pytest
import torch
from loss_cases import COMPILED, CRITICS, HEADS, STEPS, assert_same, data_of, loss_of

from rl2_torchrl import GRUGaussianActor, RL2PPOLoss
from rl2_torchrl.gradients import Program

KINDS = [f"{family}{head}" for family in ("categorical", "gaussian") for head in HEADS]
KINDS.remove("gaussian, skip")  # which a Gaussian actor has not here
#: Each actor beside a critic that adds to the gradient by its features, and one that does not; each critic beside both families.
PAIRS = {(kind, critic) for kind in KINDS for critic in ("separate", "shared, extra")}
PAIRS |= {(family, critic) for family in ("categorical", "gaussian") for critic in CRITICS}
#: In single precision, and in steps of one: each actor, and each critic.
LINES = {(kind, "shared, extra") for kind in KINDS} | {("gaussian", critic) for critic in CRITICS}
CASES = [
    (dtype, steps, *pair)
    for dtype, steps, pairs in (
        (torch.float64, STEPS, PAIRS),
        (torch.float64, 1, LINES),
        (torch.float32, STEPS, LINES),
        (torch.float32, 1, {("categorical", "shared"), ("gaussian", "separate")}),
    )
    for pair in sorted(pairs)
]


@pytest.mark.parametrize(("dtype", "steps", "kind", "critic"), CASES)
def test_losses_and_gradients_are_torchrls(dtype, steps, kind, critic):
    entropy, tolerance = None if steps == 1 else 0.1, 1e-12 if dtype == torch.float64 else 1e-5
    loss = loss_of(kind, critic, dtype, entropy_bonus=entropy is not None, entropy_coeff=entropy)
    program = assert_same(loss, data_of(kind, dtype, steps, layers=2 if "layers" in kind else 1), tolerance)
    if COMPILED:
        kinds = [part.kind for part in program.parts]
        assert kinds.count("autograd") == ("elu" in kind)


@pytest.mark.parametrize("family", ["categorical", "gaussian"])
@pytest.mark.parametrize("entry", ["advantage", "action_log_prob"])
def test_data_of_another_dtype_than_the_policys(family, entry):
    data = data_of(family, torch.float32)
    assert_same(loss_of(family, "separate", torch.float32), {**data, entry: data[entry].double()}, 1e-5)


def test_a_gradient_by_hand():
    """One step, one unit, all GRU weights 0: h = 0, so that the mean is the last bias, and z = a - mean with log_std = 0."""
    actor = GRUGaussianActor(1, 1, hidden_size=1, init_log_std=0.0)
    loss = RL2PPOLoss(actor, clip_epsilon=0.2)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.zero_()
    # a = 2: log p = -2 - log(2 pi) / 2. The old log-probability is the same: r = 1, the objective is A = 3.
    data = {"trans": torch.ones(1, 1, 1), "is_init": torch.ones(1, 1, 1, dtype=torch.bool)}
    data |= {"action": torch.full((1, 1, 1), 2.0), "advantage": torch.full((1, 1, 1), 3.0)}
    data["action_log_prob"] = torch.full((1, 1), -2 - 0.9189385332)
    assert Program(loss)(data)["loss_objective"] == pytest.approx(-3)
    gradients = {
        name.rpartition(".")[-1]: p.grad for name, p in loss.named_parameters() if "layers" in name or "log_std" in name
    }
    assert gradients["bias"].item() == pytest.approx(-3 * 2)  # -A z
    assert gradients["log_std"].item() == pytest.approx(-3 * (2**2 - 1))  # -A (z^2 - 1)
