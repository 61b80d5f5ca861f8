"""`LockstepRollout`: whole trials of a `TensorEnv` on plain tensors, for `TrialCollector`.

In such an env all rows begin and end their episodes and trials together, so that ``done``, ``is_init`` and the counters
are known before the first step. What is left to do in each step is the policy, the env's transition and the
transition input. Random numbers for the actions are drawn for all steps at once: an action is a function of the
distribution's parameters and of noise (Gumbel-max for categorical, location-scale for normal distributions). No step reads
a number back to the host, so that on a CUDA device a whole batch is one `GraphReplay`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDict
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import Compose, EnvBase, InitTracker, TensorDictPrimer, TransformedEnv
from torchrl.envs.utils import ExplorationType, exploration_type

from rl2_torchrl.envs.tensor_env import TensorEnv
from rl2_torchrl.modules.actor_critic import hidden_keys
from rl2_torchrl.modules.gru import FastGRUModule, StepGRU
from rl2_torchrl.modules.plain import NotPlainError, State, family_of, flat_modules, module_function
from rl2_torchrl.replay import GraphReplay
from rl2_torchrl.tasks import TaskSampler
from rl2_torchrl.transition import PreviousStep
from rl2_torchrl.trial import Trial

__all__ = ["LockstepRollout"]

_ROWS_AT_ONCE = 2048


class LockstepRollout:
    """Collects batches of ``steps`` steps of whole trials; the module's page says how.

    Args:
        env: `TransformedEnv` over a `TensorEnv`, with `Trial`, `TaskSampler` and `PreviousStep`.
        policy: `TensorDictSequential` of `TensorDictModule`, `FastGRUModule` and one probabilistic module.
        steps: steps of a batch, a whole number of trials.
        keep: entries of the batch.

    Raises:
        NotPlainError: env, policy or ``keep`` ask for more than this can do; the message says what.
    """

    def __init__(self, env: EnvBase, policy: TensorDictModuleBase, steps: int, keep: Sequence[NestedKey]):
        self.trial, self.sampler, self.transition = _trial_transforms(env)
        self.env: TensorEnv = env.base_env
        self.policy, self.steps, self.keep = policy, steps, list(keep)
        self.trial_steps = _trial_steps(self.trial, self.env.max_episode_steps)
        if steps % self.trial_steps:
            raise NotPlainError(f"a batch of {steps} steps is no whole number of trials of {self.trial_steps} steps")
        observed = set(self.transition.layout().observations)
        if observed - {"observation"}:
            raise NotPlainError(f"the transition input is made of {observed}, where a TensorEnv tells of 'observation'")
        self.modules = flat_modules(policy)
        self.hidden_keys = hidden_keys(policy)
        self.sample, self.family = family_of(self.modules)
        self.acting, self.judging = self._split()
        self.judges = self._judges()
        self.known = self._known_entries()
        unknown = set(self.keep) - self._entries()
        if unknown:
            raise NotPlainError(f"{unknown} is not among the entries {self._entries()}")
        self.trans = _Transitions(self.transition, self.known, self.steps)
        known = {key: self.known[key] for key in self.keep if key in self.known}
        self.batch = TensorDict(known, [*self.env.batch_size, steps], device=self.env.device)
        self._rows: dict[NestedKey, tuple[torch.Tensor, ...]] = {}
        self.batch.set(self.transition.out_key, self.trans.data.transpose(0, 1))
        self._tasks: list[torch.Tensor | TensorDict] = []
        shape = (steps, *self.env.batch_size, self.transition.action_size)
        self._noise = torch.empty(shape, device=self.env.device)
        self._replays: dict[bool, GraphReplay] = {}
        self._kept: TensorDict | None = None

    def _entries(self) -> set[NestedKey]:
        observed = self.transition.layout().observations
        made = {self.transition.out_key, self.sampler.task_key, ("next", "reward"), *self.known, *observed}
        return made.union(k for k in (*self.policy.out_keys, *self.hidden_keys) if not _is_next(k))

    def _known_entries(self) -> State:
        """Entries ``[B, steps, 1]`` that are the same in every batch."""
        step = torch.arange(self.steps) % self.trial_steps
        episode_steps = self.env.max_episode_steps
        trial_done = step + 1 == self.trial_steps
        never = torch.zeros_like(trial_done)
        entries = {"is_init": step == 0, "done": never, "terminated": never}
        entries |= self.trial.counters(step // episode_steps, step)
        entries["episode_done"] = (step > 0) & (step % episode_steps == 0)
        step = step + 1
        following = {"is_init": never, "done": trial_done, "episode_done": step % episode_steps == 0}
        following["terminated"] = never if self.trial.truncate else trial_done
        following |= self.trial.counters(step // episode_steps, step)
        entries |= {("next", key): value for key, value in following.items()}
        shape = (*self.env.batch_size, self.steps, 1)
        return {k: v.unsqueeze(-1).expand(shape).contiguous().to(self.env.device) for k, v in entries.items()}

    def _split(self) -> tuple[list[TensorDictModuleBase], list[TensorDictModuleBase]]:
        """Modules that each step needs, and a critic without memory of its own, which can look at many steps at once."""
        end = self.modules.index(self.sample) + 1
        acting, judging = self.modules[:end], self.modules[end:]
        has_memory = any(isinstance(module, FastGRUModule) for module in judging)
        return (self.modules, []) if has_memory else (acting, judging)

    def _judges(self) -> list[_Judge]:
        """What looks at many steps at once: the critic's modules, and the log-probability, where they are kept."""
        judges = [_Judge(module.in_keys, module.out_keys, module_function(module)) for module in self.judging]
        log_prob_key, keys = self.sample.log_prob_key, [self.env.action_key, *self.sample.in_keys]

        def log_prob(state: State) -> None:
            state[log_prob_key], _ = self.family.log_prob_and_entropy(*[state[key] for key in keys])

        return [*judges, _Judge(keys, [log_prob_key], log_prob)] if log_prob_key in self.keep else judges

    # ----------------------------------------------------------------- rollout
    @torch.no_grad()
    def __call__(self) -> TensorDict:
        """The next batch ``[B, steps]``: the same TensorDict each time, with what others have added to it left in place."""
        self._draw_tasks()
        deterministic = exploration_type() is ExplorationType.DETERMINISTIC
        if not deterministic:
            self._draw_noise()
        if deterministic not in self._replays:
            play = partial(self._play, [None] * self.steps if deterministic else self._noise)
            self._replays[deterministic] = GraphReplay(play, self.env.device, [self.env.generator])
        with _one_thread() if self.env.has_threads else nullcontext():
            self._replays[deterministic]()
        kept = self.batch.select(*self.keep)
        # What others have added stays, to be written over by them; what they have put in place of ours does not.
        self._kept = kept if self._kept is None else self._kept.update(kept)
        return self._kept

    def _play(self, noise: Sequence[torch.Tensor | None]) -> None:
        """All steps, from ``_tasks`` and ``noise`` ``[steps, B, ...]`` into ``batch``."""
        runs = [self._run(module) for module in self.acting]
        inputs = [key for key in self.policy.in_keys if key in self.known and key != "is_init"]
        judged = {key for judge in self.judges for key in judge.out_keys}
        late = {*self.known, *judged, ("next", "reward"), self.transition.out_key}
        if self._one_trial_a_row:
            late.add(self.sampler.task_key)
        recorded = [key for key in self.keep if key not in late]
        kept_of_judged = judged.intersection(self.keep)
        memory = [(key, _next_key(key)) for key in self.hidden_keys]
        self.trans.clear()
        unjudged: list[State] = []
        for t in range(self.steps):
            if t % self.trial_steps == 0:
                task = self._tasks[t // self.trial_steps]
                state = {self.sampler.task_key: task}
            if t % self.trial_steps % self.env.max_episode_steps == 0:
                observation = self.env.start(task).get("observation")
            state[self.transition.out_key] = self.trans.observe(t, observation)
            if observation is not None:
                state["observation"] = observation
            for key in inputs:
                state[key] = self.known[key][:, t]
            for run in runs:
                run(state, noise[t])
            for key in recorded:
                self._record(key, t, state[key])
            unjudged.append(state)
            if len(unjudged) * self.env.batch_size[0] >= _ROWS_AT_ONCE or t + 1 == self.steps:
                self._judge(unjudged, kept_of_judged, t + 1)
                unjudged = []
            action = state[self.env.action_key]
            entries, reward, _, _ = self.env.play(action)
            observation = entries.get("observation")
            self._record(("next", "reward"), t, reward)
            if (t + 1) % self.trial_steps:
                self.trans.tell(t + 1, action, reward)
                state = {self.sampler.task_key: task, **{key: state[next_key] for key, next_key in memory}}

    def _judge(self, states: list[State], kept: set[NestedKey], end: int) -> None:
        """Looks at the steps up to ``end`` that ``states`` are of, all at once, and records the entries ``kept``."""
        made: State = {}
        for judge in self.judges:
            for key in judge.in_keys:
                if key not in made:
                    made[key] = torch.stack([state[key] for state in states])
            judge.run(made)
        for key in kept:
            for t, value in enumerate(made[key].unbind(), end - len(states)):
                self._record(key, t, value)

    # ------------------------------------------------------------------ policy
    def _run(self, module: TensorDictModuleBase) -> Callable[[State, torch.Tensor | None], None]:
        """``module`` as a function that writes into a dictionary of tensors."""
        in_keys, out_keys = module.in_keys, module.out_keys
        if isinstance(module, FastGRUModule):
            step = StepGRU(module.gru)

            def run(state: State, noise: torch.Tensor | None) -> None:
                hidden = state.get(in_keys[1])
                state[out_keys[0]], state[out_keys[1]] = step(state[in_keys[0]], hidden)
                if hidden is None:  # a trial's first step
                    state[in_keys[1]] = torch.zeros_like(state[out_keys[1]])

        elif module is self.sample:
            act, action_key = self.family.act, self.env.action_key

            def run(state: State, noise: torch.Tensor | None) -> None:
                state[action_key] = act(noise, *[state[key] for key in in_keys])

        else:
            on_tensors = module_function(module)

            def run(state: State, noise: torch.Tensor | None) -> None:
                on_tensors(state)

        return run

    def _draw_noise(self) -> None:
        """Noise for the actions of all steps, ``[steps, B, ...]``."""
        if self.family.gumbel:
            self._noise.uniform_().log_().neg_().log_().neg_()
        else:
            self._noise.normal_()

    def _draw_tasks(self) -> None:
        """Tasks of a batch's trials, always in the same memory."""
        tasks = [self.sampler.draw() for _ in range(self.steps // self.trial_steps)]
        if not self._tasks:
            self._tasks = [task.clone() for task in tasks]
            if self._one_trial_a_row and self.sampler.task_key in self.keep:
                self.batch.set(self.sampler.task_key, _at_all_steps(self._tasks[0], self.batch.shape))
        for task, drawn in zip(self._tasks, tasks, strict=True):
            task.copy_(drawn)

    @property
    def _one_trial_a_row(self) -> bool:
        """Whether a row has one task, which then need not be written step by step."""
        return self.steps == self.trial_steps

    # ----------------------------------------------------------------- storage
    def _record(self, key: NestedKey, t: int, value: torch.Tensor) -> None:
        """Writes into the last batch's memory: steps that live until the batch is whole would scatter the heap."""
        rows = self._rows.get(key)
        if rows is None:
            buffer = value.new_empty(self.steps, *value.shape)
            self.batch.set(key, buffer.transpose(0, 1))
            rows = self._rows[key] = buffer.unbind()
        rows[t].copy_(value)


class _Judge(NamedTuple):
    """A function of many steps at once: ``run`` reads ``in_keys`` from a dictionary and writes ``out_keys`` into it."""

    in_keys: Sequence[NestedKey]
    out_keys: Sequence[NestedKey]
    run: Callable[[State], None]


class _Transitions:
    """The transition inputs ``[steps, B, size]`` of a batch, written in place."""

    def __init__(self, transition: PreviousStep, known: State, steps: int):
        layout, done = transition.layout(), known["episode_done"].transpose(0, 1)
        self.data = torch.zeros(*done.shape[:2], layout.size, device=done.device)
        *observations, action, reward, self.done = layout.split(self.data)
        self.encodings, self.action = list(layout.observations.values()), layout.action
        # Views of all steps at once: an index in each step costs as much as the copy.
        self.steps, self.observations = self.data.unbind(), [part.unbind() for part in observations]
        self.actions, self.rewards = action.unbind(), reward.unbind()
        start = known["is_init"].transpose(0, 1)
        self.known_done = torch.where(start, transition.done_at_start, done.to(self.data.dtype))

    def clear(self) -> None:
        self.data.zero_()
        self.done.copy_(self.known_done)

    def observe(self, t: int, observation: torch.Tensor | None) -> torch.Tensor:
        """The input of step ``t``, now that its observation is there too."""
        for encoding, part in zip(self.encodings, self.observations, strict=True):
            encoding.write(part[t], observation)
        return self.steps[t]

    def tell(self, t: int, action: torch.Tensor, reward: torch.Tensor) -> None:
        """Writes the previous ``action`` and ``reward`` into the input of step ``t``."""
        self.action.write(self.actions[t], action)
        self.rewards[t].copy_(reward)


@contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch on one thread: threads that wait for its next operation spin, and would hold the cores that an env needs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _trial_transforms(env: EnvBase) -> list:
    if not (
        type(env) is TransformedEnv
        and isinstance(env.base_env, TensorEnv)
        and env.base_env.fixed_length
        and len(env.batch_size) == 1
    ):
        raise NotPlainError("the env is no TransformedEnv over a TensorEnv of one batch dimension")
    transforms = list(env.transform) if isinstance(env.transform, Compose) else [env.transform]
    others = [type(t) for t in transforms[3:] if type(t) not in (InitTracker, TensorDictPrimer)]
    if [type(t) for t in transforms[:3]] != [Trial, TaskSampler, PreviousStep] or others:
        raise NotPlainError("the transforms are not Trial, TaskSampler, PreviousStep and those of a Collector")
    return transforms[:3]


def _trial_steps(trial: Trial, episode_steps: int) -> int:
    by_episodes = None if trial.episodes is None else trial.episodes * episode_steps
    return min(bound for bound in (by_episodes, trial.steps) if bound is not None)


def _at_all_steps(task: torch.Tensor | TensorDict, shape: torch.Size) -> torch.Tensor | TensorDict:
    """A view of ``task`` ``[B, ...]`` as ``[B, T, ...]``: written out, the task of an MDP is most of a batch's memory."""
    return task.unsqueeze(1).expand(*shape, *task.shape[1:])


def _is_next(key: NestedKey) -> bool:
    return isinstance(key, tuple) and key[0] == "next"


def _next_key(key: NestedKey) -> NestedKey:
    return ("next", key) if isinstance(key, str) else ("next", *key)
