"""What a rollout plays: trials on plain tensors (`TensorTrials`), or those of an env with further transforms (`TransformedTrials`).

Both say what `Trial`, `TaskSampler` and `PreviousStep` say of the same env: the transforms are the reference. Both have N flat
rows, entries ``[N, ...]``, and these methods: ``start_batch()``; ``start()``, the entries of a batch's first step and the rows in
which it begins a trial; ``step(t, state)``, a `Turn`; ``entries()``, what holds for a whole batch ``[N, T, ...]``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.envs import EnvBase, InitTracker, TensorDictPrimer

from rl2_torchrl.modules.acting import State
from rl2_torchrl.rollout.clock import Rows, TrialClock
from rl2_torchrl.rollout.doors import door_to, is_tensor_env
from rl2_torchrl.rollout.memory import leaves, next_key, own_transforms, where_rows
from rl2_torchrl.rollout.transitions import TransitionInputs
from rl2_torchrl.tasks import TaskSampler
from rl2_torchrl.transition import PreviousStep
from rl2_torchrl.trial import Trial

__all__ = ["TensorTrials", "TransformedTrials", "Turn", "trial_steps", "trials_of"]

Task = torch.Tensor | TensorDictBase | None
REWARD = ("next", "reward")


class Turn(NamedTuple):
    """What a step led to: entries under ``"next"``, entries of the step after it, and the rows in which that begins a trial."""

    after: State
    root: State
    begun: Rows


def trials_of(env: EnvBase, steps: int, read: Collection[NestedKey], keep: Collection[NestedKey] | None):
    """The trials of ``env`` in batches of ``steps`` steps.

    Args:
        env: the env, transforms and all.
        steps: T.
        read: entries that the policy reads.
        keep: entries of the batch; None for all.
    """
    below, ours, others = _taken_apart(env)
    if others:
        reason = f"{', '.join(others)} beside our transforms: a TensorDict goes through all of them at each step"
        return TransformedTrials(env, reason, steps, read, keep)
    if ours[0] is None:
        return TransformedTrials(env, "the env has no Trial", steps, read, keep)
    return TensorTrials(below, *ours, steps, read, keep)


def trial_steps(env: EnvBase) -> int | None:
    """Steps of every trial of ``env``, where all are of one length, which is known ahead; else None."""
    below, (trial, *_), others = _taken_apart(env)
    base = getattr(below, "base_env", None)
    if trial is None or others or not is_tensor_env(base) or not base.fixed_length:
        return None
    by_episodes = None if trial.episodes is None else trial.episodes * base.max_episode_steps
    return min(bound for bound in (by_episodes, trial.steps) if bound is not None)


def _taken_apart(env: EnvBase) -> tuple[EnvBase, list, list[str]]:
    """The env with our transforms; these (Trial, TaskSampler, PreviousStep, or None); the names of others, or of one displaced."""
    while own_transforms(env) and all(isinstance(t, _OF_COLLECTORS) for t in own_transforms(env)):
        env = env.base_env
    parts = [t for t in own_transforms(env) if not isinstance(t, _OF_COLLECTORS)]
    ours = [next((t for t in parts if _is_as_written(t, kind)), None) for kind in (Trial, TaskSampler, PreviousStep)]
    in_order = [t for t in ours if t is not None]
    strangers = [t for t in parts if all(t is not other for other in in_order)]
    others = strangers or [t for t, other in zip(parts, in_order, strict=True) if t is not other]
    return env, ours, [type(t).__name__ for t in others]


#: What a collector adds by itself; rollouts know of trial starts and memory without them.
_OF_COLLECTORS = (InitTracker, TensorDictPrimer)


#: The methods of which a rollout does the work itself.
_REPLACED = (
    "_step",
    "_reset",
    "_call",
    "_reset_env_preprocess",
    "_is_over",
    "_set_done",
    "_reset_rows",
    "combine",
    "begin",
)


def _is_as_written(transform, kind: type) -> bool:
    """Whether what ``transform`` does in an env is what ``kind`` says: a class below it may step or reset otherwise."""
    below = type(transform)
    return isinstance(transform, kind) and all(getattr(below, m, None) is getattr(kind, m, None) for m in _REPLACED)


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
        self.keys = _keys_of(env)
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
        return {**first, **{key: observations[key] for key in self.trial.step_keys if key in observations}}

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
            told = [key for key in self.trial.step_keys if key in first]
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


class TransformedTrials:
    """Trials of an env with further transforms, or with others in place of ours: a TensorDict at each of its steps.

    Args:
        env: the env, transforms and all.
        reason: why it is not played on tensors.
        steps: T.
        read: entries that the policy reads.
        keep: entries of the batch; None for all.
    """

    is_repeatable = has_threads = False
    keys_at_once: frozenset = frozenset()

    def __init__(
        self, env: EnvBase, reason: str, steps: int, read: Collection[NestedKey], keep: Collection[NestedKey] | None
    ):
        self.reason, self.steps = reason, steps
        self.env, self.batch_size, self.rows = env, env.batch_size, env.batch_size.numel()
        self.device, self.action_key = env.device or torch.device("cpu"), env.action_key
        self.keys = _keys_of(env)
        wanted = {*read, *(self.keys if keep is None else leaves(keep, self.keys))}
        self._root_keys = [key for key in self.keys if not _is_next(key) and key in wanted]
        self._after_keys = [key for key in self.keys if _is_next(key) and key in {*wanted, REWARD, ("next", "done")}]
        self._never = torch.zeros(self.rows, 1, dtype=torch.bool, device=self.device)
        self._tensordict: TensorDictBase | None = None
        self._stepped: TensorDictBase | None = None

    def adopt(self, reset: TensorDictBase) -> None:
        """Takes a ``reset()`` of the env that somebody has just made as the first step of the first trials."""
        self._tensordict, self._stepped = reset.copy(), None

    def start_batch(self) -> None:
        """Nothing is known ahead."""

    def start(self) -> tuple[State, Rows]:
        """The entries of a batch's first step, and the rows in which it begins a trial."""
        if self._stepped is not None:
            return self._go_on()
        self._tensordict = self.env.reset() if self._tensordict is None else self._tensordict
        return self._root(True), True

    def step(self, t: int, state: State) -> Turn:
        """Step ``t`` of all rows, with what the policy has written into ``state``."""
        root = self._tensordict
        for key, value in state.items():
            if key not in self._root_keys:
                root.set(
                    key,
                    value if isinstance(value, TensorDictBase) else value.reshape((*self.batch_size, *value.shape[1:])),
                )
        self._stepped = self.env.step(root)
        after = {("next", "is_init"): self._never, **self._entries(self._stepped, self._after_keys)}
        # A trial that a batch's last step ends is followed by one when the next batch asks for it.
        return Turn(after, {}, False) if t + 1 == self.steps else Turn(after, *self._go_on())

    def _go_on(self) -> tuple[State, Rows]:
        done = self._stepped["next", "done"].reshape(-1)
        begun: Rows = True if done.all() else done.clone() if done.any() else False
        self._tensordict = self.env.maybe_reset(self.env.step_mdp(self._stepped))
        return self._root(begun), begun

    def _root(self, begun: Rows) -> State:
        root = self._entries(self._tensordict, self._root_keys)
        if "is_init" not in self.keys:  # no InitTracker, as a collector adds
            root["is_init"] = self._never | (begun if isinstance(begun, bool) else begun.unsqueeze(-1))
        return root

    def _entries(self, tensordict: TensorDictBase, keys: Collection[NestedKey]) -> State:
        dims, state = len(self.batch_size), {}
        for key in keys:
            value = tensordict.get(key).clone()  # many envs write their next step into the same memory
            state[key] = value if dims == 1 else value.reshape(self.rows, *value.shape[dims:])
        return state

    def flags(self, t: int) -> State:
        """None: they are among the entries."""
        return {}

    def entries(self) -> State:
        """None: all is recorded step by step."""
        return {}

    def state_dict(self) -> dict:
        """Where the trials stand between two batches; the env's own state is the env's."""
        return {"stepped": None if self._stepped is None else self._stepped.to_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from what `state_dict` returned, with an env whose own state has been restored too."""
        if state["stepped"] is not None:
            self._stepped = TensorDict(state["stepped"], self.batch_size, self.env.device)


def _keys_of(env: EnvBase) -> list[NestedKey]:
    """Entries of a batch that ``env`` makes."""
    root = [*env.full_observation_spec.keys(True, True), *env.full_done_spec.keys(True, True)]
    return [*root, *map(next_key, (*root, *env.full_reward_spec.keys(True, True)))]


def _is_next(key: NestedKey) -> bool:
    return isinstance(key, tuple) and key[0] == "next"
