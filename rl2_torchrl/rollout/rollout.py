"""`Rollout`: the one loop over steps, for training, evaluation, reports and checks.

What plays is a policy as a list of functions on named tensors (`acting_parts`); what is played are trials (`trials_of`). In each
step the policy acts, the trials go on, and what a batch keeps is written into memory that serves every batch. On a CUDA device,
where all rows begin and end their trials together, a whole batch is one CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase
from torchrl.envs.utils import exploration_type
from torchrl.modules import set_recurrent_mode

from rl2_torchrl.modules.acting import ActingPart, State, acting_parts
from rl2_torchrl.rollout.clock import Rows
from rl2_torchrl.rollout.entries import leaves
from rl2_torchrl.rollout.graph import GraphReplay
from rl2_torchrl.rollout.memory import Memory
from rl2_torchrl.rollout.trials import TensorTrials, trials_of

__all__ = ["Rollout"]

_ROWS_AT_ONCE = 2048


class Rollout:
    """Plays ``env`` with ``policy``, in batches of ``steps`` steps; each batch goes on where the last one ended.

    Args:
        env: trial env, a `TransformedEnv` with `Trial`; other envs work as well, with a TensorDict at each of their steps.
        policy: actor, or actor and critic.
        steps: steps T of a batch.
        keep: entries of a batch; None for all.
        ablation: function on the `State` of a step before the policy reads it.
        on_step: called with each step's `State`, what followed from it under ``"next"``.

    Raises:
        KeyError: ``keep`` names an entry that nobody makes, the policy reads one, or its memory has no primer.
    """

    def __init__(
        self,
        env: EnvBase,
        policy: TensorDictModuleBase,
        steps: int,
        keep: Sequence[NestedKey] | None = None,
        *,
        ablation: Callable[[State], State] | None = None,
        on_step: Callable[[State], None] | None = None,
    ):
        self.env, self.policy, self.steps, self.ablation, self.on_step = env, policy, steps, ablation, on_step
        self.parts = acting_parts(policy)
        read = list(dict.fromkeys(key for part in self.parts for key in part.in_keys))
        # Who looks at each step is shown all that there is.
        self.trials = trials_of(env, steps, read, keep if on_step is None else None)
        self.memory = Memory(policy, env, self.trials.rows)
        made = self._all_keys()
        _check_entries(read, keep or (), {*made, *self.trials.keys_at_once})
        self.keep = made if keep is None else leaves(keep, made)
        self._acting, self._waiting = self._split()
        self._carry: State = {}
        #: Memory of the entries that steps write, ``[N, T, ...]``, and its T steps.
        self._buffers: dict[NestedKey, tuple[torch.Tensor, Sequence[torch.Tensor]]] = {}
        self._replays: dict[object, GraphReplay] = {}
        self._kept: TensorDict | None = None

    def adopt(self, reset: TensorDictBase) -> None:
        """Takes a ``env.reset()`` that somebody has just made as the beginning of the first batch, in place of one of its own."""
        self.trials.adopt(reset)

    @property
    def is_on_tensors(self) -> bool:
        """Whether trials are played on tensors, or through the env's own TensorDicts."""
        return isinstance(self.trials, TensorTrials)

    def _all_keys(self) -> list[NestedKey]:
        written = [key for part in self.parts for key in (*part.out_keys, part.log_prob_key) if key is not None]
        memory = [key for pair in self.memory.handed_on for key in pair]
        return list(dict.fromkeys((*self.trials.keys, *written, *memory, "is_init", ("next", "is_init"))))

    def _split(self) -> tuple[list[ActingPart], list[ActingPart]]:
        """Parts that each step needs, and those behind the action that can look at many steps at once."""
        acts = [n for n, part in enumerate(self.parts) if self.trials.action_key in part.out_keys]
        if not acts:
            raise KeyError(
                f"the policy writes no {self.trials.action_key!r}, which the env takes: {self.policy.out_keys}."
            )
        behind = self.parts[acts[0] + 1 :]
        return (self.parts[: acts[0] + 1], behind) if all(part.can_wait for part in behind) else (self.parts, [])

    # ----------------------------------------------------------------- a batch
    @torch.no_grad()
    def __call__(self) -> TensorDict:
        """The next batch ``[*B, T]``: the same TensorDict each time, with what others have added to it left in place."""
        self.trials.start_batch()
        with _one_thread() if self.trials.has_threads else nullcontext(), set_recurrent_mode(False):
            self._replay()() if self.trials.is_repeatable and self.trials.device.type == "cuda" else self._play()
        made = {key: buffer for key, (buffer, _) in self._buffers.items()} | self.trials.entries()
        kept = TensorDict({key: made[key] for key in self.keep}, [self.trials.rows, self.steps], self.trials.device)
        if len(self.trials.batch_size) != 1:
            kept = kept.reshape(*self.trials.batch_size, self.steps)
        # What others have added stays, to be written over by them; what they have put in place of ours does not.
        self._kept = kept if self._kept is None else self._kept.update(kept)
        return self._kept

    def _replay(self) -> GraphReplay:
        kind = exploration_type()
        if kind not in self._replays:
            generators = [self.trials.env.generator]
            self._replays[kind] = GraphReplay(self._play, self.trials.device, generators)
        return self._replays[kind]

    def _play(self) -> None:
        """All steps of a batch."""
        acting, recorded = [part.make(self.steps) for part in self._acting], self._recorded()
        entries, begun = self.trials.start()
        state = {**entries, **self._remembered(begun)}
        waiting: list[State] = []
        for t in range(self.steps):
            if self.ablation is not None:
                state = self.ablation(state)
            for act in acting:
                act(state)
            turn = self.trials.step(t, state)
            for key in recorded:
                self._record(key, t, turn.after[key] if key in turn.after else state[key])
            waiting.append(state)
            if len(waiting) * self.trials.rows >= _ROWS_AT_ONCE or t + 1 == self.steps:
                self._look_back(waiting, t + 1)
                waiting = []
            if self.on_step is not None:
                self.on_step({**state, **turn.after, **self.trials.flags(t)})
            if t + 1 < self.steps:
                state = {**turn.root, **self.memory.next(state, turn.begun)}
        self._carry_over(state)

    def _remembered(self, begun: Rows) -> State:
        """The memory that a batch begins with."""
        return self.memory.initial() if begun is True else self.memory.next(self._carry, begun)

    def _carry_over(self, state: State) -> None:
        for _, key in self.memory.handed_on:
            if key in self._carry:
                self._carry[key].copy_(state[key])
            else:
                self._carry[key] = state[key].clone()

    # ------------------------------------------------ what can wait, and storage
    def _recorded(self) -> list[NestedKey]:
        """Entries to write down in each step."""
        late = (
            {key for part in self._waiting for key in part.out_keys}
            | self._log_prob_keys()
            | {*self.trials.keys_at_once}
        )
        return [key for key in self.keep if key not in late]

    def _log_prob_keys(self) -> set[NestedKey]:
        return {
            part.log_prob_key for part in self._acting if part.log_prob is not None and part.log_prob_key in self.keep
        }

    def _look_back(self, states: list[State], end: int) -> None:
        """Runs what could wait on the steps up to ``end`` that ``states`` are of, all rows in one call, and writes it down."""
        late: State = {}
        rows = len(states) * self.trials.rows

        def read(keys: Sequence[NestedKey]) -> None:
            for key in keys:
                if key not in late:
                    late[key] = torch.stack([state[key] for state in states]).flatten(0, 1)

        made = []
        for part in self._waiting:
            read(part.in_keys)
            part.make(1)(late)
            made += part.out_keys
        for part in self._acting:
            if part.log_prob_key in self._log_prob_keys():
                read([*part.in_keys, *part.out_keys])
                part.log_prob(late)
                made.append(part.log_prob_key)
        for key in made:
            if key in self.keep:
                value = late[key].unflatten(0, (rows // self.trials.rows, self.trials.rows))
                for t, at_step in enumerate(value.unbind(), end - len(states)):
                    self._record(key, t, at_step)

    def _record(self, key: NestedKey, t: int, value: torch.Tensor) -> None:
        """Writes into the last batch's memory: steps that live until the batch is whole would scatter the heap."""
        if key not in self._buffers:
            buffer = torch.stack([torch.empty_like(value)] * self.steps)
            self._buffers[key] = buffer.transpose(0, 1), buffer.unbind()
        self._buffers[key][1][t].copy_(value)

    # -------------------------------------------------------------- checkpoints
    def state_dict(self) -> dict:
        """Where the rollout stands between two batches, but for the env's own state."""
        return {"trials": self.trials.state_dict(), "memory": {i: v for i, v in enumerate(self._carry.values())}}

    def load_state_dict(self, state: dict) -> None:
        """Goes on from what `state_dict` returned."""
        self.trials.load_state_dict(state["trials"])
        keys = [key for _, key in self.memory.handed_on]
        self._carry = {key: state["memory"][i].clone() for i, key in enumerate(keys) if i in state["memory"]}


def _check_entries(read: Collection[NestedKey], keep: Collection[NestedKey], made: Collection[NestedKey]) -> None:
    for what, keys in (("keep holds", keep), ("the policy reads", read)):
        missing = [key for key in keys if not leaves([key], made)]
        if missing:
            raise KeyError(f"{what} {missing}, which nobody makes; there is {sorted(map(str, made))}.")


@contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch on one thread: threads that wait for its next operation spin, and would hold the cores that an env needs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
