"""`Learners`: the processes of a data-parallel update, which together take the steps of one process on all their batches."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import distributed as dist
from torch import nn

from rl2_torchrl.gradients.program import Values
from rl2_torchrl.objectives.terms import as_number

__all__ = ["Learners"]

log = logging.getLogger(__name__)


class Learners:
    """The processes of ``group`` as one learner; without a group this process alone, for which nothing is to be done.

    Every process holds the joint batch, so that all that looks at a batch as a whole (advantages and their normalisation,
    statistics, what a user writes) is what it is in one process. Of each minibatch, the same on all, each process makes the
    gradient of its part. Gradients and scalars are joined at once: clipping, early stops and checks decide the same everywhere.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        self._group = group
        if group is None and (size := os.environ.get("WORLD_SIZE", "")).isdigit() and int(size) > 1:
            log.warning(
                "%s processes were started together, and this one updates alone: give PPOUpdate a process_group=, such as "
                "torch.distributed.group.WORLD, which is None before init_process_group(...).",
                size,
            )
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self._layout: object = None

    # ------------------------------------------------------------ the beginning
    def begin_alike(self, loss: nn.Module, generator: torch.Generator | None) -> torch.Generator | None:
        """Gives all processes the networks of the first, and a generator that draws the same in all."""
        if self._group is None:
            return generator
        generator = torch.Generator().manual_seed(int(torch.randint(2**62, ()))) if generator is None else generator
        state = loss.state_dict().items()  # a module's extra state may be anything
        state = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in state}
        of_first = [state, generator.get_state()]
        dist.broadcast_object_list(of_first, group=self._group, group_src=0)
        loss.load_state_dict(of_first[0])
        generator.set_state(of_first[1])
        return generator

    # ----------------------------------------------------------------- a batch
    def gather(self, batch: TensorDictBase, parameters: Sequence[nn.Parameter]) -> TensorDictBase:
        """The rows of all processes' batches, ``[*B, T]`` each; ValueError where batches or, at first, networks are not alike."""
        if self._group is None:
            return batch
        rows = batch.reshape(-1, batch.shape[-1])
        leaves = sorted(rows.items(True, True), key=lambda item: str(item[0]))
        self._require_alike(leaves, parameters)
        return TensorDict({key: self._gathered(leaf) for key, leaf in leaves}, [self.size * len(rows), rows.shape[1]])

    def _gathered(self, leaf: torch.Tensor) -> torch.Tensor:
        out = leaf.new_empty(self.size * len(leaf), *leaf.shape[1:])
        # Bytes, since not all backends know all types.
        send, receive = (tensor.reshape(len(tensor), -1).view(torch.uint8) for tensor in (leaf.contiguous(), out))
        dist.all_gather(list(receive.chunk(self.size)), send, group=self._group)
        return out

    def _require_alike(self, leaves: list[tuple], parameters: Sequence[nn.Parameter]) -> None:
        layout = [(key, tuple(leaf.shape), leaf.dtype) for key, leaf in leaves]
        if layout == self._layout:
            return
        weight = sum(float(p.detach().double().sum()) for p in parameters)
        batches, weights = zip(*self.everyones((layout, weight)), strict=True)
        if differing := sorted({str(entry) for one in batches for entry in set(one) ^ set(batches[0])}):
            raise ValueError(
                f"the processes' batches are not alike in {', '.join(differing)}. Give their collectors envs with the same number "
                "of rows, the same frames_per_batch and the same entries (keep=)."
            )
        if any(other != weights[0] for other in weights):
            raise ValueError(
                f"the processes' networks differ (sums of their parameters: {weights}): were they resumed from checkpoints of "
                "different updates? Leave the newest that all of them have."
            )
        self._layout = layout

    def share(self, index: torch.Tensor) -> torch.Tensor:
        """This process's part of a minibatch, whose chunks are ``index`` ``[rows]``."""
        return index if self.size == 1 else index.tensor_split(self.size)[self.rank]

    # --------------------------------------------------------------- a minibatch
    @torch.no_grad()
    def join(self, metrics: Values, parameters: Sequence[nn.Parameter], weight: float) -> Values:
        """Means over all processes by their ``weight``, those of gradients in their place; of ``max_...`` the largest."""
        if self._group is None:
            return metrics
        for parameter in parameters:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad.mul_(weight), group=self._group)
        device = next((value.device for value in metrics.values() if isinstance(value, torch.Tensor)), None)
        kind = {"dtype": torch.float64, "device": device}
        own = torch.stack([torch.as_tensor(value, **kind).detach() for value in (*metrics.values(), weight)])
        *values, weights = self._gathered(own.unsqueeze(0)).unbind(1)
        named = list(zip(metrics, values, strict=True))
        return {n: as_number(v.max() if n.startswith("max_") else (v * weights).sum()) for n, v in named}

    def everyones(self, value: Any) -> list:
        """``value`` of every process, in the order of their ranks."""
        if self._group is None:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values
