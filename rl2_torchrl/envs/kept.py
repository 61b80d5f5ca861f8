"""`KeptByTransforms`: what transforms keep in attributes that change as a run goes on, such as a filter's mean, for checkpoints."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torchrl.envs import Transform

from rl2_torchrl.envs.plain_data import NoStateError, Restorer, Saver
from rl2_torchrl.storage import from_tensor, to_tensor

__all__ = ["KeptByTransforms"]

#: What PyTorch's modules and TorchRL's transforms are made of.
_INNER = {*vars(nn.Module()), "_container", "_parent", "_missing_tolerance"}


class KeptByTransforms:
    """Attributes of ``transforms``, by their names, that have changed since this was made; a ``state_dict`` holds buffers alone.

    Attributes may be what `Saver` knows. A transform that has a ``get_extra_state`` says by itself what it keeps.

    Examples:
        >>> from torchrl.envs import Transform
        >>> first, second = Transform(), Transform()
        >>> kept, others = KeptByTransforms({"filter": first}), KeptByTransforms({"filter": second})
        >>> first.mean = torch.ones(2)
        >>> others.load_state_dict(kept.state_dict())
        >>> second.mean
        tensor([1., 1.])
    """

    def __init__(self, transforms: Mapping[str, Transform]):
        self._transforms = {name: each for name, each in transforms.items() if not _says_itself(each)}
        self._first = {name: _digests(_attributes(each)) for name, each in self._transforms.items()}

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """By transform and attribute what is another by now, as bytes."""
        state = {}
        for name, transform in self._transforms.items():
            first, now = self._first[name], _attributes(transform)
            changed = [each for each, digest in _digests(now).items() if digest != first.get(each)]
            state[name] = {each: to_tensor(now[each]) for each in changed}
        return {name: changed for name, changed in state.items() if changed}

    def load_state_dict(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Gives the transforms that are there what `state_dict` returned; from now on their buffers can be written over."""
        for transform in self._transforms.values():
            _unshare_buffers(transform)
        for name, attributes in state.items():
            if (transform := self._transforms.get(name)) is not None:
                for each, value in attributes.items():
                    vars(transform)[each] = Restorer(_packages(transform))(from_tensor(value, f"{name}.{each}"))

    def holds(self, name: str, attribute: str) -> bool:
        """Whether the ``attribute`` of the transform ``name`` is among what is saved once it has changed."""
        return name in self._transforms and attribute in _attributes(self._transforms[name])


def _says_itself(transform: Transform) -> bool:
    return type(transform).get_extra_state is not nn.Module.get_extra_state


def _unshare_buffers(transform: Transform) -> None:
    """Gives those memory of their own of which one number stands for several, as in TorchRL's `ActionDiscretizer`."""
    for module in transform.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and 0 in buffer.stride():
                module._buffers[name] = buffer.clone(memory_format=torch.contiguous_format)


def _packages(transform: Transform) -> set[str]:
    return {type(transform).__module__.partition(".")[0]} - {"torchrl"}  # whose objects are specs and envs


def _attributes(transform: Transform) -> dict[str, Any]:
    """Those that `Saver` knows, as it takes them apart, by their names."""
    found = {}
    for name, value in vars(transform).items():
        if name in _INNER or isinstance(value, nn.Module):
            continue
        try:
            found[name] = Saver(_packages(transform))(value, name)
        except NoStateError:  # a function, a spec, …
            continue
    return found


def _digests(attributes: Mapping[str, Any]) -> dict[str, str]:
    return {name: hashlib.sha256(b"".join(_bytes(value))).hexdigest() for name, value in attributes.items()}


def _bytes(saved: Any) -> Iterator[bytes]:
    """What `Saver` gave, in bytes that are the same for the same."""
    if isinstance(saved, list | tuple):
        yield f"{type(saved).__name__} {len(saved)}".encode()
        for each in saved:
            yield from _bytes(each)
    elif isinstance(saved, dict):
        yield from _bytes([list(item) for item in saved.items()])
    elif isinstance(saved, torch.Tensor):
        yield f"{saved.dtype} {tuple(saved.shape)}".encode()
        yield saved.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    elif isinstance(saved, np.ndarray):
        yield f"{saved.dtype} {saved.shape}".encode()
        yield saved.tobytes()
    else:
        yield repr(saved).encode()
