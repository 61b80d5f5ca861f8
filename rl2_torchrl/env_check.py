"""What `check_trial_env` asks of the env below `Trial`, the one that somebody has written: seeds, tasks, actions, memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.utils import expand_as_right
from torch import Tensor
from torchrl.envs import EnvBase

from rl2_torchrl.envs.gym_vector import GymVectorEnv
from rl2_torchrl.envs.tensor_env import TensorEnv
from rl2_torchrl.tensor_env_check import misfit
from rl2_torchrl.trial import INFO, is_within

__all__ = ["EnvBelow"]

#: Resets of which rows are compared, and steps of a run. Long enough for an episode of a small env, short enough for a simulator.
_RESETS, _STEPS, _STEPS_TO_AN_END = 16, 30, 300
#: Pairs of actions that are compared, until one makes a difference.
_PAIRS = 40
#: Differences that must have been seen, had there been as many as in first episodes: none is then chance in 1 case of 400.
_EXPECTED = 6
#: How likely it may be that some rows see no difference by chance, and are called deaf nevertheless.
_CHANCE = 1 / 400

Task = Tensor | TensorDictBase | None
Outcome = Tensor  #: All that a step says of each row, [num_rows, n] float64; whether an episode ended comes first.


class _Pair(NamedTuple):
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
    """The env that `Trial` plays. A rule returns what breaks it, or None.

    Args:
        env: the env, without `Trial` and what comes after it.
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
        self.num_rows, self._step_size = env.batch_size.numel(), 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # a check finds the same each time
            self.actions = [env.full_action_spec[env.action_key].rand() for _ in range(_STEPS_TO_AN_END)]

    # ---------------------------------------------------------------- playing
    def seed(self, seed: int = 0) -> None:
        with torch.random.fork_rng(devices=[]):  # TorchRL's set_seed seeds PyTorch's default generator too
            self.env.set_seed(seed)

    def start(self, task: Task) -> TensorDictBase:
        return self._given(
            self.env.reset(self._given(TensorDict({}, self.env.batch_size, self.env.device), task)), task
        )

    def _given(self, tensordict: TensorDictBase, task: Task) -> TensorDictBase:
        return tensordict if task is None else tensordict.set(self.task_key, task.clone())

    def step(self, tensordict: TensorDictBase, action: Tensor) -> tuple[Outcome, TensorDictBase]:
        stepped = self.env.step(tensordict.clone().set(self.env.action_key, action.clone()))
        outcome = self._outcome(stepped["next"])
        self._step_size = outcome.shape[1]
        return outcome, self.env.step_mdp(stepped)

    def begin(self, tensordict: TensorDictBase, rows: Tensor, task: Task, brought: Task = None) -> TensorDictBase:
        """An episode of ``task`` begins in ``rows`` ``[*B, 1]``, as `Trial` makes it begin; the reset is given ``brought``."""
        given = self._given(tensordict.clone(), task)
        first = self.env._reset(self._given(given.clone(), brought).set("_reset", rows.clone()))
        for key in first.keys(True, True):
            if key not in self.env.reset_keys and key not in self.env.done_keys:
                old, new = given.get(key, None), first.get(key)
                mask = expand_as_right(rows.reshape(self.env.batch_size), new)
                given.set(key, new.clone() if old is None else torch.where(mask, new, old))
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
                outcome = torch.cat([outcome, self._outcome(tensordict)], 1)
            yield outcome, tensordict, ended

    def outcomes(self, tensordict: TensorDictBase, task: Task, actions: Sequence[Tensor]) -> list[Outcome]:
        """What a reset has shown, and each step from there on."""
        return [self._outcome(tensordict), *(outcome for outcome, *_ in self.run(tensordict, task, actions))]

    def _outcome(self, tensordict: TensorDictBase) -> Outcome:
        # What is said beside, such as the number of resets so far, may change as it likes.
        keys = ["done", *self.env.full_observation_spec.keys(True, True), *self.env.reward_keys]
        left_out = [INFO] if self.task_key is None else [INFO, self.task_key]
        values = [tensordict.get(key, None) for key in keys if not any(is_within(key, root) for root in left_out)]
        values = [value.reshape(self.num_rows, -1).double().cpu() for value in values if isinstance(value, Tensor)]
        return torch.cat(values, 1)

    def _pairs(self) -> Iterator[tuple[Task, Task]]:
        yield from zip(self.tasks, self.tasks[1:], strict=False)

    def _flat(self, task: Task) -> Tensor:
        leaves = task.values(True, True) if isinstance(task, TensorDictBase) else [task]
        return torch.cat([leaf.reshape(self.num_rows, -1).double().cpu() for leaf in leaves], -1)

    def _half(self) -> Tensor:
        """Every other row, bool ``[*B, 1]``."""
        rows = torch.zeros(self.num_rows, dtype=torch.bool, device=self.env.device)
        rows[::2] = True
        return rows.reshape(*self.env.batch_size, 1)

    # -------------------------------------------------------------- the rules
    def rows_draw_apart(self) -> str | None:
        """Rows of one task and one action: where an env draws at random, two rows hardly ever draw the same each time."""
        if self.num_rows < 2:
            return None
        task = None if self.tasks[0] is None else _same_in_all_rows(self.tasks[0], self.env.batch_size)
        action, drawn = _same_in_all_rows(self.actions[0], self.env.batch_size), []
        for _ in range(_RESETS):
            tensordict = self.start(task)
            drawn.append(torch.cat([self._outcome(tensordict), self.step(tensordict, action)[0]], 1))
        by_row = torch.stack(drawn, 1)  # [num_rows, _RESETS, n]
        for row in range(1, self.num_rows):
            if _same(by_row[row], by_row[0]) and self._by_chance(by_row[0]) < 1e-3 / self.num_rows:
                return f"in {_RESETS} episodes rows 0 and {row} drew the same random numbers"

    @staticmethod
    def _by_chance(draws: Tensor) -> float:
        """How likely two rows draw the same ``_RESETS`` times, by how often one row draws the same again."""
        same = (draws.unsqueeze(0) == draws.unsqueeze(1)).all(-1).double()
        return ((same.sum() - len(draws)) / (len(draws) * (len(draws) - 1))).item() ** len(draws)

    def step_specs(self) -> str | None:
        """What the env returns as it is: TorchRL gives rewards and flags another shape on their way, where it can."""
        tensordict = self.start(self.tasks[0])
        for number, action in enumerate(self.actions[:_RESETS]):
            after = self.env._step(tensordict.clone().set(self.env.action_key, action.clone()))
            specs = {
                **dict(self.env.full_observation_spec.items(True, True)),
                **dict(self.env.full_reward_spec.items()),
            }
            specs |= dict(self.env.full_done_spec.items())
            for key, spec in specs.items():
                value = after.get(key, None)
                if isinstance(value, Tensor) and (wrong := misfit(value, spec)):
                    return f"the {key!r} that step {number} returned {wrong}"
            tensordict = self._given(tensordict.clone().update(after.exclude(*self.env.reward_keys)), self.tasks[0])
            self.env._complete_done(self.env.full_done_spec, tensordict)
            if tensordict["done"].any():
                tensordict = self.begin(tensordict, tensordict["done"], self.tasks[0])

    def kept_tensors(self) -> str | None:
        tensordict = self.start(self.tasks[0])
        held = dict(self._held(tensordict, "a reset"))
        for number, action in enumerate(self.actions[:4]):
            copies = {name: value.clone() for name, value in held.items()}
            stepped = self.env.step(tensordict.set(self.env.action_key, action.clone()))
            for name, value in held.items():
                if not _same(value, copies[name]):
                    return f"step {number} wrote over {name}"
            held |= dict(self._held(stepped["next"], f"step {number}"))
            tensordict = self.env.step_mdp(stepped)
            if tensordict["done"].any():
                tensordict = self.begin(tensordict, tensordict["done"], self.tasks[0])

    def _held(self, tensordict: TensorDictBase, where: str) -> Iterator[tuple[str, Tensor]]:
        for key in (*self.env.full_observation_spec.keys(True, True), *self.env.reward_keys, *self.env.done_keys):
            value = tensordict.get(key, None)
            if isinstance(value, Tensor):
                yield f"the {key!r} of {where}", value
        if isinstance(self.env, TensorEnv):  # its own methods hand out what it holds, without TorchRL's copies
            for key, value in self.env.observation.items():
                yield f"the env's {key!r} of {where}", value

    def seed_repeats(self) -> str | None:
        runs = []
        self.start(self.tasks[0])  # both runs have the same task behind them: one that is heard late is told as such
        for _ in range(2):
            self.seed()
            runs.append(self.outcomes(self.start(self.tasks[0]), self.tasks[0], self.actions[:_STEPS]))
        for number, (one, other) in enumerate(zip(*runs, strict=True)):
            if not _same(one, other):
                return f"two runs of one seed, task and sequence of actions differ after {number} steps"

    def task_heard(self) -> str | None:
        if self.tasks[0] is None:
            return None
        return self._task_read_back() if self.task_of is not None else self._task_seen()

    def _task_read_back(self) -> str | None:
        half = self._half()
        for task, other in self._pairs():
            tensordict = self.start(task)
            seen = self._unlike("a reset", task)
            mixed = _where(half.reshape(self.env.batch_size), other, task)
            self.begin(tensordict, half, mixed, self._as_drawn(half, mixed))
            seen = seen or self._unlike("a reset of some rows", mixed)
            if seen is not None:
                return seen

    def _unlike(self, what: str, task: Task) -> str | None:
        found, expected = self._flat(self.task_of(self.env)).float(), self._flat(task).float()
        if not torch.equal(found, expected):
            row = (found != expected).any(1).nonzero()[0].item()
            return f"after {what} row {row} has the task {found[row].tolist()}, not {expected[row].tolist()}"

    def _as_drawn(self, rows: Tensor, task: Task) -> Task:
        """``task`` as `TaskSampler` draws it where a trial begins in ``rows`` alone: zeros elsewhere."""
        return _where(rows.reshape(self.env.batch_size), task, self.env.full_state_spec[self.task_key].zero())

    @cached_property
    def _played(self) -> list[_Pair]:
        """Each pair of tasks, played from a seed of its own."""
        return [self._play(seed, task, other) for seed, (task, other) in enumerate(self._pairs())]

    def _play(self, seed: int, task: Task, other: Task) -> _Pair:
        half = self._half()
        changed = half if seed % 2 == 0 else ~half
        mixed = _where(changed.reshape(self.env.batch_size), other, task)
        runs = [self._episodes(seed, first) for first in (task, other, mixed)]
        later = [self._episodes(seed, task, then, half) for then in (task, other)]
        unlike = (self._flat(task) != self._flat(other)).any(1)
        return _Pair(*runs, changed.reshape(-1).cpu(), *later, unlike)

    def _episodes(self, seed: int, task: Task, then: Task = None, rows: Tensor | None = None) -> list[Outcome]:
        """Steps from one seed on; ``rows`` begin anew with ``then`` after the first."""
        # Each row takes each sequence of actions in turn, or one that meets no task would pass for a deaf row.
        actions = [action.flatten(0, len(self.env.batch_size) - 1).roll(seed, 0) for action in self.actions[:_STEPS]]
        actions = [action.reshape(each.shape) for action, each in zip(actions, self.actions, strict=False)]
        self.seed(seed)
        tensordict = self.start(task)
        if rows is not None:
            _, tensordict, _ = next(self.run(tensordict, task, actions[:1]))
            mixed = _where(rows.reshape(self.env.batch_size), then, task)
            # Within a trial a reset brings all rows' tasks; where trials begin, those of the rows that do.
            tensordict = self.begin(tensordict, rows, mixed, mixed if then is task else self._as_drawn(rows, mixed))
            task = mixed
        return self.outcomes(tensordict, task, actions)

    def _task_seen(self) -> str | None:
        """Whether another task shows in what follows: in episodes from the start, and in those that begin in some rows."""
        at_start, later, half = [0, 0], [0, 0], self._half().reshape(-1).cpu()
        for pair in self._played:
            at_start = _counted(at_start, [pair.task, pair.other], pair.unlike)
            later = _counted(later, [pair.same_later, pair.other_later], pair.unlike & half)
        if at_start[1] and not at_start[0]:
            seen = f"{len(self.tasks)} tasks made no difference to anything in {_STEPS} steps of random actions"
            added = self.env.attributes_added() if isinstance(self.env, GymVectorEnv) else ()
            return f"{seen}; set_task gave the env {added}, which it did not have before: misspelt?" if added else seen
        if _none_by_rule(at_start, later):
            return "another task given at a reset of some rows made no difference, though it did at a reset of all"
        unlike = torch.stack([pair.unlike for pair in self._played])
        heard = torch.stack([_differ(pair.task, pair.other) for pair in self._played]) & unlike
        deaf = ~heard.any(0)
        if deaf.any() and _chance_of(heard, unlike, deaf) < _CHANCE:
            return f"another task made no difference in the rows {_numbers(deaf)}, though it did in others"

    def task_own(self) -> str | None:
        """Rows follow from their own tasks, whatever the others were given, or they themselves before."""
        for pair in self._played if self.tasks[0] is not None else ():
            for rows, run in ((pair.changed, pair.other), (~pair.changed, pair.task)):
                if (seen := self._parted(run, pair.mixed, rows)) is not None:
                    return f"twice given the same task, seed and actions, row {seen} played something else when others were not"

    def task_kept(self) -> str | None:
        """Rows that go on are not touched by the tasks that a reset of others brings."""
        going_on = ~self._half().reshape(-1).cpu()
        for pair in self._played if self.tasks[0] is not None else ():
            if (seen := self._parted(pair.same_later, pair.other_later, going_on)) is not None:
                return f"row {seen} went another way in the middle of an episode, since other rows had begun with another task"

    def _parted(self, run: Sequence[Outcome], other: Sequence[Outcome], rows: Tensor) -> int | None:
        """The first of ``rows`` in which two runs differ before an episode ends, after which rows may draw in another order."""
        for one, another in zip(run, other, strict=False):
            differ = _unequal(one[:, : self._step_size], another[:, : self._step_size]).any(1) & rows
            if differ.any():
                return int(differ.nonzero()[0])
            if one[:, 0].any() or another[:, 0].any():
                return None

    def action_heard(self) -> str | None:
        """Whether the action of an episode's first step counts, in later episodes as in the first."""
        at_start, later = [0, 0], [0, 0]
        pairs = zip(self.actions[:_PAIRS], self.actions[_PAIRS : 2 * _PAIRS], strict=True)
        for seed, (one, other) in enumerate(pairs):
            unlike = (one != other).reshape(self.num_rows, -1).any(1).cpu()
            firsts = [self._first_step(seed, action, 0) for action in (one, other)]
            at_start = _counted(at_start, [[outcome] for outcome, _ in firsts], unlike)
            firsts = [self._first_step(seed, action, _STEPS_TO_AN_END) for action in (one, other)]
            ended = firsts[0][1]
            later = _counted(later, [[outcome] for outcome, _ in firsts], unlike & ended)
            if later[0] or not ended.any():
                return None
        if _none_by_rule(at_start, later):
            return "the first step of an episode that began within a trial was the same whatever the action"

    def _first_step(self, seed: int, action: Tensor, steps: int) -> tuple[Outcome, Tensor]:
        """What ``action`` leads to once an episode has ended, after ``steps`` steps at the latest, and in which rows one has."""
        self.seed(seed)
        task = self.tasks[seed % len(self.tasks)]
        tensordict = self.start(task)
        ended = torch.zeros_like(tensordict["done"])
        for _, after, ends in self.run(tensordict, task, self.actions[:steps]):
            tensordict, ended = after, ends
            if ends.any():
                break
        return self.step(tensordict, action)[0], ended.reshape(-1).cpu()


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and not _unequal(one, other).any()


def _unequal(one: Tensor, other: Tensor) -> Tensor:
    """Where the numbers are not the same; NaN is as NaN."""
    return (one != other) & ((one == one) | (other == other))


def _where(rows: Tensor, new, old):
    """``new`` in ``rows`` ``[*B]``, ``old`` elsewhere."""
    return (
        new.where(rows, old) if isinstance(new, TensorDictBase) else torch.where(expand_as_right(rows, new), new, old)
    )


def _same_in_all_rows(value: Tensor | TensorDictBase, batch_size: torch.Size):
    """The first row's ``value`` in all rows."""
    return value.flatten(0, len(batch_size) - 1)[0].expand(*batch_size, *value.shape[len(batch_size) :]).clone()


def _counted(count: Sequence[int], runs: Sequence[Sequence[Outcome]], rows: Tensor) -> list[int]:
    """``count``, of rows that differ and of all, with those of two more ``runs``, of which ``rows`` count."""
    return [count[0] + int((_differ(*runs) & rows).sum()), count[1] + int(rows.sum())]


def _differ(run: Sequence[Outcome], other: Sequence[Outcome]) -> Tensor:
    """The rows in which two runs differ, bool ``[num_rows]``."""
    differ = torch.zeros(len(run[0]), dtype=torch.bool)
    for one, another in zip(run, other, strict=True):
        differ |= (one != another).any(1) if one.shape == another.shape else True
    return differ


def _chance_of(heard: Tensor, asked: Tensor, deaf: Tensor) -> float:
    """How likely the rows ``deaf``, or as many others, hear nothing where all rows hear alike; ``[num_pairs, num_rows]`` bool."""
    chance = _log_choices(len(deaf), int(deaf.sum()))
    for hits, rows in zip(heard.sum(1).tolist(), asked, strict=True):
        chance += _log_choices(int((rows & ~deaf).sum()), hits) - _log_choices(int(rows.sum()), hits)
    return math.exp(min(0.0, chance))


def _log_choices(number: int, chosen: int) -> float:
    return math.lgamma(number + 1) - math.lgamma(chosen + 1) - math.lgamma(number - chosen + 1)


def _numbers(rows: Tensor) -> str:
    """The first few of ``rows``, by number."""
    numbers = rows.nonzero().flatten().tolist()
    return f"{numbers[:8]}{' and more' if len(numbers) > 8 else ''}"


def _none_by_rule(expected: Sequence[int], seen: Sequence[int]) -> bool:
    """Whether nothing was ``seen`` where so much was to be ``expected`` that it is no chance."""
    share = expected[0] / max(1, expected[1])
    return seen[0] == 0 and share * seen[1] >= _EXPECTED
