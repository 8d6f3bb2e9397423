"""The mathematics of the seven operations, one function each, in NumPy.

Nothing here is fast; everything is meant to be checked against the paper by eye. Functions work in
the dtype of their inputs (float32, or float64 to measure the error of kernels).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.model.operations import Activation, Pairing, Rope

Array = NDArray[Any]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """``x / sqrt(mean(x²) + eps) * weight`` over the last axis. x [..., n], weight [n].

    Zhang and Sennrich 2019 (arXiv:1910.07467).
    """
    mean_square = np.mean(np.square(x), axis=-1, keepdims=True)
    normed: Array = x / np.sqrt(mean_square + eps) * weight
    return normed


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """``y = W x + b`` for each row. x [T, k], weight [n, k], bias [n] -> [T, n]."""
    y = x @ weight.T
    return y if bias is None else y + bias


def inverse_frequencies(rope: Rope, factors: Array | None) -> NDArray[np.float64]:
    """The angle per position of each rotary pair, float64 [dim / 2]. factors: [dim / 2]."""
    exponents = -2.0 * np.arange(rope.dim // 2) / rope.dim
    frequencies = rope.freq_scale * rope.base**exponents
    return frequencies if factors is None else frequencies / factors


def rotate(
    x: Array, positions: NDArray[np.int32], rope: Rope, inv_freq: NDArray[np.float64]
) -> Array:
    """Turn the pairs of each head by its position's angles. x [T, heads, head_dim], positions [T].

    Su et al. 2021 (arXiv:2104.09864). Angles are float64: positions are large, float32 is not.
    """
    angles = positions[:, None, None] * inv_freq
    cos = (rope.magnitude * np.cos(angles)).astype(x.dtype)
    sin = (rope.magnitude * np.sin(angles)).astype(x.dtype)
    if rope.pairing is Pairing.INTERLEAVED:
        first, second = slice(0, rope.dim, 2), slice(1, rope.dim, 2)
    else:
        first, second = slice(0, rope.dim // 2), slice(rope.dim // 2, rope.dim)
    a, b = x[..., first], x[..., second]
    out = x.copy()
    out[..., first] = a * cos - b * sin
    out[..., second] = a * sin + b * cos
    return out


def softmax(x: Array) -> Array:
    """Softmax over the last axis; an entry of -inf has weight 0."""
    e: Array = np.exp(x - np.max(x, axis=-1, keepdims=True))
    e /= np.sum(e, axis=-1, keepdims=True)
    return e


def softcap(x: Array, cap: float | None) -> Array:
    """``cap · tanh(x / cap)``: bounds x smoothly (Gemma 2, arXiv:2408.00118)."""
    return x if cap is None else cap * np.tanh(x / cap)


def attention(
    q: Array,
    k: Array,
    v: Array,
    positions: NDArray[np.int32],
    scale: float,
    window: int | None = None,
    cap: float | None = None,
) -> Array:
    """Causal grouped-query attention of one sequence.

    q [T, n_heads, head_dim] at ``positions`` [T]; k and v [L, n_kv_heads, head_dim] at positions
    0 … L-1. Query head h reads key head ``h // (n_heads / n_kv_heads)``. The row at position p sees
    positions max(0, p - window + 1) … p. Returns [T, n_heads, head_dim].

    Vaswani et al. 2017 (arXiv:1706.03762); Ainslie et al. 2023 (arXiv:2305.13245).
    """
    group = q.shape[1] // k.shape[1]
    distance = positions[:, None] - np.arange(len(k))
    visible = (distance >= 0) & (distance < (window or len(k)))
    out = np.empty_like(q)
    for head in range(q.shape[1]):
        scores = softcap(q[:, head] @ k[:, head // group].T * scale, cap)
        scores = np.where(visible, scores, q.dtype.type(-np.inf))
        out[:, head] = softmax(scores) @ v[:, head // group]
    return out


def activate(x: Array, activation: Activation) -> Array:
    """SiLU ``x·σ(x)``, or GELU in its tanh form (Hendrycks and Gimpel 2016, arXiv:1606.08415)."""
    gate: Array
    if activation is Activation.SILU:
        with np.errstate(over="ignore"):  # exp(-x) = inf rightly gives a gate of 0
            gate = 1 / (1 + np.exp(-x))
    else:
        gate = 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x * gate
