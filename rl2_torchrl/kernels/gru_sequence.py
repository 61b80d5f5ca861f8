"""`gru_sequence`: a GRU layer over sequences with resets, compiled, and its gradient."""

import torch
from torch import Tensor, nn

from rl2_torchrl import kernels
from rl2_torchrl.kernels.functions import (
    contiguous,
    differentiable_gradients,
    out_of_autocast,
    require_tensor,
    unit_stride,
)
from rl2_torchrl.kernels.recording import Recording
from rl2_torchrl.kernels.workspace import Workspace

__all__ = [
    *("as_bytes", "gru_sequence", "pack_weights", "require_weights", "sequence_backward", "sequence_forward"),
]


def gru_sequence(x: Tensor, hidden: Tensor | None, is_init: Tensor | None, *weights: Tensor | None) -> Tensor:
    """One GRU layer over sequences (Cho et al. 2014; equations and parameters as in `torch.nn.GRU`): ``h`` ``[N, T, H]``.

    ``h_t = GRU(x_t, h_{t-1})``; ``h_{t-1}`` is ``hidden[:, t]`` (None: 0) at the first step and where ``is_init`` ``[N, T]`` is set
    (None: nowhere else). ``x`` ``[N, T, I]`` and ``hidden`` ``[N, T, H]`` are converted to the dtype of ``weights``: w_ih, w_hh,
    and b_ih and b_hh, if there are. The gradient is back-propagation through time in one pass, the weights' are single
    matrix products over all steps. On a CUDA device it goes step by step (`_GRUSteps`). Elsewhere, without compiled kernels for
    the device and dtype, under `torch.func` and `torch.export`, and for one step of few rows of many units, it is a loop of
    PyTorch's operations.
    """
    weights = (*weights, None, None)[:4]
    require_weights(*weights)
    w_ih, w_hh, *_ = weights
    x, hidden = _as_inputs(x, hidden, is_init, w_ih, w_hh)
    if w_hh.is_cuda and not kernels.is_transformed():
        return _GRUSteps.apply(x, hidden, is_init, *weights)
    # The kernels read packed weights. For one step of few rows, packing large ones costs more than the step.
    # Not asked of what is compiled or exported, which would keep to this number of rows.
    if not kernels.covers(w_hh) or not len(x) or (x.shape[1] == 1 and len(x) < 48 and w_hh.shape[1] >= 128):
        return _loop(x, hidden, is_init, *weights)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, hidden, *weights)):
        return _GRUSequence.apply(x, hidden, is_init, *weights)
    return sequence_forward(x, hidden, as_bytes(is_init), weights, saves=False)[0]


def require_weights(w_ih, w_hh, b_ih=None, b_hh=None) -> None:
    """Raises unless these are the weights of one GRU layer, on one device and of one dtype."""
    gates, units = (*w_hh.shape, 0, 0)[:2]
    if w_hh.ndim != 2 or gates != 3 * units:
        raise ValueError(f"w_hh has shape {tuple(w_hh.shape)}; it must be [3 * hidden_size, hidden_size].")
    if (b_ih is None) != (b_hh is None):
        raise ValueError("a GRU layer has two biases, b_ih and b_hh, or none; only one of them is given.")
    require_tensor("w_ih", w_ih, (gates, w_ih.shape[-1]), w_hh)
    for name, bias in (("b_ih", b_ih), ("b_hh", b_hh)):
        if bias is not None:
            require_tensor(name, bias, (gates,), w_hh)


def _as_inputs(x, hidden, is_init, w_ih, w_hh) -> tuple[Tensor, Tensor | None]:
    """``x`` and ``hidden`` in the weights' dtype, once their sizes and devices fit."""
    if x.ndim != 3 or x.shape[1] < 1 or x.shape[2] != w_ih.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}; it must be [N, T, {w_ih.shape[1]}] with T at least 1.")
    x = x.to(w_hh.dtype)
    require_tensor("x", x, x.shape, w_hh)
    if hidden is not None:
        hidden = hidden.to(w_hh.dtype)
        require_tensor("hidden", hidden, (*x.shape[:2], w_hh.shape[1]), w_hh)
    if is_init is not None and (is_init.shape, is_init.device) != (x.shape[:2], x.device):
        raise ValueError(f"is_init has shape {tuple(is_init.shape)}; it must be {tuple(x.shape[:2])} on {x.device}.")
    return x, hidden


def _loop(x, hidden, is_init, w_ih, w_hh, b_ih, b_hh) -> Tensor:
    h = x.new_zeros(x.shape[0], w_hh.shape[1]) if hidden is None else hidden[:, 0]
    outputs, cell = [], _gru_cell if kernels.is_transformed() else torch.gru_cell
    for t in range(x.shape[1]):
        if t and is_init is not None:
            first = torch.zeros_like(h) if hidden is None else hidden[:, t]
            h = torch.where(is_init[:, t].bool().unsqueeze(-1), first, h)
        h = cell(x[:, t], h, w_ih, w_hh, b_ih, b_hh)
        outputs.append(h)
    return torch.stack(outputs, 1)


def _gru_cell(x, h, w_ih, w_hh, b_ih, b_hh) -> Tensor:
    """`torch.gru_cell`, which under vmap adds in place to a memory that all rows share."""
    r_x, z_x, n_x = nn.functional.linear(x, w_ih, b_ih).chunk(3, -1)
    r_h, z_h, n_h = nn.functional.linear(h, w_hh, b_hh).chunk(3, -1)
    new, keep = (n_x + (r_x + r_h).sigmoid() * n_h).tanh(), (z_x + z_h).sigmoid()
    return new + keep * (h - new)


# ------------------------------------------------------------------ kernels
def pack_weights(w_ih, w_hh, b_ih=None, b_hh=None) -> Tensor:
    """The weights in the order in which the kernels read them; they are those of `require_weights`, on the CPU."""
    library = kernels.load(w_hh.dtype)
    inputs, units = w_ih.shape[1], w_hh.shape[1]
    weights = [None if w is None else contiguous(w.detach()) for w in (w_ih, w_hh, b_ih, b_hh)]
    packed = Workspace.make(w_hh, (library.forward_size(inputs, units),))
    library.pack_forward(inputs, units, *map(kernels.address, weights), packed.data_ptr())
    return packed


def sequence_forward(x, hidden, is_init, weights, *, saves: bool) -> tuple[Tensor, Tensor | None]:
    """`gru_sequence` by the kernels; and, if it ``saves``, what `sequence_backward` needs ``[N, T, ...]``.

    It makes no graph; ``is_init`` is what `as_bytes` makes.
    """
    library, packed, saved = kernels.load(x.dtype), pack_weights(*weights), None
    (rows, steps, inputs), units = x.shape, weights[1].shape[1]
    x, hidden = unit_stride(x), None if hidden is None else unit_stride(hidden)
    if saves:
        saved = Workspace.take(x, (rows, steps, library.saved_size(inputs, units)))
    y = Workspace.take(x, (rows, steps, units))
    library.gru_forward(
        *(rows, steps, inputs, units, *_strided(x), *_strided(hidden), kernels.address(is_init), packed.data_ptr()),
        *(y.data_ptr(), kernels.address(saved), kernels.threads_for(rows * steps * units * (units + inputs))),
    )
    return y, saved


def sequence_backward(dy, is_init, weights, saved: Tensor, *, by_x: bool, d_hidden=None) -> tuple[Tensor | None, ...]:
    """Back-propagation through time of ``dy``, the gradient by ``h``: those by ``x`` (None unless ``by_x``) and ``weights``.

    ``saved``, of `sequence_forward`, becomes ``(dr, dz, dhn, dn, h, x, 1, 0, ...)`` ``[N, T, ...]``, the first four by the gates'
    pre-activations; ``d_hidden``, contiguous zeros ``[N, T, H]`` or None, the gradient by the memory.
    """
    w_ih, w_hh, *_ = weights
    library, (rows, steps) = kernels.load(w_hh.dtype), saved.shape[:2]
    (gates, inputs), units = w_ih.shape, w_hh.shape[1]
    require_tensor("dy", dy, (rows, steps, units), w_hh)  # which a part of a user's may have given
    dy, packed = unit_stride(dy), None
    if steps > 1 or d_hidden is not None:  # else nothing goes back through the weights
        w_hh, packed = contiguous(w_hh.detach()), Workspace.make(dy, (library.backward_size(units),))
        library.pack_backward(units, w_hh.data_ptr(), packed.data_ptr())
    library.gru_backward(
        *(rows, steps, inputs, units, *_strided(dy), kernels.address(is_init), kernels.address(packed)),
        *(saved.data_ptr(), kernels.address(d_hidden), kernels.threads_for(rows * steps * units * units)),
    )
    d_x, size = None, rows * steps
    if by_x:
        w_ih, d_x = contiguous(w_ih.detach()), Workspace.take(dy, (rows, steps, inputs))
        addresses = (saved.data_ptr(), w_ih.data_ptr(), d_x.data_ptr())
        library.gru_input_gradient(size, inputs, units, *addresses, kernels.threads_for(size * gates * inputs))
    made = [Workspace.make(dy, shape) for shape in ((gates, inputs), (gates, units), (gates,), (gates,))]
    # A thread's sums have to be added to the others': of few steps that costs more than it saves.
    threads = min(kernels.threads_for(size * gates * (units + inputs)), max(1, size // 64))
    sums = Workspace.make(dy, (threads, library.sums_size(inputs, units)))
    addresses = saved.data_ptr(), *map(kernels.address, made), sums.data_ptr()
    library.gru_weight_gradients(size, inputs, units, *addresses, threads)
    return d_x, *(None if weight is None else gradient for gradient, weight in zip(made, weights, strict=False))


class _GRUSequence(torch.autograd.Function):
    @staticmethod
    @out_of_autocast
    def forward(ctx, x, hidden, is_init, *weights):
        is_init = as_bytes(is_init)
        y, ctx.saved = sequence_forward(x, hidden, is_init, weights, saves=True)
        ctx.save_for_backward(x, hidden, is_init, *weights)
        return y

    @staticmethod
    @out_of_autocast
    def backward(ctx, dy):
        _, _, is_init, *weights = ctx.saved_tensors
        if torch.is_grad_enabled():
            return differentiable_gradients(_loop, ctx.saved_tensors, ctx.needs_input_grad, dy)
        if ctx.saved is None:
            raise RuntimeError("this graph was freed by an earlier backward(); keep it with retain_graph=True.")
        # The gradients replace what forward saved, unless the graph is to be walked again.
        saved = ctx.saved
        if torch._C._autograd._get_current_graph_task_keep_graph():
            saved = saved.clone()
        else:
            ctx.saved = None
        by_x, by_hidden, *_ = ctx.needs_input_grad
        d_hidden = torch.zeros_like(dy, memory_format=torch.contiguous_format) if by_hidden else None
        d_x, *d_weights = sequence_backward(dy, is_init, weights, saved, by_x=by_x, d_hidden=d_hidden)
        return d_x, d_hidden, None, *d_weights


def as_bytes(is_init: Tensor | None) -> Tensor | None:
    """``is_init`` as the kernels read it: contiguous bytes."""
    if is_init is not None and is_init.dtype != torch.bool:
        return Recording.made(lambda: is_init.bool().contiguous())
    return contiguous(is_init)


def _strided(tensor: Tensor | None) -> tuple:
    """Address and strides of row and step, as the kernels take them."""
    return (None, 0, 0) if tensor is None else (tensor.data_ptr(), *tensor.stride()[:2])


# ------------------------------------------------------------------ step by step
class _GRUSteps(torch.autograd.Function):
    """`gru_sequence` step by step: in each a matrix product and PyTorch's fused cell; what needs no memory is one product.

    Going back it is the same. The host only launches, reading nothing back, so that it all can be part of a CUDA graph. Matrix
    products are of PyTorch's float32 precision, as cuDNN's are not.
    """

    @staticmethod
    @out_of_autocast
    def forward(ctx, x, hidden, is_init, w_ih, w_hh, b_ih, b_hh):
        inputs = (x, hidden, is_init, w_ih, w_hh, b_ih, b_hh)
        x = x.transpose(0, 1).contiguous()  # a step's rows side by side
        gates = x @ w_ih.t() if b_ih is None else torch.addmm(b_ih, x.flatten(0, 1), w_ih.t()).unflatten(0, x.shape[:2])
        resets = None if is_init is None else is_init.bool().t().unsqueeze(-1)
        zeros = x.new_zeros(x.shape[1], w_hh.shape[1])
        h = zeros if hidden is None else hidden[:, 0].contiguous()
        before, after, saved = [], [], []
        for t in range(len(x)):
            if t and resets is not None:
                h = torch.where(resets[t], zeros if hidden is None else hidden[:, t], h)
            before.append(h)
            by_h = h @ w_hh.t() if b_hh is None else torch.addmm(b_hh, h, w_hh.t())
            h, kept = torch.ops.aten._thnn_fused_gru_cell(gates[t], by_h, h)  # and what its gradient needs [N, 5 H]
            after.append(h)
            saved.append(kept)
        ctx.save_for_backward(*inputs, x, torch.stack(before), resets, *saved)
        return torch.stack(after, 1)

    @staticmethod
    @out_of_autocast
    def backward(ctx, dy):
        inputs, (x, before, resets, *saved) = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
        if torch.is_grad_enabled():
            return differentiable_gradients(_loop, inputs, ctx.needs_input_grad, dy)
        _, _, _, w_ih, w_hh, b_ih, _ = inputs
        d_hidden = torch.zeros_like(dy) if ctx.needs_input_grad[1] else None
        dy, d_h, by_x, by_h = dy.transpose(0, 1).contiguous(), torch.zeros_like(before[0]), [], []
        for t in reversed(range(len(saved))):
            d_x_gates, d_h_gates, d_h, *_ = torch.ops.aten._thnn_fused_gru_cell_backward(d_h + dy[t], saved[t], False)
            by_x.append(d_x_gates)
            by_h.append(d_h_gates)
            d_h.addmm_(d_h_gates, w_hh)
            if d_hidden is not None:
                d_hidden[:, t] = d_h if t == 0 else 0 if resets is None else torch.where(resets[t], d_h, 0.0)
            if t and resets is not None:
                d_h = torch.where(resets[t], 0.0, d_h)
        by_x, by_h = torch.stack(by_x[::-1]), torch.stack(by_h[::-1])
        d_x = (by_x @ w_ih).transpose(0, 1) if ctx.needs_input_grad[0] else None
        d_biases = (by_x.sum((0, 1)), by_h.sum((0, 1))) if b_ih is not None else (None, None)
        # The sum over all steps and rows of the outer products of gates and inputs.
        products = (gates.flatten(0, 1).t() @ read.flatten(0, 1) for gates, read in ((by_x, x), (by_h, before)))
        return d_x, d_hidden, None, *products, *d_biases
