"""One step of the decoder as one compiled call, run by every member of the team together.

An operation is a few phases with a barrier after each. In a phase the members share out matmul
tiles, heads or columns; which member does what never changes a result.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.backend import PAGE_SIZE
from headrace.cpu import plan
from headrace.cpu.attend import attend_block
from headrace.cpu.intrinsics import atomic_add, call4, floats
from headrace.cpu.ops import (
    compiled,
    gelu_times,
    half_bits,
    quantise_row,
    rms_norm,
    rms_scale,
    rotate,
    silu_times,
)
from headrace.cpu.team import await_ticket, barrier

COUNTERS_PER_OPERATION = 2
COUNTER_STRIDE = 8
"""int64s between work counters: a cache line each."""

N_ROWS, N_LOGIT_ROWS, FIRST, LAST, N_BLOCKS, CLOSING = range(6)


class Cache(NamedTuple):
    """Keys and values in half precision (as uint16), [n_layers, n_pages, n_kv_heads, page].

    The page of a head is [head_dim, PAGE_SIZE] of keys, [PAGE_SIZE, head_stride] of values; both
    take head_stride · PAGE_SIZE halves.
    """

    keys: NDArray[np.uint16]
    values: NDArray[np.uint16]


class Step(NamedTuple):
    """What changes from step to step, in fixed arrays."""

    sizes: NDArray[np.int64]  # see N_ROWS … CLOSING
    positions: NDArray[np.int32]  # [max_rows]
    pages: NDArray[np.int32]  # [max_rows, max_pages]: the page table of each row's sequence
    logit_rows: NDArray[np.int32]  # [max_rows]
    blocks: NDArray[np.int32]  # [max_rows, 2]: first row and number of rows, for attention
    counters: NDArray[np.int64]  # shared work counters, zero when a step starts
    scratch: NDArray[np.uint8]  # [n_threads, bytes]
    attention_kernels: NDArray[np.int64]  # addresses: scores, values


_MATMUL_BYTES = plan.MATMUL.itemsize
_ARGUMENTS_AT = plan.MATMUL.fields["weights"][1]  # type: ignore[index]


@compiled
def _run_matmuls(matmuls, first, last, n_threads, counter, scratch):
    """The members take runs of tiles of matmuls first … last - 1 until none is left."""
    total = 0
    for m in range(first, last):
        total += matmuls[m].n_tiles
    run = max(1, min(16, total // (8 * n_threads)))
    while True:
        start = atomic_add(counter, run)
        if start >= total:
            return
        stop = min(start + run, total)
        base = 0
        for m in range(first, last):
            tiles = matmuls[m].n_tiles
            low, high = max(start - base, 0), min(stop - base, tiles)
            if low < high:
                arguments = matmuls.ctypes.data + m * _MATMUL_BYTES + _ARGUMENTS_AT
                call4(matmuls[m].kernel, arguments, low, high, scratch)
            base += tiles


@compiled
def _share(width, n_parts, part):
    """Columns [low, high) of one of ``n_parts`` shares of a row, at multiples of 32."""
    groups = (width + 31) // 32
    low, high = groups * part // n_parts * 32, groups * (part + 1) // n_parts * 32
    return low, min(high, width)


@compiled
def _place_biases(matmuls, first, last, n_rows, member, n_threads):
    """Each bias into y, where its matmul adds up: as the start, or onto the residual stream."""
    for m in range(first, last):
        if matmuls[m].bias == 0:
            continue
        n = matmuls[m].n
        bias = floats(matmuls[m].bias, n)
        y = floats(matmuls[m].y, (n_rows, n))
        for t in range(member, n_rows, n_threads):
            for i in range(n):
                y[t, i] = y[t, i] + bias[i] if matmuls[m].residual else bias[i]


@compiled
def _quantise_share(x, t, width, low, high, buffers):
    """Columns [low, high) of x [T, width] into the int8 buffer."""
    q = buffers.quantised[t * width : (t + 1) * width]
    records = buffers.records[t * width // 16 : (t + 1) * width // 16]
    quantise_row(x[t, low:high], q[low:high], records[low // 16 : high // 16])


@compiled
def _norm_and_quantise(op, x, rows, n_rows, buffers, member, n_threads):
    """buffers.normed[i] = norm(x[rows[i]]), and its int8 form. Few rows are shared by column."""
    width = op.width
    weight = floats(op.norm, width)
    normed = buffers.normed[: n_rows * width].reshape((n_rows, width))
    parts = n_threads if n_rows < n_threads else 1
    for item in range(member, n_rows * parts, n_threads):
        i = item // parts
        source = x[rows[i]]
        low, high = _share(width, parts, item % parts)
        scale = rms_scale(source, op.eps)
        for j in range(low, high):
            normed[i, j] = source[j] * scale * weight[j]
        _quantise_share(normed, i, width, low, high, buffers)


@compiled
def _quantise_all(x, n_rows, width, buffers, member, n_threads):
    parts = n_threads if n_rows < n_threads else 1
    for item in range(member, n_rows * parts, n_threads):
        low, high = _share(width, parts, item % parts)
        _quantise_share(x, item // parts, width, low, high, buffers)


@compiled
def _activate_and_quantise(op, n_rows, buffers, member, n_threads):
    """gate = activation(gate) · up, and its int8 form."""
    width = op.width
    gate = buffers.gate[: n_rows * width].reshape((n_rows, width))
    up = buffers.up[: n_rows * width].reshape((n_rows, width))
    parts = n_threads if n_rows < n_threads else 1
    for item in range(member, n_rows * parts, n_threads):
        t = item // parts
        low, high = _share(width, parts, item % parts)
        if op.gelu:
            gelu_times(gate[t, low:high], up[t, low:high])
        else:
            silu_times(gate[t, low:high], up[t, low:high])
        _quantise_share(gate, t, width, low, high, buffers)


@compiled
def _add_normed(op, n_rows, d_model, buffers, member, n_threads):
    """x += post_norm(branch)."""
    x = buffers.x[: n_rows * d_model].reshape((n_rows, d_model))
    branch = buffers.branch[: n_rows * d_model].reshape((n_rows, d_model))
    weight = floats(op.post_norm, d_model)
    for t in range(member, n_rows, n_threads):
        rms_norm(branch[t], weight, op.post_eps, branch[t])
        for i in range(d_model):
            x[t, i] += branch[t, i]


@compiled
def _rotate_and_store(op, step, cache, buffers, n_rows, member, n_threads):
    """Norm and turn every query and key head; write keys and values to the cache."""
    head_dim, n_heads, n_kv = op.head_dim, op.n_heads, op.n_kv_heads
    half = op.rope_dim // 2
    q = buffers.q[: n_rows * n_heads * head_dim].reshape((n_rows, n_heads, head_dim))
    k = buffers.k[: n_rows * n_kv * head_dim].reshape((n_rows, n_kv, head_dim))
    v = buffers.v[: n_rows * n_kv * head_dim].reshape((n_rows, n_kv, head_dim))
    stride = (head_dim + 15) // 16 * 16
    for item in range(member, n_rows * (n_heads + n_kv), n_threads):
        t, h = item // (n_heads + n_kv), item % (n_heads + n_kv)
        cos = buffers.cos[op.rope, t, :half]
        sin = buffers.sin[op.rope, t, :half]
        if h < n_heads:
            head = q[t, h]
            if op.q_norm:
                rms_norm(head, floats(op.q_norm, head_dim), op.q_eps, head)
            rotate(head, cos, sin, op.interleaved)
            continue
        h -= n_heads
        head = k[t, h]
        if op.k_norm:
            rms_norm(head, floats(op.k_norm, head_dim), op.k_eps, head)
        rotate(head, cos, sin, op.interleaved)
        position = step.positions[t]
        page = step.pages[t, position // PAGE_SIZE]
        slot = position % PAGE_SIZE
        keys, values = cache.keys[op.layer, page, h], cache.values[op.layer, page, h]
        for i in range(head_dim):
            keys[i * PAGE_SIZE + slot] = half_bits(head[i])
            values[slot * stride + i] = half_bits(v[t, h, i])


@compiled
def _attend(op, step, cache, buffers, n_rows, n_threads, counter, scratch):
    """The members take (block of rows, key head) tasks, or single query heads if those are few."""
    head_dim, n_heads, n_kv = op.head_dim, op.n_heads, op.n_kv_heads
    width = n_heads * head_dim
    q = buffers.q[: n_rows * width].reshape((n_rows, width))
    out = buffers.attended[: n_rows * width].reshape((n_rows, width))
    n_blocks = step.sizes[N_BLOCKS]
    group = n_heads // n_kv
    together = group if n_blocks * n_kv >= 4 * n_threads else 1
    per_block = n_heads // together
    page_bytes = 2 * cache.keys.shape[2] * cache.keys.shape[3]
    while True:
        task = atomic_add(counter, 1)
        if task >= n_blocks * per_block:
            return
        row, count = step.blocks[task // per_block]
        head = task % per_block * together
        key_head = head // group
        attend_block(
            q[row : row + count], out[row : row + count], step.positions[row : row + count],
            step.pages[row], count, head, together, head_dim, op.scale, op.window, op.softcap,
            cache.keys[op.layer, 0, key_head].ctypes.data,
            cache.values[op.layer, 0, key_head].ctypes.data,
            page_bytes, step.attention_kernels, scratch,
        )  # fmt: skip


@compiled
def run_step(member, n_threads, shared, operations, matmuls, buffers, cache, step, all_rows):
    """Operations FIRST … LAST - 1 over the rows in ``buffers.x``. all_rows: arange(max_rows)."""
    n_rows = step.sizes[N_ROWS]
    scratch = step.scratch[member].ctypes.data
    for o in range(step.sizes[FIRST], step.sizes[LAST]):
        op = operations[o]
        first, last = op.first_matmul, op.last_matmul
        counter = step.counters.ctypes.data + o * COUNTERS_PER_OPERATION * COUNTER_STRIDE * 8
        d_model = operations[0].width
        x = buffers.x[: n_rows * d_model].reshape((n_rows, d_model))
        if op.kind == plan.PROJECT_QKV:
            _norm_and_quantise(op, x, all_rows, n_rows, buffers, member, n_threads)
            _place_biases(matmuls, first, last, n_rows, member, n_threads)
            barrier(shared, n_threads)
            _run_matmuls(matmuls, first, last, n_threads, counter, scratch)
            barrier(shared, n_threads)
            _rotate_and_store(op, step, cache, buffers, n_rows, member, n_threads)
        elif op.kind == plan.ATTEND:
            _attend(op, step, cache, buffers, n_rows, n_threads, counter, scratch)
        elif op.kind == plan.HEAD:
            n_logits = step.sizes[N_LOGIT_ROWS]
            _norm_and_quantise(op, x, step.logit_rows, n_logits, buffers, member, n_threads)
            _place_biases(matmuls, first, last, n_logits, member, n_threads)
            barrier(shared, n_threads)
            _run_matmuls(matmuls, first, last, n_threads, counter, scratch)
        elif op.kind == plan.FEED_FORWARD_IN:
            _norm_and_quantise(op, x, all_rows, n_rows, buffers, member, n_threads)
            _place_biases(matmuls, first, last, n_rows, member, n_threads)
            barrier(shared, n_threads)
            _run_matmuls(matmuls, first, last, n_threads, counter, scratch)
        else:  # PROJECT_OUT, FEED_FORWARD_OUT
            if op.kind == plan.PROJECT_OUT:
                attended = buffers.attended[: n_rows * op.width].reshape((n_rows, op.width))
                _quantise_all(attended, n_rows, op.width, buffers, member, n_threads)
            else:
                _activate_and_quantise(op, n_rows, buffers, member, n_threads)
            _place_biases(matmuls, first, last, n_rows, member, n_threads)
            barrier(shared, n_threads)
            _run_matmuls(matmuls, first, last, n_threads, counter, scratch)
            if op.post_norm:
                barrier(shared, n_threads)
                _add_normed(op, n_rows, d_model, buffers, member, n_threads)
        barrier(shared, n_threads)


@compiled
def serve_steps(
    member, shared, ticket, n_threads, operations, matmuls, buffers, cache, step, all_rows
):
    """The life of a member awake: run steps as they start; return when none comes for a while."""
    while True:
        newest = await_ticket(shared, ticket)
        if newest == ticket or step.sizes[CLOSING]:
            return newest
        ticket = newest
        run_step(member, n_threads, shared, operations, matmuls, buffers, cache, step, all_rows)
