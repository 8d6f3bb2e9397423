"""The trace is what Chrome's trace-event format asks for, and says what the profile says."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise

import pytest


@pytest.fixture
def made(fake, profiled, tmp_path):
    runner = fake(lambda part: 10e-6)
    runner.before, runner.after, runner.gap = 4e-6, 6e-6, 1e-6
    runner.waiting = lambda part: 0.0 if part.host else 2e-6
    profile = profiled(runner, tokens=3)
    profile.write_trace(tmp_path / "trace.json")
    return profile, json.loads((tmp_path / "trace.json").read_text())


def test_every_event_has_what_the_format_asks(made):
    _, document = made
    assert set(document) == {"traceEvents", "displayTimeUnit"}
    assert document["displayTimeUnit"] in ("ms", "ns")
    for event in document["traceEvents"]:
        assert event["ph"] in ("M", "X")
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert event["name"]
        assert isinstance(event["args"], dict)
        if event["ph"] == "X":
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            assert event["cat"]
    names = {e["name"] for e in document["traceEvents"] if e["ph"] == "M"}
    assert names == {"process_name", "thread_name", "thread_sort_index"}


def test_every_span_is_there_with_its_time(made):
    profile, document = made
    events = [e for e in document["traceEvents"] if e["ph"] == "X"]
    threads = [e for e in document["traceEvents"] if e["name"] == "thread_name"]
    named = {e["tid"]: e["args"]["name"] for e in threads}
    by_track = Counter(named[e["tid"]] for e in events)
    parts = len(profile.records)
    assert by_track == {"tokens": 3, "host": 3, "a device": 3 * (parts - 1)}
    tokens = [e for e in events if named[e["tid"]] == "tokens"]
    seconds = [sample.seconds * 1e6 for sample in profile.samples]
    assert [e["dur"] for e in tokens] == pytest.approx(seconds)
    assert [e["name"] for e in tokens] == ["token 0", "token 1", "token 2"]
    spans = [e for e in events if named[e["tid"]] != "tokens"]
    assert sum(e["dur"] for e in spans) == pytest.approx(3 * parts * 10)
    attention = next(e for e in spans if e["name"] == "Attend 1: attention")
    assert (attention["cat"], attention["args"]["layer"]) == ("Midi", 1)
    assert attention["args"]["waiting µs"] == pytest.approx(2)
    record = next(r for r in profile.records if (r.operation, r.layer) == ("Attend", 1))
    assert attention["args"]["MB"] == pytest.approx(record.cost.n_bytes / 1e6)


def test_tracks_do_not_overlap(made):
    """Perfetto draws what overlaps on a track below it: nothing does, but by rounding."""
    _, document = made
    tracks: dict[int, list] = {}
    for event in document["traceEvents"]:
        if event["ph"] == "X":
            tracks.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    assert len(tracks) == 3
    for spans in tracks.values():
        spans.sort()
        assert all(a[1] <= b[0] + 1e-3 for a, b in pairwise(spans))
