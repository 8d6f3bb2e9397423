"""Grouped-query attention over the paged cache: one task of a step's Attend phase.

Softmax runs online, page by page in order of position (Milakov and Gimelshein 2018,
arXiv:1805.02867), so a row's result depends only on its own position, not on its neighbours.
"""

from __future__ import annotations

import math

import numpy as np

from headrace.backend import PAGE_SIZE
from headrace.cpu.intrinsics import call6, floats
from headrace.cpu.ops import compiled, compiled_in_order, exp

_NEVER = np.float32(-3.0e38)
"""The running maximum before the first score: e^(_NEVER - score) counts as 0."""


@compiled_in_order
def _capped(score, cap):
    """cap · tanh(score / cap)."""
    e = exp(np.float32(-2.0) * abs(score) / cap)
    return math.copysign(cap * (np.float32(1.0) - e) / (np.float32(1.0) + e), score)


@compiled
def _soften(scores, low, high, cap, maximum):
    """Scores [PAGE_SIZE] to weights in place; those outside [low, high) to 0.

    Returns the new running maximum and the sum of the weights.
    """
    if cap > 0:
        for i in range(low, high):
            scores[i] = _capped(scores[i], cap)
    top = maximum
    for i in range(low, high):
        top = max(top, scores[i])
    total = np.float32(0.0)
    for i in range(low, high):
        weight = exp(scores[i] - top)
        scores[i] = weight
        total += weight
    for i in range(low):
        scores[i] = 0
    for i in range(high, PAGE_SIZE):
        scores[i] = 0
    return top, total


@compiled
def attend_block(
    q, out, positions, pages, n_rows, first_head, n_heads, head_dim, scale, window, cap,
    keys, values, page_bytes, scores_kernel, values_kernel, scratch,
):  # fmt: skip
    """``n_heads`` query heads of one key head, for ``n_rows`` consecutive rows of a sequence.

    q, out: [n_rows, all heads · head_dim]; positions: [n_rows]; pages: int32, the sequence's page
    table; keys, values: addresses of this key head in page 0, a page being ``page_bytes`` apart.
    """
    stride = (head_dim + 15) // 16 * 16
    n = n_rows * n_heads
    queries_at = scratch
    scores_at = queries_at + 4 * n * head_dim
    sums_at = scores_at + 4 * n * PAGE_SIZE
    maxima_at = sums_at + 4 * n * stride
    queries, scores = floats(queries_at, (n, head_dim)), floats(scores_at, (n, PAGE_SIZE))
    sums, maxima = floats(sums_at, (n, stride)), floats(maxima_at, n)
    denominators = floats(maxima_at + 4 * n, n)
    for r in range(n_rows):
        for h in range(n_heads):
            source = (first_head + h) * head_dim
            for i in range(head_dim):
                queries[r * n_heads + h, i] = q[r, source + i] * scale
    sums[:] = 0
    maxima[:] = _NEVER
    denominators[:] = 0

    first = max(0, positions[0] - window + 1) if window else 0
    last = positions[n_rows - 1]
    for page in range(first // PAGE_SIZE, last // PAGE_SIZE + 1):
        base = np.int64(pages[page]) * page_bytes
        start = page * PAGE_SIZE
        call6(scores_kernel, queries_at, keys + base, scores_at, n, PAGE_SIZE, head_dim)
        for r in range(n_rows):
            p = positions[r]
            low = min(max(0, p - window + 1 - start), PAGE_SIZE) if window else 0
            high = max(0, min(p + 1 - start, PAGE_SIZE))
            for h in range(n_heads):
                i = r * n_heads + h
                if low >= high:
                    scores[i, :] = 0
                    continue
                top, total = _soften(scores[i], low, high, cap, maxima[i])
                if top > maxima[i]:
                    fade = exp(maxima[i] - top) if maxima[i] > _NEVER else np.float32(0.0)
                    denominators[i] *= fade
                    for j in range(stride):
                        sums[i, j] *= fade
                    maxima[i] = top
                denominators[i] += total
        used = min(PAGE_SIZE, last + 1 - start)
        call6(values_kernel, scores_at, values + base, sums_at, n, stride, used)

    for r in range(n_rows):
        for h in range(n_heads):
            i = r * n_heads + h
            inverse = np.float32(1.0) / denominators[i]
            target = (first_head + h) * head_dim
            for j in range(head_dim):
                out[r, target + j] = sums[i, j] * inverse
