"""A recipe's ``--help``: all settings with their defaults on one screen. What each of them is says ``--help-all``, tyro's own."""

import inspect
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import docstring_parser

__all__ = ["as_typed", "overview", "program"]

WIDTH = 100
_LEGEND = (
    "Values are the defaults, the first of several; ... is none; --xyz turns xyz on, --no-xyz off.",
    "--help-all says what each setting is.",
)


def overview(main: Callable, settings: Mapping[str, Any], typed: str) -> str:
    """The settings of a recipe's ``main``, its own one a line, those that it shares by group.

    Defaults are from ``settings`` first; ``typed`` is what runs the recipe.

    Examples:
        >>> from recipes import half_cheetah
        >>> overview(half_cheetah.main, {}, "python -m recipes.half_cheetah").splitlines()[5]
        '--task direction|velocity   run forward or backward, or at a velocity.'
    """
    doc, hints = docstring_parser.parse(inspect.getdoc(main) or ""), get_type_hints(main)
    said = dict.fromkeys(hints, "") | {each.arg_name: " ".join(each.description.split()) for each in doc.params}
    defaults = {name: settings.get(name, each.default) for name, each in inspect.signature(main).parameters.items()}
    lines = [f"{typed} [settings]", "", *_wrapped(doc.short_description or "")]
    if doc.long_description:
        lines += _wrapped(" ".join(doc.long_description.split()))
    own = {_setting(name, hints[name], value): said[name] for name, value in _own(defaults).items()}
    lines += [""] * bool(own)
    for setting, what in own.items():
        lines += _wrapped(f"{setting:26}  {what}", indent=30)
    for name, group in defaults.items():
        if is_dataclass(group):
            kinds = get_type_hints(type(group))
            each = [_setting(f.name, kinds[f.name], getattr(group, f.name)) for f in fields(group)]
            # A setting and its value stay on one line.
            held = "   ".join(setting.replace(" ", "\0") for setting in each)
            lines += ["", *_wrapped(f"{name}: {said[name]}", indent=0), *_wrapped(held, indent=2, first=2)]
    lines += ["", *_LEGEND]
    return "\n".join(lines).replace("\0", " ")


def program() -> list[str]:
    """Which program runs, as Python is told: a module of ``-m``, or a file."""
    spec = sys.modules["__main__"].__spec__
    return ["-m", spec.name] if spec else [sys.argv[0]]


def as_typed() -> str:
    """The running program, as one types it."""
    return " ".join(["python", *program()])


def _own(defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in defaults.items() if not is_dataclass(value)}


def _setting(name: str, kind: Any, value: Any) -> str:
    """A setting as it is typed, with its default."""
    flag = name.replace("_", "-")
    if value in (None, inspect.Parameter.empty):
        return f"--{flag} ..."
    if kind is bool:
        return f"--no-{flag}" if value else f"--{flag}"
    if get_origin(kind) is Literal:
        return f"--{flag} {'|'.join([value, *(choice for choice in get_args(kind) if choice != value)])}"
    if isinstance(value, tuple):
        return f"--{flag} {' '.join(map(str, value)) or '...'}"
    return f"--{flag} {value:.4g}" if isinstance(value, float) else f"--{flag} {value}"


def _wrapped(text: str, indent: int = 0, first: int = 0) -> list[str]:
    options = {"initial_indent": " " * first, "subsequent_indent": " " * indent, "break_on_hyphens": False}
    return textwrap.wrap(text, WIDTH, break_long_words=False, drop_whitespace=True, **options)
