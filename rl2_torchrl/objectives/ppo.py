"""`RL2PPOLoss`: TorchRL's `ClipPPOLoss` with the original's value loss and coefficients, and with further terms."""

from collections.abc import Container, Iterable, Mapping, Sequence
from inspect import signature, unwrap
from numbers import Real

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import (
    ProbabilisticTensorDictSequential,
    TensorDictModuleBase,
    dispatch,
)
from torch import Tensor, nn
from torch.compiler import is_compiling
from torchrl.objectives import ClipPPOLoss, PPOLoss

from rl2_torchrl.arguments import as_list, kind_of, require_flags, require_numbers, require_played, require_time_last
from rl2_torchrl.gradients import ENTROPY, Part, Program, State, parts_of
from rl2_torchrl.gradients.answers import Answers
from rl2_torchrl.gradients.networks import leaves_of
from rl2_torchrl.gradients.part import is_watched, others_than
from rl2_torchrl.gradients.program import losses_of, merge_losses
from rl2_torchrl.gradients.replays import Replays
from rl2_torchrl.modules.actor_critic import hidden_keys, require_networks
from rl2_torchrl.modules.cores import lost_memory
from rl2_torchrl.modules.policy_parts import actor_parts, why_no_parts
from rl2_torchrl.objectives.advantages import require_all_valid, require_rows_whole
from rl2_torchrl.objectives.terms import ClippedObjective, EntropyBonus, SquaredError, as_number

__all__ = ["RL2PPOLoss"]

#: What `ClipPPOLoss` has otherwise by default.
_DEFAULTS = {"loss_critic_type": "l2", "entropy_bonus": False, "log_explained_variance": False, "functional": False}


#: With what parts and terms compute, by attribute: with any other it is `ClipPPOLoss` that does.
_OURS = {"loss_critic_type": "l2", "normalize_advantage": False, "advantage_norm": None, "reduction": "mean"}
_OURS |= {"clip_value": None, "max_importance_ratio": None, "samples_mc_entropy": 1, "_entropy_coeff_map": None}
_OURS |= {"log_explained_variance": False, "separate_losses": False, "functional": False, "delay_actor": False}

#: What `ClipPPOLoss` calls of itself, and nobody else.
_STEPS = ("_maybe_normalize_advantage", "_standardize_advantage", "_scale_advantage", "_log_weight")
_STEPS += ("_get_cur_log_prob", "_get_entropy", "_weighted_loss_entropy", "loss_critic", "_critic_loss_inputs")
_STEPS += ("_reduce_loss",)


class RL2PPOLoss(ClipPPOLoss):
    """``L = -mean(min(r A, clip(r, 1 - eps, 1 + eps) A)) + 0.5 mean((v - R)²)``, without entropy term.

    A `ClipPPOLoss` in everything but its defaults, so it goes wherever that goes, with the same keys and options. It runs its
    networks in recurrent mode, on sequences ``[*B, T]``, each starting from the memory stored at its first step, and anew, from
    the one stored there, wherever ``"is_init"`` says so. Entries written: ``loss_objective``, ``loss_critic`` (the coefficient
    included), ``loss_entropy`` when there is a bonus, `ClipPPOLoss`'s diagnostics, and what ``terms`` give.

    A class below may change the data before it calls ``super().forward``, but not behind autograd's back, by ``.data`` or NumPy: in
    a `PPOUpdate` that would not be seen.

    Args:
        actor_network: policy, e.g. `GRUGaussianActor`.
        critic_network: value function, e.g. `GRUValueHead`.
        terms: further loss terms, e.g. `TaskBelief`: modules with ``in_keys``, which map those entries to named losses and
            diagnostics (`rl2_torchrl.objectives.terms` says how to write one). Their parameters are the loss's.
        clip_epsilon: clipping of the ratio. Default 0.3, the original's.
        critic_coeff: weight of the value loss. Default 0.5, also for None; 0 leaves the value loss out
            (freeze the critic then, or `check_training` asks why nothing reaches it).
        entropy_coeff: weight of the entropy, which needs ``entropy_bonus=True``. Default 0.01.
        **kwargs: as for `ClipPPOLoss`: ``clip_value``, ``normalize_advantage``, …; by default ``entropy_bonus=False``,
            ``loss_critic_type="l2"`` (the squared error), ``log_explained_variance=False`` (over minibatches of unlike trials
            it says little and costs a pass) and ``functional=False`` (the networks themselves are called, a millisecond faster).

    Examples:
        >>> from rl2_torchrl.modules import GRUCategoricalActor, GRUValueHead
        >>> loss = RL2PPOLoss(GRUCategoricalActor(5, 3), GRUValueHead(5))
        >>> loss.loss_critic_type, float(loss.critic_coeff), loss.entropy_bonus
        ('l2', 0.5, False)
    """

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential | None = None,
        critic_network: TensorDictModuleBase | None = None,
        *,
        terms: Iterable[nn.Module] = (),
        clip_epsilon: float | tuple[float, float] = 0.3,
        critic_coeff: float | None = 0.5,
        entropy_coeff: float | Mapping[NestedKey, float] | None = None,
        **kwargs,
    ):
        # ClipPPOLoss's other names for the two.
        actor_network, critic_network = kwargs.pop("actor", actor_network), kwargs.pop("critic", critic_network)
        require_networks("RL2PPOLoss", actor_network, *([critic_network] if critic_network is not None else []))
        terms, options = as_list("terms", terms), {**_DEFAULTS, **kwargs}
        if strangers := [
            kind_of(term) for term in terms if not isinstance(term, nn.Module) or not hasattr(term, "in_keys")
        ]:
            raise TypeError(
                f"terms holds {strangers}: a term is an nn.Module with in_keys, the entries that its forward reads."
            )
        _require_one_writer(terms, actor_network, critic_network)
        _require_options(clip_epsilon, critic_coeff, entropy_coeff, options)
        if isinstance(entropy_coeff, Real):  # NumPy's are no numbers to TorchRL
            entropy_coeff = float(entropy_coeff)
        options["functional"] |= options.get("delay_actor", False)
        critic_coeff = None if critic_network is None else 0.5 if critic_coeff is None else critic_coeff
        weights = {"clip_epsilon": clip_epsilon, "critic_coeff": critic_coeff, "entropy_coeff": entropy_coeff}
        super().__init__(actor_network, critic_network, **weights, **options)
        if terms and self.functional:
            raise ValueError("terms read what the networks write, which functional=True hides: leave it False.")
        self.terms = nn.ModuleList(terms)
        if named := [key for term in terms for key in as_list("out_keys", getattr(term, "out_keys", None) or ())]:
            self.out_keys = [*self.out_keys, *named]
        self._set_precision(clip_epsilon, critic_coeff, entropy_coeff)
        self._is_recurrent = bool(hidden_keys(actor_network))

    #: What `PPOUpdate` gives while it asks by a ``forward`` of another.
    _answers: Answers | None = None

    # ------------------------------------------------------------- the parts
    def why_not_parts(self) -> str | None:
        """Why it is `ClipPPOLoss` that computes PPO's terms, in words; None where parts do."""
        name = type(self).__name__
        if is_compiling():
            refusal = "torch.compile sees no parts"
        elif options := [option for option, ours in _OURS.items() if _differs(getattr(self, option), ours)]:
            refusal = f"the options {options} are ClipPPOLoss's"
        elif own := others_than(ClipPPOLoss, self, _STEPS):
            refusal = f"{own} of ClipPPOLoss are others in {name}: a term of loss_terms() in their place is faster"
        else:
            refusal = why_no_parts(self.actor_network)
        if refusal is not None and self._has_own_terms():
            raise ValueError(
                f"{name} has a loss_terms() of its own, which nobody would call: {refusal}. Give what it adds to PPO's "
                "terms as terms=[...], or leave the other out."
            )
        return refusal

    def runs_beside(self) -> str | None:
        """What autograd runs beside PPO's own terms, in words; None where nothing does."""
        name, hooks = type(self).__name__, (*self._forward_hooks.values(), *self._forward_pre_hooks.values())
        if unwrap(type(self).forward) is not unwrap(RL2PPOLoss.forward):  # TorchRL wraps that of each class
            return f"{name} has a forward of its own: what it adds as a term (RL2PPOLoss(terms=[...])) is faster"
        if unwrap(type(self).__call__) is not unwrap(RL2PPOLoss.__call__):
            return f"{name} has a __call__ of its own"
        if "forward" in vars(self):
            return f"another function stands in the place of this {name}'s forward"
        if any(not hook.__module__.startswith("torchrl.") for hook in hooks):  # TorchRL's asks for target networks
            return f"there are hooks on the {name}"
        if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in self.parameters()):
            return "parameters have hooks on their gradients, which autograd runs"
        return None

    def has_answers(self, program: Program) -> bool:
        """Whether a forward of another may be answered by ``program``, which runs nothing of a user's then.

        What modules and terms of users draw at random, count, or give beside losses, such a forward may go on with.
        """
        return all(part.reason is None for part in program.parts) and not self.terms and not self._has_own_terms()

    def answers(self, replays: Replays) -> Answers:
        """What ``super().forward`` gives while `PPOUpdate` asks by a ``forward`` of another."""
        return Answers(replays, self._state_now())

    def _state_now(self) -> tuple:
        """What gradients depend on beside data and weights, and with it `why_not_parts`."""
        coefficients = [None if c is None else as_number(c) for c in (self.critic_coeff, self.entropy_coeff)]
        _, *modules = self.modules()
        # Others may stand in their places for a while, as by `TensorDictParams.to_module`.
        parameters = [p for module in modules for p in module._parameters.values()]
        weights = [(id(p), p is None or p.requires_grad) for p in parameters]
        options = [self.clip_bounds, self.entropy_bonus, self._has_critic, self.tensor_keys, len(self.terms)]
        options += [_differs(getattr(self, option), ours) for option, ours in _OURS.items()]
        options.append(vars(self).keys().isdisjoint(_STEPS))
        return [(module, is_watched(module)) for module in modules], coefficients, options, weights

    def _has_own_terms(self) -> bool:
        return bool(others_than(RL2PPOLoss, self, ["loss_terms"]))

    def network_parts(self) -> list[Part]:
        """The parts of actor and critic, in order."""
        reads_entropy = self.entropy_bonus or ENTROPY in self._keys_of_terms()
        parts = actor_parts(self.actor_network, self.tensor_keys.action, entropy=reads_entropy)
        return [*parts, *parts_of(self.critic_network)] if self._runs_critic() else parts

    def _networks(self) -> list[TensorDictModuleBase]:
        return [network for network in (self.actor_network, self.critic_network) if network is not None]

    def _runs_critic(self) -> bool:
        written = () if self.critic_network is None else self.critic_network.out_keys
        return self._has_critic or any(key in written for key in self._keys_of_terms())

    def _keys_of_terms(self) -> list[NestedKey]:
        """What terms beside PPO's own read."""
        terms = self.loss_terms() if self._has_own_terms() else self.terms
        return [key for term in terms for key in term.in_keys]

    def loss_terms(self) -> list[nn.Module]:
        """PPO's terms with the coefficients as they are now, then the further ones."""
        keys = self.tensor_keys
        terms: list[nn.Module] = [ClippedObjective(*self.clip_bounds, keys.sample_log_prob, keys.advantage)]
        if self.entropy_bonus:
            terms.append(EntropyBonus(as_number(self.entropy_coeff)))
        if self._has_critic:
            terms.append(SquaredError(as_number(self.critic_coeff), keys.value, keys.value_target))
        return [*terms, *self.terms]

    # --------------------------------------------------------------- forward
    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Losses and diagnostics of the sequences ``tensordict`` ``[*B, T]``."""
        answers = None if is_compiling() else self._answers
        if answers is not None and (given := answers(tensordict, self._state_now())) is not None:
            return TensorDict(given)
        refusal, key = self.why_not_parts(), self.tensor_keys.advantage
        self._check_data(tensordict)
        has_advantage, has_own_terms = tensordict.get(key, None) is not None, self._has_own_terms()
        if has_own_terms and not has_advantage:
            raise KeyError(f"no {key!r} in the data, which loss_terms() reads: call TrialAdvantage(...)(batch) first.")
        if not has_advantage and not is_compiling():
            require_rows_whole(self.value_estimator)
        if refusal is None and has_advantage and (tensordict.ndim == 2 or has_own_terms):
            rows = tensordict if tensordict.ndim == 2 else tensordict.reshape(-1, tensordict.shape[-1])
            return TensorDict(self.losses_of(rows, self.loss_terms()))
        losses = super().forward(tensordict)
        if not self.terms:
            return losses
        merged = dict(losses.items())
        merge_losses(merged, self.losses_of(tensordict.flatten(0, tensordict.ndim - 2), self.terms))
        return losses.update(merged)

    def losses_of(self, data: TensorDictBase | State, terms: Sequence[nn.Module]) -> dict[str, Tensor]:
        """What ``terms`` give of ``data``, entries ``[N, T, ...]``, once all parts have run; autograd can follow."""
        return losses_of(self.network_parts(), data, terms)

    def _check_data(self, tensordict: TensorDictBase) -> None:
        if not self._is_recurrent:
            return
        self.require_starts(tensordict.keys())
        if tensordict.ndim < 2:
            raise ValueError(
                f"the data are single steps {list(tensordict.shape)}, but a memory is trained on sequences [*B, T], as they were "
                "played: fill a replay buffer with such rows, not with steps."
            )
        if not is_compiling():
            require_time_last(tensordict)
            require_played(tensordict)
            require_all_valid(tensordict)
            memory = [key for network in self._networks() for key in hidden_keys(network)]
            missing = [key for key in memory if tensordict.get(key, None) is None]
            starts = tensordict.get("is_init", None) if missing else None
            if starts is not None and not starts[..., 0, :].all():
                raise KeyError(lost_memory(missing))
        advantage = tensordict.get(key := self.tensor_keys.advantage, None)
        if advantage is None and self._value_estimator is None:
            raise KeyError(f"no {key!r} in the data: call TrialAdvantage(...)(batch) on the whole batch [B, T] first.")
        if advantage is not None and advantage.shape != (*tensordict.shape, 1):
            raise ValueError(f"{key!r} is {tuple(advantage.shape)}; it must be [*B, T, 1], {(*tensordict.shape, 1)}.")

    @ClipPPOLoss.in_keys.getter  # it is set as that is
    def in_keys(self) -> list[NestedKey]:
        """What is read of the data, by the terms as well; those of a class below are there when all of that class is."""
        written = {key for network in self._networks() for key in network.out_keys}
        terms = [key for key in self._keys_of_terms() if key not in written and key[0] != "policy"]
        # ClipPPOLoss lists what its value estimator reads, and not what an advantage is in.
        keys = self.tensor_keys
        own = [keys.advantage, *([keys.value_target] if self.critic_network is not None else [])]
        own += [keys.value] if self.clip_value else []
        return list(dict.fromkeys([*ClipPPOLoss.in_keys.fget(self), *own, *terms]))

    # --------------------------------------------------------------- numbers
    def require_starts(self, keys: Container[NestedKey]) -> None:
        """KeyError unless ``keys`` hold what says where a trial starts, without which networks take it for nowhere."""
        if "is_init" in self.actor_network.in_keys and "is_init" not in keys:
            raise KeyError("no 'is_init' in the data, which says where a trial, and the memory with it, starts anew.")

    @property
    def clip_bounds(self) -> tuple[float | Tensor, float | Tensor]:
        """Logarithms of the lowest and the highest ratio; on a device as they are, for a recording that follows them."""
        return tuple(map(as_number, self._clip_bounds))

    def _set_precision(self, clip_epsilon, critic_coeff, entropy_coeff) -> None:
        # ClipPPOLoss stores these as float32, which in float64 networks moves the clip by 1e-8.
        dtype = next((p.dtype for p in self.parameters()), torch.float32)
        low, high = clip_epsilon if self._asymmetric_clip else (clip_epsilon, clip_epsilon)
        exact = {"clip_epsilon": low, "clip_epsilon_low": low, "clip_epsilon_high": high, "critic_coeff": critic_coeff}
        exact["entropy_coeff"] = 0.01 if entropy_coeff is None else entropy_coeff
        for name, value in exact.items():
            if self._buffers.get(name) is not None and not isinstance(value, Mapping):
                self._buffers[name] = torch.as_tensor(value, dtype=dtype, device=self._buffers[name].device)


def _differs(value: object, ours: object) -> bool:
    return isinstance(value, Tensor) or (value or None) != (ours or None)


def _require_one_writer(
    terms: list[nn.Module], actor: TensorDictModuleBase, critic: TensorDictModuleBase | None
) -> None:
    """ValueError where one of ``terms`` reads what both networks write, unless it is one module's that both run."""
    leaves = [[] if network is None else leaves_of(network) for network in (actor, critic)]
    ours, theirs = ({key: leaf for leaf in each for key in leaf.out_keys} for each in leaves)
    for term in terms:
        if twice := [
            key
            for key in as_list("in_keys", term.in_keys)
            if key in ours and ours[key] is not theirs.get(key, ours[key])
        ]:
            raise ValueError(
                f"{type(term).__name__} reads {twice}, which actor and critic both write, the critic last: rename one "
                "(features_key=...)."
            )


def _require_options(clip_epsilon, critic_coeff, entropy_coeff, options: Mapping[str, object]) -> None:
    """Raises unless ``options`` are `ClipPPOLoss`'s, and clip and weights in the range in which they mean something."""
    known = {**signature(PPOLoss.__init__).parameters, **signature(ClipPPOLoss.__init__).parameters}
    if unknown := sorted(options.keys() - known.keys()):
        there = sorted({"terms", *known} - {"self", "kwargs"})
        raise TypeError(f"RL2PPOLoss has no options {unknown}, and would train without them: there are {there}.")
    require_flags(**{name: value for name, value in options.items() if isinstance(known[name].default, bool)})
    low, high = clip_epsilon if isinstance(clip_epsilon, tuple | list) else (clip_epsilon, clip_epsilon)
    coefficients = list(entropy_coeff.values()) if isinstance(entropy_coeff, Mapping) else [entropy_coeff]
    for name, values in {
        "clip_epsilon": (low, high),
        "critic_coeff": (critic_coeff,),
        "entropy_coeff": coefficients,
    }.items():
        for value in values:
            require_numbers(**{name: value})
    if not (0 < low <= 1 and high > 0):
        raise ValueError(f"{clip_epsilon=} must lie in (0, 1]: the lowest ratio is 1 - that. Usual are 0.1 to 0.3.")
    if any(weight is not None and not weight >= 0 for weight in (critic_coeff, *coefficients)):
        raise ValueError(
            f"{critic_coeff=} and {entropy_coeff=} are at least 0: less would unlearn the values, or exploring."
        )
    if any(coefficients) and not options["entropy_bonus"]:
        raise ValueError(f"{entropy_coeff=} without a bonus weighs nothing: give entropy_bonus=True, or neither.")
