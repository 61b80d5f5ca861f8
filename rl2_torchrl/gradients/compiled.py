"""`CompiledPass`: a whole pass of many small minibatches in one call of the kernels, Adam's steps included.

The original takes an optimizer step on 32 env steps at a time: 0.1 ms of arithmetic, on which Python spends 0.6 ms even
without autograd. What a `Program` does part by part is one C function here (``kernels/pass.c``), for networks of one GRU and
one layer; sizes, weights and coefficients are taken from the program.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache

import torch
from tensordict import NestedKey
from torch import nn

from rl2_torchrl import kernels
from rl2_torchrl.gradients.chain import ChainPart, ConcatPart
from rl2_torchrl.gradients.part import Part
from rl2_torchrl.gradients.policy import LOG_PROB, CategoricalPart, GaussianHeadPart, GaussianPart, OneHotPart
from rl2_torchrl.gradients.program import Program
from rl2_torchrl.gradients.recurrent import GRUPart
from rl2_torchrl.modules.functions import raise_unknown_actions

__all__ = ["CompiledPass", "why_not_compiled"]

#: Env steps of a minibatch up to which the pass is compiled: larger ones are worth a matrix library and several threads.
MOST_STEPS = 256

_int, _long, _double, _pointer = ctypes.c_int, ctypes.c_long, ctypes.c_double, ctypes.c_void_p


class _Parameter(ctypes.Structure):
    _fields_ = [(name, _pointer) for name in ("value", "gradient", "mean", "square")] + [("size", _long)]


class _Network(ctypes.Structure):
    _fields_ = [(name, _int) for name in ("inputs", "hidden", "outputs")]
    _fields_ += [("x", _pointer), ("initial", _pointer), ("of", _Parameter * 6), ("memory", _pointer * 9)]


class _Pass(ctypes.Structure):
    _fields_ = [(name, _int) for name in ("chunks", "steps", "rows", "is_gaussian")]
    _fields_ += [(name, _pointer) for name in ("order", "init", "action", "old_log_prob", "advantage", "target")]
    _fields_ += [("actor", _Network), ("critic", _Network), ("log_std", _Parameter)]
    _fields_ += [(name, _double) for name in ("low", "high", "value_coeff", "entropy_coeff", "max_norm")]
    _fields_ += [(name, _double) for name in ("lr", "beta1", "beta2", "epsilon")]
    _fields_ += [("adam_step", _long), ("metrics", _pointer)]


@cache
def _require_layout(library: ctypes.CDLL) -> None:
    """The structures above are those of ``kernels/pass.c``, or numbers would be read from the wrong places."""
    ours = [ctypes.sizeof(_Parameter), ctypes.sizeof(_Network), ctypes.sizeof(_Pass), len(CompiledPass._METRICS)]
    theirs = [library.ppo_pass_layout(which) for which in range(4)]
    if ours != theirs:
        raise RuntimeError(f"compiled.py lays its structures out as {ours} bytes and metrics, pass.c as {theirs}.")


class CompiledPass:
    """Passes over ``chunks`` with the loss of a `Program` and the steps of a `torch.optim.Adam`.

    Args:
        program: the loss, for which `why_not_compiled` has no reason.
        optimizer: plain `torch.optim.Adam` over its parameters. Its state is what the steps change, as its own would.
        chunks: contiguous entries ``[num_chunks, T, ...]``, by key.
        rows: chunks in a minibatch.
        max_grad_norm: clip the gradient's norm at this; None does not.

    Raises:
        TypeError: an entry has another dtype than the kernels read.
    """

    #: What `run` says of each minibatch, in the kernel's order.
    _METRICS = (
        *("loss_objective", "loss_critic", "entropy", "clip_fraction", "kl_approx", "mean_ratio", "max_ratio"),
        "grad_norm",
    )

    def __init__(
        self,
        program: Program,
        optimizer: torch.optim.Optimizer,
        chunks: Mapping[NestedKey, torch.Tensor],
        rows: int,
        max_grad_norm: float | None,
    ):
        self.program, self.optimizer, self.chunks, self.rows = program, optimizer, dict(chunks), rows
        self.max_grad_norm = max_grad_norm
        self._group = _with_state(optimizer)
        self._networks = _networks(program.parts)
        #: Largest ratio in the chunks of a first minibatch, before any step. The look at them refuses sizes that do not fit.
        self.max_ratio = program({key: entry[:rows] for key, entry in self.chunks.items()})["max_ratio"]
        for part in program.parts:
            if isinstance(part, ConcatPart):
                part.forward(self.chunks)
            if isinstance(part, GRUPart):
                part.convert(self.chunks)
        self.chunks = {key: entry.contiguous() for key, entry in self.chunks.items()}
        init_key = self._networks[0][0].in_keys[2]
        self.chunks[init_key] = self.chunks[init_key].bool()  # the kernel reads bytes

    def run(self, order: torch.Tensor) -> list[dict[str, float]]:
        """One pass over the chunks in the ``order`` ``[num_chunks]``; metrics of each minibatch, as `RL2PPOLoss` names them.

        Where a gradient is not finite the pass ends, without a step on that minibatch; its metrics are the last ones.

        Raises:
            IndexError: an action is none of the policy's choices.
        """
        order, count = order.long().contiguous(), -(-len(order) // self.rows)  # kept while the kernel reads it
        metrics = torch.zeros(count, len(self._METRICS), dtype=torch.float64)
        library = kernels.load(self.chunks[self.program.loss.tensor_keys.advantage].dtype)
        _require_layout(library)
        end = library.ppo_pass(ctypes.byref(self._arguments(order, metrics)))
        has_stranger, taken = end <= -2, count if end == -1 else end if end >= 0 else -2 - end
        torch._foreach_add_([self.optimizer.state[p]["step"] for p in self._group["params"]], taken)
        if has_stranger:
            action = self.chunks[self.program.loss.tensor_keys.action]
            raise_unknown_actions(action, self._networks[0][1].linears[-1].out_features)
        return [self._named(row) for row in metrics[: taken + (end >= 0)].tolist()]

    def _named(self, row: list[float]) -> dict[str, float]:
        loss, out = self.program.loss, dict(zip(self._METRICS, row, strict=True))
        if not loss.has_critic:
            del out["loss_critic"]
        if loss.entropy_bonus:
            out["loss_entropy"] = -float(loss.entropy_coeff) * out["entropy"]
        else:
            del out["entropy"]
        return {"loss": sum(value for name, value in out.items() if name.startswith("loss_")), **out}

    def _arguments(self, order: torch.Tensor, metrics: torch.Tensor) -> _Pass:
        loss, keys, chunks = self.program.loss, self.program.loss.tensor_keys, self.chunks
        actor, *critic = (self._network(*network) for network in self._networks)
        (low, high), (beta1, beta2) = loss.clip_bounds, self._group["betas"]
        gaussian = next((part for part in self.program.parts if isinstance(part, GaussianHeadPart)), None)
        is_gaussian = gaussian is not None
        target = chunks[keys.value_target] if loss.has_critic else None
        init = chunks[self._networks[0][0].in_keys[2]]
        read = (order, init, chunks[keys.action], chunks[keys.sample_log_prob], chunks[keys.advantage], target)
        return _Pass(
            *(len(order), chunks[keys.advantage].shape[1], self.rows, is_gaussian, *map(kernels.address, read), actor),
            critic[0] if critic else _Network(),
            self._parameter(gaussian.log_std) if is_gaussian else _Parameter(),
            *(low, high, float(loss.critic_coeff) if loss.has_critic else 0.0),
            *(float(loss.entropy_coeff) if loss.entropy_bonus else 0.0, self.max_grad_norm or 0.0),
            *(float(self._group["lr"]), beta1, beta2, self._group["eps"]),
            *(int(self.optimizer.state[self._group["params"][0]]["step"]), metrics.data_ptr()),
        )

    def _network(self, gru: GRUPart, head: ChainPart) -> _Network:
        linear, (in_key, hidden_key, _) = head.linears[-1], gru.in_keys
        of = (_Parameter * 6)(*map(self._parameter, (*gru.layers[0].weights, linear.weight, linear.bias)))
        inputs = (self.chunks[in_key], self.chunks.get(hidden_key))
        return _Network(gru.inputs, gru.units, linear.out_features, *map(kernels.address, inputs), of)

    def _parameter(self, parameter: nn.Parameter) -> _Parameter:
        state = self.optimizer.state[parameter]
        tensors = (parameter, self.program.gradient_of(parameter), state["exp_avg"], state["exp_avg_sq"])
        return _Parameter(*map(kernels.address, tensors), parameter.numel())


def why_not_compiled(
    program: Program, optimizer: torch.optim.Optimizer, chunks: Mapping[NestedKey, torch.Tensor], rows: int
) -> str | None:
    """Why a pass over minibatches of ``rows`` of ``chunks`` is not run by `CompiledPass`, in words; None if it can be."""
    loss, keys = program.loss, program.loss.tensor_keys
    steps = rows * chunks[keys.advantage].shape[1]
    if steps > MOST_STEPS:
        return f"minibatches of {steps} steps are faster one by one (up to {MOST_STEPS} are compiled)"
    refusal = _why_not_these_parts(program) or _why_not_this_optimizer(optimizer, program)
    if refusal is not None:
        return refusal
    read = [keys.sample_log_prob, keys.advantage, *([keys.value_target] if loss.has_critic else [])]
    expected = dict.fromkeys(read, program.parameters[0].dtype)
    is_gaussian = isinstance(_policy(program.parts), GaussianPart)
    expected[keys.action] = program.parameters[0].dtype if is_gaussian else torch.int64
    others = {key: chunks[key].dtype for key, dtype in expected.items() if chunks[key].dtype != dtype}
    return f"{others} are of another dtype than the kernel reads" if others else None


def _why_not_these_parts(program: Program) -> str | None:
    loss, parts = program.loss, [part for part in program.parts if not isinstance(part, ConcatPart)]
    policy = _policy(parts)
    if len(loss.terms) or not isinstance(policy, (CategoricalPart, GaussianPart)):
        return "the loss has further terms, or a policy that is neither categorical nor Gaussian"
    networks = [_chain(part) for part in parts if part is not policy]
    kinds = [GRUPart, ChainPart] * (1 + loss.has_critic)
    if len(networks) != len(kinds) or not all(map(isinstance, networks, kinds)):
        return "actor and critic have not one GRU and one head each"
    pairs = list(zip(networks[::2], networks[1::2], strict=True))
    if not all(_is_one_layer_each(*pair) for pair in pairs):
        return "a GRU of several layers or without biases, or a head of several layers"
    if len({gru.in_keys[2] for gru, _ in pairs}) > 1:
        return "actor and critic start anew by different entries"
    reads = [policy.in_keys[1], *([loss.tensor_keys.value] if loss.has_critic else [])]
    if [head.out_keys[0] for _, head in pairs] != reads:
        return "policy or value is not what its network's head gives"
    if isinstance(policy, GaussianPart) != isinstance(parts[1], GaussianHeadPart) or isinstance(policy, OneHotPart):
        return "the policy's distribution is not the kernel's"
    if len({(p.device.type, p.dtype) for p in program.parameters}) > 1:
        return "parameters of several dtypes"
    return None


def _is_one_layer_each(gru: GRUPart, head: ChainPart) -> bool:
    has_biases = len(gru.layers[0].weights) == 4 and head.linears[0].bias is not None
    is_chain = len(head.linears) == 1 and head.before == ["relu"] and head.after is None and not head.detach
    return len(gru.layers) == 1 and not gru.wanted and has_biases and is_chain and head.in_keys == gru.out_keys


def _chain(part: Part) -> Part:
    """The layers of a head: those of the mean, for a Gaussian."""
    return part.mean if isinstance(part, GaussianHeadPart) else part


def _why_not_this_optimizer(optimizer: torch.optim.Optimizer, program: Program) -> str | None:
    group, *others = optimizer.param_groups
    options = ("amsgrad", "maximize", "weight_decay", "differentiable", "capturable", "decoupled_weight_decay")
    # A learning-rate scheduler puts a function of its own in the place of step, as users may.
    hooks = (
        *optimizer._optimizer_step_pre_hooks,
        *optimizer._optimizer_step_post_hooks,
        *{"step"} & set(vars(optimizer)),
    )
    is_adam = type(optimizer).step is torch.optim.Adam.step
    if not is_adam or others or hooks or any(group.get(option) for option in options):
        return "the optimizer is more than torch.optim.Adam with lr, betas and eps"
    if {id(p) for p in group["params"]} != {id(p) for p in program.parameters}:
        return "the optimizer does not hold the loss's parameters, all and no others"
    if program.has_hooks_or_shares or not all(p.is_contiguous() for p in program.parameters):
        return "parameters are shared, have hooks on their gradients, or are not contiguous"
    states = [optimizer.state[parameter] for parameter in group["params"]]
    known = [state for state in states if state]
    is_dense = all(state[name].is_contiguous() for state in known for name in ("exp_avg", "exp_avg_sq"))
    if not is_dense or len({float(state["step"]) if state else 0.0 for state in states}) > 1:
        return "parameters have made different numbers of steps, or their averages are not contiguous"
    return None


def _with_state(optimizer: torch.optim.Optimizer) -> dict:
    """The optimizer's one group of parameters, each with its state."""
    [group] = optimizer.param_groups
    for parameter in group["params"]:
        if not (state := optimizer.state[parameter]):  # as Adam does before its first step
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    return group


def _policy(parts: list[Part]) -> Part | None:
    return next((part for part in parts if LOG_PROB in part.out_keys), None)


def _networks(parts: list[Part]) -> list[tuple[GRUPart, ChainPart]]:
    """GRU and head of the actor, and those of the critic."""
    policy = _policy(parts)
    networks = [_chain(part) for part in parts if part is not policy and not isinstance(part, ConcatPart)]
    return list(zip(networks[::2], networks[1::2], strict=True))
