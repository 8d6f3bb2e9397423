"""What the compiled step reads and writes: tables, arrays, and how their addresses are handed over.

Python fills these, compiled code (``step.py``) opens them; neither needs the other to be loaded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from headrace.backend import PAGE_SIZE
from headrace.cpu import matmul

PROJECT_QKV, ATTEND, PROJECT_OUT, FEED_FORWARD_IN, FEED_FORWARD_OUT, HEAD = range(6)

OPERATION = np.dtype(
    [(name, np.int64) for name in ("kind", "layer", "first_matmul", "last_matmul")]
    + [(name, np.int64) for name in ("norm", "q_norm", "k_norm", "post_norm")]  # addresses or 0
    + [(name, np.float32) for name in ("eps", "q_eps", "k_eps", "post_eps")]
    + [(name, np.int64) for name in ("width", "n_heads", "n_kv_heads", "head_dim")]
    + [(name, np.int64) for name in ("rope", "rope_dim", "interleaved", "window", "gelu")]
    + [(name, np.float32) for name in ("scale", "softcap")]
)
"""One operation. ``width``: columns of its input. ``window`` and ``softcap`` are 0 for none."""

MATMUL = np.dtype(
    [
        (name, np.int64)
        for name in ("kernel", "n_tiles", "tile_bytes", "float_input", "bias", "residual")
    ]
    + [(name, np.int64) for name in matmul.ARGUMENTS]
)
"""One matmul of an operation: the kernel's address, its work, and its argument array.

``residual``: 1 when it adds to the residual stream. A bias is put into y first, then added to.
"""


class Buffers(NamedTuple):
    """Activations of up to ``max_rows`` rows, flat: an operation sees [T, its own width]."""

    x: NDArray[np.float32]  # residual stream [T, d_model]
    normed: NDArray[np.float32]  # input of a matmul in float32 [T, d_model]
    q: NDArray[np.float32]  # [T, n_heads head_dim]
    k: NDArray[np.float32]  # [T, n_kv_heads head_dim]
    v: NDArray[np.float32]
    attended: NDArray[np.float32]  # [T, n_heads head_dim]
    gate: NDArray[np.float32]  # [T, d_ff]
    up: NDArray[np.float32]
    branch: NDArray[np.float32]  # output of a branch before its post-norm [T, d_model]
    quantised: NDArray[np.int8]  # int8 input of a matmul [T, k]
    records: NDArray[Any]  # its groups, matmul.GROUP_RECORD [T, k / 16]
    cos: NDArray[np.float32]  # [n_ropes, max_rows, largest rope dim / 2]
    sin: NDArray[np.float32]


CONTEXT = np.dtype(
    [
        (name, np.int64)
        for name in (
            # Fixed at load: tables, and where each activation of Buffers is.
            *("operations", "matmuls", "d_model", *Buffers._fields, "max_rows", "max_angles"),
            # The cache: keys and values, halves [n_pages, n_layers, n_kv_heads, page_halves].
            *("keys", "values", "n_pages", "n_layers", "page_halves"),
            # A step: operations first … last - 1, and per row (int32) its position, its sequence's
            # page table [n_rows, max_pages], the rows whose logits are wanted, and runs of rows for
            # attention (first row, rows).
            *("n_rows", "n_logit_rows", "first", "last", "n_blocks"),
            *("positions", "pages", "max_pages", "logit_rows", "all_rows", "blocks"),
            # Work counters, zero when a step starts; scratch of each member; attention kernels.
            *("counters", "scratch", "scratch_bytes", "scores_kernel", "values_kernel"),
            # Set to end the team; the last step member 0 has finished.
            *("closing", "finished"),
            # Time stamps [n_threads, n_stamps, 2] when a step is timed, else 0: see step.py.
            *("stamps", "n_stamps"),
        )
    ]
)
"""All a step needs, as numbers and addresses."""

COUNTER_BYTES = 64
"""Between the work counters of two operations: a cache line."""

ROWS_PER_BLOCK = 8
"""Rows of one sequence that share each read of a page in attention."""


def head_stride(head_dim: int) -> int:
    """Floats between heads in the value pages and the attention scratch: whole vectors."""
    return -(-head_dim // 16) * 16


def attention_scratch_bytes(group: int, head_dim: int) -> int:
    """Scratch one thread needs: queries, scores, sums, maxima and denominators."""
    return 4 * ROWS_PER_BLOCK * group * (2 * head_stride(head_dim) + PAGE_SIZE + 2)


# Offsets in the memory that a team's members share, a cache line apart.
_LINE = 64
ARRIVED, GENERATION = 0, _LINE  # of the barrier
TICKET = 2 * _LINE  # the number of steps started


def parked(member: int) -> int:
    """The flag of a member: 1 while it sleeps or is about to."""
    return (2 + member) * _LINE


def shared_bytes(n_threads: int) -> int:
    return (2 + n_threads) * _LINE
