"""Interleaved weights: the compiled loop against its NumPy definition, and the memory they take."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from headrace.cpu import isa
from headrace.cpu.tiles import HALF_AT, PLAIN_BLOCK, block_bytes, interleaved
from headrace.cpu.weights import Weights
from headrace.errors import DeviceMemoryError
from headrace.gguf.reader import let_go, open_gguf
from headrace.gguf.types import QuantType, Tensor
from headrace.synth import write_synthetic


def random_tensor(name: str, qtype: QuantType, n_rows: int, n_blocks: int) -> Tensor:
    rng = np.random.default_rng(n_rows)
    data = rng.integers(0, 256, (n_rows, n_blocks * block_bytes(qtype)), np.uint8)
    k = data.shape[1] // qtype.block_bytes * qtype.block_size
    return Tensor(name, qtype, (n_rows, k), data)


def loaded(weights: Weights, tensor: Tensor, lanes: int) -> np.ndarray:
    import ctypes

    size = -(-tensor.n_rows // lanes) * lanes * tensor.data.shape[1]
    raw = (ctypes.c_uint8 * size).from_address(weights.address(tensor.name))
    return np.frombuffer(raw, np.uint8)


@pytest.mark.parametrize("lanes", [16, 8, 4])
def test_the_compiled_loop_is_its_definition(lanes: int) -> None:
    tensors = [
        random_tensor(f"{qtype.name} {n_rows}", qtype, n_rows, 3)
        for qtype in QuantType
        for n_rows in (1, lanes - 1, lanes, 2 * lanes + 3)
    ]
    weights = Weights(lanes)
    for tensor in tensors:
        weights.reserve(tensor)
    weights.reserve(tensors[0])  # a tied head
    weights.load(threads=3)
    for tensor in tensors:
        wanted = interleaved(tensor.data, tensor.qtype, lanes)
        np.testing.assert_array_equal(loaded(weights, tensor, lanes), wanted, tensor.name)


def test_large_matrices_come_in_parts() -> None:
    tensor = random_tensor("large", QuantType.Q8_0, 5000, 64)  # 10 MB: more than a part
    weights = Weights(16)
    weights.reserve(tensor)
    weights.load(threads=2)
    wanted = interleaved(tensor.data, tensor.qtype, 16)
    np.testing.assert_array_equal(loaded(weights, tensor, 16), wanted)


@pytest.mark.parametrize("qtype", list(QuantType))
def test_what_lies_at_an_offset_of_a_block_lies_at_lanes_times_it(qtype: QuantType) -> None:
    size, lanes = block_bytes(qtype), 4
    tensor = random_tensor("t", qtype, lanes, 2)
    tiles = interleaved(tensor.data, qtype, lanes)
    half = HALF_AT.get(qtype)
    offset = 0
    while offset < size:
        width = 2 if offset == half else 4
        for lane in range(lanes):
            for block in range(2):
                at = lanes * (block * size + offset) + width * lane
                row = tensor.data[lane, block * size + offset :][:width]
                np.testing.assert_array_equal(tiles[at : at + width], row)
        offset += width
    assert offset == size
    assert qtype.block_size > 1 or size == PLAIN_BLOCK


def test_no_room_is_an_error_with_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = Weights(isa.choose().lanes)
    weights.reserve(random_tensor("t", QuantType.Q4_0, 64, 1))
    monkeypatch.setattr("headrace.checks._free_bytes", lambda: 1000)
    with pytest.raises(DeviceMemoryError, match=r"weights: 1,152 bytes wanted, 1,000 free"):
        weights.load(threads=1)


def test_pages_let_go_come_back(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_synthetic(path, "llama-tiny", "Q8_0")
    with open_gguf(path) as file:
        tensor = max(file.tensors.values(), key=lambda t: t.n_bytes)
        before = tensor.data.copy()
        let_go(tensor.data)
        let_go(tensor.data[1:2])
        np.testing.assert_array_equal(tensor.data, before)
        own = before.copy()
        let_go(own)  # memory of our own is not thrown away
        np.testing.assert_array_equal(own, before)
        del tensor, before
