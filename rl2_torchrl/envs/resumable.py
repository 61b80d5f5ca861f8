"""`Resumable`: what an env of TorchRL's needs, so that a checkpoint holds it in the middle of an episode."""

from __future__ import annotations

from torch import Tensor

from rl2_torchrl.envs.layers import put_state, state_or_reason
from rl2_torchrl.storage import from_tensor, to_tensor

__all__ = ["Resumable"]


class Resumable:
    """Makes the attributes of a TorchRL env its state; to be derived from first: ``class MyEnv(Resumable, EnvBase)``.

    Attributes may be numbers, texts, arrays, tensors, containers of them, random number generators, and objects of classes of the
    env's own package. Of TorchRL's ``GymEnv`` and ``DMControlEnv`` it is the env within too, with the simulation of MuJoCo and its
    model, which a task may have changed. Specs are no state, nor are functions and what they close over: let a generator that one
    draws from be an attribute, too. Tensors that look into one another's memory no more do. Of an env that holds anything else,
    such as a simulator of its own, a resumed run begins new trials, and the log names it: write ``get_extra_state()``, which
    returns a tensor, and ``set_extra_state(tensor)`` instead.

    Examples:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import Composite, Unbounded
        >>> from torchrl.envs import EnvBase
        >>> class Walk(Resumable, EnvBase):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.observation_spec = Composite(place=Unbounded(1))
        ...         self.action_spec = self.reward_spec = Unbounded(1)
        ...         self.generator = torch.Generator().manual_seed(0)
        ...
        ...     def _reset(self, tensordict):
        ...         self.place = torch.zeros(1)
        ...         return TensorDict({"place": self.place})
        ...
        ...     def _step(self, tensordict):
        ...         self.place = self.place + tensordict["action"] + torch.randn(1, generator=self.generator)
        ...         return TensorDict({"place": self.place, "reward": self.place, "done": torch.zeros(1, dtype=torch.bool)})
        ...
        ...     def _set_seed(self, seed):
        ...         self.generator.manual_seed(seed)
        >>> walk, other = Walk(), Walk()
        >>> begun = walk.rollout(5)[-1]["next"].set("action", torch.ones(1))
        >>> other.load_state_dict(walk.state_dict())
        <All keys matched successfully>
        >>> torch.equal(walk.step(begun.clone())["next", "place"], other.step(begun.clone())["next", "place"])
        True
    """

    def why_no_state(self) -> str | None:
        """Why a resumed run begins new trials, in words; None where the env's attributes can be saved."""
        state = state_or_reason(self)
        return state if isinstance(state, str) else None

    def get_extra_state(self) -> Tensor:
        """The env's state, or why it has none, as bytes, uint8 ``[...]``."""
        # One plain tensor, as TensorEnv's: all else TorchRL's EnvCreator would copy into every worker.
        return to_tensor(state_or_reason(self))

    def set_extra_state(self, state: Tensor) -> None:
        """Restores what `get_extra_state` returned."""
        own = from_tensor(state, f"the state of {type(self).__name__}")
        if not isinstance(own, str):
            put_state(self, own)
