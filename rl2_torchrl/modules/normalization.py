"""`RunningNorm`: inputs at mean 0 and standard deviation 1, by statistics that move between updates and at no other time."""

from collections.abc import Callable, Sequence

import torch
from tensordict import NestedKey
from torch import Tensor, nn

from rl2_torchrl.gradients.part import Part

__all__ = ["RunningNorm"]


class RunningNorm(nn.Module):
    """``clip((x - mean) / std)`` by the mean and standard deviation of all data seen so far, entry by entry.

    `PPOUpdate` hands each batch to `update_statistics` once its passes are over: within a rollout and the update on it the
    statistics are fixed, so that the first ratio of an update is exactly 1. They are buffers: weights that are saved, exported or
    sent to workers have them, and an evaluation leaves them alone; they stay float64 when a policy is cast (``policy.half()``).
    Before the first batch nothing is changed.

    Args:
        size: size of the input.
        columns: which of its entries are normalised, bool ``[size]``; all by default. The others, such as one-hot vectors, pass
            as they are.
        clip: what is normalised is kept within ± this.
        device: of the buffers.

    Examples:
        >>> norm = RunningNorm(2, columns=[True, False])
        >>> norm.update_statistics(torch.tensor([[1000.0, 1.0], [3000.0, 0.0]]))
        >>> norm(torch.tensor([3000.0, 1.0]))
        tensor([1., 1.])
    """

    def __init__(
        self,
        size: int,
        columns: Sequence[bool] | Tensor | None = None,
        *,
        clip: float = 10.0,
        device: torch.device | None = None,
    ):
        super().__init__()
        columns = torch.ones(size, dtype=torch.bool) if columns is None else torch.as_tensor(columns, dtype=torch.bool)
        if columns.shape != (size,) or not clip > 0:
            raise ValueError(f"columns {tuple(columns.shape)}, {size=}, {clip=}: one flag an entry, and a bound.")
        self.clip = clip
        self.register_buffer("columns", columns.to(device))
        # In float64, as the sums of long runs; what `forward` reads is made of them.
        for name, shape in (("count", ()), ("mean", size), ("squares", size)):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64, device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        # `Module.half()` and its like would cast the sums: 65,504 is float16's largest count, and float32's sums stand still in
        # long runs. The device is followed.
        sums = {name: buffer for name, buffer in self._buffers.items() if buffer.is_floating_point()}
        super()._apply(fn, recurse)
        for name, buffer in sums.items():
            moved = self._buffers[name]
            self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    @property
    def std(self) -> Tensor:
        """Standard deviations ``[size]``, 1 where nothing has varied."""
        std = (self.squares / self.count.clamp_min(1)).sqrt()
        # What is left by the rounding of float64's sums is no spread.
        return torch.where(std > 16 * torch.finfo(std.dtype).eps * self.mean.abs(), std, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``x`` ``[*B, size]`` to ``[*B, size]``; whole numbers become reals."""
        return self.step_function()(x)

    def step_function(self) -> Callable[[Tensor], Tensor]:
        shift = torch.where(self.columns, self.mean, 0.0)
        scale = torch.where(self.columns, 1 / self.std, 1.0)
        bound = torch.where(self.columns & (self.count > 0), self.clip, torch.inf)
        by_dtype: dict[torch.dtype, list[Tensor]] = {}

        def step(x: Tensor) -> Tensor:
            if x.dtype not in by_dtype:
                dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
                by_dtype[x.dtype] = [each.to(dtype) for each in (shift, scale, bound, -bound)]
            less, times, most, least = by_dtype[x.dtype]
            return ((x.to(less.dtype) - less) * times).clamp(least, most)

        return step

    @torch.no_grad()
    def update_statistics(self, x: Tensor) -> None:
        """Adds the data ``x`` ``[*B, size]`` (Chan, Golub & LeVeque 1983, eq. 2.1)."""
        x = x.reshape(-1, x.shape[-1])
        x = x.byte() if x.dtype == torch.bool else x  # of which nothing can be subtracted
        # The mean of one column first: float32 sums of large numbers would lose what varies.
        mean = x.mean(0, dtype=torch.float64)
        squares = (x - mean).square().sum(0)
        if not squares[self.columns].sum().isfinite():
            raise FloatingPointError("the data to normalise by are not finite: mend the env's observations or rewards.")
        count = self.count + len(x)
        delta = mean - self.mean
        self.squares += squares + delta.square() * (self.count * len(x) / count)
        self.mean += delta * (len(x) / count)
        self.count.copy_(count)

    def gradient_part(self, in_keys: Sequence[NestedKey], out_keys: Sequence[NestedKey]) -> Part:
        return Part(self, in_keys, out_keys)
