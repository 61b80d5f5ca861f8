"""The command lines of all programs here: what was asked wrongly is told in one line, and no word may be empty."""

import re
import shlex
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tyro

from recipes.help import as_typed

__all__ = ["cli", "told_in_a_line"]

#: Folders of what is raised on purpose, and of what others have written that users only call.
OURS = {Path(__file__).parent, Path(__file__).parents[1] / "rl2_torchrl"}
LIBRARIES = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}


@contextmanager
def told_in_a_line() -> Iterator[None]:
    """An error that recipes or package raise on purpose ends the program with its words, and the user's line that led to it.

    All others have their traceback, and so has one with a cause, which may be in an env of one's own.

    Raises:
        SystemExit: there was such an error.
    """
    try:
        _require_words(sys.argv[1:])
        yield
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        is_ours = not OURS.isdisjoint(Path(frames[-1].filename).parents)
        if not is_ours or not frames[-1].line.startswith("raise ") or error.__cause__ is not None:
            raise
        program = getattr(sys.modules["__main__"], "__file__", None)
        lines = [frame for frame in frames if frame.filename == program or _is_users(frame.filename)]
        where = f" ({Path(lines[-1].filename).name}, line {lines[-1].lineno})" if lines else ""
        words = error.args[0] if isinstance(error, KeyError) else error
        sys.exit("\n".join((f"error: {words}{where}", *getattr(error, "__notes__", []))))


def _is_users(file: str) -> bool:
    return not file.startswith("<") and (OURS | LIBRARIES).isdisjoint(Path(file).parents)


@told_in_a_line()
def cli(main: Callable) -> Any:
    """Runs ``main`` as a command."""
    return tyro.cli(main, prog=as_typed())


def _require_words(words: list[str]) -> None:
    """ValueError where a word is empty: a path of it would be the current folder."""
    if any(re.fullmatch(r"(--[\w.-]+=)?", word) for word in words):
        raise ValueError(
            f"an empty value in {shlex.join(words)}: is a variable of the shell not set? Give one, or leave it out; the current "
            "folder is '.'."
        )
