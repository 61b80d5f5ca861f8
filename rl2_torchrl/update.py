"""`PPOUpdate`: one collected batch in, several passes of minibatch steps over chunks of ``bptt`` steps, metrics out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import torch
from tensordict import NestedKey, TensorDictBase
from torch import nn
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.objectives import ClipPPOLoss

from rl2_torchrl.modules.actor_critic import hidden_keys
from rl2_torchrl.objectives.advantages import TrialAdvantage

__all__ = ["PPOUpdate", "linear_decay"]

#: A schedule: progress of the training, from 0 to 1, to a factor on the initial value.
Schedule = Callable[[float], float]


def linear_decay(progress: float) -> float:
    """From 1 at the start of training to 0 at its end.

    Examples:
        >>> linear_decay(0.25)
        0.75
    """
    return 1.0 - progress


class PPOUpdate:
    """The outer algorithm: PPO over truncated back-propagation through time (SPEC 4).

    A batch ``[B, T]`` is cut into chunks of ``bptt`` steps, each starting from the hidden state stored at its first step.
    ``bptt = 1`` is the original (no gradient through time); ``bptt = T`` with whole trials is the paper's full
    back-propagation. Chunks are drawn from TorchRL's replay buffer without replacement, ``minibatches`` a pass.

    Args:
        loss: `RL2PPOLoss`, or any loss with `ClipPPOLoss`'s entries. All entries of its output whose name begins
            with ``loss_`` are summed.
        advantage: computes advantages and returns of a batch. Default ``TrialAdvantage()``.
        bptt: steps of a chunk; must divide ``T``. None takes the whole of ``T``. Default None.
        epochs: passes over a batch. Default 10.
        minibatches: minibatches a pass. Default 4.
        shuffle: draw chunks in random order; False takes them in order, as the original does. Default True.
        lr: Adam's learning rate, with ``optimizer=None``. Default 1e-4.
        max_grad_norm: clip the gradient's norm at this; None does not. Default None.
        target_kl: stop the passes over a batch once one pass's mean of ``log pi_old - log pi`` exceeds this. Default None.
        lr_schedule: factor on the learning rate by the progress of training. Default constant.
        entropy_schedule: factor on the loss's ``entropy_coeff`` by the progress of training. Default constant.
        optimizer: an optimizer in place of Adam, over the loss's parameters.
        generator: generator of the shuffling.

    Raises:
        ValueError: ``bptt`` does not divide the batch's steps, an argument is out of range, or there is no memory entry.
        FloatingPointError: a loss or gradient is not finite.

    Examples:
        >>> from rl2_torchrl.modules import GRUCategoricalActor, GRUValueHead
        >>> from rl2_torchrl.objectives import RL2PPOLoss
        >>> update = PPOUpdate(RL2PPOLoss(GRUCategoricalActor(5, 3), GRUValueHead(5)), lr=1e-3, epochs=4, bptt=10)
    """

    def __init__(
        self,
        loss: ClipPPOLoss,
        advantage: TrialAdvantage | None = None,
        *,
        bptt: int | None = None,
        epochs: int = 10,
        minibatches: int = 4,
        shuffle: bool = True,
        lr: float = 1e-4,
        max_grad_norm: float | None = None,
        target_kl: float | None = None,
        lr_schedule: Schedule | None = None,
        entropy_schedule: Schedule | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        generator: torch.Generator | None = None,
    ):
        for name, count in (
            ("epochs", epochs),
            ("minibatches", minibatches),
            ("bptt", 1 if bptt is None else bptt),
        ):
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{name}={count!r} must be a whole number, at least 1.")
        if entropy_schedule is not None and not loss.entropy_bonus:
            raise ValueError("entropy_schedule has nothing to schedule: build the loss with entropy_bonus=True.")
        if not hidden_keys(loss.actor_network):
            raise ValueError(
                "the actor hands no hidden state on to its next step, so it cannot adapt within a trial: use a recurrent "
                f"actor such as GRUCategoricalActor. It reads {loss.actor_network.in_keys}."
            )
        self.loss = loss
        self.advantage = TrialAdvantage() if advantage is None else advantage
        self.bptt, self.epochs, self.minibatches, self.shuffle = bptt, epochs, minibatches, shuffle
        self.max_grad_norm, self.target_kl = max_grad_norm, target_kl
        self.optimizer = torch.optim.Adam(loss.parameters(), lr=lr) if optimizer is None else optimizer
        self.lr_schedule, self.entropy_schedule = lr_schedule, entropy_schedule
        self._initial_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self._initial_entropy_coeff = float(loss.entropy_coeff)
        self._generator = generator
        self._buffer: TensorDictReplayBuffer | None = None

    def __call__(self, batch: TensorDictBase, progress: float = 0.0) -> dict[str, float]:
        """Updates the networks on ``batch`` ``[B, T]``; ``progress`` in [0, 1] drives the schedules.

        Returns:
            Means over all minibatches of the loss's entries, of ``loss`` (their sum) and of ``grad_norm``, and the number
            of ``epochs`` made.
        """
        self._apply_schedules(progress)
        buffer = self._fill(self.chunks(self.advantage(batch)))
        totals: dict[str, list[torch.Tensor]] = defaultdict(list)
        for epoch in range(self.epochs):
            kls = []
            for number, minibatch in enumerate(buffer):
                metrics = self._step(minibatch, f"epoch {epoch}, minibatch {number}")
                kls.append(metrics["kl_approx"])
                for name, value in metrics.items():
                    totals[name].append(value)
            if self.target_kl is not None and torch.stack(kls).mean() > self.target_kl:
                break
        means = {name: torch.stack(values).mean().item() for name, values in totals.items()}
        return {**means, "epochs": epoch + 1, "lr": self.optimizer.param_groups[0]["lr"]}

    def chunks(self, batch: TensorDictBase) -> TensorDictBase:
        """Cuts ``batch`` ``[*B, T]`` into ``[num_chunks, bptt]``, with no more than the entries that the loss reads.

        Raises:
            ValueError: ``bptt`` does not divide ``T``.
            KeyError: the batch lacks an entry that the loss reads.
        """
        steps = batch.shape[-1]
        bptt = steps if self.bptt is None else self.bptt
        if steps % bptt:
            raise ValueError(
                f"bptt={bptt} does not divide the {steps} steps of a row: the last chunk would be short. Divisors of {steps}: "
                f"{[n for n in range(1, steps + 1) if steps % n == 0]}."
            )
        keys = self._keys_read()
        missing = [key for key in keys if key not in batch.keys(True, True)]
        if missing:
            raise KeyError(
                f"the batch lacks {missing}, which the loss reads. Hidden states and 'is_init' come from the collector: "
                "Collector(..., auto_register_policy_transforms=True) with a recurrent policy."
            )
        return batch.select(*keys).reshape(-1, steps // bptt, bptt).flatten(0, 1)

    def _keys_read(self) -> list[NestedKey]:
        loss, keys = self.loss, self.loss.tensor_keys
        read = dict.fromkeys(loss.actor_network.in_keys)
        if loss.critic_network is not None:
            # A critic on the actor's memory reads what the actor has just written.
            read.update(dict.fromkeys(k for k in loss.critic_network.in_keys if k not in loss.actor_network.out_keys))
        read.update(dict.fromkeys((keys.action, keys.sample_log_prob, keys.advantage, keys.value_target)))
        if loss.clip_value:
            read[keys.value] = None
        return list(read)

    def _fill(self, chunks: TensorDictBase) -> TensorDictReplayBuffer:
        # One buffer for the whole training: first touch of fresh memory costs more than the copy.
        if self._buffer is None or self._buffer.storage.max_size != len(chunks):
            self._buffer = TensorDictReplayBuffer(
                storage=LazyTensorStorage(len(chunks), device=chunks.device or "cpu"),
                sampler=SamplerWithoutReplacement(shuffle=self.shuffle),
                batch_size=math.ceil(len(chunks) / self.minibatches),
                generator=self._generator,
            )
        self._buffer.extend(chunks)
        return self._buffer

    def _step(self, minibatch: TensorDictBase, where: str) -> dict[str, torch.Tensor]:
        losses = self.loss(minibatch)
        terms = {name: value for name, value in losses.items() if name.startswith("loss_")}
        total = sum(terms.values())
        if not torch.isfinite(total):
            broken = {name: value.item() for name, value in terms.items()}
            raise FloatingPointError(
                f"the loss is not finite in {where}: {broken}. The networks were not changed by it."
            )
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = nn.utils.clip_grad_norm_(self.loss.parameters(), self.max_grad_norm or math.inf)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"the gradient is not finite in {where}, though the loss is ({total.item()}).")
        self.optimizer.step()
        diagnostics = {
            name: losses[name] for name in ("clip_fraction", "kl_approx", "entropy") if name in losses.keys()
        }
        return {
            name: value.detach() for name, value in {"loss": total, **terms, **diagnostics, "grad_norm": norm}.items()
        }

    def _apply_schedules(self, progress: float) -> None:
        if self.lr_schedule is not None:
            for group, lr in zip(self.optimizer.param_groups, self._initial_lrs, strict=True):
                group["lr"] = lr * self.lr_schedule(progress)
        if self.entropy_schedule is not None:
            self.loss.entropy_coeff.fill_(self._initial_entropy_coeff * self.entropy_schedule(progress))

    # ----------------------------------------------------------- checkpoints
    def state_dict(self) -> dict:
        """State of networks and optimizer."""
        return {"loss": self.loss.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` returned."""
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
