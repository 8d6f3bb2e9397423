"""The products of a few rows on tensor cores against float64.

The reference takes the activations as the kernel does, bfloat16, and exact weights: what is left is
scales, offsets and weights rounded to half precision, and the order of sums.
"""

from __future__ import annotations

import numpy as np
import pytest
from device_memory import (
    activations,
    check_squares,
    from_brain,
    poisoned,
    put,
    random_matrix,
    to_brain,
    untiled,
    upload_activations,
)

from headrace.cuda import arguments as c
from headrace.cuda.device import Device
from headrace.cuda.host import HostDevice
from headrace.cuda.layout import FLOAT_TYPES, TileLayout, tile_block
from headrace.cuda.products import Matrix
from headrace.cuda.skinny import skinny, skinny_shape
from headrace.errors import DeviceError
from headrace.gguf.types import QuantType

LOGITS = {"LOGIT_SCALE": 1.0, "SOFTCAP": 0.0}
QUANTISED = sorted(set(QuantType) - FLOAT_TYPES)
ROUNDED = 1.5e-3
"""Relative, of any row: a half is exact to 2.4e-4, and a minimum several times the weight."""


def rows_of(rng: np.random.Generator, rows: int, k: int, gain: np.ndarray | None = None):
    """x, of rows and columns of unlike sizes, and what the kernel sees of x∘gain."""
    sizes = np.exp2(rng.integers(-20, 20, (rows, 1)) + rng.integers(-2, 3, (1, k)))
    x = (rng.standard_normal((rows, k)) * sizes).astype(np.float32)
    return x, from_brain(to_brain(x if gain is None else x * gain)).astype(np.float64)


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    """The largest of the rows' errors."""
    error = np.linalg.norm(got - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)
    return float(error.max())


@pytest.mark.parametrize("qtype", QUANTISED)
def test_every_type_odd_rows_whole_and_partial_slices(
    tensor_device: Device, qtype: QuantType
) -> None:
    rng = np.random.default_rng(qtype)
    block = tile_block(qtype)[0]
    for n, k, rows in ((13, block, 3), (39, 1024 + 3 * block, 9)):
        matrix, weights, _ = random_matrix(tensor_device, rng, qtype, n, k)
        x, seen = rows_of(rng, rows, k)
        y = poisoned(tensor_device, (rows, n))
        a = upload_activations(tensor_device, x)
        launch = skinny(tensor_device, [matrix], a, c.Store(y.address), rows, macros=LOGITS)
        tensor_device.launch(launch)
        assert relative(tensor_device.download(y), seen @ weights.T) < ROUNDED


@pytest.mark.parametrize("qtype", [QuantType.Q4_K, QuantType.Q6_K, QuantType.Q8_0])
def test_a_row_is_bit_equal_whoever_travels_with_it(device: Device, qtype: QuantType) -> None:
    """1 to 16 rows, from any first row, on a wide matrix whose warps have several stripes."""
    rng = np.random.default_rng(2)
    k, n = 4608, 70
    matrix, weights, _ = random_matrix(device, rng, qtype, n, k)
    x, seen = rows_of(rng, 16, k)
    a, results = upload_activations(device, x), []
    for first, rows in ((0, 16), (0, 1), (0, 8), (5, 9), (13, 3)):
        y = poisoned(device, (rows + 1, n))
        store = c.Store(y.row(1))
        device.launch(skinny(device, [matrix], a, store, rows, first_row=first, macros=LOGITS))
        got = device.download(y)
        assert np.isnan(got[0]).all()
        results.append((first, got[1:]))
    whole = results[0][1]
    assert relative(whole, seen @ weights.T) < ROUNDED
    for first, got in results:
        np.testing.assert_array_equal(got, whole[first : first + len(got)])


@pytest.mark.parametrize("sm_count", [1, 3, 132])
def test_the_grid_and_the_passes_do_not_matter(sm_count: int) -> None:
    rng = np.random.default_rng(7)
    n, k, results = 333, 512, []
    for shared in (40 << 10, 227 << 10):
        device = HostDevice(seed=sm_count)
        device.sm_count, device.shared_limit = sm_count, shared
        rng = np.random.default_rng(7)
        matrix, weights, _ = random_matrix(device, rng, QuantType.Q5_K, n, k)
        x, seen = rows_of(rng, 5, k)
        y = poisoned(device, (5, n))
        a, macros = upload_activations(device, x), {"LOGIT_SCALE": 3.0, "SOFTCAP": 2.0}
        device.launch(skinny(device, [matrix], a, c.Store(y.address), 5, macros=macros))
        results.append(device.download(y))
        assert relative(results[-1], 2 * np.tanh(3 * (seen @ weights.T) / 2)) < ROUNDED
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("rows", [5, 16])
def test_a_pair_fits_a_small_device(rows: int) -> None:
    """Where sixteen areas of a pair would leave no room for a unit."""
    device = HostDevice()
    device.shared_limit = 99 << 10
    pair = [Matrix(0, TileLayout(QuantType.Q4_K, 2048, 4096))] * 2
    shape = skinny_shape(device, pair, rows, paired=True)
    assert shape.shared_bytes <= device.shared_limit
    assert shape.areas == 8


@pytest.mark.parametrize(("qtype", "rows"), [(QuantType.Q4_K, 5), (QuantType.Q8_0, 9)])
def test_stripes_that_share_an_area_do_not_race(qtype: QuantType, rows: int) -> None:
    """Sixteen stripes where there is room for thirteen areas, in any order of the warps."""
    rng, device = np.random.default_rng(rows), HostDevice(sm_count=1, seed=4)
    device.shared_limit, (n, k) = 99 << 10, (2048, 4096)
    shape = skinny_shape(device, [Matrix(0, TileLayout(qtype, n, k))] * 2, rows, paired=True)
    assert shape.areas % shape.stripe_warps == 0
    (gate, gate_w, _), (up, up_w, _) = (random_matrix(device, rng, qtype, n, k) for _ in range(2))
    x = rng.standard_normal((rows, k)).astype(np.float32)
    seen = from_brain(to_brain(x)).astype(np.float64)
    hidden = activations(device, rows, n, brain=True)
    a, product = upload_activations(device, x), c.Product(hidden.at(0))
    device.launch(skinny(device, [gate, up], a, product, rows, macros={"ACTIVATION": "SILU"}))
    g, u = seen @ gate_w.T, seen @ up_w.T
    got = from_brain(untiled(device.download(hidden.brain), rows, n))
    assert relative(got, g / (1 + np.exp(-g)) * u) < 3e-3


@pytest.mark.parametrize("rows", [8, 16])
def test_a_wide_matrix(device: Device, rows: int) -> None:
    rng = np.random.default_rng(14)
    n, k = 6, 14336
    matrix, weights, _ = random_matrix(device, rng, QuantType.Q6_K, n, k)
    x, seen = rows_of(rng, rows, k)
    y = poisoned(device, (rows, n))
    a = upload_activations(device, x)
    device.launch(skinny(device, [matrix], a, c.Store(y.address), rows, macros=LOGITS))
    assert relative(device.download(y), seen @ weights.T) < ROUNDED


def test_scales_of_any_size(device: Device) -> None:
    """Half precision alone would lose them: rows of W and of x a hundred thousand times apart, a
    minimum far above its scales, zeros."""
    rng = np.random.default_rng(11)
    n, k, rows = 16, 512, 4

    def change(blocks: np.ndarray) -> None:
        blocks["d"][:8] *= np.float16(2) ** np.arange(-16, 16, 4, np.float16)[:, None]
        blocks["d"][8], blocks["d"][9, :1], blocks["d"][10, 1:] = 0, 0, 6e4
        for name in {"m", "dmin"} & set(blocks.dtype.names or ()):
            blocks[name][11], blocks[name][12], blocks[name][13, 1:] = 0, 100, 6e4

    for qtype in (QuantType.Q4_1, QuantType.Q4_K, QuantType.Q8_0):
        matrix, weights, _ = random_matrix(device, rng, qtype, n, k, change=change)
        x, seen = rows_of(rng, rows, k)
        x[1] = seen[1] = 0
        x[2, :256] = seen[2, :256] = 0
        y = poisoned(device, (rows, n))
        a = upload_activations(device, x)
        device.launch(skinny(device, [matrix], a, c.Store(y.address), rows, macros=LOGITS))
        got, wanted = device.download(y), seen @ weights.T
        assert (got[1] == 0).all()
        size = np.abs(seen) @ np.abs(weights.T)
        assert (np.abs(got - wanted) <= 1e-3 * size).all(), qtype.name


@pytest.mark.parametrize(
    "types",
    [
        (QuantType.Q4_K, QuantType.Q4_K, QuantType.Q6_K),
        (QuantType.Q4_K, QuantType.Q8_0, QuantType.Q3_K),
        (QuantType.Q5_0, QuantType.Q2_K, QuantType.Q2_K),
    ],
)
def test_three_matrices_with_norm_and_bias(
    tensor_device: Device, types: tuple[QuantType, ...]
) -> None:
    rng = np.random.default_rng(3)
    k, sizes, eps, rows = 1280, (36, 8, 12), 1e-5, 9
    made = [
        random_matrix(tensor_device, rng, t, n, k, bias=True)
        for t, n in zip(types, sizes, strict=True)
    ]
    gain = rng.uniform(0.5, 2, k).astype(np.float32)
    x, seen = rows_of(rng, rows, k, gain)
    inverse = 1 / np.sqrt(np.square(x.astype(np.float64)).mean(-1, keepdims=True) + eps)
    parts = [inverse * (seen @ w.T) + b for _, w, b in made]
    y = poisoned(tensor_device, (rows, sum(sizes)))
    matrices, a = [m for m, _, _ in made], upload_activations(tensor_device, x, gain)
    store = c.Store(y.address)
    tensor_device.launch(
        skinny(tensor_device, matrices, a, store, rows, norm_eps=eps, macros=LOGITS)
    )
    got = np.split(tensor_device.download(y), np.cumsum(sizes)[:-1], axis=1)
    for part, wanted in zip(got, parts, strict=True):
        assert relative(part, wanted) < ROUNDED


@pytest.mark.parametrize("rows", [2, 16])
def test_residual_adds_and_rounds_for_the_next_norm(tensor_device: Device, rows: int) -> None:
    rng = np.random.default_rng(5)
    n, k = 320, 512
    matrix, weights, bias = random_matrix(tensor_device, rng, QuantType.Q5_K, n, k, bias=True)
    x, seen = rows_of(rng, rows, k)
    wanted = seen @ weights.T + bias
    stream = (rng.standard_normal((rows, n)) * np.abs(wanted)).astype(np.float32)
    gain = rng.uniform(0.5, 2, n).astype(np.float32)
    out = activations(tensor_device, rows, n, brain=True)
    tensor_device.upload(out.values.address, stream)
    epilogue = c.Residual(out.at(0), put(tensor_device, gain).address)
    a = upload_activations(tensor_device, x)
    tensor_device.launch(skinny(tensor_device, [matrix], a, epilogue, rows))
    got = tensor_device.download(out.values)
    assert relative(got, stream + wanted) < ROUNDED
    np.testing.assert_array_equal(
        untiled(tensor_device.download(out.brain), rows, n), to_brain(got * gain)
    )
    check_squares(tensor_device, out, got)


@pytest.mark.parametrize("activation", ["SILU", "GELU_TANH"])
@pytest.mark.parametrize(
    "types", [(QuantType.Q4_K, QuantType.Q4_K), (QuantType.Q4_0, QuantType.Q6_K)]
)
def test_activation_product_of_gate_and_up(
    tensor_device: Device, activation: str, types: tuple[QuantType, QuantType]
) -> None:
    rng = np.random.default_rng(6)
    n, k, eps, rows = 112, 1024, 1e-6, 11
    (gate, gate_w, _), (up, up_w, _) = (random_matrix(tensor_device, rng, t, n, k) for t in types)
    x, seen = rows_of(rng, rows, k)
    hidden = activations(tensor_device, rows, n, brain=True)
    launch = skinny(
        tensor_device, [gate, up], upload_activations(tensor_device, x), c.Product(hidden.at(0)),
        rows, norm_eps=eps, macros={"ACTIVATION": activation},
    )  # fmt: skip
    tensor_device.launch(launch)
    inverse = 1 / np.sqrt(np.square(x.astype(np.float64)).mean(-1, keepdims=True) + eps)
    g, u = inverse * (seen @ gate_w.T), inverse * (seen @ up_w.T)
    if activation == "SILU":
        wanted = g / (1 + np.exp(-g)) * u
    else:
        wanted = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) * u
    got = from_brain(untiled(tensor_device.download(hidden.brain), rows, n))
    assert relative(got, wanted) < 3e-3  # bfloat16


def test_what_it_does_not_do_is_refused() -> None:
    def launch(device: Device, qtype: QuantType = QuantType.Q8_0, rows: int = 1) -> None:
        matrix, _, _ = random_matrix(device, np.random.default_rng(0), qtype, 16, 32)
        a = upload_activations(device, np.zeros((rows, 32), np.float32))
        skinny(device, [matrix], a, c.Store(0), rows, macros=LOGITS)

    with pytest.raises(DeviceError, match="needs sm_80, not sm_75"):
        launch(HostDevice(arch=75))
    with pytest.raises(DeviceError, match="17 rows, 16 at most"):
        launch(HostDevice(), rows=17)
    with pytest.raises(DeviceError, match="quantised matrices"):
        launch(HostDevice(), QuantType.F16)
