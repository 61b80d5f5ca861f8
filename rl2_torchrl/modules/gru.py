"""`FastGRUModule`: TorchRL's `GRUModule`, the same numbers several times faster on the CPU; `GRUCore`, the same as a core."""

from collections.abc import Callable

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.modules import GRUModule, set_recurrent_mode

from rl2_torchrl import kernels
from rl2_torchrl.gradients.part import is_bare, others_than
from rl2_torchrl.gradients.recurrent import GRUPart
from rl2_torchrl.kernels.functions import layout_of, require_tensor, unit_stride
from rl2_torchrl.kernels.gru_sequence import gru_sequence, pack_weights, require_weights
from rl2_torchrl.kernels.recording import Recording
from rl2_torchrl.kernels.workspace import Workspace
from rl2_torchrl.modules.cores import RecurrentCore, Tensors, as_sizes, at_ends

__all__ = ["FastGRUModule", "GRUCore", "StepGRU"]


class FastGRUModule(RecurrentCore, GRUModule):
    """A drop-in for `torchrl.modules.GRUModule`: same arguments, keys, primer, ``state_dict`` and numbers, faster on the CPU.

    Whole sequences, resets included, run in one compiled function with one back-propagation through time of its own, in place of
    splitting and padding trajectories. On a CUDA device they are launched step by step, and need no host. What that does not cover
    is left to PyTorch or TorchRL: other devices, and other dtypes than float32 and float64 on the CPU, ``dropout``,
    ``bidirectional``, ``python_based``, another ``recurrent_backend`` than ``"pad"``, gradients of gradients, or a machine
    without a C compiler. Under `torch.func` (a ``vmap`` over an ensemble, for which `torch.nn.GRU` has no rule) and
    `torch.export` it is a loop of PyTorch's operations; `torch.compile` breaks its graph here, as at `torch.nn.GRU`. It is a
    `RecurrentCore` with a memory ``[*B, num_layers, hidden_size]``; inputs of another dtype than the weights' are converted.

    Examples:
        >>> from torchrl.modules import set_recurrent_mode
        >>> gru = FastGRUModule(input_size=3, hidden_size=8, in_key="observation", out_key="features")
        >>> data = TensorDict({"observation": torch.randn(4, 5, 3), "is_init": torch.zeros(4, 5, 1, dtype=torch.bool)}, [4, 5])
        >>> with set_recurrent_mode(True):
        ...     gru(data)["features"].shape
        torch.Size([4, 5, 8])
    """

    recurrent_mode = GRUModule.recurrent_mode
    _starts_from_stored = True  # as in TorchRL's

    def __init__(self, *args, **kwargs):
        GRUModule.__init__(self, *args, **kwargs)
        units, directions = self.gru.hidden_size, 2 if self.gru.bidirectional else 1
        self.input_size, self.features_size = self.gru.input_size, directions * units
        self.memory_shapes = {"hidden": (directions * self.gru.num_layers, units)}

    # torch.compile breaks the graph at a GRU in any case; stopping here saves tracing the code around it.
    forward = torch.compiler.disable(RecurrentCore.forward)

    def _require_memory(self, is_init: Tensor) -> None:
        """`GRUModule` starts from zeros wherever it is given no memory; what takes its place does so too."""

    def gradient_part(self) -> GRUPart | None:
        is_own = self._is_plain() and not others_than(FastGRUModule, self, ["sequence", "unroll"])
        is_covered = is_own and kernels.covers(*self.gru.parameters())
        return GRUPart(self.gru, self.sequence, self.in_keys, self.out_keys[0]) if is_covered else None

    def _is_unchanged(self) -> bool:
        """Whether steps, and what they begin from, are those of this class, so that they need not be made one by one."""
        return not others_than(FastGRUModule, self, ["step"]) and self._starts_from_zeros()

    def _is_plain(self) -> bool:
        """Whether this is `gru_sequence`, layer by layer, and nothing more."""
        gru, is_pad = self.gru, self.recurrent_backend == "pad"
        dropout = gru.dropout and gru.training and gru.num_layers > 1
        is_bare_gru = type(gru) is nn.GRU and is_bare(gru)  # hooks see a GRU that is called
        return is_bare_gru and self._is_unchanged() and is_pad and not gru.bidirectional and not dropout

    def step_function(self) -> Callable[..., Tensors]:
        return StepGRU(self.gru) if self._is_plain() else super().step_function()

    def step(self, x: Tensor, hidden: Tensor) -> Tensors:
        if self._is_plain():
            layers = [layer.squeeze(1) for layer in self._layers(x.unsqueeze(1), hidden.unsqueeze(1), None)]
            return layers[-1], torch.stack(layers, 1)
        x, hidden = self.gru(x.unsqueeze(1), hidden.transpose(0, 1).contiguous())
        return x.squeeze(1), hidden.transpose(0, 1)

    def unroll(self, x: Tensor, memory: Tensors | None, is_init: Tensor | None, *, with_memory: bool = True) -> Tensors:
        covered = kernels.covers(self.gru.weight_hh_l0) or (x.is_cuda and len(x) and not with_memory)
        if (covered or kernels.is_transformed()) and self._is_plain():
            layers = self._layers(x, memory and memory[0], is_init)
            return layers[-1], *([at_ends(torch.stack(layers, -2), is_init)] if with_memory else ())
        if not self._is_unchanged() or not is_bare(self.gru):  # hooks see single steps, as those of a rollout do
            return RecurrentCore.unroll(self, x, memory, is_init, with_memory=with_memory)
        flags = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device) if is_init is None else is_init
        entries = zip(self.in_keys, (x, memory and memory[0], flags.unsqueeze(-1)), strict=True)
        out = TensorDict({key: entry for key, entry in entries if entry is not None}, x.shape[:2])
        with set_recurrent_mode(True):
            return tuple(map(GRUModule.forward(self, out).get, self.out_keys))

    def _layers(self, x, hidden: Tensor | None, is_init: Tensor | None) -> list[Tensor]:
        """Each layer's output ``[N, T, hidden_size]``, from ``hidden`` ``[N, T, num_layers, hidden_size]``."""
        outputs = [x]
        for layer, weights in enumerate(self.gru.all_weights):
            first = None if hidden is None else hidden[:, :, layer]
            outputs.append(gru_sequence(outputs[-1], first, is_init, *weights))
        return outputs[1:]


class GRUCore(FastGRUModule):
    """`FastGRUModule` with the arguments of `LSTMCore`; its memory is ``[*B, num_layers, hidden_size]``.

    Examples:
        >>> core = GRUCore(input_size=5, hidden_size=8, num_layers=2)
        >>> features, hidden = core.step_function()(torch.zeros(4, 5), None)
        >>> features.shape, hidden.shape
        (torch.Size([4, 8]), torch.Size([4, 2, 8]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int = 64,
        num_layers: int = 1,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **keys,
    ):
        sizes = as_sizes(input_size, hidden_size, num_layers)
        super().__init__(*sizes, device=device, in_key="trans", out_key="features")
        self.name_entries(**keys)
        self.to(dtype)

    _require_memory = RecurrentCore._require_memory


class StepGRU:
    """One step of a `torch.nn.GRU` without gradient, for rollouts: the weights are packed once, here."""

    def __init__(self, gru: nn.GRU):
        self.layers = [[weight.detach() for weight in layer] for layer in gru.all_weights]
        self.units, self.weight = gru.hidden_size, self.layers[0][1]
        for layer in self.layers:
            require_weights(*layer)
            require_tensor("a layer's w_hh", layer[1], self.weight.shape, self.weight)
        self.library = kernels.load(self.weight.dtype) if self.weight.is_cpu else None
        self.packed = [] if self.library is None else [pack_weights(*layer) for layer in self.layers]
        self._fitting: tuple | None = None
        self.is_kernels = self.library is not None and len(self.layers) == 1

    def __call__(self, x: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features ``[N, H]`` and next hidden ``[N, num_layers, H]`` of ``x`` ``[N, I]`` and ``hidden``, None for zeros."""
        if hidden is None or (layout_of(x), layout_of(hidden)) != self._fitting:
            x, hidden = self._fitted(x, hidden)
            # What has the same layout as these in the next step need not be looked at again: a look costs half a step.
            self._fitting = (layout_of(x), layout_of(hidden))
        states = []
        for layer in range(len(self.layers)):
            x = self._layer(layer, x, hidden)
            states.append(x)
        return x, (x.unsqueeze(1) if len(states) == 1 else torch.stack(states, 1))

    def _fitted(self, x: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        """Both as the kernels read them, once they fit."""
        given, shape = (x, hidden), (len(x), len(self.layers), self.units)
        x = unit_stride(x.to(self.weight.dtype))
        require_tensor("x", x, (len(x), self.layers[0][0].shape[1]), self.weight)
        hidden = x.new_zeros(shape) if hidden is None else unit_stride(hidden.to(self.weight.dtype))
        require_tensor("the memory", hidden, shape, self.weight)
        if list(map(kernels.address, given)) != [x.data_ptr(), hidden.data_ptr()]:  # copies
            Recording.interrupt()
        return x, hidden

    def _layer(self, layer: int, x: Tensor, hidden: Tensor) -> Tensor:
        if self.library is None:
            return torch.gru_cell(x, hidden[:, layer], *self.layers[layer])
        (rows, inputs), units = x.shape, self.units
        y = Workspace.make(x, (rows, units))
        initial = hidden.data_ptr() + layer * hidden.stride(1) * hidden.element_size()
        self.library.gru_forward(
            *(rows, 1, inputs, units, x.data_ptr(), x.stride(0), 0, initial, hidden.stride(0), 0, None),
            *(self.packed[layer].data_ptr(), y.data_ptr(), None, kernels.threads_for(rows * units * (units + inputs))),
        )
        return y
