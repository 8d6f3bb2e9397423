"""Times the operations of the reference, one part each: the smallest possible instrument."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.backend import Batch
from headrace.instrument import Ceilings, Formats, Part, Span, Work, works
from headrace.model.decoder import Decoder
from headrace.model.operations import Operation

Observer = Callable[[Operation, NDArray[Any]], None]

_KIND = "NumPy matmul"


class ReferenceInstrument:
    """See :class:`headrace.instrument.Instrument`. The bytes are those of the packed weights, not
    of the floats they were expanded to."""

    clock = "the host's clock"
    max_rows = 512

    def __init__(
        self,
        decoder: Decoder,
        step: Callable[[Batch], NDArray[Any]],
        observe: Callable[[Observer | None], Observer | None],
        cached: float,
    ) -> None:
        """``observe``: puts an observer of the operations in the place of another."""
        self.formats = Formats(quantised=None, cached=cached)
        self._step, self._observe = step, observe
        self._parts = []
        for i, op in enumerate(decoder.operations):
            done = tuple(work for work in works(op) if work is not Work.SAMPLE)
            self._parts.append(Part(i, "all", done, _KIND))
        choice = Part(len(self._parts) - 1, "choice", (Work.SAMPLE,), _KIND, host=True)
        self._parts.append(choice)
        self._stamps: list[float] = []

    def prepare(self, batch: Batch) -> None:
        """Nothing."""

    def plain_step(self, batch: Batch) -> int | None:
        logits = self._step(batch)
        return int(logits[-1].argmax()) if len(logits) else None

    def timed_step(self, batch: Batch) -> int | None:
        self._stamps = [time.perf_counter()]
        before = self._observe(lambda op, output: self._stamps.append(time.perf_counter()))
        try:
            token = self.plain_step(batch)
        finally:
            self._observe(before)
        self._stamps.append(time.perf_counter())
        return token

    def spans(self) -> list[Span]:
        edges = zip(self._parts, self._stamps[:-1], self._stamps[1:], strict=True)
        return [Span(part, start, end) for part, start, end in edges]

    def ceilings(self) -> Ceilings:
        from headrace.bench import read_bandwidth

        n = 1024
        a = np.ones((n, n), np.float32)
        seconds = min(_seconds(lambda: a @ a) for _ in range(8))
        return Ceilings(read_bandwidth(os.cpu_count() or 1), {_KIND: 2 * n**3 / seconds})


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
