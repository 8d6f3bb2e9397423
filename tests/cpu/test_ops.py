"""The compiled arithmetic between the matmuls, one function at a time, against float64."""

from __future__ import annotations

from itertools import product

import numba as nb
import numpy as np
import pytest

from headrace.cpu import matmul, ops
from headrace.model.operations import Activation, Pairing, Rope
from headrace.reference import operations as reference


@nb.njit
def _exps(x, out):
    for i in range(x.shape[0]):
        out[i] = ops.exp(x[i])


@nb.njit
def _half_bits(x, out):
    for i in range(x.shape[0]):
        out[i] = ops.half_bits(x[i])


def exp(x: np.ndarray) -> np.ndarray:
    out = np.full_like(x, np.nan)
    _exps(x, out)
    return out


def half_bits(x: np.ndarray) -> np.ndarray:
    out = np.zeros(x.shape, np.uint16)
    _half_bits(x, out)
    return out


# Norms


@pytest.mark.parametrize("n", [1, 7, 64, 2048, 14336])
def test_rms_norm(n):
    rng = np.random.default_rng(n)
    x = (3 * rng.standard_normal(n)).astype(np.float32)
    weight = rng.standard_normal(n).astype(np.float32)
    out = np.full(n + 1, 7, np.float32)
    ops.rms_norm(x, weight, np.float32(1e-5), out[:n])
    exact = reference.rms_norm(x.astype(float), weight.astype(float), float(np.float32(1e-5)))
    np.testing.assert_allclose(out[:n], exact, rtol=2e-6)
    assert out[n] == 7
    ops.rms_norm(x, weight, np.float32(1e-5), x)  # in place
    assert (x == out[:n]).all()


def test_rms_norm_of_zeros_and_of_tiny_values_is_bounded_by_eps():
    weight, out = np.ones(64, np.float32), np.full(64, np.nan, np.float32)
    ops.rms_norm(np.zeros(64, np.float32), weight, np.float32(1e-6), out)
    assert (out == 0).all()
    ops.rms_norm(np.full(64, 1e-3, np.float32), weight, np.float32(1e-6), out)
    np.testing.assert_allclose(out, 1e-3 / np.sqrt(2e-6), rtol=1e-5)


def test_rms_norm_keeps_nan_and_infinity_visible():
    weight, out = np.ones(64, np.float32), np.zeros(64, np.float32)
    for bad in (np.nan, np.inf):
        x = np.ones(64, np.float32)
        x[10] = bad
        ops.rms_norm(x, weight, np.float32(1e-6), out)
        assert np.isnan(out[10])


# Quantised activations


def quantise(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    q = np.full(len(x) + 1, 99, np.int8)
    records = np.full(len(x) // 16 + 1, np.nan, matmul.GROUP_RECORD)
    ops.quantise_row(x, q[:-1], records[:-1].view(np.recarray))
    assert q[-1] == 99
    assert np.isnan(records["scale"][-1])
    return q[:-1], records[:-1]


def check_records(q: np.ndarray, records: np.ndarray) -> None:
    integers = q.reshape(-1, 16).sum(1, dtype=np.int32).astype(np.float32)
    with np.errstate(over="ignore"):  # of the largest floats
        sums = records["scale"] * integers
    np.testing.assert_allclose(records["sum"], sums, rtol=1e-6)
    pairs = records["sum"].reshape(-1, 2).sum(1)
    np.testing.assert_allclose(records["pair_sum"], pairs.repeat(2), rtol=1e-6)


def hostile_rows() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(64).astype(np.float32)
    one_huge, negative = normal.copy(), -np.abs(normal)
    one_huge[5] = 3e38
    return {
        "normal": normal,
        "zeros": np.zeros(64, np.float32),
        "half zeros": np.concatenate([normal[:16], np.zeros(48, np.float32)]),
        "one huge": one_huge,
        "one huge below zero": -one_huge,
        "largest": np.full(64, np.finfo(np.float32).max, np.float32) * np.sign(normal),
        "negative": negative,
        "small": normal * np.float32(1e-30),
        "tiny": normal * np.float32(1e-37),
        "subnormal": normal * np.float32(1e-41),
        "smallest": np.sign(normal) * np.float32(1.4e-45),
        "alternating": np.where(np.arange(64) % 2, np.float32(1), np.float32(-1)),
        "thirds": np.float32(1 / 3) * np.arange(-32, 32, dtype=np.float32),
        "halves": np.arange(-127, 129, 4, dtype=np.float32)[:64] / 2,
    }


@pytest.mark.parametrize("name", hostile_rows())
def test_quantise_row(name):
    x = hostile_rows()[name]
    q, records = quantise(x)
    groups = x.astype(float).reshape(-1, 16)
    step = np.abs(groups).max(1) / 127
    integers = q.astype(float).reshape(-1, 16)
    assert q.min() >= -127
    # 127 / max|x| would overflow for groups below 1e-36: they count as zeros.
    assert (np.abs(integers * step[:, None] - groups) <= 0.5001 * step[:, None] + 1e-36).all()
    reaches = 127 * step > 1e-36
    assert (np.abs(integers).max(1)[reaches] == 127).all()
    squares = np.square(integers).sum(1)
    best = np.divide((groups * integers).sum(1), squares, out=step * 1, where=squares > 0)
    np.testing.assert_allclose(records["scale"], best, rtol=2e-6, atol=1e-38)
    check_records(q, records)


def test_groups_do_not_share_a_scale():
    x = np.ones(96, np.float32)
    x[16:32] = 1000
    q, records = quantise(x)
    assert (q == 127).all()
    np.testing.assert_allclose(records["scale"][[0, 1, 2]], [1 / 127, 1000 / 127, 1 / 127])
    np.testing.assert_allclose(records["pair_sum"][[0, 1, 2]], [16016, 16016, 32], rtol=1e-6)


def test_quantise_rounds_to_nearest_at_every_magnitude():
    rng = np.random.default_rng(4)
    for exponent in range(-34, 38, 4):
        x = (rng.uniform(-1, 1, 16 * 512) * 10.0**exponent).astype(np.float32)
        q, records = quantise(x)
        step = np.abs(x.astype(float)).reshape(-1, 16).max(1).repeat(16) / 127
        assert np.abs(q - x / step).max() <= 0.5001
        check_records(q, records)


def test_nan_and_infinity_stay_visible():
    """They must not turn into a plausible finite activation."""
    for bad, where in product((np.nan, np.inf, -np.inf), (slice(3, 4), slice(0, 32))):
        x = np.ones(32, np.float32)
        x[where] = bad
        q, records = quantise(x)
        with np.errstate(invalid="ignore"):
            products = q[:16].astype(np.float32) * records["scale"][0]
        assert not np.isfinite(products).all(), bad


# Exponential and activations


def test_exp_is_accurate_and_monotone():
    x = np.linspace(-87, 88, 2_000_001).astype(np.float32)
    y = exp(x)
    exact = np.exp(x.astype(np.float64))
    ulp = np.spacing(exact.astype(np.float32)).astype(float)
    assert (np.abs(y - exact) / ulp).max() <= 2.5
    fall = y[1:] < y[:-1]  # where a polynomial ends, one ulp may go back
    assert (y[1:][fall] >= y[:-1][fall] * (1 - 2.5e-7)).all()
    assert exp(np.zeros(1, np.float32))[0] == 1


def test_exp_of_neighbouring_floats_near_every_power_of_two():
    k = np.arange(-125, 127)
    edges = ((k + 0.5) * np.log(2)).astype(np.float32)
    x = edges[:, None] + np.spacing(edges)[:, None] * np.arange(-20, 21, dtype=np.float32)
    x = x[(x > -87) & (x < 88)].astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    ulp = np.spacing(exact.astype(np.float32)).astype(float)
    assert (np.abs(exp(x) - exact) / ulp).max() <= 2.5


def test_exp_clamps():
    ends = exp(np.array([-87, 88], np.float32))
    far = exp(np.array([-1e4, -np.inf, -3.0e38, 89, 1e4, np.inf], np.float32))
    assert (far == ends[[0, 0, 0, 1, 1, 1]]).all()
    assert 0 < ends[0] < 2e-38
    assert np.isfinite(ends[1])


def _turn(x: np.ndarray, activation: Activation) -> np.ndarray:
    """t of x / (1 + e^-t): the reference's tanh form loses the negative tail to cancellation."""
    if activation is Activation.SILU:
        return np.maximum(x, -700)
    return np.maximum(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3), -700)


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize("n", [1, 31, 512])
def test_activations(activation, n):
    rng = np.random.default_rng(n)
    function = ops.silu_times if activation is Activation.SILU else ops.gelu_times
    for spread in (1, 20, 1000):
        gate = (spread * rng.standard_normal(n)).astype(np.float32)
        gate[::5] = 0
        up = rng.standard_normal(n).astype(np.float32)
        exact = gate / (1 + np.exp(-_turn(gate.astype(float), activation))) * up
        out = np.append(gate, np.float32(7))
        function(out[:n], up)
        # t itself is rounded, and up to 87; beyond, e^t is clamped: the far tail is tiny, not 0.
        np.testing.assert_allclose(out[:n], exact, rtol=3e-5, atol=1e-30)
        np.testing.assert_allclose(
            out[:n], reference.activate(gate.astype(float), activation) * up, rtol=1e-6, atol=1e-6
        )
        assert out[n] == 7


# Half precision


def expected_halves(x: np.ndarray) -> np.ndarray:
    """NumPy's rounding, with what would be infinite clamped."""
    return np.clip(x, -65504, 65504).astype(np.float16).view(np.uint16)


def test_half_bits_around_every_half():
    values = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    values = np.sort(values[np.isfinite(values)])
    middles = ((values[1:].astype(float) + values[:-1]) / 2).astype(np.float32)  # exact
    centres = np.concatenate([values, middles])
    x = np.concatenate(
        [centres, np.nextafter(centres, np.float32(np.inf)), np.nextafter(centres, -np.inf)]
    ).astype(np.float32)
    assert (half_bits(x) == expected_halves(x)).all()


def test_half_bits_of_random_floats():
    bits = np.random.default_rng(2).integers(0, 1 << 32, 1_000_000, dtype=np.uint64)
    x = bits.astype(np.uint32).view(np.float32)
    x = x[~np.isnan(x)]
    assert (half_bits(x) == expected_halves(x)).all()


def test_half_bits_clamps_and_keeps_nan():
    far = np.array([65504, 65519.99, 65520, 1e6, 3e38, np.inf], np.float32)
    assert (half_bits(far) == 0x7BFF).all()
    assert (half_bits(-far) == 0xFBFF).all()
    nans = np.array([0x7F800001, 0x7FC00000, 0xFFC00001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(half_bits(nans).view(np.float16)).all()
    zeros = np.array([0.0, -0.0, 1e-45, -1e-45, 2.0**-25, 2.0**-24], np.float32)
    assert half_bits(zeros).tolist() == [0, 0x8000, 0, 0x8000, 0, 1]


# Rotary embedding


@pytest.mark.parametrize("pairing", list(Pairing))
@pytest.mark.parametrize(("head_dim", "dim"), [(64, 64), (96, 72), (4, 4), (128, 32)])
def test_rotate(pairing, head_dim, dim):
    rng = np.random.default_rng(head_dim)
    rope = Rope(base=10000.0, dim=dim, pairing=pairing, magnitude=1.25)
    inv_freq = reference.inverse_frequencies(rope, None)
    head = rng.standard_normal(head_dim).astype(np.float32)
    angles = 1234 * inv_freq
    cos, sin = ((1.25 * f(angles)).astype(np.float32) for f in (np.cos, np.sin))
    exact = reference.rotate(
        head.astype(float)[None, None], np.array([1234], np.int32), rope, inv_freq
    )[0, 0]
    ops.rotate(head, cos, sin, pairing is Pairing.INTERLEAVED)
    np.testing.assert_allclose(head, exact, rtol=0, atol=1e-6)
