"""`GraphReplay`: on a CUDA device, work that repeats without the host is recorded once and launched as a whole; `held_by`: what a
recording holds on to beside the numbers in tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

__all__ = ["GraphReplay", "held_by"]


class GraphReplay:
    """``function()``, on a CUDA device as a CUDA graph: one launch in place of hundreds, for none of which Python is waited for.

    The first call runs as it is, so that libraries and buffers are set up; the second is recorded, and from then on the
    recording is replayed. On other devices each call is a plain one.

    ``function`` works in place on the same memory in every call, returns nothing, reads no number back to the host, and does the
    same operations whatever the numbers are; it draws from PyTorch's own generator and from ``generators``.

    Attributes:
        refusal: why it could not be recorded, as where it reads a number back after all: each call is a plain one then.
    """

    def __init__(
        self, function: Callable[[], object], device: torch.device, generators: Sequence[torch.Generator] = ()
    ):
        self.function, self.device, self.generators = function, device, generators
        self._is_warm, self._graph = False, None
        self.refusal: str | None = None

    def __getstate__(self) -> dict[str, object]:
        # A recording is of this one's memory: a copy, which has other memory, makes its own.
        return {**vars(self), "_is_warm": False, "_graph": None}

    def __call__(self) -> None:
        if self.device.type != "cuda":
            self.function()
            return
        if not self._is_warm:
            self._warm_up()
            return
        if self._graph is None and self.refusal is None:
            self._record()
        (self.function if self._graph is None else self._graph.replay)()

    def _warm_up(self) -> None:
        # On a stream of its own, as recording asks for: memory set up on the main stream could not be recorded.
        stream, self._is_warm = torch.cuda.Stream(self.device), True
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.function()
        torch.cuda.current_stream(self.device).wait_stream(stream)

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        try:
            # The outer context takes this thread back from the recording's stream, on which an error would leave it.
            with torch.cuda.stream(torch.cuda.current_stream(self.device)), torch.cuda.graph(graph):
                self.function()
        except RuntimeError as error:
            self.refusal = str(error).partition("\n")[0]
        else:
            self._graph = graph


def held_by(modules: Iterable[nn.Module]) -> list[tuple]:
    """What a recording has as it was in ``modules``: numbers, texts and functions that a user may set anew, such as a dropout's
    ``p`` or an env's noise, and where tensors lie."""
    return [(id(module), _held(vars(module)), _held(module._parameters), _held(module._buffers)) for module in modules]


def _held(named: dict[str, object]) -> dict[str, object]:
    public = {name: value for name, value in named.items() if name[0] != "_"}
    tensors = {n: (t.data_ptr(), t.dtype, t.requires_grad) for n, t in public.items() if isinstance(t, torch.Tensor)}
    return {n: v for n, v in public.items() if isinstance(v, (int, float, str)) or callable(v)} | tensors
