"""Rules on the rows of a batch: trials in time, what their cuts need, whole numbers, no padding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torchrl.envs import EnvBase

from rl2_torchrl.checks.evidence import Evidence, NotChecked, Rule
from rl2_torchrl.envs.tensor_env import TensorEnv
from rl2_torchrl.modules.actor_critic import hidden_keys
from rl2_torchrl.trial import Trial, base_of, is_within, rows_of, transforms_of

__all__ = ["RULES"]


def no_padding(seen: Evidence) -> str | None:
    """All steps were taken."""
    mask = seen.batch.get(("collector", "mask"), None)
    if mask is not None and not mask.all():
        return f"{int((~mask).sum())} of {mask.numel()} steps are padding by ('collector', 'mask')"


def trial_bounds(seen: Evidence) -> str | None:
    """``"is_init"`` at t + 1 and ``done`` at t agree, and nothing terminates inside a trial."""
    done = seen.flag(("next", "done"))
    if seen.has(("next", "terminated")):
        early = seen.flag(("next", "terminated")) & ~done
        if early.any():
            return f"'terminated' without 'done' at {seen.place(early)}"
    broken = seen.flag("is_init")[:, 1:] != done[:, :-1]
    if broken.any():
        row, step = broken.nonzero()[0].tolist()
        begins = "begins" if seen.starts[row, step + 1] else "does not begin"
        return f"a trial {begins} at row {row}, step {step + 1}, where 'done' was {bool(done[row, step])} at the step before"


def kept_at_cuts(seen: Evidence) -> str | None:
    """What an update reads where a batch cuts a trial is kept, if one is cut; that one may be later is told."""
    needed, steps = getattr(seen.update, "keys_at_cuts", None), seen.batch.shape[1]
    if needed is None:
        raise NotChecked("the update does not say what it reads where a trial is cut")
    if getattr(seen.collector, "reset_at_each_iter", False):  # no row goes on from a memory
        needed = [key for key in needed if key[0] == "next"]
    if not (missing := [key for key in needed if not seen.has(key)]):
        return None
    cut = int((~seen.flag(("next", "done"))[:, -1]).sum())
    policy = getattr(seen.collector, "policy", None)
    if (
        cut
        and policy is not None
        and (unplayed := [key for key in seen.probe.memory if key not in hidden_keys(policy)])
    ):
        return (
            f"{cut} trials are cut by the batch's end, and the collector's policy hands no {unplayed} on, which no keep= brings: "
            "collect with ActorCritic(actor, critic)"
        )
    if cut:
        return f"{cut} trials are cut by the batch's end, and it lacks {missing}: PPOUpdate(..., bptt={steps}) asks for them"
    if not seen.ask(_is_of_one_length):
        seen.report.notes.append(
            "no trial is cut by this batch's end, but trials may differ in length, and the first that is cut ends the training: "
            f"the batch lacks {missing}, which PPOUpdate(..., bptt={steps}), of whole rows as without bptt, has among its in_keys. "
            "Keep those, or all (keep=None), or say that trials have one length: Trial(steps=), or fixed_length=True of TensorEnv, "
            "which processes hide"
        )


def _is_of_one_length(env: EnvBase) -> bool:
    """Whether ``env`` says that all its trials have one length."""
    trial = next((each for each in transforms_of(env) if isinstance(each, Trial)), None)
    # A batched env is not asked for what its rows are: it gives lists, and once it is closed, as after a last batch, it cannot.
    bases = map(base_of, rows_of(env) or [env])
    fixed = all(isinstance(base, TensorEnv) and base.fixed_length for base in bases)
    return trial is not None and (trial.episodes is None or fixed)


def finite(seen: Evidence) -> str | None:
    """Rewards, and what else the update says that it reads, are finite."""
    reward = ("next", "reward")
    read = (reward, *getattr(seen.update, "in_keys", ()))
    # It comes first: the input of the step after holds it too.
    for key in sorted(seen.batch.keys(True, True), key=lambda key: key != reward):
        entry = seen.batch.get(key)
        if entry.is_floating_point() and any(is_within(key, one) for one in read):
            broken = ~entry.isfinite().reshape(*seen.batch.shape, -1).all(-1)
            if broken.any():
                return f"{key!r} is not finite at {seen.place(broken)}"
    seen.report.notes.extend(_of_sizes(seen))


#: Rewards, and other inputs, of this size are of another order than networks are made for.
_LARGE, _LARGE_INPUT = 10.0, 100.0


def _of_sizes(seen: Evidence) -> Iterator[str]:
    """What is said of rewards that are all alike, and of large numbers that networks read as they are."""
    reward, update = seen.batch.get(("next", "reward"), None), seen.update
    if reward is None:
        return
    if (reward == reward.flatten()[0]).all():
        yield f"all rewards of the batch are {reward.flatten()[0].item():g}"
    if not hasattr(update, "normalizations") or not seen.has("is_init"):
        return
    scaled, size = {key for _, key in update.normalizations()}, reward.abs().double().mean().item()
    if size > _LARGE and not (scaled and getattr(update.advantage, "scale_rewards", True)):
        yield (
            f"rewards are around {size:.3g}, which drowns the rest of the networks' input, and asks a critic for large values: "
            "from_env(normalize=True) of actor and critic and TrialAdvantage(scale_rewards=True), both, bring them in order"
        )
        return
    for key in seen.probe.inputs:  # such as a task in grams that the critic is told
        entry = seen.batch.get(key, None)
        if key in scaled or not isinstance(entry, torch.Tensor) or not entry.is_floating_point():
            continue
        size = entry.abs().reshape(-1, entry.shape[-1]).mean(0, dtype=torch.float64).max().item()
        if size > _LARGE_INPUT:
            yield (
                f"{key!r} is around {size:.3g}, which drowns whatever else the networks read: bring it to a scale of 1 in the env, "
                "or, if it stands in the transition input, by from_env(normalize=True) of actor and critic"
            )


RULES: dict[Rule, str] = {
    no_padding: "Padding would be trained on as steps: leave split_trajs at False, 'is_init' marks trials.",
    trial_bounds: "These rows are no trials in time, so that memory and advantages run from one into another: keep the steps in "
    "order and one env a row (cat_results='stack' for workers), with 'done' as Trial writes it.",
    kept_at_cuts: "Values and memory go on from them. Keep that update's in_keys (a bptt of whole rows cuts them no further), or "
    "all, keep=None; where all trials have one length, a frames_per_batch of whole trials cuts none.",
    finite: "One such number spreads over the whole batch: mend the env or the networks.",
}
