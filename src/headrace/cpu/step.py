"""One step of the decoder as one compiled call, run by every member of the team together.

An operation is a few phases with a barrier after each. In a phase the members share out matmul
tiles, heads or columns; which member does what never changes a result.

``c`` is a record of ``layout.CONTEXT``, ``op`` one of ``layout.OPERATION``, throughout.
"""

from __future__ import annotations

import numba as nb

from headrace.backend import PAGE_SIZE
from headrace.cpu.attend import attend_block
from headrace.cpu.intrinsics import (
    atomic_add,
    atomic_load,
    call4,
    cycle_count,
    floats,
    prefetch,
    view,
)
from headrace.cpu.layout import (
    ATTEND,
    CONTEXT,
    COUNTER_BYTES,
    FEED_FORWARD_IN,
    HEAD,
    MATMUL,
    OPERATION,
    PROJECT_OUT,
    PROJECT_QKV,
    TICKET,
)
from headrace.cpu.matmul import GROUP_RECORD
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
from headrace.cpu.sync import await_ticket, barrier

_PREFETCHED = 16 << 10
"""Bytes of a first tile worth asking for: a third of an L1 cache."""

_MATMUL_BYTES = MATMUL.itemsize
_ARGUMENTS_AT = MATMUL.fields["weights"][1]  # type: ignore[index]


@compiled
def _total_tiles(c, op):
    matmuls = view(c.matmuls, op.last_matmul, MATMUL)
    total = 0
    for m in range(op.first_matmul, op.last_matmul):
        total += matmuls[m].n_tiles
    return total


@compiled
def _tiles_at_a_time(total, n_threads):
    """Tiles a member takes at once: long runs, since each tile is prefetched by the one before;
    an equal share of a few hundred."""
    turns = max(1, total // (256 * n_threads))
    return (total + turns * n_threads - 1) // (turns * n_threads)


@compiled
def _run_matmuls(c, op, member, n_threads, counter, scratch):
    """The members take runs of tiles of the operation's matmuls until none is left.

    The first run of each is its own; the counter hands out the rest.
    """
    first, last = op.first_matmul, op.last_matmul
    matmuls = view(c.matmuls, last, MATMUL)
    total = _total_tiles(c, op)
    run = _tiles_at_a_time(total, n_threads)
    start = member * run
    while start < total:
        stop = min(start + run, total)
        base = 0
        for m in range(first, last):
            tiles = matmuls[m].n_tiles
            low, high = max(start - base, 0), min(stop - base, tiles)
            if low < high:
                arguments = c.matmuls + m * _MATMUL_BYTES + _ARGUMENTS_AT
                call4(matmuls[m].kernel, arguments, low, high, scratch)
            base += tiles
        start = n_threads * run + atomic_add(counter, run)


@compiled
def _prefetch_first_tile(c, op, member, n_threads):
    """Ask for the first weights this member will need, before it waits for the others."""
    matmuls = view(c.matmuls, op.last_matmul, MATMUL)
    tile = member * _tiles_at_a_time(_total_tiles(c, op), n_threads)
    for m in range(op.first_matmul, op.last_matmul):
        if tile < matmuls[m].n_tiles:
            start = matmuls[m].weights + tile * matmuls[m].tile_bytes
            for at in range(0, min(matmuls[m].tile_bytes, _PREFETCHED), 64):
                prefetch(start + at)
            return
        tile -= matmuls[m].n_tiles


@compiled
def _share(width, n_parts, part):
    """Columns [low, high) of one of ``n_parts`` shares of a row, at multiples of 32."""
    groups = (width + 31) // 32
    low, high = groups * part // n_parts * 32, groups * (part + 1) // n_parts * 32
    return low, min(high, width)


@compiled
def _place_biases(c, op, n_rows, member, n_threads):
    """Each bias into y, where its matmul adds up: as the start, or onto the residual stream."""
    matmuls = view(c.matmuls, op.last_matmul, MATMUL)
    for m in range(op.first_matmul, op.last_matmul):
        if matmuls[m].bias == 0:
            continue
        n = matmuls[m].n
        bias = floats(matmuls[m].bias, n)
        y = floats(matmuls[m].y, (n_rows, n))
        for t in range(member, n_rows, n_threads):
            for i in range(n):
                y[t, i] = y[t, i] + bias[i] if matmuls[m].residual else bias[i]


@compiled
def _quantise_share(c, x, t, width, low, high):
    """Columns [low, high) of row ``x`` [width] into row ``t`` of the int8 buffer."""
    at = t * width + low
    q = view(c.quantised + at, high - low, nb.int8)
    records = view(c.records + at, (high - low) // 16, GROUP_RECORD)  # a byte a column, too
    quantise_row(x[low:high], q, records)


@compiled
def _norm_and_quantise(c, op, rows, n_rows, member, n_threads):
    """normed[i] = norm(x[rows[i]]), and its int8 form. Few rows are shared by column."""
    width = op.width
    x = floats(c.x, (c.n_rows, width))
    normed = floats(c.normed, (n_rows, width))
    weight = floats(op.norm, width)
    parts = n_threads if n_rows < n_threads else 1
    for item in range(member, n_rows * parts, n_threads):
        i = item // parts
        source, target = x[rows[i]], normed[i]
        low, high = _share(width, parts, item % parts)
        scale = rms_scale(source, op.eps)
        for j in range(low, high):
            target[j] = source[j] * scale * weight[j]
        _quantise_share(c, target, i, width, low, high)


@compiled
def _quantise_attended(c, op, n_rows, member, n_threads):
    width = op.width
    x = floats(c.attended, (n_rows, width))
    parts = n_threads if n_rows < n_threads else 1
    for item in range(member, n_rows * parts, n_threads):
        low, high = _share(width, parts, item % parts)
        _quantise_share(c, x[item // parts], item // parts, width, low, high)


@compiled
def _activate_and_quantise(c, op, n_rows, member, n_threads):
    """gate = activation(gate) · up, and its int8 form."""
    width = op.width
    gate, up = floats(c.gate, (n_rows, width)), floats(c.up, (n_rows, width))
    parts = n_threads if n_rows < n_threads else 1
    for item in range(member, n_rows * parts, n_threads):
        t = item // parts
        low, high = _share(width, parts, item % parts)
        if op.gelu:
            gelu_times(gate[t, low:high], up[t, low:high])
        else:
            silu_times(gate[t, low:high], up[t, low:high])
        _quantise_share(c, gate[t], t, width, low, high)


@compiled
def _add_normed(c, op, n_rows, member, n_threads):
    """x += post_norm(branch)."""
    d = c.d_model
    x, branch = floats(c.x, (n_rows, d)), floats(c.branch, (n_rows, d))
    weight = floats(op.post_norm, d)
    for t in range(member, n_rows, n_threads):
        rms_norm(branch[t], weight, op.post_eps, branch[t])
        for i in range(d):
            x[t, i] += branch[t, i]


@compiled
def _page_address(c, layer, page, n_kv_heads, head):
    """Bytes from the start of the keys, or of the values, to one head's part of a page."""
    return 2 * c.page_halves * ((page * c.n_layers + layer) * n_kv_heads + head)


@compiled
def _rotate_and_store(c, op, n_rows, member, n_threads):
    """Norm and turn every query and key head; write keys and values to the cache."""
    head_dim, n_heads, n_kv = op.head_dim, op.n_heads, op.n_kv_heads
    half, stride = op.rope_dim // 2, (head_dim + 15) // 16 * 16
    q = floats(c.q, (n_rows, n_heads, head_dim))
    k = floats(c.k, (n_rows, n_kv, head_dim))
    v = floats(c.v, (n_rows, n_kv, head_dim))
    positions = view(c.positions, n_rows, nb.int32)
    pages = view(c.pages, (n_rows, c.max_pages), nb.int32)
    for item in range(member, n_rows * (n_heads + n_kv), n_threads):
        t, h = item // (n_heads + n_kv), item % (n_heads + n_kv)
        angles = 4 * c.max_angles * (op.rope * c.max_rows + t)
        cos, sin = floats(c.cos + angles, half), floats(c.sin + angles, half)
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
        position = positions[t]
        at = _page_address(c, op.layer, pages[t, position // PAGE_SIZE], n_kv, h)
        keys = view(c.keys + at, c.page_halves, nb.uint16)
        values = view(c.values + at, c.page_halves, nb.uint16)
        slot = position % PAGE_SIZE
        for i in range(head_dim):
            keys[i * PAGE_SIZE + slot] = half_bits(head[i])
            values[slot * stride + i] = half_bits(v[t, h, i])


@compiled
def _attend(c, op, n_rows, n_threads, counter, scratch):
    """The members take (block of rows, key head) tasks, or single query heads if those are few."""
    head_dim, n_heads, n_kv = op.head_dim, op.n_heads, op.n_kv_heads
    width = n_heads * head_dim
    q, out = floats(c.q, (n_rows, width)), floats(c.attended, (n_rows, width))
    positions = view(c.positions, n_rows, nb.int32)
    pages = view(c.pages, (n_rows, c.max_pages), nb.int32)
    blocks = view(c.blocks, (c.n_blocks, 2), nb.int32)
    group = n_heads // n_kv
    together = group if c.n_blocks * n_kv >= 4 * n_threads else 1
    per_block = n_heads // together
    while True:
        task = atomic_add(counter, 1)
        if task >= c.n_blocks * per_block:
            return
        row, count = blocks[task // per_block, 0], blocks[task // per_block, 1]
        head = task % per_block * together
        at = _page_address(c, op.layer, 0, n_kv, head // group)
        attend_block(
            q[row : row + count], out[row : row + count], positions[row : row + count],
            pages[row], count, head, together, head_dim, op.scale, op.window, op.softcap,
            c.keys + at, c.values + at, _page_address(c, 0, 1, n_kv, 0),
            c.scores_kernel, c.values_kernel, scratch,
        )  # fmt: skip


@compiled
def _stamp(stamps, phase, which):
    """Note the clock: where this member ends its share of ``phase`` (0), or goes on (1)."""
    view(stamps + 16 * phase, 2, nb.int64)[which] = cycle_count()


@compiled
def _end_phase(shared, n_threads, stamps, phase):
    """Wait for the others; returns the number of the next phase. ``stamps``: 0 for none."""
    if stamps:
        _stamp(stamps, phase, 0)
    barrier(shared, n_threads)
    if stamps:
        _stamp(stamps, phase, 1)
    return phase + 1


@compiled
def _run(c, member, n_threads, shared):
    """Operations first … last - 1 over the rows in ``c.x``.

    The phases are numbered from 1 in the order they run: ``instrument.phases`` names them.
    """
    n_rows, n_logits = c.n_rows, c.n_logit_rows
    scratch = c.scratch + member * c.scratch_bytes
    operations = view(c.operations, c.last, OPERATION)
    all_rows = view(c.all_rows, n_rows, nb.int32)
    logit_rows = view(c.logit_rows, n_logits, nb.int32)
    # Read once: when member 0 has left the last barrier, the host may end the timing.
    stamps = c.stamps + 16 * member * c.n_stamps if c.stamps else 0
    if stamps:
        _stamp(stamps, 0, 0)
        _stamp(stamps, 0, 1)
    phase = 1
    for o in range(c.first, c.last):
        op = operations[o]
        counter = c.counters + o * COUNTER_BYTES
        if op.kind == ATTEND:
            _attend(c, op, n_rows, n_threads, counter, scratch)
            phase = _end_phase(shared, n_threads, stamps, phase)
            continue
        rows = n_logits if op.kind == HEAD else n_rows
        if op.kind == PROJECT_QKV or op.kind == FEED_FORWARD_IN:
            _norm_and_quantise(c, op, all_rows, rows, member, n_threads)
        elif op.kind == HEAD:
            _norm_and_quantise(c, op, logit_rows, rows, member, n_threads)
        elif op.kind == PROJECT_OUT:
            _quantise_attended(c, op, rows, member, n_threads)
        else:  # FEED_FORWARD_OUT
            _activate_and_quantise(c, op, rows, member, n_threads)
        _place_biases(c, op, rows, member, n_threads)
        _prefetch_first_tile(c, op, member, n_threads)
        phase = _end_phase(shared, n_threads, stamps, phase)
        _run_matmuls(c, op, member, n_threads, counter, scratch)
        phase = _end_phase(shared, n_threads, stamps, phase)
        if op.kind == PROJECT_QKV:
            _rotate_and_store(c, op, rows, member, n_threads)
            phase = _end_phase(shared, n_threads, stamps, phase)
        elif op.post_norm:
            _add_normed(c, op, rows, member, n_threads)
            phase = _end_phase(shared, n_threads, stamps, phase)


@compiled
def take_part(member, n_threads, shared, ticket, context):
    """The one entry from outside; all int64.

    Member 0 runs the step just started. Another member runs every step after ``ticket`` as it
    starts, and returns the last one seen when none has come for a while or the team closes.
    """
    c = view(context, 1, CONTEXT)[0]
    if member == 0:
        _run(c, member, n_threads, shared)
        c.finished = atomic_load(shared + TICKET)
        return ticket
    while True:
        newest = await_ticket(shared, ticket)
        if newest == ticket or c.closing:
            return newest
        ticket = newest
        _run(c, member, n_threads, shared)
