"""`RL2PPOLoss`: TorchRL's `ClipPPOLoss` with the original's value loss and coefficients."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModuleBase, dispatch
from torch.compiler import is_compiling
from torch.nn.functional import mse_loss
from torchrl.objectives import ClipPPOLoss

from rl2_torchrl.modules.plain import Family, NotPlainError, family_of, flat_modules, run_sequences
from rl2_torchrl.objectives.clipped import clipped_objective

__all__ = ["RL2PPOLoss"]


class RL2PPOLoss(ClipPPOLoss):
    """``L = -mean(min(r A, clip(r, 1 - eps, 1 + eps) A)) + 0.5 mean((v - R)²)``, without entropy term.

    A `ClipPPOLoss` in everything but its defaults, so it goes wherever that goes, with the same keys and options. The
    loss runs its networks in recurrent mode: it takes sequences ``[*B, T]``, each starting from the hidden state stored
    at its first step, and the GRU starts anew, from the state stored there, wherever ``"is_init"`` says so.

    Entries written: ``loss_objective``, ``loss_critic`` (the coefficient included), ``loss_entropy`` when there is a
    bonus, and `ClipPPOLoss`'s diagnostics.

    Args:
        actor_network: policy, e.g. `GRUGaussianActor`.
        critic_network: value function, e.g. `GRUValueHead`.
        clip_epsilon: clipping of the ratio. Default 0.3, the original's.
        critic_coeff: weight of the value loss. Default 0.5.
        loss_critic_type: distance of value and return. Default ``"l2"``, the plain squared error.
        entropy_bonus: add ``-entropy_coeff * entropy``. Default False.
        entropy_coeff: weight of the entropy; only read with ``entropy_bonus=True``. Default 0.01.
        log_explained_variance: Default False: over minibatches of unlike trials it says little and costs a pass.
        functional: copy the parameters in and out of the networks at every call, as `ClipPPOLoss` does. Default False: the
            networks themselves are called, a millisecond faster.
        **kwargs: passed on to `ClipPPOLoss`: ``clip_value``, ``normalize_advantage``, ``reduction``, …

    Raises:
        ValueError: ``clip_epsilon`` lies outside (0, 1], ``critic_coeff`` is negative, or the advantage is not ``[*B, T, 1]``.
        TypeError: the actor has no distribution.
        KeyError: the data holds no advantage.

    Examples:
        >>> from rl2_torchrl.modules import GRUCategoricalActor, GRUValueHead
        >>> loss = RL2PPOLoss(GRUCategoricalActor(5, 3), GRUValueHead(5))
        >>> loss.loss_critic_type, float(loss.critic_coeff), loss.entropy_bonus
        ('l2', 0.5, False)
    """

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        critic_network: TensorDictModuleBase | None = None,
        *,
        clip_epsilon: float | tuple[float, float] = 0.3,
        critic_coeff: float | None = 0.5,
        loss_critic_type: str = "l2",
        entropy_bonus: bool = False,
        entropy_coeff: float | None = None,
        log_explained_variance: bool = False,
        functional: bool = False,
        **kwargs,
    ):
        epsilons = clip_epsilon if isinstance(clip_epsilon, (tuple, list)) else (clip_epsilon,)
        if min(epsilons) <= 0 or epsilons[0] > 1:
            raise ValueError(
                f"clip_epsilon={clip_epsilon}: at 0 or below no policy change is allowed at all, and 1 - clip_epsilon, the "
                "lowest ratio, cannot be negative. Usual are 0.1 to 0.3."
            )
        if not hasattr(actor_network, "get_dist"):
            raise TypeError(
                f"RL2PPOLoss(actor, critic): {type(actor_network).__name__} has no action distribution. The actor comes "
                "first, and it is a ProbabilisticActor such as GRUGaussianActor."
            )
        if critic_coeff is not None and critic_coeff < 0:
            raise ValueError(
                f"critic_coeff={critic_coeff}: a negative weight would drive the values away from the returns."
            )
        if entropy_coeff is not None and not isinstance(entropy_coeff, dict) and entropy_coeff < 0:
            raise ValueError(f"entropy_coeff={entropy_coeff}: a negative weight would make the policy stop exploring.")
        super().__init__(
            actor_network,
            critic_network,
            clip_epsilon=clip_epsilon,
            critic_coeff=critic_coeff if critic_network is not None else None,
            loss_critic_type=loss_critic_type,
            entropy_bonus=entropy_bonus,
            entropy_coeff=entropy_coeff,
            log_explained_variance=log_explained_variance,
            functional=functional or kwargs.get("delay_actor", False),
            **kwargs,
        )
        self._set_clip_precision(clip_epsilon)
        #: Whether nothing but this class's own options is asked for: anything else is left to ClipPPOLoss.
        self.is_plain = (
            not (self.functional or kwargs or log_explained_variance)
            and loss_critic_type == "l2"
            and self._entropy_coeff_map is None
        )

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Losses and diagnostics of the sequences ``tensordict`` ``[*B, T]``."""
        key = self.tensor_keys.advantage
        advantage = tensordict.get(key, None)
        if advantage is None and self._value_estimator is None:
            raise KeyError(
                f"no {key!r} in the data: call TrialAdvantage(...)(batch) before the loss, on the whole batch [B, T] (a GRU "
                "critic cannot be asked for it step by step)."
            )
        if advantage is not None and advantage.shape != (*tensordict.shape, 1):
            raise ValueError(
                f"{key!r} has shape {tuple(advantage.shape)} in data of shape {tuple(tensordict.shape)}: it must be "
                "[*B, T, 1], as TrialAdvantage writes it; mind the last dimension."
            )
        if self.is_plain and advantage is not None and tensordict.ndim == 2 and not is_compiling():
            try:
                networks = [flat_modules(n) for n in (self.actor_network, self.critic_network) if n is not None]
                return self._plain_losses(tensordict, advantage, networks, *family_of(networks[0]))
            except NotPlainError:
                pass
        return super().forward(tensordict)

    def _plain_losses(self, data, advantage, networks, sample, family: Family) -> TensorDictBase:
        """What `ClipPPOLoss` gives for these options, without its TensorDicts."""
        keys, state = self.tensor_keys, {}
        read = [keys.action, keys.sample_log_prob, *([keys.value_target] if self.has_critic else [])]
        if any(data.get(key, None) is None for key in read):
            raise NotPlainError(f"one of {read} is missing; ClipPPOLoss says which")
        for modules in networks:
            run_sequences(modules, data, state)
        parameters = [state[key] for key in sample.in_keys]
        log_prob, entropy = family.log_prob_and_entropy(data.get(keys.action), *parameters)
        inputs = (log_prob, data.get(keys.sample_log_prob), advantage.squeeze(-1))
        out = clipped_objective(*inputs, *self.clip_bounds)._asdict()
        out["loss_objective"] = out.pop("loss")
        if self.entropy_bonus:
            entropy = entropy.mean()
            out |= {"entropy": entropy.detach(), "loss_entropy": -self.entropy_coeff * entropy}
        if self.has_critic:
            out["loss_critic"] = self.critic_coeff * mse_loss(state[keys.value], data.get(keys.value_target))
        return TensorDict(out)

    @property
    def has_critic(self) -> bool:
        """Whether there is a value loss."""
        return self._has_critic

    @property
    def clip_bounds(self) -> tuple[float, float]:
        """Logarithms of the lowest and the highest ratio."""
        low, high = map(float, self._clip_bounds)
        return low, high

    def _set_clip_precision(self, clip_epsilon: float | tuple[float, float]) -> None:
        # ClipPPOLoss stores the threshold as float32, which in float64 networks moves the clip by 1e-8.
        dtype = next(self.parameters()).dtype
        if self._asymmetric_clip:
            self.clip_epsilon_low = torch.as_tensor(clip_epsilon[0], dtype=dtype, device=self.clip_epsilon_low.device)
            self.clip_epsilon_high = torch.as_tensor(clip_epsilon[1], dtype=dtype, device=self.clip_epsilon_high.device)
        else:
            self.clip_epsilon = torch.as_tensor(clip_epsilon, dtype=dtype, device=self.clip_epsilon.device)
