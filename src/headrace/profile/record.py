"""The records of a profile: what a part is, what it costs, and how long it took."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property, reduce
from operator import add
from typing import Any

from headrace.instrument import Ceilings, Part, Span, Work
from headrace.profile.cost import Cost


class Level(StrEnum):
    """Macro: projections, feed-forward and vocabulary matmuls. Midi: attention. Micro: the rest,
    what happens between them."""

    MACRO = "Macro"
    MIDI = "Midi"
    MICRO = "Micro"


def level_of(works: Iterable[Work]) -> Level:
    works = set(works)
    if Work.MATMUL in works:
        return Level.MACRO
    return Level.MIDI if Work.ATTENTION in works else Level.MICRO


@dataclass(frozen=True)
class Timing:
    """Seconds of something in each of the tokens (or prompts) measured."""

    samples: tuple[float, ...]

    @property
    def count(self) -> int:
        return len(self.samples)

    @property
    def min(self) -> float:
        return min(self.samples)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def max(self) -> float:
        return max(self.samples)

    @property
    def mean(self) -> float:
        return statistics.fmean(self.samples)

    def as_json(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("count", "min", "median", "max", "mean")}


@dataclass(frozen=True)
class Subject:
    """What was profiled. ``size``: bytes of the file, and ``parameters``, where they are known."""

    model: str
    architecture: str
    device: str
    size: int | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class Sample:
    """A token (or prompt) as it ran with time stamps: seconds by the host's clock, the spans by the
    device's, and what no span covers: ``gaps`` between parts on the device, and ``outside``, the
    host's before, after and between its own parts."""

    seconds: float
    spans: tuple[Span, ...]
    gaps: float
    outside: float


@dataclass(frozen=True)
class Record:
    """One timed part of one operation.

    operation: its kind, as ``headrace.model.operations`` names it. layer: None outside the layers.
    cost: the mean over the tokens measured. seconds: in each of them; ``waiting``, the part of it
    that threads waited for each other.
    """

    operation: str
    layer: int | None
    part: Part
    cost: Cost
    seconds: Timing
    waiting: Timing

    @property
    def name(self) -> str:
        """Of the part: the same in every layer."""
        return self.part.name

    @property
    def host(self) -> bool:
        return self.part.host

    @property
    def level(self) -> Level:
        return level_of(self.part.works)

    def ideal(self, ceilings: Ceilings) -> tuple[float, float]:
        """Seconds that (its bytes, its FLOPs) take at the machine's ceilings."""
        flops = ceilings.flops_per_second[self.part.arithmetic]
        return self.cost.n_bytes / ceilings.bytes_per_second, self.cost.flops / flops


@dataclass(frozen=True)
class Group:
    """Records taken together: a part over all layers, a layer, a level, an operation, or all.

    Rates come from the median token, so that an interruption does not count; shares from means, so
    that they add up.
    """

    name: str
    records: tuple[Record, ...]

    @property
    def first(self) -> Record:
        return self.records[0]

    @property
    def host(self) -> bool:
        return all(record.host for record in self.records)

    @cached_property
    def seconds(self) -> Timing:
        return _sum([record.seconds for record in self.records])

    @cached_property
    def waiting(self) -> Timing:
        return _sum([record.waiting for record in self.records])

    @cached_property
    def cost(self) -> Cost:
        return reduce(add, (record.cost for record in self.records), Cost())

    @property
    def flops_per_second(self) -> float:
        return _rate(self.cost.flops, self.seconds.median)

    @property
    def bytes_per_second(self) -> float:
        return _rate(self.cost.n_bytes, self.seconds.median)

    def ideal(self, ceilings: Ceilings) -> float:
        """Seconds at the roofline: each record at the ceiling that bounds it, one by one."""
        return sum(max(record.ideal(ceilings)) for record in self.records)

    def is_bound_by_memory(self, ceilings: Ceilings) -> bool:
        """Whether the roofline over most of it is the memory's."""
        ideals = [record.ideal(ceilings) for record in self.records]
        return sum(m for m, f in ideals if m >= f) >= sum(f for m, f in ideals if m < f)

    def roofline_share(self, ceilings: Ceilings) -> float:
        """What of min(bandwidth · intensity, compute) it reaches."""
        return _rate(self.ideal(ceilings), self.seconds.median)


def _sum(timings: Sequence[Timing]) -> Timing:
    return Timing(tuple(map(sum, zip(*(t.samples for t in timings), strict=True))))


def _rate(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0


def group_json(group: Group, total: float, ceilings: Ceilings) -> dict[str, Any]:
    """``total``: mean seconds of the whole token."""
    cost, seconds = group.cost, group.seconds
    return {
        "seconds": seconds.as_json(),
        "share": seconds.mean / total,
        "waiting_share": group.waiting.mean / total,
        "elements": cost.elements,
        "flops": cost.flops,
        "bytes": cost.n_bytes,
        "weight_bytes": cost.weight_bytes,
        "activation_bytes": cost.activation_bytes,
        "kv_bytes": cost.kv_bytes,
        "intensity": cost.intensity,
        "gflops_per_second": group.flops_per_second / 1e9,
        "gb_per_second": group.bytes_per_second / 1e9,
        "roofline_share": group.roofline_share(ceilings),
        "bound": "memory" if group.is_bound_by_memory(ceilings) else "compute",
    }
