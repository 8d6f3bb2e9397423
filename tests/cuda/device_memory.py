"""Arrays on a device, for tests, and the NumPy twin of the int8 activations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from headrace.cuda.device import Device, DeviceArray, array
from headrace.cuda.launchers import reorder
from headrace.cuda.layout import TileLayout
from headrace.cuda.products import GROUP, Activations, Matrix, brain_shape, padded
from headrace.gguf.quants import BLOCK_DTYPES, dequantize
from headrace.gguf.random_blocks import random_weights
from headrace.gguf.types import QuantType


def put(device: Device, values: np.ndarray) -> DeviceArray:
    address = device.allocate(max(values.nbytes, 16), "test")
    device.upload(address, values)
    return array(address, values.shape, values.dtype)


def poisoned(device: Device, shape: Sequence[int], dtype=np.float32) -> DeviceArray:
    """NaN for floats: an element no kernel wrote shows."""
    return put(
        device,
        np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize, 0xFF, np.uint8)
        .view(dtype)
        .reshape(shape),
    )


def activations(device: Device, rows: int, width: int, *, brain: bool = False) -> Activations:
    groups = padded(width) // GROUP
    return Activations(
        width, rows,
        poisoned(device, (rows, width)),
        poisoned(device, (rows, groups, 16), np.int8),
        poisoned(device, (rows, groups, 2)),
        poisoned(device, (rows, width // GROUP)),
        put(device, tiled(np.full((rows, width), 0xFFFF, np.uint16))) if brain else None,
    )  # fmt: skip


_COLUMN = np.arange(256)
_PLACE = (_COLUMN >> 4 & 3) * 64 + (_COLUMN >> 1 & 7) * 8 + (_COLUMN >> 5 & 6 | _COLUMN & 1)
"""Where a column of 256 is stored (kernels/activations.cuh), before the swizzle."""


def tiled(x: np.ndarray) -> np.ndarray:
    """uint16 [rows, k] in tiles (kernels/activations.cuh): rows beyond the last are NaN."""
    rows, k = x.shape
    n, m, _ = brain_shape(rows, k)
    whole = np.full((n * 64, m * 64), 0xFFFF, np.uint16)
    whole[:rows, :k], whole[:, k:] = x, 0
    placed = np.empty((n * 64, m // 4, 256), np.uint16)
    placed[..., _PLACE] = whole.reshape(n * 64, m // 4, 256)
    tiles = placed.reshape(n, 64, m, 8, 8).transpose(0, 2, 1, 3, 4)
    line, piece = np.indices((64, 8))
    out = np.empty_like(tiles)
    out[:, :, line, piece ^ line & 7] = tiles[:, :, line, piece]
    return out.reshape(brain_shape(rows, k))


def untiled(tiles: np.ndarray, rows: int, k: int) -> np.ndarray:
    """The rows of :func:`tiled`."""
    n, m, _ = tiles.shape
    line, piece = np.indices((64, 8))
    pieces = tiles.reshape(n, m, 64, 8, 8)[:, :, line, piece ^ line & 7]
    rows_of_tiles = pieces.transpose(0, 2, 1, 3, 4).reshape(n * 64, m // 4, 256)
    return rows_of_tiles[..., _PLACE].reshape(n * 64, m * 64)[:rows, :k]


SCALED = 8
"""Values that share a scale."""


def quantise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [rows, k] and scales float32 [rows, k / 8], each a bfloat16, of x float32 [rows, k]."""
    groups = x.reshape(len(x), -1, SCALED)
    exact = (np.abs(groups).max(-1) * np.float32(1 / 127)).view(np.uint32)
    d = (((exact + 0x7FFF + (exact >> 16 & 1)) >> 16) << 16).view(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.where(d[..., None] > 1e-36, np.rint(groups * (1 / d[..., None])), 0)
    return q.astype(np.int8).reshape(x.shape), d


def dequantise(q: np.ndarray, d: np.ndarray) -> np.ndarray:
    """float64 [rows, k]."""
    return (q.reshape(len(q), -1, SCALED) * d[..., None].astype(np.float64)).reshape(q.shape)


def to_brain(x: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 of each, as uint16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_brain(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def slots(n_groups: int, bits: int) -> np.ndarray:
    """Where group g is stored (kernels/activations.cuh), by its lowest bits: five for quants, six
    for scales."""
    g = np.arange(n_groups)
    low = (g >> 2 & (1 << bits - 2) - 2) | ((g >> 2 ^ g) & 1)
    return (g >> bits << bits) | (g & 6) << bits - 3 | low


def upload_activations(
    device: Device, x: np.ndarray, gain: np.ndarray | None = None
) -> Activations:
    """x float32 [rows, k] as its producer would store it: values, x∘gain in int8, squares."""
    rows, k = x.shape
    a = activations(device, rows, k, brain=True)
    q, d = quantise(x * gain if gain is not None else x)
    n = k // GROUP
    sums = (d * q.reshape(rows, -1, SCALED).sum(-1, dtype=np.int32)).astype(np.float32)
    quants = np.full(a.quants.shape, -1, np.int8)
    quants[:, slots(n, 5)] = q.reshape(rows, n, GROUP)
    scales = np.full(a.scales.shape, 0xFFFFFFFF, np.uint32)
    halves = d.view(np.uint32) >> 16
    packed = np.stack([halves[:, ::2] | halves[:, 1::2] << 16,
                       (sums[:, ::2] + sums[:, 1::2]).view(np.uint32)], -1)  # fmt: skip
    scales[:, slots(n, 6)] = packed
    device.upload(a.values.address, x)
    device.upload(a.quants.address, quants)
    device.upload(a.scales.address, scales)
    device.upload(a.brain.address, tiled(to_brain(x * gain if gain is not None else x)))
    device.upload(a.squares.address, np.square(x).reshape(rows, n, GROUP).sum(-1))
    return a


def check_squares(device: Device, a: Activations, x: np.ndarray) -> None:
    """The stored sums of squares are those of x float32 [rows, width]."""
    wanted = np.square(x).reshape(len(x), -1, GROUP).sum(-1)
    np.testing.assert_allclose(device.download(a.squares), wanted, rtol=1e-5)


def read_quantised(device: Device, a: Activations) -> np.ndarray:
    """What a reader of the int8 groups sees, float32 [rows, width]; checks the stored sums."""
    n = a.width // GROUP
    q = device.download(a.quants)[:, slots(n, 5)].reshape(a.rows, a.width)
    packed = device.download(a.scales)[:, slots(n, 6)].view(np.uint32)
    d = np.stack([packed[..., 0] << 16, packed[..., 0] & 0xFFFF0000], -1).view(np.float32)
    d = d.reshape(a.rows, -1)
    values = dequantise(q, d)
    sums = values.reshape(a.rows, n, GROUP).sum(-1)
    magnitude = np.abs(values).reshape(a.rows, n, GROUP).sum(-1)
    stored = packed[..., 1].copy().view(np.float32)
    assert (np.abs(stored - sums) <= 1e-6 * magnitude + 1e-30).all()
    return values


def random_matrix(
    device: Device, rng: np.random.Generator, qtype: QuantType, n: int, k: int, *,
    head_dim: int = 0, rope_dim: int = 0, bias: bool = False,
    change: Callable[[np.ndarray], None] = lambda blocks: None,
) -> tuple[Matrix, np.ndarray, np.ndarray]:  # fmt: skip
    """A random matrix in tiles on the device, its float64 values [n, k], and its bias [n].
    ``change``: what to do to the fields of its blocks [n, blocks a row] first."""
    data = np.concatenate(list(random_weights(rng, qtype, n * k, 1 / np.sqrt(k)))).reshape(n, -1)
    if qtype in BLOCK_DTYPES:
        change(data.view(BLOCK_DTYPES[qtype]))
    layout = TileLayout(qtype, n, k)
    source, target = put(device, data), device.allocate(layout.n_bytes, "test")
    device.launch(
        reorder(layout, source.address, target, 0, n, head_dim=head_dim, rope_dim=rope_dim)
    )
    values = rng.standard_normal(n).astype(np.float32)
    address = put(device, values).address if bias else 0
    weights = dequantize(data, qtype).reshape(n, k).astype(np.float64)
    return Matrix(target, layout, address), weights, values if bias else np.zeros(n, np.float32)
