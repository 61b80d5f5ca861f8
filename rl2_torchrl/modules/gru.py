"""`FastGRUModule`: TorchRL's `GRUModule`, the same numbers several times faster on the CPU."""

from __future__ import annotations

import threading

import torch
from tensordict import TensorDictBase
from tensordict.nn import dispatch
from torch import nn
from torch.compiler import is_compiling
from torchrl.modules import GRUModule

from rl2_torchrl import kernels

__all__ = [
    "FastGRUModule",
    "StepGRU",
    "Workspace",
    "as_bytes",
    "backward_in_place",
    "forward_saving",
    "gru_sequence",
    "weight_products",
]


class FastGRUModule(GRUModule):
    """A drop-in for `torchrl.modules.GRUModule`: same arguments, keys, primer, ``state_dict`` and numbers, faster on the CPU.

    Recurrent mode runs the whole sequence, resets included, in one compiled function with one back-propagation through
    time of its own (`gru_sequence`), in place of splitting and padding trajectories for `torch.nn.GRU`; a single step is the
    same function on a sequence of length one. What that does not cover takes TorchRL's path: other devices and
    dtypes than float32 and float64 on the CPU, ``dropout``, ``bidirectional``, ``python_based``, another
    ``recurrent_backend`` than ``"pad"``, ``torch.compile`` and ``vmap``, or a machine without a C compiler.

    Args:
        *args: as for `GRUModule`.
        **kwargs: as for `GRUModule`.

    Examples:
        >>> from tensordict import TensorDict
        >>> from torchrl.modules import set_recurrent_mode
        >>> gru = FastGRUModule(input_size=3, hidden_size=8, in_key="observation", out_key="features")
        >>> data = TensorDict({"observation": torch.randn(4, 5, 3), "is_init": torch.zeros(4, 5, 1, dtype=torch.bool)}, [4, 5])
        >>> with set_recurrent_mode(True):
        ...     gru(data)["features"].shape
        torch.Size([4, 5, 8])
    """

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Reads and writes what `GRUModule` does, for one step ``[*B]`` or, in recurrent mode, ``[*B, T]``."""
        if is_compiling() or not self._is_covered(tensordict):
            return super().forward(tensordict)
        recurrent = self.recurrent_mode
        batch = tensordict.batch_size
        lead = (batch[:-1].numel(), batch[-1]) if recurrent else (batch.numel(), 1)
        x = tensordict.get(self.in_keys[0]).reshape(*lead, -1)
        hidden = tensordict.get(self.in_keys[1], None)
        is_init = tensordict.get(self.in_keys[2]).reshape(lead)
        if hidden is not None:
            hidden = hidden.reshape(*lead, *hidden.shape[-2:])
            if not recurrent:
                hidden = hidden.masked_fill(is_init[..., None, None], 0.0)
        layers = self.sequence(x, hidden, is_init if recurrent else None)
        last = _at_ends(torch.stack(layers, -2) if len(layers) > 1 else layers[0].unsqueeze(-2), is_init)
        tensordict.set(self.out_keys[0], layers[-1].reshape(*batch, -1))
        return tensordict.set(self.out_keys[1], last.reshape(*batch, *last.shape[-2:]))

    def gradient_part(self):
        """The part of a PPO step that this is, with its own gradient (`rl2_torchrl.gradients`), or None without kernels."""
        from rl2_torchrl.gradients.recurrent import GRUPart

        if not (self.is_plain() and self.has_kernels()):
            return None

        def features(x, hidden, is_init):
            return self.sequence(x, hidden, is_init.squeeze(-1))[-1]

        return GRUPart(self.gru, features, self.in_keys, self.out_keys[0])

    def is_plain(self) -> bool:
        """Whether this is `gru_sequence`, layer by layer, and nothing more."""
        gru = self.gru
        dropout = gru.dropout and gru.training and gru.num_layers > 1
        return type(gru) is nn.GRU and not gru.bidirectional and not dropout and self.recurrent_backend == "pad"

    def has_kernels(self) -> bool:
        """Whether `gru_sequence` is compiled for this module's device and dtype."""
        return _library(self.gru.weight_hh_l0) is not None

    def fits(self, x: torch.Tensor | None, hidden: torch.Tensor | None) -> bool:
        """Whether ``x`` ``[..., input_size]`` and ``hidden`` ``[..., num_layers, hidden_size]`` have this GRU's sizes."""
        gru, weight = self.gru, self.gru.weight_hh_l0
        if x is None or (x.device, x.dtype, x.shape[-1]) != (weight.device, weight.dtype, gru.input_size):
            return False
        sizes = (weight.dtype, gru.num_layers, gru.hidden_size)
        return hidden is None or (hidden.dtype, *hidden.shape[-2:]) == sizes

    def _is_covered(self, tensordict: TensorDictBase) -> bool:
        x, hidden = (tensordict.get(key, None) for key in self.in_keys[:2])
        return (
            self.is_plain()
            and self.has_kernels()
            and self.fits(x, hidden)
            and (tensordict.ndim > 0 or not self.recurrent_mode)
            and tensordict.numel() > 0
            and torch._C._functorch.maybe_current_level() is None
        )

    def sequence(
        self, x: torch.Tensor, hidden: torch.Tensor | None, is_init: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Each layer's output ``[N, T, hidden_size]`` for ``x`` ``[N, T, input_size]``; see `gru_sequence`.

        ``hidden`` is ``[N, T, num_layers, hidden_size]`` or None for zeros, ``is_init`` ``[N, T]`` or None.
        """
        outputs = []
        for layer in range(self.gru.num_layers):
            weights = [getattr(self.gru, name) for name in self.gru._all_weights[layer]]
            initial = None if hidden is None else hidden[:, :, layer]
            x = gru_sequence(x, initial, is_init, *weights)
            outputs.append(x)
        return outputs


def _at_ends(states: torch.Tensor, is_init: torch.Tensor | None) -> torch.Tensor:
    """``states`` ``[N, T, ...]`` where a trajectory of the row ends, 0 elsewhere, as `GRUModule` hands them on."""
    if states.shape[1] == 1:
        return states
    ends = torch.ones(states.shape[:2], dtype=torch.bool)
    ends[:, :-1] = is_init[:, 1:]
    out = torch.zeros_like(states)
    out[ends] = states[ends]
    return out


def gru_sequence(
    x: torch.Tensor,
    hidden: torch.Tensor | None,
    is_init: torch.Tensor | None,
    w_ih: torch.Tensor,
    w_hh: torch.Tensor,
    b_ih: torch.Tensor | None = None,
    b_hh: torch.Tensor | None = None,
) -> torch.Tensor:
    """One GRU layer over sequences (Cho et al. 2014; equations and parameters as in `torch.nn.GRU`).

    ``h_t = GRU(x_t, h_{t-1})``; ``h_{t-1}`` is ``hidden[:, t]`` at the first step and wherever ``is_init`` is set. The gradient is
    back-propagation through time in one pass; the weights' gradients are single matrix products over all steps.
    Without compiled kernels (`rl2_torchrl.kernels`) for the device and dtype, and for one step of few rows of many units, it is
    a loop of PyTorch's operations.

    Args:
        x: ``[N, T, input_size]``.
        hidden: ``[N, T, hidden_size]``, or None for zeros.
        is_init: bool ``[N, T]``, or None when no sequence starts anew after its first step.
        w_ih: ``[3 * hidden_size, input_size]``.
        w_hh: ``[3 * hidden_size, hidden_size]``.
        b_ih: ``[3 * hidden_size]`` or None.
        b_hh: ``[3 * hidden_size]`` or None.

    Returns:
        ``h`` ``[N, T, hidden_size]``.

    Examples:
        >>> gru = nn.GRU(3, 8, batch_first=True)
        >>> x = torch.randn(2, 5, 3)
        >>> torch.allclose(gru_sequence(x, None, None, *gru.parameters()), gru(x)[0], atol=1e-6)
        True
    """
    arguments = (x, hidden, is_init, w_ih, w_hh, b_ih, b_hh)
    if _library(x) is None or _is_too_little_to_pack_for(len(x), x.shape[1], w_hh.shape[1]):
        return _loop(*arguments)
    if torch.is_grad_enabled() and any(a is not None and a.requires_grad for a in arguments):
        return _GRUSequence.apply(*arguments)
    return _forward(x, hidden, as_bytes(is_init), _pack(w_ih, w_hh, b_ih, b_hh), w_hh.shape[1], None)


def _is_too_little_to_pack_for(rows: int, steps: int, units: int) -> bool:
    # The kernels read packed weights. For one step of few rows, packing large ones costs more than the step.
    return steps == 1 and rows < 48 and units >= 128


def _loop(x, hidden, is_init, w_ih, w_hh, b_ih, b_hh) -> torch.Tensor:
    h = x.new_zeros(len(x), w_hh.shape[1]) if hidden is None else hidden[:, 0]
    outputs = []
    for t in range(x.shape[1]):
        if t and is_init is not None:
            first = torch.zeros_like(h) if hidden is None else hidden[:, t]
            h = torch.where(is_init[:, t].unsqueeze(-1), first, h)
        h = torch.gru_cell(x[:, t], h, w_ih, w_hh, b_ih, b_hh)
        outputs.append(h)
    return torch.stack(outputs, 1)


def _library(tensor: torch.Tensor):
    return kernels.load(tensor.dtype) if tensor.device.type == "cpu" else None


class StepGRU:
    """One step of a `torch.nn.GRU` without gradient, for rollouts: the weights are packed once, here.

    Examples:
        >>> gru = nn.GRU(3, 8)
        >>> features, hidden = StepGRU(gru)(torch.randn(4, 3), None)
        >>> features.shape, hidden.shape
        (torch.Size([4, 8]), torch.Size([4, 1, 8]))
    """

    def __init__(self, gru: nn.GRU):
        self.layers = [[getattr(gru, name).detach() for name in layer] for layer in gru._all_weights]
        self.units = gru.hidden_size
        weight = gru.weight_hh_l0
        self.library = _library(weight)
        self.packed = [] if self.library is None else [_pack(*layer) for layer in self.layers]

    def __call__(self, x: torch.Tensor, hidden: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Features ``[N, H]`` and next hidden ``[N, num_layers, H]`` of ``x`` ``[N, I]`` and ``hidden``, None for zeros."""
        if hidden is None:
            hidden = x.new_zeros(len(x), len(self.layers), self.units)
        states = []
        for layer in range(len(self.layers)):
            x = self._layer(layer, x, hidden[:, layer])
            states.append(x)
        return x, (x.unsqueeze(1) if len(states) == 1 else torch.stack(states, 1))

    def _layer(self, layer: int, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        if self.library is None:
            return torch.gru_cell(x, hidden, *self.layers[layer])
        (rows, inputs), units = x.shape, self.units
        y = x.new_empty(rows, units)
        self.library.gru_forward(
            *(rows, 1, inputs, units, x.data_ptr(), x.stride(0), 0, hidden.data_ptr(), hidden.stride(0), 0, None),
            *(self.packed[layer].data_ptr(), y.data_ptr(), None, kernels.threads_for(rows * units * (units + inputs))),
        )
        return y


def _pack(w_ih, w_hh, b_ih=None, b_hh=None) -> torch.Tensor:
    library = kernels.load(w_hh.dtype)
    inputs, units = w_ih.shape[1], w_hh.shape[1]
    weights = [None if w is None else w.detach().contiguous() for w in (w_ih, w_hh, b_ih, b_hh)]
    packed = w_hh.new_empty(library.forward_size(inputs, units))
    library.pack_forward(inputs, units, *map(kernels.address, weights), packed.data_ptr())
    return packed


def _forward(x, hidden, is_init, packed, units: int, saved: torch.Tensor | None, y=None) -> torch.Tensor:
    library = kernels.load(x.dtype)
    rows, steps, inputs = x.shape
    x, hidden = _unit_stride(x), _unit_stride(hidden)
    y = x.new_empty(rows, steps, units) if y is None else y
    library.gru_forward(
        *(rows, steps, inputs, units, *_strided(x), *_strided(hidden), kernels.address(is_init), packed.data_ptr()),
        *(y.data_ptr(), kernels.address(saved), kernels.threads_for(rows * steps * units * (units + inputs))),
    )
    return y


class _GRUSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, hidden, is_init, w_ih, w_hh, b_ih, b_hh):
        is_init = as_bytes(is_init)
        y, saved = forward_saving(x, hidden, is_init, (w_ih, w_hh, b_ih, b_hh))
        ctx.save_for_backward(is_init, w_ih, w_hh)
        ctx.saved, ctx.has_bias = saved, b_ih is not None
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        is_init, w_ih, w_hh = ctx.saved_tensors
        if ctx.saved is None:
            raise RuntimeError("this graph was freed by an earlier backward(); keep it with retain_graph=True.")
        # The gradients replace what forward saved, unless the graph is to be walked again.
        gradients = ctx.saved
        if torch._C._autograd._get_current_graph_task_keep_graph():
            gradients = gradients.clone()
        else:
            ctx.saved = None
        needs_x, needs_hidden = ctx.needs_input_grad[:2]
        d_hidden = torch.zeros_like(dy, memory_format=torch.contiguous_format) if needs_hidden else None
        backward_in_place(dy, is_init, w_ih.shape[1], w_hh, gradients, d_hidden)
        d_x = _input_gradient(gradients, w_ih) if needs_x else None
        d_weights = _weight_gradients(gradients, *w_ih.shape)
        Workspace.give(gradients)
        return d_x, d_hidden, None, *(d_weights if ctx.has_bias else (*d_weights[:2], None, None))


def forward_saving(x, hidden, is_init, weights, y=None) -> tuple[torch.Tensor, torch.Tensor]:
    """``h`` ``[N, T, H]``, in ``y`` if that is given, and what `backward_in_place` needs; ``is_init`` as `as_bytes` gives it."""
    inputs, units = x.shape[-1], weights[1].shape[1]
    saved = Workspace.take(x, (*x.shape[:2], kernels.load(x.dtype).saved_size(inputs, units)))
    return _forward(x, hidden, is_init, _pack(*weights), units, saved, y), saved


def backward_in_place(dy, is_init, inputs: int, w_hh, gradients, d_hidden) -> None:
    """Back-propagation through time: turns what forward saved into the gradients of the gates' pre-activations."""
    library = kernels.load(dy.dtype)
    rows, steps, units = dy.shape
    dy, packed = _unit_stride(dy), None
    if steps > 1 or d_hidden is not None:  # else nothing goes back through the weights
        w_hh, packed = w_hh.detach().contiguous(), dy.new_empty(library.backward_size(units))
        library.pack_backward(units, w_hh.data_ptr(), packed.data_ptr())
    library.gru_backward(
        *(rows, steps, inputs, units, *_strided(dy), kernels.address(is_init), kernels.address(packed)),
        *(gradients.data_ptr(), kernels.address(d_hidden), kernels.threads_for(rows * steps * units * units)),
    )


def _weight_gradients(gradients: torch.Tensor, gates: int, inputs: int) -> tuple[torch.Tensor, ...]:
    """Gradients of w_ih, w_hh, b_ih and b_hh from the kernel's ``(dr, dz, dhn, dn, h, x, 1, 0, …)`` ``[N, T, …]``."""
    units = gates // 3
    d_rzh, d_n = weight_products(gradients, units)
    d_w_hh, d_b_hh = d_rzh[:, :units].contiguous(), d_rzh[:, units + inputs].contiguous()
    d_input = torch.cat((d_rzh[: 2 * units, units:], d_n))
    return d_input[:, :inputs].contiguous(), d_w_hh, d_input[:, inputs].contiguous(), d_b_hh


def weight_products(gradients: torch.Tensor, units: int, out=(None, None)) -> tuple[torch.Tensor, torch.Tensor]:
    """(dr, dz, dhn) by (h, x, 1, …) ``[3 H, H + I + 1 + …]`` and dn by (x, 1, …) ``[H, I + 1 + …]``, sums over all steps."""
    flat = gradients.view(-1, gradients.shape[-1])
    d_rzh = torch.mm(flat[:, : 3 * units].t(), flat[:, 4 * units :], out=out[0])
    return d_rzh, torch.mm(flat[:, 3 * units : 4 * units].t(), flat[:, 5 * units :], out=out[1])


def _input_gradient(gradients: torch.Tensor, w_ih: torch.Tensor) -> torch.Tensor:
    units = len(w_ih) // 3
    return torch.cat((gradients[..., : 2 * units], gradients[..., 3 * units : 4 * units]), -1) @ w_ih


class Workspace:
    """Memory of one minibatch that the next one uses again: first touch of fresh memory costs more than the arithmetic on it."""

    _local = threading.local()  # a tensor that two threads took would be written by both
    _KEPT = 8  # two networks in one loss: states, gradients and what forward saves of each, and a little more

    @classmethod
    def take(cls, like: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        free = cls._tensors()
        for i, tensor in enumerate(free):
            if tensor.shape == shape and tensor.dtype == like.dtype:
                return free.pop(i)
        return like.new_empty(shape)

    @classmethod
    def give(cls, tensor: torch.Tensor) -> None:
        free = cls._tensors()
        free.append(tensor)
        del free[: -cls._KEPT]

    @classmethod
    def _tensors(cls) -> list[torch.Tensor]:
        if not hasattr(cls._local, "free"):
            cls._local.free = []
        return cls._local.free


def _unit_stride(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """``tensor`` detached, with its last dimension contiguous."""
    if tensor is None:
        return None
    tensor = tensor.detach()
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def as_bytes(is_init: torch.Tensor | None) -> torch.Tensor | None:
    """``is_init`` as contiguous bytes, or None where nothing starts anew after the first step."""
    if is_init is None or is_init.shape[1] == 1:
        return None
    return is_init.bool().contiguous() if is_init[:, 1:].any() else None


def _strided(tensor: torch.Tensor | None) -> tuple:
    """Address and strides of row and step, as the kernels take them."""
    return (None, 0, 0) if tensor is None else (tensor.data_ptr(), *tensor.stride()[:2])
