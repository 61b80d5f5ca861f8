"""`orthogonal_init_`: an initialisation with which a GRU remembers over long trials from the start."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

__all__ = ["orthogonal_init_"]

Module = TypeVar("Module", bound=nn.Module)


def orthogonal_init_(module: Module) -> Module:
    """Draws the weights of every GRU in ``module`` anew, the recurrent ones orthogonal, and returns it.

    Each gate's recurrent matrix is orthogonal (Saxe et al. 2014), its input matrix is Xavier's (Glorot & Bengio 2010), biases
    are 0. `torch.nn.GRU` draws all from U(-1/sqrt(H), 1/sqrt(H)), with which a state fades within a few steps: on long trials the
    agent then learns more slowly at first. Other layers stay as they are.

    Raises:
        ValueError: there is no GRU in ``module``.

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
    for gru in grus:
        for name, parameter in gru.named_parameters():
            if name.startswith("bias"):
                nn.init.zeros_(parameter)
                continue
            draw = nn.init.orthogonal_ if name.startswith("weight_hh") else nn.init.xavier_uniform_
            for gate in parameter.detach().chunk(3):
                draw(gate)
    return module
