"""Rules on the memory: carried through a trial and no longer, the same again in the update, used, and learnt."""

from __future__ import annotations

import torch

from rl2_torchrl.checks.evidence import Evidence, NotChecked, Rule
from rl2_torchrl.checks.probe import LOG_PROB, VALUE
from rl2_torchrl.env_check.outcomes import flat
from rl2_torchrl.modules.actor_critic import hidden_keys

__all__ = ["RULES"]


def memory_carried(seen: Evidence) -> str | None:
    """All trials start from the same memory, and no later step does."""
    rows, memory = seen.sample, [key for key in seen.probe.memory if seen.has(key)]
    starts = rows["is_init"].reshape(rows.shape)
    if not memory:
        raise NotChecked("the batch holds no hidden states")
    if not starts.any():
        raise NotChecked("no trial starts in the batch")
    initial = {key: flat(rows.get(key), 2)[starts] for key in memory}
    for key, first in initial.items():
        if (first != first[0]).any():
            return f"trials start with different {key!r}: the memory of the trial before is still there"
    for network in seen.probe.networks:
        # Some of a network's memory may start anew with every episode, but not all of it.
        keys = [key for key in hidden_keys(network) if key in memory]
        if not keys:
            continue
        # A step whose inputs are all 0, as a trial's first may be, may leave a memory as it is.
        read = [flat(rows.get(key), 2).any(-1) for key in network.in_keys if key in seen.probe.inputs and seen.has(key)]
        told = torch.stack(read).any(0) if read else torch.ones_like(starts)
        again = [(flat(rows.get(key), 2)[:, 1:] == initial[key][0]).all(-1) for key in keys]
        lost = torch.stack([*again, ~starts[:, 1:], told[:, :-1]]).all(0)
        if lost.any():
            return f"{keys} is back at its initial state inside a trial, behind step {lost.nonzero()[0, 1]}"


def replay(seen: Evidence) -> str | None:
    """Log-probabilities and values that the update computes are the collected ones."""
    chunks, keys = seen.chunks(seen.sample), seen.probe.loss.tensor_keys
    missing = [key for key in seen.probe.memory if not seen.has(key)]
    if missing and not chunks["is_init"][:, 0].all():
        return f"chunks begin inside trials, and the batch has no {missing} for them to begin with"
    with torch.no_grad():
        replayed = seen.probe_as_collected.run(chunks)
    collected = {LOG_PROB: keys.sample_log_prob, VALUE: keys.value}
    dtypes = {p.dtype for p in seen.probe.loss.parameters() if p.is_floating_point()}
    # What else the batch has of the networks, such as features, tells of a fault that new networks hardly show in what they do.
    for name, key in {**{key: key for key in replayed}, **collected}.items():
        if name in replayed and seen.has(key):
            off = _difference(replayed[name], chunks.get(key), dtypes)
            if off is not None:
                return (
                    f"the networks do not give the collected {key!r} back, but numbers that are off by up to {off:.2g}"
                )


def _difference(replayed: torch.Tensor, collected: torch.Tensor, dtypes: set[torch.dtype]) -> float | None:
    """The largest difference, None where it is one of rounding in ``dtypes`` (on a GPU of TF32, which recurrent layers may use)."""
    replayed = replayed.reshape(collected.shape)
    # Logits of illegal actions, minus infinity in both; all else that is not finite differs.
    replayed, collected = (
        e.masked_fill(replayed.isneginf() & collected.isneginf(), 0.0) for e in (replayed, collected)
    )
    precision = max(torch.finfo(dtype).eps for dtype in (replayed.dtype, collected.dtype, torch.float32, *dtypes))
    allowed = min(0.05, precision * (200 if collected.device.type == "cpu" else 1e5))
    off, size = (replayed - collected).abs().max(), collected.nan_to_num(0.0, 0.0, 0.0).abs().max()
    return None if off <= allowed * (1 + size) else off.item()


def memory_used(seen: Evidence) -> str | None:
    """What was seen before an episode's end changes what the actor writes after it."""
    _require_memory(seen)
    ends = seen.episode_ends[:, :-1] & seen.inner
    changed = seen.probe.influence(seen.windows(ends if ends.any() else seen.inner))
    of_actor = [entry for key, entry in changed.items() if key in seen.probe.actor.out_keys]
    if of_actor and not torch.stack(of_actor).any():
        where = "the end of an episode" if ends.any() else "a step"
        return f"what the actor writes after {where} does not depend on what it saw before"


def trials_apart(seen: Evidence) -> str | None:
    """No input of one trial changes what is written in the next, so that no gradient can cross either."""
    changed = seen.probe.influence(seen.windows(seen.starts[:, 1:]))
    crossing = [key for key, entry in changed.items() if entry.any() and key not in (LOG_PROB, VALUE)]
    if crossing:
        return f"at a trial's first step {crossing} depend on the trial before"


def gradient_through_time(seen: Evidence) -> str | None:
    """What the actor writes has a gradient by the inputs of the step before."""
    _require_memory(seen)
    if getattr(seen.update, "bptt", None) == 1:
        raise NotChecked("bptt=1 asks for no gradient through time")
    if not seen.probe.reaches_back(seen.windows(seen.inner)):
        return "what the actor writes has no gradient by its inputs of the step before"


def _require_memory(seen: Evidence) -> None:
    if not hidden_keys(seen.probe.actor):
        raise NotChecked("the actor has no memory")


RULES: dict[Rule, str] = {
    memory_carried: "Memory lives through a trial and no longer: collect with auto_register_policy_transforms=True "
    "(TrialCollector's default), and reset memory where 'is_init' says so, not where an episode ends. A core's step leaves the "
    "memory that it is given as it is. Inputs so large that its gates are shut can hold it where it began: normalize them.",
    replay: "PPO's first ratios are 1, or it improves another policy than the one that acted: the memory was lost, inputs or "
    "statistics have moved since, both networks have one hidden_key, dropout or BatchNorm is on (actor.eval(), critic.eval()), "
    "a part of yours draws noise (let it be an entry of the batch), the collector acts with other weights, or a module behind the "
    "distribution changes its actions, whose log-probability is "
    "that of the draw (bound the distribution: TanhGaussianActions).",
    memory_used: "The agent cannot use what it learnt in an earlier episode: carry the memory on, and where observations are so "
    "large that they drown it, let networks normalize them, from_env(normalize=True).",
    trials_apart: "Another task's steps change this trial's outputs: start anew wherever 'is_init' is True.",
    gradient_through_time: "Nothing is learnt about what to remember: do not detach the memory between steps, or say bptt=1.",
}
