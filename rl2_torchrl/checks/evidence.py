"""`Evidence`: a batch as rows, and what collected it and learns from it, for the rules of `check_training`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import nn
from torchrl.envs import EnvBase, Transform

from rl2_torchrl.checks.probe import NetworkProbe
from rl2_torchrl.env_check.outcomes import flat
from rl2_torchrl.minibatches import beside
from rl2_torchrl.objectives.advantages import advantages_of
from rl2_torchrl.tasks import TaskSampler
from rl2_torchrl.trial import EPISODE_DONE, transforms_of
from rl2_torchrl.workers import TrialWorkers

__all__ = ["Evidence", "NotChecked", "Rule", "copied"]

#: A rule: what breaks it in words, or None.
Rule = Callable[["Evidence"], str | None]
_MAX_STEPS = 2048  # steps that the networks look at


class NotChecked(Exception):
    """A rule cannot be checked, and why."""


class Evidence:
    """A batch as rows ``[R, T]`` and what made it.

    Args:
        batch: the batch ``[*B, T]``; it is not written to.
        collector: its collector.
        update: what is going to be updated with it.
        held_out: tasks of the evaluation, or where they come from; None if not given.
        report: the report, for what is told without being raised.
    """

    def __init__(self, batch: TensorDictBase, collector, update, held_out, report):
        self.update, self.held_out, self.report = update, held_out, report
        self.collector, self.env = collector, getattr(collector, "env", None)
        self.loss = getattr(update, "loss", None)
        batch = batch.copy() if self.loss is None else beside(self.loss, batch.copy())
        self.batch, self.shape = batch.reshape(-1, batch.shape[-1]), batch.shape
        self.transforms = transforms_of(self.env)
        self.sampler = self.transform(TaskSampler)

    def transform(self, kind: type[Transform]) -> Transform | None:
        """The innermost transform of ``kind`` around the env; None where there is none, or workers hide it."""
        return next((t for t in self.transforms if isinstance(t, kind)), None)

    def ask(self, function: Callable[[EnvBase], Any]) -> Any:
        """``function(env)``, of `TrialWorkers` the first one's, for which it is pickled; None where TorchRL's processes have it."""
        if isinstance(self.collector, TrialWorkers):
            return self.collector.of_env(function)
        return None if self.env is None else function(self.env)

    # ---------------------------------------------------------------- entries
    def has(self, key: NestedKey) -> bool:
        """Whether the batch has the entry ``key``."""
        return key in self.batch.keys(True)

    def need(self, key: NestedKey) -> torch.Tensor | TensorDictBase:
        """The entry ``key``, ``[R, T, ...]``."""
        if not self.has(key):
            raise NotChecked(f"the batch has no {key!r}")
        return self.batch.get(key)

    def flag(self, key: NestedKey) -> torch.Tensor:
        """The entry ``key``, bool ``[R, T]``."""
        return self.need(key).reshape(self.batch.shape)

    @property
    def task_key(self) -> NestedKey:
        """Entry of the task."""
        return "task" if self.sampler is None else self.sampler.task_key

    @cached_property
    def task(self) -> torch.Tensor:
        """The tasks, ``[R, T, n]``."""
        return flat(self.need(self.task_key), 2)

    @cached_property
    def starts(self) -> torch.Tensor:
        """Steps that begin a trial, bool ``[R, T]``; without ``"is_init"`` the first step of a row counts as none."""
        if self.has("is_init"):
            return self.flag("is_init")
        done = self.flag(("next", "done"))
        return torch.cat([torch.zeros_like(done[:, :1]), done[:, :-1]], 1)

    @cached_property
    def inner(self) -> torch.Tensor:
        """Steps from the second on that go on with the trial of the step before, bool ``[R, T - 1]``."""
        return ~self.starts[:, 1:]

    @cached_property
    def episode_ends(self) -> torch.Tensor:
        """Steps that end an episode, bool ``[R, T]``; those that end a trial, where the batch tells no more."""
        return self.flag(("next", EPISODE_DONE if self.has(("next", EPISODE_DONE)) else "done"))

    def place(self, mask: torch.Tensor) -> str:
        """The first place of ``mask`` ``[R, T]`` in words."""
        row, step = mask.nonzero()[0].tolist()
        return f"row {row}, step {step}"

    # --------------------------------------------------------------- networks
    @cached_property
    def probe(self) -> NetworkProbe:
        """The update's networks, copied, with normalisations that know the batch, as they will from the first update on."""
        loss, norms = self._copied_loss()
        for norm, key in norms:
            if norm.count == 0:  # until then what it reads may be of any size, and drown the memory
                norm.update_statistics(self.batch.get(key))
        return NetworkProbe(loss)

    @cached_property
    def probe_as_collected(self) -> NetworkProbe:
        """The update's networks, copied as they have acted."""
        return NetworkProbe(self._copied_loss()[0])

    def _copied_loss(self) -> tuple[nn.Module, list]:
        """The loss, and the normalisations in its networks with the entries that they read."""
        if self.loss is None:
            raise NotChecked("the update has no loss")
        if not self.has("is_init"):
            raise NotChecked("the batch has no 'is_init'")
        find = getattr(self.update, "normalizations", list)
        return copied((self.loss, find()), "loss")

    def advantage(self, rows: TensorDictBase) -> TensorDictBase:
        """``rows``, some or all of the batch's, with what a copy of the update's advantage makes of them, as it stands now."""
        if getattr(self.update, "advantage", None) is None:
            raise NotChecked("the update has no advantage")
        both = self.update.advantage, getattr(self.update, "stand_in", None)
        advantage, stand_in = copied(both, "advantage")
        advantage = advantage.eval() if isinstance(advantage, nn.Module) else advantage
        # Most of a batch is memory, which is not copied: an advantage may read it, and has no reason to write into it.
        memory = rows.select(*self.probe.memory, strict=False)
        given = rows.exclude(*self.probe.memory).clone().update(memory)
        shape = self.shape if len(rows) == len(self.batch) else (*[1] * (len(self.shape) - 2), *rows.shape)
        try:
            return advantages_of(advantage, stand_in, given.reshape(shape)).reshape(rows.shape)
        except Exception as error:  # noqa: BLE001  (one of a user's may assert how many rows there are)
            raise NotChecked(f"the advantage raised {type(error).__name__}: {error}") from error

    @cached_property
    def learnt_from(self) -> TensorDictBase:
        """`sample` with advantages and returns; `whole` where the advantage makes nothing of a part, as of a group's."""
        with suppress(NotChecked):
            learnt_from = self.advantage(self.sample)
            made = learnt_from.get(self.loss.tensor_keys.advantage, None)
            if made is not None and made.max() > made.min():
                return learnt_from
        learnt_from, key = self.advantage(self.whole), self.loss.tensor_keys.advantage
        if learnt_from.get(key, None) is None:
            raise NotChecked(f"the advantage writes no {key!r}")
        return learnt_from

    @cached_property
    def losses(self) -> TensorDictBase:
        """What the loss gives for some chunks."""
        return self.probe.loss(self.chunks(self.learnt_from))

    @cached_property
    def whole(self) -> TensorDictBase:
        """`batch`, whose rewards are reals, since they are changed a little."""
        whole = self.batch.copy()
        if self.has(reward := ("next", "reward")) and not whole[reward].is_floating_point():
            whole[reward] = whole[reward].float()
        return whole

    @cached_property
    def sample(self) -> TensorDictBase:
        """Up to 8 rows of `whole`, those among them within which a trial begins; a single row twice, to have another beside it."""
        inner = self.starts[:, 1:].any(1).nonzero().flatten()[:4].tolist()
        spread = torch.linspace(0, len(self.batch) - 1, 4 if inner else 8).long().tolist()
        rows = sorted({*inner, *spread})
        return self.whole[rows if len(rows) > 1 else 2 * rows]

    def chunks(self, rows: TensorDictBase) -> TensorDictBase:
        """``rows`` ``[R, T]`` as the update cuts them, ``[N, bptt]``; of many, some that lie evenly: enough to see a fault."""
        length = min(getattr(self.update, "bptt", None) or rows.shape[1], rows.shape[1])
        number = rows.shape[1] // length
        chunks = rows[:, : number * length].reshape(-1, number, length).flatten(0, 1)
        wanted = min(len(chunks), max(2, _MAX_STEPS // length))
        return chunks[torch.linspace(0, len(chunks) - 1, wanted).long().to(chunks.device)]

    def windows(self, second: torch.Tensor) -> TensorDictBase:
        """Up to 16 windows of two steps ``[N, 2]``, the second of them one of ``second``, bool ``[R, T - 1]`` from step 1 on."""
        places = second.nonzero()
        if not len(places):
            raise NotChecked("the batch has no such boundary")
        places = places[torch.linspace(0, len(places) - 1, min(16, len(places))).long().to(places.device)]
        row, step = places.split(1, 1)
        windows = self.probe.inputs_of(self.batch)[row, step + torch.arange(2, device=step.device)]
        if not all(map(self.has, self.probe.memory)):
            windows["is_init"] = windows["is_init"].clone()
            windows["is_init"][:, 0] = True  # some memory to begin with will do
        if not self.probe.real_inputs(windows):
            raise NotChecked("the actor reads no real numbers that could be changed")
        return windows


def copied(thing: Any, name: str) -> Any:
    """A deep copy of ``thing``, which ``name`` is for the reason why there can be none."""
    try:
        return copy.deepcopy(thing)
    except (TypeError, ValueError, RuntimeError) as error:
        raise NotChecked(f"the {name} cannot be copied ({error})") from error
