"""Ablations for `adaptation_curve`: an agent without memory, or with another task's rewards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModuleBase

from rl2_torchrl.arguments import require_generator, require_network
from rl2_torchrl.modules.acting import State
from rl2_torchrl.modules.actor_critic import cores_of, first_memory, hidden_keys
from rl2_torchrl.modules.cores import where_rows
from rl2_torchrl.trial import EPISODE_DONE

__all__ = ["with_shuffled_rewards", "with_zeroed_memory"]


def with_zeroed_memory(
    policy: TensorDictModuleBase, at: Literal["steps", "episodes"] = "steps"
) -> Callable[[State], State]:
    """An ablation that zeroes the hidden state: what is left is what the agent does without memory.

    All hidden states of ``policy``, ``[num_rows, num_layers, hidden_size]`` each, are put to what a trial begins with before it
    reads them: zeros, or what a core of your own says. It may be the `ActorCritic` of the actor that plays.

    Args:
        policy: the policy.
        at: zeroed at all ``"steps"``, or where ``"episodes"`` begin: then the agent keeps what it learns within an episode, and
            nothing of the episodes before it.

    Raises:
        TypeError: it is no policy.
        ValueError: the policy has no memory; ``at`` is something else.

    Examples:
        >>> from rl2_torchrl.modules import GRUValueHead
        >>> zero = with_zeroed_memory(GRUValueHead(5, hidden_size=8))
        >>> float(zero({"critic_hidden": torch.ones(4, 1, 8)})["critic_hidden"].sum())
        0.0
    """
    require_network(policy, "with_zeroed_memory(policy)")
    if at not in ("steps", "episodes"):
        raise ValueError(f"{at=}: the memory is zeroed at all 'steps', or where 'episodes' begin.")
    keys: list[NestedKey] = hidden_keys(policy)
    cores = cores_of(policy)
    if not keys:
        raise ValueError(f"this policy hands no hidden state on, there is nothing to zero; it reads {policy.in_keys}.")

    def zero(state: State) -> State:
        there = [key for key in keys if key in state]
        if not there:
            raise ValueError(
                f"the policy that plays has no {keys} to zero, the memory of another: give with_zeroed_memory the one that plays."
            )
        firsts = first_memory(cores, len(state[there[0]]))
        zeros = {k: firsts[k].to(state[k]) if k in firsts else torch.zeros_like(state[k]) for k in there}
        if at == "episodes":
            begins = state[EPISODE_DONE].squeeze(-1)  # of the step that led here
            zeros = {key: where_rows(begins, zero, state[key]) for key, zero in zeros.items()}
        return {**state, **zeros}

    return zero


def with_shuffled_rewards(
    generator: torch.Generator | None = None, *, in_key: NestedKey = "trans"
) -> Callable[[State], State]:
    """An ablation that permutes the rewards of the transition input among the rows of the batch.

    Each row then sees another task's rewards, of the same distribution: an agent that still improves does not learn from
    its rewards. The reward is the last but one entry of ``in_key`` ``[num_rows, n]``, as `PreviousStep` writes it.

    Args:
        generator: generator of the permutations. None takes PyTorch's own.
        in_key: transition input. Default ``"trans"``.

    Examples:
        >>> trans = torch.tensor([[0.0, 7.0, 1.0], [0.0, 8.0, 1.0]])  # observation, reward, done
        >>> shuffled = with_shuffled_rewards()({"trans": trans})["trans"]
        >>> sorted(shuffled[:, 1].tolist()), shuffled[:, 2].tolist()
        ([7.0, 8.0], [1.0, 1.0])
    """
    require_generator(generator)

    def shuffle(state: State) -> State:
        if in_key not in state:
            raise KeyError(
                f"no {in_key!r} to shuffle rewards in: name PreviousStep's out_key, with_shuffled_rewards(in_key=...)."
            )
        trans = state[in_key].clone()
        if len(trans) < 2:
            raise ValueError(
                "rewards can only be shuffled among several rows: use an env with a batch size of 2 or more."
            )
        order = torch.randperm(len(trans), generator=generator, device=generator.device if generator else None)
        trans[:, -2] = trans[order.to(trans.device), -2]
        return {**state, in_key: trans}

    return shuffle
