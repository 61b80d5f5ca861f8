"""Rules on what learns: advantages that stay in their trial, a gradient and a step for every parameter, in the policy that acts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tensordict import NestedKey, TensorDictBase
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs.utils import ExplorationType

from rl2_torchrl.checks.evidence import Evidence, NotChecked, Rule
from rl2_torchrl.workers import TrialWorkers

__all__ = ["RULES"]


def advantages_apart(seen: Evidence) -> str | None:
    """Other rewards and values in one trial leave advantages and returns of all others as they are, looked for in a few rows first.

    Where these change the whole batch has the last word: there they may follow where trials share a baseline, such as a mean over
    those that play one task. It moves others against the trial whose rewards rise, and values move several rows; what runs from
    trial to trial moves them as their own rewards do, and values reach one row.
    """
    keys, generator = seen.probe.loss.tensor_keys, torch.Generator().manual_seed(0)
    entries = [key for key in (("next", "reward"), keys.value) if seen.has(key)]
    made = [key for key in (keys.advantage, keys.value_target) if seen.learnt_from.get(key, None) is not None]

    def noise(entry: torch.Tensor) -> torch.Tensor:
        return torch.randn(entry.shape, generator=generator).to(entry)

    # Where all are normalised together, what nothing was done to is moved and scaled, by the same for all.
    pairs = ((mine, _advantages_with(noise, entries, seen, seen.few, mine)) for mine in _trials(seen, seen.few))
    if all(_is_affine(seen.learnt_from[key][~mine], after[key][~mine]) for mine, after in pairs for key in made):
        return None
    before = seen.advantage(seen.whole)
    for mine in _trials(seen, seen.whole):
        shared = set()  # what rewards that rise lower elsewhere
        for entry in entries:
            after = _advantages_with(torch.ones_like, [entry], seen, seen.whole, mine)
            for key in made:
                off = _off_line(before[key], after[key], mine, follows=entry != keys.value)
                in_row, elsewhere = off[mine.any(1)], off[~mine.any(1)]
                in_one = off.any(1).sum() == 1 and key not in shared
                if (in_row.sum() > 0 or elsewhere.sum() > 0) and (entry != keys.value or in_one):
                    return f"{key!r} changes where only rewards and values of another trial were changed"
                shared |= {key} if off.sum() < 0 else set()


def advantages_in_time(seen: Evidence) -> str | None:
    """A reward that is raised raises the advantage of its step, and of none behind it unless of those before it, too."""
    return _out_of_time(seen, seen.few) and _out_of_time(seen, seen.whole)


def _out_of_time(seen: Evidence, rows: TensorDictBase) -> str | None:
    key, mine = seen.probe.loss.tensor_keys.advantage, _trials(seen, rows)[0]
    row, steps = mine.any(1).nonzero().item(), mine.any(0).nonzero().flatten()
    if len(steps) < 3:
        raise NotChecked("a trial of the batch has less than three steps")
    at, scale, generator = len(steps) // 2, _scale(seen), torch.Generator().manual_seed(0)
    # Made to differ: of others that are all alike nothing could tell how all are normalised.
    reward = rows["next", "reward"]
    reward = reward + scale * torch.randn(reward.shape, generator=generator).to(reward)

    def moved_by(more: float) -> tuple[torch.Tensor, torch.Tensor]:
        changed = reward.clone()
        changed[row, steps[at]] += more
        pair = [seen.advantage(rows.copy().set(("next", "reward"), each))[key] for each in (reward, changed)]
        return _beyond_affine(*pair, mine), (pair[1] - pair[0]).reshape(mine.shape)[mine]

    moved, change = moved_by(10 * scale)
    before, after = moved[:at], moved[at + 1 :]
    # It may stand at a bound, beyond which it is cut off.
    own = moved[at] if moved[at] else -moved_by(-10 * scale)[0][at]
    if not moved.any():
        raise NotChecked("the advantage does not depend on the reward of a step in the middle of a trial")
    if after.any() and not before.any():
        return "a reward that is raised moves the advantages of later steps, and none of steps before it"
    # Where trials are normalised one by one all move, some up and some down.
    if not after.any() and own <= 0 or own < 0 and change[at] < 0 and not (moved > 0).any():
        return f"a reward that is raised {'lowers' if own < 0 else 'does not move'} the advantage of its step"


def _beyond_affine(before: torch.Tensor, after: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
    """By how much ``after`` is more than ``a * before + b``, as it is outside ``mine``; of the steps of ``mine``, 0 to rounding."""
    precision = torch.finfo(after.dtype).eps
    before, after = (entry.reshape(mine.shape).double() for entry in (before, after))
    (x, mean_x), (y, mean_y) = ((entry[~mine] - entry[~mine].mean(), entry[~mine].mean()) for entry in (before, after))
    slope = (x * y).sum() / x.square().sum().clamp_min(1e-30)
    moved = after[mine] - mean_y - slope * (before[mine] - mean_x)
    return moved.where(moved.abs() > max(1e-3, 4 * precision) * after.abs().max(), 0.0)


def _scale(seen: Evidence) -> float:
    """How large rewards and values are, 1 where they are 0; how far they lie apart is nothing where each step pays the same."""
    entries = [key for key in (("next", "reward"), seen.probe.loss.tensor_keys.value) if seen.has(key)]
    return sum(seen.sample.get(key).square().mean().sqrt().item() for key in entries) or 1.0


def _trials(seen: Evidence, rows: TensorDictBase) -> list[torch.Tensor]:
    """The steps of one or two trials of ``rows``, each bool ``[R, T]``: one that begins within a row, and the first of row 1."""
    seen.need(("next", "done"))
    starts, done = (rows.get(key).reshape(rows.shape) for key in ("is_init", ("next", "done")))
    begins = torch.nn.functional.pad(starts[:, 1:], (1, 0)).nonzero()[:1].tolist()
    if len(rows) > 1 or not begins:
        begins.append([min(1, len(rows) - 1), 0])  # there is a row before it
    trials = []
    for row, first in begins:
        ends = done[row, first:].nonzero()
        last = first + ends[0].item() if len(ends) else done.shape[1] - 1
        trials.append(torch.zeros_like(done))
        trials[-1][row, first : last + 1] = True
    if trials[0].all():
        raise NotChecked("the batch is a single trial")
    return trials


def _advantages_with(
    noise: Callable[[torch.Tensor], torch.Tensor],
    entries: Sequence[NestedKey],
    seen: Evidence,
    rows: TensorDictBase,
    mine: torch.Tensor,
) -> TensorDictBase:
    """The advantages of ``rows`` where ``noise`` is added to ``entries`` in the trial ``mine``."""
    changed = rows.copy()
    for key in entries:
        entry = rows.get(key)
        changed.set(key, entry + _scale(seen) * noise(entry) * mine.reshape(*mine.shape, *(1,) * (entry.ndim - 2)))
    return seen.advantage(changed)


def _is_affine(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether ``after`` is ``a * before + b``, to rounding."""
    x, y = (entry.double() - entry.double().mean() for entry in (before, after))
    slope = (x * y).sum() / x.square().sum().clamp_min(1e-30)
    spread, size = (max(one.abs().max(), other.abs().max()) for one, other in ((x, y), (before, after)))
    precision = max(torch.finfo(entry.dtype).eps for entry in (before, after))
    return bool((y - slope * x).abs().max() <= 1e-3 * spread + max(1e-6, 2 * precision) * size)


def _off_line(before: torch.Tensor, after: torch.Tensor, mine: torch.Tensor, follows: bool) -> torch.Tensor:
    """By how much ``after`` is off the line ``a * before + b`` on which other rows lie, 0 to rounding, in ``mine``, where a bound
    moves it, and without such a line. Of two lines it is the upper one. ``follows``: more is where ``mine`` goes.
    """
    x, y = (entry.double().reshape(mine.shape) for entry in (before, after))
    x, y = (-x, -y) if follows and y[mine].sum() < x[mine].sum() else (x, y)
    others = ~mine.any(1, keepdim=True).expand_as(mine) if len(mine) > 1 else ~mine
    size = max(x.abs().max(), y.abs().max())
    rounding = size * max(1e-5, *(4 * torch.finfo(entry.dtype).eps for entry in (before, after)))
    # Lines through pairs of points, on which each counts once: many may stand at a bound, beyond which all is cut off.
    drawn = torch.randperm(int(others.sum()), generator=torch.Generator().manual_seed(0))[:4096].to(x.device)
    p, q = torch.stack([x[others][drawn], y[others][drawn]]).unique(dim=1)
    low = torch.linspace(0, len(p) - len(p) // 2 - 1, 64).long().to(p.device)
    high = low + len(p) // 2
    slope = torch.where(p[high] > p[low], (q[high] - q[low]) / (p[high] - p[low]), 1.0)
    offset = q[low] - slope * p[low]
    on_line = ((q - slope[:, None] * p - offset[:, None]).abs() <= rounding).sum(1)
    holds = on_line >= max(0.4 * len(p), min(len(p), 3))
    if not holds.any():
        return torch.zeros_like(x)
    best = torch.where(holds, slope * p.mean() + offset, -torch.inf).argmax()
    off = y - slope[best] * x - offset[best]
    # What is raised is so in itself, too; what stands at a bound is not moved where others are.
    top = x[~mine].max()
    at_bound = ((x == top) & (y <= max(top, y[others].max()))) | (y == y[~mine].min())
    largest = off.abs().max()
    is_raised = (off > 0.05 * largest + rounding) & (y > x) & ~at_bound
    return off.where((is_raised | (off < -1e-3 * largest - rounding)) & ~mine, 0.0)


def gradients(seen: Evidence) -> str | None:
    """Every trainable parameter of the loss gets a gradient."""
    made = seen.probe.gradients(seen.chunks(seen.learnt_from))
    seen.report.frozen = [name for name, parameter in seen.loss.named_parameters() if not parameter.requires_grad]
    seen.report.zero_gradient = [name for name, g in made.items() if g is not None and g.numel() and not g.any()]
    missing = [name for name, gradient in made.items() if gradient is None]
    return f"no gradient reaches {missing}" if missing else None


def losses_have_gradients(seen: Evidence) -> str | None:
    """Every loss that a further term gives, unless it is 0, has a gradient."""
    loss = seen.probe.loss
    losses = loss(seen.chunks(seen.learnt_from)) if len(getattr(loss, "terms", ())) else {}
    constant = [
        name
        for name, value in losses.items()
        if name.startswith("loss_") and name not in _PPOS and not value.requires_grad and bool(value != 0)
    ]
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
    advantages_apart: "One task's rewards are credited to another task's actions: stop sums and bootstraps at 'done'.",
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
