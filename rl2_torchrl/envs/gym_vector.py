"""`GymVectorEnv`: N Gymnasium envs side by side, each row with a task of its own, played on tensors."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn
from torchrl.data import Categorical, Composite, TensorSpec, Unbounded

from rl2_torchrl.envs.gym_spaces import ActionSpace, ObservationSpace
from rl2_torchrl.envs.tensor_env import Entries, TensorEnv

__all__ = ["GymVectorEnv"]

#: Where the rows' tasks lie among the options of a reset, until each row has taken its own.
_TASKS = "rl2_torchrl.tasks"


class GymVectorEnv(TensorEnv):
    """N Gymnasium envs as the rows of one env, by Gymnasium's own vector envs; each row is reset when its episode ends.

    A task reaches a row at each reset, in whichever of these ways you name, in other processes too:

    - ``set_task(env, task)`` changes the row's *unwrapped* env before the reset; ``task`` is a tensor, of one row;
    - with ``tasks``, a list of objects, the task is an index into it, and ``set_task`` gets the object;
    - ``task_option``: the task is one of the options of Gymnasium's ``reset(options={task_option: task})``, as a NumPy array.

    Without any, the env has no task: an episode is then as good as a trial, and what changes is the env's own affair.

    Observations are a `Dict`'s entries or ``"observation"``; reals are float32, choices are counted from 0, text is left out.
    Actions beyond a `Box`'s bounds are clipped to them on their way to the env, while log-probability and transition input are
    those of the action as drawn; a distribution that keeps to the bounds is `TanhGaussianActions`. An episode's last observation
    is what ``("next", ...)`` shows at its end. What the env says beside is recorded under ``("info", key)``; neither `PreviousStep`
    nor a network reads it.

    Args:
        env: a Gymnasium id, a function that makes one env, a list of such functions (one a row), or a
            `gymnasium.vector.VectorEnv` of your own. The last must leave resets to its caller (``AutoresetMode.DISABLED``) or
            reset in the same step (``SAME_STEP``), and heed ``reset(options={"reset_mask": ...})``; ``set_task`` is then called
            with it, the tasks ``[N, ...]`` of all rows, and which rows begin, bool ``[N]``.
        num_envs: rows N. Not for lists and vector envs, which have a number of their own.
        set_task: see above.
        task_spec: spec of one task. Not with ``tasks``.
        tasks: see above.
        task_option: see above.
        vectorization: ``"sync"``: one after the other, here (default); ``"async"``: each in a process of its own, observations in
            shared memory, for envs of a millisecond a step and more.
        info_keys: numbers in Gymnasium's ``info`` to record, such as ``["success"]``; 0 where a step does not say.
        seed: seed of the rows' seeds; None draws one from PyTorch's default generator.
        device: device of all tensors. Defaults to the CPU.
        **kwargs: of `gymnasium.make`, with an id.

    Raises:
        ValueError: a vector env that resets in the next step, several ways for the task at once or half of one, or no ``num_envs``.
        TypeError: a space that is no tensor of a fixed size.
        FloatingPointError: an observation or reward is not finite.
        RuntimeError: a process of an env has died, or a vector env resets rows that were to go on.

    Examples:
        >>> from torchrl.envs import Compose, TransformedEnv
        >>> from rl2_torchrl import PreviousStep, TaskSampler, Trial
        >>> def set_length(cartpole, task):
        ...     cartpole.length = task.item()
        >>> def lengths(batch_size, generator):
        ...     return 0.25 + torch.rand(*batch_size, 1, generator=generator)
        >>> env = GymVectorEnv("CartPole-v1", 8, set_task=set_length, task_spec=Unbounded(1), seed=0)
        >>> env = TransformedEnv(env, Compose(Trial(episodes=2), TaskSampler(lengths, seed=0), PreviousStep()))
        >>> env.rollout(20, break_when_any_done=False)["trans"].shape  # 4 observations, 2 actions, reward, done
        torch.Size([8, 20, 8])
    """

    def __init__(
        self,
        env: str | Callable[[], gymnasium.Env] | Sequence[Callable[[], gymnasium.Env]] | VectorEnv,
        num_envs: int | None = None,
        *,
        set_task: Callable[..., None] | None = None,
        task_spec: TensorSpec | None = None,
        tasks: Sequence[Any] | None = None,
        task_option: str | None = None,
        vectorization: Literal["sync", "async"] = "sync",
        info_keys: Sequence[str] = (),
        seed: int | None = None,
        device: torch.device | str | None = None,
        **kwargs,
    ):
        task_spec = _task_spec(set_task, task_spec, tasks, task_option)
        self._set_task, self._tasks, self._task_option = set_task, tasks, task_option
        self._is_theirs = isinstance(env, VectorEnv)
        self.envs = env if self._is_theirs else self._make(env, num_envs, vectorization, kwargs)
        self._resets_itself = _autoreset(self.envs) is AutoresetMode.SAME_STEP
        self.has_threads = isinstance(self.envs, AsyncVectorEnv)
        self._observations = ObservationSpace(self.envs.single_observation_space)
        self._actions = ActionSpace(self.envs.single_action_space)
        self._info: Entries = {("info", key): torch.zeros(self.envs.num_envs, 1, device=device) for key in info_keys}
        self._unseeded = np.ones(self.envs.num_envs, dtype=bool)
        self._task: Tensor | TensorDictBase | None = None
        # Of a vector env that resets itself: which rows it has begun at the last step, and the observations then.
        self._begun, self._following = np.zeros(self.envs.num_envs, dtype=bool), {}
        super().__init__(
            task_spec=task_spec,
            observation_spec=self._observations.spec,
            action_spec=self._actions.spec,
            more_spec=Composite(info=Composite({key: Unbounded(1) for key in info_keys})) if info_keys else None,
            batch_size=(self.envs.num_envs,),
            seed=seed,
            device=device,
        )
        self.is_closed = False  # there is something to be closed; TorchRL takes an env for closed otherwise

    def _make(self, env, num_envs: int | None, vectorization: str, kwargs: dict) -> VectorEnv:
        if vectorization not in ("sync", "async"):
            raise ValueError(f"vectorization={vectorization!r}: choose 'sync' or 'async'.")
        if isinstance(env, str):
            env = partial(gymnasium.make, env, **kwargs)
        elif kwargs:
            raise TypeError(
                f"{sorted(kwargs)} are gymnasium.make's, which is called for an id alone; here env is {env}."
            )
        if callable(env) and (num_envs is None or num_envs < 1):
            raise ValueError(f"num_envs={num_envs}: say how many envs shall stand side by side, such as num_envs=16.")
        makers = [env] * num_envs if callable(env) else list(env)
        if not makers or num_envs not in (None, len(makers)):
            raise ValueError(f"{len(makers)} functions and num_envs={num_envs}: one function makes one row.")
        makers = [
            partial(_Row, make, n, self._set_task, self._tasks, self._task_option) for n, make in enumerate(makers)
        ]
        # What they return is copied here, with a change of dtype where there is one.
        options = {"copy": False, "autoreset_mode": AutoresetMode.DISABLED}
        if vectorization == "sync":
            return SyncVectorEnv(makers, **options)
        # TorchRL makes "spawn" the default of the whole program, with which each env would import PyTorch for seconds.
        context = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
        return AsyncVectorEnv(makers, context=context, **options)

    # ---------------------------------------------------------------- a step
    def begin(self, task: Tensor | TensorDictBase | None, rows: Tensor) -> tuple[None, Entries]:
        """Resets ``rows`` with their tasks, but for those that a vector env has begun itself, with the task that they had."""
        mask = rows.cpu().numpy()
        to_reset = mask & ~(self._begun & _same_rows(task, self._task, len(mask)))
        goes_on = ~(mask | self._begun)
        self._task, self._begun = task, self._begun & ~mask
        if not to_reset.any():
            return None, self._following
        entries = self._begin_rows(to_reset, task)
        if self._is_theirs and self._now.started:
            self._require_untouched(torch.from_numpy(goes_on), entries)
        return None, entries

    def _begin_rows(self, mask: np.ndarray, task: Tensor | TensorDictBase | None) -> Entries:
        """The entries of all rows once those in ``mask`` have been reset."""
        options: dict[str, Any] = {"reset_mask": mask}
        if self._is_theirs and self._set_task is not None:
            self._set_task(self.envs, task, mask)
        elif task is not None:
            options[self._task_option if self._is_theirs else _TASKS] = _as_arrays(task)
        observations, infos = self._call(self.envs.reset, seed=self._seeds(mask), options=options)
        entries = self._tensors(observations)
        self._tell(infos, begun=mask)
        return entries

    def advance(self, state: None, action: Tensor) -> tuple[None, Entries, Tensor, Tensor, Tensor]:
        """One step of Gymnasium's `VectorEnv`."""
        observations, reward, *ends, infos = self._call(self.envs.step, self._actions.array(action))
        if np.shape(reward) != (self.envs.num_envs,):
            raise ValueError(
                f"the vector env gives rewards of shape {np.shape(reward)}; they must be ({self.envs.num_envs},), one number a row."
            )
        entries = self._tensors(observations)
        reward = torch.from_numpy(np.asarray(reward)).to(self.device, torch.float32, copy=True).unsqueeze(-1)
        require_finite("reward", reward)
        self._tell(infos)
        terminated, truncated = (np.array(end, dtype=bool) for end in ends)
        if self._resets_itself and (ended := terminated | truncated).any():
            self._following, self._begun = entries, ended
            entries = self._last_observations(entries, ended, infos)
            self._tell(infos.get("final_info", {}), begun=ended)
        flags = (torch.from_numpy(end).to(self.device).unsqueeze(-1) for end in (terminated, truncated))
        return None, entries, reward, *flags

    def observe_more(self, state: None) -> Entries:
        """What the last step said beside, as far as ``info_keys`` asks for it."""
        return self._info

    def _tensors(self, observations: Any) -> Entries:
        entries = self._observations.tensors(observations)
        for key, value in entries.items():
            require_finite(key, value)
        return entries if self.device.type == "cpu" else {key: value.to(self.device) for key, value in entries.items()}

    def _tell(self, infos: dict[str, Any], begun: np.ndarray | None = None) -> None:
        """Takes down what ``infos`` say of ``info_keys``: 0 in the rows ``begun``, or after a step in all, that say nothing."""
        for (root, name), value in self._info.items():
            value = torch.zeros_like(value) if begun is None else value.masked_fill(_column(begun, value), 0.0)
            if name in infos:
                says = np.asarray(infos.get(f"_{name}", True)) & np.ones(len(value), dtype=bool)
                said = _column(np.where(says, infos[name], 0).astype(np.float32), value)
                value = torch.where(_column(says, value), said, value)
            self._info[root, name] = value

    def _last_observations(self, entries: Entries, ended: np.ndarray, infos: dict[str, Any]) -> Entries:
        """``entries`` with the last observations of the rows that have ``ended``, in the place of the next episode's first."""
        if "final_obs" not in infos:
            raise KeyError(
                "episodes have ended, but the vector env's info has no 'final_obs', without which their last observation is lost: "
                "make it with AutoresetMode.DISABLED, or let its info say it."
            )
        entries = {key: value.clone() for key, value in entries.items()}
        for row in ended.nonzero()[0]:
            for key, value in self._observations.one(infos["final_obs"][row]).items():
                entries[key][row] = value.to(self.device)
        return entries

    def _require_untouched(self, rows: Tensor, entries: Entries) -> None:
        rows = rows.to(self.device)
        if any(not torch.equal(entries[key][rows], value[rows]) for key, value in self.observation.items()):
            raise RuntimeError(
                f"the {type(self.envs).__name__} has reset rows that were to go on: reset(options={{'reset_mask': mask}}) must "
                "reset those of the mask alone, as gymnasium.vector's own do, or trials of other tasks end in the middle."
            )

    def _call(self, function: Callable[..., tuple], *args, **kwargs) -> tuple:
        """``function()`` of the vector env; where one of its processes fails, all are ended, so that none is left behind."""
        try:
            return function(*args, **kwargs)
        except Exception as error:
            if not isinstance(self.envs, AsyncVectorEnv):
                raise
            dead = [n for n, process in enumerate(self.envs.processes) if not process.is_alive()]
            self.envs.close_extras(terminate=True)
            self.envs.closed = True
            if not isinstance(error, EOFError | OSError):
                raise
            raise RuntimeError(
                f"the processes of the envs {dead} have died (out of memory, or killed?), and with them their trials. Nothing that "
                "was checkpointed is lost: start again from the newest checkpoint."
            ) from error

    # ---------------------------------------------------------- seeds, closing
    def _seeds(self, mask: np.ndarray) -> list[int | None]:
        """A seed for each row of ``mask`` that has had none since the env was seeded; None for all others."""
        fresh = (mask & self._unseeded).tolist()
        if not any(fresh):
            return [None] * len(fresh)
        self._unseeded &= ~mask
        drawn = torch.randint(2**31 - 1, (len(fresh),), generator=self.generator, device=self.device).tolist()
        return [seed if is_fresh else None for seed, is_fresh in zip(drawn, fresh, strict=True)]

    def _set_seed(self, seed: int | None) -> None:
        super()._set_seed(seed)
        self._unseeded[:] = True

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Closes the envs, and ends their processes."""
        super().close(raise_if_closed=raise_if_closed)
        self.envs.close()

    # Gymnasium's envs do not hand their state out: a resumed run begins new trials.
    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state


class _Row(gymnasium.Wrapper):
    """One row, maybe in a process of its own: it takes its task out of the options of a reset."""

    def __init__(self, make: Callable[[], gymnasium.Env], row: int, set_task, tasks, task_option: str | None):
        super().__init__(make())
        self._row, self._set_task, self._tasks, self._task_option = row, set_task, tasks, task_option
        self.step = self.env.step  # a call less in each step of each row

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        options = dict(options or {})
        if _TASKS in options:
            task = options.pop(_TASKS)[self._row]
            if self._task_option is not None:
                options[self._task_option] = task
            else:
                task = torch.from_numpy(np.array(task)) if isinstance(task, np.ndarray | np.generic) else task
                self._set_task(self.env.unwrapped, task if self._tasks is None else self._tasks[int(task)])
        return self.env.reset(seed=seed, options=options or None)


def _task_spec(set_task, task_spec, tasks, task_option: str | None) -> TensorSpec | None:
    """The spec of one task, None where there is none."""
    if (set_task is None) == (task_option is None):
        if set_task is None and task_spec is None and tasks is None:
            return None
        raise ValueError(
            "how does a task reach the env? Give one of set_task=, a function (env, task), and task_option=, the name of an option "
            "of reset()."
        )
    if (task_spec is None) == (tasks is None) or (tasks is not None and set_task is None):
        raise ValueError(
            "what is a task? Give one of task_spec=, such as Unbounded(1) for one number, and, with set_task=, tasks=, a list of "
            "the objects that set_task shall get."
        )
    return Categorical(len(tasks)) if task_spec is None else task_spec


def _autoreset(envs: VectorEnv) -> AutoresetMode:
    mode = envs.metadata.get("autoreset_mode")
    if mode not in (AutoresetMode.DISABLED, AutoresetMode.SAME_STEP):
        raise ValueError(
            f"the vector env's autoreset_mode is {mode}: it would slip a step that ignores the action between episodes, and reset "
            "without the next task. Make it with autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED."
        )
    return mode


def _same_rows(task, other, rows: int) -> np.ndarray:
    """In which rows two tasks are the same, bool ``[N]``."""
    if task is None or other is None:
        return np.full(rows, task is other)
    leaves = zip(*([t] if isinstance(t, Tensor) else t.values(True, True) for t in (task, other)), strict=True)
    return np.logical_and.reduce([(one == two).reshape(rows, -1).all(-1).cpu().numpy() for one, two in leaves])


def _as_arrays(task: Tensor | TensorDictBase) -> np.ndarray | TensorDictBase:
    """Tasks as they go to other processes: PyTorch would open a file for each tensor on its way."""
    return task.cpu().numpy() if isinstance(task, Tensor) else task.cpu()


def _column(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device).unsqueeze(-1)


def require_finite(key: NestedKey, value: Tensor) -> None:
    """Raises a FloatingPointError that says which row's ``value`` ``[N, ...]`` is NaN or infinite."""
    # The sum of finite numbers can overflow, but that of others is never finite.
    if value.is_floating_point() and not math.isfinite(value.sum()) and not value.isfinite().all():
        rows = (~value.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        raise FloatingPointError(
            f"the env gives {key!r} that is NaN or infinite, in rows {rows[:8]}: one such number spreads over the whole batch "
            "through the advantages. Mend the env, or bound what leads there."
        )
