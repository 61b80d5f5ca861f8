"""Refuses, when imported, a TorchRL or TensorDict that this package was not made for: later, errors would come from deep inside."""

from __future__ import annotations

from importlib.metadata import version

__all__ = ["SUPPORTED"]

#: As in pyproject.toml: the first minor version that will do, and the first that will not.
SUPPORTED = {"torchrl": ("0.14", "0.15"), "tensordict": ("0.14", "0.15")}


def _minor(release: str) -> tuple[int, ...]:
    return tuple(int(number) for number in release.split(".")[:2])


for _name, (_first, _beyond) in SUPPORTED.items():
    _installed, _needed = version(_name), f"{_name}>={_first},<{_beyond}"
    if not _minor(_first) <= _minor(_installed) < _minor(_beyond):
        raise ImportError(
            f"rl2_torchrl needs {_needed}, whose transforms and losses it builds on, and {_installed} is installed: "
            f'pip install "{_needed}", or look for a newer rl2_torchrl.'
        )
