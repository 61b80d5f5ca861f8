"""Rules on the rows of a batch: trials in time, what their cuts need, whole numbers, no padding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tensordict import NestedKey
from torch import nn
from torchrl.envs import EnvBase

from rl2_torchrl.checks.evidence import Evidence, NotChecked, Rule
from rl2_torchrl.modules.actor_critic import hidden_keys
from rl2_torchrl.transition import is_info
from rl2_torchrl.trial import Trial, base_of, is_within, made_of, transforms_of

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
    if cut:
        return f"{cut} trials are cut by the batch's end, and it lacks {missing}: PPOUpdate(..., bptt={steps}) asks for them"
    if not seen.ask(_is_of_one_length):
        seen.report.notes.append(
            "no trial is cut by this batch's end, but trials may differ in length, and the first that is cut ends the training: "
            f"the batch lacks {missing}, which PPOUpdate(..., bptt={steps}), of whole rows as without bptt, has among its in_keys. "
            "Keep those, or all (keep=None), or say that trials have one length: TensorEnv's fixed_length=True, or Trial(steps=)"
        )


def _is_of_one_length(env: EnvBase) -> bool | None:
    """Whether all trials of ``env`` have one length; None where it does not say."""
    trial = next((each for each in transforms_of(env) if isinstance(each, Trial)), None)
    if trial is None:
        return None
    return trial.episodes is None or getattr(base_of(env), "fixed_length", None)


def finite(seen: Evidence) -> str | None:
    """What is read is finite, and what networks write too, up to minus infinity, which logits of illegal actions are."""
    reward, read = ("next", "reward"), getattr(seen.update, "in_keys", None)
    networks = [getattr(seen.collector, "policy", None), *_networks(seen)]
    written = {key for network in networks for key in getattr(network, "out_keys", ())}

    def counts(key: NestedKey) -> bool:
        # What an env says beside, such as a distance before there is one, spreads only where somebody reads it.
        if read is None:
            return not is_info(key[1:] if key[0] == "next" else key)
        return any(is_within(key, one) for one in (reward, *read, *written))

    # It comes first: the input of the step after holds it too.
    for key in sorted(filter(counts, seen.batch.keys(True, True)), key=lambda key: key != reward):
        entry = seen.batch.get(key)
        # The sum of finite numbers can overflow, but that of others is never finite: it spares a tensor of this size.
        if entry.is_floating_point() and not entry.sum().isfinite():
            is_fine = entry.isfinite() | (entry.isneginf() & (key in written and key not in (read or ())))
            broken = ~is_fine.reshape(*seen.batch.shape, -1).all(-1)
            if broken.any():
                return f"{key!r} is not finite at {seen.place(broken)}"
    reward = seen.batch.get(reward, None)
    if reward is not None and (reward == reward.flatten()[0]).all():
        seen.report.notes.append(f"all rewards of the batch are {reward.flatten()[0].item():g}")
    if (
        reward is not None
        and (size := reward.abs().double().mean().item()) > _LARGE
        and not _brings_in_order(seen.update)
    ):
        seen.report.notes.append(
            f"rewards are around {size:.3g}, which drowns the rest of the networks' input, and asks a critic for large values: "
            "from_env(normalize=True) of actor and critic and TrialAdvantage(scale_rewards=True), both, bring them in order"
        )
    else:
        seen.report.notes.extend(_of_large_inputs(seen))
    seen.report.notes.extend(_of_the_last_episode(seen))


#: Rewards, and other inputs, of this size are of another order than networks are made for.
_LARGE, _LARGE_INPUT = 10.0, 100.0


def _networks(seen: Evidence) -> list[nn.Module]:
    networks = [getattr(seen.loss, name, None) for name in ("actor_network", "critic_network")]
    return [network for network in networks if network is not None]


def _of_large_inputs(seen: Evidence) -> Iterator[str]:
    """What is said of large numbers that networks read as they are, such as a task in grams that the critic is told."""
    networks = _networks(seen)
    memory = {key for network in networks for key in hidden_keys(network)}
    read = dict.fromkeys(key for network in networks for key in network.in_keys if key not in memory)
    scaled = {key for _, key in seen.update.normalizations()} if hasattr(seen.update, "normalizations") else set()
    entries = {key: seen.batch.get(key, None) for key in read if key not in scaled}
    for key, entry in entries.items():
        if not isinstance(entry, torch.Tensor) or not entry.is_floating_point() or not entry.numel():
            continue
        size = entry.abs().reshape(-1, entry.shape[-1]).mean(0, dtype=torch.float64).max().item()
        if size > _LARGE_INPUT:
            yield (
                f"{key!r} is around {size:.3g}, which drowns whatever else the networks read: bring it to a scale of 1 in the env, "
                "or, if it stands in the transition input, by from_env(normalize=True) of actor and critic"
            )


def _of_the_last_episode(seen: Evidence) -> Iterator[str]:
    """What is said of networks that read what an env says beside of its state, which no inner reset begins anew."""
    trial = seen.transform(Trial)
    if trial is None or trial.episodes == 1 or not seen.has("is_init"):
        return
    beside = [key for key in seen.env.observation_spec.keys(True, True) if is_info(key)]
    beside = made_of(beside, seen.transforms[seen.transforms.index(trial) + 1 :])
    for key in dict.fromkeys(key for network in _networks(seen) for key in network.in_keys if key in beside):
        # What tells of a step, as a reward does, is 0 where none was taken.
        if isinstance(entry := seen.batch.get(key, None), torch.Tensor) and entry[seen.starts].any():
            yield (
                f"the networks read {key!r}, of 'info', which at the first step of each later episode of a trial is still what the "
                "last episode's last step said: where it tells of the state, such as which actions are legal, show it as an "
                "observation outside 'info', which begins anew with the episode"
            )


def _brings_in_order(update: object) -> bool:
    """Whether networks and advantage scale rewards; what is no `PPOUpdate` is not asked."""
    if not hasattr(update, "normalizations"):
        return True
    return bool(update.normalizations()) and getattr(update.advantage, "scale_rewards", True)


RULES: dict[Rule, str] = {
    no_padding: "Padding would be trained on as steps: leave split_trajs at False, 'is_init' marks trials.",
    trial_bounds: "These rows are no trials in time, so that memory and advantages run from one into another: keep the steps in "
    "order and one env a row (cat_results='stack' for workers), with 'done' as Trial writes it.",
    kept_at_cuts: "Values and memory go on from them. Keep that update's in_keys (a bptt of whole rows cuts them no further), or "
    "all, keep=None; where all trials have one length, a frames_per_batch of whole trials cuts none.",
    finite: "One such number spreads over the whole batch: mend the env or the networks.",
}
