"""`Minibatches`: one batch's chunks in a TorchRL replay buffer, and passes over them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer

__all__ = ["Minibatches", "require_trials", "split_rows"]


class Minibatches:
    """Draws the chunks ``[num_chunks, bptt]`` of a batch without replacement, ``count`` minibatches a pass.

    Args:
        count: minibatches a pass; of ``ceil(num_chunks / count)`` chunks each, the last may be smaller.
        shuffle: in random order; False takes them as they come.
        device: where they are kept.
        generator: generator of the order.

    Examples:
        >>> from tensordict import TensorDict
        >>> minibatches = Minibatches(2, shuffle=False)
        >>> minibatches.fill(TensorDict({"x": torch.arange(6).view(3, 2)}, [3, 2]))
        >>> [entries["x"].tolist() for entries in minibatches.entries()]
        [[[0, 1], [2, 3]], [[4, 5]]]
    """

    def __init__(
        self,
        count: int,
        *,
        shuffle: bool = True,
        device: torch.device | None = None,
        generator: torch.Generator | None = None,
    ):
        self.count, self.shuffle, self.device, self.generator = count, shuffle, device, generator
        self._buffer: TensorDictReplayBuffer | None = None
        self._layout: tuple | None = None

    def fill(self, chunks: TensorDictBase) -> None:
        """Takes the ``chunks`` ``[num_chunks, bptt]`` of a new batch in the place of the last one's.

        Raises:
            ValueError: there are fewer chunks than minibatches.
        """
        if len(chunks) < self.count:
            raise ValueError(
                f"{self.count} minibatches cannot be made of {len(chunks)} chunks of {chunks.shape[1]} steps: collect more "
                "trials in a batch, or ask for fewer minibatches."
            )
        # One buffer for the whole training: first touch of fresh memory costs more than the copy.
        layout = (len(chunks), set(chunks.keys(True, True)))
        if self._buffer is None or self._layout != layout:
            self._layout = layout
            self._buffer = TensorDictReplayBuffer(
                storage=LazyTensorStorage(len(chunks), device=self.device or chunks.device or torch.device("cpu")),
                sampler=SamplerWithoutReplacement(shuffle=self.shuffle),
                batch_size=math.ceil(len(chunks) / self.count),
                generator=self.generator,
            )
        # The sampler's permutation of the last batch must not reach into this one.
        self._buffer.empty()
        self._buffer.extend(chunks)

    @property
    def rows(self) -> int:
        """Chunks of a minibatch."""
        return self._buffer.batch_size

    @property
    def chunks(self) -> TensorDictBase:
        """All chunks ``[num_chunks, bptt]``, as they were filled in."""
        return self._buffer.storage[:]

    def indices(self) -> Iterator[torch.Tensor]:
        """One pass, as iterating over the buffer makes it: the numbers of each minibatch's chunks."""
        sampler, size = self._buffer.sampler, self._buffer.batch_size
        sampler.ran_out = False
        while not sampler.ran_out:
            yield sampler.sample(self._buffer.storage, size)[0]

    def entries(self) -> Iterator[dict[NestedKey, torch.Tensor]]:
        """One pass, minibatches as entries ``[rows, bptt, ...]``, without a TensorDict for each."""
        chunks = self.chunks
        names, entries = zip(*((key, chunks.get(key)) for key in chunks.keys(True, True)), strict=True)
        for index in self.indices():
            yield dict(zip(names, (entry.index_select(0, index) for entry in entries), strict=True))


def split_rows(batch: TensorDictBase, bptt: int | None) -> TensorDictBase:
    """Cuts the rows of ``batch`` ``[*B, T]`` into chunks ``[num_chunks, bptt]``; None takes whole rows.

    Raises:
        ValueError: ``bptt`` does not divide ``T``.
    """
    steps = batch.shape[-1]
    bptt = steps if bptt is None else bptt
    if steps % bptt:
        raise ValueError(
            f"bptt={bptt} does not divide the {steps} steps of a row: the last chunk would be short. Divisors of {steps}: "
            f"{[n for n in range(1, steps + 1) if steps % n == 0]}."
        )
    return batch.reshape(-1, steps // bptt, bptt).flatten(0, 1)


def require_trials(batch: TensorDictBase) -> None:
    """Refuses rows of ``batch`` ``[*B, T]`` that are no trials, one after the other, of one env row each.

    Raises:
        ValueError: a row is padded, or a trial begins where none has ended, or the other way round.
    """
    mask = batch.get(("collector", "mask"), None)
    if mask is not None and not bool(mask.all()):
        raise ValueError(
            f"{int((~mask).sum())} steps of the batch are padding (('collector', 'mask') says so), and would be trained on as if "
            "they had been played: collect with split_trajs=False, the default. Rows may hold several trials."
        )
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
