"""GGML tensor types and their block layouts.

Source of the numbers and layouts: ggml's ``ggml-common.h`` / ``ggml.h`` and the GGUF specification.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray


class QuantType(IntEnum):
    """GGML tensor type ids, as stored in the file. Only the types headrace computes with."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    BF16 = 30

    @property
    def block_size(self) -> int:
        """Weights in one block."""
        return _LAYOUT[self][0]

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in the file."""
        return _LAYOUT[self][1]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_size

    def row_bytes(self, k: int) -> int:
        """Bytes of a row of ``k`` weights; ``k`` must be a multiple of the block size."""
        return k // self.block_size * self.block_bytes


_LAYOUT: dict[QuantType, tuple[int, int]] = {
    QuantType.F32: (1, 4),
    QuantType.F16: (1, 2),
    QuantType.BF16: (1, 2),
    QuantType.Q4_0: (32, 18),
    QuantType.Q4_1: (32, 20),
    QuantType.Q5_0: (32, 22),
    QuantType.Q5_1: (32, 24),
    QuantType.Q8_0: (32, 34),
    QuantType.Q2_K: (256, 84),
    QuantType.Q3_K: (256, 110),
    QuantType.Q4_K: (256, 144),
    QuantType.Q5_K: (256, 176),
    QuantType.Q6_K: (256, 210),
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a GGUF file: a zero-copy, read-only view of its packed blocks.

    ``shape`` is in NumPy order (GGML's reversed): a matrix is ``(rows, k)``, a vector ``(k,)``.
    ``data`` is ``uint8 [rows, row_bytes]`` (``[1, row_bytes]`` for a vector): higher dimensions are
    flattened into rows.
    """

    name: str
    qtype: QuantType
    shape: tuple[int, ...]
    data: NDArray[np.uint8]

    @property
    def n_rows(self) -> int:
        return int(self.data.shape[0])

    @property
    def k(self) -> int:
        """Weights in a row (the contiguous, quantised dimension)."""
        return self.shape[-1]

    @property
    def n_bytes(self) -> int:
        return int(self.data.size)
