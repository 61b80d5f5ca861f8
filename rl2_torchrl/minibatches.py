"""`split_rows`: a batch as chunks; `Minibatches`: passes over them; `require_trials`: what is cut must be trials."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import torch
from tensordict import NestedKey, TensorDictBase
from torch import nn
from torchrl.data import LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement

from rl2_torchrl.arguments import require_played, require_time_last, whole
from rl2_torchrl.learners import Learners
from rl2_torchrl.quiet import quiet_torchrl

__all__ = ["Minibatches", "beside", "require_trials", "rows_and_number", "split_rows"]

log = logging.getLogger(__name__)


def rows_and_number(chunks: int, count: int) -> tuple[int, int]:
    """Chunks of a minibatch, and the number of minibatches, at most ``count``, that so many ``chunks`` make.

    Examples:
        >>> rows_and_number(33, 32)
        (2, 17)
    """
    rows = max(1, math.ceil(chunks / count))
    return rows, math.ceil(chunks / rows)


class Minibatches:
    """Draws a batch's chunks ``[num_chunks, bptt]`` without replacement, at most so many minibatches a pass, in a TorchRL buffer.

    A minibatch has ``ceil(num_chunks / count)`` chunks, the last may be smaller. Of several ``learners`` each gets a part of it,
    and ``weight`` is this part's size over the whole's.
    """

    def __init__(self, *, device: torch.device, generator: torch.Generator | None, learners: Learners):
        self.device, self.generator, self.learners, self.weight = device, generator, learners, 1.0
        self._buffer: ReplayBuffer | None = None
        self._layout: dict[NestedKey, tuple[torch.Size, torch.dtype]] = {}  # of the chunks in it
        self._has_told = False
        #: All chunks ``[num_chunks, bptt, ...]``, as they were filled in.
        self.chunks: dict[NestedKey, torch.Tensor] = {}

    def require(self, shape: torch.Size, count: int) -> tuple[int, int]:
        """Rows of a minibatch and how many there will be of chunks ``shape``; ValueError where there are too few for ``count``."""
        number, steps = shape
        if number < whole("minibatches", count):
            raise ValueError(
                f"{count} minibatches cannot be made of {number} chunks of {steps} steps: collect more trials in a "
                "batch, or ask for fewer minibatches."
            )
        rows, made = rows_and_number(number, count)
        if (smallest := (number - 1) % rows + 1) < self.learners.size:
            raise ValueError(
                f"the {number} chunks of the joint batch make minibatches of {rows} and a last one of {smallest}, too few for "
                f"each of {self.learners.size} processes to have one: collect more trials in a batch, or ask for fewer minibatches."
            )
        return rows, made

    def fill(self, chunks: TensorDictBase, count: int, *, shuffle: bool) -> None:
        """Takes a batch's ``chunks`` ``[num_chunks, bptt]``, at most ``count`` minibatches; ValueError where there are fewer."""
        number, _ = chunks.shape
        self.rows, made = self.require(chunks.shape, count)
        if made != count and not self._has_told:
            self._has_told = True
            log.info("%d minibatches a pass, not %d: %d chunks make so many of %d.", made, count, number, self.rows)
        # One buffer for the whole training: first touch of fresh memory costs more than the copy.
        layout = {key: (entry.shape, entry.dtype) for key, entry in chunks.items(True, True)}
        if layout != self._layout:
            self._buffer = ReplayBuffer(
                storage=LazyTensorStorage(number, device=self.device),
                sampler=SamplerWithoutReplacement(),
                batch_size=self.rows,
                generator=self.generator,
            )
        # The sampler's permutation of the last batch must not reach into this one.
        self._buffer.empty()
        self._buffer.sampler.shuffle = shuffle
        with quiet_torchrl():
            self._buffer.extend(chunks)
        stored = self._buffer.storage[:]
        self.chunks, self._layout = {key: stored.get(key) for key in layout}, layout

    def order(self) -> torch.Tensor:
        """The numbers ``[num_chunks]`` of the chunks in the order of the next pass, as the buffer would take them."""
        order, _ = self._buffer.sampler.sample(self._buffer.storage, len(self._buffer))
        return order.long().contiguous()  # as kernels read it, whatever a sampler gives

    def entries(self) -> Iterator[tuple[torch.Tensor, dict[NestedKey, torch.Tensor]]]:
        """One pass: this process's chunks ``[rows]`` of each minibatch, and these as entries ``[rows, bptt, ...]``."""
        for index in self.order().split(self.rows):  # no TensorDict for each
            own = self.share(index)
            yield own, {key: entry.index_select(0, own) for key, entry in self.chunks.items()}

    def share(self, index: torch.Tensor) -> torch.Tensor:
        """This process's part of a minibatch of the chunks ``index``."""
        own = self.learners.share(index)
        self.weight = len(own) / len(index)
        return own


def beside(module: nn.Module, batch: TensorDictBase) -> TensorDictBase:
    """``batch`` on the device of ``module``: a collector may store it elsewhere, or each entry where it was made."""
    device = next((parameter.device for parameter in module.parameters()), batch.device)
    entries = (entry for entry in batch.values(True, True) if isinstance(entry, torch.Tensor))
    return batch if all(entry.device == device for entry in entries) else batch.to(device)


def split_rows(batch: TensorDictBase, bptt: int | None) -> TensorDictBase:
    """Cuts the rows of ``batch`` ``[*B, T]`` into chunks ``[num_chunks, bptt]``, whole rows for None; ValueError for a rest."""
    steps = batch.shape[-1]
    bptt = steps if bptt is None else bptt
    if steps % bptt:
        raise ValueError(
            f"bptt={bptt} does not divide the {steps} steps of a row: the last chunk would be short. Divisors of {steps}: "
            f"{[n for n in range(1, steps + 1) if steps % n == 0]}."
        )
    return batch.reshape(-1, bptt)


def require_trials(batch: TensorDictBase) -> None:
    """ValueError where a row of ``batch`` ``[*B, T]`` is padded, or is not trials of one env row, one after the other."""
    require_time_last(batch)
    require_played(batch)
    begins, ends = batch.get("is_init", None), batch.get(("next", "done"), None)
    if begins is None or ends is None or batch.shape[-1] < 2:
        return
    begins, ends = (flag.reshape(*batch.shape, -1)[..., 0] for flag in (begins, ends))
    wrong = begins[..., 1:] != ends[..., :-1]
    trajectory = batch.get(("collector", "traj_ids"), None)
    if trajectory is not None:
        wrong = wrong | ((trajectory[..., 1:] != trajectory[..., :-1]) != ends[..., :-1])
    if bool(wrong.any()):
        *row, step = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"row {row}: a trial ends at step {step} and none begins at step {step + 1}, or the reverse ({int(wrong.sum())} "
            "times in this batch). Rows must be steps of one env in the order in which they were played, or memory and advantages "
            "flow from one trial into another: no cat_results=-1 (workers end to end), no split_trajs=True, no shuffled steps."
        )
