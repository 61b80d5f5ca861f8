"""Rules on what learns: advantages that stay in their trial, a gradient and a step for every parameter, in the policy that acts."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs.utils import ExplorationType

from rl2_torchrl.checks.evidence import Evidence, NotChecked, Rule
from rl2_torchrl.workers import TrialWorkers

__all__ = ["RULES"]


def advantages_apart(seen: Evidence) -> str | None:
    """Other rewards and values in one trial leave advantages and returns of the other trials of its row as they are."""
    keys, rows, generator = seen.probe.loss.tensor_keys, seen.learnt_from, torch.Generator().manual_seed(0)
    made = [key for key in (keys.advantage, keys.value_target) if rows.get(key, None) is not None]
    trial = _trial(seen, rows)
    for mine in (trial.any(1, keepdim=True).expand_as(trial), trial):  # that other rows are apart is asked first
        changed = rows.copy()
        for key in (("next", "reward"), keys.value):
            if seen.has(key):
                entry = rows.get(key)
                noise = _scale(seen) * torch.randn(entry.shape, generator=generator).to(entry)
                changed.set(key, entry + noise * mine.reshape(*mine.shape, *(1,) * (entry.ndim - 2)))
        after = seen.advantage(changed)
        for key in made:
            if _moved(seen, rows[key], after[key], mine)[~mine].any():
                return f"{key!r} changes where only rewards and values of another trial of its row were changed"


def advantages_in_time(seen: Evidence) -> str | None:
    """A reward that is raised raises the advantage of its step, and of none behind it unless of those before it, too."""
    rows = seen.learnt_from
    mine = _trial(seen, rows)
    row, steps = mine.any(1).nonzero().item(), mine.any(0).nonzero().flatten()
    if len(steps) < 3:
        raise NotChecked("a trial of the batch has less than three steps")
    at, pair = len(steps) // 2, []
    for more in (-10, 10):  # an advantage may stand at a bound beyond which it is cut off, but hardly in both
        reward = rows["next", "reward"].clone()
        reward[row, steps[at]] += more * _scale(seen)
        pair.append(seen.advantage(rows.copy().set(("next", "reward"), reward))[seen.probe.loss.tensor_keys.advantage])
    moved = _moved(seen, *pair, mine)[mine]
    own, earlier, later = moved[at], moved[:at], moved[at + 1 :]
    if not moved.any():
        raise NotChecked("the advantage does not depend on the reward of a step in the middle of a trial")
    if later.any() and not earlier.any():
        return "a reward that is raised moves the advantages of later steps, and none of steps before it"
    if own <= 0:
        return f"a reward that is raised {'lowers' if own < 0 else 'does not move'} the advantage of its step"


#: For the log, since it may be as it shall.
_MIXED = (
    "rewards and values of one row change the advantages of others: as it shall be where rows share a baseline, or where what is "
    "normalised is cut off; else, as where sums run on from row to row, one task's rewards are credited to another's actions"
)


def _moved(seen: Evidence, before: torch.Tensor, after: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
    """By how much ``after`` is more than ``before`` in the row of the trial ``mine``, ``[R, T]``, 0 to rounding.

    Where all are normalised together, all other rows are moved and scaled by the same, ``a * before + b``, and so is this one.
    """
    others = ~mine.any(1, keepdim=True).expand_as(mine)
    if not others.any():
        raise NotChecked("the advantage makes nothing of less than the whole batch, which is a single row")
    x, y = (entry.reshape(mine.shape).double() for entry in (before, after))
    x, y, largest = x - x[others].mean(), y - y[others].mean(), y.abs().max()
    slope = (x * y)[others].sum() / x[others].square().sum().clamp_min(1e-30)
    off = y - slope * x
    off = off.where(off.abs() > max(1e-3, 4 * torch.finfo(after.dtype).eps) * largest, 0.0)
    if off[others].any():
        seen.report.notes = list(dict.fromkeys([*seen.report.notes, _MIXED]))
        raise NotChecked("the advantage mixes rows")
    at_bound = torch.stack([(entry == entry.max()) | (entry == entry.min()) for entry in (x, y)]).any(0)
    return off.where(mine | ~at_bound, 0.0)  # beyond which it may be cut off


def _scale(seen: Evidence) -> float:
    """How large rewards and values are, 1 where they are 0."""
    entries = [key for key in (("next", "reward"), seen.probe.loss.tensor_keys.value) if seen.has(key)]
    return sum(seen.sample.get(key).square().mean().sqrt().item() for key in entries) or 1.0


def _trial(seen: Evidence, rows: TensorDictBase) -> torch.Tensor:
    """The steps of a trial of ``rows``, bool ``[R, T]``: one that begins within a row, if any does."""
    seen.need(("next", "done"))
    starts, done = (rows.get(key).reshape(rows.shape) for key in ("is_init", ("next", "done")))
    begins = nn.functional.pad(starts[:, 1:], (1, 0))
    row = max(begins.any(1).nonzero().flatten().tolist(), default=len(begins) - 1)  # it has a row before it
    first = begins[row].int().argmax().item()
    ends = done[row, first:].nonzero()
    last = first + ends[0].item() if len(ends) else done.shape[1] - 1
    mine = torch.zeros_like(done)
    mine[row, first : last + 1] = True
    return mine


def gradients(seen: Evidence) -> str | None:
    """Every trainable parameter of the loss gets a gradient."""
    made = seen.probe.gradients(seen.losses)
    seen.report.frozen = [name for name, parameter in seen.loss.named_parameters() if not parameter.requires_grad]
    seen.report.zero_gradient = [name for name, g in made.items() if g is not None and g.numel() and not g.any()]
    missing = [name for name, gradient in made.items() if gradient is None]
    return f"no gradient reaches {missing}" if missing else None


def losses_have_gradients(seen: Evidence) -> str | None:
    """Every loss that a further term gives, unless it is 0, has a gradient."""
    further = [name for name in seen.losses.keys() if name.startswith("loss_") and name not in _PPOS]
    constant = [name for name in further if not seen.losses[name].requires_grad and bool(seen.losses[name] != 0)]
    return f"{constant} are numbers without a gradient" if constant else None


#: The losses of `RL2PPOLoss` itself; one whose network is frozen has no gradient, and nobody thinks that it has.
_PPOS = ("loss_objective", "loss_critic", "loss_entropy")


def optimizer(seen: Evidence) -> str | None:
    """Every trainable parameter of the loss is the optimizer's."""
    if seen.loss is None or getattr(seen.update, "optimizer", None) is None:
        raise NotChecked("the update shows no optimizer and loss")
    held = {id(parameter) for group in seen.update.optimizer.param_groups for parameter in group["params"]}
    missing = [name for name, p in seen.loss.named_parameters() if p.requires_grad and id(p) not in held]
    return f"the optimizer does not hold {missing}" if missing else None


def policy_is_trained(seen: Evidence) -> str | None:
    """The policy that acts holds the trainable parameters of the loss's actor, or is a part of it, and trained as a whole; one
    that writes values as well also those of the critic.
    """
    policy = getattr(seen.collector, "policy", None)
    if (
        not (isinstance(seen.collector, Collector | TrialWorkers) and isinstance(policy, nn.Module))
        or seen.loss is None
    ):
        raise NotChecked("the policy that acts is in other processes, or there is no loss")
    acting, trained = ({_place(p) for p in module.parameters()} for module in (policy, seen.loss))
    if {device for device, _ in acting} != {device for device, _ in trained}:
        raise NotChecked("the policy acts on another device")
    value_key = getattr(getattr(seen.loss, "tensor_keys", None), "value", None)
    writes_values = value_key in getattr(policy, "out_keys", ())
    for network in ("actor", "critic") if writes_values else ("actor",):
        # With a functional loss a network's weights lie beside it, in actor_network_params.
        named = [(name, p) for name, p in seen.loss.named_parameters() if name.startswith(f"{network}_network")]
        learns = {name: _place(p) for name, p in named if p.requires_grad}
        missing = [name for name, place in learns.items() if place not in acting]
        is_part = acting <= trained and len(missing) < len(learns)
        if missing and not is_part:
            return f"the collector's policy does not hold {missing}"


def actions_are_drawn(seen: Evidence) -> str | None:
    """The collector acts by draws of the policy's distribution."""
    kind = getattr(seen.collector, "exploration_type", ExplorationType.RANDOM)
    return None if kind is ExplorationType.RANDOM else f"the collector's exploration_type is {kind.name}"


def _place(parameter: nn.Parameter) -> tuple[torch.device, int]:
    return parameter.device, parameter.data_ptr()


RULES: dict[Rule, str] = {
    advantages_apart: "One task's rewards are credited to another task's actions: stop sums and bootstraps at 'done', and "
    "normalise over the batch or a trial.",
    advantages_in_time: "An action earns what follows it: sum from a trial's end to its front. Where the env pays costs, make them "
    "negative rewards there, since all else takes them for rewards too.",
    gradients: "They never learn: connect them to a loss, or freeze them with requires_grad_(False).",
    losses_have_gradients: "They are added to the loss and logged as one, and train nothing: make them of what the networks give, "
    "without detach(), no_grad() or item(); a number that is to be logged alone needs a name that does not begin with 'loss_'.",
    optimizer: "They get gradients, but no step: build it over loss.parameters(), or freeze them (requires_grad_(False)).",
    actions_are_drawn: "Where the same is done always nothing shows what else would have paid, and PPO learns nothing: leave it "
    "at ExplorationType.RANDOM, the default.",
    policy_is_trained: "It would act, or value, with its first weights for ever: give it the networks that the loss holds.",
}
