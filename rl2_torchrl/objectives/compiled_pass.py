"""`CompiledPass`: a whole pass of many small minibatches in one call of the kernels, Adam's steps included.

The original takes an optimizer step on 32 env steps at a time: 0.1 ms of arithmetic, on which Python spends 0.6 ms even
without autograd. What `DirectGradients` does part by part is one C function here (``kernels/pass.c``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import torch
from tensordict import NestedKey
from torch import nn

from rl2_torchrl import kernels
from rl2_torchrl.modules.categorical import raise_unknown_actions
from rl2_torchrl.modules.plain import NotPlainError
from rl2_torchrl.objectives.direct import DirectGradients
from rl2_torchrl.objectives.parts import Concat, GaussianTerms, GRUPart, HeadPart

__all__ = ["CompiledPass"]

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


class CompiledPass:
    """Passes over ``chunks`` with the loss of a `DirectGradients` and the steps of a `torch.optim.Adam`.

    Args:
        direct: the loss; actor and critic have a GRU and one linear layer each and share nothing.
        optimizer: plain `torch.optim.Adam` over its parameters. Its state is what the steps change, as its own would.
        chunks: contiguous entries ``[num_chunks, T, ...]``, by key.
        rows: chunks in a minibatch.
        max_grad_norm: clip the gradient's norm at this; None does not.

    Raises:
        NotPlainError: loss, optimizer or data are more than that, or minibatches so large that this would be slow.
    """

    #: What `run` says of each minibatch, in the kernel's order.
    _METRICS = ("loss_objective", "loss_critic", "entropy", "clip_fraction", "kl_approx", "max_ratio", "grad_norm")

    def __init__(
        self,
        direct: DirectGradients,
        optimizer: torch.optim.Optimizer,
        chunks: Mapping[NestedKey, torch.Tensor],
        rows: int,
        max_grad_norm: float | None,
    ):
        self.direct, self.optimizer, self.chunks, self.rows = direct, optimizer, dict(chunks), rows
        self.max_grad_norm = max_grad_norm
        self._group = _plain_adam(optimizer, direct)
        self._networks = _networks(direct)
        steps = self.chunks[direct.loss.tensor_keys.advantage].shape[1]
        if rows * steps > MOST_STEPS:
            raise NotPlainError(f"minibatches of {rows * steps} steps are faster one by one")
        #: Largest ratio in the chunks of a first minibatch, before any step. The look at them refuses entries that do not fit.
        self.max_ratio = direct({key: entry[:rows] for key, entry in self.chunks.items()})["max_ratio"]
        for part in direct.parts:
            if isinstance(part, Concat):
                part.forward(self.chunks)
        self.chunks = {key: entry.contiguous() for key, entry in self.chunks.items()}
        init_key = self._networks[0][0].module.in_keys[2]
        self.chunks[init_key] = self.chunks[init_key].bool()  # the kernel reads bytes

    def run(self, order: torch.Tensor) -> list[dict[str, float]]:
        """One pass over the chunks in the ``order`` ``[num_chunks]``; metrics of each minibatch, as `RL2PPOLoss` names them.

        Where a gradient is not finite the pass ends, without a step on that minibatch; its metrics are the last ones.

        Raises:
            IndexError: an action is none of the policy's choices.
        """
        order, count = order.long().contiguous(), -(-len(order) // self.rows)  # kept while the kernel reads it
        metrics = torch.zeros(count, len(self._METRICS), dtype=torch.float64)
        end = kernels.load(self.direct.dtype).ppo_pass(ctypes.byref(self._arguments(order, metrics)))
        has_stranger, taken = end <= -2, count if end == -1 else end if end >= 0 else -2 - end
        torch._foreach_add_([self.optimizer.state[p]["step"] for p in self._group["params"]], taken)
        if has_stranger:
            action = self.chunks[self.direct.loss.tensor_keys.action]
            raise_unknown_actions(action, self._networks[0][1].linears[-1].out_features)
        return [self._named(row) for row in metrics[: taken + (end >= 0)].tolist()]

    def _named(self, row: list[float]) -> dict[str, float]:
        loss, out = self.direct.loss, dict(zip(self._METRICS, row, strict=True))
        if not loss.has_critic:
            del out["loss_critic"]
        if loss.entropy_bonus:
            out["loss_entropy"] = -float(loss.entropy_coeff) * out["entropy"]
        else:
            del out["entropy"]
        return {"loss": sum(value for name, value in out.items() if name.startswith("loss_")), **out}

    def _arguments(self, order: torch.Tensor, metrics: torch.Tensor) -> _Pass:
        loss, keys, chunks = self.direct.loss, self.direct.loss.tensor_keys, self.chunks
        actor, *critic = (self._network(*network) for network in self._networks)
        policy, (low, high), (beta1, beta2) = self.direct.policy, loss.clip_bounds, self._group["betas"]
        is_gaussian = isinstance(policy, GaussianTerms)
        target = chunks[keys.value_target] if loss.has_critic else None
        read = (
            order,
            chunks[self._networks[0][0].module.in_keys[2]],
            chunks[keys.action],
            chunks[keys.sample_log_prob],
            chunks[keys.advantage],
            target,
        )
        return _Pass(
            *(len(order), chunks[keys.advantage].shape[1], self.rows, is_gaussian, *map(kernels.address, read), actor),
            critic[0] if critic else _Network(),
            self._parameter(policy.log_std) if is_gaussian else _Parameter(),
            *(low, high, float(loss.critic_coeff) if loss.has_critic else 0.0),
            *(float(loss.entropy_coeff) if loss.entropy_bonus else 0.0, self.max_grad_norm or 0.0),
            *(float(self._group["lr"]), beta1, beta2, self._group["eps"]),
            *(int(self.optimizer.state[self._group["params"][0]]["step"]), metrics.data_ptr()),
        )

    def _network(self, gru: GRUPart, head: HeadPart) -> _Network:
        linear, (in_key, hidden_key, _) = head.linears[-1], gru.module.in_keys
        of = (_Parameter * 6)(*map(self._parameter, (*gru.weights, linear.weight, linear.bias)))
        inputs = (self.chunks[in_key], self.chunks.get(hidden_key))
        return _Network(gru.inputs, gru.units, linear.out_features, *map(kernels.address, inputs), of)

    def _parameter(self, parameter: nn.Parameter) -> _Parameter:
        state = self.optimizer.state[parameter]
        tensors = (parameter, self.direct.gradient_of(parameter), state["exp_avg"], state["exp_avg_sq"])
        return _Parameter(*map(kernels.address, tensors), parameter.numel())


def _plain_adam(optimizer: torch.optim.Optimizer, direct: DirectGradients) -> dict:
    """The optimizer's one group of parameters, each with its state."""
    group, *others = optimizer.param_groups
    options = ("amsgrad", "maximize", "weight_decay", "differentiable", "capturable")
    # A learning-rate scheduler puts a function of its own in the place of step, as users may.
    hooks = (
        *optimizer._optimizer_step_pre_hooks,
        *optimizer._optimizer_step_post_hooks,
        *{"step"} & set(vars(optimizer)),
    )
    if type(optimizer) is not torch.optim.Adam or others or hooks or any(group[option] for option in options):
        raise NotPlainError("the optimizer is more than torch.optim.Adam with lr, betas and eps")
    if not direct.has_all(group["params"]):
        raise NotPlainError("the optimizer does not hold the loss's parameters, all and no others")
    states = [optimizer.state[parameter] for parameter in group["params"]]
    for parameter, state in zip(group["params"], states, strict=True):
        if not state:  # as Adam does before its first step
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    is_dense = all(state[name].is_contiguous() for state in states for name in ("exp_avg", "exp_avg_sq"))
    if not is_dense or len({float(state["step"]) for state in states}) > 1:
        raise NotPlainError("parameters have made different numbers of steps, or their averages are not contiguous")
    return group


def _networks(direct: DirectGradients) -> list[tuple[GRUPart, HeadPart]]:
    """GRU and head of the actor, and those of the critic."""
    parts = [part for part in direct.parts if not isinstance(part, Concat)]
    kinds = [type(part) for part in parts]
    if kinds != [GRUPart, HeadPart] * (1 + direct.loss.has_critic):
        raise NotPlainError("actor and critic have not one GRU and one head each")
    networks = list(zip(parts[::2], parts[1::2], strict=True))
    for gru, head in networks:
        is_simple = len(head.linears) == 1 and not head.extra_keys and head.key == gru.module.out_keys[0]
        if not is_simple or len(gru.weights) < 4 or head.linears[0].bias is None:
            raise NotPlainError("a GRU without biases, or a head of several layers")
    if len({gru.module.in_keys[2] for gru, _ in networks}) > 1:
        raise NotPlainError("actor and critic start anew by different entries")
    return networks
