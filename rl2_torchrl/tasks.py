"""`TaskSampler`: draws the task when a trial starts, and keeps it until the trial's end."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from hashlib import sha256
from types import MethodType
from typing import Any
from weakref import ref

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import nn
from torchrl.data import Composite, TensorSpec
from torchrl.envs import Compose, EnvBase, Transform

from rl2_torchrl.seeding import derived_seed, require_seed, seed_generator
from rl2_torchrl.storage import from_tensor, to_bytes, to_tensor

__all__ = ["TaskDistribution", "TaskSampler"]

#: A task distribution: ``(batch_size, generator) -> task``, the task of shape ``[*batch_size, ...]``.
TaskDistribution = Callable[[torch.Size, torch.Generator], torch.Tensor | TensorDictBase]


class TaskSampler(Transform):
    """Draws a task for every row of which a trial starts, and writes it under ``"task"``.

    The task is a reset input of the base env (it must stand in the env's ``state_spec``), is constant over the trial,
    and is an entry of the collected data. It must never be an input of the policy.

    A task that is given to ``env.reset(TensorDict({"task": ...}))`` is taken in place of a drawn one; the resets that
    collectors and rollouts make on their own never carry one.

    Args:
        distribution: callable ``(batch_size, generator) -> task`` with a task of shape ``[*batch_size, ...]``. One that changes in
            the course of a training, such as a curriculum, is an object, or a method of one: its attributes go on in a resumed run,
            or what its ``state_dict`` and ``load_state_dict`` say.
        seed: seed of the sampler's own generator, whose numbers are not those of an env or a `torch.Generator` of the same seed;
            None draws one from PyTorch's default generator. Samplers of training tasks and of held-out ones must have different
            seeds; they stay different when ``env.set_seed`` or ``collector.set_seed`` give both envs one seed, which is joined
            with this one. Of two without a seed that makes one and the same. A `clone` around another env gets a seed that
            follows from this one.
            Inside the workers of a ``SerialEnv`` or ``ParallelEnv`` each worker needs a seed of its own, or none
            (``create_env_kwargs=[{"seed": 0}, {"seed": 1}, ...]``), or all workers draw the same tasks; better, put
            the sampler around the batched env: ``TransformedEnv(ParallelEnv(...), Compose(Trial(...), TaskSampler(...)))``.
        task_key: entry that the task is written to. Defaults to ``"task"``.

    Raises:
        KeyError: the base env has no ``task_key`` in its ``state_spec``, so that the task could not reach it.
        ValueError: a drawn task does not fit the env's ``state_spec``, but for its bounds, which are not looked at. What the env
            itself shows under that name is written over.

    Examples:
        >>> from torchrl.envs import Compose, TransformedEnv
        >>> from rl2_torchrl.envs import BernoulliBandit, uniform_means
        >>> from rl2_torchrl.trial import Trial
        >>> env = TransformedEnv(
        ...     BernoulliBandit(num_arms=3, batch_size=(4,)),
        ...     Compose(Trial(episodes=10), TaskSampler(uniform_means(3), seed=0)),
        ... )
        >>> env.reset()["task"].shape
        torch.Size([4, 3])
    """

    _is_clone = False

    def __init__(self, distribution: TaskDistribution, *, seed: int | None = None, task_key: NestedKey = "task"):
        super().__init__()
        if not callable(distribution):
            raise TypeError(
                f"TaskSampler needs a callable (batch_size, generator) -> task, got {type(distribution).__name__}. For a given "
                "list of tasks use TaskSampler.fixed(tasks)."
            )
        self.distribution = distribution
        self.task_key = task_key
        self._stream = _Stream(task_key)
        self.seed(seed)

    @classmethod
    def fixed(cls, tasks: torch.Tensor | TensorDictBase, *, task_key: NestedKey = "task") -> TaskSampler:
        """A sampler that hands out given tasks in order, for evaluation; after the last it begins again.

        Args:
            tasks: the tasks, of shape ``[num_tasks, ...]``.
            task_key: entry that the task is written to.

        Raises:
            ValueError: there is no task.

        Examples:
            >>> sampler = TaskSampler.fixed(torch.tensor([[0.1], [0.2], [0.3]]))
            >>> sampler.distribution(torch.Size([2]), sampler.generator).squeeze(-1)
            tensor([0.1000, 0.2000])
            >>> sampler.distribution(torch.Size([2]), sampler.generator).squeeze(-1)
            tensor([0.3000, 0.1000])
        """
        return cls(_InOrder(tasks), seed=0, task_key=task_key)

    def __repr__(self) -> str:
        if isinstance(self.distribution, _InOrder):
            return f"{type(self).__name__}.fixed({len(self.distribution.tasks)} tasks)"
        owner = owner_of(self.distribution)
        name = getattr(owner, "__qualname__", type(owner).__name__)
        return f"{type(self).__name__}({name}, seed={self.given_seed})"

    def rewind(self) -> None:
        """Hands out `fixed` tasks from the first one on; of drawn tasks there is no first one."""
        if isinstance(self.distribution, _InOrder):
            self.distribution.position = 0

    @property
    def generator(self) -> torch.Generator:
        """What all tasks are drawn from."""
        return self._stream.generator

    @property
    def given_seed(self) -> int | None:
        """The seed that the sampler was given, or None."""
        return self._stream.seed

    def seed(self, seed: int | None) -> None:
        """Seeds the sampler's own generator; None draws a seed from PyTorch's default generator."""
        require_seed(seed)
        self._stream.seed = seed
        # The seed of an env, or of held-out tasks, may be the same number: from it itself all would draw the same numbers.
        seed_generator(self.generator, None if seed is None else derived_seed(seed, str(self.task_key)))

    def set_container(self, container: Transform | EnvBase) -> None:
        """Called by TorchRL when the sampler is put around an env, whose ``set_seed`` reaches it from then on."""
        super().set_container(container)
        while isinstance(container, Compose):  # which may not stand in an env yet
            within = container.__dict__.get("_container")
            container = None if within is None else within()
        if container is not None:
            self._stand_around(container.base_env)

    def clone(self) -> TaskSampler:
        """A sampler of the same tasks, around the same env of the same draws."""
        clone = super().clone()
        clone._is_clone = True
        return clone

    def _stand_around(self, env: EnvBase) -> None:
        if self._is_clone and self._stream.is_elsewhere(env):
            seed = self._stream.next_seed()
            self._stream = _Stream(self.task_key)
            self.seed(seed)
        self._stream.env = ref(env)
        # In place of the env's own, where none is there yet.
        relay = env.__dict__.setdefault("set_seed", _SeedRelay(env))
        if self._stream not in relay.streams:
            relay.streams.append(self._stream)

    # --------------------------------------------------------------- resets
    def _reset_env_preprocess(self, tensordict: TensorDictBase | None) -> TensorDictBase:
        env = self._base_env
        if tensordict is None:
            tensordict = TensorDict({}, batch_size=env.batch_size, device=env.device)
        if self.task_key in tensordict.keys(True):
            self._require_fit(
                "the task given to reset() is", tensordict.get(self.task_key), env.batch_size, self._task_spec
            )
            return tensordict
        rows = tensordict.get("_reset", None)
        return tensordict.copy().set(self.task_key, self.draw(rows))

    def draw(self, rows: torch.Tensor | None = None) -> torch.Tensor | TensorDictBase:
        """Tasks ``[*B, ...]``; only those of ``rows`` are new draws, so that a partial reset uses up no others."""
        spec = self._task_spec
        if rows is None or rows.all():
            return self._sample(self._base_env.batch_size, spec)
        rows = rows.reshape(self._base_env.batch_size)
        tasks = spec.zero()
        tasks[rows] = self._sample(torch.Size([int(rows.sum())]), spec)
        return tasks

    def _sample(self, batch_size: torch.Size, spec: TensorSpec) -> torch.Tensor | TensorDictBase:
        task = self.distribution(batch_size, self.generator)
        if not isinstance(task, torch.Tensor | TensorDictBase):
            raise TypeError(
                f"the task distribution gave a {type(task).__name__}: it returns a tensor or TensorDict [*batch_size, ...], drawn "
                "by the torch.Generator that it is given, so that tasks follow the seed."
            )
        # A copy: the distribution may draw its next tasks into the same memory.
        task = task.to(spec.device).clone()
        self._require_fit("the task distribution gave", task, batch_size, spec)
        return task

    def _require_fit(
        self, said: str, task: torch.Tensor | TensorDictBase, batch_size: torch.Size, spec: TensorSpec
    ) -> None:
        given, asked = _leaves(task, 0), _leaves(spec, len(self._base_env.batch_size))
        asked = {name: (torch.Size([*batch_size, *shape]), dtype) for name, (shape, dtype) in asked.items()}
        if given != asked:
            raise ValueError(
                f"{said} {_in_words(given)} for batch_size {tuple(batch_size)}; the env's state_spec asks for {_in_words(asked)}: "
                "one task a row, [*batch_size, ...]."
            )

    def _reset(self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase) -> TensorDictBase:
        return tensordict_reset.set(self.task_key, tensordict.get(self.task_key).clone())

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        return next_tensordict.set(self.task_key, tensordict.get(self.task_key))

    # ---------------------------------------------------------------- specs
    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        observation_spec[self.task_key] = self._task_spec.clone()
        return observation_spec

    @property
    def _task_spec(self) -> TensorSpec:
        state_spec = self._base_env.full_state_spec
        if self.task_key not in state_spec.keys(True):
            raise KeyError(
                f"{type(self._base_env).__name__} has no {self.task_key!r} in its state_spec, so a drawn task could not "
                f"reach it and every trial would be the same. Its state_spec has {sorted(map(str, state_spec.keys(True)))}. "
                "Declare the task there and read it in _reset (help(rl2_torchrl.envs) shows how); for Gymnasium envs: GymVectorEnv."
            )
        return state_spec[self.task_key]

    @property
    def _base_env(self):
        return self.container.base_env

    # ----------------------------------------------------------- checkpoints
    def get_extra_state(self) -> torch.Tensor:
        """Generator, and the distribution's ``state_dict``: with them a resumed run draws the tasks that the unbroken one would."""
        owner = self._owner_of_a_state
        own = None if owner is None else owner.state_dict()
        # One plain tensor: TorchRL's EnvCreator, which ParallelEnv wraps around a lambda, copies all other state into
        # every worker, and all workers would draw identical tasks.
        return to_tensor({"generator": self.generator.get_state(), "distribution": own})

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Restores what `get_extra_state` returned."""
        saved = from_tensor(state, "the state of a TaskSampler")
        self.generator.set_state(saved["generator"])
        if (owner := self._owner_of_a_state) is not None and saved["distribution"] is not None:
            owner.load_state_dict(saved["distribution"])

    @property
    def _owner_of_a_state(self) -> Any:
        """What draws the tasks, if it has a state of its own; a module's is among this one's, or it may hold this one."""
        owner = owner_of(self.distribution)
        return owner if hasattr(owner, "state_dict") and not isinstance(owner, nn.Module) else None

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        raise RuntimeError("TaskSampler is a transform of environments; it has no meaning in a replay buffer.")


def owner_of(distribution: TaskDistribution) -> Any:
    """The object whose method ``distribution`` is, or the function, without arguments that are given to it ahead."""
    while isinstance(distribution, partial):
        distribution = distribution.func
    is_of_object = isinstance(distribution, MethodType) and not isinstance(distribution.__self__, type)
    return distribution.__self__ if is_of_object else distribution


_Leaves = dict[NestedKey, tuple[torch.Size, torch.dtype]]


def _leaves(of: torch.Tensor | TensorDictBase | TensorSpec, num_rows: int) -> _Leaves:
    """Shape without the first ``num_rows`` dimensions, and dtype, of a task or its spec; of a TensorDict by name."""
    return {name: (each.shape[num_rows:], each.dtype) for name, each in _items(of)}


def _items(of: torch.Tensor | TensorDictBase | TensorSpec) -> Iterable[tuple[NestedKey, Any]]:
    return of.items(True, True) if isinstance(of, TensorDictBase | Composite) else [("", of)]


def _in_words(leaves: _Leaves) -> str:
    return ", ".join(f"{name} {tuple(shape)} of {dtype}".lstrip() for name, (shape, dtype) in leaves.items())


class _Stream:
    """Where a sampler's tasks are drawn from; the clones that TorchRL makes of a sampler around the same env share it.

    Attributes:
        generator: the generator.
        seed: its own seed, or None.
        task_key: entry of the tasks; samplers of one env draw different numbers.
        env: the env innermost that the tasks are for, weakly.
    """

    def __init__(self, task_key: NestedKey):
        self.generator, self.seed, self.task_key = torch.Generator(), None, task_key
        self.env: ref[EnvBase] | None = None
        self._others = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "env": None}

    def is_elsewhere(self, env: EnvBase) -> bool:
        """Whether it is of another env than ``env``, be that gone or not: when it goes is the garbage collector's to say."""
        return self.env is not None and self.env() is not env

    def next_seed(self) -> int | None:
        """The seed of one more stream like this, around another env."""
        self._others += 1
        return None if self.seed is None else derived_seed(self.seed, "clone", self._others)

    def join(self, seed: int | None) -> None:
        """Seeds the generator as ``seed`` and its own seed say."""
        joined = None if seed is None else derived_seed(seed, self.seed, str(self.task_key))
        seed_generator(self.generator, joined)


class _SeedRelay:
    """An env's ``set_seed``, which reaches the samplers around it too: `TransformedEnv` hands a seed to its base env alone."""

    def __init__(self, env: EnvBase):
        self.env = env
        #: Those of the samplers, which are seeded whenever the env is.
        self.streams: list[_Stream] = []

    def __call__(self, seed: int | None = None, static_seed: bool = False) -> int | None:
        """`EnvBase.set_seed`."""
        following = type(self.env).set_seed(self.env, seed, static_seed=static_seed)
        for stream in self.streams:
            stream.join(seed)
        return following


class _InOrder:
    """The task distribution of `TaskSampler.fixed`: row after row of ``tasks`` [num_tasks, ...], round and round."""

    def __init__(self, tasks: torch.Tensor | TensorDictBase):
        if not isinstance(tasks, torch.Tensor | TensorDictBase):
            raise TypeError(
                f"TaskSampler.fixed got a {type(tasks).__name__}: give a tensor or TensorDict [num_tasks, ...], such as "
                "torch.as_tensor(tasks, dtype=torch.float32)."
            )
        if not tasks.ndim or not len(tasks):
            raise ValueError(
                f"TaskSampler.fixed got no task, its shape is {list(tasks.shape)}: give [num_tasks, ...], of a TensorDict by its "
                "batch_size=[num_tasks]."
            )
        self.tasks = tasks
        self.position = 0
        #: What a run's settings say of them: it goes on with no others.
        plain = tasks.to_dict() if isinstance(tasks, TensorDictBase) else tasks
        self.digest = sha256(to_bytes(plain)).hexdigest()[:16]

    def __call__(self, batch_size: torch.Size, generator: torch.Generator) -> torch.Tensor | TensorDictBase:
        index = (self.position + torch.arange(batch_size.numel())) % len(self.tasks)
        self.position = (self.position + batch_size.numel()) % len(self.tasks)
        tasks = self.tasks[index]
        return tasks.reshape(*batch_size, *tasks.shape[1:])

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]
