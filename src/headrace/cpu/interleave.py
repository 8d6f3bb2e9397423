"""The loop that brings the file's rows into the kernels' order: see ``tiles.py``."""

from __future__ import annotations

import numba as nb

from headrace.cpu.intrinsics import view
from headrace.cpu.ops import compiled


@compiled
def interleave(source, target, n_rows, row_bytes, block_bytes, half_at, lanes, first, last):
    """Tiles first … last - 1 of the matrix at ``source`` [n_rows, row_bytes]; all int64.

    ``half_at``: offset of the two-byte piece of a block; ``block_bytes`` when there is none.
    """
    n_blocks = row_bytes // block_bytes
    for t in range(first, last):
        start = min(t * lanes, n_rows - lanes)
        out = target + t * lanes * row_bytes
        for b in range(n_blocks):
            for lane in range(lanes):
                row = max(start + lane, 0)
                block = source + row * row_bytes + b * block_bytes
                at = 0
                while at < block_bytes:
                    if at == half_at:
                        view(out + lanes * at, lanes, nb.uint16)[lane] = view(
                            block + at, 1, nb.uint16
                        )[0]
                        at += 2
                    else:
                        view(out + lanes * at, lanes, nb.uint32)[lane] = view(
                            block + at, 1, nb.uint32
                        )[0]
                        at += 4
            out += lanes * block_bytes
    return 0
