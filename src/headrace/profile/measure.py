"""Runs a loaded model with and without time stamps, in turn, and makes the profile of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from headrace.backend import PAGE_SIZE, Batch, Runner
from headrace.errors import DeviceError, RequestError
from headrace.instrument import Ceilings, Instrument, InstrumentedRunner, Part, Span, Threaded
from headrace.profile.cost import Cost, Rows, cost
from headrace.profile.record import Record, Sample, Subject, Timing
from headrace.profile.result import Profile

PROFILED = ("cpu", "cuda", "reference")
"""Devices whose runners have an instrument."""

WARM_UP = {"decode": 3, "prefill": 1}
"""Samples that are not counted."""

Notice = Callable[[str], None]


def profile_runner(
    runner: Runner,
    subject: Subject,
    *,
    tokens: int = 32,
    prompt: int = 0,
    depth: int = 0,
    repetitions: int = 5,
    notice: Notice = lambda what: None,
) -> Profile:
    """Decoding of ``tokens`` after ``depth`` cached positions; or, with ``prompt``, that many
    positions more in a few steps, ``repetitions`` times. The runner's cache is used up.

    Raises DeviceError if the runner cannot be timed, RequestError if the context is too short.
    """
    if not isinstance(runner, InstrumentedRunner):
        raise DeviceError(
            f"{runner.device_name} cannot be profiled: {', '.join(PROFILED)} can (--device)"
        )
    longest = depth + (prompt or tokens)
    limit = runner.decoder.config.context_length
    if longest > limit:
        raise RequestError(
            f"profiling needs {longest} positions, the model has a context of {limit}"
        )
    runner.allocate_cache(-(-longest // PAGE_SIZE))
    instrument = runner.instrument()
    session = _Session(runner, instrument, longest)
    notice("measuring what the machine can do")
    before = instrument.ceilings()
    notice("profiling")
    session.fill(depth)
    mode, n = ("prefill", prompt) if prompt else ("decode", 1)
    starts = [depth] * repetitions if prompt else range(depth, depth + tokens)
    for i in range(WARM_UP[mode]):
        session.pair(depth, n, i)
    pairs = [session.pair(start, n, i) for i, start in enumerate(starts)]
    notice("measuring what the machine can do")
    ceilings = _best(before, instrument.ceilings())
    timed = [timed for _, timed in pairs]
    return Profile(
        subject=subject,
        clock=instrument.clock,
        threads=instrument.n_threads if isinstance(instrument, Threaded) else None,
        mode=mode,
        n_tokens=n,
        depth=depth,
        ceilings=ceilings,
        records=_records(runner, timed),
        samples=tuple(t.sample for t in timed),
        plain=Timing(tuple(plain for plain, _ in pairs)),
    )


@dataclass
class _Step:
    batch: Batch
    seconds: float
    spans: list[Span]


@dataclass
class _Timed:
    """A sample, and by part: its seconds, its waiting, and its cost."""

    sample: Sample
    parts: dict[Part, tuple[float, float, Cost]]


class _Session:
    """Steps of one sequence. Tokens are random, then the model's own likeliest."""

    def __init__(self, runner: Runner, instrument: Instrument, longest: int) -> None:
        self._decoder, self._instrument = runner.decoder, instrument
        self._page_table = np.arange(-(-longest // PAGE_SIZE), dtype=np.int32)[None, :]
        n_vocab = runner.decoder.config.n_vocab
        self._tokens = np.random.default_rng(0).integers(n_vocab, size=longest).astype(np.int32)

    def fill(self, depth: int) -> None:
        for batch in self._batches(0, depth, logits=False):
            self._uncounted(batch)

    def pair(self, start: int, n: int, turn: int) -> tuple[float, _Timed]:
        """The same ``n`` positions without time stamps and with them, whose turn it is first."""
        steps = {
            timed: list(self._run(start, n, timed))
            for timed in ((True, False) if turn % 2 else (False, True))
        }
        return sum(step.seconds for step in steps[False]), self._account(steps[True])

    def _run(self, start: int, n: int, timed: bool) -> Iterator[_Step]:
        # Threads that fell asleep meanwhile wake in a step that nobody counts.
        self._uncounted(next(self._batches(start, 1)))
        step = self._instrument.timed_step if timed else self._instrument.plain_step
        for batch in self._batches(start, n):
            self._instrument.prepare(batch)
            begin = time.perf_counter()
            token = step(batch)
            seconds = time.perf_counter() - begin
            if token is not None and start + n < len(self._tokens):
                self._tokens[start + n] = token
            yield _Step(batch, seconds, self._instrument.spans() if timed else [])

    def _uncounted(self, batch: Batch) -> None:
        self._instrument.prepare(batch)
        self._instrument.plain_step(batch)

    def _account(self, steps: list[_Step]) -> _Timed:
        seconds = gaps = outside = 0.0
        parts: dict[Part, tuple[float, float, Cost]] = {}
        for step in steps:
            between = self._attribute(step.spans, Rows.of(step.batch), parts)
            covered = sum(own for own, _ in attributed(step.spans))
            seconds, gaps = seconds + step.seconds, gaps + between
            outside += step.seconds - covered - between
        spans = tuple(span for step in steps for span in step.spans)
        return _Timed(Sample(seconds, spans, gaps, outside), parts)

    def _attribute(
        self, spans: list[Span], rows: Rows, parts: dict[Part, tuple[float, float, Cost]]
    ) -> float:
        """Add a step's spans to ``parts``; returns the gaps between them on the device."""
        gaps = 0.0
        for i, (span, (own, gap)) in enumerate(zip(spans, attributed(spans), strict=True)):
            part = span.part
            seconds, waiting, spent = parts.get(part, (0.0, 0.0, Cost()))
            op = self._decoder.operations[part.operation]
            spent += cost(self._decoder, op, part.works, self._instrument.formats, rows)
            parts[part] = (seconds + own, waiting + span.waiting, spent)
            if i and not part.host and not spans[i - 1].part.host:
                gaps += gap
        return gaps

    def _batches(self, start: int, n: int, logits: bool = True) -> Iterator[Batch]:
        """``n`` positions from ``start`` in steps of at most ``max_rows``; logits of the last."""
        stop = start + n
        for at in range(start, stop, self._instrument.max_rows):
            end = min(at + self._instrument.max_rows, stop)
            wanted: NDArray[np.int32] = np.zeros(0, np.int32)
            if logits and end == stop:
                wanted = np.array([end - at - 1], np.int32)
            yield Batch(
                tokens=self._tokens[at:end],
                positions=np.arange(at, end, dtype=np.int32),
                slots=np.zeros(end - at, np.int32),
                page_table=self._page_table,
                logit_rows=wanted,
            )


def attributed(spans: list[Span]) -> list[tuple[float, float]]:
    """(its own seconds, the gap before it) of each span: time that two share is the earlier's."""
    result, reached = [], spans[0].start if spans else 0.0
    for span in spans:
        result.append(
            (max(0.0, span.end - max(span.start, reached)), max(0.0, span.start - reached))
        )
        reached = max(reached, span.end)
    return result  # fmt: skip


def _records(runner: Runner, timed: list[_Timed]) -> tuple[Record, ...]:
    nothing = (0.0, 0.0, Cost())
    parts = dict.fromkeys(part for t in timed for part in t.parts)
    records = []
    for part in parts:
        seen = [t.parts.get(part, nothing) for t in timed]
        op = runner.decoder.operations[part.operation]
        spent = Cost()
        for _, _, each in seen:
            spent += each
        records.append(
            Record(
                operation=type(op).__name__,
                layer=getattr(op, "layer", None),
                part=part,
                cost=spent / len(timed),
                seconds=Timing(tuple(seconds for seconds, _, _ in seen)),
                waiting=Timing(tuple(waiting for _, waiting, _ in seen)),
            )
        )
    return tuple(records)


def _best(a: Ceilings, b: Ceilings) -> Ceilings:
    """The machine may have been disturbed once."""
    flops = {name: max(n, b.flops_per_second[name]) for name, n in a.flops_per_second.items()}
    return Ceilings(max(a.bytes_per_second, b.bytes_per_second), flops)
