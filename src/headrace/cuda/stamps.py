"""Time stamps that kernels leave, and what each kernel of an operation does.

Kernels compiled with TIMED note the device's global clock when their first block went on and when
their last one ended (kernels/primitives.cuh); ``token`` does so for each operation of each layer. A
kernel's time runs from the end of the one before to its own end; of it, what passed until its first
block went on was spent between the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain

import numpy as np

from headrace.cuda import launchers
from headrace.cuda.device import Device, DeviceArray, Launch
from headrace.instrument import Part, Span, Work
from headrace.model.operations import (
    Attend,
    Embed,
    FeedForwardIn,
    FeedForwardOut,
    Head,
    Operation,
    ProjectOut,
    ProjectQKV,
)

DOTS, FMAS, TENSORS = "int8 dot products", "float32 multiply-adds", "bfloat16 tensor products"
"""Kinds of arithmetic."""


class Stamps:
    """Room for the stamps of ``capacity`` parts."""

    def __init__(self, device: Device, capacity: int) -> None:
        self._device = device
        address = device.allocate(16 * capacity, "time stamps")
        self._array = DeviceArray(address, (capacity, 2), np.dtype(np.uint64))
        self._origin: int | None = None

    def timed(self, launches: Sequence[Launch], parts: Sequence[Sequence[Part]]) -> list[Launch]:
        """The same kernels, leaving the stamps of each one's parts here, in order."""
        before = accumulate((len(some) for some in parts[:-1]), initial=0)
        rows = [self._array.row(i) for i in before]
        return [launchers.timed(*one) for one in zip(launches, rows, strict=True)]

    def clear(self) -> None:
        """Before each run, in stream order."""
        self._device.clear(self._array.address, self._array.n_bytes)

    def spans(self, parts: Sequence[Sequence[Part]]) -> list[Span]:
        """What the last run of those kernels did; waits for it."""
        flat = list(chain(*parts))
        stamps = self._device.download(self._array)[: len(flat)]
        if self._origin is None:  # the clock counts from 1970: seconds of it would be 0.2 µs apart
            self._origin = int(~stamps[0, 0])
        began = [int(first) - self._origin for first in ~stamps[:, 0]]
        ended = [int(last) - self._origin for last in stamps[:, 1]]
        spans, previous = [], began[0]
        for part, first, last in zip(flat, began, ended, strict=True):
            end = max(previous, last)
            waiting = min(max(0, first - previous), end - previous)
            spans.append(Span(part, previous / 1e9, end / 1e9, waiting / 1e9))
            previous = end
        return spans

    def close(self) -> None:
        self._device.free(self._array.address)


def parts_of(
    index: int, operations: Sequence[Operation], launches: Sequence[Launch]
) -> list[list[Part]]:
    """What each of the kernels does that ``Lowering.plan`` made of these operations, which begin
    with number ``index``: one operation has a part in each kernel, or one kernel does them all."""
    if len(operations) > 1:
        parts = [_kernels(op, 1)[0] for op in operations]
        return [[_part(index + i, *part, launches[0]) for i, part in enumerate(parts)]]
    kernels = zip(launches, _kernels(operations[0], len(launches)), strict=True)
    return [[_part(index, *part, launch)] for launch, part in kernels]


def _part(index: int, name: str, works: tuple[Work, ...], launch: Launch) -> Part:
    arithmetic = FMAS
    if Work.MATMUL in works and launch.spec.name in ("gemm", "skinny"):
        arithmetic = TENSORS
    elif Work.MATMUL in works and dict(launch.spec.macros).get("FLOAT_ACTIVATIONS", "0") == "0":
        arithmetic = DOTS
    return Part(index, name, works, arithmetic)


def _kernels(op: Operation, n: int) -> list[tuple[str, tuple[Work, ...]]]:
    match op:
        case Embed():
            return [
                ("embedding", (Work.EMBED, Work.QUANTISE)),
                *[("angles", (Work.ROTARY,))] * (n - 1),
            ]
        case ProjectQKV() if n > 1:
            return [
                ("norm, q/k/v matmul", (Work.NORM, Work.MATMUL)),
                ("norms, rotary, cache", (Work.HEAD_NORMS, Work.ROTARY, Work.CACHE)),
            ]
        case ProjectQKV():
            works = (Work.NORM, Work.MATMUL, Work.ROTARY, Work.CACHE)
            return [("norm, q/k/v matmul, rotary, cache", works)]
        case Attend():
            return [("attention", (Work.ATTENTION, Work.QUANTISE))]
        case FeedForwardIn():
            works = (Work.NORM, Work.MATMUL, Work.ACTIVATION, Work.QUANTISE)
            return [("norm, gate/up matmul, activation", works)]
        case ProjectOut() | FeedForwardOut():
            matmul = "output matmul" if isinstance(op, ProjectOut) else "down matmul"
            if op.post_norm is None:
                return [(f"{matmul}, residual", (Work.MATMUL, Work.RESIDUAL, Work.QUANTISE))]
            return [
                (matmul, (Work.MATMUL,)),
                ("post-norm, residual", (Work.POST_NORM, Work.RESIDUAL, Work.QUANTISE)),
            ]
        case Head():
            scaled = (Work.LOGITS,) if op.softcap is not None or op.logit_scale != 1.0 else ()
            return [("norm, vocabulary matmul", (Work.NORM, Work.MATMUL, *scaled))]
