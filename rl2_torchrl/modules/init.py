"""`orthogonal_init_`: an initialisation with which a GRU or LSTM remembers over long trials from the start."""

from torch import nn

__all__ = ["orthogonal_init_"]


def orthogonal_init_(
    module: nn.Module, *, memory_steps: int | None = None, input_gain: float = 1.0, gate_gain: float = 1.0
) -> nn.Module:
    """Draws the weights of every GRU and LSTM in ``module`` anew, the recurrent ones orthogonal, and returns it.

    Each gate's recurrent matrix is orthogonal (Saxe et al. 2014), its input matrix is Xavier's (Glorot & Bengio 2010), biases
    are 0; other layers stay. `torch.nn.GRU` draws all from U(-1/sqrt(H), 1/sqrt(H)), with which a state fades within a few steps:
    on long trials the agent then learns more slowly at first.

    Args:
        module: an actor, a critic, or any module with a `torch.nn.GRU` or `torch.nn.LSTM` in it.
        memory_steps: steps over which the slowest units shall remember at first, such as a trial's. The bias of a unit's update
            gate (an LSTM's forget gate, and with opposite sign its input gate) is then log(u) with u from U(1, memory_steps), so
            that it forgets over about u steps ("chrono" initialisation, Tallec & Ollivier 2018). None leaves it 0: all units
            forget half with every step.
        input_gain: factor on the input matrices. Above 1 the gates answer less linearly: units that respond to one state and action
            together are there from the start.
        gate_gain: a further factor on the input matrix of the update gate (an LSTM's input and forget gates). Well above 1 a unit
            writes at some inputs and keeps its state at others: memories of single states and actions to build on.

    Examples:
        >>> import torch
        >>> reset_gate = orthogonal_init_(nn.GRU(5, 8)).weight_hh_l0[:8]
        >>> torch.allclose(reset_gate @ reset_gate.T, torch.eye(8), atol=1e-5)
        True
    """
    networks = [part for part in module.modules() if isinstance(part, nn.GRU | nn.LSTM)]
    if not networks:
        raise ValueError(f"there is no torch.nn.GRU or torch.nn.LSTM in this {type(module).__name__} to be drawn anew.")
    if memory_steps is not None and not memory_steps >= 1:
        raise ValueError(f"memory_steps={memory_steps} must be at least 1: a number of steps, such as a trial's.")
    for network in networks:
        gate_gains = (1, gate_gain, 1) if isinstance(network, nn.GRU) else (gate_gain, gate_gain, 1, 1)
        for name, parameter in network.named_parameters():
            if name.startswith("bias"):
                nn.init.zeros_(parameter)
                continue
            for gate, gain in zip(parameter.detach().chunk(len(gate_gains)), gate_gains, strict=True):
                if name.startswith("weight_hh"):
                    nn.init.orthogonal_(gate)
                else:
                    nn.init.xavier_uniform_(gate, gain=input_gain * gain)
        if memory_steps is not None:
            _remember(network, memory_steps)
    return module


def _remember(network: nn.GRU | nn.LSTM, steps: int) -> None:
    """Lets each unit forget over a time of its own, up to ``steps`` steps."""
    for layer in range(network.num_layers):
        write, keep, *_ = getattr(network, f"bias_ih_l{layer}").detach().view(-1, network.hidden_size)
        nn.init.uniform_(keep, 1.0, float(steps)).log_()
        if isinstance(network, nn.LSTM):
            write.copy_(-keep)
