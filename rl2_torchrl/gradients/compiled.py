"""`CompiledPass`: a whole pass of many minibatches in one call of the kernels, Adam's steps included.

The original takes an optimizer step on 32 env steps at a time: 0.1 ms of arithmetic, on which Python spends 0.6 ms even
without autograd. What a `Program` does part by part is one C function here (``kernels/pass.c``), for networks of one GRU and
one layer, or two such layers on one GRU; sizes, weights and coefficients are taken from the program.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch
from tensordict import NestedKey
from torch import nn

from rl2_torchrl import kernels
from rl2_torchrl.gradients.adam import AdamSteps, Row, why_not_adam
from rl2_torchrl.gradients.chain import ChainPart
from rl2_torchrl.gradients.part import Part, State
from rl2_torchrl.gradients.policy import LOG_PROB, CategoricalPart, GaussianHeadPart, GaussianPart
from rl2_torchrl.gradients.program import Program
from rl2_torchrl.gradients.recurrent import GRUPart
from rl2_torchrl.kernels.functions import raise_unknown_actions
from rl2_torchrl.kernels.workspace import Workspace

__all__ = ["MOST_STEPS", "CompiledPass", "why_not_compiled"]

#: Env steps of a minibatch up to which a pass is compiled unasked: with so few all else, too, is Python's time.
MOST_STEPS = 256

_int, _long, _double, _pointer = ctypes.c_int, ctypes.c_long, ctypes.c_double, ctypes.c_void_p


class _Network(ctypes.Structure):
    _fields_ = [(name, _int) for name in ("inputs", "hidden", "outputs")]
    _fields_ += [("x", _pointer), ("initial", _pointer), ("memory", _pointer * 11)]


class _Pass(ctypes.Structure):
    _fields_ = [(name, _int) for name in ("chunks", "steps", "rows", "threads")]
    _fields_ += [(name, _int) for name in ("is_gaussian", "is_shared", "is_detached")]
    _fields_ += [(name, _pointer) for name in ("order", "init", "action", "old_log_prob", "advantage", "target")]
    _fields_ += [("parameters", Row * 13), ("actor", _Network), ("critic", _Network)]
    _fields_ += [(name, _double) for name in ("low", "high", "value_coeff", "entropy_coeff", "max_norm")]
    _fields_ += [("metrics", _pointer), ("memory", _pointer)]


#: What `CompiledPass.run` says of each minibatch, in the kernel's order.
_METRICS = ("loss_objective", "loss_critic", "entropy", "clip_fraction", "kl_approx", "mean_ratio", "max_ratio")
_METRICS += ("grad_norm",)


class CompiledPass:
    """Passes over minibatches of ``rows`` of ``chunks``, entries ``[num_chunks, T, ...]``, as `why_not_compiled` lets them pass.

    The state of ``optimizer``, a `torch.optim.Adam`, is what the steps change, as its own would.
    """

    def __init__(
        self, program: Program, optimizer: torch.optim.Adam, chunks: State, rows: int, max_grad_norm: float | None
    ):
        self.loss, self.rows, self.max_grad_norm = program.loss, rows, max_grad_norm
        chunks, self._dtype = dict(chunks), program.parameters[0].dtype
        self._steps = AdamSteps(optimizer)
        #: Largest ratio in the chunks of a first minibatch, before any step. The look at them refuses sizes that do not fit.
        self.max_ratio = program({key: entry[:rows] for key, entry in chunks.items()})["max_ratio"]
        for part in program.parts:
            if _reads_data_alone(part):
                part.forward(chunks)
            if isinstance(part, GRUPart):
                chunks.update(part.converted(chunks))
        self._networks, self._log_std = _networks_of(program)
        self._gru = self._networks[0][0]
        self._init_key = self._gru.in_keys[2]
        chunks[self._init_key] = chunks[self._init_key].bool()  # the kernel reads bytes
        self.chunks = {key: entry.contiguous() for key, entry in chunks.items()}

    def run(self, order: torch.Tensor) -> list[dict[str, float]]:
        """One pass over the chunks in the ``order`` ``[num_chunks]``; metrics of each minibatch, as `RL2PPOLoss` names them.

        Where a gradient is not finite the pass ends, without a step on that minibatch; its metrics are the last ones.

        Raises:
            IndexError: an action is none of the policy's choices.
        """
        order, count = order.long().contiguous(), -(-len(order) // self.rows)  # kept while the kernel reads it
        metrics = torch.zeros(count, len(_METRICS), dtype=torch.float64)
        library = kernels.load(self._dtype)
        arguments = self._arguments(order, metrics)
        size = library.ppo_pass_memory(ctypes.byref(arguments))
        memory = Workspace.take(torch.empty(0, dtype=self._dtype), (size,))
        arguments.memory = memory.data_ptr()
        end = library.ppo_pass(ctypes.byref(arguments))
        self._steps.tell_autograd()
        Workspace.give(memory)
        has_stranger, taken = end <= -2, count if end == -1 else end if end >= 0 else -2 - end
        if has_stranger:
            action = self.chunks[self.loss.tensor_keys.action]
            raise_unknown_actions(action, self._networks[0][1].linears[0].out_features)
        return [self._named(row) for row in metrics[: taken + (end >= 0)].tolist()]

    def _named(self, row: list[float]) -> dict[str, float]:
        out = dict(zip(_METRICS, row, strict=True))
        if not self.loss.has_critic:
            del out["loss_critic"]
        if self.loss.entropy_bonus:
            out["loss_entropy"] = -float(self.loss.entropy_coeff) * out["entropy"]
        else:
            del out["entropy"]
        return {"loss": sum(value for name, value in out.items() if name.startswith("loss_")), **out}

    def _arguments(self, order: torch.Tensor, metrics: torch.Tensor) -> _Pass:
        loss, keys, chunks = self.loss, self.loss.tensor_keys, self.chunks
        read = [self._init_key, keys.action, keys.sample_log_prob, keys.advantage]
        data = [*map(chunks.get, read), chunks[keys.value_target] if loss.has_critic else None]
        networks = [self._network(*network) for network in self._networks]
        steps, (_, head), is_shared = chunks[keys.advantage].shape[1], self._networks[-1], self._networks[-1][0] is None
        work = self.rows * steps * self._gru.units * (self._gru.units + self._gru.inputs)
        threads = 1 if self.rows * steps <= MOST_STEPS else kernels.threads_for(work)
        return _Pass(
            *(len(order), steps, self.rows, threads, self._log_std is not None, is_shared, is_shared and head.detach),
            *map(kernels.address, (order, *data)),
            (Row * 13)(*self._parameters()),
            *(networks if loss.has_critic else (*networks, _Network())),
            *(*loss.clip_bounds, float(loss.critic_coeff) if loss.has_critic else 0.0),
            *(float(loss.entropy_coeff) if loss.entropy_bonus else 0.0, self.max_grad_norm or 0.0, metrics.data_ptr()),
        )

    def _network(self, gru: GRUPart | None, head: ChainPart) -> _Network:
        [linear] = head.linears
        read = [] if gru is None else gru.in_keys[:2]
        return _Network(
            *(0 if gru is None else gru.inputs, linear.in_features, linear.out_features),
            *map(kernels.address, map(self.chunks.get, read)),
        )

    def _parameters(self) -> Iterator[Row]:
        """Six of each network, GRU and head, and ``log_std``, in the kernel's order."""
        for gru, head in self._networks:
            yield from [Row()] * 4 if gru is None else map(self._steps.row_of, gru.layers[0])
            yield from map(self._steps.row_of, (head.linears[0].weight, head.linears[0].bias))
        yield from [Row()] * 6 * (2 - len(self._networks))
        yield Row() if self._log_std is None else self._steps.row_of(self._log_std)


def _reads_data_alone(part: Part) -> bool:
    return part.reason is None and not part.parameters and not part.wanted and LOG_PROB not in part.out_keys


def _networks_of(program: Program) -> tuple[list[tuple[GRUPart | None, ChainPart]], nn.Parameter | None] | None:
    """GRU and head of the actor, and of the critic (no GRU: it reads the actor's features), and a Gaussian's ``log_std``.

    None where there is more, or something else.
    """
    loss, parts = program.loss, [part for part in program.parts if not _reads_data_alone(part)]
    policy = next(part for part in parts if LOG_PROB in part.out_keys)
    gaussian = next((part for part in parts if isinstance(part, GaussianHeadPart)), None)
    parts = [part.mean if part is gaussian else part for part in parts if part is not policy]
    given = [policy.in_keys[1], *([loss.tensor_keys.value] if loss.has_critic else [])]
    is_known = isinstance(policy, GaussianPart if gaussian else CategoricalPart)
    is_shared = len(given) == 2 and len(parts) == 3
    grus, heads = (parts[:1] * 2, parts[1:]) if is_shared else (parts[::2], parts[1::2])
    fits = is_known and len(grus) == len(heads) == len(given)
    if not fits or not all(map(_is_network, grus, heads, given)) or len({gru.in_keys[2] for gru in grus}) > 1:
        return None
    if any(head.detach for head in heads[: 2 - is_shared]):  # from a GRU that nobody else would train
        return None
    return list(zip([grus[0], None] if is_shared else grus, heads, strict=True)), gaussian and gaussian.log_std


def _is_network(gru: Part, head: Part, given: NestedKey) -> bool:
    """Whether ``gru`` reads data, ``head`` makes ``given`` of its features, and both are one layer with biases."""
    if not isinstance(gru, GRUPart) or not isinstance(head, ChainPart) or head.in_keys != gru.out_keys:
        return False
    is_layer = len(head.linears) == 1 and head.linears[0].bias is not None and len(gru.layers) == 1
    is_plain = head.before == ["relu"] and head.after is None and head.out_keys == [given]
    return is_layer and is_plain and len(gru.layers[0]) == 4 and not gru.wanted


def why_not_compiled(program: Program, optimizer: torch.optim.Optimizer, chunks: State | None) -> str | None:
    """Why a pass over ``chunks`` (None: whatever they are) is not run by `CompiledPass`, in words; None if it can be."""
    return next((reason for holds, reason in _conditions(program, optimizer, chunks) if not holds), None)


# Each condition is looked at only where those before it hold.
def _conditions(program: Program, optimizer, chunks: State | None) -> Iterator[tuple[bool, str]]:
    loss = program.loss
    yield kernels.load(program.parameters[0].dtype) is not None, "there are no kernels for the parameters' dtype"
    has_more = len(loss.terms) > 0 or type(loss).loss_terms.__qualname__ != "RL2PPOLoss.loss_terms"
    yield not has_more, "the loss has terms beside PPO's own, which want the parts between passes"
    networks = _networks_of(program)
    what = "actor or critic is more than a GRU and a head of one layer each, or the policy neither categorical nor Gaussian"
    yield networks is not None, what
    yield len({p.dtype for p in program.parameters}) == 1, "parameters are of several dtypes"
    uses = [p for part in program.parts for p in part.parameters]
    is_own = len(uses) == len(program.parameters) and all(p.is_contiguous() for p in uses)
    yield is_own, "parameters are shared, frozen, or not contiguous"

    refusal = why_not_adam(optimizer, program.parameters)
    yield refusal is None, refusal
    if chunks is not None:
        yield from _conditions_on_data(loss, chunks, networks[1] is not None)


def _conditions_on_data(loss: nn.Module, chunks: State, is_gaussian: bool) -> Iterator[tuple[bool, str]]:
    keys, dtype = loss.tensor_keys, next(loss.parameters()).dtype
    read = [keys.sample_log_prob, keys.advantage, *([keys.value_target] if loss.has_critic else [])]
    expected = {**dict.fromkeys(read, dtype), keys.action: dtype if is_gaussian else torch.int64}
    others = {key: chunks[key].dtype for key in expected if chunks[key].dtype != expected[key]}
    yield not others, f"{others} are of another dtype than the kernel reads"
    yield is_gaussian or chunks[keys.action].ndim == 2, "actions are one-hot vectors"
