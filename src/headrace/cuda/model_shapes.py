"""What the operations of a decoder say together."""

from __future__ import annotations

from collections.abc import Iterator

from headrace.cuda.launchers import CacheShape
from headrace.errors import ModelError
from headrace.model.decoder import Decoder
from headrace.model.operations import (
    FeedForwardIn,
    FeedForwardOut,
    Head,
    Linear,
    Norm,
    Operation,
    ProjectOut,
    ProjectQKV,
)


def products_of(decoder: Decoder) -> Iterator[tuple[Operation, list[Linear]]]:
    """The matrices that each operation multiplies one x by."""
    for op in decoder.operations:
        match op:
            case ProjectQKV():
                yield op, [op.q, op.k, op.v]
            case FeedForwardIn():
                yield op, [op.gate, op.up]
            case ProjectOut(out=linear) | FeedForwardOut(down=linear) | Head(out=linear):
                yield op, [linear]


def next_norms(decoder: Decoder) -> list[Norm]:
    """For each operation, the norm that next reads the residual stream (Head's own for Head)."""
    norms: list[Norm] = []
    following: Norm | None = None
    for operation in reversed(decoder.operations):
        own = operation.norm if isinstance(operation, ProjectQKV | FeedForwardIn | Head) else None
        if isinstance(operation, Head):
            following = own
        if following is None:
            raise ModelError("the last operation of a decoder is its Head")
        norms.append(following)
        following = own or following
    return norms[::-1]


def cache_shapes(decoder: Decoder, cache_type: str) -> dict[int, CacheShape]:
    return {
        op.layer: CacheShape(
            op.n_heads, op.n_kv_heads, op.head_dim, op.rope.dim, op.rope.magnitude,
            quantised=cache_type == "q8_0",
        )
        for op in decoder.operations
        if isinstance(op, ProjectQKV)
    }  # fmt: skip
