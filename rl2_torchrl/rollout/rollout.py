"""`Rollout`: the one loop over steps, for training, evaluation, reports and checks.

What plays is a policy as a list of functions on named tensors (`acting_parts`); what is played are trials (`trials_of`). In each
step the policy acts, the trials go on, and what a batch keeps is written into memory that serves every batch. On a CUDA device,
where all rows begin and end their trials together, a whole batch is one CUDA graph.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.data import Categorical
from torchrl.envs import EnvBase
from torchrl.envs.utils import exploration_type
from torchrl.modules import set_recurrent_mode

from rl2_torchrl.envs.gym_vector import GymVectorEnv
from rl2_torchrl.envs.tensor_env import TensorEnv
from rl2_torchrl.gradients.networks import keys_left
from rl2_torchrl.gradients.part import has_hooks
from rl2_torchrl.kernels.graph import GraphReplay, held_by
from rl2_torchrl.modules.acting import ActingPart, State, acting_parts
from rl2_torchrl.modules.cores import where_rows
from rl2_torchrl.modules.distributions import ActionDistribution, distribution_of
from rl2_torchrl.rollout.clock import Rows
from rl2_torchrl.rollout.memory import Memory
from rl2_torchrl.rollout.recorded_step import RecordedStep
from rl2_torchrl.rollout.transforms import trials_of
from rl2_torchrl.rollout.trials import leaves, shown_by
from rl2_torchrl.trial import base_of, is_within, transforms_of

__all__ = ["Rollout"]

log = logging.getLogger(__name__)

#: Steps of rows that are looked back at in one call, if these have no more bytes than caches hold; of large ones, such as images,
#: which grow to more within a network, an eighth.
_ROWS_AT_ONCE, _BYTES_AT_ONCE = 2**14, 2**24


class Rollout:
    """Plays ``env`` with ``policy``, in batches of ``steps`` steps; each batch goes on where the last one ended.

    Args:
        env: trial env, a `TransformedEnv` with `Trial`; other envs work as well, with a TensorDict at each of their steps.
        policy: actor, or actor and critic.
        steps: steps T of a batch.
        keep: entries of a batch; None for all tensors.
        ablation: function from the `State` of a step, all that there is, to the one that the policy reads.
        on_step: called with a copy of each step's `State`, what followed from it under ``"next"``.

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
        self.parts, self._layout = acting_parts(policy), _layout(policy, env)
        #: Whether a module is called with a TensorDict, in which it finds what it, or another, has left at an earlier step.
        self._leaves_all = any(part.way == "tensordict" for part in self.parts)
        read = [key for part in self.parts for key in part.in_keys]
        read += ["is_init", *shown_by(env)] if self._leaves_all else []
        self._read = read = list(dict.fromkeys(read))
        self.memory = Memory(policy, env, env.batch_size.numel())
        memory = [key for pair in self.memory.handed_on for key in pair]
        # Who looks at each step is shown all that there is.
        is_shown = on_step is not None or ablation is not None
        self.trials = trials_of(env, steps, read, None if is_shown else keep, memory)
        called = [type(part.module).__name__ for part in self.parts if part.way == "tensordict"]
        slow = f"{', '.join(called)} of the policy is called with a TensorDict at each step" if called else None
        #: Why this is not the fastest way to play; None where it is.
        self.reason = "; ".join(filter(None, (self.trials.reason, slow))) or None
        parts = [each for part in self.parts for each in (part, part.later) if each is not None]
        written = [key for part in parts for key in part.out_keys]
        self._written = set(written)
        self.trials.rewritten = self._written.intersection(self.trials.keys)
        made = list(dict.fromkeys((*self.trials.keys, *written, *memory, "is_init", ("next", "is_init"))))
        for what, keys in (("keep holds", keep or ()), ("the policy reads", read)):
            if missing := [key for key in keys if not leaves([key], made)]:
                raise KeyError(
                    f"{what} {missing}, which nobody makes: look at the in_keys of the loss's terms and of the networks; there is "
                    f"{sorted(map(str, made))}. What the advantage or a callback's after_batch makes of whole batches, no "
                    "collector keeps: leave it out."
                )
        self._keeps_all, left_out = keep is None, set(written) - keys_left(policy)
        self.keep = [key for key in made if key not in left_out] if keep is None else leaves(keep, made)
        self._acting, self._late = self._split()
        self._act = RecordedStep(self._acting, steps)
        #: What those parts read that no other of them makes.
        self._read_late, late = [], set()
        for part in self._late:
            self._read_late += [key for key in part.in_keys if key not in late]
            late.update(part.out_keys)
        self._early = [key for key in self.keep if key not in late]
        self._carry: State = {}
        #: At a batch's last step what the policy has written.
        self._acted_on: State = {}
        #: Memory of the entries that steps write, ``[T, N, ...]``, and its T steps.
        self._buffers: dict[NestedKey, tuple[torch.Tensor, Sequence[torch.Tensor]]] = {}
        self._replays: dict[object, GraphReplay] = {}
        self._held: list[tuple] = []
        self._has_told = False
        #: Whether the ablation has changed anything that the policy reads.
        self.has_ablated = False
        self._sound_shapes: dict[NestedKey, torch.Size] | None = None
        self._kept: TensorDict | None = None

    def adopt(self, reset: TensorDictBase) -> None:
        """Takes a ``env.reset()`` that somebody has just made as the beginning of the first batch, in place of one of its own."""
        self.trials.adopt(reset)
        self._carry = {}

    def _split(self) -> tuple[list[ActingPart], list[ActingPart]]:
        """Parts that each step needs; what can look at many steps at once: all behind the action, and log-probabilities."""
        acts = [n + 1 for n, part in enumerate(self.parts) if self.trials.action_key in part.out_keys]
        if not acts:
            raise KeyError(
                f"the policy writes no {self.trials.action_key!r}, which the env takes: {self.policy.out_keys}. A function of "
                "TensorDicts names what it writes as WrapModule(function, in_keys=[...], out_keys=[...])."
            )
        last = acts[-1]
        can_wait = all(part.can_wait for part in self.parts[last:])
        acting, waiting = (self.parts[:last], self.parts[last:]) if can_wait else (self.parts, [])
        is_read = any(part.later.out_keys[0] in other.in_keys for part in acting if part.later for other in self.parts)
        if is_read or len(acts) > 1:  # the log-probability is that of the draw, not of what is made of it
            return [each for part in acting for each in (part, part.later) if each is not None], waiting
        log_probs = [part.later for part in acting if part.later is not None]
        return acting, [*(part for part in log_probs if part.out_keys[0] in self.keep), *waiting]

    # ----------------------------------------------------------------- a batch
    @torch.no_grad()
    def __call__(self) -> TensorDict:
        """The next batch ``[*B, T]``: the same TensorDict each time, with what others have added to it left in place.

        After an error or an interrupt within it the next one begins new trials in all rows.

        Raises:
            RuntimeError: a module of the policy, a hook on one or a transform of the env is another than when the rollout was made.
        """
        if _layout(self.policy, self.env) != self._layout:
            raise RuntimeError(
                "a module of the policy, a hook on one, or a transform of the env has changed since their rollout was made, which "
                "would not see it, whereas the update does: change them before the collector is made, or make a new collector."
            )
        try:
            return self._batch()
        except BaseException:  # Ctrl-C in a notebook, too
            self._replays.clear()
            self._act.forget()
            self.trials.restart()
            self._carry = {}
            raise

    def _batch(self) -> TensorDict:
        trials, play = self.trials, self._play
        trials.start_batch()
        # A graph holds what is done on the device alone: not what a user looks at, or changes, between two steps.
        if trials.is_repeatable and self.on_step is None and self.ablation is None:
            self._forget_what_changed()
            replay = GraphReplay(self._play, trials.device, [trials.env.generator])
            play = self._replays.setdefault(exploration_type(), replay)
        else:
            self._replays.clear()  # tasks and env have moved to other memory than a graph knows
        with _one_thread() if trials.has_threads else nullcontext(), set_recurrent_mode(False):
            play()
        self._tell_of_refusal()
        made = {key: buffer.transpose(0, 1) for key, (buffer, _) in self._buffers.items()} | trials.entries()
        keys = [key for key in self.keep if key in made] if self._keeps_all else self.keep
        kept = TensorDict({key: made[key] for key in keys}, [trials.rows, self.steps], trials.device)
        if len(trials.batch_size) != 1:
            kept = kept.reshape(*trials.batch_size, self.steps)
        if self._kept is None:
            kept.names = [*[None] * len(trials.batch_size), "time"]  # which TorchRL's estimators look for
            self._kept = kept
        # What others have added stays, to be written over by them; what they have put in place of ours does not.
        return self._kept.update(kept)

    def _forget_what_changed(self) -> None:
        """A graph has what Python had when it was recorded; elsewhere there is none."""
        if self.trials.device.type == "cuda":
            held = held_by([*self.policy.modules(), *self.env.modules()])
            if held != self._held:
                self._held, self._replays = held, {}

    def _tell_of_refusal(self) -> None:
        refusals = [replay.refusal for replay in self._replays.values() if replay.refusal is not None]
        if refusals and not self._has_told:
            self._has_told = True
            log.warning(
                "a batch cannot be one CUDA graph, and each of its steps is launched by itself: %s", refusals[0]
            )

    def _play(self) -> None:
        """All steps of a batch."""
        self._act.start_batch()
        entries, begun = self.trials.start()
        at_once = self.trials.keys_at_once
        recorded = [key for key in self._early if key not in at_once]
        memory = self.memory.initial() if begun is True else self.memory.next(self._carry, begun)
        state = {**self._left(self._carry, begun), **entries, **memory}
        waiting: list[State] = []
        for t in range(self.steps):
            made = state  # what is recorded of it is what was there, not what an ablation makes of it
            if self.ablation is not None:
                state = self._ablated(t, state)
            self._act(state)
            if t == 0:
                self._require_actions(state)
            after, root, begun = self.trials.step(t, state)
            if t == 0 and self._keeps_all:  # a module may give less than it names
                recorded = [key for key in recorded if key in after or key in state]
            for key in recorded:
                value = (after if key in after else state if key in self._written else made)[key]
                self._buffer(key, value)[1][t].copy_(value)
            if t == 0:
                looked_at = leaves(self._read_late, state)
                at_once = _steps_at_once([state[key] for key in looked_at])
            waiting.append({key: state[key] for key in looked_at})
            if len(waiting) >= at_once or t + 1 == self.steps:
                self._look_back(waiting, t + 1)
                waiting = []
            if self.on_step is not None:
                # Copies, which may be kept: later steps are written over some of these.
                shown = {**state, **after, **self.trials.flags(t)}
                self.on_step({key: value.clone() for key, value in shown.items()})
            if t + 1 < self.steps:
                state = {**self._left(state, begun), **root, **self.memory.next(state, begun)}
        self._acted_on = {key: state[key] for key in self._written if key in state}
        for key in (*(key for _, key in self.memory.handed_on), *self._left(state)):
            self._carry.setdefault(key, torch.empty_like(state[key])).copy_(state[key])

    def require_sound_policy(self) -> None:
        """FloatingPointError where the policy gave NaN at the last batch's end: as choices they look like any."""
        written = self._acted_on.items()
        if broken := [key for key, entry in written if entry.is_floating_point() and entry.isnan().any()]:
            raise FloatingPointError(
                f"the policy gives NaN as {broken}: its weights, or what it reads, are not finite."
            )

    def _left(self, state: State, begun: Rows = False) -> State:
        """What stays from step to step where somebody may look for it, as in TorchRL's `step_mdp`.

        In some rows that have ``begun`` a trial that is zeros, as its resets leave it.
        """
        if not self._leaves_all:
            return {}
        left = {key: value for key, value in state.items() if key[0] != "next"}
        if isinstance(begun, bool):
            return left
        return {key: where_rows(begun, torch.zeros_like(value), value) for key, value in left.items()}

    def _ablated(self, t: int, state: State) -> State:
        # Not the flags under "next", which a shared clock knows ahead.
        flags = {key: value for key, value in self.trials.flags(t).items() if isinstance(key, str)}
        # Copies: it may write into what it is given, which is the env's own.
        given = {key: value.clone() for key, value in (state | flags).items()}
        versions = {key: value._version for key, value in given.items()}
        ablated = self.ablation(dict(given))
        if not isinstance(ablated, dict):
            raise TypeError(
                f"the ablation returned a {type(ablated).__name__}; it is given the named tensors of a step and must return them, "
                "changed: {**state, 'trans': ...}."
            )
        changed = [
            key for key, value in ablated.items() if value is not given.get(key) or value._version != versions[key]
        ]
        if t == 0 and changed and not any(is_within(key, read) for key in changed for read in self._read):
            raise ValueError(
                f"the ablation changes {changed}, and nothing that the policy reads, {self._read}: it would play as without it. "
                "What is observed stands in the transition input too, which has been written before: change it there "
                "(PreviousStep.layout().split(trans) gives its parts)."
            )
        if not self.has_ablated:
            read = [key for key in changed if key in state and any(is_within(key, each) for each in self._read)]
            self.has_ablated = (
                any(not torch.equal(ablated[key], state[key]) for key in read) or not given.keys() <= ablated.keys()
            )
        return ablated

    def _require_actions(self, state: State) -> None:
        shapes = {key: state[key].shape for key in self._written if key in state}
        if shapes == self._sound_shapes:  # a batch may be one step, and specs take longer than a step does
            return
        action = state[self.trials.action_key]
        spec = self.env.full_action_spec[self.env.action_key]
        one, base = spec.shape[self.env.batch_dims :], base_of(self.env)
        due = torch.Size([self.trials.rows, *one])
        # `TensorEnv.advance` is promised a shape; other envs may take a dimension of one more, or less, as Gymnasium's do.
        is_promised = isinstance(base, TensorEnv) and not isinstance(base, GymVectorEnv)
        if action.shape != due if is_promised else action.numel() != due.numel():
            raise ValueError(
                f"the policy gives actions of shape {list(action.shape)}, and the env takes {list(due)}: it was made for another "
                "env, or leaves a dimension too many or too few. Make it by from_env(env, ...), or give them that shape."
            )
        if isinstance(spec, Categorical):
            self._require_choices(state)
        self._sound_shapes = shapes

    def _require_choices(self, state: State) -> None:
        of_row = self.env.full_action_spec_unbatched[self.env.action_key]
        for part in self._acting:
            is_drawn = self.trials.action_key in part.out_keys and part.way == "distribution"
            if not is_drawn or distribution_of(part.module).noise != "gumbel":  # it plays a choice for each logit
                continue
            given, choices = state[part.in_keys[0]].shape[-1], ActionDistribution.from_spec(of_row).num_outputs
            if given != choices:
                raise ValueError(
                    f"the head gives {given} {part.in_keys[0]}, and the env has {choices} choices: head= is called with the number "
                    "that is due, or is a module that gives so many."
                )

    def _look_back(self, states: list[State], end: int) -> None:
        """Runs what could wait on the steps up to ``end`` that ``states`` are of, all rows in one call, and writes it down."""
        seen = {key: torch.stack([state[key] for state in states]).flatten(0, 1) for key in states[0]}
        for part in self._late:
            part.make(1)(seen)
            for key in part.out_keys:
                if key in self.keep:
                    values = seen[key].unflatten(0, (len(states), self.trials.rows))
                    buffer, _ = self._buffer(key, values[0])
                    buffer[end - len(states) : end].copy_(values)

    def _buffer(self, key: NestedKey, like: torch.Tensor) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """The last batch's memory, written again: steps that live until the batch is whole would scatter the heap."""
        if key not in self._buffers:
            buffer = torch.stack([torch.empty_like(like)] * self.steps)
            self._buffers[key] = buffer, buffer.unbind()
        return self._buffers[key]

    # -------------------------------------------------------------- checkpoints
    def state_dict(self) -> dict:
        """Where the rollout stands between two batches, but for the env's own state."""
        # A copy: the next batch writes into this memory.
        memory = [self._carry[key] for _, key in self.memory.handed_on if key in self._carry]
        own = {"trials": self.trials.state_dict(), "memory": dict(enumerate(memory)), "left": self._left(self._carry)}
        return deepcopy(own)

    def load_state_dict(self, state: dict) -> None:
        """Goes on from what `state_dict` returned."""
        self._replays.clear()
        self.trials.load_state_dict(state["trials"])
        keys = [key for _, key in self.memory.handed_on]
        carry = {key: state["memory"][i] for i, key in enumerate(keys) if i in state["memory"]}
        self._carry = {key: value.clone() for key, value in {**carry, **state.get("left", {})}.items()}


def _layout(policy: TensorDictModuleBase, env: EnvBase) -> list[tuple[int, bool]]:
    """Which modules a policy has, and on which of them hooks hang, and which transforms ``env``: what a rollout is made by."""
    return [(id(module), has_hooks(module)) for module in (*policy.modules(), *transforms_of(env))]


def _steps_at_once(entries: list[torch.Tensor]) -> float:
    """How many steps, of ``entries`` ``[N, ...]`` each, are looked back at in one call."""
    if not entries:
        return math.inf
    is_large = sum(entry.nbytes for entry in entries) * _ROWS_AT_ONCE > _BYTES_AT_ONCE * len(entries[0])
    return _ROWS_AT_ONCE / (8 if is_large else 1) / len(entries[0])


@contextmanager
def _one_thread() -> Iterator[None]:
    # PyTorch's own spin while they wait, and would hold the cores that the env's threads or processes need.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
