"""The state of a TorchRL env for a checkpoint, whatever it is made of: transforms, and rows side by side, here or in processes.

An env hands out its state as PyTorch's modules do, by ``get_extra_state()`` and ``set_extra_state(state)``. One that cannot always
do so says the reason, or None, by a method ``why_no_state()``.
"""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from torchrl.envs import EnvBase, ParallelEnv, SerialEnv

from rl2_torchrl.codec import NoStateError

__all__ = ["env_state", "put_env_state"]


def env_state(env: EnvBase | _Elsewhere) -> dict[str, Any]:
    """Where ``env`` stands, in the middle of an episode.

    Args:
        env: any env, or a ``SerialEnv`` or ``ParallelEnv`` of them.

    Raises:
        NoStateError: it, or an env within it, cannot say where it stands.

    Examples:
        >>> import torch
        >>> from rl2_torchrl.envs import BernoulliBandit
        >>> bandits = SerialEnv(2, lambda: BernoulliBandit(2))
        >>> first = bandits.reset().set("action", torch.tensor([0, 1]))
        >>> saved = env_state(bandits)
        >>> once = bandits.step(first.clone())["next", "reward"]
        >>> put_env_state(bandits, saved)
        >>> torch.equal(bandits.step(first)["next", "reward"], once)
        True
    """
    if isinstance(env, SerialEnv | ParallelEnv):
        if env.is_closed:
            raise NoStateError(f"the {type(env).__name__} has closed its envs, as it does after the last batch")
        return {f"worker{number}": env_state(row) for number, row in enumerate(_rows(env))}
    names = dir(env)
    if "base_env" in names:  # a TransformedEnv, which hands out its transforms' state alone
        return {"transform": env.transform.state_dict(), "base_env": env_state(env.base_env)}
    if "why_no_state" in names and (reason := env.why_no_state()) is not None:
        raise NoStateError(reason)
    state = env.state_dict()
    if "_extra_state" not in state:
        raise NoStateError(
            f"{env._get_name()} does not hand out its state: derive it from rl2_torchrl.envs.Resumable first, or write "
            "get_extra_state and set_extra_state"
        )
    return state


def put_env_state(env: EnvBase | _Elsewhere, state: dict[str, Any]) -> None:
    """Puts back what `env_state` returned, into the same env or one that was made alike.

    Raises:
        ValueError: it is the state of another number of rows.
    """
    if isinstance(env, SerialEnv | ParallelEnv):
        rows = _rows(env)
        if len(state) != len(rows):
            raise ValueError(f"the state is one of {len(state)} rows, and this env has {len(rows)}: make it as it was.")
        for number, row in enumerate(rows):
            put_env_state(row, state[f"worker{number}"])
    elif "base_env" in state:
        env.transform.load_state_dict(state["transform"])
        put_env_state(env.base_env, state["base_env"])
    else:
        env.load_state_dict(state)


def _rows(env: SerialEnv | ParallelEnv) -> Sequence[EnvBase | _Elsewhere]:
    if isinstance(env, SerialEnv):
        return env._envs
    if not env._use_buffers:
        raise NoStateError("a ParallelEnv without buffers does not ask its envs for their state")
    return [_Elsewhere(channel) for channel in env.parent_channels]


class _Elsewhere:
    """An env in a process of a ``ParallelEnv``, or what ``names`` lead to from there: what is called is called there.

    It is asked for as a ``ParallelEnv`` asks for attributes of attributes, whose own ``load_state_dict`` leaves a flag that makes
    its next step return before it is taken.
    """

    def __init__(self, channel: Connection, *names: str):
        self._channel, self._names = channel, names

    def __getattr__(self, name: str) -> _Elsewhere:
        return _Elsewhere(self._channel, *self._names, name)

    def __dir__(self) -> list[str]:
        return self.__getattr__("__dir__")()

    def __call__(self, *given: Any) -> Any:
        try:
            self._channel.send((self._names, (given, {})))
            return self._channel.recv()[1]
        except (EOFError, OSError) as error:
            raise NoStateError(f"a process of the ParallelEnv has ended ({type(error).__name__})") from error
