"""`EnvBelow`: the env that `Trial` plays, as the rules play it: from a seed, with a task, and with rows that begin singly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, TypeAlias

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase

from rl2_torchrl.env_check.outcomes import Outcome, differ
from rl2_torchrl.env_check.shown import rows_of_task
from rl2_torchrl.envs.rows import merge
from rl2_torchrl.trial import INFO, base_of, is_within, put_rows

__all__ = ["RUN_STEPS", "STEPS_TO_AN_END", "EnvBelow", "Pair", "Task"]

#: Steps of a run, and those within which an episode of a small env has ended. Few enough for a simulator.
RUN_STEPS, STEPS_TO_AN_END = 30, 300
#: Pairs of tasks that are played for so long, and the steps of further ones where all is well: what some tasks alone do shows soon.
_PAIRS, _FEW_STEPS = 3, 10

Task: TypeAlias = Tensor | TensorDictBase | None


class Pair(NamedTuple):
    """What two tasks have led to, from one seed on and by the same actions: what a reset and the steps after it have said."""

    task: Sequence[Outcome]
    other: Sequence[Outcome]
    #: The other in the rows ``changed`` alone, bool ``[num_rows]``.
    mixed: Sequence[Outcome]
    changed: Tensor
    #: The task, and an episode of it or of the other that begins after a step in every other row.
    same_later: Sequence[Outcome]
    other_later: Sequence[Outcome]
    #: In which rows the tasks are not the same, bool ``[num_rows]``.
    unlike: Tensor


class EnvBelow:
    """The env that `Trial` plays, without `Trial` and what comes after it.

    Args:
        env: the env.
        tasks: tasks ``[*B, ...]`` of whole batches; empty for an env without.
        task_key: their entry.
        task_of: reads the rows' tasks back from the env, or None.
    """

    def __init__(
        self,
        env: EnvBase,
        tasks: Sequence[Task],
        task_key: NestedKey | None,
        task_of: Callable[[EnvBase], Task] | None,
    ):
        self.env, self.task_key, self.task_of = env, task_key, task_of
        self.tasks: list[Task] = list(tasks) or [None]
        self.num_rows = env.batch_size.numel()
        self._base = base_of(env)
        self._given_seed = vars(self._base).get("given_seed")
        #: How many numbers of an outcome are the step's own; those of an episode begun there come behind.
        self.step_size = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a check finds the same each time
            self.actions = [env.full_action_spec[env.action_key].rand() for _ in range(STEPS_TO_AN_END)]

    def seed(self, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):  # TorchRL's set_seed seeds PyTorch's default generator too
            # Of the class: samplers around the env go on with the tasks that follow.
            type(self._base).set_seed(self._base, seed)

    def leave(self) -> None:
        """Seeds the env as it was made, or by PyTorch's default generator, lest all that are checked draw the same from here on."""
        self.seed(int(torch.randint(2**31, ())) if self._given_seed is None else self._given_seed)
        if "given_seed" in vars(self._base):
            self._base.given_seed = self._given_seed

    def start(self, task: Task) -> TensorDictBase:
        empty = TensorDict({}, self.env.batch_size, self.env.device)
        return self.given(self.env.reset(self.given(empty, task)), task)

    def given(self, tensordict: TensorDictBase, task: Task) -> TensorDictBase:
        return tensordict if task is None else tensordict.set(self.task_key, task.clone())

    def step(self, tensordict: TensorDictBase, action: Tensor) -> tuple[Outcome, TensorDictBase]:
        stepped = self.env.step(tensordict.clone().set(self.env.action_key, action.clone()))
        outcome = self.outcome(stepped["next"])
        self.step_size = outcome.shape[1]
        return outcome, self.env.step_mdp(stepped)

    def begin(self, tensordict: TensorDictBase, rows: Tensor, task: Task, brought: Task = None) -> TensorDictBase:
        """An episode of ``task`` begins in ``rows`` ``[*B, 1]``, as `Trial` makes it begin; the reset is given ``brought``."""
        given = self.given(tensordict.clone(), task)
        first = self.env._reset(self.given(given.clone(), brought).set("_reset", rows.clone())).clone()
        flags = {*self.env.reset_keys, *self.env.done_keys}
        put_rows(first, given, rows.reshape(self.env.batch_size), flags.__contains__)
        for key in self.env.done_keys:
            given.set(key, given.get(key) & ~rows)
        return given

    def run(
        self, tensordict: TensorDictBase, task: Task, actions: Sequence[Tensor]
    ) -> Iterator[tuple[Outcome, TensorDictBase, Tensor]]:
        """Outcome, TensorDict and ended rows ``[*B, 1]`` of each step; where an episode ends, another of the same task begins."""
        for action in actions:
            outcome, tensordict = self.step(tensordict, action)
            ended = tensordict["done"]
            if ended.any():
                tensordict = self.begin(tensordict, ended, task)
                outcome = torch.cat([outcome, self.outcome(tensordict)], 1)
            yield outcome, tensordict, ended

    def outcomes(self, tensordict: TensorDictBase, task: Task, actions: Sequence[Tensor]) -> list[Outcome]:
        """What a reset has shown, and each step from there on."""
        return [self.outcome(tensordict), *(outcome for outcome, *_ in self.run(tensordict, task, actions))]

    def outcome(self, tensordict: TensorDictBase) -> Outcome:
        # What is said beside, such as the number of resets so far, may change as it likes.
        keys = ["done", *self.env.full_observation_spec.keys(True, True), *self.env.reward_keys]
        left_out = [INFO] if self.task_key is None else [INFO, self.task_key]
        values = [tensordict.get(key, None) for key in keys if not any(is_within(key, root) for root in left_out)]
        values = [value.reshape(self.num_rows, -1).double().cpu() for value in values if isinstance(value, Tensor)]
        return torch.cat(values, 1)

    @cached_property
    def pairs(self) -> list[Pair]:
        """Each task and the next, played from a seed of their own, for fewer steps once all rows have heard theirs."""
        pairs: list[Pair] = []
        deaf, deaf_later = torch.ones(self.num_rows, dtype=torch.bool), self.half().reshape(-1).cpu()
        for seed, (task, other) in enumerate(pairwise(self.tasks)):
            all_heard = len(pairs) >= _PAIRS and not (deaf | deaf_later).any()
            pairs.append(pair := self._play(seed, task, other, _FEW_STEPS if all_heard else RUN_STEPS))
            deaf &= ~differ(pair.task, pair.other)
            deaf_later &= ~differ(pair.same_later, pair.other_later)
        return pairs

    def _play(self, seed: int, task: Task, other: Task, steps: int) -> Pair:
        half = self.half()
        changed = half if seed % 2 == 0 else ~half
        mixed = merge(changed.reshape(self.env.batch_size), other, task)
        runs = [self._episodes(seed, steps, first) for first in (task, other, mixed)]
        later = [self._episodes(seed, steps, task, then, half) for then in (task, other)]
        unlike = (rows_of_task(task, self.env.batch_size) != rows_of_task(other, self.env.batch_size)).any(1).cpu()
        return Pair(*runs, changed.reshape(-1).cpu(), *later, unlike)

    def _episodes(
        self, seed: int, steps: int, task: Task, then: Task = None, rows: Tensor | None = None
    ) -> list[Outcome]:
        """So many steps from one seed on; ``rows`` begin anew with ``then`` after the first."""
        # Each row takes each sequence of actions in turn, or one that meets no task would pass for a deaf row.
        actions = [action.flatten(0, len(self.env.batch_size) - 1).roll(seed, 0) for action in self.actions[:steps]]
        actions = [action.reshape(each.shape) for action, each in zip(actions, self.actions, strict=False)]
        self.seed(seed)
        tensordict = self.start(task)
        if rows is not None:
            _, tensordict, _ = next(self.run(tensordict, task, actions[:1]))
            mixed = merge(rows.reshape(self.env.batch_size), then, task)
            # Within a trial a reset brings all rows' tasks; where trials begin, those of the rows that do.
            tensordict = self.begin(tensordict, rows, mixed, mixed if then is task else self.as_drawn(rows, mixed))
            task = mixed
        return self.outcomes(tensordict, task, actions)

    def as_drawn(self, rows: Tensor, task: Task) -> Task:
        """``task`` as `TaskSampler` draws it where a trial begins in ``rows`` alone: zeros elsewhere."""
        return merge(rows.reshape(self.env.batch_size), task, self.env.full_state_spec[self.task_key].zero())

    def half(self) -> Tensor:
        """Every other row, bool ``[*B, 1]``."""
        rows = torch.zeros(self.num_rows, dtype=torch.bool, device=self.env.device)
        rows[::2] = True
        return rows.reshape(*self.env.batch_size, 1)
