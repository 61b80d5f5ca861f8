"""`AdaptiveAgent`: a trained policy to take away, which adapts to a task as it plays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from operator import is_not
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.envs import EnvBase

from rl2_torchrl.agent.architecture import build_policy, plan_of_policy
from rl2_torchrl.agent.export import export_policy, onnx_step
from rl2_torchrl.agent.files import read_agent, write_agent
from rl2_torchrl.agent.signature import Observed, Signature, name_of
from rl2_torchrl.agent.step import PolicyStep, actor_of, signature_of
from rl2_torchrl.arguments import require_env, require_flags, require_network, whole
from rl2_torchrl.modules.distributions import gumbel_

__all__ = ["AdaptiveAgent"]

Step = Callable[..., Sequence[Tensor]]


class AdaptiveAgent:
    """A trained policy without its env: it is shown observations, acts, is told rewards, and adapts in its memory.

    What training did around the policy is inside: the transition input with the last action, reward and done, normalisation, the
    scaling of observations, rewards and actions, bounds, and the numbers from which the env counts its choices. Observations,
    rewards and actions are those of the env itself (of Gymnasium's, under `GymVectorEnv`). It acts on the CPU.

    A trial is `new_trial`, then `act` and `observe` by turns, over as many episodes of one task as you like: `observe` says where
    one ends, and the next `act` is shown the new episode's first observation. Several trials run side by side in rows.

    Args:
        step: one step of N rows, such as a `PolicyStep`, or an exported graph of one:
            ``torch.export.load("agent.pt2").module()``.
        signature: what is handed over at a step, as `from_policy` reads it of an env.

    Attributes:
        step, signature: likewise.

    Examples:
        >>> from torchrl.envs import Compose, TransformedEnv
        >>> from rl2_torchrl import GRUCategoricalActor, PreviousStep, TaskSampler, Trial
        >>> from rl2_torchrl.envs import BernoulliBandit, uniform_means
        >>> trial = Compose(Trial(episodes=10), TaskSampler(uniform_means(3)), PreviousStep())
        >>> env = TransformedEnv(BernoulliBandit(3, batch_size=(4,)), trial)
        >>> agent = AdaptiveAgent.from_policy(GRUCategoricalActor.from_env(env), env)
        >>> agent.new_trial()
        >>> arm = agent.act()  # bandits show nothing; else agent.act(observation)
        >>> agent.observe(reward=1.0, done=True)
        >>> agent.new_trial(num_rows=8)  # eight bandits side by side
        >>> agent.act(deterministic=True).shape
        (8,)
    """

    def __init__(self, step: Step, signature: Signature):
        self.step, self.signature = step, signature
        modules = () if self.policy is None else self.policy.modules()
        self._places = [place for module in modules for place in (module._parameters, module._buffers) if place]
        # What the step's functions have read, and how often each had been written to by then.
        self._weights: list[Tensor] = []
        self._versions: list[int | None] = []
        self._is_single, self._start = True, None
        self._is_waiting, self._memory = False, []

    @property
    def policy(self) -> TensorDictModuleBase | None:
        """The agent's own actor, or None where ``step`` is another function.

        Weights loaded into it count from the next `act` on; written through ``.data``, which nobody sees, from the next trial on.
        """
        return self.step.policy if isinstance(self.step, PolicyStep) else None

    @property
    def memory(self) -> list[Tensor]:
        """What is handed on to the next step, as ``signature.memory`` names it, ``[N, ...]``; the last action comes first.

        Another may be put in its place within a trial; where one begins nobody looks at it: RuntimeError.
        """
        return self._memory

    @memory.setter
    def memory(self, memory: Sequence[Tensor]) -> None:
        if self._start is None or self._start.any():
            raise RuntimeError(
                "a trial begins, and no memory is looked at: to go on with one that was played before, load_state_dict(state) "
                "what state_dict() gave then, which has the last reward and done too."
            )
        self._memory = self._as_memory(memory, len(self._start))

    def _as_memory(self, memory: Sequence[Any], rows: int) -> list[Tensor]:
        memory = [torch.as_tensor(each, dtype=self.signature.dtype, device="cpu") for each in memory]
        shapes = [(rows, *shape) for shape in self.signature.memory.values()]
        if (given := [tuple(each.shape) for each in memory]) != shapes:
            names = list(self.signature.memory)
            raise ValueError(
                f"a memory of shapes {given}, and this agent's {names} has {shapes}: is it another policy's?"
            )
        return memory

    def state_dict(self) -> dict[str, Any]:
        """Where the trials stand: an agent of the same policy, in another process, say, goes on from it by `load_state_dict`.

        Raises:
            RuntimeError: no trial has begun.
        """
        if self._start is None:
            raise RuntimeError("no trial has begun, so there is nothing to go on from: call new_trial() first.")
        told = {"start": self._start, "reward": self._reward, "done": self._done}
        memory = dict(zip(self.signature.memory, self._memory, strict=True))
        flags = {"is_single": self._is_single, "is_waiting": self._is_waiting}
        return deepcopy({**flags, **told, "memory": memory})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` returned.

        Raises:
            KeyError: it is no such state.
            ValueError: its memory is that of another policy.
        """
        names = ("is_single", "is_waiting", "start", "reward", "done", "memory")
        if missing := [name for name in names if name not in state]:
            raise KeyError(f"the state lacks {missing}: it is what state_dict() of an AdaptiveAgent gives.")
        memory = [state["memory"][name] for name in self.signature.memory if name in state["memory"]]
        memory = self._as_memory(memory, len(state["start"]))
        self._is_single, self._is_waiting, *told = (deepcopy(state[name]) for name in names[:-1])
        self._start, self._reward, self._done = told
        self._memory = deepcopy(memory)
        self._read_weights()

    def __repr__(self) -> str:
        shapes = {name_of(key): list(each.spec.shape) for key, each in self.signature.observations.items()}
        shown = ", ".join(f"{name} {shape}" for name, shape in shapes.items()) or "nothing"
        acts, action = self.step if self.policy is None else self.policy, self.signature.action
        return f"AdaptiveAgent({type(acts).__name__}: {shown} -> {name_of(action.key)} {list(action.shape)} of {action.dtype})"

    # ------------------------------------------------------------ where it comes from
    @classmethod
    def from_policy(cls, policy: TensorDictModuleBase, env: EnvBase) -> AdaptiveAgent:
        """The agent of ``policy`` as it is now, trained on ``env``.

        Args:
            policy: an actor such as `RecurrentActor`, or an `ActorCritic`. It is copied.
            env: its trial env, with `PreviousStep`, of which specs and transforms are read.

        Raises:
            TypeError: the policy has no distribution that can act by noise, a memory that is no core's, or ``env`` is no env.
            NotImplementedError: the env has a transform that cannot be taken along.
            KeyError: the policy reads what the env does not show.
        """
        require_env(env, "from_policy(policy, env)")
        require_network(policy, "from_policy(policy, env)")
        # A copy: rollouts' functions hold on to the weights as they are, and a training may go on.
        actor = deepcopy(actor_of(policy)).cpu().eval()
        return cls(PolicyStep(actor, signature_of(actor, env)), signature_of(actor, env))

    @classmethod
    def load(cls, path: str | Path) -> AdaptiveAgent:
        """The agent of a file: one that `save` wrote, or an ``.onnx`` one (extra ``onnx``). Nothing is unpickled.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no agent's, only a part of one, damaged, or has a part that is not known here.
            ImportError: onnxruntime is missing.
        """
        path = Path(path)
        if path.suffix == ".onnx":
            return cls(*onnx_step(path))
        if path.suffix == ".pt2":
            raise ValueError(
                f"{path}: PyTorch reads .pt2 files by pickle, which runs what is planted there. Load the agent.safetensors that it "
                f"was made from, or where you trust it: AdaptiveAgent(torch.export.load({str(path)!r}).module(), agent.signature)."
            )
        about, weights = read_agent(path)
        signature = Signature.from_json(about["signature"])
        return cls(PolicyStep(build_policy(about["policy"], weights).eval(), signature), signature)

    def save(self, path: str | Path) -> Path:
        """Writes weights, architecture and the env's specs to one file, from which `load` needs nothing else; returns the path.

        Raises:
            TypeError: a part of the policy is not known by name (`rl2_torchrl.agent.register_part`), or there is no policy.
            ValueError: the path's suffix is that of an exported graph.
            IsADirectoryError: the path is a folder's.
        """
        if Path(path).is_dir():
            raise IsADirectoryError(f"{path} is a folder: name the file in it, {Path(path) / 'agent.safetensors'}.")
        if Path(path).suffix in (".onnx", ".pt2"):
            raise ValueError(f"{path}: such a file is a graph, which export() writes; save() writes .safetensors.")
        actor = self._actor()
        plan, weights = plan_of_policy(actor), actor.state_dict()
        build_policy(plan, weights)  # what cannot be loaded is noticed now
        return write_agent(path, {"policy": plan, "signature": self.signature.as_json()}, weights)

    def export(self, path: str | Path) -> Path:
        """Writes one step as a graph for other programs, by the path's suffix: ``.pt2`` (`torch.export`) or ``.onnx``.

        Inputs, each with any number of rows N first: the observations by name, ``reward`` and ``done`` of the last step, ``start``
        (bool: a trial begins, and the memory given is not looked at), ``noise`` ``[N, signature.noise_size]`` (standard
        ``signature.noise`` draws, zeros to act deterministically) and the memory, which begins with the last action. Outputs:
        ``action``, the distribution's parameters, and the memory to be given at the next step, under its name with ``next_``. All
        else is in the graph. An observation that has another's name is ``observation.<name>``, a parameter that has an
        observation's ``parameter.<name>``.

        ONNX takes and gives them by name; a ``.pt2`` takes them in the order of ``signature.inputs`` and gives a tuple:

            step = torch.export.load("agent.pt2").module()
            with torch.no_grad():
                action, *outputs = step(observation, reward, done, start, noise, *memory)
            memory = outputs[-len(agent.signature.memory):]  # at first zeros [N, *shape], of these shapes

        Raises:
            ValueError: another suffix, or what was made is no graph, as onnxruntime, where it is there, and ONNX's checker say.
            NotImplementedError: a part of the policy reads TensorDicts.
            ImportError: ``.onnx`` without the extra ``onnx``.
        """
        return export_policy(self._actor(), self.signature, Path(path))

    def _actor(self):
        if self.policy is None:
            raise TypeError(
                "this agent runs an exported graph, which has no policy to write: take the agent that it came from."
            )
        return self.policy

    # ----------------------------------------------------------------- a trial
    def new_trial(self, num_rows: int | None = None, *, rows: Any = None) -> None:
        """A new task begins, with a fresh memory.

        Args:
            num_rows: so many trials side by side; all arguments then are ``[num_rows, ...]``. None: one, without that dimension.
            rows: bool ``[num_rows]`` in a batch that runs: only these begin a new trial.

        Raises:
            ValueError: ``num_rows`` below 1, ``rows`` of another size, or both.
        """
        if rows is not None:
            if num_rows is not None:
                raise ValueError(
                    f"num_rows={num_rows} begins a batch, and rows= new trials in one that runs: leave one of the two out."
                )
            rows = torch.as_tensor(rows)
            fits = self._start is not None and rows.dtype == torch.bool and rows.shape == self._start.shape
            if not fits:
                raise ValueError(
                    f"rows={rows} must say of each row of a batch that runs whether it begins anew, bool [num_rows]: begin one "
                    "first, new_trial(num_rows)."
                )
            self._start = self._start | rows
            return
        count, signature = 1 if num_rows is None else whole("num_rows", num_rows), self.signature
        self._read_weights()
        self._is_single, self._is_waiting = num_rows is None, False
        self._start = torch.ones(count, dtype=torch.bool)
        self._reward, self._done = torch.zeros(count, dtype=torch.float32), torch.zeros(count, dtype=torch.bool)
        shapes = [(count, *shape) for shape in signature.memory.values()]
        self._memory = [torch.zeros(shape, dtype=signature.dtype) for shape in shapes]

    def _read_weights(self) -> None:
        """Has the step's functions follow the weights as they are, to which some of them hold on."""
        if self.policy is not None:
            self.step.read_weights()
            self._weights = self._present_weights()
            self._versions = list(map(_version, self._weights))

    def _present_weights(self) -> list[Tensor]:
        """The policy's weights; a walk over its modules at each step would take longer."""
        return [weight for place in self._places for weight in place.values() if weight is not None]

    @torch.no_grad()
    def act(self, observation: Any = None, *, deterministic: bool = False, noise: Tensor | None = None) -> Any:
        """The action for ``observation``, as Gymnasium's envs take it: a tensor where the observation is one, else of NumPy.

        Choices are numbers, where a TorchRL env may take one-hot vectors.

        Args:
            observation: what the env shows, ``[...]`` or ``[num_rows, ...]``: an array, tensor or number, a mapping or tuple where
                the env has several entries, None where it shows nothing.
            deterministic: act with the distribution's mode or mean. Default False: RL² explores by sampling, by PyTorch's
                default generator.
            noise: ``[num_rows, signature.noise_size]``, standard draws of ``signature.noise``, in place of the generator's.

        Raises:
            RuntimeError: no trial has begun, or the last action's reward was not told.
            TypeError: all that ``reset()`` or ``step()`` returned is given in the place of the observation, or an entry is no array
                of numbers.
            KeyError: an entry of the observation is missing.
            ValueError: an entry or ``noise`` has another shape, an entry numbers that its dtype in the env cannot hold, or there is
                ``noise`` for a deterministic action.
            FloatingPointError: it is not finite.
        """
        require_flags(deterministic=deterministic)
        if deterministic and noise is not None:
            raise ValueError("deterministic=True acts without noise: leave one of the two out.")
        if self._start is None:
            raise RuntimeError("no trial has begun: call new_trial() before the first act().")
        if self._is_waiting and not self._start.all():
            raise RuntimeError(
                "the last action's reward is missing, from which the agent learns: observe(reward, done) comes first."
            )
        weights = self._present_weights()
        if any(map(is_not, weights, self._weights)) or list(map(_version, weights)) != self._versions:
            self._read_weights()  # others were loaded in the middle of a trial
        entries = [self._entry(name_of(key), each, observation) for key, each in self.signature.observations.items()]
        noise = self._noise(deterministic) if noise is None else self._given(noise)
        told = (self._reward, self._done, self._start, noise)
        outputs = self.step(*[entry for entry, _ in entries], *told, *self._memory)
        action, self._memory = outputs[0], list(outputs[-len(self._memory) :])
        self._start, self._is_waiting = torch.zeros_like(self._start), True
        action = action[0] if self._is_single else action
        as_tensor = bool(entries) and all(is_tensor for _, is_tensor in entries)
        return action if as_tensor else action.numpy()[()]

    def observe(self, reward: Any, done: Any = False) -> None:
        """What came of the last action.

        Args:
            reward: its reward, a number or ``[num_rows]`` (or ``[num_rows, 1]``).
            done: whether it ended an *episode*, likewise, or one bool for all; the trial goes on in the next one until `new_trial`.
                Default False.

        Raises:
            RuntimeError: there was no action.
            ValueError: another number of rows, or a ``done`` that is neither True nor False.
            FloatingPointError: the reward is not finite.
        """
        if not self._is_waiting:
            raise RuntimeError("there is no action of which this could be the reward: act() comes first.")
        done = [done] * len(self._start) if isinstance(done, bool | np.bool_) else done
        reward, done = self._column("reward", reward).to(torch.float32), self._column("done", done)
        if done.dtype != torch.bool and ((done != 0) & (done != 1)).any():
            raise ValueError(
                f"done={done.tolist()} must be True or False, 1 or 0, of each trial: an episode ends or not."
            )
        if not reward.isfinite().all():
            raise FloatingPointError(
                f"the reward {reward.tolist()} is not finite: the memory would be NaN from here on."
            )
        self._reward, self._done, self._is_waiting = reward, done.bool(), False

    def _column(self, name: str, value: Any) -> Tensor:
        column = torch.empty(0) if value is None else torch.as_tensor(value, device="cpu").reshape(-1)
        if column.is_complex():
            raise TypeError(f"{name}={value!r} is complex: give real numbers.")
        if column.shape != self._start.shape:
            raise ValueError(f"{name} has {len(column)} numbers, but there are {len(self._start)} trials.")
        return column

    def _entry(self, name: str, observed: Observed, observation: Any) -> tuple[Tensor, bool]:
        """An entry ``[N, *shape]`` of what the env shows, and whether it came as a tensor."""
        value = _at(name, observation, observed.path, is_only=len(self.signature.observations) == 1)
        is_tensor, shape = isinstance(value, Tensor), (len(self._start), *observed.spec.shape)
        try:
            entry = torch.as_tensor(value if is_tensor else np.asarray(value, order="C"), device="cpu")
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"the observation {name!r} is no array of numbers, all its rows of one length: {error}"
            ) from error
        entry = entry.long() if entry.dtype in _UNSIGNED else entry
        given = tuple(entry.shape) if not self._is_single else (1, *entry.shape)
        # A scalar may stand for [1], and a vector for what the env nests; an image must have its own order.
        if given != shape and not (given[:1] == shape[:1] and entry.numel() == np.prod(shape) and len(shape) < 3):
            raise ValueError(
                f"the observation {name!r} has shape {tuple(entry.shape)}; it must be {shape[self._is_single :]}."
            )
        entry = entry.reshape(shape)
        cast = entry.to(dtype := observed.spec.dtype)
        reals = cast if dtype.is_floating_point else entry
        if reals.is_floating_point() and not reals.isfinite().all():
            raise FloatingPointError(
                f"the observation {name!r} is not finite in {reals.dtype}: the memory would be NaN from here on."
            )
        _require_choices(name, entry, observed)
        if not dtype.is_floating_point and (lost := cast.to(entry.dtype) != entry).any():
            raise ValueError(
                f"the observation {name!r} holds {entry[lost][0].item()}, which the env's {dtype} cannot: the policy would read "
                "another number. Give what the env shows: pixels from 0 to 255, say, and not from 0 to 1."
            )
        return cast, is_tensor

    def _given(self, noise: Any) -> Tensor:
        noise = torch.as_tensor(noise, dtype=self.signature.dtype, device="cpu")
        shape = (len(self._start), self.signature.noise_size)
        if noise.shape != shape:
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}; it must be {shape}, draws of its own for each row: rows that share them "
                "would act alike."
            )
        return noise

    def _noise(self, deterministic: bool) -> Tensor:
        noise = torch.zeros(len(self._start), self.signature.noise_size, dtype=self.signature.dtype)
        if deterministic:
            return noise
        if self.signature.noise == "normal":
            return noise.normal_()
        return gumbel_(noise.to(torch.promote_types(noise.dtype, torch.float32))).to(noise.dtype)


#: What PyTorch does not reckon with; `GymVectorEnv` shows such numbers as int64 too.
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


def _at(name: str, observation: Any, path: Sequence[str | int], *, is_only: bool) -> Any:
    """What lies at ``path`` in an observation."""
    is_shown_as_tuple = path and isinstance(path[0], int)
    if isinstance(observation, tuple) and not is_shown_as_tuple and any(isinstance(e, Mapping) for e in observation):
        raise TypeError(
            "a tuple with a mapping in it is no observation: of what reset() and step() return give the first alone."
        )
    if is_only and not isinstance(observation, Mapping | tuple):
        path = ()
    elif not path and isinstance(observation, Mapping):  # an env of one array, whose entry has this name
        path = (name,)
    for place in path:
        try:
            observation = observation[place]
        except (KeyError, IndexError, TypeError) as error:
            raise KeyError(f"the observation lacks {name!r}, which the policy reads.") from error
    if observation is None:
        raise ValueError(f"the policy reads {name!r}, and there is no observation: act(observation).")
    return observation


def _require_choices(name: str, entry: Tensor, observed: Observed) -> None:
    number = observed.number_of_choices
    if number is None:
        return
    choice = entry if observed.start is None else entry - observed.start
    if ((choice < 0) | (choice >= number)).any():
        raise ValueError(
            f"the observation {name!r} is {entry.tolist()}: choices are fewer than {number.tolist()}, from the env's first."
        )


def _version(weight: Tensor) -> int | None:
    """How often ``weight`` has been written to; None of one that does not count it."""
    return None if weight.is_inference() else weight._version
