"""Several seeds of a recipe side by side, each a program of its own on one thread; then their mean and its band."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recipes import compare


def run_seeds(program: Sequence[str], seeds: Sequence[int], log_dir: Path, words: Sequence[str]) -> None:
    """Runs ``python *program`` for each seed, as many at once as there are cores, in ``log_dir/seed0`` and so on.

    What a run says goes to ``output.txt`` in its folder, below what was said before. A seed that fails leaves the others alone.

    Args:
        program: the recipe, such as ``["-m", "recipes.bandit"]`` or ``["mine.py"]``.
        seeds: one run each.
        log_dir: folder of the runs' folders, and of the comparison.
        words: the command's further words; ``--seeds`` among them is left out.

    Raises:
        SystemExit: some of them have failed; or Ctrl-C, SIGTERM or SIGHUP has ended them, which each run saves: its status is as a
            shell has it.
    """
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={tuple(seeds)}: each seed once, or one would be weighed twice.")
    words = without_seeds(words)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    programs = _Programs()
    with programs.ending_with_this_one(), ThreadPoolExecutor(cores) as pool:
        ended = list(pool.map(lambda seed: _run(programs, program, seed, log_dir / f"seed{seed}", words), seeds))
    folders = [log_dir / f"seed{seed}" for seed in seeds]
    failed = [_last_words(folder, status) for folder, status in zip(folders, ended, strict=True) if status != 0]
    if failed:
        said = "\n".join([f"{len(failed)} of {len(seeds)} seeds have not come to their end:", *failed])
        if programs.ended_by is None:
            sys.exit(said)
        sys.stderr.write(f"{said}\n")
        sys.exit(128 + programs.ended_by)
    compare.show([compare.curve_of(log_dir.name, folders)], plot=log_dir / "compare.png")


def without_seeds(words: Sequence[str]) -> list[str]:
    """``words`` of a command line without ``--seeds 0 1 2``."""
    kept, within = [], False
    for word in words:
        within = word.partition("=")[0] == "--seeds" or (within and not word.startswith("--"))
        if not within:
            kept.append(word)
    return kept


class _Programs:
    """Programs side by side.

    Attributes:
        ended_by: the signal that ends them, or None; once it has come, no other one is begun.
    """

    def __init__(self):
        self.ended_by: int | None = None
        self._begun: list[subprocess.Popen] = []
        self._lock = threading.RLock()  # one signal may come while another is passed on

    def run(self, command: Sequence[str], **options: Any) -> int | None:
        """Exit status of a program, None of one that is not begun any more; ``options`` go to `subprocess.Popen`."""
        with self._lock:
            if self.ended_by is not None:
                return None
            process = subprocess.Popen(command, **options)
            self._begun.append(process)
        return process.wait()

    @contextmanager
    def ending_with_this_one(self) -> Iterator[None]:
        """SIGTERM and SIGHUP are passed on; Ctrl-C reaches every program of a terminal by itself. What is ignored stays so."""
        signums = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        before = {signum: handler for signum in signums if (handler := signal.getsignal(signum)) is not signal.SIG_IGN}
        for signum in before:
            signal.signal(signum, self._end)
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, signal.SIG_DFL if handler is None else handler)  # None: it was not set by Python

    def _end(self, signum: int, frame: Any) -> None:
        with self._lock:
            self.ended_by = self.ended_by or signum
            for process in self._begun if signum != signal.SIGINT else ():
                process.send_signal(signum)


def _run(programs: _Programs, program: Sequence[str], seed: int, folder: Path, words: Sequence[str]) -> int | None:
    """Exit status of the run of one seed; None: it was not begun."""
    folder.mkdir(parents=True, exist_ok=True)
    # Networks of a recipe's size are fastest on one thread, and several runs of one thread each do not wait for each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *program, *words, "--seed", str(seed), "--log-dir", str(folder), "--no-progress"]
    with (folder / "output.txt").open("a") as output:
        output.write(f"{' '.join(['python', *command[1:]])}\n")
        output.flush()
        status = programs.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    ends = {0: "ended", None: "not begun"}
    sys.stdout.write(f"seed {seed}: {ends.get(status, f'status {status}')}\n")
    return status


def _last_words(folder: Path, status: int | None) -> str:
    """What the run of a seed has said last, and where more of it stands."""
    path = folder / "output.txt"
    return f"{path}: {'not begun' if status is None else path.read_text().strip().splitlines()[-1]}"
