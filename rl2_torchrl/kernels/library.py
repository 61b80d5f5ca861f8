"""`compiled`: a shared library of C sources, kept between programs in `cache_folder`."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from torchrl import torchrl_logger

__all__ = ["cache_folder", "compiled"]

_SHARED = ("-shared", "-fPIC")
#: Seconds for a compiler to end: it takes two of them, and under sanitizers on a busy machine a hundred.
_PATIENCE = 300


def cache_folder() -> Path:
    """Where the package keeps what it computes once for all programs: made if need be, and this user's alone to write.

    The first that will do of ``$XDG_CACHE_HOME/rl2_torchrl``, ``~/.cache/rl2_torchrl``, and one among the temporary files.

    Raises:
        OSError: none of them will do.
    """
    reasons = []
    for folder in _candidates():
        try:
            return _own(folder)
        except OSError as error:
            reasons.append(str(error))
    raise OSError(
        f"there is no folder to keep anything in: {'; '.join(reasons)}. Set XDG_CACHE_HOME to one of your own."
    )


def _candidates() -> Iterator[Path]:
    # What is no absolute path does not count, by the XDG specification: code would be loaded from the current folder.
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if given.is_absolute():
        yield given / "rl2_torchrl"
    with suppress(RuntimeError):  # no HOME, and a user whom the system does not know, as in containers
        if Path.home().is_absolute():
            yield Path.home() / ".cache" / "rl2_torchrl"
    yield Path(tempfile.gettempdir()).absolute() / f"rl2_torchrl-{os.geteuid()}"


def _own(folder: Path) -> Path:
    """``folder``, once it is there, and nobody else can put anything into it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise PermissionError(f"{folder} is a link, or another user's")
    if status.st_mode & 0o022:  # made so by a lenient umask
        folder.chmod(0o700)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PermissionError(f"{folder} is not writable")
    return folder


def compiled(sources: Sequence[Path], flags: Sequence[str]) -> Path:
    """The shared library of C ``sources`` (and their headers), from `cache_folder` or compiled into it.

    Its name holds what it was made from and a digest of what is in it, so a damaged one is noticed and made anew.

    Raises:
        OSError: there is no compiler, or it fails, does not end or makes no library; or there is nowhere to keep it.
    """
    compiler, folder = _compiler(), cache_folder()
    name = f"kernels-{_fingerprint(compiler, sources, flags)}"
    for path in folder.glob(f"{name}-*.so"):
        if _is_sound(path):
            return path
        torchrl_logger.warning(f"rl2_torchrl: {path} is damaged, or another user could have written it; made anew.")
        path.unlink(missing_ok=True)
    torchrl_logger.info(f"rl2_torchrl: compiling the kernels once, into {folder}")
    # Workers may compile at the same time: each into a file of its own, then moved into place at once.
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        library = Path(scratch) / "kernels.so"
        units = [str(source) for source in sources if source.suffix == ".c"]
        arguments = [*_SHARED, *flags, *units, "-o", str(library), "-lm"]
        try:
            _run([*compiler, "-fopenmp", *arguments])
        except ChildProcessError:  # a compiler without OpenMP (Apple's): for one thread
            _run([*compiler, *arguments])
        ctypes.CDLL(str(library))  # what cannot be loaded is not kept
        library.chmod(0o700)
        return library.replace(folder / f"{name}-{_digest(library.read_bytes())}.so")


def _is_sound(path: Path) -> bool:
    status = path.lstat()
    is_ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022
    return is_ours and path.stem.endswith(_digest(path.read_bytes()))


def _compiler() -> list[str]:
    """The compiler and its first arguments, as in ``CC="ccache gcc"``."""
    given = os.environ.get("CC", "")
    try:
        command = shlex.split(given)
    except ValueError as error:
        raise OSError(f"CC={given!r} is no command: {error}.") from error
    command = command or list(filter(shutil.which, ("cc", "gcc", "clang")))[:1]
    if not command:
        raise OSError("There is no C compiler on the path; set CC, or install gcc or clang.")
    return command


def _fingerprint(compiler: list[str], sources: Sequence[Path], flags: Sequence[str]) -> str:
    """Changes with the source, the compiler and what the processor can do, as a home folder may serve many machines."""
    macros = _run([*compiler, *flags, "-dM", "-E", "-x", "c", os.devnull])
    texts = b"".join(source.read_bytes() for source in sources)
    return _digest(texts + macros.encode() + repr((compiler, _SHARED, flags)).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _run(command: list[str]) -> str:
    """What ``command`` writes; OSError where it does not end, ChildProcessError where it fails."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **pipes, text=True, errors="replace", start_new_session=True)
    try:
        out, errors = process.communicate(timeout=_PATIENCE)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)  # with all that it has started; nobody has waited for it, so it is there
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise TimeoutError(f"{command[0]} has not ended in {_PATIENCE} seconds.") from error
    if process.returncode:
        raise ChildProcessError(f"{command[0]} failed: {errors}")
    return out
