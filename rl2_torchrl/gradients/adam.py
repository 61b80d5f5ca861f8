"""`AdamSteps`: a minibatch's gradient norm, clipping and Adam's step by the kernels; `OptimizerSteps`: by any other optimizer.

Of networks of some ten thousand weights PyTorch's own take 0.15 ms, nearly all of it Python's: a tenth of a minibatch's time.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from inspect import unwrap

import torch
from torch import nn
from torch.autograd.graph import increment_version
from torch.optim import Adam, lr_scheduler
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from rl2_torchrl import kernels

__all__ = ["AdamSteps", "OptimizerSteps", "steps_by", "why_not_adam"]

_pointer = ctypes.c_void_p


class _Options(ctypes.Structure):
    """``adam_options`` of the kernels."""

    _fields_ = [(name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "epsilon", "decay", "l2")]


class _Row(ctypes.Structure):
    """``parameter`` of the kernels."""

    _fields_ = [(name, _pointer) for name in ("value", "gradient", "mean", "square", "step", "options")]
    _fields_ += [("size", ctypes.c_long)]


class OptimizerSteps:
    """Steps of ``optimizer`` on ``parameters``, by PyTorch."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]):
        self._optimizer, self._parameters = optimizer, parameters

    def take(self, max_norm: float | None) -> float:
        """A step by the gradients, their norm clipped at ``max_norm``; returns what it was: no step where it is not finite."""
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        if math.isfinite(norm):
            if max_norm is not None:
                nn.utils.clip_grads_with_norm_(self._parameters, max_norm, norm)
            self._optimizer.step()
        return norm.item()


class AdamSteps:
    """Steps of ``optimizer``, as `why_not_adam` lets it pass, whose state is what they change, as its own would.

    They hold for one state of the optimizer: when it loads another one, make new ones.
    """

    def __init__(self, optimizer: Adam):
        self._optimizer = optimizer
        self._groups = [(group, _Options()) for group in optimizer.param_groups]
        self._options = {parameter: options for group, options in self._groups for parameter in group["params"]}
        self._table = (_Row * len(self._options))()
        self._rows = list(zip(self._options, self._table, strict=True))
        self._library, self._norm = kernels.load(next(iter(self._options)).dtype), ctypes.c_double()

    def table(self) -> tuple[int, int]:
        """Where the kernels find parameters, gradients, averages and options as they are now, and of how many parameters."""
        for group, options in self._groups:
            options.lr, options.epsilon, options.decay = map(float, (group["lr"], group["eps"], group["weight_decay"]))
            options.beta1, options.beta2 = map(float, group["betas"])
            if not group.get("decoupled_weight_decay"):
                options.decay, options.l2 = 0.0, options.decay
        if "step" in vars(self._optimizer):
            self._optimizer._opt_called = True  # as a scheduler's function in the place of step notes it
        for parameter, row in self._rows:
            row.size = 0
            if parameter.grad is not None:
                self._look_at(parameter, row)
        return ctypes.addressof(self._table), len(self._table)

    def _look_at(self, parameter: nn.Parameter, row: _Row) -> None:
        """Writes into ``row`` where ``parameter`` and its gradient are by now, and at first Adam's state of it."""
        if not (parameter.is_contiguous() and parameter.grad.is_contiguous()):
            parameter.data, parameter.grad = parameter.data.contiguous(), parameter.grad.contiguous()
        if row.mean is None:
            if not (state := self._optimizer.state[parameter]):  # as Adam does before its first step
                state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
            row.mean, row.square, row.step = (state[name].data_ptr() for name in ("exp_avg", "exp_avg_sq", "step"))
            row.options = ctypes.addressof(self._options[parameter])
        row.value, row.gradient, row.size = parameter.data_ptr(), parameter.grad.data_ptr(), parameter.numel()

    def take(self, max_norm: float | None) -> float:
        """As `OptimizerSteps.take`."""
        self._library.clip_and_step(*self.table(), float(max_norm or 0), ctypes.addressof(self._norm))
        # The weights are others now: a graph from before a step cannot be gone back through.
        increment_version([parameter for parameter in self._options if parameter.grad is not None])
        return self._norm.value


def steps_by(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> AdamSteps | OptimizerSteps:
    """Steps of ``optimizer`` on ``parameters`` of a loss, by the kernels where it can be."""
    refusal = why_not_adam(optimizer, parameters)
    return AdamSteps(optimizer) if refusal is None else OptimizerSteps(optimizer, parameters)


def why_not_adam(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> str | None:
    """Why the kernels do not take the steps of ``optimizer`` on ``parameters``, in words; None where they do."""
    groups, held = optimizer.param_groups, {p for group in optimizer.param_groups for p in group["params"]}
    options = ("amsgrad", "maximize", "differentiable", "capturable")
    own_hooks = (*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks)
    hooks = (*own_hooks, *_global_optimizer_pre_hooks, *_global_optimizer_post_hooks)
    more = hooks or _has_own_step(optimizer) or any(group.get(option) for group in groups for option in options)
    # PyTorch wraps both: the one when a first optimizer of a class is made, the other in each class when it compiles.
    pairs = [(getattr(type(optimizer), name, None), getattr(Adam, name)) for name in ("step", "_init_group")]
    if more or any(own is None or unwrap(own) is not unwrap(adams) for own, adams in pairs):
        return "the optimizer is more than torch.optim.Adam, or AdamW, with lr, betas, eps and weight_decay"
    if not held >= {p for p in parameters if p.requires_grad}:
        return "the optimizer does not hold all of the loss's parameters"
    states = [state for p in held if (state := optimizer.state.get(p))]  # asked by index, it would make some
    tensors = [*held, *(state[name] for state in states for name in ("exp_avg", "exp_avg_sq"))]
    counted = [
        isinstance(n := state["step"], torch.Tensor) and n.is_cpu and n.dtype == torch.float32 for state in states
    ]
    if not (kernels.covers(*tensors) and all(t.is_contiguous() for t in tensors) and all(counted)):
        return (
            "there are no kernels for parameters, or averages and counts of Adam's, of these dtypes, device or layout"
        )
    return None


def _has_own_step(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a user's function is in the place of ``optimizer.step``; a scheduler's does no more than note that it is called."""
    if (own := vars(optimizer).get("step")) is None:
        return False
    is_schedulers = getattr(own, "__code__", None) and own.__code__.co_filename == lr_scheduler.__file__
    return not is_schedulers or own.__wrapped__ is not type(optimizer).step
