"""HalfCheetah and Ant whose task is a direction, a velocity or a place to reach, a whole batch at once."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property, partial

import torch
from torch import Tensor
from torchrl.data import Bounded, Composite, Unbounded

from rl2_torchrl.arguments import above_0, as_batch_size, whole
from rl2_torchrl.envs.bandits import uniform_targets
from rl2_torchrl.envs.camera import Camera
from rl2_torchrl.envs.physics import Array, BackendName, Bodies, gymnasium_model, make_backend
from rl2_torchrl.envs.tensor_env import TensorEnv
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


class LocomotionEnv(TensorEnv):
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
        seed: seed of the env's own generator, which draws where an episode begins; None draws one from PyTorch's default generator.
        dtype: of observations and rewards, `torch.float32` (default) or `torch.float64`. The physics of "rollout" is in
            float64.
        device: device of all tensors. Defaults to the CPU.

    Raises:
        ImportError: MuJoCo is not installed (extra ``mujoco``).
        ValueError: an empty ``batch_size``, ``horizon`` below 1, another ``dtype``.
        FloatingPointError: an action is not finite, or the simulation blew up.

    Examples:
        >>> from tensordict import TensorDict
        >>> class HalfCheetahHeight(HalfCheetahVelocity):
        ...     def reward(self, task, velocity, place, action):
        ...         return -abs(self.physics.bodies.qpos[:, 1:2] - task)  # hold the torso at that height (m)
        >>> env = HalfCheetahHeight(batch_size=(2,), horizon=50, seed=0)
        >>> td = env.reset(TensorDict({"task": torch.tensor([[0.0], [0.2]])}, [2]))
        >>> env.rollout(50, auto_reset=False, tensordict=td)["next", "reward"].shape
        torch.Size([2, 50, 1])
    """

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
        batch_size, horizon = as_batch_size(batch_size), whole("horizon", horizon)
        if 0 in batch_size:
            raise ValueError(f"batch_size={tuple(batch_size)}: there must be at least one env.")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"dtype={dtype}: the physics hands over torch.float32 or torch.float64; convert afterwards."
            )
        device = torch.device(device or "cpu")
        self.physics = make_backend(
            backend, gymnasium_model(self.model_file), batch_size.numel(), self.frame_skip, num_threads, device
        )
        self.model = self.physics.mj_model
        #: Seconds of a step.
        self.dt = self.frame_skip * self.model.opt.timestep
        self.dtype = dtype
        self._camera: Camera | None = None
        low, high = torch.from_numpy(self.model.actuator_ctrlrange).to(dtype).unbind(-1)
        observation_size = sum(part.shape[-1] for part in self._features(self.physics.bodies))
        super().__init__(
            task_spec=Unbounded(self.task_size),  # float32 whatever dtype is, as distributions draw it
            observation_spec=Unbounded(observation_size, dtype=dtype),
            action_spec=Bounded(low.contiguous(), high.contiguous(), dtype=dtype),
            reward_spec=Unbounded(1, dtype=dtype),
            more_spec=Composite(velocity=Unbounded(self.axes, dtype=dtype)),
            batch_size=batch_size,
            max_episode_steps=horizon,
            fixed_length=True,
            seed=seed,
            device=device,
        )

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

    # ---------------------------------------------------------------- steps
    def begin(self, task: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Puts ``rows`` near the model's initial pose, at rest but for noise, as Gymnasium does; the state is the task."""
        number, factory = rows.numel(), {"dtype": torch.float64, "device": self.device}
        noise = torch.empty(number, self.model.nq, **factory).uniform_(-0.1, 0.1, generator=self.generator)
        qvel = 0.1 * torch.randn(number, self.model.nv, generator=self.generator, **factory)
        qpos = torch.from_numpy(self.model.qpos0).to(noise) + noise
        self.physics.reset_mask(rows.flatten(), qpos, qvel)
        return task, self._observe()

    def advance(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """A step of the simulation, which itself holds where the bodies are."""
        physics = self.physics
        control = physics.array(action)
        physics.step(control)
        place = physics.bodies.qpos[:, : self.axes]
        reward = self.reward(physics.array(state), self._velocity(), place, control)
        self._check_step(reward, control)
        return state, self._observe(), self._tensor(reward), None, None

    def observe_more(self, state: Tensor) -> dict[str, Tensor]:
        """The torso's mean velocity over the last step."""
        return {"velocity": self._tensor(self._velocity())}

    def _check_step(self, reward: Array, action: Array) -> None:
        if reward.shape != (len(action), 1):
            raise ValueError(
                f"{type(self).__name__}.reward() gives {list(reward.shape)}: it must be {[len(action), 1]}, one a row; a sum over "
                "the last dimension is made so by [..., None]."
            )
        # NaN and infinity spread into the sum, and a sum is quicker than a look at each.
        if math.isfinite(reward.sum()) and not self.physics.has_failed:
            return
        if not math.isfinite(action.sum()):
            raise FloatingPointError("an action is NaN or infinite: the policy has broken down, look at its losses.")
        if self.physics.has_failed:
            raise FloatingPointError(
                "the simulation blew up: MuJoCo could not solve a step, and has put the row back to the model's initial pose in "
                "mid-episode. Is what a task or you have changed in model or bodies possible?"
            )
        raise FloatingPointError("the reward is not finite: the task is NaN or infinite, or reward() makes it so.")

    def _velocity(self) -> Array:
        """Mean velocity ``[N, axes]`` over the last step, in m/s; 0 where an episode has just begun."""
        bodies = self.physics.bodies
        return (bodies.qpos[:, : self.axes] - bodies.start_qpos[:, : self.axes]) / self.dt

    def _observe(self) -> Tensor:
        return self._tensor(*self._features(self.physics.bodies))

    def _tensor(self, *parts: Array) -> Tensor:
        """``parts``, each ``[N, size]``, side by side as a new tensor ``[*B, sum of sizes]`` of the env's dtype."""
        return self.physics.join(parts, self.dtype).reshape(*self.batch_size, -1)

    # ----------------------------------------------------------- checkpoints
    def get_outside_state(self) -> list[Tensor]:
        """Where the bodies are."""
        return [getattr(self.physics, name) for name in Bodies._fields]

    def set_outside_state(self, tensors: Sequence[Tensor]) -> None:
        """Puts the bodies back."""
        bodies = Bodies(*tensors)
        self.physics.reset_mask(self._every_row.flatten(), bodies.qpos, bodies.qvel)
        self.physics.earlier_qpos[:], self.physics.start_qpos[:] = bodies.earlier_qpos, bodies.start_qpos

    # -------------------------------------------------------------- pictures
    def render(self, row: int = 0, *, width: int = 480, height: int = 320, camera: str | int = "track") -> Tensor:
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
        >>> from tensordict import TensorDict
        >>> env = HalfCheetahDirection(batch_size=(2,), seed=0)
        >>> td = env.reset(TensorDict({"task": torch.tensor([[1.0], [-1.0]])}, [2]))
        >>> td["observation"].shape, env.action_spec.shape
        (torch.Size([2, 20]), torch.Size([2, 6]))
    """

    def reward(self, task: Array, velocity: Array, place: Array, action: Array) -> Array:
        return task * velocity - 0.05 * _squared(action)


class HalfCheetahVelocity(_HalfCheetah):
    """HalfCheetah that shall run at the task's velocity: ``-|v_x - task| - 0.05 |action|²`` (m/s).

    Observation ``[*B, 20]``: ``qpos`` without the place along the track, ``qvel``, and the torso's place (x, y, z), which MuJoCo
    leaves as it was one step of the simulation (10 ms) before. Task ``[*B, 1]``, action ``[*B, 6]``.
    Arguments: those of `LocomotionEnv`.

    Examples:
        >>> from tensordict import TensorDict
        >>> env = HalfCheetahVelocity(batch_size=(2,), seed=0)
        >>> td = env.reset(TensorDict({"task": torch.tensor([[0.0], [1.5]])}, [2]))
        >>> env.step(td.set("action", torch.zeros(2, 6)))["next", "velocity"].shape
        torch.Size([2, 1])
    """

    def reward(self, task: Array, velocity: Array, place: Array, action: Array) -> Array:
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
        >>> from tensordict import TensorDict
        >>> env = AntDirection(batch_size=(2,), seed=0)
        >>> env.reset(TensorDict({"task": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}, [2]))["observation"].shape
        torch.Size([2, 27])
    """

    def reward(self, task: Array, velocity: Array, place: Array, action: Array) -> Array:
        return (task * velocity).sum(-1)[..., None] + self._upright() - 0.5 * _squared(action)


class AntGoal(_Ant):
    """Ant that shall reach the task, a place (x, y) in metres: ``-|place - task|₁ - 0.1 |action|²``; observation ``[*B, 29]``.

    As VariBAD's AntGoal (Zintgraf et al. 2020), without its cost of contacts. Observation: ``qpos`` and ``qvel``. Task
    ``[*B, 2]``, action ``[*B, 8]``. Arguments: those of `LocomotionEnv`.

    Examples:
        >>> from tensordict import TensorDict
        >>> env = AntGoal(batch_size=(2,), seed=0)
        >>> env.reset(TensorDict({"task": torch.tensor([[1.0, 0.0], [0.0, 3.0]])}, [2]))["observation"].shape
        torch.Size([2, 29])
    """

    def _features(self, bodies):
        return [bodies.qpos, bodies.qvel]

    def reward(self, task: Array, velocity: Array, place: Array, action: Array) -> Array:
        return -abs(place - task).sum(-1)[..., None] - 0.1 * _squared(action)


def _squared(action: Array) -> Array:
    return (action * action).sum(-1)[..., None]


# ---------------------------------------------------------------- tasks
def signs() -> TaskDistribution:
    """-1 or +1, each with probability 1/2, for `HalfCheetahDirection`.

    Examples:
        >>> signs()(torch.Size([5]), torch.Generator()).abs().unique()
        tensor([1.])
    """
    return _signs


def _signs(batch_size: torch.Size, generator: torch.Generator) -> Tensor:
    return 2.0 * torch.randint(2, (*batch_size, 1), generator=generator) - 1.0


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
    return uniform_targets(1, low, high)


def directions() -> TaskDistribution:
    """Unit vectors in all directions alike, for `AntDirection`.

    Examples:
        >>> directions()(torch.Size([4]), torch.Generator()).norm(dim=-1).round(decimals=4)
        tensor([1., 1., 1., 1.])
    """
    return _directions


def _directions(batch_size: torch.Size, generator: torch.Generator) -> Tensor:
    angle = 2 * torch.pi * torch.rand(batch_size, generator=generator)
    return torch.stack((angle.cos(), angle.sin()), -1)


def goals_in_disc(radius: float = 3.0) -> TaskDistribution:
    """Places in a disc around the start, uniform by area, for `AntGoal`.

    Raises:
        ValueError: ``radius`` is not above 0.

    Examples:
        >>> bool((goals_in_disc(3.0)(torch.Size([100]), torch.Generator()).norm(dim=-1) <= 3).all())
        True
    """
    return partial(_in_disc, radius=above_0("radius", radius))


def _in_disc(batch_size: torch.Size, generator: torch.Generator, *, radius: float) -> Tensor:
    distance = radius * torch.rand(batch_size, generator=generator).sqrt()
    return distance.unsqueeze(-1) * _directions(batch_size, generator)
