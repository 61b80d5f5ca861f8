"""Parts of networks with their own gradients, on the kernels: what `DirectGradients` runs forward and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tensordict import NestedKey
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModuleBase
from torch import nn

from rl2_torchrl import kernels
from rl2_torchrl.modules import encoders
from rl2_torchrl.modules.categorical import categorical_gradient, categorical_terms
from rl2_torchrl.modules.distributions import Gaussian
from rl2_torchrl.modules.gru import FastGRUModule
from rl2_torchrl.modules.gru_sequence import (
    Workspace,
    as_bytes,
    backward_in_place,
    forward_saving,
    weight_products,
)
from rl2_torchrl.modules.heads import Head, SkipHead, are_relu_linear
from rl2_torchrl.modules.linear import MOST_OUTPUTS, relu_linear, relu_linear_gradients
from rl2_torchrl.modules.plain import NotPlainError, State, fits

__all__ = ["CategoricalTerms", "Concat", "GRUPart", "GaussianTerms", "HeadPart", "Part", "parts_of", "policy_terms"]


def _is_bare(module: nn.Module) -> bool:
    """Whether nobody has hung anything on ``module`` or put another function in its place."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(hooks) and "forward" not in vars(module)


class Part:
    """One function of a network, with parameters and a gradient.

    Attributes:
        data_keys: entries that it reads as data: they get no gradient.
        out_key: the entry that it writes.
    """

    data_keys: Sequence[NestedKey] = ()
    out_key: NestedKey | None = None

    def parameters(self) -> list[nn.Parameter]:
        return []

    def write_to(self, gradients: Mapping[int, torch.Tensor]) -> None:
        """Takes the memory that `backward` writes the gradients of the parameters to, by their id."""

    def forward(self, state: State) -> None:
        """Reads entries of ``state`` and writes others."""

    def backward(self, state: State, gradients: State) -> None:
        """Takes the gradients by what `forward` wrote, and adds to those by what it read."""


class Concat(Part):
    """`encoders.Concat`, of data."""

    def __init__(self, in_keys: Sequence[NestedKey], out_key: NestedKey):
        self.in_keys, self.out_key, self.concat = in_keys, out_key, encoders.Concat()
        self.data_keys = in_keys

    def forward(self, state: State) -> None:
        state[self.out_key] = self.concat(*_entries(state, self.in_keys))


class GRUPart(Part):
    """`gru_sequence`; its inputs are data, which get no gradient."""

    def __init__(self, module: FastGRUModule):
        if module.gru.num_layers > 1 or not module.has_kernels() or not _is_bare(module.gru):
            raise NotPlainError("a GRU of several layers, with hooks, or without kernels")
        self.module, gru = module, module.gru
        self.data_keys, self.out_key = module.in_keys, module.out_keys[0]
        self.weights = [getattr(gru, name) for name in gru._all_weights[0]]
        self.inputs, self.units = gru.input_size, gru.hidden_size
        factory = {"dtype": self.weights[0].dtype}
        columns = (5 * self.units + self.inputs + 1 + 15) // 16 * 16 - 4 * self.units
        self._products = (
            torch.empty(3 * self.units, columns, **factory),
            torch.empty(self.units, columns - self.units, **factory),
        )

    def parameters(self) -> list[nn.Parameter]:
        return self.weights

    def write_to(self, gradients: Mapping[int, torch.Tensor]) -> None:
        units, inputs = self.units, self.inputs
        d_rzh, d_n = self._products  # by (h, x, 1, ...) and by (x, 1, ...)
        w_ih, w_hh, *biases = (gradients[id(weight)] for weight in self.weights)
        to = [w_hh, w_ih[: 2 * units], w_ih[2 * units :]]
        of = [d_rzh[:, :units], d_rzh[: 2 * units, units : units + inputs], d_n[:, :inputs]]
        if biases:
            b_ih, b_hh = biases
            to += [b_hh, b_ih[: 2 * units], b_ih[2 * units :]]
            of += [d_rzh[:, units + inputs], d_rzh[: 2 * units, units + inputs], d_n[:, inputs]]
        self._to, self._of = to, of

    def forward(self, state: State) -> None:
        in_key, hidden_key, init_key = self.module.in_keys
        x, is_init = _entries(state, (in_key, init_key))
        hidden = state.get(hidden_key)
        if not fits(self.module, x, hidden):
            raise NotPlainError(f"{in_key} or {hidden_key} does not fit the GRU")
        self._is_init = as_bytes(is_init.squeeze(-1))
        hidden = None if hidden is None else hidden[:, :, 0]
        y = Workspace.take(x, (*x.shape[:2], self.units))
        state[self.module.out_keys[0]], self._saved = forward_saving(x, hidden, self._is_init, self.weights, y)

    def backward(self, state: State, gradients: State) -> None:
        dy = gradients.pop(self.out_key)
        backward_in_place(dy, self._is_init, self.inputs, self.weights[1], self._saved, None)
        weight_products(self._saved, self.units, self._products)
        torch._foreach_copy_(self._to, self._of)
        for memory in (
            self._saved,
            dy,
            state.pop(self.out_key),
        ):  # the heads that read the features have gone back already
            Workspace.give(memory)


class HeadPart(Part):
    """`Head`, with ``extra_keys`` beside the features."""

    def __init__(self, head: Head, key: NestedKey, out_key: NestedKey, extra_keys=(), *, detach: bool = False):
        if not are_relu_linear(list(head.layers)) or type(head) is not Head or not _is_bare(head):
            raise NotPlainError("a head that is not made of ReLU and linear layers alone")
        if bool(extra_keys) != (head.skip_size > 0):
            raise NotPlainError("a head whose further inputs do not go past its first activation")
        self.head, self.key, self.out_key, self.extra_keys, self.detach = head, key, out_key, list(extra_keys), detach
        self.data_keys = self.extra_keys
        self.linears = list(head.layers)[1::2]

    def parameters(self) -> list[nn.Parameter]:
        return [p for linear in self.linears for p in (linear.weight, linear.bias)]

    def write_to(self, gradients: Mapping[int, torch.Tensor]) -> None:
        self._gradients = [(gradients[id(linear.weight)], gradients[id(linear.bias)]) for linear in self.linears]

    def forward(self, state: State) -> None:
        x, *extra = _entries(state, (self.key, *self.extra_keys))
        if extra:
            x = torch.cat((x, *(e.to(x.dtype) for e in extra)), -1)
        if x.shape[-1] != self.head.in_features:
            raise NotPlainError(f"{self.key} and {self.extra_keys} do not fit the head")
        self._inputs = []
        for number, linear in enumerate(self.linears):
            if number == 0 and extra:
                x = self.head.activated(x)
            self._inputs.append(x)
            x = relu_linear(x, linear.weight, linear.bias) if self._has_relu(number) else linear(x)
        state[self.out_key] = x

    def _has_relu(self, number: int) -> bool:
        # Where there are extra inputs, they go past the first activation, which `activated` then has made already.
        return number > 0 or not self.extra_keys

    def backward(self, state: State, gradients: State) -> None:
        dy = gradients.pop(self.out_key)
        for number in reversed(range(len(self.linears))):
            x, needed = self._inputs[number], number > 0 or not self.detach
            dx = Workspace.take(x, x.shape) if needed else None
            _linear_gradients(x, self.linears[number].weight, dy, dx, *self._gradients[number], self._has_relu(number))
            dy = dx
        if self.detach:
            return
        if self.extra_keys:
            features = state[self.key]
            dy = torch.where(features > 0, dy[..., : features.shape[-1]], 0.0)
        if self.key in gradients:
            gradients[self.key].add_(dy)
            Workspace.give(dy)
        else:
            gradients[self.key] = dy


class CategoricalTerms(Part):
    """Log-probability and entropy of a categorical distribution with logits ``key``."""

    def __init__(self, key: NestedKey):
        self.key = key

    def forward(self, action: torch.Tensor, state: State) -> tuple[torch.Tensor, float]:
        """Log-probability of ``action`` ``[N, T]``, and the mean entropy."""
        logits = state[self.key]
        if action.shape != logits.shape[:-1] or action.dtype != torch.int64:
            raise NotPlainError("actions that are not one index a step")
        log_prob, self._entropy, self._log_total = categorical_terms(action, logits)
        return log_prob, self._entropy.mean().item()

    def backward(self, d_log_prob, d_entropy: float, action, state: State, gradients: State) -> None:
        d_entropy = torch.full_like(d_log_prob, d_entropy)
        terms = (state[self.key], action, self._entropy, self._log_total)
        gradients[self.key] = categorical_gradient(*terms, d_log_prob, d_entropy)


class GaussianTerms(Part):
    """Log-probability and entropy of a normal distribution with mean ``key`` and a scale of its own."""

    def __init__(self, key: NestedKey, log_std: nn.Parameter):
        self.key, self.log_std = key, log_std

    def parameters(self) -> list[nn.Parameter]:
        return [self.log_std]

    def write_to(self, gradients: Mapping[int, torch.Tensor]) -> None:
        self._gradient = gradients[id(self.log_std)]

    def forward(self, action: torch.Tensor, state: State) -> tuple[torch.Tensor, float]:
        """Log-probability of ``action`` ``[N, T, action_dim]``, and the entropy, the same in every step."""
        loc = state[self.key]
        if (action.shape, action.dtype) != (loc.shape, loc.dtype):
            raise NotPlainError("actions of another shape or dtype than their means")
        log_prob = loc.new_empty(loc.shape[:-1])
        tensors = (action, loc, self.log_std, log_prob)
        kernels.load(loc.dtype).gaussian_forward(*_sizes(loc), *map(kernels.address, tensors))
        return log_prob, (self.log_std + _NORMAL_ENTROPY).sum().item()

    def backward(self, d_log_prob, d_entropy: float, action, state: State, gradients: State) -> None:
        loc = state[self.key]
        d_loc = torch.empty_like(loc)
        tensors = (action, loc, self.log_std, d_log_prob, d_loc, self._gradient)
        kernels.load(loc.dtype).gaussian_backward(*_sizes(loc), *map(kernels.address, tensors))
        self._gradient.add_(d_entropy * d_log_prob.numel())
        gradients[self.key] = d_loc


#: Entropy of a normal distribution of standard deviation 1.
_NORMAL_ENTROPY = 1.4189385332046727


def _sizes(loc: torch.Tensor) -> tuple[int, int]:
    return loc.numel() // loc.shape[-1], loc.shape[-1]


def parts_of(module: TensorDictModuleBase) -> list[Part]:
    """The parts that ``module``, one of `flat_modules`, is made of.

    Raises:
        NotPlainError: its gradient is not known here.
    """
    if isinstance(module, ProbabilisticTensorDictModule):
        return []
    if isinstance(module, FastGRUModule):
        return [GRUPart(module)]
    function, (key, *others), out_key = module.module, module.in_keys, module.out_keys[0]
    kind = type(function) if isinstance(function, nn.Module) and _is_bare(function) else None
    if kind is encoders.Concat:
        return [Concat(module.in_keys, out_key)]
    if kind is Head:
        return [HeadPart(function, key, out_key)]
    if kind is Gaussian:
        return [HeadPart(function.mean, key, out_key)]
    if kind is SkipHead and _is_bare(function.concat):
        return [HeadPart(function.head, key, out_key, others, detach=function.detach)]
    raise NotPlainError(f"{type(function).__name__} is a function whose gradient is not known here, or has hooks")


def policy_terms(actor: Sequence[TensorDictModuleBase], sample: ProbabilisticTensorDictModule) -> Part:
    """What the loss reads of the distribution ``sample`` that the last module of ``actor`` gives the parameters of.

    Raises:
        NotPlainError: its gradient is not known here.
    """
    *_, head = (module for module in actor if not isinstance(module, ProbabilisticTensorDictModule))
    if isinstance(head, FastGRUModule):
        raise NotPlainError("the distribution's parameters are a GRU's output")
    if isinstance(head.module, Gaussian):
        return GaussianTerms(head.out_keys[0], head.module.log_std)
    if sample.distribution_class is not torch.distributions.Categorical:
        raise NotPlainError(f"{sample.distribution_class.__name__} is a distribution whose gradient is not known here")
    return CategoricalTerms(head.out_keys[0])


def _linear_gradients(x, weight, dy, dx, d_weight, d_bias, has_relu: bool) -> None:
    """Writes the gradients of `relu_linear`, or without ReLU of a linear layer, into the last three (``dx`` may be None)."""
    if has_relu and len(weight) <= MOST_OUTPUTS:
        relu_linear_gradients(x, weight, dy, dx, d_weight, d_bias)
        return
    flat, slopes = x.flatten(0, 1), dy.flatten(0, 1)
    torch.mm(slopes.t(), flat.relu() if has_relu else flat, out=d_weight)
    torch.sum(slopes, 0, out=d_bias)
    if dx is not None:
        torch.mm(slopes, weight, out=dx.view(flat.shape))
        if has_relu:
            dx.masked_fill_(x <= 0, 0.0)


def _entries(state: State, keys: Sequence[NestedKey]) -> list[torch.Tensor]:
    missing = [key for key in keys if key not in state]
    if missing:
        raise NotPlainError(f"{missing} is missing")
    return [state[key] for key in keys]
