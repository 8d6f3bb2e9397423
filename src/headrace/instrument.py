"""The small protocol of a runner that can say where the time of a step goes.

An operation of the decoder consists of :class:`Work`. A device does it in *parts*: phases between
two barriers on the CPU, kernel launches on a GPU. A part says which works of which operation it
does, in order; ``headrace.profile`` knows from that what it costs. A timed step gives a
:class:`Span` for each part that ran. Only a runner that can be profiled knows any of this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol, runtime_checkable

from headrace.backend import Batch
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


class Work(StrEnum):
    """What operations consist of.

    QUANTISE is a backend's own: activations to integers before a matmul. It may stand anywhere, and
    takes what the work before it in the part made, or else what the operation's matmul reads.
    """

    EMBED = "embed"
    NORM = "norm"
    QUANTISE = "quantise"
    MATMUL = "matmul"  # all matmuls of the operation, with their biases
    HEAD_NORMS = "head norms"
    ROTARY = "rotary"
    CACHE = "cache"  # keys and values written
    ATTENTION = "attention"
    ACTIVATION = "activation"
    POST_NORM = "post-norm"
    RESIDUAL = "residual"
    LOGITS = "logits"  # scale and softcap
    SAMPLE = "sample"


def works(op: Operation) -> tuple[Work, ...]:
    """All that ``op`` consists of, in order, by the model: without QUANTISE."""
    match op:
        case Embed():
            return (Work.EMBED,)
        case ProjectQKV():
            norms = (Work.HEAD_NORMS,) if op.q_norm or op.k_norm else ()
            return (Work.NORM, Work.MATMUL, *norms, Work.ROTARY, Work.CACHE)
        case Attend():
            return (Work.ATTENTION,)
        case ProjectOut() | FeedForwardOut():
            norm = (Work.POST_NORM,) if op.post_norm else ()
            return (Work.MATMUL, *norm, Work.RESIDUAL)
        case FeedForwardIn():
            return (Work.NORM, Work.MATMUL, Work.ACTIVATION)
        case Head():
            scaled = (Work.LOGITS,) if op.softcap is not None or op.logit_scale != 1.0 else ()
            return (Work.NORM, Work.MATMUL, *scaled, Work.SAMPLE)


@dataclass(frozen=True)
class Part:
    """``operation``: its place in ``decoder.operations``. ``name``: for people; the same in every
    layer. ``arithmetic``: which of ``Ceilings.flops_per_second`` bounds it. ``host``: the host does
    it while the device waits."""

    operation: int
    name: str
    works: tuple[Work, ...]
    arithmetic: str
    host: bool = False


class Span(NamedTuple):
    """A part as it ran: seconds on one clock, the same in all steps of an instrument.

    Spans come in order of ``start``; where two overlap, the time counts for the earlier.
    ``waiting``: how much of it the device waited: its threads for each other, or to begin.
    """

    part: Part
    start: float
    end: float
    waiting: float = 0.0


@dataclass(frozen=True)
class Formats:
    """Bytes of a value where it is not 4: ``quantised``, an activation a quantised matmul reads,
    with its share of scales (None: it reads float32), and ``cached``, a key's or a value's."""

    quantised: float | None
    cached: float


@dataclass(frozen=True)
class Ceilings:
    """What the machine can do, measured: plain reading of memory, and multiplications and additions
    a second by kind of arithmetic, from registers and the nearest cache."""

    bytes_per_second: float
    flops_per_second: Mapping[str, float]


class Instrument(Protocol):
    """Times the steps of a runner whose cache is allocated.

    ``clock``: what the time stamps are read from, for people. ``max_rows``: the most rows of a
    step, and of those whose logits are wanted only the last chooses a token.
    """

    clock: str
    formats: Formats
    max_rows: int

    def prepare(self, batch: Batch) -> None:
        """Comes before each step: what the host does for it while the device still works on the
        step before. Not in the step's time."""

    def plain_step(self, batch: Batch) -> int | None:
        """Run a step as without an instrument; the likeliest next token, or None if no logits are
        wanted. Returns when the token is known to the host."""

    def timed_step(self, batch: Batch) -> int | None:
        """The same step with time stamps around its parts."""

    def spans(self) -> list[Span]:
        """What the timed step did that ran last, before another step is prepared. Apart, so that
        telling it is not in the step's time."""

    def ceilings(self) -> Ceilings:
        """Measure them, now. Takes about a second."""


@runtime_checkable
class Threaded(Protocol):
    """An instrument whose device is threads that meet at barriers: there ``waiting`` is for each
    other, elsewhere for the start of a kernel."""

    n_threads: int


@runtime_checkable
class InstrumentedRunner(Protocol):
    """A runner (:class:`headrace.backend.Runner`) whose steps can be timed part by part."""

    def instrument(self) -> Instrument: ...
