"""Rules on inputs: action, reward and done of step t stand in the input of t + 1 alone, and it is of one scale in all rows."""

from __future__ import annotations

import torch
from torchrl.envs import EnvBase, Transform, VecNormV2

from rl2_torchrl.checks.evidence import Evidence, NotChecked, Rule
from rl2_torchrl.env_check.outcomes import flat
from rl2_torchrl.envs import GymVectorEnv
from rl2_torchrl.envs.layers import moving_statistics
from rl2_torchrl.transition import PreviousStep
from rl2_torchrl.trial import EPISODE_DONE, Trial, base_of, made_of, transforms_of

__all__ = ["RULES"]


def transition_input(seen: Evidence) -> str | None:
    """What was done and earned is told at the next step: within episodes, at their ends, and not at a trial's start."""
    previous = seen.transform(PreviousStep)
    if previous is None:
        return _reward_column(seen)
    _require_unchanged(seen, previous)
    key = previous.out_key
    trans, size = seen.need(key), previous.layout().action.size
    for name, (told, happened) in _told(seen, previous, trans).items():
        broken = (told != happened).any(-1) & seen.inner
        if broken.any():
            only_at_ends = not (broken & ~seen.episode_ends[:, :-1]).any()
            which = "where an episode has ended" if only_at_ends else f"behind {seen.place(broken)}"
            return f"the {name} of a step does not stand in the next step's {key!r}, {which}"
    first = trans[seen.starts][..., -2 - size :]
    if (first[..., :-1] != 0).any() or (first[..., -1] != previous.done_at_start).any():
        return f"at a trial's first step {key!r} tells of the trial before: action and reward must be 0 there"
    # A batch that does not tell where episodes end has whole trials, maybe.
    trial, has_whole = seen.transform(Trial), seen.starts[:, 0].all() and seen.flag(("next", "done")).any()
    ends = trans[..., -1][~seen.starts].any()
    has_whole = has_whole and not getattr(
        seen.collector, "set_truncated", False
    )  # which ends rows where the batch does
    if has_whole and not ends and trial is not None and trial.steps is None and trial.episodes > 1:
        return f"the input told 0 times of an episode's end inside a trial of {trial.episodes} episodes"


def _require_unchanged(seen: Evidence, previous: PreviousStep) -> None:
    key, later = previous.out_key, _behind(seen, previous)
    changing = [type(t).__name__ for t in later if key in (t.out_keys or t.in_keys or ())]
    if changing:
        raise NotChecked(f"{changing} changes {key!r} after PreviousStep")


def _behind(seen: Evidence, previous: PreviousStep) -> list[Transform]:
    return seen.transforms[seen.transforms.index(previous) + 1 :]


def _told(seen: Evidence, previous: PreviousStep, trans: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Parts of the input and what they should be, both ``[R, T - 1, n]``, as far as the batch has it."""
    told, layout = trans[:, 1:], previous.layout()
    pairs = {"reward": (told[..., -2:-1], seen.need(("next", "reward")))}
    if seen.has(("next", EPISODE_DONE)):
        pairs["done"] = (told[..., -1:], seen.need(("next", EPISODE_DONE)))
    # Where a transform changes actions on their way to the env, the input tells of the env's, the batch of the policy's.
    if not any({"action", layout.action_key} & {*(t.in_keys_inv or ())} for t in seen.transforms):
        action = layout.action.encode(seen.need(layout.action_key), seen.batch.shape)
        pairs["action"] = (told[..., -2 - layout.action.size : -2], action)
    return {name: (part, happened[:, :-1].to(trans)) for name, (part, happened) in pairs.items()}


def _reward_column(seen: Evidence) -> str | None:
    """Without `PreviousStep`: a number among the inputs that is the last reward, but not where an episode has ended."""
    reward = seen.need(("next", "reward")).reshape(*seen.batch.shape, 1)[:, :-1].double()
    ends = seen.episode_ends[:, :-1] & seen.inner
    varies = len(reward[seen.inner & ~ends].unique()) > 1
    for key in seen.probe.observed:
        differs = (flat(seen.need(key), 2)[:, 1:] != reward) & seen.inner.unsqueeze(-1)
        if not differs.flatten(0, 1).any(0).all():
            return None
        if varies and not (differs & ~ends.unsqueeze(-1)).flatten(0, 1).any(0).all():
            return f"the reward of a step stands in the next step's {key!r}, but not where an episode has ended"
    raise NotChecked("the env shows no PreviousStep, and no input is the reward as it is")


def transition_read(seen: Evidence) -> str | None:
    """What the actor writes depends on the last reward; that it does not on the last action or done is told."""
    previous = [each for each in seen.transforms if isinstance(each, PreviousStep)]
    if not previous:
        raise NotChecked("the env shows no PreviousStep")
    observed = seen.probe.observed
    read = next((each for each in previous if each.out_key in observed), previous[0])
    _require_unchanged(seen, read)
    key, size = read.out_key, read.layout().action.size
    if key not in observed:
        if made := made_of([key], _behind(seen, read)).intersection(observed):
            raise NotChecked(f"the actor reads {sorted(map(str, made))}, which transforms make of {key!r}")
        return f"the actor does not read {key!r}, but {observed}"
    windows = seen.windows(seen.inner)
    columns = {"action": slice(-2 - size, -2), "reward": slice(-2, -1), "done": slice(-1, None)}
    unread = [name for name, part in columns.items() if not seen.probe.heeds(windows, key, part)]
    if "reward" in unread:
        return f"what the actor writes does not depend on the {' and '.join(unread)} in {key!r}"
    seen.report.notes += [f"what the actor writes does not depend on the {name} in {key!r}" for name in unread]


def one_scale(seen: Evidence) -> str | None:
    """What is normalised is normalised by statistics of all rows."""
    rows = seen.batch.shape[:-1].numel()
    apart = seen.ask(_normalizing_apart) if rows > 1 else []
    if apart is None:
        raise NotChecked("the env is in other processes, or closed")
    return f"{' and '.join(apart)} keeps statistics for each of the {rows} rows" if apart else None


def _normalizing_apart(env: EnvBase) -> list[str] | None:
    """What normalizes each row of ``env`` by itself; None where its rows are gone."""
    base = base_of(env)
    if isinstance(base, GymVectorEnv):
        wrappers = None if base.envs is None else base.moving_statistics(of_rows=True)
    else:
        wrappers = moving_statistics(base)
    norms = [t for t in transforms_of(env) if isinstance(t, VecNormV2) and not t.reduce_batch_dims]
    named = [f"VecNormV2 of {[str(key) for key in norm.in_keys]}" for norm in norms]
    return named or (None if wrappers is None else [f"Gymnasium's {name}" for name in wrappers])


RULES: dict[Rule, str] = {
    transition_input: "An agent that does not see what it did and earned, an episode's last reward included, cannot adapt: let "
    "PreviousStep write its input, behind all transforms that change the reward.",
    transition_read: "An agent that does not see what it earned cannot adapt: let the actor read all that PreviousStep writes "
    "(in_key='trans', its encoder too; beside large observations with normalize=True), or leave PreviousStep out where reward is "
    "not to be seen on purpose.",
    one_scale: "The same number then looks another in each row, by what tasks that row has had, and an evaluation in other rows "
    "has no such statistics: VecNormV2(..., reduce_batch_dims=True), or networks with normalize=True, and for rewards "
    "TrialAdvantage(scale_rewards=True).",
}
