"""The cache of compiled kernels on disk: damaged, unwritable, shared by processes."""

from __future__ import annotations

import ctypes
import errno
import os
import subprocess
import sys

import pytest

from headrace.cpu import atomics, isa
from headrace.cpu.compile import attention_library, cache_directory, matmul_library, team_library
from headrace.gguf.types import QuantType


def compile_again():
    """A small library as a new process would get it: from the disk, or compiled."""
    return team_library.__wrapped__()


def works(library) -> bool:
    cell = ctypes.c_int64(40)
    before = library.function("atomic_add", 2)(ctypes.addressof(cell), 2)
    return (before, cell.value) == (40, 42)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def builds(monkeypatch):
    """How often a module was built: an object from the disk needs none."""
    built = []
    build = atomics.build_module
    monkeypatch.setattr(atomics, "build_module", lambda: built.append(1) or build())
    return built


def test_second_time_comes_from_the_disk(cache, builds):
    assert works(compile_again())
    assert cache_directory() == cache
    (file,) = cache.iterdir()
    stored = file.read_bytes()
    assert works(compile_again())
    assert len(builds) == 1
    assert file.read_bytes() == stored


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:10],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: bytes(len(data)),
        lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
        lambda data: b"x" + data[1:],
        lambda data: data[:30] + bytes([data[30] ^ 1]) + data[31:],
    ],
    ids=["empty", "magic", "half", "short", "long", "zeros", "code", "other", "checksum"],
)
def test_damaged_files_are_made_anew(cache, builds, damage):
    compile_again()
    (file,) = cache.iterdir()
    good = file.read_bytes()
    file.write_bytes(damage(good))
    assert works(compile_again())
    assert file.read_bytes() == good
    assert len(builds) == 2


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("HEADRACE_CACHE", str(tmp_path / "file"))
    assert works(compile_again())
    assert (tmp_path / "file").read_text() == "no folder"


def test_a_full_disk_leaves_nothing_behind(cache, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert works(compile_again())
    assert list(cache.iterdir()) == []


def test_every_kernel_has_a_file_of_its_own(cache):
    best, *others = isa.supported()
    for target in (best, *others[:1]):
        attention_library.__wrapped__(target)
        for qtype, k in ((QuantType.Q4_0, 32), (QuantType.Q4_0, 64), (QuantType.Q4_1, 32)):
            matmul_library.__wrapped__(qtype, k, target)
    assert len(list(cache.iterdir())) == 4 * (1 + len(others[:1]))


PROGRAM = """
import sys
from headrace.cpu import isa
from headrace.cpu.compile import attention_library, team_library
library = attention_library(isa.choose())
team = team_library()
print(library.address("attention_scores") != 0 and team.address("atomic_add") != 0)
"""


def test_processes_compile_at_once(cache):
    processes = [
        subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in processes:
        out, _ = process.communicate(timeout=120)
        assert (process.returncode, out.strip()) == (0, "True")
    names = sorted(file.name for file in cache.iterdir())
    assert [name.split("-")[0] for name in names] == ["attention", "team"]
