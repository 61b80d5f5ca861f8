"""`GraphReplay`: on a CUDA device, work that repeats without the host is recorded once and launched as a whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

__all__ = ["GraphReplay"]


class GraphReplay:
    """``function()``, on a CUDA device as a CUDA graph: one launch in place of hundreds, for none of which Python is waited for.

    The first call runs as it is, so that libraries and buffers are set up; the second is recorded, and from then on the
    recording is replayed. On other devices each call is a plain one.

    ``function`` works in place on the same memory in every call, returns nothing, reads no number back to the host, and does the
    same operations whatever the numbers are; it draws from PyTorch's own generator and from ``generators``.
    """

    def __init__(
        self, function: Callable[[], object], device: torch.device, generators: Sequence[torch.Generator] = ()
    ):
        self.function, self.device, self.generators = function, device, generators
        self._is_warm, self._graph = False, None

    def __getstate__(self) -> dict[str, object]:
        # A recording is of this one's memory: a copy, which has other memory, makes its own.
        return {**vars(self), "_is_warm": False, "_graph": None}

    def __call__(self) -> None:
        if self.device.type != "cuda":
            self.function()
        elif not self._is_warm:
            self._warm_up()
        else:
            self._graph = self._graph or self._record()
            self._graph.replay()

    def _warm_up(self) -> None:
        # On a stream of its own, as recording asks for: memory set up on the main stream could not be recorded.
        stream, self._is_warm = torch.cuda.Stream(self.device), True
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.function()
        torch.cuda.current_stream(self.device).wait_stream(stream)

    def _record(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            self.function()
        return graph
