"""`TensorTrials`: trials as our three transforms make them, on plain tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.envs import EnvBase

from rl2_torchrl.modules.acting import State
from rl2_torchrl.rollout.clock import Rows, TrialClock
from rl2_torchrl.rollout.doors import door_to
from rl2_torchrl.rollout.entries import REWARD, Task, Turn, keys_of, leaves, next_key, where_rows
from rl2_torchrl.rollout.transitions import TransitionInputs
from rl2_torchrl.tasks import TaskSampler
from rl2_torchrl.transition import PreviousStep
from rl2_torchrl.trial import Trial

__all__ = ["TensorTrials"]


class TensorTrials:
    """Trials as `Trial`, `TaskSampler` and `PreviousStep` make them, on plain tensors.

    Args:
        env: the env with these transforms.
        trial: bounds of a trial.
        sampler: draws tasks; None in an env without.
        transition: writes the transition input; None for a policy that reads observations alone.
        steps: T.
        read: entries that the policy reads.
        keep: entries of the batch; None for all.
    """

    def __init__(
        self,
        env: EnvBase,
        trial: Trial,
        sampler: TaskSampler | None,
        transition: PreviousStep | None,
        steps: int,
        read: Collection[NestedKey],
        keep: Collection[NestedKey] | None,
    ):
        base, self.trial, self.sampler, self.steps = env.base_env, trial, sampler, steps
        self.env, self.batch_size, self.rows = base, base.batch_size, base.batch_size.numel()
        self.device = base.device or torch.device("cpu")
        self.action_key = env.action_key
        self.task_key = "task" if sampler is None else sampler.task_key
        self.out_key = None if transition is None else transition.out_key
        #: Entries that a batch can have.
        self.keys = keys_of(env)
        wanted = {*read, *(self.keys if keep is None else leaves(keep, self.keys))}
        observed = list(base.full_observation_spec.keys(True, True))
        self._root_keys = [key for key in observed if key in wanted]
        self._after_keys = [key for key in observed if next_key(key) in wanted]
        encoded = [] if transition is None else transition.layout().observations
        self.door = door_to(base, {*encoded, *self._root_keys, *self._after_keys}, self.task_key)
        self.clock = TrialClock(trial, self.rows, steps, self.door.episode_steps, self.device)
        self._flags_read = [key for key in read if key in self.clock.names]
        self.inputs = None if transition is None else TransitionInputs(transition, steps, self.rows, self.device)
        keeps_next_input = self.inputs is not None and next_key(self.out_key) in wanted
        self._next_inputs = torch.zeros_like(self.inputs.data[1:]) if keeps_next_input else None
        self._rewards: torch.Tensor | None = None  # [T, N, 1], made with the first reward
        self._task: Task = None
        self._task_keys = [] if sampler is None else leaves([self.task_key], base.full_state_spec.keys(True, True))
        self._shown_task: State = {}  # its entries [N, ...]
        self._shown_task_after: State = {}  # the same under "next"
        self._tasks: list[Task] = []  # of the trials that begin in a batch, where that is known ahead
        self._pending: Rows = True  # rows that begin a trial with the next batch
        self._observations: State = {}
        self._is_adopted = False

    @property
    def has_threads(self) -> bool:
        """Whether the env works on threads of its own."""
        return self.door.has_threads

    @property
    def is_repeatable(self) -> bool:
        """Whether the next batch begins with new trials and does the same operations whatever the numbers are."""
        return self.clock.is_shared and self._pending is True

    # ------------------------------------------------------------------- steps
    def start_batch(self) -> None:
        """Goes on where the last batch ended. Tasks are drawn here where it is known how many."""
        self.clock.start_batch()
        if self.sampler is None or not self.clock.is_shared:
            return
        tasks = [self.sampler.draw() for _ in range(self.clock.trials_begun + (self._pending is True))]
        if self.device.type == "cuda" and self.is_repeatable and len(self._tasks) == len(tasks):
            for task, drawn in zip(self._tasks, tasks, strict=True):
                task.copy_(drawn)  # a CUDA graph reads them where they were when it was recorded
        else:
            self._tasks = tasks

    def adopt(self, reset: TensorDictBase) -> None:
        """Takes a ``reset()`` of the env that somebody has just made as the first step of the first trials."""
        task = reset.get(self.task_key, None)
        if task is not None:
            self._deal(task)
        self.clock.restart()
        self._observations, self._pending, self._is_adopted = self.door.adopt(reset), False, True

    def start(self) -> tuple[State, Rows]:
        """The entries of a batch's first step, and the rows in which it begins a trial."""
        self._undealt: Iterator[Task] = iter(self._tasks)
        begun, self._pending = self._pending, False
        if self.inputs is not None:
            self.inputs.start_batch()
        if self._is_adopted:
            self._is_adopted, begun = False, True
            self._show(0, begun)
        elif begun is not False:
            self._begin(0, begun)
        return self._root(0), begun

    def step(self, t: int, state: State) -> Turn:
        """Step ``t`` of all rows, with the action in ``state``."""
        action, is_last = state[self.action_key], t + 1 == self.steps
        observations, reward, done = self.door.play(action, self._task)
        if self._rewards is None:
            self._rewards = reward.new_empty(self.steps, *reward.shape)
            self._reward_at = self._rewards.unbind()
        self._reward_at[t].copy_(reward)
        ends = self.clock.tick(t, done)
        if ends.inner is not False:
            observations = self._next_episode(ends.inner, observations)
        self._observations = observations
        if self.inputs is not None and (is_last or ends.trial is not True or self._next_inputs is not None):
            self._write_input(t + 1, action, reward, ends.episode)
        after = {REWARD: reward, **{next_key(key): observations[key] for key in self._after_keys}}
        after.update(self._shown_task_after)
        if is_last:
            self._pending = ends.trial
            return Turn(after, {}, False)
        if ends.trial is not False:
            self._begin(t + 1, ends.trial)
        return Turn(after, self._root(t + 1), ends.trial)

    def _next_episode(self, rows: Rows, observations: State) -> State:
        first = self.door.start(self._task, rows)
        # What tells of the step that was taken stays; see Trial(step_keys=...).
        return {**first, **{key: told for key, told in observations.items() if self.trial.tells_of_step(key)}}

    def _write_input(self, t: int, action: torch.Tensor, reward: torch.Tensor, done: Rows) -> None:
        self.inputs.tell(t, action, reward, done)
        self.inputs.observe(t, self._observations)
        if self._next_inputs is not None:
            self._next_inputs[t - 1].copy_(self.inputs.steps[t])

    def _begin(self, t: int, rows: Rows) -> None:
        """A trial of a new task begins in ``rows`` at step ``t``."""
        if self.sampler is not None:
            self._deal(next(self._undealt) if self.clock.is_shared else self._drawn(rows))
        first = self.door.start(self._task, rows)
        if rows is not True:  # other rows may have begun an episode just now, and go on telling of the step before it
            told = [key for key in first if self.trial.tells_of_step(key)]
            first = {**first, **{key: where_rows(rows, first[key], self._observations[key]) for key in told}}
        self._observations = first
        self._show(t, rows)

    def _show(self, t: int, rows: Rows) -> None:
        """Writes the transition input of a trial's first step."""
        if self.inputs is not None:
            self.inputs.begin(t, rows)
            self.inputs.observe(t, self._observations)

    def _drawn(self, rows: Rows) -> Task:
        if rows is True:
            return self.sampler.draw()
        rows = rows.reshape(self.batch_size)
        drawn = self.sampler.draw(rows)
        if isinstance(drawn, torch.Tensor):
            rows = rows.reshape(*rows.shape, *[1] * (drawn.ndim - rows.ndim))
        return torch.where(rows, drawn, self._task)

    # ----------------------------------------------------------------- entries
    def _root(self, t: int) -> State:
        root = {**self._shown_task, **{key: self._observations[key] for key in self._root_keys}}
        if self.inputs is not None:
            root[self.out_key] = self.inputs.steps[t]
        if self._flags_read:
            flags = self.clock.at(t)
            root |= {key: flags[key] for key in self._flags_read}
        return root

    def _deal(self, task: Task) -> None:
        """The rows are given ``task``, all of its entries."""
        self._task, dims = task, len(self.batch_size)
        whole = (
            {self.task_key: task}
            if isinstance(task, torch.Tensor)
            else TensorDict({self.task_key: task}, self.batch_size)
        )
        self._shown_task = {key: whole[key].reshape(self.rows, *whole[key].shape[dims:]) for key in self._task_keys}
        self._shown_task_after = {next_key(key): value for key, value in self._shown_task.items()}

    def flags(self, t: int) -> State:
        """Flags and counters ``[N, 1]`` of step ``t``, those under ``"next"`` among them."""
        return self.clock.around(t)

    @property
    def keys_at_once(self) -> set[NestedKey]:
        """Keys of `entries`: nobody need record them step by step."""
        keys = {REWARD, *self.clock.names, *map(next_key, self.clock.names)}
        if self.inputs is not None:
            keys |= {self.out_key, next_key(self.out_key)}
        if self.clock.is_shared and not self.clock.trials_begun:
            keys |= {*self._task_keys, *map(next_key, self._task_keys)}
        return keys

    def entries(self) -> State:
        """What a whole batch has, ``[N, T, ...]``: flags and counters, rewards, transition inputs, and a row's one task."""
        made = {**self.clock.entries(), REWARD: self._rewards.transpose(0, 1)}
        if self.inputs is not None:
            made[self.out_key] = self.inputs.data[:-1].transpose(0, 1)
        if self._next_inputs is not None:
            made[next_key(self.out_key)] = self._next_inputs.transpose(0, 1)
        if not self.keys_at_once.isdisjoint(self._task_keys):
            for key, task in self._shown_task.items():
                # A view: written out, the task of an MDP would be most of a batch's memory.
                whole = task.unsqueeze(1).expand(self.rows, self.steps, *task.shape[1:])
                made[key] = made[next_key(key)] = whole
        return made

    # ------------------------------------------------------------- checkpoints
    def state_dict(self) -> dict:
        """Where the trials stand between two batches; the env's own state is the env's."""
        everywhere = torch.full((self.rows,), bool(self._pending)) if isinstance(self._pending, bool) else self._pending
        state = {"clock": self.clock.state_dict(), "pending": everywhere.clone()}
        state["task"] = self._task.to_dict() if isinstance(self._task, TensorDictBase) else self._task
        state["observations"], state["door"] = list(self._observations.values()), self.door.state_dict()
        if self.inputs is not None:
            state["input"] = self.inputs.data[-1].clone()
        return state

    def load_state_dict(self, state: dict) -> None:
        """Goes on from what `state_dict` returned, with an env whose own state has been restored too."""
        self.clock.load_state_dict(state["clock"])
        pending = state["pending"]
        self._pending = bool(pending[0]) if (pending == pending[0]).all() else pending.to(self.device)
        task = state["task"]
        if task is not None:
            self._deal(TensorDict(task, self.batch_size, self.device) if isinstance(task, dict) else task)
        self._observations = dict(zip(self.door.resume(state["door"]), state["observations"], strict=True))
        self._is_adopted = False
        if self.inputs is not None:
            self.inputs.data[-1].copy_(state["input"])
