"""The arithmetic between the matmuls: norms, quantised activations, rotary, softmax.

Each function works on one row and is compiled into the step. Formulas are those of
``headrace.reference.operations``.
"""

from __future__ import annotations

import math
from typing import Any

import numba as nb
import numpy as np

from headrace.cpu.intrinsics import float_bits, float_from_bits

_FAST = {"reassoc", "contract", "arcp", "nsz"}
"""What LLVM may do to vectorise: reorder sums. NaN and infinity keep their meaning."""

_OPTIONS: Any = {"nogil": True, "error_model": "numpy", "boundscheck": False}

compiled = nb.njit(fastmath=_FAST, **_OPTIONS)
compiled_in_order = nb.njit(fastmath={"contract"}, **_OPTIONS)
"""For formulas whose rounding errors cancel only as written."""


_SMALLEST = np.float32(1e-36)
"""Activations smaller than this, a whole group of them, count as 0."""


@compiled
def rms_scale(x, eps):
    """1 / sqrt(mean(x²) + eps). x [n]."""
    total = np.float32(0.0)
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    return np.float32(1.0 / math.sqrt(total / x.shape[0] + eps))


@compiled
def rms_norm(x, weight, eps, out):
    """out = x · rms_scale(x) · weight, all [n]."""
    scale = rms_scale(x, eps)
    for i in range(x.shape[0]):
        out[i] = x[i] * scale * weight[i]


@compiled
def quantise_row(x, q, records):
    """x [n] to int8 in groups of 16: q = round(127 x / max|x|). The scale is that of the least
    squared error of scale × q, a little off max|x| / 127.

    n: a multiple of 32; records: ``matmul.GROUP_RECORD`` [n / 16].
    """
    for g in range(x.shape[0] // 16):
        at = 16 * g
        # The largest magnitude, compared as bits: NaN is the largest of all and is not lost.
        bits = np.int32(0)
        for i in range(at, at + 16):
            bits = max(bits, float_bits(x[i]) & np.int32(0x7FFFFFFF))
        largest = float_from_bits(bits)
        if largest < _SMALLEST:  # its reciprocal would overflow
            largest = np.float32(0.0)
        inverse = np.float32(127.0) / largest if largest > 0 else np.float32(0.0)
        total, squares, products = np.float32(0.0), np.float32(0.0), np.float32(0.0)
        for i in range(at, at + 16):
            value = x[i] * inverse
            rounded = np.int32(value + math.copysign(np.float32(0.5), value))
            q[i] = np.int8(rounded)
            exact = np.float32(rounded)  # as are the first two sums
            total += exact
            squares += exact * exact
            products += value * exact
        record = records[g]
        if largest > 0:  # in double: the compiler may order the products as it likes
            record.scale = np.float64(largest) * products / (np.float64(127.0) * squares)
        else:
            record.scale = largest
        record.sum = record.scale * total
    for pair in range(0, x.shape[0] // 16, 2):
        total = records[pair].sum + records[pair + 1].sum
        records[pair].pair_sum = total
        records[pair + 1].pair_sum = total


@compiled
def rotate(head, cos, sin, interleaved):
    """Turn the pairs of one head [head_dim] in place. cos, sin: [dim / 2]."""
    n = cos.shape[0]
    step, apart = (2, 1) if interleaved else (1, n)
    for i in range(n):
        a, b = head[i * step], head[i * step + apart]
        head[i * step] = a * cos[i] - b * sin[i]
        head[i * step + apart] = a * sin[i] + b * cos[i]


@compiled_in_order
def exp(x):
    """e^x for x ≤ 0 or moderate x in float32, in a form LLVM vectorises. Error below 2.5 ulp.

    2^k · e^r with r = x - k ln 2 (Cody–Waite) and a degree-6 Taylor–Horner polynomial. Clamped to
    the normal range: e^x underflows to about 1e-38, not to 0.
    """
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    k = math.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = (x - k * np.float32(0.693359375)) - k * np.float32(-2.12194440e-4)
    p = np.float32(1.0 / 720.0)
    p = p * r + np.float32(1.0 / 120.0)
    p = p * r + np.float32(1.0 / 24.0)
    p = p * r + np.float32(1.0 / 6.0)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    return p * float_from_bits((np.int32(k) + np.int32(127)) << np.int32(23))


@compiled
def silu_times(gate, up):
    """gate = silu(gate) · up, in place, all [n]."""
    for i in range(gate.shape[0]):
        g = gate[i]
        gate[i] = g / (np.float32(1.0) + exp(-g)) * up[i]


@compiled
def gelu_times(gate, up):
    """gate = gelu_tanh(gate) · up, in place; (1 + tanh t) / 2 = 1 / (1 + e^-2t)."""
    for i in range(gate.shape[0]):
        g = gate[i]
        t = np.float32(2.0 * 0.7978845608028654) * (g + np.float32(0.044715) * g * g * g)
        gate[i] = g / (np.float32(1.0) + exp(-t)) * up[i]


@compiled_in_order
def half_bits(x):
    """A float32 as IEEE half bits, to nearest even; beyond ±65504 clamped, NaN kept."""
    bits = float_bits(x)
    sign = (bits >> 16) & 0x8000
    magnitude = bits & 0x7FFFFFFF
    if magnitude > 0x7F800000:
        return np.uint16(sign | 0x7E00)
    if magnitude >= 0x477FF000:  # rounds to more than 65504
        return np.uint16(sign | 0x7BFF)
    if magnitude < 0x38800000:  # below 2^-14: a subnormal half, a multiple of 2^-24
        shifted = float_bits(abs(x) + np.float32(0.5))  # 0.5 has its last bit at 2^-24
        return np.uint16(sign | (shifted - 0x3F000000))
    rounded = magnitude + 0xFFF + ((magnitude >> 13) & 1)
    return np.uint16(sign | ((rounded >> 13) - (112 << 10)))
