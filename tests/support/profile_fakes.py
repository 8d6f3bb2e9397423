"""A runner in virtual time: its parts take as long as they are told, by a clock that it moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from headrace.backend import Batch
from headrace.instrument import Ceilings, Formats, Part, Span, Work, works
from headrace.model.decoder import Decoder
from headrace.profile.record import Subject

SUBJECT = Subject("a model", "llama", "a device")


class FakeRunner:
    """``seconds(part)`` is what a part takes; ``waiting(part)`` what of it threads wait.

    ``before`` and ``after``: the host's, around the spans; ``gap``: between two parts; ``slower``:
    what the time stamps add; ``preparing``: in no step's time. ``now``: the clock, to put in the
    place of ``perf_counter``.
    """

    device_name = "fake"
    prompt_rows = 256

    def __init__(self, decoder: Decoder, seconds: Callable[[Part], float]) -> None:
        self.decoder, self.seconds = decoder, seconds
        self.waiting: Callable[[Part], float] = lambda part: 0.0
        self.before = self.after = self.gap = self.slower = self.preparing = 0.0
        self.n_threads: int | None = None
        self.clock = 100.0
        self.now = lambda: self.clock
        self.batches: list[tuple[bool, Batch]] = []
        self.pages = 0

    def allocate_cache(self, n_pages: int) -> None:
        self.pages = n_pages

    def instrument(self) -> FakeInstrument:
        return FakeInstrument(self)


class FakeInstrument:
    clock = "a fake"
    formats = Formats(quantised=2.0, cached=2.0)
    max_rows = 4

    def __init__(self, runner: FakeRunner) -> None:
        self.runner = runner
        self.parts = list(fake_parts(runner.decoder))
        self._spans: list[Span] = []
        self._prepared: Batch | None = None
        if runner.n_threads is not None:
            self.n_threads = runner.n_threads

    def prepare(self, batch: Batch) -> None:
        self.runner.clock += self.runner.preparing
        self._prepared = batch

    def plain_step(self, batch: Batch) -> int | None:
        return self._step(batch, timed=False)

    def timed_step(self, batch: Batch) -> int | None:
        return self._step(batch, timed=True)

    def spans(self) -> list[Span]:
        return self._spans

    def ceilings(self) -> Ceilings:
        return Ceilings(1e9, {"integers": 8e9, "floats": 2e9})

    def _step(self, batch: Batch, timed: bool) -> int | None:
        runner = self.runner
        assert self._prepared is batch
        runner.batches.append((timed, batch))
        runner.clock += runner.before
        self._spans = []
        wanted = len(batch.logit_rows) > 0
        last = len(runner.decoder.operations) - 1
        for part in self.parts:
            if part.operation == last and not wanted:
                continue
            if self._spans:
                runner.clock += runner.gap
            start = runner.clock - 50.0  # the device's clock has another origin
            runner.clock += runner.seconds(part)
            self._spans.append(Span(part, start, runner.clock - 50.0, runner.waiting(part)))
        runner.clock += runner.after + (runner.slower if timed else 0.0)
        return int(np.int64(batch.positions[-1]) % 7) if wanted else None


def fake_parts(decoder: Decoder) -> Iterable[Part]:
    """The embedding by the host, then norms, matmuls and the rest of each operation."""
    for i, op in enumerate(decoder.operations):
        done = works(op)
        if Work.MATMUL not in done:
            yield Part(i, done[0].value, done, "floats", host=done[0] is Work.EMBED)
            continue
        at = done.index(Work.MATMUL)
        if at:
            yield Part(i, "norm", done[:at], "floats")
        yield Part(i, "matmul", (Work.MATMUL,), "integers")
        yield Part(i, "rest", done[at + 1 :], "floats")
