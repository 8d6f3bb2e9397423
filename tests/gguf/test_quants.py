"""Dequantisation is bit-equal to the ``gguf`` package; non-finite scales are found and named."""

from __future__ import annotations

import numpy as np
import pytest

from gguf import GGMLQuantizationType
from gguf import quants as oracle
from headrace.errors import GGUFError
from headrace.gguf import quants
from headrace.gguf.quants import BLOCK_DTYPES, check_finite, dequantize
from headrace.gguf.types import QuantType, Tensor


def random_rows(qtype: QuantType, rows: int, blocks: int, seed: int) -> np.ndarray:
    """Random bytes; only exponents that mean NaN or infinity are made finite."""
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 256, (rows, blocks * qtype.block_bytes), dtype=np.uint8)
    if qtype is QuantType.F32:
        data.view("<u4")[...] &= 0xBFFFFFFF
    elif qtype in (QuantType.F16, QuantType.BF16):
        data.view("<u2")[...] &= 0xBFFF
    else:
        packed = data.view(BLOCK_DTYPES[qtype])
        for name in packed.dtype.names:
            if packed.dtype[name] == np.float16:
                packed[name] = (packed[name].view("<u2") & 0xBFFF).view("<f2")
    return data


@pytest.mark.parametrize("qtype", QuantType, ids=lambda q: q.name)
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (3, 5), (257, 7)])
def test_bit_equal_to_gguf_package(qtype: QuantType, rows: int, blocks: int) -> None:
    data = random_rows(qtype, rows, blocks, seed=rows * 31 + qtype)
    want = oracle.dequantize(data, GGMLQuantizationType(int(qtype)))
    got = dequantize(data, qtype)
    assert got.shape == (rows, blocks * qtype.block_size)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


def test_block_dtypes_match_the_layout_table() -> None:
    for qtype, dtype in BLOCK_DTYPES.items():
        assert dtype.itemsize == qtype.block_bytes


@pytest.mark.parametrize("shape", [(4,), (1, 2, 144), (3, 143)])
def test_wrong_shape_is_a_named_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(GGUFError, match="Q4_K"):
        dequantize(np.zeros(shape, np.uint8), QuantType.Q4_K)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("qtype", QuantType, ids=lambda q: q.name)
def test_every_float_field_is_checked(qtype: QuantType, value: float) -> None:
    data = random_rows(qtype, 5, 3, seed=1)
    check_finite(Tensor("w", qtype, (5, 3 * qtype.block_size), data))
    if qtype in BLOCK_DTYPES:
        packed = data.view(BLOCK_DTYPES[qtype])
        places = [packed[n] for n in packed.dtype.names if packed.dtype[n] == np.float16]
    elif qtype is QuantType.BF16:
        places = [data.view("<u2")]
        value = int(np.float32(value).view(np.uint32)) >> 16
    else:
        places = [data.view("<f4" if qtype is QuantType.F32 else "<f2")]
    for field in places:
        kept = field[3, 2].copy()
        field[3, 2] = value
        with pytest.raises(GGUFError, match=r"'w' .* row 3"):
            check_finite(Tensor("w", qtype, (5, 3 * qtype.block_size), data))
        field[3, 2] = kept


@pytest.mark.parametrize("qtype", [QuantType.Q4_K, QuantType.F32], ids=lambda q: q.name)
def test_of_many_faults_the_first_is_named(
    monkeypatch: pytest.MonkeyPatch, qtype: QuantType
) -> None:
    """However the rows are shared out, and whichever thread is done first."""
    data = random_rows(qtype, 400, 3, seed=2)
    field = data.view("<f4") if qtype is QuantType.F32 else data.view(BLOCK_DTYPES[qtype])["dmin"]
    tensors = [
        Tensor(name, qtype, (400, 3 * qtype.block_size), rows)
        for name, rows in (("fine", data.copy()), ("b", data), ("a", data))
    ]
    for part_bytes in (1, 7 * data.shape[1], 1 << 20):
        monkeypatch.setattr(quants, "_PART_BYTES", part_bytes)
        field[...] = 0
        for row in (399, 301, 41):
            field[row, 1] = np.nan
            if qtype is QuantType.Q4_K:  # and in the field that is looked at first, one row on
                scales = data.view(BLOCK_DTYPES[qtype])["d"]
                scales[:] = np.where(np.arange(400) == row + 1, np.inf, 1)[:, None]
            with pytest.raises(GGUFError, match=rf"tensor 'b' .* in row {row};"):
                check_finite(*tensors)
