"""`Memory`: what a policy hands on from step to step, and what it is at a trial's first step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import Compose, EnvBase, TensorDictPrimer, TransformedEnv
from torchrl.modules.utils import get_primers_from_module

from rl2_torchrl.modules.acting import State
from rl2_torchrl.modules.actor_critic import cores_of, first_memory, hidden_keys
from rl2_torchrl.modules.cores import where_rows
from rl2_torchrl.rollout.clock import Rows
from rl2_torchrl.rollout.trials import flat, next_key
from rl2_torchrl.trial import own_transforms

__all__ = ["Memory"]


class Memory:
    """The hidden states of ``policy`` for N rows: at a trial's start what its cores say, or else the primers of env or modules.

    Raises:
        KeyError: the policy hands an entry on that neither has a primer for.
    """

    def __init__(self, policy: TensorDictModuleBase, env: EnvBase, rows: int):
        self._rows = rows
        #: The entries that are handed on, and where they stand after a step.
        self.handed_on = [(key, next_key(key)) for key in hidden_keys(policy)]
        made = get_primers_from_module(policy, warn=False)
        own = [*made] if isinstance(made, Compose) else [made] if made is not None else []
        # What it reads and writes at the root, and has a primer for, it hands on, too, as TensorDictPrimer does.
        primed = {key for primer in own if primer.expand_specs for key in primer.primers.keys(True, True)}
        shown = set(env.full_observation_spec.keys(True, True))  # that of a collector has such a primer itself
        self.handed_on += [(k, k) for k in policy.in_keys if k in primed and k in policy.out_keys and k not in shown]
        self._cores = cores_of(policy)
        of_cores = {key for core in self._cores for key in core.in_keys}
        missing = [key for key, _ in self.handed_on if key not in of_cores]
        self._primers = []
        for primer, batch_size in _primers(own, env, rows) if missing else ():
            keys = [key for key in missing if key in primer.primers.keys(True, True)]
            self._primers.append((primer, batch_size, keys))
            missing = [key for key in missing if key not in keys]
        if missing:
            raise KeyError(
                f"the policy hands {missing} on to its next step, but nothing says what they are at a trial's first: give the "
                "module a make_tensordict_primer(), as torchrl.modules.GRUModule has, or the env a TensorDictPrimer."
            )

    def initial(self) -> State:
        """Values ``[N, ...]`` at a trial's first step."""
        memory: State = {}
        for primer, batch_size, keys in self._primers:
            made = primer(TensorDict({}, batch_size))
            memory.update((key, flat(made[key], batch_size)) for key in keys)
        return memory | first_memory(self._cores, self._rows)

    def next(self, state: State, reset: Rows) -> State:
        """What the next step reads, with the ``reset`` rows at a trial's first step."""
        if reset is True:
            return self.initial()
        if missing := [following for _, following in self.handed_on if following not in state]:
            raise KeyError(
                f"the policy gives {missing} at some steps and not at others, as MultiStepActorWrapper asks its actor at every "
                "n-th alone: one with a memory must see each step."
            )
        memory = {key: state[following] for key, following in self.handed_on}
        if reset is not False:
            for key, first in self.initial().items():
                memory[key] = where_rows(reset, first, memory[key])
        return memory


def _primers(own: list[TensorDictPrimer], env: EnvBase, rows: int) -> Iterator[tuple[TensorDictPrimer, torch.Size]]:
    """Primers, each with the batch size of its specs: those of ``env``, then the policy's ``own``, which its modules bring."""
    while isinstance(env, TransformedEnv):
        _ = env.output_spec  # expands its primers' specs by its batch size
        yield from ((t, env.batch_size) for t in reversed(own_transforms(env)) if isinstance(t, TensorDictPrimer))
        env = env.base_env
    for primer in own:
        primer.primers = primer.primers.expand(rows, *primer.primers.shape)
        yield primer, torch.Size([rows])
