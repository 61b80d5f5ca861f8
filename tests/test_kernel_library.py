"""Where compiled kernels come from: compiled once, kept safely, and whatever goes wrong there, PyTorch takes over."""

import ctypes
import os
import pwd
import shutil
import stat
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

from rl2_torchrl import kernels
from rl2_torchrl.kernels import library

needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own, beside which nothing of the user's stands in the environment."""
    for name in ("CC", "RL2_TORCHRL_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rl2_torchrl"


@pytest.fixture
def warnings(monkeypatch):
    messages = []
    monkeypatch.setattr(kernels, "_is_announced", False)
    monkeypatch.setattr(kernels.torchrl_logger, "warning", messages.append)
    return messages


@pytest.fixture
def commands(monkeypatch):
    """The commands that were run."""
    run, ran = library._run, []
    monkeypatch.setattr(library, "_run", lambda command: ran.append(command) or run(command))
    return ran


@pytest.fixture
def three(tmp_path):
    """Makes a library whose ``three()`` is 3."""
    source = tmp_path / "three.c"
    source.write_text("int three(void) { return 3; }\n")
    return lambda: library.compiled([source], ("-O1",))


def script(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return path


def load_all():
    """Loads both dtypes' kernels, past what this process has loaded already."""
    return [kernels.load.__wrapped__(dtype) for dtype in (torch.float32, torch.float64)]


# ------------------------------------------------------------------ the cache
@needs_compiler
def test_a_library_is_compiled_once(cache, commands, three):
    first = three()
    assert first.parent == cache
    assert list(cache.iterdir()) == [first]
    compilations = len([command for command in commands if "-shared" in command])
    assert three() == first
    assert len([command for command in commands if "-shared" in command]) == compilations == 1


@needs_compiler
@pytest.mark.parametrize("what", ["source", "flags", "compiler", "processor"])
def test_another_source_flag_compiler_or_processor_makes_another_library(cache, tmp_path, monkeypatch, three, what):
    if what == "processor":  # of which a compiler tells by its macros
        monkeypatch.setenv("CC", str(script(tmp_path / "cc", 'exec cc "$@"')))
    first = three()
    if what == "processor":
        script(tmp_path / "cc", 'exec cc -D__AVX1024__ "$@"')
    if what == "source":
        (tmp_path / "three.c").write_text("int three(void) { return 4; }\n")
    if what == "compiler":
        monkeypatch.setenv("CC", "cc -DELSE")
    second = library.compiled([tmp_path / "three.c"], ("-O0",)) if what == "flags" else three()
    # All but the digest of what is in it, which may be the same.
    assert first.stem.rsplit("-", 1)[0] != second.stem.rsplit("-", 1)[0]


def damaged(whole, how):
    half = len(whole) // 2
    return {
        "empty": b"",
        "cut short": whole[:half],
        "zeros": whole[:half] + bytes(len(whole) - half),
        "a flipped bit": whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :],
        "longer": whole + b"more",
    }[how]


@needs_compiler
@pytest.mark.parametrize("how", ["empty", "cut short", "zeros", "a flipped bit", "longer"])
def test_a_damaged_library_is_noticed_and_made_anew(cache, warnings, three, how):
    path = three()
    whole = path.read_bytes()
    path.unlink()  # this process holds the whole one, and would end with a bus error if it changed under it
    path.write_bytes(damaged(whole, how))
    again = three()
    assert again.read_bytes() == whole  # to load a damaged one would end this process
    assert ctypes.CDLL(str(again)).three() == 3
    assert list(cache.iterdir()) == [again]
    assert "damaged" in warnings[0]


@needs_compiler
def test_several_may_compile_at_once(cache, three):
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(three())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths == [paths[0]] * 4
    assert list(cache.iterdir()) == [paths[0]]  # nothing half made is left


@needs_compiler
@pytest.mark.parametrize("how", ["writable by all", "writable by the group", "a link", "another user's"])
def test_nothing_is_loaded_that_another_user_could_have_written(cache, tmp_path, monkeypatch, warnings, three, how):
    path = three()
    if how == "a link":
        path.replace(tmp_path / "elsewhere.so")
        path.symlink_to(tmp_path / "elsewhere.so")
    elif how == "another user's":
        if os.geteuid():
            pytest.skip("only root can give a file away")
        os.chown(path, 12345, -1)
    else:
        path.chmod(0o702 if how == "writable by all" else 0o720)
    status = three().lstat()
    assert stat.S_ISREG(status.st_mode)
    assert status.st_uid == os.geteuid()
    assert not status.st_mode & 0o022
    assert "another user" in warnings[0]


@needs_compiler
def test_a_lenient_umask_does_not_compile_anew_each_time(cache, three):
    before = os.umask(0o000)
    try:
        first = three()
        inode = first.stat().st_ino
        assert three().stat().st_ino == inode
        assert not cache.stat().st_mode & 0o022
    finally:
        os.umask(before)


# ----------------------------------------------------------------- the folder
def test_a_folder_that_others_may_write_to_is_closed_to_them(cache):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    assert library.cache_folder() == cache
    assert not cache.stat().st_mode & 0o022


def test_a_link_and_anothers_folder_are_not_taken(cache, tmp_path, monkeypatch):
    target = tmp_path / "target"
    target.mkdir(mode=0o755)
    target.chmod(0o777)
    cache.parent.mkdir()
    cache.symlink_to(target)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert library.cache_folder() == tmp_path / "home" / ".cache" / "rl2_torchrl"
    assert target.stat().st_mode & 0o777 == 0o777, "what a link points to may be anybody's"
    user = os.geteuid()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    # Of the three candidates only the last has not been made yet, by `user`; made now it is still not of `user + 1`.
    with pytest.raises(OSError, match="another user's.*Set XDG_CACHE_HOME"):
        library.cache_folder()


@pytest.mark.parametrize("given", ["", "here", "./here", "../here"])
@pytest.mark.parametrize("home", ["/home/somebody", "", "here"])
def test_nothing_is_taken_from_the_current_folder(tmp_path, monkeypatch, given, home):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(tempfile, "tempdir", "/temporary")
    monkeypatch.setattr(library, "_own", lambda folder: folder)
    folder = library.cache_folder()
    assert folder.is_absolute()
    assert "here" not in folder.parts


def test_without_a_home_there_is_a_folder_among_the_temporary_files(tmp_path, monkeypatch):
    def unknown(user):
        raise KeyError(user)

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = library.cache_folder()
    assert folder == tmp_path / f"rl2_torchrl-{os.geteuid()}"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_where_a_folder_cannot_be_made_the_next_is_taken(cache, tmp_path, monkeypatch):
    cache.parent.write_text("a file where the folder should be")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert library.cache_folder() == tmp_path / "home" / ".cache" / "rl2_torchrl"


# --------------------------------------------------------------- the compiler
@needs_compiler
@pytest.mark.parametrize("form", ["{0} cc", "'{0}' cc -DTWO", "  {0}   cc  "])
def test_a_compiler_with_arguments(cache, tmp_path, monkeypatch, three, form):
    folder = tmp_path / ("with space" if "'" in form else "plain")
    wrapper = script(folder / "ccache", f'echo "$@" >> {tmp_path}/log\nexec "$@"')
    monkeypatch.setenv("CC", form.format(wrapper))
    assert ctypes.CDLL(str(three())).three() == 3
    assert (tmp_path / "log").read_text().startswith("cc ")


@needs_compiler
def test_an_empty_CC_is_none(cache, monkeypatch, three):
    monkeypatch.setenv("CC", "")
    assert ctypes.CDLL(str(three())).three() == 3


@needs_compiler
def test_a_compiler_without_openmp_compiles_for_one_thread(cache, tmp_path, monkeypatch, three):
    wrapper = script(tmp_path / "cc-without", 'case "$*" in *-fopenmp*) exit 1;; esac\nexec cc "$@"')
    monkeypatch.setenv("CC", str(wrapper))
    assert ctypes.CDLL(str(three())).three() == 3


def test_a_hanging_compiler_is_ended_with_all_that_it_has_started(cache, tmp_path, monkeypatch, three):
    hanging = script(tmp_path / "hanging", f"sleep 1000 & echo $! > {tmp_path}/child\nwait")
    monkeypatch.setenv("CC", str(hanging))
    monkeypatch.setattr(library, "_PATIENCE", 1)
    with pytest.raises(TimeoutError, match="hanging has not ended in 1 seconds"):
        three()
    status = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    for _ in range(100):  # until init has taken note of its end
        if not status.exists() or status.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("what the compiler had started runs on")


FAULTS = ["false", "true", "no-such-compiler", "'", "hanging", "makes an empty file", "makes a text"]


@pytest.mark.parametrize("compiler", FAULTS)
def test_whatever_goes_wrong_pytorch_takes_over_and_the_log_says_so_once(
    cache, tmp_path, monkeypatch, warnings, compiler
):
    monkeypatch.setattr(library, "_PATIENCE", 0.5)
    find_out = 'while [ "$1" != -o ]; do [ $# = 0 ] && exit; shift; done; '
    texts = {
        "hanging": "sleep 1000",
        "makes an empty file": f'{find_out} : > "$2"',
        "makes a text": f'{find_out} echo no > "$2"',
    }
    if compiler in texts:
        compiler = str(script(tmp_path / "odd", texts[compiler]))
    monkeypatch.setenv("CC", compiler)
    assert load_all() == [None, None]
    assert len(warnings) == 1
    assert "PyTorch's operations do the same" in warnings[0]
    assert not list(cache.glob("*")), "what is no library is kept"


def test_no_compiler_at_all(cache, monkeypatch, warnings):
    monkeypatch.setenv("PATH", "")
    assert load_all() == [None, None]
    assert len(warnings) == 1
    assert "There is no C compiler on the path" in warnings[0]


def test_nowhere_to_keep_them(cache, monkeypatch, warnings):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(library.tempfile, "TemporaryDirectory", full)
    assert load_all() == [None, None]
    assert len(warnings) == 1


def test_environment_variable_turns_the_kernels_off(monkeypatch, warnings):
    monkeypatch.setenv("RL2_TORCHRL_KERNELS", "0")
    assert load_all() == [None, None]
    assert not warnings


@needs_compiler
def test_kernels_of_a_new_cache_are_kernels(cache):
    for loaded in load_all():
        assert loaded.saved_size(16, 64) == 352  # 5 * 64 + 16 + 1, up to whole cache lines
