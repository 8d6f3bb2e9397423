"""A profile as Chrome trace events, which https://ui.perfetto.dev and chrome://tracing open.

Google's "Trace Event Format" (the catapult project), its JSON object form.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from headrace.instrument import Span
from headrace.profile.record import Record, Sample, Subject

_TRACKS = {"whole": 0, "host": 1, "device": 2}
_PROCESS = 1


def write(
    path: Path,
    subject: Subject,
    mode: str,
    unit: str,
    records: Sequence[Record],
    samples: Sequence[Sample],
) -> None:
    made = [*_tracks(subject, unit), *_events(mode, unit, records, samples)]
    document = {"traceEvents": made, "displayTimeUnit": "ns"}
    path.write_text(json.dumps(document, separators=(",", ":")), encoding="utf-8")


def _tracks(subject: Subject, unit: str) -> Iterator[dict[str, Any]]:
    names = {"whole": f"{unit}s", "host": "host", "device": subject.device}
    yield _metadata("process_name", 0, {"name": f"headrace profile {subject.model}"})
    for track, number in _TRACKS.items():
        yield _metadata("thread_name", number, {"name": names[track]})
        yield _metadata("thread_sort_index", number, {"sort_index": number})


def _events(
    mode: str, unit: str, records: Sequence[Record], samples: Sequence[Sample]
) -> Iterator[dict[str, Any]]:
    """A complete event (``X``; µs) for each token and each span."""
    by_part = {record.part: record for record in records}
    origin = samples[0].spans[0].start
    for number, sample in enumerate(samples):
        # The host's clock has another origin: the token begins with its first span.
        start = sample.spans[0].start
        name = f"{unit} {number}"
        yield _complete(name, mode, "whole", start - origin, sample.seconds, {})
        for span in sample.spans:
            yield _span(by_part[span.part], span, origin)


def _span(record: Record, span: Span, origin: float) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "operation": record.operation,
        "GFLOP": record.cost.flops / 1e9,
        "MB": record.cost.n_bytes / 1e6,
        "waiting µs": span.waiting * 1e6,
    }
    where = "" if record.layer is None else f" {record.layer}"
    if record.layer is not None:
        arguments["layer"] = record.layer
    track = "host" if record.host else "device"
    name = f"{record.operation}{where}: {record.name}"
    return _complete(
        name, record.level.value, track, span.start - origin, span.end - span.start, arguments
    )


def _complete(
    name: str, category: str, track: str, start: float, seconds: float, arguments: dict[str, Any]
) -> dict[str, Any]:
    """``start`` in seconds."""
    return {
        "name": name,
        "cat": category,
        "ph": "X",
        "ts": start * 1e6,
        "dur": seconds * 1e6,
        "pid": _PROCESS,
        "tid": _TRACKS[track],
        "args": arguments,
    }


def _metadata(name: str, track: int, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": _PROCESS, "tid": track, "args": arguments}
