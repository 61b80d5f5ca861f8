"""`check_training`: what goes wrong without a word in recurrent meta-RL, looked for before the first update."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from tensordict import TensorDictBase
from torchrl.collectors import BaseCollector
from torchrl.envs import EnvBase

from rl2_torchrl.arguments import require_collector
from rl2_torchrl.checks import inputs, learning, memory, rows, tasks
from rl2_torchrl.checks.evidence import Evidence, NotChecked, Rule
from rl2_torchrl.collector import batches_of
from rl2_torchrl.env_check.outcomes import BrokenRule
from rl2_torchrl.locks import exploring
from rl2_torchrl.seeding import random_numbers_put_back
from rl2_torchrl.tasks import TaskSampler
from rl2_torchrl.trial import EPISODE_DONE
from rl2_torchrl.update import PPOUpdate

__all__ = ["TrainingCheckError", "TrainingReport", "check_training"]

log = logging.getLogger(__name__)

#: The rules by name, in the order of the checks, each with why it matters and what to do.
_RULES: dict[str, tuple[Rule, str]] = {
    rule.__name__: (rule, why)
    for module in (rows, tasks, inputs, memory, learning)
    for rule, why in module.RULES.items()
}


class TrainingCheckError(BrokenRule):
    """Training would go wrong; ``rule`` is the short name of what is broken."""


@dataclass
class TrainingReport:
    """What `check_training` looked at.

    Args:
        checked: the rules that hold.
        unchecked: the rules that could not be checked, with the reason.
        frozen: parameters that take no gradient (``requires_grad=False``).
        zero_gradient: trainable parameters whose gradient was exactly 0.
        notes: what is no fault, and worth knowing.
    """

    checked: list[str] = field(default_factory=list)
    unchecked: dict[str, str] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    zero_gradient: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"checked: {', '.join(self.checked) or 'nothing'}"]
        lines += [f"not checked: {rule}, as {reason}" for rule, reason in self.unchecked.items()]
        lines += [f"frozen: {', '.join(self.frozen)}"] * bool(self.frozen)
        lines += [f"gradient 0: {', '.join(self.zero_gradient)}"] * bool(self.zero_gradient)
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def check_training(
    collector: BaseCollector,
    update: PPOUpdate,
    batch: TensorDictBase | None = None,
    *,
    held_out: EnvBase | TaskSampler | torch.Tensor | TensorDictBase | None = None,
) -> TrainingReport:
    """Looks for faults that no error shows and no curve explains; the first rule that breaks is raised, by name.

    `train` runs it before the first update, on the first batch. It costs less than that update and leaves no trace: networks
    are copied, random numbers put back; only what functions of yours count outside modules they have counted. A rule whose
    entries are not in the batch is reported as not checked.

    Args:
        collector: the collector that the batch is from.
        update: `PPOUpdate`, or any callable; without ``loss`` only the batch is looked at.
        batch: a batch ``[*B, T]`` of ``collector``, not updated on yet. None collects one, which counts among the
            collector's frames; what the collector does not keep is then checked too, on steps of its env played beside it,
            after which new trials begin.
        held_out: the env of the evaluation, its `TaskSampler` or its tasks ``[num_tasks, ...]``; None leaves them unchecked.

    Returns:
        What was checked, what could not be, and the names of parameters that do not learn.

    Raises:
        TrainingCheckError: a rule is broken. The message says which, what was seen, why it matters and what to do.
        TypeError: ``collector`` is none.
        ValueError: ``batch`` is None, and ``collector`` has collected all its frames.

    Examples:
        >>> from torchrl.envs import Compose, TransformedEnv
        >>> from rl2_torchrl import ActorCritic, GRUCategoricalActor, GRUValueHead, PreviousStep, RL2PPOLoss, Trial, TrialCollector
        >>> from rl2_torchrl.envs import BernoulliBandit, uniform_means
        >>> transforms = Compose(Trial(episodes=5), TaskSampler(uniform_means(3)), PreviousStep())
        >>> env = TransformedEnv(BernoulliBandit(num_arms=3, batch_size=(16,)), transforms)
        >>> actor, critic = GRUCategoricalActor.from_env(env), GRUValueHead.from_env(env)
        >>> collector = TrialCollector(env, ActorCritic(actor, critic), frames_per_batch=16 * 10)
        >>> check_training(collector, PPOUpdate(RL2PPOLoss(actor, critic)), held_out=torch.rand(64, 3)).unchecked
        {}
    """
    require_collector(collector, "check_training(collector, update)")
    report = TrainingReport()
    with random_numbers_put_back():
        batches = [batch] if batch is not None else _collect(collector)
        evidence = [Evidence(batch, collector, update, held_out, report) for batch in batches]
        for name in _RULES:
            _check(name, evidence, report)
    log.info("training checked before its first update\n%s", report)
    return report


def _collect(collector: BaseCollector) -> list[TensorDictBase]:
    """A batch, and where it lacks entries and the env is at hand, as many steps with all entries."""
    batches, env = list(islice(batches_of(collector), 1)), getattr(collector, "env", None)
    if not batches:
        raise ValueError(
            "the collector has no batches left, its total_frames are collected, and check_training(collector, update) looks at the "
            "next one: give it a batch that there is, or a new collector."
        )
    if env is not None and ("next", EPISODE_DONE) not in batches[0].keys(True, True):
        with exploring(collector.exploration_type):
            steps = batches[0].shape[-1]
            batches.append(env.rollout(steps, collector.policy, break_when_any_done=False, auto_cast_to_device=True))
        collector.reset()
    return batches


def _check(name: str, evidence: Sequence[Evidence], report: TrainingReport) -> None:
    """Checks a rule on the first evidence that has the entries for it."""
    reasons = []
    for one in evidence:
        try:
            seen = _RULES[name][0](one)
        except NotChecked as reason:
            reasons.append(str(reason))
            continue
        if seen is not None:
            raise TrainingCheckError(name, seen, _RULES[name][1])
        report.checked.append(name)
        return
    report.unchecked[name] = reasons[0]
