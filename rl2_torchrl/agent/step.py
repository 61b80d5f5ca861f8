"""`PolicyStep`: one step of a policy, from what the env shows to what it takes, as a function of tensors alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from tensordict import NestedKey, TensorDict
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase, TensorDictSequential
from tensordict.utils import unravel_key
from torch import Tensor, nn
from torchrl.data import TensorSpec, Unbounded
from torchrl.envs import EnvBase, TensorDictPrimer

from rl2_torchrl.agent.signature import (
    Signature,
    acted_of,
    name_of,
    observed_of,
    require_nothing_behind,
    reward_of,
    transition_of,
)
from rl2_torchrl.modules import ActorCritic
from rl2_torchrl.modules.acting import ActingPart, State, acting_parts, dtype_of, on_state, step_of
from rl2_torchrl.modules.actor_critic import cores_of, first_memory, hidden_keys
from rl2_torchrl.modules.cores import where_rows
from rl2_torchrl.modules.distributions import distribution_of
from rl2_torchrl.trial import transforms_of

__all__ = ["LAST_ACTION", "PolicyStep", "actor_of", "signature_of"]

#: The memory's first entry: the policy's last action, as it stands in the transition input.
LAST_ACTION = "last_action"


class PolicyStep(nn.Module):
    """``(*observations, reward, done, start, noise, *memory) -> (action, *parameters, *memory)``, of N rows.

    Everything between env and policy is inside: transition input, normalisation, scaling, the memory's reset, the draw. With a
    noise of zeros the action is the distribution's mode. The memory begins with the last action, as the policy reads it.

    Args:
        policy: an actor; its weights are read now, and by `read_weights`, where ``compiled`` is set.
        signature: what it and the env hand each other.
        compiled: whether modules may act by compiled functions of their own, as in rollouts. Else they are PyTorch's operations,
            which can be exported. Default True.

    Raises:
        NotImplementedError: not ``compiled``, and a part is neither a core nor a function of tensors.
    """

    def __init__(self, policy: ProbabilisticTensorDictSequential, signature: Signature, *, compiled: bool = True):
        super().__init__()
        self.policy, self.signature, self._layout, self._is_compiled = policy, signature, signature.layout, compiled
        self._hidden_keys = hidden_keys(policy)
        self._next_keys = [unravel_key(("next", key)) for key in self._hidden_keys]
        *self._networks, sample = acting_parts(policy)
        self._distribution, self.parameter_keys = distribution_of(sample.module), sample.in_keys
        self._cores = cores_of(policy)
        self.read_weights()

    def __reduce__(self) -> tuple:
        # A copy's parts would be functions of this policy, and play its weights; to another process functions cannot go.
        return partial(type(self), compiled=self._is_compiled), (self.policy, self.signature)

    def read_weights(self) -> None:
        """Makes the modules' functions anew, some of which hold on to the weights as they were."""
        self._functions = [part.make(1) if self._is_compiled else _exportable(part) for part in self._networks]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Observations ``[N, ...]``, reward ``[N]``, done and start (bool ``[N]``), noise ``[N, noise_size]``, memory ``[N, ...]``.

        ``done`` is whether the last step ended an episode; where ``start`` is set a trial begins, and reward, done and memory are
        not looked at.
        """
        number = len(self.signature.observations)
        observed, (reward, done, start, noise, *memory) = tensors[:number], tensors[number:]
        start = start.unsqueeze(-1)
        state = self._state(observed, reward.unsqueeze(-1), done.unsqueeze(-1), start, memory)
        for function in self._functions:
            function(state)
        parameters = [state[key] for key in self.parameter_keys]
        drawn = self._distribution.with_noise(noise, *parameters)
        acted = self.signature.action
        scaled = acted.scaled(drawn)
        last_action = self._layout.action.encode(scaled, start.shape[:1], torch.float32).to(self.signature.dtype)
        handed_on = [last_action, *(state[key].to(self.signature.dtype) for key in self._next_keys)]
        return (acted.to_env(scaled), *parameters, *handed_on)

    def _state(self, observed, reward: Tensor, done: Tensor, start: Tensor, memory) -> State:
        """What the policy's modules read, reward, done and start being ``[N, 1]``."""
        signature, (last_action, *memory) = self.signature, memory
        entries = zip(signature.observations.items(), observed, strict=True)
        state: State = {key: entry.read(value) for (key, entry), value in entries}
        for affine in signature.reward:
            reward = affine(reward)
        shown = [state[key] for key in self._layout.observations]
        seen = self._layout.encode(shown, start.shape[:1], torch.float32)  # whatever the default is where it plays
        at_start = torch.full_like(reward, signature.done_at_start)
        told = torch.cat([last_action.to(reward.dtype), reward], -1)
        told = [torch.where(start, 0.0, told), torch.where(start, at_start, done.to(reward.dtype))]
        dtype = torch.promote_types(torch.float32, signature.dtype)  # a float64 encoder reads no float32
        state[signature.trans_key], state["is_init"] = torch.cat([*seen, *told], -1).to(dtype), start
        first = first_memory(self._cores, start.shape[0])
        for key, carried in zip(self._hidden_keys, memory, strict=True):
            # In the dtype that is carried, of counters and flags too: onnxruntime chooses between no flags.
            state[key] = where_rows(start.squeeze(-1), first[key].to(carried.dtype), carried).to(first[key].dtype)
        return state


def _exportable(part: ActingPart) -> Callable[[State], None]:
    """What a part does, in PyTorch's operations alone."""
    if (function := step_of(part.module, compiled=False)) is None:
        raise NotImplementedError(
            f"{type(part.module).__name__} reads a TensorDict, which no graph has: write it as a TensorDictModule of a function of "
            "tensors, or as a RecurrentCore."
        )
    return on_state(function, part.in_keys, part.module.out_keys)


# ------------------------------------------------------------------ of a policy
def actor_of(policy: TensorDictModuleBase) -> ProbabilisticTensorDictSequential:
    """The actor of ``policy``, which may be an `ActorCritic`, as its networks and the distribution.

    Raises:
        TypeError: it is no policy that an agent can be made of.
    """
    actor = policy.actor if isinstance(policy, ActorCritic) else policy
    parts = acting_parts(actor)
    distribution = distribution_of(parts[-1].module) if parts[-1].way == "distribution" else None
    if distribution is None or distribution.noise is None:
        raise TypeError(
            f"{type(actor).__name__}: an agent is made of networks and one distribution that can act by noise from outside, as "
            "RecurrentActor has them. Give a class of your own an ActionDistribution with `noise` and `with_noise`, by "
            "register_distribution."
        )
    of_cores = first_memory(cores_of(actor), 1)
    if missing := [key for key in hidden_keys(actor) if key not in of_cores]:
        raise TypeError(
            f"the policy hands {missing} on, and nothing says what they are when a trial starts: make its module a RecurrentCore, "
            "TorchRL's GRUModule a FastGRUModule, its LSTMModule an LSTMCore."
        )
    *networks, sample = actor.module
    if len(networks) == 1:
        return actor
    return ProbabilisticTensorDictSequential(TensorDictSequential(*networks), sample)  # of one flat sequence


def signature_of(actor: ProbabilisticTensorDictSequential, env: EnvBase) -> Signature:
    """What ``actor`` and ``env`` hand each other."""
    remembered = hidden_keys(actor)
    read = [key for key in actor.in_keys if key not in remembered and key != "is_init"]
    primed = {key for t in transforms_of(env) if isinstance(t, TensorDictPrimer) for key in t.primers.keys(True, True)}
    if kept := [key for key in read if key in primed and key in actor.out_keys]:
        raise TypeError(
            f"the policy keeps {kept} under one name from step to step, and an agent what a core hands on: make its module a "
            "RecurrentCore."
        )
    transition = transition_of(env, read)
    layout = transition.layout()
    whole = [key for key in read if key != transition.out_key and key not in layout.observations]
    require_nothing_behind(env, transition, [*layout.observations, env.reward_key])
    observations = observed_of(env, [*layout.observations, *whole])
    specs = {key: observed.spec for key, observed in observations.items()}
    firsts, distribution = first_memory(cores_of(actor), 1), distribution_of(actor.module[-1])
    return Signature(
        observations=observations,
        encoded=len(layout.observations),
        action=acted_of(env),
        trans_key=transition.out_key,
        done_at_start=transition.done_at_start,
        reward=reward_of(env),
        noise=distribution.noise,
        noise_size=_num_outputs(actor, {transition.out_key: Unbounded(layout.size), **specs}),
        memory={
            LAST_ACTION: (layout.action.size,),
            **{name_of(key): tuple(firsts[key].shape[1:]) for key in remembered},
        },
        dtype=dtype_of(firsts.values()),
    )


def _num_outputs(actor: ProbabilisticTensorDictSequential, specs: Mapping[NestedKey, TensorSpec]) -> int:
    """Numbers that the head of ``actor`` gives, which the draw's noise has as many of."""
    zeros = {key: torch.zeros(1, *spec.shape, dtype=spec.dtype) for key, spec in specs.items()}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        acted = actor(TensorDict({**zeros, "is_init": torch.ones(1, 1, dtype=torch.bool)}, [1]))
    return acted.get(actor.module[-1].in_keys[0]).shape[-1]
