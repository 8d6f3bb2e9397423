"""Time stamps that kernels leave, and what each kernel of an operation does.

Kernels compiled with TIMED note the device's global clock when their first block went on and when
their last one ended (kernels/primitives.cuh). A kernel's time runs from the end of the one before
to its own end; of it, what passed until its first block went on was spent between the kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    """Room for the stamps of ``capacity`` kernels."""

    def __init__(self, device: Device, capacity: int) -> None:
        self._device = device
        address = device.allocate(16 * capacity, "time stamps")
        self._array = DeviceArray(address, (capacity, 2), np.dtype(np.uint64))

    def timed(self, launches: Sequence[Launch]) -> list[Launch]:
        """The same kernels, leaving their stamps here, in order."""
        return [launchers.timed(x, self._array.row(i)) for i, x in enumerate(launches)]

    def clear(self) -> None:
        """Before each run, in stream order."""
        self._device.clear(self._array.address, self._array.n_bytes)

    def spans(self, parts: Sequence[Part]) -> list[Span]:
        """What the last run did; waits for it."""
        stamps = self._device.download(self._array)[: len(parts)]
        began, ended = (~stamps[:, 0]).tolist(), stamps[:, 1].tolist()
        spans, previous = [], began[0]
        for part, first, last in zip(parts, began, ended, strict=True):
            end = max(previous, last)
            waiting = min(max(0, first - previous), end - previous)
            spans.append(Span(part, previous / 1e9, end / 1e9, waiting / 1e9))
            previous = end
        return spans

    def close(self) -> None:
        self._device.free(self._array.address)


def parts_of(index: int, op: Operation, launches: Sequence[Launch]) -> list[Part]:
    """What the kernels that ``Lowering.lower`` made of operation ``index`` do."""
    parts = []
    for launch, (name, works) in zip(launches, _kernels(op, len(launches)), strict=True):
        arithmetic = FMAS
        if Work.MATMUL in works and launch.spec.name == "gemm":
            arithmetic = TENSORS
        elif Work.MATMUL in works and dict(launch.spec.macros)["FLOAT_ACTIVATIONS"] == "0":
            arithmetic = DOTS
        parts.append(Part(index, name, works, arithmetic))
    return parts


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
