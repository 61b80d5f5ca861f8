"""`orthogonal_init_`: an initialisation with which a GRU remembers over long trials from the start."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

__all__ = ["orthogonal_init_"]

Module = TypeVar("Module", bound=nn.Module)


def orthogonal_init_(
    module: Module, *, memory_steps: int | None = None, input_gain: float = 1.0, gate_gain: float = 1.0
) -> Module:
    """Draws the weights of every GRU in ``module`` anew, the recurrent ones orthogonal, and returns it.

    Each gate's recurrent matrix is orthogonal (Saxe et al. 2014), its input matrix is Xavier's (Glorot & Bengio 2010), biases
    are 0. `torch.nn.GRU` draws all from U(-1/sqrt(H), 1/sqrt(H)), with which a state fades within a few steps: on long trials the
    agent then learns more slowly at first. Other layers stay as they are.

    Args:
        module: an actor, a critic, or any module with a `torch.nn.GRU` in it.
        memory_steps: steps over which the slowest units shall remember at first, such as a trial's. The bias of a unit's update
            gate is then log(u) with u from U(1, memory_steps), so that it forgets over about u steps ("chrono"
            initialisation, Tallec & Ollivier 2018, section 2). None leaves it 0: all units forget half with every step.
        input_gain: factor on the input matrices, as ``gain`` in `torch.nn.init`. Above 1 the gates answer to their inputs less
            linearly: units that respond to one state and action together are there from the start.
        gate_gain: a further factor on the update gate's input matrix. Well above 1 a unit writes at some inputs and keeps its
            state at others from the start, so that there are memories of single states and actions to build on.

    Raises:
        ValueError: there is no GRU in ``module``, or ``memory_steps`` is below 1 or there are no biases.

    Examples:
        >>> import torch
        >>> from rl2_torchrl.modules import GRUCategoricalActor
        >>> actor = orthogonal_init_(GRUCategoricalActor(5, 3, hidden_size=8))
        >>> [gru] = [part for part in actor.modules() if isinstance(part, nn.GRU)]
        >>> reset_gate = gru.weight_hh_l0[:8]
        >>> torch.allclose(reset_gate @ reset_gate.T, torch.eye(8), atol=1e-5)
        True
    """
    grus = [part for part in module.modules() if isinstance(part, nn.GRU)]
    if not grus:
        raise ValueError(f"there is no torch.nn.GRU in this {type(module).__name__}, so nothing would be drawn anew.")
    if memory_steps is not None and memory_steps < 1:
        raise ValueError(f"memory_steps={memory_steps} must be at least 1: a number of steps, such as a trial's.")
    for gru in grus:
        for name, parameter in gru.named_parameters():
            if name.startswith("bias"):
                nn.init.zeros_(parameter)
                continue
            gains = (input_gain, input_gain * gate_gain, input_gain)
            for gate, gain in zip(parameter.detach().chunk(3), gains, strict=True):
                if name.startswith("weight_hh"):
                    nn.init.orthogonal_(gate)
                else:
                    nn.init.xavier_uniform_(gate, gain=gain)
        if memory_steps is not None:
            _remember(gru, memory_steps)
    return module


def _remember(gru: nn.GRU, steps: int) -> None:
    """Lets each unit forget over a time of its own, up to ``steps`` steps."""
    if not gru.bias:
        raise ValueError(
            "memory_steps is a matter of the update gates' biases, and this torch.nn.GRU has none (bias=False)."
        )
    for layer in range(gru.num_layers):
        _, update_gate, _ = getattr(gru, f"bias_ih_l{layer}").detach().chunk(3)
        nn.init.uniform_(update_gate, 1.0, float(steps)).log_()
