"""`GymVectorEnv`: N Gymnasium envs side by side, each row with a task of its own, played on tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl import torchrl_logger
from torchrl.data import Categorical, Composite, TensorSpec, Unbounded

from rl2_torchrl.arguments import as_list, whole
from rl2_torchrl.envs.gym_processes import call, in_processes, last_row_states, processes_of
from rl2_torchrl.envs.gym_row import TASKS, GymRow
from rl2_torchrl.envs.gym_spaces import ActionSpace, ObservationSpace, misfits
from rl2_torchrl.envs.gym_sync import SyncRows
from rl2_torchrl.envs.layers import moving_statistics
from rl2_torchrl.envs.rows import Entries, Rows, merge
from rl2_torchrl.envs.task_setter import warn_of_added
from rl2_torchrl.envs.tensor_env import TensorEnv
from rl2_torchrl.storage import from_tensor, to_tensor

__all__ = ["GymVectorEnv"]


class GymVectorEnv(TensorEnv):
    """N Gymnasium envs as the rows of one env, by Gymnasium's own vector envs; each row is reset when its episode ends.

    A task reaches a row at each reset, in whichever of these ways you name, in other processes too:

    - ``set_task(env, task)`` changes the row's *unwrapped* env before the reset; ``task`` is a tensor, of one row;
    - with ``tasks``, a list of objects, the task is an index into it, and ``set_task`` gets the object;
    - ``task_option``: the task is one of the options of Gymnasium's ``reset(options={task_option: task})``, as a
      NumPy array; of a nested task as a dictionary of them.

    Without any, the env has no task: an episode is then as good as a trial, and what changes is the env's own affair.

    Observations are a `Dict`'s entries or ``"observation"``; reals are float32, choices are counted from 0, text is left out.
    Actions beyond a `Box`'s bounds are clipped to them on their way to the env, while log-probability and transition input are
    those of the action as drawn; a distribution that keeps to the bounds is `TanhGaussianActions`. An episode's last observation
    is what ``("next", ...)`` shows at its end. What a step says beside is recorded under ``("next", "info", key)``, as float32;
    neither `PreviousStep` nor a network reads it.

    Args:
        env: a Gymnasium id or spec, a function that makes one env, a list of such functions (one a row), or a
            `gymnasium.vector.VectorEnv` of your own. The last must leave resets to its caller (``AutoresetMode.DISABLED``) or
            reset in the same step (``SAME_STEP``), and heed ``reset(options={"reset_mask": ...})``. It is told the tasks of all
            rows ``[N, ...]`` at once (with ``tasks`` a list of N objects): ``set_task`` is called with it, the tasks, and which
            rows begin, bool ``[N]``; ``task_option`` holds all of them.
        num_envs: rows N. Not for lists and vector envs, which have a number of their own.
        set_task: see above.
        task_spec: spec of one task. Not with ``tasks``.
        tasks: see above.
        task_option: see above.
        vectorization: ``"sync"``: one after the other, here (default; `SyncRows`, which is Gymnasium's with a shorter step);
            ``"async"``: each in a process of its own, with observations in shared memory, for envs that take a millisecond a step.
        info_keys: numbers in Gymnasium's ``info`` to record, such as ``["success"]``; 0 where a step does not say. A
            name that is never said in an episode is told in the log.
        seed: seed of the rows' seeds; None draws one from PyTorch's default generator.
        device: device of all tensors. Defaults to the CPU.
        **kwargs: of `gymnasium.make`, with an id.

    A checkpoint holds the rows too, so that a resumed run goes on in the middle of an episode: their attributes, as far as these
    are plain data or objects of the env's own package, their random numbers, MuJoCo's simulation, or what an env's own
    ``get_state()`` returns and ``set_state(state)`` takes. An env that holds anything else begins new trials, and the log names
    it. One that keeps its state elsewhere, as in a simulator that it knows by a number, needs these two methods.

    Raises:
        ValueError: a vector env that resets in the next step, several ways for the task at once or half of one, no ``num_envs``,
            functions that hand out the same env twice, or an ``info_keys`` beside the same behind an underscore.
        TypeError: a ``set_task`` of other arguments, a space that is no tensor of a fixed size, an env where a function that makes
            one is needed, or one whose ``reset`` or ``step`` returns something else than Gymnasium asks for, such as a
            ``final_obs`` or ``final_info`` of another form.
        KeyError: episodes of a vector env that resets itself end without a ``final_obs``.
        FloatingPointError: an observation or reward is not finite.
        RuntimeError: a process of an env has died, the env has been closed, or a vector env resets rows that were to go on.

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
        env: str | EnvSpec | Callable[[], gymnasium.Env] | Sequence[Callable[[], gymnasium.Env]] | VectorEnv,
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
        num_envs = None if num_envs is None else whole("num_envs", num_envs)
        info_keys = as_list("info_keys", info_keys)
        if others := [key for key in info_keys if not isinstance(key, str)]:
            raise TypeError(
                f"info_keys holds {others}, and numbers are recorded by their names at the top of the info: have a wrapper say one "
                "that lies deeper there, info['success'] = info['episode']['success'], say."
            )
        if masks := [key for key in info_keys if f"_{key}" in info_keys]:
            raise ValueError(
                f"info_keys holds {masks} and the same behind an underscore, under which Gymnasium's vector envs keep which rows "
                "have said the first: one of two would be lost. Have a wrapper say it by another name."
            )
        tasks = None if tasks is None else as_list("tasks", tasks)
        task_spec = _task_spec(set_task, task_spec, tasks, task_option)
        self._is_theirs = isinstance(env, VectorEnv)
        self.set_task, self.tasks, self.task_option = set_task, tasks, task_option
        #: What makes a row: a run that goes on is to have the same, with the same arguments, and the same way of a task to it.
        self.make = partial(gymnasium.make, env, **kwargs) if isinstance(env, str | EnvSpec) else env
        self.envs = self._make(env, num_envs, vectorization, info_keys, kwargs)
        try:
            self._resets_itself = _autoreset(self.envs) is AutoresetMode.SAME_STEP
            self.observations = ObservationSpace(self.envs.single_observation_space)
            self.actions = ActionSpace(self.envs.single_action_space)
        except (TypeError, ValueError):
            if not self._is_theirs:
                self.envs.close()  # or its processes would wait for ever
            raise
        #: Which env plays, as far as it has a name; a run that goes on is to have the same.
        self.env_id = _id_of(env, self.envs)
        self.has_threads = processes_of(self.envs) is not None
        self._all_rows = np.ones(self.envs.num_envs, dtype=bool)
        info = {("info", key): torch.zeros(self.envs.num_envs, 1, device=device) for key in info_keys}
        self._told = _Told(info, self._all_rows.copy(), begun=~self._all_rows, unsaid=set(info_keys))
        super().__init__(
            task_spec=task_spec,
            observation_spec=self.observations.spec,
            action_spec=self.actions.spec,
            more_spec=Composite(info=Composite({key: Unbounded(1) for key in info_keys})) if info_keys else None,
            batch_size=(self.envs.num_envs,),
            seed=seed,
            device=device,
        )
        self._left: Sequence[Any] = ()  # states of the rows, once they are closed
        #: What each row is made of (`layers`), as far as it is known: a run that goes on is to have the same.
        self._made_of = () if self._is_theirs else call(self.envs, self.envs.get_attr, "made_of")
        self.is_closed = False  # there is something to close: TorchRL takes an env for closed otherwise

    def _make(self, env, num_envs: int | None, vectorization: str, info_keys: Sequence[str], kwargs: dict) -> VectorEnv:
        if self._is_theirs:
            if kwargs or num_envs not in (None, env.num_envs):
                raise TypeError(
                    f"num_envs={num_envs}, {sorted(kwargs)}: a vector env of your own has {env.num_envs} rows, and is made already."
                )
            return env
        if vectorization not in ("sync", "async"):
            raise ValueError(f"vectorization={vectorization!r}: choose 'sync' or 'async'.")
        if isinstance(env, str | EnvSpec):
            env = self.make
        elif kwargs:
            raise TypeError(
                f"{sorted(kwargs)} are gymnasium.make's, which is called for an id alone; here env is {env}."
            )
        makers = _makers_of(env, num_envs)
        told = self.set_task, self.tasks, self.task_option, info_keys
        makers = [partial(GymRow, make, n, *told) for n, make in enumerate(makers)]
        if vectorization == "async":
            return in_processes(makers)
        envs = SyncRows(makers, asks=bool(info_keys))
        if len({id(row.unwrapped) for row in envs.envs}) < len(makers):
            raise ValueError("several rows got the same env: the functions must each make a new one at every call.")
        return envs

    # ---------------------------------------------------------------- a step
    def begin(self, task: Tensor | TensorDictBase | None, rows: Tensor) -> tuple[None, Entries]:
        """Resets ``rows`` with their tasks, but for those that a vector env has begun itself, with the task that they had."""
        self._require_open()
        mask, told = rows.cpu().numpy(), self._told
        # An option is told in a reset from here alone, which the vector env's own was not.
        begun = told.begun & mask & (self.task_option is None)
        if begun.any():
            begun = begun & ~told.unseeded & _same_rows(task, told.task, len(mask))
        # Of rows that do not begin, TorchRL's resets bring whatever task was drawn for all.
        told.task = task if task is None or told.task is None else merge(rows, task, told.task)
        told.begun = told.begun & ~mask
        entries = told.following
        if (to_reset := mask & ~begun).any():
            entries = self._begin_rows(to_reset, task, others=begun | told.begun)
        if begun.any():
            for key, said in told.info_following.items():
                told.info[key] = torch.where(_column(begun, said), said, told.info[key])
        return None, entries

    def _begin_rows(self, mask: np.ndarray, task: Tensor | TensorDictBase | None, others: np.ndarray) -> Entries:
        """The entries of all rows once those in ``mask`` have been reset; ``others`` have begun an episode by themselves."""
        options: dict[str, Any] = {"reset_mask": mask.copy()}
        if self._is_theirs and self.set_task is not None:
            objects = None if self.tasks is None else [self.tasks[int(number)] for number in task]
            self.set_task(self.envs, task if objects is None else objects, mask.copy())
        elif task is not None:
            # Arrays, of a nested task by name: PyTorch would open a file for each tensor on its way to another process.
            options[self.task_option if self._is_theirs else TASKS] = task.detach().cpu().numpy()
        observations, infos = self._moved(self.envs.reset, seed=self._seeds(mask), options=options)
        if self.set_task is not None and not self._now.started:
            warn_of_added(self.attributes_added())
        entries = self._tensors(observations)
        if self._is_theirs:
            self._require_others_went_on(mask | others, entries)
        self._tell(infos, mask)
        return entries

    def advance(self, state: None, action: Tensor) -> tuple[None, Entries, Tensor, Tensor, Tensor]:
        """One step of Gymnasium's `VectorEnv`."""
        self._require_open()
        try:
            observations, reward, *ends, infos = self._moved(self.envs.step, self.actions.array(action))
        except AssertionError as error:
            if "autoreset_envs" not in str(error):
                raise
            raise RuntimeError(
                "a row whose episode has ended was stepped again before a reset: by a transform that steps several times in one, "
                "such as FrameSkipTransform? Let the envs themselves repeat actions, by a wrapper of Gymnasium's."
            ) from error
        if self._is_theirs:
            self._require_columns(rewards=reward, terminations=ends[0], truncations=ends[1])
        reward = np.array(reward, np.float32)
        try:
            entries = self._tensors(observations)
            _require_finite("reward", reward)
        except FloatingPointError as error:
            if action.isfinite().all():
                raise
            raise FloatingPointError(
                "an action is NaN or infinite: the policy has broken down, look at its losses."
            ) from error
        self._tell(infos, self._all_rows)
        terminated, truncated = (np.array(end, dtype=bool) for end in ends)
        if self._resets_itself:
            # What is there of rows that have ended is of the next episode; of this one it lies under "final_...".
            ended = self._told.begun = terminated | truncated
            self._told.following, self._told.info_following = entries, dict(self._told.info)
            if ended.any():
                entries = self._last_observations(entries, ended, infos)
                self._tell(self._final_info(infos), ended)
        if self._told.unsaid and (terminated | truncated).any():
            self._warn_of_unsaid(infos)
        columns = (torch.from_numpy(each[:, None]).to(self.device) for each in (reward, terminated, truncated))
        return None, entries, *columns

    def _require_columns(self, **given: Any) -> None:
        for name, column in given.items():
            if np.shape(column) != (self.envs.num_envs,):
                raise ValueError(
                    f"the vector env gives {name} of shape {np.shape(column)}; they must be ({self.envs.num_envs},), one a row."
                )

    def _moved(self, function: Callable[..., tuple], *args: Any, **kwargs: Any) -> tuple:
        """What a step or reset of all rows gives; ValueError that says where a row shows what does not fit its space."""
        try:
            return call(self.envs, function, *args, **kwargs)
        except (KeyError, TypeError, ValueError) as error:
            # The rows' last observations, which Gymnasium could not put together.
            for row, shown in enumerate(getattr(self.envs.unwrapped, "_env_obs", ())):
                has_begun = shown is not None or function == self.envs.step
                for words in misfits(self.envs.single_observation_space, shown) if has_begun else ():
                    raise ValueError(f"row {row} shows {words}: mend one.") from error
            raise

    def observe_more(self, state: None) -> Entries:
        """What the last step said beside, as far as ``info_keys`` asks for it."""
        return self._told.info

    def _tensors(self, observations: Any) -> Entries:
        arrays = self.observations.arrays(observations)
        for key, array in arrays.items():
            _require_finite(key, array)
        return {key: torch.from_numpy(array).to(self.device) for key, array in arrays.items()}

    def _tell(self, infos: dict[str, Any], rows: np.ndarray) -> None:
        """Takes down what ``infos`` say of ``info_keys`` in ``rows``: 0 where they say nothing."""
        for (root, name), value in self._told.info.items():
            value = value.masked_fill(_column(rows, value), 0.0)
            if name in infos:
                self._told.unsaid.discard(name)
                said = np.asarray(infos[name])
                if said.shape != rows.shape or said.dtype == object:
                    raise TypeError(
                        f"info_keys holds {name!r}, which is {said.dtype} {list(said.shape)} in the env's info; a number a row can "
                        "be recorded, nothing else."
                    )
                says = np.asarray(infos.get(f"_{name}", True)) & rows
                value = torch.where(_column(says, value), _column(said.astype(np.float32), value), value)
            self._told.info[root, name] = value

    def _warn_of_unsaid(self, infos: dict[str, Any]) -> None:
        """Logs, once, which of ``info_keys`` no row has said by the end of its first episode."""
        rows = [infos] if self._is_theirs else call(self.envs, self.envs.get_attr, "said")
        said, unsaid = sorted({str(name) for names in rows for name in names}), sorted(self._told.unsaid)
        torchrl_logger.warning(
            f"info_keys holds {unsaid}, which the env has not said by the end of an episode: misspelt? Its info holds {said}. What "
            "is not said is recorded as 0."
        )
        self._told.unsaid.clear()

    def _last_observations(self, entries: Entries, ended: np.ndarray, infos: dict[str, Any]) -> Entries:
        """``entries`` with the last observations of the rows that have ``ended``, in the place of the next episode's first."""
        if "final_obs" not in infos:
            raise KeyError(
                "episodes have ended, but the vector env's info has no 'final_obs', so that their last observation is lost: "
                "make it with AutoresetMode.DISABLED, or let its info say it."
            )
        if isinstance(infos["final_obs"], Mapping):
            raise TypeError(
                "the vector env's info['final_obs'] is a mapping; Gymnasium's is an array of N objects: of each row that has ended "
                "the last observation as the row's env gives it, and None of others."
            )
        entries = {key: value.clone() for key, value in entries.items()}
        for row in ended.nonzero()[0]:
            for key, array in self.observations.of_one(infos["final_obs"][row]).items():
                _require_finite(key, array, row)
                entries[key][row] = torch.as_tensor(array[0], device=self.device)
        return entries

    def _final_info(self, infos: dict[str, Any]) -> Mapping[str, Any]:
        """What is said of the last steps of rows that a vector env has reset itself."""
        final = infos.get("final_info", {})
        if self._told.info and not isinstance(final, Mapping):
            raise TypeError(
                f"the vector env's info['final_info'] is of {type(final).__name__}, and what info_keys ask of a last step "
                "would be lost; Gymnasium's, from 1.0 on, is a dictionary of arrays [N], and of masks of the rows that say "
                "something: {'success': array, '_success': mask}."
            )
        return final

    def _require_others_went_on(self, mask: np.ndarray, entries: Entries) -> None:
        others = torch.from_numpy(~mask).to(self.device)
        if self._now.started and any(
            not torch.equal(entries[key][others], value[others]) for key, value in self.observation.items()
        ):
            raise RuntimeError(
                f"the {type(self.envs).__name__} has reset rows that were to go on: reset(options={{'reset_mask': mask}}) must "
                "reset those of the mask alone, as gymnasium.vector's own do, or trials of other tasks end in the middle."
            )

    # ---------------------------------------------------------------- pictures
    def render(self, row: int = 0, **size: int) -> Tensor:
        """The picture ``[height, width, 3]`` uint8 that the env of ``row`` draws, of a size of its own: ``size`` is not heard.

        `rl2_torchrl.video` makes videos of whole trials. All rows draw, so one is enough.

        Raises:
            ValueError: the envs' ``render_mode`` is another than ``"rgb_array"``.
            TypeError: what they draw is no such picture.
        """
        self._require_open()
        if self.envs.render_mode != "rgb_array":
            raise ValueError(
                f"the envs have render_mode={self.envs.render_mode!r}, and draw no pictures: make them with 'rgb_array', "
                'GymVectorEnv("CartPole-v1", 1, render_mode="rgb_array"), say.'
            )
        picture = np.array(call(self.envs, self.envs.render)[row])
        if picture.dtype != np.uint8 or picture.shape[2:] not in ((), (3,), (4,)):
            raise TypeError(
                f"render() draws {picture.dtype} {list(picture.shape)}; a picture is uint8 [height, width, 3], from 0 to 255 "
                "(4 with transparency, none of greys)."
            )
        return torch.from_numpy(picture)

    # ---------------------------------------------------------- seeds, closing
    def _seeds(self, mask: np.ndarray) -> list[int | None] | int | None:
        """A seed for each row of ``mask`` that has had none since the env was seeded; None for all others."""
        fresh = mask & self._told.unseeded
        if not fresh.any():
            return None
        self._told.unseeded &= ~mask
        drawn = torch.randint(2**31 - 1, (len(fresh),), generator=self.generator, device=self.device).tolist()
        if not isinstance(self.envs.unwrapped, SyncVectorEnv | AsyncVectorEnv):
            return drawn[0]  # others know one seed for all rows
        return [seed if is_fresh else None for seed, is_fresh in zip(drawn, fresh, strict=True)]

    def _set_seed(self, seed: int | None) -> None:
        super()._set_seed(seed)
        self._told.unseeded[:] = True

    def attributes_added(self) -> list[str]:
        """Attributes that an env has by its first task alone, such as a misspelt one; none of a vector env of your own."""
        if self._is_theirs or self.envs is None:
            return []
        return sorted({name for added in call(self.envs, self.envs.get_attr, "attributes_added") for name in added})

    def rows_made_of(self) -> Sequence[dict[str, Any]]:
        """The classes, and their numbers, flags and texts, of which each row was made; none of a vector env of your own."""
        return self._made_of

    def moving_statistics(self, *, of_rows: bool = False) -> list[str]:
        """Gymnasium's wrappers that normalize by statistics which move with what they see, such as `NormalizeReward`; ``of_rows``:
        those alone that each row has for itself. What processes of a vector env of your own hold is not known.
        """
        self._require_open()
        if self._is_theirs:
            rows = map(moving_statistics, getattr(self.envs.unwrapped, "envs", ()))
        else:
            rows = call(self.envs, self.envs.get_attr, "moving_statistics")
        of_all = [] if of_rows else moving_statistics(self.envs)
        return list(dict.fromkeys([*of_all, *(name for row in rows for name in row)]))

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Closes the envs, and ends their processes."""
        super().close(raise_if_closed=raise_if_closed)
        if self.envs is not None:
            # For the checkpoint that follows the last batch, after which TorchRL's collectors close their envs.
            self._left = () if self._is_theirs or not self._now.started else last_row_states(self.envs)
            self.envs.close()
        # TorchRL's envs refer to themselves, so that this one stays for a while; simulators are large, and go now.
        self.envs = None

    def _require_open(self) -> None:
        if self.envs is None:
            raise RuntimeError(
                "this GymVectorEnv has been closed, as TorchRL's collectors do with theirs after the last batch, and its envs are "
                "gone: make a new one."
            )

    # ------------------------------------------------------------- checkpoints
    def why_no_state(self) -> str | None:
        """Why a resumed run begins new trials, in words; None where the envs hand out their state (`layers`)."""
        if self._is_theirs:
            return "a vector env that was made elsewhere does not hand out its rows' state"
        missing = [state for state in self._row_states() if isinstance(state, str)]
        return missing[0] if missing else None

    def _row_states(self) -> Sequence[Any]:
        """The state of each row, or in words why it has none; none at all before the first reset."""
        if self.envs is None:
            return self._left
        return call(self.envs, self.envs.get_attr, "row_state") if self._now.started else ()

    def get_extra_state(self) -> Tensor:
        """Generator, rows, and the envs themselves where they hand out their state; see `why_no_state`."""
        rows = () if self._is_theirs else tuple(self._row_states())
        task = self._told.task.to_dict() if isinstance(self._told.task, TensorDictBase) else self._told.task
        own = {
            "unseeded": self._told.unseeded,
            "task": task,
            "info": self._told.info,
            "rows": rows,
            "rest": super().get_extra_state(),
        }
        return to_tensor(own)

    def set_extra_state(self, state: Tensor) -> None:
        """Restores what `get_extra_state` returned.

        Raises:
            ValueError: it is the state of another env, or of another number of rows.
        """
        self._require_open()
        own = from_tensor(state, f"the state of {type(self).__name__}")
        rows, task = own["rows"], own["task"]
        task = TensorDict(task, self.batch_size, self.device) if isinstance(task, dict) else task
        if any(isinstance(row, str) for row in rows):  # there is no state: all rows begin
            self._now = Rows()
            self.generator.set_state(from_tensor(own["rest"], "the state of its rows")["generator"])
            return
        if rows and len(rows) != self.envs.num_envs:
            raise ValueError(
                f"the state is one of {len(rows)} rows, and this env has {self.envs.num_envs}: make it as it was."
            )
        if rows and not self._now.started:
            # The vector env knows its rows from their first reset on.
            self.start(self.zero_task() if task is None else task)
        super().set_extra_state(own["rest"])
        if rows:
            call(self.envs, self.envs.set_attr, "row_state", list(rows))
        self._told.unseeded, self._told.task = own["unseeded"], task
        self._told.info = {key: value.to(self.device) for key, value in own["info"].items()}


@dataclass
class _Told:
    """What the rows of a vector env were told and have said. A plain object: a `Module` takes long to set an attribute.

    Attributes:
        info: what was said beside the last observations, ``[N, 1]`` each.
        unseeded: rows that have had no seed since the env was seeded, bool ``[N]``.
        begun: of a vector env that resets itself, rows that it has begun at the last step, bool ``[N]``.
        following: what it observed then.
        info_following: what it said then.
        task: the rows' tasks.
        unsaid: names that are to be recorded and have not been said yet; none once that is told.
    """

    info: Entries
    unseeded: np.ndarray
    begun: np.ndarray
    following: Entries = field(default_factory=dict)
    info_following: Entries = field(default_factory=dict)
    task: Tensor | TensorDictBase | None = None
    unsaid: set[str] = field(default_factory=set)


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
    if tasks is not None and not tasks:
        raise ValueError("tasks=[] holds no task to draw.")
    return Categorical(len(tasks)) if task_spec is None else task_spec


def _makers_of(env: Any, num_envs: int | None) -> list[Callable[[], gymnasium.Env]]:
    """A function for each row."""
    if isinstance(env, gymnasium.Env):
        raise TypeError(
            f"{env} is one env, and each row needs its own: give a function that makes one, lambda: ... . If it holds many "
            "envs, as EnvPool's do, give it gymnasium.vector.VectorEnv's interface first: autoreset_mode DISABLED in its "
            "metadata, and a reset that resets the rows of options['reset_mask'] alone."
        )
    if callable(env) and num_envs is None:
        raise ValueError(f"num_envs={num_envs}: say how many envs shall stand side by side, such as num_envs=16.")
    makers = [env] * num_envs if callable(env) else list(env)
    if not makers or num_envs not in (None, len(makers)):
        raise ValueError(f"{len(makers)} functions and num_envs={num_envs}: one function makes one row.")
    return makers


def _autoreset(envs: VectorEnv) -> AutoresetMode:
    mode = envs.metadata.get("autoreset_mode")
    if mode not in (AutoresetMode.DISABLED, AutoresetMode.SAME_STEP):
        raise ValueError(
            f"the vector env's autoreset_mode is {mode}: it would slip a step that ignores the action between episodes, and reset "
            "without the next task. Make it with autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED; or, where it takes no "
            "such argument, let single envs be the rows, GymVectorEnv(id, num_envs)."
        )
    return mode


def _id_of(env: Any, envs: VectorEnv) -> str | None:
    if isinstance(env, str | EnvSpec):
        return env if isinstance(env, str) else env.id
    specs = [getattr(each, "spec", None) for each in (envs, *getattr(envs, "envs", ()))]
    return next((spec.id for spec in specs if spec is not None), None)


def _same_rows(task, other, rows: int) -> np.ndarray:
    """In which rows two tasks are the same, bool ``[N]``."""
    if task is None or other is None:
        return np.full(rows, task is other)
    if isinstance(task, Tensor):
        return (task == other).reshape(rows, -1).all(-1).cpu().numpy()
    return np.logical_and.reduce([_same_rows(task[key], other[key], rows) for key in task.keys(True, True)])


def _column(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device).unsqueeze(-1)


def _require_finite(key: NestedKey, array: np.ndarray, first_row: int = 0) -> None:
    """Raises a FloatingPointError that says which row's numbers ``[N, ...]`` are NaN or infinite."""
    if array.dtype.kind == "f" and not (is_finite := np.isfinite(array)).all():
        rows = (first_row + np.flatnonzero(~is_finite.reshape(len(array), -1).all(1))).tolist()
        raise FloatingPointError(
            f"the env gives {key!r} that is NaN or infinite, in rows {rows[:8]}: one such number spreads over the whole batch "
            "through the advantages. Mend the env, or bound what leads there."
        )
