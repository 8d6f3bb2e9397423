"""A profile as one HTML page that needs nothing else: ``report.html`` with the rest put in."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from typing import Any

from headrace.profile.record import Record
from headrace.profile.result import Profile


def page(profile: Profile) -> str:
    # Inside a script element only "</" and "<!--" mean something; names may hold anything.
    figures = json.dumps(_figures(profile), separators=(",", ":")).replace("<", "\\u003c")
    parts = {"/*css*/": _read("report.css"), "/*js*/": _read("report.js"), "/*figures*/": figures}
    return re.sub("|".join(map(re.escape, parts)), lambda m: parts[m[0]], _read("report.html"))


def _read(name: str) -> str:
    return files("headrace.profile").joinpath(name).read_text(encoding="utf-8")


def _figures(profile: Profile) -> dict[str, Any]:
    """What ``--json`` has, with two pictures in place of the single records. ``strip``: the median
    sample's spans, [part, layer or null, start µs, µs, µs waiting]. ``stacks``: of each layer, the
    median µs of its parts, [part, µs]. Parts by their place in ``parts``."""
    facts = profile.as_json()
    del facts["records"]
    places = {(group.first.operation, group.first.name): i for i, group in enumerate(profile.parts)}

    def place(record: Record) -> int:
        return places[record.operation, record.name]

    records = {record.part: record for record in profile.records}
    samples = sorted(profile.samples, key=lambda sample: sample.seconds)
    spans = samples[len(samples) // 2].spans
    origin = spans[0].start if spans else 0.0
    strip = [
        [
            place(records[span.part]),
            records[span.part].layer,
            round((span.start - origin) * 1e6, 2),
            round((span.end - span.start) * 1e6, 2),
            round(span.waiting * 1e6, 2),
        ]
        for span in spans
    ]
    stacks = [
        {
            "layer": group.first.layer,
            "parts": [[place(r), round(r.seconds.median * 1e6, 2)] for r in group.records],
        }
        for group in profile.layers
        if group.first.layer is not None
    ]
    return facts | {"strip": strip, "stacks": stacks}
