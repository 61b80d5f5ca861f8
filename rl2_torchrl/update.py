"""`PPOUpdate`: one collected batch in, several passes of minibatch steps over chunks of ``bptt`` steps, metrics out."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from statistics import fmean

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.data import LazyTensorStorage, SamplerWithoutReplacement, TensorDictReplayBuffer
from torchrl.objectives import ClipPPOLoss

from rl2_torchrl.modules.actor_critic import hidden_keys
from rl2_torchrl.modules.plain import NotPlainError
from rl2_torchrl.objectives.advantages import TrialAdvantage
from rl2_torchrl.objectives.compiled_pass import CompiledPass
from rl2_torchrl.objectives.direct import DirectGradients

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
    """The outer algorithm: PPO over truncated back-propagation through time.

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
        ValueError: ``bptt`` does not divide the batch's steps, an argument is out of range, there is no memory entry, or a
            batch without hidden states does not replay.
        TypeError: ``loss`` is no such loss.
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
        _check_arguments(loss, bptt, epochs, minibatches, max_grad_norm, target_kl, entropy_schedule)
        self.loss = loss
        self.advantage = TrialAdvantage() if advantage is None else advantage
        self.bptt, self.epochs, self.minibatches, self.shuffle = bptt, epochs, minibatches, shuffle
        self.max_grad_norm, self.target_kl = max_grad_norm, target_kl
        # One list: walking through the loss's modules for them costs more than Adam's step.
        self._parameters = list(loss.parameters())
        fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in self._parameters)
        self.optimizer = torch.optim.Adam(self._parameters, lr=lr, fused=fused) if optimizer is None else optimizer
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
        chunks = self.chunks(self.advantage(batch))
        from_zeros = not set(self._memory_keys()) <= set(batch.keys(True, True))
        self._fill(chunks)
        one_pass = self._choose_pass(from_zeros)
        totals: dict[str, list[float | torch.Tensor]] = defaultdict(list)
        for epoch in range(self.epochs):
            kls = []
            for metrics in one_pass(f"epoch {epoch}"):
                if from_zeros and not totals:
                    _require_replay(metrics["max_ratio"])
                kls.append(metrics["kl_approx"])
                for name, value in metrics.items():
                    totals[name].append(value)
            if self.target_kl is not None and _mean(kls) > self.target_kl:
                break
        means = {name: _mean(values) for name, values in totals.items()}
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
        starts = batch["is_init"].reshape(-1, steps // bptt, bptt)[..., 0] if "is_init" in batch.keys() else None
        memory = self._memory_keys() if starts is None or not starts.all() else []
        keys = [*self._keys_read(), *memory]
        missing = [key for key in keys if key not in batch.keys(True, True)]
        if missing:
            raise KeyError(
                f"the batch lacks {missing}, which the loss reads. Hidden states and 'is_init' come from the collector: "
                "Collector(..., auto_register_policy_transforms=True) with a recurrent policy. Chunks that begin inside a trial "
                "start from their hidden state: keep it (TrialCollector(keep=...)), or collect and update whole trials."
            )
        return batch.select(*keys).reshape(-1, steps // bptt, bptt).flatten(0, 1)

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries of a collected batch that an update reads, for ``TrialCollector(keep=...)``.

        Hidden states are among them only with ``bptt``: without, rows are whole trials, which start from zeros.
        """
        keys, made = self.loss.tensor_keys, (self.loss.tensor_keys.advantage, self.loss.tensor_keys.value_target)
        read = [key for key in self._keys_read() if key not in made]
        ends = [("next", key) for key in ("reward", "done", "terminated")]
        memory = [] if self.bptt is None else self._memory_keys()
        return list(dict.fromkeys((*read, keys.value, *ends, *memory)))

    def _networks(self) -> list[TensorDictModuleBase]:
        return [n for n in (self.loss.actor_network, self.loss.critic_network) if n is not None]

    def _memory_keys(self) -> list[NestedKey]:
        return list(dict.fromkeys(key for network in self._networks() for key in hidden_keys(network)))

    def _keys_read(self) -> list[NestedKey]:
        keys = self.loss.tensor_keys
        read, written = {}, set(self._memory_keys())
        for network in self._networks():
            # A critic on the actor's memory reads what the actor has just written.
            read.update(dict.fromkeys(key for key in network.in_keys if key not in written))
            written.update(network.out_keys)
        read.update(dict.fromkeys((keys.action, keys.sample_log_prob, keys.advantage, keys.value_target)))
        if self.loss.clip_value:
            read[keys.value] = None
        return list(read)

    def _fill(self, chunks: TensorDictBase) -> None:
        if len(chunks) < self.minibatches:
            raise ValueError(
                f"{self.minibatches} minibatches cannot be made of {len(chunks)} chunks of {chunks.shape[1]} steps: collect more "
                "trials in a batch, or ask for fewer minibatches."
            )
        # One buffer for the whole training: first touch of fresh memory costs more than the copy.
        layout = (len(chunks), set(chunks.keys(True, True)))
        if self._buffer is None or self._layout != layout:
            self._layout = layout
            self._buffer = TensorDictReplayBuffer(
                storage=LazyTensorStorage(len(chunks), device=self._parameters[0].device),
                sampler=SamplerWithoutReplacement(shuffle=self.shuffle),
                batch_size=math.ceil(len(chunks) / self.minibatches),
                generator=self._generator,
            )
        # The sampler's permutation of the last batch must not reach into this one.
        self._buffer.empty()
        self._buffer.extend(chunks)

    def _choose_pass(self, from_zeros: bool) -> Callable[[str], Iterator[dict[str, float | torch.Tensor]]]:
        """The fastest way that loss, networks and optimizer allow; chosen anew for every batch, as their options may change."""
        direct = self._direct_gradients()
        if direct is None:
            return self._autograd_pass
        try:
            compiled = self._compile(direct)
        except NotPlainError:
            return partial(self._direct_pass, direct)
        if from_zeros:
            _require_replay(compiled.max_ratio)
        return partial(self._compiled_pass, compiled)

    def _autograd_pass(self, where: str) -> Iterator[dict[str, torch.Tensor]]:
        for number, minibatch in enumerate(self._buffer):
            yield self._step(minibatch, None, f"{where}, minibatch {number}")

    def _direct_pass(self, direct: DirectGradients, where: str) -> Iterator[dict[str, float]]:
        for number, minibatch in enumerate(self._plain_minibatches()):
            yield self._step(minibatch, direct, f"{where}, minibatch {number}")

    def _compiled_pass(self, compiled: CompiledPass, where: str) -> Iterator[dict[str, float]]:
        for number, metrics in enumerate(compiled.run(torch.cat(list(self._indices())))):
            if not math.isfinite(metrics["grad_norm"]):
                terms = {name: value for name, value in metrics.items() if name.startswith("loss_")}
                _raise_not_finite(terms, metrics["loss"], f"{where}, minibatch {number}")
            yield metrics

    def _compile(self, direct: DirectGradients) -> CompiledPass:
        chunks = self._buffer.storage[:]
        entries = {key: chunks.get(key) for key in chunks.keys(True, True)}
        return CompiledPass(direct, self.optimizer, entries, self._buffer.batch_size, self.max_grad_norm)

    def _indices(self) -> Iterator[torch.Tensor]:
        """One pass over the buffer, as iterating over it makes: the chunks of each minibatch."""
        sampler, size = self._buffer.sampler, self._buffer.batch_size
        sampler.ran_out = False
        while not sampler.ran_out:
            yield sampler.sample(self._buffer.storage, size)[0]

    def _plain_minibatches(self) -> Iterator[dict[NestedKey, torch.Tensor]]:
        """One pass over the buffer, without a TensorDict a minibatch."""
        chunks = self._buffer.storage[:]
        names, entries = zip(*((key, chunks.get(key)) for key in chunks.keys(True, True)), strict=True)
        for index in self._indices():
            yield dict(zip(names, (entry.index_select(0, index) for entry in entries), strict=True))

    def _direct_gradients(self) -> DirectGradients | None:
        """Gradients without autograd, where loss and networks allow it."""
        try:
            return DirectGradients(self.loss)
        except NotPlainError:
            return None

    def _step(self, minibatch, direct: DirectGradients | None, where: str) -> dict[str, float | torch.Tensor]:
        """One optimizer step; ``minibatch`` is a TensorDict ``[N, T]``, or with ``direct`` its entries."""
        if direct is not None:
            try:
                return self._direct_step(minibatch, direct, where)
            except NotPlainError:
                minibatch = TensorDict(minibatch, next(iter(minibatch.values())).shape[:2])
        return self._autograd_step(minibatch, where)

    def _direct_step(self, minibatch: dict, direct: DirectGradients, where: str) -> dict[str, float]:
        losses = direct(minibatch)
        terms = {name: value for name, value in losses.items() if name.startswith("loss_")}
        total, norm = sum(terms.values()), direct.norm()
        if not math.isfinite(norm):
            _raise_not_finite(terms, total, where)
        if self.max_grad_norm is not None and norm > self.max_grad_norm:
            direct.scale(self.max_grad_norm / (norm + 1e-6))  # as clip_grad_norm_ does
        self.optimizer.step()
        return {"loss": total, **losses, "grad_norm": norm}

    def _autograd_step(self, minibatch: TensorDictBase, where: str) -> dict[str, torch.Tensor]:
        losses = self.loss(minibatch)
        terms = {name: value for name, value in losses.items() if name.startswith("loss_")}
        total = sum(terms.values())
        for parameter in self._parameters:
            parameter.grad = None
        total.backward()
        norm = nn.utils.clip_grad_norm_(self._parameters, self.max_grad_norm or math.inf)
        if not torch.isfinite(norm):
            _raise_not_finite({name: value.item() for name, value in terms.items()}, total.item(), where)
        self.optimizer.step()
        diagnostics = {
            name: losses[name]
            for name in ("clip_fraction", "kl_approx", "max_ratio", "entropy")
            if name in losses.keys()
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
        """State of networks, optimizer and, if there is one, the shuffling's generator."""
        generator = None if self._generator is None else self._generator.get_state()
        return {"loss": self.loss.state_dict(), "optimizer": self.optimizer.state_dict(), "generator": generator}

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` returned."""
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self._generator is not None:
            self._generator.set_state(state["generator"])


def _check_arguments(loss, bptt, epochs, minibatches, max_grad_norm, target_kl, entropy_schedule) -> None:
    if not hasattr(loss, "actor_network"):
        raise TypeError(f"PPOUpdate trains a loss such as RL2PPOLoss(actor, critic), not a {type(loss).__name__}.")
    for name, count in (("epochs", epochs), ("minibatches", minibatches), ("bptt", 1 if bptt is None else bptt)):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"{name}={count!r} must be a whole number, at least 1.")
    for name, bound in (("max_grad_norm", max_grad_norm), ("target_kl", target_kl)):
        if bound is not None and bound <= 0:
            raise ValueError(f"{name}={bound} would stop all learning: it must be positive, or None for no bound.")
    if entropy_schedule is not None and not loss.entropy_bonus:
        raise ValueError("entropy_schedule has nothing to schedule: build the loss with entropy_bonus=True.")
    if not hidden_keys(loss.actor_network):
        raise ValueError(
            "the actor hands no hidden state on to its next step, so it cannot adapt within a trial: use a recurrent "
            f"actor such as GRUCategoricalActor. It reads {loss.actor_network.in_keys}."
        )


def _mean(values: list[float | torch.Tensor]) -> float:
    return torch.stack(values).mean().item() if isinstance(values[0], torch.Tensor) else fmean(values)


def _raise_not_finite(terms: dict[str, float], total: float, where: str) -> None:
    if math.isfinite(total):
        raise FloatingPointError(f"the gradient is not finite in {where}, though the loss is ({total}).")
    raise FloatingPointError(f"the loss is not finite in {where}: {terms}. The networks were not changed by it.")


def _require_replay(max_ratio: float | torch.Tensor) -> None:
    """Before the first step the networks must give the collected log-probabilities back: all ratios are 1."""
    if max_ratio > 1.01:
        raise ValueError(
            f"without hidden states in the batch, replaying its trials from zeros gives other log-probabilities than were "
            f"collected (ratios up to {float(max_ratio):.3g}): the memory was lost while collecting, or the networks have changed "
            "since. Collect with auto_register_policy_transforms=True (TrialCollector's default), which primes the memory."
        )
