"""A profile as one HTML page that needs nothing else: ``report.html`` with the rest put in."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from headrace.profile.record import Group, Record, Sample


def page(
    facts: dict[str, Any],
    parts: Sequence[Group],
    layers: Sequence[Group],
    samples: Sequence[Sample],
) -> str:
    """``facts``: what ``--json`` has."""
    # Inside a script element only "</" and "<!--" mean something; names may hold anything.
    figures = json.dumps(_figures(facts, parts, layers, samples), separators=(",", ":"))
    fill = {
        "/*css*/": _read("report.css"),
        "/*js*/": _read("report.js"),
        "/*figures*/": figures.replace("<", "\\u003c"),
    }
    return re.sub("|".join(map(re.escape, fill)), lambda m: fill[m[0]], _read("report.html"))


def _read(name: str) -> str:
    return files("headrace.profile").joinpath(name).read_text(encoding="utf-8")


def _figures(
    facts: dict[str, Any],
    parts: Sequence[Group],
    layers: Sequence[Group],
    samples: Sequence[Sample],
) -> dict[str, Any]:
    """``facts`` with two pictures in place of the single records. ``strip``: the median sample's
    spans, [part, layer or null, start µs, µs, µs waiting]. ``stacks``: of each layer, the median µs
    of its parts, [part, µs]. Parts by their place in ``parts``."""
    places = {(group.first.operation, group.first.name): i for i, group in enumerate(parts)}

    def place(record: Record) -> int:
        return places[record.operation, record.name]

    records = {record.part: record for group in parts for record in group.records}
    in_order = sorted(samples, key=lambda sample: sample.seconds)
    spans = in_order[len(in_order) // 2].spans
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
        for group in layers
        if group.first.layer is not None
    ]
    shown = {key: value for key, value in facts.items() if key != "records"}
    return shown | {"strip": strip, "stacks": stacks}
