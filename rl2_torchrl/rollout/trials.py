"""What trials a rollout plays: on plain tensors, or those of an env with further transforms (`TransformedTrials`)."""

from __future__ import annotations

from collections.abc import Collection

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.envs import EnvBase, InitTracker, TensorDictPrimer

from rl2_torchrl.modules.acting import State
from rl2_torchrl.rollout.clock import Rows
from rl2_torchrl.rollout.doors import is_tensor_env
from rl2_torchrl.rollout.entries import REWARD, Trials, Turn, flat, unflat
from rl2_torchrl.rollout.memory import own_transforms
from rl2_torchrl.rollout.tensor_trials import TensorTrials
from rl2_torchrl.tasks import TaskSampler
from rl2_torchrl.transition import PreviousStep
from rl2_torchrl.trial import Trial

__all__ = ["TransformedTrials", "trial_steps", "trials_of"]


def trials_of(
    env: EnvBase, steps: int, read: Collection[NestedKey], keep: Collection[NestedKey] | None
) -> TensorTrials | TransformedTrials:
    """The trials of ``env``; arguments as for `Trials`."""
    below, ours, others = _taken_apart(env)
    if not others and ours[0] is not None:
        return TensorTrials(below, *ours, steps, read, keep)
    trials = TransformedTrials(env, steps, read, keep)
    beside = f"{', '.join(others)} beside our transforms: a TensorDict goes through all of them at each step"
    trials.reason = beside if others else "the env has no Trial"
    return trials


def trial_steps(env: EnvBase) -> int | None:
    """Steps of every trial of ``env``, where all are of one length, which is known ahead; else None."""
    below, (trial, *_), others = _taken_apart(env)
    base = getattr(below, "base_env", None)
    if trial is None or others or not is_tensor_env(base) or not base.fixed_length:
        return None
    by_episodes = None if trial.episodes is None else trial.episodes * base.max_episode_steps
    return min(bound for bound in (by_episodes, trial.steps) if bound is not None)


#: What a collector adds by itself; rollouts know of trial starts and memory without them.
_OF_COLLECTORS = (InitTracker, TensorDictPrimer)
#: The methods of our transforms of which a rollout does the work itself.
_REPLACED = (
    "_step",
    "_reset",
    "_call",
    "_reset_env_preprocess",
    "is_over",
    "_set_done",
    "_reset_rows",
    "combine",
    "begin",
)


def _taken_apart(env: EnvBase) -> tuple[EnvBase, list, list[str]]:
    """The env with our transforms; these (Trial, TaskSampler, PreviousStep, or None); the names of others, or of one displaced."""
    while own_transforms(env) and all(isinstance(t, _OF_COLLECTORS) for t in own_transforms(env)):
        env = env.base_env
    parts = [t for t in own_transforms(env) if not isinstance(t, _OF_COLLECTORS)]
    ours = [next((t for t in parts if _is_as_written(t, kind)), None) for kind in (Trial, TaskSampler, PreviousStep)]
    in_order = [t for t in ours if t is not None]
    strangers = [t for t in parts if all(t is not other for other in in_order)]
    others = strangers or [t for t, other in zip(parts, in_order, strict=True) if t is not other]
    return env, ours, [type(t).__name__ for t in others]


def _is_as_written(transform, kind: type) -> bool:
    """Whether what ``transform`` does in an env is what ``kind`` says: a class below it may step or reset otherwise."""
    below = type(transform)
    return isinstance(transform, kind) and all(getattr(below, m, None) is getattr(kind, m, None) for m in _REPLACED)


class TransformedTrials(Trials):
    """Trials of an env with further transforms, or with others in place of ours: a TensorDict at each of its steps."""

    def __init__(self, env: EnvBase, steps: int, read: Collection[NestedKey], keep: Collection[NestedKey] | None):
        super().__init__(env, steps, read, keep)
        self._root_keys = [key for key in self.keys if key[0] != "next" and key in self.wanted]
        needed = {*self.wanted, REWARD, ("next", "done")}
        self._after_keys = [key for key in self.keys if key[0] == "next" and key in needed]
        self._never = torch.zeros(self.rows, 1, dtype=torch.bool, device=self.device)
        self._tensordict: TensorDictBase | None = None
        self._stepped: TensorDictBase | None = None

    def adopt(self, reset: TensorDictBase) -> None:
        self._tensordict, self._stepped = reset.copy(), None

    def start(self) -> tuple[State, Rows]:
        if self._stepped is not None:
            return self._go_on()
        self._tensordict = self.env.reset() if self._tensordict is None else self._tensordict
        return self._root(True), True

    def step(self, t: int, state: State) -> Turn:
        for key, value in state.items():
            if key not in self._root_keys:
                self._tensordict.set(key, unflat(value, self.batch_size))
        self._stepped = self.env.step(self._tensordict)
        after = {("next", "is_init"): self._never, **self._entries(self._stepped, self._after_keys)}
        # A trial that a batch's last step ends is followed by one when the next batch asks for it.
        return Turn(after, {}, False) if t + 1 == self.steps else Turn(after, *self._go_on())

    def _go_on(self) -> tuple[State, Rows]:
        done = self._stepped["next", "done"].reshape(-1)
        begun: Rows = True if done.all() else done.clone() if done.any() else False
        self._tensordict = self.env.maybe_reset(self.env.step_mdp(self._stepped))
        return self._root(begun), begun

    def _root(self, begun: Rows) -> State:
        root = self._entries(self._tensordict, self._root_keys)
        if "is_init" not in self.keys:  # no InitTracker, as a collector adds
            root["is_init"] = self._never | (begun if isinstance(begun, bool) else begun.unsqueeze(-1))
        return root

    def _entries(self, tensordict: TensorDictBase, keys: Collection[NestedKey]) -> State:
        # Copies: many envs write their next step into the same memory.
        return {key: flat(tensordict.get(key).clone(), self.batch_size) for key in keys}

    def state_dict(self) -> dict:
        return {"stepped": None if self._stepped is None else self._stepped.to_dict()}

    def load_state_dict(self, state: dict) -> None:
        if state["stepped"] is not None:
            self._stepped = TensorDict(state["stepped"], self.batch_size, self.env.device)
