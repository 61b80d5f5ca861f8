"""HalfCheetah and Ant whose task is a direction, a velocity or a place to reach, a whole batch at once."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Binary, Bounded, Composite, Unbounded

from rl2_torchrl.envs.camera import Camera
from rl2_torchrl.envs.lockstep import LockstepEnv
from rl2_torchrl.envs.physics import Array, BackendName, Bodies, gymnasium_model, make_backend
from rl2_torchrl.tasks import TaskDistribution

__all__ = [
    "AntDirection",
    "AntGoal",
    "HalfCheetahDirection",
    "HalfCheetahVelocity",
    "LocomotionEnv",
    "directions",
    "goals_in_disc",
    "signs",
    "velocities",
]


class LocomotionEnv(LockstepEnv):
    """A body of Gymnasium's MuJoCo models in episodes of ``horizon`` steps that never end early: what all envs here share.

    A reset takes the entry ``"task"`` ``[*B, task_size]``. Every step gives ``"observation"`` ``[*B, ...]``, ``"velocity"``
    ``[*B, axes]``, the torso's mean velocity over the step in m/s, and ``"reward"`` ``[*B, 1]``. An action ``[*B, nu]`` is the
    motors' control in [-1, 1], held for 5 steps of the simulation: 0.05 s. An episode begins near the model's initial pose.

    To pay for something else, derive from one of its envs and write a `reward`.

    Args:
        batch_size: batch size ``B`` of the env.
        horizon: steps of an episode. Default 200, the original's.
        backend: ``"rollout"``, MuJoCo on all cores (default), or one of TorchRL's: ``"mujoco"``, a single env; ``"mjx"``, on
            JAX; ``"mujoco-torch"``, of which release 0.2.0 wants a MuJoCo before 4 and, with PyTorch 2.13, a single env.
        num_threads: threads of the physics, with ``"rollout"``. Default: as many as PyTorch has.
        seed: seed of the env's own generator, which draws where an episode begins; None takes fresh entropy.
        dtype: of observations and rewards, `torch.float32` (default) or `torch.float64`. The physics of "rollout" is in
            float64.
        device: device of all tensors. Defaults to the CPU.

    Raises:
        ImportError: MuJoCo is not installed (extra ``mujoco``).
        ValueError: an empty ``batch_size``, ``horizon`` below 1, another ``dtype``.
        KeyError: at a reset without a task.
        FloatingPointError: an action is not finite, or the simulation blew up.

    Examples:
        >>> class HalfCheetahHeight(HalfCheetahVelocity):
        ...     def reward(self, task, velocity, place, action):
        ...         return -abs(self.physics.bodies.qpos[:, 1:2] - task)  # hold the torso at that height (m)
        >>> env = HalfCheetahHeight(batch_size=(2,), horizon=50, seed=0)
        >>> td = env.reset(TensorDict({"task": torch.tensor([[0.0], [0.2]])}, [2]))
        >>> env.rollout(50, auto_reset=False, tensordict=td.set("task", torch.zeros(2, 1)))["next", "reward"].shape
        torch.Size([2, 50, 1])
    """

    batch_locked = True
    has_threads = True
    frame_skip = 5
    #: File among Gymnasium's MuJoCo models.
    model_file: str
    #: Numbers of a task.
    task_size: int
    #: Axes of the world that speed is measured along: x, or x and y.
    axes: int

    def __init__(
        self,
        *,
        batch_size: Sequence[int] = (),
        horizon: int = 200,
        backend: BackendName = "rollout",
        num_threads: int | None = None,
        seed: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ):
        batch_size = torch.Size(batch_size)
        if 0 in batch_size or horizon < 1:
            raise ValueError(
                f"batch_size={tuple(batch_size)}, horizon={horizon}: there must be at least one env and one step."
            )
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"dtype={dtype}: the physics hands over torch.float32 or torch.float64; convert afterwards."
            )
        super().__init__(device=device or "cpu", batch_size=batch_size)
        self.episode_steps, self.dtype = horizon, dtype
        self.physics = make_backend(
            backend, gymnasium_model(self.model_file), batch_size.numel(), self.frame_skip, num_threads, self.device
        )
        self.model = self.physics.mj_model
        #: Seconds of a step.
        self.dt = self.frame_skip * self.model.opt.timestep
        self.generator = torch.Generator(self.device)
        self._set_seed(seed)
        self._steps = torch.zeros(*batch_size, 1, dtype=torch.int64, device=self.device)
        self._camera: Camera | None = None
        self._make_specs()

    def _make_specs(self) -> None:
        factory = {"dtype": self.dtype, "device": self.device}
        limits = torch.from_numpy(self.model.actuator_ctrlrange.copy()).to(**factory).expand(*self.batch_size, -1, 2)
        self.action_spec = Bounded(
            limits[..., 0].contiguous(), limits[..., 1].contiguous(), limits.shape[:-1], **factory
        )
        within = {"shape": self.batch_size, "device": self.device}
        self.state_spec = Composite(task=Unbounded((*self.batch_size, self.task_size), **factory), **within)
        observation = Unbounded(self._observe().shape, **factory)
        velocity = Unbounded((*self.batch_size, self.axes), **factory)
        self.observation_spec = Composite(observation=observation, velocity=velocity, **within)
        self.reward_spec = Unbounded((*self.batch_size, 1), **factory)
        flag = Binary(1, (*self.batch_size, 1), device=self.device, dtype=torch.bool)
        self.full_done_spec = Composite(done=flag, terminated=flag.clone(), truncated=flag.clone(), **within)

    # ------------------------------------------------------------- the task
    @abstractmethod
    def reward(self, task: Array, velocity: Array, place: Array, action: Array) -> Array:
        """Reward ``[N, 1]`` of a step of all N rows of the batch.

        All arguments are NumPy arrays in float64 with the backend "rollout", tensors with TorchRL's: calculate with what
        both have, such as operators, ``abs``, indices and ``.sum(-1)``.

        Args:
            task: ``[N, task_size]``.
            velocity: the torso's mean velocity over the step, ``[N, axes]``, in m/s.
            place: where the torso is after it, ``[N, axes]``, in m.
            action: ``[N, nu]``, as the policy gave it.
        """

    @abstractmethod
    def _features(self, bodies: Bodies) -> list[Array]:
        """Parts of the observation, each ``[N, size]``."""

    # ------------------------------------------------------ plain tensors
    def first(self, task: torch.Tensor) -> torch.Tensor:
        """The first observation of an episode in every row."""
        self._begin(torch.ones(self.batch_size.numel(), dtype=torch.bool, device=self.device))
        return self._observe()

    def transition(
        self, task: torch.Tensor, observation: torch.Tensor, action: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Reward and next observation; the simulation itself holds where the bodies are, not ``observation``."""
        physics = self.physics
        action = physics.array(action)
        physics.step(action)
        place = physics.bodies.qpos[:, : self.axes]
        reward = self.reward(physics.array(task), self._velocity(), place, action)
        _check_finite(reward, action)
        return self._tensor(reward), self._observe()

    def _velocity(self) -> Array:
        """Mean velocity ``[N, axes]`` over the last step, in m/s; 0 where an episode has just begun."""
        bodies = self.physics.bodies
        return (bodies.qpos[:, : self.axes] - bodies.start_qpos[:, : self.axes]) / self.dt

    def _begin(self, rows: torch.Tensor) -> None:
        """Puts ``rows`` (bool ``[N]``) near the model's initial pose, at rest but for noise, as Gymnasium does."""
        shape, factory = (len(rows), self.model.nq), {"dtype": torch.float64, "device": self.device}
        noise = torch.empty(shape, **factory).uniform_(-0.1, 0.1, generator=self.generator)
        qvel = 0.1 * torch.randn(len(rows), self.model.nv, generator=self.generator, **factory)
        qpos = torch.from_numpy(self.model.qpos0).to(noise) + noise
        self.physics.reset_mask(rows, qpos, qvel)

    def _observe(self) -> torch.Tensor:
        return self._tensor(*self._features(self.physics.bodies))

    def _tensor(self, *parts: Array) -> torch.Tensor:
        """``parts``, each ``[N, size]``, side by side as a new tensor ``[*B, sum of sizes]`` of the env's dtype."""
        return self.physics.join(parts, self.dtype).reshape(*self.batch_size, -1)

    # ---------------------------------------------------------- TensorDicts
    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs) -> TensorDictBase:
        if tensordict is None or "task" not in tensordict.keys():
            raise KeyError(
                f"{type(self).__name__}.reset() needs a 'task' [*B, {self.task_size}]: what shall be done? Add a TaskSampler "
                "(TransformedEnv(env, Compose(Trial(...), TaskSampler(...)))) or pass TensorDict({'task': ...})."
            )
        rows = tensordict.get("_reset", None)
        rows = torch.ones_like(self._steps, dtype=torch.bool) if rows is None else rows.reshape(self._steps.shape)
        self._begin(rows.flatten())
        self._steps = self._steps.masked_fill(rows, 0)
        return self._entries(self._observe())

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        reward, observation = self.transition(tensordict["task"], None, tensordict["action"])
        self._steps = self._steps + 1
        return self._entries(observation).set("reward", reward)

    def _entries(self, observation: torch.Tensor) -> TensorDict:
        done = self._steps >= self.episode_steps
        ends = {"done": done, "terminated": torch.zeros_like(done), "truncated": done.clone()}
        entries = {"observation": observation, "velocity": self._tensor(self._velocity()), **ends}
        return TensorDict(entries, batch_size=self.batch_size, device=self.device)

    # ---------------------------------------------------- seeds, checkpoints
    def _set_seed(self, seed: int | None) -> None:
        # The generator is the env's own: the draws of tasks, policy and env must not depend on one another.
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def get_extra_state(self) -> dict[str, torch.Tensor]:
        """Bodies, step counts and generator, so that a checkpoint goes on as the run would have."""
        places = {name: getattr(self.physics, name) for name in Bodies._fields}
        places["steps"] = self._steps
        return {"generator": self.generator.get_state(), **{key: value.clone() for key, value in places.items()}}

    def set_extra_state(self, state: dict[str, torch.Tensor]) -> None:
        """Restores what `get_extra_state` returned."""
        self.generator.set_state(state["generator"].cpu())
        everywhere = torch.ones(self.batch_size.numel(), dtype=torch.bool, device=self.device)
        self.physics.reset_mask(everywhere, state["qpos"], state["qvel"])
        self.physics.earlier_qpos[:], self.physics.start_qpos[:] = state["earlier_qpos"], state["start_qpos"]
        self._steps = state["steps"].clone()

    # -------------------------------------------------------------- pictures
    def render(self, row: int = 0, *, width: int = 480, height: int = 320, camera: str | int = "track") -> torch.Tensor:
        """A picture of one row of the batch, ``[height, width, 3]`` uint8; without a display set ``MUJOCO_GL=egl``.

        Its `Camera` is kept for the next picture of the same size. `rl2_torchrl.video` makes videos of whole trials.
        """
        if self._camera is None or self._camera.size != (width, height):
            if self._camera is not None:
                self._camera.close()
            self._camera = Camera(self.model, width, height)
        return self._camera.picture(self.physics.qpos[row].cpu().numpy(), self.physics.qvel[row].cpu().numpy(), camera)


class _HalfCheetah(LocomotionEnv):
    model_file = "half_cheetah.xml"
    task_size = axes = 1

    def _features(self, bodies: Bodies) -> list[Array]:
        # The root slides along x and z from where the model puts the torso.
        x, z = bodies.earlier_qpos[:, :1], bodies.earlier_qpos[:, 1:2]
        return [bodies.qpos[:, 1:], bodies.qvel, x, 0 * x, z + self._torso_height]

    @cached_property
    def _torso_height(self) -> float:
        return float(self.model.body("torso").pos[2])


class HalfCheetahDirection(_HalfCheetah):
    """HalfCheetah that shall run forward or backward: ``task · v_x - 0.05 |action|²`` (task ±1, m/s).

    Observation ``[*B, 20]``: ``qpos`` without the place along the track, ``qvel``, and the torso's place (x, y, z), which MuJoCo
    leaves as it was one step of the simulation (10 ms) before. Task ``[*B, 1]``, action ``[*B, 6]``.
    Arguments: those of `LocomotionEnv`.

    Examples:
        >>> env = HalfCheetahDirection(batch_size=(2,), seed=0)
        >>> td = env.reset(TensorDict({"task": torch.tensor([[1.0], [-1.0]])}, [2]))
        >>> td["observation"].shape, env.action_spec.shape
        (torch.Size([2, 20]), torch.Size([2, 6]))
    """

    def reward(self, task, velocity, place, action):
        return task * velocity - 0.05 * _squared(action)


class HalfCheetahVelocity(_HalfCheetah):
    """HalfCheetah that shall run at the task's velocity: ``-|v_x - task| - 0.05 |action|²`` (m/s).

    Observation ``[*B, 20]``: ``qpos`` without the place along the track, ``qvel``, and the torso's place (x, y, z), which MuJoCo
    leaves as it was one step of the simulation (10 ms) before. Task ``[*B, 1]``, action ``[*B, 6]``.
    Arguments: those of `LocomotionEnv`.

    Examples:
        >>> env = HalfCheetahVelocity(batch_size=(2,), seed=0)
        >>> td = env.reset(TensorDict({"task": torch.tensor([[0.0], [1.5]])}, [2]))
        >>> env.step(td.set("action", torch.zeros(2, 6)).set("task", torch.tensor([[0.0], [1.5]])))["next", "velocity"].shape
        torch.Size([2, 1])
    """

    def reward(self, task, velocity, place, action):
        return -abs(velocity - task) - 0.05 * _squared(action)


class _Ant(LocomotionEnv):
    """An ant; it is not stopped when it falls over, so that all trials have the same number of steps."""

    model_file = "ant.xml"
    task_size = axes = 2

    def _features(self, bodies: Bodies) -> list[Array]:
        return [bodies.qpos[:, 2:], bodies.qvel]

    def _upright(self) -> Array:
        """1 where the torso is between 0.2 and 1 m high, 0 elsewhere, ``[N, 1]``."""
        height = self.physics.bodies.qpos[:, 2:3]
        return 1.0 * ((height >= 0.2) & (height <= 1.0))


class AntDirection(_Ant):
    """Ant that shall run along the task, a unit vector: ``task · v + upright - 0.5 |action|²``; observation ``[*B, 27]``.

    ``upright`` is 1 while the torso is between 0.2 and 1 m high (VariBAD's AntDir, Zintgraf et al. 2020, without its end
    of an episode at a fall and without its cost of contacts). Observation: ``qpos`` without x and y, and ``qvel``. Task
    ``[*B, 2]``, action ``[*B, 8]``. Arguments: those of `LocomotionEnv`.

    Examples:
        >>> env = AntDirection(batch_size=(2,), seed=0)
        >>> env.reset(TensorDict({"task": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}, [2]))["observation"].shape
        torch.Size([2, 27])
    """

    def reward(self, task, velocity, place, action):
        return (task * velocity).sum(-1)[..., None] + self._upright() - 0.5 * _squared(action)


class AntGoal(_Ant):
    """Ant that shall reach the task, a place (x, y) in metres: ``-|place - task|₁ - 0.1 |action|²``; observation ``[*B, 29]``.

    As VariBAD's AntGoal (Zintgraf et al. 2020), without its cost of contacts. Observation: ``qpos`` and ``qvel``. Task
    ``[*B, 2]``, action ``[*B, 8]``. Arguments: those of `LocomotionEnv`.

    Examples:
        >>> env = AntGoal(batch_size=(2,), seed=0)
        >>> env.reset(TensorDict({"task": torch.tensor([[1.0, 0.0], [0.0, 3.0]])}, [2]))["observation"].shape
        torch.Size([2, 29])
    """

    def _features(self, bodies):
        return [bodies.qpos, bodies.qvel]

    def reward(self, task, velocity, place, action):
        return -abs(place - task).sum(-1)[..., None] - 0.1 * _squared(action)


def _check_finite(reward: Array, action: Array) -> None:
    # NaN and infinity spread into the sum, and a sum is quicker than a look at each.
    if math.isfinite(reward.sum()):
        return
    if not math.isfinite(action.sum()):
        raise FloatingPointError("an action is NaN or infinite: the policy has broken down, look at its losses.")
    raise FloatingPointError("the reward is not finite: MuJoCo could not solve a step, or the task is NaN or infinite.")


def _squared(action: Array) -> Array:
    return (action * action).sum(-1)[..., None]


# ---------------------------------------------------------------- tasks
def signs() -> TaskDistribution:
    """-1 or +1, each with probability 1/2, for `HalfCheetahDirection`.

    Examples:
        >>> signs()(torch.Size([5]), torch.Generator()).abs().unique()
        tensor([1.])
    """
    return lambda batch_size, generator: 2.0 * torch.randint(2, (*batch_size, 1), generator=generator) - 1.0


def velocities(low: float = 0.0, high: float = 2.0) -> TaskDistribution:
    """Velocities U[low, high] in m/s, for `HalfCheetahVelocity`; [0, 2] is the original's range, [0, 3] the later literature's.

    Raises:
        ValueError: ``high`` is not above ``low``.

    Examples:
        >>> velocities(0.0, 3.0)(torch.Size([4]), torch.Generator()).shape
        torch.Size([4, 1])
    """
    if not low < high:
        raise ValueError(f"velocities({low}, {high}): the second must be above the first.")
    return lambda batch_size, generator: low + (high - low) * torch.rand(*batch_size, 1, generator=generator)


def directions() -> TaskDistribution:
    """Unit vectors in all directions alike, for `AntDirection`.

    Examples:
        >>> directions()(torch.Size([4]), torch.Generator()).norm(dim=-1).round(decimals=4)
        tensor([1., 1., 1., 1.])
    """

    def draw(batch_size: torch.Size, generator: torch.Generator) -> torch.Tensor:
        angle = 2 * torch.pi * torch.rand(batch_size, generator=generator)
        return torch.stack((angle.cos(), angle.sin()), -1)

    return draw


def goals_in_disc(radius: float = 3.0) -> TaskDistribution:
    """Places in a disc around the start, uniform by area, for `AntGoal`.

    Examples:
        >>> bool((goals_in_disc(3.0)(torch.Size([100]), torch.Generator()).norm(dim=-1) <= 3).all())
        True
    """

    def draw(batch_size: torch.Size, generator: torch.Generator) -> torch.Tensor:
        distance = radius * torch.rand(batch_size, generator=generator).sqrt()
        return distance.unsqueeze(-1) * directions()(batch_size, generator)

    return draw
