"""`PPOUpdate`: one collected batch in, several passes of minibatch steps over chunks of ``bptt`` steps, metrics out."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable
from copy import deepcopy
from statistics import fmean
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from tensordict.utils import unravel_key
from torch import nn
from torch.distributed import ProcessGroup
from torchrl.modules import GRUModule, LSTMModule
from torchrl.objectives import ClipPPOLoss, PPOLoss

from rl2_torchrl.arguments import kind_of, noted, require_flags, require_generator, require_numbers, whole
from rl2_torchrl.gradients.program import Values
from rl2_torchrl.kernels.workspace import keep_freed_memory
from rl2_torchrl.learners import Learners
from rl2_torchrl.minibatches import Minibatches, beside, require_trials, split_rows
from rl2_torchrl.modules.actor_critic import hidden_keys
from rl2_torchrl.modules.cores import RecurrentCore
from rl2_torchrl.modules.normalization import RunningNorm
from rl2_torchrl.objectives.advantages import TrialAdvantage, advantages_of, require_rows_whole
from rl2_torchrl.passes import Passes
from rl2_torchrl.seeding import on_device
from rl2_torchrl.trial import outermost

__all__ = ["PPOUpdate", "linear_decay"]

log = logging.getLogger(__name__)

#: A schedule: progress of the training, from 0 to 1, to a factor on the initial value.
Schedule = Callable[[float], float]

#: No learning rate or entropy coefficient above this is taken for one, nor a schedule that rises above it for values of them.
_SMALL = 0.05


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
    back-propagation. Chunks are drawn without replacement, at most ``minibatches`` a pass.

    Args:
        loss: `RL2PPOLoss`, or any loss with `ClipPPOLoss`'s entries. All entries of its output whose name begins
            with ``loss_`` are summed, all scalars reach the log. It is given what its ``in_keys`` name: add there what a forward of
            your own reads beside that, ``loss.in_keys = [*loss.in_keys, "task"]``.
        advantage: computes advantages and returns of a batch. Default ``TrialAdvantage()``. Checkpoints hold its ``state_dict``,
            if it has one. Its ``in_keys``, if it has some, name what it reads, and are among the update's.
        bptt: steps of a chunk; must divide ``T``. None, the default, takes the whole of ``T``.
        epochs, minibatches: passes over a batch, and minibatches a pass, at most: each has ``ceil(chunks / minibatches)`` chunks,
            so that of 33 chunks there are 17 where 32 were asked for. Default 10 and 4.
        shuffle: draw chunks in random order; False takes them in order, as the original does. Default True.
        lr: learning rate of Adam. Default 1e-4. An ``optimizer`` has its own.
        max_grad_norm: clip the norm of the loss's whole gradient at this, whichever part of it the optimizer holds. Default None.
        target_kl: stop the passes over a batch once one pass's mean of ``log pi_old - log pi`` exceeds this. Default None.
        lr_schedule, entropy_schedule: factors on the learning rate, and on the loss's ``entropy_coeff``, by the progress of
            training. Default constant.
        optimizer: an optimizer in place of Adam, over parameters of the loss.
        generator: generator of the shuffling.
        backend: how gradients are made. ``"parts"``: part by part, by kernels where a part brings its own gradient
            (`rl2_torchrl.gradients`), beside which one of your own costs no more than itself; what kernels do from one to the next
            is one call, and a whole pass where there is none. ``"autograd"``: by PyTorch through ``loss.forward``. ``"graph"``: the
            same, recorded once as a CUDA graph, of which there is none on a CPU. ``"auto"``, the default: on CUDA a graph, else
            parts; autograd where they do not serve. One that is named raises where it cannot.
        process_group: processes that update together (data parallel), such as ``torch.distributed.group.WORLD``, each with a
            collector of its own. Default: this process alone.

    With a ``process_group`` each process's batch is a part of the joint one, and all do what one process would with that
    (`rl2_torchrl.learners`). All begin with the networks of the first. The joint batch must fit into each process's memory, and
    terms of the loss must be means over a minibatch.

    Within `torch.autocast` an update leaves it off, as kernels do, and so does `train`: networks compute in the dtype of their
    parameters, ``dtype=torch.bfloat16`` say. A loop of your own collects without it, or ratios do not begin at 1.

    Networks that normalise their inputs (`RunningNorm`) are told of each batch when its update is over; of the first one, before
    which they know nothing, nothing else is learnt.

    Raises:
        ValueError: an argument is out of range, or does not fit the batch or the loss; a batch without hidden states does not
            replay, rows are no trials, processes' batches or networks differ, or the ``backend`` named cannot serve.
        TypeError: an argument is of another kind than it must be.
        FloatingPointError: a loss or gradient is not finite.

    Examples:
        >>> from rl2_torchrl import GRUCategoricalActor, GRUValueHead, RL2PPOLoss
        >>> update = PPOUpdate(RL2PPOLoss(GRUCategoricalActor(5, 3), GRUValueHead(5)), lr=1e-3, epochs=4, bptt=10)
        >>> update.backend  # and update.reason says why
        'parts'
    """

    def __init__(
        self,
        loss: ClipPPOLoss,
        advantage: Callable[[TensorDictBase], TensorDictBase] | None = None,
        *,
        bptt: int | None = None,
        epochs: int = 10,
        minibatches: int = 4,
        shuffle: bool = True,
        lr: float | None = None,
        max_grad_norm: float | None = None,
        target_kl: float | None = None,
        lr_schedule: Schedule | None = None,
        entropy_schedule: Schedule | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        generator: torch.Generator | None = None,
        backend: Literal["auto", "parts", "autograd", "graph"] = "auto",
        process_group: ProcessGroup | None = None,
    ):
        _check_loss(loss, entropy_schedule)
        _require_objects(advantage=advantage, optimizer=optimizer, lr_schedule=lr_schedule)
        if process_group is not None and loss.normalize_advantage:
            raise ValueError(
                "the loss normalises advantages by what it sees of a minibatch (normalize_advantage=True), which with "
                "process_group= is a part of it: leave that to TrialAdvantage(normalize=True), which sees the joint batch."
            )
        require_flags(shuffle=shuffle)
        require_numbers(lr=lr, max_grad_norm=max_grad_norm, target_kl=target_kl)
        require_generator(generator)
        self.loss = loss
        self.normalizations()
        self.advantage = TrialAdvantage() if advantage is None else advantage
        require_rows_whole(self.advantage)
        self.stand_in = _stand_in(self.advantage, loss)
        self.bptt, self.shuffle = None if bptt is None else whole("bptt", bptt), shuffle
        self.epochs, self.minibatches = whole("epochs", epochs), whole("minibatches", minibatches)
        self.max_grad_norm, self.target_kl = _bound("max_grad_norm", max_grad_norm), _bound("target_kl", target_kl)
        # One list: walking through the loss's modules for them costs more than Adam's step.
        self._parameters = list(loss.parameters())
        self.optimizer = _optimizer(optimizer, lr, self._parameters)
        self.lr_schedule, self.entropy_schedule = lr_schedule, entropy_schedule
        self._given_of = None
        self._given_trained = self._trained()
        self.given_coefficients = {name: float(b) for name, b in loss.named_buffers(recurse=False) if b.numel() == 1}
        largest_lr = max(float(given["lr"]) for given in self.given_options)
        _require_factors("lr_schedule", lr_schedule, "lr" if optimizer is None else "the optimizer's lr", largest_lr)
        entropy_coeff = self.given_coefficients.get("entropy_coeff", 0.0)
        _require_factors("entropy_schedule", entropy_schedule, "entropy_coeff", entropy_coeff)
        self._learners = Learners(process_group)
        device = self._parameters[0].device
        self._generator = generator = on_device(self._learners.begin_alike(loss, generator), device)
        self._minibatches = Minibatches(device=device, generator=generator, learners=self._learners)
        self._passes = Passes(loss, self._minibatches, backend, self.optimizer)
        keep_freed_memory()

    @torch.compiler.disable  # which has nothing to gain here; the networks themselves may be compiled
    def __call__(self, batch: TensorDictBase, progress: float = 0.0) -> dict[str, float]:
        """Updates the networks on ``batch`` ``[B, T]``; ``progress`` in [0, 1] drives the schedules.

        Returns:
            Means over all minibatches of the loss's entries, of those named ``max_...`` the largest, of ``loss`` (their sum) and of
            ``grad_norm``, the number of ``epochs`` made and ``lr``, the first group's where the optimizer has several. While a
            normalisation knows no data (``normalize=True``, the first batch) it is told of ``batch``, and that is all: ``epochs``
            is 0, and there are no means.
        """
        with torch.autocast(self._parameters[0].device.type, enabled=False):
            return self._update(batch, progress)

    def _update(self, batch: TensorDictBase, progress: float) -> dict[str, float]:
        batch = beside(self.loss, batch)
        require_trials(batch)
        self._require_own_parameters()
        batch = self._learners.gather(batch, self._parameters)
        self._apply_schedules(progress)
        norms = self.normalizations()
        if any(norm.count == 0 for norm, _ in norms):
            self._minibatches.require(split_rows(batch.select(), self.bptt).shape, self.minibatches)
            return self._measure(norms, batch)
        self._minibatches.fill(self.chunks(self.with_advantages(batch)), self.minibatches, shuffle=self.shuffle)
        has_memory = set(self._memory_keys()) <= set(batch.keys(True, True))
        checks = [] if has_memory else [self._passes.require_replay]
        totals: dict[str, list[float | torch.Tensor]] = defaultdict(list)
        with self._passes.over_batch(self.optimizer, self.max_grad_norm, self.epochs, checks) as one_pass:
            for epoch in range(self.epochs):
                kls = []
                for number, metrics in enumerate(one_pass()):
                    self._require_finite(metrics, f"epoch {epoch}, minibatch {number}")
                    if self.target_kl is not None:
                        kls.append(metrics["kl_approx"])
                    for name, value in metrics.items():
                        totals[name].append(value)
                if self.target_kl is not None and _mean(kls) > self.target_kl:
                    break
        means = {name: (_largest if name.startswith("max_") else _mean)(values) for name, values in totals.items()}
        self._require_finite(means, f"one of {len(totals['loss'])} minibatches, whose means these are")
        self._measure(norms, batch)
        return {**means, "epochs": epoch + 1, "lr": self.optimizer.param_groups[0]["lr"]}

    def _require_finite(self, metrics: Values, where: str) -> None:
        """FloatingPointError where loss or gradient is not finite."""
        total, is_step = metrics["loss"], math.isfinite(metrics["grad_norm"])
        # A tensor waits for the means: to ask for each would be one more wait for a device.
        if is_step and (isinstance(total, torch.Tensor) or math.isfinite(total)):
            return
        total = float(total)
        if math.isfinite(total):
            raise FloatingPointError(f"the gradient is not finite in {where}, though the loss is ({total}).")
        terms = {name: float(value) for name, value in metrics.items() if name.startswith("loss_")}
        changed = "were changed" if is_step else "were not changed"
        raise FloatingPointError(f"the loss is not finite in {where}: {terms}. The networks {changed} by it.")

    def normalizations(self) -> list[tuple[RunningNorm, NestedKey]]:
        """The normalisations in the networks, each once, and the entries of a batch that they read.

        Raises:
            ValueError: one reads something else, or stands in a loss term: no batch could tell it of that.
        """
        networks, terms = self._networks(), getattr(self.loss, "terms", ())
        norms = {id(m) for each in (*networks, *terms) for m in each.modules() if isinstance(m, RunningNorm)}
        found = {}
        for network in networks:
            for module in network.modules():
                if isinstance(module, TensorDictModule) and isinstance(module.module, RunningNorm):
                    key = unravel_key(module.in_keys[0])
                    if key in map(unravel_key, network.in_keys):
                        found[id(module.module)] = (module.module, key)
        if len(found) < len(norms):
            raise ValueError(
                "a RunningNorm stands within another module or a loss term, or reads what one has made: no batch would tell it its "
                "statistics, and it would change nothing. Make it a module of its own that reads an entry of the env, "
                "normalize=True of the actor or critic, or TensorDictModule(RunningNorm(n), [key], [new_key]) before the encoder."
            )
        return list(found.values())

    def _measure(self, norms: list[tuple[RunningNorm, NestedKey]], batch: TensorDictBase) -> dict[str, float]:
        """Tells the networks' normalisations of ``batch``: only now, so that the ratios of its update begin at 1."""
        for norm, key in norms:
            norm.update_statistics(batch[key])
        return {"epochs": 0, "lr": self.optimizer.param_groups[0]["lr"]}

    # ---------------------------------------------------------------- entries
    def with_advantages(self, batch: TensorDictBase) -> TensorDictBase:
        """``batch``, into which ``advantage`` writes; without a critic it asks the loss's networks beyond trials that are cut."""
        return advantages_of(self.advantage, self.stand_in, batch)

    def chunks(self, batch: TensorDictBase) -> TensorDictBase:
        """Cuts ``batch`` ``[*B, T]`` into ``[num_chunks, bptt]``, with no more than the entries that the loss reads.

        Raises:
            ValueError: ``bptt`` does not divide ``T``.
            KeyError: the batch lacks an entry that the loss reads.
        """
        starts = split_rows(batch.select("is_init", strict=False), self.bptt).get("is_init", None)
        are_whole = starts is not None and bool(starts[:, 0].all())
        memory = self._starting_keys() if are_whole else self._memory_keys()
        keys, there = list(dict.fromkeys([*self._keys_read(), *memory])), batch.keys(True, True)
        if missing := [key for key in keys if key not in there]:
            raise KeyError(
                f"the batch lacks {missing}, which the loss reads. Advantages come from advantage=, hidden states and 'is_init' "
                "from the collector: Collector(..., auto_register_policy_transforms=True) with a recurrent policy. Chunks that "
                "begin inside a trial start from their hidden state, which "
                f"PPOUpdate(..., bptt={self.bptt or batch.shape[-1]}).in_keys has, for TrialCollector(keep=...): keep it (or all, "
                "keep=None), or collect and update whole trials, if all have one length."
            )
        return split_rows(batch.select(*outermost(keys)), self.bptt)

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries of a collected batch that an update reads, for ``TrialCollector(keep=...)``: loss, terms and advantage.

        `keys_at_cuts` are among them only with ``bptt``: without, rows are whole trials, which start from what the core begins with
        and end with the batch. Where trials may differ in length, give ``bptt``, of a whole row if you like.
        """
        keys = self.loss.tensor_keys
        read = [key for key in self._keys_read() if key not in (keys.advantage, keys.value_target)]
        read += getattr(self.advantage, "in_keys", [] if self.loss.critic_network is None else [keys.value])
        read += [("next", key) for key in ("reward", "done", "terminated")]
        read += self._starting_keys()
        return list(dict.fromkeys(read if self.bptt is None else [*read, *self.keys_at_cuts]))

    @property
    def keys_at_cuts(self) -> list[NestedKey]:
        """What an update reads where a batch cuts a trial: hidden states, and what the critic reads beyond the cut."""
        beyond = [] if self.stand_in is None else [key for key in self.stand_in.in_keys if key != "is_init"]
        return [*self._memory_keys(), *(unravel_key(("next", key)) for key in beyond)]

    def _memory_keys(self) -> list[NestedKey]:
        return list(dict.fromkeys(key for network in self._networks() for key in hidden_keys(network)))

    def _starting_keys(self) -> list[NestedKey]:
        """Memories that whole trials need too: what they begin with is known of cores, and else stored alone."""
        modules = [module for network in self._networks() for module in network.modules()]
        cores = [module for module in modules if isinstance(module, RecurrentCore | GRUModule | LSTMModule)]
        known = {key for core in cores for key in hidden_keys(core)}
        return [key for key in self._memory_keys() if key not in known]

    def _networks(self) -> list[nn.Module]:
        return [n for n in (self.loss.actor_network, self.loss.critic_network) if n is not None]

    def _keys_read(self) -> list[NestedKey]:
        loss, keys = self.loss, self.loss.tensor_keys
        read = [keys.action, keys.sample_log_prob, keys.advantage]
        read += [] if loss.critic_network is None else [keys.value_target]
        memory, written = set(self._memory_keys()), set()
        for network in self._networks():
            # A critic on the actor's memory reads what the actor has just written.
            read += [key for key in network.in_keys if key not in written | memory]
            written.update(key for key in network.out_keys if key[0] != "next")
        read += [key for term in getattr(loss, "terms", ()) for key in term.in_keys if key not in written]
        # ClipPPOLoss lists what its value estimator reads, too, whose work the advantage does here.
        following = (keys.reward, keys.done, keys.terminated, *(key for n in self._networks() for key in n.in_keys))
        estimators = {*memory, *(unravel_key(("next", key)) for key in following)}
        between = written.intersection(key for network in self._networks() for key in network.in_keys)
        # As they were set: what stands there twice somebody has added, who reads it.
        given = PPOLoss.in_keys.fget(loss) if isinstance(loss, PPOLoss) else loss.in_keys
        read += [key for key in loss.in_keys if key not in between | estimators or given.count(key) > 1]
        read = [key for key in read if key[0] != "policy"]
        return list(dict.fromkeys([*read, keys.value] if loss.clip_value else read))

    # ----------------------------------------------------------------- passes
    @property
    def backend(self) -> str:
        """The way that was taken last to the gradients, or will be, as far as that is known before a batch."""
        return self._passes.backend

    @property
    def reason(self) -> str:
        """Why it is that one."""
        return self._passes.reason

    @property
    def processes(self) -> int:
        """How many processes take its steps together."""
        return self._learners.size

    def everyones(self, value: Any) -> list:
        """``value`` of each process of the group, alone this one's; all of them must ask at the same time."""
        return self._learners.everyones(value)

    def _require_own_parameters(self) -> None:
        """RuntimeError where others have taken the place of those that the optimizer was given: nothing would be learnt."""
        # Whatever their order, since pruning hangs a parameter up anew; and with others, which users have told the optimizer of.
        if not set(map(id, self._parameters)) <= set(map(id, self.loss.parameters())):
            raise RuntimeError(
                "parameters of the loss are others than when this update was made (load_state_dict(assign=True), an nn.Parameter "
                "in the place of one?), and its optimizer holds the old ones: copy numbers into those that are there, or make a "
                "new PPOUpdate."
            )
        if self._parameters[0].device != self._minibatches.device:
            raise RuntimeError(
                f"the networks are on {self._parameters[0].device}, and were on {self._minibatches.device} when this update was "
                "made: make PPOUpdate(loss) once they are where they shall be."
            )

    def _apply_schedules(self, progress: float) -> None:
        given_options = self.given_options  # before one that is new is moved
        if self.lr_schedule is not None:
            for group, given in zip(self.optimizer.param_groups, given_options, strict=True):
                group["lr"] = given["lr"] * _factor("lr_schedule", self.lr_schedule, progress)
        if self.entropy_schedule is not None:
            factor = _factor("entropy_schedule", self.entropy_schedule, progress)
            self.loss.entropy_coeff.fill_(self.given_coefficients["entropy_coeff"] * factor)

    @property
    def given_options(self) -> list[dict[str, Any]]:
        """The options of the optimizer's groups as they were given, before schedules moved them; of those that came later, too."""
        if self._given_of is not self.optimizer:  # the first one, or one that was put in its place
            self._given_of, self._given_options = self.optimizer, []
        new = self.optimizer.param_groups[len(self._given_options) :]
        # Copies: schedules and users move a learning rate that is a tensor in place.
        self._given_options += [deepcopy({**group, "params": None}) for group in new]
        return self._given_options

    def _trained(self) -> list[str]:
        """Names of the parameters that get a gradient."""
        return [name for name, parameter in self.loss.named_parameters() if parameter.requires_grad]

    def _scheduled(self) -> set[str]:
        """What schedules move."""
        schedules = {"lr": self.lr_schedule, "entropy_coeff": self.entropy_schedule}
        return {name for name, schedule in schedules.items() if schedule is not None}

    # ----------------------------------------------------------- checkpoints
    def state_dict(self) -> dict:
        """State of networks, optimizer and, if there is one, the shuffling's generator; and the numbers that were given."""
        generator = None if self._generator is None else self._generator.get_state()
        state = {"loss": self.loss.state_dict(), "optimizer": self.optimizer.state_dict(), "generator": generator}
        state |= {"given_options": self.given_options, "given_coefficients": self.given_coefficients}
        state["scheduled"] = sorted(self._scheduled())
        state["trained"] = {"given": self._given_trained, "now": self._trained()}
        own = self.advantage.state_dict() if hasattr(self.advantage, "state_dict") else {}
        return {**state, "advantage": own} if own else state

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` returned; ValueError where it is that of another kind of optimizer.

        Learning rate and other options of the optimizer, and the loss's coefficients, are the saved ones, but for those that this
        update was given another number for, and those that a schedule has moved then and none moves now: they are as given. So
        are parameters frozen or trained (``requires_grad``), unless this update was given others frozen than the saved one.
        """
        own, other = (set(s["param_groups"][0]) for s in (self.optimizer.state_dict(), state["optimizer"]))
        if own != other:
            raise ValueError(
                f"the state is that of another optimizer than this {type(self.optimizer).__name__}: options {sorted(own ^ other)} "
                "are only in one of them. Go on with the optimizer that the run began with."
            )
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(deepcopy(state["optimizer"]))  # or both updates would step the same averages
        groups = zip(self.optimizer.param_groups, self.given_options, state["given_options"], strict=True)
        freed = set(state["scheduled"]) - self._scheduled()
        for group, given, then in groups:
            asked = {name: value for name, value in given.items() if value != then[name] or name in freed}
            group.update(deepcopy(asked))
        for name, value in self.given_coefficients.items():
            if value != state["given_coefficients"][name] or name in freed:
                getattr(self.loss, name).fill_(value)
        if state["trained"]["given"] == self._given_trained:
            for name, parameter in self.loss.named_parameters():
                parameter.requires_grad_(name in state["trained"]["now"])
        if "advantage" in state:
            self.advantage.load_state_dict(state["advantage"])
        if self._generator is not None and state["generator"] is not None:
            self._generator.set_state(state["generator"])


def _stand_in(advantage: Callable, loss: ClipPPOLoss) -> TensorDictModuleBase | None:
    """The loss's networks, for an ``advantage`` without a critic: what the critic reads of the actor, and the critic."""
    critic = getattr(loss, "critic_network", None)
    if not isinstance(advantage, TrialAdvantage) or advantage.critic is not None or critic is None or loss.functional:
        return None
    with noted(
        f"The critic writes {critic.out_keys}, the advantage reads {advantage.value_key!r}, and the loss "
        f"{loss.tensor_keys.value!r}: name them the same, TrialAdvantage(value_key=...), loss.set_keys(value=...)."
    ):
        return TensorDictSequential(loss.actor_network, critic).select_subsequence(out_keys=[advantage.value_key])


def _optimizer(given: torch.optim.Optimizer | None, lr: float | None, parameters: list) -> torch.optim.Optimizer:
    """The one that is given, or Adam."""
    if given is None:
        fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in parameters)
        return torch.optim.Adam(parameters, lr=1e-4 if lr is None else lr, fused=fused)
    if lr is not None:
        raise ValueError(f"lr={lr} is Adam's, and the optimizer that you give has its own: give one of the two.")
    if strangers := {p for group in given.param_groups for p in group["params"]} - set(parameters):
        raise ValueError(
            f"{len(strangers)} of the optimizer's parameters are not the loss's, so no update would train them: make it of "
            "loss.parameters(), after the networks have their final form and device."
        )
    return given


def _check_loss(loss: ClipPPOLoss, entropy_schedule: Schedule | None) -> None:
    if not hasattr(loss, "actor_network"):
        raise TypeError(f"PPOUpdate trains a loss such as RL2PPOLoss(actor, critic), not {kind_of(loss)}.")
    if not any(parameter.requires_grad for parameter in loss.parameters()):
        raise ValueError("the loss has no parameters to train: are all of them frozen (requires_grad=False)?")
    if entropy_schedule is not None and (not loss.entropy_bonus or getattr(loss, "_entropy_coeff_map", None)):
        raise ValueError(
            "entropy_schedule moves one weight: build the loss with entropy_bonus=True and one entropy_coeff."
        )
    if not hidden_keys(loss.actor_network):
        log.warning(
            "the actor hands no hidden state on to its next step, so that it cannot adapt within a trial. That is a baseline; "
            "an agent that adapts has a recurrent actor such as GRUCategoricalActor. This one reads %s.",
            loss.actor_network.in_keys,
        )


def _require_objects(**arguments: object) -> None:
    for name, value in arguments.items():
        if isinstance(value, type):
            raise TypeError(f"{name}={value.__name__} is a class: give an object of it, {value.__name__}(...).")


def _require_factors(name: str, schedule: Schedule | None, scheduled: str, initial: float) -> None:
    """ValueError where ``schedule`` evidently gives the values themselves: all training long it is next to 0, as they are."""
    if schedule is None:
        return
    largest = max(_factor(name, schedule, step / 100) for step in range(100))
    if 0 < largest <= _SMALL and initial <= _SMALL:
        raise ValueError(
            f"{name} is a factor on {scheduled}={initial:.3g} and gives at most {largest:.3g}, so that {scheduled} would never "
            f"be above {initial * largest:.3g}: give factors, such as linear_decay, or for values {scheduled}=1.0."
        )


def _factor(name: str, schedule: Schedule, progress: float) -> float:
    factor = float(schedule(progress))
    if not 0 <= factor < math.inf:
        raise ValueError(
            f"{name} gave {factor} at progress {progress:.3g}: a factor is at least 0, or the loss is climbed."
        )
    return factor


def _bound(name: str, value: float | None) -> float | None:
    if value is not None and not value > 0:
        raise ValueError(f"{name}={value} would stop all learning: it must be positive, or None for no bound.")
    return value


def _mean(values: list[float | torch.Tensor]) -> float:
    return torch.stack(values).mean().item() if isinstance(values[0], torch.Tensor) else fmean(values)


def _largest(values: list[float | torch.Tensor]) -> float:
    return torch.stack(values).max().item() if isinstance(values[0], torch.Tensor) else max(values)
