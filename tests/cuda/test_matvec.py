"""The matvec kernel against float64 NumPy on the dequantised weights.

With int8 activations the reference takes the same rounded activations, so that every comparison is
tight: what rounding costs is measured apart.
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from device_memory import (
    activations,
    check_squares,
    dequantise,
    poisoned,
    put,
    quantise,
    random_matrix,
    read_quantised,
    upload_activations,
)

from headrace.cuda import arguments as c
from headrace.cuda.device import Device
from headrace.cuda.layout import FLOAT_TYPES, tile_block
from headrace.cuda.products import matvec
from headrace.cuda.tuning import Tuning
from headrace.gguf.types import QuantType

LOGITS = {"LOGIT_SCALE": 1.0, "SOFTCAP": 0.0}
SMALL = Tuning(matvec_warps=4, matvec_stages=2)


def x_and_rounded(
    rng: np.random.Generator, rows: int, k: int, floats: bool
) -> tuple[np.ndarray, np.ndarray]:
    """x, and what the kernel will see of it."""
    x = rng.standard_normal((rows, k)).astype(np.float32)
    return x, x.astype(np.float64) if floats else dequantise(*quantise(x))


def relative(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("qtype", list(QuantType))
def test_every_type_odd_rows_whole_and_partial_slices(
    device: Device, qtype: QuantType, floats: bool
) -> None:
    rng = np.random.default_rng(qtype)
    block = tile_block(qtype)[0]
    for n, k in ((13, block), (7, 1024 + 2 * block)):
        matrix, weights, _ = random_matrix(device, rng, qtype, n, k)
        x, seen = x_and_rounded(rng, 1, k, floats or qtype in FLOAT_TYPES)
        y = poisoned(device, (1, n))
        launch = matvec(
            device, [matrix], upload_activations(device, x), c.Store(y.address), 1,
            floats=floats, macros=LOGITS, tuning=SMALL,
        )  # fmt: skip
        device.launch(launch)
        assert relative(device.download(y), seen @ weights.T) < 2e-6


@pytest.mark.parametrize("k", [14336, 4864, 576])
def test_wide_matrices(device: Device, k: int) -> None:
    rng = np.random.default_rng(k)
    qtype = QuantType.Q4_K if k % 256 == 0 else QuantType.Q4_1
    matrix, weights, _ = random_matrix(device, rng, qtype, 6, k)
    x, seen = x_and_rounded(rng, 1, k, False)
    y = poisoned(device, (1, 6))
    device.launch(
        matvec(
            device, [matrix], upload_activations(device, x), c.Store(y.address), 1, macros=LOGITS
        )
    )
    assert relative(device.download(y), seen @ weights.T) < 2e-6


def test_three_matrices_of_three_types_with_norm_and_bias(any_device: Device) -> None:
    rng = np.random.default_rng(3)
    k, sizes, eps = 1280, (36, 8, 12), 1e-5
    types = (QuantType.Q4_K, QuantType.Q5_0, QuantType.Q6_K)
    made = [
        random_matrix(any_device, rng, t, n, k, bias=True)
        for t, n in zip(types, sizes, strict=True)
    ]
    x, gain = (
        rng.standard_normal((3, k)).astype(np.float32),
        rng.uniform(0.5, 2, k).astype(np.float32),
    )
    seen = dequantise(*quantise(x * gain))
    inverse = 1 / np.sqrt(np.square(x.astype(np.float64)).mean(-1, keepdims=True) + eps)
    wanted = np.concatenate([inverse * (seen @ w.T) + b for _, w, b in made], axis=1)
    y = poisoned(any_device, wanted.shape)
    matrices, a = [m for m, _, _ in made], upload_activations(any_device, x, gain)
    launch = matvec(
        any_device, matrices, a, c.Store(y.address), 3,
        norm_eps=eps, macros=LOGITS, tuning=SMALL,
    )  # fmt: skip
    any_device.launch(launch)
    assert relative(any_device.download(y), wanted) < 2e-6


@pytest.mark.parametrize("early", [0, 1, 2])
@pytest.mark.parametrize("n", [20, 400])
def test_how_early_stages_are_requested_changes_nothing(
    any_device: Device, n: int, early: int
) -> None:
    """Fewer tiles than stages, and many more."""
    rng = np.random.default_rng(n)
    matrix, weights, _ = random_matrix(any_device, rng, QuantType.Q4_K, n, 2304)
    x, seen = x_and_rounded(rng, 1, 2304, False)
    y = poisoned(any_device, (1, n))
    tuning = Tuning(matvec_warps=4, matvec_stages=3, matvec_early=early)
    a = upload_activations(any_device, x)
    launch = matvec(any_device, [matrix], a, c.Store(y.address), 1, macros=LOGITS, tuning=tuning)
    any_device.launch(launch)
    assert relative(any_device.download(y), seen @ weights.T) < 2e-6


def test_a_norm_of_more_rows_than_warps(device: Device) -> None:
    """A warp sums the squares of one row."""
    rng = np.random.default_rng(12)
    n, k, rows, eps = 20, 256, 8, 1e-5
    matrix, weights, _ = random_matrix(device, rng, QuantType.Q8_0, n, k)
    x, seen = x_and_rounded(rng, rows, k, False)
    inverse = 1 / np.sqrt(np.square(x.astype(np.float64)).mean(-1, keepdims=True) + eps)
    y, a = poisoned(device, (rows, n)), upload_activations(device, x)
    launch = matvec(
        device, [matrix], a, c.Store(y.address), rows,
        norm_eps=eps, macros=LOGITS, tuning=SMALL,
    )  # fmt: skip
    device.launch(launch)
    assert relative(device.download(y), inverse * (seen @ weights.T)) < 2e-6


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 11])
@pytest.mark.parametrize("qtype", [QuantType.Q4_K, QuantType.Q6_K, QuantType.Q8_0])
def test_a_row_is_bit_equal_whoever_travels_with_it(
    device: Device, qtype: QuantType, rows: int
) -> None:
    rng = np.random.default_rng(rows)
    k, n = 2304, 22
    matrix, weights, _ = random_matrix(device, rng, qtype, n, k)
    x, seen = x_and_rounded(rng, rows, k, False)
    a = upload_activations(device, x)
    y, alone = poisoned(device, (rows, n)), poisoned(device, (1, n))
    device.launch(
        matvec(device, [matrix], a, c.Store(y.address), rows, macros=LOGITS, tuning=SMALL)
    )
    last = matvec(device, [matrix], a, c.Store(alone.address), 1, first_row=rows - 1, macros=LOGITS)
    device.launch(last)
    together = device.download(y)
    assert relative(together, seen @ weights.T) < 2e-6
    np.testing.assert_array_equal(together[-1:], device.download(alone))


@pytest.mark.parametrize("floats", [False, True])
def test_residual_adds_and_quantises_for_the_next_norm(device: Device, floats: bool) -> None:
    rng = np.random.default_rng(5)
    n, k, rows = 80, 512, 2
    matrix, weights, bias = random_matrix(device, rng, QuantType.Q5_K, n, k, bias=True)
    x, seen = x_and_rounded(rng, rows, k, floats)
    stream = rng.standard_normal((rows, n)).astype(np.float32)
    gain = rng.uniform(0.5, 2, n).astype(np.float32)
    out = activations(device, rows, n)
    device.upload(out.values.address, stream)
    epilogue = c.Residual(out.at(0), put(device, gain).address)
    device.launch(
        matvec(
            device,
            [matrix],
            upload_activations(device, x),
            epilogue,
            rows,
            floats=floats,
            tuning=SMALL,
        )
    )
    wanted = stream + seen @ weights.T + bias
    got = device.download(out.values)
    assert relative(got, wanted) < 2e-6
    rounded = dequantise(*quantise(got * gain))
    np.testing.assert_array_equal(read_quantised(device, out), rounded)
    check_squares(device, out, got)


@pytest.mark.parametrize("activation", ["SILU", "GELU_TANH"])
@pytest.mark.parametrize(
    "types", [(QuantType.Q4_K, QuantType.Q4_K), (QuantType.Q4_0, QuantType.Q6_K)]
)
def test_activation_product_of_gate_and_up(
    any_device: Device, activation: str, types: tuple[QuantType, QuantType]
) -> None:
    rng = np.random.default_rng(6)
    n, k, eps = 112, 1024, 1e-6
    (gate, gate_w, _), (up, up_w, _) = (random_matrix(any_device, rng, t, n, k) for t in types)
    x, seen = x_and_rounded(rng, 1, k, False)
    hidden = activations(any_device, 1, n)
    launch = matvec(
        any_device, [gate, up], upload_activations(any_device, x), c.Product(hidden.at(0)), 1,
        norm_eps=eps, macros={"ACTIVATION": activation}, tuning=SMALL,
    )  # fmt: skip
    any_device.launch(launch)
    inverse = 1 / np.sqrt(np.square(x.astype(np.float64)).mean(-1, keepdims=True) + eps)
    g, u = inverse * (seen @ gate_w.T), inverse * (seen @ up_w.T)
    if activation == "SILU":
        wanted = g / (1 + np.exp(-g)) * u
    else:
        wanted = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) * u
    got = any_device.download(hidden.values)
    assert relative(got, wanted) < 2e-6
    assert relative(read_quantised(any_device, hidden), wanted) < 0.01


def test_logits_are_scaled_and_capped_over_several_passes(device: Device) -> None:
    rng = np.random.default_rng(7)
    n, k = 9001, 256
    matrix, weights, _ = random_matrix(device, rng, QuantType.Q8_0, n, k)
    x, seen = x_and_rounded(rng, 1, k, False)
    y = poisoned(device, (1, n))
    launch = matvec(
        device, [matrix], upload_activations(device, x), c.Store(y.address), 1,
        macros={"LOGIT_SCALE": 3.0, "SOFTCAP": 2.0},
    )  # fmt: skip
    device.launch(launch)
    assert relative(device.download(y), 2 * np.tanh(3 * (seen @ weights.T) / 2)) < 2e-6


def test_int8_activations_cost_less_than_a_hundredth(device: Device) -> None:
    """Capability 2's bound, on random weights of every quantised type."""
    rng = np.random.default_rng(8)
    for qtype in sorted(set(QuantType) - FLOAT_TYPES):
        matrix, weights, _ = random_matrix(device, rng, qtype, 64, 1024)
        x = rng.standard_normal((1, 1024)).astype(np.float32)
        y = poisoned(device, (1, 64))
        device.launch(
            matvec(
                device,
                [matrix],
                upload_activations(device, x),
                c.Store(y.address),
                1,
                macros=LOGITS,
            )
        )
        assert relative(device.download(y), x.astype(np.float64) @ weights.T) < 0.01, qtype.name


def test_the_order_of_threads_does_not_matter() -> None:
    from headrace.cuda.host import HostDevice

    results = []
    for seed in (1, 99):
        device = HostDevice(seed=seed)
        rng = np.random.default_rng(9)
        matrix, _, _ = random_matrix(device, rng, QuantType.Q4_K, 48, 2048)
        x, _ = x_and_rounded(rng, 1, 2048, False)
        out = activations(device, 1, 48)
        device.upload(out.values.address, np.zeros((1, 48), np.float32))
        gain = put(device, np.ones(48, np.float32))
        epilogue = c.Residual(out.at(0), gain.address)
        device.launch(
            matvec(device, [matrix], upload_activations(device, x), epilogue, 1, tuning=SMALL)
        )
        results.append(device.download(out.values))
    np.testing.assert_array_equal(*results)


def test_the_argument_structs_are_as_large_as_c_makes_them() -> None:
    assert ctypes.sizeof(c.Cache) == 48
    assert ctypes.sizeof(c.matvec_arguments(c.Store())) == 24 + 24 + 48 + 8 + 8 + 8
