"""`RunCheckpoints`: all that a training goes on from, saved to a folder and restored from it."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl.checkpoint import GlobalRNGState
from torchrl.collectors import BaseCollector
from torchrl.envs import Transform

from rl2_torchrl.collector import begin_new_trials, load_rollout_state, rollout_state
from rl2_torchrl.envs.tensor_env import TensorEnv
from rl2_torchrl.history import HistoryFile
from rl2_torchrl.kept import Kept
from rl2_torchrl.locks import locked
from rl2_torchrl.settings import differences, moved, named, networks_of, parts_of, settings_of
from rl2_torchrl.storage import DamagedFileError, load_tree, save_tree, to_bytes, whole_name
from rl2_torchrl.tasks import TaskSampler, owner_of
from rl2_torchrl.trial import base_of, own_transforms, rows_of, transforms_of
from rl2_torchrl.update import PPOUpdate
from rl2_torchrl.workers import TrialWorkers

__all__ = ["RunCheckpoints", "Stateful"]

log = logging.getLogger(__name__)

#: Of what is in a checkpoint; another number is not read.
FORMAT = 8
_KEPT = 2
_NAME = re.compile(r"checkpoint-(\d+)\.safetensors")
_HISTORY, _LOCK = "checkpoint-history.jsonl", "checkpoint.lock"
_EARLIER, _DAMAGED = "earlier-checkpoints", "damaged-checkpoints"
_PACKAGES = ("rl2_torchrl", "torch", "torchrl", "tensordict")


class Stateful(Protocol):
    """What a checkpoint holds: anything with a state to save and to put back."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class RunCheckpoints:
    """The newest checkpoints of a run: networks, optimizer, tasks, envs, random numbers, history and callbacks.

    A checkpoint is one file, ``checkpoint-<env steps>.safetensors``, written durably and checked when it is read; nothing in it
    is run. The history of scalars lies beside, in ``checkpoint-history.jsonl``. Within `held` the folder is this run's
    alone. Only these files are ever moved or removed.

    Args:
        folder: where they are; None saves nothing.
        update: the `PPOUpdate`.
        collector: the collector, and with it the policy, the tasks and the env.
        callbacks: objects with a state of their own.
        result: what the training has done so far, a `TrainResult`.
        returns: what the running trials have earned so far.

    Raises:
        OSError: nothing can be written to ``folder``. Found here, before hours of training that could not be saved.
        TypeError: a part has no state, or one that cannot be saved.
    """

    def __init__(
        self,
        folder: str | Path | None,
        *,
        update: Stateful,
        collector: BaseCollector,
        callbacks: Sequence[Stateful],
        result: Any,
        returns: Any,
    ):
        self._folder = None if folder is None else Path(folder)
        if self._folder is None:
            return
        _require_writable(self._folder)
        self._collector, self._result = collector, result
        self._history = HistoryFile(self._folder / _HISTORY)
        self._settings = settings_of(collector, update)
        self._networks = networks_of(collector, update)
        self._moved: set[str] = set()  # attributes of env and networks that play or updates have changed
        self._own = _CollectorState(collector)
        self._parts = {
            "update": update,
            "kept": Kept(_parts(collector, update)),
            "collector": self._own,
            "rollout": _RolloutState(collector, returns),
            "callbacks": _States(callbacks),
            "result": result,
            "rng": GlobalRNGState(),
        }

    @contextmanager
    def held(self) -> Iterator[RunCheckpoints]:
        """Within it the folder is this run's; OSError where another one has it."""
        if self._folder is None:
            yield self
            return
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(self._folder / _LOCK))
            except BlockingIOError as error:
                raise OSError(
                    f"checkpoints={str(self._folder)!r} is in use by another training ({error}): two runs in one folder would "
                    "remove each other's checkpoints. Give each its own, such as one for each seed, or wait for the other."
                ) from None
            for path in self._folder.iterdir():
                if _is_ours(whole_name(path.name)):  # of a write that was killed
                    path.unlink()
            to_bytes(state := self._state())  # what cannot be saved is found now
            if "missing" in state["rollout"]:
                log.info("a resumed run will begin new trials: %s.", state["rollout"]["missing"])
            yield self

    # ----------------------------------------------------------------- saving
    def before_rollout(self) -> None:
        """To be called before each rollout: where one fails TorchRL's collector shuts itself down, and has no state any more."""
        # TorchRL's collectors would have to ask envs in other processes at each update.
        if self._folder is not None and (hasattr(self._collector, "env") or isinstance(self._collector, TrialWorkers)):
            self._own.ask()

    def save(self, *, last: bool = False, rollout: bool = True) -> None:
        """Writes a checkpoint; the two newest are kept.

        Args:
            last: whether none follows. Where a checkpoint cannot be written the log says so and the run goes on; the last one is
                an error.
            rollout: whether envs and collector stand at the end of a batch; if not, a resumed run begins new trials.

        Raises:
            OSError: the ``last`` one cannot be written; the newest one before it is as it was.
            TypeError: likewise, since a part has come to a state that cannot be saved.
        """
        if self._folder is None:
            return
        try:
            self._write(rollout)
        except (OSError, TypeError) as error:
            newest = paths[-1] if (paths := self._paths()) else "none"
            words = f"no checkpoint could be written at {self._result.env_steps} env steps ({error}); the newest one is {newest}"
            if last:
                raise type(error)(f"{words}. The training is over; its networks are in memory alone.") from error
            log.error("%s. The training goes on.", words)

    def save_on_the_way_out(self, *, rollout: bool) -> None:
        """As `save`, after an error: unless there is one of these env steps already, which may hold more."""
        if self._folder is None or not self._result.history or self._path() in self._paths():
            return
        self.save(rollout=rollout)

    def _write(self, rollout: bool) -> None:
        state = self._state(rollout)
        if rollout or not isinstance(self._collector, TrialWorkers):  # which may have died in the rollout
            self._moved |= moved(self._settings, settings_of(self._collector, self._parts["update"]))
        about = {"format": FORMAT, "versions": _versions(), "settings": self._settings, "networks": self._networks}
        about["moved"] = sorted(self._moved)
        about["history"] = self._history.write(self._result.history)
        save_tree({**about, "state": state}, self._path())
        for path in self._paths()[:-_KEPT]:
            path.unlink()

    def _state(self, rollout: bool = True) -> dict[str, Any]:
        for name, part in {**self._parts, "collector": self._collector}.items():
            if not hasattr(part, "state_dict"):
                raise TypeError(
                    f"the {name} has no state_dict() and load_state_dict(state), which checkpoints need: add them."
                )
        states = {name: part.state_dict for name, part in self._parts.items()}
        if not rollout:
            missing = {"missing": "an error or a signal has cut the rollout short"}
            states |= {"rollout": lambda: missing, "collector": self._own.last_known}
        return {name: state() for name, state in states.items()}

    def _path(self) -> Path:
        return self._folder / f"checkpoint-{self._result.env_steps}.safetensors"

    def _paths(self) -> list[Path]:
        """The checkpoints in the folder, oldest first."""
        named = [(int(match[1]), path) for path in self._folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(named)]

    # --------------------------------------------------------------- resuming
    def load_latest(self, changes: Collection[str]) -> bool:
        """Restores the newest checkpoint that is whole; False where there is none at all.

        Args:
            changes: names of settings that may differ from the run's.

        Raises:
            DamagedFileError: none can be read.
            ValueError: the run was made with other networks or settings, or by a version whose files this one does not read.
        """
        paths, damaged = self._paths(), []
        for path in reversed(paths):
            try:
                tree = load_tree(path)
            except DamagedFileError as error:
                log.warning("%s It is not used.", error)
                damaged.append(path)
                continue
            changed = self._require_fit(path, tree, changes)
            self._restore(path, tree, changed)
            if damaged:
                self._move(damaged, _DAMAGED)
                log.warning(
                    "going on from %s, the newest checkpoint that is whole; damaged ones are in %s.", path, _DAMAGED
                )
            return True
        if damaged:
            raise DamagedFileError(
                f"cannot resume from {self._folder}: all its {len(damaged)} checkpoints are damaged. Copy them once more, or start "
                "anew without resume."
            )
        return False

    def _require_fit(self, path: Path, tree: Mapping[str, Any], changes: Collection[str]) -> list[str]:
        """Names of the settings that are among ``changes`` and have changed."""
        if tree["format"] != FORMAT:
            raise ValueError(
                f"cannot resume from {path}: it is of another version of rl2_torchrl, {tree['versions']['rl2_torchrl']} with "
                f"format {tree['format']}, and this one, {version('rl2_torchrl')}, reads format {FORMAT}. Finish the run with "
                "that version."
            )
        self._moved |= set(tree["moved"])
        settings = differences(tree["settings"], self._settings)
        for name in self._moved.intersection(settings).difference(changes):
            log.info("resuming where the run itself had come to, whatever it is given now: %s", settings.pop(name))
        if unknown := set(changes) - {*tree["settings"], *self._settings}:
            raise ValueError(
                f"resume_changes={sorted(unknown)} are no settings; those that differ from the run's are {sorted(settings)}."
            )
        refused = [name for name in settings if name not in changes]
        words = "; ".join(settings[name] for name in refused)
        if networks := differences(tree["networks"], self._networks):
            also = f" Other settings differ, too: {words}." if words else ""
            raise ValueError(
                f"cannot resume from {path}: it was made with other networks, or elsewhere ({'; '.join(networks.values())}): give "
                f"them the sizes and devices that they had; or start anew without resume.{also}"
            )
        if refused:
            asked = ", ".join(map(repr, sorted({*refused, *changes})))
            raise ValueError(
                f"cannot resume from {path}: it was made with other settings ({words}): give those that it had, or go on with the "
                f"new ones by resume_changes=[{asked}]; or start anew without resume."
            )
        for name in settings:
            log.warning("resuming with a changed setting: %s", settings[name])
        return list(settings)

    def _restore(self, path: Path, tree: Mapping[str, Any], changed: Collection[str]) -> None:
        """Puts all parts back; ``changed`` are the settings that have."""
        state = tree["state"]
        changed_parts = {name.rpartition(".")[0] for name in changed}  # what may have been made of what has changed
        if not torch.cuda.is_available():  # of a run on the CPU, on a machine that has CUDA too
            state["rng"].pop("torch_cuda", None)
        if any(name.startswith("env.") for name in changed):
            state["rollout"] = {"missing": "settings of the env have changed"}
            changed_parts |= {name for name in state["kept"] if name.startswith("env.")}
            self._own.is_other_env = True
        state["kept"] = {name: each for name, each in state["kept"].items() if name not in changed_parts}
        if isinstance(state["update"], dict) and {"optimizer", "given_options"} <= state["update"].keys():
            _begin_anew_what_does_not_fit(state["update"], self._parts["update"].state_dict(), changed)
        try:
            for name, part in self._parts.items():
                part.load_state_dict(state[name])
        except Exception as error:
            then = differences(tree["versions"], _versions())
            raise ValueError(
                f"cannot resume from {path}: the state of the {name} does not fit, {error!r}."
                + f" Versions have changed since: {'; '.join(then.values())}." * bool(then)
                + " The objects given are half restored: make new ones."
            ) from error
        self._result.history, damage = self._history.read(tree["history"])
        if damage is not None:
            log.warning("%s. Networks and all else go on as they were.", damage)
        self._give_anew(changed)
        if (missing := self._parts["rollout"].missing) is not None:
            begin_new_trials(self._collector)
            log.warning("the resumed run begins new trials: %s.", missing)
            self._result.new_trials.append((self._result.env_steps, missing))

    def _give_anew(self, changed: Collection[str]) -> None:
        """Seeds and transforms' buffers that are others than the run's, over which its own have been put back like all states."""
        if "torch.seed" in changed:
            seed = self._settings["torch.seed"]
            torch.seed() if seed is None else torch.manual_seed(seed)
        for name, transform in _transforms(self._collector).items():
            if isinstance(transform, TaskSampler) and f"{name}.seed" in changed:
                transform.seed(transform.given_seed)
            for each, buffer in transform.named_buffers(recurse=False):
                if f"{name}.{each}" in changed:
                    buffer.copy_(torch.tensor(self._settings[f"{name}.{each}"], dtype=buffer.dtype))

    # ------------------------------------------------------------- making room
    def set_aside(self) -> None:
        """Moves an earlier run's files to a subfolder, in the place of the run before it."""
        if self._folder is None or not self._paths():
            return
        self._move([*self._paths(), self._folder / _HISTORY], _EARLIER)
        log.warning("%s held the checkpoints of an earlier run: moved to %s.", self._folder, _EARLIER)

    def _move(self, paths: Sequence[Path], name: str) -> None:
        """Moves ``paths`` to the subfolder ``name``, where only they and what is not ours are then."""
        (folder := self._folder / name).mkdir(exist_ok=True)
        for path in folder.iterdir():
            if _is_ours(path.name):
                path.unlink()
        for path in paths:
            if path.exists():
                path.replace(folder / path.name)


def _begin_anew_what_does_not_fit(state: dict[str, Any], own: Mapping[str, Any], changed: Collection[str]) -> None:
    """Has optimizer and advantage of an update's ``state`` begin as in ``own``, where ``changed`` settings make others of them."""
    groups = [[(len(g["params"]), set(g)) for g in each["optimizer"]["param_groups"]] for each in (state, own)]
    if groups[0] != groups[1] and any(name.startswith("update.") for name in changed):
        log.warning("the optimizer begins anew: it is another one than the run's.")
        state.update(optimizer=own["optimizer"], given_options=own["given_options"])
    kept = [_layout(each.get("advantage", {})) for each in (state, own)]
    if kept[0] != kept[1] and any(name.startswith("advantage.") for name in changed):
        log.warning("the advantage begins anew: it is another one than the run's.")
        state.pop("advantage", None)


def _below(place: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in ``state`` under ``place``, without it."""
    return {key.removeprefix(place): value for key, value in state.items() if key.startswith(place)}


def _layout(state: Any) -> Any:
    """What a ``state`` must be alike in to fit; bytes may be as many as they are."""
    if isinstance(state, Mapping):
        return {name: _layout(each) for name, each in state.items()}
    is_bytes = isinstance(state, torch.Tensor) and state.dtype == torch.uint8
    return (state.dtype, state.shape) if isinstance(state, torch.Tensor) and not is_bytes else None


def _is_ours(name: str) -> bool:
    return name == _HISTORY or _NAME.fullmatch(name) is not None


def _versions() -> dict[str, str]:
    return {name: version(name) for name in _PACKAGES}


def _require_writable(folder: Path) -> None:
    if folder.is_file():
        raise NotADirectoryError(f"checkpoints={str(folder)!r} is a file: name the folder that it lies in.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"checkpoints={str(folder)!r} cannot be written to ({error}), so the training could not be saved: name another "
            "folder, or None to save no checkpoints."
        ) from error


class _States:
    """Several objects as one component of a checkpoint, by their classes; several of one class in their order."""

    def __init__(self, objects: Sequence[Stateful]):
        self._objects: dict[str, Stateful] = {}
        for each in objects:
            name, number = type(each).__qualname__, 2
            if not hasattr(each, "load_state_dict"):
                raise TypeError(f"{name} has a state_dict, and no load_state_dict(state) to go on from it: add that.")
            while name in self._objects:
                name, number = f"{type(each).__qualname__} {number}", number + 1
            self._objects[name] = each

    def state_dict(self) -> dict[str, Any]:
        return {name: _plain(state) for name, each in self._objects.items() if (state := each.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, own in state.items():
            if name in self._objects:
                self._objects[name].load_state_dict(own)
            else:
                log.warning("the state of %s is lost: the run had it among its callbacks, and this one has not.", name)


def _plain(state: Any) -> Any:
    """``state`` with parameters as tensors, TensorDicts as dictionaries and named tuples as tuples."""
    state = state.to_dict() if isinstance(state, TensorDictBase) else state
    if isinstance(state, dict):
        return {name: _plain(each) for name, each in state.items()}
    if isinstance(state, list | tuple):
        return (list if isinstance(state, list) else tuple)(map(_plain, state))
    return state.detach() if isinstance(state, nn.Parameter) else state


def _parts(collector: BaseCollector, update: Stateful) -> dict[str, Any]:
    """What may hold more than its ``state_dict`` says, by the names of their settings; tasks that a callback makes harder, say."""
    transforms, env = _transforms(collector), getattr(collector, "env", None)
    samplers = {name: each for name, each in transforms.items() if isinstance(each, TaskSampler)}
    tasks = {f"{name}.distribution": owner_of(each.distribution) for name, each in samplers.items()}
    bases = {"env": base_of(env)} if env is not None and isinstance(base_of(env), TensorEnv) else {}
    of_update = parts_of(update) if isinstance(update, PPOUpdate) else {}
    return {**bases, **transforms, **tasks, **of_update}


def _transforms(collector: BaseCollector) -> dict[str, Transform]:
    """Those around a collector's env, and around its rows, as far as they are in this process, by the names of their settings."""
    env = getattr(collector, "env", None)
    found = named("env", transforms_of(env))
    for number, row in enumerate([] if env is None else rows_of(env)):
        found |= named(f"env.row{number}", transforms_of(row))
    return found


class _CollectorState:
    """A collector, and what it last said of itself: processes that a signal has ended cannot be asked any more.

    Its transforms' states go by the names of their settings, not, as TorchRL's, by the places where they stand.

    Attributes:
        is_other_env: whether settings of the env have changed; transforms whose states then do not fit begin anew.
    """

    def __init__(self, collector: BaseCollector):
        self._collector, self._known, self.is_other_env = collector, {}, False

    def ask(self) -> None:
        self._known = self._collector.state_dict()
        if (places := self._places()) and "env_state_dict" in self._known:
            found = self._known["env_state_dict"]
            self._known["env_state_dict"] = {name: _below(place, found) for name, place in places.items()}

    def _places(self) -> dict[str, str]:
        """Where in the env's ``state_dict`` that of each transform is; none of an env that is elsewhere."""
        env = getattr(self._collector, "env", None)
        if not (own := own_transforms(env)):
            return {}
        names = [(name, each) for name, each in named("env", transforms_of(env)).items() if each in own]
        paths = {id(module): path for path, module in env.transform.named_modules()}
        return {name: f"{path}." if (path := paths[id(each)]) else "" for name, each in names}

    def _put_in_places(self, states: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """The env's ``state_dict`` with the ``states`` of its transforms, by their names."""
        whole = dict(self._collector.env.state_dict())
        for name, place in self._places().items():
            state = states.get(name, {})
            if self.is_other_env and _layout(state) != _layout(_below(place, whole)):
                log.warning("%s begins anew: the run had none, or one whose state does not fit.", name)
            else:
                whole.update({place + key: value for key, value in state.items()})
        return whole

    def state_dict(self) -> dict[str, Any]:
        try:
            self.ask()
        except (OSError, EOFError):
            if not self._known:
                raise
        return self.last_known()

    def last_known(self) -> dict[str, Any]:
        """With the counts as they are, which are not the processes'."""
        counts = {name: getattr(self._collector, f"_{name}") for name in ("frames", "iter") if name in self._known}
        return {**self._known, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if ("lives" in state) == isinstance(self._collector, TrialWorkers):
            if self._places() and "env_state_dict" in state:
                state = {**state, "env_state_dict": self._put_in_places(state["env_state_dict"])}
            self._collector.load_state_dict(state)
        else:  # one with workers in the place of one without, or the other way round
            self._collector._frames = state["frames"]


class _RolloutState:
    """Where the collector stands in its trials, and what these have earned so far; or why that is ``"missing"``.

    Attributes:
        missing: why the state that was loaded last could not be gone on from; None where it could.
    """

    def __init__(self, collector: BaseCollector, returns: Any):
        self._collector, self._returns, self.missing = collector, returns, None

    def state_dict(self) -> dict[str, Any]:
        state = rollout_state(self._collector)
        return state if "missing" in state else {**state, "earned": self._returns.carry}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.missing = load_rollout_state(self._collector, state)
        self._returns.carry = state.get("earned") if self.missing is None else None
