"""The core of a network, which carries its memory: `RecurrentCore` for one of your own, and `LSTMCore`.

A core is a TensorDictModule that reads ``[x, *memory_keys, "is_init"]``, writes ``[features, *("next", memory_key)]``, and does
one step ``[*B]`` or, in recurrent mode, sequences ``[*B, T]``, as TorchRL's `GRUModule` does. Rollouts and updates call it on
plain tensors, by `step_function`, `sequence` and `initial_memory`, which all of ours have (`FastGRUModule` too).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from operator import index

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import unravel_key
from torch import Tensor, nn
from torchrl.data import Unbounded
from torchrl.envs import TensorDictPrimer
from torchrl.modules import recurrent_mode

from rl2_torchrl import kernels
from rl2_torchrl.arguments import whole
from rl2_torchrl.gradients.part import is_bare, others_than

__all__ = [
    *("LSTMCore", "RecurrentCore", "Tensors"),
    *("as_sizes", "at_ends", "lost_memory", "sub_key", "where_rows"),
]

Tensors = tuple[Tensor, ...]


class RecurrentCore(TensorDictModuleBase):
    """A core of your own: write `step`, and sequences with resets, primers and TensorDicts are derived from it.

    Args:
        features_size: size of the features that `step` gives.
        memory: name and shape (of one row) of each tensor that is carried from step to step, such as ``{"hidden": (64,)}``.
        input_size: size of what it reads, to be checked; None for any.
        **keys: as in `name_entries`, by which a network (``RecurrentActor(core=...)``) names all entries itself.

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

    #: Whether a trial within a row starts from what is stored at that step, not from `initial_memory`, unless that is another.
    _starts_from_stored = False

    def __init__(
        self, features_size: int, memory: Mapping[str, Sequence[int]], *, input_size: int | None = None, **keys
    ):
        super().__init__()
        if not memory:
            raise ValueError("a core without memory cannot remember: name a tensor, memory={'hidden': (64,)}.")
        self.features_size, self.input_size = index(features_size), input_size
        self.memory_shapes = {name: tuple(map(index, shape)) for name, shape in memory.items()}
        self.name_entries(**keys)

    def name_entries(
        self, in_key: NestedKey = "trans", hidden_key: NestedKey = "hidden", features_key: NestedKey = "features"
    ) -> None:
        """Names what the core reads, its first memory, to which the others append their names, and what it writes."""
        _, *others = self.memory_shapes
        memory_keys = [unravel_key(hidden_key), *(sub_key(hidden_key, name) for name in others)]
        self.in_keys = [unravel_key(in_key), *memory_keys, "is_init"]
        self.out_keys = [unravel_key(features_key), *(unravel_key(("next", key)) for key in memory_keys)]

    def step(self, x: Tensor, *memory: Tensor) -> Tensors:
        """One step of N rows, each independent of the others, differentiable.

        From ``x`` ``[N, input_size]`` and memories ``[N, *shape]``, in their order, to features ``[N, features_size]`` and the
        memories after the step. Reals come in the dtype of the parameters; whole numbers and flags as `initial_memory` has them.
        It draws no random numbers: an update takes the steps again, and must come to what the rollout came to.
        """
        raise NotImplementedError(f"{type(self).__name__} must define step(x, *memory) -> features, *memory.")

    def initial_memory(self, num_rows: int) -> Tensors:
        """The memories ``[num_rows, *shape]`` with which a trial starts: zeros, unless you say otherwise, say parameters."""
        return tuple(self._like(torch.empty(0)).new_zeros(num_rows, *shape) for shape in self.memory_shapes.values())

    def _starts_from_zeros(self) -> bool:
        return not others_than(RecurrentCore, self, ["initial_memory"])

    def starts_as_stored(self) -> bool:
        """Whether a trial within a row starts from the memory that is stored at its first step, not from `initial_memory`."""
        return self._starts_from_stored and self._starts_from_zeros()

    def step_function(self) -> Callable[..., Tensors]:
        """``(x, *memory) -> (features, *memory)``: one step of a rollout, without gradient; memories of None start anew.

        It may keep a copy of the weights, so that it is made anew whenever they have changed.
        """

        is_checked = False

        @torch.no_grad()
        def step(x: Tensor, *memory: Tensor | None) -> Tensors:
            nonlocal is_checked
            x, memory = self._converted(x, memory)
            outputs = self.step(x, *(memory or self.initial_memory(len(x))))
            if not is_checked:
                self._require_outputs(outputs, len(x))
                is_checked = True
            return outputs

        return step

    def sequence(self, x: Tensor, memory: Tensors | None, is_init: Tensor | None) -> Tensor:
        """The features ``[N, T, features_size]`` of sequences, differentiable.

        Args:
            x: ``[N, T, input_size]``.
            memory: ``[N, T, *shape]`` each, as they were before each step; or None for `initial_memory`.
            is_init: bool ``[N, T]``, where a trial starts, and its memory with it; or None where none does.
        """
        return self.unroll(*self._converted(x, memory), is_init, with_memory=False)[0]

    def unroll(self, x: Tensor, memory: Tensors | None, is_init: Tensor | None, *, with_memory: bool = True) -> Tensors:
        """`sequence`, and the memories ``[N, T, *shape]`` after each trial's last step in its row, 0 elsewhere."""
        is_stored = memory and self.starts_as_stored()
        initial = None if is_stored else self.initial_memory(x.shape[0])
        state, outputs = tuple(m[:, 0] for m in memory) if memory else initial, []
        # Where nobody begins a memory that is learnt would get no gradient, in place of zeros.
        is_learnt = not is_stored and any(m.requires_grad for m in initial)
        may_start = _may_start(is_init, x.shape[1], is_known=not is_learnt)
        for t in range(x.shape[1]):
            if may_start[t]:
                first = tuple(m[:, t] for m in memory) if is_stored else initial
                state = [where_rows(is_init[:, t], *pair) for pair in zip(first, state, strict=True)]
            elif is_init is not None:
                state = [m.clone() for m in state]  # a step may write into its memory, which others hold
            given = self.step(x[:, t], *state)
            if t == 0:
                self._require_outputs(given, x.shape[0])
            _, *state = given
            outputs.append(given)
        features, *states = (torch.stack(each, 1) for each in zip(*outputs, strict=True))
        return features, *(at_ends(each, is_init) for each in states if with_memory)

    @property
    def recurrent_mode(self) -> bool:
        """Whether ``forward`` takes sequences; see `torchrl.modules.set_recurrent_mode`."""
        return bool(recurrent_mode())

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """One step ``[*B]`` or, in recurrent mode, sequences ``[*B, T]``."""
        x, memory, is_init = self._read(tensordict)
        batch, is_sequence = x.shape[:-1], self.recurrent_mode
        # Not numel() and len(), which fix the number of rows of an exported graph.
        lead = (math.prod(batch[:-1]), batch[-1]) if is_sequence else (math.prod(batch),)
        x, is_init = x.reshape(*lead, x.shape[-1]), is_init.reshape(lead)
        memory = memory and tuple(m.reshape(*lead, *m.shape[len(batch) :]) for m in memory)
        if is_sequence:
            outputs = self.unroll(x, memory, is_init)
        else:
            initial = self.initial_memory(lead[0])
            pairs = zip(initial, memory or initial, strict=True)
            outputs = self.step(x, *(where_rows(is_init, *pair) for pair in pairs))
            self._require_outputs(outputs, lead[0])
        for key, value in zip(self.out_keys, outputs, strict=True):
            tensordict.set(key, value.reshape(*batch, *value.shape[len(lead) :]))
        return tensordict

    def make_tensordict_primer(self) -> TensorDictPrimer:
        """The transform that makes room for the memories in an env; `get_primers_from_module` finds it."""
        memory = zip(self.in_keys[1:-1], self.initial_memory(1), strict=True)
        return TensorDictPrimer({key: Unbounded(m.shape[1:], dtype=m.dtype) for key, m in memory}, expand_specs=True)

    def _require_outputs(self, outputs: Tensors, num_rows: int) -> None:
        """Raises unless ``outputs`` of `step`, for so many rows, are as many tensors, of such shapes, as the core was built for."""
        is_list, name = isinstance(outputs, tuple | list), f"{type(self).__name__}.step"
        if not is_list or len(outputs) != len(self.out_keys) or not all(isinstance(out, Tensor) for out in outputs):
            given = ", ".join(type(out).__name__ for out in outputs) if is_list else type(outputs).__name__
            raise TypeError(f"{name} must return (features, *memory), {len(self.out_keys)} tensors, and gave {given}.")
        said = [("features", (self.features_size,)), *self.memory_shapes.items()]
        for (entry, shape), out in zip(said, outputs, strict=True):
            if out.shape != (num_rows, *shape):
                raise ValueError(
                    f"{name} gave {entry!r} {tuple(out.shape)}, and the core was built, by features_size= and memory=, for "
                    f"{(num_rows, *shape)}."
                )

    def _like(self, default: Tensor) -> Tensor:
        return next((p for p in self.parameters() if p.is_floating_point()), default)

    def _converted(self, x: Tensor, memory: Sequence[Tensor | None] | None) -> tuple:
        """``x`` and memories of reals in the parameters' dtype; None for memories of which one is None."""
        dtype = self._like(x).dtype
        x = x.to(dtype)
        if not memory or any(m is None for m in memory):
            return x, None
        return x, tuple(m.to(dtype) if m.is_floating_point() else m for m in memory)

    def _read(self, tensordict: TensorDictBase) -> tuple[Tensor, Tensors | None, Tensor]:
        """``x`` ``[*B, (T), input_size]``, the memories, None where there are none, and ``is_init``, once they fit."""
        in_key, *memory_keys, init_key = self.in_keys
        x, *memory, is_init = (tensordict.get(key, None) for key in self.in_keys)
        if x is None or is_init is None:
            raise KeyError(
                f"the core reads {in_key!r} and {init_key!r}, one of which is missing; there is {list(tensordict.keys(True))}. "
                "PreviousStep() writes the transition input; InitTracker(), which a Collector with "
                "auto_register_policy_transforms=True adds by itself, marks where a trial starts."
            )
        if x.ndim < 1 + self.recurrent_mode or self.input_size not in (None, x.shape[-1]):
            raise ValueError(
                f"{in_key!r} has {x.shape[-1] if x.ndim else 0} entries and shape {tuple(x.shape)}, but the core was built with "
                f"input_size={self.input_size} for [*B, input_size], in recurrent mode [*B, T, input_size]: use from_env(env, ...)."
            )
        batch = x.shape[:-1]
        if all(m is None for m in memory):
            self._require_memory(is_init.reshape(batch))
        for key, m, shape in zip(memory_keys, memory, self.memory_shapes.values(), strict=True):
            if m is None and any(other is not None for other in memory):
                raise KeyError(f"the core's memory {key!r} is missing, while another part of it is there.")
            if m is not None and m.shape != (*batch, *shape):
                raise ValueError(
                    f"{key!r} has shape {tuple(m.shape)}; it must be [*B, {', '.join(map(str, shape))}], here {(*batch, *shape)}. "
                    "Take the primers from this network: get_primers_from_module(policy)."
                )
        return *self._converted(x, memory), is_init

    def _require_memory(self, is_init: Tensor) -> None:
        """KeyError, for data without a memory, unless all rows begin a trial at their first step: ``is_init`` ``[*B, (T)]``."""
        begins = is_init[..., 0] if self.recurrent_mode else is_init
        while torch._C._functorch.is_batchedtensor(begins):  # vmap cannot say whether all of what it goes over begin
            begins = torch._C._functorch.get_unwrapped(begins)
        if not begins.all():
            in_rows = not self.recurrent_mode and is_init.ndim > 1
            hint = "Whole rows go through a network in recurrent mode, `with set_recurrent_mode(True):`, else step by step. "
            raise KeyError(hint * in_rows + lost_memory(self.in_keys[1:-1]))


#: An LSTM goes step by step where it would be given more than so many times its rows' steps, or where a step of all rows gives
#: so many numbers that it is worth a call of its own.
_MOST_PADDING, _MANY = 4, 2**13


class LSTMCore(RecurrentCore):
    """An LSTM (Hochreiter & Schmidhuber 1997), by `torch.nn.LSTM`, with two memories: its output and its cell.

    Args:
        input_size, hidden_size, num_layers, device, dtype: as in `torch.nn.LSTM`; dropout and the like it has none.
        **keys: as in `RecurrentCore`.

    Examples:
        >>> core = LSTMCore(input_size=5, hidden_size=8)
        >>> core.in_keys
        ['trans', 'hidden', 'hidden_cell', 'is_init']
        >>> core.sequence(torch.zeros(4, 10, 5), None, None).shape
        torch.Size([4, 10, 8])
    """

    _starts_from_stored = True  # as in TorchRL's LSTMModule

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
        inputs, units, layers = as_sizes(input_size, hidden_size, num_layers)
        super().__init__(units, {"hidden": (layers, units), "cell": (layers, units)}, input_size=inputs, **keys)
        self.lstm = nn.LSTM(inputs, units, layers, batch_first=True, device=device, dtype=dtype)

    def step(self, x: Tensor, hidden: Tensor, cell: Tensor) -> Tensors:
        if not is_bare(self.lstm):  # whose hooks see each step
            memory = [m.transpose(0, 1).contiguous() for m in (hidden, cell)]
            x, memory = self.lstm(x.unsqueeze(1), tuple(memory))
            return x.squeeze(1), *(m.transpose(0, 1) for m in memory)
        states = []
        for layer, weights in enumerate(self.lstm.all_weights):
            cell_of = _cell_by_parts if kernels.is_transformed() else torch.lstm_cell
            states.append(cell_of(x, (hidden[:, layer], cell[:, layer]), *weights))
            x = states[-1][0]
        if len(states) == 1:
            return x, *(state.unsqueeze(1) for state in states[0])
        return x, *(torch.stack(each, 1) for each in zip(*states, strict=True))

    def unroll(self, x: Tensor, memory: Tensors | None, is_init: Tensor | None, *, with_memory: bool = True) -> Tensors:
        is_plain = not others_than(LSTMCore, self, ["step"]) and self._starts_from_zeros()
        # Hooks see single steps, as those of a rollout do; PyTorch's packed sequences are up to ten times slower than steps.
        is_whole = is_plain and is_bare(self.lstm) and not kernels.is_transformed()
        if not is_whole or (length := _common_length(is_init, x.shape[1])) is None:
            y = self._by_trials(x, memory, is_init) if is_whole and not with_memory else None
            return super().unroll(x, memory, is_init, with_memory=with_memory) if y is None else (y,)
        batch = x.shape[:2]
        state = memory and tuple(m.flatten(0, 1)[::length].transpose(0, 1).contiguous() for m in memory)
        y, last = self.lstm(x.reshape(-1, length, x.shape[-1]), state)
        states = [m.transpose(0, 1).repeat_interleave(length, 0) for m in last] if with_memory else []
        return y.reshape(*batch, self.features_size), *(at_ends(each.unflatten(0, batch), is_init) for each in states)

    def _by_trials(self, x: Tensor, memory: Tensors | None, is_init: Tensor) -> Tensor | None:
        """`sequence` with each trial in a row of its own, all as long as the longest; None where that is too much."""
        batch, starts = x.shape[:2], is_init.bool().clone()
        starts[:, 0] = True
        first = starts.flatten().nonzero().squeeze(-1)
        lengths = first.diff(append=first.new_tensor([starts.numel()]))
        step = torch.arange(int(lengths.max()), device=x.device)
        is_much = len(first) * len(step) > _MOST_PADDING * starts.numel()
        if is_much or len(x) * max(self.features_size, 16) >= _MANY:
            return None
        # Beyond its end a trial's last step again: no other's may reach its gradient.
        index = first.unsqueeze(-1) + torch.minimum(step, lengths.unsqueeze(-1) - 1)
        state = memory and tuple(m.flatten(0, 1)[first].transpose(0, 1).contiguous() for m in memory)
        y, _ = self.lstm(x.flatten(0, 1)[index], state)
        return y[step < lengths.unsqueeze(-1)].unflatten(0, batch)

    # torch.compile breaks the graph at an LSTM in any case; stopping here saves tracing the code around it.
    forward = torch.compiler.disable(RecurrentCore.forward)


def _cell_by_parts(x: Tensor, memory: Tensors, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor) -> Tensors:
    """As `torch.lstm_cell`, which vmap cannot take apart."""
    hidden, cell = memory
    gates = nn.functional.linear(x, w_ih, b_ih) + nn.functional.linear(hidden, w_hh, b_hh)
    into, forget, new, out = gates.chunk(4, -1)
    cell = forget.sigmoid() * cell + into.sigmoid() * new.tanh()
    return out.sigmoid() * cell.tanh(), cell


def _common_length(is_init: Tensor | None, steps: int) -> int | None:
    """How many steps each trial has in rows of ``steps`` that are nothing but trials of one length; None for other rows."""
    if is_init is None or not is_init[:, 1:].any():
        return steps
    starts = is_init.bool().clone()
    starts[:, 0] = True
    first = starts.flatten().nonzero().squeeze(-1)
    length = starts.numel() // len(first)
    return length if torch.equal(first, torch.arange(0, starts.numel(), length, device=first.device)) else None


def _may_start(is_init: Tensor | None, steps: int, *, is_known: bool) -> list[bool]:
    """At which of the ``steps`` a trial may start in some row; unless that ``is_known``, or costs no wait for a device, at all."""
    if is_init is None:
        return [False] * steps
    is_known = is_known and not torch.compiler.is_compiling() and is_init.is_cpu and not kernels.is_transformed()
    return is_init.any(0).tolist() if is_known else [True] * steps


def lost_memory(memory_keys: Sequence[NestedKey]) -> str:
    """What to say where rows go on without a memory."""
    return (
        f"rows go on ('is_init' is False at their first step), but the memory {list(memory_keys)} that they go on from is missing: "
        "with zeros in its place the agent has forgotten its trial. Collect with ActorCritic(actor, critic), by TrialCollector or "
        "auto_register_policy_transforms=True (for env.rollout: env.append_transform(get_primers_from_module(policy)), of "
        "torchrl.modules.utils); keep what PPOUpdate(..., bptt=...).in_keys names; let TrialAdvantage() read the values that are "
        "stored, where TorchRL's GAE asks a critic anew, step by step. Rows that shall begin anew say so: data['is_init'] = True "
        "at their first step."
    )


def sub_key(key: NestedKey, suffix: str) -> NestedKey:
    """``key`` with ``suffix`` on its last part: ``("a", "b"), "c"`` gives ``("a", "b_c")``."""
    return f"{key}_{suffix}" if isinstance(key, str) else (*key[:-1], f"{key[-1]}_{suffix}")


def as_sizes(input_size: int, hidden_size: int, num_layers: int) -> tuple[int, ...]:
    """The sizes of a core as Python's integers; NumPy's are none to `torch.nn.GRU`."""
    return whole("input_size", input_size), whole("hidden_size", hidden_size), whole("num_layers", num_layers)


def at_ends(states: Tensor, is_init: Tensor | None) -> Tensor:
    """``states`` ``[N, T, ...]`` where a trial ends in its row, 0 elsewhere, as TorchRL's `GRUModule` hands them on."""
    starts = states.new_zeros(states.shape[:2], dtype=torch.bool) if is_init is None else is_init.bool()
    ends = torch.cat((starts[:, 1:], torch.ones_like(starts[:, :1])), 1)
    return where_rows(ends, states, torch.zeros_like(states))


def where_rows(rows: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """``one`` ``[*B, ...]`` in ``rows`` ``[*B]``, and ``other`` elsewhere; a TensorDict's entries too."""
    return torch.where(rows.bool().view(*rows.shape, *[1] * (one.ndim - rows.ndim)), one, other)
