"""Weights read from the file instead of through its mapping."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import numpy as np
import pytest

from headrace.errors import GGUFError
from headrace.gguf.reader import open_gguf, read_into
from headrace.synth import write_synthetic


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    write_synthetic(path, "llama-tiny", "Q4_K_M")
    return path


def test_any_rows_of_any_tensor(path: Path) -> None:
    with open_gguf(path) as file:
        for tensor in file.tensors.values():
            for first in (0, tensor.n_rows // 2, tensor.n_rows - 1):
                rows = tensor.data[first:]
                memory = np.full(rows.shape, 0xAA, np.uint8)
                read_into(memory, rows)
                np.testing.assert_array_equal(memory, rows, err_msg=tensor.name)


def test_a_few_bytes_at_a_time(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """A read may bring less than was asked for."""
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, parts, at: read(file, [parts[0][:1000]], at))
    with open_gguf(path) as file:
        data = file.tensors["token_embd.weight"].data
        memory = np.zeros_like(data)
        read_into(memory, data)
        np.testing.assert_array_equal(memory, data)


@pytest.mark.parametrize("mapped", [True, False])
def test_without_a_file_or_a_way_to_read_it(
    monkeypatch: pytest.MonkeyPatch, path: Path, mapped: bool
) -> None:
    if mapped:
        monkeypatch.delattr(os, "preadv")
    with open_gguf(path) as file:
        data = file.tensors["token_embd.weight"].data
        data = data if mapped else data.copy()
        memory = np.zeros_like(data)
        read_into(memory, data)
        np.testing.assert_array_equal(memory, data)


def test_a_file_truncated_meanwhile_is_an_error(path: Path) -> None:
    with open_gguf(path) as file:
        last = max(file.tensors.values(), key=lambda tensor: tensor.data.ctypes.data)
        os.truncate(path, path.stat().st_size - last.n_bytes // 2)
        with pytest.raises(GGUFError, match="was longer when it was opened"):
            read_into(np.zeros_like(last.data), last.data)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="Linux's list of open files")
def test_the_file_is_closed_with_its_last_tensor(path: Path) -> None:
    def n_open() -> int:
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return sum(os.path.realpath(link) == str(path.resolve()) for link in links)

    file = open_gguf(path)
    data = file.tensors["token_embd.weight"].data
    file.close()
    del file
    assert n_open() > 0
    memory = np.zeros_like(data)
    read_into(memory, data)
    np.testing.assert_array_equal(memory, data)
    del data
    gc.collect()
    assert n_open() == 0
