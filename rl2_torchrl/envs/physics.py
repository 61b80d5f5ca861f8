"""`RolloutBackend`: a batch of MuJoCo simulations, stepped in one call on all cores; and the choice among TorchRL's backends."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple
from weakref import WeakSet

import numpy as np
import torch
from torchrl import torchrl_logger

from rl2_torchrl.arguments import whole

__all__ = [
    "Array",
    "BackendName",
    "Bodies",
    "RolloutBackend",
    "gymnasium_model",
    "import_mujoco",
    "load_model",
    "make_backend",
    "warnings_to_log",
]

BackendName = Literal["rollout", "mujoco", "mujoco-torch", "mjx"]
#: What a backend calculates with: NumPy arrays or tensors. They share operators, ``abs``, indexing and methods like ``sum``.
Array = np.ndarray | torch.Tensor
#: What `RolloutBackend` can hand over without a conversion by PyTorch.
_NUMPY_TYPES = {torch.float32: np.float32, torch.float64: np.float64}
#: All that there are, for processes that are forked from this one.
_BACKENDS: WeakSet[RolloutBackend] = WeakSet()


class Bodies(NamedTuple):
    """Where all bodies are.

    Attributes:
        qpos: generalised positions ``[N, nq]``.
        qvel: generalised velocities ``[N, nv]``.
        earlier_qpos: positions one step of the simulation before, of which ``mj_step`` leaves body positions behind.
        start_qpos: positions one step of the env before.
    """

    qpos: Array
    qvel: Array
    earlier_qpos: Array
    start_qpos: Array


def import_mujoco() -> ModuleType:
    """The package `mujoco`.

    Raises:
        ImportError: it is not installed.

    Examples:
        >>> import_mujoco().__name__
        'mujoco'
    """
    try:
        import mujoco
        import mujoco.rollout
    except ImportError as error:
        raise ImportError(
            'these envs are simulated by MuJoCo, which is an extra: pip install "rl2_torchrl[mujoco]".'
        ) from error
    return mujoco


def gymnasium_model(name: str) -> Path:
    """The file ``name`` among the MuJoCo models that Gymnasium brings.

    Examples:
        >>> gymnasium_model("ant.xml").exists()
        True
    """
    # The package alone, found and not imported: it takes memory, and its MuJoCo modules ask for further packages.
    return Path(find_spec("gymnasium").origin).parent / "envs" / "mujoco" / "assets" / name


@contextmanager
def warnings_to_log(name: str) -> Iterator[None]:
    """Sends MuJoCo's warnings to TorchRL's log, with ``name`` before them, not to stderr and a file in the working folder.

    Examples:
        >>> with warnings_to_log("half_cheetah.xml"):
        ...     model = load_model(gymnasium_model("half_cheetah.xml"))
    """
    mujoco = import_mujoco()
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda message: torchrl_logger.debug(f"{name}: {message}"))
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)


def load_model(path: Path) -> Any:
    """The `mujoco.MjModel` of an XML file.

    Examples:
        >>> load_model(gymnasium_model("half_cheetah.xml")).nu
        6
    """
    with warnings_to_log(path.name):
        return import_mujoco().MjModel.from_xml_path(str(path))


class RolloutBackend:
    """A batch of simulations on MuJoCo's own thread pool, `mujoco.rollout`, with the methods of TorchRL's MuJoCo backends.

    Every step solves its contacts from a cold start, so that it is a function of ``qpos``, ``qvel`` and ``ctrl`` alone.
    MuJoCo's ``mj_step``, called again and again, starts from the last solution and differs in the 13th digit.

    Args:
        model: a `mujoco.MjModel`.
        num_envs: simulations in the batch, B.
        frame_skip: steps of the simulation in one of the env.
        num_threads: threads of the pool. Default: as many as PyTorch has.

    Attributes:
        qpos: generalised positions ``[B, nq]``, float64; a view, which `step` writes over.
        qvel: generalised velocities ``[B, nv]``, likewise.
        earlier_qpos: positions one step of the simulation before, likewise.
        start_qpos: positions one step of the env before, likewise.
        bodies: the same as NumPy arrays. A small operation of PyTorch takes longer than NumPy's, and between two steps
            MuJoCo empties the caches that it would run in.

    Examples:
        >>> model = load_model(gymnasium_model("half_cheetah.xml"))
        >>> backend = RolloutBackend(model, num_envs=2, frame_skip=5)
        >>> backend.step(backend.array(torch.ones(2, 6)))
        >>> backend.qpos.shape
        torch.Size([2, 9])
    """

    def __init__(self, model: Any, num_envs: int, frame_skip: int, num_threads: int | None = None):
        mujoco = import_mujoco()
        threads = min(num_envs, num_threads or torch.get_num_threads())
        size = mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_FULLPHYSICS.value)
        self.mj_model, self.frame_skip = model, frame_skip
        self._models, self._data = [model] * num_envs, [mujoco.MjData(model) for _ in range(threads)]
        # A pool of one would only hand the work over: 0 is the calling thread.
        self._threads, self._pool = threads if threads > 1 else 0, None
        _BACKENDS.add(self)
        # A state is (time, qpos, qvel, ...). States before and after each step of the simulation are written here.
        self._states, self._start = np.zeros((num_envs, frame_skip, size)), np.zeros((num_envs, size))
        self._ctrl = np.zeros((num_envs, frame_skip, model.nu))
        self._least_time = (frame_skip - 0.5) * model.opt.timestep
        self._last, earlier = self._states[:, -1], self._states[:, -2] if frame_skip > 1 else self._start
        positions, velocities = slice(1, 1 + model.nq), slice(1 + model.nq, 1 + model.nq + model.nv)
        self.bodies = Bodies(
            self._last[:, positions], self._last[:, velocities], earlier[:, positions], self._start[:, positions]
        )
        self._times = self._start[:, 0], self._last[:, 0]
        self._views = [torch.from_numpy(part) for part in self.bodies]
        self.qpos, self.qvel, self.earlier_qpos, self.start_qpos = self._views
        everywhere = torch.ones(num_envs, dtype=torch.bool)
        self.reset_mask(everywhere, torch.from_numpy(model.qpos0).expand(num_envs, -1), torch.zeros(num_envs, model.nv))

    def reset_mask(self, mask: torch.Tensor, qpos: torch.Tensor, qvel: torch.Tensor) -> None:
        """Puts the rows of ``qpos`` and ``qvel`` in place that ``mask`` (bool ``[B]``) marks; time goes back to 0 there."""
        self._states[mask.numpy()] = 0
        for view, value in zip(self._views, (qpos, qvel, qpos, qpos), strict=True):
            view[mask] = value[mask].to(view)

    def step(self, ctrl: Array) -> None:
        """``frame_skip`` steps of the simulation with ``ctrl`` ``[B, nu]``, which MuJoCo clamps to the actuators' range."""
        np.copyto(self._start, self._last)
        np.copyto(self._ctrl, ctrl[:, None])
        if self._pool is None:
            self._pool = import_mujoco().rollout.Rollout(nthread=self._threads)
        self._pool.rollout(
            self._models,
            self._data,
            self._start,
            self._ctrl,
            skip_checks=True,
            nstep=self.frame_skip,
            state=self._states,
        )

    @property
    def has_failed(self) -> bool:
        """Whether the last step came short: MuJoCo puts a row that it cannot solve back to the model's initial pose, at time 0."""
        before, after = self._times
        return np.minimum.reduce(after - before) < self._least_time

    def __getstate__(self) -> tuple:
        # What is left out is made anew: views would come back as arrays of their own, and threads cannot be copied.
        return (self.mj_model, len(self._models), self.frame_skip, len(self._data)), self._states, self._start

    def __setstate__(self, state: tuple) -> None:
        arguments, states, start = state
        self.__init__(*arguments)
        self._states[:], self._start[:] = states, start

    def array(self, values: torch.Tensor) -> np.ndarray:
        """``values`` ``[*B, size]`` as a float64 array ``[B, size]`` to calculate with."""
        return values.numpy(force=True).astype(np.float64).reshape(len(self._models), -1)

    @staticmethod
    def join(parts: Sequence[Array], dtype: torch.dtype) -> torch.Tensor:
        """Arrays ``[B, size]`` side by side as a new tensor ``[B, sum of sizes]``."""
        return torch.from_numpy(np.concatenate(parts, 1, dtype=_NUMPY_TYPES[dtype], casting="same_kind"))


class _TorchRLBackend:
    """One of TorchRL's MuJoCo backends, with the methods and attributes of `RolloutBackend`."""

    has_failed = False  #: Nothing says so.

    def __init__(self, name: str, path: Path, num_envs: int, frame_skip: int, device: torch.device):
        from torchrl.envs.custom.mujoco import _backends

        with warnings_to_log(path.name):
            self._backend = _backends.make_backend(name, path, num_envs=num_envs, device=device)
        self.mj_model, self.frame_skip = self._backend.mj_model, frame_skip
        self.earlier_qpos = self.start_qpos = self.qpos

    @property
    def bodies(self) -> Bodies:
        return Bodies(self.qpos, self.qvel, self.earlier_qpos, self.start_qpos)

    @property
    def qpos(self) -> torch.Tensor:
        return self._backend.qpos

    @property
    def qvel(self) -> torch.Tensor:
        return self._backend.qvel

    def reset_mask(self, mask: torch.Tensor, qpos: torch.Tensor, qvel: torch.Tensor) -> None:
        self._backend.reset_mask(mask, qpos.to(self.qpos), qvel.to(self.qvel))
        for name in ("earlier_qpos", "start_qpos"):
            setattr(self, name, torch.where(mask.unsqueeze(-1), self.qpos, getattr(self, name)))

    def step(self, ctrl: torch.Tensor) -> None:
        self.start_qpos = self.qpos.clone()
        if self.frame_skip > 1:
            self._backend.step(ctrl, self.frame_skip - 1)
        self.earlier_qpos = self.qpos.clone()
        self._backend.step(ctrl, 1)

    def array(self, values: torch.Tensor) -> torch.Tensor:
        return values.to(self.start_qpos).reshape(len(self.start_qpos), -1)

    @staticmethod
    def join(parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return torch.cat(parts, -1).to(dtype)


def make_backend(
    name: BackendName, path: Path, num_envs: int, frame_skip: int, num_threads: int | None, device: torch.device
) -> RolloutBackend | _TorchRLBackend:
    """A backend for ``num_envs`` simulations of the model in ``path``.

    Raises:
        ValueError: no such backend, one that cannot live on ``device``, or a number of threads that it cannot have.
        ImportError: the backend's package is not installed.

    Examples:
        >>> path = gymnasium_model("half_cheetah.xml")
        >>> make_backend("rollout", path, 4, 5, None, torch.device("cpu")).qvel.shape
        torch.Size([4, 9])
    """
    num_threads = None if num_threads is None else whole("num_threads", num_threads)
    if num_threads is not None and name != "rollout":
        raise ValueError(f"num_threads={num_threads} with backend={name!r}: only 'rollout' has threads of its own.")
    if name != "rollout":
        return _TorchRLBackend(name, path, num_envs, frame_skip, device)
    if device.type != "cpu":
        raise ValueError(
            f"backend='rollout' simulates on the CPU, not on {device}. Take 'mujoco-torch' or 'mjx' there, or keep the env on "
            "the CPU and the networks elsewhere (a Collector's env_device and policy_device)."
        )
    return RolloutBackend(load_model(path), num_envs, frame_skip, num_threads)


def _leave_pools() -> None:
    """In a forked process, where the pools' threads exist no more: to use one or to end it would wait for them for ever."""
    for backend in list(_BACKENDS):
        if backend._pool is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(backend._pool))  # so that it is never ended
            backend._pool = None


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_leave_pools)
