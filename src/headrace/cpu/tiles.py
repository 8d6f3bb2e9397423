"""Matrices as the kernels read them: the file's bytes with the rows of a tile interleaved.

A kernel gives each vector lane a row, so it wants the same four bytes of ``lanes`` rows side by
side. Each matrix is brought into that order once, at load, and the file's pages are let go as it
is: the model is in memory once, in the order in which decoding streams it.

A tile is ``lanes`` rows, its blocks one after the other; a block of the tile is that block of every
row, piece by piece: four bytes of each row, or two where a half stands between odd offsets. So what
lies at offset ``o`` of a row's block lies at ``lanes * o`` of the tile's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from headrace.gguf.types import QuantType

HALF_AT = {
    QuantType.Q4_0: 0,
    QuantType.Q5_0: 0,
    QuantType.Q8_0: 0,
    QuantType.Q3_K: 108,
    QuantType.Q6_K: 208,
}
"""Offset of the two-byte piece in a block that is no multiple of four bytes."""

PLAIN_BLOCK = 16
"""Bytes that count as a block of the types without blocks: F32, F16, BF16."""


def block_bytes(qtype: QuantType) -> int:
    return PLAIN_BLOCK if qtype.block_size == 1 else qtype.block_bytes


def n_tiles(n_rows: int, lanes: int) -> int:
    return -(-n_rows // lanes)


def interleaved(data: NDArray[np.uint8], qtype: QuantType, lanes: int) -> NDArray[np.uint8]:
    """``data`` (uint8 [n_rows, row_bytes]) in tiles, in NumPy: the definition.

    The last tile ends at the last row, and repeats rows of the one before (or the first row).
    """
    n_rows, size = len(data), block_bytes(qtype)
    half_at = HALF_AT.get(qtype, size)
    first = np.minimum(np.arange(n_tiles(n_rows, lanes)) * lanes, n_rows - lanes)
    rows = np.maximum(first[:, None] + np.arange(lanes), 0)
    blocks = data.reshape(n_rows, -1, size)[rows].swapaxes(1, 2)  # [tile, block, lane, byte]
    edges = [*range(0, half_at, 4), half_at, *range(half_at + 2, size + 1, 4)]
    pieces = [
        blocks[..., start:stop].reshape(*blocks.shape[:2], -1)
        for start, stop in zip(edges, [*edges[1:], size], strict=True)
        if start < stop
    ]
    return np.concatenate(pieces, axis=2).reshape(-1)
