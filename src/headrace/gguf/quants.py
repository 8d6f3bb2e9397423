"""Dequantisation of every supported block type in NumPy: the oracle's arithmetic.

Layouts are those of ggml's ``ggml-common.h``, written once as structured dtypes; the arithmetic (in
float32, one rounding a step, in this order) is that of ggml's ``dequantize_row_*``, bit for bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.errors import GGUFError
from headrace.gguf.types import QuantType, Tensor

Blocks = NDArray[Any]
"""Structured array of packed blocks, [..., n_blocks]."""

_HALF = "<f2"

BLOCK_DTYPES: dict[QuantType, np.dtype[Any]] = {
    QuantType.Q4_0: np.dtype([("d", _HALF), ("qs", "u1", 16)]),
    QuantType.Q4_1: np.dtype([("d", _HALF), ("m", _HALF), ("qs", "u1", 16)]),
    QuantType.Q5_0: np.dtype([("d", _HALF), ("qh", "u1", 4), ("qs", "u1", 16)]),
    QuantType.Q5_1: np.dtype([("d", _HALF), ("m", _HALF), ("qh", "u1", 4), ("qs", "u1", 16)]),
    QuantType.Q8_0: np.dtype([("d", _HALF), ("qs", "i1", 32)]),
    QuantType.Q2_K: np.dtype(
        [("scales", "u1", 16), ("qs", "u1", 64), ("d", _HALF), ("dmin", _HALF)]
    ),
    QuantType.Q3_K: np.dtype(
        [("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", _HALF)]
    ),
    QuantType.Q4_K: np.dtype(
        [("d", _HALF), ("dmin", _HALF), ("scales", "u1", 12), ("qs", "u1", 128)]
    ),
    QuantType.Q5_K: np.dtype(
        [("d", _HALF), ("dmin", _HALF), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)]
    ),
    QuantType.Q6_K: np.dtype(
        [("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", _HALF)]
    ),
}
"""The packed block of each quantised type, field by field in file order."""

_CHUNK_WEIGHTS = 1 << 18
"""Weights decoded at a time, so that the temporaries stay in the cache."""

_PART_BYTES = 32 << 20
"""What a thread checks at a time. It waits for the GIL a few times in each, while the tokeniser
is built beside it."""


def dequantize(data: NDArray[np.uint8], qtype: QuantType) -> NDArray[np.float32]:
    """Decode packed rows: ``uint8 [rows, row_bytes]`` -> ``float32 [rows, k]`` (a fresh array).

    Raises GGUFError when ``data`` is not two-dimensional uint8 or ``row_bytes`` is not a whole
    number of blocks.
    """
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] % qtype.block_bytes:
        raise GGUFError(
            f"{qtype.name}: expected uint8 [rows, n * {qtype.block_bytes}], "
            f"got {data.dtype} {list(data.shape)}"
        )
    data = np.ascontiguousarray(data)
    if qtype is QuantType.F32:
        return data.view("<f4").astype(np.float32)
    if qtype is QuantType.F16:
        return data.view(_HALF).astype(np.float32)
    if qtype is QuantType.BF16:
        return (data.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    blocks = data.view(BLOCK_DTYPES[qtype])
    out = np.empty((*blocks.shape, qtype.block_size), np.float32)
    rows_at_once = max(1, _CHUNK_WEIGHTS // max(1, blocks.shape[1] * qtype.block_size))
    for row in range(0, len(blocks), rows_at_once):
        rows = slice(row, row + rows_at_once)
        out[rows] = _DECODERS[qtype](blocks[rows])
    return out.reshape(len(data), -1)


def round_q8_0(x: NDArray[Any]) -> NDArray[Any]:
    """x [..., k] as it comes back from int8 with an f16 scale for each 32 of a row: the quants are
    rounded with the scale as it is stored."""
    padded = np.zeros((*x.shape[:-1], -(-x.shape[-1] // 32) * 32), np.float32)
    padded[..., : x.shape[-1]] = x
    groups = padded.reshape(*x.shape[:-1], -1, 32)
    largest = np.abs(groups).max(-1, keepdims=True)
    scales = (largest * np.float32(1 / 127)).astype(np.float16).astype(np.float32)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    rounded: NDArray[Any] = np.clip(np.rint(groups * inverse), -127, 127) * scales
    return rounded.reshape(padded.shape)[..., : x.shape[-1]].astype(x.dtype)


def check_finite(*tensors: Tensor) -> None:
    """Raise GGUFError, naming the tensor and row, if any scale, minimum or plain weight is NaN or
    infinite: the first such row of the first such tensor.

    Integers times finite scales cannot overflow float32, so this makes every weight finite. It
    looks at the exponent bits of the float fields only, on all cores, as fast as memory is read.
    """
    parts = [
        (tensor, first, tensor.data[first : first + rows])
        for tensor in tensors
        for rows in [max(1, _PART_BYTES // max(1, tensor.data.shape[1]))]
        for first in range(0, len(tensor.data), rows)
    ]
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1), "headrace-check") as threads:
        # In order, so that the first fault is raised.
        for _ in threads.map(lambda part: check_rows_finite(*part), parts):
            pass


def check_rows_finite(tensor: Tensor, first: int, data: NDArray[np.uint8]) -> None:
    """As :func:`check_finite`, for ``data``, rows of ``tensor`` that begin with row ``first``."""
    if tensor.qtype in BLOCK_DTYPES:
        blocks = data.view(BLOCK_DTYPES[tensor.qtype])
        names = blocks.dtype.names or ()
        fields = [blocks[name].view("<u2") for name in names if blocks.dtype[name] == _HALF]
    else:
        fields = [data.view("<u4" if tensor.qtype is QuantType.F32 else "<u2")]
    exponent = {QuantType.F32: 0x7F800000, QuantType.BF16: 0x7F80}.get(tensor.qtype, 0x7C00)
    mask = fields[0].dtype.type(exponent)
    rows = max(1, _CHUNK_WEIGHTS // max(1, fields[0].shape[1]))
    for row in range(0, len(data), rows):
        bad = [(field[row : row + rows] & mask) == mask for field in fields]
        if any(one.any() for one in bad):
            where = first + row + min(int(one.any(axis=1).argmax()) for one in bad if one.any())
            raise GGUFError(
                f"tensor {tensor.name!r} ({tensor.qtype.name}): NaN or infinite "
                f"{'scale' if tensor.qtype in BLOCK_DTYPES else 'weight'} in row {where}; "
                "the file is damaged, fetch or convert it again"
            )


def _fields(packed: NDArray[np.uint8], run: int, bits: int) -> NDArray[np.uint8]:
    """Unpack ``bits``-wide fields: every run of ``run`` bytes yields its lowest fields first.

    uint8 [..., n] -> uint8 [..., n * 8 / bits].
    """
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = packed.reshape(*packed.shape[:-1], -1, 1, run)
    return ((runs >> shifts) & np.uint8((1 << bits) - 1)).reshape(*packed.shape[:-1], -1)


def _f32(halves: NDArray[Any]) -> NDArray[np.float32]:
    """Per-block scales as float32 with a trailing axis to broadcast over the block."""
    return halves.astype(np.float32)[..., None]


def _affine(
    q: NDArray[Any], scale: NDArray[np.float32], minimum: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """``scale * q - minimum``, one scale (and minimum) per equal group.

    q [..., block_size], scale and minimum [..., groups].
    """
    out = q.reshape(*scale.shape, -1).astype(np.float32)
    out *= scale[..., None]
    if minimum is not None:
        out -= minimum[..., None]
    return out.reshape(q.shape)


def _q4_0(b: Blocks) -> NDArray[np.float32]:
    return _affine(_fields(b["qs"], 16, 4).view(np.int8) - np.int8(8), _f32(b["d"]))


def _q4_1(b: Blocks) -> NDArray[np.float32]:
    return _affine(_fields(b["qs"], 16, 4), _f32(b["d"]), -_f32(b["m"]))


def _five_bits(b: Blocks) -> NDArray[np.uint8]:
    return _fields(b["qs"], 16, 4) | (_fields(b["qh"], 1, 1) << np.uint8(4))


def _q5_0(b: Blocks) -> NDArray[np.float32]:
    return _affine(_five_bits(b).view(np.int8) - np.int8(16), _f32(b["d"]))


def _q5_1(b: Blocks) -> NDArray[np.float32]:
    return _affine(_five_bits(b), _f32(b["d"]), -_f32(b["m"]))


def _q8_0(b: Blocks) -> NDArray[np.float32]:
    return _affine(b["qs"], _f32(b["d"]))


def _q2_k(b: Blocks) -> NDArray[np.float32]:
    scales = b["scales"]
    return _affine(
        _fields(b["qs"], 32, 2),
        _f32(b["d"]) * (scales & np.uint8(15)).astype(np.float32),
        _f32(b["dmin"]) * (scales >> np.uint8(4)).astype(np.float32),
    )


def q3_k_scales(packed: NDArray[np.uint8]) -> NDArray[np.int8]:
    """The 16 signed scales of a Q3_K block: uint8 [..., 12] -> int8 [..., 16]."""
    low, high = _fields(packed[..., :8], 8, 4), _fields(packed[..., 8:], 4, 2)
    return (low | (high << np.uint8(4))).view(np.int8) - np.int8(32)


def _q3_k(b: Blocks) -> NDArray[np.float32]:
    # The high bit is stored inverted: a clear bit subtracts 4.
    q = _fields(b["qs"], 32, 2) | (_fields(b["hmask"], 32, 1) << np.uint8(2))
    scale = _f32(b["d"]) * q3_k_scales(b["scales"]).astype(np.float32)
    return _affine(q.view(np.int8) - np.int8(4), scale)


def k_scales_mins(packed: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The 8 six-bit scales and mins of a Q4_K or Q5_K block: uint8 [..., 12] -> two [..., 8].

    Bytes 0-3 and 4-7 hold scales and mins 0-3 in their low six bits, and in their high two bits
    the top of scales and mins 4-7, whose low nibbles share bytes 8-11.
    """
    first, second, shared = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    top_first, top_second = (first >> 2) & np.uint8(0x30), (second >> 2) & np.uint8(0x30)
    scales = [first & np.uint8(63), (shared & np.uint8(15)) | top_first]
    mins = [second & np.uint8(63), (shared >> 4) | top_second]
    return np.concatenate(scales, axis=-1), np.concatenate(mins, axis=-1)


def _four_or_five_k(b: Blocks, q: NDArray[np.uint8]) -> NDArray[np.float32]:
    scales, mins = k_scales_mins(b["scales"])
    scale = _f32(b["d"]) * scales.astype(np.float32)
    return _affine(q, scale, _f32(b["dmin"]) * mins.astype(np.float32))


def _q4_k(b: Blocks) -> NDArray[np.float32]:
    return _four_or_five_k(b, _fields(b["qs"], 32, 4))


def _q5_k(b: Blocks) -> NDArray[np.float32]:
    high = _fields(b["qh"], 32, 1) << np.uint8(4)
    return _four_or_five_k(b, _fields(b["qs"], 32, 4) | high)


def _q6_k(b: Blocks) -> NDArray[np.float32]:
    q = _fields(b["ql"], 64, 4) | (_fields(b["qh"], 32, 2) << np.uint8(4))
    scale = _f32(b["d"]) * b["scales"].astype(np.float32)
    return _affine(q.view(np.int8) - np.int8(32), scale)


_DECODERS: dict[QuantType, Callable[[Blocks], NDArray[np.float32]]] = {
    QuantType.Q4_0: _q4_0,
    QuantType.Q4_1: _q4_1,
    QuantType.Q5_0: _q5_0,
    QuantType.Q5_1: _q5_1,
    QuantType.Q8_0: _q8_0,
    QuantType.Q2_K: _q2_k,
    QuantType.Q3_K: _q3_k,
    QuantType.Q4_K: _q4_k,
    QuantType.Q5_K: _q5_k,
    QuantType.Q6_K: _q6_k,
}
"""Blocks [rows, n] -> float32 [rows, n, block_size]."""
