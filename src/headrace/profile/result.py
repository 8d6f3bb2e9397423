"""A profile: its records, what they add up to, and what limits the token."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from headrace.instrument import Ceilings
from headrace.profile import bottleneck
from headrace.profile.bottleneck import Bottleneck
from headrace.profile.record import Group, Level, Record, Sample, Subject, Timing, group_json


@dataclass(frozen=True)
class Profile:
    """``threads``: of the device, that meet at barriers; None where there are none to speak of.
    ``mode``: ``decode``, whose samples are tokens, or ``prefill``, whose samples are prompts.

    n_tokens: in a sample. depth: positions cached before the first. rows: the most in one step.
    plain: seconds of the same samples without time stamps, each run beside its sample.
    """

    subject: Subject
    clock: str
    threads: int | None
    mode: str
    n_tokens: int
    depth: int
    ceilings: Ceilings
    records: tuple[Record, ...]
    samples: tuple[Sample, ...]
    plain: Timing

    @property
    def unit(self) -> str:
        return "token" if self.mode == "decode" else "prompt"

    @cached_property
    def seconds(self) -> Timing:
        """Of the whole token, by the host's clock, with time stamps on."""
        return Timing(tuple(sample.seconds for sample in self.samples))

    @property
    def tokens_per_second(self) -> float:
        """Without time stamps, of the median."""
        return self.n_tokens / self.plain.median

    @property
    def overhead_share(self) -> float:
        """What the time stamps cost: the median, over the samples, of on / off - 1."""
        pairs = zip(self.seconds.samples, self.plain.samples, strict=True)
        return statistics.median(on / off for on, off in pairs) - 1

    @property
    def gap_share(self) -> float:
        """Of the token, between parts on the device."""
        return statistics.fmean(sample.gaps for sample in self.samples) / self.seconds.mean

    @property
    def outside_share(self) -> float:
        """Of the token, on the host and in none of its parts."""
        return statistics.fmean(sample.outside for sample in self.samples) / self.seconds.mean

    @property
    def unattributed_share(self) -> float:
        """Of the measured token, what the parts do not add up to. Negative if they exceed it."""
        return 1 - self.total.seconds.mean / self.seconds.mean

    @cached_property
    def total(self) -> Group:
        return Group("all parts", self.records)

    @cached_property
    def parts(self) -> tuple[Group, ...]:
        """Each part of each kind of operation, over all layers, in the order they run."""
        return self._grouped(lambda r: (r.operation, r.name), lambda r: f"{r.operation}: {r.name}")

    @cached_property
    def operations(self) -> tuple[Group, ...]:
        return self._grouped(lambda r: r.operation, lambda r: r.operation)

    @cached_property
    def levels(self) -> tuple[Group, ...]:
        groups = self._grouped(lambda r: r.level, lambda r: r.level.value)
        return tuple(sorted(groups, key=lambda g: list(Level).index(g.first.level)))

    @cached_property
    def layers(self) -> tuple[Group, ...]:
        """The layers by number, with what is outside of them by its operation."""
        return self._grouped(
            lambda r: r.operation if r.layer is None else r.layer,
            lambda r: r.operation if r.layer is None else f"layer {r.layer}",
        )

    @cached_property
    def bottleneck(self) -> Bottleneck:
        total = self.seconds.mean
        return bottleneck.find(
            self.parts, self.ceilings, total=total, unit=self.unit,
            gaps=self.gap_share * total, outside=self.outside_share * total,
            threads=self.threads is not None,
        )  # fmt: skip

    def _grouped(
        self, by: Callable[[Record], Hashable], name: Callable[[Record], str]
    ) -> tuple[Group, ...]:
        found: dict[Hashable, list[Record]] = {}
        for record in self.records:
            found.setdefault(by(record), []).append(record)
        return tuple(Group(name(records[0]), tuple(records)) for records in found.values())

    def as_json(self) -> dict[str, Any]:
        """Everything, as docs/json.md describes it."""
        import headrace

        total = self.seconds.mean
        return {
            "version": headrace.__version__,
            **asdict(self.subject),
            "clock": self.clock,
            "threads": self.threads,
            "mode": self.mode,
            "n_tokens": self.n_tokens,
            "depth": self.depth,
            "read_gb_per_second": self.ceilings.bytes_per_second / 1e9,
            "compute_gflops_per_second": [
                {"arithmetic": name, "gflops_per_second": flops / 1e9}
                for name, flops in self.ceilings.flops_per_second.items()
            ],
            "tokens_per_second": self.tokens_per_second,
            "seconds": self.seconds.as_json(),
            "seconds_unprofiled": self.plain.as_json(),
            "overhead_share": self.overhead_share,
            "unattributed_share": self.unattributed_share,
            "gap_share": self.gap_share,
            "outside_share": self.outside_share,
            "bottleneck": asdict(self.bottleneck),
            "total": group_json(self.total, total, self.ceilings),
            **{
                name: [
                    _labels(name, group) | group_json(group, total, self.ceilings)
                    for group in getattr(self, name)
                ]
                for name in ("levels", "operations", "parts", "layers")
            },
            "records": [
                _labels("parts", Group("", (record,)))
                | {"layer": record.layer}
                | group_json(Group("", (record,)), total, self.ceilings)
                for record in self.records
            ],
        }

    def write_html(self, path: str | Path) -> None:
        """A report that needs nothing else: one page, no outside address."""
        from headrace.profile.html import page

        text = page(self.as_json(), self.parts, self.layers, self.samples)
        Path(path).write_text(text, encoding="utf-8")

    def write_trace(self, path: str | Path) -> None:
        """Every span of every sample in Chrome's trace-event format: https://ui.perfetto.dev."""
        from headrace.profile.trace import write

        write(Path(path), self.subject, self.mode, self.unit, self.records, self.samples)


def _labels(kind: str, group: Group) -> dict[str, Any]:
    first = group.first
    labels: dict[str, dict[str, Any]] = {
        "levels": {"level": first.level},
        "operations": {"operation": first.operation},
        "layers": {
            "layer": first.layer,
            "operation": first.operation if first.layer is None else None,
        },
        "parts": {
            "operation": first.operation,
            "part": first.name,
            "level": first.level,
            "host": first.host,
            "arithmetic": first.part.arithmetic,
        },
    }
    return labels[kind] | {"records": len(group.records)}
