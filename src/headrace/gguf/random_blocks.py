"""Random packed weights that behave like trained ones: valid, finite, of a wanted spread.

Codes are random bytes. Scales and mins come from a pool of random headers in which each min follows
its scale within 20%, as a quantiser's do, so that weights centre near zero while every scale and
every min still differs. Dequantised, the weights have mean about 0 and standard deviation ``std``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.gguf.quants import BLOCK_DTYPES, dequantize
from headrace.gguf.types import QuantType

_POOL = 4096
"""Random headers, shared by all blocks of a tensor."""
_CHUNK_BYTES = 1 << 22
_TABLE = 1 << 16
"""Random values that plain floats are drawn from."""


BlockMaker = Callable[[int], NDArray[Any]]


def random_weights(
    rng: np.random.Generator, qtype: QuantType, n_weights: int, std: float
) -> Iterator[NDArray[np.uint8]]:
    """Packed bytes of ``n_weights`` (whole blocks) random weights, in chunks."""
    n_blocks = n_weights // qtype.block_size
    at_once = max(1, _CHUNK_BYTES // qtype.block_bytes)
    make = _block_maker(rng, qtype, std)
    for start in range(0, n_blocks, at_once):
        yield make(min(at_once, n_blocks - start)).view(np.uint8)


def _block_maker(rng: np.random.Generator, qtype: QuantType, std: float) -> BlockMaker:
    """A function from a number of blocks to their array."""
    if qtype not in BLOCK_DTYPES:
        values = rng.standard_normal(_TABLE, np.float32) * np.float32(std)
        if qtype is QuantType.F16:
            table = values.astype(np.float16).view(np.uint16)
        elif qtype is QuantType.BF16:
            table = (values.view(np.uint32) >> 16).astype(np.uint16)
        else:
            table = values.view(np.uint32)
        return lambda n: table[_random_bytes(rng, 2 * n).view(np.uint16)]

    dtype = BLOCK_DTYPES[qtype]
    pool = _headers(rng, qtype, std)

    def make(n: int) -> NDArray[Any]:
        blocks = _random_bytes(rng, n * dtype.itemsize).view(dtype)
        picked = pool[rng.integers(0, _POOL, n, dtype=np.uint16)]
        for name in picked.dtype.names or ():
            blocks[name] = picked[name]
        return blocks

    return make


def _headers(rng: np.random.Generator, qtype: QuantType, std: float) -> NDArray[Any]:
    """A pool of random scale and min fields (a structured array of those fields only)."""
    dtype = BLOCK_DTYPES[qtype]
    blocks = _random_bytes(rng, _POOL * dtype.itemsize).view(dtype)
    sizes = rng.uniform(0.7, 1.3, _POOL).astype(np.float32)
    names = [name for name in ("d", "m", "dmin", "scales") if name in (dtype.names or ())]
    # Symmetric types may have negative scales, and trained files do.
    signs = rng.choice(np.array([-1, 1], np.float32), _POOL)
    middle = {QuantType.Q4_1: 7.5, QuantType.Q5_1: 15.5, QuantType.Q2_K: 1.5, QuantType.Q4_K: 7.5,
              QuantType.Q5_K: 15.5}.get(qtype)  # fmt: skip
    if qtype is QuantType.Q2_K:
        scales = rng.integers(4, 16, (_POOL, 16))
        blocks["scales"] = scales | (_near(rng, scales, 15) << 4)
    elif qtype in (QuantType.Q4_K, QuantType.Q5_K):
        scales = rng.integers(16, 64, (_POOL, 8))
        blocks["scales"] = pack_k_scales_mins(scales, _near(rng, scales, 63))

    def set_scales(unit: float) -> None:
        d = sizes * np.float32(unit)
        blocks["d"] = d if middle is not None else d * signs
        if middle is not None and "m" in names:
            blocks["m"] = -middle * d * rng.uniform(0.8, 1.2, _POOL)
        elif middle is not None:
            blocks["dmin"] = middle * d

    set_scales(1.0)
    spread = dequantize(blocks.view(np.uint8).reshape(_POOL, -1), qtype).std()
    set_scales(std / float(spread))
    pool = np.empty(_POOL, [(name, dtype[name]) for name in names if name != "scales" or middle])
    for name in pool.dtype.names or ():
        pool[name] = blocks[name]
    return pool


def pack_k_scales_mins(scales: NDArray[Any], mins: NDArray[Any]) -> NDArray[np.uint8]:
    """Six-bit scales and mins [..., 8] -> the 12 bytes of a Q4_K or Q5_K block, [..., 12]."""
    first = scales[..., :4] | (scales[..., 4:] >> 4) << 6
    second = mins[..., :4] | (mins[..., 4:] >> 4) << 6
    shared = (scales[..., 4:] & 15) | (mins[..., 4:] & 15) << 4
    return np.concatenate([first, second, shared], axis=-1).astype(np.uint8)


def _near(rng: np.random.Generator, values: NDArray[Any], limit: int) -> NDArray[Any]:
    moved = np.rint(values * rng.uniform(0.8, 1.2, values.shape)).astype(values.dtype)
    return moved.clip(0, limit)


def _random_bytes(rng: np.random.Generator, size: int) -> NDArray[np.uint8]:
    # Whole 64-bit words are five times as fast as Generator.bytes.
    words = rng.integers(0, 1 << 64, -(-size // 8), dtype=np.uint64)
    return words.view(np.uint8)[:size]
