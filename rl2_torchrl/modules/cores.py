"""The core of a network, which carries its memory: `RecurrentCore` for one of your own, and `LSTMCore`.

A core is a TensorDictModule that reads ``[x, *memory_keys, "is_init"]``, writes ``[features, *("next", memory_key)]``, and does
one step ``[*B]`` or, in recurrent mode, sequences ``[*B, T]``, as TorchRL's `GRUModule` does. Rollouts and updates call it on
plain tensors, by `step_function`, `sequence` and `initial_memory`, which all of ours have (`FastGRUModule` too).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import index

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import unravel_key
from torch import nn
from torchrl.data import Unbounded
from torchrl.envs import TensorDictPrimer
from torchrl.modules import recurrent_mode

__all__ = ["LSTMCore", "RecurrentCore", "Tensors", "name_entries", "run_core", "run_segments", "sub_key"]

Tensors = tuple[torch.Tensor, ...]


class RecurrentCore(TensorDictModuleBase):
    """A core of your own: write `step`, and sequences with resets, primers and TensorDicts are derived from it.

    Args:
        features_size: size of the features that `step` gives.
        memory: name and shape (of one row) of each tensor that is carried from step to step, such as ``{"hidden": (64,)}``.
        input_size: size of what it reads, to be checked; None for any.
        in_key: the entry that it reads. Default ``"trans"``.
        hidden_key: the entry of the first memory; further ones have their name appended, as in ``"hidden_cell"``. Default
            ``"hidden"``.
        features_key: the entry that it writes. Default ``"features"``.

    Put into a network (``RecurrentActor(core=...)``) its entries are named by the network's own ``in_key``, ``hidden_key`` and
    ``features_key``.

    Examples:
        >>> class Average(RecurrentCore):  # an exponential average of what it has seen
        ...     def __init__(self, input_size, **keys):
        ...         super().__init__(input_size, {"average": (input_size,)}, input_size=input_size, **keys)
        ...     def step(self, x, average):
        ...         average = 0.5 * (average + x)
        ...         return average, average
        >>> Average(1).sequence(torch.ones(1, 3, 1), None, None).flatten().tolist()
        [0.5, 0.75, 0.875]
    """

    def __init__(
        self,
        features_size: int,
        memory: Mapping[str, Sequence[int]],
        *,
        input_size: int | None = None,
        in_key: NestedKey = "trans",
        hidden_key: NestedKey = "hidden",
        features_key: NestedKey = "features",
    ):
        super().__init__()
        if not memory:
            raise ValueError(
                "a core without memory cannot remember: name at least one tensor, memory={'hidden': (64,)}."
            )
        self.features_size, self.input_size = index(features_size), input_size
        self.memory_shapes = {name: tuple(map(index, shape)) for name, shape in memory.items()}
        name_entries(self, in_key, hidden_key, features_key)

    # ------------------------------------------------------- for you to write
    def step(self, x: torch.Tensor, *memory: torch.Tensor) -> Tensors:
        """One step of N rows, each independent of the others, differentiable.

        Args:
            x: ``[N, input_size]``.
            *memory: ``[N, *shape]`` each, in the order of ``memory``.

        Returns:
            features ``[N, features_size]``, then the memories after the step.
        """
        raise NotImplementedError(f"{type(self).__name__} must define step(x, *memory) -> features, *memory.")

    def initial_memory(self, num_rows: int) -> Tensors:
        """The memories ``[num_rows, *shape]`` with which a trial starts: zeros, unless you say otherwise."""
        like = next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0))
        return tuple(like.new_zeros(num_rows, *shape) for shape in self.memory_shapes.values())

    # ---------------------------------------------------------------- derived
    def step_function(self) -> Callable[..., Tensors]:
        """``(x, *memory) -> (features, *memory)``: `step` for a rollout, without gradient; memories of None start anew.

        It may keep a copy of the weights, so that it is made anew whenever they have changed.
        """

        @torch.no_grad()
        def step(x: torch.Tensor, *memory: torch.Tensor | None) -> Tensors:
            x, memory = as_dtype_of(self, x, memory)
            return self.step(x, *(memory or self.initial_memory(len(x))))

        return step

    def sequence(self, x: torch.Tensor, memory: Tensors | None, is_init: torch.Tensor | None) -> torch.Tensor:
        """The features ``[N, T, features_size]`` of sequences, differentiable.

        Args:
            x: ``[N, T, input_size]``.
            memory: ``[N, T, *shape]`` each. The core starts from those at step 0, and from those at every step where ``is_init`` is
                set. None: it starts from `initial_memory`.
            is_init: bool ``[N, T]``, or None where nothing starts anew after step 0.
        """
        return self.unroll(*as_dtype_of(self, x, memory), is_init)[0]

    def unroll(self, x: torch.Tensor, memory: Tensors | None, is_init: torch.Tensor | None) -> Tensors:
        """`sequence`, and the memories ``[N, T, *shape]`` after each trial's last step in its row, 0 elsewhere."""
        initial = None if memory else self.initial_memory(len(x))
        state = initial or tuple(m[:, 0] for m in memory)
        outputs = []
        for t in range(x.shape[1]):
            if t and is_init is not None:
                first = initial or tuple(m[:, t] for m in memory)
                state = tuple(torch.where(_rows(is_init[:, t], m), m, old) for m, old in zip(first, state, strict=True))
            features, *state = self.step(x[:, t], *state)
            outputs.append((features, *state))
        features, *states = (torch.stack(each, 1) for each in zip(*outputs, strict=True))
        return features, *(at_ends(each, is_init) for each in states)

    @property
    def recurrent_mode(self) -> bool:
        """Whether ``forward`` takes sequences; see `torchrl.modules.set_recurrent_mode`."""
        return bool(recurrent_mode())

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """One step ``[*B]`` or, in recurrent mode, sequences ``[*B, T]``."""
        return run_core(self, tensordict, *read_entries(self, tensordict))

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """The transform that writes the memories into an env's reset; `get_primers_from_module` finds it."""
        return make_primer(self)


class LSTMCore(RecurrentCore):
    """An LSTM (Hochreiter & Schmidhuber 1997), by `torch.nn.LSTM`: two memories, its output and its cell.

    Args:
        input_size: size of what it reads.
        hidden_size: units. Default 64.
        num_layers: Default 1.
        in_key: Default ``"trans"``.
        hidden_key: entry of the outputs ``[*B, num_layers, hidden_size]``; the cell's is this with ``_cell`` appended. Default
            ``"hidden"``.
        features_key: Default ``"features"``.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Examples:
        >>> core = LSTMCore(input_size=5, hidden_size=8)
        >>> core.in_keys
        ['trans', 'hidden', 'hidden_cell', 'is_init']
        >>> core.sequence(torch.zeros(4, 10, 5), None, None).shape
        torch.Size([4, 10, 8])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int = 64,
        num_layers: int = 1,
        *,
        in_key: NestedKey = "trans",
        hidden_key: NestedKey = "hidden",
        features_key: NestedKey = "features",
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ):
        sizes = require_sizes(input_size, hidden_size, num_layers)
        shape = (sizes[2], sizes[1])
        keys = {"in_key": in_key, "hidden_key": hidden_key, "features_key": features_key}
        super().__init__(sizes[1], {"hidden": shape, "cell": shape}, input_size=sizes[0], **keys)
        self.lstm = nn.LSTM(*sizes, batch_first=True, device=device, dtype=dtype)

    def step(self, x: torch.Tensor, hidden: torch.Tensor, cell: torch.Tensor) -> Tensors:
        states = []
        for layer, names in enumerate(self.lstm._all_weights):
            weights = [getattr(self.lstm, name) for name in names]
            states.append(torch.lstm_cell(x, (hidden[:, layer], cell[:, layer]), *weights))
            x = states[-1][0]
        if len(states) == 1:
            return x, *(state.unsqueeze(1) for state in states[0])
        return x, *(torch.stack(each, 1) for each in zip(*states, strict=True))

    def unroll(self, x: torch.Tensor, memory: Tensors | None, is_init: torch.Tensor | None) -> Tensors:
        return run_segments(self.lstm, x, memory, is_init)

    # torch.compile breaks the graph at an LSTM in any case; stopping here saves tracing the code around it.
    forward = torch.compiler.disable(RecurrentCore.forward)


def run_segments(rnn: nn.RNNBase, x: torch.Tensor, memory: Tensors | None, is_init: torch.Tensor | None) -> Tensors:
    """`RecurrentCore.unroll` by a `torch.nn.GRU` or `torch.nn.LSTM` (``batch_first``): one call for all segments between resets."""
    rows, steps = x.shape[:2]
    starts = torch.zeros(rows, steps, dtype=torch.bool, device=x.device) if is_init is None else is_init.bool().clone()
    starts[:, 0] = True
    starts = starts.flatten()
    first = starts.nonzero().squeeze(-1)
    lengths = torch.diff(first, append=first.new_tensor([rows * steps]))
    if memory is not None:
        memory = [m.flatten(0, 1)[first].transpose(0, 1).contiguous() for m in memory]
        memory = tuple(memory) if isinstance(rnn, nn.LSTM) else memory[0]
    y, state = _run_segments_of(rnn, x.flatten(0, 1), memory, starts, first, lengths)
    ends = first + lengths - 1
    state = state if isinstance(state, tuple) else (state,)
    return y.unflatten(0, (rows, steps)), *(_scattered(s.transpose(0, 1), ends, rows, steps) for s in state)


def _run_segments_of(rnn, x, memory, starts, first, lengths):
    """Outputs ``[N * T, ...]`` and last states of the segments that lie end to end in ``x`` ``[N * T, input_size]``."""
    longest = int(lengths.max())
    if len(first) * longest == len(x):  # all of one length
        y, state = rnn(x.unflatten(0, (len(first), longest)), memory)
        return y.flatten(0, 1), state
    segment = starts.cumsum(0) - 1
    at = torch.arange(len(x), device=x.device) - first[segment]
    padded = x.new_zeros(len(first), longest, x.shape[-1]).index_put((segment, at), x)
    packed = nn.utils.rnn.pack_padded_sequence(padded, lengths.cpu(), batch_first=True, enforce_sorted=False)
    y, state = rnn(packed, memory)
    return nn.utils.rnn.pad_packed_sequence(y, batch_first=True)[0][segment, at], state


def _scattered(states: torch.Tensor, at: torch.Tensor, rows: int, steps: int) -> torch.Tensor:
    out = states.new_zeros(rows * steps, *states.shape[1:])
    return out.index_put((at,), states).unflatten(0, (rows, steps))


# -------------------------------------------------- what all cores have in common
def name_entries(core: TensorDictModuleBase, in_key: NestedKey, hidden_key: NestedKey, features_key: NestedKey) -> None:
    """Gives a core its entries: the first memory is ``hidden_key``, further ones have their name appended.

    Examples:
        >>> core = LSTMCore(5)
        >>> name_entries(core, "trans", ("agent", "h"), "f")
        >>> core.out_keys
        ['f', ('next', 'agent', 'h'), ('next', 'agent', 'h_cell')]
    """
    _, *others = core.memory_shapes
    memory_keys = [unravel_key(hidden_key), *(sub_key(hidden_key, name) for name in others)]
    core.in_keys = [unravel_key(in_key), *memory_keys, "is_init"]
    core.out_keys = [unravel_key(features_key), *(unravel_key(("next", key)) for key in memory_keys)]


def sub_key(key: NestedKey, suffix: str) -> NestedKey:
    """``key`` with ``suffix`` on its last part: ``("a", "b"), "c"`` gives ``("a", "b_c")``."""
    return f"{key}_{suffix}" if isinstance(key, str) else (*key[:-1], f"{key[-1]}_{suffix}")


def require_sizes(input_size: int, hidden_size: int, num_layers: int) -> tuple[int, int, int]:
    """The sizes of a core as Python's integers; NumPy's are none to `torch.nn.GRU`."""
    sizes = index(input_size), index(hidden_size), index(num_layers)
    if min(sizes) < 1:
        raise ValueError(
            f"input_size={input_size}, hidden_size={hidden_size} and num_layers={num_layers} must be at least 1."
        )
    return sizes


def as_dtype_of(core: nn.Module, x: torch.Tensor, memory: Sequence[torch.Tensor | None] | None):
    """``x`` and the memories in the dtype of the core's parameters; None for memories of which one is None."""
    like = next((p for p in core.parameters() if p.is_floating_point()), x)
    given = memory is not None and len(memory) > 0 and all(m is not None for m in memory)
    return x.to(like.dtype), tuple(m.to(like.dtype) for m in memory) if given else None


def read_entries(core: TensorDictModuleBase, tensordict: TensorDictBase):
    """``x`` ``[*B, (T), input_size]``, the memories, None where there are none, and ``is_init`` ``[*B, (T)]``, for `run_core`.

    Raises:
        KeyError: the input or ``"is_init"`` is missing, or one memory of several.
        ValueError: an entry does not fit the core.
    """
    in_key, *memory_keys, init_key = core.in_keys
    x, is_init = tensordict.get(in_key, None), tensordict.get(init_key, None)
    if x is None or is_init is None:
        raise KeyError(
            f"the core reads {in_key!r} and {init_key!r}, one of which is missing; there is {list(tensordict.keys(True))}. "
            "PreviousStep() writes the transition input; InitTracker(), which a Collector with "
            "auto_register_policy_transforms=True adds by itself, marks where a trial starts."
        )
    if core.input_size is not None and (x.ndim < 1 or x.shape[-1] != core.input_size):
        raise ValueError(
            f"{in_key!r} has {x.shape[-1] if x.ndim else 0} entries, but the core was built with input_size={core.input_size} "
            "(the sum of all its inputs). Build the network with from_env(env, ...)."
        )
    batch = x.shape[:-1]
    if is_init.numel() != batch.numel():
        raise ValueError(f"{init_key!r} has shape {tuple(is_init.shape)}; it must be {(*batch, 1)}: one flag a step.")
    memory = [tensordict.get(key, None) for key in memory_keys]
    missing = [key for key, m in zip(memory_keys, memory, strict=True) if m is None]
    if missing and len(missing) < len(memory):
        raise KeyError(f"the core's memory {missing} is missing, while other parts of it are there.")
    for key, m, shape in zip(memory_keys, memory, core.memory_shapes.values(), strict=True):
        if m is not None and m.shape != (*batch, *shape):
            raise ValueError(
                f"{key!r} has shape {tuple(m.shape)}; it must be [*B, {', '.join(map(str, shape))}], here {(*batch, *shape)}. "
                "Take the primers from this network: get_primers_from_module(policy)."
            )
    x, memory = as_dtype_of(core, x, memory)
    return x, memory, is_init.reshape(batch)


def run_core(
    core: TensorDictModuleBase,
    tensordict: TensorDictBase,
    x: torch.Tensor,
    memory: Tensors | None,
    is_init: torch.Tensor,
) -> TensorDictBase:
    """One step of `RecurrentCore.step`, or in recurrent mode `RecurrentCore.unroll`, written into ``tensordict``."""
    batch, is_sequence = x.shape[:-1], core.recurrent_mode
    if is_sequence and not batch:
        raise ValueError(f"in recurrent mode {core.in_keys[0]!r} must be [*B, T, input_size], not {tuple(x.shape)}.")
    lead = (batch[:-1].numel(), batch[-1]) if is_sequence else (batch.numel(),)
    x, is_init = x.reshape(*lead, x.shape[-1]), is_init.reshape(lead)
    memory = memory and tuple(m.reshape(*lead, *m.shape[len(batch) :]) for m in memory)
    if is_sequence:
        outputs = core.unroll(x, memory, is_init)
    else:
        initial = core.initial_memory(len(x))
        if memory is None:
            memory = initial
        else:
            memory = tuple(torch.where(_rows(is_init, m), i, m) for i, m in zip(initial, memory, strict=True))
        outputs = core.step(x, *memory)
    for key, value in zip(core.out_keys, outputs, strict=True):
        tensordict.set(key, value.reshape(*batch, *value.shape[len(lead) :]))
    return tensordict


def make_primer(core: TensorDictModuleBase) -> TensorDictPrimer:
    """The transform that writes the memories of ``core`` into an env's reset, in their own dtype."""
    memory = dict(zip(core.in_keys[1:-1], core.initial_memory(1), strict=True))
    specs = {key: Unbounded(shape=m.shape[1:], dtype=m.dtype) for key, m in memory.items()}
    start = {key: m[0].detach().cpu() for key, m in memory.items()}
    default = start if any(m.any() for m in start.values()) else 0.0
    return TensorDictPrimer(specs, default_value=default, expand_specs=True)


def at_ends(states: torch.Tensor, is_init: torch.Tensor | None) -> torch.Tensor:
    """``states`` ``[N, T, ...]`` where a trial ends in its row, 0 elsewhere, as TorchRL's `GRUModule` hands them on."""
    ends = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)
    ends[:, -1] = True
    if is_init is not None:
        ends[:, :-1] = is_init[:, 1:]
    return torch.where(_rows(ends, states), states, 0.0)


def _rows(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``mask`` with dimensions of size 1 appended, to choose among the rows of ``like``."""
    return mask.bool().reshape(*mask.shape, *(1,) * (like.ndim - mask.ndim))
