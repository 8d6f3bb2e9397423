"""Times the operations of the reference, one part each: the smallest possible instrument."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from headrace.backend import Batch
from headrace.instrument import Ceilings, Formats, Part, Span, Work, works

if TYPE_CHECKING:
    from headrace.reference.runner import ReferenceRunner

_KIND = "NumPy matmul"


class ReferenceInstrument:
    """See :class:`headrace.instrument.Instrument`. The bytes are those of the packed weights, not
    of the floats they were expanded to."""

    clock = "the host's clock"
    max_rows = 512

    def __init__(self, runner: ReferenceRunner, cached: float) -> None:
        self.formats = Formats(quantised=None, cached=cached)
        self._runner = runner
        self._parts = []
        for i, op in enumerate(runner.decoder.operations):
            done = tuple(work for work in works(op) if work is not Work.SAMPLE)
            self._parts.append(Part(i, "all", done, _KIND))
        choice = Part(len(self._parts) - 1, "choice", (Work.SAMPLE,), _KIND, host=True)
        self._parts.append(choice)
        self._stamps: list[float] = []

    def prepare(self, batch: Batch) -> None:
        """Nothing."""

    def plain_step(self, batch: Batch) -> int | None:
        logits = self._runner.step(batch)
        return int(logits[-1].argmax()) if len(logits) else None

    def timed_step(self, batch: Batch) -> int | None:
        before, self._stamps = self._runner.observe, [time.perf_counter()]
        self._runner.observe = lambda op, output: self._stamps.append(time.perf_counter())
        try:
            token = self.plain_step(batch)
        finally:
            self._runner.observe = before
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
