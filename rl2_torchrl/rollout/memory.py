"""`Memory`: what a policy hands on from step to step, and what it is at a trial's first step."""

from __future__ import annotations

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import Compose, EnvBase, TensorDictPrimer, TransformedEnv
from torchrl.modules.utils import get_primers_from_module

from rl2_torchrl.modules.acting import State
from rl2_torchrl.modules.actor_critic import hidden_keys
from rl2_torchrl.rollout.clock import Rows
from rl2_torchrl.rollout.entries import next_key, where_rows

__all__ = ["Memory", "own_transforms"]


class Memory:
    """The hidden states of ``policy`` for N rows: at a trial's start what its cores say, or else the primers of env or modules.

    Raises:
        KeyError: the policy hands an entry on that neither has a primer for.
    """

    def __init__(self, policy: TensorDictModuleBase, env: EnvBase, rows: int):
        self._rows = rows
        #: The entries that are handed on, and where they stand after a step.
        self.handed_on = [(key, next_key(key)) for key in hidden_keys(policy)]
        # Of the class: a TensorDictModule passes on what its inner module has.
        self._cores = [module for module in policy.modules() if hasattr(type(module), "initial_memory")]
        of_cores = {key for core in self._cores for key in core.in_keys}
        others = [key for key, _ in self.handed_on if key not in of_cores]
        primers = _primers(policy, env) if others else {}
        missing = [key for key in others if key not in primers]
        if missing:
            raise KeyError(
                f"the policy hands {missing} on to its next step, but nothing says what they are at a trial's first: give the "
                "module a make_tensordict_primer(), as torchrl.modules.GRUModule has, or the env a TensorDictPrimer."
            )
        self._primers = {key: primers[key] for key in others}
        self._constant = {
            key: self._draw(key)
            for key, (p, _) in self._primers.items()
            if not (p.random or callable(p.default_value[key]))
        }

    def initial(self) -> State:
        """Values ``[N, ...]`` at a trial's first step."""
        memory = {key: self._constant[key] if key in self._constant else self._draw(key) for key in self._primers}
        for core in self._cores:
            memory.update(zip(core.in_keys[1:-1], core.initial_memory(self._rows), strict=True))
        return memory

    def next(self, state: State, reset: Rows) -> State:
        """What the next step reads, with the ``reset`` rows at a trial's first step."""
        if reset is True:
            return self.initial()
        memory = {key: state[following] for key, following in self.handed_on}
        if reset is not False:
            for key, first in self.initial().items():
                memory[key] = where_rows(reset, first, memory[key])
        return memory

    def _draw(self, key: NestedKey) -> torch.Tensor:
        primer, features = self._primers[key]
        spec, shape = primer.primers[key], (self._rows, *features)
        if primer.random:
            return spec.expand(shape).rand() if spec.shape == features else spec.rand().reshape(shape)
        value = primer.default_value[key]
        value = value() if callable(value) else value
        return torch.as_tensor(value, dtype=spec.dtype, device=spec.device).expand(shape).contiguous()


def _primers(policy: TensorDictModuleBase, env: EnvBase) -> dict[NestedKey, tuple[TensorDictPrimer, torch.Size]]:
    """Primer and feature shape by entry; an env's own come before those that the policy's modules would bring."""
    made = get_primers_from_module(policy, warn=False)
    primers = made if isinstance(made, Compose) else [] if made is None else [made]
    found = {key: (primer, spec.shape) for primer in primers for key, spec in primer.primers.items(True, True)}
    while isinstance(env, TransformedEnv):
        dims = len(env.batch_size)
        for primer in (t for t in own_transforms(env) if isinstance(t, TensorDictPrimer)):
            _ = env.output_spec  # expands the primer's specs by the env's batch size
            found |= {key: (primer, spec.shape[dims:]) for key, spec in primer.primers.items(True, True)}
        env = env.base_env
    return found


def own_transforms(env: EnvBase) -> list:
    """The transforms of ``env`` itself, not those of an env inside it."""
    if not isinstance(env, TransformedEnv):
        return []
    return list(env.transform) if isinstance(env.transform, Compose) else [env.transform]
