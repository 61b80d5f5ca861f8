"""The state of a TorchRL env for a checkpoint, whatever it is made of: transforms, and rows side by side, here or in processes.

An env hands out its state as PyTorch's modules do, by ``get_extra_state()`` and ``set_extra_state(state)``. One that cannot always
do so says the reason, or None, by a method ``why_no_state()``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from multiprocessing.connection import Connection
from typing import Any

from torchrl.envs import EnvBase, ParallelEnv, SerialEnv, TransformedEnv

from rl2_torchrl.envs.plain_data import NoStateError

__all__ = ["env_state", "put_env_state"]

#: Asks an env, here or elsewhere, for an attribute of an attribute …; a method is called with what is ``given``.
Ask = Callable[..., Any]


def env_state(env: EnvBase) -> dict[str, Any]:
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
    if isinstance(env, TransformedEnv):  # which hands out its transforms' state alone
        return {"transform": env.transform.state_dict(), "base_env": env_state(env.base_env)}
    if not isinstance(env, SerialEnv | ParallelEnv):
        return _state(partial(_ask_here, env))
    if env.is_closed:
        raise NoStateError(f"the {type(env).__name__} has closed its envs, as it does after the last batch")
    return {f"worker{number}": _state(ask) for number, ask in enumerate(_rows(env))}


def put_env_state(env: EnvBase, state: dict[str, Any]) -> None:
    """Puts back what `env_state` returned, into the same env or one that was made alike.

    Raises:
        ValueError: it is the state of another number of rows.
    """
    if isinstance(env, TransformedEnv):
        env.transform.load_state_dict(state["transform"])
        return put_env_state(env.base_env, state["base_env"])
    if not isinstance(env, SerialEnv | ParallelEnv):
        return _put(partial(_ask_here, env), state)
    rows = _rows(env)
    if len(state) != len(rows):
        raise ValueError(f"the state is one of {len(state)} rows, and this env has {len(rows)}: make it as it was.")
    for number, ask in enumerate(rows):
        _put(ask, state[f"worker{number}"])


def _state(ask: Ask) -> dict[str, Any]:
    names = ask("__dir__")
    if "base_env" in names:
        return {"transform": ask("transform", "state_dict"), "base_env": _state(partial(ask, "base_env"))}
    if "why_no_state" in names and (reason := ask("why_no_state")) is not None:
        raise NoStateError(reason)
    state = ask("state_dict")
    if "_extra_state" not in state:
        raise NoStateError(
            f"{ask('__class__', '__name__')} does not hand out its state: derive it from rl2_torchrl.envs.Resumable first, or "
            "write get_extra_state and set_extra_state"
        )
    return state


def _put(ask: Ask, state: dict[str, Any]) -> None:
    if "base_env" in state:
        ask("transform", "load_state_dict", given=(state["transform"],))
        _put(partial(ask, "base_env"), state["base_env"])
    else:
        ask("load_state_dict", given=(state,))


def _rows(env: SerialEnv | ParallelEnv) -> list[Ask]:
    if isinstance(env, SerialEnv):
        return [partial(_ask_here, row) for row in env._envs]
    if not env._use_buffers:
        raise NoStateError("a ParallelEnv without buffers does not ask its envs for their state")
    return [partial(_ask_there, channel) for channel in env.parent_channels]


def _ask_here(env: EnvBase, *names: str, given: Sequence[Any] = ()) -> Any:
    found = reduce(getattr, names, env)
    return found(*given) if callable(found) else found


def _ask_there(channel: Connection, *names: str, given: Sequence[Any] = ()) -> Any:
    """As `_ask_here`, in a process of a ``ParallelEnv``, in the way in which it asks for attributes of attributes.

    Its own ``load_state_dict`` leaves a flag that makes its next step return before it is taken.
    """
    try:
        channel.send((names, (given, {})))
        return channel.recv()[1]
    except (EOFError, OSError) as error:
        raise NoStateError(f"a process of the ParallelEnv has ended ({type(error).__name__})") from error
