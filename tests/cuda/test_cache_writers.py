"""The three kernels that write a quantised cache: bit for bit as NumPy quantises."""

from __future__ import annotations

import numpy as np
import pytest
from device_memory import poisoned, put, random_matrix, upload_activations
from kv_cache import Cache, quantise

from headrace.cuda import arguments as c
from headrace.cuda.device import Device
from headrace.cuda.gemm import SplitWork, gemm
from headrace.cuda.launchers import CacheShape, rotary
from headrace.cuda.products import PLAIN, matvec
from headrace.gguf.types import QuantType

LENGTHS = [70, 3, 128]
ROWS = [(0, 5), (1, 2), (2, 100), (0, 69), (2, 127), (2, 126), (0, 64), (2, 0), (2, 1), (0, 63)]


def check(device: Device, cache: Cache, k: np.ndarray, v: np.ndarray, n: int) -> None:
    """k, v float32 [rows, kv_heads, head_dim], of the first ``n`` of ROWS."""
    for i, (slot, position) in enumerate(ROWS[:n]):
        for found, x in (
            (cache.key(device, slot, position), k[i]),
            (cache.value(device, slot, position), v[i]),
        ):
            quants, scales = quantise(x)
            np.testing.assert_array_equal(found[1], scales)
            np.testing.assert_array_equal(found[0], quants[..., : x.shape[-1]])


@pytest.mark.parametrize("dim", [32, 64, 80, 96, 256])
def test_rotary(device: Device, dim: int) -> None:
    rng, shape, n = np.random.default_rng(dim), CacheShape(4, 2, dim, quantised=True), len(ROWS)
    cache = Cache(device, rng, shape, LENGTHS)
    qkv = rng.standard_normal((n, 8, dim)).astype(np.float32)
    # Zeros; scales that are subnormal, the least one, and below it; a scale beyond f16's middle.
    qkv[:5] *= np.array([0, 1e-5, 1e-5, 4e-6, 1e4], np.float32)[:, None, None]
    qkv[2] = np.sign(qkv[2]) * np.float32(127 * 1.4 * 2**-24)  # more than 127 such scales
    rows = cache.arguments(device, *np.array(ROWS).T[::-1])
    arguments = c.RotaryHeads(
        put(device, qkv).address, 0, 0, poisoned(device, (n, 4, dim)).address, rows, 0
    )
    device.launch(rotary(shape, arguments, n, eps=0.0, q_norm=False, k_norm=False))
    check(device, cache, qkv[:, 4:6], qkv[:, 6:], n)


@pytest.mark.parametrize("n", [1, len(ROWS)])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 1, 32), (6, 2, 96)])
@pytest.mark.parametrize("kernel", ["matvec", "gemm", "gemm, split"])
def test_projections(
    tensor_device: Device, kernel: str, heads: int, kv_heads: int, dim: int, n: int
) -> None:
    """Without turning: what they would store as they are."""
    device, rng, k = tensor_device, np.random.default_rng(dim), 512
    shape = CacheShape(heads, kv_heads, dim, quantised=True)
    cache = Cache(device, rng, shape, LENGTHS)
    types = (QuantType.Q4_K, QuantType.Q8_0, QuantType.Q6_K)
    sizes = [heads * dim, kv_heads * dim, kv_heads * dim]
    matrices = [
        random_matrix(device, rng, qtype, rows, k, bias=True)[0]
        for qtype, rows in zip(types, sizes, strict=True)
    ]
    x = upload_activations(device, rng.standard_normal((n, k)).astype(np.float32))
    dense, q = poisoned(device, (n, sum(sizes))), poisoned(device, (n, sizes[0]))
    rows = cache.arguments(device, *np.array(ROWS[:n]).T[::-1])
    room = put(device, np.zeros(1 << 20, np.float32)).address
    how = {"work": SplitWork(room, 1 << 19, room + (1 << 21))} if kernel == "gemm, split" else {}
    product = matvec if kernel == "matvec" else gemm
    for epilogue, macros in (
        (c.Store(dense.address), PLAIN),
        (c.Rotary(q.address, rows, put(device, np.zeros(4)).address), shape.macros),
    ):
        device.launch(product(device, matrices, x, epilogue, n, macros=macros, **how))
    parts = np.split(device.download(dense), np.cumsum(sizes)[:-1], -1)
    np.testing.assert_array_equal(device.download(q), parts[0])
    check(device, cache, *(part.reshape(n, kv_heads, dim) for part in parts[1:]), n)
