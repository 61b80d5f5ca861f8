"""`NetworkProbe`: what a loss's networks give on parts of a batch, and on what that depends."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from tensordict import NestedKey, TensorDictBase
from torch import nn
from torchrl.modules import set_recurrent_mode

from rl2_torchrl.modules.actor_critic import hidden_keys
from rl2_torchrl.seeding import random_numbers_put_back
from rl2_torchrl.trial import outermost

__all__ = ["NetworkProbe"]

LOG_PROB, VALUE = ("probe", "log_prob"), ("probe", "value")


class NetworkProbe:
    """A loss and its networks, run in recurrent mode as an update runs them.

    Args:
        loss: a loss with ``actor_network``, ``critic_network`` (or None) and ``tensor_keys``, as `RL2PPOLoss`; a copy, where no
            trace may be left in buffers.

    Examples:
        >>> from rl2_torchrl import GRUCategoricalActor, GRUValueHead, RL2PPOLoss
        >>> probe = NetworkProbe(RL2PPOLoss(GRUCategoricalActor(5, 3), GRUValueHead(5)))
        >>> probe.memory, probe.observed
        (['actor_hidden', 'critic_hidden'], ['trans'])
    """

    def __init__(self, loss: nn.Module):
        self.loss = loss
        self.actor, self.critic = loss.actor_network, getattr(loss, "critic_network", None)
        self.networks = [network for network in (self.actor, self.critic) if network is not None]
        #: Entries of the memory, and what the networks read beside it, of which the actor's own.
        self.memory = list(dict.fromkeys(key for network in self.networks for key in hidden_keys(network)))
        # What the critic is given, if there is one; the actor may read an entry, and write another under its name.
        given = [key for key in self.networks[-1].in_keys if key not in self.actor.out_keys]
        read = dict.fromkeys([*self.actor.in_keys, *given])
        self.inputs = [key for key in read if key not in (*self.memory, "is_init")]
        self.observed = [key for key in self.actor.in_keys if key in self.inputs]

    def run(self, data: TensorDictBase) -> dict[NestedKey, torch.Tensor]:
        """All that the networks write for sequences ``[N, T]``, the log-probability and the value by names of their own."""
        data, keys = self.inputs_of(data), self.loss.tensor_keys
        with set_recurrent_mode(True), self._weights("actor"):
            action = data.get(keys.action, None)  # before a module gives one itself
            distribution = self.actor.get_dist(data)
            out = {} if action is None else {LOG_PROB: distribution.log_prob(action)}
        with set_recurrent_mode(True), self._weights("critic"):
            if self.critic is not None:
                out[VALUE] = self.critic(data).get(keys.value)
        given = (keys.action, keys.sample_log_prob)
        written = {
            key for network in self.networks for key in network.out_keys if key not in given and key[0] != "next"
        }
        entries = {key: data.get(key, None) for key in written}
        return out | {k: v for k, v in entries.items() if v is not None and v.is_floating_point()}

    @torch.no_grad()
    def step(self, data: TensorDictBase) -> TensorDictBase:
        """Writes into ``data`` ``[*B]`` all that the networks write in one step; random numbers are put back."""
        with set_recurrent_mode(False), random_numbers_put_back():
            for name, network in (("actor", self.actor), ("critic", self.critic)):
                with self._weights(name):
                    data = data if network is None else network(data)
        return data

    @torch.no_grad()
    def influence(self, windows: TensorDictBase) -> dict[NestedKey, torch.Tensor]:
        """Whether another input at the first step changes what is written at the second: ``[N]`` for each entry."""
        changed, generator = windows.copy(), torch.Generator().manual_seed(0)
        for key in self.real_inputs(windows):
            entry = windows.get(key).clone()
            entry[:, 0] += torch.randn(entry[:, 0].shape, generator=generator).to(entry)
            changed.set(key, entry)
        before, after = self.run(windows), self.run(changed)
        differs = {key: before[key][:, 1] != after[key][:, 1] for key in self._in_time(before)}
        return {key: entry.reshape(len(windows), -1).any(1) for key, entry in differs.items()}

    @torch.no_grad()
    def heeds(self, windows: TensorDictBase, key: NestedKey, columns: slice) -> bool:
        """Whether other numbers in ``columns`` of the input ``key`` change anything that the actor writes."""
        entry, generator = windows.get(key).clone(), torch.Generator().manual_seed(0)
        part = entry[..., columns]
        # Of the part's own size, or a network that normalises could round it off.
        noise = (1 + part.abs().max().item()) * torch.randn(part.shape, generator=generator)
        entry[..., columns] = part + noise.to(part)
        before, after = self.run(windows), self.run(windows.copy().set(key, entry))
        written = [k for k in self._in_time(before) if k in (LOG_PROB, *self.actor.out_keys)]
        return any((before[k] != after[k]).any() for k in written)

    def reaches_back(self, windows: TensorDictBase) -> bool:
        """Whether what the actor writes at the second step has a gradient by its inputs at the first."""
        data = windows.copy()
        inputs = [windows.get(key).detach().clone().requires_grad_() for key in self.real_inputs(windows)]
        for key, entry in zip(self.real_inputs(windows), inputs, strict=True):
            data.set(key, entry)
        out = self.run(data)
        written = [out[key][:, 1] for key in self._in_time(out) if key in self.actor.out_keys]
        total = sum(entry.square().sum() for entry in written if entry.requires_grad)
        if not isinstance(total, torch.Tensor):
            return False
        gradients = torch.autograd.grad(total, inputs, allow_unused=True)
        return any(gradient is not None and bool(gradient[:, 0].any()) for gradient in gradients)

    def gradients(self, losses: TensorDictBase) -> dict[str, torch.Tensor | None]:
        """Gradients of the sum of ``losses``, by the names of the trainable parameters."""
        parameters = {name: p for name, p in self.loss.named_parameters() if p.requires_grad}
        total = sum(losses[name] for name in losses.keys() if name.startswith("loss_"))
        if not (parameters and total.requires_grad):
            return dict.fromkeys(parameters)
        return dict(zip(parameters, torch.autograd.grad(total, parameters.values(), allow_unused=True), strict=True))

    def inputs_of(self, rows: TensorDictBase) -> TensorDictBase:
        """Of ``rows`` what the networks read, and the actions."""
        keys = (*self.inputs, *self.memory, "is_init", self.loss.tensor_keys.action)
        return rows.select(*outermost(keys), strict=False)

    def real_inputs(self, data: TensorDictBase) -> list[NestedKey]:
        """What the actor reads of ``data`` in real numbers, which can be changed a little."""
        return [k for k in self.observed if (entry := data.get(k, None)) is not None and entry.is_floating_point()]

    def _in_time(self, out: dict[NestedKey, torch.Tensor]) -> list[NestedKey]:
        # What was written in time: an entry without it, such as a scale for all steps, tells of no step.
        return [key for key, entry in out.items() if entry.ndim >= 2 and entry.shape[1] == 2]

    def _weights(self, name: str):
        """With a functional loss the weights lie beside the networks."""
        network, weights = getattr(self, name), getattr(self.loss, f"{name}_network_params", None)
        functional = getattr(self.loss, "functional", False) and network is not None and weights is not None
        return weights.to_module(network) if functional else nullcontext()
