"""The kernels' own tests, on kernels that look for reads and writes out of bounds and undefined behaviour (ASan, UBSan)."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rl2_torchrl.kernels import library

#: Behind the package's own: at -O3 the compiler takes three times as long, and has left out some of what is looked for.
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1 -O1"
TESTS = (
    "tests/test_kernels.py",
    "tests/test_gru.py",
    "tests/test_gradients.py",
    "tests/test_gradients_composed.py",
    "tests/test_parts.py",
    "tests/test_replays.py",
    "tests/test_replays_composed.py",
    "tests/test_recorded_step.py",
)
#: Among them what leaves all to PyTorch and its compiler, at length.
WITHOUT_KERNELS = (
    "tests/test_gru.py::test_what_is_not_covered_takes_torchrls_path",
    "tests/test_gru.py::test_compiled_program_gives_the_same_numbers",
)
OUT_OF_BOUNDS = """
import torch
from rl2_torchrl import kernels
kernels.load(torch.float32).saved_size(1, 1)
print("has loaded", flush=True)
x, y = torch.zeros(1000), torch.zeros(999)
kernels.load(torch.float32).tanh_forward(1000, x.data_ptr(), y.data_ptr(), 1)
"""


def sanitized(folder):
    """The environment of a process whose kernels are sanitized and kept in ``folder``, or the reason why there is none."""
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None or sys.platform != "linux":
        return "needs a C compiler, and Linux"
    # The runtime must be loaded before all else, and C++'s exceptions with it, which ASan looks for once, at its start.
    runtimes = [
        library._run([compiler, f"-print-file-name={name}"]).strip() for name in ("libasan.so", "libstdc++.so.6")
    ]
    if not all(map(os.path.isabs, runtimes)):
        return f"{compiler} has no AddressSanitizer"
    sanitizer = folder / "cc"
    sanitizer.write_text(f'#!/bin/sh\nexec {shlex.quote(compiler)} "$@" {FLAGS}\n')
    sanitizer.chmod(0o700)
    options = {"ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(runtimes),
        "CC": str(sanitizer),
        "XDG_CACHE_HOME": str(folder),
        "OMP_NUM_THREADS": "2",
        **options,
    }


@pytest.fixture(scope="module")
def sanitized_run(tmp_path_factory):
    """What runs Python with arguments on sanitized kernels; the exit status and all that is written of `OUT_OF_BOUNDS`."""
    environment = sanitized(tmp_path_factory.mktemp("sanitized"))
    if isinstance(environment, str):
        pytest.skip(environment)

    def run(*arguments):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        root = Path(__file__).parents[1]
        process = subprocess.run([sys.executable, *arguments], cwd=root, env=environment, text=True, **pipes)
        return process.returncode, process.stdout

    status, output = run("-c", OUT_OF_BOUNDS)
    if "has loaded" not in output:
        pytest.skip(f"PyTorch does not run under the sanitizers here: {output[-500:]}")
    return run, status, output


def test_the_kernels_are_clean(sanitized_run):
    run, *_ = sanitized_run
    options = ("-n", "0", "-p", "no:cacheprovider", "-x", *(f"--deselect={test}" for test in WITHOUT_KERNELS))
    status, output = run("-m", "pytest", *options, *TESTS)
    assert status == 0, output[-5000:]
    assert " passed" in output
    assert "runtime error" not in output


def test_a_write_out_of_bounds_would_be_seen(sanitized_run):
    _, status, output = sanitized_run
    assert status
    assert "heap-buffer-overflow" in output
