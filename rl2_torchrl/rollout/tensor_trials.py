"""`TensorTrials`: trials as our three transforms make them, on plain tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.envs import EnvBase

from rl2_torchrl.modules.acting import State
from rl2_torchrl.modules.cores import where_rows
from rl2_torchrl.rollout.clock import Rows, TrialClock
from rl2_torchrl.rollout.doors import TensorDoor, TorchRLDoor, is_tensor_env
from rl2_torchrl.rollout.transitions import TransitionInputs
from rl2_torchrl.rollout.trials import REWARD, Keys, Task, Trials, flat, leaves, next_key
from rl2_torchrl.trial import TRIAL_KEYS

__all__ = ["TensorTrials"]


class TensorTrials(Trials):
    """Trials on plain tensors, of the env below ``ours``: its `Trial`, and its `TaskSampler` and `PreviousStep`, or None each."""

    def __init__(self, env: EnvBase, ours: Sequence, steps: int, read: Keys, keep: Keys | None):
        super().__init__(env, steps, read, keep)
        self.trial, self.sampler, transition = ours
        self.env = base = env.base_env
        observed = list(base.full_observation_spec.keys(True, True))
        self._root_keys = [key for key in observed if key in self.wanted]
        self._after_keys = [(key, next_key(key)) for key in observed if next_key(key) in self.wanted]
        self._observations: State = {}
        self._is_adopted = False

        self._task: Task = None
        self._task_key = "task" if self.sampler is None else self.sampler.task_key
        self._shown_task: State = {}  # its entries [N, ...], and the same under "next"
        self._tasks: list[Task] = []  # of the trials that begin in a batch, where that is known ahead

        encoded = [] if transition is None else transition.layout().observations
        self.inputs = None if transition is None else TransitionInputs(transition, steps, self.rows, self.device)
        self.out_key = None if transition is None else transition.out_key
        self._shows_next_input = transition is not None and next_key(self.out_key) in self.wanted
        self._counters = [key for key in encoded if key in TRIAL_KEYS]
        seen = {*encoded, *self._root_keys, *(key for key, _ in self._after_keys)}.difference(TRIAL_KEYS)
        self.door = TensorDoor(base, seen) if is_tensor_env(base) else TorchRLDoor(base, seen, self._task_key)
        self.has_threads, self.reason = self.door.has_threads, self.door.reason
        known = (*TrialClock.names, *TrialClock.next_names)
        flags = {*read, *(known if keep is None else leaves(keep, known))}
        flags |= {each for key in self._counters for each in (key, next_key(key))}
        self.clock = TrialClock(self.trial, self.rows, steps, self.door.episode_steps, self.device, flags)
        self._flags_read = [key for key in read if key in self.clock.names]

    @property
    def is_repeatable(self) -> bool:
        """Whether the batch begins with new trials in all rows, and they begin and end as in the last one."""
        return self._begins_ahead and self.clock.is_as_before

    @property
    def _begins_ahead(self) -> bool:
        return self.clock.is_shared and self.clock.begins is True and not self._is_adopted

    def start_batch(self) -> None:
        """Goes on where the last batch ended. Tasks are drawn here where it is known how many."""
        self.clock.start_batch(self.door.episode_steps)
        if self.sampler is None or not self.clock.is_shared:
            return
        tasks = [self.sampler.draw() for _ in range(self.clock.trials_begun + self._begins_ahead)]
        if self.device.type == "cuda" and self.is_repeatable and len(self._tasks) == len(tasks):
            for task, drawn in zip(self._tasks, tasks, strict=True):
                task.copy_(drawn)  # a CUDA graph reads them where they were when it was recorded
        else:
            self._tasks = tasks

    def adopt(self, reset: TensorDictBase) -> None:
        task = reset.get(self._task_key, None)
        if task is not None:
            self._deal(task.clone())  # a collector resets into the same memory, and a batch is a view of its tasks
        self.clock.restart()
        self._observations, self._is_adopted = self.door.adopt(reset), True

    def restart(self) -> None:
        self.clock.restart()
        self._is_adopted = False

    def start(self) -> tuple[State, Rows]:
        self._undealt: Iterator[Task] = iter(self._tasks)
        begun, is_adopted, self._is_adopted = self.clock.begins, self._is_adopted, False
        if self.inputs is not None:
            self.inputs.start_batch()
        if begun is not False:
            self._begin(0, begun, is_adopted)
        return self._at(0), begun

    def step(self, t: int, state: State) -> tuple[State, State, Rows]:
        action = state[self.action_key]
        observations, reward, done = self.door.play(action)
        inner, trial, episode = self.clock.tick(t, done)
        if inner is not False:
            # What tells of the step that was taken stays; see Trial(step_keys=...).
            told = {key: value for key, value in observations.items() if self.trial.tells_of_step(key)}
            observations = {**self.door.start(self._task, inner), **told}
        self._observations = observations
        after = {following: observations[key] for key, following in self._after_keys}
        after.update(self._shown_task)
        after[REWARD] = reward
        if self.inputs is not None and (trial is not True or self._shows_next_input):
            self.inputs.follow(t + 1, action, reward, episode, self._encoded(t, is_after=True))
            if self._shows_next_input:
                after[next_key(self.out_key)] = self.inputs.steps[t + 1].clone()
        if t + 1 == self.steps:
            return after, {}, False
        if trial is not False:
            self._begin(t + 1, trial)
        return after, self._at(t + 1), trial

    def _begin(self, t: int, rows: Rows, is_adopted: bool = False) -> None:
        """A trial of a new task begins in ``rows`` at step ``t``; with ``is_adopted`` it has begun, and is not written down yet."""
        if not is_adopted:
            if self.sampler is not None:
                self._deal(next(self._undealt) if self.clock.is_shared else self._drawn(rows))
            first = self.door.start(self._task, rows)
            if rows is not True:
                # Other rows may have begun an episode just now, and go on telling of the step before it.
                told = [key for key in first if self.trial.tells_of_step(key)]
                first = {**first, **{key: where_rows(rows, first[key], self._observations[key]) for key in told}}
            self._observations = first
        if self.inputs is not None:
            self.inputs.begin(t, rows, self._encoded(t, is_after=False))

    def _encoded(self, t: int, *, is_after: bool) -> State:
        """What the transition input shows before step ``t``, or after it: observations, and such of the trial's counters."""
        if not self._counters:
            return self._observations
        flags = self.clock.at(t)
        return {**self._observations, **{key: flags[next_key(key) if is_after else key] for key in self._counters}}

    def _drawn(self, rows: Rows) -> Task:
        if rows is True:
            return self.sampler.draw()
        rows = rows.reshape(self.batch_size)
        return where_rows(rows, self.sampler.draw(rows), self._task)

    def _deal(self, task: Task) -> None:
        """The rows are given ``task``, all of its entries."""
        self._task, entries = task, [] if self.sampler is None else [(self._task_key, task)]
        if entries and isinstance(task, TensorDictBase):
            entries = TensorDict(dict(entries), self.batch_size).items(True, True)
        shown = {key: flat(value, self.batch_size) for key, value in entries}
        self._shown_task = shown | {next_key(key): value for key, value in shown.items()}

    def _at(self, t: int) -> State:
        root = {**self._shown_task, **{key: self._observations[key] for key in self._root_keys}}
        if self.inputs is not None:
            root[self.out_key] = self.inputs.steps[t]
        if self._flags_read:
            flags = self.clock.at(t)
            root.update({key: flags[key] for key in self._flags_read})
        return root

    def flags(self, t: int) -> State:
        return self.clock.at(t)

    @property
    def keys_at_once(self) -> set[NestedKey]:
        """Flags and counters, transition inputs, and a row's one task."""
        tasks = self._shown_task if self._has_one_task else ()
        return {self.out_key, *self.clock.names, *self.clock.next_names, *tasks}

    @property
    def _has_one_task(self) -> bool:
        return self.clock.is_shared and not self.clock.trials_begun

    def entries(self) -> State:
        made = {**self.clock.entries()}
        if self.inputs is not None:
            made[self.out_key] = self.inputs.data[:-1].transpose(0, 1)
        if self._has_one_task:
            for key, task in self._shown_task.items():
                # A view: written out, the task of an MDP would be most of a batch's memory.
                made[key] = task.unsqueeze(1).expand(self.rows, self.steps, *task.shape[1:])
        return made

    def state_dict(self) -> dict:
        state = {"clock": self.clock.state_dict(), "adopted": torch.tensor(self._is_adopted)}
        state["task"] = self._task.to_dict() if isinstance(self._task, TensorDictBase) else self._task
        state["observations"], state["door"] = dict(self._observations), self.door.state_dict()
        if self.inputs is not None:
            state["input"] = self.inputs.data[-1].clone()
        return state

    def load_state_dict(self, state: dict) -> None:
        self.clock.load_state_dict(state["clock"])
        self._is_adopted, task = bool(state["adopted"]), state["task"]
        if task is not None:
            self._deal(TensorDict(task, self.batch_size, self.device) if isinstance(task, dict) else task)
        adopted = self.door.adopt(TensorDict(state["door"], self.batch_size, self.env.device))
        saved = state["observations"]  # by key: what is kept, and so asked for, may be more or less now
        self._observations = {key: saved.get(key, value) for key, value in adopted.items()}
        if self.inputs is not None:
            self.inputs.data[-1].copy_(state["input"])
