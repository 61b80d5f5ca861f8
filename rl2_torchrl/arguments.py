"""Arguments that Python would take for something else, or refuse far from where they were given: checks for all who take them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, SupportsIndex

__all__ = ["as_list", "require_numbers", "whole"]


def as_list(name: str, values: Iterable) -> list:
    """``values`` as a list, and no single string, whose letters would be taken for them.

    Examples:
        >>> as_list("keep", ("trans", "action"))
        ['trans', 'action']
    """
    if isinstance(values, str):
        raise TypeError(f"{name}={values!r} would be read as its letters: give a list, {name}=[{values!r}].")
    return list(values)


def require_numbers(**arguments: Any) -> None:
    """ValueError where a number is given as text, as it stands in a file or on a command line."""
    for name, value in arguments.items():
        if isinstance(value, str):
            raise ValueError(f"{name}={value!r} is text, not a number: give {name}=float({value!r}), or int.")


def whole(name: str, value: SupportsIndex) -> int:
    """``value`` as Python's integer, NumPy's too; ValueError unless it is a whole number, at least 1.

    Examples:
        >>> whole("epochs", 3)
        3
    """
    if isinstance(value, bool) or not isinstance(value, SupportsIndex) or value.__index__() < 1:
        raise ValueError(f"{name}={value!r} must be a whole number, at least 1.")
    return value.__index__()
