"""Adaptation curves: the return of every episode of held-out trials."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import get_args

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import unravel_key
from torchrl.envs import EnvBase, ExplorationType, SerialEnv, VecNorm, VecNormV2

from rl2_torchrl.arguments import require_env, require_flags, require_network, require_torch, whole
from rl2_torchrl.envs import GymVectorEnv
from rl2_torchrl.envs.layers import moving_statistics
from rl2_torchrl.episode_tables import EpisodeTable, Measure, Trials
from rl2_torchrl.locks import exploring
from rl2_torchrl.modules.acting import State
from rl2_torchrl.rollout import Rollout, trial_and_base
from rl2_torchrl.rollout.doors import is_tensor_env
from rl2_torchrl.tasks import TaskSampler
from rl2_torchrl.trial import EPISODE_INDEX, INFO, TRIAL_STEP, Trial, base_of, rows_of, transforms_of

__all__ = ["AdaptationCurve", "adaptation_curve"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdaptationCurve:
    """Returns of whole trials, episode by episode.

    Args:
        returns: return of each episode, ``[num_trials, num_episodes]``, of as many as a trial may have, or else as any had; NaN
            where one had no such episode. A trial that is bounded by steps can end within an episode, which then counts with the
            rewards it had so far.
        measures: by name, the curve of another number of each episode, such as whether it was a success.
        steps: the curve of how many steps each episode took; None where nobody has counted.
        finished: how many episodes each trial has finished, ``[num_trials]``; None: all that it had.
        episodes: how many a trial may have, ``Trial(episodes=...)``; None: as many as it finds time for, or nobody has said.

    Raises:
        TypeError: ``returns`` is no tensor.
        ValueError: ``returns`` is not a floating-point table of at least one trial and one episode, or holds infinities.

    Examples:
        >>> curve = AdaptationCurve(torch.tensor([[0.0, 1.0], [1.0, 2.0]]))
        >>> curve.per_episode, curve.mean
        (tensor([0.5000, 1.5000]), 2.0)
    """

    returns: torch.Tensor
    measures: Mapping[str, AdaptationCurve] = field(default_factory=dict)
    steps: AdaptationCurve | None = None
    finished: torch.Tensor | None = None
    episodes: int | None = None

    def __post_init__(self):
        require_torch(returns=self.returns)
        returns = self.returns
        if returns.ndim != 2 or 0 in returns.shape or not returns.is_floating_point():
            raise ValueError(
                f"returns has shape {tuple(returns.shape)} and dtype {returns.dtype}; it must be a table of floats, "
                "[num_trials, num_episodes], with at least one of each. For a single trial: returns.unsqueeze(0)."
            )
        if returns.isinf().any():
            raise ValueError(
                "returns holds infinities, whose mean says nothing: mend the env's rewards. NaN: not played."
            )

    @property
    def num_tasks(self) -> int:
        """Number of trials, each taken to be on a task of its own."""
        return len(self.returns)

    @property
    def trial_returns(self) -> torch.Tensor:
        """Return of each whole trial, the sum over its episodes, ``[num_trials]``."""
        return self.returns.nansum(-1)

    @property
    def mean(self) -> float:
        """Mean return of a trial; of the curve of a measure the mean of its sums over episodes, where `per_episode` says more."""
        return self.trial_returns.mean().item()

    @property
    def se(self) -> float:
        """Standard error of `mean` over tasks; NaN for a single task."""
        return (self.trial_returns.std() / self.num_tasks**0.5).item() if self.num_tasks > 1 else math.nan

    @property
    def per_episode(self) -> torch.Tensor:
        """Mean return of each episode, ``[num_episodes]``: the adaptation curve; see `num_compared`."""
        return self.returns.nanmean(0)

    @property
    def num_compared(self) -> int:
        """How many episodes, from the first on, all trials have finished; the first counts in any case.

        Where trials are bounded by steps, those beyond are of trials whose episodes were short, or are cut: later ones then look
        better, or shorter, whoever plays.
        """
        finished = (~self.returns.isnan()).sum(-1) if self.finished is None else self.finished
        return max(1, int(finished.min()))

    @property
    def first_and_last(self) -> tuple[float, float]:
        """`per_episode` of the first episode and of the last of `num_compared`: what was learnt in between."""
        return self.per_episode[0].item(), self.per_episode[self.num_compared - 1].item()

    @property
    def per_episode_se(self) -> torch.Tensor:
        """Standard error of `per_episode`, ``[num_episodes]``."""
        count = (~self.returns.isnan()).sum(0)
        variance = (self.returns - self.per_episode).square().nansum(0) / (count - 1)
        return (variance / count).sqrt()

    @property
    def shown(self) -> list[str]:
        """What reports show of each episode beside its return: ``"steps"``, where trials differ in them, and the `measures`."""
        steps = torch.zeros(1, 1) if self.steps is None else self.steps.returns
        is_ragged = bool((steps.nan_to_num(-torch.inf).amax(0) > steps.nan_to_num(torch.inf).amin(0)).any())
        return list(dict.fromkeys([*["steps"] * is_ragged, *self.measures]))

    def shown_as(self, name: str) -> AdaptationCurve | None:
        """The curve of one of the names that are `shown`, or None."""
        return self.measures.get(name, self.steps if name == "steps" else None)


@torch.no_grad()
def adaptation_curve(
    env: EnvBase,
    policy: TensorDictModuleBase,
    num_trials: int,
    *,
    deterministic: bool = False,
    ablation: Callable[[State], State] | None = None,
    on_step: Callable[[State], None] | None = None,
    measures: Mapping[NestedKey, Measure] | None = None,
    max_trial_steps: int = 100_000,
) -> AdaptationCurve:
    """Plays ``num_trials`` whole trials and returns the return of every episode separately, and how many steps it took.

    Row i of the result is the i-th trial that began: with ``TaskSampler.fixed(tasks)`` it is the trial on task i, in each call
    anew (but within the processes of a ``ParallelEnv``: put Trial and TaskSampler around it). Give the env held-out tasks: fixed
    ones, or a sampler with a seed that training does not use. What the env itself draws, such as starts, goes on from one call to
    the next: ``env.set_seed(9)`` before each makes them alike.

    Trials are played by the `Rollout` that training plays by: the memory begins anew with every trial.

    Args:
        env: trial env: a `TransformedEnv` with `Trial`.
        policy: recurrent policy, e.g. an actor or `ActorCritic`; or a controller by hand, a TensorDictModule of a function from the
            env's entries, the task among them, to the action.
        num_trials: number of trials, hence of tasks: no more than there are `TaskSampler.fixed` ones, or the standard errors are
            too small.
        deterministic: act with the distribution's mode or mean. Default False: RL² explores by sampling.
        ablation: function applied to the named tensors ``[num_rows, ...]`` of a step before the policy reads them, observations,
            task, transition input, memory and the trial's counters, which returns them changed: `with_zeroed_memory(policy)` or
            `with_shuffled_rewards()`. What is observed stands in the transition input too: to take it away change its part there
            (``layout().split(trans)`` of `PreviousStep`).
        on_step: called with the named tensors of every step, its results under ``("next", ...)``, to record what returns do not
            tell, such as a curve within a trial that is one episode: copies, which may be kept. It sees all rows: one that has
            played its last trial that counts begins another (``"is_init"``, ``"task"``) as long as others play theirs. Where a
            trial's length is not known ahead, steps are then played one by one, which takes two to four times as long.
        measures: entries of the env ``[*B, 1]`` to report of each episode beside its return, and what is taken of its steps:
            their ``"max"`` (as for a success at any of the steps), ``"sum"``, ``"mean"``, or the ``"last"``. For example
            ``{("info", "success"): "max"}``; ``curve.measures["success"].per_episode`` then is the share of successes. They tell
            of the step that was taken: within ``"info"``, or named in ``Trial(step_keys=...)``.
        max_trial_steps: raise when a trial does not end within so many steps.

    Returns:
        The adaptation curve; ``curve.steps.first_and_last`` says whether episodes get shorter.

    Raises:
        ValueError: ``num_trials`` below 1, the env has no `Trial`, rows of a `SerialEnv` hand out the same fixed tasks,
            statistics of a `VecNorm` in it, or of Gymnasium's `NormalizeObservation` or `NormalizeReward`, would move, a measured
            entry is several numbers, or overwritten where an episode ends, or the ablation changes nothing that the policy reads
            (where that is known after all trials alone, as of memory zeroed where episodes begin and none does, the log says so).
        TypeError: ``env`` is no env, ``policy`` no policy, ``measures`` no mapping, ``ablation`` or ``on_step`` no function, or an
            ablation returns something else than named tensors.
        RuntimeError: a trial does not end.
        FloatingPointError: a reward or a measured entry is not finite, or the policy gives NaN.

    Examples:
        >>> from torchrl.envs import Compose, TransformedEnv
        >>> from rl2_torchrl import PreviousStep, TaskSampler, Trial
        >>> from rl2_torchrl.envs import BernoulliBandit, uniform_means
        >>> from rl2_torchrl.modules import GRUCategoricalActor
        >>> env = TransformedEnv(
        ...     BernoulliBandit(3, batch_size=(50,)),
        ...     Compose(Trial(episodes=10), TaskSampler(uniform_means(3), seed=1), PreviousStep()),
        ... )
        >>> adaptation_curve(env, GRUCategoricalActor.from_env(env), num_trials=100).returns.shape
        torch.Size([100, 10])
    """
    num_trials, max_trial_steps = whole("num_trials", num_trials), whole("max_trial_steps", max_trial_steps)
    require_flags(deterministic=deterministic)
    require_env(env, "adaptation_curve(env, policy, num_trials)")
    require_network(policy, "adaptation_curve(env, policy, num_trials)")
    if EPISODE_INDEX not in env.observation_spec.keys():
        raise ValueError("the env has no Trial, so there are no trials to evaluate: Compose(Trial(...), ...).")
    _require_still_statistics(env)
    measures = {} if measures is None else measures
    _require_measures(env, measures)
    measured = {unravel_key(("next", key)): how for key, how in measures.items()}
    _rewind(env)
    kept = [*_KEPT, *(key for key in measured if key not in _KEPT)]
    rollout = Rollout(env, policy, _steps_at_once(env, on_step), kept, ablation=ablation, on_step=on_step)
    kind = ExplorationType.DETERMINISTIC if deterministic else ExplorationType.RANDOM
    trials, returns = Trials(int(num_trials)), EpisodeTable("sum")
    tables = {key: EpisodeTable(how) for key, how in measured.items()}
    while trials.open:
        with exploring(kind):  # not for longer: other threads' rollouts and updates wait for it
            batch = rollout()
        steps = {key: batch[key].reshape(-1, batch.shape[-1]).cpu() for key in kept}
        index, counted = trials.add(steps)
        counts = [("next", TRIAL_STEP), ("next", "done"), ("next", "reward"), *measured]
        steps = {key: steps[key].flatten().index_select(0, counted) for key in counts}
        returns.add(index, steps["next", "reward"])
        for key, table in tables.items():
            table.add(index, steps[key])
        rollout.require_sound_policy()  # behind the rewards, which it reads
        unended = steps["next", TRIAL_STEP][~steps["next", "done"]]
        _require_end(unended, max_trial_steps)
    if ablation is not None and not rollout.has_ablated:
        log.warning(
            "the ablation changed nothing that the policy reads, in no step of any trial: the curve is that of the agent as it is. "
            "Memory that is zeroed where episodes begin needs trials of several, rewards that are shuffled some that differ."
        )
    trial = _trial_of(env)
    episodes = None if trial is None else trial.episodes
    at_least = 0 if episodes is None else min(episodes, trial.steps or episodes)
    made = partial(AdaptationCurve, finished=trials.finished, episodes=episodes)
    measured = {key[-1]: made(table.table(at_least)) for key, table in tables.items()}
    return made(returns.table(at_least), measured, made(returns.counts(at_least)))


def _trial_of(env: EnvBase) -> Trial | None:
    """The outermost around ``env``; None where its workers have theirs."""
    return next((each for each in reversed(transforms_of(env)) if isinstance(each, Trial)), None)


def _rewind(env: EnvBase) -> None:
    """Has the samplers begin with their first task: an evaluation before this one may have left them anywhere."""
    if isinstance(base := base_of(env), SerialEnv) and base.is_closed:  # it has not been started yet
        base.start()
    rows = rows_of(env)
    found = [[each for each in transforms_of(one) if isinstance(each, TaskSampler)] for one in (env, *rows)]
    lists = [each.distribution.digest for row in found[1:] for each in row if hasattr(each.distribution, "digest")]
    if len(set(lists)) < len(lists):
        raise ValueError(
            f"of the {len(rows)} rows of the SerialEnv several hand out the same fixed tasks, each from the "
            "first on: some would be played again and again, others never. Put Trial and TaskSampler around it."
        )
    for sampler in (each for row in found for each in row):
        sampler.rewind()


_KEPT = (
    *(EPISODE_INDEX, "is_init"),
    *(("next", key) for key in ("reward", "done", TRIAL_STEP, EPISODE_INDEX)),
)

#: Numbers that a batch's steps may show in all.
_NUMBERS_AT_ONCE = 2**24
#: Steps of a batch where nobody knows how many the last trial will take, and those beyond cost little.
_FEW_STEPS = 8


def _steps_at_once(env: EnvBase, on_step: Callable[[State], None] | None) -> int:
    """Steps of a batch: a trial's, or an even share of them, where all are of one length, which is known ahead.

    Else a batch may go beyond the last trial's end: one step, where that would be shown to somebody, or may cost much.
    """
    found, trial = trial_and_base(env), _trial_of(env)
    # Beside others' transforms, too, which may end a trial before.
    if trial is not None and trial.episodes is None and (found or on_step is None):
        return _share_of(trial.steps, env)
    if found is None:
        return 1
    base = found[1]
    is_native = is_tensor_env(base)
    if is_native and base.fixed_length:
        return min(trial.episodes * base.max_episode_steps, trial.steps or math.inf)
    return _FEW_STEPS if is_native and on_step is None else 1


def _share_of(steps: int, env: EnvBase) -> int:
    """The most steps of which a trial's ``steps`` are so many times, and whose inputs take no more than some memory."""
    numbers = sum(spec.shape.numel() for spec in env.observation_spec.values(True, True))
    return max(n for n in range(1, steps + 1) if steps % n == 0 and (n == 1 or n * numbers <= _NUMBERS_AT_ONCE))


def _require_still_statistics(env: EnvBase) -> None:
    moving = [
        type(part).__name__ for part in env.modules() if isinstance(part, VecNorm | VecNormV2) and not part.frozen
    ]
    if moving:
        raise ValueError(
            f"the env's {moving[0]} is not frozen: its statistics would move as it is evaluated, and each trial be seen on another "
            "scale. In each evaluation make its env anew, with the training's .frozen_copy(), which has its numbers of then "
            "(of as many rows, if it does not reduce_batch_dims); or let networks normalize: from_env(normalize=True)."
        )
    base = base_of(env)
    moving = base.moving_statistics() if isinstance(base, GymVectorEnv) else moving_statistics(base)
    if moving:
        raise ValueError(
            f"the env has Gymnasium's {' and '.join(moving)}, whose statistics begin anew here and move as it is evaluated: "
            "returns would be those of no trial. Leave it out, and let networks and advantages scale, from_env(normalize=True), "
            "TrialAdvantage(scale_rewards=True); or give it the training's statistics, and update_running_mean=False."
        )


def _require_measures(env: EnvBase, measures: Mapping[NestedKey, Measure]) -> None:
    if not isinstance(measures, Mapping):
        raise TypeError(
            f"{measures=} does not say what is taken of an episode's steps: give {{entry: how}}, such as "
            "{('info', 'success'): 'max'}."
        )
    names = [key if isinstance(key, str) else key[-1] for key in measures]
    if len(set(names)) < len(names):
        raise ValueError(f"measures are named {names}, after the last part of their keys: one of two would be lost.")
    known = list(env.observation_spec.keys(True, True))
    missing = [key for key in measures if key not in known and key != "reward"]
    if missing:
        raise KeyError(f"measures asks for {missing}, which the env does not say; it has {known}.")
    trials = [each for each in transforms_of(env) if isinstance(each, Trial)]
    if lost := [key for key in measures if any(key in trial.overwritten(env) for trial in trials)]:
        raise ValueError(
            f"measures asks for {lost}, which an inner reset overwrites: at an episode's last step they are those of the next "
            f"one's beginning, and a success there would be lost. Name them, Trial(step_keys={lost}), unless policy or env read "
            f"them; put a transform that makes them below Trial; or have the env say such numbers within {INFO!r}."
        )
    sizes = {key: tuple(env.observation_spec[key].shape[env.ndim :]) for key in measures if key != "reward"}
    if several := {key: size for key, size in sizes.items() if math.prod(size) != 1}:
        raise ValueError(
            f"measures asks for entries of several numbers each, {several}; a measure is one number of each step: have the env, "
            "or a transform, say that number in an entry of its own, [*B, 1]."
        )
    unknown = set(measures.values()) - set(get_args(Measure))
    if unknown:
        raise ValueError(f"measures asks for the {unknown} of an episode's steps: choose of {get_args(Measure)}.")


def _require_end(trial_steps: torch.Tensor, max_trial_steps: int) -> None:
    """Raises where one of the trials that go on has gone on for too long."""
    if trial_steps.numel() and trial_steps.max() >= max_trial_steps:
        raise RuntimeError(
            f"a trial did not end within max_trial_steps={max_trial_steps}: does an episode of this env ever end? Bound "
            "the trial, Trial(episodes=..., steps=...), or raise max_trial_steps."
        )
