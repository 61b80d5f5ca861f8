"""`TrialAdvantage`: GAE and returns over trials, from the values stored at collection."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Literal

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import unravel_key
from torch import Tensor, nn
from torchrl.modules import set_recurrent_mode
from torchrl.objectives.value import TD1Estimator, ValueEstimatorBase

from rl2_torchrl import kernels
from rl2_torchrl.arguments import require_flags, require_numbers, require_played, require_time_last
from rl2_torchrl.modules.actor_critic import cores_of, hidden_keys
from rl2_torchrl.modules.cores import RecurrentCore
from rl2_torchrl.modules.normalization import RunningNorm

__all__ = ["TrialAdvantage", "advantages_of", "require_all_valid", "require_rows_whole"]


class TrialAdvantage(nn.Module):
    """Advantages that flow across the episodes of one trial, and never across trials: GAE (Schulman et al. 2016).

    Reads ``value_key`` ``[*B, T, 1]`` as it was stored at collection, and ``("next", ...)`` reward, done (the trial's, as `Trial`
    sets it) and terminated; writes ``"advantage"`` and ``"value_target"``, both ``[*B, T, 1]``, over those of an earlier call. The
    value of the next step is the stored one, shifted by one; only where a batch ends inside a trial, or a trial was truncated,
    is the critic asked for one value more.

    Args:
        gamma: discount per step. Default 0.99.
        lmbda: GAE's lambda. Default 0.97, the original's; the paper used 0.3 for γ = 0.99.
        value_target: ``"return"``: the trial's discounted return-to-go (the original's); ``"gae"``: advantage + value.
        normalize: normalise the advantage over the whole batch to mean 0 and standard deviation 1; one of a single step, which
            has no deviation, stays as it is. Default True.
        critic: module that writes ``value_key`` from one step's entries, e.g. the collector's `ActorCritic`. Asked only where a
            batch ends inside a trial or a trial is truncated. Default: in a `PPOUpdate` its loss's own networks.
        scale_rewards: divide rewards by the standard deviation of the returns of all batches before, so that the critic learns
            numbers around 1 whatever the env pays. It is part of the ``state_dict``; in ``eval()`` mode it stays. Default False.
        value_key: Default ``"state_value"``.

    Examples:
        >>> from tensordict import TensorDict
        >>> done = torch.tensor([[False, False, True]]).unsqueeze(-1)
        >>> data = TensorDict({"state_value": torch.zeros(1, 3, 1),
        ...     "next": {"reward": torch.ones(1, 3, 1), "done": done, "terminated": done}}, [1, 3])
        >>> TrialAdvantage(gamma=0.5, lmbda=1.0, normalize=False)(data)["advantage"].squeeze()
        tensor([1.7500, 1.5000, 1.0000])
    """

    #: Asked where there is no ``critic``; `advantages_of` puts one here while it calls.
    stand_in: TensorDictModuleBase | None = None

    #: What it writes.
    out_keys = ["advantage", "value_target"]

    def __init__(
        self,
        *,
        gamma: float = 0.99,
        lmbda: float = 0.97,
        value_target: Literal["return", "gae"] = "return",
        normalize: bool = True,
        critic: TensorDictModuleBase | None = None,
        scale_rewards: bool = False,
        value_key: str = "state_value",
    ):
        super().__init__()
        require_flags(normalize=normalize, scale_rewards=scale_rewards)
        require_numbers(gamma=gamma, lmbda=lmbda)
        for name, value in (("gamma", gamma), ("lmbda", lmbda)):
            if not 0 <= value <= 1:  # NaN is no such number either
                raise ValueError(f"{name}={value} must lie in [0, 1]: beyond 1 sums over a trial grow without bound.")
        if value_target not in ("return", "gae"):
            raise ValueError(f"value_target={value_target!r}: choose 'return' (to go) or 'gae' (advantage + value).")
        self.gamma, self.lmbda, self.value_key = gamma, lmbda, value_key
        self.value_target, self.normalize, self.scale_rewards = value_target, normalize, scale_rewards
        self._returns = RunningNorm(1) if scale_rewards else None
        # Kept out of the module tree: its parameters belong to the loss.
        self.__dict__["critic"] = critic

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries that are read from a collected batch: with a critic, also those that it reads beyond the batch's last step."""
        beyond = [] if self.critic is None else [key for key in self.critic.in_keys if key != "is_init"]
        following = [unravel_key(("next", key)) for key in ("reward", "done", "terminated", *beyond)]
        return [self.value_key, *following]

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Writes ``"advantage"`` and ``"value_target"`` into ``tensordict`` ``[*B, T]`` and returns it.

        Raises:
            ValueError: a row is padded.
        """
        require_time_last(tensordict)
        require_played(tensordict)
        if self.value_key not in tensordict.keys(True):
            raise KeyError(f"no {self.value_key!r} in the data: collect with ActorCritic(actor, critic).")
        value, done = tensordict[self.value_key], tensordict["next", "done"]
        dtype = value.dtype
        value = value.to(torch.promote_types(dtype, torch.float32))  # in half precision sums over a trial stand still
        reward = self.rewards(tensordict).to(value.dtype)
        _require_finite(reward, "reward")
        reward = self._scaled(reward, done) if self.scale_rewards else reward
        _require_finite(value, self.value_key)
        advantage, target = (_entry(tensordict, key, value) for key in ("advantage", "value_target"))
        self._temporal_differences(tensordict, value, reward, advantage)
        if self.value_target == "return":
            # GAE with lambda = 1, plus the value, is the discounted return-to-go, bootstrapped where a batch cuts a trial.
            _accumulate(target.copy_(advantage), done, self.gamma)
        _accumulate(advantage, done, self.gamma * self.lmbda)
        if self.value_target == "gae":
            target.copy_(advantage)
        target.add_(value)
        if self.normalize and advantage.numel() > 1:
            std = advantage.std().clamp_min(1e-8)
            advantage.sub_(advantage.mean()).div_(std)
        return tensordict.set("advantage", advantage.to(dtype)).set("value_target", target.to(dtype))

    def rewards(self, tensordict: TensorDictBase) -> Tensor:
        """What the advantages are of, ``[*B, T, 1]``: the collected rewards.

        A subclass may have others, of entries that its ``in_keys`` name.
        """
        return tensordict["next", "reward"]

    def _scaled(self, reward: Tensor, done: Tensor) -> Tensor:
        """``reward`` over the standard deviation of the returns of all batches before, or of a first one's own."""
        self._returns.to(reward.device)
        returns = _accumulate(reward.clone(), done, self.gamma)
        is_first, std = self._returns.count == 0, self._returns.std
        if self.training:
            self._returns.update_statistics(returns)
        return reward / (self._returns.std if is_first else std).to(reward)

    def _temporal_differences(self, tensordict: TensorDictBase, value, reward, out: Tensor) -> None:
        """Writes ``r_t + gamma v_{t+1} - v_t`` into ``out`` ``[*B, T, 1]``, where v is 0 beyond a trial's end."""
        done, terminated = tensordict["next", "done"], tensordict["next", "terminated"]
        out[..., :-1, :] = value[..., 1:, :]
        out[..., -1, :] = 0
        out.masked_fill_(done, 0.0)
        # The value beyond the last step counts at truncations, and where the batch cuts a trial.
        is_open = done & ~terminated
        is_open[..., -1, :] = ~terminated[..., -1, :]
        if is_open.any():
            out[is_open] = self._bootstrap(tensordict, is_open.squeeze(-1)).to(out.dtype)
        out.mul_(self.gamma).add_(reward).sub_(value)

    def _bootstrap(self, tensordict: TensorDictBase, rows: Tensor) -> Tensor:
        critic = self.stand_in if self.critic is None else self.critic
        if critic is None:
            raise ValueError(
                f"{int(rows.sum())} trials are cut by the batch's end (or truncated), and no critic tells their last value. Pass "
                "TrialAdvantage(critic=<the collector's policy>), or, if all have one length, a frames_per_batch of whole trials."
            )
        successors = tensordict["next"][rows]
        known = ("is_init", *successors.keys(True))
        if missing := [key for key in critic.in_keys if key not in known]:
            raise KeyError(
                f"{int(rows.sum())} trials are cut by the batch's end (or truncated), but ('next', ...) lacks {missing}, which the "
                f"critic reads there: keep PPOUpdate(..., bptt={tensordict.shape[-1]}).in_keys (a bptt of whole rows, as without), "
                "or all (keep=None); where all trials have one length, a frames_per_batch of whole trials cuts none."
            )
        successors["is_init"] = torch.zeros(*successors.batch_size, 1, dtype=torch.bool, device=rows.device)
        with set_recurrent_mode(False):
            return critic(successors)[self.value_key].reshape(-1)


def advantages_of(advantage: Callable, critic: TensorDictModuleBase | None, batch: TensorDictBase) -> TensorDictBase:
    """What ``advantage`` makes of ``batch``, a `TrialAdvantage` if there is a ``critic``, which it asks if it was given none.

    Raises:
        TypeError: ``advantage`` returned no batch.
        ValueError: it has not found all of its advantages (`require_all_valid`), or would begin a memory at the wrong step.
    """
    is_torchrls = isinstance(advantage, ValueEstimatorBase)
    if is_torchrls:
        _require_no_start_beyond(advantage, batch)
    # Not in the module tree: the parameters belong to the loss.
    attributes = {} if critic is None else advantage.__dict__
    attributes["stand_in"] = critic
    try:
        # Step by step a memory would begin anew beyond a row whose last step is a trial's first: TorchRL takes on its flag there.
        with set_recurrent_mode(True) if is_torchrls else nullcontext():
            out = advantage(batch)
    except KeyError as error:
        if type(advantage) is not TrialAdvantage:  # which says itself what it misses
            error.add_note(
                f"The advantage was given {sorted(map(str, batch.keys(True, True)))}; what it reads its in_keys must name, for "
                "PPOUpdate.in_keys to have it: my_advantage.in_keys = ['task', ('next', 'reward'), ...]."
            )
        raise
    finally:
        del attributes["stand_in"]
    if not isinstance(out, TensorDictBase):
        raise TypeError(f"the advantage returned {out!r}: it returns the batch, with 'advantage' and 'value_target'.")
    require_all_valid(out)
    return out


def require_all_valid(batch: TensorDictBase) -> None:
    """ValueError where TorchRL's ``GAE(shifted=True)`` says of steps that there was no room for the value beyond them."""
    valid = batch.get("shifted_valid", None)
    if valid is not None and not valid.all():
        raise ValueError(
            f"{int((~valid).sum())} steps have no advantage ('shifted_valid'), and steps before them a wrong one: GAE has room "
            "for one value beyond a trial in each row, and more trials are truncated. Give it shifted_budget= as many as end in a "
            "row, and one more, or take TrialAdvantage(), which needs no room."
        )


def require_rows_whole(advantage: Callable) -> None:
    """ValueError where TorchRL's estimator asks a critic that has a memory for steps and their successors apart."""
    # TD1Estimator uses none of these values but the last.
    if not isinstance(advantage, ValueEstimatorBase) or isinstance(advantage, TD1Estimator) or advantage.shifted:
        return
    if advantage.value_network is not None and (memory := hidden_keys(advantage.value_network)):
        name = type(advantage).__name__
        raise ValueError(
            f"{name} would ask the critic, whose memory is {memory}, for each step's successor apart from the step, and begin "
            f"with another memory there, so that advantages are wrong: let it see rows whole, {name}(..., shifted=True), or "
            "take TrialAdvantage(), which reads the values that are stored."
        )


def _require_no_start_beyond(estimator: ValueEstimatorBase, batch: TensorDictBase) -> None:
    """ValueError where ``estimator`` would let a core begin anew at the step beyond a trial's first, with a memory of its own."""
    critic, starts = estimator.value_network, batch.get("is_init", None)
    cores = [] if critic is None else [core for core in cores_of(critic) if isinstance(core, RecurrentCore)]
    if starts is None or all(core.starts_as_stored() for core in cores):
        return
    done = batch["next", "done"]
    terminated, beyond = batch.get(("next", "terminated"), done), done.clone()
    beyond[..., -1, :] = True
    if count := int((starts & beyond & ~terminated).sum()):
        name = type(estimator).__name__
        raise ValueError(
            f"{count} rows end with a trial's first step, or a trial of one step is truncated: {name} would ask the critic for the "
            f"step beyond as for a first one, and {type(cores[0]).__name__} begins its memory anew there. Take TrialAdvantage()."
        )


def _entry(tensordict: TensorDictBase, key: str, like: Tensor) -> Tensor:
    """The entry ``key`` to write into: the one that is there, if a collector hands its batches out in the same memory."""
    entry = tensordict.get(key, None)
    if entry is None or (entry.shape, entry.dtype, entry.device) != (like.shape, like.dtype, like.device):
        return torch.empty_like(like)
    return entry


def _accumulate(out: Tensor, done: Tensor, discount: float) -> Tensor:
    """``out_t += discount * out_{t+1}`` from back to front, over the steps of one trial (Schulman et al. 2016, eq. 16).

    As TorchRL's `generalized_advantage_estimate`, which makes ten tensors of the batch's size, in the memory of ``out``.
    """
    if not kernels.covers(out):
        return _accumulate_by_doubling(out, done, discount)
    flags = done.to(out.device, torch.bool).expand_as(out)  # a kernel asks nothing
    sums, ends = (entry.reshape(-1, out.shape[-2]) for entry in (out, flags))
    strided = [(entry.data_ptr(), *entry.stride()) for entry in (ends, sums)]
    kernels.load(out.dtype).discounted_sums(*sums.shape, *strided[0], discount, *strided[1])
    return out if sums.data_ptr() == out.data_ptr() else out.copy_(sums.view(out.shape))


def _accumulate_by_doubling(out: Tensor, done: Tensor, discount: float) -> Tensor:
    """`_accumulate` of all steps at once over 1, 2, 4, … steps (Hillis & Steele 1986): a device waits for launches."""
    factor, steps, shift = torch.where(done, 0.0, torch.full_like(out, discount)), out.shape[-2], 1
    while shift < steps:
        near, far = slice(0, steps - shift), slice(shift, steps)
        out[..., near, :] = torch.addcmul(out[..., near, :], factor[..., near, :], out[..., far, :])
        factor[..., near, :] = factor[..., near, :] * factor[..., far, :]
        shift *= 2
    return out


def _require_finite(value: Tensor, name: str) -> None:
    # The sum of finite numbers can overflow, but that of others is never finite: it spares four tensors of this size.
    if not torch.isfinite(value.sum()) and not torch.isfinite(value).all():
        *row, step, _ = (~torch.isfinite(value)).nonzero()[0].tolist()
        raise FloatingPointError(
            f"{name} is {value[(*row, step, 0)].item()} at row {row}, step {step}, and would spread over the whole batch: mend the "
            "env or the networks before training on."
        )
