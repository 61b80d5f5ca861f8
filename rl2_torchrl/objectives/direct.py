"""`DirectGradients`: `RL2PPOLoss` and its gradients on the kernels alone, without autograd.

A minibatch of a small network is some 20 operations forward and as many back. PyTorch spends longer on recording and
replaying them than on the arithmetic. Here each part of the networks (`Part`) knows its own gradient: a minibatch is every
part's ``forward`` in order, the loss, and every part's ``backward`` in the opposite order. What backward hands from part to
part are the gradients by the entries that forward wrote, under the same keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from tensordict import NestedKey
from torch import nn

from rl2_torchrl import kernels
from rl2_torchrl.modules.plain import NotPlainError, State, family_of, flat_modules
from rl2_torchrl.objectives.clipped import clipped_terms
from rl2_torchrl.objectives.parts import Concat, HeadPart, Part, parts_of, policy_terms
from rl2_torchrl.objectives.ppo import RL2PPOLoss

__all__ = ["DirectGradients"]


class DirectGradients:
    """Losses of `RL2PPOLoss` as numbers, and their gradients written into ``parameter.grad``.

    The same as ``sum of losses . backward()`` to rounding. It holds for one state of the loss: when an option, a hook or a
    parameter's ``requires_grad`` changes, make a new one.

    Args:
        loss: an `RL2PPOLoss` with l2 value loss over `GRUGaussianActor` or `GRUCategoricalActor` and any of this package's
            critics, one GRU layer and ReLU heads, on the CPU.

    Raises:
        NotPlainError: the loss or its networks are more than that, or there are no kernels; the message says what.

    Examples:
        >>> from rl2_torchrl import GRUGaussianActor, GRUValueHead
        >>> loss = RL2PPOLoss(GRUGaussianActor(5, 2), GRUValueHead(5))
        >>> try:
        ...     direct = DirectGradients(loss)  # then direct(minibatch), direct.norm(), optimizer.step()
        ... except NotPlainError:
        ...     direct = None  # without a C compiler, say: loss(minibatch) and backward()
    """

    def __init__(self, loss: RL2PPOLoss):
        if type(loss) is not RL2PPOLoss or not loss.is_plain or _has_hooks(loss):
            raise NotPlainError("the loss is more than RL2PPOLoss with its own options")
        self.loss, self._clip_bounds = loss, loss.clip_bounds
        parameters = [p for p in loss.parameters() if p.numel()]
        if not kernels.covers(*parameters):
            raise NotPlainError("there are no kernels for the networks' device and dtype")
        actor = flat_modules(loss.actor_network)
        sample, _ = family_of(actor)
        critic = flat_modules(loss.critic_network) if loss.has_critic else []
        self.parts = [part for module in (*actor, *critic) for part in parts_of(module)]
        self.policy = policy_terms(actor, sample)
        _require_chains(self.parts)
        self._own(parameters)

    def _own(self, parameters: Sequence[nn.Parameter]) -> None:
        """Gradients of all parameters side by side, so that their norm is one operation."""
        known = [id(p) for part in (*self.parts, self.policy) for p in part.parameters()]
        if len(known) != len(parameters) or set(known) != {id(p) for p in parameters}:
            raise NotPlainError("the loss has parameters beside those of GRUs and heads, or parts share them")
        if not all(p.is_contiguous() for p in parameters):
            raise NotPlainError("a parameter is not contiguous")  # the kernels read them as they lie
        if any(not p.requires_grad or p._backward_hooks or p._post_accumulate_grad_hooks for p in parameters):
            raise NotPlainError("a parameter is frozen or has hooks on its gradient")
        sizes = [p.numel() for p in parameters]
        self._gradient = torch.empty(sum(sizes), dtype=parameters[0].dtype)
        views = [part.view_as(p) for part, p in zip(self._gradient.split(sizes), parameters, strict=True)]
        self._owned = list(zip(parameters, views, strict=True))
        self._views = {id(p): view for p, view in self._owned}
        for part in (*self.parts, self.policy):
            part.write_to(self._views)

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and gradients."""
        return self._gradient.dtype

    def has_all(self, parameters: Sequence[nn.Parameter]) -> bool:
        """Whether ``parameters`` are the loss's, all and no others."""
        return {id(p) for p in parameters} == set(self._views)

    def gradient_of(self, parameter: nn.Parameter) -> torch.Tensor:
        """Where the gradient of ``parameter`` is written."""
        return self._views[id(parameter)]

    def norm(self) -> float:
        """The norm of the whole gradient."""
        return self._gradient.norm().item()

    def scale(self, factor: float) -> None:
        """Multiplies the whole gradient by ``factor``."""
        self._gradient.mul_(factor)

    @torch.no_grad()
    def __call__(self, data: Mapping[NestedKey, torch.Tensor]) -> dict[str, float]:
        """Losses and diagnostics of the sequences ``data``, contiguous entries ``[N, T, ...]``, as `RL2PPOLoss` names them.

        Raises:
            NotPlainError: an entry is missing or does not fit; `RL2PPOLoss` itself says which.
        """
        loss, keys = self.loss, self.loss.tensor_keys
        state: State = dict(data)
        read = (keys.action, keys.sample_log_prob, keys.advantage, *([keys.value_target] if loss.has_critic else []))
        if not set(read) <= state.keys():
            raise NotPlainError(f"one of {read} is missing")
        for part in self.parts:
            part.forward(state)
        log_prob, entropy = self.policy.forward(state[keys.action], state)
        inputs = (log_prob, state[keys.sample_log_prob], state[keys.advantage].squeeze(-1))
        if {(entry.shape, entry.dtype) for entry in inputs} != {(log_prob.shape, log_prob.dtype)}:
            raise NotPlainError("log-probabilities or advantages of another shape or dtype")
        active, _, totals = clipped_terms(*inputs, *self._clip_bounds)
        size = log_prob.numel()
        objective, clipped, kl, _, largest = totals
        out = {"loss_objective": -objective / size, "clip_fraction": clipped / size}
        out |= {"kl_approx": kl / size, "max_ratio": largest}
        gradients: State = {}
        coefficient = float(loss.entropy_coeff) if loss.entropy_bonus else 0.0
        self.policy.backward(active.mul_(-1 / size), -coefficient / size, state[keys.action], state, gradients)
        if loss.entropy_bonus:
            out |= {"entropy": entropy, "loss_entropy": -coefficient * entropy}
        if loss.has_critic:
            value, target = state[keys.value], state[keys.value_target]
            if (value.shape, value.dtype) != (target.shape, target.dtype):
                raise NotPlainError("value targets of another shape or dtype than the values")
            error = value - target
            coefficient = float(loss.critic_coeff)
            out["loss_critic"] = coefficient * torch.dot(error.view(-1), error.view(-1)).item() / size
            gradients[keys.value] = error.mul_(2 * coefficient / size)
        for part in reversed(self.parts):
            part.backward(state, gradients)
        for parameter, gradient in self._owned:
            parameter.grad = gradient
        return out


def _has_hooks(loss: RL2PPOLoss) -> bool:
    if "forward" in vars(loss):  # someone has put a function of their own in its place
        return True
    hooks = (*loss._forward_hooks.values(), *loss._forward_pre_hooks.values())
    return any(not hook.__module__.startswith("torchrl.") for hook in hooks)  # TorchRL's asks for target networks


def _require_chains(parts: Sequence[Part]) -> None:
    """Each part backward knows one gradient: that by what a GRU gives, or a head. None may be lost, or taken for another's."""
    made, with_gradient = set(), set()
    for part in parts:
        if with_gradient.intersection(part.data_keys) or part.out_key in made:
            raise NotPlainError(f"{part.out_key} is made of what has a gradient, or twice")
        if isinstance(part, HeadPart) and part.key not in with_gradient:
            raise NotPlainError(f"the head on {part.key} is not on a GRU")
        made.add(part.out_key)
        if not isinstance(part, Concat):
            with_gradient.add(part.out_key)
