"""Several seeds of a recipe side by side, each a program of its own on one thread; then their mean and its band."""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
        SystemExit: some of them have failed, or Ctrl-C has ended them, which each run saves.
    """
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={tuple(seeds)}: each seed once, or one would be weighed twice.")
    words = without_seeds(words)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(cores) as pool:
        ended = list(pool.map(lambda seed: _run(program, seed, log_dir / f"seed{seed}", words), seeds))
    folders = [log_dir / f"seed{seed}" for seed in seeds]
    failed = [folder / "output.txt" for folder, status in zip(folders, ended, strict=True) if status]
    if failed:
        said = "\n".join(f"{path}: {path.read_text().strip().splitlines()[-1]}" for path in failed)
        sys.exit(f"{len(failed)} of {len(seeds)} seeds have not come to their end:\n{said}")
    compare.show([compare.curve_of(log_dir.name, folders)], plot=log_dir / "compare.png")


def without_seeds(words: Sequence[str]) -> list[str]:
    """``words`` of a command line without ``--seeds 0 1 2``."""
    kept, within = [], False
    for word in words:
        within = word.partition("=")[0] == "--seeds" or (within and not word.startswith("--"))
        if not within:
            kept.append(word)
    return kept


def _run(program: Sequence[str], seed: int, folder: Path, words: Sequence[str]) -> int:
    """Exit status of the run of one seed."""
    folder.mkdir(parents=True, exist_ok=True)
    # Networks of a recipe's size are fastest on one thread, and several runs of one thread each do not wait for each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *program, *words, "--seed", str(seed), "--log-dir", str(folder), "--no-progress"]
    with (folder / "output.txt").open("a") as output:
        output.write(f"{' '.join(['python', *command[1:]])}\n")
        output.flush()
        status = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT).returncode
    sys.stdout.write(f"seed {seed}: {'ended' if status == 0 else f'status {status}'}\n")
    return status
