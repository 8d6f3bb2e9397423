"""The products on tensor cores against float64: bfloat16 activations, packed weights.

Weights are rounded to bfloat16 on the way, and here in NumPy, so that the comparison is tight; that
a row is the same whoever travels with it is exact.
"""

from __future__ import annotations

import math

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
from headrace.cuda.gemm import SplitWork, gemm, split_room
from headrace.cuda.host import HostDevice
from headrace.cuda.layout import tile_block
from headrace.errors import DeviceError
from headrace.gguf.types import QuantType

LOGITS = {"LOGIT_SCALE": 1.0, "SOFTCAP": 0.0}
ROUNDED = 2e-4
"""Relative: a weight that lies between two bfloat16 may go to either."""


def rows_of(rng: np.random.Generator, rows: int, k: int, gain: np.ndarray | None = None):
    """x, and what the kernel sees of x∘gain."""
    x = rng.standard_normal((rows, k)).astype(np.float32)
    return x, from_brain(to_brain(x if gain is None else x * gain)).astype(np.float64)


def rounded(weights: np.ndarray) -> np.ndarray:
    return from_brain(to_brain(weights.astype(np.float32))).astype(np.float64)


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("qtype", list(QuantType))
def test_every_type_odd_rows_whole_and_partial_slices(device: Device, qtype: QuantType) -> None:
    rng = np.random.default_rng(qtype)
    block = tile_block(qtype)[0]
    for n, k, rows in ((13, block, 3), (39, 1024 + 2 * block, 5)):
        matrix, weights, _ = random_matrix(device, rng, qtype, n, k)
        x, seen = rows_of(rng, rows, k)
        y = poisoned(device, (rows, n))
        a = upload_activations(device, x)
        device.launch(gemm(device, [matrix], a, c.Store(y.address), rows, macros=LOGITS))
        assert relative(device.download(y), seen @ rounded(weights).T) < ROUNDED


@pytest.mark.parametrize("rows", [1, 65, 300])
def test_a_row_is_bit_equal_whoever_travels_with_it(tensor_device: Device, rows: int) -> None:
    rng = np.random.default_rng(rows)
    k, n = 512, 70
    matrix, weights, _ = random_matrix(tensor_device, rng, QuantType.Q4_K, n, k)
    x, seen = rows_of(rng, rows, k)
    y, alone = poisoned(tensor_device, (rows, n)), poisoned(tensor_device, (1, n))
    for target, some in ((y, x), (alone, x[-1:])):
        a = upload_activations(tensor_device, some)
        store = c.Store(target.address)
        tensor_device.launch(gemm(tensor_device, [matrix], a, store, len(some), macros=LOGITS))
    together = tensor_device.download(y)
    assert relative(together, seen @ rounded(weights).T) < ROUNDED
    np.testing.assert_array_equal(together[-1:], tensor_device.download(alone))


@pytest.mark.parametrize(("first", "rows"), [(64, 5), (3, 1), (61, 9), (127, 1)])
def test_rows_from_the_middle(device: Device, first: int, rows: int) -> None:
    rng = np.random.default_rng(8)
    k, n = 256, 21
    matrix, weights, _ = random_matrix(device, rng, QuantType.Q6_K, n, k)
    x, seen = rows_of(rng, first + rows, k)
    guarded = poisoned(device, (rows + 1, n))
    a, store = upload_activations(device, x), c.Store(guarded.row(1))
    device.launch(gemm(device, [matrix], a, store, rows, first_row=first, macros=LOGITS))
    y = device.download(guarded)
    assert relative(y[1:], seen[first:] @ rounded(weights).T) < ROUNDED
    assert np.isnan(y[0]).all()
    residual = c.Residual(activations(device, rows, n).at(0), 0)
    with pytest.raises(DeviceError, match="row 3 begins no tile"):
        gemm(device, [matrix], a, residual, 1, first_row=3)


@pytest.mark.parametrize("tokens", [64, 128, 256])
def test_every_number_of_tokens_at_once(
    tensor_device: Device, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shape that the launcher picks depends on the device: here, each of them."""
    rng = np.random.default_rng(9)
    rows, k, n = 261, 320, 200
    matrix, weights, _ = random_matrix(tensor_device, rng, QuantType.Q8_0, n, k)
    x, seen = rows_of(rng, rows, k)
    y = poisoned(tensor_device, (rows, n))
    monkeypatch.setattr("headrace.cuda.gemm.TOKENS_AT_ONCE", (tokens,))
    a, store = upload_activations(tensor_device, x), c.Store(y.address)
    if tokens == 256 and tensor_device.arch != 90:
        with pytest.raises(DeviceError, match="no gemm variant"):
            gemm(tensor_device, [matrix], a, store, rows, macros=LOGITS)
        return
    launch = gemm(tensor_device, [matrix], a, store, rows, macros=LOGITS)
    assert dict(launch.spec.macros)["TOKENS"] == str(tokens)
    tensor_device.launch(launch)
    assert relative(tensor_device.download(y), seen @ rounded(weights).T) < ROUNDED


@pytest.mark.parametrize("qtype", [QuantType.Q5_0, QuantType.Q3_K])
def test_columns_split_among_blocks(tensor_device: Device, qtype: QuantType) -> None:
    """Few rows: a row is the same whoever travels with it, and the counters are as they were."""
    rng = np.random.default_rng(4)
    n, k, rows = 70, 3072, 19
    matrix, weights, _ = random_matrix(tensor_device, rng, qtype, n, k)
    x, seen = rows_of(rng, rows, k)
    floats, counters = split_room(tensor_device, [n], k, rows, paired=False)
    arrived = put(tensor_device, np.zeros(counters, np.uint32))
    work = SplitWork(poisoned(tensor_device, (floats,)).address, floats, arrived.address)
    results = []
    for some in (x, x[-3:], x):
        y, a = poisoned(tensor_device, (len(some), n)), upload_activations(tensor_device, some)
        store = c.Store(y.address)
        launch = gemm(tensor_device, [matrix], a, store, len(some), macros=LOGITS, work=work)
        assert launch.grid[2] > 1
        tensor_device.launch(launch)
        results.append(tensor_device.download(y))
    assert relative(results[0], seen @ rounded(weights).T) < ROUNDED
    np.testing.assert_array_equal(results[0][-3:], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    assert not tensor_device.download(arrived).any()
    needed = math.prod(launch.grid) * 128 * int(dict(launch.spec.macros)["TOKENS"])
    small = SplitWork(work.partial, needed - 1, work.arrived)
    with pytest.raises(DeviceError, match="partial sums, room for"):
        gemm(tensor_device, [matrix], a, store, rows, macros=LOGITS, work=small)


def test_three_matrices_of_three_types_with_norm_and_bias(tensor_device: Device) -> None:
    rng = np.random.default_rng(3)
    k, sizes, eps, rows = 1280, (36, 8, 12), 1e-5, 9
    types = (QuantType.Q4_K, QuantType.Q8_0, QuantType.Q6_K)
    made = [
        random_matrix(tensor_device, rng, t, n, k, bias=True)
        for t, n in zip(types, sizes, strict=True)
    ]
    gain = rng.uniform(0.5, 2, k).astype(np.float32)
    x, seen = rows_of(rng, rows, k, gain)
    inverse = 1 / np.sqrt(np.square(x.astype(np.float64)).mean(-1, keepdims=True) + eps)
    parts = [inverse * (seen @ rounded(w).T) + b for _, w, b in made]
    y = poisoned(tensor_device, (rows, sum(sizes)))
    matrices, a = [m for m, _, _ in made], upload_activations(tensor_device, x, gain)
    launch = gemm(tensor_device, matrices, a, c.Store(y.address), rows, norm_eps=eps, macros=LOGITS)
    tensor_device.launch(launch)
    got = np.split(tensor_device.download(y), np.cumsum(sizes)[:-1], axis=1)
    for part, wanted in zip(got, parts, strict=True):
        assert relative(part, wanted) < ROUNDED


def test_residual_adds_and_rounds_for_the_next_norm(device: Device) -> None:
    rng = np.random.default_rng(5)
    n, k, rows = 80, 512, 10
    matrix, weights, bias = random_matrix(device, rng, QuantType.Q5_K, n, k, bias=True)
    x, seen = rows_of(rng, rows, k)
    stream = rng.standard_normal((rows, n)).astype(np.float32)
    gain = rng.uniform(0.5, 2, n).astype(np.float32)
    out = activations(device, rows, n, brain=True)
    device.upload(out.values.address, stream)
    epilogue = c.Residual(out.at(0), put(device, gain).address)
    device.launch(gemm(device, [matrix], upload_activations(device, x), epilogue, rows))
    got = device.download(out.values)
    assert relative(got, stream + seen @ rounded(weights).T + bias) < ROUNDED
    np.testing.assert_array_equal(
        untiled(device.download(out.brain), rows, n), to_brain(got * gain)
    )
    check_squares(device, out, got)


@pytest.mark.parametrize("rows", [1, 20])
def test_activation_product_of_gate_and_up(tensor_device: Device, rows: int) -> None:
    rng = np.random.default_rng(6)
    n, k, eps = 112, 1024, 1e-6
    types = (QuantType.Q4_0, QuantType.Q6_K)
    (gate, gate_w, _), (up, up_w, _) = (random_matrix(tensor_device, rng, t, n, k) for t in types)
    x, seen = rows_of(rng, rows, k)
    hidden = activations(tensor_device, rows, n, brain=True)
    launch = gemm(
        tensor_device, [gate, up], upload_activations(tensor_device, x), c.Product(hidden.at(0)),
        rows, norm_eps=eps, macros={"ACTIVATION": "SILU"},
    )  # fmt: skip
    tensor_device.launch(launch)
    inverse = 1 / np.sqrt(np.square(x.astype(np.float64)).mean(-1, keepdims=True) + eps)
    g, u = inverse * (seen @ rounded(gate_w).T), inverse * (seen @ rounded(up_w).T)
    got = from_brain(untiled(tensor_device.download(hidden.brain), rows, n))
    assert relative(got, rounded(g / (1 + np.exp(-g)) * u)) < 2 * ROUNDED


def test_a_device_without_them_is_refused() -> None:
    device = HostDevice(arch=75)
    matrix, _, _ = random_matrix(device, np.random.default_rng(0), QuantType.Q8_0, 16, 32)
    a = upload_activations(device, np.zeros((1, 32), np.float32))
    with pytest.raises(DeviceError, match="needs sm_80, not sm_75"):
        gemm(device, [matrix], a, c.Store(0), 1, macros=LOGITS)
