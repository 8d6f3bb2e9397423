"""A profile as Chrome trace events, which https://ui.perfetto.dev and chrome://tracing open.

Google's "Trace Event Format" (the catapult project), its JSON object form.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headrace.instrument import Span
from headrace.profile.record import Record
from headrace.profile.result import Profile

_TRACKS = {"whole": 0, "host": 1, "device": 2}
_PROCESS = 1


def write(profile: Profile, path: Path) -> None:
    document = {"traceEvents": list(events(profile)), "displayTimeUnit": "ns"}
    path.write_text(json.dumps(document, separators=(",", ":")), encoding="utf-8")


def events(profile: Profile) -> Iterator[dict[str, Any]]:
    """Names of the tracks, then a complete event (``X``; µs) for each token and each span."""
    names = {"whole": f"{profile.unit}s", "host": "host", "device": profile.subject.device}
    process = f"headrace profile {profile.subject.model}"
    yield _metadata("process_name", 0, {"name": process})
    for track, number in _TRACKS.items():
        yield _metadata("thread_name", number, {"name": names[track]})
        yield _metadata("thread_sort_index", number, {"sort_index": number})
    samples = [sample for sample in profile.samples if sample.spans]
    if not samples:
        return
    origin = samples[0].spans[0].start
    records = {record.part: record for record in profile.records}
    for number, sample in enumerate(samples):
        # The host's clock has another origin: the token begins with its first span.
        start = sample.spans[0].start
        name = f"{profile.unit} {number}"
        yield _complete(name, profile.mode, "whole", start - origin, sample.seconds, {})
        for span in sample.spans:
            yield _span(records[span.part], span, origin)


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
