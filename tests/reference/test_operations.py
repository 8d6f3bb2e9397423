"""The pieces of the reference that whole-model tests would not pin down."""

from __future__ import annotations

import math

import numpy as np
import pytest

from headrace.model.operations import Activation, Pairing, Rope
from headrace.reference import operations as ops


def test_rms_norm_by_hand():
    x = np.array([[3.0, 4.0]])
    expected = np.array([[3.0, 8.0]]) / math.sqrt(12.5 + 0.5)
    np.testing.assert_allclose(ops.rms_norm(x, np.array([1.0, 2.0]), eps=0.5), expected)


@pytest.mark.parametrize("pairing", Pairing)
def test_rotation_of_part_of_a_head(pairing):
    rope = Rope(base=100.0, dim=4, pairing=pairing, freq_scale=0.5, magnitude=2.0)
    inv_freq = ops.inverse_frequencies(rope, np.array([1.0, 5.0]))
    np.testing.assert_allclose(inv_freq, [0.5, 0.5 * 0.1 / 5])
    x = np.arange(1.0, 7.0).reshape(1, 1, 6)
    out = ops.rotate(x, np.array([3], np.int32), rope, inv_freq)[0, 0]
    pairs = {Pairing.INTERLEAVED: [(0, 1), (2, 3)], Pairing.HALF: [(0, 2), (1, 3)]}[pairing]
    for (a, b), frequency in zip(pairs, inv_freq, strict=True):
        turned = 2 * complex(x[0, 0, a], x[0, 0, b]) * np.exp(3j * frequency)
        assert complex(out[a], out[b]) == pytest.approx(turned)
    assert out[4:].tolist() == [5.0, 6.0]


def test_attention_window_softcap_and_groups_by_hand():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((2, 4, 3)), rng.standard_normal((5, 2, 3)), rng.random((5, 2, 3))
    out = ops.attention(q, k, v, np.array([3, 4]), scale=0.7, window=2, cap=1.5)
    for row, position in enumerate((3, 4)):
        for head in range(4):
            seen = range(position - 1, position + 1)
            scores = [1.5 * math.tanh(0.7 * (q[row, head] @ k[i, head // 2]) / 1.5) for i in seen]
            weights = np.exp(scores) / np.exp(scores).sum()
            expected = sum(w * v[i, head // 2] for w, i in zip(weights, seen, strict=True))
            np.testing.assert_allclose(out[row, head], expected)


@pytest.mark.parametrize("activation", Activation)
def test_activations_at_the_extremes(activation):
    x = np.array([-1e30, -200.0, -1.0, 0.0, 1.0, 200.0], np.float32)
    with np.errstate(over="ignore"):  # the cube of 1e30
        out = ops.activate(x, activation)
    minus_one = {Activation.SILU: -1 / (1 + math.e), Activation.GELU_TANH: -0.158808}[activation]
    np.testing.assert_allclose(out, [0, 0, minus_one, 0, 1 + minus_one, 200], atol=1e-6)
    assert out.dtype == np.float32
