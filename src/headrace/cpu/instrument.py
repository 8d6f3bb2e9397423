"""Times the parts of a CPU step: the cycle clock around each phase, inside the compiled call.

Every member of the team notes when it ended its share of a phase, and when it went on after the
barrier: all that is needed to say how long a phase took, and how much of it somebody waited.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headrace.backend import Batch
from headrace.cpu import ceilings, clock
from headrace.cpu.ceilings import DOTS, FMAS
from headrace.cpu.compile import Library, host_target
from headrace.cpu.isa import InstructionSet
from headrace.cpu.unpack import UNPACKERS
from headrace.errors import DeviceError
from headrace.instrument import Ceilings, Formats, Part, Span, Work
from headrace.model.decoder import Decoder
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

_QUANTISED_BYTES = 2.0
"""An int8, and its sixteenth of a ``matmul.GROUP_RECORD``."""

_ANY = 1 << 62
"""No bound on a difference of clocks."""

_MATMULS = {
    ProjectQKV: "q/k/v matmul",
    ProjectOut: "output matmul",
    FeedForwardIn: "gate/up matmul",
    FeedForwardOut: "down matmul",
    Head: "vocabulary matmul",
}


class CPUInstrument:
    """See :class:`headrace.instrument.Instrument`. ``step`` and ``context`` are the runner's.

    Raises DeviceError where the processor has no clock that programs may read.
    """

    clock = "cycle counter"
    formats = Formats(quantised=_QUANTISED_BYTES, cached=2.0)

    def __init__(
        self,
        decoder: Decoder,
        step: Callable[[Batch], NDArray[np.float32]],
        context: NDArray[Any],
        *,
        isa: InstructionSet,
        n_threads: int,
        max_rows: int,
    ) -> None:
        if not clock.is_known():
            raise DeviceError(f"profiling: no cycle clock is known for {clock.architecture()}")
        self.max_rows = max_rows
        self._step, self._context = step, context
        self._isa, self.n_threads = isa, n_threads
        self._count, self._seconds = read_clock(), seconds_per_count()
        head = decoder.operations[-1]
        assert isinstance(head, Head)
        last = len(decoder.operations) - 1
        self._prepare = Part(0, "embedding, angles", (Work.EMBED,), FMAS, host=True)
        self._parts = parts(decoder)
        self._n_layered = sum(part.operation != last for part in self._parts)
        self._scaled = head.softcap is not None or head.logit_scale != 1.0
        self._finish = Part(last, "scale, softcap", (Work.LOGITS,), FMAS, host=True)
        self._choose = Part(last, "choice", (Work.SAMPLE,), FMAS, host=True)
        # The first pair is the start of the step.
        self._n_stamps = 1 + len(self._parts)
        self._stamps = np.zeros((n_threads, self._n_stamps, 2), np.int64)
        self._host = 0, 0, 0, False
        self._origin = self._count()

    def prepare(self, batch: Batch) -> None:
        """Nothing: the host is the CPU, and prepares a step in the step's time."""

    def plain_step(self, batch: Batch) -> int | None:
        logits = self._step(batch)
        return int(logits[-1].argmax()) if len(logits) else None

    def timed_step(self, batch: Batch) -> int | None:
        if len(batch.tokens) > self.max_rows:
            raise DeviceError(f"timed step: {len(batch.tokens)} rows, at most {self.max_rows}")
        count = self._count
        start = count()
        self._context["stamps"] = self._stamps.ctypes.data
        self._context["n_stamps"] = self._n_stamps
        try:
            logits = self._step(batch)
        finally:
            self._context["stamps"] = 0
        stepped = count()
        token = int(logits[-1].argmax()) if len(logits) else None
        self._host = start, stepped, count(), token is not None
        return token

    def spans(self) -> list[Span]:
        start, stepped, chosen, whole = self._host
        parts = self._parts if whole else self._parts[: self._n_layered]
        ends, waiting = phase_ends(self._stamps[:, : 1 + len(parts)])
        spans = [self._span(self._prepare, start, ends[0])]
        for i, part in enumerate(parts):
            spans.append(self._span(part, ends[i], ends[i + 1], waiting[i]))
        if whole:
            if self._scaled:
                spans.append(self._span(self._finish, ends[-1], stepped))
            spans.append(self._span(self._choose, stepped, chosen))
        return spans

    def _span(self, part: Part, start: int, end: int, waiting: float = 0.0) -> Span:
        start, end = start - self._origin, end - self._origin
        return Span(part, start * self._seconds, end * self._seconds, waiting * self._seconds)

    def ceilings(self) -> Ceilings:
        from headrace.bench import read_bandwidth

        return Ceilings(
            read_bandwidth(self.n_threads), ceilings.flops_per_second(self._isa, self.n_threads)
        )


def phase_ends(stamps: NDArray[np.int64]) -> tuple[list[int], list[float]]:
    """When member 0 began and each phase ended; how long the average member waited in each.

    ``stamps``: int64 [members, 1 + phases, 2], where a member ended its share and where it went on.
    A phase ends as the last member does. One that goes on late, because its core did something
    else, has waited as well.
    """
    ended, went_on = stamps[..., 0], stamps[:, :-1, 1]  # a member may be about to note the last
    # Cores whose clocks disagree: everybody has ended a phase before anybody goes on.
    low = (ended[:, 1:-1] - went_on[0, 1:]).max(axis=1, initial=-_ANY)
    high = (went_on[:, 1:] - ended[0, 1:-1]).min(axis=1, initial=_ANY)
    offset = np.clip(0, low, high)[:, None]
    ended, went_on = ended - offset, went_on - offset
    ends = ended.max(axis=0)
    ends[0] = ended[0, 0]
    waited = ends[1:] - ended[:, 1:] + np.maximum(went_on - ends[:-1], 0)
    return ends.tolist(), np.minimum(waited.mean(axis=0), np.diff(ends)).tolist()


def parts(decoder: Decoder) -> list[Part]:
    """The phases of ``step._run`` over the whole decoder, in order."""
    found = []
    for i, op in enumerate(decoder.operations):
        for name, works, of in phases(op):
            arithmetic = FMAS
            if Work.MATMUL in works and _is_quantised(decoder, op):
                arithmetic = DOTS
            found.append(Part(i + of, name, works, arithmetic))
    return found


def phases(op: Operation) -> Iterator[tuple[str, tuple[Work, ...], int]]:
    """(name, works, which operation's from here) of each phase ``step._run`` makes of ``op``."""
    match op:
        case Embed():  # by the host, before the call
            return
        case Attend():
            yield "attention", (Work.ATTENTION,), 0
            return
        case ProjectQKV() | FeedForwardIn() | Head():
            yield "norm, quantise", (Work.NORM, Work.QUANTISE), 0
        case ProjectOut():
            yield "quantise", (Work.QUANTISE,), 0
        case FeedForwardOut():  # its first phase finishes FeedForwardIn
            yield "activation, quantise", (Work.ACTIVATION, Work.QUANTISE), -1
    matmul = _MATMULS[type(op)]
    match op:
        case ProjectQKV():
            yield matmul, (Work.MATMUL,), 0
            normed = (Work.HEAD_NORMS,) if op.q_norm or op.k_norm else ()
            name = "norms, rotary, cache" if normed else "rotary, cache"
            yield name, (*normed, Work.ROTARY, Work.CACHE), 0
        case ProjectOut() | FeedForwardOut() if op.post_norm is None:
            yield matmul, (Work.MATMUL, Work.RESIDUAL), 0
        case ProjectOut() | FeedForwardOut():
            yield matmul, (Work.MATMUL,), 0
            yield "post-norm, residual", (Work.POST_NORM, Work.RESIDUAL), 0
        case _:
            yield matmul, (Work.MATMUL,), 0


def _is_quantised(decoder: Decoder, op: Operation) -> bool:
    match op:
        case ProjectQKV(q=q, k=k, v=v):
            linears = [q, k, v]
        case FeedForwardIn(gate=gate, up=up):
            linears = [gate, up]
        case ProjectOut(out=out) | Head(out=out) | FeedForwardOut(down=out):
            linears = [out]
        case _:
            linears = []
    return any(decoder.weights[linear.weight].qtype in UNPACKERS for linear in linears)


@cache
def _clock_library() -> Library:
    return Library("clock", host_target(), ["clock"], lambda: str(clock.build_module()))


def read_clock() -> Callable[[], int]:
    return _clock_library().function("clock", 0)


@cache
def seconds_per_count() -> float:
    """Calibrated once against ``time.perf_counter_ns``, to some parts in a hundred thousand."""
    wall, count = _both()
    time.sleep(0.03)
    later, later_count = _both()
    return (later - wall) / 1e9 / (later_count - count)


def _both() -> tuple[int, int]:
    """``perf_counter_ns`` and the clock at one moment: the closest of several tries."""
    count = read_clock()
    tries = []
    for _ in range(20):
        before, now, after = time.perf_counter_ns(), count(), time.perf_counter_ns()
        tries.append((after - before, (before + after) // 2, now))
    _, wall, at = min(tries)
    return wall, at
