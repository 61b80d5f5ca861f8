"""`TensorEnv`: an env on plain batched tensors, written once; TorchRL's methods and the fast rollout are derived from it.

An author says how episodes begin and what a step does, for ``B`` rows side by side. Everything else follows: reset of some
rows, bounds on an episode's steps, seeds, TorchRL's ``_reset`` and ``_step``, an exact resume. Episodes may be ragged: end
when they like, each row at its own step. `TensorEnv`'s own page has a whole env as an example.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl import torchrl_logger
from torchrl.data import Binary, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase

from rl2_torchrl.arguments import as_batch_size, require_flags, whole
from rl2_torchrl.envs.rows import Entries, EnvState, Rows, entries_of, merge, rebuilt, tensors_of
from rl2_torchrl.seeding import seed_generator
from rl2_torchrl.storage import from_tensor, to_tensor

__all__ = ["TensorEnv"]

_STEPS_OF_A_LOOK = 3  # that TorchRL takes without a task to look at an env


class TensorEnv(EnvBase):
    """A batched env whose author writes `begin` and `advance` on plain tensors; the example is a whole one.

    All specs are those of **one row**; the batch's dimensions are put before them. What `advance` is given it must leave as
    it is: observations and states of earlier steps are not copied, and are still read.

    A reset takes the entry ``"task"``. After one without it, as TorchRL makes to look at an env, the task of zeros is played;
    for more than a few steps, and a warning is logged, once.

    Args:
        task_spec: spec of a task; None for an env without, to which `begin` is given None.
        observation_spec: spec of ``"observation"``, a `Composite` of several entries, or None for an env that shows nothing.
        action_spec: spec of an action.
        reward_spec: spec of a reward, ``[1]``. Default: float32, unbounded.
        more_spec: spec of entries that `observe_more` makes, or None.
        batch_size: batch size ``B`` of the env.
        max_episode_steps: steps after which an episode ends at the latest; None for no bound.
        fixed_length: no episode ends before ``max_episode_steps``. Rows then stay together, of which the rollout knows ahead;
            `advance` must return None for ``terminated`` and ``truncated``.
        seed: seed of the env's own generator; None draws one from PyTorch's default generator.
        device: device of all tensors. Defaults to the CPU.

    Attributes:
        generator: what all of the env's own draws are made from.
        max_episode_steps: as given.
        fixed_length: as given.
        has_threads: whether a step works on threads of its own, from which PyTorch's waiting threads would keep the cores.
        time_limit_terminates: whether ``max_episode_steps`` is part of the task, so that an episode that it ends is
            ``terminated``, not ``truncated``. Default False.

    Raises:
        ValueError: an empty ``batch_size``, ``max_episode_steps`` below 1, or none with ``fixed_length``; a reward of another
            name than ``"reward"``.
        TypeError: one of the specs is none, or there is no ``action_spec``.
        RuntimeError: a step before the first reset; an episode that ends early in spite of ``fixed_length``.

    Examples:
        A hidden number is to be guessed; an episode ends at the right guess, and after 10 guesses at the latest.

        >>> from torchrl.data import Categorical, Unbounded
        >>> class Guess(TensorEnv):
        ...     def __init__(self, numbers: int = 5, **kwargs):
        ...         super().__init__(  # specs of one row
        ...             task_spec=Unbounded(1),
        ...             observation_spec=Categorical(3),  # too low, right, too high
        ...             action_spec=Categorical(numbers),
        ...             max_episode_steps=10,
        ...             **kwargs,
        ...         )
        ...
        ...     def begin(self, task, rows):  # task [*B, 1]
        ...         state = task.squeeze(-1).long()
        ...         return state, torch.ones_like(state)
        ...
        ...     def advance(self, state, action):  # [*B], [*B]
        ...         observation = 1 + torch.sign(action - state)
        ...         right = (action == state).unsqueeze(-1)
        ...         return state, observation, -1.0 + right, right, None
        >>> env = Guess(batch_size=(2,), seed=0)
        >>> observation = env.start(torch.tensor([[3.0], [1.0]]), None)
        >>> observation, reward, terminated, truncated = env.play(torch.tensor([1, 1]))
        >>> observation["observation"].tolist(), reward.squeeze(-1).tolist(), terminated.squeeze(-1).tolist()
        ([0, 1], [-1.0, 0.0], [False, True])

        It is a TorchRL env, and `rl2_torchrl.testing.check_tensor_env` tells whether it is a sound one.

        >>> from torchrl.envs import Compose, TransformedEnv
        >>> from rl2_torchrl import PreviousStep, TaskSampler, Trial
        >>> def numbers(batch_size, generator):
        ...     return torch.randint(5, (*batch_size, 1), generator=generator).float()
        >>> env = TransformedEnv(env, Compose(Trial(episodes=3), TaskSampler(numbers, seed=0), PreviousStep()))
        >>> env.rollout(30)["next", "episode_done"].shape[0]
        2
    """

    batch_locked = True
    has_threads: bool = False
    time_limit_terminates: bool = False

    def __init__(
        self,
        *,
        task_spec: TensorSpec | None,
        action_spec: TensorSpec,
        observation_spec: TensorSpec | None = None,
        reward_spec: TensorSpec | None = None,
        more_spec: Composite | None = None,
        batch_size: Sequence[int] = (),
        max_episode_steps: int | None = None,
        fixed_length: bool = False,
        seed: int | None = None,
        device: torch.device | str | None = None,
    ):
        if action_spec is None:
            raise TypeError("action_spec=None: what can an agent do? Give a spec of one row, such as Categorical(2).")
        if more_spec is not None and not isinstance(more_spec, Composite):
            raise TypeError(
                f"more_spec={more_spec!r} names no entry: give a Composite, such as Composite(speed=Unbounded(1))."
            )
        if isinstance(reward_spec, Composite) and (names := list(reward_spec.keys(True, True))) != ["reward"]:
            raise ValueError(
                f"reward_spec names {names}, and the reward that `advance` returns, from which all learn, is one, 'reward': "
                "give its spec, such as Unbounded(1)."
            )
        require_flags(fixed_length=fixed_length)
        batch_size = as_batch_size(batch_size)
        if 0 in batch_size:
            raise ValueError(f"batch_size={tuple(batch_size)} holds no env: every dimension must be at least 1.")
        if max_episode_steps is not None:
            max_episode_steps = whole("max_episode_steps", max_episode_steps)
        elif fixed_length:
            raise ValueError("fixed_length=True without max_episode_steps: of how many steps?")
        super().__init__(device=device or "cpu", batch_size=batch_size)
        self.max_episode_steps = max_episode_steps
        self.fixed_length = fixed_length
        self.generator = torch.Generator(self.device)
        self._set_seed(seed)
        self._now = Rows()
        self._every_row = torch.ones(batch_size, dtype=torch.bool, device=self.device)
        self._has_task, self._steps_without_task, self._has_told = False, 0, False
        if not isinstance(observation_spec, Composite):
            observation_spec = Composite({} if observation_spec is None else {"observation": observation_spec})
        observation_spec = observation_spec.clone()
        #: Entries that `observe_more` makes.
        self.more_keys: list[NestedKey] = [] if more_spec is None else list(more_spec.keys(True, True))
        for key in self.more_keys:
            observation_spec[key] = more_spec[key]
        # Where the limit terminates and nothing else ends an episode, none is ever truncated.
        never_truncated = self.fixed_length and self.time_limit_terminates
        names = ("done", "terminated") if never_truncated else ("done", "terminated", "truncated")
        self.state_spec = self._batched(Composite({} if task_spec is None else {"task": task_spec}))
        self.observation_spec = self._batched(observation_spec)
        self.action_spec, self.reward_spec = self._batched(action_spec), self._batched(reward_spec or Unbounded(1))
        self.full_done_spec = self._batched(Composite({name: Binary(1, (1,), dtype=torch.bool) for name in names}))

    def to(self, device: torch.device | str) -> TensorEnv:
        """The env itself, which is on ``device`` already.

        Raises:
            ValueError: it is not: what an author's env holds is where it was made.
        """
        asked = torch.device(device)
        if asked.type != self.device.type or asked.index not in (None, self.device.index):
            raise ValueError(
                f"{type(self).__name__} is on {self.device} and does not move to {asked}, as a collector's device= asks: its state "
                f"and its random numbers would stay behind. Make it there, {type(self).__name__}(..., device={str(asked)!r})."
            )
        return self

    def _batched(self, spec: TensorSpec) -> TensorSpec:
        return spec.expand(*self.batch_size, *spec.shape).clone().to(self.device)

    # --------------------------------------------------- written by an author
    @abstractmethod
    def begin(self, task: Tensor | TensorDictBase | None, rows: Tensor) -> tuple[EnvState, Tensor | Entries | None]:
        """State and first observation of an episode.

        Values are returned for all rows; of those that do not begin the returned ones are dropped. An env that keeps its
        state elsewhere, as in a simulator, changes there the rows that begin and no others.

        Args:
            task: the task ``[*B, ...]``. What `advance` shall know of it goes into the state.
            rows: which rows begin, bool ``[*B]``.

        Returns:
            The state, and the observation ``[*B, ...]``: a tensor, a dictionary of entries, or None.
        """

    @abstractmethod
    def advance(
        self, state: EnvState, action: Tensor
    ) -> tuple[EnvState, Tensor | Entries | None, Tensor, Tensor | None, Tensor | None]:
        """One step of all rows.

        A row whose episode has ended is begun anew before its next step; the bound ``max_episode_steps`` is not the author's
        business.

        Args:
            state: the state, as `begin` or the last step has left it.
            action: the actions ``[*B, ...]``; choices and flags in the dtype of ``action_spec``, whatever a policy makes of them.

        Returns:
            State, observation, reward ``[*B, 1]``, and whether the episode has ended: ``terminated`` (in a terminal state,
            whose value is 0) and ``truncated`` (cut off) ``[*B, 1]`` bool, or None for never.
        """

    def observe_more(self, state: EnvState) -> Entries:
        """Entries ``more_spec`` after a step or a begin: what is observed only where somebody asks for it."""
        return {}

    # ------------------------------------------- derived, on plain tensors
    def start(self, task: Tensor | TensorDictBase | None, rows: Tensor | None = None) -> Entries:
        """Begins an episode in ``rows``, and leaves the others where they are.

        Args:
            task: the task ``[*B, ...]``; it is kept, not copied.
            rows: which rows begin, bool ``[*B]`` or ``[*B, 1]``; None for all.

        Returns:
            The observation entries of all rows, ``[*B, ...]``.
        """
        now = self._now
        now.moves += 1
        if rows is None or not now.started:
            now.state, observation = self.begin(task, self._every_row)
            now.observation, now.started = entries_of(observation), True
            now.episode_step, now.steps, now.terminated, now.truncated = 0, None, None, None
            if not self.fixed_length:
                now.steps = self._row_steps()
            return now.observation
        rows = rows.reshape(self.batch_size)
        state, observation = self.begin(task, rows)
        now.state = merge(rows, state, now.state)
        now.observation = merge(rows, entries_of(observation), now.observation)
        flags = rows.unsqueeze(-1)
        now.steps = self._row_steps().masked_fill(flags, 0)
        others = ~flags
        now.terminated, now.truncated = (
            end if end is None else end & others for end in (now.terminated, now.truncated)
        )
        return now.observation

    def play(self, action: Tensor) -> tuple[Entries, Tensor, Tensor | None, Tensor | None]:
        """One step of all rows.

        Args:
            action: the actions ``[*B, ...]``.

        Returns:
            Observation entries, reward ``[*B, 1]``, and ``terminated`` and ``truncated``, ``[*B, 1]`` bool or None for no row.
            With ``fixed_length`` both are None while all rows are at the same step: they end together, at `episode_step`
            ``max_episode_steps``.
        """
        now = self._now
        if not now.started:
            raise RuntimeError(
                f"a step of {type(self).__name__} before reset(): no row has a task yet. Call reset(TensorDict({{'task': ...}})), "
                "or start(task), or let a TaskSampler draw the task."
            )
        now.moves += 1
        if self._choice_dtype not in (None, action.dtype):
            action = action.to(self._choice_dtype)
        now.state, observation, reward, terminated, truncated = self.advance(now.state, action)
        now.observation = entries = entries_of(observation)
        if self.fixed_length:
            if terminated is not None or truncated is not None:
                raise RuntimeError(
                    f"{type(self).__name__}.advance says when an episode ends, but fixed_length=True promises that none does "
                    "before max_episode_steps; such an env is collected as if no episode ever ended early. Return None for "
                    "both, or pass fixed_length=False."
                )
            now.episode_step += 1
            if now.steps is None:
                return entries, reward, None, None
        if self.max_episode_steps is not None:
            now.steps = now.steps + 1
            terminated, truncated = self._with_limit(now.steps, terminated, truncated)
        now.terminated, now.truncated = terminated, truncated
        return entries, reward, terminated, truncated

    @cached_property
    def _choice_dtype(self) -> torch.dtype | None:
        """That of ``action_spec``, where actions are choices or flags, of which policies make int64; reals stay as they come."""
        dtype = self.full_action_spec[self.action_key].dtype
        return None if dtype.is_floating_point else dtype

    def _with_limit(
        self, steps: Tensor, terminated: Tensor | None, truncated: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Ends of episodes, those by ``max_episode_steps``, a number here, among them."""
        late = steps >= self.max_episode_steps
        if self.time_limit_terminates:
            return late if terminated is None else terminated | late, truncated
        return terminated, late if truncated is None else truncated | late

    @property
    def episode_step(self) -> int | None:
        """Steps of the current episode, where all rows are at the same one and ``fixed_length`` says so; else None."""
        return self._now.episode_step if self._now.steps is None else None

    @property
    def moves(self) -> int:
        """How many times an episode has been begun in some rows, or a step taken, by whomever."""
        return self._now.moves

    @property
    def state(self) -> EnvState:
        """What `begin` or `advance` returned last, all rows."""
        return self._now.state

    @property
    def observation(self) -> Entries:
        """The observation entries as they are now, all rows."""
        return self._now.observation

    def _row_steps(self) -> Tensor:
        """Steps of the current episode, ``[*B, 1]`` int64."""
        now = self._now
        if now.steps is not None:
            return now.steps
        return torch.full((*self.batch_size, 1), now.episode_step, device=self.device)

    # ------------------------------------------------ derived, on TensorDicts
    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs) -> TensorDictBase:
        rows = None if tensordict is None else tensordict.get("_reset", None)
        is_given = tensordict is not None and "task" in tensordict.keys()
        # A TensorDict's owner may write over it, and what is begun keeps its task.
        task = tensordict["task"].clone() if is_given else self.zero_task()
        self._has_task = is_given or task is None
        entries = self.start(task, None if rows is None or rows.all() else rows)
        output = self._tensordict(entries)
        return output if self._has_task else output.set("task", task.clone())

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self._steps_without_task += not self._has_task
        if self._steps_without_task > _STEPS_OF_A_LOOK:
            self.tell_of_no_task()
        entries, reward, _, _ = self.play(tensordict.get(self.action_key))
        return self._tensordict(entries).set("reward", reward)

    def _tensordict(self, entries: Entries) -> TensorDict:
        terminated, truncated = self._ends()
        output = {"done": terminated | truncated, "terminated": terminated, "truncated": truncated}
        output = {name: value for name, value in output.items() if name in self.full_done_spec.keys()}
        # Copies: what others do to a TensorDict must not reach the state.
        output = TensorDict(output, self.batch_size, self.device)
        for key, value in entries.items():
            output.set(key, value.clone())
        return output.update(self.observe_more(self._now.state)) if self.more_keys else output

    def zero_task(self) -> Tensor | TensorDictBase | None:
        """What is played where nobody gives a task; None in an env without."""
        spec = self.full_state_spec.get("task", None)
        return None if spec is None else spec.project(spec.zero())

    def tell_of_no_task(self) -> None:
        """Logs, once, that the task of zeros is played since nobody has given one."""
        if not self._has_told:
            self._has_told = True
            torchrl_logger.warning(
                f"{type(self).__name__} was reset without a 'task' and plays the task of zeros, so that there is nothing to "
                "adapt to. Add a TaskSampler (TransformedEnv(env, Compose(Trial(...), TaskSampler(...)))) or pass "
                "TensorDict({'task': ...}) to reset()."
            )

    def _ends(self) -> tuple[Tensor, Tensor]:
        """``terminated`` and ``truncated`` of all rows, ``[*B, 1]`` bool."""
        now = self._now
        ends = (now.terminated, now.truncated)
        if self.fixed_length:
            ends = self._with_limit(self._row_steps(), None, None)
        never = torch.zeros((*self.batch_size, 1), dtype=torch.bool, device=self.device)
        terminated, truncated = (never.clone() if end is None else end.clone() for end in ends)
        return terminated, truncated

    # ---------------------------------------------------- seeds, checkpoints
    def _set_seed(self, seed: int | None) -> None:
        #: The seed that the env was given, or None.
        self.given_seed = seed
        # The generator is the env's own: the draws of tasks, policy and env must not depend on one another.
        seed_generator(self.generator, seed)

    def get_outside_state(self) -> list[Tensor]:
        """Tensors that say where the rows stand beside the state, for an env that keeps its state elsewhere."""
        return []

    def set_outside_state(self, tensors: Sequence[Tensor]) -> None:
        """Puts back what `get_outside_state` returned."""

    def get_extra_state(self) -> Tensor:
        """Generator, state, observation and step counts, so that a checkpoint goes on as the run would have."""
        # One plain tensor, as TaskSampler's: all else TorchRL's EnvCreator would copy into every worker, and all would draw
        # the same numbers.
        leaves = [leaf.detach() for leaf in self._leaves()] if self._now.started else None
        return to_tensor({"generator": self.generator.get_state(), "rows": leaves})

    def set_extra_state(self, state: Tensor) -> None:
        """Restores what `get_extra_state` returned.

        Raises:
            ValueError: it is the state of another env, or of another batch size.
        """
        saved = from_tensor(state, f"the state of {type(self).__name__}")
        if saved["rows"] is None:
            self._now = Rows()
        else:
            if not self._now.started:
                self.start(self.zero_task())  # for the state's shapes; all its values are replaced
            leaves = list(self._leaves())
            then, now = ([(leaf.shape, leaf.dtype) for leaf in each] for each in (saved["rows"], leaves))
            if then != now:
                raise ValueError(
                    f"the state is not one of {type(self).__name__} of batch_size {tuple(self.batch_size)}: it is another env's, "
                    "and would put rows where they never were. Make the env as it was when the state was saved."
                )
            self._put(part.to(leaf.device) for part, leaf in zip(saved["rows"], leaves, strict=True))
        self.generator.set_state(saved["generator"])

    def _leaves(self) -> Iterator[Tensor]:
        now = self._now
        yield self._row_steps()
        yield from tensors_of(now.state)
        yield from tensors_of(now.observation)
        yield from self.get_outside_state()

    def _put(self, leaves: Iterator[Tensor]) -> None:
        """Takes the values of `_leaves` back."""
        now, leaves = self._now, iter(leaves)
        steps = next(leaves)
        now.state = rebuilt(now.state, leaves)
        now.observation = rebuilt(now.observation, leaves)
        self.set_outside_state(list(leaves))
        together = self.fixed_length and bool((steps == steps.flatten()[0]).all())
        now.steps, now.episode_step = (None, int(steps.flatten()[0])) if together else (steps, 0)
        now.terminated, now.truncated = None, None
