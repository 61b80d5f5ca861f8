"""From an env's transforms to its trials: those on plain tensors where the transforms are ours and nothing stands between them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torchrl.envs import EnvBase, InitTracker, TensorDictPrimer, Transform

from rl2_torchrl.gradients.part import others_than
from rl2_torchrl.rollout.tensor_trials import TensorTrials
from rl2_torchrl.rollout.trials import Keys, Trials, leaves
from rl2_torchrl.tasks import TaskSampler
from rl2_torchrl.transition import PreviousStep
from rl2_torchrl.trial import Trial, own_transforms

__all__ = ["trial_and_base", "trials_of"]


def trials_of(env: EnvBase, steps: int, read: Keys, keep: Keys | None, memory: Keys) -> Trials:
    """The trials of ``env``; arguments as for `Trials`, and the ``memory`` that the policy hands on."""
    below, ours, others = _taken_apart(env, partial(_is_known, read=read, keep=keep, made={*memory, "is_init"}))
    if others:
        reason = f"{', '.join(others)} beside our transforms: a TensorDict goes through all of them at each step"
        return Trials(env, steps, read, keep, reason)
    if ours[0] is None:
        return Trials(env, steps, read, keep, "no Trial stands around the env")
    return TensorTrials(below, ours, steps, read, keep)


def trial_and_base(env: EnvBase) -> tuple[Trial, EnvBase] | None:
    """The `Trial` of ``env`` and the env that it stands around, if under our transforms alone; else None."""
    below, (trial, *_), others = _taken_apart(env, partial(_is_known, read=(), keep=(), made=()))
    return None if trial is None or others else (trial, below.base_env)


#: What a collector adds by itself; a rollout makes trial starts and memory without them.
_OF_COLLECTORS = (InitTracker, TensorDictPrimer)
#: The methods of our transforms of which a rollout does the work itself.
_REPLACED = ("_step", "_reset", "_call", "_reset_env_preprocess")
_REPLACED += ("is_over", "_set_done", "_reset_rows", "combine", "begin")


def _taken_apart(env: EnvBase, is_known: Callable[[Transform], bool]) -> tuple[EnvBase, list, list[str]]:
    """The env with our transforms; these (Trial, TaskSampler, PreviousStep, or None); the names of others, or of one displaced."""
    while own_transforms(env) and all(map(is_known, own_transforms(env))):
        env = env.base_env
    parts = [t for t in own_transforms(env) if not is_known(t)]
    ours = [next((t for t in parts if _is_as_written(t, kind)), None) for kind in (Trial, TaskSampler, PreviousStep)]
    in_order = [t for t in ours if t is not None]
    strangers = [t for t in parts if all(t is not other for other in in_order)]
    others = strangers or [t for t, other in zip(parts, in_order, strict=True) if t is not other]
    return env, ours, [type(t).__name__ for t in others]


def _is_known(transform: Transform, read: Keys, keep: Keys | None, made: Keys) -> bool:
    """Whether ``transform`` is a collector's, and of what it writes only that is asked for which a rollout has ``made`` itself."""
    if not isinstance(transform, _OF_COLLECTORS):
        return False
    is_tracker = isinstance(transform, InitTracker)
    written = [transform.init_key] if is_tracker else list(transform.primers.keys(True, True))
    return all(key in made for key in written if keep is None or key in read or leaves(keep, [key]))


def _is_as_written(transform, kind: type) -> bool:
    """Whether what ``transform`` does in an env is what ``kind`` says: a class below it, or it alone, may have other methods."""
    return isinstance(transform, kind) and not others_than(kind, transform, _REPLACED)
