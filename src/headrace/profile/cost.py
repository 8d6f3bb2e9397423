"""What the operations of a step cost: values made, FLOPs, and bytes of weights, activations and KV.

Pure functions of a decoder's operations and a step's rows. A FLOP is a multiplication or an
addition (a division counts as one; exponentials and comparisons are not counted). Bytes are those
that must move at least once: weights by their packed size, once a step; each cached position that
any row of a sequence sees, once a step; activations in the formats the backend keeps them in. What
one work of a part leaves for the next one of the same part moves nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from headrace.backend import Batch
from headrace.instrument import Formats, Work
from headrace.model.decoder import Decoder
from headrace.model.operations import (
    Activation,
    Attend,
    Embed,
    FeedForwardIn,
    FeedForwardOut,
    Head,
    Linear,
    Norm,
    Operation,
    ProjectOut,
    ProjectQKV,
)

FLOAT_BYTES = 4
NORM_FLOPS = 4
"""For each value: its square and the sum, times the scale, times the weight."""

SCORE_FLOPS = 3
"""For each score besides its dot products: times the scale, minus the maximum, into the sum."""

ACTIVATION_FLOPS = {Activation.SILU: 3, Activation.GELU_TANH: 9}
"""For each value, with the product: ``g / (1 + e^-g) u``; the tanh form has the cube as well."""


@dataclass(frozen=True)
class Cost:
    """Counts of a part or of many. ``elements``: values made."""

    elements: float = 0
    flops: float = 0
    weight_bytes: float = 0
    activation_bytes: float = 0
    kv_bytes: float = 0

    @property
    def n_bytes(self) -> float:
        return self.weight_bytes + self.activation_bytes + self.kv_bytes

    @property
    def intensity(self) -> float:
        """FLOPs a byte; 0 where nothing moves."""
        return self.flops / self.n_bytes if self.n_bytes else 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)))

    def __truediv__(self, n: float) -> Cost:
        return Cost(*(getattr(self, f.name) / n for f in fields(Cost)))


@dataclass(frozen=True)
class Rows:
    """What the cost of a step depends on. ``runs``: (first, last) position of each sequence."""

    runs: tuple[tuple[int, int], ...]
    n_logits: int

    @classmethod
    def of(cls, batch: Batch) -> Rows:
        runs: dict[int, tuple[int, int]] = {}
        for slot, position in zip(batch.slots.tolist(), batch.positions.tolist(), strict=True):
            first, _ = runs.get(slot, (position, position))
            runs[slot] = (first, position)
        return cls(tuple(runs.values()), len(batch.logit_rows))

    @property
    def n_rows(self) -> int:
        return sum(last - first + 1 for first, last in self.runs)

    def scores(self, window: int | None) -> int:
        """Pairs (row, position it sees) of one head."""
        return sum(
            _visible(last, window) - _visible(first - 1, window) for first, last in self.runs
        )

    def positions_read(self, window: int | None) -> int:
        """Cached positions that some row sees."""
        return sum(
            last + 1 - (max(0, first + 1 - window) if window else 0) for first, last in self.runs
        )


def _visible(last: int, window: int | None) -> int:
    """Σ of min(p + 1, window) over positions p = 0 … last."""
    n = last + 1
    if window is None or n <= window:
        return n * (n + 1) // 2
    return window * (window + 1) // 2 + (n - window) * window


def cost(
    decoder: Decoder, op: Operation, done: Sequence[Work], formats: Formats, rows: Rows
) -> Cost:
    """What the works ``done`` of ``op`` cost together, in this order, in one part."""
    if isinstance(op, Head) and not rows.n_logits:  # it does not run
        return Cost()
    flows: list[_Flow] = []
    for work in done:
        flows.append(_flow(decoder, op, work, formats, rows, flows[-1].writes if flows else {}))
    moved = 0.0
    for i, flow in enumerate(flows):
        made = {name for earlier in flows[:i] for name in earlier.writes}
        used = {name for later in flows[i + 1 :] for name in later.reads}
        moved += sum(_size(name, n, formats) for name, n in flow.reads.items() if name not in made)
        moved += sum(_size(name, n, formats) for name, n in flow.writes.items() if name not in used)
    return Cost(
        elements=sum(sum(flow.writes.values()) + flow.kv_written for flow in flows),
        flops=sum(flow.flops for flow in flows),
        weight_bytes=sum(flow.weight_bytes for flow in flows),
        activation_bytes=moved,
        kv_bytes=formats.cached * sum(flow.kv_read + flow.kv_written for flow in flows),
    )


@dataclass(frozen=True)
class _Flow:
    """One work: values read from and written to named activations, and of the KV cache."""

    flops: float
    reads: Mapping[str, int] = field(default_factory=dict)
    writes: Mapping[str, int] = field(default_factory=dict)
    weight_bytes: int = 0
    kv_read: int = 0
    kv_written: int = 0


_QUANTISED = "quantised"


def _size(activation: str, n: int, formats: Formats) -> float:
    if activation == _QUANTISED and formats.quantised is not None:
        return n * formats.quantised
    return n * FLOAT_BYTES


def _flow(
    decoder: Decoder,
    op: Operation,
    work: Work,
    formats: Formats,
    rows: Rows,
    made: Mapping[str, int],
) -> _Flow:
    """``made``: by the work before it in the part."""
    T = rows.n_logits if isinstance(op, Head) else rows.n_rows
    match op, work:
        case Embed(), Work.EMBED:
            table = decoder.weights[op.weight]
            n = T * table.k
            bytes_read = T * table.qtype.row_bytes(table.k)
            return _Flow(n if op.scale != 1.0 else 0, {}, {"x": n}, bytes_read)
        case ProjectQKV() | FeedForwardIn() | Head(), Work.NORM:
            return _norm(decoder, op.norm, T * _linears(op)[0].k, "x", "normed")
        case _, Work.QUANTISE:
            source = made or {_source(op): T * _linears(op)[0].k}
            n = sum(source.values())
            return _Flow(n, source, {_QUANTISED: n})
        case _, Work.MATMUL:
            return _matmul(decoder, op, formats, T)
        case ProjectQKV(), Work.HEAD_NORMS:
            return _head_norms(decoder, op, T)
        case ProjectQKV(), Work.ROTARY:
            heads = {"q": T * op.n_heads * op.rope.dim, "k": T * op.n_kv_heads * op.rope.dim}
            return _Flow(3 * sum(heads.values()), heads, heads)
        case ProjectQKV(), Work.CACHE:
            n = T * op.n_kv_heads * op.head_dim
            return _Flow(0, {"k": n, "v": n}, {}, kv_written=2 * n)
        case Attend(), Work.ATTENTION:
            return _attention(op, rows)
        case FeedForwardIn(), Work.ACTIVATION:
            n = T * op.gate.n
            return _Flow(ACTIVATION_FLOPS[op.activation] * n, {"gate": n, "up": n}, {"hidden": n})
        case ProjectOut() | FeedForwardOut(), Work.POST_NORM if op.post_norm:
            return _norm(decoder, op.post_norm, T * _linears(op)[0].n, "branch", "branch")
        case ProjectOut() | FeedForwardOut(), Work.RESIDUAL:
            n = T * _linears(op)[0].n
            return _Flow(n, {"branch": n, "x": n}, {"x": n})
        case Head(), Work.LOGITS:
            n = T * op.out.n
            each = (op.logit_scale != 1.0) + 2 * (op.softcap is not None)
            return _Flow(each * n, {"logits": n}, {"logits": n})
        case Head(), Work.SAMPLE:
            return _Flow(0, {"logits": T * op.out.n}, {"token": T})
    raise ValueError(f"{type(op).__name__} has no {work}")


def _norm(decoder: Decoder, norm: Norm, n: int, source: str, target: str) -> _Flow:
    n_bytes = decoder.weights[norm.weight].n_bytes
    return _Flow(NORM_FLOPS * n, {source: n}, {target: n}, n_bytes)


def _head_norms(decoder: Decoder, op: ProjectQKV, T: int) -> _Flow:
    heads = {}
    n_bytes = 0
    for name, norm, n_heads in (("q", op.q_norm, op.n_heads), ("k", op.k_norm, op.n_kv_heads)):
        if norm is not None:
            heads[name] = T * n_heads * op.head_dim
            n_bytes += decoder.weights[norm.weight].n_bytes
    return _Flow(NORM_FLOPS * sum(heads.values()), heads, heads, n_bytes)


def _matmul(decoder: Decoder, op: Operation, formats: Formats, T: int) -> _Flow:
    linears = _linears(op)
    n_bytes, flops = 0, 0
    reads = {}
    for linear in linears:
        tensor = decoder.weights[linear.weight]
        n_bytes += tensor.n_bytes
        flops += 2 * linear.n * linear.k * T
        if linear.bias is not None:
            n_bytes += decoder.weights[linear.bias].n_bytes
            flops += linear.n * T
        quantised = tensor.qtype.block_size > 1 and formats.quantised is not None
        reads[_QUANTISED if quantised else _source(op)] = T * linear.k
    outputs = zip(_outputs(op), linears, strict=True)
    return _Flow(flops, reads, {name: T * linear.n for name, linear in outputs}, n_bytes)


def _attention(op: Attend, rows: Rows) -> _Flow:
    scores = op.n_heads * rows.scores(op.window)
    n = rows.n_rows * op.n_heads * op.head_dim
    each = 4 * op.head_dim + SCORE_FLOPS + 2 * (op.softcap is not None)
    kv_read = 2 * op.n_kv_heads * op.head_dim * rows.positions_read(op.window)
    return _Flow(each * scores + n, {"q": n}, {"attended": n}, kv_read=kv_read)


def _linears(op: Operation) -> tuple[Linear, ...]:
    match op:
        case ProjectQKV():
            return (op.q, op.k, op.v)
        case FeedForwardIn():
            return (op.gate, op.up)
        case ProjectOut() | Head():
            return (op.out,)
        case FeedForwardOut():
            return (op.down,)
    raise ValueError(f"{type(op).__name__} has no matmul")


def _source(op: Operation) -> str:
    """The activation that the matmuls of ``op`` multiply."""
    match op:
        case ProjectOut():
            return "attended"
        case FeedForwardOut():
            return "hidden"
    return "normed"


def _outputs(op: Operation) -> tuple[str, ...]:
    match op:
        case ProjectQKV():
            return ("q", "k", "v")
        case FeedForwardIn():
            return ("gate", "up")
        case Head():
            return ("logits",)
    return ("branch",)
