"""`TrialAdvantage`: GAE and returns over trials, from the values stored at collection."""

from __future__ import annotations

from typing import Literal

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.modules import set_recurrent_mode
from torchrl.objectives.value.functional import generalized_advantage_estimate

__all__ = ["TrialAdvantage"]


class TrialAdvantage(nn.Module):
    """Advantages that flow across the episodes of one trial, and never across trials.

    Reads ``value_key`` ``[*B, T, 1]`` as it was stored at collection, and ``("next", ...)`` reward, done and terminated;
    writes ``"advantage"`` and ``"value_target"``, both ``[*B, T, 1]``. ``done`` must be the trial's, as `Trial` sets it.

    The advantage is GAE (Schulman et al. 2016), computed by TorchRL. The value of the next step is the stored one, shifted
    by one; only where a batch ends inside a trial, or a trial was truncated, is the critic asked for one value more.

    Args:
        gamma: discount per step. Default 0.99.
        lmbda: GAE's lambda. Default 0.97, the original's; the paper used 0.3 for γ = 0.99.
        value_target: ``"return"``: the trial's discounted return-to-go (the original's); ``"gae"``: advantage + value.
        normalize: normalise the advantage over the whole batch to mean 0 and standard deviation 1. Default True.
        critic: module that writes ``value_key`` from one step's entries, e.g. the collector's `ActorCritic`. Needed
            only for batches that end inside a trial.
        value_key: Default ``"state_value"``.

    Raises:
        KeyError: no stored value in the data.
        FloatingPointError: reward or value is not finite.
        ValueError: a batch ends inside a trial and there is no ``critic``.

    Examples:
        >>> from tensordict import TensorDict
        >>> done = torch.tensor([[False, False, True]]).unsqueeze(-1)
        >>> data = TensorDict({"state_value": torch.zeros(1, 3, 1),
        ...     "next": {"reward": torch.ones(1, 3, 1), "done": done, "terminated": done}}, [1, 3])
        >>> TrialAdvantage(gamma=0.5, lmbda=1.0, normalize=False)(data)["advantage"].squeeze()
        tensor([1.7500, 1.5000, 1.0000])
    """

    def __init__(
        self,
        *,
        gamma: float = 0.99,
        lmbda: float = 0.97,
        value_target: Literal["return", "gae"] = "return",
        normalize: bool = True,
        critic: TensorDictModuleBase | None = None,
        value_key: str = "state_value",
    ):
        super().__init__()
        for name, value in (("gamma", gamma), ("lmbda", lmbda)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value} must lie in [0, 1]: beyond 1 sums over a trial grow without bound.")
        if value_target not in ("return", "gae"):
            raise ValueError(
                f"value_target={value_target!r}: choose 'return' (return-to-go) or 'gae' (advantage + value)."
            )
        self.gamma, self.lmbda = gamma, lmbda
        self.value_target, self.normalize = value_target, normalize
        self.value_key = value_key
        # Kept out of the module tree: its parameters belong to the loss.
        self.__dict__["critic"] = critic

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes ``"advantage"`` and ``"value_target"`` into ``tensordict`` ``[*B, T]`` and returns it."""
        if self.value_key not in tensordict.keys(True):
            raise KeyError(
                f"no {self.value_key!r} in the data: TrialAdvantage reads the values stored at collection. Collect with "
                "ActorCritic(actor, critic) as the policy."
            )
        value = tensordict[self.value_key]
        reward = tensordict["next", "reward"].to(value.dtype)
        require_finite(reward, "reward")
        require_finite(value, self.value_key)
        inputs = (value, self._next_value(tensordict, value), reward)
        ends = (tensordict["next", "done"], tensordict["next", "terminated"])
        # As tensors: TorchRL multiplies these with integers, and Python numbers would come out rounded to float32.
        gamma, lmbda = value.new_tensor(self.gamma), value.new_tensor(self.lmbda)
        advantage, target = generalized_advantage_estimate(gamma, lmbda, *inputs, *ends)
        if self.value_target == "return":
            # GAE with lambda = 1, plus the value, is the discounted return-to-go, bootstrapped where a batch cuts a trial.
            _, target = generalized_advantage_estimate(gamma, 1.0, *inputs, *ends)
        if self.normalize:
            advantage = (advantage - advantage.mean()) / advantage.std().clamp_min(1e-8)
        return tensordict.set("advantage", advantage).set("value_target", target)

    def _next_value(self, tensordict: TensorDictBase, value: torch.Tensor) -> torch.Tensor:
        """Values ``[*B, T, 1]`` of the steps' successors; 0 beyond a trial's end."""
        done, terminated = tensordict["next", "done"], tensordict["next", "terminated"]
        next_value = torch.zeros_like(value)
        next_value[..., :-1, :] = value[..., 1:, :]
        next_value.masked_fill_(done, 0.0)
        open_end = done & ~terminated
        open_end[..., -1, :] = ~terminated[..., -1, :]
        if open_end.any():
            next_value[open_end] = self._bootstrap(tensordict, open_end.squeeze(-1)).to(value.dtype)
        return next_value

    def _bootstrap(self, tensordict: TensorDictBase, rows: torch.Tensor) -> torch.Tensor:
        if self.critic is None:
            raise ValueError(
                f"{int(rows.sum())} trials are cut by the batch's end (or truncated), and without a critic their last value "
                "cannot be known. Make frames_per_batch a whole number of trials, or pass "
                "TrialAdvantage(critic=<the collector's policy>)."
            )
        successors = tensordict["next"][rows]
        missing = [key for key in self.critic.in_keys if key != "is_init" and key not in successors.keys(True, True)]
        if missing:
            raise KeyError(
                f"the batch ends inside a trial, but ('next', ...) lacks {missing}, which the critic reads there."
            )
        successors["is_init"] = torch.zeros(*successors.batch_size, 1, dtype=torch.bool, device=rows.device)
        with set_recurrent_mode(False):
            return self.critic(successors)[self.value_key].reshape(-1)


def require_finite(value: torch.Tensor, name: str) -> None:
    """Raises a FloatingPointError that says where ``value`` ``[*B, T, 1]`` first is NaN or infinite."""
    if not torch.isfinite(value).all():
        *row, step, _ = (~torch.isfinite(value)).nonzero()[0].tolist()
        raise FloatingPointError(
            f"{name} is {value[(*row, step, 0)].item()} at row {row}, step {step} of the batch. One such number spreads over the "
            "whole batch through the advantages: mend the env or the networks before training on."
        )
