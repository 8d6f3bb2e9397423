"""How matrices lie on the device: tiles of 4 rows × 1,024 columns, the file's bytes regrouped.

The same table as ``kernels/blocks.cuh``; ``kernels/reorder.cu`` makes the tiles at load.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.errors import DeviceError
from headrace.gguf.types import QuantType

TILE_ROWS = 4
TILE_COLUMNS = 1024
PADDED_ROWS = 16
"""Rows are padded with zero blocks to this multiple: the rows one block quantises together."""

_FLOAT16 = ((0, 16), (16, 16), (32, 16), (48, 16))

PLANES: dict[QuantType, tuple[tuple[int, int], ...]] = {
    QuantType.Q4_0: ((2, 16), (0, 2)),
    QuantType.Q4_1: ((4, 16), (0, 4)),
    QuantType.Q5_0: ((6, 16), (2, 4), (0, 2)),
    QuantType.Q5_1: ((8, 16), (4, 4), (0, 4)),
    QuantType.Q8_0: ((2, 16), (18, 16), (0, 2)),
    QuantType.Q2_K: ((0, 16), (16, 64), (80, 4)),
    QuantType.Q3_K: ((0, 32), (32, 64), (96, 12), (108, 2)),
    QuantType.Q4_K: ((0, 16), (16, 128)),
    QuantType.Q5_K: ((0, 16), (16, 32), (48, 128)),
    QuantType.Q6_K: ((0, 128), (128, 64), (192, 16), (208, 2)),
    QuantType.F16: _FLOAT16,
    QuantType.BF16: _FLOAT16,
    QuantType.F32: tuple((16 * i, 16) for i in range(8)),
}
"""Fields of a block, as (offset in the file's block, bytes), in the order of a tile's planes."""

FLOAT_TYPES = frozenset({QuantType.F32, QuantType.F16, QuantType.BF16})


def tile_block(qtype: QuantType) -> tuple[int, int]:
    """(values, bytes) of a block as tiles see it: unquantised types count 32 values as a block."""
    if qtype in FLOAT_TYPES:
        return 32, 32 * qtype.block_bytes
    return qtype.block_size, qtype.block_bytes


def tile_bytes(qtype: QuantType, columns: int) -> int:
    """Bytes of one tile of ``columns`` ≤ 1,024 columns, its planes padded to 16 bytes each."""
    blocks = columns // tile_block(qtype)[0]
    return sum(-(-TILE_ROWS * blocks * size // 16) * 16 for _, size in PLANES[qtype])


@dataclass(frozen=True)
class TileLayout:
    """One matrix ``[n, k]`` in tiles."""

    qtype: QuantType
    n: int
    k: int

    def __post_init__(self) -> None:
        values = tile_block(self.qtype)[0]
        if self.k % values or self.k <= 0 or self.n <= 0:
            raise DeviceError(
                f"the CUDA backend needs rows of a multiple of {values} values for "
                f"{self.qtype.name}, not {self.n} x {self.k}"
            )

    @property
    def groups(self) -> int:
        """Four-row groups, padding included."""
        return -(-self.n // PADDED_ROWS) * PADDED_ROWS // TILE_ROWS

    @property
    def group_bytes(self) -> int:
        full, tail = divmod(self.k, TILE_COLUMNS)
        return full * tile_bytes(self.qtype, TILE_COLUMNS) + tile_bytes(self.qtype, tail)

    @property
    def max_tile_bytes(self) -> int:
        return tile_bytes(self.qtype, min(self.k, TILE_COLUMNS))

    @property
    def n_bytes(self) -> int:
        return self.groups * self.group_bytes


def reorder(data: NDArray[np.uint8], layout: TileLayout) -> NDArray[np.uint8]:
    """The tiles of ``data`` (uint8 [n, row bytes], the file's rows), in NumPy: the definition."""
    values, block_bytes = tile_block(layout.qtype)
    blocks = np.zeros((layout.groups * TILE_ROWS, layout.k // values, block_bytes), np.uint8)
    blocks[: layout.n] = data.reshape(layout.n, -1, block_bytes)
    groups = blocks.reshape(layout.groups, TILE_ROWS, -1, block_bytes)
    pieces = []
    for start in range(0, layout.k, TILE_COLUMNS):
        tile = groups[:, :, start // values : (start + TILE_COLUMNS) // values]
        for offset, size in PLANES[layout.qtype]:
            plane = tile[..., offset : offset + size].reshape(layout.groups, -1)
            pieces.append(np.pad(plane, ((0, 0), (0, -plane.shape[1] % 16))))
    return np.concatenate(pieces, axis=1).reshape(-1)


def rotary_rows(n: int, head_dim: int, rope_dim: int) -> NDArray[np.int64]:
    """Row order that brings the pairs (i, i + rope_dim/2) of every head side by side.

    Row ``r`` of the laid-out matrix is row ``result[r]`` of the file's. Attention's dot products do
    not see it, and the kernels know one pairing only.
    """
    half = rope_dim // 2
    head = np.arange(head_dim)
    head[:rope_dim] = np.arange(rope_dim).reshape(2, half).T.reshape(-1)
    return (np.arange(n).reshape(-1, head_dim)[:, head]).reshape(-1)
